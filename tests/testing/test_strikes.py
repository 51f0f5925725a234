"""Each fault alone does what it says: to ranks as threads, to real processes, to files and calls."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.errors import InputError, UsageError
from iterreduce.events import PLACES, Events
from iterreduce.options import Options
from iterreduce.run import run_loop
from iterreduce.testing import (
    Delay,
    DeleteFile,
    Died,
    FailCall,
    FailRename,
    Fault,
    Faults,
    FillDisk,
    FlipBit,
    Kill,
    Raise,
    Slow,
    Stop,
    TearFile,
    ThreadRanksBroken,
    damage,
    run_ranks,
    striking,
)
from tests.launch import ROOT, mpirun

SIZES = (1, 2, 3, 5, 8)
EVERYWHERE = [
    "run.start",
    "load",
    "iteration.start",
    "stage.start:*Shuffle*",
    "exchange.ready",
    "exchange.done",
    "stage.end",
    "control.ready",
    "commit.start",
    "iteration.commit",
    "run.end",
]


def spread(cells: ir.Batch) -> ir.Batch:
    left, right = (cells["cell"] - 1) % 20, (cells["cell"] + 1) % 20
    return ir.Batch(cell=np.concatenate([left, right]), heat=np.concatenate([cells["heat"]] * 2) / 2)


def warming(group: Group, iterations: int = 4) -> ir.Loop:
    """A state that lies by key, and one exchange in each iteration."""
    mine = np.arange(20)[group.rank :: group.size]
    cells = ir.Dataset.from_local(group, cell=mine, heat=mine.astype(float))
    loop = ir.MapReduce(map=spread, reduce=ir.SUM, key="cell").iterate(
        state=cells, state_key="cell", until=ir.linf("heat") <= 0, max_iterations=iterations
    )
    return loop.to_loop()


def struck_run(group: Group, faults: Faults, seen: list[str] | None = None) -> list[str]:
    """A run of four iterations with these faults, and what struck on this rank. Collective."""
    events = Events()
    if seen is not None:
        events.subscribe(lambda event: seen.append(event.name))
    with striking(faults, events, group) as struck:
        run_loop(warming(group), group, Options(), events)
    return struck


def emitted(fault: Fault, *events: tuple[str, dict[str, Any]], rank: int = 0) -> list[str]:
    """What strikes while these events are emitted, on a rank that is alone."""
    told = Events()
    with striking(Faults((fault,)), told) as struck:
        for name, fields in events:
            told.emit(name, **fields)
    assert not told.active and not told.places
    return struck


# ------------------------------------------------------------------------------- ranks as threads


@pytest.mark.parametrize("place", EVERYWHERE)
@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_dies_at_any_place_ends_the_ranks_and_nobody_hangs(size: int, place: str) -> None:
    ends: dict[int, BaseException] = {}

    def work(group: Group) -> None:
        try:
            struck_run(group, Faults((Kill(at=place, rank=size // 2),)))
        except BaseException as error:
            ends[group.rank] = error
            raise

    with pytest.raises(Died, match="Kill"):
        run_ranks(size, work, timeout=30)
    assert isinstance(ends.pop(size // 2), Died)
    assert all(isinstance(error, ThreadRanksBroken) for error in ends.values())
    assert place == "run.end" or len(ends) == size - 1  # who stood behind the last collective may be done


@pytest.mark.parametrize("size", SIZES)
def test_the_dead_do_nothing_more(size: int) -> None:
    seen: list[list[str]] = [[] for _ in range(size)]

    def work(group: Group) -> None:
        struck_run(group, Faults((Kill(at="iteration.start", iteration=2),)), seen[group.rank])

    with pytest.raises(Died):
        run_ranks(size, work, timeout=30)
    for names in seen:
        assert (
            names.count("iteration.commit") == 1
            and "stage.start" not in names[names.index("iteration.commit") :]
        )


@pytest.mark.parametrize("place", EVERYWHERE)
@pytest.mark.parametrize("size", [1, 3])
def test_an_exception_at_any_place_is_the_same_error_on_all_ranks(size: int, place: str) -> None:
    def work(group: Group) -> str:
        with pytest.raises(InputError) as error:
            struck_run(group, Faults((Raise("InputError", "no more", at=place, rank=size - 1),)))
        struck_run(group, Faults())  # the communicator is clean
        return str(error.value)

    said = run_ranks(size, work, timeout=30)
    assert set(said) == {said[0]} and "no more" in said[0]


def test_the_nth_place_of_an_iteration_counts_on_each_rank_alone() -> None:
    def work(group: Group) -> list[str]:
        faults = Faults(
            (Slow(0.0, at="stage.start", nth=3, every=2), Delay(0.0, at="commit.start", iteration=3))
        )
        return struck_run(group, faults)

    for rank, struck in enumerate(run_ranks(3, work)):
        assert len(struck) == 2 and all(text.endswith(f"on rank {rank}") for text in struck)


def test_a_slow_rank_changes_no_result_and_a_late_one_neither() -> None:
    def work(group: Group, *faults: Fault) -> str:
        events = Events()
        with striking(Faults(faults), events, group):
            return run_loop(warming(group), group, Options(), events).result_sha256

    slow = Slow(0.01, at="stage.start", rank=1), Delay(0.05, at="exchange.ready", rank=2, iteration=2)
    assert run_ranks(3, work, *slow) == run_ranks(3, work)


@pytest.mark.parametrize(
    "fault",
    [
        Stop(at="run.start"),
        Kill(at="run.start", delay=0.1),
        Kill("SIGTERM", at="run.start"),
        FailCall(rank=1),
    ],
)
def test_what_threads_cannot_have_is_refused_on_all_of_them(fault: Fault) -> None:
    with pytest.raises(UsageError, match="thread"):
        run_ranks(2, lambda group: struck_run(group, Faults((fault,))))


def test_events_that_only_mark_places_are_emitted_for_those_who_ask_alone() -> None:
    def work(group: Group) -> tuple[list[str], list[str]]:
        with_faults: list[str] = []
        without: list[str] = []
        struck_run(group, Faults(), with_faults)
        events = Events()
        events.subscribe(lambda event: without.append(event.name))
        run_loop(warming(group), group, Options(), events)
        return with_faults, without

    ((with_faults, without),) = run_ranks(1, work)
    of_saving = {"checkpoint.start", "restart.start"}
    assert set(with_faults) >= PLACES - of_saving and not PLACES & set(without)
    assert [name for name in with_faults if name not in PLACES] == without
    once = with_faults[with_faults.index("iteration.start") :][:8]
    assert once == [
        "iteration.start", "stage.start", "exchange.ready", "exchange.done", "stage.end", "control.ready",
        "commit.start", "iteration.commit",
    ]  # fmt: skip


# ------------------------------------------------------------------------------- real processes

KILLED = """
import sys
from iterreduce.events import Events
from iterreduce.testing import Faults, striking
events = Events()
with striking(Faults.from_json(sys.argv[1]), events):
    events.emit("run.start", name="it")
    print("alive", flush=True)
    import time
    time.sleep(float(sys.argv[2]))
