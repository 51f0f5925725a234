"""What a loop starts from: sources read, prepare stages run once, states given their initial rows, feeds.

Shared by all levels of a run. Everything that a rank does on its own runs under a `Guard`, so what fails on
one rank is raised on all. Collective functions say so.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

from iterreduce.accounting import dead_after, open_sources
from iterreduce.agreement import Guard, raise_agreed
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch, row_text
from iterreduce.columns.numbering import number_keys
from iterreduce.columns.placement import current
from iterreduce.errors import AssumptionError, DisagreementError, InputError, UsageError, at, did_you_mean
from iterreduce.indexing import LinkTable
from iterreduce.laid import lay_out
from iterreduce.levels import INITIAL, SHUFFLED, Level, initials, inner_loops
from iterreduce.loop import Loop, Shuffle, Stage, State, Superstep, makes, names_of_sources
from iterreduce.maps import in_user_code
from iterreduce.options import Options
from iterreduce.sources.agreement import agree
from iterreduce.sources.blocks import Kept, Loaded, Source, expected_bytes, load, release
from iterreduce.sources.borders import in_global_blocks
from iterreduce.sources.local import LocalSource
from iterreduce.superstep import SuperstepRun, Workshop, one_by_one
from iterreduce.table import BY_BLOCK, NO_TOKENS, Table, by_key, column_tokens, everywhere, token

Tell = Callable[..., None]
RunLoop = Callable[[Loop], Mapping[str, Table]]


@dataclass
class Clock:
    """Seconds by phase, and of every iteration, on this rank."""

    load: float = 0.0
    invariants: float = 0.0
    iterate: float = 0.0
    iterations: list[float] = field(default_factory=list)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """What is done meanwhile counts as preparation."""
        began = time.perf_counter()
        yield
        self.invariants += time.perf_counter() - began


@dataclass
class RowsRead:
    """Rows of sources that can be read again: those that were read, and those that were here already."""

    read: int = 0
    kept: int = 0


class Loader:
    """Reads what the levels of one run need. ``run_loop``: what a loop that is a source makes."""

    def __init__(self, group: Group, options: Options, shop: Workshop, tell: Tell, run_loop: RunLoop):
        self.group, self.options, self.shop, self.tell = group, options, shop, tell
        self.run_loop = run_loop
        self.read: dict[int, tuple[Source, Loaded]] = {}  # a loop that is a source shares what was read
        self.ran: dict[int, dict[str, Table]] = {}  # what loops made that are sources of several loops
        self.shared: frozenset[int] = frozenset()  # which loops those are
        self.shares_read = False  # this run's loop is such a source itself
        self.frozen: dict[str, tuple[LocalSource, str]] = {}
        self.bytes_read = 0  # of all sources
        self.rows = RowsRead()
        self.kept: dict[int, Kept] = {}  # by source: what this run had while there were more ranks
        self._had: dict[int, Kept] = {}  # of what was read: which blocks, without their rows
        self._counted: dict[int, int] = {}  # of each source, by id, how many were counted

    def guard(self, stage: str) -> Guard:
        """A guard for work before the first iteration."""
        guard = Guard(self.group.rank, 0)
        guard.stage = stage
        return guard

    def leave_if_failed(self, guard: Guard) -> None:
        """Agree that all is well before going on. Collective."""
        if self.group.agree_any(guard.failure is not None):
            raise_agreed(self.group, guard.failure)

    # ------------------------------------------------------------------ sources

    def sources(self, level: Level, tables: dict[str, Table]) -> None:
        """Bind the sources of a loop, but for those whose rows stream by. Collective."""
        self._watch(level.loop.sources.values())
        if level.parent is None and not self.shares_read:
            self.shared = frozenset(loop for loop, times in readers_of_loops(level.loop).items() if times > 1)
        streams = open_sources(level, self.read, self.group, self.options)
        self._refuse_changed(level.loop.sources.values())
        for name, source in level.loop.sources.items():
            if isinstance(source, Loop):
                tables |= self._of_loop(level.label, name, source)
            elif name not in streams:
                tables[name] = self.load(level.label, name, source)
        self.shop.streams.update(streams)  # after loops that are sources, which have streams of their own
        if not self.shares_read and level.parent is None and not any(level.inner):
            self.read.clear()  # no other loop will ask for the same rows
            self.ran.clear()

    def end_streams(self) -> float:
        """Rows that streamed by are where they must be; the seconds that reading them took."""
        streams = dict(self.shop.streams)
        self.shop.streams.clear()
        for name, stream in streams.items():
            release(stream.source)
            read = self._newly_read(stream.source)
            if stream.source.rereadable:
                self._had[id(stream.source)] = Kept(stream.source.token)
                self.rows.read += stream.rows
            self.tell("load", name=name, rows=stream.rows, bytes=0, bytes_read=read, seconds=stream.seconds)
        return sum(stream.seconds for stream in streams.values())

    def done(self, root: Level, bindings: dict[str, Table]) -> None:
        """All levels are prepared, and the outermost loop's states have their rows."""
        self.drop(root, root.constants, bindings)
        if not self.shares_read:
            self.read.clear()
            self.kept.clear()

    @staticmethod
    def drop(level: Level, *holders: dict[str, Table], kept: Iterable[str] = ()) -> None:
        """Let go of what was prepared and nobody reads any more."""
        prepared = set(names_of_sources(level.loop)).union(*(makes(stage) for stage in level.once))
        for name in prepared - level.read_later - set(kept):
            for tables in holders:
                tables.pop(name, None)

    def load(self, label: str, name: str, source: Any, feed: object = None) -> Table:
        """The table of a source, a batch, or the result of a loop. Collective.

        ``feed`` tells one iteration's rows from another's; None: rows of the whole run, kept for it.
        """
        if isinstance(source, Batch):
            return everywhere(source, token("constant", label, name, feed))
        if isinstance(source, Loop):
            return self._of_loop(label, name, source, feed)[name]
        return self._load_rows(name, source, kept=feed is None)

    def _of_loop(self, label: str, name: str, loop: Loop, feed: object = None) -> dict[str, Table]:
        """The result of a loop under its name, and what it gives beside; run once, if several loops have it
        as a source. Collective.
        """
        made = self.ran.get(id(loop))
        if made is None:
            made = {n: self._numbered(table) for n, table in self.run_loop(loop).items()}
            if id(loop) in self.shared:
                self.ran[id(loop)] = made
        return {n or name: renewed(table, token("loop", label, n or name, feed)) for n, table in made.items()}

    def share_with(self, around: Loader) -> None:
        """What was read, and run, for the loop around is not read and run again."""
        self.read, self.ran, self.shared, self.shares_read = around.read, around.ran, around.shared, True
        self.rows, self.kept, self._had = around.rows, around.kept, around._had

    def _numbered(self, table: Table) -> Table:
        """The table with its global row numbers, which rows by key lack (a sample needs them). Collective."""
        rows = np.zeros(self.group.size, np.int64)
        rows[self.group.rank] = len(table)
        self.group.allreduce(rows, "sum")
        if table.everywhere:
            return table
        return replace(table, first_row=int(rows[: self.group.rank].sum()), rows_total=int(rows.sum()))

    def _load_rows(self, name: str, source: Source, kept: bool) -> Table:
        started = time.perf_counter()
        self._watch([source], anew=not kept)
        known = self.read.get(id(source)) if kept and not self.options.naive else None
        if known is not None:
            got = known[1]
        else:
            if not kept:
                source.open(self.group)
            got = self._loaded(source) if kept else load(self.group, source)
            if self.options.reproducible and source.blocks.rank_bounds is not None:
                got = in_global_blocks(self.group, got, source.schema)
            if kept:
                self.read[id(source)] = source, got
            if self.options.check and isinstance(source, LocalSource):
                self.frozen[name] = source, source.fingerprint()
        of = token("source", name, source.token)
        tokens = column_tokens(of, got.batch) if not self.options.naive else NO_TOKENS
        seconds = time.perf_counter() - started
        self.tell(
            "load",
            name=name,
            rows=len(got.batch),
            bytes=got.batch.nbytes,
            bytes_read=self._newly_read(source),
            seconds=seconds,
        )
        return Table(got.batch, BY_BLOCK, tokens, got.block_starts, got.first_row, got.rows_total)

    def _loaded(self, source: Source) -> Loaded:
        """This rank's share, but for what it holds already. Collective."""
        lo, hi = source.blocks.owned(self.group.rank, self.group.size)
        kept = self.kept.get(id(source))  # and there they stay, should a rank die meanwhile
        if kept is not None and not self._fits(kept, expected_bytes(source, lo, hi)):
            self.kept[id(source)] = kept = Kept(kept.token)
        got = load(self.group, source, kept)
        self.kept.pop(id(source), None)
        if source.rereadable:
            self._had[id(source)] = Kept(source.token, lo, hi)
            self.rows.kept += got.rows_kept
            self.rows.read += len(got.batch) - got.rows_kept
        return got

    def _fits(self, kept: Kept, nbytes: int) -> bool:
        """For a moment old and new rows are here."""
        budget = None if current() is not None else self.options.memory_bytes
        held = 0 if kept.batch is None else kept.batch.nbytes
        return budget is None or held + nbytes <= budget

    def resident(self, root: Level) -> dict[int, Kept]:
        """What was read of sources that can be read again, by id; with rows that are still here. Local."""
        found = {**self.kept, **self._had}  # it had not come to read the first
        for level in root.all():
            for name, source in level.loop.sources.items():
                had, table = self._had.get(id(source)), level.constants.get(name)
                if had is not None and table is not None and not self.options.naive:
                    had = had._replace(batch=table.batch, block_starts=table.block_starts)
                if had is not None:
                    found[id(source)] = had
        return found

    def _refuse_changed(self, sources: Iterable[Any]) -> None:
        """A state made of rows that were read before goes with no others. Collective."""

        def compare() -> None:
            for source in sources:
                had = self.kept.get(id(source))
                if had is not None and had.token != source.token:
                    raise InputError(
                        f"{source.name} has changed since this run has read it, and ranks that have died "
                        "leave rows that must be read again; let its writer finish, then run again"
                    )

        if self.group.epoch:
            agree(self.group, compare)

    def _watch(self, sources: Iterable[Any], anew: bool = False) -> None:
        """What these sources have read so far counts for others: for the run before this one, say."""
        for source in sources:
            if anew or id(source) not in self._counted:
                self._counted[id(source)] = getattr(source, "bytes_read", 0)

    def _newly_read(self, source: Source) -> int:
        """Bytes that this rank has read of a source since this was asked last; they count for the run."""
        now = int(getattr(source, "bytes_read", 0))
        new = now - self._counted.get(id(source), 0)
        self._counted[id(source)] = now
        self.bytes_read += new
        return new

    def check_frozen(self) -> None:
        """Arrays that were handed over with ``copy=False`` must not change while the run lasts."""
        for name, (source, before) in self.frozen.items():
            if source.fingerprint() != before:
                raise UsageError(
                    f'the arrays of "{name}" changed while the run was using them; do not write to what was '
                    "given to from_local(copy=False), or let it copy"
                )

    # ------------------------------------------------------------------ stages that run once

    def run_once(
        self,
        level: Level,
        stages: tuple[Stage, ...],
        tables: dict[str, Table],
        what: str,
        new_guard: Callable[[], Guard],
    ) -> None:
        """Bind the results of stages whose results stay for the whole run. Collective."""
        if not stages:
            return
        guard = new_guard()
        laid = dict(level.shop.laid)
        numbers = count((1 << 14) + 1)
        shop = replace(level.shop, repeats=False, keep=False, exchangers=[], stages=numbers, laid=laid)
        # tables of the loops around stay: without caches these stages run again, and nobody brings them anew
        kept, number = level.read_later | initials(level.loop) | set(level.loop.outer), 0
        groups = list(one_by_one(stages, kept))
        for together, dead in zip(groups, dead_after(groups, kept), strict=True):
            step = SuperstepRun(Superstep(what, together), shop, {*kept, *(s.into for s in together[-1:])})
            made = step.results(tables, guard)
            for stage in together:
                lay_out(stage, laid)
                for name in makes(stage):
                    if name in made:
                        of = token(what, level.label, number, name)
                        tables[name] = made[name] if self.options.naive else renewed(made[name], of)
                number += 1
            for name in dead:
                tables.pop(name, None)
            del step, made
            shop.let_go()
        self.leave_if_failed(guard)

    # ------------------------------------------------------------------ initial rows

    def initial_once(self, level: Level, tables: dict[str, Table]) -> None:
        """Give the states of the outermost loop their rows. Collective."""
        for name, state in level.loop.state.items():
            tables[name] = self._initial(level.label, name, state, tables)

    def _initial(self, label: str, name: str, state: State, tables: Mapping[str, Table]) -> Table:
        if not state.initial:
            return no_rows(state)
        first = tables[state.initial]
        if not state.key:
            return first
        if first.layout == by_key(*state.key):  # they lie as they must, and keep their order
            return self._unique(name, state, first)
        guard = self.guard(f'initial rows of "{name}"')
        share = guard.run(self._share_of_everywhere, first)
        self.leave_if_failed(guard)
        assert share is not None
        made = self.to_owners(name, state.key, share)
        return self._unique(name, state, renewed(made, token("state", label, name)))

    def to_owners(self, name: str, key: tuple[str, ...], share: Table) -> Table:
        """Rows by block at the owners of their keys. Collective."""
        guard = self.guard(f'initial rows of "{name}"')
        step = SuperstepRun(
            Superstep("start", (Shuffle(INITIAL, key, SHUFFLED),)),
            replace(self.shop, repeats=False, exchangers=[], stages=count((1 << 15) + 1)),
        )
        made = step.results({INITIAL: share}, guard)
        self.leave_if_failed(guard)
        return made[SHUFFLED]

    def _unique(self, name: str, state: State, table: Table) -> Table:
        """The table, whose keys must be unique. Collective."""
        guard = self.guard(f'initial rows of "{name}"')
        guard.run(check_unique, name, state, table)
        self.leave_if_failed(guard)
        return table

    def _share_of_everywhere(self, table: Table) -> Table:
        """Of rows that are everywhere each rank brings an equal part."""
        if not table.everywhere:
            return table
        n, rank, size = len(table), self.group.rank, self.group.size
        return Table(table.batch.slice(n * rank // size, n * (rank + 1) // size), BY_BLOCK)

    def initial(self, level: Level, tables: dict[str, Table], guard: Guard) -> list[SuperstepRun]:
        """Give the states of an inner loop the rows that they begin this entry with. Collective.

        Keyed rows are shuffled unless they lie by that key on every rank. Returns the exchanges that were
        made, for the transaction.
        """
        moved = self._agree_moves(level, tables, guard) if level.starts else []
        for name, state in level.loop.state.items():
            if not state.initial:
                tables[name] = no_rows(state)
            elif state.initial in tables:
                tables[name] = tables[state.initial]
        for name in moved:
            share = guard.run(self._share_of_everywhere, tables[name])
            made = level.starts[name].results({INITIAL: share} if share is not None else {}, guard)
            if SHUFFLED in made:
                tables[name] = made[SHUFFLED]
        for name in level.starts:
            guard.stage = f'initial rows of "{name}"'
            guard.run(self._check_keys, level, name, tables)
        return [level.starts[name] for name in moved]

    def _agree_moves(self, level: Level, tables: Mapping[str, Table], guard: Guard) -> list[str]:
        """Which keyed states must be shuffled: those that lie elsewhere on any rank. Collective."""
        names = list(level.starts)
        words = np.zeros(len(names) + 1, np.int64)
        guard.run(self._ask_moves, level, tables, words)
        words[-1] = guard.failure is not None
        self.group.allreduce(words, "max", header_words=len(words))
        if words[-1]:
            raise_agreed(self.group, guard.failure)
        return [name for name, moves in zip(names, words.tolist(), strict=False) if moves]

    def _ask_moves(self, level: Level, tables: Mapping[str, Table], words: Any) -> None:
        for i, name in enumerate(level.starts):
            state = level.loop.state[name]
            words[i] = tables[state.initial].layout != by_key(*state.key)

    def _check_keys(self, level: Level, name: str, tables: Mapping[str, Table]) -> None:
        state, table = level.loop.state[name], tables[name]
        columns = tuple(table.batch[k] for k in state.key)
        known = level.unique.get(name)
        if known is None or any(a is not b for a, b in zip(known, columns, strict=True)):
            check_unique(name, state, table)
            level.unique[name] = columns

    # ------------------------------------------------------------------ feeds

    def feeds(
        self, level: Level, iteration: int, path: tuple[int, ...], given: Mapping[str, Any], guard: Guard
    ) -> dict[str, Table]:
        """The rows of this iteration's feeds. Collective."""
        guard.stage = f'feeds of "{level.label}"'
        found = guard.run(_ask_feeds, level.loop, iteration, given) or {}
        kinds = "".join(_kind(found[name]) for name in found)
        said = self.group.allgather_bytes(b"!" if guard.failure else kinds.encode())
        if b"!" in said:
            raise_agreed(self.group, guard.failure)
        if len(set(said)) > 1:
            other = next(rank for rank, kind in enumerate(said) if kind != said[0])
            raise DisagreementError(
                f"feeds {', '.join(found)} of iteration {iteration}: rank 0 and rank {other} gave different "
                "kinds of rows; give a Batch (the same on all ranks), a source or a loop on all of them"
            )
        return {name: self.load(level.label, name, found[name], path) for name in found}


def _ask_feeds(loop: Loop, iteration: int, given: Mapping[str, Any]) -> dict[str, Any]:
    out = {}
    for name, feed in loop.feeds.items():
        rows = given[name] if feed is None else in_user_code(feed, iteration)
        rows = rows.as_source() if hasattr(rows, "as_source") else rows
        if not isinstance(rows, Batch | Loop) and not hasattr(rows, "open"):
            raise UsageError(
                f'feed "{name}": wanted a Batch, a Dataset of rows, or a source for iteration {iteration}, '
                f"got {type(rows).__name__}"
            )
        out[name] = rows
    return out


def _kind(rows: Any) -> str:
    return "B" if isinstance(rows, Batch) else "L" if isinstance(rows, Loop) else "S"


def check_given(wanted: tuple[str, ...], given: Mapping[str, Any] | None) -> None:
    """Raise `UsageError` unless exactly these feeds were given."""
    found = {} if given is None else given
    if not isinstance(found, Mapping):
        raise UsageError(f"advance: feed is a mapping of names to rows, got {type(found).__name__}")
    for name in found:
        if name not in wanted:
            takes = ", ".join(wanted) or "none"
            raise UsageError(
                f'advance: feed "{name}" is not taken here (this iteration takes: {takes})'
                f"{did_you_mean(name, wanted)}"
            )
    for name in wanted:
        if name not in found:
            raise UsageError(f'advance: feed "{name}" is missing; say advance(feed={{"{name}": rows}})')


def no_rows(state: State) -> Table:
    """A state before it has rows."""
    return Table(Batch(), by_key(*state.key) if state.key else BY_BLOCK)


def renewed(table: Table, of: int) -> Table:
    """The table with tokens of its own."""
    if isinstance(table, LinkTable):  # rows by number have no columns
        return table
    return replace(table, tokens=column_tokens(of, table.batch))


def check_unique(name: str, state: State, table: Table) -> None:
    """Raise `AssumptionError` where a key of the state's rows comes twice."""
    keys = table.batch.select(*state.key)
    numbered = number_keys(keys)
    if len(numbered.hashes) < len(table):
        counts = np.bincount(numbered.codes)
        twice = numbered.keys.slice(int(counts.argmax()), int(counts.argmax()) + 1)
        raise AssumptionError(
            f'state "{name}" is keyed by {", ".join(state.key)}, but {row_text(twice)} has '
            f"{int(counts.max())} rows; make its keys unique, or give it no key (key=[] in a lazy iterate)"
            f"{at(state.where)}"
        )


def readers_of_loops(loop: Loop) -> Counter[int]:
    """How many loops have each loop as a source, by id: this one, those of its body, and of its sources."""
    out: Counter[int] = Counter()
    stack, seen = [loop], set[int]()
    while stack:
        for level in inner_loops(stack.pop()):
            found = [source for source in level.sources.values() if isinstance(source, Loop)]
            out.update(map(id, found))
            stack += [source for source in found if id(source) not in seen]
            seen |= set(map(id, found))
    return out
