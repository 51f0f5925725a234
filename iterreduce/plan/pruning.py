"""Column pruning: what nobody reads is not computed, moved or read from files.

From the root down every node is told which of its columns are wanted; then the plan is made anew with
narrower projections, groups and sources. The same source is read once, so its columns are those that any of
its readers wants. States of iterations keep their columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from iterreduce.columns.expressions import Column, Expr
from iterreduce.columns.trees import columns_of
from iterreduce.plan.known import fields_after
from iterreduce.plan.making import columns_read
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
    Source,
    StateRows,
    Union,
    walk,
)
from iterreduce.plan.rules import Applied, Rewriter
from iterreduce.sources import LocalSource

Wanted = dict[int, set[str] | None]  # by node; None: all columns


def pruned(root: Node, applied: Applied) -> Node:
    """The plan without columns that nobody reads; the root keeps its own."""
    wanted = wanted_columns(root)
    return Pruner(wanted, _of_sources(root, wanted), applied).plan(root)


def wanted_columns(root: Node) -> Wanted:
    """The columns of each node that something reads."""
    wanted: Wanted = {id(root): None}
    for node in reversed(list(walk(root))):
        asked = wanted.setdefault(id(node), set())
        if asked is not None and not asked and node.names:
            asked |= {node.names[0]}  # rows that are only counted keep a column, and what it is made of
        for scalar in node.scalars:
            _add(wanted, scalar.node, {scalar.column})
        for part, columns in _asks(node, asked):
            _add(wanted, part, columns)
    return wanted


def _add(wanted: Wanted, node: Node, columns: Iterable[str] | None) -> None:
    have = wanted.setdefault(id(node), set())
    if columns is None or have is None or node.names is None:
        wanted[id(node)] = None
    else:
        have |= set(columns)


def _asks(node: Node, asked: set[str] | None) -> list[tuple[Node, Iterable[str] | None]]:
    """Which columns of its inputs a node reads, to make the columns asked for."""
    all_of = set(node.names or ()) if asked is None else asked
    if asked is None and node.names is None:
        return [(part, None) for part in _parts(node)]
    if isinstance(node, Project):
        trees = [tree for name, tree in node.columns if name in all_of]
        read = {name for tree in trees for name in columns_of(tree)}
        made = {name for name, _ in node.columns}
        return [(node.input, read | (all_of - made if node.rest else set()))]
    if isinstance(node, Filter):
        return [(node.input, all_of | set(columns_of(node.predicate)))]
    if isinstance(node, Group):
        chosen = [(name, a) for name, a in node.aggregates if name in all_of]
        return [(node.input, {*node.keys, *columns_read(chosen)})]
    if isinstance(node, Aggregate):
        return [(node.input, columns_read(node.aggregates))]
    if isinstance(node, Join):
        return _asks_of_join(node, all_of)
    if isinstance(node, Union):
        return [(part, all_of) for part in node.rows]
    if isinstance(node, Sort | Limit | Repartition):
        return [(node.input, all_of | set(node.keys))]
    if isinstance(node, Sample):
        return [(node.input, all_of)]
    return [(part, None) for part in _parts(node)]


def _parts(node: Node) -> list[Node]:
    inside = [state.result for state in node.states] if isinstance(node, Iterate) else []
    return [*node.inputs, *inside]


def _asks_of_join(node: Join, asked: set[str]) -> list[tuple[Node, Iterable[str] | None]]:
    left_names = set(node.left.names or ())
    right = {old for new, old in node.taken.items() if new in asked} | set(node.right_keys)
    left = (asked & left_names) | set(node.left_keys)
    # a name with a suffix is one that the left has too: it stays, or names would change
    left |= {old for new, old in node.taken.items() if new in asked and new != old and old in left_names}
    return [(node.left, left), (node.right, right)]


def _of_sources(root: Node, wanted: Wanted) -> dict[tuple[int, Any], set[str] | None]:
    """The columns that all readers of a source want together."""
    out: dict[tuple[int, Any], set[str] | None] = {}
    for node in walk(root):
        if isinstance(node, Source):
            key, asked = (id(node.source), node.bounds), wanted[id(node)]
            have = out.setdefault(key, set())
            out[key] = None if have is None or asked is None else have | asked
    return out


class Pruner(Rewriter):
    """A plan made anew with the columns that are wanted."""

    def __init__(self, wanted: Wanted, of_sources: dict[tuple[int, Any], set[str] | None], applied: Applied):
        super().__init__((), None, applied)
        self.wanted, self.of_sources = wanted, of_sources

    def plan(self, root: Node) -> Node:
        """The plan with fewer columns."""
        for node in walk(root):
            self.made[id(node)] = self._pruned(node)
        return self.made[id(root)]

    def _pruned(self, node: Node) -> Node:
        if isinstance(node, StateRows):
            return replace(node, initial=self.made.get(id(node.initial), node.initial))
        if isinstance(node, Iterate):
            return self.with_own_states(node)
        if isinstance(node, MapBatches):
            return self.rebuilt(node)
        asked = self.wanted[id(node)]
        if isinstance(node, Source):
            return self._source(node)
        made = self.rebuilt(node)
        if isinstance(node, Join | Sort | Limit | Repartition | Union | Sample):
            made = self._narrow_inputs(node, made)
        if asked is not None:
            made = self._fewer(made, asked)
        if made is node:
            return node
        fields = fields_after(made)
        return made if fields is None else replace(made, fields=fields)

    def _source(self, node: Source) -> Node:
        asked = self.of_sources[id(node.source), node.bounds]
        if asked is None or node.names is None or isinstance(node.source, LocalSource):
            return node
        names = tuple(n for n in node.names if n in asked) or node.names[:1]
        if names == node.names or node.wanted is not None:
            return node
        self.applied.rules.append(("prune columns", f"{node.label}: only {', '.join(names)}"))
        return replace(node, wanted=names, fields={n: (node.fields or {})[n] for n in names})

    def _fewer(self, node: Node, asked: set[str]) -> Node:
        """The node without columns that nobody asked for; one stays."""
        if isinstance(node, Project) and not node.rest:
            columns = tuple((n, t) for n, t in node.columns if n in asked) or node.columns[:1]
            return node if columns == node.columns else replace(node, columns=columns)
        if isinstance(node, Group):
            aggregates = tuple((n, a) for n, a in node.aggregates if n in asked)
            return node if len(aggregates) == len(node.aggregates) else replace(node, aggregates=aggregates)
        return node

    def _narrow_inputs(self, old: Node, node: Node) -> Node:
        """What moves or is kept has only columns that are wanted."""
        inputs = []  # each side of a join by itself: both may be one node
        for (_, asked), part in zip(_asks(old, self.wanted[id(old)]), node.inputs, strict=True):
            inputs.append(part if asked is None else self._narrowed(part, set(asked), isinstance(old, Union)))
        same = all(new is part for new, part in zip(inputs, node.inputs, strict=True))
        return node if same else node.with_inputs(*inputs)

    @staticmethod
    def _narrowed(node: Node, asked: set[str], exact: bool) -> Node:
        names = node.names
        if names is None or set(names) <= asked or isinstance(node, StateRows | Iterate):
            return node
        if isinstance(node, Source) and not exact:
            return node  # what is read is held as it is
        chosen = tuple(n for n in names if n in asked) or names[:1]
        trees: tuple[tuple[str, Expr], ...] = tuple((n, Column(n)) for n in chosen)
        fields = {n: (node.fields or {})[n] for n in chosen}
        return Project(input=node, columns=trees, fields=fields, where=node.where)
