"""A plan as text: as written, what was rewritten, as it runs, where each part goes and why, and what moves.

The text follows from the plan and from what all ranks know alike, so it is the same on any number of them;
what was measured is added behind the stages by a run that was watched. Nothing here decides anything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from iterreduce.events import Event, Events
from iterreduce.group import Group as Ranks
from iterreduce.laid import laid_out, lay_out
from iterreduce.loop import Index, Loop, Stage, Superstep
from iterreduce.options import Options, format_size
from iterreduce.plan.known import rows_of
from iterreduce.plan.lower import Lowering
from iterreduce.plan.nodes import Group, Iterate, Join, Node, Project, Rows, Source, StateRows, walk
from iterreduce.plan.planning import Planned, planned
from iterreduce.plan.reasons import anew, hoisted
from iterreduce.plan.stagewords import stages
from iterreduce.plan.tree import plain, tree
from iterreduce.run import run_loop

Section = tuple[str, list[str]]


def explain(work: Node | Loop, ranks: Ranks, run: Options | None = None) -> str:
    """A plan, or a loop, as text; with ``run`` it is run first, and what was measured stands behind the
    stages. Collective.
    """
    plan = None if isinstance(work, Loop) else planned(work, ranks)
    loop = work if isinstance(work, Loop) else plan.loop  # type: ignore[union-attr]
    measured = None
    if run is not None:
        measured, events = Measured(), Events()
        events.subscribe(measured.note)
        run_loop(loop, ranks, run, events)
        measured = measured.together(ranks, everywhere(loop))
    return explained_loop(loop, measured) if plan is None else explained(plan, measured)


def explained(planned: Planned, measured: Measured | None = None) -> str:
    """All that there is to say of a plan."""
    lowering = planned.lowering
    after = tree(planned.after, _margin(lowering), lambda node: _estimate(planned, node))
    sections: list[Section] = [("plan as written", tree(planned.before))]
    sections.append(("rules applied", _counted(planned.applied)))
    sections.append(("plan as it runs", after))
    for loop in (node for node in walk(planned.after) if isinstance(node, Iterate)):
        sections += _of_loop(loop, lowering)
    sections.append(("notes", _notes(lowering)))
    sections.append(("stages", stages(planned.loop, measured.of if measured else lambda step, stage: "")))
    return text_of(sections)


def explained_loop(loop: Loop, measured: Measured | None = None) -> str:
    """What there is to say of a loop that was written in nouns: its stages."""
    found = stages(loop, measured.of if measured else lambda step, stage: "")
    return text_of([(f'stages of loop "{loop.name}"', found)])


def text_of(sections: list[Section]) -> str:
    """Titled lines."""
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections if lines
    )


def _counted(applied: list[tuple[str, str]]) -> list[str]:
    counts = Counter((rule, plain(what)) for rule, what in applied)
    return [f"{rule}: {what}{f' ({n} times)' if n > 1 else ''}" for (rule, what), n in counts.items()]


# ---------------------------------------------------------------------- the tree


def _margin(lowering: Lowering) -> Any:
    if lowering.main is None:
        return lambda node: ""
    return lambda node: f"{part_of(node, lowering):8}"


def part_of(node: Node, lowering: Lowering) -> str:
    """Which part of the loop makes a node: ``prepare``, ``body`` (``inner`` in a loop inside), ``finish``."""
    varies = lowering.facts.varies(node)
    if varies:
        main = lowering.main
        return "body" if main is not None and varies == {main.body} else "inner"
    if node is lowering.main:
        return ""
    return "finish" if id(node) in lowering.after else "prepare"


def _estimate(planned: Planned, node: Node) -> str:
    rows = at_most(planned, node)
    if rows is None:
        return ""
    exact = isinstance(node, Source | Rows)
    width = row_bytes(node)
    size = "" if width is None else f", {format_size(rows * width)}"
    return f"  ({'' if exact else 'at most '}{rows} row{'' if rows == 1 else 's'}{size})"


def at_most(planned: Planned, node: Node) -> int | None:
    """At most how many rows a node has, by what is known of sources and by its facts."""
    facts = planned.lowering.facts
    while True:
        rows = rows_of(node, planned.sizes)
        if rows is not None:
            return rows
        if isinstance(node, Join) and node.how in ("inner", "left") and facts.is_unique(
            node.right, node.right_keys
        ):  # fmt: skip
            node = node.left
        elif isinstance(node, StateRows) and facts.aligned(node):
            node = node.initial
        elif isinstance(node, Project | Group):
            node = node.input
        else:
            return None


def row_bytes(node: Node) -> int | None:
    """The bytes of a row, where all columns have one size."""
    if node.fields is None:
        return None
    total = 0
    for of in node.fields.values():
        if of is None or of.kind != "fixed":
            return None
        total += of.dtype.itemsize * _product(of.shape)
    return total


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


# ---------------------------------------------------------------------- reasons


def _of_loop(loop: Iterate, lowering: Lowering) -> Iterator[Section]:
    facts, named = lowering.facts, f'in the body of "{loop.name}"'
    once = [plain(f"{_down_to_work(node)}{_at(node)}") for node in hoisted(loop, facts)]
    yield f"made once, for nothing {named} changes it", once
    lines = []
    for node, why in anew(loop, facts):
        lines.append(plain(f"{node.label}{_at(node)}: {why}"))
        if isinstance(node, Group) and id(node) not in lowering.links.fused:
            reason = lowering.links.why_not.get(id(node), "")
            lines += [plain(f"  no shuffle of indexed rows: {reason}")] if reason else []
    yield f"made anew {named}", lines
    yield f'states of "{loop.name}"', [_state(state.rows, lowering) for state in loop.states]


def _down_to_work(node: Node) -> str:
    """A node's label, and behind a projection what it is of."""
    labels = [node.label]
    while isinstance(node, Project):
        node = node.input
        labels.append(node.label)
    return " of ".join(labels)


