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
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.partition import PartitionMap
from iterreduce.driver import LoopRun
from iterreduce.loop import Gather, Local, Loop, Shuffle, State, Total
from iterreduce.shuffle import CombineShuffle
from tests.engine.kit import Check, all_on, int_rows, local, looping, once, pipeline, raised, rows_of, share, started

N, MOST = 60, 6
Disturb = Callable[[Batch, int], Batch]


def as_it_is(rows: Batch, iteration: int) -> Batch:
    return rows


def the_loop(group: Group, disturb: Disturb = as_it_is, onto: bool = True, ends: list[int] | None = None, until: object = None) -> Loop:
    """Edges with invariant keys, a combining shuffle onto pages (or of its own), a total, an update; counts iterations."""
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
    sources = {"r": local(edges, group, ends), "p": local(pages, group), "zero": Batch(i=np.zeros(1, np.int64))}
    state = {"s": State("p", ("k",)), "clock": State("zero")}
    return looping(sources, state, stages, {"s": "n", "clock": "c"}, until, MOST)


def shuffle_of(run: LoopRun) -> CombineShuffle:
    return next(work for work in run.shop.exchangers if isinstance(work, CombineShuffle))


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
        assert planned == [False, True, False, False, False, True] or planned == [False, True, False, False, True, True]


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
    assert work.plan is not None, "made with the first commit; the wish goes out with the next control reduction"
    run.advance()
    assert work.planned and run.shop.cache.evictions == 1 and work.plan is None
    run.advance()
    assert work.plan is None, "what was evicted is not made again"
    assert_answer(run, group)
    assert run.shop.cache.evictions in (1, 2), "the plan, then the directory of its keys where there were enough"


def narrow(run: LoopRun, slot_words: int, round_words: int) -> None:
    """As if inline slots and rounds were this small."""
    for work in run.shop.exchangers:
        work.fresh.largest_slot, work.fresh.round_words = slot_words, round_words
        work.fresh._resize(slot_words)


def check_an_overflow_needs_a_second_exchange_only(group: Group) -> None:
    rows = Batch(k=np.random.default_rng(4).integers(0, 300, 500), x=np.arange(500))
    sums = {int(k): int(rows["x"][rows["k"] == k].sum()) for k in np.unique(rows["k"])}
    stages = (Gather("r", "t"), Shuffle("r", ("k",), "t"), Shuffle("r", ("k",), "t", ir.SUM), Total("r", ("k",), ir.SUM, "t"))
    for round_words in (1, 7, 100, 1 << 20):
        for ends in (None, all_on(group, 500, 0), all_on(group, 500, group.size - 1)):
            for stage in stages:
                run = started(pipeline({"r": local(rows, group, ends)}, stage), group, check=True)
                narrow(run, 40, max(round_words, 100 if group.size > 3 else 1))
                run.run()
                got = rows_of(group, run.tables["out"])
                assert sorted(x for _, x in got) == (list(range(500)) if len(got) == 500 else sorted(sums.values()))
                assert len(got) == 500 or dict(got) == sums


def check_slots_grow_and_are_used_again(group: Group) -> None:
    rows = Batch(k=np.arange(3000), x=np.ones(3000, np.int64))

    def some(r: Batch, clock: Batch) -> Batch:
        i = int(clock["i"][0])
        return r.take(np.arange(0, len(r), [40, 1, 3, 40, 1, 2][i % 6]))

    counts = []
    for size in (1, group.size):
        them = group if size == group.size else group_for(None)
        stages = [
            Local(some, ("r", "clock"), "m", "share"), Shuffle("m", ("k",), "h"), Total("h", (), {"x": ir.sum("x"), "n": ir.count()}, "t"),
            Gather("m", "g"), Local(lambda c, t, g: Batch(i=c["i"] + 1, n=t["n"], g=np.array([len(g)])), ("clock", "t", "g"), "c", "share"),
        ]  # fmt: skip
        start = Batch(i=np.zeros(1, np.int64), n=np.zeros(1, np.int64), g=np.zeros(1, np.int64))
        loop = looping({"r": local(rows, them), "z": start}, {"clock": State("z")}, stages, {"clock": "c"}, most=6)
        run = started(loop, them, check=True)
        for _ in range(6):
            run.advance()
            _, n, g = rows_of(them, run.tables["clock"])[0]
            assert n == g
        counts.append(n)
    assert counts[-1] >= 1500


