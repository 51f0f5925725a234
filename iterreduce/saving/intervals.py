"""How long to compute between two checkpoints, and what a job then takes: named formulas and their validity.

All are plain functions of floats. The symbols are those of the literature, all in one unit of time:

    C    what one checkpoint costs the job (Daly's delta)
    M    mean time to interrupt of the whole job, by a Poisson process; `math.inf`: never
    R    how long a restart takes, until the job computes again
    D    how long the job is down before a restart begins
    Ts   how long the job computes when nothing interrupts it and nothing is saved
    tau  how long it *computes* between two checkpoints; the period is tau + C (many papers call that tau)

`daly` is what the runtime uses; `exact` is the optimum of the cost model that all of them approximate.
Interrupts that come in bursts, or more often early on (Weibull), and checkpoints on several levels of storage
are outside these models. A job that writes behind its iterations, and so has a checkpoint only some time L
after its state was copied, loses L more with every interrupt: give `expected_wall` R + L for R, which is
exact as long as L <= tau + C (`docs/checkpoints.md`). So neither R, D nor L moves the optimum.

This is no clock and no controller: `iterreduce.saving.pacing` measures and decides. An argument that is
negative, NaN or infinite where it must not be raises UsageError; a time too long for a float is `math.inf`.

J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.
J. T. Daly, "A model for predicting the optimum checkpoint interval for restart dumps", ICCS 2003.
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.
"""

from __future__ import annotations

import math

from iterreduce.errors import UsageError

SERIES_BELOW = 1e-8  # of C / M: there eq. 37 errs by 1e-14, and rounding in `_fixpoint` by more
MOST_SEGMENTS = 1 << 53


def young(C: float, M: float) -> float:
    """Young's first-order interval, sqrt(2 C M). Valid for C much smaller than M; too long otherwise.

    Source: Young 1974.

    >>> young(C=5, M=24 * 60)  # minutes
    120.0
    """
    _check(C=C, M=M)
    return _scaled(M, math.sqrt(2 * C / M))


def daly_low_order(C: float, M: float, R: float) -> float:
    """Daly's low-order interval, sqrt(2 C (M + R)). Valid for tau + C much smaller than M.

    Its simple cost model charges a restart to the work that is lost; in the complete one (`expected_wall`) R
    does not move the optimum. Source: Daly 2003, and 2006 section 2.

    >>> round(daly_low_order(C=5, M=24 * 60, R=10), 3)
    120.416
    """
    _check(C=C, M=M, R=R)
    return _scaled(M, math.sqrt(2 * C / M * (1 + R / M)))


def slide(C: float, M: float) -> float:
    """sqrt(2 C M) - C for C < M / 2, and M from there on.

    Without the guard it would fall again beyond C = M / 2, to 0 at C = 2 M. Often quoted after Daly 2003.

    >>> round(slide(C=5, M=24 * 60), 3), slide(C=5, M=10)
    (115.0, 10)
    """
    _check(C=C, M=M)
    return _scaled(M, math.sqrt(2 * C / M) - C / M) if C < M / 2 else M


def daly(C: float, M: float) -> float:
    """Daly's higher-order interval: the one that the runtime uses.

    sqrt(2 C M) [1 + (1/3) (C / 2M)^(1/2) + (1/9) (C / 2M)] - C for C < 2 M, and M from there on. The expected
    wall time is within 0.19 % of the least possible for C / M from 0 to 6 (worst just below 2).
    Source: Daly 2006, eq. 37.

    >>> round(daly(C=5, M=24 * 60), 3), daly(C=5, M=2)
    (116.69, 2)
    """
    _check(C=C, M=M)
    return _scaled(M, _series(C / M)) if C < 2 * M else M


def exact(C: float, M: float) -> float:
    """The interval of the least `expected_wall`, for any C / M: M [1 + W(-exp(-1 - C / M))].

    W is Lambert's function, principal branch. x = tau / M solves x = 1 - exp(-x - C / M); Newton's method
    from x = 1 comes down to it without overshooting, since the difference of both sides is convex.

    >>> round(exact(C=5, M=24 * 60), 3)
    116.69
    """
    _check(C=C, M=M)
    c = C / M
    return _scaled(M, _series(c) if c < SERIES_BELOW else _fixpoint(c))


def expected_segment(length: float, M: float, R: float = 0.0, D: float = 0.0) -> float:
    """Expected time until ``length`` has passed undisturbed: (M + D) exp(R / M) (exp(length / M) - 1).

    Interrupts may hit restarts too; every one costs D, then R, then the segment again from its beginning.
    Source: Daly 2006; the expectation is exact for exponential interrupts.

    >>> round(expected_segment(1.0, M=1.0), 3), expected_segment(1.0, M=math.inf)
    (1.718, 1.0)
    """
    _check(length=length, M=M, R=R, D=D)
    if math.isinf(M) or length == 0:
        return length
    return (M + D) * _exp(R / M) * _expm1(length / M)


def expected_wall(tau: float, C: float, M: float, R: float, Ts: float, D: float = 0.0) -> float:
    """Expected wall time of a job that saves whenever it has computed for tau, its end included.

    (M + D) exp(R / M) (exp((tau + C) / M) - 1) Ts / tau. Valid for Ts much longer than tau, so that it does
    not matter that the last segment needs no checkpoint: otherwise `finite_wall`. To first order the waste is
    C / tau + tau / (2 M) of Ts. Source: Daly 2006.

    >>> minutes = expected_wall(tau=116.69, C=5, M=24 * 60, R=10, Ts=500 * 60)
    >>> round(minutes / 60, 2)
    547.88
    """
    _check(tau=tau, C=C, M=M, R=R, Ts=Ts, D=D)
    if Ts == 0:
        return 0.0
    if tau == 0:
        return math.inf if C > 0 or math.isinf(M) else (1 + D / M) * _exp(R / M) * Ts
    return expected_segment(tau + C, M, R, D) * (Ts / tau)


