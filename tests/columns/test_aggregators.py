"""Aggregators against NumPy and plain loops over the rows of each group."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.aggregators import (
    ALL,
    ANY,
    COLLECT,
    COUNT,
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
    bind_outputs,
    collect,
    count,
    mean,
    sum_,
    var,
)
from iterreduce.columns.batch import Batch
from iterreduce.columns.laws import check_laws
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import SchemaError, UsageError

GUARD = 0x5A5A5A5A5A5A5A5A
NUMBERS = ["bool", "int8", "int32", "int64", "uint8", "uint64", "float16", "float32", "float64"]
WORDS = {"i8": "int64", "u8": "uint64", "f8": "float64"}


def field_like(values, nullable=False):
    return Field("fixed", values.dtype, values.shape[1:], nullable)


def fresh(bound, groups):
    """Records with a guard word on either side of the accumulator."""
    records = np.full((groups, bound.words + 2), GUARD, np.int64)
    bound.fill(records, 1)
    return records


def guarded(bound, records):
    assert (records[:, 0] == GUARD).all(), "a fold wrote in front of its words"
    assert (records[:, -1] == GUARD).all(), "a fold wrote behind its words"
    return bound.finish(records, 1)


def cut(values, lo, hi):
    return tuple(v[lo:hi] for v in values) if isinstance(values, tuple) else values[lo:hi]


def fold(bound, codes, values, groups, valid=None, cuts=()):
    """All rows in one record array, in pieces."""
    records, ends = fresh(bound, groups), [0, *cuts, len(codes)]
    for lo, hi in itertools.pairwise(ends):
        mask = None if valid is None else valid[lo:hi]
        bound.update(records, 1, codes[lo:hi], cut(values, lo, hi), mask)
    return guarded(bound, records)


def fold_apart(bound, codes, values, groups, valid=None, cuts=()):
    """Each piece in records of its own, with slots in reverse; then merged in order."""
    whole, ends = fresh(bound, groups), [0, *cuts, len(codes)]
    slots = np.arange(groups)[::-1].copy()
    for lo, hi in itertools.pairwise(ends):
        part = np.full((groups, bound.words + 1), GUARD, np.int64)
        bound.fill(part, 0)
        mask = None if valid is None else valid[lo:hi]
        bound.update(part, 0, codes[lo:hi], cut(values, lo, hi), mask)
        bound.merge(whole, 1, slots, part[::-1].copy(), 0)
    return guarded(bound, whole)


def agree(got, wanted, exact=True):
    (column, valid), (other, other_valid) = got, wanted
    assert column.dtype == other.dtype
    assert column.shape == other.shape
    assert (valid is None) == (other_valid is None)
    if valid is not None:
        np.testing.assert_array_equal(valid, other_valid)
    if exact or column.dtype.kind not in "fc":
        np.testing.assert_array_equal(column, other)
    else:
        np.testing.assert_allclose(column, other, rtol=1e-12, atol=1e-300)


# The oracle: one group at a time, with NumPy's own function.
def reference_sum(rows):
    out = {"b": np.int64, "i": np.int64, "u": np.uint64, "f": np.float64, "c": np.complex128}[rows.dtype.kind]
    return rows.astype(out).sum(axis=0)


ORACLE = {
    "sum": reference_sum,
    "min": lambda rows: rows.min(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "mean": lambda rows: rows.astype(np.float64).mean(axis=0),
    "var": lambda rows: rows.astype(np.float64).var(axis=0),
    "any": lambda rows: rows.astype(bool).any(axis=0),
    "all": lambda rows: rows.astype(bool).all(axis=0),
    "first": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
}
AGGREGATORS = {a.kind: a for a in (SUM, MIN, MAX, MEAN, VAR, ANY, ALL, FIRST, LAST)}


def reference(kind, codes, values, groups, valid):
    """Group by group; (column, valid) with zeros under the nulls."""
    keep = np.ones(len(codes), bool) if valid is None else valid
    rows = [values[(codes == g) & keep] for g in range(groups)]
    found = np.array([len(r) > 0 for r in rows])
    sample = np.asarray(ORACLE[kind](values[:1]))
    column = np.zeros((groups, *sample.shape), sample.dtype)
    for g in np.flatnonzero(found):
        column[g] = ORACLE[kind](rows[g])
    return column, None if valid is None else found


def random_values(rng, dtype, shape, rows):
    if dtype == "bool":
        return rng.random((rows, *shape)) < 0.7
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(size=(rows, *shape)).astype(dtype)
    info = np.iinfo(kind)
    return rng.integers(info.min, info.max, (rows, *shape), kind, endpoint=True)


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


SCHEMA = Schema(
    {
        "key": Field("fixed", np.dtype("i8")),
        "x": Field("fixed", np.dtype("f4"), (2,), True),
        "name": Field("text", np.dtype("u1")),
        "when": Field("fixed", np.dtype("M8[s]")),
    }
)


def outputs(reduce, keys=("key",), schema=SCHEMA):
    return [
        (o.name, o.inputs, o.bound.field_out.describe()) for o in bind_outputs(reduce, list(keys), schema)
    ]


def test_one_aggregator_stands_for_all_columns_but_the_keys():
    narrow = Schema({n: SCHEMA[n] for n in ("key", "x")})
    assert outputs(SUM, schema=narrow) == [("x", ("x",), "float64[2]?")]
    assert outputs(COUNT) == [("count", (), "int64")]
    assert outputs(sum_("x")) == [("x", ("x",), "float64[2]?")]
    assert outputs(argmin(by="when"))[1:] == [
        ("name", ("name", "when"), "text"),
        ("when", ("when", "when"), "datetime64[s]"),
    ]


def test_a_mapping_names_results_and_an_aggregator_without_column_reads_its_namesake():
    reduce = {
        "x": MEAN,
        "n": count(),
        "valid": count("x"),
        "who": argmax("name", by="when"),
        "all": collect("key"),
    }
    assert outputs(reduce, keys=()) == [
        ("x", ("x",), "float64[2]?"),
        ("n", (), "int64"),
        ("valid", ("x",), "int64"),
        ("who", ("name", "when"), "text"),
        ("all", ("key",), "list of int64"),
    ]


def test_an_output_reads_its_columns_and_the_rows_where_all_are_valid():
    rows = Batch.from_dict(
        {"v": np.arange(3), "k": np.arange(3.0)},
        {"v": np.array([True, True, False]), "k": np.array([False, True, True])},
    )
    least, number, total = bind_outputs(
        {"a": argmin("v", by="k"), "n": COUNT, "s": sum_("v")}, [], rows.schema
    )
    (value, by), valid = least.read(rows)
    assert (value is rows["v"], by is rows["k"], valid.tolist()) == (True, True, [False, True, False])
    assert number.read(rows) == (None, None)
    assert total.read(rows)[0] is rows["v"]
    assert total.read(rows)[1] is rows.valid("v")


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ({"s": sum_("nam")}, 'no column "nam".*did you mean "name"'),
        ({"nmae": SUM}, 'no column "nmae".*did you mean "name"'),
        ({"s": sum_("name")}, 'column "name": sum of text: sum takes numbers and bools'),
        (SUM, 'column "name": sum of text'),
        ({"s": mean("when")}, r"mean of datetime64\[s\].*astype"),
        ({"s": collect("x")}, 'column "x": collect of float32'),
        ({"s": argmin("name", by="x")}, r"argmin by float32\[2\]\?: wanted one value per row"),
        ({"s": argmin("name", by="name")}, "argmin of text: argmin takes real numbers"),
        ({"key": count()}, '"key" has the name of a key'),
        ({"s": sum}, 'result column "s": sum is not an aggregator'),
        (max, "max is not an aggregator"),
        ({"s": "sum"}, "'sum' is not an aggregator"),
    ],
)
def test_what_does_not_fit_is_said_by_name(reduce, message):
    with pytest.raises(UsageError, match=message):
        bind_outputs(reduce, ["key"], SCHEMA)


def test_nothing_to_sum_is_an_error_and_binding_without_columns_too():
    with pytest.raises(SchemaError, match="nothing to sum: all columns"):
        bind_outputs(SUM, ["key"], Schema({"key": SCHEMA["key"]}))
    with pytest.raises(UsageError, match="sum needs a column"):
        SUM.bind()
    with pytest.raises(UsageError, match="needs the column to compare by"):
        Aggregator("argmin", "x").bind(SCHEMA["key"])


def keep_moments(acc, value):
    acc[0] += 1
    acc[1] += value


def join_moments(acc, other):
    acc[0] += other[0]
    acc[1] += other[1]


def divide(acc):
    return acc[1] / acc[0] if acc[0] else 0.0


def test_a_defined_aggregator_is_compiled_and_equals_the_built_in_one():
    average = Aggregator.define("average", (0, 0), keep_moments, join_moments, divide)
    values, codes = np.random.default_rng(1).normal(size=50), np.arange(50) % 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = average.bind(field_like(values, True))
    assert bound.words == 3
    valid = codes > 0
    wanted = fold(MEAN.bind(field_like(values, True)), codes, values, 4, valid)
    agree(fold(bound, codes, values, 4, valid, (7, 20)), wanted)
    agree(fold_apart(bound, codes.astype(np.int32), values, 4, valid, (7, 20)), wanted, exact=False)
    check_laws(average, values)


def test_what_numba_cannot_compile_runs_as_python_and_says_so_once():
    seen = {}

    def update(acc, value):
        acc[0] += seen.setdefault(int(value), value)

    def merge(acc, other):
        acc[0] += other[0]

    strange = Aggregator.define("strange", 0, update, merge, dtype=np.int64)
    values, codes = np.arange(10), np.arange(10) % 3
    with pytest.warns(RuntimeWarning, match="'strange' could not be compiled and runs as plain Python"):
        bound = strange.bind(field_like(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strange.bind(field_like(values, True))
        strange.bind(field_like(values.astype(np.int32)))
    agree(
        fold_apart(bound, codes, values, 3, None, (4,)), fold(SUM.bind(field_like(values)), codes, values, 3)
    )


def test_a_defined_aggregator_takes_vectors_and_returns_its_words():
    def update(acc, row):
        for j in range(row.size):
            acc[j] = max(acc[j], row[j])

    def merge(acc, other):
        for j in range(acc.size):
            acc[j] = max(acc[j], other[j])

    top = Aggregator.define("top", [-np.inf] * 3, update, merge)
    values, codes = np.random.default_rng(2).normal(size=(20, 3)), np.arange(20) % 2
    agree(
        fold_apart(top.bind(field_like(values)), codes, values, 2, None, (9,)),
        reference("max", codes, values, 2, None),
    )


@pytest.mark.parametrize(("zero", "dtype"), [([], float), ([[1.0]], float), (0, np.float32)])
def test_a_definition_without_a_good_accumulator_is_refused(zero, dtype):
    with pytest.raises(UsageError, match="'bad'"):
        Aggregator.define("bad", zero, keep_moments, join_moments, dtype=dtype)


def test_check_laws_names_the_law_and_the_samples_that_break_it():
    def difference(acc, value):
        acc[0] = value - acc[0]

    def subtract(acc, other):
        acc[0] = other[0] - acc[0]

    with pytest.raises(UsageError, match=r"'minus' breaks merge\(a, zero\) = a for a = 1: -1.0 is not 1.0"):
        check_laws(Aggregator.define("minus", 0.0, difference, subtract), np.array([1, 2, 3]))

    def halve(acc, value):
        acc[0] = (acc[0] + value) / 2 if acc[0] else value

    def middle(acc, other):
        acc[0] = (acc[0] + other[0]) / 2 if acc[0] and other[0] else acc[0] + other[0]

    with pytest.raises(UsageError, match=r"'mid' breaks .*b.*c.* for a = 1, b = 1, c = 2"):
        check_laws(Aggregator.define("mid", 0.0, halve, middle), np.array([1, 2]))
    for aggregator in AGGREGATORS.values():
        check_laws(aggregator, np.random.default_rng(0).normal(size=(4, 2)))
    with pytest.raises(UsageError, match="no accumulator record"):
        check_laws(COLLECT, [1.0])
    with pytest.raises(UsageError, match="at least one sample"):
        check_laws(SUM, [])
