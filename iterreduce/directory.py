"""Key directories: keys that were sent before travel as numbers, and their owner hashes nothing.

For each pair of ranks both sides hold the keys that the one sent to the other (the *pair's keys*), in canonical
order, so that a key is a number on the wire and a number is a slot at the owner. A segment then begins with the
rows of known keys: which ones (`selector_words`), then their records; rows of other keys follow with their keys.
How many there are of the first kind stands in the segment's own header.

Keys are learnt when an iteration commits, on all ranks at once, and only from numbers that the headers told to
all of them (`Learning`): both sides of a pair hold the same keys whatever failed, was rolled back or evicted.

How it can go wrong: a rank that takes up keys which the other side of the pair does not. So nothing here may
depend on what only one rank knows, except what it tells in its own header.

What it is not: an exchange. `iterreduce.shuffle` speaks to it, and decides what a lost directory means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import Folded, KeyIndex, number_keys
from iterreduce.columns.keylist import KeyList
from iterreduce.columns.numbering import code_dtype
from iterreduce.columns.packing import pack, packed_words
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.ragged import Array
from iterreduce.exchange import EXTRA, ROWS, Arrival, Outgoing
from iterreduce.folding import RECORDS, Combiner
from iterreduce.loop_cache import LoopCache
from iterreduce.table import token

FEWEST_ROWS = 64  # of unknown keys, on all ranks together, that are worth a new directory
GROWTH = 4  # a directory grows by at least a quarter: all growing together costs five times the final size
WINDOW = 4  # exchanges by which a directory is judged
BLOAT = 8  # keys per row of an exchange beyond which most of a directory is dead
LONGEST_REST = 1024  # exchanges
SPARSE = 16  # slots per row that arrives, beyond which rows are sorted and no table of all slots is filled

LOW = 0xFFFFFFFF
Step = Literal["none", "wait", "planned", "remember", "grow", "renew", "rest"]


def selector_words(rows: Array, known: Array) -> Array:
    """Words that say which of a pair's ``known`` keys the ``rows`` of a segment are, int64 ``(n,)`` each.

    None where all of them come, else a bit per known key or 4 bytes per row, whatever is less.

    >>> selector_words(np.array([100, 50, 3]), np.array([100, 100, 1000])).tolist()
    [0, 2, 2]
    """
    chosen: Array = np.where(rows == known, 0, np.minimum((known + 63) // 64, (rows + 1) // 2))
    return chosen


def write_selector(numbers: Array, known: int, out: Array) -> None:
    """Write ascending ``numbers`` below ``known`` into ``out``, int64, as long as `selector_words` says."""
    if not len(out):
        return
    if len(out) == (len(numbers) + 1) // 2:
        out[-1] = 0
        out.view(np.uint32)[: len(numbers)] = numbers
        return
    chosen = np.zeros(64 * len(out), bool)
    chosen[numbers] = True
    out.view(np.uint8)[:] = np.packbits(chosen, bitorder="little")


def read_selector(words: Array, rows: int) -> Array | None:
    """The numbers again; None: all."""
    if not len(words):
        return None if rows else np.empty(0, np.int64)
    if len(words) == (rows + 1) // 2:
        return words.view(np.uint32)[:rows]
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(bool))


def rough(n: int) -> int:
    """A count in 15 bits, rounded down by less than 0.4 %; 0 only for 0.

    >>> rough_count(rough(500)), rough_count(rough(123_456)), rough(0)
    (500, 123392, 0)
    """
    shift = max(0, n.bit_length() - 9)
    return shift << 9 | n >> shift


def rough_count(bits: int) -> int:
    """What `rough` kept."""
    return (bits & 511) << (bits >> 9)


class Directory:
    """The keys that this rank sent, and those it was sent, of one layout of rows. Never changed, only replaced.

    ``sent``: all keys sent, those to rank ``d`` in places ``bounds[d]`` to ``bounds[d + 1]``. ``owned``: all keys
    received; ``slots[s]``: the places in it of those that rank ``s`` sent, ascending.
    """

    def __init__(self, sent: KeyList, bounds: Array, owned: KeyList, slots: Sequence[Array]):
        self.sent, self.bounds, self.owned, self.slots = sent, bounds, owned, tuple(slots)
        self.sizes = np.diff(bounds)
        self._onto: tuple[KeyIndex, Array] | None = None
        self._taken: tuple[Array, Batch] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on this rank, with 4 per key for its row in a table that is shuffled onto."""
        return self.sent.nbytes + self.owned.nbytes + sum(s.nbytes for s in self.slots) + 4 * len(self.owned)

    def grown(self, sent: KeyList, received: Sequence[Sequence[KeyList]], partitions: PartitionMap) -> Directory:
        """With more keys: ``received[s]`` from rank ``s``, in several lists."""
        all_sent = self.sent.union(sent).keys
        parts = [keys.keys for lists in received for keys in lists]
        if not parts:
            return Directory(all_sent, partitions.send_bounds(all_sent.hashes), self.owned, self.slots)
        numbered = number_keys(Batch.concat(parts))
        union = self.owned.union(KeyList(numbered.hashes, numbered.keys))
        slots, at, dtype = [], 0, code_dtype(len(union.keys))
        for old, lists in zip(self.slots, received, strict=True):
            end = at + sum(map(len, lists))
            slots.append(np.union1d(union.old[old], union.new[numbered.codes[at:end]]).astype(dtype))
            at = end
        return Directory(all_sent, partitions.send_bounds(all_sent.hashes), union.keys, slots)

    def rows_onto(self, index: KeyIndex) -> Array:
        """The row of each owned key in a table that is indexed by key; its length where it has none."""
        if self._onto is None or self._onto[0] is not index:
            rows = index.lookup(self.owned.keys)
            rows[rows < 0] = len(index)
            self._onto = index, rows.astype(code_dtype(len(index) + 1))
        return self._onto[1]

    def keys_at(self, slots: Array) -> Batch:
        """Owned keys at ascending slots: the same objects as long as the slots are the same."""
        if len(slots) == len(self.owned):
            return self.owned.keys
        if self._taken is None or not np.array_equal(self._taken[0], slots):
            self._taken = slots, self.owned.keys.take(slots)
        return self._taken[1]


