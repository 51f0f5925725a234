"""Aggregators that keep rows as they are: first, last, argmin, argmax, the extremes of text, and lists of all
values.

Values of a fixed type travel as raw bytes in accumulator records. What has no fixed size (text, bytes, lists,
and the result of collect) has no record: `Uncombined` aggregators see the rows of a group together, once, and
are slower to ship because nothing is combined before it is sent. Contract and callers as in
`iterreduce.columns.accumulators`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns import picks
from iterreduce.columns.accumulators import (
    FLOAT64,
    NATIVE,
    BoundAggregator,
    Convert,
    elements,
    flip_to_signed,
    keep_valid,
    nat_last,
    refuse_nulls,
    require,
    widened_int,
)
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field
from iterreduce.errors import SchemaError


class Uncombined(BoundAggregator):
    """The aggregators without a record: only `collect` works."""

    words = None
    identity = np.zeros(0, np.int64)

    def update(
        self, records: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Not possible: there is no record."""
        raise SchemaError(f"{self.field_out.describe()} results have no record of fixed size: use collect()")

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Not possible: there is no record."""
        self.update(records, offset, slots, partial)

    def finish(self, records: Array, offset: int) -> tuple[Any, Array | None]:
        """Not possible: there is no record."""
        raise SchemaError(f"{self.field_out.describe()} results have no record of fixed size: use collect()")


class RawRows:
    """Values of any fixed type as rows of int64 words and back; the last word is padded with zeros."""

    def __init__(self, field: Field) -> None:
        self.dtype, self.shape, self.row_bytes = field.dtype, field.shape, field.row_bytes
        self.words = -(-self.row_bytes // 8)

    def cells(self, values: Array) -> Array:
        """int64 of shape ``(n, words)``."""
        rows = np.ascontiguousarray(values).reshape(len(values), elements(self.shape))
        if self.row_bytes % 8 == 0 and self.row_bytes:
            return rows.view(np.int64)
        cells = np.zeros((len(rows), self.words), np.int64)
        if self.row_bytes:
            cells.view(np.uint8)[:, : self.row_bytes] = rows.view(np.uint8)
        return cells

    def values(self, cells: Array) -> Array:
        """The inverse; a copy."""
        raw = np.ascontiguousarray(cells).view(np.uint8)[:, : self.row_bytes].copy()
        if not self.row_bytes:
            return np.empty((len(cells), *self.shape), self.dtype)
        return raw.view(self.dtype).reshape((len(cells), *self.shape))


class Pick(BoundAggregator):
    """The first or the last value that is not null: a word that says whether there is one, then its bytes."""

    def __init__(self, field: Field, last: bool) -> None:
        self.raw, self.nullable = RawRows(field), field.nullable
        self.words = self.record_words = 1 + self.raw.words
        self.identity = np.zeros(self.words, np.int64)
        self.field_out = field
        self.kernel = picks.last_words if last else picks.first_words
        self.merge_kernel = picks.merge_last if last else picks.merge_first

    def update(
        self, records: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Fold rows; see `BoundAggregator.update`."""
        if valid is not None:
            self.check_nulls(valid)
            codes, values = keep_valid(codes, values, valid)
        self.kernel(records, offset, codes, self.raw.cells(values))

    def check_nulls(self, valid: Array) -> None:
        """Nulls may come only where they were announced."""
        if not self.nullable:
            refuse_nulls(valid)

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Earlier partials count as earlier rows."""
        self.merge_kernel(records, offset, slots, partial, partial_offset, self.record_words)

    def finish(self, records: Array, offset: int) -> tuple[Array, Array | None]:
        """The values; zeros where there was no row."""
        start = offset + self.record_words - self.raw.words
        column = self.raw.values(records[:, start : start + self.raw.words])
        return column, records[:, offset] != 0 if self.nullable else None


class Least(Pick):
    """The value of the row whose other column is smallest (or largest): held, key, bytes of the value.

    Ties go to the first row. A NaN (or NaT) key loses against every other; rows where value or key is null
    are skipped. ``values`` of `update` is the pair (value, key), ``valid`` the rows where both are valid.
    """

    inputs = 2

    def __init__(self, field: Field, by: Field, largest: bool) -> None:
        super().__init__(field, last=False)
        self.keys = sort_keys(by, largest)
        self.nullable = field.nullable or by.nullable
        self.words = self.record_words = 2 + self.raw.words
        self.identity = np.zeros(self.words, np.int64)
        self.field_out = Field(field.kind, field.dtype, field.shape, self.nullable)

    def _known(self, codes: Array, values: Any, valid: Array | None) -> tuple[Array, Any, Any]:
        """The rows that have no null: their codes, values, and what they are compared by."""
        value, by = values
        if valid is None:
            return codes, value, by
        self.check_nulls(valid)
        return *keep_valid(codes, value, valid), by[valid]

    def update(
        self, records: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Fold rows; see `BoundAggregator.update`."""
        codes, value, by = self._known(codes, values, valid)
        picks.least_words(records, offset, codes, self.keys(by), self.raw.cells(value))

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """Of equal keys the earlier partial stays."""
        picks.merge_least(records, offset, slots, partial, partial_offset, self.record_words)


