"""A file that is held in memory by the pages that were touched: where HDF5 lays out a checkpoint.

HDF5 may crash after a disk ran full, so it never sees the disk: it writes its few kilobytes of structure
here, around data that are not there, and `writing` puts both on the disk with `os.pwrite`. This is no cache
and no buffer for data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any


class SparseFile:
    """A file object of pages; what was not written reads as zeros.

    >>> file = SparseFile()
    >>> file.seek(10**12), file.write(b"far"), file.size
    (1000000000000, 3, 1000000000003)
    >>> bytes(file.bytes_at(10**12 - 1, 4))
    b'\\x00far'
    """

    PAGE = 4096

    def __init__(self) -> None:
        self.size, self._at = 0, 0
        self._pages: dict[int, bytearray] = {}

    def bytes_at(self, offset: int, length: int) -> bytearray:
        """A range; zeros where nothing was written."""
        out = bytearray(length)
        for at, page, inside, n in self._cut(offset, length):
            if page in self._pages:
                out[at : at + n] = self._pages[page][inside : inside + n]
        return out

    def _cut(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Of a range, page by page: place in the range, page, place in the page, bytes."""
        at = 0
        while at < length:
            page, inside = divmod(offset + at, self.PAGE)
            n = min(self.PAGE - inside, length - at)
            yield at, page, inside, n
            at += n

    # what h5py asks of a file object

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """The byte at which it stands."""
        return self._at

    def read(self, length: int = -1) -> bytes:
        """Bytes from here on."""
        length = max(0, self.size - self._at) if length < 0 else length
        self._at += length
        return bytes(self.bytes_at(self._at - length, length))

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer."""
        view = memoryview(buffer).cast("B")
        view[:] = self.read(len(view))
        return len(view)

    def write(self, data: Any) -> int:
        """Put bytes here."""
        view = memoryview(data).cast("B")
        for at, page, inside, n in self._cut(self._at, len(view)):
            self._pages.setdefault(page, bytearray(self.PAGE))[inside : inside + n] = view[at : at + n]
        self._at += len(view)
        self.size = max(self.size, self._at)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size."""
        self.size = self._at if size is None else size
        return self.size

    def flush(self) -> None:
        """Nothing is held back."""
