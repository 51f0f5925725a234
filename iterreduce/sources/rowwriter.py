"""Files that all ranks write together: rows to fixed places (.npy, .h5), or blocks of text one behind the
other.

For data as large as the disk: memory stays bounded, and the file has the same bytes on any number of ranks.
All ranks must see the same file system. It appears under its name when the last rank has written its part.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.schema import Schema, difference
from iterreduce.errors import IterReduceError, OutputError, SchemaError, UsageError
from iterreduce.sources.agreement import agree, root_decides
from iterreduce.sources.blocks import bare
from iterreduce.sources.outputs import npy_dtype, npy_header, npy_rows, output_suffix, write_hdf5_rows
from iterreduce.sources.write import check_place, check_room
from iterreduce.storage import hdf5_create, publish, pwrite_all, temporary_beside, why_not_written

if TYPE_CHECKING:
    from iterreduce.collectives import Group


class SharedFile:
    """A temporary file that all ranks have open for writing, and its end: published, or gone."""

    def __init__(self, group: Group, path: str, begin: Callable[[str], Any]):
        """Rank 0 calls `begin(temporary)`; its JSON result is `.layout` on all ranks. Collective."""
        self._group, self.path = group, path

        def make() -> list[Any]:
            check_place(path)
            temporary = temporary_beside(path)
            try:
                return [temporary, _named(path, lambda: begin(temporary))]
            except BaseException:
                os.unlink(temporary)
                raise

        self._temporary, self.layout = root_decides(group, make)
        self._handle = -1
        try:
            agree(group, self._open)
        except IterReduceError:
            self._drop()
            raise

    def _open(self) -> None:
        try:
            self._handle = os.open(self._temporary, os.O_WRONLY)
        except OSError as error:
            raise OutputError(
                f"{self.path}: rank {self._group.rank} does not see the file that rank 0 made ({error}); "
                "write to a file system that all nodes share"
            ) from error

    def put(self, data: Any, offset: int) -> None:
        """Write an array's bytes. Local. Raises `OutputError`."""
        _named(self.path, lambda: pwrite_all(self._handle, data, offset))

    @property
    def handle(self) -> int:
        """The open file."""
        return self._handle

    def finish(self, failure: BaseException | None = None) -> None:
        """Publish the file if no rank failed, else remove it and raise on all ranks. Collective."""
        try:
            agree(self._group, lambda: self._flush(failure))
            root_decides(self._group, lambda: _named(self.path, lambda: publish(self._temporary, self.path)))
        finally:
            self._drop()

    def _flush(self, failure: BaseException | None) -> None:
        if failure is not None:
            raise failure if isinstance(failure, IterReduceError) else _stopped(self.path, failure)
        _named(self.path, lambda: os.fsync(self._handle))

    def _drop(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._group.rank == 0:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)


def _stopped(path: str, failure: BaseException) -> OutputError:
    return OutputError(f"{path} was not written: {type(failure).__name__}: {failure}")


