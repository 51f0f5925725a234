"""Several states of an iteration, read when it has ended: of one that runs before, and of one in a body."""

from __future__ import annotations

from collections.abc import Callable

import iterreduce as ir
from iterreduce import col
from iterreduce.dataset import Dataset
from iterreduce.testing import run_ranks
from tests.plan import oracle
from tests.plan.kit import Table, Tables, agrees, answer


def _early(t: Tables, seen: Callable[[ir.Batch], ir.Batch]) -> dict[str, Dataset]:
    rows = t["heat"].group_by("k").agg(x=ir.sum("x"))

    def step(u: Dataset, v: Dataset) -> dict[str, Dataset]:
        told = v.map_batches(seen, columns={"k": int, "x": float}).with_columns(x=col("x") * 2)
        added = u.left_join(v.rename(x="y"), "k").select("k", x=col("x") + col("y"))
        return {"u": added, "v": told.group_by("k").agg(x=ir.sum("x"))}

    return ir.iterate(step, {"u": rows, "v": rows}, max_iterations=3, name="early")


def _last(t: Tables, seen: Callable[[ir.Batch], ir.Batch]) -> Dataset:
    """Both states of an earlier iteration are read, one of them by another iteration before the last too."""
    early = _early(t, seen)
    y, z = early["u"].rename(x="y"), early["v"].rename(x="z")
    middle = ir.iterate(
        lambda s: s.left_join(z, "k").select("k", x=col("x") + col("z")),
        early["u"],
        max_iterations=2,
        name="middle",
    )
    both = y.join(z, "k").join(middle.rename(x="m"), "k")
    return ir.iterate(
        lambda s: s.left_join(both, "k").select("k", x=col("x") + col("y") * col("z") - col("m")),
        early["v"],
        max_iterations=2,
        name="last",
    )


HEAT = {"heat": Table({"k": "int64", "x": "float64"}, [(k % 5, k + 0.5) for k in range(9)])}


def test_an_earlier_iteration_runs_once_however_many_of_its_states_are_read() -> None:
    calls: list[int] = []

    def seen(rows: ir.Batch) -> ir.Batch:
        calls.append(len(rows))
        return rows

    def quiet(rows: ir.Batch) -> ir.Batch:
        return rows

    want = agrees(lambda t: _last(t, quiet), HEAT)
    got = run_ranks(1, lambda group: answer(group, _last(Tables(HEAT, group), seen)))[0]
    oracle.same_rows(got, want)
    assert len(calls) == 3  # its iterations


def _two_inside(t: Tables) -> Dataset:
    rows = t["heat"].group_by("k").agg(x=ir.sum("x"))

    def step(u: Dataset, v: Dataset) -> dict[str, Dataset]:
        added = u.left_join(v.rename(x="y"), "k").select("k", x=col("x") + col("y"))
        return {"u": added, "v": v.with_columns(x=col("x") * 0.5)}

    def outer(state: Dataset) -> Dataset:
        ended = ir.iterate(step, {"u": state, "v": rows}, max_iterations=3, name="inner")
        met = ended["u"].left_join(ended["v"].rename(x="y"), "k")
        return met.select("k", x=col("x") - col("y"))

    return ir.iterate(outer, rows, max_iterations=2)


def test_several_states_of_an_iteration_in_the_body_are_given_back() -> None:
    agrees(_two_inside, HEAT)
