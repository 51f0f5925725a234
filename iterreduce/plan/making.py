"""Nodes made and checked: each function here is one operation on nodes, with its errors at the line of the
program that asked for it.

What is known of columns is checked at once: names always, types where all types are known. Who speaks to it:
the handle (`iterreduce.plan.operations`), and rewrites that make nodes anew.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.batch import Batch
from iterreduce.columns.compute import typed
from iterreduce.columns.expressions import Column, Expr, expression
from iterreduce.columns.schema import Field, missing_column
from iterreduce.columns.trees import columns_of
from iterreduce.errors import SchemaError, UsageError
from iterreduce.plan.nodes import (
    Aggregate,
    Fields,
    Filter,
    Group,
    How,
    Join,
    Limit,
    Node,
    Project,
    Repartition,
    Rows,
    Scalar,
    Sort,
    Union,
)
from iterreduce.plan.unnamed import tell_broken

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_thread = threading.local()  # ranks may be threads
_numbers = itertools.count()  # scalars of one plan have different names; lowering gives them others
JOINS = ("inner", "left", "right", "full", "semi", "anti")


@contextmanager
def on_behalf(where: str) -> Iterator[None]:
    """Nodes made inside were asked for at this line: a rewrite's are those of the node that it rewrites."""
    before, _thread.where = getattr(_thread, "where", ""), where
    try:
        yield
    finally:
        _thread.where = before


def user_line() -> str:
    """The line of the program outside of this package that is being run: ``app.py, line 12``."""
    asked: str = getattr(_thread, "where", "")
    if asked:
        return asked
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}, line {frame.f_lineno}"


def at_line(error: SchemaError | UsageError, what: str) -> UsageError:
    """The same error, with what was asked for and where."""
    return type(error)(f"{what}: {error} ({user_line()})")


def field_of_tree(tree: Expr, fields: Fields | None, what: str) -> Field | None:
    """The type of an expression of these columns; raises `SchemaError` at the user's line."""
    if fields is None:
        return None
    try:
        return typed(tree, fields)
    except UsageError as error:
        raise at_line(error, what) from None


def require(fields: Fields | None, names: Iterable[str], what: str) -> None:
    """Raise `SchemaError` for the first name that is no column."""
    if fields is None:
        return
    for name in names:
        if name not in fields:
            raise SchemaError(f"{what}: {missing_column(name, fields)} ({user_line()})")


def names_of(given: Sequence[Any], what: str, least: int = 1) -> tuple[str, ...]:
    """Names of columns as a user gives them: strings, `ir.col`, or one sequence of them."""
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = given[0]
    names = []
    for name in given:
        if isinstance(name, Column):
            name = name.name
        if not isinstance(name, str) or not name:
            raise UsageError(f"{what}: wanted names of columns, got {name!r} ({user_line()})")
        names.append(name)
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise UsageError(f'{what}: column "{twice}" is named twice ({user_line()})')
    if len(names) < least:
        raise UsageError(f"{what}: name at least one column ({user_line()})")
    return tuple(names)


def as_tree(value: Any, what: str) -> Expr:
    """A value as an expression; a string stands for a column of that name."""
    if isinstance(value, str):
        return Column(value)
    try:
        return expression(value)
    except UsageError as error:
        raise at_line(error, what) from None


# ---------------------------------------------------------------------- rows


def project(node: Node, columns: Mapping[str, Expr], what: str, rest: bool = False) -> Node:
    """Columns computed from rows; ``rest``: beside those that there are."""
    fields = node.fields
    made = {name: field_of_tree(tree, fields, f'{what}, column "{name}"') for name, tree in columns.items()}
    trees = dict(columns)
    if rest and fields is not None:
        trees = {name: columns.get(name, Column(name)) for name in fields} | trees
        made = {name: made[name] if name in made else fields[name] for name in trees}
        rest = False
    if not trees and not rest:
        raise UsageError(f"{what}: no column is left; name at least one ({user_line()})")
    known = None if rest and fields is None else made
    return Project(input=node, columns=tuple(trees.items()), rest=rest, fields=known, where=user_line())


def keep(node: Node, predicate: Any, what: str = "filter") -> Node:
    """The rows for which a condition holds."""
    tree = as_tree(predicate, what)
    if isinstance(predicate, bool | np.bool):
        raise UsageError(
            f"{what}: the condition is {bool(predicate)} for all rows; write a condition of columns, such as "
            f"ir.col('x') > 0 ({user_line()})"
        )
    field = field_of_tree(tree, node.fields, what)
    if field is not None and (field.kind != "fixed" or field.dtype != np.bool_ or field.shape):
        raise SchemaError(
            f"{what}: {tree} is {field.describe()}; wanted a condition (bool), such as ir.col('x') > 0 "
            f"({user_line()})"
        )
    return Filter(input=node, predicate=tree, fields=node.fields, where=user_line())


