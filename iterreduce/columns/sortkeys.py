"""The order of key values: rows sorted by key, and rows dealt to ranges of keys, without comparing objects.

A key becomes *parts*, a part one or more unsigned words whose order is that of the values: integers with the
sign bit turned, floats by their bits (-0.0 is 0.0, NaN comes last), dates (NaT last), seven bytes of a text
and, in the eighth, how many of them count, so that no text needs to know the length of others. A column with
nulls has a part before its values that puts nulls last. Where values descend their words are turned over,
and NaN, NaT and nulls stay last. Rows are sorted by the first word; only those that are still equal look at
the next one.

What it is not: a collation. Text goes by its bytes (UTF-8: by code points). Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashorder import settle, sort_words
from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.routing import index_dtype
from iterreduce.errors import UsageError

SIGN = np.uint64(1 << 63)
LAST = np.uint64(2**64 - 1)
TEXT_BYTES = 7  # of a word; the eighth byte says how many are there, or MORE
MORE = 8
BLOCK = 1 << 14  # rows whose words stay in cache
LONG = 4096  # rows still equal that are sorted by counting


class Part(NamedTuple):
    """One column of words, or (``ragged``) as many words per row as its text needs.

    ``mask``: the words of nulls are 0. ``at``: which element, or group of 8 bytes, of rows that are vectors.
    ``down``: larger values come first.
    """

    column: Any
    mask: Array | None = None
    at: int | None = None
    down: bool = False

    @property
    def ragged(self) -> bool:
        """May words follow the first?"""
        return isinstance(self.column, Ragged)

    def goes_on(self, words: Any) -> Any:
        """Does the text of these words have more of them?"""
        return self.ragged & ((words & np.uint64(0xFF)) == np.uint64(0xFF - MORE if self.down else MORE))

    def words(self, rows: Array | None, chunk: int = 0) -> Array:
        """The word of each of these rows (None: all), uint64."""
        if isinstance(self.column, Ragged):
            chosen = numbers(len(self.column)) if rows is None else rows
            out = np.empty(len(chosen), np.uint64)
            _text_words(self.column.offsets, self.column.values, chosen, chunk * TEXT_BYTES, out)
            if self.down:
                np.invert(out, out=out)
        else:
            out = _fixed_words(self.column if rows is None else self.column[rows], self.at, self.down)
        if self.mask is not None:
            out[~(self.mask if rows is None else self.mask[rows])] = 0
        return out


def numbers(n: int) -> Array:
    """0 to ``n``, of the dtype of row numbers (one, so that kernels are compiled for one)."""
    return np.arange(n, dtype=index_dtype(n))


def key_parts(keys: Batch, nullable: Collection[str] = (), descending: Sequence[bool] = ()) -> list[Part]:
    """The parts of key columns, in their order; columns named ``nullable`` have nulls here or elsewhere.

    ``descending``: for each column, whether its larger values come first (none given: no column's do).
    Raises `UsageError` for columns without an order: lists, complex numbers, numbers above 8 bytes.
    """
    out = []
    for name, down in zip(keys.names, descending or [False] * len(keys.names), strict=True):
        column, mask = keys[name], keys.valid(name)
        if mask is not None or name in nullable:
            out.append(Part(np.zeros(len(keys), bool) if mask is None else ~mask))
        out += [Part(column, mask, at, down) for at in _elements(name, column)]
    return out or [Part(np.zeros(len(keys), bool))]  # of no columns, or vectors of nothing: all are equal


def _elements(name: str, column: Any) -> list[int | None]:
    """Of how many parts a column is: one, or one per element (8 bytes) of rows that are vectors."""
    if isinstance(column, Ragged):
        if column.kind != "list":
            return [None]
    elif column.dtype.kind in "biufmM" and column.dtype.itemsize <= 8:
        if column.ndim == 1:
            return [None]
        width = int(np.prod(column.shape[1:]))
        return list(range(-(-width // 8) if column.dtype == np.uint8 else width))
    raise UsageError(
        f'column "{name}" is of {"lists" if isinstance(column, Ragged) else column.dtype}, which have no '
        "order here: sort by numbers, dates, bools, text or bytes"
    )


def _fixed_words(column: Array, at: int | None, down: bool) -> Array:
    flat = column if at is None else column.reshape(len(column), -1)
    kind = column.dtype.kind
    if at is not None and column.dtype == np.uint8:
        out = _byte_words(flat[:, 8 * at : 8 * at + 8])
    elif kind == "f":
        floats, out = (flat if at is None else flat[:, at]).astype(np.float64), np.empty(len(flat), np.uint64)
        _float_words(floats, floats.view(np.uint64), down, out)
        return out
    else:
        out = _whole_words(flat if at is None else flat[:, at])
        if kind in "mM" and not down:
            out -= np.uint64(1)  # NaT is the smallest number
    return np.invert(out, out=out) if down else out


def _whole_words(column: Array) -> Array:
    """New words in the order of numbers, dates (as numbers) or bools."""
    if column.dtype.kind in "bu":
        return column.astype(np.uint64)
    whole = column.view(np.int64) if column.dtype.kind in "mM" else column.astype(np.int64, copy=False)
    return whole.view(np.uint64) ^ SIGN


def _byte_words(cells: Array) -> Array:
    """Up to 8 bytes per row, the first one foremost."""
    full = np.zeros((len(cells), 8), np.uint8)
    full[:, : cells.shape[1]] = cells
    return full.view(">u8").reshape(-1).astype(np.uint64)


@kernel
def _float_words(floats: Any, bits: Any, down: Any, out: Any) -> None:
    sign, last = np.uint64(1 << 63), ~np.uint64(0)
    turn = last if down else np.uint64(0)
    for i in range(len(floats)):
        if floats[i] != floats[i]:
            out[i] = last
        elif floats[i] == 0.0:
            out[i] = sign ^ turn
        else:
            out[i] = (~bits[i] if bits[i] & sign else bits[i] | sign) ^ turn


@kernel
def _text_words(offsets: Any, values: Any, rows: Any, skip: Any, out: Any) -> None:
    for i in range(len(rows)):
        at, end = offsets[rows[i]] + skip, offsets[rows[i] + 1]
        word = np.uint64(0)
        for k in range(7):
            word <<= np.uint64(8)
            if at + k < end:
                word |= np.uint64(values[at + k])
        left = min(max(end - at, 0), 8)
        out[i] = word << np.uint64(8) | np.uint64(left)


# ---------------------------------------------------------------------- sorting


@kernel
def _sort_runs(words: Any, rows: Any, los: Any, his: Any) -> None:
    """Sort words, and rows with them, within each run; long runs are left as they are."""
    for r in range(len(los)):
        if his[r] - los[r] < LONG:
            settle(words[los[r] : his[r]], rows[los[r] : his[r]])


def sorted_order(keys: Batch, descending: Sequence[bool] = ()) -> Array | None:
    """The stable order of rows by their key columns, ``(n,)``; None where they stand in it.

    ``descending``: for each column, whether its larger values come first (none given: all ascend). Either way
    nulls come last, NaN behind all numbers. Raises `UsageError` for columns without an order.

    >>> sorted_order(Batch(a=np.array([1.5, np.nan, -0.0, 0.0]))).tolist()
    [2, 3, 0, 1]
    >>> sorted_order(Batch(a=np.array([1.5, np.nan, -0.0, 0.0])), (True,)).tolist()
    [0, 2, 3, 1]
    >>> sorted_order(Batch(a=np.arange(5))) is None
    True
    """
    n, parts = len(keys), key_parts(keys, descending=descending)
    if n < 2:
        return None
    order: Array | None = None
    los, his = np.zeros(1, np.int64), np.full(1, n)
    for part in parts:
        if part is parts[-1] and not part.ragged:
            return _refine(part, 0, order, los, his, last=True)[0]
        waiting: list[tuple[Array, Array]] = []
        chunk = 0
        while len(los):
            order, words, los, his = _refine(part, chunk, order, los, his)
            going = part.goes_on(words)
            waiting.append((los[~going], his[~going]))
            los, his, chunk = los[going], his[going], chunk + 1
        los, his = (np.concatenate(ends) for ends in zip(*waiting, strict=True))
        if not len(los):
            break
    return order


def first_in_order(keys: Batch, k: int, descending: Sequence[bool] = ()) -> Array | None:
    """The first ``k`` rows of `sorted_order`, at most ``(k,)``; None where the rows stand in it.

    Only rows that may be among them are sorted: those whose first word is not above the ``k``-th smallest.

    >>> first_in_order(Batch(a=np.array([5, 1, 4, 1, 3])), 3).tolist()
    [1, 3, 4]
    """
    if k < 1 or k > len(keys) // 8:
        order = sorted_order(keys, descending)
        return None if order is None else order[:k]
    words = key_parts(keys, descending=descending)[0].words(None)
    few = np.flatnonzero(words <= np.partition(words, k - 1)[k - 1])
    order = sorted_order(keys.take(few), descending)
    return (few if order is None else few[order])[:k]


def _refine(
    part: Part, chunk: int, order: Array | None, los: Array, his: Array, last: bool = False
) -> tuple[Array | None, Array, Array, Array]:
    """Sort the rows of each run by the next word: the order, and runs (word, from, to) still equal."""
    if order is None and his[0] - los[0] == len(part.column):
        words, order = sort_words(part.words(None, chunk))
        at = None
    else:
        sizes = his - los
        ends = np.cumsum(sizes)
        firsts = ends - sizes
        at = np.arange(int(ends[-1])) + np.repeat(los - firsts, sizes)
        words, order = _sorted_within(part, chunk, order, at, firsts, ends)
    if last:
        return order, words, los, his
    equal = words[1:] == words[:-1]
    if at is not None:
        equal[ends[:-1] - 1] = False
    edges = np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8))
    begin, end = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    heads = words[begin]
    return (order, heads, begin, end + 1) if at is None else (order, heads, at[begin], at[end] + 1)


def _sorted_within(
    part: Part, chunk: int, order: Array | None, at: Array, firsts: Array, ends: Array
) -> tuple[Array, Array | None]:
    rows = at.astype(index_dtype(len(part.column))) if order is None else order[at]
    words, before = part.words(rows, chunk), rows.copy()
    _sort_runs(words, rows, firsts, ends)
    for r in np.flatnonzero(ends - firsts >= LONG).tolist():
        lo, hi = int(firsts[r]), int(ends[r])
        words[lo:hi], moved = sort_words(words[lo:hi])
        if moved is not None:
            rows[lo:hi] = rows[lo:hi][moved]
    if order is None:
        if np.array_equal(rows, before):
            return words, None
        order = numbers(len(part.column))
    order[at] = rows
    return words, order


# ---------------------------------------------------------------------- ranges


@kernel
def _below(words: Any, rows: Any, cuts: Any, first: Any, out: Any) -> None:
    """How many cuts stand below each word; equal ones where the row is not before ``first`` of the cut.

    ``rows`` without any: they are numbered from 0 on.
    """
    for i in range(len(words)):
        w, lo, size = words[i], 0, len(cuts)
        while size > 0:
            half = size >> 1
            if cuts[lo + half] < w:
                lo, size = lo + half + 1, size - half - 1
            else:
                size = half
        if lo < len(cuts) and cuts[lo] == w:
            row = rows[i] if len(rows) else i
            while lo < len(cuts) and cuts[lo] == w and row >= first[lo]:
                lo += 1
        out[i] = lo


def ranges_of(
    keys: Batch, cuts: Batch, first: Array, out: Array | None = None, descending: Sequence[bool] = ()
) -> tuple[Array, Array]:
    """The range of each row, ``(n,)``, and the rows of each, ``(cuts + 1,)``: how many of the sorted
    ``cuts`` (rows of the same columns) are not above it.

    A row whose key equals that of cut ``j`` is above it from row number ``first[j]`` on, which ascends among
    equal cuts. ``out`` takes the ranges, if given.

    >>> keys, cuts = Batch(k=np.array([5, 1, 5, 9])), Batch(k=np.array([5, 7]))
    >>> [part.tolist() for part in ranges_of(keys, cuts, np.array([2, 0]))]
    [[0, 0, 1, 2], [2, 1, 1]]
    """
    nullable = {n for n in keys.names if keys.valid(n) is not None or cuts.valid(n) is not None}
    theirs, size = key_parts(cuts, nullable, descending), len(cuts)
    if out is None:
        out = np.empty(len(keys), range_dtype(size))
    counts = np.zeros(size + 1, np.int64)
    for lo in range(0, len(keys), BLOCK):
        part = keys.slice(lo, lo + BLOCK)
        made = out[lo : lo + len(part)]
        _ranges_of_block(key_parts(part, nullable, descending), theirs, first - lo, made)
        counts += np.bincount(made, minlength=size + 1)
    return out, counts


def range_dtype(cuts: int) -> type[np.integer[Any]]:
    """What numbers that many ranges and one more."""
    return np.uint8 if cuts < 256 else np.uint16 if cuts < 1 << 16 else np.int32


def _ranges_of_block(ours: list[Part], theirs: list[Part], first: Array, out: Array) -> None:
    todo: list[tuple[Array | None, int, int, int, int]] = [(None, 0, len(first), 0, 0)]
    never = np.full(len(first), len(out))
    while todo:
        rows, lo, hi, p, chunk = todo.pop()
        words, limits = ours[p].words(rows, chunk), theirs[p].words(numbers(hi)[lo:], chunk)
        last = p + 1 == len(ours) and not ours[p].ragged
        found = out if rows is None else np.empty(len(words), out.dtype)
        chosen = numbers(0) if rows is None else rows
        _below(words, chosen, limits, first[lo:hi] if last else never[lo:hi], found)
        if rows is not None:
            out[rows] = found + out.dtype.type(lo)
        if not last:
            rows = numbers(len(words)) if rows is None else rows
            todo += _equal_ones(ours, words, limits, rows, (lo, p, chunk), first, out)


def _equal_ones(
    ours: list[Part],
    words: Array,
    limits: Array,
    rows: Array,
    where: tuple[int, int, int],
    first: Array,
    out: Array,
) -> list[tuple[Array | None, int, int, int, int]]:
    """Rows that equal some cuts in the words so far, to be looked at again beside those cuts alone."""
    lo, p, chunk = where
    again: list[tuple[Array | None, int, int, int, int]] = []
    for word in np.unique(limits):
        same = rows[words == word]
        if not len(same):
            continue
        begin, end = (lo + int(np.searchsorted(limits, word, side)) for side in ("left", "right"))
        if ours[p].goes_on(word):
            again.append((same, begin, end, p, chunk + 1))
        elif p + 1 < len(ours):
            again.append((same, begin, end, p + 1, 0))
        else:
            out[same] = begin + np.searchsorted(first[begin:end], same, side="right")
    return again
