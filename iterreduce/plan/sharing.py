"""Equal parts of a plan made once, also where they were written twice.

Two nodes are equal where they are the same operation, with equal expressions, on equal inputs. What is merged
is work (groups, joins, sorts, totals, functions declared pure): a projection or a filter costs less than a
table that is kept, so those are merged only under such a node. A function that is not pure is called as often
as it is written.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.expressions import Expr, Parameter, key_of
from iterreduce.columns.trees import parameters_of, with_parameters
from iterreduce.plan.nodes import (
    Aggregate,
    Filter,
    Group,
    Join,
    Limit,
    MapBatches,
    Node,
    Project,
    Repartition,
    Rows,
    Sample,
    Scalar,
    Sort,
    Source,
    Union,
)
from iterreduce.plan.rules import Applied, Rewriter

WORK = (Group, Join, Aggregate, Sort, Limit, Sample, Repartition, MapBatches)


def shared(root: Node, applied: Applied) -> Node:
    """The plan with equal work done once."""
    return Sharer((), None, applied).plan(root)


class Sharer(Rewriter):
    """Nodes by what they are: a class of equal nodes has a number."""

    def plan(self, root: Node) -> Node:
        """The plan, from the leaves up."""
        self.classes: dict[Hashable, int] = {}
        self.class_of: dict[int, int] = {}
        self.first: dict[int, Node] = {}
        return super().plan(root)

    def _node(self, node: Node) -> Node:
        node = self.rebuilt(node)
        key = self._key(node)
        number = self.classes.setdefault(key, len(self.classes))
        first = self.first.setdefault(number, node)
        if first is not node and isinstance(node, WORK):
            self.applied.rules.append(("equal parts once", node.label))
            return first
        self.class_of[id(node)] = number
        return node

    def _key(self, node: Node) -> Hashable:
        own = self._own(node)
        if own is None:
            return "itself", id(node)
        inputs = tuple(self.class_of[id(part)] for part in node.inputs)
        names = None if node.names is None else tuple(node.names)
        return type(node).__name__, inputs, own, names

    def _own(self, node: Node) -> Hashable | None:
        """What a node is beside its inputs; None: like no other."""
        if isinstance(node, Project):
            return tuple((n, self._tree_key(t)) for n, t in node.columns), node.rest
        if isinstance(node, Filter):
            return self._tree_key(node.predicate)
        if isinstance(node, Group):
            return node.keys, self._aggregates(node.aggregates)
        if isinstance(node, Aggregate):
            return self._aggregates(node.aggregates)
        if isinstance(node, Join):
            return node.on, node.how, node.suffix
        if isinstance(node, Union):
            return ()
        if isinstance(node, Sort):
            return node.keys, node.descending
        if isinstance(node, Limit):
            return node.rows, node.keys, node.descending
        if isinstance(node, Sample):
            return node.k, node.seed, node.at_least
        if isinstance(node, Repartition):
            return node.keys
        if isinstance(node, MapBatches):
            return (id(node.function), node.by, node.keeps) if node.pure else None
        if isinstance(node, Source):
            return id(node.source), node.wanted, node.bounds
        return id(node.batch) if isinstance(node, Rows) else None

    def _aggregates(self, given: tuple[tuple[str, Aggregator], ...]) -> Hashable:
        return tuple(
            (name, a.of(self._numbered(a.column)) if isinstance(a.column, Expr) else a) for name, a in given
        )

    def _tree_key(self, tree: Expr) -> Hashable:
        return key_of(self._numbered(tree))

    def _numbered(self, tree: Expr) -> Expr:
        """The tree with numbers of equal nodes under one name."""
        names: Mapping[str, Expr] = {
            p.name: Parameter(f"{self.class_of[id(p.node)]}.{p.column}", p.field)
            for p in parameters_of(tree)
            if isinstance(p, Scalar)
        }
        return with_parameters(tree, names)
