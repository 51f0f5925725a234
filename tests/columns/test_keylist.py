"""Lists of keys in canonical order: found and joined as sets would be, also where hashes collide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import number_keys
from iterreduce.columns.hashing import NULL_HASH, hash_keys, unhash_words
from iterreduce.columns.keylist import KeyList
from iterreduce.columns.keystore import KeyStore

KINDS = ("int", "text", "pair", "null ints", "null text")
NULL_TWIN = int(unhash_words(np.array([NULL_HASH], np.uint64))[0])  # the integer whose hash is that of null


def keys_of(kind: str, numbers: list[int]) -> Batch:
    at, text = (
        np.array(numbers, np.int64),
        Batch(k=["", *[f"t{n}" for n in numbers]]).slice(1, len(numbers) + 1),
    )
    match kind:
        case "int":
            return Batch(k=at)
        case "null ints":
            return Batch.from_dict({"k": np.where(at == 1, NULL_TWIN, at)}, {"k": at != 0})
        case "text":
            return text
        case "pair":
            return Batch(a=at % 3, k=text["k"])
        case _:
            return Batch.from_dict({"k": text["k"]}, {"k": at != 0})


some_numbers = st.lists(st.integers(0, 60), max_size=50)


@settings(max_examples=50, deadline=None)
@given(some_numbers, some_numbers, st.sampled_from(KINDS))
def test_finding_and_joining_are_those_of_sets(a: list[int], b: list[int], kind: str) -> None:
    ours, theirs = KeyList.of(keys_of(kind, a)), KeyList.of(keys_of(kind, b))
    found, union = ours.find(theirs), ours.union(theirs)
    everything = number_keys(keys_of(kind, a + b))
    assert len(union.keys) == len(set(a) | set(b))
    assert union.keys.hashes.tolist() == everything.hashes.tolist()
    assert union.keys.keys.equals(everything.keys)
    assert union.keys.keys.take(union.old).equals(ours.keys)
    assert union.keys.keys.take(union.new).equals(theirs.keys)
    known = found >= 0
    assert known.sum() == len(set(a) & set(b))
    assert ours.keys.take(found[known]).equals(theirs.keys.take(np.flatnonzero(known)))
    assert (np.searchsorted(ours.hashes, theirs.hashes[~known]) <= -1 - found[~known]).all()


def test_text_of_one_hash_is_told_apart_by_its_bytes() -> None:
    """As if all hashes collided: lists are then in the order of their bytes, null first."""

    def colliding(words: list[str | None]) -> KeyList:
        mask = np.array([w is not None for w in words])
        keys = Batch.from_dict({"k": [w or "" for w in words]}, {"k": mask})
        return KeyList(np.full(len(words), 7, np.uint64), keys)

    ours, theirs = colliding([None, "a", "b", "bb", "d"]), colliding(["", "a", "ba", "bb", "c", "d", "e"])
    assert ours.find(theirs).tolist() == [-2, 1, -4, 3, -5, 4, -6]
    union = ours.union(theirs)
    assert union.keys.keys["k"].to_list() == ["", "", "a", "b", "ba", "bb", "c", "d", "e"]
    assert union.keys.keys.valid("k").tolist() == [False] + [True] * 8


@pytest.mark.parametrize("gap", [1, 2, 7, 1000])
def test_few_keys_are_found_in_a_long_list(gap: int) -> None:
    ours = KeyList.of(Batch(k=np.arange(20_000)))
    theirs = KeyList(ours.hashes[::gap], ours.keys.take(np.arange(0, 20_000, gap)))
    assert ours.find(theirs).tolist() == list(range(0, 20_000, gap))
    assert (theirs.find(ours) >= 0).sum() == len(theirs)


@pytest.mark.timeout(30)
def test_keys_that_come_in_hash_order_find_room_in_a_store() -> None:
    """The first homes are crowded while the table as a whole is not full: it must grow all the same."""
    words = Batch(k=[f"word-{n}" for n in range(10_000)])
    hashes, numbers = hash_keys(words), np.empty(10_000, np.int64)
    order, store = np.argsort(hashes), KeyStore(words.schema)
    store.number(words.take(order), hashes[order], numbers)
    assert numbers.tolist() == list(range(10_000)) and store.canonical()[1].tolist() == numbers.tolist()
