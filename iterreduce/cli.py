"""The command line, from arguments to exit status.

Read the arguments and load the app; answer questions at once; otherwise start with the other ranks, agree
that all are well, build the work, run it, write what was asked for, and leave with one message at most.

Exit status: 0 done (the outcome says how), 1 the program or its input failed, 2 wrong usage, 130 interrupted;
75 is kept for "stopped after saving".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from iterreduce import launch
from iterreduce.appfile import AppFileError, raised_by, user_line, user_traceback
from iterreduce.arguments import USAGE, Answer, CommandLineError, Request, parse_command_line
from iterreduce.collectives import Group
from iterreduce.errors import InputError, IterReduceError, LaunchError, OutputError, StageError, UsageError
from iterreduce.events import Events
from iterreduce.launch import INTERRUPTED, Crew, Problem, say
from iterreduce.memory import peak_rss_bytes
from iterreduce.options import FAULTS_VARIABLE, Options, resolve
from iterreduce.start import launched_rank
from iterreduce.version import __version__

FAILED, USAGE_STATUS = 1, 2


def run_command_line(arguments: Sequence[str], started: float | None = None) -> int:
    """Do what the arguments say; returns the exit status.

    `started` is `perf_counter()` at the beginning of the process, for the summary.
    """
    started = time.perf_counter() if started is None else started
    try:
        return _start(_read(arguments), started)
    except KeyboardInterrupt:
        launch.speak_for_all(launch.job_key(), INTERRUPTED.text)
        return INTERRUPTED.status


def _print(text: str) -> None:
    """Print help; who reads only its beginning (``| head``) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _start(request: Request | Answer | Problem, started: float) -> int:
    if isinstance(request, Answer):
        if launched_rank() == 0:
            _print(request.text)
        return 0
    try:
        crew = launch.join(_start_timeout(request))
    except LaunchError as error:
        launch.speak_for_all(launch.job_key(), f"iterreduce: {error}")
        return FAILED
    with launch.interrupts(crew):
        return _run_together(crew, request, started)


def _read(arguments: Sequence[str]) -> Request | Answer | Problem:
    """What the command line asks for; a problem is kept until all ranks can speak of it."""
    try:
        return parse_command_line(arguments)
    except (UsageError, AppFileError) as error:
        if isinstance(error, AppFileError):
            return Problem(FAILED, f"iterreduce: {error}")
        hint = "" if "usage:" in str(error) else f"\n{USAGE}"
        return Problem(USAGE_STATUS, f"iterreduce: {error}{hint}\n--help shows all options")
    except SystemExit as error:
        return _exit_problem(error)
    except Exception:
        return Problem(FAILED, traceback.format_exc())


def _exit_problem(error: SystemExit) -> Problem:
    """As Python itself treats `sys.exit(code)`."""
    if error.code is None or isinstance(error.code, int):
        return Problem(error.code or 0, "")
    return Problem(FAILED, str(error.code))


def _start_timeout(request: Request | Problem) -> float:
    if isinstance(request, Request):
        return request.config.options.start_timeout
    try:
        return resolve().options.start_timeout
    except UsageError:
        return Options().start_timeout


def _run_together(crew: Crew, request: Request | Problem, started: float) -> int:
    problem = request if isinstance(request, Problem) else None
    digest = "" if isinstance(request, Problem) else _digest(request)
    problem = launch.agree(crew, problem, digest)
    if problem is None and isinstance(request, Request):
        problem = _attempt(crew, request, started)
    if problem is None:
        return 0
    say(problem.text)
    return problem.status


