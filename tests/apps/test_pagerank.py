"""PageRank, written lazily: closed forms, dense solves, NetworkX, igraph, and the program at the waist."""

from __future__ import annotations

import igraph
import networkx as nx
import numpy as np
import pytest

import iterreduce as ir
from iterreduce.stages import Index, Shuffle
from tests.apps.kit import app, solved, verify
from tests.waist import kit
from tests.waist.kit import NAMES, by, complete, graph, id_of, named, path, random_graph, ring, rmat, star
from tests.waist.test_ranking import D, dense


def ranks_of(edges: ir.Batch, ranks: int, **options: object) -> dict[object, float]:
    _, rows = solved("pagerank", ranks, edges, tolerance=1e-13, max_iterations=400, **options)
    return by(rows, "page", "rank")


@pytest.mark.parametrize(("tolerance", "step"), [(1e-3, 46), (1e-6, 89), (1e-9, 131), (1e-12, 174)])
def test_a_star_converges_in_the_step_that_is_known(tolerance: float, step: int, ranks: int) -> None:
    n = 11
    result, rows = solved("pagerank", ranks, star(n), tolerance=tolerance, max_iterations=1000)
    assert result.iterations == step and result.outcome is ir.Outcome.CONVERGED
    assert result.residual == pytest.approx(2 * (n - 2) / n * D**step, abs=1e-14)
    found = by(rows, "page", "rank")
    assert found[0] == pytest.approx((1 - D) / n * (1 + D * (n - 1)) / (1 - D**2), abs=10 * tolerance)


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


@pytest.mark.parametrize(("scale", "ranks"), [(10, 3), (14, 2)])
def test_rmat_graphs_have_the_ranks_of_igraph(scale: int, ranks: int) -> None:
    edges = rmat(scale, factor=4).drop("weight")
    _, rows = solved("pagerank", ranks, edges, tolerance=1e-11, max_iterations=300)
    assert verify("pagerank", rows, edges) < 2e-11
    pages = np.sort(rows["page"])
    ends = [np.searchsorted(pages, edges[end]).tolist() for end in ("src", "dst")]
    want = igraph.Graph(len(pages), list(zip(*ends, strict=True)), directed=True).pagerank(damping=D)
    np.testing.assert_allclose(rows["rank"][np.argsort(rows["page"])], want, rtol=0, atol=1e-9)


def test_pages_to_restart_from_must_be_there_and_weigh_something() -> None:
    with pytest.raises(ir.UserCodeError, match="such as 99"):
        solved("pagerank", 2, ring(5), restart=ir.Batch(page=np.array([1, 99])))
    with pytest.raises(ir.UserCodeError, match="more than 0"):
        solved("pagerank", 2, ring(5), restart=ir.Batch(page=np.array([1]), weight=np.array([0.0])))
    with pytest.raises(ir.UserCodeError, match="negative"):
        solved("pagerank", 2, ring(5), restart=ir.Batch(page=np.array([1]), weight=np.array([-1.0])))


def test_graphs_without_edges_rank_their_pages_alike(ranks: int) -> None:
    assert ranks_of(graph([], []), ranks) == {}
    alone = ranks_of(graph([], []), ranks, nodes=ir.Batch(page=np.array([4, 5, 6, 7])))
    assert alone == pytest.approx(dict.fromkeys((4, 5, 6, 7), 0.25))


def test_it_lowers_to_an_index_and_a_shuffle_of_values() -> None:
    edges = ir.Dataset.from_local(**dict(ring(5)._columns))
    nodes = ir.Dataset.from_local(page=np.array([9]))
    for options in ({}, {"nodes": nodes}, {"restart": nodes}):
        loop = app("pagerank")(edges, **options).to_loop()
        assert sum(isinstance(stage, Index) for stage in loop.prepare) == 1
        (step,) = loop.body
        assert [s.joined is not None for s in step.stages if isinstance(s, Shuffle)] == [True]


@pytest.mark.parametrize("ranks", [2, 5])
def test_iterations_send_what_the_program_at_the_waist_sends(ranks: int) -> None:
    edges = rmat(9, factor=8).drop("weight")
    lazy, _ = solved("pagerank", ranks, edges, tolerance=0, max_iterations=6)
    waist, _ = kit.solved("pagerank", ranks, edges, tolerance=0, max_iterations=6)
    of_total = 8 * 4 * ranks
    for ours, theirs in zip(lazy.bytes_exchanged["per_iteration"], waist.bytes_exchanged["per_iteration"],
                            strict=True):  # fmt: skip
        assert ours <= theirs + of_total
