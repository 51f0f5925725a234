"""Laws, on random rows: the answer depends neither on ranks, nor on caches, nor on how maps are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
import iterreduce.maps as maps
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.loop import Local, Loop, Shuffle, State, Total
from iterreduce.testing import run_ranks
from tests.engine.kit import all_on, local, looping, rows_of, same, started

KEYS = st.one_of(
    st.lists(st.integers(-3, 3), max_size=40),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
    st.lists(st.text("ab\0\u00e9", max_size=9), max_size=30),
    st.lists(st.floats(allow_nan=True), max_size=20),
)
laws = settings(max_examples=12, deadline=None)


@st.composite
def rows(draw: Any) -> Batch:
    keys = draw(KEYS)
    n = len(keys)
    x = np.array(draw(st.lists(st.integers(-1000, 1000), min_size=n, max_size=n)), np.int64)
    column = (
        keys
        if n and isinstance(keys[0], str)
        else np.array(keys, np.float64 if n and isinstance(keys[0], float) else np.int64)
    )
    out = Batch(k=column, x=x)
    return (
        out.with_valid(x=np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool))
        if draw(st.booleans())
        else out
    )


def two_reductions(group: Group, given: Batch, ends: list[int] | None) -> Loop:
    """Sums by key, counted again by sum: the second shuffle's keys are the first one's values."""

    def tick(c: Batch, t: Batch) -> Batch:
        return c.with_columns(i=c["i"] + (t["n"].sum() if len(t) else 1))

    stages = [
        Local(lambda r: r, ("r",), "m"),
        Shuffle(
            "m",
            ("k",),
            "h",
            {"s": ir.sum("x"), "n": ir.count(), "lo": ir.min("x"), "f": ir.first("x"), "l": ir.last("x")},
        ),
        Local(lambda h: Batch(k=h["n"], s=h["s"]).with_valid(s=h.valid("s")), ("h",), "again"),
        Total("again", ("k",), {"s": ir.max("s"), "n": ir.count()}, "t"),
        Local(tick, ("c", "t"), "c2", "share"),
    ]
    sources = {"r": local(given, group, ends), "z": Batch(i=np.zeros(1, np.int64))}
    state = {"out": State("r"), "t2": State("z"), "c": State("z")}
    return looping(sources, state, stages, {"out": "h", "t2": "t", "c": "c2"}, most=3)


def answers(
    group: Group, given: Batch, ends: list[int] | None, piece_bytes: int, **options: Any
) -> list[str]:
    """What each iteration leaves behind, as text."""
    run = started(two_reductions(group, given, ends), group, **options)
    for work in run.shop.exchangers:
        if work.source.map is not None:
            work.source.map.cutter.piece_bytes = piece_bytes
    out = []
    for _ in range(3):
        run.advance()
        out.append(repr([rows_of(group, run.tables[name]) for name in ("out", "t2", "c")]))
    same(group, out[-1])
    return [text.partition("c")[0] for text in out]


@given(given_rows := rows(), st.integers(0, 7), st.integers(1, 300))
@laws
def test_the_answer_does_not_depend_on_ranks_caches_or_pieces(
    given: Batch, where: int, piece_bytes: int
) -> None:
    wanted = run_ranks(1, answers, given, None, maps.PIECE_BYTES)[0]
    for size in (2, 3, 5):
        for ends in (None, [0 if r < where % size else len(given) for r in range(size)]):
            got = run_ranks(size, answers, given, ends, piece_bytes)
            assert got[0] == wanted
    assert run_ranks(3, answers, given, None, piece_bytes, naive=True)[0] == wanted
    assert run_ranks(2, answers, given, None, piece_bytes, check=True, partitions=7)[0][0].count(
        "("
    ) == wanted[0].count("(")


@given(given_rows, st.lists(st.booleans(), min_size=15, max_size=15), st.booleans())
@laws
def test_ranks_may_change_their_minds_about_keys_in_any_pattern(
    given: Batch, pattern: list[bool], onto: bool
) -> None:
    """In each of 5 iterations each of 3 ranks passes its keys on, or an equal copy of them: no difference."""

    def work(group: Group, copies: list[bool]) -> list[Any]:
        def maybe(r: Batch, c: Batch) -> Batch:
            i = int(c["i"][0])
            whole = (
                Batch(k=r["k"].copy(), x=r["x"]).with_valid(x=r.valid("x"))
                if copies[i * 3 + group.rank]
                else r
            )
            return whole

        stages = [
            Local(maybe, ("r", "c"), "m"),
            Shuffle("m", ("k",), "h", {"s": ir.sum("x")}, "keys" if onto else None),
            Local(lambda c: c.with_columns(i=c["i"] + 1), ("c",), "c2"),
        ]
        loop = looping(
            {"r": local(given, group), "z": Batch(i=np.zeros(1, np.int64))},
            {"c": State("z"), "h2": State("q", ("k",))},
            stages,
            {"c": "c2", "h2": "h"},
            most=5,
            prepare=(
                Shuffle("r", ("k",), "q", {"s": ir.sum("x")}),
                Shuffle("r", ("k",), "keys", {"n": ir.count()}),
            ),
        )
        run = started(loop, group, check=True)
        run.run()
        return rows_of(group, run.tables["h2"])

    wanted = run_ranks(1, work, [False] * 15)[0]
    assert repr(run_ranks(3, work, pattern)[0]) == repr(wanted)


def test_a_rank_with_all_rows_in_many_blocks_gives_the_sums_of_one_piece() -> None:
    rows = Batch(k=np.random.default_rng(5).integers(0, 50, 5000), x=np.arange(5000))

    def work(group: Group, piece_bytes: int) -> list[Any]:
        stages = [Local(lambda r: r, ("r",), "m"), Shuffle("m", ("k",), "h", ir.SUM)]
        run = started(
            looping(
                {"r": local(rows, group, all_on(group, 5000, 1))},
                {"s": State("r")},
                stages,
                {"s": "h"},
                most=3,
            ),
            group,
        )
        run.shop.exchangers[0].source.map.cutter.piece_bytes = piece_bytes  # type: ignore[union-attr]
        run.run()
        return sorted(rows_of(group, run.tables["s"]))

    wanted = [(k, int(rows["x"][rows["k"] == k].sum())) for k in range(50)]
    for size in (1, 3):
        for piece_bytes in (1, 5000, 1 << 20):
            assert run_ranks(size, work, piece_bytes)[0] == wanted
