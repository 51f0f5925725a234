"""Rewrites of plans: a table of (name, pattern, rewrite), tried from the leaves up until nothing changes.

A rewrite takes a node that its pattern fits, whose inputs are rewritten already, and returns a node with the
same rows and columns, or None. Rules change what is asked for; where and when it is made is lowering's.

    fold constants         expressions, and filters that are always true
    merge                  projections of projections, filters of filters, distinct rows of distinct rows
    push filters down      below projections, joins, groups, unions and sorts, into readers
    outer to inner         a join whose padded rows the next filter drops
    dependent columns      what depends on a join key alone moves beside the table of that key
    move below             totals before groups, invariant columns below joins (`below`)

Equal parts are made once (`sharing`) before, columns that nobody reads are pruned (`pruning`) behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from iterreduce.columns.expressions import Apply, Column, Constant, Expr, apply, expression
from iterreduce.columns.simplify import fold_constants, null_on_null
from iterreduce.columns.trees import columns_of, renamed, substitute, with_parameters
from iterreduce.columns.trees import walk as parts_of
from iterreduce.plan import making
from iterreduce.plan.below import invariant_columns, table_to_the_right, total_of_groups
from iterreduce.plan.facts import Facts
from iterreduce.plan.nodes import (
    Aggregate,
    Fields,
    Filter,
    Group,
    Iterate,
    Join,
    Node,
    Project,
    Scalar,
    Sort,
    Source,
    StateOf,
    StateRows,
    Union,
    walk,
)

MOST_ROUNDS = 20  # of all rules over the whole plan; each round makes the plan smaller or moves work down


class Rule(NamedTuple):
    """A rewrite: its name, the kind of node that it looks at, and what it makes of one (None: nothing)."""

    name: str
    pattern: type[Node]
    rewrite: Callable[[Any, Facts], Node | None]


# ---------------------------------------------------------------------- expressions


def fold_project(node: Project, facts: Facts) -> Node | None:
    """Constants in expressions are computed now."""
    fields = folding_fields(node.input, facts)
    trees = tuple((name, fold_constants(tree, fields)) for name, tree in node.columns)
    changed = any(new is not old for (_, new), (_, old) in zip(trees, node.columns, strict=True))
    return replace(node, columns=trees) if changed else None


def folding_fields(node: Node, facts: Facts) -> Fields:
    """The types by which expressions of a node's columns are folded: nothing that comes out of an iteration
    is surely never null, whatever its first rows are.
    """
    fields = node.fields or {}
    return {n: making.nullable(f) for n, f in fields.items()} if facts.evolves(node) else fields


def fold_filter(node: Filter, facts: Facts) -> Node | None:
    """Constants in conditions are computed now; a filter that all rows pass goes."""
    tree = fold_constants(node.predicate, folding_fields(node.input, facts))
    if isinstance(tree, Constant) and tree.value is not None and bool(tree.value):
        return node.input
    return replace(node, predicate=tree) if tree is not node.predicate else None


# ---------------------------------------------------------------------- merge


def merge_projects(node: Project, facts: Facts) -> Node | None:
    """A projection of a projection is one, unless something would be computed twice."""
    below = node.input
    if not isinstance(below, Project) or below.rest or node.rest:
        return None
    made = {name: as_column(tree) for name, tree in below.columns}
    used = Counter(p.name for tree in node.expressions for p in parts_of(tree) if isinstance(p, Column))
    if any(n > 1 and not isinstance(made[name], Column | Constant) for name, n in used.items()):
        return None
    trees = tuple((name, substitute(tree, made)) for name, tree in node.columns)
    return replace(node, input=below.input, columns=trees)


def as_column(tree: Expr) -> Expr:
    """The tree with the type that a column of it has: a plain number would take its neighbour's."""
    if not isinstance(tree, Constant) or type(tree.value) not in (int, float):
        return tree
    return expression(np.int64(tree.value) if type(tree.value) is int else np.float64(tree.value))


def drop_identity(node: Project, facts: Facts) -> Node | None:
    """A projection to the very columns that there are."""
    names = node.input.names
    plain = all(isinstance(tree, Column) and tree.name == name for name, tree in node.columns)
    return node.input if plain and not node.rest and names == node.names and names is not None else None


def merge_filters(node: Filter, facts: Facts) -> Node | None:
    """A filter of a filter is one filter of both conditions."""
    below = node.input
    if not isinstance(below, Filter):
        return None
    return replace(node, input=below.input, predicate=apply("and", below.predicate, node.predicate))


def merge_distinct(node: Group, facts: Facts) -> Node | None:
    """The different rows of a union of different rows are those of all rows together."""
    union = node.input
    if node.aggregates or not isinstance(union, Union):
        return None
    parts: list[Node] = []
    for part in union.rows:
        below = part.input if _is_distinct(part) and isinstance(part, Group) else part
        parts += below.rows if isinstance(below, Union) and below is not part else (part,)
    return replace(node, input=replace(union, rows=tuple(parts))) if len(parts) > len(union.rows) else None


