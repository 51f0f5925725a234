"""One k-means iteration by bare kernels, without the engine, against scikit-learn's Lloyd iteration.

    python benchmarks/kmeans_kernel.py [--workers 2] [--repeats 9] [--scale 1.0]

Each worker is a process with its own share of the points, as a rank is: labels by `iterreduce.nearest` on
blocks of about 1 MB, sums and counts per cluster while the block is in cache. scikit-learn gets as many
threads. The two take turns, each figure is a median, and labels are compared with scikit-learn's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numba
import numpy as np

import iterreduce as ir

BLOCK_BYTES = 1 << 20
SHAPES = ((2_000_000, 16, 64), (1_000_000, 64, 256), (4_000_000, 2, 3))


@numba.njit(nogil=True, cache=True)
def add_rows(points, labels, sums, counts):
    for row in range(len(points)):
        label = labels[row]
        counts[label] += 1
        for i in range(points.shape[1]):
            sums[label, i] += points[row, i]


def cloud(rows, d, k, seed):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(k, d)) * 3
    rng = np.random.default_rng(seed)
    return centers[rng.integers(0, k, rows)] + rng.normal(size=(rows, d)), centers


def iteration(points, centroids, seconds=None):
    """Sums, counts and labels of one iteration; `seconds` collects the time for labels alone."""
    sums, counts = np.zeros_like(centroids), np.zeros(len(centroids), np.int64)
    step = max(256, BLOCK_BYTES // (8 * points.shape[1]))
    for lo in range(0, len(points), step):
        block = points[lo : lo + step]
        began = time.perf_counter()
        labels = ir.nearest(block, centroids)
        if seconds is not None:
            seconds[0] += time.perf_counter() - began
        add_rows(block, labels, sums, counts)
    return sums, counts


def work(rank, size, pipe):
    """A worker: told (shape, centroids), it answers with the seconds of each part, until told None."""
    shape, points = None, None
    while (task := pipe.recv()) is not None:
        if task[0] != shape:
            shape = task[0]
            points, _ = cloud(shape[0] // size, shape[1], shape[2], rank + 1)
            iteration(points[:1000], task[1])
        else:
            labelling = [0.0]
            sums, counts = iteration(points, task[1], labelling)
            pipe.send((labelling[0], sums, counts))
            continue
        pipe.send(None)


def ours(pipes, task):
    began = time.perf_counter()
    for pipe in pipes:
        pipe.send(task)
    parts = [pipe.recv() for pipe in pipes]
    return time.perf_counter() - began, parts


def theirs(points, centroids, threads):
    from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense
    from threadpoolctl import threadpool_limits

    n, k = len(points), len(centroids)
    new, weight, labels, moved = np.zeros_like(centroids), np.zeros(k), np.zeros(n, np.int32), np.zeros(k)
    ones = np.ones(n)
    with threadpool_limits(1, user_api="blas"):
        began = time.perf_counter()
        lloyd_iter_chunked_dense(points, ones, centroids, new, weight, labels, moved, n_threads=threads)
        return time.perf_counter() - began, labels


def compare(shape, pipes, repeats):
    workers, (n, d, k) = len(pipes), shape
    shares = [cloud(n // workers, d, k, rank + 1) for rank in range(workers)]
    points, centroids = np.concatenate([share[0] for share in shares]), shares[0][1]
    ours(pipes, (shape, centroids))
    rival, labels = theirs(points, centroids, workers)
    differ = int((ir.nearest(points, centroids) != labels).sum())
    rivals, whole, labelling = [], [], []
    for _ in range(repeats):
        rivals.append(theirs(points, centroids, workers)[0])
        seconds, parts = ours(pipes, (shape, centroids))
        whole.append(seconds)
        labelling.append(max(part[0] for part in parts))
    rival, mine = statistics.median(rivals), statistics.median(whole)
    print(
        f"{n} x {d}, k = {k}, {workers} workers: scikit-learn {rival * 1e3:.1f} ms, ours {mine * 1e3:.1f} ms,"
    )
    print(
        f"  labels {statistics.median(labelling) * 1e3:.1f}, ratio {rival / mine:.2f}, {differ} labels differ"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the rows to use")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(options.workers):
        mine, other = context.Pipe()
        processes.append(context.Process(target=work, args=(rank, options.workers, other), daemon=True))
        processes[-1].start()
        pipes.append(mine)
    for n, d, k in SHAPES:
        compare((int(n * options.scale), d, k), pipes, options.repeats)
    for pipe in pipes:
        pipe.send(None)


if __name__ == "__main__":
    main()
