"""The parts of the supervisor: its command line, launchers, beats, and what it clears away."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iterreduce.arguments import CommandLineError
from iterreduce.errors import LaunchError, UsageError
from iterreduce.events import Event
from iterreduce.signals import Watch
from iterreduce.supervising import attempt, launchers, places, witnesses
from iterreduce.supervising.beats import Beats
from iterreduce.supervising.command import newest_checkpoint, parse
from iterreduce.supervising.launchers import MPICH, NONE, OPEN_MPI, OTHER, SRUN, Host, Launcher, find
from iterreduce.supervising.processes import handle_of, is_alive, kill_marked, machine, send, start_of, sweep
from iterreduce.supervising.vitals import Vitals

ROOT = Path(__file__).parents[2]


def test_the_supervisor_imports_neither_mpi_nor_numpy() -> None:
    code = (
        "import sys\nfrom iterreduce.supervising.command import run\n"
        "assert run(['--help'], 0.0) == 0\n"
        "assert not {'numpy', 'mpi4py', 'numba', 'h5py'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


# -- the command line


def test_its_help_says_the_default_of_every_option_that_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--help"]) is None
    text = capsys.readouterr().out
    assert "has a hung rank (default: none, it waits)" in text and "in all (default: 10)" in text


def test_its_own_options_are_taken_and_the_rest_goes_to_the_ranks() -> None:
    words = ["-n", "4", "--out", "x.csv", "--retries=2", "--hang-timeout", "10m", "--host", "a:2,b:2"]
    words += ["--quiet", "--launcher", "srun --mpi=pmix", "app.py", "--k", "-n", "--checkpoint-dir=saved"]
    job = parse(words)
    assert job is not None
    assert (job.ranks, job.retries, job.hang_timeout) == (4, 2, 600.0)
    assert (job.hosts, job.launcher) == ((Host("a", 2), Host("b", 2)), "srun --mpi=pmix")
    assert job.words == ["--out=x.csv", "--quiet", "app.py", "--k", "-n", "--checkpoint-dir=saved"]
    assert job.saves_in == "saved"


def test_the_checkpoint_directory_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERREDUCE_CHECKPOINT_DIR", "there")
    for words, saves_in in ((["app.py"], "there"), (["app.py", "--checkpoint-dir", "here"], "here")):
        job = parse(["-n", "1", *words])
        assert job is not None and job.saves_in == saves_in


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["app.py"], "how many ranks? wanted -n N"),
        (["-n", "2"], "which app?"),
        (["-n", "0", "app.py"], "-n: wanted a whole number of at least 1, got '0'"),
        (["-n"], "-n wants a value"),
        (["-n", "2", "--retires", "3", "app.py"], 'unknown option --retires; did you mean "--retries"?'),
        (["-n", "2", "--host", "a:x", "app.py"], "--host: wanted hosts such as node1:4,node2:4, got 'a:x'"),
        (["-n", "2", "--hang-timeout", "soon", "app.py"], "--hang-timeout: wanted a time such as"),
    ],
)
def test_a_wrong_command_line_says_what_was_wanted(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse(words)
    assert isinstance(caught.value, CommandLineError)


def test_a_launcher_does_not_start_the_supervisor(tmp_path: Path) -> None:
    env = {**os.environ, "PMI_SIZE": "2"}
    words = [sys.executable, "-m", "iterreduce", "run", "-n", "2", "app.py"]
    result = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 2 and "`run` starts the launcher itself" in result.stderr


# -- launchers


def programs(folder: Path, **said: str) -> str:
    for name, text in said.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\necho '{text}'\n")
        path.chmod(0o755)
    return str(folder)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python without an mpirun beside it, and an empty path: the machine may have an mpirun."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_one_rank_needs_no_launcher() -> None:
    assert find(1) == Launcher(NONE)
    assert find(1).command(1, ["python", "-m", "x"]) == ["python", "-m", "x"]


def test_the_mpirun_beside_python_is_that_of_its_mpi(bare: Path) -> None:
    programs(bare, mpirun="mpirun (Open MPI) 5.0.11", srun="")
    found = find(2, hosts=(Host("a", 2),), environment={"SLURM_JOB_ID": "1"})
    assert (found.kind, found.words) == (OPEN_MPI, (str(bare / "mpirun"),))
    words = found.command(2, ["p"])[1:]
    assert words == ["--host", "a:2", "-x", "ITERREDUCE_SUPERVISED", "-n", "2", "p"]


@pytest.mark.parametrize(
    ("said", "interface"), [("mpirun (Open MPI) 5.0", "pmix"), ("HYDRA build details:", "pmi2")]
)
def test_in_a_slurm_job_srun_speaks_what_the_mpi_speaks(bare: Path, said: str, interface: str) -> None:
    (bare / "elsewhere").mkdir()
    programs(bare / "elsewhere", mpirun=said, srun="")
    os.environ["PATH"] += f":{bare}/elsewhere"
    found = find(2, environment={"SLURM_JOB_ID": "1"})
    assert found.command(2, ["p"]) == ["srun", f"--mpi={interface}", "-n", "2", "p"]
    assert find(2, environment={}).kind == (OPEN_MPI if interface == "pmix" else MPICH)


def test_a_launcher_that_is_named_is_taken_with_its_words_and_others_are_not_asked(bare: Path) -> None:
    programs(bare, launch="", srun="")
    assert find(2, "srun --mpi=pmix").command(2, ["p"]) == ["srun", "--mpi=pmix", "-n", "2", "p"]
    found = find(3, "launch -q", (Host("a", 1), Host("b", 2)))
    assert found.kind == OTHER
    assert found.command(3, ["p"]) == ["launch", "-q", "--host", "a:1,b:2", "-n", "3", "p"]


def test_without_any_launcher_it_says_what_it_looked_for(bare: Path) -> None:
    with pytest.raises(LaunchError, match=r"found neither an mpirun beside .* nor srun in a Slurm job"):
        find(2, environment={})
    with pytest.raises(LaunchError, match="there is no such program"):
        find(2, "nosuchlauncher -q")


def test_with_fewer_slots_the_lost_host_goes_else_half_the_ranks() -> None:
    three = Launcher(MPICH, ("mpirun",), (Host("a", 2), Host("b", 2), Host("c", 4)))
    fewer, ranks = three.on_fewer(8, "b")
    assert ([host.name for host in fewer.hosts], ranks) == (["a", "c"], 6)
    fewer, ranks = fewer.on_fewer(ranks, None)
    assert ([host.name for host in fewer.hosts], ranks) == (["a"], 2)
    assert fewer.on_fewer(ranks, "a")[1] == 1
    assert Launcher(SRUN, ("srun",)).on_fewer(1, None)[1] == 1


def test_hosts_are_asked_all_at_once_whether_they_answer(tmp_path: Path) -> None:
    """`b` refuses, `c` says nothing for ever, `d` starts nothing and reports success."""
    agent = tmp_path / "agent"
    agent.write_text(
        '#!/bin/sh\ncase $2 in b:2) exit 255;; c:2) sleep 100;; d:2) exit 0;; esac\nshift 4; exec "$@"\n'
    )
    agent.chmod(0o755)
    hosts = tuple(Host(name, 2) for name in "abcde")
    started = time.monotonic()
    left = Launcher(MPICH, (str(agent),), hosts).answering(seconds=3.0)
    assert [host.name for host in left] == ["a", "e"]
    assert time.monotonic() - started < 30


def test_launchers_are_asked_for_their_version_without_a_terminal(bare: Path) -> None:
    programs(bare, mpiexec="HYDRA build details")
    assert launchers._kind(str(bare / "mpiexec")) == MPICH
    assert launchers._kind(str(bare / "nothing")) == OTHER


# -- beats


def beat(folder: Path, rank: int, number: int, events: int, **more: object) -> None:
    places.write(str(folder), f"beat-{rank}", {"beat": number, "events": events, **more})


def test_a_rank_that_beats_without_events_is_still_and_one_that_stops_is_silent(tmp_path: Path) -> None:
    beats = Beats(str(tmp_path), 2, pause=0.01)
    for rank in (0, 1):
        beat(tmp_path, rank, 1, 5, path=[3, rank], what="stage.start map")
    beats.look()
    assert beats.path == (3, 1) and beats.path_of(0) == (3, 0) and not beats.is_still(5)
    since = time.monotonic()
    while time.monotonic() < since + 0.1:
        beat(tmp_path, 0, int(time.monotonic() * 1e6), 5, path=[3, 0], what="stage.start map")
        beats.look()
    assert beats.is_still(0.1) and beats.silent == [1]
    assert beats.describe([0]) == "rank 0: stage.start map, iteration 3.0"
    beat(tmp_path, 0, 1, 6)
    beats.look()
    assert not beats.is_still(0.1)


def test_a_rank_that_writes_its_results_may_take_its_time_as_long_as_it_beats(tmp_path: Path) -> None:
    beats = Beats(str(tmp_path), 1, pause=1.0)
    beat(tmp_path, 0, 1, 5, ran=True)
    beats.look()
    since = time.monotonic()
    while time.monotonic() < since + 0.1:
        beat(tmp_path, 0, int(time.monotonic() * 1e6), 5, ran=True)
        beats.look()
    assert not beats.is_still(0.1) and beats.is_still(0)


def test_ranks_that_have_not_begun_have_more_time(tmp_path: Path) -> None:
    beats = Beats(str(tmp_path), 1, pause=0.01)
    beat(tmp_path, 0, 1, 0)
    beats.look()
    time.sleep(0.02)
    assert not beats.is_still(0.01)
    beat(tmp_path, 0, 2, 1)
    beats.look()
    time.sleep(0.02)
    assert beats.is_still(0.01)


def test_files_that_are_not_there_yet_or_torn_say_nothing(tmp_path: Path) -> None:
    assert places.read(str(tmp_path), "beat-0") == {}
    for torn in ("", '{"beat": 1', "[1]", "\0" * 10):
        (tmp_path / "beat-0").write_text(torn)
        assert places.read(str(tmp_path), "beat-0") == {}
    (tmp_path / "rank-12.json").touch()
    (tmp_path / ".rank-3.json.77").touch()
    assert places.ranks_with(str(tmp_path)) == {"rank": {12}, "beat": {0}, "end": set()}


@pytest.mark.parametrize("said_so", ["no", "here", "elsewhere"])
def test_a_new_rank_that_died_before_it_came_ends_the_attempt_after_a_while(
    said_so: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPI does not see it. It died before or after it could say that it is there."""
    monkeypatch.setattr(attempt, "NOTICE_SECONDS", 0.3)
    monkeypatch.setattr(attempt, "CLEAR_SECONDS", 0.1)
    gone = subprocess.Popen(["true"])
    gone.wait()
    launcher = Launcher(OTHER, ("sh", "-c", "sleep 60; true"), tolerant=True)
    watch, facts = Watch(time.perf_counter()), {"iterated": True, "started": time.time()}
    one = attempt.Attempt(str(tmp_path), launcher, 2, ["app"], facts, None, watch, lambda: None)
    places.write(str(tmp_path), places.LIVING, {"ranks": [0], "settled": 2, "coming": [2]})
    if said_so != "no":
        where = machine() if said_so == "here" else "another"
        who = {"host": "h", "machine": where, "pid": gone.pid, "start": "1"}
        places.write(str(tmp_path), "rank-2.json", who)
    if said_so == "elsewhere":
        (tmp_path / "beat-2").write_bytes(witnesses.padded({witnesses.GONE: True}))
    ended = one.run()
    assert ended.status is None and ended.came
    assert "rank 2" in ended.text and "which was to take a lost place, died before it came" in ended.text


