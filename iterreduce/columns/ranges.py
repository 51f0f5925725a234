"""Rows that do not fit the memory budget, worked on one range of their keys after another.

A table, or a grouping order, reads and writes memory in no order; over files it would wait for the disk at
every row. So rows are dealt out to many narrow ranges first (*parts*: of their hashes, or of their sorted
keys), in one pass from front to back: as many as the budget takes at a time are put in the order of their
parts and written to files (a *run* of rows). Then neighbouring parts of all runs together are taken back, as
many as fit, and are worked on in memory. Since canonical order is the order of hashes, and rows of a part
keep theirs, what is made part after part is what would have been made at once: the same rows, the same bits.

    PartedRows    rows by part, in files
    RangedFold    a fold of more keys than fit: rows and records in the order in which they came, by part
    in_ranges     rows in an order that compares only rows of a part

How it can go wrong: one part may be larger than the budget (a key that most rows have): it is worked on as it
is, in files. It is the Grace hash join's way: Kitsuregawa, Tanaka and Moto-oka, "Application of hash to data
base machine and its architecture", New Generation Computing 1983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.ordering import bucket_order
from iterreduce.columns.partition import partition_of
from iterreduce.columns.placement import Placement
from iterreduce.columns.ragged import Array
from iterreduce.columns.routing import New, new_column, take_into, take_rows
from iterreduce.columns.stores import Folded

PARTS = 4096  # of the hashes: narrow enough that data of a thousand budgets comes back in pieces that fit

PartOf = Callable[[Batch], Array]
Fresh = Callable[[], "Folder"]


def part_of_hash(rows: Batch, keys: Sequence[str]) -> Array:
    """The part, int32 ``(n,)``, of each row by the hash of its key; ascending hashes have ascending parts."""
    return partition_of(hash_keys(rows.select(*keys)), PARTS)


def row_bytes(rows: Batch) -> int:
    """About how many bytes a row takes; at least 1."""
    return max(1, rows.nbytes // max(1, len(rows)))


def slices(rows: Batch, most_bytes: int) -> Iterator[Batch]:
    """The rows in pieces of about so many bytes."""
    step = max(1, most_bytes // row_bytes(rows))
    for lo in range(0, len(rows), step):
        yield rows.slice(lo, lo + step)


class PartedRows:
    """Rows in files, by part; rows of a part stand in the order in which they came.

    ``part_of``: the part of each row, ints in ``[0, parts)``.
    """

    def __init__(self, part_of: PartOf, parts: int, place: Placement):
        self.part_of, self.parts, self.place = part_of, parts, place
        self.most_bytes = max(1, place.working_bytes // 2)
        self.counts = np.zeros(parts, np.int64)  # rows of each part
        self._runs: list[tuple[Batch, Array]] = []  # rows in the order of their parts, and where each begins
        self._waiting: list[Batch] = []
        self._waiting_bytes = 0

    def add(self, rows: Batch) -> None:
        """More rows, behind those before."""
        for piece in slices(rows, self.most_bytes):
            self._waiting.append(piece)
            self._waiting_bytes += len(piece) * row_bytes(rows)
            if self._waiting_bytes >= self.most_bytes:
                self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        rows = Batch.concat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting, self._waiting_bytes = [], 0
        order, counts = bucket_order(self.part_of(rows), self.parts)
        with self.place.filed():
            made = take_rows(rows, order, new_column)
        self._runs.append((made, np.concatenate([[0], np.cumsum(counts)])))
        self.counts += counts

    def settle(self) -> None:
        """There are no more rows."""
        self._write()

    @property
    def row_bytes(self) -> int:
        """About how many bytes a row takes."""
        return max((row_bytes(rows) for rows, _ in self._runs), default=1)

    def of(self, lo: int, hi: int) -> list[Batch]:
        """The rows of parts ``lo`` to ``hi``, run by run, sharing memory with the files."""
        found = [rows.slice(int(begins[lo]), int(begins[hi])) for rows, begins in self._runs]
        return [rows for rows in found if len(rows)]


def together(sizes: Array, most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring parts ``[lo, hi)`` of at most so much together, or one part alone.

    >>> list(together(np.array([3, 3, 9, 1]), 6))
    [(0, 2), (2, 3), (3, 4)]
    """
    lo, held = 0, 0
    for part, size in enumerate(sizes.tolist()):
        if part > lo and held + size > most:
            yield lo, part
            lo, held = part, 0
        held += size
    if len(sizes):
        yield lo, len(sizes)


