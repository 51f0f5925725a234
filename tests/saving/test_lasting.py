"""A run that is stopped and taken up again ends as one that was not, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import Outcome, checkpoint
from iterreduce.appfile import load_app
from iterreduce.driver import LoopRun
from iterreduce.errors import CheckpointError, FinishedError, UsageError
from iterreduce.options import Options
from iterreduce.run import Result
from iterreduce.saving.directory import entries_in
from iterreduce.testing import run_ranks
from tests.launch import ROOT
from tests.saving.programs import PROGRAMS, interrupted, points, run_once


def facts(result: Any) -> tuple[Any, ...]:
    """What must be the same."""
    return result.outcome, result.iterations, result.residual, result.values, result.result_sha256


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_on_as_many_ranks_a_run_in_pieces_has_the_same_bits(name: str, ranks: int, tmp_path: Path) -> None:
    whole = run_once(PROGRAMS[name], ranks)[0]
    pieces = [(ranks, 1), (ranks, 1), (ranks, 2), (ranks, None)]
    assert facts(interrupted(PROGRAMS[name], tmp_path / "saved", pieces)) == facts(whole)


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_on_other_ranks_a_reproducible_run_has_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = run_once(PROGRAMS[name], 2, reproducible=True)[0]
    pieces = [(5, 1), (1, 1), (8, 1), (3, None)]
    result = interrupted(PROGRAMS[name], tmp_path / "saved", pieces, reproducible=True)
    assert facts(result) == facts(whole)


@pytest.mark.parametrize("name", ["kmeans", "sssp", "nested", "grows"])
def test_periodic_checkpoints_do_not_change_a_run(name: str, tmp_path: Path) -> None:
    whole = run_once(PROGRAMS[name], 3)[0]
    saved = run_once(PROGRAMS[name], 3, tmp_path / "saved", patient=True, checkpoint_every=1)
    assert facts(saved[0]) == facts(whole) and saved[0].checkpoints["written"] > 0
    assert saved[0].outcome is not Outcome.STOPPED_SAVED


@pytest.mark.parametrize(("long", "saved"), [(1e9, 3), (0.0, 9)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_iterations_longer_than_a_write_are_saved_one_by_one(
    ranks: int, long: float, saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short ones do not wait for a publication, of which they learn an iteration later."""
    monkeypatch.setattr(checkpoint, "LONG_ITERATION", long)
    program = lambda group: counting(limit=10)  # noqa: E731
    result = run_once(program, ranks, tmp_path / "saved", patient=True, checkpoint_every=1)[0]
    assert result["x"].tolist() == [2.0**10] * 2
    assert result.checkpoints["written"] == saved and result.checkpoints["failed"] == 0


# ---------------------------------------------------------------------- a driver of its own


