"""Why a node of a plan is made where it is: once, or anew in each iteration, and what keeps it from better.

Read off the plan and its facts, in words for `iterreduce.plan.explain`. Nothing is decided here: what may be
hoisted is decided by `facts`; what becomes a shuffle of indexed rows, and why not, by `links`.
"""

from __future__ import annotations

from collections.abc import Iterator

from iterreduce.plan.facts import Facts
from iterreduce.plan.nodes import (
    Aggregate,
    Filter,
    Group,
    Iterate,
    Join,
    Limit,
    MapBatches,
    Node,
    Project,
    Repartition,
    Sample,
    Sort,
    StateRows,
    Union,
    reads,
    walk,
)

WORK = (Group, Join, MapBatches, Aggregate, Sort, Limit, Sample, Repartition, Union, Iterate)


def hoisted(loop: Iterate, facts: Facts) -> Iterator[Node]:
    """What a body reads that does not depend on it, the largest such parts, where they do any work."""
    seen: set[int] = set()
    here = {loop.body, *(n.body for n in _body(loop) if isinstance(n, Iterate))}
    for node in _body(loop):
        if loop.body in facts.varies(node):
            for part in reads(node):
                inside = id(part) not in seen and not here & facts.varies(part)
                if inside and any(isinstance(n, (*WORK, Project, Filter)) for n in walk(part)):
                    seen.add(id(part))
                    yield part


def anew(loop: Iterate, facts: Facts) -> Iterator[tuple[Node, str]]:
    """What is made anew in each iteration and costs more than a look at each row, and why."""
    for node in _body(loop):
        if isinstance(node, WORK) and node is not loop and loop.body in facts.varies(node):
            yield node, why_anew(node, loop, facts)


def _body(loop: Iterate) -> Iterator[Node]:
    yield from walk(*(state.result for state in loop.states))


def why_anew(node: Node, loop: Iterate, facts: Facts) -> str:
    """Why it is made anew in each iteration of a loop."""
    if isinstance(node, MapBatches) and node.body is loop.body:
        on = [state.name for state in _states(node, loop)]
        also = f", and it depends on {_named(on)}: pure=True alone would not make it once" if on else ""
        return f"its function is not declared pure (pure=True){also}"
    names = [state.name for state in _states(node, loop)]
    if names:
        return f"depends on {_named(names)}"
    opaque = [n for n in walk(node) if isinstance(n, MapBatches) and n.body is loop.body]
    return f"depends on {opaque[0].label}, whose function is not declared pure (pure=True)"


def _states(node: Node, loop: Iterate) -> list[StateRows]:
    return [n for n in walk(node) if isinstance(n, StateRows) and n.body is loop.body]


def _named(names: list[str]) -> str:
    return "state " + " and ".join(f'"{name}"' for name in names)
