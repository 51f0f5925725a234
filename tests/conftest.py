"""What all tests have: one thread per library, one place for kernels, group sizes, and no silent skips."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from iterreduce.start import prepare_environment

prepare_environment()  # before NumPy is loaded; what tests start uses the same compiled kernels
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

#: Fewer ranks than rows, as many, more; powers of two and not.
RANKS = (1, 2, 3, 5, 8)
_MPI_TESTS = Path(__file__).parent / "mpi"


@pytest.fixture(params=RANKS, ids=lambda ranks: f"{ranks}ranks")
def ranks(request: pytest.FixtureRequest) -> int:
    """How many ranks a test runs on, as threads: `run_ranks(ranks, function)`."""
    number: int = request.param
    return number


@pytest.fixture(scope="session")
def wordnet_edges() -> Path:
    """An edge list of string ids, fetched once; without it tests fail, and say why."""
    from . import wordnet

    return wordnet.edge_list()


def pytest_configure(config: pytest.Config) -> None:
    if _with_mpi(config):
        return
    from hypothesis import settings

    settings.register_profile("iterreduce", deadline=None, max_examples=30)
    settings.load_profile("iterreduce")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that with several workers (``pytest -n``) nobody waits for them at the end."""
    items.sort(key=lambda item: item.path.name != "test_mpirun.py")


def pytest_collection_finish() -> None:
    """Thousands of tests are not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests of real MPI run under mpirun only; `test_mpirun.py` starts them in a normal run."""
    return True if collection_path == _MPI_TESTS and not _with_mpi(config) else None


def _with_mpi(config: pytest.Config) -> bool:
    return bool(config.getoption("--with-mpi", default=False))


def _no_skips() -> bool:
    return os.environ.get("ITERREDUCE_NO_SKIPS") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where nothing may be skipped (continuous integration), a skipped test has failed."""
    report = yield
    if _no_skips() and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and ITERREDUCE_NO_SKIPS is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for whole files that skip themselves."""
    report = yield
    if _no_skips() and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, and ITERREDUCE_NO_SKIPS is set: {report.longrepr}"
    return report
