"""What faults do: a watcher that counts the events of one rank and strikes where a fault says.

Everything that it does it also says, on standard error and in a list, before it does it: a test of a failure
must be able to tell that there was one. It may be called on any thread.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import singledispatchmethod

import numpy as np

from iterreduce.collectives import Group
from iterreduce.errors import UsageError
from iterreduce.events import Event, Events
from iterreduce.testing import calls
from iterreduce.testing.faults import (
    CallFault,
    Delay,
    DeleteFile,
    Fault,
    Faults,
    FileFault,
    FlipBit,
    Kill,
    Raise,
    Slow,
    Stop,
    TearFile,
)
from iterreduce.testing.threads import Died, ThreadGroup

_CONTINUE = "import os, sys, time; time.sleep(float(sys.argv[1])); os.kill(int(sys.argv[2]), 18)"


@contextlib.contextmanager
def striking(faults: Faults, events: Events, group: Group | None = None) -> Iterator[list[str]]:
    """Strike while these events are emitted, on this rank; the list tells what has struck so far.

    Without a group this is rank 0. Calls of the operating system work again afterwards.
    """
    striker = Striker(faults, group)
    stop = events.subscribe(striker, may_raise=True, places=True)
    try:
        yield striker.struck
    finally:
        stop()
        striker.close()


class Striker:
    """The faults of one rank at work."""

    def __init__(self, faults: Faults, group: Group | None = None):
        self.threads = group if isinstance(group, ThreadGroup) else None
        self.rank = 0 if group is None else group.rank
        self.struck: list[str] = []
        self._faults = faults
        self._mine = [(n, f) for n, f in enumerate(faults.faults) if f.rank in (None, self.rank)]
        self._met = dict.fromkeys((n for n, _ in self._mine), 0)
        self._counting = threading.Lock()
        self._mended = contextlib.ExitStack()
        if self.threads is not None:
            self._check_threads()

    def _check_threads(self) -> None:
        for fault in self._faults.faults:
            if isinstance(fault, Stop) or (
                isinstance(fault, Kill) and (fault.delay or fault.signal != "SIGKILL")
            ):
                raise UsageError(
                    f"{fault}: a thread can neither be stopped nor sent a signal; use real ranks"
                )
            if isinstance(fault, CallFault) and fault.rank is not None:
                raise UsageError(
                    f"{fault}: ranks as threads share one process; leave rank out and give a path"
                )
        if self.rank:  # calls belong to the process: rank 0 lets them fail for all
            self._mine = [(n, fault) for n, fault in self._mine if not isinstance(fault, CallFault)]

    def close(self) -> None:
        """Mend the calls that fail."""
        self._mended.close()

    def __call__(self, event: Event) -> None:
        if self.threads is not None and self.threads.dead:
            raise Died("this rank is dead")  # on whichever thread it still moves
        for number, fault in self._mine:
            if fault.is_at(event) and self._is_due(number, fault) and self._first_time(number):
                self._say(
                    f"{fault} on rank {self.rank}",
                    once=not isinstance(fault, Slow) or self._met[number] == fault.nth,
                )
                self._strike(fault, number)

    def _is_due(self, number: int, fault: Fault) -> bool:
        with self._counting:
            self._met[number] += 1
            beyond = self._met[number] - fault.nth
        return beyond == 0 or (isinstance(fault, Slow) and beyond > 0 and beyond % fault.every == 0)

    def _first_time(self, number: int) -> bool:
        """Over all processes that share the marks; what is slow is slow in all of them."""
        if self._faults.marks is None or isinstance(self._faults.faults[number], Slow):
            return True
        mark = os.path.join(self._faults.marks, f"fault-{number:03d}-rank-{self.rank}")
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        return True

    def _say(self, text: str, once: bool = True) -> None:
        if once:
            self.struck.append(text)
            with contextlib.suppress(OSError):
                os.write(2, f"iterreduce.testing: {text}\n".encode())

    # ------------------------------------------------------------------------- what each kind does

    @singledispatchmethod
    def _strike(self, fault: Fault, number: int) -> None:
        raise AssertionError(fault)

    @_strike.register
    def _(self, fault: Kill, number: int) -> None:
        if self.threads is not None:
            self.threads.die(str(fault))
        if fault.delay:
            threading.Thread(target=_signal_later, args=(fault,), daemon=True).start()
        else:
            _signal(fault.signal)

    @_strike.register
    def _(self, fault: Stop, number: int) -> None:
        if fault.seconds is not None:
            subprocess.Popen([sys.executable, "-S", "-c", _CONTINUE, str(fault.seconds), str(os.getpid())])
        _signal("SIGSTOP")

    @_strike.register
    def _(self, fault: Raise, number: int) -> None:
        raise fault.made()

    @_strike.register
    def _(self, fault: Delay, number: int) -> None:
        time.sleep(fault.seconds)

    @_strike.register
    def _(self, fault: FileFault, number: int) -> None:
        done = damage(fault, self._faults.seed + number)
        self._say(f"{fault}: {done or 'no such file'}")

    @_strike.register
    def _(self, fault: CallFault, number: int) -> None:
        self._mended.enter_context(calls.failing(fault))


def _signal(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def _signal_later(fault: Kill) -> None:
    time.sleep(fault.delay)
    _signal(fault.signal)


def damage(fault: FileFault, seed: int = 0) -> str | None:
    """Damage the file now; what was done to which, or None where no file fits the pattern.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with open(f"{folder}/a", "wb") as file:
    ...         _ = file.write(bytes(10))
    ...     _ = damage(TearFile(f"{folder}/*", keep=4, at="run.end"))
    ...     os.path.getsize(f"{folder}/a")
    4
    """
    found = sorted(glob.glob(fault.path, recursive=True, include_hidden=True))
    if not found:
        return None
    path, rng = found[-1], np.random.default_rng(seed)
    if isinstance(fault, DeleteFile):
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        return f"{path} is gone"
    size = os.path.getsize(path)
    if isinstance(fault, TearFile):
        keep = (
            int(rng.integers(size + 1))
            if fault.keep is None
            else min(size, fault.keep + size * (fault.keep < 0))
        )
        os.truncate(path, max(0, keep))
        return f"{path} has {max(0, keep)} of {size} bytes left"
    assert isinstance(fault, FlipBit)
    return _flip(path, size, fault, rng)


def _flip(path: str, size: int, fault: FlipBit, rng: np.random.Generator) -> str | None:
    if size == 0:
        return None
    byte = int(rng.integers(size)) if fault.byte is None else fault.byte % size
    bit = int(rng.integers(8)) if fault.bit is None else fault.bit
    with open(path, "r+b", buffering=0) as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))
    return f"bit {bit} of byte {byte} of {path} is turned over"
