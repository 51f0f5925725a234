"""The short ways of a combined shuffle: whatever rows come on whichever rank, sums are those of a slow loop,
user code is called once per iteration, and ranks that go different ways meet.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.errors import UserCodeError
from iterreduce.loop import Local, Loop, Shuffle, State
from iterreduce.steady import FewRows, OnPlan, SteadyShuffle
from iterreduce.testing import run_ranks
from tests.engine.kit import local, looping, raised, rows_of, started
from tests.engine.test_directory import work_of

KEYS = np.arange(0, 60, 3)
#: What a map makes of its rows: (keys, values) of the 40 rows that a rank holds.
WAYS = ("passed on", "anew", "others", "fewer", "strided", "named otherwise", "as integers", "fails")
Ways = dict[tuple[int, int], str]  # by rank and iteration; else the way that all go


class Trouble(Exception):
    """What user code raises."""


def rows_made(way: str, r: Batch, iteration: int) -> Batch:
    key, x = r["k"], r["x"] * (iteration + 1)
    if way == "fails":
        raise Trouble
    if way == "anew":
        key = key + 0
    elif way == "others":
        key = key[::-1] + 3 * (iteration % 2)
    elif way == "fewer":
        key, x = key[:7] + 0, x[:7] + 0.0
    elif way == "strided":
        key, x = np.repeat(key, 2)[::2], np.repeat(x, 2)[::2]
    elif way == "named otherwise":
        key, x = r["j"], r["x"]
    elif way == "as integers":
        x = r["n"]
    return Batch(k=key, x=x)


def rows_of_rank(rank: int) -> Batch:
    rng = np.random.default_rng(rank)
    k = rng.choice(KEYS, 40)
    k[: len(KEYS)] = rng.permutation(KEYS)  # all keys, on every rank
    return Batch(k=k, j=k[::-1].copy(), x=rng.random(40), n=np.arange(40))


def steady_run(group: Group, usual: str, ways: Ways, calls: list[int], missing: Any = "drop") -> LoopRun:
    def make(r: Batch, clock: Batch) -> Batch:
        iteration = int(clock["i"][0])
        calls.append(iteration)
        way = ways.get((group.rank, iteration), usual)
        return rows_made(way, r, iteration)

    stages = [
        Local(make, ("r", "clock"), "m"),
        Shuffle("m", ("k",), "h", {"x": ir.sum("x")}, "table", missing),
        Local(lambda h: h.with_columns(x=h["x"]), ("h",), "n", "share"),
        Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "c"),
    ]
    everybody = [rows_of_rank(rank) for rank in range(group.size)]
    sources: dict[str, Any] = {
        "r": local(Batch.concat(everybody), group, [40 * (r + 1) for r in range(group.size)]),
        "t": local(Batch(k=KEYS), group),
        "zero": Batch(i=np.zeros(1, np.int64)),
    }
    state = {"clock": State("zero"), "table": State("t", ("k",)), "out": State("")}
    return started(looping(sources, state, stages, {"clock": "c", "out": "n"}, most=40), group)


def slow_sums(group: Group, usual: str, ways: Ways, iteration: int) -> dict[int, float]:
    sums = dict.fromkeys(KEYS.tolist(), 0.0)
    for rank in range(group.size):
        rows = rows_made(ways.get((rank, iteration), usual), rows_of_rank(rank), iteration)
        for k, x in zip(rows["k"].tolist(), rows["x"].tolist(), strict=True):
            if k in sums:
                sums[k] += x
    return sums


def bound_of(run: LoopRun) -> Any:
    work = work_of(run)
    assert isinstance(work, SteadyShuffle)
    return work._bound


def check_sums(group: Group, usual: str, ways: Ways, iterations: int) -> LoopRun:
    calls: list[int] = []
    run = steady_run(group, usual, ways, calls)
    for i in range(iterations):
        run.advance()
        made = dict(rows_of(group, run.tables["out"]))
        wanted = slow_sums(group, usual, ways, i)
        assert made.keys() == wanted.keys(), i
        assert all(np.isclose(made[k], wanted[k], rtol=1e-12) for k in wanted), (i, usual, ways)
    assert calls == list(range(iterations)), "user code is called once in every iteration"
    return run


@pytest.mark.parametrize(("usual", "kind"), [("passed on", OnPlan), ("anew", FewRows)])
def test_a_shuffle_that_is_steady_goes_a_short_way(usual: str, kind: type, ranks: int) -> None:
    def check(group: Group) -> None:
        run = check_sums(group, usual, {}, 6)
        if group.size > 1 or kind is OnPlan:
            assert isinstance(bound_of(run), kind)

    run_ranks(ranks, check)


@pytest.mark.parametrize("usual", ["passed on", "anew"])
@pytest.mark.parametrize("way", [w for w in WAYS if w not in ("fails", "as integers")])
def test_one_rank_that_leaves_the_short_way_meets_the_others(usual: str, way: str, ranks: int) -> None:
    def check(group: Group) -> None:
        ways = {(group.size - 1, 5): way, (0, 8): way, (0, 9): way}
        run = check_sums(group, usual, ways, 16)
        assert group.size == 1 or bound_of(run) is not None, "and goes it again"

    run_ranks(ranks, check)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["passed on", "anew"]),
    st.dictionaries(st.tuples(st.integers(0, 2), st.integers(3, 11)), st.sampled_from(WAYS[:6]), max_size=12),
)
def test_any_ways_of_any_ranks_meet(usual: str, ways: Ways) -> None:
    run_ranks(3, lambda group: check_sums(group, usual, ways, 12))


@pytest.mark.parametrize("usual", ["passed on", "anew"])
@pytest.mark.parametrize("way", ["fails", "as integers"])
def test_a_rank_that_fails_on_the_short_way_fails_all_and_all_go_on(usual: str, way: str, ranks: int) -> None:
    """Columns of other types are an error of the map's."""

    def check(group: Group) -> None:
        ways = {(group.size - 1, 5): way}
        run = steady_run(group, usual, ways, [])
        for _ in range(5):
            run.advance()
        before = rows_of(group, run.tables["out"])
        kind = UserCodeError if way == "fails" else ir.SchemaError
        raised(group, kind, run.advance)
        assert rows_of(group, run.tables["out"]) == before and run.iteration == 5
        ways.clear()
        for i in range(5, 9):
            run.advance()
            made, wanted = dict(rows_of(group, run.tables["out"])), slow_sums(group, usual, {}, i)
            assert all(np.isclose(made[k], wanted[k], rtol=1e-12) for k in wanted)

    run_ranks(ranks, check)


