"""Expressions of few rows as straight calls of NumPy's functions, bound once to the types that they meet.

`compute` asks of every operation what it is given: kinds, nulls, types. Of a thousand rows that is most of
the work. `Straight` asks once, with the rows of the first call, and keeps for each expression a function of
columns and numbers that makes the very same calls, so the same bits. It knows numbers without nulls, NumPy's
functions of them, and `coalesce` of a number; whatever else stands in a tree, and rows that are not of the
types that were met, is `compute`'s work (`Straight.run` gives None then).

Who speaks to it: kernels of plans, where there are too few rows for a compiled pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import Apply, Column, Constant, Expr, Parameter
from iterreduce.columns.operations import DIVISIONS, LOGIC, OPERATIONS, as_ufunc

MOST_ROWS = 4096  # beyond, rows are compiled or worth a look at each operation
Columns = Mapping[str, Any]
Make = Callable[[Columns, Mapping[str, Any]], Any]


class Declined(Exception):
    """Something that straight calls would not say."""


@dataclass(frozen=True, slots=True)
class Part:
    """What makes a value, and the value of the first rows. ``one``: for all rows; ``null``: its type allows
    for null, though it is none.
    """

    make: Make
    value: Any
    one: bool
    null: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """Expressions for rows of such columns, and numbers of such types."""

    columns: tuple[tuple[str, np.dtype[Any]], ...]
    numbers: tuple[tuple[str, type], ...]
    parts: tuple[tuple[str, Part], ...]

    def suits(self, rows: Batch, values: Mapping[str, Any]) -> bool:
        """Are these rows and numbers of the types that were met?"""
        masks, columns = rows._valid, rows._columns
        for name, dtype in self.columns:
            column = columns.get(name)
            if type(column) is not np.ndarray or column.ndim != 1 or column.dtype != dtype or name in masks:
                return False
        return all(type(values.get(name)) is kind for name, kind in self.numbers)

    def made(self, rows: Batch, values: Mapping[str, Any]) -> Batch:
        """The columns."""
        columns, n, out = rows._columns, rows._length, {}
        with np.errstate(all="ignore"):
            for name, part in self.parts:
                value = part.make(columns, values)
                out[name] = np.full(n, value) if part.one else value
        return Batch._trusted(out, {}, n)


class Straight:
    """Columns computed of few rows.

    >>> from iterreduce.columns.expressions import col
    >>> work = Straight({"y": col("x") * 2 + 1})
    >>> work.run(Batch(x=np.arange(3.0)), {})["y"].tolist()
    [1.0, 3.0, 5.0]
    >>> work.run(Batch(x=["a"]), {}) is None
    True
    """

    def __init__(self, trees: Mapping[str, Expr]):
        self.trees = trees
        self._bound: Bound | None = None
        self._declined = False

    def run(self, rows: Batch, values: Mapping[str, Any]) -> Batch | None:
        """The columns; None: nothing is done."""
        if self._declined or not 0 < rows._length < MOST_ROWS:
            return None
        bound = self._bound
        if bound is None or not bound.suits(rows, values):
            bound = self._bind(rows, values)
        return None if bound is None else bound.made(rows, values)

    def _bind(self, rows: Batch, values: Mapping[str, Any]) -> Bound | None:
        """To types met for the first time; a second time they are too many to be worth it."""
        self._declined = self._bound is not None
        if self._declined:
            return None
        work = _Binding(rows, values)
        try:
            with np.errstate(all="ignore"):
                parts = tuple((name, work.of_rows(tree)) for name, tree in self.trees.items())
        except (Declined, TypeError, ValueError, OverflowError):  # `compute` says what is wrong
            self._declined = not work.null_given
            return None
        self._bound = Bound(tuple(work.columns.items()), tuple(work.numbers.items()), parts)
        return self._bound


class _Binding:
    """Trees followed once, on the rows that came."""

    def __init__(self, rows: Batch, values: Mapping[str, Any]):
        self.rows, self.values = rows, values
        self.columns: dict[str, np.dtype[Any]] = {}
        self.numbers: dict[str, type] = {}
        self.null_given = False

    def of_rows(self, tree: Expr) -> Part:
        part = self.part(tree)
        if part.null or np.ndim(part.value) > 1:
            raise Declined
        return part

    def part(self, tree: Expr) -> Part:
        if isinstance(tree, Column):
            return self._column(tree.name)
        if isinstance(tree, Constant):
            return self._constant(tree)
        if isinstance(tree, Parameter):
            return self._number(tree)
        assert isinstance(tree, Apply)
        parts = [self.part(argument) for argument in tree.arguments]
        return _coalesced(parts) if tree.operation == "coalesce" else _applied(tree.operation, parts)

    def _column(self, name: str) -> Part:
        column = self.rows._columns.get(name)
        if type(column) is not np.ndarray or column.ndim != 1 or name in self.rows._valid:
            raise Declined
        if column.dtype.kind not in "biuf":
            raise Declined
        self.columns[name] = column.dtype
        return Part(lambda columns, values: columns[name], column, False)

    def _constant(self, tree: Constant) -> Part:
        value = tree.value
        if not isinstance(value, bool | int | float | np.bool | np.integer | np.floating):
            raise Declined
        return Part(lambda columns, values: value, value, True)

    def _number(self, tree: Parameter) -> Part:
        known, name, given = tree.field, tree.name, self.values.get(tree.name)
        if known is None or known.kind != "fixed" or known.shape:
            raise Declined
        dtype = known.dtype
        if given is None or dtype.kind not in "biuf":
            self.null_given = given is None
            raise Declined
        self.numbers[name] = type(given)
        if type(given) is dtype.type:
            return Part(lambda columns, values: values[name], given, True, known.nullable)
        make: Make = lambda columns, values: np.asarray(values[name], dtype)[()]  # noqa: E731
        return Part(make, make({}, self.values), True, known.nullable)


def _coalesced(parts: list[Part]) -> Part:
    """A number, or else another: the first, in the type of both."""
    if len(parts) != 2 or not (parts[0].one and parts[1].one) or parts[1].null:
        raise Declined
    make, dtype = parts[0].make, np.result_type(parts[0].value, parts[1].value)
    value = np.asarray(parts[0].value, dtype)[()]
    if type(value) is type(parts[0].value):
        return Part(make, value, True)
    return Part(lambda columns, values: np.asarray(make(columns, values), dtype)[()], value, True)


def _applied(name: str, parts: list[Part]) -> Part:
    """NumPy's function, where it says all that there is to say."""
    function = None if name in OPERATIONS else as_ufunc(name)
    if function is None or name in LOGIC or any(part.null for part in parts):
        raise Declined
    whole = name in DIVISIONS or name == "power"
    if whole and np.result_type(*(part.value for part in parts)).kind in "iubm":
        raise Declined
    value, one = function(*(part.value for part in parts)), all(part.one for part in parts)
    if len(parts) == 1:
        (a,) = (part.make for part in parts)
        return Part(lambda columns, values: function(a(columns, values)), value, one)
    a, b = (part.make for part in parts)
    return Part(lambda columns, values: function(a(columns, values), b(columns, values)), value, one)
