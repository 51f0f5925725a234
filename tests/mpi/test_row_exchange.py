"""Whole rows through a shuffle, on real ranks: see `tests.engine.checks_rows`."""

from __future__ import annotations

import pytest

from iterreduce.collectives import Group
from tests.engine import checks_rows
from tests.engine.kit import Check

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("check", checks_rows.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_rows(check: Check, group: Group) -> None:
    check(group)
