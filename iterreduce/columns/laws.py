"""A trial of a user's aggregator: do the laws of a monoid hold on samples?

Not a proof, and not used by the engine: a user calls it once, in a test of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.batch import as_column, field_of
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError


def check_laws(aggregator: Aggregator, samples: Any, rtol: float = 1e-9) -> None:
    """Try the laws of a monoid on samples; see `Aggregator.define`.

    ``samples``: values of a column, an array of shape ``(n, ...)`` or a list; each triple of the first six is
    tried. Results are compared after ``finish``, floats to ``rtol`` of the larger. Raises `UsageError` with
    the law and the samples that break it.

    >>> def replace(acc, value):
    ...     acc[0] = value
    >>> def take(acc, other):
    ...     acc[0] = other[0]
    >>> check_laws(Aggregator.define("wrong", 0.0, replace, take), [1.0, 2.0])
    Traceback (most recent call last):
    iterreduce.errors.UsageError: aggregator 'wrong' breaks merge(a, zero) = a for a = 1.0: 0.0 is not 1.0
    """
    values = as_column("samples", samples)[:6]
    if not len(values):
        raise UsageError("check_laws needs at least one sample")
    trial = _Trial(aggregator, values, rtol)
    for a in range(len(values)):
        trial.same("merge(zero, a) = a", [a], trial.fold([], [a]), trial.fold([a]))
        trial.same("merge(a, zero) = a", [a], trial.fold([a], []), trial.fold([a]))
    for a, b, c in itertools.product(range(len(values)), repeat=3):
        whole = trial.fold([a, b, c])
        trial.same("fold(a, b, c) = merge(fold(a, b), fold(c))", [a, b, c], whole, trial.fold([a, b], [c]))
        left, right = trial.fold([a], [b], [c]), trial.nested(a, b, c)
        trial.same("merge(merge(a, b), c) = merge(a, merge(b, c))", [a, b, c], left, right)


class _Trial:
    """Folds samples, given by their numbers, in different ways."""

    def __init__(self, aggregator: Aggregator, values: Any, rtol: float) -> None:
        self.aggregator, self.values, self.rtol = aggregator, values, rtol
        self.bound = aggregator.bind(field_of(values))
        if self.bound.words is None:
            raise UsageError(
                f"{aggregator.name} has no accumulator record, so no merge: there is nothing to check"
            )

    def part(self, rows: Sequence[int]) -> Array:
        """The record of these samples, folded one after another."""
        record = np.empty((1, len(self.bound.identity)), np.int64)
        self.bound.fill(record, 0)
        taken = self.values[np.array(rows, np.int64)]
        self.bound.update(record, 0, np.zeros(len(rows), np.int64), taken, None)
        return record

    def join(self, left: Array, right: Array) -> Array:
        """The left record with the right one merged into it."""
        left = left.copy()
        self.bound.merge(left, 0, np.zeros(1, np.int64), right.copy(), 0)
        return left

    def fold(self, head: Sequence[int], *parts: Sequence[int]) -> Array:
        """The parts merged from the left."""
        record = self.part(head)
        for rows in parts:
            record = self.join(record, self.part(rows))
        return record

    def nested(self, a: int, b: int, c: int) -> Array:
        """``merge(a, merge(b, c))``."""
        return self.join(self.part([a]), self.join(self.part([b]), self.part([c])))

    def same(self, law: str, rows: Sequence[int], got: Array, wanted: Array) -> None:
        """Raise unless both records finish alike."""
        ours, theirs = (self.bound.finish(record, 0)[0][0] for record in (got, wanted))
        exact = np.asarray(ours).dtype.kind not in "fc"
        alike = np.array_equal(ours, theirs) if exact else self.close(ours, theirs)
        if not alike:
            names = ", ".join(f"{n} = {self.values[row]}" for n, row in zip("abc", rows, strict=False))
            raise UsageError(
                f"aggregator {self.aggregator.name!r} breaks {law} for {names}: {ours} is not {theirs}"
            )

    def close(self, ours: Any, theirs: Any) -> bool:
        """Equal up to ``rtol`` of the larger."""
        return bool(np.allclose(ours, theirs, rtol=self.rtol, atol=0.0, equal_nan=True))
