"""Ranks as threads: what they do when ranks do not fit together, fail or hang."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterreduce.collectives import Group
from iterreduce.errors import ScheduleError, UsageError
from iterreduce.testing import RanksTimedOut, ThreadRanksBroken, run_ranks


def on_each(ranks: int, function: Callable[[Group], object]) -> list[BaseException | None]:
    """What each rank raised."""
    raised: list[BaseException | None] = [None] * ranks

    def note(group: Group) -> None:
        try:
            function(group)
        except BaseException as error:
            raised[group.rank] = error
            raise

    with contextlib.suppress(Exception):
        run_ranks(ranks, note, timeout=20)
    return raised


def test_results_come_in_rank_order_with_all_arguments(ranks: int) -> None:
    def work(group: Group, start: int, *, step: int) -> int:
        return start + step * group.rank

    assert run_ranks(ranks, work, 10, step=2) == list(range(10, 10 + 2 * ranks, 2))


def test_no_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="0 ranks"):
        run_ranks(0, lambda group: None)


def send_to_one_who_expects_less(group: Group) -> None:
    every = [2] * group.size
    expected = [2] * group.size
    if group.rank == 1:
        expected[0] = 1
    send, recv = np.zeros(2 * group.size), np.zeros(2 * group.size)
    group.alltoallv(send, every, None, recv, expected, None)


def uneven_shares(group: Group) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Every rank believes that it alone brings two words."""
    counts = [1] * group.size
    counts[group.rank] = 2
    return np.zeros(2), np.zeros(sum(counts)), counts


