"""Graphs from any file: a source of edges with the columns ``src``, ``dst`` and, if there, ``weight``.

`edges_of` makes it of another source that is not open yet: lines of text are read as edge lists, tables and
arrays are seen as edges (`EdgeColumns`). `open_edges` does so for a path. Edge lists and MatrixMarket files
have parsers of their own (`edgelist.py`, `matrixmarket.py`); nothing is parsed here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema, missing_column
from iterreduce.errors import InputError, UsageError
from iterreduce.sources.agreement import root_decides
from iterreduce.sources.asked import (
    Bound,
    Bounds,
    Peek,
    checked_bounds,
    checked_columns,
    hint,
    in_words,
    only,
    renamed,
)
from iterreduce.sources.blocks import Blocks, Source, changed, row_in_files
from iterreduce.sources.csv import CsvSource
from iterreduce.sources.edgelist import COLUMNS, FLOAT64, INT64, EdgeListSource, first_edge
from iterreduce.sources.files import RowsSource
from iterreduce.sources.npy import Npz
from iterreduce.sources.opening import ChosenSource, FoundSource, open_source
from iterreduce.sources.sparse import SparseNpz
from iterreduce.sources.text import TEXT, LineSource
from iterreduce.sources.wrapping import Wrapping

if TYPE_CHECKING:
    from iterreduce.collectives import Group

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


class EdgeColumns(Wrapping):
    """Columns of another source as ``src``, ``dst``, ``weight``: ids int64 or text, weights int64 or float.

    Which: the columns asked for; else those of these names; else row, col and data of a sparse matrix; else
    a single column of vectors of two or three numbers. Raises `InputError` where none of these is there, or
    an id is no whole number. Other columns are not read where headers tell which these are.
    """

    schema: Schema
    token: str
    blocks: Blocks
    of_edges = True

    def __init__(self, source: Source, columns: Sequence[str] = ()):
        self.source, self.name, self.rereadable = source, source.name, source.rereadable
        self._whole = source  # before it is decided which of its columns are read
        self._asked = tuple(columns)
        self._told: dict[str, str] | None = None  # what headers told of which column is which
        self._read: dict[str, str] = {}  # which of them are read; none: all
        self._from: dict[str, str] = {}  # of each column read, which of the source's it is
        self._width = 0
        self._wanted: tuple[str, ...] | None = None
        self._bounds: Bounds = ()

    def open(self, group: Group) -> None:
        """Decide which columns of the wrapped source are read and what they mean, and open it. Collective."""
        told = root_decides(group, lambda: hint(self._look))
        if told != self._told:  # opened again, it is the same source
            self.source, self._read = (self._whole, {}) if told is None else self._narrowed(told)
            self._told = told
        self.source.open(group)
        found = self.source.schema
        self.blocks = self.source.blocks
        self._from = self._read or self._ends(found)
        self._width = found[self._from["src"]].shape[0] if self._is_vector(self._from) else 0
        fields = self._fields(found)
        for name in self._wanted or ():
            if name not in fields:
                raise InputError(f"{self.name}: {missing_column(name, fields)}")
        self.schema = Schema({n: fields[n] for n in self._wanted or fields})
        words = (*self._from.values(), *self.schema)
        self.token = f"{self.source.token}-edges-{','.join(words)}"

    def _look(self) -> dict[str, str] | None:
        """Which columns are which, as far as headers tell. Local."""
        found = self._whole.peek()
        return None if found is None else self._ends(found)

    def _narrowed(self, ends: dict[str, str]) -> tuple[Source, dict[str, str]]:
        """The source that reads these columns only, and which of them is which."""
        vector = self._is_vector(ends)
        if not vector and not {*ends}.issuperset(self._wanted or ()):
            return self._whole, {}  # that is an error, and it names what is there
        wanted = ends if vector or self._wanted is None else self._wanted
        read = {name: ends[name] for name in ends if name in wanted}
        source = self._whole.columns(tuple(dict.fromkeys(read.values())))
        bounds = () if vector else renamed(self._bounds, ends)
        return (source.where(bounds) if bounds else source), read

    def _is_vector(self, ends: Mapping[str, str]) -> bool:
        """Whether one column of vectors holds the whole edge."""
        return not self._asked and len(ends) > 1 and len(set(ends.values())) == 1

    def _ends(self, found: Mapping[str, Field | None]) -> dict[str, str]:
        """Which column is which end of an edge, or the weight; of vectors the same one for all."""
        if self._asked:
            for name in self._asked:
                if name not in found:
                    raise InputError(f"{self.name}: {missing_column(name, found)}")
            return dict(zip(COLUMNS, self._asked, strict=False))
        for names in (COLUMNS, SPARSE):
            if set(names[:2]) <= set(found):
                return {name: of for name, of in zip(COLUMNS, names, strict=True) if of in found}
        name, field = next(iter(found.items()))
        if len(found) == 1 and field is not None and field.kind == "fixed" and field.shape in ((2,), (3,)):
            return dict.fromkeys(COLUMNS[: field.shape[0]], name)
        held = ", ".join(f"{n} {'' if f is None else f.describe()}".strip() for n, f in found.items())
        raise InputError(
            f"{self.name} holds {held}: wanted columns src, dst and, if any, weight "
            "(or one array of 2 or 3 columns); name the columns of another table: "
            'read_edges(path, columns=("from", "to"))'
        )

    def _fields(self, found: Schema) -> dict[str, Field]:
        """The columns read, as they come out."""
        if self._width:
            field = found[self._from["src"]]
            self._check_ids(self._from["src"], Field("fixed", field.dtype))
            weight = _weight_field(field.dtype)
            return {"src": INT64, "dst": INT64, **({"weight": weight} if self._width == 3 else {})}
        ids = {n: self._check_ids(of, found[of]) for n, of in self._from.items() if n != "weight"}
        if len(set(ids.values())) > 1:
            held = [f"{self._from[n]} holds {f.describe()}" for n, f in ids.items()]
            raise InputError(f"{self.name}: {', '.join(held)}: wanted ids of one kind, int64 or text")
        fields = dict(ids)
        if "weight" in self._from:
            name = self._from["weight"]
            self.source.require_numeric(name)
            fields["weight"] = _weight_field(found[name].dtype)
            if found[name].shape:
                raise InputError(f'{self.name}: weight "{name}" holds vectors, wanted numbers')
        return fields

    # -- before it is opened

    def peek(self) -> Peek | None:
        """The columns of edges, as far as headers tell. Local."""
        return hint(self._peeked)

    def _peeked(self) -> Peek | None:
        found = self._whole.peek()
        if found is None:
            return None
        ends = self._ends(found)
        fields = {name: found[of] for name, of in ends.items()}
        if self._is_vector(ends):
            return only(
                {n: self._peeked_field(n, f and Field("fixed", f.dtype)) for n, f in fields.items()},
                self._wanted,
            )
        return only({name: self._peeked_field(name, f) for name, f in fields.items()}, self._wanted)

    def _peeked_field(self, name: str, field: Field | None) -> Field | None:
        if field is None:
            return None
        return _weight_field(field.dtype) if name == "weight" else self._check_ids(name, field)

    @property
    def asked(self) -> str:
        """Which columns and rows are read, in words."""
        return " of ".join(filter(None, (in_words(self._wanted, self._bounds), self._whole.asked)))

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
        for name in dict.fromkeys(self._from.values()):
            self._refuse_null(batch.valid(name), name, lo)
        if self._width:
            matrix = batch[self._from["src"]]
            columns = {name: matrix[:, i] for i, name in enumerate(COLUMNS[: self._width])}
        else:
            columns = {name: batch[of] for name, of in self._from.items()}
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
                f"{self.name} row {self._row(lo, row)}: {name} is {values[row]}, "
                "wanted a whole number that fits an int64 (a float up to 2**53)"
            )

    def _refuse_null(self, valid: Array | None, name: str, lo: int) -> None:
        if valid is not None and not valid.all():
            where = getattr(self.source, "first_null", lambda _: None)(name)
            row = self._row(lo, int(np.argmin(valid)))
            place = where or f'{self.name} row {row}, column "{name}"'
            raise InputError(f"{place}: the cell is empty, wanted a value in every edge")

    def _row(self, lo: int, row: int) -> int:
        """The number of a row of blocks from `lo` on, for messages."""
        starts = self.blocks.starts
        return row_in_files(self.source, row + (0 if starts is None else int(starts[lo])))

    def columns(self, names: Sequence[str]) -> EdgeColumns:
        """These columns only."""
        wanted = checked_columns(names)
        return changed(self, lambda other: other._anew(wanted, self._bounds))

    def where(self, bounds: Sequence[Bound]) -> EdgeColumns:
        """Without rows that the wrapped source knows to be out."""
        more = (*self._bounds, *checked_bounds(bounds))
        return changed(self, lambda other: other._anew(self._wanted, more))

    def _anew(self, wanted: tuple[str, ...] | None, bounds: Bounds) -> None:
        self._wanted, self._bounds, self.source = wanted, bounds, self._whole
        self._told, self._read = None, {}

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
