"""Partitions are monotone in the hash, and every hash has one owner on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.hashing import hash_words
from iterreduce.columns.partition import PARTITIONS, PartitionMap, partition_of
from iterreduce.errors import UsageError

SIZES = (1, 2, 3, 5, 8)
EDGES = np.array([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1], np.uint64)
few = settings(max_examples=50, deadline=None)


@few
@given(st.lists(st.integers(0, 2**64 - 1)), st.integers(1, 5000))
def test_a_partition_is_the_share_of_the_hash_range(hashes, partitions):
    got = partition_of(np.array(hashes, np.uint64), partitions)
    assert got.dtype == np.int32
    assert got.tolist() == [(h >> 32) * partitions >> 32 for h in hashes]


def test_partitions_never_fall_as_hashes_rise():
    hashes = np.sort(hash_words(np.arange(10_000)))
    assert (np.diff(partition_of(hashes, 7)) >= 0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("partitions", [8, 13, PARTITIONS, 2**31 - 1])
def test_owners_bounds_and_first_hashes_agree(size, partitions):
    if partitions > 10**6:
        size = min(size, 1)  # the map of owners has an entry per partition
        partitions = 10**6
    plan = PartitionMap(partitions, size)
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == partitions
    assert np.diff(plan.bounds).max() - np.diff(plan.bounds).min() <= 1
    around = np.concatenate(
        [plan.hash_bounds, plan.hash_bounds[1:] - np.uint64(1), EDGES, hash_words(np.arange(999))]
    )
    by_partition = np.searchsorted(plan.bounds, partition_of(around, partitions), side="right") - 1
    np.testing.assert_array_equal(plan.owner_of_hashes(around), by_partition)
    np.testing.assert_array_equal(plan.owner_of_hashes(plan.hash_bounds), np.arange(size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3, 1000])
def test_sorted_hashes_are_sent_in_one_range_per_owner(size, rows):
    plan = PartitionMap(PARTITIONS, size)
    hashes = np.sort(hash_words(np.arange(rows)))
    bounds = plan.send_bounds(hashes)
    np.testing.assert_array_equal(np.repeat(np.arange(size), np.diff(bounds)), plan.owner_of_hashes(hashes))


def test_keys_are_spread_over_ranks_within_a_few_per_cent():
    counts = np.bincount(PartitionMap(PARTITIONS, 8).owner_of_hashes(hash_words(np.arange(80_000))))
    assert counts.min() > 9_500
    assert counts.max() < 10_500


def test_more_ranks_than_partitions_is_an_error_that_names_the_option():
    with pytest.raises(UsageError, match="--partitions 44"):
        PartitionMap(10, 11)
    for partitions, size in ((0, 1), (1, 0), (2**31, 1)):
        with pytest.raises(UsageError):
            PartitionMap(partitions, size)
