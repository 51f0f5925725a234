"""What SIGINT, SIGTERM and SIGUSR1 mean to a run of the command line.

With a checkpoint directory the first of them is the wish to save and stop (`stopping.StopRequest`), and a
second SIGINT or SIGTERM ends the process at once. Without one SIGINT and SIGTERM end the job, and SIGUSR1 is
told what it would have needed and does no harm. None is lost because the run does not exist yet: what came
while files were loaded and ranks met is kept until there is a `StopRequest`.

Python's own handlers run only when a collective returns, which it may never do. So each signal is read from
the wake-up pipe, by a thread that sees it at once; until that thread runs, by a handler on the main thread.

Only standard modules are imported: `hold` is called before anything else. For the command line only, since a
library must not touch its host's signals.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from iterreduce.stopping import StopRequest

INTERRUPTED_STATUS, TERMINATED_STATUS = 130, 143
#: A launcher and a terminal may both send the same press of Ctrl-C.
SAME_SIGNAL_SECONDS = 0.3

NOWHERE_TO_SAVE = (
    "iterreduce: SIGUSR1 asks to save and stop, and this run has no --checkpoint-dir to save in: it goes on"
)

_ENDING = (signal.SIGINT, signal.SIGTERM)

#: Ends the job at once, with this exit status: 130 or 143.
End = Callable[[int], None]


class Watch:
    """The signals of this process since it began, and what comes of them.

    ``started``: `time.perf_counter()` at the beginning of the process. ``saves``: there is a checkpoint
    directory, as far as is known. ``reason``: the name of the first signal that asked to save.
    """

    def __init__(self, started: float) -> None:
        self.started, self.saves, self.reason = started, True, ""
        self.end: End = _leave
        self.tell: Callable[[str], None] = _write
        self._stop: StopRequest | None = None
        self._ending_since: float | None = None
        self._ends_job = self._served = False
        self._before: dict[int, Any] = {}
        self._watched, self._pipe, self._wakeup = -1, -1, -1

    # -- whose the signals are

    def install(self) -> None:
        """From now on nothing is lost. Only the main thread may."""
        self._watched, self._pipe = os.pipe()
        os.set_blocking(self._watched, False)
        os.set_blocking(self._pipe, False)
        self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._take(*_ENDING, signal.SIGUSR1)

    def settle(self, saves: bool) -> None:
        """There is a checkpoint directory, or there is none: then SIGINT and SIGTERM do what they always do,
        also one that came before this was known.
        """
        self.saves = saves
        if self._pipe < 0:
            return
        if saves:
            self._take(*_ENDING)
            return
        self._give_back(*_ENDING)
        reason, self.reason, self._ending_since = self.reason, "", None
        if reason:
            os.kill(os.getpid(), signal.Signals[reason])

    def _take(self, *numbers: int) -> None:
        for number in numbers:
            if number not in self._before:
                self._before[number] = signal.signal(number, self._handle)

    def _give_back(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before.pop(number))

    def restore(self) -> None:
        """All signals are what they were before; the thread ends."""
        if self._pipe < 0:
            return
        self._give_back(*list(self._before))
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe)
        self._pipe = -1
        if not self._served:
            os.close(self._watched)

    def over(self) -> None:
        """The exit status is known. Python takes its handlers away while it ends: what would then kill this
        process and spoil its status is ignored from now on, unless it ends the job anyway.
        """
        for number in self._before:
            if self.saves or number == signal.SIGUSR1:
                signal.signal(number, signal.SIG_IGN)

    def leave_to_parent(self) -> None:
        """In a forked child: the signals that are held are not its own."""
        if self._pipe >= 0:
            signal.set_wakeup_fd(-1)
            for number in self._before:
                signal.signal(number, signal.SIG_IGN)

    # -- the run

    def serve(self, end: End, tell: Callable[[str], None], ends_job: bool) -> None:
        """The ranks have met: `end` ends the job, `tell` speaks for all ranks of this node.

        ``ends_job``: SIGINT and SIGTERM end it at once even where this rank waits for others inside MPI.
        """
        self.end, self.tell, self._ends_job = end, tell, ends_job
        if self._pipe < 0:
            return
        if ends_job:
            self._take(signal.SIGTERM)  # SIGINT has Python's own handler
        if self.saves or ends_job:
            self._served = True
            threading.Thread(target=self._watch, args=(self._watched,), daemon=True).start()

    def stop_request(self, limit_seconds: float | None, started: float) -> StopRequest:
        """The wish to stop of the run that begins: it may be there already."""
        self._stop = stop = StopRequest(limit_seconds, started)
        if self.reason:
            stop.request(self.reason)
        return stop

    # -- what comes

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._drain(self._watched)

    def _watch(self, watched: int) -> None:
        while True:
            select.select([watched], [], [])
            if not self._drain(watched):
                os.close(watched)
                return

    def _drain(self, watched: int) -> bool:
        """Read what came, each byte once, by whoever is first; False when nothing will come any more."""
        try:
            data = os.read(watched, 64)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for number in data:
            self._came(number)
        return bool(data)

    def _came(self, number: int) -> None:
        if number in _ENDING:
            self._asked_to_end(number)
        elif number == signal.SIGUSR1:
            if self.saves:
                self._save(number)
            else:
                self.tell(NOWHERE_TO_SAVE)

    def _asked_to_end(self, number: int) -> None:
        now = time.monotonic()
        if not self.saves:
            if self._ends_job:
                self.end(_status(number))
        elif self._ending_since is None:
            self._ending_since = now
            self._save(number)
        elif now - self._ending_since > SAME_SIGNAL_SECONDS:
            self.end(_status(number))

    def _save(self, number: int) -> None:
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Save and stop, for this reason; any thread may ask."""
        self.reason = self.reason or reason
        if self._stop is not None:
            self._stop.request(self.reason)


def hold(arguments: Sequence[str], started: float) -> Watch:
    """Begin to watch this process's signals; on another thread than the main one nothing is watched."""
    watch = Watch(started)
    if threading.current_thread() is threading.main_thread():
        watch.install()
    watch.settle(may_save(arguments))
    return watch


@contextlib.contextmanager
def held(arguments: Sequence[str], started: float) -> Iterator[Watch]:
    """The same for the time of a block."""
    watch = hold(arguments, started)
    try:
        yield watch
    finally:
        watch.restore()


def may_save(arguments: Sequence[str]) -> bool:
    """Whether the settings name a checkpoint directory. Wrong settings are told later: they count as none."""
    from iterreduce.errors import UsageError
    from iterreduce.options import resolve

    if any(word.partition("=")[0] == "--checkpoint-dir" for word in arguments):
        return True
    try:
        return resolve().options.checkpoint_dir is not None
    except UsageError:
        return False


def _status(number: int) -> int:
    return INTERRUPTED_STATUS if number == signal.SIGINT else TERMINATED_STATUS


def _leave(status: int) -> None:
    _write("iterreduce: " + ("interrupted" if status == INTERRUPTED_STATUS else "terminated"))
    os._exit(status)


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
