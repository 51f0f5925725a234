"""Maps that make no rows somewhere: an empty list has no type, and no say in what the columns are."""

from __future__ import annotations

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.testing import run_ranks

LINES = ["to be", "", "or not", " ", "", "to be", ""]


def words(lines: ir.Batch) -> ir.Batch:
    found = [word for line in lines["line"].to_list() for word in line.split()]
    return ir.Batch(word=found, n=np.ones(len(found), np.int64))


def longest(groups: ir.Groups) -> ir.Batch:
    return groups.keys.with_columns(n=groups.sum("n"))


def count(group: ir.Group, reduce: object) -> dict[str, int]:
    mine = LINES[group.rank :: group.size]
    text = ir.Ragged.from_list(mine) if mine else ir.Ragged.from_list([""]).slice(0, 0)
    rows = ir.Dataset.from_local(group, line=text)
    got = ir.MapReduce(map=words, reduce=reduce, key="word")(rows).collect(group)  # type: ignore[arg-type]
    return dict(zip(got["word"].to_list(), got["n"].tolist(), strict=True))


@pytest.mark.parametrize("reduce", [ir.SUM, longest, {"n": ir.sum("n"), "w": ir.min("n")}])
def test_a_rank_whose_lines_are_blank_does_not_change_the_columns(ranks: int, reduce: object) -> None:
    wanted = {"to": 2, "be": 2, "or": 1, "not": 1}
    assert run_ranks(ranks, count, reduce) == [wanted] * ranks


def test_columns_may_come_late(ranks: int) -> None:
    def work(group: ir.Group) -> dict[str, int]:
        def late(rows: ir.Batch, state: ir.Batch) -> ir.Batch:
            return ir.Batch(k=["a", "b"][: int(state["t"][0])], n=np.ones(int(state["t"][0]), np.int64))

        stages = (
            ir.Local(late, ("rows", "clock"), "m"),
            ir.Shuffle("m", ("k",), "s", ir.SUM),
            ir.Local(lambda t: t.with_columns(t=t["t"] + 1), ("clock",), "tick", cut="share"),
        )
        rows = ir.Dataset.from_local(group, x=np.arange(2))
        inputs = ir.Inputs()
        inputs.rows("rows", rows)
        inputs.sources["zero"] = ir.Batch(t=np.zeros(1, np.int64))
        step = ir.Superstep("step", stages, (ir.Replace("out", "s"), ir.Replace("clock", "tick")))
        state = {"clock": ir.State("zero"), "out": ir.State("")}
        loop = ir.Loop("late", inputs.sources, state, (step,), ir.Until((ir.MaxIterations(3),)), "out")
        got = ir.Dataset.of_loop(loop, group).collect()
        return dict(zip(got["k"].to_list(), got["n"].tolist(), strict=True))

    assert run_ranks(ranks, work) == [{"a": ranks, "b": ranks}] * ranks


@pytest.mark.parametrize("naive", [False, True])
def test_keys_that_come_to_hold_nulls(ranks: int, naive: bool) -> None:
    def work(group: ir.Group) -> int:
        def masked(rows: ir.Batch, state: ir.Batch) -> ir.Batch:
            valid = np.ones(len(rows), bool) if state["t"][0] == 0 else rows["k"] != 1
            return ir.Batch.from_dict({"k": rows["k"], "n": rows["n"]}, {} if valid.all() else {"k": valid})

        stages = (
            ir.Local(masked, ("rows", "clock"), "m"),
            ir.Shuffle("m", ("k",), "s", ir.SUM),
            ir.Local(lambda t: t.with_columns(t=t["t"] + 1), ("clock",), "tick", cut="share"),
        )
        inputs = ir.Inputs()
        inputs.rows("rows", ir.Dataset.from_local(group, k=np.arange(4), n=np.ones(4, np.int64)))
        inputs.sources["zero"] = ir.Batch(t=np.zeros(1, np.int64))
        step = ir.Superstep("step", stages, (ir.Replace("out", "s"), ir.Replace("clock", "tick")))
        state = {"clock": ir.State("zero"), "out": ir.State("")}
        loop = ir.Loop("nulls", inputs.sources, state, (step,), ir.Until((ir.MaxIterations(4),)), "out")
        got = ir.Dataset.of_loop(loop, group).run(naive=naive)
        return int(got.batch["n"].sum())

    assert sum(run_ranks(ranks, work)) == 4 * ranks


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows_or_none_go_through_every_stage_iteration_after_iteration(ranks: int, rows: int) -> None:
    def work(group: ir.Group) -> dict[str, int]:
        mine = np.arange(rows * group.rank // group.size, rows * (group.rank + 1) // group.size)
        text = ir.Ragged.from_list(["t", *map(str, mine)]).slice(1, 1 + len(mine))
        few = ir.Dataset.from_local(group, k=mine, x=np.ones(len(mine)), t=text)
        texts = {"least": ir.min("t"), "first": ir.first("t"), "all": ir.collect("x")}
        stages = (
            ir.Shuffle("rows", ("k",), "shuffled"),
            ir.Shuffle("rows", ("k",), "combined", {"x": ir.sum("x")}),
            ir.Shuffle("rows", ("k",), "onto", {"x": ir.sum("x")}, onto="s"),
            ir.Shuffle("rows", ("k",), "touched", {"x": ir.sum("x")}, onto="s", touched=True),
            ir.Shuffle("rows", ("k",), "sorted", route=ir.Splitters()),
            ir.Lookup("rows", ("k",), "s", (), "looked up"),
            ir.Gather("rows", "gathered"),
            ir.Total("rows", ("k",), {"x": ir.sum("x")}, "total"),
            ir.Shuffle("rows", ("k",), "texts", texts),
            ir.Total("rows", ("k",), texts, "text total"),
            ir.Shuffle("rows", ("k",), "least", {"least": ir.min("t")}),
            ir.Total("rows", ("k",), {"first": ir.first("t")}, "first total"),
        )
        outputs = tuple(ir.Sink(stage.into, stage.into) for stage in stages)
        step = ir.Superstep("step", stages, (*outputs, ir.Replace("s", "shuffled")))
        inputs = ir.Inputs()
        inputs.rows("rows", few)
        until = ir.Until((ir.MaxIterations(3),))
        loop = ir.Loop("empty", inputs.sources, {"s": ir.State("rows", ("k",))}, (step,), until, "s")
        result = ir.Dataset.of_loop(loop, group).run()
        return {name: len(table.batch) for name, table in result.outputs.items()}

    found = run_ranks(ranks, work)
    for name in found[0]:
        everywhere = name == "gathered" or name.endswith("total")
        assert sum(counts[name] for counts in found) == 3 * rows * (ranks if everywhere else 1), name
