"""Aggregates that need all rows of a key together, against plain loops, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.testing import run_ranks

WORDS = ["pear", "fig", "apple", "lime", "date", "plum", "kiwi"]


def share(group: ir.Group, rows: int = 23) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Rows of this rank; the last ranks may have none."""
    mine = [i for i in range(rows) if i % group.size == group.rank] if rows else []
    return np.array([i % 5 for i in mine], np.int64), [WORDS[i % 7] for i in mine], np.array(mine, np.int64)


def dataset(group: ir.Group, rows: int = 23) -> ir.Dataset:
    keys, words, numbers = share(group, rows)
    text = ir.Ragged.from_list(words) if words else ir.Ragged.from_list([""]).slice(0, 0)
    return ir.Dataset.from_local(group, k=keys, w=text, n=numbers)


def by_key(group: ir.Group, rows: int, through_map: bool) -> dict[int, tuple[str, str, list[int]]]:
    reduce = {"least": ir.min("w"), "most": ir.max("w"), "all": ir.collect("n")}
    map_ = (lambda batch: batch) if through_map else None
    got = ir.MapReduce(map=map_, reduce=reduce, key="k")(dataset(group, rows)).collect(group)
    lists = [sorted(v.tolist()) for v in got["all"].to_list()]
    columns = (got["least"].to_list(), got["most"].to_list(), lists)
    return dict(zip(got["k"].tolist(), zip(*columns, strict=True), strict=True))


@pytest.mark.parametrize("through_map", [False, True])
@pytest.mark.parametrize("rows", [3, 23])
def test_texts_and_lists_by_key(ranks: int, rows: int, through_map: bool) -> None:
    wanted = {}
    for k in {i % 5 for i in range(rows)}:
        mine = [i for i in range(rows) if i % 5 == k]
        words = [WORDS[i % 7] for i in mine]
        wanted[k] = (min(words), max(words), mine)
    for got in run_ranks(ranks, by_key, rows, through_map):
        assert got == wanted


def totals(group: ir.Group) -> list[tuple[str, int]]:
    inputs = ir.Inputs()
    rows = inputs.rows("rows", dataset(group))
    step = ir.Superstep(
        "s",
        (
            ir.Local(lambda batch: batch, (rows,), "mapped"),
            ir.Total("mapped", (), {"least": ir.min("w"), "sum": ir.sum("n")}, "total"),
        ),
        (ir.Replace("state", "total"),),
    )
    state = {"state": ir.State("")}
    loop = ir.Loop("t", inputs.sources, state, (step,), ir.Until((ir.MaxIterations(3),)), "state")
    made = ir.Dataset.of_loop(loop, group).run().batch
    return list(zip(made["least"].to_list(), made["sum"].tolist(), strict=True))


def test_a_total_of_texts_and_numbers_is_the_same_on_all_ranks_in_every_iteration(ranks: int) -> None:
    assert run_ranks(ranks, totals) == [[("apple", sum(range(23)))]] * ranks


def failing(group: ir.Group) -> bool:
    def map_(batch: ir.Batch) -> ir.Batch:
        if group.rank == group.size - 1:
            raise ValueError("not today")
        return batch

    with pytest.raises(ir.UserCodeError, match="not today"):
        ir.MapReduce(map=map_, reduce={"least": ir.min("w")}, key="k")(dataset(group)).run()
    return len(by_key(group, 23, True)) == 5


def test_a_failure_beside_ranks_that_want_whole_rows_is_raised_on_all(ranks: int) -> None:
    assert run_ranks(ranks, failing) == [True] * ranks
