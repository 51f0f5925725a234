"""What a user sees when something is wrong: one message that says what came and was wanted, and a status.

Through the command line in this process (one rank), on real ranks where a message could come twice, and
through the library where the mistake is in a program.
"""

from __future__ import annotations

import gzip
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.cli import run_command_line
from iterreduce.testing import run_ranks
from tests.launch import ROOT, mpirun, mpirun_environment

KMEANS = str(ROOT / "apps" / "kmeans.py")
LOGISTIC = str(ROOT / "apps" / "logistic_regression.py")
GOOD = np.random.default_rng(0).normal(size=(50, 3))
RAN = []


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return RAN.append, (1,)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder with good points, and nothing written there by a run that failed."""
    monkeypatch.chdir(tmp_path)
    np.save("good.npy", GOOD)
    yield
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "c."))]
    assert not left


def npy() -> bytes:
    return Path("good.npy").read_bytes()


def told(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """The one message of a run that must fail with this status."""
    found = run_command_line([*words, "--quiet"])
    text = capsys.readouterr().err
    assert found == status, text
    assert text.count("iterreduce: ") == 1 and text.startswith("iterreduce: "), text
    assert "Traceback" not in text
    return text


FILES: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("an empty array", "p.npy", lambda: b"", "p.npy is empty (0 bytes): wanted a NumPy .npy file"),
    ("an empty table", "p.csv", lambda: b"", "p.csv is empty: wanted a header line"),
    ("an empty container", "p.h5", lambda: b"", "p.h5 is empty (0 bytes): wanted an HDF5 file"),
    ("a table of no rows", "p.csv", lambda: b"a,b\n", "wanted k=8 different rows of p.csv, which has 0"),
    ("an array cut short", "p.npy", lambda: npy()[:400], "promises 50 rows of 24 bytes, the file holds 11"),
    ("a header cut short", "p.npy", lambda: npy()[:40], "p.npy is truncated: it ends within its header"),
    (
        "a compressed table cut short",
        "p.csv.gz",
        lambda: gzip.compress(b"a,b\n" + b"1,2\n" * 1000)[:-20],
        "p.csv.gz is truncated or damaged",
    ),
    ("an unknown suffix", "p.nyp", npy, "no format ends in .nyp; known: .npy .npz .h5"),
    ("an array that is named a table", "p.csv", npy, "is a NumPy .npy file, whatever its name says"),
    ("a table that is named an array", "p.npy", lambda: b"a,b\n1,2\n", "p.npy is not a NumPy .npy file"),
    ("junk that is named an array", "p.npy", lambda: os.urandom(999), "p.npy is not a NumPy .npy file"),
    ("junk that is named an archive", "p.npz", lambda: os.urandom(999), "p.npz is not a zip archive"),
    ("junk that is named HDF5", "p.h5", lambda: os.urandom(999), "p.h5 is not an HDF5 file"),
    ("junk that is named Parquet", "p.parquet", lambda: os.urandom(999), "p.parquet is not a Parquet file"),
    ("a row too short", "p.csv", lambda: b"a,b\n1,2\n3\n", "p.csv line 3: 1 cell, header has 2 columns"),
    ("a row too long", "p.csv", lambda: b"a,b\n1,2\n3,4,5\n", "p.csv line 3: 3 cells, header has 2 columns"),
    ("a word", "p.csv", lambda: b"a,b\n1,2\n3,four\n", 'line 3, column "b": "four" is not a number'),
    ("a hole", "p.csv", lambda: b"a,b\n1,2\n3,\n", 'line 3, column "b": the cell is empty, wanted a number'),
    ("nan in a table", "p.csv", lambda: b"a,b\n1,2\n3,nan\n", "p.csv row 1 of x holds nan; wanted finite"),
]


@pytest.mark.parametrize(("name", "content", "message"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_a_file_that_is_no_points_is_told(
    capsys: pytest.CaptureFixture[str], name: str, content: Callable[[], bytes], message: str
) -> None:
    Path(name).write_bytes(content())
    assert message in told(capsys, 1, KMEANS, name)


def test_a_file_that_is_not_there_is_told_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, 1, KMEANS, "god.npy")
    assert "no file" in text and 'god.npy; did you mean "good.npy"?' in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_point_that_is_not_finite_is_named(
    capsys: pytest.CaptureFixture[str], value: float
) -> None:
    points = GOOD.copy()
    points[31, 1] = value
    points[40, 0] = np.nan
    np.save("p.npy", points)
    assert f"p.npy row 31 of x holds {value}; wanted finite numbers" in told(capsys, 1, KMEANS, "p.npy")


@pytest.mark.parametrize("name", ["p.npy", "p.npz"])
def test_python_objects_are_never_unpickled(capsys: pytest.CaptureFixture[str], name: str) -> None:
    trap = np.array([Trap(), 1], object)
    if name == "p.npy":
        np.save(name, trap)
    else:
        np.savez(name, x=trap)
    assert "holds Python objects, which would run code when read" in told(capsys, 1, KMEANS, name)
    assert not RAN


def test_points_that_are_no_numbers_or_no_rows_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for values, message in (
        (np.array(["a", "b"]), 'column "x" is text, wanted numbers'),
        (GOOD + 1j, 'column "x" is complex128[3], wanted numbers'),
        (np.float64(3), "holds a single value, not rows"),
        (np.zeros((0, 3)), "wanted k=8 different rows of p.npy, which has 0"),
    ):
        np.save("p.npy", values)
        assert message in told(capsys, 1, KMEANS, "p.npy")


def test_columns_of_unequal_length_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("p.npz", x=GOOD, z=np.zeros(3))
    assert "columns must have one length; rows: x 50, z 3" in told(capsys, 1, KMEANS, "p.npz")


GRAPHS = {
    "nosuch.npy": "nosuch.npy",
    "good.npy": "good.npy holds x float64",
    "other.csv": "other.csv holds from int64, to int64: wanted columns src, dst",
    "junk.npy": "junk.npy is not a NumPy .npy file",
}


@pytest.mark.parametrize("file", GRAPHS)
@pytest.mark.parametrize("app", ["pagerank", "closure", "als", "descendants", "connected_components"])
def test_a_graph_that_cannot_be_read_is_told_before_its_columns_are_missed(
    capsys: pytest.CaptureFixture[str], app: str, file: str
) -> None:
    np.save("good.npy", GOOD[:, 0])
    Path("other.csv").write_text("from,to\n0,1\n")
    Path("junk.npy").write_text("hello")
    Path("roots.csv").write_text("node\n0\n")
    words = [file, *(["roots.csv"] if app == "descendants" else [])]
    text = told(capsys, 1, str(ROOT / "apps" / f"{app}.py"), *words)
    assert GRAPHS[file] in text and "not known" not in text


@pytest.mark.parametrize("make", ["columns", "descendants", "restart"])
def test_other_rows_that_cannot_be_read_are_told_on_all_ranks(make: str) -> None:
    rows, edges = ir.Dataset.read("nosuch.csv"), ir.Dataset.from_local(None, node=np.arange(3))
    asked: dict[str, Callable[[], Any]] = {
        "columns": lambda: rows.as_edges().columns,
        "descendants": lambda: ir.iterate_changes(lambda last: last, rows.distinct("node"), key="node"),
        "restart": lambda: edges.join(rows.with_columns(weight=1), "node", "right"),
    }
    text = complaint(ir.InputError, 3, lambda group: asked[make]())
    assert "no file " in text and "nosuch.csv" in text


@pytest.mark.parametrize("app", ["breadth_first", "shortest_paths"])
def test_a_source_that_is_no_vertex_is_told_by_its_name_and_without_a_traceback(
    capsys: pytest.CaptureFixture[str], app: str
) -> None:
    Path("e.csv").write_text("src,dst,weight\n0,1,1\n")
    text = told(capsys, 1, str(ROOT / "apps" / f"{app}.py"), "e.csv", "99")
    assert text == "iterreduce: the source 99 is no vertex of the graph\n"


def test_a_missing_label_is_told_with_the_columns_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("p.npz", x=GOOD, label=np.zeros(50))
    assert 'p.npz: no column "y" (columns: x, label)' in told(capsys, 1, LOGISTIC, "p.npz")


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_more_clusters_than_points_are_told(capsys: pytest.CaptureFixture[str], start: str) -> None:
    text = told(capsys, 1, KMEANS, "good.npy", "--k", "51", "--start", start)
    assert "wanted k=51 different rows of good.npy, which has 50; ask for fewer" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "0"], "--k: wanted at least 1 cluster, got 0"),
        (["--k", "-3"], "--k: wanted at least 1 cluster, got -3"),
        (["--tolerance", "-1"], "--tolerance: wanted 0 or more, got -1"),
        (["--tolerance", "nan"], "--tolerance: wanted 0 or more, got nan"),
        (["--max-iterations", "0"], "max_iterations: wanted an integer of at least 1, got 0"),
    ],
)
def test_an_option_out_of_its_range_is_told(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    found = run_command_line([KMEANS, "good.npy", "--quiet", *words])
    text = capsys.readouterr().err
    assert found in (1, 2) and text.startswith(f"iterreduce: {message}") and "Traceback" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["good.npy", "--k", "many"], "--k: wanted a whole number, got 'many'"),
        (["good.npy", "--tolerence", "1"], 'unknown option --tolerence; did you mean "--tolerance"?'),
        (["good.npy", "--start", "best"], "--start: wanted one of random, k-means++, got 'best'"),
        (["good.npy", "more.npy"], "'more.npy' is one too many"),
        ([], "wants POINTS"),
    ],
)
def test_a_wrong_command_line_is_told_with_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in told(capsys, 2, KMEANS, *words)


# ---------------------------------------------------------------- the app's file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import iterreduce as ir\n", "app.py holds no app; mark one function with @ir.app"),
        ("def kmeans(:\n", "app.py is not valid Python\n"),
        ("import no_such_module\n", "app.py needs the module 'no_such_module', not found"),
        ("import iterreduce as ir\nir.applied\n", "has no attribute 'applied'"),
    ],
)
def test_a_file_that_holds_no_app_is_told(
    capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    Path("app.py").write_text(text)
    assert run_command_line(["app.py", "good.npy"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("iterreduce: app.py") and message in said
    assert str(ROOT / "iterreduce" / "appfile.py") not in said


# ---------------------------------------------------------------- the results


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "no/such/c.csv"], "there is no directory"),
        (["--out", "c.cvs"], "c.cvs ends in .cvs: wanted one of .npy .npz .h5 .hdf5 .csv .tsv .parquet"),
        (["--out", "c.cvs"], 'did you mean ".csv"?'),
        (["--summary", "no/such/run.json"], "there is no directory no/such"),
    ],
)
def test_a_result_that_has_no_place_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run_command_line([KMEANS, "good.npy", *words]) == 1
    text = capsys.readouterr().err
    assert message in text and "iteration" not in text and "Traceback" not in text


def test_a_directory_that_takes_no_more_bytes_is_told_before_the_work() -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    result = subprocess.run(
        [sys.executable, "-m", "iterreduce", KMEANS, "good.npy", "--out", "c.csv"],
        capture_output=True,
        text=True,
        timeout=240,
        # without bytecode: Python 3.11 leaves half a .pyc behind where a write is cut short
        env={**mpirun_environment(), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=no_room,
    )
    assert result.returncode == 1, result.stderr
    assert "c.csv" in result.stderr and "File too large" in result.stderr
    assert "iteration" not in result.stderr and "Traceback" not in result.stderr


def test_a_disk_that_is_too_full_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 0, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    assert "c.csv: the disk has 0 MiB left" in told(capsys, 1, KMEANS, "good.npy", "--out", "c.csv")


# ---------------------------------------------------------------- more ranks


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([KMEANS, "gone.npy"], 1, "no file"),
        ([KMEANS, "nan.npy"], 1, "nan.npy row 999 of x holds nan"),
        ([KMEANS, "good.npy", "--k", "51"], 1, "wanted k=51 different rows of good.npy, which has 50"),
        ([KMEANS, "good.npy", "--kk", "3"], 2, 'unknown option --kk; did you mean "--k"?'),
        ([KMEANS, "good.npy", "--out", "no/such/c.csv"], 1, "there is no directory"),
    ],
)
def test_two_ranks_tell_it_once(tmp_path: Path, words: list[str], status: int, message: str) -> None:
    points = np.zeros((1000, 2))
    points[999] = np.nan  # of the second rank
    np.save("nan.npy", points)
    result = mpirun(2, "-m", "iterreduce", *words, "--quiet", cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert result.stderr.count("iterreduce: ") == 1 and result.stderr.count(message) == 1, result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------- programs


def complaint(kind: type[Exception], ranks: int, work: Callable[[ir.Group], Any]) -> str:
    """What every rank raises; each of them must."""

    def caught(group: ir.Group) -> str:
        with pytest.raises(kind) as found:
            work(group)
        return str(found.value)

    texts = run_ranks(ranks, caught)
    assert len(set(texts)) == 1, texts
    return texts[0]


def summed(group: ir.Group, map: Any = None, key: str = "k", **columns: Any) -> ir.Result:
    return ir.MapReduce(map=map, reduce=ir.SUM, key=key)(ir.Dataset.from_local(group, **columns)).run(group)


def mapped(map: Any) -> Callable[[ir.Group], ir.Result]:
    return lambda group: summed(group, map, k=np.arange(6), v=np.ones(6))


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_that_hold_other_columns_are_told_which(ranks: int) -> None:
    n = np.arange(3)
    text = complaint(
        ir.DisagreementError, ranks, lambda g: summed(g, k=n.astype(np.int64 if g.rank else np.int32), v=n)
    )
    assert '"k" is int64 on rank 1 and int32 on rank 0' in text
    text = complaint(ir.DisagreementError, ranks, lambda g: summed(g, k=n, v=np.zeros((3, 2 + (g.rank > 0)))))
    assert '"v" is float64[3] on rank 1 and float64[2] on rank 0' in text
    text = complaint(ir.DisagreementError, ranks, lambda g: summed(g, k=n, **{"v" if g.rank else "w": n}))
    assert "on one side only" in text


def test_columns_of_unequal_length_are_told_where_they_are_made() -> None:
    text = complaint(ir.SchemaError, 2, lambda g: summed(g, k=np.arange(3), v=np.ones(4)))
    assert text == "columns of one batch must have one length; rows: k 3, v 4"


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    ("map", "message"),
    [
        (lambda rows: None, "returned NoneType: wanted an ir.Batch"),
        (lambda rows: {"k": rows["k"]}, "returned dict: wanted an ir.Batch"),
        (lambda rows: ir.Batch(v=rows["v"]), 'no column "k" (columns: v)'),
        (lambda rows: ir.Batch(k=rows["k"], v=np.ones(2)), "must have one length; rows: k 6, v 2"),
        (lambda rows: ir.Batch(k=rows["kk"]), 'no column "kk" (columns: k, v); did you mean "k"?'),
        (lambda rows: ir.Batch(k=rows["k"], v=np.array([Trap()] * 6, object)), "Python objects are never"),
    ],
)
def test_a_map_that_returns_what_it_should_not_is_told_on_all_ranks(
    ranks: int, map: Any, message: str
) -> None:
    text = complaint(ir.IterReduceError, ranks, mapped(map))
    assert message in text and "iteration 1" in text


def test_an_error_of_a_map_shows_the_users_line_on_all_ranks() -> None:
    def divide(rows: ir.Batch) -> ir.Batch:
        return ir.Batch(k=rows["k"] // 0 if rows["k"][0] < 0 else 1 // 0)

    text = complaint(ir.UserCodeError, 3, mapped(divide))
    assert "ZeroDivisionError" in text and "in divide" in text and "maps.py" not in text


def test_keys_of_two_types_are_told_between_ranks_and_between_blocks() -> None:
    def by_rank(group: ir.Group) -> ir.Result:
        dtype = np.int64 if group.rank else np.float64
        return summed(
            group, lambda rows: ir.Batch(k=rows["k"].astype(dtype), v=rows["v"]), k=np.arange(3), v=np.ones(3)
        )

    text = complaint(ir.DisagreementError, 2, by_rank)
    assert 'column "k" is float64' in text and "make dtypes and shapes the same on all ranks" in text

    seen = []

    def by_block(rows: ir.Batch) -> ir.Batch:
        seen.append(len(rows))
        return ir.Batch(k=rows["k"].astype(np.int64 if len(seen) == 1 else np.int32), v=rows["v"])

    many = 400_000
    text = complaint(ir.SchemaError, 1, lambda g: summed(g, by_block, k=np.arange(many) % 7, v=np.ones(many)))
    assert "made by by_block changed its columns" in text and "for every block" in text


def test_a_key_that_is_no_column_is_told() -> None:
    text = complaint(ir.SchemaError, 2, lambda g: summed(g, key="word", words=np.arange(3), n=np.arange(3)))
    assert 'no column "word" (columns: words, n); did you mean "words"?' in text


def test_no_rows_make_no_groups(ranks: int) -> None:
    result = run_ranks(ranks, lambda g: summed(g, k=np.zeros(0, int), v=np.zeros(0)))
    assert all(len(r.batch) == 0 and r.batch.names == ("k", "v") for r in result)


def test_more_ranks_than_rows_are_fine() -> None:
    def one_row(group: ir.Group) -> dict[int, float]:
        n = 1 if group.rank == 5 else 0
        batch = summed(group, k=np.full(n, 9), v=np.full(n, 2.5)).batch
        return dict(zip(batch["k"].tolist(), batch["v"].tolist(), strict=True))

    found = run_ranks(8, one_row)
    assert [row for row in found if row] == [{9: 2.5}]


def test_an_unknown_option_of_run_is_told_with_the_nearest() -> None:
    data = ir.Dataset.from_local(None, x=np.zeros(1))
    with pytest.raises(ir.UsageError, match=r'unknown option "nave".*did you mean "naive"'):
        data.run(nave=True)
