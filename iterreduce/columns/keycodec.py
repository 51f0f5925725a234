"""Keys that are not single words, as bytes: two rows have the same bytes exactly where their keys are equal.

One column of text, bytes or lists is its own encoding, without a copy; a null is a row of length -1. Fixed
columns become rows of words (uint64): a bit per column that says whether it is null, then a word per number.
Where some of several columns are ragged, bytes are written one column after another: a marker (0: null, and
nothing follows), then 8 bytes per number, or the length and the bytes of a ragged row. Which of the three it
is depends on the kinds of the columns alone. The encoding never leaves the process: on the wire and on disk
keys are columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch, Column
from iterreduce.columns.hashing import column_words, is_word_column, load_word, row_bytes, words_to_column
from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema


@dataclass(frozen=True)
class KeyBytes:
    """Row ``i`` is ``data[starts[i] : starts[i] + lengths[i]]``; a length of -1 is the null key."""

    starts: Array  # int64 (n,)
    lengths: Array  # int64 (n,)
    data: Array  # uint8, or uint64 for keys of several fixed columns

    def row(self, i: int) -> list[int] | None:
        """One key: for the few that collide."""
        start, length = int(self.starts[i]), int(self.lengths[i])
        return None if length < 0 else self.data[start : start + length].tolist()


def is_word_key(schema: Schema) -> bool:
    """True for keys of one column that holds a single number, bool or date of at most 8 bytes per row."""
    field = next(iter(schema.values()))
    return (
        len(schema) == 1
        and is_word_column(np.empty((0, *field.shape), field.dtype))
        and field.kind == "fixed"
    )


@kernel
def _add_sizes(sizes: Any, valid: Any, fixed: Any, lengths: Any) -> None:
    for i in range(len(sizes)):
        if valid is None or valid[i]:
            sizes[i] += fixed if lengths is None else fixed + lengths[i]


@kernel
def _write_markers(data: Any, at: Any, valid: Any) -> None:
    for i in range(len(at)):
        data[at[i]] = 1 if valid is None or valid[i] else 0
        at[i] += 1


@kernel
def _write_words(data: Any, at: Any, valid: Any, words: Any) -> None:
    for i in range(len(at)):
        if valid is None or valid[i]:
            word, k = np.uint64(words[i]), at[i]
            for b in range(8):
                data[k + b] = np.uint8((word >> np.uint64(8 * b)) & np.uint64(255))
            at[i] += 8


@kernel
def _write_rows(data: Any, at: Any, valid: Any, starts: Any, lengths: Any, source: Any) -> None:
    for i in range(len(at)):
        if valid is None or valid[i]:
            k, start = at[i], starts[i]
            for b in range(lengths[i]):
                data[k + b] = source[start + b]
            at[i] += lengths[i]


@kernel
def _read_markers(data: Any, at: Any, valid: Any) -> None:
    for i in range(len(at)):
        valid[i] = data[at[i]] == 1
        at[i] += 1


@kernel
def _read_words(data: Any, at: Any, valid: Any, words: Any) -> None:
    for i in range(len(at)):
        words[i] = 0
        if valid[i]:
            words[i] = np.int64(load_word(data, np.uint64(at[i])))
            at[i] += 8


@kernel
def _read_rows(data: Any, at: Any, offsets: Any, out: Any) -> None:
    for i in range(len(at)):
        start, to, length = at[i], offsets[i], offsets[i + 1] - offsets[i]
        for b in range(length):
            out[to + b] = data[start + b]
        at[i] += length


def encode_keys(keys: Batch) -> KeyBytes:
    """The rows of a batch of key columns as comparable bytes (a view of a single ragged column)."""
    first = keys[keys.names[0]]
    if len(keys.names) == 1 and isinstance(first, Ragged):
        return _encode_ragged(first, keys.valid(keys.names[0]))
    if encoded_dtype(keys.schema) == np.uint64:
        return _encode_words(keys)
    parts = [_Part.of(name, keys[name], keys.valid(name)) for name in keys.names]
    sizes = np.full(len(keys), len(parts), np.int64)
    for part in parts:
        _add_sizes(sizes, part.valid, 8 * len(part.words), part.lengths)
    starts = np.cumsum(sizes) - sizes
    data, at = np.empty(int(sizes.sum()), np.uint8), starts.copy()
    for part in parts:
        part.write(data, at)
    return KeyBytes(starts, sizes, data)


def _encode_ragged(column: Ragged, valid: Array | None) -> KeyBytes:
    starts, lengths, data = row_bytes(column)
    if valid is not None:
        lengths = np.where(valid, lengths, -1)
    return KeyBytes(starts, lengths, data)


def encoded_dtype(schema: Schema) -> type[np.unsignedinteger[Any]]:
    """The dtype of the encoding: words where all columns are fixed."""
    return np.uint64 if all(field.kind == "fixed" for field in schema.values()) else np.uint8


def _marker_words(columns: int) -> int:
    return -(-columns // 64)


def _encode_words(keys: Batch) -> KeyBytes:
    columns = [column_words(name, keys[name]) for name in keys.names]
    n, at = len(keys), _marker_words(len(columns))
    rows = np.empty((n, at + sum(map(len, columns))), np.uint64)
    rows[:, :at] = 0
    for c, (name, words) in enumerate(zip(keys.names, columns, strict=True)):
        valid = keys.valid(name)
        if valid is not None:
            rows[:, c // 64] |= (~valid).astype(np.uint64) << np.uint64(c % 64)
        for word in words:
            rows[:, at] = word.view(np.uint64) if valid is None else np.where(valid, word, 0).view(np.uint64)
            at += 1
    return KeyBytes(np.arange(n) * at, np.full(n, at), rows.reshape(-1))


def _decode_words(schema: Schema, rows: KeyBytes) -> tuple[dict[str, Column], dict[str, Array]]:
    columns: dict[str, Column] = {}
    valid: dict[str, Array] = {}
    at = _marker_words(len(schema))
    width = at + sum(map(_numbers, schema.values()))
    table = rows.data.reshape(-1, width)[rows.starts // width] if width else np.empty((0, 0), np.uint64)
    for c, (name, field) in enumerate(schema.items()):
        valid[name] = (table[:, c // 64] >> np.uint64(c % 64)) & np.uint64(1) == 0
        words = np.ascontiguousarray(table[:, at : at + _numbers(field)]).view(np.int64)
        columns[name] = _to_fixed(field, words).reshape(len(table), *field.shape)
        at += _numbers(field)
    return columns, valid


def _numbers(field: Field) -> int:
    """Words of a row of a fixed column."""
    return int(np.prod(field.shape, dtype=np.int64)) * (2 if field.dtype.kind == "c" else 1)


@dataclass(frozen=True)
class _Part:
    """One column of a composite key: words, and for a ragged one its rows."""

    valid: Array | None
    words: list[Array]
    starts: Array | None = None
    lengths: Array | None = None
    data: Array | None = None

    @classmethod
    def of(cls, name: str, column: Column, valid: Array | None) -> _Part:
        if isinstance(column, Ragged):
            starts, lengths, data = row_bytes(column)
            return cls(valid, [lengths], starts, lengths, data)
        return cls(valid, column_words(name, column))

    def write(self, data: Array, at: Array) -> None:
        _write_markers(data, at, self.valid)
        for words in self.words:
            _write_words(data, at, self.valid, words)
        if self.data is not None:
            _write_rows(data, at, self.valid, self.starts, self.lengths, self.data)


def decode_keys(schema: Schema, rows: KeyBytes) -> Batch:
    """The inverse of `encode_keys`: key columns of this schema, with masks where a field is nullable or a
    null came.
    """
    name = next(iter(schema))
    columns: dict[str, Column] = {}
    valid: dict[str, Array] = {}
    if len(schema) == 1 and schema[name].kind != "fixed":
        columns[name], valid[name] = _decode_ragged(schema[name], rows)
    elif encoded_dtype(schema) == np.uint64:
        columns, valid = _decode_words(schema, rows)
    else:
        at = rows.starts.copy()
        for name, field in schema.items():
            columns[name], valid[name] = _decode_column(field, rows.data, at)
    masks = {n: mask for n, mask in valid.items() if schema[n].nullable or not mask.all()}
    return Batch.from_dict(columns, masks)


def _decode_ragged(field: Field, rows: KeyBytes) -> tuple[Ragged, Array]:
    return _gather_rows(field, rows.data, rows.starts.copy(), np.maximum(rows.lengths, 0)), rows.lengths >= 0


def _gather_rows(field: Field, data: Array, at: Array, lengths: Array) -> Ragged:
    offsets = np.zeros(len(at) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    out = np.empty(int(offsets[-1]), np.uint8)
    _read_rows(data, at, offsets, out)
    stored = np.dtype(np.float64) if field.dtype.kind == "f" else field.dtype
    return Ragged(offsets // stored.itemsize, out.view(stored).astype(field.dtype, copy=False), field.kind)  # type: ignore[arg-type]


def _decode_column(field: Field, data: Array, at: Array) -> tuple[Column, Array]:
    n, valid = len(at), np.empty(len(at), bool)
    _read_markers(data, at, valid)
    if field.kind != "fixed":
        lengths = np.empty(n, np.int64)
        _read_words(data, at, valid, lengths)
        return _gather_rows(field, data, at, lengths), valid
    words = np.empty((_numbers(field), n), np.int64)
    for row in words:
        _read_words(data, at, valid, row)
    return _to_fixed(field, words.T).reshape(n, *field.shape), valid


def _to_fixed(field: Field, words: Array) -> Array:
    flat = np.ascontiguousarray(words)
    if field.dtype.kind == "c":
        return flat.view(np.complex128).astype(field.dtype, copy=False)
    return words_to_column(flat.reshape(-1), field.dtype)