def _is_distinct(node: Node) -> bool:
    """Are these the different rows of others, all columns of them?"""
    return isinstance(node, Group) and not node.aggregates and node.input.names == node.keys


# ---------------------------------------------------------------------- filters move down


def filter_below_project(node: Filter, facts: Facts) -> Node | None:
    """Conditions on columns as they are, or computed cheaply, are asked before the projection."""
    below = node.input
    if not isinstance(below, Project):
        return None
    made = {name: as_column(tree) for name, tree in below.columns}
    used = columns_of(node.predicate)
    if below.rest and below.input.names is None and not set(used) <= made.keys():
        return None
    if any(not isinstance(made.get(n, Column(n)), Column | Constant) for n in used):
        return None
    predicate = substitute(node.predicate, made)
    return replace(below, input=_filtered(below.input, predicate, node))


def _filtered(node: Node, predicate: Expr, like: Filter) -> Filter:
    return Filter(input=node, predicate=predicate, fields=node.fields, where=like.where)


def conjuncts(tree: Expr) -> list[Expr]:
    """The parts of a condition that must all hold.

    >>> from iterreduce.columns.expressions import col
    >>> conjuncts((col("a") > 1) & (col("b") > 2) & (col("c") > 3))
    [(a > 1), (b > 2), (c > 3)]
    """
    if isinstance(tree, Apply) and tree.operation == "and":
        return [part for argument in tree.arguments for part in conjuncts(argument)]
    return [tree]


def all_of(parts: Iterable[Expr]) -> Expr:
    """One condition of several."""
    first, *rest = parts
    for part in rest:
        first = apply("and", first, part)
    return first


def filter_below_join(node: Filter, facts: Facts) -> Node | None:
    """What one side decides is asked of that side, where the join would not pad it with nulls."""
    join = node.input
    if not isinstance(join, Join) or join.left.names is None:
        return None
    left, right, rest = [], [], []
    of_right = dict(join.taken)
    for part in conjuncts(node.predicate):
        used = set(columns_of(part))
        if used and used <= set(join.left.names) and join.how in ("inner", "left", "semi", "anti"):
            left.append(part)
        elif used and used <= of_right.keys() and join.how == "inner":
            right.append(renamed(part, of_right))
        else:
            rest.append(part)
    if not left and not right:
        return None
    made = replace(
        join,
        left=_filtered(join.left, all_of(left), node) if left else join.left,
        right=_filtered(join.right, all_of(right), node) if right else join.right,
    )
    return _filtered(made, all_of(rest), node) if rest else made


def filter_below_group(node: Filter, facts: Facts) -> Node | None:
    """Conditions on keys are asked of the rows."""
    group = node.input
    if not isinstance(group, Group):
        return None
    parts = conjuncts(node.predicate)
    below = [part for part in parts if columns_of(part) and set(columns_of(part)) <= set(group.keys)]
    if not below:
        return None
    rest = [part for part in parts if not any(part is other for other in below)]
    made = replace(group, input=_filtered(group.input, all_of(below), node))
    return _filtered(made, all_of(rest), node) if rest else made


def filter_below_union(node: Filter, facts: Facts) -> Node | None:
    """Each input of a union is filtered."""
    union = node.input
    if not isinstance(union, Union):
        return None
    return replace(union, rows=tuple(_filtered(part, node.predicate, node) for part in union.rows))


def filter_below_sort(node: Filter, facts: Facts) -> Node | None:
    """Fewer rows are sorted."""
    sort = node.input
    if not isinstance(sort, Sort):
        return None
    return replace(sort, input=_filtered(sort.input, node.predicate, node))


BOUNDS = {"less": "<", "less_equal": "<=", "greater": ">", "greater_equal": ">=", "equal": "=="}
TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "=="}


def filter_into_reader(node: Filter, facts: Facts) -> Node | None:
    """The reader is told what may be left out: blocks that surely hold no such row. The filter stays."""
    below = node.input
    if not isinstance(below, Source) or below.bounds:
        return None
    bounds = tuple(b for b in map(bound_of, conjuncts(node.predicate)) if b is not None)
    if not bounds or below.source.where(bounds).asked == below.source.asked:
        return None  # a reader that cannot leave out anything
    return replace(node, input=replace(below, bounds=bounds))


