"""CSV and TSV with a header: columns of int64, float64 or text, the same on any number of ranks.

A column's type is inferred from all of its cells: int64 if all are integers that fit, else float64 if all are
numerals (``nan`` and ``inf`` count), else text; integers beyond int64 are text unless the column has
fractions. An unquoted cell that is empty or blank is null. Quotes are those of RFC 4180: a quoted cell may
hold delimiters, doubled quotes and newlines; a quote inside an unquoted cell is refused, because behind it
nobody knows which newline ends a row. Columns ``x[0]``, ``x[1]``, ... that stand side by side are one column
``x`` of vectors.

`open` does the work: each rank counts quotes and newlines of its blocks (so that all know where rows and
lines begin), parses its range, and all agree on the types. The parsed rows are kept for the first `read` of
that range. How a range is parsed and how parsed pieces become columns stands in `cellpieces.py`.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns import cells
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import InputError
from iterreduce.sources.agreement import agree, root_decides
from iterreduce.sources.asked import Peek
from iterreduce.sources.cellpieces import CellKinds, Parser, Piece, Trouble, grouped, needed
from iterreduce.sources.files import pieces
from iterreduce.sources.text import BEYOND_BYTES, TEXT, Segment, TextSource, open_bytes

if TYPE_CHECKING:
    from iterreduce.collectives import Group

# A header is a line; one this long is a file without newlines.
HEADER_BYTES = 1 << 24
# What is looked at of the rows before a file is opened.
SAMPLE_BYTES, SAMPLE_ROWS = 1 << 14, 100


class CsvSource(TextSource):
    """Records of delimited text with a header line."""

    quote = cells.QUOTE

    def __init__(self, path: str, delimiter: str | None = None, block_bytes: int | None = None):
        super().__init__(path, block_bytes)
        self.suffixes = (".tsv", ".tsv.gz") if delimiter == "\t" else (".csv", ".csv.gz")
        self.delimiter = delimiter
        self._held: dict[tuple[int, int], Batch] = {}
        self._raw: dict[
            int, tuple[int, Array]
        ] = {}  # of each file, while opening: own bytes and their offset
        self._offenders: dict[str, tuple[str, int, str]] = {}

    # -- opening

    def open(self, group: Group) -> None:
        """Agree on files, header and types; parse this rank's range. Collective."""
        found = root_decides(group, self._look)
        self._settle(group, found)
        self._take(found["names"], found["delimiter"])
        own = self.blocks.owned(group.rank, group.size)
        try:
            self._agree_borders(group, *own)
            parsed, offenders = agree(group, lambda: self._parse(*own, None))
            self._agree_kinds(group, parsed, offenders)
            self.schema = root_decides_schema(group, lambda: self.project(self._kinds.schema()))
            self.token = self.make_token(self.block_bytes, self.delimiter)
            self._held = {own: agree(group, lambda: self._finish(*own, parsed))}
        finally:
            self._raw = {}

    def _take(self, names: list[str], delimiter: str) -> None:
        """Note the header, and which of its columns are read: cells of others are passed over."""
        read = needed(names, self._wanted)
        self._columns, self._comma = len(names), ord(delimiter)
        self._names = [names[i] for i in read]
        self._places = np.full(len(names), -1, np.int64)
        self._places[read] = np.arange(len(read))

    def peek_at(self, paths: list[str]) -> Peek:
        """Names from the header, and text where the first rows hold words; numbers may still be anything."""
        path = paths[0]
        header = read_header(path, self.begin_of(path), self.delimiter)
        with open_bytes(path) as stream:
            stream.seek(header.end)
            sample = stream.read(SAMPLE_BYTES)
        words = columns_of_words(header, sample[: sample.rfind(b"\n") + 1])
        kinds = ["text" if i in words else "int64" for i in range(len(header.names))]
        text = Field(TEXT.kind, TEXT.dtype, (), True)
        return {
            name: text if members[0] in words else None for name, members, _ in grouped(header.names, kinds)
        }

    def _look(self) -> dict[str, Any]:
        found = super()._look()
        paths = [state[0] for state in found["files"]]
        headers = [read_header(p, b, self.delimiter) for p, b in zip(paths, found["begins"], strict=True)]
        first = headers[0]
        for path, header in zip(paths, headers, strict=True):
            if (header.names, header.delimiter) != (first.names, first.delimiter):
                raise InputError(
                    f"{path} differs from {paths[0]}: its header is {', '.join(header.names)}; "
                    f"that of the other is {', '.join(first.names)}"
                )
        return {
            **found,
            "begins": [h.end for h in headers],
            "names": first.names,
            "delimiter": first.delimiter,
        }

    def _agree_borders(self, group: Group, lo: int, hi: int) -> None:
        """Count quotes and newlines of all blocks: does one begin inside a quoted cell, and on which line."""
        counts = np.zeros(2 * self.blocks.count, np.int64)
        quotes, newlines = counts.reshape(2, -1)
        agree(group, lambda: self._count_marks(lo, hi, quotes, newlines))
        group.allreduce(counts, "sum")
        self._inside, self._lines_before = np.zeros(self.blocks.count, bool), np.zeros_like(newlines)
        for file in range(len(self.files)):
            a, b = self._first_block[file : file + 2]
            self._inside[a:b] = (np.cumsum(quotes[a:b]) - quotes[a:b]) % 2 == 1
            self._lines_before[a:b] = np.cumsum(newlines[a:b]) - newlines[a:b]

    def _count_marks(self, lo: int, hi: int, quotes: Array, newlines: Array) -> None:
        for file, first, last in pieces(self._first_block, lo, hi):
            size = int(self._bytes[file])
            origin, end = max(0, first * self._step - 1), min(last * self._step + BEYOND_BYTES, size)
            self._raw[file] = (origin, super().read_bytes(file, origin, end))
            for block in range(first, last):
                text = self.read_bytes(file, block * self._step, min((block + 1) * self._step, size))
                at = block + int(self._first_block[file])
                quotes[at] = np.count_nonzero(text == cells.QUOTE)
                newlines[at] = np.count_nonzero(text == cells.NEWLINE)

    def read_bytes(self, file: int, lo: int, hi: int) -> Array:
        """Bytes of a file: those read for counting, while opening; else as they stand there. Local."""
        origin, text = self._raw.get(file, (0, None))
        if text is not None and origin <= lo and hi <= origin + len(text):
            return text[lo - origin : hi - origin]
        return super().read_bytes(file, lo, hi)

    def _agree_kinds(self, group: Group, parsed: list[Piece], offenders: dict[str, Trouble]) -> None:
        flags = np.zeros(len(self._names), np.int64)
        for piece in parsed:
            flags |= piece.flags
        group.allreduce(flags, "or")
        self._kinds = CellKinds.decide(self._names, flags)
        told = {what: self._locate(trouble) for what, trouble in offenders.items()}
        for said in group.allgather_bytes(json.dumps(told).encode()):
            self._offenders = {**json.loads(bytes(said)), **self._offenders}

    def _locate(self, trouble: Trouble) -> tuple[str, int, str]:
        """File, line and cell of a trouble."""
        return self.files[trouble.file].path, self._line(trouble.file, trouble.at), trouble.cell

    def _line(self, file: int, at: int) -> int:
        """The number of the line on which this byte stands, from 1."""
        block = at // self._step
        text = self.read_bytes(file, block * self._step, at)
        return (
            1
            + int(self._lines_before[self._first_block[file] + block])
            + int(np.count_nonzero(text == cells.NEWLINE))
        )

    # -- reading

    def read(self, lo: int, hi: int) -> Batch:
        """The rows of blocks ``[lo, hi)``. Local."""
        held = self._held.pop((lo, hi), None)
        return self._finish(lo, hi, self._parse(lo, hi, self._kinds)[0]) if held is None else held

    def _parse(self, lo: int, hi: int, known: CellKinds | None) -> tuple[list[Piece], dict[str, Trouble]]:
        self._block_rows[lo:hi] = 0
        parser = Parser(self._names, self._places, self._comma, known)
        for segment in self.segments(lo, hi):
            at = 0
            while at < len(segment.text):
                at, records, failure = parser.parse(segment, at)
                self.count_rows(lo, hi, segment, records)
                if failure:
                    raise InputError(self._bad_record(segment, *failure))
        return parser.pieces, parser.troubles

    def _bad_record(self, segment: Segment, at: int, status: int, found: int) -> str:
        where = f"{self.files[segment.file].path} line {self._line(segment.file, segment.origin + at)}"
        if status == cells.RAGGED_ROW:
            count = self._columns
            return f"{where}: {found} cell{'s' * (found != 1)}, header has {count} column{'s' * (count != 1)}"
        if status == cells.OPEN_QUOTE:
            return f"{where}: a quote opens here and is never closed; close it, or double it in a quoted cell"
        if status == cells.AFTER_QUOTE:
            return f"{where}: text follows a closing quote; a quote inside a quoted cell must be doubled"
        return f"{where}: a quote inside an unquoted cell; put the cell in quotes and double the quotes in it"

    def _finish(self, lo: int, hi: int, parsed: list[Piece]) -> Batch:
        """The wanted columns of parsed pieces; parsed again if one was read as another type than agreed."""
        if not all(self._kinds.fit(piece) for piece in parsed):
            parsed, _ = self._parse(lo, hi, self._kinds)
        return self._kinds.batch(parsed, self.schema)

    # -- complaints of consumers

    def require_numeric(self, column: str) -> None:
        """Raise `InputError` naming the first cell that is no number, if the column is text."""
        parts = [self._names[i] for i in self._kinds.members(column)] if column in self.schema else []
        for part in parts:
            if f"text {part}" in self._offenders and self.schema[column].kind == "text":
                path, line, cell = self._offenders[f"text {part}"]
                raise InputError(f'{path} line {line}, column "{part}": "{cell}" is not a number')
        super().require_numeric(column)

    def first_null(self, column: str) -> str | None:
        """Where the column's first empty cell stands, in words; None if it has none."""
        for part in [self._names[i] for i in self._kinds.members(column)]:
            if f"null {part}" in self._offenders:
                path, line, _ = self._offenders[f"null {part}"]
                return f'{path} line {line}, column "{part}"'
        return None


