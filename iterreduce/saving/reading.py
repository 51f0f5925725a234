"""Finding the newest checkpoint that is whole, and reading rows of it: never by HDF5, always by the manifest.

`newest` proves that a checkpoint is what was written: sizes, the checksum of every piece and of the bytes
around them, shared among the ranks. `Checkpoint.read` then reads rows with `os.preadv`, on any number of
ranks. A checkpoint that is damaged anywhere is warned about and passed over, as if it were not there.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.checksum import checksum, finished, partial
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field
from iterreduce.errors import CheckpointError
from iterreduce.saving.directory import Attempt
from iterreduce.saving.manifest import MANIFEST, Manifest, Piece, TableInfo, from_bytes
from iterreduce.saving.sealing import Damaged, open_regular, read_small
from iterreduce.sources.agreement import root_decides

# One rank's share of a verification is cut into these; a multiple of 8.
TASK_BYTES = 16 << 20
CHUNK_BYTES = 1 << 20
# Bytes of a file outside of its pieces: HDF5's, some hundred for each dataset.
MOST_AROUND = 64 << 20


class Checkpoint:
    """A checkpoint on disk: what it says of itself, and its rows."""

    def __init__(self, path: str, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.attempt: Attempt | None = None  # that looked for it

    @property
    def number(self) -> int:
        """Its sequence number."""
        return self.manifest.number

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the engine wrote down beside the tables."""
        return self.manifest.facts

    @property
    def ranks(self) -> int:
        """How many ranks wrote it."""
        return self.manifest.ranks

    @property
    def tables(self) -> Mapping[str, TableInfo]:
        """Its tables by name."""
        return self.manifest.tables

    def bring(self, group: Group, table: str, lo: int, hi: int) -> None:
        """They lie on the disk, where every rank reads them. Local."""

    def read(self, table: str, lo: int, hi: int) -> Batch:
        """Rows `lo` to `hi` of a table, counted over all ranks that wrote it, in rank order. Local.

        Raises `CheckpointError` if they cannot be read, are not what they must be, or went with a run that
        has taken over meanwhile.
        """
        info = self.tables[table]
        if not 0 <= lo <= hi <= info.rows:
            raise CheckpointError(f'table "{table}" has {info.rows} rows, asked for {lo} to {hi}')
        try:
            with _Files(self.path, self.manifest) as files:
                spans = list(_spans(info.rank_rows, lo, hi))
                columns = {n: _column(files, info, n, f, spans) for n, f in info.schema.items()}
                valid = {n: _mask(files, info, n, spans) for n, f in info.schema.items() if f.nullable}
        except (Damaged, OSError) as damage:
            with contextlib.suppress(OSError):
                if self.attempt is not None:
                    self.attempt.check()
            raise CheckpointError(f"{self.path}: {damage}") from damage
        return Batch._trusted(columns, valid, hi - lo, info.schema)


# ---------------------------------------------------------------- rows


class _Span(NamedTuple):
    """Rows of one rank: `lo` to `hi` of its own."""

    rank: int
    lo: int
    hi: int


def _spans(rank_rows: tuple[int, ...], lo: int, hi: int) -> Iterator[_Span]:
    start = 0
    for rank, rows in enumerate(rank_rows):
        first, last = max(lo - start, 0), min(hi - start, rows)
        if first < last:
            yield _Span(rank, first, last)
        start += rows


def _column(files: _Files, info: TableInfo, name: str, field: Field, spans: list[_Span]) -> Any:
    rows = sum(span.hi - span.lo for span in spans)
    if field.kind == "fixed":
        out = np.empty((rows, *field.shape), field.dtype)
        row_bytes = field.dtype.itemsize * math.prod(field.shape)
        _fill(files, info.pieces[name, "rows"], spans, row_bytes, out)
        return out
    return _ragged(files, info, name, field, spans)


def _mask(files: _Files, info: TableInfo, name: str, spans: list[_Span]) -> Array:
    out = np.empty(sum(span.hi - span.lo for span in spans), np.uint8)
    _fill(files, info.pieces[name, "valid"], spans, 1, out)
    mask: Array = out != 0  # whatever stands there, a bool array holds 0 and 1
    return mask


