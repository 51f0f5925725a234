"""PageRank at the waist: closed forms, SciPy, NetworkX, igraph."""

from __future__ import annotations

import igraph
import networkx as nx
import numpy as np
import pytest

import iterreduce as ir
from tests.waist.kit import (
    NAMES,
    by,
    complete,
    graph,
    id_of,
    named,
    path,
    random_graph,
    ring,
    rmat,
    solved,
    star,
    verify,
)

D = 0.85


def ranks_of(edges: ir.Batch, ranks: int, **options: object) -> dict[object, float]:
    _, rows = solved("pagerank", ranks, edges, tolerance=1e-13, max_iterations=400, **options)
    return by(rows, "page", "rank")


@pytest.mark.parametrize(("tolerance", "step"), [(1e-3, 46), (1e-6, 89), (1e-9, 131), (1e-12, 174)])
def test_a_star_converges_in_the_step_that_is_known(tolerance: float, step: int, ranks: int) -> None:
    n = 11
    result, rows = solved("pagerank", ranks, star(n), tolerance=tolerance, max_iterations=1000)
    assert result.iterations == step and result.outcome is ir.Outcome.CONVERGED
    assert result.residual == pytest.approx(2 * (n - 2) / n * D**step, abs=1e-15)
    hub = (1 - D) / n * (1 + D * (n - 1)) / (1 - D**2)
    found = by(rows, "page", "rank")
    assert found[0] == pytest.approx(hub, abs=10 * tolerance)
    assert found[4] == pytest.approx((1 - D) / n + D * hub / (n - 1), abs=10 * tolerance)


@pytest.mark.parametrize("edges", [ring(12), complete(6)], ids=["ring", "complete"])
def test_rings_and_complete_graphs_rank_all_alike(edges: ir.Batch, ranks: int) -> None:
    found = ranks_of(edges, ranks)
    assert list(found.values()) == pytest.approx([1 / len(found)] * len(found))


def test_ranks_of_dangling_pages_are_spread(ranks: int) -> None:
    found = ranks_of(path(5), ranks)
    assert [found[i] for i in range(5)] == pytest.approx(
        [0.081184, 0.150190, 0.208845, 0.258702, 0.301080], abs=5e-7
    )


@pytest.mark.parametrize("kind", NAMES)
def test_random_graphs_have_the_ranks_of_a_dense_solve(kind: str, ranks: int) -> None:
    edges = random_graph(40, 90, seed=ranks).drop("weight")
    nodes = ir.Batch(page=NAMES[kind](np.array([77, 78])))
    found = ranks_of(named(edges, NAMES[kind]), ranks, nodes=nodes)
    want = dense(edges, [77, 78], np.ones)
    assert found == pytest.approx({id_of(page, kind): rank for page, rank in want.items()}, abs=1e-11)


def dense(edges: ir.Batch, more: list[int], restart: object) -> dict[int, float]:
    """The solution of the linear equations, by page."""
    pages = np.unique(np.concatenate([edges["src"], edges["dst"], more]))
    n = len(pages)
    count = np.zeros((n, n))
    np.add.at(count, (np.searchsorted(pages, edges["dst"]), np.searchsorted(pages, edges["src"])), 1)
    weight = np.asarray(restart(n), float)
    degree = count.sum(axis=0)
    go = np.where(degree > 0, count / np.maximum(degree, 1), (weight / weight.sum())[:, None])
    rank = np.linalg.solve(np.eye(n) - D * go, (1 - D) * weight / weight.sum())
    return dict(zip(pages.tolist(), rank.tolist(), strict=True))


def test_a_restart_set_draws_ranks_as_in_networkx(ranks: int) -> None:
    edges = random_graph(40, 90, seed=5).drop("weight")
    for weight in (None, np.array([1.0, 4.0, 2.5])):
        columns = {} if weight is None else {"weight": weight}
        restart = ir.Batch(page=np.array([10, 12, 33]), **columns)
        _, rows = solved("pagerank", ranks, edges, restart=restart, tolerance=1e-13, max_iterations=400)
        other = nx.MultiDiGraph(list(zip(edges["src"].tolist(), edges["dst"].tolist(), strict=True)))
        personal = by(restart.with_columns(weight=np.ones(3) if weight is None else weight), "page", "weight")
        want = nx.pagerank(other, D, personal, max_iter=1000, tol=1e-15)
        assert by(rows, "page", "rank") == pytest.approx(want, abs=1e-11)
        assert verify("pagerank", rows, edges, weight=personal) < 1e-12


@pytest.mark.parametrize(("scale", "ranks"), [(10, 3), (12, 5), (14, 2), (16, 1)])
def test_rmat_graphs_have_the_ranks_of_igraph(scale: int, ranks: int) -> None:
    edges = rmat(scale, factor=4).drop("weight")
    _, rows = solved("pagerank", ranks, edges, tolerance=1e-11, max_iterations=300)
    assert verify("pagerank", rows, edges) < 2e-11
    pages = np.sort(rows["page"])
    ends = [np.searchsorted(pages, edges[end]).tolist() for end in ("src", "dst")]
    want = igraph.Graph(len(pages), list(zip(*ends, strict=True)), directed=True).pagerank(damping=D)
    np.testing.assert_allclose(rows["rank"][np.argsort(rows["page"])], want, rtol=0, atol=1e-9)


def test_pages_to_restart_from_must_be_there_and_weigh_something() -> None:
    with pytest.raises(ir.UsageError, match="such as page=99"):
        solved("pagerank", 2, ring(5), restart=ir.Batch(page=np.array([1, 99])))
    with pytest.raises(ir.InputError, match="more than 0"):
        solved("pagerank", 2, ring(5), restart=ir.Batch(page=np.array([1]), weight=np.array([0.0])))
    with pytest.raises(ir.InputError, match="negative"):
        solved("pagerank", 2, ring(5), restart=ir.Batch(page=np.array([1]), weight=np.array([-1.0])))


def test_no_edges_have_no_ranks() -> None:
    with pytest.raises(ir.InputError, match="no page to restart"):
        solved("pagerank", 2, graph([], []))
