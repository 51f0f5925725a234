"""Threads of a rank against ranks: 1 rank with 1 thread, 1 rank with 2, 2 ranks with 1 each.

    python benchmarks/threads.py [--quick] [--turns 7] [--work kmeans|logistic|groupby] [--folder DIR]

Iterations of the real engine, which take turns in one run: `apps/kmeans.py` on 2M x 16 with k = 64,
`apps/logistic_regression.py` on 2M x 32, and a group-by sum of 20M rows by 1M sparse keys that are new in
every iteration. Figures are medians of iterations, in milliseconds; results are compared once. Logistic
regression is NumPy in user code, which runs on the rank's own thread: 2 threads are as fast as 1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from kmeans import write_points
from logistic_regression import RATE, write_rows
from ranks import ROOT, Clock, Ranks, serve

SIZES = {"kmeans": 2_000_000, "logistic": 2_000_000, "groupby": 20_000_000}
SETTINGS = ((1, 1), (1, 2), (2, 1))  # ranks, threads
PER_TURN = 2  # iterations
NEVER = 1_000_000


def write_keys(folder: Path, rows: int) -> None:
    """Keys all over the 64-bit range, 20 rows each."""
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**62), 2**62, rows // 20)[rng.integers(0, rows // 20, rows)]
    np.savez(folder / "keys.npz", k=keys, x=rng.random(rows))


def write(work: str, folder: Path, rows: int) -> None:
    """The input of one work."""
    if work == "kmeans":
        write_points(folder, rows, 16, 64)
    elif work == "logistic":
        write_rows(folder, rows, 32)
    else:
        write_keys(folder, rows)


def group_by(folder: Path) -> Any:
    """A loop that sums by keys that it has not seen: a map makes them anew."""
    import iterreduce as ir

    inputs = ir.Inputs()
    rows = inputs.rows("rows", ir.read(str(folder / "keys.npz")))
    start = inputs.rows("start", ir.Batch(sum=np.zeros(1), keys=np.zeros(1, np.int64)))
    step = ir.Superstep(
        "sum by key",
        (
            ir.Local(lambda rows: rows.with_columns(k=rows["k"] + 1 - 1), (rows,), "new"),
            ir.Shuffle("new", ("k",), "sums", {"x": ir.sum("x")}),
            ir.Total("sums", (), {"sum": ir.sum("x"), "keys": ir.count()}, "all"),
        ),
        (ir.Replace("found", "all"),),
    )
    state = {"found": ir.State(start)}
    return ir.Dataset.of_loop(
        ir.Loop("group-by", inputs.sources, state, (step,), ir.Until((ir.MaxIterations(NEVER),)), "found")
    )


def be_a_rank(folder: Path, work: str, data: Path, threads: int) -> None:
    """One of the works on this rank."""
    import iterreduce as ir
    from iterreduce.appfile import load_app

    def loop() -> Any:
        if work == "groupby":
            return group_by(data)
        path = "kmeans" if work == "kmeans" else "logistic_regression"
        app = load_app(str(ROOT / "apps" / f"{path}.py")).function
        if work == "kmeans":
            start = ir.read(str(data / "start.npy"))
            return app(ir.read(str(data / "points.npy")), init=start, tolerance=0.0, max_iterations=NEVER)
        return app(ir.read(str(data / "rows.npz")), rate=RATE, tolerance=0.0, max_iterations=NEVER)

    tables = {"kmeans": ("state", "x"), "logistic": ("weights", "weight"), "groupby": ("found", "sum")}
    name, column = tables[work]
    serve(folder, loop, Clock(), lambda run: run.tables[name].batch[column].tolist(), threads)


def compare(work: str, turns: int, data: Path, quick: bool) -> None:
    """One line of figures."""
    write(work, data, SIZES[work] // (10 if quick else 1))
    groups = []
    try:
        for ranks, threads in SETTINGS:
            own = data / f"{threads} threads"
            own.mkdir(exist_ok=True)
            words = ("--one", work, "--data", str(data), "--threads", str(threads))
            groups.append(Ranks(__file__, ranks, own, *words))
        seconds: list[list[float]] = [[] for _ in groups]
        found = []
        for turn in range(turns):
            for group, mine in zip(groups, seconds, strict=True):
                said = group.turn(PER_TURN)
                mine += said["seconds"]
                if turn == 0:
                    found.append(said["results"])
                    np.testing.assert_allclose(said["results"], found[0], rtol=1e-9, atol=1e-9)
    finally:
        for group in groups:
            group.end()
    one, threaded, ranked = (statistics.median(s) * 1e3 for s in seconds)
    print(
        f"{work:10} {one:10.1f} {threaded:12.1f} {ranked:12.1f}   "
        f"{one / threaded:5.2f} {one / ranked:12.2f} {ranked / threaded:12.2f}"
    )


def main() -> None:
    """All works, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--work", action="append", choices=list(SIZES))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", help="where the inputs are written meanwhile")
    options = parser.parse_args()
    if options.serve:
        be_a_rank(options.serve, options.one, options.data, options.threads)
        return
    print("work          1 rank    2 threads      2 ranks   threads: x   ranks: x   ranks / threads")
    for work in options.work or list(SIZES):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            compare(work, options.turns, Path(folder), options.quick)


if __name__ == "__main__":
    main()
