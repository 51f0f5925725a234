"""Whole rows to the owner of their key: the engine's stage against memory copies and hand-written mpi4py.

    mpirun -n 2 python benchmarks/exchange.py [--rows 10000000] [--keys 1000000] [--repeats 7]

Rows are (int64 key, float64 value), ``--rows`` of them over all ranks, routed by hash. *Fresh*: nothing is
known; *values*: the keys are those of the last iteration. For each: the engine's stage, driven as the engine
drives it (``prepare``, ``exchange``, ``finish``, ``commit``), whose rows come out sorted by key; the same
up to rows at their owner, in order of arrival; and the rivals, whose buffers are ready and touched. All is
interleaved; times are of the slowest rank, in milliseconds: the median of all turns, and the best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from mpi4py import MPI

from iterreduce.agreement import Guard
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import hash_words
from iterreduce.columns.ordering import hash_order
from iterreduce.columns.partition import PartitionMap
from iterreduce.folding import RowSource
from iterreduce.loop import Shuffle
from iterreduce.loop_cache import LoopCache
from iterreduce.rowshuffle import RowShuffle
from iterreduce.table import BY_BLOCK, Table

COMM = MPI.COMM_WORLD


class Stage:
    """A `Shuffle` of the rows "r", outside of a loop run."""

    def __init__(self, group: Group, rows: Batch, plan: bool):
        self.group = group
        self.rows = rows
        stage = Shuffle("r", ("k",), "into")
        self.work = RowShuffle(
            stage, 1, group, RowSource("r", None), LoopCache(enabled=plan), PartitionMap(1024, group.size)
        )
        self.iteration = 0
        self.table: Table | None = None

    def to_owner(self) -> None:
        """Rows, or values, at their owner, in order of arrival."""
        self.iteration += 1
        self.guard = Guard(self.group.rank, self.iteration)
        tables = {"r": Table(self.rows, BY_BLOCK, {"k": 1})}
        self.guard.run(self.work.prepare, tables, self.iteration)
        self.work.exchange(self.guard)

    def finish(self) -> None:
        """Rows sorted by key."""
        self.table = self.guard.run(self.work.finish)
        assert self.guard.failure is None, self.guard.failure

    def whole(self) -> None:
        """One iteration."""
        self.to_owner()
        self.finish()

    def commit(self) -> None:
        """Not timed: a loop does it with its control reduction."""
        self.work.commit(self.group.agree_any(self.work.keys_changed))


@numba.njit(cache=True)
def bucket(keys: Any, values: Any, dest: Any, ends: Any, out: Any) -> None:
    """The hand-written pass: rows, as pairs of words, into their destination's segment."""
    for i in range(len(keys)):
        d = dest[i]
        at = np.uint64(ends[d])
        out[at, 0] = keys[i]
        out[at, 1] = values[i]
        ends[d] += 1


class ByHand:
    """Straight mpi4py: hash, bucket pass and Alltoallv of words; gather and Alltoallv of values."""

    def __init__(self, rows: Batch):
        self.keys, self.values = rows["k"], rows["x"]
        self.map = PartitionMap(1024, COMM.size)
        dest = self.map.owner_of_hashes(hash_words(self.keys))
        self.order = np.argsort(dest, kind="stable")
        self.counts = np.bincount(dest, minlength=COMM.size)
        self.coming = np.empty_like(self.counts)
        COMM.Alltoall(self.counts, self.coming)
        n, m = len(self.keys), int(self.coming.sum())
        self.hashes = np.zeros(n, np.uint64)
        self.pairs, self.got_pairs = np.zeros((n, 2), np.int64), np.zeros((m, 2), np.int64)
        self.sent, self.got, self.made = np.zeros(n), np.zeros(m), np.zeros(m)
        self.twins = np.zeros(n, np.int64), np.zeros(n)
        self.bits = self.values.view(np.int64)
        self.fresh()
        self.final = hash_order(hash_words(np.ascontiguousarray(self.got_pairs[:, 0])))

    def memcpy(self) -> None:
        """Both columns, into memory that is ready."""
        np.copyto(self.twins[0], self.keys)
        np.copyto(self.twins[1], self.values)

    def fresh(self) -> None:
        """Hash, count, bucket, exchange counts and rows."""
        dest = self.map.owner_of_hashes(hash_words(self.keys, self.hashes))
        counts = np.bincount(dest, minlength=COMM.size)
        bucket(self.keys, self.bits, dest, np.cumsum(counts) - counts, self.pairs)
        COMM.Alltoall(counts, self.coming)
        COMM.Alltoallv([self.pairs, counts * 2, MPI.INT64_T], [self.got_pairs, self.coming * 2, MPI.INT64_T])

    def gather_and_send(self) -> None:
        """Values only: gather by the known order, Alltoallv."""
        np.take(self.values, self.order, out=self.sent, mode="clip")
        COMM.Alltoallv([self.sent, self.counts, MPI.DOUBLE], [self.got, self.coming, MPI.DOUBLE])

    def gather_send_and_sort(self) -> None:
        """The same, and gather by the known final order."""
        self.gather_and_send()
        np.take(self.got, self.final, out=self.made, mode="clip")


