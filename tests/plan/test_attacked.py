"""Programs that are just allowed: nulls in what delta iterations merge, states of types not known before."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.testing import run_ranks
from tests.engine.kit import raised
from tests.plan.kit import Table, Tables, agrees

N = None
TABLES = {
    "far": Table({"k": "int64", "x": "float64"}, [(0, 0.0), (1, N), (2, N), (3, 5.0)]),
    "links": Table({"src": "int64", "dst": "int64"}, [(0, 1), (0, 2), (1, 2), (2, 0), (2, 3), (4, 5)]),
    "steps": Table({"k": "int64"}, [(k,) for k in range(6)]),
    "gaps": Table({"src": "int64", "dst": "int64"}, [(0, 1), (1, N), (0, 2), (2, 3), (3, N)]),
}


def _along(t: Tables, changed: Dataset) -> Dataset:
    return t["links"].join(changed, src="k").group_by(k="dst").agg(x=ir.min(col("x") + 1))


def _reached(t: Tables) -> Dataset:
    start = t["far"].filter(col("k") == 0)
    return ir.iterate_changes(lambda c: _along(t, c), t["far"], merge={"x": ir.MIN}, changes=start, key="k")


def _of_all_ends(t: Tables) -> Dataset:
    towns = t["links"].vertices("src", "dst", name="k").with_columns(x=ir.when(col("k") == 0).then(0.0))
    start = t["far"].filter(col("k") == 0)
    return ir.iterate_changes(lambda c: _along(t, c), towns, merge={"x": ir.MIN}, changes=start, key="k")


def _counting(t: Tables) -> Dataset:
    def step(changed: Dataset) -> Dataset:
        return changed.filter(col("k") < 5).select(k=col("k") + 1, x=col("x") + 1)

    start = t["far"].filter(col("k") == 0)
    return ir.iterate_changes(step, t["far"], merge={"x": ir.MIN}, changes=start, key="k")


def _proposing_nulls(t: Tables) -> Dataset:
    def step(changed: Dataset) -> Dataset:
        return changed.filter(col("k") < 5).select(k=col("k") + 1, x=ir.lit(None).cast("float64"))

    return ir.iterate_changes(step, t["far"], merge={"x": ir.MIN}, key="k")


NULLS: list[tuple[Any, list[tuple[int, float | None]]]] = [
    (_reached, [(0, 0.0), (1, 1.0), (2, 1.0), (3, 2.0)]),
    (_of_all_ends, [(0, 0.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, N), (5, N)]),
    (_counting, [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0)]),
    (_proposing_nulls, [(0, 0.0), (1, N), (2, N), (3, 5.0), (4, N), (5, N)]),
]


@pytest.mark.parametrize("case", range(len(NULLS)))
def test_a_null_of_a_known_key_is_improved_and_is_not_taken_for_a_new_key(case: int) -> None:
    build, rows = NULLS[case]
    agrees(build, TABLES, (1, 2, 3, 8), ("even", "last"), want=[{"k": k, "x": x} for k, x in rows])


def _steps_to_null(t: Tables) -> Dataset:
    step = lambda c: c.join(t["gaps"], dst="src").select("src", dst="dst_right")  # noqa: E731
    return ir.iterate_changes(step, t["gaps"].select("src", "dst"))


def _least_of_null(t: Tables) -> Dataset:
    """The null end is proposed again and again, and improves."""
    start = t["links"].vertices("src", "dst", name="k").select("k", x=col("k") + 0.0)

    def step(changed: Dataset) -> Dataset:
        return t["gaps"].join(changed, src="k").group_by(k="dst").agg(x=ir.min(col("x")))

    return ir.iterate_changes(step, start, merge={"x": ir.MIN}, key="k")


NULL_KEYS: list[tuple[Any, list[tuple[Any, ...]]]] = [
    (_steps_to_null, [(0, 1), (1, N), (0, 2), (2, 3), (3, N), (0, N), (0, 3), (2, N)]),
    (_least_of_null, [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (4, 4.0), (5, 5.0), (N, 0.0)]),
]


@pytest.mark.parametrize("case", range(len(NULL_KEYS)))
def test_nulls_are_one_key_of_a_delta_iteration(case: int) -> None:
    build, rows = NULL_KEYS[case]
    names = build(Tables(TABLES)).columns
    agrees(
        build, TABLES, (1, 2, 3, 8), ("even", "last"), want=[dict(zip(names, r, strict=True)) for r in rows]
    )


def _closed(t: Tables) -> Dataset:
    """Pairs that a step finds again and again: shuffles of keys alone."""
    step = lambda c: c.join(t["links"], dst="src").select("src", dst="dst_right")  # noqa: E731
    return ir.iterate_changes(step, t["links"].select("src", "dst"))


def _named(t: Tables, ends: str) -> Dataset:
    """Smallest labels along rows both ways round, whose ends are found in several ways."""
    both = t["links"].union(t["links"].select(src="dst", dst="src"))
    if ends == "vertices":
        found = both.vertices("src", "dst", name="k")
    else:
        found = both.select(k="src").distinct() if ends == "distinct" else t["steps"]

    def step(state: Dataset) -> Dataset:
        heard = both.join(state, src="k").group_by(k="dst").agg(heard=ir.min("x"))
        made = state.left_join(heard, "k")
        return made.select("k", x=ir.minimum(col("x"), col("heard").fill_null(99)))

    return ir.iterate(step, found.with_columns(x=col("k")))


def _one_after_another(t: Tables) -> Dataset:
    """The first state rests in an iteration in which the second moves."""
    start = t["steps"].with_columns(x=1.0)

    def step(a: Dataset, b: Dataset) -> dict[str, Dataset]:
        return {"a": b, "b": a.join(b, "k").select("k", x=col("x") + col("x_right"))}

    return ir.iterate(step, {"a": start, "b": start}, max_iterations=6)["a"]


ENDS = [(0, 0), (1, 0), (2, 0), (3, 0), (4, 4), (5, 4)]
FOUND: list[tuple[Any, tuple[str, ...], list[tuple[Any, ...]]]] = [
    (_closed, ("src", "dst"), [*((a, b) for a in range(3) for b in range(4)), (4, 5)]),
    *((partial(_named, ends=ends), ("k", "x"), ENDS) for ends in ("vertices", "distinct", "given")),
    (_one_after_another, ("k", "x"), [(k, 13.0) for k in range(6)]),
]


@pytest.mark.parametrize("case", range(len(FOUND)))
def test_programs_that_a_user_wrote(case: int) -> None:
    build, names, rows = FOUND[case]
    agrees(build, TABLES, (1, 2, 3), want=[dict(zip(names, row, strict=True)) for row in rows])


def _weighed(t: Tables) -> Dataset:
    """Groups of values that may be null, beside the table of their keys: no row came, or none but null."""
    links = t["links"].with_columns(w=ir.when(col("src") > 0).then(col("src") + 0.5))
    start = links.vertices("src", "dst", name="k").with_columns(x=ir.lit(1.0))

    def step(state: Dataset) -> Dataset:
        heard = links.join(state, src="k").group_by(k="dst").agg(heard=ir.sum(col("x") * col("w")))
        return state.select("k").left_join(heard, "k").select("k", x=col("heard").fill_null(0) + 0.25)

    return ir.iterate(step, start, max_iterations=3)


def test_sums_of_nothing_but_nulls_are_filled_as_those_of_no_rows_are() -> None:
    agrees(_weighed, TABLES, (1, 2, 3, 8), ("even", "last"))


def test_a_number_of_no_rows_is_null_also_where_the_plan_takes_it_for_a_number() -> None:
    def build(t: Tables) -> Dataset:
        start = t["links"].group_by(k="src").agg(x=ir.count()).select("k", x=col("x") + 0.0)

        def step(state: Dataset) -> Dataset:
            none = state.filter(col("x") > 99).sum("x")
            told = t["steps"].join(state, "k").select(k=col("k") // 2, x="x").group_by("k").agg(y=ir.sum("x"))
            made = state.select("k").left_join(told, "k")
            return made.select("k", x=ir.when(col("k") > 0).then(col("y").fill_null(0) + none).otherwise(1.0))

        return ir.iterate(step, start, max_iterations=3)

    agrees(build, TABLES, (1, 3))


def _null_along_links(t: Tables) -> Dataset:
    """Values that travel along indexed rows turn null in the first iteration."""
    start = t["links"].vertices("src", "dst", name="k").with_columns(x=ir.lit(1.0))

    def step(state: Dataset) -> Dataset:
        heard = t["links"].join(state, src="k").group_by(k="dst").agg(heard=ir.sum("x"))
        none = heard.filter(col("heard") > 99).sum("heard")
        made = state.select("k").left_join(heard, "k")
        return made.select("k", x=ir.where(col("k") == 1, none, 0.5) + col("heard").fill_null(0))

    return ir.iterate(step, start, max_iterations=3)


def _repeated_at_first(t: Tables) -> Dataset:
    """The step makes one row of each key; the first rows are more."""
    step = lambda s: s.group_by("src").agg(dst=ir.sum(col("dst") + 1))  # noqa: E731
    return ir.iterate(step, t["links"], max_iterations=2)


def _repeated_in_an_earlier_one(t: Tables) -> Dataset:
    return _repeated_at_first(t).join(t["steps"], src="k").with_columns(n=_null_along_links(t).count())


@pytest.mark.parametrize("build", [_null_along_links, _repeated_at_first, _repeated_in_an_earlier_one])
def test_what_a_fast_plan_takes_for_granted_is_dropped_where_rows_are_otherwise(build: Any) -> None:
    agrees(build, TABLES, (1, 2, 3), ("even", "last"))


def test_with_checkpoints_a_plan_that_took_too_much_for_granted_is_made_anew_and_gone_on_from(
    tmp_path: Path,
) -> None:
    """The first rows repeat keys (seen at once), or a number is null later on (behind a checkpoint)."""
    src, dst = np.array([0, 0, 1, 2]), np.arange(4)
    tables: Any = {"links": Dataset.from_local(None, src=src, dst=dst), "steps": None}

    def late(n: int) -> Dataset:
        start = tables["links"].vertices("src", "dst", name="k").with_columns(x=ir.lit(4.0))

        def step(state: Dataset) -> Dataset:
            heard = tables["links"].join(state, src="k").group_by(k="dst").agg(heard=ir.sum("x"))
            most = heard.filter(col("heard") > 2.5).max("heard")
            made = state.select("k").left_join(heard, "k")
            return made.select("k", x=most / 2 + 0 * col("heard").fill_null(0))

        return ir.iterate(step, start, max_iterations=n)

    def repeated(n: int) -> Dataset:
        return ir.iterate(
            lambda s: s.group_by("src").agg(dst=ir.sum(col("dst") + 1)), tables["links"], max_iterations=n
        )

    for name, build in (("repeated", repeated), ("late", late)):
        saved = {"checkpoint_dir": str(tmp_path / name), "checkpoint_every": 1}
        for n in (4, 9):  # the second asks for more of the same job
            made: Any = build(n).run(**saved)
            assert made.batch.equals(build(n).run().batch)
            made.finish()
            with pytest.raises(ir.FinishedError, match=f"after {made.iterations} iterations"):
                build(n).run(**saved)
        with pytest.raises(ir.CheckpointError, match=r"another loop was .* there"):
            build(9).with_columns(more=1).run(**saved)


def _fading(rows: Dataset) -> Dataset:
    return rows.with_columns(x=ir.when(col("x") <= 3).then(col("x") + 1))


def _begun(t: Tables) -> Dataset:
    return t["steps"].select("k", x=col("k") + 0.5)


FADING: list[Any] = [
    lambda t: ir.iterate(_fading, _begun(t), max_iterations=3).filter(col("x").is_null()),
    lambda t: ir.iterate(_fading, _begun(t), max_iterations=3).with_columns(x=col("x").fill_null(-1.0)),
    lambda t: ir.iterate(
        lambda s: _fading(s.with_columns(x=col("x").fill_null(9.0))), _begun(t), max_iterations=2
    ),
    lambda t: ir.iterate(
        lambda o: ir.iterate(_fading, o, max_iterations=2).select("k", x=col("x").fill_null(0.5)),
        _begun(t),
        max_iterations=2,
    ),
    lambda t: ir.iterate(
        lambda a, b: {"a": _fading(b), "b": a.with_columns(x=col("x").fill_null(7.0))},
        {"a": _begun(t), "b": _begun(t)},
        max_iterations=3,
    )["b"].filter(col("x").is_not_null()),
]


@pytest.mark.parametrize("case", range(len(FADING)))
def test_a_state_without_nulls_in_its_first_rows_may_have_them_later(case: int) -> None:
    agrees(FADING[case], TABLES, (1, 3), ("even", "last"))


OTHER: list[tuple[Any, str]] = [
    (lambda s: s.with_columns(x=ir.lit("far")), 'column "x" is float64 .* and text'),
    (lambda s: s.with_columns(x=col("k")), 'column "x" is float64 .* and int64'),
    (lambda s: s.select("k"), 'column "x"'),
    (lambda s: s.with_columns(y=col("k")), 'column "y"'),
]


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("case", range(len(OTHER)))
def test_a_state_of_types_not_known_before_keeps_them_in_what_the_step_returns(
    case: int, key: str | None
) -> None:
    step, message = OTHER[case]

    def work(group: Group) -> str:
        rows = Dataset.from_local(group, k=np.arange(4) + 4 * group.rank, x=np.arange(4.0))
        began = rows.map_batches(lambda batch: batch)
        return str(raised(group, ir.SchemaError, ir.iterate(step, began, key=key, max_iterations=3).collect))

    assert re.search(message, run_ranks(3, work)[0])


def test_a_number_that_is_null_makes_a_state_null() -> None:
    rows = ir.Dataset.from_local(None, k=np.arange(3), x=np.arange(3.0))

    def step(state: ir.Dataset) -> ir.Dataset:
        return state.with_columns(x=ir.col("x") + state.filter(ir.col("x") > 99).sum("x"))

    found = ir.iterate(step, rows, max_iterations=1)
    assert int(found.filter(ir.col("x").is_null()).count()) == 3
    assert found.with_columns(x=ir.col("x").fill_null(-1)).collect()["x"].tolist() == [-1, -1, -1]


def test_masked_arrays_and_lists_with_none_have_nulls_and_come_back_as_masked_arrays() -> None:
    rows = ir.Dataset.from_local(None, x=np.ma.array([1.0, 2.0], mask=[True, False]), t=["a", None])
    assert rows.sum("x").value() == 2.0
    found = rows.to_numpy()
    assert found["x"].tolist() == [None, 2.0] and found["t"].tolist() == ["a", None]
