"""Tables written in place, and lookups, on real ranks: see `checks_writes` and `checks_lookup`."""

from __future__ import annotations

import pytest

from iterreduce.collectives import Group
from tests.engine import checks_joins, checks_lookup, checks_writes
from tests.engine.kit import Check

pytestmark = pytest.mark.mpi
CHECKS = [*checks_joins.CHECKS, *checks_lookup.CHECKS, *checks_writes.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_writes(check: Check, group: Group) -> None:
    check(group)
