"""PageRank, in nouns: ranks travel along resident edges, summed before they are sent.

    mpirun -n 8 python -m iterreduce benchmarks/waist/pagerank.py web.edges --out ranks.csv

A surfer on page p follows one of its links with probability d, each alike, and otherwise, or where there is
none, goes to a page q with probability restart(q):

    rank(q) = (1 - d + d * lost) * restart(q) + d * sum of rank(p) / degree(p) over links p -> q
    lost    = sum of rank(p) over pages p without links

Page, Brin, Motwani, Winograd (1999). A link that stands k times counts k times, one of a page to itself too.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


@dataclass(frozen=True)
class Weights:
    """The pages to restart from, alike if the file has no weights."""

    def run(self, context: ir.Context, restart: ir.Batch) -> ir.Batch:
        weight = restart["weight"] if "weight" in restart else np.ones(len(restart))
        if not np.all(weight >= 0):
            raise ir.InputError("the weight of a page to restart from is negative or no number")
        return ir.Batch(page=restart["page"], weight=weight.astype(np.float64))


@dataclass(frozen=True)
class First:
    """Ranks to begin with: where the surfer restarts."""

    def run(self, context: ir.Context, pages: ir.Batch, degrees: ir.Batch, weight: ir.Batch, total: ir.Batch):
        if len(total) == 0 or not 0 < total["weight"][0] < np.inf:
            raise ir.InputError("there is no page to restart from: the weights must add up to more than 0")
        restart = weight["weight"] / total["weight"][0]
        return pages.with_columns(rank=restart, restart=restart, degree=degrees["degree"])


@dataclass(frozen=True)
class Update:
    damping: float

    def run(self, context: ir.Context, ranks: ir.Batch, heard: ir.Batch, lost: ir.Batch) -> ir.Batch:
        stay = 1 - self.damping + self.damping * lost["lost"][0]
        return ranks.with_columns(rank=stay * ranks["restart"] + self.damping * heard["heard"])


@ir.app
def pagerank(
    edges: ir.Dataset,
    damping: float = 0.85,
    tolerance: float = 1e-9,
    max_iterations: int = 100,
    restart: ir.Dataset | None = None,
    nodes: ir.Dataset | None = None,
) -> ir.Dataset:
    """Rank the pages that EDGES link.

    --restart FILE has the pages where the surfer starts anew, column page, and their weights, column weight,
    if they differ; without it all pages, alike. --nodes FILE has pages without any link, column page.
    --tolerance is compared with the sum of what the ranks changed by in an iteration. The result is one row
    per page: page, rank; ranks add up to 1.
    """
    if not 0 <= damping <= 1:
        raise ir.UsageError(f"--damping: wanted a probability, got {damping:g}")
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    also = {"pages": (inputs.rows("nodes", nodes), "page")} if nodes is not None else {}
    given = "pages" if restart is None else inputs.rows("restart", restart)
    rank, degree = ir.col("rank"), ir.col("degree")
    step = ir.Superstep(
        "follow a link",
        (
            ir.Total("ranks", (), {"lost": ir.sum(ir.where(degree.equals(0), rank, 0.0))}, "lost"),
            ir.Shuffle("links", ("dst",), "heard", {"heard": ir.sum(rank / degree)}, "ranks",
                       joined=ir.Joined("ranks", "src")),
            ir.Local(Update(damping), ("ranks", "heard", "lost"), "new", cut="share"),
        ),
        (ir.Replace("ranks", "new"),),
    )  # fmt: skip
    prepare = (
        *inputs.prepare,
        ir.Index(rows, {"src": "pages", "dst": "pages"}, "links", {"pages": "page"}, also),
        ir.Shuffle("links", ("src",), "degrees", {"degree": ir.count()}, onto="pages"),
        ir.Local(Weights(), (given,), "weights"),
        ir.Shuffle("weights", ("page",), "weight", {"weight": ir.sum("weight")}, onto="pages"),
        ir.Total("weight", (), {"weight": ir.sum("weight")}, "total"),
        ir.Local(First(), ("pages", "degrees", "weight", "total"), "first", cut="share"),
    )
    found = ir.Local(lambda ranks: ranks.select("page", "rank"), ("ranks",), "found", cut="share")
    loop = ir.Loop("pagerank", inputs.sources, {"ranks": ir.State("first", ("page",))}, (step,),
                   ir.Until.of(ir.l1("rank") <= tolerance, max_iterations).on("ranks"), "found",
                   prepare=prepare, finish=(found,))  # fmt: skip
    return ir.Dataset.of_loop(loop, edges.comm)


def verify(result: ir.Batch, edges: ir.Batch, damping: float = 0.85, weight: dict | None = None) -> float:
    """By another road: how much a step of a sparse matrix changes all ranks; at most the tolerance.

    ``weight``: of each page to restart from, by page; None: all alike.
    """
    import scipy.sparse

    pages, rank = ids(result["page"]), result["rank"]
    order = np.argsort(pages)
    src, dst = (order[np.searchsorted(pages, ids(edges[end]), sorter=order)] for end in ("src", "dst"))
    n = len(pages)
    links = scipy.sparse.csr_matrix((np.ones(len(src)), (dst, src)), (n, n))
    degree = np.bincount(src, minlength=n)
    restart = np.array([1.0 if weight is None else weight.get(page, 0.0) for page in pages.tolist()])
    lost = rank[degree == 0].sum()
    heard = links @ np.divide(rank, degree, out=np.zeros(n), where=degree > 0)
    new = (1 - damping + damping * lost) * restart / restart.sum() + damping * heard
    return float(np.abs(new - rank).sum())


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
