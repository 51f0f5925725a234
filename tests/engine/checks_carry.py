"""Conditions, carry, feeds and sinks, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.fixpoint import Outcome, Until
from iterreduce.loop import Accumulate, Carry, Gather, Local, Loop, Replace, Sink, State, Superstep
from iterreduce.options import Options
from iterreduce.run import run_loop
from iterreduce.sources import LocalSource
from tests.engine.kit import Check, local, raised, ran, rows_of, same, share

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"naive": True}, {"check": True})
N = 23


def rows() -> Batch:
    random = np.random.default_rng(5)
    return Batch(
        i=random.integers(-9, 9, N), f=random.integers(-9, 9, N).astype(np.float64), b=random.random(N) < 0.2
    )


def turning(r: Batch) -> Batch:
    """Other values in each iteration."""
    return r.with_columns(i=-2 * r["i"] + 1, f=r["f"] + 1, b=~r["b"])


CARRIES = {
    "i sum": Carry(ir.SUM, 5, dtype="int64"),
    "i kept": Carry(ir.sum("i"), 5, keep=True, dtype="int64"),
    "f sum": Carry(ir.SUM),
    "f min": Carry(ir.MIN, -3),
    "f kept min": Carry(ir.MIN, -3, keep=True),
    "i max": Carry(ir.MAX, 2, keep=True, dtype="int64"),
    "n": Carry(ir.COUNT, keep=True),
    "b any": Carry(ir.ANY),
    "b all": Carry(ir.ALL, True, keep=True),
    "never": Carry(ir.SUM, 7),
}


def accumulating(group: Group, most: int = 3) -> Loop:
    stages = (
        Local(turning, ("r",), "t"),
        *(Local(lambda t, c=c: t.select(c), ("t",), c) for c in "ifb"),
        Gather("t", "all"),
        Local(lambda a: a.select("i"), ("all",), "everywhere", "share"),
    )
    writes = [Accumulate(name, name[0]) for name in CARRIES if name not in ("n", "never", "i kept")]
    more = (Accumulate("n", "t"), Accumulate("i kept", "everywhere"), Replace("r", "t"))
    step = Superstep("step", stages, (*writes, *more))
    return Loop(
        "carrying",
        {"rows": local(rows(), group)},
        {"r": State("rows")},
        (step,),
        Until.of([], most),
        "r",
        carry=CARRIES,
    )


def slow_carry(most: int = 3) -> dict[str, Any]:
    r, kept, low, high, n, every = rows(), 5, -3.0, 2, 0, True
    for _ in range(most):
        r = turning(r)
        kept, n = kept + int(r["i"].sum()), n + N
        low, high = min(low, r["f"].min()), max(high, int(r["i"].max()))
        every = every and bool(r["b"].all())
    out = {
        "i sum": int(r["i"].sum()),
        "i kept": kept,
        "f sum": float(r["f"].sum()),
        "f min": float(r["f"].min()),
    }
    out |= {
        "f kept min": float(low),
        "i max": high,
        "n": n,
        "b any": bool(r["b"].any()),
        "b all": every,
        "never": 7.0,
    }
    return out


def check_carries_fold_the_rows_of_all_ranks(group: Group) -> None:
    for options in OPTIONS:
        found = run_loop(accumulating(group), group, Options(**options)).values
        assert found == slow_carry()
        assert {n: type(v) for n, v in found.items()} == {n: type(v) for n, v in slow_carry().items()}


def check_no_rows_are_0_and_leave_a_minimum_as_it_was(group: Group) -> None:
    carry = {"s": Carry(ir.SUM, 4), "n": Carry(ir.COUNT, 4), "low": Carry(ir.MIN, 4), "all": Carry(ir.ALL)}
    nothing = Local(lambda r: r.slice(0, 0), ("r",), "none", "share")
    flags = Local(lambda r: Batch(all=np.ones(0, bool)), ("r",), "flags", "share")
    writes = (*(Accumulate(n, "none") for n in ("s", "n", "low")), Accumulate("all", "flags"))
    step = Superstep("step", (nothing, flags), writes)
    sources = {"rows": local(Batch(x=np.arange(5.0)), group)}
    loop = Loop("none", sources, {"r": State("rows")}, (step,), Until.of([], 2), "r", carry=carry)
    assert ran(loop, group).values == {"s": 0.0, "n": 0, "low": 4.0, "all": True}


def check_a_rule_on_the_carry_ends_the_loop(group: Group) -> None:
    for rule, wanted in (
        (ir.carry("n") >= 3 * N, 3),
        (ir.carry("n") > 3 * N, 4),
        (ir.carry("low") < -40, 4),
        (ir.carry("low") <= -18, 1),
    ):
        carry = {"n": Carry(ir.COUNT, keep=True), "low": Carry(ir.MIN, keep=True)}
        down = Local(lambda r: Batch(low=r["low"] - 9), ("r",), "d")
        step = Superstep("step", (down,), (Accumulate("n", "d"), Accumulate("low", "d"), Replace("r", "d")))
        sources = {"rows": local(Batch(low=np.full(N, -9 * 0.0) - np.arange(N) % 2 * 9), group)}
        loop = Loop("ruled", sources, {"r": State("rows")}, (step,), Until.of(rule, 20), "r", carry=carry)
        found = ran(loop, group)
        assert (found.iterations, found.outcome) == (wanted, Outcome.CONVERGED)
        assert found.residual == found.values[rule.carry]


def check_maps_read_the_carry_of_the_iteration_before(group: Group) -> None:
    def count(n: Batch) -> Batch:
        return Batch(n=n["value"] * 2 + 1)

    step = Superstep("step", (Local(count, ("n",), "m"),), (Accumulate("n", "m"), Sink("seen", "n")))
    sources = {"z": Batch(x=np.zeros(1))}
    carry = {"n": Carry(ir.SUM, 1, dtype="int64")}
    found = ran(
        Loop("reading", sources, {"s": State("z")}, (step,), Until.of([], 4), "s", carry=carry), group
    )
    assert found.values == {"n": 31} and found.outputs["seen"]["value"].tolist() == [1, 3, 7, 15]


# ---------------------------------------------------------------------- when


def by_turns(group: Group, odd: Callable[[Any], bool], even: Callable[[Any], bool]) -> Loop:
    """Two supersteps on one table, each in some iterations; n counts all of them."""
    tick = Superstep("tick", (Local(lambda z: z, ("z",), "one"),), (Accumulate("n", "one"),))
    add = Superstep(
        "add", (Local(lambda v: v.with_columns(v=v["v"] + 10), ("v",), "a"),), (Replace("v", "a"),), odd
    )
    double = Superstep(
        "double",
        (Local(lambda v: v.with_columns(v=v["v"] * 2), ("v",), "d"),),
        (Replace("v", "d"), Sink("d", "d")),
        even,
    )
    sources = {"rows": local(Batch(v=np.arange(6)), group), "z": Batch(z=np.zeros(1))}
    carry = {"n": Carry(ir.COUNT, keep=True)}
    return Loop(
        "turns", sources, {"v": State("rows")}, (add, double, tick), Until.of([], 5), "v", carry=carry
    )


def check_a_superstep_that_does_not_run_leaves_its_tables(group: Group) -> None:
    for options in OPTIONS:
        loop = by_turns(group, lambda carry: carry["n"] % 2 == 0, lambda carry: carry["n"] % 2 == 1)
        found = run_loop(loop, group, Options(**options))
        v = np.arange(6)
        for i in range(5):
            v = v * 2 if i % 2 else v + 10
        assert sorted(rows_of(group, found)) == sorted((x,) for x in v.tolist())
        assert len(rows_of(group, found.outputs["d"])) == 12  # type: ignore[arg-type]


def check_a_table_with_keys_of_before_keeps_no_plan_of_the_newer_ones(group: Group) -> None:
    """The state's keys change in the iteration in which another table takes the old ones, and keeps them."""

    def moving(r: Batch, n: Batch) -> Batch:
        return r.with_columns(k=r["k"] + (100 if n["value"][0] >= 2 else 0))

    copy = Local(lambda s: s, ("s",), "old", "share")
    keep = Superstep("keep", (copy,), (Replace("t", "old"),), lambda carry: carry["n"] in (2, 5, 6))
    stages = (
        Local(moving, ("r", "n"), "m", "share"),
        ir.Shuffle("m", ("k",), "s1", {"x": ir.sum("x")}),
        ir.Shuffle("t", ("k",), "o1", {"x": ir.sum("x")}),
    )
    step = Superstep("step", stages, (Replace("s", "s1"), Sink("out", "o1"), Accumulate("n", "z")))
    sources = {"r": local(Batch(k=np.arange(12), x=np.ones(12)), group), "z": Batch(z=np.zeros(1))}
    state = {"s": State("r"), "t": State("r")}
    carry = {"n": Carry(ir.COUNT, keep=True)}
    loop = Loop("stale", sources, state, (keep, step), Until.of([], 9), "s", carry=carry)
    found = rows_of(group, ran(loop, group).outputs["out"])  # type: ignore[arg-type]
    wanted = [k + (100 if i >= 5 else 0) for i in range(9) for k in range(12)]
    assert sorted(k for k, _ in found) == sorted(wanted)


