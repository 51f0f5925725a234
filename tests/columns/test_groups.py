"""Numbering, ordering and grouping keys, against dictionaries and NumPy."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from iterreduce.columns import hashing, numbering
from iterreduce.columns.aggregators import collect
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import (
    KeyIndex,
    bucket_order,
    group_order,
    group_rows,
    hash_order,
    number_keys,
)
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.ragged import Ragged
from iterreduce.errors import SchemaError, UsageError
from tests.columns.key_cases import by_case, by_small, python_rows, rng, weak


@pytest.fixture
def colliding(monkeypatch):
    """Every hash is 0, 1 or 2."""
    monkeypatch.setattr(hashing, "hash_keys", weak)


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
    with pytest.raises(SchemaError, match="columns"):
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


@pytest.mark.usefixtures("colliding")
def test_keys_with_equal_hashes_stay_apart_in_order_of_their_bytes():
    text = Ragged.from_list([f"w{i % 1500}" for i in range(6000)])
    keys = Batch.from_dict({"k": text}, {"k": np.arange(6000) % 1500 != 7})
    numbered = number_keys(keys)
    rows, distinct = python_rows(keys), python_rows(numbered.keys)
    assert [distinct[c] for c in numbered.codes.tolist()] == rows
    assert len(distinct) == len(set(rows))
    order = [
        (h, k is not None, (k or "").encode())
        for h, (k,) in zip(numbered.hashes.tolist(), distinct, strict=True)
    ]
    assert order == sorted(order)
    np.testing.assert_array_equal(KeyIndex(numbered.keys).lookup(keys), numbered.codes)
    mixed = keys.take(rng().permutation(6000))
    assert python_rows(number_keys(mixed).keys) == distinct


@pytest.mark.usefixtures("colliding")
def test_pairs_of_numbers_with_equal_hashes_stay_apart():
    r = rng()
    keys = Batch.from_dict(
        {"a": r.integers(-5, 5, 2000), "b": r.random(2000).round(1)}, {"b": r.random(2000) < 0.9}
    )
    numbered = number_keys(keys)
    distinct = python_rows(numbered.keys)
    assert [distinct[c] for c in numbered.codes.tolist()] == python_rows(keys)
    assert len(set(distinct)) == len(distinct)
    assert python_rows(number_keys(keys.take(r.permutation(2000))).keys) == distinct


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
    rows = Batch.from_dict(
        {"k": r.integers(0, 20, 500), "x": r.random(500), "v": r.integers(0, 9, (500, 2))},
        {"x": r.random(500) < 0.7},
    )
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
