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
from iterreduce.exchange import FEW_RANKS, OK, PROPOSAL, SCHEMA, STATUS
from iterreduce.folding import Direct
from iterreduce.maps import Handed, Piece, renamed, take_back
from iterreduce.shuffle import CombineShuffle, PlanBody
from iterreduce.slots import FEWEST_NARROW, Narrow
from iterreduce.table import Table

INT64 = np.dtype(np.int64)
SPAN = 1 << 16  # addresses of keys that are made anew: a table of them has to stay in the cache


class SteadyShuffle(CombineShuffle):
    """A `CombineShuffle` that takes a short way from the time on that one is known until it ends."""

    _bound: OnPlan | FewRows | None = None  # dropped by whatever goes the general way
    _way: OnPlan | FewRows | None = None  # the same, in an iteration whose rows are folded

    def prepare(
        self, tables: Mapping[str, Table], iteration: int, pieces: Iterable[Piece] | None = None
    ) -> None:
        """Fold this rank's rows."""
        bound = self._bound
        if bound is not None and bound.holds(tables):
            made = bound.map.single(tables, iteration)
            if made is not None:
                if bound.fold(*made):
                    self._tables, self._iteration, self._way = tables, iteration, bound
                    return
                pieces = (piece_of(*made),)
        self._bound = None
        super().prepare(tables, iteration, pieces)

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective."""
        way = self._way
        if way is not None and guard.failure is None:
            return way.exchange(guard)
        self._bound = self._way = None
        return super().exchange(guard)

    def finish(self) -> Table:
        """The finished rows of this rank's keys."""
        if self._way is not None:
            return self._way.finish()
        made = super().finish()
        self._bind()
        return made

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands; ``keys_changed`` on any rank. Returns tokens to rename in its tables."""
        way, self._way = self._way, None
        if way is None or keys_changed or not self.slots.idle:
            return super().commit(keys_changed)
        way.commit()
        return {}

    def rollback(self) -> None:
        """The iteration never was."""
        self._bound = self._way = None
        super().rollback()

    def _bind(self) -> None:
        """Take a short way from the next iteration on, if there is one."""
        outputs, source = self.combiner.outputs, self.source
        if self.check or outputs is None or outputs.direct is None or not source.by_block or source.computed:
            return
        if self.planned and self._body is not None and not self.stage.touched and self._steady_onto():
            if self._onto_name or self.group.size > 1:
                self._bound = OnPlan(self, self._body, outputs.direct)
        elif self._made is not None and self.plan is None and 1 < self.group.size <= FEW_RANKS:
            self._bound = FewRows.of(self, outputs.direct)

    def _steady_onto(self) -> bool:
        return self._onto_name is None or (self._onto_steady and self._plan_onto == self._onto_known)


def piece_of(handed: Handed, result: Batch) -> Piece:
    """What user code made of all rows at once, with resident columns in place of their views."""
    return Piece(handed.lo, handed.lo + handed.batch._length, *take_back(result, (handed,)))


class Bound:
    """What both ways are bound to: a map of one piece, one plain sum by key, and the keys of the table onto
    which rows are shuffled.
    """

    def __init__(self, work: SteadyShuffle, direct: Direct):
        assert work.source.map is not None and work.combiner.outputs is not None
        self.work, self.map, self.outputs = work, work.source.map, work.combiner.outputs
        self.names, self.keys = self.outputs.names, work.stage.key
        self.name, self.column, self.dtype = direct.name, direct.column, direct.dtype
        self.values_dtype = self.outputs.schema[self.column].dtype
        self.onto, self.onto_layout = work._onto_name, work._onto_layout or work.layout
        self.onto_tokens = work._onto_tokens
        self.onto_keys, self.onto_columns = Batch(), list[tuple[str, Array, int | None]]()
        if self.onto is not None:
            self.onto_keys, tokens = work._onto_keys(), work._onto_tokens
            self.onto_columns = [(key, self.onto_keys[key], tokens.get(key)) for key in self.keys]

    def stands(self, tables: Mapping[str, Table]) -> bool:
        """Is the table that rows are shuffled onto what it was, but for its values?"""
        if self.onto is None:
            return True
        onto = tables[self.onto]
        columns, tokens = onto.batch._columns, onto.tokens
        for key, column, token in self.onto_columns:
            if columns.get(key) is not column or tokens.get(key) != token:
                return False
        return onto.layout is self.onto_layout

    def read(self, handed: Handed, result: Batch) -> Array | None:
        """The column of values, if the rows are such as they were when this was bound."""
        columns = result._columns
        if result._valid or tuple(columns) != self.names:
            return None
        values = columns[self.column]
        if type(values) is not np.ndarray or values.dtype != self.values_dtype or values.ndim != 1:
            return None
        if values.base is not None:  # what was handed out is read-only: another type to compiled loops
            values = renamed(values, (handed,))[0]
        return values if values.flags.c_contiguous else None

    def table(self, keys: Batch, sums: Array) -> Table:
        """Sums beside their keys; one more stands behind them."""
        batch = Batch._trusted({**keys._columns, self.name: sums[:-1]}, keys._valid, keys._length)
        if self.onto is None:
            return Table(batch, self.work.layout, self.work._made_tokens())
        return Table(batch, self.onto_layout, self.onto_tokens)


class OnPlan(Bound):
    """Values only: see `CombineShuffle`."""

    def __init__(self, work: SteadyShuffle, body: PlanBody, direct: Direct):
        super().__init__(work, direct)
        plan = work.plan
        assert plan is not None
        self.plan, self.token, self.body, self.result_keys = plan, work.plan_token, body, body.keys
        self.cells, self.came = plan.records.view(self.dtype), plan.received.view(self.dtype)
        self.rows, self.codes, self.slots = len(body.codes), body.codes, body.slots
        known = (tokens for tokens, of in work._tokens_known.items() if of == self.token)
        self.tokens = next(known, (0,) * len(self.keys))  # of the key columns that it was made for
        self.call, self.heads = plan.unheard(), plan.recv_status
        self.received = plan.recv.data
        self.handed: Handed | None = None  # with these rows, and
        self.key_views: list[tuple[str, Array]] = []  # their keys as they were handed out

    def holds(self, tables: Mapping[str, Table]) -> bool:
        """Does the plan, as far as this rank knows before its rows are made?"""
        return self.stands(tables) and self.work.cache.get(self.token) is self.body

    def fold(self, handed: Handed, result: Batch) -> bool:
        """Fold the rows into the send buffer; False where they are not those of the plan."""
        if result._length != self.rows or (handed is not self.handed and not self._meets(handed)):
            return False
        columns = result._columns
        for key, view in self.key_views:
            if columns.get(key) is not view:
                return False
        values = self.read(handed, result)
        if values is None:
            return False
        sum_afresh(self.cells, self.codes, values)  # its zeros stand in the headers, too
        work = self.work
        work.proposal, work.on_plan, work._body = self.token, True, self.body
        work._key_parts, work._rows_seen = [], self.rows
        return True

    def _meets(self, handed: Handed) -> bool:
        """Find the keys of the plan among the columns that were handed out."""
        views, self.handed = handed.views, None
        names = {token: name for name, token in handed.tokens.items() if token}
        found = [names.get(token or 0) for token in self.tokens]
        self.key_views = [(k, views[name]) for k, name in zip(self.keys, found, strict=True) if name]
        self.handed = handed if len(self.key_views) == len(self.keys) else None
        return self.handed is not None

    def exchange(self, guard: Guard) -> int:
        """Send and receive. Collective."""
        work, received, status = self.work, self.received, OK
        self.call()
        for at in self.heads:
            status |= received[at]
        if status:
            work._bound = work._way = None
            work.planned = False
            return work._behind_plan(work._heard_plan(status, guard, work._recover), guard)
        work.planned = True
        if not work.slots.idle:
            work.slots.on_plan()
        return OK

    def finish(self) -> Table:
        """The finished rows of this rank's keys."""
        self.work._touched, self.work.keys_changed = None, False
        keys = self.onto_keys if self.result_keys is None else self.result_keys
        sums = np.empty(keys._length + 1, self.dtype)
        sum_slots(self.came, self.slots, sums)
        return self.table(keys, sums)

    def commit(self) -> None:
        """Nothing was made that would have to be kept."""


