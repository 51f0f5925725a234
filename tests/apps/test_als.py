"""Alternating least squares, written lazily: one user after the other with NumPy, and what travels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.apps.kit import solved, verify
from tests.waist import kit
from tests.waist.kit import NAMES, graph, named, random_graph


@pytest.mark.parametrize("kind", NAMES)
def test_factors_are_those_of_one_user_after_the_other(kind: str, ranks: int) -> None:
    ratings = named(random_graph(25, 200, seed=ranks), NAMES[kind])
    if kind == "small numbers":
        ratings = ratings.with_columns(weight=ratings["weight"] / 3)
    _, rows = solved("als", ranks, ratings, rank=3, iterations=4)
    assert verify("als", rows, ratings, rank=3, iterations=4) < 1e-9


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_may_have_no_ratings(ranks: int) -> None:
    ratings = graph(np.array([0, 2, 0]), np.array([1, 1, 3]), weight=np.array([3, 1, 4]))
    _, rows = solved("als", ranks, ratings, rank=2, iterations=2)
    assert verify("als", rows, ratings, rank=2, iterations=2) < 1e-9
    _, ours = kit.solved("als", ranks, ratings, rank=2, iterations=2)
    assert len(ours) == len(rows)


def test_items_have_factors_too() -> None:
    ratings = random_graph(25, 200)
    _, rows = solved("als", 2, ratings, rank=3, iterations=2, result="dst")
    assert set(rows["dst"].tolist()) == set(ratings["dst"].tolist())


@pytest.mark.parametrize("ranks", [2, 5])
def test_only_factors_travel(ranks: int) -> None:
    ratings = random_graph(40, 900)
    lazy, _ = solved("als", ranks, ratings, rank=3, iterations=5)
    waist, _ = kit.solved("als", ranks, ratings, rank=3, iterations=5)
    for ours, theirs in zip(lazy.bytes_exchanged["per_iteration"][1:],
                            waist.bytes_exchanged["per_iteration"][1:], strict=True):  # fmt: skip
        assert ours <= theirs + 8 * ranks  # a word of control more
