"""Programs of several parts: supersteps, prepare and finish, loops as sources, keyed states."""

from __future__ import annotations

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.fixpoint import MaxIterations, Outcome, Until
from iterreduce.loop import Gather, Local, Loop, Replace, Shuffle, State, Superstep, Total
from tests.engine import oracle
from tests.engine.checks_answers import dicts
from tests.engine.checks_iterate import N, dataset
from tests.engine.kit import (
    Check,
    by_rank,
    distinct,
    int_rows,
    local,
    looping,
    raised,
    ran,
    rows_here,
    rows_of,
    started,
)


def check_supersteps_see_what_earlier_ones_wrote(group: Group) -> None:
    rows = int_rows(N, 5).select("k", "x")
    one = Superstep(
        "double", (Local(lambda s: s.with_columns(x=s["x"] * 2), ("s",), "n"),), (Replace("s", "n"),)
    )
    two = Superstep("total", (Total("s", (), {"x": ir.SUM}, "t"),), (Replace("sum", "t"),))
    loop = Loop(
        "two",
        {"r": local(rows, group), "z": Batch(x=np.zeros(1, np.int64))},
        {"s": State("r"), "sum": State("z")},
        (one, two),
        Until((MaxIterations(3),)),
        "sum",
    )
    assert rows_of(group, ran(loop, group)) == [(int(rows["x"].sum()) * 8,)]


def check_prepare_runs_once_and_finish_once(group: Group) -> None:
    rows, calls = int_rows(N, 5), {"prepare": 0, "pure": 0, "body": 0, "finish": 0}

    def counted(name: str) -> object:
        def work(*batches: Batch) -> Batch:
            calls[name] += 1
            return batches[0]

        return work

    loop = looping(
        {"r": local(rows, group)},
        {"s": State("q", ("k",))},
        [
            Local(counted("pure"), ("r",), "p", "share", pure=True),  # type: ignore[arg-type]
            Local(counted("body"), ("s", "p"), "n", "share"),  # type: ignore[arg-type]
        ],
        {"s": "n"},
        most=3,
        prepare=(
            Shuffle("r", ("k",), "q0", {"n": ir.count()}),
            Local(counted("prepare"), ("q0",), "q", "share"),
        ),  # type: ignore[arg-type]
        finish=(Local(counted("finish"), ("s",), "f", "share"), Total("f", (), {"rows": ir.sum("n")}, "v")),
        values={"rows": ("v", "rows")},  # type: ignore[arg-type]
    )
    assert ran(loop, group).values == {"rows": N}
    assert calls == {"prepare": 1, "pure": 1, "body": 3, "finish": 1}
    assert ran(loop, group, naive=True).values == {"rows": N}
    assert calls["pure"] == 4


def check_a_loop_is_a_source_of_another(group: Group) -> None:
    rows = int_rows(N, 6).select("k", "x")
    for partitions in (1024, 16):
        inner = Loop(
            "inner",
            {"r": local(rows, group)},
            {"o": State("")},
            (Superstep("a", (Shuffle("r", ("k",), "t", ir.SUM),), (Replace("o", "t"),)),),
            Until((MaxIterations(1),)),
            "o",
            partitions=partitions,
        )
        stages = [
            Shuffle("r", ("k",), "h", {"n": ir.count()}, "i"),
            Local(lambda i, h: i.with_columns(x=i["x"] * h["n"]), ("i", "h"), "n", "share"),
        ]
        loop = looping(
            {"r": local(rows, group), "i": inner}, {"s": State("i", ("k",))}, stages, {"s": "n"}, most=2
        )
        groups = oracle.grouped(dicts(rows), ("k",))
        assert dict(rows_of(group, ran(loop, group))) == {
            k: sum(r["x"] for r in g) * len(g) for (k,), g in groups.items()
        }


def check_a_result_feeds_the_next_job(group: Group) -> None:
    rows = int_rows(N, 6).select("k", "x")
    sums = ir.MapReduce(reduce=ir.SUM, key="k")(dataset(rows, group))
    sizes = ir.MapReduce(
        map=lambda r: Batch(odd=r["x"] % 2, n=np.ones(len(r), np.int64)), reduce=ir.SUM, key="odd"
    )(sums)
    wanted: dict[int, int] = {}
    for group_rows in oracle.grouped(dicts(rows), ("k",)).values():
        odd = sum(r["x"] for r in group_rows) % 2
        wanted[odd] = wanted.get(odd, 0) + 1
    assert dict(rows_here(sizes.collect())) == wanted


