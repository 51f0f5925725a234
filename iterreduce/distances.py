"""How far a state's rows moved: old and new rows side by side, and one number for each pair.

Rows everywhere or by block stand beside each other by position; rows by key by their key, and a row that is
on one side only stands beside nothing. Sums over rows and ranks are the business of `iterreduce.fixpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import KeyIndex
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.errors import InUserCode, SchemaError
from iterreduce.table import Table, read_only

PerRow = Literal["l1", "l2", "max", "changed"]
FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Changes:
    """What of a state was written in place: ``old`` and ``new`` values of those rows, side by side.

    A row that came or went stands beside nothing. ``rows``: how many rows there are in all. ``before``: the
    whole state as it was (copied when asked for). ``active``: how many rows of a column are not zero.
    """

    old: Batch
    new: Batch
    rows: int
    before: Callable[[], Batch]
    active: Callable[[str], int]


def side_by_side(old: Table, new: Table, columns: tuple[str, ...]) -> tuple[Batch, Batch]:
    """Old and new rows paired: by position, or by key where the layout has one. A missing side is zeros."""
    layout, before, after = new.layout, old.batch, new.batch
    ours, theirs, moved = before._columns, after._columns, False
    for key in layout.keys:
        if key not in ours or ours[key] is not theirs.get(key):
            moved = True
    if not moved or layout.kind != "key" or _same_keys(before, after, layout.keys):
        if before._length != after._length and columns:
            raise SchemaError(
                f"the distance compares rows by position, but the state had {len(old)} rows and has "
                f"{len(new)}; give the state a key, "
                "or use ir.Unchanged() or ir.Empty()"
            )
        return before, after
    return _matched(before, after, layout.keys)


def _same_keys(old: Batch, new: Batch, keys: tuple[str, ...]) -> bool:
    return len(old) == len(new) and old.select(*keys).equals(new.select(*keys))


def _matched(old: Batch, new: Batch, keys: tuple[str, ...]) -> tuple[Batch, Batch]:
    at = KeyIndex(old.select(*keys)).lookup(new.select(*keys))
    here = at >= 0
    gone = np.ones(len(old), bool)
    gone[at[here]] = False
    left = Batch.concat([old.take(at[here]), nothing_like(new.take(~here), keys), old.take(gone)])
    right = Batch.concat([new.take(here), new.take(~here), nothing_like(old.take(gone), keys)])
    return left, right


def nothing_like(rows: Batch, keys: tuple[str, ...]) -> Batch:
    """The same keys with zeros beside them, which are marked as no values: they differ from every value."""
    values = [n for n in rows.names if n not in keys]
    zeros = {n: np.zeros_like(rows[n]) for n in values if not isinstance(rows[n], Ragged)}
    nothing = np.zeros(len(rows), bool)
    return rows.with_columns(**zeros).with_valid(**dict.fromkeys(values, nothing))


def row_distance(per_row: PerRow, name: str, old: Batch, new: Batch, equal_is_zero: bool = False) -> Array:
    a, b = old[name], new[name]
    if isinstance(a, Ragged) or per_row == "changed":
        return (
            _row_changed(name, per_row, a, b)
            if not (old._valid or new._valid)
            else _null_changed(name, per_row, old, new)
        )
    if a.dtype.kind not in "biuf":
        raise SchemaError(
            f'a distance needs numbers; column "{name}" is {a.dtype} (use ir.changed("{name}"))'
        )
    diff = b - a if a.dtype == b.dtype == FLOAT64 else np.subtract(b, a, dtype=np.float64)
    if equal_is_zero:
        diff[a == b] = 0
    flat: Array = diff if diff.ndim == 1 else diff.reshape(len(diff), math.prod(diff.shape[1:]))
    if flat.ndim == 1:
        np.abs(flat, out=flat)
        return flat
    if per_row == "l2":
        norms: Array = np.sqrt(np.einsum("ij,ij->i", flat, flat))
        return norms
    np.abs(flat, out=flat)
    rows: Array = flat.sum(axis=1) if per_row == "l1" else flat.max(axis=1, initial=0.0)
    return rows


def _row_changed(name: str, per_row: str, a: Any, b: Any) -> Array:
    if per_row != "changed":
        raise SchemaError(
            f'a distance needs numbers; column "{name}" holds {a.kind} (use ir.changed("{name}"))'
        )
    if isinstance(a, Ragged):
        return a.differs(b).astype(np.float64)
    differs = a != b
    if a.dtype.kind in "fc":
        differs &= ~(np.isnan(a) & np.isnan(b))
    if differs.ndim > 1:
        differs = differs.reshape(len(a), math.prod(a.shape[1:])).any(axis=1)
    rows: Array = differs.astype(np.float64)
    return rows


def _null_changed(name: str, per_row: str, old: Batch, new: Batch) -> Array:
    """A null equals a null, whatever lies under it, and differs from every value."""
    every = np.ones(len(new), bool)
    before, after = (every if m is None else m for m in (old.valid(name), new.valid(name)))
    out: Array = np.where(before & after, _row_changed(name, per_row, old[name], new[name]), before != after)
    return out.astype(np.float64)


def combined(per_row: PerRow, parts: Sequence[Array]) -> Array:
    if per_row != "l1" and per_row != "l2":
        largest: Array = np.maximum.reduce(list(parts))
        return largest
    rows = np.zeros(len(parts[0]))
    for part in parts:  # one after the other: np.sum adds a single row in another order than many
        rows += part * part if per_row == "l2" else part
    return np.sqrt(rows, out=rows) if per_row == "l2" else rows


def asked(function: Callable[[Batch, Batch], Any], old: Batch, new: Batch) -> Any:
    """What a user's function says of two versions of a state, which it cannot change."""
    views = [
        Batch._trusted({n: read_only(b[n]) for n in b.names}, b._valid, len(b), b._schema) for b in (old, new)
    ]
    try:
        return function(*views)
    except BaseException as error:  # whatever it is, the other ranks are waiting in the control reduction
        raise InUserCode(error) from error


def checked_rows(rows: Any, n: int) -> Array:
    out = np.asarray(rows, dtype=np.float64)
    if out.shape != (n,):
        raise SchemaError(
            f"the distance function gave shape {out.shape}: wanted one number for each of {n} rows"
        )
    return out
