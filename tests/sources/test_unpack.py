"""Packed text: one rank unpacks each file, all get their blocks, and damage is one error for all."""

from __future__ import annotations

import gzip
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iterreduce.collectives import Group
from iterreduce.errors import IterReduceError
from iterreduce.sources import load, open_source, release, unpack
from iterreduce.testing import run_ranks

from .kit import SIZES, complaint_about, loaded, opened


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "ROUND_BYTES", 1000)


def _texts(folder: Path) -> list[str]:
    """Three packed files and a plain one between them; their lines."""
    rng = np.random.default_rng(0)
    lines: list[str] = []
    for number, count in enumerate((700, 0, 300, 5)):
        mine = [f"{number} {'x' * n}" for n in rng.integers(0, 90, count)]
        raw = "".join(line + "\n" for line in mine).encode()
        plain = number == 2
        name = folder / f"{number}.txt{'' if plain else '.gz'}"
        name.write_bytes(raw if plain else gzip.compress(raw[:4000]) + gzip.compress(raw[4000:]))
        lines += mine
    return lines


@pytest.mark.usefixtures("small_rounds")
@pytest.mark.parametrize("size", SIZES)
def test_packed_files_are_dealt_to_all_ranks_in_bounded_rounds(tmp_path: Path, size: int) -> None:
    lines = _texts(tmp_path)
    batch, _, _ = loaded(size, lambda: open_source(tmp_path, block_bytes=512))
    assert batch["line"].to_list() == lines


@pytest.mark.usefixtures("small_rounds")
def test_each_packed_file_is_read_by_one_rank_and_no_rank_holds_more_than_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _texts(tmp_path)
    opened_by: list[str] = []
    read_on = unpack.Stream._read_on

    def counted(self: unpack.Stream, lo: int, out: Any) -> int:
        if self._file is None:
            opened_by.append(self.path)
        return read_on(self, lo, out)

    monkeypatch.setattr(unpack.Stream, "_read_on", counted)

    def work(group: Group) -> int:
        source = open_source(tmp_path, block_bytes=512)
        source.open(group)
        text = source.source  # type: ignore[attr-defined]
        held = sum(len(part) for _, part in text._dealt.values())
        load(group, source)
        assert not text._dealt
        return held

    held = run_ranks(3, work)
    assert sorted(opened_by) == sorted(set(opened_by)), "each file once"
    total = sum(len(gzip.decompress(p.read_bytes())) for p in tmp_path.glob("*.gz"))
    assert max(held) <= total / 3 + 2 * 1024 + 3 * (1 << 16)


def test_blocks_are_read_again_after_release_and_in_any_order(tmp_path: Path) -> None:
    lines = _texts(tmp_path)
    source = opened(open_source(tmp_path, block_bytes=512))
    count = source.blocks.count
    backwards = [source.read(b, b + 1)["line"].to_list() for b in reversed(range(count))]
    release(source)
    forwards = [source.read(b, b + 1)["line"].to_list() for b in range(count)]
    assert list(chain(*forwards)) == list(chain(*backwards[::-1])) == lines


@pytest.mark.parametrize("size", SIZES)
def test_a_damaged_archive_is_one_error_on_all_ranks(tmp_path: Path, size: int) -> None:
    rng = np.random.default_rng(1)
    raw = b"".join(b"%d %d\n" % (a, b) for a, b in rng.integers(0, 10**9, (20_000, 2)))
    whole = gzip.compress(raw)
    (tmp_path / "a.txt.gz").write_bytes(whole)
    for name, data in (
        ("b", whole[:-4000]),
        ("c", whole[: len(whole) // 2] + b"\0" * 9 + whole[len(whole) // 2 + 9 :]),
        ("d", whole[:-8] + b"12345678"),
        ("e", whole[:6]),
    ):
        (tmp_path / "b.txt.gz").write_bytes(data)
        told = complaint_about(tmp_path, size)
        assert "b.txt.gz is truncated or damaged" in told, (name, told)


@pytest.mark.usefixtures("small_rounds")
@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_rank_that_cannot_read_on_says_so_in_its_round(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _texts(tmp_path)
    read_on = unpack.Stream._read_on

    def failing(self: unpack.Stream, lo: int, out: Any) -> int:
        if lo >= 5000:
            raise OSError("the disk is gone")
        return read_on(self, lo, out)

    monkeypatch.setattr(unpack.Stream, "_read_on", failing)

    def work(group: Group) -> str:
        try:
            open_source(tmp_path, block_bytes=512).open(group)
        except IterReduceError as error:
            assert group.agree_max(group.rank) == group.size - 1, "the group is usable"
            return str(error)
        return "no error"

    (told,) = set(run_ranks(size, work))
    assert "0.txt.gz is truncated or damaged: the disk is gone" in told


def test_a_packed_table_is_dealt_like_lines(tmp_path: Path, small_rounds: None) -> None:
    rows = "".join(f'{i},"a\n{i}"\n' for i in range(800))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(f"n,text\n{rows}".encode()))
    for size in (1, 3, 5):
        batch, _, _ = loaded(size, lambda: open_source(tmp_path / "t.csv.gz", block_bytes=300))
        assert batch["n"].tolist() == list(range(800))
        assert batch["text"].to_list() == [f"a\n{i}" for i in range(800)]
