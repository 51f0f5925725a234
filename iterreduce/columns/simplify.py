"""Expressions made simpler without changing what they give, and what follows from a column being null.

`fold_constants` computes what no row decides. It never widens or narrows a type (a constant that it makes has
a NumPy type of its own, which the columns beside it do not bend); a result may only be less nullable. A part
that cannot be typed stays as it is: the error is told where the tree is typed. `null_on_null` is what makes
an outer join an inner one.

Each rule is a function of a tree whose parts are simple already; `RULES` lists them by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.compute import NOTHING_GIVEN, compute, typed
from iterreduce.columns.expressions import Apply, Column, Constant, Expr, Parameter, apply, same
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.schema import Field
from iterreduce.columns.trees import rebuilt
from iterreduce.errors import SchemaError

Fields = Mapping[str, Field | None]
#: Operations that may hold something where an argument is null; all others are null there.
NOT_STRICT = ("and", "or", "where", "coalesce", "is_null", "is_in", "hash")


def fold_constants(tree: Expr, fields: Fields = NOTHING_GIVEN) -> Expr:
    """The tree with what no row decides computed; ``fields``: of its columns, as far as they are known.

    >>> from iterreduce.columns.expressions import col, lit
    >>> x = Field("fixed", np.dtype(np.float64))
    >>> fold_constants((col("x") > lit(1.5) * 2) & ~col("x").is_null(), {"x": x})
    (x > float64(3.0))
    """
    tree = rebuilt(tree, lambda part: fold_constants(part, fields))
    if not isinstance(tree, Apply):
        return tree
    if all(isinstance(part, Constant) for part in tree.arguments):
        return _computed(tree)
    field = _field(tree, fields)
    if field is None or field.shape or field.kind == "list":
        return tree
    if tree.operation not in NOT_STRICT and any(_is_null(part) for part in tree.arguments):
        return _null(field)
    rule = RULES.get(tree.operation)
    found = rule(tree, fields) if rule is not None else None
    return tree if found is None else _of_type(found, field, fields, tree)


def _computed(tree: Apply) -> Expr:
    """The value of an operation on constants, with a type of its own."""
    try:
        column, mask = compute(tree, Batch(row=np.zeros(1)))
    except SchemaError:
        return tree
    if mask is not None and not mask[0]:
        return _null(Field(column.kind if isinstance(column, Ragged) else "fixed", _dtype(column)))
    value = column[0]
    return Constant(value, value.dtype.str if isinstance(value, np.generic) else type(value).__name__)


def _dtype(column: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = column.values.dtype if isinstance(column, Ragged) else column.dtype
    return dtype


def _null(field: Field) -> Constant:
    return Constant(None, field.dtype.str if field.kind == "fixed" else field.kind)


def _field(tree: Expr, fields: Fields) -> Field | None:
    try:
        return typed(tree, fields)
    except SchemaError:
        return None


def _of_type(found: Expr, field: Field, fields: Fields, before: Expr) -> Expr:
    """What a rule found, if it has the type of what it stands for."""
    own = _field(found, fields)
    if own is None or (own.kind, own.dtype, own.shape) != (field.kind, field.dtype, field.shape):
        return before
    if isinstance(found, Constant) and field.kind == "fixed":
        if found.value is None:
            return _null(field)
        value = np.asarray(found.value, field.dtype)[()]
        return Constant(value, value.dtype.str)
    return found


def _is_null(tree: Expr) -> bool:
    return isinstance(tree, Constant) and tree.value is None


def _is(tree: Expr, truth: bool) -> bool:
    return isinstance(tree, Constant) and isinstance(tree.value, bool | np.bool) and bool(tree.value) is truth


def _and(tree: Apply, fields: Fields) -> Expr | None:
    return _logic(tree, neutral=True)


def _or(tree: Apply, fields: Fields) -> Expr | None:
    return _logic(tree, neutral=False)


def _logic(tree: Apply, neutral: bool) -> Expr | None:
    a, b = tree.arguments
    for one, other in ((a, b), (b, a)):
        if _is(one, neutral):
            return other
        if _is(one, not neutral):
            return one
    return a if same(a, b) else None


def _not(tree: Apply, fields: Fields) -> Expr | None:
    (inner,) = tree.arguments
    if isinstance(inner, Apply) and inner.operation in OPPOSITE:
        return apply(OPPOSITE[inner.operation], *inner.arguments)
    return inner.arguments[0] if isinstance(inner, Apply) and inner.operation == "not" else None


OPPOSITE = {"equal": "not_equal", "not_equal": "equal"}  # not < and >=: both are false of NaN


def _where(tree: Apply, fields: Fields) -> Expr | None:
    condition, then, otherwise = tree.arguments
    if isinstance(condition, Constant):
        return then if _is(condition, True) else otherwise
    return then if same(then, otherwise) else None


def _is_null_of(tree: Apply, fields: Fields) -> Expr | None:
    field = _field(tree.arguments[0], fields)
    return None if field is None or field.nullable else Constant(False, "bool")


def _coalesce(tree: Apply, fields: Fields) -> Expr | None:
    kept: list[Expr] = []
    for part in tree.arguments:
        if _is_null(part):
            continue
        kept.append(part)
        field = _field(part, fields)
        if field is not None and not field.nullable:
            break
    if not kept or len(kept) == len(tree.arguments):
        return None
    return kept[0] if len(kept) == 1 else tree.of(kept)


def _as_text(tree: Apply, fields: Fields) -> Expr | None:
    """A whole number compared as a text is compared as the number that the text says."""
    for cast, other in (tree.arguments, tree.arguments[::-1]):
        text = other.value if isinstance(other, Constant) else None
        if not isinstance(text, str) or not isinstance(cast, Apply) or cast.options != ("text",):
            continue
        number = cast.arguments[0]
        field = _field(number, fields) if cast.operation == "cast" else None
        if field is None or field.kind != "fixed" or field.dtype.kind not in "iu" or not text.isascii():
            return None
        if not text.removeprefix("-").isdigit() or len(text) > 20 or str(int(text)) != text:
            return None  # no number is written so
        limits = np.iinfo(field.dtype)
        if limits.min <= int(text) <= limits.max:
            return tree.of((number, Constant(field.dtype.type(int(text)), field.dtype.str)))
    return None


RULES: dict[str, Callable[[Apply, Fields], Expr | None]] = {
    "equal": _as_text,
    "not_equal": _as_text,
    "and": _and,
    "or": _or,
    "not": _not,
    "where": _where,
    "is_null": _is_null_of,
    "coalesce": _coalesce,
}


# ---------------------------------------------------------------------- what nulls decide

#: What a value may be: null, false, or anything else.
Outcomes = frozenset[str]
ANY_OUTCOME: Outcomes = frozenset(("null", "false", "some"))


def null_on_null(tree: Expr, names: Collection[str]) -> bool:
    """Is it surely null or false in rows in which all these columns are null?

    >>> from iterreduce.columns.expressions import col
    >>> null_on_null((col("a") > 1) & (col("b") > 1), ["a"]), null_on_null(col("a").is_null(), ["a"])
    (True, False)
    """
    return "some" not in outcomes(tree, frozenset(names))


def outcomes(tree: Expr, nulls: frozenset[str]) -> Outcomes:
    """What it may be in a row in which these columns are null."""
    if isinstance(tree, Column):
        return frozenset(("null",)) if tree.name in nulls else ANY_OUTCOME
    if isinstance(tree, Constant):
        return frozenset(("null" if tree.value is None else "false" if _is(tree, False) else "some",))
    if isinstance(tree, Parameter):
        return ANY_OUTCOME
    assert isinstance(tree, Apply)
    parts = [outcomes(part, nulls) for part in tree.arguments]
    if tree.operation in LAZY:
        return frozenset(LAZY[tree.operation](*parts))
    if tree.operation in TRUTHS:
        return frozenset(TRUTHS[tree.operation](row) for row in product(*parts))
    if tree.operation == "is_in" and not tree.options:
        return frozenset(("false",))
    return frozenset(("null",)) if any(part == {"null"} for part in parts) else ANY_OUTCOME


def _both(row: tuple[str, ...]) -> str:
    return "false" if "false" in row else "null" if "null" in row else "some"


def _either(row: tuple[str, ...]) -> str:
    return "some" if "some" in row else "null" if "null" in row else "false"


TRUTHS: dict[str, Callable[[tuple[str, ...]], str]] = {
    "and": _both,
    "or": _either,
    "not": lambda row: {"null": "null", "false": "some", "some": "false"}[row[0]],
    "is_null": lambda row: "some" if row[0] == "null" else "false",
    "hash": lambda row: "some",
}


def _where_outcomes(condition: Outcomes, then: Outcomes, otherwise: Outcomes) -> Iterator[str]:
    if "some" in condition:
        yield from then
    if condition - {"some"}:
        yield from otherwise


def _coalesce_outcomes(*parts: Outcomes) -> Iterator[str]:
    for part in parts:
        yield from part - {"null"}
        if "null" not in part:
            return
    yield "null"


LAZY: dict[str, Callable[..., Iterator[str]]] = {"where": _where_outcomes, "coalesce": _coalesce_outcomes}
