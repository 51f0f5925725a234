"""Key directories: keys that were sent before travel as numbers, and their owner hashes nothing.

For each pair of ranks both sides hold the keys that the one sent to the other (the *pair's keys*), in
canonical order, so that a key is a number on the wire and a number is a slot at the owner. A segment then
begins with the rows of known keys: which ones (`selector_words`), then their records; rows of other keys
follow with their keys.

Here is what a directory is, what it makes of rows that leave, and of rows that arrive. What it is not: it
decides nothing; when keys are learnt and forgotten, and how ranks agree on it, is told in `iterreduce.slots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import Folded, KeyIndex, number_keys
from iterreduce.columns.keylist import KeyList
from iterreduce.columns.numbering import code_dtype
from iterreduce.columns.packing import pack, packed_words
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.ragged import Array
from iterreduce.columns.stores import FoldedRows
from iterreduce.exchange import Outgoing
from iterreduce.folding import RECORDS, Combiner, Outputs

SPARSE = 16  # slots per row that arrives, beyond which rows are sorted and no table of all slots is filled


def selector_words(rows: Array, known: Array) -> Array:
    """Words that say which of a pair's ``known`` keys the ``rows`` of a segment are, int64 ``(n,)`` each.

    None where all of them come, else a bit per known key or 4 bytes per row, whatever is less.

    >>> selector_words(np.array([100, 50, 3]), np.array([100, 100, 1000])).tolist()
    [0, 2, 2]
    """
    chosen: Array = np.where(rows == known, 0, np.minimum((known + 63) // 64, (rows + 1) // 2))
    return chosen


def write_selector(numbers: Array, out: Array) -> None:
    """Write ascending ``numbers`` into ``out``, int64, as long as `selector_words` says."""
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
    """The numbers again, ascending; None: all of them.

    >>> words = np.zeros(2, np.int64)
    >>> write_selector(np.array([3, 5, 8]), words)
    >>> read_selector(words, 3).tolist()
    [3, 5, 8]
    """
    if not len(words):
        return None
    if len(words) == (rows + 1) // 2:
        return words.view(np.uint32)[:rows]
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(bool))


class Directory:
    """The keys that this rank sent, and those it was sent. Never changed, only replaced.

    ``sent``: all keys sent, those to rank ``d`` in places ``bounds[d]`` to ``bounds[d + 1]``. ``owned``: all
    keys received; ``slots[s]``: the places in it of those that rank ``s`` sent, ascending.
    """

    def __init__(self, sent: KeyList, bounds: Array, owned: KeyList, slots: Sequence[Array]):
        self.sent, self.bounds, self.owned, self.slots = sent, bounds, owned, tuple(slots)
        self._onto: tuple[KeyIndex, Array] | None = None
        self._taken: tuple[Array, Batch] | None = None

    @classmethod
    def empty(cls, like: KeyList, size: int) -> Directory:
        """No keys, of the schema of these."""
        none = KeyList.empty(like.keys.schema)
        return cls(none, np.zeros(size + 1, np.int64), none, [np.empty(0, np.int32)] * size)

    @property
    def nbytes(self) -> int:
        """Bytes on this rank, with 4 per key for its row in a table that is shuffled onto."""
        return self.sent.nbytes + self.owned.nbytes + sum(s.nbytes for s in self.slots) + 4 * len(self.owned)

    def grown(
        self, sent: KeyList, received: Sequence[Sequence[KeyList]], partitions: PartitionMap
    ) -> Directory:
        """With more keys: ``received[s]`` from rank ``s``, in several lists."""
        all_sent = self.sent.union(sent).keys
        bounds = partitions.send_bounds(all_sent.hashes)
        parts = [keys.keys for lists in received for keys in lists]
        if not parts:
            return Directory(all_sent, bounds, self.owned, self.slots)
        numbered = number_keys(Batch.concat(parts))
        union = self.owned.union(KeyList(numbered.hashes, numbered.keys))
        slots, at, dtype = [], 0, code_dtype(len(union.keys))
        for old, lists in zip(self.slots, received, strict=True):
            end = at + sum(map(len, lists))
            both = [union.old[old], union.new[numbered.codes[at:end]]]
            slots.append(all_slots(both, len(union.keys)).astype(dtype))
            at = end
        return Directory(all_sent, bounds, union.keys, slots)

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


class Segments:
    """What a rank sends: per destination rows of known keys by number, then the others with their keys."""

    def __init__(self, combiner: Combiner, folded: Folded, bounds: Array, directory: Directory):
        assert combiner.outputs is not None
        places = places_in(directory.sent, folded)
        self.folded, self.width, self.directory = folded, combiner.outputs.width, directory
        self.known, self.unknown = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
        self.places = places if not len(self.unknown) else places[self.known]
        self.known_bounds = np.searchsorted(self.known, bounds)
        self.unknown_bounds = bounds - self.known_bounds
        self.by_key = keys_at(folded, self.unknown, directory.sent)
        self.wire = self.by_key.keys.with_columns(**{RECORDS: folded.records[self.unknown]})
        self.rows_known = np.diff(self.known_bounds)
        self.selectors = selector_words(self.rows_known, np.diff(directory.bounds))
        with_keys = packed_words(self.wire, None, self.unknown_bounds)
        with_keys[np.diff(self.unknown_bounds) == 0] = 0  # not even the offsets of no text
        self.words = self.selectors + self.rows_known * self.width + with_keys

    def outgoing(self, schema: int, proposal: int, extra: Array) -> Outgoing:
        """For the fresh exchange."""
        rows = self.rows_known + np.diff(self.unknown_bounds)
        return Outgoing(self.words, rows, self.pack, schema, proposal, extra)

    def pack(self, buffer: Array, at: Array) -> None:
        """Write all segments, each from its word ``at`` on."""
        for dest, start in enumerate(at.tolist()):
            lo, hi = self.known_bounds[dest : dest + 2].tolist()
            begin = start + int(self.selectors[dest])
            end = begin + (hi - lo) * self.width
            write_selector(self.places[lo:hi] - self.directory.bounds[dest], buffer[start:begin])
            self._pack_records(lo, hi, buffer[begin:end].reshape(hi - lo, self.width))
            lo, hi = self.unknown_bounds[dest : dest + 2].tolist()
            if hi > lo:
                pack(self.wire, None, lo, hi, buffer, end)

    def _pack_records(self, lo: int, hi: int, out: Array) -> None:
        rows = self.known[lo:hi]
        if hi > lo and rows[-1] - rows[0] == hi - lo - 1:
            out[...] = self.folded.records[rows[0] : rows[-1] + 1]
        else:
            np.take(self.folded.records, rows, axis=0, out=out, mode="clip")


def places_in(known: KeyList, folded: Folded) -> Array:
    """Where each key of a fold stands; below 0 where it is unknown."""
    if isinstance(folded, FoldedRows):
        return known.find_rows(folded.hashes, folded.rows)
    return known.find(KeyList(folded.hashes, folded.keys))


def keys_at(folded: Folded, rows: Array, like: KeyList) -> KeyList:
    """Some keys of a fold: no others are decoded."""
    if not len(rows):
        return KeyList.empty(like.keys.schema)
    keys = folded.keys_at(rows) if isinstance(folded, FoldedRows) else folded.keys.take(rows)
    return KeyList(folded.hashes[rows], keys)


@dataclass(frozen=True)
class Part:
    """What one rank sent: records of known keys by owner's slot (ascending), and others with their keys."""

    slots: Array
    records: Array
    keyed: Folded

    def listed(self) -> KeyList:
        """The keys that came as keys."""
        return KeyList.sorted(self.keyed.hashes, self.keyed.keys)


