"""Shuffle by splitters: whole rows, sorted by the values of their key over all ranks, rank 0 smallest.

    sample    every rank draws some of its rows, one out of each equal stretch; keys go to all ranks
    cut       all sort the same sample and cut it at equal shares: a cut is (key, rank, row)
    send      rows go to their range as in `RowShuffle`: in rounds, by a plan where keys keep their lineage
    sort      each rank sorts what came, stably

Numbers alone, of which equal ones cannot be told apart, are sorted before they are sent as well: the rows for
a rank are then a slice.

Sampled splitters are those of Frazer and McKellar, "Samplesort: a sampling approach to minimal storage tree
sorting", JACM 1970. Since a cut names a row and not only a key, rows of one key may lie on several ranks, and
a key that most rows have unbalances nothing; they keep their canonical order. So the rows of all ranks, one
behind the other, do not depend on the sample, nor on the number of ranks: these only say where it is cut.

How it can go wrong: as in `RowShuffle`; too small a sample makes shares uneven, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from iterreduce.agreement import Guard
from iterreduce.columns import random
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.ranges import PARTS, PartOf
from iterreduce.columns.schema import Schema
from iterreduce.columns.sortkeys import key_parts, range_dtype, ranges_of, sorted_order
from iterreduce.exchange import FAILED, OK
from iterreduce.folding import RowSource
from iterreduce.group import Group
from iterreduce.loop import Gather, Shuffle
from iterreduce.rowshuffle import GatherRows, RowShuffle
from iterreduce.table import Table, by_range

ROWS_OF_RANGE = 8  # of those that cut what does not fit
FEW_RUNS = 2  # sorted stretches up to which merging them is faster than sorting anew
RANK, ROW, WEIGHT = "\0rank", "\0row", "\0weight"


class Samples(GatherRows):
    """The sample of all ranks on all ranks: a `Gather` of rows that are drawn, not read."""

    def __init__(self, *args: Any, draw: Callable[[Batch], Batch], **more: Any):
        super().__init__(*args, **more)
        self.draw = draw

    def take(self, rows: Batch | None, discover: Callable[[], Schema]) -> None:
        """Draw from these rows; ``discover`` tells their columns where no rank has any."""
        self.rows = None if rows is None or not len(rows) else self.draw(rows)
        self._columns = discover

    def _discover(self) -> Schema:
        return self.draw(Batch.empty(self._columns())).schema


class RangeShuffle(RowShuffle):
    """One `Shuffle` stage with a route of `Splitters` at work, on every iteration of a loop run."""

    def __init__(
        self,
        stage: Shuffle,
        number: int,
        group: Group,
        source: RowSource,
        *args: Any,
    ):
        super().__init__(stage, number, group, source, *args)
        assert stage.route is not None
        self.layout, self.most = by_range(*stage.key), stage.route.sample
        self.descending = stage.route.descending
        gather = Gather(stage.rows, stage.into)
        draw = partial(drawn, key=stage.key, most=self.most, seed=number, rank=group.rank)
        self.samples = Samples(gather, number, group, source, self.check, draw=draw)
        self.cuts: Batch | None = None
        self._in_order = self._ascending = False
        self._first = np.zeros(0, np.int64)
        self._rows_of_ranks = np.zeros(group.size, np.int64)

    # ------------------------------------------------------------------ splitters

    def _agree_route(self, guard: Guard) -> int:
        """Sample and cut. Collective."""
        guard.run(self._sort_numbers)
        guard.run(self.samples.take, self.rows, self._discover)
        status = self.samples.exchange(guard)
        if status & FAILED:
            return status
        guard.run(self._cut)
        return OK  # a failure of this rank alone is told with the next exchange

    def _sort_numbers(self) -> None:
        """Numbers alone are sorted before they are sent: then a range of them is a slice."""
        self._ascending = self.rows is not None and sorts_by_itself(self.rows, self.stage.key)
        if self._ascending:
            assert self.rows is not None
            column = self.rows[self.stage.key[0]]
            numbers = self.scratch.array("sorted", len(column), column.dtype)
            numbers[...] = column
            sort_numbers(numbers, any(self.descending))
            self.rows = Batch(**{self.stage.key[0]: numbers})

    def _cut(self) -> None:
        """The rows at which the ranges of ranks 1, 2, ... begin."""
        drawn = self.samples.received
        assert drawn is not None
        order = sorted_order(drawn.select(*self.stage.key), self.descending)
        drawn = drawn if order is None else drawn.take(order)
        before = np.cumsum(drawn[WEIGHT]) - (drawn[WEIGHT] + 1) // 2
        total, size = int(drawn[WEIGHT].sum()), self.group.size
        at = np.searchsorted(before, [total * r // size for r in range(1, size)])
        chosen = drawn.take(at[at < len(drawn)])
        rank, me = chosen[RANK], self.group.rank
        rows = 0 if self.rows is None else len(self.rows)
        self._first = np.where(rank > me, rows, np.where(rank < me, 0, chosen[ROW]))
        self.cuts = chosen.select(*self.stage.key)
        self.samples._forget()

    def _destinations(self, keys: Batch) -> tuple[Array, Array]:
        assert self.cuts is not None
        dest = self.scratch.array("owners", len(keys), range_dtype(len(self.cuts)))
        _, counts = ranges_of(keys, self.cuts, self._first, dest, self.descending)
        return dest, np.append(counts, np.zeros(self.group.size - len(counts), np.int64))

    def _send_order(self, keys: Batch) -> tuple[Array | None, Array]:
        assert self.cuts is not None
        name = self.stage.key[0] if self._ascending else ""
        if not self._ascending or keys.valid(name) is not None or self.cuts.valid(name) is not None:
            return super()._send_order(keys)
        begins = slices_of(keys[name], self.cuts[name], self._first, any(self.descending))
        ends = np.concatenate([[0], begins, np.full(self.group.size - len(begins), len(keys))])
        return None, np.diff(ends)

    # ------------------------------------------------------------------ exchange

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective."""
        status = super().exchange(guard)
        if status & FAILED or self.planned:
            return status
        rows = np.zeros(self.group.size, np.int64)
        if self.received is not None:
            rows[self.group.rank] = len(self.received)
        self.group.allreduce(rows, "sum")
        self._rows_of_ranks = rows
        return status

    def finish(self) -> Table:
        """The rows of this rank's range, sorted by key, and their global numbers."""
        rows = self._rows_of_ranks
        return replace(
            super().finish(),
            block_starts=np.array([0, int(rows[self.group.rank])]),
            first_row=int(rows[: self.group.rank].sum()),
            rows_total=int(rows.sum()),
        )

    def _finish_fresh(self) -> Batch:
        assert self.received is not None
        if sorts_by_itself(self.received, self.stage.key):
            name, numbers = self.stage.key[0], self.received[self.stage.key[0]]
            if self.group.size == 1:
                numbers = numbers.copy()  # what came from others is this rank's own
            runs = 1 < self.group.size <= FEW_RUNS and not self.too_large  # merging them takes memory
            sort_numbers(numbers, any(self.descending), runs)
            self.received = Batch(**{name: numbers})
            self._in_order = True
        return super()._finish_fresh()

    def _ranges(self, rows: Batch) -> tuple[PartOf, int] | None:
        """Narrower ranges than those of ranks, cut by rows that stand at equal distances."""
        if self._in_order or len(rows) < PARTS:
            return None
        some = rows.select(*self.stage.key).take(np.arange(PARTS) * len(rows) // PARTS)
        order = sorted_order(some, self.descending)
        cuts = (some if order is None else some.take(order)).take(
            np.arange(ROWS_OF_RANGE, PARTS, ROWS_OF_RANGE)
        )
        first = np.zeros(len(cuts), np.int64)

        def part_of(rows: Batch) -> Array:
            return ranges_of(rows.select(*self.stage.key), cuts, first, None, self.descending)[0]

        return part_of, len(cuts) + 1

    def _final_order(self, keys: Batch) -> Array | None:
        return None if self._in_order else sorted_order(keys, self.descending)

    def _plan_order(self, keys: Batch) -> tuple[Array, Array]:
        if self.group.size == 1:
            return np.arange(len(keys)), np.array([len(keys)])
        return np.arange(len(keys)) if self._order is None else self._order, self._counts

    def _arrival_order(self, keys: Batch) -> Array:
        return np.arange(len(keys))

    def _forget(self) -> None:
        super()._forget()
        self.cuts, self._in_order, self._ascending = None, False, False
        self.samples._forget()


def drawn(rows: Batch, key: tuple[str, ...], most: int, seed: int, rank: int) -> Batch:
    """At most so many rows, each from an equal stretch of the share, and how many it stands for."""
    n, some = len(rows), min(len(rows), most)
    ends = np.arange(some + 1) * n // max(some, 1)
    weight = np.diff(ends)
    luck = random.uniform(seed, "splitters", 0, np.arange(some) + rank * most)
    at = ends[:-1] + (luck * weight).astype(np.int64)
    keys = rows.select(*key)
    key_parts(keys.slice(0, 0))  # refuses columns without an order
    return keys.take(at).with_columns(**{RANK: np.full(some, rank), ROW: at, WEIGHT: weight})


def sorts_by_itself(rows: Batch, key: tuple[str, ...]) -> bool:
    """Are the rows nothing but one column of whole numbers, so that equal rows cannot be told apart?"""
    if rows.names != key or len(key) > 1 or rows.valid(key[0]) is not None:
        return False
    column = rows[key[0]]
    return isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype.kind in "biu"


def slices_of(numbers: Array, cuts: Array, first: Array, descending: bool) -> Array:
    """Where the ranges behind each cut begin among sorted numbers; of those that equal a cut, at ``first``.

    >>> slices_of(np.array([1, 5, 5, 9]), np.array([5, 7]), np.array([2, 0]), False).tolist()
    [2, 3]
    """
    up = numbers[::-1] if descending else numbers
    lo, hi = np.searchsorted(up, cuts, "left"), np.searchsorted(up, cuts, "right")
    return np.clip(first, len(up) - hi, len(up) - lo) if descending else np.clip(first, lo, hi)


def sort_numbers(numbers: Array, descending: bool, runs: bool = False) -> None:
    """Sort whole numbers or bools in place; ``runs``: they are a few sorted stretches."""
    if descending:
        np.invert(numbers, out=numbers)  # turns their order over
    numbers.sort(kind="stable" if runs else None)
    if descending:
        np.invert(numbers, out=numbers)
