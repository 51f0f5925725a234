"""The rules of the test run itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT

_SKIPPING = {
    "test_mark.py": "import pytest\n@pytest.mark.skip(reason='no')\ndef test_it(): pass\n",
    "test_call.py": "import pytest\ndef test_it(): pytest.skip('no')\n",
    "test_file.py": "import pytest\npytest.importorskip('no_such_module_at_all')\n",
}


@pytest.mark.parametrize("name", _SKIPPING)
def test_a_skipped_test_fails_where_nothing_may_be_skipped(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(_SKIPPING[name])
    assert run_pytest(tmp_path, "0") in (0, 5)
    assert run_pytest(tmp_path, "1") in (1, 2)


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("import pytest\n@pytest.mark.xfail\ndef test_it(): assert 0\n")
    assert run_pytest(tmp_path, "1") == 0


def run_pytest(folder: Path, no_skips: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    environment = {**os.environ, "ITERREDUCE_NO_SKIPS": no_skips, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--rootdir={folder}", str(folder)], env=environment, capture_output=True, timeout=240
    )
    return done.returncode
