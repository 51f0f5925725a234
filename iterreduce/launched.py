"""What the launcher says of the ranks that it started: read from the environment, without MPI."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence


def _first_number(names: Sequence[str]) -> int | None:
    for name in names:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None


def launched_size() -> int | None:
    """How many ranks the launcher says it started; None without one. Asks the environment, not MPI.

    Slurm's word comes last: the daemons of an mpirun are a Slurm step of their own, with other numbers.
    SLURM_NTASKS is no sign: a batch script that starts no ranks has it too.
    """
    return _first_number(("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"))


def node_ranks() -> int | None:
    """How many of them the launcher started on this node; None where it does not say."""
    found = _first_number(("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"))
    return found if found is not None else _slurm_node_ranks()


def _slurm_node_ranks() -> int | None:
    """From SLURM_STEP_TASKS_PER_NODE, like "4(x2),3": 4, 4 and 3 ranks on three nodes."""
    node = os.environ.get("SLURM_NODEID", "")
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        ranks, _, repeat = part.rstrip(")").partition("(x")
        if not ranks.isdigit() or (repeat and not repeat.isdigit()):
            return None
        counts += [int(ranks)] * int(repeat or 1)
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def ranks_per_core() -> float:
    """How many ranks the launcher started on this node for each core that they may run on; 0 where it does
    not say.

    The cores are those of this process; where the launcher has bound it to some of its own, the launcher's.
    """
    ranks, cores = node_ranks(), os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        cores = cores | os.sched_getaffinity(os.getppid())
    return (ranks or 0) / len(cores)


def is_crowded() -> bool:
    """Whether the launcher started more ranks on this node than there are cores for them to run on."""
    return ranks_per_core() > 1
