"""Whole rows in bulk within one node: every rank writes its rows to their places in the others' memory.

Where all ranks share memory, one pass takes each row from its column to its place at the owner: there is no
send buffer, no message, and nobody waits between two rounds. The areas belong to the group (`Group.shared`)
and are used again by the next exchange, so what came must have left them by then: `RowShuffle.finish` brings
it into the order of its keys and so copies it anyway. Their first use costs more than rounds do, so only
stages that run again and again come here.

How it can go wrong: areas are replaced by larger ones on all ranks or on none, by counts that all have seen;
what is local runs under a `Guard`. What it is not: it knows no keys; and where ranks stand on several nodes,
shared memory is short or a rank's memory has a budget, rows go as `iterreduce.rowrounds` sends them.
"""

from __future__ import annotations

import numpy as np

from iterreduce.agreement import Guard
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.exchange import EXTRA, Arrival, FreshExchange
from iterreduce.group import Group, Window
from iterreduce.rowrounds import Trip, row_bytes

LEAST_BYTES = 4 << 20  # from one rank to another: below, a few rounds cost less than two meetings
STRIDE = 1 << 14  # rows for each destination at a time: what lies between them is read for all while in cache


class RowWindow:
    """Moves the late rows of a fresh exchange, if ranks share memory."""

    def __init__(self, group: Group, fresh: FreshExchange):
        self.group, self.fresh = group, fresh
        self.least_bytes, self.stride = LEAST_BYTES, STRIDE

    def serves(self, rows: Batch, arrival: Arrival) -> bool:
        """Is it worth asking for shared memory? A function of headers and options."""
        most = int(arrival.headers[:, EXTRA].max()) - 1
        return self.fresh.limit_words is None and most * row_bytes(rows.schema) >= self.least_bytes

    def run(
        self,
        guard: Guard,
        rows: Batch,
        sent: Array,
        order: Array | None,
        starts: Array,
        arrival: Arrival,
    ) -> tuple[Batch | None, bool]:
        """All rows for this rank, in rank order, in memory that the next exchange uses again (None where this
        rank failed), and True; or False, on all ranks, where they share no memory: nothing was sent.
        Collective.

        Destination ``d`` gets rows ``order[starts[d]:]``, ``sent[d]`` of them.
        """
        table = self._told(sent)
        totals = table.sum(axis=0).tolist()
        trip = Trip(rows.schema, table[:, self.group.rank], 0)
        window = self.group.shared([trip.words(n) for n in totals])
        if window is None:
            return None, False
        guard.run(trip.open_in, window.mine)
        guard.run(trip.load, rows, order)
        if arrival.late[self.group.rank]:
            guard.run(self._write, trip, window, table, totals, starts)
        window.fence()
        guard.run(trip.place_inline, arrival)
        return guard.run(trip.batch), True

    def _told(self, sent: Array) -> Array:
        """The rows from each rank to each. Collective."""
        size = self.group.size
        table = np.zeros(size * size, np.int64)
        self.group.allgather(np.ascontiguousarray(sent, np.int64), table, size)
        return table.reshape(size, size)

    def _write(self, trip: Trip, window: Window, table: Array, totals: list[int], starts: Array) -> None:
        """This rank's rows to all places, a stretch for every destination in turn."""
        me, size = self.group.rank, self.group.size
        first, counts = table[:me].sum(axis=0).tolist(), table[me].tolist()
        there = [trip.slot(window.of(d), 0, totals[d]) for d in range(size)]
        begins = starts.tolist()
        for done in range(0, max(counts), self.stride):
            for turn in range(size):
                d = (me + turn) % size
                end = min(done + self.stride, counts[d])
                if end > done:
                    at = first[d]
                    trip.move(begins[d] + done, begins[d] + end, there[d], at + done, at + end)
        off = sum(counts) - counts[me]
        self.group.traffic.count(trip.words(off))
