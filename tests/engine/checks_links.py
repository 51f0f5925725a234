"""Indexed rows: what a shuffle of them computes, pushed and pulled, over all keys and over some.

The oracle is a loop over edges in plain Python, with dictionaries by key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from iterreduce.collectives import Group, SoloGroup
from iterreduce.columns.aggregators import Aggregator, any_, count, max_, min_, sum_
from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import col, where
from iterreduce.driver import LoopRun
from iterreduce.errors import DisagreementError, SchemaError, UsageError
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import Index, Joined, Local, Loop, Replace, Shuffle, State, Superstep
from iterreduce.options import Options
from iterreduce.run import run_loop
from iterreduce.sources import LocalSource
from tests.engine.kit import Check, local, raised, rows_here, rows_of, share

N, VERTICES = 120, 23
Rows = list[tuple[Any, ...]]


def graph(kind: str = "int", seed: int = 5, n: int = N) -> Batch:
    """Edges with self loops, repeated edges, keys without edges out or in."""
    rng = np.random.default_rng(seed)
    src, dst = rng.integers(0, VERTICES, n), rng.integers(3, VERTICES + 4, n)
    src[: n // 10] = dst[: n // 10]
    names: Any = {
        "int": lambda k: k,
        "negative": lambda k: (k - 11) * 10**17,
        "int32": lambda k: k.astype(np.int32),
        "text": lambda k: [f"page {i}" for i in k],
    }[kind]
    return Batch(
        src=names(src), dst=names(dst), w=rng.integers(1, 9, n).astype(float), hops=rng.integers(1, 5, n)
    )


def start(pages: Batch) -> Batch:
    """A state with a float, an int64, an int32 and a bool for every page, from its key alone."""
    names = pages["page"].to_list() if not isinstance(pages["page"], np.ndarray) else pages["page"].tolist()
    numbers = np.array([sum(map(ord, str(name))) % 97 for name in names], np.int64)
    return pages.with_columns(x=numbers / 7, i=numbers, small=numbers.astype(np.int32), flag=numbers % 2 == 0)


def program(
    edges: Any,
    outputs: dict[str, Aggregator],
    key: str = "dst",
    symmetric: bool = False,
    also: dict[str, tuple[str, str]] | None = None,
    sources: dict[str, Any] | None = None,
    iterations: int = 1,
    joined: bool = True,
) -> Loop:
    """A loop that shuffles indexed edges onto the pages and keeps what they heard."""
    on = "src" if key == "dst" else "dst"

    def keep(heard: Batch, pages: Batch) -> Batch:
        return pages.with_columns(**{name: heard[name] for name in outputs})

    def room(pages: Batch) -> Batch:
        return start(pages).with_columns(**{name: np.zeros(len(pages)) for name in outputs})

    return Loop(
        "links",
        {"edges": edges, **(sources or {})},
        {"pages": State("start", ("page",))},
        (
            Superstep(
                "step",
                (
                    Shuffle(
                        "links",
                        (key,),
                        "heard",
                        outputs,
                        onto="pages",
                        joined=Joined("pages", on) if joined else None,
                    ),
                    Local(keep, ("heard", "pages"), "new", cut="share"),
                ),
                (Replace("pages", "new"),),
            ),
        ),
        Until((MaxIterations(iterations),)),
        "pages",
        prepare=(
            Index("edges", {"src": "keys", "dst": "keys"}, "links", {"keys": "page"}, also or {}, symmetric),
            Local(room, ("keys",), "start", cut="share"),
        ),
    )


def run(group: Group, loop: Loop, **options: Any) -> dict[Any, tuple[Any, ...]]:
    """What each page ends with. Collective."""
    made = LoopRun(loop, group, Options(**options))
    made.run()
    rows = rows_of(group, made.tables["pages"])
    assert len({row[0] for row in rows}) == len(rows), "a page stands twice"
    return {row[0]: row[1:] for row in rows}


def edge_list(edges: Batch, symmetric: bool = False) -> Rows:
    columns = [c.tolist() if isinstance(c, np.ndarray) else c.to_list() for c in edges._columns.values()]
    rows = list(zip(*columns, strict=True))
    return rows + [(b, a, *rest) for a, b, *rest in rows if a != b] if symmetric else rows


def heard(
    rows: Rows, state: dict[Any, tuple[Any, ...]], value: Callable[..., Any], by: int = 1
) -> dict[Any, list[Any]]:
    """For each key the values of its rows: ``value(x, i, w, hops)`` of the other key's state."""
    out: dict[Any, list[Any]] = {page: [] for page in state}
    for row in rows:
        x, i = state[row[1 - by]][:2]
        out[row[by]].append(value(x, i, row[2], row[3]))
    return out


