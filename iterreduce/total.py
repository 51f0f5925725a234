"""Total: aggregates over all ranks' rows, the same on all ranks.

The keys found so far are known to all (the *domain*). While no rank finds another one, an iteration sends
one dense block of accumulators per rank: small blocks by one Allgather, larger ones as slices to the ranks
that fold them and back. A rank that finds a new key says REPLAN; then all gather keys and records, and the
domain grows. Partials are folded in rank order, so the sums have the same bits on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from iterreduce.agreement import Guard, settle_schemas
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import Folded, KeyIndex
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.exchange import (
    ABSTAIN,
    FAILED,
    HEADER_WORDS,
    OK,
    REPLAN,
    ROWS,
    ROWS_WANTED,
    SCHEMA,
    STAGE,
    STATUS,
    Arrival,
    FreshExchange,
    Outgoing,
    check_headers,
    nothing,
)
from iterreduce.folding import Combiner, Outputs, Relearn, RowSource
from iterreduce.loop import Total
from iterreduce.table import Table, everywhere

ALL = "\0all"  # the one key of a total without keys
SLICED_BYTES = 4 << 10  # above it, every rank folds a slice of the domain instead of all of it


class TotalRows:
    """One `Total` stage at work, on every iteration of a loop run."""

    def __init__(
        self,
        stage: Total,
        number: int,
        group: Group,
        source: RowSource,
        check: bool = False,
        domain_kept: bool = True,
    ):
        self.stage, self.number, self.group, self.source, self.check = stage, number, group, source, check
        self.domain_kept = domain_kept
        self.key = stage.key or (ALL,)
        self.fresh = FreshExchange(group, number, check)
        self.extra_status = OK  # what else the next header says
        self.combiner = Combiner(stage.aggregators, self.key, source, one_key=not stage.key)
        self.domain: Domain | None = None
        self._domain_next: Domain | None = None
        self._dense: Dense | None = None
        self._zeros = np.zeros(0, np.int64)
        self.keys_changed = False
        self.replans = 0

    # ------------------------------------------------------------------ local work, before the exchange

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Fold this rank's rows."""
        self._tables, self._iteration = tables, iteration
        self._result: Batch | None = None
        self._folded: Folded | None = None
        try:
            self._fold_all()
        except Relearn as found:
            self.combiner.learn(found.schema)
            self._fold_all()

    def _fold_all(self) -> None:
        self.combiner.clear()
        for piece in self.source.pieces(self._tables, self._iteration):
            if len(piece.batch) == 0:  # no rows, no say: their columns may be those of an empty list
                continue
            batch = piece.batch if self.stage.key else self._with_all(piece.batch)
            self.combiner.check(batch)
            self.combiner.add(batch)
        self._folded = None if self.combiner.outputs is None else self.combiner.fold.result()

    def _with_all(self, batch: Batch) -> Batch:
        """The rows with a key that is the same for all of them."""
        if len(self._zeros) < len(batch):
            self._zeros = np.zeros(len(batch), np.int64)
        return Batch._trusted({**batch._columns, ALL: self._zeros[: len(batch)]}, batch._valid, len(batch))

    # ------------------------------------------------------------------ the exchange

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective."""
        if self.group.size == 1:
            guard.run(self._alone)
            return guard.status
        if self.domain is not None and self._dense is not None:
            status = self._exchange_dense(guard)
            if not status & REPLAN or status & FAILED:
                return status
            self.replans += 1
        return self._exchange_fresh(guard)

    def _alone(self) -> None:
        if self.combiner.outputs is None:
            self.combiner.learn_of_nothing(self._schema_of_nothing())
        folded = self._folded if self._folded is not None else self.combiner.fold.result()
        self._result = self._finished(folded.keys, folded.records)

    def _schema_of_nothing(self) -> Schema:
        schema = self.source.on_nothing(self._tables, self._iteration).schema
        return schema if self.stage.key else Schema({**schema, ALL: Field("fixed", np.dtype(np.int64))})

    def _exchange_dense(self, guard: Guard) -> int:
        assert self.domain is not None and self._dense is not None and self.combiner.outputs is not None
        inside = guard.run(self._scatter)
        status = guard.status if inside is not False else REPLAN
        headers = self._dense.gather(status)
        agreed = int(np.bitwise_or.reduce(headers[:, STATUS]))
        if agreed & (FAILED | REPLAN):
            return agreed
        # a slice's folder must not drop out between the two halves: folding cannot fail on checked records
        self._dense.complete()
        guard.run(self._take_dense)
        return OK

    def _scatter(self) -> bool:
        """This rank's records into the dense block; False if a key is not in the domain."""
        assert self.domain is not None and self._dense is not None and self.combiner.outputs is not None
        if self.combiner.outputs is not self._dense.outputs:
            return False  # columns have nulls now: the block was laid out for other records
        dense = self._dense.mine
        self.combiner.outputs.fill(dense[:, 1:])
        dense[:, 0] = 0
        if self._folded is None or len(self._folded.hashes) == 0:
            return True
        slots = self.domain.index.lookup(self._folded.keys)
        if int(slots.min()) < 0:
            return False
        dense[slots, 0] = 1
        dense[slots, 1:] = self._folded.records
        return True

    def _take_dense(self) -> None:
        assert self.domain is not None and self._dense is not None
        total = self._dense.total
        present = total[:, 0] > 0
        keys, records = self.domain.keys, np.ascontiguousarray(total[:, 1:])
        if not present.all():
            keys, records = keys.take(present), records[present]
        assert self.combiner.outputs is not None
        self._result = self._without_all(self.combiner.outputs.finish(keys, records))

    def _exchange_fresh(self, guard: Guard) -> int:
        while True:
            out = guard.run(self._outgoing) or nothing(self.group.size)
            arrival = self.fresh.run(out, guard.status | self.extra_status)
            if arrival.status & (FAILED | ROWS_WANTED):
                return arrival.status & (FAILED | ROWS_WANTED)
            digests = arrival.headers[:, SCHEMA].tolist()
            if len(set(digests)) > 1 or 0 in digests:
                mine = self.combiner.schema
                merged, again = settle_schemas(self.group, guard, digests, mine, self._schema_of_nothing)
                if merged is not None and merged != mine:
                    learn = self.combiner.learn if any(digests) else self.combiner.learn_of_nothing
                    guard.run(learn, merged)
                    if mine is not None:
                        guard.run(self._fold_all)
                if again:
                    continue
                if self.group.agree_any(guard.failure is not None):
                    return FAILED
            rows = arrival.headers[:, ROWS].tolist()
            guard.run(self._merge_all, arrival, rows)
            return OK  # a failure of this rank alone is told with the next exchange, or the control reduction

    def _outgoing(self) -> Outgoing:
        if self._folded is None:
            return nothing(self.group.size, ABSTAIN)
        alike = self.combiner.outgoing(self._folded, np.array([0, len(self._folded.hashes)]), ABSTAIN)
        size = self.group.size

        def fill(buffer: Array, at: Array) -> None:
            for dest in range(size):
                alike.pack(buffer, at[dest : dest + 1])

        return Outgoing(np.repeat(alike.words, size), np.repeat(alike.rows, size), fill, alike.schema)

    def _merge_all(self, arrival: Arrival, rows: list[int]) -> None:
        merged = self.combiner.merged
        merged.clear()
        for words, n in zip(arrival.segments(), rows, strict=True):
            merged.merge(self.combiner.arrived(words, n))
        folded = merged.result()
        self._result = self._finished(folded.keys, folded.records)
        if self.domain_kept and not self.combiner.provisional:
            self._grow_domain(folded.keys)

    # ------------------------------------------------------------------ results

    def _finished(self, keys: Batch, records: Array) -> Batch:
        assert self.combiner.outputs is not None
        order = key_order(keys)
        return self._without_all(
            self.combiner.outputs.finish(keys.take(order), np.ascontiguousarray(records[order]))
        )

    def _without_all(self, batch: Batch) -> Batch:
        return batch if self.stage.key else batch.drop(ALL)

    def _grow_domain(self, keys: Batch) -> None:
        if self.domain is not None:
            new = self.domain.index.lookup(keys) < 0
            keys = Batch.concat([self.domain.keys, keys.take(new)])
        keys = keys.take(key_order(keys))
        self._domain_next = Domain(keys, KeyIndex(keys))

    def finish(self) -> Table:
        """The totals, the same on all ranks."""
        assert self._result is not None
        return everywhere(self._result)

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The domain as found in this iteration stays."""
        if self._domain_next is not None:
            assert self.combiner.outputs is not None
            self.domain = self._domain_next
            self._dense = Dense(
                self.group, self.number, len(self.domain.keys), self.combiner.outputs, self.check
            )
        self.rollback()
        return {}

    def rollback(self) -> None:
        """The iteration never was."""
        self._domain_next, self._result, self._folded = None, None, None


class Domain:
    """The keys of a total, sorted, and where each stands."""

    def __init__(self, keys: Batch, index: KeyIndex):
        self.keys, self.index = keys, index


class Dense:
    """Dense accumulator blocks of all ranks, gathered whole, or in slices that are folded and sent back."""

    def __init__(self, group: Group, stage: int, rows: int, outputs: Outputs, check: bool):
        self.group, self.stage, self.outputs, self.check = group, stage, outputs, check
        self.width = 1 + outputs.width  # the first word says whether the key had a row
        self.rows, self.sequence = rows, 0
        self.sliced = rows * self.width * 8 > SLICED_BYTES and group.size > 1
        self.total = np.zeros((rows, self.width), np.int64)
        (self._lay_out_slices if self.sliced else self._lay_out_whole)()

    def _lay_out_whole(self) -> None:
        words = HEADER_WORDS + self.rows * self.width
        self.send, self.recv = np.zeros(words, np.int64), np.zeros(words * self.group.size, np.int64)
        self.mine = self.send[HEADER_WORDS:].reshape(self.rows, self.width)
        self._gather = self.group.allgather_plan(self.send, self.recv, HEADER_WORDS)
        blocks = self.recv.reshape(self.group.size, words)
        self._heads = blocks[:, :HEADER_WORDS]
        self._blocks = [
            blocks[r, HEADER_WORDS:].reshape(self.rows, self.width) for r in range(self.group.size)
        ]
        self._all = np.arange(self.rows)

    def _lay_out_slices(self) -> None:
        size, width = self.group.size, self.width
        self.bounds = np.array([self.rows * r // size for r in range(size + 1)])
        self.gap = -(-HEADER_WORDS // width)
        own = int(self.bounds[self.group.rank + 1] - self.bounds[self.group.rank])
        send_counts = (np.diff(self.bounds) + self.gap) * width
        recv_counts = np.full(size, (own + self.gap) * width)
        self.send, self.recv = (
            np.zeros(int(send_counts.sum()), np.int64),
            np.zeros(int(recv_counts.sum()), np.int64),
        )
        self.send_at = np.concatenate([[0], np.cumsum(send_counts)[:-1]])
        self.mine = np.zeros((self.rows, width), np.int64)
        recv_at = np.arange(size) * (own + self.gap) * width
        self._gather = self.group.alltoallv_plan(
            self.send, send_counts, self.send_at, self.recv, recv_counts, recv_at, self.gap * width
        )
        received = self.recv.reshape(size, own + self.gap, width)
        self._heads = received.reshape(size, -1)[:, :HEADER_WORDS]
        self._blocks = [received[r, self.gap :] for r in range(size)]
        self._slice = np.zeros((own, width), np.int64)
        self._all = np.arange(own)

    def gather(self, status: int) -> Array:
        """Send this rank's block; returns all headers. Collective."""
        self.sequence += 1
        head = np.zeros(HEADER_WORDS, np.int64)
        head[STAGE], head[STATUS] = self.stage << 32 | self.sequence & 0xFFFFFFFF, status
        if self.sliced:
            for d, at in enumerate(self.send_at.tolist()):
                self.send[at : at + HEADER_WORDS] = head
                rows = self.mine[self.bounds[d] : self.bounds[d + 1]]
                first = at + self.gap * self.width
                self.send[first : first + rows.size] = rows.reshape(-1)
        else:
            self.send[:HEADER_WORDS] = head
        self._gather.run()
        headers = self._heads.copy()
        check_headers(headers, self.check)
        return headers

    def complete(self) -> None:
        """Fold the blocks in rank order into ``total``; slices are folded by their owners and sent to all.
        Collective.
        """
        into = self._slice if self.sliced else self.total
        into[:, 0] = 0
        self.outputs.fill(into[:, 1:])
        for block in self._blocks:
            into[:, 0] |= block[:, 0]
            self._merge(into, block)
        if self.sliced:
            counts = np.diff(self.bounds) * self.width
            self.group.allgatherv(
                into.reshape(-1), self.total.reshape(-1), counts, self.bounds[:-1] * self.width
            )

    def _merge(self, into: Array, block: Array) -> None:
        for output, offset in zip(self.outputs.outputs, self.outputs.offsets, strict=True):
            output.bound.merge(into, offset + 1, self._all, block, offset + 1)


def key_order(keys: Batch) -> Array:
    """The order that sorts keys by value: by the first column, then the second, ...; nulls last. For few
    keys.
    """
    columns = []
    for name in reversed(keys.names):
        column, mask = keys[name], keys.valid(name)
        if isinstance(column, Ragged):
            column = (
                np.unique(np.array(column.to_list(), object), return_inverse=True)[1]
                if len(column)
                else np.zeros(0, np.int64)
            )
        parts = column.reshape(len(column), math.prod(column.shape[1:]))  # vectors: element by element
        columns += [parts[:, i] for i in reversed(range(parts.shape[1]))]
        if mask is not None:
            columns.append(~mask)
    return np.lexsort(columns) if columns else np.arange(len(keys))
