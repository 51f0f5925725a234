"""Rows as int64 words for the wire, and back.

A segment holds the columns of a batch one after another, each piece padded to a border of 8 bytes: the values
of a fixed column; for a ragged one ``rows + 1`` int64 offsets from zero, then the values; after each nullable
column one byte per row (1: valid). Padding is zero, so that equal rows are equal words. A segment says
nothing about itself: the schema and the number of rows travel in a header. Bytes are those of the host: ranks
share one kind of machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch, Column
from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema, difference
from iterreduce.errors import SchemaError

UNITS = (np.uint64, np.uint32, np.uint16, np.uint8)


@kernel
def _gather(source: Any, order: Any, out: Any) -> None:
    for i in range(len(order)):
        out[i] = source[np.uint64(order[i])]


@kernel
def _gather_rows(source: Any, order: Any, out: Any) -> None:
    width = np.uint64(source.shape[1])
    for i in range(len(order)):
        row = np.uint64(order[i])
        for k in range(width):
            out[i, k] = source[row, k]


@kernel
def _gather_offsets(offsets: Any, order: Any, out: Any) -> None:
    end = 0
    out[0] = 0
    for i in range(len(order)):
        row = order[i]
        end += offsets[row + 1] - offsets[row]
        out[i + 1] = end


@kernel
def _gather_values(source: Any, offsets: Any, order: Any, out: Any) -> None:
    at = 0
    for i in range(len(order)):
        for k in range(offsets[order[i]], offsets[order[i] + 1]):
            out[at] = source[k]
            at += 1


@kernel
def _ragged_sizes(offsets: Any, order: Any, bounds: Any, out: Any) -> None:
    for d in range(len(out)):
        total = 0
        for i in range(bounds[d], bounds[d + 1]):
            row = order[i]
            total += offsets[row + 1] - offsets[row]
        out[d] = total


def _words(nbytes: Any) -> Any:
    return (nbytes + 7) // 8


def _row_bytes(column: Array) -> int:
    return int(column.itemsize * math.prod(column.shape[1:]))


def _as_units(rows: Array) -> Array:
    """The same memory as unsigned integers as wide as the row allows: (n,) or (n, units)."""
    size = _row_bytes(rows)
    if rows.ndim == 1 and size == 8:
        return rows.view(np.uint64)
    unit = next(u for u in UNITS if size % np.dtype(u).itemsize == 0)
    flat = rows.reshape(-1).view(unit)
    per_row = size // np.dtype(unit).itemsize
    return flat if per_row == 1 else flat.reshape(len(rows), per_row)


def packed_words(batch: Batch, order: Array | None, bounds: Array, schema: Schema | None = None) -> Array:
    """Words of each destination's segment, int64 ``(destinations,)``.

    Destination ``d`` gets rows ``order[bounds[d]:bounds[d + 1]]`` (``order`` None: rows as they stand);
    ``bounds`` int64 ``(destinations + 1,)``. ``schema``: the agreed one, if it has nulls where this batch has
    none.

    >>> packed_words(Batch(a=np.zeros(3), b=np.zeros(3, np.int8)), None, np.array([0, 2, 3])).tolist()
    [3, 2]
    """
    bounds = np.asarray(bounds)
    counts, total = np.diff(bounds), np.zeros(len(bounds) - 1, np.int64)
    for column in _columns(batch, schema):
        if isinstance(column, Ragged):
            total += counts + 1 + _words(_value_counts(column, order, bounds) * column.values.itemsize)
        else:
            total += _words(counts * _row_bytes(column))
    return total


def _value_counts(column: Ragged, order: Array | None, bounds: Array) -> Array:
    if order is None:
        return np.diff(column.offsets[bounds])
    counts = np.empty(len(bounds) - 1, np.int64)
    _ragged_sizes(column.offsets, order, bounds, counts)
    return counts


def _columns(batch: Batch, schema: Schema | None) -> list[Column]:
    """The columns of a segment in order, each followed by its mask if it has one, or has one by agreement."""
    nullable = batch._valid if schema is None else _agreed_nulls(batch.schema, schema)
    columns: list[Column] = []
    for name, column in batch._columns.items():
        columns.append(column)
        if name in nullable:
            mask = batch._valid.get(name)
            columns.append(np.ones(len(batch), bool) if mask is None else mask)
    return columns


def _agreed_nulls(own: Schema, agreed: Schema) -> set[str]:
    """The columns with a mask in an agreed schema, which may only add nulls to our own; `SchemaError`
    otherwise.
    """
    full = [
        (n, Field(f.kind, f.dtype, f.shape, f.nullable or (n in agreed and agreed[n].nullable)))
        for n, f in own.items()
    ]
    if full != list(agreed.items()):
        raise SchemaError(f"rows do not have the columns that were agreed on: {difference(own, agreed)}")
    return {name for name, field in agreed.items() if field.nullable}


def pack(
    batch: Batch, order: Array | None, lo: int, hi: int, out: Array, at: int = 0, schema: Schema | None = None
) -> int:
    """Write rows ``order[lo:hi]`` (``order`` None: rows ``lo`` to ``hi``) into ``out`` from word ``at`` on.

    ``out``: int64, C-contiguous, with room for what `packed_words` says; returns the words written. Rows are
    gathered straight into the buffer.

    >>> out = np.zeros(4, np.int64)
    >>> rows = Batch(a=np.array([1, 2, 3]), b=np.array([True, False, True]))
    >>> pack(rows, np.array([2, 0, 1]), 0, 2, out)
    3
    >>> unpack(out[:3], rows.schema, 2)["a"].tolist()
    [3, 1]
    """
    begin, chosen = at, None if order is None else order[lo:hi]
    for column in _columns(batch, schema):
        if isinstance(column, Ragged):
            at = _pack_ragged(column, chosen, lo, hi, out, at)
        elif hi > lo and column.size:
            at = _pack_fixed(column, chosen, lo, hi, out, at)
    return at - begin


def _piece(out: Array, at: int, nbytes: int) -> tuple[Array, int]:
    """The bytes of a piece that begins at word ``at``, its padding cleared, and the word behind it."""
    end = at + _words(nbytes)
    if end > len(out):
        raise SchemaError(f"a segment of at least {end} words does not fit into {len(out)}")
    if nbytes % 8:
        out[end - 1] = 0
    return out[at:end].view(np.uint8)[:nbytes], end


def _pack_fixed(column: Array, chosen: Array | None, lo: int, hi: int, out: Array, at: int) -> int:
    if not column.flags.c_contiguous:  # only the rows that go are copied
        column, chosen, lo, hi = (
            np.ascontiguousarray(column[lo:hi] if chosen is None else column[chosen]),
            None,
            0,
            hi - lo,
        )
    source = _as_units(column)
    piece, end = _piece(out, at, (hi - lo) * _row_bytes(column))
    target = piece.view(source.dtype).reshape(-1, *source.shape[1:])
    if chosen is None:
        target[...] = source[lo:hi]
    elif source.ndim == 1:
        _gather(source, chosen, target)
    else:
        _gather_rows(source, chosen, target)
    return end


def _pack_ragged(column: Ragged, chosen: Array | None, lo: int, hi: int, out: Array, at: int) -> int:
    source = column.offsets
    piece, at = _piece(out, at, 8 * (hi - lo + 1))
    offsets = piece.view(np.int64)
    if chosen is None:
        np.subtract(source[lo : hi + 1], source[lo], out=offsets)
    else:
        _gather_offsets(source, chosen, offsets)
    values = _as_units(np.ascontiguousarray(column.values)) if len(column.values) else np.empty(0, np.uint8)
    piece, at = _piece(out, at, int(offsets[-1]) * column.values.itemsize)
    if not len(piece):
        return at
    target = piece.view(values.dtype).reshape(-1, *values.shape[1:])
    if chosen is None:
        target[...] = values[source[lo] : source[hi]]
    else:
        _gather_values(values, source, chosen, target)
    return at


def unpack(words: Array, schema: Schema, rows: int, copy: bool = False) -> Batch:
    """The rows of a segment, a batch of ``rows`` rows of this schema.

    ``words``: int64, C-contiguous, the segment (or more). Columns are views of ``words`` and change with it;
    ``copy`` gives them memory of their own.
    """
    if rows == 0:  # a rank that knew no schema sent not even offsets
        return Batch.empty(schema)
    columns: dict[str, Column] = {}
    valid: dict[str, Array] = {}
    at = 0
    for name, field in schema.items():
        columns[name], at = _unpack_column(words, field, rows, at)
        if field.nullable:
            valid[name], at = _take(words, at, np.dtype(bool), rows)
    batch = Batch._trusted(columns, valid, rows, schema)
    return batch.copy() if copy else batch


def _take(words: Array, at: int, dtype: np.dtype[Any], count: int) -> tuple[Array, int]:
    nbytes = count * dtype.itemsize
    end = at + _words(nbytes)
    if end > len(words):
        raise SchemaError(f"a segment of {len(words)} words is too short for its rows: wanted at least {end}")
    return words[at:end].view(np.uint8)[:nbytes].view(dtype), end


def _unpack_column(words: Array, field: Field, rows: int, at: int) -> tuple[Column, int]:
    if field.kind == "fixed":
        flat, at = _take(words, at, field.dtype, rows * int(np.prod(field.shape, dtype=np.int64)))
        return (flat.reshape(rows, *field.shape) if field.shape else flat), at
    offsets, at = _take(words, at, np.dtype(np.int64), rows + 1)
    values, at = _take(words, at, field.dtype, int(offsets[-1]))
    return Ragged(offsets, values, field.kind), at


def unpack_all(segments: Sequence[Array], schema: Schema, rows: Sequence[int]) -> Batch:
    """The rows of several segments, in order, in memory of their own: one copy."""
    parts = [unpack(words, schema, n) for words, n in zip(segments, rows, strict=True) if n]
    if not parts:
        return Batch.empty(schema)
    return Batch.concat(parts) if len(parts) > 1 else parts[0].copy()
