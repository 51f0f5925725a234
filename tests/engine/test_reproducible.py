"""``reproducible``: the same bits on any number of ranks, however rows are dealt, cached and combined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from benchmarks.digests import spread
from iterreduce.appfile import load_app
from iterreduce.collectives import SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.columns.schema import Schema
from iterreduce.fixpoint import Distance, MaxIterations, Until, partials
from iterreduce.loop import Index, Joined, Local, Loop, Replace, Shuffle, State, Superstep, Total
from iterreduce.options import Options
from iterreduce.reproducible import reproducible, without_order
from iterreduce.run import Result, run_loop
from iterreduce.sources import LocalSource
from iterreduce.sources.blocks import Loaded, block_rows_for
from iterreduce.sources.borders import in_global_blocks
from iterreduce.table import Table, by_key
from iterreduce.testing import run_ranks
from tests.engine.kit import share
from tests.launch import ROOT

APPS = {
    name: load_app(str(ROOT / "apps" / f"{name}.py")).function for name in ("kmeans", "logistic_regression")
}
RANKS = (1, 2, 3, 5, 8)
N = 3000

Work = Callable[[ir.Group, dict[str, Any]], Result]


def uneven(group: ir.Group, n: int) -> list[int]:
    """Ends of shares that have nothing to do with blocks; some ranks may have no rows."""
    cuts = np.random.default_rng(group.size).integers(0, n + 1, group.size - 1)
    return [*np.sort(cuts).tolist(), n]


def dealt(group: ir.Group, rows: Batch) -> ir.Dataset:
    """The rows as a caller's arrays, an uneven share on each rank."""
    mine = share(rows, group, uneven(group, len(rows)))
    return ir.Dataset.from_local(group, **{name: mine[name] for name in mine.names})


# ---------------------------------------------------------------------- programs


def kmeans(path: Path) -> Work:
    """From a file; ill-conditioned points."""
    x = np.stack([spread(N, seed, -3 - seed, 3 + seed) for seed in range(5)], axis=1)
    np.save(path / "points.npy", x)
    read = str(path / "points.npy")
    return lambda group, options: APPS["kmeans"](ir.read(read), k=5, max_iterations=6).run(group, **options)


def kmeans_plus_plus(path: Path) -> Work:
    """From arrays of the caller; random seeds."""
    x = np.stack([spread(N, seed, -2, 2) for seed in range(3)], axis=1)

    def work(group: ir.Group, options: dict[str, Any]) -> Result:
        points = dealt(group, Batch(x=x))
        return APPS["kmeans"](points, k=4, start="k-means++", seed=3, max_iterations=5).run(group, **options)

    return work


def logistic(path: Path) -> Work:
    """Features of 1e-20 to 1e20."""
    x = np.stack([spread(N, seed) for seed in range(4)], axis=1)
    y = (np.random.default_rng(9).random(N) < 0.5).astype(np.float64)

    def work(group: ir.Group, options: dict[str, Any]) -> Result:
        rows = dealt(group, Batch(x=x, y=y))
        app = APPS["logistic_regression"]
        return app(rows, rate=1e-21, max_iterations=6, tolerance=0.0).run(group, **options)

    return work


def standardized(path: Path) -> Work:
    """Means, variances, a score and predictions."""
    x = np.stack([spread(N, seed, -4, 4) for seed in range(3)], axis=1)
    rows = np.concatenate([x, (x[:, :1] > 0).astype(np.float64)], axis=1)
    lines = [",".join(map(repr, row)) for row in rows.tolist()]
    (path / "train.csv").write_text("a,b,c,y\n" + "\n".join(lines) + "\n")
    read = str(path / "train.csv")

    def work(group: ir.Group, options: dict[str, Any]) -> Result:
        app = APPS["logistic_regression"]
        made = app(ir.read(read), rate=0.5, standardize=True, max_iterations=5, test=ir.read(read))
        return made.run(group, **options)

    return work


