"""The waist: what a loop is, as frozen data. Every door produces these nouns; the engine runs them.

What it is not: code. Nothing here runs, communicates or knows ranks. Stages and writes are told in
`iterreduce.stages`. `Loop` checks that every name is bound before it is read, so a mistake is an error where
the loop is built.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.partition import PARTITIONS
from iterreduce.errors import UsageError, did_you_mean
from iterreduce.fixpoint import CarryRule, MaxIterations, Until
from iterreduce.stages import BUILTINS as BUILTINS
from iterreduce.stages import STAGES as STAGES
from iterreduce.stages import WRITES as WRITES
from iterreduce.stages import Accumulate as Accumulate
from iterreduce.stages import Context as Context
from iterreduce.stages import Gather as Gather
from iterreduce.stages import Index as Index
from iterreduce.stages import Insert as Insert
from iterreduce.stages import Joined as Joined
from iterreduce.stages import Kernel as Kernel
from iterreduce.stages import Local as Local
from iterreduce.stages import Lookup as Lookup
from iterreduce.stages import Number as Number
from iterreduce.stages import Patch as Patch
from iterreduce.stages import Reduce as Reduce
from iterreduce.stages import Remove as Remove
from iterreduce.stages import Replace as Replace
from iterreduce.stages import Shuffle as Shuffle
from iterreduce.stages import Sink as Sink
from iterreduce.stages import Splitters as Splitters
from iterreduce.stages import Stage as Stage
from iterreduce.stages import Total as Total
from iterreduce.stages import Write as Write
from iterreduce.stages import aggregators_of as aggregators_of
from iterreduce.stages import check_reduce as check_reduce
from iterreduce.stages import makes as makes
from iterreduce.stages import reads_of as reads_of


@dataclass(frozen=True)
class Superstep:
    """Stages in order, then writes; stage results die with it.

    ``when``: a function of the carry (name -> number) that tells whether the superstep runs in this
    iteration; None: always. All ranks have the same carry, hence the same answer.
    """

    name: str
    stages: tuple[Stage, ...]
    writes: tuple[Write, ...] = ()
    when: Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True)
class State:
    """A table that iterations replace. ``initial`` names a source or a prepare output; empty: no rows yet.

    ``key`` empty: the layout of its initial rows (everywhere, or by block); else it is partitioned by key,
    whose values must be unique. ``where``: the line of a program that asked for it, for messages.
    """

    initial: str
    key: tuple[str, ...] = ()
    where: str = field(default="", compare=False)


CARRY_DTYPES = {
    **dict.fromkeys(("sum", "min", "max"), ("float64", "int64")),
    "count": ("int64", "float64"),
    **dict.fromkeys(("any", "all"), ("bool",)),
}


@dataclass(frozen=True)
class Carry:
    """A number that all ranks share from one iteration to the next: an aggregator, a counter.

    ``Accumulate`` folds the values of an iteration into it by ``aggregator`` (SUM, MIN, MAX, COUNT, ANY,
    ALL), over all ranks; the new number is seen from the next iteration on. ``keep``: what is accumulated
    joins what was there, instead of taking its place. ``dtype`` is int64, float64 or bool; unless given, the
    aggregator's: bool for ANY and ALL, int64 for COUNT, else float64. Maps read it as a table of one row with
    the column ``value``, under its name.

    >>> from iterreduce.columns.aggregators import COUNT
    >>> Carry(COUNT).dtype
    'int64'
    """

    aggregator: Aggregator
    initial: float | int | bool = 0
    keep: bool = False
    dtype: str = ""

    def __post_init__(self) -> None:
        kind = getattr(self.aggregator, "kind", None)
        wanted = CARRY_DTYPES.get(str(kind))
        if wanted is None:
            raise UsageError(f"a carry folds by SUM, MIN, MAX, COUNT, ANY or ALL, got {self.aggregator!r}")
        if not isinstance(self.aggregator.column, str | None):
            raise UsageError(f"a carry folds a column, got {self.aggregator!r}; compute it in a Local")
        if not self.dtype:
            object.__setattr__(self, "dtype", wanted[0])
        if self.dtype not in wanted:
            raise UsageError(f"a carry by {kind} is {' or '.join(wanted)}, got dtype {self.dtype!r}")
        self._check_initial()

    def _check_initial(self) -> None:
        number: Any = self.initial
        if not isinstance(number, bool | int | float | np.bool | np.integer | np.floating):
            raise UsageError(f"a carry starts from a number, got {number!r}")
        if self.dtype == "float64":
            return
        if not (math.isfinite(number) and number == int(number)):
            raise UsageError(f"a carry of {self.dtype} starts from a whole number, got {number}")
        if not -(2**63) <= number < 2**63:
            raise UsageError(f"a carry of {self.dtype} starts from {number}, which does not fit")


@dataclass(frozen=True)
class Synchronous:
    """Every iteration waits for all of the one before."""


@dataclass(frozen=True)
class Bounded:
    """Ranks may run ahead of each other by ``staleness`` iterations; ``law`` says which results agree."""

    staleness: int
    law: Literal["idempotent", "commutative"]


@dataclass(frozen=True)
class Loop:
    """Sources, what is prepared from them once, state, a body of supersteps, and when to stop.

    ``sources``: name -> a source (rows by block), a `Batch` (the same on all ranks), or another `Loop` (its
    result). ``prepare``: stages run once, whose outputs are invariants. ``finish``: stages run once after the
    last iteration, which read the final state. ``values``: name -> (table of one row, column): numbers of the
    run's summary, taken after ``finish``. ``result``: the table that the run returns.

    ``feeds``: name -> a function of the iteration (1, 2, ...) that gives its rows: a source or a `Batch`;
    None: given to `LoopRun.advance`. ``carry``: name -> `Carry`. A `Loop` in the body runs to its end in each
    iteration; what it reads of the tables around it is named in its ``outer``, and its result is bound, for
    the supersteps after it, under its name. ``gives``: name -> table: more of its tables, bound like its
    result around the loop in whose body or sources it stands.
    """

    name: str
    sources: Mapping[str, Any]
    state: Mapping[str, State]
    body: tuple[Superstep | Loop, ...]
    until: Until
    result: str
    prepare: tuple[Stage, ...] = ()
    finish: tuple[Stage, ...] = ()
    values: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    partitions: int = PARTITIONS
    feeds: Mapping[str, Callable[[int], Any] | None] = field(default_factory=dict)
    carry: Mapping[str, Carry] = field(default_factory=dict)
    pace: Synchronous | Bounded = field(default_factory=Synchronous)
    outer: tuple[str, ...] = ()
    gives: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.partitions, bool) or not 1 <= self.partitions <= 1 << 20:
            raise UsageError(f"partitions: wanted 1 to {1 << 20}, got {self.partitions}")
        check_names(self)


def supersteps_of(loop: Loop) -> Iterator[Superstep]:
    """The supersteps of the body, those of inner loops too."""
    for step in loop.body:
        if isinstance(step, Loop):
            yield from supersteps_of(step)
        else:
            yield step


def stages_of(loop: Loop) -> Iterator[Stage]:
    """All stages in the order in which they run, those of inner loops too."""
    yield from loop.prepare
    for step in loop.body:
        yield from stages_of(step) if isinstance(step, Loop) else step.stages
    yield from loop.finish


def names_of_sources(loop: Loop) -> list[str]:
    """The names that a loop's sources bind: of a loop its result, and what it gives beside."""
    more = [n for s in loop.sources.values() if isinstance(s, Loop) for n in s.gives]
    return [*loop.sources, *more]


