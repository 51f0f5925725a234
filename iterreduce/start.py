"""What a process of the command line sets up before NumPy or Numba is loaded.

Threads of the linear algebra library are switched off: ranks, and our own threads (`iterreduce.cores` says
why), are the units of parallel work here. Compiled kernels get a directory of their own. Library use does
none of this: the host program's environment is its own.

Compiled kernels lie in a private directory of the node's own temporary directory, never in a home that many
nodes share, nor in the installation, which may be read-only. All ranks of a node use the same one: what is
not there yet is compiled by one of them while the others wait (`iterreduce.columns.jit`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from iterreduce.version import __version__

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CACHE_VARIABLE = "NUMBA_CACHE_DIR"
#: Open MPI asks its UCX part for windows, which complains on standard error where there is no such network.
OWN_DEFAULTS = {"OMPI_MCA_osc": "^ucx"}
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def prepare_environment(environment: MutableMapping[str, str] | None = None) -> None:
    """Set what NumPy, Numba and Open MPI read when they are loaded; a user's own values stay."""
    environment = os.environ if environment is None else environment
    for variable in THREAD_VARIABLES:
        environment.setdefault(variable, "1")
    for variable, value in OWN_DEFAULTS.items():
        environment.setdefault(variable, value)
    if not environment.get(CACHE_VARIABLE):
        environment[CACHE_VARIABLE] = str(cache_directory())


_joins: list[int] = []  # the name of this rank, if it takes the place of a lost one


def join_as(names: Sequence[int]) -> None:
    """This process is one of those that ranks have started for lost ones; each has one of these names."""
    _joins[:] = [names[launched_rank()]]


def joins() -> bool:
    """Was this process started by ranks?"""
    return bool(_joins)


def launched_rank() -> int:
    """The rank that the launcher gave this process, without starting MPI; 0 when there is no launcher.

    A hint for who speaks first: only MPI knows the rank.
    """
    if _joins:
        return _joins[0]
    for variable in _RANK_VARIABLES:
        text = os.environ.get(variable, "")
        if text.isdigit():
            return int(text)
    return 0


def cache_directory(parent: Path | None = None) -> Path:
    """A directory for compiled kernels that nobody else can put code into."""
    path = (parent or Path(tempfile.gettempdir())) / f"iterreduce-numba-{os.getuid()}-{_installation()}"
    try:
        _own_directory(path)
        return path
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
