"""Dataset: a lazy handle on rows that are somewhere: in files, on the ranks, or the result of a loop.

A handle holds a node, no rows. Nothing is opened, read or run until `run` or `collect` asks, or until the
loop that it is an input of runs. Nodes are data (`iterreduce.plan.nodes`); operations on rows stand in
`iterreduce.plan.operations`, and `iterate` makes a loop of a function of handles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, TypeVar

import numpy as np

from iterreduce.collectives import Group, group_for
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Ragged
from iterreduce.errors import AssumptionError, OtherJobError, UsageError, did_you_mean
from iterreduce.events import Events
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import Gather, Local, Loop, Replace, Stage, State, Superstep, keys_of
from iterreduce.options import Options
from iterreduce.plan.explain import explain
from iterreduce.plan.facts import proven_only
from iterreduce.plan.kernels import ChooseRows
from iterreduce.plan.making import node_of, user_line
from iterreduce.plan.nodes import LoopRows, Node, Sample, Source
from iterreduce.plan.operations import Operations
from iterreduce.plan.planning import to_loop
from iterreduce.plan.tracing import check_merge, states_of, trace, trace_changes
from iterreduce.recovery import enduring
from iterreduce.run import Result, delivered, run_loop
from iterreduce.sources import FiniteSource, LocalSource, StackedSource, open_source, write_result
from iterreduce.stopping import StopRequest

T = TypeVar("T")


class Dataset(Operations):
    """A lazy handle on rows. Make one with `iterreduce.read`, `Dataset.from_local` or a door such as
    `MapReduce`.

    >>> import numpy as np
    >>> numbers = Dataset.from_local(None, x=np.arange(5.0))
    >>> numbers.sample(5, seed=1).collect()["x"].tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """

    def __init__(self, node: Node, comm: Any = None):
        self.node, self.comm = node, comm

    def __repr__(self) -> str:
        return f"Dataset({self.node.label})"

    def _of(self, node: Node, *others: Any) -> Dataset:
        comms = (self.comm, *(getattr(other, "comm", None) for other in others))
        return Dataset(node, next((comm for comm in comms if comm is not None), None))

    def __bool__(self) -> bool:
        raise UsageError(
            "a Dataset is lazy and has no truth value; bool(rows.count()) runs it, .collect() makes its rows "
            f"({user_line()})"
        )

    def __len__(self) -> int:
        raise UsageError(f"a Dataset is lazy and has no length; int(rows.count()) counts ({user_line()})")

    def __iter__(self) -> Any:
        raise UsageError(f"a Dataset is lazy; .collect() or .to_numpy() make its rows ({user_line()})")

    def __getitem__(self, name: Any) -> Any:
        raise UsageError(
            f"a Dataset has no columns at hand; write ir.col({name!r}) in expressions, .select({name!r}) for "
            f"that column alone, .collect()[{name!r}] for its values ({user_line()})"
        )

    @classmethod
    def read(cls, path: str, **options: Any) -> Dataset:
        """Rows of a file, a directory or a glob, by suffix; each rank reads its own blocks."""
        return cls(source_node(open_source(path, **options)))

    @classmethod
    def read_edges(
        cls, path: str, columns: Sequence[str] = (), header: bool | None = None, **options: Any
    ) -> Dataset:
        """The edges of a graph in a file, a directory or a glob: columns ``src``, ``dst`` and, if there are
        weights, ``weight``; ids int64 or text. The same as ``read(path).as_edges()``.
        """
        return cls.read(path, **options).as_edges(columns, header)

    @classmethod
    def from_local(
        cls, comm: Any = None, *, copy: bool = True, save: bool = False, **columns: Any
    ) -> Dataset:
        """Rows that are in memory: on every rank of ``comm`` its own (None: one rank).

        Masked arrays (`numpy.ma`) and lists with None have nulls.
        ``copy=False``: the arrays are used as they are and must not change until the run ends.
        ``save=True``: these rows cannot be made again, so a run with a checkpoint directory saves them there
        once, and a restart takes them from there; the arrays that it is given are not looked at.
        Raises `DisagreementError` when it runs if columns differ between ranks.
        """
        return cls(source_node(LocalSource(batch_of(columns), copy=copy, save=save)), comm)

    def as_matrix(self, name: str = "x", keep: Sequence[str] = ()) -> Dataset:
        """Column ``name`` if there is one, else all numeric columns side by side as one of that name.

        Columns in ``keep`` (labels, weights), where there are such, stay beside the matrix.
        """
        return Dataset(source_node(StackedSource(self._source("as_matrix"), name, keep)), self.comm)

    def finite(self, *columns: str) -> Dataset:
        """The same rows; NaN or infinity in one of these columns is an error that names the row."""
        return Dataset(source_node(FiniteSource(self._source("finite"), columns)), self.comm)

    def as_edges(self, columns: Sequence[str] = (), header: bool | None = None) -> Dataset:
        """The rows as edges ``src``, ``dst``, ``weight``: lines of text are read as an edge list.

        ``columns``: which columns of a table are the ends of an edge (and its weight), if they have other
        names; ``header``: whether a .tsv begins with one, if its first line does not tell.
        """
        from iterreduce.sources.edges import edges_of  # late: who reads no edges pays for no parser

        return Dataset(source_node(edges_of(self._source("as_edges"), columns, header)), self.comm)

    @classmethod
    def of_loop(cls, loop: Loop, comm: Any = None) -> Dataset:
        """A lazy handle on the result of a loop written in the nouns of `iterreduce.loop`."""
        return cls(LoopRows(loop=loop), comm)

    def _source(self, what: str) -> Any:
        if not isinstance(self.node, Source):
            raise UsageError(f"{what}: wanted rows of a file or of memory, got {self!r}")
        return self.node.source

    def as_source(self) -> Any:
        """What a loop's ``sources`` and feeds hold of this handle: a source, or a loop whose result it is."""
        return self.node.source if isinstance(self.node, Source) else self.to_loop()

    @property
    def described(self) -> str:
        """Where the rows come from, for messages."""
        return str(getattr(self.node.source, "name", "rows")) if isinstance(self.node, Source) else repr(self)

    def to_loop(self, comm: Any = None) -> Loop:
        """The loop that this handle stands for: one that runs once, if it does not iterate.

        Collective on ``comm``, whose ranks agree on what sources hold; without one, this rank plans alone by
        what it can see.
        """
        if isinstance(self.node, LoopRows):
            return self.node.loop
        return to_loop(self.node, None if comm is None else group_for(comm))

    def explain(self, comm: Any = None, run: bool = False, **options: Any) -> str:
        """The plan as text: as written and as it runs, what is made once or in each iteration and why, what
        moves between ranks. Collective.

        Nothing runs, unless ``run=True``: then the text has the rows, bytes and seconds of each stage, too,
        of all ranks (``options`` as for `run`).

        >>> import numpy as np
        >>> rows = Dataset.from_local(None, x=np.arange(4))
        >>> print(rows.select("x").explain())
        plan as written
          select x
          read local: x
        <BLANKLINE>
        rules applied
          drop projections of all: select x
        <BLANKLINE>
        plan as it runs
          read local: x  (4 rows, 32 B)
        """
        group = group_for(comm if comm is not None else self.comm)
        work = self.node.loop if isinstance(self.node, LoopRows) else self.node
        return enduring(group, lambda: explain(work, group, make_options(options) if run else None))

    def run(self, comm: Any = None, events: Events | None = None, **options: Any) -> Result:
        """Run it. Collective.

        On ``comm``, or on the communicator of its sources, or on this rank alone. Options are the fields of
        `iterreduce.options.Options`, such as ``naive=True``. Raises on all ranks alike, never exits.
        """
        return run(self, comm if comm is not None else self.comm, make_options(options), events)

    def collect(self, comm: Any = None) -> Batch:
        """All rows, on all ranks. Collective. For results that fit every rank."""
        group = group_for(comm if comm is not None else self.comm)
        return sure_in_the_end(lambda _: self._collect(group))

    def _collect(self, group: Group) -> Batch:
        inputs, planned = Inputs(), self
        if not isinstance(self.node, Source):
            planned = Dataset.of_loop(enduring(group, lambda: self.to_loop(group)))
        rows = inputs.everywhere("rows", planned)
        body = (Superstep("keep", (), (Replace("result", "result"),)),)
        loop = Loop(
            "collect",
            inputs.sources,
            {"result": State(rows)},
            body,
            Until((MaxIterations(1),)),
            "result",
            prepare=inputs.prepare,
        )
        return run_loop(loop, group).batch

    def to_numpy(self, comm: Any = None) -> dict[str, Any]:
        """All rows, on all ranks, as NumPy arrays by column (text as ``str`` arrays). Collective.

        A column with nulls is a masked array (`numpy.ma`).
        """
        rows = self.collect(comm)
        return {name: as_numpy(rows[name], rows.valid(name)) for name in rows.names}

    def write(self, path: str, comm: Any = None, **options: Any) -> Result:
        """Run it and write the rows to a file, whose suffix says the format. Collective."""
        comm = comm if comm is not None else self.comm
        group, result = group_for(comm), self.run(comm, **options)

        def write(made: Result) -> Result:
            write_result(group, path, made.batch, made.everywhere)
            return made

        return delivered(result, group, write)


