"""Groups of joined rows as shuffles of indexed rows: what a graph's messages become.

A group of a join of invariant rows with a table by unique key, such as

    links.join(ranks, src="page").group_by(page="dst").agg(heard=ir.sum(ir.col("rank") / ir.col("degree")))

needs no joined rows. The invariant rows become an `Index` once (a word each, and their own numbers), and each
iteration is one `Shuffle` of values: no key is hashed, joined or sent. Here is decided which groups of a plan
that holds for, and which index serves several of them. The distinct values of both ends of such rows are the
index's own table of keys.

Nothing is lowered here but these groups; who asks is `iterreduce.plan.grouping`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from iterreduce.columns.aggregators import Aggregator, count
from iterreduce.columns.compute import typed
from iterreduce.columns.expressions import Column, Expr, key_of
from iterreduce.columns.linkfold import SCALAR
from iterreduce.columns.schema import Field
from iterreduce.columns.trees import columns_of, parameters_of, renamed, substitute
from iterreduce.columns.trees import walk as parts_of
from iterreduce.errors import UsageError
from iterreduce.plan.facts import Facts
from iterreduce.plan.nodes import Filter, Group, Join, Node, Project, Source, Union, walk

KINDS = frozenset(("sum", "count", "min", "max", "any", "all", "mean"))
ADDED = frozenset(
    ("sum", "count", "any", "all")
)  # to which a row that is not there adds what changes nothing
MOST_VALUES = 3  # of one output: columns of the rows, and values of the joined table
KEY_KINDS = "iu"  # of numbers that may be keys of an index


@dataclass(frozen=True, eq=False)
class Fused:
    """A group that a shuffle of indexed rows can make.

    ``edges``: the invariant rows; ``on``: their column that is joined, ``key``: the one that is grouped by.
    ``right``: the table joined with them, by ``right_key``; None: aggregates of the rows alone.
    ``aggregates``: in columns of the rows, and of the table under the names of ``columns``.
    """

    group: Group
    edges: Node
    on: str
    key: str
    aggregates: tuple[tuple[str, Aggregator], ...]
    right: Node | None = None
    right_key: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    twins: Twins | None = None  # every row counts both ways round


@dataclass(frozen=True, eq=False)
class Twins:
    """Rows and the same the other way round, as ``rows``; ``ends``: their columns in those of the rows."""

    rows: Node
    ends: Mapping[str, str]


@dataclass(eq=False)
class Graph:
    """Rows that are indexed by two of their columns, and what they serve.

    ``one_table``: both ends name keys of one table, which has those in column ``key`` of ``also`` as well.
    """

    edges: Node
    ends: tuple[str, str]
    one_table: bool = False
    key: str = ""
    also: Node | None = None
    twins: Twins | None = None
    made: Any = None

    @property
    def symmetric(self) -> bool:
        """Does every row count both ways round?"""
        return self.twins is not None


class Links:
    """The indexed rows of one plan, found before it is lowered."""

    def __init__(self, roots: Iterable[Node], facts: Facts):
        self.facts = facts
        self.fused: dict[int, Fused] = {}
        self.vertices: dict[int, tuple[Graph, str]] = {}  # distinct values of ends -> the column
        self.graphs: list[Graph] = []
        self.why_not: dict[int, str] = {}  # of groups of joined rows that change
        nodes = list(walk(*roots))
        for node in nodes:
            if isinstance(node, Group):
                self._join_of(node)
        for node in nodes:
            if isinstance(node, Group) and id(node) not in self.fused:
                self._of_ends(node)
        for graph in self.graphs:
            if graph.symmetric and not graph.one_table:
                graph.one_table, graph.key = True, graph.ends[0]
        for node in nodes:
            if id(node) in self.fused and not self._can_pull(self.fused[id(node)]):
                del self.fused[id(node)]
                self.why_not[id(node)] = "it asks for values of keys that the table may not have"

    def _can_pull(self, fused: Fused) -> bool:
        """Where rows lie with the key that they are grouped by, they ask for a value of every key of the
        other end: has the table them all, or does it say which it has not?
        """
        graph = self.graph_of(fused)
        if fused.right is None or graph.symmetric or graph.ends[0] != fused.key:
            return True
        root = self.facts.identity(fused.right)
        found = self.vertices.get(id(root))
        if found is not None:
            return found[0] is graph
        inner = self.fused.get(id(root))
        if inner is None or self.graph_of(inner) is not graph or inner.key != fused.on:
            return False
        return all(aggregator.kind in ADDED for _, aggregator in fused.aggregates)

    def graph_of(self, fused: Fused) -> Graph:
        """The indexed rows of a group."""
        return next(
            g
            for g in self.graphs
            if self._same(g.edges, fused.edges)
            and fused.key in g.ends
            and g.symmetric == (fused.twins is not None)
        )

    # ------------------------------------------------------------------ which groups

    def _join_of(self, group: Group) -> None:
        """Is it a group of indexed rows joined with a table?"""
        try:
            found = match_join(group, self.facts)
        except NotIndexed as why:
            self.why_not[id(group)] = str(why)
            return
        if self._graph(found) is None:
            self.why_not[id(group)] = "the rows are indexed by other columns"
        else:
            self.fused[id(group)] = found

    def _of_ends(self, group: Group) -> None:
        """Groups of rows that are indexed anyway: their keys alone, or aggregates of the rows by one end."""
        if not group.aggregates and self._both_ends(group):
            return
        try:
            found = match_rows(group)
        except NotIndexed:
            return
        for graph in self.graphs:
            if graph.symmetric:
                continue
            if self._same(graph.edges, found.edges) and found.key in graph.ends:
                other = graph.ends[1 - graph.ends.index(found.key)]
                self.fused[id(group)] = replace(found, on=other)
                return

    def _both_ends(self, group: Group) -> bool:
        """The distinct values of both ends together: the vertices of a graph; perhaps with others."""
        if len(group.keys) != 1 or not isinstance(group.input, Union) or self.facts.varies(group):
            return False
        (key,) = group.keys
        for graph in self.graphs:
            ends = {end: part for part in group.input.rows if (end := self._end_of(part, key, graph))}
            others = [part for part in group.input.rows if not any(part is end for end in ends.values())]
            also = others[0] if others else None
            if graph.one_table and graph.also is not also:
                continue
            if set(ends) == set(graph.ends) and len(others) <= 1:
                graph.one_table, graph.key, graph.also = True, key, also
                self.vertices[id(group)] = graph, key
                return True
        return False

    def _end_of(self, part: Node, key: str, graph: Graph) -> str:
        """Which end of a graph's rows these rows are, one for one; none: empty."""
        node, column = self.facts.origin(part, key)
        if self.facts.identity(part) is not node:
            return ""
        if graph.twins is not None and graph.twins.rows is node:
            return graph.twins.ends.get(column, "")
        return column if self._same(graph.edges, node) and column in graph.ends else ""

    def _graph(self, found: Fused) -> Graph | None:
        ends = found.on, found.key
        for graph in self.graphs:
            if self._same(graph.edges, found.edges) and graph.symmetric == (found.twins is not None):
                if set(graph.ends) == set(ends):
                    return graph
                return None  # the same rows by other ends: rows would be kept twice
        made = Graph(found.edges, ends, twins=found.twins)
        self.graphs.append(made)
        return made

    @staticmethod
    def _same(a: Node, b: Node) -> bool:
        return a is b or (isinstance(a, Source) and isinstance(b, Source) and a.source is b.source
                          and a.bounds == b.bounds)  # fmt: skip


