"""What happens in the runs of `chaos`: programs, ranks, and failures, drawn from a seed."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from iterreduce.testing import DeleteFile, FailCall, Fault, FillDisk, FlipBit, Kill, TearFile  # noqa: E402

MOST_RANKS = 4
FEW, SOME = (1, 1, 2, 2, 3, 4), (2, 2, 2, 3, 3, 4)  # ranks: start-up is most of what a run costs

#: Where ranks are killed, and which of these places stand inside what must be all or nothing.
PHASES = (
    "load", "map", "exchange", "control", "commit", "copy", "write", "publish", "restart", "end", "any time",
    "launcher",
)  # fmt: skip
#: Others, of runs that have them: a whole host is lost; a new rank, or one that waits for it, is killed.
HOST, NEWCOMER = "host", "newcomer"
#: All that happens to a job.
JOB = "job"
#: Of jobs of Slurm, and how often: a rank, the launcher or the script is killed; the signal before the limit,
#: a signal to the ranks, an operator's requeue, a job of higher priority, the user's scancel; the limit
#: itself; what watches a step on a node is killed, a node's daemon, or all of a node.
DEEDS = {
    "rank": 3, "srun": 2, "script": 1, "wish": 3, "signal": 2, "requeue": 3, "preempt": 2, "cancel": 1,
    "limit": 1, "step": 3, "daemon": 2, "node": 3,
}  # fmt: skip
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
#: Where further ranks die once one has died, and others go on.
_LATER = ("rank.lost", "recovery.start", "load", "recovery.end", "exchange.ready", "control.ready", "run.end")
_SAVING = ("copy", "write", "publish", "restart")


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
    names = rng.permutation(1200).reshape(40, 30)
    np.savez(path, src=names[:, :-1].ravel(), dst=names[:, 1:].ravel())


def roads(path: Path) -> None:
    """A grid with lengths."""
    rng, at = np.random.default_rng(4), np.arange(20 * 20).reshape(20, 20)
    src = np.concatenate([at[:, :-1].ravel(), at[:-1].ravel()])
    dst = np.concatenate([at[:, 1:].ravel(), at[1:].ravel()])
    np.savez(path, src=src, dst=dst, weight=rng.integers(1, 100, len(src)))


WEB = ("--tolerance", "0", "--max-iterations", "30")
KMEANS = ("--k", "20", "--tolerance", "0", "--max-iterations", "30")
PROGRAMS = {
    program.name: program
    for program in (
        Program("kmeans", "apps/kmeans.py", points, KMEANS, 30, "points.npy"),
        Program("pagerank", "benchmarks/waist/pagerank.py", web, WEB, 30, "web.npz"),
        Program("components", "benchmarks/waist/components.py", chains, (), 30, "chains.npz"),
        Program("sssp", "benchmarks/waist/sssp.py", roads, ("0", "--symmetric"), 40, "roads.npz"),
    )
}  # fmt: skip


# ------------------------------------------------------------------------------- what will happen


@dataclass(frozen=True)
class Deed:
    """What is done to a job of Slurm: ``after`` so many seconds from when ranks of a start of it are there.
    ``draw`` chooses among ranks and nodes; ``damage``: to checkpoints, before the job starts again.
    """

    kind: str
    after: float
    draw: int
    damage: Fault | None = None

    def __str__(self) -> str:
        return f"{self.kind}{f' {type(self.damage).__name__}' if self.damage else ''}"


@dataclass(frozen=True)
class Attempt:
    """One start of the program. ``outside``: seconds after the ranks are there until they are killed."""

    ranks: int
    phase: str = ""
    victims: tuple[int, ...] = ()
    faults: tuple[Fault, ...] = ()
    outside: float | None = None
    damage: Fault | None = None
    later: tuple[int, ...] = ()
    host: int = 0
    newcomer: float | None = None  # seconds after new ranks are there until one rank is killed: a new one,
    newest: bool = True  # or one of the others
    deeds: tuple[Deed, ...] = ()  # to one start of the job after another

    @property
    def leaves_some(self) -> bool:
        """Whether some rank is not to die."""
        return self.phase not in ("", HOST) and len({*self.victims, *self.later}) < self.ranks

    def __str__(self) -> str:
        whole = self.phase in ("launcher", HOST)
        whom = self.phase if whole else whom_of(len(self.victims), self.ranks)
        hurt = f"{type(self.damage).__name__} " if self.damage else ""
        whom += (", later others" if self.leaves_some else ", later all") if self.later else ""
        whom += "" if self.newcomer is None else ", then a new one" if self.newest else ", then an old one"
        disk = next((f" {type(f).__name__}" for f in self.faults if isinstance(f, FailCall | FillDisk)), "")
        disk += f" [{', '.join(map(str, self.deeds))}]" if self.deeds else ""
        return f"{hurt}{self.ranks}:{self.phase or 'undisturbed'}{f'({whom})' if self.phase else ''}{disk}"


@dataclass(frozen=True)
class Way:
    """How a run is started, and goes on where ranks die. ``respawns``: so often new ranks come."""

    recovers: bool = False
    supervised: bool = False
    respawns: int = 0
    hosts: int = 0
    slurm: bool = False


#: What a mixed campaign goes round: each way gets its share, those that take longer a smaller one.
_FAST = Way(), Way(supervised=True), Way(hosts=3)
_MIXED = (*_FAST, Way(), *_FAST[:2], Way(supervised=True, hosts=3), *_FAST, Way(slurm=True))
_ULFM = Way(True), Way(True, supervised=True), Way(True, True, 2), Way(True, hosts=3)
_MIXED_ULFM = (
    *_ULFM, Way(), *_ULFM[:3], Way(True, True, hosts=3), Way(True), *_FAST, *_ULFM[:2],
    Way(True, True, 2, hosts=3), Way(True, respawns=2), Way(slurm=True), Way(True, slurm=True),
)  # fmt: skip


def mixed(number: int, ulfm: bool, hosts: bool, slurm: bool) -> tuple[Way, int]:
    """The way of this run, and its number among those of that way, which all begin elsewhere."""
    ways = _MIXED_ULFM if ulfm else _MIXED
    ways = [way for way in ways if (hosts or not way.hosts) and (slurm or not way.slurm)]
    round_, at = divmod(number, len(ways))
    before = sum(way == ways[at] for way in ways[:at])
    return ways[at], round_ * ways.count(ways[at]) + before + 7 * ways.index(ways[at])


@dataclass(frozen=True)
class Case:
    """One run of the campaign. ``respawns``: so often new ranks come; ``supervised``: started by `run`."""

    number: int
    program: str
    every: int
    attempts: tuple[Attempt, ...]
    files: str
    recovers: bool = False
    saves: bool = True
    respawns: int = 0
    supervised: bool = False
    hosts: int = 0
    slurm: bool = False

    @property
    def mode(self) -> str:
        """How it goes on where ranks die, and where they are."""
        how = "respawn" if self.respawns else "in place" if self.recovers else "again"
        how += ", supervised" if self.supervised else ""
        how += ", Slurm" if self.slurm else ""
        return how + (f", {self.hosts} hosts" if self.hosts else "")

    def __str__(self) -> str:
        saves = f"every {self.every:2}" if self.saves else "unsaved "
        attempts = "  ".join(map(str, self.attempts))
        return f"{self.number:4} {self.program:10} {self.mode}: {saves}  {attempts}"


def phases_in(text: str) -> list[str]:
    """Of the kills inside the program that a text tells of."""
    places = re.findall(r"iterreduce\.testing: Kill\(at='([^']*)'", text)
    return [next((phase for phase, of in _PLACES.items() if place in of), "any time") for place in places]


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
    every = rng.randint(2, 6)
    attempts = [disturbed(rng, program, every, phase, i) for i, phase in enumerate(phases)]
    last = Attempt(rng.choice(FEW), damage=drawn_damage(rng))
    return Case(number, program, every, (*attempts, last), rng.choice(("node", "node", "rank")))


def goes(case: Case, seed: int, way: Way) -> Case:
    """The same run, this way."""
    case = recovering(case, seed) if way.recovers else case
    case = respawning(case, seed, way.respawns) if way.respawns else case
    case = replace(case, supervised=way.supervised)
    case = as_job(case, seed) if way.slurm else case
    return on_hosts(case, seed, way.hosts) if way.hosts else case


def recovering(case: Case, seed: int) -> Case:
    """The same run, where survivors go on: more of them may die, and nothing may be saved."""
    rng = random.Random(f"{seed}/{case.number}/in place")
    attempts = [spared(rng, each) if rng.random() < 0.7 else each for each in case.attempts]
    attempts = [more_die(rng, each) if rng.random() < 0.5 else each for each in attempts]
    needs_files = any(each.phase in _SAVING for each in attempts)
    saves = needs_files or rng.random() < 0.6
    return replace(case, attempts=tuple(attempts), recovers=True, saves=saves)


def respawning(case: Case, seed: int, times: int) -> Case:
    """The same run, where new ranks come for the lost: one of them, or one that waits for it, may die."""
    rng = random.Random(f"{seed}/{case.number}/respawn")
    attempts = [joined(rng, each) if rng.random() < 0.6 else each for each in case.attempts]
    return replace(case, attempts=tuple(attempts), respawns=times)


def joined(rng: random.Random, attempt: Attempt) -> Attempt:
    if not attempt.leaves_some or attempt.phase == "launcher":
        return attempt
    return replace(attempt, newcomer=rng.choice((0.0, rng.uniform(0, 1.5))), newest=rng.random() < 0.6)


def on_hosts(case: Case, seed: int, hosts: int) -> Case:
    """The same run on several hosts, some of which are lost."""
    rng = random.Random(f"{seed}/{case.number}/hosts")
    attempts = [lost(rng, each) if rng.random() < 0.25 else each for each in case.attempts]
    attempts = [replace(each, ranks=max(2, each.ranks)) for each in attempts]
    return replace(case, attempts=tuple(attempts), hosts=hosts)


def as_job(case: Case, seed: int) -> Case:
    """The same run as a job of Slurm that queues itself again: what was to happen to all attempts happens to
    its starts, each fault once. Where it is given up, another job of the same script follows.
    """
    rng = random.Random(f"{seed}/{case.number}/job")
    kinds = [kind for kind, times in DEEDS.items() for _ in range(times)]
    deeds = [drawn_deed(rng, kinds[(case.number * 7 + seed) % len(kinds)])]
    while len(deeds) < 4 and rng.random() < 0.45:
        deeds.append(drawn_deed(rng, rng.choice(kinds)))
    first, last = case.attempts[0], case.attempts[-1]
    faults = tuple(fault for each in case.attempts for fault in each.faults)
    job = replace(
        first, phase=JOB, faults=faults, outside=None, deeds=tuple(deeds), ranks=max(2, first.ranks)
    )
    return replace(case, attempts=(job, replace(last, damage=None)), saves=True, slurm=True)


def drawn_deed(rng: random.Random, kind: str) -> Deed:
    return Deed(
        kind,
        rng.choice((0.0, *(rng.uniform(0, 2.5) for _ in range(4)))),
        rng.randrange(64),
        drawn_damage(rng),
    )


def lost(rng: random.Random, attempt: Attempt) -> Attempt:
    """Instead of what was to happen."""
    if not attempt.phase:
        return attempt
    return Attempt(
        max(2, attempt.ranks), HOST, (), (), rng.uniform(0, 3), attempt.damage, host=rng.randrange(8)
    )


def spared(rng: random.Random, attempt: Attempt) -> Attempt:
    """One rank lives where all were to die."""
    if attempt.ranks == 1 or len(attempt.victims) < attempt.ranks:
        return attempt
    lives = rng.randrange(attempt.ranks)
    victims = tuple(rank for rank in attempt.victims if rank != lives)
    faults = tuple(f for f in attempt.faults if not (isinstance(f, Kill) and f.rank == lives))
    return replace(attempt, victims=victims, faults=faults)


def more_die(rng: random.Random, attempt: Attempt) -> Attempt:
    """One or more of the survivors, later."""
    left = [rank for rank in range(attempt.ranks) if rank not in attempt.victims]
    if not left or not attempt.faults or not attempt.phase:
        return attempt
    later = tuple(rng.sample(left, rng.randint(1, len(left))))
    nth = {place: 1 if place in ("load", "run.end") else rng.randint(1, 2) for place in _LATER}
    nth |= {place: rng.randint(5, 20) for place in ("exchange.ready", "control.ready")}
    places = {rank: rng.choice(_LATER) for rank in later}
    kills = tuple(Kill(at=at, rank=rank, nth=nth[at]) for rank, at in places.items())
    return replace(attempt, faults=(*attempt.faults, *kills), later=later)


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
