"""Random numbers that are a pure function of (seed, stream, iteration, row): Philox4x32-10.

A counter-based generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
2011): no state, so nothing to save in a checkpoint, and the numbers depend on neither ranks nor blocks nor
order. The seed is the 64-bit key; the counter is row (64 bits), iteration (32), stream (32); one block of 128
bits per row. It is not for cryptography, and not NumPy's ``Philox`` (which is 4x64). Samplers, seeds and user
functions speak to it.

``stream`` tells apart uses of one seed: a number below 2**32, or a name (its CRC-32). ``rows`` are global row
numbers or integer keys: any integer array of shape ``(n,)``, negative ones by their 64-bit pattern. For
several numbers per row, use several streams, or rows ``row * d + j``.
"""

from __future__ import annotations

import math
import operator
import zlib
from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError

# Multipliers and Weyl constants of Philox4x32 (Salmon et al., 2011, section 4.3)
MULTIPLY_0, MULTIPLY_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
ROUNDS = 10
FRACTION_SHIFT = np.uint64(11)  # 64 - 53 bits of a double's fraction
FRACTION_UNIT = 2.0**-53
TWO_PI = 2.0 * math.pi
TABLE_MULTIPLY = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: spreads positions over a table


@kernel
def philox(seed: Any, stream: Any, iteration: Any, row: Any) -> Any:
    """One block: the words (0, 1) and (2, 3) of Philox4x32-10, each pair as a uint64, lower word first.

    32-bit words are kept in uint64, so that the compiler sees 32 x 32 -> 64 bit products and vectorises.
    """
    k0, k1 = seed & LOW, seed >> HALF
    c0, c1, c2, c3 = row & LOW, row >> HALF, iteration, stream
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLY_0 * c0, MULTIPLY_1 * c2
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL_0) & LOW, (k1 + WEYL_1) & LOW
    return c0 | (c1 << HALF), c2 | (c3 << HALF)


@kernel
def fill_words(seed: Any, stream: Any, iteration: Any, rows: Array, out: Array) -> None:
    """The lower half of each row's block."""
    for i in range(rows.size):
        out[i] = philox(seed, stream, iteration, rows[i])[0]


@kernel
def fill_uniform(seed: Any, stream: Any, iteration: Any, rows: Array, out: Array) -> None:
    """The upper 53 bits of each word, as a fraction."""
    for i in range(rows.size):
        word = philox(seed, stream, iteration, rows[i])[0]
        out[i] = np.float64(np.int64(word >> FRACTION_SHIFT)) * FRACTION_UNIT


@kernel
def fill_normal(seed: Any, stream: Any, iteration: Any, rows: Array, out: Array) -> None:
    """Box and Muller (1958), cosine branch: radius from the lower half of the block, angle from the upper."""
    for i in range(rows.size):
        low, high = philox(seed, stream, iteration, rows[i])
        above_zero = (
            np.float64(np.int64(low >> FRACTION_SHIFT)) + 1.0
        ) * FRACTION_UNIT  # (0, 1]: its log is finite
        angle = np.float64(np.int64(high >> FRACTION_SHIFT)) * (FRACTION_UNIT * TWO_PI)
        out[i] = math.sqrt(-2.0 * math.log(above_zero)) * math.cos(angle)


@kernel
def scaled(word: Any, span: Any) -> Any:
    """The upper 64 bits of ``word * span``: a number below ``span`` (Lemire, 2019, without the rejection)."""
    a, b, c, d = word >> HALF, word & LOW, span >> HALF, span & LOW
    low = b * d
    middle = a * d + (low >> HALF)
    other = b * c + (middle & LOW)
    return a * c + (middle >> HALF) + (other >> HALF)


@kernel
def fill_integers(
    seed: Any, stream: Any, iteration: Any, rows: Array, low: Any, span: Any, out: Array
) -> None:
    """``low`` + a number below ``span``."""
    for i in range(rows.size):
        word = philox(seed, stream, iteration, rows[i])[0]
        out[i] = np.int64(low + scaled(word, span))


@kernel
def swapped(table: Array, place: Any, mask: Any, shift: Any) -> Any:
    """Where ``place`` stands in the open-addressing ``table`` of pairs (place + 1, what stands there), or
    would."""
    slot = (place * TABLE_MULTIPLY) >> shift
    while table[slot, 0] != 0 and table[slot, 0] != place + np.uint64(1):
        slot = (slot + np.uint64(1)) & mask
    return slot


@kernel
def shuffle_head(seed: Any, stream: Any, population: Any, table: Array, shift: Any, out: Array) -> None:
    """The first places of a Fisher-Yates shuffle of ``0 .. population - 1``; only moved places are stored."""
    one, mask = np.uint64(1), np.uint64(table.shape[0] - 1)
    zero = np.uint64(0)
    for i in range(out.size):
        here = np.uint64(i)
        there = here + scaled(philox(seed, stream, zero, here)[0], population - here)
        slot = swapped(table, there, mask, shift)
        out[i] = np.int64(table[slot, 1] if table[slot, 0] != zero else there)
        own = swapped(table, here, mask, shift)
        moved = table[own, 1] if table[own, 0] != zero else here
        table[slot, 0], table[slot, 1] = there + one, moved


