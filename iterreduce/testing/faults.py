"""Faults as values: what shall go wrong, on which rank, where. For tests of users' own loops as well.

    faults = Faults((Kill(rank=1, at="exchange.ready", iteration=3),))
    with striking(faults, events, group) as struck:
        dataset.run(comm, events, checkpoint_dir="saved")

A fault names the event at which it strikes (`iterreduce.events`: an event is also a place in the program). A
detail behind a colon narrows it, with `*` as a wildcard: "stage.start:lloyd: *", "checkpoint.step:rename".
Faults are data: the variable ITERREDUCE_TEST_FAULTS holds them as JSON for the ranks of a real launcher, and
nothing in it is ever run as code. With ranks as threads a `Kill` is `ThreadGroup.die`.

What a fault does is in `iterreduce.testing.strikes`, and in `iterreduce.testing.calls` where calls of the
operating system fail. This module only says what, where and when; it never does anything.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

import iterreduce.errors as errors
from iterreduce.errors import UsageError, did_you_mean
from iterreduce.events import EVENTS, Event
from iterreduce.options import FAULTS_VARIABLE

#: Fields that may stand behind the colon of a place, the first that an event has.
_DETAILS = ("step", "stage", "name", "what", "outcome", "reason")
#: Calls of the operating system that can be made to fail.
CALLS = ("open", "write", "pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "ftruncate", "pread")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """When something goes wrong. Each kind of fault says what.

    ``at``: the event, with a detail behind a colon. ``rank``: None is every rank, each on its own.
    ``iteration``: None is any. ``nth``: at the n-th such event of this process (from 1).
    """

    at: str
    rank: int | None = None
    iteration: int | None = None
    nth: int = 1

    def __post_init__(self) -> None:
        _check_types(self)
        event, colon, _ = self.at.partition(":")
        if event not in EVENTS:
            raise UsageError(f"{self._name}: there is no event {event!r}{did_you_mean(event, EVENTS)}")
        if colon and detail_of(event) is None:
            raise UsageError(
                f"{self._name}: {event} has no detail to compare; leave {self.at[len(event) :]!r} out"
            )
        if self.iteration is not None and "iteration" not in EVENTS[event][0]:
            raise UsageError(f"{self._name}: {event} tells no iteration; say which by nth")
        for name, least in (("rank", 0), ("iteration", 0), ("nth", 1)):
            self._at_least(name, least)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _at_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if value is not None and not value >= least:
            raise UsageError(f"{self._name}: {name} is {value}; wanted {least} or more")

    def is_at(self, event: Event) -> bool:
        """Is this the place?"""
        name, colon, detail = self.at.partition(":")
        if name != event.name or self.iteration not in (None, event.fields.get("iteration")):
            return False
        return not colon or fnmatchcase(str(event.fields.get(detail_of(name) or "")), detail)

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        told = {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}
        return f"{self._name}({', '.join(f'{name}={value!r}' for name, value in told.items())})"


@dataclass(frozen=True)
class Kill(Fault):
    """The process ends by a signal that it sends to itself; with ranks as threads, the rank dies.

    ``delay`` in seconds: not here, but that much later, wherever the process is then (not for threads).

    >>> Kill(at="stage.start:*Shuffle*", rank=1, iteration=3).signal
    'SIGKILL'
    """

    signal: str = "SIGKILL"
    delay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_signal(self._name, self.signal)
        self._at_least("delay", 0)


@dataclass(frozen=True)
class Stop(Fault):
    """The process is stopped (SIGSTOP); it goes on after ``seconds``, or (None) when it is sent SIGCONT."""

    seconds: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("seconds", 0)


@dataclass(frozen=True)
class Raise(Fault):
    """An exception: a name of Python's or of `iterreduce.errors`, or of an errno, such as ``"ENOSPC"``."""

    error: str = "RuntimeError"
    message: str = "raised by a fault"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.made()

    def made(self) -> BaseException:
        """The exception itself."""
        if self.error in errno.errorcode.values():
            return os_error(self.error)
        kind = _error_kinds().get(self.error)
        if kind is None:
            hint = did_you_mean(self.error, [*_error_kinds(), *errno.errorcode.values()])
            raise UsageError(f"Raise: no exception is called {self.error!r}{hint}")
        return kind(self.message)


