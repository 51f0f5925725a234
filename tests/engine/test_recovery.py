"""Ranks die, and the others go on: what a run gives then is what it would have given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.copies import Copies
from iterreduce.events import Events
from iterreduce.loop import Local, Loop, Shuffle, State
from iterreduce.options import Options
from iterreduce.recovery import LoopRun
from iterreduce.run import Result, run_loop
from iterreduce.testing import Faults, Kill, run_ranks, striking
from tests.engine.dying import N, job, origins, sums_of, survived
from tests.engine.kit import int_rows, local, looping

Sized = pytest.mark.parametrize("size", [2, 3, 5, 8])


@Sized
@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_those_who_live_go_on_from_copies_in_their_memory(size: int, which: str) -> None:
    rank = {"first": 0, "middle": size // 2, "last": size - 1}[which]
    found = survived(size, faults=[Kill(at="stage.start:step: Shuffle*", rank=rank, iteration=6)])
    assert len(found) == size - 1
    for result in found:
        (entry,) = result.recoveries
        assert entry["lost"] == [rank] and entry["survivors"] == size - 1
        assert (entry["origin"], entry["iteration"], entry["recomputed"]) == ("memory", 5, 0)
        assert result.iterations == 9 and len(result.seconds_per_iteration) == 9


@Sized
def test_a_loss_before_the_first_commit_begins_again_from_the_sources(size: int) -> None:
    found = survived(size, faults=[Kill(at="stage.start:step: Shuffle*", rank=1, iteration=1)])
    assert [origins(result) for result in found] == [["start"]] * (size - 1)


def test_ranks_die_one_after_another_until_one_is_left() -> None:
    faults = [Kill(at="iteration.start", rank=rank, iteration=2 + rank) for rank in range(4)]
    (last,) = survived(5, faults=faults)
    assert [entry["survivors"] for entry in last.recoveries] == [4, 3, 2, 1]
    assert set(origins(last)) == {"memory"}


def test_two_that_hold_no_copy_of_each_other_may_die_at_once() -> None:
    faults = [Kill(at="control.ready", rank=rank, iteration=5) for rank in (1, 3)]
    found = survived(5, faults=faults)
    assert all(set(origins(result)) == {"memory"} for result in found) and len(found) == 3


def test_two_neighbours_that_die_at_once_take_both_copies_along(tmp_path: Path) -> None:
    faults = [Kill(at="control.ready", rank=rank, iteration=6) for rank in (2, 3)]
    rows = int_rows(N, 13).select("k", "x")
    np.save(tmp_path / "rows.npy", np.rec.fromarrays([rows["k"], rows["x"]], names="k,x"))

    def of_file(group: Group) -> Loop:
        return sums_of(ir.read(str(tmp_path / "rows.npy")).as_source())

    assert origins(survived(5, faults=faults, loop=of_file)[0])[-1] == "start"
    where = {"checkpoint_dir": str(tmp_path / "saved"), "checkpoint_every": 1}
    found = run_ranks(5, job, faults, of_file, heals=True, timeout=60, **where)
    assert origins(found[0])[-1] in ("checkpoint", "start")  # a write may have been under way, too


def test_without_copies_the_newest_checkpoint_serves(tmp_path: Path) -> None:
    faults = [Kill(at="stage.start:step: Shuffle*", rank=0, iteration=8)]
    rows = int_rows(N, 13).select("k", "x")
    np.save(tmp_path / "rows.npy", np.rec.fromarrays([rows["k"], rows["x"]], names="k,x"))

    def of_file(group: Group) -> Loop:
        return sums_of(ir.read(str(tmp_path / "rows.npy")).as_source())

    def saving(group: Group) -> Result:
        events = Events()
        options = Options(copy_every=0, checkpoint_dir=str(tmp_path / "saved"), checkpoint_every=0)
        with striking(Faults(tuple(faults)), events, group):
            run = LoopRun(of_file(group), group, options, events)
            for _ in range(5):
                run.advance()
            run.save()
            run.run()
            run.close()
            assert run.recoveries[0]["origin"] == "checkpoint" and run.recoveries[0]["iteration"] == 5
        return run_loop(of_file(group), group)

    found = run_ranks(3, saving, heals=True, timeout=60)
    assert len(found) == 2
    assert not [p for p in (tmp_path / "saved").rglob(".*") if p.name.startswith(".writing")]


def test_what_is_everywhere_is_copied_without_a_message() -> None:
    def work(group: Group, every: int) -> int:
        loop = looping(
            {"z": Batch(x=np.zeros(3))},
            {"s": State("z")},
            [Local(lambda s: s.with_columns(x=s["x"] + 1), ("s",), "n", "share")],
            {"s": "n"},
        )
        run_loop(loop, group, Options(copy_every=every))
        return group.traffic.collectives

    assert run_ranks(3, work, 1, heals=True) == run_ranks(3, work, 0, heals=True)


def test_of_a_state_whose_keys_stay_only_values_are_copied_again() -> None:
    rows = Batch(k=np.arange(3000), x=np.arange(3000))

    def work(group: Group, every: int, most: int) -> int:
        loop = looping(
            {"r": local(rows, group)},
            {"s": State("r0", ("k",))},
            [Local(lambda s: s.with_columns(x=s["x"] + 1), ("s",), "n", cut="share")],
            {"s": "n"},
            most=most,
            prepare=(Shuffle("r", ("k",), "r0", {"x": ir.SUM}),),
        )
        run_loop(loop, group, Options(copy_every=every))
        return group.traffic.payload_bytes

    def sent(most: int) -> int:
        """By all ranks, for copies."""
        with_copies, without = (sum(run_ranks(3, work, every, most, heals=True)) for every in (1, 0))
        return with_copies - without

    first, more = sent(1), sent(5) - sent(1)
    assert first > 2 * 3000 * 8  # keys and values; and the rows that the ranks were given
    assert 4 * 3000 * 8 <= more < 4 * 3000 * 8 * 1.2


def test_copies_take_a_small_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the first: of a run that ends before one would pay, there is none."""
    clock = [0.0]
    monkeypatch.setattr("iterreduce.copies.time.perf_counter", lambda: clock[0])
    for nbytes, iteration, one in ((0, 0.001, 0.0004), (50_000_000, 0.1, 0.3), (8, 600.0, 0.01)):
        first = SimpleNamespace(rank=0, size=2, epoch=0)
        copies = Copies(first, None)  # type: ignore[arg-type]
        copies.capture = lambda nbytes=nbytes: (0, SimpleNamespace(nbytes=nbytes))  # type: ignore[misc]
        began, spent, made = clock[0], 0.0, []
        copies.begin()
        for number in range(1000):
            clock[0] += iteration
            if copies.says(number):
                clock[0] += one
                copies.took(one)
                spent += one
                made.append(number)
                assert spent <= 0.031 * (clock[0] - began) or len(made) == 1
        assert spent > 0.028 * (clock[0] - began) or len(made) == 1000


def test_copies_are_given_up_where_a_rank_has_no_memory_for_them() -> None:
    def work(group: Group, budget: int | None) -> tuple[int, bool]:
        events, seen = Events(), list[str]()
        events.subscribe(lambda event: seen.append(event.name))
        rows = local(Batch(k=np.arange(100_000), x=np.arange(100_000)), group)
        options = Options(copy_every=1 if budget else 0, memory_bytes=budget)
        result = run_loop(sums_of(rows, 3), group, options, events)
        return sum(result.memory_bytes.values()), "recovery.nocopies" in seen

    needs = max(held for held, _ in run_ranks(2, work, None, heals=True))
    assert [given_up for _, given_up in run_ranks(2, work, 10 * needs, heals=True)] == [False] * 2
    assert [given_up for _, given_up in run_ranks(2, work, needs + needs // 8, heals=True)] == [True] * 2
