"""Tables by key that are written in place: patched, accumulated into, added to and taken from.

A `KeyedState` stands behind each state that a `Patch`, `Accumulate`, `Insert` or `Remove` names. What it does
costs as much as there are rows in the write, whatever the size of the table (but for `Remove`, and columns of
text, which are made anew). Old values go to an undo log, which is dropped when the iteration commits and
replayed when it is rolled back; distances of old and new state come from the log too.

How it can go wrong: a batch that was handed out shows the table as it is now, so it is valid until the end of
its superstep. Columns that a write hands to another table are copied before any write of the superstep
(`detached`). Memory is ours before it is written to: a source's arrays are copied once.

Keys change by agreement: a rank that added or took rows says so in the control reduction, and if any did, the
key columns take other tokens on all ranks, so plans made for them are void. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.batch import Batch, Column, row_text
from iterreduce.columns.groups import KeyIndex, number_keys
from iterreduce.columns.growing import Held, Marks, appended, extended, held
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import difference, never_null
from iterreduce.distances import Changes, nothing_like, side_by_side
from iterreduce.errors import SchemaError, UsageError
from iterreduce.loop import Superstep
from iterreduce.loop_cache import LoopCache
from iterreduce.stages import Accumulate, Insert, Patch, Remove, Write
from iterreduce.table import NO_TOKENS, Table, by_key, token

IN_PLACE = (Patch, Accumulate, Insert, Remove)
MERGES = {
    "sum": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "any": np.logical_or,
    "all": np.logical_and,
}
VALID = "\0valid:"  # in names of the undo log: the mask of a column


class Undo(NamedTuple):
    """Values that stood in ``column`` before ``rows`` of it were written."""

    name: str
    column: Array
    rows: Array
    values: Array


class KeyedState:
    """A state by key that is written in place. One for all its writes, on every iteration of a loop run."""

    def __init__(
        self,
        name: str,
        number: int,
        key: tuple[str, ...],
        cache: LoopCache,
        partitions: PartitionMap,
        rank: int,
    ):
        self.name, self.number, self.key = name, number, key
        self.cache, self.partitions, self.rank = cache, partitions, rank
        self.marks = Marks()
        self.version = 0
        self.keys_changed = False  # rows came or went in this iteration, on this rank
        self._held: dict[str, Held] = {}
        self._before: dict[str, Held] | None = None  # of the last commit, while something is written
        self._spare: dict[str, tuple[Column, Held]] = {}  # copies of columns that are not ours yet
        self._log: list[Undo] = []
        self._written: list[Array] = []  # rows, as numbered now
        self._counts: dict[str, tuple[Column, int]] = {}  # rows that are not zero, at the last commit
        self._counted: dict[str, tuple[Column, int]] = {}
        self._structural = 0  # writes of this iteration that may change keys, alike on all ranks
        self._rows_before = 0
        self._reordered = False  # row numbers of the last commit are void
        self._raised = False

    @property
    def nbytes(self) -> int:
        """Bytes held beside the table's own: room to grow, marks, and what can be undone."""
        room = sum(sum(m.nbytes for m in h.memory) - h.view.nbytes for h in self._held.values())
        room += sum(copy.view.nbytes for _, copy in self._spare.values())
        return int(room + self.marks.nbytes + sum(u.rows.nbytes + u.values.nbytes for u in self._log))

    # ------------------------------------------------------------------ writes

    def write(self, write: Write, table: Table, rows: Table) -> Table:
        """The table after the write; raises `UsageError` or `SchemaError` before anything is written."""
        what = f'{type(write).__name__} of "{self.name}" by "{write.rows}"'
        if self._before is None:
            self._before, self._rows_before = dict(self._held), len(table)
        rows = self._own_part(rows, what)
        if isinstance(write, Insert):
            return self._insert(table, rows, what)
        if isinstance(write, Remove):
            return self._remove(table, rows, what)
        names = tuple(write.merge) if isinstance(write, Accumulate) else self._values_of(rows.batch)
        if len(rows):
            self._check_columns(table.batch, rows.batch.select(*self.key, *names), what)
        if isinstance(write, Accumulate):
            return self._accumulate(table, rows, write.merge, what)
        return self._patch(table, rows, names, what)

    def _patch(self, table: Table, rows: Table, names: tuple[str, ...], what: str) -> Table:
        at = self._rows_of(table, rows, what, once=True)
        batch = table.batch
        if len(at):
            batch = self._owned(batch, names, text=False)
            self._written.append(at)
            for name in names:
                batch = self._overwrite(batch, name, at, rows.batch[name], rows.batch.valid(name))
        return self._after(table, batch)

    def _accumulate(self, table: Table, rows: Table, merge: Mapping[str, Aggregator], what: str) -> Table:
        at = self._rows_of(table, rows, what, once=False)
        batch = table.batch
        if len(at):
            for name, aggregator in merge.items():
                if name in self.key:
                    raise UsageError(f'{what}: "{name}" is a key of it, which cannot be merged')
                _check_mergeable(batch, rows.batch, name, aggregator, what)
            batch = self._owned(batch, tuple(merge))
            self._written.append(at)
            for name, aggregator in merge.items():
                column = batch[name]
                self._keep_old(name, column, at)
                with np.errstate(all="ignore"):  # NaN is a value like any other
                    MERGES[aggregator.kind].at(column, at, rows.batch[name])
        return self._after(table, batch)

    def _overwrite(self, batch: Batch, name: str, at: Array, values: Column, valid: Array | None) -> Batch:
        """The batch with some rows of a column written in place; text is made anew."""
        column, mask = batch._columns[name], batch._valid.get(name)
        if valid is not None and mask is None:
            mask = np.ones(len(batch), bool)
            batch = batch.with_valid(**{name: mask})
            self._held[VALID + name] = Held(mask, (mask,))
        if mask is not None:
            self._keep_old(VALID + name, mask, at)
            mask[at] = True if valid is None else valid
        if isinstance(column, Ragged):
            order = np.arange(len(batch))
            order[at] = len(batch) + np.arange(len(at))
            anew = Ragged.concat([column, values]).take(order)
            self._held[name] = Held(anew, (anew.offsets, anew.values))
            return _with_column(batch, name, anew)
        self._keep_old(name, column, at)
        column[at] = values
        return batch

    def _keep_old(self, name: str, column: Array, at: Array) -> None:
        """What is overwritten; of memory that this iteration has copied the table of before is there."""
        known = None if self._before is None else self._before.get(name)
        if known is not None and np.may_share_memory(known.view, column):
            self._log.append(Undo(name, column, at, column.take(at, axis=0)))

    def _insert(self, table: Table, rows: Table, what: str) -> Table:
        self._structural += 1
        new, batch = rows.batch, table.batch
        if not batch.names:
            batch = Batch.empty(new.schema)
        if not len(new):
            return self._after(table, batch)
        self._check_columns(batch, new, what, whole=True)
        keys = new.select(*self.key)
        self._check_own(keys, what)
        index = self.cache.indexes.of(batch.select(*self.key))
        advice = "Patch those rows, or leave them out"
        if any(keys.valid(name) is not None for name in keys.names):
            advice += " (a null is found by a Lookup with nulls=True)"
        _refuse(keys, index.lookup(keys) >= 0, what, "are in it already", advice)
        refuse_twice(keys, what)
        self.cache.indexes.forget(batch.select(*self.key))
        batch = self._appended(batch, new)
        self.cache.indexes.put(KeyIndex, batch.select(*self.key), extended(index, keys))
        return self._after(table, batch, moved=True)

    def _appended(self, batch: Batch, new: Batch) -> Batch:
        masked = [n for n in batch.names if batch.valid(n) is not None or new.valid(n) is not None]
        full = {n: np.ones(len(batch), bool) for n in masked if batch.valid(n) is None}
        batch = self._owned(batch.with_valid(**full) if full else batch, batch.names)
        columns, valid = {}, {}
        for name in batch.names:
            self._held[name] = appended(self._held[name], new[name])
            columns[name] = self._held[name].view
        for name in masked:
            more, mask = new.valid(name), VALID + name
            self._held[mask] = appended(self._held[mask], np.ones(len(new), bool) if more is None else more)
            valid[name] = self._held[mask].view
        return Batch._trusted(columns, valid, len(batch) + len(new))

    def _remove(self, table: Table, rows: Table, what: str) -> Table:
        self._structural += 1
        at = self._rows_of(table, rows, what, once=False)
        if not len(at):
            return self._after(table, table.batch)
        stay = np.ones(len(table), bool)
        stay[at] = False
        batch = table.batch.take(np.flatnonzero(stay))
        for name, column in batch._columns.items():
            self._held[name] = _held_as_is(column)
        for name, mask in batch._valid.items():
            self._held[VALID + name] = Held(mask, (mask,))
        self._reordered = True
        return self._after(table, batch, moved=True)

    def _after(self, table: Table, batch: Batch, moved: bool = False) -> Table:
        """The table after a write: values lose their tokens, and keys where rows came or went."""
        self.keys_changed |= moved
        if moved:
            tokens: Mapping[str, int] = self._key_tokens(batch)
        else:
            tokens = {k: t for k, t in table.tokens.items() if k in self.key}
            if len(tokens) < len(table.tokens):  # what was handed out with the tokens is not handed out again
                batch = batch.select(*batch.names)
        return Table(batch, by_key(*self.key), tokens, version=table.version + 1)

    def _key_tokens(self, batch: Batch) -> Mapping[str, int]:
        if not self.cache.enabled:
            return NO_TOKENS
        of = (self.number, self.version + 1, self._structural)
        return {k: token("structure", *of, k) for k in self.key if k in batch and batch.valid(k) is None}

    # ------------------------------------------------------------------ what is checked

    def _values_of(self, batch: Batch) -> tuple[str, ...]:
        return tuple(n for n in batch.names if n not in self.key)

    def _own_part(self, rows: Table, what: str) -> Table:
        """Of rows that are everywhere those whose keys this rank owns."""
        for k in self.key:
            if k not in rows.batch and len(rows):
                raise SchemaError(
                    f'{what}: the rows lack the key "{k}" (columns: {", ".join(rows.batch.names)})'
                )
        if not rows.everywhere or self.partitions.size == 1 or not len(rows):
            return rows
        return Table(rows.batch.take(self._owners(rows.batch.select(*self.key)) == self.rank), rows.layout)

    def _owners(self, keys: Batch) -> Array:
        return self.partitions.owner_of_hashes(hash_keys(keys))

    def _check_own(self, keys: Batch, what: str) -> None:
        if self.partitions.size > 1:
            stray = self._owners(keys) != self.rank
            _refuse(keys, stray, what, "belong to other ranks", "Shuffle the rows by that key first")

    def _check_columns(self, ours: Batch, theirs: Batch, what: str, whole: bool = False) -> None:
        """The rows' columns must be the table's, in any order, all of them if ``whole``."""
        ours.schema.require(*theirs.names)
        names = [n for n in ours.names if n in theirs]
        unlike = difference(
            never_null(ours.schema if whole else ours.select(*names).schema),
            never_null(theirs.select(*names).schema),
        )
        if unlike:
            raise SchemaError(f"{what}: {unlike} (here: the table; there: the rows); convert with .astype")

    def _rows_of(self, table: Table, rows: Table, what: str, once: bool) -> Array:
        """The row of the table for each of the rows, int64."""
        if not len(rows):
            return np.empty(0, np.int64)
        if rows.rows_of is not None and rows.rows_of.lies_in(table.batch):
            return rows.rows_of.rows
        keys, own = rows.batch.select(*self.key), table.batch.select(*self.key)
        if all(keys[k] is own[k] for k in self.key):
            return np.arange(len(rows))
        at = self.cache.indexes.of(own).lookup(keys)
        if (at < 0).any():
            self._check_own(keys, what)
            _refuse(keys, at < 0, what, "are not in it", "leave those rows out, or Insert them")
        if once and self.marks.first_repeat(at, len(table)) >= 0:
            refuse_twice(keys, what)
        return at

    # ------------------------------------------------------------------ memory

    def _owned(self, batch: Batch, names: Iterable[str], text: bool = True) -> Batch:
        """The batch with these columns (those of text only if asked for) in memory of ours."""
        for name in names:
            column, mask = batch._columns[name], batch._valid.get(name)
            if not self._holds(name, column) and (text or not isinstance(column, Ragged)):
                known, copy = self._spare.pop(name, (None, None))
                self._held[name] = copy if copy is not None and known is column else held(column)
                batch = _with_column(batch, name, self._held[name].view)
            if mask is not None and not self._holds(VALID + name, mask):
                self._held[VALID + name] = held(mask)
                batch = batch.with_valid(**{name: self._held[VALID + name].view})
        return batch

    def make_ready(self, table: Table, name: str) -> None:
        """This column is going to be written: copy it now. A source's array is never written to."""
        column = table.batch._columns.get(name)
        if isinstance(column, np.ndarray) and not self._holds(name, column):
            self._spare[name] = column, held(column)

    def _holds(self, name: str, column: Column) -> bool:
        known = self._held.get(name)
        return known is not None and known.view is column

    def memory(self) -> list[Array]:
        """Arrays that may be overwritten in place: not those of keys, nor text."""
        return [
            h.memory[0]
            for n, h in self._held.items()
            if n.removeprefix(VALID) not in self.key and not isinstance(h.view, Ragged)
        ]

    # ------------------------------------------------------------------ what changed

    def changes(self, old: Table, new: Table) -> Changes | None:
        """Old and new values of what was written in this iteration; None if nothing was, in place."""
        if self._before is None:
            return None
        if self._reordered or any(n not in new.batch for n in self.key) or not self._continues(old, new):
            before, after = side_by_side(Table(self._old(old.batch), old.layout), new, new.batch.names)
            return self._changes(old, new, before, after, len(after))
        n = self._rows_before
        rows = self.marks.distinct(self._written, n)
        before, after = self._old(old.batch, rows), new.batch.take(rows)
        if len(new) > n:
            added = new.batch.slice(n, len(new))
            after = Batch.concat([after, added]) if n else added
            gap = nothing_like(added, self.key)
            before = Batch.concat([before, gap]) if n else gap
        return self._changes(old, new, before, after, len(new))

    def _changes(self, old: Table, new: Table, before: Batch, after: Batch, rows: int) -> Changes:
        def active(name: str) -> int:
            """From the count of the last commit, if that is known."""
            column, (of, count) = new.batch[name], self._counts.get(name, (None, 0))
            if of is not None and of is old.batch._columns.get(name):
                count += int(np.count_nonzero(after[name])) - int(np.count_nonzero(before[name]))
            else:
                count = int(np.count_nonzero(column))
            self._counted[name] = column, count
            return count

        return Changes(before, after, rows, lambda: self._old(old.batch), active)

    def _continues(self, old: Table, new: Table) -> bool:
        """Is the new table the old one, written in place? (No Replace came between.)"""
        fixed = [n for n in new.batch.names if not isinstance(new.batch[n], Ragged)]
        mine = all(self._holds(n, new.batch[n]) or new.batch[n] is old.batch._columns.get(n) for n in fixed)
        return mine and len(new) >= self._rows_before and len(old) == self._rows_before

    def _old(self, old: Batch, rows: Array | None = None) -> Batch:
        """Rows of the table of the last commit (None: all), as they were."""
        out = old.copy() if rows is None else old.take(rows)
        for undo in reversed(self._log):
            name = undo.name.removeprefix(VALID)
            source = (old._columns if name == undo.name else old._valid).get(name)
            if source is None or not np.may_share_memory(source, undo.column):
                continue
            target = (out._columns if name == undo.name else out._valid)[name]
            inside = undo.rows < len(old)
            at, values = undo.rows[inside], undo.values[inside]
            if rows is not None:
                at = np.searchsorted(rows, at)
            target[at] = values
        return out

    # ------------------------------------------------------------------ transactions

    def commit(self, changed: bool) -> dict[int, int]:
        """The iteration stands; ``changed``: rows came or went on any rank."""
        self._raised = changed
        self._counts.update(self._counted)
        self._log, self._written, self._before = [], [], None
        self._counted = {}
        self.keys_changed = self._reordered = False
        return {}

    def settled(self, table: Table) -> Table:
        """The table after the commit: with the keys' new tokens if they changed on any rank."""
        if self._raised:
            tokens = self._key_tokens(table.batch)
            table = Table(table.batch, table.layout, tokens, version=table.version)
            self.version += 1
            self._raised = False
        self._structural = 0
        return table

    def rollback(self) -> None:
        """The iteration never was: values are put back, and an index of more keys was dropped."""
        for undo in reversed(self._log):
            undo.column[undo.rows] = undo.values
        if self._before is not None:
            self._held = self._before
        self._log, self._written, self._before, self._structural = [], [], None, 0
        self._counted = {}
        self.keys_changed = self._reordered = self._raised = False


