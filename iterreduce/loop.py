"""The waist: what a loop is, as frozen data. Every door produces these nouns; the engine runs them.

What it is not: code. Nothing here runs, communicates or knows ranks. A name refers to a source, a prepare
output, a state, or a stage result of the same superstep; `Loop` checks that every name is bound before it
is read, so a mistake is an error where the loop is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.batch import Batch
from iterreduce.columns.partition import PARTITIONS
from iterreduce.columns.random import choose
from iterreduce.errors import UsageError, did_you_mean
from iterreduce.fixpoint import MaxIterations, Until

Reduce = Aggregator | Mapping[str, Aggregator]


class Context(NamedTuple):
    """What a kernel may know beside its rows: never the rank.

    ``first_row`` is the global number of the first row of the first table read, and ``rows_total`` the rows
    of all ranks; known for sources and results of loops, else 0 and -1 (a map may have dropped rows
    elsewhere).
    """

    iteration: int
    first_row: int
    rows_total: int


@runtime_checkable
class Kernel(Protocol):
    """A local function that is data: the engine may run it in another order or fuse it."""

    def run(self, context: Context, *batches: Batch) -> Batch:
        """One batch from the batches read."""


@dataclass(frozen=True)
class Local:
    """``into = function(*reads)`` without communication.

    ``cut="block"``: the first name in ``reads`` is handed over some blocks of rows at a time, the others
    whole; the results are joined. ``cut="share"``: this rank's whole share at once. ``pure``: the result
    depends on nothing but the rows read, so it is computed once where all of them are invariant.
    """

    function: Callable[..., Batch] | Kernel
    reads: tuple[str, ...]
    into: str
    cut: Literal["block", "share"] = "block"
    pure: bool = False


@dataclass(frozen=True)
class Shuffle:
    """Rows to the owner of their key. With ``combine``: one finished row per key that had a row.

    ``combine`` maps output columns to aggregators (or is one aggregator for all value columns); rows are
    combined before sending and again at the owner. Without it ``into`` holds all rows, sorted by key (in
    hash order), rows of one key in canonical order (source block, position).
    ``onto`` names a table by key: ``into`` then has exactly its rows, in its order, and a key that the table
    does not have is an error, or its rows are dropped (``missing``).
    """

    rows: str
    key: tuple[str, ...]
    into: str
    combine: Reduce | None = None
    onto: str | None = None
    missing: Literal["error", "drop"] = "error"


@dataclass(frozen=True)
class Total:
    """Aggregates over all ranks' rows, the same on all ranks: one row per key that had a row, sorted by key.

    ``key`` empty: one row in all (no row at all if there was none).
    """

    rows: str
    key: tuple[str, ...]
    aggregators: Reduce
    into: str


@dataclass(frozen=True)
class Gather:
    """All rows on all ranks, in canonical order."""

    rows: str
    into: str


Stage = Local | Shuffle | Total | Gather


@dataclass(frozen=True)
class Replace:
    """The table becomes these rows, at the end of the superstep."""

    table: str
    rows: str


Write = Replace


@dataclass(frozen=True)
class Superstep:
    """Stages in order, then writes; stage results die with it."""

    name: str
    stages: tuple[Stage, ...]
    writes: tuple[Write, ...] = ()


@dataclass(frozen=True)
class State:
    """A table that iterations replace. ``initial`` names a source or a prepare output; empty: no rows yet.

    ``key`` empty: the layout of its initial rows (everywhere, or by block); else it is partitioned by key,
    whose values must be unique.
    """

    initial: str
    key: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loop:
    """Sources, what is prepared from them once, state, a body of supersteps, and when to stop.

    ``sources``: name -> a source (rows by block), a `Batch` (the same on all ranks), or another `Loop` (its
    result). ``prepare``: stages run once, whose outputs are invariants. ``finish``: stages run once after the
    last iteration, which read the final state. ``values``: name -> (table of one row, column): numbers of the
    run's summary, taken after ``finish``. ``result``: the table that the run returns.
    """

    name: str
    sources: Mapping[str, Any]
    state: Mapping[str, State]
    body: tuple[Superstep, ...]
    until: Until
    result: str
    prepare: tuple[Stage, ...] = ()
    finish: tuple[Stage, ...] = ()
    values: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    partitions: int = PARTITIONS

    def __post_init__(self) -> None:
        if isinstance(self.partitions, bool) or not 1 <= self.partitions <= 1 << 20:
            raise UsageError(f"partitions: wanted 1 to {1 << 20}, got {self.partitions}")
        check_names(self)


def stages_of(loop: Loop) -> Iterator[Stage]:
    """All stages in the order in which they run."""
    yield from loop.prepare
    for step in loop.body:
        yield from step.stages
    yield from loop.finish


def reads_of(stage: Stage) -> tuple[str, ...]:
    """The names a stage reads."""
    if isinstance(stage, Local):
        return stage.reads
    return (stage.rows, stage.onto) if isinstance(stage, Shuffle) and stage.onto else (stage.rows,)


def check_names(loop: Loop) -> None:
    """Every name is bound before it is read, once, and every stage is well formed."""
    bound = set(loop.sources)
    for stage in loop.prepare:
        bound = _bind(stage, bound, "prepare")
    for name, state in loop.state.items():
        if state.initial:
            _known(state.initial, bound, f'state "{name}"')
        if name in bound:
            raise UsageError(f'state "{name}" has the name of a source or a prepare output; give it another')
    tables = bound | set(loop.state)
    if not loop.body:
        raise UsageError("a loop needs a body of at least one superstep")
    for step in loop.body:
        _check_step(step, tables, set(loop.state))
    for rule in loop.until.rules:
        if not isinstance(rule, MaxIterations):
            _known(rule.table or "", set(loop.state), "until")
    for stage in loop.finish:
        tables = _bind(stage, tables, "finish")
    _known(loop.result, tables, "result")
    for name, (table, _) in loop.values.items():
        _known(table, tables, f'value "{name}"')


def _check_onto(stage: Shuffle, where: str) -> None:
    reduce = stage.combine
    parts = [] if reduce is None else [reduce] if isinstance(reduce, Aggregator) else list(reduce.values())
    if stage.onto and any(part.kind == "collect" for part in parts):
        raise UsageError(
            f"{where}: lists cannot be collected onto a table; shuffle without onto, or without combine"
        )


def _check_step(step: Superstep, tables: set[str], states: set[str]) -> None:
    if not isinstance(step, Superstep):
        raise UsageError(f"a loop's body holds supersteps, got {type(step).__name__}")
    bound = set(tables)
    for stage in step.stages:
        bound = _bind(stage, bound, f'superstep "{step.name}"')
    for write in step.writes:
        _known(write.table, states, f'superstep "{step.name}" writes')
        _known(write.rows, bound, f'superstep "{step.name}" writes')


def _bind(stage: Stage, bound: set[str], where: str) -> set[str]:
    if not isinstance(stage, (Local, Shuffle, Total, Gather)):
        raise UsageError(f"{where}: wanted Local, Shuffle, Total or Gather, got {type(stage).__name__}")
    for name in reads_of(stage):
        _known(name, bound, f"{where}, {type(stage).__name__} into {stage.into!r}, reads")
    if isinstance(stage, Local) and not callable(stage.function) and not isinstance(stage.function, Kernel):
        raise UsageError(f"{where}: Local wants a function of batches, got {type(stage.function).__name__}")
    if isinstance(stage, Shuffle):
        _check_onto(stage, f"{where}, Shuffle into {stage.into!r}")
    if isinstance(stage, Local) and not stage.reads:
        raise UsageError(f"{where}: Local into {stage.into!r} reads nothing; name at least one table")
    if stage.into in bound:
        raise UsageError(
            f'{where}: "{stage.into}" is bound twice; give the result of {type(stage).__name__} another name'
        )
    return bound | {stage.into}


def _known(name: str, bound: set[str], where: str) -> None:
    if name not in bound:
        raise UsageError(
            f'{where} "{name}", which is not bound '
            f"(known: {', '.join(sorted(bound)) or 'nothing'}){did_you_mean(name, bound)}"
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


@dataclass(frozen=True)
class ChooseRows:
    """A kernel: ``k`` random rows out of all, the same on any number of ranks (rows keep their order)."""

    k: int
    seed: int
    of: str
    at_least: int = 0

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The chosen rows of this share."""
        (rows,) = batches
        wanted = max(self.k, self.at_least)
        if wanted > context.rows_total:
            raise UsageError(
                f"wanted k={wanted} different rows of {self.of}, which has {context.rows_total}; ask for "
                "fewer (a smaller k), or give more rows"
            )
        chosen = np.sort(choose(self.seed, STREAM_SAMPLE, context.rows_total, self.k)) - context.first_row
        return rows.take(chosen[(chosen >= 0) & (chosen < len(rows))])


STREAM_SAMPLE = 1  # streams of random numbers: one number for each use, so that equal seeds do not correlate
