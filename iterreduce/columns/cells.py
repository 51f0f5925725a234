"""Delimited text to cells and numbers, lines to text: the compiled loops under the text sources.

`parse_cells` cuts records of a CSV text into cells (quotes as in RFC 4180) and reads numerals in the same
pass; `gather_cells` copies cells out as text; `split_lines` does the same for lines. They see one buffer of
whole records: where files and ranks cut, and which type a column gets, is decided in `iterreduce.sources`.

Numerals are read exactly as Python's ``float`` does: small ones by one exact multiplication or division
(Clinger, "How to read floating point numbers accurately", 1990), others by a 128-bit product (Lemire, "Number
parsing at a gigabyte per second", 2021, section 5); the few that neither decides are marked `SLOW` for the
caller.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array, Ragged

NEWLINE, RETURN, QUOTE, SPACE, TAB = 10, 13, 34, 32, 9

# What a cell holds. BIG: an integer beyond int64. SLOW: a float left to Python. BLANK: nothing, unquoted.
BLANK, QUOTED_BLANK, INT, FLOAT, BIG, SLOW, TEXT = 0, 1, 2, 3, 4, 5, 6
DOUBLED = 64  # added to the kind of a quoted cell in which quotes stand doubled

# How a parse ended.
DONE, RAGGED_ROW, STRAY_QUOTE, AFTER_QUOTE, OPEN_QUOTE = 0, 1, 2, 3, 4

LEAST_POWER, MOST_POWER = -342, 308


def _powers_of_five() -> Array:
    """The leading 128 bits of 5**q as (high, low) words, q from -342 to 308; negative ones as reciprocals.

    Reciprocals that fit exactly into the rounding argument (q >= -27) are rounded up, as in the paper.
    """
    table = np.empty((MOST_POWER - LEAST_POWER + 1, 2), np.uint64)
    for q in range(LEAST_POWER, MOST_POWER + 1):
        power = 5 ** abs(q)
        bits = power.bit_length()
        if q >= 0:
            word = power << (128 - bits) if bits <= 128 else power >> (bits - 128)
        else:
            word = (1 << (bits + 127)) // power + (1 if q >= -27 else 0)
        table[q - LEAST_POWER] = (word >> 64, word & (2**64 - 1))
    return table


POWERS = _powers_of_five()
EXACT_TENS = 10.0 ** np.arange(23)

_U0, _U1, _U32 = np.uint64(0), np.uint64(1), np.uint64(32)
_LOW32, _ALL = np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFFFFFFFFFF)


@kernel
def _product(a: Any, b: Any) -> Any:
    """The 128-bit product of two words: (high, low)."""
    a0, a1, b0, b1 = a & _LOW32, a >> _U32, b & _LOW32, b >> _U32
    low, mid, mid2 = a0 * b0, a1 * b0, a0 * b1
    carry = (low >> _U32) + (mid & _LOW32) + (mid2 & _LOW32)
    high = a1 * b1 + (mid >> _U32) + (mid2 >> _U32) + (carry >> _U32)
    return high, (carry << _U32) | (low & _LOW32)


@kernel
def _float_bits(mantissa: Any, power: Any) -> Any:
    """(decided, bits of the float64 nearest to mantissa * 10**power), for a mantissa > 0."""
    if power < LEAST_POWER or power > MOST_POWER:
        return False, _U0
    lead = 0
    word = mantissa
    for step in (32, 16, 8, 4, 2, 1):
        if (word >> np.uint64(64 - step)) == _U0:
            word = word << np.uint64(step)
            lead += step
    high, low = _product(word, POWERS[power - LEAST_POWER, 0])
    if high & np.uint64(0x1FF) == np.uint64(0x1FF):
        more, _ = _product(word, POWERS[power - LEAST_POWER, 1])
        low = low + more
        if low < more:
            high = high + _U1
    if low == _ALL and (power < -27 or power > 55):
        return False, _U0
    upper = high >> np.uint64(63)
    shift = upper + np.uint64(9)
    bits = high >> shift
    exponent = ((217706 * power) >> 16) + 63 + np.int64(upper) - lead + 1023
    if exponent <= 0:
        return False, _U0
    halfway = low <= _U1 and -4 <= power <= 23 and (bits & np.uint64(3)) == _U1 and (bits << shift) == high
    if halfway:
        bits = bits - _U1
    bits = (bits + (bits & _U1)) >> _U1
    if bits >= np.uint64(1 << 53):
        bits = np.uint64(1 << 52)
        exponent += 1
    if exponent >= 0x7FF:
        return False, _U0
    return True, (bits & np.uint64((1 << 52) - 1)) | (np.uint64(exponent) << np.uint64(52))


@kernel
def _word_at(text: Any, lo: Any, hi: Any) -> Any:
    """nan, inf or infinity in any case: 1, 2, 2; otherwise 0."""
    n = hi - lo
    if n != 3 and n != 8:
        return 0
    a, b, c = text[lo] | 32, text[lo + 1] | 32, text[lo + 2] | 32
    if n == 3 and a == 110 and b == 97 and c == 110:
        return 1
    if a != 105 or b != 110 or c != 102:
        return 0
    if n == 3:
        return 2
    i, n2, i2, t, y = (
        text[lo + 3] | 32,
        text[lo + 4] | 32,
        text[lo + 5] | 32,
        text[lo + 6] | 32,
        text[lo + 7] | 32,
    )
    return 2 if i == 105 and n2 == 110 and i2 == 105 and t == 116 and y == 121 else 0


@kernel
def read_numeral(text: Any, lo: Any, hi: Any) -> Any:
    """(kind, word) of ``text[lo:hi]``: an int64, or the bits of a float64; blanks around it do not count."""
    while lo < hi and (text[lo] == SPACE or text[lo] == TAB):
        lo += 1
    while hi > lo and (text[hi - 1] == SPACE or text[hi - 1] == TAB):
        hi -= 1
    if lo == hi:
        return BLANK, _U0
    negative = text[lo] == 45
    at = lo + 1 if negative or text[lo] == 43 else lo
    sign = _U1 << np.uint64(63) if negative else _U0
    mantissa, digits, seen, power = _U0, 0, 0, 0
    whole = True
    while at < hi:
        c = text[at]
        if 48 <= c <= 57:
            seen += 1
            if digits or c != 48:
                digits += 1
                if digits <= 19:
                    mantissa = mantissa * np.uint64(10) + np.uint64(c - 48)
            if not whole:
                power -= 1
        elif c == 46 and whole:
            whole = False
        else:
            break
        at += 1
    if seen == 0:
        special = _word_at(text, at, hi) if whole else 0
        if special == 0:
            return TEXT, _U0
        return FLOAT, sign | np.uint64(0x7FF8000000000000 if special == 1 else 0x7FF0000000000000)
    if at == hi and whole:
        limit = np.uint64(0x7FFFFFFFFFFFFFFF) + (_U1 if negative else _U0)
        if digits > 19 or mantissa > limit:
            return BIG, _U0
        return INT, (~mantissa + _U1) if negative else mantissa
    if at < hi:
        if (text[at] | 32) != 101 or at + 1 == hi:
            return TEXT, _U0
        at += 1
        down = text[at] == 45
        if down or text[at] == 43:
            at += 1
        if at == hi:
            return TEXT, _U0
        exponent = 0
        while at < hi:
            c = text[at]
            if c < 48 or c > 57:
                return TEXT, _U0
            if exponent < 10000:
                exponent = exponent * 10 + int(c) - 48
            at += 1
        power += -exponent if down else exponent
    if digits > 19:
        return SLOW, _U0
    if mantissa == _U0:
        return FLOAT, sign
    if mantissa <= np.uint64(1 << 53) and -22 <= power <= 22:
        value = np.float64(mantissa)
        value = value / EXACT_TENS[-power] if power < 0 else value * EXACT_TENS[power]
        return FLOAT, sign | np.float64(value).view(np.uint64)
    decided, bits = _float_bits(mantissa, power)
    if not decided:
        return SLOW, _U0
    return FLOAT, sign | bits


@kernel
def parse_cells(
    text: Any,
    lo: Any,
    hi: Any,
    delimiter: Any,
    places: Any,
    records: Any,
    starts: Any,
    ends: Any,
    kinds: Any,
    words: Any,
) -> Any:
    """Cut whole records ``text[lo:hi]`` into cells, as many as the output arrays hold rows.

    ``places`` int64: of each column of the text, where its cells go in the output, or -1: they are passed
    over, and no numeral of theirs is read. ``records`` (rows,) gets where each record begins; ``starts``,
    ``ends`` int64, ``kinds`` uint8 and ``words`` uint64 have shape (rows, columns wanted). Empty lines are
    skipped. Returns (rows filled, where the parse stopped, status, cells found in a ragged row).
    """
    row, at, columns = 0, lo, len(places)
    while at < hi and row < len(kinds):
        if text[at] == NEWLINE or (text[at] == RETURN and at + 1 < hi and text[at + 1] == NEWLINE):
            at += 1 if text[at] == NEWLINE else 2
            continue
        record, column = at, 0
        while True:
            start = at
            to = places[column] if column < columns else -1
            while at < hi and text[at] != delimiter and (text[at] == SPACE or text[at] == TAB):
                at += 1
            if at < hi and text[at] == QUOTE:
                at += 1
                start, doubled = at, 0
                while True:
                    if at >= hi:
                        return row, start - 1, OPEN_QUOTE, 0
                    if text[at] == QUOTE:
                        if at + 1 < hi and text[at + 1] == QUOTE:
                            doubled = DOUBLED
                            at += 1
                        else:
                            break
                    at += 1
                end = at
                at += 1
                while at < hi and text[at] != delimiter and (text[at] == SPACE or text[at] == TAB):
                    at += 1
                if at < hi and text[at] == RETURN and (at + 1 == hi or text[at + 1] == NEWLINE):
                    at += 1
                if at < hi and text[at] != delimiter and text[at] != NEWLINE:
                    return row, at, AFTER_QUOTE, 0
                kind, word = (TEXT, _U0) if doubled or to < 0 else read_numeral(text, start, end)
                kind = (QUOTED_BLANK if start == end else TEXT) if kind == BLANK else kind
            else:
                doubled = 0
                while at < hi and text[at] != delimiter and text[at] != NEWLINE:
                    if text[at] == QUOTE:
                        return row, at, STRAY_QUOTE, 0
                    at += 1
                end = at
                if (at == hi or text[at] == NEWLINE) and end > start and text[end - 1] == RETURN:
                    end -= 1
                kind, word = (TEXT, _U0) if to < 0 else read_numeral(text, start, end)
            if to >= 0:
                starts[row, to], ends[row, to] = start, end
                kinds[row, to], words[row, to] = kind + doubled, word
            column += 1
            if at >= hi or text[at] == NEWLINE:
                break
            at += 1
        if column != columns:
            return row, record, RAGGED_ROW, column
        records[row] = record
        at = min(at + 1, hi)
        row += 1
    return row, at, DONE, 0


@kernel
def record_border(text: Any, lo: Any, inside: Any, quote: Any) -> Any:
    """(position behind the first newline outside quotes, or -1, and whether the end is inside quotes).

    `inside`: whether a quoted cell is open at `lo`; `quote`: the quote byte, or -1 if quotes mean nothing.
    """
    for at in range(lo, len(text)):
        if text[at] == quote:
            inside = not inside
        elif text[at] == NEWLINE and not inside:
            return at + 1, inside
    return -1, inside


@kernel
def _cell_lengths(text: Any, starts: Any, ends: Any, kinds: Any, offsets: Any) -> Any:
    total = 0
    for i in range(len(starts)):
        total += ends[i] - starts[i]
        if kinds[i] >= DOUBLED:
            pairs = 0
            for at in range(starts[i], ends[i]):
                pairs += text[at] == QUOTE
            total -= pairs // 2
        offsets[i + 1] = total
    return total


@kernel
def _copy_cells(text: Any, starts: Any, ends: Any, kinds: Any, out: Any) -> Any:
    to = 0
    for i in range(len(starts)):
        at = starts[i]
        while at < ends[i]:
            out[to] = text[at]
            to += 1
            at += 2 if text[at] == QUOTE and kinds[i] >= DOUBLED else 1
    return to


def gather_cells(text: Array, starts: Array, ends: Array, kinds: Array) -> Ragged:
    """The cells of one column as text, doubled quotes made single.

    >>> raw = np.frombuffer(b'to,"a""b"', np.uint8)
    >>> kinds = np.array([TEXT, TEXT + DOUBLED], np.uint8)
    >>> gather_cells(raw, np.array([0, 4]), np.array([2, 8]), kinds).to_list()
    ['to', 'a"b']
    """
    starts, ends, kinds = (np.ascontiguousarray(a) for a in (starts, ends, kinds))
    offsets = np.zeros(len(starts) + 1, np.int64)
    out = np.empty(int(_cell_lengths(text, starts, ends, kinds, offsets)), np.uint8)
    _copy_cells(text, starts, ends, kinds, out)
    return Ragged(offsets, out, "text")


@kernel
def _split(text: Any, starts: Any, offsets: Any, out: Any) -> Any:
    line, to, begin = 0, 0, 0
    for at in range(len(text)):
        c = text[at]
        if c == NEWLINE:
            if at > begin and text[at - 1] == RETURN:
                to -= 1
            starts[line] = begin
            line += 1
            offsets[line] = to
            begin = at + 1
        else:
            out[to] = c
            to += 1
    if begin < len(text):
        if text[len(text) - 1] == RETURN:
            to -= 1
        starts[line] = begin
        line += 1
        offsets[line] = to
    return line


def split_lines(text: Array) -> tuple[Ragged, Array]:
    """Lines of a text without their ends (``\\n`` or ``\\r\\n``), and where each begins, int64.

    >>> lines, starts = split_lines(np.frombuffer(b"to be\\r\\n\\nor not", np.uint8))
    >>> lines.to_list(), starts.tolist()
    (['to be', '', 'or not'], [0, 7, 8])
    """
    ends = int(np.count_nonzero(text == NEWLINE))
    count = ends + (1 if len(text) and text[-1] != NEWLINE else 0)
    starts, offsets = np.empty(count, np.int64), np.zeros(count + 1, np.int64)
    out = np.empty(len(text) - ends, np.uint8)
    _split(text, starts, offsets, out)
    return Ragged(offsets, out[: offsets[-1]], "text"), starts


@kernel
def settle_kinds(kinds: Any, flags: Any) -> Any:
    """Set bit ``1 << kind`` of ``flags[column]`` for each cell (`DOUBLED` does not count)."""
    for row in range(len(kinds)):
        for column in range(len(flags)):
            flags[column] |= 1 << (kinds[row, column] & (DOUBLED - 1))


@kernel
def integers_to_floats(kinds: Any, words: Any, columns: Any) -> Any:
    """Turn the int64 cells of these columns into float64 bits, and blank cells into NaN, in place."""
    for row in range(len(kinds)):
        for column in columns:
            kind = kinds[row, column]
            if kind == INT:
                words[row, column] = np.float64(np.int64(words[row, column])).view(np.uint64)
            elif kind <= QUOTED_BLANK:
                words[row, column] = np.uint64(0x7FF8000000000000)
