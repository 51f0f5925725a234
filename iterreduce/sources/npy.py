"""NumPy's own files: .npy (one array) and .npz (a zip archive of them), read by row range and never
unpickled.

The header is parsed here (format: numpy.lib.format in NumPy's reference), because rows are wanted without the
rest of the array, and so that each way in which a file can be wrong has its own message.
"""

from __future__ import annotations

import ast
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import FIXED_KINDS, Field, Schema
from iterreduce.errors import InputError
from iterreduce.sources.asked import Bounds, Peek, hint
from iterreduce.sources.files import Found, refuse_object
from iterreduce.storage import fixed_width_text

# A header is a short literal; a longer one is junk, or an attack on the parser.
HEADER_BYTES = 1 << 20
# Records that are read at a time, to keep some of their fields: they stay in cache.
PIECE_BYTES = 1 << 20

# Up to 3.11.4, Python counts the depth of a syntax tree once for all threads: two that parse at a time meet a
# SystemError.
_parsing = threading.Lock()


@dataclass(frozen=True)
class Header:
    """What an .npy header promises; `start` is the offset of the first row."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(self.dtype.itemsize * np.prod(self.shape[1:], dtype=np.int64))

    @property
    def data_bytes(self) -> int:
        """Bytes of all rows."""
        return self.row_bytes * self.shape[0]


def read_header(file: IO[bytes], what: str) -> Header:
    """Parse the header at the start of `file`. Raises `InputError`, naming `what`."""
    try:
        magic = _exactly(file, 8)
        width = 2 if magic[6] == 1 else 4
        length = int.from_bytes(_exactly(file, width), "little")
        if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3) or length > HEADER_BYTES:
            raise ValueError(f"magic {magic!r}, header of {length} bytes")
        text = _exactly(file, length).decode("utf-8" if magic[6] == 3 else "latin-1")
        fields = _literal(text)
        dtype = np.lib.format.descr_to_dtype(fields["descr"])
        header = Header(
            dtype, tuple(map(int, fields["shape"])), bool(fields["fortran_order"]), 8 + width + length
        )
    except EOFError as error:
        raise InputError(f"{what} is truncated: it ends within its header") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{what} is not a readable .npy file: its header is damaged ({error})") from error
    return _checked(header, what)


def _literal(text: str) -> Any:
    try:
        with _parsing:
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"it says {text.strip()[:60]!r}") from error


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _checked(header: Header, what: str) -> Header:
    if header.dtype.hasobject:
        path, _, member = what.partition(":")
        raise refuse_object(path, f'"{member}"' if member else "it")
    if not header.shape:
        raise InputError(f"{what} holds a single value, not rows")
    if min(header.shape) < 0:
        raise InputError(f"{what} is not a readable .npy file: its shape is {header.shape}")
    return header


def fields_of(header: Header, name: str, what: str) -> dict[str, Field]:
    """The columns of an array: the fields of a structured dtype, or one column `name`."""
    if header.dtype.names is None:
        return {name: _field(header.dtype, header.shape[1:], what)}
    if len(header.shape) > 1:
        raise InputError(f"{what}: a structured array of shape {header.shape}; wanted one dimension (rows)")
    return {n: _field(header.dtype[n], (), f"{what}.{n}") for n in header.dtype.names}


def _field(dtype: np.dtype[Any], shape: tuple[int, ...], what: str) -> Field:
    base, inner = dtype.subdtype or (dtype, ())
    shape = (*shape, *inner)
    if base.kind in "US" and not shape:
        return Field("text" if base.kind == "U" else "bytes", np.dtype(np.uint8))
    if base.kind not in FIXED_KINDS:
        raise InputError(
            f"{what} holds {dtype} of shape {shape}: wanted numbers, bools, dates, or one text per row"
        )
    return Field("fixed", base.newbyteorder("="), shape)


def column_of(values: Array, field: Field) -> Any:
    """An array as read, as a column of this field: native byte order, contiguous, text as `Ragged`."""
    if field.kind != "fixed":
        return fixed_width_text(values, field.kind)
    return np.ascontiguousarray(values).astype(field.dtype, copy=False)


def rows_of(path: str, header: Header, lo: int, hi: int) -> Array:
    """Rows ``[lo, hi)`` of an array that stands uncompressed in a file."""
    if header.fortran and len(header.shape) > 1:
        mapped = (
            np.memmap(path, header.dtype, "r", header.start, header.shape, "F") if header.data_bytes else None
        )
        return (
            np.empty((0, *header.shape[1:]), header.dtype)
            if mapped is None
            else np.ascontiguousarray(mapped[lo:hi])
        )
    count = (hi - lo) * header.row_bytes // max(1, header.dtype.itemsize)
    values = np.fromfile(path, header.dtype, count, offset=header.start + lo * header.row_bytes)
    if len(values) < count:
        raise InputError(f"{path} became shorter while it was read")
    return values.reshape(hi - lo, *header.shape[1:])


class Npy:
    """One array per file: rows ``(n,)`` or ``(n, d)`` are column ``x``; records give their fields."""

    suffix: str = ".npy"
    suffixes: tuple[str, ...] = (".npy",)
    masks = uses_bounds = False

    def __init__(self) -> None:
        self._headers: dict[str, Header] = {}  # of files that are read a piece at a time

    def _header(self, path: str) -> Header:
        with open(path, "rb") as file:
            return read_header(file, path)

    def release(self) -> None:
        """Forget headers. Local."""
        self._headers = {}

    def inspect(
        self, path: str, wanted: Sequence[str] | None = None, bounds: Bounds = (), glance: bool = False
    ) -> Found:
        """Fields and rows; a file shorter than its header says is refused."""
        header = self._header(path)
        held = os.path.getsize(path) - header.start
        fields = fields_of(header, "x", path)
        if held < header.data_bytes:
            raise InputError(
                f"{path} is truncated: its header promises {header.shape[0]} rows of {header.row_bytes} "
                f"bytes, the file holds {held // max(1, header.row_bytes)}; copy or write it again"
            )
        return Found({**fields}, header.shape[0])

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> tuple[Batch, int]:
        """Rows by one read at their offset; records piece by piece, of which the wanted fields are kept."""
        if path not in self._headers:
            self._headers[path] = self._header(path)
        header = self._headers[path]
        nbytes = (hi - lo) * header.row_bytes
        if header.dtype.names is not None:
            return Batch.from_dict(_fields_of_records(path, header, schema, lo, hi)), nbytes
        values = rows_of(path, header, lo, hi)
        return Batch.from_dict({n: column_of(values, f) for n, f in schema.items()}), nbytes


def _fields_of_records(path: str, header: Header, schema: Schema, lo: int, hi: int) -> dict[str, Any]:
    """Columns of rows ``[lo, hi)`` of records. The records themselves are never held as a whole."""
    step = max(1, PIECE_BYTES // max(1, header.row_bytes))
    out = {n: np.empty((hi - lo, *f.shape), f.dtype) for n, f in schema.items() if f.kind == "fixed"}
    text: dict[str, list[Ragged]] = {n: [] for n in schema if n not in out}
    for at in range(lo, hi, step):
        records = rows_of(path, header, at, min(at + step, hi))
        for name, column in out.items():
            column[at - lo : at - lo + len(records)] = records[name]
        for name, parts in text.items():
            parts.append(fixed_width_text(records[name], schema[name].kind))
    empty = Batch.empty(schema)
    return {n: out[n] if n in out else Ragged.concat(text[n] or [empty[n]]) for n in schema}


class Npz:
    """Named arrays of equal length; stored ones are read by offset, compressed ones up to the rows wanted.

    Members of shape () are parameters, not columns, and are left out. A bool member ``NAME.valid`` beside
    ``NAME`` is that column's mask (this package writes it so).
    """

    suffix: str = ".npz"
    suffixes: tuple[str, ...] = (".npz",)
    masks, uses_bounds = True, False

    def __init__(self) -> None:
        self._members: dict[str, dict[str, Member]] = {}

    def inspect(
        self, path: str, wanted: Sequence[str] | None = None, bounds: Bounds = (), glance: bool = False
    ) -> Found:
        """Fields and rows from the members' headers; who asks (one rank) also verifies the checksums.

        That reads the members wanted once, a piece at a time: later reads go by offset, past the archive's
        own checks.
        """
        found, nbytes = self.inspect_members(path, _with_masks(wanted), set() if glance else None, glance)
        rows = {name: n for name, (_, n) in found.items()}
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{n} {r}" for n, r in rows.items())
            raise InputError(f"{path}: columns must have one length; rows: {listed}")
        fields = _nullable({n: field for n, (field, _) in found.items()})
        return Found(fields, next(iter(rows.values()), 0), None, nbytes)

    def inspect_members(
        self,
        path: str,
        wanted: Collection[str] | None = None,
        verified: Collection[str] | None = None,
        lenient: bool = False,
    ) -> tuple[dict[str, tuple[Field | None, int]], int]:
        """Field and rows of every member wanted that holds rows, and the bytes that were read to verify them.

        None: all members; `lenient`: a member that cannot be read has no field. Raises `InputError`.
        """
        found: dict[str, tuple[Field | None, int]] = {}
        nbytes = 0
        with _archive(path) as archive:
            for name, info in _members(archive).items():
                if wanted is not None and name not in wanted:
                    continue
                header = _member_header(path, archive, info)
                if header is None:
                    continue
                if verified is None or name in verified:
                    _verify(path, archive, info)
                    nbytes += header.data_bytes
                field = hint(lambda: _member_field(path, header, name)) if lenient else None  # noqa: B023
                found[name] = (field if lenient else _member_field(path, header, name), header.shape[0])
        return found, nbytes

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> tuple[Batch, int]:
        """Rows of the columns wanted; other members are not touched."""
        rows = {n: column_of(self._rows(path, n, lo, hi), f) for n, f in schema.items()}
        masks = {n: self._rows(path, f"{n}.valid", lo, hi) for n, f in schema.items() if f.nullable}
        names = [*rows, *(f"{n}.valid" for n in masks)]
        row_bytes = sum(self._members[path][name].header.row_bytes for name in names)
        return Batch.from_dict(rows, masks), (hi - lo) * row_bytes

    def _rows(self, path: str, name: str, lo: int, hi: int) -> Array:
        members = self._members.setdefault(path, {})
        if name not in members:
            with _archive(path) as archive:
                members[name] = Member.of(path, archive, _members(archive)[name])
        return members[name].rows(lo, hi)

    def release(self) -> None:
        """Close members that are open for a later read. Local."""
        self._members = {}


def format_of(path: str) -> str:
    """What the single value ``format`` of an archive says, as SciPy writes it; "" if there is none."""
    with _archive(path) as archive:
        info = _members(archive).get("format")
        if info is None:
            return ""
        if _member_header(path, archive, info) is not None:
            return ""  # a column of that name
        data = archive.read(info)
    return data[data.index(b"\n") + 1 :].replace(b"\0", b"").decode("latin-1")


def _member_field(path: str, header: Header, name: str) -> Field:
    field = fields_of(header, name, f"{path}:{name}")
    if header.dtype.names is not None:
        raise InputError(f'{path}: "{name}" is a structured array; save each of its fields by name')
    return field[name]


def _with_masks(wanted: Sequence[str] | None) -> set[str] | None:
    """The members that columns wanted need: their masks, and what they themselves may be masks of."""
    if wanted is None:
        return None
    return {name for n in wanted for name in (n, f"{n}.valid", n.removesuffix(".valid"))}


def _nullable(fields: Peek) -> Peek:
    """Fold the mask members into their columns."""
    masks = {f"{n}.valid" for n in fields} & {
        n for n, f in fields.items() if f is not None and f.dtype == np.bool_ and not f.shape
    }
    return {
        n: f and Field(f.kind, f.dtype, f.shape, f"{n}.valid" in masks)
        for n, f in fields.items()
        if n not in masks
    }


def _archive(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(
            f"{path} is truncated or damaged: it has no zip directory ({error}); write it again"
        ) from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}


def _member_header(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header | None:
    """The header of a member; None for a single value (shape ())."""
    what = f"{path}:{info.filename.removesuffix('.npy')}"
    try:
        with archive.open(info) as member:
            return read_header(member, what)
    except InputError as error:
        if "a single value" in str(error):
            return None
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{what} is damaged: {error}") from error


def _verify(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raise `InputError` where a member's bytes are not those that its checksum was made of."""
    try:
        with archive.open(info) as member:
            while member.read(1 << 20):  # the archive compares the checksum at the end
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        what = f"{path}:{info.filename.removesuffix('.npy')}"
        raise InputError(f"{what} is damaged: {error}; write it again") from error


