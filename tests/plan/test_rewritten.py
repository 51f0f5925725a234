"""Plans drawn at random, rewritten and as written: the same rows; and explained without an error."""

from __future__ import annotations

from hypothesis import given, settings

from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.plan.planning import to_loop
from iterreduce.testing import run_ranks
from tests.plan import oracle
from tests.plan.kit import Table, Tables, answer
from tests.plan.oracle import Rows
from tests.plan.test_generated import CODES, Code, plan_of, tables


@settings(max_examples=50, deadline=None)
@given(tables(), CODES)
def test_rewrites_change_no_row(rows: dict[str, Table], codes: list[Code]) -> None:
    build = plan_of(codes)

    def work(group: Group) -> tuple[Rows, Rows]:
        made = build(Tables(rows, group))
        loops = (to_loop(made.node, group, optimize=optimize) for optimize in (True, False))
        better, plain = (answer(group, Dataset.of_loop(loop)) for loop in loops)
        return better, plain

    for size in (1, 2):
        better, plain = run_ranks(size, work)[0]
        oracle.same_rows(better, plain)


@settings(max_examples=50, deadline=None)
@given(tables(), CODES)
def test_every_plan_is_told_alike_on_all_ranks(rows: dict[str, Table], codes: list[Code]) -> None:
    build = plan_of(codes)

    def work(group: Group) -> str:
        return build(Tables(rows, group)).explain(group)

    one, two = run_ranks(1, work), run_ranks(2, work)
    assert set(two) == set(one)
    assert one[0].startswith("plan as written\n")
