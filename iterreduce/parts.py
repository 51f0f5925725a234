"""Rows of several tables as arrays of words, to be kept and sent: `Part`, and `Share` of two of them.

A rank's share of a state is what may be new each time, and the columns that are known by their tokens not to
have changed (`iterreduce.table`): those are packed and sent once, and several copies of the state have them
in common. Nothing here communicates. Who speaks to it: `iterreduce.copies`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.packing import pack, packed_words, unpack
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.table import Table
from iterreduce.words import packed


class Piece(NamedTuple):
    """Where the rows of a table stand in a part, in words, and what they are. ``names``: of all columns that
    the table has, in their order, though some may stand in another part.
    """

    rows: int
    schema: Schema
    names: tuple[str, ...]
    first: int
    last: int


@dataclass
class Part:
    """Rows of several tables in one array, int64: length of a text, the text that says what comes, rows."""

    words: Array
    tables: dict[str, Piece] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        batches: Mapping[str, Batch],
        into: Array | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> Part:
        """The rows in memory of their own: that of ``into``, if they are as many words.

        >>> part = Part.of({"t": Batch(x=np.arange(3))})
        >>> Part.read(part.words).rows("t", 1, 3)["x"].tolist()
        [1, 2]
        """
        sizes = {n: int(packed_words(b, None, np.array([0, len(b)]))[0]) for n, b in batches.items()}
        order = {n: list(names[n] if names else b.names) for n, b in batches.items()}
        told = [[n, len(b), b.schema.to_json(), order[n], sizes[n]] for n, b in batches.items()]
        head, length = packed(json.dumps(told).encode())
        total = 1 + len(head) + sum(sizes.values())
        words = into if into is not None and len(into) == total else np.empty(total, np.int64)
        words[0], words[1 : 1 + len(head)] = length, head
        at = 1 + len(head)
        for name, batch in batches.items():
            pack(batch, None, 0, len(batch), words, at)
            at += sizes[name]
        return cls.read(words)

    @classmethod
    def read(cls, words: Array) -> Part:
        """A part that another rank has packed; it may stand in front of others."""
        at, tables = 1 + -(-int(words[0]) // 8), {}
        for name, rows, schema, names, size in json.loads(words[1:at].tobytes()[: int(words[0])]):
            tables[name] = Piece(rows, Schema.from_json(schema), tuple(names), at, at + size)
            at += size
        return cls(words[:at], tables)

    def rows(self, table: str, lo: int, hi: int) -> Batch:
        """Rows of a table: views."""
        piece = self.tables[table]
        return unpack(self.words[piece.first : piece.last], piece.schema, piece.rows).slice(lo, hi)


@dataclass
class Share:
    """A rank's rows of several tables: columns that may be new, and those that stay."""

    new: Part
    same: Part | None = None

    def rows_of(self, table: str) -> int:
        """How many rows the table has here."""
        return self.new.tables[table].rows

    def schema(self, table: str) -> Schema:
        """Its columns."""
        piece = self.new.tables[table]
        fields = dict(piece.schema.items())
        if self.same is not None:
            fields |= dict(self.same.tables[table].schema.items())
        return Schema({name: fields[name] for name in piece.names})

    def rows(self, table: str, lo: int, hi: int) -> Batch:
        """Rows of a table: views.

        >>> rows = Batch(x=np.arange(3), k=np.arange(3) * 2)
        >>> new, same = Part.of({"t": rows.select("k")}, None, {"t": rows.names}), rows.select("x")
        >>> Share(new, Part.of({"t": same})).rows("t", 1, 3)
        Batch(2 rows: x int64, k int64)
        """
        batch = self.new.rows(table, lo, hi)
        if self.same is None:
            return batch
        more = self.same.rows(table, lo, hi)
        columns = {**batch._columns, **more._columns}
        columns = {name: columns[name] for name in self.new.tables[table].names}
        return Batch._trusted(columns, {**batch._valid, **more._valid}, len(batch))


def halves(table: Table) -> tuple[Batch, Batch]:
    """The columns that may be new each time, and those that a token knows.

    >>> from iterreduce.table import by_key
    >>> new, same = halves(Table(Batch(k=np.arange(2), x=np.ones(2)), by_key("k"), {"k": 77}))
    >>> new.names, same.names
    (('x',), ('k',))
    """
    batch = table.batch
    known = [n for n in batch.names if table.tokens.get(n) and batch.valid(n) is None]
    return batch.select(*(n for n in batch.names if n not in known)), batch.select(*known)


def tokens_of(tables: Mapping[str, Table]) -> tuple[tuple[str, int, str, int], ...]:
    """What the columns that stay are known by: while this is the same they have not changed here."""
    return tuple(
        (name, len(table), column, table.tokens[column])
        for name, table in tables.items()
        for column in halves(table)[1].names
    )
