"""Rows that the ranks hold already: what `Dataset.from_local` makes of a caller's arrays.

No file, no movement: a rank keeps its rows, so blocks end at rank borders. The only agreement needed is that
all ranks hold the same columns.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema, difference
from iterreduce.epochs import losses
from iterreduce.errors import DisagreementError, InputError, RanksLost, SchemaError
from iterreduce.sources.agreement import root_decides
from iterreduce.sources.asked import Bound, Peek, checked_bounds, checked_columns
from iterreduce.sources.blocks import Blocks, bare, block_rows_for, changed, of_schema

if TYPE_CHECKING:
    from iterreduce.collectives import Group

_numbers = itertools.count()


class LocalSource:
    """A batch per rank. The rows are copied, unless `copy=False` promises that they stay as they are.

    `save`: they cannot be made again, so they belong into a checkpoint directory, once.
    """

    rereadable = False
    bytes_read, asked = 0, ""
    token: str
    blocks: Blocks

    def __init__(self, batch: Batch, name: str = "local", copy: bool = True, save: bool = False):
        self.name, self._batch, self.save = name, batch.copy() if copy else batch, save
        self.schema: Schema = batch.schema
        self._first_block, self._losses = 0, losses()

    @property
    def rows(self) -> Batch:
        """This rank's rows."""
        return self._batch

    @property
    def is_whole(self) -> bool:
        """Do all ranks live that had rows when these came?"""
        return self._losses == losses()

    def give(self, batch: Batch) -> None:
        """These rows in place of those that it has; before `open`."""
        self._batch, self.schema, self._losses = batch, batch.schema, losses()

    def open(self, group: Group) -> None:
        """Agree on the schema, deal out blocks. Collective.

        Raises `DisagreementError`, naming the rank, and `RanksLost` where ranks have died since.
        """
        if not self.is_whole:
            reason = f"the rows of {self.name} that they held are gone; give all of them to those who live"
            raise RanksLost((), group.size, reason=reason)
        self.schema = agreed_schema(group, self._batch)
        self._batch = of_schema(self._batch, self.schema)
        rows = np.zeros(group.size, np.int64)
        rows[group.rank] = len(self._batch)
        group.allreduce(rows, "sum")
        self.blocks = _blocks_within_ranks(rows)
        assert self.blocks.starts is not None and self.blocks.rank_bounds is not None
        self._first_block = int(self.blocks.rank_bounds[group.rank])
        self._first_row = int(rows[: group.rank].sum())
        self.token = root_decides(group, lambda: f"local-{os.getpid()}-{next(_numbers)}")

    def read(self, lo: int, hi: int) -> Batch:
        """Own blocks only: the very columns that came in, where all of them are asked for. Local."""
        assert self.blocks.starts is not None
        first, last = (
            int(self.blocks.starts[lo]) - self._first_row,
            int(self.blocks.starts[hi]) - self._first_row,
        )
        if first < 0 or last > len(self._batch):
            raise InputError(
                f"{self.name}: blocks {lo} to {hi} are rows of another rank, which cannot be read here"
            )
        return self._batch if (first, last) == (0, len(self._batch)) else self._batch.slice(first, last)

    def block_rows(self, lo: int, hi: int) -> Array:
        """Rows of each block. Local."""
        assert self.blocks.starts is not None
        return np.diff(self.blocks.starts[lo : hi + 1])

    def columns(self, names: Sequence[str]) -> LocalSource:
        """These columns only. Raises `SchemaError` at once for unknown names."""
        chosen = self._batch.select(*checked_columns(names))

        def narrow(other: LocalSource) -> None:
            other._batch, other.schema = chosen, chosen.schema

        return changed(self, narrow)

    def where(self, bounds: Sequence[Bound]) -> LocalSource:
        """All rows: nothing is known of them."""
        checked_bounds(bounds)
        return self

    def peek(self) -> Peek:
        """The columns; on a rank without rows their types are not known before `open`."""
        known = len(self._batch) or hasattr(self, "token")
        return {name: field if known else None for name, field in self.schema.items()}

    def rows_hint(self) -> int | None:
        """Rows of all ranks, once it is open; `rows` are those of this one."""
        return self.blocks.rows if hasattr(self, "token") else None

    def bytes_hint(self) -> None:
        """There are no files."""

    def require_numeric(self, column: str) -> None:
        """Raise `SchemaError` if the column is not of numbers."""
        field = self.schema[column]
        if field.kind != "fixed" or field.dtype.kind not in "biuf":
            raise SchemaError(f'{self.name}: column "{column}" is {field.describe()}, wanted numbers')

    def fingerprint(self) -> str:
        """A digest of this rank's bytes: `--check` compares it at iteration borders. Local."""
        digest = hashlib.blake2b(digest_size=16)
        for name in self._batch.names:
            column = self._batch[name]
            arrays = (column.offsets, column.values) if isinstance(column, Ragged) else (column,)
            for array in arrays:
                digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        return digest.hexdigest()


def agreed_schema(group: Group, batch: Batch) -> Schema:
    """The schema of the first rank with rows, nullable where any rank has nulls.

    A rank without rows need only name the same columns: nobody knows the dtype of an empty list.
    """
    told = [
        json.loads(bytes(b))
        for b in group.allgather_bytes(json.dumps([len(batch), batch.schema.to_json()]).encode())
    ]
    schemas = [Schema.from_json(text) for _, text in told]
    leader = next((r for r, (rows, _) in enumerate(told) if rows), 0)
    first = schemas[leader]
    for rank, schema in enumerate(schemas):
        same_names = list(schema) == list(first)
        found = "" if same_names and not told[rank][0] else difference(bare(schema), bare(first))
        if found:
            found = found.replace(" here", f" on rank {rank}").replace(" there", f" on rank {leader}")
            raise DisagreementError(f"rank {rank} holds other columns than rank {leader}: {found}")
    nullable = {n for schema in schemas for n, f in schema.items() if f.nullable}
    return Schema({n: Field(f.kind, f.dtype, f.shape, n in nullable) for n, f in first.items()})


def _blocks_within_ranks(rows: Array) -> Blocks:
    """Blocks of the usual length, the last of each rank cut short at its border."""
    step = block_rows_for(int(rows.sum()))
    counts = -(-rows // step)
    ends = np.concatenate([[0], np.cumsum(rows)])
    starts = [ends[r] + np.arange(counts[r], dtype=np.int64) * step for r in range(len(rows))]
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Blocks(int(counts.sum()), np.concatenate([*starts, ends[-1:]]).astype(np.int64), bounds)