def _named(path: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except OSError as error:
        raise OutputError(why_not_written(path, error)) from error


class RowWriter:
    """A .npy or .h5 file of `rows_total` rows, to which every rank writes rows at their places, in any order.

    Collective: making, `close`, and leaving a ``with`` block. `write` is local. Columns are of fixed dtypes;
    one column makes a plain .npy array, several a structured one. Raises `OutputError`, `UsageError`.

    >>> import tempfile
    >>> from iterreduce.collectives import SoloGroup
    >>> rows = Batch(x=np.arange(4.0))
    >>> path = tempfile.mkdtemp() + "/x.npy"
    >>> with RowWriter(SoloGroup(), path, rows.schema, 4) as file:
    ...     file.write(2, rows.slice(2, 4))
    ...     file.write(0, rows.slice(0, 2))
    >>> np.load(path)
    array([0., 1., 2., 3.])
    """

    def __init__(self, group: Group, path: str | os.PathLike[str], schema: Schema, rows_total: int):
        self._path, self._schema, self._rows = os.fspath(path), schema, rows_total
        agree(group, self._check)
        self._file = SharedFile(group, self._path, self._begin)

    def _check(self) -> None:
        suffix = output_suffix(self._path)
        if suffix not in (".npy", ".h5", ".hdf5"):
            raise UsageError(
                f"{self._path}: rows can be written in parallel to .npy and .h5, not to {suffix}"
            )
        ragged = [name for name, field in self._schema.items() if field.kind != "fixed" or field.nullable]
        if ragged:
            found = self._schema[ragged[0]].describe()
            raise UsageError(
                f'{self._path}: column "{ragged[0]}" is {found}; wanted columns of one length, without nulls'
            )
        self._is_npy = suffix == ".npy"

    def _begin(self, temporary: str) -> dict[str, int]:
        row_bytes = sum(field.row_bytes for field in self._schema.values())
        check_room(self._path, row_bytes * self._rows)
        if not self._is_npy:
            return hdf5_create(temporary, self._schema, self._rows)
        dtype, shape = npy_dtype(self._path, self._schema, {})
        header = npy_header(dtype, (self._rows, *shape))
        with open(temporary, "wb") as file:
            file.write(header)
            file.truncate(len(header) + row_bytes * self._rows)
        return {"": len(header)}

    def write(self, first_row: int, batch: Batch) -> None:
        """Put rows at row `first_row`. Local. Raises `SchemaError` for other columns, or rows outside."""
        found = difference(bare(batch.schema), bare(self._schema))
        if found:
            raise SchemaError(f"rows for {self._path}: {found}")
        if first_row < 0 or first_row + len(batch) > self._rows:
            raise SchemaError(
                f"rows {first_row} to {first_row + len(batch)} of {self._path}, which has {self._rows}"
            )
        if self._is_npy:
            dtype, shape = npy_dtype(self._path, self._schema, {})
            row_bytes = int(dtype.itemsize * np.prod(shape, dtype=np.int64))
            self._file.put(npy_rows(batch, dtype), self._file.layout[""] + first_row * row_bytes)
        else:
            _named(
                self._path,
                lambda: write_hdf5_rows(self._file.handle, self._file.layout, self._schema, first_row, batch),
            )

    def close(self) -> None:
        """Make the file durable and give it its name. Collective."""
        self._file.finish()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: Any, failure: BaseException | None, trace: Any) -> None:
        leave(self._file, failure)


def leave(file: SharedFile, failure: BaseException | None) -> None:
    """Finish a file at the end of a ``with`` block; a rank's own failure stays as it was. Collective."""
    try:
        file.finish(failure)
    except IterReduceError:
        if failure is None:
            raise


def write_text_blocks(
    group: Group, path: str | os.PathLike[str], count: int, make: Callable[[int], bytes], header: bytes = b""
) -> int:
    """Write ``header + make(0) + make(1) + ... + make(count - 1)``; returns the bytes written.

    Collective.

    Ranks make blocks in turn, one each at a time, so `make` must depend on nothing but the block's number.
    Errors of `make` are raised on all ranks, and the file is not there then.
    """
    path = os.fspath(path)
    file = SharedFile(group, path, lambda temporary: None)
    failure: BaseException | None = None
    end = len(header)
    try:
        end = _text_rounds(group, file, count, make, header)
    except IterReduceError as error:
        failure = error
    file.finish(failure)
    return end


def _text_rounds(
    group: Group, file: SharedFile, count: int, make: Callable[[int], bytes], header: bytes
) -> int:
    end = len(header)
    if group.rank == 0:
        agree(group, lambda: file.put(np.frombuffer(header, np.uint8), 0))
    else:
        agree(group, lambda: None)
    sizes = np.zeros(group.size, np.int64)
    for first in range(0, count, group.size):
        block = first + group.rank
        text = agree(group, lambda block=block: make(block) if block < count else b"")  # type: ignore[misc]
        group.allgather(np.array([len(text)], np.int64), sizes)
        at = end + int(sizes[: group.rank].sum())
        agree(group, lambda text=text, at=at: file.put(np.frombuffer(text, np.uint8), at))  # type: ignore[misc]
        end += int(sizes.sum())
    return end
