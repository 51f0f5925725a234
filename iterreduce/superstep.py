"""One superstep at work: its stages in order, then its writes, all or nothing.

Maps whose rows only feed an exchange run inside it, piece by piece; other maps are run where they stand. A
rank on which something fails goes on to the next exchange, says so in its header, and all ranks leave there
together. Failures after the last exchange ride on the control reduction of the iteration (see the driver).

Who speaks to it: the driver. What it must not do: branch between collectives on anything that other ranks do
not know.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from iterreduce.agreement import Guard, raise_agreed
from iterreduce.collectives import Group
from iterreduce.columns.expressions import Expr
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.schema import difference, never_null
from iterreduce.errors import SchemaError, UsageError, at
from iterreduce.events import Events
from iterreduce.exchange import FAILED
from iterreduce.folding import RowSource
from iterreduce.indexing import IndexRows, Resident
from iterreduce.inplace import IN_PLACE, KeyedState, detached, refuse_twice
from iterreduce.laid import Laid, lay_out
from iterreduce.linkimprove import ImprovingShuffle
from iterreduce.linksettle import SettlingShuffle
from iterreduce.linkshuffle import LinkShuffle
from iterreduce.lookup import LookupRows
from iterreduce.loop import (
    Accumulate,
    Gather,
    Index,
    Local,
    Lookup,
    Number,
    Replace,
    Shuffle,
    Sink,
    Stage,
    Superstep,
    Total,
    aggregators_of,
    reads_of,
)
from iterreduce.loop_cache import LoopCache
from iterreduce.maps import BlockMap
from iterreduce.rangeshuffle import RangeShuffle
from iterreduce.rownumbers import NumberRows
from iterreduce.rowshuffle import GatherRows, RowShuffle
from iterreduce.shuffle import CombineShuffle
from iterreduce.sources.blocks import RowStream
from iterreduce.steady import SteadyShuffle
from iterreduce.table import Table
from iterreduce.total import TotalRows
from iterreduce.uncombined import WithFallback, may_need_rows

Exchanger = (
    CombineShuffle | RowShuffle | TotalRows | GatherRows | WithFallback | IndexRows | LinkShuffle | LookupRows
)

_now = time.perf_counter
WHOLE = (Local, Index, Lookup, Number)  # stages that read tables, and no rows piece by piece


@dataclass
class Workshop:
    """What all stages of a loop run share on this rank; ``stages`` counts them, alike on all ranks."""

    group: Group
    cache: LoopCache
    partitions: PartitionMap
    events: Events
    check: bool = False
    limit_bytes: int | None = None
    spills: bool = False  # what is beyond the limit is put into files
    repeats: bool = True
    keep: bool = True
    reproducible: bool = False
    stages: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    exchangers: list[Exchanger | KeyedState] = field(default_factory=list)
    residents: dict[str, Resident] = field(default_factory=dict)
    indexes: frozenset[str] = frozenset()
    states: dict[str, KeyedState] = field(default_factory=dict)
    in_place: dict[str, KeyedState] = field(default_factory=dict)  # those of all levels
    carry: frozenset[str] = frozenset()
    keyed: frozenset[str] = frozenset()  # states with a key, which each row has to itself
    laid: dict[str, tuple[str, ...]] = field(default_factory=dict)
    streams: dict[str, RowStream] = field(default_factory=dict)

    def let_go(self) -> None:
        """The stages are done: what they hold goes now, though parts of a stage hold each other."""
        for work in self.exchangers:
            vars(work).clear()
        self.exchangers.clear()

    def make_ready(self, tables: Mapping[str, Table], guard: Guard) -> None:
        """What takes time once, with the tables that iterations begin with. What fails fails again there."""
        for work in self.exchangers:
            if isinstance(work, ImprovingShuffle) and not set(reads_of(work.stage)) - tables.keys():
                guard.run(self._make_ready, work, tables)

    def _make_ready(self, work: ImprovingShuffle, tables: Mapping[str, Table]) -> None:
        work.make_ready(tables)
        for state in self.in_place.values():
            if state.name == work.table and self.limit_bytes is None:
                state.make_ready(tables[work.table], work.shape.outputs[0].name)

    def exchanger(self, stage: Stage, source: RowSource, laid: Laid) -> Exchanger:
        """The stage at work, under the next stage number; ``laid``: how tables lie."""
        limit = None if self.spills else self.limit_bytes
        common = (stage_number(next(self.stages), stage), self.group, source)
        if isinstance(stage, Total):
            total = TotalRows(stage, *common, self.check, self.keep)
            made: Exchanger = total
            if may_need_rows(stage.aggregators):
                gather = Gather(stage.rows, stage.into)
                whole = GatherRows(gather, *common, self.check, limit)
                made = WithFallback(total, whole, stage.aggregators, stage.key)
        elif isinstance(stage, Index):
            made = IndexRows(
                stage,
                common[0],
                self.group,
                self.partitions,
                self.residents,
                self.check,
                limit,
                self.streams,
            )
        elif isinstance(stage, Shuffle) and stage.rows in self.indexes:
            linked = SettlingShuffle if stage.settle else ImprovingShuffle if stage.improves else LinkShuffle
            made = linked(stage, common[0], self.group, self.residents, self.check, limit)
            if isinstance(made, SettlingShuffle):
                made.by_round = self.reproducible
        elif isinstance(stage, Lookup):
            made = LookupRows(
                stage, common[0], self.group, self.cache, self.partitions, laid, self.check, limit,
                self.repeats,
            )  # fmt: skip
        elif isinstance(stage, Gather):
            made = GatherRows(stage, *common, self.check, limit)
        elif isinstance(stage, Number):
            made = NumberRows(stage, *common, self.check, limit)
        elif isinstance(stage, Shuffle) and stage.combine is not None:
            made = combining = SteadyShuffle(
                stage, *common, self.cache, self.partitions, self.check, limit, self.repeats
            )
            if may_need_rows(stage.combine) and stage.onto is None:
                by_key = RowShuffle(
                    stage, *common, self.cache, self.partitions, self.check, limit, self.repeats
                )
                by_key.budgeted = self.limit_bytes is not None
                made = WithFallback(combining, by_key, stage.combine, stage.key)
        else:
            assert isinstance(stage, Shuffle)
            made = rows = (RowShuffle if stage.route is None else RangeShuffle)(
                stage, *common, self.cache, self.partitions, self.check, limit, self.repeats
            )
            rows.budgeted = self.limit_bytes is not None
        self.exchangers.append(made)
        return made


def stage_number(count: int, stage: Stage) -> int:
    """31 bits that tell a stage from others: how many stages came before, and a digest of what it is.

    Two programs that differ between ranks meet under ``--check`` with different numbers.
    """
    words = f"{type(stage).__name__} {stage.into} {getattr(stage, 'key', ())}"
    return (zlib.crc32(words.encode()) & 0x7FFF) << 16 | count & 0xFFFF


class LocalStep:
    """A map that stands for itself, and what it tells watchers: as part of guarded work."""

    def __init__(self, label: str, into: str, shop: Workshop, work: BlockMap):
        self.label, self.into, self.events, self.traffic = label, into, shop.events, shop.group.traffic
        self.make = work.share if work.stage.cut == "share" else partial(local, work)

    def bind(self, seen: dict[str, Table], iteration: int) -> None:
        """Bind the map's result."""
        emit = self.events.emit if self.events.active else None
        if emit is None:
            seen[self.into] = self.make(seen, iteration)
            return
        started, sent = _now(), self.traffic.payload_bytes
        emit("stage.start", stage=self.label, iteration=iteration)
        seen[self.into] = made = self.make(seen, iteration)
        emit(
            "stage.end", stage=self.label, iteration=iteration, seconds=_now() - started,
            bytes=self.traffic.payload_bytes - sent, rows=made.batch._length,
        )  # fmt: skip


