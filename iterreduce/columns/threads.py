"""Threads within a rank: a small pool that calls a function over fixed ranges.

    pool.run(function, ranges)      function(lo, hi) of every (lo, hi), on all threads; a list, in range order

A `Pool` belongs to one run. Its threads are made when they are first needed, are daemons, hold nothing while
they wait, and are gone after `close`. Which thread takes which range is left to chance, so whoever calls
`run` sees to it that chance cannot be seen: every range writes its own part of the results, and no number is
added to from two ranges. Then 1 thread and 8 give the same bits.

What it is not: a way to run user code, or to speak MPI. Both happen on the run's own thread, which takes
ranges like the others, so that a late helper never holds it up. Functions are compiled loops that release
the GIL (`iterreduce.columns.jit`), or a few lines of NumPy around one.

How it can go wrong: a job of less than some 50 us is slower on two threads than on one; `Pool.parts` cuts
rows no finer than its caller's grain. A function that calls `run` again, on whatever thread, is run inline.
Waking a core that sleeps takes 50 to 100 us on a virtual machine, as long as a whole job; so a thread that
waits looks for work a while, without the GIL and giving its core to whoever wants it, before it sleeps.

Kernels deep in the engine, and `nearest` in user code, find the pool of the run by `current`: it is a
property of the run's thread, so ranks that are threads of one process have one each.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import count
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from iterreduce.columns.jit import kernel, yield_core
from iterreduce.errors import UsageError

R = TypeVar("R")
Range = tuple[int, int]

MOST_THREADS = 4096  # more than a node has cores: a slip of the keyboard

LOOKS = 1500
"""How often a waiting thread looks before it sleeps: about 0.3 ms, the time between two pieces of a map."""
GRACE = 40
"""Looks that a helper lets pass once it is called, 8 us: the caller still has the GIL, until it is in its own
range, and who finds the GIL taken falls asleep."""


@kernel
def _look_for_work(flag: Any, seen: Any, at_rest: Any, me: Any, looks: Any) -> None:
    """Wait, but not for long, until the flag is no longer what it was."""
    at_rest[me] = 1  # said here, where this thread has given up the GIL: who waits for it goes on at once
    for _ in range(looks):
        if flag[0] != seen:
            break
        yield_core()
    for _ in range(GRACE):
        yield_core()


@kernel
def _look_for_rest(at_rest: Any, looks: Any) -> None:
    """Wait, but not for long, until all others rest."""
    for _ in range(looks):
        if at_rest.all():
            return
        yield_core()


def cores() -> frozenset[int]:
    """The cores that this process may run on, by number."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _crowded() -> bool:
    """Whether this node has more to run than cores: who looks for work then loses its core for a while."""
    try:
        return os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    except OSError:
        return False


class _Job:
    """A function and its ranges, with what came of each; threads come and go while ranges are left."""

    def __init__(self, function: Callable[[int, int], Any], ranges: Sequence[Range]):
        self.function, self.ranges = function, ranges
        self.results: list[Any] = [None] * len(ranges)
        self.errors: dict[int, BaseException] = {}
        self._next = count()  # its `next` is one step for all threads
        self._lock, self._all_left = threading.Lock(), threading.Lock()
        self._all_left.acquire()
        self._inside, self._closed = 0, False

    def work(self) -> None:
        """Take ranges until none is left."""
        while (i := next(self._next)) < len(self.ranges) and not self._closed:
            try:
                self.results[i] = self.function(*self.ranges[i])
            except BaseException as error:
                self.errors[i] = error

    def help(self, at_rest: Any, me: int) -> None:
        """`work`, on a thread of the pool; one that comes too late does nothing."""
        with self._lock:
            if self._closed:
                return
            self._inside += 1
            at_rest[me] = 0
        self.work()
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._closed and not self._inside:
                self._all_left.release()

    def close(self, at_rest: Any, looks: int) -> None:
        """Wait until no thread is inside, also if interrupted: they write into arrays of the caller."""
        with self._lock:
            self._closed = True
            waiting = self._inside > 0
        if looks:
            _look_for_rest(at_rest, looks)
        interrupted = None
        while waiting:
            try:
                waiting = not self._all_left.acquire()
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


class _Desk:
    """Where jobs are called out, and who rests; where others want the cores, ``looks`` is 0: all sleep."""

    def __init__(self, threads: int):
        self.looks = LOOKS if threads <= len(cores()) and not _crowded() else 0
        self.at_rest = np.ones(threads - 1, np.int64)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._flag = np.zeros(1, np.int64)

    def call(self, job: _Job | None, helpers: int) -> None:
        for _ in range(helpers):
            self._jobs.put(job)
        self._flag[0] += 1

    def next_job(self, me: int) -> _Job | None:
        seen = self._flag[0]
        if self.looks and self._jobs.empty():
            _look_for_work(self._flag, seen, self.at_rest, me, self.looks)
        self.at_rest[me] = 1
        return self._jobs.get()