def _fill(files: _Files, pieces: tuple[Piece, ...], spans: list[_Span], item_bytes: int, out: Array) -> None:
    raw = out.reshape(-1).view(np.uint8) if out.size else np.zeros(0, np.uint8)
    at = 0
    for span in spans:
        length = (span.hi - span.lo) * item_bytes
        files.read(pieces[span.rank], span.lo * item_bytes, raw[at : at + length])
        at += length


def _ragged(files: _Files, info: TableInfo, name: str, field: Field, spans: list[_Span]) -> Ragged:
    offsets = np.zeros(1 + sum(span.hi - span.lo for span in spans), np.int64)
    moves: list[_Span] = []
    at = 0
    for span in spans:
        ends = _ends(files, info.pieces[name, "lengths"], info.pieces[name, "values"], span, field)
        n = span.hi - span.lo
        first = int(ends[span.lo - 1]) if span.lo else 0
        offsets[at + 1 : at + n + 1] = ends[span.lo : span.hi] - (first - offsets[at])
        moves.append(_Span(span.rank, first, int(ends[span.hi - 1])))
        at += n
    values = np.empty(int(offsets[-1]), field.dtype)
    _fill(files, info.pieces[name, "values"], moves, field.dtype.itemsize, values)
    return Ragged(offsets, values, field.kind)  # type: ignore[arg-type]


def _ends(
    files: _Files, lengths: tuple[Piece, ...], values: tuple[Piece, ...], span: _Span, field: Field
) -> Array:
    """Where the first rows of a rank's piece, up to the span's end, end among its values."""
    found = np.empty(span.hi, np.int64)
    files.read(lengths[span.rank], 0, found.view(np.uint8))
    most = values[span.rank].nbytes // field.dtype.itemsize
    if found.min() < 0 or found.max() > most:
        raise Damaged("a row has a length that cannot be")
    ends = np.cumsum(found)
    if ends.min() < 0 or ends.max() > most:
        raise Damaged(f"rows have {int(ends.max())} values together, and {most} were written")
    return ends


class _Files:
    """The files of a checkpoint, opened when needed; all have the size that the manifest says."""

    def __init__(self, path: str, manifest: Manifest):
        self._path, self._manifest = path, manifest
        self._open: dict[int, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *failure: Any) -> None:
        for handle in self._open.values():
            with contextlib.suppress(OSError):
                os.close(handle)

    def _handle(self, file: int) -> int:
        if file not in self._open:
            what = self._manifest.files[file]
            try:
                self._open[file] = open_regular(os.path.join(self._path, what.name))
            except Damaged as damage:
                raise Damaged(f"{what.name}: {damage}") from None
            found = os.fstat(self._open[file]).st_size
            if found != what.nbytes:
                raise Damaged(f"{what.name} has {found} bytes, and {what.nbytes} were written")
        return self._open[file]

    def check(self, file: int) -> None:
        """Open it and compare its size. Raises `Damaged`."""
        self._handle(file)

    def read(self, piece: Piece, first: int, into: Array) -> None:
        """Bytes of a piece from `first` on, into uint8 ``(n,)``."""
        if first + len(into) > piece.nbytes:
            raise Damaged("rows lie beyond the end of their piece")
        self.read_at(piece.file, piece.offset + first, into)

    def read_at(self, file: int, offset: int, into: Array) -> None:
        """Bytes of a file from `offset` on. Raises `Damaged` or OSError."""
        handle, name = self._handle(file), self._manifest.files[file].name
        at = 0
        while at < len(into):
            try:
                got = os.preadv(handle, [into[at : at + (1 << 30)].data], offset + at)
            except OSError as error:
                raise Damaged(f"{name} cannot be read at byte {offset + at}: {error.strerror}") from error
            if not got:
                raise Damaged(f"{name} ends at byte {offset + at}")
            at += got


# ---------------------------------------------------------------- whether it is whole