MISFITS: dict[str, tuple[Callable[[Group], object], list[str]]] = {
    "other collectives": (
        lambda group: group.barrier() if group.rank == 1 else group.allreduce(np.zeros(3, np.int64), "max"),
        ["rank 0 is in allreduce #1 (op max, words 3)", "rank 1 in barrier #1"],
    ),
    "other lengths": (
        lambda group: group.allgather(np.zeros(group.rank + 1), np.zeros((group.rank + 1) * group.size)),
        ["rank 0 is in allgather #1 (words 1, dtype float64)", "rank 1 in allgather #1 (words 2,"],
    ),
    "other dtypes": (
        lambda group: group.bcast(np.zeros(2, np.int64 if group.rank else np.float64), 0),
        ["dtype float64", "dtype int64"],
    ),
    "other roots": (lambda group: group.bcast(np.zeros(1), group.rank), ["root 0", "root 1"]),
    "other folds": (
        lambda group: group.allreduce(np.zeros(1), "max" if group.rank else "min"),
        ["op min", "op max"],
    ),
    "other counts": (
        lambda group: group.allgatherv(*uneven_shares(group)),
        ["rank 0 is in allgatherv #1 (counts [2, 1", "rank 1 in allgatherv #1 (counts [1, 2"],
    ),
    "counts that do not fit": (
        send_to_one_who_expects_less,
        ["rank 0 sends 2 words to rank 1, which expects 1"],
    ),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("size", [2, 5])
def test_ranks_that_do_not_fit_all_learn_who_called_what(name: str, size: int) -> None:
    function, texts = MISFITS[name]
    raised = on_each(size, function)
    assert all(isinstance(error, ScheduleError) for error in raised)
    for text in texts:
        assert text in str(raised[0])
    assert len({str(error) for error in raised}) == 1


def test_a_rank_that_fails_ends_the_waiting_of_the_others(ranks: int) -> None:
    def work(group: Group) -> None:
        group.barrier()
        if group.rank == ranks - 1:
            raise ValueError("broken on purpose")
        group.barrier()

    raised = on_each(ranks, work)
    assert isinstance(raised[-1], ValueError)
    for rank, error in enumerate(raised[:-1]):
        assert isinstance(error, ThreadRanksBroken)
        assert f"rank {rank} is in barrier" in str(error)
        assert f"rank {ranks - 1} ended with ValueError: broken on purpose" in str(error)
    with pytest.raises(ValueError, match="broken on purpose") as caught:
        run_ranks(ranks, work)
    assert f"raised on rank {ranks - 1} of {ranks}" in caught.value.__notes__[0]


def test_the_lowest_failing_rank_speaks_and_the_others_are_noted() -> None:
    def work(group: Group) -> None:
        if group.rank:
            raise KeyError(group.rank)
        group.barrier()

    with pytest.raises(KeyError, match="1") as caught:
        run_ranks(4, work)
    assert caught.value.__notes__[0].startswith("raised on rank 1 of 4")


def test_an_error_made_of_the_others_end_is_not_taken_for_the_reason() -> None:
    def work(group: Group) -> None:
        if group.rank == 1:
            raise OSError("the reason")
        try:
            group.barrier()
        except ThreadRanksBroken as broken:
            raise RuntimeError("made of it") from broken

    with pytest.raises(OSError, match="the reason"):
        run_ranks(3, work)


def test_a_rank_that_returns_early_is_found_by_those_who_wait() -> None:
    raised = on_each(3, lambda group: group.rank == 1 or group.barrier())
    assert raised[1] is None
    for rank in (0, 2):
        assert isinstance(raised[rank], ScheduleError)
        assert "in barrier #1, but rank 1 has ended and will not come" in str(raised[rank])


def test_ranks_that_wait_for_ever_are_ended_and_shown() -> None:
    def a_long_nap(group: Group) -> None:
        if group.rank == 1:
            time.sleep(1.5)
        group.barrier()

    with pytest.raises(RanksTimedOut) as caught:
        run_ranks(2, a_long_nap, timeout=0.3)
    assert "rank 0 is in barrier #1 of world" in str(caught.value)
    assert "rank 1 has called no collective yet" in str(caught.value)
    assert "time.sleep(1.5)" in str(caught.value)


def test_ranks_that_wait_in_different_groups_are_shown() -> None:
    def cross(group: Group) -> None:
        other = group.duplicate()
        (group if group.rank else other).barrier()

    with pytest.raises(RanksTimedOut) as caught:
        run_ranks(2, cross, timeout=0.3)
    assert "rank 0 is in barrier #1 of world/copy 1" in str(caught.value)
    assert "rank 1 is in barrier #2 of world" in str(caught.value)


def test_a_failure_in_one_part_reaches_the_other_parts() -> None:
    def work(group: Group) -> None:
        part = group.split(group.rank % 2)
        assert part is not None
        if group.rank == 3:
            raise ValueError("in one part")
        part.barrier()
        part.barrier()
        group.barrier()

    with pytest.raises(ValueError, match="in one part"):
        run_ranks(4, work)


def test_segments_received_must_not_overlap() -> None:
    def work(group: Group) -> None:
        every = [2] * group.size
        group.alltoallv(np.zeros(4), every, None, np.zeros(4), every, [0, 1])

    with pytest.raises(UsageError, match="overlap at 1"):
        run_ranks(2, work)


def test_bounds_that_are_not_agreed_are_found() -> None:
    def work(group: Group) -> None:
        every = [1] * group.size
        group.alltoallv(np.zeros(2), every, None, np.zeros(2), every, None, bound_words=9 + group.rank)

    with pytest.raises(ScheduleError, match=r"bound 9.*bound 10"):
        run_ranks(2, work)


def test_a_freed_group_is_not_used() -> None:
    def work(group: Group) -> None:
        other = group.duplicate()
        other.free()
        other.barrier()

    with pytest.raises(UsageError, match="barrier on a group that was freed"):
        run_ranks(2, work)


@given(size=st.integers(1, 5), data=st.data())
def test_what_is_sent_there_and_back_is_what_was_there(size: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(0, 6), min_size=size, max_size=size)
    table = np.array(data.draw(st.lists(row, min_size=size, max_size=size)))

    def there_and_back(group: Group) -> None:
        mine, theirs = table[group.rank], table[:, group.rank]
        send = np.random.default_rng(group.rank).integers(-(2**62), 2**62, mine.sum())
        there, back = np.zeros(theirs.sum(), np.int64), np.zeros_like(send)
        group.alltoallv(send, mine, None, there, theirs, None)
        group.alltoallv(there, theirs, None, back, mine, None)
        np.testing.assert_array_equal(back, send)

    run_ranks(size, there_and_back)


def test_exceptions_of_pytest_itself_come_through() -> None:
    with pytest.raises(pytest.fail.Exception, match="said so"):
        run_ranks(2, lambda group: pytest.fail("said so"))
