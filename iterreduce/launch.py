"""Ranks of the command line start together and leave together, with one message.

Start: under a launcher MPI is started within a time limit, and its number of ranks is compared with the
number that the launcher says. Alone, MPI is not touched. End: a failing rank meets the others on a
communicator of its own. When all come, they failed alike: rank 0 speaks and all leave in order. When they do
not come, a bug or a broken machine hit some ranks only: one of the failing ranks of a node speaks, and the
job is ended.

For the command line only: a library must neither watch its host program nor end it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import select
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from iterreduce.aside import Channel
from iterreduce.collectives import Group, SoloGroup, aside, joined, launched_size, world
from iterreduce.errors import DisagreementError, LaunchError
from iterreduce.refilling import Charter
from iterreduce.start import joins, launched_rank
from iterreduce.supervising import vitals

#: Ranks that fail alike have this time to meet, more where many ranks may share few cores; a rank that failed
#: alone waits it out.
PATIENCE_SECONDS = 2.0
PATIENCE_SECONDS_PER_RANK = 0.1
#: How long the speaker of a node counts who else failed.
LINGER_SECONDS = 0.5
#: mpirun may end on an abort before it has read what the ranks wrote just before.
FORWARD_SECONDS = 0.1

#: Begins the key of a job that is known by its parent process only, which may have started other jobs too.
_GUESSED = "parent-"

#: Launchers that do not tell the number of ranks tell the rank.
_RANK_SIGNS = (
    "PMIX_RANK",
    "PMI_RANK",
    "PALS_RANKID",
    "ALPS_APP_PE",
    "JSM_NAMESPACE_RANK",
    "FLUX_TASK_RANK",
    "MV2_COMM_WORLD_RANK",
)

_ADVICE = (
    f"If mpirun or srun belongs to another MPI than mpi4py does: use the mpirun beside {sys.executable}, "
    "or under Slurm the right `srun --mpi=`\n(`srun --mpi=list`; pmi2 for MPICH, pmix for Open MPI), "
    "or reinstall mpi4py for this MPI."
)


@dataclass(frozen=True)
class Problem:
    """Why this process does not go on: its exit status and what to say, which may be nothing.

    `for_all`: this rank looked on behalf of all, so that the others have no problem says nothing.
    """

    status: int
    text: str
    for_all: bool = False

    def pack(self) -> bytes:
        return json.dumps([self.status, self.text, self.for_all]).encode()


INTERRUPTED = Problem(130, "iterreduce: interrupted")
TERMINATED = Problem(143, "iterreduce: terminated")


@dataclass(frozen=True)
class Crew:
    """The ranks of the run: the group that works, and a channel for the farewell that nothing else uses."""

    group: Group
    farewell: Channel
    job: str
    charter: Charter | None = None  # of a rank that takes the place of a lost one

    @property
    def alone(self) -> bool:
        return self.group.size == 1


# -- start ---------------------------------------------------------------------------------------------------


def is_launched() -> bool:
    """Whether a launcher started this process as one of several, as far as the environment tells."""
    size = launched_size()
    if size is not None:
        return size > 1 or joins()
    return any(name in os.environ for name in _RANK_SIGNS)


def join(timeout_seconds: float, forked: Callable[[], None] = lambda: None, recovers: bool = False) -> Crew:
    """All ranks, after the handshake; LaunchError when the launcher and MPI do not agree.

    `forked` is called in a child process that stands by meanwhile. With `recovers` the ranks go on without
    those that die, where they can. Collective.
    """
    if joins():
        return _join_others(timeout_seconds, forked)
    if not is_launched():
        return Crew(SoloGroup(), SoloGroup(), job_key())
    with _time_limit(timeout_seconds, forked), warnings.catch_warnings():
        # mpi4py's own guess at what _check_size finds out, from every rank.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment")
        group = world(recovers=recovers)
        _check_size(group)
        job = group.bcast_bytes(os.urandom(8).hex().encode()).decode()
        return Crew(group, aside(group), job)


def _join_others(timeout_seconds: float, forked: Callable[[], None]) -> Crew:
    """Ranks that have lost others wait for this one. Collective, with those."""
    with _time_limit(timeout_seconds, forked):
        found = joined()
    if found is None:  # they go on without it, and have said so
        vitals.leave(0)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
    group, charter = found
    return Crew(group, aside(group), charter.job, charter)


def _check_size(group: Group) -> None:
    launched = launched_size()
    if launched is None or launched == group.size:
        return
    raise LaunchError(
        f"the launcher started {launched} processes, but MPI sees {group.size} "
        f"({group.library}, through mpi4py).\n{_ADVICE}"
    )


@contextlib.contextmanager
def _time_limit(seconds: float, forked: Callable[[], None]) -> Iterator[None]:
    """End the process with a message when the block takes longer.

    MPI_Init holds the interpreter's lock while it waits, so no Python thread can speak then: a child process
    does (of ranks 0 and 1, one of which is there when the other is missing), and faulthandler's own thread
    ends this process.
    """
    child = _fork_speaker(seconds, forked) if launched_rank() < 2 else None
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds + 2 * LINGER_SECONDS, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            if child is not None:
                pid, pipe = child
                with contextlib.suppress(BrokenPipeError):  # it was killed
                    os.write(pipe, b"met")
                os.close(pipe)
                os.waitpid(pid, 0)


def _fork_speaker(seconds: float, forked: Callable[[], None]) -> tuple[int, int]:
    """A child that speaks when nothing came through the pipe for `seconds`, or when we ended before."""
    watched, pipe = os.pipe()
    pid = os.fork()
    if pid:
        os.close(watched)
        return pid, pipe
    try:
        forked()
        os.close(pipe)
        ended, _, _ = select.select([watched], [], [], seconds)
        if not ended:
            speak_for_all(job_key(), _late(seconds))
        elif not os.read(watched, 3):
            speak_for_all(
                job_key(), f"iterreduce: MPI ended rank {launched_rank()} while it started.\n{_ADVICE}"
            )
    finally:
        os._exit(0)


def _late(seconds: float) -> str:
    launched = launched_size()
    return (
        f"iterreduce: after {seconds:g} s not all of the {launched or ''} ranks have met: "
        "one did not start, hangs while it loads the app, or ended early.\n"
        f"Rank {launched_rank()} on {socket.gethostname()} waits in MPI_Init. "
        "Where start-up is slow, set ITERREDUCE_START_TIMEOUT to more seconds."
    )


def agree(crew: Crew, problem: Problem | None, digest: str) -> Problem | None:
    """What all ranks make of the problems that some have: None when none has one and all digests are equal.

    The text is that of the lowest rank with a problem, and is spoken by rank 0: others get an empty one.

    Collective.
    """
    packed = crew.farewell.allgather_bytes(problem.pack() if problem else digest.encode())
    problems = _unpacked(packed)
    if not problems and len(set(packed)) > 1:
        other = next(rank for rank, data in enumerate(packed) if data != packed[0])
        error = DisagreementError(
            f"rank {other} has another app, other arguments or other settings than rank 0: "
            "compare the app file, iterreduce.toml and ITERREDUCE_* on their hosts"
        )
        problems = {0: Problem(1, f"iterreduce: {error}", for_all=True)}
    return _common(crew, problems) if problems else None


def _unpacked(packed: list[bytes]) -> dict[int, Problem]:
    """Problems by rank; a digest is no JSON list."""
    return {rank: Problem(*json.loads(data)) for rank, data in enumerate(packed) if data.startswith(b"[")}


def _common(crew: Crew, problems: dict[int, Problem]) -> Problem:
    (rank, lowest), size = min(problems.items(), key=lambda item: item[0]), crew.group.size
    text = lowest.text
    if len(problems) < size and not lowest.for_all:
        text = text or _left_alone(lowest)
        text += f"\n({len(problems)} of {size} ranks failed; this is rank {rank})"
    elif text and len({problem.text for problem in problems.values()}) > 1:
        text += f"\n({size} ranks failed; this is rank {rank})"
    return Problem(lowest.status or int(len(problems) < size), text if crew.group.rank == 0 else "")


# -- end -----------------------------------------------------------------------------------------------------


def leave(crew: Crew, problem: Problem) -> Problem:
    """The problem to speak of and leave with, if all ranks come in time; otherwise does not return.

    They come here, or to the next `agree`: both are the same exchange, so nobody waits in another.
    """
    if crew.alone:
        return problem
    done = threading.Event()
    patience = PATIENCE_SECONDS + PATIENCE_SECONDS_PER_RANK * crew.group.size
    threading.Thread(target=_lose_patience, args=(crew, problem, done, patience), daemon=True).start()
    try:
        packed = crew.farewell.allgather_bytes(problem.pack())
    except Exception as error:
        if not crew.group.is_loss(error):
            raise
        threading.Event().wait()  # for that thread: nobody is left to part from in order
    done.set()
    return _common(crew, _unpacked(packed))


def _left_alone(problem: Problem) -> str:
    return f"iterreduce: a rank left by sys.exit({problem.status}), the others did not"


def _lose_patience(crew: Crew, problem: Problem, done: threading.Event, seconds: float) -> None:
    """On a thread: the main one waits for ranks that do not come."""
    if done.wait(seconds):
        return
    status = problem.status or 1
    text = problem.text or _left_alone(problem)
    rank, size = crew.group.rank, crew.group.size
    where = f"this is rank {rank} on {socket.gethostname()}"
    speak_for_all(crew.job, text, lambda failed: f"({failed} of {size} ranks failed; {where})")
    vitals.leave(status, "alone")
    abort(crew, status)


def abort(crew: Crew, status: int) -> None:
    """End all ranks; the launcher gets our status.

    Any thread may call it, because it is the last call of MPI; should it hang, faulthandler's thread ends the
    process.
    """
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(4 * LINGER_SECONDS, exit=True, file=nowhere)
        crew.group.abort(status)


def end_now(crew: Crew, problem: Problem) -> NoReturn:
    """Say the problem once per node and end this process; every rank does so."""
    if crew.alone:
        say(problem.text)
    else:
        speak_for_all(crew.job, problem.text)
    vitals.leave(problem.status, "asked")
    sys.stdout.flush()
    if crew.group.heals:  # the launcher lets the others go on, and MPI does not see that a rank has left
        abort(crew, problem.status)
    os._exit(problem.status)


def speak_for_all(job: str, text: str, count: Callable[[int], str] | None = None) -> None:
    """Print `text` if this process is the first of its node to fail; the others wait to be ended.

    `count` makes a last line of the number of processes of this node that fail within half a second.
    """
    place = _meeting_place(job)
    if place is None:
        say(text)
        return
    with contextlib.suppress(OSError):
        (place / f"failed-{os.getpid()}").touch()
    try:
        os.close(os.open(place / "speaker", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        time.sleep(6 * LINGER_SECONDS)
        if job.startswith(_GUESSED):
            say(text)  # still here: the speaker was none of ours
        return
    if count is not None:
        time.sleep(LINGER_SECONDS)
        text += "\n" + count(sum(1 for _ in place.glob("failed-*")))
    say(text)


def say(text: str) -> None:
    """One write to standard error, so that lines of ranks do not mix, and time for mpirun to pass it on."""
    if text:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text.rstrip("\n") + "\n")
            sys.stderr.flush()
            if is_launched():
                time.sleep(FORWARD_SECONDS)


def job_key() -> str:
    """What the processes of one job on one node have in common before MPI is up."""
    known = os.environ.get("PMIX_NAMESPACE") or _slurm_step()
    launcher = known or f"{os.getppid()}"
    digest = hashlib.sha256(f"{socket.gethostname()} {launcher}".encode()).hexdigest()[:16]
    return digest if known else _GUESSED + digest


def _slurm_step() -> str:
    if "SLURM_STEP_NUM_TASKS" not in os.environ:
        return ""
    return f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"


def _meeting_place(job: str) -> Path | None:
    """A directory of this user where failing ranks of a node meet; made by the first that fails."""
    base = Path(tempfile.gettempdir())
    place = base / f"iterreduce-failed-{os.getuid()}-{job}"
    try:
        _sweep(base)
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError:
        return None
    return place if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() else None


def _sweep(base: Path, older_than_seconds: float = 600.0) -> None:
    """Remove the meeting places of jobs that failed long ago."""
    for old in base.glob(f"iterreduce-failed-{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > older_than_seconds:
                for file in old.iterdir():
                    file.unlink(missing_ok=True)
                old.rmdir()