def pagerank(path: Path) -> Work:
    """Pages by key, edges by block, restart weights of many magnitudes; rows are combined, or not."""
    rng = np.random.default_rng(4)
    pages, n_edges = 700, 5000
    src, dst = rng.integers(0, pages, n_edges), rng.zipf(1.6, n_edges) % pages
    degree = np.bincount(src, minlength=pages)
    restart = 10.0 ** rng.uniform(-20, 20, pages)
    restart /= restart.sum()

    def give(edges: Batch, ranks: Batch) -> Batch:
        return Batch(page=edges["dst"], heard=ranks["rank"][edges["src"]] / degree[edges["src"]])

    def settle(heard: Batch, state: Batch) -> Batch:
        return state.with_columns(rank=0.15 * restart[state["page"]] + 0.85 * heard["heard"])

    def work(group: ir.Group, options: dict[str, Any]) -> Result:
        inputs = ir.Inputs()
        start = dealt(group, Batch(page=np.arange(pages), rank=restart))
        first = inputs.rows("start", start)
        edges = inputs.rows("edges", dealt(group, Batch(src=src, dst=dst)))
        step = Superstep(
            "step",
            (
                Total("pages", ("page",), {"rank": ir.sum("rank")}, "ranks"),
                Local(give, (edges, "ranks"), "given"),
                Shuffle("given", ("page",), "heard", {"heard": ir.sum("heard")}, onto="pages"),
                Local(settle, ("heard", "pages"), "settled", cut="share"),
            ),
            (Replace("pages", "settled"),),
        )
        until = Until.of(ir.l1("rank") <= 1e-3, 30).on("pages")
        loop = Loop("pagerank", inputs.sources, {"pages": State(first, ("page",))}, (step,), until, "pages")
        return run_loop(loop, group, Options(**options))

    return work


def indexed(push: bool) -> Callable[[Path], Work]:
    """Indexed rows, joined with a state of many magnitudes, and weighed: what travels are partial sums, or
    values.
    """

    def program(path: Path) -> Work:
        rng = np.random.default_rng(5)
        n = 4000
        weights = rng.normal(size=n) * 10.0 ** rng.uniform(-9, 9, n)
        edges = Batch(src=rng.integers(0, 300, n), dst=rng.zipf(1.5, n) % 310, w=weights)

        def begin(pages: Batch) -> Batch:
            return pages.with_columns(x=10.0 ** ((pages["page"] * 7919) % 41 - 20.0))

        def settle(heard: Batch, pages: Batch) -> Batch:
            x = heard["heard"] / (1 + np.abs(heard["heard"])) + heard["n"] + np.minimum(heard["least"], 1)
            return pages.with_columns(x=x + heard["all"])

        key, on = ("dst", "src") if push else ("src", "dst")
        heard = ir.sum(ir.col("x") / 3 * ir.col("w"))
        sums = {"n": ir.count(), "heard": heard, "least": ir.min("x"), "all": ir.sum("w")}

        def work(group: ir.Group, options: dict[str, Any]) -> Result:
            inputs = ir.Inputs()
            rows = inputs.rows("edges", dealt(group, edges))
            stages = (
                Shuffle("links", (key,), "heard", sums, onto="pages", joined=Joined("pages", on)),
                Local(settle, ("heard", "pages"), "new", cut="share"),
            )
            index = Index(rows, {"src": "keys", "dst": "keys"}, "links", {"keys": "page"})
            loop = Loop(
                "links", inputs.sources, {"pages": State("start", ("page",))},
                (Superstep("step", stages, (Replace("pages", "new"),)),), Until((MaxIterations(4),)), "pages",
                prepare=(index, Local(begin, ("keys",), "start", cut="share")),
            )  # fmt: skip
            return run_loop(loop, group, Options(**options))

        return work

    return program


def double(acc: Any, value: Any) -> None:
    acc[0] = 0.5 * acc[0] + value


def join(acc: Any, other: Any) -> None:
    acc[0] += other[0]


FADING = ir.Aggregator.define("fading", 0.0, double, join)
AGGREGATES = {
    "total": ir.sum("x"),
    "mean": ir.mean("x"),
    "var": ir.var("x"),
    "low": ir.min("zero"),
    "high": ir.max("zero"),
    "first": ir.first("x"),
    "last": ir.last("x"),
    "nearest": ir.argmin("row", by="tie"),
    "vector": ir.sum("v"),
    "rows": ir.count(),
}


