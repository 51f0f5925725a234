"""Compiled loops of `nearest`: float32 scores with a proven error, and the float64 definition.

They are not for calling from elsewhere: arrays must have the layouts that `nearest.Scratch` gives them. A
tile holds `TILE` rows, transposed: its loops run along rows, so that the compiler vectorises them and selects
instead of branching. ``found`` holds three lines of a tile: best score, second best, squared norm.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel, kernel_reassoc
from iterreduce.columns.ragged import Array

TILE = 512
"""Rows of one tile: with 16 columns it is 32 KB of float32, which a first-level cache holds."""
STRIDE = TILE + 16
"""Columns of a tile stand a cache line further apart: at powers of two they share a few cache sets."""
STRIP = 64
"""Rows of one tile of the float64 pass."""
GROUP = 4
"""Centroids scored together, and columns added together: 16 coefficients stay in registers."""
MAX_EXPONENT = 400
"""Centroids spread over more than 2**400, or less than 2**-400, leave no room for float64 squares."""
FARTHEST = np.float32(2.0**100)
"""Squared norm of a row, in units of the widest centroid coordinate, up to which scores are trusted."""
SLACK = 1.0625
"""Covers what the bound leaves out: rounding of the norms (2**-10), of the bound, and underflow (2**-40)."""
UNDECIDED = -1


@kernel
def prepare(centroids: Array, shift: Array, coefficients: Array, constants: Array) -> tuple[float, float]:
    """Fill the float32 form of the centroids: score = constant + coefficients . u, u = (x - shift) * scale.

    Returns the scale, a power of two that brings the largest shifted coordinate into [1/2, 1), and the
    largest norm of a centroid after scaling; (0, 0) where no float32 pass is possible.
    """
    k, d = centroids.shape
    finite = 0
    shift[:] = 0.0
    coefficients[:] = 0.0
    constants[:] = np.inf
    for j in range(k):
        if np.all(np.isfinite(centroids[j])):
            finite += 1
            for i in range(d):
                shift[i] += centroids[j, i]
    for i in range(d):
        shift[i] /= finite
    widest = 0.0
    for j in range(k):
        if np.all(np.isfinite(centroids[j])):
            for i in range(d):
                widest = max(widest, abs(centroids[j, i] - shift[i]))
    if not (2.0**-MAX_EXPONENT < widest < 2.0**MAX_EXPONENT):
        return 0.0, 0.0
    scale = 2.0 ** -(math.frexp(widest)[1])
    largest = 0.0
    for j in range(k):
        if np.all(np.isfinite(centroids[j])):
            square = 0.0
            for i in range(d):
                z = (centroids[j, i] - shift[i]) * scale
                coefficients[j, i] = np.float32(-2.0 * z)
                square += z * z
            constants[j] = np.float32(square)
            largest = max(largest, square)
    return scale, math.sqrt(largest)


@kernel_reassoc
def score(
    points: Array, shift: Array, scale: float, spread: float, coefficients: Array, constants: Array,
    tile: Array, scores: Array, found: Array, label: Array, labels: Array,
) -> int:  # fmt: skip
    """The float32 pass: labels of the rows that it can tell; returns how many are left `UNDECIDED`."""
    undecided = 0
    four = scores.reshape(-1)
    for lo in range(0, len(points), TILE):
        rows = points[lo : lo + TILE]
        load(rows, shift, scale, tile)
        forget(found, label)
        for j in range(0, len(coefficients), GROUP):
            set_products(tile, coefficients, j, four)
            for i in range(GROUP, coefficients.shape[1], GROUP):
                add_products(tile[i * STRIDE :], coefficients, j, i, four)
            keep_two(four, constants, j, np.int32(j), found, label)
        undecided += settle(tile, found, label, spread, labels[lo : lo + len(rows)], len(shift))
    return undecided


@kernel_reassoc
def load(points: Array, shift: Array, scale: float, x: Array) -> None:
    """A tile of shifted and scaled points in float32, transposed: column i begins at ``x[i * STRIDE]``."""
    m, d = points.shape
    whole = m - m % 8
    for lo in range(0, whole, 8):  # eight neighbours in the tile at a time: up to 4 x faster than row by row
        for i in range(d):
            out = x[i * STRIDE + lo : i * STRIDE + lo + 8]
            for p in range(8):
                out[p] = (points[lo + p, i] - shift[i]) * scale
    for p in range(whole, m):
        for i in range(d):
            x[i * STRIDE + p] = (points[p, i] - shift[i]) * scale


@kernel_reassoc
def set_products(x: Array, c: Array, j: int, sums: Array) -> None:
    """Scores of four centroids by the first four columns: ``sums[q, p] = c[j + q, :4] . x[p, :4]``."""
    c00, c01, c02, c03 = c[j, 0], c[j, 1], c[j, 2], c[j, 3]
    c10, c11, c12, c13 = c[j + 1, 0], c[j + 1, 1], c[j + 1, 2], c[j + 1, 3]
    c20, c21, c22, c23 = c[j + 2, 0], c[j + 2, 1], c[j + 2, 2], c[j + 2, 3]
    c30, c31, c32, c33 = c[j + 3, 0], c[j + 3, 1], c[j + 3, 2], c[j + 3, 3]
    for p in range(TILE):
        x0, x1, x2, x3 = x[p], x[p + STRIDE], x[p + 2 * STRIDE], x[p + 3 * STRIDE]
        sums[p] = c00 * x0 + c01 * x1 + c02 * x2 + c03 * x3
        sums[p + TILE] = c10 * x0 + c11 * x1 + c12 * x2 + c13 * x3
        sums[p + 2 * TILE] = c20 * x0 + c21 * x1 + c22 * x2 + c23 * x3
        sums[p + 3 * TILE] = c30 * x0 + c31 * x1 + c32 * x2 + c33 * x3


@kernel_reassoc
def add_products(x: Array, c: Array, j: int, i: int, sums: Array) -> None:
    """The same for four more columns, from i on: ``x`` begins with column i."""
    c00, c01, c02, c03 = c[j, i], c[j, i + 1], c[j, i + 2], c[j, i + 3]
    c10, c11, c12, c13 = c[j + 1, i], c[j + 1, i + 1], c[j + 1, i + 2], c[j + 1, i + 3]
    c20, c21, c22, c23 = c[j + 2, i], c[j + 2, i + 1], c[j + 2, i + 2], c[j + 2, i + 3]
    c30, c31, c32, c33 = c[j + 3, i], c[j + 3, i + 1], c[j + 3, i + 2], c[j + 3, i + 3]
    for p in range(TILE):
        x0, x1, x2, x3 = x[p], x[p + STRIDE], x[p + 2 * STRIDE], x[p + 3 * STRIDE]
        sums[p] += c00 * x0 + c01 * x1 + c02 * x2 + c03 * x3
        sums[p + TILE] += c10 * x0 + c11 * x1 + c12 * x2 + c13 * x3
        sums[p + 2 * TILE] += c20 * x0 + c21 * x1 + c22 * x2 + c23 * x3
        sums[p + 3 * TILE] += c30 * x0 + c31 * x1 + c32 * x2 + c33 * x3


@kernel_reassoc
def forget(found: Array, label: Array) -> None:
    found[:] = np.inf
    label[:] = 0


@kernel_reassoc
def keep_chunk(scores: Array, constants: Array, first: int, found: Array, label: Array) -> None:
    """Take the scores of some centroids, numbered from ``first``, into the best two."""
    if first == 0:
        forget(found, label)
    flat = scores.reshape(-1)
    for j in range(0, len(constants), GROUP):
        keep_two(flat[j * TILE : (j + GROUP) * TILE], constants, j, np.int32(first + j), found, label)


@kernel_reassoc
def keep_two(sums: Array, constants: Array, j: int, first: Any, found: Array, label: Array) -> None:
    """Take four centroids' scores into the best, its number, and the second best; without branches."""
    h0, h1, h2, h3 = constants[j], constants[j + 1], constants[j + 2], constants[j + 3]
    best, second = found[:TILE], found[TILE : 2 * TILE]
    for p in range(TILE):
        b, s, at = best[p], second[p], label[p]
        v = sums[p] + h0
        s, at, b = min(s, max(v, b)), first if v < b else at, min(b, v)
        v = sums[p + TILE] + h1
        s, at, b = min(s, max(v, b)), np.int32(first + 1) if v < b else at, min(b, v)
        v = sums[p + 2 * TILE] + h2
        s, at, b = min(s, max(v, b)), np.int32(first + 2) if v < b else at, min(b, v)
        v = sums[p + 3 * TILE] + h3
        s, at, b = min(s, max(v, b)), np.int32(first + 3) if v < b else at, min(b, v)
        best[p], second[p], label[p] = b, s, at


