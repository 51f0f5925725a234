"""What is reached along edges where all sources say the same: sets of bits in place of values.

A minimum of one value is that value, so what is left of a fold is who hears it at all. Places are of interest
until they have heard something as good; that is a bit for each, which stays in a cache where values would
not. Two loops find what is new, and find the same:

    push   follows the edges of those who speak
    pull   goes through the places that are still of interest; each looks for one source that speaks, the
           sources with most edges first, and stops there (Beamer, Asanovic and Patterson,
           Direction-optimizing breadth-first search, SC 2012). It needs the edges the other way round, 4
           bytes each, and the first source of each place beside the others': most places need no more, and
           find it where their neighbours find theirs

What it is not: exact by itself. A set bit says that nothing as good as what was said is wanted any more; of
those whose bit is new the ones that do become better are told by their values, once. Values must not go back
while bits are kept (see `Reaching.begin`). Nothing here communicates; `iterreduce.linkimprove`, the only
caller, does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from iterreduce.columns.jit import bit_length, inlined, kernel, prefetch
from iterreduce.columns.link_layout import Rows, in_degrees
from iterreduce.columns.ragged import Array
from iterreduce.columns.threads import ALONE, Pool

WORD = 64  # bits
AHEAD = 8  # sources whose edges are asked for before they are followed: memory takes 100 ns
PROBE = 2  # following an edge backwards costs as much as two forwards: less of it is in a cache
GRAIN = 1 << 16  # edges, and places, for a thread: less is done sooner by one
PARTS = 8  # of the places, for each thread: how many of them are done is not known beforehand
ZERO, ONE, LAST_BIT = np.uint64(0), np.uint64(1), np.uint64(WORD - 1)
SHIFT = np.uint64(6)


@kernel
def _alike(values: Any) -> bool:
    first, i = values[0], 1
    while i < len(values) and values[i] == first:
        i += 1
    return i == len(values)


def alike(values: Array) -> bool:
    """Are these, one at least, all one value?

    >>> alike(np.array([3, 3])), alike(np.array([3, 4]))
    (True, False)
    """
    return bool(_alike(_frozen(values)))


@kernel
def _turn(offsets: Any, targets: Any, own_at: Any, at: Any, sources: Any) -> None:
    """The places of sources by target, ascending; ``at``: where those of each target begin, and then end."""
    for s in range(np.uint64(len(offsets) - 1)):
        for e in range(np.uint64(offsets[s]), np.uint64(offsets[s + ONE])):
            t = np.uint64(targets[e])
            p = np.uint64(at[t])
            sources[p] = own_at + s
            at[t] = p + ONE


@kernel
def _first_of_each(offsets: Any, sources: Any, firsts: Any, led: Any) -> None:
    """The first source of each place that edges lead to, and bits for those places."""
    for t in range(np.uint64(len(offsets) - 1)):
        if offsets[t] < offsets[t + ONE]:
            firsts[t] = sources[offsets[t]]
            led[t >> SHIFT] |= ONE << (t & LAST_BIT)


@kernel
def _set_from(numbers: Any, first: Any, bits: Any) -> None:
    for i in range(len(numbers)):
        n = np.uint64(numbers[i]) + first
        bits[n >> SHIFT] |= ONE << (n & LAST_BIT)


@kernel
def _rule_out(offsets: Any, state: Any, own_at: Any, value: Any, larger: Any, done: Any, worst: Any) -> Any:
    """Set the bits of own places that have a value as good, and of others' that no edge leads to. How many
    edges lead to those that are left, and the best value that any own one of them has.
    """
    edges, best = 0, worst
    for t in range(np.uint64(len(offsets) - 1)):
        lead = offsets[t + ONE] - offsets[t]
        if t >= own_at:
            held = state[t - own_at]
            out = held >= value if larger else held <= value
            if not out:
                best = max(best, held) if larger else min(best, held)
        else:
            out = lead == 0
        done[t >> SHIFT] |= np.uint64(out) << (t & LAST_BIT)
        edges += 0 if out else lead
    return edges, best


@kernel
def _push(frontier: Any, lo: Any, hi: Any, offsets: Any, targets: Any, done: Any, fresh: Any) -> None:
    sources, last = np.uint64(len(offsets) - 1), np.uint64(hi - 1)
    for i in range(np.uint64(lo), np.uint64(hi)):
        prefetch(offsets, np.uint64(frontier[min(i + np.uint64(2 * AHEAD), last)]))
        soon = np.uint64(frontier[min(i + np.uint64(AHEAD), last)])
        prefetch(targets, np.uint64(offsets[min(soon, sources)]))
        s = np.uint64(frontier[i])
        if s < sources:
            for e in range(np.uint64(offsets[s]), np.uint64(offsets[s + ONE])):
                t = np.uint64(targets[e])
                fresh[t >> SHIFT] |= (ONE << (t & LAST_BIT)) & ~done[t >> SHIFT]


@kernel
def _pull(
    lo: Any, hi: Any, offsets: Any, firsts: Any, led: Any, sources: Any, front: Any, done: Any, fresh: Any
) -> None:
    for w in range(np.uint64(lo), np.uint64(hi)):
        left, new = led[w] & ~done[w], np.uint64(0)
        if left:
            for k in range(np.uint64(WORD)):  # whether they are of interest or not: nothing to be guessed
                s = np.uint64(firsts[(w << SHIFT) + k])
                new |= (front[s >> SHIFT] >> (s & LAST_BIT) & ONE) << k
            new &= left
            left ^= new
            while left:
                bit = left & (~left + ONE)
                left ^= bit
                t = (w << SHIFT) + np.uint64(bit_length(bit)) - ONE
                for e in range(np.uint64(offsets[t]) + ONE, np.uint64(offsets[t + ONE])):
                    s = np.uint64(sources[e])
                    if front[s >> SHIFT] >> (s & LAST_BIT) & ONE:
                        new |= bit
                        break
            fresh[w] |= new


@inlined
def _within(w: Any, first: Any, last: Any) -> Any:
    """The bits of a word that stand for numbers from first up to last."""
    mask, low = ~np.uint64(0), w << SHIFT
    if low < first:
        mask &= ~np.uint64(0) << (first - low)
    if last - low < np.uint64(WORD):
        mask &= (ONE << (last - low)) - ONE
    return mask


@kernel
def _take(
    first: Any, last: Any, offsets: Any, state: Any, value: Any, larger: Any, done: Any, fresh: Any, out: Any
) -> Any:
    """The new places from first up to last, ascending and counted from first, of which ``state``, if there is
    any, tells who becomes better; all of them are done. How many, and how many edges lead to those done.
    """
    found, edges, asks = np.uint64(0), 0, len(state) > 0
    for w in range(first >> SHIFT, (last + LAST_BIT) >> SHIFT):
        new = fresh[w] & _within(w, first, last)
        if new:
            fresh[w] ^= new
            new &= ~done[w]
            done[w] |= new
            while new:
                bit = new & (~new + ONE)
                new ^= bit
                t = (w << SHIFT) + np.uint64(bit_length(bit)) - ONE
                edges += offsets[t + ONE] - offsets[t]
                out[found] = t - first
                if asks:
                    held = state[t - first]
                    found += np.uint64(held < value if larger else held > value)
                else:
                    found += ONE
    return found, edges


class Reaching:
    """Who has heard something as good already, and who hears it now; memory for one stage.

    ``rows``: edges by source to places, of which those from ``own_at`` on are this rank's keys; ``combine``:
    min or max. Values are int64.

    >>> rows = Rows(np.array([0, 2, 3]), np.array([1, 2, 0], np.uint32), {}, 3)
    >>> reaching = Reaching(rows, 0, "min")
    >>> state = np.array([0, 9, 9])
    >>> reaching.begin(1, state, kept=False)
    >>> reaching.follow(np.array([0]), Pool(1))
    2
    >>> reaching.own(state).tolist()
    [1, 2]
    """

    def __init__(self, rows: Rows, own_at: int, combine: str):
        self.rows, self.own_at, self.larger = rows, np.uint64(own_at), combine == "max"
        words = (rows.n_targets + WORD - 1) // WORD
        self._offsets = np.zeros(rows.n_targets + 1, np.int64)  # edges by target, whoever they come from
        in_degrees(rows.targets, self._offsets[1:])
        np.cumsum(self._offsets, out=self._offsets)
        self._sources: Array | None = None
        self._done, self._fresh = np.zeros(words, np.uint64), [np.zeros(words, np.uint64)]
        self._front, self._led = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
        self._firsts = np.zeros(0, np.uint32)
        self._value: int | None = None
        self._left = self.pushed = self._best = 0

    def turn(self) -> None:
        """Have the edges the other way round, too, from now on."""
        if self._sources is None:
            sources = np.empty(len(self.rows.targets), np.uint32)
            _turn(self.rows.offsets, self.rows.targets, self.own_at, self._offsets[:-1].copy(), sources)
            self._firsts = np.zeros(len(self._done) * WORD, np.uint32)
            _first_of_each(self._offsets, sources, self._firsts, self._led)
            self._sources = sources

    def begin(self, value: int, state: Array, kept: bool) -> None:
        """The sources say this value. ``state``: what this rank's keys have. ``kept``: since the last time
        nothing but what was found then has changed it, and other ranks have taken what was found for them.
        """
        known, self._value = self._value, value
        if kept and known is not None and (value <= known if self.larger else value >= known):
            return
        self._done[:] = 0
        if self.rows.n_targets % WORD:
            self._done[-1] = ~np.uint64(0) << np.uint64(self.rows.n_targets % WORD)
        worst = np.iinfo(np.int64).min if self.larger else np.iinfo(np.int64).max
        given = _frozen(state), self.own_at, value, self.larger, self._done, worst
        self._left, self._best = map(int, _rule_out(self._offsets, *given))

    def _beats(self, value: int) -> bool:
        """Is it better than what any place has that is of interest? Then nobody need be asked."""
        return value > self._best if self.larger else value < self._best

    def follow(self, frontier: Array, pool: Pool) -> int:
        """Find who hears these sources; how many edges they have."""
        frontier = _frozen(frontier)
        edges = self.rows.edges_of(frontier)
        if self.pulls(edges):
            self._mark(frontier)
            self._pull(pool)
        else:
            self._push(frontier, edges, pool)
        return edges

    def pulls(self, edges: int) -> bool:
        """Are so many edges followed backwards?"""
        return self._sources is not None and self._pulls(edges)

    def _pulls(self, edges: int) -> bool:
        """Is it less work? If any edge is as likely as another to come from one who speaks, a place finds
        the first after so many of them as there are edges for each that is spoken along.
        """
        places = len(self._done) * WORD
        probes = min(self._left, places * (len(self.rows.targets) / max(1, edges)))
        return PROBE * probes < edges

    def _push(self, frontier: Array, edges: int, pool: Pool) -> None:
        self.pushed += edges
        rows, threads = self.rows, min(pool.threads, edges // GRAIN)
        if threads <= 1:
            _push(frontier, 0, len(frontier), rows.offsets, rows.targets, self._done, self._fresh[0])
            return
        while len(self._fresh) < threads:
            self._fresh.append(np.zeros_like(self._done))
        ends = np.minimum(frontier + 1, len(rows.offsets) - 1)
        work = np.cumsum(rows.offsets[ends] - rows.offsets[np.minimum(frontier, ends)] + 1)
        cuts = np.searchsorted(work, [int(work[-1]) * p // threads for p in range(1, threads)]).tolist()
        bounds = [0, *cuts, len(frontier)]

        def push(i: int, _: int) -> None:
            _push(frontier, bounds[i], bounds[i + 1], rows.offsets, rows.targets, self._done, self._fresh[i])

        pool.run(push, [(i, i + 1) for i in range(threads)])
        for other in self._fresh[1:threads]:
            self._fresh[0] |= other
            other[:] = 0

    def _mark(self, frontier: Array) -> None:
        """These are the ones who speak, as bits."""
        self._front[:] = 0
        _set_from(frontier, self.own_at, self._front)

    def _pull(self, pool: Pool) -> None:
        given = self._offsets, *self._backwards()
        words = len(self._done)
        parts = PARTS * pool.threads if pool.threads > 1 and words * WORD > GRAIN else 1
        cuts = [words * p // parts for p in range(parts + 1)]
        pool.run(lambda lo, hi: _pull(lo, hi, *given), list(pairwise(cuts)))

    def _backwards(self) -> tuple[Any, ...]:
        return self._firsts, self._led, self._sources, self._front, self._done, self._fresh[0]

    def hear(self, slots: Array) -> None:
        """Other ranks say the same to these keys of this one."""
        _set_from(slots, self.own_at, self._fresh[0])

    def far(self) -> Array:
        """The places of other ranks that hear it for the first time, ascending: int32."""
        out = np.empty(int(self.own_at) + 1, np.int32)
        return self._taken(ZERO, self.own_at, _frozen(np.empty(0, np.int64)), out)

    def own(self, state: Array) -> Array:
        """The slots of this rank whose values become better, ascending: int64. Call it once."""
        out = np.empty(self.rows.n_targets - int(self.own_at) + 1, np.int64)
        asked = _frozen(state[:0] if self._value is not None and self._beats(self._value) else state)
        return self._taken(self.own_at, np.uint64(self.rows.n_targets), asked, out)

    def _taken(self, first: Any, last: Any, state: Array, out: Array) -> Array:
        found, edges = _take(
            first, last, self._offsets, state, self._value, self.larger, self._done, self._fresh[0], out
        )
        self._left -= int(edges)
        return out[: int(found)]

    def rehearse(self) -> None:
        """All loops once, over nothing: whatever is loaded for them is here when they are needed. Behind
        `begin`.
        """
        none = _frozen(np.empty(0, np.int64))
        alike(np.zeros(1, np.int64))
        if self._sources is not None:
            _pull(0, 0, self._offsets, *self._backwards())
        _set_from(none, self.own_at, self._front)
        self.follow(none, ALONE)
        self.hear(none.astype(np.int32))
        self.far()
        _take(ZERO, ZERO, self._offsets, none, 0, False, self._done, self._fresh[0], np.empty(1, np.int64))

    def forget(self) -> None:
        """What was found counts for nothing."""
        self._value = None
        for fresh in self._fresh:
            fresh[:] = 0


def _frozen(values: Array) -> Array:
    """One compiled loop serves arrays that may be written to and those that may not."""
    values = np.ascontiguousarray(values).view()
    values.flags.writeable = False
    return values