OUTPUTS: dict[str, tuple[Aggregator, Callable[..., Any], Callable[[list[Any]], Any]]] = {
    "a sum of a column": (sum_("x"), lambda x, i, w, h: x, sum),
    "a sum of an expression": (sum_(col("x") / (col("i") + 1)), lambda x, i, w, h: x / (i + 1), sum),
    "a product with the edge": (sum_(col("x") * col("w")), lambda x, i, w, h: x * w, sum),
    "a smallest sum with the edge": (
        min_(col("i") + col("hops")), lambda x, i, w, h: i + h, lambda v: min(v, default=2**63 - 1)
    ),
    "a largest int32": (max_("small"), lambda x, i, w, h: i, lambda v: max(v, default=-(2**31))),
    "an expression of two columns and two of the edge": (
        max_(where(col("x") > 5, col("i") * col("hops"), col("w") - col("x") * 2)),
        lambda x, i, w, h: i * h if x > 5 else w - x * 2,
        lambda v: max(v, default=-np.inf),
    ),
    "a count": (count(), lambda x, i, w, h: 1, sum),
    "any": (any_("flag"), lambda x, i, w, h: i % 2 == 0, any),
}  # fmt: skip


def outputs_are_those_of_a_loop_over_edges(name: str, kind: str, key: str) -> Check:
    def check(group: Group) -> None:
        edges = graph(kind)
        aggregator, value, fold = OUTPUTS[name]
        found = run(group, program(local(edges, group), {"got": aggregator}, key))
        want = heard(edge_list(edges), found, value, 1 if key == "dst" else 0)
        for page, row in found.items():
            assert row[-1] == fold(want[page]) or abs(row[-1] - fold(want[page])) < 1e-12, (page, row)

    return check


def several_outputs_travel_together(group: Group) -> None:
    edges = graph()
    chosen = {str(n): OUTPUTS[name] for n, name in enumerate(OUTPUTS)}
    for key in ("dst", "src"):
        found = run(
            group, program(local(edges, group), {n: a for n, (a, _, _) in chosen.items()}, key, iterations=3)
        )
        for at, (_, value, fold) in enumerate(chosen.values()):
            want = heard(edge_list(edges), found, value, 1 if key == "dst" else 0)
            for page, row in found.items():
                got = row[4 + at]
                assert got == fold(want[page]) or abs(got - fold(want[page])) < 1e-12


def symmetric_rows_count_both_ways_and_loops_once(group: Group) -> None:
    edges = graph("text")
    found = run(group, program(local(edges, group), {"got": sum_(col("i") * col("hops"))}, symmetric=True))
    want = heard(edge_list(edges, True), found, lambda x, i, w, h: i * h)
    assert {page: row[-1] for page, row in found.items()} == {page: sum(v) for page, v in want.items()}


def other_keys_join_the_table(group: Group) -> None:
    edges, nodes = graph(), Batch(id=np.array([5, 1000, -4]))
    sources = {"nodes": local(nodes, group)}
    found = run(
        group, program(local(edges, group), {"got": count()}, also={"keys": ("nodes", "id")}, sources=sources)
    )
    assert set(found) == {1000, -4} | set(edges["src"].tolist()) | set(edges["dst"].tolist())
    assert found[1000][-1] == found[-4][-1] == 0


