"""Ranks die, and the others go on: what a run gives then is what it would have given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.errors import RanksLost, UserCodeError
from iterreduce.events import Event, Events
from iterreduce.loop import Local, Loop, Replace, Shuffle, State, Superstep, Total
from iterreduce.options import Options
from iterreduce.recovery import LoopRun, enduring
from iterreduce.run import Result, run_loop
from iterreduce.testing import Death, Faults, Kill, RankDied, ThreadGroup, run_ranks, striking
from tests.engine.kit import int_rows, local, looping

N = 61
Sized = pytest.mark.parametrize("size", [2, 3, 5, 8])


def sums_of(rows: Any, most: int = 9, key: str = "k") -> Loop:
    """A state by key that every iteration makes anew of itself, and one number that all ranks hold."""

    def more(state: Batch, total: Batch) -> Batch:
        seen = int(total["x"][0]) if len(total) else 0
        return state.with_columns(x=(state["x"] * 3 + seen + 1) % 1009)

    step = Superstep(
        "step",
        (
            Local(more, ("s", "t"), "m", cut="share"),
            Shuffle("m", (key,), "n", {"x": ir.SUM}),
            Total("n", (), {"x": ir.SUM}, "all"),
        ),
        (Replace("s", "n"), Replace("t", "all")),
    )
    return Loop(
        "sums",
        {"r": rows, "zero": Batch(x=np.zeros(1, np.int64))},
        {"s": State("r0", (key,)), "t": State("zero")},
        (step,),
        ir.Until.of([], most),
        "s",
        prepare=(Shuffle("r", (key,), "r0", {"x": ir.SUM}),),
    )


def given(group: Group) -> Any:
    return local(int_rows(N, 13).select("k", "x"), group)


def job(
    group: Group,
    faults: Sequence[Kill] = (),
    loop: Callable[[Group], Loop] = lambda group: sums_of(given(group)),
    **options: Any,
) -> Result:
    events = Events()
    with striking(Faults(tuple(faults)), events, group):
        return run_loop(loop(group), group, Options(**{"copy_every": 1, **options}), events)


def survived(size: int, deaths: Sequence[Death] = (), **more: Any) -> list[Result]:
    """The results of those who lived: all have the digest of a run in which nobody died."""
    found = run_ranks(size, job, heals=True, deaths=deaths, timeout=60, **more)
    assert {result.result_sha256 for result in found} == {undisturbed(more.get("loop", _sums))}
    return found


@cache
def undisturbed(loop: Callable[[Group], Loop]) -> str:
    (result,) = run_ranks(1, job, loop=loop)
    return result.result_sha256


def _sums(group: Group) -> Loop:
    return sums_of(given(group))


def origins(result: Result) -> list[str]:
    return [entry["origin"] for entry in result.recoveries]


@Sized
@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_those_who_live_go_on_from_copies_in_their_memory(size: int, which: str) -> None:
    rank = {"first": 0, "middle": size // 2, "last": size - 1}[which]
    found = survived(size, faults=[Kill(at="stage.start:step: Shuffle*", rank=rank, iteration=6)])
    assert len(found) == size - 1
    for result in found:
        (entry,) = result.recoveries
        assert entry["lost"] == [rank] and entry["survivors"] == size - 1
        assert (entry["origin"], entry["iteration"], entry["recomputed"]) == ("memory", 5, 0)
        assert result.iterations == 9 and len(result.seconds_per_iteration) == 9


@Sized
def test_a_loss_before_the_first_commit_begins_again_from_the_sources(size: int) -> None:
    found = survived(size, faults=[Kill(at="stage.start:step: Shuffle*", rank=1, iteration=1)])
    assert [origins(result) for result in found] == [["start"]] * (size - 1)


def test_ranks_die_one_after_another_until_one_is_left() -> None:
    faults = [Kill(at="iteration.start", rank=rank, iteration=2 + rank) for rank in range(4)]
    (last,) = survived(5, faults=faults)
    assert [entry["survivors"] for entry in last.recoveries] == [4, 3, 2, 1]
    assert set(origins(last)) == {"memory"}


def test_two_that_hold_no_copy_of_each_other_may_die_at_once() -> None:
    faults = [Kill(at="control.ready", rank=rank, iteration=5) for rank in (1, 3)]
    found = survived(5, faults=faults)
    assert all(set(origins(result)) == {"memory"} for result in found) and len(found) == 3


def test_two_neighbours_that_die_at_once_take_both_copies_along(tmp_path: Path) -> None:
    faults = [Kill(at="control.ready", rank=rank, iteration=6) for rank in (2, 3)]
    rows = int_rows(N, 13).select("k", "x")
    np.save(tmp_path / "rows.npy", np.rec.fromarrays([rows["k"], rows["x"]], names="k,x"))

    def of_file(group: Group) -> Loop:
        return sums_of(ir.read(str(tmp_path / "rows.npy")).as_source())

    assert origins(survived(5, faults=faults, loop=of_file)[0])[-1] == "start"
    where = {"checkpoint_dir": str(tmp_path / "saved"), "checkpoint_every": 1}
    found = run_ranks(5, job, faults, of_file, heals=True, timeout=60, **where)
    assert origins(found[0])[-1] in ("checkpoint", "start")  # a write may have been under way, too


def test_without_copies_the_newest_checkpoint_serves(tmp_path: Path) -> None:
    faults = [Kill(at="stage.start:step: Shuffle*", rank=0, iteration=8)]
    rows = int_rows(N, 13).select("k", "x")
    np.save(tmp_path / "rows.npy", np.rec.fromarrays([rows["k"], rows["x"]], names="k,x"))

    def of_file(group: Group) -> Loop:
        return sums_of(ir.read(str(tmp_path / "rows.npy")).as_source())

    def saving(group: Group) -> Result:
        events = Events()
        options = Options(copy_every=0, checkpoint_dir=str(tmp_path / "saved"), checkpoint_every=0)
        with striking(Faults(tuple(faults)), events, group):
            run = LoopRun(of_file(group), group, options, events)
            for _ in range(5):
                run.advance()
            run.save()
            run.run()
            run.close()
            assert run.recoveries[0]["origin"] == "checkpoint" and run.recoveries[0]["iteration"] == 5
        return run_loop(of_file(group), group)

    found = run_ranks(3, saving, heals=True, timeout=60)
    assert len(found) == 2
    assert not [p for p in (tmp_path / "saved").rglob(".*") if p.name.startswith(".writing")]


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_may_die_at_any_collective_and_be_heard_by_some(size: int) -> None:
    """So survivors stand at commits that differ by one, in copies that are half made, or at the end."""
    (calls, *_) = run_ranks(size, lambda group: (job(group), group.calls)[1], heals=True)
    kinds = set()
    for call in range(8, calls + 1, 5):
        for heard in (None, (0,), tuple(range(size))):
            found = survived(size, [Death(size - 1, call, heard)])
            kinds |= {tuple(origins(result)) for result in found}
    assert {("memory",), ("start",)} <= kinds


def test_another_may_die_while_the_others_recover() -> None:
    calls: list[int] = []

    def counted(group: ThreadGroup) -> int:
        events = Events()
        events.subscribe(lambda event: calls.append(group.calls) if event.name == "rank.lost" else None)
        with striking(Faults((Kill(at="commit.start", rank=1, iteration=4),)), events, group):
            run_loop(sums_of(given(group)), group, Options(copy_every=1), events)
        return group.calls

    run_ranks(4, counted, heals=True)
    for more in range(0, 40, 3):
        found = survived(
            4,
            [Death(3, min(calls) + more, None if more % 2 else (0,))],
            faults=[Kill(at="commit.start", rank=1, iteration=4)],
        )
        assert len(found) == 2 and found[0].recoveries[-1]["survivors"] == 2


def test_an_error_of_the_user_is_raised_by_all_though_a_rank_dies_beside_it() -> None:
    def fails(group: Group) -> Loop:
        def counted(state: Batch) -> Batch:
            if state["x"][0] >= 4:
                raise ValueError("no more")
            return state.with_columns(x=state["x"] + 1)

        start = {"start": Batch(x=np.zeros(1, np.int64))}
        return looping(
            start, {"s": State("start")}, [Local(counted, ("s",), "n", "share")], {"s": "n"}, most=9
        )

    def work(group: ThreadGroup) -> str:
        with pytest.raises(UserCodeError) as found:
            job(group, loop=fails)
        return str(found.value).splitlines()[-1]

    (calls, *_) = run_ranks(3, lambda group: (work(group), group.calls)[1], heals=True)
    for call in range(calls - 8, calls + 1):
        found = run_ranks(3, work, heals=True, deaths=[Death(2, call, (1,))], timeout=60)
        assert set(found) == {"ValueError: no more"}


def test_on_a_callers_communicator_all_learn_who_died_and_what_was_committed() -> None:
    def work(group: Group) -> tuple[Any, ...]:
        events = Events()
        with striking(Faults((Kill(at="control.ready", rank=2, iteration=5),)), events, group):
            run = LoopRun(sums_of(given(group)), group, None, events)
            for _ in range(4):
                run.advance()
            with pytest.raises(RanksLost, match="rank 2 has died, 3 live") as found:
                run.advance()
        lost = found.value
        assert lost.tables is not None and set(lost.tables) >= {"s", "t"}
        return lost.lost, lost.survivors, lost.position.iteration

    assert set(run_ranks(4, work, heals=None)) == {((2,), 3, 4)}


def test_given_rows_are_whole_afterwards_or_are_known_to_be_gone() -> None:
    def twice(group: Group) -> float:
        rows = ir.Dataset.from_local(group, x=np.arange(4.0) + group.rank)
        others = ir.Dataset.from_local(group, x=np.arange(4.0))
        events = Events()
        with striking(Faults((Kill(at="load", rank=1, nth=2),)), events, group):
            for _ in range(2):  # in the second of which a rank dies: its rows were copied
                rows.run(group, events)
            with pytest.raises(RanksLost, match="the rows of local that they held are gone"):
                others.run(group)
        return float(rows.collect(group)["x"].sum())

    assert run_ranks(3, twice, heals=True) == [6.0 * 3 + 4 + 8] * 2


def test_both_holders_of_given_rows_die() -> None:
    faults = [Kill(at="control.ready", rank=rank, iteration=3) for rank in (1, 2)]
    with pytest.raises(RanksLost, match="rows that only they had"):
        run_ranks(4, job, faults, heals=True, timeout=60)


def test_a_driver_of_its_own_sees_nothing_of_it() -> None:
    def driven(group: Group, kill: bool) -> tuple[list[str], list[int]]:
        events, seen, sums = Events(), [], []
        kills = (
            Kill(at="iteration.start", rank=1, iteration=4),
            Kill(at="control.ready", rank=0, iteration=7),
        )
        with striking(Faults(kills if kill else ()), events, group):
            run = LoopRun(sums_of(given(group)), group, Options(copy_every=2), events)
            while not seen or not seen[-1].startswith("<Outcome"):
                seen.append(repr(run.advance()))
                number = np.array([0])

                def add(number: Any = number, run: LoopRun = run) -> int:
                    number[0] = run.tables["s"].batch["x"].sum()
                    group.allreduce(number, "sum")
                    return int(number[0])

                sums.append(run.enduring(add))
        return seen, sums

    (want,) = run_ranks(1, driven, False)
    assert run_ranks(4, driven, True, heals=True) == [want] * 2


def test_rows_that_were_fed_are_fed_again() -> None:
    def fed(group: Group, kill: bool) -> int:
        step = Superstep(
            "step",
            (Local(lambda s, f: s.with_columns(x=s["x"] * 2 + f["y"][0]), ("s", "f"), "n", "share"),),
            (Replace("s", "n"),),
        )
        start = {"start": Batch(x=np.array([1]))}
        loop = Loop("fed", start, {"s": State("start")}, (step,), ir.Until.of([], 6), "s", feeds={"f": None})
        events = Events()
        kills = (Kill(at="control.ready", rank=2, iteration=5),) if kill else ()
        with striking(Faults(kills), events, group):
            run = LoopRun(loop, group, Options(copy_every=3), events)
            for number in range(6):
                run.advance(feed={"f": Batch(y=np.array([number]))})
            return int(run.tables["s"].batch["x"][0])

    assert set(run_ranks(3, fed, True, heals=True)) == set(run_ranks(1, fed, False))


@pytest.mark.parametrize("more", range(0, 14, 2))
def test_a_result_is_written_whole_though_a_rank_dies_with_its_share(tmp_path: Path, more: int) -> None:
    path = str(tmp_path / "out.npz")

    def work(group: ThreadGroup) -> int:
        ir.Dataset.of_loop(sums_of(given(group)), group).write(path)
        return group.calls

    def written() -> list[tuple[int, int]]:
        found = np.load(path)
        return sorted(zip(found["k"].tolist(), found["x"].tolist(), strict=True))

    (calls, *_) = run_ranks(3, work, heals=True)
    want = written()
    run_ranks(3, work, heals=True, deaths=[Death(1, calls - more)])
    assert written() == want


def test_watchers_are_told_what_was_lost_and_from_where_it_goes_on() -> None:
    told: list[Event] = []

    def work(group: Group) -> None:
        events = Events()
        if group.rank == 0:
            events.subscribe(told.append)
        with striking(Faults((Kill(at="control.ready", rank=2, iteration=4),)), events, group):
            run_loop(sums_of(given(group)), group, Options(copy_every=2), events)

    run_ranks(3, work, heals=True)
    names = [event.name for event in told]
    assert names.index("rank.lost") < names.index("recovery.start") < names.index("recovery.end")
    end = next(event.fields for event in told if event.name == "recovery.end")
    assert end["origin"] == "memory" and end["iteration"] == 2 and end["recomputed"] == 1
    assert set(end["seconds"]) == {"shrink", "restore", "load", "prepare", "total"}


def test_without_recovery_the_loss_is_an_error() -> None:
    with pytest.raises(RankDied):
        run_ranks(3, job, [Kill(at="control.ready", rank=2, iteration=4)], heals=True, recover="off")


def test_what_is_everywhere_is_copied_without_a_message() -> None:
    def work(group: Group, every: int) -> int:
        loop = looping(
            {"z": Batch(x=np.zeros(3))},
            {"s": State("z")},
            [Local(lambda s: s.with_columns(x=s["x"] + 1), ("s",), "n", "share")],
            {"s": "n"},
        )
        run_loop(loop, group, Options(copy_every=every))
        return group.traffic.collectives

    assert run_ranks(3, work, 1, heals=True) == run_ranks(3, work, 0, heals=True)


def test_copies_are_given_up_where_a_rank_has_no_memory_for_them() -> None:
    def work(group: Group, budget: int | None) -> tuple[int, bool]:
        events, seen = Events(), list[str]()
        events.subscribe(lambda event: seen.append(event.name))
        rows = local(Batch(k=np.arange(100_000), x=np.arange(100_000)), group)
        options = Options(copy_every=1 if budget else 0, memory_bytes=budget)
        result = run_loop(sums_of(rows, 3), group, options, events)
        return sum(result.memory_bytes.values()), "recovery.nocopies" in seen

    needs = max(held for held, _ in run_ranks(2, work, None, heals=True))
    assert [given_up for _, given_up in run_ranks(2, work, 10 * needs, heals=True)] == [False] * 2
    assert [given_up for _, given_up in run_ranks(2, work, needs + needs // 8, heals=True)] == [True] * 2


def test_an_agreement_has_one_outcome() -> None:
    def work(group: ThreadGroup) -> int:
        group.barrier()
        lost: tuple[int, ...] = ()
        try:
            group.all_here()
        except RankDied as error:
            lost = group.heal(error)
        assert lost == (1,) and group.size == 3 and group.epoch == 1
        return group.agree_max(group.rank)

    assert run_ranks(4, work, heals=True, deaths=[Death(1, 2, (0,))]) == [2, 2, 2]


def test_work_on_a_group_is_done_again_as_a_whole() -> None:
    def work(group: ThreadGroup) -> int:
        def add() -> int:
            number = np.array([1])
            group.allreduce(number, "sum")
            group.allreduce(number, "sum")
            return int(number[0])

        return enduring(group, add)

    assert run_ranks(4, work, heals=True, deaths=[Death(2, 2, (3,))]) == [9, 9, 9]


def test_nobody_died_so_the_error_stays() -> None:
    def work(group: ThreadGroup) -> None:
        with pytest.raises(RankDied, match="by mistake"):
            group.heal(RankDied("by mistake"))

    run_ranks(2, work, heals=True)