def group(node: Node, keys: tuple[str, ...], aggregates: Mapping[str, Aggregator], what: str) -> Node:
    """One row per key."""
    require(node.fields, keys, what)
    fields = aggregate_fields(node, aggregates, what)
    for name in aggregates:
        if name in keys:
            raise UsageError(
                f'{what}: result "{name}" has the name of a key; give it another ({user_line()})'
            )
    known = None
    if node.fields is not None:
        known = {**{k: node.fields[k] for k in keys}, **fields}
    made = named_aggregates(aggregates)
    return Group(input=node, keys=keys, aggregates=made, fields=known, where=user_line())


def aggregate(node: Node, aggregates: Mapping[str, Aggregator], what: str) -> Node:
    """One row for all."""
    fields = of_all_rows(aggregate_fields(node, aggregates, what), aggregates)
    if not fields:
        raise UsageError(f"{what}: no aggregate; give one, such as n=ir.count() ({user_line()})")
    made = named_aggregates(aggregates)
    return Aggregate(input=node, aggregates=made, fields=fields, where=user_line())


def named_aggregates(aggregates: Mapping[str, Aggregator]) -> tuple[tuple[str, Aggregator], ...]:
    """Aggregators with their columns named."""
    return tuple(
        (n, a if a.column is not None or a.kind == "count" else a.of(n)) for n, a in aggregates.items()
    )


def aggregate_fields(node: Node, aggregates: Mapping[str, Aggregator], what: str) -> dict[str, Field | None]:
    """The types of aggregates of these rows; raises for what is none, or does not suit."""
    out: dict[str, Field | None] = {}
    for name, aggregator in aggregates.items():
        if not isinstance(aggregator, Aggregator):
            raise UsageError(
                f'{what}: "{name}" is {aggregator!r}; wanted an aggregator such as ir.sum("x") '
                f"({user_line()})"
            )
        out[name] = _aggregate_field(node, name, aggregator, f'{what}, "{name}"')
    return out


def of_all_rows(
    fields: Mapping[str, Field | None], aggregates: Mapping[str, Aggregator]
) -> dict[str, Field | None]:
    """The same, of all rows together: of no rows everything but a count is null."""
    return {n: f if aggregates[n].kind == "count" else nullable(f) for n, f in fields.items()}


def _aggregate_field(node: Node, name: str, aggregator: Aggregator, what: str) -> Field | None:
    if aggregator.kind == "count" and aggregator.column is None:
        return aggregator.bind().field_out
    column = aggregator.column if aggregator.column is not None else name
    tree = column if isinstance(column, Expr) else Column(column)
    field = field_of_tree(tree, node.fields, what)
    by = None
    if aggregator.by is not None:
        require(node.fields, (aggregator.by,), what)
        by = None if node.fields is None else node.fields[aggregator.by]
    if field is None or (aggregator.by is not None and by is None):
        return None
    try:
        return aggregator.bind(field, by).field_out
    except UsageError as error:
        raise at_line(error, what) from None


def join(left: Node, right: Node, on: tuple[tuple[str, str], ...], how: str, suffix: str, what: str) -> Node:
    """Pairs of rows with equal keys."""
    if how not in JOINS:
        raise UsageError(f"{what}: how={how!r}; wanted one of {', '.join(JOINS)} ({user_line()})")
    require(left.fields, [a for a, _ in on], f"{what}, left")
    require(right.fields, [b for _, b in on], f"{what}, right")
    _check_keys(left.fields, right.fields, on, what)
    if how not in ("semi", "anti") and right.fields is None:
        tell_broken(right)
        raise UsageError(
            f"{what}: the columns of the right side are not known before they are made; name those that you "
            f"want by select(...), or tell map_batches its columns ({user_line()})"
        )
    if how == "right":
        return _right_join(left, right, on, suffix)
    if how == "full":
        left, right = _keys_alike(left, right, on, what)
    made = Join(left=left, right=right, on=on, how=_how(how), suffix=suffix, where=user_line())
    fields = join_fields(made)
    if fields is not None and len(fields) < len(left.fields or ()) + len(made.taken):
        raise _one_name(what)
    return Join(left=left, right=right, on=on, how=made.how, suffix=suffix, fields=fields, where=made.where)


def _how(how: str) -> How:
    return how  # type: ignore[return-value]