def _digest(request: Request) -> str:
    """Of what must be the same on all ranks: the app's text, its arguments, the settings."""
    with open(request.path, "rb") as file:
        parts = [
            file.read(),
            repr(sorted(request.values.items())).encode(),
            repr(request.config.options).encode(),
        ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _attempt(crew: Crew, request: Request, started: float) -> Problem | None:
    """Work, and on failure leave together; does not return when other ranks did not fail."""
    try:
        return _work(crew, request, started)
    except KeyboardInterrupt:
        return _interrupted(crew)
    except BaseException as error:
        if isinstance(error, StageError) and error.failure.kind == "KeyboardInterrupt":
            return _interrupted(crew)  # it came while user code was running
        return launch.leave(crew, _describe(error, request))


def _interrupted(crew: Crew) -> Problem:
    if not crew.alone:
        launch.end_now(crew.job, INTERRUPTED)
    return INTERRUPTED


def _describe(error: BaseException, request: Request) -> Problem:
    """Our own errors speak for themselves; of others the traceback is shown from the app's frames on."""
    if isinstance(error, SystemExit):
        return _exit_problem(error)
    if isinstance(error, CommandLineError):
        return Problem(USAGE_STATUS, f"iterreduce: {error}")
    if isinstance(error, StageError | InputError | OutputError):
        return Problem(FAILED, f"iterreduce: {error}")
    if isinstance(error, IterReduceError):
        line = user_line(error, request.path)
        return Problem(FAILED, f"iterreduce: {error}" + (f"\n  at {line}" if line else ""))
    return Problem(FAILED, user_traceback(error, request.path))


# -- the work ------------------------------------------------------------------------------------------------


def _work(crew: Crew, request: Request, started: float) -> Problem | None:
    options = request.config.options
    _check_ranks(crew.group.size, options)
    problem = launch.agree(crew, _check_outputs(options) if crew.group.rank == 0 else None, "")
    if problem is not None:
        return problem
    try:
        work = request.app.build(request.values, crew.group, _open)
    except UsageError as error:
        if raised_by(error, request.path):  # the app does not take these values
            raise CommandLineError(str(error)) from error
        raise
    if work is None:
        return _nothing_to_write(options, request, crew.group.rank == 0)
    return _run(crew, request, work, started)


def _open(path: str) -> Any:
    from iterreduce.dataset import Dataset

    return Dataset.read(path)


def _run(crew: Crew, request: Request, work: Any, started: float) -> Problem | None:
    from iterreduce.dataset import run

    events, options = Events(), request.config.options
    start_seconds = time.perf_counter() - started
    with _faults(events, crew.group):
        with _watching(events, options, first=crew.group.rank == 0):
            result = run(work, crew.group, options, events)
        return _hand_over(crew, request, result, started, start_seconds)


def _hand_over(
    crew: Crew, request: Request, result: Any, started: float, start_seconds: float
) -> Problem | None:
    """Write what was asked for."""
    options = request.config.options
    if options.out is not None:
        from iterreduce.sources.write import write_result

        write_result(crew.group, options.out, result.batch, result.everywhere)
    if options.summary is not None:
        return _write_summary(crew, request, result, started, start_seconds)
    return None


def _faults(events: Events, group: Group) -> contextlib.AbstractContextManager[Any]:
    """What tests of failures want to go wrong: data in the environment, of every rank."""
    if FAULTS_VARIABLE not in os.environ:
        return contextlib.nullcontext()
    from iterreduce.testing import Faults, striking

    return striking(Faults.from_environment(), events, group)


def _check_ranks(size: int, options: Options) -> None:
    if options.partitions < size:
        raise CommandLineError(
            f"--partitions {options.partitions} is less than the {size} ranks; give at least {size}"
        )


def _check_outputs(options: Options) -> Problem | None:
    """Before any work, on the rank that writes: an output that cannot be written would waste it."""
    try:
        if options.out is not None:
            from iterreduce.sources.write import check_output

            check_output(options.out)
        for name, path in (("--summary", options.summary), ("--events", options.events)):
            if path is not None:
                _check_directory(name, path)
    except (OutputError, UsageError) as error:
        return Problem(FAILED, f"iterreduce: {error}", for_all=True)
    return None


def _check_directory(name: str, path: str) -> None:
    directory = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise OutputError(f"{name} {path} is a directory; wanted the name of a file")
    if not os.path.isdir(directory):
        raise OutputError(f"{name} {path}: there is no directory {directory}; make it first")
    if not os.access(directory, os.W_OK):
        raise OutputError(f"{name} {path}: no permission to write in {directory}")


def _nothing_to_write(options: Options, request: Request, speaks: bool) -> Problem | None:
    asked = [
        flag for flag, path in (("--out", options.out), ("--summary", options.summary)) if path is not None
    ]
    if not asked:
        if (
            speaks
            and not options.quiet
            and request.app.function.__annotations__.get("return", "") not in (None, "None")
        ):
            say(
                f"iterreduce: app {request.app.name!r} returned None, so nothing was run; return the loop or "
                "dataset to run, or annotate the app with -> None if it did its work itself"
            )
        return None
    raise UsageError(
        f"app {request.app.name!r} returned None, so there is nothing for {' and '.join(asked)}; "
        "return the loop or dataset to run"
    )


@contextlib.contextmanager
def _watching(events: Events, options: Options, first: bool) -> Iterator[None]:
    """The watchers of rank 0, for the time of the run."""
    with contextlib.ExitStack() as stack:
        if first and not options.quiet:
            from iterreduce.observe.progress import Progress

            progress = Progress(sys.stderr)
            stack.callback(progress.close)
            events.subscribe(progress)
        if first and options.events is not None:
            from iterreduce.observe.jsonlines import JsonLines

            # The name is opened now: whoever follows the file sees it grow.
            lines = JsonLines(stack.enter_context(open(options.events, "w", encoding="utf-8")))
            stack.callback(lines.close)
            events.subscribe(lines)
        yield


def _write_summary(
    crew: Crew, request: Request, result: Any, started: float, start_seconds: float
) -> Problem | None:
    """Rank 0 writes; all ranks learn whether it could."""
    from iterreduce.observe.summary import add_up, most_held, spread, summarise, write_summary

    group, path = crew.group, str(request.config.options.summary)
    mine = json.dumps([peak_rss_bytes(), result.bytes_exchanged, result.memory_bytes]).encode()
    peaks, exchanged, held = zip(*map(json.loads, group.allgather_bytes(mine)), strict=True)
    problem = None
    if group.rank == 0:
        seconds = {"start": start_seconds} | dict(result.seconds) | {"total": time.perf_counter() - started}
        summary = summarise(
            request.app.name,
            peaks,
            {"iterreduce": __version__, "mpi": group.library},
            threads=result.threads,
            iterations=result.iterations,
            outcome=result.outcome.name,
            residual=result.residual,
            result_sha256=result.result_sha256,
            reproducible=result.reproducible,
            seconds=seconds,
            seconds_per_iteration=spread(result.seconds_per_iteration),
            bytes_exchanged=add_up(exchanged),
            memory_bytes=most_held(held),
            values=result.values,
        )
        try:
            write_summary(path, summary)
        except OSError as error:
            text = f"iterreduce: cannot write the summary {path}: {error.strerror}"
            problem = Problem(FAILED, text, for_all=True)
    return launch.agree(crew, problem, "")
