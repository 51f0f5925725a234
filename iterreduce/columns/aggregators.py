"""Aggregators by name: what a user writes behind ``reduce=`` and in ``agg(...)``, and how it meets a schema.

An aggregator is a monoid: an identity, ``update`` (one row), an associative ``merge``, ``finish``. This
module holds the nouns and resolves column names; nothing is folded here (`iterreduce.columns.accumulators`,
`selections` and `user_folds` do that, loops in `folds` and `picks`). Front ends make aggregators, the engine
binds them.

    SUM    numbers, bools  int64, uint64, float64, complex128; integers wrap around at 64 bits; NaN propagates
    MIN    + dates, text   dtype of the column; NaN and NaT propagate, as in NumPy; text compares by bytes
    MAX
    COUNT  any             int64; of a column: rows that are not null; without a column: all rows
    MEAN   numbers, bools  float64 (complex128)
    VAR    real numbers    float64, by Welford's and Chan's updates; ``ddof`` 0 unless set
    ANY    numbers, bools  bool; a number counts as true unless it is 0
    ALL
    FIRST  any             the value of the first (last) row in canonical order that is not null
    LAST
    argmin any             the value of the row where another column is smallest (largest), the first of ties;
    argmax                 NaN and NaT lose against every other; rows in which either is null are skipped
    COLLECT scalars        a list per key, in canonical order, without nulls

All but COLLECT and argmin's ``by`` take vectors too, element by element. Nulls are skipped: what has no valid
row is null, except counts (0) and lists (empty). Float sums, means and variances depend on the order of the
rows in their last bits, a float minimum or maximum of both zeros in its sign; FIRST, LAST, COLLECT and the
ties of argmin on the canonical order; the rest on no order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from iterreduce.columns import exact
from iterreduce.columns.accumulators import (
    BoundAggregator,
    Count,
    Mean,
    Variance,
    bind_extreme,
    bind_sum,
    bind_truth,
)
from iterreduce.columns.batch import Batch
from iterreduce.columns.exact import OrderFreeVariance
from iterreduce.columns.expressions import Expr, key_of
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema
from iterreduce.columns.selections import Collect, ExtremeText, bind_least, bind_pick
from iterreduce.columns.user_folds import Defined, Definition
from iterreduce.errors import SchemaError, UsageError

Kind = Literal[
    "sum",
    "min",
    "max",
    "count",
    "mean",
    "var",
    "any",
    "all",
    "first",
    "last",
    "argmin",
    "argmax",
    "collect",
    "user",
]


Adds = Literal["in order", "order-free", "exactly", "by value"]
"""How floats are added: as they come; with a result that does not depend on their order, for many groups or
for all rows. By value: ties of argmin and argmax go to the smallest value, not to the first row."""


@dataclass(frozen=True, eq=False)
class Aggregator:
    """A named monoid, and the column that it reads.

    ``column`` is a name or an expression (`iterreduce.columns.expressions`). None stands for "the column of
    the same name as the result" (for COUNT: rows, whatever they hold).

    >>> SUM, mean("x"), argmin("id", by="distance").inputs
    (sum, mean("x"), ('id', 'distance'))
    """

    kind: Kind
    column: str | Expr | None = None
    by: str | None = None
    ddof: int = 0
    definition: Definition | None = None
    adds: Adds = "in order"

    def __repr__(self) -> str:
        shown = f'"{self.column}"' if isinstance(self.column, str) else repr(self.column)
        parts = [shown] if self.column is not None else []
        parts += [f'by="{self.by}"'] if self.by is not None else []
        parts += [f"ddof={self.ddof}"] if self.ddof else []
        return self.name + (f"({', '.join(parts)})" if parts else "")

    def _key(self) -> tuple[Any, ...]:
        column = key_of(self.column) if isinstance(self.column, Expr) else self.column
        return (self.kind, column, self.by, self.ddof, self.definition, self.adds)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Aggregator) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def name(self) -> str:
        """The word that messages use: ``sum``, or the name a user gave."""
        return self.definition.name if self.definition is not None else self.kind

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads; empty: the column of the same name as the result."""
        if self.column is None:
            return ()
        return (str(self.column),) if self.by is None else (str(self.column), self.by)

    def of(self, column: str | Expr) -> Aggregator:
        """This aggregator on a column, or on an expression of columns."""
        given: Any = column
        if not isinstance(given, str | Expr):
            raise UsageError(f"{self.name}: wanted a column or an expression of columns, got {given!r}")
        return replace(self, column=column)

    def order_free(self, alone: bool = False) -> Aggregator:
        """This aggregator with a result that does not depend on the order of rows; ``alone``: of all rows
        together, where sums may take more words and are exact.

        >>> from iterreduce.columns.batch import field_of
        >>> SUM.order_free().bind(field_of(np.zeros(0))).words
        3
        """
        if self.kind in ("argmin", "argmax"):
            return self
        return replace(self, adds="exactly" if alone else "order-free")

    def without_order(self) -> Aggregator:
        """This aggregator for rows that have no order: ties of argmin and argmax go to the smallest value."""
        return replace(self, adds="by value") if self.kind in ("argmin", "argmax") else self

    def bind(self, field: Field | None = None, by: Field | None = None) -> BoundAggregator:
        """The aggregator for a type of column (``by``: of the column that argmin and argmax compare).

        Raises `SchemaError` where it cannot take that type. None: no column at all, for counting rows only.
        """
        if field is None:
            if self.kind == "count":
                return Count(inputs=0)
            raise UsageError(f"{self.name} needs a column: give its field")
        return self._bind(field, by)

    def _bind(self, field: Field, by: Field | None) -> BoundAggregator:
        if self.kind in ("argmin", "argmax"):
            if by is None:
                raise UsageError(
                    f'{self.name} needs the column to compare by: {self.name}("id", by="distance")'
                )
            return bind_least(field, by, self.kind == "argmax", self.adds == "by value")
        if self.definition is not None:
            return Defined(self.definition, field)
        if self.kind == "var":
            return (
                Variance(field, self.ddof) if self.adds == "in order" else OrderFreeVariance(field, self.ddof)
            )
        if self.kind in ("min", "max") and field.kind in ("text", "bytes"):
            return ExtremeText(field, self.kind == "max")
        if self.adds != "in order" and self.kind in ORDER_FREE:
            return ORDER_FREE[self.kind](field, self.adds == "exactly")
        return BINDERS[self.kind](field)

    @staticmethod
    def define(
        name: str,
        zero: float | int | Sequence[float | int],
        update: Callable[[Array, Any], Any],
        merge: Callable[[Array, Array], Any],
        finish: Callable[[Array], Any] | None = None,
        dtype: Any = np.float64,
    ) -> Aggregator:
        """An aggregator of one's own: an accumulator of a fixed number of float64 or int64 (``dtype``) words.

        ``zero``: its first value, a number or a sequence of them. ``update(acc, value)`` and ``merge(acc,
        other)`` change ``acc``, an array of shape ``(words,)``, in place; ``value`` is a number, or an array
        of shape ``(d,)`` for a vector column. ``finish(acc)`` returns the result, a number or an array (None:
        the words themselves); it is also called with ``zero``, to learn the type of the result. ``update``
        and ``merge`` are compiled by Numba where possible, otherwise they run as plain Python, and a warning
        says so.

        The laws (`check_laws` tries them on samples), for all accumulators a, b, c and rows x, y:
        ``merge(zero, a) = a = merge(a, zero)``; ``merge(merge(a, b), c) = merge(a, merge(b, c))``;
        folding x, then y equals folding x and y apart, then merging. ``merge`` need not commute: partials are
        merged in canonical order.

        >>> def multiply(acc, value):
        ...     acc[0] *= value
        >>> def join(acc, other):
        ...     acc[0] *= other[0]
        >>> from iterreduce.columns.laws import check_laws
        >>> product = Aggregator.define("product", 1.0, multiply, join)
        >>> check_laws(product, [2.0, 3.0, 0.5])
        """
        words = tuple(np.atleast_1d(np.asarray(zero)).tolist())
        if np.dtype(dtype) not in (np.dtype(np.float64), np.dtype(np.int64)):
            raise UsageError(
                f"aggregator {name!r}: dtype {np.dtype(dtype)}; an accumulator is float64 or int64"
            )
        if not words or np.asarray(zero).ndim > 1:
            raise UsageError(
                f"aggregator {name!r}: zero must be a number or a sequence of at least one number"
            )
        return Aggregator(
            "user", definition=Definition(name, words, update, merge, finish, np.dtype(dtype).name)
        )


