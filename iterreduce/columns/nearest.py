"""The nearest centroid of every row: the map of k-means, vector quantisation and nearest-mean classification.

What it is not: an index. Every row is compared with every centroid, in tiles that stay in cache, and no
temporary of rows x centroids exists. User functions call it, on the blocks of rows that the engine hands out.

The definition, which every path below keeps to the bit: the distance of row x to centroid c is

    D = ((x[0] - c[0])**2 + (x[1] - c[1])**2) + ...      in float64, in this order,

and the label is the smallest number whose D is smallest. So a label depends on its row and on the centroids
alone, never on the block that the row came in, nor on the number of ranks or threads, nor on a BLAS. Threads
of the run take a range of rows each.

Most rows never meet that formula. Scores in float32 tell the best centroid from the second best where their
gap is wider than twice the error of a score; only the other rows (about 1 in 10,000) are decided in float64.
The error is at most ``gamma(d + 4) (Z**2 + 2 |y| Z)``, gamma(n) = n u / (1 - n u), u = 2**-24, for a row y
and centroids of norm at most Z, both taken from the mean of the centroids (N. J. Higham, Accuracy and
Stability of Numerical Algorithms, SIAM 2002, chapter 3); ``docs/nearest-bound.md`` has the proof.
"""

from __future__ import annotations

import threading
from typing import Any, Literal, overload

import numpy as np

from iterreduce.columns.nearest_kernels import (
    GROUP,
    STRIDE,
    STRIP,
    TILE,
    UNDECIDED,
    decide,
    keep_chunk,
    load,
    measure,
    prepare,
    score,
    settle,
)
from iterreduce.columns.ragged import Array
from iterreduce.columns.threads import current
from iterreduce.errors import SchemaError

CHUNK = 256
"""Centroids of one matrix product: their scores for a tile are 512 KB, which a second-level cache holds."""
BLAS_COLUMNS = 48
"""Columns from which a matrix product per tile is worth its 5 us of Python: 1.2 x faster at 64 columns."""
MAX_COLUMNS = 16_000
"""Above it the error of float32 sums grows past 2**-10, which the bound's slack does not cover."""
GRAIN = 1 << 20
"""Products of a range that is worth a thread of its own: 50 us."""


