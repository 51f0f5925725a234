"""The compiled half of `iterreduce.columns.placement`: four functions that NumPy calls for memory (NEP 49).

They are C callbacks that hold no Python object. What they know is in the words of a placement's context
(`iterreduce.columns.placewords`). Only a placement imports this module, when the first one is made: who has
no budget does not pay for the compiler.
"""

from __future__ import annotations

import errno
from typing import Any

from iterreduce.columns.jit import callback, external, inlined, load_word, store_word
from iterreduce.columns.placewords import (
    COUNT,
    DIGITS,
    ERROR,
    FILED,
    FILED_EVER,
    FILED_PEAK,
    FLAGS,
    FORCE,
    HELD,
    HELD_PEAK,
    LARGE,
    LEAST,
    MOST,
    MOST_LARGE,
    PATH,
    RESERVE,
    WANTED,
)
from iterreduce.memory import HEADER_BYTES, PAGE
from iterreduce.memory import KEY as KEY_OF_HEADER
from iterreduce.memory import MAGIC as MAGIC_OF_HEADER

HUGE = 4 << 20  # arrays for which NumPy, too, asks for huge pages
MADV_HUGEPAGE = 14
MAGIC, KEY = MAGIC_OF_HEADER, KEY_OF_HEADER
HEADER, LAST_OF_PAGE = HEADER_BYTES, PAGE - 1
EINTR = errno.EINTR

_malloc = external("malloc", "p", "p")
_calloc = external("calloc", "p", "pp")
_realloc = external("realloc", "p", "pp")
_free = external("free", "", "p")
_usable = external("malloc_usable_size", "p", "p")
_memcpy = external("memcpy", "p", "ppp")
_madvise = external("madvise", "i", "ppi")
_mmap = external("mmap", "p", "ppiiip")
_munmap = external("munmap", "i", "pp")
_open = external("open", "i", "pii")
_close = external("close", "i", "i")
_unlink = external("unlink", "i", "p")
_allocate = external("posix_fallocate", "i", "ipp")
_errno = external("__errno_location", "p", "")


@inlined
def _add(ctx: Any, word: Any, peak: Any, nbytes: Any) -> None:
    """Add to a count, and raise its peak."""
    now = load_word(ctx + word) + nbytes
    store_word(ctx + word, now)
    if now > load_word(ctx + peak):
        store_word(ctx + peak, now)


@inlined
def _is_filed(at: Any) -> Any:
    """Is this the memory of a file? What stands in front of it is in the same page, so it can be read."""
    return (
        at & LAST_OF_PAGE == HEADER
        and load_word(at - HEADER) == MAGIC
        and load_word(at - HEADER + 16) == (at ^ KEY)
    )


@inlined
def _goes_to_file(ctx: Any, nbytes: Any) -> Any:
    """Has the budget no room for an array of this size?"""
    force = load_word(ctx + FORCE)
    if force != 0:
        return force > 0
    most = load_word(ctx + MOST)
    if nbytes >= load_word(ctx + LARGE):
        most = load_word(ctx + MOST_LARGE)
    return load_word(ctx + HELD) + nbytes > most


@inlined
def _name(ctx: Any, at: Any) -> None:
    """A name that was not used before: sixteen hexadecimal digits."""
    number = load_word(ctx + COUNT)
    store_word(ctx + COUNT, number + 1)
    for half in range(2):
        word = 0
        for place in range(8):
            digit = (number >> (4 * (15 - 8 * half - place))) & 15
            word |= (digit + (48 if digit < 10 else 87)) << (8 * place)
        store_word(at + 8 * half, word)


@inlined
def _fail(ctx: Any, error: Any, nbytes: Any) -> Any:
    store_word(ctx + ERROR, error)
    store_word(ctx + WANTED, nbytes)
    return 0