"""


def process(fault: Fault, seconds: float = 0.0, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, Faults((fault,), **more).to_json(), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_process_is_killed_by_the_signal_that_the_fault_names_and_says_so(name: str) -> None:
    run = process(Kill(name, at="run.start"))
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (-signal.Signals[name], "")
    assert err.startswith("iterreduce.testing: Kill(at='run.start'")


def test_a_kill_with_a_delay_strikes_later_wherever_the_process_is() -> None:
    run = process(Kill(at="run.start", delay=0.05), seconds=60)
    out, _ = run.communicate(timeout=60)
    assert (run.returncode, out) == (-signal.SIGKILL, "alive\n")


def test_a_stopped_process_does_nothing_until_it_is_continued() -> None:
    run = process(Stop(at="run.start"))
    _, status = os.waitpid(run.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    os.kill(run.pid, signal.SIGCONT)
    out, _ = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "alive\n")


def test_a_process_that_is_stopped_for_a_time_goes_on_by_itself() -> None:
    run = process(Stop(0.1, at="run.start"))
    out, _ = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "alive\n")


def test_with_marks_a_fault_strikes_in_the_first_process_only(tmp_path: Path) -> None:
    for expected in (-signal.SIGKILL, 0):
        run = process(Kill(at="run.start"), marks=str(tmp_path))
        run.communicate(timeout=60)
        assert run.returncode == expected
    assert [path.name for path in tmp_path.iterdir()] == ["fault-000-rank-0"]


APP = """
import numpy as np
import iterreduce as ir

