"""Meets the other ranks in MPI, in a child process: whatever MPI does, the one that asked can tell of it.

The child inherits the launcher's way to talk (variables and open files), reads this rank's facts, exchanges
them, looks at what only all can see (clocks, whether a directory is the same on all nodes), and writes what
it has found. MPI with the wrong launcher makes one-rank worlds, ends the process, or waits for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from iterreduce.doctor.facts import Facts
from iterreduce.supervising.processes import die_with_parent

CHILD = "--meet"
_PERSISTENT_LINES = 6


@dataclass(frozen=True)
class Meeting:
    """What came of it; `problem` says why it came to nothing."""

    size: int = 0
    rank: int = 0
    mpi: Mapping[str, Any] = field(default_factory=dict)
    facts: Sequence[Facts] = ()
    clocks: Sequence[float] = ()  # of the ranks, taken at one time
    sees: Sequence[bool] = ()  # whether they see a file that rank 0 made in the directory
    seconds: float = 0.0
    problem: str = ""


def meet(facts: Facts, directory: str | None, seconds: float) -> Meeting:
    """Ends within so many seconds, and a little."""
    child = subprocess.Popen(
        [sys.executable, "-m", "iterreduce", "doctor", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        close_fds=False,  # the launcher may have left one open to talk through
        preexec_fn=die_with_parent,
    )
    words = json.dumps([asdict(facts), directory]).encode()
    began = time.monotonic()
    try:
        out, err = child.communicate(words, timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=2)
        return Meeting(problem=f"after {seconds:g} s the ranks have not met in MPI", seconds=seconds)
    return _read(out, err, child.returncode, time.monotonic() - began)


def _read(out: bytes, err: bytes, status: int, seconds: float) -> Meeting:
    told = [line for line in out.splitlines() if line.startswith(b"{")]
    if told:
        found = json.loads(told[-1])
        if "problem" in found:
            return Meeting(problem=found["problem"], seconds=seconds)
        return Meeting(seconds=seconds, **found | {"facts": [Facts(**one) for one in found["facts"]]})
    last = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    words = "\n".join([f"MPI ended the process while it started ({how})", *last[-_PERSISTENT_LINES:]])
    return Meeting(problem=words, seconds=seconds)


def child() -> int:
    """The child's side. Collective."""
    facts, directory = json.loads(sys.stdin.buffer.read())
    from iterreduce import collectives
    from iterreduce.errors import LaunchError

    try:
        group = collectives.world(recovers=False)
    except LaunchError as error:
        _tell({"problem": str(error)})
        return 0
    everybody = [json.loads(told) for told in group.allgather_bytes(json.dumps(facts).encode())]
    group.allgather_bytes(b"")  # from here all go on together
    clocks = [json.loads(told) for told in group.allgather_bytes(json.dumps(time.time()).encode())]
    sees = _look_together(group, directory) if directory is not None else []
    found = {"size": group.size, "rank": group.rank, "mpi": collectives.description()}
    _tell({**found, "facts": everybody, "clocks": clocks, "sees": sees})
    return 0


def _look_together(group: Any, directory: str) -> list[bool]:
    """Rank 0 makes a file with a name that is nobody else's; the others look for it. Collective."""
    parent = directory if os.path.isdir(directory) else os.path.dirname(os.path.abspath(directory))
    name = os.path.join(parent, f".iterreduce-doctor-{os.getpid()}-{time.time_ns()}")
    name = group.bcast_bytes(name.encode()).decode()
    with contextlib.suppress(OSError):
        if group.rank == 0:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o600))
    group.allgather_bytes(b"")
    seen = [told == b"1" for told in group.allgather_bytes(b"1" if os.path.exists(name) else b"")]
    with contextlib.suppress(OSError):
        if group.rank == 0:
            os.unlink(name)
    return seen


def _tell(found: Mapping[str, Any]) -> None:
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
