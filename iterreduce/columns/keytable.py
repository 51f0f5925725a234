"""A hash table in hash order: open addressing by the leading bits of the hash.

One int64 array holds a row per place: the hash word, then ``width`` payload words (accumulators, or a key's
number), so that a key and what belongs to it share a cache line. A hash's home is ``(hash - base) >> shift``,
a monotone function, and probing goes upwards without wrapping around: the rows therefore stand in ascending
hash order but for short displacements, canonical order is a linear scan, and growing is a linear merge.

The all-ones hash marks a free row; the one key that has it lives in a row of its own, and so does the null
key. The range of hashes is fitted to those that come: on a rank that owns a share of all hashes, the table
serves that share. Nothing here knows what keys or payloads are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from iterreduce.columns.hashing import EMPTY, NULL_HASH
from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array

HOMES_PER_KEY = (
    1.6  # expected keys times this many homes, rounded up by at most 2: loads between 0.3 and 0.63
)
MAX_LOAD = 0.7
FEWEST_HOMES = 64
# A key stands less than this many rows behind its home: longer walks mean that the range does not fit. It is
# tested only where a key is inserted; the row behind the last one that can be filled stays free and ends
# every walk.
PROBES = 256
FREED = 1 << 13  # rows that are freed at a time: they stay in the second cache
SIDE_ROWS = 2  # the key of the all-ones hash, then the null key
ALL_HASHES = (0, 2**64 - 1)

Fill = Callable[[Array], None]


@kernel
def insert_hashes(
    hashes: Any, valid: Any, table: Any, base: Any, shift: Any, homes: Any, probes: Any, room: Any, slots: Any
) -> Any:
    """Find or insert hashes; ``(rows done, keys inserted)``: it stops at a hash that needs another table."""
    one, added, side = np.uint64(1), 0, table.shape[0] - 2
    for i in range(len(hashes)):
        if valid is not None and not valid[i]:
            table[side + 1, 0] = np.uint64(0)
            slots[i] = side + 1
            continue
        h = hashes[i]
        if h == EMPTY:
            table[side, 0] = np.uint64(0)
            slots[i] = side
            continue
        j = (h - base) >> shift
        if j >= homes:
            return i, added
        home = j
        while True:
            held = table[j, 0]
            if held == h:
                break
            if held == EMPTY:
                if added == room or j - home >= probes:
                    return i, added
                table[j, 0] = h
                added += 1
                break
            j += one
        slots[i] = j
    return len(hashes), added


@kernel
def find_hashes(hashes: Any, valid: Any, table: Any, base: Any, shift: Any, homes: Any, slots: Any) -> None:
    """The row of each hash, -1 where it is absent."""
    one, side = np.uint64(1), table.shape[0] - 2
    for i in range(len(hashes)):
        slots[i] = -1
        if valid is not None and not valid[i]:
            if table[side + 1, 0] != EMPTY:
                slots[i] = side + 1
            continue
        h = hashes[i]
        if h == EMPTY:
            if table[side, 0] != EMPTY:
                slots[i] = side
            continue
        j = (h - base) >> shift
        if j >= homes:
            continue
        while table[j, 0] != EMPTY:
            if table[j, 0] == h:
                slots[i] = j
                break
            j += one


@kernel
def _move(old: Any, new: Any, base: Any, shift: Any, probes: Any) -> bool:
    """Copy all rows of a table into an empty, wider one; False if one finds no place."""
    one, rows = np.uint64(1), old.shape[0] - 2
    for i in range(rows):
        h = old[i, 0]
        if h == EMPTY:
            continue
        j = (h - base) >> shift
        home = j
        while new[j, 0] != EMPTY:
            j += one
        if j - home >= probes:
            return False
        for k in range(old.shape[1]):
            new[j, k] = old[i, k]
    for side in range(2):
        for k in range(old.shape[1]):
            new[new.shape[0] - 2 + side, k] = old[rows + side, k]
    return True


@kernel
def _scan(table: Any, hashes: Any, order: Any) -> int:
    """Rows in use, in ascending hash; the null key is left out."""
    m, side = 0, table.shape[0] - 2
    for j in range(side):
        h = table[j, 0]
        if h == EMPTY:
            continue
        k = m
        while k > 0 and hashes[k - 1] > h:
            hashes[k], order[k] = hashes[k - 1], order[k - 1]
            k -= 1
        hashes[k], order[k] = h, j
        m += 1
    if table[side, 0] != EMPTY:
        hashes[m], order[m] = EMPTY, side
        m += 1
    return m


@kernel
def _scan_payload(table: Any, hashes: Any, payload: Any, run: Any) -> int:
    """As `_scan`, with the payload copied as well: runs of rows in use are sorted one by one."""
    one, side, width = np.uint64(1), np.uint64(table.shape[0] - 2), np.uint64(payload.shape[1])
    m, j = 0, np.uint64(0)
    while j < side:
        if table[j, 0] == EMPTY:
            j += one
            continue
        begin = m
        while table[j, 0] != EMPTY:  # the row before the side rows is always free
            h, k = table[j, 0], m
            while k > begin and hashes[k - 1] > h:
                hashes[k], run[k - begin] = hashes[k - 1], run[k - begin - 1]
                k -= 1
            hashes[k], run[k - begin] = h, j
            m += 1
            j += one
        for i in range(begin, m):
            row = np.uint64(run[i - begin])
            for w in range(width):
                payload[i, w] = table[row, w + one]
    if table[side, 0] != EMPTY:
        hashes[m] = EMPTY
        for w in range(width):
            payload[m, w] = table[side, w + one]
        m += 1
    return m


@kernel
def _extent(table: Any) -> Any:
    """Smallest and largest hash held, as ``(low, high)``; low above high if there is none."""
    low, high = EMPTY, np.uint64(0)
    for j in range(table.shape[0] - 2):
        h = table[j, 0]
        if h != EMPTY:
            low, high = min(low, h), max(high, h)
    return low, high


def _fitted(low: int, high: int, sample: int) -> tuple[int, int]:
    """The range that hashes seem to come from, of which a sample's ends are known."""
    if sample < FEWEST_HOMES:
        return ALL_HASHES
    margin = (high - low) // sample * 16  # the ends of a sample lie about one gap inside those of the whole
    return max(0, low - margin), min(ALL_HASHES[1], high + margin)


