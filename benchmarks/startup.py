"""How long the command line takes to start, against importing the libraries that it needs anyway.

    python benchmarks/startup.py [--runs 9] [--ranks 2]

Wall time of a process from its start to its end, in seconds; each rival takes its turn in each round, and
medians are compared. The first round is not counted: it fills the caches of the disk. Alone: an app that does
nothing against `import numpy, numba`; --help against `import numpy`. Under mpirun: the app against
`import mpi4py.MPI, numpy, numba`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NOTHING = "import iterreduce as ir\n\n\n@ir.app\ndef nothing():\n    'Do nothing.'\n"
SMALL = """import numpy as np
import iterreduce as ir


def spread(rows: ir.Batch) -> ir.Batch:
    return ir.Batch(key=np.zeros(len(rows), np.int64), x=rows["x"])


@ir.app
def small(group: ir.Group) -> ir.Dataset:
    'One iteration over ten rows.'
    rows = ir.Dataset.from_local(x=np.arange(10.0))
    state = ir.Dataset.from_local(x=np.arange(1.0))
    return ir.MapReduce(map=lambda rows, state: spread(rows), reduce=ir.SUM, key="key").iterate(
        rows, state=state, update=lambda sums, state: state, max_iterations=1)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--ranks", type=int, default=2, help="0: without mpirun")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rivals = commands(Path(folder), args.ranks)
        seconds = measure(rivals, environment(Path(folder)), args.runs)
    report(seconds)


def commands(folder: Path, ranks: int) -> dict[str, list[str]]:
    """What is timed, by name; a rival stands before what is compared with it."""
    (folder / "nothing.py").write_text(NOTHING)
    (folder / "small.py").write_text(SMALL)
    ours = [sys.executable, "-m", "iterreduce"]
    alone = {
        "import numpy": [sys.executable, "-c", "import numpy"],
        "--help of an app": [*ours, str(folder / "nothing.py"), "--help"],
        "import numpy, numba": [sys.executable, "-c", "import numpy, numba"],
        "an app that does nothing": [*ours, str(folder / "nothing.py"), "--quiet"],
        "one small iteration": [*ours, str(folder / "small.py"), "--quiet"],
    }
    if not ranks:
        return alone
    mpirun = [os.path.join(sysconfig.get_path("scripts"), "mpirun"), "-n", str(ranks)]
    imports = [sys.executable, "-c", "import mpi4py.MPI, numpy, numba"]
    return alone | {
        f"{ranks} ranks: import mpi4py.MPI, numpy, numba": mpirun + imports,
        f"{ranks} ranks: an app that does nothing": mpirun + alone["an app that does nothing"],
        f"{ranks} ranks: one small iteration": mpirun + alone["one small iteration"],
    }


def environment(folder: Path) -> dict[str, str]:
    """One thread per process, and bytecode of this package kept as an installation has it."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        "OMP_NUM_THREADS": "1",
    }


def measure(rivals: dict[str, list[str]], environment: dict[str, str], runs: int) -> dict[str, list[float]]:
    """Seconds of each run, rivals in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(runs + 1):
        for name, command in rivals.items():
            taken = run(command, environment)
            if turn:
                seconds[name].append(taken)
    return seconds


def run(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def report(seconds: dict[str, list[float]]) -> None:
    rival = 0.0
    for name, runs in seconds.items():
        median = statistics.median(runs)
        is_rival = "import" in name
        rival = median if is_rival else rival
        ratio = "" if is_rival else f"  {median / rival:.2f} x the imports"
        print(f"{name:48} {median:6.3f} s  ({min(runs):.3f} .. {max(runs):.3f}){ratio}")


if __name__ == "__main__":
    main()
