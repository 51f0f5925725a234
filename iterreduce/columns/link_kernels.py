"""Compiled loops over the edges of a graph: what every target hears from its sources.

Factories make a loop around an *edge function* of k source values and m edge values (k, m <= 3), itself a
compiled scalar function (`iterreduce.columns.jit.kernel`) that is inlined; made again in another process,
the loop comes from the disk. Nothing here checks lengths or dtypes or allocates: that is
`iterreduce.columns.links`, the only caller, and `iterreduce.columns.link_layout`, which says how edges lie.

Every loop is limited to targets in ``[lo, hi)`` and adds to one target in an order that does not depend on
that range: so ranges can be given to threads, and the bits stay. Arithmetic is strict; what is faster in
another order is written in that order. Indices are unsigned because Numba tests signed ones for wrap-around.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from iterreduce.columns.grids import add_four, each_of_four, four_sums, limbs_of
from iterreduce.columns.jit import kernel

EdgeFunction = Callable[..., Any]

LANES = 4
"""Pieces of equal length that are summed side by side: four chains of additions hide their latency."""
SEGMENT = 1 << 16
"""Source slots of one segment: their number fits 16 bits, their float64 values (512 KB) a second-level
cache."""
COLLECTED = 2048
"""Edges collected before they are followed: 32 KB of their numbers."""
# columns of a table of runs: see `link_layout.Pieces`
SLOT, PIECE, EDGE, PIECES, LENGTH, LONG = range(6)


@kernel
def add(held: Any, value: Any) -> Any:
    """Sums."""
    return held + value


@kernel
def smaller(held: Any, value: Any) -> Any:
    """Minima; a NaN stays."""
    return value if (value < held) | (value != value) else held


@kernel
def larger(held: Any, value: Any) -> Any:
    """Maxima; a NaN stays."""
    return value if (value > held) | (value != value) else held


@kernel
def source(x: Any) -> Any:
    """The source's value."""
    return x


@kernel
def source_times_edge(x: Any, w: Any) -> Any:
    """Product."""
    return x * w


@kernel
def source_plus_edge(x: Any, w: Any) -> Any:
    """Sum: the length of a path."""
    return x + w


@kernel
def source_minus_edge(x: Any, w: Any) -> Any:
    """Difference."""
    return x - w


@kernel
def add_pair(held: Any, value: Any) -> Any:
    """Sums of two words at once."""
    return held[0] + value[0], held[1] + value[1]


@kernel
def add_on_grid(held: Any, value: Any, grid: Any) -> Any:
    """The sum of two integers and of those of a value."""
    high, low = limbs_of(value, grid)
    return held[0] + high, held[1] + low


@kernel
def _clear(out: Any, lo: Any, hi: Any, zero: Any) -> None:
    out[lo:hi] = zero


@kernel
def _clear_pairs(out: Any, lo: Any, hi: Any, zero: Any) -> None:
    out[2 * lo : 2 * hi] = zero[0]


@kernel
def _held(out: Any, t: Any) -> Any:
    return out[t]


@kernel
def _held_pair(out: Any, t: Any) -> Any:
    at = np.uint64(t) << np.uint64(1)
    return out[at], out[at | np.uint64(1)]


@kernel
def _hold(out: Any, t: Any, value: Any) -> None:
    out[t] = value


@kernel
def _hold_pair(out: Any, t: Any, value: Any) -> None:
    at = np.uint64(t) << np.uint64(1)
    out[at], out[at | np.uint64(1)] = value[0], value[1]


@kernel
def _behind(out: Any, t: Any) -> Any:
    return out[t:]


@kernel
def _behind_pairs(out: Any, t: Any) -> Any:
    return out[2 * t :]


@kernel
def _four(zero: Any, steps: Any, grid: Any) -> Any:
    return zero, zero, zero, zero


@kernel
def _each(held: Any) -> Any:
    return held


