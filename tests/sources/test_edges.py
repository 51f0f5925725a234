"""Graphs from every kind of file: the same edges on any number of ranks, and clear words for bad ones."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.io
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.errors import UsageError
from iterreduce.sources import Source, load
from iterreduce.sources.edges import open_edges

from .kit import SIZES, complaint, loaded, opened

RNG = np.random.default_rng(7)
SRC, DST = RNG.integers(-(2**40), 2**40, (2, 700))
WEIGHT = RNG.normal(size=700)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edges")


def edges(path: Any, size: int = 1, columns: Any = (), header: bool | None = None, **options: Any) -> Batch:
    return loaded(size, lambda: open_edges(path, columns, header, **options))[0]


def complaint_about(path: Any, size: int = 3, **options: Any) -> str:
    def work(group: Group) -> None:
        source = open_edges(path, **options)
        source.open(group)
        load(group, source)

    return complaint(work, size)


def rows(batch: Batch) -> list[tuple[Any, ...]]:
    return list(
        zip(
            *(
                c.to_list() if hasattr(c, "to_list") else c.tolist()
                for c in map(batch.__getitem__, batch.names)
            ),
            strict=True,
        )
    )


# ---------------------------------------------------------------- edge lists


def slow_parser(text: str) -> tuple[str, list[tuple[Any, ...]]]:
    """Kind of the ids, and the edges: Python's own way to read them."""
    found = [line.split() for line in text.split("\n")]
    found = [cells for cells in found if cells and cells[0][0] not in "#%"]
    ids = [cell for cells in found for cell in cells[:2]]
    whole = all(_fits(cell) for cell in ids)
    weights = [cells[2] for cells in found if len(cells) == 3]
    kind = int if all(_fits(cell) for cell in weights) else float
    return (
        "int64" if whole else "text",
        [(*(int(c) if whole else c for c in cells[:2]), *map(kind, cells[2:])) for cells in found],
    )


def _fits(cell: str) -> bool:
    digits = cell.removeprefix("-") if cell.startswith("-") else cell.removeprefix("+")
    return digits.isascii() and digits.isdigit() and -(2**63) <= int(cell) < 2**63


integers = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-20, 20), st.sampled_from([2**63 - 1, -(2**63), 10**18])
).map(str)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=6).filter(
    lambda word: word[0] not in "#%" and len(word.split()) == 1
)
others = st.sampled_from(
    ["1.5", "1e3", "nan", "-", "+", "+7", "007", "9223372036854775808", "a#b", "--1", "1,2"]
)
blanks = st.text(" \t\r\v\f", min_size=1, max_size=3)
weights = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.floats(allow_nan=False).map(repr),
    st.sampled_from(["0.1000000000000000055511151231257827", "1e-320", "18446744073709551616", "-0", "inf"]),
)


@st.composite
def edge_lists(draw: Any) -> str:
    ids = draw(st.sampled_from([integers, integers, st.one_of(integers, words, others)]))
    third = draw(st.sampled_from([None, weights, st.integers(0, 99).map(str)]))
    lines = []
    for _ in range(draw(st.integers(0, 12))):
        cells = [draw(ids), draw(ids), *([draw(third)] if third is not None else [])]
        lines.append(
            draw(st.one_of(st.just(""), blanks))
            + draw(blanks).join(cells)
            + draw(st.sampled_from(["", " ", "\r"]))
        )
        lines += draw(st.lists(st.sampled_from(["", "  ", "# 1 2", "% a", "\t#", "#"]), max_size=2))
    return "\n".join(lines) + draw(st.sampled_from(["", "\n"]))


