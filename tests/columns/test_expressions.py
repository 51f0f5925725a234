"""Trees of columns: what Python's operators and NumPy's functions make of them, and what they refuse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.columns.expressions import OPERATIONS, UFUNCS, Apply, dtype_of, evaluate
from iterreduce.errors import SchemaError, UsageError

OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge")
A, B = np.array([3.0, 1.0, 4.0]), np.array([2.0, 7.0, 1.0])


@pytest.mark.parametrize("function", UFUNCS, ids=lambda function: function.__name__)
def test_functions_of_numpy_make_trees_that_give_what_they_give(function: Any) -> None:
    tree = function(*(ir.col("a"), ir.col("b"))[: function.nin])
    assert isinstance(tree, Apply) and OPERATIONS[tree.operation] is function
    np.testing.assert_array_equal(evaluate(tree, {"a": A, "b": B}), function(*(A, B)[: function.nin]))


@pytest.mark.parametrize("number", [2, 2.5, np.float32(2.5), np.int8(2)])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_number_may_stand_on_either_side(name: str, number: Any) -> None:
    function: Callable[..., Any] = getattr(operator, name)
    for tree, wanted in (
        (function(ir.col("a"), number), function(A, number)),
        (function(number, ir.col("a")), function(number, A)),
    ):
        np.testing.assert_array_equal(evaluate(tree, {"a": A}), wanted)


def test_conditions_are_joined_from_either_side() -> None:
    tree = (ir.col("a") > 2) & (ir.col("b") > 1) | ~(ir.col("a") >= 2)
    np.testing.assert_array_equal(evaluate(tree, {"a": A, "b": B}), (A > 2) & (B > 1) | ~(A >= 2))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda x: np.sin(x), "np.sin of columns: an expression knows np.add"),
        (lambda x: np.add.reduce(x), "without options"),
        (lambda x: np.add(x, 1, where=False), "without options"),
        (lambda x: np.arange(3) * x, "wanted columns and numbers, got ndarray"),
        (lambda x: x + 2**63, "9223372036854775808 does not fit int64; write it as a float"),
        (lambda x: x + -(2**63) - 1 - 2**70, "does not fit int64"),
        (lambda x: ir.sum(x == 3), r"got False \(== compares expressions.*equals\(3\)"),
        (lambda x: ir.sum(7), "sum: wanted a column or an expression of columns, got 7"),
        (lambda x: ir.var(None), "var: wanted a column"),
        (lambda x: ir.where(x == 3, 1, 2), "where of a condition that is False for all rows; == compares"),
        (lambda x: (x == 3) & (x > 2), "and of a condition that is False"),
        (lambda x: (x > 2) | (x == 3), "or of a condition that is False"),
        (lambda x: 1 < x < 3, "has no truth value"),
        (lambda x: np.where(x > 1, 1, 2), "use ir.where"),
    ],
)
def test_what_is_no_expression_is_told_where_it_is_written(make: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make(ir.col("x"))


def test_a_number_that_does_not_fit_its_column_is_told() -> None:
    with pytest.raises(SchemaError, match=r"expression \(x \+ 300\).*int8; make the column wider"):
        dtype_of(ir.col("x") + 300, {"x": np.dtype(np.int8)})
