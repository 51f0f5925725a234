"""Aggregators that a user writes as plain functions on an accumulator.

The functions are compiled by Numba where that is possible; otherwise they run as plain Python, row by row,
and a warning says so once per definition. Contract and callers as in `iterreduce.columns.accumulators`.

Numba is used directly here, not through `iterreduce.columns.jit`: the user's functions may stand in a place
without a cache (an interactive session), and a loop that is compiled around them could be cached only under
an address that the next process does not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba.core.errors import NumbaError

from iterreduce.columns import folds
from iterreduce.columns.accumulators import (
    BoundAggregator,
    elements,
    keep_valid,
    refuse_nulls,
    require,
    without_nulls,
)
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field

_compiled: dict[Any, Any] = {}  # loops by (functions, types): binding again costs nothing
_warned: set[Any] = set()


@dataclass(frozen=True)
class Definition:
    """What the user wrote; see `Aggregator.define`. ``zero`` is a tuple of numbers, ``dtype`` float64 or
    int64."""

    name: str
    zero: tuple[float | int, ...]
    update: Callable[[Array, Any], Any]
    merge: Callable[[Array, Array], Any]
    finish: Callable[[Array], Any] | None
    dtype: str


class Defined(BoundAggregator):
    """A definition for one type of column: its words, and one that counts rows where the column is
    nullable."""

    def __init__(self, definition: Definition, field: Field) -> None:
        require(field, definition.name, "biufc", "numbers and bools")
        self.definition, self.field, self.nullable = definition, field, field.nullable
        self.dtype = np.dtype(definition.dtype)
        self.width = len(definition.zero)
        self.words = self.width + field.nullable
        zero = np.array(definition.zero, self.dtype)
        self.identity = np.concatenate([zero.view(np.int64), np.zeros(int(field.nullable), np.int64)])
        result = np.asarray(self._finished(zero.copy()))
        self.field_out = Field("fixed", result.dtype, result.shape, field.nullable)
        self.row_shape = (elements(field.shape),) if field.shape else ()
        self.fold, self.join = self._loops()

    def _finished(self, accumulator: Array) -> Any:
        finish = self.definition.finish
        if finish is not None:
            return finish(accumulator)
        return accumulator[0] if self.width == 1 else accumulator.copy()

    def _loops(self) -> tuple[Any, Any]:
        """The loops over rows and partials, compiled for these functions and types if Numba can."""
        d = self.definition
        key = (d.update, d.merge, self.dtype, self.field.dtype, self.row_shape)
        if key not in _compiled:
            _compiled[key] = self._compile()
        return _compiled[key]  # type: ignore[no-any-return]

    def _compile(self) -> tuple[Any, Any]:
        d, cells = self.definition, np.empty((0, 1), self.dtype)
        values, codes = np.empty((0, *self.row_shape), self.field.dtype), np.empty(0, np.int64)
        try:
            fold = numba.njit(nogil=True, error_model="numpy")(fold_rows(numba.njit(nogil=True)(d.update)))
            join = numba.njit(nogil=True, error_model="numpy")(join_rows(numba.njit(nogil=True)(d.merge)))
            fold(cells, 0, 1, codes, values)
            join(cells, 0, 1, codes, cells, 0)
        except NumbaError as error:
            self._warn(error)
            return fold_rows(d.update), join_rows(d.merge)
        return fold, join

    def _warn(self, error: NumbaError) -> None:
        if self.definition in _warned:
            return
        _warned.add(self.definition)
        warnings.warn(
            f"aggregator {self.definition.name!r} could not be compiled and runs as plain Python, row by row "
            f"({reason(error)})",
            RuntimeWarning,
            stacklevel=2,
        )

    def update(
        self, records: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Fold rows; see `BoundAggregator.update`."""
        if valid is not None:
            if not self.nullable:
                refuse_nulls(valid)
            codes, values = keep_valid(codes, values, valid)
        rows = np.ascontiguousarray(values).reshape((len(values), *self.row_shape))
        codes = codes.astype(np.int64, copy=False)
        self.fold(records.view(self.dtype), offset, self.width, codes, rows)
        if self.nullable:
            folds.count_int(records, offset + self.width, codes)

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Fold partial records; see `BoundAggregator.merge`."""
        others, slots = partial.view(self.dtype), slots.astype(np.int64, copy=False)
        self.join(records.view(self.dtype), offset, self.width, slots, others, partial_offset)
        if self.nullable:
            count = self.width
            folds.merge_sum_int(records, offset + count, slots, partial, partial_offset + count, 1)

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """``finish`` of each accumulator, in plain Python."""
        cells = records.view(self.dtype)[:, offset : offset + self.width].copy()
        if self.definition.finish is None:
            column = cells.reshape((len(records), *self.field_out.shape))
        else:
            column = np.empty((len(records), *self.field_out.shape), self.field_out.dtype)
            for i, accumulator in enumerate(cells):
                column[i] = self._finished(accumulator)
        return without_nulls(column, records[:, offset + self.width] > 0) if self.nullable else (column, None)


def reason(error: NumbaError) -> str:
    """The first line of Numba's message that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Failed in", "During"))]
    return told[0] if told else type(error).__name__


def fold_rows(update: Any) -> Any:
    """The loop over rows around the user's ``update``."""

    def loop(cells: Array, offset: int, width: int, codes: Array, values: Array) -> None:
        for i in range(codes.size):
            update(cells[codes[i], offset : offset + width], values[i])

    return loop


def join_rows(merge: Any) -> Any:
    """The loop over partials around the user's ``merge``."""

    def loop(cells: Array, offset: int, width: int, slots: Array, others: Array, first: int) -> None:
        for i in range(slots.size):
            merge(cells[slots[i], offset : offset + width], others[i, first : first + width])

    return loop
