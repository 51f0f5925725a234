"""What expressions give, row by row: a slow loop over Python rows, and SQLite, say what is right."""

from __future__ import annotations

import itertools
import sqlite3
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.columns.batch import Batch, field_of
from iterreduce.columns.compute import compute, compute_columns, select_rows, typed
from iterreduce.columns.expressions import Expr, same
from iterreduce.columns.simplify import fold_constants, null_on_null
from iterreduce.columns.trees import columns_of
from tests.columns.expression_trees import COLUMNS, Pair, batches, rows_of, trees

LAW = settings(max_examples=30, deadline=None)
ANY_TREE = st.sampled_from(sorted(COLUMNS)).flatmap(trees)


def listed(found: tuple[Any, Any]) -> list[Any]:
    """A column and its mask as Python values."""
    column, mask = found
    rows = column.tolist() if isinstance(column, np.ndarray) else column.to_list()
    return [v if mask is None or mask[i] else None for i, v in enumerate(rows)]


def unlike(found: list[Any], wanted: list[Any]) -> list[Any]:
    """Pairs that differ; NaN is NaN, and zeros have signs."""

    def key(value: Any) -> Any:
        value = value.item() if isinstance(value, np.generic) else value
        return repr(value)

    return [
        pair
        for pair in itertools.zip_longest(found, wanted, fillvalue="nothing")
        if key(pair[0]) != key(pair[1])
    ]


@LAW
@given(ANY_TREE, batches())
def test_an_expression_gives_what_a_loop_over_rows_gives(pair: Pair, batch: Batch) -> None:
    tree, slow = pair
    assert unlike(listed(compute(tree, batch)), [slow(row) for row in rows_of(batch)]) == []


@LAW
@given(ANY_TREE, batches())
def test_the_type_is_known_before_and_does_not_depend_on_the_rows(pair: Pair, batch: Batch) -> None:
    tree, _ = pair
    column, mask = compute(tree, batch)
    assert typed(tree, batch.schema) == field_of(column, mask is not None)


@LAW
@given(ANY_TREE, batches())
def test_folding_constants_changes_neither_values_nor_types(pair: Pair, batch: Batch) -> None:
    tree, _ = pair
    for fields in (batch.schema, {}):
        simple = fold_constants(tree, fields)
        assert unlike(listed(compute(simple, batch)), listed(compute(tree, batch))) == []
        before, after = typed(tree, batch.schema), typed(simple, batch.schema)
        assert before is not None and after is not None
        assert (before.kind, before.dtype, before.shape) == (after.kind, after.dtype, after.shape)
        assert before.nullable or not after.nullable


@LAW
@given(trees("bool"), batches())
def test_rows_are_selected_where_the_condition_is_true(pair: Pair, batch: Batch) -> None:
    tree, slow = pair
    found = select_rows(tree, batch)
    assert found.dtype == np.int64
    assert found.tolist() == [i for i, row in enumerate(rows_of(batch)) if slow(row)]


@LAW
@given(trees("bool"), st.sets(st.sampled_from(["j", "g", "q", "t", "i"])), batches())
def test_what_is_said_to_be_null_or_false_on_nulls_is(pair: Pair, names: set[str], batch: Batch) -> None:
    tree, _ = pair
    nothing = dict.fromkeys(names, np.zeros(len(batch), bool))
    if null_on_null(tree, names):
        assert select_rows(tree, batch.with_valid(**nothing)).tolist() == []


@LAW
@given(st.lists(ANY_TREE, min_size=1, max_size=4), batches())
def test_several_expressions_give_what_each_gives_alone(pairs: list[Pair], batch: Batch) -> None:
    named = {f"c{i}": tree for i, (tree, _) in enumerate(pairs * 2)}
    together = compute_columns(named, batch)
    assert together.names == tuple(named) and len(together) == (len(batch) if batch.names else 0)
    for name, tree in named.items():
        assert unlike(listed((together[name], together.valid(name))), listed(compute(tree, batch))) == []


# ---------------------------------------------------------------------- SQLite

