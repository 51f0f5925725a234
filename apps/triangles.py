"""Triangles: two joins, each edge once.

    mpirun -n 8 python -m iterreduce apps/triangles.py web.edges --out triangles.csv

Every pair of neighbours is directed from the vertex of fewer neighbours to that of more, so that no vertex
has many edges out (Chiba and Nishizeki, 1985); a triangle is then a path a -> b -> c whose ends are joined
too. Directions, loops and repeated edges do not count.
"""

import numpy as np

import iterreduce as ir
from iterreduce import col


@ir.app
def triangles(edges: ir.Dataset) -> ir.Dataset:
    """In how many triangles each vertex of EDGES is. Vertices in none are left out.

    The result has the columns vertex and triangles.
    """
    edges = edges.as_edges().filter(col("src") != col("dst"))
    pairs = edges.select(a="src", b="dst").union(edges.select(a="dst", b="src")).distinct()
    degrees = pairs.group_by("a").agg(degree=ir.count())
    pairs = pairs.join(degrees, "a").join(degrees.select(b="a", far="degree"), "b")
    less = (col("degree") < col("far")) | ((col("degree") == col("far")) & (col("a") < col("b")))
    upward = pairs.filter(less).select("a", "b")
    wedges = upward.join(upward.select("a", c="b"), "a").select(a="b", b="c", corner="a")
    closed = wedges.join(upward, ["a", "b"])
    corners = closed.select(vertex="a").union(closed.select(vertex="b"), closed.select(vertex="corner"))
    return corners.group_by("vertex").agg(triangles=ir.count())


def verify(result: ir.Batch, edges: ir.Batch) -> int:
    """By another road: the diagonal of the cube of SciPy's matrix. The number of triangles; raises
    `ValueError`.
    """
    import scipy.sparse

    names, at = np.unique(np.concatenate([ids(edges["src"]), ids(edges["dst"])]), return_inverse=True)
    src, dst = np.split(at, 2)
    keep = src != dst
    links = scipy.sparse.csr_matrix(
        (np.ones(keep.sum(), np.int64), (src[keep], dst[keep])), (len(names),) * 2
    )
    links = ((links + links.T) > 0).astype(np.int64)
    count = np.asarray((links @ links).multiply(links).sum(axis=1)).ravel() // 2
    found = np.zeros(len(names), np.int64)
    found[np.searchsorted(names, ids(result["vertex"]))] = result["triangles"]
    if not np.array_equal(count, found):
        raise ValueError(f"{found.sum() // 3} triangles were found, there are {count.sum() // 3}")
    return int(count.sum() // 3)


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
