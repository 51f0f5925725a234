"""Lowering of groups of indexed rows: the index once, in prepare, and a shuffle of values for each group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from iterreduce.columns.aggregators import Aggregator, count
from iterreduce.columns.expressions import Column, Expr, col, where
from iterreduce.columns.trees import columns_of, renamed
from iterreduce.loop import Index, Joined, Shuffle
from iterreduce.plan.flow import PREPARE, Flow, Made, Place
from iterreduce.plan.grouping import ROWS
from iterreduce.plan.kernels import Columns, Keep, Step
from iterreduce.plan.links import Fused, Graph
from iterreduce.plan.lower import Lowering
from iterreduce.plan.nodes import Group

HERE = "\0here"  # of a row that stands for a key: how many rows it was made of


@dataclass(frozen=True, eq=False)
class Resident:
    """Indexed rows, and the table of the keys of each end."""

    links: str
    tables: Mapping[str, Made]


def resident(lowering: Lowering, graph: Graph) -> Resident:
    """The index of some rows, made before the first iteration."""
    if graph.made is None:
        place, rows = Place(lowering.top, PREPARE), lowering.made(graph.edges)
        first, second = graph.ends
        into = lowering.name_of(graph.edges, "links")
        also: dict[str, tuple[str, str]] = {}
        if graph.one_table:
            table = lowering.name_of(graph.edges, "keys")
            names, keys = {table: graph.key}, {first: table, second: table}
            if graph.also is not None:
                also[table] = lowering.made(graph.also).name, graph.key
        else:
            tables = [lowering.name_of(graph.edges, f"keys of {end}") for end in graph.ends]
            keys = dict(zip(graph.ends, tables, strict=True))
            names = dict(zip(tables, graph.ends, strict=True))
        lowering.emit(place, Index(rows.name, keys, into, names, also, graph.symmetric))
        made = {t: lowering.new(t, (key,), (key,), place) for t, key in names.items()}
        graph.made = Resident(into, {end: made[table] for end, table in keys.items()})
        both = "of both ends are one table" if graph.one_table else "of each end are a table"
        lowering.note(graph.edges, f"rows are indexed by {first} and {second} once; keys {both}")
    found: Resident = graph.made
    return found


def vertices(lowering: Lowering, node: Group) -> Flow:
    """The keys of both ends of indexed rows, which the index has."""
    graph, _ = lowering.links.vertices[id(node)]
    made = resident(lowering, graph).tables[graph.ends[0]]
    (name,) = made.columns or ("",)
    if name == node.keys[0]:
        return Flow.of(made)
    return Flow(made, node.keys, node.keys, steps=(Columns(((node.keys[0], Column(name)),)),))


def linked(lowering: Lowering, node: Group) -> Flow:
    """One row per key that had a row."""
    fused = lowering.links.fused[id(node)]
    graph = lowering.links.graph_of(fused)
    table = resident(lowering, graph).tables[fused.key]
    made = shuffled(lowering, node, fused, graph, table, lowering.place(node), rows=True)
    (key,) = table.columns or ("",)
    trees: list[tuple[str, Expr]] = [(node.keys[0], Column(key))]
    trees += [(name, finished(name, aggregator)) for name, aggregator in node.aggregates]
    steps = (Keep(col(ROWS) > 0), Columns(tuple(trees)))
    return Flow(made, node.names, node.keys, steps=steps)


def finished(name: str, aggregator: Aggregator) -> Expr:
    """An output from what was shuffled."""
    if aggregator.kind == "mean":
        return col(f"\0sum {name}") / col(f"\0count {name}")
    return Column(name)


def shuffled(
    lowering: Lowering, node: Group, fused: Fused, graph: Graph, onto: Made, place: Place, rows: bool
) -> Made:
    """The aggregates as rows of a keyed table, in its order; ``rows``: also how many rows each key had."""
    links = resident(lowering, graph).links
    aggregates = dict(fused.aggregates)
    joined, padded = None, _padded(lowering, fused, graph)
    if fused.right is not None:
        table, names = joined_table(lowering, fused, padded)
        joined = Joined(lowering.read(table, place), fused.on)
        aggregates = {n: renamed_aggregate(a, names) for n, a in aggregates.items()}
    if rows:
        aggregates[ROWS] = count()
    if padded is not None:
        aggregates = {n: _of_those_here(a) for n, a in aggregates.items()}
    into = lowering.name_of(node)
    reads = lowering.read(onto, place)
    name = visible(lowering, links, place)
    stage = Shuffle(name, (fused.key,), into, aggregates, reads, missing="drop", joined=joined)
    lowering.emit(place, stage)
    lowering.note(node, f"indexed rows: only values travel, summed by {fused.key} before they are sent")
    return lowering.new(into, (*(onto.columns or ())[:1], *aggregates), onto.lies, place, onto.order)


def has_all_keys(lowering: Lowering, node: Group, anchor: Made) -> bool:
    """Has a table a row for every group? So the one of the keys of the index by which they are grouped."""
    fused = lowering.links.fused.get(id(node))
    if fused is None:
        return False
    return resident(lowering, lowering.links.graph_of(fused)).tables[fused.key].order is anchor.order


def complete(lowering: Lowering, node: Group, anchor: Made) -> bool:
    """Has each row of a table at least one group, or the indexed rows none at all? So where the table has
    just the keys of the index, and so has the one that the rows are joined with.
    """
    if not has_all_keys(lowering, node, anchor):
        return False
    fused = lowering.links.fused[id(node)]
    keys = resident(lowering, lowering.links.graph_of(fused)).tables[fused.on]
    return fused.right is None or lowering.flow(fused.right).table.order is keys.order


def visible(lowering: Lowering, links: str, place: Place) -> str:
    """The name of indexed rows where stages read them."""
    return lowering.read(Made(links, None, None, Place(lowering.top, PREPARE), object()), place)


def _padded(lowering: Lowering, fused: Fused, graph: Graph) -> Made | None:
    """Groups of the same indexed rows that are joined with them again: a row for every key, also for those
    without a group, which ``HERE`` tells. Only where rows ask for values of all keys.
    """
    node = fused.right
    if node is None or graph.symmetric or graph.ends[0] != fused.key:
        return None
    flow = lowering.flow(node)
    root = lowering.facts.identity(node)
    if id(root) not in lowering.links.fused or flow.plain:
        return None
    first, *rest = flow.steps
    if (
        not isinstance(first, Keep)
        or flow.table.order is not resident(lowering, graph).tables[fused.on].order
    ):
        return None
    steps: list[Step] = [Columns(((HERE, Column(ROWS)),), rest=True)]
    for step in rest:
        if not isinstance(step, Columns):
            return None
        steps.append(step if step.rest else Columns((*step.trees, (HERE, Column(HERE)))))
    columns = (*(flow.columns or ()), HERE)
    return lowering.table(replace(flow, steps=tuple(steps), columns=columns), lowering.place(node), node)


def _of_those_here(aggregator: Aggregator) -> Aggregator:
    """An aggregate to which rows that are joined with nothing add nothing."""
    here = col(HERE) > 0
    if aggregator.kind == "count":
        return Aggregator("sum", where(here, 1, 0))
    assert isinstance(aggregator.column, Expr)
    return aggregator.of(where(here, aggregator.column, int(aggregator.kind == "all")))


def joined_table(lowering: Lowering, fused: Fused, given: Made | None = None) -> tuple[Made, dict[str, str]]:
    """The table that rows are joined with, by its key, and its columns' names in expressions; ``given``: it
    is this one.
    """
    assert fused.right is not None
    node, own = fused.right, fused.edges.names or ()
    read = {c for _, a in fused.aggregates if isinstance(a.column, Expr) for c in columns_of(a.column)}
    wanted = {new: old for new, old in fused.columns.items() if new in read}
    names = {new: old if old not in own else new for new, old in wanted.items()}
    made = lowering.made(node) if given is None else given
    if made.lies != (fused.right_key,):
        made = lowering.laid(node, (fused.right_key,), lowering.place(node))
    clashes = {new: old for new, old in wanted.items() if old in own}
    if clashes:
        place = lowering.place(node)
        trees = [(fused.right_key, Column(fused.right_key))]
        trees += [(names[new], Column(old)) for new, old in wanted.items()]
        trees += [(HERE, Column(HERE))] if given is not None else []
        flow = Flow(made, tuple(n for n, _ in trees), made.lies, steps=(Columns(tuple(trees)),))
        made = lowering.table(flow, place, node)
    return made, names


def renamed_aggregate(aggregator: Aggregator, names: Mapping[str, str]) -> Aggregator:
    """The aggregator with its columns under other names."""
    tree = aggregator.column
    return aggregator.of(renamed(tree, names)) if isinstance(tree, Expr) else aggregator
