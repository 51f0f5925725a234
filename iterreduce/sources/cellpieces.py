"""From cells to columns: pieces of a CSV text as parsed, the types that all ranks agreed on, and the batch of
both.

Local and without files: `csv.py` brings the bytes, carries the flags between ranks, and names lines in
errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from iterreduce.columns import cells
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.sources.text import TEXT, Segment

# Cells cut at a time: their arrays (25 bytes a cell) stay in cache, and wide tables still get long columns.
PIECE_CELLS, LEAST_PIECE_ROWS = 1 << 16, 1 << 6
# Of an offending cell: enough to recognise it in a message.
SHOWN_BYTES = 60

_VECTOR = re.compile(r"^(.+)\[(\d+(?:,\d+)*)\]$", re.DOTALL)
_BLANKS = 1 << cells.BLANK | 1 << cells.QUOTED_BLANK
_FLOATS = 1 << cells.FLOAT | 1 << cells.SLOW
_BIG, _TEXT = 1 << cells.BIG, 1 << cells.TEXT


@dataclass(frozen=True)
class Trouble:
    """A cell that a consumer of numbers cannot use: its file, the byte where it begins, its text."""

    file: int
    at: int
    cell: str


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows as parsed. `words` (rows, columns): int64, or float64 bits in columns that have floats.

    `flags`: of each column, which kinds of cells occur; `floats`: the columns whose words are float64 bits;
    `kinds` (rows, columns): only kept if some cell is blank.
    """

    words: Array
    flags: Array
    floats: frozenset[int]
    kinds: Array | None
    text: dict[int, Ragged] = field(default_factory=dict)


