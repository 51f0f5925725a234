"""Reads the command line: `[RUN OPTIONS] APP.py [APP ARGUMENTS AND RUN OPTIONS]`.

Two tables meet here, the settings of `options.py` and the parameters of an app; after APP.py both may stand
in any order. A name that neither has is an error with the nearest one that they have. Nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from iterreduce import options
from iterreduce.appfile import load_app
from iterreduce.application import App, Parameter
from iterreduce.errors import UsageError, did_you_mean
from iterreduce.version import __version__

USAGE = "usage: python -m iterreduce [RUN OPTIONS] APP.py [APP ARGUMENTS]"


class CommandLineError(UsageError):
    """The command line is wrong: exit status 2."""


@dataclass(frozen=True)
class Request:
    """An app to run: its file, the arguments by parameter name and the settings."""

    path: str
    app: App
    values: dict[str, Any]
    config: options.Config


@dataclass(frozen=True)
class Answer:
    """A text to print instead of running anything."""

    text: str


@dataclass(frozen=True)
class Option:
    """One spelling on the command line; a switch takes no value and means `constant`."""

    flag: str
    name: str
    is_setting: bool
    placeholder: str = ""
    parse: Callable[[str], Any] | None = None
    constant: Any = None


@dataclass
class _Found:
    settings: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    positional: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def put(self, option: Option, value: Any) -> None:
        (self.settings if option.is_setting else self.values)[option.name] = value


_QUESTIONS = {"--help": "help", "-h": "help", "--version": "version", "--show-config": "show_config"}


def parse_command_line(arguments: Sequence[str]) -> Request | Answer:
    """Load the app that the command line names and give every argument its value."""
    run_options = _table(setting_options())
    found = _Found()
    rest = _scan(list(arguments), run_options, found, stop_at_word=True)
    if not rest:
        return _without_app(found)
    path = rest.pop(0)
    app = load_app(path)
    _scan(rest, run_options | _table(app_options(app)), found, stop_at_word=False)
    if "help" in found.asked:
        return Answer(app_help(app, path))
    answer = _answer(found)
    if answer is not None:
        return answer
    return Request(path, app, _bind(app, path, found), options.resolve(found.settings))


def check_saving(request: Request) -> None:
    """UsageError for options that need a directory to save in, where there is none."""
    options, origins = request.config.options, request.config.origins
    if options.checkpoint_dir is not None:
        return
    for name in ("checkpoint_every", "checkpoint_files", "fresh", "mtbf"):
        if origins.get(name) == "command line":
            flag = "--" + name.replace("_", "-")
            raise CommandLineError(f"{flag} says how to save, but not where; give --checkpoint-dir as well")
    if options.time_limit is not None:
        raise CommandLineError(
            "--time-limit saves and stops, and there is nowhere to save; give --checkpoint-dir as well"
        )


def setting_options() -> list[Option]:
    """The run options, made from the table of settings."""
    made = []
    for setting in options.SETTINGS:
        if not setting.on_command_line:
            continue
        if setting.kind is options.SWITCH:
            made.append(Option(setting.flag, setting.name, True, constant=True))
            made.append(Option(f"--no-{setting.flag[2:]}", setting.name, True, constant=False))
        else:
            parse = _setting_parser(setting)
            made.append(Option(setting.flag, setting.name, True, setting.kind.placeholder, parse))
    return made


def app_options(app: App) -> list[Option]:
    """The options of an app: its parameters with a default."""
    made = []
    for parameter in app.arguments:
        if parameter.required:
            continue
        if parameter.is_switch:
            made.append(Option(parameter.flag, parameter.name, False, constant=True))
            made.append(Option(f"--no-{parameter.flag[2:]}", parameter.name, False, constant=False))
        else:
            parse = _parameter_parser(parameter)
            made.append(Option(parameter.flag, parameter.name, False, placeholder(parameter), parse))
    return made


def placeholder(parameter: Parameter) -> str:
    """How a parameter's value is named in usage and help.

    >>> placeholder(Parameter("k", "value", int, (), False, 8, False))
    'INT'
    """
    if parameter.required:
        return parameter.name.upper()
    if parameter.role == "dataset":
        return "PATH"
    if parameter.choices:
        return "{" + ",".join(map(str, parameter.choices)) + "}"
    return {int: "INT", float: "NUMBER", str: "TEXT"}.get(parameter.type, "PATH")


def _setting_parser(setting: options.Setting) -> Callable[[str], Any]:
    return lambda text: options.parse_setting(setting, text, setting.flag)


def _parameter_parser(parameter: Parameter) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return parameter.parse(text)
        except ValueError as error:
            where = parameter.name if parameter.required else parameter.flag
            raise CommandLineError(f"{where}: {error}") from None

    return parse


def _table(made: list[Option]) -> dict[str, Option]:
    return {option.flag: option for option in made}


def _scan(tokens: list[str], table: dict[str, Option], found: _Found, stop_at_word: bool) -> list[str]:
    """Take tokens into `found`; with `stop_at_word` returns the rest from the first word on."""
    while tokens:
        if tokens[0] == "--":
            found.positional += tokens[1:]
            return []
        if _is_word(tokens[0]):
            if stop_at_word:
                return tokens
            found.positional.append(tokens.pop(0))
        elif tokens[0] in _QUESTIONS:
            found.asked.add(_QUESTIONS[tokens.pop(0)])
        else:
            _take_option(tokens, table, found)
    return []


def _take_option(tokens: list[str], table: dict[str, Option], found: _Found) -> None:
    flag, equals, text = tokens.pop(0).partition("=")
    if flag not in table:
        raise CommandLineError(f"unknown option {flag}{_hint(flag, table)}")
    option = table[flag]
    if option.parse is None:
        if equals:
            raise CommandLineError(f"{flag} is a switch and takes no value, got {text!r}")
        found.put(option, option.constant)
        return
    if not equals:
        if not tokens or tokens[0].partition("=")[0] in table or tokens[0] in _QUESTIONS:
            raise CommandLineError(f"{flag} wants a value: {flag} {option.placeholder}")
        text = tokens.pop(0)
    found.put(option, option.parse(text))


def _is_word(token: str) -> bool:
    """Not an option: a lone dash and negative numbers are words too."""
    return not token.startswith("-") or token == "-" or re.match(r"-\.?\d", token) is not None


def _hint(flag: str, table: dict[str, Option]) -> str:
    known = [*table, *_QUESTIONS]
    long = "--" + flag.lstrip("-")
    return did_you_mean(flag, known) or (
        f'; did you mean "{long}"?' if long in known else did_you_mean(long, known)
    )


def _answer(found: _Found) -> Answer | None:
    if "version" in found.asked:
        return Answer(f"iterreduce {__version__}")
    if "show_config" in found.asked:
        return Answer(options.resolve(found.settings).describe())
    return None


def _without_app(found: _Found) -> Answer:
    if "help" in found.asked:
        return Answer(general_help())
    answer = _answer(found)
    if answer is None:
        raise CommandLineError("which app? wanted a file that ends in .py")
    return answer


def _bind(app: App, path: str, found: _Found) -> dict[str, Any]:
    """Every parameter of the app by name: given on the command line, or its default."""
    values = {parameter.name: parameter.default for parameter in app.arguments} | found.values
    wanted = [parameter for parameter in app.arguments if parameter.required]
    if len(found.positional) > len(wanted):
        extra = found.positional[len(wanted)]
        raise CommandLineError(
            f"{path} takes {len(wanted)} arguments without a name, {extra!r} is one too many"
        )
    for parameter, text in zip(wanted, found.positional, strict=False):
        values[parameter.name] = text if parameter.role == "dataset" else _parameter_parser(parameter)(text)
    missing = wanted[len(found.positional) :]
    if missing:
        names = " ".join(parameter.name.upper() for parameter in missing)
        raise CommandLineError(f"{path} wants {names}\n{app_usage(app, path)}")
    return values


def app_usage(app: App, path: str) -> str:
    """One line: what must be given, and that there are options."""
    words = [parameter.name.upper() for parameter in app.arguments if parameter.required]
    return " ".join(["usage: python -m iterreduce", path, *words, "[OPTIONS]"])


def app_help(app: App, path: str) -> str:
    """The whole docstring, the app's arguments and the run options."""
    inputs = [
        (placeholder(p), "a path to read" if p.role == "dataset" else _type_name(p))
        for p in app.arguments
        if p.required
    ]
    named = [(_spelling(p), _meaning(p)) for p in app.arguments if not p.required]
    parts = [app_usage(app, path), app.doc or "(no description: the app has no docstring)"]
    parts += _section("arguments", inputs) + _section("options of the app", named)
    return "\n\n".join(parts + _section("run options", _setting_rows()))


