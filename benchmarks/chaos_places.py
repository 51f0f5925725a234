"""Where the runs of `chaos` are: ranks on this machine, or on hosts that are network namespaces of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chaos_plan import Attempt  # noqa: E402
from tests.hosts.network import HEAD, Network, mpirun_on, why_not  # noqa: E402
from tests.launch import RUN_VARIABLE, is_open_mpi, mpirun_command, mpirun_environment, mpirun_path  # noqa: E402

PROGRAM = [b"-m", b"iterreduce"]
TOLERANT = ("--with-ft", "ulfm")
#: What ranks on other hosts need of the environment; MPICH hands on all of it.
FAULTS = "ITERREDUCE_TEST_FAULTS"
HANDED_ON = (
    FAULTS,
    RUN_VARIABLE,
    "PYTHONFAULTHANDLER",
    "PYTHONPATH",
    "ITERREDUCE_RECOVER_TIMEOUT",
    "ITERREDUCE_START_TIMEOUT",
)


class Here:
    """This machine."""

    def command(self, ranks: int, words: Sequence[str], tolerant: bool) -> list[str]:
        """Ranks by the launcher alone."""
        return mpirun_command(ranks, *words, options=TOLERANT if tolerant else ())

    def supervised(self, ranks: int, words: Sequence[str]) -> list[str]:
        """The same words below the supervisor; ``words`` begin with ``-m iterreduce``."""
        return [sys.executable, *words[:2], "run", "-n", str(ranks), "--retries", "9", *words[2:]]

    def start(
        self, command: Sequence[str], env: Mapping[str, str], run: str, said: IO[bytes], attempt: Attempt
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=ROOT,
            env=mpirun_environment(env, run), start_new_session=True,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Of one that hangs the ranks are gone."""
        process.wait()

    def done(self) -> list[str]:
        """What this place itself did to the last attempt."""
        return []

    def lose(self, number: int) -> None:
        raise AssertionError("this machine is not to be lost")

    def clear(self) -> None:
        """What launchers left."""

    def close(self) -> None:
        """Nothing is left of it."""


class Hosts(Here):
    """Hosts of their own, for one run: some may be lost, and the attempts that follow have the others."""

    def __init__(self, hosts: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chaos-hosts-")
        self.network = Network(Path(self._folder.name), hosts)
        self.network.__enter__()
        self.living = list(self.network.names)

    def _layout(self, ranks: int) -> dict[str, int]:
        """As evenly as it goes; hosts without a rank are left out."""
        hosts, count = self.living, len(self.living)
        shares = {host: (ranks + count - 1 - at) // count for at, host in enumerate(hosts)}
        return {host: share for host, share in shares.items() if share}

    def command(self, ranks: int, words: Sequence[str], tolerant: bool) -> list[str]:
        command = mpirun_on(self._layout(ranks), *words)
        return [command[0], *self._options(), *(TOLERANT if tolerant else ()), *command[1:]]

    def _options(self) -> list[str]:
        return [word for name in HANDED_ON for word in ("-x", name)] if is_open_mpi() else []

    def supervised(self, ranks: int, words: Sequence[str]) -> list[str]:
        slots = max(2, -(-ranks // len(self.living)))
        hosts = ",".join(f"{host}:{slots}" for host in self.living)
        launcher = "--launcher", " ".join([mpirun_path(), *self._options()])
        command = super().supervised(ranks, words)
        return [*command[:4], "--host", hosts, *launcher, *command[4:]]

    def start(
        self, command: Sequence[str], env: Mapping[str, str], run: str, said: IO[bytes], attempt: Attempt
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.network.on_head(command), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            env=self.network.environment({**env, RUN_VARIABLE: run}), start_new_session=True,
        )  # fmt: skip

    def lose(self, number: int) -> None:
        """One of those that live, unless it is the last."""
        if len(self.living) > 1:
            self.network.lose(self.living.pop(number % len(self.living)))

    def clear(self) -> None:
        """Daemons, and ranks that have lost theirs."""
        for name in (HEAD, *self.living):
            for pid in self.network.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.network.__exit__()
        self._folder.cleanup()


def processes_of(run: str) -> Iterator[tuple[int, list[bytes], dict[bytes, bytes]]]:
    """The Pythons of a run that are or may be ranks: pid, words, environment. On all hosts."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                environment = dict(
                    word.partition(b"=")[::2] for word in (entry / "environ").read_bytes().split(b"\0")
                )
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if environment.get(RUN_VARIABLE.encode()) == run.encode() and words[1:3] == PROGRAM:
                    yield int(entry.name), words, environment


def ranks_of(run: str) -> dict[int, int]:
    """rank -> pid; those that came for others are not among them."""
    return ranks_among(processes_of(run))


def ranks_among(processes: Iterable[tuple[int, list[bytes], dict[bytes, bytes]]]) -> dict[int, int]:
    """rank -> pid"""
    found: dict[int, int] = {}
    for pid, words, environment in processes:
        if words[3] not in (b"run", b"join", b"doctor", b"submit"):
            ranks = filter(None, map(environment.get, (b"PMI_RANK", b"OMPI_COMM_WORLD_RANK", b"PMIX_RANK")))
            found.setdefault(int(next(ranks, b"0")), pid)
    return found


def newcomers_of(run: str) -> list[int]:
    """The processes that came for lost ranks."""
    return [pid for pid, words, _ in processes_of(run) if words[3] == b"join"]


def place(hosts: int) -> Here:
    """For one run. Raises SystemExit where this machine cannot have hosts."""
    if not hosts:
        return Here()
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    return Hosts(hosts)
