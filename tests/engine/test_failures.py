"""Failures on threads as ranks: see `checks_failures` and `checks_other_failures`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine import checks_failures, checks_other_failures
from tests.engine.kit import Check

CHECKS = [*checks_failures.CHECKS, *checks_other_failures.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_failures(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)
