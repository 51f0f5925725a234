"""Ranks of real MPI that die: the others go on where it is Open MPI's, and the job ends where it is not.

Which of the two is tested follows from the environment; nothing is skipped.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from iterreduce.testing import Fault, Faults, Kill, Raise
from iterreduce.windows import NAME
from tests.launch import is_open_mpi, mpirun

TOLERANT = ("--with-ft", "ulfm") if is_open_mpi() else ()
GUARD = pytest.mark.timeout(600)  # against hanging; cold caches on a busy machine take minutes

KMEANS = "apps/kmeans.py", "points.npy", "--k", "6", "--tolerance", "0", "--max-iterations", "12"
PAGERANK = "benchmarks/waist/pagerank.py", "web.npz", "--tolerance", "0", "--max-iterations", "12"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("ulfm"), np.random.default_rng(3)
    np.save(folder / "points.npy", rng.random((3000, 3)))
    src, dst = rng.integers(0, 300, (2, 2500))
    np.savez(folder / "web.npz", src=src, dst=dst)
    return folder


class Told:
    """What a run said: its status, its summary, and all that it wrote."""

    def __init__(self, status: int, summary: Path, text: str):
        self.status, self.text = status, text
        self.summary = json.loads(summary.read_text()) if summary.exists() else {}

    @property
    def digest(self) -> str:
        return str(self.summary.get("result_sha256", self.text[-5000:]))

    def ranks(self) -> int:
        return int(self.summary["ranks"])


def windows() -> list[Path]:
    """Those that have a name at the moment: other jobs' may."""
    return list(Path("/dev/shm").glob(f"{NAME}*"))


def words(app: Sequence[str], inputs: Path, *options: str) -> list[str]:
    name, file, *rest = app
    return ["-m", "iterreduce", "--reproducible", *options, str(ROOT / name), str(inputs / file), *rest]


def run(
    app: Sequence[str], ranks: int, inputs: Path, folder: Path, *faults: Fault, options: Sequence[str] = ()
) -> Told:
    """Under a tolerant launcher, where there is one."""
    summary = folder / f"{time.time_ns()}.json"
    marks = tempfile.mkdtemp(dir=folder)  # a rank that comes for one that was killed lives
    env = {"ITERREDUCE_TEST_FAULTS": Faults(faults, marks=marks).to_json()} if faults else {}
    command = words(app, inputs, "--quiet", "--summary", str(summary), *options)
    ended = mpirun(ranks, *command, timeout=400, env=env, options=TOLERANT)
    return Told(ended.returncode, summary, ended.stdout + ended.stderr)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path) -> dict[Sequence[str], str]:
    found = {}
    for app in (KMEANS, PAGERANK):
        told = run(app, 2, inputs, inputs)
        assert told.status == 0 and told.summary["iterations"] == 12, told.text[-5000:]
        found[app] = told.digest
    return found


#: Rank 2 learns of the death of rank 1, and does not come to heal.
LATE = """
import os, signal, time
from iterreduce import launch, survival

crew = launch.join(120, recovers=True)
survival.guard_healing(crew, 2.0, 75)
try:
    if crew.group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        crew.group.barrier()
except Exception as error:
    if crew.group.rank == 2:
        time.sleep(600)
    crew.group.heal(error)
    print("after it")
"""

#: Rank 1 leaves by an exit status.
GONE = """
import os
from iterreduce import launch, survival

crew = launch.join(120, recovers=True)
survival.NOTICE_SECONDS = 0.5

def work():
    if crew.group.rank == 1:
        os._exit(3)
    while True:
        crew.group.barrier()

survival.to_the_end(crew, work, 1.5, 75)
"""

