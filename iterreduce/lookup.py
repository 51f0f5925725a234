"""Lookup: columns of a keyed table beside rows that name its keys. The rows stay; values come to them.

Three ways, chosen by agreement only. *Here*: the table is the same on all ranks, or rows and table lie by
the same key (the loop itself says so): nothing travels (see `iterreduce.matching`). *Fresh*: every rank asks
the owners for its distinct keys, in one exchange, and gets flags and values by a second one. *Planned*
(values only): where the key columns of rows and table are those of the last time, owners know which of their
rows go to whom, and every row its place in what comes, so one Alltoallv moves values; a value goes once to
each rank that needs it. A rank whose keys are others, or whose part of the plan is lost, joins the planned
exchange with REPLAN, and all ask again.

How it can go wrong: as in `FreshExchange`; a rank without rows learns the columns from the others. A null
equals no key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from iterreduce.agreement import Guard, settle_schemas
from iterreduce.answers import PlanBody, answer, answered, merged, said, side_by_side, write_values
from iterreduce.columns.batch import Batch, row_text
from iterreduce.columns.groups import number_keys
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.joins import KeyRows
from iterreduce.columns.packing import pack, packed_words, unpack
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.ragged import Array
from iterreduce.columns.routing import RecordLayout
from iterreduce.columns.schema import Schema
from iterreduce.errors import SchemaError, UsageError
from iterreduce.exchange import (
    ABSTAIN,
    EXTRA,
    FAILED,
    OK,
    ROWS,
    SCHEMA,
    Arrival,
    FreshExchange,
    Outgoing,
    agreed_proposal,
    nothing,
)
from iterreduce.group import Group
from iterreduce.laid import Laid, lies_beside, lies_here
from iterreduce.lineage import Pending, Planner
from iterreduce.loop import Lookup
from iterreduce.loop_cache import LoopCache
from iterreduce.matching import Match, Matches
from iterreduce.rowplan import RowPlan
from iterreduce.rowrounds import Shelf, fixed
from iterreduce.table import NO_TOKENS, Table, token

TOKENS_KEPT = 64  # digests take 3 us each
CHECKED = 4096  # rows whose owner is looked at where rows are said to lie with their table


@dataclass(frozen=True)
class Questions:
    """This rank's distinct keys in the order of their owners, and each row's place among them, -1: a null."""

    keys: Batch
    codes: Array
    counts: Array


class LookupRows(Planner):
    """One `Lookup` stage at work, on every iteration of a loop run."""

    def __init__(
        self,
        stage: Lookup,
        number: int,
        group: Group,
        cache: LoopCache,
        partitions: PartitionMap,
        laid: Laid = MappingProxyType({}),
        check: bool = False,
        limit_bytes: int | None = None,
        repeats: bool = True,
    ):
        """``laid``: how tables lie, alike on all ranks."""
        super().__init__(number, group.epoch, cache, repeats)
        self.stage, self.group, self.partitions = stage, group, partitions
        self.here = lies_here(stage, laid) or group.size == 1  # where the loop does not tell, all ranks talk
        self._beside = lies_beside(stage, laid)
        self.check = check
        self.columns = () if stage.missing == "only" else stage.columns
        self.ask = FreshExchange(group, number, check, limit_bytes=limit_bytes)
        self.answer = FreshExchange(group, number, check, limit_bytes=limit_bytes)
        self.plan: RowPlan | None = None
        self.shelf = Shelf()
        self._tokens_known: dict[tuple[tuple[object, ...], int], int] = {}
        self.matches = Matches(cache.enabled and repeats, self.shelf)
        self.keys_changed = False
        self._key_schema: Schema | None = None
        self._value_schema: Schema | None = None
        self._plan_tokens: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self.planned = False
        self._begin()

    def _begin(self) -> None:
        self.on_plan = False
        self.proposal = ABSTAIN
        self._questions: Questions | None = None
        self._slots: list[Array] = []
        self._asked: list[int] = []
        self._arrival: Arrival | None = None
        self._found: tuple[Array, Batch] | None = None

    # ------------------------------------------------------------------ local work, before the exchange

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """See where rows and table lie; write values into the send buffer of the plan, or number the keys."""
        self.rows, self.table = tables[self.stage.rows], tables[self.stage.table]
        self._begin()
        self._check()
        if self.here or self.table.everywhere:
            return
        self.proposal = self._proposal()
        if self._start_plan():
            assert self.plan is not None
            if len(self.table):
                write_values(self.plan, self.cache.get(self.plan_token), self.table.batch)
        else:
            self._number()

    @property
    def table_key(self) -> tuple[str, ...]:
        """The table's key columns, in the order of those of the rows."""
        return self.table.layout.keys if self.table.layout.kind == "key" else self.stage.key

    def _check(self) -> None:
        stage, table = self.stage, self.table
        if table.layout.kind == "block" or len(self.table_key) != len(stage.key):
            raise UsageError(
                f'Lookup into "{stage.into}": "{stage.table}" does not lie by a key of {len(stage.key)} '
                "columns; name a state with such a key, or the result of a Shuffle by one"
            )
        if stage.nulls and not (self.here or table.everywhere):
            raise UsageError(
                f'Lookup into "{stage.into}": null keys are found only where rows lie with their table'
            )
        twice = [n for n in self.columns if n in self.rows.batch]
        if twice and len(self.rows):
            raise SchemaError(
                f'Lookup into "{stage.into}": "{stage.rows}" and "{stage.table}" both have a column '
                f'"{twice[0]}"; rename one of them'
            )
        if table.batch.names:
            table.batch.schema.require(*self.table_key, *self.columns)
        if len(self.rows):
            self.rows.batch.schema.require(*stage.key)

    def _tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ours = tuple([self.rows.tokens.get(k, 0) for k in self.stage.key])
        return ours, tuple([self.table.tokens.get(k, 0) for k in self.table_key])

    def _proposal(self) -> int:
        ours, theirs = self._tokens()
        if not self.cache.enabled or 0 in theirs:
            return 0
        if not len(self.rows):
            return ABSTAIN
        return 0 if 0 in ours else token("lookup", self.number, ours, theirs, self.epoch)

    def _start_plan(self) -> bool:
        """Are rows and table those of the plan, and is this rank's part of it here?"""
        if self.plan is None:
            return False
        body: PlanBody | None = self.cache.get(self.plan_token)
        ours, theirs = self._tokens()
        same = (
            0 not in theirs
            and theirs == self._plan_tokens[1]
            and (ours == self._plan_tokens[0] or not len(self.rows))
        )
        self.on_plan = (
            body is not None
            and same
            and body.rows == len(self.rows)
            and (not len(self.table) or self.plan.layout.fits(self.table.batch))
        )
        return self.on_plan

    def _number(self) -> None:
        """The distinct keys of this rank's rows; nulls are asked of nobody."""
        if not len(self.rows):
            return
        keys = self.rows.batch.select(*self.stage.key)
        masks = [m for m in (keys.valid(n) for n in keys.names) if m is not None]
        if masks:
            real = np.flatnonzero(np.logical_and.reduce(masks))
            codes = np.full(len(keys), -1, np.int64)
            keys = Batch._trusted(keys.take(real)._columns, {}, len(real))
        numbered = number_keys(keys)
        if masks:
            codes[real] = numbered.codes
        else:
            codes = numbered.codes
        counts = np.diff(self.partitions.send_bounds(numbered.hashes))
        self._questions = Questions(numbered.keys, codes, counts)

    # ------------------------------------------------------------------ the exchange

    def exchange(self, guard: Guard) -> int:
        """Send and receive; returns the status that all ranks agree on. Collective, unless all is here."""
        self.planned = False
        if self.here:
            return OK  # nobody talks: what failed here is told with the next exchange
        if self.plan is not None:
            status = self._run_plan(guard, self._number)
            if self.planned or status & FAILED:
                return status
        return self._exchange_fresh(guard)

    def _exchange_fresh(self, guard: Guard) -> int:
        out = guard.run(self._asking) or nothing(self.group.size)
        arrival = self.ask.run(out, guard.status)
        if arrival.status & FAILED:
            return FAILED
        asked = self._agree_schemas(guard, arrival.headers)
        self.proposal = agreed_proposal(arrival.headers)
        if not asked:  # by no rank: there is nothing to answer
            if self.group.agree_any(guard.failure is not None):
                return FAILED
            return OK
        out = guard.run(self._answering, arrival) or nothing(self.group.size)
        self._arrival = self.answer.run(out, guard.status)
        return self._arrival.status & FAILED

    def _asking(self) -> Outgoing:
        said_of_values = said(self._value_schema, self._own_values(), len(self.table) > 0)
        mine = self._questions
        if mine is None or not len(mine.keys):
            none = np.zeros(self.group.size, np.int64)
            known = 0 if self._key_schema is None else -self._key_schema.digest()
            return Outgoing(none, none, lambda buffer, at: None, known, self.proposal, said_of_values)
        bounds = np.append(0, np.cumsum(mine.counts))
        words = packed_words(mine.keys, None, bounds)

        def fill(buffer: Array, at: Array) -> None:
            for d in range(len(words)):
                pack(mine.keys, None, int(bounds[d]), int(bounds[d + 1]), buffer, int(at[d]))

        return Outgoing(words, mine.counts, fill, mine.keys.schema.digest(), self.proposal, said_of_values)

    def _own_values(self) -> Schema | None:
        return self.table.batch.select(*self.columns).schema if self.table.batch.names else None

    def _agree_schemas(self, guard: Guard, headers: Array) -> bool:
        """All ranks know how keys and values look, if any rank asks for any. Collective."""
        keys, values = headers[:, SCHEMA].tolist(), headers[:, EXTRA].tolist()
        mine = self._questions
        asks = None if mine is None or not len(mine.keys) else mine.keys.schema
        if any(d > 0 for d in keys):
            self._key_schema = self._settled(guard, keys, asks) or asks or self._key_schema
        own = self._own_values()
        agreed = self._settled(guard, values, own if len(self.table) else None)
        if agreed is not None:
            self._value_schema = agreed
        elif own is not None:
            self._value_schema = merged(self._value_schema, own)
        return any(d > 0 for d in keys)

    def _settled(self, guard: Guard, digests: list[int], mine: Schema | None) -> Schema | None:
        """One schema, where some rank has one and another does not know it, else None. Collective."""
        if all(d <= 0 for d in digests) or (0 not in digests and len({abs(d) for d in digests}) == 1):
            return None
        return settle_schemas(self.group, guard, [max(d, 0) for d in digests], mine, lambda: Schema({}))[0]

    def _answering(self, arrival: Arrival) -> Outgoing:
        """What this rank has of what it was asked for."""
        assert self._key_schema is not None
        counts = arrival.headers[:, ROWS].tolist()
        segments = arrival.segments()
        self._slots = [
            self._rows_of(unpack(words, self._key_schema, n))
            for words, n in zip(segments, counts, strict=True)
        ]
        return answer(self._values(), self._slots, self._value_schema)

    def _rows_of(self, keys: Batch) -> Array:
        """The row of the table for each key, -1 where it has none."""
        if not len(keys) or not len(self.table):
            return np.full(len(keys), -1, np.int64)
        return self.cache.indexes.of(self.table.batch.select(*self.table_key)).lookup(keys)

    def _values(self) -> Batch:
        if len(self.table) or (self._value_schema is None and self.table.batch.names):
            return self.table.batch.select(*self.columns)
        return Batch.empty(self._value_schema or Schema({}))

    # ------------------------------------------------------------------ local work, after the exchange

    def finish(self) -> Table:
        """The rows with the columns that were looked up beside them."""
        if self.here or self.table.everywhere:
            return self._finish_here()
        if self.planned:
            return self._finish_planned()
        at, values = self._received()
        if self._worth_a_plan() and self._arrival is not None and fixed(values.schema):
            self._propose_plan(at, values.schema)
        return self._result(at, values)

    def _finish_here(self) -> Table:
        rows, table = self.rows.batch, self.table.batch
        values = self._values() if table.names else Batch()
        ours, theirs = self._tokens()
        settled = 0 not in (*ours, *theirs)
        if len(rows) and len(table):
            asked, keys = rows.select(*self.stage.key), table.select(*self.table_key)
            match = self.matches.match(asked, keys, settled, lambda: self._match(asked, keys))
        else:
            match = self._match_of(np.full(len(rows), -1, np.int64))
        made = self.matches.joined(match, rows, values, self.rows.tokens, self.table.tokens)
        return self._placed_here(made, match, (ours, theirs) if settled else None)

    def _match(self, asked: Batch, keys: Batch) -> Match:
        """Which rows of the table, whose keys these are, stand beside the rows that ask."""
        known = self.cache.indexes.made(KeyRows, keys)
        found = known.find(asked, self.stage.nulls)
        self._check_here(asked, found)
        if not (known.unique or self._beside or self.table.everywhere):
            raise UsageError(
                f'Lookup into "{self.stage.into}": "{self.stage.table}" has several rows of a key, and '
                f'"{self.stage.rows}" does not lie with it; Shuffle the rows by that key first'
            )
        if known.unique or self.stage.missing == "only":
            return self._match_of(found)
        self._refuse(found < 0)
        rows, beside = known.pairs(found, self.stage.missing == "null")
        return Match.with_nulls(rows, beside) if self.stage.missing == "null" else Match(rows, beside)

    def _match_of(self, at: Array) -> Match:
        """Where each row has one partner at most, -1: none."""
        self._refuse(at < 0)
        if self.stage.missing == "null":
            return Match.with_nulls(None, at)
        kept = self._kept(at)
        if self.stage.missing == "only":
            return Match(kept)
        return Match(kept, at if kept is None else at[kept])

    def _check_here(self, asked: Batch, found: Array) -> None:
        """Rows that lie with their table lie with the owner of their key, even if it is not there."""
        if self.table.everywhere or self.group.size == 1 or not len(found) or found.min() >= 0:
            return
        absent = np.flatnonzero(found < 0)
        if not self.check:
            absent = absent[:CHECKED]
        lost = self.partitions.owner_of_hashes(hash_keys(asked.take(absent))) != self.group.rank
        if lost.any():
            at = int(absent[int(np.argmax(lost))])
            raise UsageError(
                f'Lookup into "{self.stage.into}": "{self.stage.rows}" is said to lie by '
                f"{', '.join(self.stage.key)}, but {self._shown(at)} belongs to another rank; "
                "Shuffle it by that key"
            )

    def _received(self) -> tuple[Array, Batch]:
        """Where each row's values stand among those that came (-1: nowhere), and these."""
        schema = self._value_schema or Schema({})
        mine, arrival = self._questions, self._arrival
        if arrival is None or mine is None:
            return np.full(len(self.rows), -1, np.int64), Batch.empty(schema)
        place, values = answered(arrival, mine.counts, schema)
        if not len(place):
            return np.full(len(self.rows), -1, np.int64), values
        at = place[mine.codes]
        if mine.codes.min(initial=0) < 0:
            at[mine.codes < 0] = -1
        return at, values

    def _propose_plan(self, at: Array, schema: Schema) -> None:
        assert self._arrival is not None
        here = [s[s >= 0] for s in self._slots]
        send_rows = np.array([len(s) for s in here], np.int64)
        recv_rows = self._arrival.headers[:, ROWS].copy()
        plan = RowPlan(self.group, self.number, RecordLayout(schema), send_rows, recv_rows, self.check)
        travels = plan.layout.width > 0
        total = int(recv_rows.sum())
        records = plan.arrivals(np.arange(total), recv_rows) if travels else np.zeros(total, np.int32)
        kept, found = self._kept(at), None
        if kept is not None:
            at = at[kept]
        if self.stage.missing == "null" and (at < 0).any():
            found = at >= 0
        final = records[np.maximum(at, 0)] if total and self.columns else np.zeros(len(at), records.dtype)
        dtype = np.int32 if len(self.table) < 2**31 else np.int64
        slots = tuple([s.astype(dtype) for s in here])
        body = PlanBody(slots, final, kept, found, len(self.rows))
        self._pending = Pending(self.proposal, plan, body, body.nbytes + plan.nbytes)

    def _finish_planned(self) -> Table:
        body: PlanBody = self.cache.get(self.plan_token)
        assert self.plan is not None
        columns, valid = self.plan.layout.read(self.plan.views, body.final, self.shelf.new)
        for name, column in columns.items() if self.stage.missing == "null" else ():
            mask = valid.get(name)
            valid[name] = np.ones(len(column), bool) if mask is None else mask
            if body.found is not None:
                column[~body.found], valid[name][~body.found] = np.zeros(1, column.dtype)[0], False
        values = Batch._trusted(columns, valid, len(body.final))
        rows = self.rows.batch if body.kept is None else self.rows.batch.take(body.kept)
        return self._placed(side_by_side(rows, values), body.kept)

    # ------------------------------------------------------------------ what comes out

    def _kept(self, at: Array) -> Array | None:
        """Which rows come out; None: all."""
        if self.stage.missing in ("error", "null"):
            return None
        stay = at < 0 if self.stage.missing == "only" else at >= 0
        return None if stay.all() else np.flatnonzero(stay)

    def _result(self, at: Array, values: Batch) -> Table:
        match = self._match_of(at)
        made = self.matches.joined(match, self.rows.batch, values, NO_TOKENS, NO_TOKENS)
        return self._placed(made, match.rows)

    def _refuse(self, absent: Array) -> None:
        if self.stage.missing == "error" and absent.any():
            at = int(np.argmax(absent))
            raise UsageError(
                f'Lookup into "{self.stage.into}": {int(absent.sum())} rows of "{self.stage.rows}" name keys '
                f'that "{self.stage.table}" does not have, such as {self._shown(at)}; '
                'add them, or say missing="drop", "null" or "only"'
            )

    def _shown(self, row: int) -> str:
        return row_text(self.rows.batch.select(*self.stage.key), row)

    def _placed(self, batch: Batch, kept: Array | None) -> Table:
        """The result lies where the rows lay, with their tokens if all of them came out, once."""
        rows = self.rows
        if kept is None and len(batch) == len(rows) and self.stage.missing in ("error", "null"):
            whole = all(batch._columns.get(n) is c for n, c in rows.batch._columns.items())
            if whole:
                return Table(
                    batch, rows.layout, rows.tokens, rows.block_starts, rows.first_row, rows.rows_total,
                    rows_of=rows.rows_of,
                )  # fmt: skip
        return Table(batch, rows.layout, NO_TOKENS, np.array([0, len(batch)]))

    def _placed_here(self, made: Batch, match: Match, keys: tuple[object, ...] | None) -> Table:
        """The result, whose columns are as known as what they were taken from and the keys they were taken by
        (``keys``: the tokens of those; None: unknown).
        """
        placed = self._placed(made, match.rows)
        if keys is None:
            return placed
        tokens = dict(placed.tokens)
        looked_up = self.columns if match.absent is None else ()
        for name in made._columns:
            of = (self.table if name in looked_up else self.rows).tokens.get(name)
            if of and name not in tokens and name not in made._valid:
                tokens[name] = self._derived(keys, of)
        placed.tokens = tokens
        return placed

    def _derived(self, keys: tuple[object, ...], of: int) -> int:
        known = self._tokens_known.get((keys, of))
        if known is None:
            if len(self._tokens_known) >= TOKENS_KEPT:
                self._tokens_known.clear()
            known = self._tokens_known[keys, of] = token("beside", self.number, keys, of)
        return known

    # ------------------------------------------------------------------ transactions

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands. Collective. Returns tokens to rename: none."""
        if self._arrival is not None:
            self._last_proposal = self.proposal
        if self._pending is not None:
            self._plan_tokens = self._tokens()
        self._install()
        self._forget()
        return {}

    def rollback(self) -> None:
        """The iteration never was."""
        self._forget()

    def _forget(self) -> None:
        self._pending = None
        self._begin()
        self.shelf.trim()
