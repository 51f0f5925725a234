"""What is asked of a source before it is opened: which columns, which rows, and what it knows already.

A *bound* ``(column, op, constant)`` says that only rows count for which the comparison is true. It is a hint:
a reader may leave out blocks of rows that its file says hold no such row, and whoever asked still filters.
`rules_out` decides for one block, from the least and the largest value in it; where it is in doubt (NaN,
values of another kind, numbers that a narrower float would round) the block is read.

How it can go wrong: a bound that does not hold for a row that counts loses it. So only what a filter demands
of a plain column may be a bound: comparisons with a null are not true, and rows of nulls are left out.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from iterreduce.columns.schema import Field
from iterreduce.errors import UsageError

Bound = tuple[str, str, Any]
"""(column, op, constant): a row counts only if ``column op constant`` is true of it."""
Bounds = tuple[Bound, ...]
Peek = dict[str, Field | None]
"""Columns in order; the field where it is known."""

T = TypeVar("T")

# Of values from `lo` to `hi`: is ``value op c`` false for all of them? NaN makes every answer "no".
_FALSE: Mapping[str, Callable[[Any, Any, Any], bool]] = {
    "<": lambda lo, hi, c: lo >= c,
    "<=": lambda lo, hi, c: lo > c,
    ">": lambda lo, hi, c: hi <= c,
    ">=": lambda lo, hi, c: hi < c,
    "==": lambda lo, hi, c: c < lo or c > hi,
}
_NANOSECONDS = {"D": 86_400 * 10**9, "h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9}
_NANOSECONDS |= {"ms": 10**6, "us": 10**3, "ns": 1}


def hint(work: Callable[[], T]) -> T | None:
    """What the work finds, or None where it fails: who opens the source hears why, on all ranks. Local."""
    try:
        return work()
    except Exception:  # whatever is wrong with a file
        return None


def checked_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The names of columns to read. Raises `UsageError` unless there is one at least, and none twice."""
    found = tuple([names] if isinstance(names, str) else names)
    if not found or len(set(found)) < len(found) or not all(isinstance(name, str) for name in found):
        raise UsageError(f"columns: wanted different names of columns, at least one, got {list(found)}")
    return found


def checked_bounds(bounds: Iterable[Bound]) -> Bounds:
    """The bounds as a tuple. Raises `UsageError` for one that is none.

    >>> checked_bounds([("x", "<", 3)])
    (('x', '<', 3),)
    """
    found = tuple(bounds)
    for bound in found:
        if not isinstance(bound, tuple) or len(bound) != 3 or bound[1] not in _FALSE:
            raise UsageError(
                f"where: wanted tuples (column, op, constant) with op one of {' '.join(_FALSE)}, "
                f"got {bound!r}"
            )
    return found


def renamed(bounds: Bounds, names: Mapping[str, str]) -> Bounds:
    """The bounds on columns that have a name there, under that name."""
    return tuple((names[column], op, c) for column, op, c in bounds if column in names)


def in_words(columns: Sequence[str] | None, bounds: Bounds) -> str:
    """What is read of a source, for tokens and messages; "" for everything.

    >>> in_words(("a", "b"), (("t", ">=", 3),))
    'columns a, b where t >= 3'
    """
    parts = [] if columns is None else [f"columns {', '.join(columns)}"]
    if bounds:
        parts.append("where " + " and ".join(f"{column} {op} {_shown(c)}" for column, op, c in bounds))
    return " ".join(parts)


def _shown(constant: Any) -> str:
    if isinstance(constant, np.datetime64):
        return f"{constant}[{np.datetime_data(constant.dtype)[0]}]"
    return repr(constant.item() if isinstance(constant, np.generic) else constant)


def may_be_null(fields: Mapping[str, Field | None]) -> Peek:
    """The fields, nullable: of files that nobody has looked at some may hold nulls."""
    return {n: f and Field(f.kind, f.dtype, f.shape, True) for n, f in fields.items()}


def only(fields: Mapping[str, Field | None], columns: Sequence[str] | None) -> Peek:
    """The fields of these columns, in their order. Raises KeyError for one that is not there."""
    return {name: fields[name] for name in (fields if columns is None else columns)}


# ---------------------------------------------------------------------- is a block surely out?


def rules_out(op: str, constant: Any, field: Field, least: Any, most: Any) -> bool:
    """Whether ``value op constant`` is surely not true of any value from `least` to `most` of a column.

    `least`, `most`: Python numbers; bytes for text and bytes; `np.datetime64` for dates.

    >>> small = Field("fixed", np.dtype(np.int64))
    >>> rules_out("<", 10, small, 10, 12), rules_out("<=", 10, small, 10, 12)
    (True, False)
    """
    views = list(_views(constant, field, least, most))
    return bool(views) and all(lo <= hi and _FALSE[op](lo, hi, c) for lo, hi, c in views)


def _views(constant: Any, field: Field, least: Any, most: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The three values in each way in which a comparison may see them; none where they cannot be compared."""
    if field.kind in ("text", "bytes"):
        raw = constant.encode() if isinstance(constant, str) else constant
        if all(isinstance(value, bytes) for value in (raw, least, most)):
            yield least, most, bytes(raw)
    elif field.kind == "fixed" and not field.shape:
        if field.dtype.kind in "biuf":
            yield from _number_views(constant, field.dtype, least, most)
        elif field.dtype.kind == "M":
            times = [_nanoseconds(value) for value in (least, most, constant)]
            if None not in times:
                yield times[0], times[1], times[2]


def _number_views(
    constant: Any, dtype: np.dtype[Any], least: Any, most: Any
) -> Iterator[tuple[Any, Any, Any]]:
    c = constant.item() if isinstance(constant, np.generic) else constant
    if not all(isinstance(value, int | float) for value in (c, least, most)):
        return
    if dtype.kind == "u" and least < 0:  # words without a sign, shown with one
        return
    yield least, most, c
    try:
        yield float(least), float(most), float(c)  # as NumPy compares whole numbers with fractions
    except OverflowError:
        return
    if dtype.kind == "f":
        with np.errstate(all="ignore"):
            yield least, most, float(dtype.type(c))  # a constant takes over the type of a narrow column


def _nanoseconds(value: Any) -> int | None:
    """A date as nanoseconds since 1970; None where it is no plain date, or finer than that."""
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        return None
    if not isinstance(value, np.datetime64 | datetime.date):
        return None
    date = np.datetime64(value)
    unit, count = np.datetime_data(date.dtype)
    if unit in ("Y", "M", "W"):
        date, unit, count = date.astype("M8[D]"), "D", 1
    if np.isnat(date) or unit not in _NANOSECONDS:
        return None
    return int(date.astype(np.int64)) * count * _NANOSECONDS[unit]
