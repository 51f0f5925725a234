"""How ranks agree on the grids of order-free sums of indexed rows, and one fold of them.

The largest addend decides a grid (see `iterreduce.linklanes`); one small reduction tells all ranks the
largest of any. It is made in every iteration of a stage that has such a sum, whatever happened on a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iterreduce.agreement import Guard
from iterreduce.columns.linkfold import largest_of
from iterreduce.columns.links import Links
from iterreduce.columns.ragged import Array
from iterreduce.columns.threads import current
from iterreduce.group import Group
from iterreduce.linklanes import (
    LEAST_EXPONENT,
    Grid,
    Lane,
    New,
    bits_for,
    exact,
    exponent_of,
    finished,
    is_exact,
    plain,
    reads_state_alone,
    sizes,
)
from iterreduce.linkprogram import Bound, Program, Shape


class Grids:
    """The grids of one stage: ``of[i]`` for output ``i``; ``addends``: the most rows of a key here."""

    def __init__(self, group: Group, shape: Shape, addends: int):
        self.group, self.shape, self._addends = group, shape, addends
        self.of: list[Grid] = []
        self._bits: int | None = None
        self._words_of: list[int] = []

    def words(self) -> int:
        """How many words travel for a place: known to all ranks alike."""
        if not self.of:
            return len(self.shape.outputs)
        sums = [o.order_free and o.kind == "sum" for o in self.shape.outputs]
        return sum(grid.words if exact else 1 for grid, exact in zip(self.of, sums, strict=True))

    def agree(
        self,
        guard: Guard,
        program: Any,
        links: Any,
        frontier: Array | None,
        values: Mapping[str, Array],
        own: Mapping[str, Array] | None = None,
    ) -> None:
        """The grid of every order-free sum, from the largest addend of any rank. Collective.

        ``values``: those that the rows take, by slot; ``own``: of this rank's keys, nothing else among them.
        Without it they are the first of the values, those that a row starts from: an infinite value that goes
        nowhere would double what travels.
        """
        if self._bits is None:
            self._bits = bits_for(self.group.agree_max(self._addends))
        if own is None:
            own = {n: v[: links.n_sources] if frontier is None else v for n, v in values.items()}
        said = np.full((len(self.shape.outputs), 3), (LEAST_EXPONENT, 0, 0), np.int64)
        guard.run(measure, said, program, links, frontier, values, own)
        self.group.allreduce(said.reshape(-1), "max")
        self.of = [Grid(int(e), bool(special), self._bits, bool(some)) for e, special, some in said]

    def lanes(self, program: Program, values: Mapping[str, Array]) -> list[Lane]:
        """What is folded for all outputs; grids are agreed, if any is needed."""
        made = [
            exact(bound, values, self.of[i]) if is_exact(bound) else plain(bound, values)
            for i, bound in enumerate(program.outputs)
        ]
        self._words_of = [sum(lane.words for lane in lanes) for lanes in made]
        return [lane for lanes in made for lane in lanes]

    def outputs(self, words: Sequence[Array], new: New) -> list[Array]:
        """One column for each output, from the columns of words of its lanes."""
        out, at = [], 0
        for i, n in enumerate(self._words_of):
            mine, at = words[at : at + n], at + n
            out.append(mine[0] if n == 1 else finished(mine, self.of[i], new))
        return out


def measure(
    said: Array,
    program: Program,
    links: Links,
    frontier: Array | None,
    values: Mapping[str, Array],
    own: Mapping[str, Array],
) -> None:
    """What this rank says of each output: exponent, whether an addend is not finite, whether it is a sum of
    floats at all.
    """
    for i, bound in enumerate(program.outputs):
        if is_exact(bound):
            if reads_state_alone(bound):
                largest, special = largest_of(own[bound.output.parts[0]])
            else:
                largest, special = _largest(bound, links, frontier, values)
            said[i] = exponent_of(largest), int(special), 1


def _largest(
    bound: Bound, links: Links, frontier: Array | None, values: Mapping[str, Array]
) -> tuple[float, bool]:
    """The largest finite addend on this rank, and whether one is not finite."""
    largest = _over_rows(bound, links, frontier, values, finite=False)
    if math.isfinite(largest):
        return largest, False
    return _over_rows(bound, links, frontier, values, finite=True), True


def _over_rows(
    bound: Bound, links: Links, frontier: Array | None, values: Mapping[str, Array], finite: bool
) -> float:
    out = np.full(links.n_targets, -np.inf)
    reached = walk(links, sizes(bound, values, finite), frontier, out)
    return float((out if frontier is None else out[reached]).max(initial=0.0))


def walk(links: Links, lane: Lane, frontier: Array | None, out: Array) -> Array:
    """Fold one lane over all rows, or over those that start from the frontier; what was reached."""
    given: Any = (lane.combine, lane.states, out, lane.function, lane.columns)
    if frontier is None:
        return links.dense(*given, grid=lane.grid, pool=current())
    return links.sparse(given[0], frontier, *given[1:], aligned=True, grid=lane.grid, pool=current())
