"""Nodes of a logical plan: what rows are asked for, not how they are made.

A node is frozen data and compared by identity; the same node used twice is one sub-plan. `inputs` are the
nodes whose rows it reads, `scalars` the one-row nodes whose numbers its expressions hold. ``fields`` says
which columns its rows have: None where that is not known before the plan runs (what a Python function
returns); a column's `Field` may be None where only its type is not.

What it is not: typed rows or stages. Nothing here runs, reads or communicates. Who makes nodes: the handle's
operations (`iterreduce.plan.operations`) and the rewrites.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.batch import Batch
from iterreduce.columns.expressions import Column, Expr, Parameter
from iterreduce.columns.schema import Field
from iterreduce.columns.trees import parameters_of
from iterreduce.fixpoint import Until
from iterreduce.loop import Loop

Fields = Mapping[str, Field | None]
How = Literal["inner", "left", "full", "semi", "anti"]
Expressions = tuple[tuple[str, Expr], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Node:
    """What all nodes have: the columns of its rows, and the line of the program that asked for them."""

    fields: Fields | None = None
    where: str = ""

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes whose rows it reads, in order."""
        return ()

    @property
    def expressions(self) -> tuple[Expr, ...]:
        """The expressions that it computes."""
        return ()

    @cached_property
    def scalars(self) -> tuple[Scalar, ...]:
        """The numbers of other nodes that its expressions hold."""
        found = (p for tree in self.expressions for p in parameters_of(tree))
        return tuple({p.name: p for p in found if isinstance(p, Scalar)}.values())

    @cached_property
    def needed(self) -> tuple[Node, ...]:
        """The nodes whose rows it reads, and those whose numbers it uses."""
        return (*self.inputs, *(scalar.node for scalar in self.scalars))

    @cached_property
    def names(self) -> tuple[str, ...] | None:
        """The names of its columns in order; None: not known before it runs."""
        return None if self.fields is None else tuple(self.fields)

    @property
    def label(self) -> str:
        """One line for explain: the operation and its parameters."""
        return type(self).__name__

    def with_inputs(self, *inputs: Node) -> Node:
        """The same operation on other inputs."""
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{self.label}: wanted {len(self.inputs)} inputs, got {len(inputs)}")
        named = (f.name for f in fields(self) if isinstance(getattr(self, f.name), Node))
        changed: dict[str, Any] = dict(zip(named, inputs, strict=True))
        return replace(self, **changed) if changed else self


@dataclass(frozen=True, eq=False, kw_only=True)
class OfRows(Node):
    """A node that reads the rows of one other."""

    input: Node

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class OfSeveral(Node):
    """A node that reads the rows of any number of others."""

    rows: tuple[Node, ...]

    @property
    def inputs(self) -> tuple[Node, ...]:
        return self.rows

    def with_inputs(self, *inputs: Node) -> Node:
        return replace(self, rows=inputs)


@dataclass(frozen=True, eq=False, kw_only=True)
class Aggregated(OfRows):
    """A node that folds the rows of another."""

    aggregates: tuple[tuple[str, Aggregator], ...]

    @property
    def expressions(self) -> tuple[Expr, ...]:
        return tuple(a.column for _, a in self.aggregates if isinstance(a.column, Expr))


@dataclass(frozen=True)
class Scalar(Parameter):
    """A number of a plan: a column of the one row of a node, and a value of expressions."""

    column: str = ""

    @property
    def node(self) -> Node:
        """The node of one row."""
        return self.of  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(Node):
    """Rows that a source reads. ``wanted``: these columns only; ``bounds``: what a reader may leave out."""

    source: Any
    wanted: tuple[str, ...] | None = None
    bounds: tuple[tuple[str, str, Any], ...] = ()

    @property
    def label(self) -> str:
        return f"read {getattr(self.source, 'name', 'rows')}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows(Node):
    """Rows in memory, the same on all ranks."""

    batch: Batch

    @property
    def label(self) -> str:
        return f"{len(self.batch)} rows on every rank"


