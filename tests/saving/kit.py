"""What tests of checkpoints share: rows of every kind, dealt to ranks, saved by threads and read back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iterreduce.collectives import Group, SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Ragged
from iterreduce.saving.directory import Attempt
from iterreduce.saving.reading import Checkpoint, newest
from iterreduce.saving.writing import Saved, Writing, begin
from iterreduce.testing import run_ranks

SIZES = (1, 2, 3, 5, 8)


def rows_of_every_kind(rows: int, seed: int = 0) -> Batch:
    """Fixed columns of all dtypes and shapes, text, bytes, lists, and masks."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 4, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns: dict[str, Any] = {
        dtype: random.integers(0, 100, rows).astype(dtype)
        for dtype in ("f8", "f4", "f2", "i8", "i2", "u1", "u8", "?", "c16", "M8[ns]", "m8[D]")
    }
    columns |= {
        "matrix": random.normal(size=(rows, 2, 3)),
        "odd bytes": random.integers(0, 9, (rows, 3)).astype(np.uint8),
        "strided": random.normal(size=(rows, 4))[:, 1],
        "nothing": np.zeros((rows, 0)),
        "a/b": random.integers(0, 9, rows),
        "": random.integers(0, 9, rows),
        "text": Ragged.from_list(["äöü"[: i % 4] * (i % 3) for i in range(rows)] + ["x"]).slice(0, rows),
        "bytes": Ragged.from_list([bytes([i % 256]) * (i % 5) for i in range(rows)] + [b""]).slice(0, rows),
        "list": Ragged(offsets, random.normal(size=offsets[-1]), "list"),
    }
    return Batch.from_dict(columns, {"f8": random.random(rows) < 0.5, "text": random.random(rows) < 0.5})


def share(rows: Batch, group: Group) -> Batch:
    """This rank's rows: ranks hold unequal parts, and of few rows some hold none."""
    ends = [round(len(rows) * (rank / group.size) ** 1.5) for rank in range(group.size + 1)]
    return rows.slice(ends[group.rank], ends[group.rank + 1])


def save(group: Group, attempt: Attempt, number: int, tables: Mapping[str, Saved], **how: Any) -> Writing:
    """Write and publish a checkpoint; on all ranks it is over when this returns. Collective."""
    how = {"facts": {"number": number}} | how
    writing = begin(group, attempt, number, tables, how.pop("facts"), **how)
    writing.start()
    writing.wait()
    assert writing.state == "written", writing.error
    writing.gather()
    writing.wait()
    group.barrier()
    assert group.rank or writing.published, writing.error
    return writing


def saved(place: Path, size: int, rows: Batch, numbers: range = range(1, 2), **how: Any) -> Path:
    """The attempt directory after this many ranks saved these rows under these numbers."""

    def work(group: Group) -> str:
        attempt = Attempt.open(group, place)
        for number in numbers:
            save(group, attempt, number, {"rows": Saved(share(rows, group))}, **how)
        return attempt.path

    (path,) = set(run_ranks(size, work))
    return Path(path)


def newest_here(place: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint, for one rank."""
    return newest(SoloGroup(), Attempt.open(SoloGroup(), place), warn)


def read_by(size: int, place: Path, table: str = "rows", warn: Callable[[str], None] = print) -> Batch:
    """All rows of a table of the newest checkpoint, each rank reading its part."""

    def work(group: Group) -> Batch:
        checkpoint = newest(group, Attempt.open(group, place), warn)
        assert checkpoint is not None
        rows = checkpoint.tables[table].rows
        lo, hi = rows * group.rank // group.size, rows * (group.rank + 1) // group.size
        return checkpoint.read(table, lo, hi)

    return Batch.concat(run_ranks(size, work))


def names_in(path: Path) -> list[str]:
    """The names in a directory, sorted."""
    return sorted(os.listdir(path))
