"""A loop and the loops in its body as a tree of levels: what each one runs, and where it stands.

A level's `Standing` is everything about it that iterations change: its position in the body, its tables, its
carry. A transaction works on copies (drafts) and a commit puts them in place, so what stands is always that
of the last commit, and it is all that a checkpoint has to save.

What it is not: code that runs. The driver walks the tree; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from iterreduce.carrying import Gain, Number, initial_numbers, tables_of
from iterreduce.collectives import Group
from iterreduce.columns.partition import PARTITIONS, PartitionMap
from iterreduce.columns.placement import Placement
from iterreduce.columns.threads import Pool, using
from iterreduce.errors import UsageError
from iterreduce.events import Events
from iterreduce.fixpoint import MaxIterations, Outcome
from iterreduce.inplace import IN_PLACE, KeyedState, keyed_states
from iterreduce.laid import laid_out
from iterreduce.loop import (
    Bounded,
    Local,
    Loop,
    Shuffle,
    Sink,
    Stage,
    Superstep,
    indexes_of,
    makes,
    names_of_sources,
    reads_of,
    supersteps_of,
)  # fmt: skip
from iterreduce.loop_cache import LoopCache
from iterreduce.options import Options
from iterreduce.scratch import spills
from iterreduce.superstep import SuperstepRun, Workshop
from iterreduce.table import Table

INITIAL, SHUFFLED = "initial rows", "initial rows by key"  # names inside a step of their own


class Position(NamedTuple):
    """Where a loop stands: iterations committed, and the distance at the last one (None: none asked).

    ``path``: iterations committed on each level, outermost first: (2, 5) is the fifth iteration of an inner
    loop, two iterations of the outer one being done; (3,) follows when the third is. ``loops`` names them.
    """

    iteration: int
    residual: float | None = None
    path: tuple[int, ...] = ()
    loops: tuple[str, ...] = ()


@dataclass(slots=True)
class Standing:
    """Where a level stands. ``at``: the step of the body that comes next; ``before``: the tables at the start
    of the iteration under way; ``gained``: what it has accumulated so far; ``runs``: which of its supersteps
    run (bits).
    """

    bindings: dict[str, Table]
    before: dict[str, Table]
    carry: dict[str, Number]
    gained: dict[str, Gain] = field(default_factory=dict)
    iteration: int = 0
    at: int = 0
    runs: int = -1
    residual: float | None = None
    outcome: Outcome | None = None

    def draft(self) -> Standing:
        """A copy to work on."""
        return Standing(
            self.bindings.copy(), self.before, self.carry, self.gained, self.iteration, self.at, self.runs,
            self.residual, self.outcome,
        )  # fmt: skip


class Level:
    """One loop of the tree. ``standing`` is None while the loop is not entered; ``number`` counts levels."""

    def __init__(self, loop: Loop, parent: Level | None, shop: Workshop, naive: bool, count: Iterator[int]):
        self.loop, self.parent, self.number = loop, parent, next(count)
        self.chain: tuple[Level, ...] = (*(parent.chain if parent else ()), self)
        self.names = tuple(level.loop.name for level in self.chain)
        self.label = "/".join(self.names)
        prepare, body = hoisted(loop) if not naive else (loop.prepare, loop.body)
        self.invariant: set[str] = set(names_of_sources(loop)) | (
            set(loop.outer) & (parent.invariant if parent else set())
        )
        self.once, later = split(prepare, self.invariant)
        self.read_later = readers(loop, body).union(*(reads_of(stage) for stage in later))
        self.constants: dict[str, Table] = {}
        shop = self.shop = level_shop(loop, parent, shop)
        self.testing = f"{self.label}: fixpoint test" if parent else "fixpoint test"
        self.within = within = f"{self.label}: " if parent else ""
        self.prepare = (
            SuperstepRun(Superstep("prepare", later), shop, wanted(loop), within) if later else None
        )
        self.starts = {} if parent is None else starts_of(loop, shop, within)
        self.unique: dict[str, tuple[object, ...]] = {}  # key columns that were found to be unique
        self.steps: list[SuperstepRun | Level] = [
            SuperstepRun(step, shop, within=within)
            if isinstance(step, Superstep)
            else Level(step, self, shop, naive, count)
            for step in body
        ]
        self.in_place = {name: state.changes for name, state in self._states_in_place().items()}
        self.ending = (
            SuperstepRun(Superstep("finish", loop.finish), shop, wanted(loop), within)
            if parent is not None and loop.finish
            else None
        )
        self.conditions = [
            (i, step.step.when)
            for i, step in enumerate(self.steps)
            if isinstance(step, SuperstepRun) and step.step.when is not None
        ]
        self.asks = bool(loop.feeds or self.conditions or naive)  # an iteration begins with more than a copy
        self.supersteps = [step for step in self.steps if isinstance(step, SuperstepRun)]
        #: an iteration is its supersteps, all of them, and a commit
        self.plain = not (
            self.asks
            or loop.carry
            or len(self.supersteps) < len(self.steps)
            or any(step.sinks or step.accumulates for step in self.supersteps)
        )
        self.standing: Standing | None = None
        self.gains: dict[str, Gain] = {}  # of this rank, in this transaction

    def _states_in_place(self) -> dict[str, KeyedState]:
        """What stands behind the states that supersteps write in place, which then commit it."""
        shop, keys = self.shop, {name: state.key for name, state in self.loop.state.items()}
        steps = [step for step in self.steps if isinstance(step, SuperstepRun)]
        made = keyed_states(
            [step.step for step in steps],
            keys,
            shop.cache,
            shop.partitions,
            shop.group.rank,
            len(shop.in_place),
        )
        shop.states.update(made)
        shop.in_place.update({f"{self.label}/{name}": state for name, state in made.items()})
        for name, state in made.items():
            for step in steps:
                if any(isinstance(w, IN_PLACE) and w.table == name for w in step.step.writes):
                    step.works[len(shop.exchangers)] = state
            shop.exchangers.append(state)
        return made

    @property
    def inner(self) -> Iterator[Level]:
        """The loops of the body."""
        return (step for step in self.steps if isinstance(step, Level))

    def all(self) -> Iterator[Level]:
        """This level and those below, outermost first."""
        yield self
        for level in self.inner:
            yield from level.all()

    def let_go(self) -> None:
        """The end: tables, stages and their plans are let go."""
        for level in list(self.all()):
            level.shop.let_go()
            level.shop.residents.clear()
            vars(level).clear()

    def entered(self, bindings: dict[str, Table]) -> Standing:
        """How it stands before its first iteration: with these tables and the carry's first numbers."""
        numbers = initial_numbers(self.loop.carry)
        bindings.update(tables_of(self.loop.carry, numbers))
        return Standing(bindings, bindings, numbers)


