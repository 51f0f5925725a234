"""Graphs from any file: a source of edges with the columns ``src``, ``dst`` and, if there, ``weight``.

`edges_of` makes it of another source that is not open yet: lines of text are read as edge lists, tables and
arrays are seen as edges (`EdgeColumns`). `open_edges` does so for a path. Edge lists and MatrixMarket files
have parsers of their own (`edgelist.py`, `matrixmarket.py`); nothing is parsed here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema, missing_column
from iterreduce.errors import InputError, UsageError
from iterreduce.sources.blocks import Blocks, Source, changed
from iterreduce.sources.csv import CsvSource
from iterreduce.sources.edgelist import FLOAT64, INT64, EdgeListSource, first_edge
from iterreduce.sources.files import RowsSource
from iterreduce.sources.npy import Npz
from iterreduce.sources.opening import ChosenSource, FoundSource, open_source
from iterreduce.sources.sparse import SparseNpz
from iterreduce.sources.text import TEXT, LineSource

if TYPE_CHECKING:
    from iterreduce.collectives import Group

COLUMNS = ("src", "dst", "weight")
# Names under which sparse matrices are saved.
SPARSE = ("row", "col", "data")


def open_edges(
    path: str | os.PathLike[str], columns: Sequence[str] = (), header: bool | None = None, **options: Any
) -> Source:
    """The source of the edges in a path; no file is touched before `.open(group)`. See `edges_of`.

    >>> open_edges("web.txt").name
    'web.txt'
    """
    return edges_of(open_source(path, **options), columns, header)


def edges_of(source: Source, columns: Sequence[str] = (), header: bool | None = None) -> Source:
    """A source that is not open yet, seen as edges.

    `columns`: which columns of a table are the ends of an edge and, if there are three, its weight; without
    it those named src, dst, weight. `header`: whether a .tsv has a header line; without it, its first line
    decides. Raises `UsageError`.
    """
    if isinstance(columns, str) or len(columns) not in (0, 2, 3):
        raise UsageError(f"columns: wanted the names of two or three columns, got {columns!r}")
    if isinstance(source, (EdgeListSource, EdgeColumns)):
        return source
    if isinstance(source, FoundSource):
        return _found(source, columns, header)
    if isinstance(source, LineSource):
        return EdgeListSource(source.path, source.block_bytes)
    if isinstance(source, CsvSource) and source.delimiter == "\t" and header is not True:
        return _tsv(source, columns, header)
    if isinstance(source, RowsSource) and type(source.form) is Npz:
        source = changed(source, lambda other: setattr(other, "form", SparseNpz()))
    return EdgeColumns(source, columns)


def _found(found: FoundSource, columns: Sequence[str], header: bool | None) -> Source:
    """A directory, a pattern, or a file without a suffix: seen as edges once it is known what is there."""

    def choose(suffix: str) -> Source:
        return edges_of(found.chosen(suffix), columns, header)

    return ChosenSource(found.path, choose, found.suffix_found)


def _tsv(source: CsvSource, columns: Sequence[str], header: bool | None) -> Source:
    """Tab-separated text with or without a header: looked at when it is opened."""

    def choose(kind: str) -> Source:
        if kind == "header":
            return EdgeColumns(source, columns)
        return EdgeListSource(source.path, source.block_bytes)

    def look() -> str:
        return "header" if header is None and has_header(source, columns) else "none"

    return ChosenSource(source.path, choose, look)


def has_header(source: CsvSource, columns: Sequence[str]) -> bool:
    """Whether the first line names columns. Raises `InputError` where nobody can tell."""
    path = source.first_path()
    found = first_edge(path, 0).cells
    if not set(columns or COLUMNS[:2]) - set(found):
        return True
    if not found or all(_is_id(cell) for cell in found[:2]):
        return False
    raise InputError(
        f"{path} begins with {' '.join(found[:3])}: a header, or an edge? "
        "Give columns=(...) of a header, or header=False"
    )


def _is_id(cell: str) -> bool:
    return cell.removeprefix("-").isdigit()


class EdgeColumns:
    """Columns of another source as ``src``, ``dst``, ``weight``: ids int64 or text, weights int64 or float.

    Which: the columns asked for; else those of these names; else row, col and data of a sparse matrix; else
    a single column of vectors of two or three numbers. Raises `InputError` where none of these is there, or
    an id is no whole number.
    """

    schema: Schema
    token: str
    blocks: Blocks

    def __init__(self, source: Source, columns: Sequence[str] = ()):
        self.source, self.name, self.rereadable = source, source.name, source.rereadable
        self._asked = tuple(columns)
        self._from: tuple[str, ...] = ()
        self._width = 0
        self._wanted: tuple[str, ...] | None = None

    def open(self, group: Group) -> None:
        """Open the wrapped source and decide which columns mean what. Collective."""
        self.source.open(group)
        found = self.source.schema
        self.blocks = self.source.blocks
        self._from = self._chosen(found)
        self._width = found[self._from[0]].shape[0] if len(self._from) == 1 else 0
        fields = self._fields(found)
        for name in self._wanted or ():
            if name not in fields:
                raise InputError(f"{self.name}: {missing_column(name, fields)}")
        self.schema = Schema({n: fields[n] for n in self._wanted or fields})
        self.token = f"{self.source.token}-edges-{','.join((*self._from, *self.schema))}"

    def _chosen(self, found: Schema) -> tuple[str, ...]:
        if self._asked:
            for name in self._asked:
                if name not in found:
                    raise InputError(f"{self.name}: {missing_column(name, found)}")
            return self._asked
        for names in (COLUMNS, SPARSE):
            if set(names[:2]) <= set(found):
                return tuple(name for name in names if name in found)
        vectors = [n for n, f in found.items() if f.kind == "fixed" and f.shape in ((2,), (3,))]
        if len(found) == 1 and vectors:
            return (vectors[0],)
        raise InputError(
            f"{self.name} holds {found.describe()}: wanted columns src, dst and, if any, weight "
            "(or one array of 2 or 3 columns); name the columns of another table: "
            'read_edges(path, columns=("from", "to"))'
        )

    def _fields(self, found: Schema) -> dict[str, Field]:
        if self._width:
            field = found[self._from[0]]
            self._check_ids(self._from[0], Field("fixed", field.dtype))
            weight = _weight_field(field.dtype)
            return {"src": INT64, "dst": INT64, **({"weight": weight} if self._width == 3 else {})}
        ids = [self._check_ids(name, found[name]) for name in self._from[:2]]
        if ids[0] != ids[1]:
            held = [f"{n} holds {f.describe()}" for n, f in zip(self._from, ids, strict=False)]
            raise InputError(f"{self.name}: {', '.join(held)}: wanted ids of one kind, int64 or text")
        fields = dict(zip(COLUMNS, ids, strict=False))
        if len(self._from) == 3:
            self.source.require_numeric(self._from[2])
            fields["weight"] = _weight_field(found[self._from[2]].dtype)
            if found[self._from[2]].shape:
                raise InputError(f'{self.name}: weight "{self._from[2]}" holds vectors, wanted numbers')
        return fields

    def _check_ids(self, name: str, field: Field) -> Field:
        if field.kind in ("text", "bytes"):
            return TEXT
        if field.kind != "fixed" or field.shape or field.dtype.kind not in "iuf":
            raise InputError(f'{self.name}: "{name}" holds {field.describe()}, wanted ids: int64 or text')
        return INT64

    # -- rows

    def read(self, lo: int, hi: int) -> Batch:
        """The edges of blocks ``[lo, hi)``. Local."""
        batch = self.source.read(lo, hi)
        for name in self._from:
            self._refuse_null(batch.valid(name), name, lo)
        if self._width:
            matrix = batch[self._from[0]]
            columns = {name: matrix[:, i] for i, name in enumerate(COLUMNS[: self._width])}
        else:
            columns = dict(zip(COLUMNS, (batch[name] for name in self._from), strict=False))
        made = {name: self._column(name, columns[name], lo) for name in self.schema}
        return Batch.from_dict(made)

    def _column(self, name: str, values: Any, lo: int) -> Any:
        if isinstance(values, Ragged):
            return values if values.kind == "text" else Ragged(values.offsets, values.values, "text")
        wanted = self.schema[name].dtype
        if wanted == np.int64 and values.dtype.kind in "fu":
            self._check_whole(name, values, lo)
        return np.ascontiguousarray(values, wanted)

    def _check_whole(self, name: str, values: Array, lo: int) -> None:
        """Ids (and whole weights) that no int64 holds are refused, with the row."""
        if values.dtype.kind == "f":
            wrong = ~((np.abs(values) <= 2.0**53) & (np.floor(values) == values))
        else:
            wrong = values > np.uint64(2**63 - 1)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{self.name} row {self._first_row(lo) + row}: {name} is {values[row]}, "
                "wanted a whole number that fits an int64 (a float up to 2**53)"
            )

    def _refuse_null(self, valid: Array | None, name: str, lo: int) -> None:
        if valid is not None and not valid.all():
            where = getattr(self.source, "first_null", lambda _: None)(name)
            row = self._first_row(lo) + int(np.argmin(valid))
            place = where or f'{self.name} row {row}, column "{name}"'
            raise InputError(f"{place}: the cell is empty, wanted a value in every edge")

    def _first_row(self, lo: int) -> int:
        return 0 if self.blocks.starts is None else int(self.blocks.starts[lo])

    def block_rows(self, lo: int, hi: int) -> Array:
        """Edges of each block. Local."""
        return self.source.block_rows(lo, hi)

    def columns(self, names: Sequence[str]) -> EdgeColumns:
        """These columns only."""
        return changed(self, lambda other: setattr(other, "_wanted", tuple(names)))

    def require_numeric(self, column: str) -> None:
        """Raise `InputError` if the column is not of numbers."""
        if self.schema[column].kind != "fixed":
            raise InputError(f'{self.name}: column "{column}" is text, wanted numbers')


def _weight_field(dtype: np.dtype[Any]) -> Field:
    """Whole weights are int64; floats stay what they are, float16 becomes float64."""
    if dtype.kind in "biu":
        return INT64
    return Field("fixed", dtype) if dtype in (np.float32, np.float64) else FLOAT64


__all__ = ["EdgeColumns", "edges_of", "open_edges"]
