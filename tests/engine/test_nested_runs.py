"""A run that is started inside a function that another run is calling."""

from __future__ import annotations

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.testing import run_ranks


def total(rows: ir.Dataset) -> ir.Dataset:
    return ir.MapReduce(key="k")(rows)


def nested(group: ir.Group) -> str:
    inner = ir.Dataset.from_local(group, k=np.arange(3), v=np.ones(3))

    def map_(rows: ir.Batch) -> ir.Batch:
        total(inner).run()
        return rows

    outer = ir.MapReduce(map=map_, key="k")(ir.Dataset.from_local(group, k=np.arange(4), v=np.ones(4)))
    with pytest.raises(ir.UserCodeError, match="inside a function that a run is calling") as raised:
        outer.run()
    assert total(inner).run().iterations == 1  # the group is as good as new
    return str(raised.value)


def test_a_collective_run_inside_user_code_is_refused_on_all_ranks_and_nothing_hangs() -> None:
    assert len(set(run_ranks(3, nested))) == 1


def test_a_run_on_this_rank_alone_is_fine_inside_user_code() -> None:
    def map_(rows: ir.Batch) -> ir.Batch:
        return total(ir.Dataset.from_local(k=rows["k"] % 2, v=rows["v"])).collect()

    def outer(group: ir.Group) -> float:
        rows = ir.Dataset.from_local(group, k=np.arange(4), v=np.ones(4))
        return float(ir.MapReduce(map=map_, key="k")(rows).collect(group)["v"].sum())

    assert run_ranks(2, outer) == [8.0, 8.0]
