"""An edge file to a rank's links, against SciPy's matrix from the same file.

    python benchmarks/links_load.py [--scale 20] [--edge-factor 16] [--repeats 3] [--ids dense sparse]

The file is an ``.npy`` of edges x 2, int64, in random order: R-MAT with permuted labels, or with labels
spread over 62 bits. Ours streams it twice in pieces of 2 MB: count and number the vertices, order slots by
degree, place edges by source; then the layout for sums over all edges, timed apart. SciPy reads the file
whole, and for spread labels `numpy.unique` numbers them. Each attempt is a process of its own, which tells
its peak memory, and sums of x over in-edges are compared. Attempts take turns; figures are medians. Linux.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

PIECE_ROWS = 1 << 17


def ours(path):
    from iterreduce.columns.batch import Batch
    from iterreduce.columns.links import Links, LinksBuilder
    from iterreduce.columns.vertexcodes import Numbering, by_degree

    warm = Numbering(
        Batch(id=np.empty(0, np.int64)).schema
    )  # compiled loops come from the disk, before the clock
    load(np.array([[1, 2**40], [5, 6]]), warm, LinksBuilder, by_degree).prepare()
    load(np.array([[1, 2], [5, 6]]), Numbering(warm.schema), LinksBuilder, by_degree).prepare()
    floor = peak_bytes()
    began = time.perf_counter()
    edges = np.load(path, mmap_mode="r")
    links = load(edges, Numbering(warm.schema, rows=2 * len(edges)), LinksBuilder, by_degree)
    built = time.perf_counter()
    peak = peak_bytes()
    assert isinstance(links, Links)
    links.prepare()
    laid = time.perf_counter()
    out = np.empty(links.n_targets)
    total = links.dense("sum", np.diff(links.offsets).astype(np.float64), out).sum()
    return (
        built - began,
        laid - began,
        (peak - floor) / len(edges),
        (peak_bytes() - floor) / len(edges),
        total,
    )


def pieces(edges):
    """Pieces of the file, in memory of their own: a mapped file counts as memory."""
    buffer = np.empty((min(PIECE_ROWS, len(edges)), 2), edges.dtype)
    if isinstance(edges, np.memmap):
        with open(edges.filename, "rb", buffering=0) as file:
            file.seek(edges.offset)
            for lo in range(0, len(edges), PIECE_ROWS):
                piece = buffer[: min(PIECE_ROWS, len(edges) - lo)]
                file.readinto(piece.view(np.uint8).reshape(-1))
                yield piece[:, 0], piece[:, 1]
    else:
        yield edges[:, 0], edges[:, 1]


def load(edges, numbering, builder_of, by_degree):
    for sources, targets in pieces(edges):
        numbering.count(sources, 0)
        numbering.count(targets, 1)
    numbering.finish()
    slots, degrees = [], []
    for counts in numbering.counts:
        order, used = by_degree(counts)
        slot = np.empty(len(order), np.int32)
        slot[order] = np.arange(len(order), dtype=np.int32)
        slots.append(numbering.through(slot))
        degrees.append(counts[order[:used]])
    builder = builder_of(len(degrees[0]), len(degrees[1]), degrees[0])
    s, t = np.empty(PIECE_ROWS, np.int32), np.empty(PIECE_ROWS, np.int32)
    for sources, targets in pieces(edges):
        builder.add(slots[0].codes(sources, s), slots[1].codes(targets, t))
    return builder.finish()


def theirs(path):
    import scipy.sparse

    floor = peak_bytes()
    began = time.perf_counter()
    edges = np.load(path)
    s, t = edges[:, 0], edges[:, 1]
    if int(edges.max()) >= 2**32:
        keys, codes = np.unique(edges, return_inverse=True)
        n, codes = len(keys), codes.reshape(edges.shape)
        s, t = codes[:, 0], codes[:, 1]
    else:
        n = int(edges.max()) + 1
    matrix = scipy.sparse.csr_matrix((np.ones(len(edges)), (t, s)), (n, n))
    seconds = time.perf_counter() - began
    total = (matrix @ np.bincount(s, minlength=n).astype(np.float64)).sum()
    peak = (peak_bytes() - floor) / len(edges)
    return seconds, seconds, peak, peak, total


def peak_bytes():
    """Of this program: `getrusage` would also tell what the parent held when it forked."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def attempt(who, path):
    command = [sys.executable, __file__, "--who", who, "--path", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return [float(word) for word in done.stdout.split()]


def compare(ids, options, folder):
    from links_kernel import edges_of

    n = 1 << options.scale
    edges = np.stack(edges_of("rmat", options.scale, options.edge_factor * n), axis=1).astype(np.int64)
    if ids == "sparse":
        edges = np.random.default_rng(5).integers(0, 2**62, n)[edges]
    path = os.path.join(folder, f"{ids}.npy")
    np.save(path, edges)
    found = {"SciPy": [], "ours": []}
    for _ in range(options.repeats):
        for who, results in found.items():
            results.append(attempt("theirs" if who == "SciPy" else "ours", path))
    assert np.isclose(found["SciPy"][0][4], found["ours"][0][4])
    median = {
        who: [statistics.median(column) for column in zip(*rows, strict=True)] for who, rows in found.items()
    }
    print(f"{len(edges)} edges, {ids} ids: seconds; peak bytes per edge, beside the interpreter")
    for who, (built, laid, peak, peak_laid, _) in median.items():
        ratio = median["SciPy"][0] / built
        print(f"  {who:6s} by source {built:6.2f} {ratio:5.2f} x, with layout {laid:6.2f}", end="")
        print(f" {median['SciPy'][0] / laid:5.2f} x; {peak:5.1f} and {peak_laid:5.1f} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=int, default=20)
    parser.add_argument("--edge-factor", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ids", nargs="+", default=["dense", "sparse"], choices=["dense", "sparse"])
    parser.add_argument("--who", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.who:
        print(*{"ours": ours, "theirs": theirs}[options.who](options.path))
        return
    with tempfile.TemporaryDirectory() as folder:
        for ids in options.ids:
            compare(ids, options, folder)


if __name__ == "__main__":
    main()
