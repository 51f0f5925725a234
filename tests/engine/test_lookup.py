"""Lookups, on threads as ranks: see `checks_lookup`, `checks_beside` and `checks_joins`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine import checks_beside, checks_joins, checks_lookup
from tests.engine.kit import Check


@pytest.mark.parametrize(
    "check",
    [*checks_lookup.CHECKS, *checks_beside.CHECKS, *checks_joins.CHECKS],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_lookups(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)
