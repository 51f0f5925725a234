"""Distinct keys in canonical order, found and joined by walking two such lists side by side.

What a fold hands out is in canonical order (ascending hash, ties by key bytes, null first), and so is a
`KeyList`: to find one in the other takes no hash table, only a walk through both, which gallops where one is
much longer. Keys are compared byte by byte where hashes agree, so colliding keys stay apart; a single number
is its hash.

It is not an index for keys in any order (`iterreduce.columns.groups.KeyIndex`), and knows of no ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import load_word
from iterreduce.columns.jit import kernel
from iterreduce.columns.keycodec import KeyBytes, encode_keys, is_word_key
from iterreduce.columns.keystore import LARGEST_HASH
from iterreduce.columns.numbering import number_keys
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema


@kernel
def _seek(known: Any, h: Any, at: Any) -> Any:
    """The first place from ``at`` on whose hash is not below ``h``: strides that double, then bisection."""
    n = len(known)
    if at >= n or known[at] >= h:
        return at
    step = 1
    while at + step < n and known[at + step] < h:
        at += step
        step *= 2
    end = min(at + step, n)
    while end - at > 1:
        middle = (at + end) // 2
        if known[middle] < h:
            at = middle
        else:
            end = middle
    return end


@kernel
def _find_words(hashes: Any, known: Any, places: Any) -> None:
    at = 0
    for i in range(len(hashes)):
        at = _seek(known, hashes[i], at)
        places[i] = at if at < len(known) and known[at] == hashes[i] else -1 - at


@kernel
def _compare(a: Any, start: Any, length: Any, b: Any, other: Any, size: Any) -> int:
    """Below, at or above 0 as the first row stands before, with or behind the second; null is first."""
    for k in range(min(length, size)):
        if a[start + k] != b[other + k]:
            return -1 if a[start + k] < b[other + k] else 1
    return int(length - size)


@kernel
def _equal(a: Any, start: Any, b: Any, other: Any, length: Any) -> bool:
    """Are these bytes the same? Eight at a time, the last eight once more where they overlap."""
    i, j, n = np.uint64(start), np.uint64(other), np.uint64(max(length, 0))
    eight, one, k = np.uint64(8), np.uint64(1), np.uint64(0)
    while k + eight <= n:
        if load_word(a, i + k) != load_word(b, j + k):
            return False
        k += eight
    if n >= eight:
        return bool(load_word(a, i + n - eight) == load_word(b, j + n - eight))
    while k < n:
        if a[i + k] != b[j + k]:
            return False
        k += one
    return True


@kernel
def _find_rows(hashes: Any, rows: Any, known: Any, held: Any, places: Any) -> None:
    starts, lengths, data = rows
    held_starts, held_lengths, held_data = held
    at = 0
    for i in range(len(hashes)):
        at = _seek(known, hashes[i], at)
        places[i] = -1 - at
        while at < len(known) and known[at] == hashes[i]:
            same = lengths[i] == held_lengths[at]
            if same and _equal(data, starts[i], held_data, held_starts[at], lengths[i]):
                places[i] = at
                break
            side = _compare(data, starts[i], lengths[i], held_data, held_starts[at], held_lengths[at])
            if side < 0:
                break
            at += 1
        if places[i] < 0:
            places[i] = -1 - at


@dataclass(frozen=True)
class Union:
    """Two lists in one, and where the keys of each stand in it."""

    keys: KeyList
    old: Array  # int64, ascending
    new: Array  # int64, ascending


@dataclass(frozen=True)
class KeyList:
    """Distinct keys in canonical order; ``hashes`` uint64 ``(n,)``, ascending.

    >>> known = KeyList.of(Batch(k=["to", "be", "or"]))
    >>> some = KeyList.of(Batch(k=["be", "not"]))
    >>> found = known.find(some)
    >>> [k for k, at in zip(some.keys["k"].to_list(), found.tolist()) if at >= 0]
    ['be']
    >>> len(known.union(some).keys)
    4
    """

    hashes: Array
    keys: Batch

    @classmethod
    def of(cls, keys: Batch) -> KeyList:
        """The distinct keys of these rows."""
        numbered = number_keys(keys)
        return cls(numbered.hashes, numbered.keys)

    @classmethod
    def sorted(cls, hashes: Array, keys: Batch) -> KeyList:
        """Keys that are distinct and in canonical order already, with what `hash_keys` says of them."""
        return cls(hashes if is_word_key(keys.schema) else np.minimum(hashes, LARGEST_HASH), keys)

    @classmethod
    def empty(cls, schema: Schema) -> KeyList:
        """No keys, of this schema."""
        return cls(np.empty(0, np.uint64), Batch.empty(schema))

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def nbytes(self) -> int:
        """Bytes held, with those of the encoded keys as soon as they are compared."""
        encoded = self.keys.nbytes if len(self.keys.names) > 1 else 0
        compared = 0 if self._words else 16 * len(self) + encoded
        return int(self.hashes.nbytes + self.keys.nbytes + compared)

    @property
    def _words(self) -> bool:
        """Is the hash the whole key?"""
        return is_word_key(self.keys.schema) and self.keys.valid(self.keys.names[0]) is None

    @cached_property
    def _rows(self) -> tuple[Array, Array, Array]:
        if is_word_key(self.keys.schema):  # the null key and a number that has its hash: told apart by length
            valid = self.keys.valid(self.keys.names[0])
            lengths = np.zeros(len(self), np.int64) if valid is None else valid.astype(np.int64) - 1
            rows = KeyBytes(np.zeros(len(self), np.int64), lengths, np.empty(0, np.uint8))
        else:
            rows = encode_keys(self.keys)
        return tuple(np.ascontiguousarray(a) for a in (rows.starts, rows.lengths, rows.data))  # type: ignore[return-value]

    def take(self, rows: Array) -> KeyList:
        """The keys in these places, int64, ascending."""
        if len(rows) == len(self):
            return self
        return (
            KeyList(self.hashes[rows], self.keys.take(rows)) if len(rows) else KeyList.empty(self.keys.schema)
        )

    def copy(self) -> KeyList:
        """The same keys in memory of their own."""
        return KeyList(self.hashes.copy(), self.keys.copy())

    def find(self, other: KeyList) -> Array:
        """The place here of each key of ``other``, int64; of an absent one ``-1 - where it would stand``."""
        places = np.empty(len(other), np.int64)
        if self._words and other._words:
            _find_words(other.hashes, self.hashes, places)
        else:
            _find_rows(other.hashes, other._rows, self.hashes, self._rows, places)
        return places

    def find_rows(self, hashes: Array, rows: KeyBytes) -> Array:
        """The same for keys that stand in a `KeyStore`, in canonical order."""
        places = np.empty(len(hashes), np.int64)
        _find_rows(hashes, (rows.starts, rows.lengths, rows.data), self.hashes, self._rows, places)
        return places

    def union(self, other: KeyList) -> Union:
        """All keys of both."""
        found = self.find(other)
        added = np.flatnonzero(found < 0)
        if not len(added):
            return Union(self, np.arange(len(self)), found)
        places = -1 - found[added] + np.arange(len(added))
        order = np.empty(len(self) + len(added), np.int64)
        old = np.ones(len(order), bool)
        old[places] = False
        stays = np.flatnonzero(old)
        order[stays], order[places] = np.arange(len(self)), len(self) + np.arange(len(added))
        more = other.take(added)
        hashes = np.concatenate([self.hashes, more.hashes])[order]
        keys = KeyList(hashes, Batch.concat([self.keys, more.keys]).take(order))
        new = np.empty(len(other), np.int64)
        new[added] = places
        known = found >= 0
        new[known] = stays[found[known]]
        return Union(keys, stays, new)