class Whereabouts:
    """Where a run stands: what can be asked of the tree of its levels between two iterations.

    ``root`` is the outermost loop, ``level`` the innermost that is open; ``inner_values`` are named numbers
    of inner loops, at their last end; ``inherits``: it goes on with what another run held.
    """

    root: Level
    level: Level
    inner_values: dict[str, float | int]
    inherits = False
    pool: Pool
    place: Placement | None

    def working(self) -> using:
        """For a ``with`` statement: this rank's own work, on its threads, its arrays where they belong."""
        return using(self.pool, self.place)

    def let_go(self) -> dict[str, Table]:
        """Nobody asks the run for anything any more, but for these tables: its memory goes now. (Its parts
        hold each other, and Python's collector, which would find that, does not know how large arrays are.)
        """
        tables = self.tables
        self.root.let_go()
        for name in ("_plain", "_open", "_now"):
            vars(self).pop(name, None)
        return tables

    @property
    def tables(self) -> dict[str, Table]:
        """The tables of the loop, as of the last commit."""
        assert self.root.standing is not None
        return self.root.standing.bindings

    @property
    def iteration(self) -> int:
        """Iterations committed, of the outermost loop."""
        assert self.root.standing is not None
        return self.root.standing.iteration

    @property
    def residual(self) -> float | None:
        """The distance at the last commit of the outermost loop."""
        assert self.root.standing is not None
        return self.root.standing.residual

    @property
    def outcome(self) -> Outcome | None:
        """How the loop ended; None while it has not."""
        assert self.root.standing is not None
        return self.root.standing.outcome

    @property
    def carry(self) -> dict[str, Any]:
        """The numbers of the outermost loop's carry, as of the last commit."""
        assert self.root.standing is not None
        return dict(self.root.standing.carry)

    @property
    def path(self) -> tuple[int, ...]:
        """Iterations committed on each level that is open, outermost first."""
        standing = self.level.standing
        if self.level.parent is None and standing is not None:
            return (standing.iteration,)
        return tuple([at.standing.iteration for at in self.level.chain if at.standing is not None])

    @property
    def position(self) -> Position:
        """Where the loop stands."""
        assert self.level.standing is not None
        return Position(self.iteration, self.level.standing.residual, self.path, self.level.names)

    @property
    def wants(self) -> tuple[str, ...]:
        """The feeds that the next `advance` must be given."""
        return feeds_wanted(self.level)

    @property
    def values(self) -> dict[str, float | int]:
        """The loop's named numbers, and those of its carry; of inner loops, at their last end, as
        ``loop.name``.
        """
        assert self.root.standing is not None
        return {**values_of(self.root, self.root.standing), **self.inner_values}


