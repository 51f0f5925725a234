"""A checkpoint directory: one live attempt, a fence, a history, and nothing that is not ours is touched."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from iterreduce.collectives import Group, SoloGroup
from iterreduce.errors import CheckpointError, IterReduceError, OutputError
from iterreduce.saving.directory import Attempt, read_history
from iterreduce.saving.inspecting import describe
from iterreduce.saving.reading import newest
from iterreduce.saving.sealing import read_sealed, sealed
from iterreduce.testing import run_ranks

from .kit import names_in, newest_here, rows_of_every_kind, saved

SOLO = SoloGroup()
ROWS = rows_of_every_kind(5)


def refused(place: Path) -> str:
    """The error of opening a directory, the same on three ranks."""

    def work(group: Group) -> str:
        with pytest.raises(IterReduceError) as info:
            Attempt.open(group, place)
        return f"{type(info.value).__name__}: {info.value}"

    (text,) = set(run_ranks(3, work))
    return text


def test_all_ranks_hold_the_same_attempt(ranks: int, tmp_path: Path) -> None:
    def work(group: Group) -> tuple[str, int]:
        attempt = Attempt.open(group, tmp_path / "new")
        return attempt.path, attempt.number

    for number in (1, 2, 3):
        assert set(run_ranks(ranks, work)) == {(str(tmp_path / "new" / f"attempt-{number:06d}"), number)}
    assert names_in(tmp_path / "new") == ["attempt-000003", "iterreduce.json"]


def test_the_history_tells_interrupts_from_other_ends(tmp_path: Path) -> None:
    for end in ("running", "stopped", "failed", "running", "finished"):
        attempt = Attempt.open(SOLO, tmp_path)
        attempt.note(iteration=7, seconds=10.0, end=end)
    history = Attempt.open(SOLO, tmp_path).history
    ends = ["interrupted", "stopped", "failed", "interrupted", "finished", "running"]
    assert [entry.end for entry in history.entries] == ends
    assert (history.interrupts, history.total_seconds) == (2, 50.0)
    assert [entry.number for entry in history.entries] == [1, 2, 3, 4, 5, 6]


def test_published_checkpoints_stay_and_what_was_half_written_goes(tmp_path: Path) -> None:
    path = saved(tmp_path, 2, ROWS, range(1, 3))
    (path / ".writing-000000000003").mkdir()
    (path / ".writing-000000000003" / "node-0000.h5").write_bytes(b"half")
    (path / ".attempts.json.abc.part").write_bytes(b"half")
    attempt = Attempt.open(SOLO, tmp_path)
    assert attempt.checkpoints() == [2, 1]
    assert names_in(Path(attempt.path)) == ["000000000001", "000000000002", "attempts.json"]


def test_fresh_removes_checkpoints_and_the_marker_and_keeps_the_history(tmp_path: Path) -> None:
    saved(tmp_path, 2, ROWS, range(1, 3))
    attempt = Attempt.open(SOLO, tmp_path)
    attempt.finish({"outcome": "CONVERGED"})
    assert Attempt.open(SOLO, tmp_path).finished == {"outcome": "CONVERGED"}
    fresh = Attempt.open(SOLO, tmp_path, fresh=True)
    assert (fresh.checkpoints(), fresh.finished, len(fresh.history.entries)) == ([], None, 4)


def test_what_is_removed_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be killed while it removes files, and some cannot be removed."""
    monkeypatch.setattr("iterreduce.saving.directory.remove", lambda path: None)
    for _ in range(2):
        path = saved(tmp_path, 2, ROWS, range(1, 4))
        assert [name for name in names_in(path) if name.isdigit()] == ["000000000002", "000000000003"]
        assert Attempt.open(SOLO, tmp_path, fresh=True).checkpoints() == []


@pytest.mark.parametrize("entered", [True, False])
def test_checkpoints_that_somebody_removed_are_missed(entered: bool, tmp_path: Path) -> None:
    """Nothing begins anew by itself, also if the run was killed before it entered what it had published."""
    path = saved(tmp_path, 2, ROWS, range(1, 4))
    if not entered:  # nor did an earlier version
        facts = read_sealed(str(path / "attempts.json"))
        for entry in facts["attempts"]:
            assert entry.pop("published") == 3
        (path / "attempts.json").write_bytes(sealed({k: facts[k] for k in ("format", "version", "attempts")}))
    warnings: list[str] = []
    shutil.rmtree(Attempt.open(SOLO, tmp_path).place(3))
    found = newest_here(tmp_path, warnings.append)
    assert found is not None and found.number == 2 and "000000000003 was removed" in warnings[0]
    shutil.rmtree(found.path)

    def work(group: Group) -> str:
        with pytest.raises(CheckpointError) as info:
            newest(group, Attempt.open(group, tmp_path), print)
        return str(info.value)

    for _ in range(2):
        (text,) = set(run_ranks(3, work))
        assert "checkpoint 3 was published there, and none is there any more" in text and "--fresh" in text
    assert "checkpoint 3 was published and is gone" in describe(tmp_path)[0]
    fresh = Attempt.open(SOLO, tmp_path, fresh=True)
    assert read_history(fresh.path).published == 0 and newest_here(tmp_path) is None
    assert describe(tmp_path)[1]


