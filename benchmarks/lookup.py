"""Looking up rows of a keyed table: the engine's stage against hand-written mpi4py.

    mpirun -n 2 python benchmarks/lookup.py [--rows 1000000] [--keys 1000000] [--width 8] [--repeats 7]

``--rows`` rows over all ranks name random keys of a table of ``--keys`` rows that holds ``--width`` float64
each. *Planned*: keys are those of the last iteration. The rival has its slots, counts and buffers ready and
touched: it takes the values asked for, moves them by Alltoallv, and takes them into the order of the rows.
*Fresh*: the engine alone. *Here*: a frontier of ``--keys / 1000`` rows joined with the rows of its keys among
all ``--rows``, where both lie by that key. Interleaved; milliseconds of the slowest rank, the median of all
turns, and the best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from iterreduce.agreement import Guard
from iterreduce.collectives import Group, group_for
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import number_keys
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.partition import PartitionMap
from iterreduce.lookup import LookupRows
from iterreduce.loop import Lookup
from iterreduce.loop_cache import LoopCache
from iterreduce.table import BY_BLOCK, Table, by_key

COMM = MPI.COMM_WORLD


class Stage:
    """A `Lookup` of the rows "r" in the table "t", outside of a loop run."""

    def __init__(self, group: Group, rows: Batch, table: Batch, plan: bool, beside: bool = False):
        self.group = group
        laid = {"r": ("k",), "t": ("k",)} if beside else {}
        stage = Lookup("r", ("k",), "t", tuple(n for n in table.names if n != "k"), "into", "drop")
        parts = PartitionMap(1024, group.size)
        self.work = LookupRows(stage, 1, group, LoopCache(enabled=plan or beside), parts, laid)
        layout = by_key("k") if beside else BY_BLOCK
        self.tables = {"r": Table(rows, layout, {"k": 1}), "t": Table(table, by_key("k"), {"k": 2})}
        self.iteration = 0

    def whole(self) -> None:
        """One iteration."""
        self.iteration += 1
        guard = Guard(self.group.rank, self.iteration)
        guard.run(self.work.prepare, self.tables, self.iteration)
        self.work.exchange(guard)
        self.table = guard.run(self.work.finish)
        assert guard.failure is None, guard.failure

    def commit(self) -> None:
        """Not timed: a loop does it with its control reduction."""
        self.work.commit(False)


class ByHand:
    """Take, Alltoallv, take."""

    def __init__(self, rows: Batch, table: Batch, parts: PartitionMap):
        self.values = table["v"]
        numbered = number_keys(rows.select("k"))
        asked = np.diff(parts.send_bounds(numbered.hashes))
        self.to_send = np.empty_like(asked)
        COMM.Alltoall(asked, self.to_send)
        keys, came = numbered.keys["k"].copy(), np.empty(int(self.to_send.sum()), np.int64)
        COMM.Alltoallv([keys, asked, MPI.INT64_T], [came, self.to_send, MPI.INT64_T])
        order = np.argsort(table["k"])
        self.slots = order[np.searchsorted(table["k"], came, sorter=order)]
        self.asked, self.final, width = asked, numbered.codes.astype(np.int64), self.values.shape[1]
        self.sent, self.got = np.zeros((len(came), width)), np.zeros((len(keys), width))
        self.out, self.width = np.zeros((len(rows), width)), width

    def whole(self) -> None:
        """One iteration."""
        w = self.width
        np.take(self.values, self.slots, axis=0, out=self.sent, mode="clip")
        COMM.Alltoallv([self.sent, self.to_send * w, MPI.DOUBLE], [self.got, self.asked * w, MPI.DOUBLE])
        np.take(self.got, self.final, axis=0, out=self.out, mode="clip")


def timed(work: Callable[[], None]) -> float:
    """Milliseconds of the slowest rank."""
    COMM.Barrier()
    started = time.perf_counter()
    work()
    return float(COMM.allreduce((time.perf_counter() - started) * 1e3, MPI.MAX))


def main() -> None:
    """Run all, print a table on rank 0."""
    parser = argparse.ArgumentParser()
    for name, value in (("rows", 1_000_000), ("keys", 1_000_000), ("width", 8), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    group = group_for(COMM)
    parts = PartitionMap(1024, COMM.size)
    random = np.random.default_rng(COMM.rank)
    mine = np.arange(args.keys)
    mine = mine[parts.owner_of_hashes(hash_keys(Batch(k=mine))) == COMM.rank]
    table = Batch(k=mine, v=random.random((len(mine), args.width)))
    rows = Batch(k=random.integers(0, args.keys, args.rows // COMM.size))
    ends = np.repeat(mine, max(1, args.rows // args.keys))
    edges = Batch(k=ends, to=random.integers(0, args.keys, len(ends)))
    stages = {
        "planned": Stage(group, rows, table, True),
        "fresh": Stage(group, rows, table, False),
        "here": Stage(group, Batch(k=mine[::1000]), edges, True, beside=True),
    }
    hand = ByHand(rows, table, parts)
    times: dict[str, list[float]] = {}
    for turn in range(args.repeats + 2):
        for name, stage in stages.items():
            spent = timed(stage.whole)
            stage.commit()
            if turn >= 2:
                times.setdefault(name, []).append(spent)
        spent = timed(hand.whole)
        if turn >= 2:
            times.setdefault("by hand", []).append(spent)
        planned = stages["planned"].table
        assert planned is not None and np.array_equal(planned.batch["v"], hand.out)
        del planned
    if COMM.rank == 0:
        for name, spent in times.items():
            print(f"{name:10} median {statistics.median(spent):8.3f}  best {min(spent):8.3f} ms")
        ratios = [a / b for a, b in zip(times["planned"], times["by hand"], strict=True)]
        print(f"planned / by hand: median of ratios {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
