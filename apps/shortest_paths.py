"""Shortest paths from one vertex: Bellman and Ford with a frontier.

    mpirun -n 8 python -m iterreduce apps/shortest_paths.py roads.edges 17 --out distances.csv

Only vertices whose distance has become shorter speak, and only those that hear of a shorter one are written:
an iteration costs as much as the edges of its frontier, whatever the size of the graph. Parallel edges count
by the shortest.
"""

from functools import partial

import numpy as np

import iterreduce as ir
from iterreduce import col


@ir.app
def shortest_paths(
    edges: ir.Dataset,
    source: str,
    symmetric: bool = False,
    weights: bool = True,
    max_iterations: int | None = None,
) -> ir.Dataset:
    """How far the vertices of EDGES are from SOURCE; what cannot be reached is left out.

    --symmetric: edges go both ways. --no-weights: every edge has the length 1. The result has the columns
    vertex and distance, a float with weights.
    """
    edges = edges.as_edges()
    links = edges.union(edges.select(*edges.columns).rename(src="dst", dst="src")) if symmetric else edges
    length, zero, far = (col("weight"), 0.0, np.inf) if weights else (1, 0, ir.INT64_MAX)
    here = col("vertex").cast(str) == ir.lit(source)
    start = edges.vertices().select("vertex", distance=ir.where(here, zero, far))
    first = start.filter(col("distance") == 0)
    least = edges.agg(least=ir.min("weight")) if weights else ir.Batch(least=np.ones(1))
    first = first.map_batches(
        partial(checked, source), first.agg(found=ir.count()), least, columns={}, keeps=first.columns
    )

    def step(nearer: ir.Dataset) -> ir.Dataset:
        along = links.join(nearer, src="vertex")
        return along.group_by(vertex="dst").agg(distance=ir.min(col("distance") + length))

    found = ir.iterate_changes(
        step, start, merge={"distance": ir.MIN}, changes=first, key="vertex", max_iterations=max_iterations
    )
    return found.filter(col("distance") < far)


def checked(source: str, first: ir.Batch, sources: ir.Batch, weights: ir.Batch) -> ir.Batch:
    """The source, if there is one and no weight forbids to look for paths."""
    if not sources["found"][0]:
        raise ir.UsageError(f"the source {source} is no vertex of the graph")
    if not weights["least"][0] >= 0:
        raise ir.InputError("a weight is negative or no number: shortest paths may not exist")
    return first


def verify(
    result: ir.Batch, edges: ir.Batch, source: str, symmetric: bool = False, weights: bool = True
) -> int:
    """By another road: Dijkstra's, of SciPy. How many vertices can be reached; raises `ValueError` where a
    distance differs.
    """
    import scipy.sparse

    names, at = np.unique(np.concatenate([ids(edges["src"]), ids(edges["dst"])]), return_inverse=True)
    src, dst = np.split(at, 2)
    weight = edges["weight"] if weights else np.ones(len(edges), np.int64)
    if symmetric:
        src, dst, weight = np.append(src, dst), np.append(dst, src), np.append(weight, weight)
    order = np.lexsort((weight, dst, src))  # of parallel edges the shortest is the first
    order = order[np.append(True, (np.diff(src[order]) != 0) | (np.diff(dst[order]) != 0))]
    size = len(names), len(names)
    graph = scipy.sparse.csr_matrix((weight[order].astype(float), (src[order], dst[order])), size)
    start = np.flatnonzero(names == names.dtype.type(source))[0]
    distance = scipy.sparse.csgraph.dijkstra(graph, indices=start)
    found = np.full(len(names), np.inf)
    found[np.searchsorted(names, ids(result["vertex"]))] = result["distance"]
    if not np.allclose(found, distance, rtol=1e-12, atol=0):
        wrong = np.flatnonzero(~np.isclose(found, distance, rtol=1e-12, atol=0))[0]
        raise ValueError(f"{names[wrong]} is {distance[wrong]:g} away, found {found[wrong]:g}")
    return len(result)


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
