"""Shuffle of indexed rows: per key, aggregates of expressions over rows and a table joined with them.

What the joined table alone decides is computed once per row of that table; each indexed row then takes one
or more of those values, its own columns beside them, and is folded at once: no column of rows x anything is
ever made. Keys never travel.

    push     rows lie with the key that they are joined on; partial results go to the owners of the other key
    pull     rows lie with the key that is reduced by; the values that they name come from their owners

A push onto some rows only (``touched``) sends places and values of what was reached, and costs as much as the
rows that start from the joined table; all else sends values alone, in an order that both sides know.

How it can go wrong: as in `PlannedExchange` and `FreshExchange`. Which kernel computes is this rank's own
business; what is exchanged follows from the stage alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iterreduce.agreement import Guard
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch, row_text
from iterreduce.columns.linkfold import Touched, merge_into
from iterreduce.columns.links import Links
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field
from iterreduce.columns.stretches import as_words
from iterreduce.errors import UsageError
from iterreduce.exchange import FAILED, ROWS, FreshExchange, Outgoing, exclusive, nothing
from iterreduce.indexing import GAP, Resident, Side
from iterreduce.linkexchange import LinkExchange
from iterreduce.linkgrids import Grids, walk
from iterreduce.linklanes import Lane, at_slots, by_slot
from iterreduce.linkprogram import Bound, Program, Shape
from iterreduce.rowrounds import Shelf
from iterreduce.stages import Shuffle
from iterreduce.table import RowsOf, Table


class LinkShuffle:
    """One `Shuffle` of indexed rows at work, on every iteration of a loop run.

    ``residents``: what the `Index` stages of the run made, by name; all ranks have the same ones.
    ``walked`` counts the rows that touched shuffles have folded on this rank: the messages of a frontier.
    """

    def __init__(
        self,
        stage: Shuffle,
        number: int,
        group: Group,
        residents: Mapping[str, Resident],
        check: bool = False,
        limit_bytes: int | None = None,
    ):
        self.stage, self.number, self.group, self.check = stage, number, group, check
        self.residents, self.walked = residents, 0
        self.fresh = FreshExchange(group, number, check, limit_bytes=limit_bytes) if stage.touched else None
        self.keys_changed = False
        self.shelf = Shelf()
        self.resident: Resident | None = None
        self._places: list[Array] = []
        self._values: dict[str, Array] = {}
        self._came_values: dict[str, Array] = {}
        self._starts: tuple[Array | None, dict[str, Array]] = (None, {})
        self._folded: list[Lane] = []

    # ------------------------------------------------------------------ what all ranks know alike

    def _begin(self) -> Resident:
        """Take up the rows; where they are others than before (``--naive``), all made of them goes."""
        resident = self.residents[self.stage.rows]
        if self.resident is resident:
            return resident
        keys = tuple(resident.stage.keys)
        key, on = self.stage.key, self.stage.joined.on if self.stage.joined else None
        if len(key) != 1 or key[0] not in keys or on not in (None, *keys) or on == key[0]:
            raise UsageError(
                f'shuffle of "{self.stage.rows}" by {", ".join(key)}, joined on {on or "nothing"}: wanted '
                f"one of its keys {keys[0]} and {keys[1]}, and the other one to join on"
            )
        self.push = key[0] == keys[1]
        if self.stage.touched and not self.push:
            raise UsageError(
                f'shuffle of "{self.stage.rows}" by {key[0]}: touched goes with the second key, {keys[1]}; '
                "swap the keys of the Index"
            )
        self.shape = Shape(self.stage, tuple(resident.stretches.columns))
        self.resident = resident
        self.program: Program | None = None
        self._exchange: LinkExchange | None = None
        self._slots: tuple[Any, Array | None] = (None, None)
        self._order: tuple[Any, Array | None] = (None, None)
        self._whole: tuple[Any, bool] = (None, False)
        self._touched: list[Touched] = []
        self._scratch: list[Array] = []
        self._own: list[Array] = []
        self._held: list[Array] = []
        side = self._target
        rows = side.degrees.sum(axis=0) if resident.stage.symmetric else side.degrees[int(self.push)]
        self._grids = Grids(self.group, self.shape, int(rows.max(initial=1)))
        return resident

    @property
    def _source(self) -> Side:
        """The side that rows are joined on."""
        assert self.resident is not None
        return self.resident.first if self.push else self.resident.second

    @property
    def _target(self) -> Side:
        """The side that rows are reduced by."""
        assert self.resident is not None
        return self.resident.second if self.push else self.resident.first

    def _planned(self, resident: Resident, width: int) -> LinkExchange:
        """The exchange of this many words per place, made when it is first needed. Collective then."""
        if self._exchange is None or self._exchange.width != max(1, width):
            asked = np.array([len(slots) for slots in resident.asked], np.int64)
            sent, received = (resident.named, asked) if self.push else (asked, resident.named)
            some = min(1, width)
            self._exchange = LinkExchange(
                self.group, self.number, max(1, width), sent * some, received * some, self.check
            )
            self._exchange.connect()
        return self._exchange

    # ------------------------------------------------------------------ local work, before the exchange

    def prepare(self, tables: Mapping[str, Table], iteration: int) -> None:
        """Push: fold the rows by place. Pull: compute what other ranks ask for."""
        self._begin()
        self._tables = tables
        assert self.stage.onto is not None
        self._check_layout(self.stage.onto, tables[self.stage.onto])
        self.shape.check_key(*tables[self.stage.onto].layout.keys)
        if self.shape.counts_only:
            return
        joined, slots = self._joined()
        if self.program is None or not self.program.fits(joined.schema):
            dtypes = {n: c.dtype for n, c in self.residents[self.stage.rows].stretches.columns.items()}
            self.program = Program(self.shape, dtypes, joined.schema)
        self._values = self._evaluated(joined)
        if slots is not None and self._are_all(slots):
            self._values = {name: by_slot(v, slots) for name, v in self._values.items()}
            slots = None
        if self.push:
            self._starts = self._frontier(slots, self.residents[self.stage.rows].pushed().n_sources)
            if not self.shape.order_free:
                self._fold()
        elif slots is not None:
            raise UsageError(
                f'shuffle of "{self.stage.rows}" by {self.stage.key[0]}: the table that it is joined with '
                "must have all keys of the Index; join on the first key to use some rows only"
            )

    def _evaluated(self, joined: Batch) -> dict[str, Array]:
        assert self.program is not None
        return self.program.values(joined._columns, len(joined))

    def _joined(self) -> tuple[Batch, Array | None]:
        """The table that rows are joined with, and the slot of each of its rows (None: row i is slot i)."""
        if self.stage.joined is None:
            return self._source.keys, None
        table = self._tables[self.stage.joined.table]
        self._check_layout(self.stage.joined.table, table)
        key, own = table.batch[table.layout.keys[0]], self._source.keys
        if key is own[own.names[0]]:
            return table.batch, None
        if self._slots[0] is not key:
            self._slots = key, self._source.find(key)
        return table.batch, self._slots[1]

    def _are_all(self, slots: Array) -> bool:
        """Do the joined rows stand for every slot, in whatever order?"""
        if len(slots) < len(self._source.keys) or self.stage.touched:
            return False
        if self._whole[0] is not slots:
            seen = np.zeros(len(self._source.keys), bool)
            seen[slots[slots >= 0]] = True
            self._whole = slots, bool(seen.all())
        return self._whole[1]

    def _check_layout(self, name: str, table: Table) -> None:
        if table.layout.kind != "key" or len(table.layout.keys) != 1:
            raise UsageError(
                f'shuffle of "{self.stage.rows}": "{name}" does not lie by one key column; make it a State '
                "with a key, or Shuffle it by one"
            )

    def _frontier(self, slots: Array | None, starts: int) -> tuple[Array | None, dict[str, Array]]:
        """The slots that rows start from, with the values beside them; None: all, by slot."""
        if slots is None:
            return None, self._values
        chosen = np.flatnonzero((slots >= 0) & (slots < starts))
        if len(chosen) == len(slots):
            return slots, self._values
        return slots[chosen], {name: v[chosen] for name, v in self._values.items()}

    def _lanes(self, values: Mapping[str, Array]) -> list[Lane]:
        """What is folded for all outputs; ``self._folded`` says of which lane each word is."""
        assert self.program is not None
        lanes = self._grids.lanes(self.program, values)
        self._folded = [lane for lane in lanes for _ in range(lane.words)]
        return lanes

    def _fold(self) -> None:
        """Push: all lanes, by place."""
        assert self.resident is not None
        links, (frontier, values) = self.resident.pushed(), self._starts
        lanes = self._lanes(values)
        if self.stage.touched:
            self._fold_touched(links, frontier, lanes)
            return
        self._places = []
        for lane in lanes:
            out = self.shelf.new(self.resident.places, lane.field)
            if frontier is not None:
                out.fill(lane.identity)
            walk(links, lane, frontier, out)
            self._places += lane.of(out)

    def _fold_touched(self, links: Links, frontier: Array | None, lanes: list[Lane]) -> None:
        """The places that were reached, and their values in ``_scratch``."""
        assert self.resident is not None
        rows = len(self._target.keys)
        self.walked += links.n_edges if frontier is None else links.edges_of(frontier)
        while len(self._touched) < len(self._folded):
            self._touched.append(Touched(rows))
        fields = [lane.field for lane in lanes]
        if [(f.dtype, f.shape) for f in fields] != [(out.dtype, out.shape[1:]) for out in self._held]:
            self._held = [np.empty((self.resident.places, *f.shape), f.dtype) for f in fields]
            self._own = [np.empty(rows, lane.word) for lane in self._folded]
        self._scratch = []
        for lane, out in zip(lanes, self._held, strict=True):
            self._reached = walk(links, lane, frontier, out)
            self._scratch += lane.of(out)
        if frontier is None:  # all rows start from it: what they lead to never changes
            self._reached = np.flatnonzero(links.counts).astype(np.int32)

    # ------------------------------------------------------------------ the exchange

    def exchange(self, guard: Guard) -> int:
        """Send and receive. Collective."""
        resident = self._begin()
        if self.shape.counts_only:
            return guard.status
        if self.push and self.shape.order_free:
            links, (frontier, values) = resident.pushed(), self._starts
            self._grids.agree(guard, self.program, links, frontier, values)
            guard.run(self._fold)
        if self.group.size == 1:
            return self._after(guard, resident, guard.status)
        if self.fresh is not None:
            out = guard.run(self._outgoing) or nothing(self.group.size)
            self._arrival = self.fresh.run(out, guard.status)
            return self._arrival.status & FAILED
        plan = self._planned(resident, self._grids.words() if self.push else len(self.shape.parts))
        guard.run(self._write, plan)
        return self._after(guard, resident, plan.run(guard.status) & FAILED)

    def _after(self, guard: Guard, resident: Resident, status: int) -> int:
        """Pull: values have come; an order-free sum of them needs its grid. Collective then."""
        if status & FAILED or self.push or not self.shape.order_free:
            return status
        values = guard.run(self._pulled_values) or {}
        self._grids.agree(guard, self.program, guard.run(resident.pulled), None, values, self._values)
        return guard.status

    def _write(self, plan: LinkExchange) -> None:
        """Fill the send buffer."""
        assert self.resident is not None
        if self.push:
            own_at = self.resident.own_at
            for j, out in enumerate(self._places):
                plan.send.reshape(-1, plan.width)[:, j] = out[:own_at].view(np.int64)
            return
        for rank, slots in enumerate(self.resident.asked):
            first = int(plan.send_at[rank]) + GAP * plan.width
            segment = plan.send[first : first + len(slots) * plan.width].reshape(-1, plan.width)
            for j, value in enumerate(self._values.values()):
                segment[:, j] = as_words(value[slots])

    def _outgoing(self) -> Outgoing:
        """Places and values of what was reached at other ranks."""
        assert self.resident is not None
        far = self._reached[: np.searchsorted(self._reached, self.resident.own_at)]
        begins, bounds = self._bounds(far)
        rows, width = np.diff(bounds), len(self._scratch)
        values = [out[far].view(np.int64) for out in self._scratch]

        def fill(buffer: Array, at: Array) -> None:
            for d in range(self.group.size):
                lo, hi, n, first = int(bounds[d]), int(bounds[d + 1]), int(rows[d]), int(at[d])
                for j, column in enumerate(values):
                    buffer[first + j * n : first + (j + 1) * n] = column[lo:hi]
                numbers = buffer[first + width * n : first + width * n + (n + 1) // 2].view(np.int32)
                numbers[:n] = far[lo:hi] - begins[d]

        return Outgoing(rows * width + (rows + 1) // 2, rows, fill)

    def _bounds(self, far: Array) -> tuple[Array, Array]:
        """Each rank's first place, and where its places begin and end among these, which are ascending."""
        assert self.resident is not None
        begins = exclusive(self.resident.named + GAP) + GAP
        return begins, np.searchsorted(far, np.append(begins - GAP, self.resident.own_at))

    # ------------------------------------------------------------------ local work, after the exchange

    def finish(self) -> Table:
        """The outputs beside the keys of the table that rows are shuffled onto."""
        assert self.stage.onto is not None
        onto = self._tables[self.stage.onto]
        if self.stage.touched:
            return self._finish_touched(onto)
        if self.shape.counts_only:
            return self._degrees(onto)
        assert self.program is not None
        words = self._merged() if self.push else self._pulled()
        columns = self._grids.outputs(words, self.shelf.new)
        return self._onto(onto, columns, self.program.outputs)

    def _degrees(self, onto: Table) -> Table:
        """How many rows each key has: its owner was told when the rows were indexed."""
        side, symmetric = self._target, self._begin().stage.symmetric
        rows = side.degrees.sum(axis=0) if symmetric else side.degrees[1 if self.push else 0]
        word = np.dtype(np.int64)
        bounds = [Bound(o, word, word, None) for o in self.shape.outputs]
        return self._onto(onto, [rows.copy() for _ in bounds], bounds)

    def _onto(self, onto: Table, columns: list[Array], outputs: Sequence[Bound]) -> Table:
        """Outputs by slot, as rows of the table that they are shuffled onto."""
        order = self._order_of(onto.batch[onto.layout.keys[0]])
        keys = dict(onto.batch.select(*onto.layout.keys)._columns)
        for bound, words in zip(outputs, columns, strict=True):
            if order is not None:
                words = at_slots(words, order, bound.identity)
            keys[bound.output.name] = bound.finished(words)
        tokens = {k: onto.tokens[k] for k in onto.layout.keys if k in onto.tokens}
        return Table(Batch._trusted(keys, {}, len(onto)), onto.layout, tokens)

    def _merged(self) -> list[Array]:
        """Push: what this rank folded for its own keys, and what came for them, in rank order."""
        assert self.resident is not None
        own = [out[self.resident.own_at :] for out in self._places]
        self._places = []
        if self.group.size == 1:
            return own
        assert self._exchange is not None
        for rank, slots in enumerate(self.resident.asked):
            if len(slots):
                came = self._exchange.arrived(rank)
                for j, lane in enumerate(self._folded):
                    merge_into(lane.combine, own[j], slots, came[:, j].view(lane.word))
        return own

    def _pulled_values(self) -> dict[str, Array]:
        """Pull: the parts by place."""
        if not self._came_values:
            parts = enumerate(self._values.items())
            self._came_values = {name: self._by_place(j, value) for j, (name, value) in parts}
        return self._came_values

    def _pulled(self) -> list[Array]:
        """Pull: the rows of each key folded over the values that came, and this rank's own."""
        assert self.resident is not None
        links, out = self.resident.pulled(), []
        for lane in self._lanes(self._pulled_values()):
            words = self.shelf.new(links.n_targets, lane.field)
            walk(links, lane, None, words)
            out += lane.of(words)
        return out

    def _by_place(self, j: int, own: Array) -> Array:
        """The values of one part by place: those of other ranks, then this rank's."""
        assert self.resident is not None
        word = np.dtype(np.float64 if own.dtype.kind == "f" else np.int64)
        out = self.shelf.new(self.resident.places, Field("fixed", word))
        own_at = self.resident.own_at
        if self._exchange is not None:
            out[:own_at] = self._exchange.recv.reshape(-1, self._exchange.width)[:, j].view(word)
        out[own_at:] = own
        return out

    def _order_of(self, key: Any) -> Array | None:
        """The slot of each row of the table onto which rows are shuffled; None: row i is slot i."""
        own = self._target.keys
        if key is own[own.names[0]]:
            return None
        if self._order[0] is not key:
            slots = self._target.find(key)
            self._check_missing(slots)  # before they are kept: what failed once must fail again
            same = len(slots) == len(own) and bool((slots == np.arange(len(slots))).all())
            self._order = key, None if same else slots
        return self._order[1]

    def _check_missing(self, slots: Array) -> None:
        """Keys that have rows must be in the table, unless they may be dropped."""
        absent = np.ones(len(self._target.keys), bool)
        absent[slots[slots >= 0]] = False
        role = 1 if self.push else 0
        absent &= self._target.degrees[role] > 0
        if self.stage.missing == "error" and absent.any():
            raise UsageError(
                f'shuffle onto "{self.stage.onto}": {int(absent.sum())} keys of "{self.stage.rows}" are not '
                f"in it, such as {row_text(self._target.keys, int(np.argmax(absent)))}; give it "
                'rows for them, or say missing="drop"'
            )

    def _finish_touched(self, onto: Table) -> Table:
        """Only the keys that were reached."""
        assert self.program is not None
        slots, words = self._reached_here()
        columns = self._grids.outputs(words, self.shelf.new)
        bound = zip(self.program.outputs, columns, strict=True)
        return self._at(onto, slots, {b.output.name: b.finished(column) for b, column in bound})

    def _at(self, onto: Table, slots: Array, columns: dict[str, Array]) -> Table:
        """These columns as rows of the table for these slots; what it has no row for is left out."""
        rows = self._rows_at(onto, slots)
        if rows is not slots and len(rows) and rows.min() < 0:
            known = rows >= 0
            slots, rows = slots[known], rows[known]
            columns = {name: column[known] for name, column in columns.items()}
        keys = self._keys_at(slots).rename(**{self._target.keys.names[0]: onto.layout.keys[0]})
        made = {**keys._columns, **columns}
        made_of = RowsOf(onto.batch.select(*onto.layout.keys), rows)
        return Table(Batch._trusted(made, {}, len(slots)), onto.layout, rows_of=made_of)

    def _keys_at(self, slots: Array) -> Batch:
        return self._target.keys.take(slots)

    def _reached_here(self) -> tuple[Array, list[Array]]:
        """The slots of this rank that were reached, by any rank, and the words of every lane."""
        assert self.resident is not None
        own_at = self.resident.own_at
        near = self._reached[np.searchsorted(self._reached, own_at) :]
        own = near - own_at
        if self.group.size == 1:
            return own, [out[near] for out in self._scratch]
        for j, lane in enumerate(self._folded):
            seen, into = self._touched[j], self._own[j]
            seen.begin()
            seen.merge(lane.combine, into, own, self._scratch[j][near])
            for slots, values in self._came(j, lane.word):
                seen.merge(lane.combine, into, slots, values)
        slots = self._touched[0].slots()
        return slots, [words[slots] for words in self._own]

    def _rows_at(self, onto: Table, slots: Array) -> Array:
        """The rows of the table that stand for these slots; -1: it has none."""
        order = self._order_of(onto.batch[onto.layout.keys[0]])
        if order is None:
            return slots.astype(np.int64, copy=False)
        row_of = np.full(len(self._target.keys), -1)
        row_of[order[order >= 0]] = np.flatnonzero(order >= 0)
        return row_of[slots]

    def _came(self, j: int, word: np.dtype[Any]) -> list[tuple[Array, Array]]:
        """Slots and values of lane ``j`` from each rank."""
        rows = self._arrival.headers[:, ROWS].tolist()
        came = enumerate(zip(self._arrival.segments(), rows, strict=True))
        return [self._came_from(rank, segment, n, j, word) for rank, (segment, n) in came]

    def _came_from(self, rank: int, segment: Array, n: int, j: int, word: Any) -> tuple[Array, Array]:
        assert self.resident is not None
        numbers = segment[len(segment) - (n + 1) // 2 :].view(np.int32)[:n]
        return self.resident.asked[rank][numbers], segment[j * n : (j + 1) * n].view(word)

    # ------------------------------------------------------------------ transactions

    def commit(self, keys_changed: bool) -> dict[int, int]:
        """The iteration stands."""
        self.rollback()
        return {}

    def rollback(self) -> None:
        """The iteration never was, or is over."""
        self._places, self._values, self._came_values = [], {}, {}
        self.shelf.trim()