def check_rank_0_decides_for_all(group: Group) -> None:
    loop = by_turns(group, lambda carry: group.rank == 0, lambda carry: group.rank != 0)
    assert sorted(rows_of(group, ran(loop, group))) == [(x + 50,) for x in range(6)]


def check_a_condition_that_raises_is_an_error_of_the_user_on_all_ranks(group: Group) -> None:
    trouble = {"at": 2}

    def condition(carry: Any) -> bool:
        if carry["n"] == trouble["at"]:
            raise ValueError("no luck")
        return True

    run = LoopRun(by_turns(group, condition, lambda carry: False), group)
    run.advance()
    run.advance()
    error = raised(group, ir.UserCodeError, run.advance)
    assert isinstance(error, ir.UserCodeError)
    assert error.failure.stage == "add: when" and error.failure.iteration == 3 and error.failure.rank == 0
    assert run.iteration == 2 and run.carry == {"n": 2}
    trouble["at"] = -1
    run.run()
    assert sorted(rows_of(group, run.tables["v"])) == [(x + 50,) for x in range(6)]


def check_a_rolled_back_iteration_gains_nothing_and_sinks_nothing(group: Group) -> None:
    trouble = {"rank": group.size - 1, "now": True}

    def late(t: Batch) -> Batch:
        if trouble["now"] and group.rank == trouble["rank"]:
            raise ValueError("no luck")
        return t

    first = Superstep("first", (Local(lambda r: r, ("r",), "t"),), (Accumulate("n", "t"), Sink("out", "t")))
    second = Superstep(
        "second", (Local(late, ("r",), "u", "share"),), (Accumulate("n", "u"), Replace("r", "u"))
    )
    sources = {"rows": local(Batch(x=np.arange(10)), group)}
    carry = {"n": Carry(ir.COUNT, keep=True)}
    loop = Loop("late", sources, {"r": State("rows")}, (first, second), Until.of([], 3), "r", carry=carry)
    run = LoopRun(loop, group)
    raised(group, ir.UserCodeError, run.advance)
    raised(group, ir.UserCodeError, run.advance)
    assert run.carry == {"n": 0} and run.outputs == {"out": []}
    trouble["now"] = False
    run.run()
    assert run.carry == {"n": 60}
    assert sorted(x for t in run.outputs["out"] for (x,) in rows_of(group, t)) == sorted(list(range(10)) * 3)


