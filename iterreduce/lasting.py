"""A run that lasts: what ties a `LoopRun` to its checkpoints.

Before the sources are read the directory is taken over; after the start what was saved takes the place of
what the run begins with; after each commit all ranks do what they have agreed on. Iterations of a driver that
owns its ``while`` are replayed: a program that is started again calls `advance` from the first iteration on,
and gets the positions that it got before, without any work, up to the one that was saved.

What is saved and how it is taken up again says `iterreduce.capture`; this module knows the run's levels and
enters the loops that were open.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from iterreduce.accounting import room_for
from iterreduce.agreement import Guard, caught
from iterreduce.capture import Captured, Restorer, Saved, captured, stored
from iterreduce.carrying import tables_of
from iterreduce.checkpoint import Checkpointer
from iterreduce.control import Heard
from iterreduce.errors import CheckpointError, CheckpointWarning, FinishedError
from iterreduce.fingerprints import described, input_digests, locals_of, opened_first, stopping_rules
from iterreduce.fixpoint import MaxIterations, Outcome
from iterreduce.journal import Journal
from iterreduce.levels import Level, Position, Standing
from iterreduce.loop import Loop
from iterreduce.saving.reading import Checkpoint
from iterreduce.sources.agreement import root_decides
from iterreduce.sources.local import LocalSource
from iterreduce.stopping import StopRequest
from iterreduce.table import BY_BLOCK, Table, everywhere
from iterreduce.transaction import Transaction

#: Positions that are kept for replays: beyond that a driver of its own cannot be followed.
#: They are in memory, and copied for each checkpoint.
MOST_REPLAYED = 500_000


class Lasting:
    """The checkpoints of a `LoopRun`, on this rank. ``loop``: as the user wrote it."""

    _before: Lasting | None  # those of the run while more ranks lived
    _taken_up: bool

    def __init__(self, run: Any, loop: Loop, stop: StopRequest | None, before: Lasting | None = None):
        self.run, self.loop = run, loop
        if before is not None and not before._taken_up:  # ranks died before it had come to anything
            before = before._before or before
        options = run.options if before is None else replace(run.options, fresh=False)
        self._journals: bool = before is None or before._journals
        self.checkpoints: Checkpointer = Checkpointer(
            run.group,
            options,
            run.tell,
            self._tell_place,
            run.events.emit,
            self._warn,
            self._capture,
            self._has_room,
            before.checkpoints.stop if before is not None else stop,
        )
        self.replays: deque[Position] = deque()
        self._saved: Any = None
        self._before = before
        self._taken_up = False
        if before is not None:
            before._before = None
            self.checkpoints.counts_on(before.checkpoints)
        self._has_finished = False  # in an attempt before
        self._journal = Journal()
        self._forgotten = 0  # positions beyond those

    def replay(self) -> Position | Outcome:
        """What `advance` returned when it was called this often: behind the last position that was saved the
        loop may have ended. Raises `CheckpointError`.
        """
        if self._forgotten:
            raise CheckpointError(
                f"{self.checkpoints.directory}: only the first {len(self._journal)} positions of a driver of "
                f"its own were kept, and it had made {self._forgotten} more; run() goes on without them"
            )
        position, ended = self.replays.popleft(), self.run.outcome
        return position if ended is None or self.replays else ended

    def skip_replays(self) -> None:
        """The engine itself drives the run: nobody asks for the positions before."""
        self.replays.clear()
        self._journals, self._journal, self._forgotten = False, Journal(), 0

    # ------------------------------------------------------------------ start

    def open(self, held: Any = None) -> None:
        """Take over the directory, before anything is read. Collective.

        ``held``: the state to go on from is in memory, and so are rows that nobody else can give.
        """
        nested = any(self.run.root.inner)
        limit = next(
            (r.n for r in self.loop.until.rules if isinstance(r, MaxIterations) and not nested), None
        )
        self.checkpoints.open(self._job, limit)
        attempt = self.checkpoints.attempt
        if attempt is not None and attempt.finished is not None:
            self._refuse_finished(attempt.finished)
        before = None if self._before is None else self._before.checkpoints
        if held is not None and (self.run.inherits or (before is not None and before.attempt is not None)):
            self._saved = held
            self.checkpoints.goes_on(before)
            if before is None:
                self._keep_rows()
            return
        self._saved = self.checkpoints.newest()
        self.checkpoints.agree_on(self._job, self._saved)  # what was read is compared when it is
        self._keep_rows()

    def _refuse_finished(self, facts: Mapping[str, Any]) -> None:
        """The job has ended; or one like it, of which something has changed since. With other stopping rules
        it goes on. Collective.
        """
        if not root_decides(self.run.group, lambda: facts.get("until") == stopping_rules(self.loop)):
            return
        sources = dict(self._sources())
        for source in opened_first(sources.values()):
            source.open(self.run.group)
        digests = input_digests(self.run.group, sources, self._guard("what was read"))
        try:
            self.checkpoints.refuse_finished({**self._job, "input": digests})
        except FinishedError:
            self._has_finished = True
            raise

    def take_up(self) -> None:
        """Go on from what was saved, if anything was. Collective."""
        run, started, saved = self.run, time.perf_counter(), self._saved
        guard = self._guard("what was saved")
        self.checkpoints.agree_on(
            {**self._job, "input": input_digests(run.group, dict(self._sources()), guard)}, saved
        )
        if saved is not None and "levels" in saved.facts:
            if "journal" in saved.facts:
                self._journal = self._journal_in(saved, guard)
                self._forgotten = saved.facts["forgotten"]
            else:  # it is in memory, and so is that
                self._journal, self._forgotten = self._journal_until(saved.facts["commits"])
            self._tell_place("restart.start", number=saved.number)
            restore(run, saved, guard)
            self.replays = deque(self._journal.positions(run.returned))
            seconds = time.perf_counter() - started
            self.checkpoints.restarted(saved, run.iteration, run.path, seconds)
            self._end_where_enough()
        self._taken_up, self._before = True, None
        if self.checkpoints.ready() and run.outcome is None:
            run.root.standing.outcome = Outcome.STOPPED_SAVED

    def _end_where_enough(self) -> None:
        """No more iterations are wanted than were saved. Local."""
        run, rules = self.run, self.loop.until.rules
        most = min((rule.n for rule in rules if isinstance(rule, MaxIterations)), default=run.iteration + 1)
        if run.level is run.root and not run.root.standing.at and run.iteration >= most:
            run.root.standing.outcome = run.outcome or Outcome.ITERATIONS_USED

    def _journal_in(self, saved: Saved, guard: Guard) -> Journal:
        """The positions that were saved. Collective."""
        told, made = saved.facts["journal"], Journal()
        if isinstance(told, list):  # none; or as they were written before they were a table
            for entry in told:
                made.append(_position(entry))
            return made
        rows = _restorer(self.run, saved, guard).rows(told["stored"])
        found = guard.run(Journal.of, rows, told["loops"])
        self.run.loader.leave_if_failed(guard)
        return found or made

    def _journal_until(self, commits: int) -> tuple[Journal, int]:
        """The positions of the first commits; and how many of them were forgotten."""
        if self._before is None or not self._journals:
            return Journal(), 0
        known = self._before._journal.until(commits)
        return known, commits - len(known)

    def _sources(self) -> Iterator[tuple[str, Any]]:
        """All sources of all levels, by name."""
        for level in self.run.root.all():
            for name, source in level.loop.sources.items():
                yield (f"{level.label}: {name}" if level.parent else name), source

    def _keep_rows(self) -> None:
        """Rows that cannot be made again are saved once; a restart takes them from there. Collective."""
        found = {name: local for name, source in self._sources() for local in locals_of(source) if local.save}
        if not found:
            return
        kept, guard = self.checkpoints.kept_rows(), self._guard("rows that were saved")
        if kept is None:
            tables = {f"input {name}": Table(local.rows, BY_BLOCK) for name, local in found.items()}
            self.checkpoints.keep_rows(tables)
            return
        for name, local in found.items():
            guard.run(self._give, kept, f"input {name}", local)
        self.run.loader.leave_if_failed(guard)

    def _give(self, kept: Checkpoint, table: str, local: LocalSource) -> None:
        """This rank's share of what was saved: its own rows, on as many ranks as saved them. Local."""
        rank, size = self.run.group.rank, self.run.group.size
        if table not in kept.tables:
            raise CheckpointError(f'{kept.path} holds no rows of "{table}"; --fresh begins anew')
        info = kept.tables[table]
        share = info.rows * rank // size, info.rows * (rank + 1) // size
        own = info.written_by(rank, rank + 1) if kept.ranks == size else share
        local.give(kept.read(table, *own))

    @cached_property
    def _job(self) -> dict[str, Any]:
        options, shop = self.run.options, self.run.shop
        settings = {"partitions": str(shop.partitions.partitions), "reproducible": str(options.reproducible)}
        return {"loop": described(self.loop), "settings": settings}

    def _guard(self, stage: str) -> Guard:
        guard = Guard(self.run.group.rank, 0)
        guard.stage = stage
        return guard

    def _warn(self, text: str) -> None:
        """On rank 0; where warnings are errors, all ranks learn it at the next collective."""
        run = self.run
        if run.group.rank == 0:
            try:
                warnings.warn(text, CheckpointWarning, stacklevel=2)
            except CheckpointWarning as error:
                run._late = run._late or caught(error, "a warning", run.iteration, 0, run.path)

    def _tell_place(self, name: str, **fields: Any) -> None:
        if self.run.events.places:
            self.run.tell(name, **fields)

    # ------------------------------------------------------------------ iterations

    def says(self) -> int:
        """This rank's bits for the control reduction."""
        return self.checkpoints.says()

    def after(self, status: int, seconds: float) -> None:
        """What all ranks agreed on in the control reduction of the iteration just committed. Collective."""
        run = self.run
        if self._journals:
            self._keep(run.position)
        ended = run.outcome is not None
        with run.working():  # copies have their place
            stops = self.checkpoints.after(status, seconds, (run.iteration, run.path), ended)
        if ended and self._journals:  # its driver may never close it
            self.checkpoints.note(run.iteration, "ended")
        if stops:
            run.root.standing.outcome = Outcome.STOPPED_SAVED

    def _keep(self, at: Position) -> None:
        if len(self._journal) < MOST_REPLAYED:
            self._journal.append(at)
        else:
            self._forgotten += 1

    def settle(self) -> None:
        """All ranks leave with the same error: what is being written is finished first. Collective."""
        self.checkpoints.settle()

    def save(self) -> None:
        """Write a checkpoint now. Collective."""
        with self.run.working():
            self.checkpoints.save_now((self.run.iteration, self.run.path))

    def _capture(self) -> Captured:
        taken = captured_run(self.run)
        journal, tables = self._journal, dict(taken.tables)
        facts = {**taken.facts, "journal": [], "forgotten": self._forgotten}
        if len(journal):
            entry = stored("journal", everywhere(journal.rows()), tables)
            facts["journal"] = {"stored": entry["stored"], "loops": journal.names}
        return Captured(tables, facts)

    def _has_room(self, nbytes: int) -> bool:
        return self.run.options.memory_bytes is None or room_for(self.run.memory(), nbytes)

    # ------------------------------------------------------------------ the end

    def ended(self) -> None:
        """The run is over, or failed. Local."""
        outcome = self.run.outcome
        known = outcome is not None or self._has_finished
        end = "stopped" if outcome is Outcome.STOPPED_SAVED else "finished" if known else "failed"
        if end == "failed" and self._journals and sys.exc_info()[0] is None:  # its driver wants no more of it
            end = "ended"
        self.checkpoints.ended(end, self.run.iteration)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """The job is done, its results are written: mark it so."""
        self.checkpoints.finish({**facts, "until": stopping_rules(self.loop)})


