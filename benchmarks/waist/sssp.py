"""Shortest paths from one vertex, in nouns: Bellman and Ford with a frontier.

    mpirun -n 8 python -m iterreduce benchmarks/waist/sssp.py roads.edges 17 --out distances.csv

Only vertices whose distance has become shorter speak, and only those that hear of a shorter one are written:
a superstep costs as much as the edges of its frontier, whatever the size of the graph. Parallel edges count
by the shortest. Weights are int64 or floats; distances are of that type. With --settle a vertex speaks as
soon as it can, the nearest first, and ranks meet when none of their own vertices has anything to say.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


def is_one(names: np.ndarray | ir.Ragged, name: str) -> np.ndarray:
    """Which ids are this one, given as text."""
    if isinstance(names, np.ndarray):
        return names == (int(name) if name.lstrip("-").isdecimal() else np.nan)
    return ~names.differs(ir.Ragged.from_list([name]).take(np.zeros(len(names), np.int64)))


def far(kind: np.dtype) -> float:
    """The distance of what cannot be reached, above all others."""
    return np.inf if kind.kind == "f" else np.iinfo(kind).max


@dataclass(frozen=True)
class First:
    """Nothing is reached but the source."""

    source: str

    def run(self, context: ir.Context, vertices: ir.Batch, shortest: ir.Batch) -> ir.Batch:
        weight = shortest["weight"]
        if not np.all(weight >= 0):
            raise ir.InputError("a weight is negative or no number: shortest paths may not exist")
        distance = np.full(len(vertices), far(weight.dtype), weight.dtype)
        distance[is_one(vertices["vertex"], self.source)] = 0
        return vertices.with_columns(distance=distance)


def start(vertices: ir.Batch) -> ir.Batch:
    return vertices.take(np.flatnonzero(vertices["distance"] == 0))


@dataclass(frozen=True)
class Checked:
    """The source, if any rank has it."""

    source: str

    def run(self, context: ir.Context, start: ir.Batch, sources: ir.Batch) -> ir.Batch:
        if len(sources) == 0:
            raise ir.UsageError(f"{self.source} is no vertex of the graph")
        return start


def improved(heard: ir.Batch, vertices: ir.Batch) -> ir.Batch:
    return heard.take(np.flatnonzero(heard["distance"] < vertices["distance"]))


def distances(heard: ir.Batch) -> ir.Batch:
    return heard.drop("told")


def untold(heard: ir.Batch) -> ir.Batch:
    some = heard.take(np.flatnonzero(~heard["told"])) if heard["told"].any() else heard
    return some.drop("told")


def reached(vertices: ir.Batch) -> ir.Batch:
    distance = vertices["distance"]
    return vertices.take(np.flatnonzero(distance < far(distance.dtype)))


@ir.app
def sssp(
    edges: ir.Dataset,
    source: str,
    symmetric: bool = False,
    weights: bool = True,
    max_iterations: int = 1_000_000,
    settle: bool = False,
) -> ir.Dataset:
    """How far the vertices of EDGES are from SOURCE; what cannot be reached is left out.

    --symmetric: edges go both ways. --no-weights: every edge has the length 1. --settle: fewer supersteps.
    The result has the columns vertex and distance.
    """
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    length = ir.col("weight") if weights else 1
    distance = ir.col("distance")
    settled = "told" if settle else ""
    told = ir.Shuffle("links", ("dst",), "heard", {"distance": ir.min(distance + length)}, "vertices",
                      touched=True, joined=ir.Joined("active", "src"), settle=settled)  # fmt: skip
    better = (ir.Local(improved, ("heard", "vertices"), "better", cut="share"),)
    if settle:
        better = (ir.Local(distances, ("heard",), "better", cut="share"),
                  ir.Local(untold, ("heard",), "next", cut="share"))  # fmt: skip
    writes = (ir.Patch("vertices", "better"), ir.Replace("active", "next" if settle else "better"))
    step = ir.Superstep("relax", (told, *better), writes)
    shortest = {"weight": ir.min("weight") if weights else ir.count()}
    prepare = (
        *inputs.prepare,
        ir.Index(rows, {"src": "keys", "dst": "keys"}, "links", {"keys": "vertex"}, symmetric=symmetric),
        ir.Shuffle("links", ("dst",), "shortest", shortest, onto="keys"),
        ir.Local(First(source), ("keys", "shortest"), "first", cut="share"),
        ir.Local(start, ("first",), "start", cut="share"),
        ir.Total("start", (), {"found": ir.count()}, "sources"),
        ir.Local(Checked(source), ("start", "sources"), "checked", cut="share"),
    )
    finish = (ir.Local(reached, ("vertices",), "result", cut="share"),)
    state = {"vertices": ir.State("first", ("vertex",)), "active": ir.State("checked", ("vertex",))}
    loop = ir.Loop("shortest paths", inputs.sources, state, (step,),
                   ir.Until((ir.Empty(table="active"), ir.MaxIterations(max_iterations))), "result",
                   prepare=prepare, finish=finish)  # fmt: skip
    return ir.Dataset.of_loop(loop, edges.comm)


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