def general_help() -> str:
    """What the program is and the run options."""
    text = (
        "Run an iterative MapReduce app, alone or under mpirun or srun.\n"
        "`python -m iterreduce APP.py --help` shows the arguments of an app.\n"
        "`python -m iterreduce run -n N APP.py` starts the ranks, and starts them again when one dies.\n"
        "`python -m iterreduce submit APP.py` gives it to Slurm; `submit --help`.\n"
        "`python -m iterreduce doctor` says whether launcher, MPI, memory and files fit together.\n"
        "`python -m iterreduce inspect DIR` shows what a checkpoint directory holds."
    )
    return "\n\n".join([USAGE, text, *_section("run options", _setting_rows())])


def _setting_rows() -> list[tuple[str, str]]:
    rows = [
        (f"{setting.flag} {setting.kind.placeholder}".rstrip(), _with_default(setting))
        for setting in options.SETTINGS
        if setting.on_command_line
    ]
    return [
        *rows,
        ("--show-config", "print every setting, its value and where it came from"),
        ("--version", "print the version"),
        ("--help", "print this"),
    ]


def _with_default(setting: options.Setting) -> str:
    shown = setting.default is not None and not isinstance(setting.default, bool)
    return setting.help + (f" (default: {setting.default})" if shown else "")


def _spelling(parameter: Parameter) -> str:
    if parameter.is_switch:
        return f"{parameter.flag}, --no-{parameter.flag[2:]}"
    return f"{parameter.flag} {placeholder(parameter)}"


def _meaning(parameter: Parameter) -> str:
    if parameter.role == "dataset":
        return "a path to read"
    return "default: " + ("none" if parameter.default is None else str(parameter.default))


def _type_name(parameter: Parameter) -> str:
    if parameter.choices:
        return "one of " + ", ".join(map(str, parameter.choices))
    return {int: "a whole number", float: "a number", str: "text"}.get(parameter.type, "a path")


def _section(title: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    width = max(len(left) for left, _ in rows)
    return [f"{title}:\n" + "\n".join(f"  {left:{width}}  {right}" for left, right in rows)]
