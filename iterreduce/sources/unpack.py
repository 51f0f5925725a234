"""Gzip-compressed text: who unpacks it, and how its blocks come to the ranks that own them.

A packed file can be read from its beginning only. So one rank streams each file (several files are dealt over
the ranks) and sends every rank the bytes of its blocks, in rounds of bounded size: no rank unpacks what
another has unpacked, and none holds a whole file unless it owns all of it. The rounds are a function of the
unpacked sizes, which all ranks agreed on; a rank that cannot read on says so in the header of its round, all
leave after that round, and raise its error. One rank alone streams as it reads.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns.ragged import Array
from iterreduce.errors import InputError
from iterreduce.sources.agreement import agree
from iterreduce.sources.files import pieces

if TYPE_CHECKING:
    from iterreduce.collectives import Group

# What one rank unpacks and sends in a round: enough for large messages, little beside any share.
ROUND_BYTES = 1 << 22
# Errors of a stream that is no gzip, or ends too early.
DAMAGED = (OSError, EOFError, zlib.error)

Ranges = dict[int, tuple[int, int]]
"""Of each file, the unpacked bytes ``[lo, hi)`` that somebody wants."""
Part = tuple[int, int, int]
"""(file, from, to)."""


def is_packed(path: str) -> bool:
    """Whether a file is gzip-compressed, by its name."""
    return path.lower().endswith(".gz")


def damaged(path: str, error: BaseException) -> InputError:
    """The error for a packed file that cannot be read to its end."""
    return InputError(f"{path} is truncated or damaged: {error}")


def fill(stream: Any, out: Array) -> int:
    """Read until `out` is full or the stream ends; returns the bytes read."""
    got = 0
    view = out.data
    while got < len(out):
        n = stream.readinto(view[got : got + (1 << 30)])
        if not n:
            break
        got += n
    return got


def unpacked_sizes(group: Group, paths: Sequence[str]) -> Array:
    """Bytes of each packed file once unpacked, int64; each is unpacked once, by one rank, and so verified.

    Collective.

    A gzip file's own record of its size holds 32 bits only, and only of its last member.
    """
    sizes = np.zeros(len(paths), np.int64)

    def count() -> None:
        for index in range(group.rank, len(paths), group.size):
            sizes[index] = _unpacked_bytes(paths[index])

    agree(group, count)
    group.allreduce(sizes, "sum")
    return sizes


def _unpacked_bytes(path: str) -> int:
    buffer, total = np.empty(ROUND_BYTES, np.uint8), 0
    try:
        with gzip.open(path, "rb") as stream:
            while got := fill(stream, buffer):
                total += got
    except DAMAGED as error:
        raise damaged(path, error) from error
    return total


class Stream:
    """A packed file that is read forwards; a place before the last piece read costs a start from the front.

    The last piece is kept, because the next range begins a little before its end.
    """

    def __init__(self, path: str):
        self.path = path
        self._file: Any = None
        self._at = 0
        self._kept = np.zeros(0, np.uint8)

    def read(self, lo: int, hi: int) -> Array:
        """Bytes ``[lo, hi)``, fewer at the end of the file. Raises `InputError`."""
        out = np.empty(hi - lo, np.uint8)
        first = self._at - len(self._kept)
        known = self._kept[lo - first : hi - first] if first <= lo <= self._at else out[:0]
        out[: len(known)] = known
        if len(known) < hi - lo:
            try:
                out = out[: len(known) + self._read_on(lo + len(known), out[len(known) :])]
            except DAMAGED as error:
                raise damaged(self.path, error) from error
            self._kept = out
        return out

    def _read_on(self, lo: int, out: Array) -> int:
        if self._file is None:
            self._file = gzip.open(self.path, "rb")  # noqa: SIM115 (it stays open)
        self._file.seek(lo)
        got = fill(self._file, out)
        self._at = lo + got
        return got

    def close(self) -> None:
        """Close the file and forget the last piece."""
        if self._file is not None:
            self._file.close()
        self._file, self._at, self._kept = None, 0, np.zeros(0, np.uint8)


def deal(group: Group, paths: Sequence[str], sizes: Array, wanted: Sequence[Ranges]) -> dict[int, Array]:
    """The unpacked bytes of each file that this rank wants; `wanted` holds the ranges of all ranks.

    Collective.

    `sizes`: unpacked bytes of each file, and `wanted`: the same on all ranks.
    """
    plan = _Plan(paths, sizes, wanted, group.size)
    held = {file: np.empty(hi - lo, np.uint8) for file, (lo, hi) in wanted[group.rank].items()}
    stream = _Own(paths)
    failure: Exception | None = None
    for number in range(plan.rounds):
        parts = {owner: plan.parts(owner, number) for owner in range(group.size)}
        pieces_read: dict[int, tuple[int, Array]] = {}
        try:
            pieces_read = stream.read(plan.reads(group.rank, number))
        except Exception as error:
            failure = error
        if _exchange(group, parts, pieces_read, failure is not None, held, wanted[group.rank]):
            break
    stream.close()
    agree(group, lambda: _again(failure))
    return held


def _again(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


class _Own:
    """The files that this rank streams, one after the other."""

    def __init__(self, paths: Sequence[str]):
        self._paths = paths
        self._stream: Stream | None = None
        self._file = -1

    def read(self, ranges: Sequence[Part]) -> dict[int, tuple[int, Array]]:
        """Of each file, where its bytes begin, and the bytes."""
        found = {}
        for file, lo, hi in ranges:
            if file != self._file:
                self.close()
                self._file, self._stream = file, Stream(self._paths[file])
            assert self._stream is not None
            data = self._stream.read(lo, hi)
            if len(data) < hi - lo:
                raise InputError(f"{self._paths[file]} became shorter while it was read")
            found[file] = lo, data
        return found

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class _Plan:
    """Which bytes go from whom to whom in which round: a function of agreed numbers only."""

    def __init__(self, paths: Sequence[str], sizes: Array, wanted: Sequence[Ranges], size: int):
        packed = [i for i, path in enumerate(paths) if is_packed(path)]
        self._files = [packed[rank::size] for rank in range(size)]
        self._firsts = [np.cumsum([0, *(int(sizes[i]) for i in files)]) for files in self._files]
        self._wanted = wanted
        self.rounds = max(-(-int(firsts[-1]) // ROUND_BYTES) for firsts in self._firsts)

    def reads(self, owner: int, number: int) -> list[Part]:
        """What a rank unpacks in a round: (file, from, to)."""
        lo = number * ROUND_BYTES
        found = pieces(self._firsts[owner], lo, lo + ROUND_BYTES)
        return [(self._files[owner][index], a, b) for index, a, b in found]

    def parts(self, owner: int, number: int) -> list[list[Part]]:
        """Of each destination, the bytes that it gets: (file, from, to)."""
        reads = self.reads(owner, number)
        return [[part for read in reads if (part := _overlap(read, ranges))] for ranges in self._wanted]


def _overlap(read: Part, ranges: Ranges) -> Part | None:
    file, a, b = read
    lo, hi = ranges.get(file, (0, 0))
    lo, hi = max(a, lo), min(b, hi)
    return (file, lo, hi) if lo < hi else None


def _words(parts: list[Part]) -> int:
    """Words of a segment: its header and its parts, each on a border of its own."""
    return 1 + sum(-(-(hi - lo) // 8) for _, lo, hi in parts)


def _exchange(
    group: Group,
    parts: dict[int, list[list[Part]]],
    read: dict[int, tuple[int, Array]],
    failed: bool,
    held: dict[int, Array],
    wanted: Ranges,
) -> bool:
    """One round; returns whether any rank failed. Collective."""
    send_counts = [_words(to) for to in parts[group.rank]]
    recv_counts = [_words(parts[owner][group.rank]) for owner in range(group.size)]
    bound = max(
        max(sum(map(_words, parts[owner])) for owner in parts),
        max(sum(_words(parts[owner][rank]) for owner in parts) for rank in range(group.size)),
    )
    send, recv = np.zeros(sum(send_counts), np.int64), np.empty(sum(recv_counts), np.int64)
    for at, to in _walk(parts[group.rank]):
        send[at] = failed
        if not failed:
            _pack(send[at + 1 :], to, read)
    group.alltoallv(send, send_counts, None, recv, recv_counts, None, 1, bound)
    bad = False
    for at, came in _walk([parts[owner][group.rank] for owner in range(group.size)]):
        bad |= bool(recv[at])
        _unpack(recv[at + 1 :], came, held, wanted)
    return bad


def _walk(segments: Sequence[list[Part]]) -> Iterator[tuple[int, list[Part]]]:
    """Where each segment begins, and its parts."""
    at = 0
    for parts in segments:
        yield at, parts
        at += _words(parts)


def _pack(words: Array, parts: list[Part], read: dict[int, tuple[int, Array]]) -> None:
    at = 0
    for file, lo, hi in parts:
        origin, data = read[file]
        words.view(np.uint8)[at : at + hi - lo] = data[lo - origin : hi - origin]
        at += -(-(hi - lo) // 8) * 8


def _unpack(words: Array, parts: list[Part], held: dict[int, Array], wanted: Ranges) -> None:
    at = 0
    for file, lo, hi in parts:
        first = wanted[file][0]
        held[file][lo - first : hi - first] = words.view(np.uint8)[at : at + hi - lo]
        at += -(-(hi - lo) // 8) * 8
