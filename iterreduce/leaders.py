"""Exchanges between many ranks on several nodes: the first rank of each node leads, and speaks for all of it.

Where every rank sends to every other, messages between nodes grow with the square of the ranks. Through
leaders they grow with the square of the nodes: ranks lay what leaves their node into memory that the node
shares, each word where its leader sends it from; leaders exchange one message per pair of nodes, in a flat
exchange of their own; ranks take what is theirs from where their leader received it. Nothing is copied but
that once on either side, and the leader copies no more than the others. What stays on a node goes from rank
to rank as ever. Where a node's memory has no room, that node hands words to its leader by messages: the other
nodes do not notice.

Which way exchanges go is a function of agreed values: the number of ranks, their nodes, and `node_leaders`.
Received segments are the same words at the same places, so nobody above can tell. Only exchanges (alltoall,
alltoallv, and their plans) go this way: gathers and reductions are trees of MPI already.

What it costs: a node's leader holds what its ranks send and receive in one exchange; an alltoallv that is not
planned begins with a gather of counts within each node; and a leader's network card is the one that works.
The groups of a node and of the leaders are made by the first exchange, and made again where ranks have died.

Kinds of groups whose ranks may be on several nodes are `SpreadGroup` (MPI, and threads with simulated nodes).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from iterreduce.errors import ScheduleError
from iterreduce.group import Group
from iterreduce.words import Move, Words, packed_displs

MANY_RANKS = 256  # more ranks than these exchange through leaders, if nobody says otherwise
AUTO, ALWAYS, NEVER = "auto", "always", "never"

_SHORT = 32  # segments of fewer words, on average, are copied by index
_EQUAL_TRIPS = 8  # trips of exchanges of equal parts that are kept

Numbers = npt.NDArray[np.int64]


class SpreadGroup(Group):
    """A group that knows the nodes of its ranks: numbers from 0, in the order of their first ranks.

    ``node_leaders``: "auto" (more than `MANY_RANKS` ranks), "always" or "never"; the same on all ranks, and
    set before the first exchange.
    """

    node_leaders = AUTO
    _nodes: list[int]
    _leaders: Leaders | None = None

    @property
    def nodes(self) -> list[int]:
        """The node of each rank."""
        return self._nodes

    @nodes.setter
    def nodes(self, names: Sequence[int]) -> None:
        """Ranks with the same name are on the same node."""
        numbers: dict[int, int] = {}
        self._nodes = [numbers.setdefault(name, len(numbers)) for name in names]
        self._several = len(numbers) > 1

    @property
    def leads(self) -> bool:
        """Whether exchanges go through leaders."""
        if not self._several or max(self.nodes) + 1 == self.size or self.node_leaders == NEVER:
            return False
        return self.node_leaders == ALWAYS or self.size > MANY_RANKS

    def _alike(self, part: SpreadGroup) -> SpreadGroup:
        part.node_leaders = self.node_leaders
        return part

    # -- exchanges

    def _exchange_equal(self, send: Words, recv: Words) -> None:
        self._planned_equal(send, recv)()

    def _exchange(self, move: Move, bound: int) -> None:
        if self.leads:
            leaders = self._led()
            leaders.run(leaders.trip(move), move, bound)
        else:
            self._alltoallv(move, bound)
            if self._several:
                self.traffic.leaves_node(*self._off_node(move))

    def _planned_equal(self, send: Words, recv: Words) -> Callable[[], Any]:
        if not self._several:
            return self._prepare_alltoall(send, recv)
        words = send.size // self.size
        every, starts = [words] * self.size, list(range(0, send.size, words or 1))[: self.size]
        move = Move(send, every, starts or [0] * self.size, recv, every, starts or [0] * self.size)
        if self.leads:
            return partial(_run_equal, self, self.epoch, move)
        return _Counted(self, self._prepare_alltoall(send, recv), *self._off_node(move))

    def _planned(self, move: Move, bound: int) -> Callable[[], Any]:
        if not self._several:
            return self._prepare_alltoallv(move, bound)
        if self.leads:
            return partial(_run, self, self.epoch, self._led().trip(move), move, bound)
        return _Counted(self, self._prepare_alltoallv(move, bound), *self._off_node(move))

    def _off_node(self, move: Move) -> tuple[int, int]:
        """Messages and words of a flat exchange to ranks of other nodes."""
        here = self.nodes[self.rank]
        off = [n for n, node in zip(move.send_counts, self.nodes, strict=True) if n and node != here]
        return len(off), sum(off)

    def _led(self) -> Leaders:
        if self._leaders is None:
            self._leaders = Leaders(self)
            self._barrier()  # from here on all know these groups, and whoever heals interrupts them
        return self._leaders

    # -- what the groups of nodes and leaders go through with this one

    @property
    def led_groups(self) -> tuple[SpreadGroup, ...]:
        """The groups that exchanges go through: of this rank's node, and of the leaders for one of them.

        Who leaves an exchange because ranks died interrupts these, too: others may wait there.
        """
        return () if self._leaders is None else self._leaders.groups

    def drop_shared(self) -> None:
        super().drop_shared()
        if self._leaders is not None:
            self._leaders.node.drop_shared()

    @property
    def shared_bytes(self) -> int:
        led = 0 if self._leaders is None else self._leaders.node.shared_bytes
        return super().shared_bytes + led

    def _free_led(self) -> None:
        """Collective."""
        for group in self.led_groups:
            group.free()
        self._leaders = None

    def _renumbered(self, rank: int, lost: Collection[int]) -> None:
        super()._renumbered(rank, lost)
        self.nodes = [node for old, node in enumerate(self.nodes) if old not in lost]
        self._leaders = None  # with those who died: not to be freed


class _Counted:
    """A prepared flat exchange, with what it sends to other nodes."""

    def __init__(self, group: SpreadGroup, call: Callable[[], Any], messages: int, words: int) -> None:
        self._call, self._traffic, self._sends = call, group.traffic, (messages, words)
        self.free = getattr(call, "free", None)

    def __call__(self) -> None:
        self._call()
        self._traffic.leaves_node(*self._sends)


def _run(group: SpreadGroup, epoch: int, trip: Trip, move: Move, bound: int) -> None:
    _check_epoch(group, epoch)
    group._led().run(trip, move, bound)


def _run_equal(group: SpreadGroup, epoch: int, move: Move) -> None:
    _check_epoch(group, epoch)
    leaders = group._led()
    leaders.run(leaders.equal_trip(move), move, move.send.size)


def _check_epoch(group: SpreadGroup, epoch: int) -> None:
    if group.epoch != epoch:
        raise ScheduleError(f"a plan of epoch {epoch} is used in epoch {group.epoch}")


class Leaders:
    """The ranks of one epoch, sorted by node: who leads, and who is led. Collective to make."""

    def __init__(self, group: SpreadGroup) -> None:
        nodes = np.array(group.nodes)
        self.here = group.nodes[group.rank]
        node = group.split(self.here)
        heads = group.split(0 if node is not None and node.rank == 0 else None)
        assert isinstance(node, SpreadGroup) and (heads is None or isinstance(heads, SpreadGroup))
        self.node, self.heads, self._traffic = node, heads, group.traffic
        self.groups = (node,) if heads is None else (node, heads)
        self.node_sizes = np.bincount(nodes)
        self.members = np.flatnonzero(nodes == self.here).tolist()
        order = np.argsort(nodes, kind="stable")
        self.others = order[nodes[order] != self.here]  # by node, in rank order within each
        self.node_of_others = nodes[self.others]
        self._nodes = nodes
        self._equal: dict[int, Trip] = {}

    def trip(self, move: Move) -> Trip:
        """Where the segments of an exchange go. Collective on each node."""
        send_counts, recv_counts = np.array(move.send_counts), np.array(move.recv_counts)
        to_nodes = np.zeros(len(self.node_sizes), np.int64)
        np.add.at(to_nodes, self._nodes, send_counts)
        mine = np.concatenate([to_nodes, recv_counts])
        table = np.empty(self.node.size * mine.size, np.int64)
        self.node._allgather(mine, table)
        every = table.reshape(self.node.size, mine.size)
        return Trip(self, move, every[:, : to_nodes.size], every[:, to_nodes.size :])

    def equal_trip(self, move: Move) -> Trip:
        """The same for equal parts: nothing has to be asked. Local."""
        words = move.send_counts[0]
        if words not in self._equal:
            if len(self._equal) == _EQUAL_TRIPS:
                self._equal.clear()
            size = self.node.size
            to_nodes = np.tile(words * self.node_sizes, (size, 1))
            self._equal[words] = Trip(self, move, to_nodes, np.full((size, self._nodes.size), words))
        return self._equal[words]

    def run(self, trip: Trip, move: Move, bound: int) -> None:
        """Exchange. `bound`: an agreed end of all segments. Collective."""
        self.node._alltoallv(self._within(move), bound)
        send, recv = move.send.view(np.int64), move.recv.view(np.int64)
        most = bound * int(self.node_sizes.max())  # of a leader, agreed
        between = trip.words_out + 1  # equal addresses, though nothing is sent, are MPI_IN_PLACE to Open MPI
        window = self.node.shared([between + trip.words_in, *[0] * (self.node.size - 1)])
        if window is None:
            self._by_messages(trip, send, recv, most)
            return
        area = window.of(0)
        trip.pack.copy(send, area)
        window.fence()
        self._between(trip, area, area[between:], most)
        window.fence()
        trip.unpack.copy(area[between:], recv)

    def _within(self, move: Move) -> Move:
        """What stays on this node."""

        def of_members(numbers: list[int]) -> list[int]:
            return [numbers[rank] for rank in self.members]

        sent = move.send, of_members(move.send_counts), of_members(move.send_displs)
        return Move(*sent, move.recv, of_members(move.recv_counts), of_members(move.recv_displs))

    def _between(self, trip: Trip, send: Numbers, recv: Numbers, bound: int) -> None:
        if self.heads is None:
            return
        sent = send, trip.out_counts, packed_displs(trip.out_counts)
        received = recv, trip.in_counts, packed_displs(trip.in_counts)
        self.heads._alltoallv(Move(*sent, *received), bound)
        self._traffic.leaves_node(len(trip.out_counts) - trip.out_counts.count(0), trip.words_out)

    def _by_messages(self, trip: Trip, send: Words, recv: Words, most: int) -> None:
        """Where the node has no memory to share: to the leader, and back."""
        node, none = self.node, [0] * self.node.size
        bound = max(trip.words_out, trip.words_in)
        mine, theirs = np.empty(trip.own_out, np.int64), np.empty(trip.own_in, np.int64)
        trip.pack_own.copy(send, mine)
        first = [trip.own_out, *none[1:]], [trip.own_in, *none[1:]]
        if self.heads is None:
            nothing = np.empty(0, np.int64)
            node._alltoallv(Move(mine, first[0], none, nothing, none, none), bound)
            node._alltoallv(Move(nothing, none, none, theirs, first[1], none), bound)
        else:
            came, out = np.empty((2, trip.words_out), np.int64)
            into, goes = np.empty((2, trip.words_in), np.int64)
            outs, ins = trip.outs, trip.ins
            node._alltoallv(Move(mine, first[0], none, came, outs, packed_displs(outs)), bound)
            trip.arrange_out.copy(came, out)
            self._between(trip, out, into, most)
            trip.arrange_in.copy(into, goes)
            node._alltoallv(Move(goes, ins, packed_displs(ins), theirs, first[1], none), bound)
        trip.unpack_own.copy(theirs, recv)


class Trip:
    """Where the segments of one exchange lie, in words.

    A leader's message to a node holds, for each rank of its own node in turn, that rank's segments for the
    ranks of the other node in turn. ``to_nodes[i, n]``: words from the i-th rank of this node to node n;
    ``from_ranks[i, r]``: words for it from rank r.
    """

    def __init__(self, leaders: Leaders, move: Move, to_nodes: Numbers, from_ranks: Numbers) -> None:
        self._leaders, me = leaders, leaders.node.rank
        to_nodes = to_nodes.copy()
        to_nodes[:, leaders.here] = 0
        from_others = from_ranks[:, leaders.others]
        self._tables = (to_nodes, from_others) if me == 0 else None  # for the leader's way by messages
        self.out_counts: list[int] = to_nodes.sum(axis=0).tolist()
        into = np.zeros(len(self.out_counts), np.int64)
        np.add.at(into, leaders.node_of_others, from_others.sum(axis=0))
        self.in_counts: list[int] = into.tolist()
        self.words_out, self.words_in = sum(self.out_counts), sum(self.in_counts)
        self.own_out, self.own_in = int(to_nodes[me].sum()), int(from_others[me].sum())
        self._sends = _of(leaders, move.send_counts), _of(leaders, move.send_displs)
        self._receives = _of(leaders, move.recv_counts), _of(leaders, move.recv_displs)
        counts, displs = self._sends
        node = leaders.node_of_others
        in_block = _starts(counts) - _starts(to_nodes[me])[node]
        self.pack = Runs.joined(displs, _blocks(to_nodes)[me, node] + in_block, counts)
        counts, displs = self._receives
        self.unpack = Runs.joined(_blocks(from_others)[me], displs, counts)

    # -- by messages

    @cached_property
    def pack_own(self) -> Runs:
        """What leaves the node, one segment after another."""
        counts, displs = self._sends
        return Runs.joined(displs, _starts(counts), counts)

    @cached_property
    def unpack_own(self) -> Runs:
        counts, displs = self._receives
        return Runs.joined(_starts(counts), displs, counts)

    @property
    def outs(self) -> list[int]:
        """Words that each rank of the node hands to its leader, who asks."""
        return self._of_leader(0).sum(axis=1).tolist()  # type: ignore[no-any-return]

    @property
    def ins(self) -> list[int]:
        return self._of_leader(1).sum(axis=1).tolist()  # type: ignore[no-any-return]

    @cached_property
    def arrange_out(self) -> Runs:
        """From rank after rank to message after message."""
        table = self._of_leader(0)
        return Runs.joined(_starts(table.ravel()), _blocks(table).ravel(), table.ravel())

    @cached_property
    def arrange_in(self) -> Runs:
        table = self._of_leader(1)
        return Runs.joined(_blocks(table).ravel(), _starts(table.ravel()), table.ravel())

    def _of_leader(self, which: int) -> Numbers:
        assert self._tables is not None
        return self._tables[which]


def _of(leaders: Leaders, numbers: list[int]) -> Numbers:
    chosen: Numbers = np.array(numbers, np.int64)[leaders.others]
    return chosen


def _starts(counts: Numbers) -> Numbers:
    return np.cumsum(counts) - counts


def _blocks(table: Numbers) -> Numbers:
    """Where each entry's words begin if columns follow each other, and in them the rows."""
    begins: Numbers = _starts(table.T.ravel()).reshape(table.T.shape).T
    return begins


