"""Ranks as threads of one process: the same `Group` without a launcher, for tests.

`run_ranks(4, function)` calls `function(group)` on four threads. Every word is copied through a buffer of the
sender, as a network would, so ranks share no arrays but those that the caller hands to all of them. This
group is stricter than MPI: every collective is announced with its name, number and sizes, and ranks that do
not fit together all get a `ScheduleError` that says who called what, where MPI would hang or scribble.

It is not fast and not meant to be: one interpreter, one lock. A rank that fails ends the others' waiting
(`ThreadRanksBroken`); ranks that wait for ever are ended by the timeout, which says where each of them stood.

A thread cannot be killed. Its twin of a process's sudden death is `ThreadGroup.die`, or a planned `Death`:
the rank takes part in no collective any more, whatever it catches. The others' waiting ends as a launcher
would end them, or, with ``heals=True``, as MPI ends it that lets survivors go on
(`iterreduce.testing.deaths`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from iterreduce.collectives import Group, Window
from iterreduce.epochs import Refilled
from iterreduce.errors import IterReduceError, RanksLost, ScheduleError, UsageError
from iterreduce.leaders import SpreadGroup
from iterreduce.testing.deaths import Agreement, Death, Deaths, RankDied
from iterreduce.testing.meetings import Died, Meeting, Post, Segments, ThreadRanksBroken, World
from iterreduce.words import Move, Words, checked_color, checked_words

__all__ = ["Death", "Died", "RankDied", "RanksTimedOut", "ThreadGroup", "ThreadRanksBroken", "run_ranks"]

R = TypeVar("R")

_OPERATIONS = {"sum": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or}


class RanksTimedOut(IterReduceError, TimeoutError):
    """Ranks that were not done in time, and where each of them stood."""


def run_ranks(
    size: int,
    function: Callable[..., R],
    *args: Any,
    timeout: float = 240,
    heals: bool | None = False,
    deaths: Sequence[Death] = (),
    nodes: int | Sequence[int] = 1,
    respawns: int = 0,
    **kwargs: Any,
) -> list[R]:
    """Call `function(group, *args, **kwargs)` on `size` threads; their results, in rank order.

    When ranks raise, the error of the lowest rank that failed by itself is raised here as it is, with a note
    on the others. `timeout` is in seconds, for all of it, compiling included: `RanksTimedOut` then tells each
    rank's current collective and stack. A thread that computes for ever is left behind.

    ``heals``: survivors of ranks that die may go on (None: they learn of it, but the group is a caller's and
    stays as it is); then the results are those of the ranks that lived to the end. ``deaths``: who dies when.
    ``respawns``: so often new ranks take the places of lost ones, and all of them begin ``function`` again.
    ``nodes``: on how many nodes the ranks pretend to be, in fair shares, or the node of each rank.

    >>> run_ranks(3, lambda group: group.agree_max(group.rank))
    [2, 2, 2]
    """
    if size < 1:
        raise UsageError(f"{size} ranks; wanted 1 or more")
    world = World(size, heals, Deaths(tuple(deaths)), _nodes_of(size, nodes), respawns)
    meeting, threads = world.meeting("world", range(size)), list[threading.Thread]()
    results: dict[int, R] = {}

    def work(member: int, group: ThreadGroup) -> None:
        group.starts = start
        try:
            results[member] = _to_end(partial(function, group, *args, **kwargs))
        except BaseException as error:
            world.ends(member, Died(world.dead[member]) if member in world.dead else error)
        else:
            world.ends(member, Died(world.dead[member]) if member in world.dead else None)

    def start(member: int, group: ThreadGroup) -> None:
        name = f"rank {member}"
        threads.append(threading.Thread(target=work, args=(member, group), name=name, daemon=True))
        if member >= size:
            threads[-1].start()

    for rank in range(size):
        start(rank, ThreadGroup(meeting, rank))
    _run(world, threads, time.monotonic() + timeout)
    _raise_first(world, f"{timeout:g} s" if world.where else None)
    return [results[rank] for rank in sorted(results)]


def _to_end(work: Callable[[], R]) -> R:
    """Again and again where new ranks begin with it."""
    while True:
        with contextlib.suppress(Refilled):
            return work()


def _nodes_of(size: int, nodes: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(nodes, int):
        return tuple(rank * nodes // size for rank in range(size))
    if len(nodes) != size:
        raise UsageError(f"the nodes of {len(nodes)} ranks; wanted those of {size}")
    return tuple(nodes)


def _run(world: World, threads: list[threading.Thread], deadline: float) -> None:
    try:
        for thread in [*threads]:
            thread.start()
        for thread in threads:  # more may come
            thread.join(max(0.0, deadline - time.monotonic()))
        world.stop(threads)
    except BaseException:  # somebody interrupts the tests
        world.break_off("the ranks were interrupted")
        raise


def _raise_first(world: World, late: str | None) -> None:
    failed = {
        rank: error
        for rank, error in sorted(world.errors.items())
        if not _follows(error) and not (world.heals is not False and isinstance(error, Died))
    }
    for rank, error in failed.items():
        others = ", ".join(f"rank {r} with {type(e).__name__}" for r, e in failed.items() if r != rank)
        error.add_note(
            f"raised on rank {rank} of {world.size}" + (f"; also failed: {others}" if others else "")
        )
        if late:
            error.add_note(f"after {late} not all of the others had ended\n{world.where}")
        raise error
    if late:
        raise RanksTimedOut(f"not all of {world.size} ranks ended within {late}\n{world.where}")


def _follows(error: BaseException | None) -> bool:
    """Whether another rank's end was the reason."""
    while error is not None:
        if isinstance(error, ThreadRanksBroken):
            return True
        error = error.__cause__ or error.__context__
    return False


