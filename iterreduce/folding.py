"""What a stage aggregates: outputs side by side in one accumulator record, and who brings the rows.

Shared by the stages that fold (Shuffle with ``combine``, Total). Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from iterreduce.columns.aggregators import Output, bind_outputs
from iterreduce.columns.batch import Batch
from iterreduce.columns.compute import compute_columns
from iterreduce.columns.expressions import Expr
from iterreduce.columns.folds import sum_afresh, sum_slots
from iterreduce.columns.groups import Fold, Folded
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.packing import pack, packed_words, unpack
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema, difference, either_null, never_null
from iterreduce.errors import SchemaError
from iterreduce.exchange import Outgoing
from iterreduce.loop import Reduce
from iterreduce.maps import BlockMap, Piece
from iterreduce.table import Table

NO_COLUMNS: Mapping[str, Expr] = MappingProxyType({})


class NeedsRows(SchemaError):
    """An aggregate that cannot be folded into records of a fixed size."""


EIGHT_BYTES = (np.dtype(np.int64), np.dtype(np.uint64))


class Direct(NamedTuple):
    """A stage's only output, where it is a plain sum of one column: see `BoundAggregator.direct`."""

    name: str
    column: str
    update: Callable[..., Any]
    merge: Callable[..., Any]
    dtype: np.dtype[Any]


class Outputs:
    """The bound aggregators of one stage and where each one's words lie in a record of ``width`` words.

    ``direct``: the one output, where it is a plain sum; ``narrow``: its dtype, where one integer key of 8
    bytes stands beside it.
    """

    def __init__(self, reduce: Reduce, keys: tuple[str, ...], schema: Schema):
        schema.require(*keys)
        self.keys, self.schema, self.names = keys, schema, tuple(schema)
        self.key_schema = Schema({k: schema[k] for k in keys})
        self.outputs: list[Output] = bind_outputs(reduce, keys, schema)
        self.offsets: list[int] = []
        self.width = 0
        for output in self.outputs:
            if output.bound.words is None:
                raise NeedsRows(
                    f'output "{output.name}" needs all rows of a key together; it cannot be combined '
                    "before sending"
                )
            self.offsets.append(self.width)
            self.width += output.bound.words
        self._zero = not any(o.bound.identity.any() for o in self.outputs)
        used = [n for n in self.names if n in keys or any(n in o.inputs for o in self.outputs)]
        self._used = [
            (n, f, f.kind == "fixed", f.dtype, 1 + len(f.shape)) for n, f in ((n, schema[n]) for n in used)
        ]
        scalar = all(f.kind == "fixed" and not f.shape for _, f, *_ in self._used)
        self._scalar = [(n, f.dtype) for n, f, *_ in self._used] if scalar else None
        self._at = list(zip(self.outputs, self.offsets, strict=True))
        one = self.outputs[0].bound.direct() if len(self.outputs) == 1 else None
        key = self.key_schema[keys[0]]
        one_key = len(keys) == 1 and key.kind == "fixed" and key.dtype in EIGHT_BYTES
        self.narrow = one[2] if one is not None and one_key and not key.nullable and not key.shape else None
        self.direct = None if one is None else Direct(self.outputs[0].name, self.outputs[0].inputs[0], *one)

    def fits(self, batch: Batch) -> bool:
        """Has the batch the columns that these outputs were bound to? (The fast test of every piece.)"""
        columns, valid = batch._columns, batch._valid
        if tuple(columns) != self.names:
            return False
        if self._scalar is not None and not valid:
            for name, dtype in self._scalar:
                column = columns[name]
                if type(column) is Ragged or column.dtype != dtype or column.ndim != 1:
                    return False
            return True
        for name, field, fixed, dtype, ndim in self._used:
            column = columns[name]
            if type(column) is Ragged:
                if field.kind != column.kind or dtype != column.values.dtype:
                    return False
            elif not fixed or column.dtype != dtype or column.ndim != ndim:
                return False
            if ndim > 1 and column.shape[1:] != field.shape:
                return False
            if valid and name in valid and not field.nullable:
                return False
        return True

    def fill(self, records: Array) -> None:
        """Write identities."""
        if self._zero:
            records.fill(0)
            return
        for output, offset in zip(self.outputs, self.offsets, strict=True):
            output.bound.fill(records, offset)

    def update(self, records: Array, codes: Array, batch: Batch) -> None:
        """Fold the rows of a batch: row ``i`` into ``records[codes[i]]``."""
        if not batch._length:  # its columns may be those of an empty list
            return
        direct = self.direct
        if direct is not None:
            values = batch._columns[direct.column]
            if values.flags.c_contiguous and not batch._valid:
                direct.update(records, 0, codes, values)
                return
        for output, offset in self._at:
            values, valid = output.read(batch)
            output.bound.update(records, offset, codes, values, valid)

    def update_afresh(self, records: Array, codes: Array, batch: Batch) -> None:
        """`fill`, then `update`."""
        if self.direct is not None and not batch._valid and batch._length:
            values = batch._columns[self.direct.column]
            if values.flags.c_contiguous:
                sum_afresh(records.view(self.direct.dtype), codes, values)
                return
        self.fill(records)
        self.update(records, codes, batch)

    def summed(self, keys: Batch, slots: Array, partial: Array) -> Batch | None:
        """`fill`, `merge` and `finish` in one, where the outputs are one plain sum; else None.

        A slot behind the last key takes what belongs nowhere.
        """
        if self.direct is None:
            return None
        dtype = self.direct.dtype
        sums = np.empty(keys._length + 1, dtype)
        sum_slots(partial.view(dtype), slots, sums)
        return self.with_sums(keys, sums)

    def with_sums(self, keys: Batch, sums: Array) -> Batch:
        """The keys and one plain sum for each; one more stands behind them."""
        columns = keys._columns.copy()
        columns[self.outputs[0].name] = sums[:-1]
        return Batch._trusted(columns, keys._valid, keys._length)

    def merge(self, records: Array, slots: Array, partial: Array) -> None:
        """Fold partial record ``i`` into ``records[slots[i]]``."""
        if self.direct is not None:
            self.direct.merge(records, 0, slots, partial, 0, 1)
            return
        for output, offset in self._at:
            output.bound.merge(records, offset, slots, partial, offset)

    def finish(self, keys: Batch, records: Array) -> Batch:
        """Key columns with the finished outputs beside them."""
        columns, valid = keys._columns.copy(), keys._valid
        if self.direct is not None:
            columns[self.direct.name] = records.view(self.direct.dtype)[:, 0].copy()
            return Batch._trusted(columns, valid, len(records))
        valid = valid.copy()
        for output, offset in self._at:
            columns[output.name], mask = output.bound.finish(records, offset)
            if mask is not None:
                valid[output.name] = mask
        return Batch._trusted(columns, valid, len(records))