def as_numpy(column: Any, valid: Any = None) -> Any:
    """A column as NumPy holds it; with nulls as a masked array.

    >>> as_numpy(np.arange(3), np.array([True, False, True])).tolist()
    [0, None, 2]
    """
    values = np.array(column.to_list()) if isinstance(column, Ragged) else column
    if valid is None or valid.all():
        return values
    mask = ~valid if values.ndim == 1 else np.broadcast_to(~valid[:, None], values.shape)
    return np.ma.masked_array(values, mask)


def batch_of(columns: Mapping[str, Any]) -> Batch:
    """A caller's arrays and lists as a batch; masked arrays and lists with None have nulls.

    >>> batch_of({"x": [1, None], "t": ["a", None]}).schema.describe()
    'x int64?, t text?'
    """
    made, valid = dict(columns), {}
    for name, column in columns.items():
        if isinstance(column, np.ma.MaskedArray):
            mask: Any = np.ma.getmaskarray(column)
            mask = mask if mask.ndim == 1 else mask.reshape(len(mask), -1).any(axis=1)
            made[name], valid[name] = np.ascontiguousarray(column.data), ~mask
        elif isinstance(column, list | tuple) and any(value is None for value in column):
            real = [value for value in column if value is not None]
            if not real:
                raise UsageError(f'column "{name}" has nothing but None, which has no type; give an array')
            blank = "" if isinstance(real[0], str) else b"" if isinstance(real[0], bytes) else type(real[0])()
            made[name] = [blank if value is None else value for value in column]
            valid[name] = np.array([value is not None for value in column], bool)
    return Batch.from_dict(made, valid)


