"""`python -m iterreduce submit [OPTIONS] APP.py [APP ARGUMENTS AND RUN OPTIONS]`: hand an app in to Slurm.

The app's arguments are read here as its ranks would read them, every value of a sweep too: what they would
refuse is refused before anything waits in a queue. Then one script is written and given to sbatch. With a
checkpoint directory the job queues itself again until it is done.

Exit status: 0 submitted (or shown), 1 Slurm or the disk refused, 2 wrong usage. It starts no MPI.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from iterreduce.appfile import AppFileError
from iterreduce.arguments import Answer, CommandLineError, Request, check_saving, parse_command_line
from iterreduce.errors import IterReduceError, LaunchError, UsageError, did_you_mean
from iterreduce.slurm.batch import MARK, BatchJob, count, script, seconds

FAILED, USAGE_STATUS = 1, 2
SAVE_BEFORE = "120"
SBATCH_SECONDS = 120.0

USAGE = "usage: python -m iterreduce submit [OPTIONS] APP.py [APP ARGUMENTS AND RUN OPTIONS]"
_SBATCH = {
    "--nodes": ("N", "how many nodes (default: 1)"),
    "--ntasks": ("N", "how many ranks in all"),
    "--ntasks-per-node": ("N", "how many ranks on each node (default: 4, where --ntasks is not given)"),
    "--cpus-per-task": ("N", "cores, and so threads, of each rank (default: 1)"),
    "--time": ("TIME", "limit of one job: MINUTES, H:MM:SS or DAYS-HOURS (default: 1:00:00)"),
    "--mem": ("SIZE", "memory of each node"),
    "--partition": ("NAME", "where to wait"),
    "--account": ("NAME", "who pays"),
    "--qos": ("NAME", "quality of service"),
    "--job-name": ("NAME", "default: the app's"),
    "--output": ("FILE", "what the job says (default: NAME-NUMBER.out)"),
}
_OWN = {
    "--array": (
        "K=4,8,16",
        "a job for each value of a parameter of the app; again: for each combination",
    ),
    "--save-before": ("SECONDS", f"save so long before the limit (default: {SAVE_BEFORE})"),
    "--once": ("", "do not queue the job again, though there is a checkpoint directory"),
    "--launcher": (
        "WORDS",
        "what starts the ranks, such as 'srun --mpi=pmix' (default: as the MPI wants it)",
    ),
    "--python": ("FILE", "the interpreter on the nodes (default: this one)"),
    "--setup": ("LINE", "a line of shell before all else, such as 'module load openmpi'; may be given again"),
    "--scripts": ("DIR", "take the scripts from there, such as a copy of slurm/ that you edited"),
    "--sbatch": ("WORD", "another option of sbatch, such as --sbatch=--exclusive; may be given again"),
    "--script": ("FILE", "where to write the script (default: NAME.sbatch)"),
    "--dry-run": ("", "show the script; write and submit nothing"),
}
_KNOWN = {**_SBATCH, **_OWN}
_REPEATED = ("--array", "--setup", "--sbatch")
_COUNTS = ("--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--save-before")
#: What jobs of a sweep must not share.
_PATHS = {"out": "--out", "summary": "--summary", "events": "--events", "checkpoint_dir": "--checkpoint-dir"}


@dataclass
class Asked:
    """The command line: options of our own by flag, and the words for the ranks."""

    own: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, list[str]] = field(default_factory=lambda: {flag: [] for flag in _REPEATED})
    words: list[str] = field(default_factory=list)


def submit(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Do what the arguments behind `submit` say; `environment` is what sbatch gets. The exit status."""
    try:
        return _submit(arguments, environment)
    except UsageError as error:
        _say(str(error) if "usage:" in str(error) else f"{error}\n{USAGE}")
        return USAGE_STATUS
    except (IterReduceError, AppFileError) as error:
        _say(str(error))
    except OSError as error:
        _say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return FAILED


def _submit(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    if arguments and arguments[0] in ("--help", "-h"):
        print(_help())
        return 0
    asked = parse(arguments)
    sweep = dict(map(_swept, asked.repeated["--array"]))
    request = _checked(asked.words, sweep)
    if isinstance(request, Answer):
        print(request.text)
        return 0
    job = batch_job(asked, sweep, request)
    text = script(job)
    if "--dry-run" in asked.own:
        print(text, end="")
        return 0
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        raise LaunchError("there is no sbatch here: submit where Slurm is; --dry-run shows the script")
    path = Path(asked.own.get("--script", f"{job.options['job-name']}.sbatch"))
    _write(path, text)
    print(_told(_hand_in(path, environment), path, job, request))
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"iterreduce: {text}\n")


