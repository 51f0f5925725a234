"""What a key directory saves where rows vary and keys recur: 200k keys per rank, each time in another order.

    mpirun -n 2 python benchmarks/directory.py [keys]

Keys are text of 12 to 18 bytes, or int64. Two runs of one loop take turns, one with directories and one
without; medians of the iterations after the keys were learnt. "exchange" is an iteration without its map
and its local fold, which both runs make alike. Of 5 % of the keys, chosen at random in every iteration,
most are not known: the directory must be given up, and cost nothing.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
from mpi4py import MPI

import iterreduce as ir
from iterreduce.columns.ragged import Ragged
from iterreduce.shuffle import CombineShuffle
from iterreduce.sources import LocalSource

LEARNT, TIMED = 4, 15


def text_keys(n: int) -> Ragged:
    words = np.random.default_rng(1).integers(10**7, 10**15, n)
    return Ragged.from_list([f"word-{w:x}" for w in words.tolist()])


def loop_of(rank: int, keys: np.ndarray | Ragged, subset: float) -> ir.Loop:
    """Each rank has all keys (or a part that varies), in an order that varies."""
    n = len(keys)

    def rows(r: ir.Batch, clock: ir.Batch) -> ir.Batch:
        order = np.random.default_rng([rank, int(clock["i"][0]) % 8]).permutation(n)[: int(n * subset)]
        return ir.Batch(k=keys.take(order), x=np.ones(len(order)))

    stages = (
        ir.Local(rows, ("r", "clock"), "m", "share"),
        ir.Shuffle("m", ("k",), "h", {"x": ir.sum("x")}),
        ir.Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "c"),
    )
    sources = {"r": LocalSource(ir.Batch(z=np.zeros(1))), "zero": ir.Batch(i=np.zeros(1, np.int64))}
    step = ir.Superstep("step", stages, (ir.Replace("clock", "c"), ir.Replace("out", "h")))
    state = {"clock": ir.State("zero"), "out": ir.State("")}
    return ir.Loop("recurring", sources, state, (step,), ir.Until((ir.MaxIterations(1000),)), "out")


class Timed:
    """One run, with seconds and bytes of its exchanges."""

    def __init__(self, comm: MPI.Comm, group: ir.Group, loop: ir.Loop, slots: bool):
        self.comm, self.run = comm, ir.LoopRun(loop, group)
        works = [getattr(work, "folding", work) for work in self.run.shop.exchangers]
        self.work = next(w for w in works if isinstance(w, CombineShuffle))
        self.work.slots.enabled = slots
        self.exchange_s: list[float] = []
        self.whole_s: list[float] = []
        self.sent: list[int] = []
        prepare, self._prepared = self.work.prepare, 0.0

        def timed(*args: object) -> None:
            prepare(*args)  # type: ignore[arg-type]
            comm.Barrier()
            self._prepared = time.perf_counter()

        self.work.prepare = timed  # type: ignore[method-assign,assignment]

    def advance(self) -> None:
        words = self.work.slots.words_sent
        self.comm.Barrier()
        started = time.perf_counter()
        self.run.advance()
        ended = time.perf_counter()
        self.whole_s.append(ended - started)
        self.exchange_s.append(ended - self._prepared)
        self.sent.append(8 * (self.work.slots.words_sent - words))


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds[LEARNT:]) * 1e3


def compare(comm: MPI.Comm, group: ir.Group, what: str, keys: np.ndarray | Ragged, subset: float) -> None:
    slots, plain = (Timed(comm, group, loop_of(comm.rank, keys, subset), s) for s in (True, False))
    for _ in range(LEARNT + TIMED):
        slots.advance()
        plain.advance()
    if comm.rank:
        return
    runs = plain, slots
    exchange, other = (median_ms(run.exchange_s) for run in runs)
    whole, whole_slots = (median_ms(run.whole_s) for run in runs)
    sent, sent_slots = (statistics.median(run.sent[LEARNT:]) / 1e6 for run in runs)
    learning = 1e3 * (slots.exchange_s[1] - plain.exchange_s[1])
    print(
        f"  {what:20s} exchange {exchange:6.1f} -> {other:5.1f} ms ({exchange / other:3.1f} x)"
        f"   iteration {whole:6.1f} -> {whole_slots:6.1f} ms   sent {sent:5.2f} -> {sent_slots:4.2f} MB"
        f"   learning {learning:5.1f} ms, holds {slots.run.shop.cache.nbytes / 1e6:4.1f} MB"
    )
    sys.stdout.flush()


def main() -> None:
    comm, n = MPI.COMM_WORLD, int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    group = ir.Group.from_comm(comm)
    if not comm.rank:
        print(f"{n:,} keys per rank, {comm.size} ranks, keys -> slots, medians of {TIMED}, bytes per rank")
    numbers = np.random.default_rng(2).integers(-(2**62), 2**62, n)
    for what, keys in (("text", text_keys(n)), ("int64", numbers)):
        for subset in (1.0, 0.9, 0.05):
            compare(comm, group, f"{what}, {subset:.0%} of them", keys, subset)


if __name__ == "__main__":
    main()
