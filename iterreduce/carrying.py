"""The carry at work: numbers that all ranks share from one iteration to the next.

A rank folds the rows of its share to a *gain*: a value and how many rows it stands for. Gains ride on the
control reduction as two int64 words each and are folded in rank order, so all ranks get the same bits.
Nothing here communicates.

How it can go wrong: an int64 carry wraps around beyond 64 bits, as NumPy's sums do. MIN and MAX of no rows
leave the number as it was; SUM and COUNT of none are 0, ANY is False and ALL is True.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.errors import SchemaError
from iterreduce.loop import Accumulate, Carry
from iterreduce.table import Table, everywhere

Number = int | float | bool
GAIN_WORDS = 2  # the value's bits, and rows


class Gain(NamedTuple):
    """What rows come to: their value, and how many they are."""

    value: int | float
    rows: int


NONE = {"sum": 0, "count": 0, "any": 0, "all": 1, "min": 0, "max": 0}


def nothing_gained(carry: Carry) -> Gain:
    """The gain of no rows."""
    return Gain(NONE[carry.aggregator.kind], 0)


def gain_of(write: Accumulate, carry: Carry, table: Table, rank: int) -> Gain:
    """What this rank's share of the rows comes to; rows that are everywhere count on rank 0 only."""
    if table.everywhere and rank:
        return nothing_gained(carry)
    kind = carry.aggregator.kind
    if kind == "count" and carry.aggregator.column is None:
        return Gain(len(table), len(table))
    values = _column(write, carry, table.batch)
    if kind == "count":
        return Gain(len(values), len(values))
    if len(values) == 0:
        return nothing_gained(carry)
    return Gain(_folded(kind, values, carry.dtype), len(values))


def _folded(kind: str, values: Array, dtype: str) -> int | float:
    if kind in ("any", "all"):
        return int(values.any() if kind == "any" else values.all())
    fold = {"sum": np.add, "min": np.minimum, "max": np.maximum}[kind]
    wide: int | float = fold.reduce(values.astype(dtype, copy=False)).item()
    return wide


def _column(write: Accumulate, carry: Carry, rows: Batch) -> Array:
    name = str(carry.aggregator.column or "") or (write.table if write.table in rows else rows.names[0])
    if name not in rows or (name != carry.aggregator.column and name != write.table and len(rows.names) > 1):
        raise SchemaError(
            f'accumulating "{write.rows}" into the carry "{write.table}": wanted a column of that name, or '
            f"one column in all, got {', '.join(rows.names) or 'none'}"
        )
    column, mask = rows[name], rows.valid(name)
    kinds = {"bool": "b", "int64": "bi", "float64": "biuf"}[carry.dtype]
    if carry.aggregator.kind != "count" and (
        isinstance(column, Ragged) or column.ndim != 1 or column.dtype.kind not in kinds
    ):
        raise SchemaError(
            f'accumulating "{name}" of "{write.rows}" into the carry "{write.table}": it is {carry.dtype}, '
            f"got {rows.schema[name].describe()}; convert the column, or declare Carry(..., dtype=...)"
        )
    if isinstance(column, Ragged):  # counted only
        return np.arange(len(rows)) if mask is None else np.flatnonzero(mask)
    values: Array = column if mask is None else column[mask]
    return values


def joined(carry: Carry, one: Gain, other: Gain) -> Gain:
    """Both together, in this order.

    >>> from iterreduce.columns.aggregators import MIN
    >>> joined(Carry(MIN), Gain(3.0, 1), Gain(0.0, 0))
    Gain(value=3.0, rows=1)
    """
    kind = carry.aggregator.kind
    rows = one.rows + other.rows
    if kind in ("min", "max") and not (one.rows and other.rows):
        return one if one.rows else other
    if kind in ("sum", "count"):
        total = one.value + other.value
        return Gain(total if isinstance(total, float) else _wrapped(total), rows)
    if kind in ("any", "all"):
        return Gain(one.value | other.value if kind == "any" else one.value & other.value, rows)  # type: ignore[operator]
    fold = np.minimum if kind == "min" else np.maximum  # a NaN stays
    return Gain(fold(one.value, other.value).item(), rows)


def _wrapped(total: int) -> int:
    return (total + 2**63) % 2**64 - 2**63


def put(words: Array, at: int, carry: Carry, gain: Gain) -> None:
    """Write a gain as words of the control reduction."""
    words[at] = np.float64(gain.value).view(np.int64) if carry.dtype == "float64" else gain.value
    words[at + 1] = gain.rows


def fold_ranks(carry: Carry, words: Array) -> Gain:
    """The gain of all ranks, from int64[ranks, 2], in rank order."""
    floats = carry.dtype == "float64"
    values = np.ascontiguousarray(words[:, 0]).view(np.float64 if floats else np.int64).tolist()
    total = nothing_gained(carry)
    for value, rows in zip(values, words[:, 1].tolist(), strict=True):
        if rows:
            total = joined(carry, total, Gain(value, rows)) if total.rows else Gain(value, rows)
    return total


def after(carry: Carry, number: Number, gain: Gain | None) -> Number:
    """The number that the next iteration sees; ``gain`` None: nothing was accumulated."""
    if gain is None or (carry.aggregator.kind in ("min", "max") and gain.rows == 0):
        return number
    if carry.keep:
        gain = joined(carry, Gain(number, 1), gain)
    return as_number(carry, gain.value)


def as_number(carry: Carry, value: Any) -> Number:
    """The value as what the carry holds: int, float or bool."""
    out: Number = {"int64": int, "float64": float, "bool": bool}[carry.dtype](value)
    return out


def initial_numbers(carries: Mapping[str, Carry]) -> dict[str, Number]:
    """The carry before the first iteration."""
    return {name: as_number(c, c.initial) for name, c in carries.items()}


def tables_of(carries: Mapping[str, Carry], numbers: Mapping[str, Number]) -> Iterable[tuple[str, Table]]:
    """Each number as a table of one row, the same on all ranks: its column ``value``."""
    for name, carry in carries.items():
        yield name, everywhere(Batch(value=np.array([numbers[name]], carry.dtype)))
