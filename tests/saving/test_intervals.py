"""The formulas against published figures, against each other, and against plain arithmetic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import lambertw

from iterreduce.errors import UsageError
from iterreduce.saving.intervals import (
    best_segments,
    daly,
    daly_low_order,
    every_iterations,
    exact,
    expected_segment,
    expected_wall,
    finite_wall,
    longer_last_wall,
    predicted_waste,
    slide,
    young,
)

# Minutes. M: Daly's printed tau, eq. 37, exact, Young, slide; hours: least wall time
C, R, TS = 5.0, 10.0, 500 * 60.0
DALY_TABLE = {
    24 * 60.0: (117, 116.690, 116.690, 120.000, 115.000, 547.88),
    6 * 60.0: (57, 56.713, 56.714, 60.000, 55.000, 610.22),
    15.0: (9.1, 9.141, 9.167, 12.247, 7.247, 2504.16),
}

# C / M: tau / M, then (relative error of tau, excess of the wall time) of eq. 37, slide unguarded, Young
RATIO_TABLE = {
    1e-3: (0.044057, "-3.4e-07", None, "-0.8", "1.3e-06", "+1.5", "4.9e-06"),
    1e-2: (0.134835, "-1.1e-05", "8e-12", "-2.5", "4.4e-05", "+4.9", "1.5e-04"),
    0.1: (0.383183, "-4.0e-04", "3e-08", "-9.4", "1.8e-03", "+16.7", "4.7e-03"),
    0.25: (0.551218, "-1.7e-03", "8e-07", "-17", "9.4e-03", "+28", "1.8e-02"),
    0.5: (0.698290, "-5.5e-03", "1.1e-05", "-28", "3.7e-02", "+43", "5.0e-02"),
    1: (0.841406, "-1.8e-02", "1.4e-04", "-51", "1.9e-01", "+68", "1.4e-01"),
    1.99: (0.946974, "-6.1e-02", "1.9e-03", "-99.5", "6.6e+01", "+111", "4.0e-01"),
    2: (0.947531, "+5.5e-02", "1.4e-03", None, None, "+111", "4.1e-01"),
}

ratios = st.floats(1e-6, 6.0)
times = st.floats(1e-3, 1e6)
COMMON = settings(max_examples=50, deadline=None)


def excess(tau: float, c: float) -> float:
    """By how much the wall time is above the least, M = 1; differences of almost equal numbers, in full."""
    least = exact(c, 1.0)
    x, y = tau - least, math.exp(least + c) - 1
    grown = math.exp(least + c) * math.expm1(x)  # (e^(tau + c) - 1) - y
    return (grown * least - y * x) / (y * tau)


def printed(value: float, text: str) -> bool:
    """Whether the value, written as the text is written, is the text."""
    sign = "+" if text[0] in "+-" else ""
    if "e" in text:
        digits = len(text.lstrip("+-").split("e")[0].partition(".")[2])
        return f"{value:{sign}.{digits}e}" == text
    return f"{value:{sign}.{len(text.partition('.')[2])}f}" == text


# ---------------------------------------------------------------------- published figures


@pytest.mark.parametrize("M", DALY_TABLE)
def test_the_figures_of_dalys_paper(M: float) -> None:
    paper, high, best, first, guarded, hours = DALY_TABLE[M]
    assert round(daly(C, M), 3) == high and round(exact(C, M), 3) == best
    assert round(young(C, M), 3) == first and round(slide(C, M), 3) == guarded
    assert daly(C, M) == pytest.approx(paper, rel=0.006)  # as he rounded it
    assert round(expected_wall(exact(C, M), C, M, R, TS) / 60, 2) == hours


@pytest.mark.parametrize("c", RATIO_TABLE)
def test_the_accuracy_of_each_estimate_by_its_ratio(c: float) -> None:
    best, high_error, high_excess, slide_error, slide_excess, young_error, young_excess = RATIO_TABLE[c]
    least = exact(c, 1.0)
    assert round(least, 6) == best
    assert printed(daly(c, 1.0) / least - 1, high_error)
    assert high_excess is None or printed(excess(daly(c, 1.0), c), high_excess)
    unguarded = math.sqrt(2 * c) - c
    if slide_error is not None and slide_excess is not None:
        assert printed(100 * (unguarded / least - 1), slide_error)
        assert printed(excess(unguarded, c), slide_excess)
    else:
        assert unguarded == 0
    assert printed(100 * (young(c, 1.0) / least - 1), young_error)
    assert printed(excess(young(c, 1.0), c), young_excess)


def test_at_a_thousandth_the_higher_order_formula_loses_less_than_a_part_in_a_trillion() -> None:
    assert 0 <= excess(daly(1e-3, 1.0), 1e-3) < 1e-12


def test_the_guard_of_the_slides_formula_loses_0_14_percent_at_199_percent() -> None:
    assert slide(1.99, 1.0) == 1.0 and printed(100 * excess(1.0, 1.99), "0.14")
    assert slide(0.499999, 1.0) == pytest.approx(0.5) and slide(0.5, 1.0) == 1.0


@pytest.mark.parametrize(
    ("M", "half", "twice"), [(24 * 60.0, 1.020, 1.021), (6 * 60.0, 1.038, 1.042), (15.0, 1.139, 1.187)]
)
def test_half_or_twice_the_interval_costs_a_few_percent(M: float, half: float, twice: float) -> None:
    least = expected_wall(exact(C, M), C, M, R, TS)
    assert round(expected_wall(daly(C, M) / 2, C, M, R, TS) / least, 3) == half
    assert round(expected_wall(daly(C, M) * 2, C, M, R, TS) / least, 3) == twice


def test_ten_thousand_servers_that_fail_every_three_years() -> None:
    M = 3 * 365 * 24 / 10_000
    assert round(24 / M, 2) == 9.13 and round(M, 2) == 2.63


def test_dalys_low_order_formula() -> None:
    assert daly_low_order(C, 24 * 60.0, R) == pytest.approx(math.sqrt(2 * 5 * (1440 + 10)))
    assert daly_low_order(C, 24 * 60.0, 0.0) == young(C, 24 * 60.0)


def test_the_first_order_waste_at_youngs_interval() -> None:
    c = 1e-6
    assert predicted_waste(young(c, 1.0), c, 1.0) == pytest.approx(math.sqrt(2 * c), rel=2e-3)


# ---------------------------------------------------------------------- the exact optimum


@given(ratios, times)
@COMMON
def test_the_exact_optimum_is_lamberts(c: float, M: float) -> None:
    assert exact(c * M, M) == pytest.approx(M * (1 + lambertw(-math.exp(-1 - c)).real), rel=1e-7)


@pytest.mark.parametrize("c", [1e-15, 1e-10, 0.999e-8, 1e-8, 1e-4, 1.0, 50.0, 800.0])
def test_the_exact_optimum_solves_its_equation_at_any_ratio(c: float) -> None:
    x = exact(c, 1.0)
    if c < 1e-3:  # x = 1 - exp(-x - c), as a series about x = c = 0
        s = x + c
        assert s * s / 2 - s**3 / 6 + s**4 / 24 - s**5 / 120 == pytest.approx(c, rel=1e-9)
    else:
        assert x == pytest.approx(1 - math.exp(-x - c), rel=1e-12)


@pytest.mark.parametrize("c", [1e-2, 0.3, 1.0, 3.0])
def test_the_exact_optimum_is_where_a_minimizer_finds_it(c: float) -> None:
    found = minimize_scalar(
        lambda tau: expected_wall(tau, c, 1.0, 0.3, 1.0, 0.1), bounds=(1e-3, 2.0), options={"xatol": 1e-10}
    )
    assert exact(c, 1.0) == pytest.approx(found.x, rel=1e-5)


@given(st.floats(1e-6, 6.0))
@settings(max_examples=200, deadline=None)
def test_eq_37_is_within_0_19_percent_of_the_least_wall_time(c: float) -> None:
    assert -1e-12 <= excess(daly(c, 1.0), c) < 0.0019


# ---------------------------------------------------------------------- laws


@given(ratios, times, st.floats(1e-3, 1e3))
@COMMON
def test_intervals_scale_with_the_unit_of_time(c: float, M: float, unit: float) -> None:
    for formula in (young, slide, daly, exact):
        if abs(c - 0.5) > 1e-9 and abs(c - 2) > 1e-9:
            assert formula(unit * c * M, unit * M) == pytest.approx(unit * formula(c * M, M), rel=1e-7)
    assert daly_low_order(unit * c, unit * M, unit) == pytest.approx(unit * daly_low_order(c, M, 1.0))


@given(ratios, times, st.floats(1.0, 10.0))
@COMMON
def test_intervals_do_not_fall_with_the_cost_or_the_mean_time(c: float, M: float, more: float) -> None:
    for formula in (young, daly, exact):
        least = formula(c * M, M) * (1 - 1e-9)
        if formula is not daly or c < 2 or c >= 2 * more:  # M, for C = 2 M, is above what eq. 37 begins with
            assert formula(c * M, M * more) >= least
        if formula is not daly or c * more < 1.5 or c >= 2:  # eq. 37 falls a little before 2 M: by 5 %
            assert formula(c * M * more, M) >= least


@given(ratios, times, st.floats(0.0, 2.0), st.floats(0.0, 2.0))
@COMMON
def test_restarts_and_downtime_do_not_move_the_optimum(c: float, M: float, r: float, d: float) -> None:
    def wall(tau: float) -> float:
        return expected_wall(tau, c * M, M, r * M, 1.0, d * M)

    best = exact(c * M, M)
    assert wall(best) <= min(wall(best * 0.99), wall(best * 1.01)) * (1 + 1e-12)
    assert wall(best) == pytest.approx((1 + d) * math.exp(r) * expected_wall(best, c * M, M, 0.0, 1.0))


@given(st.floats(1e-3, 1e3), st.floats(1e-4, 1.0), ratios)
@COMMON
def test_rounding_to_iterations_is_never_worse_than_both_neighbours(
    tau: float, iteration: float, c: float
) -> None:
    def wall(k: int) -> float:
        return expected_wall(k * iteration, c, 1.0, 0.0, 1.0)

    k = every_iterations(tau, iteration, c, 1.0)
    below, above = max(1, math.floor(tau / iteration)), math.ceil(tau / iteration)
    assert k in (below, above)
    assert wall(k) <= min(wall(below), wall(above))
    best = every_iterations(exact(c, 1.0), iteration, c, 1.0)  # at the optimum: the best of all numbers
    assert wall(best) <= min(wall(max(1, best - 1)), wall(best + 1)) * (1 + 1e-12)


@given(times, st.floats(0.0, 1.0), st.floats(0.1, 1e6))
@COMMON
def test_wall_time_is_never_below_the_work_and_its_waste_is_a_share(tau: float, C: float, M: float) -> None:
    assert expected_wall(tau, C, M, 0.0, 7.0) >= 7.0 * (1 - 1e-12)
    assert -1e-12 <= predicted_waste(tau, C, M) <= 1.0


# ---------------------------------------------------------------------- finite jobs


@given(st.floats(1e-3, 2.0), st.floats(0.01, 12.0))
@COMMON
def test_the_best_number_of_segments_is_the_best_of_all(c: float, work: float) -> None:
    walls = [finite_wall(n, c, 1.0, 0.2, work, 0.1) for n in range(1, 600)]
    n = best_segments(c, 1.0, work)
    assert walls[n - 1] <= min(walls) * (1 + 1e-12)


def test_a_short_job_is_one_segment_and_a_long_one_is_cut_at_the_interval() -> None:
    M = 2.63 * 3600
    assert best_segments(1.0, M, 60.0) == 1  # "20 nodes and my query takes 1 min"
    assert best_segments(1.0, M, 1e7) == pytest.approx(1e7 / exact(1.0, M), rel=0.01)
    # first order: saving once pays when work^2 / (4 M) > C
    threshold = 2 * math.sqrt(M)
    assert best_segments(1.0, M, 0.97 * threshold) == 1 and best_segments(1.0, M, 1.03 * threshold) == 2


def test_a_job_of_one_segment_takes_what_the_segment_takes() -> None:
    assert finite_wall(1, 5.0, 7.0, 1.0, 3.0) == expected_segment(3.0, 7.0, 1.0)
    assert longer_last_wall(1, 5.0, 7.0, 1.0, 3.0) == expected_segment(3.0, 7.0, 1.0)


def test_a_job_of_many_segments_takes_what_a_long_job_takes() -> None:
    n, tau = 10_000, 1.3
    long = expected_wall(tau, 0.1, 20.0, 2.0, n * tau, 0.5)
    assert finite_wall(n, 0.1, 20.0, 2.0, n * tau, 0.5) == pytest.approx(long, rel=1e-4)


@given(st.floats(1e-3, 0.1), st.floats(0.1, 30.0))
@COMMON
def test_a_longer_last_segment_is_better_by_at_most_0_4_percent(c: float, work: float) -> None:
    n = best_segments(c, 1.0, work)
    equal, longer = finite_wall(n, c, 1.0, 0.0, work), longer_last_wall(n, c, 1.0, 0.0, work)
    assert longer <= equal * (1 + 1e-12)
    best = min(longer_last_wall(k, c, 1.0, 0.0, work) for k in (max(1, n - 1), n, n + 1))
    assert equal / best - 1 <= (0.0001 if c <= 0.01 else 0.004) * 1.05


def test_no_split_of_two_segments_beats_the_longer_last_one() -> None:
    C, M, work = 1.0, 30.0, 40.0
    found = minimize_scalar(
        lambda first: expected_segment(first + C, M) + expected_segment(work - first, M), bounds=(1, 39)
    )
    assert longer_last_wall(2, C, M, 0.0, work) == pytest.approx(found.fun)
    assert work - found.x == pytest.approx(found.x + C, abs=1e-3)


# ---------------------------------------------------------------------- edges


def test_a_job_that_is_never_interrupted_needs_no_checkpoint() -> None:
    for formula in (young, slide, daly, exact):
        assert formula(5.0, math.inf) == math.inf
    assert best_segments(5.0, math.inf, 1e9) == 1
    assert every_iterations(math.inf, 1.0, 5.0, math.inf) == 0
    assert expected_wall(10.0, 5.0, math.inf, 3.0, 100.0) == 150.0
    assert predicted_waste(10.0, 5.0, math.inf) == pytest.approx(1 / 3)


def test_checkpoints_that_cost_nothing_are_taken_all_the_time() -> None:
    for formula in (young, slide, daly, exact):
        assert formula(0.0, 60.0) == 0.0
    assert every_iterations(0.0, 1.0, 0.0, 60.0) == 1
    assert expected_wall(0.0, 0.0, 60.0, 0.0, 100.0) == 100.0
    assert expected_wall(0.0, 1.0, 60.0, 0.0, 100.0) == math.inf
    with pytest.raises(UsageError, match="cost nothing"):
        best_segments(0.0, 60.0, 100.0)


def test_a_job_that_cannot_get_through_takes_for_ever_instead_of_overflowing() -> None:
    assert expected_wall(1.0, 1e6, 1.0, 0.0, 10.0) == math.inf
    assert expected_wall(1.0, 1.0, 1.0, 1e6, 10.0) == math.inf
    assert finite_wall(1, 1e6, 1.0, 0.0, 5.0) == expected_segment(5.0, 1.0)
    assert best_segments(1e6, 1.0, 5.0) == 1
    assert predicted_waste(1.0, 1e6, 1.0) == 1.0
    assert daly(1e6, 1.0) == 1.0 and exact(1e6, 1.0) == pytest.approx(1.0)
    assert best_segments(1e-3, 1.0, 1e6) == pytest.approx(1e6 / exact(1e-3, 1.0), rel=0.05)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_cost_that_is_no_time_is_refused(bad: float) -> None:
    for formula in (young, slide, daly, exact):
        with pytest.raises(UsageError, match="C must be a time"):
            formula(bad, 60.0)
    with pytest.raises(UsageError, match="R must be a time"):
        daly_low_order(1.0, 60.0, bad)
    with pytest.raises(UsageError, match="Ts must be a time"):
        expected_wall(1.0, 1.0, 60.0, 0.0, bad)
    with pytest.raises(UsageError, match="D must be a time"):
        finite_wall(2, 1.0, 60.0, 0.0, 10.0, bad)
    with pytest.raises(UsageError, match="iteration_seconds must be a time"):
        every_iterations(10.0, bad, 1.0, 60.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_mean_time_that_is_not_above_zero_is_refused(bad: float) -> None:
    for formula in (young, slide, daly, exact):
        with pytest.raises(UsageError, match="mean time to interrupt"):
            formula(1.0, bad)
    with pytest.raises(UsageError, match="mean time to interrupt"):
        best_segments(1.0, bad, 10.0)


def test_a_job_of_no_segments_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one segment"):
        finite_wall(0, 1.0, 60.0, 0.0, 10.0)
    with pytest.raises(UsageError, match="at least one segment"):
        longer_last_wall(0, 1.0, 60.0, 0.0, 10.0)
