"""Iterations as a user writes them: the body is called once, with placeholders, and becomes part of the plan.

`iterate` calls ``step`` with lazy handles that stand for the states of the current iteration; what it returns
says how the next ones are made. Numbers of the body (`Number`) are values of expressions there, not Python
numbers: to ask for one, by ``if``, ``int`` or ``print``, is an error at the line that does so.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.expressions import Column
from iterreduce.columns.schema import Field
from iterreduce.errors import SchemaError, UsageError, did_you_mean
from iterreduce.fixpoint import Until
from iterreduce.loop import keys_of
from iterreduce.plan import making
from iterreduce.plan.facts import Facts
from iterreduce.plan.nodes import Evolving, Iterate, Node, Scalar, StateOf, StateRows
from iterreduce.plan.unnamed import tell_broken
from iterreduce.rules import Distance, Empty, MaxIterations, NoneActive

MERGES = ("min", "max", "any", "all")
_thread = threading.local()  # ranks may be threads


@dataclass(frozen=True, eq=False)
class Body:
    """An iteration whose body is being traced: an identity."""

    name: str


def open_bodies() -> list[Body]:
    """The bodies that are being traced on this thread, the outermost first."""
    found: list[Body] = _thread.__dict__.setdefault("bodies", [])
    return found


def body_here() -> Body | None:
    """The innermost body that is being traced."""
    bodies = open_bodies()
    return bodies[-1] if bodies else None


@contextmanager
def tracing(body: Body) -> Iterator[None]:
    """Operations made inside belong to this body."""
    bodies = open_bodies()
    bodies.append(body)
    try:
        yield
    finally:
        bodies.pop()


@dataclass(frozen=True, repr=False, eq=False)
class Number(Scalar):
    """A number of rows that are not made yet; ``int``, ``float``, ``bool`` and `value` make them. Collective.

    >>> from iterreduce import Dataset
    >>> import numpy as np
    >>> n = Dataset.from_local(None, x=np.arange(4)).count()
    >>> int(n), (1 / n)
    (4, (1 / count))
    """

    handle: Any = None
    known: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_node(cls, node: Node, column: str, handle: Any) -> Number:
        """The number in a column of a node of one row, which ``handle`` can run."""
        made = making.scalar(node, column)
        return cls(made.name, made.field, node, column, handle)

    def __repr__(self) -> str:
        return self.column

    def value(self) -> Any:
        """Run it: a Python number, or None where it is null. Collective. It is remembered."""
        if "value" not in self.known:
            self._refuse_in_body("asked for")
            rows = self.handle.collect()
            valid = rows.valid(self.column)
            null = valid is not None and not valid[0]
            self.known["value"] = None if null else rows[self.column][0].item()
        return self.known["value"]

    def _refuse_in_body(self, what: str) -> None:
        bodies = open_bodies()
        if bodies and Facts((self.node,)).varies(self.node) & set(bodies):
            raise UsageError(
                f"{self.column} was {what} as a Python number in the body of an iteration, which is looked "
                "at once, before there are rows: use it in expressions (ir.where(condition, a, b)), or as a "
                f"rule of until ({making.user_line()})"
            )

    def __int__(self) -> int:
        return int(self._real())

    def __float__(self) -> float:
        return float(self._real())

    def __index__(self) -> int:
        return int(self._real())

    def __bool__(self) -> bool:
        return bool(self.value())

    def _real(self) -> Any:
        value = self.value()
        if value is None:
            raise UsageError(f"{self.column} is null: there was no row ({making.user_line()})")
        return value


def trace(
    step: Callable[..., Any],
    states: Mapping[str, Node],
    handle: Callable[[Node], Any],
    until: Any,
    max_iterations: int | None,
    keys: Any,
    name: str | None,
    alone: bool,
) -> Iterate:
    """Call the body once and say what it makes of the states. ``handle`` makes what it is called with."""
    if not callable(step):
        raise UsageError(f"iterate: wanted a function of the state, got {step!r} ({making.user_line()})")
    called = name or str(getattr(step, "__name__", "step"))
    body = Body(called)
    rows = {n: StateRows(name=n, initial=s, body=body, fields=s.fields) for n, s in states.items()}
    with tracing(body):
        given = {n: handle(r) for n, r in rows.items()}
        returned = step(*given.values()) if alone else step(**given)
        made = _returned(returned, rows, alone, called)
    rules = Until.of(until, max_iterations).of_states(tuple(states))
    _check_rules(rules, states)
    chosen = _state_keys(keys, states)
    evolving = tuple(Evolving(n, rows[n], made[n], key or (), key != ()) for n, key in chosen.items())
    first = next(iter(states))
    return Iterate(
        name=called, states=evolving, until=rules, gives=first, body=body, fields=states[first].fields,
        where=making.user_line(),
    )  # fmt: skip


def trace_changes(
    step: Callable[..., Any],
    state: Node,
    changes: Node,
    handle: Callable[[Node], Any],
    merge: Mapping[str, Aggregator],
    key: tuple[str, ...],
    max_iterations: int | None,
    name: str | None,
) -> Iterate:
    """Call the body of a delta iteration once: ``step(changes)``, or ``step(changes, state)``."""
    if not callable(step):
        raise UsageError(
            f"iterate_changes: wanted a function of changes, got {step!r} ({making.user_line()})"
        )
    called = name or str(getattr(step, "__name__", "step"))
    what, body = f'iterate_changes "{called}"', Body(called)
    rows = {
        n: StateRows(name=n, initial=node, body=body, fields=node.fields)
        for n, node in (("state", state), ("changes", changes))
    }
    with tracing(body):
        given = handle(rows["changes"]), handle(rows["state"])
        returned = step(*given[: _takes(step)])
        proposed = _like(making.node_of(returned, what), rows["state"], what)
        if not Facts((proposed,)).is_unique(proposed, key):
            proposed = making.group(proposed, key, {n: merge[n] for n in merge}, what)
    rules: tuple[Any, ...] = (Empty(table="changes"),)
    if max_iterations is not None:
        rules += (MaxIterations(max_iterations),)
    states = (
        Evolving("state", rows["state"], rows["state"], key),
        Evolving("changes", rows["changes"], proposed, key),
    )
    return Iterate(
        name=called, states=states, until=Until(rules), gives="state", body=body, delta=True, merge=merge,
        fields=state.fields, where=making.user_line(),
    )  # fmt: skip


def _takes(step: Callable[..., Any]) -> int:
    """How many arguments a step of changes is called with: one or two."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return 1
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return 2 if sum(p.default is p.empty for p in places) >= 2 else 1


