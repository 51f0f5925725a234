"""Values that settle along edges, against a loop over all edges that ends when nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.expressions import col, minimum
from iterreduce.columns.linkfold import edge_function
from iterreduce.columns.links import Links
from iterreduce.columns.settling import AHEAD, Settling

SOURCES, KEYS, FAR = 90, 100, 13
EDGES: dict[str, tuple[Any, Any]] = {
    "x": ("x", lambda x, w: x),
    "x+w": ("x+w", lambda x, w: x + w),
    "x-w": ("x-w", lambda x, w: x - w),
    "another": (edge_function(minimum(col("v0"), 5) + col("v1"), ("v0", "v1")), lambda x, w: min(x, 5) + w),
}


def links_of(rng: np.random.Generator, n: int, dtype: Any, columns: bool) -> tuple[Links, list[Any]]:
    """Edges from sources to places: keys of others first, then ours, of which the sources are the first."""
    sources = np.sort(rng.integers(0, SOURCES, n))
    targets, w = rng.integers(0, FAR + KEYS, n), rng.integers(0, 9, n).astype(dtype)
    links = Links.build(sources, targets, SOURCES, FAR + KEYS, {"w": w} if columns else None)
    return links, list(zip(sources.tolist(), targets.tolist(), w.tolist(), strict=True))


def slowly(
    edges: list[Any], state: list[Any], told: dict[int, Any], value: Any, better: Any, worst: Any
) -> list[Any]:
    """All values when nothing changes any more; sources tell if they are asked to, or improved."""
    x = [worst] * FAR + state
    for s, v in told.items():
        x[FAR + s] = better(v, x[FAR + s])
    tell = set(told)
    while tell:
        s = tell.pop()
        for a, t, w in edges:
            v = value(x[FAR + s], w)
            if a == s and better(v, x[t]) != x[t]:
                x[t] = v
                if 0 <= t - FAR < SOURCES:
                    tell.add(t - FAR)
    return x


CASES = [
    ("min", "x", np.int64), ("min", "x+w", np.int64), ("max", "x-w", np.int64), ("max", "x", np.float64),
    ("min", "x+w", np.float64), ("min", "another", np.float64),
]  # fmt: skip


@pytest.mark.parametrize(("combine", "edge", "dtype"), CASES)
def test_what_settles_is_what_a_loop_over_all_edges_ends_with(combine: str, edge: str, dtype: Any) -> None:
    better, worst = (min, np.iinfo(np.int64).max) if combine == "min" else (max, np.iinfo(np.int64).min)
    function, value = EDGES[edge]

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**32), st.integers(0, 400), st.integers(0, SOURCES))
    def check(seed: int, n: int, speaking: int) -> None:
        rng = np.random.default_rng(seed)
        links, edges = links_of(rng, n, dtype, edge != "x")
        work = Settling(links, FAR, combine, np.dtype(dtype), function, ("w",) if edge != "x" else ())
        for _ in range(3):  # memory is used again
            state = rng.integers(-50, 50, KEYS).astype(dtype)
            sources = rng.permutation(SOURCES)[:speaking]
            values = rng.integers(-60, 60, speaking).astype(dtype)
            work.begin(state)
            work.put(sources, values)
            work.tell()
            told = dict(zip(sources.tolist(), values.tolist(), strict=True))
            end = worst if dtype == np.int64 else float("inf" if combine == "min" else "-inf")
            want = np.array(slowly(edges, state.tolist(), told, value, better, end), dtype)
            before = np.concatenate([np.full(FAR, end, dtype), state])
            for s, v in told.items():  # what a source was put in with is no improvement
                before[FAR + s] = better(v, before[FAR + s])
            improved = work.improved(0, FAR + KEYS)
            assert improved.tolist() == np.flatnonzero(want != before).tolist()
            assert work.values[improved].tolist() == want[improved].tolist() and work.told(improved).all()

    check()


def test_work_that_ends_too_soon_goes_on_from_what_still_waits() -> None:
    rng = np.random.default_rng(5)
    links, edges = links_of(rng, 700, np.int64, True)
    work = Settling(links, FAR, "min", np.dtype(np.int64), "x+w", ("w",))
    state, sources = np.full(KEYS, 99), np.arange(SOURCES)[:3]
    want = slowly(edges, state.tolist(), dict.fromkeys(sources.tolist(), 0), EDGES["x+w"][1], min, 2**63 - 1)
    state[sources] = 0
    far, values, rounds = np.full(FAR, 2**63 - 1), np.zeros(3, np.int64), 0
    while len(sources):
        work.begin(state)
        work.put(sources, values)
        assert work.tell(100) <= 100 + np.diff(links.offsets).max()
        places = work.improved(0, FAR + KEYS)
        others, own = places[places < FAR], places[places >= FAR]
        far[others] = np.minimum(far[others], work.values[others])
        state[own - FAR] = work.values[own]
        waiting = own[~work.told(own)]
        sources, values, rounds = waiting - FAR, work.values[waiting], rounds + 1
    assert state.tolist() == want[FAR:] and far.tolist() == want[:FAR] and rounds > 3


def test_values_that_come_from_elsewhere_wait_to_be_told() -> None:
    links = Links.build(np.array([0, 1]), np.array([1, 2]), 2, 3)
    work = Settling(links, 0, "max", np.dtype(np.float64), "x")
    work.begin(np.array([0.0, 1.0, 2.0]))
    work.put(np.array([0]), np.array([1.5]))
    assert work.tell() == 2 and work.improved(0, 3).tolist() == [1]
    for _ in range(2):  # from two ranks
        work.take(np.array([0, 1, 2], np.int32), np.array([1.0, 7.0, 8.0]))
    places = work.improved(0, 3)
    assert places.tolist() == [1, 2] and work.values[places].tolist() == [7.0, 8.0]
    assert work.told(places).tolist() == [False, True]  # nothing starts from the last key
    work.begin(np.array([0.0, 1.0, 2.0]))
    assert len(work.improved(0, 3)) == 0


def test_a_long_path_is_walked_in_one_go_and_only_the_blocks_on_it_are_read() -> None:
    n = 1000 * AHEAD
    links = Links.build(np.arange(n - 1), np.arange(1, n), n - 1, n)
    work = Settling(links, 0, "min", np.dtype(np.int64), "x")
    state = np.arange(n)
    work.begin(state)
    work.put(np.array([n - 100]), np.array([0]))
    assert work.tell() == 99 and work.improved(0, n).tolist() == list(range(n - 99, n))
    state[:64] = -1  # nothing looks at them
    work.begin(state)
    work.put(np.array([0]), np.array([-5]))
    assert work.tell() == n - 1 and (work.values == -5).all()


def test_nan_is_told_to_nobody_and_zeros_are_equal() -> None:
    links = Links.build(np.array([0, 1, 2]), np.array([1, 2, 0]), 3, 3)
    work = Settling(links, 0, "min", np.dtype(np.float64), "x")
    work.begin(np.array([0.0, -0.0, np.inf]))
    work.put(np.array([0, 1]), np.array([np.nan, -0.0]))
    work.tell()
    assert work.improved(0, 3).tolist() == [2] and work.values[2] == 0
