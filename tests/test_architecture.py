"""The import rule and its relatives, read from the source: also imports inside functions count.

`LAYERS` is the order of the package: a module may import what stands before it, on an earlier line or to its
left. A folder is one entry: inside it any order without cycles. Each rule is tested on planted violations as
well.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "iterreduce"
MOST_LINES = 500

LAYERS: tuple[tuple[str, ...], ...] = (
    ("version", "errors", "events", "options", "memory", "stopping"),
    ("columns",),
    (
        "words",
        "epochs",
        "launched",
        "windows",
        "group",
        "leaders",
        "healing",
        "refilling",
        "aside",
        "collectives",
        "cores",
    ),
    ("heaps", "storage", "sources"),
    ("scratch",),
    ("saving",),
    ("table",),
    ("exchange",),
    ("distances", "rules", "fixpoint"),
    ("stages", "loop", "laid"),
    ("loop_cache",),
    (
        "maps",
        "agreement",
        "folding",
        "directory",
        "slots",
        "lineage",
        "rowrounds",
        "rowwindow",
        "rowplan",
        "total",
        "shuffle",
        "steady",
        "rowshuffle",
        "rownumbers",
        "rangeshuffle",
        "uncombined",
        "indexing",
        "linkprogram",
        "linklanes",
        "linkgrids",
        "linkexchange",
        "linkshuffle",
        "linkimprove",
        "linksettle",
        "answers",
        "matching",
        "lookup",
        "inplace",
        "reproducible",
        "carrying",
        "superstep",
        "levels",
        "accounting",
        "control",
        "transaction",
        "plain",
        "loading",
        "fingerprints",
        "journal",
        "savedfacts",
        "capture",
        "parts",
        "copies",
        "deeds",
        "checkpoint",
        "lasting",
        "driver",
        "recovery",
        "run",
    ),
    ("plan",),
    ("dataset",),
    ("frontends",),
    ("observe",),
    ("testing",),
    (
        "application",
        "appfile",
        "arguments",
        "namedfiles",
        "start",
        "signals",
        "supervising",
        "launch",
        "survival",
        "watchers",
        "doctor",
        "slurm",
        "cli",
        "__main__",
    ),
    ("__init__",),
)

#: Libraries with one door each: a module, or a folder.
DOORS = {"numba": "columns", "h5py": "storage", "mpi4py": "collectives", "pyarrow": "sources"}
#: Neither on the wire nor on disk.
FORBIDDEN = ("pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
APP_LIBRARIES = {PACKAGE, "numpy", "scipy"}

Sources = Mapping[str, str]


def sources_of(folder: Path, prefix: str) -> dict[str, str]:
    """Dotted module name -> text, below `folder`; a package is named as its `__init__`."""
    return {
        ".".join([prefix, *path.relative_to(folder).with_suffix("").parts]): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


def imported(module: str, text: str) -> Iterator[tuple[str, str | None]]:
    """(module, name in it or None) for every import anywhere in the text, relative ones made absolute."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            yield from ((name, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant):
                yield str(argument.value), None


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def own_imports(module: str, text: str, sources: Sources) -> set[str]:
    """The modules of this package that the text imports."""
    found = set()
    for name, attribute in imported(module, text):
        if name.split(".")[0] != PACKAGE:
            continue
        candidates = [f"{name}.{attribute}", f"{name}.{attribute}.__init__", name, f"{name}.__init__"]
        found.add(next((candidate for candidate in candidates if candidate in sources), name))
    return found - {module}


def entry_of(module: str) -> str:
    """The name in LAYERS: the file at the top, or the folder."""
    return module.split(".")[1]


def place_of(entry: str) -> tuple[int, int] | None:
    return next(
        ((line, names.index(entry)) for line, names in enumerate(LAYERS) if entry in names),
        None,
    )


def order_violations(sources: Sources) -> list[str]:
    """Imports that point at something that does not stand before."""
    wrong = []
    for module, text in sources.items():
        mine = place_of(entry_of(module))
        if mine is None:
            wrong.append(f"{module} has no place in LAYERS")
            continue
        for target in sorted(own_imports(module, text, sources)):
            theirs = place_of(entry_of(target))
            inside = entry_of(target) == entry_of(module)
            if theirs is None or not (inside or theirs < mine):
                wrong.append(f"{module} imports {target}")
    return wrong


def cycles(sources: Sources) -> list[str]:
    """Modules that import themselves through others."""
    reached = {module: own_imports(module, text, sources) for module, text in sources.items()}
    for middle in sources:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    return sorted(module for module, targets in reached.items() if module in targets)


def door_violations(sources: Sources) -> list[str]:
    """Libraries imported elsewhere than at their door, and forbidden ones."""
    wrong = []
    for module, text in sources.items():
        for name, _ in imported(module, text):
            library = name.split(".")[0]
            if library in FORBIDDEN or DOORS.get(library, entry_of(module)) != entry_of(module):
                wrong.append(f"{module} imports {library}")
        wrong += [
            f"{module} calls {node.func.id}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec")
        ]
    return wrong


