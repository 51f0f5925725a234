"""What tests of recovery share: a small loop, and what became of it where ranks died on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.events import Events
from iterreduce.loop import Local, Loop, Replace, Shuffle, State, Superstep, Total
from iterreduce.options import Options
from iterreduce.run import Result, run_loop
from iterreduce.testing import Death, Faults, Kill, run_ranks, striking
from tests.engine.kit import int_rows, local, looping

N = 61


def sums_of(rows: Any, most: int = 9, key: str = "k") -> Loop:
    """A state by key that every iteration makes anew of itself, and one number that all ranks hold."""

    def more(state: Batch, total: Batch) -> Batch:
        seen = int(total["x"][0]) if len(total) else 0
        return state.with_columns(x=(state["x"] * 3 + seen + 1) % 1009)

    step = Superstep(
        "step",
        (
            Local(more, ("s", "t"), "m", cut="share"),
            Shuffle("m", (key,), "n", {"x": ir.SUM}),
            Total("n", (), {"x": ir.SUM}, "all"),
        ),
        (Replace("s", "n"), Replace("t", "all")),
    )
    return Loop(
        "sums",
        {"r": rows, "zero": Batch(x=np.zeros(1, np.int64))},
        {"s": State("r0", (key,)), "t": State("zero")},
        (step,),
        ir.Until.of([], most),
        "s",
        prepare=(Shuffle("r", (key,), "r0", {"x": ir.SUM}),),
    )


def counted(source: Any, most: int = 6) -> Loop:
    """Every iteration goes through all rows, which stay where they were read."""

    def grown(rows: Batch, total: Batch) -> Batch:
        seen = int(total["x"][0])
        return Batch(k=rows["k"] % 7, x=(rows["x"] + seen) % 101)

    return looping(
        {"r": source, "zero": Batch(x=np.zeros(1, np.int64))},
        {"t": State("zero")},
        [
            Local(grown, ("r", "t"), "m", rank_free=True),
            Shuffle("m", ("k",), "n", {"x": ir.SUM}),
            Total("n", (), {"x": ir.SUM}, "all"),
        ],
        {"t": "all"},
        most=most,
    )


def given(group: Group) -> Any:
    return local(int_rows(N, 13).select("k", "x"), group)


def job(
    group: Group,
    faults: Sequence[Kill] = (),
    loop: Callable[[Group], Loop] = lambda group: sums_of(given(group)),
    **options: Any,
) -> Result:
    events = Events()
    with striking(Faults(tuple(faults)), events, group):
        return run_loop(loop(group), group, Options(**{"copy_every": 1, **options}), events)


def survived(size: int, deaths: Sequence[Death] = (), **more: Any) -> list[Result]:
    """The results of those who lived: all have the digest of a run in which nobody died."""
    found = run_ranks(size, job, heals=True, deaths=deaths, **more)
    assert {result.result_sha256 for result in found} == {undisturbed(more.get("loop", _sums))}
    return found


@cache
def undisturbed(loop: Callable[[Group], Loop]) -> str:
    (result,) = run_ranks(1, job, loop=loop)
    return result.result_sha256


def _sums(group: Group) -> Loop:
    return sums_of(given(group))


def origins(result: Result) -> list[str]:
    return [entry["origin"] for entry in result.recoveries]