@settings(max_examples=50)
@given(text=edge_lists(), block_bytes=st.integers(1, 40), size=st.sampled_from(SIZES))
def test_an_edge_list_is_read_as_a_slow_parser_reads_it(
    folder: Path, text: str, block_bytes: int, size: int
) -> None:
    (folder / "graph.el").write_bytes(text.encode())
    kind, want = slow_parser(text)
    if want and (want[0][0], want[0][1]) in {("u", "v")}:
        return  # that is a header
    batch = edges(folder / "graph.el", size, block_bytes=block_bytes)
    assert batch.schema["src"].describe() == batch.schema["dst"].describe() == (kind if want else "int64")
    assert rows(batch) == want
    assert all(
        type(a) is type(b)
        for got, line in zip(rows(batch), want, strict=True)
        for a, b in zip(got, line, strict=True)
    )


@pytest.mark.parametrize("size", SIZES)
def test_one_word_anywhere_makes_all_ids_text_on_all_ranks(tmp_path: Path, size: int) -> None:
    lines = [f"{i} {i + 1}" for i in range(3000)]
    lines[-1] = "7 seven"
    (tmp_path / "g.txt").write_text("\n".join(lines))
    batch = edges(tmp_path / "g.txt", size, block_bytes=512)
    assert rows(batch) == [tuple(line.split()) for line in lines]


@pytest.mark.parametrize("size", SIZES)
def test_one_fraction_anywhere_makes_all_weights_floats(tmp_path: Path, size: int) -> None:
    (tmp_path / "g.edges").write_text("".join(f"{i} 0 {i}\n" for i in range(2000)) + "1 1 0.5\n")
    batch = edges(tmp_path / "g.edges", size, block_bytes=256)
    assert batch["weight"].dtype == np.float64
    assert batch["weight"].tolist() == [*range(2000), 0.5]


def test_any_suffix_and_none_are_edge_lists_and_plain_read_keeps_lines(tmp_path: Path) -> None:
    for name in ("a.txt", "b", "c.el", "d.edges", "e.tsv", "f.txt.gz", "g.gz", "h.el.gz"):
        raw = b"3\t4\n-5 6\n"
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        assert rows(edges(tmp_path / name)) == [(3, 4), (-5, 6)], name
    assert ir.read(str(tmp_path / "a.txt")).collect().names == ("line",)
    assert ir.read(str(tmp_path / "c.el")).collect().names == ("src", "dst")
    assert rows(ir.read(str(tmp_path / "a.txt")).as_edges().collect()) == [(3, 4), (-5, 6)]
    assert rows(ir.read_edges(str(tmp_path / "a.txt")).collect()) == [(3, 4), (-5, 6)]


