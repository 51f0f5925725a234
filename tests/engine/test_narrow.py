"""One integer key of 8 bytes and one sum: whatever keys come, sums are those of a slow, obvious loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce import slots
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.errors import UsageError
from iterreduce.loop import Local, Shuffle, State
from iterreduce.sources import LocalSource
from iterreduce.testing import run_ranks
from tests.engine.kit import local, looping, raised, rows_of, started
from tests.engine.test_directory import slots_of, work_of

Script = Callable[[int, int], Batch]  # (rank, iteration) -> rows of k and x
TABLE = np.arange(0, 120, 3)


def narrow_run(
    group: Group, script: Script, table: np.ndarray | None, missing: Any = "drop", memory: int | None = None
) -> LoopRun:
    """Sums of the script's rows by key, onto a table of these keys or not."""

    def make(r: Batch, clock: Batch) -> Batch:
        return script(group.rank, int(clock["i"][0]))

    onto = None if table is None else "table"
    stages = [
        Local(make, ("r", "clock"), "m", "share"),
        Shuffle("m", ("k",), "h", {"x": ir.sum("x")}, onto, missing),
        Local(lambda h: h.with_columns(x=h["x"]), ("h",), "n", "share"),
        Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "c"),
    ]
    sources: dict[str, Any] = {"r": LocalSource(Batch(z=np.zeros(1))), "zero": Batch(i=np.zeros(1, np.int64))}
    state = {"clock": State("zero"), "out": State("")}
    if table is not None:
        sources["t"] = local(Batch(k=table), group)
        state["table"] = State("t", ("k",))
    return started(looping(sources, state, stages, {"clock": "c", "out": "n"}, most=30), group)


def slow_sums(group: Group, script: Script, iteration: int, table: np.ndarray | None) -> dict[int, float]:
    """Row by row, in rank order."""
    sums: dict[int, float] = {} if table is None else dict.fromkeys(table.tolist(), 0)
    for rank in range(group.size):
        rows = script(rank, iteration)
        for k, x in zip(rows["k"].tolist(), rows["x"].tolist(), strict=True):
            if table is None or k in sums:
                sums[k] = sums.get(k, 0) + x
    return sums


def assert_sums(group: Group, script: Script, table: np.ndarray | None, iterations: int) -> LoopRun:
    run = narrow_run(group, script, table)
    for i in range(iterations):
        run.advance()
        made = dict(rows_of(group, run.tables["out"]))
        wanted = slow_sums(group, script, i, table)
        assert made.keys() == wanted.keys(), i
        assert all(np.isclose(made[k], wanted[k], rtol=1e-12) for k in wanted), i
    return run


def drifting(key: Any, scale: int) -> Script:
    """Some keys stay, some come once; a rank may have no rows."""

    def script(rank: int, iteration: int) -> Batch:
        rng = np.random.default_rng([rank, iteration])
        n = 0 if (rank + iteration) % 4 == 3 else 60
        numbers = np.concatenate([np.arange(n), 100 + 7 * iteration + np.arange(n // 6)]) * scale
        return Batch(k=rng.permutation(numbers).astype(key), x=rng.random(len(numbers)))

    return script


@pytest.mark.parametrize("key", [np.int64, np.uint64])
@pytest.mark.parametrize("scale", [1, 10**12])
@pytest.mark.parametrize("onto", [False, True])
def test_sums_of_few_rows_are_those_of_a_slow_loop(key: Any, scale: int, onto: bool, ranks: int) -> None:
    def check(group: Group) -> None:
        table = (TABLE * scale).astype(key) if onto else None
        run = assert_sums(group, drifting(key, scale), table, 6)
        assert work_of(run).combiner.outputs.narrow == np.float64  # type: ignore[union-attr]
        assert slots_of(run).grown == 0, "too few rows to number their keys"

    run_ranks(ranks, check)


def test_integers_are_summed_as_integers(ranks: int) -> None:
    def script(rank: int, iteration: int) -> Batch:
        return Batch(k=np.arange(rank, 40), x=np.full(40 - rank, 2**53 + 1))

    def check(group: Group) -> None:
        run = narrow_run(group, script, np.arange(40))
        for _ in range(3):
            run.advance()
        made = dict(rows_of(group, run.tables["out"]))
        assert made[39] == group.size * (2**53 + 1)

    run_ranks(ranks, check)


def test_rows_that_outgrow_their_slot_come_all_the_same() -> None:
    """40 rows, then 20,000 in a second exchange, then 40 again."""

    def script(rank: int, iteration: int) -> Batch:
        n = 20_000 if iteration == 2 else 40
        return Batch(k=np.arange(rank, 3 * n, 3), x=np.ones(n))

    def check(group: Group) -> None:
        assert_sums(group, script, np.arange(0, 60_000, 7), 4)
        assert_sums(group, script, None, 4)

    run_ranks(2, check)


def test_a_stray_key_is_named_among_few_rows(ranks: int) -> None:
    def script(rank: int, iteration: int) -> Batch:
        return Batch(
            k=np.arange(0, 30) if iteration < 3 or rank else np.arange(1, 32),
            x=np.ones(30 + (iteration >= 3 and not rank)),
        )

    def check(group: Group) -> None:
        run = narrow_run(group, script, np.arange(30), "error")
        for _ in range(3):
            run.advance()
        before = rows_of(group, run.tables["out"])
        error = raised(group, UsageError, run.advance)
        assert "not in it, such as k=3" in str(error)
        assert rows_of(group, run.tables["out"]) == before, "rolled back"

    run_ranks(ranks, check)


def test_many_rows_learn_a_directory_and_few_do_not() -> None:
    """The border is a number of rows on all ranks together, whatever share one rank has."""

    def script(rank: int, iteration: int) -> Batch:
        n = slots.FEWEST_NARROW if rank == 0 and iteration >= 3 else 10
        return Batch(k=np.arange(n) * 10**9, x=np.ones(n))

    def check(group: Group) -> None:
        run, grown = narrow_run(group, script, None), []
        for _ in range(6):
            run.advance()
            grown.append(slots_of(run).grown)
        assert grown[:3] == [0, 0, 0] and grown[-1] == 1
        assert dict(rows_of(group, run.tables["out"])) == slow_sums(group, script, 5, None)

    run_ranks(3, check)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda size: st.lists(
            st.lists(st.lists(st.integers(-20, 20), max_size=9), min_size=size, max_size=size),
            min_size=2,
            max_size=5,
        )
    ),
    st.booleans(),
)
def test_any_few_rows_in_any_iteration(schedule: list[list[list[int]]], onto: bool) -> None:
    def script(rank: int, iteration: int) -> Batch:
        keys = np.array(schedule[iteration][rank], np.int64)
        return Batch(k=keys, x=np.arange(len(keys)) + 0.5)

    def check(group: Group) -> None:
        assert_sums(group, script, np.arange(-10, 11, 2) if onto else None, len(schedule))

    run_ranks(len(schedule[0]), check)
