"""Compiled loops over rows of bytes, for `iterreduce.columns.texts`: comparing, finding, cutting.

A column is data uint8, starts int64 ``(n,)`` and lengths int64 ``(n,)``.
"""

from __future__ import annotations

from typing import Any

from iterreduce.columns.jit import kernel

ANYWHERE, AT_START, AT_END = 0, 1, 2


@kernel
def compare(a: Any, a_starts: Any, a_lengths: Any, b: Any, b_starts: Any, b_lengths: Any, out: Any) -> None:
    """-1, 0 or 1 for each pair of rows, by bytes (of UTF-8: by code points)."""
    for i in range(len(out)):
        p, q, n, m = a_starts[i], b_starts[i], a_lengths[i], b_lengths[i]
        sign, k, shorter = 0, 0, min(n, m)
        while k < shorter and a[p + k] == b[q + k]:
            k += 1
        if k < shorter:
            sign = -1 if a[p + k] < b[q + k] else 1
        elif n != m:
            sign = -1 if n < m else 1
        out[i] = sign


@kernel
def equal(a: Any, a_starts: Any, a_lengths: Any, b: Any, b_starts: Any, b_lengths: Any, out: Any) -> None:
    """1 where two rows are the same, else 0."""
    for i in range(len(out)):
        p, q, n = a_starts[i], b_starts[i], a_lengths[i]
        alike = n == b_lengths[i]
        k = 0
        while alike and k < n:
            alike = a[p + k] == b[q + k]
            k += 1
        out[i] = alike


@kernel
def found(data: Any, starts: Any, lengths: Any, literal: Any, place: Any, out: Any) -> None:
    """Where the literal stands in the row: at its start, its end, or anywhere."""
    n = len(literal)
    for i in range(len(out)):
        at, last = starts[i], starts[i] + lengths[i] - n
        if place == 2:
            at = max(at, last)
        elif place == 1:
            last = min(at, last)
        hit = False
        while at <= last and not hit:
            k = 0
            while k < n and data[at + k] == literal[k]:
                k += 1
            hit = k == n
            at += 1
        out[i] = hit and lengths[i] >= n


@kernel
def characters(data: Any, starts: Any, lengths: Any, out: Any) -> None:
    """Characters of each row of UTF-8: bytes that go on from another do not count."""
    for i in range(len(out)):
        count = 0
        for k in range(starts[i], starts[i] + lengths[i]):
            count += (data[k] & 0xC0) != 0x80
        out[i] = count


@kernel
def _forward(data: Any, at: Any, end: Any, steps: Any) -> int:
    """Where the character so many behind the one at ``at`` begins; ``end`` where there is none."""
    while steps > 0 and at < end:
        at += 1
        while at < end and (data[at] & 0xC0) == 0x80:
            at += 1
        steps -= 1
    return int(at)


@kernel
def cut(
    data: Any, starts: Any, lengths: Any, counts: Any, first: Any, most: Any, text: Any, out: Any
) -> None:
    """``row[first:][:most]`` as start and length, ``(n, 2)``; characters of UTF-8 if ``text``, else bytes."""
    for i in range(len(out)):
        skip = first if first >= 0 else max(counts[i] + first, 0)
        at, end = starts[i], starts[i] + lengths[i]
        if text:
            begin = _forward(data, at, end, skip)
            stop = _forward(data, begin, end, most)
        else:
            begin = min(at + skip, end)
            stop = min(begin + min(most, end - begin), end)
        out[i, 0], out[i, 1] = begin, stop - begin


@kernel
def stripped(data: Any, starts: Any, lengths: Any, blank: Any, out: Any) -> None:
    """Start and length of each row without blanks at its ends; ``blank``: bool of the 256 bytes."""
    for i in range(len(out)):
        at, end = starts[i], starts[i] + lengths[i]
        while at < end and blank[data[at]]:
            at += 1
        while end > at and blank[data[end - 1]]:
            end -= 1
        out[i, 0], out[i, 1] = at, end - at
