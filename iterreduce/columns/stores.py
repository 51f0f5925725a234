"""Where a fold holds keys and their accumulator records: by address, by hash, by hash in parts, by arrival.

A store takes rows, in row order, and records of other folds; it gives its keys out in canonical order. All
give the same bits. It does not choose itself: `iterreduce.columns.combiner` does, from the keys, and it knows
of no ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

from iterreduce.columns import hashing
from iterreduce.columns.aggregators import Output
from iterreduce.columns.batch import Batch
from iterreduce.columns.fused_binned import fused_sum
from iterreduce.columns.hashing import hash_words, key_words, unhash_words
from iterreduce.columns.jit import kernel
from iterreduce.columns.keycodec import KeyBytes, decode_keys
from iterreduce.columns.keystore import KeyStore
from iterreduce.columns.keytable import ALL_HASHES, OrderedTable, free_rows, line_aligned
from iterreduce.columns.numbering import estimate_distinct, keys_of_words
from iterreduce.columns.ordering import hash_order
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.columns.threads import ALONE, current
from iterreduce.errors import UsageError

PIECE = 4096  # rows between slots and accumulators: 32 KB of hashes, slots and each value column
LEAST_PARTED = 1 << 14  # rows that are worth waking threads for: 0.2 ms

R = TypeVar("R")


@dataclass(frozen=True)
class Folded:
    """Keys in canonical order, with the accumulator record of each."""

    hashes: Array  # uint64 (m,), ascending
    keys: Batch  # m rows
    records: Array  # int64 (m, W), C-contiguous

    def __len__(self) -> int:
        return len(self.hashes)

    def slice(self, lo: int, hi: int) -> Folded:
        """Rows ``lo`` to ``hi``, sharing memory."""
        return Folded(self.hashes[lo:hi], self.keys.slice(lo, hi), self.records[lo:hi])


class FoldedRows(Folded):
    """Keys that still stand in the store of their fold, as bytes: ``keys`` are decoded when asked for.

    They are read before the fold is cleared or takes more rows.
    """

    def __init__(self, schema: Schema, hashes: Array, rows: KeyBytes, records: Array):
        for name, value in (("schema", schema), ("hashes", hashes), ("rows", rows), ("records", records)):
            object.__setattr__(self, name, value)

    schema: Schema
    rows: KeyBytes

    @cached_property
    def keys(self) -> Batch:
        """The key columns, in memory of their own."""
        return decode_keys(self.schema, self.rows)

    def keys_at(self, places: Array) -> Batch:
        """The keys in these places only."""
        rows = self.rows
        return decode_keys(self.schema, KeyBytes(rows.starts[places], rows.lengths[places], rows.data))


class Layout:
    """The outputs of a fold side by side in one record, from word ``first`` of a row on."""

    def __init__(self, outputs: Sequence[Output], first: int):
        self.outputs, self.width = tuple(outputs), 0
        self._at: list[
            tuple[Output, int, int]
        ] = []  # output, offset in a row of the store, offset in a record
        for output in outputs:
            if output.bound.words is None:
                raise UsageError(
                    f'output "{output.name}" needs all rows of a key together: it cannot be combined'
                )
            self._at.append((output, first + self.width, self.width))
            self.width += output.bound.words

    def fill(self, rows: Array) -> None:
        """Write identities into all rows of a store."""
        for output, offset, _ in self._at:
            output.bound.fill(rows, offset)

    def update(self, store: Array, slots: Array, rows: Batch) -> None:
        """Fold each row into its slot."""
        for output, offset, _ in self._at:
            values, valid = output.read(rows)
            output.bound.update(store, offset, slots, values, valid)

    def update_one(self, record: Array, codes: Array, rows: Batch) -> None:
        """Fold all rows into one record; ``codes`` are zeros."""
        for output, offset, _ in self._at:
            values, valid = output.read(rows)
            output.bound.update_one(record, offset, codes, values, valid)

    def merge(self, store: Array, slots: Array, partial: Array) -> None:
        """Fold each partial record into its slot."""
        for output, offset, at in self._at:
            output.bound.merge(store, offset, slots, partial, at)


class Store(Protocol):
    """Where keys and records are held. ``add`` and ``merge`` return the rows done: fewer than all if it gives
    up.
    """

    @property
    def nbytes(self) -> int: ...
    def add(self, keys: Batch, rows: Batch) -> int: ...
    def merge(self, part: Folded) -> int: ...
    def result(self) -> Folded: ...
    def clear(self) -> None: ...


@kernel
def _gather_held(store: Any, rows: Any, out: Any) -> bool:
    """Copy the records of these rows of a store by address, if they are all that it holds."""
    one, held = np.uint64(1), 0
    for i in range(len(store)):
        held += store[i, 0] == 0
    if held != len(rows):
        return False
    for i in range(len(rows)):
        row = np.uint64(rows[i])
        if store[row, 0] != 0:
            return False
        for k in range(np.uint64(out.shape[1])):
            out[i, k] = store[row, k + one]
    return True


@kernel
def _gather_records(store: Any, rows: Any, out: Any) -> None:
    """Copy the words behind the first of these rows of a store."""
    one, width = np.uint64(1), np.uint64(out.shape[1])
    for i in range(len(rows)):
        row = np.uint64(rows[i])
        for k in range(width):
            out[i, k] = store[row, k + one]


def _records(store: Array, rows: Array, width: int) -> Array:
    out = np.empty((len(rows), width), np.int64)
    _gather_records(store, rows, out)
    return out


class HashedStore:
    """Keys of a single number, in a table in hash order that also holds the records.

    A store for a part of all hashes is given all rows, and passes over those of other parts.
    """

    def __init__(self, schema: Schema, outputs: Sequence[Output], part: tuple[int, int] = ALL_HASHES):
        self.schema, self.name, self.layout = schema, next(iter(schema)), Layout(outputs, 1)
        self.part, self._share = part, (ALL_HASHES[1] + 1) // (part[1] - part[0] + 1)
        self.table = OrderedTable(self.layout.width, self.layout.fill)
        self.fused = fused_sum(outputs)
        self._hashes, self._slots = np.empty(PIECE, np.uint64), np.empty(PIECE, np.int64)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self._hashes.nbytes + self._slots.nbytes

    def clear(self) -> None:
        self.table.clear()

    def add(self, keys: Batch, rows: Batch) -> int:
        column, valid = keys[self.name], keys.valid(self.name)
        if not self.table.homes:
            sample = hash_words(key_words(column[:: max(1, len(column) // PIECE)]))
            self.table.reserve(self._distinct(column), sample[self._mine(sample)])
        fused = (
            self.fused
            if self.fused is not None and valid is None and self.fused.takes(column, rows)
            else None
        )
        lo = 0 if fused is None else fused.add_hashed(self.table, key_words(column), rows, 0, self.part)
        while lo < len(rows):
            hi = min(lo + PIECE, len(rows))
            hashes = hash_words(key_words(column[lo:hi]), self._hashes[: hi - lo])
            mask, piece = None if valid is None else valid[lo:hi], rows.slice(lo, hi)
            if self.part != ALL_HASHES:
                at = np.flatnonzero(
                    self._mine(hashes if mask is None else np.where(mask, hashes, hashing.NULL_HASH))
                )
                hashes, mask, piece = hashes[at], None if mask is None else mask[at], piece.take(at)
            self._add_piece(hashes, mask, piece, column[hi:])
            lo = hi if fused is None else fused.add_hashed(self.table, key_words(column), rows, hi, self.part)
        return len(rows)

    def _mine(self, hashes: Array) -> Array:
        """Which hashes lie in this store's part."""
        return hashes - np.uint64(self.part[0]) <= np.uint64(self.part[1] - self.part[0])

    def _distinct(self, column: Array) -> int:
        """About how many keys of this part a column has."""
        return estimate_distinct(column) // self._share

    def _add_piece(self, hashes: Array, valid: Array | None, rows: Batch, rest: Array) -> None:
        """Any piece, whatever stands in its way; ``rest``: the keys that come after it."""
        done, slots = 0, self._slots[: len(hashes)]
        while True:
            now = self.table.insert(hashes, valid, slots)
            if now == len(hashes):
                self.layout.update(self.table.words, slots, rows.slice(done, len(rows)) if done else rows)
                return
            self.layout.update(self.table.words, slots[:now], rows.slice(done, done + now))
            done, hashes, slots = done + now, hashes[now:], slots[now:]
            valid = None if valid is None else valid[now:]
            self.table.make_room(hashes, self._distinct(rest))

    def merge(self, part: Folded) -> int:
        n, valid = len(part), part.keys.valid(self.name)
        if not self.table.homes:
            self.table.reserve(n, part.hashes)
        slots, done = np.empty(n, np.int64) if n > PIECE else self._slots[:n], 0
        while done < n:
            mask = None if valid is None else valid[done:]
            now = self.table.insert(part.hashes[done:], mask, slots[done:])
            self.layout.merge(self.table.words, slots[done : done + now], part.records[done : done + now])
            done += now
            if done < n:
                self.table.make_room(part.hashes[done:], max(n, 2 * self.table.used))
        return n

    def result(self) -> Folded:
        hashes, records, null_at = self.table.contents()
        return Folded(hashes, keys_of_words(self.schema, unhash_words(hashes), null_at), records)