class ExchangeStep:
    """A stage that communicates: what a rank does alone, before the exchange and after it."""

    def __init__(self, label: str, into: str, shop: Workshop, work: Exchanger):
        self.label, self.into, self.events, self.traffic = label, into, shop.events, shop.group.traffic
        self.work = work
        self._began: tuple[float, int] | None = None

    def make_ready(self, seen: dict[str, Table], iteration: int) -> None:
        """All that comes before the exchange."""
        events, self._began = self.events, None
        if events.active:
            self._began = _now(), self.traffic.payload_bytes
            events.emit("stage.start", stage=self.label, iteration=iteration)
        self.work.prepare(seen, iteration)
        if events.places:
            events.emit("exchange.ready", stage=self.label, iteration=iteration)

    def bind(self, seen: dict[str, Table], iteration: int) -> None:
        """Bind what the exchange has brought."""
        events = self.events
        if events.places:
            events.emit("exchange.done", stage=self.label, iteration=iteration)
        found: Table | dict[str, Table] = self.work.finish()
        if isinstance(found, dict):
            seen.update(found)
            made = found.get(self.into)
        else:
            seen[self.into] = made = found
        if self._began is not None:
            started, sent = self._began
            events.emit(
                "stage.end", stage=self.label, iteration=iteration, seconds=_now() - started,
                bytes=self.traffic.payload_bytes - sent, rows=0 if made is None else made.batch._length,
            )  # fmt: skip