def stream_number(stream: int | str) -> int:
    """The 32-bit number of a stream; a name stands for its CRC-32."""
    if isinstance(stream, str):
        return zlib.crc32(stream.encode())
    return _bits(stream, 32, "stream")


def _bits(value: Any, width: int, name: str) -> int:
    try:
        number: int = operator.index(value)
    except TypeError:
        raise UsageError(f"{name}: wanted an integer, got {value!r}") from None
    if not 0 <= number < 1 << width:
        raise UsageError(f"{name} = {number}: wanted 0 <= {name} < 2**{width}")
    return number


def _address(seed: int, stream: int | str, iteration: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    key, number, step = _bits(seed, 64, "seed"), stream_number(stream), _bits(iteration, 32, "iteration")
    return np.uint64(key), np.uint64(number), np.uint64(step)


def _rows(rows: Any) -> Array:
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise UsageError(f"rows: wanted integers of shape (n,), got {numbers.dtype} {numbers.shape}")
    return np.ascontiguousarray(numbers, np.int64 if numbers.dtype.kind == "i" else np.uint64).view(np.uint64)


def words(seed: int, stream: int | str, iteration: int, rows: Array) -> Array:
    """64 random bits per row: uint64 of shape ``(n,)``.

    ``seed`` below 2**64, ``iteration`` below 2**32, ``rows`` integers of shape ``(n,)``. Raises `UsageError`.

    >>> whole = words(7, "noise", 3, np.arange(100))
    >>> bool((whole[60:] == words(7, "noise", 3, np.arange(60, 100))).all())
    True
    """
    at = _rows(rows)
    out = np.empty(len(at), np.uint64)
    fill_words(*_address(seed, stream, iteration), at, out)
    return out


def uniform(seed: int, stream: int | str, iteration: int, rows: Array) -> Array:
    """Multiples of 2**-53 in [0, 1), each as likely: float64 of shape ``(n,)``. Arguments as in `words`.

    >>> uniform(0, 0, 0, np.arange(2)).shape
    (2,)
    """
    at = _rows(rows)
    out = np.empty(len(at), np.float64)
    fill_uniform(*_address(seed, stream, iteration), at, out)
    return out


def normal(seed: int, stream: int | str, iteration: int, rows: Array) -> Array:
    """Standard normal numbers, by Box and Muller: float64 of shape ``(n,)``, of magnitude below 8.58.

    Their last bits depend on the mathematics library of the host (log, cos). Arguments as in `words`.

    >>> bool(abs(normal(0, 0, 0, np.arange(10_000)).mean()) < 0.05)
    True
    """
    at = _rows(rows)
    out = np.empty(len(at), np.float64)
    fill_normal(*_address(seed, stream, iteration), at, out)
    return out


def integers(seed: int, stream: int | str, iteration: int, rows: Array, low: int, high: int) -> Array:
    """Integers in [low, high): int64 of shape ``(n,)``.

    The 64-bit word times ``high - low``, upper half: probabilities differ from each other by at most 2**-64,
    that is relatively by ``(high - low) / 2**64``. Arguments as in `words`; ``low < high`` within int64.

    >>> integers(0, 0, 0, np.arange(5), 3, 4).tolist()
    [3, 3, 3, 3, 3]
    """
    at = _rows(rows)
    if not -(2**63) <= low < high <= 2**63:
        raise UsageError(f"integers from {low} to {high}: wanted -2**63 <= low < high <= 2**63")
    out = np.empty(len(at), np.int64)
    span = np.uint64((high - low) & (2**64 - 1))
    if high - low == 2**64:
        return words(seed, stream, iteration, at).view(np.int64)
    fill_integers(*_address(seed, stream, iteration), at, np.uint64(low & (2**64 - 1)), span, out)
    return out


def choose(seed: int, stream: int | str, population: int, k: int) -> Array:
    """``k`` distinct numbers below ``population`` in random order: int64 of shape ``(k,)``.

    The first ``k`` places of a Fisher-Yates shuffle, so ``choose(.., k)`` begins ``choose(.., k + 1)``. Time
    and memory grow with ``k`` only. Raises `UsageError` for ``k > population`` or a population over 2**63.

    >>> sorted(choose(1, "seeds", 5, 5).tolist()), len(choose(1, "seeds", 2**40, 3))
    ([0, 1, 2, 3, 4], 3)
    """
    key, number, _ = _address(seed, stream, 0)
    size, wanted = operator.index(population), operator.index(k)
    if not 0 <= wanted <= size <= 2**63:
        raise UsageError(f"choose {k} of {population}: wanted 0 <= k <= population <= 2**63")
    out = np.empty(wanted, np.int64)
    if wanted:
        bits = max(2, (2 * wanted - 1).bit_length())  # at most half full: each draw stores one place
        table = np.zeros((1 << bits, 2), np.uint64)
        shuffle_head(key, number, np.uint64(size), table, np.uint64(64 - bits), out)
    return out
