"""Rows whose order matters, in an order that no number of ranks changes.

Rows of a source, of a sort, and what keeps their order stand as they stand. Groups, joined and united rows
and states have no order of their own: it depends on where they lie. Where something asks for one, what tells
the rows apart decides: their key, if one is known, else the values of all columns that have an order. So a
limit of such rows is the first by those columns, ties of a sort are settled by them, and rows are sorted
before they are numbered or drawn. Ties of argmin and argmax of such rows go to the smallest value.

Who speaks to it: `iterreduce.plan.planning`, once before columns that nobody reads go, so that which rows are
chosen does not depend on which columns are asked of them; and once behind, for sorts that choose nothing.
"""

from __future__ import annotations

from dataclasses import replace

from iterreduce.columns.schema import Field
from iterreduce.plan.facts import Facts
from iterreduce.plan.functions import RowNumber
from iterreduce.plan.links import of_edges
from iterreduce.plan.nodes import (
    Aggregate,
    Filter,
    Group,
    Limit,
    LoopRows,
    MapBatches,
    Node,
    Project,
    Repartition,
    Rows,
    Sample,
    Sort,
    Source,
    walk,
)
from iterreduce.plan.rules import Applied, Rewriter

RULE = "order without ranks"
HAVE_ORDER = (Source, Rows, LoopRows, Sort, Limit, Sample, Aggregate)


def ordered(root: Node, applied: Applied, chosen_only: bool = False) -> Node:
    """The plan with orders that do not depend on ranks; ``chosen_only``: only of what chooses or numbers
    rows, and of the sorts below it.
    """
    if not any(_asks_for_order(node) for node in walk(root)):
        return root
    chosen = _sorts_below_choices(root) if chosen_only else None
    return Orders(Facts((root,)), applied, chosen).plan(root)


def chooses(node: Node) -> bool:
    """Do its rows, or their numbers, depend on the order of what it reads?"""
    return isinstance(node, Limit | Sample) or (
        isinstance(node, MapBatches) and isinstance(node.function, RowNumber)
    )


def _asks_for_order(node: Node) -> bool:
    """Does the order of rows matter to it: of those that it makes, or of those that it reads?"""
    if isinstance(node, Group | Aggregate):
        return any(a.without_order() is not a for _, a in node.aggregates)
    return isinstance(node, Sort) or chooses(node)


def _below(node: Node) -> Node:
    """The rows whose order these have."""
    while isinstance(node, Project | Filter | Repartition) or (isinstance(node, MapBatches) and not node.by):
        node = node.rows[0] if isinstance(node, MapBatches) else node.input
    return node


def _sorts_below_choices(root: Node) -> set[int]:
    below = (_below(part) for node in walk(root) if chooses(node) for part in node.inputs[:1])
    return {id(node) for node in below if isinstance(node, Sort)}


class Orders(Rewriter):
    """One round over a plan."""

    def __init__(self, facts: Facts, applied: Applied, chosen: set[int] | None):
        super().__init__((), facts, applied)
        self.known, self.chosen = facts, chosen

    def _node(self, node: Node) -> Node:
        made = self.rebuilt(node)
        if isinstance(made, Group | Aggregate):
            return self._ties(made)
        sorts = isinstance(made, Sort) and (self.chosen is None or id(node) in self.chosen)
        if not sorts and not chooses(made):
            return made
        found = self._settled(made) if isinstance(made, Sort | Limit) else self._sorted_before(made)
        if found is not made:
            self.applied.rules.append((RULE, found.label))
        return found

    def _ties(self, node: Group | Aggregate) -> Node:
        """Aggregates whose ties rows without an order do not settle."""
        free = tuple((name, a.without_order()) for name, a in node.aggregates)
        if free == node.aggregates or self._has_order(node.input):
            return node
        self.applied.rules.append((RULE, node.label))
        return replace(node, aggregates=free)

    def _settled(self, node: Sort | Limit) -> Node:
        """With columns behind its keys that settle ties."""
        more = self._more(node.input, node.keys)
        if not more:
            return node
        return replace(node, keys=(*node.keys, *more), descending=(*node.descending, *(False for _ in more)))

    def _sorted_before(self, node: Node) -> Node:
        """Of rows that are sorted first."""
        rows = node.inputs[0]
        keys = self._more(rows, ())
        if not keys:
            return node
        down = (False,) * len(keys)
        made = Sort(input=rows, keys=keys, descending=down, fields=rows.fields, where=node.where)
        return node.with_inputs(made, *node.inputs[1:])

    def _more(self, rows: Node, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Columns that tell apart rows that are equal in ``keys``; none where the rows have an order."""
        if self._has_order(rows) or self.known.is_unique(rows, keys):
            return ()
        able = [n for n in rows.names or () if n not in keys and self._sortable(rows, n)]
        unique = [key - set(keys) for key in self.known.unique(rows)]
        best = min((key for key in unique if key <= set(able)), key=len, default=None)
        return tuple(n for n in able if best is None or n in best)

    def _has_order(self, node: Node) -> bool:
        below = _below(node)
        if isinstance(below, (*HAVE_ORDER, MapBatches)):
            return True
        return self.known.everywhere(below) and not self.known.varies(below)

    def _sortable(self, node: Node, column: str) -> bool:
        of = (node.fields or {}).get(column)
        return has_order(of) if of is not None else of_edges(self.known.origin(node, column)[0])


def has_order(of: Field) -> bool:
    """Have values of this type an order: numbers, dates, bools, text, and vectors of them?"""
    return of.kind in ("text", "bytes") or (
        of.kind == "fixed" and of.dtype.kind in "biufmM" and of.dtype.itemsize <= 8
    )
