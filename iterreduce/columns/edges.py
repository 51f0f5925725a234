"""Lines of a graph to edges: the compiled loop under edge lists and MatrixMarket files.

`parse_edges` reads ``src dst [weight]`` apart by any white space; lines that begin with ``#`` or ``%`` and
blank lines are passed over. It sees one buffer of whole lines: where files and ranks cut, whether ids are
numbers or text, and of which type weights are, is decided in `iterreduce.sources`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.cells import BIG, INT, NEWLINE, SLOW, TEXT, read_numeral
from iterreduce.columns.jit import kernel

# How a parse ended. LEFT_TO_CALLER: the last row's weight is SLOW or BIG, and wanted as a float.
DONE, RAGGED_LINE, BAD_ID, BAD_WEIGHT, LEFT_TO_CALLER = 0, 1, 2, 3, 4
# What ids may be: integers or text (both are noted), integers only, or text (where it stands is noted).
EITHER, INTEGERS, PLACES = 0, 1, 2
# What weights are wanted as: integers, float64 bits, or not at all (nobody looks at what they are).
WHOLE, FLOATS, UNREAD = 0, 1, 2

HASH, PERCENT = 35, 37
# Digits that fit an int64 whatever they are.
SAFE_DIGITS = 18


@kernel
def is_blank(c: Any) -> Any:
    """Whether a byte is white space that ends no line."""
    return c == 32 or (9 <= c <= 13 and c != NEWLINE)


@kernel
def _cell_end(text: Any, at: Any) -> Any:
    while at < len(text) and text[at] != NEWLINE and not is_blank(text[at]):
        at += 1
    return at


@kernel
def _next_cell(text: Any, at: Any) -> Any:
    while at < len(text) and is_blank(text[at]):
        at += 1
    return at


@kernel
def _line_end(text: Any, at: Any) -> Any:
    while at < len(text) and text[at] != NEWLINE:
        at += 1
    return at


@kernel
def count_cells(text: Any, at: Any) -> Any:
    """Cells from here to the end of the line."""
    found = 0
    at = _next_cell(text, at)
    while at < len(text) and text[at] != NEWLINE:
        found += 1
        at = _next_cell(text, _cell_end(text, at))
    return found


@kernel
def _read_id(text: Any, at: Any) -> Any:
    """(is an int64, its value, where the cell ends)."""
    first = at
    negative = text[at] == 45
    if negative:
        at += 1
    begin, value = at, np.int64(0)
    while at < len(text) and 48 <= text[at] <= 57:
        value = value * 10 + (np.int64(text[at]) - 48)
        at += 1
    whole = at == len(text) or text[at] == NEWLINE or is_blank(text[at])
    if whole and 0 < at - begin <= SAFE_DIGITS:
        return True, -value if negative else value, at
    at = _cell_end(text, at)
    kind, word = read_numeral(text, first, at)
    return kind == INT, np.int64(word), at


@kernel
def _plain_number(text: Any, at: Any) -> Any:
    """(an int64 of at most SAFE_DIGITS, behind it, digits): no bounds are checked, a newline ends it."""
    negative = text[at] == 45
    if negative:
        at += 1
    begin, value = at, np.int64(0)
    while True:
        digit = np.int64(text[at]) - 48
        if np.uint64(digit) > np.uint64(9):
            break
        value = value * 10 + digit
        at += 1
    return -value if negative else value, at, at - begin


@kernel
def _plain_lines(
    text: Any,
    at: Any,
    safe: Any,
    cells: Any,
    weights: Any,
    records: Any,
    src: Any,
    dst: Any,
    weight: Any,
    row: Any,
) -> Any:
    """Lines of short integers as far as there are such: (rows, where the first other line begins).

    Three times as fast as the careful loop below. `safe`: behind the last newline, which ends every loop.
    """
    while at < safe and row < len(records):
        record = at
        first, end, digits = _plain_number(text, at)
        if digits == 0 or digits > SAFE_DIGITS:
            return row, record
        at = end
        while is_blank(text[at]):
            at += 1
        second, behind, digits = _plain_number(text, at)
        if at == end or digits == 0 or digits > SAFE_DIGITS:
            return row, record
        at = behind
        if cells == 3:
            while is_blank(text[at]):
                at += 1
            if weights == UNREAD:
                end = at
                while text[end] != NEWLINE and not is_blank(text[end]):
                    end += 1
                if at == behind or end == at:
                    return row, record
            else:
                third, end, digits = _plain_number(text, at)
                if at == behind or digits == 0 or digits > SAFE_DIGITS:
                    return row, record
                weight[row] = np.float64(third).view(np.uint64) if weights == FLOATS else np.uint64(third)
            at = end
        while is_blank(text[at]):
            at += 1
        if text[at] != NEWLINE:
            return row, record
        records[row], src[row], dst[row] = record, first, second
        row += 1
        at += 1
    return row, at


@kernel
def parse_edges(
    text: Any,
    at: Any,
    cells: Any,
    ids: Any,
    weights: Any,
    records: Any,
    src: Any,
    dst: Any,
    weight: Any,
    places: Any,
    flags: Any,
) -> Any:
    """Read lines of `text` from byte `at`, as many as `records` has room for.

    `cells` of each line: 2 or 3; `ids`: EITHER, INTEGERS or PLACES; `weights`: WHOLE, FLOATS or
    UNREAD. ``records`` (rows,) int64 gets where the line of each edge begins; ``src``, ``dst`` int64
    and ``weight`` uint64 its numbers; ``places`` (rows, 4), for PLACES, where its ids begin and end.
    ``flags[0]``: bit 1 for ids that are integers, 2 for others; ``flags[1]``: ``1 << kind`` of weights.
    Returns (rows filled, where the parse stopped, status, cells or the place of a cell).
    """
    row, stop = 0, len(text)
    safe = stop
    while safe > at and text[safe - 1] != NEWLINE:
        safe -= 1
    while at < stop and row < len(records):
        if ids != PLACES:
            before = row
            row, at = _plain_lines(text, at, safe, cells, weights, records, src, dst, weight, row)
            if row > before:
                flags[0] |= 1
                flags[1] |= 1 << INT if cells == 3 and weights != UNREAD else 0
            if at >= stop or row >= len(records):
                break
        record = at
        at = _next_cell(text, at)
        if at >= stop or text[at] == NEWLINE:
            at += 1
            continue
        if text[at] == HASH or text[at] == PERCENT:
            at = _line_end(text, at) + 1
            continue
        whole, number, end = _read_id(text, at)
        flags[0] |= 1 if whole else 2
        if not whole and ids == INTEGERS:
            return row, record, BAD_ID, at
        src[row] = number
        if ids == PLACES:
            places[row, 0], places[row, 2] = at, end
        at = _next_cell(text, end)
        if at >= stop or text[at] == NEWLINE:
            return row, record, RAGGED_LINE, 1
        whole, number, end = _read_id(text, at)
        flags[0] |= 1 if whole else 2
        if not whole and ids == INTEGERS:
            return row, record, BAD_ID, at
        dst[row] = number
        if ids == PLACES:
            places[row, 1], places[row, 3] = at, end
        at = _next_cell(text, end)
        status, found = DONE, at
        if cells == 3 and at < stop and text[at] != NEWLINE:
            end = _cell_end(text, at)
            if weights != UNREAD:
                kind, word = read_numeral(text, at, end)
                if kind == TEXT:
                    return row, record, BAD_WEIGHT, at
                flags[1] |= 1 << kind
                if weights == FLOATS and kind == INT:
                    word = np.float64(np.int64(word)).view(np.uint64)
                elif weights == FLOATS and kind in (SLOW, BIG):
                    status = LEFT_TO_CALLER
                weight[row] = word
            at = _next_cell(text, end)
        elif cells == 3:
            return row, record, RAGGED_LINE, 2
        if at < stop and text[at] != NEWLINE:
            return row, record, RAGGED_LINE, count_cells(text, record)
        records[row] = record
        row += 1
        at += 1
        if status != DONE:
            return row, min(at, stop), status, found
    return row, min(at, stop), DONE, 0
