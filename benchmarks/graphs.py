"""Programs on graphs by the real engine, against SciPy, python-graphblas, networkit and GAPBS, in one run.

    python benchmarks/graphs.py [--quick] [--scale 20] [--only WORK] [--repeats 5] [--folder DIR]

pagerank, uniform   an iteration, on an R-MAT graph (edge factor 16, a = .57, b = c = .19, permuted labels;
                    Chakrabarti, Zhan and Faloutsos, SDM 2004) and on a uniform random graph of that size
build               from the edge file (.npy, E x 2) to the end of the first iteration
components, sssp,   after loading; weights are integers of 1 to 255
bfs
tree                shortest paths on a binary tree: messages, and time of supersteps by frontier
programs            an iteration of programs that no kernel was written for, by edge, against PageRank's

The engine runs on 1 rank, on 1 rank with 2 threads, and on 2 ranks of this environment's MPI; rivals on
2 threads or, where it says (1), on one. All take turns, between turns the engine's ranks sleep, and figures
are medians. Answers are compared: an engine's with SciPy's, and rivals' with each other. GAPBS joins where
$GAPBS_DIR has a ``pr_spmv`` with double scores. Vertices without edges are left out of the graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import graph_rivals as rivals
import numpy as np
from graph_rivals import FAR, Contestant, Edges
from links_kernel import edges_of
from ranks import _ENVIRONMENT, ROOT, Clock, Ranks, serve

SETTINGS = ((1, 1), (1, 2), (2, 1))  # ranks, threads
PER_TURN = 3  # iterations
NEVER = 1_000_000
EDGE_FACTOR = 16
SHOWN = 1000  # rows of an answer that are compared
WAIST = ROOT / "benchmarks" / "waist"


# ---------------------------------------------------------------------- graphs


def graph(kind: str, scale: int) -> Edges:
    """The edges, of vertices 0 to n - 1 that all have one."""
    ends = np.stack(edges_of(kind, scale, EDGE_FACTOR << scale))
    here = np.zeros(1 << scale, bool)
    here[ends] = True
    ends = (np.cumsum(here) - 1)[ends]
    weight = np.random.default_rng(3).integers(1, 256, ends.shape[1])
    return Edges(int(here.sum()), ends[0], ends[1], weight)


def tree(scale: int) -> np.ndarray:
    """Edges from parents to children of a binary tree of 2^scale vertices."""
    child = np.arange(1, 1 << scale)
    return np.stack([(child - 1) // 2, child], axis=1)


def write(folder: Path, edges: Edges) -> None:
    """``edges.npy`` and ``weighted.npy``."""
    np.save(folder / "edges.npy", np.stack(edges[1:3], axis=1))
    if edges.weight is not None:
        np.save(folder / "weighted.npy", np.stack(edges[1:], axis=1))


# ---------------------------------------------------------------------- the engine, iteration by iteration


def pagerank(folder: Path) -> Any:
    """The program of `benchmarks/waist/pagerank.py`."""
    return waist("pagerank", folder / "edges.npy", tolerance=0.0, max_iterations=NEVER)


def waist(name: str, file: Path, *words: str, **options: Any) -> Any:
    """What a program of `benchmarks/waist` gives for a file."""
    import iterreduce as ir
    from iterreduce.appfile import load_app

    return load_app(str(WAIST / f"{name}.py")).function(ir.read(str(file)), *words, **options)


def looped(folder: Path, columns: Mapping[str, Any], stages: tuple[Any, ...]) -> Any:
    """A loop over the weighted edges: the state ``vertices`` begins with these columns, one function of the
    vertices each, and stages make ``new`` of it."""
    import iterreduce as ir

    inputs = ir.Inputs()
    rows = inputs.rows("edges", ir.read(str(folder / "weighted.npy")).as_edges())

    def first(keys: Any) -> Any:
        return keys.with_columns(**{name: make(keys["vertex"]) for name, make in columns.items()})

    prepare = (
        *inputs.prepare,
        ir.Index(rows, {"src": "keys", "dst": "keys"}, "links", {"keys": "vertex"}),
        ir.Local(first, ("keys",), "first", cut="share"),
    )
    step = ir.Superstep("step", stages, (ir.Replace("vertices", "new"),))
    state = {"vertices": ir.State("first", ("vertex",))}
    until = ir.Until((ir.MaxIterations(NEVER),))
    loop = ir.Loop("program", inputs.sources, state, (step,), until, "vertices", prepare=prepare)
    return ir.Dataset.of_loop(loop)


def heard(into: str, along: str, **combine: Any) -> Any:
    """What vertices hear along links: by ``dst`` or against them, by ``src``."""
    import iterreduce as ir

    joined = ir.Joined("vertices", "src" if along == "dst" else "dst")
    return ir.Shuffle("links", (along,), into, combine, "vertices", joined=joined)


def hits(folder: Path) -> Any:
    """Hubs and authorities (Kleinberg, 1999): two sums an iteration, one of them against the links."""
    import iterreduce as ir

    def new(vertices: Any, authority: Any, hub: Any, sizes: Any) -> Any:
        return vertices.with_columns(
            authority=authority["authority"] / sizes["hubs"][0], hub=hub["hub"] / sizes["authorities"][0]
        )

    totals = {"hubs": ir.sum("hub"), "authorities": ir.sum("authority")}
    ones = {name: lambda vertex: np.full(len(vertex), 1.0) for name in ("hub", "authority")}
    return looped(
        folder,
        ones,
        (
            heard("authority", "dst", authority=ir.sum("hub")),
            heard("hub", "src", hub=ir.sum("authority")),
            ir.Total("vertices", (), totals, "sizes"),
            ir.Local(new, ("vertices", "authority", "hub", "sizes"), "new", cut="share"),
        ),
    )


def katz(folder: Path) -> Any:
    """Weighted Katz centrality: value = 1 + alpha * sum of value * weight."""
    import iterreduce as ir

    def new(vertices: Any, sums: Any) -> Any:
        return vertices.with_columns(value=1 + 1e-9 * sums["sum"])

    sums = heard("sums", "dst", sum=ir.sum(ir.col("value") * ir.col("weight")))
    local = ir.Local(new, ("vertices", "sums"), "new", cut="share")
    return looped(folder, {"value": lambda vertex: np.ones(len(vertex))}, (sums, local))


def capped_label(folder: Path) -> Any:
    """The smallest label along edges that weigh less than what their source lets through."""
    import iterreduce as ir

    def new(vertices: Any, told: Any) -> Any:
        return vertices.with_columns(label=np.minimum(vertices["label"], told["label"]))

    passes = ir.where(ir.col("weight") < ir.col("cap"), ir.col("label"), 1e300)
    local = ir.Local(new, ("vertices", "told"), "new", cut="share")
    columns = {"label": lambda vertex: vertex * 1.0, "cap": lambda vertex: vertex % 255}
    return looped(folder, columns, (heard("told", "dst", label=ir.min(passes)), local))


PROGRAMS = {"pagerank": pagerank, "HITS": hits, "Katz": katz, "capped label": capped_label}
SUMS = {"HITS": 2}  # of a value per edge, in an iteration


def be_a_rank(folder: Path, name: str, data: Path, threads: int) -> None:
    """One rank of a program; what rank 0 has of the state is the answer."""

    def answer(run: Any) -> dict[str, Any]:
        batch = run.tables[next(iter(run.loop.state))].batch
        return {n: batch[n][:SHOWN].tolist() for n in batch.names} | {"iterations": run.iteration}

    serve(folder, lambda: PROGRAMS[name](data), Clock(), answer, threads)


def groups_of(stack: ExitStack, name: str, data: Path) -> dict[str, Ranks]:
    """Ranks that wait for turns, by setting."""
    found = {}
    for ranks, threads in SETTINGS:
        own = data / f"{name}, {threads} threads"
        own.mkdir(exist_ok=True)
        words = ("--one", name, "--data", str(data), "--threads", str(threads))
        group = found[setting(ranks, threads)] = Ranks(__file__, ranks, own, *words)
        stack.callback(group.end)
    return found


def setting(ranks: int, threads: int) -> str:
    """In words."""
    return f"iterreduce, {ranks} rank{'s' * (ranks > 1)} x {threads} thread{'s' * (threads > 1)}"


# ---------------------------------------------------------------------- the engine, run by run


def command(app: str, file: Path, *words: str) -> dict[str, Contestant]:
    """The program through ``python -m iterreduce``: its whole run, of which the caller takes what he wants;
    the answer is its summary, with its result as ``rows`` after the first run."""

    def contestant(ranks: int, threads: int) -> Contestant:
        first = [True]

        def run() -> tuple[float, Any]:
            with tempfile.TemporaryDirectory() as folder:
                out, summary = Path(folder, "out.npz"), Path(folder, "run.json")
                mpirun = [os.path.join(sysconfig.get_path("scripts"), "mpirun"), "-n", str(ranks)]
                line = [sys.executable, "-m", "iterreduce", str(WAIST / f"{app}.py"), str(file), *words]
                line += ["--threads", str(threads), "--quiet", "--summary", str(summary)]
                line += ["--out", str(out)] * first[0]
                environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
                subprocess.run((mpirun if ranks > 1 else []) + line, check=True, env=environment)
                found = json.loads(summary.read_text())
                if first[0]:
                    found["rows"] = dict(np.load(out))
                first[0] = False
                return found["seconds"]["iterate"], found

        return run

    return {setting(*s): contestant(*s) for s in SETTINGS}


# ---------------------------------------------------------------------- turns and tables


def turns(contestants: Mapping[str, Contestant], repeats: int) -> tuple[dict[str, list[float]], dict]:
    """Seconds of every turn but the first, and answers of the first."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers = {name: contestant()[1] for name, contestant in contestants.items()}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            seconds[name].append(contestant()[0])
    return seconds, answers


