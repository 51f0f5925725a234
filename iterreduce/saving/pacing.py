"""When the next checkpoint is due: Daly's interval from what was measured, in whole iterations.

Rank 0 alone has a `Pacing`; what it says goes to the others as a bit of the control reduction. It is told of
iterations and writes, and asked in each iteration:

    C   what the last checkpoints cost: the time the iterations stood still, and how much slower those were
        that ran beside the writer. Before the first one is written it is guessed from the bytes.
    M   `mtbf` if given, else learnt from the interrupts in the directory's history (`learnt_mtbf`).
    t   what an iteration takes when nothing is written beside it: the mean of the last ones, without the
        extremes; the very first one, which compiles and plans, is forgotten when there is another.

Due is whichever iteration boundary, below or above `daly(C, M)` seconds of work, has the smaller expected
wall time. That is planned anew after each write, and t is looked at whenever a boundary comes near; so a job
whose iterations grow or shrink is saved after a time, not after a number.

Special cases, and what is done about them:

- A job too short: where a bound of the iterations is known, nothing is saved if the finite plan of what is
  unsaved and still to come has one segment. Where none is known, the interval itself does it: a job that ends
  before it was never saved, and one that has run that long is expected to run as long again.
- Cheap checkpoints of short iterations: C counts as a millisecond at least (files are made and flushed, on
  disks that others use too), so with M = 24 h nothing is saved more often than every 13 seconds.
- Iterations longer than the interval: saved after each, except that after 8 writes in a row with never an
  iteration between them to compare with, one is left undisturbed.
- A write that takes longer than the interval: the next one is due when it is done. Never two at once.
- A write that failed: the next attempt comes after another interval, not at once.

This is no timer and no thread: it reads the clock to know how long the job has run without an interrupt, and
nothing else happens between calls. It can be wrong where interrupts come in bursts, or when the first
iterations are unlike the later ones; it is never wrong about more than time.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from iterreduce.errors import UsageError
from iterreduce.saving.intervals import (
    best_segments,
    daly,
    every_iterations,
    finite_wall,
    predicted_waste,
    saves_now,
)

#: A thousand servers of which each fails every three years: the job is interrupted once a day. For a smaller
#: job that is too short, and costs little: with C = 1 s, 0.5 % of the time.
DEFAULT_MTBF = 86400.0
PRIOR_INTERRUPTS = 0.5  # what the default counts for beside interrupts that were seen
SHORTEST_LIFE = 1.0  # seconds that an interrupted attempt ran at least, whatever its history says
LEAST_COST = 1e-3  # seconds
FIRST_COST = 0.1  # seconds, until bytes are known
FIRST_OVERHEAD = 0.01  # seconds: files are made and flushed, however small
WEIGHT = 0.3  # of the newest write in the running means
RECENT = 9  # iterations that t is the mean of
MOST_UNRESTED = 8  # writes


class History(Protocol):
    """What is known of earlier attempts: seconds that they ran, and how many were interrupted."""

    @property
    def total_seconds(self) -> float: ...
    @property
    def interrupts(self) -> int: ...


def learnt_mtbf(run_seconds: float, interrupts: int, default: float = DEFAULT_MTBF) -> float:
    """Mean time to interrupt of a job that was interrupted so often in so long.

    Run time over interrupts is the estimate of greatest likelihood; normal ends are no interrupts, and while
    there was none, one is taken to be about to come. Where that is below ``default``, a few interrupts may
    be bad luck: then it is the mean, in logarithms, of the estimate with a weight of its interrupts and the
    default with a weight of half an interrupt. So no interrupt yet leaves the default, one moves two thirds
    of the way, and five nearly all; a job that ran longer than the default without one is believed.

    >>> learnt_mtbf(3600, 0), learnt_mtbf(10 * 86400, 0)
    (86400.0, 864000.0)
    >>> [round(learnt_mtbf(3600 * n, n) / 3600, 1) for n in (1, 3, 10, 100)]  # one every hour
    [2.9, 1.6, 1.2, 1.0]
    """
    if not (0 <= run_seconds < math.inf and interrupts >= 0 and default > 0):
        raise UsageError(
            f"wanted run time, interrupts >= 0 and a default > 0, got {run_seconds}, {interrupts}, {default}"
        )
    seen = max(run_seconds, interrupts * SHORTEST_LIFE) / max(interrupts, 1)
    if seen >= default:
        return seen
    return default * math.pow(seen / default, interrupts / (interrupts + PRIOR_INTERRUPTS))


class Pacing:
    """When to save. All times are seconds, as rank 0 measured them.

    ``every``: None for Daly's interval, 0 for never, N for after every N iterations. ``mtbf``: None to learn
    it from ``history``. ``iterations``: how many the job has at most, if known (one call of `iteration_done`
    each). Raises UsageError for values that make no sense.

    >>> pacing = Pacing(mtbf=1000.0)
    >>> pacing.expect(nbytes=10**9, bytes_per_second=2e8)  # C = 5 s: Daly's interval is 96.7 s
    >>> saved = []
    >>> for iteration in range(1, 25):
    ...     due = pacing.due(seconds=10.0)  # asked before the iteration is over
    ...     pacing.iteration_done(10.0, beside_writer=False)
    ...     if due:
    ...         saved.append(iteration)
    ...         pacing.copied(blocking_seconds=5.0)
    ...         pacing.written(5.0)
    >>> saved
    [10, 20]
    >>> pacing.plan()["every_iterations"]
    10
    """

    def __init__(
        self,
        every: int | None = None,
        mtbf: float | None = None,
        history: History | None = None,
        iterations: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every is not None and every < 0:
            raise UsageError(f"a checkpoint after every N iterations: wanted N >= 0, got {every}")
        if mtbf is not None and not mtbf > 0:
            raise UsageError(f"a mean time between interrupts must be above zero, got {mtbf}")
        if iterations is not None and iterations < 0:
            raise UsageError(f"the most iterations: wanted a number >= 0, got {iterations}")
        self.every, self.mtbf = every, mtbf
        self.run_seconds = 0.0 if history is None else history.total_seconds
        self.interrupts = 0 if history is None else history.interrupts
        self.left = iterations
        self.clock, self.started = clock, clock()
        self.start_seconds = 0.0  # of a restart: until the iterations went on
        self.compute_seconds = 0.0  # own work of the iterations, in all attempts, as far as it was not lost
        self.written_checkpoints = 0
        self._before: float | None = None  # run time of attempts whose work this one goes on with
        self._spent = 0.0  # iterations and waits of this attempt
        self._restarted = False
        self._count = 0  # iterations of this attempt
        self._since, self._since_count, self._last = 0.0, 0, 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._writing = False
        self._blocked = self._beside_seconds = 0.0
        self._beside = self._unrested = 0
        self._guess = FIRST_COST
        self._blocking: float | None = None
        self._slowdown: float | None = None
        self._latency: float | None = None
        self._tau = self._look_at = math.inf
        self._replan()

    # ------------------------------------------------------------------ what it is told

    def expect(self, nbytes: float, bytes_per_second: float) -> None:
        """So much will be written, so fast, if nothing better is known: counts until a write was measured.

        A guess that is on the safe side: as if the iterations waited for the whole write.
        """
        if not (0 <= nbytes < math.inf and bytes_per_second > 0):
            raise UsageError(f"wanted bytes >= 0 and a rate > 0, got {nbytes} and {bytes_per_second}")
        self._guess = FIRST_OVERHEAD + nbytes / bytes_per_second
        self._replan()

    def remembered(self) -> dict[str, float | None]:
        """What a restart wants to know again: numbers to put into a checkpoint."""
        return {
            "compute_seconds": self.compute_seconds,
            "blocking_seconds": self._blocking,
            "slowdown_seconds": self._slowdown,
            "write_seconds": self._latency,
        }

    def restarted(self, iteration: int, remembered: Any = None) -> None:
        """The job goes on after so many iterations, which a checkpoint holds; call it before the first one.

        ``remembered``: what `remembered` gave when that checkpoint was made. So writes need not be measured
        again, and the waste of all attempts is known; without it, that of this attempt alone. What is missing
        in it, or is no time, is as if unknown: it was read from a file.
        """
        self._restarted = True
        if self.left is not None:
            self.left = max(0, self.left - iteration)
        found = remembered if isinstance(remembered, Mapping) else {}
        known = {name: _time(value) for name, value in found.items()}
        computed = known.get("compute_seconds")
        if computed is not None:
            self.compute_seconds, self._before = computed, self.run_seconds
        self._blocking, self._latency = known.get("blocking_seconds"), known.get("write_seconds")
        self._slowdown = known.get("slowdown_seconds")
        self._replan()

    def iteration_done(self, seconds: float, beside_writer: bool = False) -> None:
        """An iteration was committed; ``beside_writer``: a checkpoint was being written meanwhile."""
        self._last = seconds
        self._since += seconds
        self._since_count += 1
        self._spent += seconds
        self.compute_seconds += seconds
        self._count += 1
        if self._count <= 2:
            self._first_iterations(seconds)
        if beside_writer:
            self._beside_seconds += seconds
            self._beside += 1
        else:
            self._recent.append(seconds)
            self._unrested = 0

    def _first_iterations(self, seconds: float) -> None:
        if self._count == 2:
            self._recent.clear()
        elif self._restarted:
            self.start_seconds = max(0.0, self.clock() - self.started - seconds)
            self._spent += self.start_seconds

    def copied(self, blocking_seconds: float) -> None:
        """The state was copied, and is being written from now on; the iterations stood still for so long."""
        self._writing = True
        self._blocked = blocking_seconds
        self._spent += blocking_seconds
        self._since, self._since_count = 0.0, 0
        self._beside_seconds, self._beside = 0.0, 0
        self._look_at = self._tau

    def written(self, latency_seconds: float, blocking_seconds: float = 0.0) -> None:
        """That checkpoint is published, so long after its copy began.

        ``blocking_seconds``: how long the iterations stood still once more, to publish it.
        """
        slowdown = self._slowed(latency_seconds)
        self._blocking = _blend(self._blocking, self._blocked + blocking_seconds)
        self._latency = _blend(self._latency, latency_seconds)
        if slowdown is not None:
            self._slowdown = _blend(self._slowdown, slowdown)
            lost = max(0.0, slowdown)
            self._since = max(0.0, self._since - lost)
            self.compute_seconds -= lost
        self._spent += blocking_seconds
        self._writing = False
        self._unrested += self._beside > 0
        self.written_checkpoints += 1
        self._replan()

    def failed(self) -> None:
        """That checkpoint was given up, or could not even begin: another interval passes before the next."""
        self._writing = False
        self._since, self._since_count = 0.0, 0

    def _slowed(self, latency_seconds: float) -> float | None:
        """How much longer the iterations beside the writer took than others; None: nothing to compare with.

        At most as long as the writer worked: the rest had other reasons.
        """
        if not self._beside:
            return 0.0
        usual = self.iteration_seconds
        if usual is None:
            return None
        more = self._beside_seconds - self._beside * usual
        return min(max(more, -latency_seconds), latency_seconds)

    # ------------------------------------------------------------------ what it knows

    @property
    def iteration_seconds(self) -> float | None:
        """What an iteration takes when nothing is written beside it; None: there was none."""
        if not self._recent:
            return None
        ordered = sorted(self._recent)
        cut = len(ordered) // 4
        middle = ordered[cut : len(ordered) - cut]
        return sum(middle) / len(middle)

    @property
    def cost_seconds(self) -> float:
        """C: what a checkpoint costs the job."""
        if self._blocking is None:
            return max(LEAST_COST, self._guess)
        return max(LEAST_COST, self._blocking + max(0.0, self._slowdown or 0.0))

    @property
    def write_seconds(self) -> float:
        """From a copy until it is published; 0 before the first one."""
        return self._latency or 0.0

    @property
    def mtbf_seconds(self) -> float:
        """M: as given, or as learnt so far."""
        if self.mtbf is not None:
            return self.mtbf
        return learnt_mtbf(self.run_seconds + max(0.0, self.clock() - self.started), self.interrupts)

    @property
    def interval_seconds(self) -> float:
        """tau: work wanted between two checkpoints; the period is never below the time of a write."""
        return self._tau

    def _replan(self) -> None:
        self._cost, self._mtbf = self.cost_seconds, self.mtbf_seconds
        self._tau = max(daly(self._cost, self._mtbf), self.write_seconds - self._cost)
        self._look_at = self._tau

    # ------------------------------------------------------------------ what it is asked

    def due(self, seconds: float | None = None, finishing: bool = False) -> bool:
        """Whether to save after the iteration under way, which took so long so far; None: as the one before.

        Never while a checkpoint is being written, unless ``finishing``: it is on disk, and can be published
        before the next one begins. It costs next to nothing until the interval is nearly over.
        """
        if self.every == 0 or (self._writing and not finishing):
            return False
        if self.every is not None:
            return self._since_count + 1 >= self.every
        usual = self._last if seconds is None else seconds
        since = self._since + usual
        if since + 2 * usual < self._look_at:
            return False
        return self._pays(since, usual)

    def _pays(self, since: float, under_way: float) -> bool:
        if self._writing and self._unrested >= MOST_UNRESTED:
            return False
        usual = self.iteration_seconds or under_way
        if since < self._tau and (
            since + usual < self._tau or not saves_now(since, since + usual, self._cost, self._mtbf)
        ):
            return False
        if self.left is None:
            return True
        left = self.left - self._count - 1
        if left > 0 and best_segments(self._cost, self._mtbf, since + left * usual) > 1:
            return True
        self._look_at = since + 0.1 * self._tau  # the sum of what is unsaved and to come hardly changes
        return False

    def plan(self) -> dict[str, Any]:
        """For the summary. Seconds are per checkpoint, as running means; None where nothing was measured.

        ``predicted_waste`` is the share of the expected wall time that is not the job's own work, by the cost
        model with these figures; ``measured_waste`` is what it was: waiting for copies, slower iterations,
        restarts, and work of earlier attempts that was lost (as far as they noted how long they ran).
        """
        every = self._every()
        return {
            "every_iterations": every,
            "interval_seconds": self._tau,
            "write_seconds": self._latency,
            "blocking_seconds": self._blocking,
            "slowdown_seconds": None if self._slowdown is None else max(0.0, self._slowdown),
            "mtbf_seconds": self.mtbf_seconds,
            "predicted_waste": self._predicted(every),
            "measured_waste": self._measured(),
        }

    def _every(self) -> int:
        """The number of iterations between two checkpoints; 0: none is planned."""
        if self.every is not None:
            return self.every
        usual = self.iteration_seconds or self._last
        if not usual:
            return 0
        if not self.written_checkpoints and best_segments(self._cost, self._mtbf, self._work(usual)) == 1:
            return 0
        return every_iterations(self._tau, usual, self._cost, self._mtbf)

    def _work(self, usual: float) -> float:
        """Seconds of work of the whole job: done, and to come where that is known."""
        left = 0 if self.left is None else max(0, self.left - self._count)
        return self.compute_seconds + left * usual

    def _predicted(self, every: int) -> float | None:
        usual = self.iteration_seconds or self._last
        mtbf, behind = self.mtbf_seconds, self.start_seconds + self.write_seconds
        if not usual:
            return None
        if every:
            return predicted_waste(every * usual, self._cost, mtbf, behind)
        work = self._work(usual)
        return 1.0 - work / finite_wall(1, self._cost, mtbf, self.start_seconds, work)

    def _measured(self) -> float | None:
        spent = self._spent + (self._before or 0.0)
        return max(0.0, 1.0 - self.compute_seconds / spent) if spent else None


def _time(value: Any) -> float | None:
    known = isinstance(value, int | float) and 0 <= value < math.inf
    return float(value) if known else None


def _blend(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + WEIGHT * (newest - mean)
