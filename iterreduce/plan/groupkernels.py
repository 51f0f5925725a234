"""Kernels of groups that need no exchange: rows of a key are together already, or there is one row for all.

As those of `iterreduce.plan.kernels`, frozen data. What they remember between iterations is where rows went
last time, and that is looked at before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iterreduce.columns.aggregators import Aggregator, Output, bind_outputs
from iterreduce.columns.batch import Batch
from iterreduce.columns.combiner import Fold
from iterreduce.columns.groups import group_rows
from iterreduce.columns.joins import KeyRows
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.columns.stores import Layout
from iterreduce.loop import Context


@dataclass(frozen=True)
class OneRow:
    """Aggregates of all rows as a table of one row, of no rows too: counts are 0, others null.

    ``outputs``: name, type where it is known, whether it counts.
    """

    outputs: tuple[tuple[str, Field | None, bool], ...]

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The row."""
        (total,) = batches
        if len(total):
            return total
        columns, valid = {}, {}
        for name, of, counts in self.outputs:
            known = of or Field("fixed", np.dtype(np.float64))
            columns[name] = _blank(Batch.empty(Schema({name: known}))[name])
            if not counts:
                valid[name] = np.zeros(1, bool)
        return Batch.from_dict(columns, valid)


def _blank(column: Any) -> Any:
    if isinstance(column, Ragged):
        return Ragged(np.zeros(2, np.int64), column.values, column.kind)
    return np.zeros((1, *column.shape[1:]), column.dtype)


@dataclass(frozen=True)
class GroupHere:
    """Aggregates of columns by key, of rows that lie by it already, or are everywhere: nothing travels."""

    keys: tuple[str, ...]
    aggregates: tuple[tuple[str, Aggregator], ...]
    keeps: tuple[tuple[str, str], ...] = ()

    def run(self, context: Context | None, *batches: Batch) -> Batch:
        """One row per key, in canonical order."""
        (rows,) = batches
        outputs = bind_outputs(dict(self.aggregates), self.keys, rows.schema)
        if any(output.bound.words is None for output in outputs):
            return self._collected(rows)
        fold = Fold(Schema({k: rows.schema[k] for k in self.keys}), outputs)
        fold.add(rows)
        folded = fold.result()
        columns, valid = finished(outputs, folded.records)
        keys = folded.keys
        return Batch._trusted({**keys._columns, **columns}, {**keys._valid, **valid}, len(folded))

    def order_free(self, free: Callable[[Mapping[str, Aggregator]], Any]) -> GroupHere:
        """The same with other aggregators: those whose results no order of rows changes."""
        return replace(self, aggregates=tuple(free(dict(self.aggregates)).items()))

    def _collected(self, rows: Batch) -> Batch:
        groups = group_rows(rows, self.keys)
        columns, valid = dict(groups.keys._columns), dict(groups.keys._valid)
        for output in bind_outputs(dict(self.aggregates), self.keys, groups.rows.schema):
            order = np.arange(len(groups.rows))
            values, mask = output.read(groups.rows)
            columns[output.name], missing = output.bound.collect(values, order, groups.offsets, mask)
            if missing is not None:
                valid[output.name] = missing
        return Batch._trusted(columns, valid, len(groups))


def finished(outputs: Sequence[Output], records: Array) -> tuple[dict[str, Any], dict[str, Array]]:
    """The columns of outputs, and masks where they have nulls."""
    columns, valid, at = dict[str, Any](), dict[str, Array](), 0
    for output in outputs:
        columns[output.name], mask = output.bound.finish(records, at)
        at += output.bound.words or 0
        if mask is not None:
            valid[output.name] = mask
    return columns, valid


@dataclass(frozen=True)
class GroupOnto:
    """Aggregates by key of rows that lie by it, as rows of a table that lies by it too, in its order.

    Where a key has no row, numbers are 0: so many rows have been counted, too.
    """

    groups: GroupHere
    keys: tuple[str, ...]

    @property
    def keeps(self) -> tuple[tuple[str, str], ...]:
        """The table's keys, which it reads first."""
        return tuple((k, k) for k in self.keys)

    def run(self, context: Context, *batches: Batch) -> Batch:
        """One row for each of the table."""
        table, rows = batches
        outputs = bind_outputs(dict(self.groups.aggregates), self.groups.keys, rows.schema)
        combined = len(rows) > 0 and all(output.bound.words is not None for output in outputs)
        known = self._places(table, rows) if combined else None
        if known is None:
            return self._grouped(table, rows)
        layout, (slots, lost) = Layout(outputs, 0), known
        records = np.empty((len(table), layout.width), np.int64)
        layout.fill(records)
        layout.update(records, slots, rows)
        columns, valid = finished(outputs, records)
        return self._beside(table, Batch._trusted(columns, valid, len(table)), lost)

    def _places(self, table: Batch, rows: Batch) -> tuple[Array, Array] | None:
        """The row of the table for each row, and the table's rows of no row: those of last time, where the
        keys say that they still hold. None: not for such keys.
        """
        keys, named = table.select(*self.keys), rows.select(*self.groups.keys)
        if len(keys.names) != 1 or keys._valid or named._valid:
            return None
        (a,), (b,) = keys._columns.values(), named._columns.values()
        if isinstance(a, Ragged) or isinstance(b, Ragged) or a.dtype != b.dtype or a.dtype.kind not in "iu":
            return None
        known: tuple[Array, Array, int] | None = self.__dict__.get("_known")
        sizes = None if known is None else (len(known[0]), known[2])
        if known is not None and sizes == (len(b), len(a)) and np.array_equal(a[known[0]], b):
            return known[:2]
        index = KeyRows(keys)
        slots = index.find(named).astype(np.int64, copy=False)
        if not index.unique or slots.min() < 0:
            return None
        held = np.zeros(len(a), bool)
        held[slots] = True
        made = slots, np.flatnonzero(~held)
        self.__dict__["_known"] = (*made, len(a))
        return made

    def _grouped(self, table: Batch, rows: Batch) -> Batch:
        """The same of keys of any kind: grouped, and then looked up."""
        made = self.groups.run(None, rows)
        at = KeyRows(made.select(*self.groups.keys)).find(table.select(*self.keys), nulls_match=True)
        lost, safe = np.flatnonzero(at < 0), np.maximum(at, 0)
        if not len(made):
            made = _rows_of_nothing(made)
        return self._beside(table, made.drop(*self.groups.keys).take(safe), lost)

    def _beside(self, table: Batch, found: Batch, lost: Array) -> Batch:
        for name in found.names:
            column = found[name]
            if len(lost) and not isinstance(column, Ragged):
                column[lost] = np.zeros(1, column.dtype)[0]
        keys = table.select(*self.keys)
        columns, valid = {**keys._columns, **found._columns}, {**keys._valid, **found._valid}
        return Batch._trusted(columns, valid, len(table))

    def order_free(self, free: Callable[[Mapping[str, Aggregator]], Any]) -> GroupOnto:
        """The same with aggregators whose results no order of rows changes."""
        return replace(self, groups=self.groups.order_free(free))


def _rows_of_nothing(rows: Batch) -> Batch:
    """One row of zeros with these columns, for positions to point at."""
    return Batch._trusted({n: _blank(rows[n]) for n in rows.names}, {}, 1)
