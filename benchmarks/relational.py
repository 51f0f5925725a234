"""Relational operations at the waist, on all ranks, against Polars and DuckDB with two threads each.

    mpirun -n 2 python -m mpi4py benchmarks/relational.py [--scale 0.2] [--repeats 5] [--only join group ...]
                                                          [--cpu]

| name | operation | rows |
|---|---|---|
| group, group-dense | sum of a float64 by an int64 key: a million of them, all over, or in one range | 50M |
| pass | filter, select and group-by in one pass | 50M |
| join | of rows with a keyed table: two value columns and the key | 20M x 2M |
| join-gather | the same, with the table on all ranks | 20M x 2M |
| join-many | where keys stand twice in the table, and half of the rows find none | 20M x 2M |
| join-small | with a table of a thousand keys, known on all ranks | 20M x 1000 |
| sort | int64 numbers | 50M |
| distinct | int64 numbers: a million of them, or mostly different ones (distinct-most) | 50M, 20M |

Ours is an iteration of a loop that runs once, driven by the engine; rows lie on their ranks, in memory,
before and after. Lazy is what a user writes with `Dataset`, from the first handle to the rows: it is planned,
its rows are agreed on, and all of it runs. Rivals run on rank 0 while the other ranks sleep, on the same
arrays, and their result is a table in memory, too; all take turns, inputs touched before. Times are of the
slowest rank, in milliseconds, medians of the turns but the first, in which every answer is compared with the
others by a digest of its rows. ``--cpu``: CPU time of all ranks and threads, where others use the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "2")

import duckdb
import numpy as np
import polars as pl
from mpi4py import MPI

import iterreduce as ir
from iterreduce.collectives import world
from iterreduce.columns.hashing import hash_keys, hash_words
from iterreduce.sources import LocalSource

COMM = MPI.COMM_WORLD
CPU = False  # which clock
Tables = dict[str, ir.Batch]
Frames = Mapping[str, pl.DataFrame]
Sets = Mapping[str, ir.Dataset]
Digest = tuple[int, int, float]


@dataclass(frozen=True)
class Case:
    """An operation: its tables (all rows), our stages, and how rivals say it. ``floats``: summed columns."""

    name: str
    tables: Callable[[float], Tables]
    stages: tuple[Any, ...]
    polars: Callable[[Frames], pl.DataFrame]
    sql: str
    lazy: Callable[[Sets], ir.Dataset]
    floats: tuple[str, ...] = ()
    ordered: bool = False


# ---------------------------------------------------------------------- operations

RANDOM_KEYS = 1_000_000


def some(scale: float, rows: float) -> int:
    """A number of rows."""
    return max(8, int(rows * scale))


def anywhere(keys: int) -> np.ndarray:
    """Keys all over the 64-bit range."""
    return np.random.default_rng(7).integers(-(2**62), 2**62, keys)


def measured(scale: float, dense: bool = False) -> Tables:
    """Rows of a key and two values."""
    n, keys, random = some(scale, 50e6), some(scale, RANDOM_KEYS), np.random.default_rng(1)
    k = random.integers(0, keys, n)
    return {"t": ir.Batch(k=k if dense else anywhere(keys)[k], x=random.random(n))}


def three(scale: float) -> Tables:
    """Rows of a key and two values."""
    rows = measured(scale)["t"]
    return {"t": rows.with_columns(y=np.random.default_rng(2).random(len(rows)))}


def sides(scale: float, keys: float = 2e6, copies: int = 1, found: float = 1.0) -> Tables:
    """Rows that name keys, and a table of them, ``copies`` rows each."""
    n, m, random = some(scale, 20e6), some(scale if keys > 1e4 else 1, keys), np.random.default_rng(3)
    known = anywhere(m // copies)
    named = anywhere(int(m // copies / found))[random.integers(0, int(m // copies / found), n)]
    k = np.concatenate([known] * copies)[random.permutation(len(known) * copies)]
    return {"t": ir.Batch(k=named, x=random.random(n)), "s": ir.Batch(k=k, y=random.random(len(k)))}


def numbers(scale: float, rows: float = 50e6, keys: float = 2**62) -> Tables:
    """One column."""
    random = np.random.default_rng(4)
    m = int(keys) if keys >= 2**62 else some(scale, keys)
    return {"t": ir.Batch(k=anywhere(m)[random.integers(0, m, some(scale, rows))] if m < 2**62 else
                          random.integers(-(2**62), 2**62, some(scale, rows)))}  # fmt: skip


def kept(rows: ir.Batch) -> ir.Batch:
    """Filter and select."""
    at = np.flatnonzero(rows["y"] < 0.5)
    return ir.Batch(k=rows["k"][at], z=rows["x"][at] * rows["y"][at] + 1)


JOIN = (
    ir.Shuffle("t", ("k",), "by key", sorted=False),
    ir.Shuffle("s", ("k",), "table", sorted=False),
    ir.Lookup("by key", ("k",), "table", ("y",), "out", "drop"),
)
GATHERED = (ir.Gather("s", "all"), ir.Lookup("t", ("k",), "all", ("y",), "out", "drop"))
JOIN_SQL = "select t.k, t.x, s.y from t join s on t.k = s.k"


def joined(frames: Frames) -> pl.DataFrame:
    """Polars' inner join; the order of rows is not asked for, by anybody."""
    return frames["t"].join(frames["s"], on="k")


