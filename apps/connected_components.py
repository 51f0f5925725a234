"""Connected components: every vertex takes the smallest label it hears of.

    mpirun -n 8 python -m iterreduce apps/connected_components.py web.edges --out components.csv

Labels are the places of vertices in the order of their ids, so text works as numbers do. A vertex speaks only
when its label has changed: an iteration costs as much as the edges of those that did.
"""

import numpy as np

import iterreduce as ir


@ir.app
def connected_components(
    edges: ir.Dataset, nodes: ir.Dataset | None = None, max_iterations: int | None = None
) -> ir.Dataset:
    """Name for each vertex of EDGES the smallest id that it is connected with, whatever the directions.

    --nodes FILE has vertices without edges, column vertex. The result has the columns vertex and component.
    """
    edges = edges.as_edges().select("src", "dst")
    links = edges.union(edges.select(src="dst", dst="src"))
    vertices = edges.vertices()
    if nodes is not None:
        vertices = vertices.union(nodes.select("vertex")).distinct()
    names = vertices.sort("vertex").with_row_number("label")

    def step(changed: ir.Dataset) -> ir.Dataset:
        return links.join(changed, src="vertex").group_by(vertex="dst").agg(label=ir.min("label"))

    labels = vertices.join(names, "vertex")
    merge = {"label": ir.MIN}
    found = ir.iterate_changes(step, labels, merge=merge, key="vertex", max_iterations=max_iterations)
    return found.join(names.select("label", component="vertex"), "label").select("vertex", "component")


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