def show(title: str, seconds: Mapping[str, list[float]]) -> None:
    """A line for each, with how many times as long as each setting of the engine it took."""
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    mine = [s for name, s in middle.items() if name.startswith("iterreduce")]
    print(f"\n{title:44}{'ms':>10}{'least':>10}   x of {' / '.join(f'{r}x{t}' for r, t in SETTINGS)}")
    for name, value in middle.items():
        ratios = " / ".join(f"{value / own:.2f}" for own in mine)
        print(f"  {name:42}{value * 1e3:10.2f}{min(seconds[name]) * 1e3:10.2f}   {ratios}", flush=True)


def iterating(group: Ranks) -> Contestant:
    """Turns of waiting ranks, as a contestant."""

    def run() -> tuple[float, Any]:
        said = group.turn(PER_TURN)
        return statistics.median(said["seconds"]), said.get("results")

    return run


# ---------------------------------------------------------------------- works


def compare_pagerank(kind: str, options: Any, data: Path) -> None:
    edges = graph(kind, options.scale)
    write(data, edges)
    with ExitStack() as stack:
        groups = groups_of(stack, "pagerank", data)
        rounds = 1 + PER_TURN
        contestants = {name: iterating(group) for name, group in groups.items()}
        contestants |= rivals.scipy_pagerank(edges, rounds) | rivals.graphblas_pagerank(edges, rounds)
        contestants |= rivals.networkit_pagerank(edges, rounds) | gapbs(edges, data)
        seconds, answers = turns(contestants, options.repeats)
    right = answers["SciPy, whole iteration (1)"]
    for name, found in answers.items():
        if isinstance(found, dict):
            assert found["iterations"] == rounds, name
            np.testing.assert_allclose(found["rank"], right[found["page"]], rtol=1e-9, err_msg=name)
        elif found is not None and "distinct" not in name:
            np.testing.assert_allclose(found, right, rtol=1e-6, err_msg=name)
    peak = {name: max(group.ready["rss"]) >> 20 for name, group in groups.items()}
    show(f"PageRank iteration, {kind}, {len(edges.src):,} edges", seconds)
    print(f"  peak MiB of a rank: {peak}")


