"""Blocks, the `Source` protocol, and `load`: how rows that stand in files become one batch per rank.

Blocks are fixed by the data alone (row count, or file size), never by the number of ranks; a rank owns whole
ascending blocks. So the rows, and their order over the ranks, are the same on any number of ranks. This
module opens no file: formats do, and `Dataset` calls `load`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.sources.agreement import agree
from iterreduce.sources.asked import Bound, Peek

if TYPE_CHECKING:
    from iterreduce.collectives import Group

BLOCKS_WANTED = 1024
LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS = 256, 32768
LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES = 1 << 16, 1 << 22


def power_of_two(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()


def block_rows_for(rows: int) -> int:
    """Rows of a block: the next power of two above rows/1024, from 256 to 32768.

    >>> [block_rows_for(n) for n in (0, 1_000_000, 10**12)]
    [256, 1024, 32768]
    """
    return min(max(power_of_two(-(-rows // BLOCKS_WANTED)), LEAST_BLOCK_ROWS), MOST_BLOCK_ROWS)


def block_bytes_for(size: int) -> int:
    """Bytes of a block of text: the next power of two above size/1024, from 64 KiB to 4 MiB."""
    return min(max(power_of_two(-(-size // BLOCKS_WANTED)), LEAST_BLOCK_BYTES), MOST_BLOCK_BYTES)


@dataclass(frozen=True)
class Span:
    """Rows of a file that are read: the file, the first, how many; `number` of the first over all files."""

    file: int
    first: int
    rows: int
    number: int


@dataclass(frozen=True, eq=False)
class Blocks:
    """How a source is cut: `count` blocks and, for sources of known length, the rows at which they start.

    `starts`: int64 of shape ``(count + 1,)``, or None (text, before it is read). `rank_bounds`: the blocks of
    each rank where they cannot be dealt freely (rows that a rank already holds), int64 of shape ``(size +
    1,)``.
    """

    count: int
    starts: Array | None = None
    rank_bounds: Array | None = None

    @classmethod
    def of_rows(cls, rows: int, block_rows: int | None = None) -> Blocks:
        """Blocks of equal length; the last may be shorter. No rows, no blocks.

        >>> Blocks.of_rows(600).starts.tolist()
        [0, 256, 512, 600]
        """
        step = block_rows or block_rows_for(rows)
        count = -(-rows // step)
        return cls(count, np.minimum(np.arange(count + 1, dtype=np.int64) * step, rows))

    @classmethod
    def of_spans(cls, spans: Sequence[Span], rows: int, block_rows: int | None = None) -> Blocks:
        """The blocks of `rows` rows of which these ascending spans are left; without empty ones.

        >>> Blocks.of_spans([Span(0, 0, 100, 100), Span(0, 500, 50, 500)], 600).starts.tolist()
        [0, 100, 112, 150]
        """
        all_starts = cls.of_rows(rows, block_rows).starts
        assert all_starts is not None
        firsts = np.array([span.number for span in spans] or [0], np.int64)
        lengths = np.array([span.rows for span in spans] or [0], np.int64)
        before = np.concatenate([[0], np.cumsum(lengths)])
        at = np.maximum(np.searchsorted(firsts, all_starts, side="right") - 1, 0)
        starts = np.unique(before[at] + np.clip(all_starts - firsts[at], 0, lengths[at]))
        return cls(len(starts) - 1, starts)

    @property
    def rows(self) -> int | None:
        """Rows in all, or None where only reading tells."""
        return None if self.starts is None else int(self.starts[-1])

    def owned(self, rank: int, size: int) -> tuple[int, int]:
        """The blocks ``[lo, hi)`` of a rank.

        >>> Blocks(5).owned(1, 2)
        (2, 5)
        """
        if self.rank_bounds is not None:
            return int(self.rank_bounds[rank]), int(self.rank_bounds[rank + 1])
        return self.count * rank // size, self.count * (rank + 1) // size


class Source(Protocol):
    """Where rows come from. A constructor touches no file; `open` does, once, on all ranks together."""

    name: str
    schema: Schema
    token: str
    blocks: Blocks
    rereadable: bool

    @property
    def bytes_read(self) -> int:
        """Bytes of rows that this rank has read from files, or unpacked; without headers and footers."""

    @property
    def asked(self) -> str:
        """Which columns and rows are read, in words; "" for all: it tells one job's input from another's."""

    def open(self, group: Group) -> None:
        """Find the files, agree on schema and blocks. Collective. Errors are the same on all ranks."""

    def read(self, lo: int, hi: int) -> Batch:
        """The rows of blocks ``[lo, hi)``. Local; reads these blocks only."""

    def block_rows(self, lo: int, hi: int) -> Array:
        """Rows of each of the blocks ``[lo, hi)``, int64; for text, of a range that was just read. Local."""

    def columns(self, names: Sequence[str]) -> Source:
        """The same source with these columns only; called before `open`, which refuses wrong names.

        Other columns are not read, as far as the format allows, and nothing that is wrong in them is found.
        """

    def where(self, bounds: Sequence[Bound]) -> Source:
        """The same source, which may leave out rows for which one of the bounds is not true (see `asked`).

        A hint, given before `open`: rows that are no such rows may come, too, and have to be filtered. What
        is left out follows from the files and the bounds alone; row numbers count the rows that are left, and
        blocks hold what is left of the rows that they hold otherwise.
        """

    def peek(self) -> Peek | None:
        """The columns in order, each with its field, or None where only opening tells. Local.

        From headers, of the first of several files; never raises. None: it cannot be told now (no such file,
        a damaged one), and opening says why. Ranks may see different things before the source is open. A
        field that is not nullable holds no nulls anywhere (of `LocalSource`: on this rank).
        """

    def rows_hint(self) -> int | None:
        """About how many rows there are on all ranks, if headers tell. Local; never raises."""

    def bytes_hint(self) -> int | None:
        """Bytes of the files, as they lie there. Local; never raises."""

    def require_numeric(self, column: str) -> None:
        """Raise `InputError` if the column is not of numbers, naming its first offending cell where known."""


@dataclass(frozen=True)
class Loaded:
    """A rank's share: its rows, the global number of the first, all rows, and where its blocks start.

    `block_starts`: int64 of shape ``(own blocks + 1,)``, row numbers within `batch`. `rows_kept`: of these
    rows, those that were here before.
    """

    batch: Batch
    first_row: int
    rows_total: int
    block_starts: Array
    rows_kept: int = 0


class Kept(NamedTuple):
    """Blocks ``[lo, hi)`` that this rank has read before of a source with this token.

    Their rows and where each block starts, or None where they are not here any more.
    """

    token: str
    lo: int = 0
    hi: int = 0
    batch: Batch | None = None
    block_starts: Array | None = None

    def rows_of(self, lo: int, hi: int) -> tuple[Batch, Array]:
        """The rows of these of the blocks, and how many each has."""
        assert self.batch is not None and self.block_starts is not None
        starts = self.block_starts[lo - self.lo : hi - self.lo + 1]
        return self.batch.slice(int(starts[0]), int(starts[-1])), np.diff(starts)


def load(group: Group, source: Source, kept: Kept | None = None) -> Loaded:
    """Read this rank's blocks of an opened source, but for those that were kept.

    Collective.

    All ranks get batches of `source.schema`, those without rows too. Raises the same `InputError` on all
    ranks.
    """
    lo, hi = source.blocks.owned(group.rank, group.size)
    batch, sizes, rows_kept = agree(group, lambda: _blocks(source, lo, hi, kept))
    starts = np.zeros(hi - lo + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    release(source)
    rows = np.zeros(group.size, np.int64)
    rows[group.rank] = len(batch)
    group.allreduce(rows, "sum")
    first_row = int(rows[: group.rank].sum())
    check = getattr(source, "check", None)  # a wrapper that refuses some rows; the same on all ranks
    if check is not None:
        agree(group, lambda: check(batch, first_row))
    return Loaded(batch, first_row, int(rows.sum()), starts, rows_kept)


def _blocks(source: Source, lo: int, hi: int, kept: Kept | None) -> tuple[Batch, Array, int]:
    """The rows of blocks ``[lo, hi)``, how many each has, and how many rows were kept. Local."""

    def read(lo: int, hi: int) -> tuple[Batch, Array]:
        batch = of_schema(source.read(lo, hi), source.schema)
        return batch, source.block_rows(lo, hi)

    first, last = (lo, lo) if kept is None else (max(lo, kept.lo), min(hi, kept.hi))
    if kept is None or kept.batch is None or first >= last or kept.batch.schema != source.schema:
        return *read(lo, hi), 0
    own = kept.rows_of(first, last)
    parts = [read(lo, first)] if lo < first else []
    parts += [own, *([read(last, hi)] if last < hi else [])]
    full = [batch for batch, _ in parts if len(batch)] or [own[0]]
    return Batch.concat(full), np.concatenate([sizes for _, sizes in parts]), len(own[0])


PIECE_BYTES = 2 << 20  # of a stream: in cache, and few reads


def expected_bytes(source: Any, lo: int, hi: int) -> int:
    """Bytes that the rows of blocks ``[lo, hi)`` of an opened source will take.

    Texts count as long as their file is, and so do all rows where only reading tells how many there are.
    Local.
    """
    fields, count = source.schema.values(), max(1, source.blocks.count)
    fixed = sum(f.row_bytes + f.nullable for f in fields if f.kind == "fixed")
    starts = source.blocks.starts
    nbytes = 0 if starts is None else int(starts[hi] - starts[lo]) * fixed
    if starts is None or any(f.kind != "fixed" for f in fields):
        nbytes += file_bytes(source) * (hi - lo) // count
    return nbytes


def row_in_files(source: Any, row: int) -> int:
    """The number that a row has among all rows of the files, for messages: more than its own where rows
    before it were left out. Local.
    """
    while source is not None:
        if hasattr(source, "row_in_files"):
            return int(source.row_in_files(row))
        source = getattr(source, "source", None)
    return row


def file_bytes(source: Any) -> int:
    """Bytes of the files of an opened source; 0 for rows that came otherwise."""
    while source is not None:
        if hasattr(source, "files"):
            return int(sum(state.size for state in source.files))
        source = getattr(source, "source", None)
    return 0


class RowStream:
    """A rank's rows of an opened source in pieces of about 2 MB: read anew each time, never held as a whole.

    `rows`: how many the last pass brought; `seconds`: what reading took, in all passes.
    """

    def __init__(self, group: Group, source: Source):
        self.source, self.schema = source, source.schema
        self._lo, self._hi = source.blocks.owned(group.rank, group.size)
        self._checked = False
        self.rows, self.seconds = 0, 0.0

    @staticmethod
    def can_read(source: Source) -> bool:
        """Rows that a wrapper checks must know their numbers."""
        return source.blocks.starts is not None or not hasattr(source, "check")

    def pieces(self) -> Iterator[Batch]:
        """The rows, whole blocks at a time. Local."""
        held = expected_bytes(self.source, self._lo, self._hi)
        step = max(1, PIECE_BYTES * (self._hi - self._lo) // max(1, held))
        self.rows = 0
        for lo in range(self._lo, self._hi, step):
            batch = self._read(lo, min(lo + step, self._hi))
            self.rows += len(batch)
            yield batch
        self._checked = True

    def _read(self, lo: int, hi: int) -> Batch:
        started = time.perf_counter()
        batch = of_schema(self.source.read(lo, hi), self.schema)
        check, starts = getattr(self.source, "check", None), self.source.blocks.starts
        if check is not None and starts is not None and not self._checked:
            check(batch, int(starts[lo]))
        self.seconds += time.perf_counter() - started
        return batch


def release(source: Any) -> None:
    """Let a source, and those that it wraps, give back what only makes reading faster. Local."""
    while source is not None:
        getattr(source, "release", lambda: None)()
        source = getattr(source, "source", None)


def of_schema(batch: Batch, schema: Schema) -> Batch:
    """The batch with a mask on exactly the nullable columns, so that all ranks hold the same schema."""
    if len(batch) == 0:
        return Batch.empty(schema)
    masks = {n: batch.valid(n) for n in schema}
    wanted = {n: np.ones(len(batch), bool) for n, f in schema.items() if f.nullable and masks[n] is None}
    return batch.with_valid(**wanted) if wanted else batch


def bare(schema: Schema) -> Schema:
    """The schema without its nullable marks: what must agree before rows can stand in one column."""
    return Schema({n: Field(f.kind, f.dtype, f.shape) for n, f in schema.items()})


S = TypeVar("S")


def changed(thing: S, change: Callable[[S], None]) -> S:
    """A shallow copy with a change made to it: how an unopened source becomes another."""
    other = copy.copy(thing)
    change(other)
    return other


def first_nonfinite(batch: Batch, column: str) -> int | None:
    """The first row of a column that holds a NaN or an infinity, or None. Local.

    Reads the column once, in pieces that stay in cache; integer columns are finite.

    >>> first_nonfinite(Batch(x=np.array([[1.0, 2.0], [np.nan, 0.0]])), "x")
    1
    """
    values = batch[column]
    if isinstance(values, Ragged) or values.dtype.kind not in "fc":
        return None
    step = max(1, (1 << 18) // max(1, values[:1].nbytes))
    for lo in range(0, len(values), step):
        finite = np.isfinite(values[lo : lo + step])
        if not finite.all():
            return lo + int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
    return None
