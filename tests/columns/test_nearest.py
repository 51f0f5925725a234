"""nearest: labels are those of the float64 definition, to the bit, whatever float32 makes of the data."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal as assert_equal

import iterreduce.columns.nearest as module
from iterreduce.columns import nearest_kernels as kernels
from iterreduce.columns.nearest import nearest
from iterreduce.errors import SchemaError

SHAPES = [
    (5000, 16, 64),
    (3000, 64, 256),
    (700, 2, 3),
    (513, 1, 5),
    (511, 50, 2),
    (100, 100, 300),
    (600, 3, 600),
]
RNG_SEEDS = st.integers(0, 2**32 - 1)


def defined_distances(points, centroids):
    """Squared distances of all rows to all centroids by the definition: columns added in order, float64."""
    x, c = points.astype(np.float64), centroids.astype(np.float64)
    total = np.zeros((len(x), len(c)))
    with np.errstate(all="ignore"):
        for i in range(x.shape[1]):
            total = total + (x[:, i, None] - c[None, :, i]) ** 2
    return total


def defined_labels(points, centroids):
    total = defined_distances(points, centroids)
    return np.where(np.isnan(total), np.inf, total).argmin(axis=1)


def assert_as_defined(points, centroids):
    expected = defined_labels(points, centroids)
    assert_equal(nearest(points, centroids), expected)
    labels, distances = nearest(points, centroids, distance=True)
    assert_equal(labels, expected)
    every = defined_distances(points, centroids)
    assert_equal(distances, every[np.arange(len(points)), expected])


def scored(points, centroids):
    """How many rows the float32 scores left undecided (all, where there are no scores)."""
    scratch = module.Scratch().fitting(*centroids.shape)
    return module._score_all(points, centroids, scratch, np.empty(len(points), np.int64))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_labels_of_clouds_equal_the_definition_and_few_rows_are_computed_twice(n, d, k, dtype):
    rng = np.random.default_rng(n)
    centroids = rng.normal(size=(k, d)) * 3
    points = (centroids[rng.integers(0, k, n)] + rng.normal(size=(n, d))).astype(dtype)
    assert_as_defined(points, centroids)
    assert scored(points, centroids) <= n / 50


@pytest.mark.parametrize("d", [3, 64])
def test_both_float32_paths_agree_with_an_independent_library(d):
    from sklearn.metrics import pairwise_distances_argmin

    rng = np.random.default_rng(3)
    points, centroids = rng.normal(size=(4000, d)), rng.normal(size=(40, d))
    assert_equal(nearest(points, centroids), pairwise_distances_argmin(points, centroids))


def test_the_two_float32_paths_leave_the_same_kind_of_rows_undecided(monkeypatch):
    rng = np.random.default_rng(4)
    points, centroids = rng.normal(size=(3000, 20)), rng.normal(size=(30, 20))
    expected = defined_labels(points, centroids)
    for border in (0, 1000):
        monkeypatch.setattr(module, "BLAS_COLUMNS", border)
        monkeypatch.setattr(module, "_scratch", module.Scratch())
        assert_equal(nearest(points, centroids), expected)


@st.composite
def near_ties(draw):
    """Points on, or a few bits beside, the middle between two centroids; any scale and offset."""
    rng = np.random.default_rng(draw(RNG_SEEDS))
    d, k, n = draw(st.sampled_from([1, 2, 5, 16, 64])), draw(st.integers(2, 9)), 300
    centroids = rng.normal(size=(k, d)) if draw(st.booleans()) else rng.integers(-3, 4, (k, d)).astype(float)
    a, b = centroids[rng.integers(0, k, n)], centroids[rng.integers(0, k, n)]
    beside = 10.0 ** rng.uniform(-18, -1, (n, 1)) * rng.normal(size=(n, d))
    points = (a + b) / 2 + draw(st.sampled_from([0.0, 1.0, 1e3])) * beside
    scale = 10.0 ** draw(st.sampled_from([-300, -150, -40, -20, 0, 0, 0, 20, 40, 150, 300]))
    offset = draw(st.sampled_from([0.0, 0.0, 1.0, 1e4, 1e8])) * scale
    dtype = draw(st.sampled_from([np.float64, np.float64, np.float32]))
    with np.errstate(all="ignore"):
        return (points * scale + offset).astype(dtype), centroids * scale + offset


@settings(max_examples=50, deadline=None)
@given(near_ties())
def test_labels_of_near_ties_equal_the_definition(data):
    assert_as_defined(*data)


@settings(max_examples=30, deadline=None)
@given(RNG_SEEDS, st.sampled_from([1, 3, 17, 64]), st.integers(1, 20))
@example(0, 64, 20)
def test_a_gap_above_the_bound_is_never_wrong_where_magnitudes_differ_wildly(seed, d, k):
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-12, 12, (k, 1)) * 10.0 ** rng.uniform(-3, 3, (1, d))
    centroids = rng.normal(size=(k, d)) * sizes
    points = centroids[rng.integers(0, k, 400)] * rng.uniform(-2, 2, (400, 1)) + rng.normal(size=(400, d))
    assert_as_defined(points, centroids)


@settings(max_examples=30, deadline=None)
@given(RNG_SEEDS, st.sampled_from([2, 16, 64]), st.floats(-25, 25), st.sampled_from([0.0, 1e3, 1e7]))
def test_scores_are_within_the_proven_error(seed, d, exponent, offset):
    rng = np.random.default_rng(seed)
    k, n = 12, kernels.TILE
    centroids = (rng.normal(size=(k, d)) + offset) * 10.0**exponent
    points = (rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-2, 4, (n, 1)) + offset) * 10.0**exponent
    s = module.Scratch().fitting(k, d)
    scale, spread = kernels.prepare(centroids, s.shift, s.coefficients, s.constants)
    kernels.load(points, s.shift, scale, s.tile)
    tile = s.tile.reshape(-1, kernels.STRIDE)[:, :n]
    score = (s.coefficients @ tile).astype(np.float32) + s.constants[:, None]
    wide = np.longdouble  # 64 bits of mantissa: exact enough to judge float32
    y, z = ((each.astype(wide) - s.shift.astype(wide)) * wide(scale) for each in (points, centroids))
    exact = (z**2).sum(axis=1)[:, None] - 2 * z @ y.T
    gamma = (d + 4) * 2.0**-24 / (1 - (d + 4) * 2.0**-24)
    bound = gamma * (spread**2 + 2 * np.sqrt((y**2).sum(axis=1)) * spread)
    assert (np.abs(score[:k].astype(wide) - exact) <= bound[None, :]).all()


def test_more_columns_than_the_bound_allows_are_compared_in_float64():
    rng = np.random.default_rng(9)
    points, centroids = rng.normal(size=(20, 16_001)), rng.normal(size=(3, 16_001))
    assert scored(points, centroids) == 20
    assert_as_defined(points, centroids)


def test_ties_go_to_the_smallest_number():
    grid = np.array([[x, y] for x in range(8) for y in range(8)], float)
    halves = grid[:-9] + 0.5
    assert_as_defined(halves, grid)
    assert nearest(np.array([[0.5, 0.5]]), grid).tolist() == [0]


@pytest.mark.parametrize("d", [2, 64])
def test_of_equal_centroids_the_first_is_chosen(d):
    rng = np.random.default_rng(0)
    once = rng.normal(size=(10, d))
    centroids = np.concatenate([once, once, once[:3]])
    points = rng.normal(size=(1000, d))
    assert_equal(nearest(points, centroids), defined_labels(points, once))
    assert nearest(points, np.ones((5, d))).tolist() == [0] * 1000


def test_points_far_from_the_origin_are_still_scored_in_float32():
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(64, 64)) * 3 + 1e7
    points = centroids[rng.integers(0, 64, 4000)] + rng.normal(size=(4000, 64))
    assert scored(points, centroids) < 40
    assert_as_defined(points, centroids)


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e-20, 1e20, 1e40, 1e140])
def test_the_unit_of_the_data_does_not_matter(scale):
    rng = np.random.default_rng(0)
    points, centroids = rng.normal(size=(1000, 64)) * scale, rng.normal(size=(20, 64)) * scale
    assert_as_defined(points, centroids)
    if 1e-100 < scale < 1e100:
        assert scored(points, centroids) < 20


@pytest.mark.parametrize("d", [1, 64])
def test_rows_without_a_finite_distance_get_label_0_and_centroids_that_are_not_finite_are_never_chosen(d):
    rng = np.random.default_rng(1)
    points, centroids = rng.normal(size=(600, d)), rng.normal(size=(9, d))
    points[3], points[5], points[7, 0], points[599] = np.nan, np.inf, -np.inf, 1e300
    centroids[0], centroids[4, 0] = np.nan, np.inf
    labels = nearest(points, centroids)
    assert_equal(labels, defined_labels(points, centroids))
    assert labels[[3, 5, 7]].tolist() == [0, 0, 0] and not (np.delete(labels, [3, 5, 7, 599]) == 0).any()
    assert nearest(points, np.full((4, d), np.nan)).tolist() == [0] * 600


def test_a_label_does_not_depend_on_the_block_its_row_comes_in():
    rng = np.random.default_rng(2)
    centroids = rng.integers(-2, 3, (50, 64)) / 2
    points = rng.integers(-4, 5, (2000, 64)) / 4
    whole = nearest(points, centroids)
    for rows in (1, 7, 512, 700):
        parts = [nearest(points[lo : lo + rows], centroids) for lo in range(0, 2000, rows)]
        assert_equal(np.concatenate(parts), whole)


def test_odd_layouts_are_taken():
    rng = np.random.default_rng(5)
    points, centroids = rng.normal(size=(700, 6)), rng.normal(size=(8, 6))
    expected = defined_labels(points, centroids)
    frozen = points.copy()
    frozen.flags.writeable = False
    strided = np.repeat(np.repeat(points, 2, axis=0), 2, axis=1)
    for odd in (np.asfortranarray(points), strided[::2, ::2], frozen):
        assert_equal(nearest(odd, np.asfortranarray(centroids)), expected)
    rounded = centroids.astype(np.float32)
    assert_equal(nearest(points, rounded), defined_labels(points, rounded))
    line = nearest(points[:, 0], centroids[:, 0])
    assert_equal(line, defined_labels(points[:, :1], centroids[:, :1]))
    assert nearest(points[:0], centroids).shape == (0,)
    assert nearest(np.empty((4, 0)), np.empty((2, 0))).tolist() == [0, 0, 0, 0]


def test_threads_do_not_share_buffers():
    rng = np.random.default_rng(6)
    shapes = ((4, 9), (64, 20), (4, 9), (60, 8))
    jobs = [(rng.normal(size=(20_000, d)), rng.normal(size=(k, d))) for d, k in shapes]
    results = [None] * len(jobs)

    def work(i):
        results[i] = [nearest(*jobs[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (points, centroids), labels in zip(jobs, results, strict=True):
        expected = nearest(points, centroids)
        assert all(np.array_equal(each, expected) for each in labels)


@pytest.mark.parametrize(
    ("points", "centroids", "said"),
    [
        (np.zeros((3, 2), int), np.zeros((1, 2)), "points: wanted float64 or float32"),
        (np.zeros((3, 2)), np.zeros((1, 3)), "points have 2 dimensions, centroids 3"),
        (np.zeros((3, 2)), np.zeros((0, 2)), "no centroids"),
        ([[1.0]], np.zeros((1, 1)), "got list"),
    ],
)
def test_arguments_that_do_not_fit_are_named(points, centroids, said):
    with pytest.raises(SchemaError, match=said):
        nearest(points, centroids)
