"""One matrix of many columns: what a program that wants points ``x`` gets from a table ``a,b,c``.

It wraps another source and reads no file itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import InputError
from iterreduce.sources.blocks import Blocks, Source, changed

if TYPE_CHECKING:
    from iterreduce.collectives import Group


class StackedSource:
    """Column `name` as a float matrix of shape (rows, columns), whatever columns the wrapped source has.

    A column of that name is taken if its rows are vectors, or if it is the only column. Otherwise all
    columns, in file order, become the matrix: a table with the header ``x,y,z`` means points in space, not
    the column x, and one with ``x,y`` and a word under y is a mistake, not points on a line. Columns in
    `keep`, where there are such, stay beside the matrix and are no part of it. A float64 or float32 matrix is
    passed on as it is, other numbers become float64. Columns of text are refused by `open`, and empty cells
    by `open` or `read`, with `InputError`.
    """

    schema: Schema
    token: str
    blocks: Blocks

    def __init__(self, source: Source, name: str = "x", keep: Sequence[str] = ()):
        self.source, self.column, self.name = source, name, source.name
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        self.rereadable = source.rereadable
        self._stacked: list[str] | None = None

    def open(self, group: Group) -> None:
        """Open the wrapped source and decide what to stack. Collective."""
        self.source.open(group)
        found = self.source.schema
        self.token, self.blocks, self.schema = self.source.token, self.source.blocks, found
        chosen = self._chosen(Schema({n: f for n, f in found.items() if n not in self.keep}))
        beside = {name: field for name, field in found.items() if name not in chosen}
        if list(chosen) != [self.column] or not _is_matrix(chosen[self.column]):
            self._refuse_others(chosen)
            self._stacked = list(chosen)
            width = sum(int(np.prod(f.shape, dtype=np.int64)) for f in chosen.values())
            self.schema = Schema({self.column: Field("fixed", np.dtype(np.float64), (width,)), **beside})
            self.token += f"-stacked-{self.column}-of-{','.join(chosen)}"

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
            return batch
        rows = len(batch)
        out = np.empty((rows, self.schema[self.column].shape[0]), np.float64)
        at = 0
        for name in self._stacked:
            self._check_filled(batch.valid(name), name, lo)
            part = batch[name].reshape(rows, -1) if rows else out[:, :0]
            out[:, at : at + part.shape[1]] = part
            at += part.shape[1]
        beside = [n for n in self.schema if n != self.column]
        columns = {self.column: out, **{n: batch[n] for n in beside}}
        return Batch.from_dict(columns, {n: batch.valid(n) for n in beside})

    def _check_filled(self, valid: Array | None, name: str, lo: int) -> None:
        if valid is not None and not valid.all():
            first = 0 if self.blocks.starts is None else int(self.blocks.starts[lo])
            row = first + int(np.argmin(valid))
            raise InputError(
                f'{self.name} row {row}, column "{name}": the cell is empty, wanted a number in every cell'
            )

    def block_rows(self, lo: int, hi: int) -> Array:
        """Rows of each block. Local."""
        return self.source.block_rows(lo, hi)

    def columns(self, names: Sequence[str]) -> StackedSource:
        """Stack these columns only."""
        chosen = self.source.columns(names)

        def narrow(other: StackedSource) -> None:
            other.source = chosen

        return changed(self, narrow)

    def require_numeric(self, column: str) -> None:
        """Raise `InputError` if the column is not of numbers."""
        if self._stacked is None or column != self.column:
            self.source.require_numeric(column)
        else:
            self.schema.require(column)


def _is_matrix(field: Field) -> bool:
    return field.dtype in (np.float64, np.float32) and len(field.shape) == 1 and not field.nullable
