"""What README.md shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys

from iterreduce.options import SETTINGS
from tests.launch import ROOT, mpirun_environment

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_program_prints_what_stands_below_it_before_line_25() -> None:
    program, printed = re.search(r"```python\n(.*?)```\n\nprints `(.*?)`", README, re.DOTALL).groups()  # type: ignore[union-attr]
    assert README[: README.index(printed)].count("\n") < 25
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, env=mpirun_environment()
    )
    assert result.stdout == printed + "\n", result.stderr


def test_the_table_of_options_is_that_of_the_settings() -> None:
    shown = re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)
    wanted = [setting.flag for setting in SETTINGS if setting.on_command_line] + ["--show-config"]
    assert sorted(shown) == sorted(wanted)


def test_every_file_that_it_links_to_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
