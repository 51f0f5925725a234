"""Rows of one integer key of 8 bytes and one sum of 8 bytes, to the wire and into a table, in one loop each.

A segment looks as `iterreduce.columns.packing` would write it: all keys, then all sums. With a thousand rows
it is not the rows that cost but the calls around them, and here is one for all ranks together. Results have
the bits of the general way: sums are added in rank order, then in the order of a segment.

`Frame` and `hear_narrow` go further, where a rank sends the same keys again: rows are added in the send
buffer, and one loop reads the headers and adds what came, if they say nothing out of the ordinary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import inlined, kernel
from iterreduce.columns.numbering import Addressed, KeyIndex
from iterreduce.columns.ragged import Array

STATUS, ROWS, WORDS, LARGEST, SCHEMA, PROPOSAL, EXTRA = range(1, 8)  # words of a header, as in `heads`
HEADER_WORDS, LOW, ROUGH = 8, 0xFFFFFFFF, 0x7FFF


@kernel
def pack_narrow(keys: Any, records: Any, bounds: Any, buffer: Any, at: Any) -> None:
    """Rows ``bounds[d]`` to ``bounds[d + 1]`` into ``buffer`` from word ``at[d]`` on, int64 all."""
    for d in range(len(at)):
        lo, n, out = bounds[d], bounds[d + 1] - bounds[d], at[d]
        for i in range(n):
            buffer[out + i] = keys[lo + i]
        for i in range(n):
            buffer[out + n + i] = records[lo + i, 0]


@inlined
def _add_segment(buffer: Any, sums: Any, at: Any, n: Any, low: Any, place: Any, out: Any) -> Any:
    """Add a segment's rows, ``n`` keys and as many sums behind them; how many keys have no place."""
    span, strays, last = np.uint64(len(place) - 1), 0, len(out) - 1
    for i in range(n):
        k = np.uint64(buffer[at + i] - low)
        row = -1 if k >= span else np.int64(place[k])
        if row < 0 or row >= last:
            strays += 1
            row = last
        out[row] += sums[at + n + i]
    return strays


@kernel
def _merge(
    buffer: Any, sums: Any, starts: Any, headers: Any, rows_at: int, low: Any, place: Any, out: Any
) -> int:
    strays = 0
    out[:] = 0
    for s in range(len(starts)):
        strays += _add_segment(buffer, sums, starts[s], headers[s, rows_at], low, place, out)
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


@kernel
def _fold_into(words: Any, values: Any, low: int, places: Any, stamp: int, frame: Any, out: Any) -> int:
    """A copy of the frame with rows added to it; how many keys came, -1 for a key that has no place."""
    out[:] = frame
    span, seen = np.uint64(len(places)), 0
    for i in range(len(words)):
        k = np.uint64(words[i] - low)
        if k >= span or places[k, 0] < 0:
            return -1
        seen += places[k, 1] != stamp
        places[k, 1] = stamp
        out[np.uint64(places[k, 0])] += values[i]
    return seen


class Frame:
    """A send buffer of always the same keys, as it is before any row is added: headers, keys and zeros.

    ``words``: the keys, int64; ``bounds``: where those of each destination begin among them; ``starts``: the
    word behind each destination's header; ``sent``: the buffer as it was sent; ``dtype`` of the sums. Keys
    must lie so close together that they are found by address.
    """

    def __init__(self, words: Array, bounds: Array, starts: Array, sent: Array, dtype: np.dtype[Any]):
        rows = np.diff(bounds)
        at = np.repeat(starts + rows - bounds[:-1], rows) + np.arange(len(words))
        self.low = int(words.min())
        self.places = np.full((int(words.max()) - self.low + 1, 2), -1)
        self.places[words - self.low, 0] = at
        frame = sent.copy()
        frame[at] = 0
        self.keys, self._stamp, self._out, self._frame = len(words), 0, sent.view(dtype), frame.view(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.places.nbytes + self._frame.nbytes

    def fold(self, words: Array, values: Array) -> bool:
        """Lay out the buffer with these rows in it; False where they have other keys: it is void then."""
        self._stamp += 1
        found = _fold_into(words, values, self.low, self.places, self._stamp, self._frame, self._out)
        return bool(found == self.keys)


@kernel
def _rough_count(bits: int) -> int:
    return (bits & 511) << (bits >> 9)


@kernel
def _hear(buffer: Any, came: Any, slot: int, schema: int, most: int, low: Any, place: Any, out: Any) -> int:
    size, told = buffer.size // slot, 0
    for s in range(size):
        at = s * slot
        rows, extra = buffer[at + ROWS], buffer[at + EXTRA]
        usual = buffer[at + STATUS] == 0 and buffer[at + PROPOSAL] == 0 and buffer[at + SCHEMA] == schema
        fits = buffer[at + WORDS] == 2 * rows and buffer[at + LARGEST] + HEADER_WORDS <= slot
        if not usual or not fits or extra & LOW:
            return -1
        told += _rough_count(extra >> 32 & ROUGH) + _rough_count(extra >> 47 & ROUGH)
    if told >= most:
        return -1
    strays = 0
    out[:] = 0
    for s in range(size):
        strays += _add_segment(
            buffer, came, s * slot + HEADER_WORDS, buffer[s * slot + ROWS], low, place, out
        )
    return strays


def hear_narrow(found: Addressed, buffer: Array, slot: int, schema: int, most: int, sums: Array) -> int:
    """`merge_narrow` of equal slots with headers in front; -1 where any of them says more than that rows of
    this schema came, all by key and fewer than ``most`` in all: nothing is done.
    """
    came = buffer.view(sums.dtype)
    return int(_hear(buffer, came, slot, schema, most, found.low, found.place, sums))