Work = Callable[[dict[str, Table], int], None]


class Leg:
    """What a rank does by itself from one exchange to the next, under one guard: named pieces of work."""

    def __init__(self) -> None:
        self.work: list[tuple[str, Work]] = []
        self.exchange: Callable[[Guard], int] | None = None  # behind it
        self.towards = ""  # the name of that


class SuperstepRun:
    """A superstep, ready to run again and again."""

    def __init__(self, step: Superstep, shop: Workshop, kept: Iterable[str] = (), within: str = ""):
        """``kept`` names stage results that are wanted after the superstep, beside those written; ``within``
        stands in front of its name where stages are named.
        """
        self.step, self.shop, self.within = step, shop, within
        first = len(shop.exchangers)
        self._legs = [Leg()]
        fused = fused_maps(step.stages, {*kept, *(w.rows for w in step.writes)})
        maps: dict[str, BlockMap] = {}
        laid = dict(shop.laid)
        for stage in step.stages:
            label = f"{within}{step.name}: {type(stage).__name__} into {stage.into.lstrip(chr(0))}"
            if isinstance(stage, Local):
                maps[stage.into] = BlockMap(stage, reproducible=shop.reproducible)
                if stage.into not in fused:
                    alone = LocalStep(label, stage.into, shop, maps[stage.into])
                    self._legs[-1].work.append((label, alone.bind))
            else:
                source = RowSource(
                    stage.rows,
                    maps[stage.rows] if stage.rows in fused else None,
                    shop.group.rank,
                    shop.group.size,
                    computed(stage),
                )
                work = shop.exchanger(stage, source, laid)
                self._add_exchange(ExchangeStep(label, stage.into, shop, work))
            lay_out(stage, laid)
        made = enumerate(shop.exchangers[first:], first)
        self.works: dict[int, Exchanger | KeyedState] = dict(made)  # what a transaction commits
        improving = [w for w in self.works.values() if isinstance(w, ImprovingShuffle)]
        self._patched = [(w, patch.rows) for w in improving if (patch := w.patch_of(step.writes))]
        self.sinks = [w for w in step.writes if isinstance(w, Sink)]
        self.accumulates = [w for w in step.writes if isinstance(w, Accumulate) and w.table in shop.carry]
        self.sunk: list[tuple[str, Table]] = []  # by the last run, in order
        self.accumulated: list[tuple[Accumulate, Table]] = []
        self._whole_rows = {s.into for s in step.stages if isinstance(s, Shuffle) and s.combine is None}
        replaces = [w for w in step.writes if isinstance(w, Replace)]
        whole = [(w, w.rows in self._whole_rows) for w in replaces]
        self._replaces = whole if len(replaces) == len(step.writes) else None
        self._written: dict[str, Table] = {}
        self._writing = f"{within}{step.name}: writes"

    def _add_exchange(self, step: ExchangeStep) -> None:
        self._legs[-1].work.append((step.label, step.make_ready))
        self._legs[-1].exchange, self._legs[-1].towards = step.work.exchange, step.label
        self._legs.append(Leg())
        self._legs[-1].work.append((step.label, step.bind))

    def run(self, tables: Mapping[str, Table], guard: Guard) -> dict[str, Table]:
        """Run the stages; returns the tables written. Collective. Raises the same error on all ranks."""
        self._written = {}
        self.results(tables, guard)
        return self._written

    def results(self, tables: Mapping[str, Table], guard: Guard) -> dict[str, Table]:
        """Run the stages; returns all tables, with their results. Collective."""
        seen, iteration = dict(tables), guard.iteration
        for leg in self._legs:
            if guard.failure is None:
                try:  # as in `Guard.run`: what fails, fails under the name of its piece
                    for guard.stage, work in leg.work:
                        work(seen, iteration)
                    if leg.exchange is None:
                        guard.stage = self._writing
                        self._write(seen)
                except BaseException as error:
                    guard.fail(error)
            if leg.exchange is not None:
                guard.stage = leg.towards
                if leg.exchange(guard) & FAILED:
                    raise_agreed(self.shop.group, guard.failure)
        return seen

    def _write(self, seen: dict[str, Table]) -> None:
        """The writes, all or nothing."""
        shop = self.shop
        if self._replaces is None or shop.in_place:
            self._written = self._write_any(seen)
            return
        out = {}  # nothing shares memory with what is written
        for write, whole in self._replaces:
            out[write.table] = written(write, seen[write.table], seen[write.rows], shop, whole)
        self._written = out

    def _write_any(self, seen: Mapping[str, Table]) -> dict[str, Table]:
        known, shop, out = self.shop.states, self.shop, dict[str, Table]()
        rows = [detached(seen[w.rows], self.shop.in_place) for w in self.step.writes]
        if self.sinks:  # copied: rows of a table may be changed in place later
            self.sunk = [
                (w.output, replace(seen[w.rows], batch=seen[w.rows].batch.copy())) for w in self.sinks
            ]
        for w, given in zip(self.step.writes, rows, strict=True):
            if isinstance(w, Replace):
                out[w.table] = written(w, seen[w.table], given, shop, w.rows in self._whole_rows)
            elif isinstance(w, IN_PLACE) and w.table in known:
                out[w.table] = known[w.table].write(w, out.get(w.table, seen[w.table]), given)
        for work, name in self._patched:
            work.is_written(seen[name], out[work.table])
        if self.accumulates:
            self.accumulated = [(w, seen[w.rows]) for w in self.accumulates]
        return out


