"""Which rows of two sides have equal keys: pairs of row numbers, for whoever then takes columns.

Local only: both sides hold all rows of their keys (they are co-partitioned, or one is everywhere). As in SQL
a null equals nothing unless it is asked to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.jit import kernel
from iterreduce.columns.numbering import arrivals, code_dtype
from iterreduce.columns.ordering import group_order
from iterreduce.columns.ragged import Array


@kernel
def _count_pairs(codes: Any, offsets: Any, unmatched: Any) -> int:
    pairs = 0
    for c in codes:
        pairs += offsets[c + 1] - offsets[c] if c >= 0 else unmatched
    return pairs


@kernel
def _write_pairs(codes: Any, offsets: Any, order: Any, unmatched: Any, left: Any, right: Any) -> None:
    at = 0
    for i in range(len(codes)):
        c = codes[i]
        if c < 0:
            if unmatched:
                left[at], right[at] = i, -1
                at += 1
            continue
        for k in range(offsets[c], offsets[c + 1]):
            left[at], right[at] = i, order[k]
            at += 1


@kernel
def _write_matches(rows: Any, left: Any, right: Any) -> int:
    """Pairs where each left row has one match at most: those that have one."""
    at = 0
    for i in range(len(rows)):
        if rows[i] >= 0:
            left[at], right[at] = i, rows[i]
            at += 1
    return at


class KeyRows:
    """The rows of each key of a table, for finding them again and again; keys may stand in several rows.

    >>> known = KeyRows(Batch(k=np.array([1, 3, 3])))
    >>> found = known.find(Batch(k=np.array([3, 9])))
    >>> [rows.tolist() for rows in known.pairs(found)]
    [[0, 0], [1, 2]]
    """

    def __init__(self, keys: Batch):
        self.index, codes = arrivals(keys)
        self.unique = len(self.index) == len(keys)
        self._order: Array = np.empty(0, np.int64)
        self._offsets: Array = self._order
        if not self.unique:
            order, offsets = group_order(codes, len(self.index))
            narrow = code_dtype(len(keys))  # half the memory: they are read at random
            self._order, self._offsets = order.astype(narrow), offsets.astype(narrow)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.index.nbytes + self._order.nbytes + self._offsets.nbytes

    def find(self, keys: Batch, nulls_match: bool = False) -> Array:
        """The number of each row's key, int32 where numbers allow it, -1 where it is absent."""
        found = self.index.lookup(keys, code_dtype(len(self.index)))
        return found if nulls_match else _without_nulls(found, keys)

    def pairs(self, found: Array, keep_left: bool = False) -> tuple[Array, Array]:
        """``(rows asked, rows here)`` of equal keys, as `join_rows` gives them, in time for each pair; int32
        where numbers allow it.
        """
        if self.unique:  # every key stands once, so its number is its row
            return _join_unique(found, keep_left)
        pairs = _count_pairs(found, self._offsets, int(keep_left))
        rows, partners = np.empty(pairs, code_dtype(len(found))), np.empty(pairs, self._order.dtype)
        _write_pairs(found, self._offsets, self._order, keep_left, rows, partners)
        return rows, partners


def join_rows(
    left: Batch, right: Batch, *, keep_left: bool = False, nulls_match: bool = False
) -> tuple[Array, Array]:
    """Pairs ``(left rows, right rows)``, int64 ``(pairs,)`` each, of equal keys, in left, then right row
    order.

    ``left`` and ``right`` hold the key columns only, matched by position. ``keep_left``: a left row without a
    match gives one pair with right row -1. Raises `SchemaError` for keys that can never be equal.

    >>> a, b = join_rows(Batch(k=np.array([3, 1, 9])), Batch(k=np.array([1, 3, 3])))
    >>> a.tolist(), b.tolist()
    ([0, 0, 1], [1, 2, 0])
    """
    known = KeyRows(right)
    rows, partners = known.pairs(known.find(left, nulls_match), keep_left)
    return rows.astype(np.int64, copy=False), partners.astype(np.int64, copy=False)


def _without_nulls(codes: Array, keys: Batch) -> Array:
    for name in keys.names:
        valid = keys.valid(name)
        if valid is not None:
            codes[~valid] = -1
    return codes


def _join_unique(matches: Array, keep_left: bool) -> tuple[Array, Array]:
    if keep_left:
        return np.arange(len(matches)), matches
    left, right = np.empty(len(matches), code_dtype(len(matches))), np.empty(len(matches), matches.dtype)
    pairs = _write_matches(matches, left, right)
    return left[:pairs], right[:pairs]
