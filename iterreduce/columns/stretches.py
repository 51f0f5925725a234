"""Passes over rows that name two keys by number: where they go, in which order they lie, whom they name.

A row travels as one word: the slot of its first key at that key's owner in the upper half, the number of its
second key among all ranks' in the lower half. It comes to rest in its first key's stretch of a compressed
table (offsets, seconds), in the order of its arrival, and its second key is then named by its place among
those that this rank names at all.

Nothing here communicates: `iterreduce.indexing` does, and `iterreduce.columns.links` computes with the
result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array


@kernel
def _owner(number: Any, base: Any) -> Any:
    """The rank whose numbers begin at or before this one: the last of equal beginnings."""
    low, high = 0, len(base) - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if base[middle] <= number:
            low = middle
        else:
            high = middle
    return low


@kernel
def _count(numbers: Any, base: Any, counts: Any) -> None:
    for n in numbers:
        counts[_owner(n, base)] += 1


@kernel
def _address(first: Any, second: Any, base: Any, at: Any, words: Any, order: Any) -> None:
    half, keep = np.uint64(32), len(order) > 0
    for i in range(len(first)):
        owner = _owner(first[i], base)
        place = at[owner]
        at[owner] = place + 1
        words[place] = np.int64(np.uint64(first[i] - base[owner]) << half | np.uint64(second[i]))
        if keep:
            order[place] = i


def addressed(first: Array, second: Array, base: Array, ordered: bool) -> tuple[Array, Array, Array]:
    """Rows by the owner of their first key: ``(words int64[n], counts int64[ranks], order)``, stable.

    ``first`` and ``second``: numbers among all ranks' keys, int32 ``(n,)``; the first keys of rank ``r`` are
    numbered from ``base[r]`` on. ``order`` lists the rows as they stand in the words, if asked for.

    >>> numbers = np.array([5, 0], np.int32), np.array([8, 9], np.int32)
    >>> words, counts, order = addressed(*numbers, np.array([0, 3, 6]), True)
    >>> [(int(w) >> 32, int(w) & 0xFFFFFFFF) for w in words], counts.tolist(), order.tolist()
    ([(0, 9), (2, 8)], [1, 1], [1, 0])
    """
    counts = np.zeros(len(base) - 1, np.int64)
    _count(first, base, counts)
    words, order = np.empty(len(first), np.int64), np.empty(len(first) if ordered else 0, np.int64)
    _address(first, second, base, np.cumsum(counts) - counts, words, order)
    return words, counts, order


@kernel
def _lay(words: Any, ends: Any, seconds: Any, places: Any) -> None:
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    keep = len(places) > 0
    for i in range(len(words)):
        word = np.uint64(words[i])
        slot = word >> half
        at = ends[slot]
        ends[slot] = at + 1
        seconds[at] = word & low
        if keep:
            places[i] = at


@kernel
def _lay_pairs(first: Any, second: Any, ends: Any, seconds: Any, places: Any) -> None:
    keep = len(places) > 0
    for i in range(len(first)):
        slot = np.uint64(first[i])
        at = ends[slot]
        ends[slot] = at + 1
        seconds[at] = second[i]
        if keep:
            places[i] = at


class Stretches:
    """A compressed table that is being filled: rows of a slot stand together, in the order of arrival.

    ``rows_of`` int64 ``(slots,)``: how many rows each slot will have. ``seconds``: uint32 ``(rows,)``.

    >>> table = Stretches(np.array([1, 2]), {})
    >>> table.lay(np.array([1 << 32 | 7, 8, 1 << 32 | 9]), {})
    >>> table.seconds.tolist(), table.offsets.tolist()
    ([8, 7, 9], [0, 1, 3])
    """

    def __init__(self, rows_of: Array, dtypes: dict[str, np.dtype[Any]]):
        self.offsets = np.zeros(len(rows_of) + 1, np.int64)
        np.cumsum(rows_of, out=self.offsets[1:])
        self._ends = self.offsets[:-1].copy()
        rows = int(self.offsets[-1])
        self.seconds = np.empty(rows, np.uint32)
        self.columns = {name: np.empty(rows, dtype) for name, dtype in dtypes.items()}

    def lay(self, words: Array, columns: dict[str, Array]) -> None:
        """Put rows into their stretches, their other columns with them."""
        places = np.empty(len(words) if self.columns else 0, np.int64)
        _lay(words, self._ends, self.seconds, places)
        for name, column in self.columns.items():
            column[places] = columns[name]

    def lay_pairs(self, first: Array, second: Array, columns: dict[str, Array]) -> None:
        """The same, where slots and second keys stand apart: int32 ``(n,)`` each."""
        places = np.empty(len(first) if self.columns else 0, np.int64)
        _lay_pairs(first, second, self._ends, self.seconds, places)
        for name, column in self.columns.items():
            column[places] = columns[name]


@kernel
def _mark(numbers: Any, bits: Any) -> None:
    six, mask, one = np.uint64(6), np.uint64(63), np.uint64(1)
    for number in numbers:
        n = np.uint64(number)
        bits[n >> six] |= one << (n & mask)


@kernel
def _ones(word: Any) -> Any:
    """Bits set in a word, by the well-known sums of neighbours."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@kernel
