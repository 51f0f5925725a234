"""Philox4x32-10 against published vectors and plain Python; its numbers against their distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from iterreduce.columns.random import choose, integers, normal, philox, stream_number, uniform, words
from iterreduce.errors import UsageError

LOW = 2**32 - 1
ROWS = np.arange(200_000)

# Known answers that come with Random123: counter, key, block (32-bit words, first word first).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW, LOW, LOW, LOW), (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter, key):
    """Ten rounds with Python's integers, as the paper writes them."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def plain_word(seed, stream, iteration, row):
    row &= 2**64 - 1
    block = plain_philox((row & LOW, row >> 32, iteration, stream), (seed & LOW, seed >> 32))
    return block[0] | block[1] << 32


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN)
def test_the_published_known_answers_come_out(counter, key, block):
    assert plain_philox(counter, key) == block
    seed, row = key[0] | key[1] << 32, counter[0] | counter[1] << 32
    low, high = philox(np.uint64(seed), np.uint64(counter[3]), np.uint64(counter[2]), np.uint64(row))
    assert (int(low), int(high)) == (block[0] | block[1] << 32, block[2] | block[3] << 32)
    assert (
        int(words(seed, counter[3], counter[2], np.array([row], np.uint64))[0]) == block[0] | block[1] << 32
    )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, LOW),
    iteration=st.integers(0, LOW),
    rows=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9),
)
def test_words_equal_a_plain_version_for_every_seed_stream_iteration_and_row(seed, stream, iteration, rows):
    got = words(seed, stream, iteration, np.array(rows, np.int64))
    assert got.dtype == np.uint64
    assert got.tolist() == [plain_word(seed, stream, iteration, row) for row in rows]


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(12)), start=st.integers(0, 2**40))
def test_numbers_depend_on_the_row_alone_not_on_how_rows_are_cut_or_ordered(order, start):
    rows = np.arange(start, start + 12)
    draws = (words, uniform, normal, lambda *at: integers(*at, -5, 50))
    for draw in draws:
        whole = draw(1, "noise", 2, rows)
        np.testing.assert_array_equal(draw(1, "noise", 2, rows[order]), whole[order])
        np.testing.assert_array_equal(
            np.concatenate([draw(1, "noise", 2, rows[a:b]) for a, b in [(0, 5), (5, 5), (5, 12)]]), whole
        )
        np.testing.assert_array_equal(draw(1, "noise", 2, rows.astype(np.uint64)[::2]), whole[::2])


def test_seeds_streams_iterations_and_rows_give_unrelated_numbers():
    base = words(1, 2, 3, ROWS)
    for other in (
        words(2, 2, 3, ROWS),
        words(1, 3, 3, ROWS),
        words(1, 2, 4, ROWS),
        words(1, 2, 3, ROWS + 200_000),
    ):
        flipped = np.bitwise_count(base ^ other)
        assert stats.norm.sf(abs(flipped.mean() - 32) / math.sqrt(16 / len(ROWS))) > 1e-4
        assert not np.isin(base, other).any()


def test_uniform_numbers_are_uniform_and_below_one():
    x = uniform(11, 0, 0, ROWS)
    assert x.dtype == np.float64
    assert 0 <= x.min() < 1e-4
    assert 0.9999 < x.max() < 1
    assert stats.kstest(x, "uniform").pvalue > 1e-4
    np.testing.assert_array_equal(x, (words(11, 0, 0, ROWS) >> 11) * 2.0**-53)
    pairs = np.histogram2d(x[::2], x[1::2], bins=16)[0].ravel()
    assert stats.chisquare(pairs).pvalue > 1e-4