BINDERS: dict[str, Callable[[Field], BoundAggregator]] = {
    "sum": bind_sum,
    "min": lambda field: bind_extreme(field, "min"),
    "max": lambda field: bind_extreme(field, "max"),
    "count": lambda field: Count(inputs=1),
    "mean": Mean,
    "any": lambda field: bind_truth(field, "any"),
    "all": lambda field: bind_truth(field, "all"),
    "first": lambda field: bind_pick(field, last=False),
    "last": lambda field: bind_pick(field, last=True),
    "collect": Collect,
}

ORDER_FREE: dict[str, Callable[[Field, bool], BoundAggregator]] = {
    "sum": exact.bind_sum,
    "mean": exact.bind_mean,
    "min": lambda field, alone: exact.bind_extreme(field, "min"),
    "max": lambda field, alone: exact.bind_extreme(field, "max"),
}

SUM, MIN, MAX = Aggregator("sum"), Aggregator("min"), Aggregator("max")
COUNT, MEAN, VAR = Aggregator("count"), Aggregator("mean"), Aggregator("var")
ANY, ALL = Aggregator("any"), Aggregator("all")
FIRST, LAST, COLLECT = Aggregator("first"), Aggregator("last"), Aggregator("collect")


def sum_(column: str | Expr) -> Aggregator:
    """The sum of a column: int64, uint64, float64 or complex128."""
    return SUM.of(column)


