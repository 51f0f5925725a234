"""Expressions of columns: ``col("rank") / col("degree")``, as trees that say what to compute, not how.

A tree is frozen data: columns, constants, and operations with NumPy's meaning (division is true division,
``//`` and ``%`` floor, comparisons give bool). It is typed by evaluating it on no rows. Whoever computes it
may split it: `split` finds the parts that depend on some of the columns only, so that they are computed once
per row of the table that holds them.

What it is not: an optimizer, or a way to run Python. The operations are those of `OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.ragged import Array
from iterreduce.errors import SchemaError, UsageError, did_you_mean

OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.true_divide,
    "floor_divide": np.floor_divide,
    "remainder": np.remainder,
    "power": np.power,
    "negative": np.negative,
    "absolute": np.absolute,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "where": np.where,
}
SIGNS = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "floor_divide": "//",
    "remainder": "%",
    "power": "**",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "equal": "==",
    "not_equal": "!=",
    "and": "&",
    "or": "|",
}


UFUNCS = {function: name for name, function in OPERATIONS.items() if isinstance(function, np.ufunc)}
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class Expr:
    """A tree of columns, constants and operations; Python's operators and NumPy's functions make larger ones.

    >>> (col("rank") / col("degree") + 1)
    ((rank / degree) + 1)
    >>> np.log(col("rank"))
    log(rank)
    """

    __hash__ = object.__hash__

    def __add__(self, other: Any) -> Expr:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Expr:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Expr:
        return apply("subtract", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return apply("subtract", other, self)

    def __mul__(self, other: Any) -> Expr:
        return apply("multiply", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return apply("multiply", other, self)

    def __truediv__(self, other: Any) -> Expr:
        return apply("divide", self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return apply("divide", other, self)

    def __floordiv__(self, other: Any) -> Expr:
        return apply("floor_divide", self, other)

    def __rfloordiv__(self, other: Any) -> Expr:
        return apply("floor_divide", other, self)

    def __mod__(self, other: Any) -> Expr:
        return apply("remainder", self, other)

    def __rmod__(self, other: Any) -> Expr:
        return apply("remainder", other, self)

    def __pow__(self, other: Any) -> Expr:
        return apply("power", self, other)

    def __rpow__(self, other: Any) -> Expr:
        return apply("power", other, self)

    def __neg__(self) -> Expr:
        return apply("negative", self)

    def __abs__(self) -> Expr:
        return apply("absolute", self)

    def __lt__(self, other: Any) -> Expr:
        return apply("less", self, other)

    def __le__(self, other: Any) -> Expr:
        return apply("less_equal", self, other)

    def __gt__(self, other: Any) -> Expr:
        return apply("greater", self, other)

    def __ge__(self, other: Any) -> Expr:
        return apply("greater_equal", self, other)

    def __and__(self, other: Any) -> Expr:
        return apply("and", self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Expr:
        return apply("or", self, other)

    __ror__ = __or__

    def __invert__(self) -> Expr:
        return apply("not", self)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Expr:
        name = UFUNCS.get(function)
        if name is None or method != "__call__" or options:
            known = ", ".join(f"np.{ufunc.__name__}" for ufunc in UFUNCS)
            raise UsageError(
                f"np.{function.__name__} of columns: an expression knows {known}, without options; compute "
                "anything else in a Local"
            )
        return apply(name, *inputs)

    def equals(self, other: Any) -> Expr:
        """Where both are equal (``==`` compares the trees themselves)."""
        return apply("equal", self, other)

    def __str__(self) -> str:
        return repr(self)

    def __bool__(self) -> bool:
        raise UsageError(
            f"the expression {self} has no truth value before it is computed; use ir.where, & and |, not "
            "if, and, or"
        )


@dataclass(frozen=True, repr=False)
class Column(Expr):
    """A column, by name."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class Constant(Expr):
    """A number; ``kind`` tells 1, 1.0 and True apart, which Python calls equal."""

    value: float | int | bool
    kind: str = ""

    def __repr__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True, repr=False)
class Apply(Expr):
    """An operation on expressions."""

    operation: str
    arguments: tuple[Expr, ...]

    def __repr__(self) -> str:
        sign = SIGNS.get(self.operation)
        if sign and len(self.arguments) == 2:
            return f"({self.arguments[0]} {sign} {self.arguments[1]})"
        return f"{self.operation}({', '.join(map(repr, self.arguments))})"


COMPARED = "== compares expressions, not their values: write ir.col('x').equals(3)"


def col(name: str) -> Column:
    """The column of this name.

    >>> evaluate(col("x") * 2, {"x": np.array([1, 2])}).tolist()
    [2, 4]
    """
    if not isinstance(name, str) or not name:
        raise UsageError(f"col: wanted the name of a column, got {name!r}")
    return Column(name)


