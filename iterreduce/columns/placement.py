"""Where arrays lie: in memory as long as a budget has room, else in files of a scratch directory.

NumPy asks a *handler* for the memory of every array (NEP 49). A `Placement` is such a handler: small arrays,
and large ones while there is room, get memory as ever; the others get a file of the scratch directory that
has no name, mapped into memory. The kernel writes its pages back and drops them when memory is short, and
reads them again when they are touched; for whoever holds the array it is an array. So what does not fit, in
the engine and in user code, temporaries included, is in files, and no code has to know.

    with placement:          this thread's arrays are placed by it
    with placement.kept():   ... all in memory: small working sets that are read in no order
    with placement.filed():  ... all in files: what is written and read from front to back

Which array lies where is a rank's own business: no result, and no collective, depends on it. Files are
unlinked before anything stands in them, and their space is allocated before they are mapped: nothing is left
behind, however a process ends, and a full disk is an error and never a signal (`failure` says which).

How it can go wrong: pages of files that are touched in no order are slow once memory is short, which is why
what is large is worked on in ranges of its keys (`iterreduce.columns.ranges`). What others allocate (pyarrow,
MPI, compiled loops) is not seen. Linux only. The handler is compiled code (`iterreduce.columns.handler`),
loaded with the first placement.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from iterreduce.columns.placewords import (
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
    WORDS,
)
from iterreduce.errors import ScratchError
from iterreduce.memory import HANDLER, PAGE, filed_bytes
from iterreduce.options import format_size

MOST_LEAST = 1 << 20  # a mapped file costs some 20 us: arrays from this size on are worth one
LEAST_LEAST = 2 * PAGE


class _Handler(ctypes.Structure):
    """`PyDataMem_Handler` of NumPy's C API, version 1."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        *((field, ctypes.c_void_p) for field in ("ctx", "malloc", "calloc", "realloc", "free")),
    )


SET_HANDLER = 304  # the place of `PyDataMem_SetHandler` in NumPy's C API, since 1.22
_CAPSULE = ctypes.create_string_buffer(b"mem_handler")


def _set_handler() -> Any:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    api = pointer(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]
    table = (ctypes.c_void_p * (SET_HANDLER + 1)).from_address(api)
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[SET_HANDLER] or 0)


class _Native:
    """What there is once in a process: the compiled functions, and NumPy's door."""

    _made: _Native | None = None
    _making = threading.Lock()  # ranks may be threads: were there two, what one keeps would go with it

    def __init__(self) -> None:
        from iterreduce.columns.handler import functions

        self.malloc, self.calloc, self.realloc, self.free = functions()
        self.set = _set_handler()
        self.kept: list[Any] = []  # arrays may outlive the placement that placed them, and need its words

    @classmethod
    def get(cls) -> _Native:
        with cls._making:
            if cls._made is None:
                cls._made = cls()
            return cls._made


