"""The batch scripts as text: what a linter finds in them, and what they promise sites and users."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.launch import ROOT

SCRIPTS = ROOT / "slurm"
FILES = sorted(path.name for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch"))


def test_shellcheck_finds_nothing() -> None:
    tool = Path(sysconfig.get_path("scripts")) / "shellcheck"
    words = [str(tool), "--external-sources", f"--source-path={SCRIPTS}", *FILES]
    done = subprocess.run(words, cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".sbatch")])
def test_batch_scripts_stop_at_the_first_error_and_ask_for_the_signal_before_the_limit(name: str) -> None:
    text = (SCRIPTS / name).read_text()
    assert text.startswith("#!/bin/bash\n") and "\nset -euo pipefail\n" in text
    options = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "--signal=B:USR1@120" in options and any(option.startswith("--time=") for option in options)
    assert ("--requeue" in options) == ("run_until_done" in text) == ("--open-mode=append" in options)


def ran(script: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run some lines behind ranks.sh, with a launcher that is a shell, and no Slurm."""
    text = f"set -euo pipefail; LAUNCHER=(env); PYTHON={cwd}/python; . {SCRIPTS}/ranks.sh; {script}"
    (cwd / "python").write_text("#!/bin/bash\n" + (cwd / "ranks").read_text())
    (cwd / "python").chmod(0o755)
    return subprocess.run(
        ["bash", "-c", text, "job", *words], cwd=cwd, capture_output=True, text=True, timeout=60
    )


