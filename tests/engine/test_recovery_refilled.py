"""Ranks die, new ones take their places, all begin the program again: runs in it go on where they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.epochs import Refilled
from iterreduce.errors import UsageError
from iterreduce.events import Events
from iterreduce.fixpoint import Outcome
from iterreduce.options import Options
from iterreduce.recovery import LoopRun
from iterreduce.run import Result, delivered, run_loop
from iterreduce.testing import Death, Faults, Kill, run_ranks, striking
from tests.engine.dying import given, origins, sums_of, undisturbed


def sums(group: Group) -> ir.Loop:
    return sums_of(given(group))


def job(group: Group, marks: Path, faults: Sequence[Kill], **options: object) -> Result:
    """Each fault strikes once: who comes in a dead rank's place lives."""
    events = Events()
    with striking(Faults(tuple(faults), marks=str(marks)), events, group):
        return run_loop(sums(group), group, Options(**{"copy_every": 1, "respawn": 9, **options}), events)


def assert_undisturbed(found: Sequence[Result], ranks: int) -> None:
    assert len(found) == ranks
    assert {result.result_sha256 for result in found} == {undisturbed(sums)}


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 1), (5, 0), (5, 4)])
def test_a_new_rank_takes_the_place_of_a_lost_one(size: int, rank: int, tmp_path: Path) -> None:
    fault = Kill(at="control.ready", rank=rank, iteration=6)
    found = run_ranks(size, job, tmp_path, [fault], heals=True, respawns=1, timeout=60)
    assert_undisturbed(found, size)
    for result in found:
        (entry,) = result.recoveries
        assert (entry["lost"], entry["survivors"], entry["joined"]) == ([rank], size - 1, 1)
        assert (entry["origin"], entry["iteration"]) == ("memory", 5) and result.iterations == 9


def test_when_no_more_may_come_those_who_live_go_on(tmp_path: Path) -> None:
    faults = [Kill(at="control.ready", rank=rank, iteration=3 + rank) for rank in range(3)]
    found = run_ranks(3, job, tmp_path, faults, heals=True, respawns=2, timeout=60)
    assert_undisturbed(found, 2)
    assert [entry.get("joined", 0) for entry in found[0].recoveries] == [1, 1, 0]
    assert set(origins(found[0])) == {"memory"}


def test_copies_of_which_both_holders_died_make_way_for_the_checkpoint(tmp_path: Path) -> None:
    faults = [Kill(at="control.ready", rank=rank, iteration=6) for rank in (1, 2)]
    where = {"checkpoint_dir": str(tmp_path / "saved"), "checkpoint_every": 1}
    (tmp_path / "marks").mkdir()
    found = run_ranks(4, job, tmp_path / "marks", faults, heals=True, respawns=1, timeout=60, **where)
    assert_undisturbed(found, 4)
    assert origins(found[0])[-1] in ("checkpoint", "start")  # a write may have been under way, too


def test_with_a_checkpoint_directory_too_it_goes_on_from_memory(tmp_path: Path) -> None:
    faults = [Kill(at="control.ready", rank=0, iteration=7)]
    where = {"checkpoint_dir": str(tmp_path / "saved"), "checkpoint_every": 4}
    (tmp_path / "marks").mkdir()
    found = run_ranks(3, job, tmp_path / "marks", faults, heals=True, respawns=1, timeout=60, **where)
    assert_undisturbed(found, 3)
    assert found[0].recoveries[0]["iteration"] == 6 and origins(found[0]) == ["memory"]


def several(group: Group) -> tuple[Result, int]:
    """A program of two runs, the second's result then handed on."""
    options = Options(copy_every=1, respawn=9)
    run_loop(sums_of(given(group), most=4), group, options)
    result = run_loop(sums(group), group, options)

    def hand_on(made: Result) -> Result:
        group.barrier()
        return made

    return delivered(result, group, hand_on), group.calls


def test_the_run_under_way_goes_on_and_those_before_it_are_made_again() -> None:
    (calls,) = {calls for _, calls in run_ranks(3, several, heals=True)}
    kinds = set()
    for call in range(8, calls + 1, 11):
        for heard in (None, (0,), (0, 1, 2)):
            deaths = [Death(1, call, heard)]
            found = run_ranks(3, several, heals=True, deaths=deaths, respawns=1, timeout=60)
            results = [result for result, _ in found]
            assert_undisturbed(results, 3)
            kinds |= {tuple(origins(result)) for result in results}
    assert {("memory",), ("start",)} <= kinds


def test_another_may_die_in_the_midst_of_it_all_new_ones_too() -> None:
    for number in range(0, 36, 6):
        deaths = [Death(0, 60, None), Death(3, 4 + number, (1, 2)), Death(2, 62 + number, None)]
        found = run_ranks(3, several, heals=True, deaths=deaths, respawns=3, timeout=60)
        assert_undisturbed([result for result, _ in found], 3)


def test_a_run_that_its_caller_drives_begins_again_as_its_caller_does() -> None:
    """What the caller had in its own variables is gone."""

    def work(group: Group) -> list[int]:
        run, seen = LoopRun(sums(group), group, Options(copy_every=1)), list[int]()
        while not isinstance(position := run.advance(), Outcome):
            seen.append(position.iteration)
        return seen

    (calls,) = {calls for _, calls in run_ranks(2, lambda group: (work(group), group.calls), heals=True)}
    found = run_ranks(2, work, heals=True, deaths=[Death(1, calls // 2, None)], respawns=1, timeout=60)
    assert found == [[*range(1, 9)]] * 2


def test_a_program_cannot_hold_up_what_begins_it_again() -> None:
    assert not issubclass(Refilled, Exception)
    with pytest.raises(UsageError, match="your communicator cannot grow"):
        ir.Dataset.from_local(None, x=np.arange(3)).run(respawn=1)
