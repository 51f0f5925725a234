"""Jobs on a real Slurm that end before they are done, and the jobs that go on after them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.launch import ROOT
from tests.slurm.cases import ITERATIONS, ONE_NODE, OTHER_LAUNCHER, WRONG
from tests.slurm.cluster import Cluster, Job, mpi, submit

pytestmark = pytest.mark.timeout(400)
Jobs = dict[str, Job]


def summary(job: Job) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((job.folder / "summary.json").read_text())
    return facts


@pytest.fixture(scope="session")
def digest(jobs: Jobs) -> str:
    """Of the result that nothing disturbed."""
    job = jobs["undisturbed"]
    assert job.end() == "COMPLETED", job.out
    assert summary(job)["iterations"] == ITERATIONS and summary(job)["ranks"] == 2
    return str(summary(job)["result_sha256"])


def is_done(job: Job, digest: str) -> None:
    """The job ended with the result of an undisturbed run, and left nothing half done."""
    assert job.end() == "COMPLETED", f"{job.out}\n{job.facts()}\n{job.cluster.told()}"
    told = summary(job)
    assert told["outcome"] == "ITERATIONS_USED" and told["iterations"] == ITERATIONS, told
    assert told["result_sha256"] == digest
    assert (job.folder / "result.csv").exists()
    assert "damaged" not in inspected(job)


def inspected(job: Job) -> str:
    """What `inspect` says of the checkpoints; it compares every checksum."""
    words = (sys.executable, "-m", "iterreduce", "inspect", str(job.folder / "saved"))
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=job.cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_cancelled_by_its_user_saves_and_does_not_come_back(jobs: Jobs) -> None:
    job = jobs["cancelled"]
    assert job.end() == "CANCELLED"
    assert job.restarts == 0 and "queued again after" not in job.out
    assert not (job.folder / "result.csv").exists()
    ranks = [int(line) for line in (job.folder / "ranks").read_text().split()]
    job.cluster.until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in ranks))
    assert "damaged" not in inspected(job)


def test_what_a_cancelled_job_has_saved_is_gone_on_from(jobs: Jobs, digest: str, cluster: Cluster) -> None:
    before = jobs["cancelled"]
    assert before.end() == "CANCELLED"
    done = before.iterations()
    words = ("--quiet", f"--checkpoint-dir={before.folder}/saved", f"--out={before.folder}/result.csv")
    app = str(before.folder.parent / "spreads.py")
    summary = f"--summary={before.folder}/summary.json"
    again = submit(cluster, before.folder, "requeue.sbatch", (app, summary, *words), *ONE_NODE)
    is_done(again, digest)
    assert again.iterations() <= done + ITERATIONS - 20  # of the last checkpoint


def test_a_job_that_submit_has_written_runs_to_its_end(jobs: Jobs, digest: str) -> None:
    is_done(jobs["submitted"], digest)


if mpi() in OTHER_LAUNCHER:

    def test_a_new_rank_comes_for_a_lost_one_in_an_allocation_that_is_full(jobs: Jobs, digest: str) -> None:
        job = jobs["respawned"]
        job.end()  # the status of mpirun says nothing
        (told,) = summary(job)["recoveries"]
        assert (told["lost"], told["joined"], summary(job)["ranks"]) == ([1], 1, 2), job.out
        assert summary(job)["result_sha256"] == digest


@pytest.mark.parametrize("kind", WRONG[mpi()])
def test_an_srun_that_speaks_another_language_is_told_and_makes_no_worlds_of_one(
    jobs: Jobs, kind: str
) -> None:
    job = jobs[f"wrong-{kind}"]
    assert job.end() == "FAILED", job.out
    assert "srun --mpi=" in job.out and job.out.count("iterreduce: ") == 1, job.out
    assert not (job.folder / "summary.json").exists() and job.iterations() == 0


@pytest.mark.parametrize(
    ("name", "ends", "launcher"), [("", "COMPLETED", "ok"), ("-wrong", "FAILED", "broken")]
)
def test_doctor_says_in_a_job_whether_its_ranks_meet(jobs: Jobs, name: str, ends: str, launcher: str) -> None:
    job = jobs[f"doctor{name}"]
    state = job.end()
    (told,) = [json.loads(line) for line in job.out.splitlines() if line.startswith("{")]
    verdicts = {one["about"]: one["verdict"] for one in told["findings"]}
    assert verdicts["launcher"] == launcher and verdicts["slurm"] == "ok", job.out
    assert state == ("FAILED" if told["broken"] else "COMPLETED") and state == ends, job.out


def test_an_array_runs_every_combination_of_its_parameters(jobs: Jobs, digest: str) -> None:
    job = jobs["array"]
    job.cluster.until(lambda: len(list(job.folder.glob("summary-*"))) == 4)
    digests = {
        (k, shift): json.loads((job.folder / f"summary-{k}-{shift}.json").read_text())["result_sha256"]
        for k in (7, 11)
        for shift in (1, 3)
    }
    assert digests[7, 1] == digest and len(set(digests.values())) == 4


def test_a_job_of_higher_priority_takes_the_nodes_and_the_other_goes_on_after_it(
    jobs: Jobs, digest: str
) -> None:
    job = jobs["preempted"]
    is_done(job, digest)
    assert job.restarts == 1
    assert "stopped by SIGTERM" in job.out and "requeue: stopped and saved; queued again" in job.out


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_job_whose_node_dies_goes_on_on_others(jobs: Jobs, digest: str, which: str) -> None:
    job = jobs[f"lost-{which}"]
    is_done(job, digest)
    assert job.restarts >= 1 and job.lost not in job.nodes
    assert "cut off" in inspected(job)


@pytest.mark.parametrize("name", ["limit", *(["mpirun"] if mpi() in OTHER_LAUNCHER else [])])
def test_a_limit_far_below_the_work_queues_the_job_again_until_it_is_done(
    jobs: Jobs, digest: str, name: str
) -> None:
    went_on(jobs[name], digest)


def went_on(job: Job, digest: str) -> None:
    """It saved and was queued again, at least once, and no iteration was done twice."""
    is_done(job, digest)
    assert job.restarts >= 1
    assert job.out.count("requeue: stopped and saved; queued again") == job.restarts
    assert job.iterations() == ITERATIONS
