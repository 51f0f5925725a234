"""Numba loops that keep one row's value per group: the first, the last, the one where a key is smallest.

A record holds a word that says whether there is a row yet (``held``), for arg-folds the key of that row, then
the raw bytes of the value, padded to words. Keys are int64 whose order is the order of the column that was
asked for (`ordered_floats` makes them from floats). The callers are `iterreduce.columns.accumulators`;
conventions as in `iterreduce.columns.folds`.
"""

from __future__ import annotations

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array

LAST_KEY = np.int64(2**63 - 1)  # of a NaN: it loses against every number


@kernel
def ordered_floats(values: Array, sign: float) -> Array:
    """int64 keys in the order of ``sign * values``: -0.0 equals 0.0, and NaN comes last."""
    keys = np.empty(values.size, np.int64)
    floats = keys.view(np.float64)
    for i in range(values.size):
        v = sign * np.float64(values[i]) + 0.0
        floats[i] = v
        if v != v:
            keys[i] = LAST_KEY
        elif keys[i] < 0:
            keys[i] ^= LAST_KEY  # negative floats ascend in magnitude: turn their 63 bits around
    return keys


@kernel
def first_words(records: Array, offset: int, codes: Array, cells: Array) -> None:
    """Keep the first row of each group; ``cells`` is int64 of shape ``(n, words per value)``."""
    at, width, one = np.uint64(offset), np.uint64(cells.shape[1]), np.uint64(1)
    for i in range(codes.size):
        c = np.uint64(codes[i])
        if records[c, at] == 0:
            records[c, at] = 1
            for j in range(width):
                records[c, at + one + j] = cells[i, j]


@kernel
def last_words(records: Array, offset: int, codes: Array, cells: Array) -> None:
    """Keep the last row of each group."""
    at, width, one = np.uint64(offset), np.uint64(cells.shape[1]), np.uint64(1)
    for i in range(codes.size):
        c = np.uint64(codes[i])
        records[c, at] = 1
        for j in range(width):
            records[c, at + one + j] = cells[i, j]


@kernel
def least_words(records: Array, offset: int, codes: Array, keys: Array, cells: Array) -> None:
    """Keep the row of the smallest key of each group; of equal keys the first."""
    at, width, one, two = np.uint64(offset), np.uint64(cells.shape[1]), np.uint64(1), np.uint64(2)
    for i in range(codes.size):
        c = np.uint64(codes[i])
        if records[c, at] == 0 or keys[i] < records[c, at + one]:
            records[c, at] = 1
            records[c, at + one] = keys[i]
            for j in range(width):
                records[c, at + two + j] = cells[i, j]


@kernel
def merge_first(records: Array, offset: int, slots: Array, partial: Array, first: int, width: int) -> None:
    """Take a partial record where none is held; ``width`` counts all its words."""
    at, start, wide = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        if records[c, at] == 0 and partial[i, start] != 0:
            for j in range(wide):
                records[c, at + j] = partial[i, start + j]


@kernel
def merge_last(records: Array, offset: int, slots: Array, partial: Array, first: int, width: int) -> None:
    """Take each partial record that holds a row."""
    at, start, wide = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        if partial[i, start] != 0:
            for j in range(wide):
                records[c, at + j] = partial[i, start + j]


@kernel
def merge_least(records: Array, offset: int, slots: Array, partial: Array, first: int, width: int) -> None:
    """Take a partial record whose key is smaller than the one held."""
    at, start, wide, one = np.uint64(offset), np.uint64(first), np.uint64(width), np.uint64(1)
    for i in range(slots.size):
        c = np.uint64(slots[i])
        better = records[c, at] == 0 or partial[i, start + one] < records[c, at + one]
        if partial[i, start] != 0 and better:
            for j in range(wide):
                records[c, at + j] = partial[i, start + j]


@kernel
def _before(a: Array, b: Array, i: int, c: int, first: int, keys: int) -> bool:
    """Do the keys of row ``i`` of ``a`` stand before those of row ``c`` of ``b``, from word ``first`` on?"""
    for j in range(keys):
        if a[i, j] != b[c, first + j]:
            return bool(a[i, j] < b[c, first + j])
    return False


@kernel
def least_of_words(records: Array, offset: int, codes: Array, keys: Array, cells: Array) -> None:
    """Keep the row of the smallest keys, ``(n, m)``, of each group: which of equal ones does not matter."""
    for i in range(codes.size):
        c = codes[i]
        if records[c, offset] == 0 or _before(keys, records, i, c, offset + 1, keys.shape[1]):
            records[c, offset] = 1
            for j in range(keys.shape[1]):
                records[c, offset + 1 + j] = keys[i, j]
            for j in range(cells.shape[1]):
                records[c, offset + 1 + keys.shape[1] + j] = cells[i, j]


@kernel
def merge_least_of(records: Array, offset: int, slots: Array, partial: Array, first: int, width: int,
                   keys: int) -> None:  # fmt: skip
    """Take a partial record whose keys are smaller than those held."""
    found = partial[:, first + 1 :]
    for i in range(slots.size):
        c = slots[i]
        better = records[c, offset] == 0 or _before(found, records, i, c, offset + 1, keys)
        if partial[i, first] != 0 and better:
            for j in range(width):
                records[c, offset + j] = partial[i, first + j]


@kernel
def precedes(values: Array, a: int, a_end: int, b: int, b_end: int) -> bool:
    """Whether the bytes ``a:a_end`` stand before ``b:b_end`` in the order of bytes (a prefix comes first)."""
    for k in range(min(a_end - a, b_end - b)):
        if values[a + k] != values[b + k]:
            return bool(values[a + k] < values[b + k])
    return a_end - a < b_end - b


@kernel
def least_texts(keys: Array, values: Array, ends: Array, order: Array, offsets: Array) -> Array:
    """For each group the row of the smallest key, of equal ones that of the smallest text; -1: none."""
    rows = np.full(offsets.size - 1, -1, np.int64)
    for g in range(rows.size):
        for i in range(offsets[g], offsets[g + 1]):
            a, b = order[i], rows[g]
            if (
                b < 0
                or keys[a] < keys[b]
                or (keys[a] == keys[b] and precedes(values, ends[a], ends[a + 1], ends[b], ends[b + 1]))
            ):
                rows[g] = a
    return rows


@kernel
def least_rows(keys: Array, order: Array, offsets: Array) -> Array:
    """For each group the row (a member of ``order``) of the smallest key; -1 for an empty group."""
    rows = np.full(offsets.size - 1, -1, np.int64)
    for g in range(rows.size):
        for i in range(offsets[g], offsets[g + 1]):
            if rows[g] < 0 or keys[order[i]] < keys[rows[g]]:
                rows[g] = order[i]
    return rows


@kernel
def extreme_texts(values: Array, ends: Array, order: Array, offsets: Array, largest: bool) -> Array:
    """For each group the row of the smallest (or largest) text, by bytes; -1 for an empty group."""
    rows = np.full(offsets.size - 1, -1, np.int64)
    for g in range(rows.size):
        for i in range(offsets[g], offsets[g + 1]):
            r, held = order[i], rows[g]
            if held >= 0:
                x, y = (held, r) if largest else (r, held)
                if not precedes(values, ends[x], ends[x + 1], ends[y], ends[y + 1]):
                    continue
            rows[g] = r
    return rows
