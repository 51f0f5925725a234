"""Delta iterations whose end does not depend on the order of improvements settle; others go step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import col
from iterreduce.loop import Shuffle, stages_of
from iterreduce.testing import run_ranks

ROADS = ir.Batch(
    src=np.array([0, 0, 1, 2, 3, 4]), dst=np.array([1, 2, 3, 3, 4, 0]), w=np.array([7, 2, 1, 4, 1, 1])
)


def ways(value: Callable[[Any], Any], first: Any = 0.0, merge: Any = ir.MIN, **options: Any) -> ir.Dataset:
    """From vertex 0, along roads; ``value(changes)`` is what is told."""
    roads = ir.Dataset.from_local(**dict(ROADS._columns))
    here = roads.vertices().select("vertex", far=ir.where(col("vertex") == 0, first, first + 99))

    def step(changes: ir.Dataset) -> ir.Dataset:
        told = roads.join(changes, src="vertex")
        smallest = ir.min if merge is ir.MIN else ir.max
        return told.group_by(vertex="dst").agg(far=smallest(value(changes)))

    start = here.filter(col("vertex") == 0)
    return ir.iterate_changes(step, here, merge={"far": merge}, changes=start, key="vertex", **options)


def settles(dataset: ir.Dataset) -> bool:
    return any(isinstance(stage, Shuffle) and stage.settle for stage in stages_of(dataset.to_loop()))


@pytest.mark.parametrize("first", [0, 0.5])
def test_lengths_that_add_up_settle(first: Any) -> None:
    made = ways(lambda _: col("far") + col("w"), first)
    assert settles(made) and "until no row improves" in made.explain()
    found = made.run()
    want = {0: first, 1: 7 + first, 2: 2 + first, 3: 6 + first, 4: 7 + first}
    assert dict(zip(found.batch["vertex"].tolist(), found.batch["far"].tolist(), strict=True)) == want
    assert found.iterations == 1


STEP_BY_STEP: dict[str, ir.Dataset] = {
    "with a limit of iterations": ways(lambda _: col("far") + col("w"), max_iterations=3),
    "where larger is told as smaller": ways(lambda _: 9 - col("far")),
    "where it is not known": ways(lambda _: col("far") * col("w")),
    "of another type": ways(lambda _: (col("far") + col("w")).cast(np.int32), np.int32(0)),
    "whatever improved": ways(lambda _: col("w") + 0.0),
}


@pytest.mark.parametrize("name", STEP_BY_STEP)
def test_step_by_step_only_what_improves_comes_out(name: str) -> None:
    made, fits = STEP_BY_STEP[name], name != "of another type"  # which indexed rows cannot fold
    assert not settles(made) and ("where it improves" in made.explain()) == fits
    shuffles = [s for s in stages_of(made.to_loop()) if isinstance(s, Shuffle) and s.touched]
    assert [s.improves for s in shuffles] == [True] * fits


def test_values_computed_on_the_way_are_no_values_of_the_state() -> None:
    roads = ir.Dataset.from_local(**dict(ROADS._columns))
    here = roads.vertices().select("vertex", far=ir.where(col("vertex") == 0, 0, 99))

    def step(changes: ir.Dataset) -> ir.Dataset:
        told = roads.join(changes.select("vertex", far=col("far") + 1), src="vertex")
        return told.group_by(vertex="dst").agg(far=ir.min("far"))

    start = here.filter(col("vertex") == 0)
    made = ir.iterate_changes(step, here, merge={"far": ir.MIN}, changes=start, key="vertex")
    found = made.to_numpy()
    assert dict(zip(found["vertex"].tolist(), found["far"].tolist(), strict=True)) == {
        0: 0,
        1: 1,
        2: 1,
        3: 2,
        4: 3,
    }


def test_results_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    rng = np.random.default_rng(2)
    edges = ir.Batch(src=rng.integers(0, 50, 160), dst=rng.integers(0, 50, 160), w=rng.random(160))

    def job(group: Any) -> Any:
        n = len(edges)
        mine = edges.slice(n * group.rank // group.size, n * (group.rank + 1) // group.size)
        roads = ir.Dataset.from_local(None, **dict(mine._columns))
        here = roads.vertices().select("vertex", far=ir.where(col("vertex") == 0, 0.0, np.inf))

        def step(changes: ir.Dataset) -> ir.Dataset:
            told = roads.join(changes, src="vertex")
            return told.group_by(vertex="dst").agg(far=ir.min(col("far") + col("w")))

        start = here.filter(col("vertex") == 0)
        made = ir.iterate_changes(step, here, merge={"far": ir.MIN}, changes=start, key="vertex")
        return made.run(group).result_sha256

    assert run_ranks(ranks, job) == [run_ranks(1, job)[0]] * ranks