class LeastOf(Least):
    """The same, but ties go to the smallest value: whatever the order of rows is.

    Held, key, the value's elements in words that have their order, bytes of the value.
    """

    def __init__(self, field: Field, by: Field, largest: bool) -> None:
        super().__init__(field, by, largest)
        self.ordered = sort_keys(Field(field.kind, field.dtype), False)
        self.key_words = 1 + elements(field.shape)
        self.words = self.record_words = 1 + self.key_words + self.raw.words
        self.identity = np.zeros(self.words, np.int64)

    def update(
        self, records: Array, offset: int, codes: Array, values: Any, valid: Array | None = None
    ) -> None:
        """Fold rows; see `BoundAggregator.update`."""
        codes, value, by = self._known(codes, values, valid)
        keys = np.empty((len(value), self.key_words), np.int64)
        keys[:, 0] = self.keys(by)
        keys[:, 1:] = self.ordered(np.ascontiguousarray(value).reshape(-1)).reshape(
            len(value), self.key_words - 1
        )
        picks.least_of_words(records, offset, codes, keys, self.raw.cells(value))

    def merge(self, records: Array, offset: int, slots: Array, partial: Array, partial_offset: int) -> None:
        """In any order."""
        picks.merge_least_of(
            records, offset, slots, partial, partial_offset, self.record_words, self.key_words
        )


def sort_keys(by: Field, largest: bool) -> Convert:
    """int64 keys of a scalar column, of which the smallest is the row looked for; NaN and NaT come last."""
    op = "argmax" if largest else "argmin"
    require(by, op, "biufmM", "real numbers, bools and dates to compare by")
    if by.shape:
        raise SchemaError(f"{op} by {by.describe()}: wanted one value per row to compare by")
    if by.dtype.kind == "f":
        sign = -1.0 if largest else 1.0
        return lambda values: picks.ordered_floats(_native_float(values), sign)
    if by.dtype.kind in "mM":  # NaT is the smallest int64: moved to the top for argmin, inverted for argmax
        return (lambda v: ~v.view(np.int64)) if largest else nat_last
    widen = flip_to_signed if by.dtype == np.uint64 else widened_int
    return (lambda values: ~widen(values)) if largest else widen


def _native_float(values: Array) -> Array:
    return np.ascontiguousarray(values, values.dtype if values.dtype in NATIVE else FLOAT64)


class PickRows(Uncombined):
    """First, last, argmin and argmax of columns without a fixed size: one row of each group is taken."""

    def __init__(self, field: Field, last: bool) -> None:
        self.last, self.field_out = last, field

    def collect(
        self, values: Any, order: Array, offsets: Array, valid: Array | None = None
    ) -> tuple[Any, Array | None]:
        """See `BoundAggregator.collect`."""
        order, offsets = valid_groups(order, offsets, valid)
        return take_or_null(self.value(values), self.rows(values, order, offsets), self.field_out.nullable)

    def value(self, values: Any) -> Ragged:
        """The column to take from."""
        column: Ragged = values
        return column

    def rows(self, values: Any, order: Array, offsets: Array) -> Array:
        """The row of each group; -1 where it has none."""
        if not len(order):
            return np.full(len(offsets) - 1, -1, np.int64)
        at = offsets[1:] - 1 if self.last else offsets[:-1]
        return np.where(np.diff(offsets) > 0, order[np.clip(at, 0, len(order) - 1)], -1)


