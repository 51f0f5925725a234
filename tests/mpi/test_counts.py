"""Counts and displacements past 2^31: no call of MPI sees one, in rounds or by plan, and no sum wraps around.

Two ways to try what no test machine has the memory for. As if the limit were a few words: whole loops run
over a communicator that refuses any larger number. And with the true limit: arrays are sparse files of which
no page is touched, and the communicator notes what it was handed instead of sending it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce.exchange as exchange
from iterreduce.collectives import MAX_WORDS, Group, MpiGroup
from iterreduce.exchange import HEADER_WORDS, LARGEST, WORDS, Arrival, FreshExchange, Outgoing, ValuesPlan
from tests.engine import checks_iterate, checks_rows, checks_schedule
from tests.engine.kit import Check
from tests.mpi.watchful import watchful

pytestmark = pytest.mark.mpi

FEW_WORDS = 50  # fewer than any exchange of the loops below has in all
CHECKS = [*checks_rows.CHECKS, *checks_iterate.CHECKS, *checks_schedule.CHECKS]


@pytest.fixture
def narrow_group() -> Iterator[Group]:
    """A group as if the limit of 2^31 - 1 words were `FEW_WORDS`."""
    from mpi4py import MPI

    group = MpiGroup(watchful(MPI.COMM_WORLD.Dup(), FEW_WORDS), max_words=FEW_WORDS)
    yield group
    group.free()


@pytest.mark.parametrize(
    "check", CHECKS, ids=lambda check: f"{check.__module__.rpartition('_')[2]}-{check.__name__[6:]}"
)
def test_loops_run_under_a_low_limit_on_counts(check: Check, narrow_group: Group) -> None:
    check(narrow_group)


class Paper:
    """What a communicator was asked to move: pieces of `send` for a rank, pieces of `recv` from a rank."""

    def __init__(self) -> None:
        self.sent: dict[int, list[Any]] = {}
        self.received: dict[int, list[Any]] = {}

    def note(self, send: list[Any], to: int, recvbuf: list[Any], source: int) -> None:
        for place, rank, (piece, count, _) in ((self.sent, to, send), (self.received, source, recvbuf)):
            assert 0 <= count == piece.size <= MAX_WORDS
            if count:
                place.setdefault(rank, []).append(piece)

    def assert_whole(self, side: str, array: Any, starts: np.ndarray, counts: np.ndarray, me: int) -> None:
        """Each other rank's pieces are, one behind the other, its whole segment of the array."""
        pieces: dict[int, list[Any]] = getattr(self, side)
        for rank, (at, words) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            if rank == me:
                continue
            for piece in pieces.pop(rank):
                assert piece.ctypes.data - array.ctypes.data == 8 * at, (side, rank)
                at, words = at + piece.size, words - piece.size
            assert words == 0
        assert not pieces


@pytest.fixture
def paper() -> Paper:
    return Paper()


@pytest.fixture
def paper_group(paper: Paper) -> Iterator[Group]:
    """Real ranks, but whole words of an exchange go nowhere; agreements are real."""
    from mpi4py import MPI

    class OnPaper(MPI.Intracomm):  # type: ignore[misc]
        def Sendrecv(self, send: Any, to: int, recvbuf: Any, source: int, recvtag: int) -> None:
            assert recvtag == 0  # other words of the run go under another tag
            paper.note(send, to, recvbuf, source)

        def Alltoallv(self, *messages: object) -> None:
            raise AssertionError("a segment ends past 2^31 words: this must not be one call")

        Alltoallv_init = Alltoallv

    group = MpiGroup(OnPaper(MPI.COMM_WORLD.Dup()))
    yield group
    group.free()


@pytest.fixture
def vast(tmp_path: Path) -> Callable[..., Any]:
    """Arrays of zeros of any size, whose pages come to be when they are written."""
    made = iter(range(1000))

    def zeros(words: int, dtype: Any = np.int64) -> Any:
        return np.memmap(tmp_path / str(next(made)), dtype, "w+", shape=(max(1, words),))[:words]

    return zeros


