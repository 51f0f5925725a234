"""Whole rows whose keys are known: only values travel, and nothing is hashed, counted or sorted.

One pass over the value columns writes the send buffer, one Alltoallv moves them, one pass gathers them in
their final order. Rows are sent by owner and, within it, by partition, that is in the order of their hashes
up to a stretch that fits the cache, so both passes run at cache speed. The part that stays on this rank is
written once, beside what is received.

Columns of a row stand side by side in records of whole words, so ragged columns have no place here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.routing import RecordLayout, index_dtype
from iterreduce.exchange import PlannedExchange, exclusive
from iterreduce.group import Group


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
    """The large part of a plan, kept in the cache: where rows are written and read, and the keys made."""

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
