"""How many threads a rank may have: all cores of this process when it is alone, its share of them otherwise.

A rank's share counts what the launcher bound it to: a core that three ranks of a node may run on is a third
of a core for each of them. So ranks bound to cores of their own have all of those, and ranks that are not
bound divide the node.

Linear algebra in user code gets one thread, however many a rank has: its sums depend on how many it has, our
kernels use the others, and products of a map's piece gain nothing (measured: 1 ms matrix-vector products take
as long on two threads). The environment sees to it on the command line (`iterreduce.start`); in library use
`one_blas_thread` does while a run lasts, if threadpoolctl is installed.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from typing import Any

from iterreduce.collectives import Group, launched_size, node_ranks
from iterreduce.columns.threads import ALONE, Pool, cores, current

BLAS_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Whoever has set one of these has chosen."""

_shares: weakref.WeakKeyDictionary[Group, tuple[int, int]] = weakref.WeakKeyDictionary()
"""Of each group: its epoch, and its ranks' share then."""


def pool_for(group: Group, threads: int | None) -> Pool:
    """A pool of ``threads`` threads; None: this rank's share of cores. Collective.

    A run within a run, in user code or as a source, works on the pool of the outer one.
    """
    outer = current()
    if outer is not ALONE:
        return outer
    return Pool(share_of_cores(group) if threads is None else threads)


def share_of_cores(group: Group) -> int:
    """How many cores this rank has to itself, at least 1. Collective, the first time that a group asks."""
    if group.size == 1:
        return alone()
    epoch, known = _shares.get(group, (-1, 1))
    if epoch != group.epoch:
        mine = [socket.gethostname(), *map(str, sorted(cores()))]
        told = group.allgather_bytes(" ".join(mine).encode())
        known = share(told, group.rank)
        _shares[group] = group.epoch, known
    return known


def alone() -> int:
    """The share of a group of one: others that the launcher started may run on the same cores."""
    ranks = node_ranks() or launched_size() or 1
    return max(1, len(cores()) // ranks)


def share(told: list[bytes], rank: int) -> int:
    """Of ranks' hosts and cores, in words.

    >>> share([b"a 0 1 2 3", b"a 0 1 2 3", b"b 0 1", b"a 4 5"], 0), share([b"a 0 1", b"a 2 3", b"a 2 3"], 0)
    (2, 2)
    """
    places = [text.decode().split() for text in told]
    host, *mine = places[rank]
    users = Counter(core for other, *theirs in places if other == host for core in theirs)
    return max(1, int(sum(Fraction(1, users[core]) for core in mine)))


_limiting = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """For the time of a ``with`` statement, linear algebra of this process has one thread; then what it had.

    Where such times overlap, as with ranks that are threads, the first is the one that counts: a limit is the
    whole process's, and only the thread that set it can lift it.
    """
    chosen = any(name in os.environ for name in BLAS_VARIABLES)
    libraries = None if chosen else _blas_libraries()
    if libraries is None or not _limiting.acquire(blocking=False):
        yield
        return
    try:
        with libraries.limit(limits=1, user_api="blas"):
            yield
    finally:
        _limiting.release()


@cache
def _blas_libraries() -> Any:
    """What threadpoolctl finds loaded (a search of some milliseconds, once), or None without it."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")
