"""Values that improve along edges until none does: a fixpoint among the rows of one rank.

    x[t] = better of x[t] and edge(x[s], w, ...) over the edges (s -> t), again and again

for a fold by min or max. A source whose value became better waits until it tells its targets; of those that
wait the ones with the best values tell first, so where an edge never makes a value better than it found it (a
length that is not negative, a label that is passed on) each source tells once, its final value. Which
improvement comes first never changes what is reached where edge functions are monotone.

The queue is a radix heap (Ahuja, Mehlhorn, Orlin and Tarjan, Faster algorithms for the shortest path problem,
Journal of the ACM 37, 1990): a source waits in the bucket of the highest bit in which its value differs from
the best that waited. It is linked through arrays by source, so its memory is fixed.

What it is not: a whole fixpoint. Places of other ranks take values and never tell; and what is waiting when
the work allowed is spent waits on. Values that nobody looked at are not read, so a few sources cost what
their edges cost. Nothing here communicates; `iterreduce.linksettle` does, the only caller.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from iterreduce.columns.jit import bit_length, inlined, kernel, prefetch
from iterreduce.columns.link_kernels import EDGE_FUNCTIONS, ROW, EdgeFunction
from iterreduce.columns.links import Links, identity
from iterreduce.columns.ragged import Array

BLOCK_BITS = 6  # values are read 64 at a time, when the first of them is looked at
BUCKETS = 65  # one per highest differing bit, and one for no difference
# a mark: the bucket, or one of these; and whether the value has improved
IN_BATCH, AT_REST, BUCKET, IMPROVED = np.uint8(126), np.uint8(127), np.uint8(127), np.uint8(128)
# what is counted: the best key that waited, places improved, edges followed, 1 if nobody waits
LOW, FOUND, FOLLOWED, DONE = range(4)
AHEAD = 8  # sources whose edges are asked for before they are followed: memory takes 100 ns


@kernel
def _less(a: Any, b: Any) -> Any:
    return a < b


@kernel
def _greater(a: Any, b: Any) -> Any:
    return a > b


@kernel
def _key_of_integer(bits: Any) -> Any:
    return np.uint64(bits) ^ np.uint64(1 << 63)


@kernel
def _key_of_float(bits: Any) -> Any:
    """Unsigned words in the order of the floats whose bits these are."""
    return np.uint64(bits) ^ (np.uint64(bits >> 63) | np.uint64(1 << 63))


@kernel
def _same(key: Any) -> Any:
    return key


@kernel
def _opposite(key: Any) -> Any:
    return ~key


@inlined
def _read(u: Any, x: Any, state: Any, read: Any, stamp: Any, own_at: Any, far: Any) -> None:
    """Values of the place's block as they were: of other ranks' places none is known."""
    block = u >> np.uint64(BLOCK_BITS)
    first = block << np.uint64(BLOCK_BITS)
    for t in range(first, min(first + np.uint64(1 << BLOCK_BITS), np.uint64(len(x)))):
        x[t] = far if t < own_at else state[t - own_at]
    read[block] = stamp


@inlined
def _move(s: Any, old: Any, new: Any, counts: Any, rings: Any) -> None:
    """A source leaves the ring that it is in, if it is in any, and becomes the last of a bucket's."""
    rings[rings[s, 0], 1], rings[rings[s, 1], 0] = rings[s, 1], rings[s, 0]
    head = len(rings) - BUCKETS + new
    last = rings[head, 0]
    rings[s, 0], rings[s, 1], rings[last, 1], rings[head, 0] = last, head, s, s
    counts[old] -= 1
    counts[new] += 1


@kernel
def _take_batch(marks: Any, own_at: Any, counts: Any, rings: Any, batch: Any) -> Any:
    """All of the first bucket; many of them in the order in which their edges lie."""
    n, sources = np.uint64(0), np.uint64(len(batch))
    if counts[0] > len(batch) >> 6:
        for t in range(sources):
            if marks[own_at + t] & BUCKET == 0:
                batch[n] = t
                n += np.uint64(1)
    else:
        s = np.uint64(rings[sources, 1])
        while s != sources:
            batch[n] = s
            n += np.uint64(1)
            s = np.uint64(rings[s, 1])
    for i in range(n):
        s = np.uint64(batch[i])
        rings[s, 0], rings[s, 1] = s, s
        marks[own_at + s] = marks[own_at + s] & IMPROVED | IN_BATCH
    rings[sources, 0], rings[sources, 1], counts[0] = sources, sources, 0
    return n


