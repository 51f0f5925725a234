"""Key directories on real ranks: what threads as ranks do is done by MPI too."""

from __future__ import annotations

import numpy as np

from iterreduce.collectives import Group
from tests.engine.test_directory import (
    assert_alike,
    assert_pairs_agree,
    drifting,
    keys_of,
    pair_of_runs,
    slots_of,
    the_loop,
)


def test_recurring_text_keys_travel_by_slot_with_the_same_result(group: Group) -> None:
    ours, plain = pair_of_runs(lambda: the_loop(group, drifting("text"), "text"), group)
    assert_alike(ours, plain, 9)
    if group.size > 1:
        assert slots_of(ours).words_sent < slots_of(plain).words_sent
        assert_pairs_agree(group, slots_of(ours))


def test_a_directory_that_one_rank_lost_is_learnt_again(group: Group) -> None:
    table = keys_of("int", np.arange(0, 190, 3))
    ours, plain = pair_of_runs(lambda: the_loop(group, drifting("int"), "int", table), group)
    assert_alike(ours, plain, 4)
    if group.rank == group.size - 1:
        ours.shop.cache.lose(slots_of(ours).token)
    assert_alike(ours, plain, 5)
