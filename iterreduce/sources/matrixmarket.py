"""MatrixMarket coordinate files as graphs: entry (i, j) is an edge from i - 1 to j - 1.

Ids count from 0, as the rows and columns of ``scipy.io.mmread`` do. A symmetric file stores one triangle, and
gives both directions, the diagonal once; a skew-symmetric one gives the other direction with the opposite
sign. ``real`` values are float64, ``integer`` int64, a ``pattern`` has no weight. Format: Boisvert, Pozo and
Remington, "The Matrix Market exchange formats" (NISTIR 5935, 1996).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns.ragged import Array
from iterreduce.errors import InputError
from iterreduce.sources.asked import Peek
from iterreduce.sources.edgelist import COLUMNS, FLOAT64, INT64, LINE_BYTES, EdgeListSource, Piece
from iterreduce.sources.text import open_bytes

if TYPE_CHECKING:
    from iterreduce.collectives import Group

SUFFIXES = (".mtx",)
FIELDS = {"real": 3, "double": 3, "integer": 3, "unsigned-integer": 3, "pattern": 2}
SYMMETRIES = ("general", "symmetric", "skew-symmetric")
WANTED = "%%MatrixMarket matrix coordinate real|integer|pattern general|symmetric|skew-symmetric"


class MatrixMarketSource(EdgeListSource):
    """The entries of coordinate matrices as columns ``src``, ``dst`` and, but for patterns, ``weight``."""

    suffixes = (".mtx", ".mtx.gz")
    only_integers = True

    def __init__(self, path: str, block_bytes: int | None = None):
        super().__init__(path, block_bytes)
        self._heads: list[dict[str, Any]] = []
        self._lines = np.zeros(0, np.int64)

    def peek_at(self, paths: list[str]) -> Peek:
        """What the first file's header says."""
        head = _head(paths[0], self.begin_of(paths[0]))
        weight = FLOAT64 if head["field"] in ("real", "double") else None
        fields: Peek = {"src": INT64, "dst": INT64, "weight": weight}
        return {name: fields[name] for name in COLUMNS[: FIELDS[head["field"]]]}

    def count_rows_of(self, paths: list[str]) -> int:
        """The entries that headers promise, both directions of those stored once (and of the diagonal)."""
        heads = [_head(path, self.begin_of(path)) for path in paths]
        return sum(head["entries"] * (1 + (head["symmetry"] != "general")) for head in heads)

    def _look(self) -> dict[str, Any]:
        found = self.look_at_files()
        paths = [state[0] for state in found["files"]]
        heads = [_head(path, begin) for path, begin in zip(paths, found["begins"], strict=True)]
        for path, head in zip(paths, heads, strict=True):
            if head["field"] != heads[0]["field"]:
                raise InputError(
                    f"{path} differs from {paths[0]}: its values are {head['field']}, "
                    f"those of the other {heads[0]['field']}"
                )
        return {
            **found,
            "begins": [head["end"] for head in heads],
            "cells": FIELDS[heads[0]["field"]],
            "first": [paths[0], 1],
            "heads": heads,
        }

    def _take(self, found: dict[str, Any]) -> None:
        super()._take(found)
        self._heads = found["heads"]
        self._floats = self._heads[0]["field"] in ("real", "double")
        self._lines = np.zeros(len(self._heads), np.int64)

    def _agree_more(self, group: Group) -> None:
        group.allreduce(self._lines, "sum")
        for file, head, lines in zip(self.files, self._heads, self._lines.tolist(), strict=True):
            if lines != head["entries"]:
                raise InputError(
                    f"{file.path} holds {lines} entries, its size line promises {head['entries']}: "
                    "copy or write it again"
                )

    def _expected(self) -> str:
        wanted = "i j value" if self._cells == 3 else "i j"
        return f"the header says {self._heads[0]['field']}: wanted {wanted}"

    def finished(self, piece: Piece) -> Piece:
        """Ids from 0, and the other direction of what is stored once."""
        head = self._heads[piece.segment.file]
        self._lines[piece.segment.file] += len(piece.records)
        self._check_range(piece, piece.src, head["rows"], "row")
        self._check_range(piece, piece.dst, head["columns"], "column")
        src, dst = np.asarray(piece.src) - 1, np.asarray(piece.dst) - 1
        moved = replace(piece, src=src, dst=dst)
        return moved if head["symmetry"] == "general" else _both(moved, head["symmetry"])

    def _check_range(self, piece: Piece, ids: Any, most: int, what: str) -> None:
        wrong = (ids < 1) | (ids > most)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{self.place_of(piece.segment, int(piece.records[row]))}: {what} {int(ids[row])}, "
                f"but the size line says 1 to {most}"
            )


def _both(piece: Piece, symmetry: str) -> Piece:
    """Every edge, and behind it the edge the other way, if it is no loop."""
    src, dst = np.asarray(piece.src), np.asarray(piece.dst)
    mirrored = src != dst
    copies = 1 + mirrored.astype(np.int64)
    at = (np.cumsum(copies) - 1)[mirrored]
    weight = None if piece.weight is None else np.repeat(piece.weight, copies)
    if weight is not None and symmetry == "skew-symmetric":
        weight[at] = -weight[at]
    return replace(
        piece,
        src=_with(np.repeat(src, copies), at, dst[mirrored]),
        dst=_with(np.repeat(dst, copies), at, src[mirrored]),
        weight=weight,
        copies=copies,
    )


def _with(array: Array, at: Array, values: Array) -> Array:
    array[at] = values
    return array


def _head(path: str, begin: int) -> dict[str, Any]:
    """What a file says of itself before its first entry. Raises `InputError`."""
    with open_bytes(path) as stream:
        stream.read(begin)
        words = stream.readline(LINE_BYTES).decode("latin-1").lower().split()
        if words[:3] != ["%%matrixmarket", "matrix", "coordinate"] or len(words) != 5:
            raise InputError(f"{path} line 1: {' '.join(words)[:80]!r}; wanted {WANTED}")
        if words[3] not in FIELDS or words[4] not in SYMMETRIES:
            raise InputError(f"{path} line 1: a matrix that is {words[3]} {words[4]}; wanted {WANTED}")
        number, line = 2, stream.readline(LINE_BYTES)
        while line and (not line.strip() or line.lstrip().startswith(b"%")):
            number, line = number + 1, stream.readline(LINE_BYTES)
        sizes = line.split()
        if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
            raise InputError(f"{path} line {number}: wanted the size line: rows columns entries")
        rows, columns, entries = map(int, sizes)
        return {
            "field": words[3],
            "symmetry": words[4],
            "rows": rows,
            "columns": columns,
            "entries": entries,
            "end": stream.tell(),
        }
