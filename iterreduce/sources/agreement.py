"""One outcome for all ranks: what every input and output does when something fails on some of them.

A file may be readable on one node and missing on another. Whoever works on files works through these two
functions, so that an error of any rank is raised on all of them, with the same text, and nobody waits for a
rank that has left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from iterreduce import errors
from iterreduce.columns.placement import explained
from iterreduce.errors import InputError, IterReduceError

if TYPE_CHECKING:
    from iterreduce.collectives import Group

T = TypeVar("T")


def agree(group: Group, work: Callable[[], T]) -> T:
    """Run local work on every rank; if it failed anywhere, the lowest failing rank's error is raised on all.

    Collective.

    The work itself must not communicate. Errors that are not this package's own become `InputError`.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = found if isinstance(found := explained(error), Exception) else error
    for told in group.allgather_bytes(_error_to_bytes(failure)):
        if told:
            raise _error_from_bytes(told) from failure
    return result  # type: ignore[return-value]


def root_decides(group: Group, work: Callable[[], Any]) -> Any:
    """Rank 0 does the work and tells all: the same JSON value, or the same error, on every rank.

    Collective.
    """
    told = b""
    failure: Exception | None = None
    if group.rank == 0:
        try:
            told = b"=" + json.dumps(work()).encode()
        except Exception as error:
            failure, told = error, _error_to_bytes(error)
    told = bytes(group.bcast_bytes(told if group.rank == 0 else None, root=0))
    if told[:1] == b"=":
        return json.loads(told[1:])
    raise _error_from_bytes(told) from failure


def _error_to_bytes(error: Exception | None) -> bytes:
    """The kind and text of an error; empty for none. Data only: nothing is pickled."""
    if error is None:
        return b""
    if isinstance(error, IterReduceError) and not isinstance(error, errors.UserCodeError):
        return json.dumps([type(error).__name__, str(error)]).encode()
    return json.dumps(["InputError", f"{type(error).__name__}: {error}"]).encode()


def _error_from_bytes(told: bytes) -> IterReduceError:
    kind, text = json.loads(bytes(told))
    return getattr(errors, kind, InputError)(text)
