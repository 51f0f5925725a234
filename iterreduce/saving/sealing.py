"""Facts as JSON that carry their own checksum: manifests, histories, markers.

A sealed file is whole and unchanged, or `Damaged` says why not: nothing that was torn, flipped, nested too
deeply or written twice gets any further. It is data: whoever reads it still checks every field. A seal is
against accidents, not against forgers.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from typing import Any

from iterreduce.columns.checksum import checksum

# A manifest of 10,000 ranks and 20 columns is a tenth of this.
MOST_BYTES = 64 << 20
_SEAL = re.compile(rb',\n"checksum": "([0-9a-f]{16})"\n\}\n\Z')
_SEAL_BYTES = len(b',\n"checksum": ""\n}\n') + 16


class Damaged(Exception):
    """A file of a checkpoint directory that is not what its writer left; the text says in what."""


def sealed(facts: Mapping[str, Any]) -> bytes:
    """One fact per line, and the checksum of all bytes before it. Raises ValueError for NaN and infinity.

    >>> print(sealed({"number": 12}).decode(), end="")
    {
    "number": 12,
    "checksum": "54aa2457b4a308af"
    }
    """
    lines = [f"{json.dumps(name)}: {json.dumps(fact, allow_nan=False)}" for name, fact in facts.items()]
    body = ("{\n" + ",\n".join(lines)).encode()
    return body + f',\n"checksum": "{checksum(body):016x}"\n}}\n'.encode()


def unsealed(raw: bytes) -> dict[str, Any]:
    """The facts. Raises `Damaged`.

    >>> unsealed(sealed({"number": 12}))
    {'number': 12}
    >>> unsealed(sealed({"number": 12}).replace(b"12", b"13"))
    Traceback (most recent call last):
      ...
    iterreduce.saving.sealing.Damaged: its bytes do not fit their checksum
    """
    end = _SEAL.search(raw, max(0, len(raw) - _SEAL_BYTES))
    if end is None:
        raise Damaged("its end is missing")
    if checksum(raw[: end.start()]) != int(end[1], 16):
        raise Damaged("its bytes do not fit their checksum")
    try:
        facts = json.loads(raw, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise Damaged(f"it is no valid JSON: {error}") from None
    if not isinstance(facts, dict):  # cannot be: it ends in a brace
        raise Damaged("it holds no facts")
    del facts["checksum"]
    return facts


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    facts = dict(pairs)
    if len(facts) < len(pairs):
        raise ValueError("a name stands there twice")
    return facts


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def read_sealed(path: str) -> dict[str, Any]:
    """The facts in a file. Raises `Damaged`, also for one that is missing, of another kind, or too large."""
    return unsealed(read_small(path))


def read_small(path: str) -> bytes:
    """The bytes of a regular file of at most `MOST_BYTES`. Raises `Damaged`."""
    handle = open_regular(path)
    try:
        length = os.fstat(handle).st_size
        if length > MOST_BYTES:
            raise Damaged(f"it has {length} bytes, more than any that is written")
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read(length)
    except OSError as error:
        raise Damaged(f"it cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)


def open_regular(path: str) -> int:
    """A descriptor to read from; of a file, never of a pipe, device or link. Raises `Damaged`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise Damaged("it is missing") from None
    except OSError as error:
        raise Damaged(f"it cannot be opened: {error.strerror}") from None
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise Damaged("it is no file")
