"""Shuffle of indexed rows of which only those come out that make a table's value better.

Where all that a rank has to say is one value, and rows have nothing to add to it, what is left of the fold
is who hears it (`columns/reaching.py`): who has heard something as good is not told again, neither here nor
on another rank, and where many speak, those who have not heard look for one who does. Otherwise rows are
folded as ever, and compared with the table.

How it can go wrong: as in `LinkShuffle`. What a rank remembers of the supersteps before holds only while the
table changes by nothing but the rows that this shuffle made: who writes them says so (`continued`), and after
a rollback, or beside another table, all is forgotten. To forget is never wrong, only slower. Whether a rank
says one value is its own business; its headers tell which form its messages have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.linkfold import Touched
from iterreduce.columns.links import Links
from iterreduce.columns.ragged import Array
from iterreduce.columns.reaching import Reaching, alike
from iterreduce.columns.threads import current
from iterreduce.errors import AssumptionError
from iterreduce.exchange import EXTRA, ROWS, Outgoing, nothing
from iterreduce.indexing import Resident
from iterreduce.linklanes import Lane, reads_state_alone
from iterreduce.linkprogram import identity_of, named
from iterreduce.linkshuffle import LinkShuffle
from iterreduce.stages import Patch, Sink, Write
from iterreduce.table import RowsOf, Table

TURNS_AFTER = 3  # times all edges: who has followed so many forwards will go on
ONE_VALUE = 1  # the extra word of a header: a value, then places
INT64 = np.dtype(np.int64)


class ImprovingShuffle(LinkShuffle):
    """One `Shuffle` with ``improves`` at work, on every iteration of a loop run.

    ``continued``: what became of the table by this shuffle's last rows and by nothing else.
    """

    continued: Table | None = None
    reach: Reaching | None = None
    made: Table | None = None  # this shuffle's last rows
    _reaches = False  # in this superstep
    _one: int | None = None  # what this rank says; None: nothing
    _tries = False
    _alike: Any = None  # a column that is known to have one value
    _first_alone = False  # were values computed for the first row only?
    kind: type[Reaching] = Reaching

    @property
    def table(self) -> str:
        """The name of what improves."""
        assert self.stage.onto is not None
        return self.stage.onto

    def _begin(self) -> Resident:
        known = self.resident
        resident = super()._begin()
        if resident is not known:
            self.reach = self.continued = None
        return resident

    def patch_of(self, writes: tuple[Write, ...]) -> Patch | None:
        """The write that patches the table, if no other writes it."""
        found = [w for w in writes if not isinstance(w, Sink) and w.table == self.table]
        return found[0] if len(found) == 1 and isinstance(found[0], Patch) else None

    def is_written(self, rows: Table, then: Table) -> None:
        """The table was patched by these rows. Are they those of the last superstep?"""
        name, made = self.shape.outputs[0].name, self.made
        if (
            made is not None
            and rows.rows_of is made.rows_of
            and rows.batch._columns.get(name) is made.batch[name]
        ):
            self.continued = then

    def make_ready(self, tables: Mapping[str, Table]) -> None:
        """Before the first iteration, with the rows that it begins with: whatever is done once."""
        self._tries = True
        try:
            self.prepare(tables, 0)
        finally:
            self._tries = False
            super().rollback()

    # ------------------------------------------------------------------ local work, before the exchange

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Whatever a rank can do before it hears of the others."""
        self._check_whole(tables)
        super().prepare(tables, iteration)

    def _check_whole(self, tables: Mapping[str, Table]) -> None:
        """A null is neither better nor worse than a value."""
        batch = tables[self.table].batch
        for name in named(self.stage):
            valid = batch.valid(name) if name in batch.names else None
            if valid is not None and not valid.all():
                raise AssumptionError(
                    f'"{name}" of "{self.table}" has nulls, and is to improve: wanted values, so fill them '
                    "where they come from"
                )

    def _evaluated(self, joined: Batch) -> dict[str, Array]:
        """Of rows that this shuffle made alike the first tells for all."""
        assert self.program is not None
        name = self.shape.outputs[0].name
        self._first_alone = len(joined) > 0 and self.program._read == [name] and joined[name] is self._alike
        if not self._first_alone:
            return super()._evaluated(joined)
        return self.program.values({name: self._alike[:1]}, 1)

    def _frontier(self, slots: Array | None, starts: int) -> tuple[Array | None, dict[str, Array]]:
        """As they are, where one value is said: who has no rows is not heard."""
        self._reaches = self._can_reach()
        if self._first_alone and not self._reaches:
            self._values = super()._evaluated(self._joined()[0])
        return (slots, self._values) if self._reaches else super()._frontier(slots, starts)

    def _can_reach(self) -> bool:
        """Is it one value that is said, and do the table's rows stand in the order of slots?"""
        assert self.program is not None
        (bound,), onto, state = self.program.outputs, self._tables[self.table], self._state()
        if not reads_state_alone(bound) or not isinstance(state, np.ndarray) or state.ndim != 1:
            return False
        (values,) = self._values.values()
        if not values.dtype == state.dtype == bound.word == INT64:
            return False
        if self._order_of(onto.batch[onto.layout.keys[0]]) is not None:
            return False
        return self._first_alone or len(values) == 0 or alike(values)

    def _state(self) -> Any:
        """What the table has, in the order of its rows."""
        batch, name = self._tables[self.table].batch, self.shape.outputs[0].name
        batch.schema.require(name)
        return batch[name]

    def _fold_touched(self, links: Links, frontier: Array | None, lanes: list[Lane]) -> None:
        if self._reaches:
            self._find(links, frontier, lanes[0])
        elif not self._tries:
            super()._fold_touched(links, frontier, lanes)

    def _find(self, links: Links, frontier: Array | None, lane: Lane) -> None:
        """Who is reached."""
        assert self.resident is not None
        values, onto = lane.states[0], self._tables[self.table]
        if self.reach is None:
            self.reach = self.kind(links._by_source(), self.resident.own_at, lane.combine)
        self._one = int(values[0]) if len(values) else None
        if self._tries:
            self._prepare_reach(self.reach, onto)
        elif self._one is not None:
            if self.reach.pushed > TURNS_AFTER * links.n_edges:
                self._turn(self.reach)
            slots = np.arange(links.n_sources) if frontier is None else frontier
            self.walked += self._follow(self._one, slots, kept=self.continued is onto)

    def _follow(self, value: int, slots: Array, kept: bool) -> int:
        """Tell this value; how many edges that takes."""
        assert self.reach is not None
        self.reach.begin(value, self._state(), kept)
        return self.reach.follow(slots, current())

    def _prepare_reach(self, reach: Reaching, onto: Table) -> None:
        """All but the first step; a rank that says nothing yet rules out what no value is better than."""
        self._turn(reach)
        none = identity_of("max" if reach.larger is False else "min", INT64)
        reach.begin(int(none) if self._one is None else self._one, self._state(), kept=False)
        reach.rehearse()
        self.continued = onto

    def _turn(self, reach: Reaching) -> None:
        """The rows the other way round: as much memory again, so not where memory is counted."""
        if self.fresh is not None and self.fresh.limit_words is None:
            reach.turn()

    # ------------------------------------------------------------------ the exchange

    def _outgoing(self) -> Outgoing:
        """Places that are reached at other ranks, behind the one value."""
        if not self._reaches:
            return super()._outgoing()
        assert self.reach is not None
        if self._one is None:
            return nothing(self.group.size)
        far, value = self.reach.far(), self._one
        begins, bounds = self._bounds(far)
        rows = np.diff(bounds)

        def fill(buffer: Array, at: Array) -> None:
            for d in np.flatnonzero(rows).tolist():
                lo, hi, first = int(bounds[d]), int(bounds[d + 1]), int(at[d])
                buffer[first] = value
                numbers = buffer[first + 1 : first + 1 + (hi - lo + 1) // 2].view(np.int32)
                np.subtract(far[lo:hi], begins[d], out=numbers[: hi - lo], casting="same_kind")

        return Outgoing((rows > 0) + (rows + 1) // 2, rows, fill, extra=ONE_VALUE)

    def _came_from(self, rank: int, segment: Array, n: int, j: int, word: Any) -> tuple[Array, Array]:
        """Slots and values from one rank, whichever form they have."""
        if n == 0 or self._arrival.headers[rank, EXTRA] != ONE_VALUE:
            return super()._came_from(rank, segment, n, j, word)
        slots, value = self._came_alike(rank, segment)
        return slots, np.full(n, value)

    def _came_alike(self, rank: int, segment: Array) -> tuple[Array, int]:
        """Slots that a rank tells one value."""
        assert self.resident is not None
        numbers = segment[1:].view(np.int32)[: int(self._arrival.headers[rank, ROWS])]
        return self.resident.asked[rank][numbers], int(segment[0])

    # ------------------------------------------------------------------ local work, after the exchange

    def _finish_touched(self, onto: Table) -> Table:
        """The rows that become better."""
        if not self._reaches:
            made = self._better(super()._finish_touched(onto), onto)
        else:
            made = self._reached_alike(onto) if self._said_alike() else self._reached_unlike(onto)
        self.continued, self.made = None, made  # until these rows, and nothing else, are written
        return made

    def _said_alike(self) -> bool:
        """Do all ranks that tell this one anything tell the same value? Then it is this one's, too."""
        said = set() if self._one is None else {self._one}
        if self.group.size > 1:
            segments, headers = self._arrival.segments(), self._arrival.headers
            for rank in np.flatnonzero(headers[:, ROWS]).tolist():
                if headers[rank, EXTRA] != ONE_VALUE:
                    return False
                said.add(int(segments[rank][0]))
        if len(said) == 1 and self._one is None:
            (self._one,) = said
            assert self.reach is not None
            onto = self._tables[self.table]
            self.reach.begin(self._one, self._state(), kept=self.continued is onto)
        return len(said) <= 1

    def _reached_alike(self, onto: Table) -> Table:
        """All rows become this one value."""
        assert self.reach is not None
        slots, state = np.empty(0, np.int64), self._state()
        if self._one is not None:
            if self.group.size > 1:
                segments = self._arrival.segments()
                for rank in np.flatnonzero(self._arrival.headers[:, ROWS]).tolist():
                    self.reach.hear(self._came_alike(rank, segments[rank])[0])
            slots = self.reach.own(state)
        value = 0 if self._one is None else self._one
        self._alike = np.full(len(slots), value)
        return self._at(onto, slots, {self.shape.outputs[0].name: self._alike})

    def _reached_unlike(self, onto: Table) -> Table:
        """Others say other values: the best that each key has heard."""
        assert self.reach is not None
        (output,) = self.shape.outputs
        rows = len(self._target.keys)
        seen, words = Touched(rows), np.empty(rows, np.int64)
        seen.begin()
        if self._one is not None:
            slots = self.reach.own(self._state())
            seen.merge(output.combine, words, slots, np.full(len(slots), self._one))
        for slots, values in self._came(0, INT64):
            seen.merge(output.combine, words, slots, values)
        slots = seen.slots()
        return self._better(self._at(onto, slots, {output.name: words[slots]}), onto)

    def _at(self, onto: Table, slots: Array, columns: dict[str, Array]) -> Table:
        """The same, and their keys' slots are known where they speak next."""
        made = super()._at(onto, slots, columns)
        if self._source is self._target and len(made) == len(slots):
            self._slots = made.batch[onto.layout.keys[0]], slots
        return made

    def _better(self, heard: Table, onto: Table) -> Table:
        """Of the rows that heard something those that became better; all have still to tell it."""
        assert heard.rows_of is not None
        (output,) = self.shape.outputs
        new, old = heard.batch[output.name], onto.batch[output.name].take(heard.rows_of.rows)
        rows = np.flatnonzero(new < old if output.combine == "min" else new > old)
        made_of = RowsOf(onto.batch.select(*onto.layout.keys), heard.rows_of.rows[rows])
        made = Table(heard.batch.take(rows), heard.layout, rows_of=made_of)
        key = onto.layout.keys[0]
        if self._slots[0] is heard.batch[key] and self._slots[1] is not None:
            self._slots = made.batch[key], self._slots[1][rows]
        return made

    # ------------------------------------------------------------------ transactions

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands, and what was found in it."""
        super().rollback()
        return {}

    def rollback(self) -> None:
        """The iteration never was."""
        super().rollback()
        self.made = None
        if self.reach is not None:
            self.reach.forget()
