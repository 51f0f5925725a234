"""Values of many rows of varying length, brought together: the one loop that `Ragged` needs compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel

Array = np.ndarray[Any, np.dtype[Any]]
UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@kernel
def _gather(values: Any, starts: Any, offsets: Any, out: Any) -> None:
    for i in range(len(starts)):
        at, to = starts[i], offsets[i]
        for k in range(offsets[i + 1] - to):
            out[to + k] = values[at + k]


def gathered(values: Array, starts: Array, offsets: Array) -> Array:
    """Rows that begin at ``starts`` of ``values``, one behind the other: row ``i`` from ``offsets[i]`` on."""
    unit = UNITS.get(values.dtype.itemsize)
    if unit is None or not values.flags.c_contiguous:
        index = np.arange(int(offsets[-1]), dtype=np.int64)
        index += np.repeat(starts - offsets[:-1], np.diff(offsets))
        return values[index]
    out = np.empty(int(offsets[-1]), values.dtype)
    _gather(values.view(unit), starts, offsets, out.view(unit))
    return out