def keyed_states(
    body: Iterable[Superstep],
    keys: Mapping[str, tuple[str, ...]],
    cache: LoopCache,
    partitions: PartitionMap,
    rank: int,
    first: int = 0,
) -> dict[str, KeyedState]:
    """One `KeyedState` for each state that a superstep writes in place, in the order of the writes; they are
    numbered from ``first`` on.
    """
    names = [w.table for s in body for w in s.writes if isinstance(w, IN_PLACE) and w.table in keys]
    return {
        name: KeyedState(name, number, keys[name], cache, partitions, rank)
        for number, name in enumerate(dict.fromkeys(names), first)
    }


def detached(rows: Table, known: Mapping[str, KeyedState]) -> Table:
    """The rows with columns of their own where they share memory that a write may overwrite."""
    memory = [m for state in known.values() for m in state.memory()]
    if not memory:
        return rows
    batch = rows.batch
    for name, column in batch._columns.items():
        arrays = [m for m in (column, batch._valid.get(name)) if isinstance(m, np.ndarray)]
        if any(np.may_share_memory(a, m) for a in arrays for m in memory):
            batch = _with_column(batch, name, column.copy())
            if name in batch._valid:
                batch = batch.with_valid(**{name: batch._valid[name].copy()})
    if batch is rows.batch:
        return rows
    return Table(
        batch, rows.layout, rows.tokens, rows.block_starts, rows.first_row, rows.rows_total, rows.version,
        rows.rows_of,
    )  # fmt: skip


