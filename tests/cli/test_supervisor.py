"""`python -m iterreduce run` on real ranks that are really killed, stopped and hung."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from iterreduce.supervising.processes import is_newcomer
from tests.cli.waiting import SLOW, lines_of, pid_of, until
from tests.launch import ROOT, RUN_VARIABLE, is_open_mpi, kill_run, mpirun_environment

ITERATIONS = 50


class Job:
    """The supervisor with an app that counts slowly; its files lie in `folder`."""

    def __init__(
        self,
        folder: Path,
        *words: str,
        own: tuple[str, ...] = (),
        app: str = SLOW,
        program: tuple[str, ...] = ("iterreduce", "run"),
        **env: str,
    ):
        self.folder, self.token = folder, uuid.uuid4().hex
        (folder / "slow.py").write_text(app)
        self.process = subprocess.Popen(
            [sys.executable, "-m", *program, *own, str(folder / "slow.py"), "--quiet", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=mpirun_environment({"ITERREDUCE_TEST_FOLDER": str(folder), **env}, self.token),
            cwd=ROOT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def waits(self, holds: Callable[[], bool]) -> None:
        until(holds, self.process)

    def iterates(self, iteration: int = 2) -> None:
        self.waits(lambda: lines_of(self.folder / "iterations-0") >= iteration)

    def saves(self) -> None:
        self.waits(lambda: bool(list((self.folder / "saved").glob("attempt-*/0*"))))

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(pid_of(self.folder, rank), number)

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=240)
        assert not list(self.processes()), "processes were left behind"
        assert not list(self.folder.glob(".*.run-*")), "its own directory was left behind"
        lines = [line.strip("\0 ") for line in err.splitlines()]  # prterun leaves a null byte behind its own
        said = "\n".join(line for line in lines if line.startswith("iterreduce:"))
        return self.process.returncode, said

    def newcomers(self) -> list[int]:
        """The processes that are to take lost places."""
        return [pid for pid in self.processes() if is_newcomer(pid)]

    def processes(self) -> Iterator[int]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(RUN_VARIABLE) == self.token:
                    yield process.pid
            except psutil.Error:
                continue


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    jobs: list[Job] = []

    def begin(
        ranks: int,
        *words: str,
        retries: int = 2,
        own: tuple[str, ...] = (),
        recover: str = "off",
        **more: Any,
    ) -> Job:
        own = ("-n", str(ranks), "--retries", str(retries), "--recover", recover, *own)
        jobs.append(Job(tmp_path, *words, own=own, **more))
        return jobs[-1]

    yield begin
    for job in jobs:
        kill_run(job.token)
        job.process.communicate()


def saving(folder: Path) -> tuple[str, ...]:
    told = "--summary", str(folder / "run.json"), "--out", str(folder / "out.npz")
    return "--checkpoint-dir", str(folder / "saved"), "--checkpoint-every", "3", *told


def counted(iterations: int) -> float:
    x = 0.0
    for _ in range(iterations):
        x = x * 1.01 + 1
    return x


def assert_done(folder: Path, iterations: int = ITERATIONS) -> None:
    assert json.loads((folder / "run.json").read_text())["iterations"] == iterations
    with np.load(folder / "out.npz") as out:
        assert (out["n"].tolist(), out["x"].tolist()) == ([iterations], [counted(iterations)])


def begun(folder: Path) -> list[int]:
    """The iterations that rank 0 has begun, in their order."""
    return [int(line) for line in (folder / "iterations-0").read_text().split()]


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (3, 2)])
def test_a_rank_that_is_killed_is_named_and_the_job_goes_on_from_the_checkpoint(
    start: Start, tmp_path: Path, ranks: int, rank: int
) -> None:
    job = start(ranks, "--iterations", str(ITERATIONS), *saving(tmp_path))
    job.saves()
    pid = pid_of(tmp_path, rank)
    job.kill(rank)
    status, said = job.end()
    assert status == 0
    assert f"rank {rank} on {socket.gethostname()} (process {pid}) died" in said
    assert f"starts again on {ranks} rank" in said and "from the last checkpoint" in said
    assert_done(tmp_path)
    again = begun(tmp_path)
    assert again.count(1) == 1 and len(again) < 2 * ITERATIONS, "it began anew"


def test_without_a_checkpoint_directory_it_begins_anew_and_says_so(start: Start, tmp_path: Path) -> None:
    job = start(1, "--iterations", "20")
    job.iterates(5)
    job.kill(0)
    status, said = job.end()
    assert status == 0 and "died, signal SIGKILL" in said
    assert "from the beginning: there is no --checkpoint-dir" in said
    assert begun(tmp_path).count(1) == 2


@pytest.mark.parametrize(("ranks", "name"), [(1, "SIGINT"), (2, "SIGTERM"), (2, "SIGUSR1")])
def test_every_signal_to_the_supervisor_saves_and_the_same_command_goes_on(
    start: Start, tmp_path: Path, ranks: int, name: str
) -> None:
    words = "--iterations", str(ITERATIONS), *saving(tmp_path)
    job = start(ranks, *words)
    job.iterates()
    job.process.send_signal(getattr(signal, name))
    status, said = job.end()
    stopped = json.loads((tmp_path / "run.json").read_text())["iterations"]
    assert said == (
        f"iterreduce: stopped by {name} after iteration {stopped}, saved; run the same command again and it "
        "goes on"
    )
    assert status == 75 and not (tmp_path / "out.npz").exists()
    status, said = start(ranks, *words).end()
    assert (status, said) == (0, "")
    assert_done(tmp_path)
    assert begun(tmp_path) == list(range(1, ITERATIONS + 1))


def test_a_second_signal_ends_a_job_that_cannot_save(start: Start, tmp_path: Path) -> None:
    job = start(2, "--hang", "2", *saving(tmp_path))
    job.waits((tmp_path / "hung").exists)
    while job.process.poll() is None:
        job.process.send_signal(signal.SIGTERM)
        try:
            job.process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    assert job.end() == (143, "iterreduce: terminated")


def test_a_signal_without_a_checkpoint_directory_ends_the_job(start: Start, tmp_path: Path) -> None:
    job = start(2, "--iterations", "1000000")
    job.iterates()
    job.process.send_signal(signal.SIGINT)
    status, said = job.end()
    assert status == 130 and said.endswith("iterreduce: interrupted")


@pytest.mark.parametrize("how", ["stopped", "livelocked"])
def test_a_hung_rank_is_found_and_the_job_goes_on(start: Start, tmp_path: Path, how: str) -> None:
    hang = ("--hang", "8") if how == "livelocked" else ()
    words = "--iterations", str(ITERATIONS), *hang, *saving(tmp_path)
    job = start(2, *words, own=("--hang-timeout", "12"))
    if how == "stopped":
        job.saves()
        job.kill(1, signal.SIGSTOP)
    status, said = job.end()
    assert status == 0, said
    assert "nothing has happened for 12 s (--hang-timeout)" in said
    assert ("rank 1 on" in said and "gives no sign of life" in said) == (how == "stopped")
    assert ("though all ranks live" in said and "iteration 8" in said) == (how == "livelocked")
    assert_done(tmp_path)


BROKEN = SLOW.replace(
    "        if group.rank == 0:\n", "        broken(iteration)\n        if group.rank == 0:\n"
)


@pytest.mark.parametrize(
    ("body", "ranks", "status", "message"),
    [
        ("1 / 0", 2, 1, ""),
        ("raise ir.UsageError('k is wrong')", 1, 1, ""),
        ("os.kill(os.getpid(), 9)", 1, 1, "3 attempts without progress: given up"),
    ],
)
def test_what_fails_alike_is_not_tried_again_and_what_dies_again_and_again_is_given_up(
    start: Start, tmp_path: Path, body: str, ranks: int, status: int, message: str
) -> None:
    """In the first iteration: whether a later one was seen before a sudden death is a matter of luck."""
    assert BROKEN != SLOW
    app = f"{BROKEN}\ndef broken(iteration):\n    {body}\n"
    job = start(ranks, app=app, retries=9)
    found, said = job.end()
    assert found == status and message in said
    assert begun(tmp_path).count(1) == (3 if message else 1), said


def test_a_rank_that_fails_alone_is_tried_again_until_no_restart_is_left(
    start: Start, tmp_path: Path
) -> None:
    app = SLOW.replace("log = open(", "group.rank and 1 / 0\n    log = open(")
    status, said = start(2, app=app, retries=1).end()
    assert status == 1
    assert said.count("(process") == 2 and said.count("failed, and the others did not") == 2
    assert said.endswith("iterreduce: given up after 2 attempts")


def test_a_job_that_got_on_but_has_no_restart_left_may_be_started_again(start: Start, tmp_path: Path) -> None:
    words = "--iterations", str(ITERATIONS), *saving(tmp_path)
    job = start(1, *words, retries=0)
    job.saves()
    job.kill(0)
    status, said = job.end()
    assert status == 75 and said.endswith("run the same command again and it goes on")
    assert start(1, *words).end() == (0, "")
    assert_done(tmp_path)


def test_fresh_begins_anew_once_and_not_at_every_start(start: Start, tmp_path: Path) -> None:
    words = "--fresh", "--iterations", str(ITERATIONS), *saving(tmp_path)
    assert start(1, "--iterations", "5", *words[2:][1:]).end()[0] == 0
    job = start(1, *words)
    job.iterates(5 + 12)
    until(lambda: bool(list((tmp_path / "saved").glob("attempt-*/0*"))))
    job.kill(0)
    assert job.end()[0] == 0
    assert begun(tmp_path).count(1) == 2, "the first job and the second, which began anew once"
    assert_done(tmp_path)


def test_ranks_do_not_outlive_a_killed_launcher_nor_a_killed_supervisor(start: Start, tmp_path: Path) -> None:
    job = start(2, "--iterations", "1000000", *saving(tmp_path), retries=1)
    job.saves()
    first = pid_of(tmp_path, 1)
    launcher = psutil.Process(job.process.pid).children()[0]
    launcher.kill()
    job.waits(lambda: pid_of(tmp_path, 1) != first)
    before = lines_of(tmp_path / "iterations-0")
    job.waits(lambda: lines_of(tmp_path / "iterations-0") > before)
    job.process.kill()
    until(lambda: not list(job.processes()), seconds=15)
    assert "the launcher died, signal SIGKILL" in job.process.communicate()[1]


LAUNCHER = """#!/bin/sh
# counts its starts; the first goes as it likes, the second refuses more than one rank
echo >> "$ITERREDUCE_TEST_FOLDER/starts"
starts=$(wc -l < "$ITERREDUCE_TEST_FOLDER/starts")
{body}
shift 2
exec "$@"
"""


def test_an_exit_status_of_0_of_the_launcher_proves_nothing(start: Start, tmp_path: Path) -> None:
    body = """