def rows_without_a_joined_table_are_folded_alone(group: Group) -> None:
    edges = graph()
    for key, at in (("src", 0), ("dst", 1)):
        out = {"rows": count(), "weight": sum_("w")}
        found = run(group, program(local(edges, group), out, key, joined=False))
        for page, row in found.items():
            mine = [e[2] for e in edge_list(edges) if e[at] == page]
            assert row[-2:] == (len(mine), sum(mine))


def no_rows_at_all_make_no_pages(group: Group) -> None:
    assert run(group, program(local(graph(n=0), group), {"got": sum_("x")})) == {}


def naive_runs_give_the_same(group: Group) -> None:
    edges = graph()
    loop = program(local(edges, group), {"got": sum_(col("x") * col("w"))}, iterations=3)
    assert run(group, loop) == run(group, loop, naive=True)


def after_the_first_iteration_values_alone_travel(group: Group) -> None:
    edges = graph()
    made = LoopRun(program(local(edges, group), {"got": sum_("x")}, iterations=4), group, Options(check=True))
    made.run()
    sent = list(made.bytes_iterations)
    assert len(set(sent)) == 1
    named = int(made.shop.residents["links"].named.sum())
    assert sent[0] == 8 * named


def results_do_not_tell_how_many_ranks_there_were(group: Group) -> None:
    edges = graph("text")
    loop = program(local(edges, group), {"got": count()})
    rows = rows_of(group, run_loop(loop, group))
    alone = run_loop(program(LocalSource(edges), {"got": count()}), SoloGroup())
    assert rows == rows_here(alone.batch)


def an_error_on_one_rank_is_raised_on_all(group: Group) -> None:
    def broken(heard: Batch, pages: Batch) -> Batch:
        raise ValueError("broken")

    edges = graph()
    loop = program(local(edges, group), {"got": sum_("nothing here")})
    assert "nothing here" in str(raised(group, SchemaError, lambda: run(group, loop)))
    run(group, program(local(edges, group), {"got": sum_("x")}))


def keys_of_two_types_are_refused(group: Group) -> None:
    rows = share(Batch(src=np.arange(6), dst=np.arange(6.0)), group)
    error = raised(group, SchemaError, lambda: run(group, program(LocalSource(rows), {"got": count()})))
    assert '"src" is int64 and "dst" is float64' in str(error)


def ranks_with_other_columns_are_refused(group: Group) -> None:
    if group.size == 1:
        return
    rows = Batch(src=np.arange(3), dst=np.arange(3))
    if group.rank == 1:
        rows = rows.with_columns(w=np.ones(3))
    raised(group, DisagreementError, lambda: run(group, program(LocalSource(rows), {"got": count()})))


def a_wrong_key_is_named(group: Group) -> None:
    loop = program(local(graph(), group), {"got": count()}, key="w")
    assert "src and dst" in str(raised(group, UsageError, lambda: run(group, loop)))


def onto(
    group: Group, edges: Batch, key: str, outputs: dict[str, Aggregator], touched: bool = False
) -> LoopRun:
    """Ready to shuffle edges onto rows 1, 2, 5 and 6, of which 1 and 3 speak if all need not."""
    rows, some = np.array([1, 2, 5, 6]), np.array([1, 3])
    sources = {"all": local(Batch(page=rows, x=rows), group), "few": local(Batch(page=some, x=some), group)}
    joined = Joined("some" if touched else "rows", "src" if key == "dst" else "dst")
    missing = "drop" if touched else "error"
    stages = (
        Shuffle("links", (key,), "heard", outputs, "rows", touched=touched, joined=joined, missing=missing),
        Local(lambda h, r: h.with_columns(own=r["x"]), ("heard", "rows"), "both", cut="share"),
    )
    states = {"rows": State("all", ("page",)), "some": State("few", ("page",)), "got": State("")}
    step = Superstep("step", stages, (Replace("got", "both"),))
    index = Index("edges", {"src": "keys", "dst": "keys"}, "links", {"keys": "page"})
    until = Until((MaxIterations(1),))
    loop = Loop(
        "onto", {"edges": local(edges, group), **sources}, states, (step,), until, "got", prepare=(index,)
    )
    return LoopRun(loop, group)


