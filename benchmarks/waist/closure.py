"""Transitive closure, in nouns: semi-naive, linear or doubling.

    mpirun -n 8 python -m iterreduce benchmarks/waist/closure.py edges.npy --doubling --out pairs.csv

Only pairs that were found last are joined, with edges (linear: paths grow by one edge a round) or with all
pairs so far on both sides (doubling: paths double). Pairs lie by both of their ends together; what is joined
is brought to the end by which it is joined. Bancilhon and Ramakrishnan, SIGMOD 1986; Ioannidis, VLDB 1986.
"""

import numpy as np

import iterreduce as ir

PAIR = ("src", "dst")


def joined(rows: ir.Batch) -> ir.Batch:
    """Pairs of the outer ends."""
    return ir.Batch(src=rows["src"], dst=rows["far"])


def ahead(rows: ir.Batch) -> ir.Batch:
    """Pairs as seen from their first end."""
    return ir.Batch(mid=rows["src"], far=rows["dst"])


def behind(rows: ir.Batch) -> ir.Batch:
    """Pairs as seen from their second end."""
    return ir.Batch(src=rows["src"], mid=rows["dst"])


def both(one: ir.Batch, other: ir.Batch) -> ir.Batch:
    return ir.Batch.concat([part for part in (one, other) if len(part)] or [one])


def join(left: str, right: str, into: str) -> tuple[ir.Stage, ...]:
    """Pairs (a, b) of ``left`` and (b, c) of ``right`` -> (a, c)."""
    return (
        ir.Local(behind, (left,), f"{into} left"),
        ir.Shuffle(f"{into} left", ("mid",), f"{into} by end"),
        ir.Local(ahead, (right,), f"{into} right"),
        ir.Shuffle(f"{into} right", ("mid",), f"{into} by start"),
        ir.Lookup(f"{into} by end", ("mid",), f"{into} by start", ("far",), f"{into} rows", missing="drop"),
        ir.Local(joined, (f"{into} rows",), into),
    )


@ir.app
def closure(edges: ir.Dataset, doubling: bool = False) -> ir.Dataset:
    """The pairs (src, dst) such that a path of EDGES leads from src to dst."""
    inputs = ir.Inputs()
    rows = inputs.rows("edges", edges.as_edges())
    joins = (*join("delta", "edges of pairs", "paths"),)
    found = "paths"
    if doubling:
        joins = (*join("delta", "pairs", "on"), *join("pairs", "delta", "back"),
                 ir.Local(both, ("on", "back"), "paths", cut="share"))  # fmt: skip
    step = ir.Superstep(
        "join",
        (
            *joins,
            ir.Shuffle(found, PAIR, "heard", {"times": ir.count()}),
            ir.Lookup("heard", PAIR, "pairs", (), "unseen", missing="only"),
            ir.Local(lambda rows: rows.select(*PAIR), ("unseen",), "new", cut="share"),
        ),
        (ir.Insert("pairs", "new"), ir.Replace("delta", "new")),
    )
    prepare = (
        *inputs.prepare,
        ir.Shuffle(rows, PAIR, "counted", {"times": ir.count()}),
        ir.Local(lambda rows: rows.select(*PAIR), ("counted",), "edges of pairs", cut="share"),
    )
    state = {name: ir.State("edges of pairs", PAIR) for name in ("pairs", "delta")}
    loop = ir.Loop("closure", inputs.sources, state, (step,), ir.Until((ir.Empty(table="delta"),)), "pairs",
                   prepare=prepare)  # fmt: skip
    return ir.Dataset.of_loop(loop, edges.comm)


def verify(result: ir.Batch, edges: ir.Batch) -> int:
    """By another road: Warshall's algorithm on a matrix. How many pairs; raises `ValueError`."""
    names, at = np.unique(np.concatenate([edges["src"], edges["dst"]]), return_inverse=True)
    src, dst = np.split(at, 2)
    reach = np.zeros((len(names), len(names)), bool)
    reach[src, dst] = True
    for middle in range(len(names)):
        reach |= reach[:, middle, None] & reach[middle]
    found = np.zeros_like(reach)
    found[np.searchsorted(names, result["src"]), np.searchsorted(names, result["dst"])] = True
    if len(result) != reach.sum() or not np.array_equal(found, reach):
        raise ValueError(f"{len(result)} pairs were found, {reach.sum()} are reachable, or others")
    return len(result)