@pytest.mark.parametrize("size", SIZES)
def test_files_of_a_directory_or_a_pattern_are_one_graph(tmp_path: Path, size: int) -> None:
    (tmp_path / "1.txt").write_text("# first\n1 2")
    (tmp_path / "2.txt").write_text("")
    (tmp_path / "3.txt").write_text("\ufeff3 4\n\n", encoding="utf-8")
    (tmp_path / "4.txt.gz").write_bytes(gzip.compress(b"5 6\n7 8\n"))
    want = [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert rows(edges(tmp_path, size, block_bytes=2)) == want
    assert rows(edges(tmp_path / "*.txt*", size, block_bytes=2)) == want


def test_a_file_without_edges_has_the_columns_of_one_with(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text("# nothing\n\n")
    batch = edges(tmp_path / "g.txt", 3)
    assert len(batch) == 0 and batch["src"].dtype == np.int64 and batch.names == ("src", "dst")


def test_blocks_of_an_edge_list_are_known_and_can_be_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text("".join(f"{i} {i * i}\n# {'x' * (i % 50)}\n" for i in range(500)))
    source = opened(open_edges(tmp_path / "g.txt", block_bytes=100))
    assert source.blocks.rows == 500
    found = [source.read(b, b + 1) for b in range(source.blocks.count)]
    assert [len(batch) for batch in found] == source.block_rows(0, source.blocks.count).tolist()
    assert rows(Batch.concat(found)) == [(i, i * i) for i in range(500)]


def test_columns_of_an_edge_list_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text("1 2 0.5\n")
    source = opened(open_edges(tmp_path / "g.txt").columns(["weight"]))
    assert source.read(0, 1)["weight"].tolist() == [0.5]


def test_a_line_longer_than_the_read_ahead_is_whole(tmp_path: Path) -> None:
    long = "a" * 20_000
    (tmp_path / "g.txt").write_text(f"{long} b\nc {long}\n")
    for size in (1, 3):
        assert rows(edges(tmp_path / "g.txt", size, block_bytes=1 << 10)) == [(long, "b"), ("c", long)]


# ---------------------------------------------------------------- tables and arrays


def _written(folder: Path) -> dict[str, Path]:
    """The same graph in every kind of file."""
    folder.mkdir()
    np.save(folder / "two.npy", np.stack([SRC, DST], 1))
    np.save(folder / "fortran.npy", np.asfortranarray(np.stack([SRC, DST], 1)))
    np.save(folder / "records.npy", np.rec.fromarrays([SRC, DST, WEIGHT], names="src,dst,weight"))
    np.savez(folder / "plain.npz", src=SRC, dst=DST, weight=WEIGHT)
    np.savez_compressed(folder / "packed.npz", src=SRC, dst=DST, weight=WEIGHT)
    with h5py.File(folder / "g.h5", "w") as file:
        file.create_dataset("graph/src", data=SRC, chunks=(64,), compression=1)
        file["graph/dst"], file["graph/weight"] = DST, WEIGHT
    table = {"other": np.zeros(700), "dst": DST, "src": SRC, "weight": WEIGHT}
    pa.parquet.write_table(pa.table(table), folder / "g.parquet", row_group_size=100)
    for name, comma in (("g.csv", ","), ("g.tsv", "\t")):
        lines = [
            comma.join(map(repr, line))
            for line in zip(SRC.tolist(), DST.tolist(), WEIGHT.tolist(), strict=True)
        ]
        (folder / name).write_text("\n".join([comma.join(["src", "dst", "weight"]), *lines]))
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_file_gives_the_same_graph(tmp_path: Path, size: int) -> None:
    for name, path in _written(tmp_path / "g").items():
        options = {} if path.suffix in (".csv", ".tsv") else {"block_rows": 64}
        where = f"{path}:/graph" if path.suffix == ".h5" else path
        batch = edges(where, size, **options)
        assert batch["src"].tolist() == SRC.tolist() and batch["dst"].tolist() == DST.tolist(), name
        assert batch["src"].flags.c_contiguous
        if "weight" in batch:
            assert batch["weight"].tolist() == WEIGHT.tolist(), name
        assert ("weight" in batch) == (name not in ("two.npy", "fortran.npy"))


def test_an_array_of_three_columns_has_weights_and_floats_may_be_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", np.array([[1, 2, 0.5], [-3, 2.0**53, 1]]))
    batch = edges(tmp_path / "g.npy")
    assert rows(batch) == [(1, 2, 0.5), (-3, 2**53, 1.0)]
    np.save(tmp_path / "i.npy", np.array([[1, 2, 3]], np.uint16))
    assert [c.dtype for c in map(edges(tmp_path / "i.npy").__getitem__, ("src", "dst", "weight"))] == [
        np.int64
    ] * 3


@pytest.mark.parametrize("kind", ["coo", "csr", "csc"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_sparse_matrix_of_scipy_is_a_graph(tmp_path: Path, kind: str, compressed: bool) -> None:
    matrix = scipy.sparse.random(90, 70, 0.2, kind, random_state=3)
    scipy.sparse.save_npz(tmp_path / "m.npz", matrix, compressed)
    coo = matrix.tocoo()
    want = list(zip(coo.row.tolist(), coo.col.tolist(), coo.data.tolist(), strict=True))
    for size in (1, 3):
        assert rows(edges(tmp_path / "m.npz", size, block_rows=100)) == want


def test_columns_of_other_names_are_chosen_by_an_option(tmp_path: Path) -> None:
    (tmp_path / "g.csv").write_text("kind,from,to,cost\nx,1,2,3\ny,2,1,0.5\n")
    assert rows(edges(tmp_path / "g.csv", columns=("from", "to"))) == [(1, 2), (2, 1)]
    assert rows(edges(tmp_path / "g.csv", 2, ("to", "from", "cost"))) == [(2, 1, 3.0), (1, 2, 0.5)]
    told = complaint_about(tmp_path / "g.csv")
    assert "g.csv holds kind text, from int64, to int64, cost float64: wanted columns src, dst" in told
    assert 'columns=("from", "to")' in told
    with pytest.raises(UsageError, match="two or three columns"):
        open_edges(tmp_path / "g.csv", columns=("from",))


def test_tab_separated_text_with_and_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "with.tsv").write_text("from\tto\na\tb\n")
    (tmp_path / "without.tsv").write_text("# SNAP\n1\t2\n")
    (tmp_path / "words.tsv").write_text("a\tb\nb\tc\n")
    assert rows(edges(tmp_path / "with.tsv", columns=("from", "to"))) == [("a", "b")]
    assert rows(edges(tmp_path / "without.tsv", 2)) == [(1, 2)]
    assert rows(edges(tmp_path / "words.tsv", header=False)) == [("a", "b"), ("b", "c")]
    assert "words.tsv begins with a b: a header, or an edge?" in complaint_about(tmp_path / "words.tsv")


def test_edges_of_memory_are_checked_like_those_of_files() -> None:
    data = ir.Dataset.from_local(src=np.array([1, 2], np.int32), dst=["a", "b"])
    with pytest.raises(ir.InputError, match="ids of one kind"):
        data.as_edges().collect()
    fine = ir.Dataset.from_local(src=np.array([1, 2], np.int32), dst=np.array([2, 3])).as_edges().collect()
    assert fine["src"].dtype == np.int64


# ---------------------------------------------------------------- MatrixMarket


@pytest.mark.parametrize("symmetry", ["general", "symmetric", "skew-symmetric"])
@pytest.mark.parametrize("field", ["real", "integer", "pattern"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_matrixmarket_gives_the_entries_that_scipy_reads(
    tmp_path: Path, symmetry: str, field: str, size: int
) -> None:
    dense = np.where(RNG.random((40, 40)) < 0.2, RNG.integers(1, 99, (40, 40)), 0)
    dense = {"general": dense, "symmetric": dense + dense.T, "skew-symmetric": dense - dense.T}[symmetry]
    values = dense.astype(np.int64 if field == "integer" else np.float64)
    scipy.io.mmwrite(tmp_path / "m.mtx", scipy.sparse.coo_matrix(values), "two\nlines", field, 17, symmetry)
    want = scipy.io.mmread(tmp_path / "m.mtx").tocoo()
    batch = edges(tmp_path / "m.mtx", size, block_bytes=64)
    told = [want.row.tolist(), want.col.tolist()] + ([want.data.tolist()] if field != "pattern" else [])
    assert sorted(rows(batch)) == sorted(zip(*told, strict=True))
    if field != "pattern":
        assert batch["weight"].dtype == want.data.dtype
    assert rows(batch) == rows(edges(tmp_path / "m.mtx"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("%%MatrixMarket matrix array real general\n2 2\n1\n", "wanted %%MatrixMarket matrix coordinate"),
        ("%%MatrixMarket matrix coordinate complex general\n1 1 0\n", "a matrix that is complex general"),
        ("1 2\n", "m.mtx line 1: '1 2'; wanted"),
        ("%%MatrixMarket matrix coordinate real general\n% a\n2 2\n", "m.mtx line 3: wanted the size line"),
        (
            "%%MatrixMarket matrix coordinate real general\n2 2 2\n1 1 1\n",
            "holds 1 entries, its size line promises 2",
        ),
        (
            "%%MatrixMarket matrix coordinate real general\n2 2 1\n1 3 1\n",
            "line 3 (byte 52): column 3, but the size line says 1 to 2",
        ),
        (
            "%%MatrixMarket matrix coordinate real general\n2 2 1\n0 1 1\n",
            "row 0, but the size line says 1 to 2",
        ),
        (
            "%%MatrixMarket matrix coordinate pattern general\n2 2 1\n1 1 1\n",
            "3 cells, but the header says pattern: wanted i j",
        ),
        ("%%MatrixMarket matrix coordinate real general\n2 2 1\n1 x 1\n", 'the id "x" is not a whole number'),
    ],
)
def test_bad_matrixmarket_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.mtx").write_text(text)
    assert words in complaint_about(tmp_path / "m.mtx")


# ---------------------------------------------------------------- complaints


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2\n3\n", "g.txt line 2 (byte 4): 1 cell, but the first edge"),
        ("1 2\n# no\n3 4 5\n", "g.txt line 3 (byte 9): 3 cells, but the first edge"),
        ("1 2 3\n4 5\n", "line 1) has 3: src dst weight"),
        ("1 2 3\n4 5 six\n", 'g.txt line 2 (byte 6): the weight "six" is not a number'),
        ("1 2 3 4\n", "g.txt line 1: 4 cells, wanted src dst [weight]"),
        ("1,2\n3,4\n", "white space (a table with commas ends in .csv)"),
        ("Source Target\n1 2\n", "Source Target is a header, and an edge list has none"),
        ("1 2\n3 \x004\n", "is not text: it holds a zero byte at offset 6"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "g.txt").write_text(text)
    assert words in complaint_about(tmp_path / "g.txt")


def test_the_first_bad_line_of_many_is_named_on_any_number_of_ranks(tmp_path: Path) -> None:
    lines = [f"{i} {i}" for i in range(5000)]
    lines[3210] = lines[4000] = "lonely"
    (tmp_path / "g.txt").write_text("\n".join(lines))
    for size in (2, 3, 8):
        told = complaint_about(tmp_path / "g.txt", size, block_bytes=1000)
        assert f"line 3211 (byte {sum(len(line) + 1 for line in lines[:3210])})" in told


def _npy(array: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 4)), "holds x float64[4]: wanted columns src, dst"),
        (np.array([[0.0, 1.0], [1.5, 0]]), "g.npy row 1: src is 1.5, wanted a whole number"),
        (np.array([[0.0, np.nan]]), "dst is nan, wanted a whole number"),
        (np.array([[2**63, 1]], np.uint64), "src is 9223372036854775808"),
        (np.array([[True, False]]), '"x" holds bool, wanted ids'),
    ],
)
def test_arrays_that_are_no_graph_are_refused(tmp_path: Path, array: Any, words: str) -> None:
    np.save(tmp_path / "g.npy", array)
    assert words in complaint_about(tmp_path / "g.npy")


def test_an_empty_cell_is_no_id(tmp_path: Path) -> None:
    (tmp_path / "g.csv").write_text("src,dst\n1,2\n3,\n")
    assert 'g.csv line 3, column "dst": the cell is empty' in complaint_about(tmp_path / "g.csv")


def test_files_with_and_without_weights_are_no_one_graph(tmp_path: Path) -> None:
    (tmp_path / "a.el").write_text("1 2\n")
    (tmp_path / "b.el").write_text("1 2 3\n")
    assert "b.el differs from" in complaint_about(tmp_path)


def test_a_source_that_is_open_already_as_edges_is_not_wrapped_twice(tmp_path: Path) -> None:
    source: Source = open_edges(tmp_path / "g.csv")
    from iterreduce.sources.edges import edges_of

    assert edges_of(source) is source
