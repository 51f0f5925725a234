"""The first door: MapReduce on batches, one-shot or iterated. It lowers to the nouns of `iterreduce.loop`.

    map      rows (and the state) -> rows with the key columns
    combine  an aggregator, applied before rows are sent and again at the owner
    reduce   an aggregator (then it is the combiner too), or a function of `Groups`
    key      the column, or columns, by which rows meet

What it is not: it knows no ranks and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from iterreduce.columns.aggregators import SUM, Aggregator
from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import Groups, group_rows
from iterreduce.dataset import Dataset, Inputs
from iterreduce.errors import UsageError
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import (
    BUILTINS,
    Context,
    Local,
    Loop,
    Reduce,
    Replace,
    Shuffle,
    Stage,
    State,
    Superstep,
    Total,
    check_arguments,
    check_reduce,
    keys_of,
)
from iterreduce.maps import call
from iterreduce.plan.nodes import LoopRows

Map = Callable[..., Batch]


@dataclass(frozen=True)
class ReduceGroups:
    """A kernel: the user's reduce function over rows that stand together by key."""

    function: Callable[[Groups], Batch]
    key: tuple[str, ...]

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", "reduce")

    def run(self, context: Context, *batches: Batch) -> Batch:
        """The reduced rows of this share."""
        return call(self.function, context, [group_rows(batches[0], self.key)])  # type: ignore[list-item]


