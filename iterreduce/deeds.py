"""What the ranks of a group were asked to do so far: in which order, and what is left of it.

Survivors of a loss tell each other the numbers of their deeds (`iterreduce.recovery`). Where new ranks have
come and the program begins again (`iterreduce.epochs.Refilled`) all count anew, and a run leaves a `Legacy`
for the run of that program that is like it.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from typing import Any

from iterreduce.collectives import Group
from iterreduce.copies import Generation
from iterreduce.epochs import Refilled

#: A source: its loop, its name, and which of those it is that a loop of that name reads.
Place = tuple[str, str, int]


@dataclass
class Legacy:
    """What a run leaves. ``name``: which run of the program it was, and what it does; ``commits``: how far it
    came; ``held``: its copies, as far as they are this rank's; ``versions``: of the sources that it had read,
    by place.
    """

    name: list[Any]
    commits: int
    held: list[Generation]
    recoveries: list[dict[str, Any]]
    versions: dict[Place, str]


@dataclass
class Deeds:
    """Of one program. ``last``: the `iterreduce.recovery.LoopRun` that a caller drives; ``runs``: how many
    there were; ``legacy``: of the program that was before, on ranks that lived.
    """

    program: Refilled | None = None
    number: int = 0
    busy: bool = False
    last: Any = None
    runs: int = 0
    leaves: Legacy | None = None
    legacy: Legacy | None = None
    inherits: bool = False  # the same on all ranks


_all_deeds: weakref.WeakKeyDictionary[Group, Deeds] = weakref.WeakKeyDictionary()


def deeds_of(group: Group) -> Deeds:
    """Those of the program that runs now."""
    deeds = _all_deeds.setdefault(group, Deeds())
    if deeds.program is not group.refilled:
        leaves = deeds.leaves or deeds.legacy
        deeds = _all_deeds[group] = Deeds(group.refilled, legacy=leaves, inherits=True)
    return deeds


def numbered(group: Group) -> int:
    """Another run of the program: its number."""
    deeds = deeds_of(group)
    deeds.runs += 1
    return deeds.runs


def inherited(group: Group, name: list[Any]) -> dict[str, Any] | None:
    """What was left to this run, or to nobody: ``held`` says whether any rank has copies, ``mine`` are this
    one's. None where nothing is to be had, or another run is to have it. Collective.
    """
    deeds = deeds_of(group)
    if not deeds.inherits:
        return None
    mine, told = deeds.legacy, dict[str, Any]()
    if mine is not None:
        told = {"fits": mine.name == name, "commits": mine.commits, "held": bool(mine.held)}
        told["recoveries"] = mine.recoveries
    everybody = map(json.loads, group.allgather_bytes(json.dumps(told).encode()))
    heirs = [each for each in everybody if each]
    if not all(each["fits"] for each in heirs):
        return None
    deeds.inherits, deeds.legacy = False, None
    return {
        "held": any(each["held"] for each in heirs),
        "commits": max((each["commits"] for each in heirs), default=0),
        "recoveries": [*max((each["recoveries"] for each in heirs), key=len, default=[])],
        "mine": [] if mine is None else mine.held,
        "versions": {} if mine is None else mine.versions,
    }
