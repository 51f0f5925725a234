"""Numbering, ordering, folding and grouping keys, against dictionaries and NumPy."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import combiner, hashing, numbering
from iterreduce.columns.aggregators import COUNT, MAX, MEAN, MIN, SUM, VAR, argmin, bind_outputs, collect, count
from iterreduce.columns.batch import Batch
from iterreduce.columns.combiner import AddressedStore, GeneralStore, HashedStore
from iterreduce.columns.groups import (
    Fold,
    Folded,
    KeyIndex,
    bucket_order,
    group_order,
    group_rows,
    hash_order,
    number_keys,
)
from iterreduce.columns.hashing import EMPTY, NULL_HASH, hash_keys, unhash_words
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import SchemaError, UsageError

few = settings(max_examples=40, deadline=None)
ONES_KEY = int(unhash_words(np.array([EMPTY]))[0])  # the key whose hash marks free rows
NULL_TWIN = int(unhash_words(np.array([NULL_HASH]))[0])  # the key that hashes like a null


def python_rows(batch, *names):
    """Rows as tuples of Python values; None for nulls, one NaN, one zero."""
    columns = []
    for name in names or batch.names:
        column, valid = batch[name], batch.valid(name)
        values = column.to_list() if isinstance(column, Ragged) else column.tolist()
        values = ["nan" if v != v else v + 0.0 if isinstance(v, float) else v for v in map(hashable, values)]
        columns.append([v if valid is None or valid[i] else None for i, v in enumerate(values)])
    return list(zip(*columns, strict=True))


def hashable(value):
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return tuple(value) if isinstance(value, list) else value


def rng():
    return np.random.default_rng(5)


def key_columns(n):
    """Key batches of n rows, of every kind."""
    r = rng()
    some = max(1, n // 3)
    sparse = r.integers(-(2**63), 2**63 - 1, some)[r.integers(0, some, n)]
    words = [f"word {i}" * (i % 4) for i in r.integers(0, some, n)]
    mask = r.random(n) < 0.8
    edges = np.array([2**63 - 1, -(2**63), 0, -1, ONES_KEY, NULL_TWIN])[r.integers(0, 6, n)]
    text = Ragged.from_list(words) if n else Ragged.from_list([""]).slice(0, 0)
    yield "sparse", Batch(k=sparse)
    yield "distinct", Batch(k=r.permutation(np.arange(n, dtype=np.int64) * 2**40))
    yield "dense", Batch(k=r.integers(0, some, n))
    yield "equal", Batch(k=np.full(n, 7))
    yield "edges", Batch(k=edges)
    yield "nullable edges", Batch.from_dict({"k": edges}, {"k": mask})
    yield "nullable dense", Batch.from_dict({"k": r.integers(0, some, n)}, {"k": mask})
    yield "all null", Batch.from_dict({"k": sparse}, {"k": np.zeros(n, bool)})
    yield "bool", Batch(k=r.random(n) < 0.5)
    yield "int8", Batch(k=r.integers(-128, 128, n).astype(np.int8))
    yield "uint64", Batch(k=r.integers(2**63, 2**64 - 1, some, dtype=np.uint64)[r.integers(0, some, n)])
    yield "float", Batch(k=np.array([0.0, -0.0, np.nan, -np.nan, 1.5, np.inf])[r.integers(0, 6, n)])
    yield "float32", Batch(k=r.random(n).astype(np.float32))
    yield "date", Batch(k=r.integers(0, 400, n).astype("datetime64[D]"))
    yield "strided", Batch(k=np.repeat(sparse, 2)[::2])
    yield "text", Batch(k=text)
    yield "nullable text", Batch.from_dict({"k": text}, {"k": mask})
    yield "pair", Batch(a=r.integers(0, 5, n), b=text)
    yield "nullable pair", Batch.from_dict({"a": edges, "b": text}, {"a": mask, "b": r.random(n) < 0.8})
    yield "vector", Batch(k=r.integers(0, 3, (n, 2)))
    yield "complex", Batch(k=(r.integers(0, 3, n) + 1j * r.integers(0, 3, n)).astype(np.complex64))


CASES = [(f"{name} {n}", keys) for n in (0, 1, 2, 700, 9000) for name, keys in key_columns(n)]
by_case = pytest.mark.parametrize("keys", [c[1] for c in CASES], ids=[c[0] for c in CASES])
SMALL = [(n, k) for n, k in CASES if n.endswith(" 700") or n.endswith(" 0")]
by_small = pytest.mark.parametrize("keys", [c[1] for c in SMALL], ids=[c[0] for c in SMALL])


# ------------------------------------------------------------------ orders


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_bucket_order_is_the_stable_order_of_destinations(n, dtype):
    dest = rng().integers(0, 7, n).astype(dtype)
    order, counts = bucket_order(dest, 7)
    np.testing.assert_array_equal(order, np.argsort(dest, kind="stable"))
    np.testing.assert_array_equal(counts, np.bincount(dest, minlength=7))


def test_destinations_out_of_range_are_named():
    with pytest.raises(UsageError, match="row 1 has destination 3"):
        bucket_order(np.array([0, 3]), 3)
    with pytest.raises(UsageError, match="-1"):
        bucket_order(np.array([0, -1]), 3)
    with pytest.raises(UsageError, match="no group"):
        group_order(np.array([0]), 0)


def test_group_order_keeps_row_order_and_knows_empty_groups():
    codes = rng().integers(0, 5, 100) * 2
    order, offsets = group_order(codes, 10)
    for g in range(10):
        np.testing.assert_array_equal(order[offsets[g] : offsets[g + 1]], np.flatnonzero(codes == g))
    assert [a.tolist() for a in group_order(np.zeros(0, int), 0)] == [[], [0]]


@pytest.mark.parametrize("n", [0, 1, 255, 256, 5000])
@pytest.mark.parametrize("top", [2, 1000, 2**40, 2**64 - 1])
def test_hash_order_is_the_stable_ascending_order(n, top):
    hashes = rng().integers(0, top, n, dtype=np.uint64, endpoint=True)
    for h in (hashes, np.full(n, 3, np.uint64), np.sort(hashes)):
        np.testing.assert_array_equal(hash_order(h), np.argsort(h, kind="stable"))


# ------------------------------------------------------------------ numbers


@by_case
def test_numbers_name_distinct_keys_in_canonical_order(keys):
    numbered = number_keys(keys)
    rows, distinct = python_rows(keys), python_rows(numbered.keys)
    assert [distinct[c] for c in numbered.codes.tolist()] == rows
    assert len(distinct) == len(set(distinct)) == len(set(rows)) == len(numbered)
    assert numbered.first.tolist() == [rows.index(key) for key in distinct]
    assert (numbered.hashes[1:] >= numbered.hashes[:-1]).all()
    np.testing.assert_array_equal(numbered.hashes, hash_keys(numbered.keys))
    assert numbered.codes.dtype == np.int32


@by_small
def test_canonical_order_does_not_depend_on_the_order_of_rows(keys):
    shuffled = keys.take(rng().permutation(len(keys)))
    assert python_rows(number_keys(keys).keys) == python_rows(number_keys(shuffled).keys)


@by_case
def test_an_index_finds_its_keys_and_no_others(keys):
    numbered = number_keys(keys)
    index = KeyIndex(numbered.keys)
    np.testing.assert_array_equal(index.lookup(keys), numbered.codes)
    assert len(index) == len(numbered)
    half = numbered.keys.slice(0, len(numbered) // 2)
    want = np.where(numbered.codes < len(half), numbered.codes, -1)
    np.testing.assert_array_equal(KeyIndex(half).lookup(keys), want)


def test_an_index_gives_rows_in_the_order_in_which_keys_were_given():
    for keys in (np.array([30, 10, 20]), np.array([2**60, 5, -(2**62)]), ["b", "a", "c"]):
        batch = Batch(k=keys)
        assert KeyIndex(batch).lookup(batch).tolist() == [0, 1, 2]


def test_an_index_refuses_repeated_and_incomparable_keys():
    for keys in (np.array([1, 2, 1]), np.array([2**60, 0, 2**60]), ["x", "y", "x"]):
        with pytest.raises(UsageError, match="rows 0 and 2"):
            KeyIndex(Batch(k=keys))
    index = KeyIndex(Batch(k=np.array([1, 2])))
    assert index.lookup(Batch(other=np.array([2], np.int8))).tolist() == [1]
    for other in (np.array([1.0]), ["1"], np.array([[1]]), np.array([1], "datetime64[s]")):
        with pytest.raises(SchemaError, match="never compare equal"):
            index.lookup(Batch(k=other))
    with pytest.raises(SchemaError, match="2 columns|columns"):
        index.lookup(Batch(a=np.array([1]), b=np.array([1])))


def test_distinct_keys_are_estimated_within_a_fifth():
    for distinct in (1, 100, 50_000, 10**6):
        column = rng().integers(0, distinct, 1_500_000)
        assert numbering.estimate_distinct(column) == pytest.approx(min(distinct, 1_500_000), rel=0.35, abs=2)


def test_many_nulls_among_short_texts_are_one_key():
    keys = Batch.from_dict({"k": ["", "", "b", "", ""]}, {"k": np.array([False, True, True, False, False])})
    numbered = number_keys(keys)
    assert sorted(map(str, python_rows(numbered.keys))) == ["('',)", "('b',)", "(None,)"]


def test_millions_of_distinct_keys_are_numbered():
    keys = rng().permutation(np.arange(1_500_000, dtype=np.int64) * 0x10001)
    numbered = number_keys(Batch(k=keys))
    assert len(numbered) == len(keys)
    np.testing.assert_array_equal(numbered.keys["k"][numbered.codes], keys)


def weak(keys):
    return hash_keys(keys) % np.uint64(3)


@pytest.fixture
def colliding(monkeypatch):
    """Every hash is 0, 1 or 2."""
    monkeypatch.setattr(hashing, "hash_keys", weak)


@pytest.mark.usefixtures("colliding")
def test_keys_with_equal_hashes_stay_apart_in_order_of_their_bytes():
    text = Ragged.from_list([f"w{i % 1500}" for i in range(6000)])
    keys = Batch.from_dict({"k": text}, {"k": np.arange(6000) % 1500 != 7})
    numbered = number_keys(keys)
    rows, distinct = python_rows(keys), python_rows(numbered.keys)
    assert [distinct[c] for c in numbered.codes.tolist()] == rows
    assert len(distinct) == len(set(rows))
    order = [(h, k is not None, (k or "").encode()) for h, (k,) in zip(numbered.hashes.tolist(), distinct, strict=True)]
    assert order == sorted(order)
    np.testing.assert_array_equal(KeyIndex(numbered.keys).lookup(keys), numbered.codes)
    mixed = keys.take(rng().permutation(6000))
    assert python_rows(number_keys(mixed).keys) == distinct


@pytest.mark.usefixtures("colliding")
def test_a_fold_keeps_keys_with_equal_hashes_apart():
    rows = Batch(a=np.arange(3000) % 40, b=[f"{i % 50}" for i in range(3000)], x=np.ones(3000, np.int64))
    fold = folded_in_pieces(rows, ("a", "b"), {"x": SUM}, [3000])
    assert finished(fold, {"x": SUM}, rows, ("a", "b")) == slow(rows, ("a", "b"))


# ------------------------------------------------------------------ folds


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
    return np.array_equal(a.hashes, b.hashes) and np.array_equal(a.records, b.records) and a.keys.equals(b.keys)


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
    parts = [folded_in_pieces(rows.slice(lo, hi), key, reduce, [hi - lo]) for lo, hi in ((0, n // 3), (n // 3, n), (n, n))]
    merged = Fold(rows.select(*key).schema, bind_outputs(reduce, key, rows.schema))
    for part in parts:
        merged.merge(part.result())
    assert same(merged.result(), folded_in_pieces(rows, key, reduce, [n]).result())


@by_small
def test_rows_can_be_added_after_parts_were_merged_and_the_other_way_round(keys):
    rows, key = with_values(keys, floats=False)
    half = len(rows) // 2
    part = folded_in_pieces(rows.slice(0, half), key, {"x": SUM}, [half]).result()
    first, last = (Fold(rows.select(*key).schema, bind_outputs({"x": SUM}, key, rows.schema)) for _ in range(2))
    first.merge(part)
    first.add(rows.slice(half, len(rows)))
    last.add(rows.slice(half, len(rows)))
    last.merge(part)
    assert same(first.result(), last.result())
    assert finished(first, {"x": SUM}, rows, key) == slow(rows, key)


def test_a_rank_that_owns_a_narrow_range_of_hashes_merges_into_a_table_of_that_range():
    rows = Batch(k=rng().integers(-(2**62), 2**62, 60_000), x=np.ones(60_000))
    folded = folded_in_pieces(rows, ("k",), {"x": SUM}, [60_000]).result()
    share = folded.slice(*np.searchsorted(folded.hashes, np.array([2**63, 2**63 + 2**59], np.uint64)).tolist())
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
    few_then_many = np.concatenate([r.integers(0, 2**60, 30)[r.integers(0, 30, 5000)], r.integers(0, 2**60, 90_000)])
    rows = Batch(k=few_then_many, x=r.random(95_000), y=r.integers(0, 9, 95_000))
    for reduce in ({"x": SUM}, {"y": SUM}, {"x": SUM, "y": MAX}):
        column = next(iter(reduce))
        fold = folded_in_pieces(rows, ("k",), reduce, [5000, 5001, 95_000])
        got = finished(fold, reduce, rows, ("k",))
        want = slow(rows, ("k",), column)
        assert {k: v if len(reduce) == 1 else v[0] for k, v in got.items()} == want


def test_clear_forgets_keys_and_keeps_memory():
    r = rng()
    for k in (r.integers(0, 500, 4000), r.integers(-(2**60), 2**60, 4000), [str(i) for i in r.integers(0, 999, 4000)]):
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
    for k in (r.integers(0, 50, 400), r.integers(-(2**60), 2**60, 400), [str(i) for i in r.integers(0, 50, 400)]):
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
        {"k": r.integers(-(2**60), 2**60, 300)[r.integers(0, 300, n)], "v": r.random((n, 3)), "x": r.random(n), "i": r.integers(-99, 99, n).astype(np.int16)},
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
        for reduce in ({"x": SUM}, {"i": SUM}, {"n": count()}):
            fused = folded_in_pieces(rows, ("k",), reduce, [11, 40_000])
            assert fused._store.fused is not None
            with monkeypatch.context() as patch:
                patch.setattr(combiner, "fused_sum", lambda outputs: None)
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
@given(st.lists(st.tuples(st.one_of(st.none(), st.integers(-3, 3), st.sampled_from([ONES_KEY, NULL_TWIN])), st.integers(-5, 5)), max_size=60), st.integers(0, 60))
def test_folding_and_merging_in_any_split_is_a_dictionary(pairs, cut):
    k = np.array([0 if key is None else key for key, _ in pairs], np.int64)
    rows = Batch.from_dict({"k": k, "x": np.array([x for _, x in pairs], np.int64)}, {"k": np.array([key is not None for key, _ in pairs], bool)})
    outputs = bind_outputs({"x": SUM}, ["k"], rows.schema)
    left, right = Fold(rows.select("k").schema, outputs), Fold(rows.select("k").schema, outputs)
    left.add(rows.slice(0, cut))
    right.add(rows.slice(cut, len(rows)))
    left.merge(right.result())
    assert finished(left, {"x": SUM}, rows, ("k",)) == slow(rows, ("k",))


# ------------------------------------------------------------------ groups


@by_small
def test_grouped_rows_stand_by_key_in_their_old_order(keys):
    rows = keys.with_columns(row=np.arange(len(keys)))
    groups = group_rows(rows, keys.names)
    wanted = defaultdict(list)
    for i, key in enumerate(python_rows(keys)):
        wanted[key].append(i)
    got = {key: groups.group(g)["row"].tolist() for g, key in enumerate(python_rows(groups.keys))}
    assert got == dict(wanted)
    assert groups.sizes.tolist() == [len(wanted[key]) for key in python_rows(groups.keys)]
    assert groups.rows.schema == rows.schema


def test_sorted_rows_are_grouped_without_being_copied():
    rows = group_rows(Batch(k=rng().integers(0, 9, 100)), "k").rows
    assert group_rows(rows, "k").rows["k"] is rows["k"]


def test_segment_reductions_are_those_of_numpy():
    r = rng()
    rows = Batch.from_dict({"k": r.integers(0, 20, 500), "x": r.random(500), "v": r.integers(0, 9, (500, 2))}, {"x": r.random(500) < 0.7})
    groups = group_rows(rows, "k")
    assert len(groups) == 20
    for g in range(20):
        mine = groups.group(g)
        x = mine["x"][mine.valid("x")]
        assert groups.sum("x")[g] == pytest.approx(x.sum())
        assert groups.min("x")[g] == x.min()
        assert groups.max("x")[g] == x.max()
        assert groups.mean("x")[g] == pytest.approx(x.mean())
        assert groups.count("x")[g] == len(x)
        assert groups.count()[g] == len(mine)
        np.testing.assert_array_equal(groups.sum("v")[g], mine["v"].sum(axis=0))
        assert groups.reduce(collect("v"), "k")[0].to_list()[g].tolist() == mine["k"].tolist()


def test_groups_of_no_rows():
    groups = group_rows(Batch(k=np.empty(0, np.int64), x=np.empty(0)), ["k"])
    assert len(groups) == 0
    assert groups.sum("x").shape == (0,)
    assert groups.count().shape == (0,)
    assert groups.sizes.shape == (0,)


def test_a_wrong_key_name_is_answered_with_the_nearest():
    with pytest.raises(SchemaError, match='did you mean "word"'):
        group_rows(Batch(word=["a"]), "wrod")
