"""What is packed is what is unpacked, for every kind of column, at every border of 8 bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.batch import Batch
from iterreduce.columns.packing import pack, packed_words, unpack, unpack_all
from iterreduce.columns.ragged import Ragged
from iterreduce.columns.schema import FIXED_KINDS, Field, Schema
from iterreduce.errors import SchemaError

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "datetime64[D]", "timedelta64[ns]"),
]
SHAPES = [(), (1,), (3,), (8,), (2, 2), (0,)]
few = settings(max_examples=50, deadline=None)


def random_bits(r, count, dtype):
    dtype = np.dtype(dtype)
    bits = r.integers(0, 2 if dtype.kind == "b" else 256, count * dtype.itemsize).astype(np.uint8)
    return bits.view(dtype)


def random_column(r, n, dtype, shape):
    return random_bits(r, n * int(np.prod(shape)), dtype).reshape(n, *shape)


def random_ragged(r, n, kind, dtype):
    lengths = r.integers(0, 5, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)]) + 2  # a slice: offsets that do not begin at 0
    values = (
        r.integers(97, 123, offsets[-1] + 3).astype(np.uint8)
        if kind != "list"
        else random_bits(r, offsets[-1] + 3, dtype)
    )
    return Ragged(offsets.astype(np.int64), values, kind)


def same_bits(a, b):
    """Equal columns, NaN payloads included."""
    if isinstance(a, Ragged):
        return (
            a.kind == b.kind
            and np.array_equal(a.lengths, b.lengths)
            and same_bits(a.compact().values, b.compact().values)
        )
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def same_rows(a, b):
    masks = all(
        (a.valid(n) is None) == (b.valid(n) is None)
        and (a.valid(n) is None or same_bits(a.valid(n), b.valid(n)))
        for n in a.names
    )
    return a.names == b.names and len(a) == len(b) and masks and all(same_bits(a[n], b[n]) for n in a.names)


def send(batch, order, bounds, schema=None, gap=3):
    """All segments of a batch, packed into one dirty buffer with gaps between them."""
    words = packed_words(batch, order, bounds, schema)
    at = np.cumsum(words + gap) - words
    out = np.full(int(words.sum()) + gap * (len(words) + 1), -1, np.int64)
    for d, begin in enumerate(at.tolist()):
        assert pack(batch, order, int(bounds[d]), int(bounds[d + 1]), out, begin, schema) == words[d]
    untouched = np.ones(len(out), bool)
    for begin, size in zip(at.tolist(), words.tolist(), strict=True):
        untouched[begin : begin + size] = False
    assert (out[untouched] == -1).all(), "nothing outside a segment is written"
    return [out[begin : begin + size] for begin, size in zip(at.tolist(), words.tolist(), strict=True)]


@st.composite
def batches(draw):
    r = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(0, 30))
    columns, masks = {}, {}
    for c in range(draw(st.integers(1, 4))):
        name, kind = f"c{c}", draw(st.sampled_from(["fixed", "fixed", "text", "bytes", "list"]))
        dtype = draw(st.sampled_from(DTYPES))
        columns[name] = (
            random_column(r, n, dtype, draw(st.sampled_from(SHAPES)))
            if kind == "fixed"
            else random_ragged(r, n, kind, dtype)
        )
        if draw(st.booleans()):
            masks[name] = r.random(n) < 0.5
    return r, Batch.from_dict(columns, masks)


@few
@given(batches(), st.integers(1, 5), st.sampled_from([None, np.int32, np.int64]))
def test_every_destination_gets_its_rows(made, destinations, order_dtype):
    r, batch = made
    n = len(batch)
    bounds = np.sort(np.concatenate([[0, n], r.integers(0, n + 1, destinations - 1)]))
    order = None if order_dtype is None else r.permutation(n).astype(order_dtype)
    segments = send(batch, order, bounds)
    for d, words in enumerate(segments):
        rows = np.arange(bounds[d], bounds[d + 1]) if order is None else order[bounds[d] : bounds[d + 1]]
        got = unpack(words, batch.schema, len(rows))
        assert got.schema == batch.schema
        assert same_rows(got, batch.take(rows))
    counts = np.diff(bounds).tolist()
    everything = batch if order is None else batch.take(order)
    assert same_rows(unpack_all(segments, batch.schema, counts), everything)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(18))
def test_pieces_of_any_length_begin_on_borders_of_eight_bytes(dtype, n):
    r = np.random.default_rng(n)
    batch = Batch(a=random_column(r, n, dtype, ()), b=np.arange(n), c=random_column(r, n, dtype, (3,)))
    (words,) = send(batch, None, np.array([0, n]))
    size = np.dtype(dtype).itemsize
    assert len(words) == -(-n * size // 8) + n + -(-3 * n * size // 8)
    padding = words.view(np.uint8)[n * size : -(-n * size // 8) * 8]
    assert not padding.any(), "padding is zero: equal rows are equal words"
    assert same_rows(unpack(words, batch.schema, n), batch)


def test_equal_rows_are_equal_words_whatever_lay_in_the_buffer():
    batch = Batch.from_dict(
        {"a": np.arange(5, dtype=np.int8), "t": ["x", "", "yz", "ä", "q"]},
        {"t": np.array([1, 1, 0, 1, 1], bool)},
    )
    clean, dirty = (np.full(9, fill, np.int64) for fill in (0, -1))
    n = pack(batch, None, 0, 5, clean)
    assert n == pack(batch.take(np.arange(5)), np.arange(5), 0, 5, dirty) == 1 + 6 + 1 + 1
    np.testing.assert_array_equal(clean[:n], dirty[:n])


def test_columns_that_are_not_contiguous_are_packed_as_they_read():
    wide = np.arange(60).reshape(10, 6)
    batch = Batch(a=wide[:, 1], b=wide[:, 2:4], c=np.arange(20, dtype=np.int16)[::2], d=wide[::-1])
    for order in (None, np.array([9, 0, 3, 3, 1, 2, 4, 8, 7, 6])):
        (words,) = send(batch, order, np.array([0, 10]))
        assert same_rows(
            unpack(words, batch.schema, 10), batch.take(np.arange(10) if order is None else order)
        )


def test_an_agreed_mask_is_sent_by_ranks_without_nulls():
    batch = Batch(a=np.arange(5), t=["v", "w", "x", "y", "z"])
    agreed = Schema({n: Field(f.kind, f.dtype, f.shape, nullable=True) for n, f in batch.schema.items()})
    (words,) = send(batch, np.arange(5)[::-1], np.array([0, 5]), agreed)
    got = unpack(words, agreed, 5)
    assert got["a"].tolist() == [4, 3, 2, 1, 0]
    assert got["t"].to_list() == list("zyxwv")
    assert got.valid("a").all()
    assert got.valid("t").all()


def test_other_columns_than_agreed_are_refused():
    batch = Batch.from_dict({"a": np.arange(2)}, {"a": np.ones(2, bool)})
    for other in (
        Batch(a=np.arange(2)),
        Batch(b=np.arange(2)),
        Batch(a=np.zeros(2)),
        Batch(a=np.arange(2), b=np.arange(2)),
    ):
        with pytest.raises(SchemaError, match="agreed on"):
            packed_words(batch, None, np.array([0, 2]), other.schema)


def test_unpacked_columns_are_views_unless_copies_are_asked_for():
    batch = Batch(a=np.arange(4), t=["a", "b", "c", "d"])
    (words,) = send(batch, None, np.array([0, 4]))
    view, copy = unpack(words, batch.schema, 4), unpack(words, batch.schema, 4, copy=True)
    assert np.shares_memory(view["a"], words)
    assert np.shares_memory(view["t"].values, words)
    words[:] = 0
    assert same_rows(copy, batch)


def test_no_rows_take_no_words_but_for_the_end_of_ragged_columns():
    batch = Batch(a=np.empty((0, 3)), t=Ragged.from_list(["x"]).slice(0, 0))
    assert packed_words(batch, None, np.array([0, 0, 0])).tolist() == [1, 1]
    (words,) = send(batch, np.empty(0, np.int64), np.array([0, 0]))
    assert same_rows(unpack(words, batch.schema, 0), batch)
    assert len(unpack_all([], batch.schema, [])) == 0


def test_a_segment_or_buffer_that_is_too_short_is_refused():
    batch = Batch(a=np.arange(4))
    with pytest.raises(SchemaError, match="does not fit"):
        pack(batch, None, 0, 4, np.zeros(3, np.int64))
    with pytest.raises(SchemaError, match="too short"):
        unpack(np.zeros(3, np.int64), batch.schema, 4)


def test_every_dtype_that_a_batch_may_hold_is_tried_here():
    assert {np.dtype(d).kind for d in DTYPES} == set(FIXED_KINDS)
