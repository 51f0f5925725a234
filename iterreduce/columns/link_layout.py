"""How a rank's edges lie in memory: by source, and, for sums over all of them, in pieces or in blocks.

Three layouts, none of which knows what travels along an edge:

`Rows`    compressed rows by source: ``targets[offsets[s]:offsets[s + 1]]``, in the order in which they came.
`Pieces`  for graphs with hubs. Sources are cut into segments of 2^16 slots, whose values stay in cache. A
          piece is all edges from one segment to one target. Pieces of one length lie together: a loop of a
          known length is predicted by the processor, and the length is stored once. Four of them are
          interleaved, so that four sums go on at a time. 2 bytes per edge and 4 per piece.
`Blocks`  where most pieces would be of one or two edges: a segment of sources and a stretch of 2^15 targets
          make a block, in which edges stand by source. 4 bytes per edge.

The cut into segments follows Zhang, Kiriansky, Mendis, Amarasinghe and Zaharia, Making caches work for graph
analytics (IEEE Big Data 2017); the blocks Buono, Petrini, Checconi et al., Optimizing sparse matrix-vector
multiplication for large-scale data analytics (ICS 2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.link_kernels import LANES, LENGTH, LONG, PIECE, PIECES, SEGMENT
from iterreduce.columns.ragged import Array

LONGEST = 64
"""Pieces of so many edges and more are stored with their length: a wrong prediction per 64 edges is cheap."""
BLOCK_BITS = 15
"""Targets of a block: 2^15 float64 sums are 256 KB, which a second-level cache holds beside a segment."""
EDGES_PER_BLOCK = 16
"""Fewest on average: of very thin graphs the stretches of targets are longer."""
GROUP_BITS = 6
DEGREES = 1024  # in-degrees are told apart up to here where pieces are estimated


@dataclass(frozen=True)
class Rows:
    """Edges by source: ``offsets`` int64 (sources + 1,), ``targets`` uint32 (edges,), columns (edges,)."""

    offsets: Array
    targets: Array
    columns: dict[str, Array]
    n_targets: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.offsets.nbytes + self.targets.nbytes + sum(c.nbytes for c in self.columns.values())

    def segments(self) -> Array:
        """The first edge of every segment of sources, and the end: int64 (segments + 1,)."""
        starts = self.offsets[:-1:SEGMENT]
        return np.append(starts, self.offsets[-1])

    def edges_of(self, sources: Array) -> int:
        """How many edges leave these sources; there are none of slots behind the last."""
        return int(_edges_of(self.offsets, sources))


@dataclass(frozen=True)
class Pieces:
    """Pieces by segment and length. A row of ``runs``, int64, is all pieces of a segment of one length: the
    segment's first source slot, its first piece, its first edge, how many pieces, their length (0: those of
    `LONGEST` edges or more), and, for these, where in ``longs`` their first edges stand.
    """

    runs: Array
    rows: Array  # uint32 (pieces,): the target
    longs: Array  # uint64: the first edge of each long piece of a run, then the end of its last
    index: Array  # uint16 (edges,): the source's number in its segment
    columns: dict[str, Array]
    grain = 1

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        arrays = (self.runs, self.rows, self.longs, self.index, *self.columns.values())
        return sum(a.nbytes for a in arrays)


@dataclass(frozen=True)
class Blocks:
    """Blocks by stretch of ``2**bits`` targets, then by segment; ``bounds[h, g]`` is a block's first edge."""

    bounds: Array  # int64 (stretches, segments + 1)
    bits: int
    index: Array  # uint16 (edges,): the source's number in its segment
    target: Array  # uint16, or uint32 beyond 2^16 targets, (edges,): the target's number in its stretch
    columns: dict[str, Array]

    @property
    def grain(self) -> int:
        """Ranges of targets begin at multiples of it."""
        return 1 << self.bits

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in (self.bounds, self.index, self.target, *self.columns.values()))


def lay_out(rows: Rows, counts: Array) -> Pieces | Blocks:
    """The smaller of the two layouts, as estimated from the in-degrees ``counts``."""
    if expected_pieces(rows, counts) > len(rows.targets) / 2:
        return lay_blocks(rows)
    return lay_pieces(rows)


def expected_pieces(rows: Rows, counts: Array) -> float:
    """About how many pieces there are, if edges of a target fall into segments as all edges do."""
    of_degree = np.bincount(np.minimum(counts, DEGREES), minlength=DEGREES + 1)
    degrees = np.flatnonzero(of_degree)
    edges = np.diff(rows.segments())
    missed = 1 - edges / max(1, edges.sum())
    return float(sum((of_degree[degrees] * (1 - m**degrees)).sum() for m in missed))


