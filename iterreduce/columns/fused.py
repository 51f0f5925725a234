"""The commonest fold in one loop: rows with one key of 8 bytes, summed or counted into one word, or only
found to be there.

Finding the key's row and adding to it in the same loop saves a pass over the slots and one visit to each row
of the table. Results are those of the general way, bit for bit: rows are added in row order. So are they
where threads add: each passes over all rows, and adds those whose key lies in its own part of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from iterreduce.columns.accumulators import Count, Elementwise
from iterreduce.columns.aggregators import Output
from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import EMPTY, mix
from iterreduce.columns.jit import kernel
from iterreduce.columns.keytable import ALL_HASHES, OrderedTable
from iterreduce.columns.ragged import Array
from iterreduce.columns.threads import Pool, current

BLOCK = 1024
"""Rows that are looked through at a time for those of a part: what is found stays in the first cache."""
GRAIN = 1 << 13
"""Rows worth a thread of their own: 50 us."""

"""Sums of these need no conversion; others take the general way, a piece at a time."""


@kernel
def _add_hashed(
    words: Any,
    values: Any,
    table: Any,
    cells: Any,
    base: Any,
    shift: Any,
    homes: Any,
    probes: Any,
    room: Any,
    used: Any,
) -> Any:
    """Find or insert the key of each row and add its value; ``(rows done, keys held)``: it stops at any
    trouble. ``cells`` None: keys alone.

    ``base`` None: the table serves all hashes, and none needs to be tested for its range. The key of the all-
    ones hash counts as trouble: a second place that adds makes the compiler merge the two, and the loop 1.5
    times slower.
    """
    one = np.uint64(1)
    for i in range(len(words)):
        h = mix(np.uint64(words[i]))
        if h == EMPTY:
            return i, used
        j = h >> shift if base is None else (h - base) >> shift
        if base is not None and j >= homes:
            return i, used
        home = j
        while True:  # this form, with one load per step, is 1.5 times as fast as `while table[j, 0] != h`
            held = table[j, 0]
            if held == h:
                break
            if held == EMPTY:
                if used >= room or j - home >= probes:
                    return i, used
                table[j, 0] = h
                used += 1
                break
            j += one
        if cells is not None:
            cells[j, 1] += values[i] if values is not None else 1
    return len(words), used


@kernel
def _add_hashed_part(
    words: Any,
    values: Any,
    table: Any,
    cells: Any,
    base: Any,
    shift: Any,
    homes: Any,
    probes: Any,
    room: Any,
    used: Any,
    first: Any,
    last: Any,
) -> Any:
    """`_add_hashed` for the rows whose hash lies in ``[first, last]``: found in blocks, without a branch."""
    one, found, hashes = np.uint64(1), np.empty(BLOCK, np.int64), np.empty(BLOCK, np.uint64)
    for lo in range(0, len(words), BLOCK):
        m = 0
        for i in range(lo, min(lo + BLOCK, len(words))):
            h = mix(np.uint64(words[i]))
            found[m], hashes[m] = i, h
            m += h - first <= last - first
        for k in range(m):
            i, h = found[k], hashes[k]
            j = (h - base) >> shift
            if h == EMPTY or j >= homes:
                return i, used
            home = j
            while True:
                held = table[j, 0]
                if held == h:
                    break
                if held == EMPTY:
                    if used >= room or j - home >= probes:
                        return i, used
                    table[j, 0] = h
                    used += 1
                    break
                j += one
            if cells is not None:
                cells[j, 1] += values[i] if values is not None else 1
    return len(words), used


@kernel
def _first_outside(words: Any, low: Any, end: Any) -> int:
    """The first row whose key is out of range; the number of rows if there is none."""
    for lo in range(0, len(words), BLOCK):
        hi, outside = min(lo + BLOCK, len(words)), 0
        for i in range(lo, hi):
            outside += np.uint64(words[i] - low) >= end
        if outside:
            for i in range(lo, hi):
                if np.uint64(words[i] - low) >= end:
                    return i
    return len(words)


@kernel
def _add_addressed_part(words: Any, values: Any, low: Any, table: Any, cells: Any, lo: Any, hi: Any) -> None:
    """`_add_addressed` for the rows whose address lies in ``[lo, hi)``; all keys are in range."""
    one, zero, found = np.uint64(1), np.uint64(0), np.empty(BLOCK, np.int64)
    first, span = np.uint64(lo), np.uint64(hi - lo)
    for start in range(0, len(words), BLOCK):
        m = 0
        for i in range(start, min(start + BLOCK, len(words))):
            found[m] = i
            m += int(np.uint64(words[i] - low) - first < span)
        for k in range(m):
            i = found[k]
            at = np.uint64(words[i] - low)
            table[at, zero] = 0
            if cells is not None:
                cells[at, one] += values[i] if values is not None else 1


@kernel
def _add_addressed(words: Any, values: Any, low: Any, table: Any, cells: Any) -> int:
    """Add each row's value at its address; the rows done: it stops at a key out of range."""
    end, one, zero = np.uint64(table.shape[0] - 1), np.uint64(1), np.uint64(0)
    for i in range(len(words)):
        at = np.uint64(words[i] - low)
        if at >= end:
            return i
        table[at, zero] = 0
        if cells is not None:
            cells[at, one] += values[i] if values is not None else 1
    return len(words)


