"""Exchanges between hosts, flat and through node leaders: messages, bytes, and packets of a real network.

    python benchmarks/hosts.py [--layouts 4x4,4x16] [--words 8,1000] [--network 4x4] [--exchanges 100]

Every rank sends ``--words`` words to every other. *Messages* and *bytes* to other hosts are those of one
exchange over all ranks, as the groups count them, on ranks that are threads with simulated nodes. With
``--network`` (root, iproute2) the same runs under mpirun on hosts that are network namespaces, and *packets*
and *wire bytes* are those that the hosts' interfaces send, acknowledgements included, per exchange: the
difference between a run of ``--exchanges`` and one of twice as many. Seconds are not compared: all hosts
share the cores of this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from iterreduce.collectives import world  # noqa: E402
from iterreduce.leaders import SpreadGroup  # noqa: E402
from iterreduce.testing import run_ranks  # noqa: E402

WAYS = {"flat": "never", "leaders": "always"}


def exchange(group: SpreadGroup, way: str, words: int, times: int) -> tuple[int, int]:
    """Messages and bytes of this rank to other hosts."""
    group.node_leaders = way
    send, recv = np.ones(words * group.size), np.ones(words * group.size)
    every = [words] * group.size
    plan = group.alltoallv_plan(send, every, None, recv, every, None)
    for _ in range(times):
        plan.run()
    return group.traffic.node_messages, group.traffic.node_bytes


def counted(hosts: int, ranks: int, way: str, words: int) -> tuple[int, int]:
    """Of all ranks, as threads."""
    told = run_ranks(hosts * ranks, exchange, way, words, 1, nodes=hosts)
    messages, sent = (sum(column) for column in zip(*told, strict=True))
    return messages, sent


def on_network(hosts: int, ranks: int, way: str, words: int, times: int) -> tuple[float, float]:
    """Packets and bytes of an exchange at the interfaces of real hosts."""
    from tests.hosts.network import Network

    sent = []
    with tempfile.TemporaryDirectory() as folder, Network(Path(folder), hosts) as network:
        layout = dict.fromkeys(network.names, ranks)
        for number in (times, 2 * times):
            before = total(network)
            words_of_run = ("--run", way, str(words), str(number))
            done = network.mpirun(layout, "benchmarks/hosts.py", *words_of_run, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
            sent.append(total(network) - before)
    wire, packets = (sent[1] - sent[0]) / times
    return float(packets), float(wire)


def total(network: object) -> np.ndarray:
    names: list[str] = network.names  # type: ignore[attr-defined]
    figures = [network.sent(name) for name in names]  # type: ignore[attr-defined]
    return np.sum(figures, axis=0)


def show(title: str, layout: str, words: int, figures: dict[str, tuple[float, float]]) -> None:
    flat, led = figures["flat"], figures["leaders"]
    cells = [f"{a:12,.0f} {b:12,.0f} {a / max(b, 1):6.2f} x" for a, b in zip(flat, led, strict=True)]
    print(f"{title} {layout:>5} {words:6} words   " + "   ".join(cells), flush=True)


def numbers(text: str) -> tuple[int, int]:
    hosts, ranks = map(int, text.split("x"))
    return hosts, ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", default="4x4,4x16")
    parser.add_argument("--words", default="8,1000")
    parser.add_argument("--network", default="")
    parser.add_argument("--exchanges", type=int, default=100)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        group = world()
        assert isinstance(group, SpreadGroup)
        exchange(group, given.run[0], int(given.run[1]), int(given.run[2]))
        return
    sizes = [int(words) for words in given.words.split(",")]
    print("hosts x ranks; messages or packets: flat, leaders, ratio; bytes: flat, leaders, ratio")
    for layout in given.layouts.split(","):
        for words in sizes:
            told = {name: counted(*numbers(layout), way, words) for name, way in WAYS.items()}
            show("counted", layout, words, told)
    for words in sizes if given.network else []:
        found = {
            name: on_network(*numbers(given.network), way, words, given.exchanges)
            for name, way in WAYS.items()
        }
        show("network", given.network, words, found)


if __name__ == "__main__":
    main()
