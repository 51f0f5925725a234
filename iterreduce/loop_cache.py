"""Invariants, directories and plans, by lineage token.

Every rank holds the same tokens, because entries come and go only by agreed events: a plan is put in when
all ranks proposed the same token, and leaves when all ranks agreed to evict. What differs between ranks is
only how large an entry is. ``lose`` drops an entry on one rank alone, as a fault would; the engine then asks
for a fresh plan in the next header.

Plans are put in when the iteration that made them commits, so a rollback has nothing to undo here.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import KeyIndex

T = TypeVar("T")


@dataclass
class Entry:
    """A cached value, what it is called in reports, its bytes on this rank, and what to do when it leaves."""

    value: Any
    name: str
    nbytes: int
    on_evict: Callable[[], None]


class Indexes:
    """What was made of key columns, found by the identity of those columns: one index for all who look up
    keys of a table.

    It holds no key column: what was made of one goes with it. Ranks may hold different ones, since nothing
    collective depends on them.

    >>> import numpy as np
    >>> indexes, keys = Indexes(), Batch(k=np.array([5, 3]))
    >>> indexes.of(keys) is indexes.of(keys.select("k"))
    True
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._made: dict[tuple[object, ...], tuple[list[weakref.ref[Any]], Any]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(made.nbytes for _, made in list(self._made.values()))

    def of(self, keys: Batch) -> KeyIndex:
        """The index of these keys, which must be distinct."""
        return self.made(KeyIndex, keys)

    def made(self, make: Callable[[Batch], T], keys: Batch) -> T:
        """What ``make`` makes of these columns, once."""
        known = self._made.get(self._name(make, keys))
        if known is not None:
            found: T = known[1]
            return found
        found = make(keys)
        self.put(make, keys, found)
        return found

    def put(self, make: Callable[[Batch], T], keys: Batch, found: T) -> None:
        """Keep what was made of these columns as long as they live."""
        if not self.enabled:
            return
        name, kept = self._name(make, keys), self._made

        def gone(_: object) -> None:
            kept.pop(name, None)

        columns = [*keys._columns.values(), *keys._valid.values()]
        kept[name] = ([weakref.ref(column, gone) for column in columns], found)

    def forget(self, keys: Batch) -> None:
        """Drop the index of these keys."""
        self._made.pop(self._name(KeyIndex, keys), None)

    @staticmethod
    def _name(make: Callable[..., Any], keys: Batch) -> tuple[object, ...]:
        return (make, *map(id, keys._columns.values()), 0, *map(id, keys._valid.values()))


class LoopCache:
    """The cache of one loop run. ``enabled=False`` (``--naive``) keeps nothing.

    >>> cache = LoopCache()
    >>> cache.put(7, "plan", [1, 2], 16)
    >>> cache.get(7), cache.nbytes
    ([1, 2], 16)
    """

    def __init__(self, budget_bytes: int | None = None, enabled: bool = True):
        self.budget_bytes, self.enabled = budget_bytes, enabled
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self.indexes = Indexes(enabled)
        self._nbytes: int | None = 0  # of all entries; None: to be added up again
        self.barred: set[int] = set()  # evicted once: making it again would evict it again
        self.hits = self.misses = self.evictions = 0

    @property
    def nbytes(self) -> int:
        """Bytes held on this rank."""
        if self._nbytes is None:
            self._nbytes = sum(e.nbytes for e in self._entries.values())
        return self._nbytes

    def report(self) -> dict[str, int]:
        """Bytes by name."""
        out: dict[str, int] = {}
        for entry in self._entries.values():
            out[entry.name] = out.get(entry.name, 0) + entry.nbytes
        return out

    def wants(self, token: int) -> bool:
        """May an entry of this token be made?"""
        return self.enabled and token != 0 and token not in self.barred

    def put(
        self, token: int, name: str, value: Any, nbytes: int, on_evict: Callable[[], None] = lambda: None
    ) -> None:
        """Keep a value that all ranks keep under this token."""
        self._entries[token] = Entry(value, name, nbytes, on_evict)
        self._nbytes = None

    def get(self, token: int) -> Any:
        """The value, now the most recently used, or None."""
        entry = self._entries.get(token)
        if entry is None or entry.value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(token)
        return entry.value

    def peek(self, token: int) -> Any:
        """The value, or None; this counts as no use."""
        entry = self._entries.get(token)
        return None if entry is None else entry.value

    def __contains__(self, token: int) -> bool:
        return token in self._entries

    def lose(self, token: int) -> None:
        """Drop a value on this rank alone (a fault; the next header asks for a fresh plan)."""
        if token in self._entries:
            self._entries[token].value, self._entries[token].nbytes = None, 0
            self._nbytes = None

    def wish(self) -> int:
        """The token that this rank wishes to evict: the least recently used if over budget, else 0."""
        if self.budget_bytes is None or self.nbytes <= self.budget_bytes:
            return 0
        return next(iter(self._entries), 0)

    def evict(self, token: int) -> str | None:
        """Drop an entry, on all ranks, after they agreed to; its name."""
        entry, self._nbytes = self._entries.pop(token, None), None
        if entry is None:
            return None
        self.barred.add(token)
        self.evictions += 1
        entry.on_evict()
        return entry.name

    def drop(self, token: int) -> None:
        """Take an entry out because a newer plan replaces it (no eviction: it may be made again)."""
        self._entries.pop(token, None)
        self._nbytes = None