RANKS = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (print("told"), sys.exit(75)))
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(50)
"""


def test_a_signal_to_the_script_reaches_the_ranks_and_their_status_comes_back(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    (tmp_path / "ranks").write_text(f"exec {sys.executable} ranks.py")
    done = ran('run_once app.py || echo "status $?"', cwd=tmp_path)
    assert done.stdout == "told\nstatus 75\n", done


def test_after_a_signal_that_came_too_early_no_ranks_are_started(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("echo started")
    done = ran("kill -USR1 $$; run_once app.py || echo $?", cwd=tmp_path)
    assert done.stdout == "75\n", done


def test_ranks_that_end_by_themselves_hand_their_status_back(tmp_path: Path) -> None:
    for status in (0, 1, 137):
        (tmp_path / "ranks").write_text(f"exit {status}")
        assert ran("run_once app.py", cwd=tmp_path).returncode == status


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["app.py", "--checkpoint-dir", "here", "--k", "3"], "here"),
        (["app.py", "--checkpoint-dir=a b"], "a b"),
        (["app.py"], ""),
    ],
)
def test_the_checkpoint_directory_is_found_among_the_arguments(
    words: list[str], found: str, tmp_path: Path
) -> None:
    (tmp_path / "ranks").write_text("")
    assert ran('checkpoint_dir "$@"', *words, cwd=tmp_path).stdout == f"{found}\n"


def test_the_newest_checkpoint_is_known_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("")
    assert ran("newest_checkpoint saved", cwd=tmp_path).stdout == "0\n"
    for name in (
        "attempt-000002/000000000009",
        "attempt-000002/000000000010",
        "attempt-000002/.writing-000000000011",
    ):
        (tmp_path / "saved" / name).mkdir(parents=True)
    assert ran("newest_checkpoint saved", cwd=tmp_path).stdout == "10\n"


SCONTROL = """#!/bin/bash
echo "$@" >> asked
[ "$1" = requeue ] || echo "JobId=7 JobState=$(cat state) Reason=None"
"""


SLEEP = "#!/bin/bash\nexec /bin/sleep 0.05\n"


def until_done(
    tmp_path: Path, state: str = "RUNNING", restarts: int = 0, words: str = ""
) -> subprocess.CompletedProcess[str]:
    """run_until_done with a Slurm that answers so."""
    (tmp_path / "state").write_text(state)
    (tmp_path / "asked").unlink(missing_ok=True)
    for name, text in (("scontrol", SCONTROL), ("sleep", SLEEP), ("srun", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = f"PATH={tmp_path}:$PATH SLURM_JOB_ID=7 SLURM_NNODES=1 SLURM_RESTART_COUNT={restarts}"
    return ran(f"{slurm}; run_until_done app.py --fresh {words} --checkpoint-dir saved", cwd=tmp_path)


def asked(tmp_path: Path) -> bool:
    """Whether the job was queued again."""
    return "requeue 7" in (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else False


def test_ranks_that_saved_are_started_again_and_a_cancelled_job_is_not(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("mkdir -p saved/attempt-000001/000000000001; exit 75")
    assert until_done(tmp_path).returncode == 75 and asked(tmp_path)
    assert until_done(tmp_path, "COMPLETING").returncode == 75 and not asked(tmp_path)


@pytest.mark.parametrize("status", [1, 2])
def test_ranks_that_failed_are_not_started_again(tmp_path: Path, status: int) -> None:
    (tmp_path / "ranks").write_text(f"exit {status}")
    assert until_done(tmp_path).returncode == status and not asked(tmp_path)


def test_a_status_of_1_says_nothing_where_new_ranks_may_have_come(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("mkdir -p saved/attempt-000001/000000000001; exit 1")
    assert until_done(tmp_path, words="--respawn 2").returncode == 1 and asked(tmp_path)


def test_only_what_the_ranks_say_means_that_the_job_is_done(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("exit 0")
    done = until_done(tmp_path)
    assert (
        done.returncode == 1 and asked(tmp_path) and "no rank said that the job has finished" in done.stderr
    )
    attempt = tmp_path / "saved" / "attempt-000001"
    attempt.mkdir(parents=True)
    (attempt / "finished.json").touch()
    (attempt / "attempts.json").write_text('[{"end": "finished"}, {"end": "running"}]')
    assert until_done(tmp_path).returncode == 1 and asked(tmp_path)  # it goes on with other stopping rules
    (attempt / "attempts.json").write_text('[{"end": "interrupted"}, {"end": "finished"}]')
    assert until_done(tmp_path).returncode == 0 and not asked(tmp_path)
    (tmp_path / "ranks").write_text("mv saved/attempt-000001 saved/attempt-000002; exit 137")
    assert until_done(tmp_path).returncode == 137
    (tmp_path / "saved" / "attempt-000002").rename(attempt)
    (tmp_path / "saved.fruitless").unlink()
    for status in (1, 137):  # of an mpirun that has spawned ranks; done before, it is the ranks' own
        (tmp_path / "ranks").write_text(f"exit {status}")
        assert until_done(tmp_path).returncode == status
        (tmp_path / "ranks").write_text(f"echo >> saved/attempt-000001/finished.json; exit {status}")
        assert until_done(tmp_path).returncode == 0 and not asked(tmp_path)


@pytest.mark.parametrize("trap", ["exit 143", ":"])
def test_a_launcher_that_stays_when_the_ranks_are_done_is_ended(tmp_path: Path, trap: str) -> None:
    (tmp_path / "saved" / "attempt-000001").mkdir(parents=True)
    done = "echo >> saved/attempt-000001/finished.json"
    stays = f"trap '{trap}' TERM; for _ in {{1..900}}; do /bin/sleep 0.1; done"
    (tmp_path / "ranks").write_text(f"/bin/sleep 0.5; {done}; {stays} >/dev/null 2>&1; echo left")
    ended = until_done(tmp_path)
    assert ended.returncode == 0 and not asked(tmp_path) and not ended.stdout, ended
    assert ended.stderr.count("the ranks are done") == 1


def test_attempts_that_get_nowhere_end_the_job(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("exit 137")
    for _ in range(2):
        assert until_done(tmp_path).returncode == 137 and asked(tmp_path)
    done = until_done(tmp_path)
    assert done.returncode == 137 and not asked(tmp_path)
    assert "3 attempts in a row published no checkpoint: given up" in done.stderr
    assert not list(tmp_path.glob("saved.*"))


def test_a_job_begins_anew_at_its_first_start_only(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text('echo "$@"; exit 1')
    assert "--fresh" in until_done(tmp_path).stdout
    assert "--fresh" not in until_done(tmp_path, restarts=1).stdout