@dataclass(frozen=True)
class Delay(Fault):
    """This rank is late, once: it sleeps here for ``seconds``."""

    seconds: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("seconds", 0)


@dataclass(frozen=True)
class Slow(Delay):
    """This rank is slow: it sleeps at the n-th place and, from then on, at each ``every``-th."""

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("every", 1)


# ------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class FileFault(Fault):
    """A file is damaged: of those that match ``path`` (`glob`) the last in order. Rank 0 does it.

    Choices that are left open (None) are made by the seed of the schedule.
    """

    path: str
    rank: int | None = field(default=0, kw_only=True)


@dataclass(frozen=True)
class TearFile(FileFault):
    """Only the first ``keep`` bytes stay; if negative, all but so many."""

    keep: int | None = None


@dataclass(frozen=True)
class FlipBit(FileFault):
    """One bit of one byte is turned over; a negative ``byte`` counts from the end."""

    byte: int | None = None
    bit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bit is not None and not 0 <= self.bit < 8:
            raise UsageError(f"FlipBit: bit is {self.bit}; wanted 0 to 7")


@dataclass(frozen=True)
class DeleteFile(FileFault):
    """The file is gone; a directory with all that is in it."""


# ------------------------------------------------------------------------------- calls


@dataclass(frozen=True)
class CallFault(Fault):
    """From this place on calls of Python's `os` fail for files that match ``path`` (`fnmatch`).

    For all of the process: with ranks as threads for all of them, so ``rank`` must be left out then. What is
    written by Python's own file objects or by HDF5 does not come here; see `LimitFileSize`.
    """

    at: str = field(default="run.start", kw_only=True)
    path: str = field(default="*", kw_only=True)


@dataclass(frozen=True)
class FailCall(CallFault):
    """Calls number ``first`` and following fail, ``times`` of them (None: all that come)."""

    call: str = "fsync"
    error: str = "EIO"
    first: int = 1
    times: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.call not in CALLS:
            raise UsageError(f"{self._name}: no call {self.call!r}; there are {', '.join(CALLS)}")
        if self.error not in errno.errorcode.values():
            hint = did_you_mean(self.error, errno.errorcode.values())
            raise UsageError(f"{self._name}: no errno is called {self.error!r}{hint}")
        self._at_least("first", 1)
        self._at_least("times", 1)


@dataclass(frozen=True)
class FailRename(FailCall):
    """Renaming fails."""

    call: str = "rename"


@dataclass(frozen=True)
class FillDisk(CallFault):
    """After ``free`` more bytes the disk is full, for good: a last short write, then ENOSPC.

    ``told``: whether the file system says beforehand how little is left (statvfs).
    """

    free: int = 0
    told: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("free", 0)


@dataclass(frozen=True)
class LimitFileSize(CallFault):
    """No file of this process may grow beyond ``size`` bytes: EFBIG from the operating system itself, in
    whatever library; until the process ends.
    """

    size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("size", 0)


