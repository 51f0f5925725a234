"""Lowering of iterations: states, where they lie, and what the body makes of them."""

from __future__ import annotations

from dataclasses import replace

from iterreduce.errors import UsageError
from iterreduce.fixpoint import Until
from iterreduce.loop import Local, Replace, Shuffle, State
from iterreduce.plan.deltas import lower_changes
from iterreduce.plan.flow import BODY, FINISH, Flow, Made, Place, Scope
from iterreduce.plan.kernels import Concat, Distinct
from iterreduce.plan.lower import Lowering
from iterreduce.plan.nodes import Evolving, Iterate, MapBatches, Node, Project, StateOf


def lower_states(lowering: Lowering, loop: Iterate, scope: Scope) -> None:
    """The states of an iteration that ``scope`` builds, its body, and what it writes."""
    place = Place(scope, BODY)
    began: dict[str, Made] = {}
    for state in loop.states:
        began[state.name] = _initial(lowering, state, loop.delta)
    for state in loop.states:
        first = began[state.name]
        key = lowering.facts.state_key(state.rows) if first.lies else ()
        home = first.place.scope
        initial = first.name if home is scope else lowering.read(first, Place(scope, "prepare"))
        if scope is lowering.top and state.name in lowering.taken:
            raise UsageError(
                f'iterate: the state "{state.name}" has the name of another table; rename it ({loop.where})'
            )
        name = lowering.name_of_source(state.name)
        scope.states[name] = State(initial, key, loop.where)
        aligned = lowering.facts.aligned(state.rows)
        same = aligned or (loop.delta and state is loop.states[0])
        made = Made(name, first.columns, first.lies, place, first.order if same else object())
        lowering.flows[id(state.rows)] = Flow.of(made)
        lowering.tables[id(state.rows)] = made
        _tell(lowering, state, aligned, key)
    if loop.delta:
        lower_changes(lowering, loop, place)
        return
    for state in loop.states:
        if state.result is not state.rows:
            _write(lowering, state, began[state.name], place)


def _tell(lowering: Lowering, state: Evolving, aligned: bool, key: tuple[str, ...]) -> None:
    if aligned:
        lowering.note(state.rows, "its rows stay those that it begins with: keys and plans are made once")
    elif key:
        why = lowering.facts.notes.get(id(state.rows), "")
        lowering.note(state.rows, f"kept by {', '.join(key)}; its rows may change ({why})")


def _initial(lowering: Lowering, state: Evolving, keyed: bool) -> Made:
    """The rows that a state begins with, lying as its rows will lie in every iteration."""
    facts, node = lowering.facts, state.rows.initial
    made = lowering.made(node)
    key = facts.state_key(state.rows)
    if not keyed and (facts.everywhere(state.result) or _read_whole(lowering, state)):
        lowering.on_all_ranks |= {id(part) for part in _made_of(state.result)}
        made = lowering.gathered(made, lowering.place(node), node)
        return _distinct(lowering, state, node, made, lowering.place(node))
    if not key:
        if made.lies == ():
            raise UsageError(
                f'iterate: state "{state.name}" begins with rows that every rank has, and the step makes '
                "rows that are spread over the ranks: say by which column, key=... "
                f"({state.rows.initial.where})"
            )
        return made if not made.lies or _stays(lowering, state, made.lies) else _anyhow(lowering, node, made)
    if made.lies == key:
        return made
    place, into = lowering.place(node), lowering.name_of(node, f"{made.name} by {', '.join(key)}")
    lowering.emit(place, Shuffle(lowering.read(made, place), key, into))
    return lowering.new(into, made.columns, key, place)


def _read_whole(lowering: Lowering, state: Evolving) -> bool:
    """Is a function of the body given all its rows? Then every rank keeps them."""
    readers = lowering.parents.get(id(state.rows), [])
    return any(isinstance(r, MapBatches) and state.rows in r.rows[1:] and not r.by for r in readers)


def _made_of(node: Node) -> list[Node]:
    """The node, and what it is a projection of."""
    out = [node]
    while isinstance(node, Project):
        node = node.input
        out.append(node)
    return out


