"""k-means on scikit-learn's digits, on real ranks. Not collected in an environment without scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.datasets import load_digits

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


def test_digits_are_clustered_as_by_scikit_learn(group: Group, folder: Path) -> None:
    x = load_digits().data
    start, _ = kmeans_plusplus(x, 10, random_state=0)  # empties no cluster
    if group.rank == 0:
        np.save(folder / "digits.npy", x)
        np.save(folder / "start.npy", start)
    group.barrier()
    points, init = ir.read(str(folder / "digits.npy")), ir.read(str(folder / "start.npy"))
    result = app("kmeans")(points, init=init, tolerance=0.0, max_iterations=300).run(group)
    rival = KMeans(10, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(x)
    np.testing.assert_allclose(result["x"], rival.cluster_centers_, rtol=0, atol=1e-9)
    assert result.values["inertia"] == pytest.approx(rival.inertia_, rel=1e-12)
    assert len(set(group.allgather_bytes(result["x"].tobytes()))) == 1
