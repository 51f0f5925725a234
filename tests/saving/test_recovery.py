"""Stories of failures: each test tells one, and how the job comes to the result of a run without it.

Ranks are threads here; `test_recovery_of_processes.py` kills real ones. Writes take their time within one
iteration (`patience`), so the n-th checkpoint is under way in a known iteration.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest

from iterreduce import Outcome
from iterreduce.collectives import Group, SoloGroup
from iterreduce.errors import CheckpointError, InputError, OutputError, StageError
from iterreduce.events import Event, Events
from iterreduce.options import Options
from iterreduce.run import Result, run_loop
from iterreduce.saving.directory import Attempt
from iterreduce.stopping import StopRequest
from iterreduce.testing import (
    Delay,
    DeleteFile,
    Died,
    FailCall,
    FailRename,
    Fault,
    Faults,
    FillDisk,
    FlipBit,
    Kill,
    Raise,
    TearFile,
    damage,
    run_ranks,
    striking,
)
from tests.saving.kit import names_in
from tests.saving.programs import PROGRAMS, Program, patience, run_once
from tests.saving.test_lasting import counting, facts

SIZES = (1, 2, 5)
STORED = "*/attempt-*"  # files of checkpoints, for faults


def count(_: Group) -> Any:
    """Twenty iterations in which nothing much happens."""
    return counting(limit=20)


ALL = {**PROGRAMS, "count": count}


@cache
def undisturbed(name: str, ranks: int) -> tuple[Any, ...]:
    return facts(run_once(ALL[name], ranks, reproducible=True)[0])


def go(
    name: str | Program,
    ranks: int,
    saved: Path,
    *struck_by: Fault,
    told: list[str] | None = None,
    watch: Callable[[Group, Event], None] | None = None,
    stop: StopRequest | None = None,
    every: int = 1,
    warn: Literal["always", "error"] = "always",
    **options: Any,
) -> Result:
    """Run it, saving in each iteration that is free to, struck by these faults. Rank 0's result.

    ``told`` gets the warnings; without it there must be none.
    """
    program = ALL[name] if isinstance(name, str) else name

    def job(group: Group) -> Result:
        events = Events()
        events.subscribe(patience, places=True)
        if watch is not None:
            events.subscribe(lambda event: watch(group, event), may_raise=True, places=True)
        given = {"checkpoint_dir": str(saved), "checkpoint_every": every, "reproducible": True} | options
        with striking(Faults(struck_by), events, group):
            return run_loop(program(group), group, Options(**given), events, stop)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter(warn)
        try:
            return run_ranks(ranks, job)[0]
        finally:
            said = [str(warning.message) for warning in warned]
            assert told is not None or not said
            (said if told is None else told).extend(said)


def dies(name: str, ranks: int, saved: Path, *struck_by: Fault, **options: Any) -> None:
    """A run that does not survive its faults."""
    with pytest.raises(Died):
        go(name, ranks, saved, *struck_by, **options)


def published(saved: Path) -> list[str]:
    """The names of the checkpoints that stand there."""
    (attempt,) = saved.glob("attempt-*")
    return [name for name in names_in(attempt) if name.isdigit()]


def came_from(result: Result) -> int:
    """The iteration that a run went on from; 0: it began."""
    return int(result.checkpoints.get("restarted_from_iteration", 0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint directory."""
    return tmp_path / "saved"


# ---------------------------------------------------------------------- killed while a checkpoint is made


@pytest.mark.parametrize(("step", "ranks"), [("write", 3), ("write.half", 1), ("write.half", 5), ("sync", 2)])
def test_who_dies_while_writing_goes_on_from_the_checkpoint_before(
    step: str, ranks: int, saved: Path
) -> None:
    dies("count", ranks, saved, Kill(at=f"checkpoint.step:{step}", rank=ranks - 1, nth=3))
    assert len(published(saved)) == 2
    again = go("count", ranks, saved)
    assert came_from(again) == 4 and facts(again) == undisturbed("count", ranks)  # 1, 4, and 7 was lost


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("step", "iteration"), [("publish", 4), ("rename", 4), ("published", 7)])
def test_a_rename_decides_which_checkpoint_the_next_run_finds(
    step: str, iteration: int, ranks: int, saved: Path
) -> None:
    dies("count", ranks, saved, Kill(at=f"checkpoint.step:{step}", rank=0, nth=3))
    assert len(published(saved)) == (3 if step == "published" else 2), "nobody has cleaned up behind it"
    again = go("count", ranks, saved)
    assert came_from(again) == iteration and facts(again) == undisturbed("count", ranks)
    assert len(published(saved)) == 2