# ---------------------------------------------------------------------- a whole run


def captured_run(run: Any) -> Captured:
    """What lasts of a `LoopRun`, as of its last commit. Local; nothing is copied."""
    taken = captured(run.level, run.outputs)
    more = {"partitions": run.shop.partitions.partitions, "commits": run.commits}
    return replace(taken, facts={**taken.facts, **more})


def _restorer(run: Any, saved: Saved, guard: Guard) -> Restorer:
    def to_owners(name: str, keys: tuple[str, ...], share: Table) -> Table:
        moved: Table = run.loader.to_owners(name, keys, replace(share, layout=BY_BLOCK))
        return moved

    return Restorer(run.group, saved, run.shop.partitions.partitions, to_owners, guard)


def restore(run: Any, saved: Saved, guard: Guard) -> None:
    """Put what was captured into a `LoopRun` that has just started. Collective."""
    levels, restorer, level = saved.facts["levels"], _restorer(run, saved, guard), run.root
    level.standing = _with_carry(level, restorer.standing(level, level.standing, 0))
    for number, facts in enumerate(levels[1:], 1):
        level = _entered(run, level, facts["loop"], guard)
        assert level.standing is not None
        level.standing = _with_carry(level, restorer.standing(level, level.standing, number))
    run.level = level
    for name in run.outputs:
        run.outputs[name] = restorer.output(name)
    run.commits = saved.facts.get("commits", 0)


def _entered(run: Any, around: Level, label: str, guard: Guard) -> Level:
    """Begin the inner loop that was open, as an iteration of the outer one begins it. Collective."""
    standing = around.standing
    assert standing is not None
    inner = around.steps[standing.at] if standing.at < len(around.steps) else None
    if not isinstance(inner, Level) or inner.label != label:
        raise CheckpointError(f'the loop "{label}" was open when it was saved, but is not in this body')
    run._now = run._open = now = Transaction()
    run._enter(inner, standing, guard)
    run.loader.leave_if_failed(guard)
    bits = 0
    for told in run.group.allgather_bytes(str(now.changed()).encode()):
        bits |= int(told)
    now.commit(Heard(0, bits, ()), inner)
    return inner


def _with_carry(level: Level, standing: Standing) -> Standing:
    standing.bindings.update(tables_of(level.loop.carry, standing.carry))
    return standing


def _position(entry: list[Any]) -> Position:
    iteration, residual, path, loops = entry
    told = None if residual is None else float.fromhex(residual)
    return Position(iteration, told, tuple(path), tuple(loops))