# -- the command line ----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> Asked:
    """Options of ours up to the app; all else is for the ranks. Raises UsageError."""
    rest, asked = list(arguments), Asked()
    while rest and rest[0].startswith("-"):
        flag, equals, text = rest.pop(0).partition("=")
        if flag not in _KNOWN:
            where = "" if did_you_mean(flag, list(_KNOWN)) else "; options of the run stand behind the app"
            raise CommandLineError(f"submit: unknown option {flag}{did_you_mean(flag, list(_KNOWN))}{where}")
        if not _KNOWN[flag][0]:
            if equals:
                raise CommandLineError(f"{flag} is a switch and takes no value, got {text!r}")
        elif not equals:
            if not rest:
                raise CommandLineError(f"{flag} wants a value: {flag} {_KNOWN[flag][0]}")
            text = rest.pop(0)
        if flag in _REPEATED:
            asked.repeated[flag].append(text)
        else:
            asked.own[flag] = _read(flag, text)
    asked.words = rest
    if not rest:
        raise CommandLineError("submit: which app? wanted a file that ends in .py")
    return asked


def _read(flag: str, text: str) -> str:
    if "\n" in text:
        raise CommandLineError(f"{flag}: wanted one line, got {text!r}")
    if flag in _COUNTS and not (text.isdecimal() and int(text)):
        raise CommandLineError(f"{flag}: wanted a whole number from 1 on, got {text!r}")
    if flag == "--time" and seconds(text) is None:
        raise CommandLineError(f"--time: wanted MINUTES, H:MM:SS or DAYS-HOURS, got {text!r}")
    return text


def _swept(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, values = text.partition("=")
    name, each = name.removeprefix("--"), tuple(values.split(","))
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or not all(re.fullmatch(r"[^\s,]+", one) for one in each):
        raise CommandLineError(f"--array: wanted a parameter and its values, such as k=4,8,16, got {text!r}")
    if len(set(each)) < len(each):
        raise CommandLineError(f"--array {text}: a value stands there twice")
    return name, each


# -- the app's arguments -------------------------------------------------------------------------------------


def _checked(words: list[str], sweep: Mapping[str, tuple[str, ...]]) -> Request | Answer:
    """What the ranks will read; every value of a sweep is tried, beside the first ones of the others."""
    first = {name: values[0] for name, values in sweep.items()}
    request = _parsed(words, first)
    if isinstance(request, Answer):
        return request
    for name, values in sweep.items():
        each = [(value, _parsed(words, first | {name: value})) for value in values]
        _check_apart(name, [(value, one) for value, one in each if isinstance(one, Request)])
    return request


def _parsed(words: Sequence[str], values: Mapping[str, str]) -> Request | Answer:
    """As array.sbatch puts them together."""
    for name, value in values.items():
        words = [*(word.replace(f"{{{name}}}", value) for word in words), f"--{name}={value}"]
    try:
        request = parse_command_line(words)
    except CommandLineError as error:
        flag = re.search(r"unknown option (\S+?)[;,]?(?:\s|$)", str(error))
        if flag is not None and flag[1] in _KNOWN:
            raise CommandLineError(f"{flag[1]} is an option of submit: it stands before the app") from None
        raise
    if isinstance(request, Request):
        check_saving(request)
    return request


def _check_apart(name: str, each: Sequence[tuple[str, Request]]) -> None:
    """Jobs that run side by side must not write to one place."""
    for path, flag in _PATHS.items():
        seen: dict[str, str] = {}
        for value, request in each:
            place = getattr(request.config.options, path)
            if place is not None and place in seen:
                raise CommandLineError(
                    f"{flag} {place}: {name}={seen[place]} and {name}={value} would both write to it; "
                    f"put {{{name}}} into it, as in {flag} 'name-{{{name}}}'"
                )
            if place is not None:
                seen[place] = value


def _strange_inputs(request: Request) -> Iterator[str]:
    for parameter in request.app.arguments:
        path = request.values.get(parameter.name)
        if parameter.role == "dataset" and isinstance(path, str) and not os.path.exists(path):
            yield f"note: there is no {path} here now; the job fails if it is not there when it starts"


# -- the script and Slurm ------------------------------------------------------------------------------------


def batch_job(asked: Asked, sweep: Mapping[str, tuple[str, ...]], request: Request) -> BatchJob:
    """The script that is asked for. Raises UsageError."""
    own, saved = asked.own, request.config.options.checkpoint_dir
    options = {flag.removeprefix("--"): own[flag] for flag in _SBATCH if flag in own}
    name = options.pop("job-name", Path(request.path).stem)
    before, limit = own.get("--save-before", SAVE_BEFORE), own.get("--time")
    if saved is not None and limit is not None and int(before) >= (seconds(limit) or 0):
        raise CommandLineError(
            f"--time {limit} is not more than the {before} s before its end in which to save: the job would "
            "only save; give it more time, or a smaller --save-before"
        )
    template = "array.sbatch" if sweep else "run.sbatch"
    if saved is not None and not sweep:
        template = "run.sbatch" if "--once" in own else "requeue.sbatch"
    return BatchJob(
        template,
        _with_directory(asked.words, request),
        {"job-name": name, **options, "signal": f"B:USR1@{before}"},
        sweep,
        _variables(own),
        tuple(asked.repeated["--setup"]),
        tuple(asked.repeated["--sbatch"]),
        own.get("--scripts"),
    )


def _variables(own: Mapping[str, str]) -> dict[str, str]:
    made = {"PYTHON": own.get("--python", sys.executable)}
    return made | ({"LAUNCHER": own["--launcher"]} if "--launcher" in own else {})


def _with_directory(words: Sequence[str], request: Request) -> tuple[str, ...]:
    """The scripts read the checkpoint directory from the words alone, not from iterreduce.toml."""
    saved, origin = request.config.options.checkpoint_dir, request.config.origins["checkpoint_dir"]
    if saved is None or origin == "command line":
        return tuple(words)
    return (f"--checkpoint-dir={saved}", *words)


def _write(path: Path, text: str) -> None:
    """Over an older script of ours, but over nothing else."""
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"{path} is there, and not a script of submit's; name another by --script")
    path.write_text(text, encoding="utf-8")


