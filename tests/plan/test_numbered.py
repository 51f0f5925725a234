"""Row numbers: each once, wherever the rows come from, and good as a key of a state."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.testing import run_ranks
from tests.plan.kit import RANKS, Table, Tables, answer

TABLES = {"a": Table({"x": "float64", "k": "int64"}, [(float(x), x % 5) for x in range(12)])}
MADE: dict[str, Callable[[Dataset], Dataset]] = {
    "filter": lambda a: a.filter(col("x") > 3),
    "group": lambda a: a.group_by("k").agg(x=ir.sum("x")),
    "join": lambda a: a.join(a.select("k", y="x"), "k"),
    "full join": lambda a: a.join(a.filter(col("x") > 6).select(k=col("k") + 3, y="x"), "k", "full"),
    "union": lambda a: a.union(a),
    "map": lambda a: a.map_batches(lambda rows: rows, columns={"x": float, "k": int}),
    "limit": lambda a: a.limit(7),
    "sort": lambda a: a.sort("x"),
    "repartition": lambda a: a.repartition("k"),
    "numbered twice": lambda a: a.with_row_number("before").filter(col("before") > 2),
}


@pytest.mark.parametrize("made", MADE)
def test_each_number_from_zero_stands_once(made: str) -> None:
    def work(group: Group) -> list[int]:
        numbered = MADE[made](Tables(TABLES, group)["a"]).with_row_number("n")
        return [row["n"] for row in answer(group, numbered)]

    for size in RANKS:
        numbers = run_ranks(size, work)[0]
        assert sorted(numbers) == list(range(len(numbers))) and numbers, size


def _ranked(a: Dataset) -> Dataset:
    """The state is numbered anew in every iteration, by the place of its rows."""

    def step(state: Dataset) -> Dataset:
        groups = state.group_by("k").agg(s=ir.sum("x")).sort("s").with_row_number("place")
        added = state.join(groups, "k").select("n", "k", x=col("x") + col("place"))
        return added.sort("x", "n").select("k", "x").with_row_number("n").select("n", "k", "x")

    return ir.iterate(step, a.sort("x").with_row_number("n").select("n", "k", "x"), max_iterations=3)


def _by_number(a: Dataset) -> Dataset:
    """The number is the key of what groups are joined with."""
    rows = a.group_by("k").agg(x=ir.sum("x")).sort("k").with_row_number("n").select("n", "x")

    def step(state: Dataset) -> Dataset:
        before = state.select(n=col("n") + 1, y="x")
        return state.left_join(before, "n").select("n", x=col("x") + col("y").fill_null(0.0))

    return ir.iterate(step, rows, max_iterations=3)


@pytest.mark.parametrize("build", [_ranked, _by_number])
def test_a_number_is_a_key_of_a_state_on_any_number_of_ranks(build: Callable[[Dataset], Dataset]) -> None:
    def work(group: Group) -> list[str]:
        return sorted(map(str, answer(group, build(Tables(TABLES, group)["a"]))))

    one, *others = (run_ranks(size, work)[0] for size in RANKS)
    assert all(rows == one for rows in others) and one


def test_a_sample_may_be_taken_of_what_an_iteration_makes() -> None:
    def work(group: Group) -> list[float]:
        a = Tables(TABLES, group)["a"]

        def step(state: Dataset) -> Dataset:
            made = a.join(state, "k").select("x", "k").sample(4, seed=3)
            return made.group_by("k").agg(x=ir.sum("x"))

        found = ir.iterate(step, a.distinct("k").with_columns(x=ir.lit(0.0)), max_iterations=2)
        return sorted(row["x"] for row in answer(group, found))

    assert sum(map(bool, run_ranks(1, work)[0])) > 0
    assert len({str(run_ranks(size, work)[0]) for size in (1, 2, 5)}) == 1


def test_a_key_that_the_body_does_not_keep_is_no_key() -> None:
    """The state's numbers are unique in its first rows only; the body joins by them in each iteration."""

    def work(group: Group) -> list[tuple[int, int]]:
        numbered = Tables(TABLES, group)["a"].distinct("k").sort("k").with_row_number("n")

        def step(state: Dataset) -> Dataset:
            return numbered.join(state, n="n", suffix="_before").select("k", n=col("n") // 2)

        found = ir.iterate(step, numbered, max_iterations=3)
        return sorted((row["k"], row["n"]) for row in answer(group, found))

    for size in (1, 3):
        assert run_ranks(size, work)[0] == [(0, 0)] * 4 + [(1, 0)]
