"""What an owner answers to those who look up keys in its table, and what they make of the answers.

An answer to one rank: flags, a byte per key that it asked for, left out where all are here; then the values
of those that are, packed. Nobody speaks to it but `iterreduce.lookup`; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iterreduce.columns.batch import Batch, Column
from iterreduce.columns.packing import pack, packed_words, unpack
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.routing import as_units, gather
from iterreduce.columns.schema import Schema, never_null
from iterreduce.exchange import ROWS, Arrival, Outgoing
from iterreduce.rowplan import RowPlan


def answer(values: Batch, slots: Sequence[Array], schema: Schema | None) -> Outgoing:
    """The answers to all ranks: ``slots[r]`` are the rows that rank ``r`` asked for, -1: none."""
    found = [s[s >= 0] for s in slots]
    order, rows = np.concatenate(found), np.array([len(f) for f in found], np.int64)
    asked, bounds = np.array([len(s) for s in slots], np.int64), np.append(0, np.cumsum(rows))
    flags = np.where(rows < asked, -(-asked // 8), 0)
    words = flags + packed_words(values, order, bounds, schema) * (rows > 0)

    def fill(buffer: Array, at: Array) -> None:
        for d in range(len(words)):
            begin, behind = int(at[d]), int(at[d] + flags[d])
            if flags[d]:
                buffer[behind - 1] = 0
                buffer[begin:behind].view(np.uint8)[: asked[d]] = slots[d] >= 0
            if rows[d]:
                pack(values, order, int(bounds[d]), int(bounds[d + 1]), buffer, behind, schema)

    return Outgoing(words, rows, fill)


def answered(arrival: Arrival, asked: Array, schema: Schema) -> tuple[Array, Batch]:
    """For each key asked for, in the order of the owners, its place among the values that came, -1: it is
    nowhere; and these values, which share memory with the receive buffers.
    """
    parts, flags = [], []
    found = arrival.headers[:, ROWS].tolist()
    for words, wanted, came in zip(arrival.segments(), asked.tolist(), found, strict=True):
        gap = -(-wanted // 8) if came < wanted else 0
        flags.append(words[:gap].view(np.uint8)[:wanted] if gap else np.ones(wanted, np.uint8))
        if came:
            parts.append(unpack(words[gap:], schema, came))
    values = Batch.concat(parts) if parts and schema else Batch.empty(schema)
    has = np.concatenate(flags).astype(bool)
    return np.where(has, np.cumsum(has) - 1, -1), values


@dataclass(frozen=True)
class PlanBody:
    """The large part of a plan: whom an owner sends which of its rows, and what becomes of this rank's rows.

    ``final``: the record of each row that comes out; ``kept``: which rows those are (None: all);
    ``found``: which of them have a value (None: all).
    """

    slots: tuple[Array, ...]
    final: Array
    kept: Array | None
    found: Array | None
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        some = [a for a in (self.kept, self.found) if a is not None]
        return int(sum(a.nbytes for a in (*self.slots, self.final, *some)))


def write_values(plan: RowPlan, body: PlanBody, table: Batch) -> None:
    """The table's values, once for each rank that needs them, into the send buffer."""
    for cell, view in zip(plan.layout.cells, plan.views, strict=True):
        column = table._columns[cell.name]
        if cell.mask:
            mask = table._valid.get(cell.name)
            column = np.ones(len(table), bool) if mask is None else mask
        source = as_units(column, cell.unit, cell.per_row)
        for first, slots in zip(plan.write_from.tolist(), body.slots, strict=True):
            if len(slots):
                gather(source, slots, view[first : first + len(slots)])


def said(learned: Schema | None, own: Schema | None, has_rows: bool) -> int:
    """What a header says of a schema: its digest; below 0 from a rank without rows; 0 where none is known."""
    if own is None:
        return 0 if learned is None else -learned.digest()
    shown = merged(learned, own).digest()
    return shown if has_rows else -shown


def merged(learned: Schema | None, own: Schema) -> Schema:
    """The schema agreed on before, if this one only lacks nulls that it has; else this one."""
    if learned is None or never_null(learned) != never_null(own):
        return own
    return learned if all(learned[n].nullable or not f.nullable for n, f in own.items()) else own


def side_by_side(rows: Batch, values: Batch) -> Batch:
    return Batch._trusted(
        {**rows._columns, **values._columns}, {**rows._valid, **values._valid}, max(len(rows), len(values))
    )


def nulls(schema: Schema, rows: int) -> Batch:
    """Rows without values."""
    columns: dict[str, Column] = {}
    for name, field in schema.items():
        if field.kind == "fixed":
            columns[name] = np.zeros((rows, *field.shape), field.dtype)
        else:
            columns[name] = Ragged(np.zeros(rows + 1, np.int64), np.empty(0, field.dtype), field.kind)
    return Batch._trusted(columns, {}, rows)
