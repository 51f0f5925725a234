"""`python -m iterreduce submit`: the scripts that it writes, compared with files, and what it refuses.

A golden file holds a whole script, with `<environment.sh>` and `<ranks.sh>` where those stand.
ITERREDUCE_TEST_GOLDEN=write makes the files anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from iterreduce.slurm.submit import submit
from tests.launch import ROOT

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = ROOT / "slurm"
APP = '''
from typing import Literal
import iterreduce as ir


@ir.app
def cluster(points: ir.Dataset, k: int = 8, seed: int = 0, start: Literal["far", "near"] = "far"):
    """Nothing."""
'''
PYTHON = "--python=/opt/python/bin/python3"

CASES: dict[str, list[str]] = {
    "run": ["--nodes=2", "app.py", "points.h5", "--k", "16", "--out", "two words.csv"],
    "requeue": [
        *(
            "--ntasks",
            "96",
            "--time",
            "1-12",
            "--partition=short",
            "--account",
            "physics",
            "--save-before=300",
        ),
        *("--setup", "module load openmpi", "--launcher", "srun --mpi=pmix", "--sbatch=--exclusive"),
        *("--job-name", "points", "app.py", "points.h5", "--checkpoint-dir=saved", "--fresh"),
    ],
    "array": [
        *("--array", "k=4,8,16", "--array", "seed=1,2", "--ntasks-per-node=8", "app.py", "points.h5"),
        *("--out", "centroids-{k}-{seed}.csv", "--start", "near"),
    ],
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "points.h5").touch()
    return tmp_path


def shortened(script: str) -> str:
    """Without what stands in files already, but for the first line, which is a linter's."""
    for name in ("environment.sh", "ranks.sh"):
        text = (SCRIPTS / name).read_text().split("\n", 1)[1]
        assert script.count(text) == 1
        script = script.replace(text, f"<{name}>\n")
    return script


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_those_of_the_golden_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit([PYTHON, "--dry-run", *CASES[name]], os.environ) == 0
    script, golden = shortened(capsys.readouterr().out), GOLDEN / f"{name}.sbatch"
    if os.environ.get("ITERREDUCE_TEST_GOLDEN") == "write":
        golden.write_text(script)
    assert script == golden.read_text()


