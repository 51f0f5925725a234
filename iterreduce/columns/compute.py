"""Expressions computed on batches, and typed without any rows.

`compute` gives a column and its mask, `compute_columns` a batch, `select_rows` the rows in which a condition
holds. `typed` runs the same code on no rows, so that it cannot disagree. A plain column comes back as the
very object that the batch holds: whoever follows columns by identity sees that nothing happened to it.

`evaluate` is the same without nulls, on arrays alone, with NumPy's functions as they are (an integer divided
by 0 is 0): what indexed rows are computed with, into memory that is used again.

What it is not: compiled (`iterreduce.columns.compile` does that, where it pays). It makes one array per
operation; large batches come in pieces that stay in cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch, Column, _empty_column, field_of
from iterreduce.columns.expressions import Apply, Constant, Expr, Parameter, key_of
from iterreduce.columns.expressions import Column as Named
from iterreduce.columns.operations import NUMPY, as_ufunc, condition_of, operate
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, missing_column
from iterreduce.columns.trees import leaves, walk
from iterreduce.columns.values import NO_VALUE, NULL, Value, zero_of
from iterreduce.errors import SchemaError, UsageError, did_you_mean

NOTHING_GIVEN: Mapping[str, Any] = {}
NO_FIELD = Value(np.float64(0), NO_VALUE)  # of a column whose type is not known: compared by identity


@dataclass
class _Evaluation:
    """Trees over one batch; parts that occur more than once are computed once."""

    batch: Batch
    parameters: Mapping[str, Any]
    unknown: Collection[str] = ()  # of types: all columns, in order; the batch has those whose type is known
    typing: bool = False
    again: frozenset[Hashable] = frozenset()
    known: dict[Hashable, Value] = field(default_factory=dict)

    def value(self, tree: Expr) -> Value:
        if isinstance(tree, Apply):
            key = key_of(tree) if self.again else None
            if key in self.known:
                return self.known[key]
            found = self._applied(tree)
            if key in self.again:
                self.known[key] = found
            return found
        if isinstance(tree, Named):
            return self._column(tree.name)
        return constant_value(tree) if isinstance(tree, Constant) else self._parameter(tree)

    def _column(self, name: str) -> Value:
        data = self.batch._columns.get(name)
        if data is not None:
            return Value(data, self.batch._valid.get(name))
        if name in self.unknown:
            return NO_FIELD
        raise SchemaError(missing_column(name, self.unknown or self.batch.names))

    def _parameter(self, tree: Expr) -> Value:
        assert isinstance(tree, Parameter)
        if self.typing:
            if tree.field is None:
                return NO_FIELD
            return Value(zero_of(tree.field), NO_VALUE if tree.field.nullable else None, one=True)
        if tree.name not in self.parameters:
            raise UsageError(
                f"the expression needs a value for {tree}; given are: {', '.join(self.parameters) or 'none'}"
            )
        return parameter_value(tree, self.parameters[tree.name])

    def _applied(self, tree: Apply) -> Value:
        values = [self.value(part) for part in tree.arguments]
        if any(value is NO_FIELD for value in values):
            if tree.operation != "cast" or tree.options != ("text",):
                return NO_FIELD
            values = [Value(np.zeros(0, np.int64), np.zeros(0, bool))]  # whatever it is, it becomes text
        try:
            return operate(tree.operation, values, tree.options, len(self.batch))
        except _InExpression:
            raise
        except SchemaError as error:
            raise _InExpression(f"in the expression {tree}: {error}") from None
        except OverflowError as error:
            hint = "make the column wider, or write the number as a float"
            raise _InExpression(f"in the expression {tree}: {error}; {hint}") from None
        except (TypeError, ValueError) as error:
            shown = " and ".join(value.described for value in values)
            raise _InExpression(f"in the expression {tree}: of {shown}: {error}") from None


class _InExpression(SchemaError):
    """A type that does not suit, with the expression said."""


def constant_value(tree: Constant) -> Value:
    """The value of a constant: Python numbers stay Python numbers, whose type gives way to a column's."""
    if tree.value is not None:
        return Value(tree.value, one=True, constant=True)
    if tree.kind in ("", "null"):
        return NULL
    zero = "" if tree.kind == "text" else b"" if tree.kind == "bytes" else np.zeros((), tree.kind)[()]
    return Value(zero, NO_VALUE, one=True)


