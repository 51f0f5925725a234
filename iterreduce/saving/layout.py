"""Where each rank's rows stand in the files of a checkpoint: a function of sizes that all ranks know.

Each column becomes one dataset or two (`Stream`), with the rows of a file's ranks behind each other in rank
order. Nothing here touches a disk or a group; HDF5 lays files out in memory (`image`), and equal layouts
share one image.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema
from iterreduce.saving.sparse import SparseFile
from iterreduce.storage import Dataset, hdf5_index, hdf5_lay_out

LENGTH = np.dtype(np.int64)
MASK = np.dtype(np.bool_)
# HDF5 knows 32 axes; rows of more are stored flat.
MOST_AXES = 31
# Longer names are cut, with a digest behind: HDF5's limit is 64 KiB, and people read these.
NAME_BYTES = 200


class Part(NamedTuple):
    """One dataset of a column: rows themselves, lengths and values of ragged ones, or validity."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one row, length, value or flag."""
        return self.dtype.itemsize * math.prod(self.shape)


def parts_of(field: Field) -> list[Part]:
    """The datasets of a column, in order.

    >>> [part.name for part in parts_of(Field("text", np.dtype("u1"), (), True))]
    ['lengths', 'values', 'valid']
    """
    if field.kind == "fixed":
        parts = [Part("rows", field.dtype, field.shape)]
    else:
        parts = [Part("lengths", LENGTH, ()), Part("values", field.dtype, ())]
    return [*parts, Part("valid", MASK, ())] if field.nullable else parts


class Stream(NamedTuple):
    """One dataset of a checkpoint: what the ranks write to it one behind the other."""

    table: str
    column: str
    part: Part

    @property
    def dataset(self) -> str:
        """Its name in HDF5: ``/tables/T/C``, ``/tables/T/C/lengths`` and ``values``, or ``/valid/T/C``."""
        place = f"{quoted(self.table)}/{quoted(self.column)}"
        if self.part.name == "valid":
            return f"/valid/{place}"
        return f"/tables/{place}" if self.part.name == "rows" else f"/tables/{place}/{self.part.name}"

    def stored(self, items: int) -> Dataset:
        """Name, shape and dtype of so many items in HDF5."""
        shape = self.part.shape
        shape = shape if len(shape) <= MOST_AXES else (math.prod(shape),)
        return self.dataset, (items, *shape), self.part.dtype


def streams_of(schemas: Mapping[str, Schema]) -> list[Stream]:
    """All datasets of these tables, in order."""
    return [
        Stream(table, column, part)
        for table, schema in schemas.items()
        for column, field in schema.items()
        for part in parts_of(field)
    ]


def quoted(name: str) -> str:
    """A table's or column's name as one step of an HDF5 path; "=" and two digits for what cannot stand there.

    >>> quoted("ranks by page"), quoted("a/b=c"), quoted("."), quoted("")
    ('ranks by page', 'a=2Fb=3Dc', '=2E', '=')
    """
    import hashlib

    safe = re.sub(r"[/=\\%\x00-\x1f\x7f]|^\.+$", lambda m: "".join(f"={ord(c):02X}" for c in m[0]), name)
    raw = safe.encode("utf-8", "backslashreplace")
    if len(raw) > NAME_BYTES:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        raw = raw[: NAME_BYTES - 20].decode("utf-8", "ignore").encode() + f"=~{digest}".encode()
    return raw.decode() or "="


# ---------------------------------------------------------------- which file holds what


