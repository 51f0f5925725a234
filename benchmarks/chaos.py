"""A campaign of failures: runs that are killed and damaged, and started again until they finish.

    python benchmarks/chaos.py --runs 300 --seed 1 --jobs 3
    python benchmarks/chaos.py --seed 1 --only 17 --keep     one of them again, files and all
    python benchmarks/chaos.py --recover auto                where the MPI can: survivors go on in place
    python benchmarks/chaos.py --respawn 2 --supervised      new ranks come for the lost, and die as well
    python benchmarks/chaos.py --hosts 3                     on network namespaces, some of which are lost
    python benchmarks/chaos.py --slurm                       as jobs that queue themselves again
    python benchmarks/chaos.py --mix --minutes 40            all of these in turn, as far as the time goes

Every run is a pure function of the seed and its number: a program, and attempts at it, each with a number of
ranks and what goes wrong: ranks killed (one, several, all, or the launcher) at a place inside the program
(`iterreduce.testing`) or from outside at any moment, a whole host, the newest checkpoint torn, flipped or
deleted before the next attempt, a disk that is full. Attempts follow until one finishes. Its result must have
the digest of the undisturbed run (wrong), every attempt must get on until it ends (hung: no event and no word
for ``--timeout``), and one without faults must finish (lost). What hangs tells where each rank stands.

With Open MPI every other run has a launcher that tolerates deaths (`--recover both`): survivors go on in
place there, more ranks may die later or while others recover, and some of these runs have no checkpoints. An
attempt that leaves a rank alive and does not finish is no error, since the next one goes on, but is shown.

``--supervised``: `python -m iterreduce run` makes the attempts, and each fault strikes once; what it gives up
is shown, and another attempt follows. ``--slurm``: a run is a job that queues itself again, on a virtual
cluster of the campaign (as root), and the same holds. Campaigns may run side by side, with other seeds. At
SIGTERM, or after ``--minutes``, a campaign finishes the runs that it has begun, and says what came of all.

Iterations are made slower on purpose, by sleeping, so that small inputs leave time for several checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chaos_places import FAULTS, Here, newcomers_of, place, ranks_of  # noqa: E402
from benchmarks.chaos_plan import (  # noqa: E402
    DEEDS,
    HOST,
    INSIDE,
    JOB,
    MOST_RANKS,
    NEWCOMER,
    PHASES,
    PROGRAMS,
    Attempt,
    Case,
    Way,
    goes,
    mixed,
    phases_in,
    plan,
)
from benchmarks.chaos_slurm import Jobs, Slurm  # noqa: E402
from iterreduce.start import prepare_environment  # noqa: E402
from iterreduce.testing import Faults, Kill, Slow, damage  # noqa: E402
from tests.hosts.network import why_not  # noqa: E402
from tests.launch import is_open_mpi, kill_run, segments, sweep  # noqa: E402
from tests.slurm.cluster import missing  # noqa: E402

PAUSE, PAUSE_OF_JOBS = 0.01, 0.03  # per iteration, seconds
#: Seconds that ranks have to meet: so many times what a whole undisturbed run takes, within bounds.
MEETING, MEETING_BOUNDS = 6, (15.0, 60.0)
MOST_TIMES = 10  # the time-out, for an attempt that gets on and does not end


# ------------------------------------------------------------------------------- doing it


@dataclass
class Report:
    """What came of a run."""

    case: Case
    verdict: str = ""
    struck: list[str] = field(default_factory=list)
    resumed: int = 0
    refused: int = 0
    recoveries: Counter[str] = field(default_factory=Counter)
    fell: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class End:
    """How an attempt ended. ``summary``: of the run, if it finished."""

    status: int | None
    text: str
    summary: dict | None
    resumed: int | None
    done: list[str]

    @property
    def recoveries(self) -> list[dict]:
        """In place."""
        return self.summary.get("recoveries", []) if self.summary else []


class Campaign:
    """Where things lie, and how attempts are started."""

    def __init__(self, work: Path, saving: bool, timeout: float):
        self.work, self.saving, self.timeout = work, saving, timeout
        self.expected: dict[str, str] = {}
        self.orphans: list[str] = []
        self.slurm = Slurm()
        self.meeting = MEETING_BOUNDS[1]

    def prepare(self, programs: tuple[str, ...]) -> None:
        """Inputs, and the digests of undisturbed runs on one rank and on three."""
        took = []
        for name in programs:
            program = PROGRAMS[name]
            program.make(self.work / program.input)
            calm = Case(0, name, 0, (), "node", saves=False)
            ends = []
            for ranks in (1, 3):
                began = time.monotonic()
                ends.append(self.attempt(calm, Attempt(ranks), self.work / "saved", Here()))
            took.append(time.monotonic() - began)
            digests = {end.summary["result_sha256"] if end.summary else end.text for end in ends}
            if len(digests) != 1:
                raise SystemExit(f"{name}: undisturbed runs differ or fail: {digests}")
            self.expected[name] = digests.pop()
            iterations = ends[0].summary["iterations"]
            print(f"{name}: {iterations} iterations, {took[-1]:.1f} s on 3 ranks", flush=True)
        self.meeting = min(max(MEETING_BOUNDS[0], MEETING * sorted(took)[len(took) // 2]), MEETING_BOUNDS[1])

    def attempt(self, case: Case, attempt: Attempt, saved: Path, where: Here, fresh: bool = False) -> End:
        """Start it, do what is to be done from outside, and wait for its end."""
        folder = Path(tempfile.mkdtemp(dir=saved.parent))
        command = self._command(case, attempt, saved, where, folder, fresh)
        run = f"chaos-{os.getpid()}-{folder.parent.name}-{folder.name}"
        with (folder / "said").open("w+b") as said:
            process = where.start(command, self._environment(case, attempt, folder), run, said, attempt)
            status = self._wait(process, attempt, run, (folder / "events", folder / "said"), where)
            said.seek(0)
            text = said.read().decode(errors="replace")
            if status is None:
                text += "\nlast events:\n" + "\n".join(lines_of(folder / "events")[-6:])
        if attempt.phase == "launcher":  # the orphans go on beside the next attempt
            self.orphans.append(run)
        else:
            kill_run(run)
            where.clear()
        files = read_json(folder / "summary"), resumed_at(folder / "events")
        end = End(status, text, *files, where.done())
        stopped = (end.summary or {}).get("outcome") == "STOPPED_SAVED"  # another start was to follow
        if stopped or (status != 0 and (case.slurm or not case.respawns)):  # mpirun's: nothing after a spawn
            end.summary = None
        return end

    def _command(
        self, case: Case, attempt: Attempt, saved: Path, where: Here, folder: Path, fresh: bool
    ) -> list[str]:
        program = PROGRAMS[case.program]
        options = ["--reproducible", "--quiet", "--summary", f"{folder}/summary"]
        options += ["--events", f"{folder}/events", "--recover", "auto" if case.recovers else "off"]
        options += ["--respawn", str(case.respawns)] if case.respawns else []
        if case.saves and self.saving:
            options += ["--checkpoint-dir", str(saved), "--checkpoint-every", str(case.every)]
            options += ["--checkpoint-files", case.files, *(["--fresh"] if fresh else [])]
        words = "-m", "iterreduce", *options, program.app, str(self.work / program.input), *program.arguments
        if case.supervised:
            return where.supervised(attempt.ranks, words)
        if attempt.ranks == 1 and not case.slurm and attempt.phase != "launcher" and not case.hosts:
            return [sys.executable, *words]  # without MPI
        return where.command(attempt.ranks, words, case.recovers)

    def _environment(self, case: Case, attempt: Attempt, folder: Path) -> dict[str, str]:
        marks = None
        if case.supervised or case.respawns or case.slurm:  # who comes for the dead lives
            marks = str(folder / "marks")
            os.mkdir(marks)
        pause = PAUSE_OF_JOBS if case.slurm else PAUSE
        faults = Faults((*attempt.faults, Slow(pause, at="iteration.start")), marks=marks).to_json()
        return {
            FAULTS: faults,
            "PYTHONFAULTHANDLER": "1",
            "ITERREDUCE_RECOVER_TIMEOUT": f"{self.meeting / 3:.0f}",
            "ITERREDUCE_START_TIMEOUT": f"{self.meeting:.0f}",
        }

    def close(self) -> None:
        """Leave no process behind."""
        for run in self.orphans:
            kill_run(run)
        self.slurm.close()

    def _wait(
        self, process: subprocess.Popen, attempt: Attempt, run: str, signs: tuple[Path, ...], where: Here
    ) -> int | None:
        """Its status; None where it hangs: these files do not grow."""
        last = time.monotonic() + MOST_TIMES * self.timeout
        if attempt.outside is not None:
            self._strike(process, attempt, run, where, time.monotonic() + self.timeout)
        told, since = sizes_of(signs), time.monotonic()
        if attempt.newcomer is not None:
            self._strike_newcomer(process, attempt, run, time.monotonic() + self.timeout)
        while time.monotonic() < min(since + self.timeout, last):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(0.1)
            if sizes_of(signs) != told:
                told, since = sizes_of(signs), time.monotonic()
        for pid in ranks_of(run).values():  # each tells where it stands
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        time.sleep(2)
        kill_run(run)
        where.end(process)
        return None

    def _strike_newcomer(self, process: subprocess.Popen, attempt: Attempt, run: str, until: float) -> None:
        """Kill a new rank, or one that waits for it, if one comes."""
        while process.poll() is None and not newcomers_of(run) and time.monotonic() < until:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(attempt.newcomer)
        pids = newcomers_of(run) if attempt.newest else [*ranks_of(run).values()]
        for pid in pids[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _strike(
        self, process: subprocess.Popen, attempt: Attempt, run: str, where: Here, deadline: float
    ) -> None:
        """Kill ranks from outside, some time after they are there."""
        while process.poll() is None and len(ranks_of(run)) < attempt.ranks and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(attempt.outside)
        if attempt.phase == HOST:
            where.lose(attempt.host)
            return
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
        where = Jobs(self.slurm.cluster(), case.number) if case.slurm else place(case.hosts)
        try:
            return self._run(case, where)
        finally:
            where.close()

    def _run(self, case: Case, where: Here) -> Report:
        report, started = Report(case), time.monotonic()
        folder = self.place(case.number)
        folder.mkdir()
        saved = folder / "saved"
        attempts, fresh = list(case.attempts), False
        while not report.verdict:
            attempt = attempts.pop(0)
            if attempt.damage is not None and self.saving and case.saves:
                done = damage(replace(attempt.damage, path=f"{saved}/{attempt.damage.path}"), case.number)
                report.struck += [f"damage: {done}"] if done else []
            end = self.attempt(case, attempt, saved, where, fresh)
            report.resumed += end.resumed is not None
            report.struck += [*struck_in(attempt, end), *end.done]
            report.verdict = self._judge(case, end)
            report.recoveries += Counter(each["origin"] for each in end.recoveries)
            if end.status is None:
                report.odd.append(end.text[-9000:])
            elif (
                end.summary is None
                and attempt.phase != "launcher"
                and (case.supervised or case.slurm or (case.recovers and attempt.leaves_some))
            ):
                report.fell.append(f"status {end.status}: {end.text[-1500:]}")
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
        return [attempt.phase] if end.summary is None or end.recoveries else []
    if not attempt.phase:
        return []
    kinds = [type(fault).__name__ for fault in attempt.faults if not isinstance(fault, Kill)]
    disks = [kind for kind in kinds if f"{kind}(" in end.text]
    came = [NEWCOMER] if attempt.newcomer is not None and "new rank" in end.text else []
    if attempt.phase == JOB:
        return phases_in(end.text) + disks
    return ([attempt.phase] if "iterreduce.testing: Kill(" in end.text else []) + came + disks


def read_json(path: Path) -> dict | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def sizes_of(paths: tuple[Path, ...]) -> list[int]:
    """0 for a file that is not there."""
    return [path.stat().st_size if path.exists() else 0 for path in paths]


def lines_of(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").splitlines()
    return []


def resumed_at(path: Path) -> int | None:
    """The iteration of the checkpoint that an attempt went on from, as far as its events tell."""
    with contextlib.suppress(ValueError):
        for line in lines_of(path):
            event = json.loads(line)
            if event["event"] == "restart":
                return event["iteration"]
    return None


# ------------------------------------------------------------------------------- what came of it


def table(reports: list[Report]) -> Iterator[str]:
    """By program, then by phase."""
    verdicts = ("ok", "wrong", "hung", "lost")
    yield f"{'':30}{'runs':>6}" + "".join(f"{v:>7}" for v in verdicts) + "  from a saved   refused  s/run"
    modes = sorted({r.case.mode for r in reports})
    for name in (*PROGRAMS, *modes, "all"):
        mine = [r for r in reports if name in (r.case.program, r.case.mode, "all")]
        if mine:
            counts = Counter(r.verdict for r in mine)
            numbers = [counts[v] for v in verdicts]
            numbers += [sum(r.resumed for r in mine), sum(r.refused for r in mine)]
            numbers.append(sum(r.seconds for r in mine) / len(mine))
            yield f"{name:30}{len(mine):6}" + "{:7}{:7}{:7}{:7}{:15}{:10}{:7.1f}".format(*numbers)
    struck = Counter(what.split(":")[0] for r in reports for what in r.struck)
    phases = *PHASES, HOST, NEWCOMER, *DEEDS
    kills = sum(struck[phase] for phase in phases) or 1
    yield ""
    yield "kills that struck, by phase: " + ", ".join(
        f"{phase} {struck[phase]}" for phase in phases if struck[phase]
    )
    inside = sum(struck[phase] for phase in INSIDE)
    yield f"inside {', '.join(INSIDE)}: {inside} of {kills} ({100 * inside / kills:.0f} %)"
    other = {what: n for what, n in struck.items() if what not in phases}
    origins = sum((r.recoveries for r in reports), Counter())
    fell = sum(len(r.fell) for r in reports)
    yield f"recoveries in place in attempts that finished: {sum(origins.values())}, from " + (
        ", ".join(f"{origin} {n}" for origin, n in origins.items()) or "nowhere"
    )
    yield f"attempts with survivors that were started again all the same: {fell}"
    yield "other faults that struck: " + (", ".join(f"{what} {n}" for what, n in other.items()) or "none")


@cache
def has_hosts() -> bool:
    """Whether this machine can have some."""
    return why_not() is None


def chosen(given: argparse.Namespace, number: int, programs: int) -> tuple[Way, int]:
    """How this run goes, and its number in the plan."""
    if given.mix:
        return mixed(number, is_open_mpi(), has_hosts(), not missing())
    recover = given.recover or ("auto" if given.respawn else "both" if is_open_mpi() else "off")
    # programs and phases go round, too: each of them meets both
    in_place = (number + number // programs + number // (programs * len(PHASES))) % 2 == 1
    recovers = recover == "auto" or (recover == "both" and in_place)
    return Way(recovers, given.supervised, given.respawn if recovers else 0, given.hosts, given.slurm), number


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
    parser.add_argument("--timeout", type=float, default=180.0, help="hung: nothing happens for so long")
    parser.add_argument("--recover", choices=("both", "auto", "off"), help="default: both, off without ULFM")
    parser.add_argument("--respawn", type=int, default=0, help="so often new ranks come for lost ones")
    parser.add_argument("--supervised", action="store_true", help="`run` makes the attempts")
    parser.add_argument("--hosts", type=int, default=0, help="on so many network namespaces")
    parser.add_argument("--slurm", action="store_true", help="as jobs of a Slurm, started for it (as root)")
    parser.add_argument("--mix", action="store_true", help="all these ways in turn, as far as they can be")
    parser.add_argument("--minutes", type=float, help="begin no run after so long")
    parser.add_argument("--no-checkpoints", action="store_true", help="every attempt begins anew")
    parser.add_argument("--keep", action="store_true", help="leave all files")
    given = parser.parse_args()
    if given.slurm and (given.supervised or given.hosts):
        parser.error("--slurm has its own nodes, and its jobs queue themselves again")
    prepare_environment()  # the hosts compile nothing anew
    programs = tuple(given.programs.split(","))
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    campaign, before = Campaign(work, not given.no_checkpoints, given.timeout), segments()
    reports: list[Report] = []

    started = time.monotonic()
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())

    def one(number: int) -> None:
        if over.is_set() or (given.minutes and time.monotonic() - started > 60 * given.minutes):
            return
        way, at = chosen(given, number, len(programs))
        case = replace(goes(plan(given.seed, at, programs), given.seed, way), number=number)
        report = campaign.run(case)
        reports.append(report)
        struck = ", ".join(report.struck) or "nothing struck"
        recovered = sum(report.recoveries.values())
        struck += f" | {recovered} in place" if recovered else ""
        lines = [f"{report.verdict:5} {report.case}  | {struck} | {report.seconds:.1f} s"]
        lines += [*report.fell, *report.odd]
        print("\n".join(lines).replace("\n", "\n    "), flush=True)
        if not given.keep:
            shutil.rmtree(campaign.place(number), ignore_errors=True)

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
