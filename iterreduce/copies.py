"""Copies of a run's state in the memory of other ranks: from there it goes on when a rank dies.

Every so often, when all ranks have agreed to in a control reduction, each rank packs its rows of what
`iterreduce.capture` names into words, keeps them, and sends them to the next rank, which keeps them too: one
exchange. What is everywhere is copied on each rank and sent nowhere; columns that have not changed since the
copy before, as their tokens say, are neither packed nor sent again (`iterreduce.parts`). Two generations are
kept, so one is whole while the other is made; a rank that reaches the next control reduction has all of its
own, so when all have come there the older one may go.

After a loss the survivors tell each other what they hold (`newest`). A generation counts if every rank's part
of it is held by somebody; `Remembered` then is what `capture.Restorer` reads from, as from a checkpoint. Two
neighbours that die at once take both copies of a part with them.

What it is not: it knows no loop, and heals nothing (`iterreduce.recovery`). Memory: twice this rank's rows
and those of the one before; where the budget has no room for it there are no copies.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.capture import Captured, copied
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema, either_null, never_null
from iterreduce.parts import Part, Share, halves, tokens_of
from iterreduce.sources.blocks import of_schema
from iterreduce.table import Table

#: A bit of the status word of a control reduction, beside those of `iterreduce.checkpoint`.
COPY = 1 << 13
#: Of the time that a run has iterated, what copies may take where nobody says how often they are made.
MOST_SHARE = 0.03
#: What the first is thought to take: packed, sent and received, all of it in memory that is new.
FIRST_BYTES_PER_SECOND, FIRST_SECONDS = 0.5e9, 1e-3
FAILED = -1  # in place of a size
EVERYWHERE = -1  # in place of a part: who holds the generation at all


@dataclass
class Steady:
    """Columns that stay, of this rank and of the one before it: generations have them in common."""

    tokens: tuple[tuple[str, int, str, int], ...]
    tables: list[str]
    own: Part
    other: Part | None = None


@dataclass
class Generation:
    """The state after a number of commits, as far as this rank holds it. ``parts``: of ranks, by the numbers
    that they had in that epoch.
    """

    commits: int
    epoch: int
    size: int
    facts: dict[str, Any]
    shared: dict[str, Table]  # what is everywhere
    parts: dict[int, Share]
    spread: bool  # is there anything else?
    fits: bool = True
    own: int = -1  # this rank's number then

    @property
    def name(self) -> tuple[int, int]:
        return self.commits, self.epoch

    def told(self) -> list[Any]:
        """What the others are told of it."""
        return [self.commits, self.epoch, self.size, sorted(self.parts), self.spread]


class Copies:
    """The generations of one run on this rank.

    ``every``: made after so many commits; 0: never; None: as often as it costs little.
    """

    def __init__(self, group: Group, every: int | None) -> None:
        self.group, self.every = group, every
        self.held: list[Generation] = []
        self.inputs: list[Generation] = []  # rows that nobody else can give
        self.made, self.seconds = 0, 0.0
        self.of_run = 0  # its number among those of the program
        self._off, self._spread = every == 0, False
        self._since, self._spent = time.perf_counter(), 0.0
        self._expected: float | None = None  # what the next will take
        self._plans: dict[int, tuple[tuple[int, ...], Array, Array, Any]] = {}
        self._steady: Steady | None = None
        self._epoch = group.epoch
        self.rest()

    def serve(
        self,
        capture: Callable[[], tuple[int, Captured]],
        room: Callable[[int], bool],
        tell: Callable[..., None],
        sinks: bool,
        working: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Copy what this run captures. ``capture``: commits so far and their state; ``room``: do so many
        bytes fit? ``sinks``: rows that were sunk are put together anew each time, which may fail on one rank.
        ``working``: arrays have their place meanwhile.
        """
        self.capture, self.room, self.tell, self.sinks = capture, room, tell, sinks
        self.working = working
        self._steady = None

    def rest(self) -> None:
        """The run has ended: hold nothing but what was copied."""

        def nothing() -> tuple[int, Captured]:
            raise AssertionError("copies of no run")

        self.serve(nothing, lambda nbytes: True, lambda *args, **fields: None, False)

    def begin(self) -> None:
        """The run iterates from now on: what copies take is held against that time."""
        self._since, self._spent = time.perf_counter(), 0.0

    @property
    def oldest(self) -> int:
        """The commits of the oldest generation that may be needed; 0 while there are not two."""
        return self.held[0].commits if len(self.held) > 1 else 0

    # -- while all is well

    def says(self, commits: int) -> int:
        """This rank's bit for the control reduction that ends an iteration: rank 0 says when."""
        if self._off or self.group.rank or self.group.size == 1:
            return 0
        if self.every is not None:
            return COPY if (commits + 1) % self.every == 0 else 0
        return COPY if self._is_cheap() else 0

    def _is_cheap(self) -> bool:
        """Whether copies, with one more, take no more than their share of the time so far. Rank 0."""
        if self._expected is None:
            try:
                nbytes = self.capture()[1].nbytes
            except MemoryError:  # `make` says so, on all ranks
                nbytes = 0
            self._expected = FIRST_SECONDS + nbytes / FIRST_BYTES_PER_SECOND
        return self._spent + self._expected <= MOST_SHARE * (time.perf_counter() - self._since)

    def took(self, seconds: float) -> None:
        """One was made; the next is thought to take as long."""
        self.made, self._expected = self.made + 1, seconds
        self.seconds, self._spent = self.seconds + seconds, self._spent + seconds

    def report(self) -> dict[str, Any]:
        """For the summary; nothing where there are none."""
        if self._off or self.group.size == 1:
            return {}
        return {
            "made": self.made,
            "seconds": self.seconds,
            "every": "if cheap" if self.every is None else self.every,
        }

    def after(self, status: int) -> None:
        """Make one, if all have agreed to. Collective."""
        if len(self.inputs) > 1:  # all ranks have the last by now
            del self.inputs[0]
        if status & COPY:
            with self.working():
                self.make()

    def make(self) -> None:
        """Copy the state as it is now. Collective."""
        if self._off or self.group.size == 1:
            return
        started = time.perf_counter()
        if self._epoch != self.group.epoch:
            self._plans, self._steady, self._epoch = {}, None, self.group.epoch
        old = self.held.pop(0) if len(self.held) > 1 else None
        made, steady = self._made(old)
        if (made.spread or self.sinks) and not self._exchanged(made, steady, self.made & 1):
            self._give_up()
            return
        if made.fits:
            self.held.append(made)
        self.took(time.perf_counter() - started)

    def _made(self, old: Generation | None) -> tuple[Generation, Steady | None]:
        """What this rank has of the state, and the columns of it that may stay."""
        made, steady = Generation(0, self.group.epoch, self.group.size, {}, {}, {}, self._spread), None
        try:
            made.commits, taken = self.capture()
            made.facts = taken.facts
            spread = {n: t for n, t in taken.tables.items() if not t.everywhere}
            made.spread = self._spread = bool(spread)
            known = {} if old is None else old.shared
            here = {n: t for n, t in taken.tables.items() if t.everywhere}
            made.shared = {n: copied(t, known.get(n)) for n, t in here.items()}
            steady = self._stays(spread)
            plan = self._plans.get(self.made & 1)
            names = {n: t.batch.names for n, t in spread.items()}
            new = {n: halves(t)[0] for n, t in spread.items()}
            share = Share(Part.of(new, None if plan is None else plan[1], names), steady.own)
            made.parts = {self.group.rank: share}
            more = 0 if plan is not None else share.new.words.nbytes
            more += 0 if steady is self._steady else steady.own.words.nbytes
            made.fits = self.room(2 * more)
        except MemoryError:
            made.fits = False
        return made, steady

    def _stays(self, spread: Mapping[str, Table]) -> Steady:
        """The columns that stay: those that were copied last, if they are the same."""
        tokens = tokens_of(spread)
        if self._steady is not None and (self._steady.tokens, self._steady.tables) == (tokens, [*spread]):
            return self._steady
        return Steady(tokens, [*spread], Part.of({n: halves(t)[1] for n, t in spread.items()}))

    def _give_up(self) -> None:
        """There is no memory for copies, on all ranks: the run goes on without."""
        self.held, self._plans, self._steady, self._off = [], {}, None, True
        self.tell("recovery.nocopies")

    def _exchanged(self, made: Generation, steady: Steady | None, number: int) -> bool:
        """Takes in the share of the rank before; False, on all ranks, where one has no room for it.
        Collective.
        """
        group, nothing = self.group, np.zeros(0, np.int64)
        new = made.parts[group.rank].new.words if made.fits else nothing
        stays = not made.fits or steady is None or steady is self._steady
        same = nothing if stays or steady is None else steady.own.words
        sizes = np.empty(2 * group.size, np.int64)
        mine = [len(new) if made.fits else FAILED, len(same)]
        group.allgather(np.array(mine), sizes, header_words=2)
        if (sizes[::2] == FAILED).any():
            return False
        before = (group.rank - 1) % group.size
        received = self._stayed(same, sizes[1::2].tolist())
        if steady is not None:
            known = None if self._steady is None else self._steady.other
            steady.other = Part.read(received) if received is not None else known
        known_plan = self._plans.get(number)
        if known_plan is None or known_plan[0] != tuple(sizes[::2].tolist()):  # else these are its words
            known_plan = self._plans[number] = self._planned(new, sizes[::2].tolist())
        known_plan[3].run()
        other = Part.read(known_plan[2])
        made.parts[before] = Share(other, None if steady is None else steady.other)
        self._steady = steady
        return True

    def _stayed(self, words: Array, sizes: list[int]) -> Array | None:
        """Columns that will stay, of the rank before; None where they are those of last time. Collective."""
        if not any(sizes):
            return None
        plan = self._planned(words, sizes)
        plan[3].run()
        return plan[2] if len(plan[2]) else None

    def _planned(self, words: Array, sizes: list[int]) -> tuple[tuple[int, ...], Array, Array, Any]:
        """To the next rank, from the one before. Collective."""
        group = self.group
        to, source = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        received = np.empty(sizes[source], np.int64)
        out = [len(words) if rank == to else 0 for rank in range(group.size)]
        into = [sizes[source] if rank == source else 0 for rank in range(group.size)]
        plan = group.alltoallv_plan(words, out, None, received, into, None)
        return tuple(sizes), words, received, plan

    # -- rows that nobody else can give

    def keep_inputs(self, inputs: Mapping[str, Batch]) -> None:
        """Copy rows that the ranks were given, once: they cannot be read again. Collective."""
        if self._off or self.group.size == 1 or not inputs:
            return
        group = self.group
        own = Share(Part.of(inputs))
        made = Generation(0, group.epoch, group.size, {}, {}, {group.rank: own}, True)
        made.own = group.rank
        made.fits = self.room(2 * own.new.words.nbytes)
        known, self._plans, steady, self._steady = self._plans, {}, self._steady, None
        good = self._exchanged(made, None, 0)
        self._plans, self._steady = known, steady
        if good:
            self.inputs.append(made)

    # -- after a loss

    def newest(self) -> Remembered | None:
        """The newest generation of which the survivors hold all parts. Collective."""
        found = whole(self.group, self.held)
        self.held = [] if found is None else [made for made in self.held if made.name == found.name]
        return found