class ThreadGroup(SpreadGroup):
    """A rank of `run_ranks`: see there."""

    name, library = "threads", "threads"
    starts: Callable[[int, ThreadGroup], None]  # another rank, as one of the members of the world

    def __init__(self, meeting: Meeting, rank: int, epoch: int = 0) -> None:
        super().__init__(rank, len(meeting.members), epoch)
        self._meeting = meeting
        self.nodes = [meeting.world.nodes[member] for member in meeting.members]
        self._number = self._agreements = 0
        self._freed = False
        self._agreed: Agreement | None = None  # that ranks have died
        self.heals = bool(meeting.world.heals)

    def _meet(self, name: str, data: Any = None, **agreed: Any) -> list[Any]:
        if self._freed:
            raise UsageError(f"{name} on a group that was freed")
        self._number += 1
        return self._meeting.meet(self._number, self.rank, Post(name, tuple(agreed.items()), data))

    def _allgather(self, send: Words, recv: Words) -> None:
        parts = self._meet("allgather", send.copy(), words=send.size, dtype=send.dtype.name)
        recv[:] = np.concatenate(parts)

    def _allgatherv(self, send: Words, recv: Words, counts: list[int], displs: list[int]) -> None:
        _check_apart(counts, displs)
        parts = self._meet("allgatherv", send.copy(), counts=counts, dtype=send.dtype.name)
        for part, at in zip(parts, displs, strict=True):
            recv[at : at + part.size] = part

    def _alltoall(self, send: Words, recv: Words) -> None:
        parts = self._meet("alltoall", send.copy(), words=send.size, dtype=send.dtype.name)
        words = send.size // self.size
        mine = slice(self.rank * words, (self.rank + 1) * words)
        recv[:] = np.concatenate([part[mine] for part in parts])

    def _alltoallv(self, move: Move, bound: int) -> None:
        _check_apart(move.recv_counts, move.recv_displs)
        brings = Segments([move.sent_to(rank).copy() for rank in range(self.size)], move.recv_counts)
        parts = self._meet("alltoallv", brings, dtype=move.send.dtype.name, bound=bound)
        for rank, part in enumerate(parts):
            move.received_from(rank)[:] = part.segments[self.rank]

    def _bcast(self, array: Words, root: int) -> None:
        sent = array.copy() if self.rank == root else None
        parts = self._meet("bcast", sent, root=root, words=array.size, dtype=array.dtype.name)
        array[:] = parts[root]

    def _reduce(self, array: npt.NDArray[np.int64], op: str) -> None:
        parts = self._meet("allreduce", array.copy(), op=op, words=array.size)
        array[:] = reduce(_OPERATIONS[op], parts)

    def _barrier(self) -> None:
        self._meet("barrier")

    def split(self, color: int | None, key: int = 0) -> Group | None:
        choices = self._meet("split", (checked_color(color), key))
        if color is None:
            return None
        ranks = sorted((theirs, rank) for rank, (chosen, theirs) in enumerate(choices) if chosen == color)
        return self._sub(f"split {self._number} color {color}", [rank for _, rank in ranks])

    def duplicate(self) -> Group:
        self._meet("duplicate")
        return self._sub(f"copy {self._number}", list(range(self.size)))

    def _sub(self, label: str, ranks: list[int]) -> Group:
        label = f"{self._meeting.label}/{label}"
        meeting = self._meeting.world.meeting(label, [self._meeting.members[rank] for rank in ranks])
        return self._alike(ThreadGroup(meeting, ranks.index(self.rank), self.epoch))

    def free(self) -> None:
        self.drop_shared()
        self._free_led()
        self._meet("free")
        self._freed = True

    def node_ranks(self) -> int:
        self._meet("node_ranks")
        return self.nodes.count(self.nodes[self.rank])

    def window(self, words: int) -> Window | None:
        areas = self._meet("window", np.zeros(checked_words(words), np.int64))
        return None if self._several else _ThreadWindow(self, areas)

    def abort(self, code: int) -> None:
        raise SystemExit(code)

    def die(self, reason: str) -> NoReturn:
        """Raise `Died` here, and in every later collective of this rank."""
        world, me = self._meeting.world, self._meeting.members[self.rank]
        world.dies(me, reason)
        raise Died(reason)

    # -- ranks that die

    def is_loss(self, error: BaseException) -> bool:
        return isinstance(error, RankDied)

    def all_here(self) -> None:
        if self.heals and not self._agree(True).fine:
            raise RankDied(f"rank {self.rank} has learnt in an agreement that ranks have died")

    def heal(self, error: BaseException) -> tuple[int, ...]:
        for part in self.led_groups:
            assert isinstance(part, ThreadGroup)
            part._meeting.revoke()
        made, self._agreed = self._agreed or self._agree(False), None
        assert made.survivors is not None
        lost = tuple(rank for rank in range(self.size) if rank not in made.survivors)
        if not lost:
            raise error
        if not self.heals:
            raise RanksLost(lost, len(made.survivors)) from error
        self._refill(made, lost)
        members, old = [self._meeting.members[rank] for rank in made.survivors], self._meeting
        self._meeting = old.world.meeting(f"{old.label} without {lost}", members)
        self._number = self._agreements = 0
        self._renumbered(made.survivors.index(self.rank), lost)
        return lost

    def _refill(self, made: Agreement, lost: tuple[int, ...]) -> None:
        """With new ranks in the places of the lost, if there are to be any."""
        old = self._meeting
        members = old.world.refill(made, old.members, lost)
        if not members:
            return
        self._meeting = old.world.meeting(f"{old.label} with {[members[rank] for rank in lost]}", members)
        self._number = self._agreements = 0
        self._renumbered(self.rank, ())
        self.refilled = Refilled(lost)
        assert made.survivors is not None
        if self.rank == made.survivors[0]:
            for rank in lost:
                group = ThreadGroup(self._meeting, rank, self.epoch)
                group.refilled = Refilled(lost)
                self.starts(members[rank], group)
        raise Refilled(lost)

    def _agree(self, flag: bool) -> Agreement:
        self._agreements += 1
        made = self._meeting.agree(self._agreements, self.rank, flag)
        self._agreed = None if made.fine or not flag else made
        return made

    def _prepare_allgather(self, send: Words, recv: Words) -> Callable[[], Any]:
        return self._of_this_epoch(super()._prepare_allgather(send, recv))

    def _prepare_alltoall(self, send: Words, recv: Words) -> Callable[[], Any]:
        return self._of_this_epoch(super()._prepare_alltoall(send, recv))

    def _prepare_alltoallv(self, move: Move, bound: int) -> Callable[[], Any]:
        return self._of_this_epoch(super()._prepare_alltoallv(move, bound))

    def _of_this_epoch(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A plan of another epoch is void: using it is a defect that is to be seen."""
        epoch = self.epoch

        def checked() -> None:
            if self.epoch != epoch:
                raise ScheduleError(f"a plan of epoch {epoch} is used in epoch {self.epoch}")
            call()

        return checked

    @property
    def calls(self) -> int:
        """Collectives that this rank has begun so far, of any group: a `Death` is counted in them."""
        return self._meeting.world.deaths.begun(self._meeting.members[self.rank])

    @property
    def dead(self) -> bool:
        """Has this rank died?"""
        return self._meeting.members[self.rank] in self._meeting.world.dead


class _ThreadWindow(Window):
    """The one place where ranks see each other's memory."""

    def __init__(self, group: ThreadGroup, areas: list[npt.NDArray[np.int64]]) -> None:
        self._group, self._areas, self._epoch = group, areas, group.epoch
        self.mine = areas[group.rank]

    def of(self, rank: int) -> npt.NDArray[np.int64]:
        if not 0 <= rank < len(self._areas):
            raise UsageError(f"there is no rank {rank} in a group of {len(self._areas)}")
        return self._areas[rank]

    def fence(self) -> None:
        self._check()
        self._group._meet("window.fence")

    def _check(self) -> None:
        if self._group.epoch != self._epoch:
            raise ScheduleError(f"a window of epoch {self._epoch} is used in epoch {self._group.epoch}")

    def free(self) -> None:
        self._check()
        self._group._meet("window.free")
        self.mine, self._areas = np.zeros(0, np.int64), []


def _check_apart(counts: list[int], displs: list[int]) -> None:
    """Segments that are received must not overlap; MPI does not look."""
    last = 0
    for start, count in sorted((start, count) for start, count in zip(displs, counts, strict=True) if count):
        if start < last:
            raise UsageError(f"segments received at {displs} with {counts} words overlap at {start}")
        last = start + count