def root_decides_schema(group: Group, work: Any) -> Schema:
    """A schema (or an error about it) that rank 0 makes for all. Collective."""
    return Schema.from_json(root_decides(group, lambda: work().to_json()))


@dataclass(frozen=True)
class Header:
    """Column names of a file, what separates its cells, and where its first row begins."""

    names: list[str]
    delimiter: str
    end: int


def read_header(path: str, begin: int, delimiter: str | None) -> Header:
    """Parse the first line of a file (quotes and all). Raises `InputError`."""
    line = _first_record(path, begin)
    if not line.strip():
        raise InputError(f"{path} is empty: wanted a header line with column names")
    text = line.decode("utf-8", errors="surrogateescape")
    separator = delimiter or next((c for c in ",;\t" if c in text), ",")
    names = [name.strip() for name in next(csv.reader(io.StringIO(text, newline=""), delimiter=separator))]
    _check_names(path, names)
    return Header(names, separator, begin + len(line))


def columns_of_words(header: Header, sample: bytes) -> set[int]:
    """The columns of which a whole row of the sample holds a word, which makes them text for sure."""
    text = sample.decode("utf-8", errors="surrogateescape")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=header.delimiter, skipinitialspace=True)
    full = (row for row in rows if len(row) == len(header.names))
    cells_of = zip(*itertools.islice(full, SAMPLE_ROWS), strict=True)
    bare = [[cell.strip(' \t"') for cell in column] for column in cells_of]
    return {i for i, column in enumerate(bare) if any(map(_is_word, column))}


