"""Which source a path means: by its suffix, or, for a directory or a pattern without one, by the files found.

Formats are imported when a path asks for them: nobody pays for a parser that is not used.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.errors import InputError
from iterreduce.sources.agreement import root_decides
from iterreduce.sources.asked import Bound, Bounds, Peek, checked_bounds, checked_columns, hint, in_words
from iterreduce.sources.blocks import Blocks, Source, changed
from iterreduce.sources.files import RowsSource, suffix_of, unknown_suffix
from iterreduce.sources.hdf5 import Hdf5, split_path

if TYPE_CHECKING:
    from iterreduce.collectives import Group

ROWS = (".npy", ".npz", ".h5", ".hdf5", ".hdf", ".parquet")
LINES = (".txt", ".log", ".text")
EDGES = (".el", ".edges")
KNOWN = (*ROWS, ".csv", ".tsv", *LINES, *EDGES, ".mtx")


def open_source(path: str | os.PathLike[str], **options: Any) -> Source:
    """The source that a path means; no file is touched before `.open(group)`.

    A path is a file, a directory, or a pattern (``*`` and ``?``); ``file.h5:/path`` names a place in an HDF5
    file. Options: `block_rows` (.npy .npz .h5 .parquet) and `block_bytes` (text) override the size of a
    block, `delimiter` what separates the cells of a .csv. Raises `UsageError` for an unknown suffix.

    >>> open_source("points.npy").name
    'points.npy'
    """
    text = os.fspath(path)
    suffix = suffix_of(split_path(text)[0])
    if glob.has_magic(suffix):
        suffix = ""  # what it matches decides
    stem = suffix.removesuffix(".gz")
    if suffix and stem not in KNOWN and not (suffix == ".gz" and not stem):
        raise unknown_suffix(text, KNOWN)
    return source_of(text, stem, options) if stem else FoundSource(text, options)


def source_of(path: str, suffix: str, options: dict[str, Any]) -> Source:
    """The source for files of this kind."""
    if suffix in ROWS:
        file, inside = split_path(path)
        return RowsSource(file, _row_format(suffix, inside), **options)
    if suffix in (".csv", ".tsv"):
        from iterreduce.sources.csv import CsvSource

        return CsvSource(path, **{**options, **({"delimiter": "\t"} if suffix == ".tsv" else {})})
    if suffix in EDGES:
        from iterreduce.sources.edgelist import EdgeListSource

        return EdgeListSource(path, **options)
    if suffix == ".mtx":
        from iterreduce.sources.matrixmarket import MatrixMarketSource

        return MatrixMarketSource(path, **options)
    from iterreduce.sources.text import LineSource

    return LineSource(path, **options)


def _row_format(suffix: str, inside: str) -> Any:
    if suffix in Hdf5.suffixes:
        return Hdf5(inside)
    if suffix == ".parquet":
        from iterreduce.sources.parquet import Parquet

        return Parquet()
    from iterreduce.sources.npy import Npy, Npz

    return Npy() if suffix == ".npy" else Npz()


class ChosenSource:
    """A source that is chosen when it is opened, from what rank 0 found: `look` says it in a word."""

    rereadable = True
    schema: Schema
    token: str
    blocks: Blocks

    def __init__(self, path: str, choose: Callable[[str], Source], look: Callable[[], str]):
        self.path, self._choose, self._look = path, choose, look
        self.name = os.path.basename(path.rstrip("/")) or path
        self._wanted: tuple[str, ...] | None = None
        self._bounds: Bounds = ()
        self.source: Source | None = None
        self._word = ""

    def open(self, group: Group) -> None:
        """Look at what is there, and open that. Collective."""
        word = root_decides(group, self._look)
        if self.source is None or word != self._word:  # opened again, it is the same source
            self.source, self._word = self._asked_of(word), word
        self.source.open(group)
        self.schema, self.token, self.blocks = self.source.schema, self.source.token, self.source.blocks

    def _asked_of(self, word: str) -> Source:
        """The source chosen by this word, with the columns and bounds asked for."""
        source = self._choose(word)
        source = source if self._wanted is None else source.columns(self._wanted)
        return source.where(self._bounds) if self._bounds else source

    def _there(self) -> Source:
        """The opened source, or what would be opened now. Local. Raises `InputError`."""
        return self._asked_of(self._look()) if self.source is None else self.source

    def paths(self) -> list[str]:
        """The files that the path means now. Local. Raises `InputError`."""
        found: list[str] = self._there().paths()  # type: ignore[attr-defined]
        return found

    def peek(self) -> Peek | None:
        """The columns, from a header. Local."""
        return hint(lambda: self._there().peek())

    def rows_hint(self) -> int | None:
        """Rows, as far as headers tell. Local."""
        return hint(lambda: self._there().rows_hint())

    def bytes_hint(self) -> int | None:
        """Bytes of the files. Local."""
        return hint(lambda: self._there().bytes_hint())

    @property
    def bytes_read(self) -> int:
        """Bytes of rows that this rank has read."""
        return 0 if self.source is None else self.source.bytes_read

    @property
    def asked(self) -> str:
        """Which columns and rows are read, in words."""
        return in_words(self._wanted, self._bounds)

    def _opened(self) -> Source:
        assert self.source is not None, "read before open"
        return self.source

    def read(self, lo: int, hi: int) -> Batch:
        """The rows of blocks ``[lo, hi)``. Local."""
        return self._opened().read(lo, hi)

    def block_rows(self, lo: int, hi: int) -> Array:
        """Rows of each block. Local."""
        return self._opened().block_rows(lo, hi)

    def columns(self, names: Sequence[str]) -> ChosenSource:
        """These columns only."""

        wanted = checked_columns(names)
        return changed(self, lambda other: other._anew(wanted, self._bounds))

    def where(self, bounds: Sequence[Bound]) -> ChosenSource:
        """Without rows that the source chosen knows to be out."""
        more = (*self._bounds, *checked_bounds(bounds))
        return changed(self, lambda other: other._anew(self._wanted, more))

    def _anew(self, wanted: tuple[str, ...] | None, bounds: Bounds) -> None:
        self._wanted, self._bounds, self.source = wanted, bounds, None

    def require_numeric(self, column: str) -> None:
        """Raise `InputError` if the column is not of numbers."""
        self._opened().require_numeric(column)

    def first_null(self, column: str) -> str | None:
        """Where the column's first empty cell stands, if the format knows."""
        found: str | None = getattr(self._opened(), "first_null", lambda _: None)(column)
        return found


