"""Where the runs of `chaos` are: ranks on this machine, or on hosts that are network namespaces of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.hosts.network import HEAD, Network, mpirun_on, why_not  # noqa: E402
from tests.launch import RUN_VARIABLE, is_open_mpi, mpirun_command, mpirun_environment, mpirun_path  # noqa: E402

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
        self, command: Sequence[str], env: Mapping[str, str], run: str, said: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=ROOT,
            env=mpirun_environment(env, run), start_new_session=True,
        )  # fmt: skip

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
        self, command: Sequence[str], env: Mapping[str, str], run: str, said: IO[bytes]
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


def place(hosts: int) -> Here:
    """For one run. Raises SystemExit where this machine cannot have hosts."""
    if not hosts:
        return Here()
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    return Hosts(hosts)