def spread(cells):
    cell = np.concatenate([cells["cell"] - 1, cells["cell"] + 1]) % 20
    return ir.Batch(cell=cell, heat=np.concatenate([cells["heat"]] * 2) / 2)

@ir.app
def warm(cells: ir.Dataset) -> ir.Dataset:
    job = ir.MapReduce(map=spread, reduce=ir.SUM, key="cell")
    return job.iterate(state=cells, state_key="cell", until=ir.linf("heat") <= 0, max_iterations=4)
"""


@pytest.fixture
def app(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "app.py").write_text(APP)
    np.savez(tmp_path / "cells.npz", cell=np.arange(20), heat=np.arange(20.0))
    return str(tmp_path / "app.py"), str(tmp_path / "cells.npz")


@pytest.mark.parametrize("place", ["exchange.ready", "commit.start"])
def test_a_rank_of_a_real_launcher_is_killed_where_the_environment_says(
    app: tuple[str, str], place: str
) -> None:
    faults = Faults((Kill(at=place, rank=1, iteration=3),))
    result = mpirun(2, "-m", "iterreduce", *app, env={"ITERREDUCE_TEST_FAULTS": faults.to_json()})
    assert result.returncode != 0
    assert result.stderr.count("iterreduce.testing: ") == 1
    assert f"Kill(at='{place}', rank=1, iteration=3) on rank 1" in result.stderr


def test_faults_of_the_environment_that_are_none_end_the_run_with_one_message(app: tuple[str, str]) -> None:
    wrong = '{"faults": [{"fault": "Kill", "at": "exchange.redy"}]}'
    result = mpirun(2, "-m", "iterreduce", *app, env={"ITERREDUCE_TEST_FAULTS": wrong})
    assert result.returncode == 1
    assert result.stderr.count('did you mean "exchange.ready"?') == 1 and "Traceback" not in result.stderr


# ------------------------------------------------------------------------------- files


def test_a_file_is_torn_to_the_bytes_that_are_kept(tmp_path: Path) -> None:
    for keep, left in ((3, 3), (-1, 9), (99, 10), (-99, 0)):
        file = tmp_path / "torn"
        file.write_bytes(bytes(range(10)))
        struck = emitted(TearFile(str(file), keep, at="restart"), ("restart", {}))
        assert file.read_bytes() == bytes(range(left))
        assert struck[-1].endswith(f"{file} has {left} of 10 bytes left")


def test_one_bit_is_turned_over_and_turning_it_again_mends_it(tmp_path: Path) -> None:
    file = tmp_path / "flipped"
    for fault in (FlipBit(str(file), byte=-2, bit=7, at="restart"), FlipBit(str(file), at="restart")):
        file.write_bytes(bytes(10))
        emitted(fault, ("restart", {}))
        assert sum(byte.bit_count() for byte in file.read_bytes()) == 1
        assert fault.byte is None or file.read_bytes()[8] == 128
        emitted(fault, ("restart", {}))
        assert file.read_bytes() == bytes(10)


def test_the_seed_decides_what_a_file_fault_leaves_open(tmp_path: Path) -> None:
    file = tmp_path / "file"
    left = []
    for seed in (1, 1, 2):
        file.write_bytes(bytes(100_000))
        damage(TearFile(str(file), at="restart"), seed)
        left.append(file.stat().st_size)
    assert left[0] == left[1] != left[2]


def test_of_the_files_that_fit_the_last_is_deleted_and_a_directory_with_all_that_is_in_it(
    tmp_path: Path,
) -> None:
    for number in (7, 8):
        (tmp_path / f"attempt-{number}" / "12").mkdir(parents=True)
        (tmp_path / f"attempt-{number}" / "12" / "data").touch()
    pattern = DeleteFile(f"{tmp_path}/attempt-*/*", at="restart")
    emitted(pattern, ("restart", {}))
    assert (tmp_path / "attempt-7" / "12").exists() and not (tmp_path / "attempt-8" / "12").exists()
    emitted(pattern, ("restart", {}))
    assert not (tmp_path / "attempt-7" / "12").exists()
    assert emitted(pattern, ("restart", {}))[-1].endswith("no such file")


# ------------------------------------------------------------------------------- calls


def write_all(path: Path, data: bytes) -> None:
    """As a careful program does: the rest of a short write is written next."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], done)
        os.fsync(fd)
    finally:
        os.close(fd)


