"""Memory on threads as ranks (see `checks_memory`), and accounts against what Python's allocator knows."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.loop import Loop
from iterreduce.memory import Accounts
from iterreduce.sources import LocalSource
from iterreduce.testing import run_ranks
from tests.engine import checks_memory
from tests.engine.checks_links import graph, program
from tests.engine.checks_memory import by_key
from tests.engine.kit import Check, int_rows


@pytest.mark.parametrize(
    "check", checks_memory.CHECKS, ids=lambda check: check.__name__.removeprefix("check_")
)
def test_memory(check: Check, ranks: int) -> None:
    run_ranks(ranks, check)


def links() -> Loop:
    return program(LocalSource(graph(n=60_000)), {"x": ir.sum("x")}, iterations=9)


def sums(vary: bool = False) -> Loop:
    return by_key(SoloGroup(), vary, LocalSource(int_rows(60_000, 20_000)), most=9)


@pytest.mark.parametrize("make", [links, sums, lambda: sums(vary=True)], ids=["links", "sums", "varying"])
def test_accounts_hold_all_arrays_that_the_allocator_knows_of(make: object) -> None:
    LoopRun(make(), SoloGroup()).run()  # type: ignore[operator]
    gc.collect()
    tracemalloc.start()
    try:
        run = LoopRun(make(), SoloGroup())  # type: ignore[operator]
        for _ in range(4):
            run.advance()
        gc.collect()
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        taken = tracemalloc.take_snapshot().filter_traces([arrays])
    finally:
        tracemalloc.stop()
    known = sum(trace.size for trace in taken.traces)
    assert known > 1 << 20
    assert abs(run.memory().total - known) < known / 50 + 20_000


def test_an_array_stands_in_one_account_with_all_the_memory_behind_it() -> None:
    whole = np.zeros(1000)
    accounts = Accounts()
    accounts.count("a part", Batch(x=whole[:10]))
    accounts.count("the rest", {"x": [whole, whole[5:]], "y": np.frombuffer(bytes(64), np.int64)})
    assert accounts.report() == {"a part": 8000, "the rest": 64}


def test_no_way_leads_through_what_is_left_out_or_is_user_code() -> None:
    batch, accounts = Batch(x=np.zeros(8)), Accounts()

    class Theirs:
        def __init__(self) -> None:
            self.array = np.zeros(8)

    accounts.leave_out(batch)
    accounts.count("all", batch, Theirs(), None, "text", 3, lambda: batch)
    assert accounts.total == 0
