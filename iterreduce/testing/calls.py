"""Calls of the operating system that fail on purpose, for the whole process, while a context lasts.

Functions of Python's `os` get a stand-in: who calls ``os.pwrite`` by that name meets the fault. Python's own
file objects and HDF5 do not; for them there is the operating system's limit on file sizes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from iterreduce.testing.faults import CallFault, FailCall, FillDisk, LimitFileSize, os_error

_WRITES = ("write", "pwrite")
_patching = threading.RLock()


@contextlib.contextmanager
def failing(fault: CallFault) -> Iterator[None]:
    """These calls fail in here, on all threads."""
    if isinstance(fault, LimitFileSize):
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        yield  # until the process ends: it is no more than a process may set for itself
        return
    made = _failing_call(fault) if isinstance(fault, FailCall) else _full_disk(fault)
    with _in_place(made):
        yield


Patch = Callable[..., Any]


@contextlib.contextmanager
def _in_place(patches: dict[str, Callable[[Patch], Patch]]) -> Iterator[None]:
    """Each function of `os` replaced by what its maker makes of it."""
    with _patching:
        before = {name: getattr(os, name) for name in patches}
        for name, make in patches.items():
            setattr(os, name, make(before[name]))
    try:
        yield
    finally:
        with _patching:
            for name, function in before.items():
                setattr(os, name, function)


def _failing_call(fault: FailCall) -> dict[str, Callable[[Patch], Patch]]:
    counting, met = threading.Lock(), [0]

    def due() -> bool:
        with counting:
            met[0] += 1
            beyond = met[0] - fault.first
        return beyond >= 0 and (fault.times is None or beyond < fault.times)

    def make(original: Patch) -> Patch:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            paths = [path_of(target)]
            if fault.call in ("rename", "replace"):
                paths += [path_of(other) for other in args[:1]]
            if any(fnmatchcase(path, fault.path) for path in paths) and due():
                raise os_error(fault.error, paths[0])
            return original(target, *args, **kwargs)

        return call

    return {fault.call: make}


def _full_disk(fault: CallFault) -> dict[str, Callable[[Patch], Patch]]:
    assert isinstance(fault, FillDisk)
    disk = _Disk(fault)
    patches: dict[str, Callable[[Patch], Patch]] = {name: partial(disk.writing, name) for name in _WRITES}
    if hasattr(os, "posix_fallocate"):
        patches["posix_fallocate"] = disk.allocating
    if fault.told:
        patches |= dict.fromkeys(("statvfs", "fstatvfs"), disk.telling)
    return patches


class _Disk:
    """How much is left; what was written is never given back."""

    def __init__(self, fault: FillDisk):
        self.free, self.path = fault.free, fault.path
        self._counting = threading.Lock()

    def take(self, wanted: int, path: str) -> int:
        """So much of it may be written; none is left: ENOSPC."""
        with self._counting:
            got = min(wanted, self.free)
            self.free -= got
        if wanted and not got:
            raise os_error("ENOSPC", path)
        return got

    def writing(self, name: str, original: Patch) -> Patch:
        def call(fd: int, data: Any, *args: Any, **kwargs: Any) -> Any:
            path = path_of(fd)
            if not fnmatchcase(path, self.path):
                return original(fd, data, *args, **kwargs)
            view = memoryview(data).cast("B")
            return original(fd, view[: self.take(len(view), path)], *args, **kwargs)

        return call

    def allocating(self, original: Patch) -> Patch:
        def call(fd: int, offset: int, length: int) -> None:
            path = path_of(fd)
            if fnmatchcase(path, self.path) and length > self.free:
                raise os_error("ENOSPC", path)
            original(fd, offset, length)

        return call

    def telling(self, original: Patch) -> Patch:
        def call(target: Any) -> os.statvfs_result:
            found = original(target)
            blocks = self.free // found.f_frsize
            return os.statvfs_result((*found[:3], blocks, blocks, *found[5:]))

        return call


def path_of(target: Any) -> str:
    """The path of an argument: a path itself, or an open file's."""
    if not isinstance(target, int):
        return os.fsdecode(target)
    try:
        return os.readlink(f"/proc/self/fd/{target}")
    except OSError as error:
        return "" if error.errno == errno.ENOENT else f"fd {target}"
