"""What the engine's checks find on ranks of one node they find on several, with exchanges through leaders."""

from __future__ import annotations

import pytest

from iterreduce.collectives import Group
from iterreduce.leaders import ALWAYS, SpreadGroup
from iterreduce.testing import run_ranks
from tests.engine import checks_lookup, checks_rows
from tests.engine.kit import Check

MODULES = (checks_lookup, checks_rows)
#: Where a window is the point.
ON_ONE_NODE = (
    checks_rows.check_rows_through_shared_memory_are_those_of_rounds,
    checks_rows.check_what_came_through_shared_memory_does_not_stay_in_it,
    checks_rows.check_a_rank_that_fails_while_it_writes_fails_alone_and_all_raise,
)
CHECKS = [check for module in MODULES for check in module.CHECKS if check not in ON_ONE_NODE]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_through_leaders(check: Check) -> None:
    def led(group: Group) -> None:
        assert isinstance(group, SpreadGroup)
        group.node_leaders = ALWAYS
        check(group)

    run_ranks(5, led, nodes=(0, 1, 1, 2, 0))