@dataclass(frozen=True)
class Layout:
    """Which rank writes how many items of which stream to which file.

    ``items`` is int64 of shape ``(ranks, streams)``; ``file_of`` gives each rank's file, ``leaders`` the
    lowest rank of each file. A table that is everywhere has items of rank 0 only.
    """

    streams: tuple[Stream, ...]
    everywhere: tuple[bool, ...]
    items: Array
    file_of: tuple[int, ...]
    files: tuple[str, ...]

    @functools.cached_property
    def leaders(self) -> tuple[int, ...]:
        """The lowest rank of each file, which makes it."""
        return tuple(self.file_of.index(file) for file in range(len(self.files)))

    def ranks_of(self, file: int) -> list[int]:
        """The ranks that write to a file, in order."""
        return [rank for rank, theirs in enumerate(self.file_of) if theirs == file]

    @functools.cached_property
    def _before(self) -> Array:
        before = np.zeros_like(self.items)
        for file in range(len(self.files)):
            ranks = self.ranks_of(file)
            before[ranks[1:]] = np.cumsum(self.items[ranks], axis=0)[:-1]
        return before

    def first_item(self, rank: int, stream: int) -> int:
        """Where a rank's items begin within the dataset of its file."""
        return int(self._before[rank, stream])

    def items_in(self, file: int) -> list[int]:
        """Items of each stream in a file."""
        counts: list[int] = self.items[self.ranks_of(file)].sum(axis=0).tolist()
        return counts

    def datasets(self, file: int) -> list[tuple[int, Dataset]]:
        """The streams of a file and how they are stored: those of tables that are everywhere in the first
        only.
        """
        counts = self.items_in(file)
        return [
            (k, stream.stored(counts[k]))
            for k, stream in enumerate(self.streams)
            if file == 0 or not self.everywhere[k]
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all items of all ranks."""
        per_item = np.array([stream.part.item_bytes for stream in self.streams], np.int64)
        return int((self.items.sum(axis=0) * per_item).sum())


def file_numbers(hosts: Sequence[int], per_rank: bool) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Each rank's file, and the names of the files: one per host (in order of their lowest ranks) or rank.

    >>> file_numbers([7, 5, 7], per_rank=False)
    ((0, 1, 0), ('node-0000.h5', 'node-0001.h5'))
    """
    if per_rank:
        return tuple(range(len(hosts))), tuple(f"rank-{rank:04d}.h5" for rank in range(len(hosts)))
    numbers: dict[int, int] = {}
    file_of = tuple(numbers.setdefault(host, len(numbers)) for host in hosts)
    return file_of, tuple(f"node-{node:04d}.h5" for node in range(len(numbers)))


# ---------------------------------------------------------------- the files as HDF5 wants them


@dataclass(frozen=True)
class Image:
    """A file without its data: its size, where each dataset begins, and all bytes around the datasets."""

    nbytes: int
    offsets: tuple[int, ...]
    around: tuple[tuple[int, bytes], ...]


@functools.lru_cache(maxsize=4)
def image(datasets: tuple[Dataset, ...]) -> Image:
    """Lay out a file. A state whose sizes stay the same is laid out once."""
    memory = SparseFile()
    offsets = hdf5_lay_out(memory, datasets)
    lengths = [math.prod(shape) * dtype.itemsize for _, shape, dtype in datasets]
    gaps = gaps_between(list(zip(offsets, lengths, strict=True)), memory.size)
    around = tuple((at, bytes(memory.bytes_at(at, n))) for at, n in gaps)
    return Image(memory.size, tuple(offsets), around)


def gaps_between(taken: Sequence[tuple[int, int]], nbytes: int) -> list[tuple[int, int]]:
    """What lies between ranges (offset, length) of a file of `nbytes`. Raises ValueError where ranges overlap
    or leave the file.

    >>> gaps_between([(8, 4), (12, 0), (2, 3)], 20)
    [(0, 2), (5, 3), (12, 8)]
    """
    gaps, at = [], 0
    for offset, length in sorted(r for r in taken if r[1]):
        if offset < at or length < 0 or offset + length > nbytes:
            raise ValueError(f"bytes {offset} to {offset + length} overlap others, or end beyond {nbytes}")
        if offset > at:
            gaps.append((at, offset - at))
        at = offset + length
    return [*gaps, (at, nbytes - at)] if at < nbytes else gaps


def index_of(layout: Layout) -> bytes:
    """The HDF5 file through which each column is one dataset, in rank order."""
    inside = [layout.items_in(file) for file in range(len(layout.files))]
    datasets = []
    for k, stream in enumerate(layout.streams):
        parts, start = [], 0
        for rank, items in enumerate(layout.items[:, k].tolist()):
            if items and stream.part.item_bytes:
                file = layout.file_of[rank]
                parts.append((layout.files[file], inside[file][k], layout.first_item(rank, k), items, start))
            start += items
        datasets.append((stream.stored(start), parts))
    memory = SparseFile()
    hdf5_index(memory, datasets)
    return bytes(memory.bytes_at(0, memory.size))
