"""Rows routed by splitters: sorted over the ranks, stable, in fair shares, whatever the keys.

The oracle is NumPy's stable lexsort of all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.errors import DisagreementError, MemoryBudgetError, UsageError, UserCodeError
from iterreduce.loop import Gather, Local, Shuffle, Splitters, State
from iterreduce.rangeshuffle import RangeShuffle
from iterreduce.table import by_range
from tests.engine.checks_rows import columns, deals, narrow, with_text
from tests.engine.kit import (
    Check,
    by_rank,
    local,
    looping,
    once,
    pipeline,
    raised,
    rows_here,
    share,
    started,
    values_of,
)

N = 120


def sort(
    *key: str, sample: int = 64, rows: str = "r", into: str = "sorted", descending: tuple[bool, ...] = ()
) -> Shuffle:
    return Shuffle(rows, key, into, route=Splitters(sample, descending))


def ranked(values: list[Any]) -> np.ndarray:
    """Numbers in the order of the values; nulls last."""
    known = sorted({v for v in values if v is not None})
    place = {v: i for i, v in enumerate(known)}
    return np.array([len(known) if v is None else place[v] for v in values])


def turned(values: list[Any], down: bool) -> np.ndarray:
    """Their numbers, turned over where larger values come first; nulls stay last."""
    places, null = ranked(values), np.array([v is None for v in values], bool)
    return np.where(null, len(values), -places if down else places)


def expected(rows: Batch, key: tuple[str, ...], descending: tuple[bool, ...] = ()) -> list[Any]:
    ways = zip(key, descending or [False] * len(key), strict=True)
    order = np.lexsort([turned(values_of(rows, k), down) for k, down in ways][::-1])
    return rows_here(rows.take(order))


def check_rows_come_out_sorted_and_stable(group: Group) -> None:
    whole = with_text(columns(N, 12))
    for rows in (whole, whole.slice(0, 2), whole.slice(0, 0), whole.take(np.zeros(N, np.int64))):
        for key in (("k",), ("b", "k"), ("t",), ("m",), ("t", "f"), ("m", "t")):
            for ends in deals(group, len(rows)):
                made = once(group, {"r": local(rows, group, ends)}, sort(*key))
                shares = by_rank(group, made.batch)
                assert [row for part in shares for row in part] == expected(rows, key)
                assert made.layout == by_range(*key) and made.rows_total == len(rows)
                assert made.first_row == sum(map(len, shares[: group.rank]))


def check_larger_values_come_first_where_they_are_asked_to(group: Group) -> None:
    whole = with_text(columns(N, 12))
    for rows in (whole, whole.slice(0, 2), whole.slice(0, 0)):
        for key, down in (
            (("k",), (True,)),
            (("b", "k"), (True, False)),
            (("t", "f"), (True, True)),
            (("m", "t"), (True, False)),
            (("t", "m"), (False, True)),
        ):
            made = once(group, {"r": local(rows, group)}, sort(*key, descending=down))
            shares = by_rank(group, made.batch)
            assert [row for part in shares for row in part] == expected(rows, key, down)


def check_a_sorted_table_is_gathered_in_its_order(group: Group) -> None:
    rows = columns(N, 12)
    made = once(group, {"r": local(rows, group)}, sort("k"), Gather("sorted", "all"))
    assert rows_here(made.batch) == expected(rows, ("k",))


def check_nulls_on_one_rank_only_and_ranks_without_rows(group: Group) -> None:
    rows = columns(N, 12)
    rows = rows.with_valid(m=np.ones(N, bool), k=np.arange(N) > 20)
    mine = share(rows, group)
    mask = mine.valid("k")
    assert mask is not None
    if mask.all():
        mine = Batch.from_dict(
            {n: mine[n] for n in mine.names}, {"m": mine.valid("m")}
        )  # this rank's share knows nothing of nulls

    def bare(r: Batch) -> Batch:
        return mine

    made = once(
        group,
        {"r": local(rows.select("f"), group)},
        Local(bare, ("r",), "with", cut="share"),
        sort("k", "f", rows="with"),
    )
    assert [row for part in by_rank(group, made.batch) for row in part] == expected(rows, ("k", "f"))


def check_shares_are_fair_for_any_keys(group: Group) -> None:
    n = 6000
    random = np.random.default_rng(0)
    for k in (
        random.permutation(n),
        np.zeros(n, np.int64),
        np.where(random.random(n) < 0.9, 7, random.integers(0, n, n)),
        np.sort(random.zipf(1.5, n)),
    ):
        for ends in deals(group, n):
            made = once(group, {"r": local(Batch(k=k, x=np.arange(n)), group, ends)}, sort("k", sample=512))
            shares = by_rank(group, made.batch)
            assert max(map(len, shares)) <= 2 * n / group.size + 8
            order = np.argsort(k, kind="stable")
            assert [row[1] for part in shares for row in part] == order.tolist()


def check_numbers_alone_are_sorted_too(group: Group) -> None:
    random = np.random.default_rng(0)
    for k in (
        random.integers(-9, 9, N),
        random.integers(0, 2**64 - 1, N, dtype=np.uint64),
        random.integers(0, 5, N) * np.where(random.random(N) < 0.5, 0.0, -1.0),
    ):
        made = once(group, {"r": local(Batch(k=k), group)}, sort("k"))
        got = [repr(row[0]) for part in by_rank(group, made.batch) for row in part]
        assert got == [repr(v) for v in k[np.argsort(k, kind="stable")].tolist()]
        made = once(group, {"r": local(Batch(k=k), group)}, sort("k", descending=(True,)))
        got = [row[0] for part in by_rank(group, made.batch) for row in part]
        assert got == sorted(k.tolist(), reverse=True)


def check_rounds_of_any_size_bring_the_same_rows(group: Group) -> None:
    whole = columns(N * 5, 40, 1)
    for rows in (whole, with_text(whole)):
        for round_words in (1, 100, 1 << 20):
            run = started(pipeline({"r": local(rows, group)}, sort("k")), group, check=True)
            narrow(run, 40, round_words)
            run.run()
            shares = by_rank(group, run.tables["out"].batch)
            assert [row for part in shares for row in part] == expected(rows, ("k",))


def the_sorter(run: LoopRun) -> RangeShuffle:
    found = next(x for x in run.shop.exchangers if isinstance(x, RangeShuffle))
    assert isinstance(found, RangeShuffle)
    return found


def check_keys_that_stay_are_not_sorted_again(group: Group) -> None:
    rows = columns(N, 12).select("k", "f")
    state = Batch(i=np.zeros(1))

    def aged(r: Batch, s: Batch) -> Batch:
        return r.with_columns(f=r["f"] + s["i"][0])

    loop = looping(
        {"r": local(rows, group), "start": state},
        {"s": State("start"), "out": State("")},
        (
            Local(aged, ("r", "s"), "mapped"),
            sort("k", rows="mapped"),
            Local(lambda s: s.with_columns(i=s["i"] + 1), ("s",), "next", cut="share"),
        ),
        {"s": "next", "out": "sorted"},
    )
    run = started(loop, group, check=True)
    for i in range(4):
        run.advance()
        made = run.tables["out"]
        wanted = expected(rows.with_columns(f=rows["f"] + i), ("k",))
        assert [row for part in by_rank(group, made.batch) for row in part] == wanted
        assert made.rows_total == N and the_sorter(run).planned == (i > 0)


def check_what_fails_on_one_rank_is_raised_on_all(group: Group) -> None:
    rows = columns(N, 12)

    def fails(r: Batch) -> Batch:
        raise ValueError("no luck")

    def unlike(r: Batch) -> Batch:
        return r.with_columns(k=r["k"].astype(np.int32)) if last else r

    last = group.rank == group.size - 1
    source = {"r": local(rows, group)}
    broken = Local(fails if last else lambda r: r, ("r",), "m")
    raised(group, UserCodeError, lambda: once(group, source, broken, sort("k", rows="m")))
    if group.size > 1:
        raised(
            group,
            DisagreementError,
            lambda: once(group, source, Local(unlike, ("r",), "m"), sort("k", rows="m")),
        )
    complex_keys = {"r": local(rows.with_columns(z=rows["f"] * 1j), group)}
    error = raised(group, UsageError, lambda: once(group, complex_keys, sort("z")))
    assert "no order" in str(error)
    made = once(group, source, sort("k"))
    assert [row for part in by_rank(group, made.batch) for row in part] == expected(rows, ("k",))


def check_a_share_above_the_budget_is_an_error_on_all_ranks(group: Group) -> None:
    if group.size == 1:
        return
    rows = columns(4000, 500)
    run = started(pipeline({"r": local(rows, group)}, sort("k")), group)
    the_sorter(run).fresh.limit_words = 1000
    raised(group, MemoryBudgetError, run.run)


def check_keys_without_values_leave_rows_as_they_stand(group: Group) -> None:
    rows = Batch(v=np.zeros((50, 0)), x=np.arange(50))
    for key in (("v",), ()):
        shares = by_rank(group, once(group, {"r": local(rows, group)}, sort(*key)).batch.select("x"))
        assert [x for part in shares for (x,) in part] == list(range(50))
        assert max(map(len, shares)) <= 100 / group.size


def check_a_sample_of_nothing_is_refused(group: Group) -> None:
    error = raised(group, UsageError, lambda: pipeline({"r": Batch(k=np.zeros(1))}, sort("k", sample=0)))
    assert "at least 1 row" in str(error)


def check_directions_that_are_not_one_per_column_are_refused(group: Group) -> None:
    error = raised(
        group,
        UsageError,
        lambda: pipeline({"r": Batch(k=np.zeros(1))}, sort("k", descending=(True, False))),
    )
    assert "descending" in str(error) and "k" in str(error)


CHECKS: list[Check] = [
    check_keys_without_values_leave_rows_as_they_stand,
    check_a_sample_of_nothing_is_refused,
    check_directions_that_are_not_one_per_column_are_refused,
    check_larger_values_come_first_where_they_are_asked_to,
    check_rows_come_out_sorted_and_stable,
    check_a_sorted_table_is_gathered_in_its_order,
    check_nulls_on_one_rank_only_and_ranks_without_rows,
    check_shares_are_fair_for_any_keys,
    check_numbers_alone_are_sorted_too,
    check_rounds_of_any_size_bring_the_same_rows,
    check_keys_that_stay_are_not_sorted_again,
    check_what_fails_on_one_rank_is_raised_on_all,
    check_a_share_above_the_budget_is_an_error_on_all_ranks,
]
