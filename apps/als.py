"""Alternating least squares: users and items take turns, each is solved for while the other is held fixed.

    mpirun -n 8 python -m iterreduce apps/als.py ratings.csv --rank 8 --out users.h5

A rating of user u for item i is near f(u) . f(i). With the items' factors held fixed the best factors of a
user solve d equations, and the other way round:

    (sum of f(i) f(i)^T over what u rated + penalty * ratings of u * I) f(u) = sum of rating * f(i)

Zhou, Wilkinson, Schreiber, Pan, "Large-scale parallel collaborative filtering for the Netflix prize", AAIM
2008. Ratings lie by user and, once more, by item, so that only factors travel: each to the ranks that need
it, once per turn.
"""

import numpy as np

import iterreduce as ir


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
    ratings = ratings.as_edges()
    by = {key: ratings.repartition(key) for key in ("src", "dst")}

    def first(rows: ir.Batch) -> ir.Batch:
        return ir.Batch(f=start(rows["place"], rank, seed))

    def products(seen: ir.Batch) -> ir.Batch:
        f = seen["f"]
        outer = (f[:, :, None] * f[:, None, :]).reshape(len(f), rank * rank)
        return ir.Batch(a=outer, b=f * seen["weight"][:, None])

    def solve(sums: ir.Batch) -> ir.Batch:
        n, d = sums["b"].shape
        left = sums["a"].reshape(n, d, d) + penalty * sums["n"][:, None, None] * np.eye(d)
        return ir.Batch(f=np.linalg.solve(left, sums["b"][..., None])[..., 0])

    def turn(key: str, rows: ir.Dataset, other: str, factors: ir.Dataset) -> ir.Dataset:
        seen = by[key].join(factors, other)
        added = seen.map_batches(products, keeps=key, columns={"a": None, "b": None}, pure=True)
        sums = added.group_by(key).agg(a=ir.sum("a"), b=ir.sum("b"), n=ir.count())
        mine = rows.select(key).left_join(sums, key)
        return mine.map_batches(solve, keeps=key, columns={"f": None}, pure=True)

    def step(src: ir.Dataset, dst: ir.Dataset) -> dict[str, ir.Dataset]:
        users = turn("src", src, "dst", dst)
        return {"src": users, "dst": turn("dst", dst, "src", users)}

    state = {}
    for key in ("src", "dst"):
        rows = ratings.distinct(key).sort(key).with_row_number("place")
        state[key] = rows.map_batches(first, keeps=key, columns={"f": None}, pure=True)
    return ir.iterate(step, state, max_iterations=iterations, key={"src": "src", "dst": "dst"})[result]


def start(place: np.ndarray, rank: int, seed: int) -> np.ndarray:
    """Factors to begin with depend on the place of a key among all, and nothing else."""
    at = place[:, None] * rank + np.arange(rank)
    return ir.random.uniform(seed, "factors", 0, at.ravel()).reshape(at.shape)


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
    f = {"user": np.zeros((len(users), rank)),
         "item": start(np.arange(len(items)), rank, seed)}  # fmt: skip
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
