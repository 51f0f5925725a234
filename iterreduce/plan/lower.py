"""From nodes to the nouns of the engine: a plan becomes a `Loop`.

Every node is lowered once, to rows under way (`Flow`): a table of the loop, tables that stand beside it row
for row, and steps that wait to be computed in one pass. What does not depend on the states of an iteration
goes to ``prepare``: that is all of loop-invariant code motion. What depends on the result of the plan's last
iteration goes to ``finish``.

Who speaks to it: `Dataset`. The rules of single operations are in `rows`, `grouping` and `joining`; a join of
invariant rows with a keyed table under a group becomes a shuffle of indexed rows (`links`). What it is not:
the optimizer. It lowers the plan that it is given (`iterreduce.plan.rules` makes a better one first).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from iterreduce.columns.expressions import Column, Expr, Parameter
from iterreduce.columns.schema import Field
from iterreduce.columns.trees import parameters_of, with_parameters
from iterreduce.errors import UsageError
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import Gather, Local, Loop, Number, Replace, Shuffle, Stage, State, Superstep
from iterreduce.plan.facts import Facts
from iterreduce.plan.flow import BODY, FINISH, PREPARE, Flow, Made, Place, Scope, passed_through
from iterreduce.plan.kernels import Columns, Compute, NumberOf
from iterreduce.plan.links import Links
from iterreduce.plan.nodes import Group, Iterate, Node, Scalar, StateOf, reads, walk

SMALL_ROWS = 1 << 16  # rows that are brought to every rank rather than shuffled: some MB
MOST_ROWS = 1 << 22  # that are brought to every rank where the other side is so many times larger:
SMALLER = 8
Sizes = Callable[[Node], int | None]


class Rules(NamedTuple):
    """How single nodes are lowered: handed in, since each lowers its inputs by the `Lowering` itself."""

    flow: Mapping[type[Node], Callable[[Lowering, Any], Flow]]
    total: Callable[[Lowering, Node], tuple[Made, dict[str, int | None]]]
    states: Callable[[Lowering, Iterate, Scope], None]
    onto: Callable[[Lowering, Group, Made, Place, bool], Made | None]
    linked: Callable[[Lowering, Group], Flow]
    vertices: Callable[[Lowering, Group], Flow]


class Lowering:
    """One plan on its way to a loop."""

    def __init__(
        self,
        root: Node,
        rules: Rules,
        name: str = "plan",
        sizes: Sizes = lambda node: None,
        around: Lowering | None = None,
    ):
        """``rules``: how the rows of each kind of node are lowered; ``sizes``: how many rows a node has,
        where all ranks know that alike; ``around``: of the plan before whose loop this one runs.
        """
        self.root, self.rules, self.name, self.sizes = root, rules, name, sizes
        self.facts = Facts((root,))
        self.links = Links((root,), self.facts)
        self.main = self._main(root)
        self.after = self._after(root)
        self.earlier: dict[int, tuple[Loop, dict[str, Made]]] = around.earlier if around else {}
        self.asked_of: dict[int, list[str]] = around.asked_of if around else asked_states(root)
        self.befores: dict[int, dict[str, Made]] = {}
        self.uses = Counter(id(part) for node in walk(root) for part in reads(node))
        self.parents = parents_of(root)
        self.top = Scope(self.main)
        self.scopes: list[Scope] = []  # whose bodies are being lowered, the outermost first
        self.flows: dict[int, Flow] = {}
        self.tables: dict[int, Made] = {}
        self.totals: dict[int, tuple[Made, dict[str, int | None]]] = {}
        self.parameters: dict[str, Parameter] = {}
        self.taken: Counter[str] = Counter()
        self.in_order: dict[int, list[Made]] = {}  # tables by the order of their rows
        self.shuffled: dict[tuple[str, tuple[str, ...]], Made] = {}
        self.notes: list[tuple[Node, str]] = []
        self.extra: list[Node] = []  # ids of nodes are kept for as long as the nodes are
        self.counted: set[str] = set()  # tables whose global row numbers are known
        self.on_all_ranks: set[int] = set()  # groups that every rank needs whole
        self.full: dict[int, Mapping[str, Field]] = {}  # of joins: columns that have no null after all

    # ------------------------------------------------------------------ which loop

    def _main(self, root: Node) -> Iterate | None:
        """The iteration that becomes the loop itself: the last one that no body holds."""
        inside: set[int] = set()
        loops = [node for node in walk(root) if isinstance(node, Iterate)]
        for loop in loops:
            for state in loop.states:
                inside |= {id(n) for n in walk(state.result) if isinstance(n, Iterate) and n is not loop}
        outermost = [loop for loop in loops if id(loop) not in inside]
        return outermost[-1] if outermost else None

    def _after(self, root: Node) -> set[int]:
        """The nodes that depend on the result of the main iteration."""
        out: set[int] = set()
        if self.main is not None:
            for node in walk(root):
                if node is self.main or any(id(part) in out for part in reads(node)):
                    out.add(id(node))
        return out

    def place(self, node: Node) -> Place:
        """Where the stages of a node go."""
        varies = self.facts.varies(node)
        for scope in reversed(self.scopes):
            if scope.loop is not None and scope.loop.body in varies:
                return Place(scope, BODY)
        if varies:
            body = next(iter(varies))
            raise UsageError(
                f'{node.label}: rows of the iteration "{getattr(body, "name", "")}" are used outside of its '
                f"body; return them from the step as a state ({node.where})"
            )
        return Place(self.top, FINISH if id(node) in self.after else PREPARE)

    # ------------------------------------------------------------------ the loop

    def loop(self) -> Loop:
        """The whole plan as a loop."""
        if self.main is None:
            return self._once()
        self.scopes = [self.top]
        self.rules.states(self, self.main, self.top)
        self.scopes = []  # the body is complete
        given = next(state for state in self.main.states if state.name == self.main.gives)
        made = replace(self.tables[id(given.rows)], place=Place(self.top, FINISH))
        self.flows[id(self.main)] = Flow.of(made)
        result = self._result()
        self.top.close_step(self.main.name)
        return self.build(self.top, self.main.name, self.main.until, result)

    def _once(self) -> Loop:
        """A plan that does not iterate: prepared, and kept."""
        made = self.made(self.root)
        scope = self.top
        scope.states["result"] = State(made.name)
        scope.writes.append(Replace("result", "result"))
        scope.close_step("keep")
        return self.build(scope, self.name, Until((MaxIterations(1),)), "result")

    def _result(self) -> str:
        assert self.main is not None
        if self.root is self.main:
            return self.main.gives
        return self.made(self.root).name

    def before(self, node: Iterate) -> dict[str, Made]:
        """An iteration as a loop of its own, which runs before this one: its states that are read."""
        found = self.befores.get(id(node))
        if found is None:
            loop, states = self.earlier.get(id(node)) or self._earlier(node)
            self.earlier[id(node)] = loop, states
            found = self.befores[id(node)] = self._of_earlier(node, loop, states)
        return found

    def _earlier(self, node: Iterate) -> tuple[Loop, dict[str, Made]]:
        work = Lowering(node, self.rules, node.label, self.sizes, self)
        loop = work.loop()
        states = {s.name: work.tables[id(s.rows)] for s in node.states}
        gives = {f"{node.name}: {n}": states[n].name for n in self.asked_of[id(node)] if n != node.gives}
        return replace(loop, gives=gives), states

    def _of_earlier(self, node: Iterate, loop: Loop, states: dict[str, Made]) -> dict[str, Made]:
        place, out = Place(self.top, PREPARE), {}
        name = self.name_of_source(loop.name)
        self.top.sources[name] = loop
        of = {table: name for name, table in loop.gives.items()} | {loop.result: name}
        for state, made in states.items():
            if made.name in of:
                out[state] = self.new(of[made.name], made.columns, made.lies, place)
        return out

    @staticmethod
    def build(scope: Scope, name: str, until: Until, result: str) -> Loop:
        """The scope as a loop."""
        idle = (Superstep(name, (), tuple(Replace(state, state) for state in scope.states)),)
        return Loop(
            name,
            scope.sources,
            scope.states,
            tuple(scope.steps) or idle,
            until,
            result,
            prepare=tuple(scope.prepare),
            finish=tuple(scope.finish),
            outer=tuple(dict.fromkeys(scope.outer)),
        )

    # ------------------------------------------------------------------ rows

    def flow(self, node: Node) -> Flow:
        """A node's rows under way."""
        found = self.flows.get(id(node))
        if found is None:
            found = self.rules.flow[type(node)](self, node)
            if self.uses[id(node)] > 1 and not found.plain:
                found = Flow.of(self._materialise(found, self.place(node), node))
            self.flows[id(node)] = found
        return found

    def made(self, node: Node) -> Made:
        """A node's rows as a table."""
        found = self.tables.get(id(node))
        if found is None:
            flow = self.flow(node)
            found = self.tables[id(node)] = self.table(flow, self.place(node), node)
            self.flows[id(node)] = Flow.of(found)
        return found

    def table(self, flow: Flow, place: Place, node: Node) -> Made:
        """Rows under way as a table."""
        return flow.table if flow.plain else self._materialise(flow, place, node)

    def columns_in(self, flow: Flow, place: Place, node: Node) -> Made:
        """A table that has these columns under their names, perhaps beside others."""
        chosen = (tree for step in flow.steps if isinstance(step, Columns) for tree in step.trees)
        same = all(isinstance(tree, Column) and tree.name == name for name, tree in chosen)
        if same and flow.keeps_rows and not flow.beside:
            return flow.table
        return self.table(flow, place, node)

    def _materialise(self, flow: Flow, place: Place, node: Node) -> Made:
        reads = [flow.table, *(made for made, _ in flow.beside)]
        numbers = list(flow.numbers.values())
        reads += [made for made, _ in numbers]
        renames = passed_through(flow)
        kernel = Compute(
            flow.steps,
            tuple(columns for _, columns in flow.beside),
            tuple(number for _, number in numbers),
            tuple((new, old) for new, old in renames.items()),
        )
        into = self.name_of(node)
        lies = flow.table.lies
        cut = "block" if lies is None else "share"
        names = tuple(self.read(made, place) for made in reads)
        self.emit(place, Local(kernel, names, into, cut=cut))  # type: ignore[arg-type]
        order = flow.table.order if flow.keeps_rows else object()
        return self.new(into, flow.columns, flow.lies, place, order)

    # ------------------------------------------------------------------ tables

    def new(
        self,
        name: str,
        columns: tuple[str, ...] | None,
        lies: tuple[str, ...] | None,
        place: Place,
        order: object = None,
    ) -> Made:
        """A table that a stage has just been emitted for."""
        made = Made(name, columns, lies, place, order or object(), len(place.scope.steps))
        self.in_order.setdefault(id(made.order), []).append(made)
        return made

    def alike(self, table: Made, place: Place) -> Made | None:
        """The table, or one with the same rows in the same order that stages at a place can read."""
        alike: list[Made] = [table, *self.in_order.get(id(table.order), ())]
        for made in alike:
            if made.lies and (made.place.same(place) or made.place.part == PREPARE):
                return made
        return None

    def emit(self, place: Place, stage: Stage) -> None:
        """Put a stage where it belongs."""
        scope = place.scope
        {PREPARE: scope.prepare, BODY: scope.stages, FINISH: scope.finish}[place.part].append(stage)

    def name_of(self, node: Node, what: str = "") -> str:
        """A name for a table, which tells what it holds."""
        base = what or node.label.split(" ", 3)[0]
        self.taken[base] += 1
        return f"{base} #{self.taken[base]}"

    def read(self, made: Made, place: Place) -> str:
        """The name by which stages at a place read a table; what would be out of sight is brought there."""
        home, here = made.place.scope, place.scope
        name = made.name
        if made.place.part == BODY and made.name not in (*home.states, *home.loops):
            seen = home is here and place.part == BODY and made.step == len(home.steps)
            name = made.name if seen else self._kept(made)
        scope: Scope | None = here
        while scope is not None and scope is not home:
            scope.outer.append(name)
            scope = scope.parent
        return name

    @staticmethod
    def _kept(made: Made) -> str:
        """The state in which a stage's result outlives its superstep."""
        scope, name = made.place.scope, f"{made.name} (kept)"
        if name not in scope.states:
            scope.states[name] = State("")
            write = Replace(name, made.name)
            if made.step == len(scope.steps):
                scope.writes.append(write)
            else:
                step = scope.steps[made.step]
                assert isinstance(step, Superstep)
                scope.steps[made.step] = replace(step, writes=(*step.writes, write))
        return name

    # ------------------------------------------------------------------ numbers

    def tree(self, tree: Expr, numbers: dict[str, tuple[Made, NumberOf]]) -> Expr:
        """The expression with the numbers of other nodes as parameters of a kernel."""
        changed: dict[str, Expr] = {}
        for leaf in parameters_of(tree):
            if isinstance(leaf, Scalar):
                parameter = self.parameters.setdefault(
                    leaf.name, Parameter(f"n{len(self.parameters)}", leaf.field)
                )
                made, defaults = self.total(leaf.node)
                number = NumberOf(parameter.name, leaf.column, defaults.get(leaf.column))
                numbers[parameter.name] = made, number
                changed[leaf.name] = parameter
        return with_parameters(tree, changed) if changed else tree

    def total(self, node: Node) -> tuple[Made, dict[str, int | None]]:
        """The table of a node of one row, and what its columns are if it has none."""
        found = self.totals.get(id(node))
        if found is None:
            found = self.totals[id(node)] = self.rules.total(self, node)
        return found

    # ------------------------------------------------------------------ where rows lie

    def laid(self, node: Node, keys: tuple[str, ...], place: Place, ordered: bool = True) -> Made:
        """A node's rows as a table that lies by these keys, made where the rows are made. ``place``: who
        asks. ``ordered``: rows of a key stand together; a join needs only that they lie on one rank.
        """
        made, home = self.made(node), self.place(node)
        if made.lies in (keys, ()):
            self.note(node, f"rows lie by {', '.join(keys)} already: nothing travels")
            return made
        found = self.shuffled.get((made.name, keys))
        if found is None and not ordered:
            found = self.shuffled.get((made.name, ("\0anyhow", *keys)))
        if found is None:
            into = self.name_of(node, f"{made.name} by {', '.join(keys)}")
            self.emit(home, Shuffle(self.read(made, home), keys, into, sorted=ordered))
            known = keys if ordered else ("\0anyhow", *keys)
            found = self.shuffled[made.name, known] = self.new(into, made.columns, keys, home)
        if not home.same(place):
            self.note(node, f"shuffled by {', '.join(keys)} once, before the first iteration")
        return found

    def numbered(self, node: Node) -> Made:
        """A node's rows as a table whose global row numbers are known, as those of sorted rows are."""
        made = self.made(node)
        if made.lies == () or made.name in self.counted or made.name in self.top.sources:
            return made
        place, into = self.place(node), self.name_of(node, f"{made.name} counted")
        self.emit(place, Number(self.read(made, place), into))
        self.counted.add(into)
        return self.new(into, made.columns, made.lies, place, made.order)

    def name_of_source(self, base: str) -> str:
        """A name for a source, its own if that is free."""
        self.taken[base] += 1
        return base if self.taken[base] == 1 else f"{base} #{self.taken[base]}"

    def everywhere(self, node: Node) -> Made:
        """The rows as a table that every rank has."""
        return self.gathered(self.made(node), self.place(node), node)

    def gathered(self, made: Made, place: Place, node: Node) -> Made:
        """A table's rows on all ranks."""
        if made.lies == ():
            return made
        found = self.shuffled.get((made.name, ()))
        if found is None:
            into = self.name_of(node, f"{made.name} everywhere")
            self.emit(place, Gather(self.read(made, place), into))
            found = self.shuffled[made.name, ()] = self.new(into, made.columns, (), place)
        return found

    def made_again(self, node: Node) -> Made:
        """The table of a node that lowering made, which is no part of the plan that it was given."""
        self.extra.append(node)
        return self.made(node)

    def is_small(self, node: Node, beside: Node | None = None) -> bool:
        """Are these rows so few that every rank may have them, or so much fewer than those ``beside`` them?
        By sizes that all ranks know alike; not by how many ranks there are, or a restart on others would
        find another plan.
        """
        rows = self.sizes(node) if not self.facts.varies(node) else None
        if rows is not None and beside is not None and SMALL_ROWS < rows <= MOST_ROWS:
            others = self.sizes(beside)
            return others is not None and others >= SMALLER * rows
        return rows is not None and rows <= SMALL_ROWS

    def note(self, node: Node, text: str) -> None:
        """Something that explain says."""
        self.notes.append((node, text))


def asked_states(root: Node) -> dict[int, list[str]]:
    """The states of each iteration that something reads when it has ended, by its id."""
    out: dict[int, list[str]] = {}
    for node in walk(root):
        if isinstance(node, Iterate):
            out.setdefault(id(node), []).append(node.gives)
        elif isinstance(node, StateOf):
            out.setdefault(id(node.loop), []).append(node.name)
    return out


def parents_of(root: Node) -> dict[int, list[Node]]:
    """The nodes that read each node."""
    out: dict[int, list[Node]] = {}
    for node in walk(root):
        for part in reads(node):
            out.setdefault(id(part), []).append(node)
    return out