@pytest.mark.parametrize(
    ("leaves", "gone"),
    [("os.kill(os.getpid(), 9)", True), ("os._exit(0)", True), ("mine.end(0, 'agreed')", False)],
)
def test_a_witness_tells_that_a_rank_on_another_host_left_without_a_word(
    leaves: str, gone: bool, tmp_path: Path
) -> None:
    places.write(str(tmp_path), places.JOB, {"started": 0.0, "machine": "another", "iterated": False})
    beat(tmp_path, 0, 7, 3)
    begin = f"mine = Vitals({str(tmp_path)!r})\nmine.begin(lambda: None)\n"
    code = f"import os\nfrom iterreduce.supervising.vitals import Vitals\n{begin}{leaves}\n"
    words = [sys.executable, "-c", code]
    subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60)  # nobody holds on to what it wrote
    deadline = time.monotonic() + (60 if gone else 0.3)
    beats = Beats(str(tmp_path), 1, pause=1.0)
    while not beats.witnessed and time.monotonic() < deadline:
        time.sleep(0.01)
        beats.look()
    assert beats.witnessed == ({0} if gone else set())
    assert places.read(str(tmp_path), "beat-0")["events"] == 3, "and what it did last is not forgotten"


def test_a_long_name_in_any_script_fits_into_a_beat(tmp_path: Path) -> None:
    places.write(str(tmp_path), places.JOB, {"started": 0.0, "machine": "?", "iterated": True})
    vitals = Vitals(str(tmp_path))
    path = (123456789,) * 8
    vitals(Event("iteration.start", 0.0, {"iteration": 2, "path": path}))
    vitals(Event("stage.start", 0.0, {"stage": "\u03c0" * 200, "iteration": 2}))
    said = json.loads(witnesses.padded(vitals._said()))
    assert tuple(said["path"]) == path


