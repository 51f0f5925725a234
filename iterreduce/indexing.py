"""Index: rows that name two keys become numbers, and stay where their first key lives.

    keys       every rank numbers the distinct keys that it meets, and tells their owners how often
    slots      an owner numbers its keys: those that rows start from first, by descending number of rows, so
               that what is read most stands close together; it answers with the numbers
    rows       travel as one word each (slot of the first key there, number of the second), in bounded rounds
    exchange   each rank tells the owners which of their slots it names: from then on values travel without
               any key, to an owner (push) or from it (pull)

What comes of it is a `LinkTable`: resident rows in about four bytes each beside their other columns, and the
tables of keys, in the order of their slots. The rows that it was made of are needed no more.

How it can go wrong: a rank that fails says so after each phase, and all leave there together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from iterreduce.agreement import Guard, agreed_schema
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import KeyIndex, number_keys
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.link_layout import Rows
from iterreduce.columns.links import Links
from iterreduce.columns.ordering import group_order, hash_order
from iterreduce.columns.packing import pack, packed_words, unpack
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema
from iterreduce.columns.stretches import Named, Stretches, addressed, as_words
from iterreduce.columns.vertexcodes import Numbering
from iterreduce.errors import SchemaError, UsageError
from iterreduce.exchange import FAILED, HEADER_WORDS, ROWS, FreshExchange, Outgoing, exclusive
from iterreduce.sources.blocks import RowStream
from iterreduce.stages import Index
from iterreduce.table import BY_BLOCK, Table, by_key

PIECE_ROWS = 1 << 18  # rows of a round: their words, codes and copies take about 8 MB
NO_STREAMS: Mapping[str, RowStream] = MappingProxyType({})
GAP = HEADER_WORDS  # places in front of each rank's: in a message of one word each the header stands there
MOST_KEYS = (1 << 31) - (1 << 20)  # numbers are int32
NONE = np.empty(0, np.int64)
Numbers = tuple[Array, Array, dict[str, Array]]  # of both keys of some rows, and their other columns


class Stopped(Exception):
    """Some rank failed: all leave."""


@dataclass
class Side:
    """The keys of one table: those of this rank by slot, and the number of each key that this rank met.

    ``base`` int64 ``(ranks + 1,)``: where the numbers of each rank's keys begin. ``number_of`` int32, of the
    codes of this rank's numbering. ``degrees`` int64 ``(2, slots)``: rows that start from, and end in, a key.
    """

    keys: Batch
    base: Array
    number_of: Array
    degrees: Array
    rank: int
    index: KeyIndex | None = None

    def find(self, key: Any) -> Array:
        """The slot here of each key of a column; -1: not this rank's."""
        if self.index is None:
            self.index = KeyIndex(self.keys)
        return self.index.lookup(Batch(**{self.keys.names[0]: key}))

    @property
    def low(self) -> int:
        """The number of this rank's first slot."""
        return int(self.base[self.rank])

    @property
    def high(self) -> int:
        """The number behind this rank's last slot."""
        return int(self.base[self.rank + 1])


@dataclass
class Resident:
    """This rank's rows by number, and with whom values are exchanged.

    ``stretches``: rows by slot of the first key; the second key by its place: behind a gap of `GAP` places
    for each rank ``d`` stand the ``named[d]`` keys of that rank which are named here, in ascending slot
    order; from ``own_at`` on all of this rank's keys. ``asked[r]``: the slots here that rank ``r`` names,
    ascending int32.
    """

    stage: Index
    stretches: Stretches
    named: Array
    asked: list[Array]
    first: Side
    second: Side
    _pushed: Links | None = None
    _pulled: Links | None = None

    @cached_property
    def own_at(self) -> int:
        """The place of this rank's first own key."""
        return int(self.named.sum()) + GAP * len(self.named)

    @property
    def places(self) -> int:
        """Places in all."""
        return self.own_at + len(self.second.keys)

    def pushed(self) -> Links:
        """Rows from the first keys that have any, by slot, to the places of second keys."""
        if self._pushed is None:
            offsets = self.stretches.offsets
            starts = int(np.count_nonzero(np.diff(offsets)))  # they are the first
            rows = Rows(offsets[: starts + 1], self.stretches.seconds, self.stretches.columns, self.places)
            self._pushed = Links(rows)
        return self._pushed

    def pulled(self) -> Links:
        """The same rows the other way: from places of second keys to slots of first ones."""
        if self._pulled is None:
            slots = len(self.first.keys)
            first = np.repeat(np.arange(slots, dtype=np.uint32), np.diff(self.stretches.offsets))
            self._pulled = Links.build(
                self.stretches.seconds, first, self.places, slots, self.stretches.columns
            )
            self._pulled.drop_rows()
        return self._pulled


