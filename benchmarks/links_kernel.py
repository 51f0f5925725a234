"""What every vertex hears along its edges, by `iterreduce.columns.links`, against SciPy's ``csr @ x``.

    python benchmarks/links_kernel.py [--scale 20] [--edge-factor 16] [--repeats 9] [--graphs rmat uniform]

Vertices of the R-MAT graph (a = .57, b = c = .19; Chakrabarti, Zhan and Faloutsos, SDM 2004) have permuted
labels, edges stand in random order, and SciPy works on these labels. Links get the slots that the engine
gives them: sources by descending out-degree, targets by descending in-degree. All take turns; figures are
medians, one thread, and sums are compared with SciPy's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numba
import numpy as np
import scipy.sparse

from iterreduce.columns.links import Links


@numba.njit(nogil=True, cache=True)
def rmat(scale, sources, targets):
    np.random.seed(1)
    for e in range(len(sources)):
        s = t = 0
        for _ in range(scale):
            r = np.random.random()
            s, t = 2 * s + (r >= 0.76), 2 * t + ((0.57 <= r < 0.76) | (r >= 0.95))
        sources[e], targets[e] = s, t


def edges_of(graph, scale, count):
    rng, n = np.random.default_rng(1), 1 << scale
    if graph == "uniform":
        return rng.integers(0, n, count, dtype=np.uint32), rng.integers(0, n, count, dtype=np.uint32)
    sources, targets = np.empty(count, np.uint32), np.empty(count, np.uint32)
    rmat(scale, sources, targets)
    label, order = rng.permutation(n).astype(np.uint32), rng.permutation(count)
    return label[sources][order], label[targets][order]


def by_degree(ends, n):
    """Slots by descending degree, how many have one, and the vertex of each slot."""
    degrees = np.bincount(ends, minlength=n)
    vertices = np.argsort(-degrees, kind="stable")
    slot = np.empty(n, np.uint32)
    slot[vertices] = np.arange(n, dtype=np.uint32)
    used = int(np.count_nonzero(degrees))
    return slot[ends], used, vertices[:used]


def compare(graph, options):
    n = 1 << options.scale
    s, t = edges_of(graph, options.scale, options.edge_factor * n)
    matrix = scipy.sparse.csr_matrix((np.ones(len(s)), (t.astype(np.int32), s.astype(np.int32))), (n, n))
    everywhere = np.random.default_rng(2).random(n)
    sources, n_sources, source_vertices = by_degree(s, n)
    targets, n_targets, target_vertices = by_degree(t, n)
    weight = np.random.default_rng(3).random(len(s))
    began = time.perf_counter()
    links = Links.build(sources, targets, n_sources, n_targets)
    built = time.perf_counter()
    links.prepare()
    laid = time.perf_counter()
    weighed = Links.build(sources, targets, n_sources, n_targets, {"w": weight}).prepare()
    x, out = everywhere[source_vertices], np.empty(n_targets)
    whole, whole_out = (x * 1e6).astype(np.int64), np.empty(n_targets, np.int64)
    all_sources = np.arange(n_sources, dtype=np.int32)
    contestants = {
        "SciPy csr @ x": lambda: matrix @ everywhere,
        "sum": lambda: links.dense("sum", x, out),
        "sum, int64": lambda: links.dense("sum", whole, whole_out),
        "min": lambda: links.dense("min", x, out),
        "sum of x*w": lambda: weighed.dense("sum", x, out, "x*w", ("w",)),
        "min of x+w": lambda: weighed.dense("min", x, out, "x+w", ("w",)),
        "sparse, all sources": lambda: links.sparse("sum", all_sources, x, out),
    }
    for contestant in contestants.values():
        contestant()
    assert np.allclose(links.dense("sum", x, out), (matrix @ everywhere)[target_vertices])
    seconds = {name: [] for name in contestants}
    for _ in range(options.repeats):
        for name, contestant in contestants.items():
            began_one = time.perf_counter()
            contestant()
            seconds[name].append(time.perf_counter() - began_one)
    layout = links._layout
    print(
        f"{graph}: {len(s)} edges, {n_sources} sources, {n_targets} targets; by source {built - began:.2f} s,"
        f" {type(layout).__name__.lower()} {laid - built:.2f} s, {layout.nbytes / len(s):.2f} bytes per edge"
    )
    rival = statistics.median(seconds["SciPy csr @ x"])
    for name, all_seconds in seconds.items():
        mine = statistics.median(all_seconds)
        print(f"  {name:20s} {mine * 1e3:8.2f} ms   {rival / mine:5.2f} x")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=int, default=20)
    parser.add_argument("--edge-factor", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--graphs", nargs="+", default=["rmat", "uniform"], choices=["rmat", "uniform"])
    options = parser.parse_args()
    for graph in options.graphs:
        compare(graph, options)


if __name__ == "__main__":
    main()
