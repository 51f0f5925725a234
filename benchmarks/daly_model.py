"""The cost model of checkpoints, by other roads than its formula: simulated, and replayed for one run.

`simulate` draws interrupts and follows many jobs event by event; nothing of `iterreduce.saving.intervals` is
in it. `replay` takes what was measured of one run (when it was interrupted, how long its iterations, copies,
writes and restarts took) and says how long the model takes for it. Seconds, or any other unit of time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def simulate(
    runs: int,
    periods: int,
    length: float,
    M: float,
    R: float,
    rng: np.random.Generator,
    latency: float = 0.0,
) -> np.ndarray:
    """Wall times of so many jobs of ``periods`` segments with a checkpoint each, of ``length`` = tau + C.

    The time between interrupts is exponential with mean M; they hit work, checkpoints and restarts alike.
    A checkpoint counts ``latency`` after its segment's end, while the job goes on. Returns float64[runs].
    """
    now = np.zeros(runs)
    begun = np.zeros(runs)  # when the job began to compute, from the checkpoint that it had
    left = np.full(runs, periods)
    interrupt = rng.exponential(M, runs)
    wall = np.empty(runs)
    alive = np.arange(runs)
    while len(alive):
        end = begun + left * length
        done = end <= interrupt
        wall[alive[done]] = end[done]
        go = ~done
        alive, now, begun, left, interrupt = alive[go], interrupt[go], begun[go], left[go], interrupt[go]
        kept = np.floor((now - begun - latency) / length).astype(np.int64)
        left = left - np.maximum(kept, 0)
        interrupt = now + rng.exponential(M, len(alive))
        again = np.flatnonzero(interrupt < now + R)
        while len(again):  # interrupted before it computes again
            now[again] = interrupt[again]
            interrupt[again] = now[again] + rng.exponential(M, len(again))
            again = again[interrupt[again] < now[again] + R]
        begun = now + R
    return wall


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run as it was measured, in seconds.

    ``seconds``: from its start until it was interrupted, or the job was done; ``start``: of these, before its
    first iteration; ``iteration``: mean of its iterations; ``every``: iterations between copies (0: none was
    made); ``blocking``: how long a copy stopped them; ``latency``: from a copy's begin until it is published.
    """

    seconds: float
    start: float
    iteration: float
    every: int
    blocking: float
    latency: float

    @property
    def period(self) -> float:
        return self.every * self.iteration + self.blocking

    def published(self) -> int:
        """How many iterations are saved when it is interrupted."""
        if not self.every:
            return 0
        begun = (
            self.seconds - self.start - self.latency + self.blocking
        )  # the last copy that can be published
        return self.every * max(0, math.floor(begun / self.period))

    def until_done(self, iterations: int) -> float:
        """How long it takes for so many; behind the last one nothing is saved."""
        copies = (iterations - 1) // self.every if self.every and iterations else 0
        return self.start + iterations * self.iteration + copies * self.blocking


def replay(iterations: int, attempts: Sequence[Attempt]) -> float:
    """How long the model takes for a job of so many iterations that was interrupted when these attempts were.

    >>> steady = dict(start=1.0, iteration=1.0, every=5, blocking=0.5, latency=0.5)
    >>> replay(20, [Attempt(9.0, **steady), Attempt(99.0, **steady)])  # 5 iterations saved; 1 + 15 + 2 copies
    26.0
    """
    wall, left = 0.0, iterations
    for attempt in attempts[:-1]:
        needs = attempt.until_done(left)
        if needs <= attempt.seconds:  # the model is done before that interrupt comes
            return wall + needs
        wall += attempt.seconds
        left = max(0, left - attempt.published())
    return wall + attempts[-1].until_done(left)