def test_shellcheck_finds_nothing_in_scripts_that_were_written(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in CASES.items():
        submit([PYTHON, "--dry-run", *words], os.environ)
        (place / f"{name}.sbatch").write_text(capsys.readouterr().out)
    tool = Path(sysconfig.get_path("scripts")) / "shellcheck"
    # in a script of its own the launcher may be known beforehand
    done = subprocess.run(
        [tool, "--exclude=SC2157,SC2050", *place.glob("*.sbatch")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


SBATCH = """#!/bin/bash
[ -z "${OMP_NUM_THREADS:-}${NUMBA_CACHE_DIR:-}" ] || exit 9
[ ! -e refuse ] || { echo "sbatch: error: invalid partition specified: mian" >&2; exit 1; }
echo "$@" >asked
cp "$2" taken
echo "4711;test"
"""


@pytest.fixture
def with_sbatch(place: Path) -> dict[str, str]:
    """An environment with an sbatch that says yes, unless there is a file `refuse`."""
    (place / "bin").mkdir()
    (place / "bin" / "sbatch").write_text(SBATCH)
    (place / "bin" / "sbatch").chmod(0o755)
    mine = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "NUMBA_CACHE_DIR")}
    return {**mine, "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_a_submitted_job_is_told_with_what_follows_it(
    place: Path, with_sbatch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--nodes=2", "app.py", "gone.h5", "--checkpoint-dir", "saved"]
    assert submit(words, with_sbatch) == 0
    assert (place / "asked").read_text() == "--parsable app.sbatch\n"
    assert (place / "taken").read_text() == (place / "app.sbatch").read_text()
    told = capsys.readouterr().out
    for part in (
        "submitted job 4711: app.sbatch\n",
        "squeue -j 4711 ",
        "tail -F app-4711.out ",
        "python -m iterreduce inspect saved ",
        "scancel 4711 ",
        "there is no gone.h5 here now",
    ):
        assert part in told, told
    assert submit(words, with_sbatch) == 0  # its own script is written anew


def test_jobs_do_not_inherit_what_was_set_for_the_submitting_process(
    place: Path, with_sbatch: dict[str, str]
) -> None:
    words = [sys.executable, "-m", "iterreduce", "submit", "--array=k=1,2", "app.py", "points.h5"]
    env = {**with_sbatch, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "submitted 2 jobs, array 4711" in done.stdout and "tail -F app-4711-0.out" in done.stdout


def test_a_file_that_submit_did_not_write_is_not_written_over(
    place: Path, with_sbatch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "app.sbatch").write_text("#!/bin/bash\n")
    assert submit(["app.py", "points.h5"], with_sbatch) == 2
    assert "not a script of submit's; name another by --script" in capsys.readouterr().err
    assert (place / "app.sbatch").read_text() == "#!/bin/bash\n" and not (place / "asked").exists()
    assert submit(["--script=mine.sbatch", "app.py", "points.h5"], with_sbatch) == 0


def test_what_sbatch_says_against_a_job_is_told(
    place: Path, with_sbatch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "refuse").touch()
    assert submit(["--partition=mian", "app.py", "points.h5"], with_sbatch) == 1
    assert "sbatch refused app.sbatch: sbatch: error: invalid partition" in capsys.readouterr().err


def test_without_sbatch_nothing_is_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(["app.py", "points.h5"], {"PATH": str(place)}) == 1
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not list(place.glob("*.sbatch"))


REFUSED = [
    ([], "which app?"),
    (["--nodes=2"], "which app?"),
    (["ap.py", "points.h5"], 'no such app: ap.py; did you mean "app.py"?'),
    (["app.py"], "app.py wants POINTS"),
    (["app.py", "points.h5", "--k", "many"], "--k: "),
    (["app.py", "points.h5", "--clusters", "3"], "unknown option --clusters"),
    (["app.py", "points.h5", "--nodes=2"], "--nodes is an option of submit: it stands before the app"),
    (["app.py", "points.h5", "--checkpoint-every=5"], "give --checkpoint-dir as well"),
    (["--k=3", "app.py", "points.h5"], "options of the run stand behind the app"),
    (["--nodse=2", "app.py", "points.h5"], 'did you mean "--nodes"?'),
    (["--nodes=0", "app.py", "points.h5"], "--nodes: wanted a whole number from 1 on"),
    (["--nodes"], "--nodes wants a value: --nodes N"),
    (["--dry-run=yes", "app.py", "points.h5"], "--dry-run is a switch"),
    (["--time=soon", "app.py", "points.h5"], "--time: wanted MINUTES"),
    (["--partition=a\nb", "app.py", "points.h5"], "--partition: wanted one line"),
    (["--time=2", "app.py", "points.h5", "--checkpoint-dir=s"], "--time 2 is not more than the 120 s"),
    (["--array=k", "app.py", "points.h5"], "--array: wanted a parameter and its values"),
    (["--array=k=1,1", "app.py", "points.h5"], "a value stands there twice"),
    (["--array=k=4,x", "app.py", "points.h5"], "--k: "),
    (
        ["--array=k=1,2", "app.py", "points.h5", "--out=a.csv"],
        "--out a.csv: k=1 and k=2 would both write to it",
    ),
    (
        ["--array=k=1,2", "--array=seed=1,2", "app.py", "points.h5", "--checkpoint-dir=s-{k}"],
        "put {seed} into it",
    ),
]


@pytest.mark.parametrize(("words", "why"), REFUSED, ids=[why[:30] for _, why in REFUSED])
def test_what_ranks_would_refuse_is_refused_before_it_waits(
    words: list[str], why: str, place: Path, with_sbatch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(words, with_sbatch) == 2
    told = capsys.readouterr()
    assert why in told.err and told.out == "", told
    assert not (place / "asked").exists() and not list(place.glob("*.sbatch"))


def test_questions_are_answered_and_nothing_is_submitted(
    place: Path, with_sbatch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(["--help"], with_sbatch) == 0 and "--array" in capsys.readouterr().out
    assert submit(["app.py", "--help"], with_sbatch) == 0 and "usage:" in capsys.readouterr().out
    assert not (place / "asked").exists()


def test_a_broken_app_is_told(
    place: Path, with_sbatch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "app.py").write_text("import nothing_like_that")
    assert submit(["app.py"], with_sbatch) == 1
    assert "needs the module 'nothing_like_that'" in capsys.readouterr().err


def test_a_directory_that_only_the_file_of_settings_names_stands_in_the_script(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "iterreduce.toml").write_text('checkpoint_dir = "kept"\n')
    assert submit(["--dry-run", "app.py", "points.h5"], os.environ) == 0
    told = capsys.readouterr().out
    assert "set -- --checkpoint-dir=kept app.py points.h5\n" in told and told.endswith(
        'run_until_done "$@"\n'
    )
    assert submit(["--once", "--dry-run", "app.py", "points.h5"], os.environ) == 0
    assert capsys.readouterr().out.endswith('run_once "$@"\n')


def test_a_sites_own_scripts_are_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in SCRIPTS.iterdir():
        (place / path.name).write_text(path.read_text())
    (place / "environment.sh").write_text("module load ours\n")
    assert submit(["--scripts=.", "--dry-run", "app.py", "points.h5"], os.environ) == 0
    assert "\nmodule load ours\n" in capsys.readouterr().out
    assert submit(["--scripts=nowhere", "--dry-run", "app.py", "points.h5"], os.environ) == 1
    assert "nowhere/run.sbatch: No such file" in capsys.readouterr().err


def test_script_is_text_that_bash_reads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words keep their spaces, quotes and signs."""
    odd = "it's $HOME *\\"
    submit(["--dry-run", "app.py", "points.h5", "--out", odd], os.environ)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("set -- "))
    done = subprocess.run(["bash", "-c", f'{line}; printf "%s" "$4"'], capture_output=True, text=True)
    assert done.stdout == odd
