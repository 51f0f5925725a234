"""Library use on threads as ranks: see `checks_library`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.aggregators import SUM
from iterreduce.columns.batch import Batch
from iterreduce.errors import UsageError
from iterreduce.fixpoint import Empty, MaxIterations, Until
from iterreduce.frontends.mapreduce import MapReduce
from iterreduce.loop import Carry, Local, Lookup, Loop, Shuffle, State, Superstep, Total
from iterreduce.testing import run_ranks
from tests.engine import checks_library
from tests.engine.kit import Check, int_rows, local, once, raised


@pytest.mark.parametrize(
    "check", checks_library.CHECKS, ids=lambda check: check.__name__.removeprefix("check_")
)
def test_library(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)


def test_stages_in_another_order_are_found_under_check() -> None:
    def work(group: Group) -> None:
        stages = (Shuffle("r", ("k",), "t", ir.SUM), Total("r", ("k",), ir.SUM, "u"))
        mine = stages if group.rank else stages[::-1]
        source = {"r": local(int_rows(30, 4), group)}
        raised(group, ir.ScheduleError, lambda: once(group, source, *mine, options=ir.Options(check=True)))

    run_ranks(3, work)


@pytest.mark.parametrize("reduce", [ir.COLLECT, {"x": ir.collect("x")}], ids=["COLLECT", "collect"])
def test_lists_are_collected_by_key(reduce: object) -> None:
    def work(group: Group) -> list[list[int]]:
        handle = ir.MapReduce(reduce=reduce, key="k")(
            ir.Dataset.from_local(group, k=np.array([1, 2, 1]), x=np.arange(3) + 10 * group.rank)
        )  # type: ignore[arg-type]
        got: Batch = handle.collect()
        return sorted((rows.tolist() for rows in got["x"].to_list()), key=len)

    assert run_ranks(2, work)[0] == [[1, 11], [0, 2, 10, 12]]


@pytest.mark.parametrize("reduce", [ir.MIN, ir.FIRST], ids=["MIN", "FIRST"])
def test_text_can_be_reduced(reduce: object) -> None:
    got = ir.MapReduce(reduce=reduce, key="k")(
        ir.Dataset.from_local(None, k=np.array([1, 2, 1]), x=["a", "b", "c"])
    ).collect()  # type: ignore[arg-type]
    assert sorted(got["x"].to_list()) == ["a", "b"]


def _two(a: Batch, b: Batch) -> Batch:
    return a


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"body": Superstep("s", ())}, "of one thing (a superstep"),
        ({"body": (Superstep("s", Total("x", (), SUM, "t")),)}, "of one thing (a stage"),  # type: ignore[arg-type]
        ({"until": MaxIterations(1)}, "ir.Until.of"),
        ({"until": Until((Empty(),))}, ".on('s')"),
        ({"state": {"s": State("x", "k")}}, '("k",)'),  # type: ignore[arg-type]
        ({"body": (Superstep("s", (Shuffle("x", "k", "y"),)),)}, '("k",)'),  # type: ignore[arg-type]
        ({"body": (Superstep("s", (Local(len, ("x",), "y", cut="shares"),)),)}, '"block" or "share"'),  # type: ignore[arg-type]
        ({"state": {"s": State("o")}}, "in its outer"),
        ({"body": (Superstep("s", (Local(_two, ("x",), "y"),)),)}, "is called with (x): missing"),
        ({"body": (Superstep("s", (Local(_two, ("x", "s", "x"), "y"),)),)}, "(x, s, x): too many"),
        ({"body": (Superstep("s", (), (), _two),)}, "when: _two"),  # type: ignore[arg-type]
        ({"body": (Superstep("s", (), (), True),)}, "when is a function of the carry, got bool"),  # type: ignore[arg-type]
        ({"body": (Superstep("s", (Shuffle("x", ("k",), "y", sum),)),)}, "got Python's sum; write ir.SUM"),  # type: ignore[arg-type]
        ({"body": (Superstep("s", (Total("x", (), {"n": len}, "y"),)),)}, 'for "n", got Python\'s len'),  # type: ignore[dict-item]
        ({"body": (Superstep("s", (Shuffle("x", ("k",), "y", {3: SUM}),)),)}, "names of columns, got 3"),  # type: ignore[dict-item]
        (
            {"body": (Superstep("s", (Shuffle("x", ("k",), "y", SUM, onto="s", missing="dorp"),)),)},  # type: ignore[arg-type]
            "missing is 'dorp'",
        ),
        ({"body": (Superstep("s", (Lookup("x", ("k",), "s", (), "y", "nul"),)),)}, "missing is 'nul'"),  # type: ignore[arg-type]
    ],
)
def test_a_loop_that_is_written_wrongly_says_what_to_write(change: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {
        "sources": {"x": Batch(k=np.arange(3))},
        "state": {"s": State("x")},
        "body": (Superstep("step", ()),),
        "until": Until((MaxIterations(1),)),
    }
    Loop("l", **right, result="s")
    with pytest.raises(UsageError) as caught:
        Loop("l", **{**right, **change}, result="s")
    assert said in str(caught.value)


@pytest.mark.parametrize("initial", ["a", None, math.nan, math.inf, 0.5, 2**63, -(2**63) - 1])
def test_a_carry_of_whole_numbers_starts_from_one(initial: Any) -> None:
    with pytest.raises(UsageError, match="a carry"):
        Carry(SUM, initial, dtype="int64")
    assert Carry(SUM, 2.0, dtype="int64").initial == 2


def test_pythons_own_sum_is_no_aggregator() -> None:
    with pytest.raises(UsageError, match=r"write ir\.SUM"):
        MapReduce(reduce=sum, key="k")
    with pytest.raises(UsageError, match=r"_two.* is called with \(groups\): missing"):
        MapReduce(reduce=_two, key="k")
