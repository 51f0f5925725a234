"""What is chosen, numbered or sorted of rows that have no order of their own, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.testing import run_ranks
from tests.plan.kit import Table, Tables, answer, on_ranks

RANKS = (1, 2, 3, 5)
TABLES = {
    "a": Table(
        {"k": "int64", "x": "int64", "t": "text"},
        [(7 * i % 5, i % 3, ("", "b", None, "abcdefghi")[i % 4]) for i in range(30)],
    ),
    "b": Table({"k": "int64", "y": "float64"}, [(i % 4, float(i // 4)) for i in range(12)] + [(1, 0.5)] * 3),
    "edges": Table({"src": "int64", "dst": "int64"}, [(i * i % 11, 3 * i % 13) for i in range(40)]),
}


def _ended(t: Tables) -> Dataset:
    """Rows of an iteration of indexed rows: they stand in the order of the index."""
    edges = t["edges"]
    first = edges.vertices("src", "dst", name="k").with_columns(x=ir.lit(1))

    def step(state: Dataset) -> Dataset:
        heard = edges.join(state, src="k").group_by(k="dst").agg(heard=ir.sum("x"))
        return state.select("k").left_join(heard, "k").select("k", x=(col("heard").fill_null(0) + 1) % 5)

    return ir.iterate(step, first, max_iterations=3)


UNORDERED: dict[str, Callable[[Tables], Dataset]] = {
    "join": lambda t: t["a"].join(t["b"], "k"),
    "join of shuffled": lambda t: t["a"].repartition("k").join(t["b"].repartition("k"), "k"),
    "full join": lambda t: t["a"].join(t["b"].select(k=col("k") + 2, y="y"), "k", "full"),
    "semi join": lambda t: t["a"].join(t["b"], "k", "semi"),
    "union": lambda t: t["a"].union(t["a"].filter(col("x") > 0), t["a"].limit(4)),
    "shuffled union": lambda t: t["a"].union(t["a"]).repartition("x"),
    "group": lambda t: t["a"].group_by("k", "t").agg(x=ir.sum("x")),
    "group here": lambda t: t["a"].repartition("k").group_by("k", "t").agg(x=ir.count()),
    "vertices": lambda t: t["edges"].vertices("src", "dst", name="k").with_columns(x=col("k") % 3),
    "iteration": _ended,
    "projected": lambda t: t["a"].join(t["b"], "k").filter(col("y") < 2).with_columns(z=col("x") + 1),
    "mapped": lambda t: t["a"].union(t["a"]).map_batches(lambda b: b, columns={"k": int, "x": int}),
}
ORDERED: dict[str, Callable[[Tables], Dataset]] = {
    "source": lambda t: t["a"],
    "sorted": lambda t: t["a"].sort("x"),
    "groups": lambda t: t["a"].group_by("k").map_groups(_first_of_each, columns={"k": int, "x": int}),
    "everywhere": lambda t: t["a"].limit(20).group_by("k").agg(x=ir.min("x")),
}
OPERATIONS: dict[str, Callable[[Dataset], Dataset]] = {
    "limit": lambda rows: rows.limit(4),
    "top": lambda rows: rows.top(5, "x"),
    "top few": lambda rows: rows.filter(col("x") < 2).top(3, ["x"], descending=False),
    "sample": lambda rows: rows.sample(3, seed=5),
    "row number": lambda rows: rows.with_row_number("n"),
    "sort": lambda rows: rows.sort("x", descending=True),
    "sorted limit": lambda rows: rows.sort("x").with_columns(w=col("x") * 2).limit(5),
    "sorted number": lambda rows: (
        rows.sort("x").filter(col("k") > 0).with_row_number("n").filter(col("n") < 6)
    ),
}


def _first_of_each(groups: Any) -> ir.Batch:
    first = groups.offsets[:-1]
    return ir.Batch(k=groups.keys["k"], x=groups.rows["x"][first])


def _all_of(made: str, size: int) -> dict[str, list[str]]:
    """What comes of each operation."""
    build = {**UNORDERED, **ORDERED}[made]

    def rows(group: Group, operation: str) -> list[str]:
        found = [str(row) for row in answer(group, OPERATIONS[operation](build(Tables(TABLES, group))))]
        return found if operation == "sort" else sorted(found)

    return run_ranks(size, lambda group: {name: rows(group, name) for name in OPERATIONS})[0]


@pytest.mark.parametrize("made", [*UNORDERED, *ORDERED])
def test_which_rows_and_numbers_come_out_does_not_depend_on_ranks(made: str) -> None:
    one = _all_of(made, 1)
    assert all(one.values())
    for size in RANKS if made in UNORDERED else (3,):
        many = _all_of(made, size) if size > 1 else one
        assert not [name for name in one if many[name] != one[name]], size


@pytest.mark.parametrize("operation", ["limit", "top", "sample", "sorted limit", "row number"])
def test_which_rows_are_chosen_does_not_depend_on_the_columns_asked_for(operation: str) -> None:
    """Columns of one handle, in several runs, are columns of the same rows."""

    def build(t: Tables) -> Dataset:
        joined = t["a"].join(t["b"], "k").with_row_number("id")  # tells rows apart
        rows = t["a"].select("k", "x").join(t["b"], "k").union(joined.select("k", "x", "y"))
        return OPERATIONS[operation](rows)

    def work(group: Group) -> tuple[list[Any], list[Any]]:
        rows = build(Tables(TABLES, group))
        whole, alone = answer(group, rows), answer(group, rows.select("y"))
        return sorted(row["y"] for row in whole), sorted(row["y"] for row in alone)

    for size in (1, 3):
        whole, alone = run_ranks(size, work)[0]
        assert whole == alone and whole


def test_first_rows_without_an_order_are_the_first_by_their_key_or_by_all_columns() -> None:
    def work(group: Group) -> tuple[Any, Any, Any]:
        t = Tables(TABLES, group)
        keyed = t["a"].group_by("k").agg(s=ir.sum("x")).limit(3).collect(group)["k"].tolist()
        joined = t["a"].join(t["b"], "k").select("y", "k").limit(3).collect(group)
        best = t["a"].join(t["b"], "k").select("k", "x", "y").top(3, "x").collect(group)
        return keyed, [joined[n].tolist() for n in ("y", "k")], [best[n].tolist() for n in ("k", "x", "y")]

    for size in (1, 3):
        keyed, joined, best = run_ranks(size, work)[0]
        assert keyed == [0, 1, 2]
        assert joined == [[0.0, 0.0, 0.0], [0, 0, 0]]
        assert best == [[0, 0, 0], [2, 2, 2], [0.0, 0.0, 1.0]]


def test_a_sample_is_drawn_of_all_rows_alike_also_where_many_are_equal() -> None:
    """Nine of ten rows are one value: a sample by the values of rows would have it once or ten times."""
    rows = ir.Dataset.from_local(None, x=np.r_[np.zeros(90, np.int64), np.arange(1, 11)])
    drawn = [rows.union(rows).sample(20, seed=s).to_numpy()["x"] for s in range(12)]
    zeros = [int((x == 0).sum()) for x in drawn]
    assert min(zeros) > 11 and 16 < np.mean(zeros) < 20


TIES = ("join", "join of shuffled", "union", "shuffled union")


@pytest.mark.parametrize("case", TIES)
def test_ties_of_argmin_and_argmax_go_to_the_smallest_value(case: str) -> None:
    def rows(t: Tables) -> Dataset:
        return UNORDERED[case](t).with_columns(u=col("t").fill_null("?"), f=0.5 - col("k"))

    def picked(t: Tables) -> Dataset:
        named = {n: ir.argmin(n, by="x") for n in ("k", "u", "f")}
        return rows(t).group_by(odd=col("k") % 2).agg(**named, most=ir.argmax("f", by="x"))

    def least(tied: list[Any], x: int, name: str) -> Any:
        return min(row[name] for row in tied if row["x"] == x)

    groups: dict[int, list[Any]] = {}
    for row in on_ranks(rows, TABLES, 1):
        groups.setdefault(row["k"] % 2, []).append(row)
    want = []
    for odd, group in groups.items():
        low, high = min(row["x"] for row in group), max(row["x"] for row in group)
        made = {n: least(group, low, n) for n in ("k", "u", "f")}
        want.append({"odd": odd, **made, "most": least(group, high, "f")})
    for size in RANKS:
        assert sorted(on_ranks(picked, TABLES, size), key=str) == sorted(want, key=str)
