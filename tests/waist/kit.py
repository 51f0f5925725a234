"""What the tests of programs at the waist share: graphs of all kinds, and running a program on them.

A graph is a `Batch` of edges, the same on every rank; each rank is given its share of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.collectives import Group
from iterreduce.testing import run_ranks
from tests.engine.kit import share
from tests.launch import ROOT

FOLDER = ROOT / "benchmarks" / "waist"


@cache
def program(name: str) -> Any:
    """The function marked `@ir.app` in a file of ``benchmarks/waist``."""
    return load_app(str(FOLDER / f"{name}.py")).function


def verify(name: str, *args: Any, **options: Any) -> Any:
    """What the program's own verifier says."""
    return program(name).__globals__["verify"](*args, **options)


def dealt(value: Any, group: Group) -> Any:
    """A batch as a dataset of which every rank has its share; anything else as it is."""
    if not isinstance(value, ir.Batch):
        return value
    return ir.Dataset.from_local(None, **dict(share(value, group)._columns))


def solved(name: str, ranks: int, *args: Any, **options: Any) -> tuple[Any, ir.Batch]:
    """The result of rank 0, and the rows of all ranks."""

    def job(group: Group) -> Any:
        given = [dealt(value, group) for value in args]
        return program(name)(*given, **{k: dealt(v, group) for k, v in options.items()}).run(group)

    results = run_ranks(ranks, job)
    return results[0], ir.Batch.concat([r.batch for r in results])


def by(rows: ir.Batch, key: str, value: str) -> dict[Any, Any]:
    """One column by another."""
    ids = rows[key]
    names = ids.tolist() if isinstance(ids, np.ndarray) else ids.to_list()
    values = rows[value]
    return dict(
        zip(names, values.tolist() if isinstance(values, np.ndarray) else values.to_list(), strict=True)
    )


# ---------------------------------------------------------------------- graphs


def graph(src: Any, dst: Any, **columns: Any) -> ir.Batch:
    """Edges of these ends."""
    return ir.Batch(src=np.asarray(src, np.int64), dst=np.asarray(dst, np.int64), **columns)


def tree(n: int, k: int = 2) -> ir.Batch:
    """Vertex 0 is the root; the parent of i is (i - 1) // k."""
    return graph((np.arange(1, n) - 1) // k, np.arange(1, n))


def ring(n: int) -> ir.Batch:
    return graph(np.arange(n), (np.arange(n) + 1) % n)


def path(n: int) -> ir.Batch:
    return graph(np.arange(n - 1), np.arange(1, n))


def star(n: int) -> ir.Batch:
    """Hub 0 and n - 1 leaves, linked both ways."""
    leaves, hub = np.arange(1, n), np.zeros(n - 1, np.int64)
    return graph(np.append(hub, leaves), np.append(leaves, hub))


def complete(n: int, first: int = 0) -> ir.Batch:
    src, dst = np.divmod(np.arange(n * n), n)
    return graph(first + src[src != dst], first + dst[src != dst])


def grid(width: int, height: int) -> ir.Batch:
    """Vertex x + width * y is joined with its right and its upper neighbour."""
    at = np.arange(width * height)
    right, up = at[at % width < width - 1], at[: width * (height - 1)]
    return graph(np.append(right, up), np.append(right + 1, up + width))


def together(*graphs: ir.Batch) -> ir.Batch:
    return ir.Batch.concat(list(graphs))


def random_graph(vertices: int, edges: int, seed: int = 0) -> ir.Batch:
    """With self loops, repeated edges, vertices that no edge leaves or enters; weights 0 to 9."""
    rng = np.random.default_rng(seed)
    src, dst = rng.integers(0, vertices, edges), rng.integers(vertices // 8, vertices + vertices // 8, edges)
    few = edges // 20
    dst[:few] = src[:few]
    src[-few:], dst[-few:] = src[few : 2 * few], dst[few : 2 * few]
    return graph(src, dst, weight=rng.integers(0, 10, edges))


def rmat(scale: int, factor: int = 16, seed: int = 1) -> ir.Batch:
    """Chakrabarti, Zhan, Faloutsos (2004), with the constants of Graph500 and permuted labels."""
    rng = np.random.default_rng(seed)
    m = factor << scale
    src, dst = np.zeros(m, np.int64), np.zeros(m, np.int64)
    for _ in range(scale):
        quarter = np.searchsorted([0.57, 0.76, 0.95], rng.random(m), side="right")
        src, dst = 2 * src + (quarter >> 1), 2 * dst + (quarter & 1)
    names = rng.permutation(1 << scale)
    return graph(names[src], names[dst], weight=rng.integers(1, 256, m))


def named(edges: ir.Batch, name: Callable[[np.ndarray], Any]) -> ir.Batch:
    """The same edges between vertices of other names."""
    return edges.with_columns(src=name(edges["src"]), dst=name(edges["dst"]))


NAMES: dict[str, Callable[[np.ndarray], Any]] = {
    "small numbers": lambda k: k,
    "negative and 64-bit numbers": lambda k: (k - 40) * (2**62 // 100),
    "text": lambda k: [f"page/{i}" for i in k],
}


def id_of(vertex: int, kind: str) -> Any:
    """What a vertex is called."""
    made = NAMES[kind](np.array([vertex]))[0]
    return made if isinstance(made, str) else int(made)
