"""When a loop ends: distances between two versions of its state, rules in order, and outcomes.

A rule is data. Each rank computes a rule's *partial* (a few float64) from its own share; the engine
gathers the partials of all ranks in its one control reduction, and every rank folds them in rank order, so
all reach the same verdict with the same bits. Nothing here communicates.

How it can go wrong: a distance needs old and new rows of the same key. Tables everywhere or by block are
compared position by position; tables by key are matched by key, and a row that is on one side only counts
as a change from nothing (its own size for l1, l2 and max).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.distances import (
    Changes,
    PerRow,
    side_by_side,
)
from iterreduce.errors import UsageError
from iterreduce.rules import COMPARISONS as COMPARISONS
from iterreduce.rules import RULES as RULES
from iterreduce.rules import WITHOUT_TABLE as WITHOUT_TABLE
from iterreduce.rules import AllUnchanged
from iterreduce.rules import CarryRule as CarryRule
from iterreduce.rules import Distance as Distance
from iterreduce.rules import Empty as Empty
from iterreduce.rules import Fold as Fold
from iterreduce.rules import MaxIterations as MaxIterations
from iterreduce.rules import Measured as Measured
from iterreduce.rules import NoneActive as NoneActive
from iterreduce.rules import Outcome as Outcome
from iterreduce.rules import Partials as Partials
from iterreduce.rules import Predicate as Predicate
from iterreduce.rules import Rule as Rule
from iterreduce.rules import Unchanged as Unchanged
from iterreduce.table import Table


@dataclass(frozen=True)
class Until:
    """Rules in order: after an iteration the first that holds names the outcome."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, RULES):
                raise UsageError(
                    f"until: {rule!r} is no stopping rule; write ir.l1('rank') <= 1e-9, ir.Empty(), or a "
                    "function of old and new state"
                )
        if not self.rules:
            raise UsageError("until: a loop needs at least one rule, such as ir.MaxIterations(100)")

    @classmethod
    def of(cls, until: Any, max_iterations: int | None) -> Until:
        """What a user writes -> rules: a rule, a sequence of rules, a function, an Until, or None
        (unchanged).
        """
        if isinstance(until, Until):
            rules: Sequence[Any] = until.rules
        elif until is None:
            rules = (Unchanged(),)
        elif isinstance(until, Sequence) and not isinstance(until, str):
            rules = until
        else:
            rules = (until,)
        made = [_rule(r) for r in rules]
        return cls((*made, MaxIterations(max_iterations)) if max_iterations is not None else tuple(made))

    def on(self, table: str) -> Until:
        """The same rules, with ``table`` where a rule names none."""
        return Until(
            tuple(
                r if r.table or isinstance(r, WITHOUT_TABLE) else replace(r, table=table) for r in self.rules
            )
        )

    def of_states(self, states: Sequence[str]) -> Until:
        """The same rules for several states: where nothing shall change, none of them; otherwise the first
        where a rule names none.
        """
        rules: list[Any] = []
        for rule in self.rules:
            if type(rule) is Unchanged and rule.table is None and len(states) > 1:
                rules += [AllUnchanged(name, width=int(name == states[-1])) for name in states]
            else:
                rules.append(rule)
        return Until(tuple(rules)).on(states[0])

    @cached_property
    def measured(self) -> tuple[Measured, ...]:
        """The rules that look at tables."""
        return tuple(r for r in self.rules if not isinstance(r, WITHOUT_TABLE))

    @cached_property
    def kinds(self) -> tuple[tuple[Any, type], ...]:
        """The rules, and what each is: to be asked in every iteration."""
        return tuple((rule, type(rule)) for rule in self.rules)


def _rule(rule: Any) -> Any:
    if isinstance(rule, CarryMeasure):
        raise UsageError(f'until: carry("{rule.name}") is a number, not a rule; compare it: ... <= 0')
    if isinstance(rule, Measure):
        raise UsageError(
            f"until: {rule.per_row}{rule.columns} is a distance, not a rule; compare it: ... <= 1e-6"
        )
    return Predicate(rule) if callable(rule) and not isinstance(rule, RULES) else rule


@dataclass(frozen=True, eq=False)
class Measure:
    """A distance that waits for its threshold: ``ir.l2("x") <= 1e-4``."""

    columns: tuple[str, ...]
    per_row: PerRow | Callable[[Batch, Batch], Array]
    fold: Fold
    table: str | None

    def __le__(self, threshold: float) -> Distance:
        return Distance(self.columns, float(threshold), self.per_row, self.fold, self.table)

    def __lt__(self, threshold: float) -> Distance:
        raise UsageError(f"until: a distance stops a loop where it is at most so large; write <= {threshold}")

    def __bool__(self) -> bool:
        raise UsageError(
            "a distance has no truth value while the loop is built; write  until=ir.l2('x') <= tolerance"
        )