class LinkTable(Table):
    """Rows that an `Index` keeps: a table without columns; only a `Shuffle` with ``joined`` reads it."""

    __slots__ = ("resident",)

    def __init__(self, resident: Resident):
        super().__init__(Batch(), BY_BLOCK)
        self.resident = resident


class IndexRows:
    """One `Index` stage at work."""

    def __init__(
        self,
        stage: Index,
        number: int,
        group: Group,
        partitions: PartitionMap,
        residents: dict[str, Resident],
        check: bool = False,
        limit_bytes: int | None = None,
        streams: Mapping[str, RowStream] = NO_STREAMS,
    ):
        self.stage, self.number, self.group, self.partitions = stage, number, group, partitions
        self.residents, self.streams = residents, streams
        self._met = 0  # pieces of rows here
        self.fresh = FreshExchange(group, number, check, limit_bytes=limit_bytes)
        self.keys_changed = False
        self.made: dict[str, Table] = {}

    # ------------------------------------------------------------------ the life of a stage

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Nothing can be done alone."""
        self._tables = tables

    def exchange(self, guard: Guard) -> int:
        """Number keys, move rows. Collective."""
        try:
            self.made = self._index(guard)
        except Stopped:
            return FAILED
        return guard.status

    def finish(self) -> dict[str, Table]:
        """The rows by number, and the tables of their keys."""
        made = self.made[self.stage.into]
        assert isinstance(made, LinkTable)
        self.residents[self.stage.into] = made.resident
        return self.made

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """Nothing is kept here."""
        self.made = {}
        return {}

    def rollback(self) -> None:
        """Nothing is kept here."""
        self.made = {}

    # ------------------------------------------------------------------ phases

    def _step(self, guard: Guard, work: Any, *args: Any) -> Any:
        """Work of this rank alone; all ranks leave if it fails on any. Collective."""
        made = guard.run(work, *args)
        if self.group.agree_any(guard.failure is not None):
            raise Stopped
        return made

    def _index(self, guard: Guard) -> dict[str, Table]:
        schema = self._agreed_schema(guard)
        numberings = self._step(guard, self._count, schema)
        sides = {name: self._side(guard, name, numberings[name]) for name in numberings}
        first, second = (sides[table] for table in self.stage.keys.values())
        stretches = self._bring(guard, schema, numberings, first, second)
        resident = self._introduce(guard, stretches, first, second)
        out: dict[str, Table] = {self.stage.into: LinkTable(resident)}
        for name, side in sides.items():
            out[name] = Table(side.keys, by_key(self.stage.names[name]))
        return out

    def _agreed_schema(self, guard: Guard) -> Schema:
        stream = self.streams.get(self.stage.rows)
        rows = self._tables[self.stage.rows].batch if stream is None else Batch.empty(stream.schema)
        known = stream is None and self.group.agree_any(len(rows) > 0)
        mine = rows.schema if len(rows) or not known else None
        merged = agreed_schema(self.group, mine)
        assert merged is not None
        self._step(guard, self._check_schema, merged)
        return merged

    def _check_schema(self, schema: Schema) -> None:
        schema.require(*self.stage.keys)
        one, other = (schema[key] for key in self.stage.keys)
        for key in self.stage.keys:
            self._check_key(key, schema[key])
        if len(set(self.stage.keys.values())) == 1 and (one.kind, one.dtype) != (other.kind, other.dtype):
            a, b = self.stage.keys
            raise SchemaError(
                f'"{a}" is {one.describe()} and "{b}" is {other.describe()}, but both name keys of one '
                "table: give them the same type"
            )
        for name, found in schema.items():
            odd = found.kind != "fixed" or found.nullable or found.shape or found.dtype == np.float16
            if name not in self.stage.keys and odd:
                raise SchemaError(
                    f'column "{name}" ({found.describe()}) cannot stand beside indexed rows: wanted numbers '
                    "without nulls, floats of 4 or 8 bytes; convert it or leave it out"
                )

    @staticmethod
    def _check_key(key: str, field: Field) -> None:
        if field.nullable:
            raise SchemaError(f'key column "{key}" has nulls, which are no keys: filter them out first')
        if field.shape:
            raise SchemaError(f'key column "{key}" holds vectors; a key is one value')

    def _pieces(self) -> Iterator[Batch]:
        """This rank's rows, some at a time."""
        for batch in self._batches():
            for lo in range(0, len(batch), PIECE_ROWS):
                yield batch.slice(lo, min(lo + PIECE_ROWS, len(batch)))

    def _batches(self) -> Iterator[Batch]:
        """The rows as they are held, or as they are read."""
        stream = self.streams.get(self.stage.rows)
        if stream is not None:
            yield from stream.pieces()
            return
        table = self._tables[self.stage.rows]
        batch = table.batch
        if table.everywhere:
            n, rank, size = len(batch), self.group.rank, self.group.size
            batch = batch.slice(n * rank // size, n * (rank + 1) // size)
        yield batch

    def _count(self, schema: Schema) -> dict[str, Numbering]:
        """Number the keys that this rank meets; count in which role they come."""
        keys = self.stage.keys
        out = {
            table: Numbering(Schema({self.stage.names[table]: schema[key]})) for key, table in keys.items()
        }
        (a, first), (b, second) = keys.items()
        self._met = 0
        for piece in self._pieces():
            self._met += 1
            out[first].count(piece[a], 0)
            out[second].count(piece[b], 1)
        also = {name: self._also(name) for name in self.stage.also}
        for name, more in also.items():
            out[name].count(more)
        for numbering in out.values():
            numbering.finish()
        for name, more in also.items():  # they are keys, but no rows
            numbering = out[name]
            numbering.counts[0] -= np.bincount(numbering.codes(more), minlength=len(numbering))
        if self.stage.symmetric:
            for piece in self._pieces():  # a row that joins a key with itself counts one way only
                codes = out[first].codes(piece[a])
                loops = codes[codes == out[first].codes(piece[b])]
                out[first].counts[1] -= np.bincount(loops, minlength=out[first].counts.shape[1])
        return out

    def _also(self, name: str) -> Any:
        """Further keys of a table."""
        rows, column = self.stage.also[name]
        found = self._tables[rows].batch
        found.schema.require(column)
        self._check_key(column, found.schema[column])
        return found[column]

    def _side(self, guard: Guard, name: str, numbering: Numbering) -> Side:
        """All ranks' keys of one table, numbered by their owners. Collective."""
        column = self.stage.names[name]
        out, order = self._step(guard, self._known, column, numbering)
        arrival = self.fresh.run(out, guard.status)
        if arrival.status & FAILED:
            raise Stopped
        schema, counts = self._wire(column, numbering), arrival.headers[:, ROWS]
        made = self._step(guard, self._numbered, column, schema, arrival, counts)
        keys, degrees, slots = made
        base = np.zeros(self.group.size + 1, np.int64)
        sizes = np.zeros(self.group.size, np.int64)
        self.group.allgather(np.array([len(keys)], np.int64), sizes)
        np.cumsum(sizes, out=base[1:])
        if base[-1] >= MOST_KEYS:
            raise UsageError(f'"{name}" has {base[-1]:,} keys; an Index numbers up to {MOST_KEYS:,}')
        answers = self._answer(slots + base[self.group.rank], counts, out.rows)
        number_of = np.empty(len(order), np.int32)
        number_of[order] = answers
        return Side(keys, base, number_of, degrees, self.group.rank)

    def _wire(self, column: str, numbering: Numbering) -> Schema:
        count = Field("fixed", np.dtype(np.int64))
        return Schema({**numbering.schema, "\0from": count, "\0to": count})

    def _known(self, column: str, numbering: Numbering) -> tuple[Outgoing, Array]:
        """The keys met here, for their owners, in hash order."""
        keys = numbering.keys()
        hashes = hash_keys(keys)
        order = hash_order(hashes)
        bounds = self.partitions.send_bounds(hashes[order])
        wire = keys.with_columns(**{"\0from": numbering.counts[0], "\0to": numbering.counts[1]})
        words = packed_words(wire, order, bounds)

        def fill(buffer: Array, at: Array) -> None:
            for d in range(len(words)):
                pack(wire, order, int(bounds[d]), int(bounds[d + 1]), buffer, int(at[d]))

        return Outgoing(words, np.diff(bounds), fill), order

    def _numbered(
        self, column: str, schema: Schema, arrival: Any, counts: Array
    ) -> tuple[Batch, Array, Array]:
        """This rank's keys by slot, their degrees, and the slot of every key that came."""
        parts = [unpack(w, schema, n) for w, n in zip(arrival.segments(), counts.tolist(), strict=True)]
        met = Batch.concat(parts)
        numbered = number_keys(met.select(column))
        m = len(numbered)
        degrees = np.zeros((2, m), np.int64)
        for role, name in enumerate(("\0from", "\0to")):
            np.add.at(degrees[role], numbered.codes, met[name])
        order = slot_order(degrees, self.stage.symmetric)
        slot_of = np.empty(m, np.int64)
        slot_of[order] = np.arange(m)
        return numbered.keys.take(order), degrees[:, order], slot_of[numbered.codes]

    def _answer(self, numbers: Array, came: Array, went: Array) -> Array:
        """The numbers of the keys that were sent, in the order in which they were sent. Collective."""
        came, went = came.astype(np.int64), went.astype(np.int64)
        answers = np.empty(int(went.sum()), np.int64)
        self.group.alltoallv(
            np.ascontiguousarray(numbers), came, exclusive(came), answers, went, exclusive(went)
        )
        return answers

    # ------------------------------------------------------------------ rows

    def _bring(
        self, guard: Guard, schema: Schema, numberings: Mapping[str, Numbering], first: Side, second: Side
    ) -> Stretches:
        """All rows to the owners of their first keys, in rounds. Collective."""
        one, other = self.stage.keys.values()
        stretches: Stretches = self._step(guard, self._room, first, schema)
        ways = self._step(guard, self._translations, numberings[one], numberings[other], first, second)
        pieces = self._pieces()
        rounds = self.group.agree_max(self._met)
        for _ in range(rounds):
            numbers = guard.run(lambda: self._numbers(next(pieces, None), *ways))
            self._round(guard, stretches, numbers, first.base)
            if self.stage.symmetric:
                self._round(guard, stretches, guard.run(_turned, numbers), first.base)
        if self.group.agree_any(guard.failure is not None):
            raise Stopped
        return stretches

    def _room(self, first: Side, schema: Schema) -> Stretches:
        rows = first.degrees[0]
        dtypes = {n: f.dtype for n, f in schema.items() if n not in self.stage.keys}
        return Stretches(rows + first.degrees[1] if self.stage.symmetric else rows, dtypes)

    @staticmethod
    def _translations(one: Numbering, other: Numbering, first: Side, second: Side) -> tuple[Any, Any]:
        begin = one.through(first.number_of)
        return begin, (begin if other is one else other.through(second.number_of))

    def _numbers(self, piece: Batch | None, begin: Any, end: Any) -> Numbers | None:
        if piece is None:
            return None
        a, b = self.stage.keys
        columns = {name: piece[name] for name in piece.names if name not in (a, b)}
        return begin.codes(piece[a]), end.codes(piece[b]), columns

    def _round(self, guard: Guard, stretches: Stretches, numbers: Numbers | None, base: Array) -> None:
        """Some rows to their places. Collective."""
        if self.group.size == 1:
            if numbers is not None:
                guard.run(stretches.lay_pairs, *numbers)
            return
        ready = guard.run(_addressed, numbers, base)
        words, counts, columns = ready or (NONE, np.zeros(self.group.size, np.int64), {})
        came = np.zeros(self.group.size, np.int64)
        self.group.alltoall(counts, came, 1)
        arrived = self._moved(words, counts, came)
        others = {}
        for name, column in stretches.columns.items():
            sent = as_words(columns[name]) if name in columns else NONE
            others[name] = _from_words(self._moved(sent, counts, came), column.dtype)
        guard.run(stretches.lay, arrived, others)

    def _moved(self, words: Array, counts: Array, came: Array) -> Array:
        out = np.empty(int(came.sum()), np.int64)
        self.group.alltoallv(words, counts, None, out, came, None, 0, self.group.size * PIECE_ROWS)
        return out

    # ------------------------------------------------------------------ who is named

    def _introduce(self, guard: Guard, stretches: Stretches, first: Side, second: Side) -> Resident:
        """Name second keys by place, and tell owners which of their slots are named. Collective."""
        size = self.group.size
        made = self._step(guard, self._named, stretches, second)
        named, slots = made
        came = np.zeros(size, np.int64)
        self.group.alltoall(named, came)
        asked = np.empty(int(came.sum()), np.int64)
        self.group.alltoallv(slots, named, None, asked, came, None)
        lists = np.split(asked.astype(np.int32), np.cumsum(came)[:-1])
        return Resident(self.stage, stretches, named, lists, first, second)

    def _named(self, stretches: Stretches, second: Side) -> tuple[Array, Array]:
        """How many keys of each rank are named here, and their slots there."""
        found = Named(stretches.seconds, int(second.base[-1]), second.low, second.high)
        named = np.diff(np.searchsorted(found.numbers, second.base))
        gaps = np.repeat(np.arange(1, self.group.size + 1) * GAP, named)
        places = (np.arange(len(gaps)) + gaps).astype(np.uint32)
        found.rename(stretches.seconds, len(places) + self.group.size * GAP, places)
        return named, found.numbers - np.repeat(second.base[:-1], named)


def slot_order(degrees: Array, symmetric: bool) -> Array:
    """Keys that rows start from, then the others; each by descending number of rows, ties in hash order.

    >>> slot_order(np.array([[0, 1, 3], [9, 1, 0]]), False).tolist()
    [2, 1, 0]
    """
    most = (1 << 16) - 1
    total = degrees.sum(axis=0)
    codes = most - np.minimum(total, most)
    starts = total if symmetric else degrees[0]
    codes[starts == 0] += most + 1
    order, _ = group_order(codes, 2 * (most + 1))
    return order


def _turned(numbers: Numbers | None) -> Numbers | None:
    """Rows the other way round, but for those that join a key with itself."""
    if numbers is None:
        return None
    first, second, columns = numbers
    rows = np.flatnonzero(first != second)
    return second[rows], first[rows], {name: column[rows] for name, column in columns.items()}


def _addressed(numbers: Numbers | None, base: Array) -> tuple[Array, Array, dict[str, Array]] | None:
    if numbers is None:
        return None
    first, second, columns = numbers
    words, counts, order = addressed(first, second, base, bool(columns))
    return words, counts, {name: column.take(order) for name, column in columns.items()}


def _from_words(words: Array, dtype: np.dtype[Any]) -> Array:
    return (words.view(np.float64) if dtype.kind == "f" else words).astype(dtype)
