"""One matrix of many columns: what a program that wants points ``x`` gets from a table ``a,b,c``.

It wraps another source and reads no file itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema, missing_column
from iterreduce.errors import InputError
from iterreduce.sources.agreement import root_decides
from iterreduce.sources.asked import Bound, Peek, checked_bounds, checked_columns, hint, in_words, only
from iterreduce.sources.blocks import Blocks, Source, changed, row_in_files
from iterreduce.sources.wrapping import Wrapping

if TYPE_CHECKING:
    from iterreduce.collectives import Group


class StackedSource(Wrapping):
    """Column `name` as a float matrix of shape (rows, columns), whatever columns the wrapped source has.

    A column of that name is taken if its rows are vectors, or if it is the only column. Otherwise all
    columns, in file order, become the matrix: a table with the header ``x,y,z`` means points in space, not
    the column x, and one with ``x,y`` and a word under y is a mistake, not points on a line. Columns in
    `keep`, where there are such, stay beside the matrix and are no part of it. A float64 or float32 matrix is
    passed on as it is, other numbers become float64. Columns of text are refused by `open`, and empty cells
    by `open` or `read`, with `InputError`.

    `columns` names columns as they come out: who does not want the matrix does not read its columns.
    """

    schema: Schema
    token: str
    blocks: Blocks

    def __init__(self, source: Source, name: str = "x", keep: Sequence[str] = ()):
        self.source, self.column, self.name = source, name, source.name
        self._whole = source  # before it is decided which of its columns are read
        self._wanted: tuple[str, ...] | None = None
        self._narrow: list[str] | None = None
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        self.rereadable = source.rereadable
        self._stacked: list[str] | None = None

    def open(self, group: Group) -> None:
        """Open the wrapped source and decide what to stack. Collective."""
        narrow = None if self._wanted is None else root_decides(group, self._narrowed)
        if narrow != self._narrow:  # opened again, it is the same source
            self.source = self._whole if narrow is None else self._whole.columns(narrow)
            self._narrow = narrow
        self.source.open(group)
        found = self.source.schema
        self.token, self.blocks = self.source.token, self.source.blocks
        stacks = narrow is None or self.column in (self._wanted or ())
        self.schema = self._project(self._made(found) if stacks else found)

    def _made(self, found: Schema) -> Schema:
        """The columns as they come out; notes what is stacked."""
        self._stacked = None
        chosen = self._chosen(Schema({n: f for n, f in found.items() if n not in self.keep}))
        beside = {name: field for name, field in found.items() if name not in chosen}
        if list(chosen) == [self.column] and _is_matrix(chosen[self.column]):
            return found
        self._refuse_others(chosen)
        self._stacked = list(chosen)
        width = sum(int(np.prod(f.shape, dtype=np.int64)) for f in chosen.values())
        self.token += f"-stacked-{self.column}-of-{','.join(chosen)}"
        return Schema({self.column: Field("fixed", np.dtype(np.float64), (width,)), **beside})

    def _project(self, schema: Schema) -> Schema:
        if self._wanted is None:
            return schema
        for name in self._wanted:
            if name not in schema:
                raise InputError(f"{self.name}: {missing_column(name, schema)}")
        self.token += f"-columns-{','.join(self._wanted)}"
        return Schema({name: schema[name] for name in self._wanted})

    # -- before it is opened

    def _matrix_columns(self, found: Peek) -> list[str] | None:
        """The columns that make the matrix; None where only opening tells. Local."""
        parts = [name for name in found if name not in self.keep]
        if self.column not in parts or len(parts) == 1:
            return parts
        field = found[self.column]
        return None if field is None else [self.column] if field.shape else parts

    def _narrowed(self) -> list[str] | None:
        """The columns of the wrapped source that must be read; None: all, or nobody knows. Local."""
        found, wanted = self._whole.peek(), self._wanted or ()
        parts = None if found is None else self._matrix_columns(found)
        if found is None or (parts is None and self.column not in wanted):
            return None
        if parts is None:  # what is kept is no part of it
            return [name for name in found if name in wanted or name not in self.keep]
        out = {self.column, *(name for name in found if name not in parts)}
        if not out.issuperset(wanted):
            return None
        return [
            n for n in found if n in (parts if self.column in wanted else ()) or n in {*wanted} - {*parts}
        ]

    def peek(self) -> Peek | None:
        """The matrix and what stands beside it, as far as headers tell. Local."""
        return hint(self._peeked)

    def _peeked(self) -> Peek | None:
        found = self._whole.peek()
        parts = None if found is None else self._matrix_columns(found)
        if found is None or parts is None:
            return None
        field = found.get(self.column)
        if parts == [self.column] and field is not None and _is_matrix(field):
            return only(found, self._wanted)
        fields = [field for field in map(found.get, parts) if field is not None]
        width = sum(int(np.prod(field.shape, dtype=np.int64)) for field in fields)
        made = Field("fixed", np.dtype(np.float64), (width,)) if len(fields) == len(parts) else None
        beside = {name: field for name, field in found.items() if name not in parts}
        return only({self.column: made, **beside}, self._wanted)

    @property
    def asked(self) -> str:
        """Which columns and rows are read, in words."""
        return " of ".join(filter(None, (in_words(self._wanted, ()), self._whole.asked)))

    # -- what is stacked

    def _chosen(self, found: Schema) -> Schema:
        """The columns that make the matrix."""
        if self.column in found and (found[self.column].shape or len(found) == 1):
            return Schema({self.column: found[self.column]})
        return found

    def _refuse_others(self, found: Schema) -> None:
        if not found:
            raise InputError(
                f"{self.name} has no column beside {', '.join(self.keep)}; "
                f'wanted "{self.column}", or columns of numbers'
            )
        wrong = [n for n, f in found.items() if f.kind != "fixed" or f.dtype.kind not in "biuf"]
        if wrong:
            try:
                self.source.require_numeric(wrong[0])
            except InputError as error:
                listed = ", ".join(f'"{name}"' for name in wrong)
                raise InputError(
                    f"{error}; columns that are not numbers: {listed} (drop these, or name the others)"
                ) from error
        for name in found:
            self._refuse_null(name)

    def _refuse_null(self, name: str) -> None:
        where = getattr(self.source, "first_null", lambda _: None)(name)
        if where is not None:
            raise InputError(f"{where}: the cell is empty, wanted a number in every cell")

    def read(self, lo: int, hi: int) -> Batch:
        """The rows of blocks ``[lo, hi)``. Local."""
        batch = self.source.read(lo, hi)
        if self._stacked is None:
            return batch if batch.names == tuple(self.schema) else batch.select(*self.schema)
        made = {n: self._matrix(batch, lo) if n == self.column else batch[n] for n in self.schema}
        return Batch.from_dict(made, {n: batch.valid(n) for n in self.schema if n != self.column})

    def _matrix(self, batch: Batch, lo: int) -> Array:
        rows = len(batch)
        out = np.empty((rows, self.schema[self.column].shape[0]), np.float64)
        at = 0
        for name in self._stacked or ():
            self._check_filled(batch.valid(name), name, lo)
            part = batch[name].reshape(rows, -1) if rows else out[:, :0]
            out[:, at : at + part.shape[1]] = part
            at += part.shape[1]
        return out

    def _check_filled(self, valid: Array | None, name: str, lo: int) -> None:
        if valid is not None and not valid.all():
            first = 0 if self.blocks.starts is None else int(self.blocks.starts[lo])
            row = row_in_files(self.source, first + int(np.argmin(valid)))
            raise InputError(
                f'{self.name} row {row}, column "{name}": the cell is empty, wanted a number in every cell'
            )

    def columns(self, names: Sequence[str]) -> StackedSource:
        """These of the columns that come out only."""
        wanted = checked_columns(names)
        return changed(self, lambda other: other._anew(self._whole, wanted))

    def where(self, bounds: Sequence[Bound]) -> StackedSource:
        """Without rows that the wrapped source knows to be out; nothing is known of the matrix."""
        beside = tuple(bound for bound in checked_bounds(bounds) if bound[0] != self.column)
        return changed(self, lambda other: other._anew(self._whole.where(beside), self._wanted))

    def _anew(self, whole: Source, wanted: tuple[str, ...] | None) -> None:
        self.source = self._whole = whole
        self._wanted, self._narrow, self._stacked = wanted, None, None

    def require_numeric(self, column: str) -> None:
        """Raise `InputError` if the column is not of numbers."""
        if self._stacked is None or column != self.column:
            self.source.require_numeric(column)
        else:
            self.schema.require(column)


def _is_matrix(field: Field) -> bool:
    return field.dtype in (np.float64, np.float32) and len(field.shape) == 1 and not field.nullable