COMBINES = {"sum": add, "min": smaller, "max": larger}
EDGE_FUNCTIONS: dict[str, EdgeFunction] = {
    "x": source,
    "x*w": source_times_edge,
    "x+w": source_plus_edge,
    "x-w": source_minus_edge,
    "min(x,w)": smaller,
    "max(x,w)": larger,
}
ON_GRID = "on a grid"
"""Sums of floats on a grid, two integers each: those of target t stand at 2t and 2t + 1."""


@dataclass(frozen=True)
class _Fold:
    """How values are folded: kernels, and how targets are cleared, read, written, and cut off in front."""

    fold: Any  # what is held, a value and the grid -> what is held then
    join: Any  # two of what is held -> one
    four: Any  # nothing yet, four times; then a value for each; then the four
    fold_four: Any
    each: Any
    clear: Any
    held: Any
    hold: Any
    behind: Any


def _fold_of(combine: str) -> _Fold:
    if combine == ON_GRID:
        return _Fold(add_on_grid, add_pair, four_sums, add_four, each_of_four, _clear_pairs, _held_pair,
                     _hold_pair, _behind_pairs)  # fmt: skip
    fold, fold_four = _folds(COMBINES[combine])
    return _Fold(fold, COMBINES[combine], _four, fold_four, _each, _clear, _held, _hold, _behind)


@cache
def _folds(join: Any) -> tuple[Any, Any]:
    @kernel
    def fold(held: Any, value: Any, grid: Any) -> Any:
        return join(held, value)

    @kernel
    def fold_four(held: Any, a: Any, b: Any, c: Any, d: Any, grid: Any) -> Any:
        return join(held[0], a), join(held[1], b), join(held[2], c), join(held[3], d)

    return fold, fold_four


@kernel
def _row_0(columns: Any, i: Any) -> Any:
    return ()


@kernel
def _row_1(columns: Any, i: Any) -> Any:
    return (columns[0][i],)


@kernel
def _row_2(columns: Any, i: Any) -> Any:
    return columns[0][i], columns[1][i]


@kernel
def _row_3(columns: Any, i: Any) -> Any:
    return columns[0][i], columns[1][i], columns[2][i]


@kernel
def _from_0(columns: Any, first: Any) -> Any:
    return ()


@kernel
def _from_1(columns: Any, first: Any) -> Any:
    return (columns[0][first:],)


@kernel
def _from_2(columns: Any, first: Any) -> Any:
    return columns[0][first:], columns[1][first:]


@kernel
def _from_3(columns: Any, first: Any) -> Any:
    return columns[0][first:], columns[1][first:], columns[2][first:]


ROW = (_row_0, _row_1, _row_2, _row_3)
FROM = (_from_0, _from_1, _from_2, _from_3)
MOST_COLUMNS = len(ROW) - 1


@kernel
def first_not_below(rows: Any, first: Any, last: Any, target: Any) -> Any:
    """The first of the ascending ``rows[first:last]`` that is not below the target."""
    while first < last:
        middle = (first + last) >> 1
        if rows[middle] < target:
            first = middle + 1
        else:
            last = middle
    return first