def neighbour_violations(sources: Sources) -> list[str]:
    """Front ends that know each other, and watchers that know more than events."""
    wrong = []
    for module, text in sources.items():
        for target in own_imports(module, text, sources):
            same_folder = entry_of(target) == entry_of(module)
            if entry_of(module) == "frontends" and same_folder and not module.endswith(".__init__"):
                wrong.append(f"{module} imports {target}")
            if entry_of(module) == "observe" and not same_folder and entry_of(target) != "events":
                wrong.append(f"{module} imports {target}")
    return wrong


def app_violations(sources: Sources) -> list[str]:
    """Imports of an app beyond this package's front, NumPy, SciPy and Python's own library."""
    allowed = APP_LIBRARIES | set(sys.stdlib_module_names)
    return [
        f"{module} imports {name}"
        for module, text in sources.items()
        for name, _ in imported(module, text)
        if name.split(".")[0] not in allowed or name.startswith(f"{PACKAGE}.")
    ]


@pytest.fixture(scope="module")
def package() -> Sources:
    found = sources_of(ROOT / PACKAGE, PACKAGE)
    assert len(found) > 20
    return found


def test_each_module_imports_only_what_stands_before_it(package: Sources) -> None:
    assert order_violations(package) == []


def test_there_are_no_import_cycles(package: Sources) -> None:
    assert cycles(package) == []


def test_numba_h5py_mpi4py_and_pyarrow_have_one_door_each_and_nothing_is_pickled(package: Sources) -> None:
    assert door_violations(package) == []


def test_front_ends_do_not_know_each_other_and_watchers_know_events_only(package: Sources) -> None:
    assert neighbour_violations(package) == []


def test_apps_import_the_front_of_the_package_numpy_and_scipy_only() -> None:
    assert app_violations(sources_of(ROOT / "apps", "apps")) == []


def test_no_file_has_more_than_500_lines() -> None:
    files = [
        path for folder in (PACKAGE, "apps", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: lines for path, lines in long.items() if lines > MOST_LINES} == {}


PLANTED = {
    "iterreduce.errors": "",
    "iterreduce.events": "",
    "iterreduce.table": "from iterreduce.errors import IterReduceError",
    "iterreduce.columns.__init__": "",
    "iterreduce.columns.batch": "from .schema import Field",
    "iterreduce.columns.schema": "",
    "iterreduce.frontends.pregel": "",
}


def planted(**texts: str) -> dict[str, str]:
    return PLANTED | {f"iterreduce.{name.replace('__', '.')}": text for name, text in texts.items()}


def test_the_rules_hold_for_the_planted_package_before_anything_is_wrong() -> None:
    assert order_violations(PLANTED) == cycles(PLANTED) == door_violations(PLANTED) == []
    assert neighbour_violations(PLANTED) == []


@pytest.mark.parametrize(
    "text",
    [
        "import iterreduce.table",
        "from iterreduce import table",
        "from . import table",
        "from .table import Table",
        "def late():\n    from iterreduce.table import Table",
        "def late():\n    import importlib\n    importlib.import_module('iterreduce.table')",
    ],
)
def test_an_import_of_a_later_module_is_seen_wherever_it_hides(text: str) -> None:
    assert order_violations(planted(events=text)) == ["iterreduce.events imports iterreduce.table"]


def test_a_module_without_a_place_in_the_order_is_seen() -> None:
    assert order_violations(planted(stray="")) == ["iterreduce.stray has no place in LAYERS"]


def test_a_cycle_inside_a_folder_is_seen() -> None:
    found = cycles(planted(columns__schema="def late():\n    from .batch import Batch"))
    assert found == ["iterreduce.columns.batch", "iterreduce.columns.schema"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import numba", "imports numba"),
        ("def late():\n    from mpi4py import MPI", "imports mpi4py"),
        ("__import__('h5py')", "imports h5py"),
        ("import pickle", "imports pickle"),
        ("eval('1')", "calls eval"),
    ],
)
def test_a_library_at_the_wrong_door_is_seen(text: str, found: str) -> None:
    assert door_violations(planted(table=text)) == [f"iterreduce.table {found}"]


def test_front_ends_that_know_each_other_and_watchers_that_know_the_engine_are_seen() -> None:
    wrong = planted(frontends__tables="from .pregel import vertex", observe__report="import iterreduce.table")
    assert neighbour_violations(wrong) == [
        "iterreduce.frontends.tables imports iterreduce.frontends.pregel",
        "iterreduce.observe.report imports iterreduce.table",
    ]


@pytest.mark.parametrize("text", ["import pandas", "from iterreduce.exchange import plan", "import numba"])
def test_an_app_that_imports_too_much_is_seen(text: str) -> None:
    assert len(app_violations({"apps.greedy": text})) == 1


def test_an_editable_install_is_a_plain_path() -> None:
    """Without it a clone beside the script that is run is taken for the package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}
