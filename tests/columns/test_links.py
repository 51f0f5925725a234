"""Sums, minima and maxima along edges against `np.add.at` and its relatives."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import link_layout
from iterreduce.columns.jit import kernel
from iterreduce.columns.link_layout import Blocks, Pieces
from iterreduce.columns.links import Links, LinksBuilder
from iterreduce.errors import UsageError

UFUNCS = {"sum": np.add, "min": np.minimum, "max": np.maximum}
EDGES = {
    "x": lambda x: x,
    "x*w": lambda x, w: x * w,
    "x+w": lambda x, w: x + w,
    "x-w": lambda x, w: x - w,
    "min(x,w)": np.minimum,
    "max(x,w)": np.maximum,
}
DTYPES = (np.float64, np.float32, np.int64, np.int32)


class Graph:
    """Edges with a weight, as the tests make them."""

    def __init__(self, sources: Any, targets: Any, n_sources: int, n_targets: int, weight: Any) -> None:
        self.sources, self.targets = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
        self.n_sources, self.n_targets, self.weight = n_sources, n_targets, np.asarray(weight)

    def links(self) -> Links:
        columns = {"w": self.weight}
        return Links.build(self.sources, self.targets, self.n_sources, self.n_targets, columns)

    def expected(self, combine: str, values: Any, dtype: Any) -> Any:
        """By NumPy, from one value per edge."""
        limits = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
        last = (np.inf, -np.inf) if np.dtype(dtype).kind == "f" else (limits.max, limits.min)
        out = np.full(self.n_targets, {"sum": 0, "min": last[0], "max": last[1]}[combine], dtype)
        with np.errstate(invalid="ignore"):
            UFUNCS[combine].at(out, self.targets, values)
        return out


def skewed(n_sources: int, n_targets: int, edges: int, seed: int, power: float = 3.0) -> Graph:
    """Hubs at both low ends for a power above 1; uniform for 1."""
    rng = np.random.default_rng(seed)
    sources = (rng.random(edges) ** power * n_sources).astype(np.int64)
    targets = (rng.random(edges) ** power * n_targets).astype(np.int64)
    return Graph(sources, targets, n_sources, n_targets, rng.integers(1, 100, edges).astype(np.float64))


def numbers(n: int, dtype: Any, seed: int = 1) -> Any:
    return (np.random.default_rng(seed).random(n) * 1000 - 500).astype(dtype)


def laid_out(links: Links, layout: str) -> Links:
    """The same links in the layout of the test's choice."""
    lay = {"pieces": link_layout.lay_pieces, "blocks": link_layout.lay_blocks}[layout]
    links._layout = lay(links._by_source())
    return links


@st.composite
def graphs(draw: Any) -> Graph:
    n_sources, n_targets = draw(st.integers(1, 12)), draw(st.integers(1, 200))
    pair = st.tuples(st.integers(0, n_sources - 1), st.integers(0, n_targets - 1))
    edges = draw(st.lists(pair, max_size=150)) * draw(st.sampled_from([1, 1, 30]))
    weight = np.random.default_rng(len(edges)).integers(0, 50, len(edges))
    return Graph([s for s, _ in edges], [t for _, t in edges], n_sources, n_targets, weight)


@given(graphs(), st.sampled_from(sorted(UFUNCS)), st.sampled_from(["pieces", "blocks"]))
@settings(max_examples=50, deadline=None)
def test_every_target_hears_what_numpy_says(graph: Graph, combine: str, layout: str) -> None:
    x, out = numbers(graph.n_sources, np.int64), np.empty(graph.n_targets, np.int64)
    laid_out(graph.links(), layout).dense(combine, x, out, "x+w", ("w",))
    expected = graph.expected(combine, x[graph.sources] + graph.weight, np.int64)
    np.testing.assert_array_equal(out, expected)


@given(graphs(), st.sampled_from(sorted(UFUNCS)), st.data())
@settings(max_examples=50, deadline=None)
def test_pushing_from_a_frontier_touches_its_targets_and_no_others(
    graph: Graph, combine: str, data: Any
) -> None:
    frontier = np.array(sorted(data.draw(st.sets(st.integers(0, graph.n_sources - 1)))), np.int32)
    x, out = numbers(graph.n_sources, np.int64), np.full(graph.n_targets, -7, np.int64)
    links = graph.links()
    links.sparse("max", np.arange(graph.n_sources), x, out.copy())  # stamps of an earlier superstep
    touched = links.sparse(combine, frontier, x, out)
    some = np.isin(graph.sources, frontier)
    assert touched.tolist() == np.unique(graph.targets[some]).tolist()
    part = Graph(graph.sources[some], graph.targets[some], graph.n_sources, graph.n_targets, [])
    expected = part.expected(combine, x[part.sources], np.int64)
    np.testing.assert_array_equal(out[touched], expected[touched])
    assert (np.delete(out, touched) == -7).all()


