"""The engine inside of other programs: groups of its own, several loops, watchers, runs inside of runs."""

from __future__ import annotations

from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.events import EVENTS, Event, Events
from iterreduce.loop import Local, Loop, Shuffle, State, Superstep, Total
from iterreduce.run import run_loop
from tests.engine.kit import Check, int_rows, local, looping, once, raised, ran, rows_of, same, share, started


def adding(group: Group, step: int, most: int = 4) -> Loop:
    """Each row's key gets ``step`` times its rows added, in every iteration."""
    rows, pages = int_rows(40, 9).select("k", "x"), Batch(k=np.arange(-5, 6), v=np.zeros(11, np.int64))
    stages = [
        Local(lambda r: r, ("r",), "m"),
        Shuffle("m", ("k",), "h", {"n": ir.count()}, "s"),
        Local(lambda s, h: s.with_columns(v=s["v"] + step * h["n"]), ("s", "h"), "n", "share"),
    ]
    return looping(
        {"r": local(rows, group), "p": local(pages, group)},
        {"s": State("p", ("k",))},
        stages,
        {"s": "n"},
        most=most,
    )


def wanted(step: int, iterations: int = 4) -> list[tuple[int, int]]:
    keys = int_rows(40, 9)["k"]
    return [(k, iterations * step * int((keys == k).sum())) for k in range(-5, 6)]


def check_parts_of_a_group_run_their_own_loops_at_the_same_time(group: Group) -> None:
    part = group.split(group.rank % 2, group.rank)
    assert part is not None
    most = 4 + 3 * (group.rank % 2)
    result = ran(adding(part, 1 + group.rank % 2, most), part)
    assert sorted(rows_of(part, result)) == wanted(1 + group.rank % 2, most)
    group.barrier()
    part.free()
    assert sorted(rows_of(group, ran(adding(group, 5), group))) == wanted(5)


def check_a_failing_part_does_not_disturb_the_other(group: Group) -> None:
    part = group.split(group.rank % 2, group.rank)
    assert part is not None

    def bad(r: Batch) -> Batch:
        raise ValueError("odd ranks fail")

    for _ in range(3):
        if group.rank % 2:
            raised(
                part,
                ir.UserCodeError,
                lambda: once(part, {"r": Batch(k=np.arange(3))}, Local(bad, ("r",), "m")),
            )
        else:
            assert sorted(rows_of(part, ran(adding(part, 1), part))) == wanted(1)
    group.barrier()
    part.free()


def check_runs_advance_in_turns(group: Group) -> None:
    one, two = started(adding(group, 1), group, check=True), started(adding(group, 7), group, check=True)
    while one.outcome is None:
        one.advance()
        two.advance()
    assert sorted(rows_of(group, one.tables["s"])) == wanted(1)
    assert sorted(rows_of(group, two.tables["s"])) == wanted(7)
    assert "has ended" in str(raised(group, ir.UsageError, one.advance))


def check_a_loop_can_be_run_again(group: Group) -> None:
    loop = adding(group, 2)
    for _ in range(2):
        assert sorted(rows_of(group, ran(loop, group))) == wanted(2)


def check_an_action_inside_of_user_code_is_refused(group: Group) -> None:
    def inside(r: Batch) -> Batch:
        return ir.Dataset.from_local(group, k=r["k"]).collect(group)

    def alone(r: Batch) -> Batch:
        return ir.Dataset.from_local(None, k=r["k"]).collect()

    rows = int_rows(30, 4).select("k")
    if group.size > 1:
        for ends in (None, [0] * (group.size - 1) + [30]):
            error = raised(
                group,
                ir.UserCodeError,
                lambda ends=ends: once(
                    group,
                    {"r": local(rows, group, ends)},
                    Local(inside, ("r",), "m"),
                    Shuffle("m", ("k",), "t", ir.COUNT),
                ),  # type: ignore[misc]
            )
            assert "inside" in str(error)
    kept = once(
        group, {"r": local(rows, group)}, Local(alone, ("r",), "m"), Total("m", (), {"n": ir.count()}, "t")
    )
    assert rows_of(group, kept) == [(30,)]
    assert sorted(rows_of(group, ran(adding(group, 5), group))) == wanted(5)


def check_from_local_copies_and_runs_on_its_group(group: Group) -> None:
    rows = int_rows(30, 4)
    mine = {n: share(rows, group)[n].copy() for n in rows.names}
    handle = ir.MapReduce(reduce={"n": ir.count(), "x": ir.sum("x")}, key="k")(
        ir.Dataset.from_local(group, **mine)
    )
    mine["x"][:] = 0
    result = handle.run()
    assert {k: (n, x) for k, n, x in rows_of(group, result)} == {
        k: (int((rows["k"] == k).sum()), int(rows["x"][rows["k"] == k].sum()))
        for k in set(rows["k"].tolist())
    }


