"""Whatever happens to its files, a checkpoint is read as it was written, or the one before, or not at all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from .fuzzing import BYTES, TWO, Directory, damaged, forged


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Directory]:
    made = Directory(tmp_path_factory.mktemp("fuzz") / "whole")
    patched = pytest.MonkeyPatch()
    patched.setattr(os, "fsync", lambda handle: None)  # nothing here asks what a crash leaves
    yield made
    patched.undo()


def test_what_is_whole_is_read(directory: Directory, tmp_path: Path) -> None:
    assert directory.judged(tmp_path / "d", directory.files) == "newest"


@pytest.mark.parametrize("seed", range(4))
def test_one_thing_wrong_gives_the_rows_of_this_or_the_one_before(
    seed: int, directory: Directory, tmp_path: Path
) -> None:
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    for _ in range(30):
        files, told = damaged(directory.files, rng)
        try:
            outcomes[directory.judged(tmp_path / "d", files)] += 1
        except BaseException as problem:
            problem.add_note(told)
            raise
    assert outcomes["newest"] and outcomes["before"]


@pytest.mark.parametrize("kind", BYTES, ids=lambda kind: kind.__name__)
def test_damage_to_every_file_of_the_newest_gives_the_one_before(
    kind: object, directory: Directory, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    for name in directory.checkpoints:
        if name.split("/")[1] == TWO:
            raw = kind(directory.files[name], rng)  # type: ignore[operator]
            wanted = "newest" if raw == directory.files[name] else "before"
            assert directory.judged(tmp_path / "d", {**directory.files, name: raw}) == wanted, name


@pytest.mark.parametrize("seed", range(4))
def test_forged_manifests_do_no_harm(seed: int, directory: Directory, tmp_path: Path) -> None:
    rng, outcomes = np.random.default_rng(100 + seed), Counter[str]()
    for _ in range(40):
        name = directory.manifests[int(rng.integers(2))]
        raw, told = forged(directory.files[name], rng)
        try:
            outcomes[directory.judged(tmp_path / "d", {**directory.files, name: raw}, honest=False)] += 1
        except BaseException as problem:
            problem.add_note(told)
            raise
    assert outcomes["before"] > 4
