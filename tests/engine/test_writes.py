"""Tables written in place, on threads as ranks (see `checks_writes`), and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import (
    Accumulate,
    Insert,
    Local,
    Lookup,
    Loop,
    Patch,
    Remove,
    Replace,
    Shuffle,
    State,
    Superstep,
    Write,
)
from iterreduce.testing import run_ranks
from tests.engine import checks_writes
from tests.engine.kit import Check, local, rows_of, started


@pytest.mark.parametrize(
    "check", checks_writes.CHECKS, ids=lambda check: check.__name__.removeprefix("check_")
)
def test_writes(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)


# ---------------------------------------------------------------------- any sequence of writes

WRITES: dict[str, Callable[[str], Write]] = {
    "patch": lambda rows: Patch("s", rows),
    "add": lambda rows: Accumulate("s", rows, {"x": ir.SUM}),
    "insert": lambda rows: Insert("s", rows),
    "remove": lambda rows: Remove("s", rows),
}
KINDS: dict[str, Callable[[int], Any]] = {
    "near": lambda i: i,
    "far": lambda i: i * 10**15 - 7,
    "text": lambda i: f"key {i}",
}
Ops = list[tuple[str, list[tuple[int, int]]]]


@st.composite
def sequences(draw: Any) -> tuple[list[int], Ops]:
    """Keys of a first table, and writes that name keys it has, or lacks, as they should."""
    first = draw(st.lists(st.integers(0, 12), unique=True, max_size=9))
    keys, ops = set(first), []
    for _ in range(draw(st.integers(1, 6))):
        op = draw(st.sampled_from(list(WRITES)))
        known = st.sampled_from(sorted(keys)) if keys else st.nothing()
        if op == "insert":
            chosen = draw(st.lists(st.integers(0, 20), unique=True, max_size=4))
            named = [k for k in chosen if k not in keys]
        else:
            named = draw(st.lists(known, unique=op != "add", max_size=5)) if keys else []
        keys = keys | set(named) if op == "insert" else keys - set(named) if op == "remove" else keys
        ops.append((op, [(k, draw(st.integers(-9, 9))) for k in named]))
    return first, ops


def model_of(first: list[int], ops: Ops) -> list[dict[int, float]]:
    """The table after every write."""
    table, out = {k: float(k) for k in first}, []
    for op, rows in ops:
        table = dict(table)
        for k, x in rows:
            if op == "remove":
                del table[k]
            else:
                table[k] = table[k] + x if op == "add" else float(x)
        out.append(table)
    return out


def keyed(name: Callable[[int], Any], rows: Sequence[tuple[int, float]]) -> Batch:
    """Rows (k, x) as columns."""
    keys = [name(k) for k, _ in rows]
    empty = Batch(k=["a"]).slice(0, 0)["k"] if isinstance(name(0), str) else np.zeros(0, np.int64)
    return Batch(k=keys if keys else empty, x=np.array([x for _, x in rows], np.float64))


def sequence_loop(group: Group, kind: str, first: list[int], ops: Ops) -> Loop:
    """One superstep per write, then one that looks all keys up, all of it twice if there is a next time."""
    name, body, sources = (
        KINDS[kind],
        [],
        {"first": local(keyed(KINDS[kind], [(k, k) for k in first]), group)},
    )
    for i, (op, rows) in enumerate(ops):
        given_rows = keyed(name, rows)
        sources[f"rows {i}"] = local(given_rows.drop("x") if op == "remove" else given_rows, group)
        shuffle = Shuffle(f"rows {i}", ("k",), f"owned {i}")
        look = Lookup("all", ("k",), "s", ("x",), f"seen {i}", "null")
        body.append(Superstep(f"{op} {i}", (shuffle,), (WRITES[op](f"owned {i}"),)))
        body.append(Superstep(f"look {i}", (look,), (Replace(f"out {i}", f"seen {i}"),)))
    sources["all"] = local(keyed(name, [(k, 0.0) for k in range(22)]).drop("x"), group)
    last = Superstep("trip", (Local(lambda s: s, ("s",), "t", "share"),), ())
    state = {"s": State("first", ("k",)), **{f"out {i}": State("all") for i in range(len(ops))}}
    until = Until((ir.l1("x") <= -0.0, MaxIterations(1)))
    return Loop("sequence", sources, state, (*body, last), until.on("s"), "s")


@given(sequences(), st.sampled_from(sorted(KINDS)), st.sampled_from([1, 2, 3]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_writes_and_lookups_does_what_a_dictionary_does(
    sequence: tuple[list[int], Ops], kind: str, ranks: int, naive: bool
) -> None:
    first, ops = sequence
    tables = model_of(first, ops)

    def work(group: Group) -> None:
        run = started(sequence_loop(group, kind, first, ops), group, naive=naive)
        run.advance()
        name = KINDS[kind]
        for i, table in enumerate(tables):
            wanted = sorted((name(k), table.get(k)) for k in range(22))
            assert sorted(rows_of(group, run.tables[f"out {i}"])) == wanted, i
        end = sorted((name(k), x) for k, x in tables[-1].items())
        assert sorted(rows_of(group, run.tables["s"])) == end
        before = {k: float(k) for k in first}
        moved = sum(abs(tables[-1].get(k, 0.0) - before.get(k, 0.0)) for k in {*before, *tables[-1]})
        assert run.residual == moved

    run_ranks(ranks, work)
