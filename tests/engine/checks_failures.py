"""Whatever fails in user code, on whichever rank and in whichever stage, all ranks raise the same error.

The loop under test has every place where user code runs: `PLACES`. A case is a fault there, on some ranks, in
some iteration. Afterwards the tables are those of the last commit, the run goes on once the fault is gone and
ends as an undisturbed one, and another loop runs on the same group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group, group_for
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.frontends.mapreduce import ReduceGroups
from iterreduce.loop import Local, Loop, Replace, Shuffle, Splitters, State, Superstep, Total
from tests.engine.kit import Check, Row, int_rows, local, raised, rows_here, rows_of

N, MOST = 40, 4
LONG = 11  # iterations: one for each place, and one before and behind
BODY = (
    "map of the first shuffle",
    "map of the second shuffle",
    "reduce function",
    "map of the total",
    "update",
    "share-local at the end",
    "map of the sort",
)
UNTIL = ("distance", "predicate")
PLACES = (*BODY, *UNTIL)


class Trouble(Exception):
    """What user code raises."""


def raise_plainly() -> Batch:
    raise Trouble("no luck")  # this line must be in the text


def wrong_shape() -> Batch:
    return Batch(a=np.zeros(3), b=np.zeros(4))


def out_of_memory() -> Batch:
    raise MemoryError


def leave() -> Batch:
    raise SystemExit(3)


def interrupt() -> Batch:
    raise KeyboardInterrupt


def mute() -> Batch:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("I have no text")

        __repr__ = __str__

    raise Mute


KINDS: dict[Callable[[], Batch], str] = {
    raise_plainly: "Trouble",
    wrong_shape: "SchemaError",
    out_of_memory: "MemoryError",
    leave: "SystemExit",
    interrupt: "KeyboardInterrupt",
    mute: "Mute",
}


@dataclass
class Fault:
    """Where, on which ranks and in which iteration user code fails, and how; ``place`` None: it does not."""

    place: str | None = None
    ranks: frozenset[int] = frozenset()
    iteration: int = 0
    how: Callable[[], Batch] = raise_plainly
    other: tuple[str, int] | None = None  # another place that fails on another rank

    def here(self, place: str, rank: int, iteration: int) -> None:
        if iteration == self.iteration and (
            (place == self.place and rank in self.ranks) or (place, rank) == self.other
        ):
            self.how()


def the_loop(group: Group, fault: Fault, most: int = MOST) -> Loop:
    """Two supersteps, three shuffles (two are planned from the second iteration on), a total, user rules."""
    rows, pages = int_rows(N, 8).select("k", "x"), Batch(k=np.arange(-20, 21), v=np.arange(41))
    clock = {"i": 1}  # of this rank: user code may know the iteration; set back with the engine's

    def fails(place: str) -> None:
        fault.here(place, group.rank, clock["i"])

    def first(r: Batch, c: Batch) -> Batch:
        clock["i"] = int(c["i"][0]) + 1
        fails("map of the first shuffle")
        return r

    def second(r: Batch, s: Batch) -> Batch:
        fails("map of the second shuffle")
        return Batch(k=-r["k"], x=r["x"] + 1)

    def reduce(groups: ir.Groups) -> Batch:
        fails("reduce function")
        return groups.keys.with_columns(x=groups.sum("x"))

    def total(a: Batch) -> Batch:
        fails("map of the total")
        return Batch(x=a["x"] % 97)

    def update(s: Batch, a: Batch, t: Batch) -> Batch:
        fails("update")
        return s.with_columns(v=s["v"] + a["x"] + t["x"][0])

    def third(r: Batch) -> Batch:
        fails("map of the sort")
        return r

    def last(s: Batch, b: Batch, sorted_rows: Batch) -> Batch:
        fails("share-local at the end")
        return s.with_columns(v=s["v"] * 3 % 1013 + int(b["x"].sum()) * 0)

    def moved(old: Batch, new: Batch) -> np.ndarray:
        fails("distance")
        return np.abs(new["v"] - old["v"]) + 1.0

    def enough(old: Batch, new: Batch) -> bool:
        fails("predicate")
        return False

    one = Superstep(
        "one",
        (
            Local(first, ("r", "clock"), "m"),
            Shuffle("m", ("k",), "a", {"x": ir.sum("x")}, "s"),
            Local(total, ("a",), "ta"),
            Total("ta", (), ir.SUM, "t"),
            Local(update, ("s", "a", "t"), "n", "share"),
        ),
        (Replace("s", "n"),),
    )
    two = Superstep(
        "two",
        (
            Local(second, ("r", "s"), "m2", "share"),
            Shuffle("m2", ("k",), "b0"),
            Local(ReduceGroups(reduce, ("k",)), ("b0",), "b", "share"),
            Shuffle("r", ("k",), "planned", {"x": ir.max("x")}),
            Local(third, ("r",), "m3"),
            Shuffle("m3", ("x",), "sorted", route=Splitters(4)),
            Local(last, ("s", "b", "sorted"), "n2", "share"),
            Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "c2"),
        ),
        (Replace("s", "n2"), Replace("clock", "c2")),
    )
    until = Until((ir.distance(moved, table="s") <= 0.5, ir.Predicate(enough, "s"), MaxIterations(most)))
    sources = {"r": local(rows, group), "p": local(pages, group), "z": Batch(i=np.zeros(1, np.int64))}
    return Loop("faulty", sources, {"s": State("p", ("k",)), "clock": State("z")}, (one, two), until, "s")


def tables_here(run: LoopRun) -> str:
    return repr([rows_here(run.tables[name].batch) for name in ("s", "clock")])


@functools.cache
def undisturbed() -> list[list[Row]]:
    """The state after each iteration, on one rank."""
    solo = group_for(None)
    run, found = LoopRun(the_loop(solo, Fault(), LONG), solo), []
    while run.outcome is None:
        run.advance()
        found.append(sorted(rows_of(solo, run.tables["s"])))
    return found


class Survivor:
    """A run that meets faults and goes on after each, as an undisturbed one. Collective."""

    def __init__(self, group: Group, most: int = MOST, **options: object) -> None:
        self.group, self.fault, self.most = group, Fault(), most
        loop = the_loop(group, self.fault, most)
        self.run = LoopRun(loop, group, ir.Options(**options))  # type: ignore[arg-type]

    def meet(self, fault: Fault) -> BaseException:
        """Go on to the fault's iteration and run into it; the tables are those of the last commit."""
        run = self.run
        while run.iteration < fault.iteration - 1:
            self.advance()
        before = tables_here(run) if run.iteration else ""
        vars(self.fault).update(vars(fault))
        error = raised(self.group, ir.UserCodeError, run.advance)
        self.fault.place = self.fault.other = None
        assert run.iteration == fault.iteration - 1 and run.outcome is None
        if before:
            assert tables_here(run) == before
        return error

    def advance(self) -> None:
        self.run.advance()
        assert sorted(rows_of(self.group, self.run.tables["s"])) == undisturbed()[self.run.iteration - 1]

    def end(self) -> None:
        while self.run.outcome is None:
            self.advance()
        assert self.run.iteration == self.most


