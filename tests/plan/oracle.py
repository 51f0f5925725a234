"""What a plan means: its nodes, interpreted row by row over lists of dicts, with None for null.

Slow and obvious on purpose: no batch, no kernel, no fact, no lowering. `rows_of` answers for the rows of any
plan whose sources are in memory on one rank; `same_rows` compares them with what the engine made, floats to
1e-12. What has no one answer (rows chosen by a seed, the first rows of rows without an order) is not known
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import Apply, Column, Constant, Expr
from iterreduce.columns.groups import group_rows
from iterreduce.columns.ragged import Ragged
from iterreduce.fixpoint import MaxIterations
from iterreduce.plan import nodes
from iterreduce.plan.nodes import Node, Scalar
from iterreduce.rules import AllUnchanged, Distance, Unchanged

Row = dict[str, Any]
Rows = list[Row]


def rows_of(node: Node, states: Mapping[int, Rows] | None = None) -> Rows:
    """The rows of a node. ``states``: those of the iterations that are under way."""
    return Oracle(states or {}).rows(node)


class Oracle:
    """The rows of nodes while states are as they are."""

    def __init__(self, states: Mapping[int, Rows]):
        self.states = states
        self.known: dict[int, Rows] = {}

    def rows(self, node: Node) -> Rows:
        if id(node) not in self.known:
            self.known[id(node)] = getattr(self, f"_{type(node).__name__.lower()}")(node)
        return self.known[id(node)]

    def value(self, tree: Expr, row: Row) -> Any:
        if isinstance(tree, Column):
            return row[tree.name]
        if isinstance(tree, Constant):
            return plain(tree.value)
        if isinstance(tree, Scalar):
            return self.rows(tree.node)[0][tree.column]
        assert isinstance(tree, Apply), tree
        return operate(tree, [self.value(part, row) for part in tree.arguments])

    # ------------------------------------------------------------------ rows

    def _source(self, node: nodes.Source) -> Rows:
        rows = batch_rows(node.source.rows)
        return rows if node.wanted is None else [{n: row[n] for n in node.wanted} for row in rows]

    def _rows(self, node: nodes.Rows) -> Rows:
        return batch_rows(node.batch)

    def _staterows(self, node: nodes.StateRows) -> Rows:
        return self.states[id(node)]

    def _project(self, node: nodes.Project) -> Rows:
        out = []
        for row in self.rows(node.input):
            made = {name: _typed(self.value(t, row), node.fields, name) for name, t in node.columns}
            out.append({**row, **made} if node.rest else made)
        return out

    def _filter(self, node: nodes.Filter) -> Rows:
        return [row for row in self.rows(node.input) if self.value(node.predicate, row) is True]

    def _mapbatches(self, node: nodes.MapBatches) -> Rows:
        parts = [batch_of(self.rows(part), part) for part in node.rows]
        if node.by:
            return batch_rows(node.function(*(group_rows(part, node.by) for part in parts)))
        return batch_rows(node.function(*parts))

    def _group(self, node: nodes.Group) -> Rows:
        groups: dict[tuple[Any, ...], Rows] = {}
        for row in self.rows(node.input):
            groups.setdefault(tuple(key_value(row[k]) for k in node.keys), []).append(row)
        return [
            {**{k: rows[0][k] for k in node.keys}, **self._aggregates(node, rows)} for rows in groups.values()
        ]

    def _aggregate(self, node: nodes.Aggregate) -> Rows:
        return [self._aggregates(node, self.rows(node.input))]

    def _aggregates(self, node: nodes.Group | nodes.Aggregate, rows: Rows) -> Row:
        out = {}
        for name, aggregator in node.aggregates:
            if aggregator.column is None:
                out[name] = len(rows)
                continue
            tree = aggregator.column
            tree = tree if isinstance(tree, Expr) else Column(tree)
            values = [self.value(tree, row) for row in rows]
            found = AGGREGATES[aggregator.kind]([v for v in values if v is not None])
            out[name] = _typed(found, node.fields, name)
        return out

    def _join(self, node: nodes.Join) -> Rows:
        left, right = self.rows(node.left), self.rows(node.right)
        out, matched = [], set()
        for row in left:
            found = [i for i, other in enumerate(right) if _match(row, other, node.on)]
            matched |= set(found)
            if node.how in ("semi", "anti"):
                out += [row] if bool(found) == (node.how == "semi") else []
                continue
            pairs: list[Row | None] = [right[i] for i in found]
            if not pairs and node.how in ("left", "full"):
                pairs = [None]
            for other in pairs:
                taken = {new: None if other is None else other[old] for new, old in node.taken.items()}
                out.append({**row, **taken})
        if node.how == "full":
            for i, other in enumerate(right):
                if i not in matched:
                    row = dict.fromkeys(node.left.names or ())
                    row |= {a: other[b] for a, b in node.on}
                    out.append({**row, **{new: other[old] for new, old in node.taken.items()}})
        return out

    def _union(self, node: nodes.Union) -> Rows:
        return [row for part in node.rows for row in self.rows(part)]

    def _sort(self, node: nodes.Sort) -> Rows:
        return ordered(self.rows(node.input), node.keys, node.descending)

    def _limit(self, node: nodes.Limit) -> Rows:
        return ordered(self.rows(node.input), node.keys, node.descending)[: node.rows]

    def _repartition(self, node: nodes.Repartition) -> Rows:
        return self.rows(node.input)

    # ------------------------------------------------------------------ iterations

    def _iterate(self, node: nodes.Iterate) -> Rows:
        return self._ended(node)[node.gives]

    def _stateof(self, node: nodes.StateOf) -> Rows:
        return self._ended(node.loop)[node.name]

    def _ended(self, loop: nodes.Iterate) -> dict[str, Rows]:
        now = {s.name: self.rows(s.rows.initial) for s in loop.states}
        most = next((r.n for r in loop.until.rules if isinstance(r, MaxIterations)), 1000)
        for _ in range(most):
            inside = Oracle({**self.states, **{id(s.rows): now[s.name] for s in loop.states}})
            then = {s.name: inside.rows(s.result) for s in loop.states}
            over = any(_holds(rule, now, then, loop) for rule in loop.until.rules)
            now = then
            if over:
                break
        return now


def _holds(rule: Any, now: Mapping[str, Rows], then: Mapping[str, Rows], loop: nodes.Iterate) -> bool:
    if isinstance(rule, MaxIterations):
        return False
    if isinstance(rule, AllUnchanged):
        return all(shown(now[name]) == shown(then[name]) for name in now)
    before, after = now[rule.table], then[rule.table]
    if isinstance(rule, Unchanged):
        return shown(before) == shown(after)
    assert isinstance(rule, Distance), rule
    assert rule.per_row == "l1", rule
    key = next(s.rows.initial.names for s in loop.states if s.name == rule.table)[0]
    old = {row[key]: row for row in before}
    far = sum(abs(old[row[key]][c] - row[c]) for row in after for c in rule.columns)
    return bool(far <= rule.threshold)


def _match(left: Row, right: Row, on: Sequence[tuple[str, str]]) -> bool:
    return all(left[a] is not None and key_value(left[a]) == key_value(right[b]) for a, b in on)


def key_value(value: Any) -> Any:
    """A value as a key: NaN is one, and equals itself."""
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def _typed(value: Any, fields: Any, name: str) -> Any:
    """A value as its column holds it: a whole number in a column of floats is a float."""
    field = None if fields is None else fields.get(name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and field is not None and field.dtype.kind == "f" else value


def is_nan(value: Any) -> bool:
    return value != value


AGGREGATES: dict[str, Callable[[list[Any]], Any]] = {
    "sum": lambda v: (math.fsum(v) if isinstance(v[0], float) else sum(v)) if v else None,
    "min": lambda v: next(filter(is_nan, v), min(v)) if v else None,
    "max": lambda v: next(filter(is_nan, v), max(v)) if v else None,
    "count": len,
    "mean": lambda v: math.fsum(v) / len(v) if v else None,
    "any": lambda v: any(v) if v else None,
    "all": lambda v: all(v) if v else None,
    "var": lambda v: float(np.var(v)) if v else None,
    "collect": list,
}


def ordered(rows: Rows, keys: Sequence[str], descending: Sequence[bool]) -> Rows:
    """The rows in order, NaN and then nulls last either way; stable."""
    out = list(rows)
    for key, down in reversed(list(zip(keys, descending, strict=True))):
        last = [r for r in out if r[key] is not None and is_nan(r[key])] + [r for r in out if r[key] is None]
        some = [r for r in out if r[key] is not None and not is_nan(r[key])]
        out = sorted(some, key=lambda r, k=key: r[k], reverse=down) + last
    return out


# ---------------------------------------------------------------------- values


def operate(tree: Apply, values: list[Any]) -> Any:
    """One operation on Python values; null where an argument is, but for those that know better."""
    name = tree.operation
    if name in LENIENT:
        return LENIENT[name](*values)
    if any(v is None for v in values):
        return None
    if name in ("cast", "is_in"):
        return KNOWN[name](values[0], *([tree.options] if name == "is_in" else tree.options))
    with np.errstate(all="ignore"):
        return plain(KNOWN[name](*values))


def _and(a: Any, b: Any) -> Any:
    if a is False or b is False:
        return False
    return None if a is None or b is None else True


def _or(a: Any, b: Any) -> Any:
    if a is True or b is True:
        return True
    return None if a is None or b is None else False


def _divide(a: Any, b: Any) -> Any:
    return np.float64(a) / np.float64(b)


def _floor(a: Any, b: Any) -> Any:
    return None if b == 0 and not isinstance(a + b, float) else np.floor_divide(a, b)


def _remainder(a: Any, b: Any) -> Any:
    return None if b == 0 and not isinstance(a + b, float) else np.remainder(a, b)


def _cast(value: Any, dtype: str) -> Any:
    if dtype == "text":
        return str(value)
    return float(value) if dtype.startswith("float") else int(value)


LENIENT: dict[str, Callable[..., Any]] = {
    "and": _and,
    "or": _or,
    "is_null": lambda a: a is None,
    "coalesce": lambda *values: next((v for v in values if v is not None), None),
    "where": lambda c, a, b: a if c is True else b,
}
KNOWN: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": _divide,
    "floor_divide": _floor,
    "remainder": _remainder,
    "negative": lambda a: -a,
    "absolute": abs,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "sqrt": np.sqrt,
    "not": lambda a: not a,
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "greater": lambda a, b: a > b,
    "greater_equal": lambda a, b: a >= b,
    "equal": lambda a, b: a == b,
    "not_equal": lambda a, b: a != b,
    "is_in": lambda a, options: True if a in options else None if None in options else False,
    "cast": _cast,
    "str.upper": lambda a: a.upper(),
    "str.length": len,
}


def plain(value: Any) -> Any:
    """A NumPy value as Python's."""
    return value.item() if isinstance(value, np.generic) else value