def check_ranks_that_hold_other_columns_are_told(group: Group) -> None:
    data: dict[str, Any] = {"x": np.arange(3), ("y" if group.rank else "z"): np.arange(3)}
    if group.size > 1:
        raised(group, ir.DisagreementError, lambda: ir.Dataset.from_local(group, **data).collect())
        text = ir.Dataset.from_local(group, x=np.arange(3.0) if group.rank else np.arange(3))
        raised(group, ir.DisagreementError, text.collect)


def check_more_ranks_than_partitions_names_the_option(group: Group) -> None:
    if group.size > 1:
        error = raised(group, ir.UsageError, lambda: ran(adding(group, 1), group, partitions=group.size - 1))
        assert "--partitions" in str(error)
    assert sorted(rows_of(group, ran(adding(group, 1), group, partitions=group.size))) == wanted(1)


def check_every_event_that_raises_ends_the_run_on_all_ranks(group: Group) -> None:
    for name in (
        "run.start",
        "load",
        "iteration.start",
        "stage.start",
        "stage.end",
        "iteration.commit",
        "run.end",
    ):
        for rank in {0, group.size - 1}:
            events = Events()

            def watch(event: Event, name: str = name, rank: int = rank) -> None:
                if event.name == name and group.rank == rank:
                    raise RuntimeError(f"stopped at {name}")

            events.subscribe(watch, may_raise=True)
            error = raised(
                group, ir.StageError, lambda events=events: run_loop(adding(group, 1), group, events=events)
            )  # type: ignore[misc]
            assert f"stopped at {name}" in str(error)


def check_watchers_see_the_same_iterations_on_all_ranks(group: Group) -> None:
    seen: list[tuple[str, object]] = []
    events = Events()
    events.subscribe(lambda event: seen.append((event.name, event.fields.get("iteration"))))
    events.subscribe(lambda event: 1 // 0)  # who looks on must not break a run
    run_loop(adding(group, 1), group, events=events)
    same(group, repr(seen))
    assert {name for name, _ in seen} <= set(EVENTS)
    assert [i for name, i in seen if name == "iteration.commit"] == [1, 2, 3, 4]
    assert seen[0][0] == "run.start" and seen[-1][0] == "run.end"


def check_a_sample_of_a_result_is_the_same_on_one_rank(group: Group) -> None:
    rows = int_rows(60, 30).select("k", "x")
    part = share(rows, group)
    sums = ir.MapReduce(reduce=ir.SUM, key="k")
    got = sums(ir.Dataset.from_local(group, k=part["k"], x=part["x"])).sample(5, seed=3).collect()
    alone = sums(ir.Dataset.from_local(None, k=rows["k"], x=rows["x"])).sample(5, seed=3).collect()
    assert got.equals(alone)


def check_the_digest_is_the_same_on_all_ranks_and_on_one(group: Group) -> None:
    rows = int_rows(8, 5).select("x")

    def some(r: Batch) -> Batch:
        return r.with_valid(x=np.ones(len(r), bool)) if group.rank == 0 else r

    def digest(them: Any, n: int, where: Group) -> str:
        given = rows.slice(0, n)
        source = local(given, where)
        stage = Local(some if where is group else (lambda r: r), ("r",), "n")
        return run_loop(
            looping({"r": source}, {"s": State("r")}, [stage], {"s": "n"}, most=1), where
        ).result_sha256

    from iterreduce.collectives import group_for

    for n in (8, 1):
        assert same(group, digest(None, n, group)) == digest(None, n, group_for(None))


def check_programs_that_differ_are_found_under_check(group: Group) -> None:
    """Rank 0 has a stage more in front: the exchanges that meet are alike for MPI, their headers are not."""
    if group.size == 1:
        return
    rows = int_rows(30, 4).select("k", "x")
    first, second = Shuffle("r", ("k",), "a", ir.SUM), Shuffle("r", ("k",), "b", {"x": ir.max("x")})
    for odd in {0, group.size - 1}:
        prepare = (first,) if group.rank == odd else ()
        stages = (second,) if group.rank == odd else (first,)
        loop = Loop(
            "differs",
            {"r": local(rows, group)},
            {"s": State("r")},
            (Superstep("one", stages),),
            ir.Until((ir.MaxIterations(2),)),
            "s",
            prepare=prepare,
        )
        raised(group, ir.ScheduleError, lambda loop=loop: ran(loop, group, check=True))  # type: ignore[misc]
        assert sorted(rows_of(group, ran(adding(group, 1), group, check=True))) == wanted(1)


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
