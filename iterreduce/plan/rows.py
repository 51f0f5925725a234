"""Lowering of operations that look at rows one by one, or bring rows together: no keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from iterreduce.columns.expressions import Column
from iterreduce.columns.simplify import fold_constants
from iterreduce.columns.trees import substitute
from iterreduce.errors import UsageError
from iterreduce.loop import Gather, Local, Shuffle, Splitters
from iterreduce.plan.flow import PREPARE, Flow, Made, Place
from iterreduce.plan.functions import Declared, OfGroups, RowByRow, RowNumber
from iterreduce.plan.kernels import ChooseRows, Columns, Concat, FirstRows, Keep
from iterreduce.plan.lower import Lowering
from iterreduce.plan.nodes import (
    Filter,
    Limit,
    LoopRows,
    MapBatches,
    Project,
    Repartition,
    Rows,
    Sample,
    Sort,
    Source,
    StateRows,
    Union,
)


def source(lowering: Lowering, node: Source) -> Flow:
    """Rows that a source reads: the same source is read once, whoever asks."""
    given = node.source
    if node.wanted is not None:
        given = given.columns(node.wanted)
    if node.bounds and hasattr(given, "where"):
        given = given.where(node.bounds)
    return Flow.of(_outside(lowering, getattr(given, "name", "rows"), given, node.names, None))


def rows(lowering: Lowering, node: Rows) -> Flow:
    """Rows in memory, on all ranks."""
    return Flow.of(_outside(lowering, "rows", node.batch, node.batch.names, ()))


def loop_rows(lowering: Lowering, node: LoopRows) -> Flow:
    """The result of a loop written in nouns."""
    return Flow.of(_outside(lowering, node.loop.name, node.loop, node.names, None))


def _outside(
    lowering: Lowering, name: str, given: Any, columns: tuple[str, ...] | None, lies: tuple[str, ...] | None
) -> Made:
    place = Place(lowering.top, PREPARE)
    known = lowering.name_of_source(name)
    lowering.top.sources[known] = given
    return lowering.new(known, columns, lies, place)


def state(lowering: Lowering, node: StateRows) -> Flow:
    """A state of an iteration whose body is open."""
    raise UsageError(
        f'{node.label} of the iteration "{getattr(node.body, "name", "")}" is used outside of its body; '
        "return what you need from the step as a state"
    )


def project(lowering: Lowering, node: Project) -> Flow:
    """One more step of computing."""
    flow = _ready(lowering, node)
    numbers = dict(flow.numbers)
    full = lowering.full.get(id(node.input), {})  # what fills nulls there is left out
    given = [(name, fold_constants(tree, full) if full else tree) for name, tree in node.columns]
    trees = tuple((name, lowering.tree(tree, numbers)) for name, tree in given)
    columns = node.names
    if columns is None and flow.columns is not None and node.rest:
        columns = tuple(dict.fromkeys((*flow.columns, *(n for n, _ in trees))))
    lies = flow.lies
    if lies:
        at = {old: new for new, old in reversed(list(node.passed.items()))}
        lies = tuple(at[k] for k in lies) if all(k in at for k in lies) else None
        lies = lies if lies is not None else _still(node, flow.lies or ())
    steps = (*flow.steps, Columns(trees, node.rest))
    last = flow.steps[-1] if flow.steps else None
    if isinstance(last, Columns) and not last.rest and not node.rest:
        passed = dict(last.trees)
        if all(isinstance(tree, Column) for tree in passed.values()):  # only other names: one step for two
            merged = tuple((name, substitute(tree, passed)) for name, tree in trees)
            steps = (*flow.steps[:-1], Columns(merged))
    return replace(flow, steps=steps, columns=columns, lies=lies, numbers=numbers)


def _still(node: Project, keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """The keys, where an input of unknown columns is passed on as it is."""
    made = {name for name, _ in node.columns}
    return keys if node.rest and node.input.names is None and not made & set(keys) else None


def keep(lowering: Lowering, node: Filter) -> Flow:
    """One more step: some rows are left out."""
    flow = _ready(lowering, node)
    numbers = dict(flow.numbers)
    predicate = lowering.tree(node.predicate, numbers)
    return replace(flow, steps=(*flow.steps, Keep(predicate)), numbers=numbers)


def _ready(lowering: Lowering, node: Project | Filter) -> Flow:
    """The input's rows under way; computed first where they are made elsewhere than what follows."""
    flow = lowering.flow(node.input)
    if not flow.plain and not lowering.place(node).same(lowering.place(node.input)):
        return Flow.of(lowering.made(node.input))
    return flow