# ---------------------------------------------------------------------- feeds


def summing(group: Group, feed: Any, most: int = 4, feeds: Any = None) -> Loop:
    """A running sum of what is fed: per key at its owner, and in all."""
    stages = (
        ir.Shuffle("new", ("k",), "s", {"x": ir.sum("x")}, onto="sums"),
        Local(lambda s, sums: sums.with_columns(x=sums["x"] + s["x"]), ("s", "sums"), "n", "share"),
        Local(lambda r: r.select("x"), ("new",), "x"),
    )
    step = Superstep("add", stages, (Replace("sums", "n"), Accumulate("all", "x"), Sink("fed", "new")))
    sources = {"zero": local(Batch(k=np.arange(4), x=np.zeros(4, np.int64)), group)}
    carry = {"all": Carry(ir.SUM, keep=True, dtype="int64")}
    state = {"sums": State("zero", ("k",))}
    return Loop(
        "running",
        sources,
        state,
        (step,),
        Until.of([], most),
        "sums",
        feeds=feeds or {"new": feed},
        carry=carry,
    )


def fed(i: int) -> Batch:
    return Batch(k=np.arange(5 + i) % 4, x=np.arange(5 + i) * i)


def slow_sums(most: int = 4) -> dict[int, int]:
    sums = dict.fromkeys(range(4), 0)
    for i in range(1, most + 1):
        for k, x in zip(fed(i)["k"].tolist(), fed(i)["x"].tolist(), strict=True):
            sums[k] += x
    return sums


