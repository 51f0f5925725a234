"""Shuffle without a combiner, and Gather: whole rows travel, packed, in canonical order.

A rank's rows are ordered by destination (stable), each destination's rows packed column after column, and
received in rank order, so rows of one key stand in canonical order: (source block, position). At the owner
they are sorted by key, in hash order (or in the order of the table that they are shuffled onto).

Where keys came with the same lineage as last time, on all ranks, rows go by a `RowPlan`: nothing is hashed,
counted or sorted, and only value columns travel. A rank that finds its keys or columns changed, or its part
of the plan lost, joins the planned exchange with REPLAN in its headers; then all ranks repeat it fresh,
without running any map again.

How it can go wrong: as in `FreshExchange`; ranks without rows learn the columns from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from iterreduce.agreement import Guard, settle_schemas
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import group_order, number_keys
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.hashorder import grouping_order
from iterreduce.columns.packing import pack, packed_words, unpack
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.placement import current
from iterreduce.columns.ragged import Array
from iterreduce.columns.ranges import PARTS, PartOf, in_ranges, part_of_hash
from iterreduce.columns.routing import RecordLayout, Scratch, fine_order, owners, send_order, take_rows
from iterreduce.columns.schema import Schema
from iterreduce.errors import ScheduleError, UsageError
from iterreduce.exchange import (
    ABSTAIN,
    FAILED,
    OK,
    ROWS,
    SCHEMA,
    Arrival,
    FreshExchange,
    Outgoing,
    agreed_proposal,
    beyond_memory,
    exclusive,
    may_be_beyond_memory,
    nothing,
)
from iterreduce.folding import RowSource
from iterreduce.group import Group
from iterreduce.lineage import KeyLineage, Pending, require_keyed
from iterreduce.loop import Gather, Number, Shuffle
from iterreduce.loop_cache import LoopCache
from iterreduce.maps import Piece, joined
from iterreduce.rowplan import RowPlan, RowPlanBody
from iterreduce.rowrounds import RowRounds, Shelf, fixed, go_in_rounds, rows_extra
from iterreduce.rowwindow import RowWindow
from iterreduce.table import EVERYWHERE, NO_TOKENS, Table, by_key


class RowSender:
    """What shuffling rows and gathering them share: finding rows, settling the schema, sending, receiving."""

    def __init__(
        self,
        number: int,
        group: Group,
        source: RowSource,
        check: bool = False,
        limit_bytes: int | None = None,
    ):
        self.number, self.group, self.source, self.check = number, group, source, check
        self.fresh = FreshExchange(group, number, check, limit_bytes=limit_bytes)
        self.shelf = Shelf()
        self.rounds = RowRounds(group, self.fresh, self.shelf)
        self.window: RowWindow | None = None
        self.budgeted = False  # has this rank's memory a budget? Then none of it is shared
        self.borrowed = False  # do the rows received stand in memory that the next exchange uses again?
        self.rows: Batch | None = None
        self.received: Batch | None = None
        self.keys_changed = False
        self._order: Array | None = None
        self._starts = np.zeros(group.size, np.int64)
        self._counts = np.zeros(group.size, np.int64)  # rows for each rank

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Bring this rank's rows together."""
        self._tables, self._iteration = tables, iteration
        self.rows = rows_of(list(self.source.pieces(tables, iteration)))

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective."""
        if self.group.size == 1:
            self.received = guard.run(self._alone)
            return guard.status
        if self._agree_route(guard) & FAILED:
            return FAILED
        while True:
            out = guard.run(self._outgoing) or nothing(self.group.size)
            arrival = self.fresh.first(out, guard.status)
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
            self._agreed(arrival.headers)
            self._bring(guard, out, arrival)
            return OK  # a failure of this rank alone is told with the next exchange, or the control reduction

    def _agree_route(self, guard: Guard) -> int:
        """What must be agreed before rows can be addressed. Collective where it communicates at all."""
        return OK

    def _alone(self) -> Batch:
        self._agreed(np.zeros((0, 0), np.int64))
        if self.rows is None:
            self.rows = Batch.empty(self._discover())
        return self.rows

    def _bring(self, guard: Guard, out: Outgoing, arrival: Arrival) -> None:
        """Receive the rows. Collective where some are late: all ranks know from the headers."""
        rows = self.rows if self.rows is not None else Batch()  # a rank that failed goes through the motions
        if not arrival.late.any():
            self.received = guard.run(self._receive, arrival)
        elif go_in_rounds(arrival.headers):
            self._bring_in_bulk(guard, rows, out.rows, arrival)
        else:
            self.received = guard.run(self._receive, self.fresh.second(out, arrival))

    def _bring_in_bulk(self, guard: Guard, rows: Batch, sent: Array, arrival: Arrival) -> None:
        """Through shared memory, else in rounds. Collective."""
        self.borrowed, order = False, self._order
        if self.window is not None and not self.budgeted and self.window.serves(rows, arrival):
            self.received, self.borrowed = self.window.run(guard, rows, sent, order, self._starts, arrival)
        if not self.borrowed:
            self.received = self.rounds.run(guard, rows, order, self._starts, sent, arrival)

    def _agreed(self, headers: Array) -> None:
        """The schema is settled, and these are the headers."""

    def _mine(self) -> Schema | None:
        return None if self.rows is None else self.rows.schema

    def _discover(self) -> Schema:
        return self.source.on_nothing(self._tables, self._iteration).schema

    def _adopt(self, schema: Schema) -> None:
        """Rows take the agreed schema: masks appear where some rank has nulls."""
        if self.rows is None:
            self.rows = Batch.empty(schema)
        else:
            bare = [n for n, f in schema.items() if f.nullable and self.rows.valid(n) is None]
            full = {n: np.ones(len(self.rows), bool) for n in bare}
            self.rows = self.rows.with_valid(**full) if full else self.rows

    def _outgoing(self) -> Outgoing:
        return self._nothing() if self.rows is None else self._addressed(self.rows)

    def _nothing(self) -> Outgoing:
        return nothing(self.group.size, ABSTAIN)

    def _addressed(self, rows: Batch) -> Outgoing:
        raise NotImplementedError

    def _receive(self, arrival: Arrival) -> Batch:
        assert self.rows is not None
        schema, segments = self.rows.schema, arrival.segments()
        counts = arrival.headers[:, ROWS].tolist()
        # the receive buffer is used again by the next exchange: rows leave it
        parts = [unpack(w, schema, n, True) for w, n in zip(segments, counts, strict=True) if n]
        return Batch.concat(parts) if parts else Batch.empty(schema)

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands. Collective. Returns tokens to rename in tables made here."""
        self._forget()
        return {}

    def rollback(self) -> None:
        """The iteration never was."""
        self._forget()

    def _forget(self) -> None:
        self.rows = self.received = self._order = None
        self.borrowed = False
        self._counts = np.zeros(self.group.size, np.int64)
        self.shelf.trim()