@dataclass(frozen=True, eq=False, kw_only=True)
class LoopRows(Node):
    """The result of a loop that was written in nouns."""

    loop: Loop

    @property
    def label(self) -> str:
        return f'result of loop "{self.loop.name}"'


@dataclass(frozen=True, eq=False, kw_only=True)
class StateRows(Node):
    """A state of the iteration that is being traced: its rows in the current iteration."""

    name: str
    initial: Node
    body: object  # which iteration: an identity

    @property
    def label(self) -> str:
        return f'state "{self.name}"'


@dataclass(frozen=True, eq=False, kw_only=True)
class Project(OfRows):
    """Columns computed row by row. ``rest``: all other columns of the input as well."""

    columns: Expressions
    rest: bool = False

    @property
    def expressions(self) -> tuple[Expr, ...]:
        return tuple(tree for _, tree in self.columns)

    @property
    def label(self) -> str:
        shown = (
            name if isinstance(tree, Column) and tree.name == name else f"{name} = {tree}"
            for name, tree in self.columns
        )
        return f"{'with' if self.rest else 'select'} {', '.join(shown)}"

    @cached_property
    def passed(self) -> Mapping[str, str]:
        """Output columns that are columns of the input as they are: output name -> input name."""
        out = {name: tree.name for name, tree in self.columns if isinstance(tree, Column)}
        if self.rest and self.input.names is not None:
            made = {name for name, _ in self.columns}
            out |= {name: name for name in self.input.names if name not in made}
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class Filter(OfRows):
    """The rows for which a condition is true (not false, not null)."""

    predicate: Expr

    @property
    def expressions(self) -> tuple[Expr, ...]:
        return (self.predicate,)

    @property
    def label(self) -> str:
        return f"filter {self.predicate}"


@dataclass(frozen=True, eq=False, kw_only=True)
class MapBatches(OfSeveral):
    """A Python function on batches of the first input, beside all rows of the others.

    ``by``: key columns: the function is given whole `Groups` of rows instead, one batch of groups for each
    input. ``pure``: its result depends on its arguments alone. ``keeps``: one row comes out for each of the
    first input, in their order, with these columns as they were beside what the function makes.
    """

    function: Any  # a function of batches, or a kernel
    pure: bool = False
    by: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    body: object = None  # the iteration in whose body it was written, unless it is pure

    @property
    def label(self) -> str:
        named = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{'map groups by ' + ', '.join(self.by) if self.by else 'map batches'} by {named}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Group(Aggregated):
    """One row per distinct key: the key columns, then aggregates."""

    keys: tuple[str, ...]

    @property
    def label(self) -> str:
        listed = ", ".join(f"{name} = {aggregator}" for name, aggregator in self.aggregates)
        return f"group by {', '.join(self.keys)}{': ' + listed if listed else ''}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Join(Node):
    """Pairs of rows with equal keys; ``on`` holds (left column, right column). Columns: those of the left,
    then of the right without its keys, a taken name with ``suffix`` behind it. A null equals no key.
    """

    left: Node
    right: Node
    on: tuple[tuple[str, str], ...]
    how: How = "inner"
    suffix: str = "_right"

    @property
    def inputs(self) -> tuple[Node, ...]:
        return self.left, self.right

    @property
    def left_keys(self) -> tuple[str, ...]:
        """The left key columns."""
        return tuple(a for a, _ in self.on)

    @property
    def right_keys(self) -> tuple[str, ...]:
        """The right key columns."""
        return tuple(b for _, b in self.on)

    @property
    def label(self) -> str:
        pairs = ", ".join(a if a == b else f"{a} = {b}" for a, b in self.on)
        return f"{self.how} join on {pairs}"

    @cached_property
    def taken(self) -> Mapping[str, str]:
        """The right columns that the result has: name in the result -> right column."""
        if self.how in ("semi", "anti") or self.right.names is None or self.left.names is None:
            return {}
        left = set(self.left.names)
        rest = (name for name in self.right.names if name not in self.right_keys)
        return {name + self.suffix if name in left else name: name for name in rest}


