"""Distinct keys of any kind, numbered in order of arrival: text, bytes, lists, several columns.

Keys are compared byte by byte wherever their hashes agree, so colliding keys stay apart. Keys of a single
number do not come here: their hash is the key (`iterreduce.columns.keytable`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import EMPTY
from iterreduce.columns.jit import kernel
from iterreduce.columns.keycodec import KeyBytes, decode_keys, encode_keys, encoded_dtype
from iterreduce.columns.keytable import OrderedTable
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema

LARGEST_HASH = EMPTY - np.uint64(1)
PIECE = 4096


@kernel
def _same(a: Any, start: Any, b: Any, other: Any, length: Any) -> bool:
    k = 0
    while k < length and a[start + k] == b[other + k]:
        k += 1
    return bool(k >= length)  # a null, of length -1, has nothing to compare


@kernel
def _insert(
    hashes: Any,
    starts: Any,
    lengths: Any,
    data: Any,
    held: Any,
    table: Any,
    place: Any,
    counts: Any,
    numbers: Any,
) -> int:
    """Find or insert keys; the rows done: it stops at a key for which table or store must grow."""
    held_starts, held_lengths, held_data = held
    base, shift, homes, probes, room = place
    one = np.uint64(1)
    for i in range(len(hashes)):
        h, length = hashes[i], lengths[i]
        j = (h - base) >> shift
        if j >= homes:
            return i
        home = j
        while True:
            if table[j, 0] == h:
                k = np.int64(table[j, 1])
                if held_lengths[k] == length and _same(data, starts[i], held_data, held_starts[k], length):
                    break
            elif table[j, 0] == EMPTY:
                k, used = counts[0], counts[1]
                if (
                    np.uint64(k) == room
                    or j - home >= probes
                    or k == len(held_starts)
                    or used + length > len(held_data)
                ):
                    return i
                for b in range(length):
                    held_data[used + b] = data[starts[i] + b]
                held_starts[k], held_lengths[k] = used, length
                counts[0] += 1
                counts[1] += max(length, 0)
                table[j, 0], table[j, 1] = h, np.uint64(k)
                break
            j += one
        numbers[i] = k
    return len(hashes)


@kernel
def _find(
    hashes: Any, starts: Any, lengths: Any, data: Any, held: Any, table: Any, place: Any, numbers: Any
) -> None:
    held_starts, held_lengths, held_data = held
    base, shift, homes, _, _ = place
    one = np.uint64(1)
    for i in range(len(hashes)):
        numbers[i] = -1
        h, length = hashes[i], lengths[i]
        j = (h - base) >> shift
        if j >= homes:
            continue
        while table[j, 0] != EMPTY:
            if table[j, 0] == h:
                k = np.int64(table[j, 1])
                if held_lengths[k] == length and _same(data, starts[i], held_data, held_starts[k], length):
                    numbers[i] = k
                    break
            j += one


def _grown(array: Array, wanted: int) -> Array:
    larger = np.empty(max(wanted, 2 * len(array)), array.dtype)
    larger[: len(array)] = array
    return larger


class KeyStore:
    """Keys of this schema, numbered 0, 1, ... as they come.

    >>> from iterreduce.columns.hashing import hash_keys
    >>> words = Batch(word=["to", "be", "to"])
    >>> store, numbers = KeyStore(words.schema), np.empty(3, np.int64)
    >>> store.number(words, hash_keys(words), numbers)
    >>> numbers.tolist(), len(store)
    ([0, 1, 0], 2)
    """

    def __init__(self, schema: Schema):
        self.schema = schema
        self._table = OrderedTable(1, _no_fill)
        self._counts = np.zeros(2, np.int64)  # keys, bytes or words of their encoding
        self._starts, self._lengths = np.empty(0, np.int64), np.empty(0, np.int64)
        self._data = np.empty(0, encoded_dtype(schema))

    def __len__(self) -> int:
        return int(self._counts[0])

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return self._table.nbytes + self._starts.nbytes + self._lengths.nbytes + self._data.nbytes

    def clear(self) -> None:
        """Forget all keys, keep the memory."""
        self._table.clear()
        self._counts[:] = 0

    def _place(self) -> tuple[np.uint64, ...]:
        t = self._table
        return t.base, t.shift, np.uint64(t.homes), np.uint64(t.probes), np.uint64(t.room)

    def number(self, keys: Batch, hashes: Array, numbers: Array) -> None:
        """Write the number of each row's key into ``numbers``, int64 ``(n,)``; new keys get the next ones."""
        rows, hashes, done = encode_keys(keys), np.minimum(hashes, LARGEST_HASH), 0
        if not self._table.homes:
            self._table.reserve(min(len(keys), PIECE), hashes)
        while True:
            held = self._starts, self._lengths, self._data
            rest = hashes[done:], rows.starts[done:], rows.lengths[done:], rows.data
            done += _insert(*rest, held, self._table.unsigned, self._place(), self._counts, numbers[done:])
            self._table.used = len(self)
            if done == len(hashes):
                return
            self._make_room(hashes[done:], rows.lengths[done:])

    def _make_room(self, hashes: Array, lengths: Array) -> None:
        used = int(self._counts[1]) + int(lengths[0])
        if len(self) == len(self._starts):
            self._starts, self._lengths = (
                _grown(a, min(len(hashes), PIECE)) for a in (self._starts, self._lengths)
            )
        elif used > len(self._data):
            self._data = _grown(self._data, used + int(np.maximum(lengths[:PIECE], 0).sum()))
        else:
            self._table.make_room(hashes[:PIECE])

    def find(self, keys: Batch, hashes: Array, numbers: Array) -> None:
        """Write the number of each row's key into ``numbers``, -1 where it is absent."""
        if not self._table.homes:
            numbers.fill(-1)
            return
        rows, held = encode_keys(keys), (self._starts, self._lengths, self._data)
        capped = np.minimum(hashes, LARGEST_HASH)
        _find(
            capped, rows.starts, rows.lengths, rows.data, held, self._table.unsigned, self._place(), numbers
        )

    def canonical(self) -> tuple[Array, Array]:
        """``(hashes uint64[m], numbers int64[m])`` in canonical order: ascending hash, ties by key bytes."""
        hashes, rows, _ = self._table.scan()
        numbers = self._table.words[rows, 1] if len(rows) else rows
        ties = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(ties):
            self._settle(ties, numbers)
        return hashes, numbers

    def _settle(self, ties: Array, numbers: Array) -> None:
        """Sort keys of equal hashes by their bytes, null first. A Python loop: 2^-64 of all pairs of keys
        collide.
        """
        rows, breaks = self._rows(), np.flatnonzero(np.diff(ties) > 1) + 1
        for first, last in pairwise([0, *breaks.tolist(), len(ties)]):
            lo, hi = int(ties[first]), int(ties[last - 1]) + 2
            numbers[lo:hi] = sorted(
                numbers[lo:hi].tolist(), key=lambda k: (rows.row(k) is not None, rows.row(k) or [])
            )

    def _rows(self) -> KeyBytes:
        m, used = self._counts.tolist()
        return KeyBytes(self._starts[:m], self._lengths[:m], self._data[:used])

    def keys(self, numbers: Array) -> Batch:
        """The keys of these numbers, as columns in memory of their own."""
        return decode_keys(self.schema, self.rows(numbers))

    def rows(self, numbers: Array) -> KeyBytes:
        """The keys of these numbers, as bytes that are kept here."""
        rows = self._rows()
        return KeyBytes(rows.starts[numbers], rows.lengths[numbers], rows.data)


def _no_fill(rows: Array) -> None:
    """Numbers are written when a key is inserted."""
