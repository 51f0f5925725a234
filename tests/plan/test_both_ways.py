"""Values along indexed rows one way, then back: tables that lack some keys of the other end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import Dataset, col
from iterreduce.testing import run_ranks

ROWS = np.random.default_rng(2).integers(0, 30, (2, 100))


def dealt(group: Any) -> Dataset:
    """The share of this rank."""
    src, dst = (np.array_split(column, group.size)[group.rank] for column in ROWS)
    return Dataset.from_local(group, src=src, dst=dst)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_hubs_and_authorities_are_those_of_the_matrix(ranks: int) -> None:
    def hubs(group: Any) -> dict[int, float]:
        edges = dealt(group)
        start = edges.vertices("src", "dst", name="v").with_columns(hub=ir.lit(1.0))

        def step(pages: Dataset) -> Dataset:
            known = edges.join(pages, src="v").group_by(v="dst").agg(authority=ir.sum("hub"))
            made = edges.join(known, dst="v").group_by(v="src").agg(hub=ir.sum("authority"))
            return (
                start.select("v")
                .left_join(made, "v")
                .select("v", hub=col("hub").fill_null(0) / made.sum("hub"))
            )

        plan = ir.iterate(step, start, max_iterations=20)
        stages = plan.to_loop(group).body[0].stages  # type: ignore[union-attr]
        assert not any(isinstance(stage, ir.Lookup) for stage in stages), "only values travel"
        found = plan.collect()
        return dict(zip(found["v"].tolist(), found["hub"].tolist(), strict=True))

    matrix = np.zeros((30, 30))
    np.add.at(matrix, tuple(ROWS), 1)
    hub = np.ones(30)
    for _ in range(20):
        hub = matrix @ (matrix.T @ hub)
        hub /= hub.sum()
    found = run_ranks(ranks, hubs)[0]
    assert max(abs(found[v] - hub[v]) for v in found) < 1e-12


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", ["count", "mean", "min", "any"])
def test_what_a_missing_key_would_add_is_not_added(ranks: int, kind: str) -> None:
    """Vertices that nobody points to have no row in the first group."""
    aggregator = {"count": ir.count(), "mean": ir.mean("a"), "min": ir.min("a"), "any": ir.any(col("a") > 3)}

    def job(group: Any) -> dict[int, Any]:
        edges = dealt(group)
        start = edges.vertices("src", "dst", name="v").with_columns(x=ir.lit(1.0))

        def step(pages: Dataset) -> Dataset:
            first = edges.join(pages, src="v").group_by(v="dst").agg(a=ir.sum("x"))
            then = edges.join(first, dst="v").group_by(v="src").agg(b=aggregator[kind])
            value = col("b").cast("float64").fill_null(-1)
            return start.select("v").left_join(then, "v").select("v", x=value)

        found = ir.iterate(step, start, max_iterations=1).collect()
        return dict(zip(found["v"].tolist(), found["x"].tolist(), strict=True))

    into = {v: float((ROWS[1] == v).sum()) for v in set(ROWS[1].tolist())}
    wanted = {}
    for v in set(ROWS.ravel().tolist()):
        reached = [into[d] for s, d in ROWS.T.tolist() if s == v]
        fold = {"count": len, "mean": np.mean, "min": min, "any": lambda a: any(x > 3 for x in a)}[kind]
        wanted[v] = float(fold(reached)) if reached else -1.0  # type: ignore[operator]
    found = run_ranks(ranks, job)[0]
    assert {v: round(x, 9) for v, x in found.items()} == {v: round(x, 9) for v, x in wanted.items()}
