"""Files as bytes and as HDF5: the only module that imports h5py, and only once an HDF5 file is touched.

It offers files that appear whole or not at all (`replacing`), and datasets read and written by row range. It
does not know what a source is, how rows are cut into blocks, or that there are other ranks:
`iterreduce.sources` speaks to it, as checkpoints do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import FIXED_KINDS, Field, Schema
from iterreduce.errors import InputError, OutputError, did_you_mean
from iterreduce.heaps import CheckedFile, checked, own_rows

# ---------------------------------------------------------------- files that appear whole or not at all


def temporary_beside(path: str) -> str:
    """A fresh, empty file in the directory of `path`, with the permissions that `open` would give."""
    directory, name = os.path.split(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".part", dir=directory)
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(handle, 0o666 & ~mask)
    os.close(handle)
    return temporary


def publish(temporary: str, path: str) -> None:
    """Give a finished temporary file its name, and make both durable: after this, a crash cannot undo it."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(os.path.dirname(os.path.abspath(path)))


def sync_directory(directory: str) -> None:
    """Make the names in a directory durable; file systems that cannot do so are left alone."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A temporary name to write to; it becomes `path` if the block ends well, and vanishes if not.

    Raises `OutputError` for what the system says (a full disk, no permission); what stood at `path` stays.
    """
    temporary = ""
    try:
        temporary = temporary_beside(path)
        yield temporary
        publish(temporary, path)
    except (OSError, RuntimeError) as error:  # HDF5 says some system errors as RuntimeError
        raise OutputError(why_not_written(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def why_not_written(path: str, error: OSError | RuntimeError) -> str:
    """The message for a system error while writing."""
    if not isinstance(error, OSError):
        return f"{path} could not be written: {error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: the disk is full; no partial file is left, and what stood there before is unchanged"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path}: no permission to write there ({os.strerror(error.errno)})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"{path}: {no_directory(os.path.dirname(os.path.abspath(path)))}"
    return f"{path} could not be written: {error}"


def no_directory(directory: str) -> str:
    """The message for a directory that is not there, with the nearest name beside it."""
    if os.path.isdir(directory):
        return f"nothing can be created in {directory}"
    parent, name = os.path.split(directory)
    try:
        beside = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()]
    except OSError:
        return f"there is no directory {directory}; create it first"
    return f"there is no directory {directory}; create it first{did_you_mean(name, beside)}"