def in_ranges(
    rows: Batch,
    part_of: PartOf,
    parts: int,
    order_of: Callable[[Batch], Array | None],
    place: Placement,
    new: New = new_column,
) -> Batch:
    """The rows in an order: part after part, and those of a part as ``order_of`` says (None: as they came).

    ``order_of`` may leave rows out. Fixed columns are arrays of ``new``.
    """
    parted = PartedRows(part_of, parts, place)
    parted.add(rows)
    parted.settle()
    schema, made, pieces = rows.schema, 0, []
    whole = all(field.kind == "fixed" for field in schema.values())
    out = {n: new(len(rows), f) for n, f in schema.items()} if whole else {}
    masks = {n: np.empty(len(rows), bool) for n, f in schema.items() if f.nullable} if whole else {}
    for lo, hi in together(parted.counts * parted.row_bytes, parted.most_bytes):
        found = parted.of(lo, hi)
        if not found:
            continue
        piece = Batch.concat(found)
        order = order_of(piece)
        if not whole:
            pieces.append(piece if order is None else piece.take(order))
            continue
        n = len(piece) if order is None else len(order)
        for name, column in out.items():
            _put(piece[name], order, column[made : made + n])
        for name, mask in masks.items():
            _put(piece._valid[name], order, mask[made : made + n])
        made += n
    if not whole:
        return Batch.concat(pieces) if pieces else rows.slice(0, 0)
    return Batch._trusted(
        {n: c[:made] for n, c in out.items()} if made < len(rows) else out,
        {n: m[:made] for n, m in masks.items()} if made < len(rows) else masks,
        made,
        schema,
    )


def _put(column: Array, order: Array | None, out: Array) -> None:
    if order is None:
        out[...] = column
    else:
        take_into(column, order, out)


class Folder(Protocol):
    """What a `RangedFold` folds a range in: a fold whose keys all fit."""

    def add(self, rows: Batch) -> None: ...
    def merge(self, part: Folded) -> None: ...
    def result(self) -> Folded: ...


class RangedFold:
    """A fold of more keys than fit: what comes is kept by part, and folded part by part in the end.

    ``keys``: key columns; ``reads``: all columns that a fold reads; ``key_bytes``: of a key in a table.
    """

    def __init__(self, keys: Sequence[str], reads: Sequence[str], key_bytes: int, place: Placement):
        self.keys, self.reads, self.key_bytes, self.place = tuple(keys), tuple(reads), key_bytes, place
        self._came: list[PartedRows | tuple[Folded, Array]] = []

    def add(self, rows: Batch) -> None:
        """Rows that hold the columns."""
        last = self._came[-1] if self._came else None
        if not isinstance(last, PartedRows):
            last = PartedRows(lambda rows: part_of_hash(rows, self.keys), PARTS, self.place)
            self._came.append(last)
        last.add(rows.select(*self.reads))

    def merge(self, part: Folded) -> None:
        """Records in canonical order; their memory must last until `result`."""
        if isinstance(self._came[-1] if self._came else None, PartedRows):
            self._came[-1].settle()  # type: ignore[union-attr]
        ends = np.arange(1, PARTS, dtype=np.uint64) << np.uint64(52)
        begins = np.concatenate([[0], np.searchsorted(part.hashes, ends), [len(part)]])
        self._came.append((part, begins))

    def result(self, fresh: Fresh) -> Folded:
        """All keys in canonical order with their records; ``fresh`` makes an empty fold."""
        counts = np.zeros(PARTS, np.int64)
        for came in self._came:
            if isinstance(came, PartedRows):
                came.settle()
                counts += came.counts
            else:
                counts += np.diff(came[1])
        made = []
        for lo, hi in together(counts * self.key_bytes, self.place.working_bytes // 2):
            if counts[lo:hi].any():
                made.append(self._folded(fresh(), lo, hi))
        return joined(made) if made else fresh().result()

    def _folded(self, fold: Folder, lo: int, hi: int) -> Folded:
        with self.place.kept():
            for came in self._came:
                if isinstance(came, PartedRows):
                    for rows in came.of(lo, hi):
                        fold.add(rows)
                else:
                    part, begins = came
                    fold.merge(part.slice(int(begins[lo]), int(begins[hi])))
        return fold.result()


def joined(parts: Sequence[Folded]) -> Folded:
    """Folds of ascending ranges, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    return Folded(
        np.concatenate([part.hashes for part in parts]),
        Batch.concat([part.keys for part in parts]),
        np.concatenate([part.records for part in parts]),
    )
