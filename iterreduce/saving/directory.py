"""A checkpoint directory: who may write to it, what stands in it, and who was there before.

There is one directory `attempt-000007` in it, and a run takes it over by renaming it to `attempt-000008`: one
wins, and every path that the run before still holds is gone. So nobody needs a lock, and an old attempt that
runs on beside its successor cannot publish, finish or note anything. What is written beside the names that
count begins with a dot, and the next attempt removes it.

Only rank 0 works on the disk here; an `Attempt` on another rank is a path and a number.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from iterreduce.collectives import Group
from iterreduce.errors import CheckpointError, OutputError
from iterreduce.saving.sealing import Damaged, read_sealed, sealed
from iterreduce.sources.agreement import root_decides
from iterreduce.storage import sync_directory, temporary_beside, why_not_written
from iterreduce.version import __version__

T = TypeVar("T")

FORMAT = 1
MARKER, HISTORY, FINISHED = "iterreduce.json", "attempts.json", "finished.json"
WRITING, FIRST = ".writing-", ".first-"
TAKEN = ".taken-over-"  # beside the attempt's directory: its run was alive when another one came
GOING = "fresh"  # stands there while all that was published is removed
_ATTEMPT = re.compile(r"attempt-(\d{6,18})\Z")
_CHECKPOINT = re.compile(r"(\d{12,18})\Z")
# Entries of the history beyond these are forgotten, oldest first: enough to learn from.
MOST_ENTRIES = 10_000
# How often a takeover is tried when others take over at the same moment.
MOST_TRIES = 100
ENDS = ("running", "interrupted", "taken over", "ended", "finished", "stopped", "failed")


@dataclass(frozen=True)
class Entry:
    """One attempt: when it began (Unix time), how long it ran, how far it came, and how it ended.

    ``end``: "running", "stopped", "failed", "ended" (the iterations, the results are still to be written),
    "finished", "interrupted", which its successor writes when it finds "running", or "taken over", once the
    run that was taken for dead has said that it is not. ``published``: the newest checkpoint that was ever
    published here, 0 for none; so a run knows that those it does not find were removed.
    """

    number: int
    host: str
    ranks: int
    started: float
    seconds: float = 0.0
    iteration: int = 0
    end: str = "running"
    published: int = 0


@dataclass(frozen=True)
class History:
    """The attempts in a directory, oldest first; on ranks other than 0 it is empty.

    >>> History((Entry(1, "a", 2, 0.0, 50.0, 7, "interrupted"), Entry(2, "a", 2, 90.0))).interrupts
    1
    """

    entries: tuple[Entry, ...] = ()

    @property
    def interrupts(self) -> int:
        """Attempts that were cut off: not those that finished, stopped, failed, or were taken over alive."""
        return sum(entry.end == "interrupted" for entry in self.entries)

    @property
    def total_seconds(self) -> float:
        """Run time of all attempts, as far as they noted it."""
        return sum(entry.seconds for entry in self.entries)

    @property
    def published(self) -> int:
        """Number of the newest checkpoint that was published, 0 for none since a fresh start."""
        return self.entries[-1].published if self.entries else 0


class Attempt:
    """This run's hold on a checkpoint directory.

    >>> import tempfile
    >>> from iterreduce.collectives import SoloGroup
    >>> place = tempfile.mkdtemp() + "/saved"
    >>> old = Attempt.open(SoloGroup(), place, fresh=False)
    >>> old.number, old.checkpoints(), old.finished
    (1, [], None)
    >>> new = Attempt.open(SoloGroup(), place, fresh=False)
    >>> new.number, [entry.end for entry in new.history.entries]
    (2, ['interrupted', 'running'])
    >>> old.note(iteration=1, seconds=2.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    iterreduce.errors.CheckpointError: another run has taken over ...
    """

    def __init__(
        self, directory: str, number: int, history: History | None = None, finished: Any = None
    ) -> None:
        self.directory, self.number = directory, number
        self.path = os.path.join(directory, f"attempt-{number:06d}")
        self.history = history or History()
        self.finished: dict[str, Any] | None = finished
        self.kept: int | None = None  # holds input that cannot be read again: it stays
        self.bad: set[int] = set()  # checkpoints found not to be whole: they do not count as kept
        self._entering = threading.Lock()  # what is published is entered by the thread that did so

    @classmethod
    def open(cls, group: Group, directory: str | os.PathLike[str], fresh: bool = False) -> Attempt:
        """Take over a directory, or make it (its parent exists).

        Collective.

        `fresh`: published checkpoints and the completion marker are removed, the history stays. Raises alike
        on all ranks: `CheckpointError` for a directory that holds something else, `OutputError` where the
        system refuses.
        """
        path = os.path.abspath(os.fspath(directory))
        opened: list[Attempt] = []

        def work() -> list[Any]:
            attempt = _opened(path, fresh, group.size)
            opened.append(attempt)
            return [path, attempt.number, attempt.finished]

        path, number, finished = root_decides(group, work)
        return opened[0] if opened else cls(path, number, finished=finished)

    def checkpoints(self) -> list[int]:
        """Numbers of what is published, newest first. Rank 0's listing. Raises `CheckpointError`."""
        return self.guarded(lambda: published_in(self.path))

    def place(self, number: int) -> str:
        """Where a checkpoint stands."""
        return os.path.join(self.path, f"{number:012d}")

    def draft(self, number: int) -> str:
        """Where a checkpoint is written before it is published."""
        return os.path.join(self.path, f"{WRITING}{number:012d}")

    def note(self, *, iteration: int, seconds: float, end: str = "running") -> None:
        """Rewrite this attempt's entry in the history. Rank 0.

        It does not wait for the disk, which may be busy with a checkpoint. Raises `CheckpointError` when
        another run has taken over, `OutputError` where the system refuses.
        """
        assert end in ENDS, end
        try:
            self._enter(iteration=iteration, seconds=seconds, end=end)
        except CheckpointError:
            self._say_taken_over()
            raise

    def _enter(self, **changes: Any) -> None:
        with self._entering:
            if not self.history.entries:  # rank 0 has died, and this is another one
                self.history = read_history(self.path)
            for last in self.history.entries[-1:]:
                self.history = History((*self.history.entries[:-1], replace(last, **changes)))
                self.guarded(lambda: _write_history(self.path, self.history))

    def _say_taken_over(self) -> None:
        """For the history, which is the successor's by now: this run was not cut off."""
        with contextlib.suppress(OSError):
            if max(attempts_in(self.directory), default=0) > self.number:  # else all of it was removed
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
                os.close(os.open(taken_mark(self.directory, self.number), flags, 0o666))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the completion marker. Rank 0. Raises as `note` does."""
        raw = sealed({"format": "iterreduce completion", "version": FORMAT, "facts": dict(facts)})
        self.guarded(lambda: write_whole(os.path.join(self.path, FINISHED), raw, durable=True))
        self.finished = dict(facts)
        history = self.history if self.history.entries else read_history(self.path)
        for last in history.entries[-1:]:
            with contextlib.suppress(OutputError):  # the marker stands
                self.note(iteration=last.iteration, seconds=last.seconds, end="finished")

    def publish(self, number: int) -> None:
        """Give a draft its name: the one moment at which it becomes a checkpoint. Rank 0."""
        self.check()
        os.rename(self.draft(number), self.place(number))
        sync_directory(self.path)
        with contextlib.suppress(CheckpointError, OutputError):  # `note` enters it with its own
            self._enter(published=number)

    def drop_old(self, keep: int = 2) -> None:
        """Remove all but the newest good ones. Rank 0. What cannot be removed stays."""
        with contextlib.suppress(OSError):
            numbers = [number for number in published_in(self.path) if number != self.kept]
            good = [number for number in numbers if number not in self.bad][:keep]
            for number in numbers:
                if number not in good and number < max(good, default=0):
                    remove(_set_aside(self.path, number))

    def check(self) -> None:
        """Raise `CheckpointError` if another run has taken over.

        The directory is listed anew: a network file system may remember the old name for a while.
        """
        names = os.listdir(self.directory)
        newest = max((int(m[1]) for m in map(_ATTEMPT.match, names) if m), default=None)
        if os.path.basename(self.path) not in names or (newest or 0) > self.number:
            if newest is None:
                raise CheckpointError(f"{self.path} has vanished; this run cannot save there any more")
            raise CheckpointError(
                f"another run has taken over {self.directory} (attempt {newest}); this one (attempt "
                f"{self.number}) cannot save there any more: let only one of them run"
            )

    def guarded(self, work: Callable[[], T]) -> T:
        """`work()`; an error of the system as ours, and said so where the directory was taken over."""
        try:
            return work()
        except OSError as error:
            raise self.explained(error) from error

    def explained(self, error: BaseException) -> BaseException:
        """The error to show for one that the system raised while this attempt wrote."""
        if not isinstance(error, OSError):
            return error
        try:
            self.check()
        except CheckpointError as taken:
            return taken
        except OSError:
            pass
        return OutputError(why_not_written(self.path, error))


# ---------------------------------------------------------------- taking over, on rank 0


def _opened(directory: str, fresh: bool, ranks: int) -> Attempt:
    try:
        _made(directory)
        attempt = Attempt(directory, _taken_over(directory))
    except OSError as error:
        raise OutputError(why_not_written(directory, error)) from error
    attempt.guarded(lambda: _settled(attempt, fresh, ranks))  # another run may come already
    return attempt


def _settled(attempt: Attempt, fresh: bool, ranks: int) -> None:
    """Clear up behind the attempt before, and enter this one into the history."""
    _cleared(attempt.path, fresh)
    before = read_history(attempt.path)
    last = max([before.published, *published_in(attempt.path)])  # its run may not have lived to enter it
    own = Entry(attempt.number, socket.gethostname(), ranks, time.time(), published=last)
    attempt.history = History((*before.entries[1 - MOST_ENTRIES :], own))
    _write_history(attempt.path, attempt.history)
    for entry in attempt.history.entries:
        if entry.end == "taken over":
            remove(taken_mark(attempt.directory, entry.number))
    attempt.finished = read_finished(attempt.path)


def _made(directory: str) -> None:
    """Make the directory, or see that it is ours; mark it."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is no directory: wanted one to save checkpoints in")
    if not is_ours(directory):
        raw = sealed({"format": "iterreduce checkpoints", "version": FORMAT, "written_by": __version__})
        write_whole(os.path.join(directory, MARKER), raw, durable=True)
        sync_directory(os.path.dirname(directory))


