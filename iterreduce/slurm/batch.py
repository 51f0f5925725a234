"""One batch script that needs no other file, made of those in `scripts/`.

The template's `#SBATCH` lines stay where the job does not say otherwise; what the template reads
(environment.sh, ranks.sh) is written into its place; the app and its arguments stand in the script, quoted
for the shell. Text in, text out: nothing is submitted here, and nothing of an app is known.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from math import prod
from pathlib import Path

MARK = "# Written by `python -m iterreduce submit`"
_INCLUDED = re.compile(r'^\. "\$SCRIPTS/([\w.]+)"\n', re.M)
_FOUND = re.compile(r"^(?:# Slurm runs a copy.*\n)?SCRIPTS=.*\n", re.M)
_LINTER = re.compile(r"\A# shellcheck .*\n")
_COUNTED = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class BatchJob:
    """What the script runs, and with which options of sbatch: names without dashes, in the order written.

    `sweep`: values by parameter, each combination of which is a job of its own. `variables`: of
    environment.sh. `setup`: lines of shell before all else, also before `set -u`, which modules of many sites
    do not bear. `scripts`: a folder with a site's own environment.sh and others.
    """

    template: str
    words: tuple[str, ...]
    options: Mapping[str, str]
    sweep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    scripts: str | None = None


def script(job: BatchJob) -> str:
    """The text of the whole script. Raises OSError where a folder of scripts has not all of them."""
    head, body = _text(job, job.template).split("set -euo pipefail\n", 1)
    told = [MARK + "; hand it in again by `sbatch` and its name.", *_options(job, head)]
    own = [f"{name}={shlex.quote(value)}" for name, value in _variables(job).items()]
    own.append(f"set -- {shlex.join(job.words)}")
    body = _INCLUDED.sub(lambda found: "\n" + _text(job, found[1]), _FOUND.sub("", body).lstrip("\n"))
    return "\n".join(["#!/bin/bash", *told, *job.setup, "set -euo pipefail", "", *own]) + "\n" + body


def count(job: BatchJob) -> int:
    """How many jobs it makes."""
    return prod(map(len, job.sweep.values()))


def seconds(text: str) -> int | None:
    """A time limit as sbatch reads it; None when it is none.

    >>> [seconds(text) for text in ("90", "5:30", "1:00:00", "1-0", "1-2:30", "soon")]
    [5400, 330, 3600, 86400, 95400, None]
    """
    found = _COUNTED.fullmatch(text)
    if found is None:
        return None
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"] is not None:  # hours first
        parts = [*parts, 0, 0][:3]
    elif len(parts) < 3:  # minutes first
        parts = [0, *parts, 0][:3]
    hours, minutes, rest = parts
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _text(job: BatchJob, name: str) -> str:
    folder: Traversable = resources.files("iterreduce.slurm") / "scripts"
    if job.scripts is not None:
        folder = Path(job.scripts)
    return _LINTER.sub("", (folder / name).read_text(encoding="utf-8"))


def _variables(job: BatchJob) -> dict[str, str]:
    sweep = " ".join(f"{name}={','.join(values)}" for name, values in job.sweep.items())
    return {**job.variables, **({"SWEEP": sweep} if sweep else {})}


def _options(job: BatchJob, head: str) -> list[str]:
    """The `#SBATCH` lines: the template's, where the job has no other, and then the job's."""
    lines = [line.removeprefix("#SBATCH --") for line in head.splitlines() if line.startswith("#SBATCH --")]
    kept = {name: value for name, _, value in (line.partition("=") for line in lines)}
    if "ntasks" in job.options:  # in all: how many are on a node is Slurm's to say
        del kept["nodes"], kept["ntasks-per-node"]
    kept |= job.options
    if job.sweep:
        kept["array"] = f"0-{count(job) - 1}"
    made = [f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in kept.items()]
    return [*made, *(f"#SBATCH {word}" for word in job.more)]
