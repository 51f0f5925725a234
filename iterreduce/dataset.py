"""Dataset: a lazy handle on rows that are somewhere: in files, on the ranks, or the result of a loop.

A handle holds a node, no rows. Nothing is opened, read or run until `run` or `collect` asks, or until the
loop that it is an input of runs. Nodes are data: a source, a sample of a dataset, a loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from iterreduce.collectives import group_for
from iterreduce.columns.batch import Batch
from iterreduce.errors import UsageError, did_you_mean
from iterreduce.events import Events
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import ChooseRows, Gather, Local, Loop, Replace, Stage, State, Superstep
from iterreduce.options import Options
from iterreduce.run import Result, run_loop
from iterreduce.sources import FiniteSource, LocalSource, StackedSource, open_source
from iterreduce.stopping import StopRequest


@dataclass(frozen=True)
class SourceNode:
    """Rows that a source reads."""

    source: Any


@dataclass(frozen=True)
class SampleNode:
    """``k`` different random rows of a dataset, on all ranks."""

    of: Dataset
    k: int
    seed: int
    at_least: int = 0


@dataclass(frozen=True)
class LoopNode:
    """The result of a loop."""

    loop: Loop


class Dataset:
    """A lazy handle on rows. Make one with `iterreduce.read`, `Dataset.from_local` or a door such as
    `MapReduce`.

    >>> import numpy as np
    >>> numbers = Dataset.from_local(None, x=np.arange(5.0))
    >>> numbers.sample(5, seed=1).collect()["x"].tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """

    def __init__(self, node: SourceNode | SampleNode | LoopNode, comm: Any = None):
        self.node, self.comm = node, comm

    def __repr__(self) -> str:
        return f"Dataset({type(self.node).__name__})"

    def __bool__(self) -> bool:
        raise UsageError("a Dataset is lazy and has no truth value; use .collect() to look at its rows")

    @classmethod
    def read(cls, path: str, **options: Any) -> Dataset:
        """Rows of a file, a directory or a glob, by suffix; each rank reads its own blocks."""
        return cls(SourceNode(open_source(path, **options)))

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

        ``copy=False``: the arrays are used as they are and must not change until the run ends.
        ``save=True``: these rows cannot be made again, so a run with a checkpoint directory saves them there
        once, and a restart takes them from there; the arrays that it is given are not looked at.
        Raises `DisagreementError` when it runs if columns differ between ranks.
        """
        return cls(SourceNode(LocalSource(Batch(**columns), copy=copy, save=save)), comm)

    def sample(self, k: int, seed: int = 0, at_least: int = 0) -> Dataset:
        """``k`` different rows, chosen by ``seed``, the same on any number of ranks; in the order of the
        rows.

        A dataset of fewer than ``k`` (or ``at_least``) rows is an error when it runs.
        """
        if isinstance(k, bool) or k != int(k) or k < 1:
            raise UsageError(f"sample: wanted at least 1 row, got k={k}")
        return Dataset(SampleNode(self, int(k), int(seed), at_least), self.comm)

    def as_matrix(self, name: str = "x", keep: Sequence[str] = ()) -> Dataset:
        """Column ``name`` if there is one, else all numeric columns side by side as one of that name.

        Columns in ``keep`` (labels, weights), where there are such, stay beside the matrix.
        """
        return Dataset(SourceNode(StackedSource(self._source("as_matrix"), name, keep)), self.comm)

    def finite(self, *columns: str) -> Dataset:
        """The same rows; NaN or infinity in one of these columns is an error that names the row."""
        return Dataset(SourceNode(FiniteSource(self._source("finite"), columns)), self.comm)

    def as_edges(self, columns: Sequence[str] = (), header: bool | None = None) -> Dataset:
        """The rows as edges ``src``, ``dst``, ``weight``: lines of text are read as an edge list.

        ``columns``: which columns of a table are the ends of an edge (and its weight), if they have other
        names; ``header``: whether a .tsv begins with one, if its first line does not tell.
        """
        from iterreduce.sources.edges import edges_of  # late: who reads no edges pays for no parser

        return Dataset(SourceNode(edges_of(self._source("as_edges"), columns, header)), self.comm)

    @classmethod
    def of_loop(cls, loop: Loop, comm: Any = None) -> Dataset:
        """A lazy handle on the result of a loop written in the nouns of `iterreduce.loop`."""
        return cls(LoopNode(loop), comm)

    def _source(self, what: str) -> Any:
        if not isinstance(self.node, SourceNode):
            raise UsageError(f"{what}: wanted rows of a file or of memory, got {self!r}")
        return self.node.source

    def as_source(self) -> Any:
        """What a loop's ``sources`` and feeds hold of this handle: a source, or a loop whose result it is."""
        return self.node.source if isinstance(self.node, SourceNode) else self.to_loop()

    @property
    def described(self) -> str:
        """Where the rows come from, for messages."""
        return (
            str(getattr(self.node.source, "name", "rows"))
            if isinstance(self.node, SourceNode)
            else repr(self)
        )

    def to_loop(self) -> Loop:
        """The loop that this handle stands for: one that runs once, if it is no loop."""
        if isinstance(self.node, LoopNode):
            return self.node.loop
        inputs = Inputs()
        rows = inputs.rows("rows", self)
        return Loop(
            "collect",
            inputs.sources,
            {"result": State(rows)},
            (Superstep("keep", (), (Replace("result", "result"),)),),
            Until((MaxIterations(1),)),
            "result",
            prepare=inputs.prepare,
        )

    def run(self, comm: Any = None, events: Events | None = None, **options: Any) -> Result:
        """Run it. Collective.

        On ``comm``, or on the communicator of its sources, or on this rank alone. Options are the fields of
        `iterreduce.options.Options`, such as ``naive=True``. Raises on all ranks alike, never exits.
        """
        return run(self, comm if comm is not None else self.comm, make_options(options), events)

    def collect(self, comm: Any = None) -> Batch:
        """All rows, on all ranks. Collective. For results that fit every rank."""
        inputs = Inputs()
        rows = inputs.everywhere("rows", self)
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
        return run_loop(loop, group_for(comm if comm is not None else self.comm)).batch


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
        if isinstance(data.node, SampleNode):
            return self._sampled(name, data.node)
        source = data.node.loop if isinstance(data.node, LoopNode) else data.node.source
        if id(source) not in self._known:
            self._known[id(source)] = name
            self.sources[name] = source
        return self._known[id(source)]

    def everywhere(self, name: str, data: Any) -> str:
        """Bind rows so that every rank has all of them."""
        if isinstance(data, Batch):
            return self.rows(name, data)
        if isinstance(data, Dataset) and isinstance(data.node, SampleNode):
            return self._sampled(name, data.node)
        bound = self.rows(f"{name} (spread)", data)
        self._stages.append(Gather(bound, name))
        return name

    def _sampled(self, name: str, node: SampleNode) -> str:
        rows = self.rows(f"{name} (sampled)", node.of)
        self._stages += [
            Local(
                ChooseRows(node.k, node.seed, node.of.described, node.at_least),
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
    return replace(Options(), **given)


def run(
    work: Dataset | Loop,
    comm: Any = None,
    options: Options | None = None,
    events: Events | None = None,
    stop: StopRequest | None = None,
) -> Result:
    """Run a dataset or a loop on a communicator (None: that of its sources, or one rank). Collective."""
    if isinstance(work, Dataset):
        comm = comm if comm is not None else work.comm
        work = work.to_loop()
    elif not isinstance(work, Loop):
        raise UsageError(
            f"to run: wanted a Dataset or a Loop, got {type(work).__name__}; an app returns "
            "MapReduce(...)(rows), which runs once, or MapReduce(...).iterate(rows, state=...)"
        )
    return run_loop(work, group_for(comm), options, events, stop)
