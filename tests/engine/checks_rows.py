"""Whole rows through a shuffle: where they go, in which order, by a plan and without, in rounds and inline.

The oracle is a dictionary of lists, filled row by row in canonical order, and Python's integers for the hash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import FIRST, SECOND, hash_keys
from iterreduce.driver import LoopRun
from iterreduce.errors import MemoryBudgetError, StageError
from iterreduce.loop import Gather, Local, Loop, Shuffle, State
from iterreduce.rowshuffle import RowShuffle
from iterreduce.rowwindow import RowWindow
from tests.engine.kit import (
    Check,
    Row,
    all_on,
    by_rank,
    local,
    looping,
    once,
    pipeline,
    raised,
    rows_here,
    share,
    started,
)

N, MOST, PARTITIONS, MASK = 90, 6, 1024, 2**64 - 1
Give = Callable[[Batch, int, Group], Batch]


def hashed(rows: Batch, key: tuple[str, ...]) -> list[int]:
    """The hash of each row's key: by hand for a column of integers."""
    column = rows[key[0]]
    if (
        len(key) > 1
        or not isinstance(column, np.ndarray)
        or column.dtype.kind != "i"
        or rows.valid(key[0]) is not None
    ):
        return [int(h) for h in hash_keys(rows.select(*key))]
    out = []
    for word in column.tolist():
        h = (word & MASK) * FIRST & MASK
        out.append((h ^ h >> 32) * SECOND & MASK)
    return out


