"""One k-means iteration of the engine, `apps/kmeans.py` as it is, against scikit-learn's Lloyd iteration.

    python benchmarks/kmeans.py [--quick] [--shape 2000000x16x64] [--turns 7] [--folder DIR]

On 2 ranks under this environment's mpirun against scikit-learn with 2 threads, and on 1 against 1. All read
the same float64 .npy file, start from the same centroids and run the same number of iterations, a few at a
time, in turn; after the first turn their centroids are compared. Figures are medians of iterations, in
milliseconds; ``ratio`` above 1 says that the engine is faster. ``labels``, ``sums`` and ``rest`` are the
parts of an iteration of rank 0: the nearest centroids, the fold by cluster, and everything else.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ranks import ROOT, Clock, peak, ranks_of, serve

SHAPES = ["2000000x16x64", "1000000x64x256"]
QUICK = ["200000x16x64", "100000x64x256"]
PER_TURN = 2  # iterations
BLOCK = 1 << 16


def write_points(folder: Path, rows: int, columns: int, k: int) -> None:
    """Blobs that overlap a little, made block by block, and a start near their centres.

    So no cluster loses all its points (scikit-learn would give it others), and none has found its place soon.
    """
    rng = np.random.default_rng(1)
    centers = rng.normal(scale=3.5 / np.sqrt(columns), size=(k, columns))
    points = np.lib.format.open_memmap(folder / "points.npy", "w+", np.float64, (rows, columns))
    for lo in range(0, rows, BLOCK):
        n = min(BLOCK, rows - lo)
        points[lo : lo + n] = centers[rng.integers(0, k, n)] + rng.normal(size=(n, columns))
    np.save(folder / "start.npy", centers + rng.normal(scale=0.3, size=centers.shape))
    points.flush()


def be_a_rank(folder: Path) -> None:
    """The app on this rank, with clocks around what it calls most."""
    import iterreduce as ir
    from iterreduce.appfile import load_app
    from iterreduce.columns.combiner import Fold

    clock = Clock()
    ir.nearest = clock.around("labels", ir.nearest)  # the app asks for it by this name
    Fold.add = clock.around("sums", Fold.add)  # type: ignore[method-assign]
    app = load_app(str(ROOT / "apps" / "kmeans.py")).function
    data = folder.parent

    def loop() -> Any:
        points, start = ir.read(str(data / "points.npy")), ir.read(str(data / "start.npy"))
        return app(points, init=start, tolerance=0.0, max_iterations=1_000_000)

    serve(folder, loop, clock, lambda run: run.tables["state"].batch["x"].tolist())


class Lloyd:
    """scikit-learn's iteration, without what surrounds it in `KMeans.fit`."""

    def __init__(self, points: np.ndarray, start: np.ndarray, threads: int):
        self.points, self.centers, self.threads = points, start.copy(), threads
        self.new, self.ones = np.zeros_like(start), np.ones(len(points))
        self.labels, self.weight = np.zeros(len(points), np.int32), np.zeros(len(start))
        self.moved = np.zeros(len(start))

    def turn(self, iterations: int) -> list[float]:
        """Seconds of each iteration."""
        from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense
        from threadpoolctl import threadpool_limits

        seconds = []
        with threadpool_limits(1, user_api="blas"):  # as KMeans.fit does
            for _ in range(iterations):
                began = time.perf_counter()
                lloyd_iter_chunked_dense(
                    self.points,
                    self.ones,
                    self.centers,
                    self.new,
                    self.weight,
                    self.labels,
                    self.moved,
                    self.threads,
                )
                seconds.append(time.perf_counter() - began)
                self.centers, self.new = self.new, self.centers
        return seconds


def compare(shape: str, turns: int, folder: Path, sizes: list[int]) -> None:
    """One table of figures for one shape ROWSxCOLUMNSxK."""
    rows, columns, k = map(int, shape.split("x"))
    write_points(folder, rows, columns, k)
    points, start = np.load(folder / "points.npy"), np.load(folder / "start.npy")
    rivals = {size: Lloyd(points, start, size) for size in sizes}
    with ranks_of(__file__, sizes, folder) as groups:
        theirs: dict[int, list[float]] = {size: [] for size in sizes}
        ours: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
        for rival in rivals.values():
            rival.turn(1)
        for turn in range(turns):
            for group in groups:
                size = group.ranks
                theirs[size] += rivals[size].turn(PER_TURN)
                ours[size].append(group.turn(PER_TURN))
                if turn == 0:
                    np.testing.assert_allclose(ours[size][0]["results"], rivals[size].centers, atol=1e-9)
    print(f"{rows} x {columns}, k = {k}: milliseconds per iteration, medians of {turns * PER_TURN}")
    print("ranks  scikit-learn    engine   ratio    labels      sums      rest   MB per rank (scikit-learn)")
    for group in groups:
        print(line(group.ranks, theirs[group.ranks], ours[group.ranks]))


def line(ranks: int, theirs: list[float], ours: list[dict[str, Any]]) -> str:
    """A row of the table."""
    rival = statistics.median(theirs) * 1e3
    mine = statistics.median(s for turn in ours for s in turn["seconds"]) * 1e3
    part = {
        name: statistics.median(turn["parts"][name] for turn in ours) * 1e3 / PER_TURN
        for name in ("labels", "sums")
    }
    rest = mine - part["labels"] - part["sums"]
    rss = max(ours[-1]["rss"]) / 1e6
    times = f"{mine:8.1f}  {rival / mine:6.2f}  {part['labels']:8.1f}  {part['sums']:8.1f}  {rest:8.1f}"
    return f"{ranks:5}  {rival:12.1f}  {times}   {rss:.0f} ({peak() / 1e6:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--shape", action="append", help="ROWSxCOLUMNSxK")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--ranks", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--folder", help="where the points are written meanwhile")
    options = parser.parse_args()
    if options.serve:
        be_a_rank(options.serve)
        return
    for shape in options.shape or (QUICK if options.quick else SHAPES):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            compare(shape, options.turns, Path(folder), options.ranks or [1, 2])


if __name__ == "__main__":
    main()