def min_(column: str | Expr) -> Aggregator:
    """The smallest value of a column; NaN propagates."""
    return MIN.of(column)


def max_(column: str | Expr) -> Aggregator:
    """The largest value of a column; NaN propagates."""
    return MAX.of(column)


def count(column: str | None = None) -> Aggregator:
    """How many rows; of a column: how many that are not null. int64.

    >>> count(), count("x")
    (count, count("x"))
    """
    return Aggregator("count", column)


def mean(column: str | Expr) -> Aggregator:
    """The arithmetic mean of a column, in float64."""
    return MEAN.of(column)


def var(column: str | Expr, ddof: int = 0) -> Aggregator:
    """The variance of a column in float64: squared deviations / (rows - ``ddof``); population variance by
    default."""
    return replace(VAR.of(column), ddof=ddof)


def any_(column: str | Expr) -> Aggregator:
    """Whether any value is true (not 0)."""
    return ANY.of(column)


def all_(column: str | Expr) -> Aggregator:
    """Whether all values are true (not 0)."""
    return ALL.of(column)


def first(column: str) -> Aggregator:
    """The first value in canonical order that is not null."""
    return FIRST.of(column)


def last(column: str) -> Aggregator:
    """The last value in canonical order that is not null."""
    return LAST.of(column)


def collect(column: str) -> Aggregator:
    """All values as a list, in canonical order; rows cannot be combined before they are sent."""
    return COLLECT.of(column)


def argmin(column: str | None = None, *, by: str) -> Aggregator:
    """The value of ``column`` in the row where ``by`` is smallest; ties: the first row in canonical order
    (in a lazy dataset whose rows have none, such as joined ones: the smallest value).

    Without a column, and used alone (``reduce=argmin(by="distance")``): every column of that row.
    """
    return Aggregator("argmin", column, by)


