"""Alternating least squares, in nouns: two states take turns, each looks up the other.

    mpirun -n 8 python -m iterreduce benchmarks/waist/als.py ratings.csv --rank 8 --out users.h5

A rating of user u for item i is near f(u) . f(i). With the items' factors held fixed the best factors of a
user solve d equations, and the other way round:

    (sum of f(i) f(i)^T over what u rated + penalty * ratings of u * I) f(u) = sum of rating * f(i)

Zhou, Wilkinson, Schreiber, Pan, "Large-scale parallel collaborative filtering for the Netflix prize", AAIM
2008. Ratings lie by user and, once more, by item, so that only factors travel: each to the ranks that need
it, once per turn, along a plan.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


@dataclass(frozen=True)
class Products:
    """A kernel: what a rating adds to the equations of its ``key``."""

    key: str

    def run(self, context: ir.Context, seen: ir.Batch) -> ir.Batch:
        f = seen["f"]
        outer = (f[:, :, None] * f[:, None, :]).reshape(len(f), f.shape[1] ** 2)
        return ir.Batch(**{self.key: seen[self.key]}, a=outer, b=f * seen["weight"][:, None])


@dataclass(frozen=True)
class Solve:
    """A kernel: the new factors."""

    penalty: float

    def run(self, context: ir.Context, rows: ir.Batch, sums: ir.Batch) -> ir.Batch:
        n, d = sums["b"].shape
        ridge = self.penalty * sums["n"][:, None, None] * np.eye(d)
        return rows.with_columns(
            f=np.linalg.solve(sums["a"].reshape(n, d, d) + ridge, sums["b"][..., None])[..., 0]
        )


@dataclass(frozen=True)
class First:
    """A kernel: the factors to begin with depend on the place of a key among all, and nothing else."""

    rank: int
    seed: int

    def run(self, context: ir.Context, rows: ir.Batch) -> ir.Batch:
        at = (context.first_row + np.arange(len(rows)))[:, None] * self.rank + np.arange(self.rank)
        return rows.with_columns(f=ir.random.uniform(self.seed, "factors", 0, at.ravel()).reshape(at.shape))


def turn(key: str, other: str, penalty: float) -> ir.Superstep:
    """New factors of the ``key`` from those of the ``other``."""
    sums = {"a": ir.sum("a"), "b": ir.sum("b"), "n": ir.count()}
    return ir.Superstep(
        key,
        (
            ir.Lookup(f"by {key}", (other,), f"{other} factors", ("f",), "seen"),
            ir.Local(Products(key), ("seen",), "products"),
            ir.Shuffle("products", (key,), "sums", sums, onto=f"{key} factors"),
            ir.Local(Solve(penalty), (f"{key} factors", "sums"), "new", cut="share"),
        ),
        (ir.Replace(f"{key} factors", "new"),),
    )


@ir.app
def als(
    ratings: ir.Dataset,
    rank: int = 8,
    penalty: float = 0.1,
    iterations: int = 10,
    seed: int = 0,
    result: str = "src",
) -> ir.Dataset:
    """Factors of the users (src) and items (dst) of RATINGS (weight).

    --rank RANK numbers per user and item; --penalty PENALTY times the number of ratings holds them small.
    The result has the columns src and f, or with --result dst those of the items.
    """
    inputs = ir.Inputs()
    rows = inputs.rows("ratings", ratings.as_edges())
    prepare = list(inputs.prepare)
    for key in ("src", "dst"):
        prepare += [
            ir.Shuffle(rows, (key,), f"by {key}"),
            ir.Shuffle(rows, (key,), f"{key} keys", {"n": ir.count()}),
            ir.Local(lambda keys, key=key: keys.select(key), (f"{key} keys",), f"{key} names", cut="share"),
            ir.Shuffle(f"{key} names", (key,), f"{key} in order", route=ir.Splitters()),
            ir.Local(First(rank, seed), (f"{key} in order",), f"{key} first", cut="share"),
        ]
    state = {f"{key} factors": ir.State(f"{key} first", (key,)) for key in ("src", "dst")}
    body = (turn("src", "dst", penalty), turn("dst", "src", penalty))
    until = ir.Until((ir.MaxIterations(iterations),))
    loop = ir.Loop("als", inputs.sources, state, body, until, f"{result} factors", prepare=tuple(prepare))
    return ir.Dataset.of_loop(loop, ratings.comm)


def verify(
    result: ir.Batch,
    edges: ir.Batch,
    rank: int = 8,
    penalty: float = 0.1,
    iterations: int = 10,
    seed: int = 0,
) -> float:
    """By another road: one user after the other, with NumPy alone. The largest difference of a factor."""
    users, user = np.unique(ids(edges["src"]), return_inverse=True)
    items, item = np.unique(ids(edges["dst"]), return_inverse=True)
    size = len(items) * rank
    f = {"user": np.zeros((len(users), rank)),
         "item": ir.random.uniform(seed, "factors", 0, np.arange(size)).reshape(-1, rank)}  # fmt: skip
    for _ in range(iterations):
        for mine, other, at, to in (("user", "item", user, item), ("item", "user", item, user)):
            for row in range(len(f[mine])):
                seen = f[other][to[at == row]]
                left = seen.T @ seen + penalty * len(seen) * np.eye(rank)
                f[mine][row] = np.linalg.solve(left, seen.T @ edges["weight"][at == row])
    return float(np.abs(f["user"][np.searchsorted(users, ids(result["src"]))] - result["f"]).max())


def ids(column: np.ndarray | ir.Ragged) -> np.ndarray:
    """Numbers as they are, text as NumPy's."""
    return column if isinstance(column, np.ndarray) else np.array(column.to_list())
