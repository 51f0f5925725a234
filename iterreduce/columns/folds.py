"""Numba loops that fold rows, and partial accumulators, into accumulator records.

A record is a row of an int64 array of shape ``(groups, words)``; a fold reads and writes the words from
``offset`` on, as int64 or as float64 (the same memory seen otherwise: ``view`` inside the kernel is free, in
Python it costs 0.3 us). Nothing here checks codes, shapes or dtypes, knows of nulls, or allocates: that is
`iterreduce.columns.accumulators`, the only caller.

Conventions: ``codes`` is int32 or int64 of shape ``(n,)``, the record of each row; ``values`` of shape
``(n,)`` for the plain kernels and C-contiguous ``(n, d)`` for those that end in ``_rows``; kernels that start
with ``merge_`` fold row ``i`` of ``partial`` (words ``first`` to ``first + width``) into record ``slots[i]``.
Rows are folded in row order. Indices are made unsigned because Numba tests signed ones for wrap-around.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array


@kernel
def count_float(records: Array, offset: int, codes: Array) -> None:
    """Add 1.0 to the word at ``offset``, once per row."""
    cells, at = records.view(np.float64), np.uint64(offset)
    for i in range(codes.size):
        cells[np.uint64(codes[i]), at] += 1.0


@kernel
def count_int(records: Array, offset: int, codes: Array) -> None:
    """Add 1 to the word at ``offset``, once per row."""
    at = np.uint64(offset)
    for i in range(codes.size):
        records[np.uint64(codes[i]), at] += 1


@kernel
def sum_float(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Float sums, accumulated in float64."""
    cells, at = records.view(np.float64), np.uint64(offset)
    for i in range(codes.size):
        cells[np.uint64(codes[i]), at] += values[i]


@kernel
def sum_float_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Float sums of vectors."""
    cells, at, width = records.view(np.float64), np.uint64(offset), np.uint64(values.shape[1])
    for i in range(codes.size):
        c = np.uint64(codes[i])
        for j in range(width):
            cells[c, at + j] += values[i, j]


@kernel
def mean_float(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Sum and number of rows, side by side, both float64."""
    cells, at, one = records.view(np.float64), np.uint64(offset), np.uint64(1)
    for i in range(codes.size):
        c = np.uint64(codes[i])
        cells[c, at] += values[i]
        cells[c, at + one] += 1.0


@kernel
def mean_float_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Sums of vectors, then the number of rows."""
    cells, at, width = records.view(np.float64), np.uint64(offset), np.uint64(values.shape[1])
    for i in range(codes.size):
        c = np.uint64(codes[i])
        for j in range(width):
            cells[c, at + j] += values[i, j]
        cells[c, at + width] += 1.0


@kernel
def sum_int(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Integer sums in int64; they wrap around beyond 64 bits, as NumPy's do."""
    at = np.uint64(offset)
    for i in range(codes.size):
        records[np.uint64(codes[i]), at] += values[i]


@kernel
def sum_int_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Integer sums of vectors."""
    at, width = np.uint64(offset), np.uint64(values.shape[1])
    for i in range(codes.size):
        c = np.uint64(codes[i])
        for j in range(width):
            records[c, at + j] += values[i, j]


@kernel
def min_float(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Smallest value; a NaN stays."""
    cells, at = records.view(np.float64), np.uint64(offset)
    for i in range(codes.size):
        c, v = np.uint64(codes[i]), np.float64(values[i])
        if v < cells[c, at] or v != v:
            cells[c, at] = v


