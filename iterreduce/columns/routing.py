"""Where rows go: the owner of every row of some keys in one pass, the order to send them in, moves by number.

Owners are found in blocks that stay in the first-level cache: keys are hashed, compared with the first hash
of every rank's range (few ranks) or looked up by partition (many), and counted, without a branch that depends
on a key. Records are rows of equal width that hold the columns of a row side by side; they are written and
read through one strided view per column. Nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import hash_keys, is_word_column, key_words, mix
from iterreduce.columns.jit import kernel
from iterreduce.columns.ordering import bucket_order
from iterreduce.columns.partition import PartitionMap, partition_of
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.columns.threads import current

BLOCK = 2048  # hashes of a block: 16 KiB, half of the first-level cache
FEW = 8  # ranks up to which comparing with every range's first hash (vectorised) beats looking partitions up
FINEST = 4096  # buckets beyond which a pass over them leaves the second-level cache
GRAIN = 1 << 15  # rows to move that are worth a thread of their own: 50 us
HALF = np.uint64(32)

New = Callable[[int, Field], Array]


@kernel
def _compare(words: Any, mixed: Any, firsts: Any, dest: Any, counts: Any) -> None:
    """Owners by the number of ranges that begin at or below the hash; ``mixed``: words are hashes already."""
    block = np.empty(BLOCK, np.uint64)
    for lo in range(0, len(words), BLOCK):
        m = min(BLOCK, len(words) - lo)
        if mixed:
            block[:m] = words[lo : lo + m]
        else:
            for i in range(m):
                block[i] = mix(words[lo + i])
        part = dest[lo : lo + m]
        part[:] = 0
        for d in range(1, len(firsts)):
            first, above = firsts[d], 0
            for i in range(m):
                reached = block[i] >= first
                part[i] += np.uint8(reached)
                above += reached
            counts[d] += above
            counts[d - 1] -= above
    counts[0] += len(words)


@kernel
def _look_up(words: Any, mixed: Any, partitions: Any, owner_of: Any, dest: Any, counts: Any) -> None:
    """Owners by partition; four histograms, so that equal neighbours do not wait for each other."""
    block, four = np.empty(BLOCK, np.uint32), np.zeros((4, len(counts)), np.int64)
    for lo in range(0, len(words), BLOCK):
        m = min(BLOCK, len(words) - lo)
        for i in range(m):
            h = words[lo + i] if mixed else mix(words[lo + i])
            block[i] = ((h >> HALF) * partitions) >> HALF
        for i in range(m):
            owner = owner_of[block[i]]
            dest[lo + i] = owner
            four[i & 3, np.uint32(owner)] += 1
    for d in range(len(counts)):
        counts[d] += four[0, d] + four[1, d] + four[2, d] + four[3, d]


@kernel
def _place(dest: Any, ends: Any, order: Any) -> None:
    for i in range(len(dest)):
        d = np.uint64(dest[i])
        order[np.uint64(ends[d])] = i
        ends[d] += 1


@kernel
def _scatter(source: Any, place: Any, out: Any) -> None:
    for i in range(len(place)):
        out[np.uint64(place[i])] = source[i]


@kernel
def _scatter_rows(source: Any, place: Any, out: Any) -> None:
    width = np.uint64(source.shape[1])
    for i in range(len(place)):
        row = np.uint64(place[i])
        for k in range(width):
            out[row, k] = source[i, k]


@kernel
def _gather(source: Any, order: Any, out: Any) -> None:
    for i in range(len(order)):
        out[i] = source[np.uint64(order[i])]


@kernel
def _gather_rows(source: Any, order: Any, out: Any) -> None:
    width = np.uint64(out.shape[1])
    for i in range(len(order)):
        row = np.uint64(order[i])
        for k in range(width):
            out[i, k] = source[row, k]


class Scratch:
    """Memory for intermediate arrays, used again, by name: fresh pages cost more than the work in them."""

    def __init__(self) -> None:
        self._raw: dict[str, Array] = {}

    def array(self, name: str, rows: int, dtype: Any) -> Array:
        """An array ``(rows,)``, valid until the same name is asked for again; its contents are undefined."""
        nbytes = rows * np.dtype(dtype).itemsize
        raw = self._raw.get(name)
        if raw is None or not nbytes <= len(raw) <= 4 * nbytes + 4096:
            raw = self._raw[name] = np.empty(nbytes, np.uint8)
        return raw[:nbytes].view(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(raw.nbytes for raw in self._raw.values())


def owners(keys: Batch, partitions: PartitionMap, scratch: Scratch | None = None) -> tuple[Array, Array]:
    """The owner of each row, uint8 or uint16 ``(n,)``, and the rows of each rank, int64 ``(size,)``.

    With ``scratch`` the owners stand in it, under the name "owners".

    >>> dest, counts = owners(Batch(k=np.arange(100)), PartitionMap(8, 3))
    >>> dest.dtype, counts.tolist() == np.bincount(dest, minlength=3).tolist()
    (dtype('uint8'), True)
    """
    name, size = keys.names[0] if keys.names else "", partitions.size
    plain = len(keys.names) == 1 and keys.valid(name) is None and is_word_column(keys[name])
    words = key_words(keys[name]).view(np.uint64) if plain else hash_keys(keys)
    dtype = np.uint8 if size <= 256 else np.uint16 if size <= 1 << 16 else np.int32
    dest = (scratch or Scratch()).array("owners", len(words), dtype)
    counts = np.zeros(size, np.int64)
    if size <= FEW:
        _compare(words, not plain, partitions.hash_bounds, dest, counts)
    else:
        owner_of = partitions.owner_of_partitions(np.arange(partitions.partitions)).astype(dest.dtype)
        _look_up(words, not plain, np.uint64(partitions.partitions), owner_of, dest, counts)
    return dest, counts


def index_dtype(rows: int) -> type[np.signedinteger[Any]]:
    """int32 as long as that many rows can be numbered with it."""
    return np.int32 if rows < 2**31 else np.int64


def send_order(dest: Array, counts: Array, scratch: Scratch | None = None) -> Array:
    """Rows grouped by owner, in row order within each: int32 (int64 beyond 2^31 rows) ``(n,)``.

    With ``scratch`` the order stands in it, under the name "order".

    >>> send_order(np.array([1, 0, 1], np.uint8), np.array([1, 2])).tolist()
    [1, 0, 2]
    """
    order = (scratch or Scratch()).array("order", len(dest), index_dtype(len(dest)))
    _place(dest, np.cumsum(counts) - counts, order)
    return order


def fine_order(keys: Batch, partitions: PartitionMap) -> tuple[Array, Array]:
    """Rows grouped by owner and, within each, by partition: ``(order int64[n], rows per rank int64[size])``.

    Ascending partitions are ascending hashes, so whoever sorts such rows by hash moves each only within a
    stretch that fits the cache. With very many partitions rows are grouped by owner alone.
    """
    if partitions.partitions > FINEST:
        dest, counts = owners(keys, partitions)
        return send_order(dest, counts), counts
    order, rows = bucket_order(partition_of(hash_keys(keys), partitions.partitions), partitions.partitions)
    ends = np.concatenate([[0], np.cumsum(rows)])[partitions.bounds]
    return order, np.diff(ends)


def inverse(order: Array) -> Array:
    """The place of each row in an order, int32 where it fits.

    >>> inverse(np.array([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    place = np.empty(len(order), index_dtype(len(order)))
    place[order] = np.arange(len(order), dtype=place.dtype)
    return place


def as_units(rows: Array, unit: np.dtype[Any], per_row: int) -> Array:
    """The same memory as unsigned integers: ``(n,)``, or ``(n, per_row)``."""
    flat = np.ascontiguousarray(rows).reshape(-1).view(unit)
    return flat if per_row == 1 else flat.reshape(len(rows), per_row)


def scatter(source: Array, place: Array, out: Array) -> None:
    """``out[place] = source`` for rows of units, ``(n,)`` or ``(n, units)``; distinct places, not checked."""
    move, pool = (_scatter if source.ndim == 1 else _scatter_rows), current()
    pool.run(lambda lo, hi: move(source[lo:hi], place[lo:hi], out), pool.parts(len(place), GRAIN))


def gather(source: Array, order: Array, out: Array) -> None:
    """``out[:] = source[order]`` for rows of units; the order is not checked."""
    move, pool = (_gather if out.ndim == 1 else _gather_rows), current()
    pool.run(lambda lo, hi: move(source, order[lo:hi], out[lo:hi]), pool.parts(len(order), GRAIN))


def take_rows(rows: Batch, order: Array, new: New) -> Batch:
    """The rows in this order; fixed columns into arrays of ``new``.

    >>> take_rows(Batch(a=np.array([5, 6, 7])), np.array([2, 0]), new_column)["a"].tolist()
    [7, 5]
    """
    columns: dict[str, Any] = {}
    for name, field in rows.schema.items():
        column = rows[name]
        if isinstance(column, Ragged):
            columns[name] = column.take(order)
        else:
            columns[name] = take_into(column, order, new(len(order), field))
    valid = {n: rows._valid[n][order] for n in rows._valid}
    return Batch._trusted(columns, valid, len(order), rows.schema)


def take_into(column: Any, order: Array, out: Array) -> Array:
    """``out[:] = column[order]`` for a fixed column or mask and a contiguous ``out``, which is returned."""
    unit, per_row = unit_of(out.dtype.itemsize * math.prod(out.shape[1:]))
    if per_row and len(order):
        gather(as_units(column, unit, per_row), order, as_units(out, unit, per_row))
    return out


def unit_of(row_bytes: int) -> tuple[np.dtype[Any], int]:
    """The widest unsigned integer that divides a row, and how many of them a row is."""
    unit = next(u for u in (8, 4, 2, 1) if row_bytes % u == 0)
    return np.dtype(f"u{unit}"), row_bytes // unit


def new_column(rows: int, field: Field) -> Array:
    """An array for a fixed column."""
    return np.empty((rows, *field.shape), field.dtype)


@dataclass(frozen=True)
class Cell:
    """Where a column (or its mask) stands in a record: from byte ``offset`` on, ``per_row`` units."""

    name: str
    mask: bool
    unit: np.dtype[Any]
    per_row: int
    offset: int


class RecordLayout:
    """Fixed columns of a row side by side, ``width`` 8-byte words in all; a mask takes a byte.

    >>> layout = RecordLayout(Batch(a=np.zeros(1), b=np.zeros(1, np.int16), c=np.zeros(1, bool)).schema)
    >>> layout.width
    2
    """

    def __init__(self, schema: Mapping[str, Field]):
        self.schema = Schema(dict(schema))
        cells = [(n, False, *unit_of(f.row_bytes)) for n, f in schema.items() if f.row_bytes]
        cells += [(n, True, *unit_of(1)) for n, f in schema.items() if f.nullable]
        self.cells, at = [], 0
        for name, mask, unit, per_row in sorted(cells, key=lambda c: -c[2].itemsize):  # so each is aligned
            self.cells.append(Cell(name, mask, unit, per_row, at))
            at += unit.itemsize * per_row
        self.width = -(-at // 8)

    def fits(self, batch: Batch) -> bool:
        """Has the batch these columns, with nulls at most where the layout has room for a mask?"""
        for name, field in self.schema.items():
            column = batch._columns.get(name)
            if (
                not isinstance(column, np.ndarray)
                or column.dtype != field.dtype
                or column.shape[1:] != field.shape
            ):
                return False
            if name in batch._valid and not field.nullable:
                return False
        return True

    def views(self, words: Array) -> list[Array]:
        """One view per cell of a buffer of records, int64 words."""
        if not self.width:
            return []
        raw = words.view(np.uint8).reshape(-1, self.width * 8)
        return [_view(raw, cell) for cell in self.cells]

    def write(self, batch: Batch, place: Array, views: list[Array]) -> None:
        """Row ``i`` of the batch into record ``place[i]``."""
        for cell, view in zip(self.cells, views, strict=True):
            if cell.mask:
                mask = batch._valid.get(cell.name)
                column = np.ones(len(batch), bool) if mask is None else mask
            else:
                column = batch._columns[cell.name]
            scatter(as_units(column, cell.unit, cell.per_row), place, view)

    def read(
        self, views: list[Array], order: Array, new: New = new_column
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Columns and masks of the records in this order; columns are arrays of ``new``."""
        columns = {n: new(len(order), f) for n, f in self.schema.items()}
        valid = {n: np.empty(len(order), bool) for n, f in self.schema.items() if f.nullable}
        for cell, view in zip(self.cells, views, strict=True):
            out = valid[cell.name] if cell.mask else columns[cell.name]
            gather(view, order, as_units(out, cell.unit, cell.per_row))
        return columns, valid


def _view(raw: Array, cell: Cell) -> Array:
    cells = raw[:, cell.offset : cell.offset + cell.unit.itemsize * cell.per_row].view(cell.unit)
    if cell.per_row > 1:
        return cells
    column = cells[:, 0]
    return column.reshape(-1) if column.flags.c_contiguous else column
