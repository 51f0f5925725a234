"""Order-free float sums in a few words: the compiled loops.

A float is cut on one fixed grid of bins, 27 bits wide, that covers all of float64: bin ``b`` counts multiples
of ``2**(27 b - 1074)``. A record keeps the top `LIMBS` bins of the largest value that it has seen: an integer
per bin, and the number of the top bin. Where a value falls on the grid depends on the value alone, and which
bins are kept depends on the largest value alone, so a record is a function of the multiset of its addends:
additions are integer additions, and merging moves a record up by whole bins. What lies below the kept bins is
rounded away value by value, at most ``2**-54`` (three limbs; four: ``2**-81``) of the largest.

This is the indexed sum of Demmel and Nguyen ("Parallel reproducible summation", IEEE Trans. Computers 64,
2015; Ahrens, Demmel and Nguyen, ACM TOMS 46, 2020), with integers in the bins instead of floats: they need no
renormalisation and take 2**34 values. A piece is cut off as they do it, by adding a constant whose last bit
has the weight of the bin.

A word holds a bin's integer times 8 and three bits of the top bin's number (0: no value yet; `NONFINITE`:
counts of +inf, -inf and NaN instead). All-zero words are the empty record. Layout: the limbs of ``width``
neighbouring sums stand apart, limb ``j`` of sum ``i`` at ``offset + j * width + i``.

Nothing here checks shapes or codes; `iterreduce.columns.exact` does, the only caller beside `fused`. It must
be compiled without reassociation, which would cancel the constants.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import inlined, kernel, prefetch

LIMBS = 3
BITS = 27  # 2 * 27 = 54 bits below the largest value's bin: a lone float64 is kept whole
SHIFT = 3  # bits of the bin's number in each of the first three words
LOW = (1 << SHIFT) - 1
NONFINITE = 511
SLOW_BIN = 76  # from here on the constants overflow: values are scaled down by four bins
MAGNITUDE = (1 << 63) - 1
HALF = 1 << 51
LIFT = BITS - 52
PACKED_BIN, PACKED_SEEN, PACKED_ROW = 127, 1 << 8, 1 << 9  # in a word of `add_packed`
PACKED_FULL, PACKED_SHIFT, PACKED_ROWS = 1 << 14, 15, 63 << 9
ODD = 3  # bits of what is not simply packed: 1 what is beyond the end, 2 what has no first limb
AHEAD = 512  # rows whose records are looked at before they are changed
OUTSIDE = 1 << 62
SAMPLE = 256  # values that choose a bin
STEP = 32  # rows: while their records are on their way, as many values are cut


@kernel
def top_bin(records: Any, c: Any, at: Any, stride: Any) -> Any:
    """The number of the top bin of one sum."""
    two = stride + stride
    low = records[c, at] & LOW
    return low | (records[c, at + stride] & LOW) << 3 | (records[c, at + two] & LOW) << 6


@kernel
def raise_bin(records: Any, c: Any, at: Any, stride: Any, limbs: Any, held: Any, to: Any) -> None:
    """Move a sum up to a higher top bin; what falls below the last limb is dropped."""
    up = to - held
    for j in range(limbs - 1, -1, -1):
        moved = records[c, at + np.uint64(j - up) * stride] & ~LOW if j >= up else 0
        records[c, at + np.uint64(j) * stride] = moved | ((to >> (SHIFT * j)) & LOW if j < 3 else 0)


@kernel
def put(records: Any, c: Any, at: Any, stride: Any, limbs: Any, value: Any) -> None:
    """Add any value to any sum."""
    x = np.float64(value)
    bits = np.float64(x).view(np.int64)
    if bits & MAGNITUDE == 0:
        return
    held = top_bin(records, c, at, stride)
    exponent = bits >> 52 & 0x7FF
    if exponent == 0x7FF:
        if held != NONFINITE:
            raise_bin(records, c, at, stride, limbs, held, NONFINITE)
        kind = 2 if x != x else 1 if x < 0 else 0
        records[c, at + np.uint64(kind) * stride] += 1 << SHIFT
        return
    if held == NONFINITE:
        return
    wanted = max((exponent + 52) // BITS, limbs - 1)
    if wanted > held:
        raise_bin(records, c, at, stride, limbs, held, wanted)
        held = wanted
    if held >= SLOW_BIN:
        x *= 2.0 ** (-4 * BITS)
        held -= 4
    constant = (held * BITS + 1) << 52 | HALF
    for j in range(limbs):
        magic = np.int64(constant).view(np.float64)
        sum_ = x + magic
        records[c, at + np.uint64(j) * stride] += (np.float64(sum_).view(np.int64) - constant) << SHIFT
        x -= sum_ - magic
        constant -= BITS << 52


@kernel
def _fits(records: Any, c: Any, at: Any, stride: Any, value: Any) -> Any:
    """Is the value below the end of the sum's top bin, and that bin none of the last ones?"""
    scaled = top_bin(records, c, at, stride) * BITS
    size = np.float64(value).view(np.int64) & MAGNITUDE
    return size < (scaled + LIFT) << 52 and scaled < SLOW_BIN * BITS


