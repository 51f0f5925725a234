"""How tables lie, as far as the loop alone tells: by which key, or everywhere.

What a stage decides before its exchange must not depend on what a rank sees. A `Table` has its layout too,
but on a rank where something failed there may be none. Nothing here runs or communicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from iterreduce.columns.batch import Batch
from iterreduce.loop import Gather, Index, Local, Lookup, Loop, Number, Shuffle, Stage, Total

Laid = Mapping[str, tuple[str, ...]]  # table -> the key by which it lies; () is everywhere; others: unknown


def laid_out(loop: Loop, around: Laid = MappingProxyType({})) -> dict[str, tuple[str, ...]]:
    """How tables lie, whatever user code does: alike on all ranks, being read from the loop alone.

    ``around``: how those of the loop around it lie.
    """
    out: dict[str, tuple[str, ...]] = {n: around[n] for n in loop.outer if n in around}
    for name, source in loop.sources.items():
        if isinstance(source, Batch):
            out[name] = ()
        elif isinstance(source, Loop):
            out |= results_laid(name, source, laid_out(source))
    out |= dict.fromkeys(loop.carry, ())
    for stage in loop.prepare:
        lay_out(stage, out)
    for name, state in loop.state.items():
        if state.key or state.initial in out:
            out[name] = state.key or out[state.initial]
    for step in loop.body:
        if isinstance(step, Loop):
            out |= results_laid(step.name, step, laid_out(step, out))
    return out


def results_laid(name: str, loop: Loop, laid: Laid) -> dict[str, tuple[str, ...]]:
    """How the states lie that a loop gives to the one around it: its result, under a name, and others."""
    given = {name: loop.result, **loop.gives}
    return {n: laid[table] for n, table in given.items() if table in loop.state and table in laid}


def lay_out(stage: Stage, laid: dict[str, tuple[str, ...]]) -> None:
    """Add what a stage makes: where user code may have changed keys, nothing is known."""
    kept = kept_key(stage, laid) if isinstance(stage, Local) else ()
    laid.pop(stage.into, None)
    if kept:
        laid[stage.into] = kept
    if isinstance(stage, Index):
        laid.update({table: (stage.names[table],) for table in stage.keys.values()})
    copies = isinstance(stage, Local) and all(laid.get(n) == () for n in stage.reads)
    if copies or isinstance(stage, Total | Gather):
        laid[stage.into] = ()
    elif isinstance(stage, Shuffle) and stage.route is None:
        laid[stage.into] = stage.key
    elif isinstance(stage, Lookup | Number) and stage.rows in laid:
        laid[stage.into] = laid[stage.rows]


def kept_key(stage: Local, laid: Laid) -> tuple[str, ...]:
    """The key by which the rows of a map lie, as those of its first table do; () where nobody knows one."""
    return carried(stage.function, laid.get(stage.reads[0], ())) or ()


def carried(function: Any, key: tuple[str, ...]) -> tuple[str, ...] | None:
    """A key of the first table read under the names that it has in what a kernel makes; None: it is gone, or
    the function does not tell.
    """
    names: dict[str, str] = {}
    for kept in getattr(function, "keeps", ()):
        new, old = (kept, kept) if isinstance(kept, str) else kept
        names.setdefault(old, new)
    return tuple(names[k] for k in key) if names.keys() >= set(key) else None


def lies_here(stage: Lookup, laid: Laid) -> bool:
    """Need nothing travel? The table is everywhere, or rows and table lie by the same key."""
    table = laid.get(stage.table)
    return table == () or lies_beside(stage, laid)


def lies_beside(stage: Lookup, laid: Laid) -> bool:
    """Do rows and table lie by the same key?"""
    table = laid.get(stage.table, ())
    return laid.get(stage.rows) == stage.key and len(table) == len(stage.key)
