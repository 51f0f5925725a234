"""Threads of a rank: the same bits for any number of them, one pool for each run, nothing left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group, SoloGroup
from iterreduce.columns.threads import current
from iterreduce.cores import share, share_of_cores
from iterreduce.errors import StageError
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import Local, Loop, Replace, Shuffle, State, Superstep, Total
from iterreduce.options import Options
from iterreduce.run import run_loop
from iterreduce.testing import run_ranks
from tests.engine.kit import local

THREADS = (1, 2, 3, 8)
N = 150_000
Made = Callable[[Group], Loop]


def bits(group: Group, made: Made, threads: int) -> tuple[Any, ...]:
    """This rank's result, to the last bit and in its order, and whether it ran on so many threads."""
    result = run_loop(made(group), group, Options(threads=threads))
    assert result.threads == threads
    columns = [(n, result[n].dtype, result[n].tobytes()) for n in result.batch.names]
    masks = [(n, m.tobytes()) for n in result.batch.names if (m := result.batch.valid(n)) is not None]
    return result.iterations, len(result.batch), columns, masks


before: set[threading.Thread] = set()  # of runs that other tests drive by hand and never end


@pytest.fixture(autouse=True)
def _threads_before() -> None:
    gc.collect()
    before.clear()
    before.update(threading.enumerate())


def pool_threads() -> list[str]:
    return [t.name for t in set(threading.enumerate()) - before if t.name.startswith("iterreduce pool")]


def k_means(group: Group) -> Loop:
    random = np.random.default_rng(5)
    centres = random.normal(size=(40, 6), scale=2)
    points = ir.Batch(x=centres[random.integers(0, 40, N)] + random.normal(size=(N, 6)))

    def assign(points: ir.Batch, centroids: ir.Batch) -> ir.Batch:
        label, away = ir.nearest(points["x"], centroids["x"], distance=True)
        return ir.Batch(cluster=label, x=points["x"], away=away, count=np.ones(len(points)))

    def recentre(sums: ir.Batch, centroids: ir.Batch) -> ir.Batch:
        x, away = centroids["x"].copy(), np.zeros(len(centroids))
        x[sums["cluster"]] = sums["x"] / sums["count"][:, None]
        away[sums["cluster"]] = sums["away"]
        return ir.Batch(x=x, away=away)

    step = Superstep(
        "k-means",
        (
            Local(assign, ("points", "centroids"), "assigned"),
            Total("assigned", ("cluster",), ir.SUM, "sums"),
            Local(recentre, ("sums", "centroids"), "moved", cut="share"),
        ),
        (Replace("centroids", "moved"),),
    )
    start = ir.Batch(x=points["x"][:40].copy(), away=np.zeros(40))
    sources = {"points": local(points, group), "start": start}
    until = Until((MaxIterations(4),))
    return Loop("k-means", sources, {"centroids": State("start")}, (step,), until, "centroids")


def rows_of(keys: int, low: int = 0, nulls: bool = False) -> ir.Batch:
    """Float sums of them depend on their order in the last bits."""
    random = np.random.default_rng(7)
    spread = random.integers(-(2**62), 2**62, keys) if low else np.arange(keys)
    rows = ir.Batch(
        k=spread[random.integers(0, keys, N)], x=random.normal(size=N) * 10.0 ** random.integers(-8, 8, N)
    )
    return rows.with_valid(k=random.integers(0, 9, N) > 0) if nulls else rows


def grouped(rows: ir.Batch, combine: Any) -> Made:
    """A group-by of keys that are new in every iteration, so that they are folded every time."""

    def renewed(rows: ir.Batch) -> ir.Batch:
        made = rows.with_columns(k=rows["k"] + 1 - 1)
        mask = rows.valid("k")
        return made if mask is None else made.with_valid(k=mask)

    def loop(group: Group) -> Loop:
        stages = (Local(renewed, ("rows",), "new"), Shuffle("new", ("k",), "sums", combine))
        step = Superstep("sum", stages, (Replace("sums by key", "sums"),))
        until = Until((MaxIterations(3),))
        sources = {"rows": local(rows, group)}
        return Loop("group-by", sources, {"sums by key": State("rows")}, (step,), until, "sums by key")

    return loop


CASES: dict[str, Made] = {
    "k-means": k_means,
    "a sum of few sparse keys": grouped(rows_of(300, 1), {"x": ir.SUM}),
    "a sum of many sparse keys": grouped(rows_of(60_000, 1), {"x": ir.SUM}),
    "a sum of dense keys": grouped(rows_of(20_000), {"x": ir.SUM}),
    "a count of dense keys": grouped(rows_of(20_000), {"n": ir.count()}),
    "several aggregates": grouped(
        rows_of(30_000, 1), {"n": ir.count(), "m": ir.mean("x"), "v": ir.var("x"), "least": ir.min("x")}
    ),
    "keys with nulls": grouped(rows_of(30_000, 1, nulls=True), {"x": ir.SUM}),
    "first of each key": grouped(rows_of(30_000, 1), {"x": ir.first("x")}),
    "whole rows": grouped(rows_of(30_000, 1), None),
}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads_gives_the_same_bits(case: str, ranks: int) -> None:
    wanted, *others = [run_ranks(ranks, bits, CASES[case], threads) for threads in THREADS]
    for found in others:
        assert found == wanted
    assert not pool_threads()