@dataclass(frozen=True, eq=False)
class CarryMeasure:
    """A number of the carry that waits for its threshold: ``ir.carry("active") <= 0``."""

    name: str

    def __le__(self, threshold: float) -> CarryRule:
        return CarryRule(self.name, "<=", threshold)

    def __lt__(self, threshold: float) -> CarryRule:
        return CarryRule(self.name, "<", threshold)

    def __ge__(self, threshold: float) -> CarryRule:
        return CarryRule(self.name, ">=", threshold)

    def __gt__(self, threshold: float) -> CarryRule:
        return CarryRule(self.name, ">", threshold)

    def __bool__(self) -> bool:
        raise UsageError(
            "a carry has no truth value while the loop is built; write  until=ir.carry('active') <= 0"
        )


def carry(name: str) -> CarryMeasure:
    """A number that all ranks carry from iteration to iteration, to be compared by a stopping rule.

    >>> carry("active") <= 0
    CarryRule(carry='active', compare='<=', threshold=0, outcome=<Outcome.CONVERGED: 'converged'>, \
table=None, columns=(), width=0)
    """
    return CarryMeasure(name)


def l1(*columns: str, fold: Fold = "sum", table: str | None = None) -> Measure:
    """Sum (mean, max) over rows of absolute differences between the old and the new columns.

    >>> rule = l1("rank") <= 1e-9
    >>> rule.columns, rule.threshold, rule.outcome.name
    (('rank',), 1e-09, 'CONVERGED')
    """
    return Measure(columns, "l1", fold, table)


def l2(*columns: str, fold: Fold = "sum", table: str | None = None) -> Measure:
    """Euclidean norm of the whole difference (fold "mean": root mean square of rows; "max": largest row
    norm).
    """
    return Measure(columns, "l2", fold, table)


def linf(*columns: str, table: str | None = None) -> Measure:
    """The largest absolute difference of any value."""
    return Measure(columns, "max", "max", table)


def changed(*columns: str, fold: Fold = "sum", table: str | None = None) -> Measure:
    """How many rows changed (fold "mean": which part of them)."""
    return Measure(columns, "changed", fold, table)


def distance(
    function: Callable[[Batch, Batch], Array], fold: Fold = "sum", table: str | None = None
) -> Measure:
    """A distance of your own: ``function(old, new) -> float64[n]``, one number for each pair of rows."""
    return Measure((), function, fold, table)


InPlace = Mapping[str, Callable[[Table, Table], Changes | None]]


def partials(
    until: Until,
    old: Mapping[str, Table],
    new: Mapping[str, Table],
    rank: int,
    in_place: InPlace = MappingProxyType({}),
) -> list[float]:
    """This rank's share of every rule, one list. A state everywhere is counted by rank 0 alone.

    ``in_place``: how to ask what was written of states that are written in place.
    """
    out: list[float] = []
    moved = False  # is it known that not all is unchanged?
    for rule in until.measured:
        name = rule.table
        assert name is not None
        if type(rule) is AllUnchanged and moved:
            out += [1.0] * rule.width
            continue
        before, after = old[name], new[name]
        changes = in_place[name](before, after) if name in in_place else None
        if changes is not None:
            out += _partial_of_changes(rule, changes, before, after)
        elif rank and after.layout.kind == "everywhere":
            out += [0.0] * max(rule.width, 1)
        elif isinstance(rule, Distance):
            found = rule.between(before, after) if type(rule) is Distance else None  # not of exact ones
            if found is not None:
                out += found
                continue
            if before.batch._valid or after.batch._valid:
                rule.refuse_nulls(before.batch, after.batch)
            out += rule.partial(*side_by_side(before, after, rule.columns or after.batch.names))
        else:
            out += rule.partial(before.batch, after.batch)
        if type(rule) is AllUnchanged:
            moved = out[-1] != 0
            if not rule.width:
                out.pop()
    return out


def _partial_of_changes(rule: Measured, changes: Changes, before: Table, after: Table) -> Sequence[float]:
    """As of whole tables, from the rows that were written: the others have not moved."""
    if isinstance(rule, Distance):
        rule.refuse_nulls(after.batch)
        found = list(rule.partial(changes.old, changes.new))
        found[1] = float(changes.rows)
        return found
    if isinstance(rule, Unchanged):
        return rule.partial(changes.old, changes.new)
    if isinstance(rule, NoneActive):
        return (float(changes.active(rule.column)),)
    return rule.partial(changes.before() if isinstance(rule, Predicate) else before.batch, after.batch)


def verdict(
    until: Until, gathered: Array, iteration: int, carry: Mapping[str, float] = MappingProxyType({})
) -> tuple[Outcome | None, float | None]:
    """(outcome or None, residual) from float64[ranks, words] of all ranks' partials and from the carry; pure,
    the same everywhere.
    """
    at, residual, outcome = 0, None, None
    ranks, width = gathered.tolist(), gathered.shape[1]
    for rule, kind in until.kinds:
        if kind is MaxIterations:
            if outcome is None and iteration >= rule.n:
                outcome = rule.outcome
            continue
        if kind is AllUnchanged and not rule.width:
            continue  # the last of them tells what they found
        if kind is CarryRule:
            value = float(carry[rule.carry])
        else:
            of_rule = ranks
            if rule.width < width:
                of_rule, at = [words[at : at + rule.width] for words in ranks], at + rule.width
            value = rule.fold_ranks(of_rule)
        residual = value if residual is None else residual
        if outcome is None and rule.holds(value):
            outcome = rule.outcome
    return outcome, residual