def _state(rows: StateRows, lowering: Lowering) -> str:
    facts = lowering.facts
    key = facts.state_key(rows)
    kept = f"kept by {', '.join(key)}" if key else "without a key"
    if facts.aligned(rows):
        return plain(f'"{rows.name}": {kept}; its rows stay the same, so keys and plans are made once')
    why = facts.notes.get(id(rows), "")
    return plain(f'"{rows.name}": {kept}; its rows may change{f": {why}" if why else ""}')


def _at(node: Node) -> str:
    return f" ({node.where})" if node.where else ""


def _notes(lowering: Lowering) -> list[str]:
    said = (plain(f"{n.label}: {t}") for n, t in lowering.notes if not isinstance(n, StateRows))
    return list(dict.fromkeys(said))


# ---------------------------------------------------------------------- measured


@dataclass
class Measured:
    """What stages of a run sent and made, added up over iterations and ranks."""

    seconds: dict[str, float] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    def note(self, event: Event) -> None:
        """Listen to a run."""
        if event.name != "stage.end":
            return
        stage, fields = event.fields["stage"], event.fields
        self.seconds[stage] = self.seconds.get(stage, 0.0) + fields["seconds"]
        self.sent[stage] = self.sent.get(stage, 0) + fields["bytes"]
        self.rows[stage] = fields["rows"]
        self.times[stage] = self.times.get(stage, 0) + 1

    def together(self, ranks: Ranks, everywhere: frozenset[str]) -> Measured:
        """Over all ranks: bytes added up, rows too but for tables that every rank has; the slowest's seconds.
        Collective.
        """
        mine = json.dumps([self.seconds, self.sent, self.rows, self.times]).encode()
        told = [json.loads(raw) for raw in ranks.allgather_bytes(mine)]
        out = Measured(times=self.times)
        for stage in self.times:
            out.seconds[stage] = max(rank[0].get(stage, 0.0) for rank in told)
            out.sent[stage] = sum(rank[1].get(stage, 0) for rank in told)
            rows = [rank[2].get(stage, 0) for rank in told]
            out.rows[stage] = max(rows) if stage.partition(" into ")[2] in everywhere else sum(rows)
        return out

    def of(self, step: str, stage: Stage) -> str:
        """What was measured of a stage."""
        name = f"{step}: {type(stage).__name__} into {stage.into}"
        if name not in self.times:
            return "  [computed where it is read]"
        times = f" in {self.times[name]} times" if self.times[name] > 1 else ""
        sent = f"{format_size(self.sent[name])} sent, " if self.sent[name] else ""
        n = self.rows[name]
        rows = "" if isinstance(stage, Index) else f"{n} row{'' if n == 1 else 's'}, "
        return f"  [{rows}{sent}{self.seconds[name]:.3g} s{times}]"


def everywhere(loop: Loop) -> frozenset[str]:
    """The tables of a loop that every rank has, those of loops inside it too."""
    laid: dict[str, tuple[str, ...]] = laid_out(loop)
    out: set[str] = set()
    for step in loop.body:
        if isinstance(step, Superstep):
            for stage in step.stages:
                lay_out(stage, laid)
        else:
            out |= everywhere(step)
    for stage in loop.finish:
        lay_out(stage, laid)
    for source in loop.sources.values():
        out |= everywhere(source) if isinstance(source, Loop) else set()
    return frozenset(out | {name for name, key in laid.items() if key == ()})
