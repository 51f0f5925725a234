"""Descendants of some nodes: only the children of those that were found last are joined.

    mpirun -n 8 python -m iterreduce apps/descendants.py edges.npy roots.csv --out found.csv

Edges lie by their first node, once and for all; what is found lies by node, so that only children travel.
After Bu, Howe, Balazinska and Ernst, "HaLoop", VLDB 2010 (there: descendant query).
"""

import numpy as np

import iterreduce as ir
from iterreduce import col


@ir.app
def descendants(edges: ir.Dataset, roots: ir.Dataset) -> ir.Dataset:
    """The nodes that can be reached over EDGES from ROOTS (column node), with the number of steps.

    The result has the columns node and generation; roots are of generation 0.
    """
    edges = edges.as_edges()

    def step(last: ir.Dataset) -> ir.Dataset:
        children = edges.join(last, src="node")
        return children.group_by(node="dst").agg(generation=ir.min(col("generation") + 1))

    first = roots.distinct("node").with_columns(generation=0)
    return ir.iterate_changes(step, first, merge={"generation": ir.MIN}, key="node")


def verify(result: ir.Batch, edges: ir.Batch, roots: ir.Batch) -> int:
    """By another road: generation after generation with NumPy's sets. How many nodes were found; raises
    `ValueError` where they differ.
    """
    src, dst = ids(edges["src"]), ids(edges["dst"])
    frontier = found = np.unique(ids(roots["node"]))
    generation = np.zeros(len(found), np.int64)
    while len(frontier):
        frontier = np.setdiff1d(dst[np.isin(src, frontier)], found)
        found = np.append(found, frontier)
        generation = np.append(generation, np.full(len(frontier), generation[-1] + 1))
    ours, theirs = np.argsort(ids(result["node"])), np.argsort(found)
    if not np.array_equal(ids(result["node"])[ours], found[theirs]):
        raise ValueError("other nodes were found")
    if not np.array_equal(result["generation"][ours], generation[theirs]):
        raise ValueError("nodes were found in other generations")
    return len(found)


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
