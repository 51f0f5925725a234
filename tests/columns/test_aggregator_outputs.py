"""How aggregators are bound to columns, and aggregators of one's own."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from iterreduce.columns.aggregators import (
    COLLECT,
    COUNT,
    MEAN,
    SUM,
    Aggregator,
    argmax,
    argmin,
    bind_outputs,
    collect,
    count,
    mean,
    sum_,
)
from iterreduce.columns.batch import Batch
from iterreduce.columns.laws import check_laws
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import SchemaError, UsageError
from tests.columns.aggregator_oracle import (
    AGGREGATORS,
    agree,
    field_like,
    fold,
    fold_apart,
    reference,
)

SCHEMA = Schema(
    {
        "key": Field("fixed", np.dtype("i8")),
        "x": Field("fixed", np.dtype("f4"), (2,), True),
        "name": Field("text", np.dtype("u1")),
        "when": Field("fixed", np.dtype("M8[s]")),
    }
)


def outputs(reduce, keys=("key",), schema=SCHEMA):
    return [
        (o.name, o.inputs, o.bound.field_out.describe()) for o in bind_outputs(reduce, list(keys), schema)
    ]


def test_one_aggregator_stands_for_all_columns_but_the_keys():
    narrow = Schema({n: SCHEMA[n] for n in ("key", "x")})
    assert outputs(SUM, schema=narrow) == [("x", ("x",), "float64[2]?")]
    assert outputs(COUNT) == [("count", (), "int64")]
    assert outputs(sum_("x")) == [("x", ("x",), "float64[2]?")]
    assert outputs(argmin(by="when"))[1:] == [
        ("name", ("name", "when"), "text"),
        ("when", ("when", "when"), "datetime64[s]"),
    ]


def test_a_mapping_names_results_and_an_aggregator_without_column_reads_its_namesake():
    reduce = {
        "x": MEAN,
        "n": count(),
        "valid": count("x"),
        "who": argmax("name", by="when"),
        "all": collect("key"),
    }
    assert outputs(reduce, keys=()) == [
        ("x", ("x",), "float64[2]?"),
        ("n", (), "int64"),
        ("valid", ("x",), "int64"),
        ("who", ("name", "when"), "text"),
        ("all", ("key",), "list of int64"),
    ]


def test_an_output_reads_its_columns_and_the_rows_where_all_are_valid():
    rows = Batch.from_dict(
        {"v": np.arange(3), "k": np.arange(3.0)},
        {"v": np.array([True, True, False]), "k": np.array([False, True, True])},
    )
    least, number, total = bind_outputs(
        {"a": argmin("v", by="k"), "n": COUNT, "s": sum_("v")}, [], rows.schema
    )
    (value, by), valid = least.read(rows)
    assert (value is rows["v"], by is rows["k"], valid.tolist()) == (True, True, [False, True, False])
    assert number.read(rows) == (None, None)
    assert total.read(rows)[0] is rows["v"]
    assert total.read(rows)[1] is rows.valid("v")


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ({"s": sum_("nam")}, 'no column "nam".*did you mean "name"'),
        ({"nmae": SUM}, 'no column "nmae".*did you mean "name"'),
        ({"s": sum_("name")}, 'column "name": sum of text: sum takes numbers and bools'),
        (SUM, 'column "name": sum of text'),
        ({"s": mean("when")}, r"mean of datetime64\[s\].*astype"),
        ({"s": collect("x")}, 'column "x": collect of float32'),
        ({"s": argmin("name", by="x")}, r"argmin by float32\[2\]\?: wanted one value per row"),
        ({"s": argmin("name", by="name")}, "argmin of text: argmin takes real numbers"),
        ({"key": count()}, '"key" has the name of a key'),
        ({"s": sum}, 'result column "s": sum is not an aggregator'),
        (max, "max is not an aggregator"),
        ({"s": "sum"}, "'sum' is not an aggregator"),
    ],
)
def test_what_does_not_fit_is_said_by_name(reduce, message):
    with pytest.raises(UsageError, match=message):
        bind_outputs(reduce, ["key"], SCHEMA)


def test_nothing_to_sum_is_an_error_and_binding_without_columns_too():
    with pytest.raises(SchemaError, match="nothing to sum: all columns"):
        bind_outputs(SUM, ["key"], Schema({"key": SCHEMA["key"]}))
    with pytest.raises(UsageError, match="sum needs a column"):
        SUM.bind()
    with pytest.raises(UsageError, match="needs the column to compare by"):
        Aggregator("argmin", "x").bind(SCHEMA["key"])


def keep_moments(acc, value):
    acc[0] += 1
    acc[1] += value


def join_moments(acc, other):
    acc[0] += other[0]
    acc[1] += other[1]


def divide(acc):
    return acc[1] / acc[0] if acc[0] else 0.0


def test_a_defined_aggregator_is_compiled_and_equals_the_built_in_one():
    average = Aggregator.define("average", (0, 0), keep_moments, join_moments, divide)
    values, codes = np.random.default_rng(1).normal(size=50), np.arange(50) % 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = average.bind(field_like(values, True))
    assert bound.words == 3
    valid = codes > 0
    wanted = fold(MEAN.bind(field_like(values, True)), codes, values, 4, valid)
    agree(fold(bound, codes, values, 4, valid, (7, 20)), wanted)
    agree(fold_apart(bound, codes.astype(np.int32), values, 4, valid, (7, 20)), wanted, exact=False)
    check_laws(average, values)


def test_what_numba_cannot_compile_runs_as_python_and_says_so_once():
    seen = {}

    def update(acc, value):
        acc[0] += seen.setdefault(int(value), value)

    def merge(acc, other):
        acc[0] += other[0]

    strange = Aggregator.define("strange", 0, update, merge, dtype=np.int64)
    values, codes = np.arange(10), np.arange(10) % 3
    with pytest.warns(RuntimeWarning, match="'strange' could not be compiled and runs as plain Python"):
        bound = strange.bind(field_like(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strange.bind(field_like(values, True))
        strange.bind(field_like(values.astype(np.int32)))
    agree(
        fold_apart(bound, codes, values, 3, None, (4,)), fold(SUM.bind(field_like(values)), codes, values, 3)
    )


def test_a_defined_aggregator_takes_vectors_and_returns_its_words():
    def update(acc, row):
        for j in range(row.size):
            acc[j] = max(acc[j], row[j])

    def merge(acc, other):
        for j in range(acc.size):
            acc[j] = max(acc[j], other[j])

    top = Aggregator.define("top", [-np.inf] * 3, update, merge)
    values, codes = np.random.default_rng(2).normal(size=(20, 3)), np.arange(20) % 2
    agree(
        fold_apart(top.bind(field_like(values)), codes, values, 2, None, (9,)),
        reference("max", codes, values, 2, None),
    )


@pytest.mark.parametrize(("zero", "dtype"), [([], float), ([[1.0]], float), (0, np.float32)])
def test_a_definition_without_a_good_accumulator_is_refused(zero, dtype):
    with pytest.raises(UsageError, match="'bad'"):
        Aggregator.define("bad", zero, keep_moments, join_moments, dtype=dtype)


def test_check_laws_names_the_law_and_the_samples_that_break_it():
    def difference(acc, value):
        acc[0] = value - acc[0]

    def subtract(acc, other):
        acc[0] = other[0] - acc[0]

    with pytest.raises(UsageError, match=r"'minus' breaks merge\(a, zero\) = a for a = 1: -1.0 is not 1.0"):
        check_laws(Aggregator.define("minus", 0.0, difference, subtract), np.array([1, 2, 3]))

    def halve(acc, value):
        acc[0] = (acc[0] + value) / 2 if acc[0] else value

    def middle(acc, other):
        acc[0] = (acc[0] + other[0]) / 2 if acc[0] and other[0] else acc[0] + other[0]

    with pytest.raises(UsageError, match=r"'mid' breaks .*b.*c.* for a = 1, b = 1, c = 2"):
        check_laws(Aggregator.define("mid", 0.0, halve, middle), np.array([1, 2]))
    for aggregator in AGGREGATORS.values():
        check_laws(aggregator, np.random.default_rng(0).normal(size=(4, 2)))
    with pytest.raises(UsageError, match="no accumulator record"):
        check_laws(COLLECT, [1.0])
    with pytest.raises(UsageError, match="at least one sample"):
        check_laws(SUM, [])
