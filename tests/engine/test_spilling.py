"""More rows and keys than a budget holds: what does not fit lies in files, and nothing else changes.

The oracle is the same run without a budget: the same rows, in the same order, on the same ranks, bit for bit.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import Dataset
from iterreduce.collectives import Group
from iterreduce.columns import placement
from iterreduce.columns.batch import Batch
from iterreduce.columns.placement import Placement
from iterreduce.columns.ragged import Ragged
from iterreduce.driver import LoopRun
from iterreduce.errors import ScratchError, ScratchWarning
from iterreduce.loop import Gather, Local, Lookup, Loop, Shuffle, Splitters, State
from iterreduce.memory import filed_bytes
from iterreduce.options import Options
from iterreduce.run import Result, delivered, run_loop
from iterreduce.scratch import kind_of
from iterreduce.sources.text import TextSource
from iterreduce.testing import Kill, run_ranks
from tests.engine.checks_memory import Huge
from tests.engine.dying import survived
from tests.engine.kit import local, looping, pipeline, raised
from tests.launch import mpirun

N = 6000
BUDGET = 1 << 16  # a quarter of it is worked on in memory: 16 KiB, a tenth of the rows
LEAST = 160 << 10  # what tables need, however few their keys


def rows_of_all_kinds(seed: int = 0, keys: int = N) -> Batch:
    """Keys that are far apart, close together, and texts; sums of values that depend on their order."""
    rng = np.random.default_rng(seed)
    number = rng.integers(0, keys, N)
    return Batch(
        far=number * 0x9E3779B97F4A7C1,
        near=number,
        text=[f"word {n}" for n in number.tolist()],
        value=rng.random(N) * 10.0 ** rng.integers(-8, 8, N),
        vector=rng.random((N, 3)).astype(np.float32),
    )


def bytes_of(batch: Batch) -> dict[str, Any]:
    """All columns and masks, to the bit."""
    out = {}
    for name in batch.names:
        column = batch[name]
        parts = (column.offsets, column.values) if isinstance(column, Ragged) else (column,)
        out[name] = [(part.dtype.str, part.shape, part.tobytes()) for part in parts]
        out[f"{name}?"] = None if batch.valid(name) is None else batch.valid(name).tobytes()
    return out


def spilled(make: Callable[[Group], Loop], ranks: int, scratch: Path, **more: Any) -> list[Result]:
    """What every rank gets with a budget, after a look that it gets the same without one."""

    def job(group: Group) -> Result:
        plain = run_loop(make(group), group, Options(**more))
        options = Options(memory_bytes=BUDGET, scratch=str(scratch), **more)
        result = run_loop(make(group), group, options)
        assert bytes_of(result.batch) == bytes_of(plain.batch)
        assert result.result_sha256 == plain.result_sha256 and not plain.scratch_bytes
        assert result.scratch_bytes["memory_peak"] <= BUDGET + LEAST
        return result

    results = run_ranks(ranks, job)
    assert any(result.scratch_bytes["total"] > BUDGET for result in results)
    assert os.listdir(scratch) == []
    return results


def halves(rows: Batch) -> Batch:
    """A map that is run block by block."""
    return rows.with_columns(value=rows["value"] / 2)


SUMS = {"value": ir.sum("value"), "vector": ir.mean("vector"), "n": ir.count()}
PROGRAMS: dict[str, tuple[Any, ...]] = {
    "far keys": (Shuffle("r", ("far",), "out_", SUMS),),
    "near keys": (Local(halves, ("r",), "h"), Shuffle("h", ("near",), "out_", SUMS)),
    "texts": (Shuffle("r", ("text",), "out_", SUMS),),
    "two keys": (Shuffle("r", ("near", "text"), "out_", SUMS),),
    "lists": (Shuffle("r", ("near",), "out_", {"all": ir.collect("value")}),),
    "onto": (
        Shuffle("r", ("far",), "all", {"n": ir.count()}),
        Shuffle("q", ("far",), "out_", {"value": ir.sum("value")}, onto="all", missing="drop"),
    ),
    "rows": (Shuffle("r", ("far",), "out_"),),
    "rows by text": (Shuffle("r", ("text",), "out_"),),
    "rows onto": (
        Shuffle("r", ("far",), "all", {"n": ir.count()}),
        Shuffle("q", ("far",), "out_", onto="all", missing="drop"),
    ),
    "sorted": (Shuffle("r", ("value", "near"), "out_", route=Splitters()),),
    "sorted down by text": (Shuffle("r", ("text",), "out_", route=Splitters(64, (True,))),),
    "numbers alone": (
        Local(lambda r: r.select("near"), ("r",), "one"),
        Shuffle("one", ("near",), "out_", route=Splitters()),
    ),
    "looked up": (
        Shuffle("r", ("near",), "all", {"v": ir.sum("value")}),
        Lookup("q", ("near",), "all", ("v",), into="out_", missing="null"),
    ),
    "gathered": (Gather("r", "out_"),),
}
ON_TWO_RANKS = "far keys", "texts", "rows", "sorted", "looked up"  # too


@pytest.mark.parametrize(
    ("name", "ranks"), [(n, r) for n in PROGRAMS for r in (1, 2, 3) if r != 2 or n in ON_TWO_RANKS]
)
def test_what_does_not_fit_is_the_same_to_the_bit(name: str, ranks: int, tmp_path: Path) -> None:
    def make(group: Group) -> Loop:
        sources = {"r": local(rows_of_all_kinds(), group), "q": local(rows_of_all_kinds(1, 2 * N), group)}
        return pipeline(sources, *PROGRAMS[name], result="out_")

    spilled(make, ranks, tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_reproducible_runs_have_the_same_digest_on_any_number_of_ranks(ranks: int, tmp_path: Path) -> None:
    def make(group: Group) -> Loop:
        return pipeline({"r": local(rows_of_all_kinds(), group)}, Shuffle("r", ("far",), "out_", SUMS))

    digests = {r.result_sha256 for r in spilled(make, ranks, tmp_path, reproducible=True)}
    plain = run_ranks(3, lambda group: run_loop(make(group), group, Options(reproducible=True)))
    assert digests == {plain[0].result_sha256}


def words_of(lines: Batch) -> Batch:
    words = [word for line in lines["line"].to_list() for word in line.split()]
    return Batch(word=words, n=np.ones(len(words), np.int64))


@pytest.mark.parametrize("ranks", [1, 3])
def test_words_of_a_packed_file_are_counted_again_and_again(ranks: int, tmp_path: Path) -> None:
    """The lines are kept in scratch, not unpacked anew; and so is what a loop makes of them."""
    rng, path = np.random.default_rng(3), tmp_path / "words.txt.gz"
    lines = "\n".join(f"w{a} w{b}" for a, b in rng.integers(0, 3000, (N, 2)))
    path.write_bytes(gzip.compress(lines.encode()))
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def make(group: Group) -> Loop:
        stages = (
            Local(words_of, ("lines",), "words"),
            Shuffle("words", ("word",), "counts", {"n": ir.sum("n")}),
            Local(lambda c, s: c.with_columns(n=c["n"] + len(s)), ("counts", "s"), "next", cut="share"),
        )
        return looping({"lines": TextSource(str(path))}, {"s": State("")}, stages, {"s": "next"}, most=3)

    for result in spilled(make, ranks, scratch):
        assert result.bytes_read <= 2 * path.stat().st_size + 2 * N * 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_lazy_groups_joins_sorts_and_distinct_rows_spill(ranks: int, tmp_path: Path) -> None:
    def make(group: Group) -> Loop:
        def dealt(seed: int, keys: int) -> Dataset:
            part = local(rows_of_all_kinds(seed, keys), group).rows
            return Dataset.from_local(group, **{n: part[n] for n in ("far", "near", "value")})

        left, right = dealt(0, N), dealt(1, 2 * N)
        groups = right.group_by("far").agg(most=ir.max("value"), n=ir.count())
        joined = left.join(groups, on="far").join(right.select("far", other="value"), on="far")
        return joined.select("far", "near", "most", "other").distinct().sort("most", "other").to_loop(group)

    spilled(make, ranks, tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loop_over_rows_that_do_not_fit_goes_on_from_its_checkpoint(ranks: int, tmp_path: Path) -> None:
    def make(group: Group) -> Loop:
        stages = (
            Local(lambda r, c: r.with_columns(value=r["value"] + c["n"][0]), ("r", "clock"), "more"),
            Shuffle("more", ("far",), "sums", {"value": ir.sum("value")}),
            Local(lambda c: Batch(n=c["n"] + 1), ("clock",), "later", cut="share"),
        )
        sources = {"r": local(rows_of_all_kinds(), group), "zero": Batch(n=np.zeros(1))}
        states = {"s": State(""), "clock": State("zero")}
        return looping(sources, states, stages, {"s": "sums", "clock": "later"}, most=4)

    def job(group: Group, folder: str) -> Result:
        options = Options(
            memory_bytes=BUDGET, scratch=str(tmp_path), reproducible=True, checkpoint_dir=folder
        )
        first = LoopRun(make(group), group, options)
        for _ in range(2):
            first.advance()
        first.save()
        first.close()
        return run_loop(make(group), group, options)

    folder = str(tmp_path / "saved")
    result = run_ranks(ranks, job, folder)[0]
    assert result.checkpoints["restarted_from_iteration"] == 2
    plain = run_ranks(3, lambda g: run_loop(make(g), g, Options(reproducible=True)))[0]
    assert result.result_sha256 == plain.result_sha256
    assert os.listdir(tmp_path) == ["saved"]


# ---------------------------------------------------------------------- scratch directories


def sums_within(group: Group, scratch: str, budget: int = BUDGET) -> Result:
    loop = pipeline({"r": local(rows_of_all_kinds(), group)}, Shuffle("r", ("far",), "out_", SUMS))
    return run_loop(loop, group, Options(memory_bytes=budget, scratch=scratch))


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_directory_that_cannot_be_used_is_one_error_on_all_ranks(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "there"
    if kind == "a file":
        place.write_text("")

    def job(group: Group) -> None:
        mine = str(tmp_path if group.rank == 0 else place)
        text = str(raised(group, ScratchError, lambda: sums_within(group, mine)))
        assert text.startswith(f"rank 1 cannot use the scratch directory {place}: n")
        assert "(--scratch)" in text

    run_ranks(2, job)


@pytest.mark.parametrize("room", [1 << 10, 1 << 15])  # for nothing at all, for small arrays
def test_a_full_directory_is_one_error_on_all_ranks_and_the_next_run_works(room: int, tmp_path: Path) -> None:
    def job(group: Group) -> None:
        sums_within(group, str(tmp_path))  # what is compiled is written, too
        group.barrier()
        if group.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        group.barrier()
        try:
            text = str(raised(group, ScratchError, lambda: sums_within(group, str(tmp_path))))
        finally:
            group.barrier()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f"into the scratch directory {tmp_path}: file too large" in text
        assert "rank 0 cannot put" in text and "are free there" in text and "give a larger --memory" in text
        sums_within(group, str(tmp_path))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        run_ranks(2, job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stage", ["groups", "rows", "texts", "sorted"])
def test_a_directory_that_is_lost_on_one_rank_is_one_error_on_all(stage: str, tmp_path: Path) -> None:
    def job(group: Group) -> None:
        mine = tmp_path / f"of-{group.rank}"
        mine.mkdir()

        def losing(rows: Batch) -> Batch:
            if group.rank == 0:
                mine.rmdir()
            return rows

        shuffles = {
            "groups": Shuffle("h", ("k",), "out_", {"n": ir.count()}),
            "rows": Shuffle("h", ("k",), "out_"),
            "texts": Shuffle("h", ("k",), "out_"),
            "sorted": Shuffle("h", ("k",), "out_", route=Splitters()),
        }
        keys = np.arange(60_000) * 7 % 50_000
        rows = Batch(k=keys, t=keys.astype("S6").tolist()) if stage == "texts" else Batch(k=keys, v=keys)
        lose = Local(losing, ("r",), "h", cut="share")
        loop = pipeline({"r": local(rows, group)}, lose, shuffles[stage], result="out_")
        options = Options(memory_bytes=1 << 19, scratch=str(mine))
        text = str(raised(group, ScratchError, lambda: run_loop(loop, group, options)))
        assert text.startswith("rank 0 cannot put") and f"{mine.parent}/of-0: no such file" in text

    run_ranks(3, job)


def test_those_who_live_go_on_from_copies_in_scratch(tmp_path: Path) -> None:
    death = Kill(at="stage.start:step: Shuffle*", rank=1, iteration=6)
    options = {"faults": [death], "memory_bytes": BUDGET, "scratch": str(tmp_path)}
    for result in survived(3, **options):
        (entry,) = result.recoveries
        assert (entry["origin"], entry["iteration"], entry["recomputed"]) == ("memory", 5, 0)


def test_results_are_written_within_the_budget(tmp_path: Path) -> None:
    def job(group: Group) -> int:
        result = sums_within(group, str(tmp_path))
        return delivered(result, group, lambda made: filed_bytes(np.ones(BUDGET)))

    assert all(run_ranks(2, job))


def test_rows_that_no_disk_holds_are_refused_before_they_are_read(tmp_path: Path) -> None:

    def job(group: Group) -> None:
        loop = looping({"p": Huge(1 << 38)}, {"s": State("")}, (Gather("p", "all"),), {"s": "all"}, most=2)
        options = Options(memory_bytes=BUDGET, scratch=str(tmp_path))
        text = str(raised(group, ScratchError, lambda: run_loop(loop, group, options)))
        assert "must go to the scratch directory" in text

    run_ranks(2, job)


def test_without_a_scratch_directory_nothing_is_put_anywhere(tmp_path: Path) -> None:
    for scratch in (None, "none"):
        options = Options(memory_bytes=1 << 30, scratch=scratch)
        loop = pipeline({"r": Batch(k=np.arange(9))}, Shuffle("r", ("k",), "out_", {"n": ir.count()}))
        assert LoopRun(loop, None, options).place is None


def test_a_directory_in_memory_is_said_once(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("disk / ext4 rw 0 0\nshm /dev/shm tmpfs rw 0 0\nx /dev/shmother ext4 rw 0 0\n")
    assert [kind_of(d, str(mounts)) for d in ("/dev/shm", "/dev/shm/a", "/dev/shmother", "/home")] == [
        "tmpfs",
        "tmpfs",
        "ext4",
        "ext4",
    ]
    if kind_of("/dev/shm") == "tmpfs":
        with pytest.warns(ScratchWarning, match="is memory itself"):
            run_ranks(2, lambda group: sums_within(group, "/dev/shm"))


# ---------------------------------------------------------------------- arrays


def test_arrays_move_between_memory_and_files_as_they_grow(tmp_path: Path) -> None:
    place = Placement(str(tmp_path), BUDGET)
    with place:
        small, array = np.arange(10), np.arange(1000)
        array.resize(100_000)
        assert filed_bytes(array) >= 800_000 and array[999] == 999 and not array[1000:].any()
        array.resize(10)
        assert not filed_bytes(array) and np.array_equal(array, small)
        with place.filed():
            filed = np.ones(5000)
        with place.kept():
            assert not filed_bytes(np.ones(50_000))
    assert filed_bytes(filed) and not filed_bytes(np.ones(100_000))
    filed[:] = 3.0
    assert float(filed.sum()) == 15_000.0 and place.filed_bytes
    del filed
    assert not place.filed_bytes and not place.held_bytes


def test_files_have_names_for_a_moment_where_they_cannot_be_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return opened(path, flags, mode)

    opened = os.open
    monkeypatch.setattr(placement.os, "open", refusing)
    place = Placement(str(tmp_path), BUDGET)
    with place:
        many = [np.full(20_000, n) for n in range(40)]
    assert os.listdir(tmp_path) == [] and [int(a[-1]) for a in many] == list(range(40))
    assert all(map(filed_bytes, many))


# ---------------------------------------------------------------------- the command line

APP = """
import os, signal
import iterreduce as ir

