"""What a run holds: accounts by name, tables that go when nobody reads them, rows that stream by."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.errors import InputError, MemoryBudgetError
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import Gather, Local, Loop, Replace, Shuffle, State, Superstep, Total
from iterreduce.options import Options
from iterreduce.run import run_loop
from iterreduce.sources import LocalSource
from iterreduce.sources.blocks import Blocks
from iterreduce.sources.finite import FiniteSource
from tests.engine.checks_links import graph, program
from tests.engine.kit import Check, int_rows, local, looping, raised, rows_here, rows_of, same, share

MEBI = 1 << 20


class Watched(LocalSource):
    """Notes how many rows each read asked for."""

    def __init__(self, batch: Batch):
        super().__init__(batch)
        self.reads: list[int] = []
        self.opened = 0

    def open(self, group: Group) -> None:
        super().open(group)
        self.opened += 1

    def read(self, lo: int, hi: int) -> Batch:
        made = super().read(lo, hi)
        self.reads.append(len(made))
        return made


def fresh_arrays(n: int, group: Group) -> Watched:
    """A source whose rows are made anew by every read: what holds them is the run alone."""

    class Made(Watched):
        def read(self, lo: int, hi: int) -> Batch:
            return super().read(lo, hi).copy()

    return Made(share(int_rows(n, 7), group))


def check_accounts_have_names_that_a_user_knows(group: Group) -> None:
    run = LoopRun(program(local(graph(), group), {"x": ir.sum("x")}, iterations=3), group)
    run.run()
    held = run.memory().report()
    assert {"state pages", "keys of keys", "index links"} <= set(held)
    if group.size > 1:
        assert "exchange buffers of Shuffle into heard" in held
    assert run.memory().total == sum(held.values())
    assert list(held.values()) == sorted(held.values(), reverse=True)


def check_plans_and_directories_have_accounts(group: Group) -> None:
    names = set()
    for vary in (False, True):
        run = LoopRun(by_key(group, vary), group)
        for _ in range(4):
            run.advance()
        names |= set(run.memory().report())
    of = "of Shuffle into sums"
    assert {f"plan {of}", f"combiner {of}", f"exchange buffers {of}"} <= names
    assert "source r" in names


def by_key(group: Group, vary: bool, rows: Any = None, most: int = 300) -> Loop:
    """Sums by key, of the same rows or of the same in another order, each time."""

    def turned(r: Batch, clock: Batch) -> Batch:
        n = int(clock["n"][0])
        made = r if not vary else Batch(k=np.roll(r["k"], n), x=np.roll(r["x"], n))
        return made

    return looping(
        {"r": rows or local(int_rows(400, 50), group), "zero": Batch(n=np.zeros(1, np.int64))},
        {"s": State(""), "clock": State("zero")},
        (
            Local(turned, ("r", "clock"), "turned", cut="share"),
            Shuffle("turned", ("k",), "sums", {"x": ir.sum("x")}),
            Local(lambda c: Batch(n=c["n"] + 1), ("clock",), "later", cut="share"),
        ),
        {"s": "sums", "clock": "later"},
        most=most,
    )


def check_memory_is_flat_from_the_second_iteration_on(group: Group) -> None:
    loops = [
        by_key(group, vary=False),
        program(local(graph(), group), {"x": ir.sum("x")}, iterations=300),
        program(local(graph(), group), {"x": ir.sum("x")}, key="src", iterations=300),
    ]
    for loop in loops:
        run = LoopRun(loop, group)
        sizes = []
        for i in range(1, 201):
            run.advance()
            if i in (3, 200):
                sizes.append(dict(run.memory().report()))
        assert sizes[0] == sizes[1]


def check_a_table_that_nobody_reads_any_more_is_let_go(group: Group) -> None:
    for naive in (False, True):
        refs: list[weakref.ref[Any]] = []
        alive: list[int] = []

        def count(rows: Batch, refs: list[Any] = refs) -> Batch:
            refs.append(weakref.ref(rows["x"].base))
            return Batch(k=rows["k"][:1], n=np.full(len(rows["k"][:1]), len(rows)))

        def look(total: Batch, state: Batch, refs: Any = refs, alive: Any = alive) -> Batch:
            if any(ref() is not None for ref in refs):
                gc.collect()
            alive.append(sum(ref() is not None for ref in refs))
            return state

        def late(few: Batch, refs: Any = refs, alive: Any = alive) -> Batch:
            alive.append(-sum(ref() is not None for ref in refs))
            return few

        loop = Loop(
            "loop",
            {"r": fresh_arrays(60, group), "zero": Batch(n=np.zeros(1))},
            {"s": State("zero")},
            (Superstep("step", (Local(look, ("n", "s"), "next", cut="share"),), (Replace("s", "next"),)),),
            Until((MaxIterations(3),)),
            "s",
            prepare=(
                Local(count, ("r",), "few", cut="share"),
                Local(late, ("few",), "fewer", cut="share"),
                Total("fewer", (), {"n": ir.sum("n")}, "n"),
            ),
        )
        run = LoopRun(loop, group, Options(naive=naive))
        run.run()
        assert set(alive) == {0}, "neither in a later prepare stage nor in an iteration"
        assert len(refs) == (3 if naive else 1)
        assert set(run.tables) == {"n", "s"}


def check_what_a_later_stage_reads_stays(group: Group) -> None:
    rows = int_rows(60, 7)
    loop = Loop(
        "loop",
        {"r": local(rows, group), "q": local(rows, group), "zero": Batch(n=np.zeros(1))},
        {"s": State("zero")},
        (Superstep("step", (Local(lambda s: s, ("s",), "next", cut="share"),), (Replace("s", "next"),)),),
        Until((MaxIterations(2),)),
        "all",
        prepare=(Gather("r", "g"), Total("g", (), {"n": ir.count()}, "n")),
        finish=(Gather("r", "all"),),
        values={"n": ("n", "n")},
    )
    for naive in (False, True):
        result = run_loop(loop, group, Options(naive=naive))
        assert result.values["n"] == 60
        assert sorted(rows_of(group, result)) == sorted(rows_here(rows))


def check_rows_that_only_an_index_reads_stream_by(group: Group) -> None:
    edges = graph(n=3000)
    wanted = None
    for kind in (LocalSource, Watched):
        source = kind(share(edges, group))
        run = LoopRun(program(source, {"x": ir.sum("x"), "n": ir.count()}), group)
        run.start()
        assert "edges" not in run.tables and not run.shop.streams
        run.run()
        rows = sorted(rows_of(group, run.tables["pages"]))
        assert wanted in (None, rows)
        wanted = rows
        if isinstance(source, Watched):
            assert sum(source.reads) == 2 * len(share(edges, group)), "twice"
            assert source.opened == 1
    naive = Watched(share(edges, group))
    run = LoopRun(
        program(naive, {"x": ir.sum("x"), "n": ir.count()}, iterations=2), group, Options(naive=True)
    )
    run.run()
    assert naive.opened == 2


def check_rows_that_somebody_else_reads_are_held(group: Group) -> None:
    source = Watched(share(graph(n=500), group))
    loop = program(source, {"n": ir.count()})
    also = Total("edges", (), {"n": ir.count()}, "many")
    run = LoopRun(replace(loop, prepare=(*loop.prepare, also), values={"n": ("many", "n")}), group)
    run.run()
    assert len(source.reads) == 1
    assert "edges" not in run.tables


def check_loops_in_a_body_stream_drop_and_name_what_is_theirs(group: Group) -> None:
    for naive in (False, True):
        edges = Watched(share(graph(n=400), group))
        inner = replace(program(edges, {"n": ir.count()}, iterations=2), name="inner", outer=("few",))
        also = Local(lambda keys, few: keys, ("keys", "few"), "unread", cut="share")
        inner = replace(inner, prepare=(*inner.prepare, also))
        total = Total("inner", (), {"pages": ir.count()}, "many")
        look = Local(lambda s, many: Batch(n=s["n"] + len(many)), ("s", "many"), "next", cut="share")
        loop = Loop(
            "outer",
            {"r": fresh_arrays(60, group), "zero": Batch(n=np.zeros(1))},
            {"s": State("zero")},
            (inner, Superstep("step", (total, look), (Replace("s", "next"),))),
            Until((MaxIterations(2),)),
            "s",
            prepare=(Total("r", (), {"n": ir.count()}, "few"),),
        )
        run = LoopRun(loop, group, Options(naive=naive))
        run.advance()
        assert not run.loader.read and not run.shop.streams
        assert set(run.level.constants) == {"few", "links", "start"}
        held = run.memory().report()
        assert {"outer/inner: state pages", "index links", "keys of keys"} <= set(held)
        run.run()
        assert run.tables["s"].batch["n"].tolist() == [2]
        assert "r" not in run.tables and "unread" not in run.tables
        assert naive or edges.opened == 1


def check_a_streamed_source_that_fails_tells_all_ranks(group: Group) -> None:
    edges = graph(n=300)
    edges["w"][200] = np.nan
    source = FiniteSource(local(edges, group), ("w",))
    error = raised(group, InputError, LoopRun(program(source, {"n": ir.count()}), group).run)
    assert "row 200 of w holds nan" in str(error)

    class Breaks(Watched):
        def read(self, lo: int, hi: int) -> Batch:
            if len(self.reads) == 1:
                raise InputError("the file became shorter")
            return super().read(lo, hi)

    source = Breaks(share(edges, group)) if group.rank == group.size - 1 else local(edges, group)
    error = raised(group, InputError, LoopRun(program(source, {"n": ir.count()}), group).run)
    assert "became shorter" in str(error)


class Huge(LocalSource):
    """A source that says it has many rows and must not be read."""

    def __init__(self, rows: int):
        super().__init__(Batch(src=np.zeros(1, np.int64), dst=np.zeros(1, np.int64)))
        self._rows = rows

    def open(self, group: Group) -> None:
        super().open(group)
        self.blocks = Blocks.of_rows(self._rows)

    def read(self, lo: int, hi: int) -> Batch:
        raise AssertionError("read")


def check_a_loop_that_cannot_fit_says_so_before_it_reads(group: Group) -> None:
    options = Options(memory_bytes=8 * MEBI)
    rows = 4 * MEBI * group.size  # 16 bytes each
    loop = looping({"points": Huge(rows)}, {"s": State("")}, (Gather("points", "all"),), {"s": "all"}, most=2)
    text = str(raised(group, MemoryBudgetError, LoopRun(loop, group, options).run))
    assert "source points" in text and "at least 64.0 MiB" in text and "budget is 8.0 MiB" in text
    assert f"use at least {8 * group.size} ranks" in text and "--memory 97MiB" in text
    indexed = program(Huge(rows), {"n": ir.count()})
    text = str(raised(group, MemoryBudgetError, LoopRun(indexed, group, options).run))
    assert "index links" in text and "source edges" not in text and "at least 16.0 MiB" in text
    constant = Batch(x=np.zeros(2 * MEBI))
    loop = replace(loop, sources={"points": constant})
    text = str(raised(group, MemoryBudgetError, LoopRun(loop, group, options).run))
    assert "more ranks would not help" in text
    small = LoopRun(program(local(graph(), group), {"n": ir.count()}), group, options)
    small.run()


def check_a_loop_that_outgrows_its_budget_ends_on_all_ranks(group: Group) -> None:
    last = group.size - 1

    def doubled(s: Batch) -> Batch:
        return Batch.concat([s, s]) if group.rank == last else s

    source = local(Batch(x=np.zeros(4096 * group.size)), group)
    loop = looping(
        {"start": source},
        {"s": State("start")},
        (Local(doubled, ("s",), "t", cut="share"),),
        {"s": "t"},
        most=20,
    )
    run = LoopRun(loop, group, Options(memory_bytes=2 * MEBI))
    error = raised(group, MemoryBudgetError, run.run)
    assert f"rank {last} of {group.size} holds" in str(error) and "state s" in str(error)
    assert 4 <= run.iteration < 20
    same(group, str(run.iteration))


def check_plans_get_what_tables_leave_of_a_budget(group: Group) -> None:
    run = LoopRun(by_key(group, vary=False, most=12), group, Options(memory_bytes=60))
    plain = LoopRun(by_key(group, vary=False, most=12), group)
    run.run()
    plain.run()
    assert sorted(rows_of(group, run.tables["s"])) == sorted(rows_of(group, plain.tables["s"]))
    assert run.shop.cache.evictions >= 1 and run.shop.cache.budget_bytes == 0


CHECKS: list[Check] = [
    work for name, work in sorted(globals().items()) if name.startswith("check_") and callable(work)
]
