"""The directory of one attempt, through which ranks and supervisor speak: small files of JSON.

    job.json      by the supervisor, before the launch: who it is, since when the job runs, which attempt
    launcher      by the supervisor: the launcher's process, once it is known
    stop          by the supervisor: why the ranks should save and stop
    iterated      by the ranks, when the first iteration begins
    living        by the ranks, when some have died and the others go on: which these are
    rank-3.json   by each rank when it begins: its host and process
    beat-3        by each rank, about once a second: what it did last; by its witness: that it is gone
    end-3         by each rank that leaves in order: its exit status
    .life-3       by each rank on the supervisor's machine: a pipe that it holds as long as it lives

A rank that left no end was killed, whatever the launcher's exit status says. The directory is private, lies
where all hosts see it, and is removed when the attempt is over: a rank that then still runs on another host
finds no place to write its beat, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from typing import Any

#: The attempt's directory, for the ranks. Processes of the job are known by it.
VARIABLE = "ITERREDUCE_SUPERVISED"

JOB, LAUNCHER, STOP, ITERATED, LIVING = "job.json", "launcher", "stop", "iterated", "living"
#: A file larger than this is none of ours.
MOST_BYTES = 100_000

_NAMES = re.compile(r"(rank|end|beat)-(\d{1,9})(?:\.json)?\Z")


def write(directory: str, name: str, facts: dict[str, Any]) -> None:
    """The whole file or nothing. Raises OSError."""
    draft = os.path.join(directory, f".{name}.{socket.gethostname()}.{os.getpid()}")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(facts, file)
    os.rename(draft, os.path.join(directory, name))


def read(directory: str, name: str) -> dict[str, Any]:
    """What stands there; nothing where it cannot be read yet."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(directory, name), "rb") as file:
        facts = json.loads(file.read(MOST_BYTES))
        if isinstance(facts, dict):
            return facts
    return {}


def hold_lifeline(directory: str, rank: int) -> None:
    """Hold the pipe until this process ends. Its files close before the launcher can know that it died, and
    so before that ends others: these pipes tell who died first, not the order in which processes are gone.
    """
    path = os.path.join(directory, f".life-{rank}")
    with contextlib.suppress(OSError):  # a file system without pipes
        os.mkfifo(path, 0o600)
        os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def lifeline(directory: str, rank: int) -> int | None:
    """A file that hangs up when the rank ends; None where it holds none."""
    with contextlib.suppress(OSError):
        return os.open(os.path.join(directory, f".life-{rank}"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return None


def ranks_with(directory: str) -> dict[str, set[int]]:
    """Of which ranks there is a `rank`, a `beat`, an `end`."""
    found: dict[str, set[int]] = {"rank": set(), "beat": set(), "end": set()}
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            if match := _NAMES.match(name):
                found[match[1]].add(int(match[2]))
    return found
