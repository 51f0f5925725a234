"""How ranks that are threads die, and how those that live agree to go on without them.

The twin of what MPI with user-level failure mitigation does: a collective with a dead rank in it ends with an
error, on all survivors or only on some (a rank may die when it has sent its words to a few of the others);
whoever heals ends the others' waiting; and an agreement has one outcome for all who live, whoever dies
meanwhile. Who speaks to it: `iterreduce.testing.threads`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from iterreduce.errors import IterReduceError, UsageError


class RankDied(IterReduceError):
    """A rank died, or a survivor has begun to heal: this collective will never be complete here."""


@dataclass(frozen=True)
class Death:
    """A rank, by the number that it began with, dies at its ``call``-th collective (from 1), of any group.

    ``heard_by``: those of its peers, by their first numbers, who get all that they wait for in that
    collective, because its words were on the way; to others it was lost. None: it died before.

    >>> Death(1, 10, (0,)).rank
    1
    """

    rank: int
    call: int
    heard_by: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 0 or self.call < 1:
            raise UsageError(f"{self}: wanted a rank, and a collective that is counted from 1")


@dataclass
class Deaths:
    """Who is to die, and how many collectives each has begun. Under the lock of the world."""

    planned: tuple[Death, ...] = ()
    _begun: dict[int, int] = field(default_factory=dict)

    def begin(self, rank: int) -> Death | None:
        """This rank begins a collective: is it its last?"""
        begun = self._begun[rank] = self._begun.get(rank, 0) + 1
        return next((death for death in self.planned if (death.rank, death.call) == (rank, begun)), None)

    def begun(self, rank: int) -> int:
        """How many collectives it has begun so far."""
        return self._begun.get(rank, 0)


class Agreement:
    """One agreement of a meeting: who said what, and, once it is reached, who lived then."""

    def __init__(self) -> None:
        self.said: dict[int, bool] = {}
        self.survivors: tuple[int, ...] | None = None
        self.fine = False
        self.members: list[int] | None = None  # with new ones for the lost; empty: there are none

    def settle(self, living: list[int], size: int) -> bool:
        """Is it reached? All who live have spoken."""
        if self.survivors is None and all(rank in self.said for rank in living):
            self.survivors = tuple(living)
            self.fine = len(living) == size and all(self.said.values())
        return self.survivors is not None