def argmax(column: str | None = None, *, by: str) -> Aggregator:
    """The value of ``column`` in the row where ``by`` is largest; otherwise as `argmin`."""
    return Aggregator("argmax", column, by)


Reduce = Aggregator | Mapping[str, Aggregator]


@dataclass(frozen=True)
class Output:
    """One result column: its name, the columns that it is made of (none: rows are counted), and its fold."""

    name: str
    inputs: tuple[str, ...]
    bound: BoundAggregator

    def read(self, rows: Batch) -> tuple[Any, Array | None]:
        """What `BoundAggregator.update` takes as values and mask of these rows."""
        if len(self.inputs) == 1:
            name = self.inputs[0]
            return rows[name], rows._valid.get(name)
        if not self.inputs:
            return None, None
        value, by = self.inputs
        masks = [mask for mask in (rows.valid(value), rows.valid(by)) if mask is not None]
        valid = masks[0] & masks[-1] if masks else None
        return (rows[value], rows[by]), valid


def bind_outputs(reduce: Reduce, key_names: Sequence[str], schema: Schema) -> list[Output]:
    """The result columns of a reduction of rows of this schema by these keys, in order.

    One aggregator: applied to every column that is not a key, under its own name (COUNT alone: one column
    ``count``). A mapping: ``{result: aggregator}``; an aggregator without a column reads the one named like
    its result. Raises `SchemaError` for an unknown column, or one whose type does not suit, `UsageError` for
    what is no aggregator.

    >>> from iterreduce.columns.schema import Field, Schema
    >>> schema = Schema({"k": Field("fixed", np.dtype("i8")), "x": Field("fixed", np.dtype("f4"), (3,))})
    >>> outputs = bind_outputs({"x": SUM, "n": count()}, ["k"], schema)
    >>> [(o.name, o.bound.field_out.describe()) for o in outputs]
    [('x', 'float64[3]'), ('n', 'int64')]
    """
    schema.require(*key_names)
    outputs = []
    for name, aggregator in _named(reduce, key_names, schema).items():
        if name in key_names:
            raise SchemaError(f'result column "{name}" has the name of a key: give it another name')
        outputs.append(_bind_output(name, aggregator, schema))
    return outputs


def _named(reduce: Reduce, key_names: Sequence[str], schema: Schema) -> dict[str, Aggregator]:
    if isinstance(reduce, Aggregator):
        if reduce == COUNT:
            return {"count": COUNT}
        if reduce.column is not None:
            return {str(reduce.column): reduce}
        names = [name for name in schema if name not in key_names]
        if not names:
            raise SchemaError(
                f"nothing to {reduce.name}: all columns ({', '.join(schema)}) are keys; add a value column"
            )
        return dict.fromkeys(names, reduce)
    if not isinstance(reduce, Mapping):
        raise UsageError(_not_an_aggregator(reduce))
    for name, aggregator in reduce.items():
        if not isinstance(aggregator, Aggregator):
            raise UsageError(f'result column "{name}": {_not_an_aggregator(aggregator)}')
    return dict(reduce)


def _not_an_aggregator(value: Any) -> str:
    got = getattr(value, "__name__", None) or repr(value)
    return (
        f"{got} is not an aggregator: use SUM, MIN, MAX, COUNT, MEAN, ..., one of them per result column "
        '({"total": sum("x")}), or Aggregator.define'
    )


def _bind_output(name: str, aggregator: Aggregator, schema: Schema) -> Output:
    if aggregator.kind == "count" and aggregator.column is None:
        return Output(name, (), aggregator.bind())
    column = name if aggregator.column is None else str(aggregator.column)  # an expression has no truth value
    inputs = (column,) + (() if aggregator.by is None else (aggregator.by,))
    schema.require(*inputs)
    try:
        return Output(name, inputs, aggregator.bind(*(schema[column] for column in inputs)))
    except SchemaError as error:
        raise SchemaError(f'column "{inputs[0]}": {error}') from None
