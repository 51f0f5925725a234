"""Breadth-first search, in nouns: levels and parents.

    mpirun -n 8 python -m iterreduce benchmarks/waist/bfs.py web.edges 17 --out levels.csv

The vertices that were found last tell their neighbours; those that hear of it for the first time are the next
level. With --settle a vertex tells as soon as it can, the lowest level first, and ranks meet when none of
their own vertices has anything to say. In the end one pass over the edges finds the parents: the smallest
of the neighbours that are as near to the source as any is. They travel as places in the order of ids, so text
works as numbers do.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir

FAR = ir.INT64_MAX  # the level of what was not reached


@dataclass(frozen=True)
class Number:
    """A kernel: rows beside their global number."""

    def run(self, context: ir.Context, rows: ir.Batch) -> ir.Batch:
        return rows.with_columns(number=context.first_row + np.arange(len(rows)))


def is_one(names: np.ndarray | ir.Ragged, name: str) -> np.ndarray:
    """Which ids are this one, given as text."""
    if isinstance(names, np.ndarray):
        return names == (int(name) if name.lstrip("-").isdecimal() else np.nan)
    return ~names.differs(ir.Ragged.from_list([name]).take(np.zeros(len(names), np.int64)))


@dataclass(frozen=True)
class First:
    """The source is of level 0; no other vertex has a level."""

    source: str

    def run(self, context: ir.Context, vertices: ir.Batch) -> ir.Batch:
        here = is_one(vertices["vertex"], self.source)
        return vertices.with_columns(level=np.where(here, 0, FAR))


def start(vertices: ir.Batch) -> ir.Batch:
    return vertices.take(np.flatnonzero(vertices["level"] == 0))


@dataclass(frozen=True)
class Checked:
    """The source, if any rank has it."""

    source: str

    def run(self, context: ir.Context, start: ir.Batch, sources: ir.Batch) -> ir.Batch:
        if len(sources) == 0:
            raise ir.UsageError(f"{self.source} is no vertex of the graph")
        return start


def levels(heard: ir.Batch) -> ir.Batch:
    return heard.drop("told")


def untold(heard: ir.Batch) -> ir.Batch:
    some = heard.take(np.flatnonzero(~heard["told"])) if heard["told"].any() else heard
    return some.drop("told")


def ordered(vertices: ir.Batch, numbers: ir.Batch, size: ir.Batch) -> ir.Batch:
    """Vertices beside a number for the order by level, then id: that of a neighbour is below all others' if
    it is the parent.
    """
    level, n = vertices["level"], int(size["vertices"][0])
    if n >= 3_000_000_000:  # as many levels, times as many vertices, would not be an int64
        raise ir.UsageError(f"{n} vertices: wanted fewer than 3,000,000,000")
    order = np.where(level < FAR, np.minimum(level, n) * n + numbers["number"], FAR)
    return vertices.with_columns(order=order)


def reached(vertices: ir.Batch, numbers: ir.Batch, first: ir.Batch, size: ir.Batch) -> ir.Batch:
    """Levels, and the number of the parent; the source is its own."""
    rows = np.flatnonzero(vertices["level"] < FAR)
    level, own = vertices["level"][rows], numbers["number"][rows]
    parent = first["order"][rows] % size["vertices"][0]
    return ir.Batch(
        vertex=vertices["vertex"].take(rows), level=level, number=np.where(level > 0, parent, own)
    )


@ir.app
def bfs(edges: ir.Dataset, source: str, symmetric: bool = False, settle: bool = False) -> ir.Dataset:
    """How many edges of EDGES lead to each vertex from SOURCE, and the vertex before it.

    --symmetric: edges go both ways. --settle: fewer supersteps. The result has the columns vertex, level and
    parent (the smallest id of those that are possible; of the source the source); what cannot be reached is
    left out.
    """
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    settled = "told" if settle else ""
    told = ir.Shuffle("links", ("dst",), "heard", {"level": ir.min(ir.col("level") + 1)}, "vertices",
                      touched=True, joined=ir.Joined("frontier", "src"), settle=settled,
                      improves=not settle)  # fmt: skip
    writes = (ir.Patch("vertices", "heard"), ir.Replace("frontier", "heard"))
    parts = ()
    if settle:
        parts = (ir.Local(levels, ("heard",), "new", cut="share"),
                 ir.Local(untold, ("heard",), "next", cut="share"))  # fmt: skip
        writes = (ir.Patch("vertices", "new"), ir.Replace("frontier", "next"))
    step = ir.Superstep("next level", (told, *parts), writes)
    prepare = (
        *inputs.prepare,
        ir.Index(rows, {"src": "keys", "dst": "keys"}, "links", {"keys": "vertex"}, symmetric=symmetric),
        ir.Local(First(source), ("keys",), "first", cut="share"),
        ir.Local(start, ("first",), "start", cut="share"),
        ir.Total("start", (), {"found": ir.count()}, "sources"),
        ir.Local(Checked(source), ("start", "sources"), "checked", cut="share"),
    )
    finish = (
        ir.Shuffle("keys", ("vertex",), "in order", route=ir.Splitters()),
        ir.Local(Number(), ("in order",), "numbered", cut="share"),
        ir.Shuffle("numbered", ("vertex",), "numbers", {"number": ir.min("number")}, onto="vertices"),
        ir.Total("keys", (), {"vertices": ir.count()}, "size"),
        ir.Local(ordered, ("vertices", "numbers", "size"), "ordered", cut="share"),
        ir.Shuffle("links", ("dst",), "firsts", {"order": ir.min("order")}, "vertices",
                   joined=ir.Joined("ordered", "src")),
        ir.Local(reached, ("vertices", "numbers", "firsts", "size"), "reached", cut="share"),
        ir.Local(lambda rows: rows.rename(vertex="parent"), ("numbered",), "named", cut="share"),
        ir.Shuffle("named", ("number",), "names"),
        ir.Lookup("reached", ("number",), "names", ("parent",), "found parents"),
        ir.Local(lambda rows: rows.drop("number"), ("found parents",), "result", cut="share"),
    )  # fmt: skip
    state = {"vertices": ir.State("first", ("vertex",)), "frontier": ir.State("checked", ("vertex",))}
    loop = ir.Loop(
        "breadth-first search", inputs.sources, state, (step,), ir.Until((ir.Empty(table="frontier"),)),
        "result", prepare=prepare, finish=finish,
    )  # fmt: skip
    return ir.Dataset.of_loop(loop, edges.comm)


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
