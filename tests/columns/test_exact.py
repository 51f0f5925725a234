"""Order-free sums: the same bits however rows are cut, permuted and merged, and near to exact ones."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import binned
from iterreduce.columns.aggregators import COUNT, MAX, MEAN, MIN, SUM, VAR, bind_outputs
from iterreduce.columns.batch import Batch
from iterreduce.columns.exact import sum_scalars
from iterreduce.columns.groups import Fold
from iterreduce.columns.schema import Field
from iterreduce.columns.superaccumulator import exact_sum
from iterreduce.columns.threads import Pool, using
from tests.columns.aggregator_oracle import field_like, fold, fold_apart

FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)
FINITE = st.floats(min_value=-1e300, max_value=1e300, width=64)
COLUMN = Field("fixed", np.dtype(np.float64))


def ill_conditioned(n, seed, low=-20, high=20):
    """Both signs of magnitudes from 10**low to 10**high; nearly all of it cancels."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=n // 2) * 10.0 ** rng.uniform(low, high, n // 2)
    small = rng.normal(size=n - 2 * (n // 2) + 3) * 10.0**low
    return rng.permutation(np.concatenate([half, -half, small]))


def exact(values):
    """The true sum, as a fraction."""
    return sum(map(Fraction, np.asarray(values, np.float64).ravel().tolist()), Fraction(0))


def nearest(value):
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # a fraction so large is no float to copy a sign from


def folded(aggregator, values, codes=None, groups=1, pieces=1, seed=0):
    """Shuffled, cut, folded apart, merged in a random order; the finished column."""
    rng = np.random.default_rng(seed)
    bound = aggregator.bind(field_like(values))
    codes = np.zeros(len(values), np.int64) if codes is None else codes
    whole = np.zeros((groups, bound.words), np.int64)
    bound.fill(whole, 0)
    parts = np.array_split(rng.permutation(len(values)), pieces)
    for part in [parts[p] for p in rng.permutation(pieces)]:
        records = np.empty((groups, bound.words), np.int64)
        bound.fill(records, 0)
        for some in np.array_split(part, rng.integers(1, 4)):
            bound.update(records, 0, codes[some], values[some])
        slots = rng.permutation(groups)
        bound.merge(whole, 0, slots, records[slots], 0)
    return bound.finish(whole, 0)[0]


@settings(max_examples=50, deadline=None)
@given(st.lists(FLOATS, max_size=40), st.randoms(use_true_random=False))
def test_an_exact_sum_is_that_of_fsum_in_any_order(values, random):
    try:
        wanted = math.fsum(values)
    except OverflowError:  # fsum gives up on intermediate overflow; we round the true sum
        finite = all(map(math.isfinite, values))
        wanted = nearest(exact(values)) if finite else sum(v for v in values if not math.isfinite(v))
    except ValueError:  # infinity minus infinity
        wanted = math.nan
    shuffled = random.sample(values, len(values))
    np.testing.assert_equal(exact_sum(np.array(shuffled, np.float64)), wanted)


@pytest.mark.parametrize("seed", range(4))
def test_an_exact_sum_of_an_ill_conditioned_list_is_that_of_fsum(seed):
    values = ill_conditioned(5000, seed, -300, 290)
    assert exact_sum(values) == math.fsum(values)
    assert folded(SUM.order_free(alone=True), values, pieces=5)[0] == math.fsum(values)


def test_the_sum_of_squares_that_a_plain_sum_gets_wrong():
    squares = np.arange(1, 1_000_001, dtype=np.float64) ** 2
    assert exact_sum(squares) == 333333833333500032
    assert folded(SUM.order_free(), squares, pieces=3)[0] == 333333833333500032


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], 0.0),
        ([-0.0, -0.0], 0.0),
        ([np.inf, -1e308], np.inf),
        ([-np.inf, 1e308, 5.0], -np.inf),
        ([np.inf, -np.inf], np.nan),
        ([np.nan, 1.0], np.nan),
        ([1e308, 1e308], np.inf),
        ([1e308, 1e308, -1e308, -1e308, 3e-300], 3e-300),
        ([-1.7e308] * 3, -np.inf),
        ([5e-324] * 3, 1.5e-323),
        ([2.2250738585072014e-308, -5e-324], 2.225073858507201e-308),
        ([1.0, 2.0**-53, 2.0**-105], 1.0000000000000002),
        ([0.1], 0.1),
        ([np.finfo(float).max], np.finfo(float).max),
    ],
)
def test_edges_of_float64(values, wanted, alone):
    values = np.array(values, np.float64)
    if 3e-300 in values or 2.0**-105 in values:
        alone = True  # beyond what a group's three limbs keep beside the largest
    for pieces in (1, 2):
        np.testing.assert_equal(folded(SUM.order_free(alone), values, pieces=pieces, seed=pieces)[0], wanted)