def _stays(lowering: Lowering, state: Evolving, lies: tuple[str, ...]) -> bool:
    """Are the state's rows always those that it begins with, with the columns by which they lie?"""
    facts = lowering.facts
    before, then = state.rows.initial, state.result
    return facts.aligned(state.rows) and all(facts.origin(then, k) == facts.origin(before, k) for k in lies)


def _anyhow(lowering: Lowering, node: Node, made: Made) -> Made:
    """The same rows, without a promise where they lie: those of later iterations may lie elsewhere."""
    place, into = lowering.place(node), lowering.name_of(node, f"{made.name} as it lies")
    reads = (lowering.read(made, place),)
    lowering.emit(place, Local(Concat(), reads, into, cut="share", rank_free=True))
    return lowering.new(into, made.columns, None, place, made.order)


def _write(lowering: Lowering, state: Evolving, first: Made, place: Place) -> None:
    """What the body makes of a state, in its place."""
    key = lowering.facts.state_key(state.rows) if first.lies else ()
    made = lowering.made(state.result)
    if first.lies == ():
        made = lowering.gathered(made, lowering.place(state.result), state.result)
    elif key and made.lies != key:
        made = lowering.laid(state.result, key, place)
    made = _distinct(lowering, state, state.result, made, place)
    name = lowering.tables[id(state.rows)].name
    unknown = any(n.fields is None or None in n.fields.values() for n in (state.rows.initial, state.result))
    place.scope.writes.append(
        Replace(name, lowering.read(made, place), alike=unknown, where=state.result.where)
    )


def _distinct(lowering: Lowering, state: Evolving, node: Node, made: Made, place: Place) -> Made:
    """The rows of a state, which are looked at where a key was given or assumed that they may not have."""
    key = lowering.facts.state_key(state.rows)
    if not key or lowering.facts.is_unique(node, key):
        return made
    into, first = lowering.name_of(node, f"{made.name} by its key"), node is state.rows.initial
    kernel = Distinct(key, state.name, node.where, first)
    lowering.emit(place, Local(kernel, (lowering.read(made, place),), into, cut="share", rank_free=True))
    return lowering.new(into, made.columns, made.lies, place, made.order)


def iterate(lowering: Lowering, node: Iterate) -> Flow:
    """An iteration that is not the loop itself: one inside a body, or one that runs before."""
    return Flow.of(_ended(lowering, node)[node.gives])


def state_of(lowering: Lowering, node: StateOf) -> Flow:
    """Another state of an iteration that has ended."""
    if node.loop is not lowering.main:
        return Flow.of(_ended(lowering, node.loop)[node.name])
    made = lowering.tables[id(_given(node.loop, node.name).rows)]
    return Flow.of(replace(made, place=Place(lowering.top, FINISH)))


def _ended(lowering: Lowering, node: Iterate) -> dict[str, Made]:
    """The states of an iteration that has ended, of those that are read."""
    place = lowering.place(node)
    if place.part != BODY:
        return lowering.before(node)
    found = lowering.befores.get(id(node))
    if found is None:
        found = lowering.befores[id(node)] = _inside(lowering, node, place)
    return found


def _inside(lowering: Lowering, node: Iterate, place: Place) -> dict[str, Made]:
    """A loop in the body of another."""
    scope = Scope(node, place.scope)
    lowering.scopes.append(scope)
    try:
        lower_states(lowering, node, scope)
        scope.close_step(node.name)
    finally:
        lowering.scopes.pop()
    outer, name = place.scope, lowering.name_of(node, node.name)
    outer.close_step(getattr(outer.loop, "name", "step"))
    made = {state.name: lowering.tables[id(state.rows)] for state in node.states}
    rules = (replace(r, table=made[r.table].name) if r.table in made else r for r in node.until.rules)
    gives = {n: f"{name}: {n}" for n in lowering.asked_of[id(node)] if n != node.gives}
    loop = lowering.build(scope, name, Until(tuple(rules)), made[node.gives].name)
    outer.steps.append(replace(loop, gives={gives[n]: made[n].name for n in gives}))
    gives[node.gives] = name
    outer.loops |= set(gives.values())
    return {n: lowering.new(gives[n], made[n].columns, made[n].lies, place, made[n].order) for n in gives}


def _given(loop: Iterate, name: str) -> Evolving:
    return next(state for state in loop.states if state.name == name)