def check_merge(
    merge: Mapping[str, Aggregator] | None, state: Node, key: tuple[str, ...]
) -> dict[str, Aggregator]:
    """How the columns of a delta iteration's state improve; raises `UsageError`."""
    what, names = "iterate_changes", state.names
    if names is None:
        tell_broken(state)
        raise UsageError(
            f"{what}: the columns of the state are not known before it runs; name them by select(...) "
            f"({making.user_line()})"
        )
    given = dict(merge or {})
    making.require(state.fields, (*key, *given), what)
    for name in names:
        if name in key and name in given:
            raise UsageError(f'{what}: merge names "{name}", which is the key ({making.user_line()})')
        if name not in key and name not in given:
            raise UsageError(
                f'{what}: column "{name}" is neither in key={list(key)} nor in merge; say how it improves, '
                f'such as merge={{"{name}": ir.MIN}} ({making.user_line()})'
            )
    for name, aggregator in given.items():
        if getattr(aggregator, "kind", None) not in MERGES:
            raise UsageError(
                f'{what}: merge of "{name}" is {aggregator!r}; wanted ir.MIN, ir.MAX, ir.ANY or ir.ALL, by '
                f"which a value never gets worse ({making.user_line()})"
            )
    return given


def _returned(given: Any, rows: Mapping[str, StateRows], alone: bool, name: str) -> dict[str, Node]:
    """What the step returned, as a node for each state."""
    what = f'iterate "{name}"'
    if alone:
        if isinstance(given, Mapping):
            raise UsageError(
                f"{what}: the step returned a mapping; wanted rows, like the state it was given "
                f"({making.user_line()})"
            )
        given = {next(iter(rows)): given}
    if not isinstance(given, Mapping):
        raise UsageError(
            f"{what}: the step returned {type(given).__name__}; wanted a mapping of the names of states to "
            f"their rows, {', '.join(rows)} ({making.user_line()})"
        )
    for n in given:
        if n not in rows:
            raise UsageError(
                f'{what}: the step returned "{n}", which is no state{did_you_mean(n, rows)} '
                f"({making.user_line()})"
            )
    out = {}
    for n, state in rows.items():
        out[n] = _like(making.node_of(given[n], what), state, what) if n in given else state
    return out