def aggregates(reduce: dict[str, Any], text: bool) -> Callable[[Path], Work]:
    """Every aggregator once, by keys of text or numbers; the iteration is repeated, for plans."""
    rng = np.random.default_rng(6)
    keys = rng.integers(0, 40, N)
    rows = Batch(
        k=[f"key {k}" for k in keys] if text else keys,
        x=spread(N, 1),
        zero=np.where(rng.random(N) < 0.5, 0.0, -0.0),
        tie=rng.integers(0, 3, N).astype(np.float32),
        row=np.arange(N),
        v=np.stack([spread(N, 2, -5, 5), spread(N, 3, -300, 300)], axis=1),
    )

    def program(path: Path) -> Work:
        def work(group: ir.Group, options: dict[str, Any]) -> Result:
            inputs = ir.Inputs()
            source = inputs.rows("rows", dealt(group, rows))
            step = Superstep(
                "once", (Shuffle(source, ("k",), "reduced", reduce),), (Replace("made", "reduced"),)
            )
            until = Until((MaxIterations(3),))
            loop = Loop("aggregates", inputs.sources, {"made": State("")}, (step,), until, "made")
            return run_loop(loop, group, Options(**options))

        return work

    return program


PROGRAMS: dict[str, Callable[[Path], Work]] = {
    "kmeans": kmeans,
    "kmeans++": kmeans_plus_plus,
    "logistic regression": logistic,
    "standardized": standardized,
    "pagerank": pagerank,
    "indexed, pushed": indexed(push=True),
    "indexed, pulled": indexed(push=False),
    "aggregates": aggregates(AGGREGATES, text=False),
    "aggregates by text": aggregates(AGGREGATES, text=True),
    "a monoid of the user": aggregates({"fading": FADING.of("x"), "total": ir.sum("x")}, text=False),
}


def found(work: Work, ranks: int, **options: Any) -> tuple[Any, ...]:
    """What must be the same: digest, iterations, residual, values."""
    results = run_ranks(ranks, lambda group: work(group, {"reproducible": True, **options}))
    digests = {(r.result_sha256, r.iterations, r.residual, repr(sorted(r.values.items()))) for r in results}
    assert len(digests) == 1, "ranks disagree"
    assert all(r.reproducible for r in results)
    return digests.pop()


