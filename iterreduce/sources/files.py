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
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema, difference, missing_column
from iterreduce.errors import InputError, UsageError, did_you_mean
from iterreduce.sources.agreement import root_decides
from iterreduce.sources.asked import (
    Bound,
    Bounds,
    Peek,
    checked_bounds,
    checked_columns,
    hint,
    in_words,
    may_be_null,
    only,
)
from iterreduce.sources.blocks import Blocks, Span, bare, changed
from iterreduce.storage import no_directory

if TYPE_CHECKING:
    from iterreduce.collectives import Group

T = TypeVar("T")

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
    bytes_read = 0

    def __init__(self, path: str):
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path.rstrip("/")) or self.path
        self.files: list[FileState] = []
        self._wanted: tuple[str, ...] | None = None
        self._bounds: Bounds = ()

    def columns(self, names: Sequence[str]) -> Any:
        """The same source, reading these columns only; unknown names are refused by `open`."""
        wanted = checked_columns(names)
        return changed(self, lambda other: other._anew(wanted, self._bounds))

    def where(self, bounds: Sequence[Bound]) -> Any:
        """The same rows: few formats know what their blocks hold."""
        checked_bounds(bounds)
        return self

    def _anew(self, wanted: tuple[str, ...] | None, bounds: Bounds) -> None:
        """As before `open`, with these columns and bounds."""
        self._wanted, self._bounds, self.files, self.bytes_read = wanted, bounds, [], 0

    @property
    def asked(self) -> str:
        """Which columns and rows are read, in words."""
        return in_words(self._wanted, self._bounds)

    # -- before it is opened

    def peek(self) -> Peek | None:
        """The columns, from the header of the first file. Local."""
        if self.files:
            return dict(self.schema)
        return hint(lambda: only(self.peek_at(self.paths()), self._wanted))

    def peek_at(self, paths: list[str]) -> Peek:
        """All columns of these files, from the header of the first. Local."""
        raise NotImplementedError

    def paths(self) -> list[str]:
        """The files that the path means now. Local. Raises `InputError`."""
        return expand(self.path, self.suffixes)

    def rows_hint(self) -> int | None:
        """Rows, if they are known. Local."""
        return self.blocks.rows if self.files else hint(lambda: self.count_rows_of(self.paths()))

    def count_rows_of(self, paths: list[str]) -> int | None:
        """Rows of these files, as far as headers tell. Local."""
        return None

    def bytes_hint(self) -> int | None:
        """Bytes of the files. Local."""
        if self.files:
            return sum(state.size for state in self.files)
        return hint(lambda: sum(map(os.path.getsize, self.paths())))

    # -- what opening finds

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


@dataclass(frozen=True)
class Found:
    """What the header of one file tells.

    `kept`: the ranges of rows that bounds leave, or None for all; `bytes_read`: of rows, while looking.
    """

    fields: Peek
    rows: int
    kept: list[list[int]] | None = None
    bytes_read: int = 0


class RowFormat(Protocol):
    """A kind of file that knows its row count. Both methods are local and raise `InputError`.

    `masks`: whether columns may have nulls; `uses_bounds`: whether files say what their blocks hold.
    """

    suffix: str
    suffixes: tuple[str, ...]
    masks: bool
    uses_bounds: bool

    def inspect(
        self, path: str, wanted: Sequence[str] | None = None, bounds: Bounds = (), glance: bool = False
    ) -> Found:
        """What one file holds, without reading the rows: of the columns wanted, as far as they are there.

        `glance`: the headers only, nothing is verified, and a column that cannot be read has no field.
        """

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> tuple[Batch, int]:
        """Rows ``[lo, hi)`` of the columns of `schema`, and the bytes of rows that were read for them."""


# Headers that are read for a hint: of more files, the first tells how many bytes a row takes.
MOST_HEADERS = 64