def test_a_beat_tells_the_last_iteration_and_what_came_last(tmp_path: Path) -> None:
    places.write(str(tmp_path), places.JOB, {"started": time.time() - 100, "machine": "?", "iterated": True})
    vitals = Vitals(str(tmp_path))
    assert 99 < time.perf_counter() - vitals.started < 200
    assert vitals._said()["what"] == "is starting" and not vitals._said()["ran"]
    vitals(Event("iteration.start", 0.0, {"iteration": 2, "path": (1, 2)}))
    vitals(Event("stage.start", 0.0, {"stage": "map" * 100, "iteration": 2}))
    vitals(Event("checkpoint.step", 0.0, {"number": 1, "step": "write"}))
    said = vitals._said()
    assert vitals._news.is_set(), "who has begun to iterate says so before its next beat is due"
    assert (said["path"], said["events"]) == ((1, 2), 2)
    assert said["what"].startswith("stage.start map") and len(said["what"]) < 120
    vitals(Event("run.end", 0.0, {"outcome": None}))
    assert vitals._said()["ran"]


def test_a_rank_that_does_not_see_the_directory_of_its_supervisor_says_what_to_do(tmp_path: Path) -> None:
    env = {**os.environ, places.VARIABLE: str(tmp_path / "elsewhere")}
    words = [sys.executable, "-m", "iterreduce", "app.py"]
    result = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 1 and "on a file system that all hosts share" in result.stderr


