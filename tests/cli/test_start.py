"""The environment of a process: threads, and one directory of compiled kernels for a node."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from iterreduce import start, watchers
from iterreduce.collectives import SoloGroup
from iterreduce.columns.jit import _notices, _Turns, when_compiling_takes
from iterreduce.events import Events
from iterreduce.options import Options
from tests.cli.waiting import until

ROOT = Path(__file__).parents[2]


def test_users_own_values_stay_and_the_rest_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "cache_directory", lambda: tmp_path)
    environment = {"OMP_NUM_THREADS": "4"}
    start.prepare_environment(environment)
    assert environment == {
        "OMP_NUM_THREADS": "4",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OMPI_MCA_osc": "^ucx",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    own = {"NUMBA_CACHE_DIR": "/mine"}
    start.prepare_environment(own)
    assert own["NUMBA_CACHE_DIR"] == "/mine"


KERNEL = """
from __future__ import annotations
import sys
from iterreduce.columns.jit import kernel

@kernel
def inner(n):
    return n + 1

@kernel
def double(n):
    return 2 * inner(n)

assert double(20) == 42
print(sum(double.stats.cache_misses.values()), sum(inner.stats.cache_misses.values()))
"""


def test_of_many_processes_that_start_at_once_one_compiles_and_the_others_load(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(KERNEL)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(5)
    ]
    answers = [process.communicate(timeout=240)[0].strip() for process in running]
    # who loads the outer kernel needs the inner one no more
    assert sorted(answers) == ["0 0"] * 4 + ["1 1"]


def free(turns: _Turns, name: str) -> bool:
    taken = turns._taken(_Turns._byte(name))
    if taken:
        turns._leave(_Turns._byte(name))
    return taken


HOLDER = """
import sys
from iterreduce.columns.jit import _turns
_turns.begin("one kernel")
_turns.begin("a kernel that it calls")
print("compiling", flush=True)
sys.stdin.readline()
_turns.end(1)
print("called kernel is there", flush=True)
sys.stdin.readline()
"""


def test_a_kernel_that_another_process_compiles_is_waited_for_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER]
    turns = _Turns()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "compiling\n"
        assert not free(turns, "one kernel") and not free(turns, "a kernel that it calls")
        turns.begin("another kernel")
        turns.begin("another kernel")  # of other types
        turns.end(0)
        assert turns.depth == 0 and free(turns, "another kernel")
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "called kernel is there\n"
        assert free(turns, "a kernel that it calls") and not free(turns, "one kernel")
        holder.kill()
        holder.wait()
        assert free(turns, "one kernel")  # locks end with their process


def test_compiling_that_takes_long_in_all_is_told_once() -> None:
    turns, told = _Turns(), threading.Semaphore(0)
    began = time.monotonic()
    with when_compiling_takes(3600, told.release):
        for _ in range(2):
            turns.begin("a kernel")
            time.sleep(0.1)
            turns.end(0)
            time.sleep(0.1)
        (notice,) = _notices
        assert 0.2 <= 3600 - notice._left < time.monotonic() - began - 0.2
        notice._left = 0.0
        turns.begin("a kernel")
        turns.begin("a kernel that it calls")
        assert told.acquire(timeout=60)
        turns.end(0)
        turns.begin("another kernel")
        turns.end(0)
    assert not told.acquire(blocking=False)


@pytest.mark.parametrize(("rank", "quiet"), [(0, False), (0, True), (1, False)])
def test_rank_0_says_that_it_compiles_unless_it_is_to_be_quiet(
    rank: int, quiet: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchers, "LONG_SECONDS", 0.0)
    group, turns = SoloGroup(), _Turns()
    group.rank = rank
    with watchers.watching(Events(), Options(quiet=quiet), group):
        turns.begin("a kernel")
        until(lambda: not _notices)
        turns.end(0)
    assert capfd.readouterr().err == ("" if rank or quiet else f"{watchers.COMPILING}\n")


def test_all_processes_of_a_node_share_one_private_directory(tmp_path: Path) -> None:
    path = start.cache_directory(tmp_path)
    assert path == start.cache_directory(tmp_path) and path.stat().st_mode & 0o077 == 0


def test_a_directory_that_others_may_write_is_not_trusted(tmp_path: Path) -> None:
    base = tmp_path / f"iterreduce-numba-{os.getuid()}-{start._installation()}"
    base.mkdir()
    base.chmod(0o777)
    elsewhere = start.cache_directory(tmp_path)
    assert elsewhere != base and elsewhere.is_dir()
    elsewhere.rmdir()


def test_the_launchers_rank_is_known_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in start._RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert start.launched_rank() == 0
    monkeypatch.setenv("PMI_RANK", "3")
    assert start.launched_rank() == 3
