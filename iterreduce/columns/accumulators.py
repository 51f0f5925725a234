"""Aggregators bound to the type of a column: how many words they take, how rows fold into them, what comes
out.

A bound aggregator is a monoid over accumulator records: rows of an int64 array of shape ``(groups, W)``,
C-contiguous, in which it owns the words ``offset`` to ``offset + words``. Floats are accumulated as float64
in the same memory. Records are raw: they are sent, merged and stored without being understood by anyone but
the aggregator itself.

It is not where aggregators are named or chosen (`iterreduce.columns.aggregators`), and holds no loops over
rows (`iterreduce.columns.folds`). The combiner table, exchanges and plans speak to it. All that depends on
the column's type is decided once, in the constructors; an update is then one compiled call.

Three rules hold for all of them. Nulls are skipped; a group of nothing but nulls gives null (a count gives
0), which can happen only where the column is nullable, so only then is the result nullable. A group that
never saw a row finishes as the identity (0 for sums, the largest value for a minimum, NaN for a mean). Rows,
and partials, are folded in the order in which they are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns import folds
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field
from iterreduce.errors import SchemaError

Kernel = Callable[..., None]
Convert = Callable[[Array], Array]
INT64, FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)
SIGN = np.uint64(1 << 63)
# read by the kernels as they are; all else is converted first, so that few variants are ever compiled
NATIVE = frozenset(map(np.dtype, (np.float64, np.float32, np.int64, np.int32)))


class BoundAggregator(ABC):
    """An aggregator for one type of column.

    ``words``: 8-byte words per accumulator, or None where no record of fixed size exists: then rows are kept
    until they stand together, and `collect` folds them. ``field_out``: the type of the result. ``identity``:
    int64 of shape ``(words,)``, the record of no rows.
    """

    words: int | None
    field_out: Field
    identity: Array
    inputs: int = 1  # how many columns `update` takes; of two, ``values`` is a pair

    def direct(self) -> tuple[Kernel, Kernel, np.dtype[Any]] | None:
        """For a fold of one word that needs nothing else: ``(update, merge, dtype of the result)``.

        ``update(records, offset, codes, values)`` of C-contiguous values without nulls in the dtype that it
        was bound to; ``merge(records, offset, slots, partial, partial_offset, 1)``; the result is the word
        itself. A stage that knows this saves half of the calls around them.
        """
        return None

    def fill(self, records: Array, offset: int) -> None:
        """Write the identity into words ``offset`` to ``offset + words`` of all records."""
        records[:, offset : offset + len(self.identity)] = self.identity

    @abstractmethod
    def update(
        self, records: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Fold row ``i`` into ``records[codes[i]]``, in row order.

        ``codes`` int32 or int64 of shape ``(n,)``; ``values`` the column, ``(n, ...)`` (a pair of columns for
        argmin and argmax; not looked at by counts); ``valid`` bool of shape ``(n,)``, or None where no row is
        null.
        """

    def update_one(
        self, record: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Fold all rows into one record, int64 ``(1, W)``; ``codes`` are zeros. Floats may be added in
        another order than `update` adds them in: one that follows from the number of rows.
        """
        self.update(record, offset, codes, values, valid)

    @abstractmethod
    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Fold partial record ``i`` into ``records[slots[i]]``, in order; both in the layout of this
        aggregator."""

    @abstractmethod
    def finish(self, records: Array, offset: int) -> tuple[Any, Array | None]:
        """The results, a new array of shape ``(groups, ...)``, and which are not null (None: all)."""

    def collect(
        self, values: Any, order: Array, offsets: Array, valid: Array | None = None
    ) -> tuple[Any, Array | None]:
        """Fold rows that already stand together: group ``g`` has the rows ``order[offsets[g]:offsets[g +
        1]]``.

        ``order`` int64 of shape ``(n,)``, row numbers in canonical order within each group; ``offsets`` int64
        of shape ``(groups + 1,)``. Returns what `finish` returns.
        """
        groups = len(offsets) - 1
        records = np.empty((groups, len(self.identity)), np.int64)
        self.fill(records, 0)
        codes = np.empty(len(order), np.int64)
        codes[order] = np.repeat(np.arange(groups), np.diff(offsets))
        self.update(records, 0, codes, values, valid)
        return self.finish(records, 0)


def keep_valid(codes: Array, values: Array | None, valid: Array) -> tuple[Array, Array]:
    """Codes and values without the null rows."""
    rows = np.flatnonzero(valid)
    return codes[rows], rows if values is None else values.take(rows, axis=0)


def refuse_nulls(valid: Array) -> None:
    """A mask came with a column that was declared without nulls: fine only if it hides nothing."""
    if not valid.all():
        raise SchemaError("nulls in a column that was declared without: give the field nullable=True")


def elements(shape: tuple[int, ...]) -> int:
    """Values in a row of this shape."""
    return int(np.prod(shape, dtype=np.int64))


def converter(dtype: np.dtype[Any]) -> Convert | None:
    """How a column is made readable for the kernels; None: as it is."""
    if dtype in NATIVE:
        return None
    if dtype.kind == "c":
        return _complex_parts
    if dtype == np.uint64:
        return _as_int64
    return widened_float if dtype.kind == "f" else widened_int


def _complex_parts(values: Array) -> Array:
    real = np.float32 if values.dtype == np.complex64 else np.float64
    if values.dtype.itemsize > 16:
        values = values.astype(np.complex128)
    return np.ascontiguousarray(values).reshape(len(values), -1).view(real)


def _as_int64(values: Array) -> Array:
    return values.view(np.int64)


def widened_float(values: Array) -> Array:
    return values.astype(np.float64)


def widened_int(values: Array) -> Array:
    return values.astype(np.int64)


def _truth(values: Array) -> Array:
    truth: Array = values != 0
    return truth.astype(np.int64)


def flip_to_signed(values: Array) -> Array:
    return (values ^ SIGN).view(np.int64)


def flip_to_unsigned(cells: Array) -> Array:
    unsigned: Array = cells.copy().view(np.uint64) ^ SIGN
    return unsigned


def nat_last(values: Array) -> Array:
    return values.view(np.int64) - 1  # NaT, the smallest int64, becomes the largest: it wins, as in NumPy


@dataclass(frozen=True)
class Loops:
    """The kernels of one fold: over scalars, over vectors, over partial records."""

    one: Kernel
    rows: Kernel
    merge: Kernel


LOOPS = {
    ("sum", "f"): Loops(folds.sum_float, folds.sum_float_rows, folds.merge_sum_float),
    ("sum", "i"): Loops(folds.sum_int, folds.sum_int_rows, folds.merge_sum_int),
    ("min", "f"): Loops(folds.min_float, folds.min_float_rows, folds.merge_min_float),
    ("min", "i"): Loops(folds.min_int, folds.min_int_rows, folds.merge_min_int),
    ("max", "f"): Loops(folds.max_float, folds.max_float_rows, folds.merge_max_float),
    ("max", "i"): Loops(folds.max_int, folds.max_int_rows, folds.merge_max_int),
    ("mean", "f"): Loops(folds.mean_float, folds.mean_float_rows, folds.merge_sum_float),
    ("var", "f"): Loops(folds.var_float, folds.var_float_rows, folds.merge_var),
}


class Words(BoundAggregator):
    """What the folds over numbers share: a column is read as scalars or as ``(n, width)``, by kernels chosen
    once."""

    def __init__(self, loops: Loops, width: int, load: Convert | None, nullable: bool) -> None:
        self.loops, self.width, self.load, self.nullable = loops, width, load, nullable
        self.kernel = loops.one if width == 1 else loops.rows
        self.count: Kernel | None = None
        self.count_at = width  # the word that counts rows
        self.row_shape = () if width == 1 else (width,)

    def read(self, values: Array) -> Array:
        """The column in the shape and dtype of the kernel."""
        if self.load is not None:
            values = self.load(values)
        if not values.flags.c_contiguous:
            values = np.ascontiguousarray(values)
        if values.ndim - 1 != len(self.row_shape):
            values = values.reshape((len(values), *self.row_shape))
        return values

    def update(
        self, records: Array, offset: int, codes: Array, values: Array, valid: Array | None = None
    ) -> None:
        """Fold rows; see `BoundAggregator.update`."""
        if valid is not None:
            if self.nullable:
                codes, values = keep_valid(codes, values, valid)
            else:
                refuse_nulls(valid)
        self.kernel(records, offset, codes, self.read(values))
        if self.count is not None:
            self.count(records, offset + self.count_at, codes)


class Elementwise(Words):
    """Sum, minimum, maximum, any, all: a word per element, and for nullable columns a last word that counts
    rows.

    The count is a float64 beside float words and an int64 beside integers, so that sums merge in one pass.
    """

    def __init__(
        self,
        op: str,
        field: Field,
        out: np.dtype[Any],
        load: Convert | None,
        store: Convert,
        identity: int,
        word: str = "",
    ) -> None:
        word = word or ("f" if out.kind in "fc" else "i")
        width = elements(field.shape) * (2 if out.kind == "c" else 1)
        super().__init__(LOOPS[op, word], width, load, field.nullable)
        self.op, self.word, self.store = op, word, store
        self.words = width + field.nullable
        self.field_out = Field("fixed", out, field.shape, field.nullable)
        self.identity = np.full(self.words, identity, np.int64)
        self.identity[width:] = 0
        if self.nullable:
            self.count = folds.count_float if word == "f" else folds.count_int
        self.merge_count = folds.merge_sum_float if word == "f" else folds.merge_sum_int
        self.merged = self.words if op == "sum" else width
        self.plain = op == "sum" and self.words == 1 and field.shape == () and out in (FLOAT64, INT64)

    def direct(self) -> tuple[Kernel, Kernel, np.dtype[Any]] | None:
        """Plain sums; see `BoundAggregator.direct`."""
        if not self.plain or self.load is not None:
            return None
        return self.kernel, self.loops.merge, self.field_out.dtype

    def update_one(
        self, record: Array, offset: int, codes: Array, values: Array, valid: Array | None = None
    ) -> None:
        """Plain sums pairwise: several times as fast as one after another, and nearer to the true sum."""
        if not self.plain or valid is not None:
            self.update(record, offset, codes, values, valid)
            return
        cells = record.view(FLOAT64 if self.word == "f" else INT64)
        with np.errstate(all="ignore"):  # an infinite sum says enough
            cells[0, offset] += np.add.reduce(self.read(values), dtype=cells.dtype)

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Fold partial records; see `BoundAggregator.merge`."""
        self.loops.merge(records, offset, slots, partial, partial_offset, self.merged)
        if self.nullable and self.op != "sum":
            count = self.width
            self.merge_count(records, offset + count, slots, partial, partial_offset + count, 1)

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """The results and which are not null; see `BoundAggregator.finish`."""
        cells = records.view(FLOAT64 if self.word == "f" else INT64)
        if self.plain:
            return cells[:, offset].copy(), None
        column = self.store(cells[:, offset : offset + self.width])
        column = column.reshape((len(records), *self.field_out.shape))
        if not self.nullable:
            return column, None
        return without_nulls(column, cells[:, offset + self.width] > 0)


def without_nulls(column: Array, valid: Array) -> tuple[Array, Array]:
    """The column with zeros under its nulls, so that equal results have equal bytes."""
    if not valid.all():
        column[~valid] = np.zeros((), column.dtype)
    return column, valid


def cast_to(dtype: np.dtype[Any]) -> Convert:
    """A copy of the words in this dtype, C-contiguous."""
    if dtype.kind in "mM" or dtype == np.uint64:
        return lambda cells: cells.copy().view(dtype)
    if dtype.kind == "c":
        return lambda cells: cells.copy().view(np.complex128)
    return lambda cells: cells.astype(dtype)


def bind_sum(field: Field) -> BoundAggregator:
    """Sums: int64, uint64 (of unsigned), float64 or complex128; bools are counted."""
    require(field, "sum", "biufc", "numbers and bools")
    names = {"b": "i8", "i": "i8", "u": "u8", "f": "f8", "c": "c16"}
    out = np.dtype(names[field.dtype.kind])
    return Elementwise("sum", field, out, converter(field.dtype), cast_to(out), 0)


def bind_extreme(field: Field, op: str) -> BoundAggregator:
    """Minima and maxima of numbers, bools and dates, in the dtype of the column."""
    require(field, op, "biufmM", "real numbers, bools, dates and text")
    dtype, load, store = field.dtype, converter(field.dtype), cast_to(field.dtype)
    identity = _extreme_identity(dtype, op)
    if dtype == np.uint64:
        load, store = flip_to_signed, flip_to_unsigned
    elif dtype.kind in "mM":
        load = nat_last if op == "max" else _as_int64
        if op == "max":
            store = lambda cells: (cells + 1).view(dtype)  # noqa: E731
    return Elementwise(op, field, dtype, load, store, identity)


def _extreme_identity(dtype: np.dtype[Any], op: str) -> int:
    """The word that every value beats."""
    if dtype.kind == "f":
        return int(np.float64(np.inf if op == "min" else -np.inf).view(np.int64))
    if dtype.kind == "b":
        return 1 if op == "min" else 0
    info = np.iinfo(np.int64 if dtype.kind in "mM" or dtype == np.uint64 else dtype)
    return int(info.max if op == "min" else info.min)


def bind_truth(field: Field, op: str) -> BoundAggregator:
    """Any and all: bool; a number counts as true unless it is 0 (NaN is true, as in NumPy)."""
    require(field, op, "biufc", "numbers and bools")
    fold, identity = ("max", 0) if op == "any" else ("min", 1)
    return Elementwise(fold, field, np.dtype(bool), _truth, cast_to(np.dtype(bool)), identity)


def require(field: Field, op: str, kinds: str, wanted: str) -> None:
    """Raise `SchemaError` unless the column is of a fixed dtype of these kinds."""
    if field.kind != "fixed" or field.dtype.kind not in kinds:
        hint = "; turn times into numbers with .astype" if field.dtype.kind in "mM" else ""
        raise SchemaError(f"{op} of {field.describe()}: {op} takes {wanted}{hint}")


class Count(BoundAggregator):
    """Rows, or rows that are not null: one int64 word."""

    words = 1
    identity = np.zeros(1, np.int64)
    field_out = Field("fixed", INT64)

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs  # 0: all rows, without looking at a column

    def update(
        self, records: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Count rows; ``values`` may be None."""
        if valid is not None:
            codes = codes[valid]
        folds.count_int(records, offset, codes)

    def update_one(
        self, record: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Count without looking at rows."""
        record[0, offset] += len(codes) if valid is None else np.count_nonzero(valid)

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Add counts."""
        folds.merge_sum_int(records, offset, slots, partial, partial_offset, 1)

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """int64 of shape ``(groups,)``; never null."""
        return records[:, offset].copy(), None


class Mean(Words):
    """Arithmetic means in float64 (complex128): sums, then one word for the number of rows."""

    def __init__(self, field: Field) -> None:
        require(field, "mean", "biufc", "numbers and bools")
        width = elements(field.shape) * (2 if field.dtype.kind == "c" else 1)
        load = converter(field.dtype) if field.dtype != np.uint64 else widened_float
        super().__init__(LOOPS["mean", "f"], width, load, field.nullable)
        self.words = width + 1
        self.identity = np.zeros(self.words, np.int64)
        out = np.dtype("c16" if field.dtype.kind == "c" else "f8")
        self.field_out = Field("fixed", out, field.shape, field.nullable)

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Add sums and counts."""
        folds.merge_sum_float(records, offset, slots, partial, partial_offset, self.width + 1)

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """Sum / count; of no rows NaN, or null where the column is nullable."""
        cells = records.view(np.float64)
        count = cells[:, offset + self.width]
        with np.errstate(divide="ignore", invalid="ignore"):
            means = cells[:, offset : offset + self.width] / count[:, None]
        column = means.view(self.field_out.dtype).reshape((len(records), *self.field_out.shape))
        return without_nulls(column, count > 0) if self.nullable else (column, None)


class Variance(Words):
    """Variances in float64: number of rows, means, sums of squared deviations."""

    def __init__(self, field: Field, ddof: int) -> None:
        require(field, "var", "biuf", "real numbers and bools")
        load = converter(field.dtype) if field.dtype != np.uint64 else widened_float
        super().__init__(LOOPS["var", "f"], elements(field.shape), load, field.nullable)
        self.ddof = ddof
        self.words = 1 + 2 * self.width
        self.identity = np.zeros(self.words, np.int64)
        self.field_out = Field("fixed", FLOAT64, field.shape, field.nullable)

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Combine moments."""
        folds.merge_var(records, offset, slots, partial, partial_offset, self.width)

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """Squares / (count - ddof); with no more than ``ddof`` rows NaN, or null where the column is
        nullable."""
        cells = records.view(np.float64)
        freedom = cells[:, offset] - self.ddof
        valid = freedom > 0
        first = offset + 1 + self.width
        with np.errstate(divide="ignore", invalid="ignore"):
            column = cells[:, first : first + self.width] / np.where(valid, freedom, np.nan)[:, None]
        column = column.reshape((len(records), *self.field_out.shape))
        return without_nulls(column, valid) if self.nullable else (column, None)