@kernel
def _edges_of(offsets: Any, sources: Any) -> int:
    edges, behind, one = 0, np.uint64(len(offsets) - 1), np.uint64(1)
    for i in range(len(sources)):
        s = np.uint64(sources[i])
        if s < behind:
            edges += offsets[s + one] - offsets[s]
    return edges


@kernel
def in_degrees(targets: Any, counts: Any) -> None:
    """Count edges by target."""
    for e in range(len(targets)):
        counts[targets[e]] += 1


@kernel
def _mark(targets: Any, first: Any, last: Any, place: Any, groups: Any) -> None:
    """Count a segment's edges by target, and note which groups of targets have any."""
    for e in range(first, last):
        t = np.uint64(targets[e])
        place[t] += 1
        groups[t >> np.uint64(GROUP_BITS)] = True


@kernel
def _count_lengths(place: Any, groups: Any, lengths: Any) -> None:
    """How many pieces there are of each length; the last entry is of all long ones."""
    longest = len(lengths) - 1
    for group in range(len(groups)):
        if groups[group]:
            for t in range(group << GROUP_BITS, min((group + 1) << GROUP_BITS, len(place))):
                if place[t]:
                    lengths[min(place[t], longest)] += 1


@kernel
def _write_rows(place: Any, groups: Any, next_piece: Any, rows: Any, long_lengths: Any) -> None:
    """Write the targets of all pieces, ascending among those of one length, and the lengths of long ones;
    forget the marks."""
    longest, seen = len(next_piece) - 1, 0
    for group in range(len(groups)):
        if groups[group]:
            groups[group] = False
            for t in range(group << GROUP_BITS, min((group + 1) << GROUP_BITS, len(place))):
                if place[t]:
                    length = min(place[t], longest)
                    rows[next_piece[length]] = t
                    next_piece[length] += 1
                    if length == longest:
                        long_lengths[seen] = place[t]
                        seen += 1
                    place[t] = 0


