"""New ranks of MPI for those that died: spawned, merged with the survivors, and given the lost numbers.

For the command line alone, which knows what a rank is started by; a caller's communicator cannot grow. It
begins when the survivors are a whole group again (`iterreduce.healing`), and either all of them get the
larger communicator, with the new ranks, or all of them go on as they are: what was half made is revoked,
which ends the new ranks, too. Whether it succeeded is agreed among the survivors first, since a new rank that
dies early may be seen by some of them only. A new rank that is not to be kills itself: whoever still waits
for it learns of it.

What nobody can promise: a process that is started and never comes keeps the survivors inside `Spawn`. A guard
of the command line ends the job then.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.healing import all_agree, keep
from iterreduce.words import Words, packed

#: The slots of the dead stay taken: where Slurm, or a file of hosts, says how many there are, none is left.
_MAP_BY = "node:OVERSUBSCRIBE"
#: What the launcher of Open MPI calls this rank's host, and the most bytes of a name.
_HOST, _NAME_BYTES = "PMIX_HOSTNAME", 256


@dataclass
class Refill:
    """How lost ranks are replaced, the same on all ranks. ``left``: how often still; ``next_name``: of those
    that the launcher never numbered; ``words``: start a rank that takes one of these names; ``around``: a
    context to do it in; ``failed`` is told when it cannot be done.
    """

    words: Callable[[Sequence[int]], Sequence[str]]
    left: int
    next_name: int
    job: str
    coming: Sequence[int] = ()  # the names of those that were started last
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    failed: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Charter:
    """What new ranks are told: who they are to be, and how far the group has come."""

    lost: tuple[int, ...]
    size: int
    epoch: int
    names: tuple[int, ...]  # of all ranks, as the launcher and this module number them
    left: int
    next_name: int
    job: str

    def pack(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def read(cls, text: bytes) -> Charter:
        told = json.loads(text)
        return cls(**{**told, "lost": tuple(told["lost"]), "names": tuple(told["names"])})

    def number(self, rank: int) -> int:
        """Of a rank of the merged communicator, where survivors come first."""
        survivors = [number for number in range(self.size) if number not in self.lost]
        return [*survivors, *self.lost][rank]


@dataclass(frozen=True)
class Filled:
    """The communicator with the new ranks, and what each of them told the others (``here``), row by row."""

    comm: Any
    told: Words
    charter: Charter


def refilled(MPI: Any, comm: Any, words: Sequence[str], charter: Charter, here: Words) -> Filled | None:
    """With as many new ranks as were lost; None, on all survivors, where it cannot be. Collective."""
    made: list[Any] = []
    found = None
    try:
        info = MPI.Info.Create({"wdir": os.getcwd(), "map_by": _MAP_BY, **_where(comm)})
        made.append(comm.Spawn(words[0], list(words[1:]), len(charter.lost), info, 0))
        info.Free()
        made.append(_tolerant(MPI, made[-1]).Merge(False))
        found = _settled(MPI, made[-1], charter, here, made)
    except MPI.Exception:
        _revoke(MPI, made)
    keep(*made)
    if found is not None and _all_have(MPI, comm, True):
        with contextlib.suppress(MPI.Exception):  # new ranks wait there, which can be ended, unlike Agree
            made[1].Barrier()
        if all_agree(MPI, found.comm):
            return found
    elif found is None:
        _all_have(MPI, comm, False)
    _revoke(MPI, made)
    return None


def _where(comm: Any) -> dict[str, str]:
    """On hosts of survivors: on one that has lost all its ranks a new one cannot join those on others, who
    would wait for it. Collective.
    """
    own = os.environ.get(_HOST, "").encode()
    names = np.zeros((comm.Get_size(), _NAME_BYTES), np.uint8)
    comm.Allgather(np.frombuffer(own[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"), np.uint8), names)
    found = dict.fromkeys(name.tobytes().rstrip(b"\0").decode() for name in names)
    return {} if "" in found else {"host": ",".join(found)}


def joined(MPI: Any, here: Words) -> Filled | None:
    """The same for a new rank; None where the others go on without it. Collective."""
    made: list[Any] = []
    try:
        made.append(_tolerant(MPI, MPI.Comm.Get_parent()).Merge(True))
        found = _settled(MPI, made[-1], None, here, made)
    except MPI.Exception:
        return None
    keep(*made)
    try:
        made[0].Barrier()
    except MPI.Exception:
        if made[0].Is_revoked():
            return None
    return found if all_agree(MPI, found.comm) else None


def _settled(MPI: Any, merged: Any, charter: Charter | None, here: Words, made: list[Any]) -> Filled:
    """With the lost numbers taken by new ranks, who learn what they have to know. Collective."""
    _tolerant(MPI, merged)
    words, length = packed(b"" if charter is None else charter.pack())
    head = np.array([length, len(words)])
    merged.Bcast(head, 0)
    words = words if charter is not None else np.empty(int(head[1]), np.int64)
    merged.Bcast(words, 0)
    charter = charter or Charter.read(words.tobytes()[: int(head[0])])
    new = _tolerant(MPI, merged.Split(0, charter.number(merged.Get_rank())))
    made.append(new)
    told = np.empty(new.Get_size() * len(here), np.int64)
    new.Allgather(here, told)
    return Filled(new, told, charter)


def _tolerant(MPI: Any, comm: Any) -> Any:
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    return comm


def _all_have(MPI: Any, comm: Any, good: bool) -> bool:
    """Whether all survivors say so. Collective."""
    try:
        return bool(comm.Agree(int(good)))
    except MPI.Exception:
        return False


def _revoke(MPI: Any, made: Sequence[Any]) -> None:
    for comm in made:
        with contextlib.suppress(MPI.Exception):
            comm.Revoke()
