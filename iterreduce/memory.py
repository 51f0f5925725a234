"""Who holds how many bytes: accounts by name, against a budget.

On Linux memory errors mostly kill, so what is held is counted, not caught. An account is made on demand, by a
walk over the objects that hold arrays: a hot path keeps no books, and nobody can forget to. An array that
several hold stands in the first account that meets it, with all the memory behind it: a view of one column
keeps the whole table.

Arrays that lie in files of the scratch directory (`iterreduce.columns.placement`) stand in accounts of their
own and count against no budget.

Nothing is allocated or freed here, and one rank's accounts say nothing about another's: agreement is the
engine's business. Memory that is no NumPy array (the interpreter, compiled code, buffers of MPI) is not seen.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

PACKAGE = __name__.partition(".")[0]
CONTAINERS = (list, tuple, set, frozenset, deque)
IN_SCRATCH = " in scratch"  # behind the name of an account

PAGE = 4096
HANDLER = "iterreduce"  # the name of NumPy's handler that may put arrays into files
#: In front of an array in a file, where its mapping begins: a magic word, bytes of the mapping, the array's
#: address.
HEADER_BYTES, MAGIC, KEY = 64, 0x49_74_65_72_52_65_64_75, 0x5C_A7_C4_5C_A7_C4_5C_A7


def filed_bytes(array: Any) -> int:
    """Bytes of the file that an array, the owner of its memory, lies in; 0 for one in memory."""
    at, name_of = array.__array_interface__["data"][0], np._core.multiarray.get_handler_name  # type: ignore[attr-defined]
    if at % PAGE != HEADER_BYTES or name_of(array) != HANDLER:
        return 0
    magic, nbytes, mark = (ctypes.c_int64 * 3).from_address(at - HEADER_BYTES)
    return nbytes if magic == MAGIC and mark == at ^ KEY else 0


class Accounts:
    """The accounts of one rank; sizes in bytes. Without a budget everything fits.

    >>> import numpy as np
    >>> column, accounts = np.zeros(100), Accounts()
    >>> accounts.count("first half", column[:50])
    >>> accounts.count("second half", [column[50:]])
    >>> accounts.report()
    {'first half': 800}

    >>> accounts = Accounts(1000)
    >>> accounts.set("input", 600)
    >>> accounts.fits(500), accounts.fits(400)
    (False, True)
    >>> accounts.set("input", 100)
    >>> accounts.total, accounts.report()
    (100, {'input': 100})
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.budget_bytes = budget_bytes
        self._held: dict[str, int] = {}
        self._filed: dict[str, int] = {}
        self._seen: dict[int, Any] = {}  # by id; held, so that no id comes twice
        self.total = 0
        self.peak = 0

    def set(self, name: str, nbytes: int) -> None:
        """The account `name` now holds `nbytes`; zero closes it."""
        self.total += nbytes - self._held.pop(name, 0)
        if nbytes:
            self._held[name] = nbytes
        self.peak = max(self.peak, self.total)

    def count(self, name: str, *things: Any) -> None:
        """All arrays that can be reached from these things, and stand in no account yet, join the account.

        The way leads through containers and through objects of this package, never into user code. What was
        met stays alive as long as the accounts do.
        """
        held = filed = 0
        for nbytes, in_file in _sizes(things, self._seen):
            held, filed = held + nbytes * (not in_file), filed + nbytes * in_file
        self.set(name, self.get(name) + held)
        if filed:
            self._filed[name] = self._filed.get(name, 0) + filed

    def leave_out(self, *things: Any) -> None:
        """No way leads through these things."""
        self._seen.update((id(thing), thing) for thing in things)

    def get(self, name: str) -> int:
        """Bytes that the account holds now; 0 if there is none of that name."""
        return self._held.get(name, 0)

    def fits(self, nbytes: int) -> bool:
        """Whether `nbytes` more stay within the budget."""
        return self.budget_bytes is None or self.total + nbytes <= self.budget_bytes

    def report(self) -> Mapping[str, int]:
        """Bytes by account, largest first; those of files under names of their own."""
        both = self._held | {name + IN_SCRATCH: nbytes for name, nbytes in self._filed.items()}
        return dict(sorted(both.items(), key=lambda item: (-item[1], item[0])))

    def in_memory(self) -> Mapping[str, int]:
        """Bytes by account, without those in files."""
        return self._held

    @property
    def filed(self) -> int:
        """Bytes in files of the scratch directory."""
        return sum(self._filed.values())


def _sizes(things: Iterable[Any], seen: dict[int, Any]) -> Iterator[tuple[int, bool]]:
    """Bytes of the memory behind each array that is reached, and whether it is a file; ``seen`` holds what
    was met before.
    """
    todo = list(things)
    while todo:
        thing = todo.pop()
        if isinstance(thing, np.ndarray):
            thing, nbytes, filed = _behind(thing)
        else:
            nbytes = 0
        if thing is None or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if nbytes:
            yield nbytes, filed
        elif isinstance(thing, Mapping):
            todo += thing.values()
        elif isinstance(thing, CONTAINERS):
            todo += thing
        elif type(thing).__module__.partition(".")[0] == PACKAGE:
            todo += _attributes(thing)


def _behind(array: Any) -> tuple[Any, int, bool]:
    """The object that owns an array's memory, its bytes, and whether they are in a file."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    if array.base is not None:
        return array.base, int(array.nbytes), False
    return array, int(array.nbytes), filed_bytes(array) > 0


def _attributes(thing: Any) -> list[Any]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    found = [getattr(thing, name, None) for name in slots if not name.startswith("__")]
    return found + list(getattr(thing, "__dict__", {}).values())


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident, in bytes.

    Linux' own counter is preferred: `getrusage` also counts what the launcher had before it became us.

    >>> peak_rss_bytes() > 1_000_000
    True
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