@settings(max_examples=50, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=60))
def test_a_sum_of_a_group_is_within_its_bound(values):
    n, largest = len(values), max(map(abs, values))
    found, true = float(folded(SUM.order_free(), np.array(values), pieces=2)[0]), exact(values)
    bound = Fraction(n) * Fraction(largest) / 2**54
    nearest_error = (abs(true) + bound) / 2**53 + Fraction(1, 2**1075)
    assert math.isinf(found) or abs(Fraction(found) - true) <= bound + nearest_error
    if n == 1:
        assert found == values[0], "one value is its own sum"


@settings(max_examples=50, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40), st.integers(0, 2**31), st.integers(2, 5))
def test_results_have_the_same_bits_in_any_order_and_any_cut(values, seed, pieces):
    column = np.array(values, np.float64)
    for aggregator in (SUM, MEAN, MIN, MAX, VAR):
        free = aggregator.order_free()
        once = folded(free, column)
        again = folded(free, column, pieces=pieces, seed=seed)
        assert once.tobytes() == again.tobytes(), aggregator


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "complex128", "complex64"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_groups_of_many_magnitudes_are_each_summed_on_their_own_grid(dtype, shape):
    rng = np.random.default_rng(3)
    n, groups = 3000, 7
    codes = rng.integers(0, groups, n)
    values = rng.normal(size=(n, *shape)) * 10.0 ** rng.uniform(-3, 3, (n, *shape))
    if dtype not in ("float16", "float32", "complex64"):
        values = values * (10.0 ** (6.0 * np.arange(groups) - 20))[codes].reshape(-1, *[1] * len(shape))
    values = values.astype(dtype) * (1 + 0.5j if dtype.startswith("c") else 1)
    found = {
        folded(SUM.order_free(), values, codes, groups, pieces, pieces).tobytes() for pieces in (1, 3, 40)
    }
    assert len(found) == 1
    sums = folded(SUM.order_free(), values, codes, groups)
    for g in range(groups):
        of = values[codes == g].reshape(int((codes == g).sum()), -1)
        parts = [(part, np.asarray(getattr(sums[g], part)).ravel()) for part in ("real", "imag")]
        for part, got in parts[: 2 if dtype.startswith("c") else 1]:
            wanted = [math.fsum(getattr(of[:, j], part)) for j in range(of.shape[1])]
            np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=float(np.abs(of).max()) * 1e-13)


@pytest.mark.parametrize("width", [1, 2, 5, 16])
@pytest.mark.parametrize("groups", [1, 3, 600])
def test_all_kernels_give_the_same_words(width, groups):
    """Rows that are few per record, and many, go through different loops."""
    rng = np.random.default_rng(width * groups)
    n = 1300
    values = rng.normal(size=(n, width)) * 10.0 ** rng.uniform(-30, 30, (n, width))
    values[rng.integers(0, n, 5), 0] = [0.0, 1e300, 1e-310, -1e299, -0.0]
    values = values[:, 0] if width == 1 else values
    codes = rng.integers(0, groups, n)
    bound = SUM.order_free().bind(field_like(values))
    at_once, one_by_one = np.zeros((2, groups, bound.words), np.int64)
    bound.update(at_once, 0, codes, values)
    for i in rng.permutation(n):
        bound.update(one_by_one, 0, codes[i : i + 1], values[i : i + 1])
    np.testing.assert_array_equal(at_once, one_by_one)


