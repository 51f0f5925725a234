"""Memory that all ranks of a group on one node see: a window, that of one rank alone, and one that is kept.

Groups make windows (`iterreduce.group`). Nothing here communicates but by their means.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from iterreduce.errors import UsageError

SHARED = "/dev/shm"


class Window(ABC):
    """Memory that all ranks of a group on one node see: an area of int64 words per rank.

    Who reads an area that another rank writes puts a `fence` between the two.
    """

    mine: npt.NDArray[np.int64]

    @abstractmethod
    def of(self, rank: int) -> npt.NDArray[np.int64]:
        """The area of `rank`: a view, not a copy."""

    @abstractmethod
    def fence(self) -> None:
        """What any rank wrote before is seen by all ranks after. Collective."""

    @abstractmethod
    def free(self) -> None:
        """Give the memory back; no view of it may be used afterwards. Collective."""


class SoloWindow(Window):
    """Of one rank alone."""

    def __init__(self, words: int) -> None:
        self.mine = np.zeros(words, np.int64)

    def of(self, rank: int) -> npt.NDArray[np.int64]:
        if rank != 0:
            raise UsageError(f"there is no rank {rank} in a group of one")
        return self.mine

    def fence(self) -> None:
        pass

    def free(self) -> None:
        self.mine = np.zeros(0, np.int64)


def node_name() -> int:
    """A number that ranks have in common if they can share memory."""
    told = [socket.gethostname()]
    with contextlib.suppress(OSError):
        place = os.stat(SHARED)
        told += [str(place.st_dev), str(place.st_ino)]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        told.append(file.read())
    return int.from_bytes(hashlib.sha256("\0".join(told).encode()).digest()[:7], "little")


class KeptWindow:
    """The one window that a group keeps for its exchanges; it grows. ``words``: of each rank."""

    def __init__(self, size: int) -> None:
        self.words = [0] * size
        self._window: Window | None = None
        self._refused = False

    def at_least(
        self, words: Sequence[int], rank: int, make: Callable[[int], Window | None]
    ) -> Window | None:
        """With so many words of each rank, an agreed list; None where there is none to be had. Collective."""
        if self._refused:
            return None
        if any(n > m for n, m in zip(words, self.words, strict=True)):
            wanted = [max(n + n // 8, m) for n, m in zip(words, self.words, strict=True)]
            self.drop()
            self._window = make(wanted[rank])
            self._refused = self._window is None
            self.words = self.words if self._refused else wanted
        return self._window

    def drop(self) -> None:
        """Give it back, if there is one. Collective."""
        if self._window is not None:
            self._window.free()
        self._window, self.words = None, [0] * len(self.words)
