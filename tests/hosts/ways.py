"""Exchanges flat or through leaders, a line of JSON per rank: run under mpirun on several hosts."""

from __future__ import annotations

import hashlib
import json
import os
import sys

import numpy as np

from iterreduce.collectives import world
from iterreduce.leaders import SpreadGroup
from tests.collectives.contract import Exchange

ROUNDS = 200


def exchanged(group: SpreadGroup) -> dict[str, object]:
    """Small exchanges, half of them planned; a digest of all that came."""
    told = hashlib.sha256()
    square = (group.size, group.size)
    for number in range(ROUNDS // 10):
        table = np.random.default_rng(number).integers(1, 9, square)
        exchange = Exchange(group, table, seed=number)
        for _ in range(5):
            group.alltoallv(*exchange.args, bound_words=1000)
            exchange.assert_arrived()
            told.update(exchange.recv)
        plan = group.alltoallv_plan(*exchange.args)
        for shift in range(5):
            exchange.fill(shift)
            plan.run()
            exchange.assert_arrived()
            told.update(exchange.recv)
    traffic = group.traffic
    return {"rank": group.rank, "digest": told.hexdigest(), "messages": traffic.node_messages}


if __name__ == "__main__":
    group = world()
    assert isinstance(group, SpreadGroup)
    group.node_leaders = sys.argv[1]
    os.write(1, f"\n{json.dumps(exchanged(group))}\n".encode())  # in one piece, beside those of others
