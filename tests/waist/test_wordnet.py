"""WordNet, a real graph with string ids, from its file: as NetworkX and igraph have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import igraph
import networkx as nx
import numpy as np
import pytest

import iterreduce as ir
from iterreduce.testing import run_ranks
from tests.waist.kit import by, program

RANKS = pytest.mark.parametrize("ranks", [1, 3])
ROOT = "n00001740"  # entity


@pytest.fixture(scope="module")
def lines(wordnet_edges: Path) -> list[tuple[str, str]]:
    """The edges, as Python reads them."""
    return [tuple(line.split()) for line in wordnet_edges.read_text().splitlines()[1:]]


def found(name: str, ranks: int, path: Path, *args: Any, **options: Any) -> ir.Batch:
    results = run_ranks(
        ranks, lambda group: program(name)(ir.read(str(path)), *args, **options).run(group), timeout=240
    )
    return ir.Batch.concat([r.batch for r in results])


@pytest.fixture(scope="module")
def components(lines: Any) -> dict[str, str]:
    named: dict[str, str] = {}
    for part in nx.connected_components(nx.Graph(lines)):
        named.update(dict.fromkeys(part, min(part)))
    return named


@pytest.fixture(scope="module")
def distances(lines: Any) -> dict[str, int]:
    return dict(nx.single_source_shortest_path_length(nx.DiGraph(lines), ROOT))


@pytest.fixture(scope="module")
def ranks_of_pages(lines: Any) -> dict[str, float]:
    graph = igraph.Graph.TupleList(lines, directed=True)
    return dict(zip(graph.vs["name"], graph.pagerank(damping=0.85), strict=True))


@RANKS
def test_components_are_those_of_networkx(wordnet_edges: Path, components: Any, ranks: int) -> None:
    assert by(found("components", ranks, wordnet_edges), "vertex", "component") == components


@RANKS
def test_shortest_paths_are_those_of_networkx(wordnet_edges: Path, distances: Any, ranks: int) -> None:
    rows = found("sssp", ranks, wordnet_edges, ROOT, weights=False)
    assert by(rows, "vertex", "distance") == distances
    assert by(found("bfs", ranks, wordnet_edges, ROOT), "vertex", "level") == distances


@RANKS
def test_ranks_are_those_of_igraph(wordnet_edges: Path, ranks_of_pages: Any, ranks: int) -> None:
    got = by(found("pagerank", ranks, wordnet_edges, tolerance=1e-10), "page", "rank")
    assert set(got) == set(ranks_of_pages)
    want = list(ranks_of_pages.values())
    np.testing.assert_allclose([got[page] for page in ranks_of_pages], want, rtol=0, atol=1e-9)