def computed(stage: Stage) -> dict[str, Expr]:
    """The expressions that the stage's aggregators read, by the name of the column of their values."""
    reduce = stage.combine if isinstance(stage, Shuffle) else getattr(stage, "aggregators", None)
    return {str(a.column): a.column for a in aggregators_of(reduce) if isinstance(a.column, Expr)}


def local(work: BlockMap, tables: Mapping[str, Table], iteration: int) -> Table:
    """A map's whole result on this rank; a rank without rows asks the map what it makes of none."""
    first = tables[work.stage.reads[0]]
    if first.everywhere:
        return work.share(tables, iteration)
    made = work.whole(tables, iteration)
    if made is not None:
        return made
    empty = work.on_nothing(tables, iteration)
    return Table(empty, first.layout, block_starts=first.block_starts)


def fused_maps(stages: Iterable[Stage], kept: set[str]) -> set[str]:
    """Names of map results that one exchange reads and nothing else: they are folded piece by piece, never
    joined.
    """
    stages = tuple(stages)
    readers: dict[str, list[Stage]] = {}
    for stage in stages:
        for name in reads_of(stage):
            readers.setdefault(name, []).append(stage)
    out = set()
    for stage in stages:
        if isinstance(stage, Local) and stage.into not in kept:
            by = readers.get(stage.into, [])
            if len(by) == 1 and not isinstance(by[0], WHOLE) and by[0].rows == stage.into:
                out.add(stage.into)
    return out


def one_by_one(stages: Iterable[Stage], kept: set[str]) -> Iterator[tuple[Stage, ...]]:
    """The stages in groups that run together: an exchange with the map inside it, or a map alone."""
    stages = tuple(stages)
    fused, inside = fused_maps(stages, kept), dict[str, Stage]()
    for stage in stages:
        if stage.into in fused:
            inside[stage.into] = stage
        else:
            rows = inside.pop(getattr(stage, "rows", ""), None)
            yield (stage,) if rows is None else (rows, stage)


