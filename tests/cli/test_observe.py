"""What watchers write: progress for people, JSON lines and the summary for programs."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from iterreduce.events import Event, Events
from iterreduce.observe.jsonlines import JsonLines
from iterreduce.observe.progress import Progress
from iterreduce.observe.summary import spread, summarise, write_summary
from iterreduce.options import Options
from iterreduce.watchers import _first


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def commit(iteration: int, seconds: float) -> Event:
    done = {
        "iteration": iteration,
        "residual": 0.5**iteration,
        "seconds": 0.25,
        "bytes": 4096,
        "invariant_bytes": 2**20,
    }
    return Event("iteration.commit", seconds, done)


END = Event(
    "run.end", 99.0, {"outcome": "ITERATIONS_USED", "iterations": 100, "residual": 0.1, "seconds": 25.0}
)


def test_a_log_gets_a_plain_line_at_most_every_few_seconds_and_a_last_one() -> None:
    out = io.StringIO()
    watch = Progress(out)
    for number in range(1, 101):
        watch(commit(number, number * 0.1))
    watch(END)
    lines = out.getvalue().splitlines()
    assert lines[0] == "iteration 1  residual 0.5  sent 4.0 KiB  0.25 s  invariants 1.0 MiB"
    assert [line.split()[1] for line in lines[:-1]] == ["1", "51"]
    assert lines[-1] == "iterations used after 100 iterations, residual 0.1, 25 s"


def test_a_terminal_gets_one_live_line_that_ends_when_the_run_does() -> None:
    out = Terminal()
    watch = Progress(out)
    watch(commit(1, 0.0))
    watch(commit(2, 0.05))
    watch(commit(3, 0.2))
    assert out.getvalue().count("\r") == 2 and "\n" not in out.getvalue()
    watch(END)
    watch.close()
    assert out.getvalue().endswith("25 s\x1b[K\n") and out.getvalue().count("\n") == 1


def test_a_failed_run_leaves_the_live_line() -> None:
    out = Terminal()
    watch = Progress(out)
    watch(commit(1, 0.0))
    watch.close()
    assert out.getvalue().endswith("\n")


def test_lines_wait_for_a_second_or_the_end_and_hold_numpy_scalars_and_infinity() -> None:
    out = io.StringIO()
    watch = JsonLines(out)
    watch(Event("iteration.commit", 10.0, {"iteration": np.int64(1), "residual": np.float64("inf")}))
    assert out.getvalue() == ""
    watch(Event("iteration.start", 11.5, {"iteration": 2}))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines == [
        {"event": "iteration.commit", "seconds": 0.0, "iteration": 1, "residual": "inf"},
        {"event": "iteration.start", "seconds": 1.5, "iteration": 2},
    ]
    watch(Event("run.end", 11.6, {"outcome": None}))
    assert json.loads(out.getvalue().splitlines()[2])["outcome"] is None


def test_a_file_of_events_that_cannot_be_written_is_said_once_and_ends_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop, events = contextlib.ExitStack(), Events()
    with stop:
        _first(stop, events, Options(quiet=True, events="/dev/full"))
        for iteration in range(3):
            events.emit("run.end", outcome=None, iterations=iteration, residual=None, seconds=0.0)
    said = capsys.readouterr().err
    assert said.count("iterreduce: cannot write the events /dev/full: No space left on device; they end") == 1
    assert len(said.splitlines()) == 1


def test_the_summary_is_replaced_in_one_step_and_says_what_was_used(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    summary = summarise(
        "kmeans",
        [100, 300],
        {"mpi": "none"},
        iterations=3,
        residual=np.float64(0.5),
        seconds_per_iteration=spread([0.3, 0.1, 0.2]),
        values={"inertia": float("nan")},
        checkpoints=None,
    )
    write_summary(str(path), summary)
    read = json.loads(path.read_text())
    assert read["app"] == "kmeans" and read["ranks"] == 2 and read["residual"] == 0.5
    assert read["peak_rss_bytes"] == {"max": 300, "sum": 400}
    assert read["seconds_per_iteration"] == {"min": 0.1, "median": 0.2, "max": 0.3}
    assert read["values"] == {"inertia": "nan"} and "checkpoints" not in read
    assert {"python", "numpy", "numba", "h5py", "mpi"} <= set(read["versions"])
    assert read["cpu"]["cores"] >= 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_summary_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OSError):
        write_summary(str(tmp_path / "run.json"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_residual_that_is_no_number_is_told_with_the_iteration_from_which_on() -> None:
    out = io.StringIO()
    watch = Progress(out)
    for number, residual in enumerate([0.5, np.nan, 0.1, np.nan, np.nan], 1):
        watch(Event("iteration.commit", number, {"iteration": number, "residual": residual}))
    watch(Event("run.end", 9.0, {"outcome": "ITERATIONS_USED", "iterations": 5, "residual": np.nan}))
    assert out.getvalue().splitlines()[-1] == (
        "iterations used after 5 iterations, residual nan "
        "(not a number since iteration 4, so no distance could end the loop)"
    )
