"""What tables written in place are made of: columns and indexes that grow, marks on rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import KeyIndex
from iterreduce.columns.growing import Marks, appended, extended, held
from iterreduce.columns.ragged import Ragged


@st.composite
def key_lists(draw: Any) -> tuple[str, list[list[Any]]]:
    kind = draw(st.sampled_from(["near", "far", "text", "float"]))
    of = {
        "near": st.integers(-40, 40),
        "far": st.integers(-(2**63), 2**63 - 1),
        "text": st.text("ab\0é", max_size=4),
        "float": st.integers(-50, 50).map(lambda i: i / 4),
    }[kind]
    keys = draw(st.lists(of, unique=True, min_size=1, max_size=60))
    cuts = sorted(draw(st.lists(st.integers(0, len(keys)), max_size=4)))
    bounds = [0, *cuts, len(keys)]
    return kind, [keys[a:b] for a, b in pairwise(bounds)]


@given(key_lists(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_an_index_that_took_more_keys_finds_all_of_them(
    lists: tuple[str, list[list[Any]]], null: bool
) -> None:
    kind, parts = lists

    def batch(keys: list[Any]) -> Batch:
        if kind == "text":
            return Batch(k=keys) if keys else Batch(k=["a"]).slice(0, 0)
        return Batch(k=np.array(keys, np.float64 if kind == "float" else np.int64))

    index, seen = KeyIndex(batch(parts[0])), list(parts[0])
    for i, part in enumerate(parts[1:]):
        rows = batch(part)
        if null and i == 0 and part:  # the first of these is the null key
            rows = rows.with_valid(k=np.arange(len(part)) > 0)
        index = extended(index, rows)
        seen += part
        assert len(index) == len(seen)
        found = index.lookup(batch(seen)).tolist()
        lost = [len(seen) - len(part)] if null and i == 0 and part else []
        if not (null and any(parts[1:2])):
            assert found == list(range(len(seen)))
        else:
            at = len(parts[0])
            assert [f for j, f in enumerate(found) if j != at] == [j for j in range(len(seen)) if j != at]
            assert found[at] == -1 and (not lost or lost == [at])
            nobody = batch(parts[1][:1]).with_valid(k=np.zeros(1, bool))
            assert index.lookup(nobody).tolist() == [at]


def test_keys_that_come_in_order_are_added_in_time_for_each() -> None:
    """By address, then by hash once they lie far apart: 200 times a few keys."""
    index, keys = KeyIndex(Batch(k=np.arange(5))), np.arange(5)
    for i in range(200):
        more = np.arange(3) + 5 + 3 * i if i < 100 else np.arange(3) * 10**9 + 10**12 * i
        index, keys = extended(index, Batch(k=more)), np.concatenate([keys, more])
    assert np.array_equal(index.lookup(Batch(k=keys)), np.arange(len(keys)))
    assert (index.lookup(Batch(k=np.array([305, -1, 10**15]))) == -1).all()


def test_columns_grow_in_place_and_old_views_stay() -> None:
    numbers, words = held(np.arange(4.0).reshape(2, 2)), held(Ragged.from_list(["ab", ""]))
    views = []
    for i in range(20):
        views.append((numbers.view, words.view))
        numbers = appended(numbers, np.full((1, 2), i, float))
        words = appended(words, Ragged.from_list(["x" * i]).slice(0, 1))
    for n, (a, b) in enumerate(views):
        assert a.tolist() == [[0, 1], [2, 3], *([i, i] for i in range(n))]
        assert b.to_list() == ["ab", "", *("x" * i for i in range(n))]
    assert len(numbers.memory[0]) < 64, "doubling"


@given(st.lists(st.lists(st.integers(-1, 30), max_size=20), max_size=4), st.integers(1, 29))
@settings(max_examples=40, deadline=None)
def test_marks_name_rows_once(lists: list[list[int]], n: int) -> None:
    marks, arrays = Marks(), [np.array(rows, np.int64) for rows in lists]
    for _ in range(2):
        chosen = marks.distinct(arrays, n)
        assert chosen.tolist() == sorted({r for rows in lists for r in rows if 0 <= r < n})
        for places, rows in zip(marks.places(chosen, arrays, n), lists, strict=True):
            wanted = [chosen.tolist().index(r) if 0 <= r < n else len(chosen) for r in rows]
            assert places.tolist() == wanted
