"""What a shuffle of indexed rows computes: its expressions, split, typed and compiled.

`Shape` follows from the stage and the rows' own columns, which all ranks know alike, so whatever sizes an
exchange may depend on it. `Program` knows the types of the joined table's columns too.

Who speaks to it: `iterreduce.linkshuffle`. Nothing here communicates or holds rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.compute import dtype_of, evaluate, fills_memory, full
from iterreduce.columns.expressions import Column, Constant, Expr, apply, same
from iterreduce.columns.linkfold import edge_function
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.columns.trees import columns_of, renamed, split
from iterreduce.errors import AssumptionError, SchemaError, UsageError
from iterreduce.stages import Shuffle

COMBINES = {"sum": "sum", "count": "sum", "min": "min", "max": "max", "any": "max", "all": "min"}
MOST_VALUES = 3  # of the joined table, and of the rows, that one output may take
LARGE_ROWS = 1 << 14  # values of which memory is kept: 128 KiB
READABLE = frozenset(map(np.dtype, (np.float64, np.float32, np.int64, np.int32, np.bool_)))


@dataclass(frozen=True)
class Output:
    """One output: values of the joined table (names of parts), columns of the rows, and what is folded."""

    name: str
    kind: str
    rest: Expr
    parts: tuple[str, ...]
    columns: tuple[str, ...]
    order_free: bool = False

    @property
    def combine(self) -> str:
        """How it is folded: sum, min or max."""
        return COMBINES[self.kind]


class Shape:
    """The outputs of a stage, with all that the joined table decides alone taken out as ``parts``."""

    def __init__(self, stage: Shuffle, columns: tuple[str, ...]):
        self.parts: dict[str, Expr] = {}
        self.outputs = [self._output(name, a, columns) for name, a in named(stage).items()]
        #: are rows counted, and nothing else? Their owners know how many there are
        counted = all(o.kind == "count" for o in self.outputs)
        self.counts_only = counted and stage.joined is None and not stage.touched
        self.order_free = any(o.order_free and o.kind == "sum" for o in self.outputs)
        if self.parts and stage.joined is None:
            unknown = ", ".join(dict.fromkeys(c for part in self.parts.values() for c in columns_of(part)))
            raise UsageError(
                f'shuffle of "{stage.rows}" into "{stage.into}" reads {unknown}, which its rows do not have '
                f"(they have {', '.join(columns) or 'no columns'}); say joined=Joined(table, on)"
            )

    def check_key(self, key: str) -> None:
        """An output must not take the place of the key."""
        if any(output.name == key for output in self.outputs):
            raise UsageError(f'output "{key}" has the name of the key beside it; give it another one')

    def _output(self, name: str, aggregator: Aggregator, columns: tuple[str, ...]) -> Output:
        tree = _tree(name, aggregator)
        here = {c for c in columns_of(tree) if c not in columns}
        rest, found = split(tree, here, lambda i: f"{name}\0{i}")
        shared = {}
        for key, part in found.items():
            shared[key] = next((k for k, p in self.parts.items() if same(p, part)), key)
            self.parts.setdefault(shared[key], part)
        taken = tuple(c for c in columns_of(rest) if c in columns)
        if max(len(found), len(taken)) > MOST_VALUES:
            raise UsageError(
                f'output "{name}": {tree} takes {len(found)} values of the joined table and {len(taken)} '
                f"columns of the rows; at most {MOST_VALUES} of each fit: compute some of them beforehand"
            )
        function = edge_order(rest, tuple(found), taken)
        parts, order_free = tuple(shared[k] for k in found), aggregator.adds != "in order"
        return Output(name, aggregator.kind, function, parts, taken, order_free)


def edge_order(rest: Expr, parts: tuple[str, ...], columns: tuple[str, ...]) -> Expr:
    """The rest, its values named v0, v1, ... for parts, then columns: alike trees compile once."""
    names = {name: f"v{i}" for i, name in enumerate((*parts, *columns))}
    return renamed(rest, names)


def named(stage: Shuffle) -> dict[str, Aggregator]:
    """The aggregators by output."""
    if isinstance(stage.combine, Mapping):
        out = dict(stage.combine)
    elif isinstance(stage.combine, Aggregator) and stage.combine.column is not None:
        out = {str(stage.combine.column): stage.combine}
    else:
        raise UsageError(
            f'shuffle of "{stage.rows}": name the outputs, such as combine={{"heard": ir.sum("rank")}}'
        )
    if not out and stage.touched:
        raise UsageError(f'shuffle of "{stage.rows}": no outputs; wanted one at least, such as ir.count()')
    for name, aggregator in out.items():
        if not isinstance(aggregator, Aggregator) or aggregator.kind not in COMBINES:
            kind = getattr(aggregator, "name", type(aggregator).__name__)
            raise UsageError(
                f'output "{name}" of indexed rows: {kind}; wanted {", ".join(COMBINES)} (for others: Lookup, '
                "then a Shuffle)"
            )
    return out


def _tree(name: str, aggregator: Aggregator) -> Expr:
    """What is folded, as an expression."""
    if aggregator.kind == "count":
        return Constant(1, "int")
    column = aggregator.column if aggregator.column is not None else name
    tree = column if isinstance(column, Expr) else Column(column)
    return apply("not_equal", tree, 0) if aggregator.kind in ("any", "all") else tree


def identity_of(combine: str, word: np.dtype[Any]) -> float | int:
    """What a fold of no rows gives."""
    if combine == "sum":
        return 0
    low = combine == "max"
    if word.kind == "f":
        return -np.inf if low else np.inf
    return int(np.iinfo(np.int64).min if low else np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Bound:
    """An output and its types: that of a value, of the words that are folded, and the compiled function."""

    output: Output
    dtype: np.dtype[Any]
    word: np.dtype[Any]
    function: Any

    @property
    def identity(self) -> float | int:
        """What no value gives."""
        return identity_of(self.output.combine, self.word)

    def finished(self, words: Array) -> Array:
        """The words as values; those that no row reached are the identity of the values' type."""
        if self.output.kind in ("any", "all"):
            return np.clip(words, 0, 1).astype(bool)
        if self.output.order_free and self.word.kind == "f" and self.output.combine != "sum":
            # one zero, one NaN; sums on a grid have them
            words = np.where(np.isnan(words), np.nan, words + 0.0)
        if self.dtype == words.dtype:
            return words
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            words = np.clip(words, limits.min, limits.max)
        return words.astype(self.dtype)