class NotIndexed(Exception):
    """Why a group is no shuffle of indexed rows; without a text: it is not of joined rows that change."""


def match_join(group: Group, facts: Facts) -> Fused:
    """The group as a shuffle of indexed rows joined with a table; raises `NotIndexed` if it is none."""
    join = _join_below(group, facts)
    trees = _needed(group)
    node, trees = _down(group.input, trees)
    if node is not join:
        raise NotIndexed("rows are filtered behind the join; a filter before it would do")
    if join.how != "inner":
        raise NotIndexed(f"the join is a {join.how} join, not an inner one")
    if len(join.on) != 1:
        raise NotIndexed("the join is by several columns")
    return _of_sides(group, join, trees, facts)


def _join_below(group: Group, facts: Facts) -> Join:
    node: Node = group.input
    while isinstance(node, Project | Filter):
        node = node.input
    if not isinstance(node, Join) or not group.aggregates or not facts.varies(node):
        raise NotIndexed
    return node


def _of_sides(group: Group, join: Join, trees: dict[str, Expr], facts: Facts) -> Fused:
    (on, by), edges, table = join.on[0], join.left, join.right
    if facts.varies(edges):
        if facts.varies(table):
            raise NotIndexed("both sides of the join change")
        edges, table, on, by = table, edges, by, on
    if not facts.is_unique(table, (by,)):
        raise NotIndexed(
            f'the side that changes is not known to have each "{by}" once; make it by a group_by, or say '
            "key=... where the iteration is made"
        )
    of_table, of_edges = _columns_of_sides(join, edges is join.left)
    hidden = {name: f"\0{name}" for name in of_table}
    mixed = {n: renamed(t, {**hidden, **of_edges}) for n, t in trees.items()}
    root, mixed = _down(edges, {**mixed, "\0on": Column(on)}, frozenset(hidden.values()))
    named, by_name = f'its key "{group.keys[0]}"', f'the key "{on}" of the join'
    key, joined = _as_key(mixed.pop("\0key"), named), _as_key(mixed.pop("\0on"), by_name)
    if key.name in hidden.values():
        raise NotIndexed(f"{named} is not a column of the rows that stay")
    if key.name == joined.name:
        raise NotIndexed("it groups by the column that is joined")
    turned = both_ways(root, key.name, joined.name) if is_extreme(group) else None
    twins = None
    if turned is not None:
        union, (root, made) = root, turned
        made |= {name: Column(name) for name in hidden.values()}
        mixed = {name: substitute(tree, made) for name, tree in mixed.items()}
        ends = {end.name: _as_key(made[end.name], named) for end in (key, joined)}
        twins = Twins(union, {name: column.name for name, column in ends.items()})
        key, joined = ends.values()
    for column, what in ((key, named), (joined, by_name)):
        if why := _no_key(root, column.name):
            raise NotIndexed(f"{what} {why}")
    aggregates = _aggregates(group, mixed, _fields(root, table, hidden, of_table))
    columns = {new: of_table[name] for name, new in hidden.items()}
    return Fused(group, root, joined.name, key.name, aggregates, table, by, columns, twins)


