"""How often this rank has gone on without others that died.

Rows that a caller holds on each rank are whole only while all those ranks live: whoever keeps such rows asks
here when they came, and again when they are used. A rank is a process, or a thread of it.
"""

from __future__ import annotations

import threading


class Refilled(BaseException):
    """New ranks have taken the places of ``lost`` ones, ``seconds`` after these were noticed: all ranks begin
    the program again, and what they ran before goes on from what those hold that lived.

    It passes through everything, so it is no `Exception`.
    """

    def __init__(self, lost: tuple[int, ...] = (), seconds: float = 0.0) -> None:
        super().__init__(f"new ranks for {', '.join(map(str, lost))}")
        self.lost, self.seconds = lost, seconds


_here = threading.local()


def losses() -> int:
    """The losses that this rank has survived so far, in any group.

    >>> losses()
    0
    """
    return getattr(_here, "count", 0)


def survived() -> None:
    """Another one."""
    _here.count = losses() + 1