class LeastRows(PickRows):
    """Argmin and argmax of text, bytes and lists."""

    inputs = 2

    def __init__(self, field: Field, by: Field, largest: bool) -> None:
        nullable = field.nullable or by.nullable
        super().__init__(Field(field.kind, field.dtype, field.shape, nullable), last=False)
        self.keys = sort_keys(by, largest)

    def value(self, values: tuple[Ragged, Array]) -> Ragged:
        """The column to take from."""
        return values[0]

    def rows(self, values: tuple[Ragged, Array], order: Array, offsets: Array) -> Array:
        """The row of each group whose key is smallest."""
        return picks.least_rows(self.keys(values[1]), order, offsets)


class LeastRowsOf(LeastRows):
    """The same, but ties go to the smallest value, by bytes."""

    def rows(self, values: tuple[Ragged, Array], order: Array, offsets: Array) -> Array:
        """The row of each group whose key is smallest."""
        column, by = values
        return picks.least_texts(self.keys(by), column.values, column.offsets, order, offsets)


class ExtremeText(PickRows):
    """Smallest or largest text, by bytes (UTF-8: by code points)."""

    def __init__(self, field: Field, largest: bool) -> None:
        super().__init__(field, last=False)
        self.largest = largest

    def rows(self, values: Ragged, order: Array, offsets: Array) -> Array:
        """The row of each group whose bytes come first (last)."""
        return picks.extreme_texts(values.values, values.offsets, order, offsets, self.largest)


def valid_groups(order: Array, offsets: Array, valid: Array | None) -> tuple[Array, Array]:
    """The same groups without null rows."""
    if valid is None:
        return order, offsets
    kept = valid[order]
    before = np.zeros(len(order) + 1, np.int64)
    np.cumsum(kept, out=before[1:])
    return order[kept], before[offsets]


def take_or_null(column: Ragged, rows: Array, nullable: bool) -> tuple[Ragged, Array | None]:
    """These rows; an empty one for -1."""
    found = rows >= 0
    if not found.all():
        blank = Ragged(np.zeros(2, np.int64), column.values[:0], column.kind)
        rows = np.where(found, rows, len(column))
        column = Ragged.concat([column, blank])
    return column.take(rows), found if nullable else None


class Collect(Uncombined):
    """All values of a group as a list, in canonical order, without the nulls; a group of none gives an empty
    list."""

    def __init__(self, field: Field) -> None:
        if field.kind != "fixed" or field.shape:
            raise SchemaError(
                f"collect of {field.describe()}: a list holds one number per row; "
                "number the texts or vectors first, or shuffle the rows without reducing them"
            )
        self.field_out = Field("list", field.dtype)

    def collect(
        self, values: Array, order: Array, offsets: Array, valid: Array | None = None
    ) -> tuple[Ragged, Array | None]:
        """See `BoundAggregator.collect`."""
        order, offsets = valid_groups(order, offsets, valid)
        return Ragged(offsets, values[order], "list"), None


def bind_pick(field: Field, last: bool) -> BoundAggregator:
    """First and last, of any column."""
    return Pick(field, last) if field.kind == "fixed" else PickRows(field, last)


def bind_least(field: Field, by: Field, largest: bool, by_value: bool = False) -> BoundAggregator:
    """Argmin and argmax, of any column by a scalar one; ``by_value``: ties go to the smallest value, if such
    values have an order, else to the first row.
    """
    if by_value and field.kind == "fixed" and field.dtype.kind in "biufmM" and elements(field.shape):
        return LeastOf(field, by, largest)
    if by_value and field.kind in ("text", "bytes"):
        return LeastRowsOf(field, by, largest)
    return Least(field, by, largest) if field.kind == "fixed" else LeastRows(field, by, largest)