def bound_of(tree: Expr) -> tuple[str, str, Any] | None:
    """A comparison of a column with a constant.

    >>> from iterreduce.columns.expressions import col
    >>> bound_of(col("x") <= 3), bound_of(3 < col("x"))
    (('x', '<=', 3), ('x', '>', 3))
    """
    if not isinstance(tree, Apply) or tree.operation not in BOUNDS:
        return None
    a, b = tree.arguments
    sign = BOUNDS[tree.operation]
    if isinstance(a, Column) and isinstance(b, Constant) and b.value is not None:
        return a.name, sign, b.value
    if isinstance(b, Column) and isinstance(a, Constant) and a.value is not None:
        return b.name, TURNED[sign], a.value
    return None


# ---------------------------------------------------------------------- joins


def outer_to_inner(node: Filter, facts: Facts) -> Node | None:
    """Rows that a left join pads with nulls, and the filter drops for them, need not be made."""
    join = node.input
    if not isinstance(join, Join) or join.how != "left" or not join.taken:
        return None
    if not null_on_null(node.predicate, tuple(join.taken)):
        return None
    fields = dict(join.fields or {})
    for name, of in join.taken.items():
        fields[name] = None if join.right.fields is None else join.right.fields[of]
    inner = replace(join, how="inner", fields=fields if join.fields is not None else None)
    return replace(node, input=inner)


def dependent_columns(node: Join, facts: Facts) -> Node | None:
    """(rows x details) x table, joined by one key, is rows x (table x details): what depends on the key alone
    stands beside the table, which has each key once, and not beside every row.

    The details must have each key once; where they are groups of the rows themselves every row has its own,
    so the table keeps all its rows, and those without details are those that no row names.
    """
    inner = node.left
    if node.how != "inner" or not isinstance(inner, Join) or inner.how != "inner":
        return None
    if len(node.on) != 1 or len(inner.on) != 1 or node.left_keys != inner.left_keys:
        return None
    (key,), (by,), (of,) = node.left_keys, node.right_keys, inner.right_keys
    details, table = inner.right, node.right
    if not facts.is_unique(details, (of,)) or not facts.is_unique(table, (by,)):
        return None
    if facts.varies(details) or not facts.varies(table) or facts.varies(inner.left):
        return None
    if not facts.covers(details, of, inner.left, key) or not inner.taken:
        return None
    blanks = {new: _blank(details, old) for new, old in inner.taken.items()}
    if any(blank is None for blank in blanks.values()) or table.fields is None or inner.left.names is None:
        return None
    hidden = {new: f"\0{new}" for new in inner.taken}
    chosen: dict[str, Expr] = {of: Column(of)}
    chosen |= {hidden[n]: Column(o) for n, o in inner.taken.items()}
    narrow = making.project(details, chosen, "join")
    wide = making.join(table, narrow, ((by, of),), "left", "\0", "join")
    filled: dict[str, Expr] = {n: Column(n) for n in table.fields}
    filled |= {h: apply("coalesce", Column(h), blanks[n]) for n, h in hidden.items()}
    beside = making.project(wide, filled, "join")
    made = making.join(inner.left, beside, ((key, by),), "inner", node.suffix, "join")
    taken = {old: new for new, old in node.taken.items()}
    got = {old: new for new, old in made.taken.items()} if isinstance(made, Join) else {}
    trees: dict[str, Expr] = {}
    for name in node.names or ():
        if name in hidden and name not in inner.left.names:
            trees[name] = Column(got[hidden[name]])
        elif name in inner.left.names:
            trees[name] = Column(name)
        else:
            trees[name] = Column(got[next(old for old, new in taken.items() if new == name)])
    return making.project(made, trees, "join")


def _blank(details: Node, column: str) -> Constant | None:
    """A value for rows that have none and that nobody reads; None where its type is not known."""
    of = None if details.fields is None else details.fields[column]
    if of is None or of.kind != "fixed" or of.shape or of.dtype.kind not in "iuf" or of.nullable:
        return None
    return Constant(0, "int") if of.dtype.kind in "iu" else Constant(0.0, "float")


RULES: tuple[Rule, ...] = (
    Rule("fold constants", Project, fold_project),
    Rule("fold constants in filters", Filter, fold_filter),
    Rule("merge projections", Project, merge_projects),
    Rule("drop projections of all", Project, drop_identity),
    Rule("merge filters", Filter, merge_filters),
    Rule("merge distinct", Group, merge_distinct),
    Rule("outer joins to inner", Filter, outer_to_inner),
    Rule("filters below projections", Filter, filter_below_project),
    Rule("filters below joins", Filter, filter_below_join),
    Rule("filters below groups", Filter, filter_below_group),
    Rule("filters below unions", Filter, filter_below_union),
    Rule("filters below sorts", Filter, filter_below_sort),
    Rule("filters into readers", Filter, filter_into_reader),
    Rule("table to the right", Join, table_to_the_right),
    Rule("dependent columns beside their key", Join, dependent_columns),
    Rule("invariant columns below joins", Project, invariant_columns),
    Rule("totals before groups", Aggregate, total_of_groups),
)


