"""What a source tells before it is opened: names, types if a header says them, rows; it never raises."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.batch import Batch
from iterreduce.sources import FiniteSource, LocalSource, Source, StackedSource, open_source
from iterreduce.sources.edges import edges_of, open_edges
from iterreduce.testing import run_ranks

from .kit import opened
from .test_rows import FORMATS, ROWS, X


def told(source: Source) -> list[str] | None:
    """The columns as text: a question mark where only opening tells the type."""
    found = source.peek()
    return found and [f"{n} {'?' if f is None else f.describe()}" for n, f in found.items()]


def agree_with_opening(source: Source) -> None:
    """What was told is what is there."""
    before, rows, nbytes = source.peek(), source.rows_hint(), source.bytes_hint()
    assert source.bytes_read == 0 and before is not None
    opened(source)
    assert list(before) == list(source.schema)
    for name, field in before.items():
        if field is not None:
            found = source.schema[name]
            assert (field.kind, field.dtype, field.shape) == (found.kind, found.dtype, found.shape)
            assert field.nullable or not found.nullable
    assert nbytes == source.bytes_hint() and (rows is None or rows == source.blocks.rows)
    assert {n: f for n, f in (source.peek() or {}).items() if f}.items() <= dict(source.schema).items()


@pytest.mark.parametrize("name", FORMATS)
def test_binary_formats_tell_names_types_and_rows(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    source = open_source(tmp_path / name)
    found = source.peek()
    assert found is not None and None not in found.values()
    assert source.rows_hint() == ROWS
    assert source.bytes_hint() == (tmp_path / name).stat().st_size
    agree_with_opening(source)
    agree_with_opening(open_source(tmp_path / name).columns(["x"]))
    agree_with_opening(open_source(tmp_path))


def test_records_groups_and_members_are_told(tmp_path: Path) -> None:
    records = np.zeros(3, [("page", "<i8"), ("name", "U4"), ("pos", "f4", (2,))])
    np.save(tmp_path / "r.npy", records)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["run/x"], file["pairs"] = X, np.zeros(4, [("src", "i8"), ("weight", "f8")])
    assert told(open_source(tmp_path / "r.npy")) == ["page int64", "name text", "pos float32[2]"]
    assert told(open_source(f"{tmp_path}/a.h5:/run")) == ["x float64[3]"]
    assert told(open_source(f"{tmp_path}/a.h5:/pairs").columns(["weight"])) == ["weight float64"]


TEXTS: list[tuple[str, str, list[str]]] = [
    ("a.csv", "a,b,c\n1,x,2.5\n,y,\n", ["a ?", "b text?", "c ?"]),
    ("a.csv", "x[0],x[1],y\n1,2,3\n", ["x ?", "y ?"]),
    ("a.csv", "x[0],x[1],y\n1,b,3\n", ["x[0] ?", "x[1] text?", "y ?"]),
    ("a.csv", "x,x[0],x[1]\n1,2,3\n", ["x ?", "x[0] ?", "x[1] ?"]),
    ("a.csv", 'a;b\n1; "2"\n3;"x;y"\n', ["a ?", "b text?"]),
    ("a.csv", 'a,b\n1, "2"\n2,"3"\n', ["a ?", "b ?"]),
    ("a.csv", "a,b\n", ["a ?", "b ?"]),
    ("a.tsv", "a\tb\n1\tx", ["a ?", "b ?"]),  # the last line is not whole: who knows what follows
    ("a.txt", "any words\n", ["line text"]),
    ("words", "any words\n", ["line text"]),
    ("a.el", "# no edge\n\n1 2\n", ["src ?", "dst ?"]),
    ("a.edges", "1 2 3\n", ["src ?", "dst ?", "weight ?"]),
    ("a.el", "1 2 0.5\n", ["src ?", "dst ?", "weight float64"]),
    ("a.el", "home 2 7\n", ["src text", "dst text", "weight ?"]),
    ("a.mtx", "%%MatrixMarket matrix coordinate real general\n3 3 1\n1 2 5\n",
     ["src int64", "dst int64", "weight float64"]),
    ("a.mtx", "%%MatrixMarket matrix coordinate pattern symmetric\n3 3 1\n2 1\n", ["src int64", "dst int64"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "want"), TEXTS)
@pytest.mark.parametrize("packed", [False, True])
def test_text_tells_what_its_first_lines_say(
    name: str, text: str, want: list[str], packed: bool, tmp_path: Path
) -> None:
    path = tmp_path / (name + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert told(open_source(path)) == want
    source = open_source(path)
    names = list(source.peek() or {})
    opened(source)
    assert list(source.schema) == names
    last = names[-1]
    assert told(open_source(path).columns([last])) == [want[-1]]


cells = st.sampled_from(
    ["1", "-7", "2.5", "", " ", "nan", "1e5", "word", "1_0", "٣", '"4"', '"a ""b"', "inf"]
)
headers = st.lists(
    st.sampled_from(["a", "b", "x[0]", "x[1]", "x[2]", "y[0,0]", "y[0,1]", "x", "z[1]"]),
    min_size=1, max_size=6, unique=True,
)  # fmt: skip


def quoted(name: str) -> str:
    return f'"{name}"'


@settings(max_examples=50)
@given(names=headers, data=st.data())
def test_what_a_csv_tells_is_what_is_found_where_its_first_rows_show_all(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: Any
) -> None:
    rows = data.draw(st.lists(st.lists(cells, min_size=len(names), max_size=len(names)), max_size=5))
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("".join(",".join(row) + "\n" for row in [map(quoted, names), *rows]))
    agree_with_opening(open_source(path))


def test_edges_of_tables_are_told(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", src=np.arange(4, dtype=np.int32), dst=np.arange(4.0), weight=np.ones(4, "f4")
    )
    np.save(tmp_path / "v.npy", np.zeros((5, 3), np.int16))
    scipy.sparse.save_npz(tmp_path / "s.npz", scipy.sparse.random(9, 9, 0.3, "csr", np.float32, 1))
    (tmp_path / "t.csv").write_text("u,v,w\n1,2,3\n")
    (tmp_path / "e.tsv").write_text("1\t2\n")
    for path, columns in [("a.npz", ()), ("v.npy", ()), ("s.npz", ()), ("t.csv", ("v", "u")), ("e.tsv", ())]:
        agree_with_opening(open_edges(tmp_path / path, columns))
        agree_with_opening(open_edges(tmp_path / path, columns).columns(["dst"]))
    assert told(open_edges(tmp_path / "a.npz")) == ["src int64", "dst int64", "weight float32"]
    assert told(open_edges(tmp_path / "v.npy")) == ["src int64", "dst int64", "weight int64"]
    assert told(open_edges(tmp_path / "t.csv", ("u", "v"))) == ["src ?", "dst ?"]
    assert open_edges(tmp_path / "a.npz", ("src", "none")).peek() is None


def test_matrices_of_columns_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.arange(4), pos=X[:4, :2], label=np.arange(4))
    np.savez(tmp_path / "b.npz", x=X, y=np.arange(ROWS))
    (tmp_path / "c.csv").write_text("a,b,label\n1,2,3\n")
    whole = StackedSource(open_source(tmp_path / "a.npz"), keep="label")
    assert told(whole) == ["x float64[3]", "label int64"]
    assert told(StackedSource(open_source(tmp_path / "b.npz"))) == ["x float64[3]", "y int64"]
    assert told(FiniteSource(StackedSource(open_source(tmp_path / "c.csv"), keep="label"), ["x"])) == [
        "x ?",
        "label ?",
    ]
    agree_with_opening(whole.columns(["label"]))
    agree_with_opening(StackedSource(open_source(tmp_path / "b.npz")))
    agree_with_opening(whole)


def test_a_matrix_market_file_tells_its_entries(tmp_path: Path) -> None:
    scipy.io.mmwrite(tmp_path / "g.mtx", scipy.sparse.eye(5, format="coo"), symmetry="general")
    assert open_source(tmp_path / "g.mtx").rows_hint() == 5


def test_of_several_files_the_first_tells_and_others_may_hold_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "a.parquet")
    assert told(open_source(tmp_path / "a.parquet")) == ["n int64"]
    pq.write_table(pa.table({"n": pa.array([1, None, 3], pa.int64())}), tmp_path / "b.parquet")
    for path in (tmp_path, f"{tmp_path}/*.parquet", f"{tmp_path}/*"):
        assert told(open_source(path)) == ["n int64?"]
        assert open_source(path).rows_hint() == 5
        agree_with_opening(open_source(path))


def test_of_very_many_files_rows_are_told_by_size(tmp_path: Path) -> None:
    for i in range(70):
        np.save(tmp_path / f"{i}.npy", np.zeros(100))
    assert open_source(tmp_path).rows_hint() == 7000


def test_a_column_that_cannot_be_read_has_no_type(tmp_path: Path) -> None:
    import decimal

    pq.write_table(pa.table({"n": [1], "d": [decimal.Decimal("1.5")]}), tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", n=np.arange(3), m=np.zeros(3, [("a", "i4")]))
    assert told(open_source(tmp_path / "a.parquet")) == ["n int64", "d ?"]
    assert told(open_source(tmp_path / "a.npz")) == ["n int64", "m ?"]


def test_what_is_not_there_or_not_readable_is_not_told(tmp_path: Path) -> None:
    junk = {"j.npy": b"\x93NUMPY\1\0", "j.npz": b"PK\3\4junk", "j.h5": b"\x89HDF\r\n\x1a\njunk", "j.csv": b"",
            "j.parquet": b"PAR1junk", "j.el": b"1,2\n", "j.mtx": b"no\n", "j.txt": b"\xff\xfea",
            "j.csv.gz": b"\x1f\x8bjunk"}  # fmt: skip
    for name, data in junk.items():
        (tmp_path / name).write_bytes(data)
        assert open_source(tmp_path / name).peek() is None, name
        assert open_source(tmp_path / name).rows_hint() is None
    (tmp_path / "sub").mkdir()
    for name in ("none.npy", "none.csv", "none.h5", "none", "none/*", "sub", "."):
        for source in (open_source(tmp_path / name), edges_of(open_source(tmp_path / name))):
            assert source.peek() is None or name == "none", name
            assert source.rows_hint() is None and source.columns(["x"]).peek() is None
    np.save(tmp_path / "x.npy", X)
    assert open_source(tmp_path / "x.npy").columns(["y"]).peek() is None
    assert StackedSource(open_source(tmp_path / "x.npy")).columns(["y"]).peek() is None


def test_arrays_tell_their_columns_and_their_rows_once_open() -> None:
    def work(group: Any) -> tuple[Any, ...]:
        source = LocalSource(Batch(a=np.arange(group.rank), b=np.ones(group.rank)))
        before = told(source), source.rows_hint()
        source.open(group)
        return before, (told(source), source.rows_hint(), source.bytes_hint(), source.bytes_read)

    got = run_ranks(3, work)
    assert [before for before, _ in got] == [
        (["a ?", "b ?"], None),
        (["a int64", "b float64"], None),
        (["a int64", "b float64"], None),
    ]
    assert {str(after) for _, after in got} == {str((["a int64", "b float64"], 3, None, 0))}