@given(graphs(), st.sampled_from(["pieces", "blocks"]), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_floats_on_a_grid_are_summed_as_pairs_of_integers(graph: Graph, layout: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, graph.n_sources) * 2.0 ** rng.integers(-70, 1, graph.n_sources)
    unit, fine = 2.0 ** (6 - 40), 2.0 ** (6 - 80)  # 50 times as much is below 2**6
    grid = 1.5 * 2.0**52 * unit, 1.5 * 2.0**52 * fine
    addends = x[graph.sources] * graph.weight
    high = np.rint(addends / unit)
    low = np.rint((addends - high * unit) / fine)
    limbs = [limb.astype(np.int64) for limb in (high, low)]
    wanted = np.stack([graph.expected("sum", limb, np.int64) for limb in limbs], axis=1)
    links, out = laid_out(graph.links(), layout), np.full((graph.n_targets, 2), -7)
    np.testing.assert_array_equal(links.dense("sum", x, out, "x*w", ("w",), grid=grid), wanted)
    pushed = np.full((graph.n_targets, 2), -7)
    touched = links.sparse("sum", np.arange(graph.n_sources), x, pushed, "x*w", ("w",), grid=grid)
    np.testing.assert_array_equal(pushed[touched], wanted[touched])
    with pytest.raises(UsageError, match="int64 of shape"):
        links.dense("sum", x, np.empty(graph.n_targets), grid=grid)


@pytest.mark.parametrize(
    ("combine", "edge"),
    [("sum", edge) for edge in sorted(EDGES)] + [("min", "x+w"), ("max", "x*w"), ("max", "min(x,w)")],
)
@pytest.mark.parametrize("layout", ["pieces", "blocks"])
def test_named_edge_functions_agree_with_numpy(combine: str, edge: str, layout: str) -> None:
    graph = skewed(1000, 700, 20_000, 3)
    x, out = numbers(graph.n_sources, np.float64), np.empty(graph.n_targets)
    columns = () if edge == "x" else ("w",)
    links = laid_out(graph.links(), layout)
    given_values = [x[graph.sources]] + [graph.weight] * len(columns)
    expected = graph.expected(combine, EDGES[edge](*given_values), np.float64)
    np.testing.assert_allclose(links.dense(combine, x, out, edge, columns), expected, rtol=1e-12, atol=1e-9)
    pushed = np.empty(graph.n_targets)
    touched = links.sparse(combine, np.arange(graph.n_sources), x, pushed, edge, columns)
    np.testing.assert_allclose(pushed[touched], expected[touched], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", sorted(UFUNCS))
def test_narrow_states_are_accumulated_in_64_bits(dtype: Any, combine: str) -> None:
    graph, wide = skewed(500, 300, 9000, 4), np.float64 if np.dtype(dtype).kind == "f" else np.int64
    x = numbers(graph.n_sources, dtype)
    if wide is np.int64:
        x *= 4_000_000  # sums leave 32 bits
    expected = graph.expected(combine, x[graph.sources].astype(wide), wide)
    for layout in ("pieces", "blocks"):
        out = laid_out(graph.links(), layout).dense(combine, x, np.empty(graph.n_targets, wide))
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-9)
        if wide is np.int64:
            np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("layout", ["pieces", "blocks"])
@pytest.mark.parametrize("combine", ["min", "max"])
def test_a_nan_stays_in_minima_and_maxima(layout: str, combine: str) -> None:
    graph = skewed(300, 50, 4000, 5)
    x = numbers(graph.n_sources, np.float64)
    x[::37] = np.nan
    links = laid_out(graph.links(), layout)
    expected = graph.expected(combine, x[graph.sources], np.float64)
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(links.dense(combine, x, np.empty(50)), expected)
    out = np.empty(50)
    touched = links.sparse(combine, np.arange(300), x, out)
    np.testing.assert_array_equal(out[touched], expected[touched])


@pytest.mark.parametrize("layout", ["pieces", "blocks"])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_more_than_one_segment_and_more_than_one_block(layout: str, power: float) -> None:
    graph = skewed(150_000, 100_000, 300_000, 6, power)
    links = laid_out(graph.links(), layout)
    x = numbers(graph.n_sources, np.int64)
    out = links.dense("sum", x, np.empty(graph.n_targets, np.int64))
    np.testing.assert_array_equal(out, graph.expected("sum", x[graph.sources], np.int64))
    weighed = links.dense("max", numbers(graph.n_sources, np.float64), np.empty(100_000), "x*w", ("w",))
    values = numbers(graph.n_sources, np.float64)[graph.sources] * graph.weight
    np.testing.assert_array_equal(weighed, graph.expected("max", values, np.float64))


def test_blocks_of_a_very_thin_graph_are_wide() -> None:
    graph = skewed(200_000, 3_000_000, 1000, 7, 1.0)
    links = laid_out(graph.links(), "blocks")
    assert isinstance(links._layout, Blocks) and links._layout.target.dtype == np.uint32
    x = numbers(graph.n_sources, np.int64)
    out = links.dense("sum", x, np.empty(graph.n_targets, np.int64))
    np.testing.assert_array_equal(out, graph.expected("sum", x[graph.sources], np.int64))


def test_hubs_lead_to_pieces_and_their_absence_to_blocks() -> None:
    hubs, none = skewed(100_000, 100_000, 800_000, 8, 5.0), skewed(300_000, 300_000, 800_000, 8, 1.0)
    assert isinstance(hubs.links().prepare()._layout, Pieces)
    assert isinstance(none.links().prepare()._layout, Blocks)


def test_expected_pieces_are_about_those_that_there_are() -> None:
    for power in (1.0, 3.0):
        links = skewed(200_000, 50_000, 400_000, 9, power).links()
        there_are = len(link_layout.lay_pieces(links._by_source()).rows)
        assert 0.8 < link_layout.expected_pieces(links._by_source(), links.counts) / there_are < 1.25


@pytest.mark.parametrize("layout", ["pieces", "blocks"])
@pytest.mark.parametrize("combine", sorted(UFUNCS))
def test_ranges_of_targets_give_the_same_bits_as_all_at_once(layout: str, combine: str) -> None:
    graph = skewed(140_000, 90_000, 400_000, 10, 2.0)
    links, x = laid_out(graph.links(), layout), numbers(140_000, np.float64)
    whole = links.dense(combine, x, np.empty(90_000), "x*w", ("w",))
    for n in (2, 3, 8, 100):
        out = np.full(90_000, 5.0)
        parts = links.parts(n)
        assert [lo for lo, _ in parts] == [0] + [hi for _, hi in parts[:-1]] and parts[-1][1] == 90_000
        for part in reversed(parts):
            links.dense(combine, x, out, "x*w", ("w",), part=part)
        assert out.tobytes() == whole.tobytes()


def test_any_range_of_targets_gives_the_same_bits_in_pieces() -> None:
    graph = skewed(3000, 400, 60_000, 11, 2.0)
    links, x = laid_out(graph.links(), "pieces"), numbers(3000, np.float64)
    whole = links.dense("sum", x, np.empty(400))
    cuts = np.unique(np.random.default_rng(1).integers(0, 400, 60))
    out = np.empty(400)
    for lo, hi in itertools.pairwise([0, *cuts.tolist(), 400]):
        links.dense("sum", x, out, part=(lo, hi))
    assert out.tobytes() == whole.tobytes()


class Threads:
    """A pool in name: it calls over the ranges, last range first."""

    threads = 3

    def run(self, function: Callable[[int, int], Any], ranges: Sequence[tuple[int, int]]) -> list[Any]:
        return [function(lo, hi) for lo, hi in reversed(ranges)][::-1]


@pytest.mark.parametrize("combine", [*sorted(UFUNCS), "count"])
def test_a_pool_gives_the_same_bits_and_the_same_targets(combine: str) -> None:
    graph = skewed(140_000, 90_000, 500_000, 12, 2.0)
    links, x = graph.links(), numbers(140_000, np.float64)
    alone = links.dense(combine, x, np.empty(90_000))
    shared = links.dense(combine, x, np.empty(90_000), pool=Threads())
    assert alone.tobytes() == shared.tobytes()
    frontier, one, other = np.arange(0, 140_000, 2), np.zeros(90_000), np.zeros(90_000)
    first = links.sparse(combine, frontier, x, one).copy()
    second = links.sparse(combine, frontier, x, other, pool=Threads())
    assert one.tobytes() == other.tobytes() and first.tolist() == second.tolist()


def test_in_degrees_are_counted_once_and_copied() -> None:
    graph = skewed(50, 60, 500, 13)
    links, x = graph.links(), np.zeros(50)
    expected = np.bincount(graph.targets, minlength=60)
    assert links.dense("count", x, np.empty(60, np.int64)).tolist() == expected.tolist()
    assert links.dense("count", x, np.empty(60)).tolist() == expected.tolist()
    out = np.zeros(60, np.int64)
    touched = links.sparse("count", np.arange(50), x, out)
    assert out.tolist() == expected.tolist() and touched.tolist() == np.flatnonzero(expected).tolist()


@pytest.mark.parametrize("layout", ["pieces", "blocks"])
@pytest.mark.parametrize(("n_sources", "n_targets"), [(0, 0), (5, 0), (0, 5), (5, 5)])
def test_graphs_without_edges(layout: str, n_sources: int, n_targets: int) -> None:
    links = laid_out(Graph([], [], n_sources, n_targets, np.empty(0)).links(), layout)
    out = links.dense("min", np.zeros(n_sources), np.empty(n_targets), "x+w", ("w",))
    assert (out == np.inf).all() and links.n_edges == 0
    for n in (1, 3):
        parts = links.parts(n)
        assert [t for lo, hi in parts for t in range(lo, hi)] == list(range(n_targets))
    touched = links.sparse("sum", np.arange(n_sources), np.zeros(n_sources), out)
    assert len(touched) == 0


def test_self_loops_and_repeated_edges_count_each_time() -> None:
    links = Links.build(np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0]), 2, 2)
    out = links.dense("sum", np.array([1.0, 10.0]), np.empty(2))
    assert out.tolist() == [11.0, 20.0] and links.counts.tolist() == [2, 2]


