"""Parquet files as tables, by row groups, through pyarrow (an optional extra that nobody else imports).

Numbers, bools, dates, text, bytes, lists of numbers, and fixed-size lists (vectors) become columns; a column
is nullable only if it holds nulls. pyarrow is imported when a file is opened.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import FIXED_KINDS, Field, Schema
from iterreduce.errors import InputError, UsageError


def pyarrow() -> Any:
    """pyarrow with its Parquet part. Raises `UsageError` that names the extra, if it is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "Parquet files need pyarrow, which is not installed: pip install 'iterreduce[parquet]'"
        ) from error
    return pa


class Parquet:
    """Row groups that overlap the rows wanted are read; of them, only the columns wanted.

    The last row group read is kept for the next rows of it, until `release`.
    """

    suffix: str = ".parquet"
    suffixes: tuple[str, ...] = (".parquet",)

    def __init__(self) -> None:
        self._last: tuple[Any, Any] = None, None

    def release(self) -> None:
        """Forget the last row group. Local."""
        self._last = None, None

    def inspect(self, path: str) -> tuple[Schema, int]:
        """Schema and rows from the footer."""
        pa = pyarrow()
        try:
            with pa.parquet.ParquetFile(path) as file:
                fields = {
                    f.name: _field(pa, path, f, _has_nulls(file.metadata, f.name)) for f in file.schema_arrow
                }
                return Schema(fields), int(file.metadata.num_rows)
        except pa.ArrowException as error:
            raise InputError(
                f"{path} is truncated or damaged: {_first_line(error)}; write it again"
            ) from error

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> Batch:
        """Rows ``[lo, hi)``."""
        pa = pyarrow()
        try:
            with pa.parquet.ParquetFile(path) as file:
                groups, skip = _groups(file.metadata, lo, hi)
                tables = [self._group(file, path, group, list(schema)) for group in groups]
                table = pa.concat_tables(tables).slice(skip, hi - lo)
        except pa.ArrowException as error:
            raise InputError(f"{path} cannot be read: {_first_line(error)}") from error
        found = {n: _column(pa, table.column(n).combine_chunks(), f) for n, f in schema.items()}
        valid = {n: _mask(pa, table.column(n)) for n, f in schema.items() if f.nullable}
        return Batch.from_dict(found, valid)

    def _group(self, file: Any, path: str, group: int, columns: list[str]) -> Any:
        asked = path, group, columns
        if self._last[0] != asked:
            self._last = asked, file.read_row_group(group, columns=columns, use_threads=False)
        return self._last[1]


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _groups(metadata: Any, lo: int, hi: int) -> tuple[list[int], int]:
    """The row groups that overlap rows ``[lo, hi)``, and how many of their first rows to skip."""
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    groups = [i for i in range(len(sizes)) if starts[i] < hi and starts[i + 1] > lo]
    return groups, lo - starts[groups[0]] if groups else 0