def _serve(desk: _Desk, me: int) -> None:
    """The life of a thread of a pool; it holds no job, and so no arrays, while it waits."""
    job = desk.next_job(me)
    while job is not None:
        job.help(desk.at_rest, me)
        job = None
        job = desk.next_job(me)


def _dismiss(desk: _Desk, helpers: list[threading.Thread]) -> None:
    desk.call(None, len(helpers))


class Pool:
    """``threads`` threads, the caller's own among them; a pool of 1 is a plain loop.

    Close it, or use it in a ``with`` statement. One thread at a time may call `run`.

    >>> with Pool(2) as pool:
    ...     pool.run(lambda lo, hi: sum(range(lo, hi)), [(0, 3), (3, 5)])
    [3, 7]
    """

    def __init__(self, threads: int):
        if not 1 <= threads <= MOST_THREADS:
            raise UsageError(f"a pool of {threads} threads; wanted 1 to {MOST_THREADS}")
        self.threads = threads
        self._desk = _Desk(threads)
        self._helpers: list[threading.Thread] = []
        self._busy = False
        self._dismissed = weakref.finalize(self, _dismiss, self._desk, self._helpers)

    def run(self, function: Callable[[int, int], R], ranges: Sequence[Range]) -> list[R]:
        """Call ``function(lo, hi)`` for every range; what it returned, in the order of the ranges.

        All ranges are tried; then the error of the first that failed is raised. A call from within a function
        that is being run is a plain loop, as is one with a single range.
        """
        if self.threads == 1 or len(ranges) < 2 or self._busy:
            return [function(lo, hi) for lo, hi in ranges]
        job, desk = _Job(function, ranges), self._desk
        self._busy = True
        try:
            self._call_helpers(job, min(self.threads, len(ranges)) - 1)
            job.work()
        finally:
            try:
                job.close(desk.at_rest, desk.looks)
            finally:
                self._busy = False
        if job.errors:
            raise job.errors[min(job.errors)]
        return job.results

    def _call_helpers(self, job: _Job, wanted: int) -> None:
        while len(self._helpers) < wanted and self._dismissed.alive:
            me = len(self._helpers)
            name = f"iterreduce pool {me + 1}"
            helper = threading.Thread(target=_serve, args=(self._desk, me), name=name, daemon=True)
            helper.start()
            self._helpers.append(helper)
        self._desk.call(job, min(wanted, len(self._helpers)))

    def parts(self, rows: int, grain: int, multiple: int = 1) -> list[Range]:
        """Equal ranges of so many rows: one for each thread, none of less than ``grain`` rows.

        All begin at a multiple of ``multiple``. Without rows there is no range.

        >>> Pool(2).parts(100, grain=10, multiple=8)
        [(0, 48), (48, 100)]
        >>> Pool(2).parts(100, grain=80)
        [(0, 100)]
        """
        parts = min(self.threads, rows // max(1, grain))
        if parts > 1:
            return even_parts(rows, parts, multiple)
        return [(0, rows)] if rows else []

    def close(self) -> None:
        """End the threads, and wait until they are gone; a closed pool runs everything on the caller's."""
        self._dismissed()
        for helper in self._helpers:
            helper.join()
        self._helpers.clear()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def even_parts(rows: int, parts: int, multiple: int = 1) -> list[Range]:
    """At most so many ranges of nearly equal size that cover ``[0, rows)``, in order; none is empty.

    >>> even_parts(10, 3)
    [(0, 3), (3, 6), (6, 10)]
    """
    cuts = sorted({rows * p // parts // multiple * multiple for p in range(parts)})
    return [(lo, hi) for lo, hi in zip(cuts, [*cuts[1:], rows], strict=True) if lo < hi]


ALONE = Pool(1)
"""The pool of whoever has none: it has no threads."""

_here = threading.local()


def current() -> Pool:
    """The pool of the run that this thread is in; `ALONE` elsewhere, so also on a pool's own threads."""
    pool: Pool = getattr(_here, "pool", ALONE)
    return pool


class using:
    """For the time of a ``with`` statement, this pool is `current` on this thread, and arrays are placed by
    this `Placement`; may be used again.

    >>> with Pool(2) as pool, using(pool):
    ...     current().threads
    2
    >>> current().threads
    1
    """

    def __init__(self, pool: Pool, placement: AbstractContextManager[Any] | None = None):
        self._pool, self._placement = pool, placement

    def __enter__(self) -> Pool:
        self._before = getattr(_here, "pool", ALONE)
        _here.pool = self._pool
        if self._placement is not None:
            self._placement.__enter__()
        return self._pool

    def __exit__(self, *error: Any) -> None:
        _here.pool = self._before
        if self._placement is not None:
            self._placement.__exit__(*error)
