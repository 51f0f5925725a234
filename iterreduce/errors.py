"""The words in which this package says that something went wrong.

    IterReduceError
    ├── UsageError (also a ValueError)   the caller gave wrong arguments
    │   └── SchemaError                  columns: names, dtypes, shapes, lengths
    │       └── AssumptionError          rows that a fast plan does not expect; a slower one may take them
    ├── InputError                       a file, or what stands in it
    ├── OutputError                      a result that cannot be written
    ├── CheckpointError                  a checkpoint directory that cannot be used, or gone on from
    │   ├── OtherJobError                it holds another job
    │   └── FinishedError                its job has ended already
    ├── DisagreementError                ranks hold different things
    ├── StageError                       an unexpected exception while a stage ran, the same on all ranks
    │   └── UserCodeError                it came out of the user's code
    ├── MemoryBudgetError                a loop that cannot fit its budget
    │   └── ScratchError                 the scratch directory cannot take what does not fit
    ├── RanksLost                        ranks died, and this group cannot go on without them
    ├── ScheduleError                    ranks met in different stages (found by ``--check``)
    └── LaunchError                      the launcher, or the start-up handshake

    CheckpointWarning (a UserWarning)    a checkpoint is damaged or could not be written; the job goes on
    ScratchWarning (a UserWarning)       the scratch directory is memory itself

Every message says what came, what was wanted and what to do. This module holds no policy: who raises
and who prints is decided elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class IterReduceError(Exception):
    """The root of this package's own errors.

    ``agreed``: all ranks raise it at the same place, with nothing under way between them.
    """

    agreed = False


def at(where: str) -> str:
    """The line of a program, where it is known, as messages end with it.

    >>> "no such column" + at("app.py, line 12") + at("")
    'no such column (app.py, line 12)'
    """
    return f" ({where})" if where else ""


class UsageError(IterReduceError, ValueError):
    """The caller gave wrong arguments."""


class SchemaError(UsageError):
    """Columns that are missing, of another dtype or shape, or of unequal lengths."""


class AssumptionError(SchemaError):
    """Rows that are not what a fast plan takes for granted. Lazy datasets are planned anew, without that."""


class InputError(IterReduceError):
    """A file that is missing, torn, of another kind, or holds what it must not."""


class OutputError(IterReduceError):
    """A result that cannot be written; what stood there before still stands there."""


class CheckpointError(IterReduceError):
    """A checkpoint directory that holds another job, nothing that is whole, or that another run has taken."""


class OtherJobError(CheckpointError):
    """A checkpoint directory that holds another job: another loop, input or setting."""


class FinishedError(CheckpointError):
    """The job of this checkpoint directory has ended; ``facts``, where they are known, say how."""

    def __init__(self, text: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(text)
        self.facts = dict(facts or {})


class CheckpointWarning(UserWarning):
    """Said on rank 0, while the job goes on: a checkpoint that was damaged, or could not be written."""


class DisagreementError(IterReduceError):
    """Ranks that should hold the same thing hold different ones."""


class MemoryBudgetError(IterReduceError):
    """The memory budget cannot hold what the loop needs."""


class ScratchError(MemoryBudgetError):
    """The scratch directory cannot be used, or has no room for what the budget cannot hold."""


class ScratchWarning(UserWarning):
    """Said on rank 0, while the job goes on: the scratch directory is not what it should be."""


class ScheduleError(IterReduceError):
    """Ranks met in different stages: a defect of the engine, or a program that differs between ranks."""


class RanksLost(IterReduceError):
    """Ranks died, and those that live cannot go on by themselves.

    ``lost``: their ranks in the group. ``survivors``: how many live. ``position`` and ``tables``: of the last
    commit on this rank, where a `LoopRun` was under way: shares of this rank, those of the dead are gone.

    >>> print(RanksLost((2,), 3))
    rank 2 has died, 3 live; this communicator is the caller's: make one of those who live and run again
    """

    def __init__(
        self,
        lost: Sequence[int],
        survivors: int,
        position: Any = None,
        tables: Mapping[str, Any] | None = None,
        reason: str = "this communicator is the caller's: make one of those who live and run again",
    ) -> None:
        self.lost, self.survivors = tuple(lost), survivors
        self.position, self.tables = position, tables
        who = f"rank {lost[0]} has" if len(self.lost) == 1 else f"ranks {', '.join(map(str, lost))} have"
        super().__init__(f"{who if lost else 'ranks have'} died, {survivors} live; {reason}")


class LaunchError(IterReduceError):
    """The launcher and MPI do not agree, or a rank did not come."""


@dataclass(frozen=True)
class Failure:
    """Where the user's code failed: what all ranks learn of it.

    ``spoken``: it raised `UsageError` or `InputError` itself, so the message is for who runs the program.
    """

    rank: int
    host: str
    iteration: int
    stage: str
    kind: str
    message: str
    traceback: str
    user: bool = True
    ranks_failed: int = 1
    path: Sequence[int] = ()
    spoken: bool = False

    @property
    def where(self) -> str:
        """Rank, host, iteration (of an inner loop behind those done around it) and stage, in words."""
        iteration = ".".join(map(str, self.path)) or self.iteration
        return f"rank {self.rank} on {self.host}, iteration {iteration}, stage {self.stage}"


class StageError(IterReduceError):
    """An exception that ended a stage. The same error, with the same text, is raised on every rank.

    ``failure`` names rank, host, iteration, stage and the kind of the exception, and holds its traceback;
    on the rank where it happened ``__cause__`` is the original exception.
    """

    origin = ""

    def __init__(self, failure: Failure):
        self.failure = failure
        others = (
            f" ({failure.ranks_failed} ranks failed; the lowest is shown)" if failure.ranks_failed > 1 else ""
        )
        text = failure.traceback.rstrip() or f"{failure.kind}: {failure.message}"
        super().__init__(f"{failure.kind}{self.origin} on {failure.where}{others}\n{text}")


class InUserCode(Exception):
    """Carries an exception out of a user's function, to tell the engine whose it was; never leaves it."""

    def __init__(self, original: BaseException):
        super().__init__(type(original).__name__)
        self.original = original


class UserCodeError(StageError):
    """An exception of the user's code. The same error, with the same text, is raised on every rank."""

    origin = " in user code"


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A hint for a mistyped name, or nothing.

    >>> did_you_mean("tolerence", ["tolerance", "k"])
    '; did you mean "tolerance"?'
    >>> did_you_mean("zzz", ["k"])
    ''
    """
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
