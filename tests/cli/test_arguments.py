"""The command line as a list of words: what it means, and what it says when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from iterreduce.appfile import AppFileError, load_app
from iterreduce.arguments import Answer, CommandLineError, Request, parse_command_line
from iterreduce.errors import UsageError

KMEANS = '''
"""An app."""
from typing import Literal
import iterreduce as ir

@ir.app
def kmeans(points: ir.Dataset, name: str, k: int = 8, max_iterations: int | None = None, rate: float = 0.5,
           loud: bool = False, mode: Literal["fast", "exact"] = "fast", group: ir.Group = None):
    """Cluster POINTS.

    The second paragraph.
    """
'''


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "kmeans.py"
    file.write_text(KMEANS)
    return str(file)


def parsed(*words: str) -> Request:
    request = parse_command_line(words)
    assert isinstance(request, Request)
    return request


def answered(*words: str) -> str:
    answer = parse_command_line(words)
    assert isinstance(answer, Answer)
    return answer.text


def test_run_options_stand_before_and_after_the_app_and_between_its_arguments(path: str) -> None:
    request = parsed("--check", path, "a.npy", "--memory=1GiB", "--k", "3", "bob", "--out", "o.csv", "--loud")
    assert request.values == {
        "points": "a.npy",
        "name": "bob",
        "k": 3,
        "max_iterations": None,
        "rate": 0.5,
        "loud": True,
        "mode": "fast",
    }
    options = request.config.options
    assert (options.check, options.memory_bytes, options.out) == (True, 2**30, "o.csv")


def test_negative_numbers_switches_off_and_a_double_dash_are_understood(path: str) -> None:
    request = parsed("--no-check", path, "--rate", "-1e-3", "--no-loud", "--k=-4", "--", "a.npy", "--strange")
    assert (request.values["rate"], request.values["k"], request.values["name"]) == (-1e-3, -4, "--strange")
    assert request.config.options.check is False
    assert parsed(path, "a.npy", "-5").values["name"] == "-5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["a", "b", "--max-iteratons", "3"],
            'unknown option --max-iteratons; did you mean "--max-iterations"?',
        ),
        (["a", "b", "--chek"], 'unknown option --chek; did you mean "--check"?'),
        (["a", "b", "-k", "3"], 'unknown option -k; did you mean "--k"?'),
        (["a", "b", "--k", "many"], "--k: wanted a whole number, got 'many'"),
        (["a", "b", "--k"], "--k wants a value: --k INT"),
        (["a", "b", "--out", "--naive"], "--out wants a value: --out PATH"),
        (["a", "b", "--loud=yes"], "--loud is a switch and takes no value, got 'yes'"),
        (["a", "b", "--mode", "slow"], "--mode: wanted one of fast, exact, got 'slow'"),
        (["a", "b", "--memory", "much"], "--memory: wanted a size such as 4GiB or 500MB, got 'much'"),
        (["a", "b", "--memory", "4"], "--memory: 4 means 4 bytes, and a budget has at least 64.0 KiB"),
        (["a", "b", "--memory=0"], "write a size with its unit, such as 4GiB"),
        (["a", "b", "c"], "takes 2 arguments without a name, 'c' is one too many"),
        (["a"], "wants NAME"),
        ([], "wants POINTS NAME"),
    ],
)
def test_a_wrong_word_is_named_with_what_was_wanted(path: str, words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_command_line([path, *words])
    assert message in str(caught.value)


def test_questions_are_answered_with_and_without_an_app(path: str) -> None:
    assert "usage: python -m iterreduce [RUN OPTIONS] APP.py" in answered("--help")
    text = answered(path, "--help")
    assert "Cluster POINTS.\n\nThe second paragraph." in text
    assert "--mode {fast,exact}" in text and "--max-iterations INT" in text and "--summary PATH" in text
    assert answered("--version").startswith("iterreduce ")
    shown = answered("--memory", "2GiB", path, "--show-config")
    assert "2.0 GiB" in shown and "command line" in shown and "start_timeout" in shown


def test_without_an_app_or_with_a_file_that_is_none_the_nearest_is_named(path: str) -> None:
    with pytest.raises(CommandLineError, match="which app"):
        parse_command_line(["--check"])
    with pytest.raises(CommandLineError, match=r'--memroy; did you mean "--memory"'):
        parse_command_line(["--memroy", "3", path])
    for near in ("kmean.py", "kmeans"):
        with pytest.raises(UsageError, match=r'did you mean ".*kmeans\.py"\?'):
            parse_command_line([str(Path(path).with_name(near))])
    with pytest.raises(UsageError, match=r"ends in \.py, got 'points\.h5'"):
        parse_command_line(["points.h5"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def work(:\n", "line 1\n    def work(:"),
        ("import nothing_of_that_name\n", "needs the module 'nothing_of_that_name', not found\n  at "),
        ("x = 1\n1 / 0\n", "line 2, in <module>\n    1 / 0"),
        ("from iterreduce import no_such_name\n", "line 1, in <module>: from iterreduce import no_such_name"),
        ("x = 1\n", "holds no app; mark one function with @ir.app"),
        ("import iterreduce as ir\n@ir.app\ndef a(): ...\n@ir.app\ndef b(): ...\n", "holds 2 apps (a, b)"),
        ("import iterreduce as ir\n@ir.app\ndef a(memory: int): ...\n", "--memory is a run option"),
        ("b'\\0'\0", "is not valid Python"),
    ],
)
def test_a_file_that_cannot_be_loaded_says_why_and_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(AppFileError) as caught:
        load_app(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "appfile.py" not in str(caught.value)


def test_an_app_imports_its_neighbours_and_leaves_no_bytecode(tmp_path: Path, path: str) -> None:
    (tmp_path / "helper_of_second.py").write_text("ANSWER = 42\n")
    second = tmp_path / "second.py"
    second.write_text(
        "import iterreduce as ir\nfrom helper_of_second import ANSWER\n@ir.app\ndef second(): return ANSWER\n"
    )
    assert load_app(str(second)).function() == 42
    assert not list((tmp_path / "__pycache__").glob("second.*"))
