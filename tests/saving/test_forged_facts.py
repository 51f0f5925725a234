"""Facts that no run has written down, under checksums that fit, are a clear error and never a crash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iterreduce.errors import CheckpointError, IterReduceError
from iterreduce.saving.sealing import sealed

from .fuzzing import evil, holder_of, places_in
from .programs import PROGRAMS, run_once


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with a carry, an output and a state, stopped after three iterations."""
    place = tmp_path_factory.mktemp("forged") / "stopped"
    run_once(PROGRAMS["grows"], 2, place, stop_after=3)
    return place


def forge(stopped: Path, place: Path, change: Any) -> None:
    """A copy of the directory whose facts were changed and sealed again."""
    shutil.copytree(stopped, place)
    (path,) = place.glob("attempt-*/0*/manifest.json")
    manifest = json.loads(path.read_bytes())
    del manifest["checksum"]
    change(manifest["facts"])
    path.write_bytes(sealed(manifest))


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("levels", [], "no loop is open"),
        ("levels", 7, "levels is 7"),
        ("levels/0/iteration", -1, "levels.0.iteration is -1"),
        ("levels/0/iteration", True, "levels.0.iteration is True"),
        ("levels/0/at", 99, "position"),
        ("levels/0/outcome", "WON", "levels.0.outcome is 'WON'"),
        ("levels/0/carry", {}, "carry"),
        ("levels/0/carry/n", {"float": "0x1p0"}, "carry"),
        ("levels/0/carry/n", {"float": "0x1p99999"}, "levels.0.carry.n"),
        ("levels/0/gained", {"x": [1, 2]}, "gains"),
        ("levels/0/tables", {}, "states"),
        ("levels/0/tables/state/stored", "else", "is no table that is there"),
        ("levels/0/tables/state/keys", ["else"], "no such key column"),
        ("levels/0/tables/state/layout", "everywhere", "as it lay on the ranks"),
        ("levels/0/tables/state/rows", 2**60, "as it lay on the ranks"),
        ("outputs/log", None, "outputs.log is None"),
        ("journal", [[1, None, [1]]], "journal.0 is list"),
        ("journal", {"stored": "state", "loops": []}, "journal is no table of positions"),
        ("partitions", "many", "partitions is 'many'"),
        ("kept", "x", "kept is 'x'"),
    ],
)
def test_a_fact_of_another_kind_is_named(
    place: str, value: Any, told: str, stopped: Path, tmp_path: Path
) -> None:
    def change(facts: dict[str, Any]) -> None:
        steps = [int(step) if step.isdigit() else step for step in place.split("/")]
        holder_of(facts, tuple(steps))[steps[-1]] = value

    forge(stopped, tmp_path / "d", change)
    with pytest.raises(CheckpointError, match=told):
        run_once(PROGRAMS["grows"], 2, tmp_path / "d")


def test_any_fact_that_is_missing_or_strange_is_a_clear_error(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    rng, refused = np.random.default_rng(3), 0
    for number in range(40):

        def change(facts: dict[str, Any]) -> None:
            places = [place for place in places_in(facts) if place[0] != "job"]
            place = places[int(rng.integers(len(places)))]
            if rng.integers(3):
                holder_of(facts, place)[place[-1]] = evil(rng)
            else:
                del holder_of(facts, place)[place[-1]]

        forge(stopped, tmp_path / str(number), change)
        try:
            run_once(PROGRAMS["grows"], 2, tmp_path / str(number))
        except IterReduceError:
            refused += 1
    assert refused > 20