COVER = [
    (
        program,
        ranks,
        {
            "naive": (i + j) % 2 == 1,
            "check": i == j,
            "partitions": 64 if i + j == 5 else 1024,
            "threads": 1 + (i // 2 + j) % 2,
        },
    )
    for i, program in enumerate(("kmeans", "logistic regression", "pagerank", "aggregates"))
    for j, ranks in enumerate((1, 2, 3, 5, 8, 16))
]
"""Programs x ranks; caches on and off, and 1 and 2 threads, for each program and for each number of ranks."""


@pytest.mark.parametrize("program", ["kmeans", "logistic regression", "pagerank", "aggregates"])
def test_ranks_caches_and_partitions_do_not_change_the_bits(program: str, tmp_path: Path) -> None:
    work = PROGRAMS[program](tmp_path)
    told = {str(run): found(work, run[1], **run[2]) for run in COVER if run[0] == program}
    assert len(set(told.values())) == 1, told


@pytest.mark.parametrize("program", sorted(set(PROGRAMS) - {run[0] for run in COVER}))
def test_the_bits_are_the_same_on_any_number_of_ranks(program: str, tmp_path: Path) -> None:
    work = PROGRAMS[program](tmp_path)
    assert len({found(work, ranks) for ranks in (1, 3, 8)}) == 1


def test_rows_that_are_combined_and_rows_that_are_not_have_the_same_sums() -> None:
    """A list among the outputs makes whole rows travel: nothing is combined before it is sent."""
    rng = np.random.default_rng(8)
    rows = Batch(k=rng.integers(0, 30, N), x=spread(N, 7))
    plain = {"total": ir.sum("x"), "mean": ir.mean("x"), "var": ir.var("x")}

    def work(group: ir.Group, reduce: dict[str, Any]) -> Batch:
        made = ir.MapReduce(key="k", reduce=reduce)(dealt(group, rows))
        return ir.Dataset.of_loop(reproducible(made.to_loop()), group).collect(group)

    told = set()
    for ranks, reduce in itertools.product((1, 3, 8), (plain, plain | {"all": ir.collect("x")})):
        made = run_ranks(ranks, lambda group, reduce=reduce: work(group, reduce))[0]
        order = np.argsort(made["k"])
        told.add(tuple(made[name][order].tobytes() for name in ("total", "mean", "var")))
    assert len(told) == 1


def test_a_total_without_keys_is_the_exact_sum() -> None:
    x = spread(N, 12, -200, 200)

    def work(group: ir.Group) -> float:
        inputs = ir.Inputs()
        source = inputs.rows("rows", dealt(group, Batch(x=x)))
        loop = Loop(
            "sum", inputs.sources, {"s": State("")},
            (Superstep("once", (Total(source, (), ir.SUM, "total"),), (Replace("s", "total"),)),),
            Until((MaxIterations(2),)), "s",
        )  # fmt: skip
        return float(run_loop(loop, group, Options(reproducible=True))["x"][0])

    for ranks in RANKS:
        assert set(run_ranks(ranks, work)) == {math.fsum(x)}


@pytest.mark.parametrize("program", ["kmeans", "pagerank", "aggregates", "indexed, pushed"])
def test_at_most_three_times_the_bytes_are_exchanged(program: str, tmp_path: Path) -> None:
    work = PROGRAMS[program](tmp_path)

    def sent(reproducible: bool) -> int:
        results = run_ranks(3, lambda group: work(group, {"reproducible": reproducible}))
        return sum(sum(r.bytes_exchanged["per_iteration"]) // r.iterations for r in results)

    assert sent(True) <= 3 * sent(False)


def test_plain_runs_of_these_programs_do_differ(tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    for program in ("pagerank", "indexed, pushed"):
        work = PROGRAMS[program](tmp_path)
        digests = {
            run_ranks(r, lambda group, work=work: work(group, {}))[0].result_sha256 for r in (1, 2, 3, 5)
        }
        assert len(digests) > 1


def test_reproducible_results_are_those_of_plain_runs_but_for_rounding(tmp_path: Path) -> None:
    for program in ("kmeans", "standardized", "indexed, pushed", "indexed, pulled"):
        work = PROGRAMS[program](tmp_path)
        plain, free = (work(SoloGroup(), {"reproducible": on}).batch for on in (False, True))
        for name in plain.names:
            if isinstance(plain[name], np.ndarray):
                np.testing.assert_allclose(free[name], plain[name], rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------- parts


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 255, 256, 257, 300, 700]), min_size=1, max_size=6))
def test_rows_move_over_borders_into_global_blocks(shares: list[int]) -> None:
    n, ends = sum(shares), np.cumsum(shares)
    step = block_rows_for(n)

    def work(group: ir.Group) -> tuple[list[int], list[str], int, list[int]]:
        first = int(ends[group.rank]) - shares[group.rank]
        number = np.arange(first, int(ends[group.rank]))
        batch = Batch(n=number, t=[str(i) for i in number]) if len(number) else Batch.empty(SCHEMA)
        moved = in_global_blocks(group, Loaded(batch, first, n, np.array([0, len(number)])), SCHEMA)
        rows = moved.batch
        return rows["n"].tolist(), rows["t"].to_list(), moved.first_row, moved.block_starts.tolist()

    rows, texts, starts = [], [], []
    for numbers, words, first, blocks in run_ranks(len(shares), work):
        if numbers:
            assert numbers[0] == first and first % step == 0
        assert blocks[-1] == len(numbers)
        rows += numbers
        texts += words
        starts += [first + b for b in blocks[:-1]]
    assert rows == list(range(n)) and texts == list(map(str, rows))
    assert starts == list(range(0, n, step))


SCHEMA: Schema = Batch(n=np.arange(1), t=["0"]).schema


