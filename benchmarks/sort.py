"""Sort rows by splitters on all ranks, against Polars (two threads) and NumPy (one core).

    mpirun -n 2 python benchmarks/sort.py [--rows 20000000] [--repeats 5] [--only numbers]

*numbers*: int64 keys and nothing else. *pairs*: int64 keys with a float64 beside each, stable. *words*: text
keys. Ours is an iteration of a loop that runs once, driven by the engine: sample, exchange, sort, control;
rows lie on their ranks before and after. Rivals run on rank 0, while the other ranks sleep; all take turns,
inputs touched before. Times are of the slowest rank, in milliseconds, medians. The result is checked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "2")

import numpy as np
import polars as pl
from mpi4py import MPI

import iterreduce as ir
from iterreduce.collectives import world
from iterreduce.columns.hashing import hash_keys
from iterreduce.sources import LocalSource

COMM = MPI.COMM_WORLD
KINDS = ("numbers", "pairs", "words")


def rows_of(kind: str, n: int, seed: int) -> ir.Batch:
    """Random rows."""
    random = np.random.default_rng(seed)
    if kind == "numbers":
        return ir.Batch(k=random.integers(-(2**62), 2**62, n))
    if kind == "pairs":
        return ir.Batch(k=random.integers(-(2**62), 2**62, n), x=random.random(n))
    lengths = random.integers(4, 20, n)
    offsets = np.append(0, np.cumsum(lengths))
    letters = random.integers(97, 123, int(offsets[-1]), dtype=np.uint8)
    return ir.Batch(k=ir.Ragged(offsets, letters, "text"))


def ours(rows: ir.Batch) -> tuple[float, Any]:
    """Seconds of one sort, and the table."""
    step = ir.Superstep(
        "sort", (ir.Shuffle("rows", ("k",), "sorted", route=ir.Splitters()),), (ir.Replace("out", "sorted"),)
    )
    loop = ir.Loop(
        "sort", {"rows": LocalSource(rows, copy=False)}, {"out": ir.State("")}, (step,),
        ir.Until((ir.MaxIterations(1),)), "out",
    )  # fmt: skip
    run = ir.LoopRun(loop, GROUP)
    run.start()
    COMM.Barrier()
    began = time.perf_counter()
    run.advance()
    return float(COMM.allreduce(time.perf_counter() - began, MPI.MAX)), run.tables["out"]


def alone(work: Callable[[], object]) -> float:
    """Seconds that rank 0 takes, while the others sleep."""
    seconds = 0.0
    if COMM.rank == 0:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    done = COMM.Ibarrier()
    while not done.Test():
        time.sleep(0.002)
    return seconds


def check(rows: ir.Batch, made: ir.Batch) -> None:
    """Sorted here and over the ranks, and the same rows: their number and the sum of their hashes."""
    total = np.zeros(2, np.int64)
    for batch, sign in ((rows, 1), (made, -1)):
        total += np.array([len(batch), int(hash_keys(batch).sum(dtype=np.uint64).view(np.int64))]) * sign
    GROUP.allreduce(total, "sum")
    assert not total.any(), "rows were lost or made"
    keys = made["k"]
    ends = COMM.allgather([keys[0], keys[len(keys) - 1]] if len(keys) else [])
    flat = [key for pair in ends for key in pair]
    assert flat == sorted(flat), "ranks are out of order"
    if isinstance(keys, np.ndarray):
        assert (keys[1:] >= keys[:-1]).all()
    else:
        assert pl.Series(keys.to_list()[:100_000]).is_sorted()


def measure(kind: str, n: int, repeats: int) -> None:
    """Time all in turn; rank 0 prints."""
    share = [n * (r + 1) // COMM.size - n * r // COMM.size for r in range(COMM.size)]
    rows = rows_of(kind, share[COMM.rank], COMM.rank)
    check(rows, ours(rows)[1].batch)
    rivals: dict[str, Callable[[], object]] = {}
    if COMM.rank == 0:
        whole = ir.Batch.concat([rows_of(kind, m, r) for r, m in enumerate(share)])
        keys = whole["k"]
        columns = {"k": keys if isinstance(keys, np.ndarray) else keys.to_list()}
        frame = pl.DataFrame(columns | ({"x": whole["x"]} if kind == "pairs" else {}))
        rivals["Polars"] = lambda: frame.sort("k", maintain_order=kind == "pairs")
        if kind == "numbers":
            rivals["NumPy"] = lambda: np.sort(keys)
    names = COMM.bcast(list(rivals))
    times: dict[str, list[float]] = {name: [] for name in ("ours", *names)}
    for turn in range(repeats + 1):
        for name in times:
            seconds = ours(rows)[0] if name == "ours" else alone(rivals.get(name, lambda: None))
            if turn:
                times[name].append(1e3 * seconds)
    if COMM.rank == 0:
        median = {name: statistics.median(t) for name, t in times.items()}
        for name, t in median.items():
            ratio = t / median["ours"]
            print(f"{kind:8} {name:7} {t:9.1f} ms {n / t / 1e3:8.1f} M rows/s   this/ours {ratio:5.2f}")


def main() -> None:
    """All kinds, or one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=KINDS)
    args = parser.parse_args()
    for kind in [args.only] if args.only else KINDS:
        measure(kind, args.rows if kind != "words" else args.rows // 10, args.repeats)


if __name__ == "__main__":
    GROUP = world()
    main()
