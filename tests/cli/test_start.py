"""The environment of a process: threads, and a directory for kernels that no other process writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iterreduce import start

HOLD = "import sys; from pathlib import Path; from iterreduce.start import take_cache_slot\n"


def holder(parent: Path, then: str) -> subprocess.Popen[str]:
    code = HOLD + f"slot = take_cache_slot(Path({str(parent)!r}))\nprint(slot, flush=True)\n{then}"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def slot_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def test_users_own_values_stay_and_the_rest_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "take_cache_slot", lambda: tmp_path)
    environment = {"OMP_NUM_THREADS": "4"}
    start.prepare_environment(environment)
    assert environment == {
        "OMP_NUM_THREADS": "4",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    own = {"NUMBA_CACHE_DIR": "/mine"}
    start.prepare_environment(own)
    assert own["NUMBA_CACHE_DIR"] == "/mine"


def test_processes_that_run_at_once_have_different_slots_and_give_them_back(tmp_path: Path) -> None:
    running = [holder(tmp_path, "sys.stdin.read()") for _ in range(4)]
    slots = [slot_of(process) for process in running]
    assert len(set(slots)) == 4 and all(slot.is_dir() for slot in slots)
    for process in running:
        process.communicate("")
    after = holder(tmp_path, "")
    assert slot_of(after).name == "0"
    after.communicate()


def test_a_later_slot_starts_with_the_kernels_of_the_first(tmp_path: Path) -> None:
    save = "(slot / 'app').mkdir(exist_ok=True); (slot / 'app' / 'k.nbi').write_text('%s'); "
    first = holder(tmp_path, save % "one")
    slot_of(first)
    first.communicate()
    keeper = holder(tmp_path, "sys.stdin.read(); " + save % "two")
    assert slot_of(keeper).name == "0"
    second = holder(tmp_path, "")
    slot = slot_of(second)
    second.communicate()
    assert slot.name == "1" and (slot / "app" / "k.nbi").read_text() == "one"
    time.sleep(0.02)
    keeper.communicate("")
    third, fourth = holder(tmp_path, "sys.stdin.read()"), None
    assert slot_of(third).name == "0"
    fourth = holder(tmp_path, "")
    assert (slot_of(fourth) / "app" / "k.nbi").read_text() == "two"
    fourth.communicate()
    third.communicate("")


def test_a_directory_that_others_may_write_is_not_trusted(tmp_path: Path) -> None:
    base = tmp_path / f"iterreduce-numba-{os.getuid()}-{start._installation()}"
    base.mkdir()
    base.chmod(0o777)
    slot = start.take_cache_slot(tmp_path)
    assert slot.parent != base and slot.is_dir()
    slot.rmdir()


def test_the_launchers_rank_is_known_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in start._RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert start.launched_rank() == 0
    monkeypatch.setenv("PMI_RANK", "3")
    assert start.launched_rank() == 3
