"""What travels between ranks: arrays of 8-byte words, how they are counted, and how arguments are checked.

Words are 1-D C-contiguous arrays of int64 or float64; counts and displacements are in words. Only groups
speak to this module (`collectives`, and the threads of `testing`); nothing is sent here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from operator import index
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from iterreduce.errors import UsageError

Words = npt.NDArray[Any]
Counts = Sequence[int] | npt.NDArray[Any]

WORD_BYTES = 8
INT64, FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)
_NOTHING, _NOWHERE = np.zeros(1, np.int64), np.zeros(1, np.int64)
OPERATIONS = {INT64: ("sum", "min", "max", "or"), FLOAT64: ("min", "max")}


@dataclass(slots=True)
class Traffic:
    """What one rank sent to other ranks, in bytes; header words are counted apart from payload.

    An allgather and a bcast count their words once per receiving rank, a reduction its array once. Messages
    to other nodes are those of exchanges (alltoall, alltoallv), as they go: with node leaders, those of the
    leaders. How the other collectives go between nodes is MPI's own affair.

    >>> before = Traffic(80, 16, 1)
    >>> Traffic(200, 32, 2, node_messages=3, node_bytes=24) - before
    Traffic(payload_bytes=120, header_bytes=16, collectives=1, node_messages=3, node_bytes=24)
    """

    payload_bytes: int = 0
    header_bytes: int = 0
    collectives: int = 0
    node_messages: int = 0
    node_bytes: int = 0

    def count(self, words: int, header_words: int = 0) -> None:
        """One more collective that sends `words`, of which the first `header_words` are header."""
        self.payload_bytes += WORD_BYTES * (words - header_words)
        self.header_bytes += WORD_BYTES * header_words
        self.collectives += 1

    def leaves_node(self, messages: int, words: int) -> None:
        """So many messages to other nodes, of so many words in all."""
        self.node_messages += messages
        self.node_bytes += WORD_BYTES * words

    def snapshot(self) -> Traffic:
        """The figures of this moment, which no longer change."""
        return replace(self)

    def reset(self) -> None:
        """Start again from zero."""
        self.payload_bytes = self.header_bytes = self.collectives = 0
        self.node_messages = self.node_bytes = 0

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Move(NamedTuple):
    """The checked arguments of an alltoallv: one segment per rank on either side."""

    send: Words
    send_counts: list[int]
    send_displs: list[int]
    recv: Words
    recv_counts: list[int]
    recv_displs: list[int]

    def sent_to(self, rank: int) -> Words:
        at = self.send_displs[rank]
        return self.send[at : at + self.send_counts[rank]]

    def received_from(self, rank: int) -> Words:
        at = self.recv_displs[rank]
        return self.recv[at : at + self.recv_counts[rank]]

    def copy_own(self, rank: int) -> None:
        self.received_from(rank)[:] = self.sent_to(rank)

    def words_off(self, rank: int) -> int:
        """Words that leave this rank."""
        return sum(self.send_counts) - self.send_counts[rank]

    def messages(self, word: Any) -> tuple[list[Any], list[Any]]:
        """As mpi4py takes them; `word` is the datatype.

        An empty slice has the address of the whole array; where that is the other side's too, Open MPI's
        nonblocking collectives take it for MPI_IN_PLACE.
        """
        send, recv = (self.send if self.send.size else _NOTHING), self.recv if self.recv.size else _NOWHERE
        return (
            [send, (self.send_counts, self.send_displs), word],
            [recv, (self.recv_counts, self.recv_displs), word],
        )


# -- checks ------------------------------------------------------------------------------------------------


def check_words(what: str, array: Words, writeable: bool = False) -> None:
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{what} is a {type(array).__name__}; wanted a NumPy array of int64 or float64")
    if array.dtype != INT64 and array.dtype != FLOAT64:
        raise UsageError(f"{what} has dtype {array.dtype}; only int64 and float64 words travel")
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise UsageError(
            f"{what} has shape {array.shape} and strides {array.strides}; wanted one contiguous dimension"
        )
    if writeable and not array.flags.writeable:
        raise UsageError(f"{what} is read-only, but words are received into it")


def pair(send: Words, recv: Words) -> None:
    check_words("send", send)
    check_words("recv", recv, writeable=True)
    if send.dtype != recv.dtype:
        raise UsageError(f"send is {send.dtype} and recv is {recv.dtype}; wanted the same")
    if np.may_share_memory(send, recv):  # exact for contiguous arrays
        raise UsageError("send and recv share memory; wanted two arrays")


def want(what: str, array: Words, words: int) -> None:
    if array.size != words:
        raise UsageError(f"{what} has {array.size} words; wanted {words}")


def check_header(header_words: int, words: int) -> None:
    if not 0 <= header_words <= words:
        raise UsageError(f"header_words is {header_words}, but the smallest segment has {words} words")


def integers(what: str, values: Counts, size: int) -> list[int]:
    """As a list: mpi4py takes lists 0.5 us faster than arrays, and a loop over few ranks beats NumPy."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "iu":
            raise UsageError(f"{what} have dtype {values.dtype}; wanted integers")
        numbers: list[int] = values.tolist()
    else:
        try:
            numbers = [index(value) for value in values]
        except TypeError as error:
            raise UsageError(f"{what} {values!r} are not integers") from error
    if len(numbers) != size:
        raise UsageError(f"{len(numbers)} {what} for {size} ranks")
    return numbers


