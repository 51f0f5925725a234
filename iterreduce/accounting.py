"""What a loop run holds on this rank, what it will need, and which of its tables nobody reads any more.

`account` names every array of a run: tables by where they come from, plans, key directories, exchange buffers
and combiners by their stage. `refuse_too_large` says before a loop starts that it cannot fit its budget: from
what opened sources tell of their size, so it is a lower bound, and the same verdict on all ranks.

What it is not: it frees nothing and decides nothing by itself; the driver asks. How it can go wrong: text and
columns of lists take more memory than their files say, and what user code makes is not known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.placement import current
from iterreduce.errors import MemoryBudgetError
from iterreduce.exchange import FreshExchange, PlannedExchange, ValuesPlan
from iterreduce.folding import Combiner
from iterreduce.indexing import LinkTable
from iterreduce.inplace import KeyedState
from iterreduce.levels import Level, initials
from iterreduce.loop import Index, Loop, Stage, makes, reads_of
from iterreduce.memory import Accounts
from iterreduce.options import Options, format_size
from iterreduce.rowplan import RowPlan
from iterreduce.rowrounds import RowRounds, Shelf
from iterreduce.scratch import refuse_without_room
from iterreduce.slots import Slots
from iterreduce.sources.blocks import RowStream, expected_bytes
from iterreduce.superstep import Workshop
from iterreduce.total import Dense
from iterreduce.uncombined import WithFallback

KINDS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("plan", (ValuesPlan, RowPlan)),
    ("exchange buffers", (FreshExchange, PlannedExchange, RowRounds, Dense)),
    ("combiner", (Combiner,)),
    ("key directory", (Slots,)),
    ("results", (Shelf,)),
)
COPIES = "recovery copies"
EVICTABLE = ("plan of ", "key directory of ", COPIES)
INVARIANT = ("source ", "table ", "index ", "keys of ")
NEVER_TOO_LARGE = 1 << 20  # beside an interpreter of a hundred times that, less is not worth an error
LARGEST = 3  # accounts that a message names


# ---------------------------------------------------------------------- what is held


def account(
    root: Level, shop: Workshop, budget_bytes: int | None, saved: Any, copies: Any, *rest: Any
) -> Accounts:
    """The accounts of one rank of a run; ``saved``: copies of a checkpoint; ``copies``: for other ranks, and
    theirs; ``rest``: whatever else.
    """
    accounts = Accounts(budget_bytes)
    accounts.leave_out(shop.group, shop.events, shop.cache, *(level.loop for level in root.all()))
    for level in root.all():
        _count_tables(accounts, level)
    for name, resident in shop.residents.items():
        for of, side in zip(resident.stage.keys.values(), (resident.first, resident.second), strict=True):
            accounts.count(f"keys of {of}", side)
        accounts.count(f"index {name}", resident)
    works = list(executors(shop))
    for work in works:
        _count_work(accounts, work, shop)
    accounts.count("tables of the last iteration", *(vars(work).get("_tables") for work in works))
    for work in works:
        accounts.count(f"rows {_of(work)}", work)
    accounts.set("shared memory of the node", shop.group.shared_bytes)
    accounts.count("checkpoint copies", saved)
    accounts.count(COPIES, copies)
    accounts.count("engine", *rest)
    return accounts


def _count_tables(accounts: Accounts, level: Level) -> None:
    loop, within = level.loop, level.within
    tables = {**level.constants, **(level.standing.bindings if level.standing else {})}
    for name, table in tables.items():
        if not isinstance(table, LinkTable):
            accounts.count(within + named(loop, name), table)
    for name, source in loop.sources.items():
        if not isinstance(source, Loop):
            accounts.count(within + named(loop, name), source)
    for name, state in level.shop.states.items():
        accounts.count(f"{within}state {name}", state)


def executors(shop: Workshop) -> Iterator[Any]:
    """The exchanging stages at work, those in place of others too."""
    for work in shop.exchangers:
        if isinstance(work, WithFallback):
            yield from (work.folding, work.whole)
        elif not isinstance(work, KeyedState):
            yield work


def _count_work(accounts: Accounts, work: Any, shop: Workshop) -> None:
    of = _of(work)
    accounts.count(f"plan {of}", shop.cache.peek(getattr(work, "plan_token", 0)))
    held = vars(work)
    if isinstance(held.get("slots"), Slots):
        accounts.count(f"key directory {of}", shop.cache.peek(work.slots.token))
    for kind, types in KINDS:
        accounts.count(f"{kind} {of}", *(thing for thing in held.values() if isinstance(thing, types)))


def _of(work: Any) -> str:
    return f"of {type(work.stage).__name__} into {work.stage.into}"


def named(loop: Loop, name: str) -> str:
    """What a user calls this table; of a source also the file's name."""
    if name in loop.sources:
        file = getattr(loop.sources[name], "name", "")
        known = isinstance(loop.sources[name], Batch | Loop) or file in ("", name, "local")
        return f"source {name}" if known else f"source {name} ({file})"
    return f"{'state' if name in loop.state else 'table'} {name}"


