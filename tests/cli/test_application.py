"""`@ir.app`: what a signature means on the command line, and what it cannot mean."""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import pytest

from iterreduce.application import App, app, find_app
from iterreduce.errors import UsageError


def described(function: Callable[..., Any]) -> App:
    found = find_app(app(function))
    assert found is not None
    return found


def test_the_decorator_returns_the_function_itself() -> None:
    def work() -> None: ...

    assert app(work) is work
    assert find_app(work) is not None
    assert find_app(inspect) is None


def test_every_kind_of_parameter_has_its_role_and_type() -> None:
    def work(
        points: Dataset,  # type: ignore[name-defined]  # noqa: F821
        name: str,
        k: int = 8,
        rate: float = 0.5,
        loud: bool = False,
        where: pathlib.Path = pathlib.Path("."),
        mode: Literal["fast", "exact"] = "fast",
        most: int | None = None,
        labels: ir.Dataset | None = None,  # type: ignore[name-defined]  # noqa: F821
        group: ir.Group = None,  # type: ignore[name-defined]  # noqa: F821
    ) -> None:
        """First line.

        More.
        """

    seen = described(work)
    assert seen.summary == "First line." and seen.doc == "First line.\n\nMore."
    assert [(p.name, p.role, p.type, p.required) for p in seen.parameters] == [
        ("points", "dataset", str, True),
        ("name", "value", str, True),
        ("k", "value", int, False),
        ("rate", "value", float, False),
        ("loud", "value", bool, False),
        ("where", "value", pathlib.Path, False),
        ("mode", "value", str, False),
        ("most", "value", int, False),
        ("labels", "dataset", str, False),
        ("group", "group", str, False),
    ]
    assert [p.name for p in seen.arguments][-1] == "labels"


def test_classes_named_dataset_and_group_are_known_without_postponed_annotations() -> None:
    class Dataset: ...

    class Group: ...

    def work(points, group): ...  # type: ignore[no-untyped-def]

    work.__annotations__ = {"points": Dataset, "group": Group}
    assert [p.role for p in described(work).parameters] == ["dataset", "group"]


def test_a_parameter_without_annotation_takes_the_type_of_its_default() -> None:
    def work(name, k=3, rate=0.5): ...  # type: ignore[no-untyped-def]

    assert [p.type for p in described(work).parameters] == [str, int, float]


def test_build_hands_over_values_datasets_and_the_group_however_parameters_are_declared() -> None:
    def work(points: Dataset, /, k: int = 8, *, group: Group, labels: Dataset | None = None) -> object:  # type: ignore[name-defined]  # noqa: F821
        return points, k, group, labels

    seen = described(work)
    values = {"points": "a.npy", "k": 3, "labels": None}
    assert seen.build(values, "ranks", lambda path: f"<{path}>") == ("<a.npy>", 3, "ranks", None)


def test_a_parameter_with_the_name_of_a_run_option_is_refused_by_name() -> None:
    def work(points: str, memory: int = 3) -> None: ...

    with pytest.raises(UsageError, match=r"'memory'.*--memory is a run option"):
        app(work)


@pytest.mark.parametrize("name", ["help", "show_config", "no_check"])
def test_names_of_the_command_line_itself_are_refused_too(name: str) -> None:
    def work(**_: object) -> None: ...

    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False)
    work.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="run option"):
        app(work)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (dict[str, int], "no form on the command line"),
        ("Missing", "cannot read its type"),
        (bool, "needs a default"),
    ],
)
def test_a_type_that_cannot_be_written_is_refused_at_the_definition(annotation: object, message: str) -> None:
    def work(thing): ...  # type: ignore[no-untyped-def]

    work.__annotations__ = {"thing": annotation}
    with pytest.raises(UsageError, match=message):
        app(work)


def test_star_arguments_and_classes_are_refused() -> None:
    def work(*paths: str) -> None: ...

    with pytest.raises(UsageError, match=r"no \*args"):
        app(work)
    with pytest.raises(UsageError, match="marks a function"):
        app(pathlib.Path)