@inlined
def _in_file(ctx: Any, nbytes: Any) -> Any:
    """Zeros in a file without a name; 0 where there cannot be one."""
    length = (nbytes + HEADER + LAST_OF_PAGE) & ~LAST_OF_PAGE
    path, digits = load_word(ctx + PATH), load_word(ctx + DIGITS)
    if digits:
        _name(ctx, path + digits)
    file = _open(path, load_word(ctx + FLAGS), 0o600)
    if file < 0:
        return _fail(ctx, load_word(_errno()) & 0xFFFFFFFF, nbytes)
    if digits:
        _unlink(path)
    error = _allocate(file, 0, length)
    while error == EINTR:
        error = _allocate(file, 0, length)
    base = 0
    if error == 0:
        base = _mmap(0, length, 3, 1, file, 0)  # read and write, shared
        if base == -1:
            error = load_word(_errno()) & 0xFFFFFFFF
    _close(file)
    if error != 0:
        return _fail(ctx, error, nbytes)
    at = base + HEADER
    store_word(base, MAGIC)
    store_word(base + 8, length)
    store_word(base + 16, at ^ KEY)
    _add(ctx, FILED, FILED_PEAK, length)
    store_word(ctx + FILED_EVER, load_word(ctx + FILED_EVER) + length)
    return at


@inlined
def _is_spared(ctx: Any, nbytes: Any) -> Any:
    """May an array that got no file lie in memory? Small ones may, in the last eighth of the budget: so what
    a full directory refuses is large, and is asked for where a rank may fail.
    """
    if nbytes >= load_word(ctx + LARGE) or load_word(ctx + HELD) + nbytes > load_word(ctx + RESERVE):
        return False
    store_word(ctx + ERROR, 0)
    return True


@inlined
def _kept(ctx: Any, at: Any, nbytes: Any) -> Any:
    """Count memory that the C library gave."""
    if at != 0:
        usable = _usable(at)
        if usable >= load_word(ctx + LEAST):
            _add(ctx, HELD, HELD_PEAK, usable)
        if nbytes >= HUGE:
            skip = -at & LAST_OF_PAGE
            _madvise(at + skip, nbytes - skip, MADV_HUGEPAGE)
    return at


@inlined
def _obtain(ctx: Any, nbytes: Any) -> Any:
    if nbytes < load_word(ctx + LEAST) >> 1:
        return _malloc(nbytes)
    if _goes_to_file(ctx, nbytes):
        at = _in_file(ctx, nbytes)
        if at != 0 or not _is_spared(ctx, nbytes):
            return at
    return _kept(ctx, _malloc(nbytes), nbytes)


@inlined
def _give_back(ctx: Any, at: Any) -> None:
    if at == 0:
        return
    if _is_filed(at):
        length = load_word(at - HEADER + 8)
        _add(ctx, FILED, FILED_PEAK, -length)
        _munmap(at - HEADER, length)
        return
    usable = _usable(at)
    if usable >= load_word(ctx + LEAST):
        _add(ctx, HELD, HELD_PEAK, -usable)
    _free(at)


def _c_malloc(ctx: Any, nbytes: Any) -> Any:
    return _obtain(ctx, nbytes)


def _c_calloc(ctx: Any, count: Any, size: Any) -> Any:
    nbytes = count * size
    if nbytes < load_word(ctx + LEAST) >> 1:
        return _calloc(count, size)
    if _goes_to_file(ctx, nbytes):
        at = _in_file(ctx, nbytes)
        if at != 0 or not _is_spared(ctx, nbytes):
            return at
    return _kept(ctx, _calloc(count, size), nbytes)


def _c_realloc(ctx: Any, at: Any, nbytes: Any) -> Any:
    if at == 0:
        return _obtain(ctx, nbytes)
    filed = _is_filed(at)
    before = load_word(at - HEADER + 8) - HEADER if filed else _usable(at)
    if not filed and before < load_word(ctx + LEAST) and nbytes < load_word(ctx + LEAST) >> 1:
        return _realloc(at, nbytes)
    made = _obtain(ctx, nbytes)
    if made != 0:
        _memcpy(made, at, min(before, nbytes))
        _give_back(ctx, at)
    return made


def _c_free(ctx: Any, at: Any, nbytes: Any) -> None:
    _give_back(ctx, at)


def functions() -> tuple[Any, Any, Any, Any]:
    """Addresses of malloc, calloc, realloc and free, compiled."""
    return (
        callback(_c_malloc, "p", "pp"),
        callback(_c_calloc, "p", "ppp"),
        callback(_c_realloc, "p", "ppp"),
        callback(_c_free, "", "ppp"),
    )
