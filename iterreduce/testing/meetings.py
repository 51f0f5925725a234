"""Where ranks that are threads meet: one collective after another, under one lock.

Every collective is announced with its name, number and sizes; ranks that do not fit together all get a
`ScheduleError`. Deaths and agreements are counted here, too (`iterreduce.testing.deaths`). Who speaks to it:
`iterreduce.testing.threads`.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from iterreduce.errors import IterReduceError, ScheduleError
from iterreduce.testing.deaths import Agreement, Death, Deaths, RankDied
from iterreduce.words import Words


class ThreadRanksBroken(IterReduceError):
    """Another rank ended, so this collective will never be complete."""


class Died(BaseException):
    """This rank is as dead as a thread can be: what it does until its next collective is its last."""


class World:
    """What the threads of one `run_ranks` share; everything under one lock."""

    def __init__(
        self,
        size: int,
        heals: bool | None = False,
        deaths: Deaths | None = None,
        nodes: Sequence[int] | None = None,
        respawns: int = 0,
    ) -> None:
        self.size, self.heals, self.deaths = size, heals, deaths or Deaths()
        self.nodes, self.respawns = [*(nodes or [0] * size)], respawns
        self.changed = threading.Condition()
        self.errors: dict[int, BaseException] = {}
        self.ended: set[int] = set()
        self.dead: dict[int, str] = {}
        self.calls = ["has called no collective yet"] * size
        self.broken: str | None = None
        self.where = ""
        self._meetings: dict[str, Meeting] = {}

    def meeting(self, label: str, members: Sequence[int]) -> Meeting:
        """The meeting of this label: one object for all its members."""
        with self.changed:
            return self._meetings.setdefault(label, Meeting(self, label, tuple(members)))

    def refill(self, made: Agreement, members: Sequence[int], lost: Sequence[int]) -> list[int]:
        """The members with new ones in the lost places, decided once for all that ask; none: they stay lost.

        The first who asks is to start those that are new: from `size` as it was.
        """
        with self.changed:
            if made.members is None:
                made.members = []
                if self.respawns:
                    self.respawns -= 1
                    made.members = [*members]
                    for rank in lost:
                        made.members[rank] = self.size
                        self.nodes.append(self.nodes[members[rank]])
                        self.calls.append("has called no collective yet")
                        self.size += 1
            return made.members

    def ends(self, rank: int, error: BaseException | None) -> None:
        with self.changed:
            self.ended.add(rank)
            self.calls[rank] = "has ended"
            self.changed.notify_all()
            if error is not None:
                self.errors[rank] = error
        if error is not None and not (self.heals is not False and isinstance(error, Died)):
            self.break_off(f"rank {rank} ended with {type(error).__name__}: {error}")

    def dies(self, rank: int, reason: str) -> None:
        with self.changed:
            self.dead.setdefault(rank, reason)
            self.changed.notify_all()
        if self.heals is False:
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


class Post(NamedTuple):
    """What a rank announces: all but the data must be the same on all ranks."""

    name: str
    agreed: tuple[tuple[str, Any], ...]
    data: Any

    def text(self, number: int) -> str:
        sizes = ", ".join(f"{what} {value}" for what, value in self.agreed)
        return f"{self.name} #{number}" + (f" ({sizes})" if sizes else "")


class Round:
    """One collective: who has come with what."""

    def __init__(self, size: int) -> None:
        self.posts: list[Post | None] = [None] * size
        self.done = False
        self.left = 0
        self.error: str | None = None
        self.heard_by: tuple[int, ...] | None = None  # by a rank that died: who gets all of it


class Meeting:
    """Where the ranks of one group meet, collective after collective."""

    def __init__(self, world: World, label: str, members: tuple[int, ...]) -> None:
        self.world, self.label, self.members = world, label, members
        self._rounds: dict[int, Round] = {}
        self.revoked = False
        self._agreements: dict[int, Agreement] = {}

    def meet(self, number: int, rank: int, post: Post) -> list[Any]:
        """The data of all members, once all have come."""
        world, me = self.world, self.members[rank]
        with world.changed:
            last = self._alive(me)
            this = self._rounds.setdefault(number, Round(len(self.members)))
            this.posts[rank] = post
            world.calls[me] = f"is in {post.text(number)} of {self.label}"
            if last is not None:
                this.heard_by = last.heard_by
            if all(this.posts):
                self._finish(this, self._misfit(number, this.posts))
            if last is not None:
                world.dies(me, str(last))
                raise Died(str(last))
            while not this.done:
                self._look_for_the_lost(number, this, rank)
                if not this.done:
                    world.changed.wait()
            if this.heard_by is not None and me not in this.heard_by:
                raise RankDied(f"{self._call(number, this, rank)}, and a rank died in it")
            world.calls[me] = f"has left {post.text(number)} of {self.label}"
            this.left += 1
            if this.left == len(self.members):
                del self._rounds[number]
        if this.error is not None:
            raise ScheduleError(this.error)
        return [other.data for other in this.posts if other is not None]

    def _alive(self, me: int) -> Death | None:
        """Raise unless this rank may begin a collective; its planned death, if that is to
        be here, in the midst of it.
        """
        world = self.world
        if me not in world.dead:
            last = world.deaths.begin(me)
            if last is not None and last.heard_by is not None:
                return last
            if last is not None:
                world.dies(me, str(last))
        if me in world.dead:
            raise Died(world.dead[me])
        return None

    def agree(self, number: int, rank: int, flag: bool) -> Agreement:
        """All who live say whether all is well: one outcome for all of them, whoever is dead."""
        world, me = self.world, self.members[rank]
        with world.changed:
            last = self._alive(me)
            this = self._agreements.setdefault(number, Agreement())
            this.said[rank] = flag
            if last is not None:
                world.dies(me, str(last))
                raise Died(str(last))
            if not flag:
                self.revoked = True
            world.changed.notify_all()
            world.calls[me] = f"is in agreement #{number} of {self.label}"
            while not this.settle(self._living(), len(self.members)):
                for other in self._living():
                    if self.members[other] in world.ended and other not in this.said:
                        raise ScheduleError(f"rank {other} of {self.label} has ended and will not agree")
                if world.broken is not None:
                    raise ThreadRanksBroken(f"rank {rank} is in an agreement, but {world.broken}")
                world.changed.wait()
            world.changed.notify_all()
            world.calls[me] = f"has left agreement #{number} of {self.label}"
            return this

    def revoke(self) -> None:
        """End the waiting of all members."""
        with self.world.changed:
            self.revoked = True
            self.world.changed.notify_all()

    def _living(self) -> list[int]:
        return [rank for rank, member in enumerate(self.members) if member not in self.world.dead]

    def _finish(self, this: Round, error: str | None) -> None:
        this.error, this.done = error, True
        self.world.changed.notify_all()

    def _look_for_the_lost(self, number: int, this: Round, rank: int) -> None:
        if self.world.broken is not None:
            raise ThreadRanksBroken(f"{self._call(number, this, rank)}, but {self.world.broken}")
        if self.revoked:
            raise RankDied(f"{self._call(number, this, rank)}, but the group heals")
        for other, member in enumerate(self.members):
            if member in self.world.dead and this.posts[other] is None:
                raise RankDied(f"{self._call(number, this, rank)}, but rank {other} has died")
            if member in self.world.ended and this.posts[other] is None:
                call = self._call(number, this, rank)
                self._finish(this, f"{call}, but rank {other} has ended and will not come")

    def _call(self, number: int, this: Round, rank: int) -> str:
        post = this.posts[rank]
        assert post is not None
        return f"rank {rank} is in {post.text(number)}"

    def _misfit(self, number: int, posts: list[Post | None]) -> str | None:
        first = posts[0]
        assert first is not None
        for rank, post in enumerate(posts):
            assert post is not None
            if post[:2] != first[:2]:
                return (
                    f"ranks do not fit: rank 0 is in {first.text(number)}, rank {rank} in {post.text(number)}"
                )
        return _misfit_counts(number, [post for post in posts if post is not None])


def _misfit_counts(number: int, posts: list[Post]) -> str | None:
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


class Segments(NamedTuple):
    """What a rank brings to an alltoallv: packed copies for each rank, and what it expects."""

    segments: list[Words]
    recv_counts: list[int]
