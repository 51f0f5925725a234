"""From an expression to a compiled function of one row, and folds of what arrives from other ranks.

`edge_function` turns a tree into a scalar function that the loops of `iterreduce.columns.link_kernels`
inline. A tree of one operation on two columns has a ready-made function; any other is composed of small ones,
operation by operation.

Arithmetic follows NumPy but for its types: integers are 64 bits wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import numpy as np

from iterreduce.columns.binned_alone import largest_bits
from iterreduce.columns.expressions import Apply, Column, Constant, Expr, key_of
from iterreduce.columns.jit import kernel
from iterreduce.columns.link_kernels import COMBINES, EDGE_FUNCTIONS
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError

INFINITY = 0x7FF << 52


@kernel
def _over_zero(a: Any) -> Any:
    """What IEEE 754 gives for a / 0."""
    if a > 0:
        return np.inf
    return -np.inf if a < 0 else np.nan


READY = {
    "multiply": "x*w",
    "add": "x+w",
    "subtract": "x-w",
    "minimum": "min(x,w)",
    "maximum": "max(x,w)",
}

SCALAR: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: np.float64(a) / np.float64(b) if b != 0 else _over_zero(a),
    "floor_divide": lambda a, b: a // b if b != 0 else a * 0,
    "remainder": lambda a, b: a % b if b != 0 else a * 0,
    "power": lambda a, b: a**b,
    "negative": lambda a: -a,
    "absolute": lambda a: abs(a),
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "exp": lambda a: math.exp(a),
    "log": lambda a: math.log(a) if a > 0 else (-math.inf if a == 0 else math.nan),
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "greater": lambda a, b: a > b,
    "greater_equal": lambda a, b: a >= b,
    "equal": lambda a, b: a == b,
    "not_equal": lambda a, b: a != b,
    "and": lambda a, b: (a != 0) & (b != 0),
    "or": lambda a, b: (a != 0) | (b != 0),
    "not": lambda a: a == 0,
    "where": lambda c, a, b: a if c else b,
    "minimum": lambda a, b: b if (b < a) | (b != b) else a,
    "maximum": lambda a, b: b if (b > a) | (b != b) else a,
}


def edge_function(tree: Expr, arguments: Sequence[str]) -> Any:
    """A name that `iterreduce.columns.links.Links` knows, or a compiled function of these columns, in order.

    >>> from iterreduce.columns.expressions import col
    >>> edge_function(col("d") + col("w"), ("d", "w")), edge_function(col("w") * 2 + 1, ("w",))(3)
    ('x+w', 7)
    """
    if isinstance(tree, Column) and tuple(arguments) == (tree.name,):
        return "x"
    if isinstance(tree, Apply) and tree.operation in READY and len(arguments) == 2:
        both = tuple(a.name for a in tree.arguments if isinstance(a, Column))
        if both == tuple(arguments):
            return READY[tree.operation]
    return _composed(tree, tuple(arguments))


_COMPOSED: dict[Hashable, Any] = {}


def _composed(tree: Expr, arguments: tuple[str, ...]) -> Any:
    key = (key_of(tree), arguments)
    if key not in _COMPOSED:
        _COMPOSED[key] = _compose(tree, arguments)
    return _COMPOSED[key]


def _compose(tree: Expr, arguments: tuple[str, ...]) -> Any:
    if isinstance(tree, Column):
        return _leaf(arguments.index(tree.name))
    if isinstance(tree, Constant):
        return _constant(tree.value)
    if not isinstance(tree, Apply):
        raise UsageError(f"{tree} has no value before it is computed, so it cannot be compiled")
    parts = [_composed(part, arguments) for part in tree.arguments]
    if tree.operation not in SCALAR:
        raise UsageError(f"{tree.operation} cannot be compiled; known: {', '.join(SCALAR)}")
    return (_unary, _binary, _ternary)[len(parts) - 1](_scalar(tree.operation), *parts)


@cache
def _scalar(operation: str) -> Any:
    return kernel(SCALAR[operation])


@cache
def _leaf(i: int) -> Any:
    @kernel
    def leaf(*values: Any) -> Any:
        return values[i]

    return leaf


def _constant(value: Any) -> Any:
    @kernel
    def constant(*values: Any) -> Any:
        return value

    return constant


def _unary(operation: Any, a: Any) -> Any:
    @kernel
    def unary(*values: Any) -> Any:
        return operation(a(*values))

    return unary


def _binary(operation: Any, a: Any, b: Any) -> Any:
    @kernel
    def binary(*values: Any) -> Any:
        return operation(a(*values), b(*values))

    return binary


def _ternary(operation: Any, a: Any, b: Any, c: Any) -> Any:
    @kernel
    def ternary(*values: Any) -> Any:
        return operation(a(*values), b(*values), c(*values))

    return ternary


# ---------------------------------------------------------------------- folds of what arrives


def _merger(combine: str) -> Any:
    join = COMBINES[combine]

    @kernel
    def merge(out: Any, slots: Any, values: Any) -> None:
        for i in range(len(slots)):
            t = np.uint64(slots[i])
            out[t] = join(out[t], values[i])

    return merge


def _touched_merger(combine: str) -> Any:
    join = COMBINES[combine]

    @kernel
    def merge(out: Any, slots: Any, values: Any, marks: Any, mark: Any, touched: Any, found: Any) -> int:
        for i in range(len(slots)):
            t = np.uint64(slots[i])
            if marks[t] == mark:
                out[t] = join(out[t], values[i])
            else:
                marks[t] = mark
                touched[found] = t
                found += 1
                out[t] = values[i]
        return int(found)

    return merge


_MERGE = {combine: _merger(combine) for combine in COMBINES}
_MERGE_TOUCHED = {combine: _touched_merger(combine) for combine in COMBINES}


def merge_into(combine: str, out: Array, slots: Array, values: Array) -> None:
    """Fold ``values[i]`` into ``out[slots[i]]``, in order; both of one dtype, float64 or int64.

    >>> out = np.array([1.0, 2.0])
    >>> merge_into("min", out, np.array([1, 1], np.int32), np.array([5.0, 0.5]))
    >>> out.tolist()
    [1.0, 0.5]
    """
    _MERGE[combine](out, slots, values)


class Touched:
    """Which entries of an array were written in this superstep: nothing is cleared in between.

    >>> seen, out = Touched(4), np.zeros(4)
    >>> seen.begin()
    >>> seen.merge("sum", out, np.array([2, 2, 0]), np.array([1.0, 2.0, 5.0]))
    >>> seen.slots().tolist(), out.tolist()
    ([0, 2], [5.0, 0.0, 3.0, 0.0])
    """

    def __init__(self, entries: int):
        self._marks = np.zeros(entries, np.uint32)
        self._list = np.empty(entries, np.int32)
        self._mark, self._found = 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._marks.nbytes + self._list.nbytes

    def begin(self) -> None:
        """Forget all marks."""
        self._mark, self._found = self._mark + 1, 0
        if self._mark == 2**32:
            self._marks.fill(0)
            self._mark = 1

    def merge(self, combine: str, out: Array, slots: Array, values: Array) -> None:
        """Fold values; an entry's first one takes the place of what stood there."""
        mark = np.uint32(self._mark)
        self._found = _MERGE_TOUCHED[combine](out, slots, values, self._marks, mark, self._list, self._found)

    def slots(self) -> Array:
        """The entries that were written, ascending; a new array."""
        if self._found * 16 > len(self._marks):
            return np.flatnonzero(self._marks == np.uint32(self._mark)).astype(np.int32)
        return np.sort(self._list[: self._found])


