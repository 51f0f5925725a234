"""Local kernels that plans lower to: work on this rank's rows, as data.

A kernel is frozen data with ``run(context, *batches)``; two plans that are alike have equal kernels, which is
what a checkpoint's fingerprint compares. ``keeps`` tells the engine which columns of the first table read
every row of the result has taken over, under which name: so it knows where rows lie without looking.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch, row_text
from iterreduce.columns.compile import Fused, Make
from iterreduce.columns.compute import compute_columns, repeated_parts, select_rows
from iterreduce.columns.expressions import Column, Expr
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.numbering import number_keys
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.random import choose
from iterreduce.columns.sortkeys import first_in_order
from iterreduce.columns.straight import Straight
from iterreduce.columns.trees import columns_of
from iterreduce.errors import AssumptionError, SchemaError, UsageError, at
from iterreduce.loop import Context

STREAM_SAMPLE = 1  # streams of random numbers: one number for each use, so that equal seeds do not correlate
Beside = tuple[tuple[str, str], ...]  # columns of a table that stands beside: (its name, name in the rows)


@dataclass(frozen=True)
class Columns:
    """A step: columns computed; ``rest``: beside those that there are."""

    trees: tuple[tuple[str, Expr], ...]
    rest: bool = False

    @cached_property
    def made(self) -> dict[str, Expr]:
        """The expressions by name."""
        return dict(self.trees)

    @cached_property
    def chosen(self) -> tuple[tuple[str, str], ...] | None:
        """Names and the columns that stand under them, where nothing is computed."""
        plain = [(name, tree.name) for name, tree in self.trees if isinstance(tree, Column)]
        return tuple(plain) if len(plain) == len(self.trees) and not self.rest else None

    @cached_property
    def again(self) -> frozenset[Hashable]:
        """Operations that occur more than once."""
        return repeated_parts(self.made.values())

    def reads(self) -> set[str]:
        """The columns that it reads, unless it keeps the rest."""
        return {name for _, tree in self.trees for name in columns_of(tree)}


@dataclass(frozen=True)
class Keep:
    """A step: the rows for which a condition is true."""

    predicate: Expr


Step = Columns | Keep


@dataclass(frozen=True)
class NumberOf:
    """Where a number comes from: a column of a table of one row, or of none; ``default`` then."""

    parameter: str
    column: str
    default: int | None = None

    def of(self, rows: Batch) -> Any:
        """Its value; None is null."""
        if not len(rows):
            return self.default
        valid = rows.valid(self.column)
        return None if valid is not None and not valid[0] else rows[self.column][0]


@dataclass(frozen=True)
class Compute:
    """Rows through steps, in one pass: projections and filters, beside other tables, with numbers.

    Reads the rows, then the tables beside them (row for row), then one table for each number.
    """

    steps: tuple[Step, ...]
    beside: tuple[Beside, ...] = ()
    numbers: tuple[NumberOf, ...] = ()
    keeps: tuple[tuple[str, str], ...] = ()
    __name__ = "select"

    @cached_property
    def _fused(self) -> Fused:
        """The steps that one compiled pass does together, where there are rows enough."""
        steps = [s.predicate if isinstance(s, Keep) else Make(dict(s.trees), s.rest) for s in self.steps]
        return Fused(steps, [live_after(self.steps, i) for i in range(len(steps))])

    @cached_property
    def _straight(self) -> Straight:
        """The only step as calls of NumPy's functions, where there are few rows."""
        return Straight(dict(self.steps[0].trees) if isinstance(self.steps[0], Columns) else {})

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The rows that come out."""
        rows, others = batches[0], batches[1:]
        for columns, other in zip(self.beside, others, strict=False):
            rows = side_by_side(rows, other, columns)
        first = self.steps[0] if len(self.steps) == 1 else None
        if isinstance(first, Columns) and first.chosen is not None:
            return renamed(rows, first.chosen).without_idle_masks()
        tables = others[len(self.beside) :]
        values = {n.parameter: n.of(table) for n, table in zip(self.numbers, tables, strict=True)}
        if isinstance(first, Columns) and not first.rest:
            made = self._straight.run(rows, values)
            if made is not None:
                return made
        done, rows = self._fused.run(rows, values)
        for i, step in enumerate(self.steps[done:], done):
            if isinstance(step, Keep):
                wanted = live_after(self.steps, i)
                chosen = select_rows(step.predicate, rows, values)
                rows = rows if wanted is None else rows.select(*(n for n in rows.names if n in wanted))
                rows = rows if len(chosen) == len(rows) else rows.take(chosen)
            else:
                made = compute_columns(step.made, rows, values, step.again)
                rows = side_by_side(rows, made, tuple((n, n) for n in made.names)) if step.rest else made
        return rows.without_idle_masks()


def renamed(rows: Batch, columns: Beside) -> Batch:
    """Columns under other names."""
    made = {new: rows[old] for new, old in columns}
    valid = {new: rows._valid[old] for new, old in columns if old in rows._valid}
    return Batch._trusted(made, valid, len(rows))


def live_after(steps: tuple[Step, ...], i: int) -> set[str] | None:
    """The columns that steps after the i-th read; None: all."""
    read: set[str] = set()
    for step in steps[i + 1 :]:
        if isinstance(step, Keep):
            read |= set(columns_of(step.predicate))
        elif step.rest:
            return None
        else:
            return read | step.reads()
    return None


def side_by_side(rows: Batch, other: Batch, columns: Beside) -> Batch:
    """The rows with columns of another batch of as many rows."""
    for name, _ in columns:
        other[name]  # or names what is missing
    made = {**rows._columns, **{new: other._columns[name] for name, new in columns}}
    valid = {n: m for n, m in rows._valid.items() if not any(new == n for _, new in columns)}
    valid |= {new: other._valid[name] for name, new in columns if name in other._valid}
    return Batch._trusted(made, valid, len(rows))


@dataclass(frozen=True)
class Concat:
    """The rows of all tables read."""

    keeps: tuple[tuple[str, str], ...] = ()

    def run(self, context: Context, *batches: Batch) -> Batch:
        """One after the other; a batch without rows or columns has no say."""
        first = batches[0]
        parts = [b if b.names == first.names else b.select(*first.names) for b in batches if b.names]
        filled = [p for p in parts if len(p)] or parts[:1]
        return Batch.concat(filled) if filled else first


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a share, by the order of keys where there are some."""

    rows: int
    keys: tuple[str, ...] = ()
    descending: tuple[bool, ...] = ()

    def run(self, context: Context, *batches: Batch) -> Batch:
        """At most so many."""
        (rows,) = batches
        if self.keys and len(rows):
            first = first_in_order(rows.select(*self.keys), self.rows, self.descending)
            rows = rows if first is None else rows.take(first)
        return rows.slice(0, self.rows)