def indexes_of(loop: Loop) -> frozenset[str]:
    """The names of rows that an `Index` keeps."""
    return frozenset(s.into for s in stages_of(loop) if isinstance(s, Index))


# ---------------------------------------------------------------------- names


def check_names(loop: Loop) -> None:
    """Every name is bound before it is read, once, and every stage is well formed."""
    _check_forms(loop)
    given = Counter((*names_of_sources(loop), *loop.outer))
    if twice := sorted(name for name, times in given.items() if times > 1):
        raise UsageError(f'loop "{loop.name}": {", ".join(twice)} is bound twice; each name once')
    bound = set(given)
    for stage in loop.prepare:
        bound = _bind(stage, bound, "prepare")
    for name, state in loop.state.items():
        if state.initial:
            where = f'loop "{loop.name}": state "{name}" begins with'
            outside = (
                "" if loop.outer else "; what an inner loop reads of the loop around it stands in its outer"
            )
            _known(state.initial, bound, where, outside)
        if name in bound:
            raise UsageError(f'state "{name}" has the name of a source or a prepare output; give it another')
    tables = bound | set(loop.state)
    for what, names in (("feed", loop.feeds), ("carry", loop.carry)):
        for name in names:
            if name in tables:
                raise UsageError(f'{what} "{name}" has the name of another table; give it another')
        tables |= set(names)
    if not loop.body:
        raise UsageError("a loop needs a body of at least one superstep")
    _check_indexes(loop)
    tables = _check_body(loop, tables)
    for rule in loop.until.rules:
        if isinstance(rule, CarryRule):
            _known(rule.carry, set(loop.carry), "until, the carry")
        elif rule.table is not None or not isinstance(rule, MaxIterations):
            hint = (
                ""
                if rule.table
                else f"; say of which state: ir.Until.of(...).on({next(iter(loop.state), 's')!r})"
            )
            _known(rule.table or "", set(loop.state), "until", hint)
    for stage in loop.finish:
        tables = _bind(stage, tables, "finish")
    for name in (loop.result, *loop.gives.values()):
        _known(name, tables, "result")
    for name, (table, _) in loop.values.items():
        _known(table, tables, f'value "{name}"')


