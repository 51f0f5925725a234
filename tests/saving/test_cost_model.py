"""The cost model's formula against simulated jobs and against a job followed step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.daly_model import Attempt, mean_and_error, replay, simulate
from iterreduce.saving.intervals import daly, exact, expected_segment, expected_wall

C, R = 5.0, 10.0  # minutes
DALY = {  # M: (Daly's rounded tau, segments, the model's hours)
    24 * 60.0: (117.0, 256, 547.01),
    6 * 60.0: (57.0, 526, 609.85),
    15.0: (9.1, 3297, 2504.4),
}


@pytest.mark.parametrize("M", DALY)
def test_simulated_jobs_take_what_the_model_says_at_dalys_intervals(M: float) -> None:
    tau, segments, hours = DALY[M]
    model = expected_wall(tau, C, M, R, segments * tau) / 60
    assert model == pytest.approx(hours, abs=0.05)
    mean, error = mean_and_error(simulate(400, segments, tau + C, M, R, np.random.default_rng(1)) / 60)
    assert abs(mean - model) <= 3 * error and error < 0.005 * model


@pytest.mark.parametrize("M", DALY)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_simulated_jobs_lose_what_the_model_says_at_half_and_twice_the_interval(
    M: float, factor: float
) -> None:
    hours = 500 if M > 60 else 100
    tau = factor * daly(C, M)
    segments = round(hours * 60 / tau)
    work = segments * tau
    least = expected_wall(exact(C, M), C, M, R, work)
    walls = simulate(600, segments, tau + C, M, R, np.random.default_rng(2))
    ratio, error = mean_and_error(walls / least)
    assert abs(ratio - expected_wall(tau, C, M, R, work) / least) <= 3 * error


@pytest.mark.parametrize(("latency", "M"), [(0.0, 8.0), (2.0, 8.0), (4.0, 8.0), (4.4, 30.0)])
def test_a_write_behind_the_iterations_costs_what_a_longer_restart_would(latency: float, M: float) -> None:
    periods, tau, cost, restart = 1000, 4.0, 0.5, 1.0
    mean, error = mean_and_error(
        simulate(300, periods, tau + cost, M, restart, np.random.default_rng(3), latency)
    )
    model = expected_wall(tau, cost, M, restart + latency, periods * tau)
    at_the_ends = expected_segment(tau + cost + latency, M, restart)  # the first one has none before it
    assert abs(mean - model) <= 3 * error + at_the_ends


def step_by_step(iterations: int, attempts: list[Attempt]) -> float:
    """The replay in the plainest way: one iteration after another."""
    wall, saved = 0.0, 0
    for number, attempt in enumerate(attempts):
        lasts = math.inf if number == len(attempts) - 1 else attempt.seconds
        now, position, pending = attempt.start, saved, []
        while position < iterations and now <= lasts:
            now += attempt.iteration
            position += 1
            if attempt.every and (position - saved) % attempt.every == 0 and position < iterations:
                pending.append((now + attempt.latency, position))
                now += attempt.blocking
        if position == iterations and now <= lasts:
            return wall + now
        wall += lasts
        saved = max([saved, *(at for when, at in pending if when <= lasts)])
    raise AssertionError("the last attempt has no end")


@st.composite
def measured(draw: st.DrawFn) -> Attempt:
    """Times in eighths, of which sums are exact."""
    eighths = [draw(st.integers(1, most)) / 8 for most in (400, 40, 16, 16)]
    seconds, start, iteration, blocking = eighths
    every = draw(st.integers(0, 6))
    latency = blocking + draw(st.integers(0, 8)) / 8 * (every * iteration)
    return Attempt(seconds, start, iteration, every, blocking, latency)


@given(st.integers(1, 60), st.lists(measured(), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_replay_is_the_job_followed_step_by_step(iterations: int, attempts: list[Attempt]) -> None:
    assert replay(iterations, attempts) == pytest.approx(step_by_step(iterations, attempts))


def test_replayed_jobs_take_what_simulated_ones_take() -> None:
    """Attempts drawn from the same law, with times like those of real runs, and replayed one by one."""
    rng = np.random.default_rng(4)
    M, steady = 2.0, {"start": 0.1, "iteration": 0.01, "every": 25, "blocking": 0.02, "latency": 0.1}

    def one_run() -> float:
        uptimes = rng.exponential(M, 200)
        return replay(1000, [Attempt(seconds, **steady) for seconds in uptimes])

    mean, error = mean_and_error([one_run() for _ in range(1000)])
    model = expected_wall(0.25, 0.02, M, 0.1 + 0.1, 10.0)
    assert mean == pytest.approx(
        model, abs=3 * error + 0.1 + 0.1
    )  # the start; no copy and no latency at the end
