"""Files of a result, one class per suffix: opened under a temporary name, fed batches of rows in order,
closed.

Only rank 0 uses them, and nothing here knows about ranks: `write.py` brings the rows and publishes the file.
"""

from __future__ import annotations

import os
from typing import IO, Any, Protocol

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import OutputError, UsageError, did_you_mean
from iterreduce.storage import hdf5_create, hdf5_write_ragged, pwrite_all

SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".csv", ".tsv", ".parquet")


class Output(Protocol):
    """A file that takes rows. `passes`: the columns that come together, one pass over all rows for each."""

    passes: list[tuple[str, ...]]

    def write(self, batch: Batch) -> None:
        """The next rows of this pass."""

    def close(self) -> None:
        """All rows have come."""

    def abandon(self) -> None:
        """Something failed: let go of the file, which will be removed."""


def open_output(temporary: str, path: str, schema: Schema, rows: int, widths: dict[str, int]) -> Output:
    """The writer for this suffix. `widths`: bytes of the longest row of each ragged column."""
    suffix = output_suffix(path)
    if suffix == ".npy":
        return NpyOutput(temporary, path, schema, rows, widths)
    if suffix == ".npz":
        return NpzOutput(temporary, path, schema, rows, widths)
    if suffix in (".h5", ".hdf5"):
        return Hdf5Output(temporary, schema, rows, widths)
    if suffix == ".parquet":
        return ParquetOutput(temporary, schema)
    from iterreduce.sources.csvout import CsvOutput

    return CsvOutput(temporary, path, schema, "\t" if suffix == ".tsv" else ",")


def output_suffix(path: str) -> str:
    """The suffix of a result. Raises `UsageError` if no format claims it.

    >>> output_suffix("out/ranks.CSV")
    '.csv'
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        ends = f"ends in {suffix}" if suffix else "has no suffix"
        raise UsageError(f"{path} {ends}: wanted one of {' '.join(SUFFIXES)}{did_you_mean(suffix, SUFFIXES)}")
    return suffix


# ---------------------------------------------------------------- NumPy


def stored_dtype(path: str, name: str, field: Field, width: int) -> np.dtype[Any]:
    """The dtype in a .npy file of a column; text gets the width of its longest row. Raises `OutputError`."""
    if field.kind == "list":
        raise OutputError(
            f'{path}: column "{name}" holds lists, which NumPy files cannot; write .h5 or .parquet'
        )
    if field.kind == "text":
        return np.dtype(f"U{max(1, width)}")
    return np.dtype(f"S{max(1, width)}") if field.kind == "bytes" else field.dtype


def as_stored(column: Any, dtype: np.dtype[Any]) -> Array:
    """A column in its stored dtype, contiguous."""
    if isinstance(column, Ragged):
        return np.array(column.to_list(), dtype) if len(column) else np.empty(0, dtype)
    return np.ascontiguousarray(column, dtype)


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of an .npy file: version 1.0, or 2.0 where that is too short."""
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    text = "{" + ", ".join(f"{key!r}: {fields[key]!r}" for key in sorted(fields)) + ", }"
    version, width = (1, 2) if len(text) < 65000 else (2, 4)
    raw = (text + " " * (-(8 + width + len(text) + 1) % 64) + "\n").encode("latin-1")
    return b"\x93NUMPY" + bytes((version, 0)) + len(raw).to_bytes(width, "little") + raw