# ---------------------------------------------------------------------- batches


def batch_rows(batch: Batch) -> Rows:
    """The rows of a batch."""
    columns = {}
    for name in batch.names:
        column, valid = batch[name], batch.valid(name)
        values = column.to_list() if isinstance(column, Ragged) else column.tolist()
        columns[name] = [
            v if valid is None or ok else None
            for v, ok in zip(values, valid if valid is not None else values, strict=True)
        ]
    return [{n: columns[n][i] for n in batch.names} for i in range(len(batch))]


def batch_of(rows: Rows, like: Node | Mapping[str, str], nullable: Sequence[str] = ()) -> Batch:
    """Rows as a batch, with the types of a node's columns, or of ``name -> kind``. ``nullable`` columns have
    a mask even without nulls.
    """
    kinds = like if isinstance(like, Mapping) else {n: _kind(f) for n, f in (like.fields or {}).items()}
    if not kinds and rows:
        kinds = {n: _kind_of([row[n] for row in rows]) for n in rows[0]}
    columns, valid = {}, {}
    for name, kind in kinds.items():
        values = [row[name] for row in rows]
        empty = "" if kind == "text" else 0
        filled = [empty if v is None else v for v in values]
        columns[name] = _texts(filled) if kind == "text" else np.array(filled, kind)
        if name in nullable or any(v is None for v in values):
            valid[name] = np.array([v is not None for v in values], bool)
    return Batch.from_dict(columns, valid)


