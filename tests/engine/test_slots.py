"""What is learnt and when, what is given up, and how rows of known keys are named on the wire."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from iterreduce import slots
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.directory import read_selector, selector_words, write_selector
from iterreduce.slots import Learning, rough, rough_count
from iterreduce.testing import run_ranks
from tests.engine.kit import started
from tests.engine.test_directory import assert_alike, pair_of_runs, rows_of_keys, slots_of, the_loop


def test_a_frontier_of_keys_used_once_gives_up_its_directory() -> None:
    """Each key comes in one iteration only: learnt once, then dropped, with longer and longer rests."""

    def script(rank: int, iteration: int) -> Batch:
        return rows_of_keys("int", 1000 * iteration + 100 * rank + np.arange(100), [rank, iteration])

    def check(group: Group) -> None:
        run = started(the_loop(group, script, most=40), group)
        held = []
        for _ in range(40):
            run.advance()
            held.append(slots_of(run).directory is not None)
        mine = slots_of(run)
        assert mine.grown == mine.given_up == sum(held)
        assert [i for i, yes in enumerate(held) if yes] == [1, 7, 17, 35], "rests of 4, 8 and 16 exchanges"

    run_ranks(2, check)


def test_a_directory_full_of_dead_keys_is_made_anew() -> None:
    """Half of the keys are the same for ever, half are used once."""

    def script(rank: int, iteration: int) -> Batch:
        return rows_of_keys(
            "int", np.concatenate([np.arange(110), 1000 * iteration + 500 + np.arange(90)]), [rank, iteration]
        )

    def check(group: Group) -> None:
        ours, plain = pair_of_runs(lambda: the_loop(group, script, most=60), group)
        most = 0
        for _ in range(50):
            assert_alike(ours, plain, 1)
            directory = slots_of(ours).directory
            most = max(most, len(directory.sent) if directory else 0)
        mine = slots_of(ours)
        assert most <= slots.BLOAT * 200
        assert mine.given_up >= 1 and mine.grown > 2 * mine.given_up
        assert mine.rows_by_slot > 45 * 100

    run_ranks(2, check)


@given(st.lists(st.integers(0, 400), unique=True), st.integers(0, 300))
def test_a_selector_is_read_as_it_was_written(numbers: list[int], more: int) -> None:
    chosen = np.sort(np.array(numbers, np.int64))
    known = (int(chosen.max()) + 1 if len(chosen) else 0) + more
    words = np.full(int(selector_words(np.array(len(chosen)), np.array(known))), -1)
    write_selector(chosen, words)
    read = read_selector(words, len(chosen))
    assert (
        np.arange(known) if read is None and len(chosen) else read if read is not None else chosen
    ).tolist() == chosen.tolist()


@given(st.integers(0, 2**50))
def test_a_rough_count_is_close_and_zero_only_for_zero(n: int) -> None:
    kept = rough_count(rough(n))
    assert rough(n) < 2**15 and n * 0.996 <= kept <= n and (kept == 0) == (n == 0)


def test_learning_waits_for_the_second_fresh_exchange_in_a_row() -> None:
    learning, steps = Learning(), []
    for planned in (False, True, False, False, False):
        step = "planned" if planned else learning.next(0, 1000)
        learning.take(step, 0, 1000)
        steps.append(step)
    assert steps == ["wait", "planned", "wait", "grow", "rest"]


def test_a_frontier_that_settles_is_learnt_after_a_rest() -> None:
    """New keys only for five exchanges, then the same for ever."""

    def script(rank: int, iteration: int) -> Batch:
        return rows_of_keys("text", 1000 * min(iteration, 5) + np.arange(200), [rank, iteration])

    def check(group: Group) -> None:
        ours, plain = pair_of_runs(lambda: the_loop(group, script, "text", most=20), group)
        assert_alike(ours, plain, 15)
        assert slots_of(ours).given_up == 1 and slots_of(ours).grown == 2
        assert slots_of(ours).rows_by_slot >= 5 * 200

    run_ranks(3, check)
