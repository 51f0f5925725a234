"""The stable order of many hashes: rows of the same key together, keys in canonical order.

Two counting passes (the first into buckets that fit the cache, the second inside of each), then fix-ups.
For keys of a single number equal hashes are equal keys, so this groups rows without a table of keys; other
keys are numbered first (`numbering`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import hash_words, is_word_column, key_words
from iterreduce.columns.jit import kernel
from iterreduce.columns.ordering import bucket_hashes, insertion_sort
from iterreduce.columns.ragged import Array
from iterreduce.columns.threads import current

BUCKET_ROWS = 2048  # rows of a first bucket: 32 KiB of hashes and row numbers
MOST_BUCKETS = 4096  # more leave the second-level cache while they are written
GRAIN = 1 << 14  # rows that are worth a thread of their own: 0.2 ms
SECOND_BITS = 11
CROWDED = 48  # different hashes that still share a second bucket: beyond, merge sort


@kernel
def _settle(hashes: Any, rows: Any) -> None:
    """Sort few hashes, or many of which most are equal neighbours."""
    if len(hashes) > CROWDED and hashes.min() != hashes.max():
        order = np.argsort(hashes, kind="mergesort")
        hashes[:], rows[:] = hashes[order], rows[order]
        return
    insertion_sort(hashes, rows)


@kernel
def _in_buckets(placed: Any, rows: Any, ends: Any, shift: Any, room: Any, row_room: Any) -> None:
    """Sort each bucket, in place, by its next bits."""
    bits = min(np.uint64(SECOND_BITS), shift)
    low, mask = shift - bits, (np.uint64(1) << bits) - np.uint64(1)
    counts = np.empty(1 << SECOND_BITS, np.int64)
    lo = 0
    for b in range(len(ends)):
        hi = ends[b]
        if hi - lo <= CROWDED:
            _settle(placed[lo:hi], rows[lo:hi])
            lo = hi
            continue
        base = placed[lo:hi].min() >> shift << shift if shift < 64 else np.uint64(0)
        counts[:] = 0
        for i in range(lo, hi):
            counts[((placed[i] - base) >> low) & mask] += 1
        begin = 0
        for s in range(len(counts)):
            held = counts[s]
            counts[s] = begin
            begin += held
        for i in range(lo, hi):
            s = ((placed[i] - base) >> low) & mask
            at = np.uint64(counts[s])
            room[at], row_room[at] = placed[i], rows[i]
            counts[s] += 1
        begin = 0
        for s in range(len(counts)):
            if counts[s] - begin > 1:
                _settle(room[begin : counts[s]], row_room[begin : counts[s]])
            begin = counts[s]
        placed[lo:hi], rows[lo:hi] = room[: hi - lo], row_room[: hi - lo]
        lo = hi


def stable_order(hashes: Array) -> Array:
    """The stable ascending order of hashes, uint64 ``(n,)``, as int32 (int64 beyond 2^31 rows) ``(n,)``.

    >>> stable_order(np.array([9, 2**63, 1, 9], dtype=np.uint64)).tolist()
    [2, 0, 3, 1]
    """
    n = len(hashes)
    dtype = np.int32 if n < 2**31 else np.int64
    if n < BUCKET_ROWS:
        return np.argsort(hashes, kind="stable").astype(dtype)
    buckets = min(MOST_BUCKETS, 1 << (n // BUCKET_ROWS).bit_length())
    first, last = int(hashes.min()), int(hashes.max())
    shift = max(0, (last - first).bit_length() - (buckets - 1).bit_length())
    base = first >> shift << shift
    ends = np.zeros((last - base >> shift) + 1, np.int64)
    placed, rows = np.empty(n, np.uint64), np.empty(n, dtype)
    largest = bucket_hashes(hashes, np.uint64(base), np.uint64(shift), ends, placed, rows)

    def sort(first: int, last: int) -> None:
        lo, hi = int(ends[first - 1]) if first else 0, int(ends[last - 1])
        room, row_room = np.empty(largest, np.uint64), np.empty(largest, dtype)
        _in_buckets(placed[lo:hi], rows[lo:hi], ends[first:last] - lo, np.uint64(shift), room, row_room)

    pool = current()
    pool.run(sort, pool.parts(len(ends), GRAIN // BUCKET_ROWS))
    return rows


def grouping_order(keys: Batch) -> Array | None:
    """`stable_order` of keys that are single numbers without nulls: it groups them. None for other keys."""
    name = keys.names[0]
    if len(keys.names) > 1 or keys.valid(name) is not None or not is_word_column(keys[name]):
        return None
    return stable_order(hash_words(key_words(keys[name])))