def _like(node: Node, state: StateRows, what: str) -> Node:
    """The rows with the columns of the state in its order; raises where they are others."""
    wanted, got = state.fields, node.fields
    if wanted is None or got is None:
        return node
    where = f'{what}, state "{state.name}"'
    unlike = [n for n in wanted if n not in got] + [n for n in got if n not in wanted]
    if unlike:
        side = "missing in what the step returns" if unlike[0] in wanted else "not in the first rows"
        raise SchemaError(
            f'{where}: column "{unlike[0]}" is {side} (first: {", ".join(wanted)}; then: {", ".join(got)}) '
            f"({making.user_line()})"
        )
    for n, field_ in wanted.items():
        _check_type(n, field_, got[n], where)
    if tuple(got) == tuple(wanted):
        return node
    return making.project(node, {n: Column(n) for n in wanted}, what)


def _check_type(name: str, first: Field | None, then: Field | None, where: str) -> None:
    if first is None or then is None:
        return
    if (first.kind, first.dtype, first.shape) != (then.kind, then.dtype, then.shape):
        raise SchemaError(
            f'{where}: column "{name}" is {first.describe()} in the first rows and {then.describe()} in what '
            f"the step returns; cast one of them ({making.user_line()})"
        )


def _check_rules(until: Until, states: Mapping[str, Node]) -> None:
    for rule in until.rules:
        table = getattr(rule, "table", None)
        if table is not None and table not in states:
            raise UsageError(
                f'until names "{table}", which is no state (states: {", ".join(states)})'
                f"{did_you_mean(table, states)} ({making.user_line()})"
            )
        if isinstance(rule, Distance):
            making.require(states[table or ""].fields, rule.columns, "until")
        elif isinstance(rule, NoneActive):
            making.require(states[table or ""].fields, (rule.column,), "until")


def _state_keys(given: Any, states: Mapping[str, Node]) -> dict[str, tuple[str, ...] | None]:
    """The key of each state, as the user gives it: for all, or by name. None: not given; (): it has none."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(states, given)
    for n in by_name:
        if n not in states:
            raise UsageError(
                f'iterate: key of "{n}", which is no state{did_you_mean(n, states)} ({making.user_line()})'
            )
    out: dict[str, tuple[str, ...] | None] = {}
    for n, node in states.items():
        key = by_name.get(n)
        out[n] = None if key is None else keys_of(key)
        making.require(node.fields, out[n] or (), f'iterate, key of "{n}"')
    return out


def states_of(loop: Iterate) -> Sequence[tuple[str, Node]]:
    """The states of an iteration that has ended, by name."""
    out: list[tuple[str, Node]] = []
    for state in loop.states:
        if state.name == loop.gives:
            out.append((state.name, loop))
        else:
            fields = state.rows.fields
            out.append((state.name, StateOf(loop=loop, name=state.name, fields=fields, where=loop.where)))
    return out