@kernel
def _begin(runs: Any, rows: Any, longs: Any, place: Any) -> None:
    """For each target with a piece in these runs: twice the place of its first edge, odd if interleaved."""
    for r in range(len(runs)):
        _, piece, edge, pieces, length, long = runs[r]
        even = pieces // LANES * LANES
        for p in range(pieces):
            if length == 0:
                at = 2 * np.int64(longs[long + p])
            elif p < even:
                at = 2 * (edge + p // LANES * LANES * length + p % LANES) + 1
            else:
                at = 2 * (edge + p * length)
            place[rows[piece + p]] = at


@kernel
def _scatter_slots(offsets: Any, targets: Any, first: Any, last: Any, place: Any, out: Any) -> None:
    for s in range(first, last):
        for e in range(offsets[s], offsets[s + 1]):
            t = targets[e]
            at = np.int64(place[t])
            out[np.uint64(at >> 1)] = s - first
            place[t] = at + 2 + (at & 1) * (2 * LANES - 2)


@kernel
def _scatter_column(targets: Any, first: Any, last: Any, place: Any, column: Any, out: Any) -> None:
    for e in range(first, last):
        t = targets[e]
        at = np.int64(place[t])
        out[np.uint64(at >> 1)] = column[e]
        place[t] = at + 2 + (at & 1) * (2 * LANES - 2)


@kernel
def _forget(rows: Any, place: Any) -> None:
    for p in range(len(rows)):
        place[rows[p]] = 0


class _PieceWriter:
    """Lays out one segment after another; keeps 4 or 8 bytes per target while it does."""

    def __init__(self, source: Rows):
        edges = len(source.targets)
        self.source = source
        # a place is twice an edge's; half as wide, more of them stay in cache
        self.place = np.zeros(source.n_targets, np.int32 if 2 * edges < 2**31 - 8 else np.int64)
        self.groups = np.zeros((source.n_targets >> GROUP_BITS) + 1, np.bool_)
        self.index = np.empty(edges, np.uint16)
        self.columns = {name: np.empty(edges, c.dtype) for name, c in source.columns.items()}
        self.runs: list[Array] = []
        self.rows: list[Array] = []
        self.longs: list[Array] = []
        self.pieces = self.long = 0

    def segment(self, g: int, first: int, last: int) -> None:
        """Lay out the edges ``[first, last)`` of the segment g."""
        lengths = np.zeros(LONGEST + 1, np.int64)
        _mark(self.source.targets, first, last, self.place, self.groups)
        _count_lengths(self.place, self.groups, lengths)
        runs = _runs_of(g, lengths, first)
        rows, long_lengths = np.empty(lengths.sum(), np.uint32), np.empty(lengths[-1], np.int64)
        _write_rows(self.place, self.groups, np.cumsum(lengths) - lengths, rows, long_lengths)
        longs = last - long_lengths.sum() + np.concatenate([[0], np.cumsum(long_lengths)])
        self._scatter(g, first, last, (runs, rows, longs.astype(np.uint64)))
        runs[:, PIECE] += self.pieces
        runs[:, LONG] += self.long
        self.pieces, self.long = self.pieces + len(rows), self.long + len(longs)
        self.runs.append(runs)
        self.rows.append(rows)
        self.longs.append(longs.astype(np.uint64))

    def _scatter(self, g: int, first: int, last: int, pieces: tuple[Array, Array, Array]) -> None:
        offsets, targets = self.source.offsets, self.source.targets
        slots = g * SEGMENT, min((g + 1) * SEGMENT, len(offsets) - 1)
        _begin(*pieces, self.place)
        _scatter_slots(offsets, targets, *slots, self.place, self.index)
        for name, column in self.source.columns.items():
            _begin(*pieces, self.place)
            _scatter_column(targets, first, last, self.place, column, self.columns[name])
        _forget(pieces[1], self.place)

    def done(self) -> Pieces:
        """All segments together."""
        runs = np.concatenate([np.empty((0, 6), np.int64), *self.runs])
        rows = np.concatenate([np.empty(0, np.uint32), *self.rows])
        longs = np.concatenate([np.empty(0, np.uint64), *self.longs])
        return Pieces(runs, rows, longs, self.index, self.columns)


def _runs_of(g: int, lengths: Array, first: int) -> Array:
    """The runs of one segment, pieces counted from 0; long pieces, of which the length is 0, come last."""
    used = np.flatnonzero(lengths)
    pieces = lengths[used]
    length = np.where(used < LONGEST, used, 0)
    runs = np.zeros((len(used), 6), np.int64)
    runs[:, 0] = g * SEGMENT
    runs[:, 1] = np.cumsum(pieces) - pieces
    runs[:, 2] = first + np.cumsum(pieces * length) - pieces * length
    runs[:, PIECES], runs[:, LENGTH] = pieces, length
    return runs


def lay_pieces(rows: Rows) -> Pieces:
    """Edges in pieces."""
    writer, starts = _PieceWriter(rows), rows.segments()
    for g, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        if first < last:
            writer.segment(g, first, last)
    return writer.done()


@kernel
def _count_blocks(targets: Any, starts: Any, bits: Any, sizes: Any) -> None:
    for g in range(len(starts) - 1):
        for e in range(starts[g], starts[g + 1]):
            sizes[targets[e] >> bits, g] += 1


@kernel
def _scatter_blocks(offsets: Any, targets: Any, bits: Any, place: Any, index: Any, target: Any) -> None:
    low = (np.uint32(1) << bits) - np.uint32(1)
    for s in range(len(offsets) - 1):
        g = s // SEGMENT
        for e in range(offsets[s], offsets[s + 1]):
            t = targets[e]
            at = place[t >> bits, g]
            index[at], target[at] = s - g * SEGMENT, t & low
            place[t >> bits, g] = at + 1


@kernel
def _scatter_block_column(targets: Any, starts: Any, bits: Any, place: Any, column: Any, out: Any) -> None:
    for g in range(len(starts) - 1):
        for e in range(starts[g], starts[g + 1]):
            h = targets[e] >> bits
            out[place[h, g]] = column[e]
            place[h, g] += 1


def lay_blocks(rows: Rows) -> Blocks:
    """Edges in blocks."""
    edges, starts, bits = len(rows.targets), rows.segments(), BLOCK_BITS
    segments = len(starts) - 1
    while (rows.n_targets >> bits) * segments * EDGES_PER_BLOCK > edges and bits < 31:
        bits += 1
    width = np.uint32(bits)
    sizes = np.zeros(((rows.n_targets + (1 << bits) - 1) >> bits, segments), np.int64)
    _count_blocks(rows.targets, starts, width, sizes)
    ends = np.cumsum(sizes).reshape(sizes.shape)
    first = ends - sizes
    bounds = (
        np.concatenate([first, ends[:, -1:]], axis=1) if segments else np.zeros((len(sizes), 1), np.int64)
    )
    index, target = np.empty(edges, np.uint16), np.empty(edges, np.uint16 if bits <= 16 else np.uint32)
    _scatter_blocks(rows.offsets, rows.targets, width, first.copy(), index, target)
    columns = {name: np.empty(edges, c.dtype) for name, c in rows.columns.items()}
    for name, column in rows.columns.items():
        _scatter_block_column(rows.targets, starts, width, first.copy(), column, columns[name])
    return Blocks(bounds, bits, index, target, columns)
