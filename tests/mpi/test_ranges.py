"""Rows routed by splitters, on real ranks: see `tests.engine.checks_ranges`."""

from __future__ import annotations

import pytest

from iterreduce.collectives import Group
from tests.engine import checks_ranges
from tests.engine.kit import Check

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize(
    "check", checks_ranges.CHECKS, ids=lambda check: check.__name__.removeprefix("check_")
)
def test_ranges(check: Check, group: Group) -> None:
    check(group)
