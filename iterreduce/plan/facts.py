"""What is known of a node's rows from the plan alone, on all ranks alike.

    varies     on which iterations it depends: what varies on none of them is an invariant
    identity   the node whose rows these are, one for one and in the same order
    origin     where a column's values come from, unchanged and row for row
    unique     sets of columns whose values no two rows share
    everywhere whether every rank has all rows

Facts are proven, never guessed from data; only the row identity of a state is assumed first (its rows are
those that it began with), then the body is looked at, and the assumption is dropped where the body does not
keep it. Nothing here runs or reads.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from iterreduce.columns.expressions import Column
from iterreduce.plan.functions import RowNumber
from iterreduce.plan.nodes import (
    Aggregate,
    Evolving,
    Filter,
    Group,
    Iterate,
    Join,
    Limit,
    MapBatches,
    Node,
    Project,
    Repartition,
    Rows,
    Sample,
    Sort,
    Source,
    StateOf,
    StateRows,
    Union,
    reads,
    walk,
)

Key = frozenset[str]
_thread = threading.local()  # ranks may be threads
MOST_KEYS = 8  # sets of columns that are followed: joins multiply them


@contextmanager
def proven_only() -> Iterator[None]:
    """Plans made inside take nothing for granted that shows only when they run: no key of first rows, and no
    number of rows to have a value.
    """
    before, _thread.proven = takes_nothing(), True
    try:
        yield
    finally:
        _thread.proven = before


def takes_nothing() -> bool:
    """Is it inside of `proven_only`?"""
    return getattr(_thread, "proven", False)


class Facts:
    """Facts of the nodes of one plan, found when they are asked for and kept."""

    def __init__(self, roots: Iterable[Node] = ()):
        self._varies: dict[int, frozenset[object]] = {}
        self._evolves: dict[int, bool] = {}
        self._unique: dict[int, frozenset[Key]] = {}
        self._kept: list[Node] = []  # ids of nodes are kept for as long as the nodes are
        self._aligned: set[int] = set()  # states whose rows are those that they begin with
        self._of_states: dict[int, frozenset[Key]] = {}  # what tells the rows of states apart
        self._unproven: dict[int, Key] = {}  # keys that the first rows of a state perhaps do not have
        self.notes: dict[int, str] = {}  # why a state's rows are not invariant
        self._readers: Counter[int] = Counter()
        nodes = list(walk(*roots))
        for node in nodes:
            self._readers.update(id(part) for part in reads(node))
        self._settle([node for node in nodes if isinstance(node, Iterate)])

    def read_once(self, node: Node) -> bool:
        """Does one node of the plan read it, and no other? (Of a node that is no part of it: no.)"""
        return self._readers[id(node)] == 1

    # ------------------------------------------------------------------ invariance

    def varies(self, node: Node) -> frozenset[object]:
        """The iterations whose states it depends on. What an opaque function that is not pure makes is made
        anew in each.
        """
        found = self._varies.get(id(node))
        if found is None:
            for part in walk(node, known=self._varies):
                self._varies[id(part)] = self._varies_here(part)
                self._kept.append(part)
            found = self._varies[id(node)]
        return found

    def _varies_here(self, node: Node) -> frozenset[object]:
        if isinstance(node, StateRows):
            return frozenset({node.body})
        own = node.body if isinstance(node, MapBatches) else None
        out: frozenset[object] = frozenset() if own is None else frozenset({own})
        for needed in reads(node):
            out |= self._varies.get(id(needed), frozenset())
        return out - {node.body} if isinstance(node, Iterate) else out

    def evolves(self, node: Node) -> bool:
        """Do its rows come out of an iteration, in it or after it? Then a column of which the first rows have
        no null may have some.
        """
        found = self._evolves.get(id(node))
        if found is None:
            for part in walk(node, known=self._evolves):
                inside = any(self._evolves.get(id(p), False) for p in part.inputs)
                self._evolves[id(part)] = inside or isinstance(part, StateRows | Iterate | StateOf)
                self._kept.append(part)
            found = self._evolves[id(node)]
        return found

    # ------------------------------------------------------------------ states

    def _settle(self, loops: list[Iterate]) -> None:
        """Assume that all states keep the rows that they begin with, and what tells those apart; drop what
        the bodies do not keep, until the rest holds. (Then it holds in every iteration, by induction, also of
        loops in each other's bodies.)
        """
        assumed = [s for loop in loops if not loop.delta for s in loop.states]
        self._aligned |= {id(s.rows) for s in assumed}
        given = (s for loop in loops for s in loop.states if s.key or not s.keyed)
        self._of_states |= {id(s.rows): frozenset((frozenset(s.key),) if s.key else ()) for s in given}
        open_ = [s for s in assumed if not s.key and s.keyed]
        self._drop(assumed, open_)
        for state in open_:
            if not self._keys_of(state.rows) and not takes_nothing():
                self._assume_key(state, assumed, open_)

    def _drop(self, assumed: list[Evolving], without_key: list[Evolving]) -> None:
        """Drop what is not so until nothing changes."""
        while True:
            self._unique.clear()
            wrong = {id(s.rows): why for s in assumed if self.aligned(s.rows) and (why := self._why_not(s))}
            fewer = {
                id(s.rows): keys for s in without_key if (keys := self._keys_kept(s)) != self._keys_of(s.rows)
            }
            if not wrong and not fewer:
                return
            self.notes |= wrong
            self._aligned -= wrong.keys()
            self._of_states |= fewer

    def _keys_of(self, rows: StateRows) -> frozenset[Key]:
        """The sets of columns that tell a state's rows apart."""
        if id(rows) not in self._of_states:
            self._of_states[id(rows)] = self.unique(rows.initial)
        return self._of_states[id(rows)]

    def _keys_kept(self, state: Evolving) -> frozenset[Key]:
        """Those that the first rows have, and the body keeps."""
        unproven = self._unproven.get(id(state.rows))
        return frozenset(
            key
            for key in self._keys_of(state.rows)
            if self.is_unique(state.result, key)
            and (key == unproven or self.is_unique(state.rows.initial, key))
        )

    def _assume_key(self, state: Evolving, assumed: list[Evolving], without_key: list[Evolving]) -> None:
        """A key that the body's rows have surely, and the first rows perhaps: that shows when it runs."""
        names = state.rows.initial.names or ()
        for key in sorted(self.unique(state.result), key=_size):
            if key and key <= set(names):
                self._unproven[id(state.rows)] = key
                self._of_states[id(state.rows)] = frozenset((key,))
                self._drop(assumed, without_key)
                if self._keys_of(state.rows):
                    return
                del self._unproven[id(state.rows)]

    def _why_not(self, state: Evolving) -> str:
        """Why the body does not keep the state's rows; empty where it does."""
        if self.identity(state.result) is not self.identity(state.rows.initial):
            return f"its rows are made anew by: {self.identity(state.result).label}"
        for key in self.state_key(state.rows):
            if key not in (state.result.names or ()):
                return f'the body\'s result has no column "{key}"'
            if self.origin(state.result, key) != self.origin(state.rows.initial, key):
                return f'the body changes its key column "{key}"'
        return ""

    def aligned(self, state: StateRows) -> bool:
        """Are its rows, in every iteration, those that it began with?"""
        return id(state) in self._aligned

    def state_key(self, state: StateRows) -> tuple[str, ...]:
        """The columns that tell its rows apart; empty: none are known."""
        best = min(self._keys_of(state), key=_size, default=frozenset[str]())
        return tuple(n for n in state.initial.names or () if n in best)

    # ------------------------------------------------------------------ rows

    def identity(self, node: Node) -> Node:
        """The node whose rows these are, one for one and in the same order."""
        while True:
            if isinstance(node, Project):
                node = node.input
            elif isinstance(node, Join) and self.keeps_left(node):
                node = node.left
            elif isinstance(node, StateRows) and self.aligned(node):
                node = node.initial
            elif isinstance(node, MapBatches) and node.keeps:
                node = node.rows[0]
            elif isinstance(node, Iterate | StateOf) and self.aligned(_given(node).rows):
                node = _given(node).rows.initial
            else:
                return node

    def keeps_left(self, join: Join) -> bool:
        """Has the join exactly one row for each left row?"""
        if join.how not in ("left", "inner") or not self.is_unique(join.right, join.right_keys):
            return False
        return join.how == "left" or self.is_met(join)

    def is_met(self, join: Join) -> bool:
        """Has every left row of a join by one key surely a match?"""
        if len(join.on) > 1 or not self.never_null(join.left, join.left_keys[0]):
            return False
        return self.covers(join.right, join.right_keys[0], join.left, join.left_keys[0])

    def never_null(self, node: Node, column: str) -> bool:
        """Has the column surely no null?"""
        node, column = self.origin(node, column)
        field = (node.fields or {}).get(column)
        if field is not None:
            return not field.nullable
        if isinstance(node, Group) and column in node.keys:
            return self.never_null(node.input, column)
        if isinstance(node, Filter | Sort | Repartition | Limit | Sample | Union):
            return all(self.never_null(part, column) for part in node.inputs)
        return isinstance(node, Source) and getattr(node.source, "of_edges", False)

    def origin(self, node: Node, column: str) -> tuple[Node, str]:
        """Where the values of a column come from, unchanged and row for row."""
        while True:
            if isinstance(node, Project):
                passed = node.passed.get(column)
                if passed is None:
                    return node, column
                node, column = node.input, passed
            elif isinstance(node, Join) and self.keeps_left(node) and column in (node.left.names or ()):
                node = node.left
            elif isinstance(node, StateRows) and self.aligned(node) and column in self.state_key(node):
                node = node.initial
            elif isinstance(node, MapBatches) and column in node.keeps:
                node = node.rows[0]
            elif isinstance(node, Iterate | StateOf) and self._passes(node, column):
                node = _given(node).rows.initial
            else:
                return node, column

    def _passes(self, node: Iterate | StateOf, column: str) -> bool:
        """Are the values of a column those that the state began with, row for row?"""
        rows = _given(node).rows
        return self.aligned(rows) and column in self.state_key(rows)

    def unique(self, node: Node) -> frozenset[Key]:
        """Sets of columns whose values no two rows share; the empty set: there is one row at most."""
        found = self._unique.get(id(node))
        if found is None:
            for part in walk(node, known=self._unique):
                keys = sorted(self._unique_here(part), key=_size)[:MOST_KEYS]
                self._unique[id(part)] = frozenset(keys)
                self._kept.append(part)
            found = self._unique[id(node)]
        return found

    def is_unique(self, node: Node, columns: Iterable[str]) -> bool:
        """Do these columns tell the rows apart?"""
        wanted = frozenset(columns)
        return any(key <= wanted for key in self.unique(node))

    def _unique_here(self, node: Node) -> Iterable[Key]:
        if isinstance(node, Group):
            return {frozenset(node.keys)}
        if isinstance(node, Aggregate):
            return {frozenset()}
        if isinstance(node, Project):
            return _renamed(self.unique(node.input), node)
        if isinstance(node, Filter | Sort | Repartition | Limit | Sample):
            return self.unique(node.input)
        if isinstance(node, Join):
            return self._unique_join(node)
        if isinstance(node, StateRows):
            return self._keys_of(node)
        if isinstance(node, Iterate | StateOf):
            return self._keys_of(_given(node).rows)
        if isinstance(node, MapBatches) and node.keeps:
            numbers: set[Key] = set()
            if isinstance(node.function, RowNumber):
                numbers.add(frozenset((node.function.name,)))
            return {key for key in self.unique(node.rows[0]) if key <= set(node.keeps)} | numbers
        if isinstance(node, Rows) and len(node.batch) <= 1:
            return {frozenset()}
        return set()

    def _unique_join(self, join: Join) -> Iterable[Key]:
        left, right = self.unique(join.left), self.is_unique(join.right, join.right_keys)
        if join.how in ("semi", "anti"):
            return left
        if join.how == "full":
            both = right and self.is_unique(join.left, join.left_keys)
            return {frozenset(join.left_keys)} if both else set()
        return left if right else set()

    # ------------------------------------------------------------------ places

    def everywhere(self, node: Node) -> bool:
        """Has every rank all its rows?"""
        if isinstance(node, Rows | Sample | Limit | Aggregate):
            return True
        if isinstance(node, StateRows):
            return self.everywhere(node.initial)
        if isinstance(node, Project | Filter | MapBatches | Join | Group | Union):
            return all(self.everywhere(part) for part in node.inputs)
        return False

    def covers(self, keys: Node, column: str, rows: Node, by: str) -> bool:
        """Has every row of ``rows`` its value of ``by`` among those of ``column`` of ``keys``? (Or a null.)

        So where ``keys`` are all rows of a table that the values come from, or groups of such rows.
        """
        keys, column = self._all_of(keys, column)
        if self._from(rows, by, keys, column):
            return True
        if not isinstance(keys, Group) or column not in keys.keys or len(keys.keys) != 1:
            return False
        source = keys.input
        parts = source.rows if isinstance(source, Union) else (source,)
        return any(self._from(rows, by, part, column) for part in parts)

    def _all_of(self, node: Node, column: str) -> tuple[Node, str]:
        """The node with the same values in a column, in whatever order."""
        while True:
            node, column = self.origin(node, column)
            if not isinstance(node, Sort | Repartition):
                return node, column
            node = node.input

    def _from(self, rows: Node, by: str, part: Node, column: str) -> bool:
        """Do the rows' values come from that column of that node, rows perhaps left out or doubled?"""
        wanted = self._all_of(part, column)
        while True:
            rows, by = self.origin(rows, by)
            if (rows, by) == wanted:
                return True
            chosen = isinstance(rows, Filter | Sort | Repartition | Limit | Sample)
            if chosen or (isinstance(rows, Group) and by in rows.keys):
                rows = rows.input  # type: ignore[attr-defined]
            elif isinstance(rows, Join) and rows.how != "full" and by in (rows.left.names or ()):
                rows = rows.left
            else:
                return False


def _size(key: Key) -> tuple[int, list[str]]:
    return len(key), sorted(key)


def _given(node: Iterate | StateOf) -> Evolving:
    """The state whose last rows these are."""
    name, loop = (node.gives, node) if isinstance(node, Iterate) else (node.name, node.loop)
    return next(state for state in loop.states if state.name == name)


def _renamed(keys: Iterable[Key], node: Project) -> set[Key]:
    """Key columns under the names that a projection gives them; those that it drops are keys no more."""
    names: dict[str, str] = {}
    for new, old in node.passed.items():
        names.setdefault(old, new)
    if node.rest and node.input.names is None:
        made = {name for name, _ in node.columns}
        return {key for key in keys if not key & made}
    return {frozenset(names[c] for c in key) for key in keys if key <= names.keys()}


def is_plain(node: Project) -> bool:
    """Does the projection choose and rename columns only?"""
    return all(isinstance(tree, Column) for _, tree in node.columns)