@kernel_reassoc
def square(x: Array, norm: Array) -> None:
    norm[:] = 0.0
    for lo in range(0, len(x), STRIDE):
        column = x[lo : lo + TILE]
        for p in range(TILE):
            norm[p] += column[p] * column[p]


@kernel
def settle(x: Array, found: Array, label: Array, spread: float, labels: Array, d: int) -> int:
    """Write labels where the gap is above ``2 E + 2 G`` (``docs/nearest-bound.md``), count the other rows."""
    best, second, norm = found[:TILE], found[TILE : 2 * TILE], found[2 * TILE :]
    square(x, norm)
    gamma = (d + 4) * 2.0**-24 / (1 - (d + 4) * 2.0**-24)
    gamma_exact = (d + 2) * 2.0**-53 / (1 - (d + 2) * 2.0**-53)
    at_zero = np.float32(SLACK * 2 * (gamma + gamma_exact) * spread * spread)
    by_norm = np.float32(SLACK * 4 * (gamma + gamma_exact) * spread)
    by_square = np.float32(SLACK * 2 * gamma_exact)
    undecided = 0
    for p in range(len(labels)):
        bound = at_zero + by_norm * np.sqrt(norm[p]) + by_square * norm[p]
        decided = (second[p] - best[p] > bound) & (norm[p] <= FARTHEST)
        labels[p] = label[p] if decided else UNDECIDED
        undecided += not decided
    return undecided