def _has_nulls(metadata: Any, name: str) -> bool:
    """Whether any row group counts nulls in this column, or does not say."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(group.num_columns if group.num_rows else 0):
            chunk = group.column(j)
            if chunk.path_in_schema.split(".", 1)[0] == name:
                counted = chunk.statistics is not None and chunk.statistics.has_null_count
                if not counted or chunk.statistics.null_count:
                    return True
    return False


def _field(pa: Any, path: str, found: Any, nullable: bool) -> Field:
    kind = found.type
    t = pa.types
    if t.is_dictionary(kind):
        kind = kind.value_type
    if t.is_string(kind) or t.is_large_string(kind):
        return Field("text", np.dtype(np.uint8), (), nullable)
    if t.is_binary(kind) or t.is_large_binary(kind):
        return Field("bytes", np.dtype(np.uint8), (), nullable)
    if t.is_fixed_size_list(kind):
        return Field("fixed", _dtype(path, found, kind.value_type), (kind.list_size,), nullable)
    if t.is_list(kind) or t.is_large_list(kind):
        return Field("list", _dtype(path, found, kind.value_type), (), nullable)
    return Field("fixed", _dtype(path, found, kind), (), nullable)


def _dtype(path: str, found: Any, kind: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any]
    try:
        dtype = np.dtype(kind.to_pandas_dtype())
    except (NotImplementedError, TypeError):
        dtype = np.dtype(object)
    if str(kind).startswith("timestamp"):
        dtype = np.dtype(f"datetime64[{kind.unit}]")
    elif str(kind).startswith("date32"):
        dtype = np.dtype("datetime64[D]")
    elif str(kind).startswith("date64"):
        dtype = np.dtype("datetime64[ms]")
    if dtype.kind not in FIXED_KINDS:
        raise InputError(
            f'{path}: column "{found.name}" is {found.type}, wanted numbers, dates, text or lists; '
            "cast it, or leave it out by naming the columns"
        )
    return dtype


def _column(pa: Any, array: Any, field: Field) -> Array | Ragged:
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if field.kind == "fixed" and field.shape:
        values = _numbers(
            pa, array.values.slice(array.offset * field.shape[0], len(array) * field.shape[0]), field
        )
        return values.reshape(len(array), *field.shape)
    return _numbers(pa, array, field) if field.kind == "fixed" else _ragged(pa, array, field)


def _numbers(pa: Any, array: Any, field: Field) -> Array:
    """An Arrow array as NumPy; NaN or zero under nulls."""
    if array.null_count:
        zero = float("nan") if field.dtype.kind == "f" else 0
        array = array.fill_null(
            pa.scalar(zero).cast(array.type) if field.dtype.kind not in "mMb" else _zero(pa, array)
        )
    return np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).astype(field.dtype, copy=True)


def _zero(pa: Any, array: Any) -> Any:
    if pa.types.is_boolean(array.type):
        return pa.scalar(False)
    whole = pa.int32() if str(array.type).startswith("date32") else pa.int64()
    return pa.scalar(0, whole).cast(array.type)


def _ragged(pa: Any, array: Any, field: Field) -> Ragged:
    """Text, bytes or lists: Arrow's offsets, made int64, and its values."""
    lengths = pa.compute.list_value_length(array) if field.kind == "list" else pa.compute.binary_length(array)
    offsets = np.zeros(len(array) + 1, np.int64)
    np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False), out=offsets[1:])
    if field.kind == "list":
        values = array.flatten().to_numpy(zero_copy_only=False).astype(field.dtype)
        return Ragged(offsets, values, "list")
    bytes_of = array.drop_null()
    wide = bytes_of.cast(pa.large_binary())
    _, ends, data = wide.buffers()
    bounds = (
        np.frombuffer(ends, np.int64)[wide.offset : wide.offset + len(wide) + 1]
        if len(wide)
        else np.zeros(1, np.int64)
    )
    values = (
        np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]].copy()
        if data is not None
        else np.zeros(0, np.uint8)
    )
    return Ragged(offsets, values, field.kind)  # type: ignore[arg-type]


def _mask(pa: Any, column: Any) -> Array:
    return np.asarray(
        column.is_valid().to_numpy(zero_copy_only=False)
        if not isinstance(column, pa.ChunkedArray)
        else column.is_valid().to_numpy(),
        dtype=bool,
    )


def to_table(batch: Batch) -> Any:
    """A batch as an Arrow table, for writing."""
    pa = pyarrow()
    return pa.table({name: _arrow(pa, batch, name) for name in batch.names})


def _arrow(pa: Any, batch: Batch, name: str) -> Any:
    column, valid = batch[name], batch.valid(name)
    hidden = None if valid is None else pa.array(~valid)
    if not isinstance(column, Ragged):
        if column.ndim == 1:
            return pa.array(column, mask=None if valid is None else ~valid)
        flat = pa.array(np.ascontiguousarray(column).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(column.shape[1:])), mask=hidden)
    tight = column.compact()
    offsets = pa.array(tight.offsets, pa.int64())
    if column.kind == "list":
        return pa.LargeListArray.from_arrays(offsets, pa.array(tight.values), mask=hidden)
    kind = pa.large_string() if column.kind == "text" else pa.large_binary()
    bits = None if valid is None else pa.array(valid).buffers()[1]
    return pa.Array.from_buffers(
        kind, len(column), [bits, offsets.buffers()[1], pa.py_buffer(np.ascontiguousarray(tight.values))]
    )
