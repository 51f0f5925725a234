"""Rows that must be finite: a source that refuses NaN and infinity where a program cannot use them.

It wraps another source, reads no file itself, and changes no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from iterreduce.columns.batch import Batch
from iterreduce.columns.schema import Schema, missing_column
from iterreduce.errors import InputError
from iterreduce.sources.asked import Bound, Peek
from iterreduce.sources.blocks import Blocks, Source, first_nonfinite, row_in_files
from iterreduce.sources.wrapping import Wrapping

if TYPE_CHECKING:
    from iterreduce.collectives import Group


class FiniteSource(Wrapping):
    """The same rows; `check` raises `InputError` at the first that is NaN, infinite or null in a column.

    Columns and rows that are not read are not checked.
    """

    def __init__(self, source: Source, finite: Sequence[str]):
        self.source, self.finite = source, tuple(finite)
        self.name, self.rereadable = source.name, source.rereadable

    @property
    def schema(self) -> Schema:
        """That of the wrapped source."""
        return self.source.schema

    @property
    def token(self) -> str:
        """That of the wrapped source: the rows are the same."""
        return self.source.token

    @property
    def blocks(self) -> Blocks:
        """Those of the wrapped source."""
        return self.source.blocks

    @property
    def asked(self) -> str:
        """That of the wrapped source."""
        return self.source.asked

    def peek(self) -> Peek | None:
        """The columns of the wrapped source. Local."""
        return self.source.peek()

    def open(self, group: Group) -> None:
        """Open the wrapped source; the columns must be there, and be numbers. Collective."""
        self.source.open(group)
        for column in self.finite:
            if column not in self.schema:
                raise InputError(f"{self.name}: {missing_column(column, self._as_read())}")
            self.source.require_numeric(column)

    def _as_read(self) -> Schema:
        """The columns of the file, also where they were made into a matrix on the way."""
        found: Schema = getattr(self.source, "source", self.source).schema
        return found

    def read(self, lo: int, hi: int) -> Batch:
        """The rows of blocks ``[lo, hi)``. Local."""
        return self.source.read(lo, hi)

    def columns(self, names: Sequence[str]) -> FiniteSource:
        """These columns only, of which those are checked that were."""
        return FiniteSource(self.source.columns(names), [c for c in self.finite if c in names])

    def where(self, bounds: Sequence[Bound]) -> FiniteSource:
        """Without rows that the wrapped source knows to be out."""
        return FiniteSource(self.source.where(bounds), self.finite)

    def require_numeric(self, column: str) -> None:
        """Raise `InputError` if the column is not of numbers."""
        self.source.require_numeric(column)

    def check(self, batch: Batch, first_row: int) -> None:
        """Raise `InputError` for the first row that is not finite. Local; rows are counted from 0."""
        for column in self.finite:
            mask = batch.valid(column)
            if mask is not None and not mask.all():
                empty = row_in_files(self.source, first_row + int(mask.argmin()))
                raise InputError(
                    f"{self.name} row {empty} of {column} is empty; wanted a number in every row"
                )
            row = first_nonfinite(batch, column)
            if row is not None:
                shown: Any = batch[column][row].ravel()
                bad = next(v for v in shown.tolist() if v != v or v in (float("inf"), float("-inf")))
                raise InputError(
                    f"{self.name} row {row_in_files(self.source, first_row + row)} of {column} holds {bad}; "
                    "wanted finite numbers (rows are counted from 0)"
                )
