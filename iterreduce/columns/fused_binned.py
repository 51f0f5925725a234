"""A single order-free sum in one pass over the rows: the twin of `iterreduce.columns.fused`.

Additions of three limbs are too long for the processor to look far ahead, so some keys are looked up first,
in loops without branches where that is possible (many loads under way at a time), and their values added
then. The results are those of the general way, and of any number of threads: records are integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from iterreduce.columns import fused
from iterreduce.columns.aggregators import Output
from iterreduce.columns.batch import Batch
from iterreduce.columns.binned import AHEAD, LIMBS, add_scalars
from iterreduce.columns.exact import OrderFreeSum
from iterreduce.columns.fused import GRAIN, Fused
from iterreduce.columns.hashing import EMPTY, mix
from iterreduce.columns.jit import kernel
from iterreduce.columns.keytable import ALL_HASHES, OrderedTable
from iterreduce.columns.ragged import Array
from iterreduce.columns.threads import current


@kernel
def _rows_of_part(words: Any, values: Any, lo: Any, hi: Any, first: Any, last: Any, rows: Any, hashes: Any,
                  some: Any) -> Any:  # fmt: skip
    """The rows whose hash lies in ``[first, last]``, with hashes and values; how many."""
    m = 0
    for i in range(lo, hi):
        h = mix(np.uint64(words[i]))
        rows[m], hashes[m], some[m] = i, h, values[i]
        m += h - first <= last - first
    return m


@kernel
def _find_some(hashes: Any, table: Any, base: Any, shift: Any, homes: Any, probes: Any, room: Any, used: Any,
               slots: Any) -> Any:  # fmt: skip
    """Find or insert hashes; ``(hashes done, keys held)``: it stops at any trouble. All homes are looked at
    first.
    """
    one, last, seen = np.uint64(1), np.uint64(table.shape[0] - 1), np.uint64(0)
    for i in range(len(hashes)):
        slots[i] = min((hashes[i] - base) >> shift, last)
    for i in range(len(hashes)):
        seen |= table[slots[i], 0]
    slots[0] = seen  # or the compiler leaves it out
    for i in range(len(hashes)):
        h = hashes[i]
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
        slots[i] = j
    return len(hashes), used


@kernel
def _add_hashed(
    words: Any,
    values: Any,
    table: Any,
    records: Any,
    base: Any,
    shift: Any,
    homes: Any,
    probes: Any,
    room: Any,
    used: Any,
    first: Any,
    last: Any,
) -> Any:
    """Add the values of rows whose hash lies in ``[first, last]``; ``(rows done, keys held)``."""
    slots, pieces = np.empty(AHEAD, np.uint64), np.empty((LIMBS, AHEAD), np.int64)
    rows, hashes, some = np.empty(AHEAD + 1, np.int64), np.empty(AHEAD + 1, np.uint64), np.empty(AHEAD + 1)
    whole = first == 0 and last == EMPTY
    for lo in range(0, len(words), AHEAD):
        hi = min(lo + AHEAD, len(words))
        if whole:
            for i in range(lo, hi):
                hashes[i - lo] = mix(np.uint64(words[i]))
            done, used = _find_some(hashes[: hi - lo], table, base, shift, homes, probes, room, used, slots)
            if done:
                add_scalars(records, 1, slots[:done], values[lo : lo + done], pieces)
            if done < hi - lo:
                return lo + done, used
            continue
        m = _rows_of_part(words, values, lo, hi, first, last, rows, hashes, some)
        if m == 0:
            continue
        done, used = _find_some(hashes[:m], table, base, shift, homes, probes, room, used, slots)
        if done:
            add_scalars(records, 1, slots[:done], some[:done], pieces)
        if done < m:
            return rows[done], used
    return len(words), used


@kernel
def _mark(slots: Any, table: Any) -> None:
    """Mark records as held; loads run further ahead than stores, and most are marked already."""
    zero, marks = np.uint64(0), np.int64(0)
    for i in range(len(slots)):
        marks |= table[slots[i], zero]
    if marks:
        for i in range(len(slots)):
            if table[slots[i], zero]:
                table[slots[i], zero] = 0


@kernel
def _add_addressed(words: Any, values: Any, low: Any, table: Any) -> Any:
    """Add each row's value at its address; the rows done: it stops at a key out of range."""
    slots, pieces = np.empty(AHEAD, np.uint64), np.empty((LIMBS, AHEAD), np.int64)
    end = np.uint64(table.shape[0] - 1)
    for lo in range(0, len(words), AHEAD):
        hi, most = min(lo + AHEAD, len(words)), np.uint64(0)
        for i in range(lo, hi):
            at = np.uint64(words[i] - low)
            most = max(most, at)
            slots[i - lo] = at
        done: Any = hi
        if most >= end:
            done = lo + np.int64(np.argmax(slots[: hi - lo] >= end))
        if done > lo:
            _mark(slots[: done - lo], table)
            add_scalars(table, 1, slots[: done - lo], values[lo:done], pieces)
        if done < hi:
            return done
    return len(words)


@kernel
def _add_addressed_part(words: Any, values: Any, low: Any, table: Any, lo: Any, hi: Any) -> None:
    """`_add_addressed` for the rows whose address lies in ``[lo, hi)``; all keys are in range."""
    slots, pieces = np.empty(AHEAD + 1, np.uint64), np.empty((LIMBS, AHEAD), np.int64)
    some, first, span = np.empty(AHEAD + 1), np.uint64(lo), np.uint64(hi - lo)
    for start in range(0, len(words), AHEAD):
        m: Any = 0
        for i in range(start, min(start + AHEAD, len(words))):
            at = np.uint64(words[i] - low)
            slots[m], some[m] = at, values[i]
            m += at - first < span
        if m:
            _mark(slots[:m], table)
            add_scalars(table, 1, slots[:m], some[:m], pieces)


class FusedBinned(Fused):
    """A single order-free sum of float64."""

    def add_hashed(
        self, table: OrderedTable, words: Array, rows: Batch, first: int, part: tuple[int, int] = ALL_HASHES
    ) -> int:
        """Add rows from ``first`` on to a table of three payload words, if their hash is in ``part``; rows
        done.
        """
        values = self._values(rows)
        assert values is not None
        limits = table.base, table.shift, np.uint64(table.homes), np.uint64(table.probes), table.room
        given = words[first:], values[first:], table.unsigned, table.words
        ends = np.uint64(part[0]), np.uint64(part[1])
        done, table.used = _add_hashed(*given, *limits, table.used, *ends)
        return first + int(done)

    def add_addressed(self, store: Array, words: Array, rows: Batch, low: int) -> int:
        """Add rows to a store by address; the rows done."""
        pool, values, base, end = current(), self._values(rows), np.int64(low), len(store) - 1
        of_rows = pool.parts(len(words), GRAIN)
        if len(of_rows) == 1:
            return int(_add_addressed(words, values, base, store))
        done = self._in_range(pool, words, base, np.uint64(end), of_rows)
        words, values = words[:done], None if values is None else values[:done]
        pool.run(
            lambda lo, hi: _add_addressed_part(words, values, base, store, lo, hi), pool.parts(int(end), 1)
        )
        return done


def fused_sum(outputs: Sequence[Output]) -> Fused | None:
    """The fused loop of these outputs, if they are a single sum or count."""
    bound = outputs[0].bound if len(outputs) == 1 else None
    if isinstance(bound, OrderFreeSum) and bound.words == LIMBS and bound.load is None:
        return FusedBinned(outputs[0], np.dtype(np.float64), counts=False)
    return fused.fused_sum(outputs)
