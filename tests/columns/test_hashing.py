"""Hashes are stable, one to one for single numbers, and equal exactly where keys are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import (
    NULL_HASH,
    hash_bytes,
    hash_keys,
    hash_words,
    key_words,
    unhash_words,
    words_to_column,
)
from iterreduce.columns.ragged import Ragged
from iterreduce.errors import UsageError

INT64 = st.integers(-(2**63), 2**63 - 1)
few = settings(max_examples=50, deadline=None)


def python_mix(word: int) -> int:
    h = word * 0x9E3779B97F4A7C15 % 2**64
    h ^= h >> 32
    return h * 0xD6E8FEB86659FD93 % 2**64


@few
@given(st.lists(INT64))
def test_hash_words_is_the_written_formula_and_can_be_undone(words):
    keys = np.array(words, np.int64)
    assert hash_words(keys).tolist() == [python_mix(w % 2**64) for w in words]
    np.testing.assert_array_equal(unhash_words(hash_words(keys)), keys)


def test_hashes_are_the_same_on_every_host_and_in_every_release():
    words = np.array([0, 1, -1, 2**63 - 1, -(2**63)])
    assert hash_words(words).tolist() == [python_mix(int(w) % 2**64) for w in words]
    text = hash_bytes(Ragged.from_list(["", "a", "12345678", "123456789", "ü" * 20]))
    assert text.tolist() == TEXT_HASHES


def python_hash(data: bytes) -> int:
    h = python_mix((len(data) + 0xD6E8FEB86659FD93) % 2**64)
    for at in range(0, len(data), 8):
        h = python_mix(h ^ int.from_bytes(data[at : at + 8], "little"))
    h ^= h >> 32
    return h * 0x9E3779B97F4A7C15 % 2**64


TEXT_HASHES = [python_hash(s.encode()) for s in ("", "a", "12345678", "123456789", "ü" * 20)]


@few
@given(st.lists(st.binary(max_size=40)))
def test_hash_bytes_is_the_written_formula_whatever_the_offsets(rows):
    column = (
        Ragged.from_list([b"before", *rows, b"behind"]).slice(1, len(rows) + 1)
        if rows
        else Ragged.from_list([b""]).slice(0, 0)
    )
    assert hash_bytes(column).tolist() == [python_hash(row) for row in rows]


def test_the_top_bits_of_hashes_of_regular_keys_are_spread_evenly():
    for step in (1, 8, 1000, 2**20, 2**32, 2**44):
        counts = np.bincount(
            (hash_words(np.arange(2**15, dtype=np.int64) * step) >> np.uint64(56)).astype(int), minlength=256
        )
        assert counts.max() < 3 * 2**15 / 256, step
    floats = hash_keys(Batch(k=np.arange(2**15, dtype=np.float64)))
    assert np.bincount((floats >> np.uint64(56)).astype(int), minlength=256).max() < 3 * 2**15 / 256


def test_out_takes_the_hashes_without_another_array():
    out = np.empty(3, np.uint64)
    assert hash_words(np.arange(3), out) is out


@pytest.mark.parametrize(
    "column",
    [
        np.array([True, False]),
        np.array([-128, 127], np.int8),
        np.array([0, 255], np.uint8),
        np.array([2**63, 2**64 - 1], np.uint64),
        np.array([1.5, -np.inf], np.float16),
        np.array([1.5, np.inf], np.float32),
        np.array(["2020-01-01", "NaT"], "datetime64[D]"),
        np.array([1, -1], "timedelta64[ns]"),
    ],
    ids=lambda c: str(c.dtype),
)
def test_words_give_back_the_column(column):
    np.testing.assert_array_equal(words_to_column(key_words(column), column.dtype), column)
    np.testing.assert_array_equal(key_words(np.repeat(column, 2)[::2]), key_words(column))


def test_floats_have_one_zero_and_one_nan_and_hash_like_wider_floats():
    odd_nan = np.array([0x7FF8000000000123, 0xFFF0000000000001], np.uint64).view(np.float64)
    keys = np.concatenate([[0.0, -0.0, np.nan], odd_nan])
    h = hash_keys(Batch(k=keys))
    assert h[0] == h[1]
    assert len(set(h[2:].tolist())) == 1
    np.testing.assert_array_equal(
        hash_keys(Batch(k=np.array([0.5, 3], np.float32))), hash_keys(Batch(k=np.array([0.5, 3])))
    )
    assert np.signbit(keys[1]), "the caller's column is left alone"


def test_nulls_hash_alike_whatever_lies_under_the_mask():
    mask = np.array([False, False, True])
    for column in (np.array([1, 2, 1]), ["a", "b", "a"], np.array([1.0, np.nan, 2.0])):
        h = hash_keys(Batch.from_dict({"k": column}, {"k": mask}))
        assert h[0] == h[1] == NULL_HASH != h[2]
    pairs = {"a": np.array([1, 2, 1]), "b": np.array([5, 5, 5])}
    h = hash_keys(Batch.from_dict(pairs, {"a": mask}))
    assert h[0] == h[1] != h[2]


def test_a_mask_that_hides_nothing_changes_no_hash():
    rows = {"a": np.arange(4), "b": ["x", "y", "", "z"]}
    masks = {"a": np.ones(4, bool), "b": np.ones(4, bool)}
    np.testing.assert_array_equal(hash_keys(Batch(**rows)), hash_keys(Batch.from_dict(rows, masks)))


@few
@given(st.lists(st.tuples(INT64, st.text(max_size=3), st.booleans()), min_size=1, max_size=30))
def test_rows_of_several_columns_hash_equal_exactly_where_they_are_equal(rows):
    a, b, c = zip(*rows, strict=True)
    hashes = hash_keys(Batch(a=np.array(a, np.int64), b=list(b), c=np.array(c))).tolist()
    assert len(set(hashes)) == len(set(rows))
    assert len(set(zip(hashes, rows, strict=True))) == len(set(rows))


def test_vectors_complex_numbers_and_lists_can_be_keys():
    h = hash_keys(Batch(k=np.array([[1, 2], [2, 1], [1, 2]])))
    assert h[0] == h[2] != h[1]
    h = hash_keys(Batch(k=np.array([1 + 2j, 2 + 1j, 1 + 2j])))
    assert h[0] == h[2] != h[1]
    lists = Ragged(np.array([0, 2, 4, 6]), np.array([0.0, 1.0, -0.0, 1.0, 1.0, 0.0]), "list")
    h = hash_keys(Batch(k=lists))
    assert h[0] == h[1] != h[2]


def test_hashes_of_no_rows_are_no_hashes():
    assert hash_words(np.empty(0, np.int64)).shape == (0,)
    assert hash_keys(Batch(a=np.empty(0), b=np.empty((0, 3)))).shape == (0,)


def test_a_key_without_columns_is_refused():
    with pytest.raises(UsageError, match="at least one column"):
        hash_keys(Batch())
