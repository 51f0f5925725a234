"""Ranks as threads of one process: the same `Group` without a launcher, for tests.

`run_ranks(4, function)` calls `function(group)` on four threads. Every word is copied through a buffer of the
sender, as a network would, so ranks share no arrays but those that the caller hands to all of them. This
group is stricter than MPI: every collective is announced with its name, number and sizes, and ranks that do
not fit together all get a `ScheduleError` that says who called what, where MPI would hang or scribble.

It is not fast and not meant to be: one interpreter, one lock. A rank that fails ends the others' waiting
(`ThreadRanksBroken`); ranks that wait for ever are ended by the timeout, which says where each of them stood.

A thread cannot be killed. Its twin of a process's sudden death is `ThreadGroup.die`: the rank takes part in
no collective any more, whatever it catches, and the others' waiting ends as a launcher would end them.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from iterreduce.collectives import Group, Window
from iterreduce.errors import IterReduceError, ScheduleError, UsageError
from iterreduce.words import Move, Words, checked_color, checked_words

R = TypeVar("R")

_OPERATIONS = {"sum": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or}


class ThreadRanksBroken(IterReduceError):
    """Another rank ended, so this collective will never be complete."""


class Died(BaseException):
    """This rank is as dead as a thread can be: what it does until its next collective is its last."""


class RanksTimedOut(IterReduceError, TimeoutError):
    """Ranks that were not done in time, and where each of them stood."""


def run_ranks(
    size: int, function: Callable[..., R], *args: Any, timeout: float = 240, **kwargs: Any
) -> list[R]:
    """Call `function(group, *args, **kwargs)` on `size` threads; their results, in rank order.

    When ranks raise, the error of the lowest rank that failed by itself is raised here as it is, with a note
    on the others. `timeout` is in seconds, for all of it, compiling included: `RanksTimedOut` then tells each
    rank's current collective and stack. A thread that computes for ever is left behind.

    >>> run_ranks(3, lambda group: group.agree_max(group.rank))
    [2, 2, 2]
    """
    if size < 1:
        raise UsageError(f"{size} ranks; wanted 1 or more")
    world = _World(size)
    meeting = world.meeting("world", range(size))
    results: dict[int, R] = {}

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(meeting, rank), *args, **kwargs)
        except BaseException as error:
            world.ends(rank, Died(world.dead[rank]) if rank in world.dead else error)
        else:
            world.ends(rank, Died(world.dead[rank]) if rank in world.dead else None)

    threads = [threading.Thread(target=work, args=(r,), name=f"rank {r}", daemon=True) for r in range(size)]
    _run(world, threads, time.monotonic() + timeout)
    _raise_first(world, f"{timeout:g} s" if world.where else None)
    return [results[rank] for rank in range(size)]


def _run(world: _World, threads: list[threading.Thread], deadline: float) -> None:
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        world.stop(threads)
    except BaseException:  # somebody interrupts the tests
        world.break_off("the ranks were interrupted")
        raise


def _raise_first(world: _World, late: str | None) -> None:
    failed = {rank: error for rank, error in sorted(world.errors.items()) if not _follows(error)}
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


class _World:
    """What the threads of one `run_ranks` share; everything under one lock."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.errors: dict[int, BaseException] = {}
        self.ended: set[int] = set()
        self.dead: dict[int, str] = {}
        self.calls = ["has called no collective yet"] * size
        self.broken: str | None = None
        self.where = ""
        self._meetings: dict[str, _Meeting] = {}

    def meeting(self, label: str, members: Sequence[int]) -> _Meeting:
        """The meeting of this label: one object for all its members."""
        with self.changed:
            return self._meetings.setdefault(label, _Meeting(self, label, tuple(members)))

    def ends(self, rank: int, error: BaseException | None) -> None:
        with self.changed:
            self.ended.add(rank)
            self.calls[rank] = "has ended"
            self.changed.notify_all()
            if error is not None:
                self.errors[rank] = error
        if error is not None:
            self.break_off(f"rank {rank} ended with {type(error).__name__}: {error}")

    def dies(self, rank: int, reason: str) -> None:
        with self.changed:
            self.dead.setdefault(rank, reason)
        self.break_off(f"rank {rank} died: {reason}")

    def break_off(self, reason: str) -> None:
        with self.changed:
            self.broken = self.broken or reason
            self.changed.notify_all()

    def stop(self, threads: list[threading.Thread]) -> None:
        """Note where the ranks stand that have not ended, and end their waiting."""
        if any(thread.is_alive() for thread in threads):
            frames = sys._current_frames()
            with self.changed:
                self.where = "\n".join(self._stand(rank, threads[rank], frames) for rank in range(self.size))
            self.break_off("the time was up")

    def _stand(self, rank: int, thread: threading.Thread, frames: dict[int, Any]) -> str:
        frame = frames.get(thread.ident or 0)
        stack = "".join(traceback.format_stack(frame)[-6:]) if frame is not None and thread.is_alive() else ""
        return f"rank {rank} {self.calls[rank]}\n{stack}".rstrip()


class _Post(NamedTuple):
    """What a rank announces: all but the data must be the same on all ranks."""

    name: str
    agreed: tuple[tuple[str, Any], ...]
    data: Any

    def text(self, number: int) -> str:
        sizes = ", ".join(f"{what} {value}" for what, value in self.agreed)
        return f"{self.name} #{number}" + (f" ({sizes})" if sizes else "")


class _Round:
    """One collective: who has come with what."""

    def __init__(self, size: int) -> None:
        self.posts: list[_Post | None] = [None] * size
        self.done = False
        self.left = 0
        self.error: str | None = None


