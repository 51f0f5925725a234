"""Threads and one rank alone keep the contract of a group; MPI does in `tests/mpi`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from iterreduce.collectives import Group, SoloGroup
from iterreduce.testing import run_ranks
from tests.collectives.contract import CHECKS

each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))


@each_check
def test_ranks_as_threads(check: Callable[[Group], None], ranks: int) -> None:
    run_ranks(ranks, check)


@each_check
def test_one_rank_alone(check: Callable[[Group], None]) -> None:
    check(SoloGroup())
