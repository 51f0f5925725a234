"""`python -m iterreduce doctor`, alone or under mpirun or srun: whether all that a job needs fits together.

Every rank gathers what it sees and meets the others; rank 0 speaks for all. Where they do not meet, the rank
that the launcher numbered 0 says so. Alone, two ranks are started to try the launcher.

`--sweep` removes MPI's shared memory that this user's killed ranks left on this node; segments that a process
has mapped stay. It starts no MPI.

Exit status: 0 nothing is broken, 1 something is, 2 wrong usage. It always ends: what may hang is a child
process with a time limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from iterreduce.doctor.checks import BROKEN, Finding, Findings, judge
from iterreduce.doctor.facts import Facts, gather
from iterreduce.doctor.meeting import CHILD, Meeting, child, meet
from iterreduce.errors import LaunchError
from iterreduce.start import CACHE_VARIABLE, OWN_DEFAULTS, launched_rank
from iterreduce.supervising.launchers import NONE, find
from iterreduce.supervising.processes import die_with_parent, kill_marked, sweep

USAGE = "usage: python -m iterreduce doctor [--json] [--dir DIR] [--timeout SECONDS] [--no-trial] | --sweep"
_HELP = f"""{USAGE}

Say whether launcher, MPI, HDF5, threads, shared memory, Slurm, clocks and files fit together, and what to do
where they do not. Under mpirun or srun it speaks of all nodes; alone it starts two ranks to try the launcher.

  --json             one JSON object
  --dir DIR          look at the file system of this checkpoint directory too
  --timeout SECONDS  ranks that have not met in MPI after so long do not meet (default: 30)
  --no-trial         start no ranks
  --sweep            only remove the shared memory that killed ranks of yours left on this node"""
TIMEOUT_SECONDS = 30.0
_MARK = "ITERREDUCE_TEST_TRIAL"


@dataclass
class Asked:
    """The command line."""

    json: bool = False
    directory: str | None = None
    timeout: float = TIMEOUT_SECONDS
    trial: bool = True


def doctor(arguments: Sequence[str]) -> int:
    """Do what the arguments behind `doctor` say; returns the exit status."""
    if list(arguments) == [CHILD]:
        return child()
    if list(arguments) == ["--sweep"]:
        sweep(since=0.0)
        return 0
    if list(arguments) in (["--help"], ["-h"]):
        print(_HELP)
        return 0
    try:
        asked = _parse(list(arguments))
    except ValueError as error:
        if launched_rank() == 0:
            sys.stderr.write(f"iterreduce: {error}\n{USAGE}\n")
        return 2
    return _examine(asked)


def _parse(rest: list[str]) -> Asked:
    asked = Asked()
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if flag in ("--dir", "--timeout") and not equals:
            if not rest:
                raise ValueError(f"{flag} wants a value")
            text = rest.pop(0)
        if flag == "--dir":
            asked.directory = text
        elif flag == "--timeout":
            asked.timeout = _seconds(text)
        elif flag == "--json" and not equals:
            asked.json = True
        elif flag == "--no-trial" and not equals:
            asked.trial = False
        else:
            raise ValueError(f"doctor: unknown option {flag}")
    return asked


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise ValueError(f"--timeout: wanted seconds, got {text!r}")


def _examine(asked: Asked) -> int:
    facts = gather(asked.directory, not os.environ.get(CACHE_VARIABLE))
    for name, value in OWN_DEFAULTS.items():  # as ranks of an app have them
        os.environ.setdefault(name, value)
    met = meet(facts, asked.directory, asked.timeout) if facts.software["mpi4py"] != "missing" else Meeting()
    if (met.rank if met.size > 1 else facts.rank) != 0:
        return 0
    found = Findings(facts, met, directory=asked.directory)
    if asked.trial and facts.launched is None and facts.software["mpi4py"] != "missing":
        found = _tried(facts, met, asked)
    findings = judge(found)
    print(_as_json(findings, found) if asked.json else _as_text(findings), flush=True)
    return int(any(finding.verdict == BROKEN for finding in findings))


# -- two ranks, to try the launcher --------------------------------------------------------------------------


def _tried(facts: Facts, met: Meeting, asked: Asked) -> Findings:
    try:
        launcher = find(2)
    except LaunchError as error:
        return Findings(facts, met, Meeting(problem=str(error)), "", asked.directory)
    if launcher.kind == NONE:
        return Findings(facts, met, None, "", asked.directory)
    program = [
        sys.executable,
        "-m",
        "iterreduce",
        "doctor",
        "--json",
        "--no-trial",
        f"--timeout={asked.timeout:g}",
    ]
    tried = _trial(launcher.command(2, program), 2 * asked.timeout + 10)
    return Findings(facts, met, tried, shlex.join(launcher.words), asked.directory)


def _trial(command: Sequence[str], seconds: float) -> Meeting:
    """What two ranks, started so, have found."""
    mark, began = f"{os.getpid()}-{time.time_ns()}", time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        launched = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, _MARK: mark},
            preexec_fn=die_with_parent,
        )
        try:
            launched.wait(seconds)
            problem = ""
        except subprocess.TimeoutExpired:
            problem = f"2 ranks have not ended after {seconds:g} s"
            launched.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                launched.wait(2)
        finally:
            kill_marked(f"{_MARK}={mark}".encode())
            launched.kill()
            launched.wait()
        out.seek(0)
        err.seek(0)
        return _trial_found(
            out.read().decode(errors="replace"), err.read(), problem, time.monotonic() - began
        )


def _trial_found(out: str, err: bytes, problem: str, seconds: float) -> Meeting:
    for line in out.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            told = json.loads(line)
            return Meeting(
                size=told["ranks"], mpi=told["mpi"], seconds=seconds, problem=problem or told["problem"]
            )
    words = [line for line in err.decode(errors="replace").splitlines() if line.strip(" -")]
    return Meeting(problem="\n".join([problem or "no rank has said anything", *words[-12:]]), seconds=seconds)


# -- what is said --------------------------------------------------------------------------------------------


def _as_text(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        first, *more = finding.text.split("\n")
        lines.append(f"{finding.verdict:7} {finding.about:10} {first}")
        lines += [f"{'':18} {line}" for line in more]
        if finding.advice:
            lines.append(f"{'':18} -> {finding.advice}")
    return "\n".join(lines)


def _as_json(findings: Sequence[Finding], found: Findings) -> str:
    """In one line: launchers mix what ranks write."""
    told = {
        "broken": any(finding.verdict == BROKEN for finding in findings),
        "ranks": found.met.size,
        "mpi": dict(found.met.mpi),
        "problem": found.met.problem,
        "findings": [asdict(finding) for finding in findings],
        "nodes": {host: asdict(facts) for host, facts in found.of_nodes().items()},
    }
    return json.dumps(told)
