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
from iterreduce.columns.binned import AHEAD, LIMBS, add_packed, add_scalars, cut_ahead, unpack_all
from iterreduce.columns.exact import OrderFreeSum, packed_for
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
def _homes(hashes: Any, table: Any, base: Any, shift: Any, homes: Any, slots: Any) -> Any:
    """Where to look for hashes first; how many there are in front of one that has no place in the table."""
    last, inside = np.uint64(table.shape[0] - 1), True
    for i in range(len(hashes)):
        j = (hashes[i] - base) >> shift
        inside &= (hashes[i] != EMPTY) & (j < homes)
        slots[i] = min(j, last)
    if not inside:
        for i in range(len(hashes)):
            if hashes[i] == EMPTY or (hashes[i] - base) >> shift >= homes:
                return i
    return len(hashes)


@kernel
def _find_some(hashes: Any, table: Any, base: Any, shift: Any, probes: Any, room: Any, used: Any, slots: Any,
               rest: Any) -> Any:  # fmt: skip
    """Find or insert hashes from their homes on; ``(whether all are found, keys held)``.

    How many steps one takes nobody can foretell, so all take a step at a time: a branch that is guessed wrong
    costs more than a step. Keys that stay without a value, where there is trouble, come again.
    """
    one = np.uint64(1)
    n: Any = 0
    for i in range(len(hashes)):
        rest[n] = i
        n += table[slots[i], 0] != hashes[i]
    while n:
        left: Any = 0
        for k in range(n):
            row = np.uint64(rest[k])
            h, j = hashes[row], slots[row]
            held: Any = table[j, 0]
            if held == EMPTY:
                if used >= room or j - ((h - base) >> shift) >= probes:
                    return False, used
                table[j, 0] = held = h
                used += 1
            rest[left] = row
            left += held != h
            slots[row] = j + one if held != h else j
        n = left
    return True, used


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
    whole, rest, held = first == 0 and last == EMPTY, np.empty(AHEAD + 1, np.int64), 0
    for lo in range(0, len(words), AHEAD):
        hi = min(lo + AHEAD, len(words))
        m: Any = hi - lo
        if whole:
            for i in range(lo, hi):
                hashes[i - lo], some[i - lo] = mix(np.uint64(words[i])), values[i]
        else:
            m = _rows_of_part(words, values, lo, hi, first, last, rows, hashes, some)
        n = _homes(hashes[:m], table, base, shift, homes, slots)
        if n:
            bin_ = cut_ahead(records, 1, slots[:n], some[:n], pieces, held)
            found, used = _find_some(hashes[:n], table, base, shift, probes, room, used, slots, rest)
            if not found:
                n = 0
            else:
                held = add_scalars(records, 1, slots[:n], some[:n], pieces, bin_)
        if n < m:
            return lo + n if whole else rows[n], used
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
def _add_some(slots: Any, values: Any, table: Any, packed: Any, pieces: Any, held: Any) -> Any:
    """Add values at addresses; the top bin of the first, where it is known."""
    if packed is not None:
        add_packed(table, 1, slots, values, packed, pieces)
        return held
    bin_ = cut_ahead(table, 1, slots, values, pieces, held)
    _mark(slots, table)
    return add_scalars(table, 1, slots, values, pieces, bin_)


@kernel
def _add_addressed(words: Any, values: Any, low: Any, table: Any, packed: Any) -> Any:
    """Add each row's value at its address; the rows done: it stops at a key out of range."""
    slots, pieces = np.empty(AHEAD, np.uint64), np.empty((LIMBS, AHEAD), np.int64)
    end, held = np.uint64(table.shape[0] - 1), 0
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
            held = _add_some(slots[: done - lo], values[lo:done], table, packed, pieces, held)
        if done < hi:
            return done
    return len(words)


@kernel
def _add_addressed_part(words: Any, values: Any, low: Any, table: Any, packed: Any, lo: Any, hi: Any) -> None:
    """`_add_addressed` for the rows whose address lies in ``[lo, hi)``; all keys are in range."""
    slots, pieces = np.empty(AHEAD + 1, np.uint64), np.empty((LIMBS, AHEAD), np.int64)
    some, first, span, held = np.empty(AHEAD + 1), np.uint64(lo), np.uint64(hi - lo), 0
    for start in range(0, len(words), AHEAD):
        m: Any = 0
        for i in range(start, min(start + AHEAD, len(words))):
            at = np.uint64(words[i] - low)
            slots[m], some[m] = at, values[i]
            m += at - first < span
        if m:
            held = _add_some(slots[:m], some[:m], table, packed, pieces, held)


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
        pool, base, end, values = current(), np.int64(low), len(store) - 1, self._values(rows)
        assert values is not None
        packed, of_rows = packed_for(len(store), values), pool.parts(len(words), GRAIN)
        if len(of_rows) == 1:
            done = int(_add_addressed(words, values, base, store, packed))
        else:
            done = self._in_range(pool, words, base, np.uint64(end), of_rows)
            words, values = words[:done], values[:done]
            pool.run(
                lambda lo, hi: _add_addressed_part(words, values, base, store, packed, lo, hi),
                pool.parts(int(end), 1),
            )
        if packed is not None:
            unpack_all(store, 1, packed, 0, end, True)
        return done


def fused_sum(outputs: Sequence[Output]) -> Fused | None:
    """The fused loop of these outputs, if they are a single sum or count."""
    bound = outputs[0].bound if len(outputs) == 1 else None
    if isinstance(bound, OrderFreeSum) and bound.words == LIMBS and bound.load is None:
        return FusedBinned(outputs[0], np.dtype(np.float64), counts=False)
    return fused.fused_sum(outputs)
