"""Failures beside the matrix of `checks_failures`: prepare and finish, wrong results of maps, watchers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.events import Event, Events
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import Local, Loop, Replace, Shuffle, State, Superstep, Total
from tests.engine.checks_failures import MOST, Fault, N, Trouble, raise_plainly, the_loop, undisturbed
from tests.engine.kit import Check, int_rows, local, once, raised, rows_of, same


def check_prepare_and_finish_fail_alike(group: Group) -> None:
    bad = {"prepare": False, "finish": False}

    def stage(name: str) -> Callable[[Batch], Batch]:
        def work(r: Batch) -> Batch:
            if bad[name] and group.rank == group.size - 1:
                raise_plainly()
            return r

        return work

    rows = int_rows(N, 90).select("k", "x")
    for reads, stages in (
        ("q", (Local(stage("prepare"), ("r",), "q"),)),
        ("q", (Local(stage("prepare"), ("r",), "q0"), Shuffle("q0", ("k",), "q", ir.SUM))),
    ):
        loop = Loop(
            "ends",
            {"r": local(rows, group)},
            {"s": State(reads, ("k",) if len(stages) > 1 else ())},
            (Superstep("body", (Local(lambda s: s, ("s",), "n"),), (Replace("s", "n"),)),),
            Until((MaxIterations(2),)),
            "s",
            prepare=stages,
            finish=(Local(stage("finish"), ("s",), "f"), Total("f", (), {"x": ir.SUM}, "v")),
            values={"x": ("v", "x")},
        )
        run = LoopRun(loop, group)
        bad["prepare"] = True
        assert "prepare" in str(raised(group, ir.UserCodeError, run.advance))
        bad["prepare"] = False
        run.run()
        bad["finish"] = True
        assert "finish" in str(raised(group, ir.UserCodeError, run.finish))
        bad["finish"] = False
        run.finish()
        assert run.tables["v"].batch["x"].tolist() == [int(rows["x"].sum())]


def check_a_map_that_returns_no_batch_is_told(group: Group) -> None:
    for wrong in (None, 3, {"k": [1]}):

        def f(r: Batch, wrong: object = wrong) -> Batch:
            return wrong if group.rank == group.size - 1 else r  # type: ignore[return-value]

        error = raised(
            group,
            ir.SchemaError,
            lambda f=f: once(
                group, {"r": local(int_rows(N, 4), group)}, Local(f, ("r",), "m"), Shuffle("m", ("k",), "t")
            ),  # type: ignore[misc]
        )
        assert "wanted an ir.Batch" in str(error)


def check_results_of_other_dtypes_in_a_later_iteration(group: Group) -> None:
    """A map that changes its dtypes on one rank, or on all, while the exchange is planned."""
    for ranks in ({group.size - 1}, set(range(group.size))):
        rows, pages = int_rows(N, 8).select("k", "x"), Batch(k=np.arange(-4, 5), i=np.zeros(9, np.int64))

        def f(r: Batch, c: Batch, ranks: set[int] = ranks) -> Batch:
            late = int(c["i"][0]) == 2 and group.rank in ranks
            return r.with_columns(x=r["x"].astype(np.float64)) if late else r

        stages = (
            Local(f, ("r", "c"), "m"),
            Shuffle("m", ("k",), "a", {"x": ir.sum("x")}, "s"),
            Total("m", ("k",), ir.SUM, "t"),
            Local(lambda c: c.with_columns(i=c["i"] + 1), ("c",), "c2"),
        )
        loop = Loop(
            "dtypes",
            {"r": local(rows, group), "p": local(pages, group), "z": Batch(i=np.zeros(1, np.int64))},
            {"s": State("p", ("k",)), "c": State("z")},
            (Superstep("one", stages, (Replace("c", "c2"),)),),
            Until((MaxIterations(4),)),
            "s",
        )
        run = LoopRun(loop, group)
        run.advance()
        run.advance()
        assert "columns" in str(raised(group, ir.IterReduceError, run.advance))
        assert run.tables["c"].batch["i"].tolist() == [2]


def check_watchers_that_may_raise(group: Group) -> None:
    for name in ("iteration.start", "stage.start", "stage.end"):
        events, armed = Events(), [1, 2, 3]

        def watch(event: Event, name: str = name, armed: list[int] = armed) -> None:
            here = group.rank == group.size - 1 and event.name == name
            if here and event.fields["iteration"] in armed:
                raise Trouble(name)

        events.subscribe(watch, may_raise=True)
        run = LoopRun(the_loop(group, Fault()), group, events=events)
        while run.outcome is None:
            if armed:
                assert name in str(raised(group, ir.StageError, run.advance))
                armed.pop(0)
            run.advance()
        assert sorted(rows_of(group, run.tables["s"])) == undisturbed()[MOST - 1]
        same(group, str(run.iteration))


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
