"""A loop whose results do not depend on the number of ranks: the same nouns, with order-free arithmetic.

A loop is data, so ``--reproducible`` is a rewrite of it, before it runs: aggregators of floats become their
order-free twins (`iterreduce.columns.exact`), so do distances; totals without keys become exact, and what
cannot be made free of the ranks is refused where it stands. Two things are left to the engine: a map with
``cut="block"`` sees one canonical block at a time, and rows given to ``from_local`` move over rank borders
to make such blocks.

What it cannot see is what a function does with a whole share: ``cut="share"`` on rows that lie by block must
be declared ``rank_free``. Nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.batch import Batch
from iterreduce.columns.binned import LIMBS
from iterreduce.columns.binned_alone import sum_alone, sum_changes
from iterreduce.columns.binned_records import finish_binned, merge_binned
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError
from iterreduce.fixpoint import Distance, Until
from iterreduce.loop import Carry, Loop, Superstep
from iterreduce.stages import Local, Reduce, Shuffle, Stage, Total, aggregators_of

ORDERED = frozenset({"sum", "mean", "var", "min", "max", "user"})
"""The aggregators that depend on the order of rows, for some columns."""
LOW_HALF = (1 << 32) - 1


def reproducible(loop: Loop) -> Loop:
    """The loop with order-free aggregators, totals and distances; inner loops too.

    >>> from iterreduce.columns.aggregators import SUM
    >>> order_free({"x": SUM, "n": SUM.of("y")})["x"].adds
    'order-free'
    """
    for name, carry in loop.carry.items():
        _check_carry(name, carry)
    return replace(
        loop,
        prepare=tuple(map(_stage, loop.prepare)),
        body=tuple(reproducible(s) if isinstance(s, Loop) else _superstep(s) for s in loop.body),
        finish=tuple(map(_stage, loop.finish)),
        until=_until(loop.until),
    )


def _check_carry(name: str, carry: Carry) -> None:
    if carry.aggregator.kind == "sum" and carry.dtype == "float64":
        raise UsageError(
            f'the carry "{name}" adds floats in the order of the ranks, so a reproducible run cannot have '
            "it; add them in a Total and keep the number in a state"
        )


def _superstep(step: Superstep) -> Superstep:
    return replace(step, stages=tuple(map(_stage, step.stages)))


def _stage(stage: Stage) -> Stage:
    if isinstance(stage, Total):
        return replace(stage, aggregators=order_free(stage.aggregators, alone=not stage.key))
    if isinstance(stage, Shuffle) and stage.combine is not None:
        _check_onto(stage)
        return replace(stage, combine=order_free(stage.combine))
    if isinstance(stage, Local) and hasattr(stage.function, "order_free"):  # a kernel that aggregates
        return replace(stage, function=stage.function.order_free(order_free))
    return stage


def _check_onto(stage: Shuffle) -> None:
    """Whole rows of a key, which a float monoid of the user's needs, cannot be folded onto a table."""
    for aggregator in aggregators_of(stage.combine):
        defined = aggregator.definition
        if stage.onto and defined is not None and defined.dtype == "float64":
            raise UsageError(
                f'the aggregator {aggregator.name} into "{stage.into}" adds floats in its own way, so a '
                "reproducible run folds whole rows, which cannot be done onto a table: shuffle without onto"
            )


def order_free(reduce: Reduce, alone: bool = False) -> Reduce:
    """The aggregators with results that no order of rows changes; ``alone``: there are no keys."""
    if isinstance(reduce, Mapping):
        return {name: _free(aggregator, alone) for name, aggregator in reduce.items()}
    return _free(reduce, alone)


def _free(aggregator: Aggregator, alone: bool) -> Aggregator:
    return aggregator.order_free(alone) if aggregator.kind in ORDERED else aggregator


def _until(until: Until) -> Until:
    return Until(tuple(without_order(r) if isinstance(r, Distance) else r for r in until.rules))


@dataclass(frozen=True)
class OrderFreeDistance(Distance):
    """A distance whose partials are order-free sums: three words, each as two numbers that a float64 holds.

    So the distance, and the iteration in which the fixpoint is reached, are the same on any number of ranks.

    >>> rule = without_order(Distance(("x",), 1e-3))
    >>> old, new = Batch(x=np.zeros(3)), Batch(x=np.array([1.0, 2.0**-53, 2.0**-53]))
    >>> rule.fold_ranks([rule.partial(old.slice(i, i + 1), new.slice(i, i + 1)) for i in range(3)])
    1.0000000000000002
    """

    width: int = 1 + 2 * LIMBS

    def partial(self, old: Batch, new: Batch) -> Any:
        """(low half of the first word, rows, its high half, halves of the other words)."""
        record, plain = np.zeros((1, LIMBS), np.int64), self._plain_columns(old, new)
        if plain is not None and self.per_row == "l1" and sum_changes(record, *plain):
            return self._halves(record, len(new))
        rows = self._rows(old, new)
        if not callable(self.per_row) and np.isnan(rows).any():
            rows = self._rows(old, new, equal_is_zero=True)
        with np.errstate(over="ignore", under="ignore"):
            sizes = rows * rows if self.per_row == "l2" else rows
        record = np.zeros((1, LIMBS), np.int64)
        sum_alone(record, 0, sizes)
        return self._halves(record, len(rows))

    @staticmethod
    def _halves(record: Array, rows: int) -> tuple[float, ...]:
        halves = [float(half) for word in record[0].tolist() for half in (word & LOW_HALF, word >> 32)]
        return halves[0], float(rows), *halves[1:]

    def fold_ranks(self, partials: Any) -> float:
        """The distance, from the words of each rank."""
        rows = sum(p[1] for p in partials)
        halves = np.delete(np.asarray(partials, np.float64), 1, axis=1).astype(np.int64)
        records = np.ascontiguousarray(halves[:, ::2] | halves[:, 1::2] << 32)
        total, found = np.zeros((1, LIMBS), np.int64), np.empty((1, 1))
        merge_binned(total, 0, np.zeros(len(records), np.int64), records, 0, 1)
        finish_binned(total, 0, found)
        value = float(found[0, 0])
        value = value / max(rows, 1.0) if self.fold == "mean" else value
        return math.sqrt(value) if self.per_row == "l2" else value


def without_order(rule: Distance) -> Distance:
    """The rule with order-free sums; a largest value has no order to be free of."""
    if rule.fold == "max" or isinstance(rule, OrderFreeDistance):
        return rule
    given = {f.name: getattr(rule, f.name) for f in fields(Distance) if f.name != "width"}
    return OrderFreeDistance(**given)
