"""Connected components, in nouns: every vertex takes the smallest label it hears of.

    mpirun -n 8 python -m iterreduce benchmarks/waist/components.py web.edges --out components.csv

Labels are the places of vertices in the order of their ids, so text works as numbers do. A vertex speaks only
when its label has changed: a superstep costs as much as the edges of those that did. With --settle it speaks
as soon as it can, and ranks meet when none of their own vertices has anything to say.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


@dataclass(frozen=True)
class Number:
    """A kernel: rows beside their global number."""

    def run(self, context: ir.Context, rows: ir.Batch) -> ir.Batch:
        return rows.with_columns(label=context.first_row + np.arange(len(rows)))


def first(vertices: ir.Batch, labels: ir.Batch) -> ir.Batch:
    return vertices.with_columns(label=labels["label"])


def improved(heard: ir.Batch, vertices: ir.Batch) -> ir.Batch:
    return heard.take(np.flatnonzero(heard["label"] < vertices["label"]))


def labels(heard: ir.Batch) -> ir.Batch:
    return heard.drop("told")


def untold(heard: ir.Batch) -> ir.Batch:
    some = heard.take(np.flatnonzero(~heard["told"])) if heard["told"].any() else heard
    return some.drop("told")


def renamed(names: ir.Batch) -> ir.Batch:
    return names.rename(vertex="component")


@ir.app
def components(
    edges: ir.Dataset,
    nodes: ir.Dataset | None = None,
    max_iterations: int = 1_000_000,
    settle: bool = False,
) -> ir.Dataset:
    """Name for each vertex of EDGES the smallest id that it is connected with, whatever the directions.

    --nodes FILE has vertices without edges, column vertex. --settle: fewer supersteps. The result has the
    columns vertex and component.
    """
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    also = {"keys": (inputs.rows("nodes", nodes), "vertex")} if nodes is not None else {}
    settled = "told" if settle else ""
    told = ir.Shuffle("links", ("dst",), "heard", {"label": ir.min("label")}, "vertices", touched=True,
                      joined=ir.Joined("active", "src"), settle=settled)  # fmt: skip
    better = (ir.Local(improved, ("heard", "vertices"), "better", cut="share"),)
    if settle:
        better = (ir.Local(labels, ("heard",), "better", cut="share"),
                  ir.Local(untold, ("heard",), "next", cut="share"))  # fmt: skip
    writes = (ir.Patch("vertices", "better"), ir.Replace("active", "next" if settle else "better"))
    step = ir.Superstep("tell labels", (told, *better), writes)
    prepare = (
        *inputs.prepare,
        ir.Index(rows, {"src": "keys", "dst": "keys"}, "links", {"keys": "vertex"}, also, symmetric=True),
        ir.Shuffle("keys", ("vertex",), "in order", route=ir.Splitters()),
        ir.Local(Number(), ("in order",), "numbered", cut="share"),
        ir.Shuffle("numbered", ("vertex",), "labels", {"label": ir.min("label")}, onto="keys"),
        ir.Local(first, ("keys", "labels"), "first", cut="share"),
    )
    finish = (
        ir.Local(renamed, ("numbered",), "named", cut="share"),
        ir.Shuffle("named", ("label",), "names"),
        ir.Lookup("vertices", ("label",), "names", ("component",), "found"),
        ir.Local(lambda found: found.drop("label"), ("found",), "result", cut="share"),
    )
    state = {name: ir.State("first", ("vertex",)) for name in ("vertices", "active")}
    loop = ir.Loop("components", inputs.sources, state, (step,),
                   ir.Until((ir.Empty(table="active"), ir.MaxIterations(max_iterations))), "result",
                   prepare=prepare, finish=finish)  # fmt: skip
    return ir.Dataset.of_loop(loop, edges.comm)


def verify(result: ir.Batch, edges: ir.Batch) -> int:
    """By another road: SciPy's components, and the smallest vertex of each. How many there are; raises
    `ValueError` where they differ.
    """
    import scipy.sparse

    vertices, component = ids(result["vertex"]), ids(result["component"])
    order = np.argsort(vertices)
    vertices, component = vertices[order], component[order]
    src, dst = (np.searchsorted(vertices, ids(edges[end])) for end in ("src", "dst"))
    graph = scipy.sparse.coo_matrix((np.ones(len(src), np.int8), (src, dst)), (len(vertices),) * 2)
    count, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    _, smallest = np.unique(label, return_index=True)  # vertices are in order
    if not np.array_equal(component, vertices[smallest[label]]):
        wrong = np.flatnonzero(component != vertices[smallest[label]])[0]
        raise ValueError(f"vertex {vertices[wrong]} is not in the component {component[wrong]}")
    return int(count)


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
