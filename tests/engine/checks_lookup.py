"""Columns of a keyed table beside rows that name its keys: from wherever the table lies, fresh and planned.

The oracle is a dictionary, or a list of rows per key, asked row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.lookup import LookupRows
from iterreduce.loop import (
    Insert,
    Local,
    Lookup,
    Loop,
    Patch,
    Replace,
    Shuffle,
    State,
    Superstep,
    Write,
)
from tests.engine.kit import Check, Row, all_on, local, once, raised, rows_here, rows_of, started

N = 70
Missing = Literal["error", "drop", "null", "only"]
MISSING: tuple[Missing, ...] = ("drop", "null", "only")


def asking(n: int = N, keys: int = 30, seed: int = 1) -> Batch:
    """Rows that name keys, some often: id int64, k int64."""
    return Batch(id=np.arange(n), k=np.random.default_rng(seed).integers(0, keys, n))


def items(keys: Sequence[int] = range(0, 30, 2), shift: float = 0.0) -> Batch:
    """A keyed table: k int64, f float64, v float64[2]."""
    k = np.array(list(keys), np.int64)
    return Batch(k=k, f=k * 10.0 + shift, v=np.stack([k + shift, -k], 1).reshape(len(k), 2))


def wanted(rows: Batch, table: Batch, key: str, columns: Sequence[str], missing: Missing) -> list[Row]:
    known: dict[Any, list[Row]] = {}
    picked = rows_here(table.select(*columns)) if columns else [()] * len(table)
    for (k,), values in zip(rows_here(table.select(key)), picked, strict=True):
        known.setdefault(k, []).append(values)
    out: list[Row] = []
    for row, (k,) in zip(rows_here(rows), rows_here(rows.select(key)), strict=True):
        found = known.get(k, []) if k is not None else []
        if missing == "only":
            out += [row] * (not found)
        elif found:
            out += [row + values for values in found]
        elif missing == "null":
            out.append(row + (None,) * len(columns))
    return out


def looked(
    group: Group,
    rows: Any,
    table: Any,
    missing: Missing,
    *,
    key: tuple[str, ...] = ("k",),
    columns: Any = ("f", "v"),
    names: tuple[str, str] = ("rows", "byk"),
) -> list[Row]:
    stages = (
        Shuffle("table", key, "byk"),
        Lookup(names[0], key, names[1], columns, "looked", missing),
    )
    return rows_of(group, once(group, {"rows": rows, "table": table}, *stages))


def check_rows_anywhere_find_their_keys(group: Group) -> None:
    rows, table = asking(), items()
    for missing in MISSING:
        right = wanted(rows, table, "k", ("f", "v"), missing)
        for ends in (None, all_on(group, N, 0), all_on(group, N, group.size - 1)):
            got = looked(group, local(rows, group, ends), local(table, group), missing)
            assert got == right, (missing, ends)
        assert looked(group, rows, local(table, group), missing) == right, "rows everywhere"
        got = looked(group, local(rows, group), table, missing, names=("rows", "table"))
        assert got == right, "a table everywhere"
        assert looked(group, rows, table, missing, names=("rows", "table")) == right, "both everywhere"
    known = asking().with_columns(k=asking()["k"] // 2 * 2)
    got = looked(group, local(known, group), local(table, group), "error")
    assert got == wanted(known, table, "k", ("f", "v"), "error")


def check_rows_beside_their_table_need_nobody(group: Group) -> None:
    """Also where the table has several rows of a key: rows order, then table order."""
    rows, one = asking(), items()
    many = Batch(k=np.arange(60) % 17, f=np.arange(60.0), v=np.ones((60, 2)))
    for table in (one, many):
        for missing in MISSING:
            stages = (
                Shuffle("rows", ("k",), "rk"),
                Shuffle("table", ("k",), "tk"),
                Lookup("rk", ("k",), "tk", ("f", "v"), "looked", missing),
            )
            sources = {"rows": local(rows, group), "table": local(table, group)}
            got = rows_of(group, once(group, sources, *stages))
            lies = once(group, sources, stages[0])
            ordered = Batch(id=np.array([r[0] for r in rows_of(group, lies)]))
            ordered = ordered.with_columns(k=rows["k"][ordered["id"]])
            assert got == wanted(ordered, table, "k", ("f", "v"), missing)


def check_keys_and_values_of_any_kind(group: Group) -> None:
    words = [f"w{i}" for i in range(12)]
    random = np.random.default_rng(3)
    chosen = random.integers(0, 16, 40)
    rows = Batch(id=np.arange(40), k=[f"w{i}" for i in chosen]).with_valid(k=chosen != 3)
    table = Batch(k=words, t=[w * (i % 3) for i, w in enumerate(words)], n=np.arange(12.0))
    table = table.with_valid(n=np.arange(12) % 4 != 1)
    two = Batch(id=np.arange(40), k=chosen, j=chosen % 3)
    pairs = Batch(k=np.arange(12), j=np.arange(12) % 3, f=np.arange(12) * 0.5)
    for missing in MISSING:
        got = looked(group, local(rows, group), local(table, group), missing, columns=("t", "n"))
        assert got == wanted(rows, table, "k", ("t", "n"), missing)
        got = looked(group, local(two, group), local(pairs, group), missing, key=("k", "j"), columns=("f",))
        assert got == wanted(two, pairs, "k", ("f",), missing)
        floats = asking().with_columns(k=asking()["k"] * 0.5)
        table_f = items().with_columns(k=items()["k"] * 0.5)
        got = looked(group, local(floats, group), local(table_f, group), missing)
        assert got == wanted(floats, table_f, "k", ("f", "v"), missing)


def check_no_rows_at_all(group: Group) -> None:
    for missing in MISSING:
        assert looked(group, local(asking(0), group), local(items(), group), missing) == []
        got = looked(group, local(asking(5), group), local(items(()), group), missing)
        assert got == wanted(asking(5), items(()), "k", ("f", "v"), missing), (missing, got)


# ---------------------------------------------------------------------- in a loop


def double(s: Batch) -> Batch:
    return s.with_columns(f=s["f"] * 2 + 1, v=s["v"] + 1)


def loop_of(
    group: Group,
    rows: Any,
    missing: Missing = "null",
    table: Batch | None = None,
    change: Callable[[Batch], Batch] = double,
    write: Callable[[str, str], Write] = Replace,
    columns: tuple[str, ...] = ("f", "v"),
    most: int = 6,
) -> Loop:
    """Every iteration: look up what the table holds, then change the table."""
    step = Superstep(
        "step",
        (
            Lookup("rows", ("k",), "s", columns, "found", missing),
            Local(change, ("s",), "next"),
            Shuffle("next", ("k",), "owned"),
        ),
        (Replace("seen", "found"), write("s", "owned")),
    )
    sources = {"rows": rows, "first": local(items() if table is None else table, group)}
    state = {"s": State("first", ("k",)), "seen": State("rows")}
    return Loop("lookups", sources, state, (step,), Until((MaxIterations(most),)), "s")


def work_of(run: LoopRun) -> LookupRows:
    return next(w for w in run.shop.exchangers if isinstance(w, LookupRows))


def after(table: Batch, iterations: int) -> Batch:
    for _ in range(iterations):
        table = double(table)
    return table


def check_values_alone_travel_once_keys_are_known(group: Group) -> None:
    for missing in MISSING:
        for ends in (None, all_on(group, N, group.size - 1)):
            for write in (Replace, Patch):
                run = started(
                    loop_of(group, local(asking(), group, ends), missing, write=write), group, check=True
                )
                for i in range(4):
                    run.advance()
                    right = wanted(asking(), after(items(), i), "k", ("f", "v"), missing)
                    assert rows_of(group, run.tables["seen"]) == right, (missing, ends, write, i)
                assert work_of(run).planned or group.size == 1


def check_rows_everywhere_and_naive(group: Group) -> None:
    for rows in (asking(), local(asking(), group)):
        for options in ({}, {"naive": True}, {"memory_bytes": 60}):
            run = started(loop_of(group, rows), group, **options)
            for i in range(3):
                run.advance()
                right = wanted(asking(), after(items(), i), "k", ("f", "v"), "null")
                assert rows_of(group, run.tables["seen"]) == right


def check_text_is_looked_up_in_every_iteration(group: Group) -> None:
    table = items().with_columns(t=[f"t{k}" for k in items()["k"].tolist()])
    run = started(loop_of(group, local(asking(), group), table=table, columns=("t", "f")), group)
    for i in range(3):
        run.advance()
        assert rows_of(group, run.tables["seen"]) == wanted(
            asking(), after(table, i), "k", ("t", "f"), "null"
        )
    assert not work_of(run).planned, "text has no plan"


def check_a_lost_plan_is_made_again(group: Group) -> None:
    if group.size == 1:
        return
    for victim in (0, group.size - 1):
        run = started(loop_of(group, local(asking(), group), write=Patch), group, check=True)
        run.advance()
        run.advance()
        work = work_of(run)
        assert work.planned
        if group.rank == victim:
            run.shop.cache.lose(work.plan_token)
        for i, planned in ((2, False), (3, True), (4, True)):
            run.advance()
            assert work.planned is planned
            right = wanted(asking(), after(items(), i), "k", ("f", "v"), "null")
            assert rows_of(group, run.tables["seen"]) == right


def check_a_key_inserted_on_one_rank_voids_the_plan_on_all(group: Group) -> None:
    def grow(s: Batch) -> Batch:
        if runs[0].iteration != 2:
            return s.take(np.zeros(0, np.int64))
        return s.take(s["k"] == 4).with_columns(k=np.full(int((s["k"] == 4).sum()), 7))

    runs: list[LoopRun] = []
    run = started(loop_of(group, local(asking(), group), change=grow, write=Insert), group, check=True)
    runs.append(run)
    seven = items().take(items()["k"] == 4).with_columns(k=np.array([7]))
    for i in range(6):
        run.advance()
        table = Batch.concat([items(), seven]) if i > 2 else items()
        right = wanted(asking(), table, "k", ("f", "v"), "null")
        assert rows_of(group, run.tables["seen"]) == right, i
        assert group.size == 1 or work_of(run).planned is (i in (1, 2, 5)), i


def check_missing_and_wrong_keys_are_errors(group: Group) -> None:
    rows, table = local(asking(), group), local(items(), group)
    error = str(raised(group, ir.UsageError, lambda: looked(group, rows, table, "error")))
    assert "Lookup" in error and '"byk" does not have, such as k=' in error and 'missing="drop"' in error
    twice = local(Batch.concat([items(), items()]), group)
    error = str(raised(group, ir.UsageError, lambda: looked(group, rows, twice, "drop")))
    assert "several rows" in error or "must be distinct" in error
    error = str(
        raised(group, ir.UsageError, lambda: looked(group, rows, table, "drop", names=("rows", "table")))
    )
    assert "does not lie by a key" in error
    both = local(asking().with_columns(f=np.zeros(N)), group)
    assert "both have a column" in str(
        raised(group, ir.SchemaError, lambda: looked(group, both, table, "drop"))
    )
    error = str(raised(group, ir.SchemaError, lambda: looked(group, rows, table, "drop", columns=("g",))))
    assert '"g"' in error
    text = local(Batch(id=np.arange(9), k=list("abcdefghi")), group)
    assert "never compare equal" in str(
        raised(group, ir.SchemaError, lambda: looked(group, text, table, "drop"))
    )


def check_a_failure_around_a_lookup_is_everybodys(group: Group) -> None:
    """In the map before it and in the one after it, fresh and planned, on one rank."""
    for place in ("before", "after"):
        for iteration in (1, 3):
            clock = {"i": 0, "on": 1}

            def fails(here: str, place: str = place, iteration: int = iteration, clock: Any = clock) -> None:
                clock["i"] += here == "before"
                if clock["on"] and place == here and clock["i"] == iteration and group.rank == group.size - 1:
                    raise ValueError("no luck")

            def first(r: Batch, fails: Any = fails) -> Batch:
                fails("before")
                return r

            def last(f: Batch, fails: Any = fails) -> Batch:
                fails("after")
                return f

            step = Superstep(
                "step",
                (
                    Local(first, ("rows",), "m", "share"),
                    Lookup("m", ("k",), "s", ("f", "v"), "found", "null"),
                    Local(last, ("found",), "out", "share"),
                    Local(double, ("s",), "next"),
                    Shuffle("next", ("k",), "owned"),
                ),
                (Replace("seen", "out"), Patch("s", "owned")),
            )
            sources = {"rows": local(asking(), group), "first": local(items(), group)}
            state = {"s": State("first", ("k",)), "seen": State("rows")}
            run = started(Loop("fails", sources, state, (step,), Until((MaxIterations(5),)), "s"), group)
            for _ in range(iteration - 1):
                run.advance()
            raised(group, ir.UserCodeError, run.advance)
            clock["on"] = 0
            for i in range(iteration - 1, 5):
                run.advance()
                right = wanted(asking(), after(items(), i), "k", ("f", "v"), "null")
                assert rows_of(group, run.tables["seen"]) == right


def check_a_rank_that_failed_before_a_lookup_knows_whether_others_talk(group: Group) -> None:
    """The table is made, everywhere, by the map that fails; rows lie beside another; a third is asked for."""
    clock = {"on": True}

    def copies(t: Batch) -> Batch:
        if clock["on"] and group.rank == group.size - 1:
            raise ValueError("no luck")
        return t.rename(f="g").drop("v")

    step = Superstep(
        "step",
        (
            Local(copies, ("small",), "made", "share"),
            Lookup("rows", ("k",), "made", ("g",), "one", "null"),
            Lookup("byk", ("k",), "s", ("f",), "two", "null"),
            Lookup("one", ("k",), "s", ("f",), "three", "null"),
        ),
        (Replace("seen", "three"), Replace("there", "two")),
    )
    sources = {"rows": local(asking(), group), "first": local(items(), group), "small": items()}
    state = {"s": State("first", ("k",)), "seen": State("rows"), "there": State("byk")}
    loop = Loop(
        "talks", sources, state, (step,), Until((MaxIterations(3),)), "s", (Shuffle("rows", ("k",), "byk"),)
    )
    run = started(loop, group, check=True)
    raised(group, ir.UserCodeError, run.advance)
    clock["on"] = False
    run.run()
    right = wanted(asking(), items(), "k", ("f",), "null")
    both = [(i, k, f, f) for i, k, f in right]
    assert rows_of(group, run.tables["seen"]) == both
    assert sorted(rows_of(group, run.tables["there"])) == right


def check_what_travels(group: Group) -> None:
    """Beside the table nothing; planned the values alone, each once for a rank however often it is named."""
    if group.size == 1:
        return
    rows = asking().take(np.repeat(np.arange(N), 20))
    beside = Lookup("byk", ("k",), "s", ("f",), "found", "null")
    apart = Lookup("rows", ("k",), "s", ("f",), "found", "null")
    sent = {}
    for name, stage in (
        ("beside", beside),
        ("apart", apart),
        ("nothing", Local(lambda r: r, ("byk",), "found")),
    ):
        seen = State("byk" if stage is not apart else "rows")
        step = Superstep("step", (stage,), (Replace("seen", "found"),))
        sources = {"rows": local(rows, group), "first": local(items(), group)}
        loop = Loop(
            "travels", sources, {"s": State("first", ("k",)), "seen": seen}, (step,),
            Until((MaxIterations(4),)), "seen", (Shuffle("rows", ("k",), "byk"),),
        )  # fmt: skip
        run = started(loop, group)
        run.run()
        sent[name] = run.bytes_iterations[-1]
    assert sent["beside"] == sent["nothing"]
    table = len({k for k in rows["k"].tolist() if k % 2 == 0})
    heads = 64 * group.size
    assert sent["apart"] - sent["nothing"] <= 8 * table * group.size + 2 * heads


def check_lookups_before_and_after_the_iterations(group: Group) -> None:
    """In prepare an invariant, whose columns keep a plan; in finish the last state."""
    loop = Loop(
        "around",
        {"rows": local(asking(), group), "table": local(items(), group), "first": local(items(), group)},
        {"s": State("first", ("k",)), "seen": State("ready")},
        (
            Superstep(
                "step",
                (
                    Lookup("ready", ("k",), "s", ("v",), "both", "null"),
                    Local(double, ("s",), "next"),
                    Shuffle("next", ("k",), "owned"),
                ),
                (Replace("seen", "both"), Patch("s", "owned")),
            ),
        ),
        Until((MaxIterations(3),)),
        "last",
        prepare=(Shuffle("table", ("k",), "byk"), Lookup("rows", ("k",), "byk", ("f",), "ready", "drop")),
        finish=(Lookup("rows", ("k",), "s", ("v",), "last", "only"),),
    )
    run = started(loop, group)
    run.run()
    known = wanted(asking(), items(), "k", ("f",), "drop")
    vectors = dict(rows_here(after(items(), 2).select("k", "v")))
    assert rows_of(group, run.tables["seen"]) == [(*row, vectors[row[1]]) for row in known]
    assert group.size == 1 or work_of(run).planned
    run.finish()
    assert rows_of(group, run.tables["last"]) == wanted(asking(), items(), "k", (), "only")


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