@dataclass(frozen=True)
class ChooseRows:
    """A kernel: ``k`` random rows out of all, the same on any number of ranks (rows keep their order)."""

    k: int
    seed: int
    of: str = field(compare=False)  # for messages
    at_least: int = 0
    where: str = field(default="", compare=False)

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The chosen rows of this share."""
        (rows,) = batches
        wanted = max(self.k, self.at_least)
        if wanted > context.rows_total:
            raise UsageError(
                f"wanted k={wanted} different rows of {self.of}, which has {context.rows_total}; ask for "
                f"fewer (a smaller k), or give more rows{at(self.where)}"
            )
        chosen = np.sort(choose(self.seed, STREAM_SAMPLE, context.rows_total, self.k)) - context.first_row
        return rows.take(chosen[(chosen >= 0) & (chosen < len(rows))])


@dataclass(frozen=True)
class Distinct:
    """The rows as they are, of which each must have its key to itself: where no plan can prove it.

    They lie by the key, or are on every rank, so each rank looks at its own. ``first``: those that a state
    begins with; the plan may have taken their key for granted.
    """

    key: tuple[str, ...]
    state: str = field(compare=False)
    where: str = field(default="", compare=False)
    first: bool = False

    @property
    def keeps(self) -> tuple[tuple[str, str], ...]:
        """Keys are passed on."""
        return tuple((k, k) for k in self.key)

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The same rows."""
        (rows,) = batches
        twice = repeated_key(rows.select(*self.key)) if len(rows) else ""
        if twice:
            made = "begins with" if self.first else "gets from the step"
            raise (AssumptionError if self.first else SchemaError)(
                f'iterate: state "{self.state}" is keyed by {", ".join(self.key)}, but {made} more than one '
                f"row of {twice}; make its keys unique (group_by), or give it no key (key=[]){at(self.where)}"
            )
        return rows


def repeated_key(keys: Batch) -> str:
    """A key that more than one row has, in words; empty: there is none. Cheap in the order of hashes."""
    hashes = hash_keys(keys)
    if (hashes[1:] > hashes[:-1]).all():
        return ""
    numbered = number_keys(keys)
    if len(numbered) == len(keys):
        return ""
    return row_text(keys, int(numbered.first[int(np.argmax(np.bincount(numbered.codes) > 1))]))