def _one_name(what: str) -> UsageError:
    return UsageError(
        f"{what}: two columns would have one name; rename them, or give suffix=... ({user_line()})"
    )


def _keys_alike(left: Node, right: Node, on: tuple[tuple[str, str], ...], what: str) -> tuple[Node, Node]:
    """Both sides of a full join with keys of one type, which the keys of its rows have."""
    if left.fields is None or right.fields is None:
        return left, right
    casts: tuple[dict[str, Expr], dict[str, Expr]] = {}, {}
    for a, b in on:
        ours, theirs = left.fields[a], right.fields[b]
        if ours is None or theirs is None or ours.kind != "fixed" or ours.dtype == theirs.dtype:
            continue
        wide = np.result_type(ours.dtype, theirs.dtype)
        if wide.kind == "f" and ours.dtype.kind != "f":
            raise SchemaError(
                f'{what}: no integer type holds the keys "{a}" ({ours.describe()}) and "{b}" '
                f"({theirs.describe()}); cast one of them ({user_line()})"
            )
        casts[0][a], casts[1][b] = Column(a).cast(wide), Column(b).cast(wide)
    made = (project(n, c, what, rest=True) if c else n for n, c in zip((left, right), casts, strict=True))
    return next(made), next(made)


def _right_join(left: Node, right: Node, on: tuple[tuple[str, str], ...], suffix: str) -> Node:
    """A left join the other way round, with its columns in the order of the words."""
    what = "right join"
    turned = join(right, left, tuple((b, a) for a, b in on), "left", "\0left", what)
    if turned.fields is None or left.fields is None or right.fields is None:
        tell_broken(left, right)
        raise UsageError(
            f"{what}: the columns of its rows are not known yet; write it as a left join ({user_line()})"
        )
    keys = dict(on)
    columns: dict[str, Expr] = {}
    for name in left.fields:
        columns[name] = Column(
            keys[name] if name in keys else name + "\0left" if name in right.fields else name
        )
    for name in right.fields:
        if name not in keys.values():
            columns[name + suffix if name in left.fields else name] = Column(name)
    if len(columns) < len(left.fields) + len(right.fields) - len({b for _, b in on}):
        raise _one_name(what)
    return project(turned, columns, what)


def _check_keys(
    left: Fields | None, right: Fields | None, on: tuple[tuple[str, str], ...], what: str
) -> None:
    if not on:
        raise UsageError(f'{what}: by which columns? say on="key", or left_key="right_key" ({user_line()})')
    if left is None or right is None:
        return
    for a, b in on:
        ours, theirs = left[a], right[b]
        if ours is not None and theirs is not None and not comparable(ours, theirs):
            raise SchemaError(
                f'{what}: key "{a}" is {ours.describe()} on the left and "{b}" {theirs.describe()} on the '
                f"right, which are never equal; cast one of them ({user_line()})"
            )


def comparable(a: Field, b: Field) -> bool:
    """Can values of these types be equal as keys?"""
    if a.kind != b.kind or a.shape != b.shape:
        return False
    if a.kind != "fixed":
        return True
    numbers = "biu"
    return a.dtype.kind == b.dtype.kind or (a.dtype.kind in numbers and b.dtype.kind in numbers)


def join_fields(join: Join) -> dict[str, Field | None] | None:
    left, right = join.left.fields, join.right.fields
    if left is None:
        return None
    if join.how in ("semi", "anti"):
        return dict(left)
    if right is None:
        return None
    out: dict[str, Field | None] = {}
    for name, field in left.items():
        out[name] = nullable(field) if join.how == "full" and name not in join.left_keys else field
    for name, of in join.taken.items():
        out[name] = nullable(right[of]) if join.how in ("left", "full") else right[of]
    return out


def nullable(field: Field | None) -> Field | None:
    """The type with nulls."""
    return None if field is None else Field(field.kind, field.dtype, field.shape, True)


def union(nodes: Sequence[Node]) -> Node:
    """All rows of all inputs."""
    fields, first = union_fields(nodes), nodes[0]
    ordered = [first]
    for node in nodes[1:]:
        same = fields is None or tuple(node.fields or ()) == tuple(fields)
        ordered.append(node if same else project(node, {n: Column(n) for n in fields or ()}, "union"))
    return Union(rows=tuple(ordered), fields=fields, where=user_line())


