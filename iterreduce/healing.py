"""How ranks of MPI go on without those that died: ULFM's revoke, agree and shrink, in an order that ends.

Open MPI 5 does it where its launcher was told (``mpirun --with-ft ulfm``); elsewhere the death of a rank ends
the job. A dead rank surfaces as an error of a collective, on some ranks sooner than on others, and on some
not at all. So whoever sees one revokes the communicator: every call of every rank on it ends, but for the two
that ULFM keeps working, `Agree` and `Shrink`. These must not meet each other. Hence the rule:

* leaving (`all_agree`) is an Agree of 1, healing begins with an Agree of 0: they are the same call;
* who sees 0, or an error, which is the same on all ranks, heals, and does not agree a second time.

Ranks may die while that goes on: an error of a step that makes the new communicator revokes it, and all begin
again from there. No communicator is made but by Shrink: Open MPI is known to crash where a death is reported
while a Dup is half done. Handles of the past are kept, not freed, since freeing waits for the dead.

`MPI` is handed in: `collectives` is the one module that imports it.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

#: What the launcher sets where it was told to go on without ranks that died.
_ENABLED = "OMPI_MCA_mpi_ft_enable"

#: Communicators and requests of the past. Never used; were they freed, MPI could write into freed memory.
_past: list[Any] = []


def is_tolerant(MPI: Any) -> bool:
    """Whether the death of a rank leaves the others alive, and MPI lets them go on."""
    told = os.environ.get(_ENABLED, "").lower() in ("1", "true", "yes")
    return told and MPI.get_vendor()[0] == "Open MPI" and hasattr(MPI.Comm, "Shrink")


def keep(*things: Any) -> None:
    """They belong to the past."""
    _past.extend(things)


def all_agree(MPI: Any, comm: Any) -> bool:
    """Whether all ranks are alive and leave; the same on all that live. Collective."""
    try:
        return bool(comm.Agree(1))
    except MPI.Exception:
        return False


def interrupt(MPI: Any, comm: Any, agreed: bool) -> None:
    """End every call of every rank on the communicator; `agreed`: all know already that they heal."""
    comm.Revoke()
    if not agreed:
        with contextlib.suppress(MPI.Exception):  # it says what is known: somebody died
            comm.Agree(0)


def survivors(MPI: Any, comm: Any) -> Any:
    """A communicator of the living, in their order, who all have it. Collective, and `interrupt` before."""
    while True:
        try:
            new = comm.Shrink()
            new.Set_errhandler(MPI.ERRORS_RETURN)
        except MPI.Exception:
            continue
        if all_agree(MPI, new):
            return new
        new.Revoke()
        keep(new)
        comm = new


def lost(MPI: Any, before: Any, after: Any) -> tuple[int, ...]:
    """The ranks of `before` that are not in `after`."""
    still = set(numbers(MPI, after, before))
    return tuple(rank for rank in range(before.Get_size()) if rank not in still)


def numbers(MPI: Any, comm: Any, among: Any) -> tuple[int, ...]:
    """The numbers that the ranks of a communicator have in another."""
    ours, theirs = comm.Get_group(), among.Get_group()
    found = MPI.Group.Translate_ranks(ours, list(range(ours.size)), theirs)
    ours.Free()
    theirs.Free()
    return tuple(found)


def is_own(MPI: Any, error: BaseException) -> bool:
    """Whether this error is this rank's own: not what the death of another makes of a call."""
    dead = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
    return not isinstance(error, MPI.Exception) or error.Get_error_class() not in dead