@dataclass(frozen=True)
class WithNulls:
    """Rows with columns of nothing but nulls, like those of another table: the right rows of a full join."""

    columns: tuple[str, ...]
    order: tuple[str, ...]

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The rows in the order of columns wanted."""
        rows, like = batches
        columns, valid = dict(rows._columns), dict(rows._valid)
        for name in self.columns:
            columns[name] = _nothing(like[name], len(rows))
            valid[name] = np.zeros(len(rows), bool)
        made = Batch.from_dict(columns, valid)
        return made.select(*self.order)


def _nothing(like: Any, rows: int) -> Any:
    if isinstance(like, Ragged):
        return Ragged(np.zeros(rows + 1, np.int64), like.values[:0], like.kind)
    return np.zeros((rows, *like.shape[1:]), like.dtype)


# ---------------------------------------------------------------------- what changes

IMPROVES: dict[str, Any] = {
    "min": np.less,
    "max": np.greater,
    "any": np.greater,  # of bools: true where it was not
    "all": np.less,
}


@dataclass(frozen=True)
class Improved:
    """Proposals that are better than what is there: in some column, each by its own comparison.

    Reads proposals with what the table has beside them (columns ``\\0name`` are proposed), or, ``beside``,
    the proposals and the table's rows for them. A null is worse than any value. ``met``: all proposals have
    found a row of their key, whatever is null in it.
    """

    key: tuple[str, ...]
    merge: tuple[tuple[str, str], ...]
    beside: bool = False
    met: bool = False

    @property
    def keeps(self) -> tuple[tuple[str, str], ...]:
        """Keys are passed on."""
        return tuple((k, k) for k in self.key)

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The rows of the table as they will be: the better value of each column."""
        rows, table = (batches[0], batches[1]) if self.beside else (batches[0], batches[0])
        mark = "" if self.beside else "\0"
        here = None if self.beside or self.met else known_rows(rows, self.merge)
        better = {name: self._better(rows, table, name, kind, here) for name, kind in self.merge}
        first, *others = better.values()
        wins = np.logical_or.reduce((first, *others)) if others else first
        at = np.flatnonzero(wins if here is None else wins & here)
        keys = rows.select(*self.key).take(at)
        columns, valid = dict(keys._columns), dict(keys._valid)
        for name, _ in self.merge:
            columns[name] = rows[mark + name][at]
            if others:
                np.copyto(columns[name], table[name][at], where=~better[name][at])
            if here is None and (mask := table.valid(name)) is not None:
                valid[name] = (mask | better[name])[at]
        return Batch.from_dict(columns, valid)

    def _better(self, rows: Batch, table: Batch, name: str, kind: str, here: Any) -> Any:
        """Where the value proposed for a column is better."""
        proposed = name if self.beside else f"\0{name}"
        better = IMPROVES[kind](rows[proposed], table[name])
        return with_nulls(better, rows.valid(proposed), table.valid(name) if here is None else None)


@dataclass(frozen=True)
class Settled:
    """Of the rows that a shuffle settled all, or, ``waiting``, those that have still something to tell."""

    told: str
    key: tuple[str, ...]
    waiting: bool

    @property
    def keeps(self) -> tuple[tuple[str, str], ...]:
        """Keys are passed on."""
        return tuple((k, k) for k in self.key)

    def run(self, context: Context, *batches: Batch) -> Batch:
        """Without the column that says which."""
        (rows,) = batches
        told = rows[self.told]
        if self.waiting and told.any():  # all of them: the very columns, which lie where they lay
            rows = rows.take(np.flatnonzero(~told))
        return rows.drop(self.told)


def with_nulls(better: Any, new: Any, old: Any) -> Any:
    """Comparisons where some values are null."""
    if old is not None:
        better = better | ~old
    return better if new is None else better & new


def known_rows(rows: Batch, merge: tuple[tuple[str, str], ...]) -> Any:
    """Which proposals found a row of their key: those that found none have only nulls beside them."""
    found = np.zeros(len(rows), bool)
    for name, _ in merge:
        mask = rows.valid(name)
        if mask is None:
            return np.ones(len(rows), bool)
        found |= mask
    return found


@dataclass(frozen=True)
class NewRows:
    """Proposals that found no row of their key."""

    key: tuple[str, ...]
    merge: tuple[str, ...]

    @property
    def keeps(self) -> tuple[tuple[str, str], ...]:
        """Keys are passed on."""
        return tuple((k, k) for k in self.key)

    def run(self, context: Context, *batches: Batch) -> Batch:
        """Such rows with the table's columns."""
        (rows,) = batches
        new = np.flatnonzero(~known_rows(rows, tuple((name, "") for name in self.merge)))
        chosen = rows.select(*self.key, *(f"\0{name}" for name in self.merge))
        return chosen.rename(**{f"\0{name}": name for name in self.merge}).take(new)
