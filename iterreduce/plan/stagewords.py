"""A loop's stages as lines of text: what each makes of what, and what moves between ranks.

For any loop, also one that was written in nouns. What does not move anything says nothing of moving. Nothing
is planned here; where rows lie is asked of `iterreduce.laid`, as the engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from iterreduce.columns.aggregators import Aggregator
from iterreduce.laid import laid_out, lay_out, lies_beside, lies_here
from iterreduce.loop import (
    Gather,
    Index,
    Local,
    Lookup,
    Loop,
    Number,
    Shuffle,
    Stage,
    Superstep,
    Total,
    Write,
    names_of_sources,
)
from iterreduce.plan.groupkernels import GroupHere
from iterreduce.plan.kernels import Columns, Compute, Keep
from iterreduce.plan.tree import plain

Behind = Callable[[str, Stage], str]  # superstep and stage -> what stands behind its line

KERNELS = {
    "Concat": "all rows",
    "FirstRows": "the first rows",
    "OneRow": "the row",
    "ChooseRows": "chosen rows",
}


def stages(loop: Loop, behind: Behind = lambda step, stage: "") -> list[str]:
    """The lines of a loop."""
    return [plain(line) for line in _loop(loop, laid_out(loop), behind, "", inner=False)]


def _loop(
    loop: Loop, around: Mapping[str, tuple[str, ...]], behind: Behind, within: str, inner: bool
) -> Iterator[str]:
    laid = {**around, **laid_out(loop, around)}
    for name, source in loop.sources.items():
        if isinstance(source, Loop):
            yield f"before, for {name}:"
            yield from (f"  {line}" for line in _loop(source, {}, behind, "", inner=False))
    once = loop.until.rules and len(loop.body) == 1 and not _stages_of(loop.body[0]) and not inner
    if loop.prepare:
        yield "once:" if once else "before the first iteration:"
        so_far: dict[str, tuple[str, ...]] = {n: k for n, k in laid.items() if n in names_of_sources(loop)}
        yield from _part(loop.prepare, so_far, behind, f"{within}prepare")
    for step in loop.body:
        if isinstance(step, Loop):
            yield f'loop "{step.name}", in each iteration:'
            named = f"{within}{loop.name}/{step.name}: "
            yield from (f"  {line}" for line in _loop(step, laid, behind, named, inner=True))
        elif not once:
            yield f"in each iteration, {step.name}:"
            yield from _part(step.stages, laid, behind, f"{within}{step.name}", again=True)
            yield from (f"  {write(w)}" for w in step.writes)
    if loop.finish:
        yield "after the last iteration:"
        yield from _part(loop.finish, laid, behind, f"{within}finish")


def _stages_of(step: Superstep | Loop) -> tuple[Any, ...]:
    return step.stages if isinstance(step, Superstep) else (step,)


def _part(
    given: tuple[Stage, ...], laid: dict[str, tuple[str, ...]], behind: Behind, step: str, again: bool = False
) -> Iterator[str]:
    for stage in given:
        moved = moves(stage, laid)
        moved = moved if again else moved.partition(";")[0]
        lay_out(stage, laid)
        yield f"  {words(stage)}{f' -- {moved}' if moved else ''}{behind(step, stage)}"


def words(stage: Stage) -> str:
    """What a stage makes of what."""
    if isinstance(stage, Local):
        return f"{stage.into}: {function(stage.function)} of {', '.join(stage.reads)}"
    if isinstance(stage, Index):
        tables = ", ".join(dict.fromkeys(stage.keys.values()))
        return f"{stage.into} and {tables}: {stage.rows} indexed by {' and '.join(stage.keys)}"
    if isinstance(stage, Lookup):
        return f"{stage.into}: {stage.rows} {_looked_up(stage)}, by {', '.join(stage.key)}"
    if isinstance(stage, Gather):
        return f"{stage.into}: all rows of {stage.rows}"
    if isinstance(stage, Number):
        return f"{stage.into}: {stage.rows} with their numbers"
    if isinstance(stage, Total):
        by = f" by {', '.join(stage.key)}" if stage.key else ""
        return f"{stage.into}: {reduced(stage.aggregators)} of {stage.rows}{by}"
    onto = f", onto {stage.onto}" if stage.onto else ""
    joined = f" joined with {stage.joined.table}" if stage.joined else ""
    if stage.route is not None:
        return f"{stage.into}: {stage.rows} sorted by {', '.join(stage.key)}"
    if stage.combine is None:
        return f"{stage.into}: {stage.rows} to the owners of {', '.join(stage.key)}"
    what, by = reduced(stage.combine), ", ".join(stage.key)
    settled = ", until no row improves" if stage.settle else ", where it improves" if stage.improves else ""
    return f"{stage.into}: {what} of {stage.rows}{joined} by {by}{onto}{settled}"


def _looked_up(stage: Lookup) -> str:
    if stage.missing == "only":
        return f"without a match in {stage.table}"
    if not stage.columns:
        return f"with a match in {stage.table}"
    null = " or null" if stage.missing == "null" else ""
    return f"with {', '.join(stage.columns)} of {stage.table}{null}"


def reduced(given: Any) -> str:
    """Aggregators in words."""
    if isinstance(given, Aggregator):
        return str(given)
    return ", ".join(f"{name} = {aggregator}" for name, aggregator in given.items())


def function(given: Any) -> str:
    """What a `Local` calls."""
    if isinstance(given, Compute):
        return ", then ".join(_step(step) for step in given.steps) or "the rows"
    if isinstance(given, GroupHere):
        what = reduced(dict(given.aggregates))
        return f"{what} by {', '.join(given.keys)}, where the rows are,"
    kernel = KERNELS.get(type(given).__name__, type(given).__name__) if hasattr(given, "run") else ""
    return str(getattr(given, "__name__", kernel or "a function"))


def _step(step: Columns | Keep) -> str:
    if isinstance(step, Keep):
        return f"filter {step.predicate}"
    shown = (name if str(tree) == name else f"{name} = {tree}" for name, tree in step.trees)
    return f"{'with' if step.rest else 'select'} {', '.join(shown)}"


def write(given: Write) -> str:
    """A write in words."""
    table = getattr(given, "table", "") or f'output "{getattr(given, "output", "")}"'
    return f"{type(given).__name__.lower()} {table} by {given.rows}"


def moves(stage: Stage, laid: Mapping[str, tuple[str, ...]]) -> str:
    """What travels between ranks, in words; empty: nothing does."""
    if isinstance(stage, Index):
        return "keys are numbered and rows travel, a word each"
    if isinstance(stage, Gather):
        return "" if laid.get(stage.rows) == () else "its rows travel to every rank"
    if isinstance(stage, Number):
        return "how many rows each rank has"
    if isinstance(stage, Total):
        return "one record of each rank travels" if not stage.key else "a record per key of each rank travels"
    if isinstance(stage, Lookup):
        if lies_here(stage, laid) or lies_beside(stage, laid):
            return ""
        return "keys travel, and values to the ranks that ask; values only, once keys stay"
    if isinstance(stage, Shuffle):
        if stage.joined is not None:
            return "values travel, combined by key"
        if stage.combine is not None:
            return "a record per key travels; values only, once keys stay"
        return "rows travel; values only, once keys stay"
    return ""
