"""Runs of `chaos` as jobs of a Slurm: the virtual cluster of the tests, and what goes wrong with its jobs.

A run is one job from the shipped scripts, every third handed in by `python -m iterreduce submit`, that queues
itself again until it is done. `Handle` is to the campaign what the process of a launcher is: it is waited
for, and does meanwhile what is planned (`Deed`), once ranks of another start of the job are there. Where
Slurm waits for nothing (two minutes before a job that was queued again may start) it is told not to.

A node that was lost is back after the run. One cluster serves all runs of a campaign; `Slurm.close` leaves
nothing of it behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chaos_places import TOLERANT, Here, processes_of, ranks_among  # noqa: E402
from benchmarks.chaos_plan import Attempt, Deed  # noqa: E402
from iterreduce.testing import damage  # noqa: E402
from tests.launch import RUN_VARIABLE, is_open_mpi, mpirun_path  # noqa: E402
from tests.slurm.cluster import ENDED, Cluster, Job, missing  # noqa: E402

NODES, NODES_OF_A_JOB = 7, 2
#: Slurm's own patience, shorter than a site's.
SETTINGS = {"KillWait": 5, "SlurmdTimeout": 6}
#: The scripts' too.
SCRIPTS = {"MOST_FRUITLESS": "6", "LOOK_SECONDS": "2", "LEAVE_SECONDS": "10", "SLURM_WAIT": "5"}
LOOK = 0.3  # seconds
#: A job that was queued again: in the second in which it was, its nodes still refuse it.
AGAIN = 1.5
#: As the scripts choose for Open MPI, but a minute less for ranks that wait for a killed one.
SRUN = "srun --kill-on-bad-exit=0 --wait=5 --mpi=pmix"


class Slurm:
    """A cluster for a campaign, started for its first run. Raises SystemExit where there can be none."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._starting = threading.Lock()

    def cluster(self) -> Cluster:
        with self._starting:
            if self._cluster is None:
                if missing():
                    raise SystemExit(missing())
                place = Path(tempfile.mkdtemp(prefix="slurm-"))  # sockets want a short path
                place.chmod(0o755)
                self._cluster = Cluster(place, NODES, **SETTINGS)
                self._cluster.up()
            return self._cluster

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.down()
            shutil.rmtree(self._cluster.place, ignore_errors=True)


