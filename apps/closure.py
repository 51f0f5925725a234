"""Transitive closure: semi-naive, linear or doubling.

    mpirun -n 8 python -m iterreduce apps/closure.py edges.npy --doubling --out pairs.csv

Only pairs that were found last are joined, with edges (linear: paths grow by one edge a round) or with all
pairs so far on both sides (doubling: paths double). Bancilhon and Ramakrishnan, SIGMOD 1986; Ioannidis, VLDB
1986.
"""

import numpy as np

import iterreduce as ir


@ir.app
def closure(edges: ir.Dataset, doubling: bool = False) -> ir.Dataset:
    """The pairs (src, dst) such that a path of EDGES leads from src to dst."""
    edges = edges.as_edges().distinct("src", "dst")

    def along(paths: ir.Dataset, more: ir.Dataset) -> ir.Dataset:
        on = more.select(mid="src", far="dst")
        return paths.join(on, dst="mid").select("src", dst="far")

    def linear(last: ir.Dataset) -> ir.Dataset:
        return along(last, edges).distinct()

    def double(last: ir.Dataset, pairs: ir.Dataset) -> ir.Dataset:
        return along(last, pairs).union(along(pairs, last)).distinct()

    return ir.iterate_changes(double if doubling else linear, edges, key=("src", "dst"))


def verify(result: ir.Batch, edges: ir.Batch) -> int:
    """By another road: Warshall's algorithm on a matrix. How many pairs; raises `ValueError`."""
    names, at = np.unique(np.concatenate([ids(edges["src"]), ids(edges["dst"])]), return_inverse=True)
    src, dst = np.split(at, 2)
    reach = np.zeros((len(names), len(names)), bool)
    reach[src, dst] = True
    for middle in range(len(names)):
        reach |= reach[:, middle, None] & reach[middle]
    found = np.zeros_like(reach)
    found[np.searchsorted(names, ids(result["src"])), np.searchsorted(names, ids(result["dst"]))] = True
    if len(result) != reach.sum() or not np.array_equal(found, reach):
        raise ValueError(f"{len(result)} pairs were found, {reach.sum()} are reachable, or others")
    return len(result)


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