def is_ours(directory: str) -> bool:
    """Whether it is marked as a checkpoint directory; False if it is empty or has lost its mark.

    Raises `CheckpointError` if something else stands in it, or if a later version wrote it.
    """
    names = [name for name in os.listdir(directory) if not name.startswith(f".{MARKER}.")]
    if MARKER not in names:
        if names and not any(map(_ATTEMPT.match, names)):
            raise CheckpointError(
                f"{directory} holds other things ({', '.join(sorted(names)[:3])}): wanted an empty or new "
                "directory, or one in which checkpoints were saved"
            )
        return False
    try:
        version = _of_kind("iterreduce checkpoints", os.path.join(directory, MARKER)).get("version")
    except Damaged as damage:
        raise CheckpointError(
            f"{directory}/{MARKER}: {damage}; if this is a checkpoint directory, remove that file"
        ) from None
    if version != FORMAT:
        raise CheckpointError(
            f"{directory} was written in format {version!r}, and this version reads format {FORMAT}"
        )
    return True


def attempts_in(directory: str) -> list[int]:
    """The numbers of the attempt directories, lowest first; there is one, unless somebody copied them."""
    return sorted(int(m[1]) for m in map(_ATTEMPT.match, os.listdir(directory)) if m)


def _taken_over(directory: str) -> int:
    for _ in range(MOST_TRIES):
        number = max(attempts_in(directory), default=0)
        old, new = Attempt(directory, number).path, Attempt(directory, number + 1).path
        if os.path.isfile(old):
            raise CheckpointError(f"{old} is no directory: wanted those of earlier attempts alone")
        try:
            os.rename(old if number else _made_first(directory), new)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):  # another run was faster
                continue
            raise
        sync_directory(directory)
        found = attempts_in(directory)
        if number + 1 not in found or number + 1 == max(found):
            _drop_first(directory)
            return number + 1
        if not number:  # it came late with a first attempt: others had made theirs and gone on from it
            remove(new)  # (else a listing beside a rename had missed the newest)
    raise CheckpointError(f"{directory} is taken over by other runs all the time")


