"""Whatever is wrong with an input, all ranks raise one error: what came, what was wanted, what to do."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iterreduce.collectives import Group, SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.errors import DisagreementError, InputError, UsageError
from iterreduce.sources import LocalSource, StackedSource, load, open_source
from iterreduce.sources.agreement import agree
from iterreduce.testing import run_ranks

from .kit import as_nobody, complaint, complaint_about, loaded


def points(folder: Path, name: str = "points.npy") -> Path:
    np.save(folder / "x.npy", np.arange(300.0).reshape(100, 3))
    (folder / "x.npy").rename(folder / name)
    return folder / name


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def h5(path: Path, **columns: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    return path


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    points(tmp_path, "points.npy")
    for name in ("point.npy", "pointss.npy"):
        assert complaint_about(tmp_path / name).endswith(
            f'no file {tmp_path / name}; did you mean "points.npy"?'
        )
    assert "there is no directory" in complaint_about(tmp_path / "nowhere" / "points.npy")
    assert "no file" in complaint_about(tmp_path / "zzz.csv")
    assert "no file" in complaint_about(tmp_path / "words")


def test_an_unknown_suffix_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(UsageError, match=r'no format ends in \.nppy.*did you mean "\.npy"'):
        open_source("points.nppy")
    with pytest.raises(UsageError, match=r"no format ends in \.tar\.gz"):
        open_source("points.tar.gz")


def test_directories_without_fitting_files_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "parts.npy").mkdir()
    assert "has no files that end in .npy; it is empty" in complaint_about(tmp_path / "parts.npy")
    (tmp_path / "parts.npy" / "a.csv").write_text("a\n1\n")
    assert "has no files that end in .npy; it holds a.csv" in complaint_about(tmp_path / "parts.npy")
    assert "no file matches" in complaint_about(tmp_path / "part-*.npy")
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "a.csv").write_text("a\n1\n")
    (tmp_path / "mix" / "b.txt").write_text("a\n1\n")
    assert "holds files of several kinds (.csv, .txt): name one, as in" in complaint_about(tmp_path / "mix")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.xls").write_text("")
    assert "holds no files that can be read; they end in .xls" in complaint_about(tmp_path / "odd")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.parquet", "a.csv"])
def test_an_empty_file_is_said_to_be_empty(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert f"{name} is empty" in complaint_about(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.parquet"])
def test_binary_junk_is_not_taken_for_the_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(bytes(range(1, 200)))
    assert "it begins with" in complaint_about(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "words"])
def test_binary_junk_is_not_taken_for_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"abc\n" * 100 + b"\0" + b"abc\n")
    assert "is not text: it holds a zero byte at offset 400" in complaint_about(tmp_path / name)


def test_a_truncated_npy_tells_how_many_rows_it_holds(tmp_path: Path) -> None:
    path = points(tmp_path)
    cut(path, 128 + 24 * 60 + 5)
    assert "is truncated: its header promises 100 rows of 24 bytes, the file holds 60" in complaint_about(
        path
    )
    cut(path, 40)
    assert "is truncated: it ends within its header" in complaint_about(path)


def test_a_damaged_npy_header_is_refused(tmp_path: Path) -> None:
    for raw in (b"\x93NUMPY\x01\x00\x10\x00{'descr': 1/0}  \n", b"\x93NUMPY\x09\x00\x10\x00" + b" " * 40):
        (tmp_path / "a.npy").write_bytes(raw)
        assert "its header is damaged" in complaint_about(tmp_path / "a.npy")


def test_truncated_npz_hdf5_parquet_and_gzip_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(1000))
    h5(tmp_path / "a.h5", x=np.arange(1000))
    pq.write_table(pa.table({"x": np.arange(1000)}), tmp_path / "a.parquet")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a\n" + bytes(range(48, 58)) * 1000 + b"\n"))
    for name in ("a.npz", "a.h5", "a.parquet", "a.csv.gz"):
        cut(tmp_path / name, (tmp_path / name).stat().st_size * 2 // 3)
        assert "is truncated" in complaint_about(tmp_path / name), name


def test_a_file_with_the_wrong_suffix_is_named_for_what_it_is(tmp_path: Path) -> None:
    h5(tmp_path / "a.h5", x=np.arange(3)).rename(tmp_path / "a.npy")
    assert "a.npy is an HDF5 file, whatever its name says: rename it to end in .h5" in complaint_about(
        tmp_path / "a.npy"
    )
    points(tmp_path, "b.h5")
    assert "b.h5 is a NumPy .npy file, whatever its name says: rename it to end in .npy" in complaint_about(
        tmp_path / "b.h5"
    )
    points(tmp_path, "c.csv")
    assert "c.csv is a NumPy .npy file" in complaint_about(tmp_path / "c.csv")
    (tmp_path / "d.txt").write_bytes(gzip.compress(b"a"))
    assert "d.txt is gzip-compressed, whatever its name says: unpack it first" in complaint_about(
        tmp_path / "d.txt"
    )


def test_python_objects_in_numpy_files_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.arange(1), y=np.array([print], object))
    np.save(tmp_path / "b.npy", np.zeros(1, [("a", "f8"), ("b", "O")]), allow_pickle=True)
    for name in ("a.npy", "a.npz", "b.npy"):
        assert (
            "holds Python objects, which would run code when read; save numbers or text"
            in complaint_about(tmp_path / name)
        )


def test_unequal_lengths_are_listed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.arange(4))
    assert "columns must have one length; rows: x 3, y 4" in complaint_about(tmp_path / "a.npz")
    h5(tmp_path / "a.h5", x=np.arange(3), y=np.arange(4))
    message = complaint_about(tmp_path / "a.h5")
    assert "datasets at / must have one length; rows: x 3, y 4" in message
    assert f"(or name one of them: {tmp_path}/a.h5:/x)" in message


def test_single_values_and_files_without_columns_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.float64(3))
    assert "holds a single value, not rows" in complaint_about(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", k=3)
    assert "a.npz has no columns" in complaint_about(tmp_path / "a.npz")
    h5(tmp_path / "a.h5", **{"run/x": np.arange(3), "k": 3})
    message = complaint_about(tmp_path / "a.h5")
    assert "has no columns at /: wanted datasets with a first axis of rows; it holds groups:" in message
    assert "a.h5:/run" in message
    assert "holds a single value: wanted rows" in complaint_about(f"{tmp_path}/a.h5:/k")


def test_an_unknown_path_in_hdf5_is_answered_with_the_nearest(tmp_path: Path) -> None:
    h5(tmp_path / "a.h5", **{"points/x": np.arange(3)})
    message = complaint_about(f"{tmp_path}/a.h5:/point/x")
    assert 'has no /point/x (it holds: /points, /points/x); did you mean "/points/x"?' in message


def test_types_that_no_column_can_have_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([["a", "b"]]))
    assert "wanted numbers, bools, dates, or one text per row" in complaint_about(tmp_path / "a.npy")
    pq.write_table(pa.table({"s": pa.array([{"a": 1}])}), tmp_path / "a.parquet")
    assert 'column "s" is struct<a: int64>, wanted numbers' in complaint_about(tmp_path / "a.parquet")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("r", (1,), h5py.ref_dtype)
    assert "a.h5:/r holds object: wanted numbers" in complaint_about(tmp_path / "a.h5")


def test_no_rows_are_no_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((0, 3)))
    h5(tmp_path / "a.h5", x=np.zeros((0, 3)))
    pq.write_table(pa.table({"x": pa.array([], pa.float64())}), tmp_path / "a.parquet")
    for name in ("a.npy", "a.h5", "a.parquet"):
        batch, shares, _ = loaded(3, lambda name=name: open_source(tmp_path / name))  # type: ignore[misc]
        assert len(batch) == 0
        assert shares[0].rows_total == 0
        assert batch["x"].dtype == np.float64


@pytest.mark.parametrize("name", ["points.npy", "points.csv"])
def test_a_file_that_changes_between_open_and_read_is_noticed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write: dict[str, Callable[[int], object]] = {
        "points.npy": lambda n: np.save(path, np.arange(n)),
        "points.csv": lambda n: path.write_text("a\n" + "1\n" * n),
    }

    def work(group: Group) -> None:
        if group.rank == 0:
            write[name](1000)
        source = open_source(path)
        source.open(group)
        if name == "points.csv":
            load(group, source)  # what was parsed by open
        agree(group, lambda: None)
        if group.rank == 0:
            write[name](2000)
        agree(group, lambda: None)
        load(group, source)

    assert "changed between open and read" in complaint(work)


def test_what_nobody_may_read_is_said_so(tmp_path: Path) -> None:
    path = points(tmp_path)
    path.chmod(0)
    with as_nobody():
        assert f"no permission to read {path}" in complaint_about(path)


def test_files_of_one_table_that_differ_are_named_with_the_difference(tmp_path: Path) -> None:
    np.save(tmp_path / "1.npy", np.zeros((3, 2)))
    np.save(tmp_path / "2.npy", np.zeros((3, 4)))
    message = complaint_about(tmp_path)
    assert (
        f'{tmp_path}/2.npy differs from {tmp_path}/1.npy: column "x" is float64[4] here and float64[2] there'
        in message
    )
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "c" / "2.csv").write_text("a,c\n1,2\n")
    assert "2.csv differs from" in complaint_about(tmp_path / "c")


def test_an_error_of_one_rank_alone_is_raised_on_all(tmp_path: Path) -> None:
    path = points(tmp_path)

    def work(group: Group) -> None:
        source = open_source(path, block_rows=8)
        source.open(group)
        if group.rank == group.size - 1:
            source.read = lambda lo, hi: (_ for _ in ()).throw(MemoryError("12 GiB"))  # type: ignore[method-assign]
        load(group, source)

    assert complaint(work) == "InputError: MemoryError: 12 GiB"


def test_a_wrong_column_is_answered_with_the_nearest_and_the_list(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", width=np.arange(3), height=np.arange(3))
    text = complaint(lambda group: open_source(tmp_path / "a.npz").columns(["heigth"]).open(group))
    assert text == 'InputError: a.npz: no column "heigth" (columns: width, height); did you mean "height"?'


def test_a_matrix_of_text_or_nulls_is_refused_with_the_column(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.arange(3), name=np.array(["x", "y", "z"]))
    text = complaint(lambda group: StackedSource(open_source(tmp_path / "a.npz")).open(group))
    assert 'a.npz: column "name" is text, wanted numbers; columns that are not numbers: "name"' in text
    pq.write_table(pa.table({"a": [1, 2, 3], "b": [1, None, 3]}), tmp_path / "a.parquet")

    def work(group: Group) -> None:
        source = StackedSource(open_source(tmp_path / "a.parquet"))
        source.open(group)
        load(group, source)

    assert 'a.parquet row 1, column "b": the cell is empty' in complaint(work)


# ---------------------------------------------------------------- rows that ranks hold already


def test_local_rows_stay_where_they_are_and_blocks_end_at_rank_borders() -> None:
    for size in (1, 2, 3, 5, 8):
        rows = [0, 700, 3, 0, 256][:size] + [1] * max(0, size - 5)

        def work(group: Group, rows: list[int] = rows) -> tuple[Batch, int, int, list[int]]:
            source = LocalSource(Batch(x=np.full(rows[group.rank], group.rank)))
            source.open(group)
            got = load(group, source)
            return got.batch, got.first_row, got.rows_total, got.block_starts.tolist()

        for rank, (batch, first, total, starts) in enumerate(run_ranks(size, work)):
            assert batch["x"].tolist() == [rank] * rows[rank]
            assert (first, total) == (sum(rows[:rank]), sum(rows))
            assert starts[-1] == rows[rank]
        if size > 1:
            assert run_ranks(size, work)[1][3] == [0, 256, 512, 700]


def test_local_rows_are_copied_unless_promised_to_stay() -> None:
    x = np.arange(5)
    copied, shared = LocalSource(Batch(x=x)), LocalSource(Batch(x=x), copy=False)
    before = shared.fingerprint()
    for source in (copied, shared):
        source.open(SoloGroup())
    x[0] = 99
    assert load(SoloGroup(), copied).batch["x"].tolist() == [0, 1, 2, 3, 4]
    assert load(SoloGroup(), shared).batch["x"] is x
    assert shared.fingerprint() != before
    assert copied.token != shared.token


@pytest.mark.parametrize(
    ("of_rank_1", "difference"),
    [
        (Batch(x=np.zeros(2, np.int32)), 'column "x" is int32 on rank 1 and float64 on rank 0'),
        (Batch(x=np.zeros((2, 3))), 'column "x" is float64[3] on rank 1 and float64 on rank 0'),
        (Batch(y=np.zeros(2)), 'column "y" is on one side only'),
        (Batch(y=np.zeros(0)), 'column "y" is on one side only'),
    ],
)
def test_ranks_with_different_columns_are_told_which_and_how(of_rank_1: Batch, difference: str) -> None:
    def work(group: Group) -> str:
        source = LocalSource(of_rank_1 if group.rank == 1 else Batch(x=np.zeros(2)))
        with pytest.raises(DisagreementError) as caught:
            source.open(group)
        return str(caught.value)

    assert set(run_ranks(3, work)) == {f"rank 1 holds other columns than rank 0: {difference}"}


def test_a_rank_without_rows_takes_the_types_and_masks_of_the_others() -> None:
    def work(group: Group) -> str:
        rows = Batch.from_dict({"x": np.arange(2), "t": ["a", "b"]}, {"x": np.array([True, False])})
        source = LocalSource(rows if group.rank == 1 else Batch(x=[], t=[]))
        source.open(group)
        return load(group, source).batch.schema.describe()

    assert set(run_ranks(3, work)) == {"x int64?, t text"}


def test_rows_of_another_rank_cannot_be_read() -> None:
    def work(group: Group) -> bool:
        source = LocalSource(Batch(x=np.arange(3)))
        source.open(group)
        with pytest.raises(InputError, match="are rows of another rank"):
            source.read(0, 2)
        return True

    assert all(run_ranks(2, work))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_an_archive_is_told(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "in.npz"
    save(path, k=np.arange(500), v=np.linspace(0, 1, 500))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    for ranks in (1, 3):
        with pytest.raises(InputError, match="is damaged"):
            run_ranks(ranks, lambda group: open_source(str(path)).open(group))
