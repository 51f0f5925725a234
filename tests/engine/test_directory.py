"""Key directories: whatever keys come, from whom and when, results have the bits of sending all keys.

Two runs of one loop are compared after every iteration, one of them with directories off; which rows a rank
has in an iteration is said by a function of both (a `Script`). One test compares with a slow, obvious sum.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce import slots
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.ragged import Ragged
from iterreduce.driver import LoopRun
from iterreduce.errors import UsageError, UserCodeError
from iterreduce.exchange import EXTRA, HEADER_WORDS, ROWS, WORDS
from iterreduce.loop import Local, Loop, Shuffle, State
from iterreduce.shuffle import CombineShuffle
from iterreduce.slots import Slots
from iterreduce.sources import LocalSource
from iterreduce.testing import run_ranks
from tests.engine.kit import local, looping, raised, started

Script = Callable[[int, int], Batch]  # (rank, iteration) -> rows

KINDS = ("int", "text", "pair", "nulls", "null ints", "float")
ALL = {
    "sum": ir.sum("f"), "low": ir.min("f"), "high": ir.max("f"), "n": ir.count(), "mean": ir.mean("f"),
    "var": ir.var("f"), "any": ir.any("b"), "all": ir.all("b"), "first": ir.first("f"), "last": ir.last("f"),
    "at": ir.argmin("x", by="f"), "top": ir.argmax("x", by="f"), "total": ir.sum("x"), "some": ir.sum("m"),
}  # fmt: skip
KEYS = {"pair": ("k", "w")}


def keys_of(kind: str, numbers: np.ndarray) -> Batch:
    """Key columns of some kind; equal numbers make equal keys."""
    text = [f"key {'x' * (int(n) % 7)}{n}" for n in numbers] or Ragged.from_list(["a"]).slice(0, 0)
    match kind:
        case "int":
            return Batch(k=numbers * 1_000_003 - 10**12)
        case "text":
            return Batch(k=text)
        case "pair":
            return Batch(k=numbers % 5, w=text)
        case "nulls":
            return Batch.from_dict({"k": text}, {"k": numbers % 11 > 0})
        case "null ints":
            return Batch.from_dict({"k": numbers}, {"k": numbers % 11 > 0})
        case _:
            return Batch(k=np.where(numbers % 9 == 0, -0.0, numbers / 7))


def rows_of_keys(kind: str, numbers: np.ndarray, seed: Any) -> Batch:
    """Rows whose float sums tell in which order they were added."""
    random, n = np.random.default_rng(seed), len(numbers)
    f = random.choice([1e16, 1.0, -1e16, 0.1, -0.0, 3e-9], n) * random.random(n)
    columns = {"f": f, "x": random.integers(-9, 9, n), "b": random.random(n) < 0.3, "m": random.random(n)}
    return keys_of(kind, numbers).with_columns(**columns).with_valid(m=random.random(n) < 0.7)


def drifting(kind: str, most: int = 200) -> Script:
    """Keys that recur, drift, vanish and come back, appear late; now and then a rank has no row."""

    def script(rank: int, iteration: int) -> Batch:
        random = np.random.default_rng([rank, iteration])
        numbers = random.permutation(np.arange(iteration * 3, iteration * 3 + most))[: most * 2 // 3]
        if iteration % 4 == 3:
            numbers = numbers[numbers % 2 == 0]
        if iteration >= 5:
            numbers = np.concatenate([numbers, 10_000 + np.arange(20)])
        if (rank + iteration) % 5 == 0:
            numbers = numbers[:0]
        return rows_of_keys(kind, np.concatenate([numbers, numbers[::3]]), [rank, iteration])

    return script


def the_loop(
    group: Group,
    script: Script,
    kind: str = "int",
    onto: Batch | None = None,
    late: Callable[[int], None] = lambda i: None,
    most: int = 12,
) -> Loop:
    """Rows by the script, a combining shuffle, and a map behind it that may fail."""

    def make(r: Batch, clock: Batch) -> Batch:
        return script(group.rank, int(clock["i"][0]))

    def after(made: Batch, clock: Batch) -> Batch:
        late(int(clock["i"][0]))
        return made

    key = KEYS.get(kind, ("k",))
    stages = [
        Local(make, ("r", "clock"), "m", "share"),
        Shuffle(
            "m", key, "h", ALL, None if onto is None else "table", "drop" if onto is not None else "error"
        ),
        Local(after, ("h", "clock"), "n", "share"),
        Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "c"),
    ]
    sources: dict[str, Any] = {"r": LocalSource(Batch(z=np.zeros(1))), "zero": Batch(i=np.zeros(1, np.int64))}
    state = {"clock": State("zero"), "out": State("")}
    if onto is not None:
        sources["t"] = local(onto, group)
        state["table"] = State("t", key)
    return looping(sources, state, stages, {"clock": "c", "out": "n"}, most=most)


def work_of(run: LoopRun) -> CombineShuffle:
    works = [getattr(work, "folding", work) for work in run.shop.exchangers]
    return next(work for work in works if isinstance(work, CombineShuffle))


def slots_of(run: LoopRun) -> Slots:
    return work_of(run).slots


def bits(batch: Batch) -> dict[str, Any]:
    """All that there is of a batch, byte by byte; what lies under a mask does not count."""
    out: dict[str, Any] = {}
    for name in batch.names:
        column, mask = batch[name], batch.valid(name)
        kept = np.arange(len(batch)) if mask is None else np.flatnonzero(mask)
        out[name] = (
            None if mask is None else mask.tobytes(),
            column.take(kept).to_list() if isinstance(column, Ragged) else column[kept].tobytes(),
        )
    return out


def pair_of_runs(loop: Callable[[], Loop], group: Group, **options: Any) -> tuple[LoopRun, LoopRun]:
    """The same loop with directories and without."""
    ours, plain = started(loop(), group, check=True, **options), started(loop(), group, check=True)
    slots_of(plain).enabled = False
    return ours, plain


def assert_alike(ours: LoopRun, plain: LoopRun, iterations: int) -> None:
    for _ in range(iterations):
        ours.advance()
        plain.advance()
        assert bits(ours.tables["out"].batch) == bits(plain.tables["out"].batch), ours.iteration


@pytest.mark.parametrize("kind", KINDS)
def test_results_have_the_bits_of_sending_all_keys(kind: str, ranks: int) -> None:
    def check(group: Group) -> None:
        ours, plain = pair_of_runs(lambda: the_loop(group, drifting(kind), kind), group)
        assert_alike(ours, plain, 10)
        assert slots_of(plain).rows_by_slot == 0
        if group.size > 1:
            assert slots_of(ours).rows_by_slot > slots_of(ours).rows_by_key / 2
            assert slots_of(ours).words_sent < slots_of(plain).words_sent
            assert slots_of(ours).rows_by_slot + slots_of(ours).rows_by_key == slots_of(plain).rows_by_key

    run_ranks(ranks, check)


def test_results_equal_a_slow_sum(ranks: int) -> None:
    script = drifting("text")

    def check(group: Group) -> None:
        run = started(the_loop(group, script, "text"), group)
        for iteration in range(8):
            run.advance()
            sums: dict[str, int] = {}
            for rank in range(group.size):
                rows = script(rank, iteration)
                for k, x in zip(rows["k"].to_list(), rows["x"].tolist(), strict=True):
                    sums[k] = sums.get(k, 0) + x
            mine = run.tables["out"].batch
            got = dict(zip(mine["k"].to_list(), mine["total"].tolist(), strict=True))
            assert got.items() <= sums.items()
            assert group.agree_max(-len(got)) <= 0
            assert sum(int(n) for n in group.allgather_bytes(str(len(got)).encode())) == len(sums)

    run_ranks(ranks, check)


@pytest.mark.parametrize("kind", ["int", "text", "nulls"])
def test_onto_a_table_that_lacks_some_keys(kind: str, ranks: int) -> None:
    table = keys_of(kind, np.array([n for n in range(160) if n % 3 and n % 11]))

    def check(group: Group) -> None:
        ours, plain = pair_of_runs(lambda: the_loop(group, drifting(kind), kind, table), group)
        assert_alike(ours, plain, 8)
        assert group.size == 1 or slots_of(ours).rows_by_slot > 0

    run_ranks(ranks, check)


def test_a_known_key_that_the_table_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is known by number when the table loses it."""
    monkeypatch.setattr(slots, "FEWEST_NARROW", 0)
    numbers = np.arange(100)

    def check(group: Group) -> None:
        def fewer(t: Batch, c: Batch) -> Batch:
            return t.take(t["k"] != 77) if c["i"][0] == 4 else t

        stages = [
            Local(lambda r, c: Batch(k=numbers, x=numbers), ("r", "clock"), "m", "share"),
            Shuffle("m", ("k",), "h", {"x": ir.sum("x")}, "table"),
            Local(fewer, ("table", "clock"), "t", "share"),
            Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "c"),
        ]
        sources = {
            "r": LocalSource(Batch(z=np.zeros(1))),
            "zero": Batch(i=np.zeros(1, np.int64)),
            "t0": local(Batch(k=numbers), group),
        }
        run = started(
            looping(
                sources,
                {"clock": State("zero"), "table": State("t0", ("k",))},
                stages,
                {"clock": "c", "table": "t"},
                most=9,
            ),
            group,
        )
        for _ in range(5):
            run.advance()
        assert slots_of(run).rows_by_slot == 300
        error = raised(group, UsageError, run.advance)
        assert "1 keys sent are not in it, such as k=77" in str(
            error
        ) or "1 keys are not in it, such as k=77" in str(error)

    run_ranks(3, check)


