"""What a plan's sources hold, agreed by all ranks before the plan is lowered: types and sizes.

What a header tells is looked at by each rank alone, and a rank's own rows may have nulls where another's have
none; but plans must be the same on all ranks. So ranks compare what they see, sources that no header tells
enough of are opened, and the plan is typed anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from iterreduce.columns.schema import Field
from iterreduce.columns.trees import parameters_of, with_parameters
from iterreduce.group import Group as Ranks
from iterreduce.plan import making
from iterreduce.plan.facts import takes_nothing
from iterreduce.plan.nodes import (
    Aggregate,
    Fields,
    Filter,
    Group,
    Iterate,
    Join,
    Limit,
    MapBatches,
    Node,
    Project,
    Repartition,
    Rows,
    Sample,
    Sort,
    Source,
    StateOf,
    StateRows,
    Union,
    walk,
)
from iterreduce.plan.rules import Applied, Rewriter
from iterreduce.sources import LocalSource

EMPTY: Mapping[int, frozenset[str]] = {}
WEIGHT = Field("fixed", np.dtype(np.float64))  # of edges whose weights are not looked at yet: some number


def known(root: Node, ranks: Ranks) -> tuple[Node, dict[int, int]]:
    """The plan with the types that its sources really have, and the rows of sources by id. Collective.

    Raises the same error on all ranks where a source cannot be opened.
    """
    sources = list({id(n.source): n.source for n in walk(root) if isinstance(n, Source)}.values())
    if not sources:
        return Typing({}).plan(root), {}
    fields = _agreed(ranks, [peeked(source) for source in sources])
    for i, source in enumerate(sources):
        if not _enough(source, fields[i]):
            source.open(ranks)
            fields[i] = dict(source.schema)
    rows = _sizes(ranks, sources)
    by_source = {id(source): of for source, of in zip(sources, fields, strict=True)}
    return Typing(by_source).plan(root), {
        id(source): int(n) for source, n in zip(sources, rows, strict=True) if n >= 0
    }


def peeked(source: Any) -> Fields | None:
    """What this rank knows of a source's columns without opening it."""
    found = source.peek() if hasattr(source, "peek") else getattr(source, "schema", None)
    return None if found is None else dict(found)


def _enough(source: Any, fields: Fields | None) -> bool:
    """Are types known as far as plans ask? Of edges it is enough that they are edges."""
    if fields is None:
        return False
    return getattr(source, "of_edges", False) or all(field is not None for field in fields.values())


def _agreed(ranks: Ranks, seen: Sequence[Fields | None]) -> list[Fields | None]:
    """What all ranks see alike of each source; a column is nullable where any rank's is. Collective."""
    told = [json.loads(raw) for raw in ranks.allgather_bytes(json.dumps([_packed(f) for f in seen]).encode())]
    return [_common([rank[i] for rank in told]) for i in range(len(seen))]


def _packed(fields: Fields | None) -> Any:
    if fields is None:
        return None
    return [[n, f and [f.kind, f.dtype.str, list(f.shape), f.nullable]] for n, f in fields.items()]


def _common(seen: Sequence[Any]) -> Fields | None:
    first = seen[0]
    if any(one is None for one in seen) or any([n for n, _ in one] != [n for n, _ in first] for one in seen):
        return None
    out: dict[str, Field | None] = {}
    for i, (name, _) in enumerate(first):
        fields = [one[i][1] for one in seen]
        if any(f is None for f in fields) or any(f[:3] != fields[0][:3] for f in fields):
            out[name] = None
        else:
            kind, dtype, shape, _ = fields[0]
            out[name] = Field(kind, np.dtype(dtype), tuple(shape), any(f[3] for f in fields))
    return out


def _sizes(ranks: Ranks, sources: Sequence[Any]) -> Any:
    """The rows of each source over all ranks, int64; -1: not known. Collective."""
    rows = np.zeros(len(sources), np.int64)
    for i, source in enumerate(sources):
        if isinstance(source, LocalSource):
            rows[i] = len(source.rows)
        elif ranks.rank == 0:
            hint = source.rows_hint() if hasattr(source, "rows_hint") else None
            rows[i] = -1 if hint is None else hint
    ranks.allreduce(rows, "sum")
    return rows


# ---------------------------------------------------------------------- types


