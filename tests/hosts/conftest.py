"""Hosts for tests; where this machine cannot have any, they are skipped and say why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hosts.network import Network, why_not


@pytest.fixture(scope="session")
def _can_have_hosts() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def hosts(_can_have_hosts: None, tmp_path: Path) -> Iterator[Callable[[int], Network]]:
    """`hosts(3)`: a network of three hosts, for the time of the test."""
    with ExitStack() as stack:

        def begin(number: int) -> Network:
            folder = tmp_path / "network"
            folder.mkdir()
            return stack.enter_context(Network(folder, number))

        yield begin
