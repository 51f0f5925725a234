"""Shuffle of indexed rows that settles: within a rank values improve until none does, then ranks exchange.

A superstep of a minimum or maximum over rows is a step towards a fixpoint that does not depend on the order
of improvements, so a rank need not wait for others before it tells its own rows what has become better. One
superstep then does the work of many, and the values that tell first are the best (`columns/settling.py`).

Where all that a rank has to say is one value, which rows have nothing to add to, those that tell next say one
value again: level by level (`columns/spreading.py`), which is less work still. On several ranks a level told
before the others are heard would mostly be told again, so a superstep is one level there, as where rows
improve without settling; which way a rank goes is its own business.

How it can go wrong: as in `LinkShuffle`. Nothing is kept from one superstep to the next but memory: values
are read from the table, and what was not told for want of time is among the rows that come out, so a
superstep that is rolled back leaves no trace. A fold whose values improve for ever (a cycle of negative
length) comes back after a bounded amount of work, and ends where its loop does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import Column
from iterreduce.columns.link_kernels import EDGE_FUNCTIONS
from iterreduce.columns.ragged import Array
from iterreduce.columns.reaching import Reaching, alike
from iterreduce.columns.settling import Settling
from iterreduce.columns.spreading import Spreading
from iterreduce.columns.threads import current
from iterreduce.errors import SchemaError, UsageError
from iterreduce.indexing import Resident
from iterreduce.linkimprove import INT64, ImprovingShuffle
from iterreduce.linkprogram import Bound, identity_of, improving
from iterreduce.linkshuffle import LinkShuffle
from iterreduce.table import Table

ROUNDS = 64  # a superstep follows each edge at most so often, on average: a bound for what never settles
LEAST_EDGES = 1 << 20
LEVELS = 16  # of one value each, whose values are found at first; then twice as many, and so on
# of a rank's edges, in a superstep, where values change on their way: what is told before others have been
# heard is told again in vain (on R-MAT graphs and 2 ranks a quarter does a fifth less than all)
SHARE, LEAST_SHARE = 4, 1 << 14


class SettlingShuffle(ImprovingShuffle):
    """One `Shuffle` with ``settle`` at work, on every iteration of a loop run.

    ``by_round``: values go along one edge in a superstep and no further, so that the number of supersteps,
    too, is the same on any number of ranks: what a reproducible run asks for.
    """

    work: Settling | None = None
    bound: Bound | None = None
    by_round = False
    kind = Spreading
    _key_memory: Array | None = None
    _by_level = _spreads = False  # in this superstep: one level of one value; all of them

    def _begin(self) -> Resident:
        known = self.resident
        resident = super()._begin()
        if resident is not known:
            self.work = self.bound = None
            if resident.first is not resident.second or not self.push:
                (first, of), (second, other) = resident.stage.keys.items()
                raise UsageError(
                    f'shuffle of "{self.stage.rows}" by {self.stage.key[0]}, with settle: {first} names keys '
                    f'of "{of}" and {second} of "{other}"; wanted one table for both, and rows by {second}'
                )
        return resident

    def make_ready(self, tables: Mapping[str, Table]) -> None:
        """What is done once where levels are told; settling has nothing of the kind."""
        if self.by_round or self._is_alike(tables):
            super().make_ready(tables)

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Settle."""
        by_level = self.by_round or self._is_alike(tables)
        self._spreads = by_level and not self.by_round and self.group.size == 1
        self._by_level = by_level and not self._spreads
        if by_level:
            super().prepare(tables, iteration)
            return
        self._check_whole(tables)
        self._reaches = False
        assert self.stage.onto is not None
        resident, onto = self._begin(), tables[self.stage.onto]  # looked at by `_is_alike`
        joined, slots = self._joined()
        work, name = self._settling(resident), self.shape.outputs[0].name
        self._values = {name: joined[name]}
        frontier, values = LinkShuffle._frontier(self, slots, work.links.n_sources)
        work.begin(self._by_slot(onto, name))
        sources = np.arange(work.links.n_sources) if frontier is None else frontier
        work.put(sources.astype(np.int64, copy=False), values[name][: len(sources)])
        self.walked += work.tell(self._most_edges())
        self._reached, self._scratch = work.improved(0, resident.own_at), [work.values]

    def _begin_with(self, tables: Mapping[str, Table]) -> tuple[Resident, Table]:
        """The rows and the table that improves, which fit each other and the table that is joined."""
        resident = self._begin()
        self._tables = tables
        assert self.stage.onto is not None
        onto = tables[self.stage.onto]
        self._check_layout(self.stage.onto, onto)
        self.shape.check_key(*onto.layout.keys)
        name = self.shape.outputs[0].name
        onto.batch.schema.require(name)
        joined, word = self._joined()[0].schema, onto.batch.schema[name].dtype
        joined.require(name)
        if joined[name].dtype != word:
            raise SchemaError(
                f'"{name}" is {joined[name].describe()} in the joined table, {word} in "{self.stage.onto}", '
                "where it improves: wanted one type"
            )
        if self.bound is None or self.bound.word != word:
            self.bound, self.work = improving(self.stage, resident.pushed().columns, word), None
        return resident, onto

    def _is_alike(self, tables: Mapping[str, Table]) -> bool:
        """Is one value told, by rows that add nothing to it? On several ranks also: is it another one that
        those who hear it tell? (Else nothing is told in vain.)
        """
        _, onto = self._begin_with(tables)
        assert self.bound is not None
        output, name = self.bound.output, self.bound.output.name
        if self.bound.word != INT64 or output.columns or onto.batch.schema[name].shape:
            return False
        if self.group.size > 1 and isinstance(output.rest, Column):
            return False
        told = self._joined()[0][name]
        if self._order_of(onto.batch[onto.layout.keys[0]]) is not None:
            return False
        return told is self._alike or len(told) == 0 or alike(told)

    def _prepare_reach(self, reach: Reaching, onto: Table) -> None:
        super()._prepare_reach(reach, onto)
        if self._spreads:
            self._series(1)
            keys = self._target.keys
            column = keys[keys.names[0]]
            if isinstance(column, np.ndarray) and column.ndim == 1:
                self._key_memory = np.empty_like(column)
                self._key_memory.fill(0)

    def _series(self, most: int) -> Array:
        """What one level after another is told, up to so many."""
        assert isinstance(self.reach, Spreading) and self.bound is not None
        told, step = self._joined()[0][self.bound.output.name], self.bound.function
        step = EDGE_FUNCTIONS[step] if isinstance(step, str) else step
        return self.reach.values(step, int(told[0]) if len(told) else 0, most)

    def _follow(self, value: int, slots: Array, kept: bool) -> int:
        """On one rank, those who hear it tell the next value, until nobody hears any."""
        if not self._spreads:
            return super()._follow(value, slots, kept)
        assert isinstance(self.reach, Spreading)
        reach, state, most = self.reach, self._state(), LEVELS
        values = self._series(most)
        edges = reach.spread(slots, values, state, current(), kept)
        while len(reach.untold) and len(values) == most:
            values = self._series(2 * most)
            edges += reach.go_on(values[most:], state, current())
            most *= 2
        return edges

    def _most_edges(self) -> int:
        """How many edges a superstep follows before this rank hears of the others."""
        assert self.work is not None and self.bound is not None
        edges = self.work.links.n_edges
        if self.group.size == 1 or isinstance(self.bound.output.rest, Column):
            return max(LEAST_EDGES, ROUNDS * edges)
        return max(LEAST_SHARE, edges // SHARE)

    def _settling(self, resident: Resident) -> Settling:
        """The memory for it."""
        assert self.bound is not None
        if self.work is None:
            output, (links, own_at) = self.bound.output, (resident.pushed(), resident.own_at)
            of = self.bound.function, output.columns
            self.work = Settling(links, own_at, output.combine, self.bound.word, *of)
        return self.work

    def _by_slot(self, onto: Table, name: str) -> Array:
        """The table's values in the order of slots; the best there is where it has no row: none is wanted."""
        assert self.bound is not None
        values: Any = onto.batch[name]
        order = self._order_of(onto.batch[onto.layout.keys[0]])
        if order is None:
            found: Array = values
            return found
        worst = "max" if self.bound.output.combine == "min" else "min"
        out = np.full(len(self._target.keys), identity_of(worst, self.bound.word), values.dtype)
        out[order[order >= 0]] = values[order >= 0]
        return out

    def _finish_touched(self, onto: Table) -> Table:
        """The rows that became better, here or because of what came, and those that were not done."""
        if self._spreads and self._reaches:
            made = self._spread(onto)
        elif self._spreads or self._by_level:
            made = super()._finish_touched(onto)
            untold = {self.stage.settle: np.zeros(len(made), bool)}  # all have still to tell it
            made = replace(made, batch=made.batch.with_columns(**untold))
        else:  # no bits tell of these rows
            self.continued = self.made = None
            return self._settled(onto)
        self.continued, self.made = None, made
        return made

    def _keys_at(self, slots: Array) -> Batch:
        """At first in memory whose pages are there already."""
        keys, memory = self._target.keys, self._key_memory
        if memory is None:
            return super()._keys_at(slots)
        (name,), self._key_memory = keys.names, None
        taken = keys[name].take(slots, out=memory[: len(slots)], mode="clip")
        return Batch._trusted({name: taken}, {}, len(slots))

    def _spread(self, onto: Table) -> Table:
        """The rows of all levels."""
        assert isinstance(self.reach, Spreading)
        slots = values = np.empty(0, np.int64)
        if self._one is not None:
            slots, values = self.reach.improved()
        told = np.ones(len(slots), bool)
        told[np.searchsorted(slots, self.reach.untold)] = False
        return self._at(onto, slots, {self.shape.outputs[0].name: values, self.stage.settle: told})

    def _settled(self, onto: Table) -> Table:
        assert self.work is not None and self.bound is not None
        work, own_at = self.work, int(self.work.own_at)
        if self.group.size > 1:
            for slots, values in self._came(0, self.bound.word):
                work.take(slots, values)
        places = work.improved(own_at, work.links.n_targets)
        columns = {self.bound.output.name: work.values[places], self.stage.settle: work.told(places)}
        return self._at(onto, places - own_at, columns)
