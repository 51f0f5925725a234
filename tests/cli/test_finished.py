"""The command of a job that has finished, given once more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.launch import ROOT


def command(folder: Path, *more: str) -> tuple[int, str]:
    """One rank of k-means, in a folder of its own; status and what it said."""
    app = [str(ROOT / "apps" / "kmeans.py"), "points.npy", "--k", "3", "--quiet", "--out", "centroids.csv"]
    words = [sys.executable, "-m", "iterreduce", *app, "--checkpoint-dir", "saved", *more]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stderr


def test_a_finished_job_says_so_unless_its_input_or_its_result_has_changed(tmp_path: Path) -> None:
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(300, 2)))
    assert command(tmp_path) == (0, "")
    result = (tmp_path / "centroids.csv").read_text()
    status, said = command(tmp_path)
    assert status == 0 and "this job has finished" in said and "--fresh" in said
    assert "failed" not in said
    assert command(tmp_path, "--summary", "run.json")[0] == 0
    assert '"finished_before": true' in (tmp_path / "run.json").read_text()
    (tmp_path / "centroids.csv").unlink()
    status, said = command(tmp_path)
    assert status == 1 and "there is no centroids.csv, and this job has finished" in said
    assert command(tmp_path, "--fresh") == (0, "")
    assert (tmp_path / "centroids.csv").read_text() == result
    np.save(tmp_path / "points.npy", np.random.default_rng(1).normal(size=(300, 2)))
    status, said = command(tmp_path)
    assert status == 1 and "another input was finished there" in said
