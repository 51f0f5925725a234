"""Shortest paths and breadth-first search at the waist: closed forms, SciPy, NetworkX, and what they cost."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.driver import LoopRun
from iterreduce.linkshuffle import LinkShuffle
from iterreduce.testing import run_ranks
from tests.waist.kit import (
    NAMES,
    by,
    dealt,
    graph,
    grid,
    id_of,
    named,
    program,
    random_graph,
    ring,
    rmat,
    solved,
    tree,
    verify,
)


def distances(edges: ir.Batch, ranks: int, **options: object) -> dict[object, float]:
    _, rows = solved("sssp", ranks, edges, source="0", **options)
    return by(rows, "vertex", "distance")


def levels(edges: ir.Batch, ranks: int, **options: object) -> dict[object, int]:
    _, rows = solved("bfs", ranks, edges, source="0", **options)
    return by(rows, "vertex", "level")


def test_a_binary_tree_has_the_depth_of_each_vertex(ranks: int) -> None:
    want = {i: (i + 1).bit_length() - 1 for i in range(100)}
    assert distances(tree(100), ranks, weights=False) == want == levels(tree(100), ranks)


def test_a_grid_is_as_far_as_its_coordinates_add_up_to(ranks: int) -> None:
    want = {x + 7 * y: x + y for x in range(7) for y in range(5)}
    assert distances(grid(7, 5), ranks, weights=False, symmetric=True) == want
    assert levels(grid(7, 5), ranks, symmetric=True) == want


def test_a_ring_is_walked_the_shorter_way_if_it_has_both(ranks: int) -> None:
    n = 24
    assert distances(ring(n), ranks, weights=False, symmetric=True) == {i: min(i, n - i) for i in range(n)}
    assert levels(ring(n), ranks) == {i: i for i in range(n)}


def test_log_normal_degrees_have_the_distances_of_dijkstra() -> None:
    rng = np.random.default_rng(7)
    degree = np.minimum(rng.lognormal(4, 1.3, 400).astype(np.int64), 2000)
    src = np.repeat(np.arange(400), degree)
    edges = graph(src, rng.integers(0, 400, len(src)), weight=np.ones(len(src), np.int64))
    for ranks in (1, 3):
        _, rows = solved("sssp", ranks, edges, source="0")
        assert verify("sssp", rows, edges, 0) > 300


@pytest.mark.parametrize("kind", NAMES)
def test_random_graphs_have_the_paths_of_scipy(kind: str, ranks: int) -> None:
    symmetric = ranks % 2 == 1
    edges = named(random_graph(60, 150, seed=ranks), NAMES[kind])
    source = id_of(9, kind)
    for weight in (edges["weight"], edges["weight"] / 7):
        weighted = edges.with_columns(weight=weight)
        _, rows = solved("sssp", ranks, weighted, source=str(source), symmetric=symmetric)
        assert rows["distance"].dtype == weight.dtype
        verify("sssp", rows, weighted, source, symmetric)
    _, rows = solved("bfs", ranks, edges, source=str(source), symmetric=symmetric)
    verify("bfs", rows, edges, source, symmetric)


def test_parallel_edges_count_by_the_shortest_as_in_networkx() -> None:
    edges = random_graph(40, 400, seed=3)
    other = nx.MultiDiGraph()
    other.add_weighted_edges_from(zip(*(edges[n].tolist() for n in ("src", "dst", "weight")), strict=True))
    assert distances(edges, 2) == nx.single_source_dijkstra_path_length(other, 0)


@pytest.mark.parametrize(("scale", "ranks"), [(10, 5), (12, 2), (14, 3)])
def test_rmat_graphs_have_the_paths_of_scipy(scale: int, ranks: int) -> None:
    edges = rmat(scale, factor=4)
    source = int(edges["src"][0])
    _, rows = solved("sssp", ranks, edges, source=str(source))
    assert verify("sssp", rows, edges, source) > 1 << (scale - 2)
    _, rows = solved("bfs", ranks, edges, source=str(source), symmetric=True)
    assert verify("bfs", rows, edges, source, True) > 3


def test_a_source_that_is_not_there_is_named() -> None:
    for name, source in (("sssp", "77"), ("bfs", "77"), ("sssp", "home"), ("bfs", "")):
        with pytest.raises(ir.UsageError, match="no vertex of the graph"):
            solved(name, 3, tree(9).with_columns(weight=np.ones(8)), source=source)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ir.InputError, match="negative"):
        solved("sssp", 2, tree(9).with_columns(weight=-np.ones(8)), source="0")


def test_a_tree_takes_one_message_per_edge_and_a_superstep_as_many_as_its_frontier(ranks: int) -> None:
    n = (1 << 9) - 1
    edges = tree(n)

    def job(group: Group) -> list[int]:
        loop = program("sssp")(dealt(edges, group), source="0", weights=False).to_loop()
        run = LoopRun(loop, group)
        run.start()
        folding = [work for work in run.shop.exchangers if isinstance(work, LinkShuffle)]
        walked = []
        while run.outcome is None:
            run.advance()
            walked.append(sum(work.walked for work in folding))
        return walked

    walked = np.sum(run_ranks(ranks, job), axis=0)
    assert walked[-1] == n - 1
    assert np.diff(walked, prepend=0).tolist() == [2 << i for i in range(8)] + [0]
