"""Ranks die: of what was read from files the others read again only what they do not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.errors import InputError
from iterreduce.events import Event, Events
from iterreduce.loop import Loop
from iterreduce.options import Options
from iterreduce.run import Result, run_loop
from iterreduce.testing import Death, Faults, Kill, ThreadGroup, run_ranks, striking
from tests.engine.dying import counted, job, sums_of
from tests.engine.kit import int_rows

ROWS = 5000  # 20 blocks of 256


def file_of(folder: Path, kind: str) -> Path:
    rows = int_rows(ROWS, 1300)
    path = folder / f"rows.{kind}"
    if kind == "npy":
        np.save(path, np.rec.fromarrays([rows["k"], rows["x"]], names="k,x"))
    else:
        lines = [f"{k},{x}" for k, x in zip(rows["k"].tolist(), rows["x"].tolist(), strict=True)]
        path.write_text("\n".join(["k,x", *lines]) + "\n")
    return path


def source_of(path: Path) -> Any:
    return ir.read(str(path), **({"block_bytes": 999} if path.suffix == ".csv" else {})).as_source()


def after(
    size: int, path: Path, *kills: Kill, deaths: tuple[Death, ...] = (), **options: Any
) -> list[Result]:
    return run_ranks(
        size,
        job,
        kills,
        lambda group: counted(source_of(path)),
        heals=True,
        deaths=deaths,
        timeout=60,
        **options,
    )


def shares(blocks: int, ranks: list[int]) -> dict[int, set[int]]:
    """The blocks of these ranks, cut evenly."""
    n = len(ranks)
    return {r: set(range(blocks * i // n, blocks * (i + 1) // n)) for i, r in enumerate(ranks)}


def rows_in(blocks: set[int]) -> int:
    return sum(min(256, ROWS - 256 * block) for block in blocks)


@pytest.mark.parametrize(("size", "lost"), [(2, 0), (2, 1), (3, 1), (5, 0), (5, 2), (8, 7), (8, 3)])
def test_only_blocks_that_a_rank_does_not_hold_are_read_again(size: int, lost: int, tmp_path: Path) -> None:
    path = file_of(tmp_path, "npy")
    found = after(size, path, Kill(at="control.ready", rank=lost, iteration=4))
    live = [rank for rank in range(size) if rank != lost]
    before, now = shares(20, list(range(size))), shares(20, live)
    kept = sum(rows_in(now[rank] & before[rank]) for rank in live)
    want = {"rows_kept": kept, "rows": ROWS - kept, "bytes": 16 * (ROWS - kept)}
    assert [result.recoveries[0]["read"] for result in found] == [want] * (size - 1)
    assert {result.result_sha256 for result in found} == {after(1, path)[0].result_sha256}


def test_blocks_of_text_have_as_many_rows_as_they_had(tmp_path: Path) -> None:
    path = file_of(tmp_path, "csv")
    found = after(5, path, *(Kill(at="control.ready", rank=r, iteration=2 + r) for r in (0, 1, 3)))
    assert {result.result_sha256 for result in found} == {after(1, path)[0].result_sha256}
    reads = [entry["read"] for entry in found[0].recoveries]
    assert len(reads) == 3 and all(read["rows_kept"] + read["rows"] == ROWS for read in reads)
    assert all(0 < read["rows"] < ROWS for read in reads)


def test_rows_are_kept_though_another_dies_before_they_are_used(tmp_path: Path) -> None:
    path, first = file_of(tmp_path, "npy"), Kill(at="control.ready", rank=1, iteration=3)
    calls: list[int] = []

    def noted(group: ThreadGroup) -> None:
        events = Events()
        events.subscribe(lambda event: calls.append(group.calls) if event.name.startswith("rec") else None)
        with striking(Faults((first,)), events, group):
            run_loop(counted(source_of(path)), group, Options(copy_every=1), events)

    run_ranks(4, noted, heals=True)
    want, kept = after(1, path)[0].result_sha256, []
    for call in range(min(calls), max(calls) + 1):
        found = after(4, path, first, deaths=(Death(3, call, None if call % 2 else (0,)),))
        assert {result.result_sha256 for result in found} == {want}
        kept.append(found[0].recoveries[-1]["read"]["rows_kept"])
    first_cut, between, now = shares(20, [0, 1, 2, 3]), shares(20, [0, 2, 3]), shares(20, [0, 2])
    had = [{rows_in(now[rank] & cut[rank]) for cut in (first_cut, between)} for rank in (0, 2)]
    assert set(kept) <= {a + b for a in had[0] for b in had[1]}


def test_rows_that_nobody_reads_any_more_are_read_again(tmp_path: Path) -> None:
    path = file_of(tmp_path, "npy")

    def summed(group: Group) -> Loop:
        return sums_of(source_of(path))  # its rows are needed once, before the first iteration

    found = run_ranks(3, job, [Kill(at="control.ready", rank=1, iteration=3)], summed, heals=True)
    assert found[0].recoveries[0]["read"] == {"rows_kept": 0, "rows": ROWS, "bytes": 16 * ROWS}


@pytest.mark.parametrize("within", [False, True], ids=["source", "source of a loop that is one"])
@pytest.mark.parametrize("respawns", [0, 1])
def test_a_file_that_has_changed_since_is_refused_by_all(respawns: int, within: bool, tmp_path: Path) -> None:
    path = file_of(tmp_path, "npy")
    (tmp_path / "marks").mkdir()

    def work(group: Group) -> str:
        events = Events()

        def write(event: Event) -> None:
            if group.rank == 0 and event.name == "iteration.commit" and event.fields["iteration"] == 2:
                np.save(path, np.rec.fromarrays([np.arange(9), np.arange(9)], names="k,x"))

        events.subscribe(write)
        faults = Faults((Kill(at="control.ready", rank=1, iteration=4),), marks=str(tmp_path / "marks"))
        changed = pytest.raises(InputError, match=r"rows.npy has changed since this run has read it")
        with striking(faults, events, group), changed as found:
            source = sums_of(source_of(path), most=2) if within else source_of(path)
            run_loop(counted(source, most=9), group, Options(copy_every=1, respawn=respawns), events)
        return str(found.value)

    said = run_ranks(3, work, heals=True, respawns=respawns)
    assert len(said) == 2 + respawns and len(set(said)) == 1


def test_there_may_be_no_memory_for_both_the_old_rows_and_the_new(tmp_path: Path) -> None:
    path = file_of(tmp_path, "npy")
    kill = Kill(at="control.ready", rank=1, iteration=3)
    (found, *_) = after(3, path, kill, memory_bytes=16 * (ROWS // 3 + ROWS // 2) - 5000, copy_every=0)
    assert found.recoveries[0]["read"]["rows_kept"] == 0
    assert found.result_sha256 == after(1, path)[0].result_sha256