@cache
def _loops(edge: EdgeFunction, combine: str, floats: bool, m: int) -> tuple[Any, Any, Any]:
    """The loops around an edge function of a value and m columns: put sources in, tell, take values in."""
    better = _less if combine == "min" else _greater
    ordered, turned = _key_of_float if floats else _key_of_integer, _same if combine == "min" else _opposite
    edge_row = ROW[m]

    @kernel
    def bucket_of(bits: Any, low: Any) -> Any:
        key = turned(ordered(bits))
        return bit_length(key ^ low) if key > low else np.uint64(0)

    @kernel
    def put(
        sources: Any,
        values: Any,
        x: Any,
        bits: Any,
        state: Any,
        read: Any,
        stamp: Any,
        own_at: Any,
        far: Any,
        marks: Any,
        counts: Any,
        rings: Any,
        found: Any,
        said: Any,
    ) -> None:
        low = ~np.uint64(0)
        for i in range(np.uint64(len(sources))):
            u = own_at + np.uint64(sources[i])
            if read[u >> np.uint64(BLOCK_BITS)] != stamp:
                _read(u, x, state, read, stamp, own_at, far)
            if better(values[i], x[u]):
                x[u] = values[i]
            low = min(low, turned(ordered(bits[u])))
        said[LOW] = low
        for i in range(np.uint64(len(sources))):
            s = np.uint64(sources[i])
            if marks[own_at + s] == AT_REST:
                bucket = bucket_of(bits[own_at + s], low)
                _move(s, AT_REST, bucket, counts, rings)
                marks[own_at + s] = np.uint8(bucket)

    @kernel
    def best(bits: Any, own_at: Any, marks: Any, counts: Any, rings: Any, said: Any) -> bool:
        """Bring those with the best values into the first bucket; whether anybody waits."""
        b = 0
        while b < BUCKETS and counts[b] == 0:
            b += 1
        if b == BUCKETS:
            return False
        if b == 0:
            return True
        head, low = np.uint64(len(rings) - BUCKETS + b), ~np.uint64(0)
        s = np.uint64(rings[head, 1])
        while s != head:
            low = min(low, turned(ordered(bits[own_at + s])))
            s = np.uint64(rings[s, 1])
        said[LOW] = low
        s = np.uint64(rings[head, 1])
        while s != head:
            after, u = np.uint64(rings[s, 1]), own_at + s
            bucket = bucket_of(bits[u], low)
            _move(s, b, bucket, counts, rings)
            marks[u] = (marks[u] & IMPROVED) | np.uint8(bucket)
            s = after
        return True

    @kernel
    def tell(
        columns: Any,
        offsets: Any,
        targets: Any,
        batch: Any,
        most: Any,
        x: Any,
        bits: Any,
        state: Any,
        read: Any,
        stamp: Any,
        own_at: Any,
        far: Any,
        marks: Any,
        counts: Any,
        rings: Any,
        found: Any,
        said: Any,
    ) -> None:
        one, ahead, followed = np.uint64(1), np.uint64(AHEAD), np.uint64(0)
        while best(bits, own_at, marks, counts, rings, said):
            n = _take_batch(marks, own_at, counts, rings, batch)
            for i in range(n):
                if followed >= most:
                    said[FOLLOWED] = followed
                    return
                prefetch(offsets, np.uint64(batch[min(i + ahead + ahead, n - one)]))
                soon = np.uint64(offsets[batch[min(i + ahead, n - one)]])
                prefetch(targets, soon)
                prefetch(targets, soon + np.uint64(16))
                prefetch(columns, soon)
                prefetch(columns, soon + np.uint64(8))
                s = np.uint64(batch[i])
                marks[own_at + s] = marks[own_at + s] & IMPROVED | AT_REST
                value = x[own_at + s]
                followed += np.uint64(offsets[s + one] - offsets[s])
                for e in range(np.uint64(offsets[s]), np.uint64(offsets[s + one])):
                    u = np.uint64(targets[e])
                    if read[u >> np.uint64(BLOCK_BITS)] != stamp:
                        _read(u, x, state, read, stamp, own_at, far)
                    v = edge(*((value,) + edge_row(columns, e)))  # noqa: RUF005
                    if better(v, x[u]):
                        x[u] = v
                        mark, t = marks[u], u - own_at  # beyond all sources for places of others
                        found[said[FOUND]] = u
                        said[FOUND] += np.uint64(mark & IMPROVED == 0)
                        waits = mark & BUCKET
                        if (t < np.uint64(len(batch))) & (waits != IN_BATCH):
                            bucket = bucket_of(bits[u], said[LOW])
                            if bucket != waits:
                                _move(t, waits, bucket, counts, rings)
                            waits = np.uint8(bucket)
                        marks[u] = waits | IMPROVED
        said[FOLLOWED], said[DONE] = followed, one

    @kernel
    def take(
        slots: Any,
        values: Any,
        x: Any,
        bits: Any,
        state: Any,
        read: Any,
        stamp: Any,
        own_at: Any,
        far: Any,
        marks: Any,
        counts: Any,
        rings: Any,
        found: Any,
        said: Any,
    ) -> None:
        for i in range(np.uint64(len(slots))):
            s = np.uint64(slots[i])
            u = own_at + s
            if read[u >> np.uint64(BLOCK_BITS)] != stamp:
                _read(u, x, state, read, stamp, own_at, far)
            if better(values[i], x[u]):
                x[u] = values[i]
                found[said[FOUND]] = u
                said[FOUND] += np.uint64(marks[u] & IMPROVED == 0)
                sources = np.uint64(len(rings) - BUCKETS)
                marks[u] = (IN_BATCH if s < sources else AT_REST) | IMPROVED

    return put, tell, take


