"""Several hosts on one machine: network namespaces around a bridge, for tests that need more than one node.

A host has its own network, host name, processes, shared memory and ``/var/tmp``; other files are the
machine's, as on a file system that all hosts share. Shared memory works within a host and TCP between hosts,
and a host can be cut off, lost, and counted at its interface. From the host ``head``, which has no ranks,
launchers start processes elsewhere through `AGENT`, where clusters have ssh; as through ssh, the environment
does not come along. A host has one core, which it may share with others: so ranks know that they are crowded.

Nothing of it has a name outside: the bridge stands in a namespace too, so networks of several test runs do
not meet, and all of it is gone when the process that made it ends, however.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from iterreduce.supervising.processes import die_with_parent
from tests.launch import ROOT, mpirun_environment, mpirun_path

SUBNET = "10.99.0"
HEAD = "head"
_TOOLS = ("ip", "unshare", "nsenter", "taskset")
#: What a login shell on a host has; kernels are compiled once for all tests.
_LOGIN = ("PATH", "HOME", "LANG", "NUMBA_CACHE_DIR", "PYTHONPYCACHEPREFIX")
#: Like ssh: options, host, words for the host's shell. A host that is gone is found out after a while.
AGENT = """#!/bin/sh
while :; do case $1 in -l|-p|-o) shift 2;; -*) shift;; *) break;; esac; done
host=$1; shift
read -r pid core < "{folder}/$host" && kill -0 "$pid" 2>/dev/null || {{
    sleep 1; echo "connect to host $host: No route to host" >&2; exit 255; }}
exec nsenter -t "$pid" -m -u -i -n -p -- \\
    env -i TMPDIR=/var/tmp {login} taskset -c "$core" sh -c "cd $HOME && $*"
"""
_SET_UP = """set -e
hostname "$0"
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /var/tmp
mount --bind "$1" /etc/hosts
exec sleep infinity
"""


def why_not() -> str | None:
    """Why this machine cannot have hosts; None where it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"hosts are made with {', '.join(missing)}: apt-get install iproute2 util-linux"
    try:
        made = subprocess.run(
            ["unshare", "-n", "-m", "-p", "-f", "true"], capture_output=True, text=True, timeout=10
        )
    except subprocess.TimeoutExpired:
        return "making a network namespace takes for ever here"
    return (
        f"hosts are network namespaces, which takes root: {made.stderr.strip()}" if made.returncode else None
    )


