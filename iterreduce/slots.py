"""How a combined shuffle learns a key directory, uses it and forgets it, on all ranks alike.

Every fresh exchange tells all ranks, in its headers, how many rows travelled by slot and how many with their
keys. From those numbers alone `Learning` decides what happens when the iteration commits: remember the
unknown keys, let the directory grow by all that were remembered, or give it up. So both sides of a pair hold
the same keys, whatever was rolled back, evicted or lost.

How it can go wrong: a rank that takes up keys which the other side of the pair does not. So nothing here may
depend on what only one rank knows, but for the rows by slot of a segment, which its own header tells.

What it is not: an exchange. `iterreduce.shuffle` speaks to it, and repeats one where a rank lost its part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import Folded
from iterreduce.columns.hashing import key_words
from iterreduce.columns.keylist import KeyList
from iterreduce.columns.narrow import pack_narrow
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.ragged import Array
from iterreduce.directory import Directory, Merger, Part, Segments, part_of
from iterreduce.exchange import EXTRA, ROWS, Arrival, Outgoing
from iterreduce.folding import Combiner
from iterreduce.loop_cache import LoopCache
from iterreduce.table import token

FEWEST_ROWS = 64  # of unknown keys, on all ranks together, that are worth a directory
FEWEST_NARROW = 8192  # of one integer key and one sum: below, it costs more to number keys than to send them
GROWTH = 4  # it grows by at least a quarter: all its growing together costs five times the final size
WINDOW = 4  # exchanges by which it is judged
HOPELESS = 8  # rows of unknown keys per row of a known one that are judged at once
BLOAT = 8  # keys per row of an exchange beyond which most keys must be dead
LONGEST_REST = 1024  # exchanges

LOW, ROUGH = 0xFFFFFFFF, 0x7FFF
Step = Literal["off", "planned", "wait", "remember", "grow", "renew", "rest"]


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


@dataclass
class Learning:
    """When keys are learnt: a function of what the headers of fresh exchanges told, hence alike on all ranks.

    Nothing in the first fresh exchange of a row of them: keys that are about to be planned pay nothing. A
    directory that knew fewer than half of the last exchanges' rows is given up, and the stage rests before it
    tries again, each time twice as long.
    """

    streak: int = 0  # fresh exchanges in a row
    known: int = 0  # rows whose keys were learnt (as many keys, or fewer); 0 without a directory
    pending: int = 0  # rows of unknown keys since then
    resting: int = 0
    rest: int = WINDOW
    window: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def next(self, by_slot: int, by_key: int) -> Step:
        """What follows from an exchange of this many rows of known and of unknown keys."""
        pending = self.pending + by_key
        if not self.streak or self.resting:
            return "wait"
        if pending < max(FEWEST_ROWS, self.known // GROWTH):
            return "remember"
        if not self.known:
            return "grow"
        seen = [*self.window, (by_slot, by_key)][-WINDOW:]
        slots, keys = (sum(side) for side in zip(*seen, strict=True))
        if HOPELESS * slots < keys or (len(seen) == WINDOW and slots < keys):
            return "rest"
        return "renew" if (self.known + pending) * len(seen) > BLOAT * (slots + keys) else "grow"

    def take(self, step: Step, by_slot: int, by_key: int) -> None:
        """The iteration of that exchange stands."""
        self.streak = 0 if step in ("off", "planned") else self.streak + 1
        self.resting = max(0, self.resting - 1)
        self.window.append((by_slot, by_key))
        if step == "remember":
            self.pending += by_key
        elif step == "grow":
            if self.known:
                self.rest = WINDOW
            else:
                self.window.clear()
            self.known, self.pending = self.known + self.pending + by_key, 0
        elif step == "rest":
            self.resting, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)

    def forget(self) -> None:
        """There is no directory any more."""
        self.known = self.pending = 0
        self.window.clear()


@dataclass
class Narrow:
    """What a segment of one integer key and one sum has beside its sums. ``again``: it came twice."""

    hashes: Array
    words: Array  # the keys
    bounds: Array
    rows: Array  # per destination
    sent: Array  # words per destination
    told: Array
    listed: KeyList
    again: bool = False


class Slots:
    """The directory of one combined shuffle on this rank. ``enabled`` is set alike on all ranks.

    ``rows_by_slot`` and ``rows_by_key`` count what this rank sent in committed iterations, ``words_sent`` the
    int64 words of it; ``grown`` and ``given_up``: how often keys were learnt, and how often a directory was
    dropped because it did not know most rows, or held mostly keys that came no more.
    """

    def __init__(
        self, number: int, size: int, cache: LoopCache, partitions: PartitionMap, enabled: bool = True
    ):
        self.cache, self.size, self.partitions, self.enabled = cache, size, partitions, enabled
        self.token = token("directory", number)
        self.rows_by_slot = self.rows_by_key = self.words_sent = self.grown = self.given_up = 0
        self.learning = Learning()
        self.merger = Merger()
        self._digest = 0  # of the columns whose keys are known or remembered
        self._sent: list[KeyList] = []
        self._received: list[list[KeyList]] = [[] for _ in range(size)]
        self._agreed: tuple[Step, int, int, int] | None = None
        self._new: tuple[KeyList, list[KeyList]] | None = None
        self._next: Directory | None = None
        self.narrow: Narrow | None = None  # of the last exchange of such rows
        self._by_key: KeyList | None = None  # keys that went as keys
        self._counts = 0, 0, 0
        self.idle = False  # nothing was learnt last time, and nothing is known, learnt or waited for

    @property
    def learns(self) -> bool:
        """Are the unknown keys of this exchange held on to?"""
        return self._agreed is not None and self._agreed[0] in ("remember", "grow")

    @property
    def lost(self) -> bool:
        """Has this rank alone lost what the others still hold?"""
        return self.token in self.cache and self.cache.get(self.token) is None

    @property
    def directory(self) -> Directory | None:
        """What is known, if anything."""
        found: Directory | None = self.cache.get(self.token) if self.token in self.cache else None
        return found

    # ------------------------------------------------------------------ what leaves, what arrives

    def outgoing(self, combiner: Combiner, folded: Folded, proposal: int) -> Outgoing:
        """Records for each destination, those of known keys by number."""
        assert combiner.outputs is not None
        directory, digest = self.directory, combiner.outputs.schema.digest()
        unknown = directory is None or self._digest != digest
        if unknown and combiner.outputs.narrow is not None:
            return self._outgoing_narrow(folded, digest, proposal)
        bounds = self.partitions.send_bounds(folded.hashes)
        if directory is None or unknown:
            self._by_key = KeyList(folded.hashes, folded.keys)
            out = combiner.outgoing(folded, bounds, proposal)
            self._counts = 0, len(folded), int(out.words.sum())
            return replace(out, extra=self._told(np.zeros_like(out.rows)))
        segments = Segments(combiner, folded, bounds, directory)
        self._by_key = segments.by_key
        self._counts = len(segments.known), len(segments.unknown), int(segments.words.sum())
        return segments.outgoing(digest, proposal, self._told(segments.rows_known))

    def _outgoing_narrow(self, folded: Folded, digest: int, proposal: int) -> Outgoing:
        """One integer key and one sum: all but the sums is as it was where the same keys come again."""
        known = self.narrow
        if known is None or known.hashes is not folded.hashes:
            bounds = self.partitions.send_bounds(folded.hashes)
            rows = np.diff(bounds)
            self._counts = 0, len(folded), 2 * len(folded)
            told = self._told(np.zeros_like(rows))
            words = key_words(folded.keys[folded.keys.names[0]])
            known = Narrow(
                folded.hashes, words, bounds, rows, 2 * rows, told, KeyList(folded.hashes, folded.keys)
            )
            self.narrow = known
        else:
            known.again = True
        self._counts, self._by_key = (0, len(folded), 2 * len(folded)), known.listed
        words, bounds, records = known.words, known.bounds, folded.records

        def pack(buffer: Array, at: Array) -> None:
            pack_narrow(words, records, bounds, buffer, at)

        return Outgoing(known.sent, known.rows, pack, digest, proposal, known.told)

    def _told(self, rows: Array) -> Array:
        """Per destination its rows by slot, in 32 bits; then roughly this rank's rows by slot, and by key."""
        by_slot, by_key, _ = self._counts
        return rows | (rough(by_slot) << 32 | rough(by_key) << 47)

    def arrived(self, combiner: Combiner, arrival: Arrival) -> list[Part]:
        """What came, by rank."""
        directory, heads = self.directory, arrival.headers
        rows, known = heads[:, ROWS].tolist(), (heads[:, EXTRA] & LOW).tolist()
        segments = arrival.segments()
        return [part_of(combiner, directory, s, segments[s], rows[s], known[s]) for s in range(self.size)]

    def keys_of(self, part: Part) -> Batch:
        """All keys of a part in canonical order, in memory of their own."""
        directory = self.directory
        if directory is None or not len(part.slots):
            return part.keyed.keys.copy()
        return directory.owned.take(part.slots).union(part.listed()).keys.keys

    def merge(self, combiner: Combiner, parts: Sequence[Part]) -> tuple[Batch, Array]:
        """Keys that had a row, in canonical order, and their records."""
        assert combiner.outputs is not None
        directory = self.directory
        if directory is not None:
            return self.merger.merge(combiner.outputs, directory, parts)
        combiner.merged.clear()
        for part in parts:
            combiner.merged.merge(part.keyed)
        folded = combiner.merged.result()
        return folded.keys, folded.records

    # ------------------------------------------------------------------ learning

    def heard(
        self, headers: Array, digest: int, planned: bool, narrow: bool = False, too_large: bool = False
    ) -> None:
        """A fresh exchange has ended: decide what is learnt. ``planned``: a plan of values is made of it;
        ``narrow``: its rows are one integer key and one sum. All ranks say the same.
        """
        if digest not in (0, self._digest) and not self.idle:
            self.drop()  # other columns than those that were learnt: everything came by key
        told = headers[:, EXTRA].tolist()
        by_slot = by_key = 0
        for word in told:
            by_slot += rough_count(word >> 32 & ROUGH)
            by_key += rough_count(word >> 47 & ROUGH)
        off = not self.enabled or too_large or (narrow and by_slot + by_key < FEWEST_NARROW)
        if off and self.idle:
            return
        step: Step = "planned" if planned else self.learning.next(by_slot, by_key)
        if off or not self.cache.wants(self.token):
            step = "off"
        self._agreed = step, by_slot, by_key, digest

    def on_plan(self) -> None:
        """Nothing but values travelled."""
        if not self.idle:
            self._agreed, self._counts = ("planned", 0, 0, 0), (0, 0, 0)

    def remember(self, parts: Sequence[Part]) -> None:
        """Hold on to the unknown keys of this exchange, and make what the directory grows to, if it does."""
        if self._agreed is None or not self.learns:
            return
        sent = self._by_key
        if sent is None:
            sent = KeyList.empty(parts[0].keyed.keys.schema)
        self._new = sent, [p.listed().copy() for p in parts]
        if self._agreed[0] == "grow":
            self._next = self._grown(*self._with_new())

    def _with_new(self) -> tuple[list[KeyList], list[list[KeyList]]]:
        assert self._new is not None
        sent, received = self._new
        lists = zip(self._received, received, strict=True)
        return with_some([*self._sent, sent]), [with_some([*before, keys]) for before, keys in lists]

    def _grown(self, sent: list[KeyList], received: list[list[KeyList]]) -> Directory:
        assert self._new is not None
        first = self._new[0]
        before = self.directory or Directory.empty(first, self.size)
        if len(sent) > 1:
            sent = [KeyList.of(Batch.concat([keys.keys for keys in sent]))]
        return before.grown(sent[0] if sent else first, received, self.partitions)

    def commit(self) -> None:
        """The iteration stands."""
        if self.idle and self._agreed is None:
            self._count()
            self._counts = 0, 0, 0
            return
        if self._agreed is not None:
            step, by_slot, by_key, digest = self._agreed
            self.idle = step in ("planned", "off") and not self.learning.resting
            self.learning.take(step, by_slot, by_key)
            self._count()
            if step == "remember":
                self._sent, self._received = self._with_new()
                self._digest = digest or self._digest
            elif step == "grow":
                self._install(digest or self._digest)
            elif step != "wait":
                self.given_up += step in ("renew", "rest")
                self.drop()
        self.rollback()

    def _count(self) -> None:
        by_slot, by_key, words = self._counts
        self.rows_by_slot += by_slot
        self.rows_by_key += by_key
        self.words_sent += words

    def _install(self, digest: int) -> None:
        assert self._next is not None
        self._forget_keys()
        self._digest, self.grown = digest, self.grown + 1
        self.cache.put(self.token, "directory", self._next, self._next.nbytes, self.drop)

    def rollback(self) -> None:
        """The iteration never was, or is over."""
        self._agreed = self._new = self._next = self._by_key = None
        self._counts = 0, 0, 0

    def drop(self) -> None:
        """Forget all keys, on all ranks: a rank lost them, or they were evicted, or serve no more."""
        self.cache.drop(self.token)
        self.learning.forget()
        self._forget_keys()

    def _forget_keys(self) -> None:
        self._sent, self._received = [], [[] for _ in range(self.size)]


def with_some(lists: Sequence[KeyList]) -> list[KeyList]:
    """Those that hold keys."""
    return [keys for keys in lists if len(keys)]
