"""Order-free sums as records: how two of them merge, what comes out, and moments for a variance.

The second half of `iterreduce.columns.binned`, which explains the words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.binned import BITS, LIMBS, LOW, NONFINITE, SHIFT, put, raise_bin, top_bin
from iterreduce.columns.jit import kernel

SQUARE_LIMBS = 4  # of a variance's sums: 81 bits below the largest addend, since two sums nearly cancel
LEAST_EXPONENT = -1074
DIGIT = (1 << BITS) - 1
WHOLE = 1 << 53
ROOM = 62  # bits that are gathered before the one rounding: more than 53, less than 63


@kernel
def merge_sum(
    records: Any, c: Any, at: Any, stride: Any, limbs: Any, partial: Any, i: Any, first: Any
) -> None:
    """Add a sum of one record to that of another."""
    theirs = top_bin(partial, i, first, stride)
    if theirs == 0:
        return
    ours = top_bin(records, c, at, stride)
    if theirs > ours:
        raise_bin(records, c, at, stride, limbs, ours, theirs)
        ours = theirs
    down = ours - theirs
    for j in range(down, limbs):
        records[c, at + np.uint64(j) * stride] += partial[i, first + np.uint64(j - down) * stride] & ~LOW


@kernel
def merge_binned(records: Any, offset: Any, slots: Any, partial: Any, first: Any, width: Any) -> None:
    """Merge sums of three limbs."""
    at, start, stride = np.uint64(offset), np.uint64(first), np.uint64(width)
    for i in range(slots.size):
        c, row = np.uint64(slots[i]), np.uint64(i)
        for j in range(stride):
            merge_sum(records, c, at + j, stride, LIMBS, partial, row, start + j)


@kernel
def digits_of(records: Any, c: Any, at: Any, stride: Any, limbs: Any, digits: Any) -> bool:
    """The size of a sum in digits of one bin each, the first one longer; whether it is negative."""
    carry = 0
    for j in range(limbs - 1, -1, -1):
        limb = (records[c, at + np.uint64(j) * stride] >> SHIFT) + carry
        digits[j] = limb & DIGIT if j else limb
        carry = limb >> BITS
    if digits[0] >= 0:
        return False
    borrow = 0
    for j in range(limbs - 1, -1, -1):
        limb = borrow - digits[j]
        digits[j] = limb & DIGIT if j else limb
        borrow = limb >> BITS
    return True


@kernel
def scaled(value: float, exponent: int) -> float:
    """``value * 2**exponent`` in two steps that do not round: the product is no finer than 2**-1074."""
    half = exponent // 2
    first, second = np.int64(half + 1023) << 52, np.int64(exponent - half + 1023) << 52
    return value * np.int64(first).view(np.float64) * np.int64(second).view(np.float64)


@kernel
def rounded(digits: Any, bin_: Any) -> float:
    """The float64 nearest to the digits, ties to even; infinite above the largest."""
    total: Any = 0
    room: Any = ROOM
    unit, rest = 0, 0
    for j in range(len(digits)):
        if room >= BITS:
            total, unit = total << BITS | digits[j], j
        elif room > 0:
            cut = BITS - room
            total, unit = total << room | digits[j] >> cut, j
            rest |= digits[j] & ((1 << cut) - 1)
            return _scaled(total, rest, digits, j + 1, (bin_ - j) * BITS + cut)
        else:
            return _scaled(total, rest, digits, j, (bin_ - unit) * BITS)
        if total:
            room = ROOM - ((np.float64(total).view(np.int64) >> 52) - 1022)
    return scaled(np.float64(total), (bin_ - unit) * BITS + LEAST_EXPONENT)


@kernel
def _scaled(total: Any, rest: Any, digits: Any, j: Any, exponent: Any) -> float:
    for k in range(j, len(digits)):
        rest |= digits[k]
    return scaled(np.float64(total | (rest != 0)), exponent + LEAST_EXPONENT)


@kernel
def nonfinite(records: Any, c: Any, at: Any, stride: Any) -> float:
    """What infinities and NaN add up to."""
    up, down = records[c, at] >> SHIFT, records[c, at + stride] >> SHIFT
    if records[c, at + stride + stride] >> SHIFT or (up and down):
        return np.nan
    return np.inf if up else -np.inf


@kernel
def two_sum(x: float, y: float) -> tuple[float, float]:
    """A sum and its rounding error (Knuth)."""
    s = x + y
    t = s - x
    return s, (x - (s - t)) + (y - t)


@kernel
def added(high: Any, middle: Any, low: Any) -> float:
    """Three limbs that float64 holds as one number in units of the last: within 1.0001 half units of the last
    place, and exact where that is possible.
    """
    s, error = two_sum(np.float64(high) * 2.0 ** (2 * BITS), np.float64(middle) * 2.0**BITS)
    s, more = two_sum(s, np.float64(low))
    return s + (error + more)


@kernel
def finish_binned(records: Any, offset: Any, out: Any) -> None:
    """The sums of all records, ``out`` float64 of shape ``(records, width)``."""
    stride, digits = np.uint64(out.shape[1]), np.empty(LIMBS, np.int64)
    two = stride + stride
    for i in range(len(records)):
        for j in range(stride):
            c, at = np.uint64(i), np.uint64(offset) + j
            bin_ = top_bin(records, c, at, stride)
            if bin_ == NONFINITE:
                out[c, j] = nonfinite(records, c, at, stride)
            elif bin_ == 0:
                out[c, j] = 0.0
            else:
                high, middle, low = (
                    records[c, at] >> SHIFT,
                    records[c, at + stride] >> SHIFT,
                    records[c, at + two] >> SHIFT,
                )
                if max(abs(high), abs(middle), abs(low)) < WHOLE:
                    out[c, j] = scaled(added(high, middle, low), (bin_ - 2) * BITS + LEAST_EXPONENT)
                else:
                    negative = digits_of(records, c, at, stride, LIMBS, digits)
                    value = rounded(digits, bin_)
                    out[c, j] = -value if negative and value else value


@kernel
def _split(x: float) -> tuple[float, float]:
    """A float64 as two of 26 bits (Veltkamp)."""
    t = 134217729.0 * x
    high = t - (t - x)
    return high, x - high


@kernel
def two_product(x: float, y: float) -> tuple[float, float]:
    """A product and its rounding error (Dekker, Numerische Mathematik 18, 1971)."""
    p = x * y
    a, b = _split(x)
    c, d = _split(y)
    return p, ((a * c - p) + a * d + b * c) + b * d


@kernel
def sum_moments(records: Any, offset: Any, codes: Any, values: Any) -> None:
    """Sums of values, then of their exact squares, four limbs each; ``values`` of shape ``(n, width)``."""
    width = values.shape[1]
    at, stride = np.uint64(offset), np.uint64(width)
    squares = at + np.uint64(SQUARE_LIMBS) * stride
    for i in range(codes.size):
        c = np.uint64(codes[i])
        for j in range(stride):
            x = np.float64(values[i, j])
            put(records, c, at + j, stride, SQUARE_LIMBS, x)
            square, error = two_product(x, x)
            put(records, c, squares + j, stride, SQUARE_LIMBS, square)
            if np.isfinite(square) and error == error:
                put(records, c, squares + j, stride, SQUARE_LIMBS, error)


@kernel
def merge_moments(records: Any, offset: Any, slots: Any, partial: Any, first: Any, width: Any) -> None:
    """Merge the sums of `sum_moments`."""
    at, start, stride = np.uint64(offset), np.uint64(first), np.uint64(width)
    squares = np.uint64(SQUARE_LIMBS) * stride
    for i in range(slots.size):
        c, row = np.uint64(slots[i]), np.uint64(i)
        for j in range(stride):
            merge_sum(records, c, at + j, stride, SQUARE_LIMBS, partial, row, start + j)
            merge_sum(records, c, at + squares + j, stride, SQUARE_LIMBS, partial, row, start + squares + j)


@kernel
def _double(records: Any, c: Any, at: Any, stride: Any, digits: Any) -> tuple[float, float]:
    """A sum as an unevaluated sum of two float64 (106 bits)."""
    bin_ = top_bin(records, c, at, stride)
    if bin_ == NONFINITE:
        return nonfinite(records, c, at, stride), 0.0
    if bin_ == 0:
        return 0.0, 0.0
    negative = digits_of(records, c, at, stride, SQUARE_LIMBS, digits)
    exponent = bin_ * BITS + LEAST_EXPONENT
    high, low = two_sum(
        scaled(np.float64(digits[0] >> 32), exponent + 32),
        scaled(np.float64(digits[0] & 0xFFFFFFFF), exponent),
    )
    for j in range(1, SQUARE_LIMBS):
        high, error = two_sum(high, scaled(np.float64(digits[j]), exponent - j * BITS))
        low += error
    high, low = two_sum(high, low)
    return (-high, -low) if negative else (high, low)


@kernel
def finish_moments(records: Any, offset: Any, counts: Any, ddof: Any, out: Any) -> None:
    """``(sum of squares - (sum of values)**2 / n) / (n - ddof)``, in twice the precision; NaN of too few."""
    stride, digits = np.uint64(out.shape[1]), np.empty(SQUARE_LIMBS, np.int64)
    for i in range(len(records)):
        n = np.float64(counts[i])
        for j in range(stride):
            c, at = np.uint64(i), np.uint64(offset) + j
            s, s_low = _double(records, c, at, stride, digits)
            q, q_low = _double(records, c, at + np.uint64(SQUARE_LIMBS) * stride, stride, digits)
            if n <= ddof or s - s != 0.0:
                out[c, j] = np.nan
            elif q - q != 0.0:
                out[c, j] = np.inf  # squares of finite values beyond float64
            else:
                out[c, j] = max(0.0, _centred(s, s_low, q, q_low, n)) / (n - ddof)


@kernel
def _centred(s: float, s_low: float, q: float, q_low: float, n: float) -> float:
    mean = s / n
    p, e = two_product(mean, n)
    mean_low = ((s - p) - e + s_low) / n
    p, e = two_product(mean, s)  # (mean + mean_low) * (s + s_low)
    e += mean * s_low + mean_low * s
    d, f = two_sum(q, -p)
    return d + (f + (q_low - e))
