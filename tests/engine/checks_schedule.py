"""What one rank alone meets (a lost plan, no rows, other keys, no memory) changes no rank's next collective.

A loop is run undisturbed on one rank; disturbed ones on many ranks must reach the same state. On thread ranks
a missed collective is a `ScheduleError` or a timeout.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group, group_for
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.loop import Local, Loop, Shuffle, State, Total
from iterreduce.shuffle import CombineShuffle
from tests.engine.kit import (
    Check,
    all_on,
    folding_of,
    int_rows,
    local,
    looping,
    rows_of,
    started,
)

N, MOST = 60, 6
Disturb = Callable[[Batch, int], Batch]


def as_it_is(rows: Batch, iteration: int) -> Batch:
    return rows


def the_loop(
    group: Group,
    disturb: Disturb = as_it_is,
    onto: bool = True,
    ends: list[int] | None = None,
    until: object = None,
) -> Loop:
    """Edges with invariant keys, a combining shuffle (onto pages or not), a total, an update, a clock."""
    edges, pages = int_rows(N, 10).select("k", "x"), Batch(k=np.arange(-5, 6), v=np.arange(11))

    def give(r: Batch, clock: Batch) -> Batch:
        return disturb(r, int(clock["i"][0]) + 1)

    def update(heard: Batch, s: Batch, t: Batch) -> Batch:
        if onto:
            return s.with_columns(v=s["v"] * 2 % 1009 + heard["x"] + t["n"][0])
        return Batch(k=heard["k"], v=heard["x"] + t["n"][0])

    stages = [
        Local(give, ("r", "clock"), "m"),
        Shuffle("m", ("k",), "h", {"x": ir.sum("x")}, "s" if onto else None),
        Total("h", (), {"n": ir.sum("x")}, "t"),
        Local(update, ("h", "s", "t"), "n", "share"),
        Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "c"),
    ]
    sources = {
        "r": local(edges, group, ends),
        "p": local(pages, group),
        "zero": Batch(i=np.zeros(1, np.int64)),
    }
    state = {"s": State("p", ("k",)), "clock": State("zero")}
    return looping(sources, state, stages, {"s": "n", "clock": "c"}, until, MOST)


def shuffle_of(run: LoopRun) -> CombineShuffle:
    works = [folding_of(work) for work in run.shop.exchangers]
    return next(work for work in works if isinstance(work, CombineShuffle))


def answer(disturb: Disturb = as_it_is, onto: bool = True) -> list[tuple[int, ...]]:
    """What the loop gives on one rank, every exchange fresh."""
    solo = group_for(None)
    run = started(the_loop(solo, disturb, onto), solo, naive=True)
    run.run()
    return sorted(rows_of(solo, run.tables["s"]))


def assert_answer(run: LoopRun, group: Group, disturb: Disturb = as_it_is, onto: bool = True) -> None:
    run.run()
    assert sorted(rows_of(group, run.tables["s"])) == answer(disturb, onto)


def check_a_lost_plan_is_made_again(group: Group) -> None:
    for onto in (True, False):
        for victim in range(min(2, group.size)):
            run = started(the_loop(group, onto=onto), group, check=True)
            run.advance()
            run.advance()
            work = shuffle_of(run)
            assert work.planned
            if group.rank == victim:
                run.shop.cache.lose(work.plan_token)
            run.advance()
            assert not work.planned and work.replans == 1
            run.advance()
            assert work.planned, "the same keys again: the plan comes back at once"
            assert_answer(run, group, onto=onto)


def check_a_late_rank_changes_nothing(group: Group) -> None:
    def slow(r: Batch, i: int) -> Batch:
        time.sleep(0.01 * (group.rank == i % group.size))
        return r

    run = started(the_loop(group, slow), group)
    assert_answer(run, group)
    assert shuffle_of(run).planned


def check_ranks_without_rows_stay_on_the_plan(group: Group) -> None:
    for ends in (all_on(group, N, 0), all_on(group, N, group.size - 1), all_on(group, N, group.size // 2)):
        for onto in (True, False):
            run = started(the_loop(group, ends=ends, onto=onto), group, check=True)
            assert_answer(run, group, onto=onto)
            assert shuffle_of(run).planned and shuffle_of(run).replans == 0


def moving(rank_moves: Callable[[], bool], iterations: set[int], column: str = "k") -> Disturb:
    """Keys (or their row order) become other arrays in some iterations."""

    def disturb(r: Batch, i: int) -> Batch:
        if i in iterations and rank_moves():
            return r.with_columns(**{column: (r[column] * 3 + i) % 11 - 5})
        return r

    return disturb


def check_keys_may_change_in_one_iteration(group: Group) -> None:
    for onto in (True, False):
        disturb = moving(lambda: True, {3})
        run = started(the_loop(group, disturb, onto), group, check=True)
        planned = []
        for _ in range(MOST):
            run.advance()
            planned.append(shuffle_of(run).planned)
        assert sorted(rows_of(group, run.tables["s"])) == answer(disturb, onto)
        assert planned == [False, True, False, False, False, True] or planned == [
            False,
            True,
            False,
            False,
            True,
            True,
        ]


def check_keys_may_change_on_one_rank_only(group: Group) -> None:
    for mover in {0, group.size - 1}:
        for onto in (True, False):

            def copied(r: Batch, i: int, mover: int = mover) -> Batch:
                """The same keys, but not the column that was handed out: the engine cannot know."""
                return r.with_columns(k=r["k"].copy()) if i == 3 and group.rank == mover else r

            run = started(the_loop(group, copied, onto), group, check=True)
            for _ in range(3):
                run.advance()
            assert shuffle_of(run).replans == 1
            assert_answer(run, group, onto=onto)
            assert shuffle_of(run).planned


def check_keys_may_change_in_every_iteration(group: Group) -> None:
    for onto in (True, False):
        disturb = moving(lambda: True, set(range(1, MOST + 1)))
        run = started(the_loop(group, disturb, onto), group, check=True)
        assert_answer(run, group, disturb, onto)
        assert shuffle_of(run).replans == 0 and shuffle_of(run).plan is None


def check_keys_may_come_and_go(group: Group) -> None:
    for seed in range(4):
        random = np.random.default_rng(seed)
        turns = set(np.flatnonzero(random.integers(0, 2, MOST + 1)).tolist())
        disturb = moving(lambda: True, turns)
        run = started(the_loop(group, disturb, seed % 2 > 0), group, check=True)
        assert_answer(run, group, disturb, seed % 2 > 0)


def check_a_column_may_gain_nulls_on_one_rank(group: Group) -> None:
    for holder in {0, group.size - 1}:
        for at in (2, 3):

            def gains(r: Batch, i: int, holder: int = holder, at: int = at) -> Batch:
                return r.with_valid(x=np.ones(len(r), bool)) if i == at and group.rank == holder else r

            run = started(the_loop(group, gains), group, check=True)
            assert_answer(run, group)

            def nulls(r: Batch, i: int, at: int = at) -> Batch:
                return r.with_valid(x=r["x"] % 3 != 0) if i == at else r

            ours, theirs = started(the_loop(group, nulls, False), group, check=True), group_for(None)
            ours.run()
            alone = started(the_loop(theirs, nulls, False), theirs, naive=True)
            alone.run()
            assert sorted(rows_of(group, ours.tables["s"])) == sorted(rows_of(theirs, alone.tables["s"]))


def check_a_small_budget_evicts_by_agreement(group: Group) -> None:
    run = started(the_loop(group), group, check=True)
    run.shop.cache.budget_bytes = 50 if group.rank == group.size - 1 else None
    run.advance()
    work = shuffle_of(run)
    assert work.plan is not None, (
        "made with the first commit; the wish goes out with the next control reduction"
    )
    run.advance()
    assert work.planned and run.shop.cache.evictions == 1 and work.plan is None
    run.advance()
    assert work.plan is None, "what was evicted is not made again"
    assert_answer(run, group)
    assert run.shop.cache.evictions in (1, 2), (
        "the plan, then the directory of its keys where there were enough"
    )


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