class Runs(NamedTuple):
    """Words to copy: ``counts[i]`` of them from ``source[i]`` to ``target[i]``."""

    source: Numbers
    target: Numbers
    counts: Numbers

    @classmethod
    def joined(cls, source: Numbers, target: Numbers, counts: Numbers) -> Runs:
        """Without the empty ones; neighbours that stay neighbours are one.

        >>> Runs.joined(np.array([0, 2, 9]), np.array([5, 7, 9]), np.array([2, 3, 1]))
        Runs(source=array([0, 9]), target=array([5, 9]), counts=array([5, 1]))
        """
        some = counts > 0
        source, target, counts = source[some], target[some], counts[some]
        ends = counts[:-1]
        first = np.ones(counts.size, np.bool_)
        first[1:] = (source[1:] != source[:-1] + ends) | (target[1:] != target[:-1] + ends)
        begins = np.flatnonzero(first)
        return cls(source[first], target[first], np.add.reduceat(counts, begins) if counts.size else counts)

    def copy(self, source: Words, target: Words) -> None:
        words = int(self.counts.sum())
        if words < _SHORT * self.counts.size:
            step = np.arange(words) - np.repeat(_starts(self.counts), self.counts)
            target[step + np.repeat(self.target, self.counts)] = source[
                step + np.repeat(self.source, self.counts)
            ]
            return
        for at, to, count in zip(
            self.source.tolist(), self.target.tolist(), self.counts.tolist(), strict=True
        ):
            target[to : to + count] = source[at : at + count]
