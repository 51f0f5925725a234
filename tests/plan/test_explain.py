"""Plans as text: exact texts of small plans, the same on any number of ranks, and every reason by itself.

The texts stand in ``tests/plan/explained``; lines of programs are numbered ``N`` there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.collectives import Group
from iterreduce.testing import run_ranks
from tests.launch import mpirun_environment

TEXTS = Path(__file__).parent / "explained"


def dealt(group: Group | None, **columns: Any) -> ir.Dataset:
    """Rows, of a group its share."""
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    lo, hi = (len(next(iter(columns.values()))) * r // size for r in (rank, rank + 1))
    return ir.Dataset.from_local(group, **{name: c[lo:hi] for name, c in columns.items()})


def links(group: Group | None) -> ir.Dataset:
    return dealt(group, src=np.array([0, 0, 1, 2]), dst=np.array([1, 2, 2, 0]))


def pagerank(group: Group | None) -> ir.Dataset:
    edges = links(group)
    along = edges.join(edges.group_by("src").agg(degree=ir.count()), on="src")
    pages = edges.vertices("src", "dst", name="page")
    pages = pages.with_columns(restart=1 / pages.count())

    def step(ranks: ir.Dataset) -> ir.Dataset:
        sent = along.join(ranks, src="page")
        heard = sent.group_by(page="dst").agg(heard=ir.sum(col("rank") / col("degree")))
        rank = 0.25 * col("restart") + 0.75 * col("heard").fill_null(0)
        return pages.left_join(heard, on="page").select("page", rank=rank)

    start = pages.select("page", rank="restart")
    return ir.iterate(step, start, until=ir.l1("rank") <= 1e-9, max_iterations=50)


def shop(group: Group | None) -> ir.Dataset:
    buyer = np.array([0, 0, 1, 1, 2, 7])
    return dealt(group, order=np.arange(6), buyer=buyer, price=np.arange(6.0), note=np.arange(6))


def pipeline(group: Group | None) -> ir.Dataset:
    towns = dealt(group, buyer=np.arange(4), town=np.array([5, 5, 6, 6]))
    rest = dealt(group, buyer=np.arange(70_000), owed=np.arange(70_000.0))
    orders = shop(group).filter(col("price") > 1 + 1)
    joined = orders.join(towns, on="buyer").filter(col("town") < 6).left_join(rest, on="buyer")
    return joined.group_by("buyer").agg(spent=ir.sum(col("price") - col("owed"))).sort("spent")


def same(batch: ir.Batch) -> ir.Batch:
    return batch


def opaque(group: Group | None) -> ir.Dataset:
    orders = shop(group)
    types = {"order": int, "buyer": int, "price": float}

    def step(spent: ir.Dataset) -> ir.Dataset:
        anew = orders.map_batches(same, columns=types).join(spent, on="buyer")
        once = orders.map_batches(same, columns=types, pure=True).join(spent, on="buyer")
        told = anew.union(once).group_by("buyer").agg(v=ir.max("v"))
        return spent.select("buyer").left_join(told, on="buyer").with_columns(v=col("v").fill_null(0))

    return ir.iterate(step, orders.group_by("buyer").agg(v=ir.sum("price")), max_iterations=3)


def text_of(made: ir.Dataset, group: Group | None = None) -> str:
    return re.sub(r"line \d+", "line N", made.explain(group)) + "\n"


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("build", [pagerank, pipeline, opaque])
def test_a_plan_is_told_in_the_same_words_on_any_number_of_ranks(
    build: Callable[[Group | None], ir.Dataset], size: int
) -> None:
    wanted = (TEXTS / f"{build.__name__}.txt").read_text(encoding="utf-8")
    assert run_ranks(size, lambda group: text_of(build(group), group)) == [wanted] * size


def test_a_plan_of_nothing_but_a_source_is_told() -> None:
    assert text_of(links(None)).splitlines()[0] == "plan as written"


def test_a_number_is_told_where_it_is_used() -> None:
    rows = shop(None)
    text = text_of(rows.with_columns(part=col("price") / rows.sum("price")))
    assert "- with the number sum of: total sum = sum(price)" in text.replace('"', "")


# ---------------------------------------------------------------------- reasons


def loop_of(step: Callable[..., Any], **options: Any) -> str:
    start = dealt(None, page=np.arange(3), rank=np.ones(3))
    return text_of(ir.iterate(step, start, max_iterations=2, **{"key": "page", **options}))


def of_group(**how: Any) -> str:
    """The text of a loop that sends ranks along links, somehow."""
    rows: ir.Dataset = how.get("rows", links(None))
    aggregates = how.get("agg", {"heard": ir.sum("rank")})

    def step(ranks: ir.Dataset) -> ir.Dataset:
        sent = how.get("join", lambda a, b: a.join(b, src="page"))(rows, how.get("table", lambda r: r)(ranks))
        told = how.get("group", lambda s: s.group_by(page="dst"))(sent).agg(**aggregates)
        new = {"rank": col("heard").cast("float64").fill_null(0)}
        return ranks.select("page").left_join(told, on="page").select("page", **new)

    return loop_of(step)


def test_a_group_that_becomes_a_shuffle_of_indexed_rows_needs_no_reason() -> None:
    text = of_group()
    assert "no shuffle of indexed rows" not in text and "indexed by" in text


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"group": lambda s: s.group_by("src", page="dst")}, "it has several keys"),
        ({"agg": {"heard": ir.var("rank")}}, '"heard" is var, which indexed rows cannot fold'),
        ({"join": lambda a, b: a.left_join(b, src="page")}, "the join is a left join, not an inner one"),
        (
            {"group": lambda s: s.filter(col("rank") > col("dst")).group_by(page="dst")},
            "rows are filtered behind",
        ),
        ({"table": lambda r: r.union(r)}, 'is not known to have each "page" once'),
        ({"join": lambda a, b: b.join(b, on="page", suffix="2").with_columns(dst="page")}, "both sides"),
        ({"group": lambda s: s.group_by(page="src")}, "it groups by the column that is joined"),
        ({"group": lambda s: s.group_by(page=col("dst") + 1)}, 'its key "page" is computed'),
    ],
)
def test_why_a_group_is_no_shuffle_of_indexed_rows(how: dict[str, Any], reason: str) -> None:
    assert reason in of_group(**how)


def test_a_state_whose_rows_may_change_is_told_with_the_reason() -> None:
    text = loop_of(lambda ranks: ranks.filter(col("rank") > 0))
    assert '"state": kept by page; its rows may change: its rows are made anew by: filter (rank > 0)' in text


def test_what_depends_on_an_opaque_function_alone_is_told() -> None:
    def step(ranks: ir.Dataset) -> ir.Dataset:
        best = ranks.select("page").map_batches(same, columns={"page": int})
        more = links(None).map_batches(same, columns={"src": int, "dst": int}).group_by(page="src").count()
        return ranks.join(best, on="page", how="semi").join(more, on="page", how="semi")

    text = loop_of(step)
    assert "whose function is not declared pure (pure=True)" in text
    assert 'it depends on state "state": pure=True alone would not make it once' in text


# ---------------------------------------------------------------------- loops, runs, the command line


def test_a_loop_inside_a_loop_has_its_own_part() -> None:
    def step(ranks: ir.Dataset) -> ir.Dataset:
        half = ir.iterate(lambda r: r.with_columns(rank=col("rank") / 2), ranks, max_iterations=2, key="page")
        return half.with_columns(rank=col("rank") + 1)

    text = loop_of(step, name="outer")
    assert 'loop "' in text and "inner " in text


def test_a_loop_written_in_nouns_is_told_by_its_stages() -> None:
    count = ir.MapReduce(map=lambda rows: rows, reduce=ir.SUM, key="buyer")
    assert count(shop(None).select("buyer", "price")).explain().startswith('stages of loop "')


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_adds_rows_and_bytes_of_all_ranks_to_the_stages(size: int) -> None:
    def told(group: Group) -> str:
        return shop(group).group_by("buyer").agg(n=ir.count()).explain(group, run=True)

    text, *others = run_ranks(size, told)
    stage = next(line for line in text.splitlines() if "group #1: n = count of" in line)
    assert re.search(r"\[4 rows, ", stage) and ("B sent, " in stage) == (size > 1)
    assert all(other == text for other in others)


APP = """
import iterreduce as ir

@ir.app
def spent(orders: ir.Dataset):
    'What each buyer spent.'
    return orders.group_by("buyer").agg(spent=ir.sum("price"))
"""


def test_the_option_explain_prints_the_plan_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "spent.py").write_text(APP)
    (tmp_path / "orders.csv").write_text("buyer,price,note\n1,2,x\n")
    words = [sys.executable, "-m", "iterreduce", "spent.py", "orders.csv", "--explain", "--out", "spent.csv"]
    ran = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env=mpirun_environment({}), timeout=240
    )
    assert ran.returncode == 0 and ran.stderr == ""
    assert "prune columns: read orders.csv: only buyer, price" in ran.stdout
    assert "group by buyer: spent = sum" in ran.stdout and not (tmp_path / "spent.csv").exists()
