"""Numbers of vertices against `np.unique` and a dictionary."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import vertexcodes
from iterreduce.columns.batch import Batch
from iterreduce.columns.vertexcodes import Numbering, by_degree
from iterreduce.columns.vertexstores import Addressed, Hashed, Stored
from iterreduce.errors import SchemaError, UsageError


def numbered(sources: Any, targets: Any, chunk: int = 1000, **options: Any) -> Numbering:
    """A numbering of edges that come in chunks."""
    one = Batch(id=sources).schema
    numbering = Numbering(one, **options)
    for lo in range(0, len(sources), chunk):
        numbering.count(sources[lo : lo + chunk], 0)
        numbering.count(targets[lo : lo + chunk], 1)
    return numbering.finish()


def check(numbering: Numbering, sources: Any, targets: Any) -> None:
    """All that a numbering says, against counting in Python."""
    keys = _listed(numbering.keys()["id"])
    assert len(keys) == len(set(keys)) == len(numbering)
    for role, column in enumerate((sources, targets)):
        expected = Counter(_listed(column))
        assert numbering.counts[role].tolist() == [expected[key] for key in keys]
        codes = numbering.codes(column)
        assert codes.dtype == np.int32
        assert [keys[code] for code in codes.tolist()] == _listed(column)
    values = np.arange(len(keys), dtype=np.int32)[::-1].copy()
    assert numbering.through(values).codes(sources).tolist() == values[numbering.codes(sources)].tolist()
    assert set(keys) == set(_listed(sources)) | set(_listed(targets))


def _listed(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, np.ndarray) else column.to_list()


words = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-50, 50), st.just(2**63 - 1))


@given(st.lists(st.tuples(words, words), max_size=60), st.integers(1, 20), st.sampled_from([0, 4, 100]))
@settings(max_examples=50, deadline=None)
def test_any_integers_get_a_number_each(edges: list[tuple[int, int]], chunk: int, free: int) -> None:
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    before, vertexcodes.FREE_SPAN = vertexcodes.FREE_SPAN, free
    try:
        check(numbered(pairs[:, 0], pairs[:, 1], chunk), pairs[:, 0], pairs[:, 1])
    finally:
        vertexcodes.FREE_SPAN = before


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, np.uint64, np.int8, np.bool_, np.float64])
def test_keys_of_every_kind_of_number(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    sources, targets = (rng.integers(0, 100, 3000).astype(dtype) for _ in range(2))
    numbering = numbered(sources, targets)
    check(numbering, sources, targets)
    assert isinstance(numbering._store, Hashed if dtype is np.float64 else Addressed)
    assert numbering.keys()["id"].dtype == dtype


def test_unsigned_keys_on_both_sides_of_the_sign_bit() -> None:
    ends = np.array([2**63 - 1, 2**63, 2**64 - 1, 0, 5], np.uint64)
    check(numbered(ends, ends[::-1].copy(), 2), ends, ends[::-1].copy())


def test_a_range_that_grows_downwards_and_upwards_keeps_its_counts() -> None:
    sources = np.concatenate([np.arange(10_000) * sign for sign in (1, -1, 3, -5)])
    numbering = numbered(sources, sources + 1, 700)
    assert isinstance(numbering._store, Addressed)
    check(numbering, sources, sources + 1)


def test_integers_that_prove_to_lie_far_apart_move_to_a_hash_table() -> None:
    rng = np.random.default_rng(2)
    near, far = rng.integers(0, 5000, 9000), rng.integers(-(2**60), 2**60, 9000)
    sources = np.concatenate([near, far, near])
    numbering = numbered(sources, sources[::-1].copy(), 4000)
    assert isinstance(numbering._store, Hashed)
    check(numbering, sources, sources[::-1].copy())


def test_a_range_that_is_said_beforehand_need_not_grow() -> None:
    numbering = Numbering(Batch(id=np.empty(0, np.int64)).schema, rows=100)
    numbering.observe(-10, 90)
    before = numbering.nbytes
    numbering.count(np.arange(-10, 91), 1)
    assert numbering.nbytes == before
    assert numbering.finish().counts.sum(axis=1).tolist() == [0, 101]


def test_known_row_counts_allow_wider_addresses() -> None:
    sources = np.arange(0, 6_000_000, 1000)
    assert isinstance(numbered(sources, sources)._store, Hashed)
    assert isinstance(numbered(sources, sources, rows=6_000_000)._store, Addressed)


def test_text_and_pairs_are_numbered_as_they_come() -> None:
    words = Batch(id=["ant", "bee", "ant", "", "cat"])["id"]
    others = Batch(id=["bee", "dog", "dog", "", "ant"])["id"]
    numbering = Numbering(Batch(id=words).schema)
    numbering.count(words, 0)
    numbering.count(others, 1)
    assert isinstance(numbering.finish()._store, Stored)
    check(numbering, words, others)
    assert numbering.keys()["id"].to_list() == ["ant", "bee", "", "cat", "dog"]
    pairs = Batch(graph=np.array([1, 1, 2]), id=["a", "b", "a"])
    numbering = Numbering(pairs.schema)
    numbering.count(pairs)
    assert numbering.finish().keys().equals(pairs) and numbering.codes(pairs).tolist() == [0, 1, 2]


def test_many_texts() -> None:
    rng = np.random.default_rng(3)
    words = Batch(id=[f"v{i}" for i in rng.integers(0, 20_000, 30_000)])["id"]
    numbering = Numbering(Batch(id=words).schema)
    numbering.count(words, 1)
    check(numbering.finish(), words.take(np.empty(0, np.int64)), words)


def test_no_edges_at_all() -> None:
    for empty in (np.empty(0, np.int64), np.empty(0), Batch(id=[""])["id"].take(np.empty(0, np.int64))):
        numbering = Numbering(Batch(id=empty).schema)
        numbering.count(empty)
        assert len(numbering.finish()) == 0 and numbering.codes(empty).tolist() == []
        assert len(numbering.keys()) == 0
        assert numbering.through(np.empty(0, np.int32)).codes(empty).tolist() == []


@pytest.mark.parametrize("ids", [np.array([1, 2]), np.array([1, 2**62]), np.array([0.5, 2.5])])
def test_unknown_keys_of_the_second_pass_are_named(ids: Any) -> None:
    numbering = numbered(ids, ids)
    with pytest.raises(UsageError, match="key 77"):
        numbering.codes(np.array([1, 77], ids.dtype)[-1:])
    with pytest.raises(UsageError, match="was not there"):
        numbering.codes(np.array([-(10**6)], ids.dtype))


def test_what_does_not_fit_is_told() -> None:
    ids = Batch(id=np.array([1, 2]))
    numbering = Numbering(ids.schema)
    with pytest.raises(UsageError, match="finish"):
        len(numbering)
    with pytest.raises(SchemaError, match="never compare equal"):
        numbering.count(np.array([0.5]))
    with pytest.raises(UsageError, match="null key"):
        numbering.count(ids.with_valid(id=np.array([True, False])))
    numbering.count(ids)
    with pytest.raises(UsageError, match="no longer"):
        numbering.finish().count(ids)
    with pytest.raises(UsageError, match="wanted int32"):
        numbering.through(np.zeros(3, np.int32))
    with pytest.raises(UsageError, match="at least one column"):
        Numbering(Batch().schema)


@given(st.lists(st.integers(0, 5), max_size=40))
@settings(max_examples=30, deadline=None)
def test_descending_degrees_with_ties_by_number(degrees: list[int]) -> None:
    order, used = by_degree(np.array(degrees, np.int64))
    assert order.tolist() == sorted(range(len(degrees)), key=lambda i: (-degrees[i], i))
    assert used == sum(degree > 0 for degree in degrees)
