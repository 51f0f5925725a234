"""Lazy apps beside their programs at the waist, in one run, taking turns.

    python benchmarks/lazy.py [--scale 16] [--repeats 5] [--iterations 8] [--only APP]

step       median seconds of an iteration, lazy / waist
first      seconds from the call to the end of the first iteration (planning, loading, indexing), lazy / waist
planning   of PageRank, and of a pipeline of 200 operations
naive      PageRank with every cache off / with them, and / a loop with mpi4py that has no caches either (it
           joins and groups all rows again by NumPy's sorts, and sends them by Alltoallv), and the bytes
per edge   hubs, Katz centrality and smallest labels, written lazily, by edge, against PageRank's

Under ``mpirun -n 2`` the same on two ranks. One thread per rank. Edges are R-MAT (edge factor 16).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from iterreduce.start import prepare_environment  # noqa: E402

prepare_environment()

import numpy as np  # noqa: E402
from links_kernel import edges_of  # noqa: E402

import iterreduce as ir  # noqa: E402
from iterreduce import col  # noqa: E402
from iterreduce.appfile import load_app  # noqa: E402
from iterreduce.collectives import group_for  # noqa: E402

NEVER = 0.0


def function(folder: str, name: str) -> Any:
    """An app's function."""
    return load_app(str(ROOT / folder / f"{name}.py")).function


def mine(group: Any, scale: int) -> dict[str, Any]:
    """This rank's share of the edges."""
    src, dst = edges_of("rmat", scale, 16 << scale)
    at = np.linspace(0, len(src), group.size + 1).astype(np.int64)
    here = slice(at[group.rank], at[group.rank + 1])
    weight = np.random.default_rng(3).integers(1, 256, len(src))[here]
    return {"src": src[here].astype(np.int64), "dst": dst[here].astype(np.int64), "weight": weight}


def pairs(iterations: int, source: str) -> dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """Lazy app, program at the waist, arguments, options."""
    steps = {"tolerance": NEVER, "max_iterations": iterations}
    return {
        "pagerank": ("pagerank", "pagerank", (), steps),
        "components": ("connected_components", "components", (), {}),
        "sssp": ("shortest_paths", "sssp", (source,), {}),
        "bfs": ("breadth_first", "bfs", (source,), {}),
        "als": ("als", "als", (), {"rank": 8, "iterations": iterations}),
        "triangles": ("triangles", "triangles", (), {}),
    }


class Timed:
    """Seconds of a run: to the end of the first iteration, and the median of the later ones."""

    def __init__(self, group: Any, work: Callable[[], Any], **options: Any):
        group.barrier()
        start, user = time.perf_counter(), time.process_time()
        result = work().run(group, threads=1, **options)
        self.total, self.user = time.perf_counter() - start, time.process_time() - user
        steps = result.seconds_per_iteration
        self.step = statistics.median(steps[2:] or steps)
        self.first = self.total - sum(steps[1:])
        self.bytes = result.bytes_exchanged["per_iteration"][-1]


