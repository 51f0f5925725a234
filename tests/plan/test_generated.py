"""Plans drawn at random: the engine's rows are those of the oracle, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce import col
from iterreduce.dataset import Dataset
from iterreduce.plan.nodes import Node
from tests.plan import oracle
from tests.plan.kit import Table, Tables, on_ranks, wanted

KINDS = {"k": "int64", "j": "int64", "x": "float64", "s": "text"}
Code = tuple[int, int, int, int]
MOST_JOINS = 3


def tables(nan: bool = True) -> st.SearchStrategy[dict[str, Table]]:
    """Two tables of the same columns: few values, hence duplicates; NaN, and nulls in the second."""
    small = st.integers(-2, 3)
    half = st.integers(-3, 5).map(lambda n: n / 2)
    half = st.one_of(half, st.sampled_from([math.nan, -0.0])) if nan else half
    text = st.sampled_from(["", "a", "b", "Ä"])
    some = st.lists(st.tuples(small, small, half, text), max_size=6)
    parts = [st.one_of(st.none(), part) for part in (small, small, half, text)]
    return st.fixed_dictionaries(
        {
            "a": some.map(lambda rows: Table(KINDS, rows)),
            "b": st.lists(st.tuples(*parts), max_size=6).map(lambda rows: Table(KINDS, rows)),
        }
    )


CODES: st.SearchStrategy[list[Code]] = st.lists(
    st.tuples(*[st.integers(0, 59)] * 4),  # type: ignore[arg-type]
    min_size=1,
    max_size=12,
)


def names(data: Dataset, kind: str) -> list[str]:
    """The columns of a kind: i, f or text."""
    fields = data.node.fields or {}
    found = [
        n for n, f in fields.items() if f is not None and ("t" if f.kind == "text" else f.dtype.kind) == kind
    ]
    return found


def pick(of: Sequence[Any], code: int) -> Any:
    return of[code % len(of)] if of else None


def number(data: Dataset, code: int) -> Any:
    """An expression of numbers."""
    column = pick([*names(data, "i"), *names(data, "f")], code)
    if column is None:
        return ir.lit(code % 3)
    c = col(column)
    return pick(
        [
            c + 1,
            c - 2,
            c * 2,
            -c,
            c / 4,
            c // 2 if column in names(data, "i") else c + 0.5,
            c % 3 if column in names(data, "i") else abs(c),
            c.fill_null(1),
            ir.where(c > 0, c, -c),
            ir.where(c > 1, c, ir.lit(None)),
            ir.minimum(c, 1),
            c + 1.5,
        ],
        code // 4,
    )


def condition(data: Dataset, code: int) -> Any:
    """A condition: also of nulls, of text, of several columns."""
    numbers, texts = [*names(data, "i"), *names(data, "f")], names(data, "t")
    found: list[Any] = []
    for c in map(col, numbers):
        found += [
            c > 0,
            c <= 1,
            c.is_null(),
            c.is_not_null(),
            c == 1,
            (c > -1) & (c < 2),
            ~(c > 1),
            c.is_in([0, 1, 2]),
        ]
    for c in map(col, texts):
        found += [c == "a", c != "b", c.is_null(), c > "a"]
    if len(numbers) > 1:
        a, b = col(numbers[0]), col(numbers[-1])
        found += [a < b, (a > 0) | (b > 0), (a + b > 1) | a.is_null()]
    return pick(found, code) if found else ir.lit(True) == (code % 2 == 0)


AGGREGATORS: list[Callable[[Any], Any]] = [ir.sum, ir.min, ir.max, ir.mean, ir.count]


def aggregates(data: Dataset, a: int, b: int) -> dict[str, Any]:
    """Two aggregates, of columns and of expressions."""
    out = {"n": ir.count()}
    column = pick([*names(data, "i"), *names(data, "f")], a)
    if column is not None:
        out["g"] = AGGREGATORS[a // 5 % 5](column)
        out["h"] = AGGREGATORS[b % 4](number(data, b))
    return out


def one_step(code: Code, pool: list[Dataset], joins: int) -> Dataset:
    """One operation on one of the datasets that there are."""
    what, a, b, c = code
    data = pool[-1 - a % min(3, len(pool))]
    columns = list(data.columns or ())
    operation = OPERATIONS[what % len(OPERATIONS)]
    if operation is _join and joins >= MOST_JOINS:
        operation = _group
    return operation(data, columns, pool, (a, b, c))


Codes3 = tuple[int, int, int]


def _select(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    _, b, c = code
    kept = columns[: 1 + b % len(columns)]
    return data.select(
        *kept, **{pick(["x", "k", "z"], c): number(data, b)} if pick(["x", "k", "z"], c) not in kept else {}
    )


def _with(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    _, b, c = code
    return data.with_columns(**{pick(["x", "y", *names(data, "i")], c): number(data, b)})


def _rename(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    _, b, c = code
    one, two = pick(columns, b), pick(columns, c)
    return (
        data.rename(**{one: two, two: one})
        if one != two
        else data.rename(**{one: f"{one[:3]}r"})
        if f"{one[:3]}r" not in columns
        else data
    )


def _filter(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    return data.filter(condition(data, code[1]))


def _group(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    a, b, c = code
    first = c // 2 % len(columns)
    keys = (columns[first:] + columns[:first])[: 1 + c % 2]
    made = {n: g for n, g in aggregates(data, a, b).items() if n not in keys}
    return data.group_by(*keys).agg(**made) if made else data.distinct(*keys)


def _distinct(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    return data.distinct() if code[1] % 2 else data.distinct(*columns[: 1 + code[2] % len(columns)])


def _join(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    a, b, c = code
    other = pool[b % len(pool)]
    how = pick(["inner", "left", "right", "full", "semi", "anti"], c)
    kind = pick(["i", "i", "f", "t"], a)
    mine, theirs = names(data, kind), names(other, kind)
    if not mine or not theirs:
        return data.union(data)
    on = {pick(mine, b // 3): pick(theirs, c // 6)}
    suffix = next(
        s
        for s in ("_r", "_q", "_p", "_o")
        if not any(n.endswith(s) for n in [*columns, *(other.columns or ())])
    )
    return data.join(other, how=how, suffix=suffix, **on)


def _union(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    kinds = {n: (f.kind, f.dtype) for n, f in (data.node.fields or {}).items() if f is not None}
    same = [
        d
        for d in pool
        if {n: (f.kind, f.dtype) for n, f in (d.node.fields or {}).items() if f is not None} == kinds
    ]
    return data.union(pick(same, code[1]).filter(condition(data, code[2])))


def _top(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    return data.top(code[1] % 5, columns, descending=bool(code[2] % 2))


def _number(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    a, b, c = code
    other = pool[b % len(pool)]
    column = pick([*names(other, "i"), *names(other, "f")], c)
    n = other.count() if column is None or c % 3 == 0 else pick([other.sum, other.max, other.mean], c)(column)
    return data.filter(number(data, a) <= n) if c % 2 else data.with_columns(x=number(data, a) + n)


def _agg(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    return data.agg(**aggregates(data, code[1], code[2]))


def _repartition(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    return data.repartition(pick(columns, code[1]))


def _everywhere(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    return data.top(1000, columns)


def _sort(data: Dataset, columns: list[str], pool: list[Dataset], code: Codes3) -> Dataset:
    return data.sort(pick(columns, code[1]), descending=bool(code[2] % 2))


OPERATIONS: list[Callable[[Dataset, list[str], list[Dataset], Codes3], Dataset]] = [
    _select, _with, _rename, _filter, _filter, _group, _group, _distinct, _join, _join, _join, _union,
    _top, _number, _number, _agg, _repartition, _everywhere, _sort,
]  # fmt: skip


def plan_of(codes: Sequence[Code]) -> Callable[[Tables], Dataset]:
    """The plan that codes stand for; the same whatever the rows are."""

    def build(t: Tables) -> Dataset:
        pool = [t["a"], t["b"]]
        joins = 0
        for code in codes:
            made = one_step(code, pool, joins)
            joins += _joins(made.node) > 0
            pool.append(made)
        return pool[-1]

    return build


def _joins(node: Node) -> bool:
    return any("join" in part.label for part in (node, *node.inputs))


@settings(max_examples=50, deadline=None)
@given(tables(), CODES, st.sampled_from(["even", "first", "last"]))
def test_a_plan_drawn_at_random_gives_the_rows_that_it_means(
    rows: dict[str, Table], codes: list[Code], deal: str
) -> None:
    build = plan_of(codes)
    want = wanted(build, rows)
    for size in (1, 3):
        oracle.same_rows(on_ranks(build, rows, size, deal), want)
