"""Connected components, written lazily: NetworkX, closed forms, and SciPy by the app's verifier."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

import iterreduce as ir
from iterreduce.stages import Index
from tests.apps.kit import app, solved, verify
from tests.waist.kit import NAMES, by, complete, graph, grid, id_of, named, random_graph, ring, rmat, together


@pytest.mark.parametrize("kind", NAMES)
def test_random_graphs_have_the_components_of_networkx(kind: str, ranks: int) -> None:
    edges = random_graph(60, 45, seed=ranks).drop("weight")
    nodes = ir.Batch(vertex=NAMES[kind](np.array([90, 3])))
    _, rows = solved("connected_components", ranks, named(edges, NAMES[kind]), nodes=nodes)
    other = nx.Graph(list(zip(edges["src"].tolist(), edges["dst"].tolist(), strict=True)))
    other.add_nodes_from([90, 3])
    want = {}
    for part in nx.connected_components(other):
        names = [id_of(v, kind) for v in part]
        want |= dict.fromkeys(names, min(names))
    assert by(rows, "vertex", "component") == want
    assert verify("connected_components", rows, named(edges, NAMES[kind])) == len(set(want.values()))


def test_cliques_rings_and_grids_are_found_in_as_many_rounds_as_are_known(ranks: int) -> None:
    parts = together(complete(5), graph(*(10 + ring(8)[end] for end in ("src", "dst"))),
                     graph(*(100 + grid(4, 3)[end] for end in ("src", "dst"))))  # fmt: skip
    result, rows = solved("connected_components", ranks, parts)
    assert set(rows["component"].tolist()) == {0, 10, 100}
    assert result.outcome is ir.Outcome.EMPTY and result.iterations <= 5 + 1  # the grid's diameter


def test_loops_and_nothing_at_all_are_graphs_too(ranks: int) -> None:
    _, rows = solved("connected_components", ranks, graph([3, -4], [3, -4]))
    assert by(rows, "vertex", "component") == {3: 3, -4: -4}
    _, rows = solved("connected_components", ranks, graph([], []))
    assert len(rows) == 0


def test_rmat_graphs_have_the_components_of_scipy() -> None:
    edges = rmat(12, factor=2).drop("weight")
    _, rows = solved("connected_components", 3, edges)
    assert verify("connected_components", rows, edges) > 1


def test_both_directions_are_one_index() -> None:
    loop = app("connected_components")(ir.Dataset.from_local(**dict(ring(5)._columns))).to_loop()
    (index,) = (stage for stage in loop.prepare if isinstance(stage, Index))
    assert index.symmetric and index.keys["src"] == index.keys["dst"]
