"""The one door to Numba: two decorators that compile a function to machine code.

It is not a place for kernels. Every compiled loop of the package is written in `iterreduce.columns` and
decorated here,
so that the compiler options, and with them the bits of every float sum, are chosen once. Kernels release the
GIL and
never start threads of their own: the caller owns the threads.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba.core.compiler_lock import global_compiler_lock

P = ParamSpec("P")
R = TypeVar("R")

REASSOCIATE = {"reassoc", "contract", "nsz", "arcp"}
"""Float flags that let additions be regrouped (one binary regroups always alike), but keep NaN and infinity.
"""


def _compile(function: Callable[P, R], **options: object) -> Callable[P, R]:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # a function typed at a prompt has no file beside which a cache could stand
        compiled = numba.njit(**options)(function)
    else:
        _compile_once_per_node(compiled)
    return cast("Callable[P, R]", compiled)


class _NodeLock:
    """A lock between the processes of one user on one node: read by many, or written by one.

    It is a file in the node's own temporary directory, never in a home that nodes share, and the kernel drops
    it
    with the process. Where no file can be made there is no lock, and each process compiles for itself.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._depth = 0

    def _descriptor(self) -> int | None:
        if self._file is None:
            path = os.path.join(tempfile.gettempdir(), f"iterreduce-compile-{os.getuid()}.lock")
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError:
                self._file = -1
        return self._file if self._file >= 0 else None

    def take(self, operation: int) -> None:
        """Wait for the lock, unless this process writes already."""
        descriptor = self._descriptor()
        if descriptor is not None and self._depth == 0:
            fcntl.flock(descriptor, operation)

    def begin_writing(self) -> None:
        self.take(fcntl.LOCK_EX)
        self._depth += 1

    def end_writing(self, depth: int) -> None:
        """Back to as many writers, one inside another, as there were."""
        self._depth = depth
        self.take(fcntl.LOCK_UN)

    @property
    def depth(self) -> int:
        return self._depth


_node = _NodeLock()


class _SharedCache:
    """Numba's file cache behind the lock: what is not there is compiled by one process, and loaded by the
    others.

    Numba alone lets every process compile, and two that save at once can leave an index that names the
    other's code.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, target: Any) -> Any:
        _node.take(fcntl.LOCK_SH)
        found = self._cache.load_overload(signature, target)
        if found is None:
            _node.take(fcntl.LOCK_UN)
            _node.begin_writing()  # until the compilation that follows is saved
            found = self._cache.load_overload(signature, target)
        return found


def _compile_once_per_node(dispatcher: Any) -> None:
    dispatcher._cache = _SharedCache(dispatcher._cache)
    compile_alone = dispatcher.compile

    def compile_in_turn(signature: Any) -> Any:
        with global_compiler_lock:
            depth = _node.depth
            try:
                return compile_alone(signature)
            finally:
                _node.end_writing(depth)

    dispatcher.compile = compile_in_turn


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

    NaN and infinity behave as ever; the result may differ from the strict one in the last bits, but is the
    same on
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
