"""Conditions, carry, feeds and sinks on threads as ranks: see `checks_carry`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine import checks_carry
from tests.engine.kit import Check


@pytest.mark.parametrize(
    "check", checks_carry.CHECKS, ids=lambda check: check.__name__.removeprefix("check_")
)
def test_carry(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)