class FoundSource(ChosenSource):
    """A path without a suffix: lines of one file, or a directory or pattern whose files' suffix decides."""

    def __init__(self, path: str, options: dict[str, Any]):
        self._options = options
        super().__init__(path, self.chosen, self.suffix_found)

    def chosen(self, suffix: str) -> Source:
        """The source for files of this suffix."""
        return source_of(self.path, suffix, self._options)

    def suffix_found(self) -> str:
        """The one known suffix of the files that are there. Raises `InputError`."""
        if os.path.isdir(self.path):
            names = [
                e.name for e in os.scandir(self.path) if e.is_file() and not e.name.startswith((".", "_"))
            ]
        elif glob.has_magic(self.path) and not os.path.exists(self.path):
            names = glob.glob(self.path, recursive=True)
        else:
            return ""
        kinds = sorted({suffix_of(n).removesuffix(".gz") for n in names})
        known = [k for k in kinds if k in KNOWN or not k]
        if len(known) > 1:
            listed = ", ".join(k or "no suffix" for k in known)
            raise InputError(
                f"{self.path} holds files of several kinds ({listed}): "
                f"name one, as in {self.path.rstrip('/')}/*{known[-1]}"
            )
        if kinds and not known:
            raise InputError(
                f"{self.path} holds no files that can be read; "
                f"they end in {', '.join(kinds)}, known: {' '.join(KNOWN)}"
            )
        return known[0] if known else ""
