"""Aggregators against NumPy and plain loops over the rows of each group."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.aggregators import (
    ALL,
    ANY,
    COLLECT,
    FIRST,
    LAST,
    MAX,
    MEAN,
    MIN,
    SUM,
    VAR,
    Aggregator,
    argmax,
    argmin,
    count,
    var,
)
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.schema import Field
from iterreduce.errors import SchemaError
from tests.columns.aggregator_oracle import (
    AGGREGATORS,
    NUMBERS,
    agree,
    field_like,
    fold,
    fold_apart,
    fresh,
    guarded,
    random_values,
    reference,
)


@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("kind", sorted(AGGREGATORS))
def test_every_aggregator_equals_numpy_group_by_group(kind, shape, nullable):
    rng = np.random.default_rng(len(kind) + len(shape))
    for dtype in NUMBERS:
        values = random_values(rng, dtype, shape, 60)
        if kind == "var" and dtype in ("int64", "uint64"):
            values = (values >> np.array(20, dtype)).astype(
                dtype
            )  # squares beyond 2**106 round in any method
        codes = np.concatenate([np.arange(6), rng.integers(0, 6, 54)]).astype(np.int32)
        valid = (rng.random(60) < 0.6) & (codes != 3) if nullable else None
        bound = AGGREGATORS[kind].bind(field_like(values, nullable))
        wanted = reference(kind, codes, values, 6, valid)
        assert bound.field_out == Field("fixed", wanted[0].dtype, shape, nullable)
        agree(fold(bound, codes, values, 6, valid), wanted, exact=kind not in ("sum", "mean", "var"))
        agree(
            fold_apart(bound, codes, values, 6, valid, cuts=(7, 7, 31)),
            wanted,
            exact=kind not in ("sum", "mean", "var"),
        )


CUTS = st.lists(st.integers(0, 40), max_size=4).map(sorted)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(AGGREGATORS)),
    dtype=st.sampled_from(["int64", "float64"]),
    width=st.sampled_from([(), (3,)]),
    nullable=st.booleans(),
    cuts=CUTS,
    seed=st.integers(0, 1000),
)
def test_cutting_the_rows_into_pieces_or_partials_changes_nothing(kind, dtype, width, nullable, cuts, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-50, 50, (40, *width)).astype(dtype)
    if dtype == "float64":
        values += rng.normal(size=values.shape)
        values[rng.random(values.shape) < 0.03] = np.nan
        values[rng.random(values.shape) < 0.03] = np.inf
    codes, valid = rng.integers(0, 5, 40), rng.random(40) < 0.7 if nullable else None
    bound = AGGREGATORS[kind].bind(field_like(values, nullable))
    whole = fold(bound, codes, values, 5, valid)
    agree(fold(bound, codes, values, 5, valid, cuts), whole)
    agree(fold_apart(bound, codes, values, 5, valid, cuts), whole, exact=kind not in ("sum", "mean", "var"))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from([*sorted(AGGREGATORS), "argmin", "argmax"]),
    nullable=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_merge_is_associative_and_has_an_identity(kind, nullable, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(30, 2))
    by = rng.integers(0, 4, 30).astype(float)
    arg = kind in ("argmin", "argmax")
    bound = (
        Aggregator(kind, "v", "by").bind(field_like(values, nullable), field_like(by))
        if arg
        else AGGREGATORS[kind].bind(field_like(values, nullable))
    )
    codes, valid = rng.integers(0, 3, 30), rng.random(30) < 0.5 if nullable else None

    def part(lo, hi):
        records = fresh(bound, 3)
        rows = (values[lo:hi], by[lo:hi]) if arg else values[lo:hi]
        bound.update(records, 1, codes[lo:hi], rows, None if valid is None else valid[lo:hi])
        return records

    def join(left, right):
        left = left.copy()
        bound.merge(left, 1, np.arange(3), right, 1)
        return left

    a, b, c, empty = part(0, 9), part(9, 21), part(21, 30), fresh(bound, 3)
    exact = kind not in ("sum", "mean", "var")
    agree(guarded(bound, join(join(a, b), c)), guarded(bound, join(a, join(b, c))), exact)
    np.testing.assert_array_equal(join(empty, a), a)
    np.testing.assert_array_equal(join(a, empty), a)


def test_records_of_no_rows_finish_as_the_identity_or_as_null():
    values = np.zeros((0, 2), np.int32)
    for aggregator, wanted in [
        (SUM, 0),
        (MIN, 2**31 - 1),
        (MAX, -(2**31)),
        (MEAN, np.nan),
        (VAR, np.nan),
        (FIRST, 0),
    ]:
        column, valid = guarded(b := aggregator.bind(field_like(values)), fresh(b, 2))
        np.testing.assert_array_equal(column, np.full((2, 2), wanted))
        assert valid is None
        column, valid = guarded(b := aggregator.bind(field_like(values, True)), fresh(b, 2))
        assert column.tolist() == [[0, 0], [0, 0]]
        assert valid.tolist() == [False, False]
    for aggregator, wanted in [(count("x"), [0, 0]), (ALL, [[True, True]] * 2), (ANY, [[False, False]] * 2)]:
        bound = aggregator.bind(field_like(values))
        assert guarded(bound, fresh(bound, 2))[0].tolist() == wanted


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_propagates_through_sum_min_max_mean_and_var_as_in_numpy(dtype):
    values = np.array([1, np.nan, 3, np.inf, -np.inf, 5, np.nan, -0.0], dtype)
    codes = np.array([0, 0, 0, 1, 1, 2, 3, 2])
    for aggregator in (SUM, MIN, MAX, MEAN, VAR):
        with np.errstate(invalid="ignore"):
            wanted = reference(aggregator.kind, codes, values, 4, None)
        agree(fold(aggregator.bind(field_like(values)), codes, values, 4), wanted)
        agree(fold_apart(aggregator.bind(field_like(values)), codes, values, 4, None, (2, 4)), wanted)


def test_nan_counts_as_true():
    values = np.array([np.nan, 0.0])
    assert fold(ANY.bind(field_like(values)), np.array([0, 1]), values, 2)[0].tolist() == [True, False]


def test_dates_have_minima_and_maxima_and_nat_propagates_as_in_numpy():
    values = np.array(["2020-01-01", "1969-05-05", "NaT", "2024-02-29", "1800-01-01"], "datetime64[s]")
    codes = np.array([0, 0, 1, 1, 2])
    for aggregator, spans in itertools.product((MIN, MAX, FIRST, LAST), (values, values - values[0])):
        wanted = reference(aggregator.kind, codes, spans, 3, None)
        agree(fold(aggregator.bind(field_like(spans)), codes, spans, 3), wanted)
        agree(fold_apart(aggregator.bind(field_like(spans)), codes, spans, 3, None, (1,)), wanted)


def test_complex_numbers_have_sums_and_means():
    rng = np.random.default_rng(0)
    for dtype, shape in itertools.product(["complex64", "complex128"], [(), (3,)]):
        values = (rng.normal(size=(20, *shape)) + 1j * rng.normal(size=(20, *shape))).astype(dtype)
        codes = rng.integers(0, 3, 20)
        agree(
            fold(SUM.bind(field_like(values)), codes, values, 3),
            reference("sum", codes, values, 3, None),
            exact=False,
        )
        wanted = np.array([values[codes == g].astype(complex).mean(axis=0) for g in range(3)])
        np.testing.assert_allclose(
            fold(MEAN.bind(field_like(values)), codes, values, 3)[0], wanted, rtol=1e-12
        )
        assert fold(ANY.bind(field_like(values)), codes, values, 3)[0].all()


def test_integer_sums_are_exact_in_64_bits_and_wrap_around_beyond():
    big = np.array([2**62, 2**62, 2**62 + 1], np.int64)
    assert fold(SUM.bind(field_like(big)), np.zeros(3, int), big, 1)[0].tolist() == [2**62 * 3 + 1 - 2**64]
    unsigned = np.array([2**63, 2**63 - 1], np.uint64)
    assert fold(SUM.bind(field_like(unsigned)), np.zeros(2, int), unsigned, 1)[0].tolist() == [2**64 - 1]
    small = np.full(1000, 127, np.int8)
    assert fold(SUM.bind(field_like(small)), np.zeros(1000, int), small, 1)[0].tolist() == [127_000]


def test_float32_is_accumulated_in_float64():
    values = np.full(1 << 20, np.float32(0.1))
    total = fold(SUM.bind(field_like(values)), np.zeros(1 << 20, int), values, 1)[0]
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, float(np.float32(0.1)) * (1 << 20), rtol=1e-12)


def test_variance_survives_a_large_mean_where_the_sum_of_squares_does_not():
    rng = np.random.default_rng(3)
    noise = rng.normal(size=10_000)
    values, codes = noise + 1e9, rng.integers(0, 4, 10_000)
    wanted = np.array([noise[codes == g].var() for g in range(4)])
    for cuts in [(), (1, 5000), tuple(range(10, 10_000, 10))]:
        got, _ = fold_apart(VAR.bind(field_like(values)), codes, values, 4, None, cuts)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    naive = (values**2).mean() - values.mean() ** 2
    assert abs(naive - noise.var()) > 1


def test_variance_with_ddof_divides_by_fewer_rows_and_is_nan_or_null_without_enough():
    values, codes = np.array([1.0, 2.0, 4.0, 9.0]), np.array([0, 0, 0, 1])
    assert fold(var("x", ddof=1).bind(field_like(values)), codes, values, 2)[0][0] == pytest.approx(7 / 3)
    assert np.isnan(fold(var("x", ddof=1).bind(field_like(values)), codes, values, 2)[0][1])
    column, valid = fold(var("x", ddof=1).bind(field_like(values, True)), codes, values, 2, np.ones(4, bool))
    assert (column[1], valid.tolist()) == (0.0, [True, False])


def test_counts_take_rows_or_rows_that_are_not_null():
    codes, valid = np.array([0, 2, 2, 2], np.int32), np.array([True, False, True, True])
    assert fold(count().bind(), codes, np.empty((4, 0)), 3)[0].tolist() == [1, 0, 3]
    bound = count("x").bind(Field("text", np.dtype("u1"), nullable=True))
    records = fresh(bound, 3)
    bound.update(records, 1, codes, None, valid)
    assert guarded(bound, records)[0].tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "int8", "uint64", "bool", "datetime64[s]"])
@pytest.mark.parametrize("aggregator", [argmin("v", by="k"), argmax("v", by="k")])
def test_argmin_takes_the_first_row_with_the_extreme_key(aggregator, dtype):
    rng = np.random.default_rng(5)
    if dtype == "bool" or dtype.startswith("float"):
        choices = np.array([0, 1, 0] if dtype == "bool" else [-np.inf, -2.5, 0, 3, np.inf], dtype)
    else:
        wide = np.iinfo("int64" if dtype.startswith("date") else dtype)
        choices = np.array(
            [wide.min + dtype.startswith("date"), 0, 1, 2, wide.max], "u8" if dtype == "uint64" else "i8"
        ).astype(dtype)
    by = rng.choice(choices, 50)
    codes, values = rng.integers(0, 8, 50), rng.integers(0, 1000, (50, 3)).astype(np.float32)
    bound = aggregator.bind(field_like(values), field_like(by))
    pick = np.argmin if aggregator.kind == "argmin" else np.argmax
    wanted = np.array([values[codes == g][pick(by[codes == g])] for g in range(8)])
    agree(fold(bound, codes, (values, by), 8), (wanted, None))
    agree(fold_apart(bound, codes, (values, by), 8, None, (10, 20, 40)), (wanted, None))


def test_argmin_and_argmax_lose_nan_keys_and_skip_nulls():
    by = np.array([np.nan, 5.0, np.inf, np.nan, np.nan, -0.0, 0.0, -np.inf])
    ids, codes = np.arange(8), np.array([0, 0, 0, 1, 1, 2, 2, 3])
    for aggregator, wanted in [(argmin("id", by="k"), [1, 3, 5, 7]), (argmax("id", by="k"), [2, 3, 5, 7])]:
        bound = aggregator.bind(field_like(ids), field_like(by))
        assert fold(bound, codes, (ids, by), 4)[0].tolist() == wanted
        assert fold_apart(bound, codes, (ids, by), 4, None, (1, 4))[0].tolist() == wanted
    bound = argmin("id", by="k").bind(field_like(ids), field_like(by, True))
    column, valid = fold(bound, codes, (ids, by), 4, ids % 2 == 0)
    assert column.tolist() == [2, 4, 6, 0]
    assert valid.tolist() == [True, True, True, False]
    dates = np.array(["NaT", "2020-01-01", "NaT"], "datetime64[D]")
    for aggregator in (argmin("id", by="k"), argmax("id", by="k")):
        bound = aggregator.bind(field_like(ids), field_like(dates))
        assert fold(bound, np.zeros(3, int), (ids[:3], dates), 1)[0].tolist() == [1]


@pytest.mark.parametrize("dtype", ["int8", "float16", "bool", "complex64", "complex128", "datetime64[us]"])
@pytest.mark.parametrize("shape", [(), (3,), (5, 2), (0,)])
def test_first_and_last_keep_the_bytes_of_any_fixed_type(dtype, shape):
    rng = np.random.default_rng(7)
    values = rng.integers(0, 2, (20, *shape)).astype(dtype)
    codes = np.concatenate([np.arange(4), rng.integers(0, 4, 16)])
    for aggregator in (FIRST, LAST):
        wanted = reference(aggregator.kind, codes, values, 4, None)
        agree(fold(aggregator.bind(field_like(values)), codes, values, 4), wanted)
        agree(fold_apart(aggregator.bind(field_like(values)), codes, values, 4, None, (3, 9)), wanted)


def test_strided_read_only_and_fortran_columns_give_the_same_results():
    rng = np.random.default_rng(8)
    base = rng.normal(size=(40, 6))
    columns = [base[::2, 0], base[::2, 1:4], np.asfortranarray(base[:20]), base[::-2]]
    codes = rng.integers(0, 3, 20).astype(np.int32)
    for values, aggregator in itertools.product(columns, (SUM, MIN, MEAN, VAR, FIRST)):
        solid = np.ascontiguousarray(values).copy()
        wanted = fold(aggregator.bind(field_like(solid)), codes, solid, 3)
        solid.flags.writeable = False
        agree(fold(aggregator.bind(field_like(values)), codes, values, 3), wanted)
        agree(fold(aggregator.bind(field_like(values)), codes, solid, 3), wanted)


def groups_of(codes, groups):
    """(order, offsets), as a stable counting sort gives them."""
    order = np.argsort(codes, kind="stable").astype(np.int64)
    return order, np.searchsorted(codes[order], np.arange(groups + 1)).astype(np.int64)


def test_collect_lists_the_values_of_each_group_in_order_without_nulls():
    codes, values = np.array([2, 0, 2, 0, 2]), np.array([10, 11, 12, 13, 14], np.int16)
    bound = COLLECT.bind(field_like(values, True))
    assert bound.words is None
    column, valid = bound.collect(values, *groups_of(codes, 4))
    assert [row.tolist() for row in column.to_list()] == [[11, 13], [], [10, 12, 14], []]
    assert (valid, column.values.dtype) == (None, np.dtype("int16"))
    column, _ = bound.collect(values, *groups_of(codes, 4), np.array([True, False, False, True, True]))
    assert [row.tolist() for row in column.to_list()] == [[13], [], [10, 14], []]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.text(max_size=4), st.integers(-3, 3), st.booleans()), max_size=12
    )
)
def test_text_is_picked_by_position_bytes_or_another_column(rows):
    texts = Ragged.from_list([t for _, t, _, _ in rows] or [""]).slice(0, len(rows))
    codes, by = np.array([r[0] for r in rows], int), np.array([r[2] for r in rows], np.int64)
    valid = np.array([r[3] for r in rows], bool)
    text, key = Field("text", np.dtype("u1"), nullable=True), Field("fixed", np.dtype("i8"))
    pickers = {
        FIRST: lambda group: group[0][1],
        LAST: lambda group: group[-1][1],
        MIN: lambda group: min((r[1] for r in group), key=str.encode),
        MAX: lambda group: max((r[1] for r in group), key=str.encode),
        argmin("t", by="k"): lambda group: min(group, key=lambda r: r[2])[1],
        argmax("t", by="k"): lambda group: max(group, key=lambda r: r[2])[1],
    }
    for aggregator, pick in pickers.items():
        bound = aggregator.bind(text, *([key] if aggregator.by else []))
        assert bound.words is None
        column, found = bound.collect((texts, by) if aggregator.by else texts, *groups_of(codes, 4), valid)
        groups = [[r for r in rows if r[0] == g and r[3]] for g in range(4)]
        assert found.tolist() == [bool(group) for group in groups]
        assert column.to_list() == [pick(group) if group else "" for group in groups]


def test_collect_gives_for_every_aggregator_what_update_gives():
    rng = np.random.default_rng(11)
    values, codes = rng.normal(size=(30, 2)), rng.integers(0, 5, 30)
    for aggregator in AGGREGATORS.values():
        bound = aggregator.bind(field_like(values, True))
        valid = rng.random(30) < 0.5
        agree(bound.collect(values, *groups_of(codes, 5), valid), fold(bound, codes, values, 5, valid))


def test_uncombined_aggregators_refuse_records():
    bound = COLLECT.bind(Field("fixed", np.dtype("i8")))
    with pytest.raises(SchemaError, match="use collect"):
        bound.finish(np.zeros((1, 1), np.int64), 0)
    with pytest.raises(SchemaError, match="use collect"):
        bound.merge(np.zeros((1, 1), np.int64), 0, np.zeros(1, int), np.zeros((1, 1), np.int64), 0)


def test_a_mask_with_nulls_on_a_column_declared_without_is_refused():
    values, codes = np.arange(3.0), np.zeros(3, int)
    for aggregator in (SUM, MEAN, VAR, FIRST):
        bound = aggregator.bind(field_like(values))
        assert fold(bound, codes, values, 1, np.ones(3, bool))[1] is None
        with pytest.raises(SchemaError, match="nullable=True"):
            fold(bound, codes, values, 1, np.array([True, False, True]))
