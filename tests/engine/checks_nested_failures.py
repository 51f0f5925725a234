"""What fails on one rank in a loop inside a body rolls back one iteration on all ranks, and no more.

A place fails once, at one of its calls. Tables, carry and outputs must then be those of the last commit, and
the run goes on to the end of an undisturbed one.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.events import Event, Events
from iterreduce.fixpoint import Until
from iterreduce.loop import Carry, Local, Loop, Replace, Shuffle, Sink, State, Superstep
from iterreduce.options import Options
from tests.engine.checks_nested import counting, patching, slow_count, slow_patching, slow_spread, spreading
from tests.engine.kit import Check, local, raised, rows_here, rows_of, same

PLACES = ("give", "middle", "innermost", "take", "back")


class Trouble(Exception):
    """What user code raises."""


class Once:
    """Raises at the ``call``-th call of ``place`` on one rank, once."""

    def __init__(self, group: Group, place: str, call: int, rank: int):
        self.here, self.place, self.call = group.rank == rank, place, call
        self.calls: Counter[str] = Counter()

    def __call__(self, place: str, tables: object = None) -> None:
        self.calls[place] += 1
        if self.here and place == self.place and self.calls[place] == self.call:
            raise Trouble("no luck")


def standing(run: LoopRun) -> str:
    """All that a rollback must restore, on this rank."""
    out: list[Any] = [run.path, run.carry, run.outcomes, run.wants]
    for level in run.root.all():
        if level.standing is not None:
            tables = level.standing.bindings
            out.append((level.standing.at, level.standing.carry, level.standing.gained, sorted(tables)))
            out += [(name, rows_here(table.batch)) for name, table in sorted(tables.items())]
    out += [(name, [rows_here(t.batch) for t in sunk]) for name, sunk in run.outputs.items()]
    return repr(out)


def through(group: Group, run: LoopRun, kind: type[BaseException] = ir.UserCodeError) -> BaseException:
    """Advance to the end; one error is met on the way, and undoes what it must. Collective."""
    errors = []
    run.start()
    while run.outcome is None:
        before = standing(run)
        try:
            run.advance()
        except ir.IterReduceError as error:
            errors.append(error)
        else:
            continue
        assert standing(run) == before
    (error,) = errors
    assert isinstance(error, kind)
    same(group, str(error))
    return error


def check_every_place_of_three_levels(group: Group) -> None:
    for keyed in (True, False):
        for place in PLACES:
            for call in (1, 3) if keyed else (2,):
                fault = Once(group, place, call, group.size - 1)
                run = LoopRun(counting(group, fault, keyed), group)
                error = through(group, run)
                assert isinstance(error, ir.UserCodeError) and error.failure.rank == group.size - 1
                depth = {"give": 1, "back": 1, "middle": 2, "take": 2, "innermost": 3}[place]
                assert len(error.failure.path) == depth
                assert f"iteration {'.'.join(map(str, error.failure.path))}," in str(error)
                if place == "innermost":
                    assert "outer/middle/inner: add" in error.failure.stage
                assert dict(rows_of(group, run.tables["v"])) == slow_count()[-1]
                assert sum(len(rows_of(group, t)) for t in run.outputs["seen"]) == 21


def check_faults_in_loops_inside_a_body_under_options(group: Group) -> None:
    for options in ({"naive": True}, {"check": True}, {"memory_bytes": 60}):
        for place in PLACES:
            run = LoopRun(counting(group, Once(group, place, 2, 0)), group, Options(**options))
            through(group, run)
            assert dict(rows_of(group, run.tables["v"])) == slow_count()[-1]


def check_patches_on_two_levels_are_undone(group: Group) -> None:
    for place in ("inner", "outer"):
        for call in (1, 3):
            run = LoopRun(patching(group, Once(group, place, call, group.size - 1)), group)
            through(group, run)
            v, ends = slow_patching()
            assert dict(rows_of(group, run.tables["v"])) == v
            assert sorted(row for t in run.outputs["ends"] for row in rows_of(group, t)) == sorted(ends)


class Failing(dict[str, int]):
    """Counts calls, and raises at one of them."""

    def __init__(self, group: Group, once: Once):
        super().__init__()
        self.once = once

    def __setitem__(self, place: str, calls: int) -> None:
        super().__setitem__(place, calls)
        self.once(place)


def check_what_is_prepared_at_an_entry_may_fail(group: Group) -> None:
    for lies in (True, False):
        for call in (1, 2):
            calls = Failing(group, Once(group, "entry", call, group.size - 1))
            run = LoopRun(spreading(group, lies, calls), group)
            error = through(group, run)
            assert isinstance(error, ir.UserCodeError) and "spread/inner: prepare" in error.failure.stage
            assert dict(rows_of(group, run.tables["v"])) == dict(enumerate(slow_spread()))


def check_rules_and_initial_rows_of_an_inner_loop_may_fail(group: Group) -> None:
    once = Once(group, "rule", 2, group.size - 1)
    doubled = {"now": True}

    def rule(old: Batch, new: Batch) -> bool:
        once("rule")
        return False

    def seeds(v: Batch) -> Batch:
        return Batch.concat([v, v]) if doubled["now"] else v

    step = Superstep("add", (Shuffle("s", ("k",), "t", ir.SUM, onto="s"),), (Replace("s", "t"),))
    inner = Loop(
        "inner", {}, {"s": State("seeds", ("k",))}, (step,), Until.of(rule, 3).on("s"), "s", outer=("seeds",)
    )
    first = Superstep("seeds", (Local(seeds, ("v",), "t", "share"),), (Replace("seeds", "t"),))
    rows = local(Batch(k=np.arange(9), v=np.arange(9)), group)
    state = {"v": State("rows"), "seeds": State("rows")}
    run = LoopRun(Loop("outer", {"rows": rows}, state, (first, inner), Until.of([], 2), "inner"), group)
    error = raised(group, ir.UsageError, run.advance)
    assert "make its keys unique" in str(error) and run.path == (0,)
    doubled["now"] = False
    run.advance()
    error = through(group, run)
    assert isinstance(error, ir.UserCodeError) and error.failure.stage == "outer/inner: fixpoint test"
    assert sorted(rows_of(group, run.tables["inner"])) == [(k, k) for k in range(9)]


def check_gains_of_a_rolled_back_start_do_not_count(group: Group) -> None:
    """The supersteps before an inner loop are rolled back with its first iteration, their gains too."""
    once = Once(group, "inner", 1, group.size - 1)

    def inside(s: Batch) -> Batch:
        once("inner")
        return s

    step = Superstep(
        "step", (Local(inside, ("s",), "t", "share"),), (ir.Accumulate("n", "t"), Replace("s", "t"))
    )
    keep = {"n": Carry(ir.COUNT, keep=True)}
    inner = Loop("inner", {}, {"s": State("v")}, (step,), Until.of([], 2), "s", carry=keep, outer=("v",))
    first = Superstep("first", (), (ir.Accumulate("all", "v"), Sink("out", "v")))
    rows = local(Batch(v=np.arange(9)), group)
    state = {"v": State("rows")}
    carry = {"all": Carry(ir.COUNT, keep=True)}
    run = LoopRun(
        Loop("outer", {"rows": rows}, state, (first, inner), Until.of([], 2), "v", carry=carry), group
    )
    through(group, run)
    assert run.values == {"all": 18, "inner.n": 18}
    assert sum(len(rows_of(group, t)) for t in run.outputs["out"]) == 18


def check_a_watcher_that_raises_at_the_end_of_an_inner_loop(group: Group) -> None:
    for name in ("loop.end", "iteration.start", "iteration.commit"):
        events, trouble = Events(), {"now": True}

        def watch(event: Event, name: str = name, trouble: dict[str, bool] = trouble) -> None:
            path = event.fields.get("path", ())
            if (
                event.name == name
                and len(path) > 1
                and group.rank == group.size - 1
                and trouble.pop("now", False)
            ):
                raise RuntimeError(f"stopped at {name}")

        events.subscribe(watch, may_raise=True)
        run = LoopRun(counting(group), group, events=events)
        error = through(group, run, ir.StageError)
        assert f"stopped at {name}" in str(error)
        assert dict(rows_of(group, run.tables["v"])) == slow_count()[-1]


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
