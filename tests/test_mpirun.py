"""The tests of real MPI, started from a normal test run: one mpirun per number of ranks."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.clustered import clustered
from tests.launch import in_use, is_open_mpi, mpirun, mpirun_path

_PYTEST = ("-m", "pytest", "--with-mpi", "-q", "-x", "-p", "pytest_mpi", "-p", "pytest_timeout")
#: Nothing may be skipped; fewer plugins start faster.
_ENVIRONMENT = {"ITERREDUCE_NO_SKIPS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
#: Every failure, every lazy app and loops under a low limit take long: 3 ranks are enough.
LONG = "failures or test_counts or test_lazy_apps"


def test_this_environment_has_mpi4py_and_an_mpirun() -> None:
    import mpi4py

    assert mpi4py.__version__
    assert mpirun_path()


@pytest.mark.timeout(1000)  # a guard against hanging; cold caches on a busy machine take minutes
@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [(3, LONG), *((ranks, f"not ({LONG})") for ranks in (4, 3, 2, 1))],
    ids=["long", "4", "3", "2", "1"],
)
def test_the_mpi_tests_pass_on_real_ranks(ranks: int, chosen: str) -> None:
    tests = "-p", "no:cacheprovider", "--timeout=240", "-k", chosen, "tests/mpi"
    result = mpirun(ranks, *_PYTEST, *tests, timeout=900, env=_ENVIRONMENT)
    assert result.returncode == 0, f"{result.stdout[-20000:]}\n{result.stderr[-10000:]}"
    assert result.stdout.count(" passed") == ranks, result.stdout  # a status of 0 alone proves nothing
    assert "MPICH: freeing" not in result.stdout + result.stderr, "requests were left behind"


def many_ranks() -> int:
    """64; under Open MPI 16: more of its processes than some eight per core do not get through their start-up
    in minutes.
    """
    return 16 if is_open_mpi() else 64


ONE_OF_MANY = """
import json, pathlib, time
import numpy as np
import iterreduce as ir
from tests.clustered import clustered

@ir.app
def one_of_many(points: str, told: str, raised: str, rank: int = 0, group: ir.Group = None):
    found = json.dumps([group.size, clustered(points, group)])
    if group.rank == group.size - 1:
        pathlib.Path(told).write_text(found)
    calls = []

    def spread(state: ir.Batch) -> ir.Batch:
        calls.append(len(state))
        if len(calls) == 2 and group.rank == rank:
            pathlib.Path(raised).write_text(str(time.time()))
            raise ValueError("this row is no good")
        return ir.Batch(key=state["key"] * 7 % 300, value=state["value"])

    def update(heard: ir.Batch, state: ir.Batch) -> ir.Batch:
        return state.with_columns(value=heard["value"] + 1)

    mine = np.arange(group.rank, 300, group.size)
    start = ir.Dataset.from_local(group, key=mine, value=np.ones(len(mine)))
    loop = ir.MapReduce(map=spread, reduce=ir.SUM, key="key")
    return loop.iterate(state=start, state_key="key", update=update, max_iterations=5)
"""


@pytest.mark.timeout(700)
def test_many_ranks_give_the_bits_of_one_and_an_exception_on_one_ends_all_with_one_traceback(
    tmp_path: Path,
) -> None:
    ranks, files = many_ranks(), [tmp_path / name for name in ("points.npy", "told", "raised")]
    rng = np.random.default_rng(0)
    np.save(files[0], rng.normal(size=(20_000, 3)) * 10.0 ** rng.uniform(-4, 4, (20_000, 3)))
    (app := tmp_path / "one_of_many.py").write_text(ONE_OF_MANY)
    bad = ranks // 2 + 1
    result = mpirun(ranks, "-m", "iterreduce", str(app), *map(str, files), "--rank", str(bad), timeout=600)
    took = time.time() - float(files[2].read_text())
    assert result.returncode == 1, result.stderr[-5000:]
    assert json.loads(files[1].read_text()) == [ranks, clustered(files[0])]
    told = result.stdout + result.stderr
    assert told.count("Traceback") == told.count("ValueError: this row is no good") == 1, told[-5000:]
    assert f"ValueError in user code on rank {bad} on " in told and "iteration 2, stage mapreduce" in told
    assert '/one_of_many.py", line 18, in spread' in told
    assert told.count("iterreduce: ") == 1 and "one_of_many.py" in told and "iterreduce/" not in told
    assert took < 60  # far from any time that a watchdog waits, and room for a busy machine


def test_a_run_that_hangs_is_ended_and_leaves_nothing_behind(tmp_path: Path) -> None:
    started = tmp_path / "started"
    program = f"""
import time
from mpi4py import MPI
memory = MPI.Win.Allocate_shared(4096, 8, comm=MPI.COMM_WORLD)
open({str(started)!r}, "w").close()
time.sleep(300)
"""
    token = {"ITERREDUCE_TEST_TOKEN": tmp_path.name}
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(AssertionError, match="did not end in 4 s"):
        mpirun(2, "-c", program, timeout=4, env=token)
    assert started.exists()
    assert not list(processes_with("ITERREDUCE_TEST_TOKEN", tmp_path.name))
    others = set(Path("/dev/shm").iterdir()) - before  # of runs beside this one: in use, or gone by now
    assert not [path for path in others - in_use(others) if path.exists()]


def processes_with(variable: str, value: str) -> Iterator[int]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(variable) == value:
                yield process.pid


def test_a_run_hands_back_its_status_and_what_it_wrote() -> None:
    result = mpirun(1, "-c", "import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(3)")
    assert result.returncode == 3
    assert "to out" in result.stdout
    assert "to err" in result.stderr
