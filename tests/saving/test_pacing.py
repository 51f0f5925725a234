"""When a checkpoint is due, told by a clock that the test moves."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.errors import UsageError
from iterreduce.saving.intervals import (
    best_segments,
    daly,
    every_iterations,
    expected_segment,
    predicted_waste,
)
from iterreduce.saving.pacing import LEAST_COST, MOST_UNRESTED, Pacing, learnt_mtbf

DAY = 86400.0


@dataclass(frozen=True)
class Past:
    total_seconds: float = 0.0
    interrupts: int = 0


@dataclass
class Job:
    """A loop as the engine drives it: asked before an iteration ends, told after it, copied, written behind.

    ``seconds(n)``: what iteration n takes undisturbed; ``slower``: factor beside the writer.
    """

    every: int | None = None
    mtbf: float | None = None
    past: Past | None = None
    most: int | None = None
    blocking: float = 1.0
    latency: float = 0.0
    slower: float = 1.0
    now: float = 0.0
    saved: list[int] = field(default_factory=list)
    published: float = math.inf
    overlaps: int = 0

    def __post_init__(self) -> None:
        self.pacing = Pacing(self.every, self.mtbf, self.past, self.most, clock=lambda: self.now)
        self.numbers = itertools.count(1)
        self.copied_at = 0.0

    def expecting(self, seconds: float) -> Job:
        """The same job, which guesses that a write takes so long."""
        self.pacing.expect((seconds - 0.01) * 1e9, 1e9)
        return self

    def run(self, iterations: int, seconds: float | list[float] = 1.0) -> list[int]:
        """The iterations after which it saved, of so many more."""
        before = len(self.saved)
        for turn in range(iterations):
            usual = seconds[turn] if isinstance(seconds, list) else seconds
            self._iterate(usual)
        return self.saved[before:]

    def _iterate(self, usual: float) -> None:
        number, pacing = next(self.numbers), self.pacing
        writing = self.published < math.inf
        took = usual + (self.slower - 1) * min(usual, max(0.0, self.published - self.now) if writing else 0.0)
        due = pacing.due(took, finishing=writing and self.now + took >= self.published)
        self.now += took
        pacing.iteration_done(took, writing)
        if writing and self.now >= self.published:
            pacing.written(self.published - self.copied_at)
            self.published, writing = math.inf, False
        if due:
            self.overlaps += writing
            self._copy(number)

    def _copy(self, number: int) -> None:
        self.saved.append(number)
        self.copied_at = self.now
        self.now += self.blocking
        self.pacing.copied(self.blocking)
        if self.latency <= self.blocking:
            self.pacing.written(self.blocking)
        else:
            self.published = self.copied_at + self.latency


def gaps(saved: list[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(saved)]


# ---------------------------------------------------------------------- the interval


def test_a_steady_job_saves_at_dalys_interval_in_whole_iterations() -> None:
    job = Job(mtbf=1000.0, blocking=5.0).expecting(5.0)
    saved = job.run(1000, 10.0)
    assert set(gaps(saved)) == {every_iterations(daly(5.0, 1000.0), 10.0, 5.0, 1000.0)} == {10}
    plan = job.pacing.plan()
    assert plan["every_iterations"] == 10 and plan["mtbf_seconds"] == 1000.0
    assert plan["interval_seconds"] == pytest.approx(daly(5.0, 1000.0))
    assert plan["blocking_seconds"] == pytest.approx(5.0) and plan["write_seconds"] == pytest.approx(5.0)


@given(st.floats(0.01, 20.0), st.floats(0.1, 60.0), st.floats(100.0, 1e5))
@settings(max_examples=40, deadline=None)
def test_what_is_done_is_the_better_of_the_neighbouring_numbers(
    cost: float, iteration: float, mtbf: float
) -> None:
    job = Job(mtbf=mtbf, blocking=cost)
    wanted = every_iterations(daly(cost, mtbf), iteration, cost, mtbf)
    job.pacing.expect(0, 1.0)
    job.run(1, iteration)
    job._copy(1)  # so that C is known
    assert set(gaps(job.run(4 * wanted + 4, iteration))) <= {wanted}
    assert job.pacing.plan()["every_iterations"] == wanted


def test_what_a_checkpoint_costs_is_learnt_and_the_interval_follows() -> None:
    job = Job(mtbf=1000.0, blocking=1.0)
    cheap = gaps(job.run(500, 1.0))[-1]
    job.blocking = 9.0
    dear = gaps(job.run(3000, 1.0))[-1]
    assert cheap == every_iterations(daly(1.0, 1000.0), 1.0, 1.0, 1000.0)
    assert dear == pytest.approx(every_iterations(daly(9.0, 1000.0), 1.0, 9.0, 1000.0), abs=2)


def test_iterations_that_become_longer_are_saved_after_fewer_of_them() -> None:
    job = Job(mtbf=1000.0, blocking=5.0)
    assert gaps(job.run(400, 2.0))[-1] == 48
    assert gaps(job.run(400, 24.0))[-1] == 4
    assert job.pacing.plan()["every_iterations"] == 4


def test_iterations_that_shrink_are_saved_after_a_time_and_not_after_a_number() -> None:
    job = Job(mtbf=1000.0, blocking=5.0)
    shrinking = [20.0 * 0.99**n for n in range(300)]
    saved = job.run(300, shrinking)
    spans = [sum(shrinking[a:b]) for a, b in itertools.pairwise(saved)]
    assert len(spans) > 10 and max(abs(span - daly(5.0, 1000.0)) for span in spans) <= 20


def test_one_iteration_that_takes_very_long_changes_nothing_later() -> None:
    job = Job(mtbf=1000.0, blocking=5.0)
    job.run(100, 2.0)
    saved = job.run(101, [500.0] + [2.0] * 100)
    assert saved[0] == 101 and gaps(saved)[0] == 48


def test_the_first_iteration_compiles_and_does_not_count() -> None:
    job = Job(mtbf=1000.0)
    job.run(1, 30.0)
    assert job.pacing.iteration_seconds == 30.0
    job.run(1, 0.5)
    assert job.pacing.iteration_seconds == 0.5


def test_an_iteration_much_longer_than_the_interval_is_saved_each_time() -> None:
    job = Job(mtbf=1000.0, blocking=1.0)
    assert job.run(6, 500.0) == [1, 2, 3, 4, 5, 6]
    assert job.pacing.plan()["every_iterations"] == 1


def test_tiny_states_of_tiny_iterations_are_saved_every_13_seconds() -> None:
    job = Job(blocking=1e-6)
    job.run(30_000, 0.01)
    saved = gaps(job.run(20_000, 0.01))
    assert saved and all(gap * 0.01 == pytest.approx(daly(LEAST_COST, DAY), rel=1e-2) for gap in saved)
    assert saved[0] * 0.01 == pytest.approx(13.1, abs=0.1)


def test_due_is_not_said_before_the_interval_is_nearly_over() -> None:
    pacing = Pacing(mtbf=1000.0, clock=lambda: 0.0)
    pacing.expect(10**9, 2e8)
    assert not any(pacing.due(seconds) for seconds in (0.0, 1.0, 40.0))
    assert pacing.due(200.0)  # one iteration alone is longer than the interval


# ---------------------------------------------------------------------- the first write


def test_before_the_first_write_its_cost_is_guessed_from_the_bytes() -> None:
    small, large = Job(mtbf=1e4), Job(mtbf=1e4)
    small.pacing.expect(10**6, 2e8)
    large.pacing.expect(10**11, 2e8)
    assert small.pacing.cost_seconds == pytest.approx(0.015)
    assert large.pacing.cost_seconds == pytest.approx(500.01)
    assert small.run(4000, 1.0)[0] == pytest.approx(daly(0.015, 1e4), abs=1)
    assert large.run(4000, 1.0)[0] == pytest.approx(daly(500.01, 1e4), abs=1)


def test_after_the_first_write_the_guess_is_forgotten() -> None:
    job = Job(mtbf=1e4, blocking=2.0)
    job.pacing.expect(10**11, 2e8)
    first, *rest = job.run(5000, 1.0)
    assert first > 1000 and gaps(rest)[0] == pytest.approx(daly(2.0, 1e4), abs=1)


def test_a_guess_made_after_a_write_does_not_count() -> None:
    job = Job(mtbf=1000.0, blocking=5.0)
    job.run(300, 1.0)
    before = job.pacing.interval_seconds
    job.pacing.expect(10**12, 1e6)
    assert job.pacing.interval_seconds == before


# ---------------------------------------------------------------------- writing behind the iterations


def test_never_two_writes_at_once_and_the_period_is_no_shorter_than_a_write() -> None:
    job = Job(mtbf=100.0, blocking=0.01, latency=60.0)  # Daly alone: every 1.4 s
    saved = job.run(1000, 1.0)
    assert job.overlaps == 0 and len(saved) > 10
    assert min(gaps(saved)) >= 60
    assert job.pacing.interval_seconds + job.pacing.cost_seconds == pytest.approx(60.0)


@pytest.mark.parametrize("every", [None, 1, 7])
def test_nothing_is_due_while_a_write_is_under_way(every: int | None) -> None:
    pacing = Pacing(every, mtbf=1.0, clock=lambda: 0.0)
    pacing.copied(0.1)
    for _ in range(50):
        assert not pacing.due(100.0)
        pacing.iteration_done(100.0, True)
    pacing.written(5000.0)
    assert pacing.due(100.0)


def test_slower_iterations_beside_the_writer_are_part_of_the_cost() -> None:
    job = Job(mtbf=10_000.0, blocking=1.0, latency=10.0, slower=1.4)
    job.run(3000, 1.0)
    plan = job.pacing.plan()
    assert plan["slowdown_seconds"] == pytest.approx(0.4 * 9 / 1.4, rel=0.05)  # of 9 s beside each
    assert plan["blocking_seconds"] == pytest.approx(1.0)
    assert job.pacing.cost_seconds == pytest.approx(plan["blocking_seconds"] + plan["slowdown_seconds"])
    assert plan["write_seconds"] == pytest.approx(10.0)


def test_noise_of_iterations_is_not_taken_for_a_slowdown() -> None:
    draw = random.Random(3)
    job = Job(mtbf=1000.0, blocking=1.0, latency=4.0)
    job.run(4000, [draw.uniform(0.5, 1.5) for _ in range(4000)])
    assert job.pacing.plan()["slowdown_seconds"] < 0.5


def test_a_slowdown_is_never_more_than_the_write_took() -> None:
    job = Job(mtbf=1000.0, blocking=1.0, latency=3.0)
    job.run(45, 1.0)
    number = len(job.saved)
    while len(job.saved) == number:
        job.run(1, 1.0)
    job.run(1, 400.0)  # the machine hung while it was written
    assert job.pacing.plan()["slowdown_seconds"] <= 3.0


def test_the_time_of_a_slowdown_is_no_work() -> None:
    job = Job(mtbf=10_000.0, blocking=1.0, latency=10.0, slower=1.4)
    job.run(3000, 1.0)
    assert job.pacing.compute_seconds == pytest.approx(3000.0, rel=2e-3)


def test_where_all_iterations_run_beside_a_writer_one_is_left_undisturbed_now_and_then() -> None:
    job = Job(mtbf=10.0, blocking=0.1, latency=3.0, slower=1.5)
    saved = job.run(100, 20.0)
    left = sorted(set(range(1, 101)) - set(saved))
    assert left[0] in (MOST_UNRESTED + 1, MOST_UNRESTED + 2) and 5 <= len(left) <= 100 // MOST_UNRESTED
    assert job.pacing.plan()["slowdown_seconds"] == pytest.approx(1.5, rel=0.1)


def test_a_slowdown_is_unknown_while_there_is_nothing_to_compare_with() -> None:
    job = Job(every=1, blocking=0.1, latency=3.0)
    job.run(20, 20.0)
    assert job.pacing.plan()["slowdown_seconds"] is None


# ---------------------------------------------------------------------- failed writes


def test_after_a_failed_write_another_interval_passes() -> None:
    job = Job(mtbf=1000.0, blocking=5.0).expecting(5.0)
    job.run(300, 10.0)
    for _ in range(3):
        dues = []
        for _ in range(12):
            dues.append(job.pacing.due(10.0))
            job.pacing.iteration_done(10.0)
            if dues[-1]:
                job.pacing.failed()  # it could not even begin
                break
        assert dues == [False] * 9 + [True]
        job.pacing.copied(5.0)
        job.pacing.failed()


def test_every_n_iterations_tries_again_n_later_when_a_write_failed() -> None:
    pacing = Pacing(3, clock=lambda: 0.0)
    dues = []
    for _ in range(9):
        dues.append(pacing.due(1.0))
        pacing.iteration_done(1.0)
        if dues[-1]:
            pacing.failed()
    assert dues == [False, False, True] * 3


# ---------------------------------------------------------------------- short jobs


def test_a_job_too_short_to_need_one_saves_nothing() -> None:
    job = Job(mtbf=2.63 * 3600, most=60, blocking=1.0)  # "20 nodes and my query takes 1 min"
    job.pacing.expect(2 * 10**8, 2e8)
    assert job.run(60, 1.0) == []
    assert job.pacing.plan()["every_iterations"] == 0


def test_near_the_end_nothing_is_saved_any_more() -> None:
    job = Job(mtbf=1000.0, most=500, blocking=5.0)
    saved = job.run(500, 1.0)
    interval = daly(5.0, 1000.0)
    assert len(saved) >= 4 and 500 - saved[-1] == pytest.approx(interval, rel=0.45)
    assert best_segments(5.0, 1000.0, 500.0 - saved[-1]) == 1


def best_of_all_plans(most: int, seconds: float, cost: float, mtbf: float) -> float:
    """The least expected wall time of any choice of iterations to save after, from the end backwards."""
    later = [0.0]  # of so many iterations that are left
    for left in range(1, most + 1):
        whole = expected_segment(left * seconds, mtbf)
        cut = [expected_segment(n * seconds + cost, mtbf) + later[left - n] for n in range(1, left)]
        later.append(min([whole, *cut]))
    return later[most]


@given(st.floats(0.1, 10.0), st.floats(100.0, 1e4), st.integers(1, 120), st.floats(0.1, 30.0))
@settings(max_examples=40, deadline=None)
def test_a_job_of_known_length_is_saved_nearly_as_well_as_can_be(
    cost: float, mtbf: float, most: int, seconds: float
) -> None:
    job = Job(mtbf=mtbf, most=most, blocking=cost).expecting(cost)
    ends = [*job.run(most, seconds), most]
    pieces = [b - a for a, b in itertools.pairwise([0, *ends])]
    wall = sum(expected_segment(n * seconds + cost, mtbf) for n in pieces[:-1])
    wall += expected_segment(pieces[-1] * seconds, mtbf)
    assert wall <= 1.02 * best_of_all_plans(most, seconds, cost, mtbf)
    if best_segments(cost, mtbf, most * seconds) == 1:
        assert job.saved == []


def test_after_the_last_iteration_nothing_is_saved() -> None:
    assert Job(mtbf=10.0, most=5, blocking=1.0).run(5, 100.0) == [1, 2, 3, 4]


def test_a_job_without_a_bound_saves_first_after_an_interval() -> None:
    job = Job(mtbf=1000.0).expecting(5.0)
    assert job.run(200, 1.0)[0] == pytest.approx(daly(5.0, 1000.0), abs=1)


def test_a_restarted_job_has_only_the_rest_of_its_iterations_before_it() -> None:
    job = Job(mtbf=1000.0, most=1000, blocking=5.0)
    job.expecting(5.0).pacing.restarted(950)
    assert job.run(50, 1.0) == []


def test_a_restarted_job_remembers_what_a_write_costs() -> None:
    first = Job(mtbf=10_000.0, blocking=1.0, latency=10.0, slower=1.4)
    first.run(3000, 1.0)
    second = Job(mtbf=10_000.0)
    second.pacing.restarted(3000, json.loads(json.dumps(first.pacing.remembered())))
    assert second.pacing.cost_seconds == first.pacing.cost_seconds > 3
    assert second.pacing.write_seconds == pytest.approx(10.0)
    assert second.pacing.interval_seconds == first.pacing.interval_seconds


@pytest.mark.parametrize("bad", [None, -1.0, math.nan, math.inf, "5", [5.0]])
def test_what_was_remembered_and_is_no_time_is_as_if_unknown(bad: object) -> None:
    job = Job(mtbf=1000.0).expecting(5.0)
    before = job.pacing.plan()
    job.pacing.restarted(7, dict.fromkeys(job.pacing.remembered(), bad))
    job.pacing.restarted(7, {"something": bad})
    job.pacing.restarted(7, bad)
    assert job.pacing.plan() == before


# ---------------------------------------------------------------------- options


def test_every_n_saves_after_every_n_iterations_whatever_they_take() -> None:
    job = Job(every=5, blocking=0.1)
    assert job.run(23, 1000.0) == [5, 10, 15, 20]
    assert job.pacing.plan()["every_iterations"] == 5


def test_never_is_never() -> None:
    job = Job(every=0, mtbf=1.0, blocking=0.1)
    assert job.run(100, 1000.0) == []
    assert job.pacing.plan()["every_iterations"] == 0 and job.pacing.plan()["predicted_waste"] > 0.99


def test_a_job_that_is_said_to_be_never_interrupted_saves_nothing() -> None:
    job = Job(mtbf=math.inf)
    assert job.run(100, 1000.0) == []
    assert job.pacing.plan()["predicted_waste"] == 0.0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"every": -1}, "wanted N >= 0, got -1"),
        ({"mtbf": 0.0}, "above zero, got 0.0"),
        ({"mtbf": math.nan}, "above zero, got nan"),
        ({"iterations": -1}, ">= 0, got -1"),
    ],
)
def test_values_that_make_no_sense_are_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Pacing(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a rate > 0"):
        Pacing().expect(5, 0)


# ---------------------------------------------------------------------- mean time to interrupt


def test_the_mean_time_is_learnt_from_the_history_and_one_that_is_given_is_kept() -> None:
    hourly = Past(10 * 3600.0, 10)
    assert Job(past=hourly).pacing.mtbf_seconds == pytest.approx(1.16 * 3600, rel=0.01)
    assert Job(past=hourly, mtbf=77.0).pacing.mtbf_seconds == 77.0
    assert Job().pacing.mtbf_seconds == DAY


def test_a_job_that_runs_on_without_interrupts_is_saved_less_often() -> None:
    job = Job(past=Past(0.0, 0), blocking=10.0)
    early = gaps(job.run(1000, 60.0))[-1]
    job.now += 20 * DAY
    late = gaps(job.run(2000, 60.0))[-1]
    assert job.pacing.mtbf_seconds > 20 * DAY and late == pytest.approx(early * math.sqrt(21), rel=0.1)


@given(st.floats(0.0, 1e8), st.integers(0, 50), st.floats(1.0, 100.0))
@settings(max_examples=50, deadline=None)
def test_more_interrupts_never_raise_the_mean_time_and_a_longer_run_never_lowers_it(
    run_seconds: float, interrupts: int, longer: float
) -> None:
    learnt = learnt_mtbf(run_seconds, interrupts)
    assert learnt > 0
    assert learnt_mtbf(run_seconds, interrupts + 1) <= learnt * (1 + 1e-12)
    assert learnt_mtbf(run_seconds * longer, interrupts) >= learnt * (1 - 1e-12)


def test_with_many_interrupts_the_mean_time_is_that_of_the_history() -> None:
    assert learnt_mtbf(500 * 100.0, 500) == pytest.approx(100.0, rel=0.01)
    assert learnt_mtbf(0.0, 3) >= 1.0  # attempts that never noted how long they ran
    with pytest.raises(UsageError):
        learnt_mtbf(-1.0, 0)


# ---------------------------------------------------------------------- waste


def test_predicted_and_measured_waste_of_an_undisturbed_job() -> None:
    job = Job(mtbf=1000.0, blocking=5.0)
    job.run(1001, 10.0)
    plan = job.pacing.plan()
    assert plan["predicted_waste"] == pytest.approx(predicted_waste(100.0, 5.0, 1000.0, 5.0))
    assert plan["measured_waste"] == pytest.approx(5 / 105, rel=0.02)  # nothing failed


def test_measured_waste_counts_lost_work_and_restarts_of_all_attempts() -> None:
    first = Job(mtbf=1000.0, blocking=5.0).expecting(5.0)
    first.run(14, 10.0)
    assert first.saved == [10]
    saved_at, kept = 10, 100.0
    second = Job(mtbf=1000.0, blocking=5.0, past=Past(first.now, 1))  # killed after iteration 14
    second.pacing.restarted(saved_at, {"compute_seconds": kept})
    second.now = 20.0  # start, sources, restore
    second.run(10, 10.0)
    wall = first.now + second.now
    assert second.pacing.plan()["measured_waste"] == pytest.approx(1 - 200.0 / wall)
    assert second.pacing.start_seconds == pytest.approx(20.0)


def test_a_job_of_which_nothing_is_known_yet_has_a_plan() -> None:
    plan = Job().pacing.plan()
    assert plan["measured_waste"] is None and plan["predicted_waste"] is None
    assert plan["write_seconds"] is None and plan["every_iterations"] == 0
