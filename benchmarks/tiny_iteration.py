"""What an iteration costs when there is next to nothing to do: 1000 keys, one shuffle, a fixpoint test.

    mpirun -n 2 python benchmarks/tiny_iteration.py

Ours: user map and reduce in NumPy, events on, keys invariant or made afresh in every iteration. The floor is
the collectives that such an iteration cannot do without, with raw mpi4py and buffers made ready: one
Alltoallv of 1000/size float64 per destination (for fresh keys one Alltoall of keys and values) and one
Allreduce of 8 doubles. All are timed in turn, several times; medians. The last lines compare iteration 1000
with iteration 2 of the same loop, in time and in resident memory.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
from mpi4py import MPI

import iterreduce as ir
from iterreduce.memory import peak_rss_bytes

KEYS, ITERATIONS, REPEATS = 1000, 400, 7


def floor_us(comm: MPI.Comm, words: int) -> float:
    """One exchange and one reduction of ready buffers, microseconds."""
    per = KEYS // comm.size * words
    send, recv = np.ones(per * comm.size), np.ones(per * comm.size)
    counts, displs = [per] * comm.size, [per * r for r in range(comm.size)]
    small, total = np.ones(8), np.ones(8)
    sends, recvs = [send, counts, displs, MPI.DOUBLE], [recv, counts, displs, MPI.DOUBLE]
    comm.Barrier()
    started = time.perf_counter()
    for _ in range(ITERATIONS):
        if words == 1:
            comm.Alltoallv(sends, recvs)
        else:
            comm.Alltoall(send, recv)
        comm.Allreduce(small, total)
    return (time.perf_counter() - started) / ITERATIONS * 1e6


def loop_of(comm: MPI.Comm, fresh: bool, iterations: int) -> ir.Dataset:
    mine = np.arange(comm.rank, KEYS, comm.size, dtype=np.int64)

    def spread(state: ir.Batch) -> ir.Batch:
        key = state["key"] + 0 if fresh else state["key"]
        return ir.Batch(key=key, value=state["value"] * 0.999)

    def update(heard: ir.Batch, state: ir.Batch) -> ir.Batch:
        return state.with_columns(value=0.5 * heard["value"] + 0.5)

    start = ir.Dataset.from_local(comm, key=mine, value=np.ones(len(mine)))
    return ir.MapReduce(map=spread, reduce=ir.SUM, key="key").iterate(
        state=start, state_key="key", update=update, until=ir.l1("value") <= 0, max_iterations=iterations
    )


def moved_keys(comm: MPI.Comm, fresh: bool, iterations: int) -> ir.Dataset:
    """As ``loop_of``, but each rank's rows go to all ranks: an invariant table of (target, source value)."""
    rng = np.random.default_rng(comm.rank)
    target = rng.permutation(KEYS).astype(np.int64)[:KEYS]
    rows = ir.Dataset.from_local(comm, key=target, weight=rng.random(len(target)))

    def spread(rows: ir.Batch, scale: ir.Batch) -> ir.Batch:
        key = rows["key"] + 0 if fresh else rows["key"]
        return ir.Batch(key=key, value=rows["weight"] * scale["scale"][0])

    def update(sums: ir.Batch, state: ir.Batch) -> ir.Batch:
        return state.with_columns(value=sums["value"])

    mine = np.arange(comm.rank, KEYS, comm.size, dtype=np.int64)
    inputs = ir.Inputs()
    rows_name = inputs.rows("rows", rows)
    keyed = inputs.rows("keyed", ir.Dataset.from_local(comm, key=mine, value=np.ones(len(mine))))
    inputs.sources["scale"] = ir.Batch(scale=np.ones(1))
    step = ir.Superstep(
        "step",
        (
            ir.Local(spread, (rows_name, "scale"), "mapped"),
            ir.Shuffle("mapped", ("key",), "sums", ir.SUM, onto="state"),
            ir.Local(update, ("sums", "state"), "updated", cut="share"),
        ),
        (ir.Replace("state", "updated"),),
    )
    until = ir.Until(
        (ir.Distance(("value",), 0.0, "l1", table="state", fold="max"), ir.MaxIterations(iterations))
    )
    return ir.Loop(
        "tiny", inputs.sources, {"state": ir.State(keyed, ("key",))}, (step,), until, "state", inputs.prepare
    )


def ours_us(comm: MPI.Comm, group: ir.Group, fresh: bool) -> float:
    events = ir.Events()
    seen: list[str] = []
    events.subscribe(lambda event: seen.append(event.name))
    run = ir.LoopRun(moved_keys(comm, fresh, ITERATIONS + 10), group, events=events)
    for _ in range(5):  # plans are made, buffers touched
        advance(run)
    comm.Barrier()
    started = time.perf_counter()
    for _ in range(ITERATIONS):
        advance(run)
    return (time.perf_counter() - started) / ITERATIONS * 1e6


def advance(run: ir.LoopRun) -> None:
    run.advance()
    assert run.root.standing is not None
    run.root.standing.outcome = None  # the state does not change here, but the test for it is what is timed


def first_and_last(comm: MPI.Comm, group: ir.Group) -> tuple[float, float, int, int]:
    """Median seconds of iterations 2-101 and 900-1000, and peak memory after each."""
    run = ir.LoopRun(moved_keys(comm, False, 1001), group)
    advance(run)
    early_memory = late_memory = 0
    for i in range(999):
        advance(run)
        if i == 100:
            early_memory = peak_rss_bytes()
    late_memory = peak_rss_bytes()
    seconds = run.clock.iterations
    return statistics.median(seconds[2:102]), statistics.median(seconds[900:]), early_memory, late_memory


def main() -> None:
    comm = MPI.COMM_WORLD
    group = ir.Group.from_comm(comm)
    figures: dict[str, list[float]] = {"floor": [], "invariant": [], "floor fresh": [], "fresh": []}
    for _ in range(REPEATS):
        figures["floor"].append(floor_us(comm, 1))
        figures["invariant"].append(ours_us(comm, group, False))
        figures["floor fresh"].append(floor_us(comm, 2))
        figures["fresh"].append(ours_us(comm, group, True))
    early, late, early_memory, late_memory = first_and_last(comm, group)
    if comm.rank:
        return
    med = {k: statistics.median(v) for k, v in figures.items()}
    library = MPI.Get_library_version().split(",")[0].splitlines()[0]
    print(f"{KEYS} keys, {comm.size} ranks, {library}, median of {REPEATS}, microseconds per iteration")
    rows = (("invariant", "floor", "50, aim 15"), ("fresh", "floor fresh", "100, aim 30"))
    for name, floor, limits in rows:
        ours, least = med[name], med[floor]
        print(f"  {name:10s} {ours:7.1f}  floor {least:5.1f}  above it {ours - least:7.1f}  (must {limits})")
    grown = late_memory / early_memory
    print(f"  iteration 1000 / iteration 2: time {late / early:.2f}, peak memory {grown:.4f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
