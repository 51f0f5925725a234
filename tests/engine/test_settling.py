"""Shuffles that settle, or give what improves: rolled back whole, on states in any order; wrong uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from iterreduce import linksettle
from iterreduce.collectives import Group
from iterreduce.columns.aggregators import Aggregator, count, max_, min_, sum_
from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import col
from iterreduce.driver import LoopRun
from iterreduce.errors import IterReduceError, SchemaError, UsageError
from iterreduce.fixpoint import Empty, MaxIterations, Until
from iterreduce.loop import Index, Joined, Local, Loop, Patch, Replace, Shuffle, Sink, State, Superstep
from iterreduce.options import Options
from iterreduce.testing import run_ranks
from tests.engine.kit import local, raised, rows_of

N = 60
FAR = 10**6


def roads(seed: int = 3, n: int = 150) -> Batch:
    rng = np.random.default_rng(seed)
    src, dst = rng.integers(0, N, n), rng.integers(0, N, n)
    return Batch(src=src, dst=dst, length=rng.integers(1, 9, n))


def towns(order: int = 0) -> Batch:
    """All that roads may lead to, and some that none does; the first is where ways begin."""
    names = np.random.default_rng(order).permutation(N + 5) if order else np.arange(N + 5)
    return Batch(town=names, far=np.where(names == 0, 0, FAR))


def distances(edges: Batch, given: Batch | None = None) -> list[tuple[int, int]]:
    rows = towns() if given is None else given
    far = dict(zip(rows["town"].tolist(), rows["far"].tolist(), strict=True))
    for _ in far:
        for a, b, length in zip(*(edges[name].tolist() for name in ("src", "dst", "length")), strict=True):
            far[b] = min(far[b], far[a] + length)
    return sorted(far.items())


def program(
    group: Group,
    edges: Batch,
    given: Batch,
    combine: dict[str, Aggregator] | None = None,
    most: int = 1000,
    watch: Any = None,
    **options: Any,
) -> Loop:
    """Ways from the first town."""

    def better(heard: Batch) -> Batch:
        if watch is not None:
            watch()
        return heard.drop("told")

    def untold(heard: Batch) -> Batch:
        return heard.take(np.flatnonzero(~heard["told"])).drop("told")

    settled: dict[str, Any] = {
        "rows": "links",
        "key": ("dst",),
        "into": "heard",
        "combine": combine or {"far": min_(col("far") + col("length"))},
        "onto": "towns",
        "missing": "drop",
        "touched": True,
        "joined": Joined("active", "src"),
        "settle": "told",
    }
    stages: tuple[Any, ...] = (
        Shuffle(**settled | options),
        Local(better, ("heard",), "better", cut="share"),
        Local(untold, ("heard",), "next", cut="share"),
    )
    writes = Patch("towns", "better"), Replace("active", "next")
    if options.get("improves"):
        seen = Local(
            lambda rows: better(rows.with_columns(told=rows["far"])), ("heard",), "seen", cut="share"
        )
        watched = (seen,) if watch else ()
        stages = (Shuffle(**settled | {"settle": ""} | options), *watched)
        writes = Patch("towns", "heard"), Replace("active", "heard")
    step = Superstep("step", stages, writes)
    first = Local(lambda t: t.take(np.flatnonzero(np.abs(t["far"]) < FAR)), ("given",), "first")
    states = {"towns": State("given", ("town",)), "active": State("first", ("town",))}
    return Loop(
        "ways",
        {"edges": local(edges, group), "given": local(given, group)},
        states,
        (step,),
        Until((Empty(table="active"), MaxIterations(most))),
        "towns",
        prepare=(Index("edges", {"src": "keys", "dst": "keys"}, "links", {"keys": "town"}), first),
    )


def ways(group: Group, run: LoopRun) -> list[tuple[int, int]]:
    return sorted(rows_of(group, run.tables["towns"]))


@pytest.mark.parametrize("improves", [False, True])
def test_a_state_in_any_order_with_further_rows_settles(ranks: int, improves: bool) -> None:
    def check(group: Group) -> None:
        run = LoopRun(program(group, roads(), towns(order=4), improves=improves), group)
        run.run()
        assert ways(group, run) == distances(roads())

    run_ranks(ranks, check)


def test_rows_that_the_state_lacks_are_left_out(ranks: int) -> None:
    edges = Batch(src=np.array([0, 1, 0, 3]), dst=np.array([1, 2, 3, 4]), length=np.array([1, 1, 5, 1]))
    given = Batch(town=np.array([0, 2, 3, 4]), far=np.array([0, FAR, FAR, FAR]))

    def check(group: Group) -> None:
        run = LoopRun(program(group, edges, given), group)
        run.run()
        assert ways(group, run) == [(0, 0), (2, FAR), (3, 5), (4, 6)]  # no way leads through 1

    run_ranks(ranks, check)


def test_portions_of_any_size_lead_to_the_same_end(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for portion in (1, 7, 1 << 20):
        monkeypatch.setattr(linksettle, "LEAST_EDGES", portion)
        monkeypatch.setattr(linksettle, "ROUNDS", 0)
        monkeypatch.setattr(linksettle, "LEAST_SHARE", portion)
        monkeypatch.setattr(linksettle, "SHARE", 1 << 40)

        def check(group: Group) -> int:
            run = LoopRun(program(group, roads(), towns()), group)
            run.run()
            assert ways(group, run) == distances(roads())
            return run.iteration

        taken += run_ranks(ranks, check)[:1]
    assert taken == sorted(taken, reverse=True) and taken[0] > taken[-1]


@pytest.mark.parametrize(("sign", "improves"), [(1, True), (-1, True), (1, False), (-1, False)])
@pytest.mark.parametrize("starts", [1, 4])
def test_ranks_that_say_one_value_each_find_how_many_steps_it_takes(
    ranks: int, starts: int, sign: int, improves: bool
) -> None:
    edges, given = roads(5), towns()
    given["far"][:starts] = 3 * np.arange(starts)  # what one rank says, and when, is not what another says
    known = dict(distances(edges.with_columns(length=np.ones_like(edges["length"])), given))
    combine = (min_ if sign > 0 else max_)(col("far") + sign)
    failing = {0} if starts > 1 else set()

    def check(group: Group) -> None:
        def watch() -> None:  # in the second superstep, or the only one, which is then done again
            if group.rank in failing and run.iteration == int(improves):
                failing.remove(group.rank)
                raise ValueError("not yet")

        rows = given.with_columns(far=sign * given["far"])
        run = LoopRun(program(group, edges, rows, {"far": combine}, watch=watch, improves=improves), group)
        if starts > 1:
            raised(group, IterReduceError, run.run)
        run.run()
        assert {town: sign * far for town, far in ways(group, run)} == known
        if starts == 1:  # the levels of one source: all at once, or each by itself
            assert (run.iteration == 1) == (not improves and group.size == 1)

    run_ranks(ranks, check)


def test_what_nobody_writes_improves_again_and_again(ranks: int) -> None:
    def check(group: Group) -> list[int]:
        loop = program(group, roads(), towns(), {"far": min_(col("far") + 1)}, 3, improves=True)
        step = replace(loop.body[0], writes=(Sink("seen", "heard"),))
        run = LoopRun(replace(loop, body=(step,)), group)
        run.run()
        return [len(table) for table in run.outputs["seen"]]

    for each in run_ranks(ranks, check):
        assert len(set(each)) == 1 and len(each) == 3


@pytest.mark.parametrize("settle", ["", "told"])
def test_a_null_is_no_value_that_improves(ranks: int, settle: str) -> None:
    given = towns()
    given = given.with_valid(far=np.abs(given["far"]) < FAR)

    def check(group: Group) -> None:
        options = {} if settle else {"improves": True}
        run = LoopRun(program(group, roads(), given, **options), group)
        assert "has nulls, and is to improve" in str(raised(group, SchemaError, run.run))

    run_ranks(ranks, check)


@pytest.mark.parametrize("improves", [False, True])
def test_a_failure_behind_settling_leaves_no_trace(ranks: int, improves: bool) -> None:
    def check(group: Group) -> None:
        failing = [group.rank == group.size - 1]

        def watch() -> None:
            if failing.pop() if failing else False:
                raise ValueError("not yet")

        run = LoopRun(program(group, roads(), towns(), watch=watch, improves=improves), group)
        run.start()
        raised(group, IterReduceError, run.advance)
        assert ways(group, run) == sorted(zip(range(N + 5), towns()["far"].tolist(), strict=True))
        run.run()
        assert ways(group, run) == distances(roads())

    run_ranks(ranks, check)


def test_reproducible_runs_take_as_many_supersteps_on_any_number_of_ranks() -> None:
    def check(group: Group) -> int:
        run = LoopRun(program(group, roads(), towns()), group, Options(reproducible=True))
        run.run()
        assert ways(group, run) == distances(roads())
        return run.iteration

    taken = [run_ranks(size, check)[0] for size in (1, 2, 3, 8)]
    assert len(set(taken)) == 1 and taken[0] > 4


def test_what_improves_for_ever_ends_with_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linksettle, "LEAST_EDGES", 50)
    edges = Batch(src=np.array([0, 1]), dst=np.array([1, 0]), length=np.array([1, -2]))

    def check(group: Group) -> None:
        run = LoopRun(program(group, edges, towns(), most=5), group)
        run.run()
        assert run.iteration == 5 and dict(ways(group, run))[0] < 0

    run_ranks(2, check)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a sum": ({"combine": {"far": sum_("far")}}, UsageError, "one MIN or MAX"),
    "two outputs": ({"combine": {"far": min_("far"), "n": count()}}, UsageError, "one MIN or MAX"),
    "all rows": ({"touched": False}, UsageError, "touched=True"),
    "rows of no index": ({"rows": "edges"}, UsageError, "an Index has made"),
    "another column": ({"combine": {"far": max_("length")}}, UsageError, 'the column "far"'),
    "another type": ({"combine": {"far": min_(col("far") / 2)}}, SchemaError, "float64"),
    "the other key": ({"key": ("src",), "joined": Joined("active", "dst")}, UsageError, "second key"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_uses_are_named(name: str) -> None:
    options, kind, words = WRONG[name]

    def check(group: Group) -> None:
        given = dict(options)
        combine = given.pop("combine", None)

        def run() -> None:
            LoopRun(program(group, roads(), towns(), combine, **given), group).run()

        assert words in str(raised(group, kind, run))

    run_ranks(2, check)
