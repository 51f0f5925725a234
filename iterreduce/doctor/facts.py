"""What one process sees of its node, as data that travels as JSON. No MPI, and nothing is judged.

Nothing here may hang for long: what asks another program has a time limit. A fact that cannot be had is None
or missing. What is the same for all ranks of a node is looked at by the first of them only.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterreduce.collectives import launched_size, node_ranks
from iterreduce.start import CACHE_VARIABLE, THREAD_VARIABLES, cache_directory, launched_rank
from iterreduce.supervising.processes import SHARED, left_behind
from iterreduce.version import __version__

ASK_SECONDS = 20.0
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_NTASKS",
    "SLURM_NNODES",
    "SLURM_CPUS_PER_TASK",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_RESTART_COUNT",
)
_LOOKED_AT = (*THREAD_VARIABLES, "ITERREDUCE_THREADS", "ITERREDUCE_NO_SKIPS", *_SLURM)


@dataclass(frozen=True)
class Place:
    """A directory: its path, the kind of its file system, and bytes that are free there."""

    path: str
    kind: str
    free: int | None
    writable: bool
    made_in: str | None = None  # the nearest directory that is there, if it is not


@dataclass(frozen=True)
class Facts:
    """Of one rank and its node."""

    host: str
    rank: int
    launched: int | None
    ranks_here: int | None
    first_here: bool
    software: Mapping[str, str]
    cores: Sequence[int]
    quota: float | None  # cores that the control group grants
    variables: Mapping[str, str]
    shared: Mapping[str, Any] = field(default_factory=dict)  # /dev/shm: total, free, left
    cache: Mapping[str, Any] = field(default_factory=dict)  # compiled kernels: a Place, files, own
    hdf5: str | None = None  # its version, or "cannot ...: why"
    slurm: Mapping[str, Any] = field(default_factory=dict)  # version, types of srun
    directory: Mapping[str, Any] = field(default_factory=dict)  # of checkpoints: a Place


def gather(directory: str | None, cache_is_ours: bool = False) -> Facts:
    """Of this process. `cache_is_ours`: the variable of the cache was not the user's."""
    first = is_first()
    return Facts(
        host=socket.gethostname(),
        rank=launched_rank(),
        launched=launched_size(),
        ranks_here=node_ranks(),
        first_here=first,
        software=_software(),
        cores=sorted(os.sched_getaffinity(0)),
        quota=quota(),
        variables={name: os.environ[name] for name in _LOOKED_AT if name in os.environ},
        shared=_shared() if first else {},
        cache=_cache(cache_is_ours) if first else {},
        hdf5=_hdf5() if first else None,
        slurm=_slurm() if first else {},
        directory=vars(place(directory)) if first and directory is not None else {},
    )


def is_first() -> bool:
    """Whether this is the first rank of its node, as far as the launcher tells."""
    found = (os.environ[name] for name in _LOCAL_RANKS if os.environ.get(name, "").isdigit())
    return int(next(found, "0")) == 0


def place(path: str) -> Place:
    """Of a directory that may not be there yet: that of its nearest parent."""
    there = Path(path).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(there).free
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    made_in = None if there == Path(path).absolute() else str(there)
    return Place(path, file_system(str(there)), free, writable, made_in)


def file_system(path: str, mounts: str = "/proc/self/mounts") -> str:
    """Its kind: that of the last mount that holds the path."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError), open(mounts, encoding="utf-8", errors="replace") as file:
        for line in file:
            _, where, what, *_ = line.split()
            where = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), where)
            inside = (
                os.path.realpath(path).startswith(where.rstrip("/") + "/") or os.path.realpath(path) == where
            )
            if inside and len(where) >= len(best):
                best, kind = where, what
    return kind


def quota(root: str = "/sys/fs/cgroup") -> float | None:
    """Cores that this control group, or one around it, grants; None without a limit."""
    granted = math.inf
    for path in _groups(root):
        with contextlib.suppress(OSError, ValueError):
            most, period = (path / "cpu.max").read_text().split()
            granted = min(granted, int(most) / int(period))
        with contextlib.suppress(OSError, ValueError):
            allowed = int((path / "cpu.cfs_quota_us").read_text())
            if allowed > 0:
                granted = min(granted, allowed / int((path / "cpu.cfs_period_us").read_text()))
    return None if math.isinf(granted) else granted


def _groups(root: str) -> list[Path]:
    found = [Path(root), Path(root) / "cpu"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, name = line.split(":", 2)
            base = Path(root) / "cpu" if "cpu" in kinds.split(",") else Path(root)
            inner = base / name.strip("/")
            found += [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
    return found


def _software() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"iterreduce": __version__, "Python": platform.python_version(), "interpreter": sys.executable}
    for name in ("numpy", "numba", "mpi4py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _shared() -> dict[str, Any]:
    try:
        usage = shutil.disk_usage(SHARED)
    except OSError:
        return {"total": 0, "free": 0, "left": []}
    return {"total": usage.total, "free": usage.free, "left": left_behind()}


def _cache(is_ours: bool) -> dict[str, Any]:
    path = str(cache_directory()) if is_ours else os.environ.get(CACHE_VARIABLE) or str(cache_directory())
    compiled = sum(len(files) for _, _, files in os.walk(path))
    return {**vars(place(path)), "files": compiled, "own": is_ours, "temporary": tempfile.gettempdir()}


def _hdf5() -> str:
    """In a process of its own: a library that does not fit may crash."""
    told = ask(sys.executable, "-c", "import h5py; print(h5py.version.hdf5_version)")
    return told.splitlines()[-1] if told else "cannot be loaded"


def _slurm() -> dict[str, Any]:
    if shutil.which("srun") is None:
        return {}
    types = [line.strip() for line in ask("srun", "--mpi=list", errors=True).splitlines()]
    return {"version": ask("srun", "--version").strip(), "types": [name for name in types if " " not in name]}


def ask(*words: str, errors: bool = False) -> str:
    """What a program writes; nothing where it fails or does not end in time."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=ASK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