def test_edges_of_a_source_stay_in_the_order_in_which_they_came() -> None:
    graph = skewed(40, 40, 3000, 14)
    builder = LinksBuilder(40, 40, np.bincount(graph.sources, minlength=40), {"w": np.dtype(np.float64)})
    for lo in range(0, 3000, 700):
        some = slice(lo, lo + 700)
        builder.add(graph.sources[some].astype(np.uint32), graph.targets[some], {"w": graph.weight[some]})
    rows, order = builder.finish()._by_source(), np.argsort(graph.sources, kind="stable")
    assert rows.targets.tolist() == graph.targets[order].tolist()
    assert rows.columns["w"].tolist() == graph.weight[order].tolist()


@kernel
def by_rate_and_toll(x: Any, rate: Any, w: Any, toll: Any) -> Any:
    return x * rate + w * toll


@pytest.mark.parametrize("layout", ["pieces", "blocks"])
def test_edge_functions_of_two_states_and_two_columns(layout: str) -> None:
    graph = skewed(2000, 900, 20_000, 15)
    toll = np.random.default_rng(2).integers(0, 9, 20_000).astype(np.int32)
    columns = {"w": graph.weight, "toll": toll}
    links = laid_out(Links.build(graph.sources, graph.targets, 2000, 900, columns), layout)
    x, rate = numbers(2000, np.float64), numbers(2000, np.float32, 2)
    values = x[graph.sources] * rate[graph.sources] + graph.weight * toll
    out = links.dense("sum", (x, rate), np.empty(900), by_rate_and_toll, ("w", "toll"))
    expected = graph.expected("sum", values, np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-6)
    pushed, frontier = np.zeros(900), np.arange(2000)[::-1].copy()
    given_states = x[frontier], rate[frontier]
    links.sparse("sum", frontier, given_states, pushed, by_rate_and_toll, ("w", "toll"), aligned=True)
    np.testing.assert_allclose(pushed, expected, rtol=1e-10, atol=1e-6)