def expression(value: Any) -> Expr:
    """A number or an expression as an expression."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        raise UsageError(f"in an expression: {value} does not fit int64; write it as a float")
    if isinstance(value, bool | int | float):
        return Constant(value, type(value).__name__)
    raise UsageError(f"in an expression: wanted columns and numbers, got {type(value).__name__} ({value!r})")


def apply(operation: str, *arguments: Any) -> Expr:
    """An operation of `OPERATIONS` on columns, numbers and expressions."""
    asks = arguments[:1] if operation == "where" else arguments if operation in ("and", "or", "not") else ()
    fixed = [argument for argument in asks if isinstance(argument, bool | np.bool)]
    if fixed:
        raise UsageError(
            f"in an expression: {operation} of a condition that is {fixed[0]} for all rows; {COMPARED}"
        )
    return Apply(operation, tuple(map(expression, arguments)))


def where(condition: Any, then: Any, otherwise: Any) -> Expr:
    """``then`` where the condition holds, else ``otherwise``.

    >>> evaluate(where(col("x") > 1, col("x"), 0), {"x": np.array([1, 2])}).tolist()
    [0, 2]
    """
    return apply("where", condition, then, otherwise)


def minimum(a: Any, b: Any) -> Expr:
    """The smaller of both, row by row; NaN propagates."""
    return apply("minimum", a, b)


def maximum(a: Any, b: Any) -> Expr:
    """The larger of both, row by row; NaN propagates."""
    return apply("maximum", a, b)


def columns_of(tree: Expr) -> tuple[str, ...]:
    """The columns that it reads, in the order of their first use.

    >>> columns_of(col("b") + col("a") * col("b"))
    ('b', 'a')
    """
    if isinstance(tree, Column):
        return (tree.name,)
    parts = tree.arguments if isinstance(tree, Apply) else ()
    return tuple(dict.fromkeys(name for part in parts for name in columns_of(part)))


def evaluate(tree: Expr, columns: Mapping[str, Any], out: Array | None = None) -> Any:
    """The value on columns of one length, with NumPy's types; a tree without columns gives a scalar.

    ``out``: memory of the value's type and length to write it into, where its last operation can.
    Raises `SchemaError` for a column that is not there.
    """
    if not isinstance(tree, Apply):
        return _evaluated(tree, columns)
    with np.errstate(all="ignore"):
        if out is None or not fills_memory(tree):
            return _evaluated(tree, columns)
        return OPERATIONS[tree.operation](*(_evaluated(part, columns) for part in tree.arguments), out=out)


def fills_memory(tree: Expr) -> bool:
    """Can `evaluate` write its value into memory that is handed over? A column is what it is.

    >>> fills_memory(col("a") / 2), fills_memory(col("a"))
    (True, False)
    """
    return isinstance(tree, Apply) and isinstance(OPERATIONS[tree.operation], np.ufunc)


def _evaluated(tree: Expr, columns: Mapping[str, Any]) -> Any:
    if isinstance(tree, Column):
        if tree.name not in columns:
            raise SchemaError(
                f'the expression reads "{tree.name}", which is no column here (columns: '
                f"{', '.join(columns)}){did_you_mean(tree.name, columns)}"
            )
        return columns[tree.name]
    if isinstance(tree, Constant):
        return tree.value
    assert isinstance(tree, Apply)
    return OPERATIONS[tree.operation](*(_evaluated(part, columns) for part in tree.arguments))


def dtype_of(tree: Expr, dtypes: Mapping[str, np.dtype[Any]]) -> np.dtype[Any]:
    """The type of its values, found on no rows.

    >>> dtype_of(col("n") / 2, {"n": np.dtype(np.int32)})
    dtype('float64')
    """
    try:
        value = evaluate(tree, {name: np.empty(0, dtype) for name, dtype in dtypes.items()})
    except OverflowError as error:
        raise SchemaError(
            f"the expression {tree}: {error}; make the column wider, or write the number as a float"
        ) from None
    return np.asarray(value).dtype


def split(tree: Expr, here: Collection[str], names: Callable[[int], str]) -> tuple[Expr, dict[str, Expr]]:
    """The tree with its largest parts that read columns of ``here`` alone replaced by columns ``names(i)``.

    Returns the rest, and what each new column stands for; equal parts become one.

    >>> rest, parts = split(col("rank") / col("degree") * col("w"), {"rank", "degree"}, "v{}".format)
    >>> rest, parts
    ((v0 * w), {'v0': (rank / degree)})
    """
    found: dict[Expr, str] = {}
    rest = _split(tree, set(here), found, names)
    return rest, {name: part for part, name in found.items()}


def _split(tree: Expr, here: set[str], found: dict[Expr, str], names: Callable[[int], str]) -> Expr:
    read = columns_of(tree)
    if read and set(read) <= here:
        for part, name in found.items():
            if part == tree:
                return Column(name)
        found[tree] = names(len(found))
        return Column(found[tree])
    if isinstance(tree, Apply):
        return Apply(tree.operation, tuple(_split(part, here, found, names) for part in tree.arguments))
    return tree


def full(value: Any, rows: int) -> Array:
    """A value of `evaluate` as a column: a scalar stands in every row."""
    made = np.asarray(value)
    return made if made.ndim else np.full(rows, made)
