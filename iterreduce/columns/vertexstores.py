"""Where the keys of a `vertexcodes.Numbering` are kept while they are counted, and found afterwards.

Three stores with one protocol, `Store`: integers that lie close together by address, other keys of a single
number by hash, all else in a `KeyStore`. Counts are of 32 bits per role where keys are numbers. Nothing here
checks keys, or chooses a store: that is `iterreduce.columns.vertexcodes`, the only caller.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import EMPTY, hash_keys, hash_words, key_words, mix, unhash_words
from iterreduce.columns.jit import kernel
from iterreduce.columns.keystore import KeyStore
from iterreduce.columns.keytable import OrderedTable
from iterreduce.columns.numbering import keys_of_words
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema

ROLES = 2
SAMPLE = 4096
"""Keys hashed, found and counted at a time: the rows of the table that they met are still in cache."""


@kernel
def _count_addressed(keys: Any, low: Any, counts: Any) -> int:
    """Count keys by address; the first row whose key has none, or how many there are."""
    span = np.uint64(len(counts))
    for i in range(len(keys)):
        at = np.uint64(np.int64(keys[i]) - low)
        if at >= span:
            return i
        counts[at] += np.uint32(1)
    return len(keys)


@kernel
def _number_addressed(counts: Any, place: Any) -> int:
    m = 0
    for at in range(len(place)):
        place[at] = -1
        if counts[0, at] or counts[1, at]:
            place[at] = m
            m += 1
    return m


@kernel
def _gather_counts(counted: Any, place: Any, counts: Any) -> None:
    for at in range(len(place)):
        if place[at] >= 0:
            counts[0, np.uint64(place[at])] = counted[0, at]
            counts[1, np.uint64(place[at])] = counted[1, at]


@kernel
def _codes_addressed(keys: Any, low: Any, place: Any, codes: Any) -> int:
    """The first row whose key is unknown, or how many there are."""
    span = np.uint64(len(place))
    for i in range(len(keys)):
        at = np.uint64(np.int64(keys[i]) - low)
        code = place[at] if at < span else np.int32(-1)
        if code < 0:
            return i
        codes[i] = code
    return len(keys)


@kernel
def _count_hashed(words: Any, table: Any, place: Any, used: Any, one: Any) -> Any:
    """Count words by hash, from ``used`` keys on; ``(rows done, keys)``: it stops at one without a place."""
    base, shift, homes, probes, room = place
    step, side = np.uint64(1), np.uint64(table.shape[0] - 2)
    for i in range(len(words)):
        h = mix(np.uint64(np.int64(words[i])))
        if h == EMPTY:
            table[side, 0] = np.uint64(0)
            table[side, 1] += one
            continue
        j = (h - base) >> shift
        if j >= homes:
            return i, used
        home = j
        while table[j, 0] != h:
            if table[j, 0] == EMPTY:
                if used >= room or j - home >= probes:
                    return i, used
                table[j, 0] = h
                used += step
                break
            j += step
        table[j, 1] += one
    return len(words), used


@kernel
def _codes_hashed(words: Any, table: Any, base: Any, shift: Any, homes: Any, values: Any, codes: Any) -> int:
    """The first row whose key is unknown, or how many there are."""
    step, side = np.uint64(1), np.uint64(table.shape[0] - 2)
    for i in range(len(words)):
        h = mix(np.uint64(np.int64(words[i])))
        j = side if h == EMPTY else (h - base) >> shift
        if h == EMPTY:
            if table[side, 0] == EMPTY:
                return i
        elif j >= homes:
            return i
        else:
            while table[j, 0] != h:
                if table[j, 0] == EMPTY:
                    return i
                j += step
        number = table[j, 1]
        codes[i] = number if values is None else values[number]
    return len(words)


@kernel
def _count_numbers(numbers: Any, counts: Any) -> None:
    for i in range(len(numbers)):
        counts[np.uint64(numbers[i])] += 1


class Store(Protocol):
    """Keys and their counts.

    ``count`` returns how many rows were done (fewer than all: an address is missing); ``finish`` gives the
    counts, int64 ``(roles, m)``, and makes the rest possible. ``codes`` writes numbers, or, with what
    ``through`` made of an int32 value per number, these values, and returns the first row of an unknown key,
    or how many rows there are.
    """

    @property
    def nbytes(self) -> int: ...
    def count(self, keys: Any, role: int) -> int: ...
    def finish(self) -> Array: ...
    def codes(self, keys: Any, values: Array | None, out: Array) -> int: ...
    def through(self, values: Array) -> Array: ...
    def keys(self, schema: Schema) -> Batch: ...


class Addressed:
    """Integers in ``[low, low + span)``; before `finish` a count per address and role, then a number."""

    def __init__(self, low: int, span: int) -> None:
        self.low = low
        self.counted = np.zeros((ROLES, span), np.uint32)
        self.place = np.empty(0, np.int32)

    @property
    def nbytes(self) -> int:
        return self.counted.nbytes + self.place.nbytes

    @property
    def span(self) -> int:
        """Addresses."""
        return self.counted.shape[1]

    def has(self, low: int, high: int) -> bool:
        """Is there an address for all keys in ``[low, high]``?"""
        return self.low <= low and high < self.low + self.span

    def widen(self, low: int, high: int) -> None:
        """Make room for keys in ``[low, high]``, which holds all that came; twice as much where it grew."""
        span = self.counted.shape[1]
        first = min(self.low, low - span if low < self.low else low)
        last = max(self.low + span - 1, high + span if high >= self.low + span else high)
        first, last = max(first, -(2**63)), min(last, 2**63 - 1)
        wider = np.zeros((ROLES, last - first + 1), np.uint32)
        wider[:, self.low - first : self.low - first + span] = self.counted
        self.low, self.counted = first, wider

    def count(self, keys: Array, role: int) -> int:
        return int(_count_addressed(keys, np.int64(self.low), self.counted[role]))

    def contents(self) -> tuple[Array, Array]:
        """The keys that came, as words, and both counts in one."""
        at = np.flatnonzero(self.counted.any(axis=0))
        sources, targets = self.counted[:, at].astype(np.int64)
        return at + np.int64(self.low), sources | targets << 32

    def finish(self) -> Array:
        self.place = np.empty(self.span, np.int32)
        m = _number_addressed(self.counted, self.place)
        counts = np.empty((ROLES, m), np.int64)
        _gather_counts(self.counted, self.place, counts)
        self.counted = np.empty((ROLES, 0), np.uint32)
        return counts

    def codes(self, keys: Array, values: Array | None, out: Array) -> int:
        place = self.place if values is None else values
        return int(_codes_addressed(keys, np.int64(self.low), place, out))

    def through(self, values: Array) -> Array:
        """Values by address rather than by number."""
        composed = np.full(len(self.place), -1, values.dtype)
        composed[self.place >= 0] = values
        return composed

    def keys(self, schema: Schema) -> Batch:
        return keys_of_words(schema, np.flatnonzero(self.place >= 0) + np.int64(self.low))


class Hashed:
    """Keys of one number by hash; the payload is two counts of 32 bits, after `finish` a number."""

    def __init__(self) -> None:
        self.table = OrderedTable(1, _no_counts)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    def count(self, keys: Array, role: int) -> int:
        words = _words(keys)
        self._add(words, np.uint64(1 << 32 * role))
        return len(words)

    def take_over(self, words: Array, counted: Array) -> None:
        """Distinct keys with their packed counts, into an empty store."""
        self._add(words, np.uint64(0))
        slots = np.empty(len(words), np.int64)
        self.table.find(hash_words(words), None, slots)
        self.table.words[slots, 1] = counted

    def _add(self, words: Array, one: Any) -> None:
        table, done = self.table, 0
        if not table.homes:
            table.reserve(len(words), _sample(words))
        while True:
            place = (
                table.base,
                table.shift,
                np.uint64(table.homes),
                np.uint64(table.probes),
                np.uint64(table.room),
            )
            some, used = _count_hashed(words[done:], table.unsigned, place, np.uint64(table.used), one)
            table.used, done = int(used), done + some
            if done == len(words):
                return
            table.make_room(_sample(words[done:]))

    def finish(self) -> Array:
        _, rows, _ = self.table.scan()
        packed = self.table.words[rows, 1] if len(rows) else rows
        self.table.words[rows, 1] = np.arange(len(rows))
        return np.stack([packed & 0xFFFFFFFF, packed >> 32 & 0xFFFFFFFF])

    def codes(self, keys: Array, values: Array | None, out: Array) -> int:
        table = self.table
        if not table.homes:
            return 0
        place = table.base, table.shift, np.uint64(table.homes)
        return int(_codes_hashed(_words(keys), table.unsigned, *place, values, out))

    def through(self, values: Array) -> Array:
        return values

    def keys(self, schema: Schema) -> Batch:
        hashes, _, _ = self.table.scan()
        return keys_of_words(schema, unhash_words(hashes))


class Stored:
    """Text, bytes, lists, several columns."""

    def __init__(self, schema: Schema) -> None:
        self.store = KeyStore(schema)
        self.counted = np.zeros((ROLES, SAMPLE), np.int64)
        self.numbers = np.empty(0, np.int64)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes + self.counted.nbytes + self.numbers.nbytes

    def _room(self, rows: int) -> Array:
        if len(self.numbers) < rows:
            self.numbers = np.empty(rows, np.int64)
        return self.numbers[:rows]

    def count(self, keys: Batch, role: int) -> int:
        numbers = self._room(len(keys))
        self.store.number(keys, hash_keys(keys), numbers)
        if len(self.store) > self.counted.shape[1]:
            wider = np.zeros((ROLES, 2 * len(self.store)), np.int64)
            wider[:, : self.counted.shape[1]] = self.counted
            self.counted = wider
        _count_numbers(numbers, self.counted[role])
        return len(keys)

    def finish(self) -> Array:
        counts = self.counted[:, : len(self.store)].copy()
        self.counted = np.zeros((ROLES, 0), np.int64)
        return counts

    def codes(self, keys: Batch, values: Array | None, out: Array) -> int:
        numbers = self._room(len(keys))
        self.store.find(keys, hash_keys(keys), numbers)
        if len(keys) and int(numbers.min()) < 0:
            return int(np.argmin(numbers))
        out[:] = numbers if values is None else values[numbers]
        return len(keys)

    def through(self, values: Array) -> Array:
        return values

    def keys(self, schema: Schema) -> Batch:
        return self.store.keys(np.arange(len(self.store)))


def _words(keys: Array) -> Array:
    """Integers as they are, also strided; of other numbers their words."""
    return keys if keys.dtype.kind in "iub" else key_words(keys)


def _sample(words: Array) -> Array:
    return hash_words(key_words(words[:SAMPLE]))


def _no_counts(rows: Array) -> None:
    rows[:, 1].fill(0)
