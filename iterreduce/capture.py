"""What a checkpoint holds of a loop run, and how a run takes it up again.

Held are, of each loop that is open, its states, the results of inner loops that its body still needs, its
carry and its position, and the rows that were sunk so far. Everything else is made again as it was made at
the start: sources, prepared tables, plans.

Rows are written as they lie on the ranks. On as many ranks, with the same partitions, each rank takes up its
own rows in their own order, so a run that was interrupted has the same bits as one that was not. On others,
rows by key go to their owners by the shuffle that loads data, and rows by block are cut as their source is.
A column that is equal, on all ranks, to the one that the state began with takes its place: its lineage goes
on, and with it the plans that hang on it.

Who speaks to it: `iterreduce.checkpoint`. Nothing here writes or reads files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from iterreduce.agreement import Guard, raise_agreed
from iterreduce.carrying import Gain
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import KeyIndex, number_keys
from iterreduce.columns.ragged import Ragged
from iterreduce.errors import CheckpointError
from iterreduce.fixpoint import Outcome
from iterreduce.levels import Level, Standing
from iterreduce.sources.blocks import Blocks
from iterreduce.table import BY_BLOCK, NO_TOKENS, Layout, Table, everywhere

Shuffled = Callable[[str, tuple[str, ...], Table], Table]


class Saved(Protocol):
    """What is read: `iterreduce.saving.reading.Checkpoint`, or `iterreduce.copies.Remembered`."""

    facts: Any
    tables: Mapping[str, Any]

    def bring(self, group: Group, table: str, lo: int, hi: int) -> None:
        """Have global rows ``[lo, hi)`` where this rank can read them next. Collective."""

    def read(self, table: str, lo: int, hi: int) -> Batch:
        """Global rows ``[lo, hi)``. Local."""


@dataclass(frozen=True)
class Captured:
    """Tables by the names under which they are stored, and facts that are the same on all ranks."""

    tables: dict[str, Table]
    facts: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's rows."""
        return sum(table.batch.nbytes for table in self.tables.values())


# ---------------------------------------------------------------------- taking


def captured(level: Level, outputs: Mapping[str, list[Table]]) -> Captured:
    """What lasts of a run whose innermost open loop is ``level``. Local; nothing is copied."""
    tables: dict[str, Table] = {}
    levels = [_standing_facts(at, tables) for at in level.chain]
    sunk = {}
    for name, parts in outputs.items():
        full = [t.batch for t in parts if len(t)] or [t.batch for t in parts[:1]]
        if full:
            whole = Table(Batch.concat(full), parts[0].layout)
            rows = Table(Batch(rows=np.array([len(t) for t in parts], np.int64)), BY_BLOCK)
            counts = stored(f"output {name}: rows of each part", rows, tables)["stored"]
            sunk[name] = {**stored(f"output {name}", whole, tables), "parts": counts}
    return Captured(tables, {"levels": levels, "outputs": sunk})


def _standing_facts(level: Level, tables: dict[str, Table]) -> dict[str, Any]:
    standing = level.standing
    assert standing is not None
    front = "" if level.parent is None else f"{level.label}: "
    names = [*level.loop.state]
    if standing.at:  # in the middle of its body
        names += [name for inner in level.inner for name in (inner.loop.name, *inner.loop.gives)]
        names += level.loop.feeds
    bound = standing.bindings
    before = {rule.table for rule in level.loop.until.rules if rule.table} if standing.at else set()
    return {
        "loop": level.label,
        "iteration": standing.iteration,
        "at": standing.at,
        "runs": standing.runs,
        "residual": _number(standing.residual),
        "outcome": standing.outcome.name if standing.outcome else None,
        "carry": {name: _number(n) for name, n in standing.carry.items()},
        "gained": {name: [_number(g.value), g.rows] for name, g in standing.gained.items()},
        "tables": {n: stored(front + n, bound[n], tables) for n in names if n in bound},
        "before": {
            n: stored(f"{front}{n} before", standing.before[n], tables)
            for n in sorted(before)
            if n in standing.before
        },
    }


