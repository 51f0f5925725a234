"""`@ir.app`: a function whose typed parameters are the arguments of a program.

    @ir.app
    def kmeans(points: ir.Dataset, k: int = 8, tolerance: float = 1e-4) -> ir.Loop:
        \"\"\"Cluster POINTS (column x) into K groups.\"\"\"

becomes `python -m iterreduce kmeans.py points.h5 --k 64`. The decorator only looks at the signature and
returns the function itself; it runs nothing. Annotations are read as text where they are text, so that
describing an app loads neither Numba nor MPI. Reading the command line is the business of `cli.py`.

| parameter | on the command line |
|---|---|
| annotated `Dataset` | a path to read; positional, in order (`Dataset \\| None = None`: `--name PATH`) |
| annotated `Group` | nothing: the ranks of this run |
| without default | positional |
| with default | `--name-with-dashes VALUE`, or `--name` and `--no-name` for a bool |

Types: int, float, str, bool, pathlib.Path, Literal[...] of strings or ints, and each of them with `| None`.
"""

from __future__ import annotations

import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from iterreduce.errors import UsageError
from iterreduce.options import SETTINGS

Function = TypeVar("Function", bound=Callable[..., Any])

_MARK = "__iterreduce_app__"
_SWITCH_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WANTED = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    pathlib.Path: "a path",
}
#: Names of the command line itself that an app's parameters cannot take, beside the settings.
RESERVED = frozenset({"help", "version", "show_config"})


@dataclass(frozen=True)
class Parameter:
    """One parameter of an app: `role` is "dataset", "group" or "value"."""

    name: str
    role: Literal["dataset", "group", "value"]
    type: type
    choices: tuple[Any, ...]
    required: bool
    default: Any
    by_position: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return self.type is bool and not self.required

    def parse(self, text: str) -> Any:
        """The value that `text` stands for; ValueError says what was wanted."""
        if self.choices:
            return self._choose(text)
        try:
            return _SWITCH_WORDS[text.lower()] if self.type is bool else self.type(text)
        except (ValueError, KeyError):
            raise ValueError(f"wanted {_WANTED[self.type]}, got {text!r}") from None

    def _choose(self, text: str) -> Any:
        for choice in self.choices:
            if str(choice) == text:
                return choice
        raise ValueError(f"wanted one of {', '.join(map(str, self.choices))}, got {text!r}")


@dataclass(frozen=True)
class App:
    """An app as described by its signature and docstring."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    doc: str

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.doc.split("\n", 1)[0]

    @property
    def arguments(self) -> tuple[Parameter, ...]:
        """The parameters that stand on the command line, in order."""
        return tuple(parameter for parameter in self.parameters if parameter.role != "group")

    def build(self, values: Mapping[str, Any], group: Any, open_dataset: Callable[[str], Any]) -> Any:
        """Call the function: `values` by parameter name (datasets as paths), the rest as told."""
        ordered: list[Any] = []
        named: dict[str, Any] = {}
        for parameter in self.parameters:
            value = group if parameter.role == "group" else values[parameter.name]
            if parameter.role == "dataset" and value is not None:
                value = open_dataset(value)
            if parameter.by_position:
                ordered.append(value)
            else:
                named[parameter.name] = value
        return self.function(*ordered, **named)


def app(function: Function) -> Function:
    """Mark the one function of a file that `python -m iterreduce FILE.py` runs; returns it unchanged.

    It returns a Loop or a Dataset to run, or None when it did its work itself. Raises UsageError, which names
    the parameter, for a type that has no form on the command line and for a name that a run option has.

    >>> @app
    ... def scale(points: "Dataset", factor: float, center: bool = False):
    ...     'Scale POINTS.'
    >>> [(parameter.name, parameter.role, parameter.required) for parameter in find_app(scale).arguments]
    [('points', 'dataset', True), ('factor', 'value', True), ('center', 'value', False)]
    """
    setattr(function, _MARK, describe(function))
    return function


def find_app(thing: object) -> App | None:
    """The description that `app` left on a function, or None."""
    found = getattr(thing, _MARK, None) if inspect.isfunction(thing) else None
    return found if isinstance(found, App) else None


def describe(function: Callable[..., Any]) -> App:
    """Read signature and docstring."""
    if not inspect.isfunction(function):
        raise UsageError(f"@ir.app marks a function, not {type(function).__name__}")
    signature = inspect.signature(function)
    parameters = tuple(
        _describe_parameter(function, parameter) for parameter in signature.parameters.values()
    )
    return App(function.__name__, function, parameters, inspect.getdoc(function) or "")


def _describe_parameter(function: types.FunctionType, parameter: inspect.Parameter) -> Parameter:
    where = f"parameter {parameter.name!r} of app {function.__name__!r}"
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise UsageError(f"{where}: an app takes named parameters only, no *args or **kwargs")
    _refuse_clash(parameter.name, where)
    required = parameter.default is inspect.Parameter.empty
    by_position = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    role = _role(parameter.annotation)
    if role != "value":
        return Parameter(parameter.name, role, str, (), required, None, by_position)
    annotation = _evaluate(function, parameter, where)
    value_type, choices = _value_type(annotation, parameter.default, where)
    default = None if required else parameter.default
    if required and value_type is bool:
        raise UsageError(f"{where}: a bool becomes a switch and needs a default, True or False")
    return Parameter(parameter.name, "value", value_type, choices, required, default, by_position)


def _refuse_clash(name: str, where: str) -> None:
    taken = {setting.name for setting in SETTINGS if setting.on_command_line} | RESERVED
    plain = name.removeprefix("no_")
    if name in taken or (plain != name and plain in taken):
        flag = "--" + plain.replace("_", "-")
        raise UsageError(f"{where}: {flag} is a run option of iterreduce; give the parameter another name")


def _role(annotation: Any) -> Literal["dataset", "group", "value"]:
    """By name, so that neither class has to be loaded."""
    for name in _names_in(annotation):
        if name == "Dataset":
            return "dataset"
        if name == "Group":
            return "group"
    return "value"


def _names_in(annotation: Any) -> list[str]:
    if isinstance(annotation, str):
        return [part.strip().rpartition(".")[2] for part in annotation.strip("'\" ").split("|")]
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return [getattr(member, "__name__", "") for member in members]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _evaluate(function: types.FunctionType, parameter: inspect.Parameter, where: str) -> Any:
    """The annotation as an object; only this parameter's, the others may name what is not loaded."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        return typing.get_type_hints(holder, function.__globals__)[parameter.name]
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise UsageError(f"{where}: cannot read its type {parameter.annotation!r}: {error}") from None


def _value_type(annotation: Any, default: Any, where: str) -> tuple[type, tuple[Any, ...]]:
    if annotation is inspect.Parameter.empty:
        annotation = str if default is None or default is inspect.Parameter.empty else type(default)
    if _is_union(annotation):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        annotation = members[0] if len(members) == 1 else annotation
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation)
    if annotation in _WANTED:
        return annotation, ()
    if isinstance(annotation, type) and issubclass(annotation, pathlib.PurePath):
        return pathlib.Path, ()
    raise UsageError(
        f"{where}: type {annotation!r} has no form on the command line; "
        "wanted int, float, str, bool, pathlib.Path, Literal[...], ir.Dataset or ir.Group"
    )