def map_batches(lowering: Lowering, node: MapBatches) -> Flow:
    """A Python function: of batches, or of groups."""
    place = lowering.place(node)
    if node.by:
        return _map_groups(lowering, node, place)
    first, *others = node.rows
    made = lowering.numbered(first) if isinstance(node.function, RowNumber) else lowering.made(first)
    reads = [lowering.read(made, place)]
    reads += [lowering.read(lowering.everywhere(other), place) for other in others]
    into = lowering.name_of(node, "mapped")
    if node.keeps:
        return _row_by_row(lowering, node, made, tuple(reads), into)
    function = node.function if node.fields is None else Declared(node.function, tuple(node.fields.items()))
    lowering.emit(place, Local(function, tuple(reads), into, cut="block", pure=node.pure))
    return Flow.of(lowering.new(into, node.names, () if made.lies == () else None, place))


def _row_by_row(lowering: Lowering, node: MapBatches, made: Made, reads: tuple[str, ...], into: str) -> Flow:
    """A function that makes a row of each: they lie as they lay, in the same order."""
    place, free = lowering.place(node), isinstance(node.function, RowNumber)
    kernel = node.function if free else RowByRow(node.function, node.keeps)
    cut: Any = "share" if free or made.lies is not None else "block"
    lowering.emit(place, Local(kernel, reads, into, cut=cut, pure=node.pure, rank_free=free))
    lies = made.lies if set(made.lies or ()) <= set(node.keeps) else None
    return Flow.of(lowering.new(into, node.names, lies, place, made.order))


def _map_groups(lowering: Lowering, node: MapBatches, place: Place) -> Flow:
    sides = [lowering.laid(part, node.by, place) for part in node.rows]
    into = lowering.name_of(node, "groups")
    reads = tuple(lowering.read(side, place) for side in sides)
    lowering.emit(place, Local(OfGroups(node.function, node.by), reads, into, cut="share", rank_free=True))
    return Flow.of(lowering.new(into, node.names, () if all(s.lies == () for s in sides) else None, place))


def union(lowering: Lowering, node: Union) -> Flow:
    """Rows of several tables on each rank; those that are everywhere are dealt out first."""
    place = lowering.place(node)
    parts = [lowering.made(part) for part in node.rows]
    alike = {made.lies for made in parts}
    if () in alike and len(alike) > 1:
        parts = [_dealt(lowering, node, made, place) if made.lies == () else made for made in parts]
        alike = {made.lies for made in parts}
    lies = alike.pop() if len(alike) == 1 else None
    parts.sort(key=lambda made: made.lies is not None)  # the engine takes the first's layout
    kernel = Concat(tuple((k, k) for k in lies or ()))
    reads, into = tuple(lowering.read(made, place) for made in parts), lowering.name_of(node)
    lowering.emit(place, Local(kernel, reads, into, cut="share", rank_free=True))
    return Flow.of(lowering.new(into, node.names, lies, place))


def _dealt(lowering: Lowering, node: Union, made: Made, place: Place) -> Made:
    if not made.columns:
        raise UsageError(f"union: the columns of {made.name} are not known before it runs ({node.where})")
    into = lowering.name_of(node, f"{made.name} dealt out")
    lowering.emit(place, Shuffle(lowering.read(made, place), made.columns[:1], into))
    return lowering.new(into, made.columns, made.columns[:1], place)


def sort(lowering: Lowering, node: Sort) -> Flow:
    """A total order over the ranks, by sampled splitters."""
    place, made = lowering.place(node), lowering.made(node.input)
    into = lowering.name_of(node)
    route = Splitters(descending=node.descending) if any(node.descending) else Splitters()
    lowering.emit(place, Shuffle(lowering.read(made, place), node.keys, into, route=route))
    lowering.counted.add(into)
    return Flow.of(lowering.new(into, node.names or made.columns, None, place))


def limit(lowering: Lowering, node: Limit) -> Flow:
    """The first rows of each rank, then of those."""
    place, made = lowering.place(node), lowering.made(node.input)
    kernel = FirstRows(node.rows, node.keys, node.descending)
    name = lowering.name_of(node)
    rows = lowering.read(made, place)
    if made.lies != ():
        lowering.emit(place, Local(kernel, (rows,), f"{name} here", cut="share", rank_free=True))
        lowering.emit(place, Gather(f"{name} here", f"{name} of all"))
        rows = f"{name} of all"
    lowering.emit(place, Local(kernel, (rows,), name, cut="share"))
    return Flow.of(lowering.new(name, node.names or made.columns, (), place))


def sample(lowering: Lowering, node: Sample) -> Flow:
    """Rows chosen by their global numbers."""
    place = lowering.place(node)
    made = lowering.numbered(node.input)
    name = lowering.name_of(node)
    kernel = ChooseRows(node.k, node.seed, node.of, node.at_least, node.where)
    reads = (lowering.read(made, place),)
    lowering.emit(place, Local(kernel, reads, f"{name} here", cut="share", rank_free=True))
    lowering.emit(place, Gather(f"{name} here", name))
    return Flow.of(lowering.new(name, node.names or made.columns, (), place))


def repartition(lowering: Lowering, node: Repartition) -> Flow:
    """Rows to the owners of their keys."""
    return Flow.of(lowering.laid(node.input, node.keys, lowering.place(node)))
