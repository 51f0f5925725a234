"""The rivals of `benchmarks/graphs.py`: SciPy, python-graphblas, networkit, GAPBS, each at its best settings.

A maker takes edges (``src``, ``dst``, ``weight``: int64 arrays, vertices below ``n``), loads them in the
rival's own form, which is not timed, and gives a contestant: a function without arguments that returns
(seconds, answer). All compute in float64 or int64, GraphBLAS and networkit on two threads, SciPy on one.
Edges that stand several times count several times in PageRank; in the others the lightest counts.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

THREADS = 2
DAMPING = 0.85
SETTLED = 40  # iterations after which ranks hardly move
FAR = np.iinfo(np.int64).max
Contestant = Callable[[], tuple[float, Any]]


class Edges(NamedTuple):
    """A graph: two int64 arrays of one length, and weights or None."""

    n: int
    src: np.ndarray
    dst: np.ndarray
    weight: np.ndarray | None = None


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what it returns)."""
    began = time.perf_counter()
    answer = function()
    return time.perf_counter() - began, answer


# ---------------------------------------------------------------------- PageRank


def scipy_pagerank(edges: Edges, iterations: int) -> dict[str, Contestant]:
    """Two figures per iteration: the product alone, and all that an iteration does."""
    import scipy.sparse

    n, src, dst, _ = edges
    matrix = scipy.sparse.csr_matrix((np.ones(len(src)), (dst, src)), (n, n))
    degree, share = degrees(edges)

    def product() -> tuple[float, Any]:
        rank = np.full(n, 1 / n)
        return timed(lambda: matrix @ rank)[0], None

    def whole() -> tuple[float, Any]:
        rank = np.full(n, 1 / n)
        began = time.perf_counter()
        for _ in range(iterations):
            old = rank
            lost = old[degree == 0].sum()
            rank = matrix @ (old * share)
            rank *= DAMPING
            rank += (1 - DAMPING + DAMPING * lost) / n
            np.abs(rank - old).sum()
        return (time.perf_counter() - began) / iterations, rank

    return {"SciPy csr @ x (1)": product, "SciPy, whole iteration (1)": whole}


def degrees(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """Out-degrees, and 1 / degree, 0 where there are none."""
    degree = np.bincount(edges.src, minlength=edges.n)
    return degree, np.divide(1.0, degree, out=np.zeros(edges.n), where=degree > 0)


def graphblas_pagerank(edges: Edges, iterations: int) -> dict[str, Contestant]:
    """With multiplicities (plus_times), and, with less work, of distinct edges (plus_second, iso-valued)."""
    gb = graphblas()
    n, src, dst, _ = edges
    counted = gb.Matrix.from_coo(dst, src, np.ones(len(src)), nrows=n, ncols=n, dup_op=gb.binary.plus)
    once = counted.dup()
    once(once.S) << 1.0
    names = {"plus_times": counted, "plus_second": once}
    degree, _ = degrees(edges)

    def maker(name: str) -> Contestant:
        matrix, semiring = names[name], getattr(gb.semiring, name)
        out = degree if name == "plus_times" else once.reduce_columnwise("plus").new().to_dense(0.0)
        share = np.divide(1.0, out, out=np.zeros(n), where=out > 0)
        by = gb.Vector.from_dense(DAMPING * share)
        sinks = gb.Vector.from_coo(*2 * [np.flatnonzero(out == 0)], size=n, dtype=bool)

        def run() -> tuple[float, Any]:
            rank = gb.Vector.from_dense(np.full(n, 1 / n))
            new, given, moved = (gb.Vector(float, n) for _ in range(3))
            began = time.perf_counter()
            for _ in range(iterations):
                given << gb.binary.times(rank & by)
                lost = gb.binary.first(rank & sinks).new().reduce("plus").new(float).get(0.0)
                new << (1 - DAMPING + DAMPING * lost) / n
                new(gb.binary.plus) << matrix.mxv(given, semiring)
                moved << gb.binary.minus(new & rank)
                moved << gb.unary.abs(moved)
                moved.reduce("plus").get(0.0)
                rank, new = new, rank
            return (time.perf_counter() - began) / iterations, rank.to_dense(0.0)

        return run

    return {
        "GraphBLAS plus_times (2)": maker("plus_times"),
        "GraphBLAS plus_second, distinct edges (2)": maker("plus_second"),
    }


def networkit_pagerank(edges: Edges, iterations: int) -> dict[str, Contestant]:
    """Its own loop, per iteration; compared with SciPy's ranks once, when both hardly move any more."""
    nk, graph = networkit_graph(edges._replace(weight=None), directed=True)
    sinks = nk.centrality.SinkHandling.DistributeSinks

    def ranked(rounds: int) -> tuple[float, Any]:
        ranks = nk.centrality.PageRank(graph, DAMPING, 1e-300, distributeSinks=sinks)
        ranks.maxIterations = rounds
        seconds, _ = timed(ranks.run)
        return seconds / ranks.numberOfIterations(), np.array(ranks.scores())

    right = scipy_pagerank(edges, SETTLED)["SciPy, whole iteration (1)"]()[1]
    np.testing.assert_allclose(ranked(SETTLED)[1], right, rtol=1e-6, err_msg="networkit and SciPy differ")
    return {"networkit (2)": lambda: (ranked(iterations)[0], None)}


def gapbs_pagerank(file: Path, iterations: int) -> dict[str, Contestant]:
    """``pr_spmv`` of $GAPBS_DIR, built with double scores; none where that is not set."""
    folder = os.environ.get("GAPBS_DIR")
    if not folder:
        return {}

    def run() -> tuple[float, Any]:
        command = [str(Path(folder, "pr_spmv")), "-f", str(file), "-n", "1", "-i", str(iterations), "-t", "0"]
        said = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
        )
        return float(re.search(r"Average Time:\s+([\d.]+)", said.stdout)[1]) / iterations, None  # type: ignore[index]

    return {"GAPBS pr_spmv (2)": run}


