"""The manifest of a checkpoint: all that is needed to read it, as nouns, as JSON, and checked field by field.

Reading trusts nothing: every field has its type, every size is compared with the others before anything of
that size exists, and pieces lie apart within their files. What fails is `Damaged`. No file but the manifest
is opened here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.schema import Field, Schema
from iterreduce.saving.layout import gaps_between, parts_of
from iterreduce.saving.sealing import Damaged, sealed, unsealed
from iterreduce.version import __version__

FORMAT_NAME, VERSION = "iterreduce checkpoint", 1
INDEX = "index.h5"
MANIFEST = "manifest.json"
MOST = 1 << 62
# Rows that take no bytes at all could be claimed in any number.
MOST_EMPTY_ROWS = 1 << 31
_FILE = re.compile(r"(node|rank)-\d{4,9}\.h5\Z")
_DTYPE = re.compile(r"[<|](b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[mM]8(\[\d{0,9}[a-zA-Z]{1,2}\])?)\Z")
_CHECKSUM = re.compile(r"[0-9a-f]{16}\Z")


@dataclass(frozen=True)
class Piece:
    """What one rank wrote of one dataset: bytes of a file, and their checksum."""

    file: int
    offset: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class File:
    """A file of data: its size, and the checksum of all of its bytes that belong to no piece, in order."""

    name: str
    nbytes: int
    around: int


@dataclass(frozen=True)
class TableInfo:
    """A table of a checkpoint. ``rank_rows``: the rows that each rank wrote, in rank order.

    ``pieces`` holds, for each column and part of it (`layout.parts_of`), the ranks' pieces in rank order.
    Rows that are ``everywhere`` were written once, by rank 0.
    """

    name: str
    schema: Schema
    everywhere: bool
    rank_rows: tuple[int, ...]
    pieces: Mapping[tuple[str, str], tuple[Piece, ...]]

    @property
    def rows(self) -> int:
        """Of all ranks."""
        return sum(self.rank_rows)

    def written_by(self, first: int, last: int) -> tuple[int, int]:
        """The rows ``[lo, hi)`` that ranks ``[first, last)`` wrote, counted over all ranks.

        >>> TableInfo("t", Schema({}), False, (3, 0, 4), {}).written_by(1, 3)
        (3, 7)
        """
        return sum(self.rank_rows[:first]), sum(self.rank_rows[:last])


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and where."""

    number: int
    attempt: int
    ranks: int
    facts: Mapping[str, Any]
    files: tuple[File, ...]
    index: File
    tables: Mapping[str, TableInfo]
    written_by: str = __version__

    def all_pieces(self) -> list[Piece]:
        """Every piece, in the order of tables, columns, parts and ranks."""
        return [piece for table in self.tables.values() for ps in table.pieces.values() for piece in ps]

    def around(self) -> list[list[tuple[int, int]]]:
        """The ranges of each file that belong to no piece. Raises `Damaged` where pieces overlap."""
        taken: list[list[tuple[int, int]]] = [[] for _ in self.files]
        for piece in self.all_pieces():
            taken[piece.file].append((piece.offset, piece.nbytes))
        return [_gaps(file, ranges) for file, ranges in zip(self.files, taken, strict=True)]