class Typing(Rewriter):
    """A plan with other types of its sources."""

    def __init__(self, fields: Mapping[int, Fields | None], null: Mapping[int, frozenset[str]] = EMPTY):
        """``null``: of the rows of a state, by id, the columns that a step may make null."""
        super().__init__((), None, Applied())
        self.fields, self.null = fields, null

    def plan(self, root: Node) -> Node:
        """The plan with the types that follow: a state's column may be null if that of any iteration may."""
        nodes = list(walk(root))
        for node in nodes:
            self._again(node)
        found = [self._widening(node) for node in nodes if isinstance(node, Iterate)]
        if not any(found):
            return self.made[id(root)]
        null = dict(self.null)
        for rows, names in (item for loop in found for item in loop.items()):
            null[rows] = null.get(rows, frozenset()) | names
        return Typing(self.fields, null).plan(root)

    def _again(self, node: Node) -> None:
        if isinstance(node, StateRows):
            initial = self.made.get(id(node.initial), node.initial)
            fields = self._widened(initial.fields, node)
            self.made[id(node)] = replace(node, initial=initial, fields=fields)
        elif isinstance(node, Iterate):
            self.made[id(node)] = self.with_own_states(node)
        elif isinstance(node, StateOf):
            self.made[id(node)] = self._of_state(node)
        else:
            self.made[id(node)] = self._typed(self.rebuilt(node))

    def _of_state(self, node: StateOf) -> Node:
        rows = next(state.rows for state in node.loop.states if state.name == node.name)
        made = self.made.get(id(rows))
        return self.rebuilt(node) if made is None else replace(self.rebuilt(node), fields=made.fields)

    def _widened(self, fields: Fields | None, rows: Node) -> Fields | None:
        null = self.null.get(id(rows), frozenset())
        return fields and {n: making.nullable(f) if n in null else f for n, f in fields.items()}

    def _widening(self, loop: Iterate) -> dict[int, frozenset[str]]:
        """The columns of states that are not null so far, and may be in what the step returns."""
        out: dict[int, frozenset[str]] = {}
        for state in loop.states:
            of = getattr(self.made.get(id(state.rows)), "fields", None) or {}
            results = [self.made[id(s.result)] for s in (loop.states if loop.delta else [state])]
            sure = [n for n, f in of.items() if f is not None and not f.nullable]
            null = frozenset(n for n in sure if any(_may_be_null(r, n) for r in results))
            if null:
                out[id(state.rows)] = null
        return out

    def _typed(self, node: Node) -> Node:
        if isinstance(node, Source):
            found = self.fields.get(id(node.source))
            return node if found is None else replace(node, fields=_weighed(node, found))
        made = fields_after(node)
        return node if made is None else replace(node, fields=made)


def _may_be_null(node: Node, name: str) -> bool:
    """May what a step returns have a null there? Of types that are not known it may.

    Numbers are taken to have a value (but in `proven_only`): one of no rows, which is null, is not looked
    for here, as most sums of a body would be.
    """
    if isinstance(node, Project) and name in node.passed:
        return _may_be_null(node.input, node.passed[name])
    tree = dict(node.columns).get(name) if isinstance(node, Project) else None
    if isinstance(node, Project) and tree is not None and node.input.fields is not None:
        numbers = {p.name: _surely(p) for p in parameters_of(tree)}
        of = making.field_of_tree(with_parameters(tree, numbers), node.input.fields, node.label)
        return of is None or of.nullable
    of = None if node.fields is None else node.fields.get(name)
    return of is None or of.nullable


def _surely(number: Any) -> Any:
    return (
        number
        if number.field is None or takes_nothing()
        else replace(number, field=replace(number.field, nullable=False))
    )


def _weighed(node: Source, fields: Fields) -> Fields:
    if not getattr(node.source, "of_edges", False):
        return fields
    return {n: f or (WEIGHT if n == "weight" else None) for n, f in fields.items()}


def fields_after(node: Node) -> Fields | None:
    """The types of what an operation makes of its inputs' columns; None: as it was, or not known."""
    if isinstance(node, Project) and node.input.fields is not None and not node.rest:
        return {n: making.field_of_tree(t, node.input.fields, node.label) for n, t in node.columns}
    if isinstance(node, Filter | Sort | Limit | Sample | Repartition):
        return node.input.fields
    if isinstance(node, Group) and node.input.fields is not None:
        made = making.aggregate_fields(node.input, dict(node.aggregates), node.label)
        return {**{k: node.input.fields[k] for k in node.keys}, **made}
    if isinstance(node, Aggregate) and node.input.fields is not None:
        named = dict(node.aggregates)
        return making.of_all_rows(making.aggregate_fields(node.input, named, node.label), named)
    if isinstance(node, Join):
        return making.join_fields(node)
    if isinstance(node, Union):
        return making.union_fields(node.rows)
    if isinstance(node, MapBatches) and node.keeps and node.fields is not None:
        before = node.rows[0].fields or {}
        return {n: before.get(n) if n in node.keeps else of for n, of in node.fields.items()}
    if isinstance(node, Iterate | StateOf):
        return node.fields
    return None


def rows_of(node: Node, sources: Mapping[int, int]) -> int | None:
    """At most how many rows a node has, where that follows from the rows of sources."""
    if isinstance(node, Source):
        return sources.get(id(node.source))
    if isinstance(node, Rows):
        return len(node.batch)
    if isinstance(node, Limit):
        return node.rows
    if isinstance(node, Sample):
        return node.k
    if isinstance(node, Aggregate):
        return 1
    if isinstance(node, Project | Filter | Sort | Repartition | Group):
        return rows_of(node.input, sources)
    if isinstance(node, Join) and node.how in ("semi", "anti"):
        return rows_of(node.left, sources)
    if isinstance(node, MapBatches) and node.keeps:
        return rows_of(node.rows[0], sources)
    if isinstance(node, Union):
        parts = [rows_of(part, sources) for part in node.rows]
        return None if any(part is None for part in parts) else sum(part or 0 for part in parts)
    return None
