"""Checkpoint intervals: published figures, simulated jobs, and real runs that are interrupted at random.

    python benchmarks/daly.py tables | simulate | run [--runs 30] [--mtbf 1.5] [--mtbfs 6] [--iteration 0.01]

``tables`` prints what `iterreduce.saving.intervals` gives beside what Daly and Young printed, and by how much
each estimate is off. ``simulate`` follows jobs event by event, with interrupts drawn from the law that the
formulas assume, and prints mean and standard error beside the formula.

``run`` is the real engine: a job of many short iterations, saved at the interval that it finds itself, is
interrupted at times drawn from that law (an event watcher raises, in its first iteration or its load as well)
and started again in the same directory until it is done. The model gets the measured means: time of an
iteration, blocking part and latency of a write, time to start. ``replay`` is the model with each run's own
figures and interrupts. The result of every run is checked: no iteration was lost or done twice.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from daly_model import Attempt, mean_and_error, replay, simulate

import iterreduce as ir
from iterreduce.collectives import SoloGroup
from iterreduce.errors import IterReduceError
from iterreduce.events import Event, Events
from iterreduce.run import run_loop
from iterreduce.saving.intervals import (
    best_segments,
    daly,
    exact,
    expected_wall,
    finite_wall,
    longer_last_wall,
    slide,
    young,
)

C, R, TS = 5.0, 10.0, 500 * 60.0  # minutes: Daly's example
PRINTED = {24 * 60.0: "117", 6 * 60.0: "57", 15.0: "9.1"}  # Daly's tau, by M
SEGMENTS = {24 * 60.0: (117.0, 256), 6 * 60.0: (57.0, 526), 15.0: (9.1, 3297)}
RATIOS = (1e-3, 1e-2, 0.1, 0.25, 0.5, 1.0, 1.99, 2.0)


# ---------------------------------------------------------------------- formulas


def tables() -> None:
    print("C = 5 min, R = 10 min, Ts = 500 h; tau in minutes, wall time in hours")
    print(f"{'M (min)':>8} {'Daly 2006':>9} {'eq. 37':>8} {'exact':>8} {'Young':>8} {'slide':>8} {'wall':>8}")
    for M, paper in PRINTED.items():
        taus = (daly(C, M), exact(C, M), young(C, M), slide(C, M))
        wall = expected_wall(exact(C, M), C, M, R, TS) / 60
        print(f"{M:8g} {paper:>9} {' '.join(f'{tau:8.3f}' for tau in taus)} {wall:8.2f}")
    print("\nrelative error of tau / excess of the expected wall time over the least (M = 1, R = 0)")
    print(f"{'C/M':>6} {'exact':>9}   {'eq. 37':^19} {'slide':^19} {'Young':^19}")
    for c in RATIOS:
        best = exact(c, 1.0)
        cells = [_cell(formula(c, 1.0), best, c) for formula in (daly, slide, young)]
        print(f"{c:6g} {best:9.6f}   {' '.join(cells)}")
    print("\nshort jobs, C = 1 s, M = 2.63 h: segments, and the expected wall time over the work")
    for work in (60.0, 150.0, 300.0, 1000.0, 10_000.0):
        n = best_segments(1.0, 2.63 * 3600, work)
        walls = [f(n, 1.0, 2.63 * 3600, 0.0, work) / work for f in (finite_wall, longer_last_wall)]
        print(f"{work:8g} s: n = {n:3d}, equal {walls[0]:.6f}, longer last {walls[1]:.6f}")


def _cell(tau: float, best: float, c: float) -> str:
    wall = expected_wall(tau, c, 1.0, 0.0, 1.0) / expected_wall(best, c, 1.0, 0.0, 1.0)
    return f"{tau / best - 1:+9.1e} {wall - 1:9.1e}"


# ---------------------------------------------------------------------- simulated jobs


def simulated(runs: int) -> None:
    rng = np.random.default_rng(1)
    print(f"{runs} jobs each; hours; error: standard error of the mean")
    print(f"{'M (min)':>8} {'tau':>7} {'segments':>8} {'model':>9} {'mean':>9} {'error':>7} {'off by':>7}")
    for M, (tau, segments) in SEGMENTS.items():
        for factor in (1.0, 0.5, 2.0):
            n = round(segments / factor)
            model = expected_wall(factor * tau, C, M, R, n * factor * tau) / 60
            mean, error = mean_and_error(simulate(runs, n, factor * tau + C, M, R, rng) / 60)
            print(
                f"{M:8g} {factor * tau:7.2f} {n:8d} {model:9.2f} {mean:9.2f} {error:7.2f} "
                f"{(mean - model) / error:+6.1f}s"
            )


# ---------------------------------------------------------------------- real runs


class Interrupt(BaseException):
    """The job dies here."""


@dataclass
class Watch:
    """Raises when its time has come, and keeps what an attempt measured; for `Events.subscribe`."""

    life: float
    begun: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    iterations: int = 0
    copies: list[int] = field(default_factory=list)  # after how many iterations of this attempt
    blocking: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    copied: float = 0.0  # when the last copy began
    kept: int = 0  # iterations of this attempt that were published
    ended: float = 0.0

    def __call__(self, event: Event) -> None:
        if event.name == "checkpoint.step":
            self._step(event)
            return
        if event.name == "iteration.start" and not self.first:
            self.first = event.seconds
        elif event.name == "iteration.commit":
            self.iterations, self.last = self.iterations + 1, event.seconds
        elif event.name == "checkpoint.copy":
            self.copies.append(self.iterations)
            self.blocking.append(event.fields["seconds"])
            self.copied = event.seconds - event.fields["seconds"]
        elif event.name == "run.end":
            self.ended = self.ended or event.seconds
            return
        if event.seconds - self.begun >= self.life:
            self.ended = event.seconds
            raise Interrupt

    def _step(self, event: Event) -> None:
        """May come from the writer's thread, which dies with the job, or it would publish behind its death.

        What counts is when a checkpoint has its name; the engine learns of it an iteration or two later.
        """
        if self.ended:
            raise Interrupt
        if event.fields["step"] == "published":
            self.latency.append(event.seconds - self.copied)
            self.kept = self.copies[-1]

    def attempt(self) -> dict[str, Any]:
        """What of an `Attempt` was seen; None where nothing was."""
        gaps = np.diff([0, *self.copies])
        blocked = sum(self.blocking)
        return {
            "seconds": self.ended - self.begun,
            "start": (self.first or self.ended) - self.begun,
            "iteration": (self.last - self.first - blocked) / self.iterations if self.iterations else None,
            "every": float(gaps.mean()) if len(gaps) else None,
            "blocking": statistics.fmean(self.blocking) if self.blocking else None,
            "latency": statistics.fmean(self.latency) if self.latency else None,
            "iterations": self.iterations,
            "kept": self.kept,
        }


def job(rows: int, iterations: int, seconds: float) -> ir.Loop:
    """x + 1 in every iteration, after a sleep: it takes as long whatever else the machine does."""

    def step(state: ir.Batch) -> ir.Batch:
        time.sleep(seconds)
        return state.with_columns(x=state["x"] + 1)

    body = ir.Superstep(
        "add", (ir.Local(step, ("state",), "next", cut="share"),), (ir.Replace("state", "next"),)
    )
    start = ir.Batch(x=np.arange(rows, dtype=np.float64))
    return ir.Loop(
        "count", {"rows": start}, {"state": ir.State("rows")}, (body,), ir.Until.of([], iterations), "state"
    )


@dataclass
class Experiment:
    """The job, and how often it is interrupted."""

    rows: int
    iterations: int
    seconds: float
    mtbf: float
    folder: Path

    def undisturbed(self) -> float:
        """Seconds from the first iteration to the last, without checkpoints."""
        watch = self._once(Watch(float("inf")))
        return watch.last - watch.first

    def _once(self, watch: Watch, **options: Any) -> Watch:
        events = Events()
        events.subscribe(watch, may_raise=True)
        try:
            loop = job(self.rows, self.iterations, self.seconds)
            result = run_loop(loop, SoloGroup(), ir.Options(**options), events)
        except (Interrupt, IterReduceError) as error:
            if not watch.ended or not _caused(error):
                raise
            return watch
        wanted = np.arange(self.rows) + self.iterations
        assert np.array_equal(np.sort(result["x"]), wanted), "iterations were lost or done twice"
        watch.life = 0.0  # it lived to the end
        return watch

    def interrupted(self, draw: Callable[[], float]) -> list[dict[str, Any]]:
        """All attempts of one run, from nothing to its end."""
        saved, attempts = self.folder / "saved", []
        shutil.rmtree(saved, ignore_errors=True)
        while True:
            watch = self._once(Watch(draw()), checkpoint_dir=str(saved), mtbf=self.mtbf)
            attempts.append(watch.attempt())
            if watch.life == 0.0:
                return attempts


def _caused(error: BaseException) -> bool:
    return isinstance(error, Interrupt) or "Interrupt" in str(error)


def completed(attempts: list[dict[str, Any]]) -> list[Attempt]:
    """Attempts that saw no iteration, copy or publication get the run's means of those."""
    means = {}
    for name in ("iteration", "every", "blocking", "latency"):
        seen = [a[name] for a in attempts if a[name] is not None]
        means[name] = statistics.fmean(seen) if seen else 0.0
    whole = [{**a, **{n: means[n] for n in means if a[n] is None}} for a in attempts]
    return [
        Attempt(a["seconds"], a["start"], a["iteration"], round(a["every"]), a["blocking"], a["latency"])
        for a in whole
    ]


