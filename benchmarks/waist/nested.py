"""k-means for several numbers of clusters, in nouns: a loop inside a loop, the best clustering is kept.

    mpirun -n 8 python -m iterreduce benchmarks/waist/nested.py points.h5 --most 12 --out centres.csv

For k = 2, 3, ... the inner loop is Lloyd's, from the first k of some drawn points; what it ends with is
scored by the index of Calinski and Harabasz (Communications in Statistics, 1974), the variance between
clusters over that within, each by its degrees of freedom. Points are read and laid out once in the run.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


def assign(points: ir.Batch, centres: ir.Batch) -> ir.Batch:
    x = points["x"]
    return ir.Batch(cluster=ir.nearest(x, centres["x"]), x=x, count=np.ones(len(x)))


def recentre(sums: ir.Batch, centres: ir.Batch) -> ir.Batch:
    x = centres["x"].copy()  # one without points stays where it is
    x[sums["cluster"]] = sums["x"] / sums["count"][:, None]
    return ir.Batch(x=x)


@dataclass(frozen=True)
class Seeds:
    """A kernel: the first k drawn points, one more in each iteration."""

    least: int

    def run(self, context: ir.Context, drawn: ir.Batch) -> ir.Batch:
        return drawn.slice(0, self.least - 1 + context.iteration)


def squares(points: ir.Batch, centres: ir.Batch) -> ir.Batch:
    """What each point adds to the squared distances to its centre, and to the points' moments."""
    x = points["x"]
    _, within = ir.nearest(x, centres["x"], distance=True)
    return ir.Batch(within=within, x=x, square=np.einsum("ij,ij->i", x, x), points=np.ones(len(x)))


def better(total: ir.Batch, centres: ir.Batch, best: ir.Batch) -> ir.Batch:
    """These centres if they score higher than the best ones so far; the score stands beside each centre."""
    (within,), (n,), k = total["within"], total["points"], len(centres)
    between = total["square"][0] - total["x"][0] @ total["x"][0] / n - within
    score = (between / (k - 1)) / (within / (n - k)) if within > 0 < n - k else np.inf
    if score <= best["score"][0]:
        return best
    return ir.Batch(x=centres["x"], score=np.full(k, score))


@ir.app
def nested(
    points: ir.Dataset, least: int = 2, most: int = 8, tolerance: float = 1e-6, seed: int = 0
) -> ir.Dataset:
    """The best grouping of POINTS into LEAST to MOST clusters: its centres, column x, and its score."""
    if not 2 <= least <= most:
        raise ir.UsageError(f"--least, --most: wanted 2 <= least <= most, got {least} and {most}")
    points = points.as_matrix("x").finite("x")
    inputs = ir.Inputs()
    rows, drawn = inputs.rows("points", points), inputs.rows("drawn", points.sample(most, seed))
    lloyd = ir.Superstep(
        "lloyd",
        (
            ir.Local(assign, (rows, "centres"), "assigned"),
            ir.Total("assigned", ("cluster",), ir.SUM, "sums"),
            ir.Local(recentre, ("sums", "centres"), "moved", cut="share"),
        ),
        (ir.Replace("centres", "moved"),),
    )
    kmeans = ir.Loop(
        "kmeans", {}, {"centres": ir.State("seeds")}, (lloyd,),
        ir.Until.of(ir.l2("x") <= tolerance, 100).on("centres"), "centres", outer=(rows, "seeds"),
    )  # fmt: skip
    choose = ir.Superstep(
        "choose k",
        (ir.Local(Seeds(least), (drawn,), "chosen", cut="share"),),
        (ir.Replace("seeds", "chosen"),),
    )
    keep = ir.Superstep(
        "keep the better",
        (
            ir.Local(squares, (rows, "kmeans"), "squares"),
            ir.Total("squares", (), ir.SUM, "total"),
            ir.Local(better, ("total", "kmeans", "best"), "kept", cut="share"),
        ),
        (ir.Replace("best", "kept"),),
    )
    nothing = ir.Local(
        lambda drawn: drawn.with_columns(score=np.full(len(drawn), -np.inf)), (drawn,), "nothing", cut="share"
    )
    state = {"best": ir.State("nothing"), "seeds": ir.State(drawn)}
    loop = ir.Loop("several k", inputs.sources, state, (choose, kmeans, keep),
                   ir.Until((ir.MaxIterations(most - least + 1),)), "best",
                   prepare=(*inputs.prepare, nothing))  # fmt: skip
    return ir.Dataset.of_loop(loop, points.comm)


def verify(result: ir.Batch, x: np.ndarray, drawn: np.ndarray, least: int = 2) -> int:
    """By another road: Lloyd's with NumPy from the same points, and scikit-learn's words for the score. How
    many clusters are best; raises `ValueError` where other ones were found.
    """
    best, found = -np.inf, drawn
    for k in range(least, len(drawn) + 1):
        centres, moved = drawn[:k], np.inf
        while moved > 1e-6:
            label = ((x[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
            new = np.array(
                [x[label == j].mean(axis=0) if (label == j).any() else centres[j] for j in range(k)]
            )
            centres, moved = new, np.sqrt(((new - centres) ** 2).sum())
        within = ((x[:, None] - centres) ** 2).sum(axis=2).min(axis=1).sum()
        between = ((x - x.mean(axis=0)) ** 2).sum() - within
        score = (between / (k - 1)) / (within / (len(x) - k))
        if score > best:
            best, found = score, centres
    if found.shape != result["x"].shape or not np.allclose(found, result["x"], atol=1e-9):
        raise ValueError(f"{len(found)} clusters are best, {len(result)} were found, or they are elsewhere")
    return len(found)
