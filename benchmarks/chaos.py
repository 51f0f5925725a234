"""A campaign of failures: runs that are killed and damaged, and started again until they finish.

    python benchmarks/chaos.py --runs 300 --seed 1 --jobs 3
    python benchmarks/chaos.py --seed 1 --only 17 --keep     one of them again, files and all

Every run is a pure function of the seed and its number: a program, and attempts at it, each with a number of
ranks and what goes wrong: ranks killed (one, several, all, or the launcher) at a place inside the program
(`iterreduce.testing`) or from outside at any moment, the newest checkpoint torn, flipped or deleted before
the next attempt, a disk that is full. Attempts follow until one finishes. Its result must have the digest of
the undisturbed run (wrong), every attempt must end in time (hung), and one without faults must finish (lost).

Iterations are made slower on purpose, by sleeping, so that small inputs leave time for several checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from iterreduce.testing import (  # noqa: E402
    DeleteFile,
    FailCall,
    Fault,
    Faults,
    FillDisk,
    FlipBit,
    Kill,
    Slow,
    TearFile,
    damage,
)
from tests.launch import kill_run, mpirun_command, mpirun_environment, segments, sweep  # noqa: E402

MOST_RANKS = 5
MOST_ATTEMPTS = 8
PAUSE = 0.01  # per iteration, seconds
FEW, SOME = (1, 1, 2, 2, 3, 4, 5), (2, 2, 2, 3, 3, 4, 5)  # ranks: start-up is most of what a run costs

#: Where ranks are killed, and which of these places stand inside what must be all or nothing.
PHASES = (
    "load", "map", "exchange", "control", "commit", "copy", "write", "publish", "restart", "end", "any time",
    "launcher",
)  # fmt: skip
INSIDE = ("exchange", "commit", "copy", "write", "publish", "restart")
_PLACES = {
    "load": ("load", "run.start"),
    "map": ("stage.start", "stage.end", "iteration.start"),
    "exchange": ("exchange.ready", "exchange.done"),
    "control": ("control.ready",),
    "commit": ("commit.start", "iteration.commit"),
    "copy": ("checkpoint.start", "checkpoint.copy"),
    "write": ("checkpoint.step:write", "checkpoint.step:write.half", "checkpoint.step:sync"),
    "publish": ("checkpoint.step:publish", "checkpoint.step:rename", "checkpoint.step:published"),
    "restart": ("restart.start", "restart", "load"),
    "end": ("run.end",),
}


# ------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Program:
    """An app, how its input is made, and about how many iterations it takes."""

    name: str
    app: str
    make: Callable[[Path], None]
    arguments: tuple[str, ...]
    iterations: int
    input: str


def points(path: Path) -> None:
    np.save(path, np.random.default_rng(1).random((5000, 2)))


def web(path: Path) -> None:
    rng = np.random.default_rng(2)
    ends = (rng.pareto(1.0, (2, 6000)) * 10).astype(np.int64) % 700
    np.savez(path, src=ends[0], dst=ends[1])


def chains(path: Path) -> None:
    """Chains of vertices without an order: labels take as many supersteps as a chain is long."""
    rng = np.random.default_rng(3)
    names = rng.permutation(2400).reshape(40, 60)
    np.savez(path, src=names[:, :-1].ravel(), dst=names[:, 1:].ravel())


def roads(path: Path) -> None:
    """A grid with lengths."""
    rng, at = np.random.default_rng(4), np.arange(40 * 40).reshape(40, 40)
    src = np.concatenate([at[:, :-1].ravel(), at[:-1].ravel()])
    dst = np.concatenate([at[:, 1:].ravel(), at[1:].ravel()])
    np.savez(path, src=src, dst=dst, weight=rng.integers(1, 100, len(src)))


WEB = ("--tolerance", "0", "--max-iterations", "60")
PROGRAMS = {
    program.name: program
    for program in (
        Program("kmeans", "apps/kmeans.py", points, ("--k", "20", "--tolerance", "0"), 60, "points.npy"),
        Program("pagerank", "benchmarks/waist/pagerank.py", web, WEB, 60, "web.npz"),
        Program("components", "benchmarks/waist/components.py", chains, (), 60, "chains.npz"),
        Program("sssp", "benchmarks/waist/sssp.py", roads, ("0", "--symmetric"), 80, "roads.npz"),
    )
}  # fmt: skip


# ------------------------------------------------------------------------------- what will happen


@dataclass(frozen=True)
class Attempt:
    """One start of the program. ``outside``: seconds after the ranks are there until they are killed."""

    ranks: int
    phase: str = ""
    victims: tuple[int, ...] = ()
    faults: tuple[Fault, ...] = ()
    outside: float | None = None
    damage: Fault | None = None

    def __str__(self) -> str:
        whom = "launcher" if self.phase == "launcher" else whom_of(len(self.victims), self.ranks)
        hurt = f"{type(self.damage).__name__} " if self.damage else ""
        disk = next((f" {type(f).__name__}" for f in self.faults if isinstance(f, FailCall | FillDisk)), "")
        return f"{hurt}{self.ranks}:{self.phase or 'undisturbed'}{f'({whom})' if self.phase else ''}{disk}"


@dataclass(frozen=True)
class Case:
    """One run of the campaign."""

    number: int
    program: str
    every: int
    attempts: tuple[Attempt, ...]
    files: str

    def __str__(self) -> str:
        return f"{self.number:4} {self.program:10} every {self.every:2}  " + "  ".join(
            map(str, self.attempts)
        )


def whom_of(victims: int, ranks: int) -> str:
    return "all" if victims == ranks else "one" if victims == 1 else "several"


def plan(seed: int, number: int, programs: tuple[str, ...]) -> Case:
    """What happens in this run, from nothing but these numbers.

    The phase of the first kill goes round with the number, so that every program meets every phase.
    """
    rng = random.Random(f"{seed}/{number}")
    program = programs[number % len(programs)]
    first = PHASES[number // len(programs) % len(PHASES)]
    phases = [first] if first != "restart" else ["commit", "restart"]
    while len(phases) < 3 and rng.random() < 0.3:
        phases.append(rng.choice(PHASES))
    every = rng.randint(3, 12)
    attempts = [disturbed(rng, program, every, phase, i) for i, phase in enumerate(phases)]
    last = Attempt(rng.choice(FEW), damage=drawn_damage(rng))
    return Case(number, program, every, (*attempts, last), rng.choice(("node", "node", "rank")))


def disturbed(rng: random.Random, program: str, every: int, phase: str, before: int) -> Attempt:
    """An attempt that is to end by a kill in this phase."""
    ranks = rng.choice(SOME) if rng.random() < 0.9 else 1
    number = rng.choice((1, 1, min(2, ranks), ranks))
    victims = tuple(sorted(rng.sample(range(ranks), number)))
    hurt = drawn_damage(rng) if before else None
    if phase in ("any time", "launcher"):
        return Attempt(ranks, phase, victims, (), rng.uniform(0, 3), hurt)
    place = rng.choice(_PLACES[phase])
    if phase == "publish":
        victims = (0,)  # who publishes
    left = max(2, PROGRAMS[program].iterations // (2 + before))
    nth = {"load": 1, "restart": 1, "end": 1}.get(phase) or rng.randint(1, left)
    if phase in ("copy", "write", "publish"):
        nth = rng.randint(1, max(1, left // every))
    if phase == "commit" and not before:
        nth = rng.randint(min(2 * every, left), left)
    delay = rng.choice((0.0, 0.0, rng.uniform(0, 0.005)))
    kills = tuple(Kill(at=place, rank=rank, nth=nth, delay=delay) for rank in victims)
    return Attempt(ranks, phase, victims, (*kills, *drawn_disk(rng)), None, hurt)


def drawn_damage(rng: random.Random) -> Fault | None:
    """To the newest checkpoint, in a third of the restarts."""
    newest = "attempt-*/[0-9]*"
    files = f"{newest}/*.h5", f"{newest}/node-*.h5", f"{newest}/rank-*.h5", f"{newest}/manifest.json"
    draw = rng.random()
    if draw > 0.35:
        return None
    if draw < 0.05:
        return DeleteFile(newest, at="restart")
    kind = rng.choice((TearFile, FlipBit, DeleteFile))
    return kind(rng.choice(files), at="restart")


def drawn_disk(rng: random.Random) -> tuple[Fault, ...]:
    """Sometimes the disk is full, or fails, for what is written to checkpoints."""
    draw = rng.random()
    if draw < 0.06:
        return (FillDisk(rng.randint(0, 1 << 18), path="*/attempt-*", told=rng.random() < 0.5),)
    if draw < 0.12:
        call = rng.choice(("fsync", "pwrite", "rename"))
        return (FailCall(call, "EIO", path="*/attempt-*", first=rng.randint(1, 9), times=rng.randint(1, 3)),)
    return ()


# ------------------------------------------------------------------------------- doing it


@dataclass
class Report:
    """What came of a run."""

    case: Case
    verdict: str = ""
    struck: list[str] = field(default_factory=list)
    resumed: int = 0
    refused: int = 0
    odd: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class End:
    """How an attempt ended. ``summary``: of the run, if it finished."""

    status: int | None
    text: str
    summary: dict | None
    resumed: int | None


class Campaign:
    """Where things lie, and how attempts are started."""

    def __init__(self, work: Path, saving: bool, timeout: float):
        self.work, self.saving, self.timeout = work, saving, timeout
        self.expected: dict[str, str] = {}
        self.orphans: list[str] = []

    def prepare(self, programs: tuple[str, ...]) -> None:
        """Inputs, and the digests of undisturbed runs on one rank and on three."""
        for name in programs:
            program = PROGRAMS[name]
            program.make(self.work / program.input)
            ends = [self.attempt(name, Attempt(ranks), None, 0, "node") for ranks in (1, 3)]
            digests = {end.summary["result_sha256"] if end.summary else end.text for end in ends}
            if len(digests) != 1:
                raise SystemExit(f"{name}: undisturbed runs differ or fail: {digests}")
            self.expected[name] = digests.pop()
            iterations = ends[0].summary["iterations"]
            print(f"{name}: {iterations} iterations, {ends[1].summary['seconds']['total']:.1f} s on 3 ranks")

    def attempt(
        self, name: str, attempt: Attempt, saved: Path | None, every: int, files: str, fresh: bool = False
    ) -> End:
        """Start it, do what is to be done from outside, and wait for its end."""
        program = PROGRAMS[name]
        folder = Path(tempfile.mkdtemp(dir=self.work if saved is None else saved.parent))
        options = ["--reproducible", "--quiet", "--summary", f"{folder}/summary"]
        options += ["--events", f"{folder}/events"]
        if saved is not None and self.saving:
            options += ["--checkpoint-dir", str(saved), "--checkpoint-every", str(every)]
            options += ["--checkpoint-files", files, *(["--fresh"] if fresh else [])]
        app = program.app, str(self.work / program.input), *program.arguments
        command = mpirun_command(attempt.ranks, "-m", "iterreduce", *options, *app)
        if attempt.ranks == 1 and attempt.phase != "launcher":
            command = command[3:]  # without MPI
        slow = Slow(PAUSE, at="iteration.start")
        faults = Faults((*attempt.faults, slow)).to_json()
        run = f"chaos-{os.getpid()}-{folder.parent.name}-{folder.name}"
        environment = mpirun_environment({"ITERREDUCE_TEST_FAULTS": faults}, run)
        with (folder / "said").open("w+b") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
            status = self._wait(process, attempt, run)
            said.seek(0)
            text = said.read().decode(errors="replace")
        if attempt.phase == "launcher":  # the orphans go on beside the next attempt
            self.orphans.append(run)
        else:
            kill_run(run)
        end = End(status, text, read_json(folder / "summary"), resumed_at(folder / "events"))
        if status != 0:
            end.summary = None
        return end

    def close(self) -> None:
        """Leave no process behind."""
        for run in self.orphans:
            kill_run(run)

    def _wait(self, process: subprocess.Popen, attempt: Attempt, run: str) -> int | None:
        deadline = time.monotonic() + self.timeout
        if attempt.outside is not None:
            self._strike(process, attempt, run, deadline)
        try:
            return process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            kill_run(run)
            process.wait()
            return None

    def _strike(self, process: subprocess.Popen, attempt: Attempt, run: str, deadline: float) -> None:
        """Kill ranks from outside, some time after they are there."""
        while process.poll() is None and len(ranks_of(run)) < attempt.ranks and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(attempt.outside)
        pids = ranks_of(run)
        wanted = (
            [process.pid] if attempt.phase == "launcher" else [pids[r] for r in attempt.victims if r in pids]
        )
        for pid in wanted:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def place(self, number: int) -> Path:
        """Where a run's files are."""
        return self.work / f"case-{number}"

    def run(self, case: Case) -> Report:
        """Attempt after attempt, until one finishes."""
        report, started = Report(case), time.monotonic()
        place = self.place(case.number)
        place.mkdir()
        saved = place / "saved"
        attempts, fresh = list(case.attempts), False
        while not report.verdict:
            attempt = attempts.pop(0)
            if attempt.damage is not None and self.saving:
                done = damage(replace(attempt.damage, path=f"{saved}/{attempt.damage.path}"), case.number)
                report.struck += [f"damage: {done}"] if done else []
            end = self.attempt(case.program, attempt, saved, case.every, case.files, fresh)
            report.resumed += end.resumed is not None
            report.struck += struck_in(attempt, end)
            report.verdict = self._judge(case, end)
            if "--fresh" in end.text and end.status == 1:  # nothing whole is left, and it says so
                report.refused, fresh = report.refused + 1, True
            elif not attempt.phase and not report.verdict:
                report.odd.append(end.text[-3000:])
            if not attempts:
                attempts = [Attempt(MOST_RANKS - len(report.odd))]
            if len(report.odd) > 2 and not report.verdict:
                report.verdict = "lost"
        report.seconds = time.monotonic() - started
        return report

    def _judge(self, case: Case, end: End) -> str:
        if end.status is None:
            return "hung"
        if end.summary is None:
            return ""
        return "ok" if end.summary["result_sha256"] == self.expected[case.program] else "wrong"


