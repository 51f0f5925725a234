"""Trees of columns: what Python's operators and NumPy's functions make of them, and what they refuse."""

from __future__ import annotations

import datetime
import operator
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.columns.batch import Batch
from iterreduce.columns.compute import (
    compute,
    compute_columns,
    dtype_of,
    evaluate,
    select_rows,
    typed,
    typed_columns,
    values_of,
)
from iterreduce.columns.expressions import Apply, Parameter, apply, key_of, same
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.operations import NAME_OF, NUMPY
from iterreduce.columns.schema import Field
from iterreduce.columns.simplify import fold_constants
from iterreduce.columns.trees import columns_of, parameters_of, renamed, substitute, walk
from iterreduce.errors import SchemaError, UsageError

OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne")
A, B = np.array([3.0, 1.0, 4.0]), np.array([2.0, 7.0, 1.0])
it = ir.col("x")


@pytest.mark.parametrize("function", NAME_OF, ids=lambda function: function.__name__)
def test_functions_of_numpy_make_trees_that_give_what_they_give(function: Any) -> None:
    tree = function(*(ir.col("a"), ir.col("b"))[: function.nin])
    assert isinstance(tree, Apply) and NUMPY[tree.operation] is function
    np.testing.assert_array_equal(evaluate(tree, {"a": A, "b": B}), function(*(A, B)[: function.nin]))


@pytest.mark.parametrize("name", ["log1p", "sin", "floor", "hypot", "arctan2", "sign", "isfinite", "square"])
def test_any_function_of_numpy_with_one_result_works(name: str) -> None:
    function = getattr(np, name)
    arguments = (A, B)[: function.nin]
    tree = function(*(ir.col("a"), ir.col("b"))[: function.nin])
    np.testing.assert_array_equal(compute(tree, Batch(a=A, b=B))[0], function(*arguments))
    np.testing.assert_array_equal(evaluate(tree, {"a": A, "b": B}), function(*arguments))


@pytest.mark.parametrize("number", [2, 2.5, np.float32(2.5), np.int8(2)])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_number_may_stand_on_either_side(name: str, number: Any) -> None:
    function: Callable[..., Any] = getattr(operator, name)
    for tree, wanted in (
        (function(ir.col("a"), number), function(A, number)),
        (function(number, ir.col("a")), function(number, A)),
    ):
        np.testing.assert_array_equal(evaluate(tree, {"a": A}), wanted)
        np.testing.assert_array_equal(compute(tree, Batch(a=A))[0], wanted)


def test_conditions_are_joined_from_either_side() -> None:
    tree = (ir.col("a") > 2) & (ir.col("b") > 1) | ~(ir.col("a") >= 2)
    np.testing.assert_array_equal(evaluate(tree, {"a": A, "b": B}), (A > 2) & (B > 1) | ~(A >= 2))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda x: np.modf(x), "np.modf of columns: an expression knows np.add"),
        (lambda x: np.matmul(x, x), "np.matmul of columns"),
        (lambda x: np.add.reduce(x), "without options"),
        (lambda x: np.add(x, 1, where=False), "without options"),
        (lambda x: np.arange(3) * x, "wanted columns and numbers, got ndarray"),
        (lambda x: x + 2**63, "9223372036854775808 does not fit int64; write it as a float"),
        (lambda x: x + -(2**63) - 1 - 2**70, "does not fit int64"),
        (lambda x: x == None, r"== None holds in no row, as in SQL: write .is_null\(\)"),  # noqa: E711
        (lambda x: x != None, r"write .is_null\(\) or .is_not_null\(\)"),  # noqa: E711
        (lambda x: ir.sum(7), "sum: wanted a column or an expression of columns, got 7"),
        (lambda x: ir.var(None), "var: wanted a column"),
        (lambda x: 1 < x < 3, "has no truth value"),
        (lambda x: np.where(x > 1, 1, 2), "use ir.where"),
        (lambda x: x in [ir.col("y")], "has no truth value"),
        (lambda x: x.is_in("abc"), r"is_in: wanted a list of constants, got 'abc'; write \['abc'\]"),
        (lambda x: x.str.contains(3), "str.contains: wanted text, got int"),
        (lambda x: x.str.slice(0, -1), "a length of -1; wanted 0 or more"),
        (lambda x: ir.when(x > 1) + 1, "unsupported operand"),
        (lambda x: x + ir.when(x > 1), r"go on with .then\(value\)"),
        (lambda x: ir.coalesce(), "coalesce: wanted at least one"),
        (lambda x: x + object(), "got object"),
    ],
)
def test_what_is_no_expression_is_told_where_it_is_written(make: Callable[[Any], Any], told: str) -> None:
    with pytest.raises((UsageError, TypeError), match=told):
        make(ir.col("x"))