class Placement:
    """Places the arrays of one rank; ``directory`` is on the node's own disk, best.

    Raises `ScratchError` where no file can be made there. One thread at a time enters it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     place = Placement(directory, budget_bytes=1 << 20)
    ...     with place:
    ...         small, large = np.zeros(1 << 10), np.zeros(1 << 20)
    ...     large[-1] = 7
    ...     filed_bytes(small), filed_bytes(large) >= 8 << 20, float(large.sum())
    (0, True, 7.0)
    """

    def __init__(self, directory: str, budget_bytes: int, rank: int = 0):
        if not sys.platform.startswith("linux"):
            raise ScratchError("arrays are placed in files on Linux only: give --scratch none")
        self.directory, self.budget_bytes, self.rank = directory, budget_bytes, rank
        self.working_bytes = max(LEAST_LEAST, budget_bytes // 4)
        self._before: list[Any] = []
        native = self._native = _Native.get()
        flags, path, digits = _way_in(directory, rank)
        self._path = ctypes.create_string_buffer(path)
        words = self._words = (ctypes.c_int64 * WORDS)()
        self._put(LEAST, min(MOST_LEAST, max(LEAST_LEAST, budget_bytes // 256)))
        self._put(LARGE, max(LEAST_LEAST, budget_bytes // 16))
        self._put(MOST, budget_bytes - budget_bytes // 8)
        self._put(RESERVE, budget_bytes)
        self._put(MOST_LARGE, budget_bytes // 2)
        self._put(FLAGS, flags)
        self._put(PATH, ctypes.addressof(self._path))
        self._put(DIGITS, digits)
        handler = _Handler(HANDLER.encode(), 1, ctypes.addressof(words))
        for name in ("malloc", "calloc", "realloc", "free"):
            setattr(handler, name, getattr(native, name))
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._capsule = make(ctypes.addressof(handler), ctypes.addressof(_CAPSULE), None)
        native.kept.append((words, handler, self._path))
        self._prove()

    def _prove(self) -> None:
        """NumPy's private parts are as this module knows them, and the directory has room for a file."""
        large = self._get(LARGE)
        self._put(LARGE, 0)  # what gets no file lies nowhere
        try:
            with self, self.filed():
                array = np.zeros(self._get(LEAST), np.uint8)
        except MemoryError as error:
            raise ScratchError(self.failure() or str(error)) from None
        finally:
            self._put(LARGE, large)
        if not filed_bytes(array):
            raise ScratchError(f"NumPy {np.__version__} places arrays by itself: give --scratch none")
        del array
        self._put(FILED_EVER, 0)
        self._put(FILED_PEAK, 0)

    def _get(self, word: int) -> int:
        return int(self._words[word // 8])

    def _put(self, word: int, value: int) -> None:
        self._words[word // 8] = value

    def __enter__(self) -> Placement:
        self._before.append((self._native.set(self._capsule), getattr(_here, "placement", None)))
        _here.placement = self
        return self

    def __exit__(self, *error: object) -> None:
        handler, _here.placement = self._before.pop()
        self._native.set(handler)

    @contextlib.contextmanager
    def _forced(self, force: int) -> Iterator[None]:
        before = self._get(FORCE)
        self._put(FORCE, force)
        try:
            yield
        finally:
            self._put(FORCE, before)

    def kept(self) -> contextlib.AbstractContextManager[None]:
        """New arrays lie in memory, whatever the budget: working sets, of at most ``working_bytes``."""
        return self._forced(-1)

    def filed(self) -> contextlib.AbstractContextManager[None]:
        """New arrays lie in files."""
        return self._forced(1)

    @property
    def held_bytes(self) -> int:
        """Bytes of arrays in memory, without small ones."""
        return self._get(HELD)

    @property
    def filed_bytes(self) -> int:
        """Bytes in files."""
        return self._get(FILED)

    def report(self) -> dict[str, int]:
        """Bytes: the most that ever lay in memory and in files, and all that was ever put into files."""
        return {
            "memory_peak": self._get(HELD_PEAK),
            "peak": self._get(FILED_PEAK),
            "total": self._get(FILED_EVER),
        }

    def free_bytes(self) -> int:
        """Room in the scratch directory."""
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def failure(self) -> str:
        """Why the last file could not be made, in words, once; "" if there is nothing to say."""
        error, wanted = self._get(ERROR), self._get(WANTED)
        self._put(ERROR, 0)
        return _words_of(self.directory, self.rank, error, wanted) if error else ""


_here = threading.local()


def current() -> Placement | None:
    """The placement of this thread's arrays; None where NumPy places them."""
    found: Placement | None = getattr(_here, "placement", None)
    return found


def needed(words: int) -> np.ndarray[Any, Any]:
    """Zeros, int64, where a rank must not fail alone: in memory, if the scratch directory has no room."""
    try:
        return np.zeros(words, np.int64)
    except MemoryError:
        place = current()
        if place is None:
            raise
        place.failure()  # nobody has to hear of it
        with place.kept():
            return np.zeros(words, np.int64)


def explained(error: BaseException) -> BaseException:
    """The same error, or a `ScratchError` where an array found no room in the scratch directory."""
    place = current()
    if place is None or not isinstance(error, MemoryError):
        return error
    text = place.failure()
    return ScratchError(text) if text else error


def _words_of(directory: str, rank: int, error: int, wanted: int) -> str:
    try:
        found = os.statvfs(directory)
        free = f"{format_size(found.f_bavail * found.f_frsize)} are free there"
    except OSError as gone:
        free = f"{gone.strerror}"
    limit = {
        errno.EFBIG: " (the limit of this process on the size of a file, ulimit -f)",
        errno.ENOMEM: " (has this process too many arrays in files? The limit is vm.max_map_count)",
    }.get(error, "")
    return (
        f"rank {rank} cannot put {format_size(wanted)} into the scratch directory {directory}: "
        f"{os.strerror(error).lower()}{limit}; {free}; name a directory with more room (--scratch), "
        "use more ranks on more nodes, or give a larger --memory"
    )


def _way_in(directory: str, rank: int) -> tuple[int, bytes, int]:
    """How to open a file there: flags, path, and where in the path digits stand (0: it needs no name)."""
    flags = os.O_RDWR | os.O_CLOEXEC
    unnamed = flags | os.O_TMPFILE | os.O_EXCL
    try:
        try:
            os.close(os.open(directory, unnamed, 0o600))
            return unnamed, os.fsencode(directory), 0
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        front = os.fsencode(
            os.path.join(directory, f".iterreduce-{os.getpid()}-{rank}-{os.urandom(6).hex()}-")
        )
        path, named = front + b"0" * 16, flags | os.O_CREAT | os.O_EXCL
        os.close(os.open(path, named, 0o600))
        os.unlink(path)
        return named, path, len(front)
    except OSError as error:
        raise ScratchError(
            f"rank {rank} cannot use the scratch directory {directory}: {(error.strerror or '').lower()}; "
            "name a directory of this node that can be written to (--scratch); with none, what does not fit "
            "--memory is an error"
        ) from None