def layout(
    what: str, array: Words, counts: Counts, displs: Counts | None, size: int
) -> tuple[list[int], list[int], int]:
    """Checked counts, displacements and the end of the last segment of `array`."""
    numbers = integers(f"{what} counts", counts, size)
    starts = packed_displs(numbers) if displs is None else integers(f"{what} displacements", displs, size)
    last = 0
    for rank, (count, start) in enumerate(zip(numbers, starts, strict=True)):
        if count < 0 or start < 0 or start + count > array.size:
            raise UsageError(
                f"{what} has {array.size} words, but the segment of rank {rank} has {count} words at {start}"
            )
        last = max(last, start + count)
    return numbers, starts, last


def checked_move(
    sent: tuple[Words, Counts, Counts | None],
    received: tuple[Words, Counts, Counts | None],
    rank: int,
    size: int,
) -> tuple[Move, int]:
    """The move of this rank, from arrays, counts and displacements, and where its last segment ends."""
    send, recv = sent[0], received[0]
    pair(send, recv)
    out, out_at, send_end = layout("send", *sent, size)
    into, into_at, recv_end = layout("recv", *received, size)
    if out[rank] != into[rank]:
        raise UsageError(f"rank {rank} sends itself {out[rank]} words but expects {into[rank]} words")
    return Move(send, out, out_at, recv, into, into_at), max(send_end, recv_end)


def packed_displs(counts: list[int]) -> list[int]:
    starts, at = [], 0
    for count in counts:
        starts.append(at)
        at += count
    return starts


def checked_color(color: int | None) -> int | None:
    if color is not None and not 0 <= color < 2**31:
        raise UsageError(f"color is {color}; wanted None or a number from 0 to 2**31 - 1")
    return color


def checked_words(words: int) -> int:
    if words < 0:
        raise UsageError(f"a window of {words} words; wanted 0 or more")
    return words


def no_operation(op: str, dtype: np.dtype[Any]) -> str:
    known = ", ".join(f'"{name}"' for name in OPERATIONS[dtype])
    if dtype == FLOAT64 and op in OPERATIONS[INT64]:
        return f'allreduce of float64 knows {known}, not "{op}": gather the terms and fold them in rank order'
    return f'allreduce of {dtype} knows {known}; got "{op}"'


# -- words -------------------------------------------------------------------------------------------------


def packed(data: bytes | None) -> tuple[npt.NDArray[np.int64], int]:
    """Bytes as words, zero-padded, and their number."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UsageError(f"got {type(data).__name__}; wanted bytes")
    raw = bytes(data)
    padded = bytearray(raw.ljust(-(-len(raw) // WORD_BYTES) * WORD_BYTES, b"\0"))
    return np.frombuffer(padded, np.int64), len(raw)


def ordered_keys(values: Words, nan_first: bool) -> npt.NDArray[np.int64]:
    """Integers in the order of the floats, any NaN at the end that wins: the same answer on every rank."""
    bits = np.where(np.isnan(values), np.copysign(np.nan, -1.0 if nan_first else 1.0), values).view(np.int64)
    return bits ^ ((bits >> 63) & np.int64(2**63 - 1))


def from_ordered_keys(keys: npt.NDArray[np.int64], out: Words) -> None:
    out.view(np.int64)[:] = keys ^ ((keys >> 63) & np.int64(2**63 - 1))
