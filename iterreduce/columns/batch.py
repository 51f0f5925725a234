"""Batch: named columns of one length, the only form in which rows are held, mapped and moved.

A column is a NumPy array of a fixed dtype (any row shape) or a `Ragged`, each with an optional validity
mask. A batch is a value: operations return new batches that share columns, and the array object that was
put in is the one that comes out (the engine knows by identity that a column was passed on unchanged).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import FIXED_KINDS, Field, Schema, difference, missing_column, never_null
from iterreduce.errors import SchemaError

PLAIN = frozenset(map(np.dtype, ("f8", "f4", "i8", "i4", "u8", "u4", "u1", "?")))  # held as they are
_array, _new = np.ndarray, object.__new__
Column = Any  # np.ndarray | Ragged: overloads would force a cast on every use in user code


class Batch:
    """Named columns of one length.

    Columns are arrays of shape ``(n, ...)`` and a fixed dtype, `Ragged`, or lists of ``str``/``bytes``
    (which become `Ragged`). Raises `SchemaError` for object arrays, scalars and unequal lengths.

    >>> points = Batch(x=np.zeros((3, 2)), id=np.arange(3))
    >>> len(points), points.names, points["x"].shape
    (3, ('x', 'id'), (3, 2))
    >>> points.take(np.array([2, 0]))["id"].tolist()
    [2, 0]
    """

    __slots__ = ("_columns", "_length", "_schema", "_valid")

    def __init__(self, /, **columns: Any):
        length = -1
        for name, column in columns.items():
            if type(column) is not _array or column.dtype not in PLAIN or not column.ndim:
                columns[name] = column = as_column(name, column)
            if len(column) != length:
                length = len(column) if length < 0 else common_length(columns)
        self._columns: dict[str, Column] = columns
        self._valid: dict[str, Array] = {}
        self._length = max(length, 0)
        self._schema: Schema | None = None

    @classmethod
    def from_dict(cls, columns: Mapping[str, Any], valid: Mapping[str, Array | None] | None = None) -> Batch:
        """A batch from a mapping; ``valid`` holds bool masks of shape ``(n,)`` (False: the value is null)."""
        batch = cls(**columns)
        for name, mask in (valid or {}).items():
            if mask is None:
                continue
            if name not in batch._columns:
                raise SchemaError(f"a validity mask for {missing_column(name, batch._columns)}")
            if mask.dtype != np.bool_ or mask.shape != (batch._length,):
                raise SchemaError(
                    f'validity mask of "{name}": wanted bool ({batch._length},), got {mask.dtype} '
                    f"{mask.shape}"
                )
            batch._valid[name] = mask
        return batch

    @classmethod
    def _trusted(
        cls, columns: dict[str, Column], valid: dict[str, Array], length: int, schema: Schema | None = None
    ) -> Batch:
        """A batch of columns that are known to be right: no checks (hot paths)."""
        batch = _new(cls)
        batch._columns, batch._valid, batch._length, batch._schema = columns, valid, length, schema
        return batch

    @classmethod
    def empty(cls, schema: Schema) -> Batch:
        """No rows, of this schema (masks where a field is nullable)."""
        columns = {name: _empty_column(field) for name, field in schema.items()}
        return cls._trusted(
            columns, {n: np.zeros(0, bool) for n, f in schema.items() if f.nullable}, 0, schema
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> Column:
        try:
            return self._columns[name]
        except KeyError:
            raise SchemaError(missing_column(name, self._columns)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __repr__(self) -> str:
        return f"Batch({self._length} rows: {self.schema.describe()})"

    def __reduce__(self) -> Any:
        raise TypeError("a Batch is never pickled: write it with --out, or send its columns")

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in order."""
        return tuple(self._columns)

    @property
    def schema(self) -> Schema:
        """Names and fields; a column with a mask is nullable."""
        if self._schema is None:
            self._schema = Schema(
                {name: field_of(c, name in self._valid) for name, c in self._columns.items()}
            )
        return self._schema

    @property
    def nbytes(self) -> int:
        """Bytes of all columns and masks."""
        return int(
            sum(c.nbytes for c in self._columns.values()) + sum(m.nbytes for m in self._valid.values())
        )

    def valid(self, name: str) -> Array | None:
        """The validity mask of a column: bool of shape ``(n,)``, or None where all rows are valid."""
        if name not in self._columns:
            raise SchemaError(missing_column(name, self._columns))
        return self._valid.get(name)

    def select(self, *names: str) -> Batch:
        """These columns, in this order; the same array objects."""
        for name in names:
            if name not in self._columns:
                raise SchemaError(missing_column(name, self._columns))
        return self._trusted(
            {n: self._columns[n] for n in names},
            {n: self._valid[n] for n in names if n in self._valid},
            self._length,
        )

    def drop(self, *names: str) -> Batch:
        """All columns but these."""
        self.schema.require(*names)
        return self.select(*(n for n in self._columns if n not in names))

    def rename(self, /, **names: str) -> Batch:
        """Columns renamed: ``rename(old="new")``."""
        self.schema.require(*names)
        if len({names.get(n, n) for n in self._columns}) < len(self._columns):
            raise SchemaError(f"rename({names}) gives two columns the same name")
        return self._trusted(
            {names.get(n, n): c for n, c in self._columns.items()},
            {names.get(n, n): m for n, m in self._valid.items()},
            self._length,
        )

    def with_columns(self, /, **columns: Any) -> Batch:
        """This batch with columns added or replaced (a replaced column loses its mask)."""
        if not self._columns:
            return Batch(**columns)
        for name, column in columns.items():
            if type(column) is not _array or column.dtype not in PLAIN or not column.ndim:
                columns[name] = column = as_column(name, column)
            if len(column) != self._length:
                raise SchemaError(f'column "{name}" has {len(column)} rows, the batch has {self._length}')
        valid = {n: m for n, m in self._valid.items() if n not in columns} if self._valid else {}
        return self._trusted({**self._columns, **columns}, valid, self._length)

    def with_valid(self, /, **masks: Array | None) -> Batch:
        """This batch with these validity masks (None: all rows valid)."""
        merged: dict[str, Array | None] = {**self._valid, **masks}
        return Batch.from_dict(self._columns, merged)

    def take(self, rows: Array) -> Batch:
        """The rows at these positions (an int array, or a bool mask of ``n``), copied."""
        if rows.dtype == np.bool_:
            if rows.shape != (self._length,):
                raise SchemaError(f"a row mask of shape {rows.shape} for a batch of {self._length} rows")
            rows = np.flatnonzero(rows)
        columns = {
            n: c.take(rows) if isinstance(c, Ragged) else c.take(rows, axis=0)
            for n, c in self._columns.items()
        }
        return self._trusted(columns, {n: m[rows] for n, m in self._valid.items()}, len(rows), self._schema)

    filter = take

    def without_idle_masks(self) -> Batch:
        """The same rows without masks of columns that have no null here: what may be null need not be.

        >>> rows = Batch.from_dict({"x": np.arange(2)}, {"x": np.array([True, True])})
        >>> rows.schema.describe(), rows.without_idle_masks().schema.describe()
        ('x int64?', 'x int64')
        """
        valid = {name: mask for name, mask in self._valid.items() if not mask.all()}
        return self if len(valid) == len(self._valid) else self._trusted(self._columns, valid, self._length)

    def slice(self, lo: int, hi: int) -> Batch:
        """Rows ``lo`` to ``hi`` (within the batch), sharing memory."""
        lo, hi = max(0, min(lo, self._length)), max(0, min(hi, self._length))
        hi = max(lo, hi)
        columns = {
            n: c.slice(lo, hi) if isinstance(c, Ragged) else c[lo:hi] for n, c in self._columns.items()
        }
        return self._trusted(columns, {n: m[lo:hi] for n, m in self._valid.items()}, hi - lo, self._schema)

    def copy(self) -> Batch:
        """The same rows in memory of their own."""
        columns = {n: c.copy() for n, c in self._columns.items()}
        return self._trusted(
            columns, {n: m.copy() for n, m in self._valid.items()}, self._length, self._schema
        )

    def equals(self, other: Batch) -> bool:
        """Same schema and same rows (NaN equals NaN; what lies under a mask does not count)."""
        return (
            self.schema == other.schema
            and self._length == other._length
            and all(self._same(other, n) for n in self._columns)
        )

    def _same(self, other: Batch, name: str) -> bool:
        ours, theirs, mask = self._columns[name], other._columns[name], self._valid.get(name)
        if mask is not None:
            if not np.array_equal(mask, other._valid[name]):
                return False
            rows = np.flatnonzero(mask)
            ours, theirs = (c.take(rows) if isinstance(c, Ragged) else c[rows] for c in (ours, theirs))
        if isinstance(ours, Ragged):
            return ours.equals(theirs)
        return bool(np.array_equal(ours, theirs, equal_nan=ours.dtype.kind in "fc"))

    @classmethod
    def concat(cls, parts: Sequence[Batch]) -> Batch:
        """All rows, in order. Parts must have the same columns; a mask appears where any part has one."""
        if not parts:
            raise SchemaError("nothing to join: give at least one batch (Batch.empty(schema) for no rows)")
        if len(parts) == 1:
            return parts[0]
        bare = [never_null(part.schema) for part in parts]
        for schema in bare[1:]:
            if schema != bare[0]:
                raise SchemaError(f"cannot join batches: {difference(bare[0], schema)}")
        columns = {n: _concat([p._columns[n] for p in parts]) for n in parts[0]._columns}
        masked = [n for n in columns if any(n in p._valid for p in parts)]
        valid = {n: np.concatenate([p._valid.get(n, np.ones(len(p), bool)) for p in parts]) for n in masked}
        return cls._trusted(columns, valid, sum(map(len, parts)))