def test_a_stray_key_on_the_short_way_is_named() -> None:
    """The table loses no key here: the keys that come are the same, but not all are the table's."""

    def check(group: Group) -> None:
        run = steady_run(group, "anew", {(1, 6): "others"}, [], "error")
        for _ in range(6):
            run.advance()
        run.advance()  # other keys, all of them the table's: 3 i % 2 is 0
        assert run.iteration == 7
        run = steady_run(group, "anew", {(1, 7): "others"}, [], "error")
        for _ in range(7):
            run.advance()
        error = raised(group, ir.UsageError, run.advance)
        assert "not in it, such as k=60" in str(error)

    run_ranks(2, check)


def tiny(n: int) -> Loop:
    """An iteration of n invariant keys, as in ``benchmarks/tiny_iteration.py``, on one rank."""

    def spread(rows: Batch, scale: Batch) -> Batch:
        return Batch(key=rows["key"], value=rows["weight"] * scale["scale"][0])

    stages = [
        Local(spread, ("rows", "scale"), "mapped"),
        Shuffle("mapped", ("key",), "sums", ir.SUM, onto="state"),
        Local(lambda h, s: s.with_columns(value=h["value"]), ("sums", "state"), "updated", cut="share"),
    ]
    sources = {
        "rows": ir.sources.LocalSource(Batch(key=np.arange(n), weight=np.ones(n))),
        "scale": Batch(scale=np.ones(1)),
        "keyed": ir.sources.LocalSource(Batch(key=np.arange(n), value=np.ones(n))),
    }
    state = {"state": State("keyed", ("key",))}
    return looping(sources, state, stages, {"state": "updated"}, ir.linf("value") <= -0.0, most=10**6)


def test_an_iteration_of_few_rows_is_few_calls() -> None:
    """Functions of Python that one iteration calls, the user's two with three of ours in them among these."""
    run, calls = LoopRun(tiny(100)), [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[-1] += event == "call"

    def advance() -> None:
        run.advance()
        assert run.root.standing is not None
        run.root.standing.outcome = None

    for _ in range(5):
        advance()
    for _ in range(9):  # garbage of other tests may be collected in one of them
        calls.append(0)
        sys.setprofile(count)
        advance()
        sys.setprofile(None)
    assert 0 < min(calls[1:]) <= 72
