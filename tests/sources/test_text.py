"""Lines and CSV: every line belongs to one rank, whatever the blocks; types are those of all the data."""

from __future__ import annotations

import csv
import gzip
import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns import cells
from iterreduce.sources import StackedSource, open_source
from iterreduce.sources.csvout import numerals, quoted

from .kit import complaint_about, loaded, opened, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


# ---------------------------------------------------------------- lines


@settings(max_examples=40)
@given(
    lines=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0"), max_size=9), max_size=20
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    block_bytes=st.integers(1, 12),
    size=st.sampled_from([1, 2, 3, 5, 8]),
)
def test_lines_are_conserved_whatever_the_block_size(
    folder: Path, lines: list[str], end: str, last: bool, block_bytes: int, size: int
) -> None:
    raw = (end.join(lines) + (end if last and lines else "")).encode()
    (folder / "a.txt").write_bytes(raw)
    want = raw.replace(b"\r\n", b"\n").split(b"\n")
    want = want[:-1] if want[-1] == b"" else want
    got = read(folder / "a.txt", size, block_bytes=block_bytes)["line"]
    assert got.to_list() == [line.decode() for line in want]


def test_a_line_belongs_to_the_block_of_its_first_byte(folder: Path) -> None:
    (folder / "b.txt").write_text("aaa\nbb\nccccccccccc\nd\n")
    _, shares, _ = loaded(1, lambda: open_source(folder / "b.txt", block_bytes=4))
    assert np.diff(shares[0].block_starts).tolist() == [1, 2, 0, 0, 1, 0]


def test_a_line_longer_than_the_read_ahead_stays_whole(folder: Path) -> None:
    lines = ["a" * 300_000, "b", "c" * 100_000]
    (folder / "long.txt").write_text("\n".join(lines))
    for size in (1, 3, 8):
        assert read(folder / "long.txt", size)["line"].to_list() == lines


def test_text_of_several_files_without_a_last_newline_is_not_glued(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("a\nb")
    (tmp_path / "2.txt").write_text("")
    (tmp_path / "3.txt").write_text("\ufeffc\n", encoding="utf-8")
    (tmp_path / "4.txt.gz").write_bytes(gzip.compress(b"d\ne\n"))
    for size in (1, 2, 5):
        assert read(tmp_path, size, block_bytes=2)["line"].to_list() == ["a", "b", "c", "d", "e"]


def test_a_file_without_a_suffix_is_lines_and_latin_1_survives(folder: Path) -> None:
    (folder / "words").write_bytes(b"caf\xe9\nna\xc3\xafve\n")
    line = read(folder / "words", 2)["line"]
    assert line.values.tobytes() == b"caf\xe9na\xc3\xafve"


def test_an_empty_text_has_no_lines(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    assert len(read(folder / "empty.txt", 3)) == 0


# ---------------------------------------------------------------- numerals


@settings(max_examples=50)
@given(
    st.one_of(
        st.floats(allow_nan=False).map(repr),
        st.floats(allow_nan=False).map("{:.17e}".format),
        st.integers(-(2**70), 2**70).map(str),
        st.tuples(st.integers(0, 2**64), st.integers(-330, 300)).map("{0[0]}e{0[1]}".format),
        st.tuples(st.integers(2**53, 2**54), st.integers(0, 9)).map(lambda p: f"{(p[0] * 2 + 1) << p[1]}.0"),
        st.from_regex(r"[+-]?[0-9]{0,20}\.?[0-9]{0,20}([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    )
)
def test_numerals_are_read_to_the_last_bit_as_python_reads_them(text: str) -> None:
    kind, word = cells.read_numeral(np.frombuffer(text.encode(), np.uint8).copy(), 0, len(text))
    try:
        want = float(text)
    except ValueError:
        assert kind in (cells.TEXT, cells.BLANK)
        return
    if kind == cells.INT:
        assert np.uint64(word).view(np.int64) == int(text)
    elif kind == cells.FLOAT:
        assert struct.pack("Q", int(word)) == struct.pack("d", want)
    else:
        assert kind in (cells.SLOW, cells.BIG)
        assert kind != cells.BIG or not -(2**63) <= int(text) < 2**63


def test_most_shortest_floats_are_read_by_the_compiled_parser() -> None:
    values = np.random.default_rng(2).random(1000) * 10.0 ** np.arange(-150, 150, 0.3)
    raw = [np.frombuffer(repr(float(v)).encode(), np.uint8).copy() for v in values]
    kinds = [cells.read_numeral(r, 0, len(r))[0] for r in raw]
    assert kinds.count(cells.FLOAT) == 1000


# ---------------------------------------------------------------- CSV

CELLS = st.one_of(
    st.integers(-(2**65), 2**65).map(str),
    st.floats().map(repr),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=6).map(lambda s: f"t{s}t"),
    st.sampled_from(["", "", " ", "nan", "-inf", "0x1", "1_0", '"', "\n", ",", "007"]),
)
TABLES = st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[CELLS] * n), max_size=12))


