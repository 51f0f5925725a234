"""What the death of a rank costs where the others go on: from SIGKILL to the next committed iteration.

    python benchmarks/recovery.py            PageRank of scale 20, k-means of 2M x 16, on 4 ranks
    python benchmarks/recovery.py --quick    small ones, to see that it works

For Open MPI, whose launcher is told to go on (``mpirun --with-ft ulfm``). A rank is killed in the midst of an
iteration. The state then comes from copies in the memory of others (*memory*), from a checkpoint of the
iteration before (*checkpoint*), or is made anew (*start*). Seconds:

    shrink      from the kill until all survivors are a group again
    commit      from the kill until all survivors have committed an iteration
    reference   what is to be done at least, measured right behind it on the same ranks: the lost share of
                the load of all rows, the invariants of all, and a first iteration, which plans

*relaunch*: the same under the supervisor with ``--recover off``, all ranks started again, from a checkpoint
of each iteration (`relaunch`). *copies*: undisturbed iterations without copies, with one in each iteration,
and as often as is cheap, which is the default; in turns, each of them first as often as the others. Medians
and means from commit to commit, the processor time of rank 0, how many copies were made in a run, and what
they took of the time of its iterations, by its own count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import iterreduce as ir  # noqa: E402
from iterreduce.collectives import MpiGroup, world  # noqa: E402
from iterreduce.events import Event, Events  # noqa: E402
from iterreduce.options import Options  # noqa: E402
from iterreduce.run import run_loop  # noqa: E402
from iterreduce.start import prepare_environment  # noqa: E402
from tests.launch import is_open_mpi, mpirun_command, mpirun_environment  # noqa: E402

VICTIM, AT = 1, 6  # the rank that dies, and the iteration that it dies in
ORIGINS = ("memory", "checkpoint", "start")
COPIES = {"never": 0, "each": 1, "if cheap": None}


def kmeans(path: str, iterations: int) -> ir.Dataset:
    from apps.kmeans import kmeans

    return kmeans(ir.Dataset.read(path), k=64, tolerance=0.0, max_iterations=iterations)


def pagerank(path: str, iterations: int) -> ir.Dataset:
    from benchmarks.waist.pagerank import pagerank

    return pagerank(ir.Dataset.read_edges(path), tolerance=0.0, max_iterations=iterations)


PROGRAMS: dict[str, Callable[[str, int], ir.Dataset]] = {"kmeans": kmeans, "pagerank": pagerank}
APPS = {"kmeans": "apps/kmeans.py", "pagerank": "benchmarks/waist/pagerank.py"}
#: The relaunched job runs until it is killed for the last time, so it converges late.
MORE = {"kmeans": ("--k", "64"), "pagerank": ("--damping", "0.99999")}


# ------------------------------------------------------------------------------- on every rank


class Watch:
    """When iterations were committed and ranks were lost; kills this process in one iteration."""

    def __init__(self, told: Path | None, dies: bool) -> None:
        self.commits: list[float] = []
        self.worked: list[float] = []  # processor time until then
        self.lost = 0.0
        self.again = 0.0  # the first commit behind it
        self._told, self._dies = told, dies

    def __call__(self, event: Event) -> None:
        if event.name == "control.ready" and self._dies and event.fields["iteration"] == AT:
            assert self._told is not None
            self._told.write_text(str(time.perf_counter()))
            os.kill(os.getpid(), signal.SIGKILL)
        elif event.name == "rank.lost":
            self.lost = time.perf_counter()
        elif event.name == "iteration.commit":
            self.commits.append(time.perf_counter())
            self.worked.append(time.process_time())
            if self.lost and not self.again:
                self.again = self.commits[-1]


def watched(group: MpiGroup, loop: ir.Loop, options: Options, watch: Watch) -> Any:
    """A whole run. Collective."""
    events = Events()
    events.subscribe(watch, may_raise=True, places=True)
    group.barrier()
    return run_loop(loop, group, options, events)


def struck(group: MpiGroup, program: str, path: str, origin: str, folder: Path) -> dict[str, Any]:
    """A run that loses a rank, and one that does not behind it. Collective."""
    before, told = group.size, folder / "killed"
    loop = PROGRAMS[program](path, AT + 3).to_loop()
    saved = str(folder / "saved") if origin == "checkpoint" else None
    options = Options(copy_every=1 if origin == "memory" else 0)
    if saved:
        options = Options(copy_every=0, checkpoint_dir=saved, checkpoint_every=1)
    watch = Watch(told, group.rank == VICTIM)
    found = watched(group, loop, options, watch)
    calm = watched(group, loop, Options(copy_every=0), Watch(None, False))
    killed, (record,) = float(told.read_text()), found.recoveries
    mine = [watch.lost - killed, watch.again - killed, calm.seconds["load"], calm.seconds["invariants"]]
    mine += [calm.seconds_per_iteration[0], statistics.median(calm.seconds_per_iteration[1:])]
    told_by_all = [json.loads(text) for text in group.allgather_bytes(json.dumps(mine).encode())]
    shrink, commit, load, invariants, first, steady = map(max, zip(*told_by_all, strict=True))
    return {
        "origin": record["origin"],
        "recomputed": record["recomputed"],
        "shrink": shrink,
        "commit": commit,
        "reference": load / before + invariants + first,
        "iteration": steady,
        "parts": record["seconds"],
    }


def copied(group: MpiGroup, program: str, path: str, iterations: int, repeats: int) -> dict[str, Any]:
    """What iterations take with and without copies, by `COPIES`, on this rank. Collective."""
    loop = PROGRAMS[program](path, iterations).to_loop()
    found: dict[str, dict[str, list[float]]] = {
        name: {"wall": [], "cpu": [], "made": [], "share": []} for name in COPIES
    }
    turns = list(COPIES.items())
    for repeat in range(repeats + 1):  # the first warms up
        at = repeat % len(turns)
        for name, every in turns[at:] + turns[:at]:
            watch, mine = Watch(None, False), found[name]
            result = watched(group, loop, Options(copy_every=every), watch)
            if repeat:
                mine["wall"] += [b - a for a, b in itertools.pairwise(watch.commits)]
                mine["cpu"] += [b - a for a, b in itertools.pairwise(watch.worked)]
                mine["made"].append(result.copies.get("made", 0))
                mine["share"].append(result.copies.get("seconds", 0.0) / result.seconds["iterate"])
    return {
        name: {
            "median": statistics.median(mine["wall"]),
            "mean": statistics.mean(mine["wall"]),
            "cpu": statistics.mean(mine["cpu"]),
            "made": statistics.mean(mine["made"]),
            "share": statistics.mean(mine["share"]),
        }
        for name, mine in found.items()
    }


def on_rank(given: argparse.Namespace) -> None:
    """Rank 0 writes what was measured; nobody waits for MPI to end, which may hang behind a death."""
    group, folder = world(), Path(given.folder)
    if given.measure == "copies":
        found = copied(group, given.program, given.path, given.iterations, given.repeats)
    else:
        found = struck(group, given.program, given.path, given.measure, folder)
    if group.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    group.all_here()
    os._exit(0)


# ------------------------------------------------------------------------------- around the ranks


def start(ranks: int, measure: str, program: str, path: Path, *more: str) -> dict[str, Any]:
    """What the ranks have measured."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--measure", measure, "--program", program, "--path", str(path), "--folder", folder, *more]
        command = mpirun_command(ranks, __file__, *words, options=("--with-ft", "ulfm"))
        environment = mpirun_environment()
        prepare_environment(environment)
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        found = Path(folder, "found.json")
        if not found.exists():
            raise SystemExit(f"{measure} of {program} ended with {ended.returncode}\n{ended.stderr[-3000:]}")
        return dict(json.loads(found.read_text()))


