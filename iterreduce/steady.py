"""A combined shuffle in its steady state: bound once to what does not change, and then run in few calls.

With a thousand rows an iteration is the calls around them. `OnPlan` is a shuffle whose plan holds: the user's
function, one loop into the send buffer, the exchange, one loop out of what came. `FewRows` is one of a few
rows whose keys are made anew, and are the same as before: they are added where they travel, and what came is
heard and added in one loop.

Whether a rank goes this way is its own business. The collectives, and the words that travel, are those of
`CombineShuffle`, so ranks that go different ways meet. Where something is not as it was, before the exchange
or in what it brought, a rank goes on in the general way with the rows that it has: no user code is called
twice.

How it can go wrong: something else changes, and nobody looks. What is bound is therefore compared by identity
in every iteration: outputs, plan, buffers, the columns of keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from iterreduce.agreement import Guard
from iterreduce.columns.batch import Batch
from iterreduce.columns.folds import sum_afresh, sum_slots
from iterreduce.columns.narrow import Frame, hear_narrow
from iterreduce.columns.numbering import Addressed
from iterreduce.columns.ragged import Array
from iterreduce.exchange import FEW_RANKS, OK, SCHEMA, STATUS
from iterreduce.folding import Direct
from iterreduce.maps import Handed, Piece, take_back
from iterreduce.shuffle import CombineShuffle, PlanBody
from iterreduce.slots import FEWEST_NARROW, Narrow
from iterreduce.table import Table

INT64 = np.dtype(np.int64)
SPAN = 1 << 16  # addresses of keys that are made anew: a table of them has to stay in the cache


class SteadyShuffle(CombineShuffle):
    """A `CombineShuffle` that takes the short way as long as it can."""

    _on_plan: OnPlan | None = None
    _few: FewRows | None = None
    _way: OnPlan | FewRows | None = None  # that of this iteration, once its rows are folded

    # ------------------------------------------------------------------ before the exchange

    def prepare(
        self, tables: Mapping[str, Table], iteration: int, pieces: Iterable[Piece] | None = None
    ) -> None:
        """Fold this rank's rows."""
        bound = self._few if self.plan is None else self._on_plan
        if bound is not None and bound.holds(tables):
            made = bound.map.single(tables, iteration)
            if made is not None:
                if bound.fold(*made):
                    self._tables, self._iteration, self._way = tables, iteration, bound
                    return
                pieces = (piece_of(*made),)
        super().prepare(tables, iteration, pieces)

    # ------------------------------------------------------------------ the exchange

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective."""
        way = self._way
        if way is None or guard.failure is not None:
            self._way = None
            return super().exchange(guard)
        return way.exchange(guard)

    # ------------------------------------------------------------------ after the exchange

    def finish(self) -> Table:
        """The finished rows of this rank's keys."""
        if self._way is not None:
            return self._way.finish()
        made = super().finish()
        self._bind()
        return made

    def _bind(self) -> None:
        """Take the short way from the next iteration on, if there is one."""
        outputs, source = self.combiner.outputs, self.source
        if self.check or outputs is None or outputs.direct is None or not source.by_block or source.computed:
            return
        if self.planned:
            onto, bound = self._onto_name or self.group.size > 1, self._on_plan
            if onto and self._body is not None and not self.stage.touched:
                if bound is None or bound.body is not self._body or bound.outputs is not outputs:
                    self._on_plan = OnPlan(self, self._body, outputs.direct)
        elif self._made is not None and self.plan is None and 1 < self.group.size <= FEW_RANKS:
            self._few = FewRows.of(self, self._few, outputs.direct)

    # ------------------------------------------------------------------ transactions

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands; ``keys_changed`` on any rank. Returns tokens to rename in its tables."""
        way, self._way = self._way, None
        if isinstance(way, FewRows) and not keys_changed:
            self._last_proposal = self.proposal
            self.slots.commit()
            return {}
        return super().commit(keys_changed)

    def rollback(self) -> None:
        """The iteration never was."""
        self._way = None
        super().rollback()


def piece_of(handed: Handed, result: Batch) -> Piece:
    """What user code made of all rows at once, with resident columns in place of their views."""
    return Piece(handed.lo, handed.lo + handed.batch._length, *take_back(result, handed.origin))


class Bound:
    """What both ways are bound to: a map of one piece, and one plain sum by key."""

    def __init__(self, work: SteadyShuffle, direct: Direct):
        assert work.source.map is not None and work.combiner.outputs is not None
        self.work, self.map, self.outputs = work, work.source.map, work.combiner.outputs
        self.names, self.keys = self.outputs.names, work.stage.key
        self.name, self.column, self.dtype = direct.name, direct.column, direct.dtype
        self.values_dtype = self.outputs.schema[self.column].dtype
        self.onto_name, self.onto_tokens = work._onto_name, {}

    def stands(self, tables: Mapping[str, Table]) -> bool:
        """Are outputs what they were, and the table that rows are shuffled onto?"""
        work = self.work
        if work.combiner.outputs is not self.outputs or work.extra_status:
            return False
        if self.onto_name is None:
            return True
        onto = tables[self.onto_name]
        if onto.layout is not work._onto_layout:
            return False
        if onto.tokens != self.onto_tokens:
            work._read_onto(onto.tokens)
            self.onto_tokens = dict(onto.tokens)
        return True

    def read(self, handed: Handed, result: Batch) -> tuple[list[Array], Array] | None:
        """The columns of keys and of values, if the rows are as they were when this was bound."""
        columns = result._columns
        if result._valid or tuple(columns) != self.names:
            return None
        values, resident = columns[self.column], handed.origin.get(id(columns[self.column]))
        if resident is not None:  # what was handed out cannot be written to: another type to a compiled loop
            values = resident[0]
        if type(values) is not np.ndarray or values.dtype != self.values_dtype or values.ndim != 1:
            return None
        if not values.flags.c_contiguous:
            return None
        return [columns[key] for key in self.keys], values


class OnPlan(Bound):
    """Values only: see `CombineShuffle`."""

    def __init__(self, work: SteadyShuffle, body: PlanBody, direct: Direct):
        super().__init__(work, direct)
        self.plan, self.token, self.body = work.plan, work.plan_token, body
        assert self.plan is not None
        self.cells, self.came = self.plan.records.view(self.dtype), self.plan.received.view(self.dtype)
        self.rows, self.codes, self.slots = len(body.codes), body.codes, body.slots
        known = (tokens for tokens, of in work._tokens_known.items() if of == self.token)
        self.tokens = next(known, (0,) * len(self.keys))  # of the key columns that it was made for

    def holds(self, tables: Mapping[str, Table]) -> bool:
        """Does the plan, as far as this rank knows before its rows are made?"""
        work = self.work
        if work.plan is not self.plan or not self.stands(tables):
            return False
        if work._relearned or work.combiner.dirty or work.combiner.provisional:
            return False
        known = work._onto_steady and work._plan_onto == work._onto_known
        return known and work.cache.get(self.token) is self.body

    def fold(self, handed: Handed, result: Batch) -> bool:
        """Fold the rows into the send buffer; False where they are not those of the plan."""
        found = self.read(handed, result) if result._length == self.rows else None
        if found is None:
            return False
        origin = handed.origin
        for column, token in zip(found[0], self.tokens, strict=True):
            resident = origin.get(id(column))
            if resident is None or resident[1] != token or not token:
                return False
        sum_afresh(self.cells, self.codes, found[1])
        work = self.work
        work.proposal, work.on_plan, work._body = self.token, True, self.body
        work._key_parts, work._rows_seen = [], self.rows
        return True

    def exchange(self, guard: Guard) -> int:
        """Send and receive. Collective."""
        work = self.work
        status: int = self.plan.run(OK)
        if status:
            work.planned, work._way = False, None
            return work._behind_plan(work._heard_plan(status, guard, work._recover), guard)
        work.planned = True
        if not work.slots.idle:
            work.slots.on_plan()
        return OK

    def finish(self) -> Table:
        """The finished rows of this rank's keys."""
        work, onto, body = self.work, self.onto_name, self.body
        work._touched, work.keys_changed = None, False
        keys = work._onto_keys() if body.keys is None else body.keys
        sums = np.empty(keys._length + 1, self.dtype)
        sum_slots(self.came, self.slots, sums)
        batch = Batch._trusted({**keys._columns, self.name: sums[:-1]}, keys._valid, keys._length)
        if onto is None:
            return Table(batch, work.layout, work._made_tokens())
        return Table(batch, work._tables[onto].layout, work._onto_tokens)