# -- what is cleared away


def test_shared_memory_goes_if_it_is_ours_new_and_mapped_by_nobody(tmp_path: Path) -> None:
    since = time.time()
    for name in ("mpich_shm_1", "sm_segment.h.0.1.0", "psm2_shm.5", "mapped", "others.npy", "mpich_old"):
        (tmp_path / name).write_bytes(b"x" * 4096)
    (tmp_path / "mapped").rename(tmp_path / "vader_segment.1")
    with (tmp_path / "vader_segment.1").open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        gone = sweep(since - 0.1, str(tmp_path))
        assert gone == ["mpich_old", "mpich_shm_1", "psm2_shm.5", "sm_segment.h.0.1.0"]
        assert {path.name for path in tmp_path.iterdir()} == {"vader_segment.1", "others.npy"}
    assert sweep(time.time() + 10, str(tmp_path)) == []


def test_only_processes_with_the_mark_are_killed() -> None:
    def sleeper(mark: str) -> subprocess.Popen[bytes]:
        env = {places.VARIABLE: mark}
        return subprocess.Popen(["/bin/sleep", "100"], env=env, start_new_session=True)

    mine, other = sleeper("/a/b"), sleeper("/a/bc")
    try:
        kill_marked(f"{places.VARIABLE}=/a/b".encode() + b"\0")
        assert mine.wait(10) == -9 and other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    process = subprocess.Popen(["/bin/sleep", "100"])
    start = start_of(process.pid)
    assert is_alive(process.pid, start) and not is_alive(process.pid, "1") and not is_alive(process.pid, "")
    assert not send(process.pid, "1", 9) and process.poll() is None
    assert send(process.pid, start, 9) and process.wait(10) == -9
    assert start_of(process.pid) == "" and not send(process.pid, start, 9)
    assert machine() == machine() != ""


def test_a_system_without_handles_of_processes_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(pid: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refuses)
    process = subprocess.Popen(["/bin/sleep", "100"])
    assert handle_of(process.pid) is None
    assert send(process.pid, start_of(process.pid), 9) and process.wait(10) == -9


def test_the_newest_checkpoint_is_that_with_the_highest_number(tmp_path: Path) -> None:
    assert newest_checkpoint(None) == newest_checkpoint(str(tmp_path / "none")) == 0
    for name in ("000000000009", "000000000012", ".writing-000000000013", "manifest"):
        (tmp_path / "attempt-000003" / name).mkdir(parents=True)
    assert newest_checkpoint(str(tmp_path)) == 12
