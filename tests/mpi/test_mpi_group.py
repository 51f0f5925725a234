"""What only a group over MPI has to keep: the caller's communicator, errors, memory of one node."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce.collectives as collectives
import iterreduce.windows as windows
from iterreduce.collectives import Group, MpiGroup, group_for
from iterreduce.errors import UsageError
from tests.collectives.contract import Exchange, check_a_plan_sends_what_stands_in_its_array, uneven

pytestmark = pytest.mark.mpi


@pytest.fixture
def mpi() -> Any:
    from mpi4py import MPI

    return MPI


def test_messages_of_the_caller_never_meet_ours(mpi: Any) -> None:
    comm = mpi.COMM_WORLD
    box = np.zeros(1, np.int64)
    waiting = comm.Irecv(box, mpi.ANY_SOURCE, mpi.ANY_TAG)  # would take any message sent on the communicator
    group = Group.from_comm(comm, max_words=2)  # small: everything goes from rank to rank
    exchange = Exchange(group, uneven(group.size) + 1)
    group.alltoallv(*exchange.args)
    exchange.assert_arrived()
    comm.Send(np.array([group.rank + 5]), (group.rank + 1) % group.size)
    waiting.Wait()
    assert box[0] == (group.rank - 1) % group.size + 5
    group.free()


def test_the_callers_error_handler_stays(mpi: Any) -> None:
    comm = mpi.COMM_WORLD.Dup()
    comm.Set_errhandler(mpi.ERRORS_ARE_FATAL)
    group = Group.from_comm(comm)
    assert comm.Get_errhandler() == mpi.ERRORS_ARE_FATAL
    group.free()
    comm.Free()


def test_a_communicator_is_duplicated_once_and_its_group_ends_with_it(mpi: Any) -> None:
    comm = mpi.COMM_WORLD.Dup()
    group = group_for(comm)
    assert group_for(comm) is group
    assert group_for(group) is group
    copy = comm.Dup()
    assert group_for(copy) is not group
    copy.Free()
    comm.Free()
    with pytest.raises(mpi.Exception):
        group.barrier()


def test_parts_of_the_world_work_at_the_same_time(mpi: Any) -> None:
    comm = mpi.COMM_WORLD
    part = comm.Split(comm.rank % 2, comm.rank)
    group = group_for(part)
    assert group.size == part.size
    exchange = Exchange(group, uneven(group.size))
    group.alltoallv(*exchange.args)
    exchange.assert_arrived()
    part.Free()


def test_what_is_no_communicator_of_this_rank_is_refused(mpi: Any) -> None:
    for wrong in (mpi.COMM_NULL, 3, "world"):
        with pytest.raises(UsageError):
            group_for(wrong)


def test_an_intercommunicator_is_refused(mpi: Any) -> None:
    comm = mpi.COMM_WORLD
    if comm.size == 1:
        return  # takes two ranks to make one
    half = comm.Split(comm.rank == 0)
    inter = half.Create_intercomm(0, comm, 1 if comm.rank == 0 else 0)
    with pytest.raises(UsageError, match="intracommunicator"):
        group_for(inter)
    inter.Free()
    half.Free()


def test_the_library_is_named(group: Group, mpi: Any) -> None:
    vendor, version = mpi.get_vendor()
    assert group.library == f"{vendor} {'.'.join(map(str, version))}"
    assert group.name == "mpi"


def test_nothing_is_pickled(group: Group, mpi: Any) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("an object was about to travel")

    mpi.pickle.__init__(refuse, refuse)
    try:
        group.allgather_bytes(b"x" * group.rank)
        group.bcast_bytes(b"xyz")
        window = group.window(4)
        assert window is not None
        window.free()
        part = group.split(0)
        assert part is not None
        part.free()
    finally:
        mpi.pickle.__init__()


def test_errors_of_mpi_are_raised_and_end_nothing(group: Group, mpi: Any) -> None:
    other = group.duplicate()
    other.free()
    with pytest.raises(mpi.Exception):
        other.barrier()
    group.barrier()


def test_plans_end_with_their_group_or_before_or_after(group: Group) -> None:
    other = group.duplicate()
    plans = [other.alltoallv_plan(*Exchange(other, uneven(group.size)).args) for _ in range(3)]
    plans[0].free()
    other.free()
    plans[1].free()
    del plans


def test_plans_work_without_persistent_collectives(mpi: Any) -> None:
    class Old(mpi.Intracomm):  # type: ignore[misc]
        def Alltoallv_init(self, *args: object) -> None:
            raise NotImplementedError

    group = MpiGroup(Old(mpi.COMM_WORLD.Dup()))
    check_a_plan_sends_what_stands_in_its_array(group)
    group.free()


def test_there_is_no_window_where_shared_memory_is_short_on_one_rank(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 0 if group.rank == 0 else 2**40
    monkeypatch.setattr(collectives, "shared_bytes_free", lambda: room)
    assert group.window(10) is None


def test_there_is_no_window_larger_than_shared_memory(group: Group) -> None:
    assert group.window(2**55) is None


def test_there_is_no_window_over_several_nodes(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "node_name", lambda: group.rank % 2)
    if group.size > 1:
        assert group.window(10) is None
    assert group.node_ranks() == len(range(group.rank % 2, group.size, 2))


def test_there_is_no_window_where_one_rank_cannot_make_its_file(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    if group.rank == group.size - 1:
        monkeypatch.setattr(windows, "SHARED", "/nowhere")
    monkeypatch.setattr(collectives, "node_name", lambda: 1)
    assert group.window(10) is None
    assert not list(Path("/dev/shm").glob(f"{windows.NAME}*-{os.getpid()}-*"))


def test_the_file_of_a_rank_that_was_killed_goes_and_those_of_others_stay(
    tmp_path: Path, group: Group
) -> None:
    me, gone = f"{windows.NAME}{os.getuid()}", 2**22 + 1  # beyond the largest number of a process
    kept = [f"{me}-{os.getpid()}-ab", f"{windows.NAME}{os.getuid() + 1}-{gone}-ab", "another"]
    for name in [*kept, f"{me}-{gone}-ab"]:
        (tmp_path / name).touch()
    windows.remove_orphans(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_windows_files_have_lost_their_names(group: Group) -> None:
    window = group.window(1000)
    assert window is not None
    assert not list(Path("/dev/shm").glob(f"{windows.NAME}*-{os.getpid()}-*"))
    window.mine[:] = 1
    window.free()


def test_another_thread_may_make_a_group_where_the_host_allows_it(mpi: Any) -> None:
    """pytest's MPI plug-in initialises with THREAD_MULTIPLE; see the start-up tests for the other case."""
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        return
    made: list[Group] = []
    thread = threading.Thread(target=lambda: made.append(Group.from_comm(mpi.COMM_WORLD)))
    thread.start()
    thread.join()
    assert made[0].agree_max(made[0].rank) == made[0].size - 1
    made[0].free()


def test_a_bound_below_the_limit_of_counts_is_the_callers_word(mpi: Any) -> None:
    """Without a bound one reduction agrees on the way; with one, nothing but the exchange is sent."""
    group = Group.from_comm(mpi.COMM_WORLD)
    exchange = Exchange(group, uneven(group.size))
    group.alltoallv(*exchange.args)
    assert group.traffic.collectives == 2
    group.traffic.reset()
    group.alltoallv(*exchange.args, bound_words=exchange.send.size + exchange.recv.size + 10_000)
    assert group.traffic.collectives == 1
    group.free()
