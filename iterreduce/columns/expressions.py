"""Expressions of columns: ``col("rank") / col("degree")``, as trees that say what to compute, not how.

A tree is frozen data: columns, constants, parameters (values that are given when it is computed), and
operations by name. Python's operators and NumPy's functions make larger trees; ``==`` and ``!=`` do so too,
so two trees are compared by `same`, and stand in dictionaries by their `key_of`.

What it is not: an evaluator (`iterreduce.columns.compute`), the meaning of the operations
(`iterreduce.columns.operations`), or what is done with trees (`iterreduce.columns.trees`).
"""

from __future__ import annotations

import builtins
import datetime
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns.operations import NAME_OF, SIGNS, as_ufunc, known_functions
from iterreduce.columns.schema import Field
from iterreduce.errors import UsageError

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
PLAIN = (bool, int, float, complex, str, bytes)


class Expr:
    """A tree of columns, constants and operations; Python's operators and NumPy's functions make larger ones.

    >>> (col("rank") / col("degree") + 1)
    ((rank / degree) + 1)
    >>> np.log(col("rank")), col("rank") == 3
    (log(rank), (rank == 3))
    """

    __hash__ = object.__hash__

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(
                f"an expression has no {name!r} (agg folds rows: ir.sum)", name=name, obj=self
            )

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

    def __eq__(self, other: Any) -> Expr:  # type: ignore[override]
        return apply("equal", self, _not_none(other, "=="))

    def __ne__(self, other: Any) -> Expr:  # type: ignore[override]
        return apply("not_equal", self, _not_none(other, "!="))

    def __and__(self, other: Any) -> Expr:
        return apply("and", self, other)

    def __rand__(self, other: Any) -> Expr:
        return apply("and", other, self)

    def __or__(self, other: Any) -> Expr:
        return apply("or", self, other)

    def __ror__(self, other: Any) -> Expr:
        return apply("or", other, self)

    def __xor__(self, other: Any) -> Expr:
        return apply("xor", self, other)

    def __rxor__(self, other: Any) -> Expr:
        return apply("xor", other, self)

    def __invert__(self) -> Expr:
        return apply("not", self)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Expr:
        name = NAME_OF.get(function, function.__name__)
        if method != "__call__" or options or as_ufunc(name) is not function:
            raise UsageError(
                f"np.{function.__name__} of columns: an expression knows {known_functions()} and others of "
                "one or two columns and one result, without options; compute anything else in a Local"
            )
        return apply(name, *inputs)

    def equals(self, other: Any) -> Expr:
        """Where both are equal, as ``==``."""
        return apply("equal", self, other)

    def cast(self, dtype: Any) -> Expr:
        """The values in another type: a NumPy dtype, or ``str`` for text.

        What the type cannot hold (a number too large, NaN as an integer, text that is no number) is null.

        >>> from iterreduce.columns.compute import values_of
        >>> values_of(col("x").cast("int64"), x=np.array([1.5, np.nan]))
        [1, None]
        """
        name = "text" if dtype is str or dtype in ("str", "text") else str(np.dtype(dtype))
        return Apply("cast", (self,), (name,))

    def is_null(self) -> Expr:
        """Where there is no value."""
        return apply("is_null", self)

    def is_not_null(self) -> Expr:
        """Where there is a value."""
        return apply("not", apply("is_null", self))

    def fill_null(self, value: Any) -> Expr:
        """The value, or this one where there is none: a constant or an expression."""
        return apply("coalesce", self, value)

    def is_nan(self) -> Expr:
        """Where the value is not a number (which is no null)."""
        return apply("isnan", self)

    def is_in(self, values: Iterable[Any]) -> Expr:
        """Where the value is one of these constants; null where it is not, but a None is among them.

        >>> from iterreduce.columns.compute import values_of
        >>> values_of(col("x").is_in([1, 3]), x=np.array([1, 2, 3]))
        [True, False, True]
        """
        if isinstance(values, str | bytes):
            raise UsageError(f"is_in: wanted a list of constants, got {values!r}; write [{values!r}]")
        return Apply("is_in", (self,), tuple(map(_plain, values)))

    def between(self, low: Any, high: Any) -> Expr:
        """Where ``low <= value <= high``."""
        return apply("and", self >= low, self <= high)

    def hash(self) -> Expr:
        """The stable hash of the value as int64: the same on every host and in every run; also of nulls."""
        return apply("hash", self)

    @property
    def str(self) -> Texts:
        """What can be done with text: ``col("name").str.upper()``."""
        return Texts(self)

    def __str__(self) -> builtins.str:
        return repr(self)

    def __bool__(self) -> bool:
        raise UsageError(
            f"the expression {self} has no truth value before it is computed; use ir.where, & and |, not "
            "if, and, or"
        )


