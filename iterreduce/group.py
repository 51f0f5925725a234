"""What a group of ranks is: `Group` and its dozen primitives, plans and windows, and one rank alone.

Everything above speaks to a `Group` and never sees a communicator. There are three kinds: ranks of an MPI
program (`collectives`, which re-exports what stands here), one rank alone, and threads of one process for
tests (`iterreduce.testing`). Nothing here knows MPI.

What travels is words: 1-D C-contiguous arrays of int64 or float64, never objects, so nothing is pickled.
Arguments are checked before anything is sent (`UsageError`); what checks cannot see is ranks that call
different primitives: under MPI they wait for each other for ever, on threads they get a `ScheduleError`.
"""

from __future__ import annotations

import os
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from iterreduce.epochs import Refilled, survived
from iterreduce.errors import UsageError
from iterreduce.windows import KeptWindow, SoloWindow
from iterreduce.windows import Window as Window
from iterreduce.words import (
    FLOAT64,
    OPERATIONS,
    WORD_BYTES,
    Counts,
    Move,
    Traffic,
    Words,
    check_header,
    check_words,
    checked_color,
    checked_move,
    checked_words,
    from_ordered_keys,
    layout,
    no_operation,
    ordered_keys,
    packed,
    pair,
    want,
)

MAX_WORDS = 2**31 - 1  # counts and displacements of MPI before 4.0 are C ints


class Plan:
    """A collective whose arguments were checked and laid out once; the arrays are those it was made with.

    >>> group, send, recv = SoloGroup(), np.arange(3), np.zeros(3, np.int64)
    >>> plan = group.allgather_plan(send, recv)
    >>> send[0] = 7
    >>> plan.run()
    >>> recv.tolist()
    [7, 1, 2]
    """

    __slots__ = ("__weakref__", "_bytes", "_call", "_free", "_header_bytes", "_traffic", "epoch")

    def __init__(self, group: Group, call: Callable[[], Any], words: int, header_words: int) -> None:
        self.epoch = group.epoch
        self._call = call
        self._traffic = group.traffic
        self._bytes = WORD_BYTES * (words - header_words)
        self._header_bytes = WORD_BYTES * header_words
        free = getattr(call, "free", None)  # of a persistent request
        self._free = weakref.finalize(self, _freed, group, group.epoch, free) if free is not None else None

    def run(self) -> None:
        """Send and receive. Collective."""
        self._call()
        traffic = self._traffic
        traffic.payload_bytes += self._bytes
        traffic.header_bytes += self._header_bytes
        traffic.collectives += 1

    __call__ = run

    def free(self) -> None:
        """Give back what MPI holds for it; happens by itself when the plan is dropped. Local."""
        if self._free is not None:
            self._free()


def _freed(group: Group, epoch: int, free: Callable[[], None]) -> None:  # not where ranks died since
    if group.epoch == epoch:
        free()


