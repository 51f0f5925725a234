"""The settings of a run: one table, and where each value came from.

`SETTINGS` is the only place that knows a setting's name, type, default and help; the command line, the
environment (`ITERREDUCE_*`), the file `iterreduce.toml` in the current directory and `--show-config` are all
made from it. A later source wins: default, file, environment, command line.

This module reads no command line (`cli.py` does) and decides nothing: the engine gets an `Options`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from iterreduce.errors import UsageError, did_you_mean

CONFIG_FILE = "iterreduce.toml"
ENVIRONMENT_PREFIX = "ITERREDUCE_"

#: Variables with our prefix that are no settings of a run: of our tests, and for ranks from their supervisor.
NO_SETTINGS = ("ITERREDUCE_NO_SKIPS", "ITERREDUCE_TEST_", "ITERREDUCE_SUPERVISED")
#: The scratch directory that is none: what does not fit the budget is an error.
NO_SCRATCH = "none"
#: The least memory budget that the settings take: less is a size without its unit.
LEAST_BUDGET = 64 << 10
#: Faults of tests (`iterreduce.testing.faults`), as JSON.
FAULTS_VARIABLE = "ITERREDUCE_TEST_FAULTS"


@dataclass(frozen=True)
class Options:
    """What the engine and the command line need to know about a run; the defaults suit library use.

    >>> Options(memory_bytes=parse_size("4GiB")).memory_bytes
    4294967296
    """

    out: str | None = None
    summary: str | None = None
    events: str | None = None
    explain: bool = False
    naive: bool = False
    check: bool = False
    reproducible: bool = False
    quiet: bool = False
    memory_bytes: int | None = None
    scratch: str | None = None
    partitions: int = 1024
    threads: int | None = None
    checkpoint_dir: str | None = None
    checkpoint_every: int | None = None
    checkpoint_files: str = "node"
    fresh: bool = False
    mtbf: float | None = None
    time_limit: float | None = None
    recover: str = "auto"
    copy_every: int | None = None
    respawn: int = 0
    node_leaders: str = "auto"
    start_timeout: float = 120.0
    recover_timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise UsageError(
                f"memory_bytes: wanted bytes above zero, got {self.memory_bytes}; None: no budget"
            )


@dataclass(frozen=True)
class Kind:
    """How the value of a setting is written."""

    placeholder: str
    wanted: str
    parse: Callable[[str], Any]


@dataclass(frozen=True)
class Setting:
    """One line of the table; `name` is the key in the file, `field` the one in `Options`."""

    name: str
    kind: Kind
    help: str
    field: str = ""
    on_command_line: bool = True

    @property
    def option_field(self) -> str:
        return self.field or self.name

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def default(self) -> Any:
        return next(field.default for field in fields(Options) if field.name == self.option_field)


_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGTP", 1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def default_scratch(environment: Mapping[str, str] = os.environ) -> str:
    """Where the command line puts what the budget has no room for, unless ``--scratch`` says otherwise.

    >>> default_scratch({"TMPDIR": "/local/7"}), default_scratch({})
    ('/local/7', '/tmp')
    """
    return environment.get("TMPDIR") or "/tmp"


def parse_size(text: str) -> int:
    """Bytes of a size such as `4GiB` (1024s), `500MB` (1000s) or `65536`.

    >>> parse_size("1.5 KiB"), parse_size("500MB"), parse_size("0")
    (1536, 500000000, 0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(text)
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(nbytes: float) -> str:
    """A size for people, in 1024s.

    >>> format_size(0), format_size(1536), format_size(4 * 2**30)
    ('0 B', '1.5 KiB', '4.0 GiB')
    """
    if nbytes < 1024:
        return f"{int(nbytes)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        nbytes /= 1024
        if nbytes < 1024 or unit == "TiB":
            break
    return f"{nbytes:.1f} {unit}"


def _parse_switch(text: str) -> bool:
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if text.strip().lower() not in words:
        raise ValueError(text)
    return words[text.strip().lower()]


def _parse_count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _parse_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


def parse_duration(text: str) -> float:
    """Seconds of a duration: `90`, `30s`, `10m`, `24h`, `2d`, or as Slurm writes them: `MM:SS`, `HH:MM:SS`,
    `D-HH:MM:SS`.

    >>> parse_duration("90"), parse_duration("1.5h"), parse_duration("1-00:30:00")
    (90.0, 5400.0, 88200.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text)
    if match is not None:
        seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    else:
        match = re.fullmatch(r"\s*(?:(\d+)-(?=\d+:\d+:))?(?:(\d+):)?(\d+):(\d+)\s*", text)
        if match is None:
            raise ValueError(text)
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60.0 + rest
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


def _parse_whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _parse_files(text: str) -> str:
    if text not in ("node", "rank"):
        raise ValueError(text)
    return text


def _parse_recover(text: str) -> str:
    if text not in ("auto", "off"):
        raise ValueError(text)
    return text


def _parse_leaders(text: str) -> str:
    if text not in ("auto", "always", "never"):
        raise ValueError(text)
    return text


def _parse_path(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


SWITCH = Kind("", "true or false", _parse_switch)
PATH = Kind("PATH", "a path", _parse_path)  # of a file that is written
DIRECTORY = Kind("DIR", "a directory", _parse_path)
PLACE = Kind("DIR", "a directory, or none", _parse_path)
SIZE = Kind("SIZE", "a size such as 4GiB or 500MB", parse_size)
COUNT = Kind("N", "a whole number of at least 1", _parse_count)
SECONDS = Kind("SECONDS", "seconds above zero", _parse_seconds)
WHOLE = Kind("N", "a whole number, 0 or more", _parse_whole)
DURATION = Kind("TIME", "a time such as 90, 30m, 24h or 1-12:00:00", parse_duration)
LEADERS = Kind("WHEN", "auto, always or never", _parse_leaders)
FILES = Kind("WHOSE", "node or rank", _parse_files)
RECOVER = Kind("WHEN", "auto or off", _parse_recover)

SETTINGS: tuple[Setting, ...] = (
    Setting("out", PATH, "write the result here, by suffix: .npy .npz .h5 .csv .tsv .parquet"),
    Setting("summary", PATH, "write what the run did as JSON"),
    Setting("events", PATH, "write what happens, as it happens, as JSON lines"),
    Setting("explain", SWITCH, "print the plan: what is made when, and what moves; run nothing"),
    Setting("naive", SWITCH, "switch every cache off: re-read, re-shuffle and re-plan in each iteration"),
    Setting(
        "check", SWITCH, "slow checks: frozen arrays unchanged, all ranks in the same stage, rows conserved"
    ),
    Setting("reproducible", SWITCH, "the same bits on any number of ranks"),
    Setting("memory", SIZE, "memory budget of each rank", field="memory_bytes"),
    Setting(
        "scratch", PLACE, "put what the budget has no room for here, or none; not set: $TMPDIR, else /tmp"
    ),
    Setting("partitions", COUNT, "logical partitions of the key space, at least the number of ranks"),
    Setting("threads", COUNT, "threads of each rank; not set: its share of the cores of its node"),
    Setting("checkpoint_dir", DIRECTORY, "save here, and go on from what was saved here by the same job"),
    Setting("fresh", SWITCH, "begin anew, whatever was saved"),
    Setting("checkpoint_every", WHOLE, "save after every N iterations, 0: never; not set: Daly's interval"),
    Setting("checkpoint_files", FILES, "one checkpoint file per node, or per rank"),
    Setting("mtbf", DURATION, "mean time between interrupts of the whole job; not set: learnt, or 24h"),
    Setting("time_limit", DURATION, "save and stop, with exit status 75, before this time is over"),
    Setting("recover", RECOVER, "go on without ranks that die: auto (where the MPI can), or off"),
    Setting(
        "copy_every", WHOLE, "copy the state to the next rank every N iterations, 0: never; not set: if cheap"
    ),
    Setting("respawn", WHOLE, "start new ranks for lost ones, at most N times (Open MPI, to go on in place)"),
    Setting(
        "recover_timeout",
        SECONDS,
        "end the job when ranks have not agreed on who is left after this time",
        on_command_line=False,
    ),
    Setting(
        "node_leaders",
        LEADERS,
        "ranks exchange through the first of their node: auto (beyond 256 on several nodes), always, never",
        on_command_line=False,
    ),
    Setting("quiet", SWITCH, "no progress"),
    Setting(
        "start_timeout",
        SECONDS,
        "give up when not all ranks have started after this time",
        on_command_line=False,
    ),
)


@dataclass(frozen=True)
class Config:
    """An `Options` and, for each setting by name, where its value came from."""

    options: Options
    origins: Mapping[str, str]

    def describe(self) -> str:
        """A line for every setting: name, value, origin."""
        rows = [
            (
                setting.name,
                _show(setting, getattr(self.options, setting.option_field)),
                self.origins[setting.name],
            )
            for setting in SETTINGS
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}" for name, value, origin in rows)


def resolve(
    command_line: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    directory: str | os.PathLike[str] = ".",
) -> Config:
    """Every setting's value and origin; `command_line` maps names to values that are already parsed.

    Raises UsageError for an unknown name in the file or the environment and for a value that does not parse.

    >>> config = resolve({"check": True}, environment={"ITERREDUCE_MEMORY": "1GiB"}, directory="/nonexistent")
    >>> config.options.check, config.origins["check"]
    (True, 'command line')
    >>> config.options.memory_bytes, config.origins["memory"], config.origins["quiet"]
    (1073741824, 'ITERREDUCE_MEMORY', 'default')
    """
    chosen: dict[str, tuple[Any, str]] = {setting.name: (setting.default, "default") for setting in SETTINGS}
    chosen |= _from_file(Path(directory) / CONFIG_FILE)
    chosen |= _from_environment(os.environ if environment is None else environment)
    chosen |= {name: (value, "command line") for name, value in (command_line or {}).items()}
    values = {setting.option_field: chosen[setting.name][0] for setting in SETTINGS}
    return Config(Options(**values), {name: origin for name, (_, origin) in chosen.items()})


def parse_setting(setting: Setting, text: str, where: str) -> Any:
    """The value of `text`; UsageError says where it stood and what was wanted."""
    try:
        value = setting.kind.parse(text)
    except ValueError:
        raise UsageError(f"{where}: wanted {setting.kind.wanted}, got {text!r}") from None
    if setting.kind is SIZE and value < LEAST_BUDGET:
        raise UsageError(
            f"{where}: {text} means {value} bytes, and a budget has at least {format_size(LEAST_BUDGET)}; "
            "write a size with its unit, such as 4GiB"
        )
    return value


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    by_variable = {setting.variable: setting for setting in SETTINGS}
    chosen = {}
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable.startswith(NO_SETTINGS):
            continue
        if variable not in by_variable:
            hint = did_you_mean(variable, by_variable)
            raise UsageError(f"unknown setting in the environment: {variable}{hint}")
        setting = by_variable[variable]
        chosen[setting.name] = (parse_setting(setting, text, variable), variable)
    return chosen


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    if not path.is_file():
        return {}
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as TOML: {error}") from None
    by_name = {setting.name: setting for setting in SETTINGS}
    chosen = {}
    for name, value in entries.items():
        if name not in by_name:
            raise UsageError(f"{path}: unknown setting {name!r}{did_you_mean(name, by_name)}")
        chosen[name] = (_from_toml(by_name[name], value, f"{path}: {name}"), str(path))
    return chosen


def _from_toml(setting: Setting, value: Any, where: str) -> Any:
    if isinstance(value, dict | list) or isinstance(value, bool) != (setting.kind is SWITCH):
        raise UsageError(f"{where}: wanted {setting.kind.wanted}, got {value!r}")
    return value if isinstance(value, bool) else parse_setting(setting, str(value), where)


def _show(setting: Setting, value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "true" if value else "false"
    return format_size(value) if setting.kind is SIZE else str(value)
