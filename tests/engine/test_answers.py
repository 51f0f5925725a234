"""The stages on threads as ranks: see `checks_answers` and `checks_columns`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine import checks_answers, checks_columns
from tests.engine.kit import Check

CHECKS = [*checks_answers.CHECKS, *checks_columns.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_answers(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)