if [ $starts = 1 ]; then
    shift 2
    "$@" & pid=$!
    until [ -s "$ITERREDUCE_TEST_FOLDER/iterations-0" ]; do sleep 0.1; done
    kill -9 $pid; wait $pid
    exit 0
fi"""
    launcher = tmp_path / "launch"
    launcher.write_text(LAUNCHER.format(body=body))
    launcher.chmod(0o755)
    status, said = start(1, "--iterations", "20", *saving(tmp_path), own=("--launcher", str(launcher))).end()
    assert status == 0 and "died" in said and "starts again on 1 rank" in said
    assert_done(tmp_path, 20)


def test_where_a_slot_is_gone_it_goes_on_with_fewer_ranks(start: Start, tmp_path: Path) -> None:
    """The second time this launcher has room for two ranks only."""
    body = f"""
if [ $starts = 2 ]; then echo "not enough slots" >&2; exit 1; fi
exec "{sys.executable.rsplit("/", 1)[0]}/mpirun" "$@"
"""
    launcher = tmp_path / "launch"
    launcher.write_text(LAUNCHER.format(body=body))
    launcher.chmod(0o755)
    words = "--iterations", str(ITERATIONS), *saving(tmp_path)
    job = start(3, *words, own=("--launcher", str(launcher)), retries=3)
    job.saves()
    job.kill(1)
    status, said = job.end()
    assert status == 0, said
    assert "the launcher ended with status 1 before a rank began" in said
    assert "starts again on 1 rank from the last checkpoint" in said
    assert json.loads((tmp_path / "run.json").read_text())["ranks"] == 1
    assert_done(tmp_path)


def test_a_launcher_that_starts_nothing_is_told_at_once(start: Start, tmp_path: Path) -> None:
    status, said = start(2, own=("--launcher", "true")).end()
    assert (status, said) == (1, "iterreduce: the launcher ended with status 0 before a rank began")


if is_open_mpi():

    def test_ranks_go_on_without_one_that_is_killed(start: Start, tmp_path: Path) -> None:
        job = start(3, "--iterations", str(ITERATIONS), recover="auto")
        job.iterates()
        job.kill(0)
        status, said = job.end()
        assert status == 0, said
        assert re.search(r"rank 0 on .* died.*: the others go on, on 2 ranks", said)
        assert "starts again" not in said

    def test_a_new_rank_comes_for_one_that_is_killed(start: Start, tmp_path: Path) -> None:
        """And is killed as well; it is the first of its own start, and says so."""
        words = "--iterations", str(ITERATIONS), "--respawn", "2", *saving(tmp_path)
        job = start(2, *words, recover="auto")
        job.iterates()
        first = pid_of(tmp_path, 0)
        job.kill(1)
        job.waits(lambda: pid_of(tmp_path, 0) != first)  # it has come: then it reads the app
        job.kill(0)
        status, said = job.end()
        assert status == 0, said
        assert "the others go on, on 1 rank" in said and "1 new rank came: 2 ranks go on" in said
        assert "starts again" not in said
        assert json.loads((tmp_path / "run.json").read_text())["ranks"] == 2
        assert_done(tmp_path)

    def test_where_a_new_rank_dies_before_it_has_met_the_others_all_start_again(
        start: Start, tmp_path: Path
    ) -> None:
        """MPI does not see the death of one that has not met the others, which wait for it."""
        words = "--iterations", str(ITERATIONS), "--respawn", "1", *saving(tmp_path)
        job = start(2, *words, recover="auto", program=("tests.cli.impatient",))
        job.saves()
        job.kill(1)
        job.waits(lambda: bool(job.newcomers()))
        for pid in job.newcomers():
            os.kill(pid, signal.SIGKILL)
        (tmp_path / "impatient").touch()
        status, said = job.end()
        assert status == 0, said
        assert "starts again on 2 ranks from the last checkpoint (attempt 2" in said, said
        assert "rank 2" in said and "which was to take a lost place, died before it came" in said, said
        assert_done(tmp_path)

    @pytest.mark.parametrize("dead", [(), (2,)])
    def test_a_stopped_rank_is_killed_and_the_others_go_on(
        start: Start, tmp_path: Path, dead: tuple[int, ...]
    ) -> None:
        """Also where they wait for it because another has died."""
        job = start(3, "--iterations", str(ITERATIONS), own=("--hang-timeout", "12"), recover="auto")
        job.iterates()
        job.kill(1, signal.SIGSTOP)
        for rank in dead:
            job.kill(rank)
        status, said = job.end()
        assert status == 0, said
        assert re.search(r"rank 1 on .* gave no sign of life for 12 s and is killed", said)
        assert f"the others go on, on {2 - len(dead)} rank" in said and "starts again" not in said

    def test_where_ranks_do_not_find_together_the_job_starts_again(start: Start, tmp_path: Path) -> None:
        """A rank that leaves by itself is not seen by MPI: the others wait for it inside a collective."""
        words = "--iterations", str(ITERATIONS), *saving(tmp_path)
        leaving = SLOW.replace("time.sleep(600)", "os._exit(3)")
        job = start(2, *words, "--hang", "20", app=leaving, recover="auto", ITERREDUCE_RECOVER_TIMEOUT="2")
        status, said = job.end()
        assert status == 0, said
        assert "rank 0 on " in said and "starts again on 2 ranks from the last checkpoint" in said

    def test_where_the_survivor_never_learns_of_a_death_the_job_starts_again(
        start: Start, tmp_path: Path
    ) -> None:
        """As if it hung inside MPI: no hang timeout is given, but the supervisor has seen the death."""
        words = "--iterations", str(ITERATIONS), *saving(tmp_path)
        job = start(2, *words, recover="auto", ITERREDUCE_RECOVER_TIMEOUT="2")
        job.saves()
        job.kill(0, signal.SIGSTOP)
        job.kill(1)
        status, said = job.end()
        assert status == 0, said
        assert "rank 1 on " in said and "starts again on 2 ranks from the last checkpoint" in said
        assert_done(tmp_path)