@kernel
def max_float(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Largest value; a NaN stays."""
    cells, at = records.view(np.float64), np.uint64(offset)
    for i in range(codes.size):
        c, v = np.uint64(codes[i]), np.float64(values[i])
        if v > cells[c, at] or v != v:
            cells[c, at] = v


@kernel
def min_float_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Smallest values, element by element; written without a branch so that it vectorises."""
    cells, at, width = records.view(np.float64), np.uint64(offset), np.uint64(values.shape[1])
    for i in range(codes.size):
        c = np.uint64(codes[i])
        for j in range(width):
            v, held = np.float64(values[i, j]), cells[c, at + j]
            cells[c, at + j] = v if (v < held) | (v != v) else held


@kernel
def max_float_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Largest values, element by element."""
    cells, at, width = records.view(np.float64), np.uint64(offset), np.uint64(values.shape[1])
    for i in range(codes.size):
        c = np.uint64(codes[i])
        for j in range(width):
            v, held = np.float64(values[i, j]), cells[c, at + j]
            cells[c, at + j] = v if (v > held) | (v != v) else held


@kernel
def min_int(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Smallest integer."""
    at = np.uint64(offset)
    for i in range(codes.size):
        c = np.uint64(codes[i])
        if values[i] < records[c, at]:
            records[c, at] = values[i]


@kernel
def max_int(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Largest integer."""
    at = np.uint64(offset)
    for i in range(codes.size):
        c = np.uint64(codes[i])
        if values[i] > records[c, at]:
            records[c, at] = values[i]


@kernel
def min_int_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Smallest integers, element by element."""
    at, width = np.uint64(offset), np.uint64(values.shape[1])
    for i in range(codes.size):
        c = np.uint64(codes[i])
        for j in range(width):
            v, held = np.int64(values[i, j]), records[c, at + j]
            records[c, at + j] = v if v < held else held


@kernel
def max_int_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Largest integers, element by element."""
    at, width = np.uint64(offset), np.uint64(values.shape[1])
    for i in range(codes.size):
        c = np.uint64(codes[i])
        for j in range(width):
            v, held = np.int64(values[i, j]), records[c, at + j]
            records[c, at + j] = v if v > held else held


@kernel
def merge_sum_float(
    records: Array, offset: int, slots: Array, partial: Array, first: int, width: int
) -> None:
    """Add float words."""
    cells, parts = records.view(np.float64), partial.view(np.float64)
    at, start, wide = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        for j in range(wide):
            cells[c, at + j] += parts[i, start + j]


@kernel
def merge_sum_int(records: Array, offset: int, slots: Array, partial: Array, first: int, width: int) -> None:
    """Add int64 words."""
    at, start, wide = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        for j in range(wide):
            records[c, at + j] += partial[i, start + j]


@kernel
def merge_min_float(
    records: Array, offset: int, slots: Array, partial: Array, first: int, width: int
) -> None:
    """Smallest of float words; NaN stays."""
    cells, parts = records.view(np.float64), partial.view(np.float64)
    at, start, wide = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        for j in range(wide):
            v = parts[i, start + j]
            if v < cells[c, at + j] or v != v:
                cells[c, at + j] = v


@kernel
def merge_max_float(
    records: Array, offset: int, slots: Array, partial: Array, first: int, width: int
) -> None:
    """Largest of float words; NaN stays."""
    cells, parts = records.view(np.float64), partial.view(np.float64)
    at, start, wide = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        for j in range(wide):
            v = parts[i, start + j]
            if v > cells[c, at + j] or v != v:
                cells[c, at + j] = v


@kernel
def merge_min_int(records: Array, offset: int, slots: Array, partial: Array, first: int, width: int) -> None:
    """Smallest of int64 words."""
    at, start, wide = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        for j in range(wide):
            if partial[i, start + j] < records[c, at + j]:
                records[c, at + j] = partial[i, start + j]


@kernel
def merge_max_int(records: Array, offset: int, slots: Array, partial: Array, first: int, width: int) -> None:
    """Largest of int64 words."""
    at, start, wide = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        for j in range(wide):
            if partial[i, start + j] > records[c, at + j]:
                records[c, at + j] = partial[i, start + j]


@kernel
def var_float(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Welford's update of count, mean and sum of squared deviations (Technometrics 4, 1962)."""
    cells, at, one, two = records.view(np.float64), np.uint64(offset), np.uint64(1), np.uint64(2)
    for i in range(codes.size):
        c, v = np.uint64(codes[i]), np.float64(values[i])
        n = cells[c, at] + 1.0
        delta = v - cells[c, at + one]
        mean = cells[c, at + one] + delta / n
        cells[c, at] = n
        cells[c, at + one] = mean
        cells[c, at + two] += delta * (v - mean)


@kernel
def var_float_rows(records: Array, offset: int, codes: Array, values: Array) -> None:
    """Welford's update, element by element: one count, ``d`` means, ``d`` sums of squared deviations."""
    cells, width = records.view(np.float64), np.uint64(values.shape[1])
    count, mean_at = np.uint64(offset), np.uint64(offset) + np.uint64(1)
    square_at = mean_at + width
    for i in range(codes.size):
        c = np.uint64(codes[i])
        n = cells[c, count] + 1.0
        cells[c, count] = n
        for j in range(width):
            v, held = np.float64(values[i, j]), cells[c, mean_at + j]
            mean = held + (v - held) / n
            cells[c, mean_at + j] = mean
            cells[c, square_at + j] += (v - held) * (v - mean)


@kernel
def merge_var(records: Array, offset: int, slots: Array, partial: Array, first: int, width: int) -> None:
    """The pairwise update of Chan, Golub and LeVeque (1983) of two (count, means, squares) of ``width``
    elements."""
    cells, parts = records.view(np.float64), partial.view(np.float64)
    at, start, wide, one = np.uint64(offset), np.uint64(first), np.uint64(width), np.uint64(1)
    for i in range(slots.size):
        c, ours, theirs = np.uint64(slots[i]), 0.0, parts[i, start]
        if theirs == 0.0:
            continue
        ours = cells[c, at]
        total = ours + theirs
        cells[c, at] = total
        for j in range(wide):
            mean, square = at + one + j, at + one + wide + j
            other_mean, other_square = parts[i, start + one + j], parts[i, start + one + wide + j]
            if ours == 0.0:  # an exact copy: mean + (other - mean) would round
                cells[c, mean], cells[c, square] = other_mean, other_square
                continue
            delta = other_mean - cells[c, mean]
            cells[c, mean] += delta * (theirs / total)
            cells[c, square] += other_square + delta * delta * (ours / total * theirs)


@kernel
def largest_change(old: Array, new: Array) -> Any:
    """The largest absolute difference of float64 ``(n,)`` values; NaN where any is."""
    largest = 0.0
    for i in range(old.size):
        change = abs(new[i] - old[i])
        if not change <= largest:
            if change != change:
                return change
            largest = change
    return largest


@kernel
def _few_changes(old: Array, new: Array, lo: int, n: int) -> Any:
    """The sum of at most 128 absolute differences from ``lo`` on, in eight lanes."""
    total, end = 0.0, lo
    if n >= 8:
        a, b = abs(new[lo] - old[lo]), abs(new[lo + 1] - old[lo + 1])
        c, d = abs(new[lo + 2] - old[lo + 2]), abs(new[lo + 3] - old[lo + 3])
        e, f = abs(new[lo + 4] - old[lo + 4]), abs(new[lo + 5] - old[lo + 5])
        g, h = abs(new[lo + 6] - old[lo + 6]), abs(new[lo + 7] - old[lo + 7])
        end = lo + n - n % 8
        for i in range(lo + 8, end, 8):
            a += abs(new[i] - old[i])
            b += abs(new[i + 1] - old[i + 1])
            c += abs(new[i + 2] - old[i + 2])
            d += abs(new[i + 3] - old[i + 3])
            e += abs(new[i + 4] - old[i + 4])
            f += abs(new[i + 5] - old[i + 5])
            g += abs(new[i + 6] - old[i + 6])
            h += abs(new[i + 7] - old[i + 7])
        total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for i in range(end, lo + n):
        total += abs(new[i] - old[i])
    return total


@kernel
def total_change(old: Array, new: Array) -> Any:
    """The sum of absolute differences of float64 ``(n,)`` values: one pass and no temporary, yet the bits of
    `numpy.add.reduce` of them, which halves what is more than 128 values and adds the halves.
    """
    lo, n, depth = 0, old.size, 0
    if n <= 128:
        return _few_changes(old, new, 0, n)
    lefts, rights = np.empty(64), np.empty(64, np.int64)  # of the halvings under way; 0: on its right half
    while True:
        while n > 128:
            half = n // 2
            half -= half % 8
            rights[depth] = n - half
            depth, n = depth + 1, half
        total = _few_changes(old, new, lo, n)
        lo += n
        while depth > 0 and rights[depth - 1] == 0:
            depth -= 1
            total = lefts[depth] + total
        if depth == 0:
            return total
        lefts[depth - 1], n, rights[depth - 1] = total, rights[depth - 1], 0


@kernel
def sum_afresh(cells: Array, codes: Array, values: Array) -> None:
    """Zeros, then scalars added: ``cells`` of shape ``(groups, 1)`` in the dtype of the sum."""
    cells[:] = 0
    for i in range(codes.size):
        cells[np.uint64(codes[i]), 0] += values[i]


@kernel
def sum_slots(parts: Array, slots: Array, out: Array) -> None:
    """Zeros, then ``parts``, ``(n, 1)``, added where their slots say; ``out`` ``(groups,)``."""
    out[:] = 0
    for i in range(slots.size):
        out[np.uint64(slots[i])] += parts[i, 0]