class RowsSource(FileSource):
    """A source over one or more files of a `RowFormat`."""

    def __init__(self, path: str, form: RowFormat, block_rows: int | None = None):
        super().__init__(path)
        self.form, self.suffixes, self._block_rows = form, form.suffixes, block_rows
        self._spans: list[Span] = []
        self._first_rows: Array = np.zeros(1, np.int64)  # of each span, among the rows that are read

    def where(self, bounds: Sequence[Bound]) -> Any:
        """Without blocks of a file that it says hold no such row, if it is of a format that does."""
        more = checked_bounds(bounds)
        if not self.form.uses_bounds or not more:
            return self
        return changed(self, lambda other: other._anew(self._wanted, (*self._bounds, *more)))

    def peek_at(self, paths: list[str]) -> Peek:
        """Columns and types from the header of the first file. Local."""
        found = self.form.inspect(paths[0], glance=True).fields
        return may_be_null(found) if self.form.masks and len(paths) > 1 else found

    def count_rows_of(self, paths: list[str]) -> int | None:
        """Rows from headers; of very many files from the size of the first. Local."""
        few = paths[:MOST_HEADERS] if len(paths) <= MOST_HEADERS else paths[:1]
        looks = [self.form.inspect(path, self._wanted, self._bounds, glance=True) for path in few]
        rows = sum(rows_left(look) for look in looks)
        if len(few) == len(paths):
            return rows
        return rows * sum(map(os.path.getsize, paths)) // max(1, os.path.getsize(paths[0]))

    def open(self, group: Group) -> None:
        """Agree on files, schema and blocks. Collective."""
        found = root_decides(group, self._inspect)
        self.files = [FileState(*state) for state in found["files"]]
        self.schema = Schema.from_json(found["schema"])
        self._spans = spans_of(found["rows"], found["kept"])
        self._first_rows = np.cumsum([0, *(span.rows for span in self._spans)], dtype=np.int64)
        self.blocks = Blocks.of_spans(self._spans, sum(found["rows"]), self._block_rows)
        more = [self.form.suffix, getattr(self.form, "inside", "")]
        self.token = self.make_token(*more, *([self.asked] if self._bounds else []))

    def _inspect(self) -> dict[str, Any]:
        states, schemas, looks = [], [], []
        for path in self.paths():
            states.append(FileState.of(path))
            check_magic(path, self.form.suffix)
            look = self._look_at(path)
            if not look.fields:
                raise InputError(f"{path} has no columns")
            self.bytes_read += look.bytes_read
            schemas.append(Schema({n: f for n, f in look.fields.items() if f is not None}))
            looks.append(look)
        schema = same_schema([state.path for state in states], schemas)
        return {
            "files": [[s.path, s.size, s.mtime_ns] for s in states],
            "schema": self.project(schema).to_json(),
            "rows": [look.rows for look in looks],
            "kept": [look.kept for look in looks],
        }

    def _look_at(self, path: str) -> Found:
        """What a file holds of the columns wanted; of all, if one is not there: the error names them."""
        look = self.form.inspect(path, self._wanted, self._bounds)
        if self._wanted is None or set(self._wanted) <= set(look.fields):
            return look
        return self.form.inspect(path, None, self._bounds)

    def read(self, lo: int, hi: int) -> Batch:
        """The rows of blocks ``[lo, hi)``. Local."""
        starts = self.blocks.starts
        assert starts is not None
        first, last = int(starts[lo]), int(starts[hi])
        parts = [self._read_span(self._spans[i], a, b) for i, a, b in pieces(self._first_rows, first, last)]
        return Batch.concat(parts) if parts else Batch.empty(self.schema)

    def _read_span(self, span: Span, lo: int, hi: int) -> Batch:
        state = self.files[span.file]
        state.check()
        batch, nbytes = reading(
            state.path, lambda: self.form.read(state.path, self.schema, span.first + lo, span.first + hi)
        )
        self.bytes_read += nbytes
        return batch

    def row_in_files(self, row: int) -> int:
        """The number of a row among all rows of the files, those included that bounds left out. Local."""
        at = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return row - int(self._first_rows[at]) + self._spans[at].number if self._spans else row

    def release(self) -> None:
        """Give back what only makes reading faster. Local; blocks can still be read."""
        getattr(self.form, "release", lambda: None)()

    def block_rows(self, lo: int, hi: int) -> Array:
        """Rows of each block. Local."""
        assert self.blocks.starts is not None
        return np.diff(self.blocks.starts[lo : hi + 1])


def rows_left(look: Found) -> int:
    """Rows of a file that bounds leave."""
    return look.rows if look.kept is None else sum(hi - lo for lo, hi in look.kept)


def spans_of(rows: Sequence[int], kept: Sequence[Sequence[Sequence[int]] | None]) -> list[Span]:
    """What is read of each file: all of its rows, or the ranges kept.

    >>> spans_of([10, 5], [None, [[1, 3]]])
    [Span(file=0, first=0, rows=10, number=0), Span(file=1, first=1, rows=2, number=11)]
    """
    found, number = [], 0
    for file, (count, ranges) in enumerate(zip(rows, kept, strict=True)):
        for lo, hi in [(0, count)] if ranges is None else ranges:
            if lo < hi:
                found.append(Span(file, lo, hi - lo, number + lo))
        number += count
    return found


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


def reading(path: str, work: Callable[[], T]) -> T:
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
