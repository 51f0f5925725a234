"""`python -m iterreduce run -n N [OPTIONS] [RUN OPTIONS] APP ...`: run an app to its end, whatever dies.

Exit status: that of the ranks if they leave in order (0 done, 75 stopped and saved, 1 or 2 failed alike,
which is not tried again). A death or a hang starts the ranks again from the last checkpoint, until the limits
are used up: then 75 if the last attempt got on, so that the same command may go on later, else 1.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from iterreduce import options
from iterreduce.arguments import CommandLineError, setting_options
from iterreduce.errors import IterReduceError, LaunchError, UsageError, did_you_mean
from iterreduce.signals import INTERRUPTED_STATUS, Watch
from iterreduce.supervising import places
from iterreduce.supervising.attempt import Attempt, Ended
from iterreduce.supervising.launchers import Host, Launcher, find
from iterreduce.supervising.processes import is_alive, machine

RETRIES = 10
#: Attempts in a row that neither publish a checkpoint nor reach a later iteration.
MOST_WITHOUT_PROGRESS = 3
#: To be in the first iteration, of inner loops too, is no progress yet.
FIRST_PATH = (1,) * 8
MOST_PAUSE_SECONDS = 8.0

FAILED, USAGE_STATUS, STOPPED_STATUS = 1, 2, 75

USAGE = "usage: python -m iterreduce run -n N [OPTIONS] [RUN OPTIONS] APP.py [APP ARGUMENTS]"
_OWN = {
    "-n": ("N", options.COUNT, "how many ranks"),
    "--retries": ("K", options.WHOLE, f"start again so often in all (default: {RETRIES})"),
    "--hang-timeout": (
        "TIME",
        options.DURATION,
        "a job in which nothing happens for so long has a hung rank (default: none, it waits)",
    ),
    "--host": ("HOSTS", None, "NAME:SLOTS,NAME:SLOTS: the hosts to start on"),
    "--launcher": ("WORDS", None, "the launcher and its own options, such as 'srun --mpi=pmix'"),
}
_HELP = f"""{USAGE}

Start the ranks, and start them again from the last checkpoint when one dies or hangs. SIGTERM, SIGINT and
SIGUSR1 save and stop, with exit status 75; a second one ends all at once.