def load(path: str) -> Checkpoint:
    """A checkpoint by its manifest; its files are not looked at. Raises `Damaged`."""
    return _parsed(path, _manifest_bytes(path))


def _manifest_bytes(path: str) -> bytes:
    try:
        return read_small(os.path.join(path, MANIFEST))
    except Damaged as damage:
        raise Damaged(f"{MANIFEST}: {damage}") from None


def _parsed(path: str, raw: bytes) -> Checkpoint:
    try:
        manifest = from_bytes(raw)
    except Damaged as damage:
        raise Damaged(f"{MANIFEST}: {damage}") from None
    if f"{manifest.number:012d}" != os.path.basename(path):
        raise Damaged(f"{MANIFEST} is that of checkpoint {manifest.number}")
    return Checkpoint(path, manifest)


class _Task(NamedTuple):
    """Bytes `lo` to `hi` of a piece."""

    number: int
    piece: Piece
    lo: int
    hi: int


def _tasks(pieces: list[Piece]) -> list[_Task]:
    return [
        _Task(number, piece, lo, min(lo + TASK_BYTES, piece.nbytes))
        for number, piece in enumerate(pieces)
        for lo in range(0, piece.nbytes, TASK_BYTES)
    ]


def verify(checkpoint: Checkpoint, share: int = 0, shares: int = 1) -> Array:
    """The sums, uint64, of all pieces, over this share of their bytes: shares add up. Local.

    Every share also looks at the files that it reads; the first one at all of them and what is around their
    pieces. Raises `Damaged`.
    """
    pieces = checkpoint.manifest.all_pieces()
    sums = np.zeros(len(pieces), np.uint64)
    with _Files(checkpoint.path, checkpoint.manifest) as files:
        if share == 0:
            _verify_around(checkpoint, files)
        tasks = _tasks(pieces)
        buffer = np.empty(CHUNK_BYTES, np.uint8)
        for task in tasks[len(tasks) * share // shares : len(tasks) * (share + 1) // shares]:
            for lo in range(task.lo, task.hi, CHUNK_BYTES):
                chunk = buffer[: min(CHUNK_BYTES, task.hi - lo)]
                files.read(task.piece, lo, chunk)
                sums[task.number : task.number + 1] += np.uint64(partial(chunk, lo))  # an array wraps around
    return sums


def _verify_around(checkpoint: Checkpoint, files: _Files) -> None:
    manifest = checkpoint.manifest
    for number, (file, gaps) in enumerate(zip(manifest.files, manifest.around(), strict=True)):
        files.check(number)
        if sum(length for _, length in gaps) > MOST_AROUND:
            raise Damaged(f"{file.name} has more bytes around its data than any that is written")
        found = []
        for offset, length in gaps:
            found.append(np.empty(length, np.uint8))
            files.read_at(number, offset, found[-1])
        if checksum(np.concatenate([np.zeros(0, np.uint8), *found])) != file.around:
            raise Damaged(f"{file.name}: its bytes outside of the data do not fit their checksum")
    _verify_index(checkpoint)


def _verify_index(checkpoint: Checkpoint) -> None:
    index = checkpoint.manifest.index
    try:
        raw = read_small(os.path.join(checkpoint.path, index.name))
    except Damaged as damage:
        raise Damaged(f"{index.name}: {damage}") from None
    if len(raw) != index.nbytes or checksum(raw) != index.around:
        raise Damaged(f"{index.name}: its bytes do not fit their checksum")


def check_sizes(checkpoint: Checkpoint) -> None:
    """Whether all files are there and have the sizes that the manifest says. Raises `Damaged`."""
    with _Files(checkpoint.path, checkpoint.manifest) as files:
        for number in range(len(checkpoint.manifest.files)):
            files.check(number)
    index = checkpoint.manifest.index
    try:
        found = os.stat(os.path.join(checkpoint.path, index.name), follow_symlinks=False).st_size
    except OSError as error:
        raise Damaged(f"{index.name}: {error.strerror}") from None
    if found != index.nbytes:
        raise Damaged(f"{index.name} has {found} bytes, and {index.nbytes} were written")


def compare(checkpoint: Checkpoint, sums: Array) -> None:
    """Whether the sums of all pieces fit the manifest. Raises `Damaged` for the first that does not."""
    manifest = checkpoint.manifest
    found = iter(sums.tolist())
    for table in manifest.tables.values():
        for (column, part), pieces in table.pieces.items():
            for rank, piece in enumerate(pieces):
                if finished(next(found), piece.nbytes) != piece.checksum:
                    raise Damaged(
                        f'{manifest.files[piece.file].name}: column "{column}" ({part}) of table '
                        f'"{table.name}", as rank {rank} wrote it, does not fit its checksum'
                    )


def newest(group: Group, attempt: Attempt, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if none was published.

    Collective.

    A bad one is warned about on rank 0, and the one before is tried. Raises `CheckpointError` on all ranks if
    there are some and all are bad, or if there were some and all are gone.
    """
    numbers: list[int] = root_decides(group, lambda: _listed(attempt, warn))
    bad: list[str] = []
    for number in numbers:
        path = attempt.place(number)
        found, reason = _whole(group, path)
        if found is not None:
            found.attempt = attempt
            return found
        root_decides(group, lambda: attempt.guarded(attempt.check))  # or has another run come meanwhile?
        attempt.bad.add(number)
        bad.append(f"{number}: {reason}")
        if group.rank == 0 and number != numbers[-1]:
            warn(f"checkpoint {path} is damaged, the one before it is tried ({reason})")
    if not bad:
        return None
    raise CheckpointError(
        f"no checkpoint in {attempt.directory} is whole ({'; '.join(bad)}); "
        "--fresh begins anew and removes them"
    )


def _listed(attempt: Attempt, warn: Callable[[str], None]) -> list[int]:
    """What is published, newest first, as far as nobody has removed it. Rank 0."""
    numbers, last = attempt.checkpoints(), attempt.history.published
    if last and not numbers:
        raise CheckpointError(
            f"{attempt.directory}: checkpoint {last} was published there, and none is there any more: they "
            f"were removed from {attempt.path}. Put them back, or --fresh (fresh=True) begins anew"
        )
    if numbers and numbers[0] < last:
        warn(f"checkpoint {attempt.place(last)} was removed, the one before it is tried")
    return numbers


def whole(group: Group, attempt: Attempt, number: int) -> Checkpoint:
    """The checkpoint of this number. Collective. Raises `CheckpointError` on all ranks unless it is whole."""
    found, reason = _whole(group, attempt.place(number))
    if found is None:
        raise CheckpointError(
            f"{attempt.place(number)} is needed and is damaged: {reason}; --fresh (fresh=True) begins anew"
        )
    found.attempt = attempt
    return found


def _whole(group: Group, path: str) -> tuple[Checkpoint | None, str]:
    """The checkpoint if all ranks find their share of it good, or why not. Collective."""
    checkpoint, reason = _told(group, path)
    if checkpoint is None:
        return None, reason
    sums, failed = np.zeros(len(checkpoint.manifest.all_pieces()), np.uint64), ""
    try:
        sums = verify(checkpoint, group.rank, group.size)
    except (Damaged, OSError, MemoryError) as damage:
        failed = str(damage) or type(damage).__name__
    reasons = [told.decode() for told in group.allgather_bytes(failed.encode()) if told]
    if len(sums):
        group.allreduce(sums.view(np.int64), "sum")
    if reasons:
        return None, reasons[0]
    try:
        compare(checkpoint, sums)
    except Damaged as damage:
        return None, str(damage)
    return checkpoint, ""


def _told(group: Group, path: str) -> tuple[Checkpoint | None, str]:
    """Rank 0's manifest, on all ranks. Collective."""
    told = b""
    if group.rank == 0:
        try:
            told = b"=" + _manifest_bytes(path)
            _parsed(path, told[1:])
        except Damaged as damage:
            told = b"!" + str(damage).encode("utf-8", "backslashreplace")
    told = group.bcast_bytes(told)
    if told[:1] == b"=":
        return _parsed(path, told[1:]), ""
    return None, told[1:].decode()
