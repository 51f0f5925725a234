"""The one door to Numba: two decorators that compile a function to machine code.

It is not a place for kernels. Every compiled loop of the package is written in `iterreduce.columns` and decorated here,
so that the compiler options, and with them the bits of every float sum, are chosen once. Kernels release the GIL and
never start threads of their own: the caller owns the threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")

REASSOCIATE = {"reassoc", "contract", "nsz", "arcp"}
"""Float flags that let additions be regrouped (one binary regroups always alike), but keep NaN and infinity."""


def _compile(function: Callable[P, R], **options: object) -> Callable[P, R]:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # a function typed at a prompt has no file beside which a cache could stand
        compiled = numba.njit(**options)(function)
    return cast("Callable[P, R]", compiled)


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` on its first call: cached on disk, GIL released, strict IEEE arithmetic.

    >>> import numpy as np
    >>> @kernel
    ... def total(values):
    ...     s = 0
    ...     for v in values:
    ...         s += v
    ...     return s
    >>> int(total(np.arange(5)))
    10
    """
    return _compile(function)


def kernel_reassoc(function: Callable[P, R]) -> Callable[P, R]:
    """Compile like `kernel`, and let the compiler regroup float operations so that sums vectorise.

    NaN and infinity behave as ever; the result may differ from the strict one in the last bits, but is the same on
    every run of the same build.

    >>> import numpy as np
    >>> @kernel_reassoc
    ... def total(values):
    ...     s = 0.0
    ...     for v in values:
    ...         s += v
    ...     return s
    >>> total(np.ones(8))
    8.0
    """
    return _compile(function, fastmath=REASSOCIATE)
