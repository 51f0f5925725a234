"""The environment of a process: threads, and one directory of compiled kernels for a node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iterreduce import start
from iterreduce.columns.jit import _Turns

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
