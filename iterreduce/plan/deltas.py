"""Lowering of delta iterations: proposals meet the table that they would change; what improves is written.

Where the proposals are groups of indexed rows whose keys the table surely has, one shuffle touches the rows
that are reached, and nothing else is looked at; where one smallest or largest value is merged, it gives just
those that improve, settled if their end does not depend on their order. Otherwise proposals go to the owners
of their keys and look the table up there; those with new keys are inserted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from iterreduce.columns.compute import typed
from iterreduce.columns.expressions import Column, Expr
from iterreduce.columns.trees import columns_of, is_monotone
from iterreduce.fixpoint import MaxIterations
from iterreduce.loop import Insert, Joined, Local, Lookup, Patch, Replace, Shuffle
from iterreduce.plan.flow import Flow, Made, Place
from iterreduce.plan.kernels import Columns, Concat, Improved, NewRows, Settled
from iterreduce.plan.linking import joined_table, renamed_aggregate, resident, visible
from iterreduce.plan.links import Fused
from iterreduce.plan.lower import Lowering
from iterreduce.plan.nodes import Group, Iterate, Node

TOLD = "\0told"  # of a row that improved: do all rows that start from it know?


def lower_changes(lowering: Lowering, loop: Iterate, place: Place) -> None:
    """What the body of a delta iteration does, and writes."""
    table, changes = loop.states
    state, after = lowering.tables[id(table.rows)], lowering.tables[id(changes.rows)].name
    reached = _touched(lowering, loop, state, place)
    if reached is not None and TOLD in (reached.columns or ()):
        better, untold = (_settled(lowering, loop, reached, w, place) for w in (False, True))
        place.scope.writes += [Patch(state.name, better), Replace(after, untold)]
        lowering.note(
            loop, "rows that improve tell others at once, and other ranks when none of a rank's own improves"
        )
        return
    if reached is not None and _improves(loop):
        place.scope.writes += [Patch(state.name, reached.name), Replace(after, reached.name)]
        lowering.note(loop, "only rows that are reached are looked at, and only those that improve are made")
        return
    if reached is not None:
        better = _better(lowering, loop, reached, state, place)
        place.scope.writes += [Patch(state.name, better), Replace(after, better)]
        lowering.note(loop, "only rows that are reached are looked at, and those that improve are written")
        return
    grows = replace(state, order=object())  # rows are inserted behind those that it began with
    lowering.tables[id(table.rows)], lowering.flows[id(table.rows)] = grows, Flow.of(grows)
    proposed = _by_key(lowering, loop, place)
    if not loop.merge:
        new = _new_rows(lowering, loop, proposed, state, place)
        place.scope.writes += [Insert(state.name, new), Replace(after, new)]
        return
    # where a value may be null, a null beside a proposal does not say that its key is new
    nulls = any(_may_be_null(state.result, name) for state in loop.states for name in loop.merge)
    met = _met(lowering, loop, proposed, state, place, "drop" if nulls else "null")
    if nulls:
        new = _new_rows(lowering, loop, proposed, state, place)
    else:
        new = _part(lowering, loop, met, NewRows(table.key, tuple(loop.merge)), "new rows", place)
    better = _part(lowering, loop, met, Improved(table.key, _kinds(loop), met=nulls), "better rows", place)
    both = lowering.name_of(loop, "changed rows")
    keeps = tuple((k, k) for k in table.key)
    lowering.emit(place, Local(Concat(keeps), (new, better), both, cut="share", rank_free=True))
    place.scope.writes += [Patch(state.name, better), Insert(state.name, new), Replace(after, both)]


def _kinds(loop: Iterate) -> tuple[tuple[str, str], ...]:
    return tuple((name, aggregator.kind) for name, aggregator in loop.merge.items())


def _may_be_null(node: Node, name: str) -> bool:
    """May a column of its rows be null, for all that is known before they are made?"""
    known = None if node.fields is None else node.fields.get(name)
    return known is None or known.nullable


def _touched(lowering: Lowering, loop: Iterate, state: Made, place: Place) -> Made | None:
    """Proposals as rows of the table that were reached, where an index knows that it has all their keys."""
    node = loop.states[1].result
    fused = lowering.links.fused.get(id(node))
    if not isinstance(node, Group) or fused is None or fused.right is None:
        return None
    if lowering.parents.get(id(node), [loop]) != [loop]:
        return None
    if not _same_columns(loop, node) or not loop.merge:
        return None
    graph = lowering.links.graph_of(fused)
    made = resident(lowering, graph)
    if graph.ends[1] != fused.key or made.tables[fused.key].order is not state.order:
        return None
    joined, names = joined_table(lowering, fused)
    aggregates = {n: renamed_aggregate(a, names) for n, a in fused.aggregates}
    into = lowering.name_of(node, "reached")
    links = visible(lowering, made.links, place)
    by = Joined(lowering.read(joined, place), fused.on)
    told = TOLD if _settles(loop, fused, names) else ""
    how = {"settle": told} if told else {"improves": _improves(loop)}
    stage = Shuffle(links, (fused.key,), into, aggregates, state.name, touched=True, joined=by, **how)
    lowering.emit(place, stage)
    columns = (*loop.states[0].key, *aggregates, *([told] if told else []))
    return lowering.new(into, columns, state.lies, place)


def _improves(loop: Iterate) -> bool:
    """Is it one smallest or largest number, never null, that a row's improves by?"""
    kinds = [kind for _, kind in _kinds(loop)]
    return kinds in (["min"], ["max"]) and not any(_may_be_null(loop.states[0].rows, n) for n in loop.merge)