def written(write: Replace, old: Table, rows: Table, shop: Workshop, distinct: bool = False) -> Table:
    """The table after the write; raises `UsageError` where the rows do not lie where the table's must.

    ``distinct``: look whether the keys are, as `check` does; where aggregates or rows of a table take its
    place they are.
    """
    layout = old.layout
    kind = layout.kind
    if write.alike:
        check_alike(write, old, rows)
    if kind == "everywhere" and not rows.everywhere:
        raise UsageError(
            f'replacing "{write.table}", which is the same on all ranks, by "{write.rows}", whose rows '
            f"lie {describe(rows)}; use Gather or Total first"
        )
    if kind == "key":
        here, before = rows.batch._columns, old.batch._columns
        for key in layout.keys:  # rows whose keys were passed on lie where they did
            if key not in here or here[key] is not before.get(key):
                check_owned(write, old, rows, shop)
                break
        if (distinct or shop.check) and write.table in shop.keyed:
            check_distinct(write, old, rows)
        return Table(rows.batch, layout, rows.tokens, None, 0, -1, old.version + 1)
    return old.replaced(rows)


def describe(table: Table) -> str:
    """Where a table's rows lie, in words."""
    keys = ", ".join(table.layout.keys)
    return {
        "everywhere": "on every rank",
        "block": "by block of their source",
        "key": f"by key {keys}",
        "range": f"by range of {keys}",
    }[table.layout.kind]


def check_alike(write: Replace, old: Table, rows: Table) -> None:
    """Raise `SchemaError` for columns that are not those of the table; what may be null does not matter."""
    if not old.batch.names or not rows.batch.names:
        return  # of no rows the columns need not be known
    before, now = old.batch.schema, rows.batch.schema
    for name in (*before, *now):
        first, then = before.get(name), now.get(name)
        types = [f and replace(f, nullable=False).describe() for f in (first, then)]
        if types[0] != types[1]:
            raise SchemaError(
                f'state "{write.table}": column "{name}" is {types[0] or "missing"} in the first rows and '
                f"{types[1] or 'missing'} in what the step returns; make them alike{at(write.where)}"
            )


def check_owned(write: Replace, old: Table, rows: Table, shop: Workshop) -> None:
    """Every row must lie with the owner of its key: known where keys kept their tokens, else hashed."""
    keys, here = old.layout.keys, rows.batch
    for key in keys:
        here[key]  # or names what is missing
    if rows.layout == old.layout and (rows.rows_of is not None or all(k in rows.tokens for k in keys)):
        return  # rows of a table that lies so
    if shop.group.size > 1:
        owners = shop.partitions.owner_of_hashes(hash_keys(here.select(*keys)))
        stray = int((owners != shop.group.rank).sum())
        if stray:
            raise UsageError(
                f'replacing "{write.table}", which is partitioned by {", ".join(keys)}: {stray} rows of '
                f'"{write.rows}" belong to other ranks; Shuffle them by that key first'
            )


def check_distinct(write: Replace, old: Table, rows: Table) -> None:
    """Raise `UsageError` for a key that comes twice. Cheap where keys stand in the order of their hash."""
    keys = rows.batch.select(*old.layout.keys)
    if all(keys[k] is old.batch._columns.get(k) for k in keys.names):
        return
    hashes = hash_keys(keys)
    if not (hashes[1:] > hashes[:-1]).all():
        refuse_twice(keys, f'Replace of "{write.table}" by "{write.rows}"{at(write.where)}')


def check_sunk(output: str, before: Sequence[Table], rows: Table) -> None:
    """Raise unless these rows can stand behind those that were sunk into the output before."""
    alike = [table.everywhere == rows.everywhere for table in before[:1]]
    if alike == [False]:
        raise UsageError(
            f'output "{output}" has rows that are the same on all ranks and rows that are not; sink them '
            "into two outputs, or Gather the others first"
        )
    first = next((table for table in before if len(table)), None)
    unlike = difference(never_null(first.batch.schema), never_null(rows.batch.schema)) if first else ""
    if unlike and len(rows):
        raise SchemaError(f'output "{output}": {unlike} (here: sunk before; there: now)')