def finite_wall(n: int, C: float, M: float, R: float, Ts: float, D: float = 0.0) -> float:
    """Expected wall time of a job of n equal segments, with a checkpoint after each but the last.

    n = 1 means that nothing is saved. Exact in the model, whatever the lengths.

    >>> round(finite_wall(1, C=1, M=60, R=0, Ts=20), 2), round(finite_wall(2, C=1, M=60, R=0, Ts=20), 2)
    (23.74, 22.95)
    """
    _check(C=C, M=M, R=R, Ts=Ts, D=D)
    _check_segments(n)
    saved = (n - 1) * expected_segment(Ts / n + C, M, R, D) if n > 1 else 0.0
    return saved + expected_segment(Ts / n, M, R, D)


def longer_last_wall(n: int, C: float, M: float, R: float, Ts: float, D: float = 0.0) -> float:
    """Expected wall time of the best plan with n - 1 checkpoints: E* = n E[(Ts + (n - 1) C) / n].

    All segments take equally long, so the last one, which saves nothing, computes for C longer. Equal shares
    of work (`finite_wall`) cost at most 0.01 % more at C / M = 0.01, and 0.4 % at 0.1.

    >>> longer_last_wall(2, C=1, M=60, R=0, Ts=20) < finite_wall(2, C=1, M=60, R=0, Ts=20)
    True
    """
    _check(C=C, M=M, R=R, Ts=Ts, D=D)
    _check_segments(n)
    return n * expected_segment((Ts + (n - 1) * C) / n, M, R, D)


def best_segments(C: float, M: float, Ts: float) -> int:
    """The n of the least `finite_wall`; 1 means that saving does not pay. R and D do not matter to it.

    As a function of n the time is first concave, then convex, with its least value near Ts / `exact`: from
    there neighbours are tried, and at last n = 1. C must not be 0: saving for nothing pays always.

    >>> best_segments(C=5, M=24 * 60, Ts=500 * 60)
    257
    >>> best_segments(C=1, M=2.63 * 3600, Ts=60)  # the query takes a minute
    1
    """
    _check(C=C, M=M, Ts=Ts)
    if C == 0:
        raise UsageError("checkpoints that cost nothing have no best number; wanted C > 0")
    if math.isinf(M):
        return 1

    def wall(n: int) -> float:
        return finite_wall(n, C, M, 0.0, Ts)

    n = max(1, round(min(Ts / exact(C, M), MOST_SEGMENTS)))
    while n > 1 and wall(n - 1) < wall(n):
        n -= 1
    while wall(n + 1) < wall(n):
        n += 1
    return n if wall(n) < wall(1) else 1


def every_iterations(tau: float, iteration_seconds: float, C: float, M: float) -> int:
    """After how many iterations to save where tau is wanted: at least 1; 0, for never, if tau is infinite.

    tau lies between two whole numbers of iterations; the one of less `expected_wall` is taken.

    >>> every_iterations(tau=95.0, iteration_seconds=10.0, C=5, M=902.5)
    9
    """
    _check(iteration_seconds=iteration_seconds, C=C, M=M)
    if math.isinf(tau):
        return 0
    _check(tau=tau)
    if tau <= iteration_seconds:
        return 1
    ratio = min(tau / iteration_seconds, MOST_SEGMENTS) if iteration_seconds else MOST_SEGMENTS
    below, above = math.floor(ratio), math.ceil(ratio)
    return below if saves_now(below * iteration_seconds, above * iteration_seconds, C, M) else above


def saves_now(work: float, later: float, C: float, M: float) -> bool:
    """Whether to save after this much work rather than at the next chance, after ``later``.

    >>> saves_now(work=60.0, later=160.0, C=5, M=1000.0), saves_now(work=60.0, later=120.0, C=5, M=1000.0)
    (True, False)
    """
    return expected_wall(work, C, M, 0.0, 1.0) <= expected_wall(later, C, M, 0.0, 1.0)


def predicted_waste(tau: float, C: float, M: float, R: float = 0.0, D: float = 0.0) -> float:
    """The share of the expected wall time that is not the job's own work: checkpoints, lost work, restarts.

    Work that comes from one checkpoint after another; for a job too short to save at all, use `finite_wall`.

    >>> round(predicted_waste(tau=120, C=5, M=24 * 60), 3)  # first order: sqrt(2 C / M) = 0.083 of the work
    0.081
    """
    return 1.0 - 1.0 / expected_wall(tau, C, M, R, 1.0, D)


def _series(c: float) -> float:
    """Eq. 37 over M, as a function of c = C / M."""
    return math.sqrt(2 * c) * (1 + math.sqrt(c / 2) / 3 + c / 18) - c


def _fixpoint(c: float) -> float:
    """x = 1 - exp(-x - c), from above."""
    x = 1.0
    while True:
        excess = x + math.expm1(-x - c)
        lower = x - excess / -math.expm1(-x - c)
        if not lower < x:
            return x
        x = lower


def _scaled(M: float, ratio: float) -> float:
    return math.inf if math.isinf(M) else M * ratio


def _exp(x: float) -> float:
    return _expm1(x) + 1.0


def _expm1(x: float) -> float:
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def _check(**values: float) -> None:
    for name, value in values.items():
        if name == "M":
            if not value > 0:
                raise UsageError(f"M, a mean time to interrupt, must be above zero, got {value}")
        elif not 0 <= value < math.inf:
            raise UsageError(f"{name} must be a time: finite and not negative, got {value}")


def _check_segments(n: int) -> None:
    if n < 1:
        raise UsageError(f"a job has at least one segment, got n = {n}")
