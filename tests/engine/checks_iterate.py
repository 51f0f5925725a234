"""Loops give what the same loop written with dicts gives: states everywhere, by block and by key."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.loop import Local, Loop, Shuffle, State
from tests.engine import oracle
from tests.engine.checks_answers import dicts
from tests.engine.kit import (
    Check,
    int_rows,
    local,
    looping,
    raised,
    ran,
    rows_here,
    rows_of,
    same,
    share,
)

N = 53


def dataset(rows: Batch, group: Group) -> ir.Dataset:
    part = share(rows, group)
    return ir.Dataset.from_local(group, **{n: part[n] for n in rows.names})


def check_one_mapreduce_counts_words(group: Group) -> None:
    words = ["the", "cat", "", "the", "hat", "the"] * 7
    once = ir.MapReduce(
        map=lambda r: ir.Batch(word=r["w"], n=np.ones(len(r), np.int64)), reduce=ir.SUM, key="word"
    )
    wanted = {w: words.count(w) for w in set(words)}
    handle = once(dataset(Batch(w=words), group))
    assert dict(rows_of(group, handle.run())) == wanted
    assert dict(rows_here(handle.collect())) == wanted


def check_a_reduce_function_sees_whole_groups(group: Group) -> None:
    rows = int_rows(N, 5)

    def spread_of(groups: ir.Groups) -> Batch:
        return groups.keys.with_columns(
            d=groups.max("x") - groups.min("x"), first=groups.rows["x"][groups.offsets[:-1]]
        )

    got = rows_of(group, ir.MapReduce(reduce=spread_of, key="k")(dataset(rows, group)).run())
    wanted = {
        k: (max(r["x"] for r in g) - min(r["x"] for r in g), g[0]["x"])
        for (k,), g in oracle.grouped(dicts(rows), ("k",)).items()
    }
    assert {row[0]: row[1:] for row in got} == wanted


def check_a_combiner_goes_before_a_reduce_function(group: Group) -> None:
    rows = int_rows(N, 5).select("k", "x")
    job = ir.MapReduce(
        combine=ir.SUM, reduce=lambda g: g.keys.with_columns(x=g.sum("x"), rows=g.sizes), key="k"
    )
    got = rows_of(group, job(dataset(rows, group)).run())
    assert {k: (x, 1) for k, x, _ in got} == {row[0]: row[1:] for row in got}
    assert sum(row[1] for row in got) == int(rows["x"].sum())


def lloyd(points: np.ndarray, centres: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        nearest = np.abs(points[:, None] - centres[None]).argmin(axis=1)
        centres = np.array(
            [points[nearest == c].mean() if (nearest == c).any() else centres[c] for c in range(len(centres))]
        )
    return centres


def check_a_state_everywhere_is_lloyds_algorithm(group: Group) -> None:
    points = np.random.default_rng(1).integers(0, 1000, 200).astype(np.float64)
    seeds = points[:4].copy()

    def assign(p: Batch, c: Batch) -> Batch:
        return Batch(
            c=np.abs(p["x"][:, None] - c["x"][None]).argmin(axis=1), x=p["x"], n=np.ones(len(p), np.int64)
        )

    def recentre(sums: Batch, c: Batch) -> Batch:
        x = c["x"].copy()
        x[sums["c"]] = sums["x"] / sums["n"]
        return c.with_columns(x=x)

    loop = ir.MapReduce(map=assign, reduce=ir.SUM, key="c").iterate(
        dataset(Batch(x=points), group),
        state=Batch(x=seeds),
        update=recentre,
        max_iterations=6,
        until=ir.l2("x") <= 0.0,
        score=lambda p, c: Batch(inertia=np.abs(p["x"][:, None] - c["x"][None]).min(axis=1)),
        values={"inertia": ir.SUM},
    )
    result = loop.run()
    wanted = lloyd(points, seeds, result.iterations)
    assert result.everywhere
    assert np.array_equal(result["x"], wanted)
    assert np.isclose(
        result.values["inertia"], np.abs(points[:, None] - wanted[None]).min(axis=1).sum(), rtol=1e-12
    )
    same(group, result.result_sha256 + str(result.residual) + result.outcome.name)
    assert len(loop.collect()) == 4


def ring(n: int) -> Batch:
    return Batch(k=np.arange(n), x=np.random.default_rng(2).integers(0, 100, n))


def check_a_state_by_key_moves_values_round_a_ring(group: Group) -> None:
    n = 17

    def pass_on(s: Batch) -> Batch:
        return Batch(k=(s["k"] + 1) % n, x=s["x"])

    loop = ir.MapReduce(map=pass_on, reduce=ir.SUM, key="k").iterate(
        state=dataset(ring(n), group), state_key="k", max_iterations=5
    )
    got = dict(rows_of(group, loop.run()))
    assert got == {(k + 5) % n: int(x) for k, x in enumerate(ring(n)["x"])}


def check_plans_give_the_bits_of_fresh_exchanges_and_of_naive_runs(group: Group) -> None:
    rows, pages = int_rows(N, 9), Batch(k=np.arange(-5, 6), x=np.zeros(11))

    def give(r: Batch) -> Batch:
        return Batch(k=r["k"], x=r["f"] / 7)

    def add(heard: Batch, s: Batch) -> Batch:
        return s.with_columns(x=s["x"] / 3 + heard["x"])

    def loop() -> Loop:
        stages = [
            Local(give, ("r",), "m"),
            Shuffle("m", ("k",), "h", ir.SUM, onto="s"),
            Local(add, ("h", "s"), "n", "share"),
        ]
        return looping(
            {"r": local(rows, group), "p": local(pages, group)},
            {"s": State("p", ("k",))},
            stages,
            {"s": "n"},
            most=6,
        )

    fast, naive = ran(loop(), group), ran(loop(), group, naive=True)
    assert rows_of(group, fast) == rows_of(group, naive)
    assert same(group, fast.result_sha256) == naive.result_sha256


def check_missing_keys_are_an_error_or_dropped(group: Group) -> None:
    rows, pages = (
        Batch(k=np.arange(40), x=np.ones(40, np.int64)),
        Batch(k=np.arange(39), x=np.zeros(39, np.int64)),
    )

    def loop(missing: str, combine: bool) -> Loop:
        stage = Shuffle("r", ("k",), "h", ir.SUM if combine else None, "s", missing)  # type: ignore[arg-type]
        stages = [stage, Local(lambda h, s: s.with_columns(x=s["x"] + h["x"]), ("h", "s"), "n", "share")]
        return looping(
            {"r": local(rows, group), "p": local(pages, group)},
            {"s": State("p", ("k",))},
            stages,
            {"s": "n"},
            most=3,
        )

    for combine in (True, False):
        got = rows_of(group, ran(loop("drop", combine), group))
        assert sorted(got) == [(k, 3) for k in range(39)]
        error = raised(group, ir.UsageError, lambda combine=combine: ran(loop("error", combine), group))  # type: ignore[misc]
        assert "not in it" in str(error)


def check_states_by_block_stay_with_their_rows(group: Group) -> None:
    rows = int_rows(N, 5)
    stages = [Local(lambda s, r: s.with_columns(x=s["x"] + r["f"].astype(np.int64)), ("s", "r"), "n")]
    result = ran(looping({"r": local(rows, group)}, {"s": State("r")}, stages, {"s": "n"}, most=3), group)
    assert [row[1] for row in rows_of(group, result)] == [int(x + 3 * f) for _, x, f in rows_here(rows)]


def check_keys_of_a_state_stay_distinct(group: Group) -> None:
    rows = int_rows(N, 5).select("k", "x")

    def loop(*stages: Shuffle | Local, write: str) -> Loop:
        first = Batch(k=np.arange(-9, 9), x=np.zeros(18, np.int64))
        sources = {"r": local(rows, group), "p": local(first, group)}
        return looping(sources, {"s": State("p", ("k",))}, stages, {"s": write}, most=3)

    for options in ({}, {"check": True}, {"naive": True}):
        twice = loop(Shuffle("r", ("k",), "m"), write="m")
        error = str(raised(group, ir.UsageError, lambda t=twice, o=options: ran(t, group, **o)))  # type: ignore[misc]
        assert 'Replace of "s" by "m": k=' in error and "more than one row" in error
    # what a map makes of distinct rows is looked at by --check only
    doubled = Local(lambda m: m.take(np.arange(2 * len(m)) // 2), ("m",), "d", cut="share")
    twice = loop(Shuffle("r", ("k",), "m", ir.SUM), doubled, write="d")
    assert "more than one row" in str(raised(group, ir.UsageError, lambda: ran(twice, group, check=True)))
    once_each = Batch(k=np.arange(N) * 7 % N, x=np.arange(N))
    moved = loop(Local(lambda r: once_each.take(r["x"]), ("r",), "o"), Shuffle("o", ("k",), "m"), write="m")
    moved = replace(moved, sources={**moved.sources, "r": local(once_each, group)})
    assert len(rows_of(group, ran(moved, group))) == N


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
