"""Katz centrality with weights, in nouns: a value of the page times one of the edge.

    mpirun -n 8 python -m iterreduce benchmarks/waist/katz.py web.edges --alpha 0.01 --out katz.csv

    x(q) = beta + alpha * sum of weight(p, q) * x(p) over edges p -> q

Katz, "A new status index derived from sociometric analysis", Psychometrika 1953. The sum exists if alpha is
below 1 / the largest eigenvalue. Parallel edges add up.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


@dataclass(frozen=True)
class Update:
    alpha: float
    beta: float

    def run(self, context: ir.Context, pages: ir.Batch, heard: ir.Batch) -> ir.Batch:
        with np.errstate(over="ignore"):  # it is told below
            x = self.beta + self.alpha * heard["heard"]
        if not np.all(np.isfinite(x)):
            raise ir.UsageError(f"--alpha: the sum does not converge at {self.alpha:g}; choose a smaller one")
        return pages.with_columns(x=x)


def first(pages: ir.Batch) -> ir.Batch:
    return pages.with_columns(x=np.zeros(len(pages)))


@ir.app
def katz(
    edges: ir.Dataset,
    alpha: float = 0.1,
    beta: float = 1.0,
    weights: bool = True,
    tolerance: float = 1e-9,
    max_iterations: int = 1000,
) -> ir.Dataset:
    """How central the pages of EDGES (columns src, dst, weight) are, column x.

    --no-weights: every edge weighs 1. --tolerance is compared with the largest change of a page's x.
    """
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    said = ir.col("x") * ir.col("weight") if weights else ir.col("x")
    step = ir.Superstep(
        "tell",
        (
            ir.Shuffle("links", ("dst",), "heard", {"heard": ir.sum(said)}, "pages",
                       joined=ir.Joined("pages", "src")),
            ir.Local(Update(alpha, beta), ("pages", "heard"), "new", cut="share"),
        ),
        (ir.Replace("pages", "new"),),
    )  # fmt: skip
    prepare = (
        *inputs.prepare,
        ir.Index(rows, {"src": "keys", "dst": "keys"}, "links", {"keys": "page"}),
        ir.Local(first, ("keys",), "first", cut="share"),
    )
    until = ir.Until.of(ir.linf("x") <= tolerance, max_iterations).on("pages")
    state = {"pages": ir.State("first", ("page",))}
    loop = ir.Loop("katz", inputs.sources, state, (step,), until, "pages", prepare=prepare)
    return ir.Dataset.of_loop(loop, edges.comm)


def verify(
    result: ir.Batch, edges: ir.Batch, alpha: float = 0.1, beta: float = 1.0, weights: bool = True
) -> float:
    """By another road: SciPy solves the linear equations. The largest difference."""
    import scipy.sparse.linalg

    pages = ids(result["page"])
    order = np.argsort(pages)
    src, dst = (order[np.searchsorted(pages, ids(edges[end]), sorter=order)] for end in ("src", "dst"))
    weight = edges["weight"] if weights else np.ones(len(src))
    links = scipy.sparse.csc_matrix((alpha * weight, (dst, src)), (len(pages),) * 2)
    x = scipy.sparse.linalg.spsolve(
        scipy.sparse.identity(len(pages), format="csc") - links, np.full(len(pages), beta)
    )
    return float(np.abs(x - result["x"]).max())


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
