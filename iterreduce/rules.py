"""Stopping rules, as data: what each holds, its partial on one rank, and the fold of all ranks' partials.

Distances between two versions of a state, equality, emptiness, votes, numbers of the carry, a maximum of
iterations; and the outcomes that they name. `iterreduce.fixpoint` puts rules in order and asks them. Nothing
here communicates.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.folds import largest_change, total_change
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.distances import FLOAT64, PerRow, asked, checked_rows, combined, row_distance
from iterreduce.errors import SchemaError, UsageError
from iterreduce.table import Table

Fold = Literal["sum", "mean", "max"]
Partials = Sequence[Sequence[float]] | Array  # of each rank, in rank order


class Outcome(enum.Enum):
    """How a loop ended. Failures are not outcomes: they raise."""

    CONVERGED = "converged"
    UNCHANGED = "unchanged"
    EMPTY = "empty"
    HALTED = "halted"
    ITERATIONS_USED = "iterations used"
    STOPPED_SAVED = "stopped and saved"


@dataclass(frozen=True)
class Distance:
    """Holds when the distance of old and new ``columns`` of a state is at most ``threshold``.

    ``per_row``: "l1" sum of absolute differences, "l2" Euclidean norm, "max" largest absolute difference,
    "changed" 1 where any column differs, or a function ``f(old: Batch, new: Batch) -> float64[n]`` of rows
    that stand side by side (of a state that is patched: of the rows written; the others count as unmoved).
    ``fold``: "sum" over all rows (for "l2": the root of the sum of squares, the
    norm of the whole difference), "mean" of the rows (for "l2": the root mean square), or "max".

    >>> old, new = Batch(x=np.zeros(2)), Batch(x=np.array([3.0, 4.0]))
    >>> rule = Distance(("x",), 1e-3, "l2")
    >>> float(rule.fold_ranks(np.array([rule.partial(old, new)])))
    5.0
    """

    columns: tuple[str, ...]
    threshold: float
    per_row: PerRow | Callable[[Batch, Batch], Array] = "l1"
    fold: Fold = "sum"
    table: str | None = None
    outcome: Outcome = Outcome.CONVERGED
    width: int = 3  # sum, rows, largest

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or self.threshold < 0:
            raise UsageError(f"a distance is compared with a threshold >= 0, got {self.threshold}")
        if not callable(self.per_row) and self.per_row not in ("l1", "l2", "max", "changed"):
            raise UsageError(
                f"per_row {self.per_row!r}: wanted l1, l2, max, changed or a function of old and new rows"
            )
        if self.fold not in ("sum", "mean", "max"):
            raise UsageError(f"fold {self.fold!r}: wanted sum, mean or max")

    def partial(self, old: Batch, new: Batch) -> tuple[float, float, float]:
        """(sum, rows, largest) over rows that stand side by side."""
        plain = self._plain_columns(old, new)
        if plain is not None and self.fold == "max":
            found = 0.0, float(new._length), largest_change(*plain)
        elif plain is not None and self.per_row != "l2":
            found = total_change(*plain), float(new._length), 0.0
        elif plain is not None:
            found = self._folded(plain[1] - plain[0])  # its squares are those of its absolute values
        else:
            found = self._folded(self._rows(old, new))
        if math.isnan(found[0] + found[2]) and not callable(self.per_row):
            # infinity minus infinity: an infinite value that stayed what it was has not moved
            found = self._folded(self._rows(old, new, equal_is_zero=True))
        return found

    def between(self, old: Table, new: Table) -> tuple[float, float, float] | None:
        """`partial` of the commonest: one column of float64 numbers, of rows that stand where they stood.

        None where it is more than that, or needs a closer look.
        """
        before, after, name = old.batch, new.batch, self._column
        ours, theirs = before._columns, after._columns
        if name is None or before._valid or after._valid or before._length != after._length:
            return None
        for key in new.layout.keys:
            if ours.get(key) is not theirs.get(key):
                return None
        a, b = ours.get(name), theirs.get(name)
        if type(a) is not np.ndarray or type(b) is not np.ndarray or a.dtype is not FLOAT64:
            return None
        if b.dtype is not FLOAT64 or a.ndim != 1 or b.ndim != 1 or self.per_row == "l2":
            return None
        if not a.flags.c_contiguous or not b.flags.c_contiguous:
            return None
        if self.fold == "max":
            found = 0.0, float(after._length), largest_change(a, b)
        else:
            found = total_change(a, b), float(after._length), 0.0
        return found if found[0] + found[2] < math.inf else None

    def _plain_columns(self, old: Batch, new: Batch) -> tuple[Array, Array] | None:
        """What the commonest distance is of: one column of float64 numbers."""
        name = self._column
        if name is None:
            return None
        a, b = old._columns.get(name), new._columns.get(name)
        if a is None or b is None:
            return None
        if type(a) is Ragged or type(b) is Ragged or not (a.dtype == b.dtype == FLOAT64) or a.ndim != 1:
            return None
        return (a, b) if a.flags.c_contiguous and b.flags.c_contiguous else None

    @cached_property
    def _column(self) -> str | None:
        """The one column whose numbers are compared; None where it is more than that."""
        plain = len(self.columns) == 1 and self.per_row in ("l1", "l2", "max")
        return self.columns[0] if plain else None

    def _folded(self, rows: Array) -> tuple[float, float, float]:
        if len(rows) == 0:
            return 0.0, 0.0, 0.0
        if self.fold == "max":
            return 0.0, float(len(rows)), float(np.maximum.reduce(rows))
        if self.per_row == "l2":
            with np.errstate(over="ignore"):  # an infinite distance says enough
                return float(np.dot(rows, rows)), float(len(rows)), 0.0
        total = float(np.add.reduce(rows))
        return total, float(len(rows)), 0.0

    def _rows(self, old: Batch, new: Batch, equal_is_zero: bool = False) -> Array:
        if callable(self.per_row):
            return checked_rows(asked(self.per_row, old, new), len(new))
        names = self.columns or new.names
        if len(names) == 1:
            return row_distance(self.per_row, names[0], old, new, equal_is_zero)
        return combined(self.per_row, [row_distance(self.per_row, n, old, new, equal_is_zero) for n in names])

    def refuse_nulls(self, *batches: Batch) -> None:
        """A null has no distance to a number: raise `SchemaError`."""
        if callable(self.per_row) or self.per_row == "changed":
            return
        for batch in batches:
            for name in self.columns or batch.names:
                if batch.valid(name) is not None:
                    raise SchemaError(
                        f'a distance needs numbers; column "{name}" has nulls (fill them in, or use '
                        f'ir.changed("{name}"))'
                    )

    def fold_ranks(self, partials: Partials) -> float:
        """The distance, from three numbers of each rank, in rank order."""
        total = rows = largest = 0.0
        if self.fold == "max":
            for _, _, rank_largest in partials:
                if not rank_largest <= largest and largest == largest:  # a NaN stays the largest
                    largest = rank_largest
            return float(largest)
        for rank_total, rank_rows, _ in partials:
            total += rank_total
            rows += rank_rows
        value = total / max(rows, 1.0) if self.fold == "mean" else total
        return math.sqrt(value) if self.per_row == "l2" else value

    def holds(self, value: float) -> bool:
        """Is the fixpoint reached at this distance? (NaN: never.)"""
        return value <= self.threshold


@dataclass(frozen=True)
class Unchanged:
    """Holds when no row of the state differs from the iteration before (bit for bit; NaN equals NaN)."""

    table: str | None = None
    outcome: Outcome = Outcome.UNCHANGED
    width: int = 1
    columns: tuple[str, ...] = ()

    def partial(self, old: Batch, new: Batch) -> tuple[float]:
        """(1,) if this rank's share differs."""
        return (0.0 if old.schema == new.schema and old.equals(new) else 1.0,)

    def fold_ranks(self, partials: Partials) -> float:
        """1 if something differs on any rank."""
        return float(any(p[0] for p in partials))

    def holds(self, value: float) -> bool:
        """None differs."""
        return value == 0


