"""Exact float sums: one fixed-point integer that spans all of float64, as words that add.

Radford Neal's small superaccumulator ("Fast exact summation using small and large superaccumulators", 2015),
with digits of 32 bits: word ``i`` counts multiples of ``2**(32 i - 1074)``. A float64 touches at most three
words. Two words more count what no sum can undo: +inf and -inf (a NaN counts as both). Words are carried into
[0, 2**32) after every batch of rows (the last digit keeps the sign), so records merge by integer additions,
in any order, and equal sums have equal words. The result is rounded once, so it is `math.fsum`'s; where that
raises, it is infinite or NaN.

Right for few sums of many values: a record is `WORDS` words. Many sums: `iterreduce.columns.binned`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from iterreduce.columns.binned import BITS, MAGNITUDE, SLOW_BIN, bits_of, cut_off, cuts, likely_bin
from iterreduce.columns.binned_alone import BLOCK, largest_bits
from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array

DIGITS = 67  # 2098 bits of float64, and room for 2**46 of the largest
POSITIVE, NEGATIVE = DIGITS, DIGITS + 1
WORDS = DIGITS + 2
MOST_ROWS = 1 << 28  # between two carries: each adds less than 2**34 to a word
LEAST_EXPONENT = 1074
LOW32 = (1 << 32) - 1


@kernel
def carry(records: Any, c: Any, at: Any) -> None:
    """Bring the digits of a sum back into [0, 2**32)."""
    over = 0
    for j in range(DIGITS - 1):
        digit = records[c, at + j] + over
        records[c, at + j] = digit & LOW32
        over = digit >> 32
    records[c, at + DIGITS - 1] += over


@kernel
def _add_digits(records: Any, c: Any, at: Any, size: Any, shift: Any, sign: Any) -> None:
    """Add an integer of less than 64 bits, some of them above a digit's lowest."""
    low, high = (size & LOW32) << shift, (size >> 32) << shift
    records[c, at] += sign * (low & LOW32)
    records[c, at + 1] += sign * ((low >> 32) + (high & LOW32))
    records[c, at + 2] += sign * (high >> 32)


@kernel
def add_exactly(records: Any, offset: Any, codes: Any, values: Any) -> None:
    """Add each value to the sum of its record."""
    for i in range(codes.size):
        c, x = codes[i], np.float64(values[i])
        bits = np.float64(x).view(np.int64)
        exponent, mantissa = bits >> 52 & 0x7FF, bits & ((1 << 52) - 1)
        if exponent == 0x7FF:
            records[c, offset + POSITIVE] += not x < 0
            records[c, offset + NEGATIVE] += not x > 0
            continue
        if exponent:
            mantissa |= 1 << 52
            exponent -= 1
        at, sign = offset + (exponent >> 5), 1 if bits >= 0 else -1
        _add_digits(records, c, at, mantissa, exponent & 31, sign)


@kernel
def _add_limb(records: Any, offset: Any, bin_: Any, limb: Any) -> None:
    """Add a bin's integer to the first record."""
    position = bin_ * BITS
    _add_digits(records, 0, offset + (position >> 5), abs(limb), position & 31, 1 if limb >= 0 else -1)


@kernel
def add_all_exactly(records: Any, offset: Any, values: Any) -> None:
    """`add_exactly` where all values are those of the first record.

    Those of a block are cut into three bins together, in a loop that vectorises; so is what is left of them,
    until nothing is.
    """
    rest, codes = np.empty(BLOCK), np.zeros(BLOCK, np.int8)
    for lo in range(0, values.size, BLOCK):
        n = min(BLOCK, values.size - lo)
        for i in range(n):
            rest[i] = values[lo + i]
        largest = largest_bits(rest[:n])
        while largest:
            bin_: Any = likely_bin(np.int64(largest).view(np.float64))
            if bin_ >= SLOW_BIN:
                add_exactly(records, offset, codes[:n], rest[:n])
                break
            _, first, second, third = cuts(bin_)
            high, middle, low, largest = 0, 0, 0, 0
            for i in range(n):
                a, b, c, left = cut_off(rest[i], first, second, third)
                high, middle, low, rest[i] = high + a, middle + b, low + c, left
                largest = max(largest, bits_of(left) & MAGNITUDE)
            _add_limb(records, offset, bin_, high)
            _add_limb(records, offset, bin_ - 1, middle)
            _add_limb(records, offset, bin_ - 2, low)


@kernel
def carry_all(records: Any, offset: Any, codes: Any) -> None:
    """Carry the sums that rows were added to."""
    if codes.size < len(records):
        for i in range(codes.size):
            carry(records, codes[i], offset)
    else:
        for c in range(len(records)):
            carry(records, c, offset)


@kernel
def merge_exactly(records: Any, offset: Any, slots: Any, partial: Any, first: Any) -> None:
    """Add each partial sum to the sum of its slot."""
    for i in range(slots.size):
        for j in range(WORDS):
            records[slots[i], offset + j] += partial[i, first + j]
        carry(records, slots[i], offset)


def total(words: Sequence[int]) -> float:
    """The float64 nearest to a sum.

    >>> total([1] + [0] * 66 + [0, 0]) == 2.0**-1074
    True
    """
    *digits, up, down = (int(w) for w in words)
    if up or down:
        return float("nan") if up and down else float("inf") if up else float("-inf")
    number = sum(digit << 32 * i for i, digit in enumerate(digits))
    try:
        return number / (1 << LEAST_EXPONENT)  # of two integers: rounded once
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")


def exact_words(values: Array) -> Array:
    """The words of the sum of some values, int64 of shape ``(WORDS,)``."""
    record = np.zeros((1, WORDS), np.int64)
    for lo in range(0, len(values), MOST_ROWS):
        add_all_exactly(record, 0, values[lo : lo + MOST_ROWS])
        carry(record, 0, 0)
    words: Array = record[0]
    return words


def exact_sum(values: Array) -> float:
    """The correctly rounded sum, whatever the order: `math.fsum`, but infinite or NaN where that raises.

    >>> exact_sum(np.array([1e100, 1.0, -1e100]))
    1.0
    """
    return total(exact_words(values).tolist())