@pytest.mark.parametrize("when", range(6))
@pytest.mark.parametrize("where", ["map", "after"])
def test_a_failure_and_a_second_try_leave_both_sides_alike(when: int, where: str) -> None:
    """Of three ranks one fails, in its map or behind the exchange; then all try that iteration again."""

    def check(group: Group) -> None:
        broken = {"left": 2}

        def stumble(iteration: int) -> None:
            if iteration == when and group.rank == 1 and broken["left"]:
                broken["left"] -= 1
                raise RuntimeError("not yet")

        def script(rank: int, iteration: int) -> Batch:
            if where == "map" and rank == group.rank:
                stumble(iteration)
            return drifting("text")(rank, iteration)

        late = stumble if where == "after" else (lambda i: None)
        ours = started(the_loop(group, script, "text", late=late), group, check=True)
        plain = started(the_loop(group, drifting("text"), "text"), group)
        slots_of(plain).enabled = False
        for iteration in range(9):
            for _ in range(2 if iteration == when else 0):
                raised(group, UserCodeError, ours.advance)
            assert_alike(ours, plain, 1)
        assert slots_of(ours).rows_by_slot > slots_of(ours).rows_by_key / 2
        assert_pairs_agree(group, slots_of(ours))

    run_ranks(3, check)


def assert_pairs_agree(group: Group, ours: Slots) -> None:
    """What one side counts in a pair, the other does."""
    directory = ours.directory
    assert directory is not None
    sent = np.diff(directory.bounds)
    told = [np.frombuffer(b, np.int64) for b in group.allgather_bytes(sent.tobytes())]
    for source, counts in enumerate(told):
        assert counts[group.rank] == len(directory.slots[source])
        mine = directory.owned.take(directory.slots[source].astype(np.int64))
        assert (np.diff(hash_keys(mine.keys).astype(object)) > 0).all()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_loses_its_directory_makes_all_send_keys_again(victim: int, ranks: int) -> None:
    def check(group: Group) -> None:
        ours, plain = pair_of_runs(lambda: the_loop(group, drifting("text"), "text"), group)
        assert_alike(ours, plain, 5)
        mine = slots_of(ours)
        if group.size == 1:
            return
        by_key = mine.rows_by_key
        if group.rank == victim % group.size:
            ours.shop.cache.lose(mine.token)
        assert_alike(ours, plain, 1)
        assert mine.rows_by_key - by_key == len(set(keys_seen(drifting("text")(group.rank, 5)))), (
            "all of them by key"
        )
        by_slot = mine.rows_by_slot
        assert_alike(ours, plain, 3)
        assert group.agree_max(mine.rows_by_slot - by_slot) > 0, "learnt again"
        assert_pairs_agree(group, mine)

    run_ranks(ranks, check)