class RowSource:
    """Where a stage's rows come from: a resident table, or a map that is run piece by piece as they are
    folded.
    """

    def __init__(
        self,
        name: str,
        map_: BlockMap | None,
        rank: int = 0,
        size: int = 1,
        computed: Mapping[str, Expr] = NO_COLUMNS,
    ):
        self.name, self.map, self.rank, self.size, self.computed = name, map_, rank, size, computed
        self.by_block = map_ is not None and map_.stage.cut == "block"
        self._reads = name if map_ is None else map_.stage.reads[0]

    @property
    def described(self) -> str:
        """Who makes these rows, in words."""
        from_map = f" made by {getattr(self.map.stage.function, '__name__', 'a kernel')}" if self.map else ""
        return f'"{self.name}"{from_map}'

    def pieces(self, tables: Mapping[str, Table], iteration: int) -> Iterable[Piece]:
        """All rows of this rank in canonical order; a resident table is one piece, even without rows."""
        if self.by_block and tables[self._reads].layout.kind != "everywhere":
            assert self.map is not None
            bare = self.map.pieces(tables, iteration)
        else:
            bare = (self._share(tables, iteration),)
        return self._computed_pieces(bare) if self.computed else bare

    def _computed_pieces(self, bare: Iterable[Piece]) -> Iterator[Piece]:
        for piece in bare:
            yield piece._replace(batch=self._with_computed(piece.batch))

    def _with_computed(self, batch: Batch) -> Batch:
        """The rows, and beside them what aggregators read that is no column but an expression of columns."""
        made = compute_columns(self.computed, batch)
        return batch.with_columns(**made._columns).with_valid(**made._valid)

    def _share(self, tables: Mapping[str, Table], iteration: int) -> Piece:
        table = self.map.share(tables, iteration) if self.map else tables[self.name]
        batch = table.batch
        if table.everywhere and self.size > 1:  # each row counts once: every rank brings an equal part
            batch = batch.slice(
                len(batch) * self.rank // self.size, len(batch) * (self.rank + 1) // self.size
            )
        return Piece(0, len(batch), batch, table.tokens)

    def on_nothing(self, tables: Mapping[str, Table], iteration: int) -> Batch:
        """The rows that no rows make: for their schema."""
        none = self.map.on_nothing(tables, iteration) if self.map else tables[self.name].batch.slice(0, 0)
        return self._with_computed(none) if self.computed else none


