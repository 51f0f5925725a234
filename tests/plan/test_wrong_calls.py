"""A wrong call is one error at the line that made it, with what to do; on several ranks nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.testing import run_ranks
from tests.engine.kit import raised

Call = Callable[[Dataset, Dataset], Any]
LINE = r"\(test_wrong_calls.py, line \d+\)"


def _tables(group: Group) -> tuple[Dataset, Dataset]:
    rows = Dataset.from_local(group, k=np.arange(4), x=np.arange(4.0), s=["a", "b", "c", "d"])
    return rows, Dataset.from_local(group, k=np.arange(4), y=np.arange(4))


AT_ONCE: list[tuple[Call, str]] = [
    (lambda a, b: a.select("kk"), 'no column "kk".*did you mean "k"'),
    (lambda a, b: a.with_columns(z=col("xx") + 1), 'no column "xx".*did you mean "x"'),
    (
        lambda a, b: a.with_columns(b=1, c=1, d=1, e=1).filter(col("xx") > 1),  # in order, on all ranks
        r'no column "xx" \(columns: k, .*b, c, d, e\)',
    ),
    (lambda a, b: a.filter(col("xx") > 1), 'no column "xx".*did you mean "x"'),
    (lambda a, b: a.group_by("kk"), 'no column "kk"'),
    (lambda a, b: a.group_by("k").agg(n=ir.sum("xx")), '"n": no column "xx"'),
    (lambda a, b: a.join(b, "kk"), 'left: no column "kk"'),
    (lambda a, b: a.join(b, k="yy"), 'right: no column "yy".*did you mean "y"'),
    (lambda a, b: a.sort("xx"), 'sort: no column "xx"'),
    (lambda a, b: a.with_columns(z=col("s") + 1), "text and int64"),
    (lambda a, b: a.group_by("k").agg(n=ir.sum("s")), "sum of text"),
    (lambda a, b: a.filter(col("k")), "wanted a condition"),
    (lambda a, b: a.filter(True), "True for all rows"),
    (lambda a, b: a.join(b, s="k"), "never equal; cast"),
    (lambda a, b: a.join(b, "k", how="outer"), "wanted one of inner"),
    (lambda a, b: a.group_by("k").agg(ir.sum("x")), r"name=ir.sum\(\"x\"\)"),
    (lambda a, b: a.agg({"x": "sum"}), r"name=ir.sum\(\"x\"\)"),
    (lambda a, b: a.join(b), "by which columns"),
    (lambda a, b: a.join(b.group_by("k"), "k"), r"\.agg\("),
    (lambda a, b: a.rename(k="x"), 'would be named "x"'),
    (lambda a, b: a.select("k", "k"), "named twice"),
    (lambda a, b: a.group_by("k").agg(k=ir.sum("x")), "name of a key"),
    (lambda a, b: a.with_columns(x_right=1).join(a, "k", how="right"), "two columns would have one name"),
    (lambda a, b: a.union(b), "on one side only"),
    (lambda a, b: a.select("k").union(a.select(k="x")), "int64 and float64"),
    (lambda a, b: a.limit(-1), "wanted a number of rows"),
    (lambda a, b: a.map_batches(lambda rows: rows).drop("k"), "not known before"),
    (lambda a, b: ir.iterate(lambda s: s.with_columns(x=col("x") / int(s.count())), a), "in the body"),
    (lambda a, b: ir.iterate(lambda s: [bool(s.count()), s][1], a), "in the body"),
    (lambda a, b: ir.iterate(lambda s: None, a), "wanted a Dataset"),
]


@pytest.mark.parametrize("case", range(len(AT_ONCE)))
def test_a_wrong_operation_is_told_at_the_line_that_wrote_it(case: int) -> None:
    call, message = AT_ONCE[case]
    with pytest.raises(ir.UsageError, match=f"(?s){message}.*{LINE}"):
        run_ranks(1, lambda group: call(*_tables(group)))


LATER: list[tuple[Call, type[ir.IterReduceError], str]] = [
    (lambda a, b: a.map_batches(lambda rows: None).collect(), ir.SchemaError, "wanted an ir.Batch"),
    (lambda a, b: a.map_batches(lambda rows: 1 / 0).collect(), ir.UserCodeError, "ZeroDivisionError"),
    (lambda a, b: a.map_batches(lambda rows: rows).select("kk").collect(), ir.SchemaError, "did you mean"),
    (lambda a, b: a.map_batches(lambda rows: rows).filter(col("k")).collect(), ir.SchemaError, "condition"),
    (lambda a, b: a.flat_map(lambda row: [1]).collect(), ir.UserCodeError, "wanted a dict"),
    (lambda a, b: a.sample(100).collect(), ir.UsageError, "100 different rows"),
    (
        lambda a, b: _repeated(a.distinct(), lambda s: s.map_batches(_twice)),
        ir.SchemaError,
        "more than one row of k=",
    ),
    (lambda a, b: _repeated(a.distinct(), lambda s: s.union(s)), ir.SchemaError, "step more than one"),
    (
        lambda a, b: _repeated(_few(), lambda s: s.map_batches(_twice)),
        ir.SchemaError,
        'state "state" is keyed',
    ),
    (lambda a, b: _repeated(_few().union(_few()), lambda s: s), ir.SchemaError, "begins with more"),
]


def _repeated(rows: Dataset, step: Any) -> Any:
    return ir.iterate(step, rows, max_iterations=2, key="k").collect()


def _few() -> Dataset:
    """Rows that every rank has."""
    return Dataset.from_local(None, k=np.arange(2)).limit(2)


def _twice(rows: ir.Batch) -> ir.Batch:
    return ir.Batch.concat([rows, rows])


@pytest.mark.parametrize("case", range(len(LATER)))
def test_what_is_found_when_it_runs_is_the_same_error_on_all_ranks(case: int) -> None:
    call, kind, message = LATER[case]

    def work(group: Group) -> str:
        return str(raised(group, kind, lambda: call(*_tables(group))))

    assert message in run_ranks(3, work)[0]


def test_records_come_from_some_ranks_only_and_may_be_null() -> None:
    def work(group: Group) -> tuple[list[int], list[Any]]:
        rows = Dataset.from_local(group, r=np.full(2, group.rank))
        some = rows.flat_map(lambda row: [{"n": 1}] * (row.r == 1)).collect()
        null = rows.flat_map(lambda row: [{"n": None if row.r else 2}], columns={"n": "int64"}).collect()
        none = rows.flat_map(lambda row: [], columns={"n": "int64", "s": str}).collect()
        assert (len(none), none.names) == (0, ("n", "s"))
        return some["n"].tolist(), null.valid("n").tolist()  # type: ignore[union-attr]

    assert run_ranks(3, work)[0] == ([1, 1], [True, True, False, False, False, False])
