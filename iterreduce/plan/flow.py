"""What lowering works with: loops that are being built, their parts, tables in them, and rows under way.

Nothing is decided here. Who speaks to it: `iterreduce.plan.lower` and the rules of single operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from iterreduce.columns.expressions import Column
from iterreduce.loop import Loop, Stage, State, Superstep, Write
from iterreduce.plan.kernels import Beside, Columns, Keep, NumberOf, Step
from iterreduce.plan.nodes import Iterate

PREPARE, BODY, FINISH = "prepare", "body", "finish"


@dataclass(eq=False)
class Scope:
    """A loop that is being built; ``loop`` None: a plan without iteration, which runs once."""

    loop: Iterate | None
    parent: Scope | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    prepare: list[Stage] = field(default_factory=list)
    finish: list[Stage] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    steps: list[Superstep | Loop] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)  # of the superstep that is open
    writes: list[Write] = field(default_factory=list)
    outer: list[str] = field(default_factory=list)
    loops: set[str] = field(default_factory=set)  # results of loops inside the body

    def inside(self, other: Scope) -> bool:
        """Is it that loop, or one in its body?"""
        return self is other or (self.parent is not None and self.parent.inside(other))

    def close_step(self, name: str) -> None:
        """End the superstep that is open, if it does anything."""
        if self.stages or self.writes:
            number = f" {len(self.steps) + 1}" if self.steps else ""
            self.steps.append(Superstep(name + number, tuple(self.stages), tuple(self.writes)))
            self.stages, self.writes = [], []


@dataclass(frozen=True, eq=False)
class Place:
    """Where stages go: a part of a loop."""

    scope: Scope
    part: str

    def same(self, other: Place) -> bool:
        """Is it the same part of the same loop?"""
        return self.scope is other.scope and self.part == other.part


@dataclass(frozen=True, eq=False)
class Made:
    """A table of the loop that is being built.

    ``lies``: the key by which its rows lie; () on all ranks; None: anyhow. ``order``: tables with the same
    object have their rows in the same order, row for row.
    """

    name: str
    columns: tuple[str, ...] | None
    lies: tuple[str, ...] | None
    place: Place
    order: object
    step: int = 0  # of a body: how many supersteps and loops stood before


@dataclass(frozen=True, eq=False)
class Flow:
    """Rows under way: a table, what stands beside it, and steps that are not computed yet."""

    table: Made
    columns: tuple[str, ...] | None
    lies: tuple[str, ...] | None
    beside: tuple[tuple[Made, Beside], ...] = ()
    steps: tuple[Step, ...] = ()
    numbers: Mapping[str, tuple[Made, NumberOf]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Made) -> Flow:
        """The table as it is."""
        return cls(table, table.columns, table.lies)

    @property
    def plain(self) -> bool:
        """Is nothing to be computed?"""
        return not self.steps and not self.beside

    @property
    def keeps_rows(self) -> bool:
        """Do the same rows come out as go in?"""
        return not any(isinstance(step, Keep) for step in self.steps)


def passed_through(flow: Flow) -> dict[str, str]:
    """The columns of the result that are columns of the first table, unchanged: name -> its name there."""
    names = {name: name for name in flow.table.columns or ()}
    for _, columns in flow.beside:
        for _, new in columns:
            names.pop(new, None)
    for step in flow.steps:
        if isinstance(step, Columns):
            made = {
                new: names[tree.name]
                for new, tree in step.trees
                if isinstance(tree, Column) and tree.name in names
            }
            if step.rest:
                changed = {new for new, _ in step.trees}
                made |= {n: old for n, old in names.items() if n not in changed}
            names = made
    return names
