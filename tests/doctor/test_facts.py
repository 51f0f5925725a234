"""What `doctor` sees of a node, from files that stand in for a node's own."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from iterreduce.doctor import facts
from iterreduce.supervising.processes import left_behind


def test_a_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    place = tmp_path / "with space" / "inner"
    place.mkdir(parents=True)
    mounts = tmp_path / "mounts"
    escaped = str(tmp_path / "with space").replace(" ", "\\040")
    mounts.write_text(f"d / ext4 rw 0 0\nn {escaped} nfs4 rw 0 0\nt {tmp_path}/with tmpfs rw 0 0\n")
    assert facts.file_system(str(place), str(mounts)) == "nfs4"
    assert facts.file_system("/", str(mounts)) == "ext4"
    assert facts.file_system("/", str(tmp_path / "none")) == "unknown"


@pytest.mark.parametrize(
    ("name", "files", "cores"),
    [
        ("new", {"cpu.max": "150000 100000"}, 1.5),
        ("new without a limit", {"cpu.max": "max 100000"}, None),
        ("old", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ("old without a limit", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("none", {}, None),
    ],
)
def test_cores_that_a_control_group_grants(
    name: str, files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert facts.quota(str(tmp_path)) == cores


def test_a_directory_that_is_not_there_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    found = facts.place(str(tmp_path / "a" / "b"))
    assert found.writable and found.made_in == str(tmp_path) and found.free is not None
    assert facts.place(str(tmp_path)).made_in is None


def test_shared_memory_that_a_process_has_mapped_is_not_left_behind(tmp_path: Path) -> None:
    import mmap

    for name in ("mpich_shm_1", "mpich_shm_2", "other"):
        (tmp_path / name).write_bytes(b"\0" * mmap.PAGESIZE)
    with open(tmp_path / "mpich_shm_2", "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert left_behind(str(tmp_path)) == ["mpich_shm_1"]
    assert left_behind(str(tmp_path / "none")) == []


def test_a_program_that_fails_or_hangs_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "ASK_SECONDS", 0.5)
    began = time.monotonic()
    assert facts.ask(sys.executable, "-c", "import time; time.sleep(60)") == ""
    assert time.monotonic() - began < 20
    assert facts.ask(sys.executable, "-c", "raise SystemExit(1)") == ""
    assert facts.ask("there-is-no-such-program") == ""
