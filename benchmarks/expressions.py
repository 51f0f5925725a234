"""Expressions on one core: the compiled pass against NumPy, Polars (two threads) and numexpr, if it is there.

    python benchmarks/expressions.py [--rows 4000000] [--repeats 7]

Rivals are interleaved, results compared before, medians printed. ``pieces``: the rows come a megabyte at a
time and the results are not put together, as in a map in front of an exchange. ``array by array`` is our own
path without the loop.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "2")
os.environ.setdefault("NUMEXPR_NUM_THREADS", "2")

import numpy as np
import polars as pl

import iterreduce as ir
from iterreduce.columns.batch import Batch
from iterreduce.columns.compile import Fused, Make, Step
from iterreduce.columns.compute import compute_columns, select_rows

try:
    import numexpr
except ImportError:
    numexpr = None

PIECE_ROWS = 32_768
Case = tuple[str, list[Step], Callable[[], pl.DataFrame], Callable[[], list[np.ndarray]], Any]


def table(rows: int) -> Batch:
    """Three floats, one of them with nulls, and a small integer."""
    draw = np.random.default_rng(0)
    columns = {"x": draw.random(rows), "y": draw.random(rows), "z": draw.random(rows)}
    return Batch.from_dict(columns | {"n": draw.integers(0, 100, rows)}, {"z": draw.random(rows) < 0.9})


def cases(rows: Batch) -> list[Case]:
    """Name, our steps, Polars' and NumPy's function, numexpr's texts: of outputs, and of a condition."""
    x, y, z, n = map(ir.col, "xyzn")
    X, Y, Z, N = (rows[c] for c in "xyzn")
    P, Q, R, M = map(pl.col, "xyzn")
    valid = rows.valid("z")
    frame = pl.DataFrame(
        {"x": X, "y": Y, "z": pl.Series(Z).zip_with(pl.Series(valid), pl.Series([None])), "n": N}
    )
    lazy = frame.lazy()

    def chosen() -> list[np.ndarray]:
        kept = (X > 0.3) & (N != 7)
        a, b, c = X[kept], Y[kept], N[kept]
        return [a * 0.85 + b, (a - b) * c]

    def nulls() -> list[np.ndarray]:
        held = np.where(valid, Z, 0.0)
        return [held * X + Y, np.where(held > Y, held - Y, Y - held)]

    return [
        (
            "five operations",
            [Make({"a": (x * 2 + y) / (y + 1) - x * y})],
            lambda: lazy.select(a=(P * 2 + Q) / (Q + 1) - P * Q).collect(),
            lambda: [(X * 2 + Y) / (Y + 1) - X * Y],
            (["(x*2+y)/(y+1)-x*y"], None),
        ),
        (
            "two outputs",
            [Make({"a": ir.where(x > y, x - y, y - x) * n, "b": (x > 0.5) & (y < 0.5) | (n == 3)})],
            lambda: lazy.select(
                a=pl.when(P > Q).then(P - Q).otherwise(Q - P) * M, b=(P > 0.5) & (Q < 0.5) | (M == 3)
            ).collect(),
            lambda: [np.where(X > Y, X - Y, Y - X) * N, (X > 0.5) & (Y < 0.5) | (N == 3)],
            (["where(x > y, x - y, y - x)*n", "(x > 0.5) & (y < 0.5) | (n == 3)"], None),
        ),
        (
            "filter, select",
            [(x > 0.3) & (n != 7), Make({"a": x * 0.85 + y, "b": (x - y) * n})],
            lambda: lazy.filter((P > 0.3) & (M != 7)).select(a=P * 0.85 + Q, b=(P - Q) * M).collect(),
            chosen,
            (["x*0.85+y", "(x-y)*n"], "(x > 0.3) & (n != 7)"),
        ),
        (
            "nulls",
            [
                Make(
                    {
                        "a": z.fill_null(0.0) * x + y,
                        "b": ir.where(z.fill_null(0.0) > y, z.fill_null(0.0) - y, y - z.fill_null(0.0)),
                    }
                )
            ],
            lambda: lazy.select(
                a=R.fill_null(0.0) * P + Q,
                b=pl.when(R.fill_null(0.0) > Q).then(R.fill_null(0.0) - Q).otherwise(Q - R.fill_null(0.0)),
            ).collect(),
            nulls,
            None,
        ),
    ]


def array_by_array(rows: Batch, steps: list[Step]) -> Batch:
    """Our path without the loop."""
    for step in steps:
        rows = (
            compute_columns(step.trees, rows)
            if isinstance(step, Make)
            else rows.take(select_rows(step, rows))
        )
    return rows


def by_numexpr(rows: Batch, texts: Any) -> list[np.ndarray]:
    """numexpr has no filter: it makes the condition."""
    outputs, condition = texts
    columns = {c: rows[c] for c in "xyn"}
    if condition:
        kept = numexpr.evaluate(condition, columns)
        columns = {name: column[kept] for name, column in columns.items()}
    return [numexpr.evaluate(text, columns) for text in outputs]


def each(pieces: list[Batch], work: Callable[[Batch], object]) -> None:
    """All pieces; results are dropped."""
    for piece in pieces:
        work(piece)


def check(got: Batch, frame: pl.DataFrame, arrays: list[np.ndarray]) -> None:
    """All agree."""
    for name, array in zip(got.names, arrays, strict=True):
        np.testing.assert_array_equal(got[name], array)
        np.testing.assert_allclose(frame[name].to_numpy(), array, rtol=1e-12)


def measure(rows: Batch, case: Case, repeats: int) -> None:
    """Time all rivals in turn, and print a line."""
    name, steps, polars, numpy, texts = case
    chain = Fused(steps, eager=True)
    pieces = [rows.slice(i, min(i + PIECE_ROWS, len(rows))) for i in range(0, len(rows), PIECE_ROWS)]
    done, got = chain.run(rows, {})
    assert done == len(steps)
    check(got, polars(), numpy())
    rivals: dict[str, Callable[[], object]] = {
        "ours": lambda: chain.run(rows, {}),
        "ours, pieces": lambda: each(pieces, lambda piece: chain.run(piece, {})),
        "array by array": lambda: array_by_array(rows, steps),
        "array by array, pieces": lambda: each(pieces, lambda piece: array_by_array(piece, steps)),
        "NumPy": numpy,
        "Polars": polars,
    }
    if numexpr is not None and texts is not None:
        for array, wanted in zip(by_numexpr(rows, texts), numpy(), strict=True):
            np.testing.assert_allclose(array, wanted, rtol=1e-12)
        rivals["numexpr"] = lambda: by_numexpr(rows, texts)
    times: dict[str, list[float]] = {rival: [] for rival in rivals}
    for _ in range(repeats):
        for rival, work in rivals.items():
            begin = time.perf_counter()
            work()
            times[rival].append(1e3 * (time.perf_counter() - begin))
    median = {rival: statistics.median(t) for rival, t in times.items()}
    for rival, t in median.items():
        best, ratio = min(times[rival]), t / median["ours"]
        print(f"{name:16} {rival:24} {t:8.1f} ms (best {best:7.1f})   / ours {ratio:5.2f}")


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = table(args.rows)
    for case in cases(rows):
        measure(rows, case, args.repeats)


if __name__ == "__main__":
    main()