def _as_key(tree: Expr, what: str) -> Column:
    if not isinstance(tree, Column):
        raise NotIndexed(f"{what} is computed")
    return tree


def is_extreme(group: Group) -> bool:
    """Does it make no difference to count a row twice? (A loop counts once, where rows count both ways.)"""
    return all(a.kind in ("min", "max", "any", "all") for _, a in group.aggregates)


def both_ways(node: Node, one: str, other: str) -> tuple[Node, dict[str, Expr]] | None:
    """Rows and their twins with two columns exchanged: the rows, and the columns in theirs; None: others."""
    if not isinstance(node, Union) or len(node.rows) != 2 or node.names is None:
        return None
    (first, trees), (second, turned) = (_seen_through(part) for part in node.rows)
    if first is not second or not all(isinstance(trees.get(end), Column) for end in (one, other)):
        return None
    wanted = {**trees, one: trees[other], other: trees[one]}
    same = all(key_of(turned[name]) == key_of(wanted[name]) for name in node.names)
    return (first, trees) if same else None


def _seen_through(node: Node) -> tuple[Node, dict[str, Expr]]:
    """The rows below a projection, and its columns in theirs."""
    if isinstance(node, Project) and not node.rest:
        return node.input, dict(node.columns)
    return node, {name: Column(name) for name in node.names or ()}


def match_rows(group: Group) -> Fused:
    """The group as a shuffle of indexed rows alone, if they are indexed; raises `NotIndexed`."""
    root, trees = _down(group.input, _needed(group))
    key = _as_key(trees.pop("\0key"), "its key")
    if root.fields is None:
        raise NotIndexed
    return Fused(group, root, "", key.name, _aggregates(group, trees, dict(root.fields)))


def _needed(group: Group) -> dict[str, Expr]:
    """What the aggregates fold, by output, and the key; raises `NotIndexed` where that cannot be."""
    if len(group.keys) != 1:
        raise NotIndexed("it has several keys")
    if not group.aggregates:
        raise NotIndexed
    out: dict[str, Expr] = {"\0key": Column(group.keys[0])}
    for name, aggregator in group.aggregates:
        if aggregator.kind not in KINDS or aggregator.definition is not None:
            raise NotIndexed(f'"{name}" is {aggregator.kind}, which indexed rows cannot fold')
        column = aggregator.column
        if column is not None:
            out[name] = column if isinstance(column, Expr) else Column(column)
    return out