def write_text(path: str, text: str) -> None:
    """Write a text file whole or not at all (UTF-8). Raises `OutputError`.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/summary.json"
    >>> write_text(path, "{}"); open(path).read()
    '{}'
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


# ---------------------------------------------------------------- columns of fixed-width text


def fixed_width_text(cells: Array, kind: str) -> Ragged:
    """NumPy ``S`` or ``U`` cells as a `Ragged` column; trailing zeros are padding. No loop over rows."""
    if cells.dtype.kind == "U":
        cells = np.char.encode(cells, "utf-8") if len(cells) else cells.astype("S1")
    rows, width = len(cells), cells.dtype.itemsize
    chars = (
        np.ascontiguousarray(cells).view(np.uint8).reshape(rows, width)
        if width
        else np.zeros((rows, 0), np.uint8)
    )
    used = np.zeros(rows, np.int64)
    for position in range(width):
        used[chars[:, position] != 0] = position + 1
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(used, out=offsets[1:])
    return Ragged(offsets, chars[np.arange(width) < used[:, None]], kind)  # type: ignore[arg-type]


# ---------------------------------------------------------------- HDF5: reading by row range

# A reader of a shared file must not fail where the file system has no locks (many parallel ones).
LOCKING = "best-effort"


@dataclass(frozen=True)
class Hdf5Column:
    """One column of a file: which dataset, which field of a compound dataset, its type and length."""

    name: str
    dataset: str
    member: str | None
    field: Field
    rows: int


@contextlib.contextmanager
def _hdf5_to_read(path: str, through: CheckedFile | None = None) -> Iterator[Any]:
    import h5py

    try:
        file = h5py.File(through or path, "r", locking=LOCKING)
    except OSError as error:
        if "truncated" in str(error) or "eof" in str(error):
            raise InputError(
                f"{path} is truncated: its end is missing, or its writer died; write it again ({error})"
            ) from error
        raise InputError(f"{path} cannot be opened as HDF5: {error}") from error
    with file:
        yield file


def hdf5_columns(path: str, inside: str, wanted: Sequence[str] | None = None) -> list[Hdf5Column]:
    """The columns at `inside` ("/" or a group: its datasets; a dataset: itself). Raises `InputError`.

    Datasets of shape () are parameters, not columns, and are left out; so are subgroups. `wanted`: others are
    not looked at; those that are not there are missing in the result.
    """
    import h5py

    with _hdf5_to_read(path) as file:
        node = _hdf5_node(path, file, inside)
        if isinstance(node, h5py.Dataset):
            found = _hdf5_fields(path, inside.rstrip("/").rsplit("/", 1)[-1], node, wanted)
        else:
            datasets = [(n, d) for n, d in node.items() if isinstance(d, h5py.Dataset) and d.shape]
            if not datasets:
                raise InputError(_no_datasets(path, inside, node))
            found = [column for name, data in datasets for column in _hdf5_fields(path, name, data, wanted)]
        return _with_masks(file, found)


def _with_masks(file: Any, found: list[Hdf5Column]) -> list[Hdf5Column]:
    """Mark the columns that a mask dataset belongs to (see `VALID_ATTRIBUTE`) as nullable."""
    masked = {c.name for c in found if VALID_ATTRIBUTE in file[c.dataset].attrs}
    return [
        Hdf5Column(
            c.name, c.dataset, c.member, Field(c.field.kind, c.field.dtype, c.field.shape, True), c.rows
        )
        if c.name in masked
        else c
        for c in found
    ]


# The attribute of a dataset that names the bool dataset of its valid rows; written by this package.
VALID_ATTRIBUTE = "iterreduce_valid"


def _hdf5_node(path: str, file: Any, inside: str) -> Any:
    try:
        return file[inside or "/"]
    except (KeyError, ValueError):
        known: list[str] = []
        file.visit(lambda name: known.append("/" + name) if len(known) < 1000 else None)
        listed = ", ".join(known[:20]) or "nothing"
        raise InputError(
            f"{path} has no {inside} (it holds: {listed}){did_you_mean(inside, known)}"
        ) from None


def _no_datasets(path: str, inside: str, node: Any) -> str:
    groups = [
        f"{path}:{inside.rstrip('/')}/{name}" for name, child in node.items() if hasattr(child, "items")
    ]
    hint = f"; it holds groups: {', '.join(groups[:10])}" if groups else ""
    return f"{path} has no columns at {inside}: wanted datasets with a first axis of rows{hint}"


def _hdf5_fields(path: str, name: str, dataset: Any, wanted: Sequence[str] | None = None) -> list[Hdf5Column]:
    """The columns of one dataset that are wanted: one, or one for each member of a compound dtype."""
    if not dataset.shape:
        raise InputError(f"{path}:{dataset.name} holds a single value: wanted rows")
    if dataset.dtype.names:
        return [
            Hdf5Column(
                m,
                dataset.name,
                m,
                _hdf5_field(path, f"{dataset.name}.{m}", dataset.dtype[m], ()),
                dataset.shape[0],
            )
            for m in dataset.dtype.names
            if wanted is None or m in wanted
        ]
    if wanted is not None and name not in wanted:
        return []
    field = _hdf5_field(path, dataset.name, dataset.dtype, dataset.shape[1:])
    return [Hdf5Column(name, dataset.name, None, field, dataset.shape[0])]


def _hdf5_field(path: str, where: str, dtype: Any, shape: tuple[int, ...]) -> Field:
    import h5py

    if h5py.check_string_dtype(dtype) is not None and not shape:
        return Field("text", np.dtype(np.uint8))
    values = h5py.check_vlen_dtype(dtype)
    if values is not None and np.dtype(values).kind in FIXED_KINDS and not shape:
        kind = np.dtype(values)
        return Field("bytes" if kind == np.uint8 else "list", kind)
    base, inner = (dtype.subdtype[0], dtype.subdtype[1]) if dtype.subdtype else (dtype, ())
    if base.kind not in FIXED_KINDS or base.hasobject:
        raise InputError(f"{path}:{where} holds {dtype}: wanted numbers, bools or one text per row")
    return Field("fixed", base.newbyteorder("="), (*shape, *inner))


def hdf5_rows(path: str, columns: Sequence[Hdf5Column], lo: int, hi: int) -> tuple[Batch, int]:
    """Rows `lo` to `hi` of these columns, read as one hyperslab each, and their bytes. Raises `InputError`.

    Of the records of a compound dataset the members wanted are kept; their bytes count as a whole.
    """
    with _hdf5_to_read(path) as file:
        found: dict[str, Any] = {}
        valid: dict[str, Array | None] = {}
        records = _hdf5_records(path, file, columns, lo, hi)
        nbytes = sum((hi - lo) * file[name].dtype.itemsize for name in records)
        for column in columns:
            try:
                with checked(path, file[column.dataset], column.field.nullable, _hdf5_to_read) as dataset:
                    found[column.name] = _hdf5_slab(dataset, column, records.get(column.dataset), lo, hi)
                    nbytes += 0 if column.member else _slab_bytes(dataset, found[column.name])
                    if column.field.nullable:
                        mask = own_rows(path, dataset.file[dataset.attrs[VALID_ATTRIBUTE]])
                        valid[column.name] = mask[lo:hi].astype(bool)
                        nbytes += hi - lo
            except (OSError, KeyError) as error:
                raise _unreadable(path, column.dataset, lo, hi, error) from error
        return Batch.from_dict(found, valid), nbytes


def _hdf5_records(path: str, file: Any, columns: Sequence[Hdf5Column], lo: int, hi: int) -> dict[str, Array]:
    """Of each compound dataset the members wanted, as records: one read of each."""
    members: dict[str, list[str]] = {}
    for column in columns:
        if column.member is not None:
            members.setdefault(column.dataset, []).append(column.member)
    found = {}
    for name, wanted in members.items():
        try:
            with checked(path, file[name], False, _hdf5_to_read) as dataset:
                found[name] = dataset.fields(wanted)[lo:hi]
        except (OSError, KeyError) as error:
            raise _unreadable(path, name, lo, hi, error) from error
    return found


def _unreadable(path: str, dataset: str, lo: int, hi: int, error: Exception) -> InputError:
    return InputError(
        f"{path}:{dataset} rows {lo} to {hi} cannot be read: {error} "
        "(a damaged file, or a filter that is not installed)"
    )


def _slab_bytes(dataset: Any, column: Array | Ragged) -> int:
    """What rows take in a file that is not compressed; of variable length with a pointer each."""
    kept = 0 if dataset.dtype.kind == "S" or not isinstance(column, Ragged) else column.values.nbytes
    per_row = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64))
    return int(len(column) * per_row + kept)


def _hdf5_slab(dataset: Any, column: Hdf5Column, records: Array | None, lo: int, hi: int) -> Array | Ragged:
    field = column.field
    if records is not None:
        cells = records[column.member]
        if field.kind != "fixed":
            return _ragged_cells(cells, field)
        return np.ascontiguousarray(cells).astype(field.dtype, copy=False)
    if field.kind != "fixed":
        return _ragged_cells(dataset[lo:hi], field)
    out = np.empty((hi - lo, *field.shape), field.dtype)
    if out.size:
        dataset.read_direct(out, np.s_[lo:hi])
    return out


def _ragged_cells(cells: Array, field: Field) -> Ragged:
    if cells.dtype.kind == "S":
        return fixed_width_text(cells, field.kind)
    rows = cells.tolist()
    if field.kind == "text":
        raw = Ragged.from_list([row if isinstance(row, bytes) else row.encode() for row in rows])
        return Ragged(raw.offsets, raw.values, "text")
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
    values = np.concatenate([np.zeros(0, field.dtype), *rows]).astype(field.dtype, copy=False)
    return Ragged(offsets, values, field.kind)  # type: ignore[arg-type]


# ---------------------------------------------------------------- HDF5: writing


def pwrite_all(handle: int, data: Array, offset: int) -> None:
    """Write all bytes of a contiguous array at an offset, however many calls that takes."""
    view = data.reshape(-1).view(np.uint8).data if data.size else memoryview(b"")
    while len(view):
        written = os.pwrite(handle, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written


def hdf5_dtype(field: Field, width: int = 0) -> Any:
    """The HDF5 type of a column's rows: h5py's, and dates as tagged opaque bytes.

    Text of a known `width` is of fixed length (its bytes have a place before they are known), else variable.
    """
    import h5py

    if field.kind == "text":
        return h5py.string_dtype("utf-8", width or None)
    if field.kind != "fixed":
        return h5py.vlen_dtype(field.dtype)
    return h5py.opaque_dtype(field.dtype) if field.dtype.kind in "mM" else field.dtype


def hdf5_create(
    path: str, schema: Schema, rows: int, widths: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Lay out an HDF5 file of `rows` rows; returns where the rows of each column, and of masks
    (``NAME.valid``), begin.

    Datasets are contiguous and allocated at once, so any process may fill them with ``os.pwrite`` at these
    byte offsets. Ragged columns without a width get a dataset of variable length and no offset, for
    `hdf5_write_ragged`. The bytes depend on the arguments only.
    """
    import h5py

    offsets: dict[str, int] = {}
    with h5py.File(path, "w", libver=("earliest", "v110"), locking=LOCKING, track_order=True) as file:
        for name, field in schema.items():
            width = (widths or {}).get(name, 0)
            dataset = _hdf5_dataset(file, name, (rows, *field.shape), hdf5_dtype(field, width))
            if field.kind == "fixed" or width:
                offsets[name] = dataset.id.get_offset() or 0
            if field.nullable:
                mask = _hdf5_dataset(file, f"{VALID_GROUP}/{name}", (rows,), np.dtype(bool))
                dataset.attrs[VALID_ATTRIBUTE] = mask.name
                offsets[f"{name}.valid"] = mask.id.get_offset() or 0
    return offsets


