"""Run a loop from beginning to end, and say what came of it.

The outermost ring of the engine: a group and a loop go in, a `Result` comes out. It reads no files of its
own and prints nothing; the command line and library users call the same function.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import hash_keys, row_sums
from iterreduce.columns.ordering import hash_order
from iterreduce.columns.placement import Placement
from iterreduce.columns.schema import never_null
from iterreduce.copies import Copies
from iterreduce.cores import one_blas_thread
from iterreduce.epochs import Refilled
from iterreduce.errors import FinishedError
from iterreduce.events import Events
from iterreduce.fixpoint import MaxIterations, Outcome
from iterreduce.lasting import Lasting
from iterreduce.loop import Loop
from iterreduce.options import Options
from iterreduce.recovery import LoopRun, Loss, enduring, remembered
from iterreduce.stopping import StopRequest
from iterreduce.table import BY_BLOCK, Layout, Table

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """Rows that iterations kept, in the order of iterations: this rank's share, and where such rows lie."""

    batch: Batch
    layout: Layout

    @property
    def everywhere(self) -> bool:
        """Are they the same on all ranks?"""
        return self.layout.kind == "everywhere"

    def __getitem__(self, column: str) -> Any:
        """A column of this rank's share."""
        return self.batch[column]


@dataclass(frozen=True)
class Result:
    """What a run gives back. ``batch`` is this rank's share of the result (all of it where ``everywhere``).

    ``seconds``: load, invariants, iterate, total, on this rank. ``bytes_exchanged``: payload that left this
    rank for others: invariants (int), per_iteration (list), total; ``bytes_read``: what this rank read of the
    files of its sources. ``result_sha256`` does not depend on the order of rows or on how they are spread;
    float sums may differ in their last bits between numbers of ranks, and then so does it, unless the run was
    ``reproducible``. ``values`` holds the loop's named numbers and its carry; ``outputs`` what its iterations
    kept by `Sink`; ``memory_bytes`` what this rank held at the end, by name. ``checkpoints``: written,
    failed, restarted_from_iteration, and on rank 0 how often and why; empty without a directory.
    ``recoveries``: one entry for each time that ranks died and the others went on: lost, survivors, origin,
    iteration, recomputed, seconds; ``copies`` of the state that were made for that: how many (made), their
    seconds on this rank, and how often they were to be made (every). ``scratch_bytes``: with a budget and a
    scratch directory, the most that this rank's large arrays took in memory (memory_peak) and in files
    (peak), and all that was ever put into files (total). A run that was told to stop has the outcome
    STOPPED_SAVED, and no rows: the same call on the same directory goes on.
    """

    outcome: Outcome
    iterations: int
    residual: float | None
    batch: Batch
    everywhere: bool
    values: dict[str, float | int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_per_iteration: list[float] = field(default_factory=list)
    bytes_exchanged: dict[str, Any] = field(default_factory=dict)
    bytes_read: int = 0
    result_sha256: str = ""
    reproducible: bool = False
    memory_bytes: dict[str, int] = field(default_factory=dict)
    threads: int = 1
    outputs: dict[str, Output] = field(default_factory=dict)
    checkpoints: dict[str, Any] = field(default_factory=dict)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    copies: dict[str, Any] = field(default_factory=dict)
    scratch_bytes: dict[str, int] = field(default_factory=dict)
    _lasting: Lasting | None = field(default=None, repr=False, compare=False)
    _place: Placement | None = field(default=None, repr=False, compare=False)
    _again: Callable[[], Result] | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, column: str) -> Any:
        """A column of this rank's share."""
        return self.batch[column]

    def finish(self) -> None:
        """Mark the job of the checkpoint directory as finished, when its results are where they were wanted.

        A run on that directory then raises `FinishedError`, unless it is ``fresh``. Local.
        """
        if self._lasting is not None and self.outcome is not Outcome.STOPPED_SAVED:
            self._lasting.finish(
                {
                    "outcome": self.outcome.name,
                    "iterations": self.iterations,
                    "result_sha256": self.result_sha256,
                }
            )


def run_loop(
    loop: Loop,
    group: Group,
    options: Options | None = None,
    events: Events | None = None,
    stop: StopRequest | None = None,
) -> Result:
    """Run to the end on this group. Collective.

    Raises the same error on all ranks; the group is usable afterwards.
    """
    return _run_to_end(LoopRun(loop, group, options, events, stop), stop)