@dataclass(frozen=True)
class MapReduce:
    """A map, a reduction by key, and a combiner.

    ``map`` takes and returns a `Batch` (some blocks of rows at a time); None passes rows on as they are.
    ``reduce`` is an aggregator (``ir.SUM`` for all value columns, or a mapping of output columns such as
    ``{"n": ir.count(), "total": ir.sum("x")}``), or a function ``reduce(groups: ir.Groups) -> ir.Batch``.
    ``rank_free``: what the map makes of a row does not depend, to the last bit, on the rows beside it; a
    reproducible run then hands it as many blocks at a time as any other (see `Local`).

    >>> import numpy as np
    >>> rows = Dataset.from_local(None, word=np.array([3, 5, 3]), n=np.array([1, 1, 1]))
    >>> counts = MapReduce(reduce=SUM, key="word")(rows).collect()
    >>> dict(zip(counts["word"].tolist(), counts["n"].tolist()))[3]
    2
    """

    map: Map | None = None
    reduce: Reduce | Callable[[Groups], Batch] = SUM
    key: Any = None
    combine: Reduce | None = None
    rank_free: bool = False

    def __post_init__(self) -> None:
        if self.map is not None and not callable(self.map):
            raise UsageError(f"map: wanted a function of a Batch, got {type(self.map).__name__}")
        reduce: Any = self.reduce
        if getattr(reduce, "__module__", "") == "builtins" and reduce.__name__ in BUILTINS:
            raise UsageError(f"reduce: got Python's {reduce.__name__}; write ir.{BUILTINS[reduce.__name__]}")
        if isinstance(reduce, Mapping):
            check_reduce("reduce", reduce)
        if not isinstance(self.reduce, (Aggregator, Mapping)) and not callable(self.reduce):
            raise UsageError(
                "reduce: wanted an aggregator such as ir.SUM, a mapping of them, or a function of "
                f"Groups, got {type(self.reduce).__name__}"
            )
        if callable(self.reduce):
            check_arguments(self.reduce, ("groups",), "reduce")
        if self.combine is not None:
            check_reduce("combine", self.combine)
        keys_of(self.key)

    @property
    def _by_function(self) -> bool:
        return not isinstance(self.reduce, (Aggregator, Mapping))

    @property
    def _combiner(self) -> Reduce | None:
        if self.combine is not None or self._by_function:
            return self.combine
        assert isinstance(self.reduce, (Aggregator, Mapping))
        return self.reduce

    def _mapped(self, reads: tuple[str, ...], into: str) -> list[Stage]:
        return [] if self.map is None else [Local(self.map, reads, into, rank_free=self.rank_free)]

    def _reduced(self, rows: str, into: str, onto: str | None = None) -> list[Stage]:
        keys = self._keys()
        shuffled = f"{into} (by key)" if self._by_function else into
        stages: list[Stage] = [Shuffle(rows, keys, shuffled, self._combiner, onto)]
        if self._by_function:
            stages.append(Local(ReduceGroups(self.reduce, keys), (shuffled,), into, cut="share"))  # type: ignore[arg-type]
        return stages

    def _keys(self) -> tuple[str, ...]:
        keys = keys_of(self.key)
        if not keys:
            raise UsageError('key: name the column by which rows meet, such as key="word"')
        return keys

    def __call__(self, rows: Dataset) -> Dataset:
        """Run once over ``rows``: a lazy handle on the reduced rows, partitioned by key."""
        inputs = Inputs()
        source = inputs.rows("rows", rows)
        stages = self._mapped((source,), "mapped")
        stages += self._reduced("mapped" if self.map else source, "reduced")
        once = Until((MaxIterations(1),))
        return self._handle("mapreduce", rows, inputs, State(""), (*stages,), (), once)

    def iterate(
        self,
        rows: Dataset | None = None,
        *,
        state: Any,
        state_key: Any = None,
        update: Callable[..., Batch] | None = None,
        until: Any = None,
        max_iterations: int | None = 100,
        score: Callable[..., Batch] | None = None,
        values: Reduce = SUM,
        name: str = "mapreduce",
    ) -> Dataset:
        """Repeat until a fixpoint: a lazy handle on the final state.

        State everywhere (``state_key=None``): each iteration maps ``map(rows, state)``, reduces by key over
        all ranks, and takes ``update(reduced, state)`` as the new state (without ``update``: the reduced
        rows). State by key: ``map(state)`` makes the rows (``rows`` is None), they are reduced at the owner
        of their key, one row for each row of the state and in its order, and ``update(reduced, state)`` runs
        on each rank's share. ``until``: a rule such as ``ir.l2("x") <= 1e-4``, several, or a function of old
        and new state; without one, until nothing changes. ``score(rows, state)`` runs once at the end; its
        columns, aggregated by ``values``, are the numbers of the run's summary.
        """
        if max_iterations is None and until is None:
            raise UsageError("iterate: give until=..., max_iterations=..., or both")
        inputs = Inputs()
        keys = keys_of(state_key)
        build = self._keyed if keys else self._everywhere
        source, initial, stages = build(inputs, rows, state, update)
        rules = Until.of(until, max_iterations).on("state")
        finish: tuple[Stage, ...] = ()
        if score is not None:
            reads = (source, "state") if rows is not None else ("state",)
            finish = (Local(score, reads, "scored"), Total("scored", (), values, "values"))
        handle = rows if rows is not None else state
        start = State(initial, keys)
        return self._handle(name, handle, inputs, start, (*stages,), finish, rules, values if score else None)

    def _everywhere(self, inputs: Inputs, rows: Any, state: Any, update: Any) -> tuple[str, str, list[Stage]]:
        if self._by_function:
            raise UsageError(
                "iterate: a state that is the same on all ranks needs an aggregator as reduce (a function "
                "of Groups runs on one rank); give state_key=..., or an aggregator"
            )
        if rows is None:
            raise UsageError(
                "iterate: rows are needed (map(rows, state)) unless the state is partitioned by state_key"
            )
        source, initial = inputs.rows("rows", rows), inputs.everywhere("initial", state)
        mapped = self._mapped((source, "state"), "mapped")
        combiner = self._combiner
        assert combiner is not None
        stages = [*mapped, Total("mapped" if mapped else source, keys_of(self.key), combiner, "reduced")]
        return source, initial, stages + _updated(update)

    def _keyed(self, inputs: Inputs, rows: Any, state: Any, update: Any) -> tuple[str, str, list[Stage]]:
        if rows is not None:
            raise UsageError(
                "iterate: with state_key the map reads the state alone; give rows=None, or write the join "
                "as a Loop"
            )
        initial = inputs.rows("initial", state)
        stages = [
            *self._mapped(("state",), "mapped"),
            *self._reduced("mapped" if self.map else "state", "reduced", onto="state"),
        ]
        return initial, initial, stages + _updated(update)

    def _handle(
        self,
        name: str,
        like: Any,
        inputs: Inputs,
        start: State,
        stages: tuple[Stage, ...],
        finish: tuple[Stage, ...],
        until: Until,
        values: Reduce | None = None,
    ) -> Dataset:
        body = (Superstep(name, stages, (Replace("state", stages[-1].into),)),)
        named = {n: ("values", n) for n in values} if isinstance(values, Mapping) else {}
        loop = Loop(
            name, inputs.sources, {"state": start}, body, until, "state", inputs.prepare, finish, named
        )
        return Dataset(LoopRows(loop=loop), like.comm if isinstance(like, Dataset) else None)


def _updated(update: Callable[..., Batch] | None) -> list[Stage]:
    return [] if update is None else [Local(update, ("reduced", "state"), "updated", cut="share")]