class Vast:
    """NumPy, but what is made for many words is `vast`."""

    def __init__(self, vast: Callable[..., Any]) -> None:
        self.vast = vast

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def zeros(self, shape: Any, dtype: Any = float) -> Any:
        large = isinstance(shape, int) and shape > 1 << 24
        return self.vast(shape, dtype) if large else np.zeros(shape, dtype)

    empty = zeros


def many(group: Group, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Words for and from each rank, `most` and a few that tell the pair; none for this rank itself."""
    ranks = np.arange(group.size)
    to, come = most + 10 * group.rank + ranks, most + 10 * ranks + group.rank
    to[group.rank] = come[group.rank] = 0
    return to, come


@pytest.mark.parametrize("most", [2**31 // 3, 2**31 - 5, 2**32 + 7])
def test_an_exchange_of_long_segments_goes_in_pieces_that_mpi_takes(
    paper_group: Group, paper: Paper, vast: Callable[..., Any], most: int
) -> None:
    """One segment alone may fit where the displacement of the last does not."""
    to, come = many(paper_group, most)
    gap = 2**31  # all displacements but the first are past it, whatever the counts
    send_at, recv_at = exchange.exclusive(to + gap), exchange.exclusive(come + gap)
    send, recv = vast(int(send_at[-1] + to[-1])), vast(int(recv_at[-1] + come[-1]))
    if paper_group.size == 1:
        return  # nothing travels
    paper_group.alltoallv(send, to, send_at, recv, come, recv_at)
    for side, array, starts, counts in (("sent", send, send_at, to), ("received", recv, recv_at, come)):
        paper.assert_whole(side, array, starts, counts, paper_group.rank)


def test_rounds_of_a_fresh_exchange_reach_places_past_the_limit(
    paper_group: Group, paper: Paper, vast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    size, packed = paper_group.size, []
    to, come = many(paper_group, 2**31 + 1000)
    fresh = FreshExchange(paper_group, 1)
    headers = np.zeros((size, HEADER_WORDS), np.int64)
    headers[:, WORDS] = come
    headers[:, LARGEST] = 2**31 + 1000 + 11 * size
    none, late = np.zeros(size, np.int64), np.ones(size, bool)
    heard = Arrival(headers, (fresh.inline_recv,) * size, fresh.payloads, none, late, 0, True)
    monkeypatch.setattr(exchange, "np", Vast(vast))
    arrival = fresh.second(Outgoing(to, to, lambda buffer, at: packed.append((buffer, at))), heard)
    (send, send_at), recv = packed[0], arrival.buffers[0]
    assert send_at.dtype == arrival.starts.dtype == np.int64
    assert [int(to[:r].sum()) for r in range(size)] == send_at.tolist()
    assert [int(come[:r].sum()) for r in range(size)] == arrival.starts.tolist()
    assert arrival.counts.tolist() == come.tolist() and len(recv) == come.sum()
    if size > 1:
        paper.assert_whole("sent", send, send_at, to, paper_group.rank)
        paper.assert_whole("received", recv, arrival.starts, come, paper_group.rank)


def test_a_plan_whose_segments_lie_past_the_limit_sends_them_in_pieces(
    paper_group: Group, paper: Paper, vast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts are handed in as int32 on purpose: products and sums of them must not be."""
    size, me, width = paper_group.size, paper_group.rank, 9
    to, come = (rows.astype(np.int32) for rows in many(paper_group, 2**31 // width + 50))
    monkeypatch.setattr(exchange, "np", Vast(vast))
    plan = ValuesPlan(paper_group, 1, width, to, come)
    if size == 1:
        return
    plan.connect()
    plan.run(exchange.REPLAN)
    words_to, words_from = (to.astype(int) + 1) * width, (come.astype(int) + 1) * width
    send_at, recv_at = np.cumsum(words_to) - words_to, np.cumsum(words_from) - words_from
    assert plan.send_at.tolist() == send_at.tolist() and plan.recv_at.tolist() == recv_at.tolist()
    assert (plan.send[send_at + exchange.STATUS] == exchange.REPLAN).all()
    paper.assert_whole("sent", plan.send, send_at, words_to, me)
    paper.assert_whole("received", plan.recv, recv_at, words_from, me)
    assert len(plan.records) == to.sum(dtype=int) + size and plan.records.shape[1] == width
