"""Stages that run once give what a dict and a loop over all rows give, on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group, group_for
from iterreduce.columns.batch import Batch
from iterreduce.loop import Gather, Local, Shuffle, Total
from tests.engine import oracle
from tests.engine.kit import (
    Check,
    all_on,
    by_rank,
    distinct,
    int_rows,
    local,
    once,
    rows_here,
    rows_of,
)

N = 61
AGGREGATORS = {
    "s": (ir.sum("v"), ("sum", "v")),
    "lo": (ir.min("v"), ("min", "v")),
    "hi": (ir.max("v"), ("max", "v")),
    "n": (ir.count(), ("count", "")),
    "nv": (ir.count("v"), ("count", "v")),
    "m": (ir.mean("v"), ("mean", "v")),
    "var": (ir.var("v"), ("var", "v")),
    "any": (ir.any("v"), ("any", "v")),
    "all": (ir.all("v"), ("all", "v")),
    "f": (ir.first("v"), ("first", "v")),
    "l": (ir.last("v"), ("last", "v")),
}
REDUCE = {name: aggregator for name, (aggregator, _) in AGGREGATORS.items()}
FOLDS = {name: fold for name, (_, fold) in AGGREGATORS.items()}


def keyed_rows(seed: int = 1) -> dict[str, Batch]:
    """Rows with keys of every kind; ``v`` has a value for each row, nulls among them in some."""
    random = np.random.default_rng(seed)
    words = [
        ["", "a", "\u00e9t\u00e9", "longer than eight bytes", "a\0b"][i] for i in random.integers(0, 5, N)
    ]
    floats = np.array([0.0, -0.0, 1.5, -2.5, np.nan, np.inf])[random.integers(0, 6, N)]
    v = random.integers(-9, 10, N)
    plain = {
        "small integers": {"k": random.integers(0, 7, N)},
        "negative and far apart": {"k": random.integers(-3, 3, N) * (2**61)},
        "int8": {"k": random.integers(-3, 3, N).astype(np.int8)},
        "bools": {"k": random.integers(0, 2, N) > 0},
        "floats": {"k": floats},
        "text": {"k": words},
        "two columns": {"k": random.integers(0, 3, N), "j": words},
        "float and bool": {"k": floats, "j": random.integers(0, 2, N) > 0},
        "all different": {"k": np.arange(N) * 7 - 100},
        "one key": {"k": np.full(N, 5)},
    }
    out = {name: Batch(**columns, v=v) for name, columns in plain.items()}
    out["nulls in the values"] = out["small integers"].with_valid(v=random.integers(0, 3, N) > 0)
    out["null keys"] = out["small integers"].with_valid(k=random.integers(0, 3, N) > 0)
    out["float values"] = Batch(k=v % 5, v=random.integers(-9, 10, N) / 4)
    return out


def dicts(batch: Batch) -> list[dict[str, Any]]:
    return [dict(zip(batch.names, row, strict=True)) for row in rows_here(batch)]


def assert_reduced(got: list[tuple[Any, ...]], rows: Batch, keys: tuple[str, ...]) -> None:
    wanted = oracle.reduced(dicts(rows), keys, FOLDS)
    found = {tuple(map(oracle.canonical, row[: len(keys)])): row[len(keys) :] for row in got}
    assert len(found) == len(got), "a key came twice"
    assert found.keys() == wanted.keys()
    for key, results in wanted.items():
        assert all(map(oracle.close, found[key], results)), (key, found[key], results)


def keys_in(rows: Batch) -> tuple[str, ...]:
    return tuple(n for n in rows.names if n != "v")


def check_a_shuffle_that_combines_is_a_group_by(group: Group) -> None:
    for rows in keyed_rows().values():
        keys = keys_in(rows)
        made = once(group, {"r": local(rows, group)}, Shuffle("r", keys, "t", REDUCE))
        assert_reduced(rows_of(group, made), rows, keys)


def check_a_total_is_a_group_by_that_all_ranks_know(group: Group) -> None:
    for name, rows in keyed_rows().items():
        keys = keys_in(rows)
        made = once(group, {"r": local(rows, group)}, Total("r", keys, REDUCE, "t"))
        assert made.everywhere
        got = rows_of(group, made)
        assert_reduced(got, rows, keys)
        if name in ("small integers", "negative and far apart", "text", "two columns"):
            assert [row[: len(keys)] for row in got] == sorted(row[: len(keys)] for row in got)


def check_a_total_without_a_key_is_one_row(group: Group) -> None:
    rows = int_rows(N, 5)
    made = once(
        group, {"r": local(rows, group)}, Total("r", (), {"x": ir.SUM, "n": ir.count(), "f": ir.MAX}, "t")
    )
    assert rows_of(group, made) == [(int(rows["x"].sum()), N, float(rows["f"].max()))]


def check_a_shuffle_of_rows_keeps_all_of_them_in_order(group: Group) -> None:
    for rows in keyed_rows().values():
        keys, n = keys_in(rows), len(rows)
        numbered = rows.with_columns(at=np.arange(n), pair=np.arange(2 * n).reshape(n, 2))
        got = dicts_of(group, once(group, {"r": local(numbered, group)}, Shuffle("r", keys, "t")))
        assert sorted(row["at"] for row in got) == list(range(n))
        assert all(row["pair"] == (2 * row["at"], 2 * row["at"] + 1) for row in got)
        wanted = oracle.grouped(dicts(numbered), keys)
        for key, found in oracle.grouped(got, keys).items():
            assert [row["at"] for row in found] == [row["at"] for row in wanted[key]]
            assert [row["v"] for row in found] == [row["v"] for row in wanted[key]]


def dicts_of(group: Group, made: Any) -> list[dict[str, Any]]:
    return [dict(zip(made.batch.names, row, strict=True)) for row in rows_of(group, made)]


def check_the_order_of_results_is_the_same_on_one_rank(group: Group) -> None:
    for rows in keyed_rows().values():
        keys = keys_in(rows)
        for stage in (
            Shuffle("r", keys, "t"),
            Shuffle("r", keys, "t", REDUCE),
            Total("r", keys, REDUCE, "t"),
            Gather("r", "t"),
        ):
            made = rows_of(group, once(group, {"r": local(rows, group)}, stage))
            solo = group_for(None)
            alone = rows_of(solo, once(solo, {"r": local(rows, solo)}, stage))
            assert len(made) == len(alone)
            assert all(oracle.close(a, b) for a, b in zip(made, alone, strict=True))


def check_each_key_lies_on_one_rank(group: Group) -> None:
    rows = int_rows(200, 40)
    ranks = by_rank(group, once(group, {"r": local(rows, group)}, Shuffle("r", ("k",), "t")).batch)
    keys = [distinct(rows) for rows in ranks]
    assert sum(map(len, keys)) == len(set.union(*keys)) == len(set(rows["k"].tolist()))


def check_gather_puts_rows_in_order(group: Group) -> None:
    for rows in keyed_rows().values():
        for ends in (None, all_on(group, len(rows), 1), all_on(group, len(rows), 0)):
            made = once(group, {"r": local(rows, group, ends)}, Gather("r", "t"))
            assert made.everywhere
            assert repr(rows_of(group, made)) == repr(rows_here(rows))


def check_one_rank_may_have_all_rows_or_few(group: Group) -> None:
    rows = int_rows(N, 7)
    few = int_rows(max(1, group.size - 1), 2)
    for given, ends in ((rows, all_on(group, N, 0)), (rows, all_on(group, N, group.size - 1)), (few, None)):
        for stage in (
            Shuffle("r", ("k",), "t", ir.SUM),
            Shuffle("r", ("k",), "t"),
            Total("r", ("k",), ir.SUM, "t"),
        ):
            got = rows_of(group, once(group, {"r": local(given, group, ends)}, stage))
            assert sum(row[1] for row in got) == int(given["x"].sum())
            assert distinct(got) == set(given["k"].tolist())


def check_a_map_may_drop_and_repeat_rows(group: Group) -> None:
    rows = int_rows(N, 9)

    def even(r: Batch) -> Batch:
        return r.take(r["x"] % 2 == 0)

    def twice(r: Batch) -> Batch:
        return r.take(np.repeat(np.arange(len(r)), 2))

    kept = [row for row in dicts(rows) if row["x"] % 2 == 0]
    wanted = {k: 2 * sum(row["x"] for row in g) for (k,), g in oracle.grouped(kept, ("k",)).items()}
    chain = (Local(even, ("r",), "a"), Local(twice, ("a",), "b"))
    for stage in (Shuffle("b", ("k",), "t", {"x": ir.SUM}), Total("b", ("k",), {"x": ir.SUM}, "t")):
        assert dict(rows_of(group, once(group, {"r": local(rows, group)}, *chain, stage))) == wanted


def check_rows_everywhere_count_once(group: Group) -> None:
    rows = int_rows(N, 5).select("k", "x")
    wanted = {k: sum(r["x"] for r in g) for (k,), g in oracle.grouped(dicts(rows), ("k",)).items()}
    for given in ({"r": rows}, {"s": local(rows, group)}):
        first = () if "r" in given else (Gather("s", "r"),)
        for stage in (Shuffle("r", ("k",), "t", ir.SUM), Total("r", ("k",), ir.SUM, "t")):
            assert dict(rows_of(group, once(group, given, *first, stage))) == wanted
            mapped = Local(lambda r: r.with_columns(x=r["x"] * 2), ("r",), "d")
            double = once(group, given, *first, mapped, Shuffle("d", ("k",), "t", ir.SUM))
            assert dict(rows_of(group, double)) == {k: 2 * x for k, x in wanted.items()}
        assert rows_of(group, once(group, given, *first, Gather("r", "t"))) == rows_here(rows)


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
