"""Results: what is written is what is read, on any number of ranks, and a file is whole or not there."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from iterreduce.collectives import Group, SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Ragged
from iterreduce.errors import DisagreementError, OutputError, SchemaError, UsageError
from iterreduce.sources import RowWriter, check_output, write_result, write_text, write_text_blocks
from iterreduce.testing import run_ranks

from .kit import SIZES, as_nobody, complaint, read

ROWS = 997
RNG = np.random.default_rng(3)
FULL = Batch.from_dict(
    {
        "id": np.arange(ROWS),
        "x": RNG.random((ROWS, 2)) * 10.0 ** RNG.integers(-300, 300, (ROWS, 2)),
        "word": [["plain", 'sa"y', "a,b", "ä\n", " blank ", ""][i % 6] for i in range(ROWS)],
        "part": RNG.random(ROWS),
    },
    {"part": np.arange(ROWS) % 5 > 0},
)
FORMATS = [".npy", ".npz", ".h5", ".csv", ".tsv", ".parquet"]


def share(batch: Batch, group: Group) -> Batch:
    return batch.slice(len(batch) * group.rank // group.size, len(batch) * (group.rank + 1) // group.size)


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_written_is_read_again_on_any_number_of_ranks(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    contents = set()
    for size in SIZES:
        run_ranks(size, lambda group: write_result(group, path, share(FULL, group), round_bytes=3000))
        got = read(path, 2).select(*FULL.names)
        if suffix == ".npy":  # no masks there: NaN
            valid = np.arange(ROWS) % 5 > 0
            assert np.isnan(got["part"][~valid]).all()
            got = got.with_valid(part=valid)
        assert got.equals(FULL)
        if suffix != ".parquet":
            contents.add(path.read_bytes())
        assert os.listdir(tmp_path) == [path.name]
    assert len(contents) <= 1, "the same bytes whoever held the rows"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_result_without_rows_still_has_its_columns(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    run_ranks(2, lambda group: write_result(group, path, FULL.slice(0, 0)))
    got = read(path)
    assert len(got) == 0
    assert got.names == FULL.names


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_result_that_all_ranks_hold_is_written_once(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    centroids = Batch(x=np.arange(6.0).reshape(3, 2))
    run_ranks(3, lambda group: write_result(group, path, centroids, everywhere=True))
    assert read(path).equals(centroids)


def test_other_programs_can_read_the_files(tmp_path: Path) -> None:
    batch = FULL.select("id", "x", "word").slice(0, 50)
    for suffix in FORMATS:
        write_result(SoloGroup(), tmp_path / f"out{suffix}", batch)
    npz = np.load(tmp_path / "out.npz", allow_pickle=False)
    npy = np.load(tmp_path / "out.npy", allow_pickle=False)
    words = batch["word"].to_list()
    for found in (npz, npy):
        assert np.array_equal(found["x"], batch["x"])
        assert found["word"].tolist() == words
    with h5py.File(tmp_path / "out.h5") as file:
        assert np.array_equal(file["x"][:], batch["x"])
        assert file["word"].asstr()[:].tolist() == words
        assert list(file) == ["id", "x", "word"]
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["x"].to_pylist() == batch["x"].tolist()
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "id,x[0],x[1],word"


def test_one_plain_column_makes_a_plain_array(tmp_path: Path) -> None:
    write_result(SoloGroup(), tmp_path / "x.npy", Batch(x=np.arange(6).reshape(3, 2)))
    assert np.load(tmp_path / "x.npy").tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("suffix", [".h5", ".parquet"])
def test_lists_bytes_dates_and_null_text_survive(suffix: str, tmp_path: Path) -> None:
    lists = Ragged(np.array([0, 2, 2, 5]), np.arange(5), "list")
    batch = Batch.from_dict(
        {"l": lists, "b": [b"\0a", b"", b"c"], "d": np.arange(3).astype("M8[ms]"), "t": ["a", "", "c"]},
        {"t": np.array([True, False, True])},
    )
    run_ranks(2, lambda group: write_result(group, tmp_path / f"out{suffix}", share(batch, group)))
    got = read(tmp_path / f"out{suffix}")
    assert [r.tolist() for r in got["l"].to_list()] == [[0, 1], [], [2, 3, 4]]
    assert got.select("b", "d", "t").equals(batch.select("b", "d", "t"))


@pytest.mark.parametrize("suffix", [".h5", ".parquet"])
@pytest.mark.parametrize("lengths", [[2, 2, 2], [1, 1], [1], [0, 0], [1, 2]])
def test_lists_and_bytes_of_one_length_survive(suffix: str, lengths: list[int], tmp_path: Path) -> None:
    offsets = np.cumsum([0, *lengths])
    lists = Ragged(offsets, np.arange(offsets[-1]), "list")
    raw = Ragged(offsets, np.arange(offsets[-1]).astype(np.uint8), "bytes")
    batch = Batch(l=lists, b=raw)
    run_ranks(2, lambda group: write_result(group, tmp_path / f"out{suffix}", share(batch, group)))
    got = read(tmp_path / f"out{suffix}")
    assert [r.tolist() for r in got["l"].to_list()] == [r.tolist() for r in lists.to_list()]
    assert got.select("b").equals(batch.select("b"))


def test_a_single_nullable_column_of_csv_keeps_its_rows(tmp_path: Path) -> None:
    for column in (np.array([1, 0, 3]), ["a", "", "c"]):
        batch = Batch.from_dict({"v": column}, {"v": np.array([True, False, True])})
        write_result(SoloGroup(), tmp_path / "v.csv", batch)
        assert read(tmp_path / "v.csv").equals(batch)


def test_what_a_format_cannot_hold_is_said_with_one_that_can(tmp_path: Path) -> None:
    lists = Batch(l=Ragged(np.array([0, 2]), np.arange(2), "list"))
    hidden = Batch.from_dict({"n": np.arange(2)}, {"n": np.array([True, False])})
    for suffix in (".npy", ".npz", ".csv"):
        text = complaint(lambda group, s=suffix: write_result(group, f"{tmp_path}/o{s}", lists))  # type: ignore[misc]
        assert 'column "l" holds lists' in text
        assert "write .h5 or .parquet" in text
    text = complaint(lambda group: write_result(group, tmp_path / "o.npy", hidden))
    assert 'column "n" has empty rows, which .npy cannot hold; write .npz, .h5 or .csv' in text
    assert os.listdir(tmp_path) == []
    said_to_be = Batch.from_dict({"t": ["b", "ab"]}, {"t": np.array([True, True])})
    write_result(SoloGroup(), tmp_path / "o.npy", said_to_be)  # no row is null, whatever the type says
    assert np.load(tmp_path / "o.npy").tolist() == ["b", "ab"]


def test_ranks_with_different_columns_write_nothing(tmp_path: Path) -> None:
    def work(group: Group) -> bool:
        with pytest.raises(DisagreementError, match="rank 1 holds other columns than rank 0"):
            write_result(
                group, tmp_path / "o.csv", Batch(x=np.zeros(2)) if group.rank else Batch(y=np.zeros(2))
            )
        return True

    assert all(run_ranks(2, work))
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- before and during trouble


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with pytest.raises(UsageError, match=r'ends in \.npzz: wanted one of .*did you mean "\.npz"'):
        check_output(tmp_path / "a.npzz")
    with pytest.raises(UsageError, match="has no suffix: wanted one of"):
        check_output(tmp_path / "a")
    with pytest.raises(
        OutputError, match=r'there is no directory .*; create it first; did you mean "results"'
    ):
        check_output(tmp_path / "result" / "a.npy")
    (tmp_path / "d.npy").mkdir()
    with pytest.raises(OutputError, match="is a directory: wanted the name of a file in it"):
        check_output(tmp_path / "d.npy")
    (tmp_path / "results").chmod(0o500)
    with as_nobody(), pytest.raises(OutputError, match="no permission to write there"):
        check_output(tmp_path / "results" / "a.npy")
    check_output(tmp_path / "a.npy")
    assert sorted(os.listdir(tmp_path)) == ["d.npy", "results"]


def test_a_disk_without_room_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.statvfs(tmp_path)
    small = os.statvfs_result((*found[:4], 0, *found[5:]))
    monkeypatch.setattr("iterreduce.sources.write.os.statvfs", lambda path: small)
    text = complaint(lambda group: write_result(group, tmp_path / "o.csv", FULL))
    assert "the disk has 0 MiB left, the result needs about" in text
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_disk_that_fills_up_leaves_the_previous_file_and_no_part(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"out{suffix}"
    write_result(SoloGroup(), path, Batch(x=np.arange(3)))
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("iterreduce.storage.os.fsync", full)
    text = complaint(lambda group: write_result(group, path, share(FULL, group)))
    assert "the disk is full; no partial file is left, and what stood there before is unchanged" in text
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet", ".h5"])
def test_a_write_that_fails_half_way_leaves_no_part(suffix: str, tmp_path: Path) -> None:
    big = Batch(x=np.random.default_rng(0).random((60_000, 2)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        text = complaint(
            lambda group: write_result(group, f"{tmp_path}/o{suffix}", share(big, group), round_bytes=50_000)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert text.startswith("OutputError:")
    assert "could not be written" in text
    assert os.listdir(tmp_path) == []


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(f"{tmp_path}/s.json", "{}")
    write_text(f"{tmp_path}/s.json", '{"ä": 1}')
    assert (tmp_path / "s.json").read_text(encoding="utf-8") == '{"ä": 1}'
    assert (tmp_path / "s.json").stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(OutputError, match="there is no directory"):
        write_text(f"{tmp_path}/no/s.json", "{}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------- files that all ranks write


@pytest.mark.parametrize("suffix", [".npy", ".h5"])
def test_rows_written_in_parallel_have_the_same_bytes_on_any_number_of_ranks(
    suffix: str, tmp_path: Path
) -> None:
    batch = FULL.select("id", "x").with_columns(flag=np.arange(ROWS) % 2 == 0, f=np.zeros(ROWS, np.float32))
    path = tmp_path / f"rows{suffix}"

    def work(group: Group) -> None:
        with RowWriter(group, path, batch.schema, ROWS) as file:
            for piece in reversed(range(group.rank, 20, group.size)):
                file.write(piece * 50, batch.slice(piece * 50, piece * 50 + 50))

    contents = set()
    for size in SIZES:
        run_ranks(size, work)
        assert read(path, 3).equals(batch)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_parallel_rows_refuse_what_does_not_fit(tmp_path: Path) -> None:
    schema = Batch(x=np.zeros(1)).schema
    with pytest.raises(UsageError, match=r"can be written in parallel to \.npy and \.h5, not to \.csv"):
        RowWriter(SoloGroup(), tmp_path / "a.csv", schema, 3)
    with pytest.raises(UsageError, match='column "t" is text; wanted columns of one length'):
        RowWriter(SoloGroup(), tmp_path / "a.h5", Batch(t=["a"]).schema, 3)
    for first, rows in ((2, Batch(x=np.zeros(2))), (0, Batch(x=np.zeros(2, int)))):
        with pytest.raises(SchemaError), RowWriter(SoloGroup(), tmp_path / "a.npy", schema, 3) as file:
            file.write(first, rows)
    assert os.listdir(tmp_path) == []


def test_a_rank_that_fails_while_all_write_leaves_no_file_and_no_hang(tmp_path: Path) -> None:
    schema = Batch(x=np.zeros(1)).schema

    def work(group: Group) -> str:
        try:
            with RowWriter(group, tmp_path / "a.h5", schema, 30) as file:
                file.write(group.rank, Batch(x=np.zeros(1)))
                if group.rank == 1:
                    raise KeyError("here")
        except (KeyError, OutputError) as error:
            return f"{type(error).__name__}: {error}"
        return "written"

    told = run_ranks(3, work)
    assert told[1] == "KeyError: 'here'"
    assert told[0] == told[2] == f"OutputError: {tmp_path}/a.h5 was not written: KeyError: 'here'"
    assert os.listdir(tmp_path) == []


def test_blocks_of_text_stand_in_order_whoever_made_them(tmp_path: Path) -> None:
    def make(block: int) -> bytes:
        return b"".join(b"%d\n" % (block * 100 + i) for i in range(block % 3))

    want = b"n\n" + b"".join(map(make, range(11)))
    for size in SIZES:
        ends = run_ranks(size, write_text_blocks, tmp_path / "t.csv", 11, make, header=b"n\n")
        assert set(ends) == {len(want)}
        assert (tmp_path / "t.csv").read_bytes() == want


def test_a_block_that_cannot_be_made_fails_on_all_ranks(tmp_path: Path) -> None:
    def make(block: int) -> bytes:
        if block == 4:
            raise ValueError("no such block")
        return b"x\n"

    text = complaint(lambda group: write_text_blocks(group, tmp_path / "t.txt", 9, make))
    assert "ValueError: no such block" in text
    assert os.listdir(tmp_path) == []
