"""From a plan to a loop: the rules by which nodes are lowered, and the way through rewrites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iterreduce.group import Group as Ranks
from iterreduce.loop import Loop
from iterreduce.plan import grouping, joining, linking, rows, states
from iterreduce.plan.known import known, rows_of
from iterreduce.plan.lower import Lowering, Rules
from iterreduce.plan.nodes import (
    Aggregate,
    Filter,
    Group,
    Iterate,
    Join,
    Limit,
    LoopRows,
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
)
from iterreduce.plan.order import ordered
from iterreduce.plan.pruning import pruned
from iterreduce.plan.rules import Applied, optimized, own_states
from iterreduce.plan.sharing import shared

RULES = Rules(
    {
        Source: rows.source,
        Rows: rows.rows,
        LoopRows: rows.loop_rows,
        StateRows: rows.state,
        Project: rows.project,
        Filter: rows.keep,
        MapBatches: rows.map_batches,
        Union: rows.union,
        Sort: rows.sort,
        Limit: rows.limit,
        Sample: rows.sample,
        Repartition: rows.repartition,
        Group: grouping.group,
        Aggregate: grouping.aggregate,
        Join: joining.join,
        Iterate: states.iterate,
        StateOf: states.state_of,
    },
    grouping.total,
    states.lower_states,
    joining.onto,
    linking.linked,
    linking.vertices,
)


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan on its way: as written (typed), as rewritten by which rules, and as a loop.

    ``sizes``: the rows of sources, by id, where all ranks know them alike.
    """

    before: Node
    after: Node
    applied: list[tuple[str, str]]
    sizes: Mapping[int, int]
    lowering: Lowering
    loop: Loop


def planned(root: Node, ranks: Ranks | None = None, name: str = "plan", optimize: bool = True) -> Planned:
    """A node as a loop, and how it came to be one. Collective on ``ranks``, which agree on what sources hold;
    None: as far as this rank can tell alone.
    """
    before, rows = known(root, ranks) if ranks is not None else (root, {})
    applied = Applied()
    after = rewritten(before, applied) if optimize else ordered(before, applied)
    lowering = Lowering(after, RULES, name, lambda node: rows_of(node, rows))
    return Planned(before, after, applied.rules, rows, lowering, lowering.loop())


def rewritten(root: Node, applied: Applied) -> Node:
    """The better plan: equal parts once, all rules, orders without ranks, no column that nobody reads."""
    better = optimized(shared(own_states(root), applied), applied=applied)
    return ordered(pruned(ordered(better, applied, chosen_only=True), applied), applied)


def to_loop(root: Node, ranks: Ranks | None = None, name: str = "plan", optimize: bool = True) -> Loop:
    """The loop that makes a node's rows. Collective on ``ranks``, if given."""
    return planned(root, ranks, name, optimize).loop
