"""How a group comes up: without MPI, on MPI that a host program started, and what the launcher says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from iterreduce.collectives import SoloGroup, group_for, launched_size, node_ranks
from iterreduce.errors import UsageError
from tests.launch import mpirun_environment

_LAUNCHER = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_NODEID",
)


def python(program: str) -> str:
    """What a program prints that runs without a launcher."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=mpirun_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_rank_alone_never_loads_mpi4py() -> None:
    program = (
        "import sys, iterreduce.collectives as c; c.group_for(None).agree_max(3); "
        "print([name for name in sys.modules if 'mpi' in name.lower() and '4' in name])"
    )
    assert python(program) == "[]"


def test_the_world_is_initialised_for_one_thread_and_ends_by_itself() -> None:
    program = """
import mpi4py
before = mpi4py.rc.thread_level
from iterreduce.collectives import world
group = world()
from mpi4py import MPI
print(group.size, group.agree_max(7), mpi4py.rc.thread_level == before)
print(MPI.Query_thread() >= MPI.THREAD_FUNNELED)
"""
    assert python(program) == "1 7 True\nTrue"


def test_a_host_that_told_mpi4py_not_to_initialise_gets_a_world() -> None:
    program = """
import atexit, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
atexit.register(lambda: print(MPI.Is_finalized()))
from iterreduce.collectives import world
print(world().agree_max(7))
"""
    assert python(program) == "7\nTrue"


@pytest.mark.parametrize("level", ["SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE"])
def test_a_host_may_have_initialised_mpi_at_any_level(level: str) -> None:
    program = f"""
import mpi4py, threading
mpi4py.rc.initialize = False
from mpi4py import MPI
provided = MPI.Init_thread(MPI.THREAD_{level})
from iterreduce.collectives import group_for
from iterreduce.errors import UsageError
print(group_for(MPI.COMM_WORLD).agree_max(5), end=" ")
def elsewhere():
    try:
        group_for(MPI.COMM_WORLD)
        print(provided >= MPI.THREAD_SERIALIZED)
    except UsageError as error:
        print(provided < MPI.THREAD_SERIALIZED and "another thread" in str(error))
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
MPI.Finalize()
"""
    assert python(program) == "5 True"


def test_without_mpi4py_the_message_says_what_to_install() -> None:
    program = """
import sys
sys.modules["mpi4py"] = None
from iterreduce.collectives import world
from iterreduce.errors import LaunchError
try:
    world()
except LaunchError as error:
    print(error)
"""
    assert "pip install 'iterreduce[mpich]'" in python(program)


def test_what_a_caller_hands_in_becomes_a_group() -> None:
    assert isinstance(group_for(None), SoloGroup)
    group = SoloGroup(epoch=2)
    assert group_for(group) is group
    assert group.duplicate().epoch == 2
    with pytest.raises(UsageError, match="got a int; wanted an mpi4py communicator, a Group, or None"):
        group_for(3)


@pytest.mark.parametrize(
    ("environment", "size", "here"),
    [
        ({}, None, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 4, 2),
        ({"PMI_SIZE": "6", "MPI_LOCALNRANKS": "3"}, 6, 3),
        ({"PMI_SIZE": "6", "SLURM_STEP_NUM_TASKS": "2"}, 6, None),  # hydra's proxies are a step of two tasks
        ({"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 11, 3),
        ({"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 11, 4),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "7"}, 2, None),
        ({"SLURM_NTASKS": "8"}, None, None),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, None, None),
    ],
)
def test_the_launchers_numbers_are_read_from_the_environment(
    environment: dict[str, str], size: int | None, here: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in _LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (launched_size(), node_ranks()) == (size, here)