# ---------------------------------------------------------------------- from a file


def scipy_build(file: Path, n: int) -> dict[str, Contestant]:
    """The file read and made into a CSR matrix, and one product."""
    import scipy.sparse

    def build(rounds: int) -> Contestant:
        def run() -> tuple[float, Any]:
            began = time.perf_counter()
            rows = np.load(file)
            matrix = scipy.sparse.coo_matrix((np.ones(len(rows)), (rows[:, 1], rows[:, 0])), (n, n)).tocsr()
            for _ in range(rounds):
                matrix @ np.full(n, 1 / n)
            return time.perf_counter() - began, None

        return run

    return {"SciPy: load, coo -> csr (1)": build(0), "SciPy: the same and one product (1)": build(1)}


# ---------------------------------------------------------------------- components


def graphblas_components(edges: Edges) -> dict[str, Contestant]:
    """Smallest labels: of all vertices in every round with shortcuts, or of those that changed."""
    gb = graphblas()
    n, src, dst, _ = edges
    ends = np.concatenate([src, dst]), np.concatenate([dst, src])
    matrix = gb.Matrix.from_coo(*ends, True, nrows=n, ncols=n)

    def rounds() -> tuple[float, Any]:
        label, heard = gb.Vector.from_dense(np.arange(n)), gb.Vector(int, n)
        began = time.perf_counter()
        while True:
            old = label.dup()
            heard << matrix.mxv(label, gb.semiring.min_second)
            label(gb.binary.min) << heard
            label(gb.binary.min) << label[label.to_dense()]  # a label's own label: it may be smaller
            if label.isequal(old):
                return time.perf_counter() - began, label.to_dense()

    def frontier() -> tuple[float, Any]:
        label = gb.Vector.from_dense(np.arange(n))
        told, heard, smaller = label.dup(), gb.Vector(int, n), gb.Vector(bool, n)
        began = time.perf_counter()
        while told.nvals:
            heard << told.vxm(matrix, gb.semiring.min_first)
            smaller << gb.binary.lt(heard & label)
            told(smaller.V, replace=True) << heard
            label(smaller.V) << heard
        return time.perf_counter() - began, label.to_dense()

    return {"GraphBLAS rounds (2)": rounds, "GraphBLAS frontier (2)": frontier}


def networkit_components(edges: Edges) -> dict[str, Contestant]:
    nk, graph = networkit_graph(edges._replace(weight=None), directed=False)
    makers = {"": nk.components.ConnectedComponents, " parallel": nk.components.ParallelConnectedComponents}

    def maker(make: Any) -> Contestant:
        def run() -> tuple[float, Any]:
            found = make(graph)
            seconds, _ = timed(found.run)
            return seconds, np.array(found.getPartition().getVector())

        return run

    return {f"networkit{name} (2)": maker(make) for name, make in makers.items()}


def scipy_components(edges: Edges) -> dict[str, Contestant]:
    import scipy.sparse

    n, src, dst, _ = edges
    matrix = scipy.sparse.csr_matrix((np.ones(len(src), np.int8), (src, dst)), (n, n))
    find = scipy.sparse.csgraph.connected_components
    return {"SciPy (1)": lambda: timed(lambda: find(matrix, directed=False)[1])}


