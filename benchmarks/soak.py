"""Many deaths of one job: memory and open files of those who live, and of the supervisor, must not grow.

    python benchmarks/soak.py --ranks 4 --kills 60

A loop runs under the supervisor, with a checkpoint directory. A rank is killed, the others get on, another is
killed: until none is left, when the supervisor starts all of them again, and so on. Behind each death, once
all ranks that are left have committed further iterations:

    attempt, left      how often the ranks were started; how many of them live
    supervisor         resident memory (MiB) and open files of the supervisor
    ranks              the same, the most of any rank that lives

With Open MPI survivors go on in place; with another MPI every death is a new start. The loop is small, so
that a rank's share of it does not show when fewer ranks hold it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import iterreduce as ir  # noqa: E402


@ir.app
def turning(rows: int = 20_000, group: ir.Group | None = None) -> ir.Dataset:
    """Numbers that go round and never come to rest."""
    assert group is not None

    def turn(cells: ir.Batch) -> ir.Batch:
        return ir.Batch(cell=(cells["cell"] + 1) % rows, x=(cells["x"] * 3 + 1) % 1009)

    mine = np.arange(group.rank, rows, group.size)
    start = ir.Dataset.from_local(group, cell=mine, x=mine % 1009)
    job = ir.MapReduce(map=turn, reduce=ir.SUM, key="cell")
    return job.iterate(state=start, state_key="cell", max_iterations=10**9)


class Job:
    """The supervised job, as far as its files tell."""

    def __init__(self, folder: Path, ranks: int, kills: int) -> None:
        from tests.launch import mpirun_environment

        self.folder, self.ranks = folder, ranks
        own = ["-n", str(ranks), "--retries", str(kills), "--checkpoint-dir", str(folder / "saved")]
        command = [sys.executable, "-m", "iterreduce", "run", *own, "--checkpoint-every", "50", __file__]
        self._said = open(folder / "said", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--quiet"], stderr=self._said, env=mpirun_environment(), cwd=ROOT
        )

    @property
    def attempt(self) -> Path:
        """Where the attempt under way has its files."""
        return max(self.folder.glob(".saved.run-*/attempt-*"), default=self.folder)

    def living(self) -> dict[int, int]:
        """Pids by rank."""
        found = {}
        for path in self.attempt.glob("rank-*.json"):
            pid = read(path).get("pid", 0)
            if state_of(pid) not in ("", "Z"):
                found[int(path.stem.split("-")[1])] = pid
        return found

    def iterations(self) -> list[int]:
        """How far each rank that lives is; 0 where it has not begun."""
        told = [read(self.attempt / f"beat-{rank}").get("path", []) for rank in self.living()]
        return [path[0] if path else 0 for path in told]

    def wait(self, holds: Callable[[], bool], seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "said").read_text()[-3000:]
                raise SystemExit(f"the job ended with {self.process.poll()} or got nowhere\n{said}")
            time.sleep(0.05)

    def gets_on(self, beyond: int = 0) -> None:
        """Until all ranks that live have begun two iterations behind this one."""
        self.wait(lambda: bool(self.living()) and min(self.iterations(), default=0) > beyond)
        more = max(self.iterations()) + 2
        self.wait(lambda: min(self.iterations(), default=0) > more)

    def kill(self) -> None:
        """One of the ranks that live, whichever; returns when the others get on."""
        living, attempt, at = self.living(), self.attempt, max(self.iterations())
        victim = random.choice(sorted(living))
        os.kill(living[victim], signal.SIGKILL)
        self.wait(lambda: victim not in self.living() or self.attempt != attempt)
        time.sleep(0.5)
        if len(living) == 1 or self.attempt != attempt:
            self.wait(lambda: self.attempt != attempt and len(self.living()) == self.ranks)
            at = 0
        self.gets_on(at)


def read(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def state_of(pid: int) -> str:
    """Of a process; nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def held(pid: int) -> tuple[float, int]:
    """MiB that are resident, and open files; zeros where it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0.0, 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=60)
    given = parser.parse_args()
    random.seed(given.kills)
    rows: list[tuple[int, int, tuple[float, int], tuple[float, int]]] = []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), given.ranks, given.kills)
        try:
            job.wait(lambda: len(job.living()) == given.ranks)
            job.gets_on()
            print("kill  attempt  left   supervisor MiB, files   ranks MiB, files")
            for number in range(given.kills + 1):
                if number:
                    job.kill()
                living = job.living()
                most = [max(each) for each in zip(*map(held, living.values()), strict=True)]
                attempt = int(job.attempt.name.split("-")[1])
                own = held(job.process.pid)
                rows.append((attempt, len(living), own, (most[0], int(most[1]))))
                print(
                    f"{number:4}{attempt:9}{len(living):6}{own[0]:17.1f}{own[1]:7}{most[0]:12.1f}{most[1]:7}",
                    flush=True,
                )
        finally:
            job.process.terminate()
            job.process.wait()
    print(f"{len({row[0] for row in rows})} attempts; supervisor", told([row[2] for row in rows]))
    for left in range(given.ranks, 0, -1):
        alike = [row[3] for row in rows if row[1] == left]
        if alike:
            print(f"with {left} ranks left, {len(alike)} times:", told(alike))


def told(samples: list[tuple[float, int]]) -> str:
    """From first to last, and the spread."""
    text = []
    for name, each in zip(("MiB", "files"), zip(*samples, strict=True), strict=True):
        steps = [b - a for a, b in itertools.pairwise(each)]
        mean = sum(steps) / max(1, len(steps))
        text.append(f"{name} {each[0]:.0f} to {each[-1]:.0f} (most {max(each):.0f}, {mean:+.2f} a time)")
    return "; ".join(text)


if __name__ == "__main__":
    main()