def test_a_map_sees_exactly_one_canonical_block_at_a_time() -> None:
    seen: dict[int, list[tuple[int, int]]] = {}

    def work(group: ir.Group) -> None:
        mine: list[tuple[int, int]] = []

        def look(rows: Batch) -> Batch:
            if len(rows):
                mine.append((int(rows["x"][0]), len(rows)))
            return rows

        rows = dealt(group, Batch(x=np.arange(1000.0), k=np.arange(1000) % 7))
        ir.MapReduce(map=look, key="k", reduce=ir.SUM)(rows).run(group, reproducible=True)
        seen[group.rank] = mine

    for ranks in (1, 3, 8):
        seen.clear()
        run_ranks(ranks, work)
        blocks = [block for rank in range(ranks) for block in seen[rank]]
        assert blocks == [(0, 256), (256, 256), (512, 256), (768, 232)]


def test_a_share_that_lies_by_block_must_be_declared_rank_free() -> None:
    def count(rows: Batch) -> Batch:
        return Batch(n=np.array([len(rows)]))

    def loop(rank_free: bool) -> Loop:
        stages = (
            Local(count, ("rows",), "counted", cut="share", rank_free=rank_free),
            Total("counted", (), ir.SUM, "total"),
        )
        step = Superstep("once", stages, (Replace("s", "total"),))
        source = {"rows": LocalSource(Batch(x=np.arange(5.0)))}
        return Loop("count", source, {"s": State("")}, (step,), Until((MaxIterations(1),)), "s")

    def work(group: ir.Group, rank_free: bool, on: bool) -> Result:
        return run_loop(loop(rank_free), group, Options(reproducible=on))

    for ranks in (1, 3):
        with pytest.raises(ir.UsageError, match="rank_free=True"):
            run_ranks(ranks, lambda group: work(group, False, True))
        assert run_ranks(ranks, lambda group: work(group, False, False))[0]["n"][0] == 5 * ranks
        assert run_ranks(ranks, lambda group: work(group, True, True))[0]["n"][0] == 5 * ranks


def test_a_float_monoid_of_the_user_onto_a_table_is_refused() -> None:
    step = Superstep("s", (Shuffle("t", ("k",), "h", {"x": FADING}, onto="t"),), (Replace("t", "h"),))
    loop = Loop(
        "x", {"a": Batch(k=[1], x=[1.0])}, {"t": State("a", ("k",))}, (step,), Until((MaxIterations(1),)), "t"
    )
    with pytest.raises(ir.UsageError, match="fading"):
        reproducible(loop)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=30),
    st.sampled_from(["l1", "l2"]),
    st.sampled_from(["sum", "mean"]),
    st.integers(1, 5),
)
def test_a_distance_does_not_depend_on_the_cut(
    values: list[float], per_row: Any, fold: Any, ranks: int
) -> None:
    rule = without_order(Distance(("x",), 1.0, per_row, fold))
    old, new = Batch(x=np.zeros(len(values))), Batch(x=np.array(values))
    ends = np.linspace(0, len(values), ranks + 1).astype(int)
    whole = rule.fold_ranks([rule.partial(old, new)])
    parts = [rule.partial(old.slice(a, b), new.slice(a, b)) for a, b in itertools.pairwise(ends.tolist())]
    assert rule.fold_ranks(parts) == whole
    plain = Distance(("x",), 1.0, per_row, fold)
    assert plain.fold_ranks([plain.partial(old, new)]) == pytest.approx(whole, rel=1e-12)


def test_a_distance_of_rows_that_were_written_in_place_counts_all_rows() -> None:
    """The engine tells what was written; the others have not moved, but count where a mean is asked for."""
    batch = Batch(k=np.arange(4), x=np.array([1.0, 2.0, 3.0, 4.0]))
    table = Table(batch, by_key("k"))
    old, new = Batch(x=np.array([1.0])), Batch(x=np.array([9.0]))
    written = SimpleNamespace(old=old, new=new, rows=4)
    rule = without_order(Distance(("x",), 1.0, "l1", "mean", table="t"))
    told = partials(Until((rule,)), {"t": table}, {"t": table}, 0, {"t": lambda before, after: written})
    assert rule.fold_ranks([told, told]) == 2.0
