"""The same stories with real processes, killed by SIGKILL: what launchers and disks add to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from iterreduce.options import FAULTS_VARIABLE
from iterreduce.testing import Fault, Faults, Kill, Slow, Stop
from tests.launch import ROOT, kill_run, mpirun, mpirun_environment

APP = "benchmarks/waist/components.py"
PACE = Slow(0.01, at="iteration.start")  # else all is over before the first write is


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty vertices in a row, without an order: labels need as many iterations."""
    path = tmp_path_factory.mktemp("input") / "chain.npz"
    names = np.random.default_rng(0).permutation(50)
    np.savez(path, src=names[:-1], dst=names[1:])
    return path


def arguments(chain: Path, saved: Path | None, folder: Path) -> list[str]:
    """Of `python`."""
    given = ["-m", "iterreduce", "--reproducible", "--quiet", "--summary", f"{folder}/summary"]
    given += ["--events", f"{folder}/events"]
    if saved is not None:
        given += ["--checkpoint-dir", str(saved), "--checkpoint-every", "2"]
    return [*given, APP, str(chain)]


def environment(*faults: Fault) -> dict[str, str]:
    return {FAULTS_VARIABLE: Faults((*faults, PACE)).to_json()}


def run(ranks: int, chain: Path, saved: Path | None, folder: Path, *faults: Fault) -> tuple[int, str]:
    """Status, and what was said; one rank runs without MPI."""
    if ranks > 1:
        ended = mpirun(ranks, *arguments(chain, saved, folder), env=environment(*faults))
        return ended.returncode, ended.stdout + ended.stderr
    with alone(chain, saved, folder, *faults) as process:
        said = process.communicate(timeout=240)[0]
        return process.returncode, said


@contextlib.contextmanager
def alone(chain: Path, saved: Path | None, folder: Path, *faults: Fault) -> Iterator[subprocess.Popen[str]]:
    """One rank that runs beside the test."""
    name = f"alone-{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, *arguments(chain, saved, folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=mpirun_environment(environment(*faults), name),
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        kill_run(name)
        process.wait()


def digest(folder: Path) -> str:
    return str(json.loads((folder / "summary").read_text())["result_sha256"])


def came_from(folder: Path) -> int:
    """The iteration that the run went on from."""
    events = map(json.loads, (folder / "events").read_text().splitlines())
    return next((int(event["iteration"]) for event in events if event["event"] == "restart"), 0)


@cache
def undisturbed(chain: Path) -> str:
    folder = chain.parent
    assert run(1, chain, None, folder)[0] == 0
    return digest(folder)


@pytest.mark.parametrize(
    ("ranks", "fault", "then"),
    [
        (3, Kill(at="exchange.ready", rank=1, iteration=20), 1),
        (2, Kill(at="checkpoint.step:rename", rank=0, nth=2), 3),
        (1, Kill(at="checkpoint.step:write.half", nth=2), 1),
    ],
    ids=str,
)
def test_killed_ranks_are_taken_up_by_others_with_the_same_bits(
    ranks: int, fault: Kill, then: int, chain: Path, tmp_path: Path
) -> None:
    status, said = run(ranks, chain, tmp_path / "saved", tmp_path, fault)
    assert status != 0 and str(fault) in said
    status, said = run(then, chain, tmp_path / "saved", tmp_path)
    assert status == 0, said
    assert came_from(tmp_path) > 0 and digest(tmp_path) == undisturbed(chain)
    assert not list(tmp_path.glob("saved/attempt-*/.*")), "nothing half-written is left"


def test_a_run_that_was_thought_dead_wakes_up_beside_its_successor(chain: Path, tmp_path: Path) -> None:
    first, second, saved = tmp_path / "first", tmp_path / "second", tmp_path / "saved"
    first.mkdir()
    second.mkdir()
    with alone(chain, saved, first, Stop(at="checkpoint.step:rename", nth=2)) as sleeper:
        wait_until_stopped(sleeper.pid)
        status, said = run(1, chain, saved, second)
        assert status == 0, said
        left = sorted(path.name for path in saved.rglob("*"))
        os.kill(sleeper.pid, signal.SIGCONT)
        said = sleeper.communicate(timeout=240)[0]
    assert sleeper.returncode == 1 and "another run has taken over" in said
    assert "Traceback" not in said
    assert came_from(second) > 0 and digest(second) == undisturbed(chain)
    word = ".taken-over-000001"  # all that it leaves: that it was alive
    assert sorted(path.name for path in saved.rglob("*")) == sorted([*left, word])


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 120
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "it did not stop"
        time.sleep(0.02)


def test_of_two_that_are_started_at_once_the_job_is_done_and_nobody_hangs(
    chain: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(alone(chain, tmp_path / "saved", folder)) for folder in folders]
        said = [process.communicate(timeout=240)[0] for process in both]
    for process, folder, text in zip(both, folders, said, strict=True):
        if process.returncode:
            assert "another run has taken over" in text and "Traceback" not in text
        else:
            assert digest(folder) == undisturbed(chain)
    assert any(process.returncode == 0 for process in both), said
