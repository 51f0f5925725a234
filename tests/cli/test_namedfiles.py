"""Outputs that would overwrite what the app reads, or each other, are refused before anything is touched."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from iterreduce.arguments import CommandLineError, Request, parse_command_line
from iterreduce.cli import run_command_line
from iterreduce.errors import InputError
from iterreduce.namedfiles import check_named_files

APP = """
import iterreduce as ir
@ir.app
def rows(points: ir.Dataset, more: ir.Dataset = None, model: str = "none"):
    return points
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.py").write_text(APP)
    Path("deep").mkdir()
    for name in ("points.npy", "deep/a.npy"):
        np.save(name, np.arange(3.0))
    for name in ("points.h5", "deep/notes.json"):
        Path(name).write_bytes(b"")
    os.symlink("points.npy", "link.npy")
    os.link("points.npy", "hard.npy")
    return tmp_path


def check(line: str) -> None:
    request = parse_command_line(["rows.py", *line.split()])
    assert isinstance(request, Request)
    check_named_files(request)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "points.npy --out ./points.npy",
            "--out ./points.npy would overwrite the input POINTS; name another",
        ),
        ("points.npy --summary link.npy", "--summary link.npy would overwrite the input POINTS"),
        ("link.npy --events hard.npy", "--events hard.npy would overwrite the input POINTS"),
        ("deep --out deep/a.npy", "--out deep/a.npy would overwrite the input POINTS"),
        ("deep/*.npy --out deep/a.npy", "--out deep/a.npy would overwrite the input POINTS"),
        ("points.h5:/x --out points.h5", "--out points.h5 would overwrite the input POINTS"),
        ("deep --more points.npy --out points.npy", "--out points.npy would overwrite the input MORE"),
        ("deep --model points.npy --out points.npy", "would overwrite the input MODEL"),
        ("deep --summary rows.py", "--summary rows.py would overwrite the app itself"),
        ("deep --out a.csv --summary deep/../a.csv", "--out and --summary are the same file, deep/../a.csv"),
        ("deep --summary a --events a", "--summary and --events are the same file, a; name two"),
    ],
)
def test_an_output_that_is_an_input_or_another_output_is_refused(line: str, message: str) -> None:
    with pytest.raises(CommandLineError) as caught:
        check(line)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "points.npy --out new.npy --summary new.json",
        "deep --out deep/b.npy --summary deep/notes.json",  # no input: of another kind, or not there
        "points.npy --summary /dev/null --events /dev/null",
        "nosuch.npy --out nosuch.npy",  # opening it says so
    ],
)
def test_what_destroys_nothing_is_taken(line: str) -> None:
    check(line)


def test_the_process_ends_with_wrong_usage_and_the_input_stays(capfd: pytest.CaptureFixture[str]) -> None:
    before = Path("points.npy").read_bytes()
    assert run_command_line(["rows.py", "points.npy", "--out", "points.npy", "--events", "events"]) == 2
    told = "iterreduce: --out points.npy would overwrite the input POINTS; name another file\n"
    assert capfd.readouterr().err == told
    assert Path("points.npy").read_bytes() == before and not Path("events").exists()


@pytest.mark.parametrize("name", ["pionts.npy", "none/*.npy", "nothing"])
def test_a_plan_of_an_input_that_is_not_there_is_the_usual_error(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError):
        check(f"--explain {name}")
    assert run_command_line(["rows.py", "--explain", name]) == 1
    found = capfd.readouterr()
    assert not found.out and "iterreduce: no file" in found.err
