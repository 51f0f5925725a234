"""Whole rows through a shuffle, on threads as ranks: see `checks_rows`; and the pieces it is made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.batch import Batch, field_of
from iterreduce.columns.hashing import hash_keys
from iterreduce.columns.partition import PartitionMap
from iterreduce.columns.routing import RecordLayout, fine_order, owners, send_order, take_rows
from iterreduce.rowrounds import Shelf
from iterreduce.testing import run_ranks
from tests.engine import checks_rows
from tests.engine.checks_rows import columns
from tests.engine.kit import Check


@pytest.mark.parametrize("check", checks_rows.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_rows(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)


@given(st.integers(0, 5000), st.integers(1, 40), st.sampled_from([40, 1024, 5000]), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_owners_are_those_of_the_partition_map(n: int, size: int, partitions: int, kind: int) -> None:
    random = np.random.default_rng(n)
    words = random.integers(-(2**63), 2**63 - 1, n)
    keys = [
        Batch(k=words),
        Batch(k=words.astype(np.float32)),
        Batch(k=words, j=words >> 60),
        Batch(k=words).with_valid(k=random.integers(0, 2, n) > 0),
    ][kind]
    ranks = PartitionMap(partitions, size)
    dest, counts = owners(keys, ranks)
    wanted = ranks.owner_of_hashes(hash_keys(keys))
    assert np.array_equal(dest, wanted) and np.array_equal(counts, np.bincount(wanted, minlength=size))
    assert np.array_equal(send_order(dest, counts), np.argsort(wanted, kind="stable"))
    order, rows = fine_order(keys, ranks)
    assert np.array_equal(rows, counts) and np.array_equal(wanted[order], np.sort(wanted))


def test_records_hold_columns_of_any_width() -> None:
    rows = columns(50, 9)
    layout = RecordLayout(rows.schema)
    assert layout.width == (16 + 8 + 8 + 12 + 2 + 1 + 1 + 1 + 7) // 8
    place = np.random.default_rng(0).permutation(60)[:50].astype(np.int32)
    buffer = np.zeros(60 * layout.width, np.int64)
    layout.write(rows, place, layout.views(buffer))
    got, valid = layout.read(layout.views(buffer), place)
    assert Batch.from_dict({n: got[n] for n in rows.names}, valid).equals(rows)
    assert layout.fits(rows) and layout.fits(rows.with_valid(m=np.ones(50, bool)))
    assert not layout.fits(rows.with_valid(f=np.ones(50, bool))) and not layout.fits(rows.drop("f"))
    assert not layout.fits(rows.with_columns(f=rows["f"].astype(np.float32)))


def test_rows_are_taken_in_any_order() -> None:
    rows = columns(50, 9).with_columns(t=["a" * (i % 4) for i in range(50)], z=np.zeros((50, 0)))
    order = np.random.default_rng(0).integers(0, 50, 70)
    assert take_rows(rows, order, Shelf(1).new).equals(rows.take(order))


def test_a_shelf_gives_out_again_what_nobody_holds() -> None:
    shelf, field = Shelf(1), field_of(np.zeros((1, 2)))
    first = shelf.new(10, field)
    part = first[3:, 1]
    second = shelf.new(10, field)
    assert not np.shares_memory(first, second)
    address = second.ctypes.data
    del second
    third = shelf.new(10, field)
    assert third.ctypes.data == address and third.shape == (10, 2)
    del first
    assert not np.shares_memory(shelf.new(10, field), part), "a view keeps it"
    shelf.trim()
    del third, part
    assert shelf.nbytes == 3 * 160
    shelf.trim()
    assert shelf.nbytes == 0