class FewRows(Bound):
    """Keys that are made anew, and a sum: as many as `slots` never numbers."""

    def __init__(self, work: SteadyShuffle, direct: Direct, narrow: Narrow, found: Addressed):
        super().__init__(work, direct)
        fresh = work.fresh
        self.fresh, self.found = fresh, found
        self.key, self.key_dtype = self.keys[0], self.outputs.key_schema[self.keys[0]].dtype
        self.sent, self.came, self.slot = fresh.inline_send, fresh.inline_recv, fresh.slot
        self.call, self.heads, self.words = fresh.call, range(0, len(self.sent), fresh.slot), self.sent.data
        self.frame = Frame(narrow.words, narrow.bounds, fresh.payloads, self.sent, self.dtype)
        self.schema = self.outputs.schema.digest()
        self.counts = 0, len(narrow.words), 2 * len(narrow.words)
        self.refuses = work.stage.missing == "error"

    @classmethod
    def of(cls, work: SteadyShuffle, direct: Direct) -> FewRows | None:
        """Bound to the exchange that has just ended, if its keys came before, too."""
        narrow, slots, outputs = work.slots.narrow, work.slots, work.combiner.outputs
        if narrow is None or not narrow.again or not slots.idle or slots.directory is not None:
            return None
        found, words = work._onto_index().finder, narrow.words
        assert outputs is not None
        if not isinstance(found, Addressed) or outputs.schema[direct.column].dtype != direct.dtype:
            return None
        if not len(words) or int(words.max()) - int(words.min()) >= SPAN:
            return None
        made = cls(work, direct, narrow, found)
        return made if made.stands_sent() else None

    def stands_sent(self) -> bool:
        """Does the send buffer hold what is to be sent again? (It is another one when slots grow, and says
        more where a plan is proposed.)
        """
        heads = self.sent.reshape(-1, self.slot)[:, [STATUS, SCHEMA, PROPOSAL]]
        return bool((heads == (OK, self.schema, 0)).all())

    def holds(self, tables: Mapping[str, Table]) -> bool:
        """Is all as it was, but for the rows?"""
        return self.stands(tables) and self.fresh.inline_send is self.sent

    def fold(self, handed: Handed, result: Batch) -> bool:
        """Add the rows in the send buffer; False where they have other keys."""
        values = self.read(handed, result)
        if values is None:
            return False
        keys = result._columns[self.key]
        if type(keys) is not np.ndarray or keys.dtype != self.key_dtype or keys.ndim != 1:
            return False
        if not keys.flags.c_contiguous or not keys.flags.writeable:  # or they may be what was handed out
            return False
        if not self.frame.fold(keys if self.key_dtype == INT64 else keys.view(INT64), values):
            return False
        self.rows, self.sums = (handed, result), np.empty(self.onto_keys._length + 1, self.dtype)
        self.work.planned, self.work.proposal = False, 0
        return True

    def exchange(self, guard: Guard) -> int:
        """Send and receive, and add up what came. Collective."""
        fresh, words = self.fresh, self.words
        fresh.sequence += 1
        stage = fresh.stage << 32 | fresh.sequence & 0xFFFFFFFF
        for at in self.heads:
            words[at] = stage
        self.call.run()
        strays = hear_narrow(self.found, self.came, self.slot, self.schema, FEWEST_NARROW, self.sums)
        return OK if strays == 0 or (strays > 0 and not self.refuses) else self._go_on(guard)

    def _go_on(self, guard: Guard) -> int:
        """What came says more than that rows came: it is heard in the general way. Collective."""
        work = self.work
        work._bound = work._way = None
        guard.run(CombineShuffle.prepare, work, work._tables, work._iteration, (piece_of(*self.rows),))
        return work._exchange_fresh(guard, met=True)

    def finish(self) -> Table:
        """The finished rows of this rank's keys."""
        self.work._touched, self.work.keys_changed = None, False
        return self.table(self.onto_keys, self.sums)

    def commit(self) -> None:
        """Count what travelled."""
        self.work._last_proposal, self.work.slots._counts = 0, self.counts
        self.work.slots.commit()
