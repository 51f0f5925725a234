"""Connected components at the waist: closed forms (how many rounds too), SciPy, NetworkX."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

import iterreduce as ir
from tests.waist.kit import (
    NAMES,
    by,
    complete,
    graph,
    grid,
    named,
    random_graph,
    ring,
    rmat,
    solved,
    together,
    verify,
)

LONELY = {
    "small numbers": np.array([500, 501]),
    "negative and 64-bit numbers": np.array([-(2**63), 2**63 - 1]),
    "text": ["nobody", ""],
}


def test_cliques_cycles_and_grids_have_their_smallest_vertex_as_a_name(ranks: int) -> None:
    clique, cycle = complete(6), graph(100 + ring(9)["src"], 100 + ring(9)["dst"])
    mesh = graph(200 + grid(4, 5)["src"], 200 + grid(4, 5)["dst"])
    edges = together(clique, cycle, mesh)
    result, rows = solved("components", ranks, edges, nodes=ir.Batch(vertex=np.array([3, 77, 300])))
    found = by(rows, "vertex", "component")
    want = (
        dict.fromkeys(range(6), 0) | dict.fromkeys(range(100, 109), 100) | dict.fromkeys(range(200, 220), 200)
    )
    assert found == want | {77: 77, 300: 300}
    assert result.iterations <= 3 + 4 + 1  # the grid's diameter, and the round that finds nothing new


@pytest.mark.parametrize("n", [2, 3, 10, 33])
def test_a_path_takes_as_many_rounds_as_it_is_long(n: int) -> None:
    edges = graph(np.arange(n - 1), np.arange(1, n))
    result, rows = solved("components", 3, edges)
    assert set(by(rows, "vertex", "component").values()) == {0}
    assert result.iterations == n and result.outcome is ir.Outcome.EMPTY


@pytest.mark.parametrize("kind", NAMES)
def test_random_graphs_have_the_components_of_scipy_and_networkx(kind: str, ranks: int) -> None:
    edges = named(random_graph(80, 60, seed=ranks), NAMES[kind])
    nodes = ir.Batch(vertex=LONELY[kind])
    _, rows = solved("components", ranks, edges, nodes=nodes)
    verify("components", rows, edges)
    found = by(rows, "vertex", "component")
    other = nx.Graph(list(zip(list_of(edges["src"]), list_of(edges["dst"]), strict=True)))
    other.add_nodes_from(list_of(nodes["vertex"]))
    want = {}
    for part in nx.connected_components(other):
        want.update(dict.fromkeys(part, min(part)))
    assert found == want


def list_of(column: np.ndarray | ir.Ragged) -> list[object]:
    return column.tolist() if isinstance(column, np.ndarray) else column.to_list()


@pytest.mark.parametrize(("scale", "ranks"), [(10, 1), (10, 5), (12, 3), (14, 2)])
def test_rmat_graphs_have_the_components_of_scipy(scale: int, ranks: int) -> None:
    edges = rmat(scale, factor=1)
    result, rows = solved("components", ranks, edges)
    assert verify("components", rows, edges) > 1
    assert result.iterations < 20


def test_a_graph_without_edges_has_its_nodes_as_components() -> None:
    _, rows = solved("components", 2, graph([], []), nodes=ir.Batch(vertex=np.array([4, -4])))
    assert by(rows, "vertex", "component") == {4: 4, -4: -4}