def _check_body(loop: Loop, tables: set[str]) -> set[str]:
    """The tables that are known after the body."""
    for step in loop.body:
        if isinstance(step, Loop):
            for name in step.outer:
                _known(name, tables, f'inner loop "{step.name}" reads')
            for name in (step.name, *step.gives):
                if name in tables:
                    raise UsageError(
                        f'inner loop "{step.name}" has the name of a table, "{name}"; give another'
                    )
                tables = tables | {name}
        else:
            _check_step(step, tables, loop)
    return tables


def _check_indexes(loop: Loop) -> None:
    """What an `Index` makes of rows is read by a `Shuffle` with ``joined`` alone."""
    numbered = indexes_of(loop)
    for stage in stages_of(loop):
        if isinstance(stage, Shuffle) and (stage.settle or stage.improves) and stage.rows not in numbered:
            what = "settle" if stage.settle else "improves"
            raise UsageError(f'Shuffle into "{stage.into}": {what} goes with rows that an Index has made')
        for name in reads_of(stage):
            if name in numbered and not (isinstance(stage, Shuffle) and stage.rows == name and stage.onto):
                raise UsageError(
                    f'{type(stage).__name__} into {stage.into!r} reads "{name}", which an Index keeps as '
                    "numbers: only the rows of a Shuffle onto a table can be that; read the rows that the "
                    "Index was made of"
                )


def _check_onto(stage: Shuffle, where: str) -> None:
    if stage.missing not in ("error", "drop"):
        raise UsageError(f'{where}: missing is {stage.missing!r}; wanted "error" or "drop"')
    if stage.onto and any(part.kind == "collect" for part in aggregators_of(stage.combine)):
        raise UsageError(
            f"{where}: lists cannot be collected onto a table; shuffle without onto, or without combine"
        )
    if (stage.touched or stage.joined) and (stage.combine is None or stage.onto is None):
        raise UsageError(f"{where}: touched and joined go with combine and onto; give both")
    if stage.settle or stage.improves:
        _check_settle(stage, where)
    if not stage.sorted and (stage.combine is not None or stage.onto or stage.route):
        raise UsageError(f"{where}: sorted=False is for whole rows: leave out combine, onto and route")
    if stage.route and (stage.combine is not None or stage.onto):
        raise UsageError(f"{where}: splitters route whole rows: leave out combine and onto")
    if stage.route and not stage.route.sample >= 1:
        raise UsageError(
            f"{where}: Splitters({stage.route.sample}): wanted a sample of at least 1 row per rank"
        )
    if stage.route and stage.route.descending and len(stage.route.descending) != len(stage.key):
        raise UsageError(
            f"{where}: Splitters(descending={stage.route.descending}): wanted a bool for each column of the "
            f"key, {', '.join(stage.key)}"
        )