def stored(name: str, table: Table, tables: dict[str, Table]) -> dict[str, Any]:
    """Put a table under a name of its own; returns what the facts say of it."""
    while name in tables:  # a state may be called "output log"
        name += "'"
    tables[name] = table
    layout = table.layout
    return {"stored": name, "layout": layout.kind, "keys": list(layout.keys), "rows": table.rows_total}


def _number(value: Any) -> Any:
    """As JSON can hold it, bit for bit.

    >>> _value(_number(0.1)), _value(_number(True)), _value(_number(None)), _value(_number(float("inf")))
    (0.1, True, None, inf)
    """
    return {"float": float(value).hex()} if isinstance(value, float) else value


def _value(told: Any) -> Any:
    return float.fromhex(told["float"]) if isinstance(told, dict) else told


def copied(table: Table, into: Table | None) -> Table:
    """A copy, in the memory of an earlier copy where that is as large; columns that have not changed since,
    as their tokens say, are those of the earlier one.

    >>> first = copied(Table(Batch(x=np.arange(3), y=np.arange(3)), BY_BLOCK, {"y": 7}), None)
    >>> again = copied(Table(Batch(x=np.arange(3) + 1, y=np.arange(3)), BY_BLOCK, {"y": 7}), first)
    >>> again.batch["x"] is first.batch["x"], again.batch["y"] is first.batch["y"], again.batch["x"].tolist()
    (True, True, [1, 2, 3])
    """
    batch, columns, valid = table.batch, {}, {}
    known = {} if into is None else into.batch._columns
    tokens = {} if into is None or len(into) != len(table) else into.tokens
    for name in batch.names:
        column, token = batch._columns[name], table.tokens.get(name)
        if token is not None and tokens.get(name) == token:
            columns[name] = known[name]
        elif isinstance(column, Ragged):
            columns[name] = column.copy()
        else:
            columns[name] = _array_copied(column, known.get(name))
        mask = batch._valid.get(name)
        if mask is not None:
            valid[name] = mask.copy()
    return replace(table, batch=Batch._trusted(columns, valid, len(batch)))


def _array_copied(column: Any, known: Any) -> Any:
    if isinstance(known, np.ndarray) and known.shape == column.shape and known.dtype == column.dtype:
        np.copyto(known, column)
        return known
    return np.array(column, order="C")


# ---------------------------------------------------------------------- taking up