def test_stamps_begin_again_after_65535_supersteps() -> None:
    links = Links.build(np.array([0, 1]), np.array([0, 1]), 2, 2)
    out = np.zeros(2)
    links.sparse("sum", np.array([0]), np.ones(2), out)
    links._stamp = 2**16 - 1
    assert links.sparse("sum", np.array([1]), np.ones(2), out).tolist() == [1]
    assert links._stamp == 1
    assert links.sparse("sum", np.array([0]), np.ones(2), out).tolist() == [0]


def test_dense_goes_on_without_rows_and_sparse_says_why_it_cannot() -> None:
    graph = skewed(100, 100, 2000, 16)
    links, x = graph.links(), numbers(100, np.int64)
    before, held = links.dense("sum", x, np.empty(100, np.int64)), links.nbytes
    links.drop_rows()
    assert links.nbytes < held
    assert (links.dense("sum", x, np.empty(100, np.int64)) == before).all()
    assert (
        links.dense("count", x, np.empty(100, np.int64)) == np.bincount(graph.targets, minlength=100)
    ).all()
    with pytest.raises(UsageError, match="drop_rows"):
        links.sparse("sum", np.array([0]), x, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda k: k.dense("mean", np.zeros(2), np.zeros(3)), "sum, min, max, count"),
        (lambda k: k.dense("sum", np.zeros(1), np.zeros(3)), r"states of shape \(2,\)"),
        (lambda k: k.dense("sum", np.zeros(2), np.zeros(2)), r"shape \(3,\)"),
        (lambda k: k.dense("sum", np.zeros(2), np.zeros(3, np.float32)), "float32"),
        (lambda k: k.dense("sum", np.zeros(2), np.zeros(3, np.int64)), "give a float64 array"),
        (lambda k: k.dense("sum", np.zeros(2), np.zeros(3), "x*w"), "one edge column"),
        (lambda k: k.dense("sum", np.zeros(2), np.zeros(3), "x/w", ("w",)), "x/w"),
        (lambda k: k.dense("sum", np.zeros(2), np.zeros(3), "x*w", ("v",)), r"\['v'\]"),
        (lambda k: k.sparse("sum", np.array([2]), np.zeros(2), np.zeros(3)), "source slots below 2"),
        (lambda k: Links.build(np.array([2]), np.array([0]), 2, 3), "source slots below 2"),
        (lambda k: Links.build(np.array([0]), np.array([3]), 2, 3), "edge 0 -> 3"),
        (lambda k: LinksBuilder(2, 3, np.array([1, 0])).finish(), "promised 1"),
        (lambda k: overfull().finish(), "source 0 has not as many edges"),
        (lambda k: LinksBuilder(2, 3, np.array([1])), "a degree per source"),
        (lambda k: LinksBuilder(1, 1, np.array([1])).add(np.zeros(2, int), np.zeros(2, int)), "more edges"),
        (
            lambda k: LinksBuilder(1, 1, np.array([1])).add(np.zeros(2, int), np.zeros(1, int)),
            "equal lengths",
        ),
    ],
)
def test_what_does_not_fit_is_told(wrong: Callable[[Links], Any], message: str) -> None:
    links = Links.build(np.array([0, 1]), np.array([1, 2]), 2, 3, {"w": np.ones(2)})
    with pytest.raises(UsageError, match=message):
        wrong(links)


