"""Triangles, in nouns: two joins, each edge once.

    mpirun -n 8 python -m iterreduce benchmarks/waist/triangles.py web.edges --out triangles.csv

Every pair of neighbours is directed from the vertex of fewer neighbours to that of more, so that no vertex
has many edges out (Chiba and Nishizeki, 1985); a triangle is then a path a -> b -> c whose ends are joined
too. Directions, loops and repeated edges do not count.
"""

import numpy as np

import iterreduce as ir

PAIR = ("a", "b")


def mirrored(edges: ir.Batch) -> ir.Batch:
    """Both directions of an edge, but for loops."""
    src, dst = edges["src"], edges["dst"]
    rows = np.flatnonzero(src != dst)
    src, dst = src[rows], dst[rows]
    return ir.Batch(a=np.append(src, dst), b=np.append(dst, src))


def upward(pairs: ir.Batch) -> ir.Batch:
    """Pairs from fewer neighbours to more, by id where both have as many."""
    a, b, one, other = (pairs[name] for name in ("a", "b", "degree", "far"))
    rows = np.flatnonzero((one < other) | ((one == other) & (a < b)))
    return ir.Batch(a=a[rows], b=b[rows])


def ends(pairs: ir.Batch) -> ir.Batch:
    return pairs.rename(b="c")


def wedges(rows: ir.Batch) -> ir.Batch:
    """The two far ends of two edges of one vertex, as a pair to look for."""
    return ir.Batch(a=rows["b"], b=rows["c"], corner=rows["a"])


def far(degrees: ir.Batch) -> ir.Batch:
    return degrees.rename(a="vertex", degree="far")


def corners(closed: ir.Batch) -> ir.Batch:
    return ir.Batch(vertex=np.concatenate([closed[name] for name in ("a", "b", "corner")]))


def third(total: ir.Batch) -> ir.Batch:
    """Every triangle has three corners; without any there is no total."""
    corners = total["corners"] if len(total) else np.zeros(1, np.int64)
    return ir.Batch(triangles=corners // 3)


@ir.app
def triangles(edges: ir.Dataset) -> ir.Dataset:
    """In how many triangles each vertex of EDGES is; ids are numbers. Vertices in none are left out.

    The result has the columns vertex and triangles; the summary's value is the number of triangles.
    """
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    stages = (
        ir.Local(mirrored, (rows,), "both ways"),
        ir.Shuffle("both ways", PAIR, "pairs", {"times": ir.count()}),
        ir.Shuffle("pairs", ("a",), "degrees", {"degree": ir.count()}),
        ir.Lookup("pairs", ("a",), "degrees", ("degree",), "pairs from"),
        ir.Local(
            lambda rows: rows.rename(degree="far", a="vertex"), ("degrees",), "far degrees", cut="share"
        ),
        ir.Shuffle("far degrees", ("vertex",), "others"),
        ir.Lookup("pairs from", ("b",), "others", ("far",), "pairs with degrees"),
        ir.Local(upward, ("pairs with degrees",), "upward", cut="share"),
        ir.Shuffle("upward", ("a",), "edges by start"),
        ir.Local(ends, ("upward",), "ends", cut="share"),
        ir.Shuffle("ends", ("a",), "ends by start"),
        ir.Lookup("edges by start", ("a",), "ends by start", ("c",), "forks"),
        ir.Local(wedges, ("forks",), "wedges"),
        ir.Shuffle("upward", PAIR, "closing", {"times": ir.count()}),
        ir.Lookup("wedges", PAIR, "closing", ("times",), "closed", missing="drop"),
        ir.Local(corners, ("closed",), "corners"),
        ir.Shuffle("corners", ("vertex",), "found", {"triangles": ir.count()}),
    )
    step = ir.Superstep("count", stages, (ir.Replace("result", "found"),))
    finish = (
        ir.Total("result", (), {"corners": ir.sum("triangles")}, "total"),
        ir.Local(third, ("total",), "number", cut="share"),
    )
    loop = ir.Loop(
        "triangles", inputs.sources, {"result": ir.State("")}, (step,), ir.Until((ir.MaxIterations(1),)),
        "result", prepare=inputs.prepare, finish=finish, values={"triangles": ("number", "triangles")},
    )  # fmt: skip
    return ir.Dataset.of_loop(loop, edges.comm)


def verify(result: ir.Batch, edges: ir.Batch) -> int:
    """By another road: the diagonal of the cube of SciPy's matrix. The number of triangles; raises
    `ValueError`.
    """
    import scipy.sparse

    names, at = np.unique(np.concatenate([edges["src"], edges["dst"]]), return_inverse=True)
    src, dst = np.split(at, 2)
    keep = src != dst
    links = scipy.sparse.csr_matrix(
        (np.ones(keep.sum(), np.int64), (src[keep], dst[keep])), (len(names),) * 2
    )
    links = ((links + links.T) > 0).astype(np.int64)
    count = np.asarray((links @ links).multiply(links).sum(axis=1)).ravel() // 2
    found = np.zeros(len(names), np.int64)
    found[np.searchsorted(names, result["vertex"])] = result["triangles"]
    if not np.array_equal(count, found):
        raise ValueError(f"{found.sum() // 3} triangles were found, there are {count.sum() // 3}")
    return int(count.sum() // 3)