def keys_seen(rows: Batch) -> list[str]:
    return rows["k"].to_list()


def test_an_evicted_directory_is_not_made_again(ranks: int) -> None:
    def check(group: Group) -> None:
        ours, plain = pair_of_runs(lambda: the_loop(group, drifting("int")), group)
        assert_alike(ours, plain, 4)
        if group.size == 1:
            return
        mine = slots_of(ours)
        assert ours.shop.cache.report()["directory"] > 0
        ours.shop.cache.budget_bytes = 10 if group.rank == group.size - 1 else None
        assert_alike(ours, plain, 1)
        assert mine.directory is None
        ours.shop.cache.budget_bytes = None
        by_slot = mine.rows_by_slot
        assert_alike(ours, plain, 4)
        assert mine.rows_by_slot == by_slot and mine.directory is None
        assert ours.shop.cache.evictions == 1

    run_ranks(ranks, check)


def test_nulls_that_appear_late_start_a_directory_of_their_own() -> None:
    """One rank's keys have no mask until iteration 5: then all ranks learn new columns, and new keys."""

    def script(rank: int, iteration: int) -> Batch:
        numbers = np.arange(90) + rank
        return rows_of_keys(
            "null ints" if rank == 1 and iteration >= 5 else "ints", numbers, [rank, iteration]
        )

    def with_ints(rank: int, iteration: int) -> Batch:
        rows = script(rank, iteration)
        return rows if rows.valid("k") is not None else rows.with_columns(k=np.arange(90) + rank)

    def check(group: Group) -> None:
        ours, plain = pair_of_runs(lambda: the_loop(group, with_ints), group)
        assert_alike(ours, plain, 5)
        by_slot = slots_of(ours).rows_by_slot
        assert by_slot == 3 * 90
        assert_alike(ours, plain, 5)
        assert slots_of(ours).rows_by_slot > by_slot
        assert ours.tables["out"].batch.valid("k") is not None

    run_ranks(3, check)


