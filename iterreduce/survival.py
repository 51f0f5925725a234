"""What the command line does where ranks may die and others go on (`Group.heals`).

All work of a job is done inside `together`: whoever meets a loss outside of a run, which gets over it by
itself, heals with the others, and all do the work again; nobody is through before all are. Where MPI does not
get over a loss, a timer ends the job, so that who started it can start it again; where MPI says nothing of it
(a rank left by `exit(3)`), a thread that looks after the next rank of the machine does. A rank that has lost
others leaves by `part`: MPI_Finalize may hang then, and mpi4py would hold the interpreter's lock meanwhile.

For the command line only: a library must neither watch its host program nor end it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn, TypeVar

from iterreduce import aside, collectives, healing
from iterreduce import group as groups
from iterreduce.collectives import MpiGroup
from iterreduce.epochs import Refilled
from iterreduce.launch import Crew, abort, say, speak_for_all
from iterreduce.options import Options
from iterreduce.refilling import Refill
from iterreduce.start import THREAD_VARIABLES
from iterreduce.supervising import vitals
from iterreduce.supervising.processes import is_alive, machine, start_of

#: Of the environment of ranks what new ones are given. Those of launchers name the process.
_HANDED_ON = ("ITERREDUCE_", "PYTHON", "NUMBA_", *THREAD_VARIABLES)
#: MPI_Finalize gets this long; it takes some 50 ms.
FINALIZE_SECONDS = 3.0
#: New ranks may take so many times as long to come as the ranks took that are there, and at least so long.
LATER_STARTS, LATER_SECONDS = 4.0, 30.0
#: How often the next rank is looked at. That it is gone ends the job so much later than what MPI tells of.
LOOK_SECONDS, NOTICE_SECONDS = 1.0, 10.0
_CALLING = {module.__file__ for module in (aside, collectives, groups, healing)}

T = TypeVar("T")


def together(crew: Crew, work: Callable[[], T]) -> T:
    """What `work` gives back when all ranks that are left have done it. Collective."""
    group = crew.group
    while True:
        try:
            done = work()
            group.all_here()
            return done
        except Exception as error:
            if not (group.heals and group.is_loss(error)):
                raise
            group.heal(error)


def guard_healing(crew: Crew, seconds: float, status: int) -> None:
    """From now on the job ends, with this status, where ranks do not find together in time after a loss."""
    if isinstance(crew.group, MpiGroup):
        group = crew.group
        why = "the others have not agreed on who is left"
        group.around_healing = partial(_in_time, crew, group, seconds, status, why)


def replace_lost(
    crew: Crew, options: Options, status: int, arguments: Sequence[str], started: float = 0.0
) -> None:
    """From now on new ranks with these arguments take the places of lost ones, `--respawn` times. This one
    was ``started`` so many seconds ago; new ones have a few times as long, but never more than any start.
    """
    group, charter = crew.group, crew.charter
    if not isinstance(group, MpiGroup) or not group.heals or not options.respawn:
        return

    def words(names: Sequence[int]) -> list[str]:
        joining = ",".join(map(str, names))
        return [*_with_variables(), sys.executable, "-m", "iterreduce", "join", joining, *arguments]

    def failed() -> None:
        if group.rank == 0:
            say(f"iterreduce: no new ranks could be started: it goes on with {group.size}")

    left = options.respawn if charter is None else charter.left
    name = group.size if charter is None else charter.next_name
    patience = min(options.start_timeout, max(LATER_SECONDS, LATER_STARTS * started))
    around = partial(_refilling, crew, group, patience, status)
    group.refill = Refill(words, left, name, crew.job, (), around, failed)


def _with_variables() -> list[str]:
    """Start what follows with the variables that all ranks must have alike: on another host there are none of
    ours, and what MPI hands on by itself must be short.
    """
    ours = {name: text for name, text in os.environ.items() if name.startswith(_HANDED_ON)}
    return ["/usr/bin/env", *(f"{name}={text}" for name, text in {**ours, **vitals.variables()}.items())]


def to_the_end(crew: Crew, work: Callable[[], T], seconds: float, status: int) -> T:
    """``work()``, which all ranks begin again where new ones have taken lost places. The job ends, with this
    status, where a rank is gone and MPI keeps the others waiting so long. Collective.
    """
    while True:
        if isinstance(crew.group, MpiGroup) and crew.group.rank == 0 and crew.group.refilled is not None:
            _tell_living(crew.group)
        with contextlib.suppress(Refilled), _looking_out(crew, seconds, status):
            return work()


@contextlib.contextmanager
def _looking_out(crew: Crew, seconds: float, status: int) -> Iterator[None]:
    """After the next rank of this machine, where no supervisor does. Collective."""
    group, over = crew.group, threading.Event()
    if isinstance(group, MpiGroup) and group.heals and vitals.current() is None:
        mates = together(crew, lambda: _mates(crew, group))
        seconds += NOTICE_SECONDS
        looks = (crew, group, mates, seconds, status, over)
        threading.Thread(target=_look_out, args=looks, name="iterreduce lookout", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _mates(crew: Crew, group: MpiGroup) -> dict[int, tuple[int, str]]:
    """The processes of the ranks of this machine, by the names of the ranks. Collective."""
    here, pid = machine(), os.getpid()
    told = map(json.loads, crew.farewell.allgather_bytes(json.dumps([here, pid, start_of(pid)]).encode()))
    return {
        name: (pid, start)
        for name, (where, pid, start) in zip(group.names, told, strict=True)
        if where == here
    }


def _look_out(
    crew: Crew,
    group: MpiGroup,
    mates: dict[int, tuple[int, str]],
    seconds: float,
    status: int,
    over: threading.Event,
) -> None:
    """On a thread. A rank that computes learns of the loss later: only time in one exchange counts."""
    since, before = time.monotonic(), -1
    while not over.wait(min(LOOK_SECONDS, seconds / 4)):
        calls, here = group.traffic.collectives, [mates[name] for name in group.names if name in mates]
        at = next((at for at, (pid, _) in enumerate(here) if pid == os.getpid()), 0)
        if not here or is_alive(*here[(at + 1) % len(here)]) or calls != before or not _waits():
            since, before = time.monotonic(), calls
        elif time.monotonic() - since > seconds:
            _give_up(crew, seconds, status, "MPI has not told the others")
            return


def _waits() -> bool:
    """Whether the main thread is in a call of MPI, as its innermost frame tells."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and frame.f_code.co_filename in _CALLING


