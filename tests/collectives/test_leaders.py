"""Exchanges through the leaders of nodes: the contract of a group, the words that flat exchanges bring, and
fewer messages between nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterreduce import leaders
from iterreduce.collectives import Group
from iterreduce.errors import ScheduleError, UsageError
from iterreduce.leaders import Runs
from iterreduce.testing import Death, run_ranks
from iterreduce.testing.threads import ThreadGroup
from tests.collectives.contract import CHECKS_OF_NODES, Exchange, uneven

each_check = pytest.mark.parametrize(
    "check", CHECKS_OF_NODES, ids=lambda check: check.__name__.removeprefix("check_")
)
#: The node of each rank: fair shares, very unequal ones, and ranks dealt to nodes in turn.
NODES: dict[str, tuple[int, ...]] = {
    "2 on 2": (0, 1),
    "3 on 2": (0, 0, 1),
    "5 on 3": (0, 1, 1, 1, 2),
    "5 on 2": (1, 1, 1, 1, 0),
    "8 on 3": (0, 0, 0, 0, 1, 1, 2, 2),
    "8 on 3 in turn": (0, 1, 2, 0, 1, 2, 0, 1),
}
on_nodes = pytest.mark.parametrize("nodes", NODES.values(), ids=list(NODES))


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """No node has memory to share."""
    monkeypatch.setattr(ThreadGroup, "window", lambda group, words: None)


def led(nodes: Sequence[int], function: Callable[..., Any], **more: Any) -> list[Any]:
    """Run with all exchanges through leaders."""

    def work(group: ThreadGroup) -> Any:
        group.node_leaders = leaders.ALWAYS
        return function(group)

    return run_ranks(len(nodes), work, nodes=nodes, **more)


@each_check
@on_nodes
def test_leaders_keep_the_contract(check: Callable[[Group], None], nodes: tuple[int, ...]) -> None:
    led(nodes, check)


def exchanges(group: ThreadGroup) -> None:
    for number in range(4):
        table = uneven(group.size) * (number + 1)
        exchange = Exchange(group, table, (np.int64, np.float64)[number % 2], seed=number)
        group.alltoallv(*exchange.args)
        exchange.assert_arrived()
        plan = group.alltoallv_plan(*exchange.args)
        for shift in (3, 9):
            exchange.fill(shift)
            plan.run()
            exchange.assert_arrived()


@on_nodes
def test_nodes_without_memory_to_share_hand_words_to_their_leader(
    nodes: tuple[int, ...], no_room: None
) -> None:
    led(nodes, exchanges)


def test_one_node_without_memory_does_not_bother_the_others() -> None:
    def work(group: ThreadGroup) -> None:
        node = group._led().node
        if group.nodes[group.rank] == 1:
            node.window = lambda words: None  # type: ignore[method-assign]
        exchanges(group)

    led((0, 0, 1, 1, 2), work)


@pytest.mark.parametrize("short", [0, 10**6])
def test_segments_are_copied_one_by_one_or_by_index(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaders, "_SHORT", short)
    led((0, 0, 1, 1, 1), exchanges)


@given(size=st.integers(2, 6), data=st.data())
def test_any_table_on_any_nodes_arrives_as_it_does_flat(size: int, data: st.DataObject) -> None:
    row = st.lists(st.sampled_from([0, 0, 1, 2, 7, 90]), min_size=size, max_size=size)
    table = np.array(data.draw(st.lists(row, min_size=size, max_size=size)))
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))

    def work(group: ThreadGroup) -> None:
        exchange = Exchange(group, table, seed=1)
        group.alltoallv(*exchange.args)
        exchange.assert_arrived()

    led(nodes, work)


@pytest.mark.parametrize(
    ("size", "nodes", "wanted", "leads"),
    [
        (257, 2, "auto", True),
        (256, 2, "auto", False),
        (257, 1, "auto", False),
        (257, 257, "always", False),  # a rank on each node: nobody to speak for
        (257, 2, "never", False),
        (3, 2, "always", True),
        (3, 1, "always", False),
    ],
)
def test_the_way_is_chosen_by_ranks_and_nodes(size: int, nodes: int, wanted: str, leads: bool) -> None:
    group = leaders.SpreadGroup.__new__(ThreadGroup)
    group.size, group.node_leaders, group.nodes = size, wanted, [r * nodes // size for r in range(size)]
    assert group.leads == leads


def sends(way: str, nodes: Sequence[int], exchange: Callable[[ThreadGroup], Any]) -> list[tuple[int, int]]:
    """Messages and bytes to other nodes of each rank."""

    def work(group: ThreadGroup) -> tuple[int, int]:
        group.node_leaders = way
        exchange(group)
        return group.traffic.node_messages, group.traffic.node_bytes

    return run_ranks(len(nodes), work, nodes=nodes)


def one_of_each(group: ThreadGroup) -> None:
    """16 words to each rank, in all."""
    send, recv, every = np.ones(4 * group.size), np.ones(4 * group.size), [4] * group.size
    group.alltoallv(send, every, None, recv, every, None)
    group.alltoallv_plan(send, every, None, recv, every, None).run()
    group.alltoall(send, recv)
    group.alltoall_plan(send, recv).run()


def test_messages_between_nodes_are_counted_flat_and_through_leaders() -> None:
    nodes = (0, 0, 0, 1, 1, 2)
    flat, through = sends("never", nodes, one_of_each), sends("always", nodes, one_of_each)
    off = [3, 3, 3, 4, 4, 5]
    assert flat == [(4 * n, 128 * n) for n in off]
    node_bytes = [
        128 * sum(n for n, where in zip(off, nodes, strict=True) if where == node) for node in range(3)
    ]
    assert through == [(8, node_bytes[0]), (0, 0), (0, 0), (8, node_bytes[1]), (0, 0), (8, node_bytes[2])]
    assert sends("always", (0,) * 4, one_of_each) == [(0, 0)] * 4


def test_empty_messages_are_none() -> None:
    def only_to_the_next(group: ThreadGroup) -> None:
        counts, come = [0] * group.size, [0] * group.size
        counts[(group.rank + 1) % group.size] = come[group.rank - 1] = 2
        group.alltoallv(np.ones(2), counts, None, np.ones(2), come, None)

    nodes = (0, 0, 1, 1)
    assert sends("never", nodes, only_to_the_next) == [(0, 0), (1, 16), (0, 0), (1, 16)]
    assert sends("always", nodes, only_to_the_next) == [(1, 16), (0, 0), (1, 16), (0, 0)]


def test_memory_of_a_node_is_counted_and_given_back() -> None:
    def work(group: ThreadGroup) -> list[int]:
        one_of_each(group)
        held = [group.shared_bytes]
        group.drop_shared()
        held.append(group.shared_bytes)
        one_of_each(group)
        group.free()
        return held

    for (rank, (held, after)), leads in zip(
        enumerate(led((0, 0, 1, 1, 1), work)), (1, 0, 1, 0, 0), strict=True
    ):
        assert (held > 0) == bool(leads) and after == 0, rank


def test_simulated_nodes_share_no_memory() -> None:
    def work(group: ThreadGroup) -> tuple[bool, int]:
        return group.window(3) is None, group.node_ranks()

    assert run_ranks(5, work, nodes=2) == [(True, 3)] * 3 + [(True, 2)] * 2
    with pytest.raises(UsageError, match="the nodes of 2 ranks; wanted those of 3"):
        run_ranks(3, work, nodes=(0, 1))


def heals_whoever_dies(dies: int) -> None:
    """At any moment of an exchange, heard by nobody or by all but one."""

    def work(group: ThreadGroup) -> int:
        losses = 0
        done = 0
        while done < 3:
            try:
                exchange = Exchange(group, uneven(group.size) + 1, seed=done)
                group.alltoallv(*exchange.args)
                exchange.assert_arrived()
                group.all_here()
                done += 1
            except BaseException as error:
                if not group.is_loss(error):
                    raise
                losses += len(group.heal(error))
        assert group.nodes == sorted(group.nodes)
        return losses

    for call in range(1, 15):
        for heard in (None, (0, 1, 2, 3)):
            lost = led((0, 0, 1, 2, 2), work, heals=True, deaths=[Death(dies, call, heard)], timeout=60)
            assert lost == [1] * 4


@pytest.mark.parametrize("dies", range(5))
def test_nodes_go_on_after_deaths_of_leaders_and_others(dies: int) -> None:
    heals_whoever_dies(dies)


@pytest.mark.parametrize("dies", [0, 1])
def test_nodes_without_memory_go_on_after_deaths(dies: int, no_room: None) -> None:
    heals_whoever_dies(dies)


def test_a_plan_of_ranks_that_were_lost_is_void() -> None:
    def work(group: ThreadGroup) -> None:
        exchange = Exchange(group, uneven(group.size))
        plans = group.alltoallv_plan(*exchange.args), group.alltoall_plan(np.ones(4), np.ones(4))
        if group.rank == 1:
            group.die("for a test")
        try:
            plans[0].run()
        except BaseException as error:
            group.heal(error)
        for plan in plans:
            with pytest.raises(ScheduleError, match="a plan of epoch 0 is used in epoch 1"):
                plan.run()

    led((0, 0, 1, 1), work, heals=True)


def test_neighbours_that_stay_neighbours_are_copied_at_once() -> None:
    runs = Runs.joined(np.array([4, 0, 2, 3]), np.array([9, 1, 3, 7]), np.array([0, 2, 1, 2]))
    assert [part.tolist() for part in runs] == [[0, 3], [1, 7], [3, 2]]
    target = np.zeros(10, np.int64)
    runs.copy(np.arange(1, 7), target)
    assert target.tolist() == [0, 1, 2, 3, 0, 0, 0, 4, 5, 0]
