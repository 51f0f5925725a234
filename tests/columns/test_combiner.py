"""Folding rows into records, and merging records, against dictionaries and NumPy."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import hashing, keytable, stores
from iterreduce.columns.aggregators import (
    COUNT,
    MAX,
    MEAN,
    MIN,
    SUM,
    VAR,
    argmin,
    bind_outputs,
    collect,
    count,
)
from iterreduce.columns.batch import Batch
from iterreduce.columns.combiner import Fold
from iterreduce.columns.groups import number_keys
from iterreduce.columns.hashing import hash_keys, hash_words, unhash_words
from iterreduce.columns.schema import Field, Schema
from iterreduce.columns.stores import AddressedStore, Folded, GeneralStore, HashedStore
from iterreduce.errors import SchemaError, UsageError
from tests.columns.key_cases import NULL_TWIN, ONES_KEY, by_case, by_small, python_rows, rng, weak

few = settings(max_examples=40, deadline=None)


@pytest.fixture
def colliding(monkeypatch):
    """Every hash is 0, 1 or 2."""
    monkeypatch.setattr(hashing, "hash_keys", weak)


def folded_in_pieces(rows, key, reduce, cuts):
    fold = Fold(rows.select(*key).schema, bind_outputs(reduce, key, rows.schema))
    begin = 0
    for end in cuts:
        fold.add(rows.slice(begin, end))
        begin = end
    return fold


def finished(fold, reduce, rows, key):
    """Results by key."""
    outputs, folded, at, columns = bind_outputs(reduce, key, rows.schema), fold.result(), 0, []
    for output in outputs:
        columns.append(output.bound.finish(folded.records, at)[0].tolist())
        at += output.bound.words
    assert folded.records.shape == (len(folded), at)
    assert folded.records.flags.c_contiguous
    values = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    keys = python_rows(folded.keys)
    assert len(keys) == len(set(keys))
    return dict(zip(keys, values, strict=True))


def slow(rows, key, column="x"):
    """Sums by a dictionary, in row order."""
    sums = defaultdict(int)
    for k, (x,) in zip(python_rows(rows, *key), python_rows(rows, column), strict=True):
        sums[k] += x
    return dict(sums)


def with_values(keys, floats=True):
    n = len(keys)
    x = rng().random(n) if floats else rng().integers(-9, 9, n)
    return keys.with_columns(x=x), keys.names


@by_case
def test_a_fold_sums_as_a_dictionary_does_to_the_last_bit(keys):
    rows, key = with_values(keys)
    fold = folded_in_pieces(rows, key, {"x": SUM}, [len(rows)])
    assert finished(fold, {"x": SUM}, rows, key) == slow(rows, key)


@by_small
def test_results_do_not_depend_on_how_rows_are_cut(keys):
    rows, key = with_values(keys)
    n = len(rows)
    whole = folded_in_pieces(rows, key, {"x": SUM, "n": count()}, [n]).result()
    cut = folded_in_pieces(rows, key, {"x": SUM, "n": count()}, [0, n // 7, n // 7, n // 2, n]).result()
    assert same(whole, cut)


def same(a, b):
    return (
        np.array_equal(a.hashes, b.hashes) and np.array_equal(a.records, b.records) and a.keys.equals(b.keys)
    )


@by_case
def test_folded_keys_stand_in_canonical_order_with_their_hashes(keys):
    rows, key = with_values(keys)
    folded = folded_in_pieces(rows, key, {"x": SUM}, [len(rows)]).result()
    assert folded.keys.equals(number_keys(keys).keys) or "float" in str(keys.schema)
    np.testing.assert_array_equal(folded.hashes, hash_keys(folded.keys))
    assert folded.keys.schema == keys.schema


@by_small
def test_merging_parts_gives_the_fold_of_all_rows(keys):
    rows, key = with_values(keys, floats=False)
    n, reduce = len(rows), {"x": SUM, "n": count(), "least": MIN.of("x")}
    parts = [
        folded_in_pieces(rows.slice(lo, hi), key, reduce, [hi - lo])
        for lo, hi in ((0, n // 3), (n // 3, n), (n, n))
    ]
    merged = Fold(rows.select(*key).schema, bind_outputs(reduce, key, rows.schema))
    for part in parts:
        merged.merge(part.result())
    assert same(merged.result(), folded_in_pieces(rows, key, reduce, [n]).result())


@by_small
def test_rows_can_be_added_after_parts_were_merged_and_the_other_way_round(keys):
    rows, key = with_values(keys, floats=False)
    half = len(rows) // 2
    part = folded_in_pieces(rows.slice(0, half), key, {"x": SUM}, [half]).result()
    first, last = (
        Fold(rows.select(*key).schema, bind_outputs({"x": SUM}, key, rows.schema)) for _ in range(2)
    )
    first.merge(part)
    first.add(rows.slice(half, len(rows)))
    last.add(rows.slice(half, len(rows)))
    last.merge(part)
    assert same(first.result(), last.result())
    assert finished(first, {"x": SUM}, rows, key) == slow(rows, key)


def test_a_rank_that_owns_a_narrow_range_of_hashes_merges_into_a_table_of_that_range():
    rows = Batch(k=rng().integers(-(2**62), 2**62, 60_000), x=np.ones(60_000))
    folded = folded_in_pieces(rows, ("k",), {"x": SUM}, [60_000]).result()
    share = folded.slice(
        *np.searchsorted(folded.hashes, np.array([2**63, 2**63 + 2**59], np.uint64)).tolist()
    )
    owner = Fold(rows.select("k").schema, bind_outputs({"x": SUM}, ["k"], rows.schema))
    for step in (share.slice(0, 1), share.slice(1, 40), share, folded.slice(0, 3), share):
        owner.merge(step)
        assert owner._store.table.homes < 16 * max(64, len(share))
    total = owner.result()
    assert len(total) == len(share) + 3
    assert total.records.view(np.float64)[:, 0].sum() == 2 * len(share) + 43


def test_the_store_follows_the_keys():
    reduce = {"x": SUM}
    for k, kind in (
        (np.arange(5000) % 100, AddressedStore),
        (np.arange(5000) * 2**50, HashedStore),
        (np.arange(5000) / 3, HashedStore),
        ([str(i) for i in range(5000)], GeneralStore),
    ):
        rows = Batch(k=k, x=np.ones(5000))
        assert isinstance(folded_in_pieces(rows, ("k",), reduce, [5000])._store, kind)


def test_keys_that_leave_their_range_of_addresses_move_on_to_another_store():
    r = rng()
    near, wider, far = r.integers(0, 50, 5000), r.integers(-900, 900, 5000), r.integers(-(2**60), 2**60, 5000)
    for columns in ((near, wider), (near, far), (near, wider, far), (near, far, near)):
        rows = Batch(k=np.concatenate(columns), x=r.random(5000 * len(columns)))
        cuts = [5000 * (i + 1) for i in range(len(columns))]
        fold = folded_in_pieces(rows, ("k",), {"x": SUM}, cuts)
        assert finished(fold, {"x": SUM}, rows, ("k",)) == slow(rows, ("k",))
        assert same(fold.result(), folded_in_pieces(rows, ("k",), {"x": SUM}, [len(rows)]).result())


def test_a_fold_grows_in_the_middle_of_a_batch():
    r = rng()
    few_then_many = np.concatenate(
        [r.integers(0, 2**60, 30)[r.integers(0, 30, 5000)], r.integers(0, 2**60, 90_000)]
    )
    rows = Batch(k=few_then_many, x=r.random(95_000), y=r.integers(0, 9, 95_000))
    for reduce in ({"x": SUM}, {"y": SUM}, {"x": SUM, "y": MAX}):
        column = next(iter(reduce))
        fold = folded_in_pieces(rows, ("k",), reduce, [5000, 5001, 95_000])
        got = finished(fold, reduce, rows, ("k",))
        want = slow(rows, ("k",), column)
        assert {k: v if len(reduce) == 1 else v[0] for k, v in got.items()} == want


def test_clear_forgets_keys_and_keeps_memory():
    r = rng()
    for k in (
        r.integers(0, 500, 4000),
        r.integers(-(2**60), 2**60, 4000),
        [str(i) for i in r.integers(0, 999, 4000)],
    ):
        rows = Batch(k=k, x=r.random(4000))
        fold = folded_in_pieces(rows, ("k",), {"x": SUM}, [4000])
        first, held = fold.result(), fold.nbytes
        for _ in range(5):
            fold.clear()
            assert len(fold.result()) == 0
            fold.add(rows)
            assert same(fold.result(), first)
            assert fold.nbytes == held
        fold.clear()
        fold.add(rows.slice(0, 10))
        assert len(fold.result()) == len(set(python_rows(rows.slice(0, 10), "k")))
        assert same(folded_in_pieces(rows, ("k",), {"x": SUM}, [4000]).result(), first)


def test_a_table_that_was_far_too_large_serves_few_keys_with_few_rows_and_grows_again():
    r = rng()
    many, few_rows = (Batch(k=r.integers(-(2**60), 2**60, n), x=r.random(n)) for n in (50_000, 20))
    fold = folded_in_pieces(many, ("k",), {"x": SUM}, [50_000])
    for rows in (few_rows, few_rows, few_rows, many, few_rows):
        fold.clear()
        fold.add(rows)
        assert finished(fold, {"x": SUM}, rows, ("k",)) == slow(rows, ("k",))


def test_results_do_not_change_when_the_fold_goes_on():
    r = rng()
    for k in (
        r.integers(0, 50, 400),
        r.integers(-(2**60), 2**60, 400),
        [str(i) for i in r.integers(0, 50, 400)],
    ):
        rows = Batch(k=k, x=r.random(400))
        fold = folded_in_pieces(rows, ("k",), {"x": SUM}, [400])
        before = fold.result()
        kept = Folded(before.hashes.copy(), before.keys.copy(), before.records.copy())
        fold.add(rows)
        fold.clear()
        fold.add(rows.slice(0, 5))
        assert same(before, kept)


def test_all_kinds_of_records_fold_side_by_side():
    r = rng()
    n = 20_000
    rows = Batch.from_dict(
        {
            "k": r.integers(-(2**60), 2**60, 300)[r.integers(0, 300, n)],
            "v": r.random((n, 3)),
            "x": r.random(n),
            "i": r.integers(-99, 99, n).astype(np.int16),
        },
        {"x": r.random(n) < 0.9},
    )
    reduce = {"v": SUM, "x": MEAN, "i": MIN, "n": COUNT, "spread": VAR.of("x"), "who": argmin("i", by="x")}
    reduce["n"] = count()
    folded = folded_in_pieces(rows, ("k",), reduce, [7000, n]).result()
    at, results = 0, {}
    for output in bind_outputs(reduce, ["k"], rows.schema):
        results[output.name] = output.bound.finish(folded.records, at)[0]
        at += output.bound.words
    for g, key in enumerate(folded.keys["k"].tolist()):
        mine, seen = rows["k"] == key, (rows["k"] == key) & rows.valid("x")
        np.testing.assert_allclose(results["v"][g], rows["v"][mine].sum(axis=0))
        np.testing.assert_allclose(results["x"][g], rows["x"][seen].mean())
        np.testing.assert_allclose(results["spread"][g], rows["x"][seen].var())
        assert results["i"][g] == rows["i"][mine].min()
        assert results["n"][g] == mine.sum()
        assert results["who"][g] == rows["i"][seen][rows["x"][seen].argmin()]


def test_the_fused_loop_and_the_general_way_give_the_same_bits(monkeypatch):
    r = rng()
    edges = np.array([ONES_KEY, NULL_TWIN, 2**63 - 1, -(2**63), 0])
    sparse = np.concatenate([r.integers(-(2**63), 2**63 - 1, 9000), edges])[r.integers(0, 9005, 40_000)]
    for k in (sparse, r.integers(0, 3000, 40_000), np.full(40_000, ONES_KEY)):
        rows = Batch(k=k, x=r.random(40_000), i=r.integers(0, 2**62, 40_000))
        for reduce in ({"x": SUM}, {"i": SUM}, {"n": count()}, {}):
            fused = folded_in_pieces(rows, ("k",), reduce, [11, 40_000])
            assert fused._store.fused is not None
            with monkeypatch.context() as patch:
                patch.setattr(stores, "fused_sum", lambda outputs: None)
                general = folded_in_pieces(rows, ("k",), reduce, [11, 40_000])
            assert same(fused.result(), general.result())


def test_a_fold_without_outputs_finds_the_distinct_keys():
    for k in (np.array([5, 5, 9]), np.array([5.0, 5.0, 9.0]), ["x", "x", "y"]):
        rows = Batch(k=k)
        fold = Fold(rows.schema, [])
        fold.add(rows)
        folded = fold.result()
        assert folded.records.shape == (2, 0)
        assert folded.keys.equals(number_keys(rows).keys)


def test_a_fold_of_nothing_has_the_columns_of_something():
    rows = Batch.from_dict({"a": np.zeros(1), "b": ["x"]}, {"a": np.ones(1, bool)})
    fold = Fold(rows.schema, [])
    fold.add(rows.slice(0, 0))
    assert len(fold.result()) == 0
    assert fold.result().keys.schema == rows.schema
    assert fold.nbytes == 0


def test_a_fold_refuses_what_it_cannot_do():
    rows = Batch(k=np.arange(3), x=np.arange(3))
    with pytest.raises(UsageError, match="cannot be combined"):
        Fold(rows.select("k").schema, bind_outputs({"x": collect("x")}, ["k"], rows.schema))
    with pytest.raises(UsageError, match="at least one key"):
        Fold(Schema({}), [])
    with pytest.raises(SchemaError, match='no column "k"'):
        Fold(rows.select("k").schema, []).add(rows.select("x"))


def test_a_nullable_schema_gives_a_mask_even_without_nulls():
    schema = Schema({"k": Field("fixed", np.dtype(np.int64), (), nullable=True)})
    fold = Fold(schema, [])
    fold.add(Batch(k=np.array([1, 2])))
    assert fold.result().keys.valid("k").all()


@few
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(-3, 3), st.sampled_from([ONES_KEY, NULL_TWIN])),
            st.integers(-5, 5),
        ),
        max_size=60,
    ),
    st.integers(0, 60),
)
def test_folding_and_merging_in_any_split_is_a_dictionary(pairs, cut):
    k = np.array([0 if key is None else key for key, _ in pairs], np.int64)
    rows = Batch.from_dict(
        {"k": k, "x": np.array([x for _, x in pairs], np.int64)},
        {"k": np.array([key is not None for key, _ in pairs], bool)},
    )
    outputs = bind_outputs({"x": SUM}, ["k"], rows.schema)
    left, right = Fold(rows.select("k").schema, outputs), Fold(rows.select("k").schema, outputs)
    left.add(rows.slice(0, cut))
    right.add(rows.slice(cut, len(rows)))
    left.merge(right.result())
    assert finished(left, {"x": SUM}, rows, ("k",)) == slow(rows, ("k",))


def test_ascending_keys_ask_for_few_new_tables(monkeypatch):
    made = []
    rebuild = keytable.OrderedTable._rebuild
    monkeypatch.setattr(
        keytable.OrderedTable, "_rebuild", lambda table, *a: (made.append(1), rebuild(table, *a))[1]
    )
    keys = unhash_words(np.sort(hash_words(np.arange(100_000))))
    rows = Batch(k=keys, x=np.ones(100_000))
    fold = folded_in_pieces(rows, ("k",), {"x": SUM}, range(500, 100_001, 500))
    np.testing.assert_array_equal(fold.result().keys["k"], keys)
    assert len(made) < 40


@pytest.mark.usefixtures("colliding")
def test_a_fold_keeps_keys_with_equal_hashes_apart():
    rows = Batch(a=np.arange(3000) % 40, b=[f"{i % 50}" for i in range(3000)], x=np.ones(3000, np.int64))
    fold = folded_in_pieces(rows, ("a", "b"), {"x": SUM}, [3000])
    assert finished(fold, {"x": SUM}, rows, ("a", "b")) == slow(rows, ("a", "b"))
