"""Twins of the aggregators that depend on the order of rows: sums, means, variances, extremes of floats.

An accumulator of integers is a function of the multiset of its rows, so the result has the same bits however
rows are spread, combined and merged. `iterreduce.columns.binned` explains the words of sums for groups (three
times those of plain sums; off by at most ``n * 2**-54`` times the largest addend, before one rounding),
`iterreduce.columns.superaccumulator` those of single exact sums. A variance comes from sums of values and of
exact squares. Minima and maxima compare floats as integers: -0.0 is below 0.0, and a NaN is one NaN.

Contract and callers as in `iterreduce.columns.accumulators`; `iterreduce.columns.aggregators` chooses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns import accumulators, binned, binned_alone, binned_records, folds
from iterreduce.columns import superaccumulator as exactly
from iterreduce.columns.accumulators import (
    FLOAT64,
    BoundAggregator,
    Elementwise,
    Loops,
    Words,
    converter,
    elements,
    keep_valid,
    refuse_nulls,
    require,
    widened_float,
    without_nulls,
)
from iterreduce.columns.keytable import line_aligned
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field

OFTEN = 2  # rows per record from which sums are collected unpacked: the detour costs two visits to each
PACKED = 8  # rows per record from which sums of scalars are packed on their way
MOST_UNPACKED = 4096  # records: their scratch stays in the second-level cache
MAGNITUDE = np.int64(2**63 - 1)
NAN_LEAST = np.int64(-(2**63))


class OrderFree(Words):
    """What the sums share: ``limbs`` words per element, then a count where one is needed."""

    def __init__(self, field: Field, loops: Loops, limbs: int, counted: bool) -> None:
        width = elements(field.shape) * (2 if field.dtype.kind == "c" else 1)
        load = converter(field.dtype) if field.dtype != np.uint64 else widened_float
        super().__init__(loops, width, load, field.nullable)
        self.counted = limbs * width
        self.words = self.counted + counted
        self.identity = np.zeros(self.words, np.int64)
        if counted:
            self.count, self.count_at = folds.count_int, self.counted

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Fold partial records; see `BoundAggregator.merge`."""
        self.loops.merge(records, offset, slots, partial, partial_offset, self.width)
        if self.count is not None:
            at = self.counted
            folds.merge_sum_int(records, offset + at, slots, partial, partial_offset + at, 1)

    def sums(self, records: Array, offset: int) -> Array:
        """float64 of shape ``(records, width)``."""
        out = np.empty((len(records), self.width))
        binned_records.finish_binned(records, offset, out)
        return out


class OrderFreeSum(OrderFree):
    """Sums of floats: three limbs per element."""

    mean = False

    def __init__(self, field: Field) -> None:
        require(field, self.name, "biufc", "numbers and bools")
        loops = Loops(sum_scalars, sum_rows, binned_records.merge_binned)
        super().__init__(field, loops, binned.LIMBS, self.mean or field.nullable)
        out = np.dtype("c16" if field.dtype.kind == "c" else "f8")
        self.field_out = Field("fixed", out, field.shape, field.nullable)

    @property
    def name(self) -> str:
        """The word that messages use."""
        return "mean" if self.mean else "sum"

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """The sums (means) and which are not null; see `BoundAggregator.finish`."""
        sums = self.sums(records, offset)
        if self.mean:
            with np.errstate(divide="ignore", invalid="ignore"):
                sums /= records[:, offset + self.counted][:, None]
        column = sums.view(self.field_out.dtype).reshape((len(records), *self.field_out.shape))
        return (
            without_nulls(column, records[:, offset + self.counted] > 0) if self.nullable else (column, None)
        )


class OrderFreeMean(OrderFreeSum):
    """Sums, then the number of rows; the mean is their quotient."""

    mean = True


class OrderFreeVariance(OrderFree):
    """Sums of values and of their squares, in eight limbs per element, then the number of rows."""

    def __init__(self, field: Field, ddof: int) -> None:
        require(field, "var", "biuf", "real numbers and bools")
        loops = Loops(sum_moments, sum_moments, binned_records.merge_moments)
        super().__init__(field, loops, 2 * binned_records.SQUARE_LIMBS, True)
        self.ddof = ddof
        self.field_out = Field("fixed", FLOAT64, field.shape, field.nullable)

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """The variances and which are not null; see `BoundAggregator.finish`."""
        counts, out = records[:, offset + self.counted], np.empty((len(records), self.width))
        binned_records.finish_moments(records, offset, counts, self.ddof, out)
        column = out.reshape((len(records), *self.field_out.shape))
        return without_nulls(column, counts > self.ddof) if self.nullable else (column, None)


def packed_for(records: int, values: Array) -> Array | None:
    """Scratch in which sums are packed on their way, if that is worth the detour."""
    if len(values) < PACKED * records:
        return None
    bin_ = binned.usual_bin(values)
    if bin_ >= binned.SLOW_BIN:
        return None
    packed = line_aligned(2 * records).reshape(records, 2)
    binned.pack_none(packed, bin_)
    return packed


