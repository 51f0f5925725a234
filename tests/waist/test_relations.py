"""Programs of joins at the waist: descendants, against closed forms and sets."""

from __future__ import annotations

import numpy as np
import pytest

import iterreduce as ir
from tests.waist.kit import NAMES, by, graph, id_of, named, random_graph, solved, tree, verify


@pytest.mark.parametrize(("k", "h"), [(2, 4), (3, 3), (5, 2)])
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
