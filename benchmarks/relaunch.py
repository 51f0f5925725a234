"""How long a killed rank costs: from SIGKILL to the next iteration that is committed, under the supervisor.

    python benchmarks/relaunch.py --ranks 2 --kills 5 apps/kmeans.py points.npy --k 8

    detection   from the kill to the supervisor's word that a rank died
    launch      until the new ranks have met and their run begins
    load        until what was saved is taken up and the iterations begin
    iteration   the first one that is committed, kernels of this process and exchange plans included

The others do not go on in place (`--recover off`); `benchmarks/recovery.py` measures that.

The app should run for long: it is killed as soon as a checkpoint is published, again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.launch import mpirun_environment  # noqa: E402

PHASES = ("detection", "launch", "load", "iteration")


class Job:
    """The supervised job, and when it said what."""

    def __init__(self, folder: Path, ranks: int, kills: int, words: list[str]) -> None:
        self.events, self.saved = folder / "events.jsonl", folder / "saved"
        own = ["-n", str(ranks), "--retries", str(kills), "--recover", "off"]
        told = ["--quiet", "--events", str(self.events), "--checkpoint-dir", str(self.saved)]
        command = [sys.executable, "-m", "iterreduce", "run", *own, *words, *told, "--checkpoint-every", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=mpirun_environment())
        self.died: list[float] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("iterreduce: ") and " died" in line:
                self.died.append(time.time())
            else:
                sys.stderr.write(line)

    def ranks(self) -> dict[int, int]:
        """Pids by rank, of the attempt under way."""
        found = {}
        for path in self.saved.parent.glob(".saved.run-*/attempt-*/rank-*.json"):
            found[int(path.stem.split("-")[1])] = json.loads(path.read_text())["pid"]
        return found

    def told(self) -> list[dict[str, object]]:
        """The events of the attempt under way."""
        if not self.events.exists():
            return []
        return [json.loads(line) for line in self.events.read_text().splitlines() if line.endswith("}")]

    def wait(self, holds: object) -> None:
        assert callable(holds)
        while not holds():
            if self.process.poll() is not None:
                raise SystemExit(f"the job ended with {self.process.returncode}; give it more iterations")
            time.sleep(0.002)


def committed(job: Job) -> dict[str, float]:
    """Seconds of the first events of their names, once an iteration is committed."""
    first: dict[str, float] = {}
    for event in job.told():
        first.setdefault(str(event["event"]), float(str(event["seconds"])))
    return first if "iteration.commit" in first else {}


def kill(job: Job, rank: int) -> dict[str, float]:
    """Kill a rank once a checkpoint is there; the seconds of each phase until the next commit."""
    job.wait(lambda: committed(job) and any(event["event"] == "checkpoint.published" for event in job.told()))
    known, killed = len(job.died), time.time()
    os.kill(job.ranks()[rank], signal.SIGKILL)
    job.wait(lambda: len(job.died) > known and job.events.stat().st_size == 0)
    began = time.time()
    job.wait(lambda: bool(committed(job)))
    first = committed(job)
    detection, load = job.died[-1] - killed, first["iteration.start"]
    parts = (detection, began - job.died[-1], load, first["iteration.commit"])  # that event says how long
    return dict(zip(PHASES, parts, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), options.ranks, options.kills, words)
        measured = [kill(job, number % options.ranks) for number in range(options.kills)]
        job.process.terminate()
        job.process.wait()
    for phase in PHASES:
        seconds = [each[phase] for each in measured]
        print(f"{phase:10} median {statistics.median(seconds):6.3f} s   {[round(s, 3) for s in seconds]}")
    totals = [sum(each.values()) for each in measured]
    print(f"{'in all':10} median {statistics.median(totals):6.3f} s   load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
