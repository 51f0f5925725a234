"""Orders without comparison sorts: rows by destination, rows by group number, keys by hash.

All passes count and place; all are stable. `np.argsort` of as many rows takes ten to thirty times longer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError

CROWDED = 64  # hashes in one bucket beyond which the last, quadratic, step is left to np.argsort


@kernel
def _count(codes: Any, counts: Any) -> int:
    """Add up rows per code; the first code out of range, or -1."""
    size = np.uint64(len(counts))
    for i in range(len(codes)):
        c = np.uint64(codes[i])
        if c >= size:
            return i
        counts[c] += 1
    return -1


@kernel
def _place(codes: Any, ends: Any, order: Any) -> None:
    for i in range(len(codes)):
        c = np.uint64(codes[i])
        order[np.uint64(ends[c])] = i
        ends[c] += 1


@kernel
def bucket_hashes(hashes: Any, base: Any, shift: Any, ends: Any, placed: Any, order: Any) -> int:
    """Place hashes by their leading bits; the size of the largest bucket."""
    for i in range(len(hashes)):
        ends[(hashes[i] - base) >> shift] += 1
    begin, largest = 0, 0
    for b in range(len(ends)):
        held = ends[b]
        ends[b] = begin
        begin += held
        largest = max(largest, held)
    for i in range(len(hashes)):
        b = (hashes[i] - base) >> shift
        at = np.uint64(ends[b])
        placed[at] = hashes[i]
        order[at] = i
        ends[b] += 1
    return largest


@kernel
def insertion_sort(hashes: Any, order: Any) -> None:
    """Sort nearly sorted hashes in place, stably, and their order with them."""
    for i in range(1, len(hashes)):
        h = hashes[i]
        if hashes[i - 1] <= h:
            continue
        row, k = order[i], i
        while k > 0 and hashes[k - 1] > h:
            hashes[k], order[k] = hashes[k - 1], order[k - 1]
            k -= 1
        hashes[k], order[k] = h, row


def _counted(codes: Array, size: int, what: str) -> Array:
    counts = np.zeros(size, np.int64)
    wrong = _count(codes, counts)
    if wrong >= 0:
        raise UsageError(f"row {wrong} has {what} {int(codes[wrong])}: wanted 0 to {size - 1}")
    return counts


def bucket_order(dest: Array, size: int) -> tuple[Array, Array]:
    """Rows grouped by destination, in row order within each: ``(order int64[n], counts int64[size])``.

    ``dest`` holds ints in ``[0, size)``, of shape ``(n,)``; others raise `UsageError`.

    >>> order, counts = bucket_order(np.array([1, 0, 1], np.int32), 2)
    >>> order.tolist(), counts.tolist()
    ([1, 0, 2], [1, 2])
    """
    counts = _counted(dest, size, "destination")
    order = np.empty(len(dest), np.int64)
    _place(dest, np.cumsum(counts) - counts, order)
    return order, counts


def group_order(codes: Array, m: int) -> tuple[Array, Array]:
    """Rows grouped by code, in row order within each: ``(order int64[n], offsets int64[m + 1])``.

    Rows of group ``g`` are ``order[offsets[g]:offsets[g + 1]]``. Codes outside ``[0, m)`` raise `UsageError`.

    >>> order, offsets = group_order(np.array([2, 0, 2]), 3)
    >>> order.tolist(), offsets.tolist()
    ([1, 0, 2], [0, 1, 1, 3])
    """
    order, counts = bucket_order(codes, m) if m else (_no_rows(codes), np.zeros(0, np.int64))
    offsets = np.zeros(m + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return order, offsets


def _no_rows(codes: Array) -> Array:
    if len(codes):
        raise UsageError(f"{len(codes)} rows for no group at all")
    return np.zeros(0, np.int64)


def hash_order(hashes: Array) -> Array:
    """The stable ascending order, int64 ``(n,)``, of hashes, uint64 ``(n,)``: one counting pass, then short
    fix-ups.

    >>> hash_order(np.array([9, 2**63, 1, 9], dtype=np.uint64)).tolist()
    [2, 0, 3, 1]
    """
    n = len(hashes)
    if n < 256:
        return np.argsort(hashes, kind="stable")
    base, top = hashes.min(), hashes.max()
    shift = max(0, int(top - base).bit_length() - (n // 2).bit_length())
    buckets = (int(top - base) >> shift) + 1
    order, placed = np.empty(n, np.int64), np.empty(n, np.uint64)
    if bucket_hashes(hashes, base, np.uint64(shift), np.zeros(buckets, np.int64), placed, order) > CROWDED:
        return np.argsort(hashes, kind="stable")
    insertion_sort(placed, order)
    return order
