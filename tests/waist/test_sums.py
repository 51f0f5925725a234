"""Programs of weighted sums at the waist: hubs and authorities, Katz centrality, least squares in turns."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

import iterreduce as ir
from tests.waist.kit import NAMES, by, id_of, named, random_graph, ring, rmat, solved, verify


@pytest.mark.parametrize("kind", NAMES)
def test_hubs_and_authorities_are_singular_vectors(kind: str, ranks: int) -> None:
    edges = named(random_graph(30, 300, seed=ranks), NAMES[kind])
    result, rows = solved("hits", ranks, edges, tolerance=1e-12)
    assert result.outcome is ir.Outcome.CONVERGED
    assert verify("hits", rows, edges) < 1e-9
    assert rows["hub"].sum() == pytest.approx(1) == rows["authority"].sum()


def test_hubs_and_authorities_are_those_of_networkx() -> None:
    edges = random_graph(30, 200, seed=4)
    pairs = np.unique(np.stack([edges["src"], edges["dst"]]), axis=1)
    _, rows = solved("hits", 3, ir.Batch(src=pairs[0], dst=pairs[1]), tolerance=1e-13)
    hubs, authorities = nx.hits(nx.DiGraph(pairs.T.tolist()), max_iter=1000, tol=1e-14)
    assert by(rows, "page", "hub") == pytest.approx(hubs, abs=1e-9)
    assert by(rows, "page", "authority") == pytest.approx(authorities, abs=1e-9)


@pytest.mark.parametrize("weights", [True, False], ids=["weighted", "unweighted"])
def test_katz_centrality_solves_its_equations(weights: bool, ranks: int) -> None:
    for kind, name in NAMES.items():
        edges = named(random_graph(50, 150, seed=ranks), name)
        options = {"alpha": 0.02 if weights else 0.1, "weights": weights}
        _, rows = solved("katz", ranks, edges, tolerance=1e-12, **options)
        assert verify("katz", rows, edges, **options) < 1e-9, id_of(0, kind)


def test_katz_and_hits_of_an_rmat_graph() -> None:
    edges = rmat(12, factor=8)
    _, rows = solved("katz", 2, edges, alpha=1e-6, tolerance=1e-13)
    assert verify("katz", rows, edges, alpha=1e-6) < 1e-10
    _, rows = solved("hits", 2, edges, tolerance=1e-11)
    assert verify("hits", rows, edges) < 1e-8


def test_katz_that_diverges_says_so() -> None:
    with pytest.raises(ir.UsageError, match="--alpha: the sum does not converge"):
        solved("katz", 2, ring(4).with_columns(weight=np.full(4, 1e300)), alpha=1e9)


@pytest.mark.parametrize("kind", NAMES)
def test_factors_are_those_of_one_user_after_the_other(kind: str, ranks: int) -> None:
    ratings = named(random_graph(25, 200, seed=ranks), NAMES[kind])
    if kind == "small numbers":
        ratings = ratings.with_columns(weight=ratings["weight"] / 3)
    _, rows = solved("als", ranks, ratings, rank=3, iterations=4)
    assert verify("als", rows, ratings, rank=3, iterations=4) < 1e-9
