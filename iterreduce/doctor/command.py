"""`python -m iterreduce doctor`.

`--sweep` removes MPI's shared memory that this user's killed ranks left on this node; segments that a process
has mapped stay. It starts no MPI.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from iterreduce.supervising.processes import sweep

USAGE = "usage: python -m iterreduce doctor --sweep"


def doctor(arguments: Sequence[str]) -> int:
    """Do what the arguments behind `doctor` say; returns the exit status."""
    if list(arguments) != ["--sweep"]:
        sys.stderr.write(f"{USAGE}\n")
        return 2
    sweep(since=0.0)
    return 0
