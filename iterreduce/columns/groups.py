"""Rows by key: the combiner table, key numbers, and groups of rows for reducers written as functions.

The doors to what this package does with keys; loops and tables stand in `combiner`, `numbering`, `ordering`
and `keytable`. A `Groups` holds whole rows, sorted by key, for reducers that want to see them; sums and the
like are better folded (`Fold`), which keeps no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iterreduce.columns.aggregators import MAX, MEAN, MIN, SUM, Aggregator
from iterreduce.columns.batch import Batch
from iterreduce.columns.combiner import Fold
from iterreduce.columns.numbering import KeyIndex, Numbered, code_dtype, number_keys
from iterreduce.columns.ordering import bucket_order, group_order, hash_order
from iterreduce.columns.ragged import Array
from iterreduce.columns.stores import Folded

__all__ = [
    "Fold",
    "Folded",
    "Groups",
    "KeyIndex",
    "Numbered",
    "bucket_order",
    "group_order",
    "group_rows",
    "hash_order",
    "number_keys",
]


@dataclass(frozen=True)
class Groups:
    """Rows sorted by key: group ``g`` has key ``keys[g]`` and the rows ``offsets[g]`` to ``offsets[g + 1]``.

    Keys stand in canonical order, rows of a group in the order in which they came.

    >>> groups = group_rows(Batch(k=np.array([7, 8, 7]), x=np.array([1.0, 2.0, 3.0])), "k")
    >>> dict(zip(groups.keys["k"].tolist(), groups.sum("x").tolist()))[7]
    4.0
    """

    keys: Batch  # m rows
    offsets: Array  # int64 (m + 1,)
    rows: Batch  # n rows

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sizes(self) -> Array:
        """Rows per group, int64 ``(m,)``; never 0."""
        return np.diff(self.offsets)

    @cached_property
    def codes(self) -> Array:
        """The group of each row, ``(n,)``, ascending."""
        return np.repeat(np.arange(len(self), dtype=code_dtype(len(self))), self.sizes)

    def group(self, g: int) -> Batch:
        """The rows of one group."""
        return self.rows.slice(int(self.offsets[g]), int(self.offsets[g + 1]))

    def reduce(self, aggregator: Aggregator, column: str) -> tuple[Any, Array | None]:
        """One value per group, ``(m, ...)``, and which are not null (None: all), as the aggregator defines
        them.
        """
        bound = aggregator.bind(self.rows.schema[column])
        values, valid = self.rows[column], self.rows.valid(column)
        if bound.words is None:
            return bound.collect(values, np.arange(len(self.rows)), self.offsets, valid)
        records = np.empty((len(self), bound.words), np.int64)
        bound.fill(records, 0)
        bound.update(records, 0, self.codes, values, valid)
        return bound.finish(records, 0)

    def sum(self, column: str) -> Any:
        """Sums per group, ``(m, ...)``: int64, uint64 or float64; nulls count as 0."""
        return self.reduce(SUM, column)[0]

    def min(self, column: str) -> Any:
        """The smallest value per group, in the dtype of the column."""
        return self.reduce(MIN, column)[0]

    def max(self, column: str) -> Any:
        """The largest value per group, in the dtype of the column."""
        return self.reduce(MAX, column)[0]

    def mean(self, column: str) -> Any:
        """Arithmetic means per group, float64."""
        return self.reduce(MEAN, column)[0]

    def count(self, column: str | None = None) -> Array:
        """Rows per group, int64 ``(m,)``; of a column: those that are not null."""
        valid = None if column is None else self.rows.valid(column)
        return self.sizes if valid is None else np.add.reduceat(valid, self.offsets[:-1], dtype=np.int64)


def group_rows(rows: Batch, key: str | Sequence[str]) -> Groups:
    """Sort rows by key columns (one name or several), stably, in canonical order; `SchemaError` for unknown
    names.
    """
    numbered = number_keys(rows.select(*([key] if isinstance(key, str) else key)))
    if len(numbered.codes) and (numbered.codes[1:] < numbered.codes[:-1]).any():
        order, offsets = group_order(numbered.codes, len(numbered))
        return Groups(numbered.keys, offsets, rows.take(order))
    offsets = np.append(numbered.first, len(rows))  # sorted already: the same columns
    return Groups(numbered.keys, offsets, rows)
