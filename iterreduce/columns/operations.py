"""What each operation of an expression means: on which types, what it does with nulls, how NumPy computes it.

`OPERATIONS` is the table: name -> function of values (`iterreduce.columns.values.Value`), options and the
number of rows. Whatever is not in it but is a function of NumPy's of one or two columns and one result
(`as_ufunc`) is computed by that, null where any argument is.

As in SQL: arithmetic, comparisons and functions are null where an argument is; ``&`` and ``|`` know three
truth values; a null condition is false. Integers that no integer answers (division by 0, a negative power)
are null. Floats follow IEEE 754. Everything is typed by running it on no rows: whether an operation raises
(`SchemaError`, or NumPy's TypeError, ValueError, OverflowError) never depends on what the rows hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.values import NULL, Value, aligned, by_row, chosen, joined, settled
from iterreduce.errors import SchemaError

NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.true_divide,
    "floor_divide": np.floor_divide,
    "remainder": np.remainder,
    "power": np.power,
    "negative": np.negative,
    "absolute": np.absolute,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "where": np.where,
}
SIGNS = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "floor_divide": "//",
    "remainder": "%",
    "power": "**",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "equal": "==",
    "not_equal": "!=",
    "and": "&",
    "or": "|",
    "xor": "^",
}
COMPARISONS = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
LOGIC = ("and", "or", "xor", "not")
DIVISIONS = ("floor_divide", "remainder", "fmod")
NAME_OF = {function: name for name, function in NUMPY.items() if isinstance(function, np.ufunc)}

Function = Callable[[Sequence[Value], tuple[Any, ...], int], Value]


@cache
def as_ufunc(name: str) -> np.ufunc | None:
    """NumPy's function of one or two columns and one result that an operation is, if it is one."""
    function = NUMPY.get(name) or getattr(np, name, None)
    if not isinstance(function, np.ufunc) or function.signature is not None:
        return None
    return function if function.nin <= 2 and function.nout == 1 else None


def known_functions() -> str:
    """Some of them, for messages."""
    return ", ".join(f"np.{function.__name__}" for function in NAME_OF)