def source_node(source: Any) -> Source:
    """The node of a source, with what it knows of its columns without being opened."""
    peek = getattr(source, "peek", None)
    fields = peek() if peek is not None else getattr(source, "schema", None)
    return Source(source=source, fields=None if fields is None else dict(fields), where=user_line())


class Inputs:
    """Collects the sources and prepare stages that a loop needs to have datasets under given names."""

    def __init__(self) -> None:
        self.sources: dict[str, Any] = {}
        self._stages: list[Stage] = []
        self._known: dict[int, str] = {}

    @property
    def prepare(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        return tuple(self._stages)

    def rows(self, name: str, data: Any) -> str:
        """Bind rows as they are laid out; returns the name under which the loop knows them."""
        if isinstance(data, Batch):
            self.sources[name] = data
            return name
        if not isinstance(data, Dataset):
            raise UsageError(
                f"{'state' if name.startswith('initial') else name}: wanted a Dataset (ir.read(path), "
                f"Dataset.from_local(...)) or a Batch such as ir.Batch(x=...), got {type(data).__name__}"
            )
        if isinstance(data.node, Sample) and isinstance(data.node.input, Source | LoopRows):
            return self._sampled(name, data.node)
        source = data.node.source if isinstance(data.node, Source) else data.to_loop()
        if id(source) not in self._known:
            self._known[id(source)] = name
            self.sources[name] = source
        return self._known[id(source)]

    def everywhere(self, name: str, data: Any) -> str:
        """Bind rows so that every rank has all of them."""
        if isinstance(data, Batch):
            return self.rows(name, data)
        if (
            isinstance(data, Dataset)
            and isinstance(data.node, Sample)
            and isinstance(data.node.input, Source | LoopRows)
        ):
            return self._sampled(name, data.node)
        bound = self.rows(f"{name} (spread)", data)
        self._stages.append(Gather(bound, name))
        return name

    def _sampled(self, name: str, node: Sample) -> str:
        rows = self.rows(f"{name} (sampled)", Dataset(node.input))
        self._stages += [
            Local(
                ChooseRows(node.k, node.seed, node.of, node.at_least, node.where),
                (rows,),
                f"{name} (chosen)",
                cut="share",
                rank_free=True,
            ),
            Gather(f"{name} (chosen)", name),
        ]
        return name


def make_options(given: Mapping[str, Any]) -> Options:
    """Options from keyword arguments."""
    known = Options.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UsageError(
                f'unknown option "{name}" (options: {", ".join(known)}){did_you_mean(name, known)}'
            )
    if given.get("respawn"):
        raise UsageError("respawn: new ranks are started by the command line; your communicator cannot grow")
    return replace(Options(), **given)


def explain_work(work: Dataset | Loop, comm: Any = None) -> str:
    """What `Dataset.explain` says, of a loop in nouns too. Collective."""
    return explain(work, group_for(comm)) if isinstance(work, Loop) else work.explain(comm)


def run(
    work: Dataset | Loop,
    comm: Any = None,
    options: Options | None = None,
    events: Events | None = None,
    stop: StopRequest | None = None,
) -> Result:
    """Run a dataset or a loop on a communicator (None: that of its sources, or one rank). Collective."""
    group = group_for(comm if comm is not None else getattr(work, "comm", None))
    if isinstance(work, Dataset):
        lazy = work

        def planned(anew: bool) -> Result:
            given = replace(options, fresh=True) if anew and options is not None else options
            return run_loop(enduring(group, partial(lazy.to_loop, group)), group, given, events, stop)

        return sure_in_the_end(planned)
    if not isinstance(work, Loop):
        raise UsageError(
            f"to run: wanted a Dataset or a Loop, got {type(work).__name__}; an app returns "
            "MapReduce(...)(rows), which runs once, or MapReduce(...).iterate(rows, state=...)"
        )
    return run_loop(work, group, options, events, stop)


def sure_in_the_end(work: Callable[[bool], T]) -> T:
    """``work(False)``, which plans and runs; once more, with plans that take nothing for granted, where all
    ranks found rows that are not as the first plan had it (``work(True)``: what that one saved goes), or
    where checkpoints are of such a plan.
    """
    try:
        return work(False)
    except (AssumptionError, OtherJobError) as error:
        first, anew = error, isinstance(error, AssumptionError)
        if anew and not error.agreed:
            raise
    with proven_only():
        try:
            return work(anew)
        except OtherJobError:
            raise first from None


def iterate(
    step: Callable[..., Any],
    state: Any,
    until: Any = None,
    max_iterations: int | None = 100,
    *,
    key: Any = None,
    name: str | None = None,
) -> Any:
    """Repeat ``step`` until a fixpoint: a lazy handle on the final state.

    ``state``: the rows to begin with, or several by name. ``step`` is called once, with handles that stand
    for the states of an iteration, and returns what they become; what does not depend on them is computed
    once. ``until``: a rule such as ``ir.l1("rank") <= 1e-9``, several, or a function of old and new rows;
    without one, until no state changes. ``key``: columns that tell a state's rows apart, where the plan does
    not show it; ``[]``: none do, also where the step makes one row of each key. Several states (a mapping)
    are given to ``step`` by keyword, and are returned as a mapping, as is the result.

    >>> import numpy as np
    >>> from iterreduce import col
    >>> start = Dataset.from_local(None, cell=np.arange(3), heat=np.array([3.0, 0.0, 0.0]))
    >>> half = iterate(lambda s: s.with_columns(heat=col("heat") / 2), start, max_iterations=2, key="cell")
    >>> sorted(half.collect()["heat"].tolist())
    [0.0, 0.0, 0.75]
    """
    if max_iterations is None and until is None:
        raise UsageError(f"iterate: give until=..., max_iterations=..., or both ({user_line()})")
    alone = not isinstance(state, Mapping)
    given = {"state": state} if alone else dict(state)
    if not given:
        raise UsageError(f"iterate: no state; give the rows to begin with ({user_line()})")
    comm, noted = comm_of(given.values()), list[Any]()
    nodes = {n: node_of(d, "iterate" if alone else f'iterate, state "{n}"') for n, d in given.items()}
    called = noting(step, noted)
    made = trace(called, nodes, lambda node: Dataset(node, comm), until, max_iterations, key, name, alone)
    comm = comm if comm is not None else comm_of(noted)
    found = {n: Dataset(node, comm) for n, node in states_of(made)}
    return found["state"] if alone else found


def iterate_changes(
    step: Callable[..., Any],
    state: Any,
    *,
    merge: Mapping[str, Any] | None = None,
    changes: Any = None,
    key: Any = None,
    max_iterations: int | None = None,
    name: str | None = None,
) -> Dataset:
    """Delta iteration: repeat ``step`` on the rows that changed last, until nothing changes.

    ``state``: one row per key. ``step(changes)``, or ``step(changes, state)``, proposes rows with the state's
    columns. One takes effect where it improves the row of its key by ``merge`` (column -> `MIN`, `MAX`, `ANY`
    or `ALL`), or where its key is new; such rows are the next changes. Without ``merge`` all columns are key:
    rows are added. ``changes``: the rows to begin with (unless given, those of ``state``). The work of an
    iteration follows its changes; the result is that of `iterate` over all rows (semi-naive evaluation;
    Bancilhon and Ramakrishnan, SIGMOD 1986).

    >>> import numpy as np
    >>> from iterreduce import INT64_MAX, MIN, col, min
    >>> src, dst, miles = np.array([0, 0, 1]), np.array([1, 2, 2]), np.array([1, 9, 2])
    >>> roads = Dataset.from_local(None, src=src, dst=dst, miles=miles)
    >>> towns = Dataset.from_local(None, town=np.arange(3), far=np.array([0, INT64_MAX, INT64_MAX]))
    >>> def step(near):
    ...     there = roads.join(near, src="town")
    ...     return there.group_by(town="dst").agg(far=min(col("far") + col("miles")))
    >>> home = towns.filter(col("town") == 0)
    >>> found = iterate_changes(step, towns, merge={"far": MIN}, changes=home, key="town").collect()
    >>> dict(zip(found["town"].tolist(), found["far"].tolist()))[2]
    3
    """
    what = "iterate_changes"
    first = node_of(state, what)
    keys = keys_of(key)
    if not keys:
        keys = tuple(n for n in first.names or () if n not in (merge or {}))
    checked = check_merge(merge, first, keys)
    given = first if changes is None else node_of(changes, f"{what}, changes")
    comm, noted = comm_of((state, changes)), list[Any]()
    called = noting(step, noted)
    node = trace_changes(
        called, first, given, lambda node: Dataset(node, comm), checked, keys, max_iterations, name
    )
    return Dataset(node, comm if comm is not None else comm_of(noted))


def comm_of(handles: Iterable[Any]) -> Any:
    """The communicator of the first of these that has one."""
    return next((c for c in (getattr(handle, "comm", None) for handle in handles) if c is not None), None)


def noting(step: Any, noted: list[Any]) -> Any:
    """The step; what it returns is noted, for rows of its own may lie on a communicator."""
    if not callable(step):
        return step

    @wraps(step)
    def called(*args: Any, **named: Any) -> Any:
        made = step(*args, **named)
        noted.extend(made.values() if isinstance(made, Mapping) else [made])
        return made

    return called