def assert_tells(error: BaseException, fault: Fault, group: Group) -> None:
    assert isinstance(error, ir.UserCodeError)
    failure, place, ranks = error.failure, fault.place, fault.ranks
    assert (failure.rank, failure.iteration, failure.kind) == (min(ranks), fault.iteration, KINDS[fault.how])
    assert failure.ranks_failed == len(ranks)
    text = str(error)
    assert (
        f"rank {min(ranks)} on" in text
        and f"iteration {fault.iteration}" in text
        and "checks_failures.py" in text
    )
    assert fault.how.__name__ in text, "the traceback names the user's function"
    assert (
        "fixpoint" if place in UNTIL else "two" if place in (BODY[1], BODY[2], *BODY[5:]) else "one"
    ) in failure.stage
    if group.rank == min(ranks):
        assert type(error.__cause__).__name__ == KINDS[fault.how]
    else:
        assert error.__cause__ is None


def some_ranks(group: Group) -> Iterator[frozenset[int]]:
    yield frozenset({group.size - 1})
    if group.size > 1:
        yield frozenset(range(group.size))
    if group.size == 2:
        yield frozenset({0})


def check_every_place_with_fresh_and_with_planned_exchanges(group: Group) -> None:
    for place in PLACES:
        for ranks in some_ranks(group):
            survivor = Survivor(group)
            for iteration in (1, 3):
                fault = Fault(place, ranks, iteration)
                assert_tells(survivor.meet(fault), fault, group)
            survivor.end()


def check_every_kind_of_failure(group: Group) -> None:
    """In three places: one attempt at an iteration after the other."""
    for how in KINDS:
        survivor = Survivor(group)
        for iteration in (1, 3):
            for place in ("map of the first shuffle", "share-local at the end", "predicate"):
                fault = Fault(place, frozenset({group.size - 1}), iteration, how)
                assert_tells(survivor.meet(fault), fault, group)
        survivor.end()


def check_two_ranks_may_fail_in_different_stages(group: Group) -> None:
    if group.size == 1:
        return
    for early, late in (
        BODY[:2],
        BODY[1:3],
        (BODY[0], "distance"),
        ("update", "share-local at the end"),
        ("distance", "predicate"),
    ):
        for early_rank, late_rank in ((0, group.size - 1), (group.size - 1, 0)):
            survivor = Survivor(group)
            for iteration in (1, 3):
                fault = Fault(early, frozenset({early_rank}), iteration, other=(late, late_rank))
                error = survivor.meet(fault)
                assert isinstance(error, ir.UserCodeError)
                # those of one collective are counted together, a later one is never reached
                together = early == "distance"
                wanted = (0, 2) if together else (early_rank, 1)
                assert (error.failure.rank, error.failure.ranks_failed) == wanted
            survivor.end()


def check_faults_under_naive_and_check(group: Group) -> None:
    """A fault in each iteration but the first, which is done again before the next."""
    for options in ({"naive": True}, {"check": True}, {"memory_bytes": 60}):
        survivor = Survivor(group, LONG, **options)
        for iteration, place in enumerate(PLACES, 2):
            fault = Fault(place, frozenset({group.size - 1}), iteration)
            assert_tells(survivor.meet(fault), fault, group)
        survivor.end()


def check_a_good_loop_runs_after_a_bad_one(group: Group) -> None:
    for how in KINDS:
        raised(
            group,
            ir.UserCodeError,
            lambda how=how: LoopRun(the_loop(group, Fault(BODY[0], frozenset({0}), 1, how)), group).run(),
        )  # type: ignore[misc]
        run = LoopRun(the_loop(group, Fault()), group)
        run.run()
        assert sorted(rows_of(group, run.tables["s"])) == undisturbed()[MOST - 1]


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
