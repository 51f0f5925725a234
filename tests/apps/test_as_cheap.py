"""An iteration of a lazy app communicates no more than one of the same program written in nouns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.collectives import Group
from iterreduce.events import Event
from iterreduce.testing import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SIX = {"max_iterations": 6}
PAIRS: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {
    "pagerank": ("pagerank", "pagerank", (), SIX | {"tolerance": 0.0}),
    "sssp": ("shortest_paths", "sssp", ("5",), {}),
    "bfs": ("breadth_first", "bfs", ("5",), {}),
    "components": ("connected_components", "components", (), {}),
    "als": ("als", "als", (), {"rank": 4, "iterations": 6}),
}


def _told(folder: str, app: str, given: tuple[Any, ...], options: dict[str, Any], ranks: int) -> Any:
    """Collectives, and bytes, of each iteration."""
    src, dst = (np.random.default_rng(seed).integers(0, 300, 1500) for seed in (0, 1))
    weight = np.random.default_rng(2).integers(1, 9, len(src))
    function = load_app(str(ROOT / folder / f"{app}.py")).function

    def work(group: Group) -> tuple[list[int], list[int]]:
        share = slice(len(src) * group.rank // group.size, len(src) * (group.rank + 1) // group.size)
        edges = ir.Dataset.from_local(group, src=src[share], dst=dst[share], weight=weight[share])
        at: list[int] = []

        def watch(event: Event) -> None:
            if event.name == "iteration.commit":
                at.append(group.traffic.collectives)

        events = ir.Events()
        events.subscribe(watch)
        result = function(edges, *given, **options).run(group, events=events)
        return np.diff(at).tolist(), result.bytes_exchanged["per_iteration"]

    return run_ranks(ranks, work)[0]


@pytest.mark.parametrize("name", PAIRS)
def test_an_iteration_has_no_more_collectives_and_bytes_than_one_in_nouns(name: str) -> None:
    ours, theirs, given, options = PAIRS[name]
    calls, sent = _told("apps", ours, given, options, 2)
    their_calls, their_sent = _told("benchmarks/waist", theirs, given, options, 2)
    assert calls and max(calls) <= min(their_calls), (calls, their_calls)
    assert sum(sent) <= 1.01 * sum(their_sent), (sent, their_sent)