def part_of(
    combiner: Combiner, directory: Directory | None, source: int, words: Array, rows: int, known: int
) -> Part:
    """A segment of ``rows`` rows, the first ``known`` by number; records share memory with it."""
    assert combiner.outputs is not None
    at, slots, width = 0, np.empty(0, np.int32), combiner.outputs.width
    if known:
        assert directory is not None
        slots = directory.slots[source]
        at = int(selector_words(np.array(known), np.array(len(slots))))
        numbers = read_selector(words[:at], known)
        slots = slots if numbers is None else slots[numbers]
    end = at + known * width
    records = words[at:end].reshape(known, width)
    if known and rows == known:
        no_keys = Batch.empty(combiner.outputs.key_schema)
        return Part(slots, records, Folded(np.empty(0, np.uint64), no_keys, records[:0]))
    return Part(slots, records, combiner.arrived(words[end:], rows - known))


def number_parts(owned: KeyList, parts: Sequence[Part]) -> tuple[list[Array], KeyList]:
    """The codes of all rows of each part, and the keys without a slot: they are numbered behind the slots."""
    found = [owned.find(p.listed()) if len(p.keyed) else np.empty(0, np.int64) for p in parts]
    absent = [np.flatnonzero(f < 0) for f in found]
    new = KeyList.empty(owned.keys.schema)
    if any(map(len, absent)):
        strange = [p.keyed.keys.take(rows) for p, rows in zip(parts, absent, strict=True) if len(rows)]
        numbered = number_keys(Batch.concat(strange))
        new, at = KeyList(numbered.hashes, numbered.keys), 0
        for places, rows in zip(found, absent, strict=True):
            places[rows] = len(owned) + numbered.codes[at : at + len(rows)]
            at += len(rows)
    codes = [np.concatenate([p.slots, f]) if len(f) else p.slots for p, f in zip(parts, found, strict=True)]
    return codes, new


