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
        at, shift = offset + (exponent >> 5), exponent & 31
        low, high = (mantissa & LOW32) << shift, (mantissa >> 32) << shift
        sign = 1 if bits >= 0 else -1
        records[c, at] += sign * (low & LOW32)
        records[c, at + 1] += sign * ((low >> 32) + (high & LOW32))
        records[c, at + 2] += sign * (high >> 32)


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
    codes = np.zeros(min(len(values), MOST_ROWS), np.int8)
    for lo in range(0, len(values), MOST_ROWS):
        piece = values[lo : lo + MOST_ROWS]
        add_exactly(record, 0, codes[: len(piece)], piece)
        carry(record, 0, 0)
    words: Array = record[0]
    return words


def exact_sum(values: Array) -> float:
    """The correctly rounded sum, whatever the order: `math.fsum`, but infinite or NaN where that raises.

    >>> exact_sum(np.array([1e100, 1.0, -1e100]))
    1.0
    """
    return total(exact_words(values).tolist())
