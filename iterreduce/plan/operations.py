"""The operations of a lazy dataset: what a user writes becomes nodes; nothing is read or run.

`Operations` is the part of `iterreduce.Dataset` that asks for rows of rows. Each operation checks its columns
at once and returns a new handle. Rows have no order unless they are sorted; nulls behave as in SQL. Actions
(`collect`, `run`, ...) belong to `Dataset`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.aggregators import count as count_of
from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import Column, Expr
from iterreduce.columns.schema import Field
from iterreduce.errors import UsageError
from iterreduce.plan import making
from iterreduce.plan.functions import PerRecord, RowNumber
from iterreduce.plan.nodes import MapBatches, Node, Sample
from iterreduce.plan.tracing import Number, body_here
from iterreduce.plan.unnamed import tell_broken

ELSEWHERE = {
    "with_columns": ("assign", "mutate", "withColumn", "withColumns"),
    "group_by": ("groupby", "groupBy", "reduceByKey", "groupByKey"),
    "filter": ("where", "query", "dropna", "drop_nulls"),
    "with_columns(x=col('x').fill_null(0))": ("fillna", "fill_null"),
    "join": ("merge", "leftOuterJoin", "crossJoin"),
    "union": ("concat", "append", "vstack", "unionAll"),
    "sort": ("order_by", "orderBy", "sort_values", "sort_by", "sortBy"),
    "distinct": ("unique", "drop_duplicates", "dropDuplicates"),
    "limit": ("head", "take", "tail"),
    "map_batches": ("map", "apply", "mapPartitions"),
    "flat_map": ("flatMap", "explode"),
    "to_numpy() or collect()": ("show", "to_pandas", "toPandas", "to_dict", "to_list", "fetch", "toArray"),
    "count()": ("height", "shape", "size", "len", "n_unique", "nunique"),
}  # what others call it


class Operations:
    """Lazy operations on rows; a subclass has ``node``, ``comm`` and `_of`."""

    node: Node
    comm: Any

    def _of(self, node: Node, *others: Any) -> Self:
        """A handle on another node, on the communicator of this one or of the others."""
        raise NotImplementedError

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            here = next((ours for ours, theirs in ELSEWHERE.items() if name in theirs), None)
            hint = f"; that is {here} here" if here else ""
            if "node" in vars(self) and name in (self.node.names or ()):
                hint = f"; in expressions the column is ir.col({name!r})"
            raise AttributeError(f"a {type(self).__name__} has no {name!r}{hint}", name=name, obj=self)

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The names of the columns; None where they are not known before it runs.

        Raises `InputError` where that is so because a file cannot be read.
        """
        if self.node.names is None:
            tell_broken(self.node)
        return self.node.names

    # ------------------------------------------------------------------ columns and rows

    def select(self, *names: Any, **columns: Any) -> Self:
        """These columns: names of columns that there are, and new ones as expressions.

        >>> from iterreduce import Dataset, col
        >>> import numpy as np
        >>> rows = Dataset.from_local(None, x=np.array([1, 2]), y=np.array([3, 4]))
        >>> rows.select("x", sum=col("x") + col("y")).collect()["sum"].tolist()
        [4, 6]
        """
        plain = making.names_of(names, "select", least=0)
        made: dict[str, Expr] = {name: Column(name) for name in plain}
        made |= self._trees("select", columns)
        return self._of(making.project(self.node, made, "select"))

    def with_columns(self, **columns: Any) -> Self:
        """All columns, and these beside or instead of them."""
        made = self._trees("with_columns", columns)
        return self._of(making.project(self.node, made, "with_columns", rest=True))

    @staticmethod
    def _trees(what: str, columns: Mapping[str, Any]) -> dict[str, Expr]:
        return {name: making.as_tree(value, f'{what}, column "{name}"') for name, value in columns.items()}

    def drop(self, *names: Any) -> Self:
        """All columns but these."""
        gone = making.names_of(names, "drop")
        making.require(self.node.fields, gone, "drop")
        return self.select(*(name for name in self._known("drop") if name not in gone))

    def rename(self, **names: str) -> Self:
        """Columns under other names: ``rename(old="new")``."""
        making.require(self.node.fields, names, "rename")
        made: dict[str, Expr] = {}
        for name in self._known("rename"):
            new = names.get(name, name)
            if new in made:
                raise UsageError(f'rename: two columns would be named "{new}" ({making.user_line()})')
            made[new] = Column(name)
        return self._of(making.project(self.node, made, "rename"))

    def _known(self, what: str) -> tuple[str, ...]:
        names = self.columns
        if names is None:
            raise UsageError(
                f"{what}: the columns of these rows are not known before they are made; name those that "
                f"you want by select(...), or tell map_batches its columns ({making.user_line()})"
            )
        return names

    def filter(self, condition: Any) -> Self:
        """The rows for which a condition is true; where it is null they are left out, as in SQL."""
        return self._of(making.keep(self.node, condition))

    def map_batches(
        self,
        function: Callable[..., Batch],
        *others: Any,
        columns: Mapping[str, Any] | None = None,
        pure: bool = False,
        keeps: Any = (),
    ) -> Self:
        """The rows that a Python function makes of batches: ``function(batch, *others) -> ir.Batch``.

        It is called with some rows at a time and may return any number of rows; of each of ``others``
        (handles or `Batch`) it is given all rows. ``columns``: what it returns, name -> dtype, so that later
        operations can be checked and planned. ``pure``: the result depends on the arguments alone, so inside
        an iteration it is computed once if they do not change. ``keeps``: it makes one row of each, in their
        order, and these columns stand beside them as they were: keys that are known stay known.
        """
        kept = making.names_of((keeps,) if isinstance(keeps, str) else keeps, "map_batches", least=0)
        making.require(self.node.fields, kept, "map_batches")
        if not callable(function):
            raise UsageError(
                f"map_batches: wanted a function of a Batch, got {function!r} ({making.user_line()})"
            )
        rows = (self.node, *(making.node_of(other, "map_batches") for other in others))
        fields = making.fields_of(columns, "map_batches")
        if fields is not None and self.node.fields is not None:
            fields = {**{name: self.node.fields[name] for name in kept}, **fields}
        return self._of(
            MapBatches(
                rows=rows,
                function=function,
                pure=pure,
                keeps=kept,
                body=None if pure else body_here(),
                fields=fields,
                where=making.user_line(),
            ),
            *others,
        )

    def flat_map(
        self, function: Callable[..., Any], columns: Mapping[str, Any] | None = None, pure: bool = False
    ) -> Self:
        """The records that a Python function makes of each record: ``function(row) -> iterable of dicts``.

        ``row`` has the columns as attributes. It runs as plain Python, record by record; `map_batches` is the
        fast form.
        """
        fields = making.fields_of(columns, "flat_map") or {}
        return self.map_batches(PerRecord(function, tuple(fields.items())), columns=columns, pure=pure)

    def with_row_number(self, name: str = "row") -> Self:
        """All columns, and the row's number among all rows of all ranks from 0: of sorted rows its place.

        The same on any number of ranks: rows without an order (see `limit`) are sorted first.

        >>> from iterreduce import Dataset
        >>> import numpy as np
        >>> rows = Dataset.from_local(None, x=np.array([3, 1, 2])).sort("x").with_row_number("place")
        >>> rows.collect()["x"].tolist(), rows.collect()["place"].tolist()
        ([1, 2, 3], [0, 1, 2])
        """
        names = self._known("with_row_number")
        if name in names:
            raise UsageError(f'with_row_number: there is a column "{name}" ({making.user_line()})')
        fields = {**(self.node.fields or {}), name: Field("fixed", np.dtype(np.int64))}
        kernel: Any = RowNumber(name, tuple((n, n) for n in names))
        rows = (self.node,)
        where = making.user_line()
        return self._of(
            MapBatches(rows=rows, function=kernel, pure=True, keeps=names, fields=fields, where=where)
        )

    def union(self, *others: Any) -> Self:
        """All rows of both; columns must have the same names and types. Equal rows stay (see `distinct`)."""
        nodes = [self.node, *(making.node_of(other, "union") for other in others)]
        return self._of(making.union(nodes), *others)

    def distinct(self, *names: Any) -> Self:
        """Different rows; of some columns: their different values, and these columns only."""
        keys = making.names_of(names, "distinct") if names else self._known("distinct")
        return self._of(making.group(self.node, keys, {}, "distinct"))

    def vertices(self, *names: Any, name: str = "vertex") -> Self:
        """The different values of these columns together, as the column ``name``: the vertices of edges."""
        ends = making.names_of(names or ("src", "dst"), "vertices")
        making.require(self.node.fields, ends, "vertices")
        parts = [making.project(self.node, {name: Column(end)}, "vertices") for end in ends]
        return self._of(making.group(making.union(parts), (name,), {}, "vertices"))

    def repartition(self, *keys: Any) -> Self:
        """The same rows, those of equal keys on one rank."""
        return self._of(making.repartition(self.node, making.names_of(keys, "repartition")))

    # ------------------------------------------------------------------ groups and joins

    def group_by(self, *names: Any, **keys: Any) -> Grouped:
        """Rows by key: ``group_by("src")``, or ``group_by(page="dst")`` for another name or an expression."""
        plain = making.names_of(names, "group_by", least=0)
        made = self._trees("group_by", keys)
        if not plain and not made:
            raise UsageError(f"group_by: name at least one column ({making.user_line()})")
        if not made:
            return Grouped(self, self.node, plain)
        renamed = making.project(self.node, made, "group_by", rest=True)
        return Grouped(self, renamed, (*plain, *made))

    def join(
        self,
        other: Any,
        on: Any = None,
        how: str = "inner",
        suffix: str = "_right",
        **pairs: str,
    ) -> Self:
        """Pairs of rows with equal keys, as in SQL: a null equals no key.

        ``on``: a column that both have, or several; or ``left="right"`` pairs, such as ``join(ranks,
        src="page")``. ``how``: inner, left, right, full, semi (left rows that have a match), anti (those that
        have none). Columns are those of this side, then the other's without its keys; a name that both have
        gets the suffix.
        """
        right = making.node_of(other, "join")
        names = making.names_of((on,) if isinstance(on, str) else on, "join") if on is not None else ()
        keys = tuple((name, name) for name in names) + tuple(pairs.items())
        node = making.join(self.node, right, keys, how, suffix, f"{how} join")
        return self._of(node, other)

    def left_join(self, other: Any, on: Any = None, suffix: str = "_right", **pairs: str) -> Self:
        """`join` that keeps all rows of this side; where the other has none, its columns are null."""
        return self.join(other, on, "left", suffix, **pairs)

    def cogroup(self, other: Any, on: Any, function: Callable[..., Batch], **options: Any) -> Self:
        """What ``function(left, right)`` makes of the groups of both sides, `Groups` each, with keys that
        either has; ``options`` as in `map_batches`.
        """
        keys = making.names_of((on,) if isinstance(on, str) else on, "cogroup")
        right = making.node_of(other, "cogroup")
        for side, node in (("left", self.node), ("right", right)):
            making.require(node.fields, keys, f"cogroup, {side}")
        return self._of(_grouped((self.node, right), function, keys, "cogroup", **options), other)

    # ------------------------------------------------------------------ order

    def sort(self, *keys: Any, descending: Any = False) -> Self:
        """Rows in the order of these columns over all ranks, nulls last; equal ones as they stood, or where
        the rows have no order (see `limit`) by their other columns.
        """
        return self._of(making.sort(self.node, making.names_of(keys, "sort"), descending))

    def top(self, k: int, by: Any, descending: Any = True) -> Self:
        """The ``k`` rows that come first in the order of ``by`` (the largest, unless told), on all ranks.

        Of equal ones those that stand first; where the rows have no order (see `limit`), those whose other
        columns come first.
        """
        keys = making.names_of((by,) if isinstance(by, str | Column) else by, "top")
        return self._of(making.limit(self.node, k, keys, descending, "top"))

    def limit(self, rows: int) -> Self:
        """The first rows as they stand, on all ranks; of rows without an order the first by their key, or by
        all columns.

        Rows of a file or a sort have an order, and keep it in `select`, `filter` and `map_batches`. Groups,
        joined and united rows and those of an iteration have none. Lists, and columns whose type is not known
        before they are made, decide nothing: what differs in those alone may come out otherwise on another
        number of ranks.
        """
        return self._of(making.limit(self.node, rows, (), False, "limit"))

    def sample(self, k: int, seed: int = 0, at_least: int = 0) -> Self:
        """``k`` different rows, chosen by ``seed``, the same on any number of ranks; in the order of the
        rows. Those without an order (see `limit`) are sorted first.

        A dataset of fewer than ``k`` (or ``at_least``) rows is an error when it runs.
        """
        if isinstance(k, bool) or k != int(k) or k < 1:
            raise UsageError(f"sample: wanted at least 1 row, got k={k} ({making.user_line()})")
        return self._of(
            Sample(
                input=self.node,
                k=int(k),
                seed=int(seed),
                at_least=at_least,
                of=getattr(self, "described", "rows"),
                fields=self.node.fields,
                where=making.user_line(),
            )
        )

    # ------------------------------------------------------------------ numbers

    def agg(self, *unnamed: Any, **aggregates: Aggregator) -> Self:
        """One row: aggregates of all rows, on all ranks. Of no rows sums and extremes are null, counts 0."""
        refuse_unnamed(unnamed)
        return self._of(making.aggregate(self.node, aggregates, "agg"))

    def _number(self, aggregator: Aggregator, what: str) -> Number:
        node = making.aggregate(self.node, {what: aggregator}, what)
        return Number.of_node(node, what, self._of(node))

    def count(self) -> Number:
        """How many rows, as a number that other operations can use; ``int(...)`` runs it."""
        return self._number(count_of(), "count")

    def sum(self, column: str | Expr) -> Number:
        """The sum of a column or expression; null without rows."""
        return self._number(Aggregator("sum", column), "sum")

    def min(self, column: str | Expr) -> Number:
        """The smallest value."""
        return self._number(Aggregator("min", column), "min")

    def max(self, column: str | Expr) -> Number:
        """The largest value."""
        return self._number(Aggregator("max", column), "max")

    def mean(self, column: str | Expr) -> Number:
        """The arithmetic mean."""
        return self._number(Aggregator("mean", column), "mean")