options:
"""


@dataclass
class Job:
    """What the command line asks for; ``words`` are for the ranks."""

    ranks: int
    retries: int = RETRIES
    hang_timeout: float | None = None
    hosts: tuple[Host, ...] = ()
    launcher: str | None = None
    words: list[str] = field(default_factory=list)
    saves_in: str | None = None
    recovers: bool = True
    recover_timeout: float = 30.0


def run(arguments: Sequence[str], started: float) -> int:
    """Do what the arguments behind `run` say; returns the exit status.

    The process's signals stay ours: it has nothing else to do than to end.
    """
    watch = Watch(started)
    watch.install()
    status = _run(arguments, watch)
    watch.saves = True  # nothing is left to end
    watch.over()
    return status


def _run(arguments: Sequence[str], watch: Watch) -> int:
    try:
        job = parse(arguments)
        if job is None:
            return 0
        _check_not_launched()
        launcher = find(job.ranks, job.launcher, job.hosts, recovers=job.recovers)
        with _root(job) as root:
            return Supervisor(job, launcher, root, watch).run()
    except UsageError as error:
        _say(f"{error}\n{USAGE}")
        return USAGE_STATUS
    except (IterReduceError, OSError) as error:
        _say(str(error))
        return FAILED


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"iterreduce: {text}\n")
        sys.stderr.flush()


# -- the command line ----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> Job | None:
    """None when only help was wanted. Raises UsageError."""
    rest, own, words = list(arguments), dict[str, str](), list[str]()
    takes_value = {option.flag: option.parse is not None for option in setting_options()}
    while rest and rest[0].startswith("-") and rest[0] != "--":
        flag, equals, text = rest.pop(0).partition("=")
        if flag in ("--help", "-h"):
            sys.stdout.write(_help())
            return None
        if flag not in _OWN and flag not in takes_value:
            raise CommandLineError(f"unknown option {flag}{did_you_mean(flag, [*_OWN, *takes_value])}")
        if (flag in _OWN or takes_value[flag]) and not equals:
            if not rest:
                raise CommandLineError(f"{flag} wants a value")
            text = rest.pop(0)
            equals = "="
        if flag in _OWN:
            own[flag] = text
        else:
            words.append(flag + equals + text)
    return _job(own, [*words, *rest])


def _job(own: dict[str, str], words: list[str]) -> Job:
    if "-n" not in own:
        raise CommandLineError("how many ranks? wanted -n N")
    if not any(word.endswith(".py") for word in words):
        raise CommandLineError("which app? wanted a file that ends in .py")
    read = {flag: _read(flag, text) for flag, text in own.items()}
    settings = options.resolve().options
    job = Job(read["-n"], words=words, saves_in=_given("--checkpoint-dir", words) or settings.checkpoint_dir)
    job.recovers = (_given("--recover", words) or settings.recover) != "off"
    job.recover_timeout = settings.recover_timeout
    job.retries, job.hang_timeout = read.get("--retries", RETRIES), read.get("--hang-timeout")
    job.hosts, job.launcher = read.get("--host", ()), read.get("--launcher")
    return job


def _read(flag: str, text: str) -> Any:
    kind = _OWN[flag][1]
    try:
        if flag == "--host":
            return tuple(map(Host.parse, text.split(",")))
        return kind.parse(text) if kind is not None else text
    except ValueError:
        wanted = kind.wanted if kind is not None else "hosts such as node1:4,node2:4"
        raise CommandLineError(f"{flag}: wanted {wanted}, got {text!r}") from None


def _given(wanted: str, words: Sequence[str]) -> str | None:
    """The value of this option that the ranks will be given."""
    found = None
    for word, after in zip(words, [*words[1:], ""], strict=True):
        flag, equals, text = word.partition("=")
        if word == "--":
            break
        if flag == wanted:
            found = text if equals else after
    return found


def _check_not_launched() -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise CommandLineError(
                f"`run` starts the launcher itself, and a launcher started it ({name}="
                f"{os.environ[name]}); give -n to `run` instead"
            )


def _help() -> str:
    rows = [(f"{flag} {value}", text) for flag, (value, _, text) in _OWN.items()]
    width = max(len(left) for left, _ in rows)
    own = "".join(f"  {left:{width}}  {right}\n" for left, right in rows)
    more = "Run options are those of `python -m iterreduce --help`; --checkpoint-dir DIR: what to go on from."
    return f"{_HELP}{own}\n{more}\n"


# -- where ranks and supervisor meet -------------------------------------------------------------------------


@contextlib.contextmanager
def _root(job: Job) -> Iterator[str]:
    """A private directory beside the checkpoint directory, which all hosts see; else a temporary one, or with
    several hosts one in the current directory.
    """
    parent, name = tempfile.gettempdir(), "iterreduce"
    if job.saves_in is not None:
        parent, name = os.path.split(os.path.abspath(job.saves_in))
    elif job.hosts:
        parent = os.getcwd()
    prefix = f".{name}.run-"
    if not os.path.isdir(parent):
        raise LaunchError(f"--checkpoint-dir {job.saves_in}: there is no directory {parent}; make it first")
    if not os.access(parent, os.W_OK):
        parent = tempfile.gettempdir()
    _remove_old(parent, prefix)
    with contextlib.ExitStack() as stack:
        try:
            root = tempfile.mkdtemp(prefix=prefix, dir=parent)
            stack.callback(shutil.rmtree, root, ignore_errors=True)
            yield root
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LaunchError(
                f"{parent}: the disk is full; ranks and supervisor speak through small files there: make "
                "room, and run the same command again"
            ) from error


def _remove_old(parent: str, prefix: str) -> None:
    """Those of supervisors of this machine that were killed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(prefix):
                root = os.path.join(parent, name)
                jobs = [places.read(os.path.join(root, each), places.JOB) for each in os.listdir(root)]
                if jobs and all(
                    job and job["machine"] == machine() and not is_alive(job["pid"], job["start"])
                    for job in jobs
                ):
                    shutil.rmtree(root, ignore_errors=True)


# -- one attempt after another -------------------------------------------------------------------------------