def touched_rows_that_the_table_lacks_are_dropped(group: Group) -> None:
    edges = Batch(src=np.array([1, 1, 3, 2, 3]), dst=np.array([2, 3, 4, 1, 5]))
    made = onto(group, edges, "dst", {"got": sum_("x")}, touched=True)
    made.run()
    assert sorted(rows_of(group, made.tables["got"])) == [(2, 1, 2), (5, 3, 5)]


def rows_hear_nothing_where_no_edges_are(group: Group) -> None:
    none = np.empty(0, np.int64)
    for key in ("src", "dst"):
        made = onto(group, Batch(src=none, dst=none), key, {"got": sum_("x"), "low": min_("x")})
        made.run()
        most = np.iinfo(np.int64).max
        assert sorted(rows_of(group, made.tables["got"])) == [(k, 0, most, k) for k in (1, 2, 5, 6)]


def keys_that_the_table_lacks_are_an_error_each_time(group: Group) -> None:
    made = onto(group, Batch(src=np.array([1, 2]), dst=np.array([2, 7])), "dst", {"got": sum_("x")})
    made.start()
    for _ in range(2):
        assert "1 keys" in str(raised(group, UsageError, made.advance))


def an_output_with_the_name_of_the_key_is_refused(group: Group) -> None:
    made = onto(group, Batch(src=np.array([1]), dst=np.array([2])), "dst", {"page": sum_("x")})
    assert '"page"' in str(raised(group, UsageError, made.run))


def a_touched_shuffle_without_outputs_is_refused(group: Group) -> None:
    made = onto(group, Batch(src=np.array([1]), dst=np.array([2])), "dst", {}, touched=True)
    assert "no outputs" in str(raised(group, UsageError, made.run))


def half_floats_beside_edges_are_refused(group: Group) -> None:
    edges = graph().with_columns(w=np.ones(N, np.float16))
    loop = program(local(edges, group), {"got": count()})
    assert "float16" in str(raised(group, SchemaError, lambda: run(group, loop)))


def other_keys_are_values_without_nulls(group: Group) -> None:
    nulls = Batch.from_dict({"id": np.array([5, 6])}, valid={"id": np.array([True, False])})
    for nodes, said in ((nulls, "nulls"), (Batch(id=np.ones((2, 2), np.int64)), "vectors")):
        more: dict[str, Any] = {"also": {"keys": ("nodes", "id")}, "sources": {"nodes": local(nodes, group)}}
        loop = program(local(graph(), group), {"got": count()}, **more)
        assert said in str(raised(group, SchemaError, lambda loop=loop: run(group, loop)))


CHECKS: dict[str, Check] = {
    f"{name}, {kind} keys, by {key}": outputs_are_those_of_a_loop_over_edges(name, kind, key)
    for name in OUTPUTS
    for kind, key in (("int", "dst"), ("int", "src"), ("text", "dst"), ("negative", "src"))
} | {
    check.__name__.replace("_", " "): check
    for check in (
        several_outputs_travel_together,
        symmetric_rows_count_both_ways_and_loops_once,
        other_keys_join_the_table,
        rows_without_a_joined_table_are_folded_alone,
        no_rows_at_all_make_no_pages,
        results_do_not_tell_how_many_ranks_there_were,
        naive_runs_give_the_same,
        after_the_first_iteration_values_alone_travel,
        an_error_on_one_rank_is_raised_on_all,
        keys_of_two_types_are_refused,
        ranks_with_other_columns_are_refused,
        a_wrong_key_is_named,
        touched_rows_that_the_table_lacks_are_dropped,
        rows_hear_nothing_where_no_edges_are,
        keys_that_the_table_lacks_are_an_error_each_time,
        an_output_with_the_name_of_the_key_is_refused,
        a_touched_shuffle_without_outputs_is_refused,
        half_floats_beside_edges_are_refused,
        other_keys_are_values_without_nulls,
    )
}