def check_feeds_are_read_at_the_start_of_their_iteration(group: Group) -> None:
    kinds: dict[str, Callable[[int], Any]] = {
        "own rows": lambda i: local(fed(i), group),
        "dataset": lambda i: ir.Dataset.from_local(group, **{n: share(fed(i), group)[n] for n in "kx"}),
        "same everywhere": fed,
        "some ranks without rows": lambda i: local(fed(i), group, [0] * (group.size - 1) + [len(fed(i))]),
        "a loop": lambda i: ir.MapReduce(key="k", reduce=ir.SUM)(
            ir.Dataset(ir.dataset.source_node(local(fed(i), group)))
        ),
    }
    for options in OPTIONS:
        for feed in kinds.values():
            found = run_loop(summing(group, feed), group, Options(**options))
            assert dict(rows_of(group, found)) == slow_sums()
            assert found.values == {"all": sum(slow_sums().values())}


def check_a_driver_with_its_own_while_feeds_rows(group: Group) -> None:
    run = LoopRun(summing(group, None, most=100), group)
    i = 0
    while run.carry["all"] < 200:
        i += 1
        assert run.wants == ("new",)
        position = run.advance({"new": local(fed(i), group)})
        assert isinstance(position, ir.Position) and position.iteration == i and position.path == (i,)
    assert dict(rows_of(group, run.tables["sums"])) == slow_sums(i) and i < 20


def check_feeds_that_are_missing_or_unknown(group: Group) -> None:
    run = LoopRun(summing(group, None), group)
    last = group.size - 1
    for feed, text in (
        (None, 'feed "new" is missing'),
        ({}, 'feed "new" is missing'),
        ({"news": fed(1), "new": fed(1)}, 'feed "news" is not taken here'),
        ({"new": 7}, "wanted a Batch"),
        (7, "feed is a mapping"),
    ):
        for here in (True, group.rank == last):  # on all ranks, on one
            given = feed if here else {"new": fed(1)}
            assert text in str(raised(group, ir.UsageError, lambda given=given: run.advance(given)))  # type: ignore[misc]
    assert run.iteration == 0
    run.advance({"new": fed(1)})
    loop = by_turns(group, lambda c: True, lambda c: True)
    unfed = LoopRun(loop, group)
    feed = {"rows": fed(1)} if group.rank == last else None
    assert "takes: none" in str(raised(group, ir.UsageError, lambda: unfed.advance(feed)))
    unfed.advance()


def check_a_feed_that_fails_on_one_rank(group: Group) -> None:
    trouble = {"now": True}

    def feed(i: int) -> LocalSource:
        if i == 2 and trouble["now"] and group.rank == group.size - 1:
            raise ValueError("no luck")
        return local(fed(i), group)

    run = LoopRun(summing(group, feed), group)
    run.advance()
    error = raised(group, ir.UserCodeError, run.advance)
    assert isinstance(error, ir.UserCodeError)
    assert error.failure.rank == group.size - 1 and 'feeds of "running"' in error.failure.stage
    assert run.iteration == 1
    trouble["now"] = False
    run.run()
    assert dict(rows_of(group, run.tables["sums"])) == slow_sums()


def check_feeds_of_different_kinds_or_columns_are_an_error_on_all_ranks(group: Group) -> None:
    if group.size == 1:
        return

    def kinds(i: int) -> Any:
        return fed(i) if group.rank else local(fed(i), group)

    def columns(i: int) -> Any:
        return LocalSource(Batch(k=np.arange(3), **{"x" if group.rank else "y": np.arange(3)}))

    for feed in (kinds, columns):
        run = LoopRun(summing(group, feed), group)
        raised(group, ir.DisagreementError, run.advance)
        assert run.iteration == 0


