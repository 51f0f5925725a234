"""How rows travel: one message per destination, with a header in front, fresh or planned.

Every segment begins with a header of `HEADER_WORDS` int64 words; the status in it is repeated to every
destination, so all ranks see in the same collective that one of them failed or needs a fresh plan, and
decide alike. A *fresh* exchange sends counts and rows inline in one Alltoall of fixed slots; only where a
sender's rows do not fit its slots does a second, counted exchange follow, in rounds under a byte budget. A
*planned* exchange (`ValuesPlan`) knows all counts and slots from before and sends accumulators only.

How it can go wrong: a rank that takes another branch than the others hangs all. So nothing here branches on
a local observation, but only on headers that every rank has received. ``check`` compares the stage and the
sequence number of every header.

What it is not: it knows no user function, no loop and no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iterreduce.collectives import Group, Plan
from iterreduce.columns.heads import heard_status, put_heads, put_status, read_heads
from iterreduce.columns.placement import current, explained, needed
from iterreduce.columns.ragged import Array
from iterreduce.errors import MemoryBudgetError, ScheduleError, ScratchError

HEADER_WORDS = 8
STAGE, STATUS, ROWS, WORDS, LARGEST, SCHEMA, PROPOSAL, EXTRA = range(HEADER_WORDS)

OK, FAILED, REPLAN, SECOND, STOP = 0, 1, 2, 4, 8  # bits of the status word
ROWS_WANTED = 16  # the outputs of this stage cannot be folded into records: whole rows must travel
ABSTAIN = -1  # proposal of a rank without rows: whatever the others say

INLINE_BYTES = 256 << 10  # all slots of one rank together: below it one Alltoall beats a count exchange
FIRST_SLOT_WORDS = 512
FEW_RANKS = 8  # whose header words are read one by one in less time than a compiled call takes
ROUND_BYTES = 64 << 20  # per destination and round; far below 2^31 of any count that MPI takes

Pack = Callable[[Array, Array], None]


@dataclass(slots=True)  # values, though not frozen: freezing costs 2 us per exchange
class Outgoing:
    """What one rank brings to a fresh exchange: words and rows for each destination, and who packs them."""

    words: Array
    rows: Array
    pack: Pack
    schema: int = 0
    proposal: int = 0
    extra: Array | int = 0  # one more word for the stage that sends: for all destinations, or one for each


def nothing(size: int, proposal: int = ABSTAIN) -> Outgoing:
    """No rows for anybody."""
    none = np.zeros(size, np.int64)
    return Outgoing(none, none, lambda buffer, at: None, 0, proposal)


@dataclass(slots=True)
class Arrival:
    """What came: headers int64[size, HEADER_WORDS], and of a source its words ``[starts, starts + counts)``.

    ``status``: all ranks' status bits, the same on every rank. ``late`` tells whose rows did not fit and have
    not come yet (``some_late``: anyone's); ``too_large`` is the message of a rank whose
    rows did not fit its budget and were thrown away. Segments are read before the next exchange.
    """

    headers: Array
    buffers: tuple[Array, ...]
    starts: Array
    counts: Array
    late: Array
    status: int
    some_late: bool
    too_large: str = ""
    no_room: str = ""  # on all ranks, where one of them had no room for what comes or goes

    def segment(self, source: int) -> Array:
        """The payload of one source, int64 words."""
        at = int(self.starts[source])
        return self.buffers[source][at : at + int(self.counts[source])]

    def segments(self) -> list[Array]:
        """The payloads in rank order; raises `MemoryBudgetError` where this rank threw them away."""
        if self.no_room:
            raise ScratchError(self.no_room)
        if self.too_large:
            raise MemoryBudgetError(self.too_large)
        return [self.segment(source) for source in range(len(self.counts))]


class FreshExchange:
    """The exchange of one stage when nothing is known beforehand. Buffers live as long as it does.

    ``limit_bytes`` bounds what one rank may receive: a rank over it takes part in all rounds, throws the
    rows away, and its `Arrival.segments` raises `MemoryBudgetError`.
    """

    def __init__(
        self,
        group: Group,
        stage: int,
        check: bool = False,
        round_bytes: int = ROUND_BYTES,
        limit_bytes: int | None = None,
    ):
        self.group, self.stage, self.check = group, stage, check
        self.round_words = max(1, round_bytes // 8)
        self.limit_words = None if limit_bytes is None else limit_bytes // 8
        self.sequence = 0
        self.largest_slot = max(2 * HEADER_WORDS, INLINE_BYTES // 8 // group.size)
        self._resize(min(FIRST_SLOT_WORDS, self.largest_slot))

    def _resize(self, slot_words: int) -> None:
        self.slot = slot_words
        self.inline_send = needed(self.group.size * slot_words)
        self.inline_recv = needed(self.group.size * slot_words)
        self.payloads = np.arange(self.group.size, dtype=np.int64) * slot_words + HEADER_WORDS
        self._send_heads = self.inline_send.reshape(self.group.size, slot_words)
        self._recv_heads = self.inline_recv.reshape(self.group.size, slot_words)
        self.call = self.group.alltoall_plan(self.inline_send, self.inline_recv, HEADER_WORDS)

    @property
    def nbytes(self) -> int:
        """Bytes of the resident buffers."""
        return self.inline_send.nbytes + self.inline_recv.nbytes

    def run(self, out: Outgoing, status: int = OK) -> Arrival:
        """Send and receive. Collective. On FAILED or STOP of any rank nothing but headers has meaning."""
        arrival = self.first(out, status)
        return self.second(out, arrival) if arrival.some_late else arrival

    def rest(self, out: Outgoing) -> Arrival:
        """What `run` does behind its first collective, for who has made that one. Collective."""
        arrival = self._inline()
        return self.second(out, arrival) if arrival.some_late else arrival

    def first(self, out: Outgoing, status: int = OK) -> Arrival:
        """Headers, and the rows of those ranks whose rows fit their slots. Collective."""
        self.sequence += 1
        if status & FAILED:
            out = nothing(self.group.size)
        if max(out.words.tolist()) + HEADER_WORDS <= self.slot:
            out.pack(self.inline_send, self.payloads)
        else:
            status |= SECOND
        self._write_headers(out, status)
        self.call.run()
        return self._inline()

    def _write_headers(self, out: Outgoing, status: int) -> None:
        stage = self.stage << 32 | self.sequence & 0xFFFFFFFF
        extra = np.full(self.group.size, out.extra, np.int64) if isinstance(out.extra, int) else out.extra
        put_heads(self._send_heads, stage, status, out.rows, out.words, out.schema, out.proposal, extra)

    def _inline(self) -> Arrival:
        size = self.group.size
        headers, counts = np.empty((size, HEADER_WORDS), np.int64), np.empty(size, np.int64)
        late = np.empty(size, bool)
        status, largest, some = read_heads(self._recv_heads, FAILED | STOP, SECOND, headers, counts, late)
        check_headers(headers, self.check)
        arrival = Arrival(
            headers, (self.inline_recv,) * size, self.payloads, counts, late, status, bool(some)
        )
        self._adapt(largest)
        return arrival

    def _adapt(self, largest: int) -> None:
        """The next exchange's slot: what would have held this one. A function of agreed headers alone."""
        wanted = 1 << (largest + HEADER_WORDS - 1).bit_length()
        if self.slot < wanted <= self.largest_slot:
            # the arrival just returned still reads the old receive buffer: new ones are made, none is reused
            self._resize(wanted)

    def second(self, out: Outgoing, arrival: Arrival) -> Arrival:
        """The rows that did not fit, in rounds. Collective: the headers tell all ranks that it follows."""
        size, mine = self.group.size, bool(arrival.late[self.group.rank])
        words = out.words if mine else np.zeros_like(out.words)
        send_at = exclusive(words)
        counts = np.where(arrival.late, arrival.headers[:, WORDS], 0)
        total = int(counts.sum())
        over = self.limit_words is not None and total > self.limit_words
        largest = int(arrival.headers[:, LARGEST].max())
        recv_at = exclusive(counts)
        (send, recv), no_room = self.buffers(int(words.sum()), size * self.round_words if over else total)
        if no_room:
            return replace(arrival, counts=np.zeros_like(counts), no_room=no_room)
        if mine:
            out.pack(send, send_at)
        for k in range(-(-largest // self.round_words)):
            done = k * self.round_words
            sc = np.clip(words - done, 0, self.round_words)
            rc = np.clip(counts - done, 0, self.round_words)
            rd = np.arange(size) * self.round_words if over else recv_at + np.minimum(done, counts)
            bound = size * max(largest, self.round_words)  # no segment of any rank ends behind it
            self.group.alltoallv(send, sc, send_at + np.minimum(done, words), recv, rc, rd, 0, bound)
        if over:
            return Arrival(
                arrival.headers, arrival.buffers, arrival.starts, np.zeros_like(counts), arrival.late,
                arrival.status, True, over_budget(total * 8, self.limit_words * 8),  # type: ignore[operator]
            )  # fmt: skip
        buffers = tuple([recv if late else b for late, b in zip(arrival.late, arrival.buffers, strict=True)])
        starts = np.where(arrival.late, recv_at, arrival.starts)
        return Arrival(
            arrival.headers, buffers, starts, np.where(arrival.late, counts, arrival.counts), arrival.late,
            arrival.status, True,
        )  # fmt: skip

    def buffers(self, *words: int) -> tuple[list[Array], str]:
        """Buffers, or the words of a rank whose scratch directory has no room for its own. Collective where
        arrays may lie in files, which all ranks know.
        """
        made, error = [], None
        try:
            made = [np.empty(n, np.int64) for n in words]
        except MemoryError as failed:
            error = explained(failed)
            if not isinstance(error, ScratchError):
                raise
        if current() is None or not self.group.agree_any(error is not None):
            return made, ""
        said = self.group.allgather_bytes(str(error or "").encode())
        return [np.empty(0, np.int64)] * len(words), next(text for text in said if text).decode()


def beyond_memory(*things: Any) -> bool:
    """With a budget and a scratch directory: are batches or arrays too much to be read in no order?"""
    place = current()
    return place is not None and sum(thing.nbytes for thing in things) > place.working_bytes


def may_be_beyond_memory(headers: Array) -> bool:
    """Is what any rank gets in this fresh exchange too much, as far as all ranks know? No rank gets more than
    the largest segments of all ranks together.
    """
    place = current()
    return place is not None and 8 * int(headers[:, LARGEST].sum()) > place.working_bytes


def over_budget(nbytes: int, limit_bytes: int) -> str:
    """What a rank says whose share does not fit its budget."""
    return (
        f"this rank's share of a shuffle is {nbytes:,} bytes, its budget {limit_bytes:,}; "
        "use more ranks, raise --memory, or combine rows before they are sent"
    )


def exclusive(counts: Array) -> Array:
    """Where each segment begins: the exclusive prefix sum, int64."""
    out = np.zeros(len(counts), np.int64)
    np.cumsum(counts[:-1], out=out[1:])
    return out


def check_headers(headers: Array, check: bool) -> None:
    """Under ``--check``: every rank must be in the same stage and at the same exchange of it."""
    if check and len(set(headers[:, STAGE].tolist())) > 1:
        seen = ", ".join(
            f"rank {r}: stage {w >> 32} exchange {w & 0xFFFFFFFF}"
            for r, w in enumerate(headers[:, STAGE].tolist())
        )
        raise ScheduleError(
            f"ranks met in different stages ({seen}); the program must be the same on all ranks"
        )


def agreed_proposal(headers: Array) -> int:
    """The token that all ranks propose (those that abstain agree with any), else 0."""
    said = {p for p in headers[:, PROPOSAL].tolist() if p != ABSTAIN}
    return int(said.pop()) if len(said) == 1 else 0


class PlannedExchange:
    """An exchange whose counts are known: one Alltoallv of ready buffers, a header before every segment.

    Whoever derives from it lays out ``send`` and ``recv`` and says where segments (headers in front) begin.
    """

    send: Array
    recv: Array

    def __init__(self, group: Group, stage: int, width: int, check: bool = False):
        self.group, self.stage, self.width, self.check = group, stage, width, check
        self.gap = -(-HEADER_WORDS // width)
        self.sequence = 0

    def _lay_out(self, send_counts: Array, send_at: Array, recv_counts: Array, recv_at: Array) -> None:
        self._segments = (send_counts, send_at, recv_counts, recv_at)
        self._recv_heads = recv_at[:, None] + np.arange(HEADER_WORDS)
        self._status_at = (send_at + STATUS).tolist(), (recv_at + STATUS).tolist()
        self.recv_status = self._status_at[1]  # where all ranks say how they are
        self._words = self.send.data, self.recv.data
        self._call: Plan | None = None

    def connect(self) -> None:
        """Prepare the collective, once, before the first `run`. Collective: never inside of a `Guard`."""
        if self._call is None:
            sc, sa, rc, ra = self._segments
            self._call = self.group.alltoallv_plan(
                self.send, sc, sa, self.recv, rc, ra, self.gap * self.width
            )

    def unheard(self) -> Callable[[], None]:
        """`run` of what is said in the headers already, without a look at those that came. Collective."""
        assert self._call is not None
        return self._call.run

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return self.send.nbytes + self.recv.nbytes

    def run(self, status: int = OK) -> int:
        """Send what stands in the buffer. Collective. Returns the status bits of all ranks together."""
        assert self._call is not None
        self.sequence += 1
        if self.check or self.group.size > FEW_RANKS:
            stage = self.stage << 32 | self.sequence & 0xFFFFFFFF
            put_status(self.send, self._segments[1], stage, status)
            self._call.run()
            check_headers(self.recv[self._recv_heads], self.check)
            return heard_status(self.recv, self._segments[3])
        (send, recv), (send_at, recv_at), heard = self._words, self._status_at, OK
        for at in send_at:
            send[at] = status
        self._call.run()
        for at in recv_at:
            heard |= recv[at]
        return heard


class ValuesPlan(PlannedExchange):
    """A combined shuffle whose keys are known: accumulator records go straight from fold to owner.

    The send buffer *is* the table of local accumulators: ``records[codes[i]]`` is where row ``i`` folds
    into, each destination's records in one piece behind a gap that holds the header. ``slots`` say where
    each received record belongs among the owner's ``rows_out`` keys; gaps go to one row behind them.
    """

    def __init__(
        self, group: Group, stage: int, width: int, send_rows: Array, recv_rows: Array, check: bool = False
    ):
        super().__init__(group, stage, width, check)
        self.send_rows, self.recv_rows = send_rows.astype(np.int64), recv_rows.astype(np.int64)
        send_counts, recv_counts = (self.send_rows + self.gap) * width, (self.recv_rows + self.gap) * width
        self.send_at, self.recv_at = exclusive(send_counts), exclusive(recv_counts)
        self.send = np.zeros(int(send_counts.sum()), np.int64)
        self.recv = np.zeros(int(recv_counts.sum()), np.int64)
        self.records, self.received = self.send.reshape(-1, width), self.recv.reshape(-1, width)
        self._lay_out(send_counts, self.send_at, recv_counts, self.recv_at)

    def shifted(self, codes: Array) -> Array:
        """Numbers of keys in (destination, hash) order -> rows of ``records``, as int32 where they fit."""
        dest = np.repeat(np.arange(1, self.group.size + 1) * self.gap, self.send_rows)
        place = np.arange(len(dest), dtype=np.int64) + dest
        place = place.astype(np.int32) if len(self.records) < 2**31 else place
        return place[codes] if len(place) else np.zeros(len(codes), np.int32)

    def received_slots(self, slots: list[Array], rows_out: int) -> Array:
        """The slot of every row of ``received``; a gap's is ``rows_out``."""
        out = np.full(len(self.received), rows_out, np.int64)
        starts = self.recv_at // self.width + self.gap
        for start, part in zip(starts.tolist(), slots, strict=True):
            out[start : start + len(part)] = part
        return out.astype(np.int32) if rows_out < 2**31 - 1 else out
