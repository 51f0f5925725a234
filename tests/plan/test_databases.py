"""Relational plans drawn at random against databases: SQLite, and Polars for what SQLite does not know."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.dataset import Dataset
from tests.plan import sql
from tests.plan.kit import Table, Tables, on_ranks
from tests.plan.test_generated import CODES, plan_of, tables

Row = tuple[Any, ...]


def alike(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """The same rows, however often each; numbers to a relative 1e-12, whatever their type."""
    for a, b in zip(sorted(map(_row, got), key=repr), sorted(map(_row, want), key=repr), strict=True):
        assert len(a) == len(b) and all(map(_same, a, b)), (a, b)


def _row(row: dict[str, Any]) -> Row:
    return tuple(float(f"{v + 0.0:.9e}") if isinstance(v, int | float) else v for v in row.values())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


@settings(max_examples=50, deadline=None)
@given(tables(nan=False), CODES)
def test_a_plan_drawn_at_random_gives_the_rows_of_sqlite(rows: dict[str, Table], codes: Any) -> None:
    build = plan_of(codes)
    want = sql.rows_of(build(Tables(rows)).node)
    for size in (1, 3):
        alike(on_ranks(build, rows, size), want)


# ---------------------------------------------------------------------- NaN and nulls as keys

KEYS = st.one_of(st.none(), st.sampled_from([0.0, -0.0, 1.5, math.nan]))
SIDES = st.lists(st.tuples(KEYS, st.integers(-2, 2)), max_size=8)


def keyed(rows: list[Row], value: str) -> Table:
    return Table({"k": "float64", value: "int64"}, rows)


@settings(max_examples=30, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["inner", "left", "full", "semi", "anti"]))
def test_joins_by_keys_that_are_nan_or_null_have_the_rows_of_polars(
    left: list[Row], right: list[Row], how: Any
) -> None:
    given = {"l": keyed(left, "x"), "r": keyed(right, "y")}
    ours, theirs = (
        # a second key: by one alone, an inner join of Polars 2.1 finds nothing where one NaN meets one
        pl.DataFrame(rows, _types(v), orient="row").with_columns(one=0)
        for rows, v in ((left, "x"), (right, "y"))
    )
    joined = ours.join(theirs, on=["k", "one"], how=how, **({"coalesce": True} if how == "full" else {}))
    joined = joined.drop("one")
    for size in (1, 3):
        alike(on_ranks(lambda t: t["l"].join(t["r"], on="k", how=how), given, size), joined.to_dicts())


def _types(value: str) -> Any:
    return {"k": pl.Float64, value: pl.Int64}


@settings(max_examples=30, deadline=None)
@given(SIDES)
def test_groups_by_keys_that_are_nan_or_null_are_those_of_polars(rows: list[Row]) -> None:
    frame = pl.DataFrame(rows, _types("x"), orient="row")
    want = frame.group_by("k").agg(n=pl.len(), s=pl.col("x").sum()).to_dicts()

    def build(t: Tables) -> Dataset:
        return t["l"].group_by("k").agg(n=ir.count(), s=ir.sum("x"))

    for size in (1, 3):
        alike(on_ranks(build, {"l": keyed(rows, "x")}, size), want)
        alike(on_ranks(lambda t: t["l"].distinct("k"), {"l": keyed(rows, "x")}, size),
              frame.select("k").unique().to_dicts())  # fmt: skip
