"""Failures on threads as ranks: see `checks_failures` and `checks_other_failures`."""

from __future__ import annotations

import pytest

from iterreduce.collectives import Group
from iterreduce.testing import run_ranks
from tests.engine import checks_failures, checks_other_failures
from tests.engine.checks_failures import BODY, Fault, Survivor, assert_tells, undisturbed
from tests.engine.kit import Check

CHECKS = [*checks_failures.CHECKS, *checks_other_failures.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_failures(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)


def test_one_of_64_ranks_fails_and_all_raise_its_error() -> None:
    """Many of them have no row; this one has. Afterwards all go on to the right end."""
    undisturbed()

    def check(group: Group) -> None:
        survivor = Survivor(group)
        for iteration, place in enumerate((BODY[0], BODY[4], BODY[5]), 2):
            fault = Fault(place, frozenset({38}), iteration)
            assert_tells(survivor.meet(fault), fault, group)
        survivor.end()

    run_ranks(64, check)
