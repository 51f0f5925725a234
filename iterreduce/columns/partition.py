"""Logical partitions: which rank owns a key, independent of how many ranks there are.

A key's partition is a pure, monotone function of its hash, and each rank owns a contiguous range of
partitions, hence a contiguous range of hashes: rows in canonical (hash) order are already sorted by owner.
Nothing here communicates; the map is agreed because every rank computes it from the same two numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError

PARTITIONS = 1024
"""Partitions of a loop unless ``--partitions`` says otherwise: enough to balance 256 ranks within a few per
cent.
"""

HALF = np.uint64(32)


@kernel
def _partitions(hashes: Any, partitions: Any, out: Any) -> None:
    for i in range(len(hashes)):
        out[i] = ((hashes[i] >> HALF) * partitions) >> HALF


@kernel
def _owners(hashes: Any, partitions: Any, owner_of: Any, out: Any) -> None:
    for i in range(len(hashes)):
        out[i] = owner_of[((hashes[i] >> HALF) * partitions) >> HALF]


def partition_of(hashes: Array, partitions: int = PARTITIONS) -> Array:
    """The partition, int32 ``(n,)`` in ``[0, partitions)``, of each hash, uint64 ``(n,)``; monotone in the
    hash.

    >>> partition_of(np.array([0, 2**63, 2**64 - 1], dtype=np.uint64), 4).tolist()
    [0, 2, 3]
    """
    out = np.empty(len(hashes), np.int32)
    _partitions(hashes, np.uint64(partitions), out)
    return out


@dataclass(frozen=True)
class PartitionMap:
    """Which partitions, and so which hashes, each of ``size`` ranks owns.

    Raises `UsageError` where a rank would own none.

    >>> PartitionMap(8, 3).bounds.tolist()
    [0, 2, 5, 8]
    """

    partitions: int
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.partitions <= 2**31 - 1:
            raise UsageError(f"--partitions must be between 1 and 2147483647, got {self.partitions}")
        if self.size < 1:
            raise UsageError(f"a partition map needs at least one rank, got {self.size}")
        if self.size > self.partitions:
            raise UsageError(
                f"{self.size} ranks share {self.partitions} partitions, so some would own no key: "
                f"run with --partitions {4 * self.size} or on at most {self.partitions} ranks"
            )

    @cached_property
    def bounds(self) -> Array:
        """int64 ``(size + 1,)``: rank ``r`` owns partitions ``bounds[r]`` to ``bounds[r + 1]``."""
        return np.arange(self.size + 1, dtype=np.int64) * self.partitions // self.size

    @cached_property
    def hash_bounds(self) -> Array:
        """uint64 ``(size,)``: the first hash of each rank's range."""
        firsts = [-(-(int(b) << 32) // self.partitions) << 32 for b in self.bounds[:-1]]
        return np.array(firsts, np.uint64)

    @cached_property
    def _owner_of(self) -> Array:
        return np.repeat(np.arange(self.size, dtype=np.int32), np.diff(self.bounds))

    def owner_of_partitions(self, partitions: Array) -> Array:
        """The owner, int32 ``(n,)``, of each partition."""
        return self._owner_of[partitions]

    def owner_of_hashes(self, hashes: Array) -> Array:
        """The owner, int32 ``(n,)``, of each hash, uint64 ``(n,)``."""
        out = np.empty(len(hashes), np.int32)
        _owners(hashes, np.uint64(self.partitions), self._owner_of, out)
        return out

    def send_bounds(self, hashes: Array) -> Array:
        """int64 ``(size + 1,)``: in ascending ``hashes``, positions ``[r]`` to ``[r + 1]`` belong to rank
        ``r``.

        >>> PartitionMap(4, 2).send_bounds(np.array([1, 5, 2**63], dtype=np.uint64)).tolist()
        [0, 2, 3]
        """
        bounds = np.empty(self.size + 1, np.int64)
        bounds[:-1] = np.searchsorted(hashes, self.hash_bounds)
        bounds[-1] = len(hashes)
        return bounds
