"""Text cut by byte range: which lines belong to which block, and the source of plain lines.

A file is cut into blocks of equal bytes; a line belongs to the block in which its first byte lies, so every
line belongs to exactly one block, however blocks are dealt to ranks. A rank reads its whole range in one go,
a little beyond its end for the last line. Text is kept as the bytes it was; UTF-8 is assumed where it is
shown.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.cells import NEWLINE, QUOTE, record_border, split_lines
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import InputError
from iterreduce.sources.agreement import root_decides
from iterreduce.sources.asked import Peek
from iterreduce.sources.blocks import Blocks, block_bytes_for
from iterreduce.sources.files import FileSource, FileState, check_magic, pieces, why_not_read
from iterreduce.sources.unpack import Stream, damaged, deal, fill, is_packed, unpacked_sizes

if TYPE_CHECKING:
    from iterreduce.collectives import Group

# Read beyond the end of a range for its last line: most lines are shorter, so one read is enough.
BEYOND_BYTES = 1 << 16
TEXT = Field("text", np.dtype(np.uint8))


@dataclass(frozen=True, eq=False)
class Segment:
    """Whole lines of one file: their bytes, and where in the (unpacked) file the first byte stands."""

    file: int
    origin: int
    text: Array


class TextSource(FileSource):
    """What line sources share: bytes in blocks, and whole records of any range of blocks."""

    quote = -1
    beyond_bytes = BEYOND_BYTES

    def __init__(self, path: str, block_bytes: int | None = None):
        super().__init__(path)
        self.block_bytes = block_bytes
        self._bytes = np.zeros(0, np.int64)  # of each file, unpacked
        self._begins: list[int] = []  # where the first record of each file stands
        self._first_block = np.zeros(1, np.int64)  # of each file
        self._block_rows = np.zeros(0, np.int64)  # -1: not read yet
        self._inside: Array | None = None  # whether a quoted cell is open where a block begins
        self._streams: dict[int, Stream] = {}  # packed files that this rank reads forwards
        self._dealt: dict[int, tuple[int, Array]] = {}  # of packed files: own bytes, and where they begin

    # -- opening

    def open(self, group: Group) -> None:
        """Agree on files and blocks. Collective."""
        self._settle(group, root_decides(group, self._look))
        self.schema = self.project(Schema({"line": TEXT}))
        self.token = self.make_token(self.block_bytes)

    def _settle(self, group: Group, found: dict[str, Any]) -> None:
        """Cut the files that rank 0 found into blocks, and unpack those that are packed. Collective."""
        self.files = [FileState(*state) for state in found["files"]]
        self._bytes = np.array([f.size for f in self.files], np.int64)
        packed = [i for i, f in enumerate(self.files) if is_packed(f.path)]
        if packed:
            self._bytes[packed] = unpacked_sizes(group, [self.files[i].path for i in packed])
            self.bytes_read += self._unpacked_here(group)
        self._begins = found["begins"]
        self._step = self.block_bytes or block_bytes_for(int(self._bytes.sum()))
        self._first_block = np.concatenate([[0], np.cumsum(-(-self._bytes // self._step))]).astype(np.int64)
        self.blocks = Blocks(int(self._first_block[-1]))
        self._block_rows = np.full(self.blocks.count, -1, np.int64)
        self._streams = {i: Stream(self.files[i].path) for i in packed}
        if packed and group.size > 1:
            self._deal(group)

    def _deal(self, group: Group) -> None:
        wanted = [self._packed_ranges(*self.blocks.owned(rank, group.size)) for rank in range(group.size)]
        held = deal(group, [f.path for f in self.files], self._bytes, wanted)
        self.bytes_read += self._unpacked_here(group)
        self._dealt = {file: (wanted[group.rank][file][0], text) for file, text in held.items()}

    def _unpacked_here(self, group: Group) -> int:
        """Bytes of the packed files that this rank unpacks for all."""
        packed = [i for i, f in enumerate(self.files) if is_packed(f.path)]
        return int(self._bytes[packed[group.rank :: group.size]].sum())

    def _packed_ranges(self, lo: int, hi: int) -> dict[int, tuple[int, int]]:
        """Which bytes of packed files a rank reads for these blocks: a little more on either side."""
        return {
            file: (
                max(0, first * self._step - 1),
                min(last * self._step + self.beyond_bytes, int(self._bytes[file])),
            )
            for file, first, last in pieces(self._first_block, lo, hi)
            if file in self._streams
        }

    def release(self) -> None:
        """Give back what only makes reading faster. Local; blocks can still be read, packed ones slowly."""
        self._dealt = {}
        for stream in self._streams.values():
            stream.close()

    def _look(self) -> dict[str, Any]:
        """What rank 0 sees before anything is read."""
        return self.look_at_files()

    def look_at_files(self) -> dict[str, Any]:
        """Files, and where their first records begin. Raises `InputError`."""
        states, begins = [], []
        for path in self.paths():
            states.append(FileState.of(path))
            begins.append(self.begin_of(path))
        return {"files": [[s.path, s.size, s.mtime_ns] for s in states], "begins": begins}

    def begin_of(self, path: str) -> int:
        """Where the text of a file begins: behind its mark of byte order. Raises `InputError`."""
        return 3 if self._head(path).startswith(b"\xef\xbb\xbf") else 0

    def peek_at(self, paths: list[str]) -> Peek:
        """Lines. Local."""
        self._head(paths[0])
        return {"line": TEXT}

    def _head(self, path: str) -> bytes:
        head = check_magic(path, ".gz" if is_packed(path) else "")
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"{path} is UTF-16 text: convert it first (iconv -f utf-16 -t utf-8)")
        return head

    def first_path(self) -> str:
        """The first file that the path means. Raises `InputError`."""
        return self.paths()[0]

    # -- whole records

    def segments(self, lo: int, hi: int) -> Iterator[Segment]:
        """The records that begin in blocks ``[lo, hi)``, file by file."""
        for file, first, last in pieces(self._first_block, lo, hi):
            a, b = first * self._step, min(last * self._step, int(self._bytes[file]))
            yield self._segment(file, a, b)

    def _segment(self, file: int, a: int, b: int) -> Segment:
        begin = self._begins[file]
        origin = begin if a <= begin else a - 1
        if origin >= b:
            return Segment(file, origin, np.zeros(0, np.uint8))
        text = self.read_bytes(file, origin, min(b + self.beyond_bytes, int(self._bytes[file])))
        start = 0
        if a > begin:
            inside = self._is_inside(file, a) != (text[0] == self.quote)
            start, _ = record_border(text[: b - origin], 0, inside, self.quote)
            if start < 0 or start >= b - origin:
                return Segment(file, origin, text[:0])
        text, end = self._to_record_end(file, origin, text, b)
        return Segment(file, origin + start, text[start:end])

    def _to_record_end(self, file: int, origin: int, text: Array, b: int) -> tuple[Array, int]:
        """The text, read on where need be, and where in it the record that holds byte b - 1 ends."""
        size = int(self._bytes[file])
        at, inside = b - 1 - origin, False
        if self._is_inside(file, b) != (text[at] == self.quote):
            inside = True
        while True:
            end, inside = record_border(text, at, inside, self.quote)
            if end >= 0 or origin + len(text) >= size:
                return text, end if end >= 0 else len(text)
            at = len(text)
            more = self.read_bytes(file, origin + at, min(size, origin + at + max(self.beyond_bytes, at)))
            text = np.concatenate([text, more])

    def _is_inside(self, file: int, position: int) -> bool:
        """Whether a quoted cell is open at the start of a block (at the end of a file: never)."""
        if self._inside is None or position >= int(self._bytes[file]):
            return False
        return bool(self._inside[self._first_block[file] + position // self._step])

    def read_bytes(self, file: int, lo: int, hi: int) -> Array:
        """Bytes ``[lo, hi)`` of a file as uint8, unpacked. Local. Raises `InputError`."""
        out = self._bytes_of(file, lo, hi)
        if len(out) < hi - lo:
            raise InputError(f"{self.files[file].path} became shorter while it was read")
        if len(out) and out.min() == 0:
            at = lo + int(np.argmin(out))
            raise InputError(f"{self.files[file].path} is not text: it holds a zero byte at offset {at}")
        return out

    def _bytes_of(self, file: int, lo: int, hi: int) -> Array:
        origin, text = self._dealt.get(file, (0, None))
        if text is not None and origin <= lo and hi <= origin + len(text):
            return text[lo - origin : hi - origin]
        state = self.files[file]
        state.check()
        self.bytes_read += hi - lo
        if file in self._streams:
            return self._streams[file].read(lo, hi)
        out = np.empty(hi - lo, np.uint8)
        try:
            with open(state.path, "rb", buffering=0) as stream:
                stream.seek(lo)
                return out[: fill(stream, out)]
        except OSError as error:
            raise InputError(why_not_read(state.path, error)) from error

    # -- rows

    def block_rows(self, lo: int, hi: int) -> Array:
        """Rows of each block, int64; blocks that were not read yet are read. Local."""
        if (self._block_rows[lo:hi] < 0).any():
            self.read(lo, hi)
        return self._block_rows[lo:hi].copy()

    def count_rows(self, lo: int, hi: int, segment: Segment, starts: Array) -> None:
        """Note how many records, that begin at these places of a segment, each of its blocks holds."""
        blocks = (starts + segment.origin) // self._step + self._first_block[segment.file]
        self._block_rows[lo:hi] += np.bincount(blocks - lo, minlength=hi - lo)

    def read(self, lo: int, hi: int) -> Batch:
        """The lines of blocks ``[lo, hi)`` as column ``line``. Local."""
        self._block_rows[lo:hi] = 0
        parts = [Batch.empty(Schema({"line": TEXT}))["line"]]
        for segment in self.segments(lo, hi):
            lines, starts = split_lines(segment.text)
            self.count_rows(lo, hi, segment, starts)
            parts.append(lines)
        line = parts[1] if len(parts) == 2 else Ragged.concat(parts)
        return Batch(line=line)


class LineSource(TextSource):
    """Lines of text, without their ends, as column ``line``."""

    suffixes = (".txt", ".txt.gz", ".log", ".log.gz", ".text", ".text.gz", "", ".gz")


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """A file to read from its beginning, unpacked if it is gzip. Raises `InputError`."""
    try:
        with gzip.open(path, "rb") if is_packed(path) else open(path, "rb") as stream:
            yield stream  # type: ignore[misc]
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise damaged(path, error) from error
        raise InputError(why_not_read(path, error)) from error
    except (EOFError, zlib.error) as error:
        raise damaged(path, error) from error


__all__ = ["NEWLINE", "QUOTE", "LineSource", "Segment", "TextSource", "is_packed", "open_bytes"]