def feeds_wanted(level: Level) -> tuple[str, ...]:
    """The feeds that the next iteration asks rows for, where ``level`` is the innermost that is open."""
    out: list[str] = []
    at = 0 if level.standing is None else level.standing.at
    if level.standing is not None and level.standing.outcome is not None and level.parent is not None:
        level = level.parent
        assert level.standing is not None
        at = level.standing.at + 1
    while True:
        if at == 0:
            out += [name for name, feed in level.loop.feeds.items() if feed is None]
        inner = next((step for step in level.steps[at:] if isinstance(step, Level)), None)
        if inner is None:
            return tuple(out)
        level, at = inner, 0


def workshop_of(loop: Loop, group: Group, options: Options, events: Events) -> Workshop:
    """What all stages of a run share on this rank."""
    partitions = options.partitions if options.partitions != PARTITIONS else loop.partitions
    return Workshop(
        group,
        LoopCache(None if spills(options) else options.memory_bytes, enabled=not options.naive),
        PartitionMap(partitions, group.size),
        events,
        options.check,
        options.memory_bytes,
        spills=spills(options),
        repeats=may_repeat(loop),
        keep=not options.naive,
        reproducible=options.reproducible,
        indexes=indexes_of(loop),
    )


def level_shop(loop: Loop, parent: Level | None, shop: Workshop) -> Workshop:
    """What the stages of one level share: states of their own, and all else with the other levels."""
    laid = laid_out(loop, parent.shop.laid if parent else {})
    keyed = frozenset(name for name, state in loop.state.items() if state.key)
    return replace(shop, states={}, laid=laid, carry=frozenset(loop.carry), keyed=keyed)


def values_of(level: Level, standing: Standing) -> dict[str, float | int]:
    """The named numbers of a loop, each the one row of a column, and its carry; of an inner one with its
    name in front.
    """
    front = "" if level.parent is None else f"{level.loop.name}."
    out: dict[str, float | int] = {front + name: number for name, number in standing.carry.items()}
    for name, (table, column) in level.loop.values.items():
        found = standing.bindings[table].batch
        if len(found) == 1:
            out[front + name] = found[column][0].item()
    return out


def starts_of(loop: Loop, shop: Workshop, within: str) -> dict[str, SuperstepRun]:
    """For each keyed state of an inner loop what brings its initial rows to their owners, at every entry."""
    return {
        name: SuperstepRun(
            Superstep(f'initial rows of "{name}"', (Shuffle(INITIAL, state.key, SHUFFLED),)),
            shop,
            within=within,
        )
        for name, state in loop.state.items()
        if state.key and state.initial
    }