def _gaps(file: File, taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    try:
        return gaps_between(taken, file.nbytes)
    except ValueError as error:
        raise Damaged(f"{file.name}: {error}") from None


# ---------------------------------------------------------------- to JSON


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as it stands on disk. Raises ValueError for facts that JSON cannot say (NaN, infinity)."""
    return sealed(
        {
            "format": FORMAT_NAME,
            "version": VERSION,
            "written_by": manifest.written_by,
            "number": manifest.number,
            "attempt": manifest.attempt,
            "ranks": manifest.ranks,
            "facts": dict(manifest.facts),
            "files": [_file_facts(f) for f in manifest.files],
            "index": _file_facts(manifest.index),
            "tables": [_table_facts(t) for t in manifest.tables.values()],
        }
    )


def _file_facts(file: File) -> list[Any]:
    return [file.name, file.nbytes, f"{file.around:016x}"]


def _table_facts(table: TableInfo) -> dict[str, Any]:
    return {
        "name": table.name,
        "everywhere": table.everywhere,
        "rank_rows": list(table.rank_rows),
        "columns": [_column_facts(table, name, field) for name, field in table.schema.items()],
    }


def _column_facts(table: TableInfo, name: str, field: Field) -> dict[str, Any]:
    return {
        "name": name,
        "kind": field.kind,
        "dtype": field.dtype.str,
        "shape": list(field.shape),
        "nullable": field.nullable,
        "pieces": {
            part.name: [
                [p.file, p.offset, p.nbytes, f"{p.checksum:016x}"] for p in table.pieces[name, part.name]
            ]
            for part in parts_of(field)
        },
    }


# ---------------------------------------------------------------- from JSON


def from_bytes(raw: bytes) -> Manifest:
    """The manifest in these bytes, checked. Raises `Damaged`."""
    facts = unsealed(raw)
    if facts.get("format") != FORMAT_NAME:
        raise Damaged("it is no manifest of a checkpoint")
    if facts.get("version") != VERSION:
        raise Damaged(f"it is of format {facts.get('version')!r}, and this version reads format {VERSION}")
    _keys("the manifest", facts, "written_by number attempt ranks facts files index tables format version")
    ranks = _count("ranks", facts["ranks"], least=1)
    files = tuple(_file(f, _FILE) for f in _list("files", facts["files"]))
    index = _file(facts["index"], re.compile(re.escape(INDEX) + r"\Z"))
    tables = [_table(t, ranks, files) for t in _list("tables", facts["tables"])]
    manifest = Manifest(
        _count("number", facts["number"]),
        _count("attempt", facts["attempt"]),
        ranks,
        _is("facts", facts["facts"], dict),
        files,
        index,
        {table.name: table for table in tables},
        _is("written_by", facts["written_by"], str),
    )
    if len(manifest.tables) < len(tables) or len({f.name for f in files}) < len(files):
        raise Damaged("a name stands there twice")
    manifest.around()
    return manifest


def _table(facts: Any, ranks: int, files: tuple[File, ...]) -> TableInfo:
    _keys("a table", facts, "name everywhere rank_rows columns")
    name = _is("a table's name", facts["name"], str)
    rows = tuple(_count("rank_rows", n) for n in _list("rank_rows", facts["rank_rows"]))
    everywhere = _is("everywhere", facts["everywhere"], bool)
    if len(rows) != ranks or (everywhere and any(rows[1:])) or sum(rows) > MOST:
        raise Damaged(f'table "{name}" has rows of {len(rows)} ranks, and {ranks} wrote it')
    fields: dict[str, Field] = {}
    pieces: dict[tuple[str, str], tuple[Piece, ...]] = {}
    for column in _list("columns", facts["columns"]):
        _keys("a column", column, "name kind dtype shape nullable pieces")
        key = _is("a column's name", column["name"], str)
        if key in fields:
            raise Damaged(f'table "{name}" has two columns "{key}"')
        fields[key] = _field(column)
        pieces |= _pieces(key, fields[key], column["pieces"], rows, files)
    if sum(rows) > MOST_EMPTY_ROWS and not any(p.nbytes for ps in pieces.values() for p in ps):
        raise Damaged(f'table "{name}" claims {sum(rows)} rows and holds nothing')
    return TableInfo(name, Schema(fields), everywhere, rows, pieces)


def _field(facts: dict[str, Any]) -> Field:
    kind, dtype = facts["kind"], _is("dtype", facts["dtype"], str)
    if kind not in ("fixed", "bytes", "text", "list"):
        raise Damaged(f"a column is of kind {kind!r}")
    try:
        parsed = np.dtype(dtype) if _DTYPE.match(dtype) else None
    except (TypeError, ValueError):
        parsed = None
    if parsed is None or (kind in ("bytes", "text") and parsed != np.uint8):
        raise Damaged(f"a column of kind {kind} has dtype {dtype!r}")
    shape = tuple(_count("shape", n) for n in _list("shape", facts["shape"]))
    if len(shape) > 63 or (shape and kind != "fixed") or _product(shape) * parsed.itemsize > MOST:
        raise Damaged(f"a column of kind {kind} has rows of shape {list(shape)[:64]}")
    return Field(kind, parsed, shape, _is("nullable", facts["nullable"], bool))


def _product(shape: tuple[int, ...]) -> int:
    """Of all axes that are not 0: NumPy multiplies them even where a row has no bytes."""
    product = 1
    for n in shape:
        product = min(product * max(n, 1), MOST + 1)
    return product


def _pieces(
    name: str, field: Field, facts: Any, rows: tuple[int, ...], files: tuple[File, ...]
) -> dict[tuple[str, str], tuple[Piece, ...]]:
    parts = parts_of(field)
    _keys("the pieces of a column", facts, " ".join(part.name for part in parts))
    found = {}
    for part in parts:
        pieces = tuple(_piece(p, files) for p in _list("pieces", facts[part.name]))
        if len(pieces) != len(rows):
            raise Damaged(f'column "{name}" has pieces of {len(pieces)} ranks, and {len(rows)} wrote it')
        for piece, n in zip(pieces, rows, strict=True):
            fits = n * part.item_bytes == piece.nbytes
            if part.name == "values":
                fits = piece.nbytes % part.item_bytes == 0 and (n > 0 or piece.nbytes == 0)
            if not fits:
                raise Damaged(f'column "{name}" has {piece.nbytes} bytes of {part.name} for {n} rows')
        found[name, part.name] = pieces
    return found


def _piece(facts: Any, files: tuple[File, ...]) -> Piece:
    if type(facts) is not list or len(facts) != 4:
        raise Damaged("a piece is not written as file, offset, bytes, checksum")
    file, offset, nbytes = (_count("a piece", n) for n in facts[:3])
    if file >= len(files) or offset + nbytes > files[file].nbytes:
        raise Damaged("a piece lies beyond the end of its file")
    return Piece(file, offset, nbytes, _checksum(facts[3]))


def _file(facts: Any, name: re.Pattern[str]) -> File:
    if type(facts) is not list or len(facts) != 3 or type(facts[0]) is not str or not name.match(facts[0]):
        raise Damaged("a file is not written as name, bytes, checksum")
    return File(facts[0], _count("a file's bytes", facts[1]), _checksum(facts[2]))


def _checksum(text: Any) -> int:
    if type(text) is not str or not _CHECKSUM.match(text):
        raise Damaged("a checksum is not 16 hexadecimal digits")
    return int(text, 16)


def _count(what: str, value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MOST:
        raise Damaged(f"{what}: wanted a whole number from {least} on")
    return value


def _list(what: str, value: Any) -> list[Any]:
    return list(_is(what, value, list))


def _is(what: str, value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise Damaged(f"{what}: wanted {kind.__name__}, found {type(value).__name__}")
    return value


def _keys(what: str, facts: Any, wanted: str) -> None:
    if type(facts) is not dict or set(facts) != set(wanted.split()):
        raise Damaged(f"{what} has other fields than {wanted}")