@dataclass(frozen=True, repr=False, eq=False)
class Column(Expr):
    """A column, by name."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False, eq=False)
class Constant(Expr):
    """One value for all rows; ``kind`` tells 1, 1.0 and True apart, which Python calls equal.

    A Python number takes the type of the columns beside it, as in NumPy; a NumPy scalar has its own. None is
    a null: of the type ``kind`` where that names one, else of the type that is wanted where it stands.
    """

    value: Any
    kind: str = ""

    def __repr__(self) -> str:
        if isinstance(self.value, np.generic):
            return f"{self.value.dtype.name}({self.value})"
        return (
            repr(self.value) if self.kind in ("", "null") or self.value is not None else f"{self.kind}(None)"
        )


@dataclass(frozen=True, repr=False, eq=False)
class Parameter(Expr):
    """A value that is given when the expression is computed, under this name; None then is a null.

    ``field``: its type, if known before. ``of``: whatever knows how to find the value; not looked at here.
    """

    name: str
    field: Field | None = None
    of: Any = None

    def __repr__(self) -> str:
        return f"${self.name}"


@dataclass(frozen=True, repr=False, eq=False)
class Apply(Expr):
    """An operation on expressions; ``options`` are plain values that say how."""

    operation: str
    arguments: tuple[Expr, ...]
    options: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        sign = SIGNS.get(self.operation)
        if sign and len(self.arguments) == 2:
            return f"({self.arguments[0]} {sign} {self.arguments[1]})"
        shown = [*map(repr, self.arguments), *map(repr, self.options)]
        return f"{self.operation}({', '.join(shown)})"

    def of(self, arguments: Iterable[Expr]) -> Apply:
        """The same operation on other arguments."""
        return Apply(self.operation, tuple(arguments), self.options)


@dataclass(frozen=True)
class Texts:
    """Operations on a column of text or bytes; positions and lengths count characters (of bytes: bytes)."""

    _of: Expr

    def length(self) -> Expr:
        """How many characters: int64."""
        return apply("str.length", self._of)

    def lower(self) -> Expr:
        """In lower case."""
        return apply("str.lower", self._of)

    def upper(self) -> Expr:
        """In upper case."""
        return apply("str.upper", self._of)

    def strip(self) -> Expr:
        """Without white space at both ends."""
        return apply("str.strip", self._of)

    def contains(self, literal: str | bytes) -> Expr:
        """Where this text stands somewhere in it (no pattern)."""
        return self._found("str.contains", literal)

    def starts_with(self, literal: str | bytes) -> Expr:
        """Where it begins with this text."""
        return self._found("str.starts_with", literal)

    def ends_with(self, literal: str | bytes) -> Expr:
        """Where it ends with this text."""
        return self._found("str.ends_with", literal)

    def slice(self, start: int, length: int | None = None) -> Expr:
        """``text[start:][:length]``; ``start`` may be negative: from the end."""
        if length is not None and length < 0:
            raise UsageError(f"str.slice: a length of {length}; wanted 0 or more, or None for the rest")
        return Apply("str.slice", (self._of,), (int(start), None if length is None else int(length)))

    def concat(self, *others: Any) -> Expr:
        """This text with others behind it: columns, expressions or constants."""
        return apply("str.concat", self._of, *others)

    def _found(self, operation: str, literal: str | bytes) -> Expr:
        if not isinstance(literal, str | bytes):
            raise UsageError(f"{operation}: wanted text, got {type(literal).__name__} ({literal!r})")
        return Apply(operation, (self._of,), (literal,))


class When:
    """A condition that waits for its value: `when`."""

    def __init__(self, condition: Any, before: tuple[tuple[Expr, Expr], ...] = ()):
        self._condition, self._before = expression(condition), before

    def then(self, value: Any) -> Then:
        """The value where the condition holds, and none before it did."""
        return Then.chain((*self._before, (self._condition, expression(value))), Constant(None, "null"))


class Then(Apply):
    """Values by condition; null where none holds, unless `otherwise` says something else."""

    @classmethod
    def chain(cls, cases: tuple[tuple[Expr, Expr], ...], last: Expr) -> Then:
        """The nested ``where`` of all cases."""
        tree = last
        for condition, value in reversed(cases[1:]):
            tree = Apply("where", (condition, value, tree))
        made = cls("where", (*cases[0], tree))
        object.__setattr__(made, "_cases", cases)
        return made

    def when(self, condition: Any) -> When:
        """One more condition, for rows in which none before holds."""
        return When(condition, self._cases)  # type: ignore[attr-defined]

    def otherwise(self, value: Any) -> Expr:
        """The value where no condition holds."""
        made = Then.chain(self._cases, expression(value))  # type: ignore[attr-defined]
        return Apply("where", made.arguments)


def col(name: str) -> Column:
    """The column of this name.

    >>> from iterreduce.columns.compute import values_of
    >>> values_of(col("x") * 2, x=np.array([1, 2]))
    [2, 4]
    """
    if not isinstance(name, str) or not name:
        raise UsageError(f"col: wanted the name of a column, got {name!r}")
    return Column(name)


def lit(value: Any) -> Expr:
    """A constant: a number, bool, text, bytes, NumPy date or time span, or None for null."""
    return expression(value)


def expression(value: Any) -> Expr:
    """A constant or an expression as an expression."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, When):
        raise UsageError("in an expression: ir.when(condition) has no value; go on with .then(value)")
    value = _plain(value)
    if value is None:
        return Constant(None, "null")
    return Constant(value, value.dtype.str if isinstance(value, np.generic) else type(value).__name__)


