"""A loop inside a loop at the waist: k-means for several k, against the same in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.testing import run_ranks
from tests.waist.kit import dealt, program, solved, verify


@pytest.mark.parametrize("centers", [2, 3, 5])
def test_the_best_of_several_k_is_numpys(centers: int, ranks: int) -> None:
    rng = np.random.default_rng(centers)
    at = 40 * rng.permutation(centers)[:, None] + rng.normal(size=(centers, 2))
    x = np.repeat(at, 60, axis=0) + rng.normal(size=(60 * centers, 2))
    points = ir.Batch(x=x[rng.permutation(len(x))])
    drawn = run_ranks(ranks, lambda group: dealt(points, group).sample(6, 1).collect(group))[0]["x"]
    result, _ = solved("nested", ranks, points, most=6, seed=1)
    assert result.iterations == 5 and result.everywhere
    assert verify("nested", result.batch, points["x"], drawn) == len(result["x"])


def test_a_wrong_range_of_k_is_refused() -> None:
    with pytest.raises(ir.UsageError, match="2 <= least <= most"):
        program("nested")(ir.Dataset.from_local(None, x=np.zeros((9, 2))), least=4, most=3)
