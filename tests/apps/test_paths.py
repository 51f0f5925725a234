"""Shortest paths and breadth-first search, written lazily: closed forms, and Dijkstra's by the verifiers."""

from __future__ import annotations

import numpy as np
import pytest

import iterreduce as ir
from tests.apps.kit import solved, verify
from tests.waist import kit
from tests.waist.kit import NAMES, by, graph, grid, id_of, named, path, random_graph, ring, rmat, tree

WAYS = [{}, {"symmetric": True}, {"weights": False}]


def test_distances_in_trees_grids_and_rings_are_those_known(ranks: int) -> None:
    _, rows = solved("shortest_paths", ranks, tree(63), "0", weights=False)
    assert by(rows, "vertex", "distance") == {i: (i + 1).bit_length() - 1 for i in range(63)}
    _, rows = solved("shortest_paths", ranks, grid(6, 5), "0", weights=False)
    assert by(rows, "vertex", "distance") == {i: i % 6 + i // 6 for i in range(30)}
    _, rows = solved("shortest_paths", ranks, ring(9), "0", weights=False, symmetric=True)
    assert by(rows, "vertex", "distance") == {i: min(i, 9 - i) for i in range(9)}


def test_log_normal_degrees_have_the_distances_of_dijkstra() -> None:
    rng = np.random.default_rng(7)
    degree = np.minimum(rng.lognormal(4, 1.3, 400).astype(np.int64), 2000)
    src = np.repeat(np.arange(400), degree)
    edges = graph(src, rng.integers(0, 400, len(src)), weight=np.ones(len(src), np.int64))
    for ranks in (1, 3):
        _, rows = solved("shortest_paths", ranks, edges, "0")
        assert verify("shortest_paths", rows, edges, "0") > 300


@pytest.mark.parametrize("options", WAYS, ids=["weighted", "both ways", "unweighted"])
def test_random_graphs_have_the_distances_of_scipy(options: dict[str, bool], ranks: int) -> None:
    for kind, name in NAMES.items():
        edges = named(random_graph(60, 150, seed=ranks), name)
        source = str(id_of(9, kind))
        _, rows = solved("shortest_paths", ranks, edges, source, **options)
        assert verify("shortest_paths", rows, edges, source, **options) > 1


def test_of_parallel_edges_the_shortest_counts_and_weights_may_be_fractions(ranks: int) -> None:
    edges = graph([0, 0, 1, 1], [1, 1, 2, 1], weight=np.array([2.5, 0.5, 0.25, 9.0]))
    _, rows = solved("shortest_paths", ranks, edges, "0")
    assert by(rows, "vertex", "distance") == {0: 0.0, 1: 0.5, 2: 0.75}


def test_sources_must_be_there_and_weights_must_not_be_negative() -> None:
    edges = path(4).with_columns(weight=np.array([1, -2, 3]))
    with pytest.raises(ir.UserCodeError, match="no vertex"):
        solved("shortest_paths", 2, path(4), "9", weights=False)
    with pytest.raises(ir.UserCodeError, match="negative"):
        solved("shortest_paths", 2, edges, "0")
    with pytest.raises(ir.UserCodeError, match="no vertex"):
        solved("breadth_first", 2, path(4), "9")


@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "both ways"])
def test_levels_are_those_of_scipy_and_parents_the_smallest(symmetric: bool, ranks: int) -> None:
    for kind, name in NAMES.items():
        edges = named(random_graph(60, 150, seed=ranks).drop("weight"), name)
        source = str(id_of(9, kind))
        _, rows = solved("breadth_first", ranks, edges, source, symmetric=symmetric)
        assert verify("breadth_first", rows, edges, source, symmetric=symmetric) > 1


def test_rmat_graphs_have_the_distances_and_levels_of_scipy() -> None:
    edges = rmat(12, factor=4)
    source = str(edges["src"][0])
    _, rows = solved("shortest_paths", 3, edges, source)
    assert verify("shortest_paths", rows, edges, source) > 1000
    _, rows = solved("breadth_first", 2, edges.drop("weight"), source)
    assert verify("breadth_first", rows, edges, source) > 3


def test_an_iteration_sends_what_the_program_at_the_waist_sends(ranks: int) -> None:
    lazy, _ = solved("shortest_paths", ranks, path(60), "0", weights=False)
    waist, _ = kit.solved("sssp", ranks, path(60), "0", weights=False, settle=True)
    assert lazy.bytes_exchanged["per_iteration"] == waist.bytes_exchanged["per_iteration"]