def check_more_than_the_budget_is_an_error_on_all_ranks(group: Group) -> None:
    rows = Batch(k=np.zeros(4800, np.int64), x=np.arange(4800))
    if group.size == 1:
        return  # nothing travels
    for stage in (Shuffle("r", ("k",), "t"), Gather("r", "t")):
        error = raised(
            group, ir.MemoryBudgetError,
            lambda stage=stage: once(group, {"r": local(rows, group)}, stage, options=ir.Options(memory_bytes=1000)),  # type: ignore[misc]
        )  # fmt: skip
        assert "--memory" in str(error)
    assert len(rows_of(group, once(group, {"r": local(rows, group)}, Gather("r", "t")))) == 4800


def check_planned_iterations_move_values_only(group: Group) -> None:
    run = started(the_loop(group), group)
    run.run()
    edges = share(int_rows(N, 10), group)
    mine = np.unique(edges["k"])
    owners = PartitionMap(1024, group.size).owner_of_hashes(hash_keys(Batch(k=mine)))
    values = int((owners != group.rank).sum()) * 8
    total = 2 * 8 * (group.size - 1)  # whether the key had a row, and the sum
    assert run.bytes_iterations[1:] == [values + total] * (MOST - 1)


def check_co_partitioned_rows_do_not_move(group: Group) -> None:
    rows = int_rows(N, 30)
    stages = [Shuffle("s", ("k",), "h", {"x": ir.sum("x")}, "s"), Local(lambda h, s: s.with_columns(x=s["x"] + h["x"]), ("h", "s"), "n", "share")]
    keyed = Shuffle("r", ("k",), "u", {"x": ir.sum("x")})
    loop = looping({"r": local(rows, group)}, {"s": State("u", ("k",))}, stages, {"s": "n"}, most=5, prepare=(keyed,))
    run = started(loop, group)
    run.run()
    assert run.bytes_iterations[1:] == [0] * 4
    sums = {k: 32 * int(rows["x"][rows["k"] == k].sum()) for k in set(rows["k"].tolist())}
    assert dict(rows_of(group, run.tables["s"])) == sums


def check_two_shuffles_change_their_plans_apart(group: Group) -> None:
    rows, pages = int_rows(N, 10).select("k", "x"), Batch(k=np.arange(-5, 6), v=np.zeros(11, np.int64))

    def first(r: Batch, s: Batch) -> Batch:
        return r.with_columns(k=-r["k"]) if len(s) and int(s["v"][0]) == 2 else r

    def loop(them: Group) -> Loop:
        stages = [
            Local(first, ("r", "clock"), "m"), Shuffle("m", ("k",), "a", {"x": ir.sum("x")}, "s"), Shuffle("r", ("k",), "b", {"x": ir.max("x")}),
            Shuffle("b", ("k",), "c", {"x": ir.sum("x")}, "s"),
            Local(lambda s, a, c: s.with_columns(v=s["v"] + 3 * a["x"] + c["x"]), ("s", "a", "c"), "n", "share"),
            Local(lambda c: c.with_columns(v=c["v"] + 1), ("clock",), "tick"),
        ]  # fmt: skip
        sources = {"r": local(rows, them), "p": local(pages, them), "z": Batch(v=np.zeros(1, np.int64))}
        return looping(sources, {"s": State("p", ("k",)), "clock": State("z")}, stages, {"s": "n", "clock": "tick"}, most=7)

    ours, alone = started(loop(group), group, check=True), started(loop(group_for(None)), group_for(None), naive=True)
    ours.run()
    alone.run()
    assert sorted(rows_of(group, ours.tables["s"])) == sorted(rows_of(alone.group, alone.tables["s"]))
    works = [work for work in ours.shop.exchangers if isinstance(work, CombineShuffle)]
    assert [work.replans for work in works] == [1, 0, 0]
    assert [work.planned for work in works] == [True, True, True]


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