def whole(group: Group, held: Sequence[Generation]) -> Remembered | None:
    """The newest generation of which all parts are held by somebody, ready to be read. Collective."""
    told = [json.loads(text) for text in group.allgather_bytes(json.dumps([g.told() for g in held]).encode())]
    found: dict[tuple[int, int], dict[int, list[int]]] = {}  # by name: the ranks that hold each part
    sizes: dict[tuple[int, int], int] = {}
    for rank, generations in enumerate(told):
        for commits, epoch, size, parts, spread in generations:
            name = commits, epoch
            sizes[name] = size if spread else 0
            holders = found.setdefault(name, {EVERYWHERE: []})
            holders[EVERYWHERE].append(rank)
            for part in parts:
                holders.setdefault(part, []).append(rank)
    good = [name for name, holders in found.items() if all(part in holders for part in range(sizes[name]))]
    if not good:
        return None
    name = max(good)
    mine = next((made for made in held if made.name == name), None)
    return Remembered(group, name, mine, sizes[name], found[name])


class Info:
    """A table of a generation, as `iterreduce.saving.manifest.TableInfo` tells of one on disk."""

    def __init__(self, everywhere: bool, rank_rows: Sequence[int], schema: Schema) -> None:
        self.everywhere, self.rank_rows, self.schema = everywhere, tuple(rank_rows), schema
        self.rows = sum(rank_rows)

    def written_by(self, first: int, last: int) -> tuple[int, int]:
        """The rows ``[lo, hi)`` of parts ``[first, last)``, counted over all."""
        return sum(self.rank_rows[:first]), sum(self.rank_rows[:last])