def check_feeds_of_two_levels(group: Group) -> None:
    """The outer loop is fed once per iteration, the inner one in each of its own."""
    add = Superstep(
        "add",
        (Local(lambda s, n, o: Batch(x=s["x"] + n["x"] * o["x"]), ("s", "in", "out"), "t"),),
        (Replace("s", "t"),),
    )
    inner = Loop(
        "inner", {}, {"s": State("v")}, (add,), Until.of([], 2), "s", feeds={"in": None}, outer=("v", "out")
    )
    body = (inner, Superstep("take", (), (Replace("v", "inner"),)))
    zero = {"zero": Batch(x=np.zeros(1, np.int64))}
    run = LoopRun(
        Loop("outer", zero, {"v": State("zero")}, body, Until.of([], 2), "v", feeds={"out": None}), group
    )
    total, wants = 0, []
    while run.outcome is None:
        wants.append(run.wants)
        run.advance(
            {name: Batch(x=np.array([len(wants) + (100 if name == "out" else 0)])) for name in run.wants}
        )
    assert wants == [("out", "in"), ("in",), (), ("out", "in"), ("in",), ()]
    total = (1 + 2) * 101 + (4 + 5) * 104
    assert run.tables["v"].batch["x"].tolist() == [total]


# ---------------------------------------------------------------------- sinks


def check_sinks_keep_the_rows_of_every_iteration(group: Group) -> None:
    def step(r: Batch) -> Batch:
        r = r.take(np.flatnonzero(r["x"] % 3 != 1))
        return r.with_columns(x=r["x"] + 1)

    both = (Local(step, ("r",), "n", "share"), ir.Shuffle("n", ("x",), "by"), Gather("n", "g"))
    sinks = (Sink("rows", "n"), Sink("by key", "by"), Sink("all", "g"), Replace("r", "n"))
    sources = {"rows": local(Batch(x=np.arange(12)), group)}
    loop = Loop(
        "sinking", sources, {"r": State("rows")}, (Superstep("s", both, sinks),), Until.of([], 3), "r"
    )
    for options in OPTIONS:
        found = run_loop(loop, group, Options(**options))
        x, wanted = list(range(12)), []
        for _ in range(3):
            x = [v + 1 for v in x if v % 3 != 1]
            wanted += x
        assert sorted(rows_of(group, found.outputs["rows"])) == sorted((v,) for v in wanted)  # type: ignore[arg-type]
        assert sorted(rows_of(group, found.outputs["by key"])) == sorted((v,) for v in wanted)  # type: ignore[arg-type]
        assert found.outputs["by key"].layout.keys == ("x",)
        assert found.outputs["all"].everywhere and found.outputs["all"]["x"].tolist() == wanted
        same(group, repr(list(found.outputs)))


def check_rows_that_do_not_fit_an_output(group: Group) -> None:
    def other(r: Batch) -> Batch:
        return Batch(y=r["x"])

    stages = (Gather("r", "g"), Local(other, ("r",), "o"))
    for second, kind, text in (("g", ir.UsageError, "two outputs"), ("o", ir.SchemaError, 'output "out"')):
        step = Superstep("s", stages, (Sink("out", "r"), Sink("out", second)))
        sources = {"rows": local(Batch(x=np.arange(12)), group)}
        loop = Loop("sinking", sources, {"r": State("rows")}, (step,), Until.of([], 3), "r")
        assert text in str(raised(group, kind, lambda loop=loop: LoopRun(loop, group).run()))  # type: ignore[misc]


def check_a_condition_without_a_truth_value_is_an_error_on_all_ranks(group: Group) -> None:
    step = Superstep("step", (), (), when=lambda carry: np.arange(2) == 0)  # type: ignore[arg-type,return-value]
    sources = {"rows": local(Batch(x=np.arange(5.0)), group)}
    loop = Loop("asking", sources, {"r": State("rows")}, (step,), Until.of([], 3), "r")
    assert "step: when" in str(raised(group, ir.UserCodeError, lambda: ran(loop, group)))


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