# ---------------------------------------------------------------------- the whole plan


@dataclass
class Applied:
    """What was rewritten: the rule and the node that it was applied to, in words."""

    rules: list[tuple[str, str]] = field(default_factory=list)


class Rewriter:
    """One round of rules over a plan, from the leaves up; nodes that do not change stay."""

    def __init__(self, rules: Iterable[Rule], facts: Facts | None, applied: Applied):
        self.by_pattern: dict[type[Node], list[Rule]] = {}
        for rule in rules:
            self.by_pattern.setdefault(rule.pattern, []).append(rule)
        self.facts, self.applied = facts, applied
        self.made: dict[int, Node] = {}
        self.numbers: dict[str, Scalar] = {}
        self.changed = False

    def plan(self, root: Node) -> Node:
        """The plan after this round."""
        for node in walk(root):
            if id(node) not in self.made:
                self.made[id(node)] = self._node(node)
        return self.made[id(root)]

    def _node(self, node: Node) -> Node:
        node = self.rebuilt(node)
        for rule in self.by_pattern.get(type(node), ()):
            assert self.facts is not None
            with making.on_behalf(node.where):
                found = rule.rewrite(node, self.facts)
            if found is not None and found is not node:
                self.changed = True
                self.applied.rules.append((rule.name, node.label))
                return found
        return node

    def rebuilt(self, node: Node) -> Node:
        """The node with what was made of its inputs and of the numbers in its expressions."""
        if isinstance(node, Iterate):
            return self._loop(node)
        if isinstance(node, StateRows):
            return node  # made anew with its loop
        if isinstance(node, StateOf):
            loop = self.made[id(node.loop)]
            assert isinstance(loop, Iterate)
            return node if loop is node.loop else replace(node, loop=loop)
        inputs = tuple(self.made[id(part)] for part in node.inputs)
        if any(new is not old for new, old in zip(inputs, node.inputs, strict=True)):
            node = node.with_inputs(*inputs)
        return self._with_numbers(node)

    def _with_numbers(self, node: Node) -> Node:
        changed = {s.name: s for s in node.scalars if self.made.get(id(s.node), s.node) is not s.node}
        if not changed:
            return node
        for name, scalar in changed.items():
            self.numbers.setdefault(name, replace(scalar, of=self.made[id(scalar.node)]))
        if isinstance(node, Project):
            return replace(node, columns=tuple((n, self._tree(t)) for n, t in node.columns))
        if isinstance(node, Filter):
            return replace(node, predicate=self._tree(node.predicate))
        aggregates = tuple(
            (n, a.of(self._tree(a.column)) if isinstance(a.column, Expr) else a)
            for n, a in node.aggregates  # type: ignore[attr-defined]
        )
        return replace(node, aggregates=aggregates)  # type: ignore[call-arg]

    def _tree(self, tree: Expr) -> Expr:
        return with_parameters(tree, self.numbers)

    def _loop(self, node: Iterate) -> Node:
        states, same = [], True
        for state in node.states:
            initial, result = self.made[id(state.rows.initial)], self.made[id(state.result)]
            same = same and initial is state.rows.initial and result is state.result
            states.append(replace(state, result=result))
            if initial is not state.rows.initial:
                object.__setattr__(state.rows, "initial", initial)  # the placeholder is the plan's own
        return node if same else replace(node, states=tuple(states))

    def with_own_states(self, node: Iterate) -> Iterate:
        """The iteration with its placeholders and what they become, all made anew."""
        states = []
        for state in node.states:
            rows = self.made.get(id(state.rows))
            if rows is None:  # a body that does not read its state
                rows = replace(state.rows, initial=self.made[id(state.rows.initial)])
            assert isinstance(rows, StateRows)
            states.append(replace(state, rows=rows, result=self.made[id(state.result)]))
        return replace(node, states=tuple(states), fields=states[0].rows.fields)


def optimized(root: Node, rules: Iterable[Rule] = RULES, applied: Applied | None = None) -> Node:
    """The plan after all rules, until nothing changes. Its placeholders are changed: give it `own_states`."""
    applied = applied if applied is not None else Applied()
    for _ in range(MOST_ROUNDS):
        work = Rewriter(tuple(rules), Facts((root,)), applied)
        root = work.plan(root)
        if not work.changed:
            break
    return root


def own_states(root: Node) -> Node:
    """The plan with placeholders of its own, so that rewriting does not touch the one that a user holds."""
    work = Rewriter((), None, Applied())
    for node in walk(root):
        if isinstance(node, StateRows):
            work.made[id(node)] = replace(node, initial=work.made.get(id(node.initial), node.initial))
        else:
            own = work.with_own_states(node) if isinstance(node, Iterate) else work.rebuilt(node)
            work.made[id(node)] = own
    return work.made[id(root)]
