"""Files and their rows: names, globs, magic bytes, identity; and the source over files of known length.

`RowsSource` serves every format that can say how many rows a file has without reading them (npy, npz, HDF5,
Parquet): several files are one long table, cut into blocks over file borders. Text is cut by bytes and lives
in `text.py`. Rank 0 alone looks at the file system in `open`; all ranks learn what it found.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema, difference, missing_column
from iterreduce.errors import InputError, UsageError, did_you_mean
from iterreduce.sources.agreement import root_decides
from iterreduce.sources.blocks import Blocks, bare, changed
from iterreduce.storage import no_directory

if TYPE_CHECKING:
    from iterreduce.collectives import Group

MAGIC = {
    b"\x93NUMPY": (".npy", "a NumPy .npy file"),
    b"\x89HDF\r\n\x1a\n": (".h5", "an HDF5 file"),
    b"PK\x03\x04": (".npz", "a zip archive, as .npz is"),
    b"PAR1": (".parquet", "a Parquet file"),
    b"\x1f\x8b": (".gz", "gzip-compressed"),
    b"BZh": (".bz2", "bzip2-compressed"),
    b"(\xb5/\xfd": (".zst", "zstd-compressed"),
    b"\xfd7zXZ": (".xz", "xz-compressed"),
}


@dataclass(frozen=True)
class FileState:
    """Which file, and which version of it."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> FileState:
        """What the file system says now. Raises `InputError`."""
        try:
            found = os.stat(path)
        except OSError as error:
            raise InputError(why_not_read(path, error)) from error
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raise `InputError` if the file is gone from here, or not the version that all ranks agreed on."""
        now = FileState.of(self.path)
        if now != self:
            was = f"{self.size} bytes then, {now.size} now" if now.size != self.size else "written again"
            raise InputError(
                f"{self.path} changed between open and read ({was}): let its writer finish, then run again"
            )


def why_not_read(path: str, error: OSError) -> str:
    """The message for a system error while opening a file to read."""
    directory, name = os.path.split(path)
    if isinstance(error, FileNotFoundError):
        try:
            beside = os.listdir(directory or ".")
        except OSError:
            return f"no file {path}: {no_directory(os.path.abspath(directory))}"
        return f"no file {path}{did_you_mean(name, beside)}"
    if isinstance(error, PermissionError):
        return f"no permission to read {path}"
    return f"{path} cannot be read: {error}"


def expand(path: str, suffixes: Sequence[str], refuse_empty: bool = True) -> list[str]:
    """The files that a path means: itself, the matches of a glob, or a directory's files; sorted by name.

    `suffixes`: which files of a directory count ("" for those without a suffix). Raises `InputError`.
    """
    if os.path.isdir(path):
        entries = sorted(
            e.name for e in os.scandir(path) if e.is_file() and not e.name.startswith((".", "_"))
        )
        paths = [os.path.join(path, n) for n in entries if suffix_of(n) in suffixes]
        if not paths:
            others = f"; it holds {', '.join(entries[:5])}" if entries else "; it is empty"
            wanted = " or ".join(s or "no suffix" for s in suffixes)
            raise InputError(f"directory {path} has no files that end in {wanted}{others}")
    elif not os.path.exists(path) and glob.has_magic(path):
        paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not paths:
            raise InputError(f"no file matches {path}")
    else:
        paths = [path]
    return [os.path.abspath(p) for p in paths]


def suffix_of(name: str) -> str:
    """The suffix that decides the format: ``.csv``, ``.csv.gz``; "" for none.

    >>> suffix_of("a/points.CSV"), suffix_of("log.txt.gz"), suffix_of("words")
    ('.csv', '.txt.gz', '')
    """
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    return os.path.splitext(stem)[1] + suffix if suffix == ".gz" else suffix


def check_magic(path: str, wanted: str) -> bytes:
    """The first 16 bytes of a file of kind `wanted` (a suffix; "" for text). Raises `InputError`."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(why_not_read(path, error)) from error
    if not head and wanted:
        raise InputError(f"{path} is empty (0 bytes): wanted {_kind_of(wanted)}")
    for magic, (suffix, words) in MAGIC.items():
        if head.startswith(magic) and suffix != wanted:
            advice = (
                f"rename it to end in {suffix}"
                if suffix in (".npy", ".h5", ".npz", ".parquet")
                else "unpack it first"
            )
            raise InputError(f"{path} is {words}, whatever its name says: {advice}")
    if wanted and not any(head.startswith(m) for m, (suffix, _) in MAGIC.items() if suffix == wanted):
        raise InputError(f"{path} is not {_kind_of(wanted)}: it begins with {head[:8]!r}")
    return head


def _kind_of(suffix: str) -> str:
    return next(words for s, words in MAGIC.values() if s == suffix)


