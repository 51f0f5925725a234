"""Only the columns asked for are read: the same values as of the whole file, and no bytes of the others."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.columns import cells
from iterreduce.errors import CheckpointError, InputError, UsageError
from iterreduce.events import Event, Events
from iterreduce.run import run_loop
from iterreduce.sources import FiniteSource, LocalSource, Source, StackedSource, load, open_source
from iterreduce.sources.edges import edges_of, open_edges
from iterreduce.testing import run_ranks
from tests.saving.programs import run_once

from .kit import complaint, loaded, opened
from .test_peek import quoted
from .test_rows import FORMATS, ID, ROWS, WORDS, X

Make = Callable[[], Source]


def bytes_of(make: Make, columns: list[str] | None = None, size: int = 1) -> int:
    """Bytes that all ranks read to load these columns."""
    _, _, sources = loaded(size, make if columns is None else lambda: make().columns(columns))
    return sum(source.bytes_read for source in sources)


def same_columns(make: Make, columns: list[str], size: int) -> None:
    got = loaded(size, lambda: make().columns(columns))[0]
    want = loaded(1, make)[0].select(*columns)
    assert got.names == tuple(columns) and got.schema == want.schema
    assert got.equals(want)


# ---------------------------------------------------------------- bytes


TABLES = ["a.npz", "packed.npz", "a.h5", "a.parquet"]


@pytest.mark.parametrize("name", TABLES)
def test_columns_that_are_not_wanted_cost_no_bytes(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    make = lambda: open_source(tmp_path / name)  # noqa: E731
    whole = bytes_of(make)
    alone = {column: bytes_of(make, [column]) for column in ("id", "x", "word")}
    assert sum(alone.values()) == whole and min(alone.values()) > 0
    assert bytes_of(make, ["word", "id"]) == alone["word"] + alone["id"]


def test_bytes_are_those_of_the_rows(tmp_path: Path) -> None:
    for name in ("a.npy", "a.npz", "a.h5"):
        FORMATS[name](tmp_path / name)
    assert bytes_of(lambda: open_source(tmp_path / "a.npy"), size=3) == X.nbytes
    verified_and_read = 2 * ID.nbytes
    assert bytes_of(lambda: open_source(tmp_path / "a.npz"), ["id"], 3) == verified_and_read
    assert bytes_of(lambda: open_source(tmp_path / "a.h5"), ["x"], 3) == X.nbytes


def test_bytes_of_text_are_those_of_the_file(tmp_path: Path) -> None:
    text = "a,b\n" + "".join(f"{i},{i}.5\n" for i in range(5000))
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for size in (1, 3):
        for name in ("a.csv", "a.txt"):
            nbytes = bytes_of(lambda name=name: open_source(tmp_path / name, block_bytes=1 << 14), size=size)
            assert len(text) <= nbytes <= len(text) + size * (1 << 16)
        packed = bytes_of(lambda: open_source(tmp_path / "b.txt.gz", block_bytes=1 << 14), size=size)
        assert packed == 2 * len(text), "unpacked once to know its size, and once to be read"


def test_wrapped_sources_leave_unread_what_they_do_not_need(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=ID, b=ID * 2.0, label=ID, other=X)
    np.savez(tmp_path / "m.npz", x=X, y=ID, z=X)
    np.savez(tmp_path / "e.npz", src=ID, dst=ID, weight=X[:, 0], more=X)
    table = lambda: open_source(tmp_path / "a.npz")  # noqa: E731
    one = 2 * ID.nbytes  # verified and read
    finite = lambda: FiniteSource(table(), ["b", "a"])  # noqa: E731
    assert bytes_of(finite, ["a"]) == one
    assert bytes_of(lambda: open_source(f"{tmp_path}/a*"), ["a"]) == one
    stacked = lambda: StackedSource(table(), "x", ("label", "other"))  # noqa: E731
    assert bytes_of(stacked, ["label"]) == one
    assert bytes_of(stacked, ["x"]) == 2 * one
    assert bytes_of(stacked, ["x", "label"]) == 3 * one
    matrix = lambda: StackedSource(open_source(tmp_path / "m.npz"))  # noqa: E731
    assert bytes_of(matrix, ["y"]) == one
    assert bytes_of(matrix, ["x"]) == 3 * one
    graph = lambda: open_edges(tmp_path / "e.npz")  # noqa: E731
    assert bytes_of(graph) == 3 * one
    assert bytes_of(graph, ["dst"]) == one
    assert bytes_of(lambda: open_edges(f"{tmp_path}/e*"), ["src", "dst"]) == 2 * one
    renamed = lambda: open_edges(tmp_path / "a.npz", ("a", "label"))  # noqa: E731
    assert bytes_of(renamed) == 2 * one
    assert bytes_of(lambda: FiniteSource(StackedSource(table(), "x", "other"), ["x"]), ["x"]) == 3 * one


def test_a_sparse_matrix_is_read_as_far_as_it_is_wanted(tmp_path: Path) -> None:
    matrix = scipy.sparse.random(50, 60, 0.2, "csr", random_state=1)
    scipy.sparse.save_npz(tmp_path / "s.npz", matrix, compressed=False)
    make = lambda: open_edges(tmp_path / "s.npz")  # noqa: E731
    for size in (1, 3):
        assert bytes_of(make, ["weight"], size) == 2 * matrix.data.nbytes
        assert bytes_of(make, ["dst"], size) == 2 * matrix.indices.nbytes
    for columns in (["src"], ["weight", "src"], ["dst"]):
        same_columns(make, columns, 3)


def test_records_are_never_held_as_a_whole(tmp_path: Path) -> None:
    records = np.zeros(40_000, [("id", "i4"), ("word", "S3"), ("pad", "f8", (60,))])
    records["id"], records["word"] = np.arange(40_000), np.array([b"a", b"bcd"] * 20_000)
    np.save(tmp_path / "r.npy", records)
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file.create_dataset("r", data=records)
    for name in ("r.npy", "r.h5"):
        source = opened(open_source(tmp_path / name).columns(["word", "id"]))
        tracemalloc.start()
        try:
            batch = source.read(0, source.blocks.count)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert batch["id"].tolist() == list(range(40_000)) and batch["word"].to_list()[1] in (b"bcd", "bcd")
        assert peak < records.nbytes // 2
        assert source.bytes_read == records.nbytes, "they stand side by side in the file"


# ---------------------------------------------------------------- what is not read


def test_cells_of_other_columns_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("t,n,u\n" + "".join(f"w{i},{i},v{i}\n" for i in range(300)))
    gathered = []
    real = cells.gather_cells
    monkeypatch.setattr(cells, "gather_cells", lambda *given: gathered.append(1) or real(*given))
    source = opened(open_source(tmp_path / "a.csv").columns(["n"]))
    piece = source._parse(0, source.blocks.count, None)[0][0]  # type: ignore[attr-defined]
    assert piece.words.shape == (300, 1) and not gathered
    opened(open_source(tmp_path / "a.csv").columns(["u", "n"]))
    assert len(gathered) == 1


def test_nobody_looks_at_weights_that_are_not_wanted(tmp_path: Path) -> None:
    (tmp_path / "g.el").write_text("1 2 heavy\n3 4 7\n5 6\tlight \n-7 8 0.5")
    assert "weight" in complaint(lambda group: open_source(tmp_path / "g.el").open(group))
    for size in (1, 2, 3, 5):
        batch = loaded(size, lambda: open_source(tmp_path / "g.el", block_bytes=4).columns(["dst", "src"]))[0]
        assert batch["src"].tolist() == [1, 3, 5, -7] and batch["dst"].tolist() == [2, 4, 6, 8]
    (tmp_path / "g.el").write_text("1 2 heavy\n3 4\n")
    text = complaint(lambda group: open_source(tmp_path / "g.el").columns(["src"]).open(group))
    assert "line 2" in text and "2 cells" in text


def test_what_is_wrong_in_other_columns_is_not_found(tmp_path: Path) -> None:
    import decimal

    pq.write_table(pa.table({"n": [1, 2], "d": [decimal.Decimal("1.5"), None]}), tmp_path / "a.parquet")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["n"], file["short"] = np.arange(2), np.arange(7)
        file.create_dataset("odd", 2, h5py.ref_dtype)
    np.savez(tmp_path / "a.npz", n=np.arange(2), short=np.arange(7), odd=np.zeros(2, [("a", "i4")]))
    for name in ("a.parquet", "a.h5", "a.npz"):
        with pytest.raises(InputError):
            opened(open_source(tmp_path / name))
        assert loaded(2, lambda name=name: open_source(tmp_path / name).columns(["n"]))[0]["n"].size == 2


def test_damage_in_other_members_is_not_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", n=np.arange(2000), big=np.random.default_rng(1).random(2000))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(b"big.npy") + 4000] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        opened(open_source(tmp_path / "a.npz"))
    assert load_alone(open_source(tmp_path / "a.npz").columns(["n"]))["n"][-1] == 1999


def load_alone(source: Source) -> Any:
    from iterreduce.collectives import SoloGroup

    return load(SoloGroup(), opened(source)).batch


@pytest.mark.parametrize("name", [*FORMATS, "a.csv", "g.el"])
def test_a_column_that_is_not_there_is_told_with_all_that_are(name: str, tmp_path: Path) -> None:
    if name in FORMATS:
        FORMATS[name](tmp_path / name)
    else:
        (tmp_path / name).write_text("x,y\n1,2\n" if name == "a.csv" else "1 2\n")
    text = complaint(lambda group: open_source(tmp_path / name).columns(["x", "wrod"]).open(group))
    want = {"a.csv": "columns: x, y", "g.el": "columns: src, dst", "a.npy": "columns: x"}
    assert "wrod" in text or name == "g.el"
    assert want.get(name, "word") in text


def test_columns_are_at_least_one_and_different() -> None:
    for source in (open_source("a.npy"), StackedSource(open_source("a.npy")), open_source("dir/*")):
        for names in ([], ["x", "x"]):
            with pytest.raises(UsageError, match="at least one"):
                source.columns(names)
    with pytest.raises(UsageError):
        LocalSource(ir.Batch(x=np.arange(3))).columns([])


# ---------------------------------------------------------------- the same rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for name, write in FORMATS.items():
        write(folder / name)
    lines = [
        f'{i},{x[0]},{x[1]},"{w}",' + (f"{i}" if i % 3 else "")
        for i, (x, w) in enumerate(zip(X, WORDS, strict=True))
    ]
    (folder / "a.csv").write_text("id,x[0],x[1],word,gap\n" + "\n".join(lines) + "\n")
    records = np.zeros(ROWS, [("id", "i8"), ("word", "U9"), ("x", "f8", (3,))])
    records["id"], records["word"], records["x"] = ID, WORDS, X
    np.save(folder / "records.npy", records)
    with h5py.File(folder / "records.h5", "w") as file:
        file["r"], file["beside"] = records[["id", "x"]], ID
    edges = np.random.default_rng(3).integers(0, 99, (ROWS, 3))
    (folder / "g.el").write_text("".join(f"{a} {b} {c}.5\n" for a, b, c in edges))
    (folder / "t.el").write_text("".join(f"v{a} {b} {c}\n" for a, b, c in edges))
    both = scipy.sparse.coo_array((edges[:, 2] + 1.0, (edges[:, 0], edges[:, 1])), (99, 99))
    scipy.io.mmwrite(folder / "g.mtx", scipy.sparse.coo_array(both + both.T), symmetry="symmetric")
    np.savez(folder / "e.npz", dst=ID, more=X, src=ID[::-1].copy(), weight=ID * 0.5)
    return folder


SOURCES: dict[str, Callable[[Path], Source]] = {
    **{name: lambda folder, name=name: open_source(folder / name, block_rows=64) for name in TABLES},  # type: ignore[misc]
    "records.npy": lambda folder: open_source(folder / "records.npy", block_rows=64),
    "records.h5": lambda folder: open_source(folder / "records.h5", block_rows=64),
    "a.csv": lambda folder: open_source(folder / "a.csv", block_bytes=999),
    "g.el": lambda folder: open_source(folder / "g.el", block_bytes=999),
    "t.el": lambda folder: open_source(folder / "t.el", block_bytes=999),
    "g.mtx": lambda folder: open_source(folder / "g.mtx", block_bytes=999),
    "found": lambda folder: open_source(f"{folder}/a.np[z]", block_rows=64),
    "edges": lambda folder: edges_of(open_source(folder / "e.npz", block_rows=64)),
    "stacked": lambda folder: StackedSource(open_source(folder / "a.npz").columns(["id", "x"]), "m", "id"),
    "beside": lambda folder: StackedSource(open_source(folder / "a.h5"), "x"),
    "table": lambda folder: StackedSource(open_source(folder / "a.csv"), "x", ("word", "gap")),
    "finite": lambda folder: FiniteSource(open_source(folder / "a.npz"), ["id", "x"]),
}


@settings(max_examples=50)
@given(kind=st.sampled_from(sorted(SOURCES)), size=st.sampled_from([1, 2, 3, 5]), data=st.data())
def test_columns_hold_what_they_hold_when_all_are_read(folder: Path, kind: str, size: int, data: Any) -> None:
    make = lambda: SOURCES[kind](folder)  # noqa: E731
    names = list(opened(make()).schema)
    columns = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    same_columns(make, columns, size)


@settings(max_examples=50)
@given(data=st.data(), size=st.sampled_from([1, 2, 3]))
def test_columns_of_any_csv_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: Any, size: int
) -> None:
    """Names that may be parts of vectors, beside words that forbid it."""
    pool = ["a", "x[0]", "x[1]", "x[2]", "x", "y[0,0]", "y[0,1]", "x[0][0]", "b"]
    names = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=7, unique=True))
    cell = st.sampled_from(["1", "2.5", "", "word", "99999999999999999999", "nan", '"q,\n"'])
    rows = data.draw(st.lists(st.lists(cell, min_size=len(names), max_size=len(names)), max_size=6))
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("".join(",".join(row) + "\n" for row in [map(quoted, names), *rows]))
    found = list(opened(open_source(path, block_bytes=16)).schema)
    columns = data.draw(st.lists(st.sampled_from(found), min_size=1, unique=True))
    same_columns(lambda: open_source(path, block_bytes=16), columns, size)
    for name in (n for n in names if n not in found):
        with pytest.raises(InputError, match="no column"):
            opened(open_source(path).columns([name]))


# ---------------------------------------------------------------- runs


def adding_up(source: Source) -> ir.Loop:
    """The sum of a column by a loop, three times over."""
    total = ir.Total("rows", (), {"n": ir.sum("n")}, "t")
    step = ir.Superstep("step", (total,), (ir.Replace("s", "t"),))
    first = ir.Batch(n=np.zeros(1, np.int64))
    return ir.Loop(
        "sum", {"rows": source, "first": first}, {"s": ir.State("first")}, (step,), ir.Until.of([], 3), "s"
    )


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_tells_what_it_read(size: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", n=np.arange(9000), more=np.zeros((9000, 50)))

    def work(group: Any) -> tuple[int, list[int], list[int]]:
        source = open_source(tmp_path / "a.npz").columns(["n"])
        events, seen = Events(), []

        def watch(event: Event) -> None:
            if event.name == "load":
                seen.append(event.fields["bytes_read"])

        events.subscribe(watch)
        first = run_loop(adding_up(source), group, events=events)
        again = run_loop(adding_up(source), group)
        assert first["n"].tolist() == again["n"].tolist() == [9000 * 8999 // 2]
        assert again.bytes_read == first.bytes_read
        return first.bytes_read, seen, first["n"].tolist()

    got = run_ranks(size, work)
    assert sum(read for read, _, _ in got) == 2 * 9000 * 8
    assert all(seen == [read] for read, seen, _ in got)


def test_a_restart_on_other_columns_is_another_job(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", n=np.arange(900), more=np.zeros((900, 5)))

    def part(columns: list[str], stop: int | None) -> Any:
        make = lambda group: adding_up(open_source(tmp_path / "a.npz").columns(columns))  # noqa: E731
        return run_once(make, 2, tmp_path / "saved", stop)[0]

    part(["n"], 1)
    with pytest.raises(CheckpointError, match=r"of columns n' then, .* columns n, more' now"):
        part(["n", "more"], None)
    assert part(["n"], None)["n"].tolist() == [900 * 899 // 2]
