"""HDF5's heaps, checked before HDF5 walks through them.

Text and lists of variable length lie in heaps (collections of objects, each with its size before it), and
HDF5 goes from object to object by what stands there: in a damaged file it may go round for ever. So where it
reads through a heap it reads by a `CheckedFile`, which looks at each heap as HDF5 comes to it. Nothing else
of a file is checked here, for nothing else is known to hang. `iterreduce.storage` speaks to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from iterreduce.errors import InputError

MAGIC = b"GCOL\x01"
# A number, a count of references and four bytes of nothing stand before an object's size.
BEFORE_SIZE, ALIGNMENT = 8, 8


class HeapError(OSError):
    """A heap that HDF5 must not see."""


def check_heap(heap: bytes, length_bytes: int = 8) -> None:
    """Raise `HeapError` unless the objects of a heap end where the next one begins, and the last one inside.

    ``length_bytes``: how many a size takes in this file.

    >>> one = (7).to_bytes(8, "little") + (3).to_bytes(8, "little") + b"abc".ljust(8, b"\\0")
    >>> check_heap(MAGIC + bytes(11) + one)
    >>> check_heap(MAGIC + bytes(11) + one + bytes(16))
    Traceback (most recent call last):
      ...
    iterreduce.heaps.HeapError: a heap of its values is damaged at byte 40
    """
    from iterreduce.columns.heapwalk import first_bad  # the compiler, for those who need it

    header = -(-(BEFORE_SIZE + length_bytes) // ALIGNMENT) * ALIGNMENT
    at = int(first_bad(np.frombuffer(heap, np.uint8), header, BEFORE_SIZE, length_bytes, ALIGNMENT))
    if at >= 0:
        raise HeapError(f"a heap of its values is damaged at byte {at}")


class CheckedFile:
    """A file object for h5py to read from. ``length_bytes`` may be set once HDF5 has told it."""

    def __init__(self, path: str):
        self.length_bytes = 8
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._at, self._size = 0, os.fstat(self._handle).st_size
        self._checked: set[int] = set()

    def close(self) -> None:
        """After HDF5 has closed it."""
        os.close(self._handle)

    # what h5py asks of a file object

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """The byte at which it stands."""
        return self._at

    def read(self, length: int = -1) -> bytes:
        """h5py knows a file object by this, and asks `readinto`."""
        raw = bytearray(max(0, self._size - self._at) if length < 0 else length)
        return bytes(raw[: self.readinto(raw)])

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer. Raises `HeapError` where a heap begins that is damaged."""
        view = memoryview(buffer).cast("B")
        got = 0
        while got < len(view) and (n := os.preadv(self._handle, [view[got : got + (1 << 30)]], self._at)):
            if got == 0 and view[: len(MAGIC)] == MAGIC:
                self._check(self._at)
            got, self._at = got + n, self._at + n
        return got

    def write(self, data: Any) -> int:
        """Nothing is written."""
        raise HeapError("it is open to be read")

    def truncate(self, size: int | None = None) -> int:
        """Its size stays."""
        return self._size

    def flush(self) -> None:
        """Nothing is held back."""

    def _check(self, at: int) -> None:
        if at in self._checked:
            return
        told = os.pread(self._handle, self.length_bytes, at + BEFORE_SIZE)
        size = int.from_bytes(told, "little")
        if size > self._size - at:
            raise HeapError(f"a heap of its values has {size} bytes, and the file ends before")
        check_heap(os.pread(self._handle, size, at), self.length_bytes)
        self._checked.add(at)


Opened = Callable[[str, CheckedFile], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def checked(path: str, dataset: Any, nullable: bool, opened: Opened) -> Iterator[Any]:
    """The dataset, opened anew by a `CheckedFile` if its rows, or the name of its mask, lie in heaps.

    ``opened`` opens a file through one. Raises `InputError` for what it cannot check.
    """
    if not (dataset.dtype.hasobject or nullable):
        yield dataset
        return
    place = own_rows(path, dataset).file.filename  # a link may lead to another file
    through = CheckedFile(place)
    try:
        with opened(place, through) as file:
            through.length_bytes = file.id.get_create_plist().get_sizes()[1]
            yield file[dataset.name]
    finally:
        through.close()


def own_rows(path: str, dataset: Any) -> Any:
    """The dataset, whose rows stand in its file: what is read through a file object has no other file."""
    if dataset.is_virtual:
        raise InputError(
            f"{path}:{dataset.name} puts rows of variable length, or nulls, together from other files: "
            "wanted rows that stand in its own; copy them there"
        )
    return dataset