# ---------------------------------------------------------------------- paths


def graphblas_sssp(edges: Edges, source: int) -> dict[str, Contestant]:
    """Bellman and Ford; only vertices whose distance became shorter speak."""
    gb = graphblas()
    n, src, dst, weight = edges
    assert weight is not None
    matrix = gb.Matrix.from_coo(src, dst, weight, nrows=n, ncols=n, dup_op=gb.binary.min)

    def run() -> tuple[float, Any]:
        told, heard = gb.Vector.from_coo([source], [0], size=n), gb.Vector(int, n)
        distance, shorter = gb.Vector.from_dense(np.full(n, FAR)), gb.Vector(bool, n)
        distance[source] = 0
        began = time.perf_counter()
        while told.nvals:
            heard << told.vxm(matrix, gb.semiring.min_plus)
            shorter << gb.binary.lt(heard & distance)
            told(shorter.V, replace=True) << heard
            distance(shorter.V) << heard
        return time.perf_counter() - began, distance.to_dense()

    return {"GraphBLAS (2)": run}


def networkit_sssp(edges: Edges, source: int) -> dict[str, Contestant]:
    nk, graph = networkit_graph(edges, directed=True)

    def run() -> tuple[float, Any]:
        found = nk.distance.Dijkstra(graph, source, storePaths=False)
        seconds, _ = timed(found.run)
        return seconds, reached(np.array(found.getDistances()))

    return {"networkit Dijkstra (1)": run}


def scipy_sssp(edges: Edges, source: int) -> dict[str, Contestant]:
    import scipy.sparse

    gb = graphblas()
    n, src, dst, weight = edges
    assert weight is not None
    matrix = gb.Matrix.from_coo(src, dst, weight, nrows=n, ncols=n, dup_op=gb.binary.min)
    matrix = gb.io.to_scipy_sparse(matrix, "csr").astype(np.float64)
    find = scipy.sparse.csgraph.dijkstra

    def run() -> tuple[float, Any]:
        seconds, found = timed(lambda: find(matrix, indices=source))
        return seconds, reached(found)

    return {"SciPy Dijkstra (1)": run}


def reached(distance: np.ndarray) -> np.ndarray:
    """Distances as int64; the largest where there is no path."""
    far = ~(distance < 1e300)
    return np.where(far, FAR, np.where(far, 0, distance).astype(np.int64))


def graphblas_bfs(edges: Edges, source: int) -> dict[str, Contestant]:
    """Push from few vertices, pull into what is not reached yet from many; push only."""
    gb = graphblas()
    n, src, dst, _ = edges
    out = gb.Matrix.from_coo(src, dst, True, nrows=n, ncols=n)
    into = gb.Matrix.from_coo(dst, src, True, nrows=n, ncols=n)

    def maker(most: float) -> Contestant:
        def run() -> tuple[float, Any]:
            front, level = gb.Vector.from_coo([source], True, size=n), gb.Vector(int, n)
            level[source], depth = 0, 0
            began = time.perf_counter()
            while front.nvals:
                depth += 1
                some = (
                    into.mxv(front, gb.semiring.any_pair)
                    if front.nvals > most
                    else front.vxm(out, gb.semiring.any_pair)
                )
                front(~level.S, replace=True) << some
                level(front.S) << depth
            return time.perf_counter() - began, level.to_dense(FAR)

        return run

    return {"GraphBLAS push and pull (2)": maker(n / 32), "GraphBLAS push (2)": maker(n)}


def networkit_bfs(edges: Edges, source: int) -> dict[str, Contestant]:
    nk, graph = networkit_graph(edges._replace(weight=None), directed=True)

    def run() -> tuple[float, Any]:
        found = nk.distance.BFS(graph, source, storePaths=False)
        seconds, _ = timed(found.run)
        return seconds, reached(np.array(found.getDistances()))

    return {"networkit (1)": run}


# ---------------------------------------------------------------------- libraries


def graphblas() -> Any:
    """The module, on two threads."""
    import graphblas as gb

    gb.ss.config["nthreads"] = THREADS
    return gb


def networkit_graph(edges: Edges, directed: bool) -> tuple[Any, Any]:
    """The module, on two threads, and its graph."""
    import networkit as nk

    nk.setNumberOfThreads(THREADS)
    weight = np.ones(len(edges.src)) if edges.weight is None else edges.weight.astype(np.float64)
    rows = (weight, (edges.src.astype(np.uint64), edges.dst.astype(np.uint64)))
    weighted = edges.weight is not None
    return nk, nk.GraphFromCoo(rows, n=edges.n, weighted=weighted, directed=directed)
