"""Lloyd's k-means: points stay on their rank, only k partial sums move.

    mpirun -n 64 python -m iterreduce apps/kmeans.py points.h5 --k 64 --out centroids.csv --summary run.json

Starts from k random points, or from k-means++ seeds (Arthur & Vassilvitskii, SODA 2007: each next seed is a
point drawn with probability proportional to its squared distance to the seeds so far), or from a file.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

import iterreduce as ir


def assign(points: ir.Batch, centroids: ir.Batch) -> ir.Batch:
    x = points["x"]
    return ir.Batch(cluster=ir.nearest(x, centroids["x"]), x=x, count=np.ones(len(x)))


def recentre(sums: ir.Batch, centroids: ir.Batch) -> ir.Batch:
    x = centroids["x"].copy()  # a centroid without points stays where it is
    x[sums["cluster"]] = sums["x"] / sums["count"][:, None]
    return centroids.with_columns(x=x)


def inertia(points: ir.Batch, centroids: ir.Batch) -> ir.Batch:
    """Squared distance of each point to its centroid."""
    _, distance = ir.nearest(points["x"], centroids["x"], distance=True)
    return ir.Batch(inertia=distance, points=np.ones(len(points), np.int64))


@ir.app
def kmeans(
    points: ir.Dataset,
    k: int = 8,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    seed: int = 0,
    start: Literal["random", "k-means++"] = "random",
    init: ir.Dataset | None = None,
) -> ir.Dataset:
    """Cluster POINTS into K groups.

    POINTS has a column x of vectors, or numeric columns that are taken as one. The result is the centroids,
    column x; a centroid that no point is nearest to stays where it is. --init FILE starts from the centroids
    in FILE, as many as there are; --start chooses how to find K of them otherwise. --tolerance is compared
    with the distance that the centroids moved in an iteration (root of the sum of squares); 0 runs until
    nothing moves. The summary's values are the inertia (the sum of squared distances of points to their
    centroids) and the number of points.
    """
    if k < 1:
        raise ir.UsageError(f"--k: wanted at least 1 cluster, got {k}")
    if not tolerance >= 0:
        raise ir.UsageError(f"--tolerance: wanted 0 or more, got {tolerance:g}")
    points = points.as_matrix("x").finite("x")
    if init is not None:
        centroids = init.as_matrix("x").finite("x")
    else:
        centroids = plus_plus(points, k, seed) if start == "k-means++" else points.sample(k, seed)
    return ir.MapReduce(map=assign, reduce=ir.SUM, key="cluster", rank_free=True).iterate(
        points,
        state=centroids,
        update=recentre,
        until=ir.l2("x") <= tolerance,
        max_iterations=max_iterations,
        score=inertia,
        values={"inertia": ir.sum("inertia"), "points": ir.sum("points")},
        name="kmeans",
    )


# ---------------------------------------------------------------------------- k-means++ seeds, at the waist


def nearer(near: ir.Batch, points: ir.Batch, seeds: ir.Batch) -> ir.Batch:
    """Squared distance of each point to the nearest seed so far: only the newest can be nearer."""
    away = points["x"] - seeds["x"][-1]
    return ir.Batch(d2=np.minimum(near["d2"], np.einsum("ij,ij->i", away, away)))


@dataclass(frozen=True)
class Draw:
    """One point with probability proportional to d2: the first arrival of a race of exponential clocks.

    The clock of each point is keyed by its global row number, so the winner does not depend on the ranks.
    """

    seed: int

    def run(self, context: ir.Context, points: ir.Batch, near: ir.Batch) -> ir.Batch:
        rows = np.arange(context.first_row, context.first_row + len(near), dtype=np.uint64)
        u = ir.random.uniform(self.seed, 2, context.iteration, rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            arrival = np.where(near["d2"] > 0, -np.log1p(-u) / near["d2"], np.inf)
        first = np.argmin(arrival)
        return ir.Batch(x=points["x"][first : first + 1], arrival=arrival[first : first + 1])


def add_seed(seeds: ir.Batch, drawn: ir.Batch) -> ir.Batch:
    return ir.Batch(x=np.concatenate([seeds["x"], drawn["x"]]))


def plus_plus(points: ir.Dataset, k: int, seed: int) -> ir.Dataset:
    """k-means++ seeds as a loop of k - 1 iterations."""
    first = points.sample(1, seed, at_least=k)
    if k == 1:
        return first
    inputs = ir.Inputs()
    rows, start = inputs.rows("points", points), inputs.everywhere("first", first)
    step = ir.Superstep(
        "draw a seed",
        (
            ir.Local(nearer, ("near", rows, "seeds"), "nearer"),
            ir.Local(Draw(seed), (rows, "nearer"), "candidates"),
            ir.Total("candidates", (), {"x": ir.argmin("x", by="arrival")}, "drawn"),
            ir.Local(add_seed, ("seeds", "drawn"), "more", cut="share"),
        ),
        (ir.Replace("near", "nearer"), ir.Replace("seeds", "more")),
    )
    far = ir.Local(lambda points: ir.Batch(d2=np.full(len(points), np.inf)), (rows,), "far")
    return ir.Dataset.of_loop(
        ir.Loop(
            "k-means++",
            inputs.sources,
            {"near": ir.State("far"), "seeds": ir.State(start)},
            (step,),
            ir.Until((ir.MaxIterations(k - 1),)),
            "seeds",
            prepare=(*inputs.prepare, far),
        ),
        points.comm,
    )
