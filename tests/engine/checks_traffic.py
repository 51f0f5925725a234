"""How much travels, in how many rounds, and what does not fit: bytes are counted exactly."""

from __future__ import annotations

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group, group_for
from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.partition import PartitionMap
from iterreduce.driver import LoopRun
from iterreduce.loop import Gather, Local, Loop, Shuffle, State, Total
from iterreduce.shuffle import CombineShuffle
from tests.engine.checks_schedule import MOST, N, the_loop
from tests.engine.kit import (
    Check,
    all_on,
    folding_of,
    int_rows,
    local,
    looping,
    once,
    pipeline,
    raised,
    rows_of,
    share,
    started,
)


def narrow(run: LoopRun, slot_words: int, round_words: int) -> None:
    """As if inline slots and rounds were this small."""
    for work in run.shop.exchangers:
        work.fresh.largest_slot, work.fresh.round_words = slot_words, round_words
        work.fresh._resize(slot_words)


def check_an_overflow_needs_a_second_exchange_only(group: Group) -> None:
    rows = Batch(k=np.random.default_rng(4).integers(0, 300, 500), x=np.arange(500))
    sums = {int(k): int(rows["x"][rows["k"] == k].sum()) for k in np.unique(rows["k"])}
    stages = (
        Gather("r", "t"),
        Shuffle("r", ("k",), "t"),
        Shuffle("r", ("k",), "t", ir.SUM),
        Total("r", ("k",), ir.SUM, "t"),
    )
    for round_words in (1, 7, 100, 1 << 20):
        for ends in (None, all_on(group, 500, 0), all_on(group, 500, group.size - 1)):
            for stage in stages:
                run = started(pipeline({"r": local(rows, group, ends)}, stage), group, check=True)
                narrow(run, 40, max(round_words, 100 if group.size > 3 else 1))
                run.run()
                got = rows_of(group, run.tables["out"])
                assert sorted(x for _, x in got) == (
                    list(range(500)) if len(got) == 500 else sorted(sums.values())
                )
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
            Local(some, ("r", "clock"), "m", "share"),
            Shuffle("m", ("k",), "h"),
            Total("h", (), {"x": ir.sum("x"), "n": ir.count()}, "t"),
            Gather("m", "g"),
            Local(
                lambda c, t, g: Batch(i=c["i"] + 1, n=t["n"], g=np.array([len(g)])),
                ("clock", "t", "g"),
                "c",
                "share",
            ),
        ]
        start = Batch(i=np.zeros(1, np.int64), n=np.zeros(1, np.int64), g=np.zeros(1, np.int64))
        loop = looping(
            {"r": local(rows, them), "z": start}, {"clock": State("z")}, stages, {"clock": "c"}, most=6
        )
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
            group,
            ir.MemoryBudgetError,
            lambda stage=stage: once(
                group, {"r": local(rows, group)}, stage, options=ir.Options(memory_bytes=1000)
            ),  # type: ignore[misc]
        )
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
    stages = [
        Shuffle("s", ("k",), "h", {"x": ir.sum("x")}, "s"),
        Local(lambda h, s: s.with_columns(x=s["x"] + h["x"]), ("h", "s"), "n", "share"),
    ]
    keyed = Shuffle("r", ("k",), "u", {"x": ir.sum("x")})
    loop = looping(
        {"r": local(rows, group)}, {"s": State("u", ("k",))}, stages, {"s": "n"}, most=5, prepare=(keyed,)
    )
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
            Local(first, ("r", "clock"), "m"),
            Shuffle("m", ("k",), "a", {"x": ir.sum("x")}, "s"),
            Shuffle("r", ("k",), "b", {"x": ir.max("x")}),
            Shuffle("b", ("k",), "c", {"x": ir.sum("x")}, "s"),
            Local(
                lambda s, a, c: s.with_columns(v=s["v"] + 3 * a["x"] + c["x"]), ("s", "a", "c"), "n", "share"
            ),
            Local(lambda c: c.with_columns(v=c["v"] + 1), ("clock",), "tick"),
        ]
        sources = {"r": local(rows, them), "p": local(pages, them), "z": Batch(v=np.zeros(1, np.int64))}
        return looping(
            sources,
            {"s": State("p", ("k",)), "clock": State("z")},
            stages,
            {"s": "n", "clock": "tick"},
            most=7,
        )

    ours, alone = (
        started(loop(group), group, check=True),
        started(loop(group_for(None)), group_for(None), naive=True),
    )
    ours.run()
    alone.run()
    assert sorted(rows_of(group, ours.tables["s"])) == sorted(rows_of(alone.group, alone.tables["s"]))
    works = [folding_of(work) for work in ours.shop.exchangers]
    works = [work for work in works if isinstance(work, CombineShuffle)]
    assert [work.replans for work in works] == [1, 0, 0]
    assert [work.planned for work in works] == [True, True, True]


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