def lasting_bytes(accounts: Accounts) -> int:
    """Bytes that stay when all plans are evicted, and no copies made for other ranks."""
    return accounts.total - sum(n for name, n in accounts.in_memory().items() if name.startswith(EVICTABLE))


def invariant_bytes(accounts: Accounts) -> int:
    """Bytes of tables that iterations only read."""
    return sum(n for name, n in accounts.report().items() if name.startswith(INVARIANT))


def is_audited(iteration: int) -> bool:
    """Are accounts made after this iteration? The first few, then ever fewer: sizes settle soon."""
    return iteration & (iteration - 1) == 0


def audit(accounts: Accounts, shop: Workshop, where: str) -> None:
    """Give plans what is left of the budget; raise `MemoryBudgetError` where the rest alone is over it.
    Copies for other ranks come last.
    """
    budget = accounts.budget_bytes
    assert budget is not None
    shop.cache.budget_bytes = max(0, budget - (accounts.total - shop.cache.nbytes - accounts.get(COPIES)))
    held = lasting_bytes(accounts)
    if held > max(budget, NEVER_TOO_LARGE):
        raise MemoryBudgetError(
            f"{where}: rank {shop.group.rank} of {shop.group.size} holds {format_size(held)}, more than its "
            f"budget of {format_size(budget)} (--memory): {largest(accounts.report())}; use more ranks, or a "
            "larger --memory"
        )


def largest(held: Mapping[str, int]) -> str:
    """The largest accounts, in words.

    >>> largest({"state ranks": 2048, "source points": 4096})
    'source points 4.0 KiB, state ranks 2.0 KiB'
    """
    order = sorted(held.items(), key=lambda item: (-item[1], item[0]))
    more = len(order) - LARGEST
    words = [f"{name} {format_size(nbytes)}" for name, nbytes in order[:LARGEST] if nbytes]
    return ", ".join([*words, f"and {more} more"] if more > 0 else words)


# ---------------------------------------------------------------------- what will be needed


@dataclass(frozen=True)
class Need:
    """Bytes that this rank will need; ``shared``: more ranks need less of it each."""

    name: str
    nbytes: int
    shared: bool = True


def open_sources(
    level: Level, known: Mapping[int, Any], group: Group, options: Options
) -> dict[str, RowStream]:
    """Open all sources of a loop, see that they fit, and give those that need not be held. Collective.

    ``known``: sources that were read before, by id; without caches they are opened again.
    """
    opened = {
        name: source
        for name, source in level.loop.sources.items()
        if not isinstance(source, Batch | Loop) and (options.naive or id(source) not in known)
    }
    for source in {id(source): source for source in opened.values()}.values():
        source.open(group)
    wanted = streamed(level)
    streams = {
        name: RowStream(group, source)
        for name, source in opened.items()
        if name in wanted
        and RowStream.can_read(source)
        and not (options.reproducible and source.blocks.rank_bounds is not None)  # rows move to other blocks
    }
    if options.memory_bytes is not None:
        needed, what = needs(level.loop, level.once, opened, streams, group), f'the loop "{level.label}"'
        place = current()
        if place is None:
            refuse_too_large(group, what, needed, options.memory_bytes)
        else:
            refuse_without_room(group, what, sum(need.nbytes for need in needed), place)
    return streams