def _settles(loop: Iterate, fused: Fused, names: Mapping[str, str]) -> bool:
    """Is what comes out in the end the same, whichever row improves first? So where a better value never
    makes a worse one, and nobody counts the iterations.
    """
    if len(loop.merge) != 1 or any(isinstance(rule, MaxIterations) for rule in loop.until.rules):
        return False
    ((column, tree),) = ((name, a.column) for name, a in fused.aggregates)
    known = (loop.states[0].rows.fields or {}).get(column)
    if known is None or known.nullable or known.dtype not in (np.float64, np.int64) or known.shape:
        return False
    if fused.right is not loop.states[1].rows or not isinstance(tree, Expr):
        return False
    read = [new for new in columns_of(tree) if new in fused.columns]
    if len(read) != 1 or fused.columns[read[0]] != column or names[read[0]] != column:
        return False
    fields = {**(fused.edges.fields or {}), read[0]: known}
    made = typed(tree, fields)
    return made is not None and made.dtype == known.dtype and is_monotone(tree, read[0])


def _settled(lowering: Lowering, loop: Iterate, reached: Made, waiting: bool, place: Place) -> str:
    """The rows that improved, or those that have still something to tell."""
    into = lowering.name_of(loop, "untold rows" if waiting else "better rows")
    kernel = Settled(TOLD, loop.states[0].key, waiting)
    lowering.emit(place, Local(kernel, (reached.name,), into, cut="share"))
    return into


def _same_columns(loop: Iterate, node: Group) -> bool:
    """Are the groups what is merged: by the state's key, and folded as its columns improve?"""
    kinds = {name: aggregator.kind for name, aggregator in node.aggregates}
    return node.keys == loop.states[0].key and kinds == dict(_kinds(loop))


def _better(lowering: Lowering, loop: Iterate, reached: Made, state: Made, place: Place) -> str:
    """The reached rows that are better than those of the table."""
    kernel = Improved(loop.states[0].key, _kinds(loop), beside=True)
    into = lowering.name_of(loop, "better rows")
    lowering.emit(place, Local(kernel, (reached.name, state.name), into, cut="share"))
    return into


def _by_key(lowering: Lowering, loop: Iterate, place: Place) -> Made:
    """The proposals with the owners of their keys."""
    changes = loop.states[1]
    made = lowering.made(changes.result)
    return made if made.lies == changes.key else lowering.laid(changes.result, changes.key, place)


def _new_rows(lowering: Lowering, loop: Iterate, proposed: Made, state: Made, place: Place) -> str:
    into = lowering.name_of(loop, "new rows")
    key = loop.states[0].key
    rows = lowering.read(proposed, place)
    lowering.emit(place, Lookup(rows, key, state.name, (), into, missing="only", nulls=True))
    return into


def _met(
    lowering: Lowering,
    loop: Iterate,
    proposed: Made,
    state: Made,
    place: Place,
    missing: Literal["drop", "null"],
) -> str:
    """The proposals under other names, beside what the table has; new keys are dropped, or beside nulls."""
    key = loop.states[0].key
    trees: list[tuple[str, Expr]] = [(k, Column(k)) for k in key]
    trees += [(f"\0{name}", Column(name)) for name in loop.merge]
    flow = Flow(proposed, tuple(n for n, _ in trees), proposed.lies, steps=(Columns(tuple(trees)),))
    renamed = lowering.table(flow, place, loop.states[1].result)
    into = lowering.name_of(loop, "proposed")
    rows, columns = lowering.read(renamed, place), tuple(loop.merge)
    stage = Lookup(rows, key, state.name, columns, into, missing, nulls=True)
    lowering.emit(place, stage)
    return into


def _part(
    lowering: Lowering, loop: Iterate, met: str, kernel: NewRows | Improved, what: str, place: Place
) -> str:
    into = lowering.name_of(loop, what)
    lowering.emit(place, Local(kernel, (met,), into, cut="share", rank_free=True))
    return into