@given(st.integers(0, 2**32), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_sums_that_are_packed_on_their_way_have_the_same_words(seed, groups):
    rng = np.random.default_rng(seed)
    n = 8 * groups + int(rng.integers(0, 4000))
    values = rng.normal(size=n) * 2.0 ** rng.choice([0, 0, 0, -5, -28, -60, 3, 30, 57, 110], n)
    few = rng.random(n) < rng.choice([0, 0.002])
    values[few] = rng.choice(
        [0.0, -0.0, 5e-324, -1e-310, 1e308, np.inf, -np.inf, np.nan, 2.0**-27], few.sum()
    )
    codes = np.minimum(rng.geometric(rng.choice([0.02, 0.9]), n) - 1, groups - 1).astype(np.int32)
    wanted, found = np.zeros((2, groups, 4), np.int64)
    binned.sum_binned(wanted, 1, codes, values)
    order = rng.permutation(n)
    sum_scalars(found, 1, codes[order], values[order])
    assert np.array_equal(found, wanted)
    sum_scalars(found, 1, codes, values)  # on top of what is held
    binned.sum_binned(wanted, 1, codes[order], values[order])
    assert np.array_equal(found, wanted)


@given(st.integers(0, 2**32), st.integers(1, 400), st.sampled_from([1, 982_451_653]), st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_rows_folded_by_key_have_the_words_of_rows_added_one_by_one(seed, groups, spread_keys, threads):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 20_000))
    values = rng.normal(size=n) * 2.0 ** rng.choice(
        [[0, 0, 0, -30, 40], [0] * 5, [-60, 60, 0, 0, 0]][seed % 3], n
    )
    values[rng.random(n) < rng.choice([0, 0.001, 0.6])] = rng.choice([0.0, 1e300, -np.inf, 2.0**-23])
    codes = np.minimum(rng.geometric(rng.choice([0.005, 0.9]), n), groups)
    wanted = np.zeros((groups + 1, 3), np.int64)
    for code, value in zip(codes[:300], values[:300], strict=True):
        binned.put(wanted, np.uint64(code), np.uint64(0), np.uint64(1), 3, value)
    binned.sum_binned(wanted, 0, codes[300:], values[300:])
    rows, first = Batch(k=codes * spread_keys, x=values), int(rng.integers(0, n + 1))
    fold = Fold(rows.select("k").schema, bind_outputs({"x": SUM.order_free()}, ["k"], rows.schema))
    with Pool(threads) as pool, using(pool):
        fold.add(rows.slice(0, first))
        fold.add(rows.slice(first, n))
        made = fold.result()
    found = made.keys["k"] // spread_keys
    assert np.array_equal(np.sort(found), np.unique(codes))
    assert np.array_equal(made.records, wanted[found])


def test_means_and_counts_and_nulls_are_those_of_the_plain_aggregators():
    rng = np.random.default_rng(5)
    n, groups = 500, 9
    codes, valid = rng.integers(0, groups - 1, n), rng.random(n) < 0.7
    values = rng.normal(size=(n, 2))
    for aggregator in (SUM, MEAN, VAR, MIN, MAX):
        field = field_like(values, nullable=True)
        plain, free = aggregator.bind(field), aggregator.order_free().bind(field)
        for way in (fold, fold_apart):
            wanted, wanted_valid = way(plain, codes, values, groups, valid, (100, 350))
            found, found_valid = way(free, codes, values, groups, valid, (100, 350))
            np.testing.assert_array_equal(found_valid, wanted_valid)
            np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e8, -1e12])
def test_a_variance_far_from_zero_is_as_good_as_its_values(offset):
    rng = np.random.default_rng(7)
    values = rng.normal(size=4000) + offset
    fractions = [Fraction(v) for v in values.tolist()]
    mean = sum(fractions) / len(fractions)
    wanted = float(sum((v - mean) ** 2 for v in fractions) / (len(fractions) - 1))
    found = folded(replace(VAR.order_free(), ddof=1), values, pieces=4)[0]
    bound = 1e-15 + len(values) * 2.0**-80 * float(np.max(values**2)) / wanted
    assert abs(found - wanted) <= bound * wanted