class Settling:
    """The values of a rank's places while they settle; memory for one stage, used again in each superstep.

    ``links``: edges from sources to places, of which those from ``own_at`` on are this rank's keys, sources
    first; ``combine``: min or max; ``edge`` and ``columns``: as those of `Links.sparse`, after the one value.

    >>> links = Links.build(np.array([0, 1, 1]), np.array([1, 2, 0]), 2, 3, {"w": np.array([5, 1, 1])})
    >>> work = Settling(links, 0, "min", np.dtype(np.int64), "x+w", ("w",))
    >>> work.begin(np.array([0, 99, 99]))
    >>> work.put(np.array([0]), np.array([0]))
    >>> work.tell(), work.improved(0, 3).tolist(), work.values[:3].tolist()
    (3, [1, 2], [0, 5, 6])
    """

    def __init__(
        self,
        links: Links,
        own_at: int,
        combine: str,
        word: np.dtype[Any],
        edge: str | EdgeFunction,
        columns: tuple[str, ...] = (),
    ):
        rows, places = links._by_source(), links.n_targets
        self.links, self.own_at = links, np.uint64(own_at)
        self._columns, self._rows = tuple(rows.columns[name] for name in columns), rows
        self._far = identity(combine, word)
        function = EDGE_FUNCTIONS[edge] if isinstance(edge, str) else edge
        self._put, self._tell, self._take = _loops(function, combine, word.kind == "f", len(columns))
        self.values = np.empty(places, word)
        self._read, self._stamp = np.zeros((places >> BLOCK_BITS) + 1, np.uint32), 0
        self._marks, self._found = np.full(places, AT_REST), np.empty(places + 1, np.uint32)
        self._rings = np.empty((links.n_sources + BUCKETS, 2), np.uint32)
        self._counts = np.zeros(int(AT_REST) + 1, np.int64)
        self._batch = np.empty(links.n_sources, np.uint32)
        self._said = np.zeros(4, np.uint64)
        self._clean = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        arrays = (self.values, self._read, self._marks, self._found, self._rings, self._batch)
        return sum(a.nbytes for a in arrays)

    def begin(self, state: Array) -> None:
        """Values are those of ``state``, by slot of this rank's keys; nobody waits."""
        if not self._clean:
            self._marks.fill(AT_REST)
            self._rings[:] = np.arange(len(self._rings), dtype=np.uint32)[:, None]
        else:
            self._marks[self._found[: int(self._said[FOUND])]] = AT_REST
        self._clean = False
        self._stamp += 1
        if self._stamp == 2**32:
            self._read.fill(0)
            self._stamp = 1
        self._said[:] = 0
        self._counts[:] = 0
        values, stamp = (self.values, self.values.view(np.int64)), np.uint32(self._stamp)
        of = _frozen(state), self._read, stamp, self.own_at, self._far
        self._work = *values, *of, self._marks, self._counts, self._rings, self._found, self._said

    def put(self, sources: Array, values: Array) -> None:
        """These sources wait, with these values where they are better than what is known."""
        self._put(sources, _frozen(values), *self._work)

    def tell(self, most_edges: int = 2**62) -> int:
        """Let those that wait tell until nobody waits or so many edges were followed; how many were."""
        rows = self._rows
        self._tell(self._columns, rows.offsets, rows.targets, self._batch, np.uint64(most_edges), *self._work)
        self._clean = bool(self._said[DONE])
        return int(self._said[FOLLOWED])

    def take(self, slots: Array, values: Array) -> None:
        """Values come for keys of this rank from elsewhere; those that became better wait."""
        self._take(slots, _frozen(values), *self._work)

    def improved(self, first: int, last: int) -> Array:
        """The places from first up to last whose values improved, or who wait; ascending."""
        found = int(self._said[FOUND])
        if not self._clean or found > len(self._marks) >> 4:
            return np.flatnonzero(self._marks[first:last] != AT_REST) + first
        places = self._found[:found]
        return np.sort(places[(places >= first) & (places < last)]).astype(np.int64)

    def told(self, places: Array) -> Array:
        """Which of these have told all that they have to tell."""
        told: Array = self._marks[places] & BUCKET == AT_REST
        return told


def _frozen(values: Array) -> Array:
    values = np.ascontiguousarray(values).view()
    values.flags.writeable = False
    return values