def turns(group: Any, repeats: int, works: dict[str, Callable[[], Timed]]) -> dict[str, list[Timed]]:
    """All take turns; the first turn, which compiles, does not count."""
    out: dict[str, list[Timed]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            done = work()
            if turn:
                out[name].append(done)
    return out


def median(runs: list[Timed], what: str) -> float:
    """Of one figure."""
    return statistics.median(getattr(run, what) for run in runs)


def apps(group: Any, args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Each app beside its program."""
    for name, (ours, theirs, given, options) in pairs(args.iterations, str(int(data["src"][0]))).items():
        if args.only and name != args.only:
            continue

        def work(folder: str, app: str, options: dict[str, Any], given: Any = given) -> Callable[[], Timed]:
            made = function(folder, app)
            return lambda: Timed(group, lambda: made(ir.Dataset.from_local(None, **data), *given, **options))

        settles = {"settle": True} if theirs in ("components", "sssp", "bfs") else {}
        both = {
            "lazy": work("apps", ours, options),
            "waist": work("benchmarks/waist", theirs, {**options, **settles}),
        }
        runs = turns(group, args.repeats, both)
        a, b = runs["lazy"], runs["waist"]
        whole = "total" if name == "triangles" else "step"
        say(group, f"{name}: {whole} {median(a, whole) * 1e3:.2f} ms, "
                   f"lazy / waist {median(a, whole) / median(b, whole):.3f}; "
                   f"to the first iteration {median(a, 'first') / median(b, 'first'):.3f}; "
                   f"user time of the run {median(a, 'user') / median(b, 'user'):.3f}; "
                   f"bytes {median(a, 'bytes'):.0f} / {median(b, 'bytes'):.0f}")  # fmt: skip


def by_edge(group: Any, args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Programs that no kernel was written for."""

    def state(**columns: Any) -> tuple[Any, Any]:
        edges = ir.Dataset.from_local(None, **data).as_edges()
        return edges, edges.vertices().select("vertex", **columns)

    def hits() -> Any:
        edges, start = state(hub=1.0)

        def step(pages: Any) -> Any:
            told = edges.join(pages, src="vertex").group_by(vertex="dst").agg(authority=ir.sum("hub"))
            known = start.select("vertex").left_join(told, "vertex")
            known = known.select("vertex", authority=col("authority").fill_null(0))
            hubs = edges.join(known, dst="vertex").group_by(vertex="src").agg(hub=ir.sum("authority"))
            made = start.select("vertex").left_join(hubs, "vertex")
            return made.select("vertex", hub=col("hub").fill_null(0) / hubs.sum("hub"))

        return ir.iterate(step, start, max_iterations=args.iterations)

    def katz() -> Any:
        edges, start = state(score=1.0)

        def step(pages: Any) -> Any:
            along = edges.join(pages, src="vertex").group_by(vertex="dst")
            heard = along.agg(heard=ir.sum(col("score") * col("weight")))
            made = start.select("vertex").left_join(heard, "vertex")
            return made.select("vertex", score=1 + 1e-6 * col("heard").fill_null(0))

        return ir.iterate(step, start, max_iterations=args.iterations)

    def label() -> Any:
        edges, start = state(label=col("vertex"))

        def step(pages: Any) -> Any:
            heard = edges.join(pages, src="vertex").group_by(vertex="dst").agg(heard=ir.min("label"))
            made = pages.left_join(heard, "vertex")
            return made.select("vertex", label=ir.minimum(col("label"), col("heard").fill_null(ir.INT64_MAX)))

        return ir.iterate(step, start, max_iterations=args.iterations)

    def rank() -> Any:
        edges = ir.Dataset.from_local(None, src=data["src"], dst=data["dst"])
        return function("apps", "pagerank")(edges, tolerance=NEVER, max_iterations=args.iterations)

    works = {"pagerank": (rank, 1), "hits": (hits, 2), "katz": (katz, 1), "smallest label": (label, 1)}
    runs = turns(group, args.repeats, {n: lambda w=w: Timed(group, w) for n, (w, _) in works.items()})
    base = median(runs["pagerank"], "step")
    for name, (_, passes) in works.items():
        say(group, f"{name}: by edge {median(runs[name], 'step') / passes / base:.2f} of PageRank")


def naive(group: Any, args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Caches off, and a loop that has none."""
    links = {name: data[name] for name in ("src", "dst")}

    def rank() -> Any:
        edges = ir.Dataset.from_local(None, **links)
        return function("apps", "pagerank")(edges, tolerance=NEVER, max_iterations=4)

    by_hand: list[float] = []
    cached, off = [], []
    for turn in range(args.repeats + 1):
        a, b = Timed(group, rank), Timed(group, rank, naive=True)
        seconds = without_caches(group, links["src"], links["dst"], 4)
        if turn:
            cached.append(a)
            off.append(b)
            by_hand.append(seconds)
    say(group, f"naive / cached {median(off, 'step') / median(cached, 'step'):.1f}; naive / a loop by hand "
               f"{median(off, 'step') / statistics.median(by_hand):.2f}; bytes {median(off, 'bytes'):.0f} / "
               f"{median(cached, 'bytes'):.0f}")  # fmt: skip


def without_caches(group: Any, src: Any, dst: Any, iterations: int) -> float:
    """PageRank without caches: rows go to the owners of their keys in every iteration. Seconds of one."""
    pages = np.unique(exchanged(group, [np.unique(np.concatenate([src, dst]))], np.unique(
        np.concatenate([src, dst])) % group.size)[0])  # fmt: skip
    n = int(added(group, len(pages)))
    rank, seconds = np.full(len(pages), 1 / n), []
    for _ in range(iterations):
        start = time.perf_counter()
        s, d = exchanged(group, [src, dst], src % group.size)
        names, at, degree = np.unique(s, return_inverse=True, return_counts=True)
        y = (rank[np.searchsorted(pages, names)] / degree)[at]
        targets, where = np.unique(d, return_inverse=True)
        sums = np.bincount(where, weights=y, minlength=len(targets))
        t, v = exchanged(group, [targets, sums.view(np.int64)], targets % group.size)
        heard = np.bincount(np.searchsorted(pages, t), weights=v.view(np.float64), minlength=len(pages))
        lost = 1 - added(group, heard.sum())
        new = (0.15 + 0.85 * lost) / n + 0.85 * heard
        added(group, np.abs(new - rank).sum())
        rank = new
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def added(group: Any, value: float) -> float:
    """The sum of all ranks' numbers."""
    told = group.allgather_bytes(np.float64(value).tobytes())
    return float(sum(np.frombuffer(raw)[0] for raw in told))


def exchanged(group: Any, columns: list[Any], owner: Any) -> list[Any]:
    """Rows of int64 columns at their owners."""
    if group.size == 1:
        return columns
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    order, send = np.argsort(owner, kind="stable"), np.bincount(owner, minlength=group.size)
    receive = np.empty_like(send)
    comm.Alltoall(send, receive)
    out = []
    for column in columns:
        into = np.empty(receive.sum(), np.int64)
        comm.Alltoallv((np.ascontiguousarray(column[order]), send), (into, receive))
        out.append(into)
    return out


def planning(group: Any) -> None:
    """Seconds to trace, rewrite and lower; no rows are looked at."""
    edges = ir.Dataset.from_local(None, src=np.arange(4), dst=np.arange(4))
    app = function("apps", "pagerank")

    def long() -> Any:
        rows = ir.Dataset.from_local(None, k=np.arange(4), x=np.arange(4.0))
        for i in range(50):
            rows = rows.with_columns(x=col("x") + i).filter(col("x") > -i).select("k", "x")
            rows = rows.group_by("k").agg(x=ir.sum("x"))
        return rows

    for name, work in (("PageRank", lambda: app(edges)), ("200 operations", long)):
        taken, user = [], []
        for _ in range(7):
            start, used = time.perf_counter(), time.process_time()
            work().to_loop()
            taken.append(time.perf_counter() - start)
            user.append(time.process_time() - used)
        say(group, f"planning of {name}: {statistics.median(taken) * 1e3:.1f} ms, user time "
                   f"{statistics.median(user) * 1e3:.1f} ms")  # fmt: skip


def say(group: Any, text: str) -> None:
    """A line, once."""
    if group.rank == 0:
        print(text, flush=True)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    group = group_for(world())
    data = mine(group, args.scale)
    if not args.only or args.only == "planning":
        planning(group)
    apps(group, args, data)
    if not args.only or args.only == "naive":
        naive(group, args, data)
    if not args.only or args.only == "edges":
        by_edge(group, args, data)


def world() -> Any:
    """The communicator of a launcher, if there is one."""
    import os

    if not any(name in os.environ for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK")):
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD


if __name__ == "__main__":
    main()