@pytest.mark.parametrize("call", range(1, 8))
def test_a_fresh_start_that_was_interrupted_is_gone_on_with(call: int, tmp_path: Path) -> None:
    """Nothing is removed, or else the next run, which is not told to be fresh, removes the rest."""
    saved(tmp_path, 2, ROWS, range(1, 4))
    Attempt.open(SOLO, tmp_path).finish({"outcome": "CONVERGED"})
    calls = [0]

    def dies(*_: object) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "unlink"):
            patch.setattr(os, name, _behind(getattr(os, name), dies))
        with contextlib.suppress(KeyboardInterrupt):
            Attempt.open(SOLO, tmp_path, fresh=True)
    after = Attempt.open(SOLO, tmp_path)
    assert after.finished is None or call == 1
    assert after.checkpoints() == ([3, 2] if call == 1 else [])
    assert call == 1 or newest_here(tmp_path) is None, "what a fresh start removed is not missed"


def _behind(function: Any, then: Any) -> Any:
    """The function, and after it the other."""

    def both(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        then(*args)

    return both


def test_an_attempt_that_is_a_file_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "attempt-000001").write_text("mine")
    assert "attempt-000001 is no directory" in refused(tmp_path)
    assert (tmp_path / "attempt-000001").read_text() == "mine"


def test_all_ranks_learn_that_the_job_has_finished(tmp_path: Path) -> None:
    Attempt.open(SOLO, tmp_path).finish({"outcome": "CONVERGED", "result_sha256": "ab"})
    found = run_ranks(3, lambda group: Attempt.open(group, tmp_path).finished)
    assert found == [{"outcome": "CONVERGED", "result_sha256": "ab"}] * 3


def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    assert "holds other things (thesis.tex)" in refused(tmp_path)
    assert names_in(tmp_path) == ["thesis.tex"]


def test_a_file_a_missing_parent_and_a_later_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is no directory" in refused(tmp_path / "file")
    assert "no directory" in refused(tmp_path / "a" / "b")
    (tmp_path / "later").mkdir()
    Attempt.open(SOLO, tmp_path / "later")
    mark = tmp_path / "later" / "iterreduce.json"
    mark.write_text("{}")
    assert "its end is missing" in refused(tmp_path / "later")
    from iterreduce.saving.sealing import sealed

    mark.write_bytes(sealed({"format": "iterreduce checkpoints", "version": 2}))
    assert "written in format 2" in refused(tmp_path / "later")


def test_a_lost_mark_or_history_loses_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path, 1, ROWS)
    (tmp_path / "iterreduce.json").unlink()
    (path / "attempts.json").write_text(json.dumps({"attempts": 7}))
    attempt = Attempt.open(SOLO, tmp_path)
    assert attempt.checkpoints() == [1]
    assert len(attempt.history.entries) == 1
    assert names_in(tmp_path) == ["attempt-000002", "iterreduce.json"]


def test_of_runs_that_start_at_once_one_holds_the_directory(tmp_path: Path) -> None:
    def start(group: Group) -> Attempt | None:
        try:
            return Attempt.open(SoloGroup(), tmp_path / "new")
        except CheckpointError as error:
            if "another run has taken over" not in str(error):
                raise
            return None

    attempts = [attempt for attempt in run_ranks(8, start) if attempt is not None]
    live = [a for a in attempts if os.path.exists(a.path)]
    assert len(live) == 1
    assert live[0].number == max(a.number for a in attempts)
    for attempt in attempts:
        if attempt is live[0]:
            attempt.note(iteration=1, seconds=1.0)
        else:
            with pytest.raises(CheckpointError, match="another run has taken over"):
                attempt.note(iteration=1, seconds=1.0)
            with pytest.raises(CheckpointError, match="another run has taken over"):
                attempt.finish({})
            with pytest.raises(CheckpointError, match="another run has taken over"):
                attempt.checkpoints()


def test_a_directory_that_vanished_is_said_so(tmp_path: Path) -> None:
    attempt = Attempt.open(SOLO, tmp_path / "d")
    (tmp_path / "d").rename(tmp_path / "e")
    with pytest.raises((CheckpointError, OutputError), match="d"):
        attempt.note(iteration=1, seconds=1.0)