@cache
def over_pieces(edge: EdgeFunction, combine: str, k: int, m: int) -> Any:
    """The loop over pieces: all edges from one segment to one target, folded before the target is touched."""
    how, source_row, edge_row, cut = _fold_of(combine), ROW[k], ROW[m], FROM[k]
    fold, join, four, fold_four, each = how.fold, how.join, how.four, how.fold_four, how.each
    clear, held, hold = how.clear, how.held, how.hold

    @kernel
    def value(tables: Any, columns: Any, index: Any, e: Any) -> Any:
        return edge(*(source_row(tables, index[e]) + edge_row(columns, e)))

    @kernel
    def next_four(sums: Any, tables: Any, columns: Any, index: Any, e: Any, grid: Any) -> Any:
        a, b = value(tables, columns, index, e), value(tables, columns, index, e + np.uint64(1))
        c = value(tables, columns, index, e + np.uint64(2))
        d = value(tables, columns, index, e + np.uint64(3))
        return fold_four(sums, a, b, c, d, grid)

    @kernel
    def strided(
        tables: Any, columns: Any, index: Any, e: Any, stride: Any, length: Any, zero: Any, grid: Any
    ) -> Any:
        total = zero
        for _ in range(length):
            total = fold(total, value(tables, columns, index, e), grid)
            e += stride
        return total

    @kernel
    def long(tables: Any, columns: Any, index: Any, e: Any, end: Any, zero: Any, grid: Any) -> Any:
        u1, u4 = np.uint64(1), np.uint64(4)
        sums = four(zero, (end - e) // u4, grid)
        while e + u4 <= end:
            sums = next_four(sums, tables, columns, index, e, grid)
            e += u4
        a, b, c, d = each(sums)
        while e < end:
            a = fold(a, value(tables, columns, index, e), grid)
            e += u1
        return join(join(a, b), join(c, d))

    @kernel
    def loop(
        states: Any,
        columns: Any,
        runs: Any,
        rows: Any,
        longs: Any,
        index: Any,
        out: Any,
        zero: Any,
        grid: Any,
        lo: Any,
        hi: Any,
    ) -> None:
        u1, u2, u3, u4 = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
        clear(out, lo, hi, zero)
        for r in range(len(runs)):
            first, last = runs[r, PIECE], runs[r, PIECE] + runs[r, PIECES]
            p = np.uint64(first_not_below(rows, first, last, lo) - first)
            stop = np.uint64(first_not_below(rows, first, last, hi) - first)
            tables, mine = cut(states, runs[r, SLOT]), rows[first:last]
            begin, length = np.uint64(runs[r, EDGE]), np.uint64(runs[r, LENGTH])
            if length == 0:
                ends = longs[runs[r, LONG] :]
                while p < stop:
                    t, whole = mine[p], long(tables, columns, index, ends[p], ends[p + u1], zero, grid)
                    hold(out, t, join(held(out, t), whole))
                    p += u1
                continue
            even = np.uint64(runs[r, PIECES]) // u4 * u4
            while p < stop:
                e = begin + p * length
                if p % u4 == 0 and p + u4 <= stop:
                    sums = four(zero, length, grid)
                    for _ in range(length):
                        sums = next_four(sums, tables, columns, index, e, grid)
                        e += u4
                    a, b, c, d = each(sums)
                    t = mine[p]
                    hold(out, t, join(held(out, t), a))
                    t = mine[p + u1]
                    hold(out, t, join(held(out, t), b))
                    t = mine[p + u2]
                    hold(out, t, join(held(out, t), c))
                    t = mine[p + u3]
                    hold(out, t, join(held(out, t), d))
                    p += u4
                    continue
                t, stride = mine[p], u1
                if p < even:
                    e, stride = begin + p // u4 * u4 * length + p % u4, u4
                whole = strided(tables, columns, index, e, stride, length, zero, grid)
                hold(out, t, join(held(out, t), whole))
                p += u1

    return loop


@cache
def over_blocks(edge: EdgeFunction, combine: str, k: int, m: int) -> Any:
    """The loop over blocks of a segment of sources and a stretch of targets, both of which stay in cache."""
    how, source_row, edge_row, cut = _fold_of(combine), ROW[k], ROW[m], FROM[k]
    fold, clear, held, hold, behind = how.fold, how.clear, how.held, how.hold, how.behind

    @kernel
    def loop(
        states: Any,
        columns: Any,
        bounds: Any,
        bits: Any,
        index: Any,
        target: Any,
        out: Any,
        zero: Any,
        grid: Any,
        lo: Any,
        hi: Any,
    ) -> None:
        clear(out, lo, hi, zero)
        for h in range(lo >> bits, (hi + (1 << bits) - 1) >> bits):
            mine = behind(out, h << bits)
            for g in range(bounds.shape[1] - 1):
                tables = cut(states, g * SEGMENT)
                for e in range(np.uint64(bounds[h, g]), np.uint64(bounds[h, g + 1])):
                    t = target[e]
                    heard = edge(*(source_row(tables, index[e]) + edge_row(columns, e)))
                    hold(mine, t, fold(held(mine, t), heard, grid))

    return loop


@cache
def _hearing(combine: str) -> Any:
    """What a target does with one value: targets met for the first time go to ``new``."""
    how = _fold_of(combine)
    fold, held, hold = how.fold, how.held, how.hold

    @kernel
    def hear(
        t: Any, v: Any, out: Any, zero: Any, grid: Any, stamps: Any, stamp: Any, new: Any, found: Any
    ) -> Any:
        if stamps[t] == stamp:
            hold(out, t, fold(held(out, t), v, grid))
            return found
        stamps[t] = stamp
        new[found] = t
        hold(out, t, fold(zero, v, grid))
        return found + np.uint64(1)

    return hear


@cache
def along(edge: EdgeFunction, combine: str, k: int, m: int, aligned: bool) -> Any:
    """The loop over the edges of some sources; ``aligned``: row i of the states is that of ``frontier[i]``.

    Targets met for the first time are written to ``touched``; the loop returns how many.
    """
    hear, source_row, edge_row = _hearing(combine), ROW[k], ROW[m]

    @kernel
    def loop(
        frontier: Any,
        states: Any,
        columns: Any,
        offsets: Any,
        targets: Any,
        out: Any,
        zero: Any,
        grid: Any,
        stamps: Any,
        stamp: Any,
        touched: Any,
    ) -> int:
        one, found = np.uint64(1), np.uint64(0)
        for i in range(np.uint64(len(frontier))):
            s = np.uint64(frontier[i])
            x = source_row(states, i if aligned else s)
            for e in range(np.uint64(offsets[s]), np.uint64(offsets[s + one])):
                v = edge(*(x + edge_row(columns, e)))
                found = hear(np.uint64(targets[e]), v, out, zero, grid, stamps, stamp, touched, found)
        return int(found)

    return loop


@cache
def along_some(edge: EdgeFunction, combine: str, k: int, m: int, aligned: bool) -> Any:
    """`along`, limited to targets in ``[lo, hi)``, which are written to ``touched`` from ``lo`` on.

    Whether an edge leads there is as good as chance, and a branch on it would be mispredicted half of the
    time (4 times slower): edges that do are collected without one, some at a time.
    """
    hear, source_row, edge_row = _hearing(combine), ROW[k], ROW[m]

    @kernel
    def take(given: Any, places: Any, rows: Any, count: Any, new: Any, found: Any) -> Any:
        frontier, states, columns, _, targets, out, zero, grid, stamps, stamp = given
        for j in range(count):
            i, e = rows[j], places[j]
            x = source_row(states, i if aligned else np.uint64(frontier[i]))
            v = edge(*(x + edge_row(columns, e)))
            found = hear(np.uint64(targets[e]), v, out, zero, grid, stamps, stamp, new, found)
        return found

    @kernel
    def loop(
        frontier: Any,
        states: Any,
        columns: Any,
        offsets: Any,
        targets: Any,
        out: Any,
        zero: Any,
        grid: Any,
        stamps: Any,
        stamp: Any,
        touched: Any,
        lo: Any,
        hi: Any,
    ) -> int:
        given, new = (
            (frontier, states, columns, offsets, targets, out, zero, grid, stamps, stamp),
            touched[lo:],
        )
        one, full, low, wide = np.uint64(1), np.uint64(COLLECTED), np.uint64(lo), np.uint64(hi - lo)
        places, rows = np.empty(COLLECTED, np.uint64), np.empty(COLLECTED, np.uint64)
        count, found = np.uint64(0), np.uint64(0)
        for i in range(np.uint64(len(frontier))):
            s = np.uint64(frontier[i])
            e, end = np.uint64(offsets[s]), np.uint64(offsets[s + one])
            while e < end:
                stop = min(end, e + full - count)
                while e < stop:
                    places[count], rows[count] = e, i
                    count += np.uint64(np.uint64(targets[e]) - low < wide)
                    e += one
                if count == full:
                    found = take(given, places, rows, count, new, found)
                    count = np.uint64(0)
        return int(take(given, places, rows, count, new, found))

    return loop
