"""Edge lists: lines ``src dst [weight]`` as columns, the same on any number of ranks.

Cells stand apart by any white space; lines that begin with ``#`` or ``%`` and blank lines do not count. Ids
are int64 if all ids of all files are whole numbers that fit, else text; weights are int64 if all are whole,
else float64. All lines have as many cells as the first.

`open` reads every rank's range once, in pieces, and keeps nothing of it but counts: so the kinds are agreed,
every error is found, and the number of edges is known before the first is read. `read` parses again, and can
be asked for a few blocks at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns import cells, edges
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import InputError
from iterreduce.sources.agreement import agree, root_decides
from iterreduce.sources.asked import Peek
from iterreduce.sources.blocks import Blocks
from iterreduce.sources.text import TEXT, Segment, TextSource, open_bytes

if TYPE_CHECKING:
    from iterreduce.collectives import Group

SUFFIXES = (".el", ".edges")
ALSO = (".txt", ".log", ".text", "")
COLUMNS = ("src", "dst", "weight")
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+\Z")
# Comments and blank lines that are passed over to see the first edge of a file that is not opened.
PEEKED_BYTES = 1 << 20
INT64, FLOAT64 = Field("fixed", np.dtype(np.int64)), Field("fixed", np.dtype(np.float64))
# Bytes parsed at a time, and edges of a piece: both stay in cache.
PIECE_BYTES, PIECE_ROWS = 1 << 21, 1 << 15
# Most lines of a graph are this short; longer ones cost a second read at the end of a range.
EDGE_BEYOND_BYTES = 1 << 12
# A line as long as this is no edge.
LINE_BYTES = 1 << 20
HEADERS = {("src", "dst"), ("source", "target"), ("from", "to"), ("source", "destination"), ("u", "v")}


@dataclass(frozen=True, eq=False)
class Piece:
    """Some edges as parsed: where their lines begin, and their columns (`weight` int64 or float64)."""

    segment: Segment
    records: Array
    src: Array | Ragged
    dst: Array | Ragged
    weight: Array | None
    copies: Array | None = None  # rows that each line gave, where not one


@dataclass(frozen=True)
class First:
    """The first edge of a file: its cells, and its line."""

    cells: list[str]
    line: int


class EdgeListSource(TextSource):
    """Edges of text files as columns ``src``, ``dst`` and, if lines have three cells, ``weight``."""

    suffixes = tuple(s + z for s in (*SUFFIXES, ".tsv", *ALSO) for z in ("", ".gz"))
    of_edges = True  # ids are whole numbers or text, weights numbers, nothing is null
    beyond_bytes = EDGE_BEYOND_BYTES
    only_integers = False

    def __init__(self, path: str, block_bytes: int | None = None):
        super().__init__(path, block_bytes)
        self._cells, self._first_line = 2, ("", 1)
        self._textual, self._floats = False, False
        self._scratch: _Scratch | None = None

    # -- opening

    def open(self, group: Group) -> None:
        """Agree on files, kinds and the number of edges; every rank looks through its range. Collective."""
        found = root_decides(group, self._look)
        self._take(found)
        self._settle(group, found)
        rows, flags = np.zeros(self.blocks.count, np.int64), np.zeros(2, np.int64)
        lo, hi = self.blocks.owned(group.rank, group.size)
        agree(group, lambda: self._scan(lo, hi, rows, flags))
        group.allreduce(flags, "or")
        group.allreduce(rows, "sum")
        self._agree_more(group)
        self._textual = bool(flags[0] & 2)
        self._floats |= bool(flags[1] & ~(1 << cells.INT))
        self._block_rows = rows
        self.blocks = Blocks(len(rows), np.concatenate([[0], np.cumsum(rows)]).astype(np.int64))
        self.schema = self.project(self._fields())
        self.token = self.make_token(self.block_bytes)

    def _take(self, found: dict[str, Any]) -> None:
        """Note what rank 0 found."""
        self._cells, self._first_line = found["cells"], found["first"]

    def _agree_more(self, group: Group) -> None:
        """What a kind of file checks beyond this. Collective."""

    def _fields(self) -> Schema:
        ids = TEXT if self._textual else INT64
        fields = {"src": ids, "dst": ids}
        return Schema(fields if self._cells == 2 else fields | {"weight": FLOAT64 if self._floats else INT64})

    def peek_at(self, paths: list[str]) -> Peek:
        """What the first edge tells: one word among the ids makes all of them text, one fraction all weights
        floats.
        """
        first = first_edge(paths[0], self.begin_of(paths[0]), PEEKED_BYTES)
        if not first.cells:
            raise InputError(f"{paths[0]} does not begin with an edge")
        check_first(paths[0], first)
        whole = [bool(WHOLE_NUMBER.match(cell)) for cell in first.cells]
        ids = None if all(whole[:2]) else TEXT
        return dict(zip(COLUMNS, [ids, ids, None if all(whole[2:]) else FLOAT64][: len(whole)], strict=False))

    def _look(self) -> dict[str, Any]:
        found = self.look_at_files()
        paths = [state[0] for state in found["files"]]
        firsts = [first_edge(path, begin) for path, begin in zip(paths, found["begins"], strict=True)]
        known = [(path, first) for path, first in zip(paths, firsts, strict=True) if first.cells]
        for path, first in known:
            check_first(path, first)
            if len(first.cells) != len(known[0][1].cells):
                raise InputError(
                    f"{path} differs from {known[0][0]}: its lines have {len(first.cells)} cells, "
                    f"those of the other {len(known[0][1].cells)}"
                )
        path, first = known[0] if known else (paths[0], First(["", ""], 1))
        return {**found, "cells": len(first.cells), "first": [path, first.line]}

    def _scan(self, lo: int, hi: int, rows: Array, flags: Array) -> None:
        """Count the edges of each block and note the kinds of their cells. Raises `InputError`."""
        ids = edges.INTEGERS if self.only_integers else edges.EITHER
        for piece in self._pieces(lo, hi, ids, flags):
            if len(piece.records):
                blocks = (piece.records + piece.segment.origin) // self._step
                first = int(blocks[0])
                counts = np.bincount(blocks - first, piece.copies).astype(np.int64)
                at = int(self._first_block[piece.segment.file]) + first
                rows[at : at + len(counts)] += counts

    # -- reading

    def release(self) -> None:
        """Give back what only makes reading faster. Local; blocks can still be read."""
        super().release()
        self._scratch = None

    def read(self, lo: int, hi: int) -> Batch:
        """The edges of blocks ``[lo, hi)``. Local."""
        ids = edges.PLACES if self._textual else edges.INTEGERS
        rows = int(self._block_rows[lo:hi].sum())
        out = {name: _Column(rows, field) for name, field in self.schema.items()}
        for piece in self._pieces(lo, hi, ids, np.zeros(2, np.int64)):
            for name, column in out.items():
                column.put(getattr(piece, name))
        if any(column.at != rows for column in out.values()):
            raise InputError(f"{self.name} changed between open and read: let its writer finish")
        return Batch.from_dict({name: column.whole() for name, column in out.items()})

    def _pieces(self, lo: int, hi: int, ids: int, flags: Array) -> Iterator[Piece]:
        step = max(1, PIECE_BYTES // self._step) if self.blocks.count else 1
        scratch = self._scratch = self._scratch or _Scratch()
        for first in range(lo, hi, step):
            for segment in self.segments(first, min(first + step, hi)):
                at = 0
                while at < len(segment.text):
                    at, piece = self._piece(scratch, segment, at, ids, flags)
                    yield self.finished(piece)

    def finished(self, piece: Piece) -> Piece:
        """The edges that a piece of this kind of file means."""
        return piece

    def _piece(self, to: _Scratch, segment: Segment, at: int, ids: int, flags: Array) -> tuple[int, Piece]:
        rows, status = 0, edges.DONE
        has_weight = self._cells == 3 and self._is_wanted("weight")
        weights = (edges.FLOATS if self._floats else edges.WHOLE) if has_weight else edges.UNREAD
        while at < len(segment.text) and rows < PIECE_ROWS:
            got, at, status, found = edges.parse_edges(
                segment.text, at, self._cells, ids, weights, *to.after(rows), flags
            )
            rows += got
            if status == edges.LEFT_TO_CALLER:
                to.weight[rows - 1] = np.float64(_cell(segment.text, found)).view(np.uint64)
            elif status != edges.DONE:
                raise InputError(self._bad_line(segment, at, status, found))
        kind = np.float64 if self._floats else np.int64
        weight = to.weight[:rows].view(kind).copy() if has_weight else None
        src: Array | Ragged
        dst: Array | Ragged
        if ids == edges.PLACES:
            ends = {name: self._is_wanted(name) for name in ("src", "dst")}
            src, dst = (to.text_of(segment.text, rows if ends[name] else 0, name) for name in ends)
        else:
            src, dst = to.numbers(rows)
        return at, Piece(segment, to.records[:rows], src, dst, weight)

    def _is_wanted(self, name: str) -> bool:
        return self._wanted is None or name in self._wanted

    # -- complaints

    def _bad_line(self, segment: Segment, at: int, status: int, found: int) -> str:
        where = self.place_of(segment, at)
        if status == edges.RAGGED_LINE:
            return f"{where}: {found} cell{'s' * (found != 1)}, but {self._expected()}"
        shown = _cell(segment.text, found)
        if status == edges.BAD_ID:
            return f'{where}: the id "{shown}" is not a whole number'
        return f'{where}: the weight "{shown}" is not a number'

    def _expected(self) -> str:
        path, line = self._first_line
        shape = "src dst weight" if self._cells == 3 else "src dst"
        return f"the first edge ({path} line {line}) has {self._cells}: {shape}"

    def place_of(self, segment: Segment, at: int) -> str:
        """File, line and byte of a place, in words."""
        path = self.files[segment.file].path
        byte = segment.origin + at
        return f"{path} line {_line_of(path, byte)} (byte {byte})"


class _Scratch:
    """Where a piece is parsed to; used again for the next."""

    def __init__(self) -> None:
        self.records, self.src, self.dst = (np.empty(PIECE_ROWS, np.int64) for _ in range(3))
        self.weight, self.places = np.empty(PIECE_ROWS, np.uint64), np.empty((PIECE_ROWS, 4), np.int64)

    def after(self, rows: int) -> tuple[Array, Array, Array, Array, Array]:
        """The room behind these rows."""
        return (
            self.records[rows:],
            self.src[rows:],
            self.dst[rows:],
            self.weight[rows:],
            self.places[rows:],
        )

    def numbers(self, rows: int) -> tuple[Array, Array]:
        """Copies of the ids."""
        return self.src[:rows].copy(), self.dst[:rows].copy()

    def text_of(self, text: Array, rows: int, name: str) -> Ragged:
        """One end of each edge as text."""
        at = ("src", "dst").index(name)
        starts, ends = self.places[:rows, at], self.places[:rows, 2 + at]
        return cells.gather_cells(text, starts, ends, np.zeros(rows, np.uint8))


class _Column:
    """One column of a batch whose number of rows is known, filled piece by piece."""

    def __init__(self, rows: int, field: Field):
        self.at, self._rows = 0, rows
        self._array = np.empty(rows, field.dtype) if field.kind == "fixed" else None
        self._text = [Batch.empty(Schema({"text": TEXT}))["text"]]

    def put(self, part: Array | Ragged) -> None:
        """Append; more rows than there is room for are counted, not kept."""
        end = self.at + len(part)
        if self._array is None:
            self._text.append(part)
        elif end <= self._rows:
            self._array[self.at : end] = part
        self.at = end

    def whole(self) -> Array | Ragged:
        """All rows."""
        return Ragged.concat(self._text[1:] or self._text) if self._array is None else self._array


def _cell(text: Array, at: int) -> str:
    """The cell that begins here, shortened for a message."""
    return text[at : at + 60].tobytes().split()[0].decode(errors="replace")


def _line_of(path: str, byte: int) -> int:
    """The number of the line on which this byte stands, from 1; reads the file up to there."""
    line, left = 1, byte
    with open_bytes(path) as stream:
        while left and (text := stream.read(min(left, 1 << 20))):
            line += text.count(b"\n")
            left -= len(text)
    return line


def first_edge(path: str, begin: int, most_bytes: int | None = None) -> First:
    """The cells of the first line that is an edge; none if there is no such line (within so many bytes)."""
    with open_bytes(path) as stream:
        number = stream.read(begin).count(b"\n")
        while (most_bytes is None or stream.tell() < most_bytes) and (line := stream.readline(LINE_BYTES)):
            number += 1
            if len(line) >= LINE_BYTES:
                raise InputError(f"{path} line {number}: no edge list has lines of {LINE_BYTES} bytes")
            if b"\0" in line:
                raise InputError(f"{path} is not text: it holds a zero byte on line {number}")
            if line.strip() and not line.lstrip().startswith((b"#", b"%")):
                return First([cell.decode(errors="replace") for cell in line.split()], number)
    return First([], 0)


def check_first(path: str, first: First) -> None:
    """Raise `InputError` for a first line that is no edge."""
    found = first.cells
    if tuple(cell.lower() for cell in found[:2]) in HEADERS:
        raise InputError(
            f"{path} line {first.line}: {' '.join(found)} is a header, and an edge list has none; "
            "put # in front of it, or name the file .csv or .tsv"
        )
    if len(found) not in (2, 3):
        commas = len(found) == 1 and any(c in found[0] for c in ",;")
        advice = "; cells stand apart by white space (a table with commas ends in .csv)" if commas else ""
        raise InputError(
            f"{path} line {first.line}: {len(found)} cell{'s' * (len(found) != 1)}, "
            f"wanted src dst [weight]{advice}"
        )