class Jobs(Here):
    """Attempts of one run as jobs."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number
        self.hurt: list[str] = []  # nodes
        self.handles: list[Handle] = []

    def command(self, ranks: int, words: Sequence[str], tolerant: bool) -> list[str]:
        nodes, app_first = min(ranks, NODES_OF_A_JOB), _app_first(words[2:])
        options = [f"--nodes={nodes}", f"--ntasks-per-node={-(-ranks // nodes)}", "--time=30"]
        if self.number % 3 == 0:
            text = launcher_of(ranks, tolerant)
            launcher = [f"--launcher={text}"] * bool(text)
            more = ["--sbatch=--exclusive", f"--sbatch=--ntasks={ranks}", *launcher]
            return [sys.executable, "-m", "iterreduce", "submit", *options, *more, *app_first]
        more = [f"--ntasks={ranks}", "--exclusive", "--parsable"]
        return ["sbatch", *options, *more, "slurm/requeue.sbatch", *app_first]

    def start(
        self, command: Sequence[str], env: Mapping[str, str], run: str, said: IO[bytes], attempt: Attempt
    ) -> Handle:
        out, launcher = Path(said.name), launcher_of(attempt.ranks, "auto" in command)  # behind --recover
        more = {**env, RUN_VARIABLE: run, "PYTHON": sys.executable, **SCRIPTS}
        if command[0] == "sbatch":
            more |= {"LAUNCHER": launcher} if launcher else {}
            words = [*command[:1], f"--output={out}", *command[1:]]
        else:
            words = [*command[:4], f"--output={out}", f"--script={out.parent}/script", *command[4:]]
        told = self.cluster.ask(*words, **more)
        number = told.split()[0] if command[0] == "sbatch" else told.split()[2].rstrip(":")
        self.handles.append(Handle(self, Job(self.cluster, out.parent, number), run, attempt))
        return self.handles[-1]

    def end(self, process: Handle) -> None:
        self.cluster.ask("scancel", "--full", process.job.number, check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)

    def done(self) -> list[str]:
        return self.handles[-1].done

    def close(self) -> None:
        for name in self.hurt:
            self.cluster.revive(name)


def launcher_of(ranks: int, tolerant: bool) -> str:
    """What starts the ranks, where it is not left to the scripts."""
    if not is_open_mpi():
        return ""
    mpirun = mpirun_path(), *TOLERANT, "--map-by", "node:oversubscribe", "-n", str(ranks)
    return " ".join(mpirun) if tolerant else SRUN


def _app_first(words: Sequence[str]) -> list[str]:
    """Behind the script as users write it."""
    at = next(at for at, word in enumerate(words) if word.endswith(".py"))
    return [words[at], *words[at + 1 :], *words[:at]]


class Handle:
    """A job, looked after by who waits for it. ``done``: what was done to it."""

    def __init__(self, place: Jobs, job: Job, run: str, attempt: Attempt) -> None:
        self.place, self.cluster, self.job, self.run = place, place.cluster, job, run
        self.deeds, self.victims, self.done = list(attempt.deeds), attempt.victims or (0,), []
        self._status: int | None = None
        self._next_look = self._since = 0.0
        self._facts: dict[str, str] = {}
        self._waits_since: float | None = None
        self._struck_at = -1  # the start that had its deed
        self._damage: Deed | None = None

    def poll(self) -> int | None:
        """The exit status, if it has ended."""
        now = time.monotonic()
        if self._status is None and now >= self._next_look:
            self._next_look = now + LOOK
            self._look(now)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"job {self.job.number}", timeout or 0)
            time.sleep(0.02)
        return self._status or 0

    def _look(self, now: float) -> None:
        facts = self.job.facts()
        again = int(facts["Restarts"]) - int(self._facts.get("Restarts", 0))
        self._facts = facts
        self.done += ["queued again"] * again
        if again:
            self._since = 0.0
        state = facts["JobState"]
        if state in ENDED:
            status, _, number = facts["ExitCode"].partition(":")
            self._status = 0 if state == "COMPLETED" else int(status) or int(number) or 1
        elif state == "PENDING":
            self._hurry(now)
        elif state == "RUNNING":
            self._waits_since = None
            self._strike(now)

    def _hurry(self, now: float) -> None:
        """Start it again soon, with what is damaged before."""
        if self._damage is not None and self._damage.damage is not None:
            hurt, saved = self._damage.damage, self.job.folder.parent / "saved"
            what = damage(replace(hurt, path=f"{saved}/{hurt.path}"), self._damage.draw)
            self.done += [f"damage: {what}"] if what else []
        self._damage = None
        self._waits_since = self._waits_since or now
        held, number = self._facts["Reason"].startswith("JobHeld"), f"JobId={self.job.number}"
        if held or self._facts["Reason"] == "launch_failed_requeued_held":
            self.done.append("held by Slurm")
            self.cluster.ask("scontrol", "release", self.job.number, check=False)
        if self._facts["Reason"] == "BeginTime" and now > self._waits_since + AGAIN:
            self.cluster.ask("scontrol", "update", number, "StartTime=now", "TimeLimit=30", check=False)

    # -- what is done to it

    def _strike(self, now: float) -> None:
        """The next deed, if ranks of a start that had none are there for long enough."""
        start = int(self._facts["Restarts"])
        if not self.deeds or start == self._struck_at or not any(self._ranks()):
            return
        self._since = self._since or now
        if now < self._since + self.deeds[0].after:
            return
        deed, self._struck_at = self.deeds.pop(0), start
        what = getattr(self, f"_{deed.kind}")
        with contextlib.suppress(LookupError, ProcessLookupError, psutil.Error):
            what(deed)
            self.done.append(deed.kind)
            self._damage = deed

    def _mine(self) -> Iterator[tuple[int, list[bytes], dict[bytes, bytes]]]:
        """Its Pythons of this start, not those that a node that was cut off still has."""
        start = self._facts["Restarts"].encode()
        for each in processes_of(self.run):
            if each[2].get(b"SLURM_RESTART_COUNT", b"0") == start:
                yield each

    def _ranks(self) -> dict[int, int]:
        return ranks_among(self._mine())

    def _tell(self, *words: str) -> None:
        self.cluster.ask(*words, self.job.number, check=False)

    def _rank(self, deed: Deed) -> None:
        ranks = self._ranks()
        for rank in self.victims:
            if rank in ranks:
                os.kill(ranks[rank], signal.SIGKILL)

    def _script(self, deed: Deed) -> None:
        self._shell().kill()

    def _srun(self, deed: Deed) -> None:
        """Or mpirun: what the script started."""
        for child in self._shell().children():
            child.kill()

    def _shell(self) -> psutil.Process:
        """That runs the script. Raises ProcessLookupError."""
        for watcher in self._watchers("batch]"):
            return watcher.children()[0]
        raise ProcessLookupError(self.job.number)

    def _watchers(self, step: str = "") -> list[psutil.Process]:
        """What watches a step on a node: the script, ranks, or daemons of mpirun."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"slurmstepd: [{self.job.number}.{step}"):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def _wish(self, deed: Deed) -> None:
        """What comes before the limit, now."""
        self._tell("scancel", "--batch", "--signal=USR1")

    def _signal(self, deed: Deed) -> None:
        """To the ranks alone."""
        self._tell("scancel", f"--signal={('TERM', 'USR1', 'KILL')[deed.draw % 3]}")

    def _requeue(self, deed: Deed) -> None:
        self._tell("scontrol", "requeue")

    def _cancel(self, deed: Deed) -> None:
        self._tell("scancel")

    def _preempt(self, deed: Deed) -> None:
        node, out = self._named(deed), "--output=/dev/null"
        self.cluster.ask(
            "sbatch", "--partition=high", "--exclusive", f"--nodelist={node}", out, "--wrap=true"
        )

    def _limit(self, deed: Deed) -> None:
        self.cluster.ask("scontrol", "update", f"JobId={self.job.number}", "TimeLimit=1")

    def _step(self, deed: Deed) -> None:
        found = self._watchers()
        found[deed.draw % len(found)].kill()

    def _named(self, deed: Deed) -> str:
        nodes = self.job.nodes
        return nodes[deed.draw % len(nodes)]

    def _daemon(self, deed: Deed) -> None:
        self._hurt(deed, self.cluster.cut)

    def _node(self, deed: Deed) -> None:
        self._hurt(deed, self.cluster.lose)

    def _hurt(self, deed: Deed, how: Callable[[str], None]) -> None:
        node = self._named(deed)
        self.place.hurt.append(node)
        how(node)
        if deed.draw < 32:  # an operator sees it before Slurm does, which takes 20 s
            self.cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
