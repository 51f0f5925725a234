"""Join pairs against two nested loops."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import hashing
from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.joins import join_rows
from iterreduce.errors import SchemaError

few = settings(max_examples=50, deadline=None)


def nested_loops(left, right, keep_left=False):
    """Pairs of equal keys; None equals nothing."""
    pairs = []
    for i, a in enumerate(left):
        matches = [j for j, b in enumerate(right) if a == b and a is not None]
        pairs += [(i, j) for j in matches] or ([(i, -1)] if keep_left else [])
    return pairs


def pairs_of(left, right, **options):
    a, b = join_rows(left, right, **options)
    assert a.dtype == b.dtype == np.int64
    return list(zip(a.tolist(), b.tolist(), strict=True))


def keys(values):
    """A key column from Python values, None for nulls."""
    filler = next((v for v in values if v is not None), 0)
    column = [filler if v is None else v for v in values]
    valid = np.array([v is not None for v in values], bool)
    column = column if column and isinstance(filler, str) else np.array(column, np.int64)
    return Batch.from_dict({"k": column}, None if valid.all() else {"k": valid})


SMALL = st.lists(st.one_of(st.none(), st.integers(-3, 6)), max_size=12)
WIDE = st.lists(st.sampled_from([None, 0, 2**62, -(2**62), 17, 2**40]), max_size=12)
TEXT = st.lists(
    st.one_of(st.none(), st.sampled_from(["", "a", "b", "ab", "abcdefghi"])), min_size=1, max_size=12
)


@few
@pytest.mark.parametrize("lists", [SMALL, WIDE, TEXT], ids=["dense", "sparse", "text"])
@pytest.mark.parametrize("keep_left", [False, True])
@given(data=st.data())
def test_pairs_are_those_of_two_nested_loops_in_their_order(lists, keep_left, data):
    left, right = data.draw(lists), data.draw(lists)
    if lists is TEXT and (left == [None] * len(left) or right == [None] * len(right)):
        return
    assert pairs_of(keys(left), keys(right), keep_left=keep_left) == nested_loops(left, right, keep_left)


def test_nulls_match_nulls_only_where_asked():
    left, right = keys([1, None, 2, None]), keys([None, 2, 2])
    assert pairs_of(left, right) == [(2, 1), (2, 2)]
    assert pairs_of(left, right, nulls_match=True) == [(1, 0), (2, 1), (2, 2), (3, 0)]
    assert pairs_of(left, right, keep_left=True) == [(0, -1), (1, -1), (2, 1), (2, 2), (3, -1)]


def test_keys_of_several_columns_join_as_in_a_database():
    r = np.random.default_rng(1)
    sides = {s: (r.integers(0, 4, 60), [f"w{i}" for i in r.integers(0, 4, 60)]) for s in "lr"}
    left, right = (Batch(a=a, b=b) for a, b in sides.values())
    database = sqlite3.connect(":memory:")
    for side, (a, b) in sides.items():
        database.execute(f"create table {side} (i, a, b)")
        database.executemany(
            f"insert into {side} values (?, ?, ?)", zip(range(60), a.tolist(), b, strict=True)
        )
    wanted = database.execute("select l.i, r.i from l join r using (a, b) order by 1, 2").fetchall()
    assert pairs_of(left, right) == wanted


def test_equal_hashes_alone_are_no_match(monkeypatch):
    monkeypatch.setattr(hashing, "hash_keys", lambda k: hash_keys(k) % np.uint64(2))
    left, right = [f"{i % 50}" for i in range(200)], [f"{i}" for i in range(25, 90)]
    assert pairs_of(keys(left), keys(right)) == nested_loops(left, right)


@pytest.mark.parametrize("unique", [True, False])
def test_many_rows_join_as_searching_a_sorted_list_does(unique):
    r = np.random.default_rng(2)
    pool = r.integers(-(2**62), 2**62, 30_000)
    right = pool[:20_000] if unique else r.choice(pool[:20_000], 30_000)
    left = r.choice(pool, 100_000)
    order = np.argsort(right, kind="stable")
    first, last = (np.searchsorted(right[order], left, side) for side in ("left", "right"))
    a, b = join_rows(Batch(k=left), Batch(k=right))
    np.testing.assert_array_equal(a, np.repeat(np.arange(len(left)), last - first))
    np.testing.assert_array_equal(
        b, np.concatenate([order[lo:hi] for lo, hi in zip(first, last, strict=True)])
    )


@pytest.mark.parametrize("keep_left", [False, True])
def test_empty_sides(keep_left):
    some, none = keys([1, 2]), keys([])
    assert pairs_of(none, some, keep_left=keep_left) == []
    assert pairs_of(none, none, keep_left=keep_left) == []
    assert pairs_of(some, none, keep_left=keep_left) == ([(0, -1), (1, -1)] if keep_left else [])


def test_widths_of_integers_may_differ_and_kinds_may_not():
    assert pairs_of(Batch(src=np.array([3, 1], np.int32)), Batch(page=np.array([1, 3], np.int64))) == [
        (0, 1),
        (1, 0),
    ]
    with pytest.raises(SchemaError, match="never compare equal"):
        join_rows(Batch(src=np.array([1])), Batch(page=["1"]))
