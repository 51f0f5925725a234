"""Expressions drawn at random, each with a slow function of one row for what it gives (None: null)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import Expr, apply
from iterreduce.columns.ragged import Ragged

Row = Mapping[str, Any]
Pair = tuple[Expr, Callable[[Row], Any]]

COLUMNS = {"int": ("i", "j"), "float": ("f", "g"), "bool": ("p", "q"), "text": ("s", "t")}
TEXTS = ("", "a", "B", " ab ", "Äß", "\u0130x", "zürich", "abab", "7", "\t7\u2003")
CONSTANTS: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-4, 4),
    "float": st.sampled_from([0.0, -0.0, 1.5, -2.0, 1e300, math.inf, math.nan]),
    "bool": st.booleans(),
    "text": st.sampled_from(TEXTS),
}
NUMPY = {"int": np.int64, "float": np.float64, "bool": np.bool_, "text": object}


def batches() -> st.SearchStrategy[Batch]:
    """Rows of all columns; the second of each type has nulls, over anything."""
    return st.integers(0, 7).flatmap(_of_rows)


def _of_rows(n: int) -> st.SearchStrategy[Batch]:
    parts: dict[str, Any] = {}
    for kind, (plain, nullable) in COLUMNS.items():
        for name in (plain, nullable):
            parts[name] = st.lists(CONSTANTS[kind], min_size=n, max_size=n)
        parts[f"{nullable}?"] = st.lists(st.booleans(), min_size=n, max_size=n)
    return st.fixed_dictionaries(parts).map(_made)


def _made(parts: dict[str, list[Any]]) -> Batch:
    columns, valid = {}, {}
    for kind, (plain, nullable) in COLUMNS.items():
        for name in (plain, nullable):
            rows = parts[name]
            columns[name] = _texts(rows) if kind == "text" else np.array(rows, NUMPY[kind])
        valid[nullable] = np.array(parts[f"{nullable}?"], bool)
    return Batch.from_dict(columns, valid)


def _texts(rows: list[str]) -> Ragged:
    nothing = Ragged(np.zeros(1, np.int64), np.zeros(0, np.uint8), "text")
    return Ragged.from_list(rows) if rows else nothing


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """Python rows, None for null."""
    return [
        {n: None if (m := batch.valid(n)) is not None and not m[r] else batch[n][r] for n in batch.names}
        for r in range(len(batch))
    ]


def trees(kind: str, depth: int = 3) -> st.SearchStrategy[Pair]:
    """Expressions of a kind of values."""
    if not depth:
        return st.one_of(_column(kind), _column(kind), _constant(kind))
    less = {k: st.deferred(lambda k=k: trees(k, depth - 1)) for k in COLUMNS}
    choices = [_column(kind), _where(kind, less), _coalesce(kind, less)]
    return st.one_of(*choices, *(_operation(*spec, less) for spec in OPERATIONS if spec[1] == kind))


def _column(kind: str) -> st.SearchStrategy[Pair]:
    return st.sampled_from(COLUMNS[kind]).map(lambda name: (ir.col(name), lambda row: row[name]))


def _constant(kind: str) -> st.SearchStrategy[Pair]:
    value = CONSTANTS[kind].map(lambda v: (ir.lit(v), lambda row: NUMPY[kind](v) if kind != "text" else v))
    return st.one_of(value, st.just((ir.lit(None).cast(KINDS[kind]), lambda row: None)))


KINDS: dict[str, Any] = {"int": "int64", "float": "float64", "bool": "bool", "text": str}


def _where(kind: str, less: dict[str, st.SearchStrategy[Pair]]) -> st.SearchStrategy[Pair]:
    def made(parts: tuple[Pair, Pair, Pair]) -> Pair:
        (c, fc), (a, fa), (b, fb) = parts
        return ir.where(c, a, b), lambda row: fa(row) if fc(row) else fb(row)

    return st.tuples(less["bool"], less[kind], less[kind]).map(made)


def _coalesce(kind: str, less: dict[str, st.SearchStrategy[Pair]]) -> st.SearchStrategy[Pair]:
    def made(parts: tuple[Pair, Pair]) -> Pair:
        (a, fa), (b, fb) = parts
        return ir.coalesce(a, b), lambda row: fb(row) if (found := fa(row)) is None else found

    return st.tuples(less[kind], less[kind]).map(made)


def _operation(
    name: str,
    kind: str,
    kinds: tuple[str, ...],
    build: Callable[..., Expr],
    slow: Callable[..., Any],
    less: dict[str, st.SearchStrategy[Pair]],
) -> st.SearchStrategy[Pair]:
    def made(parts: tuple[Pair, ...]) -> Pair:
        functions = [function for _, function in parts]
        return build(*(tree for tree, _ in parts)), lambda row: slow(*(f(row) for f in functions))

    return st.tuples(*(less[k] for k in kinds)).map(made)


def strict(function: Callable[..., Any]) -> Callable[..., Any]:
    """Null where an argument is."""

    def slow(*values: Any) -> Any:
        if any(value is None for value in values):
            return None
        with np.errstate(all="ignore"):
            return function(*values)

    return slow


def _and(a: Any, b: Any) -> Any:
    if (a is not None and not a) or (b is not None and not b):
        return False
    return None if a is None or b is None else True


def _or(a: Any, b: Any) -> Any:
    if a or b:
        return True
    return None if a is None or b is None else False


def _to_int(x: Any) -> Any:
    return int(x) if math.isfinite(x) and -(2.0**63) <= math.trunc(x) < 2.0**63 else None


def _parsed(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return None


def _sample(x: Any) -> Any:
    return True if x in (1, -2) else None


def _spec(kind: str, kinds: tuple[str, ...], build: Callable[..., Expr], slow: Callable[..., Any]) -> Any:
    return ("", kind, kinds, build, slow)


_ii, _ff, _tt, _bb = ("int", "int"), ("float", "float"), ("text", "text"), ("bool", "bool")
_COMPARISONS: list[tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = [
    (lambda a, b: a < b, lambda a, b: a < b),
    (lambda a, b: a <= b, lambda a, b: a <= b),
    (lambda a, b: a > b, lambda a, b: a > b),
    (lambda a, b: a >= b, lambda a, b: a >= b),
    (lambda a, b: a == b, lambda a, b: a == b),
    (lambda a, b: a != b, lambda a, b: a != b),
]
OPERATIONS = [
    *(
        _spec("bool", kinds, build, strict(slow))
        for kinds in (_ii, _ff, _tt, ("int", "float"))
        for build, slow in _COMPARISONS
    ),
    _spec("int", _ii, lambda a, b: a + b, strict(lambda a, b: a + b)),
    _spec("int", _ii, lambda a, b: a - b, strict(lambda a, b: a - b)),
    _spec("int", _ii, lambda a, b: a * b, strict(lambda a, b: a * b)),
    _spec("int", _ii, lambda a, b: a // b, strict(lambda a, b: int(a) // int(b) if b else None)),
    _spec("int", _ii, lambda a, b: a % b, strict(lambda a, b: int(a) % int(b) if b else None)),
    _spec("int", ("int",), lambda a: -a, strict(lambda a: -a)),
    _spec("int", ("int",), abs, strict(abs)),
    _spec("int", _ii, ir.minimum, strict(min)),
    _spec("int", ("float",), lambda a: a.cast("int64"), strict(_to_int)),
    _spec("int", ("text",), lambda a: a.str.length(), strict(len)),
    _spec("int", ("text",), lambda a: a.cast("int64"), strict(_parsed)),
    _spec("float", _ii, lambda a, b: a / b, strict(lambda a, b: np.float64(a) / np.float64(b))),
    _spec("float", _ff, lambda a, b: a + b, strict(lambda a, b: a + b)),
    _spec("float", _ff, lambda a, b: a * b, strict(lambda a, b: a * b)),
    _spec("float", _ff, lambda a, b: a / b, strict(lambda a, b: a / b)),
    _spec("float", ("float",), np.sqrt, strict(np.sqrt)),
    _spec("float", ("float",), np.floor, strict(np.floor)),
    _spec("float", ("int",), lambda a: a.cast("float64"), strict(np.float64)),
    _spec("bool", _bb, lambda a, b: a & b, _and),
    _spec("bool", _bb, lambda a, b: a | b, _or),
    _spec("bool", _bb, lambda a, b: a ^ b, strict(lambda a, b: bool(a) != bool(b))),
    _spec("bool", ("bool",), lambda a: ~a, strict(lambda a: not a)),
    _spec("bool", ("int",), lambda a: a.is_null(), lambda a: a is None),
    _spec("bool", ("text",), lambda a: a.is_not_null(), lambda a: a is not None),
    _spec("bool", ("float",), lambda a: a.is_nan(), strict(math.isnan)),
    _spec("bool", ("int",), lambda a: a.is_in([1, -2, 3]), strict(lambda a: a in (1, -2, 3))),
    _spec("bool", ("int",), lambda a: a.is_in([1, None, -2]), strict(_sample)),
    _spec("bool", ("text",), lambda a: a.is_in(["a", "B", "Äß"]), strict(lambda a: a in ("a", "B", "Äß"))),
    _spec("bool", ("text",), lambda a: a.str.contains("b"), strict(lambda a: "b" in a)),
    _spec("bool", ("text",), lambda a: a.str.starts_with("ab"), strict(lambda a: a.startswith("ab"))),
    _spec("bool", ("text",), lambda a: a.str.ends_with("ab"), strict(lambda a: a.endswith("ab"))),
    _spec("bool", ("int",), lambda a: a.between(-1, 2), strict(lambda a: -1 <= a <= 2)),
    _spec("text", _tt, lambda a, b: a + b, strict(lambda a, b: a + b)),
    _spec("text", _tt, lambda a, b: a.str.concat("-", b), strict(lambda a, b: f"{a}-{b}")),
    _spec("text", ("text",), lambda a: a.str.lower(), strict(str.lower)),
    _spec("text", ("text",), lambda a: a.str.upper(), strict(str.upper)),
    _spec("text", ("text",), lambda a: a.str.strip(), strict(str.strip)),
    _spec("text", ("text",), lambda a: a.str.slice(1, 2), strict(lambda a: a[1:][:2])),
    _spec("text", ("text",), lambda a: a.str.slice(-2), strict(lambda a: a[-2:])),
    _spec("text", ("int",), lambda a: a.cast(str), strict(lambda a: str(int(a)))),
    _spec("bool", ("int",), lambda a: apply("not", a.is_null()), lambda a: a is not None),
]