@kernel
def add_scalar(records: Any, c: Any, at: Any, stride: Any, value: Any) -> None:
    """Add a value to a sum of three limbs, the common case first."""
    x = np.float64(value)
    scaled = top_bin(records, c, at, stride) * BITS
    size = np.float64(x).view(np.int64) & MAGNITUDE
    if size >= (scaled + LIFT) << 52 or scaled >= SLOW_BIN * BITS:
        put(records, c, at, stride, LIMBS, x)
        return
    constant = (scaled + 1) << 52 | HALF
    for j in range(LIMBS):
        s = x + np.int64(constant).view(np.float64)
        records[c, at + np.uint64(j) * stride] += (np.float64(s).view(np.int64) - constant) << SHIFT
        x -= s - np.int64(constant).view(np.float64)
        constant -= BITS << 52


@inlined
def float_of(bits: Any) -> Any:
    return np.int64(bits).view(np.float64)


@inlined
def bits_of(value: Any) -> Any:
    return np.float64(value).view(np.int64)


@inlined
def cuts(held: Any) -> Any:
    """Of a top bin: the least size that is beyond its end, and the constant of each limb, all as bits."""
    constant = (held * BITS + 1) << 52 | HALF
    return (held * BITS + LIFT) << 52, constant, constant - (BITS << 52), constant - (2 * BITS << 52)


@inlined
def cut_off(value: Any, first: Any, second: Any, third: Any) -> Any:
    """The three limbs of a value that is not beyond the end, and what is left of it."""
    x = np.float64(value)
    s = x + float_of(first)
    high = bits_of(s) - first
    x -= s - float_of(first)
    s = x + float_of(second)
    middle = bits_of(s) - second
    x -= s - float_of(second)
    s = x + float_of(third)
    return high, middle, bits_of(s) - third, x - (s - float_of(third))


@inlined
def cut(value: Any, end: Any, first: Any, second: Any, third: Any) -> Any:
    """The three limbs of a value, and whether it is beyond the end: then they mean nothing."""
    high, middle, low, _ = cut_off(value, first, second, third)
    return high, middle, low, bits_of(np.float64(value)) & MAGNITUDE >= end