def operate(name: str, values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """An operation on values; raises for types that do not suit."""
    function = OPERATIONS.get(name)
    if function is not None:
        return function(values, options, rows)
    if as_ufunc(name) is None:
        raise SchemaError(f"{name} is no operation of expressions")
    return elementwise(name, values, rows)


# ---------------------------------------------------------------------- numbers and dates


def elementwise(name: str, values: Sequence[Value], rows: int) -> Value:
    """NumPy's function row by row, null where an argument is."""
    values = settled(values)
    kinds = {value.kind for value in values}
    if kinds != {"fixed"}:
        return _of_texts(name, values, kinds, rows)
    if name in LOGIC:
        _check_conditions(name, values)
    function = as_ufunc(name)
    assert function is not None
    mask = joined([value.mask for value in values])
    arrays = aligned(values)
    if name in DIVISIONS and np.result_type(*arrays).kind in "iubm":
        mask = joined([mask, _not_zero(values[1])])
    elif name == "power" and np.result_type(*arrays).kind in "iub":
        arrays, mask = _powers(values, arrays, mask)
    data = function(*arrays)
    return Value(data, mask, all(v.one for v in values), all(v.constant for v in values))


def _of_texts(name: str, values: Sequence[Value], kinds: set[str], rows: int) -> Value:
    if len(kinds) == 1 and kinds <= {"text", "bytes"}:
        from iterreduce.columns import texts

        if name in COMPARISONS:
            return texts.compared(name, values, rows)
        if name == "add":
            return texts.concatenated(values, (), rows)
    shown = " and ".join(value.described for value in values)
    hint = "wanted numbers" if len(kinds) == 1 else "wanted values of one kind; convert one by .cast"
    raise SchemaError(f"{SIGNS.get(name, name)} of {shown}: {hint}")


def _check_conditions(name: str, values: Sequence[Value]) -> None:
    for value in values:
        if value.dtype.kind != "b":
            sign = SIGNS.get(name, "~")
            shown = " and ".join(v.described for v in values)
            raise SchemaError(
                f"{sign} of {shown}: wanted conditions, such as x != 0 (np.bitwise_and, ... work on bits)"
            )


def _not_zero(divisor: Value) -> Any:
    """Where a division by integers has an answer; None where the divisor is a constant other than 0."""
    holds = by_row(np.not_equal(divisor.data, np.zeros((), divisor.dtype)))
    if divisor.one:
        holds = np.bool_(np.all(holds))
    return None if divisor.constant and holds else holds


def _powers(values: Sequence[Value], arrays: list[Any], mask: Any) -> tuple[list[Any], Any]:
    """Powers of integers: null where the exponent is negative."""
    exponent = values[1]
    if exponent.dtype.kind == "u" or exponent.dtype.kind == "b":
        return arrays, mask
    holds = np.greater_equal(exponent.data, 0)
    if exponent.constant:
        if not holds:
            raise SchemaError(
                f"** of {values[0].described} and {exponent.data}: no integer holds it; write the exponent "
                "as a float"
            )
        return arrays, mask
    arrays[1] = np.maximum(arrays[1], 0)
    per_row = np.bool_(np.all(holds)) if exponent.one else by_row(holds)
    return arrays, joined([mask, per_row])


# ---------------------------------------------------------------------- truth


def both(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """Three-valued and: false wherever one is false."""
    return _logic("and", values, rows)


def either(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """Three-valued or: true wherever one is true."""
    return _logic("or", values, rows)


def _logic(name: str, values: Sequence[Value], rows: int) -> Value:
    values = [
        Value(np.False_, v.mask, one=True, constant=v.constant) if v.data is None else v for v in values
    ]
    plain = elementwise(name, values, rows)
    vector = np.ndim(plain.data) > 1 or any(v.one and np.ndim(v.data) for v in values)
    if plain.mask is None or vector:
        return plain  # a vector is null as a whole
    decides = np.logical_not if name == "and" else np.asarray  # the truth value that needs no other
    sure: Any = False
    for value in values:
        held = decides(value.data)
        sure = sure | (held if value.mask is None else held & value.mask)
    data = ~np.asarray(sure) if name == "and" else np.asarray(sure)
    mask = plain.mask | np.asarray(sure)
    return Value(data if data.ndim else data[()], mask if np.ndim(mask) else np.bool_(mask), plain.one)


def condition_of(value: Value, what: str) -> Any:
    """Where a condition holds: bool ``(rows,)``, or one bool; null is false."""
    if value.data is None:
        return np.False_
    data = np.asarray(value.data)
    if value.kind != "fixed" or data.dtype.kind != "b" or data.ndim != (0 if value.one else 1):
        raise SchemaError(f"{what} of {value.described}: wanted a condition, bool")
    return value.data if value.mask is None else data & value.mask


def where(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """The second where the first holds, else the third."""
    condition, then, otherwise = values
    return chosen(condition_of(condition, "where"), then, otherwise, rows)


def coalesce(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """The first that is not null."""
    found = values[-1]
    for value in reversed(values[:-1]):
        if value.mask is None:
            found = chosen(np.True_, value, Value(found.data, None, found.one), rows)
        elif value.data is not None:
            found = chosen(value.mask, Value(value.data, None, value.one), found, rows)
    return found


def is_null(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """Where there is no value; never null."""
    (value,) = values
    if value.mask is None:
        return Value(np.False_, one=True, constant=value.constant)
    return Value(~value.mask, one=np.ndim(value.mask) == 0, constant=value.constant)


def is_nan(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """Where a number is not one."""
    return elementwise("isnan", values, rows)


def is_in(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """Where it equals an option; null where it is null, or does not and None is among them."""
    (value,) = values
    asked = [option for option in options if option is not None]
    if value.data is None:
        return Value(np.False_, NULL.mask if options else None, one=True)
    found = _among(value, asked, rows)
    mask = value.mask if options else None
    if len(asked) < len(options):
        mask = joined([mask, by_row(found) if np.ndim(found) else np.bool_(found)])
    return Value(found, mask, value.one)


def _among(value: Value, asked: list[Any], rows: int) -> Any:
    if value.kind in ("text", "bytes"):
        from iterreduce.columns import texts

        return texts.among(value, asked, rows)
    if value.kind != "fixed" or any(isinstance(a, str | bytes) for a in asked):
        raise SchemaError(f"is_in of {value.described}: wanted constants of that type, got {asked[:3]}")
    small = value.dtype.kind == "i" or (value.dtype.kind == "u" and value.dtype.itemsize < 8)
    if len(asked) > FEW and small and all(type(a) is int for a in asked):
        return np.isin(value.data, np.array(asked, np.int64))
    found: Any = np.zeros(np.shape(value.data), bool)[()]
    for constant in asked:
        found = found | np.equal(value.data, constant)
    return found


FEW = 8  # constants that are compared one by one


def hashed(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """The stable hash as int64; nulls hash alike."""
    from iterreduce.columns.hashing import hash_keys

    (value,) = values
    if not rows:
        return Value(np.zeros(0, np.int64))
    valid = value.valid(rows)
    batch = Batch._trusted({"x": value.column(rows)}, {} if valid is None else {"x": valid}, rows)
    return Value(hash_keys(batch).view(np.int64))


def cast(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """The values in another type."""
    from iterreduce.columns.casts import converted

    return converted(values[0], options[0], rows)


def _texts(function: str) -> Function:
    """An operation of `iterreduce.columns.texts`, which is imported when it is first used."""

    def operation(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
        from iterreduce.columns import texts

        made: Value = getattr(texts, function)(values, options, rows)
        return made

    return operation


OPERATIONS: dict[str, Function] = {
    "and": both,
    "or": either,
    "where": where,
    "coalesce": coalesce,
    "is_null": is_null,
    "isnan": is_nan,
    "is_in": is_in,
    "hash": hashed,
    "cast": cast,
    "str.length": _texts("length"),
    "str.lower": _texts("lower"),
    "str.upper": _texts("upper"),
    "str.strip": _texts("strip"),
    "str.contains": _texts("contains"),
    "str.starts_with": _texts("starts_with"),
    "str.ends_with": _texts("ends_with"),
    "str.slice": _texts("sliced"),
    "str.concat": _texts("concatenated"),
}
