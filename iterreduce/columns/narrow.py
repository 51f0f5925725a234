"""Rows of one integer key of 8 bytes and one sum of 8 bytes, to the wire and into a table, in one loop each.

A segment looks as `iterreduce.columns.packing` would write it: all keys, then all sums. With a thousand rows
it is not the rows that cost but the calls around them, and here is one for all ranks together. Results have
the bits of the general way: sums are added in rank order, then in the order of a segment.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.numbering import Addressed, KeyIndex
from iterreduce.columns.ragged import Array


@kernel
def pack_narrow(keys: Any, records: Any, bounds: Any, buffer: Any, at: Any) -> None:
    """Rows ``bounds[d]`` to ``bounds[d + 1]`` into ``buffer`` from word ``at[d]`` on, int64 all."""
    for d in range(len(at)):
        lo, n, out = bounds[d], bounds[d + 1] - bounds[d], at[d]
        for i in range(n):
            buffer[out + i] = keys[lo + i]
        for i in range(n):
            buffer[out + n + i] = records[lo + i, 0]


@kernel
def _merge(
    buffer: Any, sums: Any, starts: Any, headers: Any, rows_at: int, low: Any, place: Any, out: Any
) -> int:
    span, strays, last = np.uint64(len(place) - 1), 0, len(out) - 1
    out[:] = 0
    for s in range(len(starts)):
        n, at = headers[s, rows_at], starts[s]
        for i in range(n):
            k = np.uint64(buffer[at + i] - low)
            row = -1 if k >= span else np.int64(place[k])
            if row < 0 or row >= last:
                strays += 1
                row = last
            out[row] += sums[at + n + i]
    return strays


def merge_narrow(
    index: KeyIndex, buffer: Array, starts: Array, headers: Array, rows_at: int, sums: Array
) -> int:
    """Set ``sums``, ``(keys + 1,)``, to what all segments say of each key of the index; how many keys are not
    in it (their sums go to the last place), or -1 where the index is not one by address: nothing is done.

    ``headers[s, rows_at]``: the rows of the segment that begins at word ``starts[s]``.
    """
    found = index.finder
    if not isinstance(found, Addressed):
        return -1
    came = buffer.view(sums.dtype)
    return int(_merge(buffer, came, starts, headers, rows_at, found.low, found.place, sums))
