"""Iterations mean what a plain Python loop does, on any number of ranks: all kinds of states, nested ones."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.testing import run_ranks
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

it = ir.iterate


def pr(t: Tables) -> Any:
    e = t["b"].filter(col("k").is_not_null() & col("y").is_not_null()).select(src="k", dst=col("y") - 9)
    d = e.group_by("src").agg(deg=ir.count())
    p = e.vertices()
    n = p.count()
    r0 = p.with_columns(rank=1.0 / n)

    def step(r):
        c = (
            e.join(d, "src")
            .join(r, src="vertex")
            .group_by(vertex="dst")
            .agg(c=ir.sum(col("rank") / col("deg")))
        )
        return r.left_join(c, "vertex").select("vertex", rank=0.15 / n + 0.85 * col("c").fill_null(0.0))

    return it(step, r0, max_iterations=4)


def prd(t: Tables) -> Any:
    e = t["b"].filter(col("k").is_not_null() & col("y").is_not_null()).select(src="k", dst=col("y") - 9)
    p = e.vertices()
    d = p.left_join(e.group_by("src").agg(deg=ir.count()), vertex="src").select(
        "vertex", deg=col("deg").fill_null(0)
    )
    n = p.count()
    r0 = p.with_columns(rank=1.0 / n)

    def step(r):
        dang = r.join(d, "vertex").filter(col("deg") == 0).sum("rank")
        c = (
            e.join(r.join(d, "vertex"), src="vertex")
            .group_by(vertex="dst")
            .agg(c=ir.sum(col("rank") / col("deg")))
        )
        return r.left_join(c, "vertex").select(
            "vertex", rank=0.15 / n + 0.85 * (col("c").fill_null(0.0) + dang.fill_null(0.0) / n)
        )

    return it(step, r0, until=ir.l1("rank") <= 1e-9, max_iterations=40)


def two(t: Tables) -> Any:
    return it(
        lambda a, b: {
            "a": a.left_join(b, "k").select("k", x=col("x") + col("y").fill_null(1.0)),
            "b": b.with_columns(y=col("y") * 2),
        },
        {"a": t["a"].group_by("k").agg(x=ir.sum("x")), "b": t["a"].group_by("k").agg(y=ir.max("x"))},
        max_iterations=3,
    )


def both(t: Tables) -> Any:
    f = two(t)
    return f["a"].join(f["b"], "k")


def nested(t: Tables) -> Any:
    g = t["a"].group_by("k").agg(x=ir.sum("x"))

    def outer(s):
        inner = it(lambda u: u.with_columns(x=col("x") * 0.5 + 1), s, max_iterations=2)
        return inner.with_columns(x=col("x") + s.count())

    return it(outer, g, max_iterations=3)


def nested2(t: Tables) -> Any:
    g = t["a"].group_by("k").agg(x=ir.sum("x"))
    inv = t["b"].group_by("k").agg(y=ir.max("y"))

    def outer(s):
        m = s.mean("x")
        inner = it(
            lambda u: u.left_join(inv, "k").select("k", x=col("x") * 0.5 + col("y").fill_null(1) / m),
            s,
            max_iterations=2,
        )
        return inner.left_join(s.select("k", old="x"), "k").select("k", x=col("x") - col("old"))

    return it(outer, g, max_iterations=3)


def after(t: Tables) -> Any:
    r = nested2(t)
    return r.join(t["a"].select("k", "s"), "k").group_by("s").agg(n=ir.count(), x=ir.sum("x"))


def then(t: Tables) -> Any:
    r = it(
        lambda s: s.with_columns(x=col("x") + 1), t["a"].group_by("k").agg(x=ir.sum("x")), max_iterations=2
    )
    return it(
        lambda s: s.left_join(r.select("k", y="x"), "k").select("k", x=col("x") + col("y")),
        r,
        max_iterations=2,
    )


def chain2(t: Tables) -> Any:
    f = two(t)
    return it(lambda s: s.with_columns(x=col("x") + 1), f["b"].select("k", x="y"), max_iterations=2)


def indep(t: Tables) -> Any:
    a = it(
        lambda s: s.with_columns(x=col("x") + 1), t["a"].group_by("k").agg(x=ir.sum("x")), max_iterations=2
    )
    b = it(
        lambda s: s.with_columns(x=col("x") * 2), t["a"].group_by("k").agg(x=ir.sum("x")), max_iterations=3
    )
    return a.join(b, "k", suffix="2")


LOOPS: dict[str, Callable[[Tables], Dataset]] = {
    "it everywhere": lambda t: it(
        lambda s: s.with_columns(x=col("x") * 0.5 + 1), t.batch("a"), max_iterations=3
    ),
    "it keyed": lambda t: it(
        lambda s: s.with_columns(x=col("x") * 0.5 + 1),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it no key": lambda t: it(lambda s: s.with_columns(x=col("x") * 0.5 + 1), t["a"], max_iterations=3),
    "it declared key": lambda t: it(
        lambda s: s.with_columns(x=col("x") * 0.5 + 1),
        t["a"].filter(col("k").is_not_null() & (col("x") > 1.8)).select("s", "x", "k").filter(col("x") != 2),
        max_iterations=3,
        key="k",
    ),
    "it filter": lambda t: it(
        lambda s: s.filter(col("x") < 3).with_columns(x=col("x") + 1),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=2,
    ),
    "it filter nokey": lambda t: it(
        lambda s: s.filter(col("x") < 3).with_columns(x=col("x") + 1), t["a"], max_iterations=2
    ),
    "it group": lambda t: it(
        lambda s: (
            s.join(t["b"].select("k", j="y"), "k")
            .select(k=col("j") % 3, x="x")
            .group_by("k")
            .agg(x=ir.sum("x"))
        ),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=2,
    ),
    "it group2": lambda t: it(
        lambda s: (
            s.join(t["b"].select("k", j="y"), "k")
            .group_by(k="j")
            .agg(x=ir.sum("x"))
            .select(k=col("k") - 9, x="x")
        ),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it union distinct": lambda t: it(
        lambda s: s.union(s.join(t["b"].select(k="k", j=col("y") - 10), "k").select(k="j")).distinct(),
        t["a"].select("k").distinct(),
        max_iterations=10,
    ),
    "it union nolimit": lambda t: it(
        lambda s: s.union(s.join(t["b"].select(k="k", j=col("y") - 10), "k").select(k="j")).distinct("k"),
        t["a"].distinct("k"),
    ),
    "it scalar": lambda t: it(
        lambda s: s.with_columns(
            x=col("x") / s.sum("x"),
        ),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it scalar inv": lambda t: it(
        lambda s: s.with_columns(
            x=col("x") / t["b"].count() + t["a"].sum("x"),
        ),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it scalar empty": lambda t: it(
        lambda s: s.with_columns(x=ir.coalesce(col("x") + s.filter(col("x") > 1e9).sum("x"), 7.0)),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it null values": lambda t: it(
        lambda s: s.with_columns(x=ir.where(col("x") > 3, ir.lit(None), col("x") + 1)),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it left join self": lambda t: it(
        lambda s: s.left_join(s.select(k=col("k") + 1, y="x"), "k").select(
            "k", x=col("x") + col("y").fill_null(0)
        ),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "pagerank": pr,
    "pagerank dangling": prd,
    "two a": lambda t: two(t)["a"],
    "two b": lambda t: two(t)["b"],
    "two joined": both,
    "two swap": lambda t: it(
        lambda a, b: {"a": b, "b": a},
        {"a": t["a"].group_by("k").agg(x=ir.sum("x")), "b": t["a"].group_by("k").agg(x=ir.max("x"))},
        max_iterations=3,
    )["a"],
    "two partial": lambda t: it(
        lambda a, b: {"a": a.with_columns(x=col("x") + b.sum("x"))},
        {"a": t["a"].group_by("k").agg(x=ir.sum("x")), "b": t["a"].group_by("k").agg(x=ir.max("x"))},
        max_iterations=3,
    )["a"],
    "everywhere and spread": lambda t: it(
        lambda a, c: {"a": a.with_columns(x=col("x") + c.sum("m")), "c": a.agg(m=ir.mean("x"))},
        {"a": t["a"].group_by("k").agg(x=ir.sum("x")), "c": ir.Batch(m=np.array([1.0]))},
        max_iterations=3,
    )["a"],
    "nested": nested,
    "nested2": nested2,
    "after": after,
    "then": then,
    "then second state": chain2,
    "independent loops": indep,
    "it impure map": lambda t: it(
        lambda s: s.map_batches(
            lambda b: b.with_columns(x=b["x"] + 1), columns={"k": "int64", "x": "float64"}
        ),
        t["a"].filter(col("x") > 1).filter(col("k") > 0).select("k", "x"),
        max_iterations=3,
    ),
    "it impure map keyed": lambda t: it(
        lambda s: s.map_batches(
            lambda b: b.with_columns(x=b["x"] + 1), columns={"k": "int64", "x": "float64"}
        ),
        t["a"].filter(col("x") > 1).filter(col("k") > 0).select("k", "x").filter(col("x") != 2),
        max_iterations=3,
        key="k",
    ),
    "it impure unknown": lambda t: it(
        lambda s: s.map_batches(lambda b: b.with_columns(x=b["x"] + 1)),
        t["a"].filter(col("x") > 1).filter(col("k") > 0).select("k", "x").filter(col("x") != 2),
        max_iterations=3,
        key="k",
    ),
    "it top": lambda t: it(
        lambda s: s.union(s.with_columns(x=col("x") * -1.5)).top(4, ["x", "k"]),
        t["a"].filter(col("x") > 1).filter(col("k") > 0).select("k", "x").top(4, ["x", "k"]),
        max_iterations=3,
    ),
    "it sort": lambda t: it(
        lambda s: s.with_columns(x=0 - col("x")).sort("x"),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it same": lambda t: it(lambda s: s, t["a"].group_by("k").agg(x=ir.sum("x")), max_iterations=3),
    "it constant": lambda t: it(
        lambda s: t["b"].group_by("k").agg(x=ir.sum("x")),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it empty start": lambda t: it(
        lambda s: s.with_columns(x=col("x") + 1), t["e"].group_by("k").agg(x=ir.sum("x")), max_iterations=3
    ),
    "it agg state": lambda t: it(
        lambda s: s.with_columns(m=col("m") + t["a"].sum("x")), t["a"].agg(m=ir.mean("x")), max_iterations=3
    ),
    "it text key": lambda t: it(
        lambda s: s.left_join(s.group_by("s").agg(y=ir.sum("x")), "s").select("s", x=col("x") + col("y")),
        t["a"].group_by("s").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it two keys": lambda t: it(
        lambda s: s.left_join(s.group_by("k").agg(y=ir.sum("x")), "k").select(
            "k", "s", x=col("x") + col("y")
        ),
        t["a"].group_by("k", "s").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it reorder": lambda t: it(
        lambda s: s.select(x=col("x") + 1, k="k"), t["a"].group_by("k").agg(x=ir.sum("x")), max_iterations=3
    ),
    "it rekey": lambda t: it(
        lambda s: s.select(k=col("k") + 1, x=col("x") + 1),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
    "it rekey key=": lambda t: it(
        lambda s: s.select(k=col("k") + 1, x=col("x") + 1),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
        key="k",
    ),
    "it semi": lambda t: it(
        lambda s: s.join(t["b"], "k", "anti").with_columns(x=col("x") + 1),
        t["a"].group_by("k").agg(x=ir.sum("x")),
        max_iterations=3,
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_an_iteration_gives_what_a_loop_over_rows_gives(name: str) -> None:
    agrees(LOOPS[name], TABLES, (1, 3), ("last",))


def _averaged(t: Tables) -> Dataset:
    """Every key of the state has a group, and all groups a key: nothing is masked or filled."""
    rows = t["a"].select(k=col("k").fill_null(0), x=col("x").fill_null(2.0))

    def step(state: Dataset) -> Dataset:
        sums = (
            rows.join(state, "k")
            .select("k", y=col("x") + col("m"))
            .group_by("k")
            .agg(s=ir.sum("y"), n=ir.count())
        )
        told = state.select("k").left_join(sums, "k")
        return told.select("k", m=col("s").fill_null(-100.0) / col("n").fill_null(-1))

    start = rows.distinct("k").sort("k").with_columns(m=ir.lit(0.5))
    return ir.iterate(step, start, max_iterations=3)


def test_rows_that_all_have_a_match_are_neither_masked_nor_filled() -> None:
    agrees(_averaged, TABLES, (1, 2, 5), ("even", "last"))
    stages = _averaged(Tables(TABLES)).explain().split("in each iteration")[1]
    assert "where(" not in stages and "coalesce" not in stages


def test_rows_of_which_some_have_no_match_are_filled() -> None:
    def build(t: Tables) -> Dataset:
        rows = t["a"].select(k=col("k").fill_null(0), x=col("x").fill_null(1.0))

        def step(state: Dataset) -> Dataset:
            some = rows.filter(col("x") > 2).join(state, "k").select("k", y=col("x") + col("m"))
            sums = some.group_by("k").agg(s=ir.sum("y"), n=ir.count())
            told = state.select("k").left_join(sums, "k")
            return told.select("k", m=col("s").fill_null(-100.0) / (1 + col("n").fill_null(0)))

        return ir.iterate(step, rows.distinct("k").with_columns(m=ir.lit(0.5)), max_iterations=3)

    agrees(build, TABLES, (1, 3), ("even", "last"))


N_ROWS = 100_000


def _programs(group: Group) -> dict[str, Any]:
    """Programs whose memory is much more than what is left of them: sorted, joined, linked rows."""
    random = np.random.default_rng(group.rank)
    some = N_ROWS // group.size
    k, other = random.integers(0, 9999, some), random.integers(0, 9999, some)
    rows = Dataset.from_local(group, k=k, x=random.random(some))
    edges = Dataset.from_local(group, src=k, dst=other)
    pages = edges.vertices("src", "dst", name="v").with_columns(r=1.0)

    def step(state: Any) -> Any:
        heard = edges.join(state, src="v").group_by(v="dst").agg(h=ir.sum("r"))
        return state.select("v").left_join(heard, "v").select("v", r=col("h").fill_null(0))

    return {
        "sort": rows.sort("k"),
        "join": rows.join(rows.distinct("k").select("k", y="k"), "k"),
        "linked": ir.iterate(step, pages, max_iterations=2),
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_memory_of_a_run_goes_with_its_result(ranks: int) -> None:
    """At once: Python's collector, which does not know how large arrays are, has nothing to find."""

    def work(group: Group) -> dict[str, int]:
        out = {}
        for program in _programs(group).values():  # what is compiled and imported stays, and is not asked for
            program.run()
        for name, program in _programs(group).items():
            group.barrier()
            if group.rank == 0:
                tracemalloc.start()
            group.barrier()
            before = tracemalloc.get_traced_memory()[0]
            group.barrier()
            program.run()
            group.barrier()
            out[name] = tracemalloc.get_traced_memory()[0] - before
            group.barrier()
        return out

    gc.collect()
    gc.disable()
    try:
        left = run_ranks(ranks, work)[0]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert max(left.values()) < N_ROWS * 4, left  # one column is twice as much
