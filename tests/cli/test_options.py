"""Settings: sizes, sources in their order, and names that nobody knows."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterreduce.errors import UsageError
from iterreduce.options import SETTINGS, Options, format_size, parse_size, resolve


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("65536", 65536),
        ("1k", 1000),
        ("500MB", 500_000_000),
        ("4GiB", 4 * 2**30),
        ("1.5 tib", 3 * 2**39),
    ],
)
def test_sizes_have_units_of_1000_and_of_1024(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 gigs", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@given(st.integers(0, 2**60))
def test_a_shown_size_is_within_a_twentieth_of_itself(nbytes: int) -> None:
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= nbytes / 20


def test_every_option_has_a_setting_and_every_setting_an_option() -> None:
    assert {setting.option_field for setting in SETTINGS} == {field.name for field in fields(Options)}


def test_a_later_source_wins_and_the_origin_is_kept(tmp_path: Path) -> None:
    (tmp_path / "iterreduce.toml").write_text('memory = "1GiB"\npartitions = 64\ncheck = true\n')
    environment = {"ITERREDUCE_MEMORY": "2GiB", "ITERREDUCE_PARTITIONS": "128", "HOME": "/"}
    config = resolve({"partitions": 256}, environment, tmp_path)
    assert config.options == Options(memory_bytes=2 * 2**30, partitions=256, check=True)
    assert config.origins["partitions"] == "command line"
    assert config.origins["memory"] == "ITERREDUCE_MEMORY"
    assert config.origins["check"] == str(tmp_path / "iterreduce.toml")
    assert config.origins["naive"] == "default"


def test_the_description_has_a_line_for_every_setting(tmp_path: Path) -> None:
    lines = resolve({"memory": 2**30}, {}, tmp_path).describe().splitlines()
    assert len(lines) == len(SETTINGS)
    assert next(line for line in lines if line.startswith("memory")).split() == [
        "memory",
        "1.0",
        "GiB",
        "command",
        "line",
    ]


@pytest.mark.parametrize(
    ("environment", "text", "message"),
    [
        ({"ITERREDUCE_MEMROY": "1"}, "", r'ITERREDUCE_MEMROY; did you mean "ITERREDUCE_MEMORY"\?'),
        (
            {"ITERREDUCE_MEMORY": "much"},
            "",
            "ITERREDUCE_MEMORY: wanted a size such as 4GiB or 500MB, got 'much'",
        ),
        ({"ITERREDUCE_CHECK": "maybe"}, "", "wanted true or false, got 'maybe'"),
        ({}, "partitons = 3", r'\'partitons\'; did you mean "partitions"\?'),
        ({}, "partitions = 0", "at least 1, got '0'"),
        ({}, "check = 1", "wanted true or false, got 1"),
        ({}, "memory = true", "wanted a size"),
        ({}, "[run]\ncheck = true", "unknown setting 'run'"),
        ({}, "check =", "cannot be read as TOML"),
    ],
)
def test_a_wrong_name_or_value_is_an_error_that_names_the_place(
    tmp_path: Path, environment: dict[str, str], text: str, message: str
) -> None:
    (tmp_path / "iterreduce.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        resolve({}, environment, tmp_path)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_no_bytes_is_refused_in_the_library_too(budget: int) -> None:
    with pytest.raises(UsageError, match=f"above zero, got {budget}; None: no budget"):
        Options(memory_bytes=budget)
