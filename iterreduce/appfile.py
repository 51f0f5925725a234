"""Loads the file of an app and finds its one `@ir.app`.

The file is run as a module with annotations kept as text, so that `points: ir.Dataset` does not load the
engine only to describe the app, and without a bytecode file. Its directory leads `sys.path`, as for a script.
What goes wrong in it is told in the words of that file: the frames of this package are left out.
"""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from iterreduce.application import App, find_app
from iterreduce.errors import IterReduceError, UsageError

#: The compiler flag of the line that opens this file.
AS_TEXT = annotations.compiler_flag

_EXAMPLE = "mark one function with @ir.app: it returns the loop or dataset to run"


class AppFileError(IterReduceError):
    """The app's file cannot be loaded, or holds no app, or several."""


class _AppLoader(importlib.machinery.SourceFileLoader):
    """Reads the source each time: a bytecode file made with other flags must not be found by an import."""

    def path_stats(self, path: Any) -> Any:
        raise OSError("no bytecode cache")

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1, **_: Any) -> CodeType:  # type: ignore[override]
        flags = AS_TEXT
        code: CodeType = compile(data, path, "exec", flags=flags, dont_inherit=True, optimize=_optimize)
        return code


def check_app_path(path: str) -> None:
    """UsageError when `path` does not end in `.py` or does not exist; it names what comes near."""
    if not path.endswith(".py"):
        raise UsageError(f"wanted an app, a file that ends in .py, got {path!r}{_near(path)}")
    if not os.path.isfile(path):
        raise UsageError(f"no such app: {path}{_near(path)}")


def load_app(path: str) -> App:
    """The one app of the file; AppFileError tells why there is none."""
    check_app_path(path)
    module = _run_file(os.path.abspath(path), path)
    return _only_app(module, path)


def user_traceback(error: BaseException, path: str) -> str:
    """The traceback from the first frame of the file `path` on; all of it when there is none."""
    frames = error.__traceback__
    start = frames
    while start is not None and not _is_file(start.tb_frame.f_code.co_filename, path):
        start = start.tb_next
    return "".join(traceback.format_exception(type(error), error, start or frames)).rstrip()


def user_line(error: BaseException, path: str) -> str:
    """`FILE, line N, in NAME`: the innermost frame of the file `path`, or nothing."""
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_file(frame.filename, path)]
    if not inside:
        return ""
    last = inside[-1]
    return f"{path}, line {last.lineno}, in {last.name}: {(last.line or '').strip()}"


def raised_by(error: BaseException, path: str) -> bool:
    """Whether the file `path` itself raised the error, rather than something that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_file(frames[-1].filename, path)


def _run_file(absolute: str, path: str) -> ModuleType:
    name = f"app_{Path(absolute).stem}"
    spec = importlib.util.spec_from_file_location(name, absolute, loader=_AppLoader(name, absolute))
    if spec is None or spec.loader is None:
        raise AppFileError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, os.path.dirname(absolute))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise AppFileError(_explain(error, absolute, path)) from error
    return module


def _explain(error: Exception, absolute: str, path: str) -> str:
    if isinstance(error, SyntaxError) or "null bytes" in str(error):  # a ValueError before Python 3.11.4
        return f"{path} is not valid Python\n" + "".join(traceback.format_exception_only(error)).rstrip()
    if isinstance(error, ModuleNotFoundError):
        advice = f"install it for {sys.executable}, or mend the import"
        return f"{path} needs the module {error.name!r}, not found\n  {_where(error, absolute)}\n  {advice}"
    if isinstance(error, IterReduceError | ImportError):
        return f"{path} failed while it was loaded: {error}\n  {_where(error, absolute)}"
    return f"{path} failed while it was loaded\n{user_traceback(error, absolute)}"


def _where(error: Exception, absolute: str) -> str:
    return f"at {user_line(error, absolute)}"


def _only_app(module: ModuleType, path: str) -> App:
    """Of the functions that the file itself defines; imported ones belong to their own file."""
    found = [
        app
        for app in (find_app(value) for value in vars(module).values())
        if app is not None and app.function.__module__ == module.__name__
    ]
    if not found:
        raise AppFileError(f"{path} holds no app; {_EXAMPLE}")
    if len(found) > 1:
        names = ", ".join(app.name for app in found)
        raise AppFileError(
            f"{path} holds {len(found)} apps ({names}), wanted one; keep each in a file of its own"
        )
    return found[0]


def _near(path: str) -> str:
    """A file with nearly that name, here or in `apps/`."""
    parent, name = os.path.split(path)
    stem = name.removesuffix(".py")
    near = []
    for directory in dict.fromkeys((parent, "apps", os.path.join(parent, "apps"))):
        files = sorted(file for file in _listing(directory or ".") if file.endswith(".py"))
        by_stem = {file.removesuffix(".py"): file for file in files}
        near += [os.path.join(directory, by_stem[s]) for s in difflib.get_close_matches(stem, by_stem, n=1)]
    return f'; did you mean "{near[0]}"?' if near else ""


def _listing(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _is_file(name: str, path: str) -> bool:
    return os.path.abspath(name) == os.path.abspath(path)