def split(stages: tuple[Stage, ...], invariant: set[str]) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Prepare stages that need to run once in a whole run, and those that run at every entry; adds to
    ``invariant``.
    """
    once, later = [], []
    for stage in stages:
        if set(reads_of(stage)) <= invariant:
            once.append(stage)
            invariant.update(makes(stage))
        else:
            later.append(stage)
    return tuple(once), tuple(later)


def hoisted(loop: Loop) -> tuple[tuple[Stage, ...], tuple[Superstep | Loop, ...]]:
    """Loop-invariant code motion: pure maps of the body that read invariants only become prepare stages."""
    invariant = set(names_of_sources(loop)) | set(loop.outer) | {n for s in loop.prepare for n in makes(s)}
    moved: list[Stage] = []
    body: list[Superstep | Loop] = []
    for step in loop.body:
        if isinstance(step, Loop):
            body.append(step)
            continue
        kept: list[Stage] = []
        for stage in step.stages:
            if isinstance(stage, Local) and stage.pure and set(reads_of(stage)) <= invariant:
                moved.append(stage)
                invariant.add(stage.into)
            else:
                kept.append(stage)
        body.append(replace(step, stages=tuple(kept)))
    return (*loop.prepare, *moved), tuple(body)


def readers(loop: Loop, body: tuple[Superstep | Loop, ...]) -> set[str]:
    """Names that something reads after the stages that prepare and the states' initial rows."""
    out = {loop.result, *loop.gives.values(), *(table for table, _ in loop.values.values())}
    for step in body:
        if isinstance(step, Loop):
            out |= set(step.outer)
            continue
        out |= {w.rows for w in step.writes}
        for stage in step.stages:
            out |= set(reads_of(stage))
    for stage in loop.finish:
        out |= set(reads_of(stage))
    return out


def wanted(loop: Loop) -> set[str]:
    """Names that are read outside of the stages that prepare."""
    return readers(loop, loop.body) | initials(loop)


def initials(loop: Loop) -> set[str]:
    """Names of tables that states begin with."""
    return {state.initial for state in loop.state.values()}


def may_repeat(loop: Loop) -> bool:
    """Is there a level that iterates more than once?"""
    once = any(isinstance(r, MaxIterations) and r.n == 1 for r in loop.until.rules)
    return not once or any(may_repeat(step) for step in loop.body if isinstance(step, Loop))


def inner_loops(loop: Loop) -> Iterator[Loop]:
    """The loop, and all loops in its body."""
    yield loop
    for step in loop.body:
        if isinstance(step, Loop):
            yield from inner_loops(step)


def refuse_unbuilt(loop: Loop) -> None:
    """Raise `UsageError` for nouns that this version has no executor for."""
    if loop.outer:
        raise UsageError(
            f'the loop "{loop.name}" reads {", ".join(loop.outer)} of a loop around it: put it in a body'
        )
    for level in inner_loops(loop):
        if isinstance(level.pace, Bounded):
            raise UsageError(
                f'the loop "{level.name}" has a bounded pace: this version runs all ranks in step; leave out '
                "pace, or say Synchronous()"
            )
        _refuse_writes(level)


def _refuse_writes(loop: Loop) -> None:
    """What an inner loop's iterations commit is no more to be undone, nor told from what was before."""
    last = max((i for i, step in enumerate(loop.body) if isinstance(step, Loop)), default=-1)
    compared = {rule.table for rule in loop.until.rules}
    for step in loop.body[: max(last, 0)]:
        for write in step.writes if isinstance(step, Superstep) else ():
            if isinstance(write, IN_PLACE) and write.table in compared and write.table in loop.state:
                raise UsageError(
                    f'superstep "{step.name}" writes "{write.table}" in place before an inner loop, so the '
                    f'stopping rule of "{loop.name}" cannot see what it changed; write it behind the inner '
                    "loops, use Replace, or stop by a carry"
                )


def sinks_of(loop: Loop) -> list[str]:
    """The names of the outputs that supersteps sink rows into."""
    return list(dict.fromkeys(w.output for s in supersteps_of(loop) for w in s.writes if isinstance(w, Sink)))
