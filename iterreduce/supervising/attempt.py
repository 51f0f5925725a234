"""One start of the ranks: launched, watched, ended, and cleared away.

What counts is what the ranks wrote when they left, not the launcher's exit status: Open MPI's mpirun may
return 0 after a death. Deaths on this machine are seen at once and in their order, by handles of the
processes; those on other hosts through the launcher, which ends then, or else by their witnesses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from iterreduce.signals import Watch
from iterreduce.supervising import places
from iterreduce.supervising.beats import Beats
from iterreduce.supervising.launchers import NONE, Launcher
from iterreduce.supervising.processes import (
    die_with_parent,
    handle_of,
    is_newcomer,
    kill_group,
    kill_marked,
    machine,
    marked,
    send,
    start_of,
    sweep,
)

#: How often rank files, signals and beats are looked at; deaths need no looking.
LOOK_SECONDS, MEET_SECONDS = 0.2, 0.02
#: A launcher gets this long to end after all ranks have left, or after one has died.
LEAVE_SECONDS, NOTICE_SECONDS = 30.0, 10.0
#: And ranks get so long to find together without the dead, beyond the time that they give themselves.
RECOVER_SECONDS = 10.0
#: And this long to clear up behind ranks that were killed.
CLEAR_SECONDS = 2.0


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: with the exit `status` of ranks that left in order, or because of `text`.

    ``came``: at least one rank had begun. ``path``: how far the farthest was. ``lost``: the host of the rank
    that died first, where that is known. ``hosts``: where the ranks were.
    """

    status: int | None
    text: str = ""
    came: bool = True
    path: tuple[int, ...] = ()
    lost: str | None = None
    hosts: frozenset[str] = frozenset()