@overload
def nearest(points: Array, centroids: Array, *, distance: Literal[False] = ...) -> Array: ...
@overload
def nearest(points: Array, centroids: Array, *, distance: Literal[True]) -> tuple[Array, Array]: ...
def nearest(points: Array, centroids: Array, *, distance: bool = False) -> Array | tuple[Array, Array]:
    """Number of the nearest centroid (Euclidean) of each row; ties go to the smallest: int64 of ``(n,)``.

    ``points`` is float64 or float32 of shape ``(n, d)``, ``centroids`` of shape ``(k, d)``, k >= 1 (arrays of
    one dimension count as d = 1). With ``distance=True`` also the squared distances to the chosen centroids,
    float64 of shape ``(n,)``.

    A squared distance is the float64 sum of ``(x[i] - c[i])**2`` in the order of the columns, and labels are
    exact for it, also where float32 decided them. A centroid with NaN or infinity is never chosen; a row with
    NaN, and any row without a finite distance, gets label 0. Raises `SchemaError` for other dtypes, for
    shapes that do not fit, and where there is no centroid.

    >>> import numpy as np
    >>> centroids = np.array([[0.0, 0.0], [4.0, 0.0]])
    >>> nearest(np.array([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0]]), centroids).tolist()
    [0, 1, 0]
    >>> nearest(np.array([[3.0, 1.0]]), centroids, distance=True)
    (array([1]), array([2.]))
    """
    x, c = _rows("points", points), _rows("centroids", centroids).astype(np.float64, copy=False)
    _check_shapes(x, c)
    labels = np.empty(len(x), np.int64)
    distances = np.empty(len(x) if distance else 0)

    def label(lo: int, hi: int) -> None:
        _label(x[lo:hi], c, labels[lo:hi])
        if distance:
            measure(x[lo:hi], c, labels[lo:hi], distances[lo:hi])

    pool = current()
    pool.run(label, pool.parts(len(x), GRAIN // (c.size + 1), TILE))
    return (labels, distances) if distance else labels


def _rows(name: str, values: Any) -> Array:
    if not isinstance(values, np.ndarray):
        raise SchemaError(f"nearest: {name}: wanted a NumPy array, got {type(values).__name__}")
    if values.dtype not in (np.float64, np.float32) or values.ndim not in (1, 2):
        raise SchemaError(
            f"nearest: {name}: wanted float64 or float32 of shape (rows, dimensions), "
            f"got {values.dtype} {values.shape}"
        )
    return np.ascontiguousarray(values if values.ndim == 2 else values[:, None])


def _check_shapes(x: Array, c: Array) -> None:
    if not len(c):
        raise SchemaError("nearest: there are no centroids: give at least one")
    if x.shape[1] != c.shape[1]:
        raise SchemaError(
            f"nearest: points have {x.shape[1]} dimensions, centroids {c.shape[1]}: give both the same number"
        )


def _label(x: Array, c: Array, labels: Array) -> None:
    scratch = _scratch.fitting(*c.shape)
    undecided = _score_all(x, c, scratch, labels)
    if undecided:
        decide(x, c, labels, scratch.strip)


def _score_all(x: Array, c: Array, scratch: Scratch, labels: Array) -> int:
    """The float32 pass, where one is possible; returns how many labels are left `UNDECIDED`."""
    s, scale = scratch, 0.0
    if c.shape[1] <= MAX_COLUMNS:
        scale, spread = prepare(c, s.shift, s.coefficients, s.constants)
    if not scale:
        labels.fill(UNDECIDED)
        return len(labels)
    if c.shape[1] >= BLAS_COLUMNS:
        return _score_by_products(x, scale, spread, s, labels)
    return score(
        x, s.shift, scale, spread, s.coefficients, s.constants, s.tile, s.scores, s.found, s.label, labels
    )


def _score_by_products(x: Array, scale: float, spread: float, scratch: Scratch, labels: Array) -> int:
    """`score`, with the sums of a tile taken by the BLAS."""
    s, tile = scratch, scratch.tile.reshape(-1, STRIDE)[:, :TILE]
    undecided = 0
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):  # such rows are seen by their norms
        for lo in range(0, len(x), TILE):
            load(x[lo : lo + TILE], s.shift, scale, s.tile)
            for first in range(0, len(s.coefficients), CHUNK):
                some = s.coefficients[first : first + CHUNK]
                np.matmul(some, tile, out=s.scores[: len(some)])
                keep_chunk(s.scores, s.constants[first : first + CHUNK], first, s.found, s.label)
            undecided += settle(s.tile, s.found, s.label, spread, labels[lo : lo + TILE], x.shape[1])
    return undecided


class Scratch(threading.local):
    """Buffers of one thread for one shape of centroids: used again by the next call, not shared by ranks."""

    shape: tuple[int, int] = (-1, -1)

    def fitting(self, k: int, d: int) -> Scratch:
        """These buffers, replaced where they are for another shape."""
        if self.shape != (k, d):
            rows, columns = -(-k // GROUP) * GROUP, max(1, -(-d // GROUP)) * GROUP
            scored = min(rows, CHUNK) if d >= BLAS_COLUMNS else GROUP
            self.shift = np.empty(d)
            self.coefficients = np.empty((rows, columns), np.float32)
            self.constants = np.empty(rows, np.float32)
            self.tile = _aligned(columns * STRIDE, np.float32)  # the padding's columns stay 0
            self.scores = _aligned(scored * TILE, np.float32).reshape(-1, TILE)
            self.found = _aligned(3 * TILE, np.float32)
            self.label = _aligned(TILE, np.int32)
            self.strip = _aligned((d + 2) * STRIP, np.float64)
            self.shape = (k, d)
        return self


def _aligned(count: int, dtype: Any) -> Array:
    """Zeros that begin at a cache line: a vector load that crosses lines costs two."""
    nbytes = count * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype)


_scratch = Scratch()
