"""Loops inside a body on threads as ranks: see `checks_nested` and `checks_nested_failures`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine import checks_nested, checks_nested_failures
from tests.engine.kit import Check

CHECKS = [*checks_nested.CHECKS, *checks_nested_failures.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_nested_loops(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)
