"""The ranks' side of `python -m iterreduce run`: a rank says who it is, that it lives, how far it is, and how
it left.

A thread writes the beat, so a long iteration beats and a stopped process does not; what the beat says comes
from the events of the run, so a main thread that gets nowhere beats and says nothing new. The same thread
ends the process when its launcher or its supervisor is gone: an orphan would write beside its successor.

Without a supervisor nothing happens here. A watcher of events and plain files; it knows no run and no MPI.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from iterreduce.errors import LaunchError
from iterreduce.events import Event
from iterreduce.options import Options
from iterreduce.start import launched_rank
from iterreduce.supervising import places, witnesses
from iterreduce.supervising.processes import die_with_parent, is_alive, machine, start_of

END_BYTES = 64
#: Of a stage's name what a beat has room for.
STAGE_BYTES = 100
#: Events that say nothing about the main thread.
_NO_SIGN = ("checkpoint.step",)


class Vitals:
    """What this rank tells its supervisor; ``started``: when the job began, as `time.perf_counter` here."""

    def __init__(self, directory: str) -> None:
        self.directory, self.rank = directory, launched_rank()
        self.job = places.read(directory, places.JOB)
        if not self.job:
            raise LaunchError(
                f"rank {self.rank} on {socket.gethostname()} does not see {directory}, where its supervisor "
                "waits for it: give a --checkpoint-dir on a file system that all hosts share"
            )
        self.started = time.perf_counter() - max(0.0, time.time() - float(self.job["started"]))
        self._parent = os.getppid()
        self._here = machine()
        self._last: Event | None = None
        self._iteration: Event | None = None
        self._events = self._beats = 0
        self._over, self._news = threading.Event(), threading.Event()
        self._end = os.path.join(directory, f".end-{self.rank}")
        self._witness: int | None = None

    def begin(self, forked: Callable[[], None]) -> None:
        """Tell that this rank is there; it will not outlive its launcher. `forked` is called in a child
        process that stands by on another host than the supervisor's.
        """
        die_with_parent()
        if self._is_orphan():
            self._orphaned()
        if self._here == self.job["machine"]:
            places.hold_lifeline(self.directory, self.rank)
        pid, host = os.getpid(), socket.gethostname()
        who = {"host": host, "machine": self._here, "pid": pid, "start": start_of(pid)}
        try:
            with open(self._end, "wb") as file:  # a disk that is full later has room for it
                file.write(b" " * END_BYTES)
            if self._here != self.job["machine"]:
                self._witness = witnesses.stand_by(self._beat_file, forked)
            places.write(self.directory, f"rank-{self.rank}.json", who)
        except OSError as error:
            raise LaunchError(f"rank {self.rank} on {host} cannot write: {error}") from error

    def __call__(self, event: Event) -> None:
        """A watcher of the run's events."""
        if event.name not in _NO_SIGN:
            self._last = event
            self._events += 1
            if event.name.startswith("iteration."):
                first, self._iteration = self._iteration is None, event
                if first:
                    self._iterates()

    def _iterates(self) -> None:
        """Tell at once that the run is beyond its start: the next beat may come too late."""
        with contextlib.suppress(OSError):
            places.write(self.directory, places.ITERATED, {})
        self._news.set()

    @property
    def _beat_file(self) -> str:
        return os.path.join(self.directory, f"beat-{self.rank}")

    def beat(self, ask: Callable[[str], None]) -> None:
        """Beat from now on, on a thread; `ask` is called once with the reason when the ranks should stop."""
        threading.Thread(target=self._beat, args=(ask,), name="iterreduce beat", daemon=True).start()

    def _beat(self, ask: Callable[[str], None]) -> None:
        pause, asked = float(self.job["beat_seconds"]), False
        file = os.open(self._beat_file, os.O_WRONLY | os.O_CREAT, 0o600)
        while True:
            self._beats += 1
            with contextlib.suppress(OSError):
                os.pwrite(file, witnesses.padded(self._said()), 0)
            self._news.wait(pause)
            self._news.clear()
            if self._over.is_set():
                os.close(file)
                return
            if self._is_orphan():
                self._orphaned()
            if not asked and self.wish:
                asked = True
                ask(self.wish)

    def _said(self) -> dict[str, Any]:
        last, at = self._last, self._iteration
        stage = str(last.fields.get("stage", "")) if last else ""
        stage = stage.encode("ascii", "replace").decode()[:STAGE_BYTES]
        return {
            "beat": self._beats,
            "events": self._events,
            "path": tuple(at.fields.get("path") or (at.fields["iteration"],))[:8] if at else (),
            "what": f"{last.name} {stage}".strip() if last else "is starting",
            "ran": last is not None and last.name == "run.end",
        }

    def _is_orphan(self) -> bool:
        """Whether launcher, supervisor or, seen from another host, the attempt's directory are gone."""
        if os.getppid() != self._parent:
            return True
        try:
            os.stat(self.directory)
        except FileNotFoundError:
            return True
        except OSError:
            pass  # a file system that stutters
        if self.job["machine"] != self._here:
            return False
        others = [self.job, places.read(self.directory, places.LAUNCHER)]
        return any(other and not is_alive(other["pid"], other["start"]) for other in others)

    def _orphaned(self) -> None:
        sys.stderr.write(f"iterreduce: rank {self.rank} has lost its launcher and ends\n")
        sys.stderr.flush()
        os._exit(137)

    def adapt(self, options: Options) -> Options:
        """What the user asked for, in this attempt: an earlier one began anew already."""
        return replace(options, fresh=options.fresh and not self.job["iterated"])

    @property
    def wish(self) -> str:
        """Why the supervisor asked to save and stop, if it did."""
        return str(places.read(self.directory, places.STOP).get("reason", ""))

    def end(self, status: int, how: str) -> None:
        """Tell how this rank leaves: `agreed` with all others, `alone`, or `asked` to end at once."""
        self._over.set()
        self._news.set()
        if self._witness is not None:
            witnesses.dismiss(self._witness)
        try:
            with open(self._end, "r+b") as file:
                file.write(json.dumps({"status": status, "how": how}).encode())
            os.rename(self._end, os.path.join(self.directory, f"end-{self.rank}"))
        except OSError as error:
            sys.stderr.write(f"iterreduce: rank {self.rank} cannot tell its supervisor: {error}\n")