SQL: list[tuple[Expr, str]] = [
    (ir.col("p") & ir.col("q"), "p AND q"),
    (ir.col("p") | ir.col("q"), "p OR q"),
    (~ir.col("p") & ir.col("q"), "NOT p AND q"),
    (~(ir.col("p") | (ir.col("a") > 1)), "NOT (p OR a > 1)"),
    (ir.col("a") + ir.col("b") * 2, "a + b * 2"),
    (ir.col("a") == ir.col("b"), "a = b"),
    (ir.col("a") != 1, "a <> 1"),
    (ir.col("a").is_null() | (ir.col("b") <= 0), "a IS NULL OR b <= 0"),
    (ir.coalesce(ir.col("a"), ir.col("b"), 7), "COALESCE(a, b, 7)"),
    (ir.col("a").fill_null(ir.col("b")), "IFNULL(a, b)"),
    (ir.col("a").is_in([1, 2]), "a IN (1, 2)"),
    (ir.col("a").is_in([1, None]), "a IN (1, NULL)"),
    (~ir.col("a").is_in([1, None]), "a NOT IN (1, NULL)"),
    (ir.col("a").is_in([]), "a IN ()"),
    (ir.lit(None).is_in([1]), "NULL IN (1)"),
    (ir.col("a").between(0, ir.col("b")), "a BETWEEN 0 AND b"),
    (ir.when(ir.col("p")).then(ir.col("a")).when(ir.col("q")).then(ir.col("b")).otherwise(-1),
     "CASE WHEN p THEN a WHEN q THEN b ELSE -1 END"),
    (ir.when(ir.col("p")).then(ir.col("a")), "CASE WHEN p THEN a END"),
    (ir.where(ir.col("a") > 0, ir.lit(None), ir.col("b")), "CASE WHEN a > 0 THEN NULL ELSE b END"),
    (ir.col("a") + None, "a + NULL"),
    (ir.col("p") & None, "p AND NULL"),
    (ir.col("p") | None, "p OR NULL"),
    (abs(ir.col("a")) - ir.minimum(ir.col("a"), ir.col("b")), "abs(a) - min(a, b)"),
    (ir.col("s") < ir.col("t"), "s < t"),
    (ir.col("s").str.concat("-", ir.col("t")), "s || '-' || t"),
    (ir.col("s").str.length() + ir.col("a"), "length(s) + a"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "sql"), SQL, ids=[sql for _, sql in SQL])
def test_nulls_mean_what_they_mean_in_sqlite(tree: Expr, sql: str) -> None:
    rows = list(
        itertools.product([None, 0, 1, 2], [None, -1, 1], [None, 0, 1], [None, 0, 1], [None, "é", "a"])
    )
    texts = [None, "", "b"]
    data = [(*row, texts[i % 3]) for i, row in enumerate(rows)]
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE r (a INTEGER, b INTEGER, p, q, s TEXT, t TEXT)")
        connection.executemany("INSERT INTO r VALUES (?, ?, ?, ?, ?, ?)", data)
        wanted = [v for (v,) in connection.execute(f"SELECT {sql} FROM r ORDER BY rowid")]
    names, columns, valid = ("a", "b", "p", "q", "s", "t"), {}, {}
    for name, column in zip(names, zip(*data, strict=True), strict=True):
        filler: Any = "x" if name in "st" else 99
        made = [filler if v is None else v for v in column]
        columns[name] = made if name in "st" else np.array(made, bool if name in "pq" else np.int64)
        valid[name] = np.array([v is not None for v in column])
    found = listed(compute(tree, Batch.from_dict(columns, valid)))
    assert [None if v is None else v if isinstance(v, str) else int(v) for v in found] == wanted


def test_columns_of_the_oracle_are_all_read() -> None:
    names = {name for pair in COLUMNS.values() for name in pair}
    assert names == set(columns_of(ir.coalesce(*(ir.col(n) for n in sorted(names)))))
    assert same(ir.col("a") + 1, ir.col("a") + 1)