def _list(bits: Any, before: Any, marked: Any) -> int:
    """Running counts of marks before each word, and the numbers that are marked."""
    found: Any = 0
    one = np.uint64(1)
    for w in range(len(bits)):
        before[w] = found
        word = bits[w]
        while word:
            low = word & (~word + one)
            marked[found] = w * 64 + np.int64(_ones(low - one))
            found += 1
            word ^= low
    return int(found)


@kernel
def _total(bits: Any) -> int:
    n: Any = 0
    for word in bits:
        n += np.int64(_ones(word))
    return int(n)


@kernel
def _rename(numbers: Any, bits: Any, before: Any, low: Any, high: Any, own_at: Any, place_of: Any) -> None:
    six, mask, one = np.uint64(6), np.uint64(63), np.uint64(1)
    for i in range(len(numbers)):
        n = np.uint64(numbers[i])
        if low <= n < high:
            numbers[i] = n - low + own_at
        else:
            w = n >> six
            below = bits[w] & ((one << (n & mask)) - one)
            numbers[i] = place_of[before[w] + np.int64(_ones(below))]


class Named:
    """Which of ``total`` numbers a rank's rows name, but for its own, ``low`` to ``high``: ascending."""

    def __init__(self, numbers: Array, total: int, low: int, high: int):
        self.low, self.high = low, high
        self._bits = np.zeros(total // 64 + 1, np.uint64)
        _mark(numbers, self._bits)
        self._forget(low, high)
        self._before = np.zeros(len(self._bits), np.int64)
        self.numbers = np.empty(_total(self._bits), np.int64)
        _list(self._bits, self._before, self.numbers)

    def _forget(self, low: int, high: int) -> None:
        if low >= high:
            return
        ones = ~np.uint64(0)
        first, last = low // 64, (high - 1) // 64
        keep_first = ~(ones << np.uint64(low % 64))
        keep_last = ~(ones >> np.uint64(63 - (high - 1) % 64))
        if first == last:
            self._bits[first] &= keep_first | keep_last
            return
        self._bits[first] &= keep_first
        self._bits[first + 1 : last] = 0
        self._bits[last] &= keep_last

    def rename(self, numbers: Array, own_at: int, place_of: Array) -> None:
        """In place: own numbers become ``own_at`` and following, the k-th other one ``place_of[k]``."""
        _rename(
            numbers,
            self._bits,
            self._before,
            np.uint64(self.low),
            np.uint64(self.high),
            np.uint64(own_at),
            place_of,
        )


def as_words(values: Array) -> Array:
    """Numbers as 8-byte words."""
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64, copy=False).view(np.int64)
