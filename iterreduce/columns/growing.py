"""What lives across iterations and grows: columns with room behind their rows, key indexes that take more
keys, and marks on rows that cost nothing to wipe.

Growing doubles, so that adding rows costs as much as there are new rows, over many times. A view made before
stays what it was: rows are added behind its end only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from iterreduce.columns.batch import Batch, Column
from iterreduce.columns.hashing import EMPTY, hash_keys, hash_words, key_words, mix
from iterreduce.columns.jit import kernel
from iterreduce.columns.keytable import OrderedTable
from iterreduce.columns.numbering import (
    SAMPLE,
    Addressed,
    KeyIndex,
    _Finder,
    _Hashed,
    _no_fill,
    _place,
    _Stored,
    code_dtype,
    is_dense,
)
from iterreduce.columns.ragged import Array, Ragged

# ---------------------------------------------------------------------- columns


class Held(NamedTuple):
    """A column as it stands in a batch, and the memory behind it, which is ours: one array, or offsets and
    values.
    """

    view: Column
    memory: tuple[Array, ...]


def held(column: Column) -> Held:
    """A column in memory of its own, where it may be overwritten and added to.

    >>> held(np.arange(3)).view.tolist()
    [0, 1, 2]
    """
    if isinstance(column, Ragged):
        tight = column.copy()
        return Held(tight, (tight.offsets, tight.values))
    own = column.copy()
    return Held(own, (own,))


def appended(column: Held, more: Column) -> Held:
    """The column with more rows behind it, in the same memory where that has room.

    >>> appended(held(np.arange(3)), np.array([7])).view.tolist()
    [0, 1, 2, 7]
    """
    view, memory = column
    if not isinstance(view, Ragged):
        room, longer = _added(memory[0], len(view), more)
        return Held(longer, (room,))
    tight, used = more.compact(), int(view.offsets[-1])
    offsets_room, offsets = _added(memory[0], len(view) + 1, tight.offsets[1:] + used)
    values_room, values = _added(memory[1], used, tight.values)
    return Held(Ragged(offsets, values, view.kind), (offsets_room, values_room))


def _added(memory: Array, used: int, more: Array) -> tuple[Array, Array]:
    end = used + len(more)
    if end > len(memory):
        larger = np.empty((max(end, 2 * len(memory)), *memory.shape[1:]), memory.dtype)
        larger[:used] = memory[:used]
        memory = larger
    memory[used:end] = more
    return memory, memory[:end]


# ---------------------------------------------------------------------- indexes


@kernel
def _append(words: Any, valid: Any, table: Any, place: Any, done: Any, m: Any) -> Any:
    """Number words that are not in the table from ``m`` on; ``(rows done, keys)``: it stops where the table
    must grow.
    """
    base, shift, homes, probes, room = place
    one, side = np.uint64(1), np.uint64(table.shape[0] - 2)
    for i in range(done, len(words)):
        h = mix(np.uint64(words[i]))
        if h == EMPTY or (valid is not None and not valid[i]):
            j = side if valid is None or valid[i] else side + one
            table[j, 0], table[j, 1] = np.uint64(0), np.uint64(m)
            m += 1
            continue
        j = (h - base) >> shift
        if j >= homes or np.uint64(m) >= room:
            return i, m
        home = j
        while table[j, 0] != EMPTY:
            j += one
        if j - home >= probes:
            return i, m
        table[j, 0], table[j, 1] = h, np.uint64(m)
        m += 1
    return len(words), m


def extended(index: KeyIndex, more: Batch) -> KeyIndex:
    """The index with more keys, all of them new and distinct, numbered on from its end. The old one is void.

    >>> index = extended(KeyIndex(Batch(k=np.array([30, 10]))), Batch(k=np.array([2**40, 20])))
    >>> index.lookup(Batch(k=np.array([20, 2**40, 10, 5]))).tolist()
    [3, 2, 1, -1]
    """
    made = object.__new__(KeyIndex)
    made.schema = index.schema
    made.finder = _with_more(index.finder, more)
    return made


def _with_more(finder: _Finder, more: Batch) -> _Finder:
    if isinstance(finder, _Stored):
        numbers = np.empty(len(more), np.int64)
        finder.store.number(more, hash_keys(more), numbers)
        return finder
    name = more.names[0]
    words, valid = key_words(more[name]), more.valid(name)
    if isinstance(finder, Addressed):
        found = _addressed_with(finder, words, valid)
        if found is not None:
            return found
        finder = _as_hashed(finder)
    assert isinstance(finder, _Hashed)
    _append_all(finder.table, words, valid)
    return finder


def _append_all(table: OrderedTable, words: Array, valid: Array | None) -> None:
    done, m = 0, table.used
    while done < len(words):
        done, m = _append(words, valid, table.unsigned, _place(table), done, m)
        table.used = m
        if done < len(words):
            table.make_room(hash_words(words[done : done + SAMPLE]))


def _addressed_with(finder: Addressed, words: Array, valid: Array | None) -> Addressed | None:
    """By address too, where keys still lie close together."""
    real = words if valid is None else words[valid]
    low, high = int(finder.low), int(finder.low) + len(finder.place) - 2
    total, place = finder.keys + len(words), finder.place
    if len(real) and (int(real.min()) < low or int(real.max()) > high):
        least, most = min(low, int(real.min())), max(high, int(real.max()))
        if not is_dense(least, most, total):
            return None
        span = high - low + 1  # room on the side where keys come: doubling
        low, high = (least - span if least < low else low), (most + span if most > high else high)
        low, high = max(low, -(2**63)), min(high, 2**63 - 1)
        place = np.full(high - low + 2, -1, finder.place.dtype)
        start = int(finder.low) - low
        place[start : start + span] = finder.place[:-1]
        place[-1] = finder.place[-1]
    numbers = np.arange(finder.keys, total, dtype=code_dtype(total))
    if valid is None:
        place[words - low] = numbers
    else:
        place[words[valid] - low] = numbers[valid]
        place[-1:] = numbers[~valid] if not valid.all() else place[-1]
    return Addressed(np.int64(low), place, total)


def _as_hashed(finder: Addressed) -> _Hashed:
    at = np.flatnonzero(finder.place[:-1] >= 0)
    order = np.argsort(finder.place[:-1][at], kind="stable")
    words = at[order] + finder.low
    numbers = finder.place[:-1][at][order]
    null_at = int(finder.place[-1])
    valid = None
    if null_at >= 0:
        words, valid = np.insert(words, null_at, 0), np.ones(len(words) + 1, bool)
        valid[null_at] = False
    assert len(words) == finder.keys and (null_at >= 0 or (numbers == np.arange(len(words))).all())
    table = OrderedTable(1, _no_fill)
    table.reserve(2 * len(words), hash_words(words[:: max(1, len(words) // SAMPLE)]))
    _append_all(table, words, valid)
    return _Hashed(table)


# ---------------------------------------------------------------------- marks


@kernel
def _repeat(rows: Any, stamps: Any, epoch: Any) -> int:
    for i in range(len(rows)):
        if stamps[rows[i]] == epoch:
            return i
        stamps[rows[i]] = epoch
    return -1


@kernel
def _touched(rows: Any, stamps: Any, epoch: Any, out: Any, m: Any) -> int:
    for i in range(len(rows)):
        r = rows[i]
        if 0 <= r < len(stamps) and stamps[r] != epoch:
            stamps[r] = epoch
            out[m] = r
            m += 1
    return int(m)


@kernel
def _set_numbers(rows: Any, numbers: Any) -> None:
    for i in range(len(rows)):
        numbers[rows[i]] = i


class Marks:
    """Which of ``n`` rows were named since the last time, wiped by counting up an epoch.

    >>> marks = Marks()
    >>> marks.first_repeat(np.array([3, 1, 3]), 5), marks.first_repeat(np.array([3, 1]), 5)
    (2, -1)
    >>> marks.distinct([np.array([4, 2]), np.array([2, 0])], 5).tolist()
    [0, 2, 4]
    """

    def __init__(self) -> None:
        self._stamps = np.zeros(0, np.int32)
        self._numbers = np.zeros(0, np.int32)
        self._epoch = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._stamps.nbytes + self._numbers.nbytes

    def _begin(self, n: int) -> Array:
        if n > len(self._stamps) or self._epoch == 2**31 - 1:
            self._stamps, self._epoch = np.zeros(max(n, 2 * len(self._stamps)), np.int32), 0
        self._epoch += 1
        return self._stamps[:n]

    def first_repeat(self, rows: Array, n: int) -> int:
        """The first place of ``rows``, each in ``[0, n)``, that names a row named before; -1: none."""
        stamps = self._begin(n)
        return int(_repeat(rows, stamps, self._epoch))

    def distinct(self, lists: Sequence[Array], n: int) -> Array:
        """The rows in ``[0, n)`` named in any list, ascending; other numbers are left out."""
        stamps, m = self._begin(n), 0
        out = np.empty(sum(map(len, lists)), np.int64)
        for rows in lists:
            m = _touched(rows, stamps, self._epoch, out, m)
        out = out[:m]
        out.sort()
        return out

    def places(self, chosen: Array, lists: Sequence[Array], n: int) -> list[Array]:
        """Where each row of the lists stands in ``chosen``; ``len(chosen)`` for others than ``[0, n)``."""
        if n + 1 > len(self._numbers):
            self._numbers = np.zeros(max(n + 1, 2 * len(self._numbers)), code_dtype(n + 2))
        _set_numbers(chosen, self._numbers)
        self._numbers[n] = len(chosen)
        return [self._numbers[np.where((r < 0) | (r > n), n, r)] for r in lists]