def parameter_value(tree: Parameter, given: Any) -> Value:
    """What was given for a parameter, in its type."""
    known = tree.field
    if given is None:
        return NULL if known is None else Value(zero_of(known), NO_VALUE, one=True)
    mask = np.True_ if known is not None and known.nullable else None
    if isinstance(given, str | bytes):
        return Value(given, mask, one=True)
    dtype = known.dtype if known is not None and known.kind == "fixed" else None
    return Value(np.asarray(given, dtype)[()], mask, one=True)


def compute(
    tree: Expr, batch: Batch, parameters: Mapping[str, Any] = NOTHING_GIVEN
) -> tuple[Column, Array | None]:
    """The column ``(n, ...)`` or `Ragged` that an expression is on these rows, and its mask (False: null).

    ``parameters``: a value, or None for null, by the name of each parameter. Raises `SchemaError` for unknown
    columns and types that do not suit.

    >>> from iterreduce.columns.expressions import col
    >>> rows = Batch.from_dict({"x": np.array([7, 8, 9])}, {"x": np.array([True, False, True])})
    >>> values, mask = compute(col("x") // 2, rows)
    >>> values[mask].tolist(), mask.tolist()
    ([3, 4], [True, False, True])
    """
    with np.errstate(all="ignore"):
        found = _Evaluation(batch, parameters).value(tree)
        return found.column(len(batch)), found.valid(len(batch))


def compute_columns(
    trees: Mapping[str, Expr],
    batch: Batch,
    parameters: Mapping[str, Any] = NOTHING_GIVEN,
    again: frozenset[Hashable] | None = None,
) -> Batch:
    """A batch of these columns; what several of them share is computed once. ``again``: their
    `repeated_parts`, where they are known.

    >>> from iterreduce.columns.expressions import col, lit
    >>> compute_columns({"y": col("x") * 2, "one": lit(1)}, Batch(x=np.array([1.5, 2.5])))["y"].tolist()
    [3.0, 5.0]
    """
    rows, columns, valid = len(batch), dict[str, Column](), dict[str, Array]()
    again = repeated_parts(trees.values()) if again is None else again
    work = _Evaluation(batch, parameters, again=again)
    with np.errstate(all="ignore"):
        for name, tree in trees.items():
            found = work.value(tree)
            columns[name], mask = found.column(rows), found.valid(rows)
            if mask is not None:
                valid[name] = mask
    return Batch._trusted(columns, valid, rows)


def select_rows(predicate: Expr, batch: Batch, parameters: Mapping[str, Any] = NOTHING_GIVEN) -> Array:
    """Numbers of the rows in which a condition is true, int64, ascending; null is not true.

    >>> from iterreduce.columns.expressions import col
    >>> select_rows(col("x") > 1, Batch(x=np.array([3, 1, 2]))).tolist()
    [0, 2]
    """
    with np.errstate(all="ignore"):
        found = _Evaluation(batch, parameters).value(predicate)
        holds = _condition(found, predicate)
    if np.ndim(holds):
        return np.flatnonzero(holds)
    return np.arange(len(batch) if holds else 0)


def _condition(found: Value, predicate: Expr) -> Any:
    return condition_of(found, f"filter by {predicate}:")


def repeated_parts(trees: Iterable[Expr]) -> frozenset[Hashable]:
    """Keys of the operations that occur more than once."""
    times = Counter(key_of(part) for tree in trees for part in walk(tree) if isinstance(part, Apply))
    return frozenset(key for key, n in times.items() if n > 1)


def typed(tree: Expr, fields: Mapping[str, Field | None]) -> Field | None:
    """The field of the column that an expression gives on columns of these fields; None: not known yet.

    A column of field None is of a type that is known only when it is read. Raises `SchemaError` for an
    unknown column, with the nearest name, and for types that do not suit.

    >>> from iterreduce.columns.expressions import col
    >>> typed(col("n") / 2, {"n": Field("fixed", np.dtype(np.int32))}).describe()
    'float64'
    """
    return typed_columns({"": tree}, fields)[""]


def typed_columns(trees: Mapping[str, Expr], fields: Mapping[str, Field | None]) -> dict[str, Field | None]:
    """`typed` of several."""
    keys = {name: _typing_key(tree, fields) for name, tree in trees.items()}
    new = {name: tree for name, tree in trees.items() if keys[name] is None or keys[name] not in _TYPED}
    found = _typed(new, fields) if new else {}
    if len(_TYPED) > MOST_TYPED:
        _TYPED.clear()
    _TYPED.update({keys[name]: field for name, field in found.items() if keys[name] is not None})
    return {name: found[name] if name in found else _TYPED[key] for name, key in keys.items()}


