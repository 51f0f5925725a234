"""One compiled pass gives what NumPy gives: bits, types, nulls, rows; and is used only where it pays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.columns import compile as door
from iterreduce.columns.batch import Batch
from iterreduce.columns.compile import Fused, Make
from iterreduce.columns.compute import compute_columns, select_rows
from iterreduce.columns.expressions import Expr, Parameter, apply
from iterreduce.columns.jit import on_disk
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.schema import Field
from iterreduce.columns.straight import Straight
from iterreduce.loop import Context
from iterreduce.plan.kernels import Columns, Compute, Keep
from tests.columns.expression_trees import batches, trees

NOTHING: dict[str, Any] = {}
TYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float32",
    "float64",
)
EDGES = {
    "f": [0.0, -0.0, 1.5, -2.5, 1e30, -1e30, np.inf, -np.inf, np.nan, 3.0, 0.5, 2.0**31],
    "b": [True, False] * 6,
}
ROWS = len(EDGES["f"]) ** 2


def edges(name: str) -> np.ndarray:
    dtype = np.dtype(name)
    if dtype.kind in EDGES:
        return np.array(EDGES[dtype.kind], dtype)
    limits = np.iinfo(dtype)
    numbers = [0, 1, 2, 3, 5, 7, 100, limits.max, limits.max - 1, limits.min, limits.min + 1]
    return np.array([*numbers, -1 if limits.min else 9], dtype)


def table() -> Batch:
    """Every pair of edge values of every two types: columns ``int8`` and ``int8_``; those have nulls."""
    columns = {name: np.repeat(edges(name), ROWS // 12) for name in TYPES}
    columns |= {f"{name}_": np.tile(edges(name), ROWS // 12) for name in TYPES}
    valid = {f"{name}_": np.arange(ROWS) % (5 + k) != 0 for k, name in enumerate(TYPES)}
    return Batch.from_dict(columns, valid)


def assert_same(got: Batch, wanted: Batch) -> None:
    assert got.names == wanted.names and len(got) == len(wanted)
    assert got.schema == wanted.schema
    for name in got.names:
        valid = got.valid(name)
        if valid is not None:
            np.testing.assert_array_equal(valid, wanted.valid(name), err_msg=name)
        pair = [batch[name] for batch in (got, wanted)]
        if not isinstance(pair[0], np.ndarray):
            pair = [np.array(column.to_list(), object) for column in pair]
        a, b = pair if valid is None else [column[valid] for column in pair]
        np.testing.assert_array_equal(a, b, err_msg=name)
        if a.dtype.kind == "f":
            there = ~np.isnan(a)
            np.testing.assert_array_equal(np.signbit(a[there]), np.signbit(b[there]), err_msg=name)


def by_numpy(rows: Batch, made: Mapping[str, Expr], predicate: Expr | None = None) -> Batch:
    return compute_columns(made, rows if predicate is None else rows.take(select_rows(predicate, rows)))


def by_loop(rows: Batch, made: Mapping[str, Expr], predicate: Expr | None = None) -> Batch:
    steps: list[Any] = [Make(made)] if predicate is None else [predicate, Make(made)]
    done, got = Fused(steps, eager=True).run(rows, NOTHING)
    assert done == len(steps)
    return got


def known(made: Mapping[str, Expr], rows: Batch) -> dict[str, Expr]:
    """Those that are of types that suit, but for halves."""
    found = {}
    for name, tree in made.items():
        try:
            field = compute_columns({name: tree}, rows.slice(0, 0)).schema[name]
        except ir.SchemaError:
            continue
        if field.dtype != np.float16:
            found[name] = tree
    return found


def pairs(seed: int, many: int) -> list[tuple[ir.Expr, ir.Expr]]:
    drawn = np.random.default_rng(seed).integers(0, len(TYPES), (many, 2))
    return [(ir.col(TYPES[a]), ir.col(f"{TYPES[b]}_")) for a, b in drawn]


BINARY = ["add", "subtract", "multiply", "divide", "floor_divide", "remainder", "minimum", "maximum"]
COMPARED = ["less", "less_equal", "greater", "greater_equal", "equal", "not_equal"]


@pytest.mark.parametrize(
    "names", [BINARY[:4], BINARY[4:], COMPARED], ids=["arithmetic", "divisions", "signs"]
)
def test_operations_on_two_columns_of_any_types_give_numpy_s_bits(names: list[str]) -> None:
    rows = table()
    made = {f"{n} {a} {b}": apply(n, a, b) for k, n in enumerate(names) for a, b in pairs(k, 14)}
    made |= {f"{n} {a}": apply(n, a, 3) for n in names for a in map(ir.col, TYPES)}
    made = known(made, rows)
    assert len(made) > 40
    assert_same(by_loop(rows, made), by_numpy(rows, made))


def test_functions_of_one_column_of_any_type_give_numpy_s_bits() -> None:
    rows, names = (
        table(),
        ("negative", "absolute", "sqrt", "floor", "ceil", "trunc", "rint", "isnan", "isfinite"),
    )
    made = {f"{n} {t}": apply(n, ir.col(t)) for n in (*names, "isinf") for t in TYPES}
    made |= {f"{t} ** 2": ir.col(t) ** 2 for t in TYPES}
    made = known(made, rows)
    assert len(made) > 60
    assert_same(by_loop(rows, made), by_numpy(rows, made))


def test_casts_between_all_types_are_null_where_a_type_cannot_hold_it() -> None:
    rows = table()
    made = {f"{a} to {b}": ir.col(f"{a}_").cast(b) for a in TYPES for b in TYPES if TYPES.index(a) % 2 == 0}
    assert_same(by_loop(rows, made), by_numpy(rows, made))


def test_conditions_and_choices_of_any_types_give_numpy_s_bits() -> None:
    rows = table()
    p, q = ir.col("bool"), ir.col("bool_")
    made: dict[str, Any] = {f"where {a} {b}": ir.where(q, a, b) for a, b in pairs(7, 12)}
    made |= {f"coalesce {a} {b}": ir.coalesce(b, a) for a, b in pairs(8, 12)}
    made |= {f"fill {b}": b.fill_null(1) for _, b in pairs(9, 8)}
    made |= {"and": p & q, "or": p | q, "xor": p ^ q, "not": ~q, "null": q.is_null(), "no": p.is_null()}
    made |= {"unsure": q & ir.lit(None), "sure": p | ir.lit(None), "when": ir.when(q).then(ir.col("int8"))}
    made |= {"in": ir.col("int16_").is_in([1, 7, -1]), "in?": ir.col("float32_").is_in([1.5, None])}
    made |= {
        "zero": ir.col("int8") // 0,
        "constant": ir.lit(7),
        "typed": ir.lit(np.int16(7)) + ir.col("int8"),
    }
    made = known(made, rows)
    assert len(made) > 35
    assert_same(by_loop(rows, made), by_numpy(rows, made))


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(
    batches(),
    *(st.lists(trees(kind), min_size=3, max_size=3) for kind in ("int", "float", "bool")),
)
def test_any_trees_give_what_numpy_gives(rows: Batch, i: Any, f: Any, b: Any) -> None:
    made = {f"o{k}": tree for k, (tree, _) in enumerate([*i, *f, *b])}
    done, got = Fused([Make(made)], eager=True).run(rows, NOTHING)
    if done:
        assert_same(got, by_numpy(rows, made))
    for name, tree in made.items():
        work = Straight({name: tree, "again": tree})
        for some in (rows, rows.slice(0, len(rows) // 2)):
            straight = work.run(some, NOTHING)
            if straight is not None:
                assert_same(straight, by_numpy(some, work.trees))
    predicate = b[0][0]
    done, got = Fused([predicate, Make(made)], eager=True).run(rows, NOTHING)
    kept = rows.take(select_rows(predicate, rows))
    assert_same(got, [rows, kept, compute_columns(made, kept)][done])


x, y, n, s = map(ir.col, "xyns")


def rows_of(many: int) -> Batch:
    draw = np.random.default_rng(many)
    texts = Ragged.from_list([f"t{i % 7}" for i in range(max(many, 1))]).take(np.arange(many))
    columns = {"x": draw.random(many), "y": draw.random(many), "n": draw.integers(-9, 9, many), "s": texts}
    return Batch.from_dict(columns, valid={"y": draw.random(many) < 0.8})


CONDITION = (x > 0.3) & (n != 2)
MADE = {"a": (x * 2 + 1) * (y - 3), "b": ir.where(y > 0.5, n // 3, n % 4), "x": x, "n": n}


@pytest.mark.parametrize("many", [1, 2, 2047, 2048, 2049, 10_000])
def test_rows_that_a_condition_keeps_are_computed_and_written_in_one_pass(many: int) -> None:
    rows = rows_of(many)
    assert_same(by_loop(rows, MADE, CONDITION), by_numpy(rows, MADE, CONDITION))
    none = by_loop(rows, MADE, CONDITION & (x > 2))
    assert len(none) == 0 and none.schema == by_loop(rows, MADE, CONDITION).schema


def test_text_travels_beside_what_is_compiled() -> None:
    rows = rows_of(5000)
    steps = [(s == "t3") | (x > 0.9) & (y + n > 1), Make({"z": x + n * y}, rest=True), n > 0]
    done, got = Fused(steps, eager=True).run(rows, NOTHING)
    kept = rows.take(select_rows(steps[0], rows))
    made = compute_columns({"z": x + n * y}, kept)
    wanted = Batch.from_dict(
        {**{c: kept[c] for c in kept.names}, "z": made["z"]},
        valid={"y": kept.valid("y"), "z": made.valid("z")},
    )
    assert done == 3
    assert_same(got, wanted.take(select_rows(n > 0, wanted)))


def test_what_only_numpy_can_do_is_read_or_stands_beside() -> None:
    rows = rows_of(5000)
    made = {"a": np.exp(x * 2) * y + n, "b": s.str.upper(), "c": (s == "t3") & (x > 0.5), "d": x // 0.3}
    assert_same(by_loop(rows, made), by_numpy(rows, made))


def test_few_rows_are_computed_by_straight_calls_as_long_as_types_are_those_met() -> None:
    number = Parameter("n", Field("fixed", np.dtype(np.float64), nullable=True))
    trees = {"a": 0.15 + 0.85 * (1 - ir.coalesce(number, 0)) * x, "n": n, "k": n * 2 - ir.coalesce(number, 1)}
    work = Straight(trees)

    def same(rows: Batch, values: dict[str, Any], straight: bool) -> None:
        got = work.run(rows, values)
        assert (got is not None) == straight
        if got is not None:
            assert_same(got, compute_columns(trees, rows, values))
            assert got["n"] is rows["n"]

    few = rows_of(50)
    same(few, {"n": None}, straight=False)
    for number_here in (np.float64(0.5), np.float64(-3)):
        same(few, {"n": number_here}, straight=True)
    same(rows_of(0), {"n": np.float64(1)}, straight=False)
    same(rows_of(40), {"n": np.float64(1)}, straight=True)
    same(few.with_columns(n=few["x"]), {"n": np.float64(1)}, straight=False)  # and so it stays
    for tree in (y + 1, n // 3, n**2, s, ir.where(x > 0.5, 1, 2), ir.lit("t")):  # nulls, or no numbers
        assert Straight({"o": tree}).run(few, NOTHING) is None


def test_a_column_that_is_handed_through_is_the_same_object() -> None:
    rows = rows_of(5000)
    done, got = Fused([Make({"u": x, "v": y, "w": x + y * n, "s": s})], eager=True).run(rows, NOTHING)
    assert done == 1 and got["u"] is rows["x"] and got["v"] is rows["y"] and got["s"] is rows["s"]
    assert got.valid("v") is rows.valid("y")


def test_constants_that_became_a_column_have_the_type_of_a_column() -> None:
    rows = Batch(k=np.arange(4, dtype=np.int8))
    steps = [
        Make({"k": ir.col("k"), "one": ir.lit(1)}),
        Make({"z": ir.col("k") + ir.col("one"), "q": 5 // ir.col("one")}),
    ]
    done, got = Fused(steps, eager=True).run(rows, NOTHING)
    first = compute_columns(steps[0].trees, rows)
    assert done == 2
    assert_same(got, compute_columns(steps[1].trees, first))


def test_numbers_given_later_are_read_in_every_call() -> None:
    tree = {"z": (x + Parameter("p")) * 2 + Parameter("q")}
    chain, rows = Fused([Make(tree)], eager=True), rows_of(100)
    for values in ({"p": 1.5, "q": 2}, {"p": 2.5, "q": 3}, {"p": np.float32(1), "q": None}):
        done, got = chain.run(rows, values)
        wanted = compute_columns(tree, rows, values)
        assert_same(got if done else wanted, wanted)


def test_columns_that_do_not_lie_in_one_piece_are_read_too() -> None:
    rows = Batch(x=np.arange(20.0)[::2], n=np.arange(30)[::-3])
    made = {"z": x * 2 + n * 3}
    assert_same(by_loop(rows, made), by_numpy(rows, made))


def test_one_chain_serves_columns_of_several_types() -> None:
    chain, made = Fused([Make({"z": x + x * 2})], eager=True), {"z": x + x * 2}
    for dtype in ("int8", "float32", "int8", "float64"):
        rows = Batch(x=np.arange(9).astype(dtype))
        done, got = chain.run(rows, NOTHING)
        assert done == 1
        assert_same(got, compute_columns(made, rows))


def test_wrong_types_are_told_by_numpy_s_path() -> None:
    compute = Compute((Columns((("z", s + x + n * 2),)),))
    with pytest.raises(ir.SchemaError, match="in the expression"):
        compute.run(Context(0, 0, 1), rows_of(5000))


def test_the_loop_is_made_only_when_numpy_has_cost_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"z": (x + 1.0) * (y + 2.0) - (x - 3.0) / (y * 7.0 + n)}
    monkeypatch.setattr(door, "LOAD_SECONDS", 0.0)
    monkeypatch.setattr(door, "_MACHINES", {})
    monkeypatch.setattr(door, "on_disk", lambda loop, signature: False)
    chain, rows = Fused([Make(made)]), rows_of(5000)
    monkeypatch.setattr(door, "COMPILE_SECONDS", 15 * 5000 * door.SECONDS_PER_ROW)
    used = [chain.run(rows, NOTHING)[0] for _ in range(4)]
    assert used[0] == 0 and used[-1] == 1
    monkeypatch.setattr(door, "on_disk", lambda loop, signature: True)
    monkeypatch.setattr(door, "_MACHINES", {})
    assert Fused([Make(made)]).run(rows, NOTHING)[0] == 1
    assert Fused([Make(made)]).run(rows_of(100), NOTHING)[0] == 0


def test_a_loop_is_found_on_disk_by_what_it_does() -> None:
    by_loop(rows_of(10), MADE)
    (machine,) = [m for p, m in door._MACHINES.items() if len(p.writes) == 2 and p.condition < 0][:1]
    again = door.compiled(next(p for p, m in door._MACHINES.items() if m is machine))
    assert not again.overloads and on_disk(again, door.SIGNATURE)


@pytest.mark.parametrize("many", [0, 100, 9000])
def test_steps_of_a_plan_give_the_same_with_and_without_the_loop(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(many)
    steps = (
        Keep(CONDITION),
        Columns((("z", x * 2 + y), ("n", n), ("s", s))),
        Keep(ir.col("z") > 1),
        Columns((("w", ir.col("z") - n), ("t", s.str.upper()), ("s", s))),
    )
    plain = Compute(steps).run(Context(0, 0, 1), rows)
    monkeypatch.setattr(door, "_MACHINES", {})
    monkeypatch.setattr(door, "LEAST_ROWS", 0)
    monkeypatch.setattr(door, "LOAD_SECONDS", -1.0)
    monkeypatch.setattr(door, "COMPILE_SECONDS", -1.0)
    assert_same(Compute(steps).run(Context(0, 0, 1), rows), plain)