def test_a_disk_fills_up_after_so_many_bytes_for_files_of_the_pattern(tmp_path: Path) -> None:
    events, full = Events(), FillDisk(1000, path="*/saved/*")
    (tmp_path / "saved").mkdir()
    with striking(Faults((full,)), events):
        write_all(tmp_path / "saved" / "before", bytes(5000))  # nothing was emitted yet
        events.emit("run.start", name="it")
        write_all(tmp_path / "other", bytes(5000))
        write_all(tmp_path / "saved" / "fits", bytes(400))
        for _ in range(2):
            with pytest.raises(OSError) as error:
                write_all(tmp_path / "saved" / "torn", bytes(601))
            assert error.value.errno == errno.ENOSPC
        assert os.statvfs(tmp_path / "saved").f_bavail > 0
    write_all(tmp_path / "saved" / "after", bytes(5000))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "saved").iterdir()}
    assert sizes == {"before": 5000, "fits": 400, "torn": 0, "after": 5000}


def test_a_file_system_may_tell_beforehand_that_it_is_nearly_full(tmp_path: Path) -> None:
    events = Events()
    with striking(Faults((FillDisk(10_000, told=True),)), events):
        events.emit("run.start", name="it")
        found = os.statvfs(tmp_path)
        assert 0 <= 10_000 - found.f_bavail * found.f_frsize < found.f_frsize
    assert os.statvfs(tmp_path) != found


def test_calls_fail_as_often_as_asked_for_and_then_work_again(tmp_path: Path) -> None:
    events = Events()
    with striking(Faults((FailCall("fsync", "EIO", first=2, times=2), FailRename(path="*/new"))), events):
        events.emit("run.start", name="it")
        said = []
        for _ in range(4):
            try:
                write_all(tmp_path / "file", b"x")
                said.append(0)
            except OSError as error:
                said.append(error.errno or 0)
        assert said == [0, errno.EIO, errno.EIO, 0]
        os.rename(tmp_path / "file", tmp_path / "other")
        with pytest.raises(OSError):
            os.rename(tmp_path / "other", tmp_path / "new")
    os.rename(tmp_path / "other", tmp_path / "new")


LIMITED = """
import sys
from iterreduce.events import Events
from iterreduce.testing import Faults, LimitFileSize, striking
events = Events()
with striking(Faults((LimitFileSize(5000),)), events):
    events.emit("run.start", name="it")
    try:
        with open(sys.argv[1], "wb") as file:
            file.write(bytes(5001))
    except OSError as error:
        print(error.errno)
"""


def test_the_operating_system_itself_refuses_files_beyond_a_limit(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert found.stdout.split() == [str(errno.EFBIG)], found.stderr
    assert (tmp_path / "file").stat().st_size <= 5000
