"""What every lazy app keeps: the same bits on any number of ranks, without caches the same answers, and
restarts on other numbers of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from tests.apps.kit import read, solved
from tests.waist.kit import random_graph

EDGES = random_graph(40, 160, seed=3)
ROOTS = ir.Batch(node=np.array([9, 12]))
APPS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "pagerank": ((EDGES,), {"tolerance": 1e-8}),
    "connected_components": ((EDGES,), {}),
    "shortest_paths": ((EDGES, "9"), {"symmetric": True}),
    "breadth_first": ((EDGES, "9"), {}),
    "descendants": ((EDGES, ROOTS), {}),
    "closure": ((EDGES,), {"doubling": True}),
    "triangles": ((EDGES,), {}),
    "als": ((EDGES,), {"rank": 2, "iterations": 4}),
}


@pytest.mark.parametrize("name", APPS)
def test_reproducible_runs_have_the_same_bits_on_any_number_of_ranks(name: str) -> None:
    args, options = APPS[name]
    runs = {
        ranks: solved(name, ranks, *args, run={"reproducible": True}, **options) for ranks in (1, 2, 3, 5)
    }
    assert len({result.result_sha256 for result, _ in runs.values()}) == 1
    assert len({result.iterations for result, _ in runs.values()}) == 1


@pytest.mark.parametrize("name", APPS)
def test_without_caches_the_answers_are_the_same(name: str) -> None:
    args, options = APPS[name]
    plain, rows = solved(name, 3, *args, **options)
    naive, others = solved(name, 3, *args, run={"naive": True}, **options)
    assert naive.iterations == plain.iterations
    if not any(column.dtype.kind == "f" for column in rows._columns.values()):
        assert naive.result_sha256 == plain.result_sha256
    key = next(iter(rows.names))
    ours, theirs = (np.argsort(batch[key], kind="stable") for batch in (rows, others))
    if name != "closure":
        for column in rows.names:
            np.testing.assert_allclose(rows[column][ours], others[column][theirs], rtol=1e-9, atol=1e-12)


ITERATE = {name: given for name, given in APPS.items() if name != "triangles"}


@pytest.mark.parametrize("name", ITERATE)
def test_a_run_that_was_cut_off_goes_on_on_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    args, options = ITERATE[name]
    files = [tmp_path / "edges.npz"]
    np.savez(files[0], **dict(EDGES._columns))
    if name == "descendants":
        files.append(tmp_path / "roots.npz")
        np.savez(files[1], **dict(ROOTS._columns))
    words = {"source": args[1]} if isinstance(args[-1], str) else {}
    bits = {"reproducible": True}
    whole = read(name, 2, *files, run=bits, **words, **options)
    saved = bits | {"checkpoint_dir": str(tmp_path / "saved"), "checkpoint_every": 1}
    # it ends, with its last checkpoints kept; the pauses give each of its few iterations the time to be saved
    read(name, 3, *files, run=saved, pause_seconds=0.1, **words, **options)
    again = read(name, 2, *files, run=saved, **words, **options)
    assert again.checkpoints["restarted_from_iteration"] > 0
    assert again.iterations == whole.iterations and again.result_sha256 == whole.result_sha256
