"""Levels one behind another, in either direction, on any threads, against a slow loop over all edges."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import spreading
from iterreduce.columns.link_layout import Rows
from iterreduce.columns.spreading import Spreading
from iterreduce.columns.threads import Pool
from tests.columns.test_reaching import FAR, rows_of


def slowly(rows: Rows, state: np.ndarray, frontier: np.ndarray, values: list[int], sign: int) -> list[int]:
    """What all have in the end: the values that are told, one level after another."""
    end, ahead = state.tolist(), frontier.tolist()
    for value in values:
        heard = {
            t
            for s in ahead
            if s + 1 < len(rows.offsets)
            for t in rows.targets[rows.offsets[s] : rows.offsets[s + 1]].tolist()
        }
        ahead = sorted(t for t in heard if sign * value < sign * end[t])
        for t in ahead:
            end[t] = value
    return end


@pytest.mark.parametrize("many", [1, 40, 1 << 40])
@pytest.mark.parametrize("turned", [False, True])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.booleans())
def test_levels_end_where_a_slow_loop_ends(
    many: int, turned: bool, seed: int, own: int, larger: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows, sign = rows_of(rng, own, own + 5, int(rng.integers(0, 300))), -1 if larger else 1
    state = sign * rng.choice([0, 4, 6, FAR, FAR], own + 5)
    frontier = np.flatnonzero(rng.random(own + 5) < 0.1)
    values = sign * np.array([[1, 1, 1, 1], [2, 3, 5, 5], [3, 4, 5, 9]][seed % 3])
    found = Spreading(rows, 0, "max" if larger else "min")
    if turned:
        found.turn()
    found._pulls = lambda edges: turned  # type: ignore[method-assign]
    cut, end = 1 + seed % 4, slowly(rows, state, frontier, values.tolist(), sign)
    with mock.patch.object(spreading, "MANY", many), Pool(1 + seed % 3) as pool:
        for repeat in range(2):  # the second time beside what is known
            found.spread(frontier, values[:cut], state, pool, kept=repeat > 0)
            if len(found.untold):
                found.go_on(values[cut:], state, pool)
            slots, heard = found.improved()
            better = np.flatnonzero(np.array(end) != state)
            assert slots.tolist() == better.tolist()
            assert heard.tolist() == np.array(end)[better].tolist()
            assert set(found.untold.tolist()) <= set(slots.tolist())
            state[slots] = heard


def test_values_are_told_as_long_as_they_become_no_better() -> None:
    from iterreduce.columns.jit import inlined

    @inlined
    def halved(x: int) -> int:
        return x // 2

    rows = Rows(np.array([0, 1]), np.array([0], np.uint32), {}, 1)
    assert Spreading(rows, 0, "max").values(halved, 9, 5).tolist() == [4, 2, 1, 0, 0]
    assert Spreading(rows, 0, "min").values(halved, 9, 5).tolist() == [4]
    assert Spreading(rows, 0, "min").values(halved, 0, 3).tolist() == [0, 0, 0]


def test_edges_of_a_path_are_followed_once() -> None:
    n = 100_000
    rows = Rows(np.arange(n + 1), np.append(np.arange(1, n), n - 1).astype(np.uint32), {}, n)
    found, state = Spreading(rows, 0, "min"), np.full(n, FAR)
    state[0] = 0
    with Pool(1) as pool:
        assert found.spread(np.array([0]), np.arange(1, 200_000), state, pool) == n
    slots, values = found.improved()
    assert slots.tolist() == values.tolist() == list(range(1, n))
    assert len(found.untold) == 0