def test_flags_are_counted_and_compared_as_integers() -> None:
    graph = skewed(300, 200, 4000, 17)
    x = numbers(300, np.int64) % 3 == 0
    for combine, dtype in (("sum", np.int64), ("max", np.int64), ("sum", np.float64)):
        out = graph.links().dense(combine, x, np.empty(200, dtype))
        expected = graph.expected(combine, x[graph.sources].astype(dtype), dtype)
        np.testing.assert_array_equal(out, expected)


def test_a_frontier_on_threads_needs_no_layout_for_sums_over_all_edges() -> None:
    graph = skewed(30_000, 9_000, 200_000, 18, 2.0)
    links, frontier = graph.links(), np.arange(30_000)
    assert links.edges_of(frontier) == 200_000 and links.edges_of(frontier[:0]) == 0
    out = np.empty(9_000, np.int64)
    touched = links.sparse("sum", frontier, numbers(30_000, np.int64), out, pool=Threads())
    expected = graph.expected("sum", numbers(30_000, np.int64)[graph.sources], np.int64)
    np.testing.assert_array_equal(out[touched], expected[touched])
    assert links._layout is None and len(touched) == np.count_nonzero(links.counts)


def overfull() -> LinksBuilder:
    builder = LinksBuilder(3, 3, np.array([1, 1, 1]))
    builder.add(np.array([0, 0, 2]), np.array([0, 0, 2]))
    return builder


def test_narrow_unsigned_weights_stay_integers() -> None:
    columns = {"w": np.array([200, 100], np.uint8)}
    links = Links.build(np.array([0, 1]), np.array([0, 0]), 2, 1, columns)
    out = links.dense("sum", np.array([2**60, 1]), np.empty(1, np.int64), "x+w", ("w",))
    assert out.tolist() == [2**60 + 301]


HITS = """
import numpy as np
from iterreduce.columns.link_kernels import EDGE_FUNCTIONS, over_pieces
from iterreduce.columns.links import Links
links = Links.build(np.array([0, 0, 1]), np.array([0, 0, 0]), 2, 1, {"w": np.array([1.0, 2.0, 3.0])})
for edge in ("x*w", "x+w"):
    links.dense("sum", np.array([1.0, 10.0]), out := np.empty(1), edge, ("w",))
    stats = over_pieces(EDGE_FUNCTIONS[edge], "sum", 1, 1).stats
    print(float(out[0]), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_loops_around_edge_functions_are_found_on_disk_by_the_next_process() -> None:
    def run() -> list[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.run(
            [sys.executable, "-c", HITS], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    run()
    assert run() == ["33.0", "1", "0", "18.0", "1", "0"]
