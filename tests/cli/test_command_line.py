"""`python -m iterreduce` as a process: alone and on real ranks, when it works and when it does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.launch import mpirun, mpirun_command, mpirun_environment, mpirun_path

HELLO = '''
import os, sys, time
import iterreduce as ir

rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
if os.environ.get("TROUBLE") == "raise while loading" and rank == "1":
    raise RuntimeError("no luck")
if os.environ.get("TROUBLE") == "sleep while loading" and rank == "1":
    time.sleep(600)

@ir.app
def hello(name: str, k: int = 8, group: ir.Group = None):
    """Greet NAME."""
    if name == "bug": 1 / 0
    if name == "bug on rank 1" and group.rank == 1: 1 / 0
    if name == "exit on rank 1" and group.rank == 1: sys.exit(3)
    if name == "exit": sys.exit(3)
    if name == "wrong": raise ir.UsageError("k is wrong")
    if name == "wait":
        print("waiting", flush=True)
        if group.rank == 0: time.sleep(600)
        group.barrier()
    print(f"hello {name} from {group.rank} of {group.size}\\n", end="", flush=True)
'''


@pytest.fixture
def hello(tmp_path: Path) -> str:
    path = tmp_path / "hello.py"
    path.write_text(HELLO)
    return str(path)


def alone(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "iterreduce", *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=mpirun_environment(environment),
    )


def together(ranks: int, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return mpirun(ranks, "-m", "iterreduce", *words, env=environment)


def test_an_app_that_does_its_own_work_runs_alone_and_on_ranks(hello: str) -> None:
    result = alone(hello, "bob", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "hello bob from 0 of 1\n", "")
    result = together(3, hello, "bob")
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [f"hello bob from {rank} of 3" for rank in range(3)]


def test_alone_neither_mpi_nor_for_help_numba_is_imported(hello: str) -> None:
    code = (
        "import sys; from iterreduce.cli import run_command_line\n"
        f"assert run_command_line([{hello!r}, '--help']) == 0\n"
        "assert 'numba' not in sys.modules, 'numba'\n"
        f"assert run_command_line([{hello!r}, 'bob']) == 0\n"
        "assert 'mpi4py' not in sys.modules, 'mpi4py'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=mpirun_environment()
    )
    assert result.returncode == 0, result.stderr


def test_questions_are_answered_once_on_any_number_of_ranks(hello: str) -> None:
    for words in ([hello, "--help"], ["--version"], ["--show-config"]):
        result = together(3, *words)
        assert result.returncode == 0
        assert result.stdout == alone(*words).stdout


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["bob", "--kk", "3"], 2, 'unknown option --kk; did you mean "--k"?'),
        (["bob", "--partitions", "2"], 2, "--partitions 2 is less than the 3 ranks; give at least 3"),
        (["bug"], 1, "ZeroDivisionError: division by zero"),
        (["wrong"], 2, "iterreduce: k is wrong\n"),
        (["bob", "--out", "o.csv"], 1, "app 'hello' returned None, so there is nothing for --out"),
        (["bob", "--summary", "no/such/run.json"], 1, "there is no directory no/such; make it first"),
    ],
)
def test_what_all_ranks_meet_is_told_once_and_is_the_exit_status(
    hello: str, words: list[str], status: int, message: str
) -> None:
    result = together(3, hello, *words)
    assert result.returncode == status, result.stderr
    assert result.stderr.count(message) == 1, result.stderr
    assert "ranks failed" not in result.stderr
    assert "iterreduce/cli.py" not in result.stderr


def test_the_status_of_sys_exit_is_kept(hello: str) -> None:
    assert alone(hello, "exit").returncode == 3
    assert together(2, hello, "exit").returncode == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [("bug on rank 1", "ZeroDivisionError: division by zero"), ("exit on rank 1", "left by sys.exit(3)")],
)
def test_what_one_rank_meets_alone_ends_all_of_them_with_one_message(
    hello: str, name: str, message: str
) -> None:
    start = time.monotonic()
    result = together(3, hello, name)
    assert result.returncode != 0
    assert result.stderr.count(message) == 1, result.stderr
    assert "(1 of 3 ranks failed; this is rank 1" in result.stderr
    assert time.monotonic() - start < 100  # less than the time that is set for a start


def test_a_file_that_one_rank_cannot_load_is_told_once(hello: str) -> None:
    result = together(3, hello, "bob", TROUBLE="raise while loading")
    assert result.returncode == 1
    assert result.stderr.count("RuntimeError: no luck") == 1
    assert "(1 of 3 ranks failed; this is rank 1)" in result.stderr
    assert "hello" not in result.stdout


def test_a_rank_that_does_not_come_is_told_in_the_time_that_was_set(hello: str) -> None:
    start = time.monotonic()
    result = together(2, hello, "bob", TROUBLE="sleep while loading", ITERREDUCE_START_TIMEOUT="3")
    assert result.returncode != 0
    assert result.stderr.count("iterreduce: after 3 s not all of the 2 ranks have met") == 1, result.stderr
    assert time.monotonic() - start < 100  # less than the time that is set for a start


def test_a_launcher_that_counts_other_than_mpi_is_told_once_with_advice(hello: str) -> None:
    """As with the mpirun of another MPI: each process is a world of one rank."""
    job = uuid.uuid4().hex
    code = (
        "import os\nfrom mpi4py import MPI\n"
        # after MPI has started, which reads some of them
        f"os.environ.update({{'PMI_SIZE': '4', 'PMIX_NAMESPACE': {job!r}}})\n"
        "from iterreduce.cli import run_command_line\n"
        f"os._exit(run_command_line([{hello!r}, 'bob']))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=mpirun_environment()
        )
        for _ in range(2)
    ]
    errors = "".join(process.communicate(timeout=240)[1] for process in processes)
    assert errors.count("the launcher started 4 processes, but MPI sees 1") == 1, errors
    assert "reinstall mpi4py for this MPI" in errors
    assert [process.returncode for process in processes] == [1, 1]


def test_a_launcher_without_mpi4py_is_told_what_to_install(hello: str, tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('none here')\n")
    result = alone(
        hello,
        "bob",
        PMI_SIZE="2",
        PMIX_NAMESPACE=uuid.uuid4().hex,
        PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}",
    )
    assert result.returncode == 1
    assert result.stderr.startswith("iterreduce: this needs mpi4py") and "pip install" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_is_one_short_message_alone(hello: str) -> None:
    process = interruptible([sys.executable, "-m", "iterreduce", hello, "wait"])
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (130, "iterreduce: interrupted\n")


def test_ctrl_c_ends_ranks_that_wait_for_each_other_without_a_stack(hello: str) -> None:
    process = interruptible(mpirun_command(3, "-m", "iterreduce", hello, "wait"))
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "Traceback" not in err
    if "Open MPI" not in library():  # its mpirun passes nothing on after Ctrl-C
        assert err.count("iterreduce: interrupted") == 1, err


def interruptible(command: list[str]) -> subprocess.Popen[str]:
    """A child for which SIGINT is not ignored, as it is in background jobs of a shell."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=mpirun_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def library() -> str:
    return subprocess.run([mpirun_path(), "--version"], capture_output=True, text=True).stdout


def test_every_name_of_the_front_is_itself_after_all_modules_are_loaded() -> None:
    """A submodule of that name must not hide it: importing `iterreduce.x` sets the attribute `x`."""
    code = (
        "import importlib, pkgutil, types, iterreduce as ir\n"
        "for found in pkgutil.walk_packages(ir.__path__, 'iterreduce.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "modules = [name for name in ir.__all__ if isinstance(getattr(ir, name), types.ModuleType)]\n"
        "assert set(modules) <= {'columns', 'random'}, modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=mpirun_environment()
    )
    assert result.returncode == 0, result.stderr
