"""What the tests of the engine share: dealing rows to ranks, looking at all of them, and small loops.

Everything takes a `Group`, so that the same checks run on threads and on real ranks. Rows are looked at as
plain Python values, gathered by a road of its own (JSON over `allgather_bytes`), never by the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Ragged
from iterreduce.driver import LoopRun
from iterreduce.errors import IterReduceError
from iterreduce.events import Events
from iterreduce.fixpoint import MaxIterations, Outcome, Until
from iterreduce.loop import Loop, Replace, Stage, State, Superstep
from iterreduce.options import Options
from iterreduce.run import Result, run_loop
from iterreduce.sources import LocalSource
from iterreduce.table import Table

Check = Callable[[Group], None]
Row = tuple[Any, ...]


def share(rows: Batch, group: Group, ends: Sequence[int] | None = None) -> Batch:
    """This rank's rows: equal shares, or those up to ``ends[rank]``."""
    n = len(rows)
    if ends is None:
        return rows.slice(n * group.rank // group.size, n * (group.rank + 1) // group.size)
    return rows.slice(0 if group.rank == 0 else ends[group.rank - 1], ends[group.rank])


def local(rows: Batch, group: Group, ends: Sequence[int] | None = None) -> LocalSource:
    """A source of rows that are dealt to the ranks."""
    return LocalSource(share(rows, group, ends))


def all_on(group: Group, n: int, rank: int) -> list[int]:
    """The ``ends`` of a deal that gives all ``n`` rows to one rank."""
    return [0 if r < rank % group.size else n for r in range(group.size)]


def values_of(batch: Batch, name: str) -> list[Any]:
    """A column as Python values; None where it is null."""
    column, mask = batch[name], batch.valid(name)
    values = column.to_list() if isinstance(column, Ragged) else column.tolist()
    values = [v.decode("latin-1") if isinstance(v, bytes) else v for v in values]
    return (
        values if mask is None else [v if ok else None for v, ok in zip(values, mask.tolist(), strict=True)]
    )


def rows_here(batch: Batch) -> list[Row]:
    """The rows of a batch as tuples."""
    return list(zip(*(map(as_tuple, values_of(batch, n)) for n in batch.names), strict=True))


def as_tuple(value: Any) -> Any:
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value


def by_rank(group: Group, batch: Batch) -> list[list[Row]]:
    """Every rank's rows, on all ranks. Collective."""
    told = group.allgather_bytes(
        json.dumps([batch.names, [values_of(batch, n) for n in batch.names]], default=str).encode()
    )
    out = []
    for names, columns in map(json.loads, told):
        assert not columns or tuple(names) == batch.names
        out.append([tuple(map(as_tuple, row)) for row in zip(*columns, strict=True)])
    return out


def rows_of(group: Group, table: Table | Result) -> list[Row]:
    """All rows of a table, in rank order; what is everywhere must be the same on all ranks. Collective."""
    ranks = by_rank(group, table.batch)
    if table.everywhere:
        assert all(repr(rows) == repr(ranks[0]) for rows in ranks), "not the same on all ranks"
        return ranks[0]
    return [row for rows in ranks for row in rows]


def same(group: Group, text: str) -> str:
    """The text, after a check that all ranks hold the same. Collective."""
    told = group.allgather_bytes(text.encode())
    assert len(set(told)) == 1, [t.decode() for t in told]
    return text


def pipeline(sources: dict[str, Any], *stages: Stage, result: str | None = None) -> Loop:
    """Stages that run once, as a loop of one iteration."""
    into = result or stages[-1].into
    step = Superstep("once", stages, (Replace("out", into),))
    return Loop("pipeline", sources, {"out": State("")}, (step,), Until((MaxIterations(1),)), "out")


def once(group: Group, sources: dict[str, Any], *stages: Stage, options: Options | None = None) -> Table:
    """The table that the last of these stages makes. Collective."""
    run = LoopRun(pipeline(sources, *stages), group, options)
    run.run()
    return run.tables["out"]


def looping(
    sources: dict[str, Any],
    state: dict[str, State],
    stages: Sequence[Stage],
    writes: dict[str, str],
    until: Any = None,
    most: int | None = 4,
    **more: Any,
) -> Loop:
    """A loop of one superstep."""
    step = Superstep("step", tuple(stages), tuple(Replace(t, r) for t, r in writes.items()))
    rules = Until.of(until, most) if until is not None else Until((MaxIterations(most or 4),))
    return Loop("looping", sources, state, (step,), rules.on(next(iter(state))), next(iter(state)), **more)


def started(loop: Loop, group: Group, events: Events | None = None, **options: Any) -> LoopRun:
    """A run that is ready for its first iteration."""
    return LoopRun(loop, group, Options(**options), events)


def ran(loop: Loop, group: Group, **options: Any) -> Result:
    """The result of running to the end. Collective."""
    return run_loop(loop, group, Options(**options))


def raised(group: Group, kind: type[BaseException], work: Callable[[], Any]) -> BaseException:
    """The error that ``work`` raises on every rank: of this kind, with the same text. Collective.

    Afterwards the communicator must be clean: the ranks talk to each other to compare.
    """
    found: BaseException | None = None
    try:
        work()
    except BaseException as error:
        found = error
    same(group, f"{type(found).__name__}: {found}")
    if found is None:
        pytest.fail(f"nothing was raised; wanted {kind.__name__}")
    if type(found) is not kind and not (isinstance(found, kind) and issubclass(kind, IterReduceError)):
        raise found
    return found


def int_rows(n: int, keys: int, seed: int = 0) -> Batch:
    """Random rows: k int64 (also negative), x int64, f float64 (whole numbers: sums are exact)."""
    random = np.random.default_rng(seed)
    return Batch(
        k=random.integers(-keys // 2, keys // 2 + 1, n),
        x=random.integers(-50, 50, n),
        f=random.integers(0, 100, n).astype(np.float64),
    )


def distinct(rows: Sequence[Row], column: int = 0) -> set[Any]:
    """The values in one place of the rows."""
    return {row[column] for row in rows}


__all__ = [
    "Check",
    "Outcome",
    "Row",
    "all_on",
    "as_tuple",
    "by_rank",
    "distinct",
    "int_rows",
    "local",
    "looping",
    "once",
    "pipeline",
    "raised",
    "ran",
    "rows_here",
    "rows_of",
    "same",
    "share",
    "started",
    "values_of",
]


def folding_of(work: Any) -> Any:
    """The stage that folds, also where another stands behind it for what cannot be folded."""
    return getattr(work, "folding", work)
