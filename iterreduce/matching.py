"""Rows beside those of a table that is on the same rank: which stand beside which, kept while keys stay.

A lookup of rows that lie with their table communicates nothing, so what is kept here is this rank's own
business: the match, and the columns taken by it whose lineage is known. In an iteration that changes neither
keys, a lookup is one gather per column that did change.

How it can go wrong: only columns with a token may be kept, since what user code returns may be the same
object with other contents. Nobody speaks to it but `iterreduce.lookup`; nothing here communicates.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.answers import nulls, side_by_side
from iterreduce.columns.batch import Batch, Column
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.routing import index_dtype, take_into
from iterreduce.columns.schema import Field
from iterreduce.rowrounds import Shelf


@dataclass(frozen=True)
class Match:
    """Which rows come out, and which row of the table stands beside each.

    ``rows``: those that come out, in order (None: all of them, once). ``beside``: rows of the table (None:
    the table's columns are not asked for). ``absent``: the places, among what comes out, of rows without any,
    whose ``beside`` is 0; None where rows without any do not come out.
    """

    rows: Array | None
    beside: Array | None = None
    absent: Array | None = None

    @staticmethod
    def with_nulls(rows: Array | None, beside: Array) -> Match:
        """Rows of which some stand beside nothing: there ``beside`` is -1."""
        return Match(rows, np.maximum(beside, 0), np.flatnonzero(beside < 0))

    def narrow(self) -> Match:
        """The same in half the memory, where row numbers allow it."""
        return Match(*(None if part is None else _narrow(part) for part in vars(self).values()))


def _narrow(rows: Array) -> Array:
    return rows.astype(index_dtype(int(rows.max(initial=0)) + 1), copy=False)


def _is(of: weakref.ref[Any], column: Column) -> bool:
    return of() is column


class Matches:
    """The match of the last time, and what was taken by it."""

    def __init__(self, keeps: bool, shelf: Shelf):
        self.keeps, self.shelf = keeps, shelf
        self._match: Match | None = None
        self._of: list[weakref.ref[Any]] = []
        self._taken: dict[tuple[str, str], tuple[weakref.ref[Any], Column]] = {}

    def match(self, rows: Batch, table: Batch, settled: bool, make: Callable[[], Match]) -> Match:
        """That of these key columns; made anew unless they are the objects of the last time. ``settled``:
        their lineage is known.
        """
        columns = [*rows._columns.values(), *table._columns.values()]
        known = self._match
        if known is not None and len(columns) == len(self._of) and all(map(_is, self._of, columns)):
            return known
        self.forget()
        made = make()
        if self.keeps and settled:
            self._match, self._of = made.narrow(), [weakref.ref(column) for column in columns]
            return self._match
        return made

    def forget(self) -> None:
        """Let go of what is kept."""
        self._match, self._of, self._taken = None, [], {}

    def joined(
        self,
        match: Match,
        rows: Batch,
        values: Batch,
        row_tokens: Mapping[str, int],
        value_tokens: Mapping[str, int],
    ) -> Batch:
        """The rows that come out, with the values that stand beside them."""
        if match is not self._match:
            self.forget()  # what was taken was taken by another
        made = rows if match.rows is None else self._take("rows", rows, match.rows, row_tokens)
        if match.beside is None:
            return made
        return side_by_side(made, self._beside(match, values, value_tokens))

    def _beside(self, match: Match, values: Batch, tokens: Mapping[str, int]) -> Batch:
        assert match.beside is not None
        absent = match.absent
        if absent is None:
            return self._take("values", values, match.beside, tokens)
        count = len(match.beside)
        taken = self._take("values", values, match.beside, {}) if len(values) else nulls(values.schema, count)
        valid = {}
        for name, column in taken._columns.items():
            mask = taken.valid(name)
            valid[name] = np.ones(count, bool) if mask is None else mask
            valid[name][absent] = False
            if not isinstance(column, Ragged):
                column[absent] = np.zeros(1, column.dtype)[0]
        return Batch._trusted(taken._columns, valid, count)

    def _take(self, side: str, batch: Batch, at: Array, tokens: Mapping[str, int]) -> Batch:
        """These rows; columns that were taken by the same match are the objects of the last time."""
        columns: dict[str, Column] = {}
        for name, column in batch._columns.items():
            known = self._taken.get((side, name))
            if known is None or known[0]() is not column:
                known = weakref.ref(column), self._taken_from(column, at)
                if self._match is not None and tokens.get(name):
                    self._taken[side, name] = known
            columns[name] = known[1]
        valid = {name: mask[at] for name, mask in batch._valid.items()}
        return Batch._trusted(columns, valid, len(at), batch._schema)

    def _taken_from(self, column: Column, at: Array) -> Column:
        if isinstance(column, Ragged):
            return column.take(at)
        return take_into(column, at, self.shelf.new(len(at), Field("fixed", column.dtype, column.shape[1:])))
