"""Tests that run under `mpirun -n N python -m pytest --with-mpi tests/mpi`: every rank runs every test."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Generator, Iterator

import pytest

from iterreduce.collectives import Group, world

# an environment that holds the core and pytest alone runs all but the comparison with scikit-learn
collect_ignore = [] if importlib.util.find_spec("sklearn") else ["test_digits.py"]


@pytest.fixture(scope="session")
def _world() -> Group:
    return world()


@pytest.fixture
def group(_world: Group) -> Iterator[Group]:
    """All ranks, with messages and counters of the test's own."""
    group = _world.duplicate()
    yield group
    group.free()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails on some ranks leaves the others waiting: say why and end all."""
    report = yield
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if report.failed and comm.size > 1:
        capture = item.config.pluginmanager.getplugin("capturemanager")
        capture.suspend_global_capture(in_=True)
        print(f"\n=== rank {comm.rank}: {item.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)
        time.sleep(1)  # others may fail alike and want to say so
        comm.Abort(1)
    return report
