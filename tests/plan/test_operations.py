"""Every operation of a lazy dataset means what the oracle says, on any number of ranks, wherever rows lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.dataset import Dataset
from tests.plan.kit import Table, Tables, agrees

N = None
TABLES = {
    "a": Table(
        {"k": "int64", "x": "float64", "s": "text"},
        [(1, 1.5, "a"), (1, 2.0, "b"), (2, N, "a"), (N, 3.0, N), (N, 4.0, "z"), (3, 0.5, ""), (2, 7.0, "b")],
    ),
    "b": Table(
        {"k": "int64", "y": "int64", "x": "float64"},
        [(1, 10, 0.5), (1, 11, N), (4, 12, 1.0), (N, 13, 2.0), (2, N, 3.0)],
    ),
    "e": Table({"k": "int64", "x": "float64", "s": "text"}),
    "eb": Table({"k": "int64", "y": "int64", "x": "float64"}),
}

HOWS = ("inner", "left", "right", "full", "semi", "anti")
Build = Callable[[Tables], Dataset]
JOINS: dict[str, Callable[[Tables, str], Dataset]] = {
    "join": lambda t, how: t["a"].join(t["b"], "k", how),
    "empty right": lambda t, how: t["a"].join(t["eb"], "k", how),
    "empty left": lambda t, how: t["e"].join(t["b"], "k", how),
    "batch right": lambda t, how: t["a"].join(t.batch("b"), "k", how),
    "batch left": lambda t, how: Dataset(t["b"].limit(100).node, t.group).join(t["a"], "k", how),
    "both everywhere": lambda t, how: t["b"].limit(100).join(t.batch("a"), "k", how),
    "text": lambda t, how: t["a"].join(t["a"].select("s", z="x"), "s", how),
    "pairs": lambda t, how: t["a"].join(t["b"].select("y", q="k", k="x"), k="q", how=how),
    "two": lambda t, how: (
        t["a"]
        .select("k", "s", x=col("x").cast("int64"))
        .join(t["b"].select("k", "y", x=col("x").cast("int64")), ["k", "x"], how)
    ),
    "self join": lambda t, how: (lambda a: a.join(a, "k", how))(t["a"]),
    "grouped": lambda t, how: t["a"].join(t["b"].group_by("k").agg(n=ir.count(), m=ir.max("y")), "k", how),
    "grouped left": lambda t, how: (
        t["a"].group_by("k").agg(n=ir.count()).join(t["b"].group_by("k").agg(m=ir.max("y")), "k", how)
    ),
    "unique left group right": lambda t, how: (
        t["a"].distinct("k").join(t["b"].group_by("k").agg(m=ir.max("y")), "k", how)
    ),
    "unique left group right renamed": lambda t, how: (
        t["a"]
        .distinct("k")
        .join(
            t["b"]
            .group_by("k")
            .agg(m=ir.max("y"), n=ir.count(), w=ir.mean(col("x") * 2))
            .select(z="m", q="k", n="n", w="w"),
            k="q",
            how=how,
        )
    ),
    "left everywhere right unique": lambda t, how: (
        t["a"].limit(99).join(t["b"].group_by("k").agg(m=ir.max("y")), "k", how)
    ),
    "right everywhere unique": lambda t, how: t["a"].join(
        t["b"].limit(99).group_by("k").agg(m=ir.max("y")), "k", how
    ),
    "agg as right": lambda t, how: t["a"].join(t["b"].agg(k=ir.max("k")), "k", how),
    "agg as left": lambda t, how: t["b"].agg(k=ir.max("k")).join(t["a"], "k", how),
    "int32 key": lambda t, how: t["a"].join(t["b"].select("y", k=col("k").cast("int32")), "k", how),
    "bool key": lambda t, how: t["a"].join(t["b"].select("y", k=col("k") > 1), "k", how),
    "suffix": lambda t, how: t["a"].join(t["a"], "k", how, suffix="2"),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("sides", JOINS)
def test_joins_pair_rows_of_equal_keys_and_no_null_equals_another(sides: str, how: str) -> None:
    agrees(lambda t: JOINS[sides](t, how), TABLES, (1, 3), ("last",))


@pytest.mark.parametrize("how", HOWS)
def test_joins_agree_on_any_number_of_ranks_and_any_deal(how: str) -> None:
    agrees(lambda t: t["a"].join(t["b"], "k", how), TABLES, deals=("even", "first", "last"))


ROWS: dict[str, Build] = {
    "group": lambda t: (
        t["a"]
        .group_by("k")
        .agg(n=ir.count(), c=ir.count("x"), s=ir.sum("x"), lo=ir.min("x"), hi=ir.max("x"), m=ir.mean("x"))
    ),
    "group expr": lambda t: t["a"].group_by("s").agg(n=ir.sum(col("x") * 2), m=ir.mean(col("k"))),
    "group key expr": lambda t: t["a"].group_by("s", k=col("k") % 2).agg(n=ir.sum("k"), x=ir.max("x")),
    "group of everywhere": lambda t: t["a"].limit(100).group_by("k").agg(n=ir.count(), s=ir.sum("x")),
    "group again": lambda t: (
        t["a"]
        .group_by("k", "s")
        .agg(n=ir.count(), s2=ir.sum("x"))
        .group_by("k")
        .agg(m=ir.sum("n"), z=ir.max("s2"))
    ),
    "group again2": lambda t: (
        t["a"].group_by("k").agg(n=ir.count(), x=ir.sum("x")).group_by("k", "n").agg(m=ir.sum("x"))
    ),
    "count": lambda t: t["a"].group_by("k").count(),
    "distinct": lambda t: t["a"].distinct(),
    "distinct k": lambda t: t["a"].union(t["a"]).distinct("k", "s"),
    "union": lambda t: t["a"].union(t["e"], t["a"].filter(col("k") > 1), t["a"].limit(100)),
    "union batch": lambda t: t["a"].union(t.batch("a")),
    "union all everywhere": lambda t: t["a"].limit(100).union(t.batch("a")),
    "union order": lambda t: t["a"].union(t["a"].select("s", "x", "k")),
    "vertices": lambda t: t["b"].vertices("k", "y"),
    "agg": lambda t: t["a"].agg(
        n=ir.count(), c=ir.count("x"), s=ir.sum("x"), m=ir.mean(col("x") * 2), lo=ir.min("k")
    ),
    "agg empty": lambda t: t["e"].agg(
        n=ir.count(), c=ir.count("x"), s=ir.sum("x"), m=ir.mean(col("x") * 2), lo=ir.min("k")
    ),
    "agg text": lambda t: t["a"].agg(lo=ir.min("s"), hi=ir.max("s")),
    "group text": lambda t: t["a"].group_by("k").agg(lo=ir.min("s"), hi=ir.max("s")),
    "agg text empty": lambda t: t["e"].agg(lo=ir.min("s"), hi=ir.max("s")),
    "number": lambda t: (
        lambda a: a.with_columns(p=col("x") / a.sum("x"), n=a.count()).filter(col("x") >= a.mean("x"))
    )(t["a"]),
    "number null": lambda t: t["a"].with_columns(p=col("x") / t["e"].sum("x")),
    "number null filter": lambda t: t["a"].filter(col("x") > t["e"].max("x")),
    "number of number": lambda t: (
        lambda a: a.agg(d=ir.sum((col("x") - a.mean("x")) * (col("x") - a.mean("x"))))
    )(t["a"]),
    "repartition": lambda t: t["a"].repartition("k"),
    "repartition group": lambda t: t["a"].repartition("k").group_by("k").agg(n=ir.sum("x")),
    "repartition two group": lambda t: t["a"].repartition("s").group_by("s", "k").agg(n=ir.sum("x")),
    "repartition expr": lambda t: (
        t["a"].repartition("k").with_columns(k=col("k") % 2).group_by("k").agg(n=ir.sum("x"))
    ),
    "repartition rename": lambda t: (
        t["a"].repartition("k").rename(k="x", x="k").group_by("k").agg(n=ir.sum("x"))
    ),
    "map batches": lambda t: (
        t["a"]
        .map_batches(
            lambda b: b.take(np.arange(len(b) - 1, -1, -1)), columns={"k": "int64", "x": "float64", "s": str}
        )
        .group_by("s")
        .agg(n=ir.count())
    ),
    "map batches unknown": lambda t: t["a"].map_batches(lambda b: b).group_by("s").agg(n=ir.count()),
    "map batches others": lambda t: t["a"].map_batches(
        lambda b, o: ir.Batch(n=np.full(len(b), len(o))), t["b"]
    ),
    "map groups": lambda t: t["a"].group_by("k").map_groups(lambda g: g.keys.with_columns(n=g.sizes)),
    "where null": lambda t: t["a"].select(
        "k", z=ir.where(col("x") > 1, col("x"), ir.lit(None)), w=col("k").is_null() | (col("x") < 1)
    ),
    "dup filter": lambda t: (
        t["a"].filter(col("x") > 1).filter(col("k") < 3).select("s", y=col("x") + 1).filter(col("y") > 3)
    ),
    "const type": lambda t: (
        t["a"].select(x8=col("k").cast("int8") + 100, c=ir.lit(100)).select(z=col("x8") + col("c"))
    ),
    "const filter": lambda t: (
        t["a"].select(x8=col("k").cast("int8"), c=ir.lit(300)).filter(col("x8") < col("c"))
    ),
    "filter below left join right col": lambda t: t["a"].join(t["b"], "k", "left").filter(col("y").is_null()),
    "filter left join drop": lambda t: t["a"].join(t["b"], "k", "left").filter(col("y") > 10),
    "filter full join": lambda t: t["a"].join(t["b"], "k", "full").filter((col("y") > 10) | (col("x") > 1)),
    "filter full join key": lambda t: t["a"].join(t["b"], "k", "full").filter(col("k") > 1),
    "filter right join": lambda t: t["a"].join(t["b"], "k", "right").filter(col("x") > 1),
    "filter right join null": lambda t: t["a"].join(t["b"], "k", "right").filter(col("x").is_null()),
    "filter semi": lambda t: t["a"].join(t["b"], "k", "semi").filter(col("x") > 1),
    "filter anti": lambda t: t["a"].join(t["b"], "k", "anti").filter(col("k") > 2),
    "filter group key null": lambda t: t["a"].group_by("k").agg(n=ir.count()).filter(col("k").is_null()),
    "filter group agg": lambda t: (
        t["a"]
        .group_by("k")
        .agg(n=ir.count(), x=ir.max("x"))
        .filter((col("n") > 1) & (col("k") < 3) & (col("x") > 2))
    ),
    "filter union": lambda t: t["a"].union(t.batch("a")).filter(col("x") > 1),
    "filter top": lambda t: t["a"].top(3, ["x", "k"]).filter(col("k") < 3),
    "filter limit": lambda t: t["a"].sort("x").limit(3).filter(col("k") < 3),
    "filter agg": lambda t: t["a"].agg(n=ir.count()).filter(col("n") > 100),
    "filter agg number": lambda t: t["a"].filter(
        col("x") < t["a"].agg(n=ir.mean("x")).filter(col("n") > 0).sum("n")
    ),
    "filter map": lambda t: (
        t["a"]
        .map_batches(lambda b: b, columns={"k": "int64", "x": "float64", "s": str})
        .filter(col("x") > 1)
        .select("k")
    ),
    "filter const": lambda t: t["a"].filter(ir.lit(1) < 2),
    "filter const f": lambda t: t["a"].filter(ir.lit(1) > 2),
    "filter null": lambda t: t["a"].filter(ir.lit(None) < 2),
    "filter computed": lambda t: (
        t["a"].with_columns(z=col("x") / col("k")).filter(col("z") > 1).select("k", w=col("z") * col("z"))
    ),
    "filter renamed twice": lambda t: (
        t["a"].rename(k="x", x="k").filter(col("k") > 1).rename(k="x", x="k").filter(col("k") > 1)
    ),
    "swap": lambda t: t["a"].select(k="x", x="k").select(k="x", x="k", s=col("k") + col("x")),
    "group of join": lambda t: (
        t["b"]
        .select("k", d="y")
        .join(t["a"].group_by("k").agg(x=ir.max("x")), "k")
        .group_by("d")
        .agg(s=ir.sum(col("x") * 2), n=ir.count())
    ),
    "onto int32": lambda t: (
        t["b"]
        .select(k=col("k").cast("int32"))
        .distinct("k")
        .left_join(t["a"].group_by("k").agg(x=ir.sum("x")), "k")
    ),
    "onto two keys swapped": lambda t: (
        t["a"].distinct("k", "s").left_join(t["a"].group_by("s", "k").agg(x=ir.sum("x")), ["k", "s"])
    ),
    "onto renamed clash": lambda t: (
        t["b"].distinct("k").left_join(t["a"].select(k="x", q="k").group_by("q").agg(x=ir.sum("k")), k="q")
    ),
    "fold": lambda t: t["a"].select(
        z=col("k").cast("int8") + (ir.lit(100) + 100), w=col("k").cast("int8") + ir.coalesce(100, 1)
    ),
    "expr const agg": lambda t: (
        t["a"].with_columns(c=1).group_by("k").agg(n=ir.sum("c"), m=ir.sum(col("c") * 2))
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_those_that_the_plan_means(name: str) -> None:
    agrees(ROWS[name], TABLES, (1, 3), ("last",))


SORTED: dict[str, Build] = {
    "sort k False": lambda t: t["a"].sort("k", descending=False),
    "sort xs False": lambda t: t["a"].sort("x", "s", descending=[False, True]),
    "sort s False": lambda t: t["a"].sort("s", descending=False),
    "top False": lambda t: t["a"].top(3, "x", descending=False),
    "top multi False": lambda t: t["a"].top(4, ["k", "x"], descending=[False, True]),
    "sort k True": lambda t: t["a"].sort("k", descending=True),
    "sort xs True": lambda t: t["a"].sort("x", "s", descending=[True, False]),
    "sort s True": lambda t: t["a"].sort("s", descending=True),
    "top True": lambda t: t["a"].top(3, "x", descending=True),
    "top multi True": lambda t: t["a"].top(4, ["k", "x"], descending=[True, False]),
    "top 0": lambda t: t["a"].top(0, "x"),
    "top many": lambda t: t["a"].top(100, "x"),
    "limit 0": lambda t: t["a"].limit(0),
    "limit 3": lambda t: t["a"].limit(3),
    "limit empty": lambda t: t["e"].limit(3),
    "top empty": lambda t: t["e"].top(3, "x"),
    "sort empty": lambda t: t["e"].sort("x"),
    "sort sel": lambda t: t["a"].sort("x").select("x", y=col("k") + 1),
    "sort filter": lambda t: t["a"].sort("x").filter(col("k") > 1),
    "sort limit": lambda t: t["a"].sort("x", descending=True).limit(2),
    "sort limit filter": lambda t: (
        t["a"].sort("x", descending=True).limit(4).filter(col("k") > 0).with_columns(z=col("x") * 2)
    ),
    "sort of limit": lambda t: t["a"].limit(5).sort("x"),
    "sort of batch": lambda t: t["a"].filter(col("k") > 90).union(t.batch("a")).sort("x", "k"),
    "sort of everywhere": lambda t: t["a"].limit(100).sort("x", "k"),
    "sort of group": lambda t: t["a"].group_by("k").agg(n=ir.sum("x")).sort("n", "k"),
    "top of top": lambda t: t["a"].top(5, "x").top(2, "k", descending=False),
    "filter sort": lambda t: t["a"].filter(col("x") > 100).sort("x"),
}


@pytest.mark.parametrize("name", SORTED)
def test_sorted_rows_stand_in_order_over_all_ranks(name: str) -> None:
    agrees(SORTED[name], TABLES, (1, 2, 8), ("even",), in_order=True)


def _shared(use: Callable[[Dataset, Dataset], Dataset]) -> Build:
    def build(t: Tables) -> Dataset:
        groups = t["a"].group_by("k").agg(x=ir.sum("x"))
        return use(t["b"].distinct("k").left_join(groups, "k"), groups)

    return build


@pytest.mark.parametrize(
    "use",
    [
        lambda rows, groups: rows.union(groups),
        lambda rows, groups: rows.select("k", y=col("x").fill_null(0) + groups.sum("x")),
        lambda rows, groups: rows.select("k", y=col("x").fill_null(0) + groups.count()),
    ],
)
def test_groups_beside_rows_keep_those_that_no_row_names_for_other_readers(use: Any) -> None:
    agrees(_shared(use), TABLES, (1, 3))
