"""Another way for the ranks of a group to talk: a few words when they begin and when they part.

It has messages of its own under a tag of its own, on the communicator of the group: a rank that is here never
meets one that is in a collective, and a group that goes on without dead ranks takes its channel along.

Bytes go through rank 0, which takes ranks one by one. Errors are those of the group's collectives.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

TAG = 1  # the group's own messages from rank to rank have 0


class Channel(Protocol):
    """What a rank can say beside the work. A group is one, too."""

    def allgather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, in rank order, on all ranks. Collective."""


class _Ranks(Protocol):
    """What is needed of a group."""

    rank: int
    size: int

    @property
    def comm(self) -> Any: ...

    def wait(self, request: Any) -> None: ...


class Aside:
    """Of a group of MPI."""

    def __init__(self, group: _Ranks) -> None:
        self._group = group

    def allgather_bytes(self, data: bytes) -> list[bytes]:
        """Collective."""
        rank, size = self._group.rank, self._group.size
        if rank:
            self._send(data, 0)
            return [self._receive(0) for _ in range(size)]
        told = [data, *map(self._receive, range(1, size))]
        for other in range(1, size):
            for each in told:
                self._send(each, other)
        return told

    def _send(self, data: bytes, rank: int) -> None:
        for message in (np.array([len(data)], np.int64), np.frombuffer(data, np.uint8)):
            self._group.wait(self._group.comm.Isend(message, rank, TAG))

    def _receive(self, rank: int) -> bytes:
        length = np.empty(1, np.int64)
        self._group.wait(self._group.comm.Irecv(length, rank, TAG))
        data = np.empty(int(length[0]), np.uint8)
        self._group.wait(self._group.comm.Irecv(data, rank, TAG))
        return data.tobytes()
