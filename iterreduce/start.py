"""What a process of the command line sets up before NumPy or Numba is loaded.

Threads of the linear algebra library are switched off: ranks are the unit of parallel work here. Compiled
kernels get a directory of their own. Library use does none of this: the host program's environment is its
own.

Numba's file cache is not safe against two processes that write the same index: each numbers its files by the
index that it read, so one can overwrite a file that the other's index names, and the wrong machine code is
loaded. So each process takes a *slot* that no other process holds, by a lock that the kernel drops when the
process ends. Slots lie in the node's temporary directory, never in a home that many nodes share. A slot that
is new or out of date is filled from a snapshot of the first one: after one run, no rank compiles again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from iterreduce.version import __version__

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CACHE_VARIABLE = "NUMBA_CACHE_DIR"
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
_MOST_SLOTS = 4096

_held_locks: list[int] = []


def prepare_environment(environment: MutableMapping[str, str] | None = None) -> None:
    """Set what NumPy and Numba read when they are loaded; a user's own values stay."""
    environment = os.environ if environment is None else environment
    for variable in THREAD_VARIABLES:
        environment.setdefault(variable, "1")
    if not environment.get(CACHE_VARIABLE):
        environment[CACHE_VARIABLE] = str(take_cache_slot())


def launched_rank() -> int:
    """The rank that the launcher gave this process, without starting MPI; 0 when there is no launcher.

    A hint for who speaks first: only MPI knows the rank.
    """
    for variable in _RANK_VARIABLES:
        text = os.environ.get(variable, "")
        if text.isdigit():
            return int(text)
    return 0


def take_cache_slot(parent: Path | None = None) -> Path:
    """A directory for compiled kernels that this process alone uses until it ends."""
    base = (parent or Path(tempfile.gettempdir())) / f"iterreduce-numba-{os.getuid()}-{_installation()}"
    try:
        _own_directory(base)
        return _lock_a_slot(base)
    except OSError:
        # A full or forbidden temporary directory, or somebody else's: compile in a fresh one, or fail loudly.
        return Path(tempfile.mkdtemp(prefix="iterreduce-numba-"))


def _installation() -> str:
    """Ten hex digits for what the compiled code depends on, beside what Numba itself compares."""
    parts = (__version__, sys.version, sys.prefix, str(Path(__file__).resolve().parent))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def _own_directory(path: Path) -> None:
    """Make it, or check that nobody else can put code there."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(path)


def _lock_a_slot(base: Path) -> Path:
    import fcntl

    for number in range(_MOST_SLOTS):
        lock = os.open(base / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        _held_locks.append(lock)
        return _open_slot(base, number)
    raise FileNotFoundError(f"all {_MOST_SLOTS} slots of {base} are taken")


def _open_slot(base: Path, number: int) -> Path:
    slot = base / str(number)
    if number == 0:
        slot.mkdir(exist_ok=True)
        import atexit

        atexit.register(_publish, base, os.getpid())
    elif not slot.exists() or _newest(slot) < _newest(base / "snapshot"):
        _fill(slot, base / "snapshot")
    return slot


def _newest(directory: Path) -> int:
    """When the last kernel was saved there; 0 for none."""
    return max((path.stat().st_mtime_ns for path in directory.rglob("*.nbi")), default=0)


def _fill(slot: Path, snapshot: Path) -> None:
    """Copy the snapshot; what cannot be copied is compiled again."""
    draft = slot.with_name(f"{slot.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        shutil.copytree(snapshot.resolve(strict=True), draft)
        shutil.rmtree(slot, ignore_errors=True)
        draft.rename(slot)
    except (OSError, shutil.Error):
        shutil.rmtree(draft, ignore_errors=True)
        slot.mkdir(exist_ok=True)


def _publish(base: Path, owner: int) -> None:
    """At the end of the process that holds slot 0: leave a snapshot when there is something new in it."""
    if os.getpid() != owner:
        return
    slot, link = base / "0", base / "snapshot"
    with contextlib.suppress(OSError, shutil.Error):
        newest = _newest(slot)
        old = link.resolve() if link.is_symlink() else None
        if not newest or (old is not None and old.name == f"snapshot-{newest}"):
            return
        fresh = base / f"snapshot-{newest}"
        shutil.copytree(slot, fresh, dirs_exist_ok=True)
        draft = base / "snapshot.draft"
        draft.unlink(missing_ok=True)
        draft.symlink_to(fresh.name)
        draft.replace(link)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