def rows_of(pieces: list[Piece]) -> Batch | None:
    """All pieces as one batch; None where there is none."""
    if not any(len(piece.batch) for piece in pieces):
        return None  # no rows, no say: their columns may be those of an empty list
    table = joined(Table(pieces[0].batch, EVERYWHERE), pieces)
    return None if table is None else table.batch


class RowShuffle(RowSender, KeyLineage):
    """One `Shuffle` stage without ``combine`` at work, on every iteration of a loop run."""

    def __init__(
        self,
        stage: Shuffle,
        number: int,
        group: Group,
        source: RowSource,
        cache: LoopCache,
        partitions: PartitionMap,
        check: bool = False,
        limit_bytes: int | None = None,
        repeats: bool = True,
    ):
        RowSender.__init__(self, number, group, source, check, limit_bytes)
        KeyLineage.__init__(self, stage, number, group.epoch, cache, repeats)
        self.partitions, self.layout = partitions, by_key(*stage.key)
        self.scratch = Scratch()
        if repeats and stage.route is None:  # for one exchange, making shared memory costs more than it saves
            self.window = RowWindow(group, self.fresh)
        self.plan: RowPlan | None = None
        self._arrived_rows = np.zeros(group.size, np.int64)
        self._begin()

    def _begin(self) -> None:
        self.on_plan = self.planned = False
        self.proposal = ABSTAIN
        self._key_parts: list[Batch] = []
        self._rows_seen = 0

    # ------------------------------------------------------------------ local work, before the exchange

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Write the values of this rank's rows into the send buffer; without a plan, bring rows together."""
        self._tables, self._iteration = tables, iteration
        if self.stage.onto is not None:
            self._read_onto(tables[self.stage.onto].tokens)
        self._begin()
        body = self._start_plan()
        pieces: list[Piece] = []
        for piece in self.source.pieces(tables, iteration):
            proposal = self._propose(piece.tokens)
            if body is not None and self.on_plan and proposal == self.plan_token and self._fits(piece, body):
                self._write(piece, body)
            else:
                pieces += self._leave_plan(body)
                pieces.append(piece)
        if body is not None and self._rows_seen != len(body.place):
            pieces += self._leave_plan(body)
        self.rows = rows_of(pieces)

    def _start_plan(self) -> RowPlanBody | None:
        if self.plan is None:
            return None
        body: RowPlanBody | None = self._plan_body()
        self.on_plan = body is not None
        return body

    def _fits(self, piece: Piece, body: RowPlanBody) -> bool:
        assert self.plan is not None
        return piece.batch.names == body.names and self.plan.layout.fits(piece.batch)

    def _write(self, piece: Piece, body: RowPlanBody) -> None:
        assert self.plan is not None
        self.plan.write(piece.batch, body.place[piece.lo : piece.hi])
        self._key_parts.append(piece.batch.select(*self.stage.key))
        self._rows_seen = piece.hi

    def _leave_plan(self, body: RowPlanBody | None) -> list[Piece]:
        """The rows that were written into the send buffer, as rows again."""
        if not self.on_plan:
            return []
        self.on_plan = False
        assert body is not None and self.plan is not None
        if not self._key_parts:
            return []
        columns, valid = self.plan.layout.read(self.plan.views, body.place[: self._rows_seen])
        rows = body.rows(Batch.concat(self._key_parts), columns, valid)
        return [Piece(0, self._rows_seen, rows, NO_TOKENS)]

    def _addressed(self, rows: Batch) -> Outgoing:
        rows.schema.require(*self.stage.key)
        order, counts = self._order, self._counts = self._send_order(rows.select(*self.stage.key))
        self._starts = exclusive(counts)
        bounds = np.append(self._starts, len(rows))
        words = packed_words(rows, order, bounds)

        def fill(buffer: Array, at: Array) -> None:
            for d in range(len(words)):
                pack(rows, order, int(bounds[d]), int(bounds[d + 1]), buffer, int(at[d]))

        extra = rows_extra(rows.schema, counts, self.group.rank)
        return Outgoing(words, counts, fill, rows.schema.digest(), self.proposal, extra)

    def _send_order(self, keys: Batch) -> tuple[Array | None, Array]:
        """Rows by rank (None: they stand so), and the rows for each rank."""
        dest, counts = self._destinations(keys)
        return send_order(dest, counts, self.scratch), counts

    def _destinations(self, keys: Batch) -> tuple[Array, Array]:
        """The rank of each row, and the rows for each rank."""
        return owners(keys, self.partitions, self.scratch)

    def _nothing(self) -> Outgoing:
        return nothing(self.group.size, self.proposal)

    # ------------------------------------------------------------------ the exchange

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective."""
        if self.plan is not None:
            status = self._run_plan(guard, self._recover)
            if self.planned or status & FAILED:
                return status
        status = super().exchange(guard)
        if self.check and status == OK:
            self._check_conserved(guard)
        return status

    def _check_conserved(self, guard: Guard) -> None:
        """Rows sent are rows received: their number and the sum of their hashes. Collective."""
        sums = np.zeros(3, np.int64)
        guard.run(self._weigh, sums)
        sums[2] = guard.failure is not None
        self.group.allreduce(sums, "sum")
        if sums[2] == 0 and sums[:2].any():
            raise ScheduleError(
                f'shuffle into "{self.stage.into}": the rows received are not the rows sent (their numbers '
                f"differ by {int(sums[0])}): a defect of the engine, or a network that corrupts data"
            )

    def _weigh(self, sums: Array) -> None:
        for rows, sign in ((self.rows, 1), (self.received, -1)):
            if rows is not None and len(rows):
                total = int(hash_keys(rows).sum(dtype=np.uint64).view(np.int64))
                sums[:2] += np.array([len(rows), total]) * sign

    def _recover(self) -> None:
        self.rows = rows_of(self._leave_plan(self.cache.get(self.plan_token)))

    def _agreed(self, headers: Array) -> None:
        if self.group.size == 1:
            self.too_large = self.rows is not None and beyond_memory(self.rows)
        else:
            self.too_large = may_be_beyond_memory(headers)
            self.proposal = agreed_proposal(headers)
            self._arrived_rows = headers[:, ROWS].copy()

    # ------------------------------------------------------------------ local work, after the exchange

    def finish(self) -> Table:
        """All rows of this rank's keys, sorted by key or as they came."""
        rows = self._finish_planned() if self.planned else self._finish_fresh()
        return Table(rows, self.layout, self._made_tokens())

    def _finish_planned(self) -> Batch:
        body: RowPlanBody = self.cache.get(self.plan_token)
        assert self.plan is not None
        self.keys_changed = False
        columns, valid = self.plan.layout.read(self.plan.views, body.final, self.shelf.new)
        return body.rows(body.keys, columns, valid)

    def _finish_fresh(self) -> Batch:
        assert self.received is not None
        rows, place, order = self.received, current(), None
        ways = self._ranges(rows) if self.too_large else None
        if ways is not None and place is not None:
            made = in_ranges(rows, *ways, self._order_within, place, self.shelf.new)
        else:
            order = self._order_within(rows)
            if order is not None:
                made = take_rows(rows, order, self.shelf.new)
            else:
                made = rows.copy() if self.borrowed else rows
        if not self.keeps:
            return made
        keys = self._stable(made.select(*self.stage.key))
        if self._worth_a_plan() and fixed(made.drop(*self.stage.key).schema):
            self._propose_plan(rows, order, keys)
        return Batch._trusted({**made._columns, **keys._columns}, {**made._valid, **keys._valid}, len(made))

    def _ranges(self, rows: Batch) -> tuple[PartOf, int] | None:
        """How rows that do not fit are cut into ranges, to be sorted one by one; None: they need not be."""
        if not self.stage.sorted:
            return None
        if self.stage.onto is None:
            return lambda rows: part_of_hash(rows, self.stage.key), PARTS
        require_keyed(self.stage, self._tables[self.stage.onto])
        onto = self._tables[self.stage.onto].batch.select(*self.stage.key)
        index, n = self.cache.indexes.of(onto), max(1, len(onto))
        return lambda rows: np.maximum(index.lookup(rows.select(*self.stage.key)), 0) * PARTS // n, PARTS

    def _order_within(self, rows: Batch) -> Array | None:
        return self._final_order(rows.select(*self.stage.key))

    def _final_order(self, keys: Batch) -> Array | None:
        """The rows as they came, sorted by key; None if they are, or need not be."""
        if not self.stage.sorted:
            return None
        if self.stage.onto is not None:
            return self._onto_order(keys)
        order = grouping_order(keys)
        if order is not None:
            return order
        numbered = number_keys(keys)
        if (numbered.codes[1:] >= numbered.codes[:-1]).all():
            return None
        return group_order(numbered.codes, len(numbered))[0]

    def _onto_order(self, keys: Batch) -> Array:
        assert self.stage.onto is not None
        require_keyed(self.stage, self._tables[self.stage.onto])
        onto = self._tables[self.stage.onto].batch.select(*self.stage.key)
        slots = self.cache.indexes.of(onto).lookup(keys)
        here = np.flatnonzero(slots >= 0)
        if len(here) == len(slots):
            return group_order(slots, len(onto))[0]
        if self.stage.missing == "error":
            raise UsageError(
                f'shuffle onto "{self.stage.onto}": {len(slots) - len(here)} rows have keys that are not in '
                'it; add them, or say missing="drop"'
            )
        return here[group_order(slots[here], len(onto))[0]]

    def _propose_plan(self, rows: Batch, order: Array | None, keys: Batch) -> None:
        """Where every row will be written and read; ``rows`` are those that came, ``keys`` those made."""
        assert self.rows is not None
        names, arrived = self.stage.key, self._arrived_rows
        if self.group.size == 1:
            arrived = np.array([len(rows)])
        mine, send_rows = self._plan_order(self.rows.select(*names))
        layout = RecordLayout(rows.drop(*names).schema)
        plan = RowPlan(self.group, self.number, layout, send_rows, arrived, self.check)
        came, ends = rows.select(*names), np.append(0, np.cumsum(arrived)).tolist()
        theirs = [self._arrival_order(came.slice(lo, hi)) + lo for lo, hi in pairwise(ends)]
        final = plan.arrivals(np.concatenate(theirs), arrived)
        body = RowPlanBody(rows.names, plan.places(mine), final if order is None else final[order], keys)
        self._pending = Pending(self.proposal, plan, body, body.nbytes + plan.nbytes, self._onto_known)

    def _plan_order(self, keys: Batch) -> tuple[Array, Array]:
        """The order in which a plan sends this rank's rows, and the rows for each rank."""
        return fine_order(keys, self.partitions)

    def _arrival_order(self, keys: Batch) -> Array:
        """The order in which a plan's sender sends the rows with these keys, numbered as they came."""
        return fine_order(keys, self.partitions)[0]

    # ------------------------------------------------------------------ transactions

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands; ``keys_changed`` on any rank. Collective. Returns tokens to rename."""
        renames = self._commit_keys(keys_changed, self.planned)
        self._install()
        self._forget()
        return renames

    def _forget(self) -> None:
        super()._forget()
        self._forget_keys()
        self._pending, self._key_parts = None, []


class GatherRows(RowSender):
    """One `Gather` stage at work: every rank sends all its rows to every rank."""

    def __init__(
        self,
        stage: Gather | Number,
        number: int,
        group: Group,
        source: RowSource,
        check: bool = False,
        limit_bytes: int | None = None,
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

        counts = np.full(size, n)
        extra = rows_extra(rows.schema, counts, self.group.rank)
        return Outgoing(np.full(size, words[0]), counts, fill, rows.schema.digest(), 0, extra)

    def finish(self) -> Table:
        """All rows of all ranks, in canonical order."""
        assert self.received is not None
        rows = self.received
        return Table(rows, EVERYWHERE, NO_TOKENS, np.array([0, len(rows)]), 0, len(rows))