class Supervisor:
    """Starts attempts until one ends in order or the limits are used up."""

    def __init__(self, job: Job, launcher: Launcher, root: str, watch: Watch) -> None:
        self.job, self.launcher, self.root, self.watch = job, launcher, root, watch
        self.ranks, self.number, self.left = job.ranks, 0, job.retries
        self.fruitless = 0
        self.started = time.time() - (time.perf_counter() - watch.started)
        newest = 0 if "--fresh" in job.words else newest_checkpoint(job.saves_in)  # that begins with 1 again
        self._best: tuple[int, tuple[int, ...]] = (newest, FIRST_PATH)
        self._now: int | None = None
        self._iterated = False
        self._lost: str | None = None
        self._answering = job.hosts
        watch.saves = job.saves_in is not None
        watch.serve(self._end_now, lambda text: _say(text.removeprefix("iterreduce: ")), ends_job=True)

    def _end_now(self, status: int) -> None:
        self._now = status

    def run(self) -> int:
        """The exit status."""
        while True:
            ended = self._attempt()
            if self._now is not None:
                return self._stopped()
            if ended.status is not None:
                return ended.status
            _say(ended.text)
            status = self._give_up(ended)
            if status is not None:
                return status
            self._prepare_next(ended)
            if not self._wait():
                return self._stopped()

    def _attempt(self) -> Ended:
        self.number += 1
        directory = os.path.join(self.root, f"attempt-{self.number:03d}")
        os.mkdir(directory, 0o700)
        facts = {"started": self.started, "attempt": self.number, "iterated": self._iterated}
        program = [sys.executable, "-m", "iterreduce", *self.job.words]
        try:
            attempt = Attempt(
                directory,
                self.launcher,
                self.ranks,
                program,
                facts,
                self.job.hang_timeout,
                self.watch,
                lambda: self._now,
                _say,
                self.job.recover_timeout,
            )
            return attempt.run()
        finally:
            self._iterated |= os.path.exists(os.path.join(directory, places.ITERATED))
            shutil.rmtree(directory, ignore_errors=True)

    def _give_up(self, ended: Ended) -> int | None:
        """The exit status, if it is not tried again."""
        if self._now is not None or self.watch.reason:
            return self._stopped()
        if not ended.came and self.number == 1:
            return FAILED
        progress = self._progress(ended)
        self.fruitless = 0 if progress else self.fruitless + 1
        if self.fruitless >= MOST_WITHOUT_PROGRESS:
            several = len(ended.hosts) > 1 and not self.job.hosts
            hint = "; with --host NAME:SLOTS,... hosts that do not answer are left out" if several else ""
            _say(f"{self.fruitless} attempts without progress: given up{hint}")
            return FAILED
        if self.left == 0:
            again = progress and self.job.saves_in is not None
            hint = "; run the same command again and it goes on" if again else ""
            _say(f"given up after {self.number} attempt{'s' if self.number > 1 else ''}{hint}")
            return STOPPED_STATUS if again else FAILED
        return None

    def _stopped(self) -> int:
        """A second signal came, or one that found no ranks that could save."""
        if self._now is not None:
            _say("interrupted" if self._now == INTERRUPTED_STATUS else "terminated")
            return self._now
        _say(
            f"stopped by {self.watch.reason}; run the same command again and it goes on from the last "
            "checkpoint"
        )
        return STOPPED_STATUS

    def _progress(self, ended: Ended) -> bool:
        """Whether there is a newer checkpoint, or a later iteration than ever before."""
        newest, path = newest_checkpoint(self.job.saves_in), ended.path
        progress = newest > self._best[0] or path > self._best[1]
        self._best = max(newest, self._best[0]), max(path, self._best[1])
        return progress

    def _prepare_next(self, ended: Ended) -> None:
        self.left -= 1
        if not self._has_other_hosts() and not ended.came:
            self.launcher, self.ranks = self.launcher.on_fewer(self.ranks, ended.lost or self._lost)
        self._lost = ended.lost
        newest = newest_checkpoint(self.job.saves_in)
        where = (
            "from the beginning: there is no --checkpoint-dir"
            if self.job.saves_in is None
            else "from the last checkpoint"
            if newest
            else "from the beginning: no checkpoint was written yet"
        )
        _say(
            f"starts again on {self.ranks} rank{'s' if self.ranks > 1 else ''} {where} "
            f"(attempt {self.number + 1}, {self.left} more after it)"
        )

    def _has_other_hosts(self) -> bool:
        """Whether more or fewer of the hosts that were named answer than before; it goes on with those."""
        if len(self.job.hosts) < 2:
            return False
        named = replace(self.launcher, hosts=self.job.hosts)
        left = named.answering()
        if not left or left == self._answering:
            return False
        gone = [host.name for host in self.job.hosts if host not in left]
        if gone:
            many = len(gone) > 1
            _say(f"host{'s' * many} {', '.join(gone)} do{'es' * (not many)} not answer")
        self._answering, self.launcher = left, replace(named, hosts=left)
        self.ranks = min(self.job.ranks, sum(host.slots for host in left))
        return True

    def _wait(self) -> bool:
        """A moment, longer the longer nothing helps; whether to go on."""
        pause = min(MOST_PAUSE_SECONDS, 0.5 * 2**self.fruitless) if self.fruitless else 0.0
        until = time.monotonic() + pause
        while time.monotonic() < until and not self._asked():
            time.sleep(0.05)
        return not self._asked()

    def _asked(self) -> bool:
        return self._now is not None or bool(self.watch.reason)


_CHECKPOINT = re.compile(r"\d{12,18}\Z")


def newest_checkpoint(directory: str | None) -> int:
    """The number of the newest that is published; 0 for none."""
    newest = 0
    if directory is not None:
        with contextlib.suppress(OSError):
            for attempt in os.listdir(directory):
                if attempt.startswith("attempt-"):
                    names = os.listdir(os.path.join(directory, attempt))
                    newest = max([newest, *(int(name) for name in names if _CHECKPOINT.match(name))])
    return newest
