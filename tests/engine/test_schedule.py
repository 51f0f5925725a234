"""The schedule law on threads as ranks: see `checks_schedule` and `checks_traffic`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine import checks_schedule, checks_traffic
from tests.engine.kit import Check

CHECKS = [*checks_schedule.CHECKS, *checks_traffic.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_schedule(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)
