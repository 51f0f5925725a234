"""The main job through the command line: the same answer alone and on ranks, with all outputs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iterreduce.watchers import COMPILING
from tests.launch import ROOT, mpirun, mpirun_environment

APP = str(ROOT / "apps" / "kmeans.py")
WORDS = ("--k", "2", "--quiet")


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two far groups of 200 points: the centres are the means, wherever the loop starts."""
    path = tmp_path_factory.mktemp("points") / "points.npy"
    rng = np.random.default_rng(7)
    np.save(path, np.concatenate([rng.normal(0, 1, (200, 3)), rng.normal(50, 1, (200, 3))]))
    return str(path)


def run(ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    if ranks > 1:
        return mpirun(ranks, "-m", "iterreduce", *words, timeout=240)
    command = [sys.executable, "-m", "iterreduce", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=mpirun_environment())


def centres(path: Path) -> list[list[float]]:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return sorted([float(cell) for cell in row] for row in rows[1:])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_centres_summary_and_events_are_written_on_any_number_of_ranks(
    points: str, tmp_path: Path, ranks: int
) -> None:
    out, summary, events = (tmp_path / name for name in ("centroids.csv", "run.json", "events.jsonl"))
    outputs = ["--out", str(out), "--summary", str(summary), "--events", str(events)]
    result = run(ranks, APP, points, *WORDS, *outputs)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""

    means = np.load(points).reshape(2, 200, 3).mean(axis=1)
    found = np.array([row[-3:] for row in centres(out)])
    np.testing.assert_allclose(found[np.argsort(found[:, 0])], means, rtol=1e-12)

    told: dict[str, Any] = json.loads(summary.read_text())
    assert told["app"] == "kmeans" and told["ranks"] == ranks and told["iterations"] >= 1
    assert told["outcome"] in ("CONVERGED", "UNCHANGED") and len(told["result_sha256"]) == 64
    assert {"start", "load", "iterate", "total"} <= set(told["seconds"])
    assert set(told["seconds_per_iteration"]) == {"min", "median", "max"}
    assert len(told["bytes_exchanged"]["per_iteration"]) == told["iterations"]
    assert told["peak_rss_bytes"]["sum"] >= told["peak_rss_bytes"]["max"] > 0
    assert told["memory_bytes"]["source rows (points.npy)"] >= 400 * 3 * 8 // ranks
    assert told["memory_bytes"]["total"] <= sum(told["memory_bytes"].values()) / 2
    assert (told["bytes_exchanged"]["total"] > 0) == (ranks > 1)

    names = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert names[0] == "run.start" and names[-1] == "run.end"
    assert names.count("iteration.commit") == told["iterations"]


def test_progress_goes_to_standard_error_and_names_the_outcome(points: str) -> None:
    result = run(1, APP, points, "--k", "2")
    assert result.returncode == 0 and result.stdout == ""
    assert result.stderr.removeprefix(f"{COMPILING}\n").startswith("iteration 1  residual ")
    assert " after " in result.stderr.splitlines()[-1]


def test_naive_and_checked_runs_give_the_same_centres(points: str, tmp_path: Path) -> None:
    for name, option in (("plain.csv", "--no-check"), ("naive.csv", "--naive"), ("checked.csv", "--check")):
        assert run(1, APP, points, *WORDS, option, "--out", str(tmp_path / name)).returncode == 0
    plain = (tmp_path / "plain.csv").read_text()
    assert plain == (tmp_path / "naive.csv").read_text() == (tmp_path / "checked.csv").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_input_that_is_missing_is_one_message(tmp_path: Path, ranks: int) -> None:
    result = run(ranks, APP, str(tmp_path / "none.npy"))
    assert result.returncode == 1
    assert result.stderr.count("none.npy") == 1 and "Traceback" not in result.stderr


def test_a_result_that_cannot_be_written_is_told_before_the_work_starts(points: str) -> None:
    result = run(1, APP, points, "--out", "no/such/place.csv")
    assert result.returncode == 1
    assert "no/such" in result.stderr and "iteration" not in result.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_points_that_cannot_fit_are_refused_with_what_would_help(tmp_path: Path, ranks: int) -> None:
    path = tmp_path / "many.npy"
    np.save(path, np.zeros((400_000, 3)))
    result = run(ranks, APP, str(path), *WORDS, "--memory", "2MiB", "--scratch", "none")
    assert result.returncode == 1
    assert "needs at least" in result.stderr and "source rows (many.npy)" in result.stderr
    assert "use at least 5 ranks" in result.stderr and "--memory" in result.stderr
    assert result.stderr.count("needs at least") == 1