class Member:
    """One array in an archive. A compressed one stays open behind the last row read: reading on is cheap."""

    def __init__(self, path: str, name: str, header: Header, start: int | None):
        self._path, self._name, self.header, self._start = path, name, header, start
        self._stream: Any = None

    @classmethod
    def of(cls, path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
        """The member with what its header says."""
        header = _member_header(path, archive, info)
        assert header is not None
        stored = info.compress_type == zipfile.ZIP_STORED
        return cls(path, info.filename, header, _data_start(path, info) if stored else None)

    def rows(self, lo: int, hi: int) -> Array:
        """Rows ``[lo, hi)``. Raises `InputError`."""
        header = self.header
        if self._start is not None:
            return rows_of(self._path, replace(header, start=self._start + header.start), lo, hi)
        try:
            if header.fortran and len(header.shape) > 1:
                data = self._bytes(header.start, header.data_bytes)
                whole = np.frombuffer(data, header.dtype).reshape(header.shape, order="F")
                return np.ascontiguousarray(whole[lo:hi])
            data = self._bytes(header.start + lo * header.row_bytes, (hi - lo) * header.row_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            what = f"{self._path}:{self._name.removesuffix('.npy')}"
            raise InputError(f"{what} is damaged: {error}") from error
        return np.frombuffer(data, header.dtype).reshape(hi - lo, *header.shape[1:])

    def _bytes(self, start: int, count: int) -> bytearray:
        if self._stream is None or self._stream.tell() > start:
            self._stream = _archive(self._path).open(self._name)
        self._stream.seek(start)
        data = bytearray(count)
        if self._stream.readinto(data) < count:
            raise EOFError("fewer rows than its header promises")
        return data


def _data_start(path: str, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header, which varies in length."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    return int(info.header_offset + 30 + name_bytes + extra_bytes)
