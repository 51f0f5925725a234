"""Programs at the waist that settle within their ranks: the same fixpoints, in no more supersteps."""

from __future__ import annotations

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.driver import LoopRun
from iterreduce.linksettle import SettlingShuffle
from iterreduce.testing import run_ranks
from tests.waist.kit import (
    NAMES,
    by,
    complete,
    dealt,
    graph,
    grid,
    id_of,
    named,
    path,
    program,
    random_graph,
    ring,
    rmat,
    solved,
    together,
    tree,
    verify,
)


@pytest.mark.parametrize("kind", NAMES)
def test_random_graphs_have_the_components_and_paths_of_scipy(kind: str, ranks: int) -> None:
    edges = named(random_graph(60, 150, seed=ranks), NAMES[kind])
    _, rows = solved("components", ranks, edges, settle=True)
    verify("components", rows, edges)
    source, symmetric = id_of(9, kind), ranks % 2 == 1
    for weight in (edges["weight"], edges["weight"] / 7):
        weighted = edges.with_columns(weight=weight)
        _, rows = solved("sssp", ranks, weighted, source=str(source), symmetric=symmetric, settle=True)
        assert rows["distance"].dtype == weight.dtype
        verify("sssp", rows, weighted, source, symmetric)
    _, rows = solved("bfs", ranks, edges, source=str(source), symmetric=symmetric, settle=True)
    verify("bfs", rows, edges, source, symmetric)


def test_settling_takes_no_more_supersteps_than_telling(ranks: int) -> None:
    mesh = graph(200 + grid(4, 5)["src"], 200 + grid(4, 5)["dst"])
    edges = together(complete(6), graph(100 + ring(9)["src"], 100 + ring(9)["dst"]), mesh)
    result, rows = solved("components", ranks, edges, nodes=ir.Batch(vertex=np.array([3, 77])), settle=True)
    parts = {0: range(6), 77: [77], 100: range(100, 109), 200: range(200, 220)}
    want = {vertex: first for first, part in parts.items() for vertex in part}
    assert by(rows, "vertex", "component") == want
    assert result.outcome is ir.Outcome.EMPTY and result.iterations <= 3 + 4 + 1


@pytest.mark.parametrize("edges", [path(40), tree(40), ring(40), rmat(8, factor=3)])
def test_one_rank_settles_in_one_superstep(edges: ir.Batch) -> None:
    result, rows = solved("components", 1, edges, settle=True)
    verify("components", rows, edges)
    assert result.iterations == 1
    source = int(edges["src"][0])
    result, rows = solved("bfs", 1, edges, source=str(source), settle=True)
    verify("bfs", rows, edges, source)
    assert result.iterations == 1


def test_the_same_bits_come_out_on_any_number_of_ranks() -> None:
    edges = rmat(9, factor=4)
    edges = edges.with_columns(weight=edges["weight"] / 7)
    source = str(edges["src"][0])
    runs = [solved("sssp", n, edges, source=source, settle=True) for n in (1, 2, 5, 8)]
    found = [by(rows, "vertex", "distance") for _, rows in runs]
    assert all(one == found[0] for one in found)
    rounds = by(solved("sssp", 3, edges, source=source)[1], "vertex", "distance")
    assert rounds == found[0]


def test_every_vertex_of_a_tree_hears_once(ranks: int) -> None:
    n = 1 << 9

    def job(group: Group) -> int:
        app = program("sssp")(dealt(tree(n), group), "0", weights=False, settle=True)
        run = LoopRun(app.to_loop(), group)
        run.run()
        return sum(e.walked for e in run.shop.exchangers if isinstance(e, SettlingShuffle))

    assert sum(run_ranks(ranks, job)) == n - 1


@pytest.mark.parametrize(("scale", "ranks"), [(10, 1), (12, 3), (13, 2)])
def test_rmat_graphs_have_the_answers_of_scipy(scale: int, ranks: int) -> None:
    edges = rmat(scale, factor=2)
    result, rows = solved("components", ranks, edges, settle=True)
    assert verify("components", rows, edges) > 1
    assert result.iterations < 10
    source = int(edges["src"][0])
    _, rows = solved("sssp", ranks, edges, source=str(source), settle=True)
    verify("sssp", rows, edges, source)
    _, rows = solved("bfs", ranks, edges, source=str(source), symmetric=True, settle=True)
    assert verify("bfs", rows, edges, source, True) > 3