def _hand_in(path: Path, environment: Mapping[str, str]) -> str:
    """The job's number."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)],
            capture_output=True,
            text=True,
            timeout=SBATCH_SECONDS,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"sbatch has not answered for {SBATCH_SECONDS:g} s; `squeue --me` says whether the job is there"
        ) from None
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused {path}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip().partition(";")[0]


def _told(number: str, path: Path, job: BatchJob, request: Request) -> str:
    """How to follow the job."""
    name, saved = job.options["job-name"], request.config.options.checkpoint_dir
    out = job.options.get("output", "%x-%A-%a.out" if job.sweep else "%x-%j.out")
    for sign, value in (("%x", name), ("%j", number), ("%A", number), ("%a", "0")):
        out = out.replace(sign, value)
    jobs = f"{count(job)} jobs, array {number}" if job.sweep else f"job {number}"
    rows = [
        (f"squeue -j {number}", "where it stands"),
        (f"tail -F {out}", "what it says" + (", the first of the array" if job.sweep else "")),
        (f"scancel {number}", "ends it" + (", saved" if saved is not None else "")),
    ]
    if saved is not None:
        rows.insert(2, (f"python -m iterreduce inspect {saved}", "what it has saved"))
    width = max(len(left) for left, _ in rows)
    lines = [f"submitted {jobs}: {path}", *(f"  {left:{width}}  {right}" for left, right in rows)]
    return "\n".join([*lines, *_strange_inputs(request)])


def _help() -> str:
    def table(rows: Mapping[str, tuple[str, str]]) -> str:
        width = max(len(f"{flag} {value}") for flag, (value, _) in _KNOWN.items())
        return "".join(f"  {f'{flag} {value}':{width}}  {text}\n" for flag, (value, text) in rows.items())

    return (
        f"{USAGE}\n\nCheck the app's arguments, write one batch script, give it to Slurm. With a "
        "--checkpoint-dir\n(behind the app) the job saves before its limit and queues itself again until "
        "it is done.\n\n"
        f"options of sbatch:\n{table(_SBATCH)}\noptions of submit:\n{table(_OWN)}\n"
        "Run options, behind the app, are those of `python -m iterreduce --help`."
    )
