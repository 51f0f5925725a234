"""The result on its way to a file: rows of all ranks, in rank order, to rank 0, which writes and publishes
it.

Rows travel in rounds of bounded size, so rank 0 never holds the whole. The file appears under its name when
it is complete and on the disk, or not at all. `rowwriter.py` is for data too large for one writer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.errors import OutputError
from iterreduce.sources.agreement import agree
from iterreduce.sources.local import agreed_schema
from iterreduce.sources.outputs import Output, open_output, output_suffix
from iterreduce.storage import replacing, temporary_beside, why_not_written

if TYPE_CHECKING:
    from iterreduce.collectives import Group

# Rows under way at a time, over all ranks.
ROUND_BYTES = 64 << 20


def write_result(
    group: Group,
    path: str | os.PathLike[str],
    batch: Batch,
    everywhere: bool = False,
    round_bytes: int = ROUND_BYTES,
) -> None:
    """Write the rows of all ranks, in rank order, to a file whose suffix says the format.

    Collective.

    `everywhere`: all ranks hold the same rows, and those of rank 0 are written. Raises the same error on all
    ranks: `OutputError` (then what stood at `path` still stands there, and no part of a file is left),
    `UsageError` for an unknown suffix, `DisagreementError` for ranks with different columns.

    >>> import tempfile
    >>> from iterreduce.collectives import SoloGroup
    >>> path = tempfile.mkdtemp() + "/ranks.csv"
    >>> write_result(SoloGroup(), path, Batch(page=np.arange(2), rank=np.array([0.25, 0.75])))
    >>> open(path).read()
    'page,rank\\n0,0.25\\n1,0.75\\n'
    """
    path = os.fspath(path)
    agree(group, lambda: output_suffix(path))
    if output_suffix(path) == ".npy":  # it holds no nulls: what may be null need not be
        batch = batch.without_idle_masks()
    schema = agreed_schema(group, batch)
    share = batch if not everywhere or group.rank == 0 else batch.slice(0, 0)
    share = share if len(share) else Batch.empty(schema)
    shares = _agree_shares(group, share, schema)
    with _FileAtRoot(group, path) as file:
        passes = file.open(schema, shares)
        for names in passes:
            for moves in _rounds(shares, round_bytes):
                file.write(_gather(group, share.select(*names), moves, Schema({n: schema[n] for n in names})))
        file.close()


@dataclass(frozen=True)
class Shares:
    """Of each rank: its rows and bytes; of all: the longest row of each ragged column, in bytes."""

    rows: list[int]
    bytes: list[int]
    widths: dict[str, int]


def _agree_shares(group: Group, share: Batch, schema: Schema) -> Shares:
    totals = np.zeros(2 * group.size, np.int64)
    totals[2 * group.rank : 2 * group.rank + 2] = len(share), share.nbytes
    group.allreduce(totals, "sum")
    ragged = [name for name, field in schema.items() if field.kind != "fixed"]
    longest = np.array([share[name].lengths.max(initial=0) for name in ragged], np.int64)
    if ragged:
        group.allreduce(longest, "max")
    return Shares(
        totals[::2].tolist(), totals[1::2].tolist(), dict(zip(ragged, longest.tolist(), strict=True))
    )


Move = tuple[int, int, int]  # rank, from row, to row


def _rounds(shares: Shares, round_bytes: int) -> Iterator[list[Move]]:
    """Which rows of which ranks travel together, in rank order: about `round_bytes` at a time."""
    moves: list[Move] = []
    room = round_bytes
    for rank, (rows, size) in enumerate(zip(shares.rows, shares.bytes, strict=True)):
        row_bytes = max(1, size // max(1, rows))
        lo = 0
        while lo < rows:
            hi = min(rows, lo + max(1, room // row_bytes))
            moves.append((rank, lo, hi))
            room -= (hi - lo) * row_bytes
            lo = hi
            if lo < rows or room <= 0:
                yield moves
                moves, room = [], round_bytes
    if moves:
        yield moves


def _gather(group: Group, share: Batch, moves: list[Move], schema: Schema) -> list[Batch]:
    """The rows of one round, on rank 0, in order; nothing on the others. Collective."""
    own = [(lo, hi) for rank, lo, hi in moves if rank == group.rank]
    assert len(own) <= 1, "a rank has one piece in a round"
    if group.rank == 0:
        mine = [share.slice(*piece) for piece in own]
        return mine + _receive(group, [m for m in moves if m[0] != 0], schema)
    _send(group, _packed(share, *own[0], schema) if own else np.zeros(0, np.int64))
    return []


def _receive(group: Group, moves: list[Move], schema: Schema) -> list[Batch]:
    from iterreduce.columns.packing import unpack  # compiled code: not for those who only open a source

    counts = _agree_counts(group, 0)
    words = np.empty(int(counts.sum()), np.int64)
    none = [0] * group.size
    group.alltoallv(np.zeros(0, np.int64), none, None, words, counts.tolist(), None)
    ends = np.cumsum(counts)
    return [unpack(words[ends[r] - counts[r] : ends[r]], schema, hi - lo) for r, lo, hi in moves]


def _packed(share: Batch, lo: int, hi: int, schema: Schema) -> Array:
    from iterreduce.columns.packing import pack, packed_words

    words = np.empty(int(packed_words(share, None, np.array([lo, hi]), schema)[0]), np.int64)
    pack(share, None, lo, hi, words, 0, schema)
    return words


def _send(group: Group, words: Array) -> None:
    _agree_counts(group, len(words))
    send = [len(words)] + [0] * (group.size - 1)
    group.alltoallv(words, send, None, np.zeros(0, np.int64), [0] * group.size, None)


def _agree_counts(group: Group, words: int) -> Array:
    counts = np.zeros(group.size, np.int64)
    group.allgather(np.array([words], np.int64), counts)
    return counts


class _FileAtRoot:
    """The file on rank 0, and its errors on all ranks. Every method is Collective."""

    def __init__(self, group: Group, path: str):
        self._group, self._path = group, path
        self._stack = contextlib.ExitStack()
        self._output: Output | None = None

    def __enter__(self) -> _FileAtRoot:
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._output is not None:
            with contextlib.suppress(Exception):  # what went wrong is already on its way
                self._output.abandon()
        self._stack.__exit__(*failure)

    def _at_root(self, work: Callable[[], Any]) -> None:
        agree(self._group, lambda: self._named(work) if self._group.rank == 0 else None)

    def _named(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except (OSError, RuntimeError) as error:  # HDF5 says some system errors as RuntimeError
            raise OutputError(why_not_written(self._path, error)) from error

    def open(self, schema: Schema, shares: Shares) -> list[tuple[str, ...]]:
        """Open the temporary file; the passes that its format wants."""

        def work() -> None:
            check_room(self._path, sum(shares.bytes))
            temporary = self._stack.enter_context(replacing(self._path))
            self._output = open_output(temporary, self._path, schema, sum(shares.rows), shares.widths)

        self._at_root(work)
        per_column = output_suffix(self._path) == ".npz"
        return [(name,) for name in schema] if per_column else [tuple(schema)]

    def write(self, batches: list[Batch]) -> None:
        """Rows of a round."""
        output = self._output
        self._at_root(lambda: output.write(Batch.concat(batches)) if output else None)

    def close(self) -> None:
        """Finish and publish."""
        stack = self._stack.pop_all()

        def work() -> None:
            with stack:
                if self._output is not None:
                    self._output.close()
                    self._output = None

        self._at_root(work)


# ---------------------------------------------------------------- before the work


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse early what could only fail after hours: unknown suffix, missing directory, no permission, no
    space.

    Local: let rank 0 do it (``agree(group, lambda: check_output(path) if group.rank == 0 else None)``).
    Leaves nothing behind. Raises `UsageError` or `OutputError`.
    """
    path = os.fspath(path)
    if output_suffix(path) == ".parquet":
        from iterreduce.sources.parquet import pyarrow

        pyarrow()
    check_place(path)


def check_place(path: str) -> None:
    """The checks of `check_output` that any file needs, whatever its suffix."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise OutputError(f"{path} is a directory: wanted the name of a file in it")
    try:
        os.stat(directory)
        temporary = temporary_beside(path)
        try:
            with open(temporary, "wb") as file:
                file.write(bytes(4096))
        finally:
            os.unlink(temporary)
    except OSError as error:
        raise OutputError(why_not_written(path, error)) from error


def check_room(path: str, wanted_bytes: int) -> None:
    """Raise `OutputError` if the file system of `path` has less room than the rows need."""
    found = os.statvfs(os.path.dirname(os.path.abspath(path)))
    room = found.f_bavail * found.f_frsize
    if room < wanted_bytes:
        raise OutputError(
            f"{path}: the disk has {room >> 20} MiB left, the result needs about {wanted_bytes >> 20} MiB; "
            "free some space, or write elsewhere"
        )
