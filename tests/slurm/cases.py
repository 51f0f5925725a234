"""The jobs of the tests on a real Slurm: all are handed in before the first test looks at one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from iterreduce.testing import Faults, Kill
from tests.launch import mpirun_path
from tests.slurm.cluster import ENDED, Cluster, Job, mpi, submit

ITERATIONS = 120

#: Two ranks that exchange values by key, so that a rank's loss shows. Rank 0 writes a line per iteration and
#: takes its time, the others wait for it inside MPI.
APP = '''
import os, time
import numpy as np
import iterreduce as ir


@ir.app
def spreads(k: int = 7, shift: int = 1, group: ir.Group = None):
    """Numbers that are sent around."""
    folder = os.environ["ITERREDUCE_TEST_FOLDER"]
    with open(f"{folder}/ranks", "a") as file:
        file.write(f"{os.getpid()}\\n")
    log = open(f"{folder}/iterations", "a", buffering=1) if group.rank == 0 else None

    def spread(cells):
        if log is not None:
            log.write("-\\n")
            time.sleep(float(os.environ.get("PAUSE", "0")))
        return ir.Batch(cell=(cells["cell"] * k + shift) % 1000, heat=cells["heat"] * 0.7)

    def update(heard, cells):
        return cells.with_columns(heat=heard["heat"] + 0.3 * cells["cell"])

    mine = np.arange(1000)[group.rank :: group.size]
    cells = ir.Dataset.from_local(group, cell=mine, heat=mine.astype(float))
    job = ir.MapReduce(map=spread, reduce=ir.SUM, key="cell")
    return job.iterate(state=cells, state_key="cell", update=update, max_iterations=ITERATIONS)
'''.replace("ITERATIONS", str(ITERATIONS))

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")
#: A node that dies, or that is taken away, must not take others' jobs with it.
ALONE = ("--exclusive", "--time=20")
#: The wish to save comes 20 s before the limit of a minute, which Slurm looks at every half minute: 10 to
#: 40 s after the start. A busy machine may not get beyond that in some attempts.
SHORT = ("--time=1", "--signal=B:USR1@20")
#: 42 s in all.
PAUSE = {"PAUSE": "0.35", "MOST_FRUITLESS": "10"}
SAVES = ("--checkpoint-every=20",)

#: An mpirun for Open MPI's ranks, and the types of srun that speak another language than its ranks.
OTHER_LAUNCHER = {"openmpi": f"{mpirun_path()} -n 2"}
WRONG = {"mpich": ("none", "pmix"), "openmpi": ("none", "pmi2")}


class Cases:
    """Hands in jobs, and does to each what its test is about, as soon as it iterates."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.jobs: dict[str, Job] = {}
        self._disturbances: dict[str, Callable[[Job], None]] = {}
        (folder / "spreads.py").write_text(APP)

    def hand_in(
        self,
        name: str,
        script: str,
        *options: str,
        words: tuple[str, ...] = (),
        disturb: Callable[[Job], None] | None = None,
        **env: str,
    ) -> None:
        place = self.folder / name
        which = "-{k}-{shift}" if script == "array.sbatch" else ""
        own = ["--quiet", "--summary", f"{place}/summary{which}.json", *words]
        if script == "requeue.sbatch":
            own += [f"--checkpoint-dir={place}/saved", "--out", f"{place}/result.csv"]
        app = str(self.folder / "spreads.py")
        self.jobs[name] = submit(
            self.cluster, place, script, (app, *own), f"--job-name={name}", *options, env=env
        )
        if disturb is not None:
            self._disturbances[name] = disturb

    def submit_all(self) -> None:
        """The longest first."""
        library, hand_in = mpi(), self.hand_in
        hand_in("limit", "requeue.sbatch", *TWO_NODES, *SHORT, **PAUSE)
        if library in OTHER_LAUNCHER:
            other = {"LAUNCHER": OTHER_LAUNCHER[library]}
            hand_in("mpirun", "requeue.sbatch", *TWO_NODES, words=SAVES, disturb=self._wish, **PAUSE, **other)
            self._respawned("respawned")
        for which, at in (("first", 0), ("last", -1)):
            lose = self._lose(at)
            hand_in(f"lost-{which}", "requeue.sbatch", *TWO_NODES, *ALONE, words=SAVES, disturb=lose, **PAUSE)
        hand_in("preempted", "requeue.sbatch", *ONE_NODE, *ALONE, words=SAVES, disturb=self._preempt, **PAUSE)
        hand_in("cancelled", "requeue.sbatch", *ONE_NODE, words=SAVES, disturb=self._cancel, **PAUSE)
        self.jobs["submitted"] = self._submitted("submitted")
        hand_in("undisturbed", "run.sbatch", *ONE_NODE)
        self._examined("doctor", *TWO_NODES)
        self._examined("doctor-wrong", *ONE_NODE, LAUNCHER="srun --wait=10 --mpi=none")
        for kind in WRONG[library]:
            hand_in(f"wrong-{kind}", "run.sbatch", *ONE_NODE, LAUNCHER=f"srun --wait=10 --mpi={kind}")
        sweep = {"SWEEP": "k=7,11 shift=1,3"}
        hand_in("array", "array.sbatch", "--nodes=1", "--ntasks-per-node=1", "--array=0-3", **sweep)

    def _submitted(self, name: str) -> Job:
        """Handed in by `python -m iterreduce submit`."""
        place = self.folder / name
        place.mkdir()
        options = (*ONE_NODE, f"--output={place}/out", f"--script={place}/script")
        words = (str(self.folder / "spreads.py"), "--quiet", f"--summary={place}/summary.json")
        saved = (f"--checkpoint-dir={place}/saved", f"--out={place}/result.csv")
        program = (sys.executable, "-m", "iterreduce", "submit")
        told = self.cluster.ask(*program, *options, *words, *saved, ITERREDUCE_TEST_FOLDER=str(place))
        return Job(self.cluster, place, told.split()[2].rstrip(":"))

    def _respawned(self, name: str) -> None:
        """A rank dies, and a new one takes its place, though Slurm gave no more than was needed before."""
        marks = self.folder / f"{name}-marks"
        marks.mkdir()
        faults = Faults((Kill(at="control.ready", rank=1, nth=9),), marks=str(marks))
        full = {"PRTE_MCA_rmaps_default_mapping_policy": "slot"}
        own = {"LAUNCHER": f"{mpirun_path()} --with-ft ulfm", "ITERREDUCE_TEST_FAULTS": faults.to_json()}
        self.hand_in(name, "run.sbatch", *TWO_NODES, words=("--respawn=1",), **own, **full)

    def _examined(self, name: str, *options: str, **env: str) -> None:
        """`python -m iterreduce doctor` where an app's ranks would be."""
        place = self.folder / name
        place.mkdir()
        words = ("doctor", "--json", f"--dir={place}")
        self.jobs[name] = submit(self.cluster, place, "run.sbatch", words, *options, env=env)

    def disturb_all(self) -> None:
        """Each job once a checkpoint of it is there."""

        def done() -> bool:
            for name, disturb in list(self._disturbances.items()):
                job = self.jobs[name]
                if job.has_saved():
                    disturb(job)
                    del self._disturbances[name]
                else:
                    assert job.state not in ENDED, f"{name} has ended: {job.facts()}\n{job.out}"
            return not self._disturbances

        self.cluster.until(done)

    def _lose(self, at: int) -> Callable[[Job], None]:
        def lose(job: Job) -> None:
            job.lost = job.nodes[at]
            self.cluster.lose(job.lost)

        return lose

    def _preempt(self, job: Job) -> None:
        options = ("--exclusive", f"--nodelist={job.nodes[0]}", "--output=/dev/null", "--wrap=true")
        self.cluster.ask("sbatch", "--partition=high", *options)

    def _wish(self, job: Job) -> None:
        """What Slurm does before the limit, but now."""
        self.cluster.ask("scancel", "--batch", "--signal=USR1", job.number)

    def _cancel(self, job: Job) -> None:
        self.cluster.ask("scancel", job.number)