def _check_settle(stage: Shuffle, where: str) -> None:
    what = "settle" if stage.settle else "improves"
    kinds = [part.kind for part in aggregators_of(stage.combine)]
    if not (stage.touched and stage.joined) or len(kinds) != 1 or kinds[0] not in ("min", "max"):
        raise UsageError(
            f"{where}: {what} goes with touched=True, joined and one MIN or MAX of what the joined table has"
        )


def _check_step(step: Any, tables: set[str], loop: Loop) -> None:
    where = f'superstep "{getattr(step, "name", "")}"'
    if not isinstance(step, Superstep):
        raise UsageError(f"a loop's body holds supersteps and loops, got {type(step).__name__}")
    if step.when is not None:
        if not callable(step.when):
            raise UsageError(f"{where}: when is a function of the carry, got {type(step.when).__name__}")
        check_arguments(step.when, ("carry",), f"{where}, when")
    bound = set(tables)
    for stage in step.stages:
        if isinstance(stage, Index):
            raise UsageError(f"{where}: an Index is made once; move it to prepare")
        bound = _bind(stage, bound, where)
    for write in step.writes:
        _check_write(write, bound, loop, f"{where} writes")


def _check_forms(loop: Loop) -> None:
    """What a comma forgotten or a word without its tuple gives, said where it was written."""
    if not isinstance(loop.until, Until):
        raise UsageError(
            f"until: wanted ir.Until.of(...), got {loop.until!r}; write ir.Until.of({loop.until!r}, n)"
        )
    _tuple_of("body", loop.body, "a superstep, or an inner loop")
    _tuple_of("prepare", loop.prepare, "a stage")
    _tuple_of("finish", loop.finish, "a stage")
    for name, state in loop.state.items():
        _names(f'state "{name}": key', state.key)
    for step in loop.body:
        if isinstance(step, Superstep):
            _tuple_of(f'superstep "{step.name}": stages', step.stages, "a stage")
            _tuple_of(f'superstep "{step.name}": writes', step.writes, "a write")
            _check_stages(step.stages)
    _check_stages((*loop.prepare, *loop.finish))


def _check_stages(stages: tuple[Stage, ...]) -> None:
    for stage in stages:
        what = f"{type(stage).__name__} into {getattr(stage, 'into', '')!r}"
        if isinstance(stage, Local):
            _names(f"{what}: reads", stage.reads)
            if stage.cut not in ("block", "share"):
                raise UsageError(f'{what}: cut is {stage.cut!r}; wanted "block" or "share"')
        elif isinstance(stage, Shuffle | Total | Lookup):
            _names(f"{what}: key", stage.key)
        if isinstance(stage, Shuffle) and stage.combine is not None:
            check_reduce(f"{what}: combine", stage.combine)
        elif isinstance(stage, Total):
            check_reduce(f"{what}: aggregators", stage.aggregators)


def _names(what: str, names: Any) -> None:
    if not isinstance(names, tuple):
        shown = f'("{names}",)' if isinstance(names, str) else '("a", "b")'
        raise UsageError(f"{what}: wanted a tuple of names such as {shown}, got {names!r}")


def _tuple_of(what: str, things: Any, one: str) -> None:
    if not isinstance(things, tuple):
        raise UsageError(
            f"{what}: wanted a tuple, of one thing ({one},) with its comma; got {type(things).__name__}"
        )