def _is_word(cell: str) -> bool:
    """Whether no parser takes a cell for a number or for nothing: Python takes more than this package's."""
    plain = cell.isascii() and "_" not in cell and cell == cell.strip()
    return bool(cell) and not (plain and _is_number(cell))


def _first_record(path: str, begin: int) -> bytes:
    with open_bytes(path) as stream:
        stream.seek(begin)
        line = stream.readline(HEADER_BYTES)
        while line.count(b'"') % 2 and len(line) < HEADER_BYTES:
            more = stream.readline(HEADER_BYTES)
            if not more:
                raise InputError(f"{path} line 1: a quote opens in the header and is never closed")
            line += more
    if len(line) >= HEADER_BYTES:
        raise InputError(
            f"{path}: no line ends in its first {HEADER_BYTES >> 20} MiB, so this is not a table of text"
        )
    if b"\0" in line:
        raise InputError(f"{path} is not text: it holds a zero byte at offset {begin + line.index(0)}")
    return line


def _check_names(path: str, names: list[str]) -> None:
    if "" in names:
        raise InputError(
            f"{path} line 1: column {names.index('') + 1} of the header has no name; name it "
            "(pandas writes such a column unless told index=False)"
        )
    if all(_is_number(name) for name in names):
        raise InputError(
            f"{path} line 1: {', '.join(names[:5])} are numbers, wanted a header with column names; "
            f"add a first line such as {','.join(f'x[{i}]' for i in range(min(len(names), 3)))}"
        )
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise InputError(f'{path} line 1: two columns are named "{double}"; rename one')


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
