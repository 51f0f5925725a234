"""Loops on threads as ranks: see `checks_iterate` and `checks_programs`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine import checks_iterate, checks_programs
from tests.engine.kit import Check

CHECKS = [*checks_iterate.CHECKS, *checks_programs.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_iterate(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)