class Program:
    """A shape, bound to the types of the columns."""

    def __init__(self, shape: Shape, rows: Mapping[str, np.dtype[Any]], joined: Schema):
        self.shape, self.rows, self.joined = shape, dict(rows), joined
        self._read = sorted({c for part in shape.parts.values() for c in columns_of(part)})
        joined.require(*self._read)
        for name in self._read:
            self._check(name, joined)
        self.dtypes = {name: joined[name].dtype for name in self._read}
        self.outputs = [self._bind(output) for output in shape.outputs]
        self._held: dict[str, Array] = {}

    @staticmethod
    def _check(name: str, joined: Schema) -> None:
        field = joined[name]
        numbers = field.kind == "fixed" and field.dtype.kind in "biuf" and field.dtype != np.uint64
        if not numbers or field.shape or field.nullable:
            raise (AssumptionError if numbers and not field.shape else SchemaError)(
                f'column "{name}" ({field.describe()}) in an expression: wanted one number per row, up to 64 '
                "bits signed, without nulls; fill them where they come from, such as a number of no rows "
                "(.fill_null(0))"
            )

    def fits(self, joined: Schema) -> bool:
        """Are the types those that it was bound to?"""
        return joined is self.joined or joined == self.joined

    def _bind(self, output: Output) -> Bound:
        parts = {name: _word_type(dtype_of(self.shape.parts[name], self.dtypes)) for name in output.parts}
        values = {
            f"v{i}": d for i, d in enumerate((*parts.values(), *(self.rows[c] for c in output.columns)))
        }
        dtype = dtype_of(output.rest, values)
        if dtype.kind not in "biuf" or dtype.itemsize > 8 or dtype == np.uint64:
            raise SchemaError(f'output "{output.name}": {output.kind} of {dtype}; wanted numbers')
        word = np.dtype(np.float64 if dtype.kind == "f" else np.int64)
        result = (
            word
            if output.kind in ("sum", "count")
            else np.dtype(bool)
            if output.kind in ("any", "all")
            else dtype
        )
        return Bound(output, result, word, edge_function(output.rest, tuple(values)))

    def values(self, joined: Mapping[str, Any], rows: int) -> dict[str, Array]:
        """Each part, computed on these columns of the joined table; in a type that the loops read."""
        out = {}
        for name, part in self.shape.parts.items():
            value = full(evaluate(part, joined, self._memory(name, part, rows)), rows)
            dtype = _word_type(value.dtype)
            value = value if value.dtype == dtype else value.astype(dtype)
            out[name] = value if value.flags.c_contiguous else np.ascontiguousarray(value)
        return out

    def _memory(self, name: str, part: Expr, rows: int) -> Array | None:
        """Memory for a part of many rows, the same in every iteration: fresh pages cost more."""
        if rows < LARGE_ROWS or not fills_memory(part):
            return None
        held = self._held.get(name)
        if held is None or len(held) != rows:
            held = self._held[name] = np.empty(rows, dtype_of(part, self.dtypes))
        return held


def improving(stage: Shuffle, rows: Mapping[str, np.dtype[Any]], state: np.dtype[Any]) -> Bound:
    """The one output of a stage that settles: a function of the state's value and of columns of the rows.

    ``rows``: the types of their columns; ``state``: that of the column which the output improves.
    """
    ((name, aggregator),) = named(stage).items()
    tree = _tree(name, aggregator)
    taken, where = columns_of(tree), f'output "{name}" of a shuffle that settles'
    columns = tuple(column for column in taken if column in rows)
    if [column for column in taken if column not in rows] != [name] or len(columns) > MOST_VALUES:
        raise UsageError(
            f'{where}: {tree}; wanted the column "{name}" of the joined table, and at most {MOST_VALUES} '
            "columns of the rows"
        )
    dtype = dtype_of(tree, {name: state, **{column: rows[column] for column in columns}})
    if dtype != state or state not in (np.float64, np.int64):
        raise SchemaError(f"{where}: {dtype} where the table has {state}; wanted int64 or float64 for both")
    rest = edge_order(tree, (name,), columns)
    output = Output(name, aggregator.kind, rest, (name,), columns)
    return Bound(output, dtype, dtype, edge_function(rest, tuple(f"v{i}" for i in range(1 + len(columns)))))


def _word_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which a value is read: its own, or a wider one."""
    if dtype in READABLE:
        return dtype
    return np.dtype(np.float64 if dtype.kind == "f" else np.int64)
