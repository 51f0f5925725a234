"""Numbers for the vertices of a graph, from edges that are streamed twice and never held.

The first pass counts (`Numbering.count`) how often each key comes, in each role: as a source, as a target.
Then every distinct key has a number (`Numbering.finish`), and the second pass translates (`Numbering.codes`),
or goes straight on to what belongs to a number (`Numbering.through`), such as a slot by degree.

Numbers are a rank's own: they follow ascending keys, ascending hashes or arrival, whichever is cheapest for
the kind of key, and say nothing about order anywhere else. The same chunks give the same numbers.

How it can go wrong: a key of the second pass that the first did not see, null keys, and 2^32 rows or more of
one role on a rank (all `UsageError`). What it is not: `iterreduce.columns.numbering`, which numbers the rows
of a table at hand in canonical order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch, Column
from iterreduce.columns.jit import kernel
from iterreduce.columns.keycodec import is_word_key
from iterreduce.columns.numbering import check_comparable
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.columns.vertexstores import ROLES, Addressed, Hashed, Store, Stored
from iterreduce.errors import UsageError

MOST_ROWS = 2**32 - 1
FREE_SPAN = 1 << 22
"""Addresses that are always worth their 8 bytes: 32 MB."""

Keys = Batch | Column


class Numbering:
    """Counts keys, numbers them, translates them.

    ``schema`` is that of a key, of one column or several; ``rows`` is how many keys will come in all roles,
    if that is known: integers are counted by address where they lie in a range of fewer addresses than rows.
    Keys come as a `Batch`, matched by position, or, where a key is one column, as a bare column.

    >>> ids = Batch(id=np.empty(0, np.int64)).schema
    >>> numbering = Numbering(ids)
    >>> numbering.count(np.array([30, 10, 30]), role=0)
    >>> numbering.count(np.array([10, 20, 20]), role=1)
    >>> len(numbering.finish()), numbering.counts.tolist()
    (3, [[1, 0, 2], [1, 2, 0]])
    >>> numbering.codes(np.array([20, 30])).tolist(), numbering.keys()["id"].tolist()
    ([1, 2], [10, 20, 30])
    >>> numbering.through(np.array([5, 6, 7], np.int32)).codes(np.array([20, 30])).tolist()
    [6, 7]
    """

    def __init__(self, schema: Schema, rows: int = 0) -> None:
        if not len(schema):
            raise UsageError("a key needs at least one column, got none")
        self.schema = schema
        self._rows, self._seen = rows, [0] * ROLES
        self._field = next(iter(schema.values()))
        self._is_word = is_word_key(schema)
        self._is_integer = self._is_word and self._field.dtype.kind in "iub"
        self._store: Store | None = None
        if not self._is_integer:
            self._store = Hashed() if self._is_word else Stored(schema)
        self._counts: Array | None = None

    def __len__(self) -> int:
        """Distinct keys, once finished."""
        return int(self.counts.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [a.nbytes for a in (self._store, self._counts) if a is not None]
        return sum(held)

    @property
    def counts(self) -> Array:
        """How often each key came in each role: int64 of shape ``(2, m)``."""
        if self._counts is None:
            raise UsageError("keys are still being counted: call finish() first")
        return self._counts

    def observe(self, low: int, high: int) -> None:
        """Say beforehand that integer keys lie in ``[low, high]``: it saves growing, and is no promise."""
        if self._store is None and low <= high and self._is_worth(high - low + 1):
            self._store = Addressed(low, high - low + 1)

    def count(self, keys: Keys, role: int = 0) -> None:
        """First pass: take keys in this role, 0 or 1."""
        if self._counts is not None:
            raise UsageError("finish() was called: keys can no longer be counted")
        column = self._taken(keys)
        self._seen[role] += len(column)
        if self._seen[role] > MOST_ROWS:
            raise UsageError(f"more than {MOST_ROWS} keys of one role on a rank: use more ranks")
        if not self._is_integer and self._store is not None:
            self._store.count(column, role)
            return
        while len(column):
            column = column[self._fitting(column).count(column, role) :]

    def _taken(self, keys: Keys) -> Any:
        """What a store takes: a batch, or, for keys of one number, a read-only array."""
        if not isinstance(keys, Batch):
            if self._is_word and isinstance(keys, np.ndarray) and keys.dtype == self._field.dtype:
                return _read_only(keys)
            keys = Batch(**{next(iter(self.schema)): keys})
        masks = [keys.valid(name) for name in keys.names]
        if any(mask is not None and not mask.all() for mask in masks):
            raise UsageError("a vertex has a null key: fill or filter nulls first")
        if keys.schema != self.schema:
            check_comparable(self.schema, keys.schema)
        return _read_only(keys[keys.names[0]]) if self._is_word else keys

    def _is_worth(self, span: int) -> bool:
        return span <= max(FREE_SPAN, self._rows, sum(self._seen))

    def _fitting(self, keys: Array) -> Store:
        """A store for the first of these integers: by address, wide enough for all, if not too wide."""
        store = self._store
        if isinstance(store, Hashed) or (isinstance(store, Addressed) and store.has(*_extent(keys[:1]))):
            return store
        low, high = _extent(keys)
        if isinstance(store, Addressed):
            low, high = min(low, store.low), max(high, store.low + store.span - 1)
        if not self._is_worth(high - low + 1):
            store = _by_hash(store)
        elif isinstance(store, Addressed):
            store.widen(low, high)
        else:
            store = Addressed(low, high - low + 1)
        self._store = store
        return store

    def finish(self) -> Numbering:
        """Number the keys that came; to be called once, between the passes."""
        if self._counts is None:
            self._store = self._store or Hashed()
            self._counts = self._store.finish()
            if self._counts.shape[1] >= 2**31:
                raise UsageError("2^31 vertices or more on a rank: use more ranks")
        return self

    def codes(self, keys: Keys, out: Array | None = None) -> Array:
        """Second pass: the number of each key, int32 of shape ``(n,)``, in ``out`` if given."""
        return self._translated(keys, None, out)

    def _translated(self, keys: Keys, values: Array | None, out: Array | None) -> Array:
        column = self._taken(keys)
        out = np.empty(len(column), np.int32) if out is None else out[: len(column)]
        assert self._store is not None or self.counts is not None
        done = self._store.codes(column, values, out) if self._store is not None else 0
        if done < len(column):
            raise UsageError(f"key {_shown(column, done)} was not there when keys were counted")
        return out

    def through(self, values: Array) -> Translation:
        """Translate straight to an int32 value per number (all at least 0), at the price of `codes`."""
        if values.shape != (len(self),) or values.dtype != np.int32:
            raise UsageError(
                f"a translation through values of {values.dtype} {values.shape}: wanted int32 ({len(self)},)"
            )
        assert self._store is not None
        return Translation(self, self._store.through(values))

    def keys(self) -> Batch:
        """The distinct keys by number, as columns named as in the schema."""
        assert len(self) >= 0 and self._store is not None
        return self._store.keys(self.schema)


class Translation:
    """From keys to what belongs to their numbers; see `Numbering.through`."""

    def __init__(self, numbering: Numbering, values: Array) -> None:
        self._numbering, self._values = numbering, values

    @property
    def nbytes(self) -> int:
        """Bytes held, beside the numbering's."""
        return self._values.nbytes

    def codes(self, keys: Keys, out: Array | None = None) -> Array:
        """The value of each key, int32 of shape ``(n,)``, in ``out`` if given."""
        return self._numbering._translated(keys, self._values, out)


