"""SIGTERM, SIGINT, SIGUSR1 and the time limit: a run with a checkpoint directory saves and leaves with 75."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.waiting import SLOW, lines_of, pid_of, until
from tests.launch import ROOT, kill_run, mpirun_command, mpirun_environment, mpirun_path

#: Enough that no test sees the end unless it means to.
ENDLESS = "1000000"


class Run:
    """An app that counts slowly, on real ranks; its files lie in `folder`."""

    def __init__(self, folder: Path, ranks: int, *words: str, iterations: str = ENDLESS, **env: str):
        self.folder, self.ranks, self.run = folder, ranks, uuid.uuid4().hex
        app = folder / "slow.py"
        app.write_text(SLOW)
        python = [sys.executable] if ranks == 1 else mpirun_command(ranks)
        env = {"ITERREDUCE_TEST_FOLDER": str(folder), **env}
        self.process = subprocess.Popen(
            [*python, "-m", "iterreduce", "--quiet", str(app), "--iterations", iterations, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=mpirun_environment(env, self.run),
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def iterates(self, iteration: int = 2) -> None:
        """Wait until every rank has begun this iteration."""
        logs = [self.folder / f"iterations-{rank}" for rank in range(self.ranks)]
        until(lambda: all(lines_of(log) >= iteration for log in logs), self.process)

    def loads(self) -> None:
        """Wait until every rank loads the app."""
        pids = [self.folder / f"pid-{rank}" for rank in range(self.ranks)]
        until(lambda: all(pid.exists() for pid in pids), self.process)

    def signal(self, number: int, rank: int) -> None:
        os.kill(pid_of(self.folder, rank), number)

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=200)
        return self.process.returncode, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Run]]:
    runs: list[Run] = []

    def begin(ranks: int, *words: str, **more: str) -> Run:
        runs.append(Run(tmp_path, ranks, *words, **more))
        return runs[-1]

    yield begin  # type: ignore[misc]
    for run in runs:
        kill_run(run.run)
        run.process.communicate()


def saving(folder: Path) -> tuple[str, ...]:
    words = {"checkpoint-dir": "saved", "checkpoint-every": None, "summary": "run.json", "out": "out.npy"}
    return tuple(
        word for name, file in words.items() for word in (f"--{name}", str(folder / file) if file else "0")
    )


def assert_saved(run: Run, why: str) -> None:
    status, err = run.end()
    assert status == 75, err
    said = [line for line in err.splitlines() if line.startswith("iterreduce:")]
    summary = json.loads((run.folder / "run.json").read_text())
    assert summary["outcome"] == "STOPPED_SAVED"
    done = summary["iterations"]
    where = f"after iteration {done}, saved" if done else "before the first iteration"
    then = "goes on" if done else "begins"
    assert said == [f"iterreduce: stopped by {why} {where}; run the same command again and it {then}"]
    assert not (run.folder / "out.npy").exists()
    assert bool(list((run.folder / "saved").glob("attempt-*/0*"))) == bool(done)


def is_open_mpi() -> bool:
    return "Open MPI" in subprocess.run([mpirun_path(), "--version"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("ranks", "rank", "name"),
    [(1, 0, "SIGINT"), (1, 0, "SIGTERM"), (3, 0, "SIGINT"), (3, 0, "SIGUSR1"), (3, 2, "SIGTERM")],
)
def test_one_signal_to_one_rank_saves_and_stops_all(
    start: type[Run], tmp_path: Path, ranks: int, rank: int, name: str
) -> None:
    run = start(ranks, *saving(tmp_path))
    run.iterates()
    run.signal(getattr(signal, name), rank)
    assert_saved(run, name)


def test_sigusr1_to_the_launcher_saves_with_every_mpi(start: type[Run], tmp_path: Path) -> None:
    run = start(2, *saving(tmp_path))
    run.iterates()
    run.process.send_signal(signal.SIGUSR1)
    assert_saved(run, "SIGUSR1")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_sigterm_to_the_launcher_saves_where_the_launcher_gives_time(
    start: type[Run], tmp_path: Path, name: str
) -> None:
    run = start(2, *saving(tmp_path))
    run.iterates()
    run.process.send_signal(getattr(signal, name))
    if not is_open_mpi():
        assert_saved(run, name)
    else:  # its ranks are killed a quarter of a second later
        assert run.end()[0] != 0


@pytest.mark.parametrize(
    ("ranks", "name", "word"), [(1, "SIGTERM", "terminated"), (2, "SIGINT", "interrupted")]
)
def test_a_second_signal_ends_a_run_that_cannot_stop_yet(
    start: type[Run], tmp_path: Path, ranks: int, name: str, word: str
) -> None:
    run = start(ranks, "--hang", "2", *saving(tmp_path))
    until((tmp_path / "hung").exists, run.process)
    while run.process.poll() is None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            run.signal(getattr(signal, name), 0)
            run.process.wait(timeout=0.5)
    status, err = run.end()
    assert status != 0 and f"iterreduce: {word}" in err and "Traceback" not in err, err
    if ranks == 1:
        assert status == {"SIGTERM": 143, "SIGINT": 130}[name]


@pytest.mark.parametrize(("ranks", "name"), [(1, "SIGINT"), (2, "SIGTERM"), (2, "SIGUSR1")])
def test_a_signal_while_the_app_is_loaded_is_not_lost(
    start: type[Run], tmp_path: Path, ranks: int, name: str
) -> None:
    """Rank 0 waits for its file; another waits for rank 0 in MPI_Init."""
    run = start(ranks, *saving(tmp_path), ITERREDUCE_TEST_GO=str(tmp_path / "go"))
    run.loads()
    for rank in range(ranks):
        run.signal(getattr(signal, name), rank)
    (tmp_path / "go").touch()
    assert_saved(run, name)
    assert lines_of(tmp_path / "iterations-0") == 0


def test_sigusr1_without_a_checkpoint_directory_says_what_it_wants_and_does_no_harm(
    start: type[Run],
) -> None:
    run = start(3, iterations="30")
    run.iterates()
    for rank in range(3):
        run.signal(signal.SIGUSR1, rank)
    status, err = run.end()
    assert (status, err.count("iterreduce: SIGUSR1 asks to save and stop")) == (0, 1), err
    assert "--checkpoint-dir" in err


def test_the_time_limit_counts_from_the_start_of_the_process(start: type[Run], tmp_path: Path) -> None:
    run = start(2, "--time-limit", "4", *saving(tmp_path))
    assert_saved(run, "the time limit")
    assert json.loads((tmp_path / "run.json").read_text())["seconds"]["total"] < 20


def test_a_time_limit_without_a_checkpoint_directory_is_refused(start: type[Run]) -> None:
    status, err = start(1, "--time-limit", "10").end()
    assert status == 2 and "give --checkpoint-dir as well" in err
