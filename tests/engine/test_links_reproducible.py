"""Order-free sums of indexed rows: the same bits on any number of ranks and threads, near to exact sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from iterreduce.collectives import Group
from iterreduce.columns.aggregators import max_, sum_
from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import col
from iterreduce.columns.linkfold import joined, limbs
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.linklanes import bits_for
from iterreduce.loop import Index, Joined, Local, Loop, Replace, Shuffle, State, Superstep
from iterreduce.options import Options
from iterreduce.run import run_loop
from iterreduce.testing import run_ranks
from tests.engine.kit import local

N = 600


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


def test_limbs_hold_what_a_float_holds() -> None:
    values, bits = np.array([1.0, -(2.0**-40), 3.5, 0.1]), bits_for(1000)
    high, low = limbs(values, 2.0 ** (bits - 2), bits)
    assert joined(high, low, 2.0 ** (bits - 2), bits).tolist() == values.tolist()