MOST_TYPED = 4096
_TYPED: dict[Hashable, Field | None] = {}  # plans ask for the type of one tree again and again


def _typing_key(tree: Expr, fields: Mapping[str, Field | None]) -> Hashable:
    """What a type depends on; None where a column is missing."""
    read = leaves(tree)
    try:
        return key_of(tree), tuple([r.field if isinstance(r, Parameter) else fields[r.name] for r in read])
    except KeyError:
        return None


def _typed(trees: Mapping[str, Expr], fields: Mapping[str, Field | None]) -> dict[str, Field | None]:
    read = {leaf.name for tree in trees.values() for leaf in leaves(tree)}
    known = {name: f for name, f in fields.items() if f is not None and name in read}
    masks = {name: np.zeros(0, bool) for name, f in known.items() if f.nullable}
    rows = Batch._trusted({name: _empty_column(f) for name, f in known.items()}, masks, 0)
    work = _Evaluation(rows, NOTHING_GIVEN, fields.keys(), typing=True)
    with np.errstate(all="ignore"):
        found = {name: work.value(tree) for name, tree in trees.items()}
    return {
        name: None if value is NO_FIELD else field_of(value.column(0), value.mask is not None)
        for name, value in found.items()
    }


def values_of(tree: Expr, **columns: Any) -> list[Any]:
    """An expression on columns as a Python list, None for null: for trying things out.

    >>> from iterreduce.columns.expressions import col
    >>> values_of(col("x") + 1, x=np.array([1, 2]))
    [2, 3]
    """
    column, mask = compute(tree, Batch(**columns))
    rows = column.tolist() if isinstance(column, np.ndarray) else column.to_list()
    return rows if mask is None else [v if holds else None for v, holds in zip(rows, mask, strict=True)]


# ---------------------------------------------------------------------- numbers alone, without nulls


def evaluate(tree: Expr, columns: Mapping[str, Any], out: Array | None = None) -> Any:
    """The value on arrays of one length, with NumPy's types; a tree without columns gives a scalar.

    ``out``: memory of the value's type and length to write it into, where its last operation can.
    Raises `SchemaError` for a column that is not there, `UsageError` for operations that need nulls or text.
    """
    if not isinstance(tree, Apply):
        return _evaluated(tree, columns)
    with np.errstate(all="ignore"):
        if out is None or not fills_memory(tree):
            return _evaluated(tree, columns)
        return _numeric(tree)(*(_evaluated(part, columns) for part in tree.arguments), out=out)


def fills_memory(tree: Expr) -> bool:
    """Can `evaluate` write its value into memory that is handed over? A column is what it is.

    >>> from iterreduce.columns.expressions import col
    >>> fills_memory(col("a") / 2), fills_memory(col("a"))
    (True, False)
    """
    return isinstance(tree, Apply) and as_ufunc(tree.operation) is not None


def _numeric(tree: Apply) -> Any:
    function = NUMPY.get(tree.operation) or as_ufunc(tree.operation)
    if function is None:
        raise UsageError(f"{tree.operation} of columns stands for nulls or text: compute it beforehand")
    return function


def _evaluated(tree: Expr, columns: Mapping[str, Any]) -> Any:
    if isinstance(tree, Named):
        if tree.name not in columns:
            raise SchemaError(
                f'the expression reads "{tree.name}", which is no column here (columns: '
                f"{', '.join(columns)}){did_you_mean(tree.name, columns)}"
            )
        return columns[tree.name]
    if isinstance(tree, Constant):
        return tree.value
    if not isinstance(tree, Apply):
        raise UsageError(f"the expression needs a value for {tree}: compute it beforehand")
    return _numeric(tree)(*(_evaluated(part, columns) for part in tree.arguments))


def dtype_of(tree: Expr, dtypes: Mapping[str, np.dtype[Any]]) -> np.dtype[Any]:
    """The type of what `evaluate` gives, found on no rows.

    >>> from iterreduce.columns.expressions import col
    >>> dtype_of(col("n") / 2, {"n": np.dtype(np.int32)})
    dtype('float64')
    """
    try:
        value = evaluate(tree, {name: np.empty(0, dtype) for name, dtype in dtypes.items()})
    except OverflowError as error:
        raise SchemaError(
            f"the expression {tree}: {error}; make the column wider, or write the number as a float"
        ) from None
    return np.asarray(value).dtype


def full(value: Any, rows: int) -> Array:
    """A value of `evaluate` as a column: a scalar stands in every row."""
    made = np.asarray(value)
    return made if made.ndim else np.full(rows, made)