def _plain(value: Any) -> Any:
    """A constant as it is kept; `UsageError` for what is none."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.str_ | np.bytes_):
        return value.item()
    if isinstance(value, datetime.date | datetime.timedelta):
        return np.datetime64(value) if isinstance(value, datetime.date) else np.timedelta64(value)
    if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        raise UsageError(f"in an expression: {value} does not fit int64; write it as a float")
    if (
        value is None
        or isinstance(value, PLAIN)
        or (isinstance(value, np.generic) and value.dtype.kind in "biufcmM")
    ):
        return value
    raise UsageError(
        f"in an expression: wanted columns and numbers, got {type(value).__name__} ({value!r}); texts, dates "
        "and None are constants too"
    )


def _not_none(other: Any, sign: str) -> Any:
    if other is None:
        raise UsageError(f"{sign} None holds in no row, as in SQL: write .is_null() or .is_not_null()")
    return other


def apply(operation: str, *arguments: Any) -> Expr:
    """An operation on columns, constants and expressions."""
    return Apply(operation, tuple(map(expression, arguments)))


def where(condition: Any, then: Any, otherwise: Any) -> Expr:
    """``then`` where the condition holds, else ``otherwise`` (also where the condition is null).

    >>> from iterreduce.columns.compute import values_of
    >>> values_of(where(col("x") > 1, col("x"), 0), x=np.array([1, 2]))
    [0, 2]
    """
    return apply("where", condition, then, otherwise)


def when(condition: Any) -> When:
    """``when(c).then(a).when(d).then(b).otherwise(e)``: the value of the first condition that holds.

    >>> from iterreduce.columns.compute import values_of
    >>> x = col("x")
    >>> values_of(when(x < 2).then("few").when(x < 9).then("some"), x=np.array([1, 5, 10]))
    ['few', 'some', None]
    """
    return When(condition)


def coalesce(*values: Any) -> Expr:
    """The first of these that is not null, row by row.

    >>> from iterreduce.columns.compute import values_of
    >>> values_of(coalesce(None, col("x"), 0), x=np.array([1, 2]))
    [1, 2]
    """
    if not values:
        raise UsageError("coalesce: wanted at least one value")
    return apply("coalesce", *values)


def minimum(a: Any, b: Any) -> Expr:
    """The smaller of both, row by row; NaN propagates, and null."""
    return apply("minimum", a, b)


def maximum(a: Any, b: Any) -> Expr:
    """The larger of both, row by row; NaN propagates, and null."""
    return apply("maximum", a, b)


def key_of(tree: Expr) -> Hashable:
    """What a tree is, as nested tuples: equal for trees that are the same, whoever made them.

    >>> key_of(col("a") + 1) == key_of(col("a") + 1), key_of(lit(1)) == key_of(lit(1.0))
    (True, False)
    """
    found = tree.__dict__.get("_key")
    if found is None:
        found = _key(tree)
        object.__setattr__(tree, "_key", found)
    return found


def _key(tree: Expr) -> Hashable:
    if isinstance(tree, Column):
        return ("column", tree.name)
    if isinstance(tree, Constant):
        return ("constant", tree.kind, _value_key(tree.value))
    if isinstance(tree, Parameter):
        return ("parameter", tree.name)
    assert isinstance(tree, Apply)
    return (tree.operation, *map(key_of, tree.arguments), *map(_value_key, tree.options))


def _value_key(value: Any) -> Hashable:
    """Apart: 1, 1.0 and True; both zeros. Together: NaN and NaN."""
    if isinstance(value, np.generic):
        return (value.dtype.str, value.tobytes())
    return (type(value).__name__, repr(value))


def same(a: Expr, b: Expr) -> bool:
    """Are two trees the same, leaf by leaf? (``==`` makes an expression.)

    >>> same(col("a") + 1, col("a") + 1), same(col("a") + 1, 1 + col("a"))
    (True, False)
    """
    return key_of(a) == key_of(b)