@kernel
def likely_bin(value: Any) -> Any:
    """The top bin of a sum of this value alone."""
    return max(((bits_of(value) >> 52 & 0x7FF) + 52) // BITS, LIMBS - 1)


@inlined
def _cut_some(
    records: Any, at: Any, slots: Any, values: Any, pieces: Any, lo: Any, count: Any, limits: Any
) -> Any:
    """Ask for some records, and cut values meanwhile: faster with a ``count`` that the compiler knows."""
    end, first, second, third = limits
    width, last = np.uint64(records.shape[1]), np.uint64(LIMBS - 1)
    for i in range(lo, lo + count):
        word = width * np.uint64(slots[i]) + at
        if width != 4:  # a record may lie on two lines of the cache
            prefetch(records, word + last)
        prefetch(records, word)
    for i in range(lo, lo + count):
        high, middle, low, outside = cut(values[i], end, first, second, third)
        pieces[0, i] = OUTSIDE if outside else high << SHIFT
        pieces[1, i], pieces[2, i] = middle << SHIFT, low << SHIFT


@kernel
def cut_ahead(records: Any, offset: Any, slots: Any, values: Any, pieces: Any, held: Any) -> Any:
    """Cut at most `AHEAD` values for a top bin, while their records, or others near them, are on their way to
    the cache; ``pieces`` int64 ``(3, AHEAD)``. The bin: 0 where none can be taken from here.
    """
    at, n = np.uint64(offset), np.uint64(slots.size)
    bin_: Any = held if held else likely_bin(values[0])
    limits, bin_ = cuts(min(bin_, SLOW_BIN - 1)), bin_ if bin_ < SLOW_BIN else 0
    whole = n - n % np.uint64(STEP)
    for lo in range(np.uint64(0), whole, np.uint64(STEP)):
        _cut_some(records, at, slots, values, pieces, lo, np.uint64(STEP), limits)
    _cut_some(records, at, slots, values, pieces, whole, n - whole, limits)
    return bin_


@kernel
def add_scalars(records: Any, offset: Any, codes: Any, values: Any, pieces: Any, held: Any) -> Any:
    """Sums of scalars, cut by `cut_ahead`; the top bin of the first record.

    The pieces are right for all records that have that bin, and the others take the long way.
    """
    at, one, n = np.uint64(offset), np.uint64(1), np.uint64(codes.size)
    at1, at2 = at + one, at + one + one
    if held == 0:
        for i in range(n):
            add_scalar(records, np.uint64(codes[i]), at, one, values[i])
        return top_bin(records, np.uint64(codes[0]), at, one)
    low0, low1, low2 = held & LOW, held >> 3 & LOW, held >> 6 & LOW
    for i in range(n):
        c, high = np.uint64(codes[i]), pieces[0, i]
        a, b, d = records[c, at], records[c, at1], records[c, at2]
        if (a ^ low0 | b ^ low1 | d ^ low2) & LOW or high == OUTSIDE:
            if a | b | d == 0 and high != 0 and high != OUTSIDE:  # its first value, of this bin
                records[c, at] = high | low0
                records[c, at1] = pieces[1, i] | low1
                records[c, at2] = pieces[2, i] | low2
            else:
                add_scalar(records, c, at, one, values[i])
        else:
            records[c, at] = a + high
            records[c, at1] = b + pieces[1, i]
            records[c, at2] = d + pieces[2, i]
    return top_bin(records, np.uint64(codes[0]), at, one)


@kernel
def sum_binned(records: Any, offset: Any, codes: Any, values: Any) -> None:
    """Sums of scalars.

    The records of some rows are asked for before any is changed: additions are too long for the processor to
    look far enough ahead by itself (1M records: 26 ns per row without, 8 with).
    """
    pieces, held = np.empty((LIMBS, AHEAD), np.int64), 0
    for lo in range(0, codes.size, AHEAD):
        some, addends = codes[lo : lo + AHEAD], values[lo : lo + AHEAD]
        bin_ = cut_ahead(records, offset, some, addends, pieces, held)
        held = add_scalars(records, offset, some, addends, pieces, bin_)


@kernel
def _unpack_sums(records: Any, offset: Any, c: Any, first: Any, second: Any) -> None:
    """Add what was packed for a record, as `iterreduce.columns.binned_records` merges."""
    at, one = np.uint64(offset), np.uint64(1)
    bin_, held = second & PACKED_BIN, top_bin(records, c, at, one)
    if held == NONFINITE:
        return
    if bin_ > held:
        raise_bin(records, c, at, one, LIMBS, held, bin_)
        held = bin_
    middle = first << 32 >> 32
    limbs, up = ((first - middle) >> 32, middle, second >> PACKED_SHIFT), held - bin_
    for j in range(up, LIMBS):
        records[c, at + np.uint64(j)] += limbs[j - up] << SHIFT


@kernel
def unpack_all(records: Any, offset: Any, packed: Any, lo: Any, hi: Any, marked: Any) -> None:
    """Add what `add_packed` collected for the records from ``lo`` to ``hi``; most have nothing else yet.

    ``marked``: the first word of a record that has any row becomes 0.
    """
    at, one, zero = np.uint64(offset), np.uint64(1), np.uint64(0)
    at1, at2 = at + one, at + one + one
    for c in range(np.uint64(lo), np.uint64(hi)):
        first, second = packed[c, 0], packed[c, 1]
        none = second & PACKED_ROWS == PACKED_ROW
        if marked and (not none or second & PACKED_SEEN):
            records[c, zero] = 0
        if none:
            continue
        if records[c, at] | records[c, at1] | records[c, at2]:
            _unpack_sums(records, offset, c, first, second)
            continue
        middle = first << 32 >> 32
        records[c, at] = (first - middle) >> 32 << SHIFT | second & LOW
        records[c, at1] = middle << SHIFT | second >> 3 & LOW
        records[c, at2] = second >> PACKED_SHIFT << SHIFT | second >> 6 & 1


@kernel
def usual_bin(values: Any) -> Any:
    """The bin for `add_packed`: of some values, an eighth have it or a higher one."""
    counts, n, step = np.zeros(128, np.int64), 0, max(1, values.size // SAMPLE)
    for i in range(0, values.size, step):
        if values[i] != 0:
            counts[likely_bin(values[i])] += 1
            n += 1
    bin_, above = len(counts) - 1, counts[-1]
    while bin_ >= LIMBS and 8 * above <= n:
        bin_ -= 1
        above += counts[bin_]
    return bin_


@kernel
def pack_none(packed: Any, bin_: Any) -> None:
    """Begin with no rows."""
    for c in range(len(packed)):
        packed[c, 0], packed[c, 1] = 0, bin_ | PACKED_ROW


@inlined
def _pack_some(codes: Any, values: Any, packed: Any, pieces: Any, lo: Any, count: Any, limits: Any) -> Any:
    """Ask for some packed records, and cut values meanwhile: faster with a ``count`` that the compiler knows.
    How many are odd.
    """
    end, first, second, third = limits
    odd = 0
    for i in range(lo, lo + count):
        prefetch(packed, np.uint64(2) * np.uint64(codes[i]))
    for i in range(lo, lo + count):
        high, middle, low, outside = cut(values[i], end, first, second, third)
        kind = np.int64(outside) + 2 * np.int64(high == 0)
        odd += kind != 0
        pieces[0, i], pieces[1, i] = (high << 32) + middle, (low << PACKED_SHIFT) + (PACKED_ROW + kind)
    return odd


@kernel
def _add_odd(records: Any, at: Any, c: Any, value: Any, packed: Any, more: Any, rest: Any) -> None:
    """`add_packed` for a row that is odd, or for a record that is full."""
    was, kind = packed[c, 1], rest & ODD
    if kind & 1 or (kind and was & PACKED_ROWS == PACKED_ROW):
        packed[c, 1] = was | PACKED_SEEN
        add_scalar(records, c, at, np.uint64(1), value)
    elif was & PACKED_FULL:
        _unpack_sums(records, at, c, packed[c, 0], was)
        packed[c, 0], packed[c, 1] = more, (was & PACKED_BIN | PACKED_SEEN | PACKED_ROW) + (rest - kind)
    else:
        packed[c, 0] += more
        packed[c, 1] = was + (rest - kind)


@kernel
def add_packed(records: Any, offset: Any, codes: Any, values: Any, packed: Any, pieces: Any) -> None:
    """`add_scalars` for many rows per record: its limbs are collected in two words, which lie on one line of
    the cache, and `unpack_all` adds them. ``packed``: int64 ``(records, 2)``, as `pack_none` writes it.

    The first word is the sum of the first limb times 2**32 and of the second. The other is that of the third
    times 2**15, one more than the number of rows times 2**9, `PACKED_SEEN` where rows were added to the
    record itself, and the bin. A limb of a row is at most 2**26, so those of 31 rows fit; then they are added
    to the record. So is by itself a row that is beyond the end of the bin, and one without a first limb where
    none before had one: what is packed has a row of this bin. Where many are odd, nothing is packed.
    """
    at, n = np.uint64(offset), np.uint64(codes.size)
    limits, whole, odd = cuts(packed[0, 1] & PACKED_BIN), n - n % np.uint64(STEP), 0
    for lo in range(np.uint64(0), whole, np.uint64(STEP)):
        odd += _pack_some(codes, values, packed, pieces, lo, np.uint64(STEP), limits)
    odd += _pack_some(codes, values, packed, pieces, whole, n - whole, limits)
    if 4 * odd > codes.size:
        held = top_bin(records, np.uint64(codes[0]), at, np.uint64(1))
        held = cut_ahead(records, offset, codes, values, pieces, held)
        add_scalars(records, offset, codes, values, pieces, held)
        for i in range(n):
            packed[np.uint64(codes[i]), 1] |= PACKED_SEEN
        return
    for i in range(n):
        c, more, rest = np.uint64(codes[i]), pieces[0, i], pieces[1, i]
        was = packed[c, 1]
        if was & PACKED_FULL | rest & ODD:
            _add_odd(records, at, c, values[i], packed, more, rest)
        else:
            packed[c, 0] += more
            packed[c, 1] = was + rest


@kernel
def sum_packed(records: Any, offset: Any, codes: Any, values: Any, packed: Any) -> None:
    """`sum_binned` for many rows per record; ``packed`` is scratch, and used up."""
    pieces = np.empty((LIMBS, AHEAD), np.int64)
    for lo in range(0, codes.size, AHEAD):
        hi = min(lo + AHEAD, codes.size)
        add_packed(records, offset, codes[lo:hi], values[lo:hi], packed, pieces)
    unpack_all(records, offset, packed, 0, len(records), False)


@kernel
def sum_binned_rows(records: Any, offset: Any, codes: Any, values: Any) -> None:
    """Sums of vectors. The inner loop has no branch, so that it vectorises: values that do not fit their sums
    add nothing there and are put in afterwards.
    """
    at, stride = np.uint64(offset), np.uint64(values.shape[1])
    at1, at2 = at + stride, at + stride + stride
    for i in range(codes.size):
        c, misfits = np.uint64(codes[i]), False
        for j in range(stride):
            x, a, b, d = (
                np.float64(values[i, j]),
                records[c, at + j],
                records[c, at1 + j],
                records[c, at2 + j],
            )
            scaled = (a & LOW | (b & LOW) << 3 | (d & LOW) << 6) * BITS
            fits = (np.float64(x).view(np.int64) & MAGNITUDE < (scaled + LIFT) << 52) & (
                scaled < SLOW_BIN * BITS
            )
            misfits |= not fits
            x, scaled = (x, scaled) if fits else (np.float64(0.0), 0)
            constant = (scaled + 1) << 52 | HALF
            s = x + np.int64(constant).view(np.float64)
            records[c, at + j] = a + ((np.float64(s).view(np.int64) - constant) << SHIFT)
            x -= s - np.int64(constant).view(np.float64)
            constant -= BITS << 52
            s = x + np.int64(constant).view(np.float64)
            records[c, at1 + j] = b + ((np.float64(s).view(np.int64) - constant) << SHIFT)
            x -= s - np.int64(constant).view(np.float64)
            constant -= BITS << 52
            s = x + np.int64(constant).view(np.float64)
            records[c, at2 + j] = d + ((np.float64(s).view(np.int64) - constant) << SHIFT)
        if misfits:
            for j in range(stride):
                if not _fits(records, c, at + j, stride, values[i, j]):
                    put(records, c, at + j, stride, LIMBS, values[i, j])


@kernel
def _unpack(records: Any, offset: Any, c: Any, magic: Any, ends: Any) -> None:
    """The constant of each sum of a record, as bits, and the largest value that it cuts; 0 and 0 where values
    take the long way.
    """
    width = magic.shape[1]
    at, stride = np.uint64(offset), np.uint64(width)
    for j in range(width):
        held = top_bin(records, c, at + np.uint64(j), stride)
        known = 0 < held < SLOW_BIN
        magic[c, j] = (held * BITS + 1) << 52 | HALF if known else 0
        ends[c, j] = np.int64(((held * BITS + LIFT) << 52) - 1 if known else 0).view(np.float64)


@kernel
def _flush(records: Any, offset: Any, c: Any, magic: Any, sums: Any, rows: Any) -> None:
    """Add what was collected for a record, and forget it: the bits of each value's sum with a constant."""
    width = magic.shape[1]
    for k in range(LIMBS):
        for j in range(width):
            constant = magic[c, j] - (k * BITS << 52)
            records[c, offset + k * width + j] += (sums[c, k * width + j] - rows[c] * constant) << SHIFT
            sums[c, k * width + j] = 0
    rows[c] = 0


@kernel
def sum_binned_often(
    records: Any, offset: Any, codes: Any, values: Any, magic: Any, ends: Any, sums: Any, rows: Any
) -> None:
    """`sum_binned_rows` for records that get many rows each: their limbs are collected unpacked.

    Scratch: ``magic`` int64 and ``ends`` float64 of shape ``(records, width)``, ``sums`` int64 ``(records, 3
    width)`` and ``rows`` int64 ``(records,)``, these two all 0.
    """
    stride, at = np.uint64(values.shape[1]), np.uint64(offset)
    two = stride + stride
    for g in range(len(records)):
        _unpack(records, offset, g, magic, ends)
    for i in range(codes.size):
        c, outside = np.uint64(codes[i]), False
        for j in range(stride):
            outside |= not abs(np.float64(values[i, j])) <= ends[c, j]
        if outside:
            _flush(records, offset, c, magic, sums, rows)
            for j in range(stride):
                add_scalar(records, c, at + j, stride, values[i, j])
            _unpack(records, offset, c, magic, ends)
            continue
        rows[c] += 1
        for j in range(stride):
            x, constant = np.float64(values[i, j]), magic[c, j]
            s = x + np.int64(constant).view(np.float64)
            sums[c, j] += np.float64(s).view(np.int64)
            x -= s - np.int64(constant).view(np.float64)
            constant -= BITS << 52
            s = x + np.int64(constant).view(np.float64)
            sums[c, stride + j] += np.float64(s).view(np.int64)
            x -= s - np.int64(constant).view(np.float64)
            constant -= BITS << 52
            s = x + np.int64(constant).view(np.float64)
            sums[c, two + j] += np.float64(s).view(np.int64)
    for g in range(len(records)):
        _flush(records, offset, g, magic, sums, rows)
