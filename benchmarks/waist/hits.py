"""Hubs and authorities, in nouns: two columns of one state, pushed along edges and pulled back.

    mpirun -n 8 python -m iterreduce benchmarks/waist/hits.py web.edges --out hits.csv

The authority of a page is the sum of the hubs that link to it, and a hub the sum of the authorities that it
links to; both are scaled to a sum of 1. Kleinberg, "Authoritative sources in a hyperlinked environment",
JACM 1999. A link that stands k times counts k times.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


@dataclass(frozen=True)
class Scaled:
    """The pages with a column of a new value, divided by its sum over all pages."""

    column: str

    def run(self, context: ir.Context, pages: ir.Batch, heard: ir.Batch, total: ir.Batch) -> ir.Batch:
        value = heard[self.column]
        return pages.with_columns(**{self.column: value / (total["sum"][0] or 1.0)})


def turn(column: str, other: str, key: str, on: str) -> ir.Superstep:
    """``column`` becomes the sum of ``other`` over edges, by ``key``."""
    return ir.Superstep(
        column,
        (
            ir.Shuffle(
                "links", (key,), "heard", {column: ir.sum(other)}, "pages", joined=ir.Joined("pages", on)
            ),
            ir.Total("heard", (), {"sum": ir.sum(column)}, "total"),
            ir.Local(Scaled(column), ("pages", "heard", "total"), "new", cut="share"),
        ),
        (ir.Replace("pages", "new"),),
    )


def first(pages: ir.Batch, total: ir.Batch) -> ir.Batch:
    start = np.full(len(pages), 1 / max(total["pages"][0], 1) if len(total) else 1.0)
    return pages.with_columns(hub=start, authority=start)


@ir.app
def hits(edges: ir.Dataset, tolerance: float = 1e-9, max_iterations: int = 1000) -> ir.Dataset:
    """Find the hubs and authorities among the pages that EDGES link.

    --tolerance is compared with the sum of what both columns changed by. The result has the columns page,
    hub and authority; each adds up to 1.
    """
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    prepare = (
        *inputs.prepare,
        ir.Index(rows, {"src": "keys", "dst": "keys"}, "links", {"keys": "page"}),
        ir.Total("keys", (), {"pages": ir.count()}, "size"),
        ir.Local(first, ("keys", "size"), "first", cut="share"),
    )
    body = (turn("authority", "hub", "dst", "src"), turn("hub", "authority", "src", "dst"))
    until = ir.Until.of(ir.l1("hub", "authority") <= tolerance, max_iterations).on("pages")
    state = {"pages": ir.State("first", ("page",))}
    return ir.Dataset.of_loop(
        ir.Loop("hits", inputs.sources, state, body, until, "pages", prepare=prepare), edges.comm
    )


def verify(result: ir.Batch, edges: ir.Batch) -> float:
    """By another road: the singular vectors of the largest singular value, of SciPy. The largest difference;
    where that value is not alone, any of its vectors are right, and this comparison is not.
    """
    import scipy.sparse.linalg

    pages = ids(result["page"])
    order = np.argsort(pages)
    src, dst = (order[np.searchsorted(pages, ids(edges[end]), sorter=order)] for end in ("src", "dst"))
    links = scipy.sparse.csr_matrix((np.ones(len(src)), (src, dst)), (len(pages),) * 2)
    hub, _, authority = scipy.sparse.linalg.svds(links, k=1, tol=1e-14)
    wanted = np.stack([np.abs(hub[:, 0]) / np.abs(hub).sum(), np.abs(authority[0]) / np.abs(authority).sum()])
    return float(np.abs(wanted - [result["hub"], result["authority"]]).max())


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
