"""Groups and joins whose sizes are known from how often each key stands on either side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.testing import run_ranks
from tests.plan.kit import RANKS

N, GROUPS = 1003, 7


def dealt(group: Group, **columns: Any) -> Dataset:
    """The share of this rank."""
    return Dataset.from_local(
        group, **{n: np.array_split(c, group.size)[group.rank] for n, c in columns.items()}
    )


@pytest.mark.parametrize("ranks", RANKS)
def test_a_count_by_remainder_is_the_number_of_rows_with_it(ranks: int) -> None:
    def work(group: Group) -> dict[int, int]:
        found = dealt(group, a=np.arange(N) % GROUPS).group_by("a").count().to_numpy(group)
        return dict(zip(found["a"].tolist(), found["count"].tolist(), strict=True))

    assert run_ranks(ranks, work)[0] == {a: -(-(N - a) // GROUPS) for a in range(GROUPS)}


@pytest.mark.parametrize("ranks", RANKS)
def test_groups_of_nothing_but_null_count_0(ranks: int) -> None:
    def work(group: Group) -> dict[int, int]:
        rows = dealt(group, a=np.arange(12) % 3, b=np.arange(12))
        b = ir.when(ir.col("a") > 0).then(ir.col("b"))
        found = rows.with_columns(b=b).group_by("a").agg(n=ir.count("b")).to_numpy(group)
        return dict(zip(found["a"].tolist(), found["n"].tolist(), strict=True))

    assert run_ranks(ranks, work)[0] == {0: 0, 1: 4, 2: 4}


LEFT = {0: 0, 1: 1, 2: 3, 3: 2, 4: 0, 5: 40}  # how often each key stands
RIGHT = {0: 2, 1: 1, 2: 0, 3: 5, 4: 0, 5: 9}
NULLS = 3  # rows without a key, on either side
BOTH = sum(LEFT[k] * RIGHT[k] for k in LEFT)
LEFT_ALONE = sum(n for k, n in LEFT.items() if not RIGHT[k]) + NULLS
RIGHT_ALONE = sum(n for k, n in RIGHT.items() if not LEFT[k]) + NULLS
ROWS = {
    "inner": BOTH,
    "left": BOTH + LEFT_ALONE,
    "right": BOTH + RIGHT_ALONE,
    "full": BOTH + LEFT_ALONE + RIGHT_ALONE,
    "semi": sum(n for k, n in LEFT.items() if RIGHT[k]),
    "anti": LEFT_ALONE,
}


def keys(times: dict[int, int]) -> Any:
    """Each key so often, and some nulls, shuffled."""
    drawn = np.concatenate([np.repeat(list(times), list(times.values())), np.full(NULLS, -1)])
    drawn = np.random.default_rng(1).permutation(drawn)
    return np.ma.masked_array(drawn, drawn < 0)


def side(group: Group, times: dict[int, int], name: str) -> Dataset:
    drawn = keys(times)
    return dealt(group, k=drawn, **{name: np.arange(len(drawn))})


@pytest.mark.parametrize("ranks", RANKS)
def test_joins_have_as_many_rows_as_the_products_of_multiplicities(ranks: int) -> None:
    def work(group: Group) -> dict[str, int]:
        left, right = side(group, LEFT, "x"), side(group, RIGHT, "y")
        return {how: int(left.join(right, on="k", how=how).count()) for how in ROWS}

    assert run_ranks(ranks, work)[0] == ROWS


@pytest.mark.parametrize("ranks", RANKS)
def test_joins_have_as_many_nulls_as_rows_without_a_partner(ranks: int) -> None:
    def work(group: Group) -> list[int]:
        left, right = side(group, LEFT, "x"), side(group, RIGHT, "y")
        full = left.join(right, on="k", how="full")
        return [int(full.filter(ir.col(name).is_null()).count()) for name in ("x", "y", "k")]

    assert run_ranks(ranks, work)[0] == [RIGHT_ALONE, LEFT_ALONE, 2 * NULLS]
