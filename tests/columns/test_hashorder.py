"""The stable order of hashes is NumPy's, whatever the hashes."""

from __future__ import annotations

import numpy as np
import pytest

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import group_rows
from iterreduce.columns.hashing import hash_words
from iterreduce.columns.hashorder import BUCKET_ROWS, grouping_order, stable_order

RANDOM = np.random.default_rng(0)
SHAPES = {
    "all over": lambda n: RANDOM.integers(0, 2**64, n, dtype=np.uint64),
    "few": lambda n: hash_words(RANDOM.integers(0, 7, n)),
    "many": lambda n: hash_words(RANDOM.integers(0, n // 4 + 1, n)),
    "one": lambda n: np.full(n, 2**64 - 1, np.uint64),
    "two beside each other": lambda n: RANDOM.integers(2**63, 2**63 + 2, n, dtype=np.uint64),
    "close": lambda n: RANDOM.integers(2**40, 2**40 + 2**20, n, dtype=np.uint64),
    "close, and the ends": lambda n: np.append(
        RANDOM.integers(99, 9999, n, dtype=np.uint64), np.array([0, 2**64 - 1], np.uint64)
    ),
    "Zipf": lambda n: hash_words(RANDOM.zipf(1.3, n)),
    "a crowd": lambda n: (RANDOM.integers(0, 200, n) + (RANDOM.integers(0, 2, n) << 50)).astype(np.uint64),
    "ascending": lambda n: np.arange(n, dtype=np.uint64) << np.uint64(40),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_hashes_of_any_shape_are_ordered_as_numpy_does(shape: str) -> None:
    for n in (0, 1, 100, BUCKET_ROWS, 3 * BUCKET_ROWS + 7, 100_000):
        hashes = SHAPES[shape](n)
        order = stable_order(hashes)
        assert order.dtype == np.int32 and np.array_equal(order, np.argsort(hashes, kind="stable"))


def test_rows_are_grouped_as_by_key_numbers() -> None:
    rows = Batch(k=RANDOM.integers(-999, 999, 9000).astype(np.float32) / 4, x=np.arange(9000))
    order = grouping_order(rows.select("k"))
    assert order is not None and rows.take(order).equals(group_rows(rows, "k").rows)
    assert grouping_order(Batch(k=["a", "b"])) is None and grouping_order(rows) is None