def union_fields(nodes: Sequence[Node]) -> Fields | None:
    """The types of a union's columns; raises where they do not fit together."""
    first = nodes[0]
    fields: dict[str, Field | None] | None = None if first.fields is None else dict(first.fields)
    for node in nodes[1:]:
        if fields is None or node.fields is None:
            return None
        missing = [n for n in fields if n not in node.fields] + [n for n in node.fields if n not in fields]
        if missing:
            raise SchemaError(
                f'union: column "{missing[0]}" is on one side only (columns: {", ".join(fields)}; and: '
                f"{', '.join(node.fields)}) ({user_line()})"
            )
        for name in fields:
            fields[name] = _either(fields[name], node.fields[name], name)
    return fields


def _either(a: Field | None, b: Field | None, name: str) -> Field | None:
    if a is None or b is None:
        return None
    if (a.kind, a.dtype, a.shape) != (b.kind, b.dtype, b.shape):
        raise SchemaError(
            f'union: column "{name}" is {a.describe()} and {b.describe()}; cast one of them ({user_line()})'
        )
    return a if a.nullable else b


def sort(node: Node, keys: tuple[str, ...], descending: Any) -> Node:
    """Rows in order."""
    require(node.fields, keys, "sort")
    down = _descending(descending, keys, "sort")
    return Sort(input=node, keys=keys, descending=down, fields=node.fields, where=user_line())


def limit(node: Node, rows: Any, keys: tuple[str, ...], descending: Any, what: str) -> Node:
    """The first rows."""
    if isinstance(rows, bool) or not isinstance(rows, int | np.integer) or rows < 0:
        raise UsageError(f"{what}: wanted a number of rows, got {rows!r} ({user_line()})")
    require(node.fields, keys, what)
    down = _descending(descending, keys, what)
    return Limit(
        input=node, rows=int(rows), keys=keys, descending=down, fields=node.fields, where=user_line()
    )


def _descending(given: Any, keys: tuple[str, ...], what: str) -> tuple[bool, ...]:
    many = tuple(given) if isinstance(given, list | tuple) else (given,) * len(keys)
    if len(many) != len(keys) or not all(isinstance(d, bool) for d in many):
        raise UsageError(
            f"{what}: descending={given!r}; wanted True or False, or one of them for each of {list(keys)} "
            f"({user_line()})"
        )
    return many


def repartition(node: Node, keys: tuple[str, ...]) -> Node:
    """Rows of equal keys on one rank."""
    require(node.fields, keys, "repartition")
    return Repartition(input=node, keys=keys, fields=node.fields, where=user_line())


def columns_read(aggregates: Iterable[tuple[str, Aggregator]]) -> tuple[str, ...]:
    """The columns that aggregates read, in order."""
    out: dict[str, None] = {}
    for _, aggregator in aggregates:
        column = aggregator.column
        if isinstance(column, Expr):
            out.update(dict.fromkeys(columns_of(column)))
        elif column is not None:
            out[column] = None
        if aggregator.by is not None:
            out[aggregator.by] = None
    return tuple(out)


def scalar(node: Node, column: str) -> Scalar:
    """The number in a column of a node of one row."""
    field = None if node.fields is None else node.fields[column]
    return Scalar(f"{node.label} #{next(_numbers)}", field, node, column)


def fields_of(columns: Mapping[str, Any] | None, what: str) -> Fields | None:
    """The types that a user gives as name -> dtype (``str`` for text; None: not known); nulls may come,
    unless a `Field` says that none do.
    """
    if columns is None:
        return None
    if not isinstance(columns, Mapping):
        raise UsageError(
            f'{what}: columns={columns!r}; wanted names and types, such as {{"x": "float64"}} ({user_line()})'
        )
    return {name: _field_of(name, dtype, what) for name, dtype in columns.items()}


def _field_of(name: str, dtype: Any, what: str) -> Field | None:
    if dtype is None or isinstance(dtype, Field):
        return dtype
    if dtype in (str, bytes, "text", "bytes"):
        return Field("text" if dtype in (str, "text") else "bytes", np.dtype(np.uint8), (), True)
    try:
        told = np.dtype(dtype)
    except TypeError as error:
        raise UsageError(f'{what}, column "{name}": {error} ({user_line()})') from None
    base, shape = told.subdtype or (told, ())
    return Field("fixed", base, shape, True)


def node_of(given: Any, what: str) -> Node:
    """The node of a handle, or of a batch that is the same on all ranks."""
    node = getattr(given, "node", None)
    if isinstance(node, Node):
        return node
    if isinstance(given, Batch):
        return Rows(batch=given, fields=dict(given.schema), where=user_line())
    hint = "; say what to make of the groups by .agg(...)" if hasattr(given, "agg") else ""
    raise UsageError(
        f"{what}: wanted a Dataset or an ir.Batch, got {type(given).__name__}{hint} ({user_line()})"
    )
