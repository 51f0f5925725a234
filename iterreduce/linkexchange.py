"""The planned exchange of indexed rows: some words for every key of another rank that is named here.

Segments begin with a gap of `GAP` places, in the first of which the header stands, so that the folded values
of one word each are the message as they lie. Nothing here knows keys or stages.
"""

from __future__ import annotations

import numpy as np

from iterreduce.collectives import Group
from iterreduce.columns.ragged import Array
from iterreduce.exchange import PlannedExchange, exclusive
from iterreduce.indexing import GAP


class LinkExchange(PlannedExchange):
    """Some words per place, to the owners of places (push) or from them (pull)."""

    def __init__(self, group: Group, stage: int, width: int, sent: Array, received: Array, check: bool):
        super().__init__(group, stage, width, check)
        self.gap = GAP
        send_counts, recv_counts = (sent + GAP) * width, (received + GAP) * width
        self.send_at, self.recv_at = exclusive(send_counts), exclusive(recv_counts)
        self.send = np.zeros(int(send_counts.sum()), np.int64)
        self.recv = np.zeros(int(recv_counts.sum()), np.int64)
        self._lay_out(send_counts, self.send_at, recv_counts, self.recv_at)
        self._received = received

    def arrived(self, source: int) -> Array:
        """What came from a rank: int64 ``(rows, width)``."""
        first = int(self.recv_at[source]) + GAP * self.width
        return self.recv[first : first + int(self._received[source]) * self.width].reshape(-1, self.width)