class FewRows(Bound):
    """Keys that are made anew, and a sum: as many as `slots` never numbers."""

    def __init__(self, work: SteadyShuffle, direct: Direct, narrow: Narrow, found: Addressed):
        super().__init__(work, direct)
        fresh = work.fresh
        self.narrow, self.found, self.onto_keys = narrow, found, work._onto_keys()
        self.key_dtype = self.outputs.key_schema[self.keys[0]].dtype
        self.sent, self.came, self.slot = fresh.inline_send, fresh.inline_recv, fresh.slot
        self.call, self.heads, self.words = fresh.call, range(0, len(self.sent), fresh.slot), self.sent.data
        self.frame = Frame(narrow.words, narrow.bounds, fresh.payloads, self.sent, self.dtype)
        self.schema = self.outputs.schema.digest()
        self.counts = 0, len(narrow.words), 2 * len(narrow.words)

    @classmethod
    def of(cls, work: SteadyShuffle, before: FewRows | None, direct: Direct) -> FewRows | None:
        """Bound to the exchange that has just ended, if its keys came before, too."""
        narrow, slots, outputs = work.slots.narrow, work.slots, work.combiner.outputs
        if narrow is None or not narrow.again or not slots.idle or slots.directory is not None:
            return None
        if before is not None and before.narrow is narrow and before.sent is work.fresh.inline_send:
            return before
        found, words = work._onto_index().finder, narrow.words
        assert outputs is not None
        if not isinstance(found, Addressed) or outputs.schema[direct.column].dtype != direct.dtype:
            return None
        if not len(words) or int(words.max()) - int(words.min()) >= SPAN:
            return None
        made = cls(work, direct, narrow, found)
        return made if made.stands_sent() else None

    def stands_sent(self) -> bool:
        """Does the send buffer still hold what was sent? (It is another one when slots grow.)"""
        heads = self.sent.reshape(-1, self.slot)
        return bool((heads[:, STATUS] == OK).all() and (heads[:, SCHEMA] == self.schema).all())

    def holds(self, tables: Mapping[str, Table]) -> bool:
        """Is all as it was, but for the rows?"""
        work = self.work
        if not self.stands(tables) or work.fresh.inline_send is not self.sent:
            return False
        work._tables, slots = tables, work.slots
        return work._onto_keys() is self.onto_keys and slots.idle and slots.token not in slots.cache

    def fold(self, handed: Handed, result: Batch) -> bool:
        """Add the rows in the send buffer; False where they have other keys."""
        found = self.read(handed, result)
        if found is None:
            return False
        (keys,), values = found
        if id(keys) in handed.origin or type(keys) is not np.ndarray or keys.dtype != self.key_dtype:
            return False
        if keys.ndim != 1 or not keys.flags.c_contiguous or len(keys) != len(values):
            return False
        if not self.frame.fold(keys if self.key_dtype == INT64 else keys.view(INT64), values):
            return False
        self.rows, self.sums = (handed, result), np.empty(self.onto_keys._length + 1, self.dtype)
        self.work.planned, self.work.proposal = False, 0
        return True

    def exchange(self, guard: Guard) -> int:
        """Send and receive, and add up what came. Collective."""
        work, fresh = self.work, self.work.fresh
        fresh.sequence += 1
        stage = fresh.stage << 32 | fresh.sequence & 0xFFFFFFFF
        for at in self.heads:
            self.words[at] = stage
        self.call.run()
        strays = hear_narrow(self.found, self.came, self.slot, self.schema, FEWEST_NARROW, self.sums)
        if strays < 0 or (strays and work.stage.missing == "error"):
            work._way = None
            guard.run(CombineShuffle.prepare, work, work._tables, work._iteration, (piece_of(*self.rows),))
            return work._exchange_fresh(guard, met=True)
        return OK

    def finish(self) -> Table:
        """The finished rows of this rank's keys."""
        work = self.work
        work._touched, work.keys_changed, work.slots._counts = None, False, self.counts
        assert self.onto_name is not None
        batch = self.outputs.with_sums(self.onto_keys, self.sums)
        return Table(batch, work._tables[self.onto_name].layout, work._onto_tokens)
