"""Whole rows in bulk: in rounds when nothing is known of them, and by a plan when their keys are.

`RowRounds` moves rows of fixed columns that did not fit the slots of a fresh exchange: every round takes some
hundred kilobytes for each destination, gathered into buffers that stay in cache, and what arrives goes
straight to its final place; this rank's own rows never travel. No packed copy of all rows is made.
(Staging in node-shared windows was measured beside it: rounds of 256 KB are as fast.)

`RowPlan` is a shuffle of rows whose keys are known: one pass over the value columns writes the send buffer,
one Alltoallv moves them, one pass gathers them in their final order. Rows are sent by owner and, within it, by
partition, that is in the order of their hashes up to a stretch that fits the cache, so both passes run at
cache speed. The part that stays here is written once, beside what is received.

How it can go wrong: as in `FreshExchange`; everything local runs under a `Guard`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.agreement import Guard
from iterreduce.columns.batch import Batch
from iterreduce.columns.packing import pack, unpack
from iterreduce.columns.ragged import Array
from iterreduce.columns.routing import RecordLayout, index_dtype, take_into
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import MemoryBudgetError
from iterreduce.exchange import (
    EXTRA,
    ROWS,
    SCHEMA,
    Arrival,
    FreshExchange,
    PlannedExchange,
    exclusive,
    over_budget,
)
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
        self, guard: Guard, rows: Batch, order: Array | None, starts: Array, arrival: Arrival
    ) -> Batch | None:
        """All rows for this rank, in rank order: those that came inline, and the late ones. Collective.

        Destination ``d`` gets rows ``order[starts[d]:]`` (``order`` None: rows from ``starts[d]`` on), as many
        as the headers say to each receiver. None where this rank failed, or was over its budget: it goes on
        sending what it has, and throws away what it gets.
        """
        headers, schema, me = arrival.headers, rows.schema, self.group.rank
        trip = _Trip(schema, headers[:, ROWS], self._round_rows(schema))
        mine = trip.sent(order, starts, len(rows), me) if arrival.late[me] else np.zeros_like(starts)
        sending = Guard(guard.rank, guard.iteration)  # of its own: who cannot receive still sends
        sending.stage = guard.stage
        guard.run(self._claim, trip)
        guard.run(trip.open, self.shelf)
        guard.run(trip.place_inline, arrival)
        self._check_buffers(trip.slot_words)
        coming = np.where(arrival.late, trip.counts, 0)
        own, coming[me], mine[me] = int(mine[me]), 0, 0
        slots, behind = [d * trip.slot_words for d in range(self.group.size)], 0
        for k in range(-(-(int(headers[:, EXTRA].max()) - 1) // trip.rows)):
            done, out, into = k * trip.rows, trip.part(mine, k), trip.part(coming, k)
            sending.run(_pack_round, rows, order, starts + done, out, self._send, slots)
            # own rows now: they stand between those just sent, which are in cache
            guard.run(trip.stay, rows, order, int(starts[me]), done, min(done + trip.rows, own), me)
            behind = done + trip.rows
            self._swap(out, into, trip, slots)
            guard.run(trip.unpack_round, self._recv, slots, into, done)
        guard.run(trip.stay, rows, order, int(starts[me]), behind, own, me)
        guard.failure = guard.failure or sending.failure
        return guard.run(trip.batch)

    def _round_rows(self, schema: Schema) -> int:
        """Rows of a full round: agreed, and a multiple of 8, so that pieces of single bytes fill words."""
        nbytes = max(LEAST_BYTES, min(ROUND_BYTES, ROUNDS_BYTES // self.group.size))
        nbytes = min(nbytes, self.fresh.round_words * 8)
        return max(1, nbytes // row_bytes(schema) // 8) * 8

    def _claim(self, trip: _Trip) -> None:
        limit = self.fresh.limit_words
        if limit is not None and trip.nbytes > limit * 8:
            raise MemoryBudgetError(over_budget(trip.nbytes, limit * 8))

    def _check_buffers(self, slot_words: int) -> None:
        if len(self._send) < self.group.size * slot_words:
            self._send = np.zeros(self.group.size * slot_words, np.int64)
            self._recv = np.zeros(self.group.size * slot_words, np.int64)

    def _swap(self, out: list[int], into: list[int], trip: _Trip, slots: list[int]) -> None:
        sc, rc = [trip.words(n) for n in out], [trip.words(n) for n in into]
        bound = self.group.size * trip.slot_words
        self.group.alltoallv(self._send, sc, slots, self._recv, rc, slots, 0, bound)


def _pack_round(
    rows: Batch, order: Array | None, starts: Array, counts: list[int], send: Array, slots: list[int]
) -> None:
    for d, n in enumerate(counts):
        if n:
            pack(rows, order, int(starts[d]), int(starts[d]) + n, send, slots[d])


class _Trip:
    """One use of `RowRounds`: where rows go in the columns that are being filled."""

    def __init__(self, schema: Schema, counts: Array, rows: int):
        self.schema, self.counts, self.rows = schema, counts, rows
        self.at = exclusive(counts)
        self.total = int(counts.sum())
        self.slot_words = self.words(rows)
        self.nbytes = self.total * row_bytes(schema)

    def words(self, rows: int) -> int:
        """Words of a message of so many rows."""
        return sum(
            -(-rows * f.row_bytes // 8) + (-(-rows // 8) if f.nullable else 0) for f in self.schema.values()
        )

    def part(self, counts: Array, k: int) -> list[int]:
        """Rows of round ``k`` out of these counts."""
        return np.clip(counts - k * self.rows, 0, self.rows).tolist()  # type: ignore[no-any-return]

    def sent(self, order: Array | None, starts: Array, rows: int, me: int) -> Array:
        """Rows for each destination: up to where the next one's begin, or all."""
        if order is None:
            return np.full_like(starts, rows)
        return np.diff(np.append(starts, rows))

    def open(self, shelf: Shelf) -> None:
        """Make room for all rows."""
        self.columns = {n: shelf.new(self.total, f) for n, f in self.schema.items()}
        self.valid = {n: np.empty(self.total, bool) for n, f in self.schema.items() if f.nullable}

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

    def stay(self, rows: Batch, order: Array | None, first: int, lo: int, hi: int, me: int) -> None:
        """Rows ``lo`` to ``hi`` of those that never leave this rank, which begin at ``first``."""
        if hi <= lo:
            return
        at = int(self.at[me])
        if order is None:
            self.put(rows.slice(first + lo, first + hi), at + lo)
            return
        chosen = order[first + lo : first + hi]
        for name, column in self.columns.items():
            take_into(rows[name], chosen, column[at + lo : at + hi])
        for name, mask in self.valid.items():
            take_into(rows.valid(name), chosen, mask[at + lo : at + hi])

    def unpack_round(self, received: Array, slots: list[int], counts: list[int], done: int) -> None:
        """Copy what a round brought to its final place."""
        for source, n in enumerate(counts):
            if n:
                self.put(unpack(received[slots[source] :], self.schema, n), int(self.at[source]) + done)

    def batch(self) -> Batch:
        """The filled columns."""
        return Batch._trusted(dict(self.columns), dict(self.valid), self.total, self.schema)


