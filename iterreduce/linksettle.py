"""Shuffle of indexed rows that settles: within a rank values improve until none does, then ranks exchange.

A superstep of a minimum or maximum over rows is a step towards a fixpoint that does not depend on the order
of improvements, so a rank need not wait for others before it tells its own rows what has become better. One
superstep then does the work of many, and the values that tell first are the best (`columns/settling.py`).

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

from iterreduce.columns.expressions import Column
from iterreduce.columns.ragged import Array
from iterreduce.columns.settling import Settling
from iterreduce.errors import SchemaError, UsageError
from iterreduce.indexing import Resident
from iterreduce.linkimprove import ImprovingShuffle
from iterreduce.linkprogram import Bound, identity_of, improving
from iterreduce.linkshuffle import LinkShuffle
from iterreduce.table import Table

ROUNDS = 64  # a superstep follows each edge at most so often, on average: a bound for what never settles
LEAST_EDGES = 1 << 20
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

    def _begin(self) -> Resident:
        known = self.resident
        resident = super()._begin()
        if resident is not known:
            self.work = None
            if resident.first is not resident.second or not self.push:
                (first, of), (second, other) = resident.stage.keys.items()
                raise UsageError(
                    f'shuffle of "{self.stage.rows}" by {self.stage.key[0]}, with settle: {first} names keys '
                    f'of "{of}" and {second} of "{other}"; wanted one table for both, and rows by {second}'
                )
        return resident

    def make_ready(self, tables: Mapping[str, Table]) -> None:
        """There is nothing to be done once."""
        if self.by_round:
            super().make_ready(tables)

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Settle."""
        if self.by_round:
            super().prepare(tables, iteration)
            return
        self._check_whole(tables)
        resident = self._begin()
        self._tables = tables
        assert self.stage.onto is not None
        onto = tables[self.stage.onto]
        self._check_layout(self.stage.onto, onto)
        self.shape.check_key(*onto.layout.keys)
        joined, slots = self._joined()
        work, name = self._settling(resident, onto)
        joined.schema.require(name)
        if joined.schema[name].dtype != work.values.dtype:
            raise SchemaError(
                f'"{name}" is {joined.schema[name].describe()} in the joined table, {work.values.dtype} in '
                f'"{self.stage.onto}", where it improves: wanted one type'
            )
        self._values = {name: joined[name]}
        frontier, values = LinkShuffle._frontier(self, slots, work.links.n_sources)
        work.begin(self._by_slot(onto, name))
        sources = np.arange(work.links.n_sources) if frontier is None else frontier
        work.put(sources.astype(np.int64, copy=False), values[name][: len(sources)])
        self.walked += work.tell(self._most_edges())
        self._reached, self._scratch = work.improved(0, resident.own_at), [work.values]

    def _most_edges(self) -> int:
        """How many edges a superstep follows before this rank hears of the others."""
        assert self.work is not None and self.bound is not None
        edges = self.work.links.n_edges
        if self.group.size == 1 or isinstance(self.bound.output.rest, Column):
            return max(LEAST_EDGES, ROUNDS * edges)
        return max(LEAST_SHARE, edges // SHARE)

    def _settling(self, resident: Resident, onto: Table) -> tuple[Settling, str]:
        """The memory for it, and the column of the table that improves."""
        (name,) = (output.name for output in self.shape.outputs)
        onto.batch.schema.require(name)
        word = onto.batch.schema[name].dtype
        if self.work is None or self.bound is None or self.bound.word != word:
            links = resident.pushed()
            self.bound = improving(self.stage, links.columns, word)
            output, function = self.bound.output, self.bound.function
            self.work = Settling(links, resident.own_at, output.combine, word, function, output.columns)
        return self.work, name

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
        if self.by_round:
            made = super()._finish_touched(onto)
            untold = {self.stage.settle: np.zeros(len(made), bool)}  # all have still to tell it
            return replace(made, batch=made.batch.with_columns(**untold))
        assert self.work is not None and self.bound is not None
        work, own_at = self.work, int(self.work.own_at)
        if self.group.size > 1:
            for slots, values in self._came(0, self.bound.word):
                work.take(slots, values)
        places = work.improved(own_at, work.links.n_targets)
        columns = {self.bound.output.name: work.values[places], self.stage.settle: work.told(places)}
        return self._at(onto, places - own_at, columns)
