"""Programs of every kind that are interrupted and taken up again: what they need, and how to run them.

Each is a function of a group that gives a loop and, with ``stop_after``, is stopped behind so many commits
(of any of its levels). `interrupted` runs one to its end in pieces, each on its own number of ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.collectives import Group
from iterreduce.events import Event, Events
from iterreduce.options import Options
from iterreduce.run import Result, run_loop
from iterreduce.stopping import StopRequest
from iterreduce.testing import run_ranks
from tests.engine.kit import share
from tests.launch import ROOT

Program = Callable[[Group], ir.Loop]


def app(path: str, *args: Any, **options: Any) -> Program:
    function = load_app(str(ROOT / path)).function

    def program(group: Group) -> ir.Loop:
        def given(value: Any) -> Any:
            return dealt(value, group) if isinstance(value, ir.Batch) else value

        work = function(*map(given, args), **{name: given(value) for name, value in options.items()})
        return work if isinstance(work, ir.Loop) else work.to_loop()

    return program


def dealt(rows: ir.Batch, group: Group) -> ir.Dataset:
    """The rows as a caller's arrays, a share on each rank."""
    mine = share(rows, group)
    return ir.Dataset.from_local(None, **{name: mine[name] for name in mine.names})


def graph(n: int = 60, edges: int = 200, seed: int = 0, weighted: bool = False) -> ir.Batch:
    """Random edges of vertices with wide ids, self loops and repeated edges among them."""
    rng = np.random.default_rng(seed)
    src, dst = rng.integers(0, n, (2, edges)) * 7 - 100
    weight = {"weight": rng.integers(1, 256, edges)} if weighted else {}
    return ir.Batch(src=src, dst=dst, **weight)


def points(n: int = 500, d: int = 3, seed: int = 0) -> ir.Batch:
    """Points of magnitudes that are far apart."""
    rng = np.random.default_rng(seed)
    return ir.Batch(x=rng.normal(size=(n, d)) * 10.0 ** rng.integers(-6, 6, (n, 1)))


def path(n: int) -> ir.Batch:
    """0 -> 1 -> ... -> n - 1."""
    return ir.Batch(src=np.arange(n - 1), dst=np.arange(1, n))


def ratings(users: int = 20, items: int = 12, seed: int = 0) -> ir.Batch:
    """Who rated what."""
    rng = np.random.default_rng(seed)
    pairs = np.unique(rng.integers(0, (users, items), (120, 2)), axis=0)
    return ir.Batch(src=pairs[:, 0], dst=pairs[:, 1], weight=rng.uniform(1, 5, len(pairs)))


def grows(_: Group) -> ir.Loop:
    """Rows are inserted and removed, sunk, and counted in a carry; text keys."""

    def more(n: ir.Batch) -> ir.Batch:
        at = int(n["value"][0])
        return ir.Batch(name=ir.Ragged.from_list([f"node {at + i}" for i in range(3)]), x=np.arange(3.0) + at)

    def old(state: ir.Batch, n: ir.Batch) -> ir.Batch:
        return state.select("name").take(np.flatnonzero(state["x"] < n["value"][0] - 3))

    one = ir.Batch(one=np.ones(1, np.int64))
    stages = (
        ir.Local(more, ("n",), "made", cut="share"),
        ir.Shuffle("made", ("name",), "fresh", combine=ir.SUM),
        ir.Local(lambda fresh, state: _not_in(fresh, state), ("fresh", "state"), "new", cut="share"),
        ir.Local(old, ("state", "n"), "gone", cut="share"),
    )
    writes = (
        ir.Remove("state", "gone"),
        ir.Insert("state", "new"),
        ir.Sink("log", "new"),
        ir.Accumulate("n", "one"),
    )
    step = ir.Superstep("grow", stages, writes)
    return ir.Loop(
        "grows",
        {"one": one, "first": ir.Batch(name=ir.Ragged.from_list(["root"]), x=np.zeros(1))},
        {"state": ir.State("first", ("name",))},
        (step,),
        ir.Until.of([], 8),
        "state",
        carry={"n": ir.Carry(ir.SUM, dtype="int64", keep=True)},
    )


def _not_in(fresh: ir.Batch, state: ir.Batch) -> ir.Batch:
    known = set(state["name"].to_list()) if len(state) else set()
    rows = [i for i, name in enumerate(fresh["name"].to_list() if len(fresh) else []) if name not in known]
    return fresh.take(np.array(rows, np.int64))


PROGRAMS: dict[str, Program] = {
    "kmeans": app("apps/kmeans.py", points(), k=4, max_iterations=7, tolerance=0.0),
    "kmeans_plus_plus": app(
        "apps/kmeans.py", points(), k=4, start="k-means++", max_iterations=5, tolerance=0.0
    ),
    "pagerank": app("benchmarks/waist/pagerank.py", graph(), max_iterations=8, tolerance=0.0),
    "components": app("benchmarks/waist/components.py", graph(200, 150, 3)),
    "sssp": app("benchmarks/waist/sssp.py", graph(60, 150, 4, weighted=True), "-100"),
    "bfs": app("benchmarks/waist/bfs.py", graph(60, 90, 4), "-100"),
    "hits": app("benchmarks/waist/hits.py", graph(), max_iterations=6, tolerance=0.0),
    "closure": app("benchmarks/waist/closure.py", path(7)),
    "descendants": app("benchmarks/waist/descendants.py", path(9), ir.Batch(node=np.array([0]))),
    "als": app("benchmarks/waist/als.py", ratings(), rank=3, iterations=4),
    "nested": app("benchmarks/waist/nested.py", points(60, 2), most=4),
    "grows": grows,
}


def patience(event: Event) -> None:
    """A watcher, of places: no rank says how far its write has got while it is under way. So a checkpoint is
    copied in one iteration, published in the next and known to be in the one after it.
    """
    if event.name == "control.ready":
        for thread in threading.enumerate():
            if thread.name.startswith(("checkpoint ", "publish ")) and thread.is_alive():
                thread.join(60)


def run_once(
    program: Program,
    ranks: int,
    directory: Any = None,
    stop_after: int | None = None,
    patient: bool = False,
    **options: Any,
) -> list[Result]:
    """One piece of a run, on so many ranks. ``stop_after``: then the last rank wishes to stop; ``patient``:
    see `patience`.
    """

    def job(group: Group) -> Result:
        stop, events, commits = StopRequest(), Events(), [0]

        def watch(event: Event) -> None:
            if event.name == "iteration.commit":
                commits[0] += 1
                if commits[0] == stop_after and group.rank == group.size - 1:
                    stop.request("the test")

        events.subscribe(watch)
        if patient:
            events.subscribe(patience, places=True)
        given = Options(checkpoint_dir=None if directory is None else str(directory), **options)
        return run_loop(program(group), group, given, events, stop)

    return run_ranks(ranks, job, timeout=240)


def interrupted(
    program: Program, directory: Any, pieces: Sequence[tuple[int, int | None]], **options: Any
) -> Result:
    """Run in pieces of (ranks, commits); the last piece runs to the end. The result of rank 0."""
    results = []
    for ranks, commits in pieces:
        results = run_once(program, ranks, directory, commits, **options)
        if results[0].outcome is not ir.Outcome.STOPPED_SAVED:
            break
    return results[0]
