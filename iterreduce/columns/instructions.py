"""What `iterreduce.columns.lowering` writes programs with: what numbers stand for, types, operations.

Nothing here looks at trees or columns. `Declined` says that NumPy is to do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.expressions import Expr
from iterreduce.columns.operations import COMPARISONS, LOGIC

NUMBERS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"))
FREE = ("load", "scalar", "literal", "row", "cast")  # instructions that NumPy would not make a pass of


class Declined(Exception):
    """Not here: NumPy computes it, or says what is wrong with it."""


@dataclass(frozen=True)
class Ref:
    """What an expression is: the instruction of its number and that of its mask (None: no nulls).

    ``weak``: a Python number, written where its type is known; ``nothing``: a null of no type; ``nonzero``: a
    constant that divides. ``whole``: no number, but the rows' own column of that name as it is, or a column
    that NumPy makes.
    """

    at: int = -1
    dtype: np.dtype[Any] | None = None
    mask: int | None = None
    weak: Any = None
    nothing: bool = False
    nonzero: bool = False
    whole: str | Expr | None = None

    @property
    def kind(self) -> Any:
        """What NumPy is told to find a type: a dtype, or a Python number that gives way."""
        return self.weak if self.dtype is None else self.dtype


@dataclass(frozen=True)
class Scalar:
    """A scalar of a call: an expression without columns, or its mask, or a value, as this type."""

    dtype: np.dtype[Any]
    tree: Expr | None = None
    value: Any = None
    mask: bool = False


@dataclass(frozen=True)
class Read:
    """A column that is read: by name, or an island; or its mask."""

    of: str | Expr
    mask: bool = False


def short(dtype: np.dtype[Any]) -> str:
    """The type as instructions say it: kind and bytes."""
    name = f"{dtype.kind}{dtype.itemsize}"
    if name not in NUMBERS or not dtype.isnative:
        raise Declined
    return name


def as_number(value: Any, dtype: np.dtype[Any]) -> Any:
    """A Python number in this type, as NumPy takes it beside a column."""
    try:
        with np.errstate(all="ignore"):
            return np.asarray(value, dtype)[()]
    except (OverflowError, TypeError, ValueError):
        raise Declined from None


def operation_of(name: str, inputs: list[np.dtype[Any]], dtype: np.dtype[Any]) -> tuple[str, np.dtype[Any]]:
    """The instruction, and the type of what it is given."""
    if name in COMPARISONS:
        if inputs[0] != inputs[1]:
            raise Declined
        return name, inputs[0]
    if name in ("isnan", "isfinite", "isinf"):
        if inputs[0].kind != "f":
            raise Declined
        return name, inputs[0]
    if name == "divide":
        if dtype.kind != "f":
            raise Declined
        return name, dtype
    if any(i != dtype for i in inputs) or name not in SAME_TYPE:
        raise Declined
    if dtype.kind == "b":
        name = BOOLS.get(name, "")
    operation = SAME_TYPE.get(name)
    if operation is None or (name in FLOATS_ALONE and dtype.kind != "f"):
        raise Declined
    return operation, dtype


BOOLS = {"add": "or", "multiply": "and", "maximum": "or", "minimum": "and"}
BOOLS |= {name: name for name in LOGIC}
FLOATS_ALONE = ("sqrt", "floor", "ceil", "trunc", "rint")
SAME_TYPE = {
    name: name
    for name in (
        *(
            "add",
            "subtract",
            "multiply",
            "floor_divide",
            "remainder",
            "negative",
            "absolute",
            "minimum",
            "maximum",
        ),
        *LOGIC,
        *FLOATS_ALONE,
    )
}
