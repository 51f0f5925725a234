"""Floats on a grid, for sums in any order: a float as two integers, and four such sums side by side.

A grid is two numbers, 1.5 times a power of two each, whose last bits weigh what the integers count: adding
them rounds, as in `iterreduce.columns.binned`. No value is larger than a third of the first one.

For kernels alone. Compilers do not put four chains of additions into one register by themselves where values
are looked up, so what does is written in LLVM's code. The order of integer additions means nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir as llvm
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from iterreduce.columns.jit import kernel

WIDTH = 4
_INT, _FLOAT = llvm.IntType(64), llvm.DoubleType()
_INTS, _FLOATS = llvm.VectorType(_INT, WIDTH), llvm.VectorType(_FLOAT, WIDTH)


class _Four(types.Type):  # type: ignore[misc,unused-ignore]
    """Four int64 in one register."""

    def __init__(self) -> None:
        super().__init__("FourIntegers")


_FOUR = _Four()
_PAIRS = types.Tuple((_FOUR, _FOUR))


@register_model(_Four)  # type: ignore[untyped-decorator,unused-ignore]
class _FourModel(models.PrimitiveModel):  # type: ignore[misc,unused-ignore]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _INTS)


@kernel
def limbs_of(value: Any, grid: Any) -> Any:
    """The two integers of a value."""
    high, low = grid
    x = np.float64(value)
    s = x + high
    rest = x - (s - high) + low
    return (
        np.float64(s).view(np.int64) - np.float64(high).view(np.int64),
        np.float64(rest).view(np.int64) - np.float64(low).view(np.int64),
    )


def _all_of(builder: Any, value: Any) -> Any:
    """A value four times."""
    made = llvm.Constant(llvm.VectorType(value.type, WIDTH), llvm.Undefined)
    for i in range(WIDTH):
        made = builder.insert_element(made, value, llvm.Constant(llvm.IntType(32), i))
    return made


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def four_sums(typing: Any, zero: Any, steps: Any, grid: Any) -> Any:
    """Four sums of pairs of integers that are 0 after so many steps of `add_four` with values of 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        steps, made = context.cast(builder, arguments[1], signature.args[1], types.int64), []
        for i in range(2):
            constant = builder.bitcast(builder.extract_value(arguments[2], i), _INT)
            made.append(_all_of(builder, builder.neg(builder.mul(steps, constant))))
        return context.make_tuple(builder, _PAIRS, made)

    return _PAIRS(zero, steps, grid), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def add_four(typing: Any, sums: Any, a: Any, b: Any, c: Any, d: Any, grid: Any) -> Any:
    """A step: add the integers of a value to each of four sums, all modulo 2**64."""
    given = (a, b, c, d)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pair, *values, numbers = arguments
        high, low = (_all_of(builder, builder.extract_value(numbers, i)) for i in range(2))
        x = llvm.Constant(_FLOATS, llvm.Undefined)
        for i, (value, kind) in enumerate(zip(values, given, strict=True)):
            number = context.cast(builder, value, kind, types.float64)
            x = builder.insert_element(x, number, llvm.Constant(llvm.IntType(32), i))
        s = builder.fadd(x, high)
        rest = builder.fadd(builder.fsub(x, builder.fsub(s, high)), low)
        made = [
            builder.add(builder.extract_value(pair, i), builder.bitcast(sum_, _INTS))
            for i, sum_ in enumerate((s, rest))
        ]
        return context.make_tuple(builder, _PAIRS, made)

    return _PAIRS(sums, a, b, c, d, grid), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def each_of_four(typing: Any, sums: Any) -> Any:
    """The four sums, each a pair of integers."""
    pair = types.UniTuple(types.int64, 2)
    made = types.UniTuple(pair, WIDTH)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        both = [builder.extract_value(arguments[0], i) for i in range(2)]
        each = []
        for i in range(WIDTH):
            at = llvm.Constant(llvm.IntType(32), i)
            each.append(context.make_tuple(builder, pair, [builder.extract_element(v, at) for v in both]))
        return context.make_tuple(builder, made, each)

    return made(sums), generate
