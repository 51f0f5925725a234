"""The files that a command line names: no output may be an input, or another output.

Looks at names and at the file system, opens and writes nothing; rank 0 does it, before any work. An app that
reads a path which does not stand on the command line is not seen here. Devices and pipes may be named twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from iterreduce.arguments import CommandLineError, Request
from iterreduce.options import PATH, SETTINGS

File = tuple[int, int] | str


def check_named_files(request: Request) -> None:
    """Raise `CommandLineError` where an output would overwrite what is read, or what is written, and, for a
    plan alone, `InputError` where what would be read is not there.
    """
    outputs = list(_outputs(request))
    _refuse_equal_outputs(outputs)
    there: dict[File, tuple[str, str]] = {
        file: (flag, path) for flag, path, file in outputs if not isinstance(file, str)
    }
    if there:
        _refuse_inputs(request, there)
    if request.config.options.explain:
        _refuse_missing(request)


def _outputs(request: Request) -> Iterator[tuple[str, str, File]]:
    """Option, path and file of each output that is a file, or will be one."""
    for setting in SETTINGS:
        path = getattr(request.config.options, setting.option_field)
        if setting.kind is PATH and path is not None and (os.path.isfile(path) or not os.path.exists(path)):
            yield setting.flag, path, _file(path)


def _file(path: str) -> File:
    """What is the same for two names of one file, links included."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def _refuse_equal_outputs(outputs: list[tuple[str, str, File]]) -> None:
    seen: dict[File, str] = {}
    for flag, path, file in outputs:
        if file in seen:
            raise CommandLineError(f"{seen[file]} and {flag} are the same file, {path}; name two")
        seen[file] = flag


def _refuse_inputs(request: Request, outputs: dict[File, tuple[str, str]]) -> None:
    for what, path in _inputs(request):
        flag, output = outputs.get(_file(path), ("", ""))
        if flag:
            raise CommandLineError(f"{flag} {output} would overwrite {what}; name another file")


def _inputs(request: Request) -> Iterator[tuple[str, str]]:
    """What it is, in words, and the path, of each file that the app may read."""
    from iterreduce.sources.asked import hint

    yield "the app itself", request.path
    for parameter in request.app.arguments:
        value, what = request.values[parameter.name], f"the input {parameter.name.upper()}"
        if parameter.role == "dataset" and value is not None:
            for path in hint(lambda value=value: _read_of(value)) or ():  # type: ignore[misc]
                yield what, path
        elif isinstance(value, str | Path):
            yield what, os.fspath(value)


def _read_of(value: str) -> list[str]:
    """The files of a dataset: of a file, a directory, a pattern, a place in an HDF5 file."""
    from iterreduce.sources.opening import open_source

    paths: list[str] = open_source(value).paths()  # type: ignore[attr-defined]
    return paths


def _refuse_missing(request: Request) -> None:
    from iterreduce.sources.files import FileState

    for parameter in request.app.arguments:
        value = request.values[parameter.name]
        if parameter.role == "dataset" and value is not None:
            for path in _read_of(value):
                FileState.of(path)