def _made_first(directory: str) -> str:
    """A directory to rename to that of the first attempt. It is not empty: nothing is renamed onto it."""
    first = tempfile.mkdtemp(prefix=FIRST, dir=directory)
    os.chmod(first, os.stat(directory).st_mode & 0o777)
    _write_history(first, History())
    return first


def _drop_first(directory: str) -> None:
    """Remove what runs left that were not the first, or were killed on the way."""
    for name in os.listdir(directory):
        if name.startswith(FIRST):
            remove(os.path.join(directory, name))


def _cleared(path: str, fresh: bool) -> None:
    """Remove what an attempt left that did not end; with `fresh` also what it published.

    A run that is killed in between leaves no job that is half there: the next one goes on to remove.
    """
    going = os.path.join(path, GOING)
    if fresh:
        os.close(os.open(going, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        sync_directory(path)
    if os.path.lexists(going):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, FINISHED))
        for number in published_in(path):
            _set_aside(path, number)
        sync_directory(path)
        _write_history(path, History(tuple(replace(e, published=0) for e in read_history(path).entries)))
        os.unlink(going)
    for name in os.listdir(path):
        if name.startswith("."):
            remove(os.path.join(path, name))


def _set_aside(path: str, number: int) -> str:
    """Where a checkpoint now stands that nobody finds any more: a run may be killed while it removes it."""
    aside = os.path.join(path, f".removed-{number:012d}-{os.urandom(4).hex()}")  # others may stay for ever
    os.rename(os.path.join(path, f"{number:012d}"), aside)
    return aside


