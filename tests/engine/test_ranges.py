"""Rows routed by splitters, on threads as ranks: see `checks_ranges`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine import checks_ranges
from tests.engine.kit import Check


@pytest.mark.parametrize(
    "check", checks_ranges.CHECKS, ids=lambda check: check.__name__.removeprefix("check_")
)
def test_ranges(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)
