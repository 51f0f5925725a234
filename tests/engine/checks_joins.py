"""Programs that look keys up: descendants in a tree by joins and a set difference, and least squares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import Insert, Local, Lookup, Loop, Patch, Replace, Shuffle, State, Superstep
from tests.engine.kit import Check, local, rows_of, started


def check_descendants(group: Group) -> None:
    """HaLoop's A11: all that descend from a node of a 3-ary tree, by a join and a set difference."""
    n, root = 400, 2
    child = np.arange(1, n)
    tree = Batch(parent=(child - 1) // 3, child=child)
    join = Superstep(
        "join",
        (
            Lookup("frontier", ("node",), "byparent", ("child",), "pairs", "drop"),
            Local(lambda p: Batch(node=p["child"], level=p["level"] + 1), ("pairs",), "nodes"),
            Shuffle("nodes", ("node",), "found here", {"level": ir.min("level")}),
        ),
        (Replace("kids", "found here"),),
    )
    dedupe = Superstep(
        "dedupe",
        (Lookup("kids", ("node",), "found", (), "new", "only"),),
        (Insert("found", "new"), Replace("frontier", "new")),
    )
    loop = Loop(
        "descendants",
        {"tree": local(tree, group), "root": Batch(node=np.array([root]), level=np.array([0]))},
        {
            "found": State("root", ("node",)),
            "frontier": State("root", ("node",)),
            "kids": State("root", ("node",)),
        },
        (join, dedupe),
        Until((ir.Empty("frontier"), MaxIterations(50))),
        "found",
        prepare=(Shuffle("tree", ("parent",), "byparent"),),
    )
    levels, edge = {root: 0}, [root]
    while edge:
        kids = [c for p in edge for c in range(3 * p + 1, 3 * p + 4) if c < n]
        levels |= {c: levels[(c - 1) // 3] + 1 for c in kids}
        edge = kids
    for options in ({}, {"naive": True}, {"check": True}):
        run = started(loop, group, **options)
        assert run.run() is ir.Outcome.EMPTY
        assert sorted(rows_of(group, run.tables["found"])) == sorted(levels.items())
        assert run.iteration == max(levels.values()) + 1


def solved(by: str, other: str) -> Callable[[Batch, Batch], Batch]:
    """Least squares for each row of the second table from the ratings beside it."""

    def solve(ratings: Batch, rows: Batch) -> Batch:
        out = rows["f"].copy()
        for i, key in enumerate(rows[by].tolist()):
            here = ratings[by] == key
            g, r = ratings[f"{other}_f"][here], ratings["r"][here]
            out[i] = np.linalg.solve(g.T @ g + 0.1 * np.eye(g.shape[1]), g.T @ r)
        return rows.with_columns(f=out)

    return solve


def check_alternating_least_squares(group: Group) -> None:
    """Two states that look each other up; factors equal those of a loop over dense arrays."""
    users, things, d = 12, 9, 3
    random = np.random.default_rng(5)
    pairs = np.array([(u, t) for u in range(users) for t in range(things) if random.random() < 0.5])
    ratings = Batch(user=pairs[:, 0], item=pairs[:, 1], r=random.random(len(pairs)))
    u0, t0 = random.random((users, d)), random.random((things, d))

    def half(by: str, other: str) -> Superstep:
        return Superstep(
            by,
            (
                Local(lambda s: Batch(**{other: s[other], f"{other}_f": s["f"]}), (f"{other}s",), "factors"),
                Shuffle("factors", (other,), "theirs"),
                Lookup(f"by {by}", (other,), "theirs", (f"{other}_f",), "beside"),
                Local(solved(by, other), ("beside", f"{by}s"), "solved", "share"),
                Local(lambda new: new, ("solved",), "lying", "share"),
                Shuffle("lying", (by,), "new"),
            ),
            (Patch(f"{by}s", "new"),),
        )

    loop = Loop(
        "als",
        {
            "ratings": local(ratings, group),
            "u": local(Batch(user=np.arange(users), f=u0), group),
            "t": local(Batch(item=np.arange(things), f=t0), group),
        },
        {"users": State("u", ("user",)), "items": State("t", ("item",))},
        (half("user", "item"), half("item", "user")),
        Until((MaxIterations(4),)),
        "users",
        prepare=(Shuffle("ratings", ("user",), "by user"), Shuffle("ratings", ("item",), "by item")),
    )
    run = started(loop, group)
    run.run()
    u, t = u0.copy(), t0.copy()
    for _ in range(4):
        for side, other, mine, theirs in ((u, t, 0, 1), (t, u, 1, 0)):
            for k in range(len(side)):
                here = pairs[:, mine] == k
                g, r = other[pairs[here, theirs]], ratings["r"][here]
                side[k] = np.linalg.solve(g.T @ g + 0.1 * np.eye(d), g.T @ r)
    got = sorted(rows_of(group, run.tables["users"]))
    assert [k for k, _ in got] == list(range(users))
    np.testing.assert_allclose(np.array([f for _, f in got]), u, rtol=1e-9)


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
