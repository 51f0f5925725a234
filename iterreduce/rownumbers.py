"""Rows whose numbers among those of all ranks become known: every rank tells how many it has.

The rows stay where they are. Who speaks to it: the superstep. How it can go wrong: not at all by itself; a
rank that fails before says so in the exchange that brings the counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.rowshuffle import GatherRows
from iterreduce.table import Table

ROWS = "rows"


class NumberRows(GatherRows):
    """One `Number` stage at work: a `Gather` of each rank's number of rows."""

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Count this rank's rows."""
        self._tables, self._iteration = tables, iteration
        self.rows = Batch(**{ROWS: np.array([len(tables[self.stage.rows])])})

    def finish(self) -> Table:
        """The rows as they are; those of the ranks before this one are counted."""
        assert self.received is not None
        table = self._tables[self.stage.rows]
        if table.everywhere:
            return table
        counts = self.received[ROWS]
        first = int(counts[: self.group.rank].sum())
        return replace(table, first_row=first, rows_total=int(counts.sum()))
