"""From a plan to a loop: the rules by which nodes are lowered, and the way through rewrites."""

from __future__ import annotations

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
from iterreduce.plan.pruning import pruned
from iterreduce.plan.rules import Applied, optimized

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


def to_loop(root: Node, ranks: Ranks | None = None, name: str = "plan", optimize: bool = True) -> Loop:
    """The loop that makes a node's rows. Collective on ``ranks``, which agree on what sources hold; None: as
    far as this rank can tell alone.
    """
    root, rows = known(root, ranks) if ranks is not None else (root, {})
    if optimize:
        applied = Applied()
        root = pruned(optimized(root, applied=applied), applied)
    return Lowering(root, RULES, name, lambda node: rows_of(node, rows)).loop()