def summed(frames: Frames) -> pl.DataFrame:
    """Polars' group-by."""
    return frames["t"].group_by("k").agg(pl.col("x").sum())


def passed(frames: Frames) -> pl.DataFrame:
    """Lazily, so that Polars may fuse."""
    z = (pl.col("x") * pl.col("y") + 1).alias("z")
    rows = frames["t"].lazy().filter(pl.col("y") < 0.5).select("k", z)
    return rows.group_by("k").agg(pl.col("z").sum()).collect()


def lazy_sum(sets: Sets) -> ir.Dataset:
    """A group-by."""
    return sets["t"].group_by("k").agg(x=ir.sum("x"))


def lazy_pass(sets: Sets) -> ir.Dataset:
    """Three operations."""
    rows = sets["t"].filter(ir.col("y") < 0.5).select("k", z=ir.col("x") * ir.col("y") + 1)
    return rows.group_by("k").agg(z=ir.sum("z"))


def lazy_join(sets: Sets) -> ir.Dataset:
    """An inner join: which of the three ways is the plan's affair."""
    return sets["t"].join(sets["s"], on="k")


GROUP_STAGES = (ir.Shuffle("t", ("k",), "out", {"x": ir.SUM}),)
GROUP_SQL = "select k, sum(x) as x from t group by k"
DISTINCT = (ir.Shuffle("t", ("k",), "out", {}),)
CASES = (
    Case("group", measured, GROUP_STAGES, summed, GROUP_SQL, lazy_sum, ("x",)),
    Case("group-dense", lambda s: measured(s, True), GROUP_STAGES, summed, GROUP_SQL, lazy_sum, ("x",)),
    Case(
        "pass", three,
        (ir.Local(kept, ("t",), "some"), ir.Shuffle("some", ("k",), "out", {"z": ir.SUM})),
        passed, "select k, sum(x * y + 1) as z from t where y < 0.5 group by k", lazy_pass,
        ("z",),
    ),
    Case("join", sides, JOIN, joined, JOIN_SQL, lazy_join),
    Case("join-many", lambda s: sides(s, copies=2, found=0.5), JOIN, joined, JOIN_SQL, lazy_join),
    Case("join-gather", sides, GATHERED, joined, JOIN_SQL, lazy_join),
    Case("join-small", lambda s: sides(s, 1000), GATHERED, joined, JOIN_SQL, lazy_join),
    Case(
        "sort", numbers, (ir.Shuffle("t", ("k",), "out", route=ir.Splitters()),),
        lambda f: f["t"].sort("k"), "select k from t order by k",
        lambda d: d["t"].sort("k"), ordered=True,
    ),
    Case(
        "distinct", lambda s: numbers(s, 50e6, RANDOM_KEYS), DISTINCT,
        lambda f: f["t"].unique(), "select distinct k from t", lambda d: d["t"].distinct(),
    ),
    Case(
        "distinct-most", lambda s: numbers(s, 20e6), DISTINCT,
        lambda f: f["t"].unique(), "select distinct k from t", lambda d: d["t"].distinct(),
    ),
)  # fmt: skip


