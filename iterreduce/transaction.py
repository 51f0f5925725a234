"""A transaction of a run: what one iteration has done so far, until it is committed or rolled back.

It works on drafts of where levels stand, and notes which supersteps ran, what they sank and what the carry
gained. Until the commit nothing of it can be seen from outside. Nothing here communicates, except that
committing a plan connects it, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from iterreduce.agreement import Guard
from iterreduce.carrying import gain_of, joined
from iterreduce.control import LAST_BIT, Heard
from iterreduce.inplace import KeyedState
from iterreduce.levels import Level, Standing
from iterreduce.superstep import Exchanger, SuperstepRun, check_sunk
from iterreduce.table import Table


class Transaction:
    """One transaction on this rank. ``drafts``: levels and how they will stand; None: no more."""

    __slots__ = ("drafts", "ran", "sunk", "values")

    def __init__(self) -> None:
        self.drafts: list[tuple[Level, Standing | None]] = []
        self.ran: list[SuperstepRun] = []
        self.sunk: list[tuple[str, Table]] = []
        self.values: dict[str, float | int] = {}  # of an inner loop that has ended

    def draft(self, level: Level) -> Standing:
        """A copy of where the level stands, which takes its place at commit."""
        assert level.standing is not None
        draft = level.standing.draft()
        self.drafts.append((level, draft))
        return draft

    def standings(self, level: Level) -> list[Standing]:
        """Where this level and those around it stand now, outermost first."""
        drafts = {id(at): draft for at, draft in self.drafts}
        found = [drafts.get(id(at), at.standing) for at in level.chain]
        return [standing for standing in found if standing is not None]

    def aim(self, guard: Guard, level: Level, draft: Standing) -> tuple[int, ...]:
        """What fails from here on fails in this iteration; returns its path."""
        around = [] if level.parent is None else [s.iteration for s in self.standings(level.parent)]
        guard.iteration, guard.path = draft.iteration + 1, (*around, draft.iteration + 1)
        return guard.path

    def collect(
        self, level: Level, step: SuperstepRun, outputs: Mapping[str, Sequence[Table]], rank: int
    ) -> None:
        """What a superstep wrote elsewhere than to tables: into outputs, and into the carry."""
        for output, rows in step.sunk:
            check_sunk(output, [*outputs[output], *(t for name, t in self.sunk if name == output)], rows)
            self.sunk.append((output, rows))
        for write, rows in step.accumulated:
            carry = level.loop.carry[write.table]
            gain, known = gain_of(write, carry, rows, rank), level.gains.get(write.table)
            level.gains[write.table] = gain if known is None else joined(carry, known, gain)

    def works(self) -> dict[int, Exchanger | KeyedState]:
        """The exchanges of the supersteps that ran, by number; each once."""
        if len(self.ran) == 1:
            return self.ran[0].works
        return {number: work for step in self.ran for number, work in step.works.items()}

    def changed(self) -> int:
        """Bits of the exchanges whose result keys changed on this rank."""
        bits = 0
        for number, work in self.works().items():
            if work.keys_changed:
                bits |= 1 << min(number, LAST_BIT)
        return bits

    def commit(self, heard: Heard, innermost: Level) -> None:
        """The drafts stand; plans that were made take effect. Collective."""
        renames: dict[int, int] = {}
        for number, work in self.works().items():
            made = work.commit(heard.changed != 0 and heard.said_changed(number))
            if made:
                renames.update(made)
        if renames:
            self._rename(innermost, renames)
        for level, draft in self.drafts:
            if draft is not None:
                for name, state in level.shop.states.items():
                    draft.bindings[name] = state.settled(draft.bindings[name])
            level.standing = draft

    def roll_back(self) -> None:
        """It never was."""
        for work in self.works().values():
            work.rollback()

    def _rename(self, innermost: Level, renames: Mapping[int, int]) -> None:
        """New tokens for keys that changed, in the tables that this transaction made."""
        stood = [level.standing for level in (*innermost.chain, *(level for level, _ in self.drafts))]
        known = {id(table) for standing in stood if standing for table in standing.bindings.values()}
        known |= {id(table) for level in innermost.chain for table in level.constants.values()}
        for _, draft in self.drafts:
            if draft is not None:
                made = {n: t for n, t in draft.bindings.items() if id(t) not in known}
                draft.bindings.update({n: renamed(t, renames) for n, t in made.items()})


def renamed(table: Table, renames: Mapping[int, int]) -> Table:
    """The table with tokens of keys that changed in place of those of the keys before."""
    if not any(t in renames for t in table.tokens.values()):
        return table
    return replace(table, tokens={n: renames.get(t, t) for n, t in table.tokens.items()})
