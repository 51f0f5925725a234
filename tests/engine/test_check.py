"""What --check finds: arrays that changed under a run, and rows that were lost on the way."""

from __future__ import annotations

import numpy as np
import pytest

import iterreduce as ir
from iterreduce import rowshuffle
from iterreduce.testing import run_ranks


def test_an_array_that_changes_under_a_run_is_found_on_all_ranks(ranks: int) -> None:
    def work(group: ir.Group) -> str:
        mine = np.arange(6.0)

        def meddling(rows: ir.Batch, state: ir.Batch) -> ir.Batch:
            if group.rank == group.size - 1 and state["n"][0] >= 2:
                mine[0] = -1
            return ir.Batch(k=np.zeros(len(rows), np.int64), n=np.ones(len(rows)))

        def count(sums: ir.Batch, state: ir.Batch) -> ir.Batch:
            return state.with_columns(n=state["n"] + 1)

        rows = ir.Dataset.from_local(group, copy=False, x=mine)
        loop = ir.MapReduce(map=meddling, key="k").iterate(
            rows, state=ir.Batch(n=np.zeros(1)), update=count, max_iterations=5
        )
        with pytest.raises(ir.UsageError, match="changed while the run was using them") as raised:
            loop.run(check=True)
        return str(raised.value)

    assert len(set(run_ranks(ranks, work))) == 1


def rows_of(groups: ir.Groups) -> ir.Batch:
    return groups.rows


def shuffled(group: ir.Group) -> int:
    k = np.arange(500, dtype=np.int64) * 7 + group.rank
    rows = ir.Dataset.from_local(group, k=k, w=[f"w{i}" for i in k])
    return len(ir.MapReduce(reduce=rows_of, key="k")(rows).run(check=True).batch)


def test_rows_are_conserved_by_a_shuffle(ranks: int) -> None:
    assert sum(run_ranks(ranks, shuffled)) == 500 * ranks


def test_a_lost_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = rowshuffle.RowSender._receive
    monkeypatch.setattr(
        rowshuffle.RowSender, "_receive", lambda self, arrival: receive(self, arrival).slice(1, 10**9)
    )

    def work(group: ir.Group) -> None:
        with pytest.raises(ir.ScheduleError, match="not the rows sent"):
            shuffled(group)

    run_ranks(3, work)
