"""Lanes: what is folded for the outputs of a shuffle of indexed rows, one or two columns of words each.

Most outputs have one word. A float sum that must not depend on any order has two: its addends are rounded to
a grid that all ranks agree on, and what is left to a finer one, and both are summed as integers (as in Demmel
and Nguyen, "Parallel Reproducible Summation", IEEE Trans. Comput. 64, 2015, with two bins). With n addends
per key at most, W = min(50, 62 - ceil(log2 n)) bits and all addends below 2^e, a sum is off by at most
n 2^(e - 2W - 1) and two roundings. Both make one lane: they lie beside each other, and one walk over the rows
adds them. Where some addend is not finite, two more lanes tell which sums that
spoils.

Nothing here communicates; the grid is agreed by `iterreduce.linkshuffle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from iterreduce.columns.linkfold import joined, sign_function, size_function, tame_function
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field
from iterreduce.linkprogram import Bound, identity_of

INT64 = np.dtype(np.int64)
PAIR, FLOAT = Field("fixed", INT64, (2,)), Field("fixed", np.dtype(np.float64))
New = Callable[[int, Field], Array]
"""Memory for so many rows of a column."""
LEAST_EXPONENT = -1073  # of the least float64
LARGE_EXPONENT, LARGE_SCALE = 960, 2.0**-64
SMALL_EXPONENT, SMALL_SCALE = -400, 2.0**600
MOST_BITS = 50  # of a limb: a float64 that rounds to it has two more


@dataclass(frozen=True)
class Lane:
    """A fold over rows: how, of what, from which values of the joined table and columns of the rows."""

    combine: str
    word: np.dtype[np.generic]
    function: object
    states: Sequence[Array]
    columns: tuple[str, ...]
    grid: tuple[float, float] | None = None

    @property
    def words(self) -> int:
        """How many it holds for each target."""
        return 1 if self.grid is None else 2

    @property
    def field(self) -> Field:
        """What it holds, as a column."""
        return Field("fixed", self.word) if self.grid is None else PAIR

    def of(self, out: Array) -> list[Array]:
        """The columns of words of what was folded."""
        return [out] if self.grid is None else [out[:, 0], out[:, 1]]

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
    def words(self) -> int:
        """How many words a sum has."""
        return (4 if self.special else 2) if self.floats else 1

    @property
    def scale(self) -> float:
        """What values are multiplied by, lest the grid's numbers be infinite or too small."""
        if self.exponent > LARGE_EXPONENT:
            return LARGE_SCALE
        return SMALL_SCALE if self.exponent < SMALL_EXPONENT else 1.0

    @property
    def units(self) -> tuple[float, float]:
        """What the two integers of a sum count, of scaled values."""
        unit = math.ldexp(self.scale, self.exponent - self.bits)
        return unit, math.ldexp(unit, -self.bits)

    @property
    def lines(self) -> tuple[float, float]:
        """The two numbers that round scaled values; see `iterreduce.columns.grids`."""
        unit, fine = self.units
        return 1.5 * 2.0**52 * unit, 1.5 * 2.0**52 * fine


def exponent_of(largest: float) -> int:
    """The least e with ``largest < 2**e``; of nothing, the least there is.

    >>> exponent_of(1.0), exponent_of(0.75), exponent_of(0.0)
    (1, 0, -1073)
    """
    return max(LEAST_EXPONENT, math.frexp(largest)[1]) if largest else LEAST_EXPONENT


def bits_for(addends: int) -> int:
    """Bits of a limb so that this many of them add up within 63.

    >>> bits_for(1), bits_for(1 << 20)
    (50, 42)
    """
    return min(MOST_BITS, 62 - max(1, addends - 1).bit_length())


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


def exact(bound: Bound, values: Mapping[str, Array], grid: Grid) -> list[Lane]:
    """The lanes of an order-free sum."""
    output, states, function = bound.output, states_of(bound, values), bound.function
    if grid.special or grid.scale != 1.0:
        function = tame_function(function, grid.scale)
    made = [Lane("sum", INT64, function, states, output.columns, grid.lines)]
    if grid.special:
        for negative in (False, True):
            sign = sign_function(bound.function, negative)
            made.append(Lane("max", INT64, sign, states, output.columns))
    return made


def finished(words: Sequence[Array], grid: Grid, new: New) -> Array:
    """The sums that the words of one output stand for."""
    out = joined(words[0], words[1], *grid.units, 1.0 / grid.scale, new(len(words[0]), FLOAT))
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
