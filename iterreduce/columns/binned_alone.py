"""Order-free sums of many values into one record: a distance, a total, a table of one key.

The second twin of `iterreduce.columns.binned`, which explains the words. A record is a function of the
multiset of its values, so those of a block are cut together, for the largest among them, in loops that
vectorise, and the record is touched once for each block.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.binned import (
    LIMBS,
    MAGNITUDE,
    NONFINITE,
    SHIFT,
    SLOW_BIN,
    bits_of,
    cut_off,
    cuts,
    likely_bin,
    put,
    raise_bin,
    top_bin,
)
from iterreduce.columns.jit import kernel

BLOCK = 2048  # values: they and a copy stay in the first cache


@kernel
def largest_bits(values: Any) -> Any:
    """The bits of the largest absolute value; those of infinity and NaN are above all others."""
    largest: Any = 0
    for i in range(values.size):
        largest = max(largest, bits_of(np.float64(values[i])) & MAGNITUDE)
    return largest


@kernel
def _add_block(records: Any, at: Any, values: Any) -> None:
    """Add some values to the sum of the first record."""
    first, one = np.uint64(0), np.uint64(1)
    largest = largest_bits(values)
    if largest == 0:
        return
    held, wanted = top_bin(records, first, at, one), likely_bin(np.int64(largest).view(np.float64))
    if max(held, wanted) >= SLOW_BIN:
        for i in range(values.size):
            put(records, first, at, one, LIMBS, values[i])
        return
    if wanted > held:
        raise_bin(records, first, at, one, LIMBS, held, wanted)
        held = wanted
    _, constant, constant1, constant2 = cuts(held)
    high, middle, low = 0, 0, 0
    for i in range(values.size):
        a, b, c, _ = cut_off(values[i], constant, constant1, constant2)
        high, middle, low = high + a, middle + b, low + c
    records[first, at] += high << SHIFT
    records[first, at + one] += middle << SHIFT
    records[first, at + one + one] += low << SHIFT


@kernel
def sum_alone(records: Any, offset: Any, values: Any) -> None:
    """`iterreduce.columns.binned.sum_binned` where all rows are those of the first record."""
    for lo in range(0, values.size, BLOCK):
        _add_block(records, np.uint64(offset), values[lo : lo + BLOCK])


@kernel
def sum_changes(records: Any, old: Any, new: Any) -> bool:
    """Sum absolute differences into the first record, three words; False where one is no number."""
    changes, one = np.empty(BLOCK), np.uint64(1)
    for lo in range(0, new.size, BLOCK):
        n = min(BLOCK, new.size - lo)
        for i in range(n):
            changes[i] = abs(np.float64(new[lo + i]) - np.float64(old[lo + i]))
        _add_block(records, np.uint64(0), changes[:n])
    zero = np.uint64(0)
    return bool(top_bin(records, zero, zero, one) != NONFINITE or records[zero, one + one] >> SHIFT == 0)
