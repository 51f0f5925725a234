"""What a person is told about a checkpoint directory: all that is there, good or bad; nothing is touched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import iterreduce as ir
from iterreduce.collectives import SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.saving import inspecting
from iterreduce.saving.directory import Attempt
from iterreduce.saving.inspecting import describe
from iterreduce.saving.reading import load
from iterreduce.saving.sealing import sealed

from .kit import names_in, rows_of_every_kind, saved
from .programs import PROGRAMS, run_once

ROWS = rows_of_every_kind(50)


def contents(place: Path) -> dict[str, Any]:
    """Every file below a directory with its bytes and time, every directory with its time."""
    return {
        str(path): (os.stat(path).st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(place.rglob("*"))
    }


def flip(path: Path, byte: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 16
    path.write_bytes(raw)


def test_it_tells_job_attempts_checkpoints_tables_and_touches_nothing(tmp_path: Path) -> None:
    result = run_once(PROGRAMS["nested"], 2, tmp_path, stop_after=3, checkpoint_every=1)[0]
    assert result.outcome is ir.Outcome.STOPPED_SAVED
    before = contents(tmp_path)
    text, good = describe(tmp_path)
    assert good
    assert contents(tmp_path) == before
    number = max(n for n in names_in(tmp_path / "attempt-000001") if n.startswith("0"))
    facts = load(str(tmp_path / "attempt-000001" / number)).facts
    inner = facts["levels"][1]
    for told in (
        'checkpoints of the loop "several k", format',
        "\n  input: points: 60 rows",
        "attempt 1: began 20",
        "(2 ranks), ran for",
        ", stopped\n",
        f'checkpoint {int(number)}: iteration {facts["levels"][0]["iteration"]} of "several k"',
        f'in it iteration {inner["iteration"]} of "{inner["loop"]}"',
        'table "best": 4 rows the same on all ranks: x float64[2], score float64',
        "good: every byte fits its checksum",
        f"the next run goes on from checkpoint {int(number)}\n",
    ):
        assert told in text


def test_a_job_that_has_finished_says_how(tmp_path: Path) -> None:
    saved(tmp_path, 3, ROWS)
    attempt = Attempt.open(SoloGroup(), tmp_path)
    attempt.finish({"outcome": "CONVERGED", "iterations": 12, "job": {"loop": {"name": "'x'"}}})
    text, good = describe(tmp_path)
    assert good
    assert "the job has finished: CONVERGED after 12 iterations\n" in text
    assert "attempt 2" in text and ", finished\n" in text
    assert "attempt 1" in text and ", noted no iteration, cut off\n" in text
    assert 'table "rows": 50 rows (' in text


@pytest.mark.parametrize("ended", ["a", "b"])
def test_an_attempt_that_runs_may_be_cut_off_and_a_job_without_checkpoints_begins_anew(
    ended: str, tmp_path: Path
) -> None:
    attempt = Attempt.open(SoloGroup(), tmp_path)
    if ended == "b":
        attempt.note(iteration=4, seconds=1.0, end="ended")
    text, good = describe(tmp_path)
    assert good and "the next run begins anew" in text and "no checkpoint is published" in text
    said = {"a": "noted no iteration, running, or cut off since", "b": "reached iteration 4, ended"}
    assert said[ended] in text
    if ended == "a":
        attempt.note(iteration=7, seconds=61.0)
        assert "at iteration 7 after 61.0 s, running, or cut off since" in describe(tmp_path)[0]


def test_the_rules_of_a_job_that_has_finished_are_told_in_words(tmp_path: Path) -> None:
    result = run_once(PROGRAMS["nested"], 1, tmp_path)[0]
    result.finish()
    text, good = describe(tmp_path)
    assert good and f"the job has finished: {result.outcome.name} after {result.iterations} it" in text
    assert "    stopping rule: " in text and '    stopping rule of the inner loop "' in text
    assert f"digest of the result (SHA-256): {result.result_sha256}\n" in text
    assert "until" not in text and "{" not in text


def test_a_run_that_was_taken_over_while_it_ran_says_so_and_counts_as_no_interrupt(tmp_path: Path) -> None:
    old = Attempt.open(SoloGroup(), tmp_path)
    new = Attempt.open(SoloGroup(), tmp_path)
    assert "attempt 1" in describe(tmp_path)[0] and ", cut off\n" in describe(tmp_path)[0]
    assert new.history.interrupts == 1  # nobody can know yet
    for _ in range(2):
        with pytest.raises(ir.CheckpointError, match="another run has taken over"):
            old.note(iteration=3, seconds=2.0, end="failed")
        text, good = describe(tmp_path)
        assert good and ", taken over by attempt 2 while it ran\n" in text and ", cut off\n" not in text
    last = Attempt.open(SoloGroup(), tmp_path)
    assert [entry.end for entry in last.history.entries] == ["taken over", "interrupted", "running"]
    assert names_in(tmp_path) == ["attempt-000003", "iterreduce.json"]
    assert "taken over by attempt 2" in describe(tmp_path)[0]


def test_a_run_whose_directory_was_emptied_leaves_nothing_there(tmp_path: Path) -> None:
    old = Attempt.open(SoloGroup(), tmp_path)
    for entry in list(tmp_path.iterdir()):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    with pytest.raises(ir.CheckpointError, match="has vanished"):
        old.note(iteration=3, seconds=2.0, end="failed")
    assert not list(tmp_path.iterdir())


def test_what_is_damaged_is_named_with_the_reason_and_the_one_before_is_next(tmp_path: Path) -> None:
    path = saved(tmp_path, 2, ROWS, range(1, 3))
    (first,) = load(str(path / "000000000002")).tables["rows"].pieces["f8", "rows"][:1]
    flip(path / "000000000002" / "node-0000.h5", first.offset)
    text, good = describe(tmp_path)
    assert not good
    assert 'checkpoint 2 is BAD: node-0000.h5: column "f8" (rows) of table "rows", as rank 0 wrote it' in text
    assert "goes on from checkpoint 1\n" in text
    text, good = describe(tmp_path, verify=False)
    assert good and "not verified" in text  # it looks at sizes only
    for number in (1, 2):
        (path / f"{number:012d}" / "node-0000.h5").unlink()
    text, good = describe(tmp_path, verify=False)
    assert not good and "checkpoint 1 is BAD: node-0000.h5: it is missing" in text
    assert "only a run with --fresh can begin anew" in text


@pytest.mark.parametrize("name", ["attempts.json", "finished.json", "iterreduce.json"])
def test_a_damaged_small_file_is_said(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, 1, ROWS)
    Attempt.open(SoloGroup(), tmp_path).finish({"outcome": "CONVERGED"})
    path = tmp_path / name if name == "iterreduce.json" else path.with_name("attempt-000002") / name
    flip(path, 10)
    text, good = describe(tmp_path)
    assert not good and name in text and "checksum" in text


def test_a_directory_of_another_kind_is_told_and_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / "empty").mkdir()
    for place, good, told in (
        (tmp_path, False, "holds other things (empty, thesis.tex)"),
        (tmp_path / "empty", True, "nothing was saved here yet"),
        (tmp_path / "none", False, "No such file"),
        (tmp_path / "thesis.tex", False, "Not a directory"),
    ):
        text, found = describe(place)
        assert found == good and told in text
    assert names_in(tmp_path) == ["empty", "thesis.tex"]
    assert names_in(tmp_path / "empty") == []


def test_a_run_that_takes_over_or_drops_a_checkpoint_meanwhile_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, ROWS, range(1, 3))
    events = [lambda: Attempt.open(SoloGroup(), tmp_path)]

    def load_late(place: str) -> Any:
        if events:
            events.pop()()
        return load(place)

    monkeypatch.setattr(inspecting, "load", load_late)
    text, good = describe(tmp_path)
    assert good and "attempt 2: began" in text and "goes on from checkpoint 2" in text
    events.append(lambda: shutil.rmtree(tmp_path / "attempt-000002" / "000000000001"))
    events.append(lambda: None)
    text, good = describe(tmp_path)
    assert good and "checkpoint 1 was dropped in this moment" in text


def test_text_from_files_cannot_steer_a_terminal_and_long_lists_are_cut(tmp_path: Path) -> None:
    names = {f"c\x1b[2J{i}\n": i for i in range(200)}
    saved(tmp_path, 1, Batch.from_dict({name: [i] for name, i in names.items()}))
    attempt = Attempt.open(SoloGroup(), tmp_path)
    evil = {"loop": {"name": "\x1b]0;x\x07"}, "input": ["no", "mapping"], "settings": 7}
    attempt.finish({"job": evil, "outcome": "\r" + "x" * 10_000})
    text, _ = describe(tmp_path)
    assert "\x1b" not in text and "\r" not in text and "\x07" not in text
    assert "and 100 more columns" in text and len(text) < 20_000


@pytest.mark.parametrize(
    "levels", [None, 7, [], [7], [{}], [{"iteration": {}, "loop": ["\n"]}], [{"loop": None}] * 10_000]
)
def test_facts_of_any_shape_are_told_somehow(levels: Any, tmp_path: Path) -> None:
    saved(tmp_path, 1, ROWS, facts={"levels": levels, "job": levels})
    text, good = describe(tmp_path)
    assert good and "checkpoint 1: " in text


def test_a_history_of_another_shape_is_damage(tmp_path: Path) -> None:
    path = saved(tmp_path, 1, ROWS)
    for entries in (None, [7], [{"number": 1}], [{"number": "1"}]):
        (path / "attempts.json").write_bytes(sealed({"attempts": entries}))
        text, good = describe(tmp_path)
        assert not good and "the history of attempts is lost" in text
