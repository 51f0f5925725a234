"""A 64-bit checksum of bytes: as fast as memory, the same on every host, checked by ten lines of NumPy.

Bytes are read as little-endian 64-bit words, the last one padded with zeros. Each word is added to its number
(from 1) times an odd constant and mixed; the mixed words are summed, and the sum and the number of bytes are
mixed again. All arithmetic is modulo 2^64. Mixing is one to one, so a single damaged word always changes the
sum; other damage escapes with a chance of about 2^-64.

A sum does not ask for an order: parts of the bytes may be summed by whoever holds them (`partial`), as long
as they begin at a multiple of 8, and added up. It finds accidents; whoever wants to can make bytes that fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.hashing import FIRST_64
from iterreduce.columns.jit import kernel
from iterreduce.columns.ragged import Array

# the finaliser of MurmurHash3 (Austin Appleby, public domain): each bit of the word reaches all others
MIX_A, MIX_B, SHIFT = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(33)
WORD = 8
MODULUS = 1 << 64


@kernel
def mix_fully(word: Any) -> Any:
    """MurmurHash3's bijection of one uint64."""
    x = word ^ (word >> SHIFT)
    x *= MIX_A
    x ^= x >> SHIFT
    x *= MIX_B
    return x ^ (x >> SHIFT)


@kernel
def _sum_mixed(words: Any, first: Any) -> Any:
    key, total = first * FIRST_64, np.uint64(0)
    for i in range(len(words)):
        key += FIRST_64
        total += mix_fully(words[i] + key)
    return total


def partial(data: Array, first_byte: int = 0) -> int:
    """The sum of the mixed words of uint8 ``(n,)``, contiguous, that begin at `first_byte` of the whole.

    `first_byte` is a multiple of 8, and so is ``n`` unless these are the last bytes.

    >>> data = np.arange(100, dtype=np.uint8)
    >>> finished(partial(data[:64]) + partial(data[64:], 64), 100) == checksum(data)
    True
    """
    whole = len(data) // WORD * WORD
    first = first_byte // WORD
    total = _sum_words(data[:whole], first) if whole else 0
    if whole < len(data):
        last = np.zeros(WORD, np.uint8)
        last[: len(data) - whole] = data[whole:]
        total += _sum_words(last, first + whole // WORD)
    return total % MODULUS


def _sum_words(data: Array, first: int) -> int:
    if data.ctypes.data % WORD:
        data = data.copy()
    words = data.view(np.uint64)
    words.flags.writeable = False  # of this view: one compiled version for all arrays
    return int(_sum_mixed(words, np.uint64(first)))


def finished(total: int, nbytes: int) -> int:
    """The checksum of `nbytes` bytes of which all parts together summed up to `total`."""
    return int(mix_fully(np.uint64((total + nbytes) % MODULUS)))


def checksum(data: Array | bytes | bytearray | memoryview) -> int:
    """The checksum of all of the bytes, from 0 to 2^64 - 1. Arrays are contiguous and of any dtype.

    >>> f"{checksum(b''):016x} {checksum(b'iterreduce'):016x}"
    '0000000000000000 9c59f393cc1d7138'
    """
    array = data.reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    return finished(partial(array), len(array))