def needs(
    loop: Loop,
    prepare: tuple[Stage, ...],
    opened: Mapping[str, Any],
    streams: Mapping[str, Any],
    group: Group,
) -> list[Need]:
    """What tables will take at least: sources as they are, indexed rows by number, keyed states once more.

    Made alike on all ranks, but for the sizes.
    """
    out = []
    sizes = {name: expected_bytes(source, *share_of(source, group)) for name, source in opened.items()}
    for name, source in loop.sources.items():
        if isinstance(source, Batch):
            out.append(Need(named(loop, name), source.nbytes, shared=False))
        elif name in opened and name not in streams:
            out.append(Need(named(loop, name), sizes[name]))
    for stage in prepare:
        if isinstance(stage, Index) and stage.rows in opened:
            out.append(Need(f"index {stage.into}", indexed_bytes(stage, opened[stage.rows], group)))
    for name, state in loop.state.items():
        if state.key and state.initial in sizes:
            out.append(Need(f"state {name}", sizes[state.initial]))
    return out


def share_of(source: Any, group: Group) -> tuple[int, int]:
    """This rank's blocks of an opened source."""
    lo, hi = source.blocks.owned(group.rank, group.size)
    return int(lo), int(hi)


def indexed_bytes(stage: Index, source: Any, group: Group) -> int:
    """Bytes of an `Index` of an equal share of the rows: four for the second key, and the other columns."""
    rows = source.blocks.rows or 0
    beside = sum(f.row_bytes for name, f in source.schema.items() if name not in stage.keys)
    return int(rows * (1 + stage.symmetric) * (4 + beside) // group.size)


def room_for(accounts: Accounts, nbytes: int) -> bool:
    """May this rank hold copies of so many bytes, in memory or in scratch?"""
    place = current()
    return accounts.fits(nbytes) or (place is not None and nbytes <= place.free_bytes() // 2)


def refuse_too_large(group: Group, what: str, needed: list[Need], budget_bytes: int) -> None:
    """Raise `MemoryBudgetError` on all ranks if one of them cannot hold this. Collective."""
    sums = np.array([need.nbytes if need.shared else 0 for need in needed] + [0], np.int64)
    group.allreduce(sums, "sum")
    most = group.agree_max(sum(need.nbytes for need in needed))
    if most <= max(budget_bytes, NEVER_TOO_LARGE):
        return
    everywhere = sum(need.nbytes for need in needed if not need.shared)
    by_name = {n.name: int(s) if n.shared else n.nbytes for n, s in zip(needed, sums, strict=False)}
    room, shared = budget_bytes - everywhere, int(sums.sum())
    ranks = max(group.size + 1, -(-shared // room)) if room > 0 and shared else 0
    raise MemoryBudgetError(
        f"{what} needs at least {format_size(most)} on a rank, and the budget is {format_size(budget_bytes)} "
        f"(--memory); over {group.size} rank{'s' * (group.size > 1)}: "
        f"{largest(by_name)}; "
        + (f"use at least {ranks:,} ranks, or " if ranks else "more ranks would not help: ")
        + f"give --memory {wanted_size(most)} or more"
    )


def wanted_size(nbytes: int) -> str:
    """A size as it is written behind ``--memory``, with some room: plans and buffers come on top.

    >>> wanted_size(1_000_000), wanted_size(5 << 30)
    ('2MiB', '7681MiB')
    """
    return f"{(nbytes + nbytes // 2 >> 20) + 1}MiB"


# ---------------------------------------------------------------------- who reads what


def streamed(level: Level) -> set[str]:
    """Sources whose rows `Index` stages alone read, once: they need not be held."""
    loop, prepare = level.loop, level.once
    indexed = {stage.rows for stage in prepare if isinstance(stage, Index)}
    others = {
        name
        for stage in prepare
        for name in (reads_of(stage)[1:] if isinstance(stage, Index) else reads_of(stage))
    }
    files = {name for name, s in loop.sources.items() if not isinstance(s, Batch | Loop)}
    return files & indexed - others - initials(loop) - level.read_later


def dead_after(groups: Sequence[tuple[Stage, ...]], kept: set[str]) -> list[set[str]]:
    """For each group of stages the names that nobody reads once it has run: no later stage, nor ``kept``.

    >>> from iterreduce.stages import Gather
    >>> dead_after([(Gather("a", "b"),), (Gather("a", "c"),), (Gather("c", "d"),)], {"d"})
    [{'b'}, {'a'}, {'c'}]
    """
    out: list[set[str]] = []
    later = set(kept)
    for group in reversed(groups):
        touched = {name for stage in group for name in (*reads_of(stage), *makes(stage))}
        out.append(touched - later)
        later |= touched
    return out[::-1]
