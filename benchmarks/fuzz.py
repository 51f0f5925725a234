"""Files that are damaged, read by whoever reads them: what crashes, hangs, or is read wrong?

    python benchmarks/fuzz.py --files 3000
    python benchmarks/fuzz.py --only h5:17 --seed 1      one of them again, with its traceback

Half of the files are checkpoint directories with one thing wrong, or with a manifest that was forged and
sealed again; the others are input files of every format. Each is read by a process of its own, that may use
a gigabyte and so many seconds, so a crash of a library is counted like anything else:

    fine         the rows of this checkpoint or the one before, the right rows of an input, or a clear error
    unclear      an exception that is none of ours
    wrong        other rows
    memory       it asked for what it may not have
    crash, hang  the process died by a signal, or was still busy at its limit

Right rows of .npy, .npz and .h5 are those that NumPy and h5py read by themselves; of text, a file must give
the same rows, or an error, in one block and in many. Data that are changed and still well formed are
other rows, of which nobody can say more.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from iterreduce.collectives import Group, SoloGroup  # noqa: E402
from iterreduce.columns.batch import Batch  # noqa: E402
from iterreduce.errors import IterReduceError  # noqa: E402
from iterreduce.sources import load, open_source  # noqa: E402
from iterreduce.sources.edges import edges_of  # noqa: E402
from iterreduce.testing import run_ranks  # noqa: E402
from tests.saving.fuzzing import BYTES, Directory, Finding, damaged, forged  # noqa: E402

MOST_MEMORY = 1 << 30
BAD = ("unclear", "wrong", "memory", "crash", "hang")
ENGLISH = ["rows", "columns", "points", "of", "a", "file", "and", "its", "end"]


# ---------------------------------------------------------------- seeds: small files of each format


def _table(rng: np.random.Generator, rows: int = 60) -> dict[str, np.ndarray]:
    return {"id": rng.integers(-9, 99, rows), "x": rng.normal(size=rows), "m": rng.normal(size=(rows, 2))}


def _npy(path: Path, rng: np.random.Generator) -> None:
    np.save(path, _table(rng)["m"])


def _npz(path: Path, rng: np.random.Generator) -> None:
    (np.savez_compressed if rng.integers(2) else np.savez)(path, **_table(rng))


def _h5(path: Path, rng: np.random.Generator) -> None:
    import h5py

    how: dict[str, Any] = [{}, {"chunks": True, "compression": "gzip"}, {"chunks": True, "fletcher32": True}][
        rng.integers(3)
    ]
    with h5py.File(path, "w") as file:
        for name, column in _table(rng).items():
            file.create_dataset(name, data=column, **how)
        if rng.integers(2):
            file.create_dataset("text", data=[ENGLISH[i % 9] for i in range(60)], dtype=h5py.string_dtype())


def _csv(path: Path, rng: np.random.Generator) -> None:
    ids, xs = rng.integers(0, 99, 60).tolist(), rng.normal(size=60).tolist()
    notes = ['"a ""b"", c"', ""] * 30
    rows = [f"{a},{b!r},{ENGLISH[a % 9]},{c}" for a, b, c in zip(ids, xs, notes, strict=True)]
    path.write_text("\n".join(["id,x,word,note", *rows]) + "\n")


def _mtx(path: Path, rng: np.random.Generator) -> None:
    kind = ("real", "integer", "pattern")[rng.integers(3)]
    value = {"real": " 0.5", "integer": " 7", "pattern": ""}[kind]
    ends = rng.integers(1, 21, (50, 2)).tolist()
    lines = [f"{max(e)} {min(e)}{value}" for e in ends]
    shape = ("general", "symmetric")[rng.integers(2)]
    head = f"%%MatrixMarket matrix coordinate {kind} {shape}\n% a comment\n20 20 50"
    path.write_text("\n".join([head, *lines]) + "\n")


def _el(path: Path, rng: np.random.Generator) -> None:
    weights = rng.integers(2)
    ends = rng.integers(0, 10**6, (50, 2)).tolist()
    path.write_text("# edges\n" + "".join(f"{a} {b}{' 2.5' * weights}\n" for a, b in ends))


SEEDS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "npy": _npy, "npz": _npz, "h5": _h5, "csv": _csv, "mtx": _mtx, "el": _el,
}  # fmt: skip


# ------------------------------------------------------------------------------- judges, in the child


def _rows(path: Path, group: Group | None = None, **options: Any) -> Batch:
    source = open_source(path, **options)
    source = edges_of(source) if path.suffix in (".mtx", ".el") else source
    group = group or SoloGroup()
    source.open(group)
    return load(group, source).batch


def _read(path: Path, **options: Any) -> Batch | str:
    try:
        return _rows(path, **options)
    except IterReduceError as error:
        if not str(error).strip():
            raise Finding("an error without words") from None
        return f"{type(error).__name__}: {error}"


def _judged_input(path: Path) -> str:
    found = _read(path)
    if path.suffix in (".csv", ".mtx", ".el"):
        _same_in_blocks(path, found)
    elif isinstance(found, Batch):
        _same_as_library(path, found)
    return "rows" if isinstance(found, Batch) else "error"


def _same_in_blocks(path: Path, found: Batch | str) -> None:
    def work(group: Group) -> Batch | str:
        try:
            return _rows(path, group, block_bytes=97)
        except IterReduceError as error:
            return f"{type(error).__name__}: {error}"

    parts = run_ranks(2, work)
    if isinstance(found, str) and isinstance(parts[0], str):
        return  # where several things are wrong, each of them may be named
    if isinstance(found, str) or isinstance(parts[0], str):
        raise Finding(f"in one block {str(found)[:300]}; in many {str(parts[0])[:300]}")
    elif not Batch.concat([part for part in parts if isinstance(part, Batch)]).equals(found):
        raise Finding("other rows in many blocks than in one")


def _same_as_library(path: Path, found: Batch) -> None:
    for name, column in _by_library(path, found.names).items():
        mine: Any = found[name]
        if isinstance(column, list):
            same = [_bytes(row) for row in mine.to_list()] == column
        else:
            same = mine.shape == column.shape and mine.tobytes() == column.astype(mine.dtype).tobytes()
        if not same:
            raise Finding(f"column {name} holds other rows than the library reads")


def _bytes(row: Any) -> Any:
    return row.encode(errors="surrogateescape") if isinstance(row, str) else row


def _by_library(path: Path, names: Any) -> dict[str, Any]:
    if path.suffix == ".npy":
        (name,) = names
        return {name: np.load(path, allow_pickle=False)}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    import h5py

    with h5py.File(path, "r") as file:
        found = {name: file[name][:] for name in names if name in file}
    return {name: c.tolist() if c.dtype == object else c for name, c in found.items()}


# ---------------------------------------------------------------- one file, in a process of its own


class Campaign:
    """All files of a seed, by kind and number."""

    def __init__(self, seed: int, place: Path, limit: float):
        self.seed, self.place, self.limit = seed, place, limit
        self.directory = Directory(place / "seed")
        for kind in SEEDS:  # what is compiled and imported now is there in every child
            path = place / f"warm.{kind}"
            SEEDS[kind](path, np.random.default_rng(0))
            assert _judged_input(path) == "rows", kind

    def one(self, kind: str, number: int) -> tuple[str, str]:
        """What is wrong with the file, and what came out of it."""
        rng = np.random.default_rng([self.seed, number, *kind.encode()])
        if kind == "checkpoint":
            files, told = damaged(self.directory.files, rng)
            return told, self.directory.judged(self.place / "d", files)
        if kind == "forged":
            name = self.directory.manifests[int(rng.integers(2))]
            raw, told = forged(self.directory.files[name], rng)
            files = {**self.directory.files, name: raw}
            return told, self.directory.judged(self.place / "d", files, honest=False)
        path = self.place / f"file.{kind}"
        SEEDS[kind](path, rng)
        how = BYTES[int(rng.integers(len(BYTES)))]
        path.write_bytes(how(path.read_bytes(), rng))
        return how.__name__, _judged_input(path)

    def apart(self, kind: str, number: int) -> tuple[str, str]:
        """The same in a child: what came out, and what was wrong."""
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(out)
            _in_child(into, self.limit, lambda: self.one(kind, number))
        os.close(into)
        with os.fdopen(out, "rb") as pipe:
            told = pipe.read()
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            end = os.WTERMSIG(status)
            return ("hang" if end == signal.SIGALRM else "crash"), signal.Signals(end).name
        outcome, text = json.loads(told) if told else ("crash", f"exit status {status}")
        return outcome, text


def _in_child(into: int, limit: float, work: Callable[[], tuple[str, str]]) -> None:
    faulthandler.disable()
    signal.setitimer(signal.ITIMER_REAL, limit)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY, now + MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    try:
        told, outcome = work()
        said = outcome, told
    except Finding as finding:
        said = "wrong", str(finding)[:2000]
    except MemoryError:
        said = "memory", traceback.format_exc()[-2000:]
    except BaseException:
        said = "unclear", traceback.format_exc()[-2000:]
    os.write(into, json.dumps(said).encode())
    os._exit(0)


def _deal(files: int) -> list[tuple[str, int]]:
    """Kinds and numbers: a third damaged checkpoints, a sixth forged ones, the rest input files."""
    kinds = ["checkpoint", "checkpoint", "checkpoint", "checkpoint", "forged", "forged", *SEEDS]
    return [(kinds[i % len(kinds)], i // len(kinds) * len(kinds) + i % len(kinds)) for i in range(files)]


def main() -> int:
    """Run the campaign; the exit status is 1 if anything bad was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one file")
    parser.add_argument("--only", help="KIND:NUMBER, in this process")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.fsync = lambda handle: None  # type: ignore[assignment]
    try:
        campaign = Campaign(given.seed, place, given.limit)
        if given.only:
            kind, number = given.only.split(":")
            print(campaign.one(kind, int(number)))
            return 0
        return _run(campaign, _deal(given.files))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _run(campaign: Campaign, files: list[tuple[str, int]]) -> int:
    counts: dict[str, Counter[str]] = {}
    began = time.perf_counter()
    for kind, number in files:
        outcome, told = campaign.apart(kind, number)
        counts.setdefault(kind, Counter())[outcome] += 1
        if outcome in BAD:
            print(f"{kind}:{number} {outcome}: {told}", flush=True)
    bad = sum(counts[kind][outcome] for kind in counts for outcome in BAD)
    for kind, found in counts.items():
        print(f"{kind:12}", "  ".join(f"{outcome} {n}" for outcome, n in found.most_common()))
    print(json.dumps({"files": len(files), "bad": bad, "seconds": round(time.perf_counter() - began, 1)}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