class PartedStore:
    """Stores for equal parts of all hashes, each filled by one thread; the bits are those of one store."""

    def __init__(self, schema: Schema, outputs: Sequence[Output], parts: int):
        cuts = [2**64 * p // parts for p in range(parts + 1)]
        self.stores = [HashedStore(schema, outputs, (lo, hi - 1)) for lo, hi in pairwise(cuts)]
        self._firsts = np.array(cuts[1:-1], np.uint64)

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    def clear(self) -> None:
        self._each(lambda store, p: store.clear())

    def _each(self, work: Callable[[HashedStore, int], R], rows: int = LEAST_PARTED) -> list[R]:
        """Call ``work`` for every store, on threads if there are that many rows."""
        ranges = [(p, p + 1) for p in range(len(self.stores))]
        pool = current() if rows >= LEAST_PARTED else ALONE
        return pool.run(lambda p, _: work(self.stores[p], p), ranges)

    def add(self, keys: Batch, rows: Batch) -> int:
        self._each(lambda store, p: store.add(keys, rows), len(rows))
        return len(rows)

    def merge(self, part: Folded) -> int:
        ends = [0, *np.searchsorted(part.hashes, self._firsts).tolist(), len(part)]
        self._each(lambda store, p: store.merge(part.slice(ends[p], ends[p + 1])), len(part))
        return len(part)

    def result(self) -> Folded:
        parts = self._each(lambda store, p: store.result())
        return Folded(
            np.concatenate([p.hashes for p in parts]),
            Batch.concat([p.keys for p in parts]),
            np.concatenate([p.records for p in parts]),
        )


@kernel
def _addresses(words: Any, valid: Any, low: Any, store: Any, slots: Any) -> int:
    """Rows by address, marked as held; the rows done: it stops at a key out of range. The last row is the
    null key's.
    """
    null = np.uint64(store.shape[0] - 1)
    for i in range(len(words)):
        at = np.uint64(words[i] - low)
        if valid is not None and not valid[i]:
            at = null
        elif at >= null:
            return i
        store[at, 0] = 0
        slots[i] = at
    return len(words)


class AddressedStore:
    """Integers in ``[low, high]``: the record of key ``k`` stands at ``k - low``."""

    def __init__(self, schema: Schema, outputs: Sequence[Output], low: int, high: int):
        self.schema, self.name, self.layout = schema, next(iter(schema)), Layout(outputs, 1)
        self.low, self.high = low, high
        rows, width = high - low + 2, 1 + self.layout.width
        self.words = line_aligned(rows * width).reshape(rows, width)
        self.fused = fused_sum(outputs)
        self._slots = np.empty(PIECE, np.int64)
        self._held: tuple[Array, Array, Array] | None = (
            None  # addresses, their hashes and order, of the last result
        )
        self._last: tuple[Array, Array, Batch] | None = None  # addresses, hashes and keys, without nulls
        self.clear()

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self._slots.nbytes

    def clear(self) -> None:
        free_rows(self.words, self.layout.fill)

    def add(self, keys: Batch, rows: Batch) -> int:
        column, valid = keys[self.name], keys.valid(self.name)
        if self.fused is not None and valid is None and self.fused.takes(column, rows):
            return self.fused.add_addressed(self.words, key_words(column), rows, self.low)
        for lo in range(0, len(rows), PIECE):
            piece = rows if len(rows) <= PIECE else rows.slice(lo, lo + PIECE)
            words, mask = (
                key_words(column[lo : lo + PIECE]),
                None if valid is None else valid[lo : lo + PIECE],
            )
            slots = self._slots[: len(words)]
            done = _addresses(words, mask, np.int64(self.low), self.words, slots)
            self.layout.update(
                self.words, slots[:done], piece if done == len(piece) else piece.slice(0, done)
            )
            if done < len(words):
                return lo + done
        return len(rows)

    def merge(self, part: Folded) -> int:
        words, valid, slots = (
            key_words(part.keys[self.name]),
            part.keys.valid(self.name),
            np.empty(len(part), np.int64),
        )
        done = _addresses(words, valid, np.int64(self.low), self.words, slots)
        self.layout.merge(self.words, slots[:done], part.records[:done])
        return done

    def result(self) -> Folded:
        if self._last is not None:
            records = np.empty((len(self._last[0]), self.layout.width), np.int64)
            if _gather_held(self.words, self._last[0], records):
                return Folded(*self._last[1:], records)
        held = np.flatnonzero(self.words[:, 0] == 0)
        null = len(held) > 0 and held[-1] == len(self.words) - 1
        hashes, rows = self._in_order(held[:-1] if null else held)
        if not null:
            folded = self._folded(hashes, rows, -1)
            self._last = rows, hashes, folded.keys
            return folded
        at = int(np.searchsorted(hashes, hashing.NULL_HASH))
        return self._folded(
            np.insert(hashes, at, hashing.NULL_HASH), np.insert(rows, at, len(self.words) - 1), at
        )

    def _folded(self, hashes: Array, rows: Array, null_at: int) -> Folded:
        keys = keys_of_words(self.schema, rows + self.low, null_at)
        return Folded(hashes, keys, _records(self.words, rows, self.layout.width))

    def _in_order(self, held: Array) -> tuple[Array, Array]:
        """Hashes and addresses in canonical order; a loop that meets the same keys again orders them once."""
        if self._held is None or not np.array_equal(self._held[0], held):
            hashes = hash_words(held + self.low)
            order = hash_order(hashes)
            self._held = held, hashes[order], held[order]
        return self._held[1], self._held[2]


class GeneralStore:
    """Keys of any other kind, numbered in order of arrival, with the record of key ``k`` in row ``k``."""

    def __init__(self, schema: Schema, outputs: Sequence[Output]):
        self.schema, self.layout, self.keys = schema, Layout(outputs, 0), KeyStore(schema)
        self.records = np.empty((0, self.layout.width), np.int64)
        self._filled = 0
        self._numbers = np.empty(PIECE, np.int64)

    @property
    def nbytes(self) -> int:
        return self.records.nbytes + self.keys.nbytes + self._numbers.nbytes

    def clear(self) -> None:
        self.keys.clear()
        self._filled = 0

    def add(self, keys: Batch, rows: Batch) -> int:
        for lo in range(0, len(rows), PIECE):
            whole = len(rows) <= PIECE
            piece, key = (rows, keys) if whole else (rows.slice(lo, lo + PIECE), keys.slice(lo, lo + PIECE))
            numbers = self._numbers[: len(piece)]
            self.keys.number(key, hashing.hash_keys(key), numbers)
            self._make_room()
            self.layout.update(self.records, numbers, piece)
        return len(rows)

    def _make_room(self) -> None:
        """Records for all keys, the new ones filled with identities."""
        m = len(self.keys)
        if m > len(self.records):
            larger = np.empty((max(m, 2 * len(self.records)), self.layout.width), np.int64)
            larger[: self._filled] = self.records[: self._filled]
            self.records = larger
        self.layout.fill(self.records[self._filled : m])
        self._filled = m

    def merge(self, part: Folded) -> int:
        numbers = np.empty(len(part), np.int64)
        self.keys.number(part.keys, part.hashes, numbers)
        self._make_room()
        self.layout.merge(self.records, numbers, part.records)
        return len(part)

    def result(self) -> Folded:
        hashes, numbers = self.keys.canonical()
        return Folded(hashes, self.keys.keys(numbers), self.records[numbers])

    def rows(self) -> FoldedRows:
        """The result, keys as bytes that stay here."""
        hashes, numbers = self.keys.canonical()
        return FoldedRows(self.schema, hashes, self.keys.rows(numbers), self.records[numbers])


class SingleStore:
    """The record of the one key that all rows have: nobody looks at keys.

    It stands in no table, and its sums need not be made row by row.
    """

    def __init__(self, key_schema: Schema, outputs: Sequence[Output], keys: Batch):
        self.layout, self.keys = Layout(outputs, 0), keys.select(*key_schema).slice(0, 1).copy()
        self._hashes, self._codes = hashing.hash_keys(self.keys), np.zeros(0, np.int32)
        self._record = np.empty((1, self.layout.width), np.int64)
        self.clear()

    @property
    def nbytes(self) -> int:
        return self._record.nbytes + self._codes.nbytes

    def add(self, keys: Batch, rows: Batch) -> int:
        n = len(rows)
        if len(self._codes) < n:
            self._codes = np.zeros(n, np.int32)
        self.layout.update_one(self._record, self._codes[:n], rows)
        self._rows += n
        return n

    def merge(self, part: Folded) -> int:
        self.layout.merge(self._record, np.zeros(len(part), np.int64), part.records)
        self._rows += len(part)
        return len(part)

    def result(self) -> Folded:
        some = min(1, self._rows)
        return Folded(self._hashes[:some], self.keys.slice(0, some), self._record[:some].copy())

    def clear(self) -> None:
        self._rows = 0
        self.layout.fill(self._record)