def gapbs(edges: Edges, data: Path) -> dict[str, Contestant]:
    if not os.environ.get("GAPBS_DIR"):
        return {}
    file = data / "edges.el"
    np.savetxt(file, np.stack(edges[1:3], axis=1), fmt="%d")
    return rivals.gapbs_pagerank(file, 1 + PER_TURN)


def compare_build(options: Any, data: Path) -> None:
    edges = graph("rmat", options.scale)
    write(data, edges)
    file, n = data / "edges.npy", edges.n
    del edges

    def whole(contestant: Contestant) -> Contestant:
        def run() -> tuple[float, Any]:
            _, said = contestant()
            return sum(said["seconds"][part] for part in ("load", "invariants", "iterate")), said

        return run

    words = ("--tolerance", "0", "--max-iterations", "1")
    contestants = {name: whole(c) for name, c in command("pagerank", file, *words).items()}
    show("edge file to first iteration", turns(contestants | rivals.scipy_build(file, n), options.repeats)[0])


def compare_components(options: Any, data: Path) -> None:
    edges = graph("rmat", options.scale)
    write(data, edges)
    contestants = command("components", data / "edges.npy", "--settle") | rivals.graphblas_components(edges)
    contestants |= rivals.networkit_components(edges) | rivals.scipy_components(edges)
    seconds, answers = turns(contestants, options.repeats)
    compare_answers({n: smallest(answer, "component") for n, answer in answers.items()})
    show("connected components", seconds)


def smallest(answer: Any, column: str) -> np.ndarray:
    """Each vertex's component as its smallest vertex."""
    labels = by_vertex(answer, column) if isinstance(answer, dict) else np.asarray(answer)
    _, first, at = np.unique(labels, return_index=True, return_inverse=True)
    return first[at]


def by_vertex(answer: Any, column: str, n: int | None = None) -> np.ndarray:
    """A column of a run's result, by vertex; the largest number where there is none."""
    rows = answer["rows"]
    out = np.full(n if n is not None else len(rows["vertex"]), FAR)
    out[rows["vertex"]] = rows[column]
    return out


