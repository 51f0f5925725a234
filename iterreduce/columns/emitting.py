"""Machine code of rows: instructions on numbers as one loop that reads, computes and writes each row once.

A program is plain data (`iterreduce.columns.lowering` writes it): instructions ``(operation, type, ...)``
whose operands are numbers of earlier instructions, which of them is the condition, if any, and which are
written.
The loop is emitted as LLVM code inside one Numba function, so that its size hardly matters for the time that
it takes to compile, and is filed on disk by what the program says (constants are no part of it: they are
handed over in each call).

Its one argument beside the number of rows is the address of a table of 64-bit words: addresses of the columns
read, scalars, addresses of the columns written. Nothing here checks lengths, types or memory:
`iterreduce.columns.compile` does, its only caller. Arithmetic is strict, and does what NumPy's loops do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from llvmlite import ir as llvm
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from iterreduce.columns.jit import kernel

Instruction = tuple[Any, ...]
BLOCK = 2048
"""Rows whose condition is computed before what is kept of them: their flags and numbers stay in cache."""

WORD, BYTE, BIT, SMALL = llvm.IntType(64), llvm.IntType(8), llvm.IntType(1), llvm.IntType(32)
FLOATS = {"f4": llvm.FloatType(), "f8": llvm.DoubleType()}


class Program(NamedTuple):
    """``code``: instructions; ``condition``: the one that says which rows are kept, or -1; ``outputs``: those
    that are written, as ``writes``; ``reads``: the types of columns read; ``scalars``: how many."""

    code: tuple[Instruction, ...]
    condition: int
    outputs: tuple[int, ...]
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    scalars: int


def compiled(program: Program) -> Any:
    """``loop(address of the table, rows)``, which returns the number of rows written."""
    plain: Any = tuple(program)  # what its fingerprint reads

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def body(typing: Any, table: Any, rows: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _Loop(builder, Program(*plain), *arguments).emit()

        return types.int64(types.int64, types.int64), generate

    @kernel
    def loop(table: Any, rows: Any) -> Any:
        return body(table, rows)

    return loop


SIGNATURE = (types.int64, types.int64)


def _register(dtype: str) -> Any:
    return BIT if dtype == "b1" else FLOATS.get(dtype) or llvm.IntType(8 * int(dtype[1:]))


def _memory(dtype: str) -> Any:
    return BYTE if dtype == "b1" else _register(dtype)


class _Loop:
    """One use of `compiled`: the program as LLVM code."""

    def __init__(self, builder: Any, program: Program, table: Any, rows: Any):
        self.builder, self.program, self.rows = builder, program, rows
        self.words = builder.inttoptr(table, WORD.as_pointer())
        inputs, at = len(program.reads), len(program.reads) + program.scalars
        self.reads = [self._pointer(i, dtype) for i, dtype in enumerate(program.reads)]
        self.scalars = [self._word(inputs + i) for i in range(program.scalars)]
        self.writes = [self._pointer(at + i, dtype) for i, dtype in enumerate(program.writes)]
        self._no_overlap()

    def _word(self, i: int) -> Any:
        return self.builder.load(self.builder.gep(self.words, [llvm.Constant(WORD, i)]))

    def _pointer(self, i: int, dtype: str) -> Any:
        return self.builder.inttoptr(self._word(i), _memory(dtype).as_pointer())

    def _no_overlap(self) -> None:
        """Columns that are written overlap no other: said once, not tested in every call."""
        module = self.builder.module
        domain = module.add_metadata(["iterreduce.columns"])
        scopes = [module.add_metadata([f"iterreduce.{i}", domain]) for i in range(1 + len(self.writes))]
        self.own = [module.add_metadata([scope]) for scope in scopes]
        self.others = [
            module.add_metadata([s for s in scopes if s is not scope] or [domain]) for scope in scopes
        ]

    def _alone(self, access: Any, scope: int) -> Any:
        access.set_metadata("alias.scope", self.own[scope])
        if self.writes:
            access.set_metadata("noalias", self.others[scope])
        return access

    def emit(self) -> Any:
        """The loop; the number of rows written."""
        if self.program.condition < 0:
            with self._range(self.rows) as i:
                self._write(_Row(self, i), i)
            return self.rows
        return self._kept()

    @contextmanager
    def _range(self, count: Any) -> Iterator[Any]:
        with cgutils.for_range(self.builder, count, intp=WORD) as step:
            yield step.index

    def _write(self, row: _Row, at: Any) -> None:
        builder = self.builder
        for k, output in enumerate(self.program.outputs):
            value = row.value(output)
            if self.program.writes[k] == "b1":
                value = builder.zext(value, BYTE)
            self._alone(builder.store(value, builder.gep(self.writes[k], [at])), 1 + k)

    def _kept(self) -> Any:
        builder, zero, block = self.builder, llvm.Constant(WORD, 0), llvm.Constant(WORD, BLOCK)
        flags = cgutils.alloca_once(builder, BYTE, size=block)
        numbers = cgutils.alloca_once(builder, SMALL, size=block)
        total, found = (cgutils.alloca_once_value(builder, zero) for _ in range(2))
        blocks = builder.udiv(builder.add(self.rows, llvm.Constant(WORD, BLOCK - 1)), block)
        with self._range(blocks) as b:
            first = builder.mul(b, block)
            left = builder.sub(self.rows, first)
            count = builder.select(builder.icmp_signed("<", left, block), left, block)
            with self._range(count) as i:
                holds = _Row(self, builder.add(first, i)).value(self.program.condition)
                builder.store(builder.zext(holds, BYTE), builder.gep(flags, [i]))
            builder.store(zero, found)
            with self._range(count) as i:
                k = builder.load(found)
                builder.store(builder.trunc(i, SMALL), builder.gep(numbers, [k]))
                builder.store(
                    builder.add(k, builder.zext(builder.load(builder.gep(flags, [i])), WORD)), found
                )
            start, kept = builder.load(total), builder.load(found)
            with self._range(kept) as j:
                row = builder.add(first, builder.zext(builder.load(builder.gep(numbers, [j])), WORD))
                self._write(_Row(self, row), builder.add(start, j))
            builder.store(builder.add(start, kept), total)
        return builder.load(total)


class _Row:
    """The values of one row; each instruction is emitted once, when it is first asked for."""

    def __init__(self, loop: _Loop, index: Any):
        self.loop, self.builder, self.index = loop, loop.builder, index
        self.known: dict[int, Any] = {}

    def value(self, at: int) -> Any:
        if at not in self.known:
            self.known[at] = self._emitted(self.loop.program.code[at])
        return self.known[at]

    def _emitted(self, instruction: Instruction) -> Any:
        operation, dtype, *operands = instruction
        if operation == "load":
            return self._load(operands[0], dtype)
        if operation == "scalar":
            return self._of_word(self.loop.scalars[operands[0]], dtype)
        if operation == "literal":
            return llvm.Constant(_register(dtype), operands[0])
        if operation == "row":
            return self.index
        if operation == "cast":
            return _cast(self.builder, self.value(operands[1]), operands[0], dtype)
        return EMIT[operation](self.builder, dtype, *map(self.value, operands))

    def _load(self, column: int, dtype: str) -> Any:
        builder = self.builder
        value = self.loop._alone(builder.load(builder.gep(self.loop.reads[column], [self.index])), 0)
        return _truth(builder, value) if dtype == "b1" else value

    def _of_word(self, word: Any, dtype: str) -> Any:
        builder = self.builder
        if dtype == "f8":
            return builder.bitcast(word, FLOATS["f8"])
        if dtype == "f4":
            return builder.bitcast(builder.trunc(word, SMALL), FLOATS["f4"])
        if dtype == "b1":
            return _truth(builder, word)
        return word if dtype[1:] == "8" else builder.trunc(word, _register(dtype))


def _truth(builder: Any, value: Any) -> Any:
    return builder.icmp_unsigned("!=", value, llvm.Constant(value.type, 0))


def _cast(builder: Any, value: Any, source: str, dtype: str) -> Any:
    """As ``astype`` of a number that the type holds."""
    if source == dtype:
        return value
    wanted, signed = _register(dtype), source[0] == "i"
    if dtype == "b1":
        return (
            builder.fcmp_unordered("!=", value, llvm.Constant(value.type, 0.0))
            if source[0] == "f"
            else _truth(builder, value)
        )
    if source[0] == "f" and dtype[0] == "f":
        return builder.fpext(value, wanted) if dtype == "f8" else builder.fptrunc(value, wanted)
    if source[0] == "f":
        return (builder.fptosi if dtype[0] == "i" else builder.fptoui)(value, wanted)
    if dtype[0] == "f":
        return (builder.sitofp if signed else builder.uitofp)(value, wanted)
    if wanted.width <= value.type.width:
        return value if wanted.width == value.type.width else builder.trunc(value, wanted)
    return (builder.sext if signed else builder.zext)(value, wanted)


# ---------------------------------------------------------------------- operations on values of one type


def _zero(value: Any) -> Any:
    return llvm.Constant(value.type, 0.0 if isinstance(value.type, llvm.FloatType | llvm.DoubleType) else 0)


def _arithmetic(integers: str, floats: str) -> Callable[..., Any]:
    def emit(builder: Any, dtype: str, a: Any, b: Any) -> Any:
        return getattr(builder, floats if dtype[0] == "f" else integers)(a, b)

    return emit


def _compare(sign: str) -> Callable[..., Any]:
    def emit(builder: Any, dtype: str, a: Any, b: Any) -> Any:
        if dtype[0] == "f":
            return (builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, a, b)
        return (builder.icmp_signed if dtype[0] == "i" else builder.icmp_unsigned)(sign, a, b)

    return emit


def _extreme(sign: str) -> Callable[..., Any]:
    """The second of two equal ones, which tells zeros apart; the first NaN."""

    def emit(builder: Any, dtype: str, a: Any, b: Any) -> Any:
        first = _compare(sign)(builder, dtype, a, b)
        if dtype[0] == "f":
            first = builder.or_(first, _is_nan(builder, dtype, a))
        return builder.select(first, a, b)

    return emit


def _is_nan(builder: Any, dtype: str, a: Any) -> Any:
    return builder.fcmp_unordered("uno", a, a)


def _is_finite(builder: Any, dtype: str, a: Any) -> Any:
    return _compare("<")(builder, dtype, _absolute(builder, dtype, a), llvm.Constant(a.type, float("inf")))


def _is_infinite(builder: Any, dtype: str, a: Any) -> Any:
    return _compare("==")(builder, dtype, _absolute(builder, dtype, a), llvm.Constant(a.type, float("inf")))


def _negative(builder: Any, dtype: str, a: Any) -> Any:
    return builder.fneg(a) if dtype[0] == "f" else builder.neg(a)


def _library(name: str) -> Callable[..., Any]:
    """A function that the processor computes exactly."""

    def emit(builder: Any, dtype: str, a: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic(f"llvm.{name}", [a.type]), [a])

    return emit


def _absolute(builder: Any, dtype: str, a: Any) -> Any:
    if dtype[0] == "f":
        return _library("fabs")(builder, dtype, a)
    if dtype[0] == "u":
        return a
    return builder.select(builder.icmp_signed("<", a, _zero(a)), builder.neg(a), a)


def _floored(builder: Any, dtype: str, a: Any, b: Any) -> tuple[Any, Any]:
    """Quotient and remainder, rounded down; of 0 and no exception where nothing answers."""
    zero, one = _zero(a), llvm.Constant(a.type, 1)
    bad = builder.icmp_unsigned("==", b, zero)
    if dtype[0] == "u":
        divisor = builder.select(bad, one, b)
        quotient, rest = builder.udiv(a, divisor), builder.urem(a, divisor)
    else:
        minus = builder.icmp_signed("==", b, llvm.Constant(a.type, -1))  # the smallest / -1 overflows
        divisor = builder.select(builder.or_(bad, minus), one, b)
        quotient, rest = builder.sdiv(a, divisor), builder.srem(a, divisor)
        down = builder.and_(
            builder.icmp_signed("!=", rest, zero),
            builder.icmp_signed("<", builder.xor(rest, divisor), zero),
        )
        quotient = builder.select(down, builder.sub(quotient, one), quotient)
        rest = builder.select(down, builder.add(rest, divisor), rest)
        quotient = builder.select(minus, builder.neg(a), quotient)
    return builder.select(bad, zero, quotient), builder.select(bad, zero, rest)


def _floor_divide(builder: Any, dtype: str, a: Any, b: Any) -> Any:
    return _floored(builder, dtype, a, b)[0]


def _remainder(builder: Any, dtype: str, a: Any, b: Any) -> Any:
    return _floored(builder, dtype, a, b)[1]


def _whole(builder: Any, dtype: str, a: Any, low: Any, high: Any) -> Any:
    """Is the whole part within [low, high)?"""
    whole = _library("trunc")(builder, dtype, a)
    return builder.and_(
        _compare(">=")(builder, dtype, whole, low), _compare("<")(builder, dtype, whole, high)
    )


EMIT: dict[str, Callable[..., Any]] = {
    "add": _arithmetic("add", "fadd"),
    "subtract": _arithmetic("sub", "fsub"),
    "multiply": _arithmetic("mul", "fmul"),
    "divide": _arithmetic("sdiv", "fdiv"),
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "negative": _negative,
    "absolute": _absolute,
    "minimum": _extreme("<"),
    "maximum": _extreme(">"),
    "less": _compare("<"),
    "less_equal": _compare("<="),
    "greater": _compare(">"),
    "greater_equal": _compare(">="),
    "equal": _compare("=="),
    "not_equal": _compare("!="),
    "and": lambda builder, dtype, a, b: builder.and_(a, b),
    "or": lambda builder, dtype, a, b: builder.or_(a, b),
    "xor": lambda builder, dtype, a, b: builder.xor(a, b),
    "not": lambda builder, dtype, a: builder.not_(a),
    "select": lambda builder, dtype, c, a, b: builder.select(c, a, b),
    "within": _whole,
    "isnan": _is_nan,
    "isfinite": _is_finite,
    "isinf": _is_infinite,
    "sqrt": _library("sqrt"),
    "floor": _library("floor"),
    "ceil": _library("ceil"),
    "trunc": _library("trunc"),
    "rint": _library("rint"),
}
