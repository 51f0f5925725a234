"""Lowering of joins: rows to the owners of their keys, once where they do not change, and side by side.

Three ways, chosen from the plan alone. *Side by side*: the right rows are groups of the left rows' key, so
they are shuffled onto the left table and stand beside it row for row. *Beside*: both lie by the key, and
nothing travels. *Pull*: few keyed rows are brought to many that stay where they are.
"""

from __future__ import annotations

from dataclasses import replace

from iterreduce.columns.aggregators import Aggregator, count
from iterreduce.columns.expressions import Column, Expr, col, lit, where
from iterreduce.loop import Local, Lookup, Shuffle
from iterreduce.plan import making
from iterreduce.plan.flow import Flow, Made, Place
from iterreduce.plan.grouping import ROWS, prepared
from iterreduce.plan.groupkernels import GroupHere, GroupOnto
from iterreduce.plan.kernels import Columns, Compute, Concat, Keep, WithNulls
from iterreduce.plan.linking import complete, finished, has_all_keys, shuffled
from iterreduce.plan.lower import Lowering
from iterreduce.plan.making import columns_read
from iterreduce.plan.nodes import Filter, Group, Join, MapBatches, Node, Project, Repartition, Union
from iterreduce.plan.nulls import filled_everywhere, is_sum, never_null_of, others_than

MISSING = {"inner": "drop", "left": "null", "semi": "drop", "anti": "only"}


def join(lowering: Lowering, node: Join) -> Flow:
    """Pairs of rows with equal keys."""
    if node.how == "full":
        return _full(lowering, node)
    found = _side_by_side(lowering, node) if node.how == "left" else None
    return found if found is not None else Flow.of(_looked_up(lowering, node, node.how))


def _looked_up(lowering: Lowering, node: Join, how: str) -> Made:
    """The join by one lookup."""
    place = lowering.place(node)
    right = _right(lowering, node, how)
    taken = {} if how in ("semi", "anti") else dict(node.taken)
    left, table = _laid(lowering, node, right, place)
    table = _renamed(lowering, node, table, taken, place)
    into = lowering.name_of(node)
    columns = None if left.columns is None else (*left.columns, *taken)
    stage = Lookup(
        lowering.read(left, place),
        node.left_keys,
        lowering.read(table, place),
        tuple(taken),
        into,
        MISSING[how],  # type: ignore[arg-type]
    )
    lowering.emit(place, stage)
    keeps = how in ("left", "inner") and lowering.facts.keeps_left(node)
    return lowering.new(into, columns, left.lies, place, left.order if keeps else None)


def _right(lowering: Lowering, node: Join, how: str) -> Node:
    """The right rows; where only their keys matter, each once."""
    if how not in ("semi", "anti") or lowering.facts.is_unique(node.right, node.right_keys):
        return node.right
    return making.group(node.right, node.right_keys, {}, f"{how} join")


def _laid(lowering: Lowering, node: Join, right: Node, place: Place) -> tuple[Made, Made]:
    """Both sides where they can meet."""
    left_rows, right_rows = lowering.made(node.left), lowering.made(right)
    if right_rows.lies == () or lowering.is_small(right, node.left):
        if right_rows.lies != ():
            lowering.note(node, "the right side is small: it is brought to every rank")
        return left_rows, lowering.gathered(right_rows, lowering.place(right), right)
    if lowering.facts.is_unique(right, node.right_keys) and _stays(lowering, node, left_rows):
        lowering.note(node, "the left rows stay, values of the right ones come to them")
        return left_rows, lowering.laid(right, node.right_keys, place, ordered=False)
    if left_rows.lies == ():
        left_rows = _dealt(lowering, node, left_rows, place)
    else:
        left_rows = lowering.laid(node.left, node.left_keys, place, ordered=False)
    return left_rows, lowering.laid(right, node.right_keys, place, ordered=False)


def _stays(lowering: Lowering, node: Join, left: Made) -> bool:
    """Should the left rows not move? Those on all ranks, those that were laid out by a repartition, and those
    that are not moved once for all iterations and that nobody wants by the key of the join.
    """
    if left.lies == () or left.lies == node.left_keys:
        return left.lies == ()
    if isinstance(node.left, Repartition):
        return True
    hoisted = lowering.facts.varies(node.left) != lowering.facts.varies(node)
    return not hoisted and not wanted_by(lowering, node, node.left_keys)


def wanted_by(lowering: Lowering, node: Node, keys: tuple[str, ...]) -> bool:
    """Does whoever reads these rows bring those of equal keys together?"""
    for reader in lowering.parents.get(id(node), []):
        if isinstance(reader, Group | Repartition) and set(keys) <= set(reader.keys):
            return True
        if isinstance(reader, MapBatches) and keys == reader.by:
            return True
        if isinstance(reader, Join):
            return keys == (reader.left_keys if reader.left is node else reader.right_keys)
        if isinstance(reader, Project):
            names = {old: new for new, old in reader.passed.items()}
            renamed = tuple(names.get(key, "") for key in keys)
            if all(renamed) and wanted_by(lowering, reader, renamed):
                return True
        elif isinstance(reader, Filter | Union) and wanted_by(lowering, reader, keys):
            return True
    return False