class Restorer:
    """Puts what was saved into a run that has just started. ``shuffled`` brings rows by key to their
    owners.
    """

    def __init__(self, group: Group, saved: Saved, partitions: int, shuffled: Shuffled, guard: Guard):
        self.group, self.saved, self.shuffled, self.guard = group, saved, shuffled, guard
        self.partitions = partitions

    def standing(self, level: Level, fresh: Standing, number: int) -> Standing:
        """How the level stood, from how it stands at its start. Collective."""
        facts = self.saved.facts["levels"][number]
        _check_level(level, facts)
        bindings = dict(fresh.bindings)
        for name, entry in facts["tables"].items():
            bindings[name] = self.table(entry, fresh.bindings.get(name), name)
        before = dict(bindings)
        for name, entry in facts["before"].items():
            before[name] = self.table(entry, bindings.get(name), name)
        carry = {name: _value(n) for name, n in facts["carry"].items()}
        outcome = facts["outcome"]
        return Standing(
            bindings,
            before,
            carry,
            {name: Gain(_value(value), rows) for name, (value, rows) in facts["gained"].items()},
            facts["iteration"],
            facts["at"],
            facts["runs"],
            _value(facts["residual"]),
            Outcome[outcome] if outcome else None,
        )

    def output(self, name: str) -> list[Table]:
        """The rows that were sunk into an output: this rank's share. Collective."""
        entry = self.saved.facts["outputs"].get(name)
        if entry is None:
            return []
        if entry["layout"] == "everywhere":
            return [self.table(entry, None, name)]
        written, parts = (self.saved.tables[entry[what]] for what in ("stored", "parts"))
        ranks = len(written.rank_rows)
        first, last = (ranks * rank // self.group.size for rank in (self.group.rank, self.group.rank + 1))
        batch = self._read(entry["stored"], *written.written_by(first, last))
        rows = self._read(entry["parts"], 0, parts.rows)["rows"].reshape(ranks, -1)
        cut = self.guard.run(_by_part, batch, rows[first:last])
        self._agreed(lambda: batch)
        layout = Layout(entry["layout"], tuple(entry["keys"]))
        return [Table(part, layout) for part in cut or ()]

    def rows(self, stored: str) -> Batch:
        """All rows of a saved table, on all ranks. Collective."""
        return self._read(stored, 0, self.saved.tables[stored].rows)

    def table(self, entry: Mapping[str, Any], fresh: Table | None, name: str) -> Table:
        """A saved table on these ranks; ``fresh``: the one that stands in its place now. Collective."""
        stored, layout = entry["stored"], Layout(entry["layout"], tuple(entry["keys"]))
        if layout.kind == "everywhere":
            table = everywhere(self.rows(stored))
        else:
            table = self._share(stored, layout, entry["rows"], fresh, name)
        return self._continued(table, fresh)

    def _share(self, stored: str, layout: Layout, rows: int, fresh: Table | None, name: str) -> Table:
        like = fresh if layout == BY_BLOCK and fresh is not None and fresh.layout == BY_BLOCK else None
        lo, hi = self._own(stored, like)
        batch = self._read(stored, lo, hi)
        table = Table(batch, layout, NO_TOKENS, first_row=lo if rows >= 0 else 0, rows_total=rows)
        if layout.kind == "block" and like is not None and self._cut_alike(like, len(batch)):
            return replace(
                table, block_starts=like.block_starts, first_row=like.first_row, rows_total=like.rows_total
            )
        if layout.kind == "key" and layout.keys and not self._same_ranks(stored):
            moved = self.shuffled(name, layout.keys, replace(table, layout=BY_BLOCK))
            ordered = self.guard.run(_in_order_of, fresh, moved.batch, layout.keys)
            return replace(moved, batch=moved.batch if ordered is None else ordered, tokens=NO_TOKENS)
        return table

    def _same_ranks(self, stored: str) -> bool:
        written = self.saved.tables[stored].rank_rows
        return len(written) == self.group.size and self.saved.facts["partitions"] == self.partitions

    def _own(self, stored: str, like: Table | None) -> tuple[int, int]:
        """Which of the saved rows this rank reads."""
        info, rank, size = self.saved.tables[stored], self.group.rank, self.group.size
        if self._same_ranks(stored):
            own: tuple[int, int] = info.written_by(rank, rank + 1)
            return own
        if like is not None and like.rows_total == info.rows:  # cut as its source is
            return like.first_row, like.first_row + len(like)
        blocks = Blocks.of_rows(info.rows)
        assert blocks.starts is not None
        first, last = blocks.owned(rank, size)
        return int(blocks.starts[first]), int(blocks.starts[last])

    def _cut_alike(self, like: Table, rows: int) -> bool:
        """Are the rows, on all ranks, as many as those of that table? Collective."""
        return not self.group.agree_any(len(like) != rows)

    def _continued(self, table: Table, fresh: Table | None) -> Table:
        """With the columns, and their tokens, that have not changed since the start. Collective."""
        names = sorted(fresh.tokens) if fresh is not None else []  # alike on all ranks
        unlike = np.ones(len(names) + 1, np.int64)
        self.guard.run(self._compare, table, fresh, names, unlike)
        unlike[-1] = self.guard.failure is not None
        self.group.allreduce(unlike, "max")
        if unlike[-1]:
            raise_agreed(self.group, self.guard.failure)
        same = [name for name, other in zip(names, unlike.tolist(), strict=False) if not other]
        if not same or fresh is None:
            return table
        batch = table.batch
        if all(name in batch for name in same):
            columns = {**batch._columns, **{name: fresh.batch._columns[name] for name in same}}
            batch = Batch._trusted(columns, batch._valid, len(batch))
        return replace(table, batch=batch, tokens={name: fresh.tokens[name] for name in same})

    @staticmethod
    def _compare(table: Table, fresh: Table | None, names: Iterable[str], unlike: Any) -> None:
        if fresh is None or len(fresh) != len(table):
            return
        for i, name in enumerate(names):
            old, new = fresh.batch._columns.get(name), table.batch._columns.get(name)
            if len(table) == 0:
                unlike[i] = 0
            elif old is not None and new is not None and table.batch.valid(name) is None:
                unlike[i] = not _equal(old, new)

    def _read(self, table: str, lo: int, hi: int) -> Batch:
        """Rows of a saved table. Collective."""
        self.saved.bring(self.group, table, lo, hi)
        return self._agreed(self.saved.read, table, lo, hi)

    def _agreed(self, work: Callable[..., Batch], *args: Any) -> Batch:
        """``work(*args)`` of all ranks, or the same error on all. Collective."""
        found = self.guard.run(work, *args)
        if self.group.agree_any(self.guard.failure is not None):
            raise_agreed(self.group, self.guard.failure)
        assert found is not None
        return found


def _by_part(batch: Batch, rows: Any) -> list[Batch]:
    """Rows of several ranks, each of which wrote part after part, as the parts. ``rows``: int64 ``(ranks,
    parts)``.

    >>> [part["x"].tolist() for part in _by_part(Batch(x=np.arange(5)), np.array([[1, 2], [2, 0]]))]
    [[0, 3, 4], [1, 2]]
    """
    if len(rows) > 1:
        parts = np.tile(np.arange(rows.shape[1]), len(rows))
        batch = batch.take(np.argsort(np.repeat(parts, rows.reshape(-1)), kind="stable"))
    ends = np.cumsum(rows.sum(axis=0)).tolist()
    return [batch.slice(lo, hi) for lo, hi in zip([0, *ends], ends, strict=False)]


def _check_level(level: Level, facts: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless these facts are of a loop like this one."""
    loop, kinds = level.loop, {"int64": int, "float64": float, "bool": bool}
    carried = {name: type(_value(n)) for name, n in facts["carry"].items()}
    for what, right in (
        ("states", set(loop.state) <= set(facts["tables"])),
        ("carry", carried == {name: kinds[carry.dtype] for name, carry in loop.carry.items()}),
        ("gains", set(facts["gained"]) <= set(loop.carry)),
        ("position", facts["at"] <= len(level.steps)),
    ):
        if not right:
            raise CheckpointError(f'the {what} of the loop "{level.label}" are not those that were saved')


def _in_order_of(fresh: Table | None, batch: Batch, keys: tuple[str, ...]) -> Batch:
    """Rows in the order of those that the state began with, where they have the same, distinct keys."""
    if fresh is None or not len(batch) or len(fresh) != len(batch) or any(k not in fresh.batch for k in keys):
        return batch
    numbered = number_keys(batch.select(*keys))
    if len(numbered) < len(batch):
        return batch
    at = KeyIndex(batch.select(*keys)).lookup(fresh.batch.select(*keys))
    return batch if (at < 0).any() else batch.take(at)


def _equal(old: Any, new: Any) -> bool:
    """Bit for bit."""
    if isinstance(old, Ragged) or isinstance(new, Ragged):
        return isinstance(old, Ragged) and isinstance(new, Ragged) and bool(old.equals(new))
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    a, b = np.ascontiguousarray(old), np.ascontiguousarray(new)
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))
