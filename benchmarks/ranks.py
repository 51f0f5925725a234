"""Ranks of the real engine that take turns with rivals, for benchmarks that compare in one run.

A benchmark starts its own file again, alone or under this environment's mpirun, with ``--serve FOLDER``:
those ranks load, run one iteration (which compiles and plans), and wait for their turns. A turn is a file in
the folder, and between turns ranks sleep: they take nothing from the rival that runs meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOOK_SECONDS = 0.002  # between looks for the next turn
SERVED = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Open MPI: as root, more ranks than cores, none bound to a core that others use
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def say(path: Path, what: Any) -> None:
    """Write a message that is never seen half."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(what))
    part.rename(path)


class Ranks:
    """Ranks that run ``script`` and wait for turns; `ready` holds what they said after loading."""

    def __init__(self, script: str, ranks: int, folder: Path, *words: str):
        self.ranks, self.folder, self.turns = ranks, folder / f"{ranks} ranks", 0
        self.folder.mkdir()
        mpirun = [os.path.join(sysconfig.get_path("scripts"), "mpirun"), "-n", str(ranks)]
        python = [sys.executable, script, "--serve", str(self.folder), *words]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            (mpirun if ranks > 1 else []) + python, env={**os.environ, **SERVED, "PYTHONPATH": path}
        )
        self.ready = self._answer()

    def turn(self, iterations: int) -> dict[str, Any]:
        """Run iterations: ``seconds`` of each, ``parts`` of them by name, ``rss`` of each rank."""
        self.turns += 1
        say(self.folder / f"turn {self.turns}", iterations)
        return self._answer()

    def end(self) -> None:
        """Let them go."""
        if self.process.poll() is None:
            say(self.folder / f"turn {self.turns + 1}", 0)
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        path = self.folder / f"answer {self.turns}"
        while not path.exists():
            if self.process.poll() is not None:
                raise SystemExit(f"the ranks ended with status {self.process.returncode}")
            time.sleep(LOOK_SECONDS)
        return json.loads(path.read_text())


class Clock:
    """Seconds spent in functions of this rank, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to ``name``."""
        self.seconds[name] = 0.0

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed

    def take(self) -> dict[str, float]:
        """What came together since the last call."""
        taken = dict(self.seconds)
        self.seconds = dict.fromkeys(taken, 0.0)
        return taken


def serve(
    folder: Path, app: Callable[[], Any], clock: Clock, results: Callable[[Any], Any], threads: int = 1
) -> None:
    """Be one of the ranks: run the loop of ``app()`` turn by turn. ``results`` makes JSON of the driver."""
    import iterreduce as ir
    from iterreduce.collectives import group_for, world
    from iterreduce.options import Options

    launched = any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))
    group = world() if launched else group_for(None)
    run = ir.LoopRun(app().to_loop(), group, Options(threads=threads))
    began = time.perf_counter()
    run.start()
    loaded = time.perf_counter() - began
    run.advance()
    clock.take()
    mine: dict[str, Any] = {"load": loaded, "first": run.clock.iterations[0], "rss": peak()}
    for number in itertools.count():
        tell(folder / f"answer {number}", group, mine)
        iterations = wait_for(folder / f"turn {number + 1}")
        if not iterations:
            return
        group.barrier()
        for _ in range(iterations):
            run.advance()
        mine = {"seconds": run.clock.iterations[-iterations:], "parts": clock.take(), "rss": peak()}
        mine["results"] = results(run) if number == 0 else None


def tell(path: Path, group: Any, mine: dict[str, Any]) -> None:
    """What rank 0 found, with the memory of all ranks. Collective."""
    said = [json.loads(part) for part in group.allgather_bytes(json.dumps(mine).encode())]
    if group.rank == 0:
        say(path, {**said[0], "rss": [part["rss"] for part in said]})


def wait_for(path: Path) -> Any:
    """A message, when it is there."""
    while not path.exists():
        time.sleep(LOOK_SECONDS)
    return json.loads(path.read_text())


def peak() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def ranks_of(script: str, sizes: list[int], folder: Path, *words: str) -> Iterator[list[Ranks]]:
    """Groups of ranks of these sizes, ended on the way out."""
    with contextlib.ExitStack() as stack:
        groups = []
        for size in sizes:
            groups.append(Ranks(script, size, folder, *words))
            stack.callback(groups[-1].end)
        yield groups
