"""What `--reproducible` costs: iterations of the same loops, plain and reproducible, in turns, on one rank.

    python benchmarks/reproducible.py [--quick] [--turns 7] [--only k-means] [--bytes] [--memory]

Each pair takes turns in one process, with the same rows in memory; the figures are medians of iterations in
milliseconds of processor time of this thread (a machine that does other work disturbs them less than wall
time), and their ratio. ``fresh``: keys are looked up in every iteration; ``planned``: they are known from the
last one, and only values are folded.

``--bytes``: instead, the payload that leaves both ranks (two threads) in an iteration, in kB. ``--memory``:
the most resident memory of a fresh process for each run, and what of it came after the input was in memory,
in MiB.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.collectives import SoloGroup
from iterreduce.driver import LoopRun
from iterreduce.group import Group
from iterreduce.loop import Loop, Replace, Shuffle, State, Superstep
from iterreduce.testing import run_ranks

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = 1_000_000


def app(name: str, folder: str = "apps") -> Any:
    """An app's function."""
    return load_app(str(ROOT / folder / f"{name}.py")).function


def k_means(rows: int, seed: int) -> Loop:
    """Rows of 16 columns, 64 centroids."""
    rng = np.random.default_rng(seed)
    points = ir.Dataset.from_local(None, copy=False, x=rng.normal(size=(rows, 16)))
    return app("kmeans")(points, k=64, tolerance=0.0, max_iterations=ENDLESS).to_loop()


def logistic_regression(rows: int, seed: int) -> Loop:
    """Rows of 32 features."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 32))
    y = (x.sum(axis=1) > 0).astype(np.float64)
    data = ir.Dataset.from_local(None, copy=False, x=x, y=y)
    return app("logistic_regression")(data, tolerance=0.0, max_iterations=ENDLESS).to_loop()


def page_rank(edges: int, seed: int, ranks: int) -> Loop:
    """An R-MAT graph of a sixteenth as many vertices; the edges of one rank of some."""
    from links_kernel import edges_of

    scale = (edges // 16).bit_length() - 1
    src, dst = (np.array_split(ends.astype(np.int64), ranks)[seed] for ends in edges_of("rmat", scale, edges))
    data = ir.Dataset.from_local(None, copy=False, src=src, dst=dst)
    return app("pagerank", "benchmarks/waist")(data, tolerance=0.0, max_iterations=ENDLESS).to_loop()


def group_by(rows: int, seed: int, ranks: int, spread: int, iterations: int) -> Loop:
    """Sums by a twentieth as many keys as there are rows on all ranks."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, rows * ranks // 20, rows) * spread
    inputs = ir.Inputs()
    data = inputs.rows("rows", ir.Dataset.from_local(None, copy=False, k=keys, x=rng.random(rows)))
    step = Superstep("sum", (Shuffle(data, ("k",), "sums", ir.SUM),), (Replace("made", "sums"),))
    until = ir.Until((ir.MaxIterations(iterations),))
    return Loop("group-by", inputs.sources, {"made": State("")}, (step,), until, "made")


SPARSE = 982_451_653
CASES: dict[str, tuple[int, Callable[[int, int, int], Loop]]] = {
    "k-means, 2M x 16, k = 64": (2_000_000, lambda rows, rank, _: k_means(rows, rank)),
    "logistic regression, 2M x 32": (2_000_000, lambda rows, rank, _: logistic_regression(rows, rank)),
    "PageRank, R-MAT, 1M vertices, 16M edges": (
        16 << 20,
        lambda n, rank, ranks: page_rank(n * ranks, rank, ranks),
    ),
    "group-by, 20M rows, 1M keys, dense, fresh": (20_000_000, lambda *of: group_by(*of, 1, 1)),
    "group-by, 20M rows, 1M keys, sparse, fresh": (20_000_000, lambda *of: group_by(*of, SPARSE, 1)),
    "group-by, 20M rows, 1M keys, planned": (20_000_000, lambda *of: group_by(*of, 1, ENDLESS)),
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


def traffic(group: Group, name: str, part: int, reproducible: bool) -> int:
    """Bytes of payload that this rank sends to others in the last of four iterations, or in the only one."""
    rows, make = CASES[name]
    loop = make(rows // part // group.size, group.rank, group.size)
    run = LoopRun(loop, group, ir.Options(reproducible=reproducible, threads=1))
    run.start()
    before = after = group.traffic.payload_bytes
    for _ in range(4):
        if run.outcome is None:
            before = group.traffic.payload_bytes
            run.advance()
            after = group.traffic.payload_bytes
    return int(after - before)


def resident(field: str) -> float:
    """VmHWM, the most there was, or VmRSS, in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak(name: str, part: int, reproducible: bool) -> None:
    """Print the most memory of four iterations, and what of it came after the input was there."""
    rows, make = CASES[name]
    loop = make(rows // part, 0, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the most begins with what there is
    before = resident("VmRSS")
    run = LoopRun(loop, SoloGroup(), ir.Options(reproducible=reproducible, threads=1))
    run.start()
    for _ in range(4):
        if run.outcome is None:
            run.advance()
    print(resident("VmHWM"), resident("VmHWM") - before)


def peak_of(name: str, part: int, reproducible: bool) -> list[float]:
    """`peak` of a process of its own; its second run, that finds all machine code on the disk."""
    words = [sys.executable, __file__, "--peak", name, str(part), str(int(reproducible))]
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def compare(name: str, part: int, turns: int) -> tuple[float, float]:
    """Milliseconds of an iteration."""
    rows, make = CASES[name]
    loop = make(rows // part, 0, 1)
    pair = Turns(loop, False), Turns(loop, True)
    for _ in range(turns):
        for each in pair:
            each.step()
    plain, free = (statistics.median(each.milliseconds) for each in pair)
    return plain, free


def show(name: str, plain: float, free: float) -> None:
    print(f"{name:45}{plain:10.1f}{free:14.1f}{free / plain if plain else 1:8.2f}", flush=True)


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak(given.peak[0], int(given.peak[1]), given.peak[2] == "1")
        return
    part = 10 if given.quick else 1
    print(f"{'':45}{'plain':>10}{'reproducible':>14}{'ratio':>8}")
    for name in CASES:
        if given.only not in name:
            continue
        if given.bytes:
            show(name, *(sum(run_ranks(2, traffic, name, part, free)) / 1e3 for free in (False, True)))
        elif given.memory:
            (all_plain, plain), (all_free, free) = (peak_of(name, part, free) for free in (False, True))
            show(name, all_plain, all_free)
            show("    behind the input", plain, free)
        else:
            show(name, *compare(name, part, given.turns))


if __name__ == "__main__":
    main()