def expected(rows: Batch, key: tuple[str, ...], size: int) -> list[list[Row]]:
    """The rows of every rank: keys by hash, rows of a key in the order in which they stand."""
    groups: dict[int, list[Row]] = {}
    for h, row in zip(hashed(rows, key), rows_here(rows), strict=True):
        groups.setdefault(h, []).append(row)
    ranks: list[list[Row]] = [[] for _ in range(size)]
    ends = [PARTITIONS * r // size for r in range(size + 1)]
    for h in sorted(groups):
        part = (h >> 32) * PARTITIONS >> 32
        ranks[next(r for r in range(size) if ends[r] <= part < ends[r + 1])] += groups[h]
    return ranks


def columns(n: int, keys: int, seed: int = 0) -> Batch:
    """Rows with columns of many widths and shapes, and one with nulls."""
    random = np.random.default_rng(seed)
    rows = Batch(
        b=random.integers(0, 2, n).astype(bool),
        k=random.integers(-keys // 2, keys // 2 + 1, n),
        f=random.integers(0, 999, n) / 8,
        v=random.integers(0, 99, (n, 3)).astype(np.float32),
        i=random.integers(-9, 9, n).astype(np.int16),
        m=np.arange(n, dtype=np.uint8) % 200,
        c=random.integers(0, 9, (n, 2)) + 0.5,
    )
    return rows.with_valid(m=random.integers(0, 4, n) > 0)


def with_text(rows: Batch) -> Batch:
    """The same rows, with a text column beside them."""
    return rows.with_columns(t=[f"row {i % 17}" * (i % 3) for i in range(len(rows))])


def narrow(run: LoopRun, slot_words: int = 40, round_words: int = 1 << 20) -> None:
    """As if inline slots and rounds were this small."""
    for work in run.shop.exchangers:
        work.fresh.largest_slot, work.fresh.round_words = slot_words, round_words
        work.fresh._resize(slot_words)


def through_memory(run: LoopRun, stride: int = 7) -> None:
    """As if any rows were many enough to go through memory that ranks share, so many at a time."""
    for work in run.shop.exchangers:
        if isinstance(work, RowShuffle):
            work.window = RowWindow(work.group, work.fresh)
            work.window.least_bytes, work.window.stride = 0, stride


def deals(group: Group, n: int) -> list[list[int] | None]:
    """Equal shares, all rows on the first rank, all on the last."""
    return [None, all_on(group, n, 0), all_on(group, n, group.size - 1)]


def check_rows_come_to_their_owner_in_canonical_order(group: Group) -> None:
    whole = columns(N, 12)
    tables = [
        (whole, ("k",)),
        (whole, ("b", "k")),
        (with_text(whole), ("t",)),
        (with_text(whole), ("k",)),
        (whole, ("m",)),
    ]
    for rows, key in tables:
        for ends in deals(group, N):
            got = once(group, {"r": local(rows, group, ends)}, Shuffle("r", key, "t"))
            assert by_rank(group, got.batch) == expected(rows, key, group.size)


def check_rounds_of_any_size_bring_the_same_rows(group: Group) -> None:
    whole = columns(N * 7, 40, 1)
    for table in (whole, with_text(whole), whole.select("k"), whole.select("b", "k")):
        for round_words in (1, 100, 1 << 20):
            rows = table.slice(0, N) if round_words == 1 else table  # a round for each word
            wanted = expected(rows, ("k",), group.size)
            for ends in deals(group, len(rows)):
                run = started(
                    pipeline({"r": local(rows, group, ends)}, Shuffle("r", ("k",), "t")), group, check=True
                )
                narrow(run, 40, round_words)
                run.run()
                assert by_rank(group, run.tables["out"].batch) == wanted


def check_some_ranks_send_inline_and_others_in_rounds(group: Group) -> None:
    rows = columns(N * 4, 40, 2)
    ends = [min(len(rows), 3 * (r + 1)) for r in range(group.size)]
    ends[-1] = len(rows)
    for stage in (Shuffle("r", ("k",), "t"), Gather("r", "t")):
        run = started(pipeline({"r": local(rows, group, ends)}, stage), group)
        narrow(run, 100, 40)
        run.run()
        wanted = (
            expected(rows, ("k",), group.size)
            if isinstance(stage, Shuffle)
            else [rows_here(rows)] * group.size
        )
        assert by_rank(group, run.tables["out"].batch) == wanted


def check_one_key_takes_all_rows_to_one_rank(group: Group) -> None:
    rows = columns(N * 2, 12).with_columns(k=np.full(N * 2, 5))
    for slot_words in (40, 1 << 12):
        run = started(pipeline({"r": local(rows, group)}, Shuffle("r", ("k",), "t")), group)
        narrow(run, slot_words)
        run.run()
        assert by_rank(group, run.tables["out"].batch) == expected(rows, ("k",), group.size)


# ------------------------------------------------------------------ through shared memory


def check_rows_through_shared_memory_are_those_of_rounds(group: Group) -> None:
    whole = columns(N * 7, 40, 1)
    few_and_many = [*(3 * (rank + 1) for rank in range(group.size - 1)), len(whole)]
    for rows, key in (
        (whole, ("k",)),
        (whole.select("k"), ("k",)),
        (whole.select("b", "k"), ("b", "k")),
        (whole.select("m", "k"), ("m",)),
    ):
        for ends in (*deals(group, len(rows)), few_and_many):
            loop = pipeline({"r": local(rows, group, ends)}, Shuffle("r", key, "t"))
            run = started(loop, group, check=True)
            narrow(run, 100)
            through_memory(run)
            run.run()
            assert by_rank(group, run.tables["out"].batch) == expected(rows, key, group.size)
    assert group.shared_bytes or group.size == 1
    group.drop_shared()


def check_what_came_through_shared_memory_does_not_stay_in_it(group: Group) -> None:
    """Rows of few keys, so that some ranks need not sort theirs; their number changes in every iteration."""
    rows = columns(N * 3, 3)

    def fewer(r: Batch, i: int, g: Group) -> Batch:
        few = times(r, i, g).slice(0, len(r) * (1 + i * 3 % 5) // 5)
        return few.with_columns(k=few["k"] + i)

    run = started(the_loop(group, rows, fewer), group)
    narrow(run)
    through_memory(run)
    held: list[tuple[Batch, Batch]] = []
    for _ in range(MOST):
        advance(run, rows, fewer, group)
        held.append((run.tables["s"].batch, run.tables["s"].batch.copy()))
        if group.shared_bytes:
            window = group.shared([0] * group.size)
            assert window is not None
            window.mine[:] = -1
    assert all(batch.equals(then) for batch, then in held)
    assert run.memory().report().get("shared memory of the node", 0) == group.shared_bytes
    run.finish()
    assert group.shared_bytes == 0


def check_rows_go_in_rounds_where_ranks_share_no_memory(group: Group) -> None:
    rows, asked, lonely = columns(N * 3, 12), list[int](), group.duplicate()
    lonely.window = asked.append  # type: ignore[method-assign, assignment]
    run = started(the_loop(lonely, rows, times), lonely, naive=True)
    narrow(run)
    through_memory(run)
    for _ in range(3):
        advance(run, rows, times, lonely)
    assert len(asked) == (group.size > 1), "asked once"
    lonely.free()


def check_a_rank_that_fails_while_it_writes_fails_alone_and_all_raise(group: Group) -> None:
    if group.size == 1:
        return
    rows = columns(N * 3, 12)
    run = started(the_loop(group, rows, times), group, naive=True)
    narrow(run)
    through_memory(run)
    advance(run, rows, times, group)
    window = shuffle_of(run).window
    assert window is not None
    write = window._write
    if group.rank == group.size - 1:
        window._write = None  # type: ignore[method-assign, assignment]
    error = raised(group, StageError, run.advance)
    assert isinstance(error, StageError)
    assert error.failure.rank == group.size - 1 and run.iteration == 1
    window._write = write  # type: ignore[method-assign]
    advance(run, rows, times, group)
    group.drop_shared()


# ------------------------------------------------------------------ plans


def times(rows: Batch, iteration: int, group: Group) -> Batch:
    """The same keys, other values: what every loop below does, with a disturbance."""
    return rows.with_columns(f=rows["f"] * iteration, i=rows["i"] + np.int16(iteration))


def the_loop(
    group: Group, rows: Batch, give: Give, key: tuple[str, ...] = ("k",), ends: Any = None, most: int = MOST
) -> Loop:
    """Rows whose values change from iteration to iteration, shuffled by key."""

    def map_(r: Batch, clock: Batch) -> Batch:
        return give(r, int(clock["i"][0]), group)

    stages = [
        Local(map_, ("r", "clock"), "m"),
        Shuffle("m", key, "h"),
        Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "n"),
    ]
    sources = {"r": local(rows, group, ends), "one": Batch(i=np.ones(1, np.int64))}
    return looping(
        sources, {"s": State(""), "clock": State("one")}, stages, {"s": "h", "clock": "n"}, most=most
    )


def shuffle_of(run: LoopRun) -> RowShuffle:
    return next(work for work in run.shop.exchangers if isinstance(work, RowShuffle))


def advance(
    run: LoopRun, rows: Batch, give: Give, group: Group, key: tuple[str, ...] = ("k",), ends: Any = None
) -> None:
    """One iteration, and a look at its rows: as if every rank's rows were given by the oracle."""
    run.advance()

    class Rank:
        def __init__(self, rank: int):
            self.rank, self.size = rank, group.size

    parts = [give(share(rows, Rank(r), ends), run.iteration, Rank(r)) for r in range(group.size)]  # type: ignore[arg-type]
    assert by_rank(group, run.tables["s"].batch) == expected(Batch.concat(parts), key, group.size)


def check_plans_move_values_only_and_change_nothing(group: Group) -> None:
    rows = columns(N, 12)
    for ends in deals(group, N):
        run, naive = (
            started(the_loop(group, rows, times, ends=ends), group, check=True),
            started(the_loop(group, rows, times, ends=ends), group, naive=True),
        )
        for _ in range(4):
            advance(run, rows, times, group, ends=ends)
            advance(naive, rows, times, group, ends=ends)
            assert run.tables["s"].batch.equals(naive.tables["s"].batch)
            assert shuffle_of(run).planned == (run.iteration > 1)
            assert not shuffle_of(naive).planned and shuffle_of(naive).plan is None


def check_a_planned_iteration_sends_the_bytes_of_its_values(group: Group) -> None:
    rows = columns(N, 12).select("k", "f", "i")
    run = started(the_loop(group, rows, times), group)
    for _ in range(3):
        advance(run, rows, times, group)
    mine = share(rows, group)
    ends = [PARTITIONS * r // group.size for r in range(group.size + 1)]
    away = sum(
        not ends[group.rank] <= (h >> 32) * PARTITIONS >> 32 < ends[group.rank + 1]
        for h in hashed(mine, ("k",))
    )
    assert run.bytes_iterations[1:] == [away * 16] * 2, "a float64, and an int16 in a word of its own"


def check_keys_are_the_same_objects_as_long_as_they_are_equal(group: Group) -> None:
    rows = columns(N, 12)
    run = started(the_loop(group, rows, times), group)
    seen = []
    for _ in range(3):
        advance(run, rows, times, group)
        seen.append((run.tables["s"].batch["k"], run.tables["s"].tokens["k"]))
    assert seen[0][0] is seen[1][0] is seen[2][0] and len({token for _, token in seen}) == 1


def check_a_plan_that_one_rank_lost_is_made_anew(group: Group) -> None:
    rows = columns(N, 12)
    run = started(the_loop(group, rows, times), group, check=True)
    advance(run, rows, times, group)
    advance(run, rows, times, group)
    work = shuffle_of(run)
    assert work.planned
    if group.rank == group.size - 1:
        run.shop.cache.lose(work.plan_token)
    advance(run, rows, times, group)
    assert not work.planned and work.replans == 1
    for _ in range(3):
        advance(run, rows, times, group)
    assert work.planned


def disturbed(kind: str, iterations: tuple[int, ...], rank: int) -> Give:
    """`times`, but on one rank, in these iterations, something is not as it was."""

    def give(rows: Batch, iteration: int, group: Group) -> Batch:
        given = times(rows, iteration, group)
        if iteration not in iterations or group.rank != rank % group.size:
            return given
        if kind == "copied keys":
            return given.with_columns(k=rows["k"].copy())
        if kind == "other keys":
            return given.with_columns(k=rows["k"] * 3 + iteration)
        if kind == "fewer rows":
            return given.take(np.arange(0, len(rows), 2))
        if kind == "no rows":
            return given.slice(0, 0)
        return given.with_valid(f=np.arange(len(rows)) % 3 > 0)  # nulls where there were none

    return give


def check_one_rank_may_change_its_mind(group: Group) -> None:
    rows = columns(N, 12)
    for kind in ("copied keys", "other keys", "fewer rows", "no rows", "nulls"):
        for iterations in ((3,), (1, 2), (2, 3, 5)):
            give = disturbed(kind, iterations, 1)
            run = started(the_loop(group, rows, give), group, check=True)
            for i in range(1, MOST + 1):
                run.advance()
                got = by_rank(group, run.tables["s"].batch)
                parts = [
                    give(share(rows, FakeRank(r, group.size)), i, FakeRank(r, group.size))  # type: ignore[arg-type]
                    for r in range(group.size)
                ]
                if kind == "nulls" and i in iterations:
                    parts = [
                        p if p.valid("f") is not None else p.with_valid(f=np.ones(len(p), bool))
                        for p in parts
                    ]
                assert got == expected(Batch.concat(parts), ("k",), group.size), (kind, iterations, i)


class FakeRank:
    """What a map may ask of a group."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


def check_ranks_without_rows_abstain(group: Group) -> None:
    rows = columns(2, 12)
    run = started(the_loop(group, rows, times), group, check=True)
    for _ in range(3):
        advance(run, rows, times, group)
    assert shuffle_of(run).planned
    none = columns(0, 12)
    run = started(the_loop(group, none, times), group, check=True)
    for _ in range(3):
        run.advance()
        assert by_rank(group, run.tables["s"].batch) == [[] for _ in range(group.size)]


def check_keys_without_values_send_nothing_by_plan(group: Group) -> None:
    rows = columns(N, 12)

    def give(r: Batch, iteration: int, group: Group) -> Batch:
        return r.select("k")

    run = started(the_loop(group, rows, give), group)
    for _ in range(3):
        advance(run, rows, give, group)
    assert shuffle_of(run).planned and run.bytes_iterations[1:] == [0, 0]


def check_text_keys_go_by_plan_and_text_values_do_not(group: Group) -> None:
    rows = with_text(columns(N, 12))

    def give(r: Batch, iteration: int, group: Group) -> Batch:
        return times(r, iteration, group)

    for key, planned in (("t", True), ("k", False)):
        run = started(the_loop(group, rows, give, (key,)), group)
        for _ in range(3):
            advance(run, rows, give, group, (key,))
        assert shuffle_of(run).planned is planned


def check_an_evicted_plan_is_not_made_again(group: Group) -> None:
    rows = columns(N, 12)
    run = started(the_loop(group, rows, times), group)
    run.shop.cache.budget_bytes = 50 if group.rank == group.size - 1 else None
    for _ in range(5):
        advance(run, rows, times, group)
    assert shuffle_of(run).plan is None and run.shop.cache.evictions == 1


def check_rows_onto_a_table_take_its_order(group: Group) -> None:
    rows, pages = columns(N, 12).select("k", "f", "i"), Batch(k=np.array([3, -2, 0, 6, 5]), p=np.arange(5.0))
    kept = {}
    for missing in ("drop", "error"):
        known = rows if missing == "drop" else rows.take(np.isin(rows["k"], pages["k"]))

        def map_(r: Batch, clock: Batch) -> Batch:
            return times(r, int(clock["i"][0]), group)

        stages = [
            Local(map_, ("r", "clock"), "m"),
            Shuffle("m", ("k",), "h", None, "pages", missing),  # type: ignore[arg-type]
            Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "n"),
        ]
        sources = {"r": local(known, group), "p": local(pages, group), "one": Batch(i=np.ones(1, np.int64))}
        states = {"s": State(""), "clock": State("one"), "pages": State("p", ("k",))}
        run = started(looping(sources, states, stages, {"s": "h", "clock": "n"}), group)
        for i in range(1, 4):
            run.advance()
            given = times(known, i, group)
            order = [k for part in by_rank(group, run.tables["pages"].batch) for k, _ in part]
            wanted = [row for k in order for row in rows_here(given) if row[0] == k]
            kept[missing] = [row for part in by_rank(group, run.tables["s"].batch) for row in part]
            assert kept[missing] == wanted and shuffle_of(run).planned == (i > 1)


def check_rows_handed_out_before_stay_as_they_were(group: Group) -> None:
    rows = columns(N, 12)
    run = started(the_loop(group, rows, times), group)
    shuffle_of(run).shelf.kept_bytes = 1
    held: list[tuple[Any, Any]] = []
    for i in range(6):
        advance(run, rows, times, group)
        if i % 2 == 0:
            column = run.tables["s"].batch["f"][1:]
            held.append((column, column.copy()))
    assert all(np.array_equal(column, then) for column, then in held)
    sizes = [run.tables["s"].batch.nbytes, shuffle_of(run).shelf.nbytes]
    assert sizes[1] <= 6 * sizes[0] + 64, "what is not held is used again"


def check_a_rank_over_its_budget_fails_alone_and_all_raise(group: Group) -> None:
    if group.size == 1:
        return
    rows = columns(N * 4, 12).with_columns(k=np.full(N * 4, 5))
    for stage in (Shuffle("r", ("k",), "t"), Gather("r", "t")):
        run = started(pipeline({"r": local(rows, group)}, stage), group)
        narrow(run, 40, 100)
        for work in run.shop.exchangers:
            work.fresh.limit_words = 10
        error = raised(group, MemoryBudgetError, run.run)
        assert "its budget 80" in str(error)


CHECKS: list[Check] = [
    work for name, work in sorted(globals().items()) if name.startswith("check_") and callable(work)
]
