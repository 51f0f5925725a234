"""Loops give what the same loop written with dicts gives: states everywhere, by block and by key."""

from __future__ import annotations

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.fixpoint import MaxIterations, Outcome, Until
from iterreduce.loop import Gather, Local, Loop, Replace, Shuffle, State, Superstep, Total
from tests.engine import oracle
from tests.engine.checks_answers import dicts
from tests.engine.kit import (
    Check, by_rank, distinct, int_rows, local, looping, ran, raised, rows_here, rows_of, same, share, started,
)  # fmt: skip

N = 53


def dataset(rows: Batch, group: Group) -> ir.Dataset:
    part = share(rows, group)
    return ir.Dataset.from_local(group, **{n: part[n] for n in rows.names})


def check_one_mapreduce_counts_words(group: Group) -> None:
    words = ["the", "cat", "", "the", "hat", "the"] * 7
    once = ir.MapReduce(map=lambda r: ir.Batch(word=r["w"], n=np.ones(len(r), np.int64)), reduce=ir.SUM, key="word")
    wanted = {w: words.count(w) for w in set(words)}
    handle = once(dataset(Batch(w=words), group))
    assert dict(rows_of(group, handle.run())) == wanted
    assert dict(rows_here(handle.collect())) == wanted


def check_a_reduce_function_sees_whole_groups(group: Group) -> None:
    rows = int_rows(N, 5)

    def spread_of(groups: ir.Groups) -> Batch:
        return groups.keys.with_columns(d=groups.max("x") - groups.min("x"), first=groups.rows["x"][groups.offsets[:-1]])

    got = rows_of(group, ir.MapReduce(reduce=spread_of, key="k")(dataset(rows, group)).run())
    wanted = {
        k: (max(r["x"] for r in g) - min(r["x"] for r in g), g[0]["x"]) for (k,), g in oracle.grouped(dicts(rows), ("k",)).items()
    }
    assert {row[0]: row[1:] for row in got} == wanted


def check_a_combiner_goes_before_a_reduce_function(group: Group) -> None:
    rows = int_rows(N, 5).select("k", "x")
    job = ir.MapReduce(combine=ir.SUM, reduce=lambda g: g.keys.with_columns(x=g.sum("x"), rows=g.sizes), key="k")
    got = rows_of(group, job(dataset(rows, group)).run())
    assert {k: (x, 1) for k, x, _ in got} == {row[0]: row[1:] for row in got}
    assert sum(row[1] for row in got) == int(rows["x"].sum())


