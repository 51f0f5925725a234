"""Indexed rows on ranks as threads; see `checks_links`."""

from __future__ import annotations

import pytest

from iterreduce.testing import run_ranks
from tests.engine.checks_links import CHECKS


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", CHECKS)
def test_indexed_rows(name: str, size: int) -> None:
    run_ranks(size, CHECKS[name])