def as_csv(rows: list[tuple[str, ...]], names: list[str], end: str, every: bool) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL if every else csv.QUOTE_MINIMAL)
    writer.writerow(names)
    writer.writerows(rows)
    return out.getvalue()


def number(cell: str) -> float | int | None:
    """What a cell is as a number, by Python, less the forms that are Python's only."""
    if "_" in cell:
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return None


def column_by_hand(cells_of: list[str], quoted_all: bool) -> list[Any]:
    """The obvious way: look at all cells of the column, then convert them one by one."""
    blank = [not c.strip(" \t") for c in cells_of]
    values = [number(c.strip(" \t")) for c, b in zip(cells_of, blank, strict=True) if not b]
    big = any(isinstance(v, int) and not -(2**63) <= v < 2**63 for v in values)
    floats = any(isinstance(v, float) for v in values)
    blanks_are_text = quoted_all and any(b and c for b, c in zip(blank, cells_of, strict=True))
    if (
        any(v is None for v in values)
        or (big and not floats)
        or blanks_are_text
        or (quoted_all and not values and cells_of)
    ):
        return [None if b and not quoted_all else c for c, b in zip(cells_of, blank, strict=True)]
    kind = int if values and not floats else float
    return [None if b else kind(number(c.strip(" \t"))) for c, b in zip(cells_of, blank, strict=True)]  # type: ignore[arg-type]


@settings(max_examples=50)
@given(
    rows=TABLES,
    end=st.sampled_from(["\n", "\r\n"]),
    every=st.booleans(),
    block_bytes=st.integers(1, 40),
    size=st.sampled_from([1, 2, 3, 5]),
)
def test_csv_has_the_rows_that_the_standard_library_reads(
    folder: Path, rows: list[tuple[str, ...]], end: str, every: bool, block_bytes: int, size: int
) -> None:
    names = ["a", "b", "c"][: len(rows[0]) if rows else 1]
    rows = [r for r in rows if every or any(c.strip(" \t") for c in r) or len(r) > 1]
    (folder / "a.csv").write_bytes(as_csv(rows, names, end, every).encode())
    got = read(folder / "a.csv", size, block_bytes=block_bytes)
    for i, name in enumerate(names):
        want = column_by_hand([row[i] for row in rows], every)
        column, valid = got[name], got.valid(name)
        found = column.to_list() if hasattr(column, "to_list") else column.tolist()
        found = [v if valid is None or valid[j] else None for j, v in enumerate(found)]
        assert list(map(same, found)) == list(map(same, want)), name


def same(value: Any) -> Any:
    return "nan" if isinstance(value, float) and math.isnan(value) else (type(value), value)


def test_types_are_agreed_over_ranks_that_see_different_cells(folder: Path) -> None:
    n = 4000
    rows = [f"{i},{i},{i},," for i in range(n)]
    rows[-1] = "1,0.5,one,,7"
    (folder / "mixed.csv").write_text("i,f,t,none,late\n" + "\n".join(rows))
    for size in (1, 2, 8):
        batch = read(folder / "mixed.csv", size, block_bytes=1000)
        assert batch.schema.describe() == "i int64, f float64, t text, none float64?, late int64?"
        assert batch["f"][:3].tolist() == [0, 1, 2]
        assert batch["t"].to_list()[-2:] == [str(n - 2), "one"]
        assert not np.any(batch.valid("none"))
        assert batch["late"][-1] == 7


def test_integers_beyond_int64_stay_exact_as_text_unless_the_column_has_fractions(folder: Path) -> None:
    (folder / "big.csv").write_text(
        "id,f\n9223372036854775807,1\n9223372036854775808,99999999999999999999\n1,0.5\n"
    )
    batch = read(folder / "big.csv", 2, block_bytes=8)
    assert batch["id"].to_list() == ["9223372036854775807", "9223372036854775808", "1"]
    assert batch["f"].tolist() == [1.0, 1e20, 0.5]


def test_vector_columns_are_put_together_again(folder: Path) -> None:
    (folder / "v.csv").write_text(
        'x[0],x[1],"m[0,0]","m[0,1]",y[1],t[0],t[1]\n1,2,3,4,5,a,1\n6,7,8,9.5,0,b,2\n'
    )
    batch = read(folder / "v.csv", 2)
    assert batch["x"].tolist() == [[1, 2], [6, 7]]
    assert batch["m"].tolist() == [[[3.0, 4.0]], [[8.0, 9.5]]]
    assert batch.schema.describe() == "x int64[2], m float64[1,2], y[1] int64, t[0] text, t[1] int64"


def test_tsv_semicolons_and_packed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a\tb\n1\tx,y\n")
    (tmp_path / "b.csv").write_text("a;b\n1;x,y\n")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b'a,b\n1,"x,y"\n'))
    for name in ("a.tsv", "b.csv", "c.csv.gz"):
        batch = read(tmp_path / name, 2, block_bytes=3)
        assert (batch["a"].tolist(), batch["b"].to_list()) == ([1], ["x,y"])


