"""Aggregates that need all rows of a key together: lists of values, the least or the first of texts.

Such a stage begins like any other. A rank that finds, from the columns of its rows, that they cannot be
folded into records says so in the header of its exchange; all ranks see it in the same collective, send whole
rows instead, then and from then on, and fold them where they stand together.

What it is not: a second shuffle or gather. It chooses between those that there are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from iterreduce.agreement import Guard
from iterreduce.columns.aggregators import Aggregator, bind_outputs
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import group_rows
from iterreduce.exchange import FAILED, OK, ROWS_WANTED
from iterreduce.folding import NeedsRows, RowSource
from iterreduce.loop import Reduce
from iterreduce.rowshuffle import GatherRows, RowShuffle
from iterreduce.shuffle import CombineShuffle
from iterreduce.table import Table, everywhere
from iterreduce.total import TotalRows, key_order


class WithFallback:
    """A folding stage, and the stage that moves whole rows in its place once ranks agreed that it must."""

    def __init__(
        self,
        folding: CombineShuffle | TotalRows,
        whole: RowShuffle | GatherRows,
        reduce: Reduce,
        key: tuple[str, ...],
    ):
        self.folding, self.whole, self.reduce, self.key = folding, whole, reduce, key
        self.by_rows = any(map(needs_rows, _aggregators(reduce)))

    @property
    def active(self) -> CombineShuffle | TotalRows | RowShuffle | GatherRows:
        """The stage that runs now: the same on all ranks."""
        return self.whole if self.by_rows else self.folding

    @property
    def source(self) -> RowSource:
        """Where the rows come from."""
        return self.folding.source

    @property
    def keys_changed(self) -> bool:
        """Did the result's keys change in this iteration, on this rank?"""
        return self.active.keys_changed

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """This rank's own work before the exchange."""
        self._tables, self._iteration = tables, iteration
        try:
            self.active.prepare(tables, iteration)
        except NeedsRows:
            assert not isinstance(self.active, RowShuffle | GatherRows)
            self.active.extra_status = ROWS_WANTED

    def exchange(self, guard: Guard) -> int:
        """Send and receive, twice if a rank finds that whole rows must travel. Collective."""
        alone = self.folding.group.size == 1 and not self.by_rows
        status = self.folding.extra_status if alone else OK
        if status == OK:
            status = self.active.exchange(guard)
        if not self.by_rows and status & FAILED and self._only_needs_rows(guard):
            status = ROWS_WANTED
        if self.by_rows or status & FAILED or not status & ROWS_WANTED:
            return status
        self.by_rows = True
        guard.run(self.whole.prepare, self._tables, self._iteration)
        return self.whole.exchange(guard)

    def _only_needs_rows(self, guard: Guard) -> bool:
        """Did all ranks that failed fail for columns that cannot be folded? Collective.

        Where no rank has rows, the columns are known after the exchange only.
        """
        mine = guard.failure
        here = mine is not None and isinstance(mine.original, NeedsRows)
        words = np.array([here, mine is not None and not here], np.int64)
        self.folding.group.allreduce(words, "max")
        if not words[0] or words[1]:
            return False
        guard.failure = None
        return True

    def finish(self) -> Table:
        """The finished rows."""
        made = self.active.finish()
        if not self.by_rows:
            return made
        rows = folded(made.batch, self.key, self.reduce)
        if isinstance(self.whole, GatherRows):
            return everywhere(rows.take(key_order(rows.select(*self.key))) if self.key else rows)
        return Table(rows, made.layout)

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands. Collective."""
        return self.active.commit(keys_changed)

    def rollback(self) -> None:
        """The iteration never was."""
        self.folding.rollback()
        self.whole.rollback()


def folded(rows: Batch, key: tuple[str, ...], reduce: Reduce) -> Batch:
    """One finished row per key, in hash order; without keys one row, or none of no rows.

    >>> from iterreduce.columns.aggregators import collect
    >>> made = folded(Batch(k=np.array([1, 1]), x=np.array([5, 6])), ("k",), {"all": collect("x")})
    >>> made["all"][0].tolist()
    [5, 6]
    """
    if key:
        groups = group_rows(rows, key)
        keys, offsets, rows = groups.keys, groups.offsets, groups.rows
    else:
        keys, offsets = Batch(), np.array([0, len(rows)] if len(rows) else [0])
    order = np.arange(len(rows))
    columns, valid = dict(keys._columns), dict(keys._valid)
    for output in bind_outputs(reduce, key, rows.schema):
        values, present = output.read(rows)
        columns[output.name], mask = output.bound.collect(values, order, offsets, present)
        if mask is not None:
            valid[output.name] = mask
    return Batch.from_dict(columns, valid)


def may_need_rows(reduce: Reduce) -> bool:
    """Is there an aggregator that some columns cannot be folded with?"""
    picks = {"collect", "first", "last", "min", "max", "argmin", "argmax"}
    return any(a.kind in picks or needs_rows(a) for a in _aggregators(reduce))


def needs_rows(aggregator: Aggregator) -> bool:
    """Must all rows of a key stand together, whatever the columns? For lists, and for what a user adds up in
    floats where the order of rows must not matter: it is then folded in canonical order.
    """
    defined = aggregator.definition
    ordered = defined is not None and defined.dtype == "float64" and aggregator.adds != "in order"
    return aggregator.kind == "collect" or ordered


def _aggregators(reduce: Reduce) -> list[Aggregator]:
    return [reduce] if isinstance(reduce, Aggregator) else list(reduce.values())