def _dealt(lowering: Lowering, node: Join, made: Made, place: Place) -> Made:
    into = lowering.name_of(node, f"{made.name} by {', '.join(node.left_keys)}")
    lowering.emit(place, Shuffle(lowering.read(made, place), node.left_keys, into))
    return lowering.new(into, made.columns, node.left_keys, place)


def _renamed(lowering: Lowering, node: Join, table: Made, taken: dict[str, str], place: Place) -> Made:
    """The right table with its columns under the names that the result has, its keys under the left's where
    every rank has it.
    """
    keys = dict(zip(node.right_keys, node.left_keys if table.lies == () else node.right_keys, strict=True))
    same = all(new == old for new, old in taken.items()) and all(a == b for a, b in keys.items())
    if same or table.columns is None:
        return table
    trees: dict[str, Expr] = {new: Column(old) for old, new in keys.items()}
    trees |= {new: Column(old) for new, old in taken.items()}
    kernel = Compute((Columns(tuple(trees.items())),), keeps=tuple((new, old) for old, new in keys.items()))
    into = lowering.name_of(node, f"{table.name} renamed")
    home = table.place
    lowering.emit(home, Local(kernel, (lowering.read(table, home),), into, cut="share", rank_free=True))
    lies = None if table.lies is None else tuple(keys.get(k, k) for k in table.lies)
    return lowering.new(into, tuple(trees), lies, home, table.order)


def _full(lowering: Lowering, node: Join) -> Flow:
    """A left join, and the right rows without a match with nulls on the left."""
    place = lowering.place(node)
    left = replace(node, how="left")
    matched = lowering.made_again(left)
    turned = making.join(
        node.right, node.left, tuple((b, a) for a, b in node.on), "anti", node.suffix, "full join"
    )
    pairs = (*node.on, *node.taken.items())
    trees: dict[str, Expr] = {new: Column(old) for new, old in pairs}
    alone = lowering.made_again(making.project(turned, trees, "full join"))
    order = matched.columns or ()
    nothing = tuple(n for n in order if n not in trees)
    if (alone.lies == ()) != (matched.lies == ()):  # each row on one rank, as those beside it
        if alone.lies == ():
            alone = _dealt(lowering, node, alone, place)
        else:
            matched = _dealt(lowering, node, matched, place)
    into = lowering.name_of(node, "right rows")
    reads = lowering.read(alone, place), lowering.read(matched, place)
    lowering.emit(place, Local(WithNulls(nothing, order), reads, into, cut="share", rank_free=True))
    result = lowering.name_of(node)
    kernel = Concat()
    reads = lowering.read(matched, place), into
    lowering.emit(place, Local(kernel, reads, result, cut="share", rank_free=True))
    both = () if matched.lies == () and alone.lies == () else None
    return Flow.of(lowering.new(result, order, both, place))


# ---------------------------------------------------------------------- side by side


def _side_by_side(lowering: Lowering, node: Join) -> Flow | None:
    """A left join with groups of the left table's own key: aggregated onto it, so they stand beside it."""
    found = groups_of(node.right)
    if found is None or not lowering.facts.is_unique(node.left, node.left_keys):
        return None
    grouped, names = found
    if tuple(names.get(k) for k in node.right_keys) != grouped.keys or id(grouped) in lowering.flows:
        return None
    left, home = lowering.flow(node.left), lowering.place(grouped)
    if left.lies != node.left_keys or not lowering.place(node).scope.inside(home.scope):
        return None
    if left.steps:
        left = Flow.of(lowering.made(node.left))
    anchor = lowering.alike(left.table, home)
    return None if anchor is None else _beside(lowering, node, grouped, names, left, anchor, home)


def groups_of(node: Node) -> tuple[Group, dict[str, str]] | None:
    """Groups under a projection that chooses and renames: the group, and result name -> its name there."""
    names: dict[str, str] | None = None
    while isinstance(node, Project):
        if not all(isinstance(tree, Column) for _, tree in node.columns) or node.rest:
            return None
        passed = node.passed
        names = dict(passed) if names is None else {n: passed[o] for n, o in names.items() if o in passed}
        node = node.input
    if not isinstance(node, Group):
        return None
    return node, names if names is not None else {n: n for n in node.names or ()}


