"""Loops inside a body, against plain loops in Python and NumPy, on any number of ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.events import Event, Events
from iterreduce.fixpoint import Outcome, Until
from iterreduce.loop import Carry, Local, Loop, Replace, Shuffle, Sink, State, Superstep, Total
from iterreduce.options import Options
from iterreduce.run import run_loop
from tests.engine.kit import Check, folding_of, local, raised, ran, rows_of, same

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"naive": True}, {"check": True}, {"memory_bytes": 100})
KS, PENALTY, MOST = 5, 3.0, 30


def points() -> np.ndarray:
    random = np.random.default_rng(3)
    return random.permutation(np.concatenate([random.normal(c, 0.3, 17) for c in (0, 4, 10)]))


def assign(p: Batch, c: Batch) -> Batch:
    nearest = np.abs(p["x"][:, None] - c["x"]).argmin(axis=1)
    return Batch(cluster=nearest, x=p["x"], n=np.ones(len(p)))


def recentre(s: Batch, c: Batch) -> Batch:
    x = c["x"].copy()
    x[s["cluster"]] = s["x"] / s["n"]
    return Batch(x=x)


def choose(best: Batch) -> Batch:
    return Batch(x=np.linspace(0, 10, int(best["k"][0]) + 1))


def cost(p: Batch, c: Batch) -> Batch:
    return Batch(e=np.abs(p["x"][:, None] - c["x"]).min(axis=1) ** 2)


def better(t: Batch, c: Batch, best: Batch) -> Batch:
    score = t["e"][0] + PENALTY * len(c)
    wins = score < best["score"][0]
    best_k = np.array([len(c)]) if wins else best["best"]
    return Batch(k=np.array([len(c)]), best=best_k, score=np.minimum(best["score"], score))


def kmeans(**more: Any) -> Loop:
    step = Superstep(
        "lloyd",
        (
            Local(assign, ("points", "c"), "p"),
            Total("p", ("cluster",), ir.SUM, "s"),
            Local(recentre, ("s", "c"), "c1", "share"),
        ),
        (Replace("c", "c1"),),
    )
    until = Until.of(ir.l1("x", table="c") <= 1e-12, MOST)
    return Loop("kmeans", {}, {"c": State("seeds")}, (step,), until, "c", outer=("points", "seeds"), **more)


def choosing_k(group: Group, inner: Loop) -> Loop:
    start = Batch(k=np.array([0]), best=np.array([0]), score=np.array([np.inf]))
    seeds = Superstep("choose k", (Local(choose, ("best",), "s0", "share"),), (Replace("seeds", "s0"),))
    keep = Superstep(
        "keep better",
        (
            Local(cost, ("points", inner.name), "e"),
            Total("e", (), ir.SUM, "t"),
            Local(better, ("t", inner.name, "best"), "b", "share"),
        ),
        (Replace("best", "b"), Sink("history", "b")),
    )
    sources = {"points": local(Batch(x=points()), group), "start": start}
    state = {"best": State("start"), "seeds": State("start")}
    return Loop("nested", sources, state, (seeds, inner, keep), Until.of([], KS), "best")


def slow_choice() -> tuple[int, list[float]]:
    x, best, score, scores = points(), 0, np.inf, []
    for k in range(1, KS + 1):
        c = np.linspace(0, 10, k)
        for _ in range(MOST):
            nearest, before = np.abs(x[:, None] - c).argmin(axis=1), c.copy()
            for j in set(nearest.tolist()):
                c[j] = x[nearest == j].mean()
            if np.abs(c - before).sum() <= 1e-12:
                break
        now = float((np.abs(x[:, None] - c).min(axis=1) ** 2).sum() + PENALTY * k)
        best, score = (k, now) if now < score else (best, score)
        scores.append(score)
    return best, scores


def check_k_means_over_choices_of_k_is_that_of_a_slow_loop(group: Group) -> None:
    best, scores = slow_choice()
    for options in OPTIONS:
        found = run_loop(choosing_k(group, kmeans()), group, Options(**options))
        assert found.iterations == KS and found.outcome is Outcome.ITERATIONS_USED
        assert found["best"].tolist() == [best]
        assert found.outputs["history"].everywhere
        assert np.allclose(found.outputs["history"]["score"], scores)
        assert len(found.seconds_per_iteration) == len(found.bytes_exchanged["per_iteration"]) == KS


# ---------------------------------------------------------------------- three levels


def counting(group: Group, trouble: Any = lambda place, path: None, keyed: bool = True) -> Loop:
    """Three levels over a keyed table: v grows by 1 innermost, is doubled in the middle, and sunk outside."""
    rows = Batch(k=np.arange(7) * 11, v=np.arange(7))

    def told(place: str, tables: Batch) -> Batch:
        trouble(place, tables)
        return tables

    def add(v: Batch) -> Batch:
        return told("innermost", v.with_columns(v=v["v"] + 1))

    def double(v: Batch) -> Batch:
        return told("middle", v.with_columns(v=v["v"] * 2 % 1009))

    key = ("k",) if keyed else ()

    def writing(name: str, function: Any, *reads: str) -> Superstep:
        stages = (Local(function, reads, f"{name} made", "share"),)
        return Superstep(name, stages, (Replace("v", f"{name} made"),))

    def take(v: Batch, inner: Batch) -> Batch:
        return told("take", inner)

    inner = Loop(
        "inner", {}, {"v": State("w", key)}, (writing("add", add, "v"),), Until.of([], 3), "v", outer=("w",)
    )
    again = Superstep("rename", (Local(double, ("v",), "d", "share"),), (Replace("w", "d"),))
    middle = Loop(
        "middle",
        {},
        {"v": State("u", key), "w": State("u", key)},
        (again, inner, writing("take", take, "v", "inner")),
        Until.of([], 2),
        "v",
        outer=("u",),
    )
    outer = (
        Superstep("give", (Local(lambda v: told("give", v), ("v",), "g", "share"),), (Replace("u", "g"),)),
        middle,
        writing("back", lambda v, m: told("back", m), "v", "middle"),
        Superstep("note", (), (Sink("seen", "v"),)),
    )
    state = {"v": State("rows", key), "u": State("rows", key)}
    return Loop("outer", {"rows": local(rows, group)}, state, outer, Until.of([], 3), "v")


def slow_count() -> list[dict[int, int]]:
    v, seen = {k * 11: k for k in range(7)}, []
    for _ in range(3):
        u = dict(v)
        m = dict(u)
        for _ in range(2):
            w = {k: x * 2 % 1009 for k, x in m.items()}
            for _ in range(3):
                w = {k: x + 1 for k, x in w.items()}
            m = w
        v = m
        seen.append(dict(v))
    return seen


def check_three_levels_and_their_positions(group: Group) -> None:
    for options in OPTIONS:
        for keyed in (True, False):
            run = LoopRun(counting(group, keyed=keyed), group, Options(**options))
            paths = []
            while not isinstance(at := run.advance(), Outcome):
                paths.append(at.path)
                assert at.iteration == at.path[0] and len(at.loops) == len(at.path)
            wanted = [
                path
                for i in range(3)
                for path in (
                    *(p for j in range(2) for p in (*((i, j, n) for n in (1, 2, 3)), (i, j + 1))),
                    (i + 1,),
                )
            ]
            assert [*paths, (3,)] == wanted and paths == sorted(paths)
            assert dict(rows_of(group, run.tables["v"])) == slow_count()[-1]
            assert run.outcomes == dict.fromkeys(("inner", "middle"), Outcome.ITERATIONS_USED)
            seen = [row for table in run.outputs["seen"] for row in rows_of(group, table)]
            assert sorted(seen) == sorted(row for v in slow_count() for row in v.items())


def check_events_carry_the_path(group: Group) -> None:
    seen: list[Event] = []
    events = Events()
    events.subscribe(seen.append)
    run_loop(counting(group), group, events=events)
    commits = [e.fields["path"] for e in seen if e.name == "iteration.commit"]
    starts = [e.fields["path"] for e in seen if e.name == "iteration.start"]
    assert sorted(starts) == commits and commits[-1] == (3,) and commits[0] == (0, 0, 1)
    ends = [
        (e.fields["name"], e.fields["path"], e.fields["iterations"]) for e in seen if e.name == "loop.end"
    ]
    assert ends[:3] == [
        ("outer/middle/inner", (0, 0, 3), 3),
        ("outer/middle/inner", (0, 1, 3), 3),
        ("outer/middle", (0, 2), 2),
    ]
    same(group, repr((commits, starts, ends)))


# ---------------------------------------------------------------------- what stays from entry to entry


def spreading(group: Group, lies: bool, calls: dict[str, int], prepared: bool = True) -> Loop:
    """The inner loop sums over edges onto its keyed state; the outer one starts it anew from its own."""
    random = np.random.default_rng(1)
    edges = Batch(src=random.integers(0, 20, 200), dst=random.integers(0, 20, 200))
    start = Batch(k=np.arange(20), v=np.arange(20))

    def prepare(e: Batch) -> Batch:
        calls["once"] = calls.get("once", 0) + 1
        return Batch(k=e["dst"], x=e["src"] + 1)

    def entry(p: Batch, v: Batch) -> Batch:
        calls["entry"] = calls.get("entry", 0) + 1
        return p.with_columns(x=p["x"] * 1)

    def settle(h: Batch, v: Batch) -> Batch:
        return v.with_columns(v=(v["v"] * 3 + h["x"]) % 1009)

    step = Superstep(
        "step",
        (
            Shuffle("rows", ("k",), "h", {"x": ir.sum("x")}, onto="v"),
            Local(settle, ("h", "v"), "n", "share"),
        ),
        (Replace("v", "n"),),
    )
    inner = Loop(
        "inner",
        {},
        {"v": State("start", ("k",))},
        (step,),
        Until.of([], 4),
        "v",
        prepare=(Local(prepare, ("edges",), "mine"), Local(entry, ("mine", "tick"), "rows")),
        outer=("edges", "start", "tick"),
    )
    tick = Superstep("tick", (Local(lambda t: Batch(i=t["i"] + 1), ("tick",), "t"),), (Replace("tick", "t"),))
    take = Superstep("take", (), (Replace("v", "inner"),))
    moved = Superstep(
        "move",
        (Local(lambda v: v.with_columns(v=v["v"] + 1), ("start",), "s", "share"),),
        (Replace("start", "s"),),
    )
    state = {
        "v": State("first", ("k",)),
        "start": State("first", ("k",) if lies else ()),
        "tick": State("zero"),
    }
    sources = {"edges": local(edges, group), "first": local(start, group), "zero": Batch(i=np.zeros(1))}
    body = (tick, inner, take, moved)
    return Loop("spread", sources, state, body, Until.of([], 3), "v")


def slow_spread() -> list[int]:
    random = np.random.default_rng(1)
    src, dst = random.integers(0, 20, 200), random.integers(0, 20, 200)
    v = np.arange(20) + 2  # the third entry
    for _ in range(4):
        heard = np.zeros(20, np.int64)
        np.add.at(heard, dst, src + 1)
        v = (v * 3 + heard) % 1009
    return v.tolist()


def check_plans_stay_from_entry_to_entry(group: Group) -> None:
    for lies in (True, False):
        calls: dict[str, int] = {}
        run = LoopRun(spreading(group, lies, calls), group)
        sent = []
        while run.outcome is None:
            before = group.traffic.payload_bytes
            run.advance()
            sent.append(group.traffic.payload_bytes - before)
        assert dict(rows_of(group, run.tables["v"])) == dict(enumerate(slow_spread()))
        assert calls == {"once": 1, "entry": 3}
        steady = sent[3]  # an iteration of the first entry, values only
        again = sent[5:9]
        if lies:
            assert again == [steady] * 4, "the second entry sends no invariant bytes"
        else:  # its rows travel, by plan: values only
            assert again[1:] == [steady] * 3
        plans = [
            folding_of(w) for w in run.shop.exchangers if getattr(folding_of(w), "plan", None) is not None
        ]
        assert group.size == 1 or all(w.replans == 0 for w in plans)
        assert len(plans) == (1 if lies else 2)


def check_spreading_under_all_options(group: Group) -> None:
    for options in OPTIONS:
        for lies in (True, False):
            found = run_loop(spreading(group, lies, {}), group, Options(**options))
            assert dict(rows_of(group, found)) == dict(enumerate(slow_spread()))


# ---------------------------------------------------------------------- ends and edges


def check_outcomes_finish_values_and_carry_of_inner_loops(group: Group) -> None:
    count = Local(lambda c: Batch(k=np.array([len(c)])), ("c",), "size", "share")
    inner = kmeans(finish=(count,), values={"size": ("size", "k")})
    found = run_loop(choosing_k(group, inner), group)
    assert found.values == {"kmeans.size": KS}
    run = LoopRun(choosing_k(group, inner), group)
    run.run()
    assert run.outcomes == {"kmeans": Outcome.CONVERGED}


def check_an_inner_loop_that_starts_without_rows_runs_once(group: Group) -> None:
    def none(r: Batch) -> Batch:
        return r.slice(0, 0)

    for key in ((), ("k",)):
        step = Superstep("keep", (Local(none, ("s",), "n", "share"),), (Replace("s", "n"),))
        inner = Loop(
            "inner", {}, {"s": State("none", key)}, (step,), Until.of(ir.Empty("s"), 9), "s", outer=("none",)
        )
        body = (
            Superstep("drop", (Local(none, ("v",), "d", "share"),), (Replace("none", "d"),)),
            inner,
            Superstep("after", (), (Sink("empty", "inner"),)),
        )
        rows = local(Batch(k=np.arange(5), v=np.arange(5)), group)
        state = {"v": State("rows"), "none": State("rows")}
        run = LoopRun(Loop("outer", {"rows": rows}, state, body, Until.of([], 2), "v"), group)
        run.run()
        assert run.outcomes == {"inner": Outcome.EMPTY}
        assert all(rows_of(group, table) == [] for table in run.outputs["empty"])


def check_loops_side_by_side_and_a_loop_alone_in_a_body(group: Group) -> None:
    def adding(name: str, of: str, n: int) -> Loop:
        step = Superstep(
            "add", (Local(lambda s: Batch(x=s["x"] + n), ("s",), "t", "share"),), (Replace("s", "t"),)
        )
        return Loop(name, {}, {"s": State(of)}, (step,), Until.of([], n), "s", outer=(of,))

    start = {"zero": Batch(x=np.zeros(1, np.int64))}
    last = Superstep("last", (), (Replace("v", "two"),))
    pair = Loop(
        "pair",
        start,
        {"v": State("zero")},
        (adding("one", "v", 2), adding("two", "one", 3), last),
        Until.of([], 4),
        "v",
    )
    assert ran(pair, group)["x"].tolist() == [4 * (2 * 2 + 3 * 3)]
    alone = Loop("alone", start, {"v": State("zero")}, (adding("one", "v", 2),), Until.of([], 3), "one")
    assert ran(alone, group)["x"].tolist() == [4]


def check_keys_of_an_inner_state_must_be_unique(group: Group) -> None:
    step = Superstep("keep", (), (Replace("s", "s"),))
    inner = Loop("inner", {}, {"s": State("v", ("k",))}, (step,), Until.of([], 2), "s", outer=("v",))
    rows = local(Batch(k=np.array([1, 2, 1]), v=np.arange(3)), group)
    loop = Loop("outer", {"rows": rows}, {"v": State("rows")}, (inner,), Until.of([], 2), "v")
    error = raised(group, ir.UsageError, lambda: LoopRun(loop, group).run())
    assert "k=" in str(error) and "make its keys unique" in str(error)


def check_a_carry_of_an_inner_loop_begins_anew(group: Group) -> None:
    rows = local(Batch(x=np.arange(10)), group)
    step = Superstep("count", (), (ir.Accumulate("n", "rows"),))
    keep = Carry(ir.COUNT, keep=True)
    stop = Until.of(ir.carry("n") >= 30, 9)
    inner = Loop(
        "inner", {}, {"s": State("rows")}, (step,), stop, "s", carry={"n": keep}, outer=("rows", "all")
    )
    body = (
        Superstep("first", (), (ir.Accumulate("all", "rows"),)),
        inner,
        Superstep(
            "last",
            (Local(lambda a: a, ("all",), "seen"),),
            (ir.Accumulate("all", "rows"), Sink("before", "seen")),
        ),
    )
    outer = Loop(
        "outer", {"rows": rows}, {"v": State("rows")}, body, Until.of([], 3), "v", carry={"all": keep}
    )
    found = ran(outer, group)
    assert found.values == {"all": 60, "inner.n": 30}
    assert found.outputs["before"]["value"].tolist() == [0, 20, 40]


# ---------------------------------------------------------------------- states written in place


def patching(group: Group, trouble: Any = lambda place: None) -> Loop:
    """Both levels have a state v that is patched: the inner one begins with the outer one's rows."""
    rows = Batch(k=np.arange(10), v=np.arange(10))

    def some(v: Batch, of: int, add: int) -> Batch:
        trouble("inner" if of == 2 else "outer")
        here = v.take(np.flatnonzero(v["k"] % of == 0))
        return here.with_columns(v=here["v"] + add)

    def patch(name: str, of: int, add: int) -> Superstep:
        stage = Local(lambda v: some(v, of, add), ("v",), "some", "share")
        return Superstep(name, (stage,), (ir.Patch("v", "some"),))

    inner = Loop(
        "inner",
        {},
        {"v": State("w", ("k",))},
        (patch("even", 2, 100),),
        Until.of(ir.changed("v", table="v") <= 0, 3),
        "v",
        outer=("w",),
    )
    hand = Superstep("hand", (Local(lambda v: v, ("v",), "h", "share"),), (Replace("w", "h"),))
    take = Superstep("take", (), (Sink("ends", "inner"),))
    state = {"v": State("rows", ("k",)), "w": State("rows", ("k",))}
    body = (hand, inner, take, patch("thirds", 3, 1000))
    return Loop(
        "outer", {"rows": local(rows, group)}, state, body, Until.of(ir.changed("v", table="v") <= 0, 3), "v"
    )


def slow_patching() -> tuple[dict[int, int], list[tuple[int, int]]]:
    v, ends = {k: k for k in range(10)}, []
    for _ in range(3):
        ends += [(k, x + 300 if k % 2 == 0 else x) for k, x in v.items()]
        v = {k: x + 1000 if k % 3 == 0 else x for k, x in v.items()}
    return v, ends


def check_states_of_two_levels_that_are_written_in_place(group: Group) -> None:
    v, ends = slow_patching()
    for options in OPTIONS:
        found = run_loop(patching(group), group, Options(**options))
        assert found.outcome is Outcome.ITERATIONS_USED and found.residual == 4
        assert dict(rows_of(group, found)) == v
        assert sorted(rows_of(group, found.outputs["ends"])) == sorted(ends)  # type: ignore[arg-type]


def check_a_state_that_is_written_in_place_before_an_inner_loop_has_no_distance(group: Group) -> None:
    loop = patching(group)
    steps = (loop.body[3], *loop.body[:3])
    error = raised(group, ir.UsageError, lambda: LoopRun(dataclasses.replace(loop, body=steps), group))
    assert 'writes "v" in place before an inner loop' in str(error)


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
