"""Breadth-first search: levels and parents.

    mpirun -n 8 python -m iterreduce apps/breadth_first.py web.edges 17 --out levels.csv

The vertices that were found last tell their neighbours; those that hear of it for the first time are the next
level. In the end the parent of a vertex is the smallest of its neighbours one level before.
"""

from functools import partial

import numpy as np

import iterreduce as ir
from iterreduce import col


@ir.app
def breadth_first(edges: ir.Dataset, source: str, symmetric: bool = False) -> ir.Dataset:
    """How many edges of EDGES lead to each vertex from SOURCE, and the vertex before it.

    --symmetric: edges go both ways. The result has the columns vertex, level and parent (the smallest id of
    those that are possible; of the source the source); what cannot be reached is left out.
    """
    edges = edges.as_edges().select("src", "dst")
    links = edges.union(edges.select(src="dst", dst="src")) if symmetric else edges
    here = col("vertex").cast(str) == ir.lit(source)
    start = edges.vertices().select("vertex", level=ir.where(here, 0, ir.INT64_MAX))
    first = start.filter(col("level") == 0)
    first = first.map_batches(
        partial(checked, source), first.agg(found=ir.count()), columns={}, keeps=first.columns
    )

    def step(last: ir.Dataset) -> ir.Dataset:
        told = links.join(last, src="vertex")
        return told.group_by(vertex="dst").agg(level=ir.min(col("level") + 1))

    found = ir.iterate_changes(step, start, merge={"level": ir.MIN}, changes=first, key="vertex")
    found = found.filter(col("level") < ir.INT64_MAX)
    tree = links.join(found, src="vertex").join(found.rename(level="next"), dst="vertex")
    tree = tree.filter(col("next") == col("level") + 1)
    parents = tree.group_by(vertex="dst").agg(parent=ir.min("src"))
    return found.left_join(parents, "vertex").with_columns(parent=col("parent").fill_null(col("vertex")))


def checked(source: str, first: ir.Batch, sources: ir.Batch) -> ir.Batch:
    """The source, if there is one."""
    if not sources["found"][0]:
        raise ir.UsageError(f"the source {source} is no vertex of the graph")
    return first


def verify(result: ir.Batch, edges: ir.Batch, source: str, symmetric: bool = False) -> int:
    """By another road: SciPy's levels, and the smallest edge from the level before. The number of levels;
    raises `ValueError` where a level or a parent differs.
    """
    import scipy.sparse

    names, at = np.unique(np.concatenate([ids(edges["src"]), ids(edges["dst"])]), return_inverse=True)
    src, dst = np.split(at, 2)
    if symmetric:
        src, dst = np.append(src, dst), np.append(dst, src)
    graph = scipy.sparse.csr_matrix((np.ones(len(src)), (src, dst)), (len(names), len(names)))
    start = np.flatnonzero(names == names.dtype.type(source))[0]
    level = scipy.sparse.csgraph.dijkstra(graph, indices=start, unweighted=True)
    tree = level[dst] == level[src] + 1
    parent = np.full(len(names), len(names))
    np.minimum.at(parent, dst[tree], src[tree])
    parent[start] = start
    vertices = np.searchsorted(names, ids(result["vertex"]))
    if len(vertices) != np.isfinite(level).sum() or not np.array_equal(level[vertices], result["level"]):
        raise ValueError("levels differ")
    if not np.array_equal(names[parent[vertices]], ids(result["parent"])):
        raise ValueError("parents differ")
    return int(result["level"].max()) + 1


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
