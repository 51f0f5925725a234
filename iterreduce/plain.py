"""Iterations of a body of supersteps that all run, without levels around or inside: one flat function.

Nothing has to be asked, entered or collected there, and no draft is needed but of tables. With a thousand
rows an iteration is the calls around them, so what never varies is looked up once, and the parts that the
general driver has for itself (begin, supersteps, control reduction, commit) follow each other here without
calls. The collectives are those of the general driver, in the same order.

Who speaks to it: the driver, which keeps everything that is rare: roll back, eviction, what is saved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from iterreduce import fixpoint
from iterreduce.agreement import Guard, raise_agreed
from iterreduce.control import LAST_BIT, Control, Heard
from iterreduce.events import emit_iteration, emit_place
from iterreduce.exchange import FAILED, OK
from iterreduce.fixpoint import Outcome
from iterreduce.levels import Level, Position
from iterreduce.table import Table
from iterreduce.transaction import renamed

_now, _position = time.perf_counter, tuple.__new__  # Position(...) itself costs twice as much


class Plain:
    """The transactions of such a body. ``run``: its `LoopRun`."""

    sunk: tuple[tuple[str, Table], ...] = ()
    values: Mapping[str, float | int] = MappingProxyType({})

    def __init__(self, run: Any, level: Level, control: Control):
        self.run, self.level, self.control = run, level, control
        self.group, self.events, self.loader, self.cache = run.group, run.events, run.loader, run.shop.cache
        self.traffic, self.rank, self.steps = run.group.traffic, run.group.rank, level.supersteps
        works = [item for step in level.supersteps for item in step.works.items()]
        self.works = [(number, 1 << min(number, LAST_BIT), work) for number, work in works]
        self.states = list(level.shop.states.items())
        self.bindings: dict[str, Table] = {}  # as they will stand

    def advance(self) -> Position | Outcome:
        """One iteration. Collective."""
        started, run, level, traffic = _now(), self.run, self.level, self.traffic
        sent, standing = traffic.payload_bytes, level.standing
        assert standing is not None
        before, iteration = standing.bindings, standing.iteration + 1
        path, run._open = (iteration,), self
        try:
            with run._on_pool:
                heard = self._iterate(before, iteration, path)
        except BaseException as error:
            run._leave(error)
            raise
        seconds, sent = _now() - started, traffic.payload_bytes - sent
        if self.works:
            self._commit(heard)
        run.commits += 1
        standing.iteration, standing.before, standing.bindings = iteration, before, self.bindings
        if heard.wishes:
            run._evict_agreed(heard)
        standing.outcome, standing.residual = outcome, residual = self.control.verdict(standing)
        run._count(level, seconds, sent)
        if self.events.active:
            run.tell_commit(standing, path, seconds, sent)
        if run.lasting is not None:
            run.lasting.after(heard.status, seconds)
            outcome = standing.outcome
        if run.copies is not None:
            run.copies.after(heard.status)
        return _position(Position, (iteration, residual, path, level.names)) if outcome is None else outcome

    def _iterate(self, before: dict[str, Table], iteration: int, path: tuple[int, ...]) -> Heard:
        """All up to the commit. Collective."""
        run, events, bindings, level = self.run, self.events, before, self.level
        guard = Guard(self.rank, iteration, path)
        guard.failure, run._late = run._late, None
        if events.active:
            guard.stage = "start of the iteration"
            guard.run(emit_iteration, events, iteration, path)
        for step in self.steps:
            bindings = {**bindings, **step.run(bindings, guard)}
        self.bindings, found = bindings, None
        if self.loader.frozen:
            guard.stage = "check of arrays"
            guard.run(self.loader.check_frozen)
        if guard.failure is None:
            guard.stage = level.testing
            try:
                found = fixpoint.partials(level.loop.until, before, bindings, self.rank, level.in_place)
                if events.places:
                    emit_place(events, "control.ready", iteration, path)
            except BaseException as error:  # as in `Guard.run`
                guard.fail(error)
        status, changed = OK if guard.failure is None else FAILED, 0
        if run.lasting is not None:
            status |= run.lasting.says()
        if run.copies is not None:
            status |= run.copies.says(run.commits)
        wish = 0 if self.cache.budget_bytes is None else self.cache.wish()
        for _, bit, work in self.works:
            if work.keys_changed:
                changed |= bit
        heard = self.control.run(iteration, status, wish, changed, found)
        if heard.status & FAILED:
            raise_agreed(self.group, guard.failure)
        if events.places:
            run.tell("commit.start", iteration=iteration, path=path)
        return heard

    def _commit(self, heard: Heard) -> None:
        """Plans that were made take effect. Collective."""
        renames, bindings, changed = dict[int, int](), self.bindings, heard.changed
        for number, _, work in self.works:
            made = work.commit(changed != 0 and heard.said_changed(number))
            if made:
                renames.update(made)
        if renames:
            standing = self.level.standing
            assert standing is not None
            known = {id(t) for t in (*standing.bindings.values(), *self.level.constants.values())}
            bindings.update({n: renamed(t, renames) for n, t in bindings.items() if id(t) not in known})
        for name, state in self.states:
            bindings[name] = state.settled(bindings[name])

    def roll_back(self) -> None:
        """It never was."""
        for _, _, work in self.works:
            work.rollback()