def _concat(columns: list[Column]) -> Column:
    return Ragged.concat(columns) if isinstance(columns[0], Ragged) else np.concatenate(columns)


def _empty_column(field: Field) -> Column:
    if field.kind == "fixed":
        return np.empty((0, *field.shape), field.dtype)
    return Ragged(np.zeros(1, np.int64), np.empty(0, field.dtype), field.kind)


def field_of(column: Column, nullable: bool = False) -> Field:
    """The field of one column."""
    if isinstance(column, Ragged):
        return Field(column.kind, column.values.dtype, (), nullable)
    return Field("fixed", column.dtype, column.shape[1:], nullable)


def as_column(name: str, column: Any) -> Column:
    """The column as it will be held: the same object where it is a good array already."""
    if isinstance(column, np.ndarray):
        kind = column.dtype.kind
        if kind in FIXED_KINDS and column.ndim and column.dtype.isnative:
            return column if type(column) is np.ndarray else column.view(np.ndarray)
        return _converted(name, column)
    if isinstance(column, Ragged):
        return column
    if isinstance(column, (list, tuple)):
        if column and all(isinstance(v, (str, bytes)) for v in column):
            return Ragged.from_list(column)
        return as_column(name, np.asarray(column, dtype=np.float64 if not column else None))
    raise SchemaError(f'column "{name}": wanted a NumPy array, a list or Ragged, got {type(column).__name__}')