def _held_as_is(column: Column) -> Held:
    return Held(column, (column.offsets, column.values) if isinstance(column, Ragged) else (column,))


def _with_column(batch: Batch, name: str, column: Column) -> Batch:
    return Batch._trusted({**batch._columns, name: column}, batch._valid, len(batch), batch._schema)


def _check_mergeable(ours: Batch, theirs: Batch, name: str, aggregator: Aggregator, what: str) -> None:
    column, wanted = ours[name], ", ".join(k.upper() for k in MERGES)
    if aggregator.kind not in MERGES:
        raise UsageError(f'{what}: "{name}" is merged by {aggregator.kind}; wanted one of {wanted}')
    if isinstance(column, Ragged) or column.dtype.kind not in "biuf":
        raise SchemaError(f'{what}: "{name}" is {ours.schema[name].describe()}; only numbers can be merged')
    if (aggregator.kind in ("any", "all")) != (column.dtype.kind == "b"):
        raise SchemaError(
            f'{what}: "{name}" is {column.dtype}, merged by {aggregator.kind}; any and all merge bool '
            "columns, sum, min and max numbers"
        )
    if ours.valid(name) is not None or theirs.valid(name) is not None:
        raise SchemaError(f'{what}: "{name}" has nulls, which cannot be merged; leave those rows out')


def _refuse(keys: Batch, bad: Array, what: str, fault: str, advice: str) -> None:
    """Raise `UsageError` that names the first of the bad keys."""
    if bad.any():
        at = int(np.argmax(bad))
        raise UsageError(f"{what}: {int(bad.sum())} keys {fault}, such as {row_text(keys, at)}; {advice}")


def refuse_twice(keys: Batch, what: str) -> None:
    """Raise `UsageError` that names a key which comes twice."""
    numbered = number_keys(keys)
    if len(numbered) < len(keys):
        at = int(numbered.first[int(np.argmax(np.bincount(numbered.codes) > 1))])
        raise UsageError(
            f"{what}: {row_text(keys, at)} stands in more than one row; make keys unique (a Shuffle with "
            "combine does)"
        )