RECORDS = "\0records"  # the wire column of accumulator records: no user column can have this name


class Relearn(Exception):
    """A later piece has nulls where the first had none: outputs must be bound anew, and all rows folded
    again.
    """

    def __init__(self, schema: Schema):
        super().__init__()
        self.schema = schema


class Combiner:
    """The fold of one stage: outputs bound to the columns as first seen, a table for this rank's rows, and
    one for what arrives."""

    def __init__(self, reduce: Reduce, keys: tuple[str, ...], source: RowSource, one_key: bool = False):
        self.reduce, self.keys, self.source, self.one_key = reduce, keys, source, one_key
        self.outputs: Outputs | None = None
        self.dirty = False
        self.provisional = False

    @property
    def schema(self) -> Schema | None:
        """The columns as first seen, or as agreed; None before any were."""
        return None if self.outputs is None else self.outputs.schema

    def learn_of_nothing(self, schema: Schema) -> None:
        """Bind to the columns of no rows, until rows come: their columns may be others (an empty list has no
        type).
        """
        self.learn(schema)
        self.provisional = True

    def learn(self, schema: Schema) -> None:
        """Bind to these columns, forgetting what was folded."""
        self.provisional = False
        self.outputs = outputs = Outputs(self.reduce, self.keys, schema)
        self.fold = Fold(outputs.key_schema, outputs.outputs, self.one_key)
        self.merged = Fold(outputs.key_schema, outputs.outputs, self.one_key)
        self.wire = Schema(
            {**outputs.key_schema, RECORDS: Field("fixed", np.dtype(np.int64), (outputs.width,))}
        )

    def clear(self) -> None:
        """Forget what was folded."""
        if self.provisional:
            self.outputs, self.provisional = None, False
        elif self.dirty:
            self.fold.clear()
            self.dirty = False

    def add(self, batch: Batch) -> None:
        """Fold the rows of a piece."""
        self.dirty = True
        self.fold.add(batch)

    def check(self, batch: Batch) -> None:
        """Learn the columns of a first piece; raise where a later one differs."""
        if self.outputs is None:
            self.learn(batch.schema)
        elif not self.outputs.fits(batch):
            self._explain(batch.schema)

    def _explain(self, found: Schema) -> None:
        assert self.outputs is not None
        known = self.outputs.schema
        unlike = difference(never_null(known), never_null(found))
        if unlike:
            raise SchemaError(
                f"{self.source.described} changed its columns: {unlike} (here: as first seen; there: now); "
                "return the same columns, dtypes and shapes for every block"
            )
        raise Relearn(either_null(known, found))

    def outgoing(self, folded: Folded, bounds: Array, proposal: int) -> Outgoing:
        """Records for each destination: rows ``bounds[d]`` to ``bounds[d + 1]``."""
        assert self.outputs is not None
        wire = folded.keys.with_columns(**{RECORDS: folded.records})
        words = packed_words(wire, None, bounds)

        def fill(buffer: Array, at: Array) -> None:
            for dest in range(len(words)):
                pack(wire, None, int(bounds[dest]), int(bounds[dest + 1]), buffer, int(at[dest]))

        return Outgoing(words, np.diff(bounds), fill, self.outputs.schema.digest(), proposal)

    def arrived(self, words: Array, rows: int) -> Folded:
        """The records of one source; they share memory with the receive buffer."""
        batch = unpack(words, self.wire, rows)
        keys = batch.select(*self.keys)
        return Folded(hash_keys(keys), keys, batch[RECORDS])