_mine: Vitals | None = None


def begin(forked: Callable[[], None] = lambda: None) -> Vitals | None:
    """Tell the supervisor, if there is one, that this rank is there. Raises LaunchError."""
    global _mine
    directory = os.environ.pop(places.VARIABLE, "")  # programs that this one starts are none of the ranks
    if directory:
        _mine = Vitals(directory)
        _mine.begin(forked)
    return _mine


def current() -> Vitals | None:
    """This process's, if it is supervised."""
    return _mine


def variables() -> dict[str, str]:
    """What a rank that takes another's place must have in its environment to be supervised, too."""
    return {} if _mine is None else {places.VARIABLE: _mine.directory}


def leave(status: int, how: str = "agreed") -> None:
    """Tell the supervisor, if there is one, how this rank leaves."""
    if _mine is not None:
        _mine.end(status, how)


def tell_living(ranks: Sequence[int], settled: int = 0, coming: Sequence[int] = ()) -> None:
    """Tell the supervisor, if there is one, which ranks go on without the others, as the launcher numbered
    them; new ranks of numbers below ``settled`` have come, or are not waited for, and those that are
    ``coming`` are started now.
    """
    if _mine is not None:
        with contextlib.suppress(OSError):
            places.write(
                _mine.directory,
                places.LIVING,
                {"ranks": list(ranks), "settled": settled, "coming": list(coming)},
            )
