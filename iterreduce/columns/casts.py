"""Values in another type, for `Expr.cast`: numbers, bools, dates and text into each other.

What the wanted type cannot hold is null: a number out of its range, NaN as an integer, text that is no such
value. So a cast that can fail gives a column that may hold nulls, whatever its rows are. Text is written as
Python writes numbers and as ISO 8601 writes dates; parsing is Python's, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.values import NO_VALUE, Value, by_row, joined, repeated
from iterreduce.errors import SchemaError

TRUTH = {"true": True, "false": False, "1": True, "0": False}


def converted(value: Value, name: str, rows: int) -> Value:
    """The value as ``text``, ``bytes`` or a dtype of this name."""
    if value.data is None:
        zero: Any = "" if name == "text" else np.zeros((), np.dtype(name))[()]
        return Value(zero, NO_VALUE, one=True)
    if name == "text":
        return value if value.kind == "text" else Value(_as_text(value.spread(rows)), value.mask)
    dtype = np.dtype(name)
    if dtype.kind not in "biufcmM":
        raise SchemaError(f"cast to {name}: wanted a type of numbers, bools or dates, or str")
    if value.kind in ("text", "bytes"):
        return _parsed(value.spread(rows), dtype, rows)
    if value.kind != "fixed":
        raise SchemaError(f"cast of {value.described} to {name}: wanted numbers, dates or text")
    return _number(value.spread(rows), dtype)


def _number(value: Value, dtype: np.dtype[Any]) -> Value:
    data, source = value.data, value.dtype
    if source == dtype:
        return value
    if "M" in (source.kind, dtype.kind) and {source.kind, dtype.kind} - set("iuM"):
        raise SchemaError(
            f"cast of {value.described} to {dtype}: a date comes from a date, an integer or text"
        )
    if dtype.kind == "b":
        return Value(np.not_equal(data, np.zeros((), source)), value.mask)
    if dtype.kind in "iu":
        return _integer(value, dtype)
    if dtype.kind in "fc" and source.kind in "mc" and not (source.kind == "c" and dtype.kind == "c"):
        raise SchemaError(f"cast of {value.described} to {dtype}: no such number; cast to int64 before")
    return Value(data.astype(dtype), value.mask)


def _integer(value: Value, dtype: np.dtype[Any]) -> Value:
    """Where integers of the wanted width hold it."""
    data, source = value.data, value.dtype
    if source.kind == "c":
        raise SchemaError(f"cast of {value.described} to {dtype}: a complex number is no integer")
    if source.kind == "b" or (source.kind in "iu" and np.can_cast(source, dtype)):
        return Value(data.astype(dtype), value.mask)
    fits = _fits(data, source, np.iinfo(dtype))
    made = np.where(fits, data, np.zeros((), source)).astype(dtype)
    return Value(made, joined([value.mask, by_row(fits)]))


def _fits(data: Array, source: np.dtype[Any], limits: Any) -> Any:
    if source.kind in "mM":
        words = data.view(np.int64)
        return ~np.isnat(data) & (words >= limits.min) & (words <= limits.max)
    if source.kind in "iu":
        return (data >= limits.min) & (data <= limits.max)
    whole = np.trunc(data)  # 2.0**63 is a float, the largest int64 is none
    return (whole >= float(limits.min)) & (whole < float(limits.max + 1))


def _as_text(value: Value) -> Ragged:
    data = value.data
    if isinstance(data, Ragged):
        if data.kind != "bytes":
            raise SchemaError(f"cast of {value.described} to text: wanted numbers, bools, dates or bytes")
        return Ragged(data.offsets, data.values, "text")
    if data.ndim > 1 or data.dtype.kind == "c":
        raise SchemaError(f"cast of {value.described} to text: wanted one number, bool or date per row")
    if not len(data):
        return repeated("", 0)  # type: ignore[no-any-return]
    if data.dtype.kind == "b":
        return Ragged.from_list(["false", "true"]).take(data.astype(np.int64))
    if data.dtype.kind == "f":
        return Ragged.from_list([str(number) for number in data.tolist()])
    return Ragged.from_list(data.astype(str).tolist())


def _parsed(value: Value, dtype: np.dtype[Any], rows: int) -> Value:
    """Text as numbers, bools or dates: null where it is none."""
    if dtype.kind in "cm":
        raise SchemaError(f"cast of {value.described} to {dtype}: wanted numbers, bools or dates")
    texts = value.data.to_list() if rows else []
    if value.kind == "bytes":
        texts = [text.decode(errors="replace") for text in texts]
    numbers, valid = _each(texts, _parser(dtype))
    if dtype.kind == "M":
        made: Array = np.array(["NaT" if n is None else n for n in numbers], dtype)
    else:
        made = np.array([0 if n is None else n for n in numbers], dtype)
    return Value(made.reshape(rows), joined([value.mask, valid.reshape(rows)]))


def _parser(dtype: np.dtype[Any]) -> Callable[[str], Any]:
    if dtype.kind == "f":
        return float
    if dtype.kind == "b":
        return lambda text: TRUTH[text.strip().lower()]
    if dtype.kind == "M":
        return lambda text: np.datetime64(text.strip()).astype(dtype)
    limits = np.iinfo(dtype)

    def integer(text: str) -> int:
        number = int(text)
        if not limits.min <= number <= limits.max:
            raise ValueError(text)
        return number

    return integer


def _each(texts: Iterable[str], parse: Callable[[str], Any]) -> tuple[list[Any], Array]:
    found: list[Any] = []
    for text in texts:
        try:
            found.append(parse(text))
        except (ValueError, KeyError):
            found.append(None)
    return found, np.array([number is not None for number in found], bool)