def _converted(name: str, column: Array) -> Column:
    if column.ndim == 0:
        raise SchemaError(
            f'column "{name}" is a single value: wanted one value per row (np.full(rows, value))'
        )
    if column.dtype.kind in "US":
        if column.ndim > 1:
            raise SchemaError(f'column "{name}": text of shape {column.shape}; wanted one text per row')
        return Ragged.from_list(column.tolist())
    if column.dtype.kind in FIXED_KINDS:
        return column.astype(column.dtype.newbyteorder("="))
    raise SchemaError(
        f'column "{name}" has dtype {column.dtype}: wanted numbers, bools, dates, or text; '
        "Python objects are never stored or sent (convert with .astype, or give a list of str)"
    )


def common_length(columns: Mapping[str, Column]) -> int:
    """Rows of all columns; `SchemaError` names those that differ."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise SchemaError(f"columns of one batch must have one length; rows: {listed}")
    return next(iter(lengths.values()), 0)


def row_text(rows: Batch, row: int = 0) -> str:
    """One row in words, for messages; what is long is shortened.

    >>> row_text(Batch(k=np.array([3, 4]), day=np.array([0, 1], "M8[D]"), t=["a", "b"]), row=1)
    "k=4, day=1970-01-02, t='b'"
    """
    return ", ".join(f"{name}={_value_text(rows, name, row)}" for name in rows.names)


def _value_text(rows: Batch, name: str, row: int) -> str:
    value, valid = rows[name][row], rows.valid(name)
    if valid is not None and not valid[row]:
        return "None"
    if isinstance(value, np.datetime64 | np.timedelta64):
        return str(value)
    return _short.repr(value.item() if isinstance(value, np.generic) else value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
