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
LARGE_ROWS = 1 << 16  # a first bucket beyond is sorted by itself
CROWDED = 48  # different hashes that still share a second bucket: beyond, merge sort


@kernel
def settle(hashes: Any, rows: Any) -> None:
    """Sort few hashes, or many of which most are equal neighbours."""
    if len(hashes) > CROWDED and hashes.min() != hashes.max():
        order = np.argsort(hashes, kind="mergesort")
        hashes[:], rows[:] = hashes[order], rows[order]
        return
    insertion_sort(hashes, rows)


@kernel
def _bits(word: Any) -> int:
    """The bits of a number: 0 has none."""
    n = 0
    while word:
        word >>= np.uint64(1)
        n += 1
    return n


@kernel
def _in_buckets(placed: Any, rows: Any, ends: Any, most: Any, room: Any, row_room: Any) -> None:
    """Sort each bucket of at most so many rows, in place, by the foremost bits in which its words differ."""
    counts = np.empty(1 << SECOND_BITS, np.int64)
    lo = 0
    for b in range(len(ends)):
        hi = ends[b]
        if hi - lo <= CROWDED or hi - lo > most:
            if hi - lo <= CROWDED:
                insertion_sort(placed[lo:hi], rows[lo:hi])
            lo = hi
            continue
        base, top = placed[lo], placed[lo]
        for i in range(lo, hi):
            base, top = min(base, placed[i]), max(top, placed[i])
        low = np.uint64(max(0, _bits(top - base) - SECOND_BITS))
        counts[:] = 0
        for i in range(lo, hi):
            counts[(placed[i] - base) >> low] += 1
        begin, largest = 0, 0
        for s in range(len(counts)):
            held = counts[s]
            counts[s] = begin
            begin += held
            largest = max(largest, held)
        for i in range(lo, hi):
            s = (placed[i] - base) >> low
            at = np.uint64(counts[s])
            room[at], row_room[at] = placed[i], rows[i]
            counts[s] += 1
        begin = 0
        if low and largest <= CROWDED:  # then no row is far from its place
            insertion_sort(room[: hi - lo], row_room[: hi - lo])
        elif low:
            for s in range(len(counts)):
                if counts[s] - begin > 1:
                    settle(room[begin : counts[s]], row_room[begin : counts[s]])
                begin = counts[s]
        placed[lo:hi], rows[lo:hi] = room[: hi - lo], row_room[: hi - lo]
        lo = hi


@kernel
def _ascending(words: Any) -> bool:
    for i in range(1, len(words)):  # noqa: SIM110 (the compiler knows no generators)
        if words[i] < words[i - 1]:
            return False
    return True


def stable_order(hashes: Array) -> Array:
    """The stable ascending order of hashes, uint64 ``(n,)``, as int32 (int64 beyond 2^31 rows) ``(n,)``.

    >>> stable_order(np.array([9, 2**63, 1, 9], dtype=np.uint64)).tolist()
    [2, 0, 3, 1]
    """
    n = len(hashes)
    rows = sort_words(hashes)[1]
    return np.arange(n, dtype=np.int32 if n < 2**31 else np.int64) if rows is None else rows


def sort_words(words: Array) -> tuple[Array, Array | None]:
    """Words, uint64 ``(n,)``, in ascending order, and that order: stable, int32 (int64 beyond 2^31 rows).

    The order is None, and the words the same array, where they stand in it. Where many words share their
    leading bits (skewed keys, or a few far away from the rest) their bucket is sorted like the whole.

    >>> words, order = sort_words(np.array([9, 2**63, 1, 9], dtype=np.uint64))
    >>> words.tolist() == sorted(words.tolist()), order.tolist()
    (True, [2, 0, 3, 1])
    """
    n = len(words)
    if _ascending(words):
        return words, None
    dtype = np.int32 if n < 2**31 else np.int64
    if n < BUCKET_ROWS:
        rows = np.argsort(words, kind="stable").astype(dtype)
        return words[rows], rows
    buckets = min(MOST_BUCKETS, 1 << (n // BUCKET_ROWS).bit_length())
    first, last = int(words.min()), int(words.max())
    shift = max(0, (last - first).bit_length() - (buckets - 1).bit_length())
    base = first >> shift << shift
    ends = np.zeros((last - base >> shift) + 1, np.int64)
    placed, rows = np.empty(n, np.uint64), np.empty(n, dtype)
    bucket_hashes(words, np.uint64(base), np.uint64(shift), ends, placed, rows)
    if shift:
        sizes = np.diff(ends, prepend=0)
        for b in np.flatnonzero(sizes > LARGE_ROWS).tolist():
            lo, hi = int(ends[b] - sizes[b]), int(ends[b])
            placed[lo:hi], moved = sort_words(placed[lo:hi])
            if moved is not None:
                rows[lo:hi] = rows[lo:hi][moved]
        largest = min(int(sizes.max()), LARGE_ROWS)

        def sort(first: int, last: int) -> None:
            lo, hi = int(ends[first - 1]) if first else 0, int(ends[last - 1])
            room, row_room = np.empty(largest, np.uint64), np.empty(largest, dtype)
            _in_buckets(placed[lo:hi], rows[lo:hi], ends[first:last] - lo, LARGE_ROWS, room, row_room)

        pool = current()
        pool.run(sort, pool.parts(len(ends), GRAIN // BUCKET_ROWS))
    return placed, rows


def grouping_order(keys: Batch) -> Array | None:
    """`stable_order` of keys that are single numbers without nulls: it groups them. None for other keys."""
    name = keys.names[0]
    if len(keys.names) > 1 or keys.valid(name) is not None or not is_word_column(keys[name]):
        return None
    return stable_order(hash_words(key_words(keys[name])))