KINDS: Mapping[str, type[Fault]] = {
    kind.__name__: kind
    for kind in (
        Kill, Stop, Raise, Delay, Slow, TearFile, FlipBit, DeleteFile,
        FailCall, FailRename, FillDisk, LimitFileSize,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Faults:
    """A schedule of faults. ``seed`` decides what they leave open.

    ``marks``: a directory that exists, where a fault leaves a mark before it strikes, so that it does not
    strike again in a later process, such as that of the next attempt.

    >>> faults = Faults((Kill(at="commit.start", rank=1, iteration=3),))
    >>> faults.to_json()
    '{"seed": 0, "faults": [{"fault": "Kill", "at": "commit.start", "rank": 1, "iteration": 3}]}'
    >>> Faults.from_json(faults.to_json()) == faults
    True
    """

    faults: tuple[Fault, ...] = ()
    seed: int = 0
    marks: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        for fault in self.faults:
            if type(fault) not in KINDS.values():
                raise UsageError(f"Faults: wanted faults such as Kill(at=...), got {fault!r}")

    def to_json(self) -> str:
        """As text, for ITERREDUCE_TEST_FAULTS; what has its default is left out."""
        told: dict[str, Any] = {"seed": self.seed}
        if self.marks is not None:
            told["marks"] = self.marks
        return json.dumps(told | {"faults": [_told(fault) for fault in self.faults]})

    @classmethod
    def from_json(cls, text: str) -> Faults:
        """From text; UsageError says what is wrong with it."""
        try:
            found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"faults: not the JSON of a schedule: {error}") from None
        given = _known(found, {"seed", "marks", "faults"}, "faults")
        made = given.get("faults", [])
        if not isinstance(made, list):
            raise UsageError(f"faults: wanted a list, got {made!r}")
        return cls(**{**given, "faults": tuple(_fault(entry) for entry in made)})

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Faults:
        """Those of ITERREDUCE_TEST_FAULTS; none where it is not set."""
        text = (os.environ if environment is None else environment).get(FAULTS_VARIABLE)
        try:
            return cls() if text is None else cls.from_json(text)
        except UsageError as error:
            raise UsageError(f"{FAULTS_VARIABLE}: {error}") from None


def detail_of(event: str) -> str | None:
    """The field of an event that the detail of a place is compared with."""
    return next((name for name in _DETAILS if name in EVENTS[event][0]), None)


def os_error(name: str, path: str | None = None) -> OSError:
    """As the operating system would say it."""
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), path)


def _error_kinds() -> dict[str, type[BaseException]]:
    """Exceptions that a text alone makes, by name."""
    import builtins

    ours = {
        n: k for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, errors.IterReduceError)
    }
    known = {n: k for n, k in vars(builtins).items() if isinstance(k, type) and issubclass(k, BaseException)}
    takes_more = (
        "UnicodeDecodeError",
        "UnicodeEncodeError",
        "UnicodeTranslateError",
        "StageError",
        "UserCodeError",
    )
    return {n: k for n, k in {**known, **ours}.items() if n not in takes_more and "Group" not in n}


def _told(fault: Fault) -> dict[str, Any]:
    given = {f.name: getattr(fault, f.name) for f in fields(fault) if getattr(fault, f.name) != f.default}
    return {"fault": type(fault).__name__, **given}


def _fault(entry: Any) -> Fault:
    given = dict(_known(entry, None, "a fault"))
    name = given.pop("fault", None)
    if name not in KINDS:
        raise UsageError(f"faults: there is no fault {name!r}{did_you_mean(str(name), KINDS)}")
    kind = KINDS[name]
    _known(given, {f.name for f in fields(kind)}, name)
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in given]
    if missing:
        raise UsageError(f"{name}: wanted {' and '.join(missing)}")
    return kind(**given)


def _known(given: Any, names: set[str] | None, what: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise UsageError(f"{what}: wanted an object, got {given!r}")
    for name in given:
        if names is not None and name not in names:
            raise UsageError(f"{what}: unknown field {name!r}{did_you_mean(name, names)}")
    return given


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} stands there twice")
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _check_types(value: Any) -> None:
    """Raise unless every field is of its type: data may come from anywhere."""
    hints = typing.get_type_hints(type(value))
    for f in fields(value):
        given, wanted = getattr(value, f.name), typing.get_args(hints[f.name]) or (hints[f.name],)
        if f.name == "faults":
            wanted = (tuple,)
        if float in wanted:
            wanted = (*wanted, int)
        if not isinstance(given, wanted) or (isinstance(given, bool) and bool not in wanted):
            names = " or ".join(kind.__name__.replace("NoneType", "None") for kind in wanted)
            raise UsageError(f"{type(value).__name__}: {f.name} is {given!r}; wanted {names}")


def _check_signal(what: str, name: str) -> None:
    names = [known.name for known in signal.Signals]
    if name not in names:
        raise UsageError(f"{what}: there is no signal {name!r}{did_you_mean(name, names)}")
