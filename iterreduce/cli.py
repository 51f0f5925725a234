"""The command line, from arguments to exit status.

Read the arguments and load the app; answer questions at once; otherwise start with the other ranks, agree
that all are well, build the work, run it, write what was asked for, and leave with one message at most.

Exit status: 0 done (the outcome says how), 1 the program or its input failed, 2 wrong usage, 75 stopped and
saved, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from iterreduce import launch
from iterreduce.appfile import AppFileError, raised_by, user_line, user_traceback
from iterreduce.arguments import (
    USAGE,
    Answer,
    CommandLineError,
    Request,
    check_saving,
    parse_command_line,
)
from iterreduce.collectives import Group
from iterreduce.epochs import Refilled
from iterreduce.errors import (
    CheckpointError,
    FinishedError,
    InputError,
    IterReduceError,
    LaunchError,
    OutputError,
    StageError,
    UsageError,
)
from iterreduce.events import Events
from iterreduce.launch import INTERRUPTED, TERMINATED, Crew, Problem, say
from iterreduce.leaders import SpreadGroup
from iterreduce.memory import IN_SCRATCH, peak_rss_bytes
from iterreduce.namedfiles import check_named_files
from iterreduce.options import FAULTS_VARIABLE, Options, default_scratch, resolve
from iterreduce.signals import Watch, held
from iterreduce.start import joins, launched_rank
from iterreduce.stopping import StopRequest
from iterreduce.supervising import vitals
from iterreduce.survival import (
    guard_healing,
    part,
    replace_lost,
    tell_what_cannot_be,
    to_the_end,
    together,
)
from iterreduce.version import __version__
from iterreduce.watchers import warnings_told, watching

INSPECT_USAGE = (
    "usage: python -m iterreduce inspect DIR [--no-verify]\n"
    "Show the attempts and checkpoints of a checkpoint directory, and compare every checksum."
)

FAILED, USAGE_STATUS, STOPPED_STATUS = 1, 2, 75
STOPPED = "STOPPED_SAVED"  # the name of the outcome; its class would load the engine


def run_command_line(arguments: Sequence[str], watch: Watch | None = None) -> int:
    """Do what the arguments say; returns the exit status.

    `watch` knows when the process began, and has kept the signals that came since.
    """
    if watch is None:
        with held(arguments, time.perf_counter()) as watch:
            return run_command_line(arguments, watch)
    try:
        if arguments[:1] == ["inspect"]:
            return _inspect(arguments[1:])
        return _start(arguments, watch)
    except KeyboardInterrupt:
        launch.speak_for_all(launch.job_key(), INTERRUPTED.text)
        return INTERRUPTED.status


def _inspect(words: Sequence[str]) -> int:
    """Show what stands in a checkpoint directory; status 1 when not all of it is good."""
    directories = [word for word in words if not word.startswith("-")]
    options = [word for word in words if word.startswith("-")]
    if options in (["--help"], ["-h"]):
        _print(INSPECT_USAGE)
        return 0
    if len(directories) != 1 or options not in ([], ["--no-verify"]):
        say(f"iterreduce: wanted one directory, got {' '.join(words) or 'nothing'}\n{INSPECT_USAGE}")
        return USAGE_STATUS
    from iterreduce.saving.inspecting import describe

    text, good = describe(directories[0], verify="--no-verify" not in options)
    _print(text.rstrip("\n"))
    return 0 if good else FAILED


def _print(text: str) -> None:
    """Print help; who reads only its beginning (``| head``) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _start(arguments: Sequence[str], watch: Watch) -> int:
    # who waits for this rank cannot go on without it, so that comes first
    early = launch.join(_settings().start_timeout, watch.leave_to_parent) if joins() else None
    request = _read(arguments)
    if isinstance(request, Answer):
        if launched_rank() == 0:
            _print(request.text)
        return 0
    watch.settle(isinstance(request, Request) and request.config.options.checkpoint_dir is not None)
    options = _options(request)
    try:
        recovers = options.recover == "auto"
        crew = early or launch.join(options.start_timeout, watch.leave_to_parent, recovers)
    except LaunchError as error:
        launch.speak_for_all(launch.job_key(), f"iterreduce: {error}")
        return FAILED
    beyond_help = FAILED if options.checkpoint_dir is None else STOPPED_STATUS
    guard_healing(crew, options.recover_timeout, beyond_help)
    replace_lost(crew, options, beyond_help, arguments, time.perf_counter() - watch.started)
    origins = request.config.origins if isinstance(request, Request) else {}
    if "command line" in (origins.get("recover"), origins.get("respawn")):
        tell_what_cannot_be(crew, options)
    watch.serve(partial(_end_now, crew), partial(_tell, crew), not crew.alone)
    supervised = vitals.current()
    if supervised is not None:
        supervised.beat(watch.ask)
    work = partial(_run_together, crew, request, watch)
    status = to_the_end(crew, work, options.recover_timeout, beyond_help)
    part(crew, status)
    return status


