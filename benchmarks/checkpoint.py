"""What a checkpoint costs: its write beside a raw one of the same bytes, and the iterations beside it.

    python benchmarks/checkpoint.py write
    mpirun -n 2 python benchmarks/checkpoint.py write --mib 512
    mpirun -n 2 python benchmarks/checkpoint.py run --scale 20

`write`: seconds from a barrier until all ranks' bytes are on disk. Raw: each rank writes its bytes with
`pwrite` and calls `fsync`, to a file of its own or into its part of one. Ours: a checkpoint from `begin` to
its rename, with checksums, HDF5 structure, index and manifest. Naive: all rows to rank 0, which writes them
with h5py. All are made in turn, in every repeat; medians, and the median of each repeat's ratio to raw.

`run`: PageRank of a random graph (R-MAT), whole runs in turn without checkpoints and with one in every
iteration (of short ones: in every one that finds none under way). `--inner N` makes an iteration of N steps,
so that it takes longer. Medians of the iterations behind the second, from commit to commit with what is saved
between them; how long iterations waited (for the copy, and for the publication of the checkpoint before),
beside one memcpy of as many bytes made right then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import iterreduce as ir  # noqa: E402
from benchmarks.waist.pagerank import pagerank  # noqa: E402
from iterreduce.collectives import group_for  # noqa: E402
from iterreduce.events import Event, Events  # noqa: E402
from iterreduce.options import Options  # noqa: E402
from iterreduce.run import run_loop  # noqa: E402
from iterreduce.saving.directory import Attempt  # noqa: E402
from iterreduce.saving.writing import Saved, begin  # noqa: E402
from iterreduce.storage import pwrite_all  # noqa: E402

COMM = MPI.COMM_WORLD


def timed(work: Callable[[], None]) -> float:
    """Seconds of the slowest rank."""
    COMM.Barrier()
    began = time.perf_counter()
    work()
    return float(COMM.allreduce(time.perf_counter() - began, MPI.MAX))


def shared_place(where: str | None) -> str:
    """A new directory that all ranks know."""
    return str(COMM.bcast(tempfile.mkdtemp(prefix="checkpoint-", dir=where) if COMM.rank == 0 else None))


# ---------------------------------------------------------------- the write alone


def raw(columns: dict[str, np.ndarray], path: str, first: int) -> None:
    """pwrite, and fsync."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    for column in columns.values():
        pwrite_all(handle, column.view(np.uint8), first)
        first += column.nbytes
    os.fsync(handle)
    os.close(handle)


def raw_one_file(columns: dict[str, np.ndarray], path: str) -> None:
    """Each rank its part of one file, which has its size already."""
    nbytes = sum(column.nbytes for column in columns.values())
    if COMM.rank == 0:
        with open(path, "wb") as file:
            file.truncate(nbytes * COMM.size)
    COMM.Barrier()
    raw(columns, path, COMM.rank * nbytes)


def gathered(columns: dict[str, np.ndarray], path: str) -> None:
    """All rows to rank 0, which writes them with h5py."""
    import h5py

    whole = {name: gathered_rows(column) for name, column in columns.items()}
    if COMM.rank == 0:
        with h5py.File(path, "w") as file:
            for name, column in whole.items():
                file.create_dataset(name, data=column)
            file.flush()
            os.fsync(file.id.get_vfd_handle())


def gathered_rows(column: np.ndarray) -> np.ndarray | None:
    out = np.empty(len(column) * COMM.size, column.dtype) if COMM.rank == 0 else None
    COMM.Gather(column, out)
    return out