def test_a_variance_of_equal_values_is_zero_and_of_too_few_not_a_number():
    assert folded(VAR.order_free(), np.full(9, 0.1))[0] == 0
    assert np.isnan(folded(VAR.order_free(), np.empty(0))[0])
    assert np.isnan(folded(VAR.order_free(), np.array([1.0, np.inf]))[0])
    assert np.isinf(folded(VAR.order_free(), np.array([1e200, -1e200]))[0])


def test_extremes_order_the_two_zeros_and_know_one_nan():
    zeros = np.array([0.0, -0.0, 0.0])
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        assert np.signbit(folded(MIN.order_free(), zeros[order])[0])
        assert not np.signbit(folded(MAX.order_free(), zeros[order])[0])
    odd = np.array([0x7FF8000000000123, 0xFFF8000000000456], np.uint64).view(np.float64)
    for aggregator in (MIN, MAX):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            made = folded(aggregator.order_free(), np.concatenate([odd, [1.0]]))
        assert made.tobytes() == np.array([np.nan]).tobytes()
    for dtype in ("float32", "float16"):
        column = np.array([3, -1, 2], dtype)
        assert folded(MIN.order_free(), column)[0] == -1
        assert folded(MAX.order_free(), column).dtype == dtype


def test_integers_keep_their_plain_sums():
    column = np.array([2**62, 5, -3])
    assert SUM.order_free().bind(field_like(column)).words == 1
    assert folded(SUM.order_free(), column)[0] == 2**62 + 2
    assert COUNT.order_free().bind(COLUMN).words == 1


@pytest.mark.parametrize("keys", ["dense", "sparse", "pairs"])
def test_a_combiner_gives_the_same_records_in_any_order_of_rows(keys):
    rng = np.random.default_rng(11)
    n = 20_000
    key = rng.integers(0, 3000, n) * (1 if keys == "dense" else 982451653)
    x = rng.normal(size=n) * 10.0 ** rng.uniform(-25, 25, n)
    columns = {"k": key, "x": x} | ({"l": key % 7} if keys == "pairs" else {})
    names = ["k", "l"] if keys == "pairs" else ["k"]
    rows = Batch(**columns)
    outputs = bind_outputs({"x": SUM.order_free()}, names, rows.schema)
    schema = rows.select(*names).schema
    whole, records = Fold(schema, outputs), set()
    whole.add(rows)
    records.add(whole.result().records.tobytes())
    for parts in (2, 5):
        merged, order = Fold(schema, outputs), rng.permutation(n)
        for part in np.array_split(order, parts):
            one = Fold(schema, outputs)
            one.add(rows.take(part))
            merged.merge(one.result())
        records.add(merged.result().records.tobytes())
    assert len(records) == 1
    folded_ = whole.result()
    sums = outputs[0].bound.finish(folded_.records, 0)[0]
    some = rng.integers(0, len(sums), 50)
    for i in some:
        of = x[key == folded_.keys["k"][i]]
        assert abs(sums[i] - math.fsum(of)) <= len(of) * 2.0**-53 * np.abs(of).max()


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("spread_keys", [1, 982451653])
def test_threads_give_the_records_of_one(threads, spread_keys):
    rng = np.random.default_rng(13)
    n = 50_000
    key = rng.integers(0, 4000, n) * spread_keys
    key[-1] = 5_000 * spread_keys  # out of the range that addresses begin with
    rows = Batch(k=key, x=rng.normal(size=n) * 10.0 ** rng.uniform(-25, 25, n))
    outputs = bind_outputs({"x": SUM.order_free()}, ["k"], rows.schema)
    schema = rows.select("k").schema

    def records(first):
        fold = Fold(schema, outputs)
        fold.add(rows.slice(0, first))
        fold.add(rows.slice(first, n))
        return fold.result().records.tobytes()

    alone = records(n)
    for first in (100, 20_000, n):
        with Pool(threads) as pool, using(pool):
            assert records(first) == alone
