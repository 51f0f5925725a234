"""Shuffle with a combiner: rows fold locally, one record per key travels, records merge at the key's owner.

Three ways, chosen by agreement only. *Fresh*: keys and records travel, the owner merges them in a table; keys
that recur travel as numbers in later exchanges (see `iterreduce.slots`), though their rows vary. *Planned*
(values only): every rank handed on the key columns of the last time, so each row's place in the send buffer
and each record's slot at its owner are known, and nothing but accumulators moves. A rank that finds its keys
changed, or its part of the plan lost, joins the planned exchange with REPLAN in its headers; then all ranks
repeat it fresh, without running any map again. A rank that lost its directory says REPLAN in a fresh
exchange.

How it can go wrong: see `FreshExchange`. What a rank does between two collectives runs under the `Guard`, so
that it joins the next one whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from iterreduce.agreement import Guard, settle_schemas
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch, row_text
from iterreduce.columns.groups import Folded, KeyIndex, Numbered, number_keys
from iterreduce.columns.growing import Marks
from iterreduce.columns.narrow import merge_narrow
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.directory import Part
from iterreduce.errors import UsageError
from iterreduce.exchange import (
    ABSTAIN,
    FAILED,
    OK,
    REPLAN,
    ROWS,
    ROWS_WANTED,
    SCHEMA,
    Arrival,
    FreshExchange,
    Outgoing,
    ValuesPlan,
    agreed_proposal,
    beyond_memory,
    may_be_beyond_memory,
    nothing,
)
from iterreduce.folding import Combiner, Relearn, RowSource
from iterreduce.lineage import KeyLineage, Pending, require_keyed
from iterreduce.loop import Shuffle
from iterreduce.loop_cache import LoopCache
from iterreduce.maps import Piece
from iterreduce.slots import Slots
from iterreduce.table import Layout, RowsOf, Table, by_key


@dataclass(frozen=True)
class PlanBody:
    """The large part of a plan, kept in the cache: where rows fold to, where records go, which keys come."""

    codes: Array
    numbered: Numbered
    slots: Array
    keys: Batch | None
    touched: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return int(
            (self.touched.nbytes if self.touched is not None else 0)
            + self.codes.nbytes
            + self.slots.nbytes
            + self.numbered.keys.nbytes
            + self.numbered.hashes.nbytes
            + self.numbered.codes.nbytes
        )


class CombineShuffle(KeyLineage):
    """One `Shuffle` stage with ``combine`` at work, on every iteration of a loop run."""

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
        super().__init__(stage, number, group.epoch, cache, repeats)
        self.group, self.source, self.partitions, self.check = group, source, partitions, check
        self.layout = by_key(*stage.key)
        self.fresh = FreshExchange(group, number, check, limit_bytes=limit_bytes)
        self.slots = Slots(number, group.size, cache, partitions, enabled=repeats)
        assert stage.combine is not None
        self.extra_status = OK  # what else the next header says
        self.combiner = Combiner(stage.combine, stage.key, source)
        self.plan: ValuesPlan | None = None
        self._equal_keys: Batch | None = None  # the last object that held the keys of last time
        self._merged: tuple[Batch, Array] | None = None
        self._made: Batch | None = None  # of the keys merged, where it is finished already
        self._records: Array | None = None
        self.marks = Marks()
        self._touched: Array | None = None
        self._onto_name = stage.onto
        self._onto: Batch | None = None  # the key columns of the table that is shuffled onto
        self._onto_layout: Layout | None = None  # of that table, once it is known to be by key
        self._relearned = False
        self._worth = False  # is a plan made of this exchange?
        self._parts: list[Batch] = []
        self._begin()

    def _begin(self) -> None:
        self.on_plan = self.planned = False
        self._body: PlanBody | None = None
        self.proposal = ABSTAIN
        self._key_parts: list[Batch] = []
        self._rows_seen = 0

    # ------------------------------------------------------------------ local work, before the exchange

    def prepare(
        self, tables: Mapping[str, Table], iteration: int, pieces: Iterable[Piece] | None = None
    ) -> None:
        """Fold this rank's rows; ``pieces`` where they have been made already."""
        self._tables, self._iteration = tables, iteration
        if self._onto_name is not None:
            onto = tables[self._onto_name]
            if onto.layout is not self._onto_layout:
                require_keyed(self.stage, onto)
                self._onto_layout = onto.layout
            self._read_onto(onto.tokens)
        try:
            self._fold_all(pieces)
        except Relearn as found:
            self._learn(found.schema)
            self._fold_all()

    def _fold_all(self, pieces: Iterable[Piece] | None = None) -> None:
        combiner = self.combiner
        self._begin()
        if combiner.dirty or combiner.provisional:
            combiner.clear()
        body = self._start_plan() if self.plan is not None else None
        for piece in pieces or self.source.pieces(self._tables, self._iteration):
            lo, hi, batch, tokens = piece
            if batch._length:  # no rows, no say: their columns may be those of an empty list
                outputs = combiner.outputs
                if outputs is None or not outputs.fits(batch):
                    combiner.check(batch)
            proposal = self._propose(tokens)
            if body is not None and self.on_plan and proposal == self.plan_token:
                assert self.plan is not None and combiner.outputs is not None
                codes = body.codes
                if lo or hi < codes.size:
                    codes = codes[lo:hi]
                fold = combiner.outputs.update if lo else combiner.outputs.update_afresh
                fold(self.plan.records, codes, batch)
            else:
                self._leave_plan(body)
                if batch._length:
                    self._add(piece)
            self._rows_seen = hi
        if body is not None and self._rows_seen != len(body.codes):
            self._leave_plan(body)

    def _start_plan(self) -> PlanBody | None:
        if self._relearned:
            return None
        body: PlanBody | None = self._plan_body()
        self._body = body
        self.on_plan = body is not None
        return body

    def _add(self, piece: Piece) -> None:
        self.combiner.add(piece.batch)
        if self.proposal > 0:
            self._key_parts.append(piece.batch.select(*self.stage.key))

    def _leave_plan(self, body: PlanBody | None) -> None:
        """What was folded into the send buffer moves to the table of the fresh exchange."""
        if not self.on_plan:
            return
        self.on_plan = False
        assert body is not None and self.plan is not None
        numbered = body.numbered
        seen = np.zeros(len(numbered.hashes), bool)
        seen[numbered.codes[: self._rows_seen]] = True
        at = np.flatnonzero(seen)
        places = self.plan.shifted(at)
        self.combiner.dirty = True
        self.combiner.fold.merge(
            Folded(numbered.hashes[at], numbered.keys.take(at), self.plan.records[places])
        )
        if self._rows_seen:
            self._key_parts = [numbered.keys.take(numbered.codes[: self._rows_seen])]

    def _learn(self, schema: Schema) -> None:
        self.combiner.learn(schema)
        # a plan made before is void, but the other ranks do not know: its counts are kept to tell them
        self._relearned = self.plan is not None

    # ------------------------------------------------------------------ the exchange

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective."""
        if self.plan is not None:
            return self._behind_plan(self._run_plan(guard, self._recover), guard)
        return self._without_plan(guard)

    def _behind_plan(self, status: int, guard: Guard) -> int:
        """What follows the exchange by the plan: nothing, or a fresh one. Collective."""
        if self.planned and not self.slots.idle:
            self.slots.on_plan()
        return status if self.planned or status & FAILED else self._without_plan(guard)

    def _without_plan(self, guard: Guard) -> int:
        if self.group.size == 1:
            self._merged = guard.run(self._result_alone)
            self.too_large = beyond_memory(*(self._merged or ()))
            self._worth = self._worth_a_plan()
            return guard.status
        return self._exchange_fresh(guard)

    def _recover(self) -> None:
        self._leave_plan(self.cache.get(self.plan_token))

    def _result_alone(self) -> tuple[Batch, Array]:
        if self.combiner.outputs is None:
            self.combiner.learn_of_nothing(self.source.on_nothing(self._tables, self._iteration).schema)
        folded = self.combiner.fold.result()
        self._parts = [folded.keys]
        if self.stage.onto is None:
            return folded.keys, folded.records
        return self._merge_onto([Part(np.empty(0, np.int32), folded.records[:0], folded)])

    def _exchange_fresh(self, guard: Guard, met: bool = False) -> int:
        """``met``: the first part of the first exchange is over, and lies where it was received."""
        while True:
            lost = self.slots.lost
            out = (None if lost else guard.run(self._outgoing)) or nothing(self.group.size)
            said = guard.status | self.extra_status | (REPLAN if lost else OK)
            arrival, met = self.fresh.rest(out) if met else self.fresh.run(out, said), False
            if arrival.status & (FAILED | ROWS_WANTED):
                return arrival.status & (FAILED | ROWS_WANTED)
            if arrival.status & REPLAN:  # a rank cannot read slots: all forget them, and send keys
                self.slots.drop()
                continue
            digests = arrival.headers[:, SCHEMA].tolist()
            if len(set(digests)) > 1 or 0 in digests:
                if self._agree_schemas(guard, digests):
                    continue
                if self.group.agree_any(guard.failure is not None):
                    return FAILED
            self.proposal = agreed_proposal(arrival.headers)
            self.too_large = may_be_beyond_memory(arrival.headers)
            narrow = self.combiner.outputs is not None and self.combiner.outputs.narrow is not None
            self._worth = self._worth_a_plan()
            self.slots.heard(arrival.headers, max(digests), self._worth, narrow, self.too_large)
            self._merged = guard.run(self._merge, arrival)
            return OK  # a failure of this rank alone is told with the next exchange, or the control reduction

    def _agree_schemas(self, guard: Guard, digests: list[int]) -> bool:
        """All ranks learn one schema; True if the exchange must be repeated with it. Collective."""
        mine = self.combiner.schema
        merged, again = settle_schemas(
            self.group,
            guard,
            digests,
            mine,
            lambda: self.source.on_nothing(self._tables, self._iteration).schema,
        )
        if merged is not None and merged != mine:
            guard.run(self._learn if any(digests) else self.combiner.learn_of_nothing, merged)
            if mine is not None:
                guard.run(self._fold_all)
        return again

    def _outgoing(self) -> Outgoing:
        if self.combiner.outputs is None:
            return nothing(self.group.size, self.proposal)
        return self.slots.outgoing(self.combiner, self.combiner.fold.rows(), self.proposal)

    def _merge(self, arrival: Arrival) -> tuple[Batch, Array]:
        """The keys of this rank's result and their records; the receive buffer may be reused afterwards."""
        self._made = None
        found = self._merge_narrow(arrival)
        if found is not None:
            return found
        parts = self.slots.arrived(self.combiner, arrival)
        self._parts = [self.slots.keys_of(part) for part in parts] if self._worth else []
        self.slots.remember(parts)
        if self.stage.onto is not None:
            return self._merge_onto(parts)
        return self.slots.merge(self.combiner, parts)

    def _worth_a_plan(self) -> bool:
        """Not where no rank has had a row: what is bound to no rows is bound anew in the next iteration. Nor
        where rows are keys alone: a plan's message is records, and there are none.
        """
        bound = self.stage.combine != {} and not self.combiner.provisional
        return bound and super()._worth_a_plan()

    def _merge_narrow(self, arrival: Arrival) -> tuple[Batch, Array] | None:
        """One integer key and one sum, and nothing else to do with them than to add sums to a table."""
        outputs = self.combiner.outputs
        if outputs is None or outputs.narrow is None or self.stage.onto is None or self.stage.touched:
            return None
        if self._worth or arrival.some_late or self.slots.learns or self.slots.directory is not None:
            return None
        index, keys = self._onto_index(), self._onto
        assert keys is not None
        sums = np.empty(len(keys) + 1, outputs.narrow)
        strays = merge_narrow(index, arrival.buffers[0], arrival.starts, arrival.headers, ROWS, sums)
        if strays < 0 or (strays and self.stage.missing == "error"):
            return None
        self._made = outputs.with_sums(keys, sums)
        return keys, np.empty((0, 0), np.int64)

    def _merge_onto(self, parts: list[Part]) -> tuple[Batch, Array]:
        """Straight into the rows of the table, or into those that are touched: what has no row there is
        merged into one behind them.
        """
        assert self.combiner.outputs is not None
        keys, n = self._onto_keys(), len(self._onto_keys())
        rows = [r for part in parts for r in self._rows_onto(part, n)]
        if self.stage.missing == "error":
            self._refuse_strays(parts, rows, n)
        if self.stage.touched:
            self._touched = self.marks.distinct(rows, n)
            keys, rows = keys.take(self._touched), self.marks.places(self._touched, rows, n)
        room = self._room(len(keys))
        for part, known, keyed in zip(parts, rows[::2], rows[1::2], strict=True):
            self.combiner.outputs.merge(room, known, part.records)
            self.combiner.outputs.merge(room, keyed, part.keyed.records)
        return keys, room[:-1]

    def _rows_onto(self, part: Part, n: int) -> tuple[Array, Array]:
        """The rows of the table for what came by slot, and for what came with its key; ``n`` for none."""
        index, directory = self._onto_index(), self.slots.directory
        keyed = index.lookup(part.keyed.keys)
        keyed[keyed < 0] = n
        if not len(part.slots):
            return np.empty(0, np.int64), keyed
        assert directory is not None
        return directory.rows_onto(index)[part.slots], keyed

    def _refuse_strays(self, parts: list[Part], rows: list[Array], n: int) -> None:
        if not any(int(r.max()) == n for r in rows if len(r)):
            return
        strays, directory = [], self.slots.directory
        for part, known, keyed in zip(parts, rows[::2], rows[1::2], strict=True):
            strays.append(part.keyed.keys.take(keyed == n))
            if directory is not None:
                strays.append(directory.owned.keys.take(part.slots[known == n]))
        self._refuse(number_keys(Batch.concat(strays)).keys)

    # ------------------------------------------------------------------ local work, after the exchange

    def finish(self) -> Table:
        """The finished rows of this rank's keys."""
        return self._finish_planned() if self.planned else self._finish_fresh()

    def _finish_planned(self) -> Table:
        body = self._body
        assert body is not None and self.plan is not None and self.combiner.outputs is not None
        self._touched, self.keys_changed = body.touched, False
        keys = body.keys if body.keys is not None else self._onto_keys()
        if self.group.size == 1 and self.stage.onto is None:
            records = self.plan.received[self.plan.gap :]
        else:
            made = self.combiner.outputs.summed(keys, body.slots, self.plan.received)
            if made is not None:
                return self._table(made)
            records = self._room(len(keys))
            self.combiner.outputs.merge(records, body.slots, self.plan.received)
            records = records[:-1]
        return self._table(self.combiner.outputs.finish(keys, records))

    def _room(self, rows: int) -> Array:
        """Records for ``rows`` keys and one more that takes what belongs nowhere, filled with identities."""
        assert self.combiner.outputs is not None
        shape = rows + 1, self.combiner.outputs.width
        if self._records is None or self._records.shape != shape:
            self._records = np.empty(shape, np.int64)
        self.combiner.outputs.fill(self._records)
        return self._records

    def _finish_fresh(self) -> Table:
        assert self._merged is not None and self.combiner.outputs is not None
        (keys, records), self._merged = self._merged, None
        if self.stage.onto is None:
            keys = self._stable(keys)
        batch = self._made if self._made is not None else self.combiner.outputs.finish(keys, records)
        if self._worth:
            self._propose_plan(keys)
        return self._table(batch)

    def _stable(self, keys: Batch) -> Batch:
        """The keys of last time, as the same objects, where they are equal."""
        if self.keys is not None and keys is self._equal_keys:
            self.keys_changed, self._keys_next = False, self.keys
            return self.keys
        made = super()._stable(keys)
        self._equal_keys = None if self.keys_changed else keys
        return made

    def _onto_keys(self) -> Batch:
        assert self._onto_name is not None
        batch, known = self._tables[self._onto_name].batch, self._onto
        for key in self.stage.key:
            if known is None or known._columns[key] is not batch._columns.get(key):
                self._onto = known = batch.select(*self.stage.key)
        assert known is not None
        return known

    def _onto_index(self) -> KeyIndex:
        return self.cache.indexes.of(self._onto_keys())

    def _refuse(self, strays: Batch) -> None:
        raise UsageError(
            f'shuffle onto "{self.stage.onto}": {len(strays)} keys sent are not in it, such as '
            f"{row_text(strays)}; send to its keys only, give it rows for "
            'them, or say missing="drop" in the Shuffle'
        )

    def _table(self, batch: Batch) -> Table:
        if self.stage.onto is not None:
            onto = self._tables[self.stage.onto]
            if self._touched is not None:
                return Table(batch, onto.layout, rows_of=RowsOf(self._onto_keys(), self._touched))
            return Table(batch, onto.layout, self._onto_tokens)
        return Table(batch, self.layout, self._made_tokens())

    def _propose_plan(self, keys: Batch) -> None:
        assert self.combiner.outputs is not None
        key_rows = (
            Batch.concat(self._key_parts)
            if self._key_parts
            else Batch.empty(self.combiner.outputs.key_schema)
        )
        numbered = number_keys(key_rows)
        send_rows = np.diff(self.partitions.send_bounds(numbered.hashes))
        recv_rows = np.array([len(part) for part in self._parts], np.int64)
        plan = ValuesPlan(
            self.group, self.number, self.combiner.outputs.width, send_rows, recv_rows, self.check
        )
        index = self._onto_index() if self.stage.onto else KeyIndex(keys)
        slots = [index.lookup(part) for part in self._parts]
        if self._touched is not None:
            slots = self.marks.places(self._touched, slots, len(index))
        elif self.stage.onto:
            slots = [np.where(s < 0, len(keys), s) for s in slots]
        out_keys = None if self.stage.onto and self._touched is None else keys
        body = PlanBody(
            plan.shifted(numbered.codes),
            numbered,
            plan.received_slots(slots, len(keys)),
            out_keys,
            self._touched,
        )
        self._pending = Pending(self.proposal, plan, body, body.nbytes, self._onto_known)

    # ------------------------------------------------------------------ transactions

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands; ``keys_changed`` on any rank. Returns tokens to rename in its tables."""
        if self.planned and self.slots.idle and not keys_changed:
            return {}  # nothing was made that would have to be kept
        if self._keys_next is not None and self._keys_next is not self.keys:
            self._equal_keys = self._keys_next
        renames = self._commit_keys(keys_changed, self.planned)
        self.slots.commit()
        self._install()
        self._forget()
        return renames

    def rollback(self) -> None:
        """The iteration never was."""
        self.slots.rollback()
        self._forget()

    def _forget(self) -> None:
        self._forget_keys()
        self._touched = None
        self._pending, self._parts, self._key_parts, self._merged, self._made = None, [], [], None, None

    def _drop_plan(self) -> None:
        super()._drop_plan()
        self._relearned = False
