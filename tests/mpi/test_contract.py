"""Ranks of real MPI keep the contract of a group, also where arrays are too long for one call of MPI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from iterreduce.collectives import Group, MpiGroup
from tests.collectives.contract import CHECKS

pytestmark = pytest.mark.mpi
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))

MOST_WORDS = 3


def watchful(comm: Any) -> Any:
    """A communicator that takes no count and no displacement above MOST_WORDS."""
    from mpi4py import MPI

    def checking(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for message in (*args, *kwargs.values()):
                if isinstance(message, list):
                    parts = message[1] if isinstance(message[1], tuple) else ([message[1]],)
                    numbers = [number for part in parts for number in part]
                    assert max(numbers) <= MOST_WORDS, f"{name} with {numbers}"
            return getattr(MPI.Intracomm, name)(self, *args, **kwargs)

        return call

    moves = ("Allgather", "Allgatherv", "Alltoall", "Alltoallv", "Alltoallv_init", "Sendrecv")
    names = (*moves, "Allreduce", "Bcast")
    return type("Watchful", (MPI.Intracomm,), {name: checking(name) for name in names})(comm)


@pytest.fixture
def narrow_group() -> Iterator[Group]:
    """A group as if the limit of 2^31 - 1 words were 3."""
    from mpi4py import MPI

    group = MpiGroup(watchful(MPI.COMM_WORLD.Dup()), max_words=MOST_WORDS)
    yield group
    group.free()


@each_check
def test_mpi_ranks(check: Callable[[Group], None], group: Group) -> None:
    check(group)


@each_check
def test_mpi_ranks_with_a_low_limit_on_counts(check: Callable[[Group], None], narrow_group: Group) -> None:
    check(narrow_group)
