"""Bounds on columns leave out row groups that hold no such row, and never a row that counts."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.columns.batch import Batch
from iterreduce.columns.schema import Field
from iterreduce.dataset import Dataset, source_node
from iterreduce.errors import CheckpointError, InputError, UsageError
from iterreduce.sources import FiniteSource, LocalSource, Source, StackedSource, open_source
from iterreduce.sources.asked import rules_out
from iterreduce.sources.blocks import row_in_files
from iterreduce.sources.edges import open_edges
from tests.saving.programs import run_once

from .kit import loaded, opened
from .test_projection import adding_up

RANKS = (1, 2, 3, 5)
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
}


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Rows as tuples, None where there is no value; NaN as a word, since it equals nothing."""
    columns = []
    for name in batch.names:
        column, valid = batch[name], batch.valid(name)
        values = column.to_list() if hasattr(column, "to_list") else list(column)
        columns.append([v if valid is None or valid[i] else None for i, v in enumerate(values)])
    return [
        tuple("nan" if v is not None and v != v else v for v in row) for row in zip(*columns, strict=True)
    ]


def counts(row: tuple[Any, ...], names: tuple[str, ...], bounds: Any) -> bool:
    """Whether all bounds are true of a row, compared value by value."""
    found = dict(zip(names, row, strict=True))
    values = [(found[column], op, constant) for column, op, constant in bounds]
    return all(
        v is not None and (v != "nan" or isinstance(c, str)) and COMPARE[op](v, c) for v, op, c in values
    )


def after_filtering(make: Callable[[], Source], bounds: Any, size: int) -> list[tuple[Any, ...]]:
    batch = loaded(size, make)[0]
    return [row for row in rows_of(batch) if counts(row, batch.names, bounds)]


# ---------------------------------------------------------------- any table, any bounds


DAYS = [np.datetime64("2024-01-01") + np.timedelta64(i, "D") for i in range(0, 60, 7)]
SMALL = st.integers(-5, 5)
VALUES: dict[str, Any] = {
    "i": (pa.int64(), st.one_of(SMALL, st.sampled_from([2**53, 2**53 + 1, -(2**63), 2**63 - 1]))),
    "u": (pa.uint64(), st.sampled_from([0, 1, 5, 2**63 - 1, 2**63, 2**64 - 1])),
    "s": (pa.int8(), SMALL),
    "f": (pa.float64(), st.sampled_from([-1.5, -0.0, 0.0, 0.1, 2.0, float("nan"), float("inf"), 2.0**53])),
    "g": (pa.float32(), st.sampled_from([0.5, 1.5, -2.5, float("nan"), float("-inf")])),
    "b": (pa.bool_(), st.booleans()),
    "t": (pa.string(), st.sampled_from(["", "a", "ab", "b", "ä", "z", "nan"])),
    "d": (pa.date32(), st.sampled_from([day.item() for day in DAYS])),
    "m": (pa.timestamp("ms"), st.sampled_from([day.astype("M8[ms]").item() for day in DAYS])),
}
CONSTANTS: dict[str, Any] = {
    "i": st.one_of(SMALL, st.sampled_from([2.5, float("nan"), 2**53 + 1, np.int32(3), np.float64(1.5)])),
    "u": st.sampled_from([-1, 0, 1, 3, 2**63, 2.5, 2**70]),
    "s": st.one_of(SMALL, st.sampled_from([1000, 0.5])),
    "f": st.sampled_from([-1, 0, 0.1, 2, -0.0, float("nan"), float("inf"), np.float64(0.1), 2**53]),
    "g": st.sampled_from([0.5, 1, -2.5, 7, float("inf")]),
    "b": st.booleans(),
    "t": st.sampled_from(["", "a", "aa", "b", "ö", "~"]),
    "d": st.sampled_from(DAYS),
    "m": st.sampled_from([day.astype("M8[s]") + 1 for day in DAYS]),
}


@st.composite
def tables(draw: Any) -> tuple[pa.Table, dict[str, Any]]:
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3, unique=True))
    rows = draw(st.integers(0, 25))
    columns = {}
    for name in names:
        kind, values = VALUES[name]
        some = st.one_of(values, st.none()) if draw(st.booleans()) else values
        cells = draw(st.lists(some, min_size=rows, max_size=rows))
        if draw(st.booleans()):
            cells = sorted(cells, key=lambda v: (v is None, v != v, v if v == v else 0))
        columns[name] = pa.array(cells, kind)
    how = {"row_group_size": draw(st.integers(1, 8)), "use_dictionary": draw(st.booleans())}
    return pa.table(columns), {**how, "write_statistics": draw(st.sampled_from([True, True, True, False]))}


