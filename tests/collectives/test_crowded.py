"""Who waits without leaving its core to others: it depends on the cores that all ranks of a node may use."""

from __future__ import annotations

import os

import pytest

from iterreduce.launched import is_crowded


@pytest.mark.parametrize(
    ("ranks", "own", "launcher", "crowded"),
    [
        (2, 1, 2, False),
        (3, 1, 2, True),
        (2, 2, 2, False),
        (2, 2, 1, False),
        (4, 2, 2, True),
        (64, 1, 1, True),
    ],
)
def test_ranks_that_are_bound_to_a_core_each_are_not_crowded(
    monkeypatch: pytest.MonkeyPatch, ranks: int, own: int, launcher: int, crowded: bool
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(launcher if pid else own)))
    assert is_crowded() == crowded
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_SIZE")
    assert not is_crowded()
