"""The combiner: rows folded into one accumulator record per key, in one pass and without sorting.

A `Fold` takes batches of rows, in canonical order, and holds a record for every key that it met; `result`
hands the keys and their records out in canonical order (ascending hash). Records are not finished values:
they travel, and another fold merges them. Three stores, chosen from the keys: integers that lie close
together are found by address, other keys of a single number in a table in hash order, everything else in a
`KeyStore`. All give the same bits: rows are folded in row order whatever the store.

Rows go through in pieces, first all slots of a piece, then each aggregator over the piece, so that what lies
between stays in the second-level cache and memory does not grow with the rows. It is not an exchange: it
knows of no ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iterreduce.columns.accumulators import Count, Words
from iterreduce.columns.aggregators import Output
from iterreduce.columns.batch import Batch
from iterreduce.columns.keycodec import is_word_key
from iterreduce.columns.numbering import estimate_distinct, is_dense
from iterreduce.columns.placement import Placement
from iterreduce.columns.placement import current as placement
from iterreduce.columns.ragged import Array
from iterreduce.columns.ranges import RangedFold
from iterreduce.columns.schema import Schema
from iterreduce.columns.stores import (
    LEAST_PARTED,
    AddressedStore,
    Folded,
    GeneralStore,
    HashedStore,
    Layout,
    PartedStore,
    SingleStore,
    Store,
)
from iterreduce.columns.threads import current
from iterreduce.errors import UsageError

ADDRESS_KINDS = "biumM"  # keys whose words can be addresses


class Fold:
    """Rows folded into one record per key.

    ``key_schema``: the key columns; ``outputs``: what `bind_outputs` returns; ``one_key``: all rows have the
    same key, which is not looked at twice. Memory is kept between
    iterations by `clear`, and grows with the distinct keys, never with the rows. Raises `UsageError` without
    key columns, and for outputs that need all rows of a key together.

    >>> from iterreduce.columns.aggregators import SUM, bind_outputs
    >>> rows = Batch(k=np.array([7, 8, 7]), x=np.array([1.0, 2.0, 3.0]))
    >>> outputs = bind_outputs({"x": SUM}, ["k"], rows.schema)
    >>> fold = Fold(Schema({"k": rows.schema["k"]}), outputs)
    >>> fold.add(rows)
    >>> folded = fold.result()
    >>> column, valid = outputs[0].bound.finish(folded.records, 0)
    >>> dict(zip(folded.keys["k"].tolist(), column.tolist()))[7]
    4.0
    """

    def __init__(self, key_schema: Schema, outputs: Sequence[Output], one_key: bool = False):
        if not len(key_schema):
            raise UsageError("a fold needs at least one key column, got none")
        self.one_key = one_key
        self.key_schema, self.outputs, self.names = key_schema, tuple(outputs), tuple(key_schema)
        self.width = Layout(outputs, 0).width
        self._word = is_word_key(key_schema)
        self._store: Store | None = None
        self._ranged: RangedFold | None = None  # takes all that comes once there are more keys than fit
        self.key_bytes = 24 * (
            1 + self.width
        )  # of a key in a table: it is a third full when it has just grown

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._store.nbytes if self._store is not None else 0

    def add(self, rows: Batch) -> None:
        """Fold rows that hold the key columns and all columns that outputs read, in row order."""
        if not len(rows):
            return
        place = placement()
        if place is None or self.one_key:
            self._add(rows)
        else:
            self._add_within(rows, place)

    def _add_within(self, rows: Batch, place: Placement) -> None:
        """Within a budget: so few rows at a time that their keys, were all of them new, fit."""
        most = place.working_bytes // 2
        step = max(1, most // self.key_bytes)
        for lo in range(0, len(rows), step):
            if self._ranged is None and self.nbytes > most:
                self._go_on_in_ranges(place)
            if self._ranged is not None:
                self._ranged.add(rows.slice(lo, len(rows)))
                return
            with place.kept():
                self._add(rows.slice(lo, lo + step))

    def _go_on_in_ranges(self, place: Placement) -> None:
        reads = dict.fromkeys([*self.names, *(name for o in self.outputs for name in o.inputs)])
        self._ranged = RangedFold(self.names, tuple(reads), self.key_bytes, place)
        if self._store is not None:
            self._ranged.merge(self._store.result())
            self._store = None

    def _afresh(self) -> Fold:
        """An empty fold of the same kind, which nobody watches over."""
        return _Unwatched(self.key_schema, self.outputs)

    def _add(self, rows: Batch) -> None:
        keys = rows if self._word else rows.select(*self.names)  # a store of words looks at its column only
        if self._store is None:
            self._store = self._choose(keys)
        done = self._store.add(keys, rows)
        if done < len(rows):
            left = rows.slice(done, len(rows))
            self._replace(left)
            self._add(left)

    def merge(self, part: Folded) -> None:
        """Fold records of another fold with the same outputs; its keys must be distinct.

        Within a budget their memory must last until `result`.
        """
        if not len(part):
            return
        place = placement()
        if place is not None and not self.one_key:
            beyond = self.nbytes + len(part) * self.key_bytes > place.working_bytes
            if self._ranged is None and beyond:
                self._go_on_in_ranges(place)
            if self._ranged is not None:
                self._ranged.merge(part)
                return
        self._merge(part)

    def _merge(self, part: Folded) -> None:
        if self._store is None:
            self._store = self._first_store(part)
        done = self._store.merge(part)
        if done < len(part):
            left = part.slice(done, len(part))
            self._replace(left.keys)
            self._merge(left)

    def _first_store(self, part: Folded) -> Store:
        if self.one_key:
            return SingleStore(self.key_schema, self.outputs, part.keys)
        return self._by_hash(len(part)) if self._word else GeneralStore(self.key_schema, self.outputs)

    def _choose(self, keys: Batch, span: tuple[int, int] | None = None) -> Store:
        if self.one_key:
            return SingleStore(self.key_schema, self.outputs, keys)
        if not self._word:
            return GeneralStore(self.key_schema, self.outputs)
        column, valid = keys[self.names[0]], keys.valid(self.names[0])
        low, high = _extent(column, valid)
        if span is not None and low <= high:
            low, high = min(low, span[0]), max(high, span[1])
        if is_dense(low, high, len(column)) and is_dense(low, high, estimate_distinct(column)):
            return AddressedStore(self.key_schema, self.outputs, low, high)
        return self._by_hash(len(column))

    def _by_hash(self, rows: int) -> Store:
        """In parts, if there are threads to fill them and no function of a user is called there."""
        parts = current().threads
        if (
            parts > 1
            and rows >= LEAST_PARTED
            and all(isinstance(o.bound, Words | Count) for o in self.outputs)
        ):
            return PartedStore(self.key_schema, self.outputs, parts)
        return HashedStore(self.key_schema, self.outputs)

    def _replace(self, keys: Batch) -> None:
        """Keys out of the range of addresses: a wider range, or another store, takes over what is held."""
        assert isinstance(self._store, AddressedStore)
        old = self._store
        held = old.result()
        self._store = self._choose(keys, (old.low, old.high) if len(held) else None)
        self._store.merge(held)

    def result(self) -> Folded:
        """Keys in canonical order with their records, in memory of their own."""
        if self._ranged is not None:
            return self._ranged.result(self._afresh)
        if self._store is not None:
            return self._store.result()
        empty = Batch.empty(self.key_schema)
        return Folded(np.empty(0, np.uint64), empty, np.empty((0, self.width), np.int64))

    def rows(self) -> Folded:
        """`result`, but keys that are not a single number are decoded only where they are asked for."""
        return self._store.rows() if isinstance(self._store, GeneralStore) else self.result()

    def clear(self) -> None:
        """Forget all keys, keep the memory."""
        self._ranged = None
        if self._store is not None:
            self._store.clear()


class _Unwatched(Fold):
    """A fold of one range of the keys: they fit, as far as that can be had."""

    def add(self, rows: Batch) -> None:
        """Fold rows."""
        if len(rows):
            self._add(rows)

    def merge(self, part: Folded) -> None:
        """Fold records."""
        if len(part):
            self._merge(part)


def _extent(column: Array, valid: Array | None) -> tuple[int, int]:
    """Smallest and largest key word; ``(1, 0)`` for keys that cannot be addresses."""
    if valid is not None:
        column = column[valid]
    if column.dtype.kind not in ADDRESS_KINDS or not len(column):
        return 1, 0
    words = column.view(np.int64) if column.dtype.itemsize == 8 else column
    return int(words.min()), int(words.max())
