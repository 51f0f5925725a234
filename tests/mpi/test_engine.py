"""The checks of the engine on real ranks: the same that thread ranks pass in `tests/engine`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.collectives import Group, group_for
from iterreduce.columns.batch import Batch
from iterreduce.loop import Shuffle
from tests.engine import (
    checks_answers,
    checks_carry,
    checks_columns,
    checks_failures,
    checks_iterate,
    checks_library,
    checks_nested,
    checks_nested_failures,
    checks_other_failures,
    checks_programs,
    checks_schedule,
    checks_traffic,
    test_fixpoint,
)
from tests.engine.kit import Check, int_rows, once, raised, rows_of, share

pytestmark = pytest.mark.mpi

MODULES = (
    checks_answers,
    checks_carry,
    checks_columns,
    checks_iterate,
    checks_programs,
    checks_schedule,
    checks_traffic,
    checks_failures,
    checks_other_failures,
    checks_library,
    checks_nested,
    checks_nested_failures,
    test_fixpoint,
)
CHECKS = [check for module in MODULES for check in module.CHECKS]


@pytest.mark.parametrize(
    "check", CHECKS, ids=lambda check: f"{check.__module__.rpartition('_')[2]}-{check.__name__[6:]}"
)
def test_on_real_ranks(check: Check, group: Group) -> None:
    check(group)


@pytest.fixture
def mpi() -> Any:
    from mpi4py import MPI

    return MPI


def test_a_loop_on_a_callers_communicator_leaves_its_messages_alone(mpi: Any) -> None:
    comm = mpi.COMM_WORLD.Dup()
    box = np.zeros(3)
    waiting = comm.Irecv(box, mpi.ANY_SOURCE, mpi.ANY_TAG)
    rows = int_rows(50, 7)
    part = share(rows, group_for(comm))
    sums = ir.MapReduce(map=lambda r: ir.Batch(k=r["k"], x=r["x"]), reduce=ir.SUM, key="k")
    got = sums(ir.Dataset.from_local(comm, k=part["k"], x=part["x"])).collect()
    assert dict(zip(got["k"].tolist(), got["x"].tolist(), strict=True)) == {
        k: int(rows["x"][rows["k"] == k].sum()) for k in set(rows["k"].tolist())
    }
    assert not waiting.Test()
    group_for(comm).barrier()
    comm.Send(np.full(3, comm.rank + 1.0), (comm.rank + 1) % comm.size)
    waiting.Wait()
    assert box.tolist() == [(comm.rank - 1) % comm.size + 1.0] * 3
    comm.Free()


def test_the_callers_communicator_works_after_user_code_failed(mpi: Any) -> None:
    comm = mpi.COMM_WORLD.Dup()
    group = group_for(comm)

    def bad(r: Batch) -> Batch:
        raise SystemExit(7) if comm.rank == comm.size - 1 else ValueError("no")

    for _ in range(3):
        source = ir.Dataset.from_local(comm, k=np.arange(4), x=np.arange(4))
        raised(group, ir.UserCodeError, ir.MapReduce(map=bad, reduce=ir.SUM, key="k")(source).run)
    assert comm.allreduce(1) == comm.size
    result = once(
        group, {"r": Batch(k=np.arange(9) % 3, x=np.ones(9, np.int64))}, Shuffle("r", ("k",), "t", ir.SUM)
    )
    assert sorted(rows_of(group, result)) == [(0, 3), (1, 3), (2, 3)]
    comm.Free()


def test_loops_on_parts_of_the_world_end_at_different_times(mpi: Any) -> None:
    comm = mpi.COMM_WORLD
    part = comm.Split(comm.rank % 2, comm.rank)
    group = group_for(part)
    checks_library.check_runs_advance_in_turns(group)
    if comm.rank % 2:
        checks_library.check_a_loop_can_be_run_again(group)
    comm.Barrier()
    part.Free()