class _Meeting:
    """Where the ranks of one group meet, collective after collective."""

    def __init__(self, world: _World, label: str, members: tuple[int, ...]) -> None:
        self.world, self.label, self.members = world, label, members
        self._rounds: dict[int, _Round] = {}

    def meet(self, number: int, rank: int, post: _Post) -> list[Any]:
        """The data of all members, once all have come."""
        world, me = self.world, self.members[rank]
        with world.changed:
            if me in world.dead:
                raise Died(world.dead[me])
            this = self._rounds.setdefault(number, _Round(len(self.members)))
            this.posts[rank] = post
            world.calls[me] = f"is in {post.text(number)} of {self.label}"
            if all(this.posts):
                self._finish(this, self._misfit(number, this.posts))
            while not this.done:
                self._look_for_the_lost(number, this, rank)
                if not this.done:
                    world.changed.wait()
            world.calls[me] = f"has left {post.text(number)} of {self.label}"
            this.left += 1
            if this.left == len(self.members):
                del self._rounds[number]
        if this.error is not None:
            raise ScheduleError(this.error)
        return [other.data for other in this.posts if other is not None]

    def _finish(self, this: _Round, error: str | None) -> None:
        this.error, this.done = error, True
        self.world.changed.notify_all()

    def _look_for_the_lost(self, number: int, this: _Round, rank: int) -> None:
        if self.world.broken is not None:
            raise ThreadRanksBroken(f"{self._call(number, this, rank)}, but {self.world.broken}")
        for other, member in enumerate(self.members):
            if member in self.world.ended and this.posts[other] is None:
                call = self._call(number, this, rank)
                self._finish(this, f"{call}, but rank {other} has ended and will not come")

    def _call(self, number: int, this: _Round, rank: int) -> str:
        post = this.posts[rank]
        assert post is not None
        return f"rank {rank} is in {post.text(number)}"

    def _misfit(self, number: int, posts: list[_Post | None]) -> str | None:
        first = posts[0]
        assert first is not None
        for rank, post in enumerate(posts):
            assert post is not None
            if post[:2] != first[:2]:
                return (
                    f"ranks do not fit: rank 0 is in {first.text(number)}, rank {rank} in {post.text(number)}"
                )
        return _misfit_counts(number, [post for post in posts if post is not None])


def _misfit_counts(number: int, posts: list[_Post]) -> str | None:
    if posts[0].name != "alltoallv":
        return None
    for rank, post in enumerate(posts):
        for other, segment in enumerate(post.data.segments):
            expected = posts[other].data.recv_counts[rank]
            if segment.size != expected:
                return (
                    f"counts do not fit: in alltoallv #{number} rank {rank} sends {segment.size} words to "
                    f"rank {other}, which expects {expected}"
                )
    return None


class _Segments(NamedTuple):
    """What a rank brings to an alltoallv: packed copies for each rank, and what it expects."""

    segments: list[Words]
    recv_counts: list[int]


class ThreadGroup(Group):
    """A rank of `run_ranks`: see there."""

    name, library = "threads", "threads"

    def __init__(self, meeting: _Meeting, rank: int, epoch: int = 0) -> None:
        super().__init__(rank, len(meeting.members), epoch)
        self._meeting = meeting
        self._number = 0
        self._freed = False

    def _meet(self, name: str, data: Any = None, **agreed: Any) -> list[Any]:
        if self._freed:
            raise UsageError(f"{name} on a group that was freed")
        self._number += 1
        return self._meeting.meet(self._number, self.rank, _Post(name, tuple(agreed.items()), data))

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
        brings = _Segments([move.sent_to(rank).copy() for rank in range(self.size)], move.recv_counts)
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
        return ThreadGroup(meeting, ranks.index(self.rank), self.epoch)

    def free(self) -> None:
        self.drop_shared()
        self._meet("free")
        self._freed = True

    def node_ranks(self) -> int:
        self._meet("node_ranks")
        return self.size

    def window(self, words: int) -> Window | None:
        areas = self._meet("window", np.zeros(checked_words(words), np.int64))
        return _ThreadWindow(self, areas)

    def abort(self, code: int) -> None:
        raise SystemExit(code)

    def die(self, reason: str) -> NoReturn:
        """Raise `Died` here, and in every later collective of this rank."""
        world, me = self._meeting.world, self._meeting.members[self.rank]
        world.dies(me, reason)
        raise Died(reason)

    @property
    def dead(self) -> bool:
        """Has this rank died?"""
        return self._meeting.members[self.rank] in self._meeting.world.dead


class _ThreadWindow(Window):
    """The one place where ranks see each other's memory."""

    def __init__(self, group: ThreadGroup, areas: list[npt.NDArray[np.int64]]) -> None:
        self._group, self._areas = group, areas
        self.mine = areas[group.rank]

    def of(self, rank: int) -> npt.NDArray[np.int64]:
        if not 0 <= rank < len(self._areas):
            raise UsageError(f"there is no rank {rank} in a group of {len(self._areas)}")
        return self._areas[rank]

    def fence(self) -> None:
        self._group._meet("window.fence")

    def free(self) -> None:
        self._group._meet("window.free")
        self.mine, self._areas = np.zeros(0, np.int64), []


def _check_apart(counts: list[int], displs: list[int]) -> None:
    """Segments that are received must not overlap; MPI does not look."""
    last = 0
    for start, count in sorted((start, count) for start, count in zip(displs, counts, strict=True) if count):
        if start < last:
            raise UsageError(f"segments received at {displs} with {counts} words overlap at {start}")
        last = start + count
