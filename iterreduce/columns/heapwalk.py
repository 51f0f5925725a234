"""A walk through a heap of HDF5: objects behind each other, each with its size before it.

It finds where HDF5 could not go on, or would go on for ever; it knows nothing of files. `iterreduce.heaps`
speaks to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel

# A number, a count of references and four bytes of nothing stand before an object's size.
BEFORE_SIZE = 8
ALIGNMENT = 8


@kernel
def first_bad(heap: Any, header: Any, size_bytes: Any) -> Any:
    """Where the first object begins that has no bytes or ends beyond the heap; -1 if there is none.

    ``heap``: uint8 ``(n,)``, read-only. ``header``: the bytes before the first object, and those of each
    object's own header, alike. ``size_bytes``: of a size, little-endian.
    """
    at = header
    while at + header <= len(heap):  # less than a header is left over
        left, size = np.uint64(len(heap) - at), np.uint64(0)
        for i in range(size_bytes):
            byte = np.uint64(heap[at + BEFORE_SIZE + i])
            if i >= 8 and byte:
                return at
            if i < 8:
                size |= byte << np.uint64(8 * i)
        if size > left:
            return at
        if heap[at] or heap[at + 1]:  # else it is free: its size is that of all that is left, with its header
            size = np.uint64(header) + (size + np.uint64(ALIGNMENT - 1)) // np.uint64(ALIGNMENT) * np.uint64(
                ALIGNMENT
            )
        if size == 0 or size > left:
            return at
        at += np.int64(size)
    return -1
