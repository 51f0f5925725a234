"""Checkpoints: what is written is what is read, by any number of ranks; whole, or not there."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from iterreduce.collectives import Group, SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.errors import CheckpointError, DisagreementError, IterReduceError, OutputError
from iterreduce.saving import planning, writing
from iterreduce.saving.directory import Attempt
from iterreduce.saving.reading import newest
from iterreduce.saving.writing import Saved, begin
from iterreduce.testing import run_ranks

from .kit import SIZES, names_in, newest_here, read_by, rows_of_every_kind, save, saved, share

ROWS = rows_of_every_kind(101)


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 4, 101])
def test_rows_of_every_kind_come_back_on_any_number_of_ranks(
    ranks: int, readers: int, count: int, tmp_path: Path
) -> None:
    rows = ROWS.slice(0, count)
    saved(tmp_path, ranks, rows)
    found = read_by(readers, tmp_path)
    assert found.equals(rows)
    assert found.schema == rows.schema


@pytest.mark.parametrize("per_rank", [False, True])
def test_each_node_or_rank_has_one_file_and_rows_stand_in_rank_order(per_rank: bool, tmp_path: Path) -> None:
    def work(group: Group) -> str:
        attempt = Attempt.open(group, tmp_path)
        rows = Batch(x=np.full(group.rank, group.rank))
        host = "ab"[group.rank % 2]  # ranks of a node need not be neighbours
        return save(group, attempt, 1, {"t": Saved(rows)}, per_rank=per_rank, host=host)._plan.path("")

    run_ranks(5, work)
    place = tmp_path / "attempt-000001" / "000000000001"
    files = [f"rank-{r:04d}.h5" for r in range(5)] if per_rank else ["node-0000.h5", "node-0001.h5"]
    assert names_in(place) == sorted(["index.h5", "manifest.json", *files])
    with h5py.File(place / "index.h5") as index:
        assert index["tables/t/x"][:].tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    assert read_by(2, tmp_path, "t")["x"].tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]


def test_what_is_everywhere_is_written_once(tmp_path: Path) -> None:
    centroids = Batch(x=np.arange(6.0).reshape(3, 2), name=["a", "bc", ""])

    def work(group: Group) -> None:
        tables = {"c": Saved(centroids, everywhere=True), "rows": Saved(Batch(x=np.arange(2)))}
        save(group, Attempt.open(group, tmp_path), 1, tables, host=f"host{group.rank}")

    run_ranks(3, work)
    checkpoint = newest_here(tmp_path)
    assert checkpoint is not None
    info = checkpoint.tables["c"]
    assert (info.everywhere, info.rank_rows, info.rows) == (True, (3, 0, 0), 3)
    assert checkpoint.read("c", 0, 3).equals(centroids)
    assert checkpoint.read("c", 1, 2).equals(centroids.slice(1, 2))
    assert checkpoint.tables["rows"].rank_rows == (2, 2, 2)


@pytest.mark.parametrize("size", SIZES)
def test_any_rows_can_be_read_by_themselves(size: int, tmp_path: Path) -> None:
    rows = ROWS.slice(0, 23)
    saved(tmp_path, size, rows)
    checkpoint = newest_here(tmp_path)
    assert checkpoint is not None
    for lo in range(0, 24, 3):
        for hi in range(lo, 24, 4):
            assert checkpoint.read("rows", lo, hi).equals(rows.slice(lo, hi))
    with pytest.raises(CheckpointError, match="23 rows"):
        checkpoint.read("rows", 0, 24)


def test_names_of_tables_may_be_any_text(tmp_path: Path) -> None:
    names = [
        "a/b",
        "a=2Fb",
        ".",
        "..",
        "",
        "ä ö\n",
        "\udc80",
        "x" * 1000,
        "x" * 1001,
        "/",
        "a\\b",
        "%b",
        "a\0b",
    ]
    group, attempt = SoloGroup(), Attempt.open(SoloGroup(), tmp_path)
    tables = {name: Saved(Batch(**{name: np.array([i])})) for i, name in enumerate(names)}
    save(group, attempt, 1, tables)
    checkpoint = newest(group, attempt, print)
    assert checkpoint is not None
    assert list(checkpoint.tables) == names
    for i, name in enumerate(names):
        assert checkpoint.read(name, 0, 1)[name].tolist() == [i]
    with h5py.File(Path(attempt.place(1)) / "index.h5") as index:
        assert len(index["tables"]) == len(names)
        assert [index[f"tables/{t}/{c}"][0] for t in index["tables"] for c in index[f"tables/{t}"]] == list(
            range(len(names))
        )


def test_no_tables_and_no_columns_are_a_checkpoint_too(tmp_path: Path) -> None:
    for place, tables in ((tmp_path / "a", {}), (tmp_path / "b", {"bare": Saved(Batch())})):
        run_ranks(2, lambda group, p=place, t=tables: save(group, Attempt.open(group, p), 1, t))
        checkpoint = newest_here(place)
        assert checkpoint is not None
        assert checkpoint.facts == {"number": 1}
        assert list(checkpoint.tables) == list(tables)


def test_a_mask_on_some_ranks_only_is_a_mask_for_all(tmp_path: Path) -> None:
    def work(group: Group) -> None:
        rows = Batch(x=np.arange(3) + 10 * group.rank)
        if group.rank == 1:
            rows = rows.with_valid(x=np.array([True, False, True]))
        save(group, Attempt.open(group, tmp_path), 1, {"rows": Saved(rows)})

    run_ranks(3, work)
    found = read_by(2, tmp_path)
    assert found["x"].tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert found.valid("x").tolist() == [True] * 4 + [False] + [True] * 4


def test_chunks_of_any_size_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for chunk in (8, 24, 1 << 20):
        monkeypatch.setattr(writing, "CHUNK_BYTES", chunk)
        path = saved(tmp_path / str(chunk), 2, ROWS) / "000000000001"
        contents.append([(path / name).read_bytes() for name in names_in(path)])
    assert contents[0] == contents[1] == contents[2]


def test_plain_h5py_sees_each_column_as_one_dataset(tmp_path: Path) -> None:
    path = saved(tmp_path, 3, ROWS) / "000000000001"
    for name in ("index.h5",):
        with h5py.File(path / name) as file:
            group = file["tables/rows"]
            for column in ("f8", "f4", "f2", "i8", "?", "c16", "M8[ns]", "m8[D]", "matrix", "nothing"):
                assert np.array_equal(group[column][:], ROWS[column])
            assert group["a=2Fb"][:].tolist() == ROWS["a/b"].tolist()
            assert group["="][:].tolist() == ROWS[""].tolist()
            text = ROWS["text"].compact()
            assert group["text/lengths"][:].tolist() == text.lengths.tolist()
            assert group["text/values"][:].tobytes() == text.values.tobytes()[: text.offsets[-1]]
            assert file["valid/rows/f8"][:].tolist() == ROWS.valid("f8").tolist()
    with h5py.File(path / "node-0000.h5") as file:
        assert np.array_equal(file["tables/rows/matrix"][:], ROWS["matrix"])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    path = saved(tmp_path, 2, ROWS, range(1, 6))
    assert names_in(path) == ["000000000004", "000000000005", "attempts.json"]


def test_steps_are_told_in_order_on_the_thread_that_works(tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []
    main = threading.current_thread()
    at = lambda step: told.append((step, threading.current_thread() is main))  # noqa: E731
    group, attempt = SoloGroup(), Attempt.open(SoloGroup(), tmp_path)
    save(group, attempt, 1, {"t": Saved(Batch(x=np.arange(9)))}, at=at)
    steps = ["write", "write.half", "sync", "publish", "rename", "published"]
    assert told == [(step, False) for step in steps]
    told.clear()
    blocking = begin(group, attempt, 2, {"t": Saved(Batch(x=np.arange(9)))}, {}, at=at)
    blocking.run()
    blocking.gather(blocking=True)
    assert blocking.published and told == [(step, True) for step in steps]
    assert blocking.nbytes == 72 and blocking.seconds > 0


# ---------------------------------------------------------------- what goes wrong


def same_error(size: int, work: Any) -> IterReduceError:
    """The error of this package that `work` raises with the same text on all ranks."""

    def caught(group: Group) -> IterReduceError:
        with pytest.raises(IterReduceError) as info:
            work(group)
        assert group.allgather_bytes(str(info.value).encode()) == [str(info.value).encode()] * group.size
        return info.value

    return run_ranks(size, caught)[0]


TABLES = {"t": Saved(Batch(x=np.arange(1000)))}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_fails_the_writing_and_leaves_the_one_before(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, attempt = SoloGroup(), Attempt.open(SoloGroup(), tmp_path)
    save(group, attempt, 1, TABLES)
    made = begin(group, attempt, 2, TABLES, {})

    def fail(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        made.start()
        made.wait()
    assert made.state == "failed"
    assert isinstance(made.error, OutputError)
    assert ("disk is full" in str(made.error)) == (number != errno.EIO)
    made.abandon()
    assert names_in(Path(attempt.path)) == ["000000000001", "attempts.json"]
    found = newest(group, attempt, pytest.fail)
    assert found is not None and found.number == 1
    save(group, attempt, 3, TABLES)


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "SPARE_BYTES", 1 << 60)

    def work(group: Group) -> None:
        begin(group, Attempt.open(group, tmp_path), 1, TABLES, {})

    error = same_error(3, work)
    assert isinstance(error, OutputError) and "MiB left" in str(error)
    assert names_in(tmp_path / "attempt-000001") == ["attempts.json"]


def test_tables_that_differ_between_ranks_are_refused_on_all(tmp_path: Path) -> None:
    def work(group: Group) -> None:
        rows = Batch(x=np.zeros(2, "f4" if group.rank == 2 else "f8"))
        begin(group, Attempt.open(group, tmp_path), 1, {"t": Saved(rows)}, {})

    assert isinstance(same_error(3, work), DisagreementError)


def test_facts_that_json_cannot_say_are_not_published(tmp_path: Path) -> None:
    attempt = Attempt.open(SoloGroup(), tmp_path)
    writing = begin(SoloGroup(), attempt, 1, TABLES, {"x": float("nan")})
    writing.run()
    writing.gather(blocking=True)
    assert writing.published is False and "JSON" in str(writing.error) and attempt.checkpoints() == []


def test_an_attempt_that_was_taken_over_can_neither_begin_nor_publish(tmp_path: Path) -> None:
    group = SoloGroup()
    old = Attempt.open(group, tmp_path)
    save(group, old, 1, TABLES)
    late = begin(group, old, 2, TABLES, {})
    late.run()
    later = begin(group, old, 3, TABLES, {})
    new = Attempt.open(group, tmp_path)
    late.gather(blocking=True)
    assert late.published is False
    assert isinstance(late.error, CheckpointError) and "attempt 2" in str(late.error)
    later.run()
    assert later.state == "failed" and isinstance(later.error, CheckpointError)
    with pytest.raises(CheckpointError, match="taken over"):
        begin(group, old, 4, TABLES, {})
    late.abandon()
    assert new.checkpoints() == [1]
    assert names_in(Path(new.path)) == ["000000000001", "attempts.json"]


def test_an_error_at_any_step_stays_on_the_thread_and_nothing_half_is_published(tmp_path: Path) -> None:
    group, attempt = SoloGroup(), Attempt.open(SoloGroup(), tmp_path)
    for number, step in enumerate(("write", "write.half", "sync", "publish", "rename"), 1):

        def at(told: str, wanted: str = step) -> None:
            if told == wanted:
                raise RuntimeError(wanted)

        made = begin(group, attempt, number, TABLES, {}, at=at)
        made.start()
        made.wait()
        if made.state == "written":
            made.gather()
            made.wait()
            assert made.published is False
        assert str(made.error) == step
        made.abandon()
        assert attempt.checkpoints() == []
        assert names_in(Path(attempt.path)) == ["attempts.json"]


def test_abandoning_ends_a_writing_in_its_middle(tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def at(step: str) -> None:
        if step == "write":
            reached.set()
            go_on.wait(20)

    attempt = Attempt.open(SoloGroup(), tmp_path)
    made = begin(SoloGroup(), attempt, 1, TABLES, {}, at=at)
    made.start()
    reached.wait(20)
    assert made.state == "writing"
    threading.Timer(0.05, go_on.set).start()
    made.abandon()
    assert made.state == "failed"
    assert names_in(Path(attempt.path)) == ["attempts.json"]


def test_ranks_that_do_not_begin_alike_hear_the_lowest_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, nbytes: int) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(planning, "_make_file", refuse)

    def work(group: Group) -> None:
        tables = {"t": Saved(share(ROWS, group))}
        begin(group, Attempt.open(group, tmp_path), 1, tables, {}, host=str(group.rank))

    assert "no permission" in str(same_error(3, work))
    assert names_in(tmp_path / "attempt-000001") == ["attempts.json"]


def test_a_run_that_is_taken_over_while_it_reads_does_not_call_that_damage(tmp_path: Path) -> None:
    saved(tmp_path, 2, rows_of_every_kind(5))

    class Slow(Attempt):
        def checkpoints(self) -> list[int]:
            found = super().checkpoints()
            Attempt.open(SoloGroup(), tmp_path)
            return found

    attempt = Attempt.open(SoloGroup(), tmp_path)
    found = newest(SoloGroup(), attempt, print)
    assert found is not None
    attempt.__class__ = Slow
    with pytest.raises(CheckpointError, match="another run has taken over"):
        newest(SoloGroup(), attempt, print)
    with pytest.raises(CheckpointError, match="another run has taken over"):
        found.read(next(iter(found.tables)), 0, 5)


def test_what_would_be_too_long_to_be_read_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, rows_of_every_kind(5))
    monkeypatch.setattr(writing, "MOST_BYTES", 1 << 20)
    attempt = Attempt.open(SoloGroup(), tmp_path)
    tables = {"rows": Saved(rows_of_every_kind(5))}
    made = begin(SoloGroup(), attempt, 2, tables, {"long": "x" * (1 << 20)})
    made.run()
    made.gather(blocking=True)
    assert made.published is False and "manifest.json would have" in str(made.error)
    found = newest_here(tmp_path)
    assert found is not None and found.number == 1


def test_without_threads_it_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    save(SoloGroup(), Attempt.open(SoloGroup(), tmp_path), 1, {"rows": Saved(rows_of_every_kind(5))})
    found = newest_here(tmp_path)
    assert found is not None and found.number == 1