def _check_write(write: Any, bound: set[str], loop: Loop, where: str) -> None:
    if not isinstance(write, WRITES):
        wanted = ", ".join(w.__name__ for w in WRITES)
        raise UsageError(f"{where}: wanted {wanted}, got {type(write).__name__}")
    _known(write.rows, bound, where)
    if isinstance(write, Sink):
        return
    if isinstance(write, Accumulate) and write.table in loop.carry:
        if write.merge:
            raise UsageError(f'{where}: the carry "{write.table}" has its aggregator; leave out merge')
        return
    hint = "; a number for all ranks is declared in carry={...}" if isinstance(write, Accumulate) else ""
    _known(write.table, set(loop.state), where, hint)
    if not isinstance(write, Replace) and not loop.state[write.table].key:
        raise UsageError(
            f'{where} "{write.table}" by {type(write).__name__}, which needs a state with a key; '
            f'say State(..., key=("...",))'
        )


def _bind(stage: Any, bound: set[str], where: str) -> set[str]:
    if not isinstance(stage, STAGES):
        wanted = ", ".join(s.__name__ for s in STAGES)
        raise UsageError(f"{where}: wanted {wanted}, got {type(stage).__name__}")
    what = f"{where}, {type(stage).__name__} into {stage.into!r}"
    for name in reads_of(stage):
        _known(name, bound, f"{what}, reads")
    if isinstance(stage, Local):
        _check_local(stage, where)
    if isinstance(stage, Shuffle):
        _check_onto(stage, what)
    if isinstance(stage, Index):
        _check_index(stage, what)
    if isinstance(stage, Lookup) and stage.missing not in ("error", "drop", "null", "only"):
        raise UsageError(f'{what}: missing is {stage.missing!r}; wanted "error", "drop", "null" or "only"')
    for name in makes(stage):
        if name in bound:
            raise UsageError(
                f'{where}: "{name}" is bound twice; give the result of {type(stage).__name__} another name'
            )
    return bound | set(makes(stage))


def _check_local(stage: Local, where: str) -> None:
    if not callable(stage.function) and not isinstance(stage.function, Kernel):
        raise UsageError(f"{where}: Local wants a function of batches, got {type(stage.function).__name__}")
    if not stage.reads:
        raise UsageError(f"{where}: Local into {stage.into!r} reads nothing; name at least one table")
    if not isinstance(stage.function, Kernel):
        check_arguments(stage.function, stage.reads, f"{where}, Local into {stage.into!r}")


def check_arguments(function: Callable[..., Any], reads: tuple[str, ...], where: str) -> None:
    """Raise `UsageError` for a function that cannot be called with one argument for each of these names."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, without a signature
        return
    try:
        signature.bind(*reads)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise UsageError(f"{where}: {name}{signature} is called with ({', '.join(reads)}): {error}") from None


def _check_index(stage: Index, what: str) -> None:
    if len(stage.keys) != 2:
        raise UsageError(f"{what}: wanted two key columns, such as src and dst, got {list(stage.keys)}")
    tables = set(stage.keys.values())
    if set(stage.names) != tables or not set(stage.also) <= tables:
        raise UsageError(
            f"{what}: names must give a key column for each of {sorted(tables)}, and also only those; got "
            f"{dict(stage.names)} and {sorted(stage.also)}"
        )
    if stage.symmetric and len(tables) != 1:
        raise UsageError(f"{what}: rows count both ways round only where both keys are of one table")


def _known(name: str, bound: set[str], where: str, hint: str = "") -> None:
    if name not in bound:
        raise UsageError(
            f'{where} "{name}", which is not bound '
            f"(known: {', '.join(sorted(bound)) or 'nothing'}){did_you_mean(name, bound)}{hint}"
        )


def keys_of(key: Any) -> tuple[str, ...]:
    """What a user writes as a key -> column names.

    >>> keys_of("page"), keys_of(["a", "b"]), keys_of(None)
    (('page',), ('a', 'b'), ())
    """
    if key is None:
        return ()
    names = (key,) if isinstance(key, str) else tuple(key)
    if not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        raise UsageError(f"key: wanted a column name or several different ones, got {key!r}")
    return names