# ---------------------------------------------------------------------- ours and rivals


def seconds_since(began: tuple[float, float]) -> float:
    """Of the slowest rank, or, with ``--cpu``, of all threads of all ranks."""
    if CPU:
        return float(COMM.allreduce(time.process_time() - began[1], MPI.SUM))
    return float(COMM.allreduce(time.perf_counter() - began[0], MPI.MAX))


def now() -> tuple[float, float]:
    """Both clocks."""
    return time.perf_counter(), time.process_time()


def ours(case: Case, shares: Tables) -> tuple[float, ir.Batch]:
    """Seconds of one iteration, and this rank's rows."""
    step = ir.Superstep(case.name, case.stages, (ir.Replace("result", "out"),))
    sources = {name: LocalSource(rows, copy=False) for name, rows in shares.items()}
    until = ir.Until((ir.MaxIterations(1),))
    loop = ir.Loop(case.name, sources, {"result": ir.State("")}, (step,), until, "result")
    run = ir.LoopRun(loop, GROUP)
    run.start()
    COMM.Barrier()
    began = now()
    run.advance()
    return seconds_since(began), run.tables["result"].batch


def lazily(case: Case, shares: Tables) -> tuple[float, ir.Batch]:
    """Seconds from the first handle to the rows, and this rank's rows."""
    COMM.Barrier()
    began = now()
    columns = {name: {c: rows[c] for c in rows.names} for name, rows in shares.items()}
    sets = {name: ir.Dataset.from_local(COMM, copy=False, **of) for name, of in columns.items()}
    run = ir.LoopRun(case.lazy(sets).to_loop(COMM), GROUP)
    run.advance()
    return seconds_since(began), run.tables["result"].batch


def alone(work: Callable[[], object]) -> float:
    """Seconds that rank 0 takes, while the others sleep."""
    seconds = 0.0
    if COMM.rank == 0:
        began = now()
        work()
        seconds = now()[CPU] - began[CPU]
    done = COMM.Ibarrier()
    while not done.Test():
        time.sleep(0.002)
    return seconds


class Rivals:
    """Polars and DuckDB with all rows, on rank 0."""

    def __init__(self, case: Case, tables: Tables):
        self.case, self.made = case, dict[str, Any]()
        self.frames = {n: pl.DataFrame({c: t[c] for c in t.names}) for n, t in tables.items()}
        self.duck = duckdb.connect()
        self.duck.execute("set threads = 2")
        self.duck.execute(f"set preserve_insertion_order = {str(case.ordered).lower()}")
        for name, frame in self.frames.items():
            self.duck.register("given", frame)
            self.duck.execute(f"create table {name} as select * from given")
            self.duck.unregister("given")

    def polars(self) -> None:
        """Its result is a frame."""
        self.made["Polars"] = None
        self.made["Polars"] = self.case.polars(self.frames)

    def duckdb(self) -> None:
        """Its result is a table in memory."""
        self.made["DuckDB"] = None
        self.made["DuckDB"] = self.duck.sql(self.case.sql).to_arrow_table()

    def rows(self, name: str) -> ir.Batch:
        """A result as a batch."""
        made = self.made[name]
        frame = made if isinstance(made, pl.DataFrame) else pl.from_arrow(made)
        assert isinstance(frame, pl.DataFrame)
        return ir.Batch(**{n: frame[n].to_numpy() for n in frame.columns})