def onto(lowering: Lowering, node: Group, table: Made, place: Place, rows: bool) -> Made | None:
    """The groups as rows of a table, in its order; ``rows``: with how many rows each key had."""
    fused = lowering.links.fused.get(id(node))
    if fused is not None:
        graph = lowering.links.graph_of(fused)
        return shuffled(lowering, node, fused, graph, table, place, rows)
    flow, aggregates = prepared(lowering, lowering.flow(node.input), node, node.keys)
    keys = table.lies or ()
    if flow.lies == () or any(needs_rows(node, name, a) for name, a in aggregates):
        return None
    if keys != node.keys:  # under the names of the table's
        read = (*node.keys, *columns_read(aggregates))
        if flow.columns is None or set(keys) & set(read):
            return None
        trees = {new: Column(old) for new, old in zip(keys, node.keys, strict=True)}
        trees |= {name: Column(name) for name in columns_read(aggregates)}
        flow = replace(
            flow, steps=(*flow.steps, Columns(tuple(trees.items()))), columns=tuple(trees), lies=None
        )
    made = lowering.table(flow, place, node)
    into = lowering.name_of(node)
    combine = dict(aggregates)
    if rows:
        combine[ROWS] = count()
    name = lowering.read(table, place)
    if made.lies == keys:
        lowering.note(node, "rows of a key lie together already: grouped where they are, nothing travels")
        kernel = GroupOnto(GroupHere(keys, tuple(combine.items())), keys)
        reads = name, lowering.read(made, place)
        lowering.emit(place, Local(kernel, reads, into, cut="share", rank_free=True))
        return lowering.new(into, (*keys, *combine), table.lies, place, table.order)
    stage = Shuffle(lowering.read(made, place), keys, into, combine, name, missing="drop")
    lowering.emit(place, stage)
    columns = (*keys, *combine)
    return lowering.new(into, columns, table.lies, place, table.order)


def needs_rows(node: Group, name: str, aggregator: Aggregator) -> bool:
    """Might the aggregate need all rows of a key together? Collected ones do, and extremes of text."""
    if aggregator.kind not in ("min", "max"):
        return aggregator.kind == "collect"
    field = (node.fields or {}).get(name)
    return field is None or field.kind != "fixed"


def _beside(
    lowering: Lowering,
    node: Join,
    grouped: Group,
    names: dict[str, str],
    left: Flow,
    anchor: Made,
    home: Place,
) -> Flow | None:
    """The left rows with the groups beside them; null where a key had no row."""
    nullable = [key for key in node.left_keys if _may_be_null(lowering, node, key, anchor)]
    met = lowering.facts.is_met(node)
    filled = met or (not nullable and filled_everywhere(lowering, node, grouped, names))
    others = others_than(lowering, grouped, node)
    if others and not has_all_keys(lowering, grouped, anchor):
        return None  # they want groups of keys that no left row has
    summed = met or (all(map(is_sum, others)) and (not others or complete(lowering, grouped, anchor)))
    made = lowering.rules.onto(lowering, grouped, anchor, home, not (filled and summed))
    if made is None:
        return None
    outputs = dict(outputs_of(lowering, grouped, made))
    if others:
        steps = (Columns(tuple(outputs.items())),)
        here = steps if filled and summed else (Keep(col(ROWS) > 0), *steps)
        lowering.flows[id(grouped)] = Flow(made, grouped.names, grouped.keys, steps=here)
    came: Expr = col(ROWS) > 0
    for at in map(node.left_keys.index, nullable):  # a group of nulls is a group, and equals no key
        came &= col((made.columns or grouped.keys)[at]).is_not_null()
    trees: list[tuple[str, Expr]] = []
    for new, old in node.taken.items():
        tree = outputs[names[old]]
        trees.append((new, tree if filled else where(came, tree, lit(None))))
    if any(not isinstance(tree, Column) for _, tree in trees):  # where its rows are made: perhaps only once
        key = made.columns or ("",)
        chosen = ((key[0], Column(key[0])), *trees)
        flow = Flow(made, tuple(n for n, _ in chosen), made.lies, steps=(Columns(chosen),))
        made = lowering.table(flow, home, node)
        trees = [(new, Column(new)) for new, _ in trees]
    if filled:
        lowering.full[id(node)] = never_null_of(grouped, names, node)
    hidden = {new: f"\0{made.name}.{new}" for new, _ in trees}
    columns = tuple((tree.name, hidden[new]) for new, tree in trees if isinstance(tree, Column))
    plain: list[tuple[str, Expr]] = [(n, Column(n)) for n in node.left.names or ()]
    plain += [(new, Column(hidden[new])) for new, _ in trees]
    return replace(
        left,
        beside=(*left.beside, (made, columns)),
        steps=(*left.steps, Columns(tuple(plain))),
        columns=tuple(n for n, _ in plain),
    )


def _may_be_null(lowering: Lowering, node: Join, key: str, anchor: Made) -> bool:
    """May a left row have no key? The keys of an index are never null."""
    field = (node.left.fields or {}).get(key)
    if field is not None and not field.nullable:
        return False
    tables = [t for g in lowering.links.graphs if g.made is not None for t in g.made.tables.values()]
    return not any(table.order is anchor.order for table in tables)


def outputs_of(lowering: Lowering, grouped: Group, made: Made) -> list[tuple[str, Expr]]:
    """The columns of the groups, in those of what was shuffled."""
    is_fused, keys = id(grouped) in lowering.links.fused, made.columns or ()
    out: list[tuple[str, Expr]] = [(k, Column(keys[i])) for i, k in enumerate(grouped.keys)]
    return out + [(n, finished(n, a) if is_fused else Column(n)) for n, a in grouped.aggregates]
