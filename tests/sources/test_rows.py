"""Files of known length: .npy, .npz, .h5 and .parquet give the rows that NumPy and pyarrow put there."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iterreduce.collectives import SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.sources import StackedSource, load, open_source
from iterreduce.sources.blocks import Blocks, block_bytes_for, block_rows_for

from .kit import SIZES, complaint_about, loaded, opened, read

ROWS = 1003
X = np.random.default_rng(1).random((ROWS, 3))
ID = np.arange(ROWS)
WORDS = [f"wörd{i % 13}" * (i % 4) for i in range(ROWS)]


def write_npy(path: Path) -> None:
    np.save(path, X)


def write_npz(path: Path) -> None:
    np.savez(path, id=ID, x=X, word=np.array(WORDS), scale=2.0)


def write_packed_npz(path: Path) -> None:
    np.savez_compressed(path, id=ID, x=np.asfortranarray(X), word=np.array(WORDS))


def write_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = X
        file.create_dataset("id", data=ID, chunks=(64,), compression="gzip")
        file["word"] = np.array(WORDS, object)
        file["scale"] = 2.0


def write_parquet(path: Path) -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1)), 3)
    pq.write_table(pa.table({"id": ID, "x": flat, "word": WORDS}), path, row_group_size=100)


FORMATS: dict[str, Any] = {
    "a.npy": write_npy,
    "a.npz": write_npz,
    "packed.npz": write_packed_npz,
    "a.h5": write_h5,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_all_rows_come_once_in_order_on_any_number_of_ranks(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FORMATS[name](path)
    for size in SIZES:
        batch = read(path, size)
        assert np.array_equal(batch["x"], X)
        if "id" in batch:
            assert np.array_equal(batch["id"], ID)
            assert batch["word"].to_list() == WORDS
        assert "scale" not in batch


def test_more_ranks_than_blocks_leave_empty_ranks_with_the_schema(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X[:3], word=np.array(WORDS[:3]))
    _, shares, _ = loaded(5, lambda: open_source(tmp_path / "a.npz"))
    assert sorted(len(s.batch) for s in shares) == [0, 0, 0, 0, 3]
    assert all(s.batch.schema.describe() == "x float64[3], word text" for s in shares)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(7),
        np.arange(7, dtype=">i4"),
        np.asfortranarray(np.arange(14.0).reshape(7, 2)),
        np.arange(42.0).reshape(7, 3, 2),
        np.arange(7) > 3,
        np.arange(7).astype("M8[s]"),
        np.arange(7) * 1j,
        np.zeros((0, 4), np.float32),
    ],
    ids=lambda a: f"{a.dtype}-{a.shape}",
)
def test_npy_arrays_of_every_kind_become_column_x(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    x = read(tmp_path / "a.npy", 2, block_rows=2)["x"]
    assert x.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(x, array)


def test_a_structured_npy_gives_its_fields_and_reads_text(tmp_path: Path) -> None:
    kinds = [("page", "<i8"), ("name", "U4"), ("raw", "S3"), ("pos", "f4", (2,))]
    rows = np.array([(1, "ä", b"ab", (1, 2)), (2, "", b"", (3, 4))], kinds)
    np.save(tmp_path / "a.npy", rows)
    batch = read(tmp_path / "a.npy")
    assert batch["page"].tolist() == [1, 2]
    assert batch["name"].to_list() == ["ä", ""]
    assert batch["raw"].to_list() == [b"ab", b""]
    assert batch["pos"].tolist() == [[1, 2], [3, 4]]


def test_a_path_inside_hdf5_names_a_group_a_dataset_or_a_member(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["run/x"], file["run/deep/y"] = X, ID
        file["pairs"] = np.array([(1, 2.5)], [("src", "i8"), ("weight", "f8")])
    assert read(f"{tmp_path}/a.h5:/run").names == ("x",)
    assert np.array_equal(read(f"{tmp_path}/a.h5:run/deep/y", 3)["y"], ID)
    assert read(f"{tmp_path}/a.h5:/pairs")["weight"].tolist() == [2.5]


def test_hdf5_keeps_bools_fixed_text_lists_and_dates(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["flag"] = np.array([True, False])
        file["short"] = np.array([b"ab", b"c"])
        lists = file.create_dataset("lists", 2, h5py.vlen_dtype(np.int32))
        lists[0], lists[1] = [1, 2], []
        file["day"] = np.array(["2024-01-01", "2025-01-01"], "M8[D]").astype(h5py.opaque_dtype("M8[D]"))
    batch = read(tmp_path / "a.h5")
    assert batch["flag"].tolist() == [True, False]
    assert batch["short"].to_list() == ["ab", "c"]
    assert [row.tolist() for row in batch["lists"].to_list()] == [[1, 2], []]
    assert batch["day"].astype(str).tolist() == ["2024-01-01", "2025-01-01"]


def test_parquet_reads_nulls_dictionaries_lists_dates_and_bytes(tmp_path: Path) -> None:
    table = pa.table(
        {
            "n": pa.array([1, None, 3]),
            "f": pa.array([1.5, None, 2.5]),
            "t": pa.array(["a", None, "ccc"]).dictionary_encode(),
            "b": pa.array([b"x", b"", None]),
            "l": pa.array([[1, 2], [], [3]], pa.list_(pa.int32())),
            "d": pa.array([0, None, 2], pa.timestamp("ms")),
            "day": pa.array([0, None, 2], pa.date32()),
            "flag": pa.array([True, None, False]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    for size in (1, 3):
        batch = read(tmp_path / "a.parquet", size, block_rows=1)
        assert batch["n"][[0, 2]].tolist() == [1, 3]
        assert batch["f"][[0, 2]].tolist() == [1.5, 2.5]
        assert batch["t"].to_list()[::2] == ["a", "ccc"]
        assert batch["b"].to_list()[:2] == [b"x", b""]
        assert [row.tolist() for row in batch["l"].to_list()] == [[1, 2], [], [3]]
        assert batch["d"].astype("i8")[[0, 2]].tolist() == [0, 2]
        assert batch["day"].astype("i8")[[0, 2]].tolist() == [0, 2]
        masked = {name for name in batch.names if batch.valid(name) is not None}
        assert masked - {"l"} == {"n", "f", "t", "b", "d", "day", "flag"}  # an empty list may count as null
        assert np.asarray(batch.valid("n")).tolist() == [True, False, True]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5", ".parquet"])
def test_files_of_a_glob_or_directory_are_one_table_sorted_by_name(suffix: str, tmp_path: Path) -> None:
    whole = tmp_path / f"whole{suffix}"
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "_SUCCESS").write_text("")
    bounds = [0, 300, 300, 700, ROWS]
    write: dict[str, Any] = {
        ".npy": np.save,
        ".npz": lambda p, x: np.savez(p, x=x),
        ".h5": save_h5,
        ".parquet": save_parquet,
    }
    write[suffix](whole, X)
    for i in range(4):
        write[suffix](folder / f"part-{i}{suffix}", X[bounds[i] : bounds[i + 1]])
    for size in (1, 3, 8):
        want, one, _ = loaded(size, lambda: open_source(whole))
        got, many, _ = loaded(size, lambda: open_source(folder))
        again, _, _ = loaded(size, lambda: open_source(f"{folder}/part-*{suffix}"))
        assert got.equals(want)
        assert again.equals(want)
        assert [m.block_starts.tolist() for m in many] == [o.block_starts.tolist() for o in one]


def save_h5(path: Path, x: Any) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = x


def save_parquet(path: Path, x: Any) -> None:
    pq.write_table(pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 3)}), path)


def test_projection_reads_only_the_named_columns(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz")
    source = opened(open_source(tmp_path / "a.npz").columns(["word", "id"]))
    assert load(SoloGroup(), source).batch.names == ("word", "id")


def test_the_token_changes_with_the_file_and_with_the_columns(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz")
    first = opened(open_source(tmp_path / "a.npz")).token
    assert opened(open_source(tmp_path / "a.npz")).token == first
    assert opened(open_source(tmp_path / "a.npz").columns(["x"])).token != first
    np.savez(tmp_path / "a.npz", x=X[:5])
    assert opened(open_source(tmp_path / "a.npz")).token != first


def test_blocks_depend_on_the_data_alone_and_ranks_own_all_of_them() -> None:
    assert [block_rows_for(n) for n in (0, 1, 262144, 262145, 10**6, 10**9)] == [
        256,
        256,
        256,
        512,
        1024,
        32768,
    ]
    assert [block_bytes_for(n) for n in (0, 1 << 26, (1 << 26) + 1, 1 << 40)] == [
        1 << 16,
        1 << 16,
        1 << 17,
        1 << 22,
    ]
    for rows in (0, 1, 255, 256, 257, 100_000):
        blocks = Blocks.of_rows(rows)
        for size in SIZES:
            owned = [blocks.owned(rank, size) for rank in range(size)]
            assert owned[0][0] == 0
            assert owned[-1][1] == blocks.count
            assert all(a[1] == b[0] for a, b in itertools.pairwise(owned))
        assert blocks.rows == rows


def test_a_table_of_numbers_becomes_one_matrix(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3), pos=X[:3, :2], y=np.array([True, False, True]))
    for size in (1, 2):
        batch = loaded(size, lambda: StackedSource(open_source(tmp_path / "a.npz")))[0]
        want = np.column_stack([np.arange(3), X[:3, :2], [1, 0, 1]])
        assert batch["x"].dtype == np.float64
        assert np.array_equal(batch["x"], want)


def test_a_column_of_vectors_or_the_only_column_is_the_matrix(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=ID)
    np.savez(tmp_path / "b.npz", x=ID)
    vectors = loaded(2, lambda: StackedSource(open_source(tmp_path / "a.npz")))[0]
    alone = loaded(2, lambda: StackedSource(open_source(tmp_path / "b.npz")))[0]
    assert vectors.names == ("x", "y")
    assert alone.names == ("x",)
    assert vectors["x"].dtype == X.dtype and np.array_equal(vectors["x"], X)
    assert alone["x"].dtype == np.float64 and np.array_equal(alone["x"], ID[:, None])


def test_columns_that_are_kept_stay_beside_the_matrix(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=ID, y=X, b=ID + 1)
    for size in (1, 3):
        found = loaded(size, lambda: StackedSource(open_source(tmp_path / "a.npz"), keep=("y", "none")))[0]
        assert found.names == ("x", "y")
        assert np.array_equal(found["x"], np.column_stack([ID, ID + 1])[: len(found)])
        assert np.array_equal(found["y"], X[: len(found)])


def test_the_first_row_that_is_not_finite_is_found() -> None:
    from iterreduce.sources import first_nonfinite

    x = np.zeros((100_000, 3))
    assert first_nonfinite(Batch(x=x, i=np.arange(100_000)), "x") is None
    assert first_nonfinite(Batch(x=x, i=np.arange(100_000)), "i") is None
    x[70_001, 2] = np.inf
    x[70_002, 0] = np.nan
    assert first_nonfinite(Batch(x=x), "x") == 70_001
    assert first_nonfinite(Batch(x=x[:0]), "x") is None


def test_parquet_without_pyarrow_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'iterreduce[parquet]'" in complaint_about(tmp_path / "a.parquet")


def test_who_reads_npy_pays_for_neither_hdf5_nor_the_compiler(tmp_path: Path) -> None:
    write_npy(tmp_path / "a.npy")
    program = (
        "import sys\n"
        "from iterreduce.collectives import SoloGroup\n"
        "from iterreduce.sources import load, open_source\n"
        f"source = open_source({str(tmp_path / 'a.npy')!r})\n"
        "source.open(SoloGroup())\n"
        "load(SoloGroup(), source)\n"
        "print(sorted({'h5py', 'numba', 'pyarrow', 'mpi4py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
