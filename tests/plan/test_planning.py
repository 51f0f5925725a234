"""What a plan saves: invariants are computed and sent once, shared parts run once, and answers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.appfile import load_app
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.dataset import Dataset
from iterreduce.testing import run_ranks
from tests.engine.kit import rows_of


def _edges(group: Group) -> Dataset:
    random = np.random.default_rng(group.rank)
    return Dataset.from_local(group, src=random.integers(0, 40, 90), dst=random.integers(0, 40, 90))


def _ranks(group: Group) -> Any:
    edges = _edges(group)
    pages = edges.vertices()
    n = pages.count()
    degrees = edges.group_by("src").agg(degree=ir.count())

    def step(ranks: Any) -> Any:
        heard = edges.join(degrees, "src").join(ranks, src="vertex").group_by(vertex="dst")
        shares = heard.agg(heard=ir.sum(col("rank") / col("degree")))
        return ranks.left_join(shares, "vertex").select(
            "vertex", rank=0.15 / n + 0.85 * col("heard").fill_null(0.0)
        )

    return ir.iterate(step, pages.with_columns(rank=1.0 / n), max_iterations=6)


def test_without_caches_and_on_any_number_of_ranks_the_answer_is_the_same() -> None:
    def work(group: Group, naive: bool) -> dict[Any, Any]:
        return dict(rows_of(group, _ranks(group).run(group, naive=naive)))

    for size in (1, 3):
        fast, naive = (run_ranks(size, work, on)[0] for on in (False, True))
        assert fast.keys() == naive.keys()
        assert all(fast[k] == pytest.approx(naive[k], rel=1e-12) for k in fast)


def test_a_keyed_state_that_meets_invariants_of_its_key_moves_nothing_but_the_word_that_ends_iterations() -> (
    None
):
    def work(group: Group, joins: bool) -> list[int]:
        edges = _edges(group)
        start = edges.group_by("src").agg(x=ir.count())
        more = edges.group_by("src").agg(y=ir.max("dst"))

        def step(state: Any) -> Any:
            if not joins:
                return state.select("src", x=col("x") + 1)
            return state.left_join(more, "src").select("src", x=col("x") + col("y").fill_null(0) + 1)

        made = ir.iterate(step, start, max_iterations=4)
        return list(made.run(group).bytes_exchanged["per_iteration"])

    assert run_ranks(3, work, True) == run_ranks(3, work, False)


@pytest.mark.parametrize(("pure", "calls"), [(True, 1), (False, 4)])
def test_a_function_of_invariants_runs_once_if_it_is_pure_and_else_in_every_iteration(
    pure: bool, calls: int
) -> None:
    called = []

    def doubled(rows: Batch) -> Batch:
        called.append(len(rows))
        return rows.with_columns(dst=rows["dst"] * 2)

    def step(state: Any, edges: Dataset) -> Any:
        types = {"src": "int64", "dst": "int64"}
        more = edges.map_batches(doubled, columns=types, pure=pure).group_by("src").agg(y=ir.max("dst"))
        return state.left_join(more, "src").select("src", x=col("x") + col("y"))

    def work(group: Group) -> None:
        edges = _edges(group)
        start = edges.group_by("src").agg(x=ir.count())
        ir.iterate(lambda s: step(s, edges), start, max_iterations=4).run(group)

    run_ranks(1, work)
    assert len(called) == calls


def test_a_shared_part_of_a_plan_runs_once() -> None:
    called = []

    def seen(rows: Batch) -> Batch:
        called.append(len(rows))
        return rows

    def work(group: Group) -> int:
        rows = _edges(group).map_batches(seen, columns={"src": "int64", "dst": "int64"})
        both = rows.join(rows.group_by("src").agg(n=ir.count()), "src").filter(col("n") < rows.count())
        return len(both.union(both).collect())

    assert run_ranks(1, work)[0] == 180
    assert called == [90]


def test_what_sinks_of_the_ranks_is_summed_without_a_collective_of_its_own() -> None:
    """``1 - heard.sum()``: as many collectives in an iteration as where the sum stands before the shuffle."""
    src, dst = np.random.default_rng(0).integers(0, 800, (2, 6000))
    root = Path(__file__).parents[2]

    def collectives(group: Group, folder: str, iterations: int) -> int:
        mine = {"src": src[group.rank :: group.size], "dst": dst[group.rank :: group.size]}
        app = load_app(str(root / folder / "pagerank.py")).function
        before = group.traffic.collectives
        edges = Dataset.from_local(group, **mine)
        app(edges, tolerance=0.0, max_iterations=iterations).run(group)
        return group.traffic.collectives - before

    def work(group: Group) -> list[int]:
        folders = "apps", "benchmarks/waist"
        collectives(group, "apps", 2)  # a group's first run makes what others use again
        return [collectives(group, folder, 10) - collectives(group, folder, 6) for folder in folders]

    lazy, waist = run_ranks(2, work)[0]
    assert lazy == waist == 12
