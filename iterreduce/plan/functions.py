"""Functions of a user as kernels: of groups, of batches with declared columns, row by row, of single records.

What they return is checked against what was said of it. Planning stands elsewhere; who makes these kernels:
`iterreduce.plan.operations` and `iterreduce.plan.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import group_rows
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import SchemaError
from iterreduce.loop import Context
from iterreduce.maps import call
from iterreduce.plan.kernels import side_by_side


@dataclass(frozen=True)
class OfGroups:
    """A user's function of groups: of one table by key, or of several that lie by the same key."""

    function: Callable[..., Batch]
    keys: tuple[str, ...]

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", "groups")

    def run(self, context: Context, *batches: Batch) -> Batch:
        """What it makes of this share."""
        groups: Any = [group_rows(rows, self.keys) for rows in batches]
        return call(self.function, context, groups)


@dataclass(frozen=True)
class Declared:
    """A user's function whose result's columns were told beforehand: name and type (None: not told).

    What comes back must be that, or plans that were made for it would be wrong. Other columns are dropped.
    """

    function: Any
    fields: tuple[tuple[str, Field | None], ...]

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The columns that were told, in their order."""
        made = call(self.function, context, batches)
        if not made.names:
            return made  # nothing came of these rows
        for name, of in self.fields:
            got = made.schema[name]
            alike = of is None or (got.kind, got.dtype, got.shape) == (of.kind, of.dtype, of.shape)
            if of is not None and not alike and len(made):
                raise SchemaError(
                    f'{self.__name__} returned column "{name}" as {got.describe()}; its columns=... say '
                    f"{of.describe()}: return that, or say the other"
                )
            if of is not None and got.nullable and not of.nullable:
                raise SchemaError(
                    f'{self.__name__} returned nulls in column "{name}", of which columns=... say '
                    f"{of.describe()}: fill them, or say Field(..., nullable=True)"
                )
        return made.select(*(name for name, _ in self.fields))


@dataclass(frozen=True)
class RowByRow:
    """A user's function that makes a row of each row; columns that it does not touch stand beside them."""

    function: Callable[..., Batch]
    columns: tuple[str, ...]

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", "rows")

    @property
    def keeps(self) -> tuple[tuple[str, str], ...]:
        """The columns that are passed on."""
        return tuple((name, name) for name in self.columns)

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The columns kept, then what the function makes."""
        rows, made = batches[0], call(self.function, context, batches)
        if len(made) != len(rows):
            raise SchemaError(
                f"{self.__name__} made {len(made)} rows of {len(rows)}: with keeps=... wanted one of each"
            )
        names = tuple((name, name) for name in made.names if name not in self.columns)
        return side_by_side(rows.select(*self.columns), made, names)


@dataclass(frozen=True)
class RowNumber:
    """Rows beside their number among all rows of all ranks, from 0."""

    name: str
    keeps: tuple[tuple[str, str], ...]
    __name__ = "row number"

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The same rows with one more column."""
        (rows,) = batches
        return rows.with_columns(**{self.name: context.first_row + np.arange(len(rows))})


@dataclass(frozen=True)
class PerRecord:
    """A function of one record, called for each: plain Python."""

    function: Callable[..., Iterable[Any]]
    fields: tuple[tuple[str, Field | None], ...] = ()

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", "record")

    def __call__(self, rows: Batch) -> Batch:
        found = [made for record in records(rows) for made in self.function(record)]
        if not found and any(field is None for _, field in self.fields):
            return Batch()  # no columns: other ranks and pieces say which there are
        for made in found:
            if not isinstance(made, dict):
                raise SchemaError(
                    f"flat_map: {self.__name__} gave {made!r}; wanted a dict of column names and values"
                )
        fields = dict(self.fields) or dict.fromkeys(found[0] if found else ())
        columns, valid = {}, {}
        for name, of in fields.items():
            values = [made[name] for made in found]
            columns[name] = _column(values, of)
            if any(value is None for value in values):
                valid[name] = np.array([value is not None for value in values], bool)
        return Batch.from_dict(columns, valid)


class Record:
    """One row with its columns as attributes."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, Any]):
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no column {name!r} (columns: {', '.join(self._values)})") from None

    def __repr__(self) -> str:
        return f"Record({', '.join(f'{n}={v!r}' for n, v in self._values.items())})"


def records(rows: Batch) -> Iterator[Record]:
    """The rows one by one, as Python values; a null is None."""
    columns = {}
    for name in rows.names:
        column, valid = rows[name], rows.valid(name)
        values = (
            column.to_list()
            if isinstance(column, Ragged)
            else list(column)
            if column.ndim > 1
            else column.tolist()
        )
        columns[name] = (
            values if valid is None else [v if ok else None for v, ok in zip(values, valid, strict=True)]
        )
    for i in range(len(rows)):
        yield Record({name: values[i] for name, values in columns.items()})


def _column(values: list[Any], of: Field | None) -> Any:
    """Python values as a column, of a type if one is declared; something stands for each null."""
    some = next((value for value in values if value is not None), None)
    if not values and of is not None:
        return Batch.empty(Schema({"column": of}))["column"]
    blank = type(some)() if isinstance(some, str | bytes | int | float) else 0
    if some is None and of is not None and of.kind != "fixed":
        blank = "" if of.kind == "text" else b""
    filled = [blank if value is None else value for value in values]
    if isinstance(filled[0], str | bytes):
        return filled
    return np.array(filled, of.dtype if of is not None else None)
