"""What `--reproducible` costs: iterations of the same loops, plain and reproducible, in turns, on one rank.

    python benchmarks/reproducible.py [--quick] [--turns 7] [--only k-means]

Each pair takes turns in one process, with the same rows in memory; the figures are medians of iterations in
milliseconds of processor time of this thread (a machine that does other work disturbs them less than wall
time), and their ratio. ``fresh``: keys are looked up in every iteration; ``planned``: they are known from the
last one, and only values are folded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.collectives import SoloGroup
from iterreduce.driver import LoopRun
from iterreduce.loop import Loop, Replace, Shuffle, State, Superstep

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = 1_000_000


def app(name: str) -> Any:
    """An app's function."""
    return load_app(str(ROOT / "apps" / f"{name}.py")).function


def k_means(rows: int) -> Loop:
    """Rows of 16 columns, 64 centroids."""
    rng = np.random.default_rng(0)
    points = ir.Dataset.from_local(None, copy=False, x=rng.normal(size=(rows, 16)))
    return app("kmeans")(points, k=64, tolerance=0.0, max_iterations=ENDLESS).to_loop()


def logistic_regression(rows: int) -> Loop:
    """Rows of 32 features."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 32))
    y = (x.sum(axis=1) > 0).astype(np.float64)
    data = ir.Dataset.from_local(None, copy=False, x=x, y=y)
    return app("logistic_regression")(data, tolerance=0.0, max_iterations=ENDLESS).to_loop()


def group_by(rows: int, spread: int, iterations: int) -> Loop:
    """Sums by a twentieth as many keys as rows."""
    rng = np.random.default_rng(2)
    keys = rng.integers(0, rows // 20, rows) * spread
    inputs = ir.Inputs()
    data = inputs.rows("rows", ir.Dataset.from_local(None, copy=False, k=keys, x=rng.random(rows)))
    step = Superstep("sum", (Shuffle(data, ("k",), "sums", ir.SUM),), (Replace("made", "sums"),))
    until = ir.Until((ir.MaxIterations(iterations),))
    return Loop("group-by", inputs.sources, {"made": State("")}, (step,), until, "made")


SPARSE = 982_451_653
CASES: dict[str, Callable[[int], Loop]] = {
    "k-means, 2M x 16, k = 64": lambda part: k_means(2_000_000 // part),
    "logistic regression, 2M x 32": lambda part: logistic_regression(2_000_000 // part),
    "group-by, 20M rows, 1M keys, dense, fresh": lambda part: group_by(20_000_000 // part, 1, 1),
    "group-by, 20M rows, 1M keys, sparse, fresh": lambda part: group_by(20_000_000 // part, SPARSE, 1),
    "group-by, 20M rows, 1M keys, planned": lambda part: group_by(20_000_000 // part, 1, ENDLESS),
}


class Turns:
    """A loop that goes on and on, or, where it ends with each iteration, again and again."""

    def __init__(self, loop: Loop, reproducible: bool):
        self.loop, self.options = loop, ir.Options(reproducible=reproducible, threads=1)
        self.run = self._started()
        self.milliseconds: list[float] = []
        self.step()
        self.step()
        self.step()
        self.milliseconds.clear()

    def _started(self, read: Any = None) -> LoopRun:
        run = LoopRun(self.loop, SoloGroup(), self.options)
        run.loader.read = read or run.loader.read  # rows stay in memory
        run.start()
        return run

    def step(self) -> None:
        """One iteration."""
        if self.run.outcome is not None:
            self.run = self._started(self.run.loader.read)
        began = time.thread_time()
        self.run.advance()
        self.milliseconds.append(1e3 * (time.thread_time() - began))


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    given = parser.parse_args()
    print(f"{'':45}{'plain':>10}{'reproducible':>14}{'ratio':>8}")
    for name, make in CASES.items():
        if given.only not in name:
            continue
        loop = make(10 if given.quick else 1)
        pair = Turns(loop, False), Turns(loop, True)
        for _ in range(given.turns):
            for turns in pair:
                turns.step()
        plain, free = (statistics.median(turns.milliseconds) for turns in pair)
        print(f"{name:45}{plain:10.1f}{free:14.1f}{free / plain:8.2f}", flush=True)


if __name__ == "__main__":
    main()