def line_aligned(cells: int) -> Array:
    """Words that begin at a cache line, so that a row of 4 or 8 words is in one line."""
    raw = np.empty(cells + 7, np.int64)
    first = -raw.ctypes.data % 64 // 8
    return raw[first : first + cells]


def free_rows(words: Array, fill: Fill) -> None:
    """Make all rows free: some at a time, so that memory is gone through once."""
    for lo in range(0, len(words), FREED):
        rows = words[lo : lo + FREED]
        rows[:, 0] = -1
        fill(rows)


class OrderedTable:
    """Rows of one hash word and ``width`` payload words, found by hash, scanned in hash order.

    ``fill(table)`` writes the payload of free rows (columns 1 and up of the int64 array it is given).

    >>> table = OrderedTable(1, lambda rows: rows[:, 1].fill(0))
    >>> slots = np.empty(3, np.int64)
    >>> table.reserve(3)
    >>> table.insert(np.array([7, 5, 7], np.uint64), None, slots)
    3
    >>> table.words[slots, 1] += 1
    >>> hashes, rows, null = table.scan()
    >>> hashes.tolist(), table.words[rows, 1].tolist(), null
    ([5, 7], [1, 1], -1)
    """

    __slots__ = (
        "_memory",
        "base",
        "fill",
        "homes",
        "probes",
        "range",
        "room",
        "shift",
        "unsigned",
        "used",
        "width",
        "words",
    )

    def __init__(self, width: int, fill: Fill):
        self.width, self.fill = width, fill
        self._memory = np.empty(0, np.int64)
        self.probes, self.used, self.homes, self.room = PROBES, 0, 0, 0
        self.range = ALL_HASHES
        self.base = self.shift = np.uint64(0)
        self.words = np.empty((0, 1 + width), np.int64)
        self.unsigned = self.words.view(np.uint64)

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return self._memory.nbytes

    @property
    def null_row(self) -> int:
        """The row of the null key."""
        return len(self.words) - 1

    def reserve(self, keys: int, hashes: Array | None = None) -> None:
        """Make an empty table for about this many keys; ``hashes``, some of them, tell the range."""
        span = ALL_HASHES
        if hashes is not None and len(hashes):
            span = _fitted(int(hashes.min()), int(hashes.max()), len(hashes))
        self._lay_out(keys, span, self._memory)

    def _lay_out(self, keys: int, span: tuple[int, int], memory: Array) -> None:
        low, high = span
        wanted = max(FEWEST_HOMES, int(HOMES_PER_KEY * keys))
        shift = max(0, (high - low).bit_length() - wanted.bit_length())
        while shift and (high - low) >> shift < wanted:
            shift -= 1
        homes = ((high - low) >> shift) + 1
        rows = homes + self.probes + SIDE_ROWS
        cells = rows * (1 + self.width)
        self._memory = memory if len(memory) >= cells else line_aligned(cells)
        self.words = self._memory[:cells].reshape(rows, 1 + self.width)
        self.unsigned = self.words.view(np.uint64)
        self.range, self.base, self.shift, self.homes = span, np.uint64(low), np.uint64(shift), homes
        self.room = (
            int(MAX_LOAD * homes) if shift else homes + self.probes // 2
        )  # more than homes: equal hashes
        self._empty()

    def _empty(self) -> None:
        free_rows(self.words, self.fill)
        self.used = 0

    def clear(self) -> None:
        """Forget all keys and keep the memory; a table far too large for what it held serves fewer rows of
        it.
        """
        if self.homes > 4096 and self.used * 16 < self.homes:
            self._lay_out(2 * self.used, self.range, self._memory)
        elif self.homes:
            self._empty()

    def insert(self, hashes: Array, valid: Array | None, slots: Array) -> int:
        """Write the row of each hash into ``slots``, inserting new ones, and return how many rows were done.

        Fewer than all: call `make_room` (which moves rows, so use the slots first) and go on from there.
        """
        done, added = insert_hashes(
            hashes,
            valid,
            self.unsigned,
            self.base,
            self.shift,
            np.uint64(self.homes),
            np.uint64(self.probes),
            self.room - self.used,
            slots,
        )
        self.used += added
        return int(done)

    def find(self, hashes: Array, valid: Array | None, slots: Array) -> None:
        """Write the row of each hash into ``slots``, -1 where it is absent."""
        find_hashes(hashes, valid, self.unsigned, self.base, self.shift, np.uint64(self.homes), slots)

    def make_room(self, hashes: Array, keys: int = 0) -> None:
        """Make a larger, or better fitting, table: rows move. ``hashes`` come next; ``keys`` are expected in
        all.
        """
        low, high = (int(h) for h in _extent(self.unsigned))
        if len(hashes):
            low, high = min(low, int(hashes.min())), max(high, int(hashes.max()))
        full, inside = self.used == self.room, self.range[0] <= low and high <= self.range[1]
        span = _fitted(low, high, self.used + len(hashes))
        if not inside:
            span = self._widened(span)
        elif span[1] - span[0] >= (self.range[1] - self.range[0]) // 8:
            span = self.range
            if (full and not self.shift) or (not full and self.used * 16 < self.homes):
                self.probes *= (
                    4  # crowded by equal or poor hashes: more homes would not help, longer walks do
                )
            elif not full:  # crowded where ascending hashes have come to: by its homes, it is large enough
                keys = max(keys, self.homes)
            full = True
        self._rebuild(max(keys, self.used * 2 if full else self.used), span)

    def _widened(self, span: tuple[int, int]) -> tuple[int, int]:
        """This range and the present one, twice as wide as that on the side that grew: hashes that come in
        ascending order would else ask for a new table again and again."""
        low, high = min(span[0], self.range[0]), max(span[1], self.range[1])
        width = self.range[1] - self.range[0]
        low = max(0, min(low, self.range[0] - width)) if low < self.range[0] else low
        high = min(ALL_HASHES[1], max(high, self.range[1] + width)) if high > self.range[1] else high
        return low, high

    def _rebuild(self, keys: int, span: tuple[int, int]) -> None:
        old, used = self.unsigned, self.used
        self._lay_out(keys, span, np.empty(0, np.int64))
        while not _move(old, self.unsigned, self.base, self.shift, np.uint64(self.probes)):
            self.probes *= 4
            self._lay_out(keys, span, np.empty(0, np.int64))
        self.used = used

    def scan(self) -> tuple[Array, Array, int]:
        """``(hashes uint64[m] ascending, rows int64[m], position of the null key among them or -1)``."""
        if not self.homes:
            return np.empty(0, np.uint64), np.empty(0, np.int64), -1
        hashes, rows = np.empty(self.used + 2, np.uint64), np.empty(self.used + 2, np.int64)
        m = _scan(self.unsigned, hashes, rows)
        hashes, rows = hashes[:m], rows[:m]
        if self.words[self.null_row, 0] == -1:
            return hashes, rows, -1
        at = int(np.searchsorted(hashes, NULL_HASH))
        return np.insert(hashes, at, NULL_HASH), np.insert(rows, at, self.null_row), at

    def contents(self) -> tuple[Array, Array, int]:
        """``(hashes uint64[m] ascending, payload int64[m, width], place of the null key or -1)``, copied."""
        m = self.used + 1
        hashes, payload = np.empty(m, np.uint64), np.empty((m, self.width), np.int64)
        if not self.homes:
            return hashes[:0], payload[:0], -1
        # of the last array only as much is touched as the longest run of rows in use
        m = _scan_payload(self.unsigned, hashes, payload.view(np.uint64), np.empty(m, np.int64))
        hashes, payload = hashes[:m], payload[:m]
        if self.words[self.null_row, 0] == -1:
            return hashes, payload, -1
        at = int(np.searchsorted(hashes, NULL_HASH))
        return (
            np.insert(hashes, at, NULL_HASH),
            np.insert(payload, at, self.words[self.null_row, 1:], axis=0),
            at,
        )