@settings(max_examples=50, deadline=None)
@given(table=tables(), size=st.sampled_from(RANKS), data=st.data())
def test_after_filtering_the_rows_are_those_of_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, table: Any, size: int, data: Any
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    pq.write_table(table[0], path, **table[1])
    names = table[0].column_names
    column = st.sampled_from(names).flatmap(
        lambda n: st.tuples(st.just(n), st.sampled_from(sorted(COMPARE)), CONSTANTS[n])
    )
    bounds = tuple(data.draw(st.lists(column, min_size=1, max_size=3)))
    make = lambda: open_source(path, block_rows=4)  # noqa: E731
    assert after_filtering(lambda: make().where(bounds), bounds, size) == after_filtering(make, bounds, 1)


day_bounds = st.lists(
    st.tuples(st.sampled_from(["day", "n", "word"]), st.sampled_from(sorted(COMPARE)), st.integers(0, 60)),
    max_size=3,
)


@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from(RANKS), bounds=day_bounds, block=st.sampled_from([7, 64, 300]), data=st.data())
def test_columns_and_bounds_together_over_several_files(
    folder: Path, size: int, bounds: Any, block: int, data: Any
) -> None:
    """Blocks hold what is left of the rows that they hold otherwise, on any number of ranks."""
    bounds = [(c, op, {"day": DAY + v, "n": v, "word": f"w{v:02}"}[c]) for c, op, v in bounds]
    columns = data.draw(st.lists(st.sampled_from(["day", "n", "word", "x"]), min_size=1, unique=True))
    asked = lambda: open_source(folder, block_rows=block).columns(columns).where(bounds)  # noqa: E731
    got, shares, sources = loaded(size, asked)
    numbers = [row_in_files(sources[0], i) for i in range(len(got))]
    whole = loaded(1, lambda: open_source(folder))[0]
    assert got.equals(whole.take(np.array(numbers, np.int64)).select(*columns))
    wanted = [i for i, row in enumerate(rows_of(whole)) if counts(row, whole.names, bounds)]
    assert set(wanted) <= set(numbers) and numbers == sorted(numbers)
    starts = [
        int(share.block_starts[i]) + share.first_row
        for share in shares
        for i in range(len(share.block_starts))
    ]
    cut = [numbers[a:b] for a, b in zip(sorted(set(starts)), sorted(set(starts))[1:], strict=False)]
    assert all(len({n // block for n in part}) == 1 for part in cut)
    assert len(cut) == len({n // block for n in numbers})


DAY = np.datetime64("2024-01-01")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty days of ten rows each, in order, in three files of row groups of 50 rows."""
    folder = tmp_path_factory.mktemp("days")
    n = np.arange(600)
    for i in range(3):
        mine = n[200 * i : 200 * (i + 1)]
        table = {
            "day": pa.array((DAY + mine // 10).astype("M8[D]")),
            "n": mine // 10,
            "word": [f"w{v:02}" for v in mine // 10],
            "x": mine * 0.5,
        }
        pq.write_table(pa.table(table), folder / f"{i}.parquet", row_group_size=50)
    return folder


def bytes_of(source: Source) -> int:
    opened(source)
    source.read(0, source.blocks.count)
    return source.bytes_read


@pytest.mark.parametrize(
    ("bound", "left"),
    [
        (("n", "<", 5), 50),
        (("n", "<=", 5), 100),
        (("n", "==", 12.0), 50),
        (("n", "==", 12.5), 50),
        (("n", ">=", 55), 50),
        (("n", ">", 54), 50),
        (("n", ">", 59), 0),
        (("x", ">", 250), 100),
        (("word", "==", "w07"), 50),
        (("word", ">=", "w5"), 100),
        (("day", "<", DAY + 5), 50),
        (("day", ">=", np.datetime64("2024-02-20T00:00:01")), 100),
        (("day", "==", datetime.date(2024, 1, 3)), 50),
        (("day", "<", datetime.datetime(2024, 1, 6)), 50),
        (("day", "<", np.datetime64("2024-02")), 350),
        (("n", "<", "5"), 600),
        (("word", "<", 5), 600),
        (("n", "<", None), 600),
        (("n", "<", float("nan")), 600),
        (("day", "<", np.datetime64("NaT")), 600),
        (("day", "<", datetime.datetime(2024, 1, 6, tzinfo=datetime.UTC)), 600),
        (("none", "<", 5), 600),
    ],
)
def test_row_groups_that_hold_no_such_row_are_not_read(folder: Path, bound: Any, left: int) -> None:
    source = open_source(folder).where([bound])
    assert source.rows_hint() == left
    nbytes = bytes_of(source)
    assert source.blocks.rows == left
    whole = bytes_of(open_source(folder))
    assert abs(nbytes - whole * left / 600) <= whole / 50
    unseen = open_source(folder).columns(["x"]).where([bound])
    assert bytes_of(unseen) < nbytes or not left
    assert unseen.blocks.rows == left and unseen.schema.describe() == "x float64"


def test_bounds_that_are_given_one_after_the_other_hold_together(folder: Path) -> None:
    source = opened(open_source(folder).where([("n", ">=", 20)]).where([("n", "<", 24)]).columns(["n"]))
    assert source.read(0, source.blocks.count)["n"].tolist() == sorted(list(range(20, 25)) * 10)


def test_nothing_is_left_out_without_statistics_that_can_be_trusted(tmp_path: Path) -> None:
    n = np.arange(100)
    flat = pa.table({"n": n, "a.b": n, "s": [{"b": i} for i in n], "l": [[i] for i in n]})
    pq.write_table(flat, tmp_path / "a.parquet", row_group_size=10, write_statistics=False)
    assert open_source(tmp_path / "a.parquet").where([("n", "<", 5)]).rows_hint() == 100
    pq.write_table(flat, tmp_path / "a.parquet", row_group_size=10)
    for column, left in (
        ("n", 10),
        ("a.b", 10),
        ("s", 100),
        ("s.b", 100),
        ("l", 100),
        ("l.list.element", 100),
    ):
        assert open_source(tmp_path / "a.parquet").where([(column, "<", 5)]).rows_hint() == left
    assert opened(open_source(tmp_path / "a.parquet").columns(["a.b"])).schema.describe() == "a.b int64"


def test_nulls_and_what_is_no_number_are_left_out_only_with_their_group(tmp_path: Path) -> None:
    nan = float("nan")
    table = pa.table(
        {
            "n": pa.array([None, None, 1, None, 5, 9], pa.int64()),
            "f": [nan, nan, nan, 1.0, 5.0, nan],
            "a.b": pa.array([1, 2, None, 4, 5, 6], pa.int64()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    make = lambda *bound: opened(open_source(tmp_path / "a.parquet").where([bound]))  # noqa: E731
    assert make("n", ">", 0).blocks.rows == 4
    assert make("n", "<", 0).blocks.rows == 0
    assert make("f", ">", 2).blocks.rows == 4, "a group of NaN alone has no least value: it is kept"
    whole = make("n", ">", -99).read(0, 1)
    assert whole.valid("a.b") is not None and np.asarray(whole.valid("a.b")).tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_numbers_that_a_comparison_rounds_are_kept() -> None:
    exact, narrow = Field("fixed", np.dtype(np.int64)), Field("fixed", np.dtype(np.float32))
    assert not rules_out("==", 2.0**53, exact, 2**53 + 1, 2**53 + 1)  # equal as floats
    assert rules_out("==", 2**53 - 3, exact, 2**53 + 5, 2**53 + 9)
    tenth = float(np.float32(0.1))
    assert not rules_out("==", 0.1, narrow, tenth, tenth)  # the constant becomes a float32
    assert not rules_out("<", 1e300, narrow, 0.0, 1.0)
    assert not rules_out("==", 3, Field("fixed", np.dtype(np.int64), (2,)), 5, 6)


# ---------------------------------------------------------------- through other sources


def test_bounds_reach_the_file_through_the_sources_around_it(folder: Path, tmp_path: Path) -> None:
    n = np.arange(100)
    pq.write_table(
        pa.table({"a": n, "b": n + 0.5, "y": n, "name": n.astype(str)}),
        tmp_path / "a.parquet",
        row_group_size=10,
    )
    table = lambda: open_source(tmp_path / "a.parquet").columns(["a", "b", "y"])  # noqa: E731
    bound = [("y", ">=", 95)]
    made: list[Source] = [
        FiniteSource(table(), ["a"]).where(bound),
        StackedSource(table(), "x", "y").where(bound),
        StackedSource(table(), "x", "y").where(bound).columns(["x"]),
        FiniteSource(StackedSource(table(), keep="y"), ["x"]).where(bound),
        open_source(f"{tmp_path}/*").columns(["y"]).where(bound),
        open_edges(tmp_path / "a.parquet", ("y", "a", "b")).where([("src", ">=", 95)]),
        open_edges(tmp_path / "a.parquet", ("y", "a", "b")).where([("weight", ">=", 95)]).columns(["dst"]),
        open_edges(f"{tmp_path}/*", ("name", "name")).where([("src", "==", "95")]),
    ]
    for source in made:
        assert opened(source).blocks.rows == 10
        assert source.read(0, source.blocks.count).names == tuple(source.schema)
    unseen = StackedSource(table(), "x", "y").where([("x", ">=", 95)])
    assert opened(unseen).blocks.rows == 100


def test_row_numbers_in_messages_are_those_of_the_file(tmp_path: Path) -> None:
    n = np.arange(100)
    table = {"n": n, "f": np.where(n == 73, np.nan, 1.0), "e": pa.array([None if i == 82 else i for i in n])}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=10)
    make = lambda: open_source(tmp_path / "a.parquet").where([("n", ">=", 60)])  # noqa: E731
    with pytest.raises(InputError, match="row 73 of f holds nan"):
        loaded(3, lambda: FiniteSource(make(), ["f"]))
    with pytest.raises(InputError, match='row 82, column "e"'):
        loaded(2, lambda: StackedSource(make().columns(["n", "e"])))
    with pytest.raises(InputError, match='row 82, column "e"'):
        loaded(2, lambda: open_edges(tmp_path / "a.parquet", ("n", "e")).where([("src", ">=", 60)]))
    assert len(loaded(2, lambda: FiniteSource(make().where([("n", ">=", 80)]), ["f"]))[0]) == 20


def test_formats_that_say_nothing_of_their_blocks_ignore_bounds(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    for source in (open_source(tmp_path / "a.npy"), open_source(tmp_path / "a.csv"), open_source("g.el")):
        assert source.where([("x", "<", 0)]) is source
    rows = LocalSource(Batch(x=np.arange(3)))
    assert rows.where([("x", "<", 0)]) is rows
    assert loaded(2, lambda: open_source(f"{tmp_path}/*.npy").where([("x", "<", 0)]))[0]["x"].size == 100


@pytest.mark.parametrize("bounds", [[("x", "!=", 3)], [("x", 3)], ["x<3"]])
def test_what_is_no_bound_is_refused(bounds: Any) -> None:
    for source in (open_source("a.parquet"), open_source("a.npy"), open_source("dir/"), open_edges("a.csv")):
        with pytest.raises(UsageError, match="column, op, constant"):
            source.where(bounds)


# ---------------------------------------------------------------- what tells one input from another


def test_tokens_tell_bounds_and_columns_apart(folder: Path) -> None:
    asked: list[Source] = [
        open_source(folder),
        open_source(folder).columns(["n"]),
        open_source(folder).where([("n", "<", 5)]),
        open_source(folder).where([("n", "<", 5.0)]),
        open_source(folder).where([("n", "<=", 5)]),
        open_source(folder).where([("word", "<", "5")]),
        open_source(folder).where([("n", "<", 5)]).columns(["n"]),
        open_source(folder).where([("day", "<", np.datetime64("2024-01-02"))]),
        open_source(folder).where([("day", "<", np.datetime64("2024-01-02T00"))]),
    ]
    tokens = [opened(source).token for source in asked]
    assert len(set(tokens)) == len(tokens)
    assert opened(open_source(folder).where([("n", "<", 5)])).token == tokens[2]
    edges = [open_edges(folder, ("n", "n")), open_edges(folder, ("n", "n")).where([("src", "<", 5)])]
    assert len({opened(source).token for source in edges}) == 2


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_with_bounds_restarts_and_with_others_does_not(
    folder: Path, tmp_path: Path, ranks: int
) -> None:
    def part(bounds: Any, stop: int | None, size: int = ranks) -> Any:
        make = lambda group: adding_up(open_source(folder).where(bounds))  # noqa: E731
        return run_once(make, size, tmp_path / "saved", stop)[0]

    part([("n", "<", 5)], 1)
    with pytest.raises(CheckpointError, match=r"where n < 5' then, .* where n < 6' now"):
        part([("n", "<", 6)], None)
    with pytest.raises(CheckpointError, match="where n < 5' then"):
        part([], None)
    assert part([("n", "<", 5)], None, 2)["n"].tolist() == [10 * (0 + 1 + 2 + 3 + 4)]


@pytest.mark.parametrize("size", RANKS)
def test_a_reproducible_run_has_the_bits_that_it_has_without_bounds(folder: Path, size: int) -> None:
    def few(rows: Batch) -> Batch:
        chosen = rows["n"] >= 40
        return Batch(tens=rows["n"][chosen] // 10, y=1 / (rows["x"][chosen] + 0.1))

    def total(bounds: Any) -> str:
        source = open_source(folder, block_rows=32).where(bounds)
        handle = ir.MapReduce(map=few, reduce=ir.SUM, key="tens")(Dataset(source_node(source)))
        return run_once(lambda group: handle.to_loop(), size, reproducible=True)[0].result_sha256

    assert total([("n", ">=", 40)]) == total([])