def lloyd(points: np.ndarray, centres: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        nearest = np.abs(points[:, None] - centres[None]).argmin(axis=1)
        centres = np.array([points[nearest == c].mean() if (nearest == c).any() else centres[c] for c in range(len(centres))])
    return centres


def check_a_state_everywhere_is_lloyds_algorithm(group: Group) -> None:
    points = np.random.default_rng(1).integers(0, 1000, 200).astype(np.float64)
    seeds = points[:4].copy()

    def assign(p: Batch, c: Batch) -> Batch:
        return Batch(c=np.abs(p["x"][:, None] - c["x"][None]).argmin(axis=1), x=p["x"], n=np.ones(len(p), np.int64))

    def recentre(sums: Batch, c: Batch) -> Batch:
        x = c["x"].copy()
        x[sums["c"]] = sums["x"] / sums["n"]
        return c.with_columns(x=x)

    loop = ir.MapReduce(map=assign, reduce=ir.SUM, key="c").iterate(
        dataset(Batch(x=points), group), state=Batch(x=seeds), update=recentre, max_iterations=6, until=ir.l2("x") <= 0.0,
        score=lambda p, c: Batch(inertia=np.abs(p["x"][:, None] - c["x"][None]).min(axis=1)), values={"inertia": ir.SUM},
    )  # fmt: skip
    result = loop.run()
    wanted = lloyd(points, seeds, result.iterations)
    assert result.everywhere
    assert np.array_equal(result["x"], wanted)
    assert np.isclose(result.values["inertia"], np.abs(points[:, None] - wanted[None]).min(axis=1).sum(), rtol=1e-12)
    same(group, result.result_sha256 + str(result.residual) + result.outcome.name)
    assert len(loop.collect()) == 4


def ring(n: int) -> Batch:
    return Batch(k=np.arange(n), x=np.random.default_rng(2).integers(0, 100, n))


def check_a_state_by_key_moves_values_round_a_ring(group: Group) -> None:
    n = 17

    def pass_on(s: Batch) -> Batch:
        return Batch(k=(s["k"] + 1) % n, x=s["x"])

    loop = ir.MapReduce(map=pass_on, reduce=ir.SUM, key="k").iterate(state=dataset(ring(n), group), state_key="k", max_iterations=5)
    got = dict(rows_of(group, loop.run()))
    assert got == {(k + 5) % n: int(x) for k, x in enumerate(ring(n)["x"])}


def check_plans_give_the_bits_of_fresh_exchanges_and_of_naive_runs(group: Group) -> None:
    rows, pages = int_rows(N, 9), Batch(k=np.arange(-5, 6), x=np.zeros(11))

    def give(r: Batch) -> Batch:
        return Batch(k=r["k"], x=r["f"] / 7)

    def add(heard: Batch, s: Batch) -> Batch:
        return s.with_columns(x=s["x"] / 3 + heard["x"])

    def loop() -> Loop:
        stages = [Local(give, ("r",), "m"), Shuffle("m", ("k",), "h", ir.SUM, onto="s"), Local(add, ("h", "s"), "n", "share")]
        return looping({"r": local(rows, group), "p": local(pages, group)}, {"s": State("p", ("k",))}, stages, {"s": "n"}, most=6)

    fast, naive = ran(loop(), group), ran(loop(), group, naive=True)
    assert rows_of(group, fast) == rows_of(group, naive)
    assert same(group, fast.result_sha256) == naive.result_sha256


def check_missing_keys_are_an_error_or_dropped(group: Group) -> None:
    rows, pages = Batch(k=np.arange(40), x=np.ones(40, np.int64)), Batch(k=np.arange(39), x=np.zeros(39, np.int64))

    def loop(missing: str, combine: bool) -> Loop:
        stage = Shuffle("r", ("k",), "h", ir.SUM if combine else None, "s", missing)  # type: ignore[arg-type]
        stages = [stage, Local(lambda h, s: s.with_columns(x=s["x"] + h["x"]), ("h", "s"), "n", "share")]
        return looping({"r": local(rows, group), "p": local(pages, group)}, {"s": State("p", ("k",))}, stages, {"s": "n"}, most=3)

    for combine in (True, False):
        got = rows_of(group, ran(loop("drop", combine), group))
        assert sorted(got) == [(k, 3) for k in range(39)]
        error = raised(group, ir.UsageError, lambda combine=combine: ran(loop("error", combine), group))  # type: ignore[misc]
        assert "not in it" in str(error)


def check_rows_without_arrivals_get_the_identity(group: Group) -> None:
    rows, pages = Batch(k=np.array([3, 3, 5]), x=np.array([4, 6, 9])), Batch(k=np.arange(8))
    stages = [Shuffle("r", ("k",), "h", {"s": ir.sum("x"), "n": ir.count()}, "s"), Local(lambda h: h, ("h",), "n", "share")]
    loop = looping({"r": local(rows, group), "p": local(pages, group)}, {"s": State("p", ("k",))}, stages, {"s": "n"}, most=2)
    assert sorted(rows_of(group, ran(loop, group))) == [(k, {3: 10, 5: 9}.get(k, 0), {3: 2, 5: 1}.get(k, 0)) for k in range(8)]


def check_onto_needs_a_table_by_that_key(group: Group) -> None:
    rows, pages = int_rows(N, 4), Batch(k=np.arange(-2, 3), j=np.arange(5))
    for combine in (ir.SUM, None):
        for source in (local(pages, group), pages):
            loop = looping({"r": local(rows, group), "s": source}, {"t": State("s")}, [Shuffle("r", ("k",), "h", combine, "s")], {"t": "h"})
            raised(group, ir.UsageError, lambda loop=loop: ran(loop, group))  # type: ignore[misc]
        keyed = {"t": State("s", ("k", "j"))}
        loop = looping({"r": local(rows, group), "s": local(pages, group)}, keyed, [Shuffle("r", ("k",), "h", combine, "t")], {"t": "h"})
        raised(group, ir.UsageError, lambda loop=loop: ran(loop, group))  # type: ignore[misc]


def check_states_by_block_stay_with_their_rows(group: Group) -> None:
    rows = int_rows(N, 5)
    stages = [Local(lambda s, r: s.with_columns(x=s["x"] + r["f"].astype(np.int64)), ("s", "r"), "n")]
    result = ran(looping({"r": local(rows, group)}, {"s": State("r")}, stages, {"s": "n"}, most=3), group)
    assert [row[1] for row in rows_of(group, result)] == [int(x + 3 * f) for _, x, f in rows_here(rows)]


def check_supersteps_see_what_earlier_ones_wrote(group: Group) -> None:
    rows = int_rows(N, 5).select("k", "x")
    one = Superstep("double", (Local(lambda s: s.with_columns(x=s["x"] * 2), ("s",), "n"),), (Replace("s", "n"),))
    two = Superstep("total", (Total("s", (), {"x": ir.SUM}, "t"),), (Replace("sum", "t"),))
    loop = Loop(
        "two", {"r": local(rows, group), "z": Batch(x=np.zeros(1, np.int64))}, {"s": State("r"), "sum": State("z")}, (one, two),
        Until((MaxIterations(3),)), "sum",
    )  # fmt: skip
    assert rows_of(group, ran(loop, group)) == [(int(rows["x"].sum()) * 8,)]


def check_prepare_runs_once_and_finish_once(group: Group) -> None:
    rows, calls = int_rows(N, 5), {"prepare": 0, "pure": 0, "body": 0, "finish": 0}

    def counted(name: str) -> object:
        def work(*batches: Batch) -> Batch:
            calls[name] += 1
            return batches[0]

        return work

    loop = looping(
        {"r": local(rows, group)}, {"s": State("q", ("k",))},
        [
            Local(counted("pure"), ("r",), "p", "share", pure=True),  # type: ignore[arg-type]
            Local(counted("body"), ("s", "p"), "n", "share"),  # type: ignore[arg-type]
        ],
        {"s": "n"}, most=3, prepare=(Shuffle("r", ("k",), "q0", {"n": ir.count()}), Local(counted("prepare"), ("q0",), "q", "share")),  # type: ignore[arg-type]
        finish=(Local(counted("finish"), ("s",), "f", "share"), Total("f", (), {"rows": ir.sum("n")}, "v")), values={"rows": ("v", "rows")},  # type: ignore[arg-type]
    )  # fmt: skip
    assert ran(loop, group).values == {"rows": N}
    assert calls == {"prepare": 1, "pure": 1, "body": 3, "finish": 1}
    assert ran(loop, group, naive=True).values == {"rows": N}
    assert calls["pure"] == 4


def check_a_loop_is_a_source_of_another(group: Group) -> None:
    rows = int_rows(N, 6).select("k", "x")
    for partitions in (1024, 16):
        inner = Loop(
            "inner", {"r": local(rows, group)}, {"o": State("")}, (Superstep("a", (Shuffle("r", ("k",), "t", ir.SUM),), (Replace("o", "t"),)),),
            Until((MaxIterations(1),)), "o", partitions=partitions,
        )  # fmt: skip
        stages = [Shuffle("r", ("k",), "h", {"n": ir.count()}, "i"), Local(lambda i, h: i.with_columns(x=i["x"] * h["n"]), ("i", "h"), "n", "share")]
        loop = looping({"r": local(rows, group), "i": inner}, {"s": State("i", ("k",))}, stages, {"s": "n"}, most=2)
        groups = oracle.grouped(dicts(rows), ("k",))
        assert dict(rows_of(group, ran(loop, group))) == {k: sum(r["x"] for r in g) * len(g) for (k,), g in groups.items()}


def check_a_result_feeds_the_next_job(group: Group) -> None:
    rows = int_rows(N, 6).select("k", "x")
    sums = ir.MapReduce(reduce=ir.SUM, key="k")(dataset(rows, group))
    sizes = ir.MapReduce(map=lambda r: Batch(odd=r["x"] % 2, n=np.ones(len(r), np.int64)), reduce=ir.SUM, key="odd")(sums)
    wanted: dict[int, int] = {}
    for group_rows in oracle.grouped(dicts(rows), ("k",)).values():
        odd = sum(r["x"] for r in group_rows) % 2
        wanted[odd] = wanted.get(odd, 0) + 1
    assert dict(rows_here(sizes.collect())) == wanted


def check_keyed_states_lie_with_their_owners(group: Group) -> None:
    rows = Batch(k=np.arange(90), x=np.zeros(90))
    loop = looping({"r": local(rows, group)}, {"s": State("r", ("k",))}, [Local(lambda s: s, ("s",), "n")], {"s": "n"}, most=2)
    run = started(loop, group)
    run.run()
    shuffled = looping({"r": local(rows, group)}, {"s": State("r")}, [Shuffle("r", ("k",), "n")], {"s": "n"}, most=1)
    ours, theirs = by_rank(group, run.tables["s"].batch), by_rank(group, ran(shuffled, group).batch)
    assert [distinct(r) for r in ours] == [distinct(r) for r in theirs]


def check_a_stray_row_is_refused(group: Group) -> None:
    rows = Batch(k=np.arange(90), x=np.zeros(90))
    loop = looping({"r": local(rows, group)}, {"s": State("r", ("k",))}, [Local(lambda r: r, ("r",), "n")], {"s": "n"}, most=2)
    if group.size > 1:
        assert "belong to other ranks" in str(raised(group, ir.UsageError, lambda: ran(loop, group)))
    twice = looping({"r": local(Batch(k=np.arange(90) // 2), group)}, {"s": State("r", ("k",))}, [Gather("s", "g")], {"s": "s"})
    assert "unique" in str(raised(group, ir.UsageError, lambda: ran(twice, group)))


def check_a_fixpoint_is_reached_when_nothing_changes(group: Group) -> None:
    rows = Batch(k=np.arange(30), x=np.arange(30))
    stages = [Local(lambda s: s.with_columns(x=np.maximum(s["x"] - 7, 0)), ("s",), "n")]
    for key in ((), ("k",)):
        result = ran(looping({"r": local(rows, group)}, {"s": State("r", key)}, stages, {"s": "n"}, [ir.Unchanged()], 50), group)
        assert (result.outcome, result.iterations) == (Outcome.UNCHANGED, 6)
        assert sorted(rows_of(group, result)) == [(k, 0) for k in range(30)]


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
