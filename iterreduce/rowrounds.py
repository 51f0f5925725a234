"""Whole rows in bulk, when nothing is known of them: in rounds, from their columns to their final places.

`RowRounds` moves rows of fixed columns that did not fit the slots of a fresh exchange. Every round takes up
to a megabyte for each destination, gathered into buffers that stay in cache, and what arrives goes straight
to its final place; this rank's own rows never travel. No packed copy of all rows is made. (Within one node
`iterreduce.rowwindow` goes without messages.)

How it can go wrong: as in `FreshExchange`: rounds are counted from headers that all ranks have seen, and
everything local runs under a `Guard`. What it is not: it knows no keys; who calls it says who gets what.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np

from iterreduce.agreement import Guard
from iterreduce.columns.batch import Batch
from iterreduce.columns.packing import unpack
from iterreduce.columns.ragged import Array
from iterreduce.columns.routing import as_units, gather, unit_of
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import MemoryBudgetError, ScratchError
from iterreduce.exchange import EXTRA, ROWS, SCHEMA, Arrival, FreshExchange, exclusive, over_budget
from iterreduce.group import Group

ROUND_BYTES = 1 << 20  # for one destination: in cache, and few rounds (each costs 0.1 ms of Python)
ROUNDS_BYTES = 16 << 20  # for all destinations together
LEAST_BYTES = 64 << 10
KEPT_BYTES = 1 << 20  # columns from this size on are worth keeping: fresh pages cost more than a copy


class Shelf:
    """Arrays for results, used again once nobody holds them: a loop's rows alternate between two of them.

    An array is free when the shelf holds the only reference (views refer to their base). What an iteration
    did not need is let go.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self.kept_bytes = kept_bytes
        self._arrays: list[Array] = []
        self._taken: list[int] = []

    def new(self, rows: int, field: Field) -> Array:
        """An array for a fixed column, its contents undefined."""
        nbytes = rows * field.row_bytes
        if nbytes < self.kept_bytes or not nbytes:
            return np.empty((rows, *field.shape), field.dtype)
        self._taken.append(nbytes)
        for i in range(len(self._arrays)):
            if self._arrays[i].nbytes == nbytes and _holders(self._arrays, i) == UNHELD:
                return self._arrays[i].view(field.dtype).reshape(rows, *field.shape)
        self._arrays.append(np.empty(nbytes, np.uint8))
        return self._arrays[-1].view(field.dtype).reshape(rows, *field.shape)

    def trim(self) -> None:
        """Forget what is free, but for as much as was taken since the last time."""
        spare, kept = self._taken, []
        for i in range(len(self._arrays)):
            nbytes = self._arrays[i].nbytes
            if _holders(self._arrays, i) != UNHELD:
                kept.append(self._arrays[i])
            elif nbytes in spare:
                spare.remove(nbytes)
                kept.append(self._arrays[i])
        self._arrays, self._taken = kept, []

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return sum(a.nbytes for a in self._arrays)


def _holders(arrays: list[Array], i: int) -> int:
    return sys.getrefcount(arrays[i])


UNHELD = _holders([np.empty(0)], 0)  # what the same line says of an array that only the list holds


def fixed(schema: Schema) -> bool:
    """Has every column rows of one size? Only such rows go in rounds, and into plans."""
    return all(f.kind == "fixed" for f in schema.values())


def rows_extra(schema: Schema, counts: Array, rank: int) -> int:
    """The header's extra word: 0 where rows cannot go in rounds, else 1 + the most rows for another rank."""
    return 1 + int(np.delete(counts, rank).max(initial=0)) if fixed(schema) else 0


def go_in_rounds(headers: Array) -> bool:
    """Do the rows that did not come inline follow in rounds? A function of headers alone."""
    return bool((headers[headers[:, SCHEMA] != 0, EXTRA] > 0).all())


