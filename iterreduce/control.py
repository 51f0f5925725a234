"""The control reduction: one Allgather of a few words per rank, at the end of every iteration.

Its words: stage and sequence, status, a token to evict, which stages' result keys changed, what the carry
gained, and the partials of the stopping rules. Every rank folds them in rank order, so all decide alike.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from iterreduce import fixpoint
from iterreduce.agreement import Guard, raise_agreed
from iterreduce.carrying import GAIN_WORDS, Number, after, fold_ranks, joined, put, tables_of
from iterreduce.collectives import Group
from iterreduce.exchange import OK, check_headers
from iterreduce.fixpoint import Outcome
from iterreduce.levels import Level, Standing
from iterreduce.maps import in_user_code

CONTROL_WORDS = 4  # stage and sequence, status, token to evict, stages whose result keys changed (bits)
STAGE, STATUS, EVICT, CHANGED = range(CONTROL_WORDS)
TELLS = 1 << 40  # a bit of the status: the two words behind it are not zero
LAST_BIT = 61  # more stages than bits share the last one: a false alarm only makes a plan anew


@dataclass(slots=True)  # a value, though not frozen: freezing costs 1 us per iteration
class Heard:
    """What all ranks said."""

    status: int
    changed: int
    wishes: tuple[int, ...]

    def said_changed(self, number: int) -> bool:
        """Did the result keys of this exchange change on any rank?"""
        return bool(self.changed >> min(number, LAST_BIT) & 1)


NOTHING = Heard(OK, 0, ())


def ask_conditions(group: Group, level: Level, numbers: Mapping[str, Number], guard: Guard) -> int:
    """Which supersteps run: rank 0 asks the user's functions and tells all. Collective."""
    words = np.zeros(len(level.conditions) + 1, np.int64)
    if group.rank == 0:
        for word, (at, when) in enumerate(level.conditions):
            guard.stage = f"{level.within}{level.loop.body[at].name}: when"
            words[word] = bool(guard.run(in_user_code, _asked, when, dict(numbers)))
    words[-1] = guard.failure is not None
    group.allreduce(words, "max")
    if words[-1]:
        raise_agreed(group, guard.failure)
    return ~sum(1 << at for (at, _), runs in zip(level.conditions, words.tolist(), strict=False) if not runs)


def _asked(when: Callable[[Mapping[str, Number]], bool], numbers: Mapping[str, Number]) -> bool:
    return bool(when(numbers))  # what has no truth value is an error of the user's, too


class Control:
    """The control reduction of one level. Carries of the levels around it ride along."""

    def __init__(self, level: Level, group: Group, check: bool):
        self.level, self.check = level, check
        self.rules = level.loop.until
        carries = [(at, name) for at in level.chain for name in at.loop.carry]
        self.carries = [(at, name, CONTROL_WORDS + i * GAIN_WORDS) for i, (at, name) in enumerate(carries)]
        first = CONTROL_WORDS + GAIN_WORDS * len(carries)
        self._send = np.zeros(first + sum(r.width for r in self.rules.rules), np.int64)
        self._recv = np.zeros(len(self._send) * group.size, np.int64)
        self._gathered = self._recv.reshape(group.size, -1)
        self._words = self._send.data, self._recv.data  # read in a third of an array's time
        self._spoke = False  # is any word but the partials other than zero?
        self._status_at = [at + STATUS for at in range(0, len(self._recv), len(self._send))]
        self._floats = self._gathered[:, first:].view(np.float64)
        words = struct.Struct(f"{len(self._send) - first}d")
        self._put_partials = partial(words.pack_into, self._send.data.cast("B"), 8 * first)
        self._call = group.allgather_plan(self._send, self._recv, CONTROL_WORDS)

    def run(
        self, iteration: int, status: int, evict: int, changed: int, partials: Sequence[float] | None
    ) -> Heard:
        """Say this, and hear what all say. Collective."""
        send, came = self._words
        if self.check:
            send[STAGE] = self.level.number << 40 | iteration
        if status or evict or changed or self._spoke:
            self._spoke = bool(status or evict or changed)
            send[STATUS], send[EVICT], send[CHANGED] = status | TELLS * bool(evict or changed), evict, changed
        if self.carries:
            self._put_gains()
        if partials:
            self._put_partials(*partials)  # in a third of the time that NumPy needs
        self._call.run()
        if self.check:
            check_headers(self._gathered, True)
        status = changed = 0
        for at in self._status_at:
            status |= came[at]
        if not status:
            return NOTHING
        if not status & TELLS:
            return Heard(status, 0, ())
        for at in self._status_at:
            changed |= came[at + CHANGED - STATUS]
        wishes = [came[at + EVICT - STATUS] for at in self._status_at]
        return Heard(status & ~TELLS, changed, tuple(filter(None, wishes)))

    def _put_gains(self) -> None:
        for at, name, word in self.carries:
            self._send[word : word + GAIN_WORDS] = 0
            if name in at.gains:
                put(self._send, word, at.loop.carry[name], at.gains[name])

    def commit_carry(self, standing: Standing) -> None:
        """What was accumulated since the last reduction is known to all; the level's own numbers change."""
        for at, name, word in self.carries:
            carry, words = at.loop.carry[name], self._gathered[:, word : word + GAIN_WORDS]
            if name in at.gains and at.standing is not None:
                gain, before = fold_ranks(carry, words), at.standing.gained.get(name)
                both = gain if before is None else joined(carry, before, gain)
                at.standing.gained = {**at.standing.gained, name: both}
        for at in self.level.chain:
            at.gains = {}
        carries = self.level.loop.carry
        numbers, gained = standing.carry, standing.gained
        standing.carry = {
            name: after(carry, numbers[name], gained.get(name)) for name, carry in carries.items()
        }
        standing.gained = {}
        standing.bindings.update(tables_of(carries, standing.carry))

    def verdict(self, standing: Standing) -> tuple[Outcome | None, float | None]:
        """Do the stopping rules hold after this iteration?"""
        return fixpoint.verdict(self.rules, self._floats, standing.iteration, standing.carry)