def struck_in(attempt: Attempt, end: End) -> list[str]:
    """What really happened to the attempt, by phase."""
    if attempt.outside is not None:
        return [attempt.phase] if end.summary is None else []
    if not attempt.phase:
        return []
    kinds = [type(fault).__name__ for fault in attempt.faults if not isinstance(fault, Kill)]
    disks = [kind for kind in kinds if f"{kind}(" in end.text]
    return ([attempt.phase] if "iterreduce.testing: Kill(" in end.text else []) + disks


def ranks_of(run: str) -> dict[int, int]:
    """The processes of a run that are ranks: rank -> pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = dict(w.partition(b"=")[::2] for w in (entry / "environ").read_bytes().split(b"\0"))
                rank = words.get(b"PMI_RANK", words.get(b"OMPI_COMM_WORLD_RANK", b"0"))
                is_python = b"-m\0iterreduce" in (entry / "cmdline").read_bytes().partition(b"mpirun")[0]
                if words.get(b"ITERREDUCE_TEST_RUN") == run.encode() and is_python:
                    found.setdefault(int(rank), int(entry.name))
    return found


def read_json(path: Path) -> dict | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def resumed_at(path: Path) -> int | None:
    """The iteration of the checkpoint that an attempt went on from, as far as its events tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "restart":
                return event["iteration"]
    return None


