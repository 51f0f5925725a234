"""Stable 64-bit hashes of key columns: the same on every host, in every run, on any number of ranks.

A key column of one fixed number (integer, bool, float, date) is first brought to its *canonical word*, an
int64 that is equal exactly where the keys are equal, and then mixed by a bijection: so hashes of such keys
never collide, and the key can be computed back from its hash. Text, bytes, lists and several columns are
hashed to 64 bits, where collisions are possible and are settled by whoever compares keys.

Canonical order of distinct keys, everywhere, is ascending hash; tables and partitions use the top bits, which
are the well mixed ones. This is not a cryptographic hash: whoever may choose keys can choose colliding ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch, Column
from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.errors import UsageError

# odd multipliers: the golden ratio of 2^64 (Knuth, TAOCP 3, 6.4), and one of Pelle Evensen's for a second
# round
FIRST = 0x9E3779B97F4A7C15
SECOND = 0xD6E8FEB86659FD93
FIRST_64, SECOND_64 = np.uint64(FIRST), np.uint64(SECOND)
FIRST_INVERSE = np.uint64(pow(FIRST, -1, 2**64))
SECOND_INVERSE = np.uint64(pow(SECOND, -1, 2**64))
HALF = np.uint64(32)
NULL_HASH = np.uint64(0x5D1F3A9C7B2E4806)  # any constant: all nulls are one key
EMPTY = np.uint64(
    0xFFFFFFFFFFFFFFFF
)  # marks a free row in tables; hashes of text and of several columns avoid it
WORD_KINDS = "biufmM"


@kernel
def mix(word: Any) -> Any:
    """The bijection, of one uint64: multiply, fold the upper half into the lower, multiply."""
    h = word * FIRST_64
    h ^= h >> HALF
    return h * SECOND_64


@kernel
def unmix(hashed: Any) -> Any:
    """The inverse of `mix`."""
    h = hashed * SECOND_INVERSE
    h ^= h >> HALF
    return h * FIRST_INVERSE


@kernel
def _mix_all(words: Any, out: Any) -> None:
    for i in range(len(words)):
        out[i] = mix(words[i])


@kernel
def _unmix_all(hashes: Any, out: Any) -> None:
    for i in range(len(hashes)):
        out[i] = unmix(hashes[i])


def hash_words(keys: Array, out: Array | None = None) -> Array:
    """Hash int64 words of shape ``(n,)`` to uint64 ``(n,)``, one to one; ``out`` takes the result if given.

    >>> words = np.array([0, 1, -1, 2**63 - 1])
    >>> bool((unhash_words(hash_words(words)) == words).all())
    True
    """
    words = np.ascontiguousarray(keys).view(np.uint64)
    hashes = np.empty(len(words), np.uint64) if out is None else out
    _mix_all(words, hashes)
    return hashes


def unhash_words(hashes: Array) -> Array:
    """The int64 words ``(n,)`` of which these are the hashes, uint64 ``(n,)``."""
    words = np.empty(len(hashes), np.uint64)
    _unmix_all(np.ascontiguousarray(hashes), words)
    return words.view(np.int64)


def is_word_column(column: Column) -> bool:
    """True for a column whose keys are single words: one number, bool or date of at most 8 bytes per row."""
    return (
        isinstance(column, np.ndarray)
        and column.ndim == 1
        and column.dtype.kind in WORD_KINDS
        and column.dtype.itemsize <= 8
    )


@kernel
def _one_zero_one_nan(values: Any, out: Any) -> None:
    for i in range(len(values)):
        v = np.float64(values[i]) + 0.0  # -0.0 + 0.0 is 0.0
        out[i] = v if v == v else np.nan


def key_words(column: Array) -> Array:
    """Canonical words, int64 ``(n,)``, of a fixed column ``(n,)``: equal exactly where the keys are equal.

    Integers and bools keep their value (uint64 its bits), dates their int64; floats become float64 with one
    zero and one NaN, seen as int64. Integers of 8 bytes are returned as a view.

    >>> len(set(key_words(np.array([0.0, -0.0, np.nan, -np.nan])).tolist()))
    2
    """
    kind = column.dtype.kind
    if kind == "f":
        floats = np.empty(len(column), np.float64)
        _one_zero_one_nan(column.astype(np.float32) if column.dtype.itemsize == 2 else column, floats)
        return floats.view(np.int64)
    if column.dtype.itemsize == 8:
        return np.ascontiguousarray(column).view(np.int64)
    return column.astype(np.int64, order="C")


def words_to_column(words: Array, dtype: np.dtype[Any]) -> Array:
    """The inverse of `key_words`: a column of ``dtype`` from int64 words (a view where it can be)."""
    if dtype.kind == "f":
        return words.view(np.float64).astype(dtype, copy=False)
    if dtype.itemsize == 8:
        return words.view(dtype)
    return words.astype(dtype)


@kernel
def load_word(data: Any, at: Any) -> Any:
    """Eight bytes from ``at`` on, little-endian on every host, as uint64."""
    word = np.uint64(0)
    for k in range(8):
        word |= np.uint64(data[at + np.uint64(k)]) << np.uint64(8 * k)
    return word


@kernel
def hash_row(data: Any, start: Any, length: Any) -> Any:
    """Hash ``length`` bytes from ``start`` on: a chain of mixes over 8-byte words, the tail zero-padded."""
    at, end = np.uint64(start), np.uint64(start + length)
    h = mix(np.uint64(length) + SECOND_64)
    while at + np.uint64(8) <= end:
        h = mix(h ^ load_word(data, at))
        at += np.uint64(8)
    if at < end:
        tail, shift = np.uint64(0), np.uint64(0)
        while at < end:
            tail |= np.uint64(data[at]) << shift
            shift += np.uint64(8)
            at += np.uint64(1)
        h = mix(h ^ tail)
    h ^= h >> HALF
    h *= FIRST_64
    return h if h != EMPTY else np.uint64(0)


@kernel
def _hash_rows(data: Any, starts: Any, lengths: Any, out: Any) -> None:
    for i in range(len(starts)):
        out[i] = hash_row(data, starts[i], lengths[i])


def row_bytes(column: Ragged) -> tuple[Array, Array, Array]:
    """The rows of a ragged column as bytes: starts int64 ``(n,)``, lengths int64 ``(n,)`` and data uint8.

    Lists of floats are made canonical first, as in `key_words`.
    """
    values, size = column.values, column.values.itemsize
    if values.dtype.kind == "f":
        values, size = key_words(values), 8
    data = np.ascontiguousarray(values).view(np.uint8)
    return column.offsets[:-1] * size, np.diff(column.offsets) * size, data


def hash_bytes(column: Ragged) -> Array:
    """Hash the rows of a text, bytes or list column to uint64 ``(n,)``.

    >>> h = hash_bytes(Ragged.from_list(["a", "b", "a"]))
    >>> bool(h[0] == h[2]), bool(h[0] == h[1])
    (True, False)
    """
    starts, lengths, data = row_bytes(column)
    hashes = np.empty(len(starts), np.uint64)
    _hash_rows(data, starts, lengths, hashes)
    return hashes


@kernel
def _chain(hashes: Any, words: Any) -> None:
    for i in range(len(hashes)):
        h = mix((hashes[i] ^ (hashes[i] >> HALF)) + mix(words[i]))
        hashes[i] = h if h != EMPTY else np.uint64(0)


def column_words(name: str, column: Column) -> list[Array]:
    """The canonical word columns of a fixed column: one per number of a row, two per complex number."""
    n, numbers = len(column), int(np.prod(column.shape[1:], dtype=np.int64))
    if column.dtype.kind == "c":
        parts = column.astype(np.complex128, order="C").reshape(n, numbers).view(np.float64)
    elif column.dtype.kind in WORD_KINDS and column.dtype.itemsize <= 8:
        parts = column.reshape(n, numbers)
    else:
        raise UsageError(
            f'column "{name}" of dtype {column.dtype} cannot be a key: '
            "wanted numbers, bools, dates, text or bytes"
        )
    return [key_words(parts[:, k]) for k in range(parts.shape[1])]


def _column_hashes(name: str, column: Column) -> Array:
    if isinstance(column, Ragged):
        return hash_bytes(column)
    words = column_words(name, column)
    hashes = hash_words(words[0]) if words else np.zeros(len(column), np.uint64)
    for more in words[1:]:
        _chain(hashes, more.view(np.uint64))
    return hashes


def hash_keys(keys: Batch) -> Array:
    """Hash the rows of a batch of key columns to uint64 ``(n,)``.

    One column of a single number: its canonical word through `hash_words`. Text, bytes and lists:
    `hash_bytes`. Several columns are chained in order. Nulls hash alike, whatever lies under the mask. Raises
    `UsageError` without columns.

    >>> pairs = Batch(a=np.array([1, 2, 1]), b=["x", "x", "x"])
    >>> h = hash_keys(pairs)
    >>> bool(h[0] == h[2]), bool(h[0] == h[1])
    (True, False)
    """
    if not keys.names:
        raise UsageError("a key needs at least one column, got none")
    hashes: Array | None = None
    for name in keys.names:
        own, valid = _column_hashes(name, keys[name]), keys.valid(name)
        if valid is not None:
            own[~valid] = NULL_HASH
        if hashes is None:
            hashes = own
        else:
            _chain(hashes, own)
    assert hashes is not None
    return hashes


def row_sums(batch: Batch) -> tuple[int, int]:
    """What rows come to in any order: two hashes of each, added modulo 2^64, as int64. Columns there must be.

    >>> rows = Batch(a=np.array([1, 2, 3]))
    >>> row_sums(rows) == row_sums(rows.take(np.array([2, 0, 1])))
    True
    >>> row_sums(rows) == row_sums(rows.slice(0, 2))
    False
    """
    first = hash_keys(batch)
    second = hash_words((first ^ np.uint64(0x9E3779B97F4A7C15)).view(np.int64)) * first
    sums = [int(part.sum(dtype=np.uint64).view(np.int64)) for part in (first, second)]
    return sums[0], sums[1]