class Attempt:
    """`run` it once."""

    def __init__(
        self,
        directory: str,
        launcher: Launcher,
        ranks: int,
        program: Sequence[str],
        facts: dict[str, Any],
        hang_timeout: float | None,
        watch: Watch,
        now: Callable[[], int | None],
        say: Callable[[str], None] = lambda text: None,
        recover_timeout: float = 30.0,
    ) -> None:
        """`facts` for the ranks; `watch` and `now` say whether they should save and stop, or end at once;
        `say` tells the user what does not end the attempt.
        """
        self.directory, self.launcher, self.ranks = directory, launcher, ranks
        self.hang_timeout, self.watch, self.now, self.say = hang_timeout, watch, now, say
        self.notice = recover_timeout + RECOVER_SECONDS if launcher.tolerant else NOTICE_SECONDS
        pause = max(ranks / 64, min(1.0, (hang_timeout or 10.0) / 10))
        mine = {"machine": machine(), "pid": os.getpid(), "start": start_of(os.getpid())}
        places.write(directory, places.JOB, {**facts, **mine, "beat_seconds": pause})
        self.beats = Beats(directory, ranks, pause)
        self._known: dict[int, dict[str, Any]] = {}
        self._dead: list[int] = []  # in their order
        self._living = set(range(ranks))  # those that do not go on without it
        self._settled = ranks  # new ranks behind these are waited for
        self._coming: list[int] = []  # they are being started
        self._handles: dict[int, int | None] = {}
        self._mark = f"{places.VARIABLE}={directory}".encode() + b"\0"
        self._since, self._told, self._why = time.time(), False, ""
        self._left_since: float | None = None
        self._missed_since: float | None = None
        self._next_look, self._killed = 0.0, False
        ctypes.CDLL(None)  # loaded before the fork
        self._process = subprocess.Popen(
            launcher.command(ranks, program),
            stdin=subprocess.DEVNULL,
            env={**os.environ, places.VARIABLE: directory},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        pid = self._process.pid
        places.write(directory, places.LAUNCHER, {"pid": pid, "start": start_of(pid)})

    def run(self) -> Ended:
        """Watch it to its end; nothing of it is left then."""
        try:
            self._watch_over()
        finally:
            self._clear()
        ended = self._ended()
        sweep(self._since - 0.1)
        return ended

    # -- while it runs

    def _watch_over(self) -> None:
        with select.epoll() as poll:
            self._follow(poll, self._process.pid, None)
            try:
                while not self._look(poll):
                    pass
            finally:
                for handle in self._handles:
                    os.close(handle)

    def _follow(self, poll: select.epoll, pid: int, rank: int | None) -> None:
        """Be told when this process ends, the launcher's where there is no rank."""
        try:
            handle = handle_of(pid)
        except ProcessLookupError:
            if rank is not None:
                self._dead.append(rank)
            return
        lives = None if rank is None else places.lifeline(self.directory, rank)
        for one in (lives, handle):
            if one is not None:
                self._handles[one] = rank
                poll.register(one, select.EPOLLIN)

    def _look(self, poll: select.epoll) -> bool:
        """Once; whether it is over."""
        for handle, _ in poll.poll(LOOK_SECONDS if self._known.keys() >= self._living else MEET_SECONDS):
            poll.unregister(handle)
            rank = self._handles[handle]
            if rank is not None and rank not in self._dead:
                self._dead.append(rank)
        self._meet(poll)
        if self._process.poll() is not None:
            self._killed = self._process.returncode < 0
            return True
        if self.now() is not None:
            return True
        if self.watch.reason:
            self._ask_to_save()
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + max(LOOK_SECONDS, self.beats.pause / 2)
        self.beats.look()
        self._learn_living()
        return self._is_stuck()

    def _meet(self, poll: select.epoll) -> None:
        """Learn who the ranks are that came since."""
        if self._known.keys() >= self._living and not self.launcher.tolerant:  # there may come new ones
            return
        for rank in sorted(places.ranks_with(self.directory)["rank"] - set(self._known)):
            who = places.read(self.directory, f"rank-{rank}.json")
            if not who:
                continue
            self._known[rank] = who
            if who["machine"] == machine():
                self._follow(poll, who["pid"], rank)

    def _ask_to_save(self) -> None:
        """By a file that every rank's beat reads; rank 0, if it is here, at once."""
        if not self._told:
            places.write(self.directory, places.STOP, {"reason": self.watch.reason})
            self._told = True
            self._signal(min(self._living), signal.SIGUSR1)

    def _signal(self, rank: int, number: int) -> bool:
        """Send it if the rank is here; whether it was."""
        who = self._known.get(rank)
        return who is not None and self._is_here(rank) and send(who["pid"], who["start"], number)

    def _learn_living(self) -> None:
        """Which ranks go on, if some have died."""
        facts = places.read(self.directory, places.LIVING) if self.launcher.tolerant else {}
        told, self._settled = facts.get("ranks"), max(self._settled, facts.get("settled", 0))
        self._coming = facts.get("coming", [])
        self.beats.await_(self._coming)
        if told is None or set(told) == self._living:
            return
        lost, new = sorted(self._living - set(told)), sorted(set(told) - self._living)
        self._living = set(told)
        self.beats.forget(lost)
        self.beats.expect(new)
        if lost:
            left = len(told) - len(new)
            dead = "; ".join(map(self._describe_death, lost))
            self.say(f"{dead}: the others go on, on {left} rank{'s' if left > 1 else ''}")
        if new:
            self.say(f"{len(new)} new rank{'s' if len(new) > 1 else ''} came: {len(told)} ranks go on")

    def _is_here(self, rank: int) -> bool:
        return rank in self._known and self._known[rank]["machine"] == machine()

    def _is_stuck(self) -> bool:
        """Nothing happens, or the launcher has not noticed that it is over."""
        ends = places.ranks_with(self.directory)["end"]
        gone = self.beats.witnessed - ends - set(self._dead)
        dead = {*self._dead, *gone} & self._living
        limit = LEAVE_SECONDS if ends >= self._living else self.notice if dead - ends else None
        missed = [rank for rank in (*self._dead, *gone) if rank >= self._settled] or self._never_came()
        self._missed_since = (self._missed_since or time.monotonic()) if missed else None
        if self._missed_since is not None and time.monotonic() - self._missed_since > NOTICE_SECONDS:
            self._why = f"{self._name(missed[0])}, which was to take a lost place, died before it came"
            return True
        still = self.hang_timeout is not None and self.beats.is_still(self.hang_timeout)
        if limit is None:
            self._left_since = None
            if still:
                self._why = "" if self._kill_silent() else self._describe_hang()
            return bool(self._why)
        self._left_since = self._left_since or time.monotonic()
        if dead - ends and still and self._kill_silent():  # the others wait for it before they can go on
            self._left_since = None
        if self._left_since is None or time.monotonic() - self._left_since <= limit:
            return False
        self._dead += sorted(gone)  # nobody else has seen it
        return True

    def _never_came(self) -> list[int]:
        """New ranks that have not said that they are there, where no such process is here (any more): MPI
        does not see it, and the others wait.
        """
        names = [rank for rank in self._coming if rank not in self._known]
        elsewhere = self.launcher.hosts or not all(map(self._is_here, self._known))
        return [] if not names or elsewhere or any(map(is_newcomer, marked(self._mark))) else names

    def _kill_silent(self) -> bool:
        """Let the others go on without ranks that give no sign of life, if that can be."""
        dead = {*self._dead, *self.beats.witnessed}
        silent = [rank for rank in self.beats.silent if rank in self._living - dead]
        if not self.launcher.tolerant or not silent or {*silent, *dead} >= self._living:
            return False
        if not all(self._signal(rank, signal.SIGKILL) for rank in silent):
            return False
        for rank in silent:
            self.say(f"{self._name(rank)} gave no sign of life for {self.hang_timeout:g} s and is killed")
        self.beats.forget(silent)
        return True

    def _describe_hang(self) -> str:
        text = f"nothing has happened for {self.hang_timeout:g} s (--hang-timeout)"
        silent = self.beats.silent
        if silent:
            names = ", ".join(self._name(rank) for rank in silent[:4])
            return f"{text}: {names} gives no sign of life"
        return f"{text}, though all ranks live: {self.beats.describe(sorted(self._living))}"

    # -- after it

    def _clear(self) -> None:
        """End what is left: ranks, the launcher, and whatever else carries the job's mark."""
        if self._process.poll() is None:
            here = [rank for rank in self._known if self._is_here(rank)]
            for rank in here:
                kill_group(self._known[rank]["pid"], self._known[rank]["start"])
            if not here:
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLEAR_SECONDS)
        pid = self._process.pid
        kill_group(pid, start_of(pid) if self._process.poll() is None else "")
        kill_marked(self._mark)
        self._process.wait()

    def _ended(self) -> Ended:
        self.beats.look()
        path, now = self.beats.path, self.now()
        names = places.ranks_with(self.directory)
        ends = {rank: places.read(self.directory, f"end-{rank}") for rank in names["end"]}
        if now is not None:
            return Ended(now, path=path)
        self._learn_living()
        last = [ends.get(rank, {}) for rank in self._living]
        if {end.get("how") for end in last} == {"agreed"}:
            return Ended(max(end["status"] for end in last), path=path)
        first = ends.get(self._dead[0], {}) if self._dead else {}
        if first.get("how") == "asked":  # not by the launcher, behind another's death
            return Ended(first["status"], path=path)
        if self._why:
            return Ended(None, self._why, path=path)
        if not names["rank"]:
            return Ended(None, f"the launcher ended with {self._status()} before a rank began", came=False)
        rank, hosts = self._first_lost(ends), frozenset(str(who["host"]) for who in self._known.values())
        lost = self._known[rank]["host"] if rank in self._known else None
        return Ended(None, self._describe_loss(rank, ends), path=path, lost=lost, hosts=hosts)

    def _first_lost(self, ends: dict[int, dict[str, Any]]) -> int | None:
        """The rank that failed alone, or that died first; None where only other hosts have seen it."""
        alone = [rank for rank, end in ends.items() if end.get("how") == "alone"]
        dead = [rank for rank in self._dead if rank not in ends and rank in self._living]
        there = {rank: who for rank, who in self._known.items() if rank not in ends and rank in self._living}
        gone = [rank for rank in there if not self._is_here(rank)]
        if not alone and not dead and len({there[rank]["host"] for rank in gone}) > 1:
            return None
        return [*alone, *dead, *gone, 0][0]

    def _describe_loss(self, rank: int | None, ends: dict[int, dict[str, Any]]) -> str:
        if rank is not None and ends.get(rank, {}).get("how") == "alone":
            return f"{self._name(rank)} failed, and the others did not"
        if self._killed and self.launcher.kind != NONE:
            return f"the launcher died, {self._status()}, and its ranks with it"
        if rank is not None:
            return self._describe_death(rank)
        hosts = sorted({who["host"] for at, who in self._known.items() if at not in ends})
        path = ".".join(map(str, self.beats.path))
        seen = f"; last seen in iteration {path}" if path else ""
        return f"the launcher ended with {self._status()}; ranks on {', '.join(hosts)} died{seen}"

    def _describe_death(self, rank: int) -> str:
        path = ".".join(map(str, self.beats.path_of(rank)))
        how = f", {self._status()}" if self.launcher.kind == NONE else ""
        return f"{self._name(rank)} died{how}{f'; last seen in iteration {path}' if path else ''}"

    def _name(self, rank: int) -> str:
        who = self._known.get(rank)
        return f"rank {rank} on {who['host']} (process {who['pid']})" if who else f"rank {rank}"

    def _status(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"signal {signal.Signals(-code).name}"
        return f"status {code}"
