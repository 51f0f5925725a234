"""An app that counts slowly and tells where it is, and waiting for what processes do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

#: Every rank writes its pid when the file is loaded, and a line per iteration. Rank 0 is slow, so that the
#: others wait for it inside MPI.
SLOW = '''
import os, time
import numpy as np
import iterreduce as ir

folder = os.environ["ITERREDUCE_TEST_FOLDER"]
rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
with open(f"{folder}/pid-{rank}.new", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"{folder}/pid-{rank}.new", f"{folder}/pid-{rank}")
if rank == "0" and "ITERREDUCE_TEST_GO" in os.environ:
    while not os.path.exists(os.environ["ITERREDUCE_TEST_GO"]):
        time.sleep(0.01)

@ir.app
def slow(iterations: int = 100, pause: float = 0.03, hang: int = 0, group: ir.Group = None):
    """Count to ITERATIONS, PAUSE seconds each; stay for ever in iteration HANG."""
    log = open(f"{folder}/iterations-{group.rank}", "a", buffering=1)

    def step(s):
        iteration = int(s["n"][0]) + 1
        log.write(f"{iteration}\\n")
        if iteration == hang and group.rank == 0 and not os.path.exists(f"{folder}/hung"):
            open(f"{folder}/hung", "w").close()
            time.sleep(600)
        if group.rank == 0:
            time.sleep(pause)
        return s.with_columns(n=s["n"] + 1, x=s["x"] * 1.01 + 1)

    one = ir.Local(step, ("s",), "next", cut="share")
    body = (ir.Superstep("step", (one,), (ir.Replace("s", "next"),)),)
    start = {"start": ir.Batch(n=np.zeros(1, np.int64), x=np.arange(1.0))}
    return ir.Loop("slow", start, {"s": ir.State("start")}, body, ir.Until.of([], iterations), "s")
'''


def until(
    holds: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    """Wait until something holds; an AssertionError when the process ends first, or time is over."""
    deadline = time.monotonic() + seconds
    while not holds():
        if process is not None and process.poll() is not None and not holds():
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def lines_of(path: Path) -> int:
    """Whole lines of a file; none where it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def pid_of(folder: Path, rank: int) -> int:
    """The process that wrote its pid last as this rank."""
    return int((folder / f"pid-{rank}").read_text())
