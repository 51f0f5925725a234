"""Reach as sets of bits: both directions, on any threads, against a loop over all edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import reaching
from iterreduce.columns.link_layout import Rows
from iterreduce.columns.reaching import Reaching
from iterreduce.columns.threads import Pool

FAR = np.iinfo(np.int64).max


def rows_of(rng: np.random.Generator, sources: int, places: int, edges: int) -> Rows:
    degrees = np.bincount(rng.integers(0, sources, edges), minlength=sources)
    targets = rng.integers(0, places, edges).astype(np.uint32)
    return Rows(np.append(0, np.cumsum(degrees)), targets, {}, places)


def heard(rows: Rows, frontier: np.ndarray) -> set[int]:
    ends = [
        rows.targets[rows.offsets[s] : rows.offsets[s + 1]].tolist() for s in frontier if s < sources(rows)
    ]
    return {t for end in ends for t in end}


def sources(rows: Rows) -> int:
    return len(rows.offsets) - 1


@pytest.mark.parametrize("turned", [False, True])
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(0, 150), st.booleans())
def test_each_place_is_found_once_and_each_own_one_if_it_becomes_better(
    turned: bool, seed: int, own: int, far: int, larger: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = rows_of(rng, own, far + own + 5, int(rng.integers(0, 600)))
    found = Reaching(rows, far, "max" if larger else "min")
    found._pulls = lambda edges: turned  # type: ignore[method-assign]
    if turned:
        found.turn()
    state = rng.choice([0, 3, FAR, -FAR], own + 5)
    kept, told = False, set[int]()
    with Pool(1 + seed % 3) as pool:
        for step in (2, 3, 4, 5, 1):
            value = -step if larger else step
            if step == 1:
                told = set()  # it may be better than what was told: all are told again
            frontier = np.flatnonzero(rng.random(own + 5) < 0.3)
            found.begin(value, state, kept)
            found.follow(frontier, pool)
            if step == 4:
                found.forget()  # this step never was
                kept, told = False, set()
                continue
            reached = heard(rows, frontier)
            assert found.far().tolist() == sorted({t for t in reached if t < far} - told)
            told |= {t for t in reached if t < far}
            others = rng.integers(0, own + 5, 3)
            found.hear(others.astype(np.int32))
            wanted = {t - far for t in reached if t >= far} | set(others.tolist())
            better = [s for s in sorted(wanted) if (state[s] < value if larger else state[s] > value)]
            slots = found.own(state)
            assert slots.tolist() == better
            state[slots] = value
            kept = True


def test_threads_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "GRAIN", 64)
    rows = rows_of(np.random.default_rng(5), 3000, 4000, 40_000)
    state, frontier = np.full(3000, FAR), np.arange(0, 3000, 3)
    for turned in (False, True):
        found = Reaching(rows, 1000, "min")
        found._pulls = lambda edges, turned=turned: turned  # type: ignore[method-assign,misc]
        found.turn()
        found.begin(1, state, kept=False)
        with Pool(3) as pool:
            assert found.follow(frontier, pool) > 10_000
        both = [*found.far().tolist(), *(found.own(state) + 1000).tolist()]
        assert both == sorted(heard(rows, frontier))