@dataclass(frozen=True)
class AllUnchanged(Unchanged):
    """One of several rules in a row, one per state, that hold together or not at all: the last of them, alone
    of width 1, tells of all.
    """


@dataclass(frozen=True)
class Empty:
    """Holds when a state has no rows on any rank."""

    table: str | None = None
    outcome: Outcome = Outcome.EMPTY
    width: int = 1
    columns: tuple[str, ...] = ()

    def partial(self, old: Batch, new: Batch) -> tuple[float]:
        """(rows of this share,)."""
        return (float(len(new)),)

    def fold_ranks(self, partials: Partials) -> float:
        """Rows on all ranks."""
        return float(sum(p[0] for p in partials))

    def holds(self, value: float) -> bool:
        """No rows."""
        return value == 0


@dataclass(frozen=True)
class NoneActive:
    """Holds when a bool column of a state is False everywhere (all vertices voted to halt)."""

    column: str
    table: str | None = None
    outcome: Outcome = Outcome.HALTED
    width: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that is looked at."""
        return (self.column,)

    def partial(self, old: Batch, new: Batch) -> tuple[float]:
        """(active rows of this share,)."""
        return (float(np.count_nonzero(new[self.column])),)

    def fold_ranks(self, partials: Partials) -> float:
        """Active rows on all ranks."""
        return float(sum(p[0] for p in partials))

    def holds(self, value: float) -> bool:
        """None is active."""
        return value == 0


@dataclass(frozen=True)
class Predicate:
    """Holds when ``function(old, new)`` is true on every rank that has rows of the state.

    It sees both versions whole; of a state that is patched, the old one is copied for it in every iteration.
    """

    function: Callable[[Batch, Batch], bool]
    table: str | None = None
    outcome: Outcome = Outcome.HALTED
    width: int = 1
    columns: tuple[str, ...] = ()

    def partial(self, old: Batch, new: Batch) -> tuple[float]:
        """(1,) if this rank says no; a rank without rows abstains."""
        return (0.0 if len(new) == 0 and len(old) == 0 else float(not asked(self.function, old, new)),)

    def fold_ranks(self, partials: Partials) -> float:
        """Ranks that said no."""
        return float(sum(p[0] for p in partials))

    def holds(self, value: float) -> bool:
        """No rank said no."""
        return value == 0


@dataclass(frozen=True)
class MaxIterations:
    """Holds after ``n`` iterations."""

    n: int
    outcome: Outcome = Outcome.ITERATIONS_USED
    table: str | None = None
    columns: tuple[str, ...] = ()
    width: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, (int, np.integer)) or self.n < 1:
            raise UsageError(f"max_iterations: wanted an integer of at least 1, got {self.n!r}")


@dataclass(frozen=True)
class CarryRule:
    """Holds when a number of the carry compares with ``threshold``: ``ir.carry("active") <= 0``.

    The number is that of the iteration that has just ended, the same on all ranks.
    """

    carry: str
    compare: Literal["<=", "<", ">=", ">"]
    threshold: float
    outcome: Outcome = Outcome.CONVERGED
    table: str | None = None
    columns: tuple[str, ...] = ()
    width: int = 0

    def holds(self, value: float) -> bool:
        """Does the comparison hold? (NaN: never.)"""
        return bool(COMPARISONS[self.compare](value, self.threshold))


COMPARISONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
Measured = Distance | Unchanged | Empty | NoneActive | Predicate
Rule = Measured | CarryRule | MaxIterations
RULES = (Distance, Unchanged, Empty, NoneActive, Predicate, CarryRule, MaxIterations)
WITHOUT_TABLE = (CarryRule, MaxIterations)
