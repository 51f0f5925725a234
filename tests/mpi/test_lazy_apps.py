"""Every lazy app on real ranks: the bits of one rank, the same without caches, restarts on fewer ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group
from tests.apps.kit import app
from tests.apps.test_lazy import APPS, EDGES, ITERATE, ROOTS

pytestmark = pytest.mark.mpi
BITS = {"reproducible": True}


def dealt(value: Any, group: Group | None) -> Any:
    """A batch as a dataset of which every rank has its share; anything else as it is."""
    if not isinstance(value, ir.Batch):
        return value
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    lo, hi = len(value) * rank // size, len(value) * (rank + 1) // size
    return ir.Dataset.from_local(group, **dict(value.slice(lo, hi)._columns))


def solved(name: str, group: Group | None, **run: Any) -> ir.Result:
    """An app's result; ``group`` None: this rank alone, with all rows."""
    args, options = APPS[name]
    return app(name)(*(dealt(value, group) for value in args), **options).run(group, **run)


@pytest.mark.parametrize("name", APPS)
def test_real_ranks_have_the_bits_of_one_rank_alone(group: Group, name: str) -> None:
    alone, spread = solved(name, None, **BITS), solved(name, group, **BITS)
    assert spread.result_sha256 == alone.result_sha256 and spread.iterations == alone.iterations


@pytest.mark.parametrize("name", APPS)
def test_caches_change_no_bit_on_real_ranks(group: Group, name: str) -> None:
    cached, naive = (solved(name, group, naive=off, **BITS) for off in (False, True))
    assert naive.result_sha256 == cached.result_sha256
    assert naive.iterations == cached.iterations and naive.outcome == cached.outcome


@pytest.mark.parametrize("name", ITERATE)
def test_a_checkpoint_of_real_ranks_is_taken_up_by_fewer(group: Group, tmp_path: Path, name: str) -> None:
    folder = Path(group.bcast_bytes(str(tmp_path).encode()).decode())
    files = written(folder, name) if group.rank == 0 else names(folder, name)
    args, options = ITERATE[name]
    words = {"source": args[1]} if isinstance(args[-1], str) else {}
    group.barrier()  # the files are there

    def build() -> ir.Dataset:
        return app(name)(*(ir.read(str(file)) for file in files), **words, **options)

    saved = BITS | {"checkpoint_dir": str(folder / "saved"), "checkpoint_every": 1}
    events = ir.Events()
    events.subscribe(lambda event: time.sleep(0.1 * (event.name == "iteration.start")))
    whole = build().run(group, events, **saved)
    fewer = max(1, group.size - 1)
    few = group.split(int(group.rank >= fewer))
    assert few is not None
    try:
        if group.rank < fewer:
            again = build().run(few, **saved)
            assert again.checkpoints["restarted_from_iteration"] > 0
            assert again.iterations == whole.iterations and again.result_sha256 == whole.result_sha256
    finally:
        few.free()


def names(folder: Path, name: str) -> list[Path]:
    return [folder / f for f in (["edges.npz", "roots.npz"] if name == "descendants" else ["edges.npz"])]


def written(folder: Path, name: str) -> list[Path]:
    for file, rows in zip(names(folder, name), (EDGES, ROOTS), strict=False):
        np.savez(file, **dict(rows._columns))
    return names(folder, name)
