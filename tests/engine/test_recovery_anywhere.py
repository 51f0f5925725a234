"""Ranks die at any place of a run: the others end as if nobody had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.errors import UserCodeError
from iterreduce.events import Events
from iterreduce.loop import Local, Loop, State
from iterreduce.options import Options
from iterreduce.run import run_loop
from iterreduce.testing import Death, Faults, Kill, ThreadGroup, run_ranks, striking
from tests.engine.dying import given, job, origins, sums_of, survived
from tests.engine.kit import looping


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_may_die_at_any_collective_and_be_heard_by_some(size: int) -> None:
    """So survivors stand at commits that differ by one, in copies that are half made, or at the end."""
    (calls, *_) = run_ranks(size, lambda group: (job(group), group.calls)[1], heals=True)
    kinds = set()
    for call in range(8, calls + 1, 5):
        for heard in (None, (0,), tuple(range(size))):
            found = survived(size, [Death(size - 1, call, heard)])
            kinds |= {tuple(origins(result)) for result in found}
    assert {("memory",), ("start",)} <= kinds


def test_another_may_die_while_the_others_recover() -> None:
    calls: list[int] = []

    def counted(group: ThreadGroup) -> int:
        events = Events()
        events.subscribe(lambda event: calls.append(group.calls) if event.name == "rank.lost" else None)
        with striking(Faults((Kill(at="commit.start", rank=1, iteration=4),)), events, group):
            run_loop(sums_of(given(group)), group, Options(copy_every=1), events)
        return group.calls

    run_ranks(4, counted, heals=True)
    for more in range(0, 40, 3):
        found = survived(
            4,
            [Death(3, min(calls) + more, None if more % 2 else (0,))],
            faults=[Kill(at="commit.start", rank=1, iteration=4)],
        )
        assert len(found) == 2 and found[0].recoveries[-1]["survivors"] == 2


def test_an_error_of_the_user_is_raised_by_all_though_a_rank_dies_beside_it() -> None:
    def fails(group: Group) -> Loop:
        def counted(state: Batch) -> Batch:
            if state["x"][0] >= 4:
                raise ValueError("no more")
            return state.with_columns(x=state["x"] + 1)

        start = {"start": Batch(x=np.zeros(1, np.int64))}
        return looping(
            start, {"s": State("start")}, [Local(counted, ("s",), "n", "share")], {"s": "n"}, most=9
        )

    def work(group: ThreadGroup) -> str:
        with pytest.raises(UserCodeError) as found:
            job(group, loop=fails)
        return str(found.value).splitlines()[-1]

    (calls, *_) = run_ranks(3, lambda group: (work(group), group.calls)[1], heals=True)
    for call in range(calls - 8, calls + 1):
        found = run_ranks(3, work, heals=True, deaths=[Death(2, call, (1,))], timeout=60)
        assert set(found) == {"ValueError: no more"}


@pytest.mark.parametrize("more", range(0, 14, 2))
def test_a_result_is_written_whole_though_a_rank_dies_with_its_share(tmp_path: Path, more: int) -> None:
    path = str(tmp_path / "out.npz")

    def work(group: ThreadGroup) -> int:
        ir.Dataset.of_loop(sums_of(given(group)), group).write(path)
        return group.calls

    def written() -> list[tuple[int, int]]:
        found = np.load(path)
        return sorted(zip(found["k"].tolist(), found["x"].tolist(), strict=True))

    (calls, *_) = run_ranks(3, work, heals=True)
    want = written()
    run_ranks(3, work, heals=True, deaths=[Death(1, calls - more)])
    assert written() == want
