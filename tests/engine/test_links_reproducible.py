"""Order-free sums of indexed rows: the same bits on any number of ranks and threads, near to exact sums."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from iterreduce.collectives import Group
from iterreduce.columns.aggregators import max_, sum_
from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import col
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import Index, Joined, Local, Loop, Replace, Shuffle, State, Superstep
from iterreduce.options import Options
from iterreduce.run import run_loop
from iterreduce.testing import run_ranks
from tests.engine.kit import local

N, MOST = 600, np.finfo(np.float64).max


def edges(special: bool) -> Batch:
    rng = np.random.default_rng(3)
    w = rng.normal(size=N)
    if special:
        w[[7, 9, 11]] = np.inf, np.nan, -np.inf
    return Batch(src=rng.integers(-40, 40, N), dst=rng.integers(-40, 50, N), w=w)


def value(key: Any) -> Any:
    """Between 1e-20 and 1e20, with both signs: sums cancel."""
    return (key % 7 + 1) * 10.0 ** (key % 41 - 20) * np.where(key % 5 == 0, -1.0, 1.0)


def program(rows: Any, key: str) -> Loop:
    outputs = {
        "plain": sum_("x"),
        "weighted": sum_(col("x") * col("w")),
        "mixed": sum_(col("x") * col("w") - col("x")),
        "largest": max_(col("x") * col("w")),
    }

    def start(keys: Batch) -> Batch:
        return keys.with_columns(x=value(keys["k"]), **{name: np.zeros(len(keys)) for name in outputs})

    def keep(heard: Batch, state: Batch) -> Batch:
        return state.with_columns(**{name: heard[name] for name in outputs})

    on = "src" if key == "dst" else "dst"
    return Loop(
        "sums",
        {"edges": rows},
        {"state": State("start", ("k",))},
        (
            Superstep(
                "step",
                (
                    Shuffle("links", (key,), "heard", outputs, onto="state", joined=Joined("state", on)),
                    Local(keep, ("heard", "state"), "new", cut="share"),
                ),
                (Replace("state", "new"),),
            ),
        ),
        Until((MaxIterations(2),)),
        "state",
        prepare=(
            Index("edges", {"src": "keys", "dst": "keys"}, "links", {"keys": "k"}),
            Local(start, ("keys",), "start", cut="share"),
        ),
    )


def result(group: Group, key: str, special: bool, **options: Any) -> tuple[str, list[tuple[Any, ...]]]:
    made = run_loop(program(local(edges(special), group), key), group, Options(reproducible=True, **options))
    columns = [made.batch[name].tolist() for name in ("k", "plain", "weighted", "mixed")]
    return made.result_sha256, list(zip(*columns, strict=True))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("key", ["dst", "src"])
def test_sums_have_the_same_bits_on_any_ranks_and_threads(key: str, special: bool) -> None:
    seen = set()
    for size, threads, naive in [(1, 1, False), (2, 2, True), (3, 1, False), (5, 2, False), (8, 1, True)]:
        found = run_ranks(size, result, key, special, threads=threads, naive=naive)
        seen.add(found[0][0])
    assert len(seen) == 1


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("key", ["dst", "src"])
def test_sums_are_near_to_exact_ones(key: str, special: bool) -> None:
    rows = edges(special)
    near, far = (rows["dst"], rows["src"]) if key == "dst" else (rows["src"], rows["dst"])
    x = value(far)
    for k, *sums in itertools.chain(*(part for _, part in run_ranks(3, result, key, special))):
        mine = near == k
        for got, addends in zip(sums, (x, x * rows["w"], x * rows["w"] - x), strict=True):
            exact = _sum(addends[mine])
            room = 4e-16 * float(np.abs(addends[np.isfinite(addends)]).max()) if special or mine.any() else 0
            assert (got == exact) or (math.isnan(got) and math.isnan(exact)) or abs(got - exact) <= room


def _sum(addends: Any) -> float:
    values = addends.tolist()
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def test_infinite_values_that_no_row_starts_from_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: Group) -> tuple[bytes, int]:
        made = run_loop(program(local(edges(False), group), "dst"), group, Options(reproducible=True))
        return np.asarray(made["plain"]).tobytes(), made.bytes_exchanged["total"]

    finite, plain = run_ranks(2, work), value
    monkeypatch.setitem(globals(), "value", lambda key: np.where(key >= 40, np.inf, plain(key)))
    assert run_ranks(2, work) == finite


ENDS = {
    "zeros": lambda key: key * 0.0,
    "least": lambda key: key * 5e-324,
    "largest": lambda key: np.where(key % 3 == 0, 1.7e308, -1.1e308) * (1 - key % 2 * 1e-3),
}


@pytest.mark.parametrize("values", sorted(ENDS))
def test_sums_at_the_ends_of_float64_are_near_to_exact_ones(
    values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "value", ENDS[values])
    rows = edges(False)
    x = value(rows["src"])
    room = 4e-16 * float(np.abs(x).max()) if values == "largest" else 0
    for k, plain, *_ in itertools.chain(*(part for _, part in run_ranks(2, result, "dst", False))):
        exact = sum(map(Fraction, x[rows["dst"] == k].tolist()), Fraction())
        assert abs(Fraction(plain) - exact) <= room if abs(exact) < MOST else math.isinf(plain)


def touched(group: Group) -> list[tuple[int, float, float]]:
    """The sums that rows with an even source make, of the keys that have any."""
    made = program(local(edges(False), group), "dst")
    (step,) = made.body
    shuffle, _ = step.stages
    some = Local(lambda state: state.filter(state["k"] % 2 == 0), ("state",), "some", cut="share")
    shuffle = replace(shuffle, touched=True, joined=Joined("some", "src"))

    def put(state: Batch, heard: Batch) -> Batch:
        rows = np.isin(state["k"], heard["k"])
        order = np.argsort(heard["k"])[np.argsort(np.argsort(state["k"][rows]))]
        new = {name: state[name].copy() for name in ("plain", "weighted", "mixed", "largest")}
        for name, column in new.items():
            column[rows] = heard[name][order]
        return state.with_columns(**new)

    body = (replace(step, stages=(some, shuffle, Local(put, ("state", "heard"), "new", cut="share"))),)
    found = run_loop(replace(made, body=body), group, Options(reproducible=True)).batch
    return list(zip(*(found[name].tolist() for name in ("k", "plain", "weighted")), strict=True))


def test_sums_of_rows_that_some_keys_start_have_the_same_bits_on_any_ranks() -> None:
    rows = edges(False)
    alone, apart = (sorted(itertools.chain(*run_ranks(size, touched))) for size in (1, 3))
    assert alone == apart
    x = value(rows["src"])
    for k, *sums in alone:
        mine = (rows["dst"] == k) & (rows["src"] % 2 == 0)
        for got, addends in zip(sums, (x, x * rows["w"]), strict=True):
            assert abs(got - math.fsum(addends[mine])) <= 4e-16 * float(np.abs(addends).max())
