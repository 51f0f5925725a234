"""What an operation of an expression takes and gives: rows or one value, with a mask for nulls.

A `Value` may stand for every row (a constant, a parameter) or hold one entry per row. Its mask says where it
holds something: None everywhere, else bools of shape ``(rows,)`` or one for all rows. Whether there is a mask
follows from types alone, never from what the rows hold, so that every rank, and a run on no rows, gives the
same schema. Under a mask lies anything; nobody may let it out.

Who speaks to it: `operations`, `texts`, `casts` and `compute`. It knows no trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.batch import Column, field_of
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field
from iterreduce.errors import SchemaError

NO_VALUE = np.False_


@dataclass(frozen=True, slots=True)
class Value:
    """``data``: an array or `Ragged` of rows, or one value for all (``one``): a Python or NumPy scalar, text,
    a vector, or None for a null of no type. ``constant``: written in the expression, so known beforehand.
    """

    data: Any
    mask: Any = None
    one: bool = False
    constant: bool = False

    @property
    def kind(self) -> str:
        """fixed, text, bytes, list or null."""
        if isinstance(self.data, Ragged):
            return self.data.kind
        if self.data is None:
            return "null"
        return "text" if isinstance(self.data, str) else "bytes" if isinstance(self.data, bytes) else "fixed"

    @property
    def described(self) -> str:
        """The type in words."""
        if self.kind != "fixed":
            return self.kind
        data = np.asarray(self.data)
        return Field("fixed", data.dtype, data.shape if self.one else data.shape[1:]).describe()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a fixed value; a Python number's own."""
        return np.asarray(self.data).dtype

    def column(self, rows: int) -> Column:
        """One entry per row."""
        return self.data if not self.one else repeated(self.data, rows)

    def valid(self, rows: int) -> Array | None:
        """The mask of shape ``(rows,)``, or None."""
        if self.mask is None or np.ndim(self.mask):
            return self.mask  # type: ignore[no-any-return]
        return np.full(rows, self.mask)

    def spread(self, rows: int) -> Value:
        """The same with one entry per row."""
        return Value(self.column(rows), self.mask) if self.one else self


NULL = Value(None, NO_VALUE, one=True, constant=True)


def field_of_value(value: Value) -> Field:
    """The field of the column that `Value.column` gives."""
    return field_of(value.column(0) if value.one else value.data, value.mask is not None)


def repeated(value: Any, rows: int) -> Column:
    """One value as a column of so many rows; None as 0.0."""
    if isinstance(value, str | bytes):
        raw = value.encode(errors="surrogateescape") if isinstance(value, str) else value
        offsets = np.arange(rows + 1, dtype=np.int64) * len(raw)
        values = np.tile(np.frombuffer(raw, np.uint8), rows)
        return Ragged(offsets, values, "text" if isinstance(value, str) else "bytes")
    if value is None:
        return np.zeros(rows)
    return np.full((rows, *np.shape(value)), value)


def zero_of(field: Field) -> Any:
    """Some value of this type."""
    if field.kind == "fixed":
        return np.zeros(field.shape, field.dtype)[()]
    if field.kind == "list":
        raise SchemaError("a list cannot stand as one value in an expression")
    return "" if field.kind == "text" else b""


def joined(masks: Sequence[Any]) -> Any:
    """Where all hold something."""
    found: Any = None
    for mask in masks:
        if mask is not None:
            found = mask if found is None else found & mask
    return found


def settled(values: Sequence[Value]) -> list[Value]:
    """Nulls of no type given the type of what stands beside them (of 0.0 where nothing does)."""
    if not any(value.data is None for value in values):
        return list(values)
    typed = next((value for value in values if value.data is not None), None)
    zero: Any = np.float64(0.0)
    if typed is not None:
        known = typed.kind != "fixed" or not isinstance(typed.data, bool | int | float | complex)
        zero = zero_of(field_of_value(typed)) if known and typed.kind != "list" else typed.data
    return [Value(zero, value.mask, one=True) if value.data is None else value for value in values]