def _read_only(column: Any) -> Array:
    """One compiled loop serves arrays of both kinds."""
    view: Array = column.view()
    view.flags.writeable = False
    return view


@kernel
def _extent_of(keys: Any) -> Any:
    low, high = np.int64(keys[0]), np.int64(keys[0])
    for i in range(len(keys)):
        low, high = min(low, np.int64(keys[i])), max(high, np.int64(keys[i]))
    return low, high


def _extent(keys: Array) -> tuple[int, int]:
    low, high = _extent_of(keys)
    return int(low), int(high)


def _by_hash(store: Store | None) -> Hashed:
    hashed = Hashed()
    if isinstance(store, Addressed):
        hashed.take_over(*store.contents())
    return hashed


def _shown(keys: Any, row: int) -> Any:
    return keys.take(np.array([row])) if isinstance(keys, Batch) else keys[row]


def by_degree(degrees: Array) -> tuple[Array, int]:
    """Numbers by descending degree, ties by number, int64 ``(m,)``, and how many have a degree above 0.

    >>> order, used = by_degree(np.array([1, 0, 5, 1]))
    >>> order.tolist(), used
    ([2, 0, 3, 1], 3)
    """
    low = np.uint64(0xFFFFFFFF)
    packed = (low - degrees.astype(np.uint64) << np.uint64(32)) | np.arange(len(degrees), dtype=np.uint64)
    packed.sort()
    return (packed & low).astype(np.int64), int(np.count_nonzero(degrees))