if is_open_mpi():

    @GUARD
    @pytest.mark.parametrize(("at", "rank"), [("load", 1), ("commit.start", 0), ("run.end", 2)])
    def test_kmeans_gives_the_same_bits_when_a_rank_dies(
        at: str, rank: int, inputs: Path, undisturbed: dict[Sequence[str], str], tmp_path: Path
    ) -> None:
        nth = 6 if at == "commit.start" else 1
        told = run(KMEANS, 3, inputs, tmp_path, Kill(at=at, rank=rank, nth=nth))
        assert told.status == 0 and told.ranks() == 2, told.text[-5000:]
        assert told.digest == undisturbed[KMEANS]

    @GUARD
    def test_pagerank_survives_two_at_once_and_another_down_to_one(
        inputs: Path, undisturbed: dict[Sequence[str], str], tmp_path: Path
    ) -> None:
        together = Kill(at="exchange.ready", rank=0, nth=4), Kill(at="exchange.ready", rank=2, nth=4)
        told = run(PAGERANK, 4, inputs, tmp_path, *together, Kill(at="control.ready", rank=1, nth=9))
        assert told.status == 0 and told.ranks() == 1, told.text[-5000:]
        assert told.digest == undisturbed[PAGERANK]
        assert [each["survivors"] for each in told.summary["recoveries"]][-1] == 1

    @GUARD
    def test_a_rank_that_dies_while_others_recover_is_lost_as_well(
        inputs: Path, undisturbed: dict[Sequence[str], str], tmp_path: Path
    ) -> None:
        faults = Kill(at="commit.start", rank=1, nth=5), Kill(at="recovery.start", rank=3)
        told = run(PAGERANK, 4, inputs, tmp_path, *faults)
        assert told.status == 0 and told.ranks() == 2, told.text[-5000:]
        assert told.digest == undisturbed[PAGERANK]

    @GUARD
    def test_new_ranks_take_the_places_of_lost_ones(
        inputs: Path, undisturbed: dict[Sequence[str], str], tmp_path: Path
    ) -> None:
        """Two at once, rank 0 with them, and later one of those who came first."""
        together = Kill(at="commit.start", rank=0, iteration=5), Kill(at="commit.start", rank=2, iteration=5)
        later = Kill(at="control.ready", rank=1, iteration=9)
        told = run(PAGERANK, 3, inputs, tmp_path, *together, later, options=("--respawn", "2"))
        assert told.ranks() == 3 and told.digest == undisturbed[PAGERANK], told.text[-5000:]
        joined = [each.get("joined", 0) for each in told.summary["recoveries"]]
        assert sum(joined) == 3 and len(told.summary["seconds_per_iteration"]) > 0

    @GUARD
    def test_nothing_is_left_behind_and_the_result_and_the_events_are_whole(
        inputs: Path, undisturbed: dict[Sequence[str], str], tmp_path: Path
    ) -> None:
        out, events, saved = tmp_path / "out.npz", tmp_path / "events", tmp_path / "saved"
        options = "--out", str(out), "--events", str(events), "--checkpoint-dir", str(saved)
        fault = Kill(at="commit.start", rank=0, iteration=8)
        told = run(KMEANS, 3, inputs, tmp_path, fault, options=options)
        assert told.status == 0 and told.digest == undisturbed[KMEANS], told.text[-5000:]
        assert len(np.load(out)["x"]) == 6
        said = [json.loads(line)["event"] for line in events.read_text().splitlines()]
        assert said.index("recovery.end") < said.index("run.end")
        again = run(KMEANS, 2, inputs, tmp_path, options=options)
        assert again.status == 0 and "has finished" in again.text, again.text[-5000:]
        makers = {path: path.name.removeprefix(NAME).split("-")[1] for path in windows()}
        assert not [path for path, pid in makers.items() if not Path("/proc", pid).exists()]

    @GUARD
    def test_an_exception_on_one_rank_ends_all_with_one_message(inputs: Path, tmp_path: Path) -> None:
        told = run(KMEANS, 3, inputs, tmp_path, Raise("OSError", "no more", at="commit.start", rank=1))
        assert told.status == 1 and told.text.count("no more") == 2, told.text[
            -5000:
        ]  # the fault says so, too

    @GUARD
    def test_ranks_that_do_not_find_together_in_time_end_the_job(tmp_path: Path) -> None:
        (tmp_path / "late.py").write_text(LATE)
        told = mpirun(3, str(tmp_path / "late.py"), timeout=300, options=TOLERANT)
        assert told.returncode == 75 and "after it" not in told.stdout, told.stderr[-5000:]
        assert told.stderr.count("2 s later the others have not agreed on who is left") == 1

    @GUARD
    def test_a_rank_that_leaves_mpi_without_a_word_ends_the_job(tmp_path: Path) -> None:
        """Open MPI takes a status above 0 for no failure, and the others wait."""
        (tmp_path / "gone.py").write_text(GONE)
        told = mpirun(3, str(tmp_path / "gone.py"), timeout=300, options=TOLERANT)
        assert told.returncode in (3, 75), told.stderr[-5000:]  # the launcher may keep the first
        assert told.stderr.count("2 s later MPI has not told the others") == 1, told.stderr[-5000:]

    def test_with_recover_off_the_job_ends(inputs: Path, tmp_path: Path) -> None:
        fault = Kill(at="commit.start", rank=1, iteration=5)
        told = run(KMEANS, 3, inputs, tmp_path, fault, options=("--recover", "off"))
        assert told.status != 0 and not told.summary, told.text[-5000:]

else:

    @GUARD
    def test_the_death_of_a_rank_ends_the_job(inputs: Path, tmp_path: Path) -> None:
        fault = Kill(at="commit.start", rank=1, iteration=5)
        told = run(KMEANS, 3, inputs, tmp_path, fault)
        assert told.status != 0 and not told.summary, told.text[-5000:]

    @GUARD
    def test_who_asks_for_recovery_is_told_once_that_there_is_none(
        inputs: Path, undisturbed: dict[Sequence[str], str], tmp_path: Path
    ) -> None:
        told = run(KMEANS, 3, inputs, tmp_path, options=("--recover", "auto"))
        assert told.status == 0 and told.digest == undisturbed[KMEANS], told.text[-5000:]
        assert told.text.count("cannot go on without ranks that die") == 1