class RowRounds:
    """Moves the late rows of a fresh exchange. Buffers are made when first needed and stay."""

    def __init__(self, group: Group, fresh: FreshExchange, shelf: Shelf):
        self.group, self.fresh, self.shelf = group, fresh, shelf
        self._send = self._recv = np.empty(0, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return self._send.nbytes + self._recv.nbytes

    def run(
        self, guard: Guard, rows: Batch, order: Array | None, starts: Array, counts: Array, arrival: Arrival
    ) -> Batch | None:
        """All rows for this rank, in rank order: those that came inline, and the late ones. Collective.

        Destination ``d`` gets the ``counts[d]`` rows ``order[starts[d]:]`` (``order`` None: rows from
        ``starts[d]`` on). None where this rank failed, or was over its budget: it goes
        on sending what it has, and throws away what it gets.
        """
        headers, schema, me = arrival.headers, rows.schema, self.group.rank
        trip = Trip(schema, headers[:, ROWS], self._round_rows(schema))
        mine = counts.copy() if arrival.late[me] else np.zeros_like(counts)
        sending = Guard(guard.rank, guard.iteration)  # of its own: who cannot receive still sends
        sending.stage = guard.stage
        guard.run(self._claim, trip)
        guard.run(trip.open, self.shelf)
        guard.run(trip.place_inline, arrival)
        sending.run(trip.load, rows, order)
        if no_room := self._claim_buffers(trip.slot_words):
            guard.run(_refuse, no_room)
            return None
        coming = np.where(arrival.late, trip.counts, 0)
        own, coming[me], mine[me] = int(mine[me]), 0, 0
        sends, comes = mine.tolist(), coming.tolist()
        slots, behind = [d * trip.slot_words for d in range(self.group.size)], 0
        for k in range(-(-(int(headers[:, EXTRA].max()) - 1) // trip.rows)):
            done = k * trip.rows
            out, into = trip.part(sends, done), trip.part(comes, done)
            sending.run(trip.pack_round, self._send, slots, out, starts + done)
            # own rows now: they stand between those just sent, which are in cache
            guard.run(trip.stay, int(starts[me]), done, min(done + trip.rows, own), me)
            behind = done + trip.rows
            self._swap(out, into, trip, slots)
            guard.run(trip.unpack_round, self._recv, slots, into, done)
        guard.run(trip.stay, int(starts[me]), behind, own, me)
        guard.failure = guard.failure or sending.failure
        return guard.run(trip.batch)

    def _round_rows(self, schema: Schema) -> int:
        """Rows of a full round: agreed, and a multiple of 8, so that pieces of single bytes fill words."""
        nbytes = max(LEAST_BYTES, min(ROUND_BYTES, ROUNDS_BYTES // self.group.size))
        nbytes = min(nbytes, self.fresh.round_words * 8)
        return max(1, nbytes // row_bytes(schema) // 8) * 8

    def _claim(self, trip: Trip) -> None:
        limit = self.fresh.limit_words
        if limit is not None and trip.nbytes > limit * 8:
            raise MemoryBudgetError(over_budget(trip.nbytes, limit * 8))

    def _claim_buffers(self, slot_words: int) -> str:
        """Buffers for a round, or why some rank has no room for its own. Collective as `buffers` is."""
        words = self.group.size * slot_words
        grow = len(self._send) < words
        made, no_room = self.fresh.buffers(*(words, words) if grow else ())
        if grow and not no_room:
            self._send, self._recv = made
        return no_room

    def _swap(self, out: list[int], into: list[int], trip: Trip, slots: list[int]) -> None:
        sc, rc = [trip.words(n) for n in out], [trip.words(n) for n in into]
        bound = self.group.size * trip.slot_words
        self.group.alltoallv(self._send, sc, slots, self._recv, rc, slots, 0, bound)


def _refuse(no_room: str) -> None:
    raise ScratchError(no_room)


class Trip:
    """One move of rows: columns and masks as pieces of unsigned integers, read here, filled there."""

    def __init__(self, schema: Schema, counts: Array, rows: int):
        self.schema, self.counts, self.rows = schema, counts, rows
        self.at = exclusive(counts)
        self.total = int(counts.sum())
        self.units = [unit_of(f.row_bytes) for f in schema.values() if f.row_bytes]
        self.units += [unit_of(1) for f in schema.values() if f.nullable]
        self.piece_bytes = [unit.itemsize * per_row for unit, per_row in self.units]
        self.slot_words = self.words(rows)
        self.nbytes = self.total * row_bytes(schema)

    def words(self, rows: int) -> int:
        """Words of a message of so many rows."""
        return sum([-(-rows * nbytes // 8) for nbytes in self.piece_bytes])

    def _pieces(self, columns: Mapping[str, Array], masks: Mapping[str, Array]) -> list[Array]:
        """The same memory, as units."""
        found = [columns[n] for n, f in self.schema.items() if f.row_bytes]
        found += [masks[n] for n, f in self.schema.items() if f.nullable]
        return [as_units(c, *unit) for c, unit in zip(found, self.units, strict=True)]

    def part(self, counts: list[int], done: int) -> list[int]:
        """Rows of the next round out of these counts."""
        return [min(max(n - done, 0), self.rows) for n in counts]

    def open(self, shelf: Shelf) -> None:
        """Make room for all rows."""
        self.columns = {n: shelf.new(self.total, f) for n, f in self.schema.items()}
        self.valid = {n: np.empty(self.total, bool) for n, f in self.schema.items() if f.nullable}
        self.made = self._pieces(self.columns, self.valid)

    def open_in(self, words: Array) -> None:
        """All rows stand in this memory, piece after piece."""
        self.made, self.columns, self.valid = self.slot(words, 0, self.total), {}, {}
        pieces = iter(self.made)
        for name, field in self.schema.items():
            if self.total and field.row_bytes:
                self.columns[name] = next(pieces).view(field.dtype).reshape(self.total, *field.shape)
            else:
                self.columns[name] = np.empty((self.total, *field.shape), field.dtype)
        for name, field in self.schema.items():
            if field.nullable:
                self.valid[name] = next(pieces).view(bool) if self.total else np.empty(0, bool)

    def load(self, rows: Batch, order: Array | None) -> None:
        """The rows to send."""
        self.order, self.given = order, self._pieces(rows._columns, rows._valid)

    def put(self, part: Batch, at: int) -> None:
        """Copy rows to their final place."""
        for name, column in self.columns.items():
            column[at : at + len(part)] = part[name]
        for name, mask in self.valid.items():
            mask[at : at + len(part)] = part.valid(name)

    def place_inline(self, arrival: Arrival) -> None:
        """What has come."""
        for source in np.flatnonzero(~arrival.late).tolist():
            n = int(self.counts[source])
            if n:
                self.put(unpack(arrival.segment(source), self.schema, n), int(self.at[source]))

    def _move(self, piece: int, lo: int, hi: int, out: Array) -> None:
        if self.order is None:
            out[...] = self.given[piece][lo:hi]
        else:
            gather(self.given[piece], self.order[lo:hi], out)

    def move(self, lo: int, hi: int, there: list[Array], at: int, end: int) -> None:
        """Rows ``lo`` to ``hi`` as they are sent into rows ``at`` to ``end`` of such pieces."""
        for piece, out in enumerate(there):
            self._move(piece, lo, hi, out[at:end])

    def stay(self, first: int, lo: int, hi: int, me: int) -> None:
        """Rows ``lo`` to ``hi`` of those that never leave this rank, which begin at ``first``."""
        if hi > lo:
            at = int(self.at[me])
            self.move(first + lo, first + hi, self.made, at + lo, at + hi)

    def pack_round(self, send: Array, slots: list[int], counts: list[int], starts: Array) -> None:
        """The next rows for every destination into its slot, piece after piece."""
        for slot, n, lo in zip(slots, counts, starts.tolist(), strict=True):
            for piece, part in enumerate(self.slot(send, slot, n)):
                self._move(piece, lo, lo + n, part)

    def unpack_round(self, received: Array, slots: list[int], counts: list[int], done: int) -> None:
        """Copy what a round brought to its final place."""
        for slot, n, at in zip(slots, counts, self.at.tolist(), strict=True):
            for made, part in zip(self.made, self.slot(received, slot, n), strict=bool(n)):
                made[at + done : at + done + n] = part

    def slot(self, words: Array, at: int, rows: int) -> list[Array]:
        """The pieces of a message that begins at this word; none if it has no rows."""
        parts: list[Array] = []
        for (unit, per_row), nbytes in zip(self.units, self.piece_bytes, strict=True):
            end = at + -(-rows * nbytes // 8)
            flat = words[at:end].view(unit)[: rows * per_row]
            parts.append(flat if per_row == 1 else flat.reshape(rows, per_row))
            at = end
        return parts if rows else []

    def batch(self) -> Batch:
        """The filled columns."""
        return Batch._trusted(dict(self.columns), dict(self.valid), self.total, self.schema)


def row_bytes(schema: Schema) -> int:
    """Bytes of a row of fixed columns and their masks; at least 1."""
    return max(1, sum(f.row_bytes + f.nullable for f in schema.values()))
