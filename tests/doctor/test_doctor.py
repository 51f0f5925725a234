"""`python -m iterreduce doctor` as users call it: alone, under mpirun, under a launcher of another MPI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from iterreduce.doctor.command import doctor
from iterreduce.doctor.facts import gather
from iterreduce.doctor.meeting import meet
from tests.launch import ROOT, mpirun, mpirun_environment

DOCTOR = ("-m", "iterreduce", "doctor")
LATE = """
import os, sys, time
if os.environ.get("PMI_RANK", os.environ.get("PMIX_RANK")) == "1":
    time.sleep(25)
sys.argv = ["iterreduce", "doctor", "--json", "--timeout=5"]
from iterreduce.__main__ import main
main()
"""
HANGS = """
import subprocess, sys, time
with open(sys.argv[1], "w") as file:
    file.write(str(subprocess.Popen(["sleep", "97"]).pid))
time.sleep(98)
"""


def called(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *DOCTOR, *words],
        capture_output=True,
        text=True,
        timeout=200,
        env=mpirun_environment(more),
        cwd=ROOT,
    )


def told(text: str) -> dict[str, Any]:
    """The one JSON object among what ranks said."""
    (found,) = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return dict(found)


def verdicts(found: dict[str, Any], about: str) -> list[str]:
    return [one["verdict"] for one in found["findings"] if one["about"] == about]


def test_alone_it_tries_the_launcher_with_two_ranks(tmp_path: Path) -> None:
    done = called("--json", f"--dir={tmp_path}/saved")
    found = told(done.stdout)
    assert verdicts(found, "trial") == ["ok"], done
    assert done.returncode == int(found["broken"]) and found["ranks"] == 1
    assert found["mpi"]["library"] and verdicts(found, "hdf5") == ["ok"]
    assert not list(tmp_path.iterdir())


def test_under_mpirun_rank_0_speaks_for_all(tmp_path: Path) -> None:
    done = mpirun(3, *DOCTOR, "--json", f"--dir={tmp_path}")
    found = told(done.stdout)
    assert found["ranks"] == 3 and verdicts(found, "launcher") == ["ok"], done
    assert verdicts(found, "clock") == ["ok"] and "broken" not in verdicts(found, "directory")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sign", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launcher_of_another_mpi_is_a_diagnosis(sign: str) -> None:
    """As such a launcher leaves it: its number of ranks in the environment, and nothing that MPI finds."""
    done = called("--json", **{sign: "4"})
    found = told(done.stdout)
    assert done.returncode == 1 and found["broken"], done
    (launcher,) = [one for one in found["findings"] if one["about"] == "launcher"]
    assert launcher["verdict"] == "broken" and "srun --mpi=pmix" in launcher["advice"]


def test_of_worlds_of_one_only_the_first_rank_speaks() -> None:
    done = called("--json", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="2")
    assert (done.returncode, done.stdout) == (0, "")


def test_ranks_that_do_not_meet_in_time_are_a_diagnosis() -> None:
    """One rank of a real launcher never comes: the others must not wait for it."""
    began = time.monotonic()
    done = mpirun(2, "-c", LATE, timeout=120)
    assert "after 5 s the ranks have not met" in done.stdout and done.returncode != 0, done
    assert time.monotonic() - began < 110


def test_a_child_that_is_killed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dies = tmp_path / "python"
    dies.write_text("#!/bin/bash\necho 'no such fabric' >&2\nkill -SEGV $$\n")
    dies.chmod(0o755)
    facts = gather(None)
    monkeypatch.setattr(sys, "executable", str(dies))
    problem = meet(facts, None, 20).problem
    assert "SIGSEGV" in problem and "no such fabric" in problem


def test_a_launcher_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from iterreduce.doctor import command

    began = time.monotonic()
    found = command._trial([sys.executable, "-c", HANGS, str(tmp_path / "pid")], 5)
    assert "have not ended after 5 s" in found.problem and time.monotonic() - began < 30
    left = (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 5
    while _runs(left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(left)


def _runs(pid: str) -> bool:
    path = Path("/proc") / pid / "stat"
    return path.exists() and path.read_text().split()[2] != "Z"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--jason"], "unknown option --jason"),
        (["--dir"], "wants a value"),
        (["--timeout=soon"], "wanted seconds"),
    ],
)
def test_wrong_usage(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(words) == 2
    assert why in capsys.readouterr().err


def test_without_mpi4py_one_rank_runs_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.metadata

    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "mpi4py":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for name in list(os.environ):
        if name.startswith(("PMI", "OMPI_COMM", "SLURM_")):
            monkeypatch.delenv(name)
    doctor([])
    out = capsys.readouterr().out
    assert "care    launcher   there is no mpi4py: one rank runs, several do not" in out
    assert "pip install 'iterreduce[mpich]'" in out


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["--help"]) == 0 and "--sweep" in capsys.readouterr().out
