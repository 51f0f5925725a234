"""Real ranks on several hosts: memory is shared within a host, messages go over a network that may fail."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iterreduce.supervising.processes import is_newcomer
from iterreduce.supervising.witnesses import NAME as WITNESS
from tests.cli.waiting import lines_of, until
from tests.hosts.network import HEAD, Network, is_open_mpi, mpirun_on
from tests.hosts.ways import ROUNDS
from tests.launch import ROOT, mpirun_environment

Hosts = Callable[[int], Network]
pytestmark = pytest.mark.timeout(400)

HEAT = "tests/hosts/heat.py"
RUN = "-m", "iterreduce"


def told(folder: Path) -> tuple[str, ...]:
    return "--quiet", "--reproducible", "--summary", str(folder / "run.json")


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def digest_alone(folder: Path, *app: str) -> str:
    """Of the same run on one rank of this machine."""
    alone = folder / "alone"
    alone.mkdir()
    words = [sys.executable, *RUN, *told(alone), *app]
    subprocess.run(words, check=True, cwd=ROOT, env=mpirun_environment(), timeout=300)
    return str(summary(alone)["result_sha256"])


def heat_alone(folder: Path, *app: str) -> str:
    return digest_alone(folder, HEAT, str(folder / "alone"), *app)


def assert_ended_well(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, f"{result.stdout[-5000:]}\n{result.stderr[-5000:]}"


@pytest.mark.parametrize("app", ["kmeans", "pagerank"])
def test_an_app_on_several_hosts_gives_the_bits_of_one_rank(hosts: Hosts, tmp_path: Path, app: str) -> None:
    rng = np.random.default_rng(0)
    words: tuple[str, ...] = f"apps/{app}.py", str(tmp_path / "input.npy"), "--max-iterations", "5"
    layout: Mapping[str, int]
    if app == "kmeans":
        np.save(
            tmp_path / "input.npy", rng.normal(size=(20_000, 3)) * 10.0 ** rng.uniform(-4, 4, (20_000, 3))
        )
        words, layout = (*words, "--k", "5"), {"h1": 2, "h2": 2, "h3": 2}
    else:
        np.save(tmp_path / "input.npy", rng_pairs(30_000))
        layout = {"h1": 1, "h2": 2, "h3": 2, "h4": 1}
    result = hosts(len(layout)).mpirun(layout, *RUN, *told(tmp_path), *words)
    assert_ended_well(result)
    assert summary(tmp_path)["ranks"] == 6
    assert summary(tmp_path)["result_sha256"] == digest_alone(tmp_path, *words)


def test_through_leaders_the_same_bits_come_and_less_crosses_the_network(
    hosts: Hosts, tmp_path: Path
) -> None:
    """Counted at the interfaces, and by the ranks."""
    network, layout = hosts(4), dict.fromkeys(["h1", "h2", "h3", "h4"], 2)
    packets, said = {}, {}
    for way in ("never", "always"):
        before = [network.sent(host)[1] for host in layout]
        result = network.mpirun(layout, "-m", "tests.hosts.ways", way)
        assert_ended_well(result)
        packets[way] = sum(network.sent(host)[1] for host in layout) - sum(before)
        lines = map(json.loads, filter(None, result.stdout.splitlines()))
        said[way] = sorted(lines, key=lambda one: one["rank"])
    assert [one["digest"] for one in said["never"]] == [one["digest"] for one in said["always"]]
    messages = {way: sum(one["messages"] for one in lines) for way, lines in said.items()}
    assert (messages["never"], messages["always"]) == (8 * 6 * ROUNDS, 4 * 3 * ROUNDS)
    assert packets["always"] < 0.7 * packets["never"], packets
    np.save(tmp_path / "input.npy", rng_pairs(20_000))
    words = "apps/pagerank.py", str(tmp_path / "input.npy"), "--max-iterations", "3"
    command = mpirun_on(layout, *RUN, *told(tmp_path), *words)
    at = command.index(sys.executable)  # Open MPI hands no environment to other hosts
    process = network.start([*command[:at], "env", "ITERREDUCE_NODE_LEADERS=always", *command[at:]])
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert summary(tmp_path)["result_sha256"] == digest_alone(tmp_path, *words)


def rng_pairs(rows: int) -> np.ndarray:
    return (np.random.default_rng(0).pareto(1.0, (rows, 2)) * 10).astype(np.int64)


def test_ranks_know_who_is_on_their_node_and_share_memory_with_those(hosts: Hosts) -> None:
    network, layout = hosts(3), {"h1": 2, "h2": 1, "h3": 3}
    result = network.mpirun(layout, "-m", "tests.hosts.nodes")
    assert_ended_well(result)
    said = sorted(map(json.loads, filter(None, result.stdout.splitlines())), key=lambda one: one["rank"])
    members = {"h1": [0, 1], "h2": [2], "h3": [3, 4, 5]}
    assert [one["host"] for one in said] == [host for host, ranks in members.items() for _ in ranks]
    for one in said:
        mine = members[one["host"]]
        assert one["node_ranks"] == len(mine) and one["window of the node"] == mine
        assert not one["window over all"] and not one["shared"]
        assert one["cores"] == 1
    assert min(network.sent(host)[0] for host in members) > 1000


class Job:
    """A run of the heat app on hosts, started from `HEAD`."""

    def __init__(self, network: Network, folder: Path, words: list[str], *app: str) -> None:
        self.folder = folder
        saves = "--checkpoint-dir", str(folder / "saved"), "--checkpoint-every", "3"
        self.process = network.start([*words, *told(folder), *saves, HEAT, str(folder), *app])

    def iterates(self, more: int = 3) -> None:
        """Waits until rank 0 has begun so many more iterations."""
        before = self.iterations
        until(lambda: self.iterations >= before + more, self.process)

    def saves(self) -> None:
        until(lambda: bool(self.saved), self.process)

    @property
    def iterations(self) -> int:
        return lines_of(self.folder / "iterations-0")

    @property
    def saved(self) -> list[Path]:
        return sorted((self.folder / "saved").glob("attempt-*/0*"))

    def end(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=240)
        return self.process.returncode, out + err


def test_each_node_saves_a_file_and_a_restart_on_other_hosts_goes_on(hosts: Hosts, tmp_path: Path) -> None:
    network, app = hosts(3), ("--iterations", "40", "--pause", "0.02")
    job = Job(network, tmp_path, mpirun_on({"h1": 2, "h2": 1, "h3": 2}, *RUN), *app)
    job.saves()
    job.process.send_signal(signal.SIGUSR1)
    status, said = job.end()
    assert "stopped by SIGUSR1" in said and "saved" in said, said
    assert status == 75
    newest = job.saved[-1]
    assert sorted(path.name for path in newest.glob("node-*")) == [f"node-{n:04d}.h5" for n in range(3)]
    manifest = json.loads((newest / "manifest.json").read_text())
    assert file_of_each_rank(manifest) == [0, 0, 1, 2, 2]
    before = job.iterations
    again = Job(network, tmp_path, mpirun_on({"h3": 2, "h1": 1}, *RUN), *app)
    status, said = again.end()
    assert status == 0, said
    assert job.iterations - before < 40, "it began anew"
    assert summary(tmp_path)["ranks"] == 3
    assert summary(tmp_path)["result_sha256"] == digest_alone(
        tmp_path, HEAT, str(tmp_path / "alone"), *app[:2]
    )


def file_of_each_rank(manifest: dict[str, Any]) -> list[int]:
    """In which file the pieces of each rank lie, of a column of the first table."""
    return [piece[0] for piece in manifest["tables"][0]["columns"][0]["pieces"]["rows"]]


def test_a_host_that_was_cut_off_for_a_while_is_waited_for(hosts: Hosts, tmp_path: Path) -> None:
    network, app = hosts(3), ("--iterations", "60", "--pause", "0.02")
    job = Job(network, tmp_path, mpirun_on({"h1": 1, "h2": 2, "h3": 1}, *RUN), *app)
    job.iterates()
    network.cut("h2")
    time.sleep(1.0)  # what was under way has come or not
    stood = job.iterations
    time.sleep(2.0)
    assert job.iterations == stood < 60 and job.process.poll() is None
    network.mend("h2")
    status, said = job.end()
    assert status == 0, said
    assert job.iterations == 60
    assert summary(tmp_path)["result_sha256"] == digest_alone(
        tmp_path, HEAT, str(tmp_path / "alone"), *app[:2]
    )


def test_a_lost_host_ends_the_job_and_nothing_says_that_it_was_done(hosts: Hosts, tmp_path: Path) -> None:
    """Whatever the launcher's exit status."""
    network = hosts(3)
    job = Job(network, tmp_path, mpirun_on({"h1": 1, "h2": 2, "h3": 1}, *RUN), "--pause", "0.1")
    job.saves()
    network.lose("h2")
    began = time.monotonic()
    status, _ = job.end()
    assert time.monotonic() - began < 60
    assert status == 0 if is_open_mpi() else status != 0
    assert not (tmp_path / "run.json").exists()
    inspect = [sys.executable, *RUN, "inspect", str(tmp_path / "saved")]
    shown = subprocess.run(inspect, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "cut off" in shown, shown


@pytest.mark.parametrize("how", ["lost", "cut off"])
def test_the_supervisor_goes_on_with_the_hosts_that_are_left(hosts: Hosts, tmp_path: Path, how: str) -> None:
    """What is cut off looks to MPI like what is slow: only the time tells."""
    network, app = hosts(3), ("--iterations", "40", "--pause", "0.1")
    own = "-n", "4", "--host", "h1:2,h2:1,h3:1", *(("--hang-timeout", "20") if how == "cut off" else ())
    job = Job(network, tmp_path, [sys.executable, "-m", "tests.hosts.impatient", *own], *app)
    job.saves()
    network.lose("h2") if how == "lost" else network.cut("h2")
    if how == "cut off":
        job.process.wait(240)
        network.lose("h2")  # nobody could end the launcher's daemon there, which holds on to what is read now
    status, said = job.end()
    assert status == 0, said
    seen = {"lost": "ranks on h1, h2, h3 died; last seen", "cut off": "nothing has happened for 20 s"}
    assert seen[how] in said, said
    assert "iterreduce: host h2 does not answer\n" in said, said
    assert "starts again on 3 ranks from the last checkpoint" in said, said
    assert summary(tmp_path)["ranks"] == 3
    assert summary(tmp_path)["result_sha256"] == digest_alone(
        tmp_path, HEAT, str(tmp_path / "alone"), *app[:2]
    )
    assert not list(network.processes(HEAD)), "processes were left behind"


if is_open_mpi():

    def test_a_new_rank_that_dies_early_on_another_host_is_missed(hosts: Hosts, tmp_path: Path) -> None:
        """MPI does not see it, nor does its launcher say so: its witness does."""
        network, app = hosts(2), ("--iterations", "60", "--pause", "0.05")
        own = "-n", "3", "--host", "h1:1,h2:3", "--respawn", "1"
        job = Job(network, tmp_path, [sys.executable, *RUN, "run", *own], *app)
        job.saves()
        os.kill(ranks_on(network, "h2")[0], signal.SIGKILL)
        until(lambda: any(map(is_newcomer, ranks_on(network, "h2", WITNESS))), job.process)
        for pid in filter(is_newcomer, ranks_on(network, "h2")):
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        status, said = job.end()
        assert status == 0 and time.monotonic() - began < 100, said
        assert "rank 3 on h2" in said and "which was to take a lost place, died before it came" in said, said
        assert "starts again on 3 ranks from the last checkpoint" in said, said
        assert summary(tmp_path)["result_sha256"] == digest_alone(
            tmp_path, HEAT, str(tmp_path / "alone"), *app[:2]
        )


def ranks_on(network: Network, host: str, name: str = "python") -> list[int]:
    """The processes of that name there that are ranks, or beside ranks."""
    found = []
    for pid in network.processes(host):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            told = Path(f"/proc/{pid}/comm").read_text().strip()
            if told.startswith(name) and b"iterreduce" in words and words[0].endswith(b"python"):
                found.append(pid)
    return found
