"""Rewrites that move work below a join or a group, where nobody else reads what would be made twice.

    totals before groups     the total of summed groups is the total of the rows: no group is made for it
    invariant columns        what a projection computes of the side of a join that stays is computed there
    table to the right       the rows of a join that stay stand left, the keyed table that changes right

Like the other rules they keep rows and columns; `iterreduce.plan.rules` has them in its table.
"""

from __future__ import annotations

from dataclasses import replace

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.expressions import Column, Constant, Expr
from iterreduce.columns.trees import columns_of, renamed
from iterreduce.plan import making
from iterreduce.plan.facts import Facts, is_plain
from iterreduce.plan.nodes import Aggregate, Group, Join, Node, Project

AGAIN = frozenset(("sum", "min", "max", "any", "all"))  # aggregates of groups that are those of the rows


def total_of_groups(node: Aggregate, facts: Facts) -> Node | None:
    """A total of groups that nothing else reads, of the rows themselves.

    Nulls: an aggregate skips them, and is null where there is nothing else, in a group as in all rows.
    (Counts are no such: their sum over no groups is null, and a count of no rows is 0.)
    """
    group, names = _groups(node.input, facts)
    if group is None:
        return None
    of = dict(group.aggregates)
    made: dict[str, Aggregator] = {}
    for name, aggregator in node.aggregates:
        column = aggregator.column.name if isinstance(aggregator.column, Column) else aggregator.column
        inner = of.get(names.get(column, "")) if isinstance(column, str) else None
        if inner is None or inner.kind != aggregator.kind or inner.kind not in AGAIN:
            return None
        if inner.definition is not None or inner.by is not None or aggregator.definition is not None:
            return None
        made[name] = inner
    total = making.aggregate(group.input, made, "total")
    return total if total.fields == node.fields else None


def _groups(node: Node, facts: Facts) -> tuple[Group | None, dict[str, str]]:
    """Groups below projections that only choose, each read once; and their columns by the names above."""
    names = {name: name for name in node.names or ()}
    while isinstance(node, Project) and is_plain(node) and facts.read_once(node):
        names = {n: node.passed[old] for n, old in names.items() if old in node.passed}
        node = node.input
    found = isinstance(node, Group) and facts.read_once(node) and bool(node.aggregates)
    return (node if found else None), names  # type: ignore[return-value]


def invariant_columns(node: Project, facts: Facts) -> Node | None:
    """What is computed of the invariant side of a join alone is computed below it: once."""
    join = node.input
    if not isinstance(join, Join) or not facts.read_once(join) or join.left.names is None:
        return None
    side = _invariant_side(join, facts)
    if side is None or side.names is None or node.rest:
        return None
    here = {n: n for n in side.names} if side is join.left else dict(join.taken)
    if side is join.right:  # a name of the left means the left's column
        here = {n: old for n, old in here.items() if n not in join.left.names}
    moved = {name: tree for name, tree in node.columns if _moves(tree, here)}
    hidden = {name: f"\0{name}" for name in moved}
    if not moved or any(new in (*join.left.names, *(join.right.names or ())) for new in hidden.values()):
        return None
    trees: dict[str, Expr] = {n: Column(n) for n in side.names}
    trees |= {hidden[name]: renamed(tree, here) for name, tree in moved.items()}
    lower = making.project(side, trees, "join")
    left, right = (lower, join.right) if side is join.left else (join.left, lower)
    made = making.join(left, right, join.on, join.how, join.suffix, "join")
    columns = tuple((n, Column(hidden[n]) if n in hidden else tree) for n, tree in node.columns)
    return replace(node, input=made, columns=columns)


def _invariant_side(join: Join, facts: Facts) -> Node | None:
    """The side of a join that stays while the other changes, if its rows are not padded with nulls."""
    left, right = facts.varies(join.left), facts.varies(join.right)
    if join.how != "full" and right - left and not left:
        return join.left
    return join.right if join.how == "inner" and left - right and not right else None


def _moves(tree: Expr, here: dict[str, str]) -> bool:
    used = columns_of(tree)
    return bool(used) and set(used) <= here.keys() and not isinstance(tree, Column | Constant)


def table_to_the_right(node: Join, facts: Facts) -> Node | None:
    """Keyed rows that change, joined with many that stay: written the other way round."""
    left, right = node.left, node.right
    if node.how != "inner" or left.fields is None or right.fields is None:
        return None
    if not facts.varies(left) or facts.varies(right) or facts.everywhere(right):
        return None
    if not facts.is_unique(left, node.left_keys) or facts.is_unique(right, node.right_keys):
        return None
    if any(_unlike(left.fields[a], right.fields[b]) for a, b in node.on):
        return None
    mark = "\0left"
    if any(name + mark in right.fields for name in left.fields):
        return None
    turned = making.join(right, left, tuple((b, a) for a, b in node.on), "inner", mark, "join")
    keys = dict(node.on)
    trees: dict[str, Expr] = {}
    for name in left.fields:
        trees[name] = Column(keys.get(name, name + mark if name in right.fields else name))
    trees |= {new: Column(old) for new, old in node.taken.items()}
    return making.project(turned, trees, "join")


def _unlike(a: object, b: object) -> bool:
    """May key values of these types look different?"""
    return a is None or b is None or a != b
