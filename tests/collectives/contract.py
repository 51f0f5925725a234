"""What every kind of group does: threads, one rank alone and MPI run the same checks.

A check is called by all ranks of a group and compares with a table that every rank can work out for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from iterreduce.collectives import Group
from iterreduce.errors import UsageError
from iterreduce.words import Traffic

UNTOUCHED = -77


def words_of(rank: int, words: int, dtype: type = np.int64) -> np.ndarray:
    """Words that tell their rank and place."""
    return (np.arange(words) + 1000 * (rank + 1)).astype(dtype)


def segment(source: int, to: int, words: int, dtype: type = np.int64) -> np.ndarray:
    """What rank `source` sends to rank `to`."""
    return (np.arange(words) + 100 * to + 10_000 * (source + 1)).astype(dtype)


def scattered(counts: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """Displacements with the segments in any order and gaps between them, and the length they need."""
    random = np.random.default_rng(seed)
    displs, at = np.zeros(len(counts), np.int64), 0
    for rank in random.permutation(len(counts)):
        at += int(random.integers(0, 3))
        displs[rank] = at
        at += int(counts[rank])
    return displs, at + int(random.integers(0, 3))


class Exchange:
    """An alltoallv with scattered segments, and what must come of it."""

    def __init__(self, group: Group, table: np.ndarray, dtype: type = np.int64, seed: int = 0) -> None:
        rank = group.rank
        self.dtype, self.rank, self.size = dtype, rank, group.size
        self.send_counts, self.recv_counts = table[rank], table[:, rank]
        self.send_displs, words = scattered(self.send_counts, seed + rank)
        self.send = np.full(words, 5, dtype)
        self.recv_displs, words = scattered(self.recv_counts, seed + 50 + rank)
        self.recv = np.full(words, UNTOUCHED, dtype)
        self.fill(0)

    def fill(self, shift: int) -> None:
        self.shift = shift
        for to, (count, at) in enumerate(zip(self.send_counts, self.send_displs, strict=True)):
            self.send[at : at + count] = segment(self.rank, to, count, self.dtype) + shift

    @property
    def args(self) -> tuple[Any, ...]:
        sent = (self.send, self.send_counts, self.send_displs)
        return (*sent, self.recv, self.recv_counts, self.recv_displs)

    def assert_arrived(self) -> None:
        wanted = np.full(self.recv.size, UNTOUCHED, self.dtype)
        for source, (count, at) in enumerate(zip(self.recv_counts, self.recv_displs, strict=True)):
            wanted[at : at + count] = segment(source, self.rank, count, self.dtype) + self.shift
        np.testing.assert_array_equal(self.recv, wanted)


def uneven(size: int) -> np.ndarray:
    """Words from each rank (row) to each (column): some none, some many."""
    source, to = np.indices((size, size))
    return (source * 3 + to * 5) % 7 * ((source + to) % 3 != 1)


def check_allgather_puts_the_ranks_in_order(group: Group) -> None:
    for dtype in (np.int64, np.float64):
        for words in (0, 1, 4):
            recv = np.full(group.size * words, UNTOUCHED, dtype)
            group.allgather(words_of(group.rank, words, dtype), recv)
            wanted = [words_of(rank, words, dtype) for rank in range(group.size)]
            np.testing.assert_array_equal(recv, np.concatenate(wanted))


def check_allgatherv_takes_shares_of_any_length(group: Group) -> None:
    counts = np.arange(group.size) * 2 % 5
    parts = [words_of(rank, count) for rank, count in enumerate(counts)]
    recv = np.full(counts.sum(), UNTOUCHED)
    group.allgatherv(parts[group.rank], recv, counts)
    np.testing.assert_array_equal(recv, np.concatenate(parts))


def check_allgatherv_leaves_the_gaps_alone(group: Group) -> None:
    counts = (np.arange(group.size) + 1) % 4
    displs, words = scattered(counts, seed=group.rank)
    recv, wanted = np.full(words, UNTOUCHED), np.full(words, UNTOUCHED)
    group.allgatherv(words_of(group.rank, counts[group.rank]), recv, counts.tolist(), displs.tolist())
    for rank, (count, at) in enumerate(zip(counts, displs, strict=True)):
        wanted[at : at + count] = words_of(rank, count)
    np.testing.assert_array_equal(recv, wanted)


def check_alltoall_is_a_transpose(group: Group) -> None:
    for dtype in (np.int64, np.float64):
        for words in (0, 1, 3):
            send = [segment(group.rank, to, words, dtype) for to in range(group.size)]
            recv = np.full(group.size * words, UNTOUCHED, dtype)
            group.alltoall(np.concatenate(send), recv)
            wanted = [segment(source, group.rank, words, dtype) for source in range(group.size)]
            np.testing.assert_array_equal(recv, np.concatenate(wanted))


def check_alltoallv_moves_every_segment_to_its_place(group: Group) -> None:
    for dtype in (np.int64, np.float64):
        exchange = Exchange(group, uneven(group.size), dtype)
        group.alltoallv(*exchange.args)
        exchange.assert_arrived()


def check_alltoallv_packs_without_displacements(group: Group) -> None:
    table = uneven(group.size) + 1
    mine, theirs = table[group.rank], table[:, group.rank]
    send = np.concatenate([segment(group.rank, to, count) for to, count in enumerate(mine)])
    recv = np.full(theirs.sum(), UNTOUCHED)
    group.alltoallv(send, mine, None, recv, theirs, None)
    wanted = [segment(source, group.rank, count) for source, count in enumerate(theirs)]
    np.testing.assert_array_equal(recv, np.concatenate(wanted))


def check_alltoallv_with_an_agreed_bound_does_the_same(group: Group) -> None:
    exchange = Exchange(group, uneven(group.size))
    group.alltoallv(*exchange.args, bound_words=1000)
    exchange.assert_arrived()


def check_alltoallv_of_nothing_returns(group: Group) -> None:
    nothing = np.zeros(0, np.int64)
    zeros = [0] * group.size
    group.alltoallv(nothing, zeros, zeros, nothing.copy(), zeros, zeros)


def check_nothing_may_be_sent_from_where_others_receive(group: Group) -> None:
    """Both sides are slices of one array; rank 0 only sends."""
    counts = [0, *[3] * (group.size - 1)] if group.rank == 0 else [0] * group.size
    come = [3 * (group.rank > 0), *[0] * (group.size - 1)]
    both = np.arange(sum(counts) + sum(come))
    group.alltoallv(both[: sum(counts)], counts, None, both[sum(counts) :], come, None)
    group.barrier()
    if group.rank:
        assert both.tolist() == list(range(3 * group.rank - 3, 3 * group.rank))


def check_random_exchanges_arrive(group: Group) -> None:
    for seed in range(12):
        random = np.random.default_rng(seed)
        square = (group.size, group.size)
        table = random.integers(0, 12, square) * random.integers(0, 2, square)
        exchange = Exchange(group, table, seed=100 * seed)
        group.alltoallv(*exchange.args)
        exchange.assert_arrived()


def check_a_plan_sends_what_stands_in_its_array(group: Group) -> None:
    exchange = Exchange(group, uneven(group.size), np.float64)
    plan = group.alltoallv_plan(*exchange.args)
    for shift in (0, 7, 70_000):
        exchange.fill(shift)
        plan.run()
        exchange.assert_arrived()
    plan()
    assert plan.epoch == group.epoch
    plan.free()
    plan.free()


def check_an_allgather_plan_sends_what_stands_in_its_array(group: Group) -> None:
    send, recv = words_of(group.rank, 3, np.float64), np.zeros(3 * group.size)
    plan = group.allgather_plan(send, recv, header_words=1)
    for _ in range(3):
        plan.run()
        send += 0.5
    wanted = np.concatenate([words_of(rank, 3, np.float64) for rank in range(group.size)]) + 1
    np.testing.assert_array_equal(recv, wanted)


def check_many_plans_live_side_by_side(group: Group) -> None:
    exchanges = [Exchange(group, uneven(group.size) + i, seed=i) for i in range(5)]
    plans = [group.alltoallv_plan(*exchange.args) for exchange in exchanges]
    for exchange, plan in list(zip(exchanges, plans, strict=True))[::-1]:
        plan.run()
        exchange.assert_arrived()


def check_allreduce_folds_integers(group: Group) -> None:
    shares = [np.array([rank - 3, 2**40 * (rank + 1), 1 << rank, -rank, 0]) for rank in range(group.size)]
    folds: dict[str, Callable[[Any], Any]] = {
        "sum": lambda x: np.sum(x, axis=0),
        "min": lambda x: np.min(x, axis=0),
        "max": lambda x: np.max(x, axis=0),
        "or": lambda x: np.bitwise_or.reduce(x, axis=0),
    }
    for op, fold in folds.items():
        mine = shares[group.rank].copy()
        group.allreduce(mine, op)
        np.testing.assert_array_equal(mine, fold(shares), err_msg=op)


def check_allreduce_finds_float_extremes(group: Group) -> None:
    extremes = [-np.inf, np.inf, 0.0]
    shares = [np.array([rank * 0.5 - 1, 1e-310 * rank, -2.0 - rank, *extremes]) for rank in range(group.size)]
    for op, fold in (("min", np.min), ("max", np.max)):
        mine = shares[group.rank].copy()
        group.allreduce(mine, op)
        np.testing.assert_array_equal(mine, fold(shares, axis=0), err_msg=op)


def check_a_nan_on_any_rank_wins_everywhere(group: Group) -> None:
    """MPI itself would leave another answer on each rank, and the ranks would part ways."""
    for op in ("min", "max"):
        for bad in (np.nan, -np.nan):
            mine = np.array([float(group.rank), np.inf, -np.inf, 0.0])
            mine[group.rank % 3] = bad
            group.allreduce(mine, op)
            np.testing.assert_array_equal(np.isnan(mine), np.arange(4) < min(group.size, 3))
            assert_same_everywhere(group, mine)


def check_negative_zero_is_below_zero(group: Group) -> None:
    for op in ("min", "max"):
        mine = np.array([-0.0 if group.rank % 2 else 0.0])
        group.allreduce(mine, op)
        assert bool(np.signbit(mine[0])) == (op == "min" and group.size > 1)


def assert_same_everywhere(group: Group, array: np.ndarray) -> None:
    bits = array.view(np.int64).copy()
    every = np.zeros(group.size * bits.size, np.int64)
    group.allgather(bits, every)
    assert (every.reshape(group.size, -1) == bits).all()


def check_bcast_comes_from_any_root(group: Group) -> None:
    for root in range(group.size):
        array = words_of(group.rank, 5, np.float64)
        group.bcast(array, root)
        np.testing.assert_array_equal(array, words_of(root, 5, np.float64))


def check_bytes_of_any_length_travel(group: Group) -> None:
    for length in (0, 1, 7, 8, 9, 100):
        data = bytes(range(length))
        root = length % group.size
        assert group.bcast_bytes(data if group.rank == root else None, root) == data
    mine = b"rank %d" % group.rank * (group.rank % 4)
    assert group.allgather_bytes(mine) == [b"rank %d" % rank * (rank % 4) for rank in range(group.size)]


def check_ranks_agree(group: Group) -> None:
    assert group.agree_max(-5 - group.rank) == -5
    assert group.agree_any(group.rank == group.size - 1)
    assert not group.agree_any(False)


def check_split_makes_groups_by_color_ordered_by_key(group: Group) -> None:
    part = group.split(group.rank % 2, key=-group.rank)
    assert part is not None
    members = [rank for rank in range(group.size) if rank % 2 == group.rank % 2][::-1]
    assert (part.size, part.rank, part.epoch) == (len(members), members.index(group.rank), group.epoch)
    recv = np.zeros(part.size, np.int64)
    part.allgather(np.array([group.rank]), recv)
    assert recv.tolist() == members
    part.free()


def check_split_leaves_out_ranks_without_a_color(group: Group) -> None:
    part = group.split(0 if group.rank else None)
    assert (part is None) == (group.rank == 0)
    if part is not None:
        assert part.agree_max(group.rank) == group.size - 1
        part.free()


def check_a_duplicate_has_messages_and_counters_of_its_own(group: Group) -> None:
    other = group.duplicate()
    other.barrier()
    assert (other.rank, other.size, other.epoch) == (group.rank, group.size, group.epoch)
    assert group.traffic.collectives == 0
    assert other.agree_max(group.rank) == group.size - 1
    other.free()


def sent(traffic: Traffic) -> tuple[int, int, int]:
    return traffic.payload_bytes, traffic.header_bytes, traffic.collectives


def check_traffic_counts_what_leaves_the_rank(group: Group) -> None:
    size, off, some = group.size, group.size - 1, int(group.size > 1)
    ones = np.ones(size * 4, np.int64)
    table = uneven(size) + 2
    exchange = Exchange(group, table)
    leaves = int(table[group.rank].sum() - table[group.rank, group.rank])
    calls: list[tuple[Callable[[], Any], int, int]] = [
        (lambda: group.allgather(np.ones(3), np.ones(3 * size), header_words=1), 2 * off, off),
        (lambda: group.alltoall(ones, ones.copy(), header_words=3), off, 3 * off),
        (lambda: group.alltoallv(*exchange.args, header_words=2, bound_words=999), leaves - 2 * off, 2 * off),
        (lambda: group.allgatherv(np.ones(2), np.ones(2 * size), [2] * size), 2 * off, 0),
        (lambda: group.allreduce(np.ones(5, np.int64), "sum", header_words=2), 3 * some, 2 * some),
        (lambda: group.bcast(np.ones(6), 0), 6 * off * (group.rank == 0), 0),
        (lambda: group.barrier(), 0, 0),
    ]
    for number, (call, payload, header) in enumerate(calls):
        before = group.traffic.snapshot()
        call()
        assert sent(group.traffic - before) == (8 * payload, 8 * header, 1), f"call {number}"


def check_plans_count_each_run(group: Group) -> None:
    off = group.size - 1
    send, recv = np.ones(group.size * 4), np.ones(group.size * 4)
    every = [4] * group.size
    plan = group.alltoallv_plan(send, every, None, recv, every, None, header_words=1)
    gather = group.allgather_plan(np.ones(2), np.ones(2 * group.size), header_words=2)
    group.traffic.reset()
    for _ in range(3):
        plan.run()
        gather.run()
    assert sent(group.traffic) == (8 * 9 * off, 8 * 9 * off, 6)


def check_wrong_arguments_are_refused_before_anything_is_sent(group: Group) -> None:
    size, rank = group.size, group.rank
    good, room, counts = np.ones(size, np.int64), np.ones(size, np.int64), [1] * size
    locked = room.copy()
    locked.flags.writeable = False
    objects = np.array([{}] * size)
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: group.allgather(objects, room), "dtype object"),
        (lambda: group.allgather([1], room), "list"),
        (lambda: group.allgather(np.ones(1, np.float32), room), "float32"),
        (lambda: group.allgather(np.ones(1, ">i8"), room), "dtype >i8"),
        (lambda: group.allgather(np.ones((1, 1), np.int64), room), "one contiguous dimension"),
        (lambda: group.allgather(np.ones(4, np.int64)[::2], np.ones(2 * size, np.int64)), "contiguous"),
        (lambda: group.allgather(np.ones(1), room), "float64"),
        (lambda: group.allgather(np.ones(2, np.int64), room), f"wanted {2 * size}"),
        (lambda: group.allgather(room[:1], room), "share memory"),
        (lambda: group.allgather(np.ones(1, np.int64), locked), "read-only"),
        (lambda: group.allgather(np.ones(1, np.int64), room, header_words=2), "header_words is 2"),
        (lambda: group.alltoall(good, np.ones(size + 1, np.int64)), f"wanted {size}"),
        (lambda: group.alltoallv(good, counts[1:], None, room, counts, None), f"for {size} ranks"),
        (lambda: group.alltoallv(good, [1.0] * size, None, room, counts, None), "not integers"),
        (lambda: group.alltoallv(good, np.ones(size), None, room, counts, None), "wanted integers"),
        (lambda: group.alltoallv(good, [-1] * size, None, room, counts, None), "-1 words"),
        (lambda: group.alltoallv(good, [size + 1] * size, None, room, counts, None), "segment of rank 0"),
        (lambda: group.alltoallv(good, counts, [size] * size, room, counts, None), f"1 words at {size}"),
        (lambda: group.alltoallv(good, counts, None, room, [0] * size, None), f"rank {rank} sends itself 1"),
        (lambda: group.alltoallv(good, counts, None, room, counts, None, 2), "header_words is 2"),
        (lambda: group.alltoallv(good, counts, None, room, counts, None, bound_words=0), "bound_words is 0"),
        (lambda: group.alltoallv_plan(objects, counts, None, room, counts, None), "dtype object"),
        (lambda: group.allgatherv(np.ones(2, np.int64), room, counts), "wanted 1"),
        (lambda: group.allreduce(np.ones(2), "sum"), "gather the terms and fold them in rank order"),
        (lambda: group.allreduce(good, "product"), '"sum", "min", "max", "or"'),
        (lambda: group.allreduce(locked, "sum"), "read-only"),
        (lambda: group.bcast(good, size), "root is"),
        (lambda: group.bcast_bytes("text" if rank == 0 else None), "wanted bytes"),
        (lambda: group.allgather_bytes("text"), "wanted bytes"),
        (lambda: group.split(-1), "color is -1"),
        (lambda: group.window(-1), "-1 words"),
    ]
    for call, message in wrong:
        if message == "wanted bytes" and rank:
            continue
        with pytest.raises(UsageError) as caught:
            call()
        assert message in str(caught.value)
    assert group.traffic.collectives == 0
    group.barrier()


def check_read_only_words_may_be_sent(group: Group) -> None:
    send, recv = words_of(group.rank, 2), np.zeros(2 * group.size, np.int64)
    send.flags.writeable = False
    group.allgather(send, recv)
    every = [2] + [0] * (group.size - 1)
    into = np.zeros(2 * group.size, np.int64)
    group.alltoallv(send, every, None, into, [2 * (group.rank == 0)] * group.size, None)
    np.testing.assert_array_equal(into, recv if group.rank == 0 else 0)


def check_what_was_received_is_nobody_elses(group: Group) -> None:
    send, recv = np.full(2, group.rank), np.zeros(2 * group.size, np.int64)
    group.allgather(send, recv)
    send[:] = UNTOUCHED
    recv[2 * group.rank :] += 100
    group.barrier()
    wanted = [rank + 100 * (rank >= group.rank) for rank in range(group.size)]
    assert recv[::2].tolist() == wanted


def check_a_window_shows_every_ranks_area(group: Group) -> None:
    lengths = [(rank * 5 + 3) % 7 for rank in range(group.size)]
    window = group.window(lengths[group.rank])
    assert window is not None
    assert window.mine.size == lengths[group.rank]
    assert not window.mine.any()
    window.fence()
    right = (group.rank + 1) % group.size
    window.of(right)[:] = words_of(group.rank, lengths[right])
    window.fence()
    left = (group.rank - 1) % group.size
    np.testing.assert_array_equal(window.mine, words_of(left, lengths[group.rank]))
    np.testing.assert_array_equal(window.of(left), words_of((left - 1) % group.size, lengths[left]))
    with pytest.raises(UsageError, match="no rank"):
        window.of(group.size)
    window.free()


def check_the_groups_own_window_grows_and_is_used_again(group: Group) -> None:
    def needs(most: int) -> list[int]:
        return [(rank * 5 + most) % (most + 1) for rank in range(group.size)]

    first = group.shared(needs(6))
    assert first is not None and group.shared(needs(6)) is first and group.shared([0] * group.size) is first
    larger = group.shared([words + 2000 for words in needs(6)])
    assert larger is not None and larger is not first
    for rank, words in enumerate(needs(6)):
        assert larger.of(rank).size >= words + 2000
    assert group.shared_bytes == 8 * larger.mine.size
    larger.mine[:] = group.rank
    larger.fence()
    assert all((larger.of(rank) == rank).all() for rank in range(group.size))
    larger.fence()
    group.drop_shared()
    group.drop_shared()
    assert group.shared_bytes == 0
    again = group.shared([3] * group.size)
    assert again is not None and not again.mine.any()
    copy = group.duplicate()
    assert copy.shared([3] * group.size) is not again
    copy.free()
    group.drop_shared()


def check_all_ranks_are_on_one_node(group: Group) -> None:
    assert group.node_ranks() == group.size


def check_a_group_says_what_it_is(group: Group) -> None:
    assert f"rank {group.rank} of {group.size}" in repr(group)
    assert group.name in ("mpi", "threads", "alone")
    assert group.library


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
#: Those that need not be on one node.
CHECKS_OF_NODES = [
    check
    for check in CHECKS
    if check
    not in (
        check_a_window_shows_every_ranks_area,
        check_the_groups_own_window_grows_and_is_used_again,
        check_all_ranks_are_on_one_node,
    )
]
