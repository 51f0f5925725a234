"""Stopping rules against NumPy, without a loop; then in loops, where ranks must agree."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.folds import total_change
from iterreduce.fixpoint import Measure, Until, partials, side_by_side, verdict
from iterreduce.loop import Local, State
from iterreduce.table import BY_BLOCK, Table, by_key, everywhere
from iterreduce.testing import run_ranks
from tests.engine.kit import local, looping, raised, ran, same, share

FOLDS: dict[str, Any] = {"sum": np.sum, "mean": np.mean, "max": np.max}


def distance_of(rule: ir.Distance, parts: list[tuple[Batch, Batch]]) -> float:
    return float(rule.fold_ranks([rule.partial(old, new) for old, new in parts]))


def wanted_distance(per_row: str, fold: str, old: np.ndarray, new: np.ndarray) -> float:
    diff = np.abs(new - old).reshape(len(old), -1)
    if per_row == "l2" and fold != "max":
        squares = (diff**2).sum(axis=1)
        return float(np.sqrt(squares.sum() if fold == "sum" else squares.mean()))
    rows = {
        "l1": diff.sum(axis=1),
        "l2": np.sqrt((diff**2).sum(axis=1)),
        "max": diff.max(axis=1),
        "changed": (diff > 0).any(axis=1),
    }
    return float(FOLDS[fold](rows[per_row]))


@pytest.mark.parametrize("fold", ["sum", "mean", "max"])
@pytest.mark.parametrize("per_row", ["l1", "l2", "max", "changed"])
@pytest.mark.parametrize("shape", [(12,), (12, 3)], ids=["scalars", "vectors"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint8])
def test_distances_are_numpys(per_row: Any, fold: Any, shape: tuple[int, ...], dtype: type) -> None:
    random = np.random.default_rng(1)
    old, new = (random.integers(0, 9, shape).astype(dtype) for _ in range(2))
    rule = ir.Distance(("x",), 1.0, per_row, fold)
    wanted = wanted_distance(per_row, fold, old.astype(np.float64), new.astype(np.float64))
    for cuts in ([0, 12], [0, 5, 12], [0, 0, 1, 12, 12]):
        parts = [(Batch(x=old[a:b]), Batch(x=new[a:b])) for a, b in itertools.pairwise(cuts)]
        assert np.isclose(distance_of(rule, parts), wanted, rtol=1e-12)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9),
    st.integers(0, 9),
    st.sampled_from(["l1", "l2", "max"]),
    st.sampled_from(["sum", "mean", "max"]),
)
def test_a_distance_does_not_depend_on_how_rows_are_dealt(
    values: list[float], cut: int, per_row: Any, fold: Any
) -> None:
    new = np.array(values)
    old, rule = np.zeros_like(new), ir.Distance(("x",), 1.0, per_row, fold)
    one = distance_of(rule, [(Batch(x=old), Batch(x=new))])
    two = distance_of(
        rule, [(Batch(x=old[:cut]), Batch(x=new[:cut])), (Batch(x=old[cut:]), Batch(x=new[cut:]))]
    )
    assert np.isclose(one, two, rtol=1e-12)


@pytest.mark.parametrize("fold", ["sum", "mean", "max"])
@pytest.mark.parametrize("per_row", ["l1", "l2", "max"])
def test_nan_never_converges_on_whichever_rank_it_is(per_row: Any, fold: Any) -> None:
    rule = ir.Distance(("x",), np.inf, per_row, fold)
    calm = (Batch(x=np.zeros(2)), Batch(x=np.zeros(2)))
    for values in ([np.nan, 0.0], [0.0, np.nan], [np.nan, np.nan]):
        wild = (Batch(x=np.zeros(2)), Batch(x=np.array(values)))
        for parts in ([wild, calm], [calm, wild], [wild], [calm, wild, calm]):
            value = distance_of(rule, parts)
            assert np.isnan(value) and not rule.holds(value)


def test_changed_counts_nan_as_equal_to_nan_and_looks_at_text_and_nulls() -> None:
    rule = ir.changed() <= 0
    old = Batch(x=np.array([np.nan, 1.0, 2.0]), w=["a", "b", "c"])
    assert distance_of(rule, [(old, old.copy())]) == 0
    assert distance_of(rule, [(old, Batch(x=np.array([np.nan, 1.0, 3.0]), w=["z", "b", "c"]))]) == 2
    holes = old.with_valid(x=np.array([True, False, True]))
    assert distance_of(rule, [(old, holes)]) == 1
    other = Batch(x=np.array([np.nan, 7.0, 2.0]), w=old["w"]).with_valid(x=np.array([True, False, True]))
    assert distance_of(rule, [(holes, other)]) == 0


def test_keyed_rows_are_matched_by_key_when_they_come_and_go() -> None:
    old = Table(Batch(k=np.array([1, 2, 3]), x=np.array([10.0, 20.0, 30.0])), by_key("k"))
    new = Table(Batch(k=np.array([3, 1, 4]), x=np.array([31.0, 10.0, 5.0])), by_key("k"))
    assert distance_of(ir.l1("x") <= 1, [side_by_side(old, new, ("x",))]) == 1 + 20 + 5
    assert distance_of(ir.linf("x") <= 1, [side_by_side(old, new, ("x",))]) == 20
    assert np.isclose(distance_of(ir.l2("x") <= 1, [side_by_side(old, new, ("x",))]), np.sqrt(1 + 400 + 25))
    assert distance_of(ir.changed("x") <= 1, [side_by_side(old, new, ("x",))]) == 3


def test_a_row_that_comes_or_goes_has_changed_whatever_it_holds() -> None:
    old = Table(Batch(k=np.array([1]), x=np.array([0.0]), w=["a"]), by_key("k"))
    new = Table(Batch(k=np.array([1, 2]), x=np.array([0.0, 0.0]), w=["a", "b"]), by_key("k"))
    assert distance_of(ir.changed("x") <= 0, [side_by_side(old, new, ("x",))]) == 1
    assert distance_of(ir.changed("w") <= 0, [side_by_side(old, new, ("w",))]) == 1


def test_rows_by_position_must_be_as_many_as_before() -> None:
    for layout in (BY_BLOCK, everywhere(Batch()).layout):
        old, new = Table(Batch(x=np.zeros(2)), layout), Table(Batch(x=np.zeros(3)), layout)
        with pytest.raises(ir.SchemaError, match="2 rows and has 3"):
            side_by_side(old, new, ("x",))


def test_the_first_rule_that_holds_names_the_outcome() -> None:
    old = {"s": Table(Batch(x=np.zeros(2), a=np.zeros(2, bool)), BY_BLOCK)}
    rules = {
        ir.Outcome.CONVERGED: ir.l1("x") <= 0.0,
        ir.Outcome.UNCHANGED: ir.Unchanged(),
        ir.Outcome.HALTED: ir.NoneActive("a"),
        ir.Outcome.ITERATIONS_USED: ir.MaxIterations(3),
    }
    for first in rules:
        order = [rules[first], *(rule for outcome, rule in rules.items() if outcome is not first)]
        until = Until.of(order, None).on("s")
        said = np.array([partials(until, old, old, rank) for rank in range(2)])
        assert verdict(until, said, 3)[0] is first
    until = Until.of([ir.Empty(), ir.l2("x") <= 1e-9, ir.MaxIterations(2)], None).on("s")
    moved = {"s": Table(Batch(x=np.array([3.0, 4.0]), a=np.ones(2, bool)), BY_BLOCK)}
    said = np.array([partials(until, old, moved, 0)])
    assert verdict(until, said, 1) == (None, 2.0), "the residual is that of the first rule"
    assert verdict(until, said, 2)[0] is ir.Outcome.ITERATIONS_USED


def test_a_state_everywhere_is_counted_once() -> None:
    old, new = everywhere(Batch(x=np.zeros(3))), everywhere(Batch(x=np.ones(3)))
    until = Until.of([ir.l1("x") <= 0.0, ir.Empty()], 9).on("s")
    said = np.array([partials(until, {"s": old}, {"s": new}, rank) for rank in range(4)])
    assert verdict(until, said, 1) == (None, 3.0)


def test_wrong_rules_are_refused_where_the_loop_is_built() -> None:
    for wrong in (0, -1, 1.5, "3", True, None):
        with pytest.raises(ir.UsageError, match="max_iterations"):
            ir.MaxIterations(wrong)  # type: ignore[arg-type]
    with pytest.raises(ir.UsageError, match="truth value"):
        bool(ir.l2("x"))
    with pytest.raises(ir.UsageError, match="compare it"):
        Until.of(ir.l2("x"), 3)
    with pytest.raises(ir.UsageError, match="no stopping rule"):
        Until.of([3], 3)
    with pytest.raises(ir.UsageError, match="at least one rule"):
        Until.of([], None)
    for threshold in (-1.0, np.nan, -np.inf):
        with pytest.raises(ir.UsageError, match="threshold"):
            ir.l1("x") <= threshold  # noqa: B015
    with pytest.raises(ir.UsageError, match="fold"):
        ir.l1("x", fold="median") <= 1.0  # type: ignore[arg-type]  # noqa: B015


def test_until_takes_rules_functions_and_nothing() -> None:
    rule = ir.l1("x") <= 1.0
    assert Until.of(rule, 5).rules == (rule, ir.MaxIterations(5))
    assert Until.of(None, None).rules == (ir.Unchanged(),)
    assert Until.of(Until((rule,)), 5).rules == (rule, ir.MaxIterations(5))

    def never(old: Batch, new: Batch) -> bool:
        return False

    assert Until.of(never, None).rules == (ir.Predicate(never),)
    assert Until.of((rule, never), None).rules == (rule, ir.Predicate(never))
    assert isinstance(ir.distance(lambda old, new: np.zeros(len(new))), Measure)


def halving(group: Group, until: Any, most: int = 60) -> ir.Result:
    rows = Batch(k=np.arange(20), x=np.arange(20) * 64.0)
    stages = [Local(lambda s: s.with_columns(x=s["x"] // 2), ("s",), "n")]
    return ran(looping({"r": local(rows, group)}, {"s": State("r")}, stages, {"s": "n"}, until, most), group)


def check_rules_agree_with_a_plain_loop(group: Group) -> None:
    measures = {"l1": np.abs, "l2": np.square, "linf": np.abs}
    for name in measures:
        x, steps = np.arange(20) * 64.0, 0
        while True:
            old, x, steps = x, x // 2, steps + 1
            diff = np.abs(x - old)
            value = {"l1": diff.sum(), "l2": np.sqrt((diff**2).sum()), "linf": diff.max()}[name]
            if value <= 100:
                break
        result = halving(group, getattr(ir, name)("x") <= 100)
        assert (result.outcome, result.iterations) == (ir.Outcome.CONVERGED, steps)
        assert np.isclose(result.residual or 0.0, value, rtol=1e-12)
        same(group, str(result.residual))
    assert halving(group, lambda old, new: bool((new["x"] < 50).all())).iterations == 5
    assert (
        halving(group, ir.distance(lambda old, new: old["x"] - new["x"], fold="max") <= 19.0).iterations == 6
    )


def check_a_predicate_holds_only_if_every_rank_with_rows_says_so(group: Group) -> None:
    rows = Batch(k=np.arange(20), x=np.zeros(20))
    mine = share(rows, group)

    def patient(old: Batch, new: Batch) -> bool:
        return bool(new["x"].min() >= (4 if len(mine) and mine["k"][-1] == 19 else 2))

    stages = [Local(lambda s: s.with_columns(x=s["x"] + 1), ("s",), "n")]
    result = ran(looping({"r": local(rows, group)}, {"s": State("r")}, stages, {"s": "n"}, patient, 9), group)
    assert (result.outcome, result.iterations) == (ir.Outcome.HALTED, 4)


def check_user_rules_cannot_change_the_state(group: Group) -> None:
    def scribble(old: Batch, new: Batch) -> Any:
        new["x"][:] = 0
        return new["x"]

    for until in (scribble, ir.distance(scribble) <= 1.0):
        assert "read-only" in str(raised(group, ir.UserCodeError, lambda until=until: halving(group, until)))  # type: ignore[misc]


def check_a_distance_of_the_wrong_shape_is_told(group: Group) -> None:
    for wrong in (
        lambda old, new: np.zeros(3),
        lambda old, new: 0.0,
        lambda old, new: np.zeros((len(new), 2)),
    ):
        rule = ir.distance(wrong) <= 1.0
        assert "one number for each" in str(
            raised(group, ir.SchemaError, lambda rule=rule: halving(group, rule))
        )  # type: ignore[misc]


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_rules_in_loops(check: Any, ranks: int) -> None:
    run_ranks(ranks, check)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 3000), seed=st.integers(0, 2**32 - 1))
def test_a_sum_of_changes_in_one_pass_has_the_bits_of_numpys(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    old, new = random.standard_normal((2, n)) * 10.0 ** random.integers(-9, 9, (2, n))
    assert total_change(old, new) == np.add.reduce(np.abs(new - old))
    found = ir.Distance(("x",), 0.0, "l1").partial(Batch(x=old), Batch(x=new))
    assert found == (float(np.add.reduce(np.abs(new - old))), float(n), 0.0)