def timed(work: Callable[[], object]) -> float:
    """Milliseconds of the slowest rank."""
    COMM.Barrier()
    begin = time.perf_counter()
    work()
    return 1e3 * float(COMM.allreduce(time.perf_counter() - begin, MPI.MAX))


def rows_of(args: argparse.Namespace) -> Batch:
    """This rank's rows."""
    random, n = np.random.default_rng(COMM.rank), args.rows // COMM.size
    keys = np.random.default_rng(99).integers(-(2**62), 2**62, args.keys)
    return Batch(k=keys[random.integers(0, args.keys, n)], x=random.random(n))


def check(fresh: Stage, planned: Stage, by_hand: ByHand) -> None:
    """All roads bring the same rows."""
    assert fresh.table is not None and planned.table is not None
    got, values = fresh.table.batch, planned.table.batch
    by_hand.gather_send_and_sort()
    np.testing.assert_array_equal(got["x"], by_hand.made)
    np.testing.assert_array_equal(got["k"], by_hand.got_pairs[by_hand.final, 0])
    assert got.equals(values)
    assert planned.work.planned and not fresh.work.planned


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Times by name."""
    group, rows = Group.from_comm(COMM), rows_of(args)
    by_hand, fresh, planned = ByHand(rows), Stage(group, rows, False), Stage(group, rows, True)
    for _ in range(3):
        for stage in (fresh, planned):
            stage.whole()
            stage.commit()
    check(fresh, planned, by_hand)
    times: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        for name in ("memcpy", "fresh", "gather_and_send", "gather_send_and_sort"):
            times.setdefault(name, []).append(timed(getattr(by_hand, name)))
        for name, stage in (("engine fresh", fresh), ("engine values", planned)):
            exchange, finish = timed(stage.to_owner), timed(stage.finish)
            stage.commit()
            times.setdefault(f"{name}, to owner", []).append(exchange)
            times.setdefault(f"{name}, sorted", []).append(exchange + finish)
    group.free()
    return times


TABLE = (
    ("fresh, rows at owner", "engine fresh, to owner", ("memcpy", "fresh")),
    ("fresh, sorted by key", "engine fresh, sorted", ("memcpy", "fresh")),
    ("values, at owner", "engine values, to owner", ("memcpy", "gather_and_send")),
    ("values, sorted by key", "engine values, sorted", ("memcpy", "gather_and_send", "gather_send_and_sort")),
)


def main() -> None:
    """Print medians, and ratios of ours to each rival (below 1: ours is faster)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    found = measure(args)
    if COMM.rank:
        return
    print(
        f"{args.rows:,} rows, {COMM.size} ranks, {MPI.get_vendor()[0]}; ms, and ratios of medians (of bests)"
    )
    print(f"  {'':28} {'median':>8} {'best':>8}")
    for name, ms in found.items():
        print(f"  {name:28} {statistics.median(ms):8.1f} {min(ms):8.1f}")
    for what, ours, rivals in TABLE:
        ratios = [
            f"{ratio(found, ours, r, statistics.median):5.2f} ({ratio(found, ours, r, min):.2f}) x {r}"
            for r in rivals
        ]
        print(f"{what:24} {'   '.join(ratios)}")


def ratio(found: dict[str, list[float]], ours: str, rival: str, of: Callable[[list[float]], float]) -> float:
    """Our time over the rival's."""
    return of(found[ours]) / of(found[rival])


if __name__ == "__main__":
    main()
