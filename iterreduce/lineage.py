"""The lineage of a shuffle's keys: the token of what it reads, and of the key columns that it makes.

A shuffle *proposes* a plan under a token that names its key columns as they came; once all ranks proposed the
same, later iterations move values only. The key columns that it makes are, from one iteration to the next,
the same array objects as long as they are equal, and carry tokens by a version that all ranks raise together,
so a shuffle that reads them can keep a plan of its own.

Shared by the shuffles with and without ``combine``, and by lookups. Nothing here communicates, but for a plan
that is run or put in force.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from iterreduce.agreement import Guard
from iterreduce.columns.batch import Batch
from iterreduce.errors import UsageError
from iterreduce.exchange import ABSTAIN, FAILED, REPLAN
from iterreduce.loop import Shuffle
from iterreduce.loop_cache import LoopCache
from iterreduce.table import NO_TOKENS, Table, token


@dataclass(frozen=True)
class Pending:
    """A plan that is installed when the iteration commits."""

    token: int
    plan: Any
    body: Any
    nbytes: int
    onto: tuple[int, ...] = ()


def require_keyed(stage: Shuffle, onto: Table) -> None:
    """Raise `UsageError` unless each row of ``onto`` lies with the owner of its key."""
    if onto.layout.kind != "key" or onto.layout.keys != stage.key:
        keys = ", ".join(stage.key)
        lies = (
            f"lies by key {', '.join(onto.layout.keys)}"
            if onto.layout.kind == "key"
            else "is not partitioned by key"
        )
        raise UsageError(
            f'shuffle onto "{stage.onto}" by {keys}: that table {lies}; name a state with key=({keys}), '
            f"or the result of a Shuffle by {keys}"
        )


class Planner:
    """A stage that keeps a plan: when one is worth making, when it takes effect, when it goes."""

    def __init__(self, number: int, epoch: int, cache: LoopCache, repeats: bool):
        self.number, self.epoch, self.cache = number, epoch, cache
        self.repeats = repeats  # a stage that runs once needs no plan
        self.replans = 0
        self.proposal = ABSTAIN
        self.plan: Any = None
        self.plan_token = 0
        self.too_large = False  # for a plan: what it keeps would lie in files, and be read in no order
        self.on_plan = False  # does what this rank brings go by the plan?
        self.planned = False  # did the exchange, on all ranks?
        self._pending: Pending | None = None
        self._last_proposal = 0

    def _run_plan(self, guard: Guard, recover: Callable[[], object]) -> int:
        """Exchange by the plan; ``planned`` tells whether it held on all ranks. Collective.

        Where it did not, it is dropped, and what this rank had laid out for it is recovered for a fresh
        exchange. Returns the status that all ranks agree on.
        """
        self.planned = False
        status: int = self.plan.run(guard.status if self.on_plan else guard.status | REPLAN)
        return self._heard_plan(status, guard, recover)

    def _heard_plan(self, status: int, guard: Guard, recover: Callable[[], object]) -> int:
        """`_run_plan` behind its collective."""
        if status & FAILED:
            return status
        self.planned = not status & REPLAN
        if not self.planned:
            self.replans += 1
            if self.on_plan:
                guard.run(recover)
            self._drop_plan()
        return status

    def _worth_a_plan(self) -> bool:
        """Keys that changed before must be proposed twice in a row: plans for keys that change cost more."""
        steady = self.replans == 0 or self.proposal == self._last_proposal
        wanted = self.repeats and steady and self.proposal > 0 and self.cache.wants(self.proposal)
        return wanted and not self.too_large

    def _install(self) -> None:
        """Put the plan that this iteration made in force. Collective: every rank made one, or none did."""
        made = self._pending
        if made is not None:
            self.plan, self.plan_token = made.plan, made.token
            made.plan.connect()
            self.cache.put(made.token, "plan", made.body, made.nbytes, self._drop_plan)

    def _drop_plan(self) -> None:
        if self.plan is not None:
            self.cache.drop(self.plan_token)
        self.plan, self.plan_token = None, 0


class KeyLineage(Planner):
    """What a shuffle knows of its keys, on every iteration of a loop run."""

    def __init__(self, stage: Shuffle, number: int, epoch: int, cache: LoopCache, repeats: bool):
        super().__init__(number, epoch, cache, repeats)
        self.stage = stage
        self.keys: Batch | None = None
        self.keys_version = 0
        self.keys_changed = False
        self.keeps = cache.enabled and repeats
        self._keys_next: Batch | None = None
        self._tokens_known: dict[tuple[int | None, ...], int] = {}
        self._version_tokens: dict[int, dict[str, int]] = {}
        self._onto_seen: tuple[int | None, ...] = ()  # tokens of the keys that rows are shuffled onto
        self._onto_known: tuple[int, ...] = ()  # the same, 0 for none
        self._onto_tokens: Mapping[str, int] = NO_TOKENS  # those that there are, by name
        self._onto_steady = True  # there are all
        self._plan_onto: tuple[int, ...] = ()
        self._onto_token = 1 if stage.onto is None else 0

    # ------------------------------------------------------------------ what is read

    def _read_onto(self, found: Mapping[str, int]) -> None:
        """Take the tokens of the table that rows are shuffled onto: those of its keys."""
        mine = tuple(map(found.get, self.stage.key))
        if mine != self._onto_seen:
            self._onto_seen, self._tokens_known = mine, {}
            self._onto_tokens = {k: found[k] for k in self.stage.key if k in found}
            self._onto_known = tuple(t or 0 for t in mine)
            self._onto_token = 0 if 0 in self._onto_known else token("onto", self._onto_known)
            self._onto_steady = 0 not in self._onto_known

    def _proposal_of(self, found: Mapping[str, int]) -> int:
        """The token under which a plan for rows with these column tokens may be kept; 0: none."""
        tokens = tuple(map(found.get, self.stage.key))
        known = self._tokens_known.get(tokens)
        if known is None:
            agreed = None not in tokens and 0 not in tokens and self._onto_token != 0
            known = token("shuffle", self.number, tokens, self._onto_token, self.epoch) if agreed else 0
            self._tokens_known = {tokens: known}
        return known if self.cache.enabled else 0

    def _propose(self, found: Mapping[str, int]) -> int:
        """The proposal of one more piece of rows; the stage's is 0 where pieces differ."""
        proposal = (
            self._tokens_known.get(tuple(map(found.get, self.stage.key))) if self.cache.enabled else None
        )
        if proposal is None:
            proposal = self._proposal_of(found)
        if self.proposal == ABSTAIN:
            self.proposal = proposal
        elif self.proposal != proposal:
            self.proposal = 0
        return proposal

    # ------------------------------------------------------------------ what is made

    def _stable(self, keys: Batch) -> Batch:
        """The keys of last time, as the same objects, where they are equal."""
        self.keys_changed = self.keys is None or not self.keys.equals(keys)
        self._keys_next = keys if self.keys_changed else self.keys
        assert self._keys_next is not None
        return self._keys_next

    def _made_tokens(self) -> Mapping[str, int]:
        """The tokens of the key columns made in this iteration; those with nulls have none."""
        return self._key_tokens(self.keys_version + self.keys_changed) if self.keeps else NO_TOKENS

    def _key_tokens(self, version: int) -> dict[str, int]:
        if version not in self._version_tokens:
            keys = self._keys_next if self._keys_next is not None else self.keys
            names = [] if keys is None else [k for k in self.stage.key if keys.valid(k) is None]
            self._version_tokens = {version: {k: token("keys", self.number, version, k) for k in names}}
        return self._version_tokens[version]

    def _commit_keys(self, changed: bool, planned: bool) -> dict[int, int]:
        """Keep the keys; with ``changed`` on any rank, the tokens of the new version by those of the old."""
        if self._keys_next is not None:
            self.keys = self._keys_next
        if not planned:
            self._last_proposal = self.proposal
        if not changed:
            return {}
        here = self.keys_changed
        before, after = self._key_tokens(self.keys_version), self._key_tokens(self.keys_version + 1)
        self.keys_version += 1
        if here:  # what was made has the new tokens; a table with the old ones has the old keys
            return {}
        return {before[k]: after[k] for k in before if k in after}  # a key may have come to hold nulls

    def _forget_keys(self) -> None:
        self._keys_next, self.keys_changed = None, False

    # ------------------------------------------------------------------ the plan

    def _plan_body(self) -> Any:
        """This rank's part of the plan; None where it is lost, or made for other keys of the table that rows
        are shuffled onto (a rank without rows proposes nothing, and would not see it).
        """
        known = self._onto_steady and self._plan_onto == self._onto_known
        return self.cache.get(self.plan_token) if known else None

    def _install(self) -> None:
        """As `Planner` says, and remember the keys of the table that rows are shuffled onto."""
        if self._pending is not None:
            self._plan_onto = self._pending.onto
        super()._install()