class Merger:
    """Records of all ranks folded by slot: in rank order, identities first, so with the bits of a `Fold`."""

    def __init__(self) -> None:
        self._table = np.empty((0, 1), np.int64)

    def merge(self, outputs: Outputs, directory: Directory, parts: Sequence[Part]) -> tuple[Batch, Array]:
        """Keys that had a row, in canonical order, and their records (in memory that is used again)."""
        owned = directory.owned
        codes, new = number_parts(owned, parts)
        known = len(owned)
        if sum(map(len, codes)) * SPARSE < known:
            held, codes = compacted(codes)
            held = held[: len(held) - len(new)]
            rows = len(held)
        else:
            held = all_slots(codes, known)
            rows = known
        table = self._room(outputs, rows + len(new))
        for part, code in zip(parts, codes, strict=True):
            outputs.merge(table, code[: len(part.slots)], part.records)
            outputs.merge(table, code[len(part.slots) :], part.keyed.records)
        if not len(new):
            return directory.keys_at(held), table if rows == len(held) else table[held]
        places = -1 - owned.find(new)
        behind = len(held) + np.arange(len(new))
        order = np.insert(np.arange(len(held)), np.searchsorted(held, places), behind)
        at = held if rows == known else np.arange(rows)
        keys = Batch.concat([owned.keys.take(held), new.keys]).take(order)
        return keys, table[np.concatenate([at, rows + np.arange(len(new))])[order]]

    def _room(self, outputs: Outputs, rows: int) -> Array:
        if self._table.shape[1] != outputs.width or len(self._table) < rows:
            self._table = np.empty((rows, outputs.width), np.int64)
        outputs.fill(self._table[:rows])
        return self._table[:rows]


def compacted(codes: Sequence[Array]) -> tuple[Array, list[Array]]:
    """The distinct codes, ascending, and codes that count among those."""
    held, within = np.unique(np.concatenate(codes), return_inverse=True)
    return held, np.split(within, np.cumsum([len(c) for c in codes])[:-1])


def all_slots(codes: Sequence[Array], known: int) -> Array:
    """The slots below ``known`` that occur among the codes, ascending."""
    flags = np.zeros(max(known, 1 + max((int(c.max()) for c in codes if len(c)), default=0)), bool)
    for code in codes:
        flags[code] = True
    return np.flatnonzero(flags[:known])