def real(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = arguments.megabytes * 2**17
        trial = Experiment(rows, 100, arguments.iteration, arguments.mtbf, Path(folder))
        trial.undisturbed()
        per_iteration = trial.undisturbed() / 100
        iterations = round(arguments.mtbfs * arguments.mtbf / per_iteration)
        experiment = Experiment(rows, iterations, arguments.iteration, arguments.mtbf, Path(folder))
        print(
            f"{iterations} iterations of {1e3 * per_iteration:.2f} ms, state {arguments.megabytes} MiB, "
            f"M = {arguments.mtbf} s"
        )
        print(f"{'run':>4} {'attempts':>8} {'wall':>8} {'replay':>8} {'ratio':>7}   alone")
        runs, alone = [], []
        for number in range(arguments.runs):
            alone.append(experiment.undisturbed())
            attempts = experiment.interrupted(lambda: float(rng.exponential(arguments.mtbf)))
            wall = sum(a["seconds"] for a in attempts)
            model = replay(iterations, completed(attempts))
            runs.append({"wall": wall, "replay": model, "attempts": attempts})
            took = f"{wall:8.2f} {model:8.2f} {wall / model:7.3f} {alone[-1]:7.2f}"
            print(f"{number:4d} {len(attempts):8d} {took}", flush=True)
    report(experiment, runs, alone)
    if arguments.json:
        facts = {**asdict(experiment), "folder": "", "runs": runs, "alone": alone}
        Path(arguments.json).write_text(json.dumps(facts))


def report(experiment: Experiment, runs: list[dict[str, Any]], alone: list[float]) -> None:
    attempts = [a for run in runs for a in run["attempts"]]

    def mean(name: str) -> float:
        """Of all attempts that saw one, by their iterations."""
        seen = [(a[name], a["iterations"]) for a in attempts if a[name] is not None]
        return sum(value * weight for value, weight in seen) / sum(weight for _, weight in seen)

    iteration, every, blocking, latency = (mean(n) for n in ("iteration", "every", "blocking", "latency"))
    start = statistics.fmean(a["start"] for a in attempts if a["iterations"])
    interrupts = len(attempts) - len(runs)
    seen = sum(a["seconds"] for a in attempts) / max(1, interrupts)
    work, mtbf = statistics.fmean(alone), experiment.mtbf
    slowdown = (iteration - work / experiment.iterations) * every
    cost = blocking + slowdown
    tau = every * work / experiment.iterations
    model = expected_wall(tau, cost, mtbf, start + latency, work) + start
    walls, error = mean_and_error([run["wall"] for run in runs])
    replays = [run["wall"] / run["replay"] for run in runs]
    alone_ms, off = 1e3 * work / experiment.iterations, (walls - model) / error
    print(f"\nTs = {work:.2f} s = {work / mtbf:.1f} M; {interrupts} interrupts, one in {seen:.2f} s")
    print(f"iteration {1e3 * iteration:.2f} ms, alone {alone_ms:.2f} ms; start {1e3 * start:.0f} ms")
    print(f"C = {1e3 * cost:.1f} ms: blocking {1e3 * blocking:.1f}, slowdown {1e3 * slowdown:.1f}")
    print(f"C / M = {cost / mtbf:.4f}; latency {1e3 * latency:.0f} ms")
    print(f"saved every {every:.1f} iterations = {tau:.3f} s; eq. 37: {daly(cost, mtbf):.3f} s")
    print(f"wall time: mean {walls:.2f} +- {error:.2f} s, model {model:.2f} s: off by {off:+.1f} errors")
    spread = f"{min(replays):.3f} .. {max(replays):.3f}, mean {statistics.fmean(replays):.3f}"
    print(f"replay: measured / model {spread}")
    print(f"within 10 %: {sum(abs(r - 1) <= 0.1 for r in replays)} of {len(runs)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("tables", "simulate", "run"))
    parser.add_argument("--runs", type=int, help="30 real runs, or 2000 simulated ones")
    parser.add_argument("--mtbf", type=float, default=1.5, help="seconds")
    parser.add_argument("--mtbfs", type=float, default=6.0, help="fault-free time, in M")
    parser.add_argument("--iteration", type=float, default=0.01, help="seconds")
    parser.add_argument("--megabytes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="where to save")
    parser.add_argument("--json", help="write all figures here")
    arguments = parser.parse_args()
    if arguments.part == "tables":
        tables()
    elif arguments.part == "simulate":
        simulated(arguments.runs or 2000)
    else:
        arguments.runs = arguments.runs or 30
        real(arguments)


if __name__ == "__main__":
    main()
