"""Rows beside the rows of a table that lies by the same key: what a join is once both sides are shuffled.

The oracle is a list of rows per key, asked row by row. Tables hold a key several times, or never; keys are
numbers, text, pairs, and null, which equals nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.laid import lay_out, lies_beside
from iterreduce.lookup import LookupRows
from iterreduce.loop import Context, Kernel, Local, Lookup, Shuffle, Splitters, State
from iterreduce.rowshuffle import RowShuffle
from iterreduce.shuffle import CombineShuffle
from tests.engine.checks_lookup import MISSING, Missing
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
    rows_of,
    started,
)

N = 80
WORDS = ["", "a", "ab", "a longer word than eight bytes", "é", "zz", "b"]


def left(n: int = N, seed: int = 1) -> Batch:
    """Rows that ask: id, i int64 with nulls, j int64, t text with nulls, x float64 with nulls."""
    random = np.random.default_rng(seed)
    i, j, t = random.integers(0, 14, N), random.integers(0, 3, N), random.integers(0, len(WORDS), N)
    rows = Batch(id=np.arange(N), i=i, j=j, t=[WORDS[w] for w in t], x=i * 0.5)
    return rows.with_valid(i=i != 5, t=t != 1, x=j != 0).slice(0, n)


def right(n: int = 50, seed: int = 2) -> Batch:
    """A table with keys several times: as `left`, and y float64 with nulls, s text with nulls, v (n, 2)."""
    rows, y = left(N, seed).drop("id", "x"), np.arange(N) * 0.25
    rows = rows.with_columns(y=y, s=[w * 2 for w in rows["t"].to_list()], v=np.stack([y, -y], 1))
    return rows.with_valid(y=np.arange(N) % 3 != 0, s=np.arange(N) % 4 != 1).slice(0, n)


def joined(rows: list[Row], names: Sequence[str], table: Batch, key: Sequence[str], missing: Missing,
           columns: Sequence[str]) -> list[Row]:  # fmt: skip
    """What comes of these rows, in their order, then that of the table."""
    known: dict[Row, list[Row]] = {}
    picked = rows_here(table.select(*columns)) if columns else [()] * len(table)
    for k, values in zip(rows_here(table.select(*key)), picked, strict=True):
        known.setdefault(k, []).append(values)
    out: list[Row] = []
    for row in rows:
        k = tuple(row[list(names).index(n)] for n in key)
        found = [] if None in k else known.get(k, [])
        if missing == "only":
            out += [row] * (not found)
        else:
            out += [row + values for values in found]
            out += [(*row, *[None] * len(columns))] * (missing == "null" and not found)
    return out


KEYS: tuple[tuple[str, ...], ...] = (("j",), ("i",), ("t",), ("i", "j"), ("j", "t"))


def check_rows_of_a_key_several_times_on_both_sides(group: Group) -> None:
    """Null keys, text, pairs of columns, columns with nulls, no columns; shares without rows."""
    for n, m in ((N, 50), (3, 50), (N, 1), (N, 0), (0, 50)):
        rows, table = left(n), right(m)
        for key in KEYS if (n, m) == (N, 50) else KEYS[2:4]:
            for missing in MISSING:
                for columns in (("y", "s", "v"), ()):
                    sources = {
                        "r": local(rows, group, all_on(group, n, 0)),
                        "s": local(table, group, all_on(group, m, group.size - 1)),
                    }
                    both = Shuffle("r", key, "rk"), Shuffle("s", key, "sk")
                    lookup = Lookup("rk", key, "sk", columns, "looked", missing)
                    got = once(group, sources, *both, lookup)
                    asked = rows_of(group, once(group, sources, both[0]))
                    names = columns if missing != "only" else ()
                    assert rows_of(group, got) == joined(asked, rows.names, table, key, missing, names)
                    if missing == "null" and (n, m) == (N, 50):
                        assert all(got.batch.valid(c) is not None for c in columns)


@dataclass(frozen=True)
class Some:
    """Every third row twice, others as they are, each 7th dropped; a column more."""

    keeps: tuple[str, ...] = ("i", "j", "t")

    def run(self, context: Context, rows: Batch) -> Batch:
        at = np.repeat(np.arange(len(rows)), [(2, 1, 1, 1, 1, 1, 0)[i % 7] for i in rows["id"].tolist()])
        return rows.take(at).with_columns(twice=rows["id"][at] * 2)


def check_rows_that_a_kernel_keeps_lie_as_they_lay(group: Group) -> None:
    """So that their keys may stand in several rows of the table, and nothing travels."""
    rows, table = left(), right()
    sources = {"r": local(rows, group), "s": local(table, group)}
    for key in KEYS:
        for cut in ("block", "share"):
            stages = (
                Shuffle("r", key, "rk"),
                Shuffle("s", key, "sk"),
                Local(Some(), ("rk",), "some", cut),  # type: ignore[arg-type]
                Lookup("some", key, "sk", ("y",), "looked", "null"),
            )
            run = started(looping(sources, {"out": State("some")}, (stages[3],), {"out": "looked"},
                                  most=1, prepare=stages[:3]), group)  # fmt: skip
            run.run()
            some = rows_of(group, once(group, sources, *stages[:3]))
            wanted = joined(some, (*rows.names, "twice"), table, key, "null", ("y",))
            assert rows_of(group, run.tables["out"]) == wanted
            assert run.tables["out"].layout.keys == key
            assert the_lookup(run).here


def check_a_key_that_a_kernel_does_not_keep_is_asked_for(group: Group) -> None:
    laid = {"rk": ("i",), "sk": ("i",), "all": ()}
    lookup = Lookup("made", ("i",), "sk", ("y",), "looked")
    for keeps, reads, beside in (
        (("i",), ("rk",), True),
        (("i", "j"), ("rk", "all"), True),
        (("j",), ("rk",), False),
        ((), ("rk",), False),
        (("i",), ("all", "rk"), False),
        (("i",), ("somewhere",), False),
    ):
        known = dict(laid)
        lay_out(Local(Some(keeps), reads, "made"), known)
        assert lies_beside(lookup, known) is beside
    assert isinstance(Some(), Kernel)
    known = dict(laid)
    lay_out(Local(Some(("i",)), ("rk",), "rk"), known)
    assert known["rk"] == ("i",), "a name may be used again"


def follow(s: Batch) -> Batch:
    return s.with_columns(f=s["f"] * 2 + 1)


def check_the_match_is_kept_as_long_as_keys_stay(group: Group) -> None:
    """Then only columns that change are taken again, and a shuffle behind it moves values alone."""
    n, keys = 120, 20
    random = np.random.default_rng(4)
    links = Batch(k=random.integers(0, keys + 5, n), to=random.integers(0, keys, n), w=np.arange(n) * 1.0)
    first = Batch(n=np.arange(keys), f=np.arange(keys) * 1.0)
    for naive in (False, True):
        for missing in ("drop", "null"):
            stages = (
                Lookup("s", ("n",), "by k", ("to", "w"), "open", missing),  # type: ignore[arg-type]
                Local(lambda o: o.with_columns(v=o["f"] + o["w"]), ("open",), "sent"),
                Shuffle("sent", ("to",), "heard", {"v": ir.sum("v"), "count": ir.count()}),
                Local(follow, ("s",), "next"),
            )
            loop = looping(
                {"links": local(links, group), "first": local(first, group)},
                {"s": State("first", ("n",)), "got": State("")},
                stages,
                {"s": "next", "got": "heard"},
                most=5,
                prepare=(Shuffle("links", ("k",), "by k"),),
            )
            run = started(loop, group, naive=naive)
            taken = []
            for i in range(5):
                run.advance()
                f = {k: (k + 1) * 2**i - 1 for k in range(keys)}
                rows = [(to, f[k] + w) for k, to, w in rows_here(links) if k in f]
                if missing == "null":
                    rows += [(None, None)] * len(set(f) - set(links["k"].tolist()))
                wanted = {
                    to: (sum(v for t, v in rows if t == to and v is not None), sum(t == to for t, _ in rows))
                    for to, _ in rows
                }
                got = {to: (v, c) for to, v, c in rows_of(group, run.tables["got"])}
                assert {k: (v or 0, c) for k, (v, c) in got.items()} == wanted
                taken.append(the_lookup(run).matches._taken.get(("values", "to"), (None, None))[1])
            folding = next(w for w in run.shop.exchangers if isinstance(w, CombineShuffle))
            known = missing == "drop" and not naive
            assert folding.planned is known or not len(run.tables["s"])
            if known and group.size == 1:
                assert taken[1] is taken[4] is not None
            if naive:
                assert the_lookup(run).matches._match is None


def check_keys_that_change_are_matched_again(group: Group) -> None:
    """Also where user code hands out one array again and again, with other numbers in it."""
    table = Batch(i=np.arange(9), y=np.arange(9.0))
    buffer = np.zeros(6, np.int64)
    clock = {"n": 0}

    def asks(s: Batch) -> Batch:
        clock["n"] += 1
        buffer[:] = (np.arange(6) * clock["n"]) % 11
        return Batch(i=buffer, id=np.arange(6))

    loop = looping(
        {"t": table, "one": Batch(x=np.zeros(1))},
        {"s": State("one"), "got": State("")},
        (
            Local(asks, ("s",), "asked", cut="share"),
            Lookup("asked", ("i",), "t", ("y",), "found", "null"),
        ),
        {"s": "s", "got": "found"},
        most=4,
    )
    run = started(loop, group)
    for i in range(1, 5):
        run.advance()
        wanted = [(k * i % 11, k, k * i % 11 * 1.0 if k * i % 11 < 9 else None) for k in range(6)]
        assert rows_here(run.tables["got"].batch) == wanted


def check_rows_that_need_no_order_stand_as_they_came(group: Group) -> None:
    """Their keys are beside each other as ever; also by a plan, that moves values alone."""
    rows, table = left(), right()
    sources = {"r": local(rows, group), "s": local(table, group)}
    for key in KEYS:
        plain, order = Shuffle("r", key, "rk", sorted=False), Shuffle("r", key, "rk")
        made, wanted = once(group, sources, plain), once(group, sources, order)
        assert made.layout == wanted.layout
        for mine, theirs in zip(by_rank(group, made.batch), by_rank(group, wanted.batch), strict=True):
            assert mine == sorted(theirs, key=lambda row: row[0])
        both = plain, Shuffle("s", key, "sk", sorted=False)
        got = once(group, sources, *both, Lookup("rk", key, "sk", ("y", "s"), "looked", "null"))
        asked = rows_of(group, made)
        assert rows_of(group, got) == joined(asked, rows.names, table, key, "null", ("y", "s"))
    numbers = rows.select("id", "j")
    aged = Local(lambda r, s: r.with_columns(id=r["id"] + s["i"][0]), ("r", "s"), "aged")
    later = Local(lambda s: s.with_columns(i=s["i"] + 1), ("s",), "next", cut="share")
    stages = aged, Shuffle("aged", ("j",), "rk", sorted=False), later
    loop = looping(
        {"r": local(numbers, group), "start": Batch(i=np.zeros(1, np.int64))},
        {"s": State("start"), "out": State("")},
        stages,
        {"s": "next", "out": "rk"},
    )
    run = started(loop, group, check=True)
    for i in range(4):
        run.advance()
        got_rows = rows_of(group, run.tables["out"])
        assert sorted(got_rows) == [(a + i, b) for a, b in rows_here(numbers)]
        here = run.tables["out"].batch["id"]
        assert (here[1:] > here[:-1]).all()
        moved = next(w for w in run.shop.exchangers if isinstance(w, RowShuffle))
        assert moved.planned is (i > 0)


def check_an_order_that_others_need_cannot_be_left_out(group: Group) -> None:
    for more in ({"combine": {}}, {"onto": "s"}, {"route": Splitters()}):
        stage = Shuffle("r", ("j",), "rk", sorted=False, **more)  # type: ignore[arg-type]
        sources = {"r": left(), "s": right()}
        error = raised(group, ir.UsageError, lambda sources=sources, stage=stage: pipeline(sources, stage))
        assert "sorted=False" in str(error)


def the_lookup(run: LoopRun) -> LookupRows:
    return next(w for w in run.shop.exchangers if isinstance(w, LookupRows))


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
