"""Plans as SQL: every node one view of a SQLite database, and its rows what SQLite says.

An oracle by another road than `tests.plan.oracle`: nulls, groups, joins and aggregates are those of a
database. Of expressions it knows what can be said of numbers and text in SQL; NaN it does not know.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from iterreduce.columns.expressions import Apply, Column, Constant, Expr
from iterreduce.plan import nodes
from iterreduce.plan.nodes import Node, Scalar, walk
from tests.plan.oracle import Rows, batch_rows

AGGREGATES = {"sum": "sum", "min": "min", "max": "max", "count": "count", "mean": "avg"}
SIGNS = {
    "add": "+", "subtract": "-", "multiply": "*", "less": "<", "less_equal": "<=", "greater": ">",
    "greater_equal": ">=", "equal": "=", "not_equal": "<>", "and": "AND", "or": "OR",
}  # fmt: skip


def rows_of(root: Node) -> Rows:
    """The rows of a plan, as SQLite makes them."""
    database = sqlite3.connect(":memory:")
    names: dict[int, str] = {}
    for i, node in enumerate(walk(root)):
        name = names[id(node)] = f"n{i}"
        if isinstance(node, nodes.Source | nodes.Rows):
            _fill(database, name, node)
        else:
            database.execute(f"CREATE TABLE {name} AS {View(names).sql(node)}")
    found = database.execute(f"SELECT * FROM {names[id(root)]}")
    columns = [column[0] for column in found.description]
    return [dict(zip(columns, row, strict=True)) for row in found]


def _fill(database: sqlite3.Connection, name: str, node: nodes.Source | nodes.Rows) -> None:
    batch = node.source.rows if isinstance(node, nodes.Source) else node.batch
    rows = batch_rows(batch)
    database.execute(f"CREATE TABLE {name} ({', '.join(map(quoted, batch.names))})")
    marks = ", ".join("?" * len(batch.names))
    database.executemany(f"INSERT INTO {name} VALUES ({marks})", [tuple(row.values()) for row in rows])


def quoted(name: str) -> str:
    """A name in SQL; the mark of names that no user gives as one that SQL takes."""
    return '"' + name.replace("\0", "°").replace('"', '""') + '"'


class View:
    """Nodes as SELECT statements over the tables of their inputs."""

    def __init__(self, names: dict[int, str]):
        self.names = names

    def sql(self, node: Node) -> str:
        return str(getattr(self, f"_{type(node).__name__.lower()}")(node))

    def of(self, node: Node) -> str:
        return self.names[id(node)]

    def _project(self, node: nodes.Project) -> str:
        assert not node.rest
        return f"SELECT {self._listed(node.columns)} FROM {self.of(node.input)}"

    def _listed(self, columns: Any) -> str:
        return ", ".join(f"{self.tree(tree)} AS {quoted(name)}" for name, tree in columns)

    def _filter(self, node: nodes.Filter) -> str:
        return f"SELECT * FROM {self.of(node.input)} WHERE {self.tree(node.predicate)}"

    def _group(self, node: nodes.Group) -> str:
        keys = ", ".join(map(quoted, node.keys))
        aggregates = "".join(f", {self._folded(n, a)}" for n, a in node.aggregates)
        return f"SELECT {keys}{aggregates} FROM {self.of(node.input)} GROUP BY {keys}"

    def _aggregate(self, node: nodes.Aggregate) -> str:
        aggregates = ", ".join(self._folded(n, a) for n, a in node.aggregates)
        return f"SELECT {aggregates} FROM {self.of(node.input)}"

    def _folded(self, name: str, aggregator: Any) -> str:
        column = aggregator.column
        tree = "*" if column is None else self.tree(column if isinstance(column, Expr) else Column(column))
        return f"{AGGREGATES[aggregator.kind]}({tree}) AS {quoted(name)}"

    def _join(self, node: nodes.Join) -> str:
        left, right = self.of(node.left), self.of(node.right)
        on = " AND ".join(f"l.{quoted(a)} = r.{quoted(b)}" for a, b in node.on)
        if node.how in ("semi", "anti"):
            word = "EXISTS" if node.how == "semi" else "NOT EXISTS"
            return f"SELECT * FROM {left} l WHERE {word} (SELECT 1 FROM {right} r WHERE {on})"
        word = {"inner": "JOIN", "left": "LEFT JOIN", "full": "FULL JOIN"}[node.how]
        keys = dict(node.on) if node.how == "full" else {}
        columns = [
            f"coalesce(l.{quoted(n)}, r.{quoted(keys[n])}) AS {quoted(n)}" if n in keys else f"l.{quoted(n)}"
            for n in node.left.names or ()
        ]
        columns += [f"r.{quoted(old)} AS {quoted(new)}" for new, old in node.taken.items()]
        return f"SELECT {', '.join(columns)} FROM {left} l {word} {right} r ON {on}"

    def _union(self, node: nodes.Union) -> str:
        columns = ", ".join(map(quoted, node.rows[0].names or ()))
        return " UNION ALL ".join(f"SELECT {columns} FROM {self.of(part)}" for part in node.rows)

    def _sort(self, node: nodes.Sort) -> str:
        return f"SELECT * FROM {self.of(node.input)} ORDER BY {_order(node)}"

    def _limit(self, node: nodes.Limit) -> str:
        return f"SELECT * FROM {self.of(node.input)} ORDER BY {_order(node)} LIMIT {node.rows}"

    def _repartition(self, node: nodes.Repartition) -> str:
        return f"SELECT * FROM {self.of(node.input)}"

    # ------------------------------------------------------------------ expressions

    def tree(self, tree: Expr) -> str:
        if isinstance(tree, Column):
            return quoted(tree.name)
        if isinstance(tree, Constant):
            return literal(tree.value)
        if isinstance(tree, Scalar):
            return f"(SELECT {quoted(tree.column)} FROM {self.of(tree.node)})"
        assert isinstance(tree, Apply), tree
        parts = [self.tree(part) for part in tree.arguments]
        if tree.operation in SIGNS:
            return f"({parts[0]} {SIGNS[tree.operation]} {parts[1]})"
        return FUNCTIONS[tree.operation](tree, *parts)


def _order(node: nodes.Sort | nodes.Limit) -> str:
    order = zip(node.keys, node.descending, strict=True)
    return ", ".join(f"{quoted(k)} {'DESC' if d else 'ASC'} NULLS LAST" for k, d in order)


def literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(int(value)) if isinstance(value, bool) else repr(getattr(value, "item", lambda: value)())


def _remainder(a: str, b: str) -> str:
    return f"((({a}) % ({b})) + ({b})) % ({b})"


FUNCTIONS: dict[str, Any] = {
    "negative": lambda tree, a: f"(-{a})",
    "absolute": lambda tree, a: f"abs({a})",
    "not": lambda tree, a: f"(NOT {a})",
    "is_null": lambda tree, a: f"({a} IS NULL)",
    "divide": lambda tree, a, b: f"(CAST({a} AS REAL) / {b})",
    "remainder": lambda tree, a, b: f"({_remainder(a, b)})",
    "floor_divide": lambda tree, a, b: f"((({a}) - ({_remainder(a, b)})) / ({b}))",
    "coalesce": lambda tree, *parts: f"coalesce({', '.join(parts)})",
    "where": lambda tree, c, a, b: f"(CASE WHEN {c} THEN {a} ELSE {b} END)",
    "minimum": lambda tree, a, b: f"min({a}, {b})",
    "maximum": lambda tree, a, b: f"max({a}, {b})",
    "is_in": lambda tree, a: f"({a} IN ({', '.join(map(literal, tree.options))}))",
}
