"""How ranks come to know the same thing: what failed, which schema rows have.

Every function here is collective and is called only where all ranks have just seen, in the headers of one
exchange, that they must. What they raise, they raise on all ranks, and the communicator is clean.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import iterreduce.errors as errors
from iterreduce.collectives import Group
from iterreduce.columns.placement import explained
from iterreduce.columns.schema import Schema, difference, either_null, never_null
from iterreduce.errors import (
    DisagreementError,
    Failure,
    InputError,
    InUserCode,
    IterReduceError,
    StageError,
    UsageError,
    UserCodeError,
)
from iterreduce.exchange import FAILED, OK

T = TypeVar("T")
PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@dataclasses.dataclass(frozen=True)
class Caught:
    """A failure on this rank that the others do not know of yet."""

    failure: Failure
    original: BaseException


def caught(error: BaseException, stage: str, iteration: int, rank: int, path: tuple[int, ...] = ()) -> Caught:
    """What went wrong here, in a form that can travel."""
    user = isinstance(error, InUserCode)
    original = error.original if isinstance(error, InUserCode) else error
    known = explained(original)
    if known is not original:  # also of an array that the user's code wanted: it is no fault of theirs
        user, original = False, known
    expected = isinstance(original, IterReduceError) and not user
    spoken = user and _speaks_for_itself(original)
    text = "" if expected else _traceback(original, user)
    try:
        message = str(original)
    except BaseException:  # a text that fails must not keep this rank from the next collective
        message = "(an exception without a text)"
    kind = type(original).__name__
    if expected:  # a kind that all ranks know
        kind = next(c.__name__ for c in type(original).__mro__ if getattr(errors, c.__name__, None) is c)
    host = socket.gethostname()
    failure = Failure(rank, host, iteration, stage, kind, message, text, user, path=path, spoken=spoken)
    return Caught(failure, original)


def _speaks_for_itself(original: BaseException) -> bool:
    """Did the user's code itself raise one of our errors, as words for who runs it, and no call it made?"""
    trace = original.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is None or trace.tb_frame.f_code.co_filename.startswith(PACKAGE)
    return type(original) in (InputError, UsageError) and not ours


def _traceback(original: BaseException, user: bool) -> str:
    """The traceback from the user's function on; frames of this package around it say nothing to a user."""
    trace = original.__traceback__
    if user and trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    told = traceback.TracebackException(type(original), original, trace)
    if user and isinstance(original, IterReduceError):
        while len(told.stack) > 1 and told.stack[-1].filename.startswith(PACKAGE):
            told.stack.pop()
    return "".join(told.format())


def raise_agreed(group: Group, mine: Caught | None) -> NoReturn:
    """Gather all failures and raise the lowest rank's on every rank. Collective."""
    said = group.allgather_bytes(
        b"" if mine is None else json.dumps(dataclasses.asdict(mine.failure)).encode()
    )
    failures = [Failure(**json.loads(s)) for s in said if s]
    first = dataclasses.replace(failures[0], ranks_failed=len(failures))
    here = mine.original if mine is not None and mine.failure.rank == first.rank else None
    error = error_of(first)
    error.agreed = True
    raise error from here


def error_of(failure: Failure) -> IterReduceError:
    """The exception to raise for a failure that some rank reported."""
    known = getattr(errors, failure.kind, None)
    if failure.user:
        return UserCodeError(failure)
    if failure.traceback or not isinstance(known, type) or not issubclass(known, IterReduceError):
        return StageError(failure)
    return known(f"{failure.message} ({failure.where})")


def agreed_schema(group: Group, mine: Schema | None) -> Schema | None:
    """One schema for all ranks: theirs, with a column nullable where it is on any rank. Collective.

    None where no rank has one. Raises `DisagreementError` on all ranks where columns differ.
    """
    said = group.allgather_bytes(b"" if mine is None else mine.to_json().encode())
    known = [(rank, Schema.from_json(s.decode())) for rank, s in enumerate(said) if s]
    if not known:
        return None
    first_rank, merged = known[0]
    for rank, schema in known[1:]:
        unlike = difference(never_null(merged), never_null(schema))
        if unlike:
            raise DisagreementError(
                f"ranks {first_rank} and {rank} made different columns: {unlike} "
                f"(rank {first_rank}: {known[0][1].describe()}; rank {rank}: {schema.describe()}); make "
                "dtypes and shapes the same on all ranks"
            )
        merged = either_null(merged, schema)
    return merged


def settle_schemas(
    group: Group, guard: Guard, digests: list[int], mine: Schema | None, discover: Callable[[], Schema]
) -> tuple[Schema | None, bool]:
    """After an exchange whose headers held these schema digests (0: a rank without rows). Collective.

    Returns the schema that all ranks now share, and whether some rank must send again with it. ``discover``
    tells the schema of no rows, where no rank has any.
    """
    if not any(digests):
        mine = guard.run(discover)
    merged = agreed_schema(group, mine)
    again = merged is not None and any(d not in (0, merged.digest()) for d in digests)
    return merged, again


class Guard:
    """Runs a rank's own work so that a failure becomes a status to send, never a missed collective."""

    __slots__ = ("failure", "iteration", "path", "rank", "stage")

    def __init__(self, rank: int, iteration: int, path: tuple[int, ...] = ()):
        self.rank, self.iteration, self.path = rank, iteration, path
        self.stage = ""
        self.failure: Caught | None = None

    def run(self, work: Callable[..., T], *args: Any) -> T | None:
        """``work(*args)``, or None if it fails or something failed before."""
        if self.failure is not None:
            return None
        try:
            return work(*args)
        except BaseException as error:  # whatever it is, the other ranks are waiting in the next collective
            self.fail(error)
            return None

    def fail(self, error: BaseException) -> None:
        """This work has failed: the next header says so."""
        self.failure = caught(error, self.stage, self.iteration, self.rank, self.path)

    @property
    def status(self) -> int:
        """What the next header says."""
        return OK if self.failure is None else FAILED
