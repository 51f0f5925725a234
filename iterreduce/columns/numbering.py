"""Numbers for keys: the distinct keys of some rows in canonical order, and the number of any row's key.

Three roads to one answer: integers that lie close together are looked up by address, other keys of a single
number in a table by their hash, everything else in a `KeyStore`, which compares bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from iterreduce.columns import hashing
from iterreduce.columns.batch import Batch, row_text
from iterreduce.columns.hashing import EMPTY, NULL_HASH, hash_words, key_words, mix, words_to_column
from iterreduce.columns.jit import kernel
from iterreduce.columns.keycodec import is_word_key
from iterreduce.columns.keystore import KeyStore
from iterreduce.columns.keytable import OrderedTable
from iterreduce.columns.ordering import hash_order
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import SchemaError, UsageError

DENSE_SPAN = 4  # addresses per row up to which a direct table beats hashing
SMALL_SPAN = 1024  # always direct: the table fits the first-level cache
SAMPLE = 16384


@dataclass(frozen=True)
class Numbered:
    """Distinct keys in canonical order, and each row's place among them."""

    codes: Array  # int32 (n,), int64 beyond 2^31 keys
    hashes: Array  # uint64 (m,), ascending
    keys: Batch  # m rows
    first: Array  # int64 (m,): the first row of each key

    def __len__(self) -> int:
        return len(self.hashes)


@kernel
def extent(words: Any, valid: Any) -> Any:
    """Smallest and largest valid word; ``(1, 0)`` if there is none."""
    low, high, some = np.int64(2**63 - 1), np.int64(-(2**63)), False
    if valid is None:
        some = len(words) > 0
        for w in words:
            low, high = min(low, w), max(high, w)
    else:
        for i in range(len(words)):
            if valid[i]:
                some = True
                low, high = min(low, words[i]), max(high, words[i])
    return (low, high) if some else (np.int64(1), np.int64(0))


@kernel
def _address(words: Any, valid: Any, low: Any, place: Any, first: Any, codes: Any) -> int:
    """Number words by address, in order of arrival; the last place is the null key's."""
    m = 0
    for i in range(len(words)):
        at = np.uint64(words[i] - low) if valid is None or valid[i] else np.uint64(len(place) - 1)
        if place[at] < 0:
            place[at] = m
            first[m] = i
            m += 1
        codes[i] = place[at]
    return m


@kernel
def _number(words: Any, valid: Any, table: Any, place: Any, done: Any, m: Any, first: Any, codes: Any) -> Any:
    """Number words in order of arrival from row ``done`` on; ``(rows done, keys)``."""
    base, shift, homes, probes, room = place
    one, side = np.uint64(1), np.uint64(table.shape[0] - 2)
    for i in range(np.uint64(done), np.uint64(len(words))):
        h = mix(np.uint64(words[i]))
        if h == EMPTY or (valid is not None and not valid[i]):
            j = side if valid is None or valid[i] else side + one
            if table[j, 0] == EMPTY:
                table[j, 0], table[j, 1] = (
                    np.uint64(0),
                    np.uint64(m),
                )  # side rows are marked by any word but EMPTY
                first[m] = i
                m += 1
            codes[i] = table[j, 1]
            continue
        j = (h - base) >> shift
        if j >= homes:
            return i, m
        home = j
        while True:
            held = table[j, 0]
            if held == h:
                break
            if held == EMPTY:
                if np.uint64(m) >= room or j - home >= probes:
                    return i, m
                table[j, 0], table[j, 1] = h, np.uint64(m)
                first[m] = i
                m += 1
                break
            j += one
        codes[i] = table[j, 1]
    return np.uint64(len(words)), m


@kernel
def _renumber(codes: Any, rank: Any) -> None:
    for i in range(len(codes)):
        codes[i] = rank[np.uint64(codes[i])]