@kernel
def decide(points: Array, centroids: Array, labels: Array, strip: Array) -> None:
    """The float64 pass: labels by definition, of the rows that are `UNDECIDED`."""
    n, d = points.shape
    total, best, x = strip[:STRIP], strip[STRIP : 2 * STRIP], strip[2 * STRIP :]
    rows, label = np.empty(STRIP, np.int64), np.empty(STRIP, np.int64)
    lo = 0
    while lo < n:
        m = 0
        while lo < n and m < STRIP:
            if labels[lo] == UNDECIDED:
                rows[m] = lo
                for i in range(d):
                    x[i * STRIP + m] = points[lo, i]
                m += 1
            lo += 1
        best[:m] = np.inf
        label[:m] = 0
        for j in range(len(centroids)):
            total[:m] = 0.0
            for i in range(d):
                column, c = x[i * STRIP : i * STRIP + m], centroids[j, i]
                for p in range(m):
                    total[p] += (column[p] - c) * (column[p] - c)
            for p in range(m):
                label[p] = j if total[p] < best[p] else label[p]
                best[p] = min(best[p], total[p])
        for p in range(m):
            labels[rows[p]] = label[p]


@kernel
def measure(points: Array, centroids: Array, labels: Array, distances: Array) -> None:
    for row in range(len(points)):
        x, c = points[row], centroids[labels[row]]
        total = 0.0
        for i in range(len(x)):
            difference = x[i] - c[i]
            total += difference * difference
        distances[row] = total