def compare_paths(work: str, options: Any, data: Path) -> None:
    edges = graph("rmat", options.scale)
    write(data, edges)
    source = int(edges.src[0])
    if work == "sssp":
        contestants = command("sssp", data / "weighted.npy", str(source), "--settle")
        makers: list[Callable[[Edges, int], dict[str, Contestant]]] = [
            rivals.graphblas_sssp,
            rivals.networkit_sssp,
            rivals.scipy_sssp,
        ]
    else:
        words = ("bfs", data / "edges.npy", str(source))
        contestants = command(*words, "--settle")
        contestants |= {f"level by level: {name}": run for name, run in command(*words).items()}
        makers = [rivals.graphblas_bfs, rivals.networkit_bfs]
    for maker in makers:
        contestants |= maker(edges, source)
    seconds, answers = turns(contestants, options.repeats)
    column = "distance" if work == "sssp" else "level"
    compare_answers(
        {n: by_vertex(a, column, edges.n) if isinstance(a, dict) else a for n, a in answers.items()}
    )
    show(f"{work} from vertex {source}", seconds)


def compare_answers(answers: Mapping[str, np.ndarray]) -> None:
    """Raises where two differ."""
    (name, right), *others = answers.items()
    for other, found in others:
        np.testing.assert_array_equal(found, right, err_msg=f"{other} and {name} differ")


def compare_tree(options: Any, data: Path) -> None:
    """One rank, one thread: what supersteps hear, and how long they take."""
    import iterreduce as ir
    from iterreduce.collectives import group_for

    scale = options.scale + 2
    np.save(data / "tree.npy", tree(scale))
    app = waist("sssp", data / "tree.npy", "0", weights=False)
    run = ir.LoopRun(app.to_loop(), group_for(None), ir.Options(threads=1))
    run.start()
    sizes = []
    while not isinstance(run.advance(), ir.Outcome):
        sizes.append(len(run.tables["active"]))
    assert sum(sizes) == (1 << scale) - 1, "every vertex but the root hears once"
    took = run.clock.iterations
    print(f"\nshortest paths on a tree of {1 << scale:,} vertices: {sum(sizes):,} messages")
    for size, seconds in list(zip(sizes, took, strict=False))[1:]:
        print(
            f"  frontier {size // 2:10,}  {seconds * 1e3:9.3f} ms  {seconds / size * 1e9:9.1f} ns per message"
        )


def compare_programs(options: Any, data: Path) -> None:
    edges = graph("rmat", options.scale)
    write(data, edges)
    with ExitStack() as stack:
        groups = {program: groups_of(stack, program, data) for program in PROGRAMS}
        contestants = {f"{p}: {s}": iterating(g) for p, found in groups.items() for s, g in found.items()}
        seconds, _ = turns(contestants, options.repeats)
    print(f"\n{'ns per edge and sum':44}{'x of pagerank, ' + ' / '.join(f'{r}x{t}' for r, t in SETTINGS)}")
    own = [statistics.median(seconds[f"pagerank: {setting(*s)}"]) for s in SETTINGS]
    for program in PROGRAMS:
        each = [
            statistics.median(seconds[f"{program}: {setting(*s)}"]) / SUMS.get(program, 1) for s in SETTINGS
        ]
        shown = " / ".join(f"{e / len(edges.src) * 1e9:.2f}" for e in each)
        print(f"  {program:42}{shown}   {' / '.join(f'{e / o:.2f}' for e, o in zip(each, own, strict=True))}")


WORKS: dict[str, Callable[[Any, Path], None]] = {
    "pagerank": lambda options, data: compare_pagerank("rmat", options, data),
    "uniform": lambda options, data: compare_pagerank("uniform", options, data),
    "build": compare_build,
    "components": compare_components,
    "sssp": lambda options, data: compare_paths("sssp", options, data),
    "bfs": lambda options, data: compare_paths("bfs", options, data),
    "tree": compare_tree,
    "programs": compare_programs,
}


def roomy(scale: int) -> str | None:
    """Where the inputs go: memory, if there is room."""
    memory = Path("/dev/shm")
    needed = (EDGE_FACTOR << scale) * 64
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed else None


def folders(works: list[str], options: Any) -> Iterator[tuple[str, Path]]:
    """One for each work, removed after it."""
    for work in works:
        with tempfile.TemporaryDirectory(dir=options.folder or roomy(options.scale)) as folder:
            yield work, Path(folder)


def main() -> None:
    """All works, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=int, default=20, help="2^SCALE vertices")
    parser.add_argument("--quick", action="store_const", const=16, dest="scale", help="the scale 16")
    parser.add_argument("--only", action="append", choices=list(WORKS), metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the inputs are written meanwhile")
    options = parser.parse_args()
    if options.serve:
        be_a_rank(options.serve, options.one, options.data, options.threads)
        return
    for work, folder in folders(options.only or list(WORKS), options):
        WORKS[work](options, folder)


if __name__ == "__main__":
    main()
