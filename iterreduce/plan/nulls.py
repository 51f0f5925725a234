"""Nulls that nobody sees: where whoever reads a column puts 0 for its nulls, none need be made.

A left join gives null where there is no match. Sums and counts of groups that are shuffled onto the left rows
are 0 there, so where each reader asks for just that (``fill_null(0)``) nothing is counted or masked.
"""

from __future__ import annotations

from iterreduce.columns.expressions import Apply, Column, Constant, Expr
from iterreduce.columns.schema import Field
from iterreduce.plan.lower import Lowering
from iterreduce.plan.nodes import Aggregate, Group, Join, Node, Project


def filled_everywhere(lowering: Lowering, node: Join, grouped: Group, names: dict[str, str]) -> bool:
    """Does whoever reads the groups' columns put there, for null, just what a sum or count of nothing is?"""
    if any(old not in names or not _is_zero_of_nothing(grouped, names[old]) for old in node.taken.values()):
        return False
    if node is lowering.root or not node.taken:
        return False
    readers = lowering.parents.get(id(node), [])
    return bool(readers) and all(
        isinstance(reader, Project)
        and not reader.rest
        and all(_only_filled(tree, new) for tree in reader.expressions for new in node.taken)
        for reader in readers
    )


def never_null_of(grouped: Group, names: dict[str, str], join: Join) -> dict[str, Field]:
    """The types of the columns of groups beside a join whose rows all have a value: what fills nulls there
    does nothing.
    """
    fields = grouped.fields or {}
    of = {new: fields.get(names[old]) for new, old in join.taken.items()}
    return {new: field for new, field in of.items() if field is not None and not field.nullable}


def _is_zero_of_nothing(grouped: Group, name: str) -> bool:
    """Is the aggregate 0 for a key without a row? Sums of values that may be null are null there."""
    kind, field = dict(grouped.aggregates)[name].kind, (grouped.fields or {}).get(name)
    return kind == "count" or (kind == "sum" and field is not None and not field.nullable)


def others_than(lowering: Lowering, grouped: Group, join: Join) -> list[Node]:
    """Who reads the groups beside a join, which may do so through projections."""
    out: list[Node] = []
    for reader in lowering.parents.get(id(grouped), []):
        if reader is join:
            continue
        if isinstance(reader, Project) and lowering.parents.get(id(reader)) == [join]:
            continue
        out.append(reader)
    return out


def is_sum(node: Node) -> bool:
    """Is it a sum over all rows, which rows of 0 do not change?"""
    return isinstance(node, Aggregate) and all(
        a.kind == "sum" and not isinstance(a.column, Apply) for _, a in node.aggregates
    )


def _only_filled(tree: Expr, name: str) -> bool:
    """Does the tree read a column only where a null of it becomes 0?"""
    if is_filled(tree) and isinstance(tree, Apply):
        first = tree.arguments[0]
        if isinstance(first, Column) and first.name == name:
            return True
    if isinstance(tree, Column):
        return tree.name != name
    return all(_only_filled(part, name) for part in tree.arguments) if isinstance(tree, Apply) else True


def is_filled(tree: Expr) -> bool:
    """Is it a column with 0 for its nulls?"""
    if not isinstance(tree, Apply) or tree.operation != "coalesce" or len(tree.arguments) != 2:
        return False
    first, other = tree.arguments
    return isinstance(first, Column) and isinstance(other, Constant) and _is_zero(other.value)


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and value == 0
