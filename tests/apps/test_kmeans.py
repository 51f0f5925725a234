"""The k-means app: against scikit-learn, NumPy, and answers that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.datasets import load_digits

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.testing import run_ranks
from tests.launch import ROOT

APP = load_app(str(ROOT / "apps" / "kmeans.py")).function


def save(path: Path, x: Any) -> str:
    np.save(path, np.asarray(x))
    return str(path)


def cluster(points: str, ranks: int = 1, **options: Any) -> ir.Result:
    """What rank 0 has at the end; all ranks have the same bits."""

    def work(group: ir.Group) -> ir.Result:
        given = {k: ir.read(v) if k == "init" else v for k, v in options.items()}
        return APP(ir.read(points), **given).run(group)

    results = run_ranks(ranks, work)
    assert len({(r.outcome, r.iterations, r["x"].tobytes()) for r in results}) == 1
    return results[0]


def direct_inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    """Each point to each centroid, one by one."""
    return sum(float(((point - centroids) ** 2).sum(axis=1).min()) for point in x)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Any]:
    """scikit-learn's digits, a start that empties no cluster, and what scikit-learn makes of it."""
    x = load_digits().data
    start, _ = kmeans_plusplus(x, 10, random_state=0)
    folder = tmp_path_factory.mktemp("digits")
    rival = KMeans(10, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(x)
    return save(folder / "digits.npy", x), save(folder / "start.npy", start), rival


def test_digits_are_clustered_as_by_scikit_learn(digits: tuple[str, str, Any], ranks: int) -> None:
    points, start, rival = digits
    result = cluster(points, ranks, init=start, tolerance=0.0, max_iterations=300)
    np.testing.assert_allclose(result["x"], rival.cluster_centers_, rtol=0, atol=1e-9)
    assert result.outcome is ir.Outcome.CONVERGED and result.residual == 0
    assert result.values["inertia"] == pytest.approx(rival.inertia_, rel=1e-12)
    assert result.values["points"] == 1797


def test_inertia_is_the_sum_over_points(digits: tuple[str, str, Any]) -> None:
    result = cluster(digits[0], 3, k=7, seed=5)
    expected = direct_inertia(np.load(digits[0]), result["x"])
    assert result.values["inertia"] == pytest.approx(expected, rel=1e-12)


def test_four_points_meet_in_two_iterations_and_the_third_confirms(tmp_path: Path, ranks: int) -> None:
    points, start = save(tmp_path / "points.npy", [0.0, 1, 10, 11]), save(tmp_path / "start.npy", [0.0, 1])
    result = cluster(points, ranks, init=start, tolerance=0.0)
    assert result["x"].tolist() == [[0.5], [10.5]]
    assert (result.iterations, result.outcome, result.residual) == (3, ir.Outcome.CONVERGED, 0.0)
    assert result.values == {"inertia": 1.0, "points": 4}
    second = cluster(points, ranks, init=start, tolerance=0.0, max_iterations=2)
    assert second["x"].tolist() == [[0.5], [10.5]] and second.outcome is ir.Outcome.ITERATIONS_USED


def test_a_centroid_without_points_stays_where_it_is(tmp_path: Path, ranks: int) -> None:
    points = save(tmp_path / "points.npy", [[0.0, 0], [2, 0], [10, 0], [12, 0]])
    start = save(tmp_path / "start.npy", [[500.0, 500], [1, 0], [-300, 7], [11, 0]])
    result = cluster(points, ranks, init=start, tolerance=0.0)
    assert result["x"].tolist() == [[500, 500], [1, 0], [-300, 7], [11, 0]]
    assert result.values["inertia"] == 4.0


def test_a_cluster_that_loses_its_points_and_one_that_gains_its_first(tmp_path: Path) -> None:
    """The set of clusters that have points changes from iteration to iteration, and differs between ranks."""
    x = np.array([0.0, 3, 3, 5, 8, 10, 12, 27, 28, 37])[:, None]
    start = np.array([15.0, 16, 38, 40])[:, None]
    expected, labels = start.copy(), []
    for _ in range(20):
        label = np.abs(x - expected.T).argmin(axis=1)
        labels.append(set(label.tolist()))
        for c in labels[-1]:
            expected[c] = x[label == c].mean()
    assert labels[:2] == [{0, 1, 2}, {0, 1, 3}]
    points, init = save(tmp_path / "points.npy", x), save(tmp_path / "start.npy", start)
    for ranks in (1, 2, 3, 8):
        result = cluster(points, ranks, init=init, tolerance=0.0)
        np.testing.assert_allclose(result["x"], expected, rtol=1e-15)


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_as_many_clusters_as_points_find_every_point(tmp_path: Path, ranks: int, start: str) -> None:
    x = np.random.default_rng(3).normal(size=(13, 2))
    result = cluster(save(tmp_path / "points.npy", x), ranks, k=13, start=start)
    assert sorted(result["x"].tolist()) == sorted(x.tolist())
    assert result.values["inertia"] == 0


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_points_that_are_all_the_same_are_one_cluster(tmp_path: Path, ranks: int, start: str) -> None:
    points = save(tmp_path / "points.npy", np.full((20, 3), 0.1))
    result = cluster(points, ranks, k=4, start=start)
    np.testing.assert_allclose(result["x"], np.full((4, 3), 0.1), rtol=1e-15)
    assert result.values["inertia"] == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_more_ranks_than_points_give_the_same_centroids(tmp_path: Path, start: str) -> None:
    points = save(tmp_path / "points.npy", np.random.default_rng(4).normal(size=(3, 2)))
    assert (
        cluster(points, 8, k=2, start=start)["x"].tolist()
        == cluster(points, 1, k=2, start=start)["x"].tolist()
    )


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_a_seed_gives_the_same_start_on_any_number_of_ranks(
    digits: tuple[str, str, Any], ranks: int, start: str
) -> None:
    one = cluster(digits[0], 1, k=10, seed=8, start=start, max_iterations=25)
    many = cluster(digits[0], ranks, k=10, seed=8, start=start, max_iterations=25)
    assert many.iterations == one.iterations
    np.testing.assert_allclose(many["x"], one["x"], rtol=0, atol=1e-9)
    other = cluster(digits[0], ranks, k=10, seed=9, start=start, max_iterations=25)
    assert not np.allclose(other["x"], one["x"])


def test_seeds_of_k_means_plus_plus_are_points_drawn_by_their_squared_distance(tmp_path: Path) -> None:
    """Points 0, 1 and 3: the pair of seeds has a known distribution."""
    from scipy.stats import chisquare

    points = save(tmp_path / "points.npy", [0.0, 1, 3])
    pairs = [(0, 1), (0, 3), (1, 3)]
    chance = {(0, 1): 1 / 10 + 1 / 5, (0, 3): 9 / 10 + 9 / 13, (1, 3): 4 / 5 + 4 / 13}
    runs = 400
    found = []
    for seed in range(runs):
        # one step from seeds that are points themselves: the third point joins its nearest seed
        seeds = module().plus_plus(ir.read(points).as_matrix("x"), 2, seed).run()["x"].ravel()
        found.append(tuple(sorted(seeds.astype(int).tolist())))
    counts = [found.count(pair) for pair in pairs]
    assert sum(counts) == runs
    assert chisquare(counts, [runs * chance[pair] / 3 for pair in pairs]).pvalue > 1e-4


def module() -> Any:
    import sys

    return sys.modules[APP.__module__]


def test_k_means_plus_plus_starts_better_than_random(tmp_path: Path) -> None:
    """Far groups of very unequal sizes: seeds in every group, which random points miss."""
    rng = np.random.default_rng(0)
    sizes = [2000, 20, 20, 20, 20]
    x = np.concatenate([rng.normal(100 * i, 1, (n, 2)) for i, n in enumerate(sizes)])
    points = save(tmp_path / "points.npy", x)
    best = direct_inertia(x, np.array([part.mean(axis=0) for part in np.split(x, np.cumsum(sizes)[:-1])]))
    for seed in range(3):
        assert cluster(points, 2, k=5, seed=seed, start="k-means++").values["inertia"] < 1.0001 * best
    assert cluster(points, 2, k=5, seed=0).values["inertia"] > 10 * best


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_points_may_be_of_any_type_of_number(tmp_path: Path, dtype: type) -> None:
    x = np.random.default_rng(5).integers(0, 200, (300, 3))
    plain, other = save(tmp_path / "f8.npy", x.astype(float)), save(tmp_path / "other.npy", x.astype(dtype))
    for start in ("random", "k-means++"):
        expected = cluster(plain, 2, k=5, seed=1, start=start)["x"]
        found = cluster(other, 2, k=5, seed=1, start=start)["x"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_columns_of_a_table_are_the_dimensions(tmp_path: Path) -> None:
    x = np.random.default_rng(6).normal(size=(200, 3))
    np.savetxt(tmp_path / "points.csv", x, "%.17g", ",", header="x,y,z", comments="")
    found = cluster(str(tmp_path / "points.csv"), 2, k=3, seed=2)
    expected = cluster(save(tmp_path / "points.npy", x), 2, k=3, seed=2)
    np.testing.assert_allclose(np.sort(found["x"], axis=0).sum(), np.sort(expected["x"], axis=0).sum())
    assert found["x"].shape == (3, 3)


def test_the_result_is_a_start_that_is_already_there(digits: tuple[str, str, Any], tmp_path: Path) -> None:
    first = cluster(digits[0], 2, k=4, tolerance=0.0, max_iterations=300)
    again = cluster(digits[0], 2, init=save(tmp_path / "c.npy", first["x"]), tolerance=1e-9)
    assert again.iterations == 1
    np.testing.assert_allclose(again["x"], first["x"], atol=1e-9)
