"""Rows in the order of their keys' values, against Python's sort of tuples and NumPy's stable argsort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashorder import sort_words, stable_order
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.sortkeys import first_in_order, ranges_of, sorted_order
from iterreduce.errors import UsageError

TEXTS = [
    "",
    "a",
    "a\0",
    "ab",
    "abcdefg",
    "abcdefgh",
    "abcdefg\0",
    "abcdefghijklmno",
    "b",
    "é",
    "zzzzzzzzz" * 5,
]
FLOATS = [0.0, -0.0, math.nan, math.inf, -math.inf, 1.5, -1.5, 5e-324, -5e-324, 1e300]
INTS = [0, -1, 1, 2**62, -(2**63), 2**63 - 1, 7, 255, 256]


def keyed(value: Any, down: bool = False) -> Any:
    """What Python compares: nulls last, NaN behind numbers, text by its bytes."""
    if value is None:
        return (1,)
    if isinstance(value, float) and math.isnan(value):
        return (0, True)
    if isinstance(value, str):
        raw = value.encode()
        return (0, False, [255 - b for b in raw] + [256] if down else list(raw))
    return (0, False, -value if down else value)


def python_keys(columns: list[list[Any]], descending: Sequence[bool] = ()) -> list[Any]:
    turned = [[keyed(v, d) for v in c] for c, d in zip_longest(columns, descending, fillvalue=False)]
    return [list(row) for row in zip(*turned, strict=True)]


def python_order(columns: list[list[Any]], descending: Sequence[bool] = ()) -> list[int]:
    keys = python_keys(columns, descending)
    return sorted(range(len(keys)), key=keys.__getitem__)


@st.composite
def key_columns(draw: st.DrawFn) -> tuple[Batch, list[list[Any]]]:
    n = draw(st.integers(0, 200))
    arrays: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    seen: list[list[Any]] = []
    random = np.random.default_rng(draw(st.integers(0, 99)))
    kinds = draw(
        st.lists(st.sampled_from(["i", "i1", "u", "f", "f4", "b", "t", "M"]), min_size=1, max_size=3)
    )
    for number, kind in enumerate(kinds):
        pool: Any = {
            "i": np.array(INTS), "i1": np.array([-128, -1, 0, 127], np.int8),
            "u": np.array([0, 1, 2**63, 2**64 - 1], np.uint64), "f": np.array(FLOATS),
            "f4": np.array([0, -0.0, math.nan, 1.5, -2], np.float32), "b": np.array([True, False]),
            "t": TEXTS, "M": np.array([0, -5, 10**9], "M8[s]"),
        }[kind]  # fmt: skip
        picks = random.integers(0, draw(st.integers(1, len(pool))), n)
        name = f"c{number}"
        column = (
            Ragged.from_list([pool[i] for i in picks] or [""]).slice(0, n) if kind == "t" else pool[picks]
        )
        values = (
            column.to_list() if kind == "t" else column.astype("i8" if kind == "M" else column.dtype).tolist()
        )
        if draw(st.booleans()):
            masks[name] = random.integers(0, 3, n) > 0
            values = [v if ok else None for v, ok in zip(values, masks[name], strict=True)]
        arrays[name] = column
        seen.append(values)
    return Batch.from_dict(arrays, masks), seen


DIRECTIONS = st.lists(st.booleans(), min_size=3, max_size=3)


@given(key_columns(), DIRECTIONS)
@settings(max_examples=50, deadline=None)
def test_the_order_is_that_of_python_for_any_key_columns(
    case: tuple[Batch, list[list[Any]]], directions: list[bool]
) -> None:
    keys, columns = case
    descending = directions[: len(columns)] if any(directions) else []
    got = sorted_order(keys, descending)
    wanted = python_order(columns, descending)
    assert (list(range(len(keys))) if got is None else got.tolist()) == wanted


@given(key_columns(), st.integers(0, 6), DIRECTIONS)
@settings(max_examples=50, deadline=None)
def test_ranges_are_found_as_by_looking_at_every_cut(
    case: tuple[Batch, list[list[Any]]], size: int, directions: list[bool]
) -> None:
    keys, columns = case
    n, descending = len(keys), directions[: len(columns)]
    order = python_order(columns, descending)
    chosen = sorted(np.random.default_rng(n + size).integers(0, n, size).tolist()) if n else []
    cuts = [order[c] for c in chosen]
    tuples = python_keys(columns, descending)
    wanted = [sum((tuples[c], c) <= (tuples[i], i) for c in cuts) for i in range(n)]
    at = np.array(cuts, np.int64)
    got, counts = ranges_of(keys, keys.take(at), at, None, descending)
    assert got.tolist() == wanted
    assert counts.tolist() == [wanted.count(r) for r in range(len(cuts) + 1)]


def test_ranges_of_more_rows_than_a_block_and_of_many_cuts() -> None:
    random = np.random.default_rng(0)
    keys = random.integers(0, 400, 50_000)
    rows = np.sort(random.integers(0, 50_000, 300))
    at = rows[np.lexsort((rows, keys[rows]))]
    cuts = Batch(k=keys[at])
    got, counts = ranges_of(Batch(k=keys), cuts, at)
    place = np.empty(50_000, np.int64)
    place[np.argsort(keys, kind="stable")] = np.arange(50_000)
    wanted = np.searchsorted(place[at], place, side="right")
    assert np.array_equal(got, wanted) and np.array_equal(counts, np.bincount(wanted, minlength=301))


def shapes(n: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(n)
    return {
        "uniform": random.integers(-(2**63), 2**63 - 1, n),
        "few": random.integers(0, 7, n),
        "zipf": random.zipf(1.2, n),
        "one": np.zeros(n, np.int64),
        "one key has most rows": np.where(random.random(n) < 0.9, 5, random.integers(0, 2**50, n)),
        "far away": np.append(random.integers(0, 1000, n - 1), 2**62),
        "descending": np.arange(n)[::-1].copy(),
        "ascending": np.arange(n),
        "all scales": np.exp(random.normal(0, 20, n)).view(np.int64),
    }


@pytest.mark.parametrize("n", [1, 2, 300, 5000, 400_000])
def test_words_of_any_distribution_are_sorted_stably(n: int) -> None:
    for name, values in shapes(n).items():
        words = values.view(np.uint64)
        order = np.argsort(words, kind="stable")
        made, rows = sort_words(words)
        assert np.array_equal(made, words[order]), name
        assert np.array_equal(np.arange(n) if rows is None else rows, order), name
        assert np.array_equal(stable_order(words), order), name


def test_long_runs_of_equal_first_columns_are_sorted_by_the_second() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 3, 60_000), random.integers(0, 500, 60_000)
    assert np.array_equal(sorted_order(Batch(a=a, b=b)), np.lexsort((b, a)))
    texts = [f"prefix of everything {i:05d}" for i in b]
    assert np.array_equal(sorted_order(Batch(t=texts, a=a)), np.lexsort((a, b)))
    assert np.array_equal(sorted_order(Batch(t=texts, a=a), (True, False)), np.lexsort((a, -b)))
    assert np.array_equal(sorted_order(Batch(a=a, b=b), (False, True)), np.lexsort((-b, a)))


def test_a_first_column_that_is_in_order_leaves_only_its_ties_to_the_second() -> None:
    order = sorted_order(Batch(a=np.array([0, 0, 0, 1]), b=np.array([1, 0, 1, 0])))
    assert order is not None and order.tolist() == [1, 0, 2, 3]


def test_vectors_are_compared_element_by_element_and_bytes_by_eights() -> None:
    random = np.random.default_rng(0)
    for v in (random.integers(0, 3, (500, 10)).astype(np.uint8), random.integers(-2, 2, (500, 2, 2))):
        flat = v.reshape(500, -1)
        assert np.array_equal(sorted_order(Batch(v=v)), np.lexsort(flat.T[::-1]))
        assert np.array_equal(sorted_order(Batch(v=v), (True,)), np.lexsort(-flat.T[::-1].astype(int)))


def test_dates_without_a_time_come_last() -> None:
    days = np.array(["NaT", "2020-01-02", "1960-01-01"], "M8[D]")
    order = sorted_order(Batch(d=days))
    assert order is not None and order.tolist() == [2, 1, 0]
    ends = np.array([-(2**63), -(2**63) + 1, 2**63 - 1, 0]).view("M8[ns]")
    for descending, wanted in ((), [1, 3, 2, 0]), ((True,), [2, 3, 1, 0]):
        order = sorted_order(Batch(d=ends), descending)
        assert order is not None and order.tolist() == wanted


def test_columns_without_an_order_are_refused_by_name() -> None:
    lists = Ragged(np.array([0, 1]), np.array([1.0]), "list")
    for column in (np.zeros(1, complex), lists):
        with pytest.raises(UsageError, match=r'"z".*no order'):
            sorted_order(Batch(z=column).take(np.array([0, 0])))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(INTS), min_size=1, max_size=80), st.integers(0, 9), st.booleans())
def test_the_first_rows_in_order_are_those_of_all_rows_sorted(values: list[int], k: int, down: bool) -> None:
    keys = Batch(a=np.array(values, np.int64), b=["xyz"[v % 3] for v in values])
    order = sorted_order(keys, (down, not down))
    whole = np.arange(len(values)) if order is None else order
    found = first_in_order(keys, k, (down, not down))
    assert (np.arange(len(values)) if found is None else found)[:k].tolist() == whole[:k].tolist()