@pytest.mark.parametrize("place", ["checkpoint.start", "checkpoint.copy"])
@pytest.mark.parametrize("ranks", [1, 5])
def test_who_dies_before_anything_is_written_loses_that_checkpoint_only(
    ranks: int, place: str, saved: Path
) -> None:
    dies("count", ranks, saved, Kill(at=place, rank=ranks // 2, nth=3))
    again = go("count", ranks, saved)
    assert came_from(again) == 4 and facts(again) == undisturbed("count", ranks)


@pytest.mark.parametrize("place", ["exchange.ready", "exchange.done", "control.ready", "commit.start"])
@pytest.mark.parametrize("name", ["kmeans", "grows"])
def test_who_dies_within_an_iteration_goes_on_with_the_same_bits(name: str, place: str, saved: Path) -> None:
    dies(name, 3, saved, Kill(at=place, rank=1, iteration=5))
    again = go(name, 3, saved)
    assert came_from(again) > 0 and facts(again) == undisturbed(name, 3)


# ---------------------------------------------------------------------- killed again and again


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_killed_twice_and_taken_up_on_other_ranks_it_ends_with_the_same_bits(name: str, saved: Path) -> None:
    for ranks, victim in ((3, 2), (5, 0)):
        try:
            go(name, ranks, saved, Kill(at="iteration.commit", rank=victim, nth=3))
        except Died:
            continue
        break  # so short that it was over before
    last = go(name, 2, saved, fresh=not published(saved))
    assert facts(last) == undisturbed(name, 2)


@pytest.mark.parametrize("place", ["load", "restart.start", "restart"])
def test_killed_while_it_restarts_a_job_has_lost_nothing(place: str, saved: Path) -> None:
    dies("kmeans", 3, saved, Kill(at="iteration.commit", rank=1, iteration=6))
    before = published(saved)
    for ranks in (2, 5):
        dies("kmeans", ranks, saved, Kill(at=place, rank=ranks - 1))
        assert published(saved) == before
    last = go("kmeans", 3, saved)
    assert came_from(last) == 4 and facts(last) == undisturbed("kmeans", 3)


def test_a_job_that_is_killed_in_every_eighth_iteration_gets_on_all_the_same(saved: Path) -> None:
    deaths = 0
    while True:
        try:
            last = go("count", 2, saved, Kill(at="iteration.commit", rank=deaths % 2, nth=8))
            break
        except Died:
            deaths += 1
    assert deaths == 4 and came_from(last) == 16, "four iterations are kept of each attempt"
    assert facts(last) == undisturbed("count", 2)


# ---------------------------------------------------------------------- two at once

TAKEN_WHERE = [
    "iteration.start",
    "iteration.commit",
    "checkpoint.start",
    "checkpoint.copy",
    "checkpoint.step:write",
    "checkpoint.step:sync",
    "checkpoint.step:publish",
    "checkpoint.step:rename",
]


@pytest.mark.parametrize("place", TAKEN_WHERE)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_that_was_taken_over_ends_with_an_error_and_spoils_nothing(
    ranks: int, place: str, saved: Path
) -> None:
    name, _, step = place.partition(":")
    before = []

    def successor(group: Group, event: Event) -> None:
        at = event.name == name and event.fields.get("step", step) == step
        if at and group.rank == 0 and not before:
            Attempt.open(SoloGroup(), saved)
            before.append(published(saved))

    with pytest.raises(CheckpointError, match=r"another run has taken over .* \(attempt 2\)"):
        go("count", ranks, saved, watch=successor)
    assert [published(saved)] == before and not list(saved.glob("attempt-*/.*"))
    assert facts(go("count", ranks, saved)) == undisturbed("count", ranks)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_that_was_taken_over_behind_its_last_checkpoint_ends_well(ranks: int, saved: Path) -> None:
    def successor(group: Group, event: Event) -> None:
        if event.name == "commit.start" and event.fields["iteration"] == 20 and group.rank == 0:
            Attempt.open(SoloGroup(), saved)

    told: list[str] = []
    result = go("count", ranks, saved, told=told, watch=successor)
    assert told and all("another run has taken over" in text for text in told)
    assert facts(result) == undisturbed("count", ranks)
    with pytest.raises(CheckpointError, match="another run has taken over"):
        result.finish()


# ---------------------------------------------------------------------- damaged on disk


def two_checkpoints(saved: Path, ranks: int) -> None:
    dies("count", ranks, saved, Kill(at="iteration.commit", rank=0, iteration=7))
    assert len(published(saved)) == 2


NEWEST, EVERY = "attempt-*/*[0-9]/", ("*.h5", "manifest.json")


@pytest.mark.parametrize("file", ["node-0000.h5", "index.h5", "manifest.json"])
@pytest.mark.parametrize("kind", [TearFile, FlipBit, DeleteFile])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(kind: Any, file: str, saved: Path) -> None:
    two_checkpoints(saved, 3)
    more = {"keep": -1} if kind is TearFile else {}
    assert damage(kind(f"{saved}/{NEWEST}{file}", at="restart", **more))
    told: list[str] = []
    again = go("count", 2, saved, told=told)
    assert len(told) == 1 and "000000000002 is damaged, the one before it is tried" in told[0]
    assert came_from(again) == 1 and facts(again) == undisturbed("count", 2)


def test_when_all_are_damaged_it_says_so_and_does_not_begin_anew(saved: Path) -> None:
    two_checkpoints(saved, 2)
    for path in saved.glob("attempt-*/*/manifest.json"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole .*; --fresh begins anew"):
        go("count", 3, saved, told=[])
    result = go("count", 3, saved, fresh=True)
    assert came_from(result) == 0 and facts(result) == undisturbed("count", 3)


# ---------------------------------------------------------------------- a disk that is full, or fails


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "fault",
    [
        FillDisk(0, path=STORED, told=True, at="checkpoint.start", nth=2),
        FillDisk(100, path=f"{STORED}/.writing-*", at="checkpoint.start", nth=2),
        FailCall("fsync", "EIO", path=f"{STORED}*.h5", times=None, at="checkpoint.start", nth=2),
        FailCall("ftruncate", "ENOSPC", path=STORED, times=None, at="checkpoint.start", nth=2),
        FailCall("mkdir", "EDQUOT", path=STORED, times=None, at="checkpoint.start", nth=2),
        FailRename(error="EROFS", path=f"{STORED}/.writing-*", times=None, at="checkpoint.start", nth=2),
    ],
    ids=lambda fault: f"{type(fault).__name__} {getattr(fault, 'call', fault.path)}",
)
def test_a_disk_that_fails_costs_checkpoints_and_not_the_job(fault: Fault, ranks: int, saved: Path) -> None:
    told: list[str] = []
    result = go("count", ranks, saved, fault, told=told)
    assert told[0].startswith("checkpoint 2 is given up, the job goes on: ")
    assert facts(result) == undisturbed("count", ranks)
    assert result.checkpoints["written"] == 1 and result.checkpoints["failed"] > 1
    assert published(saved) == ["000000000001"] and not list(saved.glob("attempt-*/.*"))


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_disk_that_fails_once_costs_one_checkpoint(ranks: int, saved: Path) -> None:
    once = FailCall("fsync", "EIO", path=f"{STORED}*.h5", times=1, at="checkpoint.start", nth=2)
    told: list[str] = []
    dies("count", ranks, saved, once, Kill(at="iteration.commit", rank=0, iteration=14), told=told)
    assert len(told) == 1 and "Input/output error" in told[0]
    again = go("count", ranks, saved)
    assert came_from(again) > 4 and facts(again) == undisturbed("count", ranks)


def test_where_warnings_are_errors_all_ranks_fail_alike(saved: Path) -> None:
    once = FailCall("fsync", "EIO", path=f"{STORED}*.h5", times=1, at="checkpoint.start", nth=2)
    with pytest.raises(StageError, match="CheckpointWarning on rank 0"):
        go("count", 3, saved, once, warn="error")
    again = go("count", 2, saved)
    assert came_from(again) > 0 and facts(again) == undisturbed("count", 2)


def test_a_job_that_is_told_to_stop_and_cannot_save_says_so(saved: Path) -> None:
    stop = StopRequest()
    full = FillDisk(0, path=STORED, told=True, at="checkpoint.start", nth=3)

    def tell(group: Group, event: Event) -> None:
        if event.name == "iteration.commit" and event.fields["iteration"] == 6:
            stop.request("SIGTERM")

    with pytest.raises(OutputError, match="the disk has 0 MiB left, a checkpoint needs"):
        go("count", 2, saved, full, told=[], watch=tell, stop=stop)
    again = go("count", 2, saved)
    assert came_from(again) == 4 and facts(again) == undisturbed("count", 2)


@pytest.mark.parametrize("step", ["write", "sync", "publish", "rename"])
def test_a_write_that_fails_somehow_is_given_up(step: str, saved: Path) -> None:
    told: list[str] = []
    fault = Raise("RuntimeError", "somehow", at=f"checkpoint.step:{step}", nth=2)
    result = go("count", 3, saved, fault, told=told)
    assert set(told) == {"checkpoint 2 is given up, the job goes on: somehow"}
    assert facts(result) == undisturbed("count", 3) and result.checkpoints["failed"] in (1, 2)


# ---------------------------------------------------------------------- a program that fails


@pytest.mark.parametrize(("step", "iteration"), [("write", 5), ("sync", 5), ("publish", 6), ("rename", 6)])
@pytest.mark.parametrize("ranks", SIZES)
def test_what_is_being_written_when_a_program_fails_is_finished(
    ranks: int, step: str, iteration: int, saved: Path
) -> None:
    late = Delay(0.3, at=f"checkpoint.step:{step}", nth=2)
    fails = Raise("InputError", "a bad row", at="iteration.start", iteration=iteration, rank=ranks - 1)
    with pytest.raises(InputError, match="a bad row"):
        go("count", ranks, saved, late, fails)
    assert published(saved)[-1] == "000000000002"
    again = go("count", ranks, saved)
    assert came_from(again) == 4 and facts(again) == undisturbed("count", ranks)


def test_a_write_that_fails_beside_a_program_that_fails_leaves_the_one_before(saved: Path) -> None:
    told: list[str] = []
    full = Raise("RuntimeError", "somehow", at="checkpoint.step:sync", nth=2)
    late = Delay(0.3, at="checkpoint.step:write", nth=2)
    fails = Raise("InputError", "a bad row", at="iteration.start", iteration=5, rank=1)
    with pytest.raises(InputError, match="a bad row"):
        go("count", 3, saved, late, full, fails, told=told)
    assert set(told) == {"checkpoint 2 is given up, the job goes on: somehow"}
    assert published(saved) == ["000000000001"]


# ---------------------------------------------------------------------- stopped


@pytest.mark.parametrize("ranks", SIZES)
def test_a_wish_to_stop_while_a_write_is_under_way_waits_for_it_and_saves_once_more(
    ranks: int, saved: Path
) -> None:
    stop = StopRequest()

    def tell(group: Group, event: Event) -> None:
        if event.name == "checkpoint.copy" and event.fields["number"] == 2:
            stop.request("SIGTERM")

    result = go("count", ranks, saved, watch=tell, stop=stop)
    assert result.outcome is Outcome.STOPPED_SAVED and published(saved) == ["000000000002", "000000000003"]
    again = go("count", 2, saved)
    assert came_from(again) == 5 and facts(again) == undisturbed("count", 2)
