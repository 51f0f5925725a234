"""A logical plan as lines of text: every node once, what it reads below it.

A node with one input has it on the next line; several inputs stand indented, each behind a dash. A node that
others read too has a number, and is shown again as that number only. Nothing is planned here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from iterreduce.plan.nodes import Iterate, Node, Source, StateOf, StateRows, reads, walk
from iterreduce.rules import (
    AllUnchanged,
    CarryRule,
    Distance,
    Empty,
    MaxIterations,
    NoneActive,
    Predicate,
    Unchanged,
)

Words = Callable[[Node], str]


def tree(root: Node, margin: Words = lambda node: "", behind: Words = lambda node: "") -> list[str]:
    """The lines of a plan; ``margin`` and ``behind`` say what stands before and behind a node's line."""
    return Tree(root, margin, behind).lines


class Tree:
    """A plan being written down. Without recursion: a long pipeline is a deep plan."""

    def __init__(self, root: Node, margin: Words, behind: Words):
        self.margin, self.behind = margin, behind
        uses = Counter(id(part) for node in walk(root) for part in reads(node))
        shared = [node for node in walk(root) if uses[id(node)] > 1 and not isinstance(node, StateRows)]
        self.shared = {id(node) for node in shared}
        self.numbers: dict[int, int] = {}
        self.shown: set[int] = set()
        self.lines: list[str] = []
        self.work: list[tuple[Node | str, str, str]] = [(root, "", "")]
        while self.work:
            what, first, rest = self.work.pop()
            if isinstance(what, str):
                self.lines.append(f"{self.margin(root) and ' ' * len(self.margin(root))}{first}{what}")
            else:
                self._node(what, first, rest)

    def _node(self, node: Node, first: str, rest: str) -> None:
        number = ""
        if id(node) in self.shared:
            number = f"[{self.numbers.setdefault(id(node), len(self.numbers) + 1)}] "
        if id(node) in self.shown and not isinstance(node, StateRows):
            self.lines.append(f"{self.margin(node)}{first}{number}again")
            return
        self.shown.add(id(node))
        self.lines.append(f"{self.margin(node)}{first}{number}{label(node)}{self.behind(node)}")
        self.work += reversed(self._below(node, rest))

    def _below(self, node: Node, rest: str) -> list[tuple[Node | str, str, str]]:
        """What stands under a node: numbers of its expressions, then its inputs."""
        out: list[tuple[Node | str, str, str]] = []
        inner = rest + "  "
        for scalar in node.scalars:
            out += [(scalar.node, f"{inner}- with the number {scalar.column} of: ", f"{inner}  ")]
        if isinstance(node, Iterate):
            for state in node.states:
                key = f", by {', '.join(state.key)}" if state.key else ""
                out.append((f'state "{state.name}"{key}', inner, inner))
                out.append((state.rows.initial, f"{inner}- begins as: ", f"{inner}  "))
                said = "proposes" if node.delta else "becomes"
                if state.result is not state.rows:
                    out.append((state.result, f"{inner}- {said}: ", f"{inner}  "))
            return out
        if isinstance(node, StateOf):
            return [(node.loop, rest, rest)]
        if len(node.inputs) == 1:
            return [*out, (node.inputs[0], rest, rest)]
        return out + [(part, f"{inner}- ", f"{inner}  ") for part in node.inputs]


def label(node: Node) -> str:
    """A node in one line."""
    if isinstance(node, Iterate):
        return f"{node.label} until {until(node)}"
    text = f'state "{node.name}" of' if isinstance(node, StateOf) else node.label
    if isinstance(node, Source):
        text += f": {', '.join(node.names)}" if node.names else ""
        if node.wanted is not None:
            text += " (no other column is read)"
        if node.bounds:
            listed = " and ".join(f"{name} {sign} {value}" for name, sign, value in node.bounds)
            text += f" (may leave out rows unless {listed})"
    return plain(text)


def plain(text: str) -> str:
    """Without the marks of names that no user gives."""
    return text.replace("\0", "'")


def until(loop: Iterate) -> str:
    """The stopping rules of an iteration."""
    rules = (r for r in loop.until.rules if not isinstance(r, AllUnchanged) or r.width)
    return " or ".join(map(rule, rules))


def rule(given: object) -> str:
    """A stopping rule in words."""
    if isinstance(given, Distance):
        by = given.per_row if isinstance(given.per_row, str) else getattr(given.per_row, "__name__", "rows")
        return f"{by}({', '.join(given.columns)}) <= {given.threshold:g}"
    if isinstance(given, MaxIterations):
        return f"{given.n} iterations"
    if isinstance(given, Unchanged):
        return "nothing changes"
    if isinstance(given, Empty):
        return f'"{given.table}" has no rows'
    if isinstance(given, NoneActive):
        return f"no {given.column} is true"
    if isinstance(given, Predicate):
        return f"{getattr(given.function, '__name__', 'a function')} says so"
    assert isinstance(given, CarryRule)
    return f"{given.carry} {given.compare} {given.threshold:g}"
