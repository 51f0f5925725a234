"""Recovery in place: ranks that live go on without those that died.

A dead rank shows itself as an error of a collective, wherever a survivor stands. Whatever was asked of the
ranks (a *deed*: an iteration, a run, an action on rows, a result to be written) runs under `enduring`, which
catches that error, heals the group, and does the deed again on the ranks that are left. Inputs are pure, so
most deeds simply begin anew; a `LoopRun` makes itself anew and takes up the newest commit that the survivors
can provide: from copies in their memory (`iterreduce.copies`), else from the newest checkpoint, else from its
sources. There is no second road: it starts, and takes up, as a run does that is started again.

A loss may show on some survivors only, so a deed ends on all of them or on none (`Group.all_here`), but for
an iteration that a caller's own ``while`` asks for: there a rank may be one deed ahead, and helps those
behind.

What cannot be made good is `RanksLost`: the communicator is a caller's, or rows are gone that only the dead
had. Nothing here speaks to an MPI.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from iterreduce import driver
from iterreduce.accounting import room_for
from iterreduce.collectives import Group, group_for
from iterreduce.columns.threads import current
from iterreduce.copies import Copies, Remembered, whole
from iterreduce.deeds import Deeds, Legacy, Place, deeds_of, inherited, numbered
from iterreduce.errors import IterReduceError, RanksLost
from iterreduce.events import Events
from iterreduce.fingerprints import described, locals_of, opened_first
from iterreduce.fixpoint import Outcome
from iterreduce.lasting import captured_run
from iterreduce.levels import Position, sinks_of
from iterreduce.loop import Loop
from iterreduce.options import Options
from iterreduce.sources.blocks import Kept
from iterreduce.sources.local import LocalSource
from iterreduce.stopping import StopRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Loss:
    """Ranks that died, by the numbers that they had; ``seconds`` to heal the group."""

    lost: tuple[int, ...]
    seconds: float


Again = Callable[[Loss], None]


def enduring(
    group: Group,
    work: Callable[[], T],
    again: Again | None = None,
    run: LoopRun | None = None,
    driven: bool = False,
) -> T:
    """``work()``; where ranks die meanwhile, ``again`` and once more on those that are left. Collective.

    Work within work is a part of it, and done again with it. ``run``: it is this run's, and ``again`` renews
    it; ``driven``: it is an iteration that the run's caller asks for. Raises `RanksLost` where the group must
    not go on.
    """
    deeds = deeds_of(group)
    if deeds.busy:
        return work()
    if not group.heals:
        return told(group, work)
    deeds.number, deeds.busy = deeds.number + 1, True
    try:
        return _endured(group, deeds, work, again, run, driven)
    finally:
        deeds.busy = False


def _endured(
    group: Group,
    deeds: Deeds,
    work: Callable[[], T],
    again: Again | None,
    run: LoopRun | None,
    driven: bool,
) -> T:
    loss: Loss | None = None
    while True:
        try:
            if loss is not None:
                helped = _help_others(group, deeds, loss, run if driven else None)
                if again is not None and (helped is None or helped is not run):
                    again(loss)
                loss = None
            made = work()
            if driven and not isinstance(made, Outcome):
                deeds.last = run
            else:
                group.all_here()
                deeds.last = None
            return made
        except BaseException as error:
            problem = _loss_of(group, error)
        started = time.perf_counter()
        lost = group.heal(problem)
        del problem  # it holds on to all that was under way, and so to tables
        before = loss.lost if loss is not None else ()
        loss = Loss((*before, *lost), time.perf_counter() - started)


def _loss_of(group: Group, error: BaseException) -> BaseException:
    """The error that says that ranks died; raises any other, unless a rank died beside it. Collective."""
    if not group.is_loss(error):
        if isinstance(error, IterReduceError):  # all ranks raise it, but a loss may keep some from it
            try:
                group.all_here()
            except BaseException as other:
                if group.is_loss(other):
                    return other
                raise
        raise error
    return error


def _help_others(group: Group, deeds: Deeds, loss: Loss, run: LoopRun | None) -> LoopRun | None:
    """Some may stand in the iteration before this deed, of a run that its caller drives: go there, too.
    Returns that run. Collective.
    """
    numbers = np.empty(group.size, np.int64)
    group.allgather(np.array([deeds.number]), numbers, header_words=1)
    last: LoopRun | None = deeds.last
    if last is None or deeds.number == int(numbers.min()) or last is run:
        return None
    last._renew(loss)
    last._go_on()
    return last


def told(group: Group, work: Callable[[], T]) -> T:
    """``work()``; where ranks die meanwhile, the error says which, if the group can tell. Collective."""
    try:
        return work()
    except BaseException as error:
        if group.is_loss(error):
            group.heal(error)
        raise


class LoopRun(driver.LoopRun):
    """One run of a loop on its ranks; it goes on without ranks that die, where their group can.

    `advance` until it returns an `Outcome`, then read ``tables``. Where the communicator is a caller's,
    `RanksLost` holds the last commit.
    """

    def __init__(
        self,
        loop: Loop,
        comm: Any = None,
        options: Options | None = None,
        events: Events | None = None,
        stop: StopRequest | None = None,
        copies: Copies | None = None,
    ):
        """On a `Group`, or on the ranks of a communicator (None: this rank alone).

        ``copies``: those of a run like this, to go on from. Collective.
        """
        group = group_for(comm)
        self.recoveries: list[dict[str, Any]] = []
        self._first = 0  # iterations that were done before this run began
        self._feeds: dict[int, Mapping[str, Any]] = {}  # that may have to be fed again, by commit
        self._resident: dict[int, Kept] | None = None  # rows to go on with, while it makes itself anew
        self._number, self._ran = copies.of_run if copies is not None else numbered(group), False
        self._program = group.refilled
        enduring(group, lambda: driver.LoopRun.__init__(self, loop, group, options, events, stop))
        self._endures = group.heals and self.options.recover != "off"
        self._taken_over = copies
        if self._endures:
            self.copies = copies or Copies(group, self.options.copy_every)
            self.copies.of_run = self._number
            capture, sinks = self._captured, bool(sinks_of(self.loop))
            self.copies.serve(capture, self._has_room, self.tell, sinks, self.working)

    # ------------------------------------------------------------------ what is asked of it

    def start(self, held: Any = None) -> None:
        """Load sources, prepare invariants, give states initial rows. Collective; `advance` calls it."""
        if not self._started:
            self._ring(lambda: None if self._started else self._begin_run(held))

    def advance(self, feed: Mapping[str, Any] | None = None) -> Position | Outcome:
        """Run one iteration: of the innermost loop, where there are loops in the body. Collective.

        ``feed`` gives rows to the feeds that ``wants`` names. Returns the new `Position`, or the `Outcome` if
        the loop ended with it. If anything fails, on any rank, the iteration is rolled back and the same
        error is raised on all; ``tables`` are those of the last commit.
        """
        if not self._endures or deeds_of(self.group).busy:
            try:
                return super().advance(feed)
            except BaseException as error:
                raise self._with_commit(error) from error.__cause__
        at = self.returned + 1
        if feed:
            self._feeds[at] = feed
        found = enduring(self.group, lambda: self._advance_to(at), self._renew, self, driven=True)
        self.returned = at
        if self._feeds and self.copies is not None:
            self._feeds = {n: rows for n, rows in self._feeds.items() if n > self.copies.oldest}
        return found

    def run(self) -> Outcome:
        """Iterate until a stopping rule holds. Collective."""
        self._ran = True
        outcome = self._ring(super().run)
        self.returned = self.commits
        return outcome

    def finish(self) -> None:
        """Run the stages that follow the last iteration; their results join ``tables``. Collective."""
        self._ring(super().finish)

    def save(self) -> None:
        """Write a checkpoint of the last commit now, and wait until it is published. Collective.

        Beside those that are written when they are due. Raises `OutputError` if it cannot be written.
        """
        self._ring(super().save)

    def enduring(self, work: Callable[[], T]) -> T:
        """``work()``, all of it on the same ranks: it is done again where some die. Collective."""
        return self._ring(work)

    def _ring(self, work: Callable[[], T]) -> T:
        if not self._endures:
            try:
                return work()
            except BaseException as error:
                raise self._with_commit(error) from error.__cause__

        def again(loss: Loss) -> None:
            self._renew(loss)
            self._go_on()

        def on_these_ranks() -> T:
            self._keep_up()
            return work()

        return enduring(self.group, on_these_ranks, again, self)

    def _keep_up(self) -> None:
        """Ranks may have died in a deed that was not this run's. Collective."""
        if self._made_in != self.group.epoch:
            self._renew(Loss((), 0.0))
            self._go_on()

    def _make(self) -> None:
        self._made_in = self.group.epoch
        super()._make()

    def _with_commit(self, error: BaseException) -> BaseException:
        """The error to raise: where ranks of a caller's communicator died, with the last commit."""
        if self.group.heals or not self.group.is_loss(error):
            return error
        try:
            self.group.heal(error)
        except RanksLost as lost:
            if self._started:
                lost.position, lost.tables = self.position, dict(self.tables)
            return lost
        return error

    # ------------------------------------------------------------------ how it goes on

    def _begin_run(self, held: Any = None) -> None:
        if self._taken_over is not None and held is None:
            held, self._taken_over = self._taken_over.newest(), None
            self._give_inputs(())
        began = time.perf_counter()
        told = self._inherited() if self._ran and held is None else None
        if told is not None and told["held"]:
            held = self.copies.newest() if self.copies is not None else None
        if told is not None and held is not None:  # a state made of rows that were read before
            versions = told["versions"]
            self.loader.kept = {id(s): Kept(versions[at]) for at, s in self._sources() if at in versions}
        self.inherits = told is not None and held is not None
        self._keep_inputs()
        super().start(held)
        if self.copies is not None:
            self.copies.begin()
        self._first = self.iteration
        if told is not None:
            self._note_refilled(told, held is not None, time.perf_counter() - began)

    def leave(self) -> None:
        """What is needed to go on, should the program begin again; or it does so now. Local."""
        held = self.copies.held if self.copies is not None else []
        had = self.loader.resident(self.root) if self._resident is None else self._resident
        versions = {at: had[id(source)].token for at, source in self._sources() if id(source) in had}
        left = Legacy(self._name, self.commits, held, self.recoveries, versions)
        deeds = deeds_of(self.group)
        if deeds.program is self._program:
            deeds.leaves = left
            return
        deeds.legacy = left
        if self.lasting is not None:
            self.lasting.checkpoints.forsake()

    def _sources(self) -> Iterator[tuple[Place, Any]]:
        """All sources of all levels, and those of loops that are sources."""
        for level in self.root.all():
            for name, source in level.loop.sources.items():
                for number, opened in enumerate(opened_first([source])):
                    yield (level.label, name, number), opened

    @property
    def _name(self) -> list[Any]:
        told = json.dumps([described(self.written), self.shop.partitions.partitions], sort_keys=True)
        return [self._number, hashlib.sha256(told.encode()).hexdigest()]

    def _inherited(self) -> dict[str, Any] | None:
        """What a run like this was before new ranks came: it goes on with its copies. Collective."""
        found = inherited(self.group, self._name)
        if found is None:
            return None
        if self.copies is not None:
            self.copies.held = found.pop("mine")
        self.recoveries = found.pop("recoveries")
        return found

    def _note_refilled(self, told: Mapping[str, Any], held: bool, seconds: float) -> None:
        refilled = self.group.refilled
        assert refilled is not None
        joined = len(refilled.lost)
        self.tell("rank.lost", lost=refilled.lost, survivors=self.group.size - joined)
        self.tell("recovery.start", lost=refilled.lost, commits=told["commits"])
        parts = {"shrink": refilled.seconds, "load": self.clock.load, "prepare": self.clock.invariants}
        parts["restore"] = max(0.0, seconds - parts["load"] - parts["prepare"])
        parts["total"] = refilled.seconds + seconds
        self._note(refilled.lost, held, told["commits"], parts, self._read_again(), joined)

    def _advance_to(self, at: int) -> Position | Outcome:
        """Iterate until so many transactions are committed. Collective."""
        if self._made_in != self.group.epoch:
            self._keep_up()
        while True:
            if self._started and self.commits >= at and not (self.lasting and self.lasting.replays):
                return self.outcome or self.position
            found = super().advance(
                self._fed_again(self.commits + 1) if self._started else self._feeds.get(at)
            )
            if self.commits >= at or isinstance(found, Outcome):
                return found

    def _fed_again(self, commit: int) -> Mapping[str, Any] | None:
        if self.wants and commit <= self.returned and commit not in self._feeds:
            raise RanksLost(
                (), self.group.size, reason=f"the rows that were fed to iteration {commit} are gone"
            )
        return self._feeds.get(commit)

    def _go_on(self) -> None:
        """As far as the caller has seen it come. Collective."""
        if self.commits < self.returned and self.outcome is None:
            self._advance_to(self.returned)

    def _renew(self, loss: Loss) -> None:
        """Make all that belongs to the ranks anew, and take up what lasts. Collective."""
        lost, began, committed = loss.lost, time.perf_counter(), self.commits
        self.tell("rank.lost", lost=lost, survivors=self.group.size)
        self.tell("recovery.start", lost=lost, commits=committed)
        if self.lasting is not None:
            self.lasting.checkpoints.forsake()
        if self.pool is not current():
            self.pool.close()
        held = self.copies.newest() if self.copies is not None else None
        self._give_inputs(lost)
        load, invariants = self.clock.load, self.clock.invariants
        self.bytes_read, self.loader.bytes_read = self.bytes_read + self.loader.bytes_read, 0
        started = time.perf_counter()
        if self._resident is None:
            self._resident = self.loader.resident(self.root)
        self._make()
        self.loader.kept, self._resident = self._resident, None
        with self.working():
            driver.LoopRun.start(self, held)
        made = time.perf_counter() - started
        self._forget_undone()
        self._keep_inputs()
        if self.copies is not None and self.commits:
            with self.working():
                self.copies.make()
        seconds = {"shrink": loss.seconds, "load": self.clock.load - load}
        seconds["prepare"] = self.clock.invariants - invariants
        seconds["restore"] = made - seconds["load"] - seconds["prepare"]
        seconds["total"] = loss.seconds + time.perf_counter() - began
        read = self._read_again()
        self._note(lost, held is not None, committed, seconds, read)

    def _forget_undone(self) -> None:
        """Of iterations that are done again only the last time counts."""
        done = max(0, self.iteration - self._first)
        del self.clock.iterations[done:], self.bytes_iterations[done:]

    def _read_again(self) -> dict[str, int]:
        """What all survivors have read of the sources to go on. Collective."""
        rows = self.loader.rows
        numbers = np.array([rows.kept, rows.read, self.loader.bytes_read])
        self.group.allreduce(numbers, "sum")
        return dict(zip(("rows_kept", "rows", "bytes"), numbers.tolist(), strict=True))

    def _note(
        self,
        lost: tuple[int, ...],
        held: bool,
        committed: int,
        seconds: dict[str, float],
        read: dict[str, int],
        joined: int = 0,
    ) -> None:
        record = {
            "lost": list(lost),
            "survivors": self.group.size - joined,
            "origin": "memory" if held else "checkpoint" if self.commits else "start",
            "iteration": self.iteration,
            "recomputed": max(0, committed - self.commits),
            "seconds": seconds,
            "read": read,
        }
        if joined:
            record["joined"] = joined
        self.recoveries.append(record)
        self.tell("recovery.end", **record)

    # ------------------------------------------------------------------ copies

    def _captured(self) -> tuple[int, Any]:
        return self.commits, captured_run(self)

    def _has_room(self, nbytes: int) -> bool:
        return self.options.memory_bytes is None or room_for(self.memory(), nbytes)

    def _locals(self) -> dict[str, LocalSource]:
        """Rows that the ranks were given, by names that are the same on all of them."""
        found: dict[int, LocalSource] = {}
        for level in self.root.all():
            for source in level.loop.sources.values():
                found |= {id(local): local for local in locals_of(source)}
        return {str(number): local for number, local in enumerate(found.values())}

    def _keep_inputs(self) -> None:
        """Copy such rows to where they are found when this rank is lost. Collective."""
        if self.copies is not None:
            with self.working():
                self.copies.keep_inputs({name: local.rows for name, local in self._locals().items()})

    def _give_inputs(self, lost: tuple[int, ...]) -> None:
        """Deal them out to the survivors: each keeps its own, and takes those of the dead behind it.
        Collective.
        """
        inputs = self._locals()
        if all(local.is_whole for local in inputs.values()):
            return
        held = whole(self.group, self.copies.inputs) if self.copies is not None else None
        if held is None:
            if self.lasting is not None and all(local.save for local in inputs.values()):
                return  # the run takes them from its directory
            raise RanksLost(lost, self.group.size, reason="rows that only they had were not copied")
        first, last = held.share()
        for name, local in inputs.items():
            lo, hi = held.tables[name].written_by(first, last)
            held.bring(self.group, name, lo, hi)
            local.give(held.read(name, lo, hi))


def remembered(run: LoopRun) -> Copies | None:
    """What a run that has ended leaves to one that is to be like it. Local."""
    if run.copies is not None:
        run.copies.rest()
    return run.copies


__all__ = ["Again", "LoopRun", "Loss", "Remembered", "enduring", "remembered", "told"]