def halves(rows):
    if KILLS and len(os.listdir("/proc/self/map_files")) and "(deleted)" in open("/proc/self/maps").read():
        os.kill(os.getpid(), signal.SIGKILL)
    return rows.with_columns(v=rows["v"] / 2)

@ir.app
def job(rows: ir.Dataset) -> ir.Dataset:
    "Sums by key."
    return rows.map_batches(halves).group_by("k").agg(v=ir.sum("v")).sort("v")
"""


def test_two_processes_spill_and_leave_nothing_behind_when_they_are_killed(
    tmp_path: Path,
) -> None:
    rng, scratch = np.random.default_rng(5), tmp_path / "scratch"
    scratch.mkdir()
    rows = np.rec.fromarrays([rng.integers(0, 1 << 40, 100_000), rng.random(100_000)], names="k,v")
    np.save(tmp_path / "rows.npy", rows)

    def run(kills: bool, *options: str) -> int:
        (tmp_path / "app.py").write_text(APP.replace("KILLS", str(kills)))
        words = (
            "-m",
            "iterreduce",
            "--quiet",
            *options,
            str(tmp_path / "app.py"),
            str(tmp_path / "rows.npy"),
        )
        status = mpirun(1 if kills else 2, *words, cwd=tmp_path).returncode
        assert os.listdir(scratch) == []
        return status

    budget = "--memory", "1MiB", "--scratch", str(scratch)
    out, summary = tmp_path / "made.npy", tmp_path / "made.json"
    assert run(False, *budget, "--summary", str(summary), "--out", str(out)) == 0
    keys, codes = np.unique(rows["k"], return_inverse=True)
    sums, made = np.bincount(codes, rows["v"] / 2), np.load(out)
    assert np.allclose(made["v"], np.sort(sums), rtol=1e-12) and sorted(made["k"]) == keys.tolist()
    told = json.loads(summary.read_text())["scratch_bytes"]
    assert told["total"] > 1 << 20 and told["memory_peak"] <= 5 << 18
    assert run(True, *budget) != 0
