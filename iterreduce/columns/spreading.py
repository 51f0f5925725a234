"""What is reached along edges of one rank, and from there, level by level, until nobody hears anything new.

All sources of a level say the same value, and who hears it tells the next level the next value of a series,
none of which is better than the one before: so each place hears once, the best that it will ever hear, and
the bits of `iterreduce.columns.reaching` stand for all of them. Levels with many edges are found as there, in
either direction and on several threads; those with few follow each other in one loop, so that a path of a
million edges costs as much as a tree of so many.

What it is not: a way to speak to others. All places that edges lead to are this rank's. Nothing here
communicates; `iterreduce.linksettle`, the only caller, does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from iterreduce.columns.jit import bit_length, kernel
from iterreduce.columns.link_layout import Rows
from iterreduce.columns.ragged import Array
from iterreduce.columns.reaching import LAST_BIT, ONE, SHIFT, Reaching, _frozen
from iterreduce.columns.threads import Pool

MANY = 1 << 12  # edges of a level that is found as one: a pass over all bits costs as much
# what is counted: where the level begins and ends in the queue, its number, its edges, edges to places done,
# and how many levels came before the first
LOW, HIGH, LEVEL, EDGES, DONE, BEFORE = range(6)


@cache
def _series(step: Any, combine: str) -> Any:
    """A loop: ``step`` of a value, of that, and so on, while they become no better; how many there are."""
    larger = combine == "max"

    @kernel
    def series(value: Any, out: Any) -> int:
        for i in range(len(out)):
            after = step(value)
            if i > 0 and (after > value if larger else after < value):
                return i
            out[i] = value = after
        return len(out)

    return series


@kernel
def _walk(
    queue: Any, values: Any, most: Any, offsets: Any, targets: Any, into: Any, state: Any, own_at: Any,
    larger: Any, levels: Any, done: Any, better: Any, said: Any,
) -> int:  # fmt: skip
    """Levels, as long as they have fewer edges than ``most``; how many edges were followed."""
    low, high, level, edges = np.uint64(said[LOW]), np.uint64(said[HIGH]), said[LEVEL], said[EDGES]
    sources, followed, left = np.uint64(len(offsets) - 1), 0, 0
    while low < high and level < len(values) and edges < most:
        value, end, more = values[level], high, 0
        for i in range(low, high):
            s = np.uint64(queue[i])
            if s < sources:
                for e in range(np.uint64(offsets[s]), np.uint64(offsets[s + ONE])):
                    t = np.uint64(targets[e])
                    bit = ONE << (t & LAST_BIT)
                    if done[t >> SHIFT] & bit == 0:
                        done[t >> SHIFT] |= bit
                        left += into[t + ONE] - into[t]
                        slot = t - own_at
                        held = state[slot]
                        if held < value if larger else held > value:
                            levels[slot] = said[BEFORE] + level
                            better[t >> SHIFT] |= bit
                            queue[end] = slot
                            end += ONE
                            if slot < sources:
                                more += offsets[slot + ONE] - offsets[slot]
        followed += edges
        low, high, level, edges = high, end, level + 1, more
    said[LOW], said[HIGH], said[LEVEL], said[EDGES] = low, high, level, edges
    said[DONE] += left
    return followed


@kernel
def _arrive(
    fresh: Any, value: Any, asks: Any, offsets: Any, into: Any, state: Any, own_at: Any, larger: Any,
    levels: Any, done: Any, better: Any, front: Any, said: Any,
) -> None:  # fmt: skip
    """The new places are done; those that become better are the next level, as bits. ``asks``: does the state
    tell who does? (Else all do.)
    """
    found, sources, left, edges, level = 0, np.uint64(len(offsets) - 1), 0, 0, said[BEFORE] + said[LEVEL]
    for w in range(np.uint64(len(fresh))):
        new, won = fresh[w] & ~done[w], np.uint64(0)
        fresh[w] = 0
        done[w] |= new
        while new:
            bit = new & (~new + ONE)
            new ^= bit
            t = (w << SHIFT) + np.uint64(bit_length(bit)) - ONE
            left += into[t + ONE] - into[t]
            slot = t - own_at
            wins = True
            if asks:
                held = state[slot]
                wins = held < value if larger else held > value
            if wins:
                won |= bit
                levels[slot] = level
                found += 1
                if slot < sources:
                    edges += offsets[slot + ONE] - offsets[slot]
        better[w] |= won
        front[w] = won
    said[LOW], said[HIGH], said[EDGES] = 0, found, edges
    said[LEVEL] += 1
    said[DONE] += left


@kernel
def _gather(bits: Any, own_at: Any, levels: Any, told: Any, slots: Any, values: Any) -> Any:
    """The slots of bits that are set, ascending, and what their levels were told where ``values`` has room.
    How many.
    """
    found = np.uint64(0)
    for w in range(np.uint64(len(bits))):
        left = bits[w]
        while left:
            bit = left & (~left + ONE)
            left ^= bit
            slot = (w << SHIFT) + np.uint64(bit_length(bit)) - ONE - own_at
            slots[found] = slot
            if found < np.uint64(len(values)):
                values[found] = told[levels[slot]]
            found += ONE
    return found


class Spreading(Reaching):
    """Levels one behind another, beside what `Reaching` does; memory for one stage.

    >>> rows = Rows(np.array([0, 1, 2, 3]), np.array([1, 2, 0], np.uint32), {}, 3)
    >>> spreading, state = Spreading(rows, 0, "min"), np.array([0, 9, 9])
    >>> spreading.spread(np.array([0]), np.array([5, 6, 7]), state, Pool(1))
    3
    >>> [found.tolist() for found in (*spreading.improved(), spreading.untold)]
    [[1, 2], [5, 6], []]
    """

    untold: Array = np.empty(0, np.int64)  # who has heard the last value, and has not told the next
    _queue: Array | None = None
    _ready: tuple[Array, Array] | None = None
    _listed = True  # is the level in the queue, or as bits?

    def __init__(self, rows: Rows, own_at: int, combine: str):
        super().__init__(rows, own_at, combine)
        self._said, self._told = np.zeros(6, np.int64), np.empty(0, np.int64)

    def values(self, step: Any, value: int, most: int) -> Array:
        """What levels are told if sources have this value: at most so many, and one at least; int64."""
        out = np.empty(most, np.int64)
        return out[: _series(step, "max" if self.larger else "min")(value, out)]

    def spread(self, frontier: Array, values: Array, state: Array, pool: Pool, kept: bool = False) -> int:
        """Tell the first of these values, and let who hears it tell the next, until nobody hears or no values
        are left; how many edges were followed. ``state``, ``kept``: as for `begin`.
        """
        self._make_room()
        self._better[:] = 0
        self.begin(int(values[0]), state, kept)
        self._told = np.empty(0, np.int64)
        return self._levels(frontier, values, _frozen(state), pool)

    def go_on(self, values: Array, state: Array, pool: Pool) -> int:
        """Let those who have not told do so, behind `spread`."""
        return self._levels(self.untold, values, _frozen(state), pool)

    def _make_room(self) -> None:
        if self._queue is None:
            own = self.rows.n_targets - int(self.own_at)
            self._queue, self._at = np.empty(2 * own, np.int64), np.empty(own, np.int32)
            self._better = np.zeros_like(self._done)

    def _levels(self, frontier: Array, values: Array, state: Array, pool: Pool) -> int:
        assert self._queue is not None
        self._queue[: len(frontier)] = frontier
        self._said[:], self._listed = 0, True
        self._said[BEFORE], self._told = len(self._told), np.append(self._told, values)
        said, ends, into, followed = self._said, self.rows.offsets, self._offsets, 0
        own = state, self.own_at, self.larger, self._at, self._done, self._better
        said[HIGH], said[EDGES] = len(frontier), self.rows.edges_of(_frozen(frontier))
        while said[LOW] < said[HIGH] and said[LEVEL] < len(values):
            edges = int(said[EDGES])
            if edges < MANY:
                self._level()
                edges = int(_walk(self._queue, values, MANY, ends, self.rows.targets, into, *own, said))
            else:
                self._find(edges, pool)
                value = values[said[LEVEL]]
                asks = not self._beats(int(value))
                _arrive(self._fresh[0], value, asks, ends, into, *own, self._front, said)
                self._listed = False
            followed, self._left, said[DONE] = followed + edges, self._left - int(said[DONE]), 0
        if said[LEVEL]:
            self._value = int(values[said[LEVEL] - 1])
        self.untold = self._level().copy()
        return followed

    def _find(self, edges: int, pool: Pool) -> None:
        """Who hears this level."""
        if not self.pulls(edges):
            self._push(self._level(), edges, pool)
            return
        if self._listed:
            self._mark(self._level())
        self._pull(pool)

    def _level(self) -> Array:
        """The slots of this level, which are in the queue then."""
        assert self._queue is not None
        low, high = self._said[LOW], self._said[HIGH]
        if not self._listed:
            _gather(self._front, self.own_at, self._at, self._told, self._queue, self._told[:0])
            self._listed = True
        return _frozen(self._queue[low:high])

    def improved(self) -> tuple[Array, Array]:
        """The slots that have become better, ascending, and their values."""
        slots, values = self._memory()
        found = int(_gather(self._better, self.own_at, self._at, self._told, slots, values))
        return slots[:found], values[:found]

    def _memory(self) -> tuple[Array, Array]:
        """For slots and values: at first that whose pages are there already."""
        own = self.rows.n_targets - int(self.own_at)
        slots, values = self._ready or (np.empty(own, np.int64), np.empty(own, np.int64))
        self._ready = None
        return slots, values

    def rehearse(self) -> None:
        """As ever, and the loops of this; pages of memory that will be written to, too."""
        super().rehearse()
        self._make_room()
        self._at.fill(0)
        self._better[:], self._said[:] = 0, 0
        none, ends, into = _frozen(np.empty(0, np.int64)), self.rows.offsets, self._offsets
        own = none, self.own_at, self.larger, self._at, self._done, self._better
        _walk(self._queue, np.zeros(1, np.int64), MANY, ends, self.rows.targets, into, *own, self._said)
        _arrive(self._fresh[0], np.int64(0), True, ends, into, *own, self._front, self._said)
        self.improved()
        self._ready = self._memory()
        for memory in self._ready:
            memory.fill(0)
