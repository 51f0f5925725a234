"""Checkpoints of a run: agreed with the control reduction, copied at once, written behind the iterations.

What a rank knows alone (a signal came, its write is done, its disk is full, and on rank 0: it is time) are
bits of the status word that it sends with each control reduction anyway. So all ranks learn it together, and
take the next step together:

    due        -> states are copied, sizes agreed, and a thread of each rank writes its share
    all done   -> checksums go to rank 0, whose thread writes the index and publishes by one rename
    published  -> the cost is known, and the pace is planned anew
    a failure  -> it is given up with a warning; the job goes on, and the last good checkpoint stands
    stop       -> what is under way is finished, the state is written at once, and the run ends

What is saved of a loop says `iterreduce.capture`; how it lies on disk, `iterreduce.saving`; when, its
`intervals`. Threads never communicate. How it can go wrong: a copy needs as much memory as the states; where
the budget has no room the iterations wait for the write instead.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from iterreduce.capture import Captured, copied
from iterreduce.collectives import Group
from iterreduce.errors import (
    CheckpointError,
    DisagreementError,
    FinishedError,
    IterReduceError,
    OtherJobError,
    OutputError,
)
from iterreduce.exchange import STOP
from iterreduce.fingerprints import difference, python
from iterreduce.options import Options
from iterreduce.savedfacts import check_facts
from iterreduce.saving.directory import Attempt
from iterreduce.saving.pacing import Pacing
from iterreduce.saving.planning import Saved
from iterreduce.saving.reading import Checkpoint, newest, whole
from iterreduce.saving.writing import Writing, begin
from iterreduce.sources.agreement import root_decides
from iterreduce.stopping import StopRequest
from iterreduce.table import Table
from iterreduce.version import __version__

#: Bits of the status word of a control reduction, beside those of `iterreduce.exchange`.
DUE, BUSY, LOST, PUBLISHED, UNPUBLISHED = (1 << bit for bit in range(8, 13))
FIRST_RATE = 200e6  # bytes per second that a write is expected to reach before one was seen
LONG_ITERATION = 0.5  # seconds: to wait for a publication costs less than to go on unsaved for another
NOTE_SECONDS = 60.0  # between entries in the history: what a run that is interrupted ran, to a minute
STOP_SECONDS = 0.5  # kept free before a time limit, beside an iteration and a write


class Checkpointer:
    """The checkpoints of one run on one rank.

    ``capture`` gives what to save; ``tell`` emits events, ``tell_place`` those of `iterreduce.events.PLACES`,
    ``emit`` those of any thread: what a watcher raises there, a write fails by. ``warn`` says a warning, on
    rank 0, and does not raise. ``room`` says whether so many bytes fit the budget.
    """

    def __init__(
        self,
        group: Group,
        options: Options,
        tell: Callable[..., None],
        tell_place: Callable[..., None],
        emit: Callable[..., None],
        warn: Callable[[str], None],
        capture: Callable[[], Captured],
        room: Callable[[int], bool],
        stop: StopRequest | None = None,
    ) -> None:
        assert options.checkpoint_dir is not None
        self.group, self.options = group, options
        self.tell, self.tell_place, self.emit, self._warn = tell, tell_place, emit, warn
        self.directory = options.checkpoint_dir
        self.capture, self.room = capture, room
        self.stop = stop or StopRequest(options.time_limit)
        self.attempt: Attempt | None = None
        self.pacing: Pacing | None = None  # rank 0's
        self.job: dict[str, Any] = {}
        self.written = self.failed = 0
        self.restarted_from: int | None = None
        self._number = self._last_failed = 0
        self._why = ""
        self._writing: Writing | None = None
        self._publishing = self._behind = False
        self.copies: dict[str, Table] = {}  # of what this rank writes
        self._began = self._blocked = 0.0
        self._saving: tuple[int, tuple[int, ...], int] = (0, (), 0)  # iteration, path, bytes
        self._longest = self._lasted = 0.0  # iterations, in seconds
        self._noted = time.perf_counter()
        self._started = time.perf_counter()

    # ------------------------------------------------------------------ before the first iteration

    def open(self, job: Mapping[str, Any], iterations: int | None) -> None:
        """Take over the directory. Collective."""
        self.job = dict(job)
        self.attempt = Attempt.open(self.group, self.directory, self.options.fresh)
        if self.group.rank == 0:
            self.pacing = Pacing(
                every=self.options.checkpoint_every,
                mtbf=self.options.mtbf,
                history=self.attempt.history,
                iterations=iterations,
            )

    def refuse_finished(self, job: Mapping[str, Any]) -> None:
        """Raise `FinishedError`: this very job has ended there; or what differs. Collective."""
        assert self.attempt is not None and self.attempt.finished is not None
        self.job = dict(job)
        self._refuse_other(self.attempt.finished, "finished there")
        facts = self.attempt.finished
        raise FinishedError(
            f"this job has finished ({facts.get('outcome')} after {facts.get('iterations')} iterations, says "
            f"{self.directory}); --fresh (fresh=True) runs it again",
            facts,
        )

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None: begin. Collective."""
        assert self.attempt is not None
        saved = newest(self.group, self.attempt, self._warn)
        self._number = max(root_decides(self.group, self.attempt.checkpoints), default=0)
        before = self.attempt.history.entries[:-1]  # rank 0's
        ended = before[-1].end if before and not self.options.fresh else ""
        if saved is None and ended in ("interrupted", "failed"):
            self.tell("restart.anew", attempts=len(before))
        if saved is not None:
            check_facts(saved.facts, saved.tables, saved.path)
            self.attempt.kept = saved.facts.get("kept")
        return saved

    def goes_on(self, before: Checkpointer | None) -> None:
        """The run goes on from what is in memory; what stands in the directory is older. Collective."""
        assert self.attempt is not None
        self._number = max(root_decides(self.group, self.attempt.checkpoints), default=0)
        if before is not None and before.attempt is not None:
            self.attempt.kept = before.attempt.kept

    def counts_on(self, before: Checkpointer) -> None:
        """What was counted while more ranks lived. Local."""
        self.written, self.failed = before.written, before.failed
        self.restarted_from = before.restarted_from

    def forsake(self) -> None:
        """Ranks have died: what is being written is given up. Local."""
        if self._writing is not None:
            self._writing.forsake()
            self._writing = None

    def agree_on(self, job: Mapping[str, Any], saved: Any) -> None:
        """This is the job, and it must be the one that was saved on disk. Collective."""
        self.job = dict(job)
        if isinstance(saved, Checkpoint):
            self._refuse_other(saved.facts, "saved there")

    def keep_rows(self, tables: Mapping[str, Table]) -> None:
        """Save rows that cannot be read again, before the first iteration. Collective."""
        assert self.attempt is not None
        self.attempt.kept = self._number + 1
        self._save((0, ()), True, lambda: Captured(dict(tables), {}))
        if self._last_failed == self._number:
            raise OutputError(f"the rows that cannot be read again could not be saved: {self._why}")

    def kept_rows(self) -> Checkpoint | None:
        """Rows that an attempt before could not read again. Collective."""
        assert self.attempt is not None
        return None if self.attempt.kept is None else whole(self.group, self.attempt, self.attempt.kept)

    def restarted(self, saved: Any, iteration: int, path: tuple[int, ...], seconds: float) -> None:
        """The run has taken up what was saved."""
        if self.pacing is not None:
            self.pacing.restarted(iteration, saved.facts.get("pacing"))
        if not isinstance(saved, Checkpoint):
            return
        self.restarted_from = iteration
        ranks = saved.facts["ranks"]
        self.tell(
            "restart", number=saved.number, iteration=iteration, path=path, ranks=ranks, seconds=seconds
        )

    def ready(self) -> bool:
        """The iterations begin; returns whether they should not, because of a wish to stop. Collective."""
        if self.pacing is not None:
            with contextlib.suppress(MemoryError):
                self.pacing.expect(self.capture().nbytes * self.group.size, FIRST_RATE)
        return self.group.agree_any(bool(self.stop.reason))

    def _refuse_other(self, facts: Mapping[str, Any], what: str) -> None:
        """Raise `OtherJobError` on all ranks unless that was this job. Collective."""
        root_decides(self.group, lambda: self._compare(facts, what))

    def _compare(self, facts: Mapping[str, Any], what: str) -> None:
        then, same_python = facts.get("job"), facts.get("python") == python()
        if not isinstance(then, dict):
            raise CheckpointError(f"{self.directory}: a job was {what} that does not say what it was")
        for part, of in (("loop", "loop"), ("input", "input"), ("settings", "setting")):
            if part not in self.job or part not in then:
                continue
            other = difference(then[part], self.job[part], same_python)
            if other:
                raise OtherJobError(
                    f"{self.directory}: another {of} was {what}: {other}. Give another --checkpoint-dir, or "
                    "--fresh (fresh=True) to begin anew and drop what was saved"
                )

    # ------------------------------------------------------------------ in every iteration

    def says(self) -> int:
        """This rank's bits for the control reduction that ends an iteration."""
        bits, writing = 0, self._writing
        if writing is not None and not self._publishing:
            state = writing.state
            bits = BUSY if state == "writing" else LOST if state == "failed" else 0
        if self.stop.reason:
            bits |= STOP
        if self.group.rank == 0:
            bits |= self._rank_0_says(writing)
        return bits

    def _rank_0_says(self, writing: Writing | None) -> int:
        assert self.pacing is not None
        bits, now = 0, time.perf_counter()
        if self.stop.deadline is not None and now + self._needs() > self.stop.deadline:
            self.stop.request("time limit")
            bits = STOP
        if writing is None:
            return bits | (DUE if self.pacing.due() else 0)
        if self._publishing:
            if writing.published is not None:
                bits |= PUBLISHED if writing.published else UNPUBLISHED
        elif writing.state == "written" and self._lasted >= LONG_ITERATION:
            bits |= DUE if self.pacing.due(finishing=True) else 0
        return bits

    def _needs(self) -> float:
        """Seconds that one more iteration and a write may take."""
        assert self.pacing is not None
        write_seconds = self.pacing.write_seconds or self.pacing.cost_seconds
        return 1.25 * self._longest + 1.5 * write_seconds + STOP_SECONDS

    def after(self, status: int, seconds: float, at: tuple[int, tuple[int, ...]], ended: bool) -> bool:
        """Do what all ranks have just agreed on; ``at``: iteration and path that were committed. Collective.

        Returns whether the run stops here, saved.
        """
        self._longest, self._lasted = max(self._longest, seconds), seconds
        if self.pacing is not None:
            self.pacing.iteration_done(seconds, self._writing is not None)
            if time.perf_counter() - self._noted > NOTE_SECONDS:
                self.note(at[0], "running")
        failed = self.failed
        if self._writing is not None:
            self._go_on(status)
        due = bool(status & DUE) and not status & BUSY and self.failed == failed
        if ended:
            if due:
                self._finish_writing()
        elif status & STOP:
            self.save_now(at)
        elif due:
            self._save(at, blocking=False)
        return bool(status & STOP) and not ended

    def save_now(self, at: tuple[int, tuple[int, ...]]) -> None:
        """Write, and wait until it is published. Collective. Raises `OutputError` where it cannot be."""
        self._finish_writing()
        self._save(at, blocking=True)
        if self._last_failed == self._number:
            raise OutputError(f"the state could not be saved: {self._why}")

    def settle(self) -> None:
        """Finish what is being written: its iteration is committed, though a later one failed. Collective."""
        with contextlib.suppress(CheckpointError):  # taken over; the failure before is what is to be raised
            self._finish_writing()

    def _go_on(self, status: int) -> None:
        """The next step of the write under way. Collective."""
        assert self._writing is not None
        if self._publishing:
            if status & (PUBLISHED | UNPUBLISHED):
                self._settle()
        elif status & LOST:
            self._give_up()
        elif not status & BUSY:  # where the next one is due (long iterations), beside its copy
            self._publishing = True
            self._writing.gather()

    # ------------------------------------------------------------------ a checkpoint

    def _save(
        self,
        at: tuple[int, tuple[int, ...]],
        blocking: bool,
        capture: Callable[[], Captured] | None = None,
    ) -> None:
        """Begin to write, or write; the one before is published meanwhile, if it is not yet. Collective."""
        assert self.attempt is not None
        began, before = time.perf_counter(), self.failed
        self.tell_place("checkpoint.start", number=self._number + 1, iteration=at[0], path=at[1])
        taken, copies, failed, reason = self._taken(blocking, capture or self.capture)
        self._finish_writing()
        if self.failed != before:
            return
        self._began, self._number = began, self._number + 1
        told = [
            json.loads(text) for text in self.group.allgather_bytes(json.dumps([failed, reason]).encode())
        ]
        failed = next((text for text, _ in told if text), "")
        if taken is None or failed:
            self._failed(failed)
            return
        blocking = blocking or any(text for _, text in told)
        chosen = taken.tables if blocking else copies
        tables = {name: Saved(table.batch, table.everywhere) for name, table in chosen.items()}
        iteration, path = at
        self._saving = iteration, path, taken.nbytes
        facts = {
            "job": self.job,
            "python": python(),
            "version": __version__,
            "ranks": self.group.size,
            "kept": self.attempt.kept,
            "pacing": {} if self.pacing is None else self.pacing.remembered(),
            **taken.facts,
        }
        try:
            self._writing = begin(
                self.group,
                self.attempt,
                self._number,
                tables,
                facts,
                per_rank=self.options.checkpoint_files == "rank",
                at=self._at,
            )
        except (OutputError, DisagreementError) as problem:  # the same on all ranks
            self._failed(str(problem))
            return
        self._behind = not blocking
        if self._behind:
            self._writing.start()
        self._blocked = time.perf_counter() - self._began
        if self.pacing is not None:
            self.pacing.copied(self._blocked)
        self.tell(
            "checkpoint.copy",
            number=self._number,
            iteration=iteration,
            path=path,
            bytes=taken.nbytes,
            seconds=self._blocked,
        )
        if blocking:
            self._writing.run()
            self._finish_writing()

    def _taken(
        self, blocking: bool, capture: Callable[[], Captured]
    ) -> tuple[Captured | None, dict[str, Table], str, str]:
        """What to save, its copies unless blocking, what failed, and why it was not copied. Local."""
        copies: dict[str, Table] = {}
        try:
            taken = capture()
            return taken, copies, "", "" if blocking else self._copy(taken, copies)
        except Exception as error:  # the others are waiting in the next collective
            return None, {}, f"{type(error).__name__}: {error}", ""

    def _copy(self, taken: Captured, copies: dict[str, Table]) -> str:
        """Copy what this rank will write; why it was not copied."""
        held = sum(table.batch.nbytes for table in self.copies.values())
        if not self.room(max(0, taken.nbytes - held)):
            return "the memory budget has no room for a copy"
        try:
            for name, table in taken.tables.items():
                if not (table.everywhere and self.group.rank):  # else another rank writes it
                    table = self.copies[name] = copied(table, self.copies.get(name))
                copies[name] = table
        except MemoryError:
            self.copies = {}
            return "there is no memory for a copy"
        return ""

    def _at(self, step: str) -> None:
        self.emit("checkpoint.step", number=self._number, step=step)

    def _finish_writing(self) -> None:
        """Wait for the write under way, and publish it. Collective."""
        writing = self._writing
        if writing is None:
            return
        if not self._publishing:
            writing.wait()
            if self.group.agree_any(writing.state == "failed"):
                self._give_up()
                return
            self._publishing = True
            writing.gather(blocking=True)
        else:
            writing.wait()
        self._settle()

    def _settle(self) -> None:
        """It was published, or could not be. Collective."""
        writing = self._writing
        assert writing is not None and self.attempt is not None
        lost = writing.error if self.group.rank == 0 and not writing.published else None
        error, taken_over = "" if lost is None else str(lost) or repr(lost), isinstance(lost, CheckpointError)
        told = json.loads(self.group.bcast_bytes(json.dumps([error, taken_over]).encode()))
        self._writing, self._publishing = None, False
        if told[1]:
            raise CheckpointError(told[0])
        if told[0]:
            writing.abandon()
            self._failed(told[0])
            return
        iteration, _, nbytes = self._saving
        now = time.perf_counter()
        latency = now - self._began
        waited = 0.0 if self._behind else latency - self._blocked
        self.written += 1
        if self.pacing is not None:
            self.pacing.written(latency, waited)
            self.note(iteration, "running")
        self.tell(
            "checkpoint.published", number=self._number, iteration=iteration, seconds=latency, bytes=nbytes
        )

    def _give_up(self) -> None:
        """Some rank could not write its share. Collective."""
        writing = self._writing
        assert writing is not None
        error = writing.error
        mine = [str(error or ""), isinstance(error, CheckpointError)]
        told = [json.loads(text) for text in self.group.allgather_bytes(json.dumps(mine).encode())]
        writing.abandon()
        self._writing, self._publishing = None, False
        taken_over = next((text for text, taken_over in told if taken_over), None)
        if taken_over is not None:
            raise CheckpointError(taken_over)
        self._failed(next((text for text, _ in told if text), "a rank could not write its share"))

    def _failed(self, reason: str) -> None:
        self.failed += 1
        self._last_failed, self._why = self._number, reason
        if self.pacing is not None:
            self.pacing.failed()
        self.tell("checkpoint.failed", number=self._number, reason=reason)
        self._warn(f"checkpoint {self._number} is given up, the job goes on: {reason}")

    # ------------------------------------------------------------------ the end

    def ended(self, end: str, iteration: int) -> None:
        """The run is over: what is being written is given up. Local."""
        self._at("end")  # a rank that is dead, if only as a thread, gets no further: it leaves all as it is
        if self._writing is not None:
            self._writing.abandon()
            self._writing = None
        self.note(iteration, end)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Mark the job as finished: its results are where they were wanted. Local, rank 0."""
        if self.attempt is not None and self.group.rank == 0:
            job = {part: self.job[part] for part in ("loop", "input", "settings") if part in self.job}
            self.attempt.finish({**facts, "job": job, "python": python()})

    def note(self, iteration: int, end: str) -> None:
        """For the history from which interrupts are learnt; a disk that is full now must not end the job."""
        self._noted = time.perf_counter()
        if self.attempt is not None and self.group.rank == 0:
            try:
                self.attempt.note(iteration=iteration, seconds=time.perf_counter() - self._started, end=end)
            except (OSError, IterReduceError) as error:  # rank 0 alone must not leave the others
                if end != "failed":  # else it has been said already
                    self._warn(f"the history of {self.directory} could not be written: {error}")

    def report(self) -> dict[str, Any]:
        """For the summary; what rank 0 alone knows is there only."""
        plan = self.pacing.plan() if self.pacing is not None else {}
        return {
            "written": self.written,
            "failed": self.failed,
            **({} if self.restarted_from is None else {"restarted_from_iteration": self.restarted_from}),
            **plan,
        }
