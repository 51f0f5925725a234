"""Breadth-first search, in nouns: levels and parents.

    mpirun -n 8 python -m iterreduce benchmarks/waist/bfs.py web.edges 17 --out levels.csv

The vertices that were found last tell their neighbours; those that hear of it for the first time are the next
level, and their parent is the smallest of those they heard. Parents travel as places in the order of ids, so
text works as numbers do.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


@dataclass(frozen=True)
class Number:
    """A kernel: rows beside their global number."""

    def run(self, context: ir.Context, rows: ir.Batch) -> ir.Batch:
        return rows.with_columns(number=context.first_row + np.arange(len(rows)))


@dataclass(frozen=True)
class Found:
    """A kernel: of the vertices that heard something those without a level, which is this iteration."""

    def run(self, context: ir.Context, heard: ir.Batch, vertices: ir.Batch) -> ir.Batch:
        new = np.flatnonzero(vertices["level"] < 0)
        level = np.full(len(new), context.iteration)
        return heard.take(new).with_columns(number=vertices["number"][new], level=level)


def is_one(names: np.ndarray | ir.Ragged, name: str) -> np.ndarray:
    """Which ids are this one, given as text."""
    if isinstance(names, np.ndarray):
        return names == (int(name) if name.lstrip("-").isdecimal() else np.nan)
    return ~names.differs(ir.Ragged.from_list([name]).take(np.zeros(len(names), np.int64)))


@dataclass(frozen=True)
class First:
    """The source is of level 0 and its own parent; no other vertex has either."""

    source: str

    def run(self, context: ir.Context, numbers: ir.Batch) -> ir.Batch:
        here = is_one(numbers["vertex"], self.source)
        return numbers.with_columns(parent=np.where(here, numbers["number"], -1), level=np.where(here, 0, -1))


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


def reached(vertices: ir.Batch) -> ir.Batch:
    rows = vertices.take(np.flatnonzero(vertices["level"] >= 0))
    return ir.Batch(vertex=rows["vertex"], level=rows["level"], number=rows["parent"])


@ir.app
def bfs(edges: ir.Dataset, source: str, symmetric: bool = False) -> ir.Dataset:
    """How many edges of EDGES lead to each vertex from SOURCE, and the vertex before it.

    --symmetric: edges go both ways. The result has the columns vertex, level and parent (the smallest id of
    those that are possible; of the source the source); what cannot be reached is left out.
    """
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    step = ir.Superstep(
        "next level",
        (
            ir.Shuffle("links", ("dst",), "heard", {"parent": ir.min("number")}, "vertices",
                       touched=True, joined=ir.Joined("frontier", "src")),
            ir.Local(Found(), ("heard", "vertices"), "new", cut="share"),
        ),
        (ir.Patch("vertices", "new"), ir.Replace("frontier", "new")),
    )  # fmt: skip
    prepare = (
        *inputs.prepare,
        ir.Index(rows, {"src": "keys", "dst": "keys"}, "links", {"keys": "vertex"}, symmetric=symmetric),
        ir.Shuffle("keys", ("vertex",), "in order", route=ir.Splitters()),
        ir.Local(Number(), ("in order",), "numbered", cut="share"),
        ir.Shuffle("numbered", ("vertex",), "numbers", {"number": ir.min("number")}, onto="keys"),
        ir.Local(First(source), ("numbers",), "first", cut="share"),
        ir.Local(start, ("first",), "start", cut="share"),
        ir.Total("start", (), {"found": ir.count()}, "sources"),
        ir.Local(Checked(source), ("start", "sources"), "checked", cut="share"),
    )
    finish = (
        ir.Local(reached, ("vertices",), "reached", cut="share"),
        ir.Local(lambda rows: rows.rename(vertex="parent"), ("numbered",), "named", cut="share"),
        ir.Shuffle("named", ("number",), "names"),
        ir.Lookup("reached", ("number",), "names", ("parent",), "found parents"),
        ir.Local(lambda rows: rows.drop("number"), ("found parents",), "result", cut="share"),
    )
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