@dataclass(frozen=True)
class Part:
    """What one rank sent: records of known keys by owner's slot (ascending), and others with their keys."""

    slots: Array
    records: Array
    keyed: Folded


@dataclass
class Learning:
    """When keys are learnt: a function of what the headers of fresh exchanges told, hence alike on all ranks."""

    streak: int = 0  # fresh exchanges in a row
    known: int = 0  # rows whose keys were learnt (as many keys, or fewer): 0 without a directory
    pending: int = 0  # rows of unknown keys since
    resting: int = 0
    rest: int = WINDOW
    window: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def next(self, by_slot: int, by_key: int) -> Step:
        """What follows from an exchange of this many rows of known and of unknown keys."""
        pending = self.pending + by_key
        if not self.streak or self.resting > 1:
            return "wait"
        if pending < max(FEWEST_ROWS, self.known // GROWTH):
            return "remember"
        if not self.known:
            return "grow"
        seen = [*self.window, (by_slot, by_key)][-WINDOW:]
        slots, keys = (sum(side) for side in zip(*seen, strict=True))
        if slots < keys:
            return "rest"
        return "renew" if (self.known + pending) * len(seen) > BLOAT * (slots + keys) else "grow"

    def take(self, step: Step, by_slot: int, by_key: int) -> None:
        """The iteration of that exchange stands."""
        if step in ("planned", "none"):
            self.streak = 0
            self.forget()
            return
        self.streak += 1
        self.resting = max(0, self.resting - 1)
        self.window.append((by_slot, by_key))
        if step == "remember":
            self.pending += by_key
        elif step == "grow":
            self.rest = WINDOW if self.known else self.rest
            self.known += self.pending + by_key
            self.pending = 0
            self.window.clear()
        elif step in ("renew", "rest"):
            self.forget()
            if step == "rest":
                self.resting, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)

    def forget(self) -> None:
        """There is no directory any more."""
        self.known = self.pending = 0
        self.window.clear()


