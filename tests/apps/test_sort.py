"""The sort program and its verifier: records of TeraSort against NumPy's lexsort, and planted errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.testing import run_ranks
from tests.launch import ROOT

SORT = load_app(str(ROOT / "benchmarks" / "waist" / "sort.py")).function
GENERATE = load_app(str(ROOT / "apps" / "generate.py")).function
GLOBALS = SORT.__globals__


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "records.h5"
    run_ranks(1, lambda group: GENERATE("terasort", str(path), group, rows=3000))
    return path


def test_records_are_sorted_by_their_key_and_verified(records: Path, ranks: int) -> None:
    given = ir.read(str(records)).collect()
    order = np.lexsort(given["key"].T[::-1])
    results = run_ranks(ranks, lambda group: SORT(ir.read(str(records))).run(group))
    for name in ("key", "value"):
        assert np.array_equal(np.concatenate([r[name] for r in results]), given[name][order])
    assert results[0].values["records"] == 3000
    assert results[0].values["largest_share"] <= 2 * 3000 / ranks


def verdict(before: ir.Batch, after: list[ir.Batch]) -> ir.Batch:
    context = ir.Context(1, 0, 0)
    examine = GLOBALS["Examine"]("k")
    looked = [examine.run(context, share) for share in after]
    return GLOBALS["verdict"](examine.run(context, before), ir.Batch.concat(looked))


def test_the_verifier_sees_records_that_are_lost_changed_or_out_of_order() -> None:
    rows = ir.Batch(k=np.array([3, 1, 2, 2]), x=np.array([0.5, 1.5, 2.5, 3.5]))
    good = rows.take(np.array([1, 2, 3, 0]))
    shares = [good.slice(0, 2), good.slice(0, 0), good.slice(2, 4)]
    assert verdict(rows, shares)["largest_share"][0] == 2
    for wrong, word in (
        ([good.slice(0, 3)], "records"),
        ([good.slice(0, 3), good.slice(0, 1)], "checksum"),
        ([good.with_columns(x=good["x"][::-1].copy())], "checksum"),
        ([good.slice(2, 4), good.slice(0, 2)], "behind a larger"),
        ([rows], "behind a larger"),
    ):
        with pytest.raises(ValueError, match=word):
            verdict(rows, wrong)
