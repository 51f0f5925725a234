"""A Slurm job with a limit far below its work: what being queued again until it is done costs.

    python benchmarks/slurm.py --pause 1.5

Starts the private cluster of the tests (as root, with Slurm installed), and on it two jobs side by side with
the same 120 iterations on two nodes: one without a limit, and one with a limit of two minutes that is told to
save a minute before. Slurm looks at limits every half minute, so an attempt has 30 to 60 s. Compared are the
digests of the results, and the time in which the jobs ran: what they waited in the queue is left out, since
it is the cluster's affair (here two seconds; Slurm's own time is two minutes).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.slurm.cases import APP, ITERATIONS, TWO_NODES  # noqa: E402
from tests.slurm.cluster import ENDED, Cluster, Job, missing, mpi, submit  # noqa: E402

LIMIT = ("--time=2", "--signal=B:USR1@60")


def hand_in(cluster: Cluster, folder: Path, name: str, pause: float, *options: str) -> Job:
    place = folder / name
    words = (str(folder / "app.py"), "--quiet", f"--checkpoint-dir={place}/saved")
    written = (f"--summary={place}/summary.json", f"--out={place}/result.csv")
    env = {"PAUSE": str(pause), "MOST_FRUITLESS": "10"}
    return submit(cluster, place, "requeue.sbatch", (*words, *written), *TWO_NODES, *options, env=env)


def watch(cluster: Cluster, jobs: dict[str, Job], seconds: float) -> dict[str, float]:
    """Until all have ended: for how long each was running."""
    ran, deadline = dict.fromkeys(jobs, 0.0), time.monotonic() + seconds
    before, open_jobs = time.monotonic(), set(jobs)
    while open_jobs:
        if time.monotonic() > deadline:
            raise SystemExit(f"not done after {seconds:g} s\n{cluster.told()}")
        cluster.hurry()
        time.sleep(0.2)
        states = {name: jobs[name].state for name in open_jobs}
        now = time.monotonic()
        for name, state in states.items():
            ran[name] += now - before if state == "RUNNING" else 0
        before = now
        open_jobs = {name for name, state in states.items() if state not in ENDED}
    return ran


def main() -> None:
    """Print one line per job, and what the limit cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pause", type=float, default=1.5, help="seconds of each of the 120 iterations")
    pause = parser.parse_args().pause
    if missing():
        raise SystemExit(missing())
    place = Path(tempfile.mkdtemp(prefix="slurm-"))
    place.chmod(0o755)
    cluster, folder = Cluster(place, nodes=4), place / "jobs"
    folder.mkdir()
    (folder / "app.py").write_text(APP)
    try:
        cluster.up()
        jobs = {
            "limited": hand_in(cluster, folder, "limited", pause, *LIMIT),
            "undisturbed": hand_in(cluster, folder, "undisturbed", pause, "--time=60"),
        }
        ran = watch(cluster, jobs, 60 + 20 * pause * ITERATIONS)
        report(jobs, ran)
    finally:
        cluster.down()
        shutil.rmtree(place, ignore_errors=True)


def report(jobs: dict[str, Job], ran: dict[str, float]) -> None:
    digests = {}
    for name, job in jobs.items():
        if job.state != "COMPLETED":
            raise SystemExit(f"{name}: {job.state}\n{job.out}")
        digests[name] = json.loads((job.folder / "summary.json").read_text())["result_sha256"]
        told = f"{job.restarts} times queued again, {job.iterations()} iterations"
        print(f"{name:12} {ran[name]:7.1f} s running, {told}")
    more = ran["limited"] - ran["undisturbed"]
    each = more / max(1, jobs["limited"].restarts)
    print(f"{mpi()}: {more:.1f} s more ({more / ran['undisturbed']:.0%}), {each:.1f} s for each time")
    print("same result" if len(set(digests.values())) == 1 else f"OTHER RESULTS: {digests}")


if __name__ == "__main__":
    main()