def test_a_byte_order_mark_is_no_part_of_the_first_name(folder: Path) -> None:
    (folder / "bom.csv").write_text("\ufeffa,b\n1,2\n", encoding="utf-8")
    for block_bytes in (2, None):
        batch = read(folder / "bom.csv", 2, block_bytes=block_bytes)
        assert {name: batch[name].tolist() for name in batch.names} == {"a": [1], "b": [2]}


def test_a_header_alone_means_no_rows(folder: Path) -> None:
    (folder / "h.csv").write_text("a,b\n")
    batch = read(folder / "h.csv", 3)
    assert len(batch) == 0
    assert batch.schema.describe() == "a float64, b float64"


def test_columns_of_all_files_get_one_type(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "2.csv").write_text("a,b\n1.5,x\n")
    for size in (1, 2):
        batch = read(tmp_path, size)
        assert batch["a"].tolist() == [1.0, 1.5]
        assert batch["b"].to_list() == ["2", "x"]


def test_a_second_read_of_any_blocks_gives_the_same_rows(folder: Path) -> None:
    (folder / "again.csv").write_text("a,t\n" + "".join(f'{i},"q{i}\n"\n' for i in range(500)))
    source = opened(open_source(folder / "again.csv", block_bytes=97))
    whole = source.read(0, source.blocks.count)
    halves = [source.read(0, 17), source.read(17, 18), source.read(18, source.blocks.count)]
    assert whole.equals(type(whole).concat(halves))
    assert source.block_rows(17, 18).tolist() == [len(halves[1])]
    fresh = opened(open_source(folder / "again.csv", block_bytes=97).columns(["t"]))
    assert fresh.read(3, 9).names == ("t",)


def test_what_is_written_as_csv_is_quoted_only_where_it_must_be() -> None:
    assert quoted(["a b", " a", 'say "x"', "", "1\n2"], ",") == ["a b", '" a"', '"say ""x"""', '""', '"1\n2"']
    assert numerals(np.array([0.1, 1e300, np.nan, -0.0])) == ["0.1", "1e+300", "nan", "-0.0"]
    assert numerals(np.array([0.1], np.float32)) == ["0.1"]
    assert numerals(np.array([True, False])) == ["1", "0"]


# ---------------------------------------------------------------- complaints name file, line and column


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "bad.csv line 3: 3 cells, header has 2 columns"),
        ('a,b\n"x\ny",2\n\n3\n', "bad.csv line 5: 1 cell, header has 2 columns"),
        ('a,b\n1,2\n1,5" pipe\n', "bad.csv line 3: a quote inside an unquoted cell"),
        ('a,b\n1,"2" x\n', "bad.csv line 2: text follows a closing quote"),
        ('a,b\n1,"2\n3,4\n', "bad.csv line 2: a quote opens here and is never closed"),
        ("a,,b\n1,2,3\n", "column 2 of the header has no name"),
        ("a,a\n1,2\n", 'two columns are named "a"'),
        (
            "1,2\n3,4\n",
            "1, 2 are numbers, wanted a header with column names; add a first line such as x[0],x[1]",
        ),
        ("", "bad.csv is empty: wanted a header line"),
        ("\n\n", "bad.csv is empty: wanted a header line"),
        ("a,b\n1,\0\n", "bad.csv is not text: it holds a zero byte at offset 6"),
        ("a,\0b\n1,2\n", "bad.csv is not text: it holds a zero byte at offset 2"),
        ('a,"b\n1,2\n', "a quote opens in the header and is never closed"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(text)
    for block_bytes in (3, None):
        assert message in complaint_about(tmp_path / "bad.csv", block_bytes=block_bytes)


def test_of_several_bad_rows_the_first_is_named(tmp_path: Path) -> None:
    rows = ["1,2"] * 1000
    rows[400] = rows[900] = "1"
    (tmp_path / "bad.csv").write_text("a,b\n" + "\n".join(rows))
    for size in (2, 5, 8):
        assert "line 402: 1 cell" in complaint_about(tmp_path / "bad.csv", size, block_bytes=100)


def test_a_cell_that_is_no_number_is_named_to_who_wants_numbers(tmp_path: Path) -> None:
    rows = [f"{i},{i}" for i in range(1000)]
    rows[700], rows[800] = "7,abc", "8,def"
    (tmp_path / "points.csv").write_text("x,y\n" + "\n".join(rows))
    want = 'points.csv line 702, column "y": "abc" is not a number'
    for size in (1, 3, 8):
        assert want in stacked_complaint(tmp_path / "points.csv", size)
    rows[700] = rows[800] = "7,"
    (tmp_path / "points.csv").write_text("x,y\n" + "\n".join(rows))
    assert 'line 702, column "y": the cell is empty' in stacked_complaint(tmp_path / "points.csv", 3)


def stacked_complaint(path: Path, size: int) -> str:
    from .kit import complaint

    return complaint(lambda group: StackedSource(open_source(path, block_bytes=512)).open(group), size)


def test_utf_16_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n", encoding="utf-16")
    assert "is UTF-16 text: convert it first" in complaint_about(tmp_path / "a.csv")
