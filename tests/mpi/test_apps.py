"""The apps on real ranks, against scikit-learn and NumPy, and an error that all ranks meet alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.collectives import Group
from tests.launch import ROOT

pytestmark = pytest.mark.mpi


def app(name: str) -> Any:
    return load_app(str(ROOT / "apps" / f"{name}.py")).function


@pytest.fixture
def folder(group: Group, tmp_path: Path) -> Path:
    """Rank 0's, on all ranks."""
    return Path(group.bcast_bytes(str(tmp_path).encode()).decode())


def test_seeds_of_k_means_plus_plus_are_those_of_one_rank(group: Group) -> None:
    x = np.random.default_rng(2).normal(size=(900, 4))
    mine = np.array_split(x, group.size)[group.rank]
    options: dict[str, Any] = {"k": 6, "seed": 3, "start": "k-means++", "max_iterations": 5}
    spread = app("kmeans")(ir.Dataset.from_local(group, x=mine), **options).run(group)
    alone = app("kmeans")(ir.Dataset.from_local(None, x=x), **options).run()
    np.testing.assert_allclose(spread["x"], alone["x"], rtol=0, atol=1e-12)


def test_weights_of_logistic_regression_are_numpys(group: Group) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-2048, 2049, (1500, 4)) / 1024
    y = (rng.random(1500) < 1 / (1 + np.exp(-x.sum(axis=1)))).astype(np.int64)
    mine = np.array_split(np.arange(1500), group.size)[group.rank]
    rows = ir.Dataset.from_local(group, x=x[mine], y=y[mine])
    result = app("logistic_regression")(rows, rate=0.5, tolerance=0.0, max_iterations=30).run(group)
    w, b = np.zeros(4), 0.0
    for _ in range(30):
        residual = 1 / (1 + np.exp(-(x @ w + b))) - y
        w, b = w - 0.5 * (x.T @ residual) / 1500, b - 0.5 * residual.mean()
    np.testing.assert_allclose(result["weight"], [*w, b], rtol=1e-12)
    assert len(set(group.allgather_bytes(result["weight"].tobytes()))) == 1


def test_an_error_of_one_rank_is_raised_on_all_and_the_group_lives_on(group: Group) -> None:
    y = np.zeros(20)
    if group.rank == group.size - 1:
        y[7] = 3
    rows = ir.Dataset.from_local(group, x=np.zeros((20, 2)), y=y)
    with pytest.raises(ir.InputError, match=rf"row {20 * (group.size - 1) + 7} has the label y=3.0"):
        app("logistic_regression")(rows).run(group)
    assert group.agree_max(group.rank) == group.size - 1