def row_bytes(schema: Schema) -> int:
    """Bytes of a row of fixed columns and their masks; at least 1."""
    return max(1, sum(f.row_bytes + f.nullable for f in schema.values()))


class RowPlan(PlannedExchange):
    """The exchange of value columns whose keys are known: buffers, counts, and where everything stands.

    One buffer: segments for other ranks, then segments from all ranks in rank order. Segments are records
    behind a gap that holds the header; this rank's own segment stands where it would be received.
    """

    def __init__(
        self,
        group: Group,
        stage: int,
        layout: RecordLayout,
        send_rows: Array,
        recv_rows: Array,
        check: bool = False,
    ):
        super().__init__(group, stage, max(1, layout.width), check)
        me, gap = group.rank, self.gap
        travels = layout.width > 0  # rows without values: nothing but headers
        self.send_rows, recv_rows = send_rows * travels, recv_rows * travels
        send_counts, recv_words = (self.send_rows + gap) * self.width, (recv_rows + gap) * self.width
        recv_counts = recv_words.copy()
        send_counts[me] = recv_counts[me] = gap * self.width  # of the own segment the header alone
        send_at, recv_at = exclusive(send_counts), exclusive(recv_words)
        sent = int(send_counts.sum())
        self.buffer = np.zeros(sent + int(recv_words.sum()), np.int64)
        self.send, self.recv = self.buffer[:sent], self.buffer[sent:]
        self._lay_out(send_counts, send_at, recv_counts, recv_at)
        self.read_from = (sent + recv_at) // self.width + gap
        self.write_from = send_at // self.width + gap
        self.write_from[me] = self.read_from[me]
        self.layout, self.views = layout, layout.views(self.buffer)

    def places(self, order: Array) -> Array:
        """The record of each row, if ``order`` lists the rows for rank 0, then those for rank 1 and so on."""
        return _spread(order, self.write_from, self.send_rows, len(self.buffer) // self.width)

    def arrivals(self, order: Array, recv_rows: Array) -> Array:
        """The record of each row received; ``order`` lists them, numbered by source, as they were sent."""
        return _spread(order, self.read_from, recv_rows, len(self.buffer) // self.width)

    def write(self, batch: Batch, place: Array) -> None:
        """Value columns of some rows into the buffer."""
        self.layout.write(batch, place, self.views)


def _spread(order: Array, firsts: Array, counts: Array, records: int) -> Array:
    """``out[order[i]]`` is the i-th of the records that begin at ``firsts``, ``counts`` of them each."""
    out = np.zeros(len(order), index_dtype(records))
    if int(counts.sum()):
        out[order] = np.arange(len(order)) + np.repeat(firsts - exclusive(counts), counts)
    return out


@dataclass(frozen=True)
class RowPlanBody:
    """The large part of a plan, kept in the cache: where rows are written, whence they are read, their keys."""

    names: tuple[str, ...]
    place: Array
    final: Array
    keys: Batch

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return int(self.place.nbytes + self.final.nbytes + self.keys.nbytes)

    def rows(self, keys: Batch, columns: Mapping[str, Any], valid: Mapping[str, Array]) -> Batch:
        """Keys and values side by side, in the order in which the columns came."""
        both = {n: keys._columns[n] if n in keys else columns[n] for n in self.names}
        return Batch._trusted(both, dict(valid), len(keys))


__all__ = ["RowPlan", "RowPlanBody", "RowRounds", "Shelf", "fixed", "go_in_rounds", "row_bytes", "rows_extra"]