def test_a_number_that_does_not_fit_its_column_is_told() -> None:
    with pytest.raises(SchemaError, match=r"expression \(x \+ 300\).*int8; make the column wider"):
        dtype_of(ir.col("x") + 300, {"x": np.dtype(np.int8)})


FIELDS: dict[str, Field | None] = {
    "x": Field("fixed", np.dtype(np.int8)),
    "f": Field("fixed", np.dtype(np.float32), (), True),
    "v": Field("fixed", np.dtype(np.float64), (3,)),
    "w": Field("fixed", np.dtype(np.float64), (2,)),
    "day": Field("fixed", np.dtype("M8[D]")),
    "text": Field("text", np.dtype(np.uint8)),
    "raw": Field("bytes", np.dtype(np.uint8)),
    "list": Field("list", np.dtype(np.int64)),
    "later": None,
}
C = {name: ir.col(name) for name in FIELDS}


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (ir.col("txet") + 1, 'no column "txet".*did you mean "text"'),
        (ir.col("later") + ir.col("lster"), 'no column "lster".*did you mean "later"'),
        (C["text"] + 1, r"in the expression \(text \+ 1\): \+ of text and int64: wanted values of one kind"),
        (C["text"] - C["text"], "- of text and text: wanted numbers"),
        (C["text"] < C["raw"], "< of text and bytes"),
        (C["x"] + 300, r"in the expression \(x \+ 300\).*int8; make the column wider"),
        (C["x"] & C["x"], "& of int8 and int8: wanted conditions, such as x != 0"),
        (C["x"] ** -1, "no integer holds it; write the exponent as a float"),
        (C["v"] + C["w"], r"in the expression \(v \+ w\): of float64\[3\] and float64\[2\]"),
        (C["day"] * 2, r"in the expression \(day \* 2\): of datetime64\[D\]"),
        (ir.where(C["x"], 1, 2), "where of int8: wanted a condition"),
        (ir.where(C["x"] > 1, 1, "a"), "int64 beside text: wanted one type; use .cast"),
        (ir.coalesce(C["f"], C["text"]), "float32 beside text"),
        (C["x"].str.length(), "str.length of int8: wanted text or bytes"),
        (C["raw"].str.contains("a"), "str.contains of bytes: wanted bytes, got 'a'"),
        (C["text"].is_in([1]), "is_in of text: wanted constants of text"),
        (C["x"].is_in(["a"]), "is_in of int8: wanted constants of that type"),
        (C["list"] == C["list"], "== of list and list: wanted numbers"),
        (C["f"].cast("M8[D]"), "a date comes from a date, an integer or text"),
        (C["list"].cast(str), "wanted numbers, bools, dates or bytes"),
        (apply("frobnicate", C["x"]), "frobnicate is no operation"),
        (ir.when(C["x"] > 1).then(C["later"] + (C["text"] + 1)), r"in the expression \(text \+ 1\)"),
    ],
    ids=repr,
)
def test_a_wrong_type_is_told_with_the_expression_before_anything_runs(tree: Any, told: str) -> None:
    with pytest.raises(SchemaError, match=told):
        typed(tree, FIELDS)


