"""Lowering of groups and totals: aggregates by key are one shuffle with a combiner, of all rows one total."""

from __future__ import annotations

from dataclasses import replace

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.expressions import Column, Expr
from iterreduce.loop import Local, Shuffle, Total
from iterreduce.plan.flow import Flow, Made, Place
from iterreduce.plan.groupkernels import GroupHere, OneRow
from iterreduce.plan.kernels import Columns
from iterreduce.plan.lower import Lowering
from iterreduce.plan.making import columns_read
from iterreduce.plan.nodes import Aggregate, Group, Node

Aggregates = tuple[tuple[str, Aggregator], ...]
ROWS = "\0rows"  # how many rows a key has: where none may have come


def group(lowering: Lowering, node: Group) -> Flow:
    """One row per key."""
    if id(node) in lowering.links.fused:
        return lowering.rules.linked(lowering, node)
    if id(node) in lowering.links.vertices:
        return lowering.rules.vertices(lowering, node)
    place = lowering.place(node)
    flow, aggregates = prepared(lowering, lowering.flow(node.input), node, node.keys)
    if flow.lies == () or (flow.lies and set(flow.lies) <= set(node.keys)):
        made = lowering.table(flow, place, node)
        return _here(lowering, node, made, aggregates, place)
    made = lowering.columns_in(flow, place, node)
    into = lowering.name_of(node)
    if id(node) in lowering.on_all_ranks and all(a.kind != "collect" for _, a in aggregates):
        lowering.note(node, "every rank needs all groups: they are summed on all ranks at once")
        lowering.emit(place, Total(lowering.read(made, place), node.keys, dict(aggregates), into))
        return Flow.of(lowering.new(into, _columns(node), (), place))
    shuffle = Shuffle(lowering.read(made, place), node.keys, into, combine=dict(aggregates))
    lowering.emit(place, shuffle)
    return Flow.of(lowering.new(into, _columns(node), node.keys, place))


def _columns(node: Group) -> tuple[str, ...]:
    return (*node.keys, *(name for name, _ in node.aggregates))


def _here(lowering: Lowering, node: Group, made: Made, aggregates: Aggregates, place: Place) -> Flow:
    """Rows of a key are together already."""
    lowering.note(node, "rows of a key lie together already: grouped where they are, nothing travels")
    into = lowering.name_of(node)
    kernel = GroupHere(node.keys, aggregates, tuple((k, k) for k in node.keys))
    lowering.emit(place, Local(kernel, (lowering.read(made, place),), into, cut="share", rank_free=True))
    return Flow.of(lowering.new(into, _columns(node), made.lies, place))


def prepared(
    lowering: Lowering, flow: Flow, node: Group | Aggregate, keys: tuple[str, ...]
) -> tuple[Flow, Aggregates]:
    """The rows with their aggregates' expressions computed as columns, and aggregates of columns."""
    place = lowering.place(node)
    if not flow.plain and not lowering.place(node.input).same(place):
        flow = Flow.of(lowering.made(node.input))
    trees: list[tuple[str, Expr]] = []
    aggregates = []
    numbers = dict(flow.numbers)
    for i, (name, aggregator) in enumerate(node.aggregates):
        if isinstance(aggregator.column, Column):
            aggregator = aggregator.of(aggregator.column.name)
        elif isinstance(aggregator.column, Expr):
            trees.append((f"\0{i}", lowering.tree(aggregator.column, numbers)))
            aggregator = aggregator.of(f"\0{i}")
        aggregates.append((name, aggregator))
    wanted = tuple(dict.fromkeys((*keys, *columns_read(aggregates))))
    if trees or (flow.columns is not None and wanted and set(wanted) < set(flow.columns)):
        made = dict(trees)
        columns = tuple((name, made.get(name, Column(name))) for name in wanted)
        if not trees and flow.plain:  # a shuffle reads only what it needs
            return flow, tuple(aggregates)
        lies = flow.lies if set(flow.lies or ()) <= set(wanted) else None
        flow = replace(
            flow, steps=(*flow.steps, Columns(columns)), columns=wanted, numbers=numbers, lies=lies
        )
    return flow, tuple(aggregates)


def total(lowering: Lowering, node: Node) -> tuple[Made, dict[str, int | None]]:
    """The raw total of an `Aggregate`: a table of one row, or of none where there were no rows."""
    if not isinstance(node, Aggregate):
        return lowering.made(node), {}
    place = lowering.place(node)
    flow, aggregates = prepared(lowering, lowering.flow(node.input), node, ())
    made = lowering.columns_in(flow, place, node)
    into = lowering.name_of(node)
    lowering.emit(place, Total(lowering.read(made, place), (), dict(aggregates), into))
    defaults = {name: 0 if a.kind == "count" else None for name, a in aggregates}
    return lowering.new(into, node.names, (), place), defaults


def aggregate(lowering: Lowering, node: Aggregate) -> Flow:
    """One row, also of no rows."""
    place = lowering.place(node)
    made, _ = lowering.total(node)
    into, fields = lowering.name_of(node, "row"), node.fields or {}
    kernel = OneRow(tuple((name, fields.get(name), a.kind == "count") for name, a in node.aggregates))
    lowering.emit(place, Local(kernel, (lowering.read(made, place),), into, cut="share", rank_free=True))
    return Flow.of(lowering.new(into, node.names, (), place))