class Network:
    """Hosts ``h1`` to ``hN`` and `HEAD`; a context manager."""

    def __init__(self, folder: Path, hosts: int) -> None:
        self.folder = folder
        self.names = [f"h{i + 1}" for i in range(hosts)]
        self.agent = folder / "agent"
        self._keepers: list[subprocess.Popen[bytes]] = []
        self._pids: dict[str, int] = {}

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if HEAD in self._pids:  # the others' processes end with their first
            for pid in self.processes(HEAD):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for keeper in self._keepers:
            keeper.kill()
        for keeper in self._keepers:
            keeper.wait()

    def _make(self) -> None:
        login = " ".join(f"'{name}={os.environ[name]}'" for name in _LOGIN if name in os.environ)
        self.agent.write_text(AGENT.format(folder=self.folder, login=login))
        self.agent.chmod(0o755)
        every = [HEAD, *self.names]
        lines = [f"{SUBNET}.{number} {name}" for number, name in enumerate(every, 1)]
        known = self.folder / "hosts"
        known.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._switch = self._keep(["unshare", "-n", "sleep", "infinity"])
        new = ["unshare", "-n", "-u", "-i", "-m"]
        for name in every:
            own = [] if name == HEAD else ["-p", "-f", "--mount-proc", "--kill-child"]
            keeper = self._keep([*new, *own, "sh", "-c", _SET_UP, name, str(known)])
            self._pids[name] = _child_of(keeper) if own else keeper
        self._ip(self._switch, "link add bridge type bridge", "link set bridge up")
        cores = sorted(os.sched_getaffinity(0))
        for number, name in enumerate(every, 1):
            self._ip(
                self._switch,
                f"link add {name} type veth peer name eth0 netns {self._pids[name]}",
                f"link set {name} master bridge up",
            )
            self._ip(self._pids[name], f"addr add {SUBNET}.{number}/24 dev eth0", "link set eth0 up")
            (self.folder / name).write_text(f"{self._pids[name]} {cores[number % len(cores)]}\n")
        _wait(lambda: all(self._is_up(name) for name in every), "the hosts' interfaces")

    def _keep(self, words: Sequence[str]) -> int:
        """A process that a namespace lives by."""
        with open(self.folder / "keepers.log", "a") as log:
            keeper = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=log, preexec_fn=die_with_parent)
        self._keepers.append(keeper)
        ours = os.readlink("/proc/self/ns/net")
        _wait(
            lambda: keeper.poll() is not None or os.readlink(f"/proc/{keeper.pid}/ns/net") != ours,
            "a namespace",
        )
        assert keeper.poll() is None, f"{words} ended: {(self.folder / 'keepers.log').read_text()}"
        return keeper.pid

    def _ip(self, pid: int, *commands: str) -> None:
        text = "".join(f"{command}\n" for command in commands)
        words = ["nsenter", "-t", str(pid), "-n", "ip", "-batch", "-"]
        subprocess.run(words, input=text, text=True, check=True, timeout=20)

    def _is_up(self, name: str) -> bool:
        told = Path(f"/proc/{self._pids[name]}/net/route").read_text()
        return "eth0" in told and self._mounted(name)

    def _mounted(self, name: str) -> bool:
        """Its first process has set everything up: it sleeps."""
        return Path(f"/proc/{self._pids[name]}/comm").read_text() == "sleep\n"

    # -- what happens to hosts

    def cut(self, name: str) -> None:
        """Nothing comes through its cable any more."""
        self._ip(self._switch, f"link set {name} down")

    def mend(self, name: str) -> None:
        """The cable is in again."""
        self._ip(self._switch, f"link set {name} up")

    def lose(self, name: str) -> None:
        """All its processes are gone, at once."""
        os.kill(self._pids[name], signal.SIGKILL)
        _wait(lambda: not Path(f"/proc/{self._pids[name]}/ns/net").exists(), "the end of a host")

    def sent(self, name: str) -> tuple[int, int]:
        """Bytes and packets that its interface has sent."""
        for line in Path(f"/proc/{self._pids[name]}/net/dev").read_text().splitlines():
            if line.strip().startswith("eth0:"):
                words = line.split(":")[1].split()
                return int(words[8]), int(words[9])
        raise AssertionError(f"{name} has no interface")

    def processes(self, name: str) -> list[int]:
        """What runs there now, besides what keeps the host; kernel threads have no network of their own."""
        keeper = self._pids[name]
        network = os.readlink(f"/proc/{keeper}/ns/net")
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns/net") == network:
                    found.append(int(entry.name))
        keepers = {keeper, *(each.pid for each in self._keepers)}
        return [pid for pid in found if pid not in keepers]

    # -- what runs on them

    def on_head(self, words: Sequence[str], folder: Path = ROOT) -> list[str]:
        """The command that runs these words on `HEAD`, in this folder."""
        enter = ["nsenter", "-t", str(self._pids[HEAD]), "-m", "-u", "-i", "-n"]
        return [*enter, "--", "sh", "-c", 'cd "$0" && exec "$@"', str(folder), *words]

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Of launchers on `HEAD`: how to get to the others."""
        launching = {
            "TMPDIR": "/var/tmp",
            "HYDRA_LAUNCHER": "rsh",
            "HYDRA_LAUNCHER_EXEC": str(self.agent),
            "PRTE_MCA_plm_ssh_agent": str(self.agent),
            "OMPI_MCA_plm_rsh_agent": str(self.agent),
        }
        environment = mpirun_environment({**launching, **(more or {})})
        del environment["PRTE_MCA_rmaps_default_mapping_policy"]  # it would fill the first host
        return environment

    def start(
        self, words: Sequence[str], env: Mapping[str, str] | None = None, folder: Path = ROOT
    ) -> subprocess.Popen[str]:
        """Begin a command on `HEAD`."""
        return subprocess.Popen(
            self.on_head(words, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self.environment(env),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def mpirun(
        self,
        layout: Mapping[str, int],
        *args: str,
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`python ARGS` on so many ranks of each host; its status and what it wrote."""
        process = self.start(mpirun_on(layout, *args), env)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            process.kill()
            out, err = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise AssertionError(f"{args} did not end in {timeout:g} s\n{out}\n{err}") from None
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def mpirun_on(layout: Mapping[str, int], *args: str) -> list[str]:
    """`python ARGS` on so many ranks of each host, in their order."""
    hosts = ",".join(f"{name}:{ranks}" for name, ranks in layout.items())
    option = "--host" if is_open_mpi() else "-hosts"
    return [mpirun_path(), option, hosts, "-n", str(sum(layout.values())), sys.executable, *args]


def is_open_mpi() -> bool:
    from iterreduce.supervising.launchers import OPEN_MPI, find

    return find(2).kind == OPEN_MPI


def _child_of(pid: int) -> int:
    found: list[int] = []

    def look() -> bool:
        found[:] = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return bool(found)

    _wait(look, "the first process of a host")
    return found[0]


def _wait(holds: object, what: str, seconds: float = 20.0) -> None:
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.005)