def _end_now(crew: Crew, status: int) -> None:
    """From any thread: a signal wants the job to end whatever it is doing."""
    launch.end_now(crew, INTERRUPTED if status == INTERRUPTED.status else TERMINATED)


def _tell(crew: Crew, text: str) -> None:
    """Once per node, though every rank may have got the signal; failures are told under the job's own key."""
    if crew.alone:
        say(text)
    else:
        launch.speak_for_all(f"{crew.job}-told", text)


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


def _options(request: Request | Problem) -> Options:
    return request.config.options if isinstance(request, Request) else _settings()


def _settings() -> Options:
    """Of the environment and the file alone, if they can be read."""
    try:
        return resolve().options
    except UsageError:
        return Options()


def _run_together(crew: Crew, request: Request | Problem, watch: Watch) -> int:
    own = request if isinstance(request, Problem) else None
    digest = "" if isinstance(request, Problem) else _digest(request)
    problem = together(crew, lambda: launch.agree(crew, own, digest))
    if problem is None and isinstance(request, Request):
        problem = _attempt(crew, request, watch)
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


def _attempt(crew: Crew, request: Request, watch: Watch) -> Problem | None:
    """Work, and on failure leave together; does not return when other ranks did not fail."""
    try:
        return together(crew, lambda: _work(crew, request, watch))
    except KeyboardInterrupt:
        return _interrupted(crew)
    except Refilled:
        raise
    except BaseException as error:
        if isinstance(error, StageError) and error.failure.kind == "KeyboardInterrupt":
            return _interrupted(crew)  # it came while user code was running
        return launch.leave(crew, _describe(error, request))


def _interrupted(crew: Crew) -> Problem:
    if not crew.alone:
        launch.end_now(crew, INTERRUPTED)
    return INTERRUPTED


def _describe(error: BaseException, request: Request) -> Problem:
    """Our own errors speak for themselves; of others the traceback is shown from the app's frames on."""
    if isinstance(error, SystemExit):
        return _exit_problem(error)
    if isinstance(error, CommandLineError):
        return Problem(USAGE_STATUS, f"iterreduce: {error}")
    if isinstance(error, FinishedError):
        return _already_finished(error, request)
    if isinstance(error, StageError) and error.failure.spoken:
        return Problem(FAILED, f"iterreduce: {error.failure.message}")
    if isinstance(error, StageError | InputError | OutputError | CheckpointError):
        return Problem(FAILED, f"iterreduce: {error}")
    if isinstance(error, IterReduceError):
        line = user_line(error, request.path)
        return Problem(FAILED, f"iterreduce: {error}" + (f"\n  at {line}" if line else ""))
    return Problem(FAILED, user_traceback(error, request.path))


# -- the work ------------------------------------------------------------------------------------------------


def _work(crew: Crew, request: Request, watch: Watch) -> Problem | None:
    options = request.config.options
    if isinstance(crew.group, SpreadGroup):
        crew.group.node_leaders = options.node_leaders
    _check_ranks(crew.group.size, options)
    check_saving(request)
    problem = launch.agree(crew, _check_files(request) if crew.group.rank == 0 else None, "")
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
    if options.explain:
        _explain(crew, work)
        return None
    return _run(crew, request, work, watch)


def _open(path: str) -> Any:
    from iterreduce.dataset import Dataset

    return Dataset.read(path)


def _explain(crew: Crew, work: Any) -> None:
    """All ranks plan, rank 0 prints."""
    from iterreduce.dataset import explain_work

    text = explain_work(work, crew.group)
    if crew.group.rank == 0:
        _print(text)


def _run(crew: Crew, request: Request, work: Any, watch: Watch) -> Problem | None:
    from iterreduce.dataset import run

    events, options, supervised = Events(), request.config.options, vitals.current()
    if supervised is not None:
        options = supervised.adapt(options)
    options = replace(options, fresh=options.fresh and crew.group.epoch == 0)
    if options.scratch is None and options.memory_bytes is not None:
        options = replace(options, scratch=default_scratch())
    start_seconds = time.perf_counter() - watch.started
    stop = watch.stop_request(options.time_limit, supervised.started if supervised else watch.started)
    with _faults(events, crew.group):
        with watching(events, options, crew.group), warnings_told():
            result = run(work, crew.group, options, events, stop)
        result, problem = _written(crew, options, result), None
        if options.summary is not None:
            problem = _write_summary(crew, request, result, watch.started, start_seconds)
    if problem is not None or options.checkpoint_dir is None:
        return problem
    return (
        _stopped(crew, stop, result.iterations) if result.outcome.name == STOPPED else _finished(crew, result)
    )