def write_benchmark(mib: int, repeats: int, where: str | None) -> dict[str, Any]:
    """Medians of seconds, and of ratios to the raw write."""
    rows = (mib << 20) // 16
    random = np.random.default_rng(COMM.rank)
    columns = {"id": random.integers(0, 1 << 60, rows), "x": random.random(rows)}
    place, group = shared_place(where), group_for(COMM)
    attempt = Attempt.open(group, os.path.join(place, "saved"))
    tables = {"rows": Saved(ir.Batch(**columns))}

    def ours(per_rank: bool) -> None:
        number[0] += 1
        made = begin(group, attempt, number[0], tables, {}, per_rank=per_rank)
        made.start()
        made.wait()
        assert made.state == "written", made.error
        made.gather(blocking=True)

    number = [0]
    ways: dict[str, Callable[[], None]] = {
        "raw": lambda: raw(columns, f"{place}/raw-{COMM.rank}", 0),
        "raw, one file": lambda: raw_one_file(columns, f"{place}/one"),
        "ours": lambda: ours(False),
        "ours, a file per rank": lambda: ours(True),
        "naive": lambda: gathered(columns, f"{place}/naive.h5"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name in ways if repeat % 2 else reversed(ways):
            took = timed(ways[name])
            if repeat:
                seconds[name].append(took)
            clear(place, 3 * mib << 20)
    if COMM.rank == 0:
        shutil.rmtree(place)
    return {
        "ranks": COMM.size,
        "mib_of_each_rank": mib,
        **{
            name: {
                "seconds": round(statistics.median(found), 3),
                "to_raw": round(
                    statistics.median(a / b for a, b in zip(found, seconds["raw"], strict=True)), 2
                ),
            }
            for name, found in seconds.items()
        },
    }


def clear(place: str, nbytes: int) -> None:
    """Nothing of one write is left to slow down the next: files are new each time, and the disk is idle.

    So many free bytes are touched, too: what a virtual machine has given back to its host comes slowly, and
    whoever writes next would pay for it.
    """
    COMM.Barrier()
    if COMM.rank == 0:
        for name in os.listdir(place):
            if name != "saved":
                os.unlink(f"{place}/{name}")
        for found in Path(place, "saved").glob("attempt-*/0*"):
            shutil.rmtree(found)
        os.sync()
    np.ones(nbytes, np.uint8)
    COMM.Barrier()


# ---------------------------------------------------------------- a run beside it


def rmat(scale: int, edges: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random graph of a few vertices with many links (Chakrabarti, Zhan, Faloutsos 2004)."""
    random = np.random.default_rng(seed)
    src, dst = np.zeros(edges, np.int64), np.zeros(edges, np.int64)
    for _ in range(scale):
        quarter = random.random(edges)
        src, dst = (
            2 * src + (quarter > 0.76),
            2 * dst + (((quarter > 0.57) & (quarter <= 0.76)) | (quarter > 0.95)),
        )
    return src, dst


def run_benchmark(
    scale: int, degree: int, inner: int, iterations: int, repeats: int, where: str | None
) -> dict[str, Any]:
    """Seconds of iterations with and without checkpoints, and of the copies."""
    src, dst = rmat(scale, (degree << scale) // COMM.size, COMM.rank)
    iterated: dict[bool, list[float]] = {False: [], True: []}
    copies: list[tuple[float, float, float]] = []
    written, nbytes = 0, 0
    for repeat in range(repeats + 1):
        for saving in (False, True) if repeat % 2 else (True, False):
            watch = Watch()
            found, place = one_run(src, dst, inner, iterations, saving, watch, where)
            if COMM.rank == 0:
                shutil.rmtree(place)
                os.sync()
            if repeat:
                iterated[saving] += watch.iterations[2:]
                copies += watch.copies
                written += found.checkpoints.get("written", 0)
                nbytes = watch.nbytes or nbytes
    plain, beside = statistics.median(iterated[False]), statistics.median(iterated[True])
    return {
        "ranks": COMM.size,
        "scale": scale,
        "state_mib_of_rank_0": round(nbytes / (1 << 20), 1),
        "checkpoints_of_iterations": round(written / (repeats * iterations), 2),
        "iteration_seconds": round(plain, 4),
        "beside_checkpoints": round(beside, 4),
        "slowdown": round(beside / plain, 3),
        "copy_seconds": round(statistics.median(copy for copy, _, _ in copies), 4),
        "blocked_seconds": round(statistics.median(blocked for _, blocked, _ in copies), 4),
        "memcpy_seconds": round(statistics.median(memcpy for _, _, memcpy in copies), 4),
        "copy_to_memcpy": round(statistics.median(copy / memcpy for copy, _, memcpy in copies), 2),
        "blocked_to_memcpy": round(statistics.median(blocked / memcpy for _, blocked, memcpy in copies), 2),
    }


class Watch:
    """Seconds of iterations, from commit to commit, and of copies, with a memcpy beside each."""

    def __init__(self) -> None:
        self.iterations: list[float] = []
        self.copies: list[tuple[float, float, float]] = []
        self.nbytes = 0
        self._last = self._committed = 0.0
        self._areas: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, event: Event) -> None:
        """Count one event."""
        if event.name == "iteration.commit":
            self.iterations.append(event.seconds - self._last)
            self._last = self._committed = event.seconds
        elif event.name == "checkpoint.copy":
            began = time.perf_counter()
            blocked = event.seconds - self._committed
            self._copied(event.fields["bytes"], event.fields["seconds"], blocked)
            self._last += time.perf_counter() - began  # this is our own doing

    def _copied(self, nbytes: int, seconds: float, blocked: float) -> None:
        self.nbytes = nbytes
        if self._areas is None:
            self._areas = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
            return  # the first copy makes its buffers
        began = time.perf_counter()
        np.copyto(*self._areas)
        self.copies.append((seconds, blocked, time.perf_counter() - began))


def one_run(
    src: np.ndarray,
    dst: np.ndarray,
    inner: int,
    iterations: int,
    saving: bool,
    watch: Watch,
    where: str | None,
) -> tuple[Any, str]:
    """One whole run and its directory."""
    place = shared_place(where)
    events = Events()
    events.subscribe(watch, may_raise=True)
    edges = ir.Dataset.from_local(COMM, copy=False, src=src, dst=dst)
    loop = pagerank(edges).to_loop()
    options = Options(checkpoint_dir=f"{place}/saved", checkpoint_every=1) if saving else Options()
    steps = tuple(replace(step, name=f"{step.name} {n}") for n in range(inner) for step in loop.body)
    loop = replace(loop, body=steps, until=ir.Until.of([], iterations))  # it never ends before
    return run_loop(loop, group_for(COMM), options, events), place


def main() -> None:
    """Rank 0 prints JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=["write", "run"])
    parser.add_argument("--mib", type=int, default=256, help="of each rank, for `write`")
    parser.add_argument("--scale", type=int, default=20, help="the graph has 2^scale pages, for `run`")
    parser.add_argument("--degree", type=int, default=16, help="links of a page")
    parser.add_argument("--inner", type=int, default=1, help="steps along links in an iteration")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", help="where files are made")
    given = parser.parse_args()
    if given.what == "write":
        told = write_benchmark(given.mib, given.repeats, given.dir)
    else:
        told = run_benchmark(
            given.scale, given.degree, given.inner, given.iterations, given.repeats, given.dir
        )
    if COMM.rank == 0:
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