def npy_dtype(path: str, schema: Schema, widths: dict[str, int]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Dtype and row shape of a .npy file: of one column, itself; of several, a structured dtype."""
    hidden = [name for name, field in schema.items() if field.nullable and field.dtype.kind != "f"]
    if hidden:
        raise OutputError(
            f'{path}: column "{hidden[0]}" has empty rows, which .npy cannot hold; write .npz, .h5 or .csv'
        )
    stored = {name: stored_dtype(path, name, field, widths.get(name, 0)) for name, field in schema.items()}
    if len(schema) == 1:
        (name,) = schema
        return stored[name], schema[name].shape
    try:
        return np.dtype([(name, stored[name], schema[name].shape) for name in schema]), ()
    except UnicodeEncodeError as error:
        raise OutputError(f"{path}: a column name cannot stand in a .npy file; write .npz or .h5") from error


def npy_rows(batch: Batch, dtype: np.dtype[Any]) -> Array:
    """The rows of a batch as they stand in a .npy file; NaN where a float is null."""
    columns = {name: _nan_under_mask(batch, name) for name in batch.names}
    if dtype.names is None:
        return as_stored(columns[batch.names[0]], dtype)
    out = np.empty(len(batch), dtype)
    for name in batch.names:
        out[name] = as_stored(columns[name], dtype[name].base)
    return out


def _nan_under_mask(batch: Batch, name: str) -> Any:
    column, valid = batch[name], batch.valid(name)
    if valid is None or valid.all():
        return column
    column = column.copy()
    column[~valid] = np.nan
    return column


class NpyOutput:
    """One array: the column, or records of several."""

    def __init__(self, temporary: str, path: str, schema: Schema, rows: int, widths: dict[str, int]):
        self._dtype, shape = npy_dtype(path, schema, widths)
        self.passes = [tuple(schema)]
        self._file = open(temporary, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(npy_header(self._dtype, (rows, *shape)))

    def write(self, batch: Batch) -> None:
        """Append rows."""
        _write_array(self._file, npy_rows(batch, self._dtype))

    def close(self) -> None:
        """Done."""
        self._file.close()

    abandon = close


def _write_array(file: IO[bytes], array: Array) -> None:
    if array.size:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class NpzOutput:
    """An uncompressed zip of .npy members, one pass per column; null masks as members ``NAME.valid``."""

    def __init__(self, temporary: str, path: str, schema: Schema, rows: int, widths: dict[str, int]):
        import zipfile

        self.passes: list[tuple[str, ...]] = [(name,) for name in schema]
        self._schema, self._rows = schema, rows
        self._dtypes = {name: stored_dtype(path, name, f, widths.get(name, 0)) for name, f in schema.items()}
        self._file = open(temporary, "wb")  # noqa: SIM115 (closed by close)
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._member: IO[bytes] | None = None
        self._name = ""
        self._masks: list[Array] = []

    def write(self, batch: Batch) -> None:
        """Append rows of one column; a new name begins its member."""
        (name,) = batch.names
        if name != self._name:
            self._begin(name)
        assert self._member is not None
        _write_array(self._member, as_stored(batch[name], self._dtypes[name]))
        mask = batch.valid(name)
        if self._schema[name].nullable:
            self._masks.append(np.ones(len(batch), bool) if mask is None else mask)

    def _begin(self, name: str) -> None:
        self._end()
        self._name = name
        self._member = self._open(name, self._dtypes[name], self._schema[name].shape)

    def _open(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> IO[bytes]:
        import zipfile

        info = zipfile.ZipInfo(f"{name}.npy")  # a fixed date: the same rows give the same bytes
        member = self._zip.open(info, "w", force_zip64=True)
        member.write(npy_header(dtype, (self._rows, *shape)))
        return member

    def _end(self) -> None:
        if self._member is not None:
            self._member.close()
        if self._masks or (self._name and self._schema[self._name].nullable and not self._rows):
            mask = self._open(f"{self._name}.valid", np.dtype(bool), ())
            _write_array(mask, np.concatenate([np.zeros(0, bool), *self._masks]))
            self._masks = []
            mask.close()

    def close(self) -> None:
        """Write the zip directory (and, if no rows came, the empty members)."""
        if not self._rows:
            for name in self._schema:
                self._begin(name)
        self._end()
        self._zip.close()
        self._file.close()

    def abandon(self) -> None:
        """Let go; the zip directory, which the archive would write when collected, is not wanted."""
        self._zip.fp = None
        self._file.close()


# ---------------------------------------------------------------- HDF5 and Parquet


# Text is stored at the width of its longest row, unless that would waste more than this for all rows.
PADDING_BYTES = 64 << 20


class Hdf5Output:
    """One contiguous dataset per column, filled by offset; text of fixed length if that wastes little."""

    def __init__(self, temporary: str, schema: Schema, rows: int, widths: dict[str, int]):
        self.passes = [tuple(schema)]
        self._path, self._schema, self._at = temporary, schema, 0
        self._widths = {
            n: max(1, w) for n, w in widths.items() if schema[n].kind == "text" and w * rows <= PADDING_BYTES
        }
        self._offsets = hdf5_create(temporary, schema, rows, self._widths)
        self._handle = os.open(temporary, os.O_WRONLY)

    def write(self, batch: Batch) -> None:
        """The next rows."""
        write_hdf5_rows(self._handle, self._offsets, self._schema, self._at, batch)
        for name, width in self._widths.items():
            cells = as_stored(Ragged(batch[name].offsets, batch[name].values, "bytes"), np.dtype(f"S{width}"))
            pwrite_all(self._handle, cells, self._offsets[name] + self._at * width)
        free = {n: batch[n] for n in batch.names if isinstance(batch[n], Ragged) and n not in self._widths}
        if free and len(batch):
            hdf5_write_ragged(self._path, self._at, free)
        self._at += len(batch)

    def close(self) -> None:
        """Done."""
        os.close(self._handle)

    abandon = close


def write_hdf5_rows(
    handle: int, offsets: dict[str, int], schema: Schema, first_row: int, batch: Batch
) -> None:
    """Put the fixed columns and masks of a batch where `hdf5_create` said they stand."""
    for name, field in schema.items():
        if field.kind == "fixed":
            column = np.ascontiguousarray(batch[name], field.dtype)
            pwrite_all(handle, column, offsets[name] + first_row * field.row_bytes)
        if field.nullable:
            mask = batch.valid(name)
            mask = np.ones(len(batch), bool) if mask is None else np.ascontiguousarray(mask)
            pwrite_all(handle, mask, offsets[f"{name}.valid"] + first_row)


class ParquetOutput:
    """Row groups as the rows come."""

    def __init__(self, temporary: str, schema: Schema):
        from iterreduce.sources.parquet import pyarrow, to_table

        self.passes = [tuple(schema)]
        self._table = to_table
        self._writer = pyarrow().parquet.ParquetWriter(temporary, to_table(Batch.empty(schema)).schema)

    def write(self, batch: Batch) -> None:
        """The next rows, as row groups."""
        if len(batch):
            self._writer.write_table(self._table(batch))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()

    abandon = close