def relaunched(ranks: int, program: str, path: Path, kills: int) -> list[str]:
    """What `relaunch` says."""
    words = [str(ROOT / APPS[program]), str(path), *MORE[program], "--tolerance", "0"]
    command = [sys.executable, str(ROOT / "benchmarks/relaunch.py"), "--ranks", str(ranks)]
    command += ["--kills", str(kills), *words, "--max-iterations", "100000"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    return (ended.stdout or ended.stderr[-1000:]).splitlines()


def generated(folder: Path, given: argparse.Namespace) -> dict[str, Path]:
    """The inputs."""
    rows, scale = (100_000, 14) if given.quick else (2_000_000, 20)
    blobs = ["blobs", str(folder / "points.npy"), "--rows", str(rows), "--dim", "16", "--spread", "10"]
    rmat = ["rmat", str(folder / "edges.npy"), "--scale", str(scale)]
    for words in (blobs, rmat):
        command = [sys.executable, "-m", "iterreduce", "--quiet", str(ROOT / "apps/generate.py"), *words]
        subprocess.run(command, check=True, env=mpirun_environment(), cwd=ROOT)
    return {"kmeans": folder / "points.npy", "pagerank": folder / "edges.npy"}


def deaths(given: argparse.Namespace, program: str, path: Path) -> Iterator[str]:
    """By where the state came from."""
    yield f"{'from':12}{'shrink':>9}{'commit':>9}{'reference':>11}{'ratio':>7}{'iteration':>11}  parts"
    for origin in ORIGINS:
        found = [start(given.ranks, origin, program, path) for _ in range(given.repeats)]
        assert all(each["origin"] == origin for each in found), found
        middle = {name: statistics.median(f[name] for f in found) for name in ("shrink", "commit")}
        ratio = statistics.median(f["commit"] / f["reference"] for f in found)
        reference = statistics.median(f["reference"] for f in found)
        steady = statistics.median(f["iteration"] for f in found)
        parts = {
            name: round(statistics.median(f["parts"][name] for f in found), 3) for name in found[0]["parts"]
        }
        yield (
            f"{origin:12}{middle['shrink']:9.3f}{middle['commit']:9.3f}{reference:11.3f}{ratio:7.2f}"
            f"{steady:11.4f}  {parts}"
        )


def costs(given: argparse.Namespace, program: str, path: Path) -> Iterator[str]:
    """Of copies, per iteration."""
    more = "--iterations", str(20 if given.quick else 100), "--repeats", str(given.repeats)
    found = start(given.ranks, "copies", program, path, *more)
    for name in COPIES:
        mine, none = found[name], found["never"]
        ratios = ", ".join(f"{what} {mine[what] / none[what]:.3f}" for what in ("median", "mean", "cpu"))
        yield (
            f"copies {name:9} iteration {mine['median']:.4f} s; of without: {ratios}; "
            f"{mine['made']:.1f} made in {100 * mine['share']:.1f} % of the time"
        )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--program", choices=PROGRAMS, help="this one alone")
    for name in ("--measure", "--path", "--folder"):  # of the ranks
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--iterations", type=int, default=20, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    given.repeats = given.repeats or (2 if given.quick else 5)
    if given.measure:
        on_rank(given)
    if not is_open_mpi():
        raise SystemExit("this needs Open MPI: with MPICH the death of a rank ends the job")
    with tempfile.TemporaryDirectory() as folder:
        paths = generated(Path(folder), given)
        for program, path in paths.items():
            if given.program in (None, program):
                print(f"{program}, {given.ranks} ranks, load {os.getloadavg()[0]:.1f}", flush=True)
                for line in deaths(given, program, path):
                    print(line, flush=True)
                for line in costs(given, program, path):
                    print(line, flush=True)
                print("relaunch by the supervisor:", flush=True)
                print(
                    "\n".join(f"    {line}" for line in relaunched(given.ranks, program, path, given.repeats))
                )


if __name__ == "__main__":
    main()