def refuse_unnamed(given: tuple[Any, ...]) -> None:
    """Aggregates are given by name, as every column that is made."""
    if given:
        example = f"ir.{given[0]!r}" if isinstance(given[0], Aggregator) else 'ir.sum("x")'
        raise UsageError(f"agg: name what is made, as in name={example} ({making.user_line()})")


class Grouped:
    """Rows by key, waiting for what to make of each group."""

    def __init__(self, rows: Operations, node: Node, keys: tuple[str, ...]):
        self._rows, self._node, self._keys = rows, node, keys
        making.require(node.fields, keys, "group_by")

    def __repr__(self) -> str:
        return f"Grouped(by {', '.join(self._keys)})"

    def agg(self, *unnamed: Any, **aggregates: Aggregator) -> Any:
        """One row per key with these aggregates, such as ``agg(n=ir.count(), far=ir.max("distance"))``."""
        refuse_unnamed(unnamed)
        if not aggregates:
            raise UsageError(
                f"agg: no aggregate; give one, such as n=ir.count(), or use distinct ({making.user_line()})"
            )
        return self._rows._of(making.group(self._node, self._keys, aggregates, "agg"))

    def count(self) -> Any:
        """One row per key with the number of its rows, column ``count``."""
        return self.agg(count=count_of())

    def map_groups(self, function: Callable[..., Batch], **options: Any) -> Any:
        """What ``function(groups) -> ir.Batch`` makes of `Groups`: all rows of a key stand together."""
        return self._rows._of(_grouped((self._node,), function, self._keys, "map_groups", **options))


def _grouped(
    rows: tuple[Node, ...],
    function: Callable[..., Batch],
    keys: tuple[str, ...],
    what: str,
    columns: Mapping[str, Any] | None = None,
    pure: bool = False,
) -> Node:
    if not callable(function):
        raise UsageError(f"{what}: wanted a function of Groups, got {function!r} ({making.user_line()})")
    return MapBatches(
        rows=rows,
        function=function,
        by=keys,
        pure=pure,
        body=None if pure else body_here(),
        fields=making.fields_of(columns, what),
        where=making.user_line(),
    )