def test_sums_of_threads_are_those_of_numpy() -> None:
    rows = rows_of(60_000, 1)
    result = run_loop(grouped(rows, {"x": ir.SUM})(SoloGroup()), SoloGroup(), Options(threads=2))
    keys, inverse = np.unique(rows["k"], return_inverse=True)
    sums = np.zeros(len(keys))
    np.add.at(sums, inverse, rows["x"])  # row after row, as the engine
    order = np.argsort(result["k"])
    assert np.array_equal(result["k"][order], keys) and np.array_equal(result["x"][order], sums)


def stepping(function: Callable[[ir.Batch], ir.Batch]) -> Loop:
    step = Superstep("step", (Local(function, ("s",), "n", cut="share"),), (Replace("s", "n"),))
    start = {"start": ir.Batch(x=np.zeros(1))}
    return Loop("step", start, {"s": State("start")}, (step,), Until((MaxIterations(2),)), "s")


def test_user_functions_run_on_the_ranks_own_thread_and_find_its_pool() -> None:
    seen = []

    def look(state: ir.Batch) -> ir.Batch:
        seen.append((threading.current_thread().name, current().threads, current()))
        inner = run_loop(stepping(lambda s: s), SoloGroup(), Options(threads=2))
        return state.with_columns(x=np.array([float(inner.threads)]))

    result = run_loop(stepping(look), SoloGroup(), Options(threads=3))
    assert [name for name, *_ in seen] == [threading.current_thread().name] * 2
    assert [threads for _, threads, _ in seen] == [3, 3] and seen[0][2] is seen[1][2]
    assert result["x"].tolist() == [3.0]  # a run within a run works on the outer one's threads
    assert current().threads == 1


def test_ranks_that_are_threads_have_a_pool_each() -> None:
    def pools(group: Group) -> int:
        seen: list[Any] = []

        def look(state: ir.Batch) -> ir.Batch:
            seen.append(current())
            return state

        run_loop(stepping(look), group, Options(threads=2))
        return id(seen[0])

    assert len(set(run_ranks(3, pools))) == 3


def test_threads_are_gone_after_a_run_that_fails() -> None:
    def fail(sums: ir.Batch, centroids: ir.Batch) -> ir.Batch:
        assert current().threads == 2
        raise ValueError("no")

    def run(group: Group) -> None:
        made = k_means(group)
        stages = (*made.body[0].stages[:2], Local(fail, ("sums", "centroids"), "moved", cut="share"))
        body = (Superstep("failing", stages, made.body[0].writes),)
        loop = Loop(made.name, made.sources, made.state, body, made.until, made.result)
        with pytest.raises((StageError, ValueError), match="no"):
            run_loop(loop, group, Options(threads=2))

    run_ranks(2, run)
    assert not pool_threads()


def test_the_default_is_a_ranks_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("OMPI_", "PMI", "MPI_", "SLURM_"))]:
        monkeypatch.delenv(name)
    cores = len(os.sched_getaffinity(0))
    assert share_of_cores(SoloGroup()) == cores
    assert run_ranks(cores, share_of_cores) == [1] * cores
    assert run_ranks(cores + 1, share_of_cores) == [1] * (cores + 1)
    monkeypatch.setenv("MPI_LOCALNRANKS", str(cores))
    assert share_of_cores(SoloGroup()) == 1
    bound = [b"n1 0 1 2 3", b"n1 4 5 6 7", b"n2 0 1 2 3"]
    shared = [b"n1 0 1 2 3 4 5", b"n1 0 1 2 3 4 5", b"n2 0 1"]
    assert [share(bound, r) for r in range(3)] == [4, 4, 4]
    assert [share(shared, r) for r in range(3)] == [3, 3, 2]


def test_blas_threads_are_limited_while_a_run_lasts_and_restored_after() -> None:
    script = (
        "from tests.engine.test_threads import *\n"
        "from threadpoolctl import ThreadpoolController\n"
        "libraries = ThreadpoolController().select(user_api='blas')\n"
        "blas = lambda: [library['num_threads'] for library in libraries.info()]\n"
        "before, seen = blas(), []\n"
        "def look(s): seen.append(blas()); return s\n"
        "run_loop(stepping(look), SoloGroup())\n"
        "assert seen and all(n == 1 for s in seen for n in s), seen\n"
        "run_ranks(3, lambda group: run_loop(stepping(look), group))\n"
        "assert blas() == before\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", script], env=clean, cwd=root, check=True, timeout=240)
