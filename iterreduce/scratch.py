"""The scratch directory of a run: where arrays go that the memory budget has no room for.

`placement_for` makes the `Placement` of this rank, or none: without a budget, or without a directory, nothing
is ever put anywhere. All ranks have one or none has, but where whose arrays lie each knows for itself.

How it can go wrong: a directory in memory (tmpfs) takes from what the budget was to save, which is said once;
a full one is a `ScratchError` on all ranks, raised where the array was wanted (`placement.explained`), or
before anything is read, where files tell that it cannot do.
"""

from __future__ import annotations

import os
import warnings

from iterreduce.columns.placement import Placement, current
from iterreduce.errors import ScratchError, ScratchWarning
from iterreduce.group import Group
from iterreduce.options import NO_SCRATCH, Options, format_size
from iterreduce.sources.agreement import agree

IN_MEMORY = ("tmpfs", "ramfs")  # kinds of file systems
MOUNTS = "/proc/self/mounts"


def spills(options: Options) -> bool:
    """May a run with these options put arrays into files? The same on all ranks."""
    return options.memory_bytes is not None and options.scratch not in (None, NO_SCRATCH)


def placement_for(group: Group, options: Options) -> Placement | None:
    """Who places this rank's arrays; None without a budget or a directory. Collective.

    Raises `ScratchError` on all ranks where one cannot use its directory.
    """
    if not spills(options):
        return None
    directory, budget = os.path.abspath(str(options.scratch)), options.memory_bytes
    assert budget is not None
    around = current()
    if around is not None and (around.directory, around.budget_bytes) == (directory, budget):
        return around  # a run within a run

    def made() -> Placement:
        place = Placement(directory, budget, group.rank)
        if group.rank == 0 and kind_of(directory) in IN_MEMORY:  # agreed on: it may be taken for an error
            warnings.warn(
                f"the scratch directory {directory} is memory itself ({kind_of(directory)}): what goes there "
                "to keep to --memory takes memory all the same; name one on a disk of the node (--scratch)",
                ScratchWarning,
                stacklevel=2,
            )
        return place

    return agree(group, made)


def kind_of(directory: str, mounts: str = MOUNTS) -> str:
    """The kind of file system that holds a directory; "" where nobody says."""
    best, kind = "", ""
    try:
        with open(mounts, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                _, at, found = line.split()[:3]
                at = at.replace("\\040", " ")
                inside = os.path.realpath(directory).startswith(at.rstrip("/") + "/") or directory == at
                if inside and len(at) >= len(best):
                    best, kind = at, found
    except (OSError, ValueError):
        return ""
    return kind


def refuse_without_room(group: Group, what: str, nbytes: int, place: Placement) -> None:
    """Raise `ScratchError` on all ranks if budget and scratch directory together cannot hold this.
    Collective.
    """

    def look() -> None:
        beyond, free = nbytes - place.budget_bytes, place.free_bytes()
        if beyond > free:
            raise ScratchError(
                f"{what} needs at least {format_size(nbytes)} on rank {group.rank}; with a budget of "
                f"{format_size(place.budget_bytes)} (--memory), {format_size(beyond)} must go to the scratch "
                f"directory {place.directory}, where {format_size(free)} are free; name one with more "
                "room (--scratch), use more ranks on more nodes, or give a larger --memory"
            )

    agree(group, look)