def aligned(values: Sequence[Value]) -> list[Any]:
    """Arrays that broadcast: one number per row beside vectors stands for each number of its row."""
    data = [value.data for value in values]
    if all(value.one for value in values):
        return data
    deepest = max(np.ndim(d) + (value.one and np.ndim(d) > 0) for d, value in zip(data, values, strict=True))
    if deepest <= 1:
        return data
    return [_widened(d, value.one, deepest) for d, value in zip(data, values, strict=True)]


def _widened(data: Any, one: bool, deepest: int) -> Any:
    if one:
        return data if np.ndim(data) == 0 else data.reshape(1, *data.shape)
    return data.reshape(len(data), *([1] * (deepest - 1))) if data.ndim == 1 else data


def by_row(holds: Any) -> Any:
    """Bools of rows of any shape as one per row: do all hold?"""
    if np.ndim(holds) <= 1:
        return holds
    return holds.reshape(len(holds), int(np.prod(holds.shape[1:]))).all(axis=1)


def is_number(value: Value) -> bool:
    """Is it one number for all rows?"""
    return value.one and value.kind == "fixed" and np.ndim(value.data) == 0


def chosen(condition: Any, then: Value, otherwise: Value, rows: int) -> Value:
    """``then`` in rows of the condition, a bool array ``(rows,)`` or one bool, else ``otherwise``."""
    if then.data is None and otherwise.data is None:
        return NULL
    mask = None
    if then.mask is not None or otherwise.mask is not None:
        masks = [True if value.mask is None else value.mask for value in (then, otherwise)]
        mask = np.where(condition, *masks)
    if not np.ndim(condition) and is_number(then) and is_number(otherwise):  # one for all rows, as both are
        dtype = np.result_type(then.data, otherwise.data)
        data = np.asarray(then.data if condition else otherwise.data, dtype)[()]
        return Value(data, None if mask is None else np.bool(mask), one=True)
    if then.data is None or otherwise.data is None:  # the type, and the memory, of the one that has any
        there = otherwise if then.data is None else then
        return Value(there.spread(rows).data, mask)
    if {then.kind, otherwise.kind} == {"fixed"}:
        return Value(_chosen_fixed(condition, then, otherwise, rows), mask)
    if then.kind != otherwise.kind or then.kind == "fixed":
        raise SchemaError(f"{then.described} beside {otherwise.described}: wanted one type; use .cast")
    return Value(_chosen_ragged(condition, then.column(rows), otherwise.column(rows), rows), mask)


def _chosen_fixed(condition: Any, then: Value, otherwise: Value, rows: int) -> Array:
    dtype = np.result_type(then.data, otherwise.data)
    pair = [Value(np.asarray(v.data, dtype), one=v.one) if v.one else v for v in (then, otherwise)]
    if all(v.one for v in pair):
        pair[0] = pair[0].spread(rows)
    a, b = aligned(pair)
    condition = np.asarray(condition)
    if not condition.ndim and condition and np.ndim(a) >= np.ndim(b):  # a column as it is
        return np.asarray(a, dtype)
    if condition.ndim:
        condition = condition.reshape(len(condition), *([1] * (max(np.ndim(a), np.ndim(b)) - 1)))
    made: Array = np.where(condition, a, b)
    return made if made.dtype == dtype else made.astype(dtype)


def _chosen_ragged(condition: Any, then: Ragged, otherwise: Ragged, rows: int) -> Ragged:
    if then.values.dtype != otherwise.values.dtype:
        raise SchemaError(f"lists of {then.values.dtype} beside {otherwise.values.dtype}: wanted one type")
    index = np.arange(rows) + np.where(condition, 0, rows)
    return Ragged.concat([then, otherwise]).take(index) if rows else then
