"""Ranks of real MPI keep the contract of a group, also where arrays are too long for one call of MPI."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from iterreduce.collectives import Group, MpiGroup
from tests.collectives.contract import CHECKS
from tests.mpi.watchful import watchful

pytestmark = pytest.mark.mpi
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))

MOST_WORDS = 3


@pytest.fixture
def narrow_group() -> Iterator[Group]:
    """A group as if the limit of 2^31 - 1 words were 3."""
    from mpi4py import MPI

    group = MpiGroup(watchful(MPI.COMM_WORLD.Dup(), MOST_WORDS), max_words=MOST_WORDS)
    yield group
    group.free()


@each_check
def test_mpi_ranks(check: Callable[[Group], None], group: Group) -> None:
    check(group)


@each_check
def test_mpi_ranks_with_a_low_limit_on_counts(check: Callable[[Group], None], narrow_group: Group) -> None:
    check(narrow_group)
