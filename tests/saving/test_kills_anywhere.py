"""A job that is killed at any place, any number of times, on any ranks, ends as one that was not."""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.collectives import Group
from iterreduce.events import EVENTS, Events
from iterreduce.options import Options
from iterreduce.run import digest, run_loop
from iterreduce.table import Table
from iterreduce.testing import Died, FailCall, Fault, Faults, Kill, run_ranks, striking
from tests.saving.programs import PROGRAMS, patience
from tests.saving.test_lasting import facts
from tests.saving.test_odd_programs import ODD

ALL = {**PROGRAMS, **ODD}
STEPS = ("write", "write.half", "sync", "publish", "rename", "published")
PLACES = sorted({*EVENTS} - {"checkpoint.step"}) + [f"checkpoint.step:{step}" for step in STEPS]


class Piece(NamedTuple):
    """One start of the job."""

    ranks: int
    faults: tuple[Fault, ...]
    options: dict[str, Any]


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    ranks = draw(st.sampled_from([1, 2, 3, 5]))
    faults: list[Fault] = [
        Kill(
            at=draw(st.sampled_from(PLACES)),
            rank=draw(st.integers(0, ranks - 1)),
            nth=draw(st.integers(1, 12)),
        )
    ]
    if draw(st.integers(0, 4)) == 0:
        call = draw(st.sampled_from(["fsync", "pwrite", "rename", "mkdir", "replace"]))
        first, times = draw(st.integers(1, 6)), draw(st.integers(1, 3))
        path = "*/attempt-*"
        faults.append(FailCall(call, "EIO", path=path, first=first, times=times, at="iteration.start"))
    options = {
        "checkpoint_every": draw(st.sampled_from([1, 1, 2, 0])),
        "checkpoint_files": draw(st.sampled_from(["node", "rank"])),
        "naive": draw(st.integers(0, 4)) == 0,
        "memory_bytes": draw(st.sampled_from([None, None, None, 30_000_000])),
    }
    return Piece(ranks, tuple(faults), options)


def ended(name: str, ranks: int, faults: tuple[Fault, ...] = (), **options: Any) -> tuple[Any, ...]:
    """How the job ended: what came of it, and of what it sank."""

    def job(group: Group) -> tuple[Any, ...]:
        events = Events()
        events.subscribe(patience, places=True)
        with striking(Faults(faults), events, group):
            result = run_loop(ALL[name](group), group, Options(reproducible=True, **options), events)
        sunk = {n: digest(Table(out.batch, out.layout), group) for n, out in result.outputs.items()}
        return (*facts(result), sunk)

    return run_ranks(ranks, job)[0]


@cache
def undisturbed(name: str) -> tuple[Any, ...]:
    return ended(name, 2)


@given(name=st.sampled_from(sorted(ALL)), parts=st.lists(pieces(), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_a_job_that_is_killed_anywhere_ends_with_the_same_bits(name: str, parts: list[Piece]) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoints that could not be written
        saved = str(Path(folder) / "saved")
        result = None
        for part in [*parts, Piece(3, (), {})]:
            if result is None:
                result = attempt(name, part, saved)
        assert result == undisturbed(name)


def attempt(name: str, part: Piece, saved: str) -> tuple[Any, ...] | None:
    """None if it was killed."""
    try:
        return ended(name, part.ranks, part.faults, checkpoint_dir=saved, **part.options)
    except Died:
        return None
