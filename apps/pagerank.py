"""PageRank: ranks travel along links that stay where they are.

    mpirun -n 8 python -m iterreduce apps/pagerank.py web.edges --out ranks.csv --summary run.json

A surfer on page p follows one of its links with probability d, each alike, and otherwise, or where there is
none, goes to a page q with probability restart(q):

    rank(q) = (1 - d + d * lost) * restart(q) + d * sum of rank(p) / degree(p) over links p -> q
    lost    = sum of rank(p) over pages p without links

Page, Brin, Motwani, Winograd (1999). A link that stands k times counts k times, one of a page to itself too.
"""

import numpy as np

import iterreduce as ir
from iterreduce import col


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
    edges = edges.as_edges()
    links = edges.join(edges.group_by("src").agg(degree=ir.count()), on="src")
    pages = edges.vertices("src", "dst", name="page")
    if nodes is not None:
        pages = pages.union(nodes.select("page")).distinct()
    if restart is None:
        pages = pages.with_columns(restart=1 / pages.count())
    else:
        given = restart if "weight" in restart.columns else restart.with_columns(weight=ir.lit(1.0))
        total = given.agg(weight=ir.sum("weight"), least=ir.min("weight"))
        types = {"page": None, "restart": float}
        fine = given.map_batches(checked, total, given.join(pages, "page", "anti"), columns=types)
        fine = fine.group_by("page").agg(restart=ir.sum("restart"))
        pages = pages.left_join(fine, "page").with_columns(restart=col("restart").fill_null(0))

    def step(ranks: ir.Dataset) -> ir.Dataset:
        along = links.join(ranks, src="page")
        heard = along.group_by(page="dst").agg(heard=ir.sum(col("rank") / col("degree")))
        lost = 1 - ir.coalesce(heard.sum("heard"), 0.0)
        rank = (1 - damping + damping * lost) * col("restart") + damping * col("heard").fill_null(0)
        return pages.left_join(heard, on="page").select("page", rank=rank)

    start = pages.select("page", rank="restart")
    return ir.iterate(step, start, until=ir.l1("rank") <= tolerance, max_iterations=max_iterations)


def checked(given: ir.Batch, total: ir.Batch, unknown: ir.Batch) -> ir.Batch:
    """Weights of pages to restart from as probabilities."""
    if len(unknown):
        raise ir.UsageError(
            f"a page to restart from is no page of the graph, such as {ids(unknown['page'])[0]}"
        )
    if not total["least"][0] >= 0:
        raise ir.InputError("the weight of a page to restart from is negative or no number")
    if not 0 < total["weight"][0] < np.inf:
        raise ir.InputError("there is no page to restart from: the weights must add up to more than 0")
    return ir.Batch(page=given["page"], restart=given["weight"] / total["weight"][0])


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
    heard = links @ (rank / np.maximum(degree, 1))
    new = (1 - damping + damping * rank[degree == 0].sum()) * restart / restart.sum() + damping * heard
    return float(np.abs(new - rank).sum())


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