class Remembered:
    """A generation in the memory of survivors, to be read as a checkpoint is (`iterreduce.capture.Saved`).

    Made on all ranks together. ``holders``: for each part the ranks that hold it; ``made``: what this rank
    holds, if anything.
    """

    path = "memory"

    def __init__(
        self,
        group: Group,
        name: tuple[int, int],
        made: Generation | None,
        size: int,
        holders: Mapping[int, Sequence[int]],
    ) -> None:
        self.group, self.name, self.made = group, name, made
        self.givers = [min(holders[part]) for part in range(size)]  # ranks that send it
        self._root, self._all_hold = min(holders[EVERYWHERE]), len(holders[EVERYWHERE]) == group.size
        facts = b"" if made is None else json.dumps(made.facts).encode()
        self.facts: dict[str, Any] = json.loads(group.bcast_bytes(facts, self._root))
        self.number = name[0]
        self.tables: Mapping[str, Any] = self._infos(size)
        self._here: dict[str, tuple[int, int, Batch]] = {}

    def _infos(self, size: int) -> dict[str, Info]:
        """What all parts hold. Collective."""
        group, made = self.group, self.made
        mine = [part for part, giver in enumerate(self.givers) if giver == group.rank]
        assert made is not None or not mine
        told: dict[str, Any] = {}
        for part in mine:
            assert made is not None
            share = made.parts[part]
            told[str(part)] = {n: [share.rows_of(n), share.schema(n).to_json()] for n in share.new.tables}
        if made is not None and group.rank == self._root:
            told["shared"] = {n: [len(t), t.batch.schema.to_json()] for n, t in made.shared.items()}
        merged: dict[str, Any] = {}
        for text in group.allgather_bytes(json.dumps(told).encode()):
            merged |= json.loads(text)
        shared = merged.pop("shared")
        out = {n: Info(True, [rows], Schema.from_json(schema)) for n, (rows, schema) in shared.items()}
        for name in merged["0"] if size else ():
            parts = [merged[str(part)][name] for part in range(size)]
            out[name] = Info(False, [rows for rows, _ in parts], _merged(parts))
        return out

    def bring(self, group: Group, table: str, lo: int, hi: int) -> None:
        """Have these rows here, to `read` them next. Collective."""
        info = self.tables[table]
        batch = self._shared(table) if info.everywhere else self._gathered(info, table, lo, hi)
        self._here = {table: (lo, hi, batch)}

    def read(self, table: str, lo: int, hi: int) -> Batch:
        """Rows that were brought, in memory of their own. Local."""
        first, last, batch = self._here.pop(table)
        assert (first, last) == (lo, hi)
        return batch

    def share(self) -> tuple[int, int]:
        """Which parts this rank takes if each keeps its own, and those of the dead behind it. Collective."""
        group, size = self.group, len(self.givers)
        owns = np.empty(group.size, np.int64)
        group.allgather(np.array([-1 if self.made is None else self.made.own]), owns, header_words=1)
        keeps = [rank for rank, own in enumerate(owns.tolist()) if own >= 0]
        if group.rank not in keeps:
            return 0, 0
        at = keeps.index(group.rank)
        last = int(owns[keeps[at + 1]]) if at + 1 < len(keeps) else size
        return (int(owns[group.rank]) if at else 0), last

    def _shared(self, table: str) -> Batch:
        """What is everywhere. Collective where not all ranks hold it."""
        made, info = self.made, self.tables[table]
        if self._all_hold:
            assert made is not None
            return made.shared[table].batch.copy()
        mine = b"" if made is None else Part.of({table: made.shared[table].batch}).words.tobytes()
        words = np.frombuffer(self.group.bcast_bytes(mine, self._root), np.int64)
        return Part.read(words).rows(table, 0, info.rows).copy()

    def _gathered(self, info: Info, table: str, lo: int, hi: int) -> Batch:
        """Rows of several parts, from those who hold them. Collective."""
        group = self.group
        wanted = np.empty(2 * group.size, np.int64)
        group.allgather(np.array([lo, hi]), wanted, header_words=2)
        starts = np.concatenate([[0], np.cumsum(info.rank_rows)]).tolist()
        out = [self._for(table, starts, int(a), int(b)) for a, b in wanted.reshape(-1, 2)]
        sizes, sent = np.array([len(words) for words in out]), np.concatenate(out)
        came = np.empty(group.size, np.int64)
        group.alltoall(sizes, came, header_words=1)
        received = np.empty(int(came.sum()), np.int64)
        group.alltoallv(sent, sizes.tolist(), None, received, came.tolist(), None)
        return self._joined(info, table, starts, lo, hi, received, came.tolist())

    def _for(self, table: str, starts: Sequence[int], lo: int, hi: int) -> Array:
        """What this rank has to send of rows ``[lo, hi)``: a packed part for each part that they lie in."""
        out = [np.zeros(0, np.int64)]
        for part, a, b in _within(starts, lo, hi):
            if self.givers[part] == self.group.rank:
                assert self.made is not None
                out.append(Part.of({table: self.made.parts[part].rows(table, a, b)}).words)
        return np.concatenate(out)

    def _joined(
        self, info: Info, table: str, starts: Sequence[int], lo: int, hi: int, words: Array, came: list[int]
    ) -> Batch:
        """The rows that came, in their order."""
        at = np.concatenate([[0], np.cumsum(came)]).tolist()
        batches = []
        for part, a, b in _within(starts, lo, hi):
            giver = self.givers[part]
            piece = Part.read(words[at[giver] :])
            at[giver] += len(piece.words)
            batches.append(piece.rows(table, 0, b - a))
        if not batches:
            return Batch.empty(info.schema)
        return of_schema(
            Batch.concat(batches).copy() if len(batches) == 1 else Batch.concat(batches), info.schema
        )


def _within(starts: Sequence[int], lo: int, hi: int) -> list[tuple[int, int, int]]:
    """The parts in which rows ``[lo, hi)`` lie, and which of their own rows.

    >>> _within([0, 3, 3, 7], 2, 5)
    [(0, 2, 3), (2, 0, 2)]
    """
    out = []
    for part, (first, last) in enumerate(itertools.pairwise(starts)):
        a, b = max(lo, first), min(hi, last)
        if a < b:
            out.append((part, a - first, b - first))
    return out


def _merged(parts: Sequence[tuple[int, str]]) -> Schema:
    """The columns of all ranks: those without rows may not know their types."""
    schemas = [Schema.from_json(text) for rows, text in parts if rows]
    schema = schemas[0] if schemas else Schema.from_json(parts[0][1])
    for other in schemas[1:]:
        if never_null(other) == never_null(schema):
            schema = either_null(schema, other)
    return schema
