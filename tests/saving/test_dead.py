"""A rank that is dead as a thread leaves on the disk what a killed process leaves: everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from iterreduce.collectives import SoloGroup
from iterreduce.saving.directory import Attempt
from iterreduce.testing import FailCall, Kill

from .kit import names_in
from .test_recovery import dies, facts, go, undisturbed

STEPS = ("write", "write.half", "sync", "publish", "rename")


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("step", STEPS)
def test_who_dies_in_the_writer_publishes_removes_and_notes_nothing(
    step: str, ranks: int, tmp_path: Path
) -> None:
    dies("count", ranks, tmp_path / "d", Kill(at=f"checkpoint.step:{step}", rank=0, nth=3))
    (path,) = (tmp_path / "d").glob("attempt-*")
    assert [name for name in names_in(path) if name != "attempts.json"] == [
        ".writing-000000000003",
        "000000000001",
        "000000000002",
    ]
    assert [entry.end for entry in Attempt.open(SoloGroup(), tmp_path / "d").history.entries] == [
        "interrupted",
        "running",
    ]
    assert facts(go("count", ranks, tmp_path / "d")) == undisturbed("count", ranks)


@pytest.mark.parametrize("place", ["iteration.commit", "checkpoint.copy", "control.ready"])
def test_who_dies_beside_its_writer_leaves_what_is_written(place: str, tmp_path: Path) -> None:
    dies("count", 1, tmp_path / "d", Kill(at=place, nth=2))
    entries = Attempt.open(SoloGroup(), tmp_path / "d").history.entries
    assert [entry.end for entry in entries] == ["interrupted", "running"]
    assert facts(go("count", 1, tmp_path / "d")) == undisturbed("count", 1)


def test_a_failure_that_is_no_death_is_cleaned_up_and_noted(tmp_path: Path) -> None:
    told: list[str] = []
    go("count", 2, tmp_path / "d", FailCall(path="*.writing-000000000003*", call="fsync"), told=told)
    (path,) = (tmp_path / "d").glob("attempt-*")
    assert told and not any(name.startswith(".writing") for name in names_in(path))