def counting(scale: float = 2.0, limit: int = 9, start: float = 1.0, fed: bool = False) -> ir.Loop:
    """x becomes scale * x, plus what the feed brings."""
    step = ir.Superstep(
        "step",
        (
            ir.Local(
                lambda s, f: s.with_columns(x=scale * s["x"] + f["y"][0]), ("s", "feed"), "t", cut="share"
            )
            if fed
            else ir.Local(lambda s: s.with_columns(x=scale * s["x"]), ("s",), "t", cut="share"),
        ),
        (ir.Replace("s", "t"),),
    )
    return ir.Loop(
        "count",
        {"a": ir.Batch(x=np.full(2, start))},
        {"s": ir.State("a")},
        (step,),
        ir.Until.of([], limit),
        "s",
        feeds={"feed": None} if fed else {},
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_driver_of_its_own_is_followed_by_number(ranks: int, tmp_path: Path) -> None:
    """It asks again from the first iteration on; what was saved is answered, the rest is done."""

    def drive(group: ir.Group, until: int) -> tuple[list[Any], list[float], list[int]]:
        run, told, done = LoopRun(counting(fed=True, limit=99), group, saving(tmp_path, 0)), [], []
        for i in range(until):
            told.append(run.advance({"feed": ir.Batch(y=np.array([float(i)]))}))
            done.append(run.iteration)
            if i % 3 == 2:
                run.save()
        return told, run.tables["s"].batch["x"].tolist(), done

    first = run_ranks(ranks, drive, 10)[0]
    again = run_ranks(ranks, drive, 12)[0]
    whole = [1.0, 1.0]
    for i in range(12):
        whole = [2 * x + i for x in whole]
    assert again[1] == whole and again[0][:10] == first[0]
    assert again[2][0] == 9, "it began where it was saved, whatever number was asked for"


@pytest.mark.parametrize(
    ("calls", "closes", "end"), [(9, False, "ended"), (4, True, "ended"), (4, False, "running")]
)
def test_a_driver_that_has_all_that_it_wants_was_not_interrupted(
    calls: int, closes: bool, end: str, tmp_path: Path
) -> None:
    run = LoopRun(counting(limit=9), None, saving(tmp_path, 0))
    for _ in range(calls):
        run.advance()
    if closes:
        run.close()
    (attempt,) = (tmp_path / "saved").glob("attempt-*")
    assert [entry.end for entry in entries_in(str(attempt))] == [end]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_driver_whose_last_iteration_was_saved_is_told_the_same_again(ranks: int, tmp_path: Path) -> None:
    """All its positions, and then that the loop has ended, as it had when the driver began again."""

    def drive(group: ir.Group) -> list[Any]:
        run, told = LoopRun(counting(limit=5), group, saving(tmp_path, 0)), list[Any]()
        while not isinstance(told[-1] if told else None, Outcome):
            told.append(run.advance())
        run.save()
        with pytest.raises(UsageError, match="the loop has ended"):
            run.advance()
        return told

    first, again = run_ranks(ranks, drive)[0], run_ranks(ranks, drive)[0]
    assert len(first) == 5 and again == first


def saving(directory: Path, every: int, **options: Any) -> Options:
    return Options(checkpoint_dir=str(directory / "saved"), checkpoint_every=every, **options)


# ---------------------------------------------------------------------- another job


def part_of(loop: ir.Loop, directory: Path, stop: bool = True, **options: Any) -> Result:
    return run_once(lambda group: loop, 2, directory / "saved", 3 if stop else None, **options)[0]


@pytest.mark.parametrize(
    ("other", "options", "told"),
    [
        (counting(3.0), {}, r"stages\.0\.function\.scale: 2\.0 then, 3\.0 now"),
        (counting(start=5.0), {}, r"sources\.a: "),
        (counting(fed=True), {}, "another loop was saved there"),
        (counting(), {"reproducible": True}, "reproducible: False then, True now"),
        (counting(), {"partitions": 64}, "partitions: 1024 then, 64 now"),
    ],
)
def test_another_job_is_refused_and_the_difference_is_named(
    other: ir.Loop, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    assert part_of(counting(), tmp_path).outcome is Outcome.STOPPED_SAVED
    with pytest.raises(CheckpointError, match=told):
        part_of(other, tmp_path, stop=False, **options)


@pytest.mark.parametrize(("limit", "ends"), [(12, 12), (5, 5), (4, 4), (2, 4)])
def test_more_or_fewer_iterations_are_no_other_job(limit: int, ends: int, tmp_path: Path) -> None:
    """What is saved is not gone back from, and nothing is done beyond what is wanted."""
    part_of(counting(), tmp_path)
    result = part_of(counting(limit=limit), tmp_path, stop=False)
    assert result.iterations == ends and result["x"].tolist() == [2.0**ends] * 2
    assert result.outcome is Outcome.ITERATIONS_USED
    assert result.checkpoints["restarted_from_iteration"] == 4


def test_changed_input_is_refused_and_fresh_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"

    def total(group: ir.Group) -> ir.Loop:
        points = ir.read(str(path))
        return ir.MapReduce(
            map=lambda p: p.with_columns(one=np.zeros(len(p), int)), reduce=ir.SUM, key="one"
        )(points).to_loop()

    path.write_text("x\n1\n2\n")
    loops = lambda group: replace(total(group), until=ir.Until.of([], 4))  # noqa: E731
    assert run_once(loops, 2, tmp_path / "saved", 2)[0].outcome is Outcome.STOPPED_SAVED
    path.write_text("x\n1\n3\n")
    with pytest.raises(CheckpointError, match=r"another input was saved there: .*bytes, digest"):
        run_once(loops, 2, tmp_path / "saved")
    anew = run_once(loops, 2, tmp_path / "saved", fresh=True)[0]
    assert anew["x"].sum() == 4 and "restarted_from_iteration" not in anew.checkpoints


def test_a_file_that_was_copied_elsewhere_is_the_same_input(tmp_path: Path) -> None:
    first, other = tmp_path / "a.npy", tmp_path / "elsewhere.npy"
    np.save(first, points(300)["x"])
    other.write_bytes(first.read_bytes())

    def kmeans(path: Path) -> Any:
        loaded = load_app(str(ROOT / "apps" / "kmeans.py")).function
        return lambda group: loaded(ir.read(str(path)), k=3, max_iterations=5, tolerance=0.0).to_loop()

    whole = run_once(kmeans(first), 2)[0]
    run_once(kmeans(first), 2, tmp_path / "saved", 2)
    assert facts(run_once(kmeans(other), 2, tmp_path / "saved")[0]) == facts(whole)


def test_a_finished_job_says_so(tmp_path: Path) -> None:
    run_once(lambda group: counting(), 1, tmp_path / "saved")[0].finish()
    with pytest.raises(FinishedError, match=r"this job has finished .ITERATIONS_USED after 9 iterations"):
        run_once(lambda group: counting(), 2, tmp_path / "saved")
    more = run_once(lambda group: counting(limit=12), 2, tmp_path / "saved")[0]
    assert more.iterations == 12 and more["x"].tolist() == [2.0**12] * 2
    with pytest.raises(CheckpointError, match="another loop was finished there"):
        run_once(lambda group: counting(7.0), 2, tmp_path / "saved")
    assert run_once(lambda group: counting(), 2, tmp_path / "saved", fresh=True)[0].iterations == 9


def test_a_job_that_finished_with_other_input_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"

    def kmeans(group: ir.Group) -> ir.Loop:
        loaded = load_app(str(ROOT / "apps" / "kmeans.py")).function
        loop: ir.Loop = loaded(ir.read(str(path)), k=3, max_iterations=5).to_loop()
        return loop

    np.save(path, points(300)["x"])
    for result in run_once(kmeans, 2, tmp_path / "saved"):
        result.finish()
    with pytest.raises(FinishedError):
        run_once(kmeans, 3, tmp_path / "saved")
    np.save(path, points(300, seed=1)["x"])
    with pytest.raises(CheckpointError, match="another input was finished there"):
        run_once(kmeans, 1, tmp_path / "saved")


# ---------------------------------------------------------------------- rows that cannot be read again


BROKEN = {"now": False}


def added(s: ir.Batch, total: ir.Batch) -> ir.Batch:
    if BROKEN["now"]:
        raise ArithmeticError
    return ir.Batch(y=s["y"] + total["y"])


def summed(x: np.ndarray, group: ir.Group) -> ir.Loop:
    """The sum of all x is added to the state in each iteration."""
    mine = x[len(x) * group.rank // group.size : len(x) * (group.rank + 1) // group.size]
    rows = ir.Dataset.from_local(group, save=True, x=mine)
    inputs = ir.Inputs()
    name = inputs.rows("rows", rows)
    stages = (
        ir.Total(name, (), {"y": ir.sum("x")}, "total"),
        ir.Local(added, ("s", "total"), "t", cut="share"),
    )
    step = ir.Superstep("add", stages, (ir.Replace("s", "t"),))
    sources = {**inputs.sources, "zero": ir.Batch(y=np.zeros(1))}
    return ir.Loop("sums", sources, {"s": ir.State("zero")}, (step,), ir.Until.of([], 9), "s")


@pytest.mark.parametrize("pieces", [(2, 2, 2), (3, 1, 5)])
def test_rows_that_cannot_be_read_again_are_saved_once(pieces: tuple[int, ...], tmp_path: Path) -> None:
    x, other = np.arange(20.0), np.full(3, -1.0)
    first, second, last = pieces
    run_once(lambda g: summed(x, g), first, tmp_path / "saved", 2)
    run_once(lambda g: summed(other, g), second, tmp_path / "saved", 2)
    result = run_once(lambda g: summed(other[:0], g), last, tmp_path / "saved")[0]
    assert result["y"].tolist() == [9 * x.sum()] and result.iterations == 9
    assert result.checkpoints["restarted_from_iteration"] > 2
    kept = sorted(int(p.name) for p in (tmp_path / "saved").glob("attempt-*/0*"))
    assert kept[0] == 1 and len(kept) <= 3


def test_a_run_that_ended_before_it_saved_a_state_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.arange(20.0)
    options = {"checkpoint_every": 0}

    monkeypatch.setitem(BROKEN, "now", True)
    with pytest.raises(ir.UserCodeError):
        run_once(lambda g: summed(x, g), 2, tmp_path / "saved", **options)
    monkeypatch.setitem(BROKEN, "now", False)
    result = run_once(lambda g: summed(x[:1] - 5, g), 3, tmp_path / "saved", **options)[0]
    assert result["y"].tolist() == [9 * x.sum()]


# ---------------------------------------------------------------------- how often


def test_a_run_says_how_often_it_saves_and_why(tmp_path: Path) -> None:
    program = lambda group: counting(limit=10)  # noqa: E731
    given = {"checkpoint_every": 2, "mtbf": 3600.0}
    first, *others = run_once(program, 3, tmp_path / "saved", patient=True, **given)
    told = first.checkpoints
    assert told["every_iterations"] == 2 and told["mtbf_seconds"] == 3600.0 and told["written"] >= 2
    assert told["write_seconds"] >= told["blocking_seconds"] > 0 and told["interval_seconds"] > 0
    assert 0 < told["predicted_waste"] < 1 and 0 < told["measured_waste"] < 1
    assert all("every_iterations" not in other.checkpoints for other in others)


def test_a_short_job_saves_nothing_unless_it_is_told_to(tmp_path: Path) -> None:
    told = run_once(lambda group: counting(limit=10), 2, tmp_path / "saved")[0].checkpoints
    assert told["written"] == 0 and told["every_iterations"] == 0