class Group(ABC):
    """`size` ranks that communicate; this one is number `rank`.

    Words are 1-D C-contiguous int64 or float64 arrays, counts and displacements are in words. What is sent
    and where it is received never share memory. `epoch` tells groups apart that follow each other in one run
    (a rank was lost): plans of another epoch are void.

    >>> group = SoloGroup()
    >>> sums = np.array([4, 5])
    >>> group.allreduce(sums, "sum")
    >>> group.rank, group.size, sums.tolist()
    (0, 1, [4, 5])
    """

    name: str
    library: str
    heals = False  # can it go on without ranks that died
    refilled: Refilled | None = None  # why the program began again, on all ranks

    _over: ClassVar[Callable[[Any, int], Group]]  # over a communicator: set by `collectives`, which knows MPI

    def __init__(self, rank: int, size: int, epoch: int = 0) -> None:
        self.rank, self.size, self.epoch = rank, size, epoch
        self.traffic = Traffic()
        self._kept = KeptWindow(size)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank} of {self.size}, {self.library}>"

    @staticmethod
    def from_comm(comm: Any, max_words: int = MAX_WORDS) -> Group:
        """A group of its own over the ranks of an mpi4py intracommunicator, which is duplicated.

        The caller frees the group. `max_words` bounds what one call hands to MPI, the same on all ranks.

        Collective.
        """
        return Group._over(comm, max_words)

    # -- moves ---------------------------------------------------------------------------------------------

    def allgather(self, send: Words, recv: Words, header_words: int = 0) -> None:
        """Every rank's `send`, in rank order, into `recv` (size * len(send) words) on all ranks.

        The first `header_words` of `send` are counted as header.

        Collective.
        """
        self._check_allgather(send, recv, header_words)
        self._allgather(send, recv)
        self.traffic.count((self.size - 1) * send.size, (self.size - 1) * header_words)

    def allgather_plan(self, send: Words, recv: Words, header_words: int = 0) -> Plan:
        """The same, prepared: each `run()` sends what then stands in `send`. Collective."""
        self._check_allgather(send, recv, header_words)
        call = self._prepare_allgather(send, recv)
        return Plan(self, call, (self.size - 1) * send.size, (self.size - 1) * header_words)

    def allgatherv(self, send: Words, recv: Words, counts: Counts, displs: Counts | None = None) -> None:
        """Rank r's `send`, counts[r] words, to recv[displs[r]:] on all ranks; packed if `displs` is None.

        `counts` are the same on all ranks.

        Collective.
        """
        pair(send, recv)
        where, starts, _ = layout("recv", recv, counts, displs, self.size)
        want("send", send, where[self.rank])
        self._allgatherv(send, recv, where, starts)
        self.traffic.count((self.size - 1) * send.size)

    def alltoall(self, send: Words, recv: Words, header_words: int = 0) -> None:
        """The r-th of `size` equal parts of `send` to rank r; parts are received in rank order.

        The first `header_words` of each part are counted as header.

        Collective.
        """
        words = self._check_alltoall(send, recv, header_words)
        self._exchange_equal(send, recv)
        self.traffic.count((self.size - 1) * words, (self.size - 1) * header_words)

    def alltoall_plan(self, send: Words, recv: Words, header_words: int = 0) -> Plan:
        """`alltoall`, prepared: each `run()` sends what then stands in `send`. Local."""
        words = self._check_alltoall(send, recv, header_words)
        call = self._planned_equal(send, recv)
        return Plan(self, call, (self.size - 1) * words, (self.size - 1) * header_words)

    def alltoallv(
        self,
        send: Words,
        send_counts: Counts,
        send_displs: Counts | None,
        recv: Words,
        recv_counts: Counts,
        recv_displs: Counts | None,
        header_words: int = 0,
        bound_words: int | None = None,
    ) -> None:
        """send_counts[r] words at send_displs[r] to rank r, recv_counts[r] words from it to recv_displs[r].

        Displacements None: packed in rank order. `header_words` of each segment are counted as header.
        `bound_words` is a number that all ranks agree on, at least the end of every segment on every rank:
        with it the ranks need not agree first (one reduction) whether the sizes fit one call of MPI.

        Collective.
        """
        sent, received = (send, send_counts, send_displs), (recv, recv_counts, recv_displs)
        move, end = checked_move(sent, received, self.rank, self.size)
        check_header(header_words, min(move.send_counts))
        if bound_words is not None and end > bound_words:
            raise UsageError(f"bound_words is {bound_words}, but a segment on this rank ends at {end} words")
        self._exchange(move, self.agree_max(end) if bound_words is None else bound_words)
        self.traffic.count(move.words_off(self.rank), (self.size - 1) * header_words)

    def alltoallv_plan(
        self,
        send: Words,
        send_counts: Counts,
        send_displs: Counts | None,
        recv: Words,
        recv_counts: Counts,
        recv_displs: Counts | None,
        header_words: int = 0,
    ) -> Plan:
        """`alltoallv`, prepared: each `run()` sends what then stands in `send`. Collective."""
        sent, received = (send, send_counts, send_displs), (recv, recv_counts, recv_displs)
        move, end = checked_move(sent, received, self.rank, self.size)
        check_header(header_words, min(move.send_counts))
        call = self._planned(move, self.agree_max(end))
        return Plan(self, call, move.words_off(self.rank), (self.size - 1) * header_words)

    def bcast(self, array: Words, root: int = 0) -> None:
        """The root's `array` into everybody's, which has the same length and dtype. Collective."""
        check_words("array", array, writeable=True)
        self._check_root(root)
        self._bcast(array, root)
        self.traffic.count((self.size - 1) * array.size if self.rank == root else 0)

    # -- agreement -----------------------------------------------------------------------------------------

    def allreduce(self, array: Words, op: str, header_words: int = 0) -> None:
        """Fold the arrays of all ranks, element by element, in place: "sum", "min", "max", "or" (bitwise).

        float64 knows only "min" and "max" (a NaN on any rank wins, -0.0 is below 0.0): a float sum would
        depend on the order in which the library adds. Gather the terms and fold them in rank order instead.

        Collective.
        """
        check_words("array", array, writeable=True)
        if op not in OPERATIONS[array.dtype]:
            raise UsageError(no_operation(op, array.dtype))
        check_header(header_words, array.size)
        if array.dtype == FLOAT64:
            keys = ordered_keys(array, nan_first=op == "min")
            self._reduce(keys, op)
            from_ordered_keys(keys, array)
        else:
            self._reduce(array, op)
        self.traffic.count(array.size if self.size > 1 else 0, header_words if self.size > 1 else 0)

    def barrier(self) -> None:
        """Nobody leaves before all have come. Collective."""
        self._barrier()
        self.traffic.count(0)

    def agree_max(self, value: int) -> int:
        """The largest value of any rank. Collective."""
        array = np.array([value], np.int64)
        self.allreduce(array, "max", header_words=1)
        return int(array[0])

    def agree_any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return bool(self.agree_max(int(flag)))

    def bcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """The root's bytes, on all ranks; what the others hand in is not looked at.

        >>> SoloGroup().bcast_bytes(b"seed")
        b'seed'

        Collective.
        """
        self._check_root(root)
        words, length = packed(data) if self.rank == root else (np.zeros(0, np.int64), 0)
        head = np.array([length], np.int64)
        self.bcast(head, root)
        length = int(head[0])
        if self.rank != root:
            words = np.empty(-(-length // WORD_BYTES), np.int64)
        self.bcast(words, root)
        return words.tobytes()[:length]

    def allgather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, in rank order, on all ranks.

        >>> SoloGroup().allgather_bytes(b"node7")
        [b'node7']

        Collective.
        """
        words, length = packed(data)
        lengths = np.empty(self.size, np.int64)
        self.allgather(np.array([length], np.int64), lengths, header_words=1)
        counts = (-(-lengths // WORD_BYTES)).tolist()
        recv = np.empty(sum(counts), np.int64)
        self.allgatherv(words, recv, counts)
        ends = np.cumsum(counts).tolist()
        return [
            recv[end - count : end].tobytes()[:length]
            for end, count, length in zip(ends, counts, lengths.tolist(), strict=True)
        ]

    # -- groups and memory ---------------------------------------------------------------------------------

    @abstractmethod
    def split(self, color: int | None, key: int = 0) -> Group | None:
        """One group per color (>= 0), ranks ordered by (key, rank here); None with color None. Collective."""

    @abstractmethod
    def duplicate(self) -> Group:
        """The same ranks, but messages of their own. Collective."""

    @abstractmethod
    def free(self) -> None:
        """Give back what the group holds; it is not used afterwards. Collective."""

    @abstractmethod
    def node_ranks(self) -> int:
        """How many ranks of the group are on this rank's node. Collective."""

    @abstractmethod
    def window(self, words: int) -> Window | None:
        """Memory shared by all ranks, `words` of this rank's own (zeros).

        None, on all ranks, where they are not all on one node or its /dev/shm cannot hold the areas.

        Collective.
        """

    def shared(self, words: Sequence[int]) -> Window | None:
        """The window that the group keeps, with at least ``words[r]`` words of rank r: an agreed list.

        Whoever asks next gets the same memory: nothing stays in it. None, on all ranks, as of `window`.

        Collective.
        """
        return self._kept.at_least(words, self.rank, self.window)

    def drop_shared(self) -> None:
        """Give that window back, if there is one; who asks again gets another. Collective."""
        self._kept.drop()

    @property
    def shared_bytes(self) -> int:
        """Bytes of this rank's area of it."""
        return WORD_BYTES * self._kept.words[self.rank]

    # -- ranks that die ------------------------------------------------------------------------------------

    def is_loss(self, error: BaseException) -> bool:
        """May this error of a collective mean that ranks have died? Local."""
        return False

    def heal(self, error: BaseException) -> tuple[int, ...]:
        """Go on without the ranks that died; returns the numbers that they had.

        The group changes: rank, size, communicator, epoch. Plans, windows and groups of the epoch before
        are dropped, never used again, nor freed: that could wait for the dead. On all survivors it raises
        ``error`` where nobody died, and `RanksLost` where the communicator is a caller's: it stays as it is.

        Collective among those who live, wherever in the schedule each of them stands.
        """
        raise error

    def all_here(self) -> None:  # noqa: B027 (nothing to do where no rank can be lost)
        """Raise a loss on all survivors or on none (others may raise on some). It stands where ranks
        leave what they could be asked to do again. Collective, where the group heals.
        """

    def _renumbered(self, rank: int, lost: Collection[int]) -> None:
        """The group goes on without the ranks that had these numbers."""
        self.rank, self.size, self.epoch = rank, self.size - len(lost), self.epoch + 1
        self._kept = KeptWindow(self.size)
        survived()

    @abstractmethod
    def abort(self, code: int) -> None:
        """End all ranks with this status. Only for the command line: a library never does."""

    # -- what the kinds of groups implement; arguments are checked -----------------------------------------

    @abstractmethod
    def _allgather(self, send: Words, recv: Words) -> None: ...

    @abstractmethod
    def _allgatherv(self, send: Words, recv: Words, counts: list[int], displs: list[int]) -> None: ...

    @abstractmethod
    def _alltoall(self, send: Words, recv: Words) -> None: ...

    @abstractmethod
    def _alltoallv(self, move: Move, bound: int) -> None: ...

    @abstractmethod
    def _bcast(self, array: Words, root: int) -> None: ...

    @abstractmethod
    def _reduce(self, array: npt.NDArray[np.int64], op: str) -> None: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    def _prepare_allgather(self, send: Words, recv: Words) -> Callable[[], Any]:
        return partial(self._allgather, send, recv)

    def _prepare_alltoall(self, send: Words, recv: Words) -> Callable[[], Any]:
        return partial(self._alltoall, send, recv)

    def _prepare_alltoallv(self, move: Move, bound: int) -> Callable[[], Any]:
        return partial(self._alltoallv, move, bound)

    # -- the same for exchanges, where several nodes may make a difference (`leaders`)

    def _exchange_equal(self, send: Words, recv: Words) -> None:
        self._alltoall(send, recv)

    def _exchange(self, move: Move, bound: int) -> None:
        self._alltoallv(move, bound)

    def _planned_equal(self, send: Words, recv: Words) -> Callable[[], Any]:
        return self._prepare_alltoall(send, recv)

    def _planned(self, move: Move, bound: int) -> Callable[[], Any]:
        return self._prepare_alltoallv(move, bound)

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise UsageError(f"root is {root}; wanted a rank from 0 to {self.size - 1}")

    def _check_alltoall(self, send: Words, recv: Words, header_words: int) -> int:
        pair(send, recv)
        want("recv", recv, send.size)
        words = send.size // self.size
        if words * self.size != send.size:
            raise UsageError(f"send has {send.size} words, which is not a multiple of the {self.size} ranks")
        check_header(header_words, words)
        return words

    def _check_allgather(self, send: Words, recv: Words, header_words: int) -> None:
        pair(send, recv)
        want("recv", recv, self.size * send.size)
        check_header(header_words, send.size)


class SoloGroup(Group):
    """One rank alone: what it sends it receives. Needs no MPI."""

    name, library = "alone", "none"

    def __init__(self, epoch: int = 0) -> None:
        super().__init__(0, 1, epoch)

    def _allgather(self, send: Words, recv: Words) -> None:
        recv[:] = send

    _alltoall = _allgather

    def _allgatherv(self, send: Words, recv: Words, counts: list[int], displs: list[int]) -> None:
        recv[displs[0] : displs[0] + send.size] = send

    def _alltoallv(self, move: Move, bound: int) -> None:
        move.copy_own(0)

    def _bcast(self, array: Words, root: int) -> None:
        pass

    def _reduce(self, array: npt.NDArray[np.int64], op: str) -> None:
        pass

    def _barrier(self) -> None:
        pass

    def split(self, color: int | None, key: int = 0) -> Group | None:
        return None if checked_color(color) is None else self.duplicate()

    def duplicate(self) -> Group:
        return SoloGroup(self.epoch)

    def free(self) -> None:
        pass

    def node_ranks(self) -> int:
        return 1

    def window(self, words: int) -> Window | None:
        return SoloWindow(checked_words(words))

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