def digest(case: Case, rows: ir.Batch) -> Digest:
    """Rows, a sum of hashes of those columns that must be equal, a sum of floats weighted by the key."""
    exact = rows.drop(*case.floats)
    names = sorted(exact.names)
    hashes = hash_keys(exact.select(*names)).sum(dtype=np.uint64) if len(rows) else np.uint64(0)
    weights = hash_words(rows["k"].view(np.int64)) / 2.0**64
    floats = sum(float(np.dot(rows[f], weights)) for f in case.floats)
    if case.ordered:
        assert (rows["k"][1:] >= rows["k"][:-1]).all(), "not sorted"
    return len(rows), int(hashes), floats


def ours_digest(case: Case, rows: ir.Batch) -> Digest:
    """That of all ranks together."""
    if case.ordered:
        ends = [e for pair in COMM.allgather(rows["k"][[0, -1]].tolist() if len(rows) else []) for e in pair]
        assert ends == sorted(ends), "ranks are out of order"
    parts = COMM.allgather(digest(case, rows))
    return sum(p[0] for p in parts), sum(p[1] for p in parts) % 2**64, sum(p[2] for p in parts)


def verify(mine: Digest, theirs: Digest, name: str) -> None:
    """Raise where answers differ."""
    assert mine[:2] == theirs[:2], f"{name} has other rows: {mine} {theirs}"
    assert abs(mine[2] - theirs[2]) <= 1e-9 * abs(mine[2]), f"{name} has other sums: {mine} {theirs}"


def share_of(rows: ir.Batch) -> ir.Batch:
    """This rank's rows."""
    n = len(rows)
    return rows.slice(n * COMM.rank // COMM.size, n * (COMM.rank + 1) // COMM.size)


def measure(case: Case, scale: float, repeats: int) -> None:
    """Time all in turn; rank 0 prints."""
    tables = case.tables(scale)
    shares = {name: share_of(rows) for name, rows in tables.items()}
    if COMM.rank:
        tables, shares = {}, {name: rows.copy() for name, rows in shares.items()}
    rivals = Rivals(case, tables) if COMM.rank == 0 else None
    works: dict[str, Callable[[], object]] = {
        "Polars": rivals.polars if rivals else lambda: None,
        "DuckDB": rivals.duckdb if rivals else lambda: None,
    }
    times: dict[str, list[float]] = {name: [] for name in ("ours", "lazy", *works)}
    mine: Digest = (0, 0, 0.0)
    for turn in range(repeats + 1):
        for name, of_ours in {"ours": ours, "lazy": lazily}.items():
            seconds, made = of_ours(case, shares)
            times[name].append(1e3 * seconds)
            if not turn and name == "ours":
                mine = ours_digest(case, made)
            elif not turn:
                verify(mine, ours_digest(case, made), name)
            del made
        for name, work in works.items():
            times[name].append(1e3 * alone(work))
            if rivals:
                if not turn:
                    verify(mine, digest(case, rivals.rows(name)), name)
                rivals.made.clear()
    if COMM.rank == 0:
        show(case, times, sum(map(len, tables.values())))


def show(case: Case, times: Mapping[str, list[float]], rows: int) -> None:
    """A line per rival."""
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    for name, t in median.items():
        print(
            f"{case.name:14}{name:8}{t:9.1f} ms {rows / t / 1e3:8.1f} M rows/s   "
            f"this/ours {t / median['ours']:6.2f}",
            flush=True,
        )


def main() -> None:
    """All operations, or some."""
    global CPU
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES])
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    CPU = args.cpu
    for case in CASES:
        if not args.only or case.name in args.only:
            measure(case, args.scale, args.repeats)


if __name__ == "__main__":
    GROUP = world()
    main()