def test_normal_numbers_are_normal_and_never_infinite():
    x = normal(12, 0, 0, ROWS)
    assert np.isfinite(x).all()
    assert stats.kstest(x, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(len(x))


def test_normal_numbers_follow_box_and_muller():
    row = np.uint64(77)
    low, high = philox(np.uint64(5), np.uint64(6), np.uint64(7), row)
    radius = math.sqrt(-2 * math.log(((int(low) >> 11) + 1) * 2.0**-53))
    angle = 2 * math.pi * (int(high) >> 11) * 2.0**-53
    assert normal(5, 6, 7, np.array([77]))[0] == pytest.approx(radius * math.cos(angle), rel=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7), (-3, 1000), (2**62, 2**62 + 12)])
def test_integers_are_uniform_over_their_range(low, high):
    x = integers(13, 0, 0, ROWS, low, high)
    assert x.dtype == np.int64
    assert low <= x.min() <= x.max() < high
    counts = np.bincount(x - low, minlength=high - low)
    assert high - low == 1 or stats.chisquare(counts).pvalue > 1e-4


@settings(max_examples=50, deadline=None)
@given(low=st.integers(-(2**63), 2**63 - 1), width=st.integers(1, 2**64), row=st.integers(0, 2**40))
def test_integers_scale_the_word_exactly(low, width, row):
    high = min(low + width, 2**63)
    got = integers(3, 4, 5, np.array([row]), low, high)[0]
    assert int(got) == low + (plain_word(3, 4, 5, row) * (high - low) >> 64)


def plain_choice(seed, stream, population, k):
    """Fisher and Yates on a dictionary."""
    moved, out = {}, []
    for i in range(k):
        there = i + (plain_word(seed, stream, 0, i) * (population - i) >> 64)
        out.append(moved.get(there, there))
        moved[there] = moved.get(i, i)
    return out


@settings(max_examples=40, deadline=None)
@given(
    population=st.sampled_from([1, 2, 7, 100, 2**40, 2**63]),
    wanted=st.integers(0, 100),
    seed=st.integers(0, 2**64 - 1),
)
def test_choose_is_a_shuffle_of_which_only_the_head_is_made(population, wanted, seed):
    k = min(wanted, population)
    got = choose(seed, "rows", population, k)
    assert got.dtype == np.int64
    assert got.tolist() == plain_choice(seed, stream_number("rows"), population, k)
    assert len(set(got.tolist())) == k
    np.testing.assert_array_equal(choose(seed, "rows", population, k // 2), got[: k // 2])


def test_choose_takes_every_subset_in_every_order_alike():
    draws = np.array([choose(seed, 0, 4, 2) for seed in range(6000)])
    counts = np.unique(draws @ [4, 1], return_counts=True)[1]
    assert len(counts) == 12
    assert stats.chisquare(counts).pvalue > 1e-4


def test_choose_of_a_huge_population_is_spread_over_it():
    got = choose(1, 0, 2**40, 50_000)
    assert len(np.unique(got)) == 50_000
    assert stats.kstest(got / 2**40, "uniform").pvalue > 1e-4
    np.testing.assert_array_equal(np.sort(choose(1, 0, 50_000, 50_000)), np.arange(50_000))


def test_a_named_stream_is_a_number_that_does_not_change_between_runs():
    assert stream_number("seeds") == 4062834141 == stream_number(4062834141)
    np.testing.assert_array_equal(words(1, "seeds", 0, ROWS[:5]), words(1, 4062834141, 0, ROWS[:5]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: words(-1, 0, 0, ROWS), "seed = -1: wanted 0 <= seed < 2\\*\\*64"),
        (lambda: words(0, 2**32, 0, ROWS), "stream = 4294967296"),
        (lambda: words(0, 0, 1.5, ROWS), "iteration: wanted an integer, got 1.5"),
        (lambda: words(0, 0, 0, np.zeros(3)), "rows: wanted integers of shape"),
        (lambda: words(0, 0, 0, 3), "rows: wanted integers of shape"),
        (lambda: integers(0, 0, 0, ROWS, 5, 5), "integers from 5 to 5"),
        (lambda: choose(0, 0, 3, 4), "choose 4 of 3: wanted 0 <= k <= population"),
        (lambda: choose(0, 0, 3, -1), "choose -1 of 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
