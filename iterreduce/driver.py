"""The driver: runs iterations as transactions, and asks whether the fixpoint is reached.

    start      sources are read, prepare stages run, states take their initial rows
    advance    one iteration: supersteps, one control reduction, commit or roll back, outcome
    finish     stages that read the final state

A loop inside a body makes a tree of levels (`iterreduce.levels`). `advance` then runs one iteration of the
innermost loop that is open, with the supersteps that stand before it; or, behind the last of an outer body's
loops, the supersteps that are left and that loop's own stopping rules. Each such step is a transaction; an
outer iteration that holds loops is several of them.

The driver follows no master: every rank runs it, and what it decides follows from gathered words alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from iterreduce import fixpoint
from iterreduce.accounting import account, audit, invariant_bytes, is_audited
from iterreduce.agreement import Caught, Guard, caught, raise_agreed
from iterreduce.capture import Saved
from iterreduce.carrying import initial_numbers
from iterreduce.collectives import Group, group_for
from iterreduce.columns.threads import current
from iterreduce.control import Control, Heard, ask_conditions
from iterreduce.copies import Copies
from iterreduce.cores import pool_for
from iterreduce.errors import IterReduceError, UsageError
from iterreduce.events import Events, emit_iteration, emit_place
from iterreduce.exchange import FAILED, OK
from iterreduce.fixpoint import Outcome
from iterreduce.lasting import Lasting, restore
from iterreduce.levels import (
    Level,
    Position,
    Standing,
    Whereabouts,
    initials,
    refuse_unbuilt,
    sinks_of,
    values_of,
    workshop_of,
)
from iterreduce.loading import Clock, Loader, check_given
from iterreduce.loop import Loop
from iterreduce.maps import refuse_in_user_code
from iterreduce.memory import Accounts
from iterreduce.options import Options
from iterreduce.plain import Plain
from iterreduce.reproducible import reproducible
from iterreduce.scratch import placement_for
from iterreduce.stopping import StopRequest
from iterreduce.superstep import SuperstepRun
from iterreduce.table import Table
from iterreduce.transaction import Transaction

__all__ = ["LoopRun", "Position"]


class LoopRun(Whereabouts):
    """One run of a loop on its ranks. `advance` until it returns an `Outcome`, then read ``tables``.

    >>> import numpy as np, iterreduce as ir
    >>> double = ir.Local(lambda s: s.with_columns(x=2 * s["x"]), ("s",), "twice", cut="share")
    >>> step = ir.Superstep("step", (double,), (ir.Replace("s", "twice"),))
    >>> start = {"start": ir.Batch(x=np.array([1.0]))}
    >>> loop = ir.Loop("double", start, {"s": ir.State("start")}, (step,), ir.Until.of([], 3), "s")
    >>> run = LoopRun(loop)
    >>> while not isinstance(position := run.advance(), ir.Outcome):
    ...     print(position.iteration, run.tables["s"].batch["x"])
    1 [2.]
    2 [4.]
    >>> position, run.tables["s"].batch["x"].tolist()
    (<Outcome.ITERATIONS_USED: 'iterations used'>, [8.0])
    """

    def __init__(
        self,
        loop: Loop,
        comm: Any = None,
        options: Options | None = None,
        events: Events | None = None,
        stop: StopRequest | None = None,
    ):
        """On a `Group`, or on the ranks of a communicator (None: this rank alone)."""
        self.group: Group = group_for(comm)
        group = self.group
        refuse_in_user_code(f'the loop "{loop.name}"', group.size)
        refuse_unbuilt(loop)
        self.options, self.events = options or Options(), events or Events()
        self.written, self.loop = loop, reproducible(loop) if self.options.reproducible else loop
        self._stop = stop
        self.clock = Clock()
        self.bytes_invariants = self.invariant_bytes = 0  # sent for them; held, where somebody watches
        self.bytes_iterations: list[int] = []
        self.bytes_read = 0  # of sources, by what was made before
        self.returned = 0  # positions that the caller of `advance` has
        self.copies: Copies | None = None
        self.lasting: Lasting | None = None
        self._make()

    def _make(self) -> None:
        """All that belongs to the ranks as they are now: made anew where some were lost. Collective."""
        loop, group = self.loop, self.group
        self.commits = 0  # transactions so far
        self.pool = pool_for(group, self.options.threads)
        self.place = placement_for(group, self.options)
        self._on_pool = self.working()
        self.shop = workshop_of(loop, group, self.options, self.events)
        self.root = Level(loop, None, self.shop, self.options.naive, itertools.count())
        self.root.standing = Standing({}, {}, initial_numbers(loop.carry))
        self.level = self.root  # the innermost loop that is open
        self.outcomes: dict[str, Outcome] = {}  # of inner loops, at their last end
        self.inner_values: dict[str, float | int] = {}
        self.outputs: dict[str, list[Table]] = {name: [] for name in sinks_of(loop)}
        self.loader = Loader(group, self.options, self.shop, self.tell, self._run_source)
        self._controls = [Control(level, group, self.options.check) for level in self.root.all()]
        self._started = False
        self._late: Caught | None = None
        self._now = Transaction()
        self._open: Transaction | Plain = self._now  # what was begun last
        self._fed = any(level.loop.feeds for level in self.root.all())
        self._plain = Plain(self, self.root, self._controls[0]) if self.root.plain else None
        self._seconds, self._sent = 0.0, 0  # of the outermost iteration under way
        if self.options.checkpoint_dir:
            self.lasting = Lasting(self, self.written, self._stop, self.lasting)

    # ------------------------------------------------------------------ start

    def start(self, held: Saved | None = None) -> None:
        """Load sources, prepare invariants, give states initial rows. Collective; `advance` calls it.

        ``held``: what is captured in memory, to go on from.
        """
        if self._started:
            return
        before = self.group.traffic.payload_bytes
        with self.working():
            if self.lasting is not None:
                self.lasting.open(held)
            self._start()
            if self.lasting is not None:
                self.lasting.take_up()
            elif held is not None:
                restore(self, held, self._guard("what is held in memory"))
        self._started = True
        self._audit("before the first iteration")
        if self.events.active:
            self.invariant_bytes = invariant_bytes(self.memory())
        self.bytes_invariants = self.group.traffic.payload_bytes - before

    def _start(self) -> None:
        for level in self.root.all():
            if level.parent is not None:
                around = level.parent.constants
                level.constants = {n: around[n] for n in level.loop.outer if n in around}
            self._prepare(level, level.constants, self._guard)
            self.loader.drop(level, level.constants, kept=initials(level.loop))
        bindings = dict(self.root.constants)
        self.loader.initial_once(self.root, bindings)
        self.loader.done(self.root, bindings)
        self.root.standing = self.root.entered(bindings)
        with self.clock.preparing():
            self.shop.make_ready(self.root.standing.bindings, Guard(self.group.rank, 0))

    def _prepare(self, level: Level, tables: dict[str, Table], guard: Callable[[], Guard]) -> None:
        """Sources, and the prepare stages that read nothing that changes. Collective."""
        started = time.perf_counter()
        self.loader.sources(level, tables)
        loaded = time.perf_counter()
        self.loader.run_once(level, level.once, tables, "prepare", guard)
        prepared = time.perf_counter()
        streaming = self.loader.end_streams()
        self.clock.load += loaded - started + streaming
        self.clock.invariants += prepared - loaded - streaming

    def memory(self) -> Accounts:
        """What this rank holds now, by name."""
        saved = self.lasting.checkpoints.copies if self.lasting is not None else None
        return account(self.root, self.shop, self.options.memory_bytes, saved, self.copies, self)

    def _audit(self, where: str) -> None:
        """With a budget: plans get what is left of it, and a rank over it says so at the next collective."""
        if self.options.memory_bytes is not None and self.place is None:
            guard = self._guard("memory")
            guard.run(lambda: audit(self.memory(), self.shop, f'the loop "{self.loop.name}", {where}'))
            self._late = guard.failure

    def _run_source(self, loop: Loop) -> dict[str, Table]:
        """The result of a loop that is a source of this one, "", and what it gives beside. Collective."""
        alike = replace(loop, partitions=self.loop.partitions)  # its result may be shuffled onto
        options = replace(self.options, naive=False, checkpoint_dir=None)
        inner = LoopRun(alike, self.group, options, self.events)
        inner.loader.share_with(self.loader)
        inner.run()
        inner.finish()
        self.loader.bytes_read += inner.loader.bytes_read
        tables = inner.let_go()
        return {name: tables[table] for name, table in {"": loop.result, **loop.gives}.items()}

    # ------------------------------------------------------------------ iterate

    def advance(self, feed: Mapping[str, Any] | None = None) -> Position | Outcome:
        """Run one iteration: of the innermost loop, where there are loops in the body. Collective.

        ``feed`` gives rows to the feeds that ``wants`` names. Returns the new `Position`, or the `Outcome` if
        the loop ended with it. If anything fails, on any rank, the iteration is rolled back and the same
        error is raised on all; ``tables`` are those of the last commit.
        """
        root, begins = self.root, not self._started
        if begins:
            self.start()
        ended = self.outcome
        if self.lasting is not None and self.lasting.replays and ended is not Outcome.STOPPED_SAVED:
            return self.lasting.replay()
        if ended is not None:
            if begins:  # told to stop before anything was done
                return ended
            raise UsageError(f"the loop has ended ({ended.value}); make a new LoopRun to run it again")
        if self._plain is not None and not feed:
            return self._plain.advance()
        traffic, started = self.group.traffic, time.perf_counter()
        sent = traffic.payload_bytes
        try:
            with self._on_pool:
                level, heard = self._iterate(feed)
        except BaseException as error:
            self._leave(error)
            raise
        self._commit(level, heard, time.perf_counter() - started, traffic.payload_bytes - sent)
        standing = root.standing
        assert standing is not None
        return standing.outcome if standing.outcome is not None else self.position

    def _leave(self, error: BaseException) -> None:
        """The iteration has failed, with the same error on all ranks. Collective."""
        self._roll_back(error)
        if self.lasting is not None and isinstance(error, IterReduceError) and error.agreed:
            self.lasting.settle()

    def _iterate(self, feed: Mapping[str, Any] | None) -> tuple[Level, Heard]:
        """Go on to the end of an iteration, on whichever level it ends; returns that level. Collective."""
        level = self.level
        self._now = self._open = now = Transaction()
        draft = now.draft(level)
        guard = self._guard()
        if feed or self._fed:
            guard.stage = "feeds"
            guard.run(check_given, self.wants, feed)
        if draft.outcome is not None:
            level, draft = self._climb(level, draft, guard)
        while True:
            if draft.at == 0:
                self._begin(level, draft, feed or {}, guard)
            while draft.at < len(level.steps):
                step = level.steps[draft.at]
                if isinstance(step, Level):
                    level, draft = self._enter(step, draft, guard)
                    break
                if draft.runs >> draft.at & 1:
                    self._run_step(level, draft, step, guard)
                draft.at += 1
            else:
                return level, self._reduce_control(level, draft, guard)

    def _begin(self, level: Level, draft: Standing, feed: Mapping[str, Any], guard: Guard) -> None:
        """An iteration of this level begins: feeds, and which supersteps run. Collective."""
        path = self._now.aim(guard, level, draft)
        draft.before = level.standing.bindings if level.standing is not None else draft.bindings.copy()
        if self.events.active:
            guard.stage = "start of the iteration"
            guard.run(emit_iteration, self.events, draft.iteration + 1, path)
        if not level.asks:
            return
        if self.options.naive and (draft.iteration or level.parent is not None):
            self._prepare_again(level, draft, guard)
        if level.loop.feeds:
            draft.bindings.update(self.loader.feeds(level, draft.iteration + 1, path, feed, guard))
        if level.conditions:
            numbers = {name: n for s in self._now.standings(level) for name, n in s.carry.items()}
            draft.runs = ask_conditions(self.group, level, numbers, guard)

    def _prepare_again(self, level: Level, draft: Standing, guard: Guard) -> None:
        """Without caches: read and prepare anew. Collective."""
        self._prepare(level, draft.bindings, lambda: guard)
        self.loader.drop(level, draft.bindings, kept=initials(level.loop) if level.parent else ())
        if level.prepare is not None and draft.iteration:
            self._now.ran.append(level.prepare)
            draft.bindings.update(level.prepare.results(draft.bindings, guard))

    def _run_step(self, level: Level, draft: Standing, step: SuperstepRun, guard: Guard) -> None:
        self._now.ran.append(step)
        draft.bindings.update(step.run(draft.bindings, guard))
        if step.sinks or step.accumulates:
            guard.run(self._now.collect, level, step, self.outputs, self.group.rank)

    def _enter(self, level: Level, around: Standing, guard: Guard) -> tuple[Level, Standing]:
        """A loop of the body begins: its tables, what it prepares of them, its states. Collective."""
        guard.stage = f'"{level.label}" begins'
        bindings = {n: around.bindings[n] for n in level.loop.outer if n in around.bindings}
        bindings.update({n: t for n, t in level.constants.items() if n not in bindings})
        if level.prepare is not None:
            self._now.ran.append(level.prepare)
            bindings = level.prepare.results(bindings, guard)
        self._now.ran += level.starts.values()
        self.loader.initial(level, bindings, guard)
        draft = level.entered(bindings)
        self._now.drafts.append((level, draft))
        return level, draft

    def _climb(self, level: Level, draft: Standing, guard: Guard) -> tuple[Level, Standing]:
        """A loop of the body has ended: bind its result in the loop around it. Collective."""
        parent = level.parent
        assert parent is not None
        around = self._now.draft(parent)
        self._now.aim(guard, parent, around)
        if level.ending is not None:
            self._now.ran.append(level.ending)
            draft.bindings = level.ending.results(draft.bindings, guard)
        guard.stage = f'"{level.label}" ends'
        self._now.values = guard.run(values_of, level, draft) or {}
        if level.loop.result in draft.bindings:  # else a rank failed on the way, and all learn it soon
            around.bindings[level.loop.name] = draft.bindings[level.loop.result]
            around.bindings |= {name: draft.bindings[table] for name, table in level.loop.gives.items()}
        around.at += 1
        self._now.drafts[0] = (level, None)
        return parent, around

    def _reduce_control(self, level: Level, draft: Standing, guard: Guard) -> Heard:
        """Status, wishes and stopping rules of all ranks, in one collective. Collective."""
        if self.loader.frozen:
            guard.stage = "check of arrays"
            guard.run(self.loader.check_frozen)
        guard.stage = level.testing
        found = guard.run(
            fixpoint.partials, level.loop.until, draft.before, draft.bindings, self.group.rank, level.in_place
        )
        if self.events.places:
            guard.run(emit_place, self.events, "control.ready", draft.iteration + 1, guard.path)
        status = OK if guard.failure is None else FAILED
        if self.lasting is not None:
            status |= self.lasting.says()
        if self.copies is not None:
            status |= self.copies.says(self.commits)
        cache = self.shop.cache
        wish = 0 if cache.budget_bytes is None else cache.wish()
        heard = self._controls[level.number].run(
            draft.iteration + 1, status, wish, self._now.changed(), found
        )
        if heard.status & FAILED:
            raise_agreed(self.group, guard.failure)
        if self.events.places:
            self.tell("commit.start", iteration=draft.iteration + 1, path=guard.path)
        return heard

    # ------------------------------------------------------------------ commit and roll back

    def _commit(self, level: Level, heard: Heard, seconds: float, sent: int) -> None:
        now, control = self._now, self._controls[level.number]
        now.commit(heard, level)
        self.commits += 1
        self.level, standing = level, level.standing
        assert standing is not None
        standing.iteration, standing.at = standing.iteration + 1, 0
        if control.carries:
            control.commit_carry(standing)
        for output, rows in now.sunk:
            self.outputs[output].append(rows)
        self.inner_values.update(now.values)
        if heard.wishes:
            self._evict_agreed(heard)
        standing.outcome, standing.residual = control.verdict(standing)
        self._count(level, seconds, sent)
        if self.events.active:
            self.tell_commit(standing, self.path, seconds, sent)
        if level.parent is not None and standing.outcome is not None:
            self._end_inner(level, standing)
        if self.lasting is not None:
            self.lasting.after(heard.status, seconds)
        if self.copies is not None:
            self.copies.after(heard.status)

    def tell_commit(self, at: Standing, path: tuple[int, ...], seconds: float, sent: int) -> None:
        """Tell that an iteration stands; as `tell` does."""
        if self._late is None:
            try:
                self.events.emit(
                    "iteration.commit",
                    iteration=at.iteration,
                    residual=at.residual,
                    seconds=seconds,
                    bytes=sent,
                    invariant_bytes=self.shop.cache.nbytes + self.invariant_bytes,
                    path=path,
                )
            except BaseException as error:
                self._late = caught(error, "iteration.commit", self.iteration, self.group.rank, self.path)

    def _count(self, level: Level, seconds: float, sent: int) -> None:
        """Time and bytes, by iteration of the outermost loop."""
        clock = self.clock
        clock.iterate += seconds
        if level.parent is not None:
            self._seconds, self._sent = self._seconds + seconds, self._sent + sent
            return
        if self._seconds:
            seconds, sent = self._seconds + seconds, self._sent + sent
            self._seconds, self._sent = 0.0, 0
        clock.iterations.append(seconds)
        self.bytes_iterations.append(sent)
        if self.options.memory_bytes is not None:
            standing = level.standing
            assert standing is not None
            if is_audited(standing.iteration) and standing.outcome is None:
                self._audit(f"after iteration {standing.iteration}")

    def _end_inner(self, level: Level, standing: Standing) -> None:
        assert standing.outcome is not None
        self.outcomes[level.loop.name] = standing.outcome
        if self.events.active:
            self.tell(
                "loop.end",
                name=level.label,
                path=self.path,
                outcome=standing.outcome.name,
                iterations=standing.iteration,
                residual=standing.residual,
            )

    def _evict_agreed(self, heard: Heard) -> None:
        for wish in dict.fromkeys(heard.wishes):
            name = self.shop.cache.evict(wish)
            if name and self.events.active:
                self.tell("cache.evict", what=name, bytes=self.shop.cache.nbytes)

    def _roll_back(self, error: BaseException) -> None:
        self._open.roll_back()
        for level in self.root.all():
            level.gains = {}
        if self.events.active:
            path = (*self.path[:-1], self.path[-1] + 1)
            self.tell("iteration.rollback", iteration=path[-1], reason=type(error).__name__, path=path)

    def tell(self, name: str, /, **fields: Any) -> None:
        """Emit an event between collectives: if a watcher raises, all ranks learn it at the next one."""
        if self._late is None:
            try:
                self.events.emit(name, **fields)
            except BaseException as error:
                self._late = caught(error, name, self.iteration, self.group.rank, self.path)

    def _guard(self, stage: str = "") -> Guard:
        """A guard for what comes now, with what failed since the last collective."""
        guard = Guard(self.group.rank, self.iteration, self.path)
        guard.stage, guard.failure, self._late = stage, self._late, None
        return guard

    # ------------------------------------------------------------------ to the end

    def run(self) -> Outcome:
        """Iterate until a stopping rule holds. Collective."""
        self.start()
        if self.lasting is not None:
            self.lasting.skip_replays()
        while self.outcome is None:
            self.advance()
        return self.outcome

    def finish(self) -> None:
        """Run the stages that follow the last iteration; their results join ``tables``. Collective."""
        with self.working():
            self.loader.run_once(self.root, self.loop.finish, self.tables, "finish", self._guard)
        self.settle()
        self.group.drop_shared()

    def close(self) -> None:
        """End the run's threads; it can go on without them."""
        if self.pool is not current():  # a run within a run works on that one's threads
            self.pool.close()
        if self.lasting is not None:
            self.lasting.ended()

    def save(self) -> None:
        """Write a checkpoint of the last commit now, and wait until it is published. Collective.

        Beside those that are written when they are due. Raises `OutputError` if it cannot be written.
        """
        if self.lasting is None:
            raise UsageError("there is no directory to save in: give Options(checkpoint_dir=...)")
        self.start()
        self.lasting.save()

    def settle(self) -> None:
        """Raise on all ranks what a watcher raised on one since the last collective. Collective."""
        self.loader.leave_if_failed(self._guard())
