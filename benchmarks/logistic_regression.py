"""One step of logistic regression by the engine, `apps/logistic_regression.py` as it is, against others.

    python benchmarks/logistic_regression.py [--quick] [--shape 2000000x32] [--turns 7] [--folder DIR]

NumPy: the same step on all rows at once, in one thread. scikit-learn: its LogisticRegression (lbfgs) with two
threads, time per iteration; each of its steps goes further, so this compares the cost of a step, not of an
answer. All have the same rows in memory and take turns; NumPy and the engine take the same steps, and their
weights are compared. Figures are medians of iterations, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from ranks import ROOT, Clock, peak, ranks_of, serve

SHAPES, QUICK = ["2000000x32"], ["200000x32"]
PER_TURN = 3  # iterations
RATE = 0.5
BLOCK = 1 << 16


def write_rows(folder: Path, rows: int, columns: int) -> None:
    """Normal features, labels that follow a plane with noise; made block by block."""
    rng = np.random.default_rng(1)
    plane = rng.normal(size=columns) / np.sqrt(columns)
    x = np.empty((rows, columns))
    y = np.empty(rows)
    for lo in range(0, rows, BLOCK):
        x[lo : lo + BLOCK] = rng.normal(size=x[lo : lo + BLOCK].shape)
        chance = 1 / (1 + np.exp(-3 * (x[lo : lo + BLOCK] @ plane)))
        y[lo : lo + BLOCK] = rng.random(len(chance)) < chance
    np.savez(folder / "rows.npz", x=x, y=y)


def be_a_rank(folder: Path) -> None:
    """The app on this rank."""
    import iterreduce as ir
    from iterreduce.appfile import load_app

    app = load_app(str(ROOT / "apps" / "logistic_regression.py")).function

    def loop() -> Any:
        rows = ir.read(str(folder.parent / "rows.npz"))
        return app(rows, rate=RATE, tolerance=0.0, max_iterations=1_000_000)

    serve(folder, loop, Clock(), lambda run: run.tables["weights"].batch["weight"].tolist())


class Descent:
    """The textbook's step in NumPy."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.x, self.y, self.w, self.b = x, y, np.zeros(x.shape[1]), 0.0

    def turn(self, iterations: int) -> list[float]:
        """Seconds of each iteration."""
        from threadpoolctl import threadpool_limits

        seconds = []
        with threadpool_limits(1, user_api="blas"):
            for _ in range(iterations):
                began = time.perf_counter()
                residual = 1 / (1 + np.exp(-(self.x @ self.w + self.b))) - self.y
                self.w = self.w - RATE * (self.x.T @ residual) / len(self.x)
                self.b -= RATE * residual.mean()
                seconds.append(time.perf_counter() - began)
        return seconds


def lbfgs(x: np.ndarray, y: np.ndarray, iterations: int) -> float:
    """Seconds per iteration of scikit-learn, with two threads."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(max_iter=iterations, tol=0)
    with threadpool_limits(2, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it did not converge: it was not meant to
        began = time.perf_counter()
        model.fit(x, y)
        return (time.perf_counter() - began) / int(model.n_iter_[0])


def compare(shape: str, turns: int, folder: Path, sizes: list[int]) -> None:
    """One table of figures for one shape ROWSxCOLUMNS."""
    rows, columns = map(int, shape.split("x"))
    write_rows(folder, rows, columns)
    with np.load(folder / "rows.npz") as file:
        x, y = file["x"], file["y"]
    rival = Descent(x, y)
    theirs: dict[str, list[float]] = {"NumPy, 1 thread": [], "scikit-learn lbfgs, 2 threads": []}
    with ranks_of(__file__, sizes, folder) as groups:
        ours: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
        rival.turn(1)
        lbfgs(x, y, 1)
        for turn in range(turns):
            theirs["NumPy, 1 thread"] += rival.turn(PER_TURN)
            theirs["scikit-learn lbfgs, 2 threads"].append(lbfgs(x, y, PER_TURN))
            for group in groups:
                ours[group.ranks].append(group.turn(PER_TURN))
                if turn == 0:
                    found = ours[group.ranks][0]["results"]
                    np.testing.assert_allclose(found, [*rival.w, rival.b], rtol=1e-9, atol=1e-12)
    report(f"{rows} x {columns}", theirs, ours)


def report(what: str, theirs: dict[str, list[float]], ours: dict[int, list[dict[str, Any]]]) -> None:
    """Medians, and how many times faster than each rival the engine is."""
    median = {name: statistics.median(seconds) * 1e3 for name, seconds in theirs.items()}
    print(f"{what}: milliseconds per iteration, medians")
    for name, milliseconds in median.items():
        print(f"  {name:32} {milliseconds:8.1f}")
    print(f"  (peak memory of this process: {peak() / 1e6:.0f} MB)")
    for ranks, said in ours.items():
        mine = statistics.median(s for turn in said for s in turn["seconds"]) * 1e3
        ratios = ", ".join(f"{ms / mine:.2f} x {name.split(',')[0]}" for name, ms in median.items())
        megabytes = max(said[-1]["rss"]) / 1e6
        print(f"  {f'engine, ranks: {ranks}':32} {mine:8.1f}   {ratios}; {megabytes:.0f} MB per rank")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--shape", action="append", help="ROWSxCOLUMNS")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--ranks", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--folder", help="where the rows are written meanwhile")
    options = parser.parse_args()
    if options.serve:
        be_a_rank(options.serve)
        return
    for shape in options.shape or (QUICK if options.quick else SHAPES):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            compare(shape, options.turns, Path(folder), options.ranks or [1, 2])


if __name__ == "__main__":
    main()