def check_keyed_states_lie_with_their_owners(group: Group) -> None:
    rows = Batch(k=np.arange(90), x=np.zeros(90))
    loop = looping(
        {"r": local(rows, group)},
        {"s": State("r", ("k",))},
        [Local(lambda s: s, ("s",), "n")],
        {"s": "n"},
        most=2,
    )
    run = started(loop, group)
    run.run()
    shuffled = looping(
        {"r": local(rows, group)}, {"s": State("r")}, [Shuffle("r", ("k",), "n")], {"s": "n"}, most=1
    )
    ours, theirs = by_rank(group, run.tables["s"].batch), by_rank(group, ran(shuffled, group).batch)
    assert [distinct(r) for r in ours] == [distinct(r) for r in theirs]


def check_a_stray_row_is_refused(group: Group) -> None:
    rows = Batch(k=np.arange(90), x=np.zeros(90))
    loop = looping(
        {"r": local(rows, group)},
        {"s": State("r", ("k",))},
        [Local(lambda r: r, ("r",), "n")],
        {"s": "n"},
        most=2,
    )
    if group.size > 1:
        assert "belong to other ranks" in str(raised(group, ir.UsageError, lambda: ran(loop, group)))
    twice = looping(
        {"r": local(Batch(k=np.arange(90) // 2), group)},
        {"s": State("r", ("k",))},
        [Gather("s", "g")],
        {"s": "s"},
    )
    assert "unique" in str(raised(group, ir.UsageError, lambda: ran(twice, group)))


def check_a_fixpoint_is_reached_when_nothing_changes(group: Group) -> None:
    rows = Batch(k=np.arange(30), x=np.arange(30))
    stages = [Local(lambda s: s.with_columns(x=np.maximum(s["x"] - 7, 0)), ("s",), "n")]
    for key in ((), ("k",)):
        result = ran(
            looping(
                {"r": local(rows, group)}, {"s": State("r", key)}, stages, {"s": "n"}, [ir.Unchanged()], 50
            ),
            group,
        )
        assert (result.outcome, result.iterations) == (Outcome.UNCHANGED, 6)
        assert sorted(rows_of(group, result)) == [(k, 0) for k in range(30)]


def check_onto_needs_a_table_by_that_key(group: Group) -> None:
    rows, pages = int_rows(N, 4), Batch(k=np.arange(-2, 3), j=np.arange(5))
    for combine in (ir.SUM, None):
        for source in (local(pages, group), pages):
            loop = looping(
                {"r": local(rows, group), "s": source},
                {"t": State("s")},
                [Shuffle("r", ("k",), "h", combine, "s")],
                {"t": "h"},
            )
            raised(group, ir.UsageError, lambda loop=loop: ran(loop, group))  # type: ignore[misc]
        keyed = {"t": State("s", ("k", "j"))}
        loop = looping(
            {"r": local(rows, group), "s": local(pages, group)},
            keyed,
            [Shuffle("r", ("k",), "h", combine, "t")],
            {"t": "h"},
        )
        raised(group, ir.UsageError, lambda loop=loop: ran(loop, group))  # type: ignore[misc]


def check_rows_without_arrivals_get_the_identity(group: Group) -> None:
    rows, pages = Batch(k=np.array([3, 3, 5]), x=np.array([4, 6, 9])), Batch(k=np.arange(8))
    stages = [
        Shuffle("r", ("k",), "h", {"s": ir.sum("x"), "n": ir.count()}, "s"),
        Local(lambda h: h, ("h",), "n", "share"),
    ]
    loop = looping(
        {"r": local(rows, group), "p": local(pages, group)},
        {"s": State("p", ("k",))},
        stages,
        {"s": "n"},
        most=2,
    )
    assert sorted(rows_of(group, ran(loop, group))) == [
        (k, {3: 10, 5: 9}.get(k, 0), {3: 2, 5: 1}.get(k, 0)) for k in range(8)
    ]


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