def remove(path: str) -> None:
    """Remove a file or a directory; what cannot be removed stays."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def published_in(path: str) -> list[int]:
    """The numbers of published checkpoints, newest first."""
    with os.scandir(path) as entries:
        found = [m for m in (_CHECKPOINT.match(e.name) for e in entries) if m]
    return sorted((int(m[1]) for m in found if f"{int(m[1]):012d}" == m[0]), reverse=True)


# ---------------------------------------------------------------- its small files


def write_whole(path: str, raw: bytes, durable: bool) -> None:
    """A small file under its name, whole. `durable`: also after a crash of the machine."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(raw)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    if durable:
        sync_directory(os.path.dirname(path))


def _of_kind(kind: str, path: str) -> dict[str, Any]:
    """The facts in a file of this kind. Raises `Damaged`."""
    facts = read_sealed(path)
    if facts.get("format") != kind:
        raise Damaged(f"it is no file of {kind}")
    return facts


def _write_history(path: str, history: History) -> None:
    entries = [asdict(entry) for entry in history.entries]
    raw = sealed({"format": "iterreduce attempts", "version": FORMAT, "attempts": entries})
    write_whole(os.path.join(path, HISTORY), raw, durable=False)


def read_history(path: str) -> History:
    """The history in an attempt directory: those found running were interrupted, or taken over. Damaged:
    none.
    """
    try:
        found = entries_in(path)
    except Damaged:
        return History()
    return History(tuple(replace(e, end="interrupted") if e.end == "running" else e for e in found))


def taken_mark(directory: str, number: int) -> str:
    """The file that says of an attempt that it was taken over."""
    return os.path.join(directory, f"{TAKEN}{number:06d}")


def _marked(entry: Entry, directory: str) -> Entry:
    """The entry, of a run that has said since that it was taken over and not cut off."""
    cut_off = entry.end in ("running", "interrupted")
    taken = cut_off and os.path.lexists(taken_mark(directory, entry.number))
    return replace(entry, end="taken over") if taken else entry


def entries_in(path: str) -> list[Entry]:
    """The entries of the history in an attempt directory, as they stand there and as runs that were taken
    over have said since. Raises `Damaged`.
    """
    entries = _of_kind("iterreduce attempts", os.path.join(path, HISTORY)).get("attempts")
    if not isinstance(entries, list):
        raise Damaged("it is no history")
    try:
        return [_marked(_entry(e), os.path.dirname(path)) for e in entries[-MOST_ENTRIES:]]
    except (TypeError, ValueError) as error:
        raise Damaged(f"it is no history: {error}") from None


def _entry(facts: Any) -> Entry:
    """An entry out of JSON. Raises TypeError or ValueError."""
    entry = Entry(**facts)
    numbers = (entry.number, entry.ranks, entry.iteration, entry.published)
    times = (entry.started, entry.seconds)
    if any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise ValueError("a count")
    if any(type(t) not in (int, float) or not 0 <= t < 1e15 for t in times):
        raise ValueError("a time")
    if type(entry.host) is not str or entry.end not in ENDS:
        raise ValueError("an end")
    return entry


def read_finished(path: str) -> dict[str, Any] | None:
    """The facts in the completion marker; None if there is none that is whole."""
    try:
        return finished_in(path)
    except Damaged:
        return None


def finished_in(path: str) -> dict[str, Any] | None:
    """The facts in the completion marker; None if there is none. Raises `Damaged`."""
    place = os.path.join(path, FINISHED)
    if not os.path.lexists(place):
        return None
    facts = _of_kind("iterreduce completion", place).get("facts")
    if not isinstance(facts, dict):
        raise Damaged("it holds no facts")
    return facts
