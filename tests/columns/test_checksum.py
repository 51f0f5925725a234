"""The checksum: what the documentation defines, in plain NumPy, and what changes of bytes it notices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterreduce.columns.checksum import checksum, finished, partial


def by_numpy(data: bytes) -> int:
    """The definition."""
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    keys = np.arange(1, len(words) + 1, dtype="u8") * np.uint64(0x9E3779B97F4A7C15)

    def mix(x: np.ndarray) -> np.ndarray:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
        return x ^ (x >> np.uint64(33))

    return int(mix(np.atleast_1d(mix(words + keys).sum(dtype="u8") + np.uint64(len(data))))[0])


@given(st.binary(max_size=3000))
def test_it_is_the_documented_sum_of_mixed_words(data: bytes) -> None:
    assert checksum(data) == by_numpy(data)


@given(st.binary(min_size=1, max_size=2000), st.lists(st.integers(0, 250), max_size=6))
def test_parts_that_begin_at_multiples_of_eight_add_up(data: bytes, cuts: list[int]) -> None:
    array = np.frombuffer(data, np.uint8)
    ends = sorted({0, *(8 * cut for cut in cuts if 8 * cut < len(data)), len(data)})
    total = sum(partial(array[lo:hi], lo) for lo, hi in itertools.pairwise(ends))
    assert finished(total, len(data)) == checksum(data)


@given(st.binary(min_size=1, max_size=500), st.data())
def test_a_flipped_bit_a_lost_byte_and_an_added_one_are_noticed(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    flipped = bytearray(data)
    flipped[at] ^= 1 << draw.draw(st.integers(0, 7))
    assert len({checksum(data), checksum(flipped), checksum(data[:-1]), checksum(data + b"\0")}) == 4


def test_words_that_change_places_and_signs_that_flip_together_are_noticed() -> None:
    words = np.random.default_rng(0).normal(size=64)
    seen = {checksum(words)}
    for i in range(63):
        swapped, negated = words.copy(), words.copy()
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        negated[[i, i + 1]] *= -1
        seen |= {checksum(swapped), checksum(negated)}
    assert len(seen) == 1 + 2 * 63


@pytest.mark.parametrize("start", range(8))
def test_bytes_may_begin_anywhere_in_memory_and_be_read_only(start: int) -> None:
    data = np.arange(100, dtype=np.uint8)
    part = data[start : start + 41]
    part.flags.writeable = False
    assert checksum(part) == by_numpy(part.tobytes())


def test_arrays_of_any_dtype_and_shape_count_by_their_bytes() -> None:
    dates = np.arange(6).astype("M8[s]").reshape(2, 3)
    assert checksum(dates) == by_numpy(dates.tobytes())
    assert checksum(np.zeros((0, 4))) == by_numpy(b"")