VALID_GROUP = "iterreduce_valid"


def _hdf5_dataset(file: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    import h5py

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_obj_track_times(False)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    ragged = h5py.check_dtype(vlen=dtype) is not None
    layout.set_fill_time(h5py.h5d.FILL_TIME_ALLOC if ragged else h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(dtype, logical=True)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, layout, _hdf5_links()))


def _hdf5_links() -> Any:
    """How a dataset is linked in: groups on the way are made, names are UTF-8."""
    import h5py

    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return links


def hdf5_write_ragged(path: str, first_row: int, columns: dict[str, Ragged]) -> None:
    """Put rows into variable-length datasets of a file that `hdf5_create` made. One process at a time."""
    import h5py

    with h5py.File(path, "r+", locking=LOCKING) as file:
        for name, column in columns.items():
            dataset, plain = file[name], column.kind == "list"
            cells = np.empty(len(column), dataset.dtype)
            for i, row in enumerate(column.to_list() if plain else _raw_cells(column)):
                cells[i] = np.asarray(row) if plain else row  # all at once, equal lengths would make a matrix
            place = dataset.id.get_space()
            place.select_hyperslab((first_row,), cells.shape)
            dataset.id.write(h5py.h5s.create_simple(cells.shape), place, cells)


def _raw_cells(column: Ragged) -> list[Any]:
    as_bytes = Ragged(column.offsets, column.values, "bytes").to_list()
    return as_bytes if column.kind == "text" else [np.frombuffer(row, np.uint8) for row in as_bytes]


