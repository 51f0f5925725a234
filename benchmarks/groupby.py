"""Group-by sum on one core: the combiner table against Polars (two threads) and NumPy's argsort + reduceat.

    python benchmarks/groupby.py [--rows 20000000] [--keys 1000000] [--repeats 5] [--no-numpy]

Rivals are interleaved, inputs touched before, medians printed; a result is compared once. Ours is the whole
of it: fold, keys and sums in canonical order, in one thread. ``first`` includes allocating the table,
``again`` is a later iteration of a loop (the memory is there).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("POLARS_MAX_THREADS", "2")

import numpy as np
import polars as pl

from iterreduce.columns.aggregators import SUM, Output, bind_outputs
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import Fold


def sparse_keys(rows: int, keys: int, rng: np.random.Generator) -> np.ndarray:
    """Keys all over the 64-bit range."""
    return rng.integers(-(2**62), 2**62, keys)[rng.integers(0, keys, rows)]


def dense_keys(rows: int, keys: int, rng: np.random.Generator) -> np.ndarray:
    """Keys 0 to ``keys``."""
    return rng.integers(0, keys, rows)


def ours(fold: Fold, outputs: list[Output], batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """One iteration: fold, and finish."""
    fold.clear()
    fold.add(batch)
    folded = fold.result()
    return folded.keys["k"], outputs[0].bound.finish(folded.records, 0)[0]


def by_sorting(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The NumPy way."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    return ordered[starts], np.add.reduceat(values[order], starts)


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)


def check(batch: Batch, fold: Fold, outputs: list[Output]) -> None:
    """Our sums are NumPy's."""
    keys, sums = ours(fold, outputs, batch)
    wanted_keys, wanted = by_sorting(batch["k"], batch["x"])
    order = np.argsort(keys)
    np.testing.assert_array_equal(keys[order], wanted_keys)
    np.testing.assert_allclose(sums[order], wanted, rtol=1e-9)


def measure(name: str, batch: Batch, repeats: int, numpy_too: bool) -> None:
    """Time all rivals in turn, and print a line per rival."""
    outputs = bind_outputs({"x": SUM}, ["k"], batch.schema)
    key_schema = batch.select("k").schema
    frame = pl.DataFrame({"k": batch["k"], "x": batch["x"]})
    fold = Fold(key_schema, outputs)
    check(batch.slice(0, 200_000), Fold(key_schema, outputs), outputs)
    ours(fold, outputs, batch)
    rivals: dict[str, Callable[[], object]] = {
        "ours, again": lambda: ours(fold, outputs, batch),
        "ours, first": lambda: ours(Fold(key_schema, outputs), outputs, batch),
        "Polars": lambda: frame.group_by("k").agg(pl.col("x").sum()),
    }
    if numpy_too:
        rivals["NumPy"] = lambda: by_sorting(batch["k"], batch["x"])
    times: dict[str, list[float]] = {rival: [] for rival in rivals}
    for turn in range(repeats):
        for rival, work in rivals.items():
            if rival != "NumPy" or turn < 2:
                times[rival].append(timed(work))
    median = {rival: statistics.median(t) for rival, t in times.items()}
    for rival, t in median.items():
        ratio = median["Polars"] / t
        print(
            f"{name:8} {rival:12} {t:9.1f} ms {len(batch) / t / 1e3:8.1f} M rows/s   Polars/this {ratio:5.2f}"
        )
    print(f"{name:8} table {fold.nbytes / 2**20:.1f} MiB")


def main() -> None:
    """Both kinds of keys."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-numpy", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    values = rng.random(args.rows)
    for name, make in (("sparse", sparse_keys), ("dense", dense_keys)):
        batch = Batch(k=make(args.rows, args.keys, rng), x=values)
        measure(name, batch, args.repeats, not args.no_numpy)


if __name__ == "__main__":
    main()
