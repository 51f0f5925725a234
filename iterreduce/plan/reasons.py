"""Why a node of a plan is made where it is: once, or anew in each iteration, and what keeps it from better.

Read off the plan and its facts, in words for `iterreduce.plan.explain`. Nothing is decided here: what may be
hoisted is decided by `facts`, what becomes a shuffle of indexed rows by `links`.
"""

from __future__ import annotations

from collections.abc import Iterator

from iterreduce.columns.expressions import Column, Expr
from iterreduce.columns.trees import parameters_of
from iterreduce.plan.facts import Facts
from iterreduce.plan.links import KINDS, can_be_key
from iterreduce.plan.nodes import (
    Aggregate,
    Filter,
    Group,
    Iterate,
    Join,
    Limit,
    MapBatches,
    Node,
    Project,
    Repartition,
    Sample,
    Sort,
    StateRows,
    Union,
    reads,
    walk,
)

WORK = (Group, Join, MapBatches, Aggregate, Sort, Limit, Sample, Repartition, Union, Iterate)


def hoisted(loop: Iterate, facts: Facts) -> Iterator[Node]:
    """What a body reads that does not depend on it, the largest such parts, where they do any work."""
    seen: set[int] = set()
    for node in _body(loop):
        if loop.body in facts.varies(node):
            for part in reads(node):
                inside = id(part) not in seen and loop.body not in facts.varies(part)
                if inside and any(isinstance(n, (*WORK, Project, Filter)) for n in walk(part)):
                    seen.add(id(part))
                    yield part


def anew(loop: Iterate, facts: Facts) -> Iterator[tuple[Node, str]]:
    """What is made anew in each iteration and costs more than a look at each row, and why."""
    for node in _body(loop):
        if isinstance(node, WORK) and node is not loop and loop.body in facts.varies(node):
            yield node, why_anew(node, loop, facts)


def _body(loop: Iterate) -> Iterator[Node]:
    yield from walk(*(state.result for state in loop.states))


def why_anew(node: Node, loop: Iterate, facts: Facts) -> str:
    """Why it is made anew in each iteration of a loop."""
    if isinstance(node, MapBatches) and node.body is loop.body:
        on = [state.name for state in _states(node, loop)]
        also = f", and it depends on {_named(on)}: pure=True alone would not make it once" if on else ""
        return f"its function is not declared pure (pure=True){also}"
    names = [state.name for state in _states(node, loop)]
    if names:
        return f"depends on {_named(names)}"
    opaque = [n for n in walk(node) if isinstance(n, MapBatches) and n.body is loop.body]
    return f"depends on {opaque[0].label}, whose function is not declared pure (pure=True)"


def _states(node: Node, loop: Iterate) -> list[StateRows]:
    return [n for n in walk(node) if isinstance(n, StateRows) and n.body is loop.body]


def _named(names: list[str]) -> str:
    return "state " + " and ".join(f'"{name}"' for name in names)


# ---------------------------------------------------------------------- indexed rows


def why_not_indexed(group: Group, facts: Facts) -> str:
    """Why a group of joined rows in a body is no shuffle of indexed rows; empty: it is not of joined rows."""
    node: Node = group.input
    while isinstance(node, Project | Filter):
        node = node.input
    if not isinstance(node, Join) or not group.aggregates or not facts.varies(node):
        return ""
    return (
        _of_shape(group, node)
        or _of_sides(node, facts)
        or _of_key(group, node, facts)
        or _of_values(group)
        or "the rows are indexed by other columns, or a value is of a kind that indexed rows cannot fold"
    )


def _of_shape(group: Group, join: Join) -> str:
    if len(group.keys) != 1:
        return "it has several keys"
    for name, aggregator in group.aggregates:
        if aggregator.kind not in KINDS or aggregator.definition is not None:
            return f'"{name}" is {aggregator.kind}, which indexed rows cannot fold'
    node: Node = group.input
    while isinstance(node, Project):
        node = node.input
    if node is not join:
        return "rows are filtered behind the join; a filter before it would do"
    if join.how != "inner":
        return f"the join is a {join.how} join, not an inner one"
    return "" if len(join.on) == 1 else "the join is by several columns"


def _of_sides(join: Join, facts: Facts) -> str:
    left, right = facts.varies(join.left), facts.varies(join.right)
    if left and right:
        return "both sides of the join change"
    table, key = (join.left, join.left_keys) if left else (join.right, join.right_keys)
    if not facts.is_unique(table, key):
        return (
            f'the side that changes is not known to have each "{key[0]}" once; make it by a group_by, or say '
            "key=... where the iteration is made"
        )
    return ""


def _of_key(group: Group, join: Join, facts: Facts) -> str:
    edges, on = (
        (join.right, join.right_keys[0]) if facts.varies(join.left) else (join.left, join.left_keys[0])
    )
    node, column = facts.origin(group.input, group.keys[0])
    while isinstance(node, Join) and column in (node.left.names or ()) and node is not join:
        node, column = facts.origin(node.left, column)
    if node is not join:
        return f'its key "{group.keys[0]}" is computed'
    if column not in (edges.names or ()) and column not in join.taken:
        return f'its key "{group.keys[0]}" is not a column of the rows that stay'
    if column in (*join.left_keys, on):
        return "it groups by the column that is joined"
    root, name = facts.origin(edges, column)
    if isinstance(root, Project):
        return f'its key "{group.keys[0]}" is computed'
    field = None if root.fields is None else root.fields.get(name)
    if field is not None and not can_be_key(field):
        return f'its key "{group.keys[0]}" is {field.describe()}; wanted whole numbers or text without nulls'
    return ""


def _of_values(group: Group) -> str:
    fields = group.input.fields or {}
    for name, aggregator in group.aggregates:
        column = aggregator.column
        if column is None:
            continue
        tree = column if isinstance(column, Expr) else Column(column)
        if parameters_of(tree):
            return f'"{name}" uses a number of other rows; multiply the result by it instead'
        field = fields.get(tree.name) if isinstance(tree, Column) else None
        if field is not None and field.nullable:
            return f'"{name}" is of values that may be null; fill_null(0) before the join'
        if isinstance(tree, Column) and field is None:
            return f'the type of "{tree.name}" is not known before it runs; cast it'
    return ""