class Slots:
    """The directory of one combined shuffle on this rank, and the wire format that it serves.

    ``enabled`` is set alike on all ranks. ``rows_by_slot`` and ``rows_by_key`` count what this rank sent in
    committed iterations, ``words_sent`` the int64 words of it; ``grown`` and ``given_up`` how often keys were
    learnt, or a directory was dropped because most rows had keys that it did not know.
    """

    def __init__(self, number: int, cache: LoopCache, partitions: PartitionMap, enabled: bool = True):
        self.cache, self.partitions, self.enabled = cache, partitions, enabled
        self.token = token("directory", number)
        self.rows_by_slot = self.rows_by_key = self.words_sent = self.grown = self.given_up = 0
        self.learning = Learning()
        self._digest = 0  # of the schema whose keys are known
        self._sent: list[KeyList] = []
        self._received: list[list[KeyList]] = []
        self._table = np.empty((0, 1), np.int64)
        self.rollback()

    @property
    def lost(self) -> bool:
        """Has this rank alone lost what the others still hold?"""
        return self.token in self.cache and self.cache.get(self.token) is None

    @property
    def directory(self) -> Directory | None:
        """What is known, if anything."""
        found: Directory | None = self.cache.get(self.token) if self.token in self.cache else None
        return found

    # ------------------------------------------------------------------ sending

    def outgoing(self, combiner: Combiner, folded: Folded, proposal: int) -> Outgoing:
        """Records for each destination, those of known keys by number."""
        assert combiner.outputs is not None
        bounds = self.partitions.send_bounds(folded.hashes)
        self._folded, directory = folded, self.directory
        if directory is None or self._digest != combiner.outputs.schema.digest():
            out = combiner.outgoing(folded, bounds, proposal)
            self._told(out, np.arange(len(folded)), 0)
            return Outgoing(out.words, out.rows, out.pack, out.schema, proposal, self._header(np.zeros_like(out.rows)))
        places = directory.sent.find(KeyList(folded.hashes, folded.keys))
        segments = Segments(combiner, folded, bounds, directory, places)
        self._told(segments, segments.unknown, len(segments.known))
        return Outgoing(
            segments.words, np.diff(bounds), segments.pack, combiner.outputs.schema.digest(), proposal,
            self._header(np.diff(segments.known_bounds)),
        )  # fmt: skip

    def _told(self, out: Outgoing | Segments, unknown: Array, known: int) -> None:
        self._unknown, self._counts = unknown, (known, len(unknown), int(out.words.sum()))

    def _header(self, rows: Array) -> Array:
        """Per destination: its rows by slot (32 bits), then all rows by slot and by key of this rank, roughly."""
        by_slot, by_key, _ = self._counts
        return rows | rough(by_slot) << 32 | rough(by_key) << 47

    # ------------------------------------------------------------------ receiving

    def arrived(self, combiner: Combiner, arrival: Arrival) -> list[Part]:
        """What came, by rank; records share memory with the receive buffer."""
        assert combiner.outputs is not None
        directory, width = self.directory, combiner.outputs.width
        parts = []
        told = zip(arrival.segments(), arrival.headers[:, ROWS].tolist(), (arrival.headers[:, EXTRA] & LOW).tolist(), strict=True)
        for source, (words, rows, known) in enumerate(told):
            at, slots = 0, np.empty(0, np.int64)
            if known:
                assert directory is not None
                slots = directory.slots[source]
                at = int(selector_words(np.int64(known), np.int64(len(slots))))  # type: ignore[arg-type]
                numbers = read_selector(words[:at], known)
                slots = slots if numbers is None else slots[numbers]
            end = at + known * width
            parts.append(Part(slots, words[at:end].reshape(known, width), combiner.arrived(words[end:], rows - known)))
        return parts

    def keys_of(self, part: Part) -> Batch:
        """All keys of a part in canonical order, in memory of their own."""
        directory = self.directory
        if directory is None or not len(part.slots):
            return part.keyed.keys.copy()
        known = directory.owned.take(part.slots)
        return known.union(KeyList.sorted(part.keyed.hashes, part.keyed.keys)).keys.keys

    def merge(self, combiner: Combiner, parts: Sequence[Part]) -> tuple[Batch, Array]:
        """Keys that had a row, in canonical order, and their records: folded in rank order, identities first."""
        directory = self.directory
        if directory is None:
            combiner.merged.clear()
            for part in parts:
                combiner.merged.merge(part.keyed)
            folded = combiner.merged.result()
            return folded.keys, folded.records
        assert combiner.outputs is not None
        codes, new = number_parts(directory, parts)
        known, rows = len(directory.owned), sum(len(c) for pair in codes for c in pair)
        if rows * SPARSE < known:
            held, within = np.unique(np.concatenate([c for pair in codes for c in pair]), return_inverse=True)
            ends = np.cumsum([len(c) for pair in codes for c in pair])[:-1]
            pieces = np.split(within, ends)
            codes = list(zip(pieces[::2], pieces[1::2], strict=True))
            table = self._room(combiner, len(held))
            held = held[: len(held) - len(new)]
        else:
            table = self._room(combiner, known + len(new))
            held = np.arange(known) if any(len(slots) == known for slots, _ in codes) else present(codes, known)
        for part, (slots, others) in zip(parts, codes, strict=True):
            combiner.outputs.merge(table, slots, part.records)
            combiner.outputs.merge(table, others, part.keyed.records)
        if len(table) > len(held) + len(new):
            table = table[np.concatenate([held, np.arange(known, known + len(new))])]
        return in_order(directory, held, new, table)

    def _room(self, combiner: Combiner, rows: int) -> Array:
        assert combiner.outputs is not None
        width = combiner.outputs.width
        if self._table.shape[1] != width or len(self._table) < rows:
            self._table = np.empty((rows, width), np.int64)
        combiner.outputs.fill(self._table[:rows])
        return self._table[:rows]

    # ------------------------------------------------------------------ learning

    def heard(self, headers: Array, digest: int, planned: bool) -> None:
        """A fresh exchange has ended; ``planned``: a values-only plan is made of it. Decides what is learnt."""
        if self.learning.known and digest not in (0, self._digest):
            self.drop()
        told = headers[:, EXTRA].tolist()
        by_slot = sum(rough_count(word >> 32 & 0x7FFF) for word in told)
        by_key = sum(rough_count(word >> 47 & 0x7FFF) for word in told)
        step: Step = "planned" if planned else self.learning.next(by_slot, by_key)
        if not self.enabled or not self.cache.wants(self.token):
            step = "none"
        self._agreed = step, by_slot, by_key, digest

    def remember(self, parts: Sequence[Part]) -> None:
        """Keep the unknown keys of this exchange; make the directory that they grow into, if they do."""
        step = self._agreed[0] if self._agreed else "none"
        if step not in ("remember", "grow"):
            return
        assert self._folded is not None
        unknown = KeyList(self._folded.hashes, self._folded.keys).take(self._unknown)
        came = [KeyList.sorted(p.keyed.hashes, p.keyed.keys).copy() for p in parts]
        self._new = unknown, came
        if step == "grow":
            sent = [keys for keys in (*self._sent, unknown) if len(keys)] or [unknown]
            all_sent = sent[0] if len(sent) == 1 else KeyList.of(Batch.concat([k.keys for k in sent]))
            lists = [[k for k in (*before, keys) if len(keys)] for before, keys in zip(self._received or [[]] * len(came), came, strict=True)]
            self._next = (self.directory or self._nothing(unknown, len(came))).grown(all_sent, lists, self.partitions)

    def _nothing(self, like: KeyList, size: int) -> Directory:
        none = KeyList.empty(like.keys.schema)
        return Directory(none, np.zeros(size + 1, np.int64), none, [np.empty(0, np.int64)] * size)