@pytest.mark.parametrize(
    ("tree", "type_"),
    [
        (C["x"] + 1, "int8"),
        (C["x"] + np.int64(1), "int64"),
        (C["x"] / 2, "float16"),
        (C["f"] * 2, "float32?"),
        (C["x"] // C["x"], "int8?"),
        (C["x"] // 2, "int8"),
        (C["x"] // 0, "int8?"),
        (C["v"] * C["x"], "float64[3]"),
        (C["v"] > C["f"], "bool[3]?"),
        (C["day"] - C["day"], "timedelta64[D]"),
        (C["day"] >= np.datetime64("2024-01-01"), "bool"),
        (C["text"] + "a", "text"),
        (C["raw"] + b"a", "bytes"),
        (C["f"].is_null(), "bool"),
        (C["f"].fill_null(0), "float32"),
        (C["f"].cast("int64"), "int64?"),
        (C["x"].cast("int64"), "int64"),
        (C["x"].cast(str), "text"),
        (C["list"].hash(), "int64"),
        (ir.when(C["x"] > 1).then(C["x"]), "int8?"),
        (ir.when(C["x"] > 1).then(C["x"]).otherwise(2.5), "float64"),
        (ir.lit(None), "float64?"),
        (ir.lit("a"), "text"),
        (C["x"] + None, "int8?"),
        (Parameter("n", Field("fixed", np.dtype(np.int64))) + C["x"], "int64"),
    ],
    ids=repr,
)
def test_types_are_those_of_numpy_and_a_question_mark_where_nulls_may_stand(tree: Any, type_: str) -> None:
    field = typed(tree, FIELDS)
    if str(tree) == "(x / 2)":  # NumPy's type for int8 over a Python int is its own affair
        type_ = str((np.zeros(0, np.int8) / 2).dtype)
    assert field is not None and field.describe() == type_


def test_what_depends_on_a_column_of_no_known_type_is_not_known() -> None:
    assert typed(C["later"] + 1, FIELDS) is None
    assert typed(Parameter("n") + C["x"], FIELDS) is None
    assert typed_columns({"a": C["x"], "b": C["later"]}, FIELDS)["b"] is None


# ---------------------------------------------------------------------- trees


def test_trees_compare_by_what_they_are() -> None:
    trees = [
        it,
        it + 1,
        it + 1.0,
        it + True,
        it + np.int64(1),
        it / 0.0,
        it / -0.0,
        it.cast("int64"),
        it.cast("int32"),
    ]
    trees += [
        it.is_in([1]),
        it.is_in([True]),
        Parameter("x"),
        ir.lit("x"),
        ir.lit(None),
        ir.lit(float("nan")),
    ]
    assert len({key_of(tree) for tree in trees}) == len(trees)
    assert same(ir.lit(float("nan")), ir.lit(float("nan")))
    assert same(ir.when(it > 1).then(2).otherwise(3), ir.where(it > 1, 2, 3))
    assert ir.sum(it + 1) == ir.sum(it + 1) != ir.sum(it + 1.0)
    assert len({ir.sum(it + 1), ir.sum(it + 1), ir.max(it + 1), ir.sum("x")}) == 3


def test_trees_are_walked_and_changed() -> None:
    n = Parameter("n")
    tree = ir.where(it > n, it, ir.col("y") * n)
    assert [str(part) for part in walk(tree)][:4] == [str(tree), "(x > $n)", "x", "$n"]
    assert columns_of(tree) == ("x", "y") and [p.name for p in parameters_of(tree)] == ["n"]
    assert same(renamed(tree, {"x": "z"}), ir.where(ir.col("z") > n, ir.col("z"), ir.col("y") * n))
    assert same(substitute(it + ir.col("y"), {"x": ir.col("y"), "y": it}), ir.col("y") + it)
    assert renamed(tree, {"q": "z"}) is tree


def test_a_parameter_may_be_a_subclass_that_knows_where_its_value_is() -> None:
    class Scalar(Parameter):
        pass

    tree = it + Scalar("n", of=object())
    assert isinstance(parameters_of(tree)[0], Scalar)
    assert compute(tree, Batch(x=np.arange(3)), {"n": 2})[0].tolist() == [2, 3, 4]


# ---------------------------------------------------------------------- computing


def test_a_plain_column_comes_back_as_the_object_that_it_is() -> None:
    x, mask = np.arange(3), np.array([True, False, True])
    batch = Batch.from_dict({"x": x, "t": ["a", "b", "c"]}, {"x": mask})
    column, valid = compute(it, batch)
    assert column is x and valid is mask
    made = compute_columns({"y": it, "u": ir.col("t")}, batch)
    assert made["y"] is x and made.valid("y") is mask and made["u"] is batch["t"]


def test_parameters_are_given_when_it_is_computed() -> None:
    n = Parameter("n", Field("fixed", np.dtype(np.int64), (), True))
    rows = Batch(x=np.array([1, 2, 3]))
    assert compute(it // n, rows, {"n": 2})[0].tolist() == [0, 1, 1]
    assert compute(it // n, rows, {"n": 0})[1].tolist() == [False] * 3
    assert compute(it > n, rows, {"n": None})[1].tolist() == [False] * 3
    assert select_rows(it > n, rows, {"n": None}).tolist() == []
    assert compute(ir.col("v") - Parameter("m"), Batch(v=np.eye(2)), {"m": np.array([1.0, 2.0])})[
        0
    ].tolist() == [
        [0, -2],
        [-1, -1],
    ]
    with pytest.raises(UsageError, match=r"needs a value for \$n; given are: m"):
        compute(it + n, rows, {"m": 1})


def test_vectors_meet_numbers_row_by_row() -> None:
    v, k = np.arange(6.0).reshape(2, 3), np.array([10, 20])
    batch = Batch.from_dict({"v": v, "k": k}, {"k": np.array([True, False])})
    assert compute(ir.col("v") + ir.col("k"), batch)[0][0].tolist() == [10, 11, 12]
    assert compute(ir.col("v") + ir.col("k"), batch)[1].tolist() == [True, False]
    made = compute(ir.where(ir.col("k") > 5, ir.col("v"), 0), batch)[0]
    assert made.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert compute(ir.coalesce(ir.col("k"), ir.col("v")), batch)[0].tolist() == [[10, 10, 10], [3, 4, 5]]


def test_nothing_under_a_mask_is_told_or_warned_of() -> None:
    mask = np.array([True, False])
    batch = Batch.from_dict({"x": np.array([1.0, -1.0]), "k": np.array([2, -3])}, {"x": mask, "k": mask})
    k = ir.col("k")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values_of(np.log(it) + k**k, x=np.array([1.0]), k=np.array([2])) == [4.0]
        for tree in (np.log(it), k**k, k // (k + 3), it.cast("int64"), k.cast("uint8")):
            assert compute(tree, batch)[1].tolist() == [True, False]
        assert compute(ir.coalesce(np.log(it), 7.0), batch)[0].tolist() == [0.0, 7.0]


def test_integers_that_no_integer_answers_are_null() -> None:
    k = np.array([2, 0, -1])
    assert values_of(7 // it, x=k) == [3, None, -7] and values_of(7 % it, x=k) == [1, None, 0]
    assert values_of(2**it, x=k) == [4, 1, None]
    assert values_of(it // 0, x=k) == [None] * 3
    assert values_of(it.cast("int8"), x=np.array([127, 128, -129])) == [127, None, None]
    assert values_of(it / 0, x=k)[0] == np.inf


def test_dates_are_compared_shifted_and_read_from_text() -> None:
    days = np.array(["2024-02-28", "2024-03-02"], "M8[D]")
    assert values_of(it + np.timedelta64(1, "D") == np.datetime64("2024-02-29"), x=days) == [True, False]
    assert values_of(it < datetime.date(2024, 3, 1), x=days) == [True, False]
    assert values_of(it.cast("M8[D]").cast(str), x=["2024-02-28", "never"]) == ["2024-02-28", None]
    assert values_of((it - it).cast("int64"), x=days) == [0, 0]


def test_numbers_become_text_and_text_numbers() -> None:
    assert values_of(it.cast(str), x=np.array([1.5, 1e300, -0.0])) == ["1.5", "1e+300", "-0.0"]
    assert values_of(it.cast(str), x=np.array([True, False])) == ["true", "false"]
    assert values_of(it.cast("float64"), x=["1.5", "x", " 2 "]) == [1.5, None, 2.0]
    assert values_of(it.cast(bool), x=["true", "0", "maybe"]) == [True, False, None]
    assert values_of(it.cast("uint8"), x=["255", "256", "-1"]) == [255, None, None]


def test_the_hash_is_the_one_of_keys() -> None:
    rows = Batch.from_dict({"x": ["a", "b", "a"]}, {"x": np.array([True, False, True])})
    assert compute(it.hash(), rows)[0].tolist() == hash_keys(rows).view(np.int64).tolist()


def test_text_in_slices_of_larger_columns_is_read_right() -> None:
    whole = Batch(x=["äb", "no", "cäd", "", "äb"])
    part = whole.slice(2, 5)
    assert [
        compute(tree, part)[0].tolist() for tree in (it.str.length(), it == "äb", it.str.contains("ä"))
    ] == [
        [3, 0, 2],
        [False, False, True],
        [True, False, True],
    ]
    for tree, wanted in (
        (it.str.upper(), ["CÄD", "", "ÄB"]),
        (it.str.slice(1, 1), ["ä", "", "b"]),
        (it + "!" + it, ["cäd!cäd", "!", "äb!äb"]),
    ):
        assert compute(tree, part)[0].to_list() == wanted


def test_many_constants_are_looked_up() -> None:
    numbers, words = list(range(0, 400, 3)), [f"w{i}" for i in range(0, 90, 7)]
    assert values_of(it.is_in(numbers), x=np.arange(400)) == [i % 3 == 0 for i in range(400)]
    assert values_of(it.is_in(words), x=[f"w{i}" for i in range(90)]) == [i % 7 == 0 for i in range(90)]
    assert values_of(it.is_in([2**62, 2**62 + 1, *range(10)]), x=np.array([2**62 + 2, 2**62 + 1])) == [
        False,
        True,
    ]


def test_constants_fold_without_changing_types() -> None:
    small = Field("fixed", np.dtype(np.int8))
    for tree in (
        it + (ir.lit(2) + 3),
        ir.where(ir.lit(True), 1, it) + it,
        it + None,
        ir.coalesce(None, it, 5),
    ):
        assert typed(fold_constants(tree, {"x": small}), {"x": small}) == typed(tree, {"x": small}), tree
    condition = {"x": Field("fixed", np.dtype(bool))}
    assert same(fold_constants(~~it & True | False, condition), it)
    assert str(fold_constants(it & (ir.lit(1) > 2), condition)) == "bool(False)"
    assert str(fold_constants(it & ir.lit("a").is_null(), condition)) == "bool(False)"
    assert str(fold_constants((it + None) > 1, {"x": small})) == "|b1(None)"


def test_expressions_of_aggregators_skip_nulls_as_columns_do() -> None:
    def hide(rows: Batch) -> Batch:
        return rows.with_valid(x=rows["x"] != 5)

    data = ir.Dataset.from_local(k=np.array([1, 1, 2]), x=np.array([4, 5, 6]))
    reduce = {"n": ir.sum(it.fill_null(100)), "m": ir.sum(it // 2)}
    found = ir.MapReduce(map=hide, key="k", reduce=reduce)(data).collect()
    rows = zip(found["k"].tolist(), found["n"].tolist(), found["m"].tolist(), strict=True)
    assert sorted(rows) == [(1, 104, 2), (2, 6, 3)]
