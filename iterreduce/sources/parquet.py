"""Parquet files as tables, by row groups, through pyarrow (an optional extra that nobody else imports).

Numbers, bools, dates, text, bytes, lists of numbers, and fixed-size lists (vectors) become columns; a column
is nullable only if it holds nulls. pyarrow is imported when a file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import FIXED_KINDS, Field, Schema
from iterreduce.errors import InputError, UsageError
from iterreduce.sources.asked import Bound, Bounds, Peek, hint, rules_out
from iterreduce.sources.files import Found


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

    Of row groups whose statistics say that a bound is true of none of their rows, nothing is read. The last
    row group read is kept for the next rows of it, until `release`.
    """

    suffix: str = ".parquet"
    suffixes: tuple[str, ...] = (".parquet",)
    masks = uses_bounds = True

    def __init__(self) -> None:
        self._last: tuple[Any, Any] = None, None

    def release(self) -> None:
        """Forget the last row group. Local."""
        self._last = None, None

    def inspect(
        self, path: str, wanted: Sequence[str] | None = None, bounds: Bounds = (), glance: bool = False
    ) -> Found:
        """Fields, rows, and the row groups that bounds leave, from the footer."""
        pa = pyarrow()
        try:
            with pa.parquet.ParquetFile(path) as file:
                kept = kept_rows(pa, path, file, bounds) if bounds else None
                return Found(_fields(pa, path, file, wanted, glance), int(file.metadata.num_rows), kept)
        except pa.ArrowException as error:
            raise InputError(
                f"{path} is truncated or damaged: {_first_line(error)}; write it again"
            ) from error

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> tuple[Batch, int]:
        """Rows ``[lo, hi)``, and the bytes of the column chunks that were read for them."""
        pa = pyarrow()
        try:
            with pa.parquet.ParquetFile(path) as file:
                groups, skip = _groups(file.metadata, lo, hi)
                parts = [self._group(file, path, group, list(schema)) for group in groups]
                table = pa.concat_tables([part for part, _ in parts]).slice(skip, hi - lo)
        except pa.ArrowException as error:
            raise InputError(f"{path} cannot be read: {_first_line(error)}") from error
        found = {n: _column(pa, table.column(n).combine_chunks(), f) for n, f in schema.items()}
        valid = {n: _mask(pa, table.column(n)) for n, f in schema.items() if f.nullable}
        return Batch.from_dict(found, valid), sum(nbytes for _, nbytes in parts)

    def _group(self, file: Any, path: str, group: int, columns: list[str]) -> tuple[Any, int]:
        asked = path, group, columns
        if self._last[0] == asked:
            return self._last[1], 0
        self._last = asked, file.read_row_group(group, columns=columns, use_threads=False)
        chunks = file.metadata.row_group(group)
        sizes = [chunks.column(j).total_compressed_size for j in _places(file.metadata, columns)]
        return self._last[1], sum(sizes)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _groups(metadata: Any, lo: int, hi: int) -> tuple[list[int], int]:
    """The row groups that overlap rows ``[lo, hi)``, and how many of their first rows to skip."""
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    groups = [i for i in range(len(sizes)) if starts[i] < hi and starts[i + 1] > lo]
    return groups, lo - starts[groups[0]] if groups else 0


def _places(metadata: Any, columns: Sequence[str]) -> list[int]:
    """Where the chunks of these columns stand in a row group; of nested ones there are several."""
    paths = [metadata.schema.column(j).path for j in range(metadata.num_columns)]
    return [j for j, path in enumerate(paths) if any(_is_part(path, name) for name in columns)]


def _is_part(path: str, column: str) -> bool:
    return path == column or path.startswith(f"{column}.")


def _has_nulls(metadata: Any, name: str) -> bool:
    """Whether any row group counts nulls in this column, or does not say."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for j in _places(metadata, [name]) if group.num_rows else ():
            found = group.column(j).statistics
            if found is None or not found.has_null_count or found.null_count:
                return True
    return False


def _fields(pa: Any, path: str, file: Any, wanted: Sequence[str] | None, lenient: bool) -> Peek:
    """The fields of the columns wanted; `lenient`: None for those of a kind that is not read."""

    def field(column: Any) -> Field:
        return _field(pa, path, column, _has_nulls(file.metadata, column.name))

    columns = [c for c in file.schema_arrow if wanted is None or c.name in wanted]
    return {c.name: hint(lambda: field(c)) if lenient else field(c) for c in columns}  # noqa: B023


# ---------------------------------------------------------------------- row groups that bounds leave

TIME_UNITS = {"milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}


def kept_rows(pa: Any, path: str, file: Any, bounds: Bounds) -> list[list[int]]:
    """The ranges of rows that stand in row groups of which no bound is surely untrue, joined where they meet.

    A group without statistics of a column, or with some that cannot be trusted, is kept.
    """
    checks = [_check(pa, path, file, bound) for bound in bounds]
    kept: list[list[int]] = []
    first = 0
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        last = first + group.num_rows
        if not any(check(group) for check in checks):
            if kept and kept[-1][1] == first:
                kept[-1][1] = last
            else:
                kept.append([first, last])
        first = last
    return kept


def _check(pa: Any, path: str, file: Any, bound: Bound) -> Callable[[Any], bool]:
    """A function that says whether a row group surely holds no row of which the bound is true."""
    name, op, constant = bound
    schema = file.metadata.schema
    places = [j for j in range(file.metadata.num_columns) if schema.column(j).path == name]
    flat = len(places) == 1 and schema.column(places[0]).name == name
    field = hint(lambda: _field(pa, path, file.schema_arrow.field(name), False)) if flat else None
    if field is None or schema.column(places[0]).max_repetition_level:
        return lambda group: False
    logical = json.loads(schema.column(places[0]).logical_type.to_json())

    def check(group: Any) -> bool:
        found = group.column(places[0]).statistics
        if found is None or not group.num_rows:
            return False
        if found.has_null_count and found.null_count == group.num_rows:
            return True  # no comparison with a null is true
        ends = _ends(found, logical) if found.has_min_max else None
        return ends is not None and rules_out(op, constant, field, *ends)

    return check


def _ends(found: Any, logical: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The least and the largest value as `rules_out` compares them; None where their order is not plain."""
    ends = found.min_raw, found.max_raw
    kind = logical["Type"]
    if kind in ("Date", "Timestamp"):
        unit = "D" if kind == "Date" else TIME_UNITS[logical["timeUnit"]]
        dates = np.array(ends, np.int64).view(f"M8[{unit}]")
        return dates[0], dates[1]
    return ends if kind in ("None", "Int", "String") else None


# ---------------------------------------------------------------------- types and columns


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
