"""Processes and shared memory of this machine: who lives, who belongs to a job, what a killed job left.

A process is known by its number and the time of its start, because numbers are used again. Nothing here is
touched that is not this user's, and no process that does not carry the job's own mark.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import signal
import socket
import time
from collections.abc import Iterator

SHARED = "/dev/shm"
#: Segments of MPICH, Open MPI and of what they use below.
SEGMENTS = ("mpich_*", "sm_segment.*", "osc_sm*", "vader_segment.*", "psm*_shm*", "ucx_shm_*")
_PR_SET_PDEATHSIG = 1


def machine() -> str:
    """What processes that see each other's numbers have in common."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def start_of(pid: int) -> str:
    """When the process began, in ticks since the machine did; nothing when it is gone or a zombie."""
    with contextlib.suppress(OSError, IndexError):
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        if words[0] not in (b"Z", b"X"):
            return words[19].decode()
    return ""


def is_alive(pid: int, start: str) -> bool:
    """Whether this very process lives."""
    return bool(start) and start_of(pid) == start


def die_with_parent() -> None:
    """SIGKILL this process when the one that started it ends, however; where Linux can."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def handle_of(pid: int) -> int | None:
    """A file that can be read when the process ends; None where the system has none.

    Raises ProcessLookupError when it has ended.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None


def send(pid: int, start: str, number: int) -> bool:
    """Send a signal to this very process; whether it was there."""
    handle = None
    try:
        handle = handle_of(pid)  # first: then the number cannot be used again
        if not is_alive(pid, start):
            return False
        if handle is None:
            os.kill(pid, number)
        else:
            signal.pidfd_send_signal(handle, number)
        return True
    except OSError:
        return False
    finally:
        if handle is not None:
            os.close(handle)


def kill_group(pid: int, start: str) -> None:
    """Kill this very process, and those of its group if it leads one."""
    with contextlib.suppress(OSError):
        if is_alive(pid, start) and os.getpgid(pid) == pid != os.getpgrp():
            os.killpg(pid, signal.SIGKILL)
    send(pid, start, signal.SIGKILL)


def marked(mark: bytes) -> Iterator[int]:
    """This user's processes whose environment began with the mark in it."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read():
                    yield int(name)


def is_newcomer(pid: int) -> bool:
    """Whether this process is to take a lost rank's place (`iterreduce.survival`)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"\0join\0" in file.read()
    return False


def kill_marked(mark: bytes, patience_seconds: float = 5.0) -> None:
    """Kill them until none is left."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        left = [(pid, start) for pid in marked(mark) if (start := start_of(pid))]
        if not left:
            return
        for pid, start in left:
            send(pid, start, signal.SIGKILL)
        time.sleep(0.02)


def sweep(since: float, folder: str = SHARED) -> list[str]:
    """Remove MPI's shared memory that came up since then (Unix time), is this user's, and that no process has
    mapped; the names that went.
    """
    gone = []
    for path in _unmapped(folder, since):
        with contextlib.suppress(OSError):
            os.unlink(path)
            gone.append(os.path.basename(path))
    return gone


def left_behind(folder: str = SHARED) -> list[str]:
    """The names of this user's shared memory of MPI that no process has mapped."""
    return [os.path.basename(path) for path in _unmapped(folder, 0.0)]


def _unmapped(folder: str, since: float) -> list[str]:
    """Another job may have made a segment this moment and not mapped it yet: looked at twice."""
    left = set(_segments(folder, since))
    for look in range(2):
        if left:
            time.sleep(0.1 * look)
            mapped = b"\0".join(_maps())
            left = {path for path in left if os.fsencode(path) not in mapped}
    return sorted(left)


def _segments(folder: str, since: float) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if any(fnmatch.fnmatch(entry.name, pattern) for pattern in SEGMENTS):
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if found.st_uid == os.getuid() and found.st_ctime >= since:
                        yield entry.path


def _maps() -> Iterator[bytes]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/maps", "rb") as file:
                yield file.read()
