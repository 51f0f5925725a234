"""Descendants of some nodes, in nouns: HaLoop's loop of two supersteps.

    mpirun -n 8 python -m iterreduce benchmarks/waist/descendants.py edges.npy roots.csv --out found.csv

The children of those that were found last are joined, and those that are new are kept. Edges lie by their
first node, once and for all; what is found lies by node, so that only children travel. After Bu, Howe,
Balazinska and Ernst, "HaLoop", VLDB 2010 (there: descendant query).
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


@dataclass(frozen=True)
class Generation:
    """A kernel: rows beside the iteration in which they were found."""

    def run(self, context: ir.Context, heard: ir.Batch) -> ir.Batch:
        return ir.Batch(node=heard["node"], generation=np.full(len(heard), context.iteration))


def roots_of(roots: ir.Batch) -> ir.Batch:
    return ir.Batch(node=roots["node"])


@ir.app
def descendants(edges: ir.Dataset, roots: ir.Dataset) -> ir.Dataset:
    """The nodes that can be reached over EDGES from ROOTS (column node), with the number of steps.

    The result has the columns node and generation; roots are of generation 0.
    """
    inputs = ir.Inputs()
    rows, start = inputs.rows("edges", edges.as_edges()), inputs.rows("roots", roots)
    join = ir.Superstep(
        "join",
        (
            ir.Lookup("frontier", ("node",), "children", ("dst",), "parents", missing="drop"),
            ir.Local(lambda rows: ir.Batch(node=rows["dst"]), ("parents",), "joined"),
            ir.Shuffle("joined", ("node",), "heard", {"times": ir.count()}),
        ),
        (ir.Replace("kids", "heard"),),
    )
    dedupe = ir.Superstep(
        "dedupe",
        (
            ir.Lookup("kids", ("node",), "found", (), "unseen", missing="only"),
            ir.Local(Generation(), ("unseen",), "new", cut="share"),
        ),
        (ir.Insert("found", "new"), ir.Replace("frontier", "new")),
    )
    prepare = (
        *inputs.prepare,
        ir.Shuffle(rows, ("src",), "children"),
        ir.Local(roots_of, (start,), "named"),
        ir.Shuffle("named", ("node",), "distinct", {"times": ir.count()}),
        ir.Local(Generation(), ("distinct",), "first", cut="share"),
    )
    state = {"frontier": ir.State("first", ("node",)), "found": ir.State("first", ("node",)),
             "kids": ir.State("distinct", ("node",))}  # fmt: skip
    loop = ir.Loop("descendants", inputs.sources, state, (join, dedupe),
                   ir.Until((ir.Empty(table="frontier"),)), "found", prepare=prepare)  # fmt: skip
    return ir.Dataset.of_loop(loop, edges.comm)


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
