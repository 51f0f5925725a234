"""Ranks die while a caller drives a loop, holds rows or asks for work of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.errors import RanksLost
from iterreduce.events import Event, Events
from iterreduce.loop import Local, Loop, Replace, State, Superstep
from iterreduce.options import Options
from iterreduce.recovery import LoopRun, enduring
from iterreduce.run import run_loop
from iterreduce.sources import open_source
from iterreduce.testing import Death, Faults, Kill, RankDied, ThreadGroup, run_ranks, striking
from tests.engine.dying import counted, given, job, sums_of
from tests.saving.programs import patience


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


def test_a_driver_learns_once_that_its_loop_has_ended_though_a_rank_dies_with_the_last_commit(
    tmp_path: Path,
) -> None:
    """Others take up the end itself, as it was saved."""

    def driven(group: ThreadGroup, folder: Path) -> tuple[list[str], int]:
        options = Options(copy_every=0, checkpoint_dir=str(folder), checkpoint_every=1)
        events = Events()
        events.subscribe(patience, places=True)  # so that there are as many collectives each time
        run, seen = LoopRun(counted(open_source(rows), most=3), group, options, events), [""]
        while not seen[-1].startswith("<Outcome"):
            seen.append(repr(run.advance()))
        return seen, group.calls

    rows = str(tmp_path / "rows.npz")
    np.savez(rows, k=np.arange(61), x=np.arange(61))
    want, calls = run_ranks(3, driven, tmp_path / "undisturbed", heals=True)[2]
    for number in range(3):
        deaths = [Death(2, calls - number, None if number else (0,))]
        found = run_ranks(3, driven, tmp_path / f"{number}", heals=True, deaths=deaths)
        assert [seen for seen, _ in found] == [want] * 2


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
