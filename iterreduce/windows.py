"""Memory that all ranks of a group on one node see: a window, that of one rank alone, and one that is kept.

Groups make windows (`iterreduce.group`). Nothing here communicates but by their means.

The memory of a node is files of /dev/shm, one per rank, that lose their names as soon as all ranks have them
mapped: a rank that outlives others drops them like any memory. The file of a rank that is killed within that
moment is removed by whoever makes the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from iterreduce.errors import UsageError
from iterreduce.words import WORD_BYTES

SHARED = "/dev/shm"
#: Begins the names of our files, which they have for a moment.
NAME = "iterreduce-window-"


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


class _Ranks(Protocol):
    """What is needed of a group."""

    rank: int

    def allgather_bytes(self, data: bytes) -> list[bytes]: ...

    def agree_any(self, flag: bool) -> bool: ...

    def barrier(self) -> None: ...


class NodeWindow(Window):
    """Of ranks that share a node."""

    def __init__(self, group: _Ranks, areas: Sequence[npt.NDArray[np.int64]]) -> None:
        self._group, self._areas = group, areas
        self.mine = areas[group.rank]

    def of(self, rank: int) -> npt.NDArray[np.int64]:
        if not 0 <= rank < len(self._areas):
            raise UsageError(f"there is no rank {rank} in a group of {len(self._areas)}")
        return self._areas[rank]

    def fence(self) -> None:
        self._group.barrier()

    def free(self) -> None:
        self.mine, self._areas = np.zeros(0, np.int64), ()


def node_window(group: _Ranks, words: int) -> NodeWindow | None:
    """`words` of this rank's own and those of the others on its node; None, on all ranks, where one of them
    cannot have it. Collective.
    """
    remove_orphans()
    name = f"{SHARED}/{NAME}{os.getuid()}-{os.getpid()}-{os.urandom(4).hex()}"
    areas: list[npt.NDArray[np.int64]] = []
    try:
        made = _made(name, max(1, words) * WORD_BYTES)
        names = group.allgather_bytes(f"{name} {words}".encode() if made else b"")
        with contextlib.suppress(OSError, ValueError):
            areas += (_mapped(text.decode()) for text in names)
        failed = group.agree_any(len(areas) < len(names))  # behind it all have them mapped
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
    return None if failed else NodeWindow(group, areas)


def _made(name: str, size: int) -> bool:
    try:
        file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return False
    try:
        os.ftruncate(file, size)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def remove_orphans(folder: str = SHARED) -> None:
    """Files of this user's processes that are gone. One of a process that lives where its number cannot be
    seen may go, too: its ranks then do without.
    """
    mine = f"{NAME}{os.getuid()}-"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(mine) and not os.path.exists(f"/proc/{name[len(mine) :].partition('-')[0]}"):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))


def _mapped(told: str) -> npt.NDArray[np.int64]:
    """Raises OSError or ValueError."""
    name, words = told.split()
    file = os.open(name, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(file, 0), np.int64)[: int(words)]
    finally:
        os.close(file)


def node_name() -> int:
    """A number that ranks have in common if they can share memory."""
    told = [socket.gethostname()]
    with contextlib.suppress(OSError):
        place = os.stat(SHARED)
        told += [str(place.st_dev), str(place.st_ino)]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        told.append(file.read())
    return int.from_bytes(hashlib.sha256("\0".join(told).encode()).digest()[:7], "little")


def shared_bytes_free(path: str = SHARED) -> int:
    """Bytes that shared memory of this node can still grow by; 0 where there is none."""
    try:
        room = os.statvfs(path)
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize


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
