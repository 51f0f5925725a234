"""Writing one checkpoint, by all ranks at once, behind whatever the ranks do meanwhile.

`begin` and `Writing.gather` are collective and short: sizes, and later checksums, become known. Between them
every rank's thread writes its own rows to its node's file with `os.pwrite`, summing them up on the way; a
thread never communicates and never raises. Rank 0 then writes the index and the manifest, and renames the
directory: before that there is no checkpoint, after it there is a whole one.

HDF5 never sees the disk here (`layout.image`), so a full one is an OSError like any other.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from iterreduce.collectives import Group
from iterreduce.columns.checksum import checksum, partial
from iterreduce.columns.ragged import Array
from iterreduce.errors import CheckpointError, OutputError, UsageError
from iterreduce.saving.directory import Attempt, remove, write_whole
from iterreduce.saving.layout import Image, Stream, index_of
from iterreduce.saving.manifest import INDEX, MANIFEST, File, to_bytes
from iterreduce.saving.planning import Plan, Saved, manifest_of, planned
from iterreduce.saving.sealing import MOST_BYTES
from iterreduce.storage import pwrite_all, sync_directory

# Summed up, written, and begun to be put on the disk, one after the other; a multiple of 8. Small writes take
# small pages, and are slower by half and more.
CHUNK_BYTES = 32 << 20

At = Callable[[str], None]


def begin(
    group: Group,
    attempt: Attempt,
    number: int,
    tables: Mapping[str, Saved],
    facts: Mapping[str, Any],
    *,
    per_rank: bool = False,
    at: At = lambda step: None,
    host: str | None = None,
) -> Writing:
    """Make the files of checkpoint `number` and lay them out; nothing of the tables is written yet.

    Collective.

    Tables, their order and columns are the same on all ranks; `facts` (rank 0's are kept) is what JSON can
    say, else it is not published. Rows must not change until the writing is over. `at` is called with the
    names of steps, on whichever thread works. `host` is another name for this rank's node. Raises alike on
    all ranks: `OutputError` where the disk is full or refuses, `CheckpointError` where another run has taken
    over, `DisagreementError` for tables that differ.
    """
    plan, own = planned(group, attempt, number, tables, facts, per_rank, host)
    return Writing(plan, own, at)


# ---------------------------------------------------------------- one rank's bytes


def _chunks(saved: Saved, stream: Stream) -> Iterator[Array]:
    """A rank's bytes of a stream, uint8, contiguous, in pieces of a multiple of 8 bytes (but the last)."""
    column, part = saved.batch[stream.column], stream.part
    if part.name == "rows":
        yield from _chunks_of(column, part.item_bytes)
    elif part.name == "values":
        yield from _chunks_of(column.values[column.offsets[0] : column.offsets[-1]], part.item_bytes)
    elif part.name == "lengths":
        yield from _chunks_of_lengths(column.offsets)
    else:
        mask = saved.batch.valid(stream.column)
        yield from _chunks_of(np.ones(len(saved.batch), np.bool_) if mask is None else mask, 1)


def _chunks_of(array: Array, item_bytes: int) -> Iterator[Array]:
    if not array.size:
        return
    if array.flags.c_contiguous:
        raw = array.reshape(-1).view(np.uint8)
        for lo in range(0, len(raw), CHUNK_BYTES):
            yield raw[lo : lo + CHUNK_BYTES]
        return
    rows = max(8, CHUNK_BYTES // item_bytes // 8 * 8)
    for lo in range(0, len(array), rows):
        yield np.ascontiguousarray(array[lo : lo + rows]).reshape(-1).view(np.uint8)


def _chunks_of_lengths(offsets: Array) -> Iterator[Array]:
    rows = max(1, CHUNK_BYTES // 8)
    buffer = np.empty(min(rows, len(offsets) - 1), np.int64)
    for lo in range(0, len(offsets) - 1, rows):
        hi = min(lo + rows, len(offsets) - 1)
        yield np.subtract(offsets[lo + 1 : hi + 1], offsets[lo:hi], out=buffer[: hi - lo]).view(np.uint8)


def _start_writeback(handle: int, offset: int, nbytes: int) -> None:
    """Let the system put these bytes on the disk now, while more are made, and not only at `fsync`.

    Advice: where it is not known, or not taken, nothing but time is lost.
    """
    if hasattr(os, "posix_fadvise"):  # Linux begins to write what is not needed in memory any more
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _readable(name: str, raw: bytes) -> bytes:
    """Who reads takes no longer file for one of ours. Raises `OutputError`."""
    if len(raw) > MOST_BYTES:
        raise OutputError(f"{name} would have {len(raw)} bytes, more than the {MOST_BYTES} that are read")
    return raw


class _Abandoned(Exception):
    """The writing was abandoned meanwhile."""


class Writing:
    """One checkpoint under way. `state` is "writing", "written" or "failed" (then `error` says why).

    On rank 0, after `gather`, `published` is None until it is True, or False (then `error` says why).
    """

    def __init__(self, plan: Plan, own: Image | None, at: At):
        self.number = plan.number
        self.state = "writing"
        self.error: BaseException | None = None
        self.published: bool | None = None
        self.seconds = 0.0
        self._plan, self._own, self._at = plan, own, at
        self._thread: threading.Thread | None = None
        self._stop = False
        self._half_told = False
        layout, rank = plan.layout, plan.rank
        self._work = [
            (k, stream)
            for k, stream in enumerate(layout.streams)
            if layout.items[rank, k] and stream.part.item_bytes
        ]
        self.nbytes = sum(s.part.item_bytes * int(layout.items[rank, k]) for k, s in self._work)
        self._done = 0
        self._sums = np.zeros(len(layout.streams), np.uint64)

    def start(self) -> None:
        """Write on a thread of its own."""
        self._beside(f"checkpoint {self.number}", self.run)

    def _beside(self, name: str, work: Callable[..., None], *args: Any) -> None:
        """On a thread; at once where the system has none left, for the other ranks count on it."""
        thread = threading.Thread(target=work, args=args, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            work(*args)
        else:
            self._thread = thread

    def run(self) -> None:
        """Write now: checksums, bytes, fsync. Raises nothing: see `state`."""
        began = time.perf_counter()
        try:
            self._at("write")
            self._write()
        except BaseException as error:  # on a thread nobody would see it
            self.error, state = self._plan.attempt.explained(error), "failed"
        else:
            state = "written"
        self.seconds = time.perf_counter() - began
        self.state = state

    def _write(self) -> None:
        plan = self._plan
        layout, rank = plan.layout, plan.rank
        handle = os.open(plan.path(layout.files[layout.file_of[rank]]), os.O_WRONLY | os.O_CLOEXEC)
        try:
            for offset, raw in self._own.around if self._own is not None else ():
                pwrite_all(handle, np.frombuffer(raw, np.uint8), offset)
            for k, stream in self._work:
                self._write_stream(handle, k, stream)
            self._tell_half()
            self._at("sync")
            os.fsync(handle)
        finally:
            os.close(handle)

    def _write_stream(self, handle: int, k: int, stream: Stream) -> None:
        plan = self._plan
        start, at, total = plan.offset(plan.rank, k), 0, 0
        for chunk in _chunks(plan.tables[stream.table], stream):
            if self._stop:
                raise _Abandoned
            total += partial(chunk, at)
            pwrite_all(handle, chunk, start + at)
            if 2 * len(chunk) >= CHUNK_BYTES:  # what is less is soon there
                _start_writeback(handle, start + at, len(chunk))
            at += len(chunk)
            self._done += len(chunk)
            if 2 * self._done >= self.nbytes:
                self._tell_half()
        self._sums[k] = np.uint64(total % (1 << 64))

    def _tell_half(self) -> None:
        if not self._half_told:
            self._half_told = True
            self._at("write.half")

    # -- publishing ----------------------------------------------------------------------------------------

    def gather(self, blocking: bool = False) -> None:
        """Bring the checksums to rank 0, whose thread then publishes; `blocking`: before this returns.

        Collective.

        Only once every rank's `state` is "written".
        """
        if self.state != "written":
            raise CheckpointError(f"checkpoint {self.number} is not written, it is {self.state}")
        group = self._plan.group
        self._join()
        sums = np.empty((group.size, len(self._sums) + 1), np.int64)
        around = checksum(b"".join(raw for _, raw in self._own.around)) if self._own is not None else 0
        mine = np.append(self._sums, np.uint64(around)).view(np.int64)
        group.allgather(mine, sums.reshape(-1))
        if group.rank == 0:
            told = sums.view(np.uint64)
            if blocking:
                self._publish(told)
            else:
                self._beside(f"publish {self.number}", self._publish, told)

    def _publish(self, told: Array) -> None:
        attempt = self._plan.attempt
        try:
            self._at("publish")
            self._write_manifest(told)
            self._at("rename")
            attempt.publish(self.number)
        except BaseException as error:
            self.error = attempt.explained(error)
            self.published = False
            return
        self.published = True
        try:
            self._at("published")
            attempt.drop_old()
        except BaseException as error:  # it is published all the same
            self.error = error

    def _write_manifest(self, told: Array) -> None:
        plan = self._plan
        raw = _readable(INDEX, index_of(plan.layout))
        write_whole(plan.path(INDEX), raw, durable=True)
        index = File(INDEX, len(raw), checksum(raw))
        try:
            text = to_bytes(manifest_of(plan, told, index))
        except (TypeError, ValueError) as error:
            raise UsageError(f"facts of a checkpoint: wanted what JSON can say ({error})") from None
        manifest = _readable(MANIFEST, text)
        write_whole(plan.path(MANIFEST), manifest, durable=True)
        sync_directory(plan.attempt.draft(self.number))

    def abandon(self) -> None:
        """Stop writing and remove what was written; what is published stays. Every rank calls it."""
        self._stop = True
        self._join()
        if self._plan.rank == 0 and not self.published:
            remove(self._plan.attempt.draft(self.number))

    def forsake(self) -> None:
        """Ranks have died: it goes no further, nobody waits, and the next attempt removes it."""
        self._stop = True

    def wait(self) -> None:
        """Until this rank's thread has ended: then it is written, or failed; on rank 0 published, or not."""
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