def _texts(values: list[str]) -> Ragged:
    nothing = Ragged(np.zeros(1, np.int64), np.zeros(0, np.uint8), "text")
    return Ragged.from_list(values) if values else nothing


def _kind(field: Any) -> str:
    return "float64" if field is None else "text" if field.kind == "text" else str(field.dtype)


def _kind_of(values: list[Any]) -> str:
    some = next((v for v in values if v is not None), 0.0)
    return {bool: "bool", int: "int64", float: "float64", str: "text"}[type(some)]


# ---------------------------------------------------------------------- comparing


def shown(rows: Rows) -> list[str]:
    """Rows as texts in an order of their own, floats to 9 digits: to bring the same rows together."""
    return sorted(_text(row.values()) for row in rows)


def _text(values: Any) -> str:
    return repr([_rounded(v) for v in values])


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(map(repr, map(_rounded, value)))
    return float(f"{value + 0.0:.9e}") if isinstance(value, float) else value


def same_rows(got: Rows, wanted: Rows, in_order: bool = False) -> None:
    """Are these the same rows with the same columns in order? Floats to 1e-12."""
    if not in_order:
        got, wanted = (sorted(rows, key=lambda row: _text(row.values())) for rows in (got, wanted))
    assert len(got) == len(wanted), (len(got), len(wanted), got[:9], wanted[:9])
    for a, b in zip(got, wanted, strict=True):
        assert list(a) == list(b), (list(a), list(b))
        for name in a:
            assert same_value(a[name], b[name]), (name, a, b)


def same_value(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, float) and isinstance(b, float):
        return (a != a and b != b) or math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)
    return type(a) is type(b) and bool(a == b)