def sum_scalars(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Sums of scalars, by the kernel that suits the number of records and of rows."""
    if len(records) == 1:
        binned_alone.sum_alone(records, offset, values)
        return
    packed = packed_for(len(records), values)
    if packed is None:
        binned.sum_binned(records, offset, codes, values)
    else:
        binned.sum_packed(records, offset, codes, values, packed)


def sum_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Sums of vectors, by the kernel that suits the number of records."""
    if _often(records, codes):
        shape = len(records), values.shape[1]
        constants, ends = np.empty(shape, np.int64), np.empty(shape)
        sums, rows = np.zeros((shape[0], binned.LIMBS * shape[1]), np.int64), np.zeros(shape[0], np.int64)
        binned.sum_binned_often(records, offset, codes, values, constants, ends, sums, rows)
    else:
        binned.sum_binned_rows(records, offset, codes, values)


def _often(records: Array, codes: Array) -> bool:
    return OFTEN * len(records) <= len(codes) and len(records) <= MOST_UNPACKED


def sum_moments(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Sums of values and squares; scalars are rows of one."""
    rows = values if values.ndim > 1 else values.reshape(-1, 1)
    binned_records.sum_moments(records, offset, codes, rows)


class ExactSum(BoundAggregator):
    """A sum of all rows, or their mean, rounded once: for totals without keys. One record, many words."""

    def __init__(self, field: Field, mean: bool) -> None:
        self.nullable, self.mean = field.nullable, mean
        self.load = converter(field.dtype) if field.dtype != np.uint64 else widened_float
        self.words = exactly.WORDS + 1  # the last counts rows
        self.identity = np.zeros(self.words, np.int64)
        self.field_out = Field("fixed", FLOAT64, (), field.nullable)

    def update(
        self, records: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Fold rows; see `BoundAggregator.update`."""
        if valid is not None:
            if not self.nullable:
                refuse_nulls(valid)
            codes, values = keep_valid(codes, values, valid)
        values = self.load(values) if self.load is not None else values
        for lo in range(0, len(codes), exactly.MOST_ROWS):
            hi = lo + exactly.MOST_ROWS
            if len(records) == 1:
                exactly.add_all_exactly(records, offset, values[lo:hi])
            else:
                exactly.add_exactly(records, offset, codes[lo:hi], values[lo:hi])
            exactly.carry_all(records, offset, codes[lo:hi])
        if len(records) == 1:
            records[0, offset + exactly.WORDS] += len(codes)
        else:
            folds.count_int(records, offset + exactly.WORDS, codes)

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Fold partial records; see `BoundAggregator.merge`."""
        exactly.merge_exactly(records, offset, slots, partial, partial_offset)
        at = exactly.WORDS
        folds.merge_sum_int(records, offset + at, slots, partial, partial_offset + at, 1)

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """The sums (means) and which are not null; see `BoundAggregator.finish`."""
        words = records[:, offset : offset + exactly.WORDS].tolist()
        column, counts = (
            np.array([exactly.total(w) for w in words], np.float64),
            records[:, offset + exactly.WORDS],
        )
        if self.mean:
            with np.errstate(divide="ignore", invalid="ignore"):
                column /= counts
        return without_nulls(column, counts > 0) if self.nullable else (column, None)


def float_order(values: Array) -> Array:
    """float64 -> int64 that compare alike, -0.0 below 0.0; one NaN above all."""
    bits = np.where(np.isnan(values), np.nan, values).view(np.int64)
    return bits ^ ((bits >> 63) & MAGNITUDE)


def float_order_nan_least(values: Array) -> Array:
    """The same with NaN below all."""
    bits = float_order(values)
    bits[np.isnan(values)] = NAN_LEAST
    return bits


def float_of_order(cells: Array) -> Array:
    """Back to float64."""
    bits = cells ^ ((cells >> 63) & MAGNITUDE)
    floats: Array = bits.view(np.float64)
    return np.where(np.isnan(floats), np.nan, floats)


def bind_extreme(field: Field, op: str) -> BoundAggregator:
    """Minima and maxima of floats with a sign of zero and a NaN that do not depend on the order of rows."""
    if field.kind != "fixed" or field.dtype.kind != "f":
        return accumulators.bind_extreme(field, op)
    load = float_order_nan_least if op == "min" else float_order
    identity = float_order(np.array([np.inf if op == "min" else -np.inf]))
    return Elementwise(
        op,
        field,
        field.dtype,
        lambda values: load(values.astype(np.float64)),
        lambda cells: float_of_order(cells).astype(field.dtype),
        int(identity[0]),
        word="i",
    )


def bind_sum(field: Field, alone: bool) -> BoundAggregator:
    """A sum; ``alone``: of all rows. Integers have no order to be free of."""
    if field.kind == "fixed" and field.dtype.kind not in "fc":
        return accumulators.bind_sum(field)
    return ExactSum(field, False) if alone and _scalar(field) else OrderFreeSum(field)


def bind_mean(field: Field, alone: bool) -> BoundAggregator:
    """A mean; ``alone``: of all rows."""
    return ExactSum(field, True) if alone and _scalar(field) else OrderFreeMean(field)


def _scalar(field: Field) -> bool:
    return field.kind == "fixed" and field.dtype.kind in "biuf" and field.shape == ()
