"""Lanes: what is folded for the outputs of a shuffle of indexed rows, one array of words each.

Most outputs have one lane. A float sum that must not depend on any order has two: its addends are rounded to
a grid that all ranks agree on, and what is left to a finer one, and both are summed as integers (as in Demmel
and Nguyen, "Parallel Reproducible Summation", IEEE Trans. Comput. 64, 2015, with two bins). With n addends
per key at most, W = 62 - ceil(log2 n) bits and all addends below 2^e, a sum is off by at most
n 2^(e - 2W - 1) and two roundings. Where some addend is not finite, two more lanes tell which sums that
spoils.

Nothing here communicates; the grid is agreed by `iterreduce.linkshuffle`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from iterreduce.columns.linkfold import joined, limb_function, limbs, sign_function, size_function
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError
from iterreduce.linkprogram import MOST_VALUES, Bound, identity_of

INT64 = np.dtype(np.int64)
LEAST_EXPONENT = -1000


@dataclass(frozen=True)
class Lane:
    """A fold over rows: how, of what, from which values of the joined table and columns of the rows."""

    combine: str
    word: np.dtype[np.generic]
    function: object
    states: Sequence[Array]
    columns: tuple[str, ...]

    @property
    def identity(self) -> float | int:
        """What no row gives."""
        return identity_of(self.combine, self.word)


@dataclass(frozen=True)
class Grid:
    """Agreed by all ranks: addends are below ``2**exponent``; ``special``: some are not finite."""

    exponent: int
    special: bool
    bits: int
    floats: bool = True  # False: the values turned out to be integers, which need none

    @property
    def lanes(self) -> int:
        """How many lanes a sum has."""
        return (4 if self.special else 2) if self.floats else 1

    @property
    def lines(self) -> float:
        """Of the coarse grid, per unit."""
        return math.ldexp(1.0, self.bits - self.exponent)


def exponent_of(largest: float) -> int:
    """The least e with ``largest < 2**e``; of nothing, the least there is.

    >>> exponent_of(1.0), exponent_of(0.75), exponent_of(0.0)
    (1, 0, -1000)
    """
    return max(LEAST_EXPONENT, math.frexp(largest)[1]) if largest else LEAST_EXPONENT


def bits_for(addends: int) -> int:
    """Bits of a limb so that this many of them add up within 63."""
    return 62 - max(1, addends - 1).bit_length()


def is_exact(bound: Bound) -> bool:
    """Is it a float sum that no order may change?"""
    return bound.output.order_free and bound.output.combine == "sum" and bound.word.kind == "f"


def reads_state_alone(bound: Bound) -> bool:
    """Is an addend one value of the joined table as it is?"""
    return bool(bound.function == "x") and len(bound.output.parts) == 1 and not bound.output.columns


def states_of(bound: Bound, values: Mapping[str, Array]) -> list[Array]:
    """The values of the joined table that an output takes."""
    return [values[part] for part in bound.output.parts]


def plain(bound: Bound, values: Mapping[str, Array]) -> list[Lane]:
    """The one lane of an output that is folded as it comes."""
    output = bound.output
    return [Lane(output.combine, bound.word, bound.function, states_of(bound, values), output.columns)]


def sizes(bound: Bound, values: Mapping[str, Array], finite: bool) -> Lane:
    """The largest absolute value of any addend."""
    function = size_function(bound.function, finite)
    return Lane("max", np.dtype(np.float64), function, states_of(bound, values), bound.output.columns)


def exact(bound: Bound, values: Mapping[str, Array], grid: Grid, rows: int) -> list[Lane]:
    """The lanes of an order-free sum; ``rows`` of the joined table."""
    output, states = bound.output, states_of(bound, values)
    made = []
    if reads_state_alone(bound):
        for limb in limbs(states[0], grid.lines, grid.bits):
            made.append(Lane("sum", INT64, "x", [limb], ()))
    else:
        if len(states) == MOST_VALUES:
            raise UsageError(
                f'output "{output.name}" takes {MOST_VALUES} values of the joined table: an order-free sum '
                f"takes at most {MOST_VALUES - 1}; compute some beforehand"
            )
        lines = np.full(rows, grid.lines)
        for low in (False, True):
            function = limb_function(bound.function, low, grid.bits)
            made.append(Lane("sum", INT64, function, [lines, *states], output.columns))
    if grid.special:
        for negative in (False, True):
            function = sign_function(bound.function, negative)
            made.append(Lane("max", INT64, function, states, output.columns))
    return made


def finished(words: Sequence[Array], grid: Grid) -> Array:
    """The sums that the lanes of one output stand for."""
    out = joined(words[0], words[1], grid.lines, grid.bits)
    if grid.special:
        positive, negative = words[2] > 0, words[3] > 0
        out[positive], out[negative] = np.inf, -np.inf
        out[positive & negative] = np.nan
    return out


def by_slot(values: Array, slots: Array) -> Array:
    """Values of rows in the order of their slots; rows without one are left out."""
    known = slots >= 0
    out = np.empty(int(known.sum()), values.dtype)
    out[slots[known]] = values[known]
    return out


def at_slots(words: Array, slots: Array, identity: float | int) -> Array:
    """The words at some slots; the identity for slot -1, which is nobody's."""
    out = np.full(len(slots), identity, words.dtype)
    known = slots >= 0
    out[known] = words[slots[known]]
    return out