class FileSource:
    """What all sources over files share: name, agreed files and token, projection."""

    suffixes: tuple[str, ...] = ()
    rereadable = True
    schema: Schema
    token: str
    blocks: Blocks

    def __init__(self, path: str):
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path.rstrip("/")) or self.path
        self.files: list[FileState] = []
        self._wanted: tuple[str, ...] | None = None

    def columns(self, names: Sequence[str]) -> Any:
        """The same source, reading these columns only; unknown names are refused by `open`."""

        def choose(other: FileSource) -> None:
            other._wanted = tuple(names)

        return changed(self, choose)

    def project(self, schema: Schema) -> Schema:
        """The schema of the wanted columns. Raises `InputError` with the nearest name."""
        if self._wanted is None:
            return schema
        for name in self._wanted:
            if name not in schema:
                raise InputError(f"{self.name}: {missing_column(name, schema)}")
        return Schema({name: schema[name] for name in self._wanted})

    def require_numeric(self, column: str) -> None:
        """Raise `InputError` if the column is not of numbers."""
        field = self.schema[column]
        if field.kind != "fixed" or field.dtype.kind not in "biuf":
            raise InputError(f'{self.name}: column "{column}" is {field.describe()}, wanted numbers')

    def make_token(self, *more: Any) -> str:
        """An agreed fingerprint of the files, their versions, and what is read of them."""
        parts = [type(self).__name__, [asdict(f) for f in self.files], self.schema.to_json(), more]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class RowFormat(Protocol):
    """A kind of file that knows its row count. Both methods are local and raise `InputError`."""

    suffix: str
    suffixes: tuple[str, ...]

    def inspect(self, path: str) -> tuple[Schema, int]:
        """Schema and rows of one file, without reading the rows."""

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> Batch:
        """Rows ``[lo, hi)`` of the columns of `schema`."""


class RowsSource(FileSource):
    """A source over one or more files of a `RowFormat`."""

    def __init__(self, path: str, form: RowFormat, block_rows: int | None = None):
        super().__init__(path)
        self.form, self.suffixes, self._block_rows = form, form.suffixes, block_rows
        self._first_rows: Array = np.zeros(1, np.int64)

    def open(self, group: Group) -> None:
        """Agree on files, schema and blocks. Collective."""
        found = root_decides(group, self._inspect)
        self.files = [FileState(*state) for state in found["files"]]
        self.schema = Schema.from_json(found["schema"])
        self._first_rows = np.concatenate([[0], np.cumsum(found["rows"], dtype=np.int64)]).astype(np.int64)
        self.blocks = Blocks.of_rows(int(self._first_rows[-1]), self._block_rows)
        self.token = self.make_token(self.form.suffix, getattr(self.form, "inside", ""))

    def _inspect(self) -> dict[str, Any]:
        paths = expand(self.path, self.suffixes)
        states, schemas, rows = [], [], []
        for path in paths:
            states.append(FileState.of(path))
            check_magic(path, self.form.suffix)
            schema, n = self.form.inspect(path)
            if not schema:
                raise InputError(f"{path} has no columns")
            schemas.append(schema)
            rows.append(n)
        schema = same_schema(paths, schemas)
        return {
            "files": [[s.path, s.size, s.mtime_ns] for s in states],
            "schema": self.project(schema).to_json(),
            "rows": rows,
        }

    def read(self, lo: int, hi: int) -> Batch:
        """The rows of blocks ``[lo, hi)``. Local."""
        starts = self.blocks.starts
        assert starts is not None
        first, last = int(starts[lo]), int(starts[hi])
        parts = [self._read_file(i, a, b) for i, a, b in pieces(self._first_rows, first, last)]
        return Batch.concat(parts) if parts else Batch.empty(self.schema)

    def _read_file(self, index: int, lo: int, hi: int) -> Batch:
        state = self.files[index]
        state.check()
        return reading(state.path, lambda: self.form.read(state.path, self.schema, lo, hi))

    def release(self) -> None:
        """Give back what only makes reading faster. Local; blocks can still be read."""
        getattr(self.form, "release", lambda: None)()

    def block_rows(self, lo: int, hi: int) -> Array:
        """Rows of each block. Local."""
        assert self.blocks.starts is not None
        return np.diff(self.blocks.starts[lo : hi + 1])


def pieces(firsts: Array, lo: int, hi: int) -> list[tuple[int, int, int]]:
    """Which part of which file rows (or bytes) ``[lo, hi)`` are: ``(file, from, to)``, without empty ones.

    >>> pieces(np.array([0, 10, 10, 15]), 8, 12)
    [(0, 8, 10), (2, 0, 2)]
    """
    found = []
    index = max(0, int(np.searchsorted(firsts, lo, side="right")) - 1)
    while index < len(firsts) - 1 and firsts[index] < hi:
        a, b = max(lo, int(firsts[index])), min(hi, int(firsts[index + 1]))
        if a < b:
            found.append((index, a - int(firsts[index]), b - int(firsts[index])))
        index += 1
    return found


def reading(path: str, work: Callable[[], Batch]) -> Batch:
    """Do the work; a system error in it becomes an `InputError` that names the file."""
    try:
        return work()
    except OSError as error:
        raise InputError(why_not_read(path, error)) from error


def same_schema(paths: Sequence[str], schemas: Sequence[Schema]) -> Schema:
    """The schema of all files, nullable where any is. Raises `InputError` for a file that differs."""
    first = schemas[0]
    for path, schema in zip(paths, schemas, strict=True):
        found = difference(bare(schema), bare(first))
        if found:
            raise InputError(f"{path} differs from {paths[0]}: {found}")
    nullable = {n for schema in schemas for n, f in schema.items() if f.nullable}
    return Schema({n: Field(f.kind, f.dtype, f.shape, n in nullable) for n, f in first.items()})


def refuse_object(path: str, what: str) -> InputError:
    """The error for pickled Python objects in a file."""
    return InputError(
        f"{path}: {what} holds Python objects, which would run code when read; "
        "save numbers or text instead (x.astype(float), or x.astype(str))"
    )


def unknown_suffix(path: str, known: Sequence[str]) -> UsageError:
    """The error for a suffix that no format claims."""
    suffix = suffix_of(path)
    return UsageError(
        f"{path}: no format ends in {suffix}; known: {' '.join(known)}{did_you_mean(suffix, known)}"
    )