class Parser:
    """Cuts a text into pieces. Buffers are reused from piece to piece.

    `names` of the columns that are read; `places`: of every column of the text, which of these it is, or -1.
    """

    def __init__(self, names: Sequence[str], places: Array, delimiter: int, known: CellKinds | None):
        self._names, self._places, self._delimiter, self._known = names, places, delimiter, known
        self._textual = (
            set() if known is None else {i for i, kind in enumerate(known.kinds) if kind == "text"}
        )
        shape = (max(LEAST_PIECE_ROWS, PIECE_CELLS // len(names)), len(names))
        self._records = np.empty(shape[0], np.int64)
        self._starts, self._ends = np.empty(shape, np.int64), np.empty(shape, np.int64)
        self._kinds, self._words = np.empty(shape, np.uint8), np.empty(shape, np.uint64)
        self._seen = np.zeros(len(names), np.int64)
        self.pieces: list[Piece] = []
        self.troubles: dict[str, Trouble] = {}

    def parse(self, segment: Segment, at: int) -> tuple[int, Array, tuple[int, int, int] | None]:
        """Parse rows from byte `at`: where it stopped, where rows begin, (byte, status, cells) if bad."""
        buffers = (self._records, self._starts, self._ends, self._kinds, self._words)
        rows, at, status, found = cells.parse_cells(
            segment.text, at, len(segment.text), self._delimiter, self._places, *buffers
        )
        if status == cells.DONE and rows:
            self.pieces.append(self._piece(segment, rows))
        return at, self._records[:rows], (at, status, found) if status != cells.DONE else None

    def _piece(self, segment: Segment, rows: int) -> Piece:
        kinds, words = self._kinds[:rows], self._words[:rows]
        flags = np.zeros(len(self._names), np.int64)
        cells.settle_kinds(kinds, flags)
        self._note_troubles(segment, rows, flags)
        self._textual |= (
            set(np.flatnonzero(flags & (_TEXT | _BIG)).tolist()) if self._known is None else set()
        )
        floats = [i for i in np.flatnonzero(self._is_float(flags)).tolist() if not flags[i] & _TEXT]
        if floats:
            self._settle_slow(segment.text, rows, floats, flags)
            cells.integers_to_floats(kinds, words, np.array(floats, np.int64))
        text = {
            i: cells.gather_cells(segment.text, self._starts[:rows, i], self._ends[:rows, i], kinds[:, i])
            for i in self._textual
        }
        blank = bool((flags & _BLANKS).any())
        kept = kinds & np.uint8(cells.DOUBLED - 1) if blank else None
        return Piece(words.copy(), flags, frozenset(floats), kept, text)

    def _is_float(self, flags: Array) -> Array:
        """Which columns are read as floats: those known to be, or those that have a float here."""
        if self._known is None:
            return np.asarray((flags & _FLOATS) != 0)
        return np.array([kind == "float64" for kind in self._known.kinds])

    def _settle_slow(self, text: Array, rows: int, floats: list[int], flags: Array) -> None:
        """Read what the compiled parser left over (more than 19 digits, subnormals) as Python does."""
        for column in floats:
            if flags[column] & (_BIG | 1 << cells.SLOW):
                kinds = self._kinds[:rows, column]
                for row in np.flatnonzero((kinds == cells.SLOW) | (kinds == cells.BIG)).tolist():
                    raw = text[self._starts[row, column] : self._ends[row, column]].tobytes()
                    self._words[row, column] = np.float64(raw.decode()).view(np.uint64)

    def _note_troubles(self, segment: Segment, rows: int, flags: Array) -> None:
        """Remember the first cell of each column that is no number (or too long a one), or empty."""
        news = flags & ~self._seen
        self._seen |= flags
        for column in np.flatnonzero(news & (_BLANKS | _TEXT | _BIG)).tolist():
            kinds = self._kinds[:rows, column] & (cells.DOUBLED - 1)
            wrong = kinds == cells.TEXT
            for what, rows_of in (
                ("text", wrong if wrong.any() else kinds == cells.BIG),
                ("null", kinds <= 1),
            ):
                self._note(f"{what} {self._names[column]}", segment, rows_of, column)

    def _note(self, what: str, segment: Segment, rows: Array, column: int) -> None:
        if what not in self.troubles and rows.any():
            row = int(np.argmax(rows))
            a, b = int(self._starts[row, column]), int(self._ends[row, column])
            cell = segment.text[a : min(b, a + SHOWN_BYTES)].tobytes().decode(errors="replace")
            self.troubles[what] = Trouble(
                segment.file, segment.origin + a, cell + "..." * (b - a > SHOWN_BYTES)
            )


@dataclass(frozen=True)
class Column:
    """One column of the result: its name, the columns of the file that make it, its field."""

    name: str
    members: tuple[int, ...]
    field: Field


@dataclass(frozen=True)
class CellKinds:
    """The types that all ranks agreed on: of each column of the file, "int64", "float64" or "text"."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    columns: tuple[Column, ...]

    @classmethod
    def decide(cls, names: Sequence[str], flags: Array) -> CellKinds:
        """From the kinds of cells that occur anywhere.

        >>> flags = np.array([1 << cells.INT, 1 << cells.INT | 1 << cells.FLOAT, 1 << cells.TEXT])
        >>> CellKinds.decide(["a", "b", "c"], flags).kinds
        ('int64', 'float64', 'text')
        """
        kinds = tuple(_kind_of(int(bits)) for bits in flags)
        nullable = [
            bool(f & (_BLANKS if k != "text" else 1 << cells.BLANK))
            for f, k in zip(flags, kinds, strict=True)
        ]
        columns = [
            Column(
                name,
                members,
                _field([kinds[i] for i in members], shape, [nullable[i] for i in members]),
            )
            for name, members, shape in grouped(names, kinds)
        ]
        return cls(tuple(names), kinds, tuple(columns))

    def schema(self) -> Schema:
        """The schema of all columns."""
        return Schema({c.name: c.field for c in self.columns})

    def members(self, name: str) -> tuple[int, ...]:
        """The columns of the file that make this column."""
        return next(c.members for c in self.columns if c.name == name)

    def fit(self, piece: Piece) -> bool:
        """Whether a piece, parsed before the types were known, holds what they need."""
        for i, kind in enumerate(self.kinds):
            if kind == "text" and i not in piece.text:
                return False
            if kind == "float64" and piece.flags[i] & _BIG and i not in piece.floats:
                return False
        return True

    def batch(self, pieces: Sequence[Piece], schema: Schema) -> Batch:
        """The rows of all pieces as columns of `schema`."""
        if not pieces:
            return Batch.empty(schema)
        wanted = [c for c in self.columns if c.name in schema]
        found = {c.name: self._column(pieces, c) for c in wanted}
        valid = {c.name: self._valid(pieces, c) for c in wanted if c.field.nullable}
        return Batch.from_dict({name: found[name] for name in schema}, valid)

    def _column(self, pieces: Sequence[Piece], column: Column) -> Array | Ragged:
        if column.field.kind == "text":
            return Ragged.concat([piece.text[column.members[0]] for piece in pieces])
        rows = sum(len(piece.words) for piece in pieces)
        out = np.empty((rows, len(column.members)), column.field.dtype)
        at = 0
        for piece in pieces:
            part = out[at : at + len(piece.words)]
            for place, member in enumerate(column.members):
                part[:, place] = self._numbers(piece, member, column.field)
            at += len(piece.words)
        return out.reshape(rows, *column.field.shape)

    def _numbers(self, piece: Piece, member: int, wanted: Field) -> Array:
        words = piece.words[:, member]
        if wanted.dtype.kind == "i":
            return words.view(np.int64)
        if member in piece.floats:
            return words.view(np.float64)
        numbers = words.view(np.int64).astype(np.float64)
        if piece.kinds is not None and piece.flags[member] & _BLANKS:
            numbers[piece.kinds[:, member] <= cells.QUOTED_BLANK] = np.nan
        return numbers

    def _valid(self, pieces: Sequence[Piece], column: Column) -> Array:
        highest = cells.BLANK if column.field.kind == "text" else cells.QUOTED_BLANK
        return np.concatenate([_filled(piece, column.members, highest) for piece in pieces])


def _filled(piece: Piece, members: Iterable[int], highest_blank: int) -> Array:
    if piece.kinds is None:
        return np.ones(len(piece.words), bool)
    return np.asarray((piece.kinds[:, list(members)] > highest_blank).all(axis=1))


def _kind_of(flags: int) -> str:
    if flags & _TEXT or (flags & _BIG and not flags & _FLOATS):
        return "text"
    if flags & _FLOATS:
        return "float64"
    if flags >> cells.INT & 1:
        return "int64"
    return "text" if flags >> cells.QUOTED_BLANK & 1 else "float64"


def _field(kinds: Sequence[str], shape: tuple[int, ...], nullable: Sequence[bool]) -> Field:
    if kinds[0] == "text":
        return Field(TEXT.kind, TEXT.dtype, (), any(nullable))
    dtype = np.dtype("float64" if "float64" in kinds else "int64")
    return Field("fixed", dtype, shape, any(nullable))


Grouped = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A column: its name, the columns of the file that make it, the shape of its rows."""


def grouped(names: Sequence[str], kinds: Sequence[str] = ()) -> list[Grouped]:
    """The columns that these columns of a file make; without `kinds`, as if all were of numbers.

    >>> grouped(["x[0]", "x[1]", "y"])
    [('x', (0, 1), (2,)), ('y', (2,), ())]
    """
    kinds = kinds or ["int64"] * len(names)
    found: list[Grouped] = []
    at = 0
    while at < len(names):
        name, shape, count = _vector_at(names, kinds, at)
        found.append((name, tuple(range(at, at + count)), shape))
        at += count
    if len({name for name, _, _ in found}) < len(found):  # "x" beside "x[0]": keep the names of the file
        return [(name, (i,), ()) for i, name in enumerate(names)]
    return found


def needed(names: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    """Which columns of a file must be read so that those wanted come out as if all had been read.

    A name that is not there, and names of which it is not clear what they make without the others, need all.

    >>> needed(["id", "x[0]", "x[1]"], ["x"]), needed(["id", "x[0]", "x[1]"], ["z"])
    ([1, 2], [0, 1, 2])
    """
    groups = grouped(names)
    chosen = [g for g in groups if wanted is None or {g[0], *(names[i] for i in g[1])} & {*wanted}]
    read = [i for _, members, _ in chosen for i in members]
    known = {name for name, _, _ in chosen} | {names[i] for i in read}
    alone = [name for name, _, _ in grouped([names[i] for i in read])]
    clear = len(groups) < len(names) or not any(map(_VECTOR.match, names))
    if wanted is None or not clear or not known.issuperset(wanted) or alone != [g[0] for g in chosen]:
        return list(range(len(names)))
    return read


def _vector_at(names: Sequence[str], kinds: Sequence[str], at: int) -> tuple[str, tuple[int, ...], int]:
    """The vector column that begins here: name, row shape, columns used; or the column itself.

    >>> _vector_at(["x[0]", "x[1]", "y"], ["int64"] * 3, 0), _vector_at(["x[1]"], ["int64"], 0)
    (('x', (2,), 2), ('x[1]', (), 1))
    """
    found = _VECTOR.match(names[at])
    if found is None:
        return names[at], (), 1
    stem = found.group(1)
    count = 1
    while at + count < len(names) and (more := _VECTOR.match(names[at + count])) and more.group(1) == stem:
        count += 1
    indices = [tuple(map(int, names[i][len(stem) + 1 : -1].split(","))) for i in range(at, at + count)]
    shape = tuple(i + 1 for i in indices[-1])
    complete = len({len(i) for i in indices}) == 1 and indices == list(np.ndindex(*shape))
    if not complete or "text" in kinds[at : at + count]:
        return names[at], (), 1
    return stem, shape, count
