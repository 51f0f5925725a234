"""Shuffle without a combiner, and Gather: whole rows travel, packed, in canonical order.

A rank's rows are ordered by destination (stable), each destination's rows packed column after column, and
received in rank order, so rows of one key stand in canonical order: (source block, position). At the owner
they are sorted by key, in hash order (or in the order of the table that they are shuffled onto).

How it can go wrong: as in `FreshExchange`; ranks without rows learn the columns from the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from iterreduce.agreement import Guard, settle_schemas
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import KeyIndex, group_order, group_rows
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.ordering import bucket_order
from iterreduce.columns.packing import pack, packed_words, unpack
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.errors import UsageError
from iterreduce.exchange import ABSTAIN, FAILED, OK, ROWS, SCHEMA, Arrival, FreshExchange, Outgoing, exclusive, nothing
from iterreduce.folding import RowSource
from iterreduce.loop import Gather, Shuffle
from iterreduce.maps import joined
from iterreduce.shuffle import require_keyed
from iterreduce.table import EVERYWHERE, NO_TOKENS, Table, by_key


class RowSender:
    """What shuffling rows and gathering them share: finding the rows, settling the schema, packing, unpacking."""

    def __init__(self, number: int, group: Group, source: RowSource, check: bool = False, limit_bytes: int | None = None):
        self.number, self.group, self.source = number, group, source
        self.fresh = FreshExchange(group, number, check, limit_bytes=limit_bytes)
        self.schema: Schema | None = None
        self.rows: Batch | None = None
        self.keys_changed = False

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Bring this rank's rows together."""
        self._tables, self._iteration = tables, iteration
        pieces = list(self.source.pieces(tables, iteration))
        table = joined(Table(pieces[0].batch, EVERYWHERE), pieces) if pieces else None
        self.rows = None if table is None else table.batch

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective."""
        self.received: list[Batch] = []
        while True:
            out = guard.run(self._outgoing) or nothing(self.group.size)
            arrival = self.fresh.run(out, guard.status)
            if arrival.status & FAILED:
                return FAILED
            digests = arrival.headers[:, SCHEMA].tolist()
            if len(set(digests)) > 1 or 0 in digests:
                merged, again = settle_schemas(self.group, guard, digests, self._mine(), self._discover)
                guard.run(self._adopt, merged)
                if again:
                    continue
                if self.group.agree_any(guard.failure is not None):
                    return FAILED
            rows = arrival.headers[:, ROWS].tolist()
            guard.run(self._receive, arrival, rows)
            return OK  # a failure of this rank alone is told with the next exchange, or the control reduction

    def _mine(self) -> Schema | None:
        return None if self.rows is None else self.rows.schema

    def _discover(self) -> Schema:
        return self.source.on_nothing(self._tables, self._iteration).schema

    def _adopt(self, schema: Schema) -> None:
        """Rows take the agreed schema: masks appear where some rank has nulls."""
        if self.rows is None:
            self.rows = Batch.empty(schema)
        else:
            full = {n: np.ones(len(self.rows), bool) for n, f in schema.items() if f.nullable and self.rows.valid(n) is None}
            self.rows = self.rows.with_valid(**full) if full else self.rows

    def _outgoing(self) -> Outgoing:
        if self.rows is None:
            return nothing(self.group.size, ABSTAIN)
        self.schema = self.rows.schema
        return self._addressed(self.rows)

    def _addressed(self, rows: Batch) -> Outgoing:
        raise NotImplementedError

    def _receive(self, arrival: Arrival, counts: list[int]) -> None:
        assert self.rows is not None
        schema = self.rows.schema
        # the receive buffer is used again by the next exchange: rows leave it
        parts = [unpack(words, schema, n).copy() for words, n in zip(arrival.segments(), counts, strict=True)]
        self.received = parts

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """Nothing is kept between iterations."""
        self.rows, self.received = None, []
        return {}

    def rollback(self) -> None:
        """Nothing is kept between iterations."""
        self.rows, self.received = None, []


class RowShuffle(RowSender):
    """One `Shuffle` stage without ``combine`` at work."""

    def __init__(
        self,
        stage: Shuffle,
        number: int,
        group: Group,
        source: RowSource,
        partitions: PartitionMap,
        check: bool = False,
        limit_bytes: int | None = None,
    ):
        super().__init__(number, group, source, check, limit_bytes)
        self.stage, self.partitions = stage, partitions

    def _addressed(self, rows: Batch) -> Outgoing:
        rows.schema.require(*self.stage.key)
        size = self.group.size
        dest = self.partitions.owner_of_hashes(hash_keys(rows.select(*self.stage.key)))
        order, counts = bucket_order(dest, size)
        bounds = np.append(exclusive(counts), len(rows))
        words = packed_words(rows, order, bounds)

        def fill(buffer: Array, at: Array) -> None:
            for d in range(size):
                pack(rows, order, int(bounds[d]), int(bounds[d + 1]), buffer, int(at[d]))

        return Outgoing(words, counts, fill, rows.schema.digest())

    def finish(self) -> Table:
        """All rows of this rank's keys, sorted by key."""
        rows = Batch.concat(self.received)
        if self.stage.onto is None:
            return Table(group_rows(rows, self.stage.key).rows, by_key(*self.stage.key), NO_TOKENS)
        require_keyed(self.stage, self._tables[self.stage.onto])
        onto = self._tables[self.stage.onto].batch.select(*self.stage.key)
        slots = KeyIndex(onto).lookup(rows.select(*self.stage.key))
        absent = slots < 0
        if absent.any():
            if self.stage.missing == "error":
                raise UsageError(f'shuffle onto "{self.stage.onto}": {int(absent.sum())} rows have keys that are not in it; add them, or say missing="drop"')
            rows, slots = rows.take(~absent), slots[~absent]
        order, _ = group_order(slots, len(onto))
        return Table(rows.take(order), by_key(*self.stage.key), NO_TOKENS)


class GatherRows(RowSender):
    """One `Gather` stage at work: every rank sends all its rows to every rank."""

    def __init__(
        self, stage: Gather, number: int, group: Group, source: RowSource, check: bool = False, limit_bytes: int | None = None
    ):
        super().__init__(number, group, source, check, limit_bytes)
        self.stage = stage

    def _addressed(self, rows: Batch) -> Outgoing:
        size, n = self.group.size, len(rows)
        words = packed_words(rows, None, np.array([0, n]))

        def fill(buffer: Array, at: Array) -> None:
            first = int(at[0])
            pack(rows, None, 0, n, buffer, first)
            for d in range(1, size):
                buffer[int(at[d]) : int(at[d]) + int(words[0])] = buffer[first : first + int(words[0])]

        return Outgoing(np.full(size, words[0]), np.full(size, n), fill, rows.schema.digest())

    def finish(self) -> Table:
        """All rows of all ranks, in canonical order."""
        rows = Batch.concat(self.received)
        return Table(rows, EVERYWHERE, NO_TOKENS, np.array([0, len(rows)]), 0, len(rows))
