"""What is resident on a rank: a batch, how its rows are laid out over the ranks, and its lineage tokens.

A token is a 63-bit digest of (operation, input tokens, parameters, version), computed alike on all ranks
from the plan and from agreed values; 0 means "not known to be invariant". Nothing here communicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged

LayoutKind = Literal["everywhere", "block", "key", "range"]
NO_TOKENS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Layout:
    """Where rows live: a copy ``everywhere``, by ``block`` of the source, by ``key`` and partition, or sorted
    by ``range`` of the key.
    """

    kind: LayoutKind
    keys: tuple[str, ...] = ()


EVERYWHERE = Layout("everywhere")
BY_BLOCK = Layout("block")


def by_key(*keys: str) -> Layout:
    """Rows live with the owner of their key's partition."""
    return Layout("key", keys)


def by_range(*keys: str) -> Layout:
    """Rows are sorted by key over the ranks: those of rank 0 come first."""
    return Layout("range", keys)


def token(*parts: object) -> int:
    """A digest of agreed values: int, str, bool, float, tuples of them. Never 0.

    >>> token("source", 1) == token("source", 1), token("source", 1) == token("source", 2)
    (True, False)
    """
    raw = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return (int.from_bytes(raw, "little") >> 1) | 1


def column_tokens(of: int, batch: Batch) -> dict[str, int]:
    """The tokens of the columns of a batch that as a whole has the token ``of``; with nulls: none."""
    return {name: token(of, name) for name in batch.names if batch.valid(name) is None}


@dataclass(frozen=True)
class RowsOf:
    """Which rows of another table, that with these key columns, stand in a table: int64 row numbers."""

    keys: Batch
    rows: Array

    def lies_in(self, batch: Batch) -> bool:
        """Are these the rows of that batch? (Its key columns are the same objects.)"""
        return all(batch._columns.get(n) is c for n, c in self.keys._columns.items())

    def slice(self, lo: int, hi: int) -> RowsOf:
        """The rows from ``lo`` to ``hi``."""
        return RowsOf(self.keys, self.rows[lo:hi])


@dataclass(slots=True)  # a value, though not frozen: freezing costs 1 us per table and iteration
class Table:
    """A rank's share of a named set of rows. A value: never changed after it is made, but for the columns of
    a state that is written in place (see `iterreduce.inplace`), which show the state as it is now.

    ``block_starts`` (int64, blocks + 1) are the local row numbers where canonical blocks begin;
    ``first_row`` is the global number of the first local row and ``rows_total`` the rows of all ranks, where
    the layout knows them. ``tokens`` maps column names to lineage tokens; ``version`` counts its
    replacements. ``rows_of``: the rows of another table that these are.
    """

    batch: Batch
    layout: Layout
    tokens: Mapping[str, int] = field(default_factory=lambda: NO_TOKENS)
    block_starts: Array | None = None
    first_row: int = 0
    rows_total: int = -1
    version: int = 0
    rows_of: RowsOf | None = None

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def everywhere(self) -> bool:
        """Is it the same on all ranks?"""
        return self.layout.kind == "everywhere"

    def replaced(self, by: Table) -> Table:
        """The table after ``Replace``: the rows of ``by``, one version later."""
        return Table(
            by.batch, by.layout, by.tokens, by.block_starts, by.first_row, by.rows_total, self.version + 1
        )


def read_only(column: Any) -> Any:
    """A view of the column that cannot be written to."""
    if type(column) is Ragged:
        return Ragged(read_only(column.offsets), read_only(column.values), column.kind)
    view = column.view()
    view.setflags(False)
    return view


def everywhere(batch: Batch, of: int = 0) -> Table:
    """A table whose rows are the same on all ranks."""
    return Table(
        batch,
        EVERYWHERE,
        column_tokens(of, batch) if of else NO_TOKENS,
        np.array([0, len(batch)]),
        0,
        len(batch),
    )