def tell_what_cannot_be(crew: Crew, options: Options) -> None:
    """Once, to who asked for it: ranks that die will not be survived here."""
    if options.recover == "off" or crew.alone or crew.group.heals or crew.group.rank:
        return
    library = crew.group.library
    asked = "--respawn" if options.respawn else "--recover auto"
    can = library.startswith("Open MPI") and int(library.split()[-1].partition(".")[0]) >= 5
    how = "start it by mpirun --with-ft ulfm" if can else f"{library} cannot go on without ranks that die"
    say(f"iterreduce: {asked}: {how}; here the death of one ends the job")


@contextlib.contextmanager
def _in_time(crew: Crew, group: MpiGroup, seconds: float, status: int, why: str) -> Iterator[None]:
    timer = threading.Timer(seconds, _give_up, (crew, seconds, status, why))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if group.rank == 0:
        _tell_living(group)


@contextlib.contextmanager
def _refilling(crew: Crew, group: MpiGroup, seconds: float, status: int) -> Iterator[None]:
    if group.rank == 0 and group.refill is not None:
        coming = group.refill.coming
        vitals.tell_living(group.names, coming[0], coming)
    with _in_time(crew, group, seconds, status, "new ranks have not come"):
        yield


def _tell_living(group: MpiGroup) -> None:
    refill = group.refill
    vitals.tell_living(group.names, group.size if refill is None else refill.next_name)


def _give_up(crew: Crew, seconds: float, status: int, why: str) -> None:
    """On a thread: the main one waits inside MPI."""
    speak_for_all(
        crew.job,
        f"iterreduce: a rank has died, and {seconds:g} s later {why} "
        f"(this is rank {crew.group.rank} on {socket.gethostname()}): the job ends",
    )
    vitals.leave(status, "alone")
    abort(crew, status)


def part(crew: Crew, status: int) -> None:
    """Leave with this status; returns where this rank may leave like any program."""
    if isinstance(crew.group, MpiGroup) and crew.group.tolerant:
        vitals.leave(status)
        sys.stdout.flush()
        sys.stderr.flush()
        _finalize_or_not(status)


def _finalize_or_not(status: int) -> NoReturn:
    timer = threading.Timer(FINALIZE_SECONDS, os._exit, (status,))
    timer.daemon = True
    timer.start()
    with contextlib.suppress(OSError, AttributeError, StopIteration):
        _library().MPI_Finalize()  # without the interpreter's lock
    os._exit(status)


def _library() -> ctypes.CDLL:
    """The MPI library of this process."""
    with open("/proc/self/maps") as maps:
        return ctypes.CDLL(next(line.split()[-1] for line in maps if "/libmpi." in line))