def test_recurring_keys_travel_as_four_bytes_at_most_and_no_text(ranks: int) -> None:
    """Iteration 5: a record per row, and 4 bytes or a bit per known key; if all come, records alone."""

    def check(group: Group, part: int) -> None:
        def script(rank: int, iteration: int) -> Batch:
            numbers = np.random.default_rng([rank, iteration]).permutation(900)
            return rows_of_keys("text", numbers[: 900 // (part if iteration == 5 else 1)], [rank, iteration])

        run = started(the_loop(group, script, "text"), group)
        for _ in range(5):
            run.advance()
        work = work_of(run)
        sent: list[np.ndarray] = []
        inner, send = work.fresh.call, work.fresh.inline_send

        def watch() -> None:
            sent.append(send.reshape(group.size, -1)[:, :HEADER_WORDS].copy())
            inner.run()

        work.fresh.call = SimpleNamespace(run=watch)
        run.advance()
        work.fresh.call = inner
        width, (head,) = work.combiner.outputs.width, sent
        assert (head[:, ROWS] == head[:, EXTRA] & 0xFFFFFFFF).all()
        by_owner = np.bincount(
            work.partitions.owner_of_hashes(hash_keys(keys_of("text", np.arange(900)))), minlength=group.size
        )
        choice = np.minimum((by_owner + 63) // 64, (head[:, ROWS] + 1) // 2) if part > 1 else 0
        assert (head[:, WORDS] == head[:, ROWS] * width + choice).all()
        assert slots_of(run).rows_by_slot == 3 * 900 + 900 // part

    for part in (1, 2, 90):
        if ranks > 1:
            run_ranks(ranks, check, part)


def test_keys_that_are_planned_are_never_learnt(ranks: int) -> None:
    def check(group: Group) -> None:
        rows = Batch(k=np.arange(500) % 97, x=np.arange(500))
        stages = [Shuffle("r", ("k",), "h", {"x": ir.sum("x")})]
        run = started(
            looping({"r": local(rows, group)}, {"out": State("")}, stages, {"out": "h"}, most=5), group
        )
        run.run()
        mine = slots_of(run)
        assert mine.grown == 0 and mine.learning.pending == 0 and mine.token not in run.shop.cache

    run_ranks(ranks, check)


@pytest.mark.parametrize("way", ["once", "naive"])
def test_a_loop_that_runs_once_or_without_caches_learns_nothing(way: str) -> None:
    def check(group: Group) -> None:
        loop = the_loop(group, drifting("text"), "text", most=1 if way == "once" else 5)
        run = started(loop, group, naive=way == "naive")
        run.run()
        assert slots_of(run).grown == 0 and not run.shop.cache.report()
        assert slots_of(run)._sent == [] and group.agree_max(slots_of(run).rows_by_key) > 0

    run_ranks(3, check)


schedules = st.integers(2, 4).flatmap(
    lambda size: st.lists(
        st.lists(st.lists(st.integers(0, 25), max_size=12), min_size=size, max_size=size),
        min_size=3,
        max_size=9,
    )
)


@settings(max_examples=40, deadline=None)
@given(schedules, st.sampled_from(KINDS), st.integers(1, 12), st.booleans())
def test_any_keys_in_any_iteration_on_any_rank(
    schedule: list[list[list[int]]], kind: str, fewest: int, onto: bool
) -> None:
    def script(rank: int, iteration: int) -> Batch:
        return rows_of_keys(kind, np.array(schedule[iteration][rank], np.int64), [rank, iteration])

    def check(group: Group) -> None:
        table = keys_of(kind, np.arange(1, 20, 2)) if onto and "null" not in kind else None
        ours, plain = pair_of_runs(lambda: the_loop(group, script, kind, table), group)
        assert_alike(ours, plain, len(schedule))

    before, slots.FEWEST_ROWS = slots.FEWEST_ROWS, fewest
    try:
        run_ranks(len(schedule[0]), check)
    finally:
        slots.FEWEST_ROWS = before