# ---------------------------------------------------------------------- sums that no order changes


@cache
def _function(edge: Any) -> Any:
    return EDGE_FUNCTIONS[edge] if isinstance(edge, str) else edge


@cache
def tame_function(edge: Any, scale: float) -> Any:
    """The value times a power of two; 0 for what is not finite, see `sign_function`."""
    value = _function(edge)

    @kernel
    def tame(*values: Any) -> Any:
        v = np.float64(value(*values)) * scale
        return v if np.isfinite(v) else 0.0

    return tame


@cache
def sign_function(edge: Any, negative: bool) -> Any:
    """1 where the value is infinite with this sign, or not a number; else 0."""
    value, infinite = _function(edge), -np.inf if negative else np.inf

    @kernel
    def sign(*values: Any) -> Any:
        v = value(*values)
        return np.int64(1) if v == infinite or v != v else np.int64(0)

    return sign


@cache
def size_function(edge: Any, finite: bool) -> Any:
    """The absolute value; infinity for NaN, or, if ``finite``, 0 for what is not finite."""
    value, other = _function(edge), 0.0 if finite else np.inf

    @kernel
    def size(*values: Any) -> Any:
        v = abs(np.float64(value(*values)))
        return v if np.isfinite(v) else other

    return size


@kernel
def _largest_finite(values: Any) -> float:
    largest = 0.0
    for v in values:
        size = abs(np.float64(v))
        if np.isfinite(size) and size > largest:
            largest = size
    return largest


def largest_of(values: Array) -> tuple[float, bool]:
    """The largest finite absolute value, and whether any is not finite.

    >>> largest_of(np.array([1.0, -3.0, np.nan]))
    (3.0, True)
    """
    bits = int(largest_bits(values))
    if bits < INFINITY:
        return float(np.int64(bits).view(np.float64)), False
    return float(_largest_finite(values)), True


@kernel
def _joined(high: Any, low: Any, unit: Any, fine: Any, scale: Any, out: Any) -> None:
    for i in range(len(high)):
        out[i] = (np.float64(high[i]) * unit + np.float64(low[i]) * fine) * scale


def joined(high: Array, low: Array, unit: float, fine: float, scale: float, out: Array) -> Array:
    """The sums that two columns of integers stand for, times a power of two, in ``out``, float64.

    >>> joined(np.array([3, -1]), np.array([0, 2]), 1.0, 0.25, 2.0, np.empty(2)).tolist()
    [6.0, -1.0]
    """
    _joined(high, low, unit, fine, scale, out)
    return out