# ------------------------------------------------------------------------------- what came of it


def table(reports: list[Report]) -> Iterator[str]:
    """By program, then by phase."""
    verdicts = ("ok", "wrong", "hung", "lost")
    yield (f"{'program':12}{'runs':>6}" + "".join(f"{v:>7}" for v in verdicts) + "  from a saved   refused")
    for name in (*PROGRAMS, "all"):
        mine = [r for r in reports if name in (r.case.program, "all")]
        if mine:
            counts = Counter(r.verdict for r in mine)
            numbers = [counts[v] for v in verdicts]
            numbers += [sum(r.resumed for r in mine), sum(r.refused for r in mine)]
            yield f"{name:12}{len(mine):6}" + "{:7}{:7}{:7}{:7}{:15}{:10}".format(*numbers)
    struck = Counter(what.split(":")[0] for r in reports for what in r.struck)
    kills = sum(struck[phase] for phase in PHASES) or 1
    yield ""
    yield "kills that struck, by phase: " + ", ".join(f"{phase} {struck[phase]}" for phase in PHASES)
    inside = sum(struck[phase] for phase in INSIDE)
    yield f"inside {', '.join(INSIDE)}: {inside} of {kills} ({100 * inside / kills:.0f} %)"
    other = {what: n for what, n in struck.items() if what not in PHASES}
    yield "other faults that struck: " + (", ".join(f"{what} {n}" for what, n in other.items()) or "none")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="this run alone")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--jobs", type=int, default=1, help="so many runs at a time")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for an attempt")
    parser.add_argument("--no-checkpoints", action="store_true", help="every attempt begins anew")
    parser.add_argument("--keep", action="store_true", help="leave all files")
    given = parser.parse_args()
    programs = tuple(given.programs.split(","))
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    campaign, before = Campaign(work, not given.no_checkpoints, given.timeout), segments()
    reports: list[Report] = []

    def one(number: int) -> None:
        report = campaign.run(plan(given.seed, number, programs))
        reports.append(report)
        struck = ", ".join(report.struck) or "nothing struck"
        lines = [f"{report.verdict:5} {report.case}  | {struck} | {report.seconds:.1f} s", *report.odd]
        print("\n".join(lines).replace("\n", "\n    "), flush=True)
        if not given.keep:
            shutil.rmtree(campaign.place(number), ignore_errors=True)

    started = time.monotonic()
    try:
        campaign.prepare(programs)
        numbers = [given.only] if given.only is not None else range(given.first, given.first + given.runs)
        with ThreadPoolExecutor(given.jobs) as pool:
            for _ in pool.map(one, numbers):
                pass
        print("", *table(reports), f"{time.monotonic() - started:.0f} s", sep="\n")
    finally:
        campaign.close()
        sweep(segments() - before)
        if given.keep:
            print(f"files: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    return int(any(report.verdict != "ok" for report in reports))


if __name__ == "__main__":
    raise SystemExit(main())
