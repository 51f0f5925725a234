"""A walk through a heap of HDF5: objects behind each other, each with its size before it.

It finds where HDF5 could not go on, or would go on for ever; it knows nothing of files. `iterreduce.heaps`
speaks to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel


@kernel
def first_bad(heap: Any, header: Any, before_size: Any, size_bytes: Any, alignment: Any) -> Any:
    """Where the first object begins that has no bytes or ends beyond the heap; -1 if there is none.

    ``heap``: uint8 ``(n,)``, read-only. ``header``: the bytes before the first object, and those of each
    object's own header, alike: ``before_size`` and then ``size_bytes``, little-endian, of its size. Objects
    begin at multiples of ``alignment`` bytes.
    """
    at = header
    while at + header <= len(heap):  # less than a header is left over
        left, size = np.uint64(len(heap) - at), np.uint64(0)
        for i in range(size_bytes):
            byte = np.uint64(heap[at + before_size + i])
            if i >= 8 and byte:
                return at
            if i < 8:
                size |= byte << np.uint64(8 * i)
        if size > left:
            return at
        step = np.int64(size)
        if heap[at] or heap[at + 1]:  # else it is free: its size is that of all that is left, with its header
            step = header + (step + alignment - 1) // alignment * alignment
        if step == 0 or step > len(heap) - at:
            return at
        at += step
    return -1