def _run_to_end(run: LoopRun, stop: StopRequest | None) -> Result:
    loop, group, started, sent = run.loop, run.group, time.perf_counter(), run.group.traffic.payload_bytes
    limit = next((r.n for r in loop.until.rules if isinstance(r, MaxIterations)), None)
    run.tell("run.start", name=loop.name, rank=group.rank, size=group.size, max_iterations=limit)

    def ends(outcome: Outcome | None) -> None:
        run.tell(
            "run.end",
            outcome=outcome and outcome.name,
            iterations=run.iteration,
            residual=run.residual,
            seconds=time.perf_counter() - started,
        )

    def to_end() -> Result:
        with run.working(), one_blas_thread():
            outcome = run.run()
            if outcome is not Outcome.STOPPED_SAVED:
                run.finish()
            result = _result(run, outcome, time.perf_counter() - started, group.traffic.payload_bytes - sent)
        ends(outcome)
        run.settle()
        return result

    try:
        result = run.enduring(to_end)
    except (FinishedError, Refilled) as end:  # there was nothing to run; it is run anew
        if isinstance(end, Refilled):
            run.leave()
        raise
    except BaseException:
        ends(None)
        raise
    finally:
        run.close()
    if not group.heals:
        run.let_go()
        return result
    if run.options.respawn:
        run.leave()
    again, copies = _Again(run.written, group, run.options, run.events, stop), remembered(run)
    return replace(result, _again=partial(again, copies))


@dataclass(frozen=True)
class _Again:
    """A run that has ended, to be made once more where its result is lost with ranks that died."""

    loop: Loop
    group: Group
    options: Options
    events: Events
    stop: StopRequest | None

    def __call__(self, copies: Copies | None) -> Result:
        """Collective."""
        options = replace(self.options, fresh=False)
        return _run_to_end(LoopRun(self.loop, self.group, options, self.events, self.stop, copies), self.stop)


def delivered(result: Result, group: Group, deliver: Callable[[Result], T]) -> T:
    """``deliver(result)``, such as a write; where ranks die with their shares, of the run made once more.
    Collective.
    """
    held = [result]

    def again(loss: Loss) -> None:
        if result._again is not None:
            held[0] = result._again()

    def work() -> T:
        with held[0]._place or nullcontext():  # what a writer makes keeps to the budget, too
            return deliver(held[0])

    return enduring(group, work, again)


def _result(run: LoopRun, outcome: Outcome, seconds: float, sent: int) -> Result:
    stopped, clock = outcome is Outcome.STOPPED_SAVED, run.clock
    table = Table(Batch(), BY_BLOCK) if stopped else canonical(run.tables[run.loop.result])
    per_iteration = run.bytes_iterations
    return Result(
        outcome=outcome,
        iterations=run.iteration,
        residual=run.residual,
        batch=table.batch,
        everywhere=table.everywhere,
        values={} if stopped else run.values,
        outputs=_outputs(run),
        seconds={
            "load": clock.load,
            "invariants": clock.invariants,
            "iterate": clock.iterate,
            "total": seconds,
        },
        seconds_per_iteration=clock.iterations,
        bytes_exchanged={"invariants": run.bytes_invariants, "per_iteration": per_iteration, "total": sent},
        bytes_read=run.bytes_read + run.loader.bytes_read,
        result_sha256="" if stopped else digest(table, run.group),
        reproducible=run.options.reproducible,
        memory_bytes=dict(run.memory().report()),
        threads=run.pool.threads,
        checkpoints={} if run.lasting is None else run.lasting.checkpoints.report(),
        recoveries=run.recoveries,
        copies={} if run.copies is None else run.copies.report(),
        scratch_bytes={} if run.place is None else run.place.report(),
        _lasting=run.lasting,
        _place=run.place,
    )


def canonical(table: Table) -> Table:
    """Rows by key in the order of their hashes, so that a result does not tell how many ranks made it.

    Within a run they may stand in any order that pays, such as that of the numbers of an `Index`.
    """
    if table.layout.kind != "key":
        return table
    hashes = hash_keys(table.batch.select(*table.layout.keys))
    if len(hashes) < 2 or not (hashes[1:] < hashes[:-1]).any():
        return table
    return replace(table, batch=table.batch.take(hash_order(hashes)))


def _outputs(run: LoopRun) -> dict[str, Output]:
    """What iterations sank, in their order."""
    out = {}
    for name, sunk in run.outputs.items():
        parts = [table.batch for table in sunk if len(table)] or [table.batch for table in sunk[:1]]
        out[name] = Output(Batch.concat(parts) if parts else Batch(), sunk[0].layout if sunk else BY_BLOCK)
    return out


def digest(table: Table, group: Group) -> str:
    """sha256 of a table's schema and rows, whatever their order or the number of ranks. Collective.

    Rows are hashed one by one (two 64-bit hashes), and the hashes added: integer sums have no order.
    """
    batch = table.batch
    sums = np.zeros(3, np.int64)
    if not (table.everywhere and group.rank) and batch.names:
        sums[:] = (*row_sums(batch), len(batch))
    group.allreduce(sums, "sum")
    # ranks may differ in what has nulls, those without rows also in dtypes: the first with rows speaks
    told = group.allgather_bytes(f"{min(1, len(batch))}{never_null(batch.schema).to_json()}".encode())
    schema = next((t for t in told if t.startswith(b"1")), told[0])
    return hashlib.sha256(schema[1:] + sums.tobytes()).hexdigest()