def _written(crew: Crew, options: Options, result: Any) -> Any:
    """The result, of which the rows are written if they were asked for; a run that stopped has none yet."""
    if options.out is None or result.outcome.name == STOPPED:
        return result
    from iterreduce.run import delivered
    from iterreduce.sources.write import write_result

    def write(made: Any) -> Any:
        write_result(crew.group, str(options.out), made.batch, made.everywhere)
        return made

    return delivered(result, crew.group, write)


def _stopped(crew: Crew, stop: StopRequest, iterations: int) -> Problem:
    """What all ranks leave with; which of them knows why is not known. Collective."""
    reasons = [told.decode() for told in crew.farewell.allgather_bytes(stop.reason.encode()) if told]
    supervised = vitals.current()
    why = (supervised.wish if supervised else "") or (reasons[0] if reasons else "")
    where = f"after iteration {iterations}, saved" if iterations else "before the first iteration"
    text = (
        f"iterreduce: stopped by {why.replace('time limit', 'the time limit')} {where}; run the same command "
        f"again and it {'goes on' if iterations else 'begins'}"
    )
    return Problem(STOPPED_STATUS, text if crew.group.rank == 0 else "")


def _already_finished(error: FinishedError, request: Request) -> Problem:
    """Nothing is to be done, unless a result is wanted that is not there."""
    out, summary = request.config.options.out, request.config.options.summary
    if out is not None and not os.path.exists(out):
        return Problem(FAILED, f"iterreduce: there is no {out}, and {error}")
    if summary is not None and not os.path.exists(summary) and launched_rank() == 0:
        from iterreduce.observe.summary import write_summary

        kept = ("outcome", "iterations", "result_sha256")
        facts = {name: error.facts[name] for name in kept if name in error.facts}
        try:
            write_summary(summary, {"app": request.app.name, "finished_before": True, **facts})
        except OSError as problem:
            return Problem(FAILED, f"iterreduce: cannot write the summary {summary}: {problem.strerror}")
    return Problem(0, f"iterreduce: {error}")


def _finished(crew: Crew, result: Any) -> Problem | None:
    """All that was asked for is written: the checkpoint directory says so. Collective."""
    problem = None
    try:
        result.finish()
    except (OutputError, CheckpointError) as error:
        problem = Problem(FAILED, f"iterreduce: {error}", for_all=True)
    return launch.agree(crew, problem, "")


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


def _check_files(request: Request) -> Problem | None:
    """Before any work, on the rank that writes: an output that cannot be written would waste it."""
    options = request.config.options
    try:
        check_named_files(request)
        if options.out is not None:
            from iterreduce.sources.write import check_output

            check_output(options.out)
        for name, path in (("--summary", options.summary), ("--events", options.events)):
            if path is not None:
                _check_directory(name, path)
    except CommandLineError as error:
        return Problem(USAGE_STATUS, f"iterreduce: {error}", for_all=True)
    except (InputError, OutputError, UsageError) as error:
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


def _write_summary(
    crew: Crew, request: Request, result: Any, started: float, start_seconds: float
) -> Problem | None:
    """Rank 0 writes; all ranks learn whether it could."""
    from iterreduce.observe.summary import (
        add_up,
        most_held,
        most_in_scratch,
        spread,
        summarise,
        write_summary,
    )

    group, path = crew.group, str(request.config.options.summary)
    told = [
        peak_rss_bytes(),
        result.bytes_exchanged,
        result.bytes_read,
        result.memory_bytes,
        result.scratch_bytes,
    ]
    mine = json.dumps(told).encode()
    peaks, exchanged, read, held, scratch = zip(*map(json.loads, group.allgather_bytes(mine)), strict=True)
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
            bytes_read=sum(read),
            memory_bytes=most_held(held, IN_SCRATCH),
            values=result.values,
            checkpoints=result.checkpoints or None,
            recoveries=result.recoveries or None,
            copies=result.copies or None,
            scratch_bytes=most_in_scratch(scratch) if any(scratch) else None,
        )
        try:
            write_summary(path, summary)
        except OSError as error:
            text = f"iterreduce: cannot write the summary {path}: {error.strerror}"
            problem = Problem(FAILED, text, for_all=True)
    return launch.agree(crew, problem, "")