def _down(
    node: Node, trees: Mapping[str, Expr], aside: frozenset[str] = frozenset()
) -> tuple[Node, dict[str, Expr]]:
    """Through projections: the node below, and the same values in its columns; ``aside``: other columns."""
    out = dict(trees)
    while isinstance(node, Project):
        made: dict[str, Expr] = dict(node.columns)
        made |= {name: Column(name) for name in aside}
        out = {name: substitute(tree, made) for name, tree in out.items()}
        node = node.input
    return node, out


def _columns_of_sides(join: Join, edges_left: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Columns of the join that are the table's, and those that are the rows' under another name."""
    right = dict(join.taken)
    if edges_left:
        return right, {}
    # the table stands left: its key has the value of the rows' key
    table = {name: name for name in join.left.names or () if name not in join.left_keys}
    return table, {join.left_keys[0]: join.right_keys[0], **right}


def _fields(
    root: Node, table: Node, hidden: Mapping[str, str], of_table: Mapping[str, str]
) -> dict[str, Field | None]:
    out: dict[str, Field | None] = dict(root.fields or {})
    for name, new in hidden.items():
        out[new] = None if table.fields is None else table.fields[of_table[name]]
    return out


def of_edges(node: Node) -> bool:
    """Are these edges of a source: ids and perhaps weights, none of them null, whatever their types?"""
    return bool(getattr(getattr(node, "source", None), "of_edges", False))


def _aggregates(
    group: Group, trees: Mapping[str, Expr], fields: Mapping[str, Field | None]
) -> tuple[tuple[str, Aggregator], ...]:
    """The aggregates of these values; raises `NotIndexed` unless each is a number that is never null."""
    out: list[tuple[str, Aggregator]] = []
    for name, aggregator in group.aggregates:
        if aggregator.column is None:
            out.append((name, count()))
            continue
        tree = trees[name]
        if why := _no_number(tree, fields):
            raise NotIndexed(f'"{name}" {why}')
        if aggregator.kind == "count":
            out.append((name, count()))
        elif aggregator.kind == "mean":
            out += [(f"\0sum {name}", Aggregator("sum", tree)), (f"\0count {name}", count())]
        else:
            out.append((name, aggregator.of(tree)))
    return tuple(out)


def _no_number(tree: Expr, fields: Mapping[str, Field | None]) -> str:
    """Why it is not surely a number without nulls, of operations that the kernels know; empty: it is one."""
    if parameters_of(tree):
        return "uses a number of other rows; multiply the result by it instead"
    if len(columns_of(tree)) > MOST_VALUES:
        return f"is of more than {MOST_VALUES} columns; compute some of it before the join"
    operations = (getattr(part, "operation", None) for part in parts_of(tree))
    strange = next((o for o in operations if o is not None and o not in SCALAR), None)
    if strange is not None:
        return f"uses {strange}, which indexed rows cannot compute; compute it before the join"
    try:
        found = typed(tree, fields)
    except UsageError:
        found = None
    if found is None:
        return "is of values whose type is not known before it runs; cast them"
    if found.nullable:
        return "is of values that may be null; fill_null(0) before the join"
    small = found.dtype.kind in "bif" or (found.dtype.kind == "u" and found.dtype.itemsize < 8)
    if found.kind != "fixed" or found.shape or not small:
        return f"is of {found.describe()}; wanted numbers of up to 64 bits"
    return ""


def _no_key(root: Node, name: str) -> str:
    """Why the column cannot number the rows of an index; empty: it can. Ids of edges are numbers or text."""
    if root.fields is None or name not in root.fields:
        return "is of a type that is not known before it runs; cast it"
    of = root.fields[name]
    if of is None:
        return "" if of_edges(root) else "is of a type that is not known before it runs; cast it"
    return "" if can_be_key(of) else f"is {of.describe()}; wanted whole numbers or text without nulls"


def can_be_key(of: Field) -> bool:
    """Can values of this type number the rows of an index: whole numbers or text, without nulls?"""
    if of.nullable or of.shape:
        return False
    return of.kind in ("text", "bytes") or (of.kind == "fixed" and of.dtype.kind in KEY_KINDS)