@dataclass(frozen=True, eq=False, kw_only=True)
class Union(OfSeveral):
    """All rows of several inputs with the same columns; they have no order."""

    @property
    def label(self) -> str:
        return "union"


@dataclass(frozen=True, eq=False, kw_only=True)
class Sort(OfRows):
    """Rows in the order of their keys, nulls last; rows of equal keys in the order in which they stood."""

    keys: tuple[str, ...]
    descending: tuple[bool, ...]

    @property
    def label(self) -> str:
        order = zip(self.keys, self.descending, strict=True)
        return f"sort by {', '.join(k + (' descending' if d else '') for k, d in order)}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Limit(OfRows):
    """The first rows; by the order of keys where there are some (`top`), else as they stand."""

    rows: int
    keys: tuple[str, ...] = ()
    descending: tuple[bool, ...] = ()

    @property
    def label(self) -> str:
        return f"top {self.rows} by {', '.join(self.keys)}" if self.keys else f"first {self.rows} rows"


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample(OfRows):
    """Different random rows, the same on any number of ranks, on every rank."""

    k: int
    seed: int
    at_least: int = 0
    of: str = "rows"

    @property
    def label(self) -> str:
        return f"sample {self.k} rows"


@dataclass(frozen=True, eq=False, kw_only=True)
class Repartition(OfRows):
    """The same rows, those of equal keys on one rank."""

    keys: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"repartition by {', '.join(self.keys)}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Aggregate(Aggregated):
    """One row for all rows: aggregates, the same on all ranks."""

    @property
    def label(self) -> str:
        return f"total {', '.join(f'{name} = {aggregator}' for name, aggregator in self.aggregates)}"


@dataclass(frozen=True)
class Evolving:
    """A state of an `Iterate`: its rows in an iteration (a placeholder), and what they become; of the changes
    of a delta iteration: what is proposed. ``keyed``: a key may be looked for where none is given.
    """

    name: str
    rows: StateRows
    result: Node
    key: tuple[str, ...] = ()
    keyed: bool = True


@dataclass(frozen=True, eq=False, kw_only=True)
class Iterate(Node):
    """States that a body makes anew from themselves until a rule holds; its rows are those of ``gives``.

    ``delta``: the first state is a table, the second the rows of it that changed; what the body proposes
    takes effect where ``merge`` (column -> MIN, MAX, ANY or ALL) improves the row of its key, or where the
    key is new.
    """

    name: str
    states: tuple[Evolving, ...]
    until: Until
    gives: str
    body: object
    delta: bool = False  # the states are a table and the rows of it that changed last
    merge: Mapping[str, Aggregator] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(state.rows.initial for state in self.states)

    def with_inputs(self, *inputs: Node) -> Node:
        raise NotImplementedError("an iteration is rewritten with its body")

    @property
    def label(self) -> str:
        return f'iterate "{self.name}"'


@dataclass(frozen=True, eq=False, kw_only=True)
class StateOf(Node):
    """Another state of an iteration that has ended, beside the one that it gives."""

    loop: Iterate
    name: str

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.loop,)


def reads(node: Node) -> tuple[Node, ...]:
    """All nodes that it needs: those whose rows it reads, those whose numbers it uses, and its body."""
    if isinstance(node, Iterate):  # its placeholders may begin with other rows than before
        return (*node.inputs, *(scalar.node for scalar in node.scalars), *(s.result for s in node.states))
    return node.needed


def walk(*roots: Node, known: Container[int] = ()) -> Iterator[Node]:
    """Every node once, what it needs before it. ``known``: ids of nodes that are left out, and with them what
    they alone need.
    """
    seen: set[int] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif id(node) not in seen and id(node) not in known:
            seen.add(id(node))
            needed = reads(node)
            if not needed:
                yield node
                continue
            stack.append((node, True))
            for part in reversed(needed):
                if id(part) not in seen:
                    stack.append((part, False))
