"""Triangles, descendants and closures, written lazily: closed forms, matrices, sets."""

from __future__ import annotations

import math

import numpy as np
import pytest

import iterreduce as ir
from tests.apps.kit import solved, verify
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
    together,
    tree,
)


@pytest.mark.parametrize(("k", "h"), [(2, 4), (3, 3)])
def test_a_tree_has_k_to_the_i_nodes_in_generation_i(k: int, h: int, ranks: int) -> None:
    n = (k ** (h + 1) - 1) // (k - 1)
    result, rows = solved("descendants", ranks, tree(n, k), ir.Batch(node=np.array([0])))
    assert np.bincount(rows["generation"]).tolist() == [k**i for i in range(h + 1)]
    assert set(rows["node"].tolist()) == set(range(n))
    assert result.iterations == h + 1 and result.outcome is ir.Outcome.EMPTY


@pytest.mark.parametrize("kind", NAMES)
def test_random_graphs_with_cycles_have_the_descendants_of_sets(kind: str, ranks: int) -> None:
    edges = named(random_graph(60, 150, seed=ranks), NAMES[kind])
    roots = ir.Batch(node=[id_of(9, kind), id_of(12, kind), id_of(9, kind)])
    _, rows = solved("descendants", ranks, edges, roots)
    assert verify("descendants", rows, edges, roots) == len(rows) > 5


def test_a_root_without_children_is_found_alone() -> None:
    _, rows = solved("descendants", 3, graph([1], [2]), ir.Batch(node=np.array([7])))
    assert by(rows, "node", "generation") == {7: 0}


@pytest.mark.parametrize("n", [3, 6, 17])
def test_all_pairs_of_a_path_are_found_in_as_many_rounds_as_are_known(n: int, ranks: int) -> None:
    for doubling, rounds in ((False, n - 1), (True, (n - 2).bit_length() + 1)):
        result, rows = solved("closure", ranks, path(n), doubling=doubling)
        assert sorted(zip(rows["src"].tolist(), rows["dst"].tolist(), strict=True)) == [
            (i, j) for i in range(n) for j in range(i + 1, n)
        ]
        assert result.iterations == rounds and result.outcome is ir.Outcome.EMPTY


@pytest.mark.parametrize("kind", NAMES)
def test_random_graphs_have_the_closure_of_warshall(kind: str, ranks: int) -> None:
    edges = named(random_graph(30, 45, seed=ranks), NAMES[kind])
    for doubling in (False, True):
        _, rows = solved("closure", ranks, edges, doubling=doubling)
        assert verify("closure", rows, edges) > 45


@pytest.mark.parametrize("n", [3, 4, 7, 12])
def test_complete_graphs_and_wheels_have_as_many_triangles_as_are_known(n: int, ranks: int) -> None:
    _, rows = solved("triangles", ranks, complete(n))
    assert by(rows, "vertex", "triangles") == dict.fromkeys(range(n), math.comb(n - 1, 2))
    if n > 3:
        rim = graph(1 + ring(n)["src"], 1 + ring(n)["dst"])
        spokes = graph(np.zeros(n, np.int64), np.arange(1, n + 1))
        _, rows = solved("triangles", ranks, together(rim, spokes))
        assert rows["triangles"].sum() == 3 * n


def test_random_and_rmat_graphs_have_the_triangles_of_scipy(ranks: int) -> None:
    texts = named(random_graph(40, 300, seed=ranks), NAMES["text"])
    for edges in (random_graph(40, 300, seed=ranks), texts, rmat(10, factor=4, seed=ranks)):
        _, rows = solved("triangles", ranks, edges)
        assert verify("triangles", rows, edges) > 100


def test_graphs_without_triangles_have_none(ranks: int) -> None:
    for edges in (path(6), graph([], []), graph([1, 1], [1, 1])):
        assert len(solved("triangles", ranks, edges)[1]) == 0