# ---------------------------------------------------------------- HDF5: files laid out in memory

Dataset = tuple[str, tuple[int, ...], np.dtype[Any]]  # full name, shape, dtype


def hdf5_lay_out(memory: Any, datasets: Sequence[Dataset]) -> list[int]:
    """Write to a file object an HDF5 file of contiguous datasets, without their data; says at which byte each
    begins (0 for one of no bytes).

    The same arguments give the same bytes under one version of HDF5.
    """
    offsets = []
    with _hdf5_in_memory(memory) as file:
        for name, shape, dtype in datasets:
            made = _hdf5_dataset(file, name, shape, hdf5_dtype(Field("fixed", dtype)))
            offsets.append(made.id.get_offset() or 0)
    return offsets


# a file, all rows of its dataset, the first of these, how many, and which they are in the whole
Part = tuple[str, int, int, int, int]


def hdf5_index(memory: Any, datasets: Sequence[tuple[Dataset, Sequence[Part]]]) -> None:
    """Write to a file object the HDF5 file in which each dataset is put together from rows of the dataset of
    the same name in other files beside it.
    """
    import h5py

    with _hdf5_in_memory(memory) as file:
        for (name, shape, dtype), parts in datasets:
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_obj_track_times(False)
            for part in parts:
                _hdf5_map(layout, shape, name, part)
            kind = h5py.h5t.py_create(hdf5_dtype(Field("fixed", dtype)), logical=True)
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(file.id, name.encode(), kind, space, layout, _hdf5_links())


def _hdf5_map(layout: Any, shape: tuple[int, ...], source: str, part: Part) -> None:
    import h5py

    path, of, first, rows, at = part
    here, there = h5py.h5s.create_simple(shape), h5py.h5s.create_simple((of, *shape[1:]))
    here.select_hyperslab((at, *(0 for _ in shape[1:])), (rows, *shape[1:]))
    there.select_hyperslab((first, *(0 for _ in shape[1:])), (rows, *shape[1:]))
    layout.set_virtual(here, path.encode(), source.encode(), there)


@contextlib.contextmanager
def _hdf5_in_memory(memory: Any) -> Iterator[Any]:
    import h5py

    pages = {"alignment_threshold": 1 << 16, "alignment_interval": 1 << 12}  # larger data begin on a page
    with h5py.File(memory, "w", libver=("earliest", "v110"), track_order=True, **pages) as file:
        yield file