class Fused:
    """A single sum of float64 or int64, or a single count, or keys alone, as one loop over rows."""

    def __init__(self, output: Output | None, dtype: np.dtype[Any], counts: bool):
        self.column = None if counts or output is None else output.inputs[0]
        self.dtype, self.adds = dtype, output is not None

    def takes(self, keys: Array, rows: Batch) -> bool:
        """True if these rows are of the shape that the loop reads as it is."""
        if keys.dtype.itemsize != 8 or keys.dtype.kind == "f" or not keys.flags.c_contiguous:
            return False
        if self.column is None:
            return True
        values = rows[self.column]
        return values.dtype == self.dtype and values.flags.c_contiguous and rows.valid(self.column) is None

    def _values(self, rows: Batch) -> Array | None:
        return None if self.column is None else rows[self.column]

    def _cells(self, store: Array) -> Array | None:
        return store.view(self.dtype) if self.adds else None

    def add_hashed(
        self, table: OrderedTable, words: Array, rows: Batch, first: int, part: tuple[int, int] = ALL_HASHES
    ) -> int:
        """Add rows from ``first`` on to a table of at most one payload word, if their hash is in ``part``;
        the rows done.
        """
        values = self._values(rows)
        values = None if values is None else values[first:]
        limits = table.shift, np.uint64(table.homes), np.uint64(table.probes), table.room
        given = words[first:], values, table.unsigned, self._cells(table.words)
        if part == ALL_HASHES:
            base = None if table.range == ALL_HASHES else table.base
            done, table.used = _add_hashed(*given, base, *limits, table.used)
        else:
            ends = np.uint64(part[0]), np.uint64(part[1])
            done, table.used = _add_hashed_part(*given, table.base, *limits, table.used, *ends)
        return first + int(done)

    def add_addressed(self, store: Array, words: Array, rows: Batch, low: int) -> int:
        """Add rows to a store by address; the rows done."""
        pool, values, cells = current(), self._values(rows), self._cells(store)
        of_rows = pool.parts(len(words), GRAIN)
        if len(of_rows) == 1:
            return int(_add_addressed(words, values, np.int64(low), store, cells))
        base, end = np.int64(low), np.uint64(len(store) - 1)
        done = self._in_range(pool, words, base, end, of_rows)
        words, values = words[:done], None if values is None else values[:done]
        pool.run(
            lambda lo, hi: _add_addressed_part(words, values, base, store, cells, lo, hi),
            pool.parts(int(end), 1),
        )
        return done

    @staticmethod
    def _in_range(pool: Pool, words: Array, base: Any, end: Any, of_rows: Sequence[tuple[int, int]]) -> int:
        """The rows in front of the first whose key is out of range."""
        inside = pool.run(lambda lo, hi: lo + int(_first_outside(words[lo:hi], base, end)), of_rows)
        return next((n for n, (_, hi) in zip(inside, of_rows, strict=True) if n < hi), len(words))


def fused_sum(outputs: Sequence[Output]) -> Fused | None:
    """The fused loop of these outputs, if they are a single sum or count of one word, or none."""
    if not outputs:
        return Fused(None, np.dtype(np.int64), counts=False)
    if len(outputs) != 1:
        return None
    bound = outputs[0].bound
    if isinstance(bound, Count) and bound.inputs == 0:
        return Fused(outputs[0], np.dtype(np.int64), counts=True)
    if not isinstance(bound, Elementwise) or bound.op != "sum" or bound.words != 1 or bound.load is not None:
        return None
    dtype = np.dtype(np.float64 if bound.word == "f" else np.int64)
    return Fused(outputs[0], dtype, counts=False) if bound.field_out.shape == () else None
