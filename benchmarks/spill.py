"""Rows that no budget holds: the same job with and without `--memory`, beside DuckDB with its limit.

    python benchmarks/spill.py [--rows 60e6] [--memory 256MiB] [--ranks 2] [--scratch DIR] [--only groups]

Each job runs in processes of its own, which are looked at while they run: ``anon`` is the most memory that
all of them together had for themselves (RssAnon; pages of files, which the kernel drops when others want
memory, are not in it), ``resident`` the same with files. Rows are int64 and float64. ``groups``: sums and
counts by key, half as many keys as rows; ``sorted``: all rows in the order of their values. DuckDB has its
rows in a database file and may take as much memory as all ranks together, and as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from iterreduce.options import format_size, parse_size

ROOT = Path(__file__).resolve().parent.parent
APP = '''
import iterreduce as ir

@ir.app
def job(rows: ir.Dataset, kind: str = "groups") -> ir.Dataset:
    """GROUPS or SORTED rows."""
    if kind == "groups":
        return rows.group_by("k").agg(v=ir.sum("v"), n=ir.count())
    return rows.sort("v")
'''
DUCK = """
import sys, duckdb
database, kind, memory, scratch, threads = sys.argv[1:]
duck = duckdb.connect(database, read_only=True)
if memory:
    duck.execute(f"set memory_limit='{memory}'")
duck.execute(f"set temp_directory='{scratch}'")
duck.execute(f"set threads={threads}")
duck.execute("set preserve_insertion_order=false")
groups = "select k, sum(v) v, count(*) n from rows group by k"
query = groups if kind == "groups" else "select * from rows order by v"
duck.execute(f"create temp table made as {query}")
print(duck.execute("select count(*) from made").fetchone()[0])
"""


def family(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    todo, parents = [pid], {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    while todo:
        found = todo.pop()
        yield found
        todo += parents.get(found, [])


def resident(pid: int) -> tuple[int, int]:
    """Bytes of memory of its own, and of all resident memory, of a family of processes."""
    anon = whole = 0
    for member in family(pid):
        try:
            status = Path(f"/proc/{member}/status").read_text()
        except OSError:
            continue
        sizes = {
            line.split(":")[0]: line.split()[1]
            for line in status.splitlines()
            if line.startswith(("Rss", "VmRSS"))
        }
        anon, whole = anon + int(sizes.get("RssAnon", 0)) * 1024, whole + int(sizes.get("VmRSS", 0)) * 1024
    return anon, whole


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, int, int, str]:
    """Seconds, the most memory, and what was printed."""
    started, most = time.perf_counter(), (0, 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        while process.poll() is None:
            now = resident(process.pid)
            most = max(most[0], now[0]), max(most[1], now[1])
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        told = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, *most, told


def make_rows(folder: Path, rows: int) -> tuple[Path, Path]:
    """A file of rows, and a database of the same."""
    path, database = folder / f"rows-{rows}.npy", folder / f"rows-{rows}.duckdb"
    if not path.exists():
        rng = np.random.default_rng(0)
        made = np.lib.format.open_memmap(path, "w+", [("k", "i8"), ("v", "f8")], (rows,))
        for lo in range(0, rows, 1 << 20):
            part = made[lo : lo + (1 << 20)]
            part["k"] = rng.integers(0, rows // 2, len(part)) * 0x9E3779B97F4A7C1
            part["v"] = rng.random(len(part))
        made.flush()
    if not database.exists():
        import duckdb

        with duckdb.connect(str(database)) as duck:
            duck.execute("create table rows (k bigint, v double)")
            found = np.load(path, mmap_mode="r")
            for lo in range(0, rows, 1 << 22):
                part = [np.ascontiguousarray(found[name][lo : lo + (1 << 22)]) for name in ("k", "v")]
                duck.execute("insert into rows select unnest($1), unnest($2)", part)
    return path, database


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, default=60e6)
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scratch", default=os.environ.get("TMPDIR") or "/tmp")
    parser.add_argument("--folder", default="", help="keep rows here")
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as spare:
        folder = Path(chosen.folder or spare)
        path, database = make_rows(folder, int(chosen.rows))
        (folder / "app.py").write_text(APP)
        (folder / "duck.py").write_text(DUCK)
        summary = folder / "summary.json"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        mpirun = (
            []
            if chosen.ranks == 1
            else [str(Path(sys.executable).parent / "mpirun"), "-n", str(chosen.ranks)]
        )
        whole = format_size(parse_size(chosen.memory) * chosen.ranks).replace(" ", "")

        def ours(kind: str, *options: str) -> list[str]:
            run = [sys.executable, "-m", "iterreduce", "--quiet", "--summary", str(summary), *options]
            return [*mpirun, *run, str(folder / "app.py"), str(path), "--kind", kind]

        def ducks(kind: str, memory: str) -> list[str]:
            words = [str(database), kind, memory, spare, str(chosen.ranks)]
            return [sys.executable, str(folder / "duck.py"), *words]

        def told(_: str) -> str:
            found = json.loads(summary.read_text())
            spilled = found.get("scratch_bytes", {}).get("total", 0)
            inside = found["seconds"]["total"] - found["seconds"]["start"]
            return f"{inside:6.1f} s of work, {format_size(spilled)} spilled, {found['result_sha256'][:12]}"

        nbytes = 16 * int(chosen.rows)
        busy = f"load {os.getloadavg()[0]:.1f}"
        print(f"{int(chosen.rows):,} rows, {format_size(nbytes)}; {chosen.ranks} ranks; {busy}")
        for kind in ("groups", "sorted"):
            if chosen.only not in ("", kind):
                continue
            budget = ["--memory", chosen.memory, "--scratch", chosen.scratch]
            jobs: dict[str, tuple[list[str], Callable[[str], str]]] = {
                "no budget": (ours(kind), told),
                f"--memory {chosen.memory}": (ours(kind, *budget), told),
                "DuckDB": (ducks(kind, ""), lambda text: f"{int(text):,} rows"),
                f"DuckDB, {whole}": (ducks(kind, whole), lambda text: f"{int(text):,} rows"),
            }
            for _ in range(chosen.repeats):
                for name, (command, words) in jobs.items():
                    try:
                        seconds, anon, most, text = watched(command, environment)
                    except SystemExit as failed:
                        print(f"{kind:7} {name:18} failed: {str(failed)[-40:]}")
                        continue
                    print(
                        f"{kind:7} {name:18} {seconds:6.1f} s   anon {format_size(anon):>9}   "
                        f"resident {format_size(most):>9}   {words(text)}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