def estimate_distinct(column: Array) -> int:
    """About how many distinct keys a word column has, from a sample; never more than its rows."""
    n = len(column)
    size = SAMPLE if n > 64 * SAMPLE else 4096
    if n <= 1024:
        return n
    sample = np.sort(key_words(column[:: max(1, n // size)][:size]))
    seen = 1 + int(np.count_nonzero(sample[1:] != sample[:-1]))
    if n <= size:
        return seen
    low, high = float(seen), float(n)
    for _ in range(
        40
    ):  # d (1 - (1 - 1/d)^size) distinct keys are seen where there are d: solved for d by bisection
        middle = (low + high) / 2
        expected = -middle * math.expm1(len(sample) * math.log1p(-1 / middle)) if middle > 1 else 1
        low, high = (middle, high) if expected < seen else (low, middle)
    return min(n, int(1.1 * high) + 1)


def is_dense(low: int, high: int, keys: int) -> bool:
    """True where words in ``[low, high]`` are better found by address than by hash."""
    return high >= low and high - low < max(DENSE_SPAN * keys, SMALL_SPAN)


def code_dtype(rows: int) -> type[np.signedinteger[Any]]:
    """int32 as long as that many keys can be numbered with it."""
    return np.int32 if rows < 2**31 else np.int64


def number_keys(keys: Batch) -> Numbered:
    """The distinct keys of these rows in canonical order, and the number of each row's key.

    >>> numbered = number_keys(Batch(k=np.array([30, 10, 30])))
    >>> numbered.keys["k"][numbered.codes].tolist(), len(numbered)
    ([30, 10, 30], 2)
    """
    if not keys.names:
        raise UsageError("a key needs at least one column, got none")
    if not is_word_key(keys.schema):
        return _number_stored(keys)
    name = keys.names[0]
    words, valid = key_words(keys[name]), keys.valid(name)
    low, high = extent(words, valid) if keys[name].dtype.kind != "f" else (1, 0)
    if is_dense(int(low), int(high), len(words)):
        return _number_addressed(keys, words, valid, int(low), int(high))
    return _number_hashed(keys, words, valid)


def _number_addressed(keys: Batch, words: Array, valid: Array | None, low: int, high: int) -> Numbered:
    span = high - low + 1
    place, first = (
        np.full(span + 1, -1, code_dtype(len(words))),
        np.empty(min(len(words), span + 1), np.int64),
    )
    codes = np.empty(len(words), code_dtype(len(words)))
    m = _address(words, valid, np.int64(low), place, first, codes)
    return _in_order(keys, words, valid, codes, first[:m])


def _number_hashed(keys: Batch, words: Array, valid: Array | None) -> Numbered:
    codes, first, _ = _number_words(words, valid, estimate_distinct(words))
    return _in_order(keys, words, valid, codes, first)


def _number_words(words: Array, valid: Array | None, expected: int) -> tuple[Array, Array, OrderedTable]:
    """Codes and first rows in order of arrival, and the table that knows them (``used``: how many keys)."""
    table, done, m = OrderedTable(1, _no_fill), 0, 0
    table.reserve(expected, hash_words(words[:: max(1, len(words) // SAMPLE)]))
    codes, first = np.empty(len(words), code_dtype(len(words))), np.empty(len(words), np.int64)
    while True:
        done, m = _number(words, valid, table.unsigned, _place(table), done, m, first, codes)
        table.used = m
        if done == len(words):
            return codes, first[:m], table
        table.make_room(hash_words(words[done : done + SAMPLE]))


def _in_order(keys: Batch, words: Array, valid: Array | None, codes: Array, first: Array) -> Numbered:
    hashes = hash_words(words[first])
    if valid is not None:
        hashes[~valid[first]] = NULL_HASH
    order = hash_order(hashes)
    if valid is not None:
        order = null_first(order, hashes, valid[first])
    rank = np.empty(len(order), codes.dtype)
    rank[order] = np.arange(len(order), dtype=codes.dtype)
    _renumber(codes, rank)
    first = first[order]
    return Numbered(codes, hashes[order], keys.take(first), first)


def null_first(order: Array, hashes: Array, valid: Array) -> Array:
    """The order with the null key before a real key that happens to have its hash."""
    same = np.flatnonzero(hashes[order] == NULL_HASH)
    if len(same) == 2 and valid[order[same[0]]]:
        order[same] = order[same[::-1]]
    return order


def _number_stored(keys: Batch) -> Numbered:
    store, numbers = KeyStore(keys.schema), np.empty(len(keys), np.int64)
    store.number(keys, hashing.hash_keys(keys), numbers)
    hashes, order = store.canonical()
    rank = np.empty(len(order), code_dtype(len(keys)))
    rank[order] = np.arange(len(order), dtype=rank.dtype)
    codes, first = rank[numbers], np.empty(len(order), np.int64)
    first[codes[::-1]] = np.arange(len(keys) - 1, -1, -1)  # the last write wins: the first row
    return Numbered(codes, hashes, keys.take(first), first)


def keys_of_words(schema: Schema, words: Array, null_at: int = -1) -> Batch:
    """The key column of a word key from its words, with the null key at row ``null_at``."""
    name, field = next(iter(schema.items()))
    column = words_to_column(words, field.dtype)
    if null_at < 0 and not field.nullable:
        return Batch._trusted({name: column}, {}, len(words), schema)
    valid = np.ones(len(words), bool)
    if null_at >= 0:
        valid[null_at], column[null_at] = False, np.zeros(1, field.dtype)[0]
    return Batch.from_dict({name: column}, {name: valid})


class KeyIndex:
    """Slots of known keys: ``lookup`` gives the row at which a key stands in ``keys``.

    Keys must be distinct (`UsageError` otherwise). Only numbers are kept, 4 to 26 bytes per key of a single
    number.

    >>> index = KeyIndex(Batch(k=np.array([30, 10, 20])))
    >>> index.lookup(Batch(k=np.array([10, 99]))).tolist()
    [1, -1]
    """

    def __init__(self, keys: Batch):
        self.schema = keys.schema
        self.finder, codes = _finder_of(keys)
        if len(self) < len(keys):
            raise UsageError(_repeated(keys, codes))

    def __len__(self) -> int:
        return self.finder.keys

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.finder.nbytes

    def lookup(self, keys: Batch, dtype: type[np.signedinteger[Any]] = np.int64) -> Array:
        """The slot, of this dtype ``(n,)``, of each row's key, -1 where it is absent. Columns are matched by
        position.

        Raises `SchemaError` where these keys can never equal those of the index (text against numbers, floats
        against integers).
        """
        if keys.names != tuple(self.schema) or keys.schema != self.schema:
            check_comparable(self.schema, keys.schema)
        slots = np.empty(len(keys), dtype)
        self.finder.find(keys, slots)
        return slots


def arrivals(keys: Batch) -> tuple[KeyIndex, Array]:
    """An index of the distinct keys of these rows, numbered in order of arrival, and the number of each row's
    key.
    """
    index = object.__new__(KeyIndex)
    index.schema = keys.schema
    index.finder, codes = _finder_of(keys)
    return index, codes


def _finder_of(keys: Batch) -> tuple[_Finder, Array]:
    """How to find these keys, and the number, in order of arrival, of each row's key."""
    if not keys.names:
        raise UsageError("a key needs at least one column, got none")
    if not is_word_key(keys.schema):
        return _stored(keys)
    words, valid = key_words(keys[keys.names[0]]), keys.valid(keys.names[0])
    low, high = (int(w) for w in extent(words, valid))
    if keys[keys.names[0]].dtype.kind != "f" and is_dense(low, high, len(words)):
        return _addressed(words, valid, low, high)
    codes, _, table = _number_words(words, valid, estimate_distinct(words))
    return _Hashed(table), codes


class _Finder(Protocol):
    @property
    def keys(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def find(self, keys: Batch, slots: Array) -> None: ...


@kernel
def _find_address(words: Any, valid: Any, low: Any, place: Any, slots: Any) -> None:
    span = np.uint64(len(place) - 1)
    for i in range(len(words)):
        at = np.uint64(words[i] - low) if valid is None or valid[i] else span
        if at > span or (at == span and (valid is None or valid[i])):
            slots[i] = -1
        else:
            slots[i] = place[at]


@kernel
def _find_number(words: Any, valid: Any, table: Any, place: Any, slots: Any) -> None:
    base, shift, homes, _, _ = place
    one, side = np.uint64(1), np.uint64(table.shape[0] - 2)
    for i in range(np.uint64(len(words))):
        h = mix(np.uint64(words[i]))
        slots[i] = -1
        if h == EMPTY or (valid is not None and not valid[i]):
            j = side if valid is None or valid[i] else side + one
            if table[j, 0] != EMPTY:
                slots[i] = table[j, 1]
            continue
        j = (h - base) >> shift
        if j >= homes:
            continue
        while True:
            held = table[j, 0]
            if held == h:
                slots[i] = table[j, 1]
                break
            if held == EMPTY:
                break
            j += one


@dataclass(frozen=True)
class Addressed:
    """Integers that lie close together, by address."""

    low: np.int64
    place: Array
    keys: int

    @property
    def nbytes(self) -> int:
        return self.place.nbytes

    def find(self, keys: Batch, slots: Array) -> None:
        name = keys.names[0]
        _find_address(key_words(keys[name]), keys.valid(name), self.low, self.place, slots)


def _addressed(words: Array, valid: Array | None, low: int, high: int) -> tuple[Addressed, Array]:
    place, codes = (
        np.full(high - low + 2, -1, code_dtype(len(words))),
        np.empty(len(words), code_dtype(len(words))),
    )
    m = _address(words, valid, np.int64(low), place, np.empty(min(len(words), len(place)), np.int64), codes)
    return Addressed(np.int64(low), place, m), codes


@dataclass(frozen=True)
class _Hashed:
    """Other keys of a single number, by hash."""

    table: OrderedTable

    @property
    def keys(self) -> int:
        return self.table.used

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    def find(self, keys: Batch, slots: Array) -> None:
        name = keys.names[0]
        _find_number(key_words(keys[name]), keys.valid(name), self.table.unsigned, _place(self.table), slots)


@dataclass(frozen=True)
class _Stored:
    """Keys of any other kind."""

    store: KeyStore

    @property
    def keys(self) -> int:
        return len(self.store)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def find(self, keys: Batch, slots: Array) -> None:
        self.store.find(keys, hashing.hash_keys(keys), slots)


def _stored(keys: Batch) -> tuple[_Stored, Array]:
    store, codes = KeyStore(keys.schema), np.empty(len(keys), np.int64)
    store.number(keys, hashing.hash_keys(keys), codes)
    return _Stored(store), codes


def _repeated(keys: Batch, codes: Array) -> str:
    """Which keys of an index came twice."""
    rows = np.flatnonzero(codes == int(np.flatnonzero(np.bincount(codes) > 1)[0]))[:2]
    return (
        f"keys of an index must be distinct: rows {rows[0]} and {rows[1]} both hold "
        f"{row_text(keys, int(rows[0]))}"
    )


def check_comparable(ours: Schema, theirs: Schema) -> None:
    """Raise `SchemaError` where keys of these schemas, column by column, can never be equal."""
    if len(ours) != len(theirs):
        raise SchemaError(
            f"keys of {len(ours)} columns ({ours.describe()}) against {len(theirs)} ({theirs.describe()})"
        )
    for (name, a), (other, b) in zip(ours.items(), theirs.items(), strict=True):
        if _key_class(a) != _key_class(b):
            raise SchemaError(
                f'key "{name}" is {a.describe()} and "{other}" is {b.describe()}: they never compare equal; '
                "convert one of them (.astype)"
            )


def _key_class(field: Field) -> tuple[object, ...]:
    if field.kind != "fixed":
        return ("bytes",) if field.kind in ("bytes", "text") else ("list", field.dtype)
    kind = "i" if field.dtype.kind in "iub" else field.dtype.kind
    return (kind, field.shape, field.dtype if kind in "mM" else None)


def _place(table: OrderedTable) -> tuple[np.uint64, ...]:
    return table.base, table.shift, np.uint64(table.homes), np.uint64(table.probes), np.uint64(table.room)


def _no_fill(rows: Array) -> None:
    """Numbers are written when a key is inserted."""
