"""The driver: loads what is invariant, runs iterations as transactions, and asks whether the fixpoint is
reached.

    start      sources are read, prepare stages run, states take their initial rows
    advance    one iteration: supersteps, one control reduction, commit or roll back, outcome
    finish     stages that read the final state

It follows no master: every rank runs it, and what it decides follows from gathered words alone. The control
reduction is one Allgather of a few words per rank: status, wishes, and the stopping rules' partials, which
every rank folds in rank order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from iterreduce import fixpoint
from iterreduce.agreement import Caught, Guard, raise_agreed
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.numbering import number_keys
from iterreduce.columns.partition import PARTITIONS, PartitionMap
from iterreduce.errors import UsageError
from iterreduce.events import Events
from iterreduce.exchange import FAILED, check_headers
from iterreduce.fixpoint import MaxIterations, Outcome
from iterreduce.indexing import LinkTable
from iterreduce.inplace import IN_PLACE, KeyedState, keyed_states
from iterreduce.laid import laid_out
from iterreduce.loop import (
    Bounded,
    Local,
    Loop,
    Replace,
    Shuffle,
    Stage,
    State,
    Superstep,
    indexes_of,
    makes,
    reads_of,
    supersteps_of,
)  # fmt: skip
from iterreduce.loop_cache import LoopCache
from iterreduce.maps import refuse_in_user_code
from iterreduce.options import Options
from iterreduce.rowshuffle import RowShuffle
from iterreduce.shuffle import CombineShuffle
from iterreduce.sources.blocks import Loaded, Source, load
from iterreduce.sources.local import LocalSource
from iterreduce.superstep import SuperstepRun, Workshop
from iterreduce.table import BY_BLOCK, NO_TOKENS, Table, by_key, column_tokens, everywhere, token
from iterreduce.uncombined import WithFallback

CONTROL_WORDS = 4  # stage and sequence, status, token to evict, stages whose result keys changed (bits)
STAGE, STATUS, EVICT, CHANGED = range(CONTROL_WORDS)
LAST_BIT = 61


@dataclass(frozen=True)
class Position:
    """Where a loop stands: iterations committed, and the distance at the last one (None: none asked)."""

    iteration: int
    residual: float | None = None


@dataclass
class Clock:
    """Seconds by phase, and of every iteration, on this rank."""

    load: float = 0.0
    invariants: float = 0.0
    iterate: float = 0.0
    iterations: list[float] = field(default_factory=list)


class LoopRun:
    """One run of a loop on a group. `advance` until it returns an `Outcome`, then read ``tables``."""

    def __init__(
        self, loop: Loop, group: Group, options: Options | None = None, events: Events | None = None
    ):
        refuse_in_user_code(f'the loop "{loop.name}"', group.size)
        refuse_unbuilt(loop)
        self.loop, self.group = loop, group
        self.options, self.events = options or Options(), events or Events()
        self.iteration = 0
        self.residual: float | None = None
        self.outcome: Outcome | None = None
        self.tables: dict[str, Table] = {}
        self.clock = Clock()
        self.bytes_invariants = 0
        self.bytes_iterations: list[int] = []
        self.loaded: dict[str, int] = {}
        naive = self.options.naive
        self.shop = Workshop(
            group,
            LoopCache(self.options.memory_bytes, enabled=not naive),
            PartitionMap(
                self.options.partitions if self.options.partitions != PARTITIONS else loop.partitions,
                group.size,
            ),
            self.events,
            self.options.check,
            self.options.memory_bytes,
            repeats=_may_repeat(loop),
            keep=not naive,
            indexes=indexes_of(loop),
        )
        self.prepare, self.body = hoisted(loop) if not naive else (loop.prepare, tuple(supersteps_of(loop)))
        self.shop.laid = laid_out(loop)
        self._supersteps = [SuperstepRun(step, self.shop) for step in self.body]
        self._watch_states()
        self.read: dict[int, tuple[Source, Loaded]] = {}  # an inner loop shares what was read, and adds to it
        self._frozen: dict[str, tuple[LocalSource, str]] = {}
        self._started = False
        self._late: Caught | None = None
        self._changed, self._wishes = 0, list[int]()
        # more stages than bits share the last one: a false alarm only makes a plan anew
        self._watched_keys = [
            (1 << min(i, LAST_BIT), x)
            for i, x in enumerate(self.shop.exchangers)
            if isinstance(x, CombineShuffle | RowShuffle | WithFallback | KeyedState)
        ]
        self._lay_out_control()

    def _watch_states(self) -> None:
        keys = {name: state.key for name, state in self.loop.state.items()}
        made = keyed_states(self.body, keys, self.shop.cache, self.shop.partitions, self.group.rank)
        self.shop.states.update(made)
        self.shop.exchangers += made.values()
        self._in_place = {name: state.changes for name, state in made.items()}

    def _lay_out_control(self) -> None:
        width = sum(r.width for r in self.loop.until.rules)
        self._send = np.zeros(CONTROL_WORDS + width, np.int64)
        self._recv = np.zeros(len(self._send) * self.group.size, np.int64)
        self._gathered = self._recv.reshape(self.group.size, -1)
        self._floats = self._gathered[:, CONTROL_WORDS:].view(np.float64)
        self._partials = self._send[CONTROL_WORDS:].view(np.float64)
        self._control = self.group.allgather_plan(self._send, self._recv, CONTROL_WORDS)

    # ------------------------------------------------------------------ start

    def start(self) -> None:
        """Load sources, prepare invariants, give states initial rows. Collective; `advance` calls it."""
        if self._started:
            return
        before = self.group.traffic.payload_bytes
        self._prepare(self.tables)
        for name, state in self.loop.state.items():
            self.tables[name] = self._initial(name, state)
        self._started = True
        self.bytes_invariants = self.group.traffic.payload_bytes - before

    def _prepare(self, tables: dict[str, Table]) -> None:
        started = time.perf_counter()
        for name, source in self.loop.sources.items():
            tables[name] = self._load(name, source)
        loaded = time.perf_counter()
        self._run_stages(self.prepare, tables, "prepare")
        self.clock.load += loaded - started
        self.clock.invariants += time.perf_counter() - loaded

    def _load(self, name: str, source: Any) -> Table:
        if isinstance(source, Batch):
            return everywhere(source, token("constant", self.loop.name, name))
        if isinstance(source, Loop):
            alike = replace(source, partitions=self.loop.partitions)  # its result may be shuffled onto
            inner = LoopRun(alike, self.group, replace(self.options, naive=False), self.events)
            inner.read = self.read
            inner.run()
            inner.finish()
            return self._numbered(_renewed(inner.tables[source.result], token("loop", self.loop.name, name)))
        return self._load_rows(name, source)

    def _numbered(self, table: Table) -> Table:
        """The table with its global row numbers, which rows by key lack (a sample needs them). Collective."""
        rows = np.zeros(self.group.size, np.int64)
        rows[self.group.rank] = len(table)
        self.group.allreduce(rows, "sum")
        if table.everywhere:
            return table
        return replace(table, first_row=int(rows[: self.group.rank].sum()), rows_total=int(rows.sum()))

    def _load_rows(self, name: str, source: Source) -> Table:
        started = time.perf_counter()
        known = self.read.get(id(source))
        if known is not None and not self.options.naive:
            got = known[1]
        else:
            source.open(self.group)
            got = load(self.group, source)
            self.read[id(source)] = source, got
            if self.options.check and isinstance(source, LocalSource):
                self._frozen[name] = source, source.fingerprint()
        of = token("source", name, source.token)
        tokens = column_tokens(of, got.batch) if not self.options.naive else NO_TOKENS
        self.loaded[name] = got.batch.nbytes
        self.tell(
            "load",
            name=name,
            rows=len(got.batch),
            bytes=got.batch.nbytes,
            seconds=time.perf_counter() - started,
        )
        return Table(got.batch, BY_BLOCK, tokens, got.block_starts, got.first_row, got.rows_total)

    def _run_stages(self, stages: tuple[Stage, ...], tables: dict[str, Table], what: str) -> None:
        """Stages that run once; their results are invariants."""
        if not stages:
            return
        once = replace(self.shop, repeats=False, keep=False, exchangers=[], stages=1 << 14)
        guard = self._guard(self.iteration)
        made = SuperstepRun(Superstep(what, stages), once, wanted_after(self.loop)).results(tables, guard)
        self._leave_if_failed(guard)
        for number, stage in enumerate(stages):
            for name in makes(stage):
                if name in made:
                    of = token(what, self.loop.name, number, name)
                    tables[name] = made[name] if self.options.naive else _renewed(made[name], of)

    def _leave_if_failed(self, guard: Guard) -> None:
        """Agree that all is well before going on. Collective."""
        if self.group.agree_any(guard.failure is not None):
            raise_agreed(self.group, guard.failure)

    def _initial(self, name: str, state: State) -> Table:
        if not state.initial:
            return Table(Batch(), by_key(*state.key) if state.key else BY_BLOCK)
        first = self.tables[state.initial]
        if not state.key:
            return first
        if first.layout == by_key(*state.key):  # they lie as they must, and keep their order
            return self._unique(name, state, first)
        guard = Guard(self.group.rank, 0)
        guard.stage = f'initial rows of "{name}"'
        share = guard.run(self._share_of_everywhere, first)
        self._leave_if_failed(guard)
        assert share is not None
        step = SuperstepRun(
            Superstep("start", (Shuffle("\0initial", state.key, "\0shuffled"),)),
            replace(self.shop, repeats=False, exchangers=[], stages=1 << 15),
        )
        made = step.results({"\0initial": share}, guard)
        self._leave_if_failed(guard)
        table = _renewed(made["\0shuffled"], token("state", self.loop.name, name))
        return self._unique(name, state, table)

    def _unique(self, name: str, state: State, table: Table) -> Table:
        """The table, whose keys must be unique. Collective."""
        guard = Guard(self.group.rank, 0)
        guard.stage = f'initial rows of "{name}"'
        guard.run(_check_unique, name, state, table)
        self._leave_if_failed(guard)
        return table

    def _share_of_everywhere(self, table: Table) -> Table:
        """Of rows that are everywhere each rank brings an equal part."""
        if not table.everywhere:
            return table
        n, rank, size = len(table), self.group.rank, self.group.size
        return Table(table.batch.slice(n * rank // size, n * (rank + 1) // size), BY_BLOCK)

    # ------------------------------------------------------------------ iterate

    def advance(self, feed: Mapping[str, Any] | None = None) -> Position | Outcome:
        """Run one iteration. Collective.

        Returns the new `Position`, or the `Outcome` if the loop ended with it. If anything fails, on any
        rank, the iteration is rolled back and the same error is raised on all; ``tables`` are those of the
        last commit.
        """
        if feed:
            raise UsageError(f"this loop declares no feeds, got {', '.join(feed)}")
        if self.outcome is not None:
            raise UsageError(f"the loop has ended ({self.outcome.value}); make a new LoopRun to run it again")
        self.start()
        started = time.perf_counter()
        sent = self.group.traffic.payload_bytes
        try:
            pending = self._iterate()
        except BaseException as error:
            self._roll_back(error)
            raise
        self._commit(pending, time.perf_counter() - started, self.group.traffic.payload_bytes - sent)
        return self.outcome if self.outcome is not None else Position(self.iteration, self.residual)

    def _iterate(self) -> dict[str, Table]:
        guard = self._guard(self.iteration + 1)
        if self.events.active:
            guard.stage = "start of the iteration"
            guard.run(emit_iteration, self.events, self.iteration + 1)
        tables = dict(self.tables)
        if self.options.naive and self.iteration:
            self._prepare(tables)
        pending: dict[str, Table] = {}
        for step in self._supersteps:
            written = step.run(tables, guard)
            tables.update(written)
            pending.update(written)
        if self._frozen:
            guard.stage = "check of arrays"
            guard.run(self._check_frozen)
        guard.stage = "fixpoint test"
        self._reduce_control(guard, tables)
        return pending

    def _check_frozen(self) -> None:
        """Arrays that were handed over with ``copy=False`` must not change while the run lasts."""
        for name, (source, before) in self._frozen.items():
            if source.fingerprint() != before:
                raise UsageError(
                    f'the arrays of "{name}" changed while the run was using them; do not write to what was '
                    "given to from_local(copy=False), or let it copy"
                )

    def _reduce_control(self, guard: Guard, tables: Mapping[str, Table]) -> None:
        """Status, wishes and stopping rules of all ranks, in one collective. Collective."""
        found = guard.run(
            fixpoint.partials, self.loop.until, self.tables, tables, self.group.rank, self._in_place
        )
        send = self._send
        send[STAGE] = self.iteration + 1
        send[STATUS] = guard.status
        send[EVICT] = self.shop.cache.wish()
        send[CHANGED] = 0
        for bit, work in self._watched_keys:
            if work.keys_changed:
                send[CHANGED] |= bit
        if found:
            self._partials[:] = found
        self._control.run()
        check_headers(self._gathered, self.options.check)
        status = self._changed = 0
        self._wishes = []
        for _, said, wish, bits in self._gathered[:, :CONTROL_WORDS].tolist():
            status |= said
            self._changed |= bits
            if wish:
                self._wishes.append(wish)
        if status & FAILED:
            raise_agreed(self.group, guard.failure)

    def _commit(self, pending: dict[str, Table], seconds: float, sent: int) -> None:
        changed = self._changed
        renames: dict[int, int] = {}
        for i, work in enumerate(self.shop.exchangers):
            renames.update(work.commit(bool(changed >> min(i, LAST_BIT) & 1)))
        self.tables.update({n: _renamed(t, renames) if renames else t for n, t in pending.items()})
        for name, state in self.shop.states.items():
            self.tables[name] = state.settled(self.tables[name])
        if self._wishes:
            self._evict_agreed()
        self.iteration += 1
        self.outcome, self.residual = fixpoint.verdict(self.loop.until, self._floats, self.iteration)
        self.clock.iterations.append(seconds)
        self.clock.iterate += seconds
        self.bytes_iterations.append(sent)
        if self.events.active:
            self.tell(
                "iteration.commit",
                iteration=self.iteration,
                residual=self.residual,
                seconds=seconds,
                bytes=sent,
                invariant_bytes=self.shop.cache.nbytes + sum(self.loaded.values()),
            )

    def _evict_agreed(self) -> None:
        for wish in dict.fromkeys(self._wishes):
            name = self.shop.cache.evict(wish)
            if name and self.events.active:
                self.tell("cache.evict", what=name, bytes=self.shop.cache.nbytes)

    def tell(self, name: str, /, **fields: Any) -> None:
        """Emit an event between collectives: if a watcher raises, all ranks learn it at the next one."""
        guard = self._guard(self.iteration, name)
        guard.run(lambda: self.events.emit(name, **fields))
        self._late = guard.failure

    def _guard(self, iteration: int, stage: str = "") -> Guard:
        """A guard for what comes now, with what failed since the last collective."""
        guard = Guard(self.group.rank, iteration)
        guard.stage, guard.failure, self._late = stage, self._late, None
        return guard

    def _roll_back(self, error: BaseException) -> None:
        for work in self.shop.exchangers:
            work.rollback()
        if self.events.active:
            self.tell("iteration.rollback", iteration=self.iteration + 1, reason=type(error).__name__)

    def run(self) -> Outcome:
        """Iterate until a stopping rule holds. Collective."""
        while self.outcome is None:
            self.advance()
        return self.outcome

    def finish(self) -> None:
        """Run the stages that follow the last iteration; their results join ``tables``. Collective."""
        self._run_stages(self.loop.finish, self.tables, "finish")
        self.settle()

    def settle(self) -> None:
        """Raise on all ranks what a watcher raised on one since the last collective. Collective."""
        self._leave_if_failed(self._guard(self.iteration))


def refuse_unbuilt(loop: Loop) -> None:
    """Raise `UsageError` for nouns that this version has no executor for."""
    if any(isinstance(step, Loop) for step in loop.body):
        raise UsageError(f'the loop "{loop.name}" holds a loop in its body, which cannot run yet')
    if loop.feeds or loop.carry or isinstance(loop.pace, Bounded):
        raise UsageError(f'the loop "{loop.name}" has feeds, a carry or a bounded pace, which cannot run yet')
    for step in supersteps_of(loop):
        if step.when is not None or not all(isinstance(w, (Replace, *IN_PLACE)) for w in step.writes):
            raise UsageError(f'superstep "{step.name}" has a condition or a write that cannot run yet')


def hoisted(loop: Loop) -> tuple[tuple[Stage, ...], tuple[Superstep, ...]]:
    """Loop-invariant code motion: pure maps of the body that read invariants only become prepare stages."""
    invariant = set(loop.sources) | {name for s in loop.prepare for name in makes(s)}
    moved: list[Stage] = []
    body = []
    for step in supersteps_of(loop):
        kept: list[Stage] = []
        for stage in step.stages:
            if isinstance(stage, Local) and stage.pure and set(reads_of(stage)) <= invariant:
                moved.append(stage)
                invariant.add(stage.into)
            else:
                kept.append(stage)
        body.append(replace(step, stages=tuple(kept)))
    return (*loop.prepare, *moved), tuple(body)


def emit_iteration(events: Events, iteration: int) -> None:
    """Tell that an iteration begins."""
    events.emit("iteration.start", iteration=iteration)


def wanted_after(loop: Loop) -> set[str]:
    """Names that are read outside of the stages that run once."""
    out = {
        loop.result,
        *(s.initial for s in loop.state.values()),
        *(table for table, _ in loop.values.values()),
    }
    for step in supersteps_of(loop):
        out |= {w.rows for w in step.writes}
        for stage in step.stages:
            out |= set(reads_of(stage))
    for stage in loop.finish:
        out |= set(reads_of(stage))
    return out


def _may_repeat(loop: Loop) -> bool:
    return not any(isinstance(r, MaxIterations) and r.n == 1 for r in loop.until.rules)


def _renewed(table: Table, of: int) -> Table:
    if isinstance(table, LinkTable):  # rows by number have no columns
        return table
    return replace(table, tokens=column_tokens(of, table.batch))


def _renamed(table: Table, renames: Mapping[int, int]) -> Table:
    if not any(t in renames for t in table.tokens.values()):
        return table
    return replace(table, tokens={n: renames.get(t, t) for n, t in table.tokens.items()})


def _check_unique(name: str, state: State, table: Table) -> None:
    keys = table.batch.select(*state.key)
    numbered = number_keys(keys)
    if len(numbered.hashes) < len(table):
        counts = np.bincount(numbered.codes)
        twice = numbered.keys.slice(int(counts.argmax()), int(counts.argmax()) + 1)
        shown = ", ".join(f"{k}={twice[k][0]!r}" for k in twice.names)
        raise UsageError(
            f'state "{name}" is keyed by {", ".join(state.key)}, but {shown} has {int(counts.max())} '
            "rows; make its keys unique"
        )
