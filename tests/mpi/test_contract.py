"""Ranks of real MPI keep the contract of a group, also where arrays are too long for one call of MPI."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from iterreduce.collectives import MAX_WORDS, Group, MpiGroup
from iterreduce.leaders import ALWAYS
from tests.collectives.contract import CHECKS, CHECKS_OF_NODES
from tests.mpi.watchful import watchful

pytestmark = pytest.mark.mpi


def name_of(check: Callable[[Group], None]) -> str:
    return check.__name__.removeprefix("check_")


each_check = pytest.mark.parametrize("check", CHECKS, ids=name_of)
each_check_of_nodes = pytest.mark.parametrize("check", CHECKS_OF_NODES, ids=name_of)

MOST_WORDS = 3


@pytest.fixture
def narrow_group() -> Iterator[Group]:
    """A group as if the limit of 2^31 - 1 words were 3."""
    from mpi4py import MPI

    group = MpiGroup(watchful(MPI.COMM_WORLD.Dup(), MOST_WORDS), max_words=MOST_WORDS)
    yield group
    group.free()


@pytest.fixture(params=[MAX_WORDS, MOST_WORDS])
def led_group(request: pytest.FixtureRequest) -> Iterator[Group]:
    """A group that believes that its last rank is on another node, with leaders."""
    from mpi4py import MPI

    most: int = request.param
    comm = MPI.COMM_WORLD.Dup()
    group = MpiGroup(comm if most == MAX_WORDS else watchful(comm, most), max_words=most)
    group.nodes, group.node_leaders = [int(rank == group.size - 1) for rank in range(group.size)], ALWAYS
    yield group
    group.free()


@each_check
def test_mpi_ranks(check: Callable[[Group], None], group: Group) -> None:
    check(group)


@each_check
def test_mpi_ranks_with_a_low_limit_on_counts(check: Callable[[Group], None], narrow_group: Group) -> None:
    check(narrow_group)


@each_check_of_nodes
def test_mpi_ranks_through_leaders(check: Callable[[Group], None], led_group: Group) -> None:
    check(led_group)
